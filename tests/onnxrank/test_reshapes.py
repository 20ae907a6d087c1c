"""Reshapes that others undo are left out, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pytest
from helpers import Given, Graph, candidate, operators, optimised, refusals, request, whole_numbers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxrank import cost

COUNTS = (0, 1, 2, 7, 90)
EXAMPLES = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
Between = Callable[[Graph, str], str]
"""Makes `[N, 12]` of `[N, 12]`."""


def left(between: Between, opset: int = 17, counts: Sequence[int] = COUNTS) -> Counter[str]:
    """Operators of a result in which candidates go through something, beside a layer that is rewritten."""
    g = Graph(opset)
    inputs = [request("u", 64), candidate("c", 12)]
    u, c = (i.declare(g) for i in inputs)
    made = between(g, g.op("Mul", c, c))
    both = g.op("Concat", u, made, axis=1)
    g.output(g.op("MatMul", both, g.const(whole_numbers(76, 64))), ["N", 64])
    with mock.patch.object(cost, "CPU", cost.Target(launch=0.0, byte=1e-16, mac=1 / 25e9)):
        result = optimised(g, inputs, counts=counts, tolerance=1e-6)
    assert result.changed and "nothing makes" not in refusals(result)
    return Counter(operators(result.model))


def to(g: Graph, x: str, *shape: int) -> str:
    return g.op("Reshape", x, g.ints(*shape))


def kept(g: Graph, x: str) -> str:
    """A step that no Reshape goes through."""
    return g.op("Softmax", x, axis=-1)


CASES: dict[str, tuple[Between, int]] = {
    "back": (lambda g, x: kept(g, to(g, to(g, kept(g, x), -1, 3, 4), -1, 12)), 0),
    "of one": (lambda g, x: to(g, kept(g, to(g, to(g, x, -1, 2, 6), -1, 3, 4)), -1, 12), 2),
    "a function between": (lambda g, x: kept(g, to(g, g.op("Abs", to(g, kept(g, x), -1, 3, 4)), -1, 12)), 0),
    "a number between": (
        lambda g, x: kept(g, to(g, g.op("Add", to(g, kept(g, x), -1, 3, 4), g.const(np.ones((1, 1, 1)))), -1, 12)), 0,
    ),
    "of another shape": (
        lambda g, x: kept(g, to(g, g.op("Add", to(g, kept(g, x), -1, 3, 4), kept(g, to(g, x, -1, 3, 4))), -1, 12)), 2,
    ),
    "broadcast": (
        lambda g, x: kept(g, to(g, g.op("Add", to(g, kept(g, x), -1, 3, 4), g.const(whole_numbers(3, 4))), -1, 12)), 2,
    ),
    "read twice": (
        lambda g, x: g.op("Add", kept(g, to(g, (y := g.op("Abs", to(g, kept(g, x), -1, 3, 4))), -1, 12)),
                          to(g, kept(g, y), -1, 12)), 3,
    ),
    "behind a Transpose": (
        lambda g, x: to(g, kept(g, to(g, to(g, g.op("Transpose", to(g, kept(g, x), -1, 3, 4), perm=[0, 2, 1]), -1, 12),
                                      -1, 4, 3)), -1, 12), 4,
    ),
    "what is not known": (
        lambda g, x: kept(g, to(g, kept(g, to(g, x, 0, 3, 4)), 0, -1)), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_reshapes_that_are_left(case: str) -> None:
    between, count = CASES[case]
    assert left(between)["Reshape"] == count


@pytest.mark.parametrize("opset", [12, 13, 18])
@pytest.mark.parametrize("keep", [0, 1])
def test_reductions_keep_their_axes_or_not(keep: int, opset: int) -> None:
    def between(g: Graph, x: str) -> str:
        pairs = kept(g, to(g, x, -1, 12, 1)) if keep else kept(g, to(g, x, -1, 6, 2))
        total = g.on_axes("ReduceSum", pairs, [1 if keep else 2], keepdims=keep)
        wide = to(g, total, -1, 1) if keep else to(g, total, -1, 6, 1)
        again = kept(g, wide)
        return g.op("Expand", again, g.ints(1, 12)) if keep else to(g, g.op("Concat", again, again, axis=2), -1, 12)

    made = left(between, opset)
    assert made["Reshape"] == (1 if keep else 2)


def test_what_a_graph_inside_reads_is_found_by_its_new_name() -> None:
    def between(g: Graph, x: str) -> str:
        back, ways = to(g, to(g, kept(g, x), -1, 3, 4), -1, 12), []
        for op in ("Neg", "Abs"):
            out = helper.make_tensor_value_info(f"{op} of it", TensorProto.FLOAT, None)
            ways.append(helper.make_graph([helper.make_node(op, [back], [out.name])], op, [], [out]))
        last = g.op("Slice", "u", g.ints(0), g.ints(1), g.ints(1))
        asked = g.op("Greater", g.on_axes("ReduceMax", last, [0, 1], keepdims=0), g.const(0.5))
        return to(g, g.op("If", asked, then_branch=ways[0], else_branch=ways[1]), -1, 12)

    assert left(between, counts=(1, 2, 7))["Reshape"] == 0


SHAPES = [(-1, 12), (-1, 3, 4), (-1, 2, 6), (-1, 12, 1), (0, 4, 3), (-1, 1, 12)]


@pytest.mark.slow
@EXAMPLES
@given(st.data())
def test_any_chain(data: st.DataObject) -> None:
    """Scores are the same bit by bit, whatever stands between Reshapes."""

    def between(g: Graph, x: str) -> str:
        shape, made, before = (-1, 12), x, [((-1, 12), x)]
        for _ in range(data.draw(st.integers(2, 8))):
            step = data.draw(st.sampled_from(["Reshape", "Reshape", "Abs", "Add", "Mul", "ReduceMax", "Where"]))
            if step == "Reshape":
                shape = data.draw(st.sampled_from(SHAPES))
                made = to(g, made, *shape)
            elif step == "Abs":
                made = g.op("Abs", made)
            elif step == "ReduceMax" and 1 in shape:
                keep, axis = data.draw(st.booleans()), shape.index(1)
                made = g.on_axes("ReduceMax", made, [axis], keepdims=int(keep))
                shape = shape if keep else (-1, 12)
            elif step != "ReduceMax":
                other = next((n for s, n in before[::-1] if s == shape and data.draw(st.booleans())), None)
                other = other or g.const(whole_numbers(*(1 if n < 1 else n for n in shape), seed=len(before)))
                if step == "Where":
                    made = g.op("Where", g.op("Greater", made, other), made, other)
                else:
                    made = g.op(step, made, other)
            before.append((shape, made))
        return to(g, made, -1, 12)

    left(between, data.draw(st.sampled_from([13, 18])))


def test_slopes_have_no_more_axes_than_what_they_scale() -> None:
    """A PRelu whose first operand lost an axis would be none any more."""

    def between(g: Graph, x: str) -> str:
        row = kept(g, g.on_axes("ReduceMax", x, [0], keepdims=0))
        scaled = g.op("PRelu", to(g, row, 1, 1, 12), g.const(whole_numbers(1, 1, 12)))
        return g.op("Mul", x, to(g, scaled, 1, 12))

    assert left(between, counts=(1, 2, 7))["Reshape"] == 3


def test_pairs_of_fields_take_few() -> None:
    """Their rows are brought to the layer's two axes and back."""
    g = Graph()
    inputs = [Given("x", (24,), "mixed", tuple(range(12)))]
    x = to(g, inputs[0].declare(g), -1, 6, 4)
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    first, second = (g.op("Gather", x, g.const([p[k] for p in pairs], np.int64), axis=1) for k in (0, 1))
    dots = g.on_axes("ReduceSum", g.op("Mul", first, second), [2], keepdims=0)
    linear = g.on_axes("ReduceSum", x, [1, 2], keepdims=1)
    score = g.op("MatMul", dots, g.const(whole_numbers(len(pairs), 1)))
    g.output(g.op("Add", to(g, linear, -1, 1), score), ["N", 1])
    with mock.patch.object(cost, "CPU", cost.Target(launch=0.0, byte=1e-16, mac=1 / 25e9)):
        result = optimised(g, inputs, counts=COUNTS)
    assert result.changed and operators(result.model).count("Reshape") <= 6
