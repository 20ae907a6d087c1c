"""onnxrank: makes exported ONNX ranking models fast without changing what they compute."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxrank.analysis import Analysis, analyse
    from onnxrank.inspection.engine import inspect
    from onnxrank.packer import pack_inputs
    from onnxrank.passes.emission import Result
    from onnxrank.passes.reading import read
    from onnxrank.pieces import emit, gate, plan
    from onnxrank.pipeline import optimize
    from onnxrank.plans import Plan
    from onnxrank.profiling.engine import profile
    from onnxrank.rewrite import Rewrite
    from onnxrank.roles import Roles
    from onnxrank.rule import Rule
    from onnxrank.splitting.engine import split

__all__ = [
    "Analysis",
    "Plan",
    "Result",
    "Rewrite",
    "Roles",
    "Rule",
    "analyse",
    "batch",
    "emit",
    "gate",
    "inspect",
    "optimize",
    "pack_inputs",
    "plan",
    "profile",
    "read",
    "split",
]

_HOME = {
    "Analysis": "analysis",
    "Plan": "plans",
    "Result": "passes.emission",
    "Rewrite": "rewrite",
    "Roles": "roles",
    "Rule": "rule",
    "analyse": "analysis",
    "batch": "batching.engine",
    "emit": "pieces",
    "gate": "pieces",
    "inspect": "inspection.engine",
    "optimize": "pipeline",
    "pack_inputs": "packer",
    "plan": "pieces",
    "profile": "profiling.engine",
    "read": "passes.reading",
    "split": "splitting.engine",
}


class _RulesBeside:
    """Finds the rules of a checkout, where they lie beside this package; in a wheel they lie in it.

    The checkout's package may be imported although another one is installed: Python looks in the current folder first.
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """What the import system asks where nobody else knew a module."""
        beside = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "rules")
        first = os.path.join(beside, "__init__.py")
        if name != "onnxrank.rules" or not os.path.isfile(first):
            return None
        return spec_from_file_location(name, first, submodule_search_locations=[beside])


sys.meta_path.append(_RulesBeside)


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line answers --help before numpy and onnx are loaded.
    if name not in _HOME:
        raise AttributeError(f"module 'onnxrank' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"onnxrank.{_HOME[name]}"), name)
