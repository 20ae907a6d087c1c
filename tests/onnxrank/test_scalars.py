"""Numbers that are broadcast over columns: they have as many axes, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Graph, candidate, feeds, operators, optimised, request, rewritten, session, whole_numbers
from onnx import ModelProto, numpy_helper

from onnxrank.verify.truth import Truth


def numbers(model: ModelProto, op: str) -> list[tuple[int, ...]]:
    """Shapes of the constants of one entry that nodes of an operator read."""
    stored = {t.name: numpy_helper.to_array(t).shape for t in model.graph.initializer}
    read = [stored[i] for n in model.graph.node if n.op_type == op for i in n.input if i in stored]
    return [s for s in read if np.prod(s) == 1]


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@pytest.mark.parametrize("op", ["Mul", "Max", "Sub", "Less"])
def test_columns(op: str, rank: int) -> None:
    """A number of any rank over [N, 4, 1], on either side, has three axes behind it."""
    g = Graph(17)
    given = [request("u", 4, 8), candidate("c", 4, 8)]
    for i in given:
        i.declare(g)
    weights = g.const(whole_numbers(8, 5))
    rows = [g.on_axes("ReduceSum", g.op("MatMul", x, weights), [-1], keepdims=1) for x in ("u", "c")]
    number = g.const(np.full((1,) * rank, 3, np.float32))
    made = [g.op(op, r, number) for r in rows] + [g.op(op, number, rows[1])]
    made = [g.op("Cast", m, to=1) for m in made]
    g.output(g.op("Sum", *made), None)
    result = optimised(g, given, counts=(0, 1, 2, 5, 40))
    assert set(numbers(result.model, op)) == {(1, 1, 1)}


def test_what_is_no_column_stays() -> None:
    """Tensors whose last axis is longer are passed over at once, and operators that take single numbers need those."""
    g = Graph(17)
    given = [request("u", 8), candidate("c", 8)]
    for i in given:
        i.declare(g)
    both = g.op("Relu", g.op("Concat", "u", "c", axis=1))
    total = g.on_axes("ReduceSum", g.op("Mul", both, g.const(3.0)), [-1], keepdims=1)
    g.output(g.op("Clip", total, g.const(-9.0), g.const(9.0)), None)
    result = optimised(g, given, counts=(1, 3))
    assert numbers(result.model, "Clip") == [(), ()]
    assert set(numbers(result.model, "Mul")) <= {()}


def test_the_shape_of_a_result_stays() -> None:
    """A number with more axes than what it meets gives its result those, and keeps them."""
    g = Graph(17)
    given = [request("u", 8), candidate("c", 8)]
    for i in given:
        i.declare(g)
    total = g.on_axes("ReduceSum", g.op("MatMul", "c", g.const(whole_numbers(8, 3))), [-1], keepdims=1)
    held = g.op("Mul", total, g.const(np.full((1, 1, 1), 2, np.float32)))
    g.output(g.op("Add", held, g.on_axes("ReduceSum", "u", [-1], keepdims=1)), None)
    optimised(g, given, counts=(1, 3, 20))


def test_bounds_of_masked_scores() -> None:
    """What `underflow` writes has them from the start."""
    g = Graph(17)
    scores, hidden = g.input("scores", ["N", 3, 60]), g.input("hidden", ["N", 1, 60])
    weights = g.op("Softmax", g.op("Add", scores, g.op("Mul", hidden, g.const(-1e9))), axis=-1)
    g.output(g.op("Mul", weights, g.const(2.0)), ["N", 3, 60])
    made = rewritten(g.model(), request=["hidden"]).model
    assert "ReduceMax" in operators(made) and numbers(made, "Max") == [(1, 1, 1)]


def test_constants_that_are_computed() -> None:
    """The root of a number, as torch scales attention by, stays one: rounded it would be another in float64."""
    g = Graph(17)
    given = [request("u", 4, 8), candidate("c", 4, 8)]
    for i in given:
        i.declare(g)
    weights, root = g.const(whole_numbers(8, 5)), g.op("Sqrt", g.const(np.float32(0.3)))
    u, c = (g.on_axes("ReduceSum", g.op("MatMul", x, weights), [-1], keepdims=1) for x in ("u", "c"))
    g.output(g.op("Mul", g.op("Sum", u, c), root), None)
    made = rewritten(g.model(), request=["u"]).model
    feed, own = feeds(given, 5)
    (want,), (got,) = (Truth(m).run(f).values() for m, f in ((g.model(), feed), (made, own)))
    np.testing.assert_allclose(got, want, rtol=1e-14)


@pytest.mark.parametrize("count", [512, 2])
def test_numbers_that_are_computed(count: int) -> None:
    """A number of the request's gets axes for columns of many candidates; for few that is a step too many."""
    g = Graph(17)
    given = [request("u", 4), candidate("c", 4, 8)]
    for i in given:
        i.declare(g)
    number = g.op("Gather", g.op("Abs", g.on_axes("ReduceSum", "u", [1], keepdims=0)), g.const(0, np.int64), axis=0)
    columns = g.on_axes("ReduceSum", g.op("MatMul", "c", g.const(whole_numbers(8, 5))), [-1], keepdims=1)
    g.output(g.op("Max", columns, number), None)
    made = rewritten(g.model(), request=["u"], candidates=count).model
    (node,) = [n for n in made.graph.node if n.op_type == "Max"]
    shaped = {o for n in made.graph.node if n.op_type == "Reshape" for o in n.output}
    assert bool(shaped & set(node.input)) == (count == 512)


def test_outputs_that_are_guarded_keep_their_axes() -> None:
    """Rows in two axes are brought into one before the guard: its number has as many axes as are there."""
    g = Graph(17)
    user, item = g.input("u", ["N", 2]), g.input("c", ["N", 3, 2])
    count = g.op("Mul", g.op("Gather", g.op("Shape", item), g.ints(0)), g.ints(3))
    rows = g.op("Reshape", item, g.op("Concat", count, g.ints(2), axis=0))
    total = g.op("MatMul", g.on_axes("ReduceMax", rows, [1], keepdims=1), g.const(np.full((1, 1), -1, np.float32)))
    g.output(g.op("Add", total, g.const(np.array([2], np.float32))), ["M", 1])
    g.output(g.op("MatMul", user, g.const(whole_numbers(2, 2))), ["N", 2])
    model = g.model()
    result = rewritten(model, request=["u"], interface="same")
    assert result.changed
    feed = {"u": np.ones((5, 2), np.float32), "c": whole_numbers(15, 2).reshape(5, 3, 2).astype(np.float32)}
    for before, after in zip(session(model).run(None, feed), session(result.model).run(None, feed), strict=True):
        assert np.array_equal(before, after)
