"""Masked scores: bounded from below, and never so that a weight of any weight changes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Graph, candidate, operators, optimised, request, rewritten, rules, run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import ModelProto, TensorProto

import onnxrank
from onnxrank import underflow

WIDTH = 60


def attention(
    mask: str = "add", far: float = -1e9, opset: int = 17, dtype: int = TensorProto.FLOAT, axis: int = -1
) -> ModelProto:
    """Scores of the item to positions of the history, some of them hidden, and their weights."""
    g = Graph(opset)
    kind = np.float16 if dtype == TensorProto.FLOAT16 else np.float32
    scores, hidden = g.input("scores", ["N", WIDTH], dtype), g.input("hidden", ["N", WIDTH], dtype)
    if mask == "add":
        x = g.op("Add", scores, g.op("Mul", hidden, g.const(far, kind)))
    elif mask == "where":
        x = g.op("Where", g.op("Greater", hidden, g.const(0.5, kind)), g.const(far, kind), scores)
    else:
        x = g.op("Add", scores, g.op("Mul", hidden, g.const(0.1, kind)))
    weights = g.op("Softmax", x, axis=axis)
    g.output(g.op("Cast", g.op("Mul", weights, g.const(2.0, kind)), to=1), ["N", WIDTH])
    return g.model()


def bounded(result: onnxrank.Result) -> bool:
    found = operators(result.model)
    return "ReduceMax" in found and found.count("Max") == 2


def same(model: ModelProto, made: ModelProto, scores: np.ndarray, hidden: np.ndarray) -> None:
    """Weights are those of the original, but for what is 1e-20 of the largest."""
    feed = {"scores": scores, "hidden": hidden}
    (want,), (got,) = (
        list(run(m, feed if m is model else {**feed, "hidden": hidden[:1]}).values()) for m in (model, made)
    )
    np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-20)


@pytest.mark.parametrize("opset", [12, 13, 18])
@pytest.mark.parametrize("far", [-1e9, -1e4, -np.inf, -3.4028235e38])
@pytest.mark.parametrize("mask", ["add", "where"])
def test_masks(mask: str, far: float, opset: int) -> None:
    if mask == "add" and np.isinf(far):
        pytest.skip("0 times infinity")
    model = attention(mask, far, opset)
    result = rewritten(model, request=["hidden"])
    assert bounded(result) and rules(result)["underflow"] == 1
    rng = np.random.default_rng(0)
    for n in (0, 1, 3, 700):
        scores = rng.standard_normal((n, WIDTH)).astype(np.float32) * 30
        for share in (0.0, 0.5, 1.0):
            hidden = (rng.random((1, WIDTH)) < share).astype(np.float32).repeat(n, 0)
            if n and not (share == 1.0 and np.isinf(far)):
                same(model, result.model, scores, hidden)
    assert np.isnan(
        run(result.model, {"scores": scores, "hidden": np.ones((1, WIDTH), np.float32)})[
            result.model.graph.output[0].name
        ]
    ).all() == np.isinf(far)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float32, (3, WIDTH), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    hnp.arrays(np.float32, (1, WIDTH), elements=st.sampled_from([0.0, 1.0, 2.0, 0.5, 3.0])),
)
def test_identity(scores: np.ndarray, hidden: np.ndarray) -> None:
    """Of any finite scores: rows that are masked as a whole, twice, in part, or by a little."""
    same(MODEL, MADE, scores, hidden.repeat(3, 0))
    small = (scores / np.float32(2.0**95)).astype(np.float32)
    same(MODEL, MADE, small, hidden.repeat(3, 0))


MODEL = attention()
MADE = rewritten(MODEL, request=["hidden"]).model


def test_no_numbers() -> None:
    """What is not a number, or infinite, comes out as it did."""
    for value in (np.nan, np.inf, -np.inf):
        scores = np.zeros((2, WIDTH), np.float32)
        scores[0, 3] = value
        hidden = np.zeros((2, WIDTH), np.float32)
        same(MODEL, MADE, scores, hidden)
        same(MODEL, MADE, scores, hidden + 1)


@pytest.mark.parametrize("how", ["no mask", "sixteen bits", "several axes", "left out"])
def test_left_alone(how: str) -> None:
    options = {"ignore": ["underflow"]} if how == "left out" else {}
    model = {
        "no mask": lambda: attention("none"),
        "sixteen bits": lambda: attention(far=-1e4, dtype=TensorProto.FLOAT16),
        "several axes": lambda: attention(opset=12, axis=1),
        "left out": attention,
    }[how]()
    result = rewritten(model, request=["hidden"], **options)
    assert "ReduceMax" not in operators(result.model)


def test_once() -> None:
    """Scores that are bounded already stay so."""
    again = rewritten(MADE, request=["hidden"])
    assert operators(again.model).count("ReduceMax") == 1


def test_parts() -> None:
    """Of scores that lie side by side, those alone are bounded that a mask hides some of."""
    g = Graph(17)
    given_ = [request("r", 1), candidate("s", WIDTH), candidate("o", 4)]
    r, s, o = (i.declare(g) for i in given_)
    few = g.op("Where", g.const([True, False, False, True], np.bool_), g.const(-np.inf), o)
    x = g.op("Softmax", g.op("Concat", g.op("Mul", s, r), few, axis=1), axis=-1)
    g.output(g.op("Mul", x, g.const(2.0)), ["N", WIDTH + 4])
    result = optimised(g, given_, counts=(0, 1, 2, 5, 90), tolerance=1e-6)
    (largest,) = [n for n in result.model.graph.node if n.op_type == "ReduceMax"]
    assert largest.input[0] in {o for n in result.model.graph.node if n.op_type == "Where" for o in n.output}


def test_parts_that_are_hidden() -> None:
    """A part of which everything is hidden, by a finite number or by none, is as far below the other as it was."""
    g = Graph(17)
    scores, hidden = g.input("scores", ["N", WIDTH]), g.input("hidden", ["N", WIDTH])
    far = g.op("Where", g.op("Greater", hidden, g.const(0.5)), g.const(-np.inf), scores)
    near = g.op("Add", scores, g.op("Mul", hidden, g.const(-1e9)))
    weights = g.op("Softmax", g.op("Concat", scores, far, near, axis=1), axis=1)
    g.output(g.op("Mul", weights, g.const(2.0)), ["N", 3 * WIDTH])
    model = g.model()
    made = rewritten(model, request=["hidden"]).model
    assert [n.op_type for n in made.graph.node].count("ReduceMax") == 2
    rng = np.random.default_rng(0)
    for share in (0.0, 0.5, 1.0):
        mask = (rng.random((1, WIDTH)) < share).astype(np.float32).repeat(5, 0)
        same(model, made, rng.standard_normal((5, WIDTH)).astype(np.float32) * 30, mask)


def test_few_scores() -> None:
    """One request of few scores costs less than the nodes that bound them."""
    assert "ReduceMax" not in operators(rewritten(attention(), request=["hidden"], candidates=1).model)
    assert underflow.NAME not in rules(rewritten(attention(), request=["hidden"], candidates=1))


def test_alone() -> None:
    """A model of which next to nothing can be made once is predicted to be faster for its bounds, and is rewritten."""
    g = Graph(17)
    scores, hidden = g.input("scores", ["N", 200]), g.input("hidden", ["N", 200])
    x = g.op("Add", scores, g.op("Mul", hidden, g.const(-1e9)))
    g.output(g.op("Mul", g.op("Softmax", x, axis=-1), g.const(2.0)), ["N", 200])
    result = onnxrank.optimize(g.model(), request=["hidden"], candidates=512)
    assert result.changed and bounded(result)
