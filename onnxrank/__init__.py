"""onnxrank: makes exported ONNX ranking models fast without changing what they compute."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# In a wheel the rules lie in this package. In a checkout they lie beside it, and it may be imported from there although
# another copy is installed: Python looks in the current folder first.
_BESIDE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "rules")) and os.path.isfile(
    os.path.join(_BESIDE, "rules", "__init__.py")
):
    __path__.append(_BESIDE)

if TYPE_CHECKING:
    from onnxrank.inspection.engine import inspect
    from onnxrank.pipeline import Result, optimize
    from onnxrank.profiling.engine import profile
    from onnxrank.rewrite import Rewrite, Rule
    from onnxrank.roles import Roles

__all__ = ["Result", "Rewrite", "Roles", "Rule", "inspect", "optimize", "profile"]

_HOME = {
    "Result": "pipeline",
    "Rewrite": "rewrite",
    "Roles": "roles",
    "Rule": "rewrite",
    "inspect": "inspection.engine",
    "optimize": "pipeline",
    "profile": "profiling.engine",
}


def __getattr__(name: str) -> Any:
    # Imported on first use, so that the command line answers --help before numpy and onnx are loaded.
    if name not in _HOME:
        raise AttributeError(f"module 'onnxrank' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"onnxrank.{_HOME[name]}"), name)
