"""Positions that are read of tensors, going backwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import Graph, candidate, optimised, request, whole_numbers
from onnx import NodeProto, helper

from onnxrank.facts import Facts
from onnxrank.needed import Needs, positions_needed

ROWS = ((1, ("N",)), (20, ()), (8, ()))


def of(nodes: list[NodeProto], outputs: list[str], opset: int = 17, **shapes: Any) -> dict[str, Needs]:
    """Positions read where the last row, of 20, is gathered."""
    extents = {name: ROWS for n in nodes for name in (*n.input, *n.output)} | shapes
    return positions_needed(nodes, outputs, Facts(extents=extents), {}, {"last": np.array(19)}, opset)


def last(of_what: str = "y") -> NodeProto:
    return helper.make_node("Gather", [of_what, "last"], ["z"], axis=1)


@pytest.mark.parametrize("op", ["Relu", "Softmax", "LayerNormalization"])
def test_row_by_row(op: str) -> None:
    """Of what rows are computed from on their own, the same rows are read."""
    axis = {} if op == "Relu" else {"axis": 2}
    found = of([helper.make_node(op, ["x"], ["y"], **axis), last()], ["z"])
    assert found["x"][1].tolist() == [19]


@pytest.mark.parametrize("op", ["Relu", "Softmax", "Identity", "MatMul"])
def test_other_domain(op: str) -> None:
    """An operator that only has the name of one of ONNX's may read anything."""
    node = helper.make_node(op, ["x"], ["y"], domain="com.acme")
    assert "x" not in of([node, last()], ["z"])


def test_several_outputs() -> None:
    """Positions read of one output say nothing about another that is read too."""
    node = helper.make_node("LayerNormalization", ["x", "g"], ["y", "mean"], axis=2)
    assert "x" in of([node, last()], ["z"])
    for outputs in (["z", "mean"], ["z", "w"]):
        rest = [helper.make_node("Relu", ["mean"], ["w"])] if outputs[1] == "w" else []
        assert "x" not in of([node, last(), *rest], outputs)
        assert "x" not in of([node, *rest], outputs[1:])


def test_softmax_over_several_axes() -> None:
    """Before opset 13 it was over all axes from 1 on, unless said otherwise."""
    node = helper.make_node("Softmax", ["x"], ["y"])
    assert "x" in of([node, last()], ["z"], opset=13)
    assert "x" not in of([node, last()], ["z"], opset=11)


def test_nothing_is_read() -> None:
    """A slice of no positions reads nothing; that is no set of positions to keep."""
    node = helper.make_node("Slice", ["x", "start", "start", "axis"], ["z"])
    known = {"start": np.array([3]), "axis": np.array([1])}
    facts = Facts(extents={"x": ROWS, "z": ((1, ("N",)), (0, ()), (8, ()))})
    assert positions_needed([node], ["z"], facts, {}, known, 17) == {}


def test_normalisation_with_its_mean() -> None:
    """LayerNormalization of whose result a position is read, and of whose mean all are."""
    given = [request("u", 4), candidate("h", 6, 4)]
    g = Graph(17)
    u, h = (i.declare(g) for i in given)
    x = g.op("MatMul", h, g.const(whole_numbers(4, 4)))
    y, mean = g.ops("LayerNormalization", 2, x, g.const(np.ones(4)), axis=-1)
    y = g.op("Gather", y, g.const(5, np.int64), axis=1)
    mean = g.on_axes("ReduceMax", mean, [1, 2], keepdims=0)
    g.output(g.op("Add", g.op("Add", y, u), g.on_axes("Unsqueeze", mean, [1])), ["N", 4])
    optimised(g, given, counts=(1, 2, 5), tolerance=1e-6)


@pytest.mark.parametrize("read", [0, 1])
def test_topk_with_its_positions(read: int) -> None:
    """TopK of rows: one row is read of the values, all rows of the positions, or the other way round."""
    given = [request("u", 4, 6), candidate("c", 3, 6)]
    g = Graph(17)
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    found = g.ops("TopK", 2, x, g.ints(2), axis=2)
    found[1] = g.op("Cast", found[1], to=1)
    g.output(g.op("Gather", found[read], g.ints(6), axis=1), ["N", 1, 2])
    g.output(g.on_axes("ReduceSum", found[1 - read], [1, 2], keepdims=0), ["N"])
    optimised(g, given, counts=(1, 2, 5))
