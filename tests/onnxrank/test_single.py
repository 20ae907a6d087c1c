"""What is repeated for every candidate is not repeated for a single one, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
import pytest
from helpers import Graph, run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

import onnxrank
from onnxrank.forms import Form
from onnxrank.joining import SINGLE, is_crossover
from onnxrank.plans import Plan


def ranker(how: str, opset: int = 17) -> ModelProto:
    """A layer over a user, repeated in some way, and an item."""
    g = Graph(opset)
    user, item = g.input("user", [1, 4]), g.input("item", ["N", 3])
    rows = g.op("Shape", item)
    count = g.op("Gather", rows, g.ints(0), axis=0)
    if how == "expand":
        repeated = g.op("Expand", user, g.op("Concat", count, g.ints(4), axis=0))
    elif how == "expand by ones":
        repeated = g.op("Expand", user, g.op("Concat", count, g.ints(1), axis=0))
    elif how == "tile":
        repeated = g.op("Tile", user, g.op("Concat", count, g.ints(1), axis=0))
    elif how == "wider":  # two numbers of four: not what it was, for one candidate either
        repeated = g.op("Tile", user, g.op("Concat", count, g.ints(2), axis=0))
    else:
        repeated = g.op("Expand", user, g.op("Concat", g.ints(2), count, g.ints(4), axis=0))
    if how == "more axes":
        repeated = g.op("Reshape", repeated, g.ints(-1, 8))
    width = 8 if how in ("wider", "more axes") else 4
    both = g.op("Concat", repeated, item, axis=1)
    g.output(g.op("MatMul", both, g.const(np.arange(2 * (width + 3)).reshape(-1, 2))), ["N", 2])
    return g.model()


def form_of(model: ModelProto) -> Form:
    """The original itself, as it may stand for few candidates."""
    result = onnxrank.optimize(model, request=["user"], check=False)
    assert result.full is not None
    return result.full.limited(())


@pytest.mark.parametrize("how", ["expand", "expand by ones", "tile"])
def test_nothing_is_repeated(how: str) -> None:
    model = ranker(how)
    form = form_of(model)
    assert Counter(n.op_type for n in form.single.graph.node) == {"Concat": 1, "MatMul": 1}
    assert form.spared > 0
    inputs = {"user": np.arange(4, dtype=np.float32)[None], "item": np.ones((1, 3), np.float32)}
    for old, new in zip(run(model, inputs).values(), run(form.single, inputs).values(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("how", ["wider", "more axes"])
def test_what_makes_more_of_one_stays(how: str) -> None:
    form = form_of(ranker(how))
    assert form.single is form.model
    assert form.spared == 0


def test_a_length_that_is_repeated_stays() -> None:
    """A row for every position of a history of any length, one among them."""
    g = Graph()
    user, item, history = g.input("user", [1, 1, 4]), g.input("item", ["N", 4]), g.input("history", [1, "L", 4])
    length = g.op("Slice", g.op("Shape", history), g.ints(1), g.ints(2))
    rows = g.op("Expand", user, g.op("Concat", g.ints(1), length, g.ints(4), axis=0))
    sums = g.on_axes("ReduceSum", g.op("Mul", g.op("Concat", rows, history, axis=2), g.const(2.0)), [1], keepdims=0)
    g.output(
        g.op("Concat", g.op("Expand", sums, g.op("Concat", _rows(g, item), g.ints(8), axis=0)), item, axis=1), None
    )
    result = onnxrank.optimize(g.model(), request=["user", "history"], check=False)
    assert result.full is not None
    form = result.full.limited(())
    kept = [n for n in form.single.graph.node if n.op_type == "Expand"]
    assert [n.input[0] for n in kept] == ["user"]


def _rows(g: Graph, x: str) -> str:
    return g.op("Slice", g.op("Shape", x), g.ints(0), g.ints(1))


def test_an_output_that_is_repeated_stays() -> None:
    g = Graph()
    user, item = g.input("user", [1, 4]), g.input("item", ["N", 4])
    g.output(g.op("Expand", user, g.op("Shape", item)), ["N", 4])
    g.output(g.op("MatMul", item, g.const(np.ones((4, 1)))), ["N", 1])
    model = g.model()
    form = form_of(model)
    assert "Expand" in {n.op_type for n in form.single.graph.node}
    inputs = {"user": np.ones((1, 4), np.float32), "item": np.ones((1, 4), np.float32)}
    for old, new in zip(run(model, inputs).values(), run(form.single, inputs).values(), strict=True):
        np.testing.assert_array_equal(old, new)


def towers(opset: int) -> ModelProto:
    """Layers over both sides, which pay apart for many candidates."""
    g, rng = Graph(opset), np.random.default_rng(0)
    user, item = g.input("user", ["N", 96]), g.input("item", ["N", 8])
    both = g.op("Concat", user, item, axis=1)
    made = [g.op("Relu", g.op("MatMul", both, g.const(rng.integers(-2, 3, (104, 16))))) for _ in range(12)]
    g.output(g.op("Sum", *made), ["N", 16])
    return g.model()


@cache
def of_two_plans(opset: int) -> onnxrank.Result:
    """With the original for a single candidate."""
    plan = onnxrank.optimize(towers(opset), request=["user"], check=False).plan.to_dict()
    plan["few"] = {"below": SINGLE, "rules": [], "sites": []}
    return onnxrank.optimize(towers(opset), plan=Plan.from_dict(plan))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from([13, 17]), st.sampled_from([0, 1, 1, 2, 3, 17, 300]), st.integers(0, 5))
def test_one_candidate_alone_is_chosen(opset: int, count: int, seed: int) -> None:
    """None at all is what the plan for many is for; whole numbers tell."""
    result = of_two_plans(opset)
    (choice,) = filter(is_crossover, result.model.graph.node)
    few = next(a.g for a in choice.attribute if a.name == "then_branch")
    assert not {"Expand", "Shape"} & {n.op_type for n in few.node}
    rng = np.random.default_rng(seed)
    user, item = (rng.integers(-2, 3, s).astype(np.float32) for s in ((1, 96), (count, 8)))
    (want,) = run(towers(opset), {"user": user.repeat(count, 0), "item": item}).values()
    (got,) = run(result.model, {"user": user, "item": item}).values()
    np.testing.assert_array_equal(got, want)


def test_it_is_profiled() -> None:
    """For a single candidate there is nothing to tell apart; what runs is timed all the same."""
    times = onnxrank.profile(of_two_plans(17).model, candidates=[1, 64], seconds=0.01, memory=False)
    assert [k.candidates for k in times.models[0].kernels] == [1, 64]
    assert [w.candidates for w in times.models[0].works] == [64]
    assert not any("not known" in n for n in times.notes)
