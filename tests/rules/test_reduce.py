"""`pool`: sums, means and extrema over blocks of several levels."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Graph, candidate, optimised, refusals, request, rows, rules

GIVEN = [request("u", 3, 2), candidate("c", 5, 2)]
COUNTS = (1, 2, 5)  # onnxruntime gives wrong shapes for reductions of no rows


def fields(opset: int = 17) -> tuple[Graph, str]:
    g = Graph(opset)
    return g, g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)


@pytest.mark.parametrize("opset", [11, 17, 20])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Min", "SumSquare"])
def test_by_level(kind: str, keepdims: int, opset: int) -> None:
    """Over the fields: one partial result per level. Means are over eight fields, so all is exact."""
    g, x = fields(opset)
    g.output(g.on_axes(f"Reduce{kind}", x, [1], keepdims=keepdims), None)
    result = optimised(g, GIVEN, counts=COUNTS)
    assert rules(result)["pool"] == 1
    extents = rows(result, GIVEN, 50)
    partial = [n for n in result.model.graph.node if n.op_type.startswith("Reduce")]
    assert sorted(extents[n.output[0]] == 50 for n in partial) == [False, True]


@pytest.mark.parametrize("axes", [[-2], [2], [1, 2], [-1, 1]])
@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Prod", "L1", "L2", "LogSumExp", "SumSquare"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes(kind: str, axes: list[int], keepdims: int) -> None:
    """Axes behind the fields, several at once, negative ones."""
    g, x = fields()
    g.output(g.on_axes(f"Reduce{kind}", x, axes, keepdims=keepdims), None)
    optimised(g, GIVEN, counts=COUNTS, tolerance=1e-6)


@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Min"])
def test_rows_not_first(kind: str) -> None:
    """Candidates on the last axis, or between the reduced ones."""
    for perm, axes in (([1, 2, 0], [0]), ([1, 0, 2], [0]), ([1, 0, 2], [0, 2]), ([2, 1, 0], [1])):
        g, x = fields()
        g.output(g.on_axes(f"Reduce{kind}", g.op("Transpose", x, perm=perm), axes, keepdims=0), None)
        optimised(g, GIVEN, counts=COUNTS)


@pytest.mark.parametrize("axes", [[0], [0, 1], None])
@pytest.mark.parametrize("level", ["request", "mixed"])
@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max"])
def test_over_candidates(kind: str, level: str, axes: list[int] | None) -> None:
    """Reductions over the candidates count all rows, equal ones too."""
    g, x = fields()
    if level == "request":
        x = g.op("Relu", "u")
    y = g.op(f"Reduce{kind}", x, keepdims=1) if axes is None else g.on_axes(f"Reduce{kind}", x, axes, keepdims=1)
    g.output(g.op("Add", x, y), None)
    g.output(g.op("Neg", "c"), None)
    result = optimised(g, GIVEN, counts=COUNTS, tolerance=1e-6)
    assert f"Reduce{kind} goes over the candidates" in refusals(result)
    assert "pool" not in rules(result)


def test_merged_with_candidates() -> None:
    """[N * fields, d] reduced over its last axis."""
    g, x = fields()
    y = g.on_axes("ReduceSum", g.op("Reshape", x, g.ints(-1, 2)), [1], keepdims=0)
    g.output(g.op("Reshape", y, g.ints(-1, 8)), ["N", 8])
    optimised(g, GIVEN, counts=COUNTS)


def test_field_repeated() -> None:
    """A field that occurs more than once counts as often in a sum, and once in a maximum."""
    for kind in ("Sum", "Mean", "Max", "Min"):
        g = Graph()
        u, c = (i.declare(g) for i in GIVEN)
        x = g.op("Gather", g.op("Concat", u, c, axis=1), g.ints(0, 0, 3, 1, 7, 7, 7, 0), axis=1)
        g.output(g.on_axes(f"Reduce{kind}", x, [1], keepdims=0), ["N", 2])
        optimised(g, GIVEN, counts=COUNTS)


def test_different_parts_per_row() -> None:
    """[N, 2, 4]: the first row of fields mixes levels, the second is the candidate's; maxima may not see a 0."""
    for kind in ("Sum", "Max", "Min"):
        given = [request("u", 2), candidate("c", 6)]
        g = Graph()
        u, c = (i.declare(g) for i in given)
        x = g.op("Reshape", g.op("Concat", u, c, axis=1), g.ints(-1, 2, 4))
        shifted = g.op("Add" if kind == "Min" else "Sub", x, g.const(9))
        g.output(g.on_axes(f"Reduce{kind}", shifted, [2], keepdims=0), ["N", 2])
        optimised(g, given, counts=COUNTS)


def test_masked_mean() -> None:
    """Pooling of a history with the request's mask runs at one row, and divides by what it counts."""
    given = [request("h", 4, 2), request("m", 4), candidate("c", 2)]
    g = Graph()
    h, m, c = (i.declare(g) for i in given)
    mask = g.op("Cast", g.op("Greater", m, g.const(0)), to=1)
    total = g.on_axes("ReduceSum", g.op("Mul", h, g.on_axes("Unsqueeze", mask, [2])), [1], keepdims=0)
    count = g.op("Max", g.on_axes("ReduceSum", mask, [1], keepdims=1), g.const(1))
    g.output(g.op("Concat", g.op("Div", total, count), c, axis=1), ["N", 4])
    result = optimised(g, given, counts=COUNTS, tolerance=1e-6)
    extents = rows(result, given, 50)
    assert {k for k, n in extents.items() if n == 50} == {*(o.name for o in result.model.graph.output)} or all(
        extents[n.output[0]] < 50
        for n in result.model.graph.node
        if n.op_type in ("ReduceSum", "Div", "Mul", "Greater")
    )


def test_no_axes() -> None:
    """Empty axes are all axes, or none."""
    for noop in (0, 1):
        g, x = fields()
        y = g.op("ReduceSum", x, g.const([], np.int64), noop_with_empty_axes=noop, keepdims=1)
        g.output(g.op("Add", y, x), ["N", 8, 2])
        result = optimised(g, GIVEN, counts=COUNTS)
        assert ("goes over the candidates" in refusals(result)) == (not noop)


def test_of_a_pending_sum() -> None:
    """A layer, then a sum over its columns or its positions."""
    for axis, kind in ((2, "Sum"), (1, "Sum"), (1, "Mean"), (1, "Max"), (2, "Max")):
        given = [request("u", 4, 2), candidate("c", 4, 3)]
        g = Graph()
        x = g.op("Concat", *(i.declare(g) for i in given), axis=2)
        y = g.op("MatMul", x, g.const(np.arange(10).reshape(5, 2) % 3 - 1))
        g.output(g.on_axes(f"Reduce{kind}", y, [axis], keepdims=0), None)
        optimised(g, given, counts=COUNTS)


@pytest.mark.parametrize("op", ["ReduceMean", "Div"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_means_of_whole_numbers(dtype: type, op: str) -> None:
    """Whole numbers are divided once, behind the sum of all parts: (1 + 2) / 2 is not 1 / 2 + 2 / 2."""
    g, x = fields()
    x = g.op("Cast", x, to=6 if dtype is np.int32 else 7)
    if op == "Div":
        y = g.on_axes("ReduceSum", x, [1], keepdims=0)
        y = g.op("Div", g.op("Mul", y, y), g.const(7, dtype))
    else:
        y = g.on_axes(op, x, [1], keepdims=0)
    g.output(g.op("Cast", y, to=1), ["N", 2])
    g.output(g.op("Softmax", g.op("Relu", "u")), ["N", 3, 2])
    optimised(g, GIVEN, counts=(1, 2, 5, 33), tolerance=1e-6)


@pytest.mark.parametrize("keepdims", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("level", ["request", "candidate", "both"])
@pytest.mark.parametrize("kind", ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare"])
def test_over_a_length_that_does_not_matter(kind: str, level: str, keepdims: int) -> None:
    """What is the same at all positions of a history is still counted once for each."""
    given = [request("h", "L", 2), request("u", 2), candidate("c", 2)]
    g = Graph()
    h, u, c = (i.declare(g) for i in given)
    x = {"request": [g.op("Relu", u)], "candidate": [c], "both": [g.op("Relu", u), c]}[level]
    wide = g.on_axes("Unsqueeze", g.op("Concat", *x, axis=1), [1])
    size = g.op("Gather", g.op("Shape", h), g.ints(1), axis=0)
    wide = g.op("Expand", wide, g.op("Concat", g.ints(1), size, g.ints(1), axis=0))
    g.output(g.on_axes(f"Reduce{kind}", wide, [1], keepdims=keepdims), None)
    g.output(g.op("Relu", g.op("Add", h, g.on_axes("Unsqueeze", c, [1]))), ["N", "L", 2])
    lengths = ({"L": 1}, {"L": 5}, {"L": 51})
    optimised(
        g, given, counts=COUNTS, tolerance=1e-6 if kind in ("LogSumExp", "L2", "Mean", "Prod") else 0, lengths=lengths
    )


@pytest.mark.parametrize("kind", ["Max", "Min", "Sum", "Mean"])
@pytest.mark.parametrize("level", ["request", "both"])
def test_padded(level: str, kind: str) -> None:
    """A zero beside negative numbers is their maximum."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    x = g.op("Concat", u, c, axis=1) if level == "both" else g.op("Identity", u)
    x = g.op("Sub" if kind == "Max" else "Add", x, g.const(9))
    y = g.on_axes(f"Reduce{kind}", g.op("Pad", x, g.ints(0, 0, 0, 0, 8 if level == "both" else 5, 0)), [1], keepdims=0)
    g.output(g.op("Add", y, g.op("Gather", c, g.const(0, np.int64), axis=1)), ["N", 2])
    optimised(g, GIVEN, counts=COUNTS)
