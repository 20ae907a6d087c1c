"""`select`: products at positions that nobody reads are not made."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import textform
from helpers import Graph, candidate, optimised, request, rules, whole_numbers
from modelkit import compare

N = 512
GIVEN = [request("h", 7, 4), candidate("c", 1, 4)]
Pick = Callable[[Graph, str], str]

PICKS: dict[str, tuple[Pick, int, int]] = {
    "gather the last": (lambda g, x: g.op("Gather", x, g.const(-1, np.int64), axis=1), 0, 1),
    "slice the last": (lambda g, x: g.op("Slice", x, g.ints(-1), g.ints(1 << 40), g.ints(1)), 0, 1),
    "slice the first": (lambda g, x: g.op("Slice", x, g.ints(0), g.ints(2), g.ints(1)), 2, 0),
    "some of both": (lambda g, x: g.op("Gather", x, g.ints(7, 0, 3), axis=1), 2, 1),
}


def sequence() -> tuple[Graph, str]:
    """[N, 8, 4]: the history, the candidate behind it."""
    g = Graph()
    return g, g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)


@pytest.mark.parametrize("pick", PICKS)
def test_positions_not_read(pick: str) -> None:
    """Two layers per position, then a choice of positions: only these are computed."""
    g, x = sequence()
    x = g.op("Relu", g.op("MatMul", x, g.const(whole_numbers(4, 6))))
    x = g.op("Add", g.op("MatMul", x, g.const(whole_numbers(6, 2))), g.const(whole_numbers(2)))
    how, user, item = PICKS[pick]
    g.output(g.op("Relu", how(g, x)), None)
    result = optimised(g, GIVEN)
    assert result.report.macs_before == N * 8 * (24 + 12)
    assert result.report.macs_after == (user + N * item) * (24 + 12)


def test_candidate_level_sequence() -> None:
    """A sequence of one level: the rule's own saving."""
    given = [request("u", 2), candidate("s", 8, 4)]
    g = Graph()
    u, s = (i.declare(g) for i in given)
    y = g.op("Relu", g.op("MatMul", s, g.const(whole_numbers(4, 2))))
    g.output(g.op("Add", u, g.op("Gather", y, g.const(5, np.int64), axis=1)), ["N", 2])
    result = optimised(g, given)
    assert "select" in rules(result)
    assert result.report.macs_after == N * 8
    assert optimised(g, given, ignore=["select"]).report.macs_after == N * 8 * 8


def test_another_reader() -> None:
    """A tensor that is also read in full is computed in full."""
    g, x = sequence()
    y = g.op("Relu", g.op("MatMul", x, g.const(whole_numbers(4, 6))))
    g.output(g.op("Gather", y, g.const(-1, np.int64), axis=1), ["N", 6])
    g.output(g.op("Neg", y), ["N", 8, 6])
    result = optimised(g, GIVEN)
    assert "select" not in rules(result)
    assert result.report.macs_after == (7 + N) * 24


def test_two_readers() -> None:
    """Two choices of positions need the positions of both."""
    g, x = sequence()
    y = g.op("MatMul", x, g.const(whole_numbers(4, 6)))
    for at in (1, 7):
        g.output(g.op("Relu", g.op("Gather", y, g.const(at, np.int64), axis=1)), ["N", 6])
    assert optimised(g, GIVEN).report.macs_after == (1 + N) * 24


@pytest.mark.parametrize("mixer", ["Softmax", "CumSum", "ReduceMax", "Transposed", "MatMul", "Flatten"])
def test_positions_that_mix(mixer: str) -> None:
    """Behind an operator that mixes positions, all are read."""
    g, x = sequence()
    y = g.op("MatMul", x, g.const(whole_numbers(4, 6)))
    if mixer == "Softmax":
        y = g.op("Softmax", y, axis=1)
    elif mixer == "CumSum":
        y = g.op("CumSum", y, g.const(1, np.int64))
    elif mixer == "ReduceMax":
        y = g.op("Sub", y, g.on_axes("ReduceMax", y, [1], keepdims=1))
    elif mixer == "Transposed":
        y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1]), g.ints(-1, 8, 6))
    elif mixer == "MatMul":
        y = g.op("MatMul", g.const(whole_numbers(8, 8)), y)
    else:
        y = g.op("Reshape", g.op("MatMul", g.op("Flatten", y), g.const(whole_numbers(48, 48))), g.ints(-1, 8, 6))
    g.output(g.op("Relu", g.op("Gather", y, g.const(-1, np.int64), axis=1)), ["N", 6])
    optimised(g, GIVEN, counts=(1, 2, 5), tolerance=1e-6)


def test_positions_of_other_axes() -> None:
    """Equal extents on several axes are not taken for one another."""
    given = [request("u", 4, 4), candidate("c", 4, 4)]
    for axis in (1, 2, 3):
        g = Graph()
        x = g.op("Concat", *(g.on_axes("Unsqueeze", i.declare(g), [1]) for i in given), axis=1)
        y = g.op("MatMul", g.op("Transpose", x, perm=[0, 2, 1, 3]), g.const(whole_numbers(4, 4)))
        y = g.op("Reshape", g.op("Relu", y), g.ints(-1, 4, 2, 4))
        g.output(g.op("Gather", y, g.ints(1), axis=axis), None)
        optimised(g, given)


def test_broadcast_operand() -> None:
    """Operands that are broadcast along the chosen axis are read as they are."""
    g, x = sequence()
    y = g.op("Mul", g.op("MatMul", x, g.const(whole_numbers(4, 6))), g.const(whole_numbers(8, 1, seed=2)))
    y = g.op(
        "Where", g.op("Greater", y, g.const(whole_numbers(1, 6))), y, g.op("MatMul", "c", g.const(whole_numbers(4, 6)))
    )
    g.output(g.op("Gather", y, g.ints(3, 7), axis=1), ["N", 2, 6])
    optimised(g, GIVEN)


def test_positions_at_run_time() -> None:
    """Positions that depend on the data may be any."""
    given = [*GIVEN, candidate("at", 1, ids=8)]
    g = Graph()
    h, c, at = (i.declare(g) for i in given)
    y = g.op("Relu", g.op("MatMul", g.op("Concat", h, c, axis=1), g.const(whole_numbers(4, 6))))
    wide = g.op("Expand", g.on_axes("Unsqueeze", at, [2]), g.ints(1, 1, 6))
    g.output(g.op("GatherElements", y, wide, axis=1), ["N", 1, 6])
    result = optimised(g, given)
    assert "select" not in rules(result)
    assert result.report.macs_after == (7 + N) * 24


@pytest.mark.parametrize("kind", ["ReduceMin", "ReduceMax", "ReduceL1"])
def test_positions_behind_an_axis_that_went(kind: str) -> None:
    """A reduction without its axis: positions of the result are those of another axis of the operand."""
    given = [request("u", 2), candidate("s", 5, 6, 4)]
    g = Graph()
    u, s = (i.declare(g) for i in given)
    first = g.op("Transpose", s, perm=[1, 2, 3, 0])
    y = g.op(kind, first, axes=[0], keepdims=0)
    picked = g.op("Gather", y, g.const([2, 3], np.int64), axis=1)
    total = g.op("ReduceMax", picked, axes=[0, 1], keepdims=0)
    g.output(g.op("Add", u, g.op("Unsqueeze", total, g.const([1], np.int64))), ["N", 2])
    optimised(g, given, counts=(1, 2, 5))


@pytest.mark.parametrize(
    "step",
    """MeanVarianceNormalization<axes=[2]>(r) LpNormalization(r) Hardmax(r) LogSoftmax(r) Acos(r) IsNaN(r) Sum(r,r,r)
    Mod<fmod=1>(r,r) Round(r) Mean(r,r) InstanceNormalization(r,five,five) LayerNormalization(r,three)""".split(),
)
@pytest.mark.parametrize("position", [-1, 2])
def test_through_whatever_treats_positions_independently(step: str, position: int) -> None:
    """Demanded positions are followed by what operators are, whether or not anything is gained."""
    model = textform.parse(f"""\
(float[N,4,3] user, float[N,1,3] item) => (float[N,3] y)
<int64 at = {{{position}}}, float[5] five, float[3] three> {{
  x = Concat<axis = 1>(user, item)
  r = Relu(x)
  s = {step}
  t = Cast<to = 1>(s)
  y = Gather<axis = 1>(t, at)
}}""")
    result = textform.rewritten(model)
    compare(model, result)
    assert result.changed or position == -1
