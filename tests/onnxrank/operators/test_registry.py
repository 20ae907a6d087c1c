"""The registry of operators is where it is said what an operator is, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from onnxrank.operators import REGISTRY

ROOT = Path(__file__).resolve().parents[3]
MODULES = [p for f in ("onnxrank", "rules") for p in sorted((ROOT / f).rglob("*.py")) if p.parent.name != "operators"]
NAMES = {s.name for s in onnx.defs.get_all_schemas()} | {name.rpartition("::")[2] for name in REGISTRY}
NAMED = {
    "onnxrank/fused.py: SAVED": "what it writes out, each in its own way",
    "onnxrank/emitter.py: _PASSED_BY": "what onnxruntime moves a Transpose through, into a product",
    "onnxrank/views.py: _NOT_TAKEN_IN": "what onnxruntime does behind nodes that were written",
    "onnxrank/loops.py: REDUCTIONS": "how the loops of EmbeddingBag reduce bags",
    "onnxrank/epilogues.py: _ACTIVATIONS": "what onnxruntime makes a part of a product",
    "onnxrank/profiling/kernels.py: _CONTAINERS": "what onnxruntime times along with what is in it",
    "onnxrank/verify/truth.py: INEXACT": "of which onnxruntime has no exact float64 kernels",
    "rules/movement.py: _PICKS": "which linear maps behind them make the move rather than a copy",
}
"""Sets that are about a runtime, or are a rule's own pattern."""


def sets(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Constants of a module that are no mappings, and the names of operators in them."""
    for statement in tree.body:
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            continue
        value = statement.value
        if isinstance(value, ast.Dict) or (isinstance(value, ast.Call) and "Rule" in ast.unparse(value.func)):
            continue
        strings = [n.value for n in ast.walk(value) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        words = {word.rpartition("::")[2] for text in strings for word in text.split()}
        target = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
        yield ast.unparse(target), words & NAMES


@pytest.mark.slow
def test_nobody_else_says_what_operators_are() -> None:
    """A set of operators outside the registry is a trait that is missing there; a table of functions is none."""
    found = {
        f"{path.relative_to(ROOT).as_posix()}: {name}"
        for path in MODULES
        for name, operators in sets(ast.parse(path.read_text(encoding="utf-8")))
        if len(operators) > 2
    }
    assert found == NAMED.keys()


@pytest.mark.parametrize(
    "text", ['_A = {"Add", "Mul", "Relu"}', 'A = frozenset("Add Mul Relu".split())', 'A = {*B, "Add", "Sub", "Neg"}']
)
def test_such_a_set_is_seen(text: str) -> None:
    assert [len(operators) for _, operators in sets(ast.parse(text))] == [3]
    assert not list(sets(ast.parse('RULE = Rule(operators={"Add": f, "Mul": f, "Relu": f})\nT = {"Add": f}')))
