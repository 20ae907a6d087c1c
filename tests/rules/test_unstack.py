"""Sums over stacks of tensors: tensor by tensor, where that copies less."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Graph, candidate, optimised, request

from onnxrank import Result

GIVEN = [request("u", 6), candidate("c", 8)]
EXPERTS = 3


def mixture(width: int, gated: bool = True, keepdims: int = 0, opset: int = 17) -> tuple[Graph, str, str]:
    """Experts over the user and the item, stacked; what they are summed from, and their sum."""
    g = Graph(opset)
    rng = np.random.default_rng(width)
    both = g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)

    def layer(columns: int) -> str:
        return g.op("Relu", g.op("MatMul", both, g.const(rng.integers(-2, 3, (14, columns)))))

    stack = g.op("Concat", *(g.on_axes("Unsqueeze", layer(width), [1]) for _ in range(EXPERTS)), axis=1)
    x = g.op("Mul", stack, g.on_axes("Unsqueeze", layer(EXPERTS), [2])) if gated else stack
    total = g.on_axes("ReduceSum", x, [1], keepdims=keepdims)
    g.output(g.op("MatMul", total, g.const(rng.integers(-2, 3, (width, 2)))), None)
    return g, stack, x


def stacks(result: Result) -> int:
    return sum(n.op_type == "Concat" and len(n.input) == EXPERTS for n in result.model.graph.node)


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("gated", [False, True])
def test_one_by_one(gated: bool, keepdims: int, opset: int) -> None:
    g, *_ = mixture(64, gated, keepdims, opset)
    result = optimised(g, GIVEN, counts=(1, 2, 5, 40))
    assert not stacks(result)
    assert not any(n.op_type == "ReduceSum" for n in result.model.graph.node)


def test_narrow_ones_stay_together() -> None:
    """Passes over so little take no longer than it takes to begin one."""
    g, *_ = mixture(16)
    assert stacks(optimised(g, GIVEN, counts=(1, 5))) == 1


@pytest.mark.parametrize("kind", ["stack", "product"])
def test_what_somebody_else_reads_stays(kind: str) -> None:
    g, stack, product = mixture(64)
    g.output(g.on_axes("ReduceMax", stack if kind == "stack" else product, [1], keepdims=0), None)
    assert stacks(optimised(g, GIVEN, counts=(1, 5))) == 1
