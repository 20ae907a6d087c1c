"""The picture of imports: what a longer way implies is left out, and every module of the package is in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grimp", reason="import-linter is not installed")

import import_graph

PACKAGE = Path(__file__).resolve().parents[2] / "onnxrank"


def test_reduced() -> None:
    graph = {"a": {"b", "c", "d"}, "b": {"c"}, "c": {"d"}, "d": set()}
    assert import_graph.reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": set()}
    diamond = {"a": {"b", "c", "d"}, "b": {"d"}, "c": {"d"}, "d": set()}
    assert import_graph.reduced(diamond) == {"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}


def test_every_module_is_drawn() -> None:
    """In a process of its own, for grimp looks at the package that is imported already."""
    done = subprocess.run([sys.executable, import_graph.__file__], capture_output=True, text=True, check=True)
    arrows = re.findall(r"^  (\w+) --> (\w+)$", done.stdout, re.MULTILINE)
    modules = {p.stem for p in PACKAGE.glob("*.py")} | {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    assert {name for arrow in arrows for name in arrow} == modules - {"__init__"} | {"rules"}
    assert done.stdout == import_graph.mermaid({a: {y for x, y in arrows if x == a} for a, _ in arrows})
