"""ONNX's own node tests as ranking models: a few operators of each kind. `scripts/node_tests.py` runs all."""

from __future__ import annotations

import fnmatch
from collections import Counter
from typing import Any

import pytest
from onnx import ModelProto

from scripts import node_tests

PATTERNS = ["gemm_*", "matmul*", "layer_normalization_3d*", "softmax_*", "slice*", "split_*", "reduce_sum_k*", "gru_*"]


pytestmark = pytest.mark.slow
Test = tuple[str, ModelProto, list[Any]]


@pytest.fixture(scope="module")
def tests() -> list[Test]:
    """All of them: making them takes a while."""
    return list(node_tests.tests())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_none_is_wrong(tests: list[Test], pattern: str) -> None:
    found: Counter[str] = Counter()
    for name, model, inputs in tests:
        if fnmatch.fnmatch(name, f"test_{pattern}"):
            for case in node_tests.cases(name, model, inputs):
                what, why = node_tests.run(case)
                found[what] += 1
                assert what not in ("wrong", "error"), (case.name, why)
    assert found["optimised"] + found["left alone"]


def test_what_becomes_of_one(tests: list[Test]) -> None:
    """A layer whose operand is put together from both levels is divided; the weights are constants, or candidates'."""
    name, model, inputs = next(t for t in tests if t[0] == "test_matmul_2d")
    found = {case.name: node_tests.run(case)[0] for case in node_tests.cases(name, model, inputs)}
    assert found["test_matmul_2d/joined/a"] == "optimised"
    assert "wrong" not in found.values() and "error" not in found.values()


def test_what_is_the_requests_is_made_once(tests: list[Test]) -> None:
    name, model, inputs = next(t for t in tests if t[0] == "test_softmax_axis_2")
    (once,) = (case for case in node_tests.cases(name, model, inputs) if case.name.endswith("/once"))
    assert node_tests.run(once)[0] == "optimised"


def test_what_is_made_for_each_is_told(tests: list[Test]) -> None:
    name, model, inputs = next(t for t in tests if t[0] == "test_unique_not_sorted_without_axis")
    (once,) = (case for case in node_tests.cases(name, model, inputs) if case.name.endswith("/once"))
    what, why = node_tests.run(once)
    assert what == "for each" and "Unique is not known to treat rows independently" in why
