"""Additions to scores, as one more column of the keys, and masks, which hide keys near the visible ones."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import numpy as np
import onnx
import pytest
from helpers import Given, Graph, candidate, optimised, patterns, request, rewritten, run, whole_numbers
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import ModelProto

LENGTH, HEADS, WIDTH = 120, 4, 8
SIZE = HEADS * WIDTH


def attention(
    mask: str = "add",
    far: float = -1e9,
    behind: str = "softmax",
    heads: int = HEADS,
    length: int | str = LENGTH,
    scale: str = "none",
    opset: int = 17,
) -> tuple[Graph, list[Given]]:
    """The candidate's attention over the request's keys, with something added to scores, and what reads these."""
    g, width = Graph(opset), SIZE // heads
    given = [request("h", length, SIZE), request("m", length), candidate("c", SIZE)]
    h, m, c = (i.declare(g) for i in given)
    by_head = g.ints(0, -1, heads, width)
    k, v = (g.op("Reshape", g.op("MatMul", h, g.const(whole_numbers(SIZE, SIZE, seed=n))), by_head) for n in (1, 2))
    q = g.op("Reshape", g.op("MatMul", c, g.const(whole_numbers(SIZE, SIZE, seed=3))), g.ints(-1, 1, heads, width))
    q, k, v = (
        g.op("Transpose", q, perm=[0, 2, 1, 3]),
        g.op("Transpose", k, perm=[0, 2, 3, 1]),
        g.op("Transpose", v, perm=[0, 2, 1, 3]),
    )
    s = g.op("MatMul", q, k)
    if scale == "scores":
        s = g.op("Div", s, g.const(2.0))
    m = g.on_axes("Unsqueeze", m, [1, 2])
    hidden = g.op("Greater", m, g.const(0.0))
    s = {
        "add": lambda: g.op("Add", s, g.op("Mul", g.op("Max", m, g.const(0.0)), g.const(far))),
        "where": lambda: g.op("Where", hidden, g.const(far), s),
        "where not": lambda: g.op("Where", g.op("Not", hidden), s, g.const(far)),
        "bias": lambda: g.op("Add", m, s),
        "of the candidate": lambda: g.op("Add", s, g.on_axes("ReduceSum", q, [1, 3], keepdims=1)),
        "of heads": lambda: g.op("Add", s, g.op("Mul", m, g.const(whole_numbers(heads, 1, 1)))),
    }[mask]()
    if behind == "softmax":
        s = g.op("Softmax", s, axis=-1)
    elif behind == "twice":
        s = g.op("Mul", g.op("Softmax", s, axis=-1), s)
    elif behind == "relu":
        s = g.op("Relu", s)
    y = g.op("Reshape", g.op("Transpose", g.op("MatMul", s, v), perm=[0, 2, 1, 3]), g.ints(-1, SIZE))
    g.output(g.op("MatMul", y, g.const(whole_numbers(SIZE, 3, seed=4))), ["N", 3])
    return g, given


def passes(model: ModelProto, length: int = LENGTH) -> Counter[str]:
    """How many nodes of each kind read scores of all candidates and write as many."""
    typed = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {v.name: v.type.tensor_type.shape.dim for v in [*typed.value_info, *typed.output, *typed.input]}

    def is_scores(name: str) -> bool:
        dims = shapes.get(name, ())
        return len(dims) > 1 and dims[-1].dim_value == length and any(not d.HasField("dim_value") for d in dims)

    return Counter(n.op_type for n in typed.node if any(map(is_scores, n.input)) and any(map(is_scores, n.output)))


def longer(model: ModelProto) -> int:
    """How many products are of rows that others lie beside, along the axis that is summed over."""
    joined = {o for n in model.graph.node if n.op_type == "Concat" for o in n.output}
    return sum(n.op_type in ("MatMul", "Gemm") and n.input[0] in joined for n in model.graph.node)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("scale", ["none", "scores"])
def test_bias(scale: str, heads: int) -> None:
    """What is added to scores is a column of the keys; whole numbers tell that it is the same sum."""
    g, given = attention("bias", behind="relu", scale=scale, heads=heads)
    result = optimised(g, given, counts=(0, 1, 2, 7, 90))
    assert passes(result.model) - Counter({"Reshape": 1}) == {"Relu": 1}


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("far", [-1e9, -math.inf, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("mask", ["add", "where", "where not"])
def test_masks(mask: str, far: float, opset: int) -> None:
    """Hidden keys are brought near, and no score is passed over but by the softmax; of hidden keys alone, too."""
    if mask == "add" and math.isinf(far):
        pytest.skip("0 times infinity")
    g, given = attention(mask, far, opset=opset)
    model = g.model()
    result = rewritten(model, request=patterns(given))
    assert passes(result.model) == {"Softmax": 1}
    assert any(s.place.rule == "underflow" and s.taken for s in result.plan.sites)
    rng = np.random.default_rng(0)
    for n in (0, 1, 3, 300):
        for share in (0.0, 0.5, 1 - 1 / LENGTH, 1.0):
            if not (n == 0 or (share == 1.0 and math.isinf(far))):
                same(model, result.model, *drawn_inputs(rng, n, share))
    if math.isinf(far):
        h, m, c = drawn_inputs(rng, 2, 1.0)
        (out,) = run(result.model, {"h": h, "m": m, "c": c}).values()
        assert np.isnan(out).all()


def drawn_inputs(rng: np.random.Generator, n: int, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """History, mask and candidates; a share of the history is hidden."""
    m = np.zeros((1, LENGTH), np.float32)
    m[0, rng.permutation(LENGTH)[: round(share * LENGTH)]] = 1
    return rng.standard_normal((1, LENGTH, SIZE), np.float32), m, rng.standard_normal((n, SIZE), np.float32) / 8


def same(model: ModelProto, made: ModelProto, h: np.ndarray, m: np.ndarray, c: np.ndarray) -> None:
    """The scores are those of the original, which has rows of the request for every candidate."""
    n = len(c)
    (want,) = run(model, {"h": h.repeat(n, 0), "m": m.repeat(n, 0), "c": c}).values()
    (got,) = run(made, {"h": h, "m": m, "c": c}).values()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(want).max(initial=0))))


@cache
def both() -> tuple[ModelProto, ModelProto]:
    """A model, and what is made of it."""
    g, given = attention()
    model = g.model()
    return model, rewritten(model, request=patterns(given)).model


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True)
@drawn(
    hnp.arrays(np.float32, (3, SIZE), elements=st.integers(-3, 3).map(float)),
    hnp.arrays(np.float32, (1, LENGTH), elements=st.sampled_from([0.0, 0.0, 1.0, 2.0, 0.5, 3.0])),
    st.sampled_from([0.0, 2.0**-8, 1.0, 4.0]),
)
def test_identity(c: np.ndarray, m: np.ndarray, size: float) -> None:
    """Of scores of any size, and masks that hide some twice, all, all but one, or all by different amounts."""
    h = np.random.default_rng(0).integers(-2, 3, (1, LENGTH, SIZE)).astype(np.float32)
    same(*both(), h, m, (c * np.float32(size)).astype(np.float32))


@pytest.mark.parametrize("visible", [1, 7])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e12])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_scores_of_any_size(heads: int, size: float, visible: int) -> None:
    """Rounding of scores of billions is more than what hidden ones are below the visible ones of small scores."""
    g, given = attention("where", -1e38, heads=heads)
    model = g.model()
    made = rewritten(model, request=patterns(given)).model
    rng = np.random.default_rng(visible)
    h = rng.standard_normal((1, LENGTH, SIZE), np.float32)
    h[:, :visible] = h[:, :1]  # visible keys are alike: the mean is as far from each as rounding takes it
    m = (np.arange(LENGTH) >= visible).astype(np.float32)[None]
    same(model, made, h, m, rng.standard_normal((40, SIZE), np.float32) * np.float32(size))


@pytest.mark.parametrize("mask", ["where", "where not"])
def test_hidden_keys_that_are_no_numbers(mask: str) -> None:
    """Keys of padding, divided by their length, which is 0; the mask takes their scores away."""
    g, given = Graph(), [request("h", LENGTH, SIZE), request("m", LENGTH), candidate("c", SIZE)]
    h, m, c = (i.declare(g) for i in given)
    lengths = g.on_axes("ReduceL2", h, [2], keepdims=1)
    keys = g.op("Transpose", g.op("Div", h, lengths), perm=[0, 2, 1])
    s = g.op("MatMul", g.on_axes("Unsqueeze", c, [1]), keys)
    hidden = g.op("Greater", g.on_axes("Unsqueeze", m, [1]), g.const(0.0))
    if mask == "where":
        s = g.op("Where", hidden, g.const(-1e9), s)
    else:
        s = g.op("Where", g.op("Not", hidden), s, g.const(-1e9))
    g.output(g.op("MatMul", g.op("Softmax", s, axis=-1), h), ["N", 1, SIZE])
    model = g.model()
    made = rewritten(model, request=patterns(given))
    assert any(s.place.rule == "underflow" and s.taken for s in made.plan.sites)
    h, m, c = drawn_inputs(np.random.default_rng(0), 50, 0.5)
    same(model, made.model, h * (m == 0)[..., None], m, c)


def test_exact_shares() -> None:
    """Visible keys that are alike share the weight evenly: what hidden ones weigh is lost in rounding."""
    h = np.ones((1, LENGTH, SIZE), np.float32)
    m = (np.arange(LENGTH) % 3 > 0).astype(np.float32)[None]
    same(*both(), h, m, np.ones((2, SIZE), np.float32))


@pytest.mark.parametrize(
    ("mask", "how"),
    [
        ("add", {"far": -1e4}),
        ("add", {"behind": "twice"}),
        ("where", {"behind": "relu"}),
        ("of the candidate", {"behind": "relu"}),
        ("of heads", {"behind": "relu"}),
    ],
)
def test_left(mask: str, how: dict) -> None:
    """What may hide nothing, scores that are read as they are, biases that differ between rows."""
    g, given = attention(mask, **how)
    result = optimised(g, given, counts=(1, 2, 7), tolerance=1e-5)
    assert passes(result.model)["Add"] + passes(result.model)["Where"] == 1


def test_columns_taken_apart() -> None:
    """A product whose columns a Reshape takes apart: what is added to each part is no row of it."""
    g = Graph()
    given = [request("h", SIZE, 10 * 40), candidate("c", SIZE)]
    h, c = (i.declare(g) for i in given)
    s = g.on_axes("Squeeze", g.op("MatMul", g.on_axes("Unsqueeze", c, [1]), h), [1])
    s = g.op("Add", g.op("Reshape", s, g.ints(-1, 10, 40)), g.const(whole_numbers(40)))
    y = g.op("Reshape", g.op("Relu", s), g.ints(-1, 400))
    g.output(g.op("MatMul", y, g.const(whole_numbers(400, 2))), ["N", 2])
    optimised(g, given, counts=(0, 1, 2, 40))


def test_few_candidates() -> None:
    """For a few candidates the pass over their scores is cheaper."""
    g, given = attention()
    result = rewritten(g.model(), request=patterns(given), candidates=1)
    assert not longer(result.model)


@pytest.mark.parametrize("mask", ["add", "where", "bias"])
def test_along_a_length_of_the_request(mask: str) -> None:
    """Histories of any length, none at all among them."""
    g, given = attention(mask, behind="relu" if mask == "bias" else "softmax", length="L")
    at = [{"L": n} for n in (0, 1, 2, 7, 300)]
    result = optimised(
        g, given, counts=(0, 1, 2, 50), tolerance=0.0 if mask == "bias" else 1e-5, lengths=at, candidates=4096
    )
    assert longer(result.model) == 1


def test_tokens_along_a_length_of_the_request() -> None:
    """Several queries of a candidate are rows of one product, which a Reshape to a symbolic length takes apart."""
    g, given = Graph(), [request("h", "L", SIZE), request("m", "L"), candidate("c", 2, SIZE)]
    h, m, c = (i.declare(g) for i in given)
    s = g.op("MatMul", c, g.op("Transpose", h, perm=[0, 2, 1]))
    s = g.op("Where", g.op("Greater", g.on_axes("Unsqueeze", m, [1]), g.const(0.0)), g.const(-1e9), s)
    g.output(g.op("MatMul", g.op("Softmax", s, axis=-1), h), ["N", 2, SIZE])
    at = [{"L": n} for n in (0, 1, 2, 7, 300)]
    result = optimised(g, given, counts=(0, 1, 2, 50), tolerance=1e-5, lengths=at, candidates=4096)
    assert longer(result.model) == 1


def test_once() -> None:
    """What is near already stays where it is."""
    again = rewritten(both()[1], request=["h", "m"])
    assert not again.changed
