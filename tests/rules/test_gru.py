"""`gru`: recurrent layers over the request's history run for one row."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Given, Graph, candidate, operators, optimised, refusals, request, rows, rules, whole_numbers
from onnx import TensorProto, helper

import onnxrank

LENGTH, WIDTH, HIDDEN = 6, 3, 4
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
TOLERANCE = 1e-5
COUNTS = (1, 2, 5)  # recurrent layers over no rows crash onnxruntime


def recurrent(
    g: Graph, kind: str, x: str, *, lengths: str = "", state: str = "", direction: str = "forward", bias: bool = True
) -> list[str]:
    """Outputs Y, Y_h (and Y_c) for `x` of [L, N, D]."""
    both, wide = 2 if direction == "bidirectional" else 1, GATES[kind] * HIDDEN
    rng = np.random.default_rng(3)
    w, r, b = (g.const(rng.normal(0, 0.5, (both, wide, k))) for k in (WIDTH, HIDDEN, 1))
    b = g.const(rng.normal(0, 0.5, (both, 2 * wide))) if bias else ""
    operands = [x, w, r, b, lengths, state]
    while not operands[-1]:
        operands.pop()
    return g.ops(kind, 3 if kind == "LSTM" else 2, *operands, hidden_size=HIDDEN, direction=direction)


def steps_first(g: Graph, x: str) -> str:
    return g.op("Transpose", x, perm=[1, 0, 2])


def counted(g: Graph, ids: str) -> str:
    """Lengths from 1 to all steps."""
    return g.op("Cast", g.op("Clip", ids, g.const(1, np.int64), g.const(LENGTH, np.int64)), to=6)


def scored(g: Graph, state: str, c: str) -> None:
    """A layer on the last state and the candidate."""
    x = g.op("Concat", g.on_axes("Squeeze", state, [0]), c, axis=1)
    g.output(g.op("MatMul", x, g.const(whole_numbers(HIDDEN + 2, 3))), ["N", 3])


def assert_one_row(result: onnxrank.Result, given: list[Given], kind: str) -> None:
    extents = rows(result, given, 50)
    nodes = [n for n in result.model.graph.node if n.op_type == kind]
    assert nodes and all(extents[o] < 50 for n in nodes for o in n.output if o)


@pytest.mark.parametrize("kind", GATES)
def test_history(kind: str) -> None:
    """The encoder runs for one row; its end goes into a divided layer."""
    given = [request("h", LENGTH, WIDTH), candidate("c", 2)]
    g = Graph()
    h, c = (i.declare(g) for i in given)
    scored(g, recurrent(g, kind, steps_first(g, h))[1], c)
    result = optimised(g, given, counts=COUNTS, tolerance=TOLERANCE)
    assert rules(result)["gru"] == 1
    assert rules(result)["fc"] == 1
    assert_one_row(result, given, kind)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", GATES)
def test_all_outputs(kind: str, direction: str) -> None:
    """The whole sequence and the last states, with initial state and lengths of the request."""
    both = 2 if direction == "bidirectional" else 1
    given = [request("h", LENGTH, WIDTH), request("s", both, HIDDEN), request("l", ids=LENGTH), candidate("c", 2)]
    g = Graph()
    h, s, lengths, c = (i.declare(g) for i in given)
    lengths = counted(g, lengths)
    state = g.op("Transpose", s, perm=[1, 0, 2])
    outputs = recurrent(g, kind, steps_first(g, h), lengths=lengths, state=state, direction=direction)
    for y in outputs:
        g.output(g.op("Relu", y), None)
    g.output(g.op("Neg", c), ["N", 2])
    result = optimised(g, given, counts=COUNTS, tolerance=TOLERANCE)
    assert rules(result)["gru"] == 1
    assert_one_row(result, given, kind)


@pytest.mark.parametrize("part", ["sequence", "step", "state", "lengths"])
def test_candidate_level_part(part: str) -> None:
    """A sequence, a step of it, a state or lengths that depend on the candidate: all rows, with the reason."""
    given = [request("h", LENGTH, WIDTH), request("s", 1, HIDDEN), candidate("c", WIDTH), candidate("d", 1, HIDDEN)]
    given += [candidate("e", LENGTH, WIDTH), candidate("l", ids=LENGTH)]
    g = Graph()
    h, s, c, d, e, lengths = (i.declare(g) for i in given)
    x = {"sequence": e, "step": g.op("Concat", h, g.on_axes("Unsqueeze", c, [1]), axis=1)}.get(part, h)
    state = g.op("Transpose", d if part == "state" else s, perm=[1, 0, 2])
    counts = counted(g, lengths) if part == "lengths" else ""
    g.output(g.op("Relu", recurrent(g, "GRU", steps_first(g, x), state=state, lengths=counts)[1]), None)
    for unread in (h, s, c, d, e, lengths):
        g.op("Identity", unread)
    result = optimised(g, given, counts=COUNTS, tolerance=TOLERANCE)
    assert "gru" not in rules(result)
    assert "depends on the candidate" in refusals(result)


def test_candidates_as_steps() -> None:
    """A layer that runs over the candidates, one after the other, mixes them; so does one over equal rows."""
    for level in (request, candidate):
        given = [level("x", 1, WIDTH), candidate("c", 2), request("u", 2)]
        g = Graph()
        x, c, u = (i.declare(g) for i in given)
        y = recurrent(g, "GRU", g.op("Mul", x, g.const(1)))[0]
        g.output(g.op("Relu", y), ["N", 1, 1, HIDDEN])
        g.output(g.op("Add", g.op("Neg", u), c), ["N", 2])
        result = optimised(g, given, counts=COUNTS, tolerance=TOLERANCE)
        assert "gru" not in rules(result)


def test_every_step_against_the_candidate() -> None:
    """All states, pooled with weights that depend on the candidate."""
    given = [request("h", LENGTH, WIDTH), candidate("c", HIDDEN)]
    g = Graph()
    h, c = (i.declare(g) for i in given)
    states = g.op("Transpose", g.on_axes("Squeeze", recurrent(g, "GRU", steps_first(g, h))[0], [1]), perm=[1, 0, 2])
    scores = g.op("MatMul", g.on_axes("Unsqueeze", c, [1]), g.op("Transpose", states, perm=[0, 2, 1]))
    g.output(g.op("MatMul", g.op("Softmax", scores, axis=-1), states), ["N", 1, HIDDEN])
    result = optimised(g, given, counts=COUNTS, tolerance=TOLERANCE)
    assert_one_row(result, given, "GRU")
    assert operators(result.model).count("GRU") == 1


def test_two_layers() -> None:
    """The second layer over the first one's states runs for one row too."""
    given = [request("h", LENGTH, WIDTH), candidate("c", 2)]
    g = Graph()
    h, c = (i.declare(g) for i in given)
    first = g.on_axes("Squeeze", recurrent(g, "GRU", steps_first(g, h))[0], [1])
    narrow = g.op("Slice", first, g.ints(0), g.ints(WIDTH), g.ints(2))
    scored(g, recurrent(g, "LSTM", narrow)[1], c)
    result = optimised(g, given, counts=COUNTS, tolerance=TOLERANCE)
    assert rules(result)["gru"] == 2
    assert_one_row(result, given, "LSTM")


@pytest.mark.parametrize("kind", GATES)
def test_rows_that_are_a_length(kind: str) -> None:
    """The batch of the layer is a history's positions: lengths that are the same for all still have one for each."""
    given = [Given("h", ("L", WIDTH), "once"), request("u", 3), candidate("c", 3)]
    g = Graph()
    h, u, c = (i.declare(g) for i in given)
    length = g.op("Gather", g.op("Shape", h), g.ints(1), axis=0)
    value = helper.make_tensor("value", TensorProto.INT32, [1], [1])
    every = recurrent(g, kind, h, lengths=g.op("ConstantOfShape", length, value=value))[0]
    g.output(g.op("Transpose", every, perm=[2, 0, 1, 3]), ["L", 1, 1, HIDDEN])
    g.output(g.op("MatMul", g.op("Concat", u, c, axis=1), g.const(whole_numbers(6, 3))), ["N", 3])
    optimised(g, given, counts=COUNTS, tolerance=TOLERANCE, lengths=[{"L": 3}, {"L": 7}])
