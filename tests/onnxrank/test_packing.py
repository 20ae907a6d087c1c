"""What does nothing goes, scores stay, and nothing is packed where somebody else looks."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from onnxrank.network import Network
from onnxrank.packing import pack
from tests.support.modelkit import graph, session

RNG = np.random.default_rng
TEXT = "(float[N,12] x) => (float[N,1] y) { %s }"
BODY = "h = Gemm(x, W, b) r = Relu(h) g = Gemm(r, V, c) s = Tanh(g) y = MatMul(s, H)"


def weights(seed: int = 0, hidden: int = 16) -> dict[str, np.ndarray]:
    rng = RNG(seed)
    made = {"W": (12, hidden), "b": (hidden,), "V": (hidden, 10), "c": (10,), "H": (10, 1)}
    return {k: rng.normal(size=s).astype(np.float32) for k, s in made.items()}


def compare(model: ModelProto, said: int, text: str = "units") -> ModelProto:
    """Packs a model, and holds it against itself."""
    net = Network(model)
    told = [str(p) for p in pack(net)]
    assert sum(text in t for t in told) == said, told
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    x = RNG(9).normal(size=(40, 12)).astype(np.float32)
    before, after = (session(m).run(None, {"x": x}) for m in (model, made))
    for a, b in zip(before, after, strict=True):
        assert b == pytest.approx(a, abs=1e-5)
    return made


def shapes(model: ModelProto) -> list[tuple[int, ...]]:
    return sorted(tuple(t.dims) for t in model.graph.initializer if len(t.dims) == 2)


def test_unread_units_go() -> None:
    w = weights()
    w["V"][[1, 4, 5]] = 0
    assert shapes(compare(graph(TEXT % BODY, **w), 1)) == [(10, 1), (12, 13), (13, 10)]


def test_declared_widths_go_with_the_units() -> None:
    """Exporters write shapes down; one that is no longer true keeps a model from being loaded."""
    w = weights()
    w["V"][[1, 4, 5]] = 0
    model = onnx.shape_inference.infer_shapes(graph(TEXT % BODY, **w))
    assert "h" in {v.name for v in model.graph.value_info}
    made = compare(model, 1)
    assert {v.name for v in made.graph.value_info} == {"g", "s"}


def test_units_that_read_nothing_are_constants() -> None:
    w = weights()
    w["W"][:, [0, 7]] = 0
    w["b"][0] = -1  # ReLU makes 0 of it
    w["V"][:, 3] = 0  # behind tanh
    assert shapes(compare(graph(TEXT % BODY, **w), 2)) == [(9, 1), (12, 14), (14, 9)]


def test_one_after_the_other() -> None:
    """A unit that nobody reads leaves those before it unread."""
    w = weights()
    w["H"][2:] = 0
    w["V"][:8, :2] = 0
    assert shapes(compare(graph(TEXT % BODY, **w), 2)) == [(2, 1), (8, 2), (12, 8)]


def test_layers_without_units_keep_one() -> None:
    w = weights()
    w["V"][:] = 0
    made = compare(graph(TEXT % BODY, **w), 2)
    assert (12, 1) in shapes(made)


@pytest.mark.parametrize(
    "body",
    [
        "h = MatMul(x, W) k = Add(h, b) r = Sigmoid(k) g = MatMul(r, V) s = Add(c, g) y = MatMul(s, H)",
        "h = Gemm(x, W, b) r = LeakyRelu<alpha=0.3>(h) m = Mul(r, b) g = Gemm(m, V) s = Sub(g, c) y = MatMul(s, H)",
        "h = Gemm<transB=1>(x, U, b) r = PRelu(h, b) g = MatMul(r, V) y = MatMul(g, H)",
    ],
)
def test_other_ways_to_write_it(body: str) -> None:
    w = weights()
    w["W"][:, [2, 3]] = 0
    w["V"][[5]] = 0
    w["U"] = w["W"].T.copy()
    used = {k: v for k, v in w.items() if f" {k})" in body or f" {k}," in body or f"({k}," in body}
    made = compare(graph(TEXT % body, **used), 1)
    assert any(13 in s for s in shapes(made))


def test_layers_that_share_their_input() -> None:
    """A unit goes only if no reader wants it; what is constant goes into the bias of each."""
    body = "h = Gemm(x, W, b) r = Relu(h) g = Gemm(r, V, c) k = MatMul(r, V2) t = Add(g, k) y = MatMul(t, H)"
    w = weights()
    w["V2"] = RNG(5).normal(size=(16, 10)).astype(np.float32)
    w["V"][[0, 1, 2]] = 0
    w["V2"][[2, 3]] = 0
    w["W"][:, 9] = 0
    assert (12, 14) in shapes(compare(graph(TEXT % body, **w), 1))


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (TEXT.replace("y)", "y, float[N,16] r)"), BODY),
        (TEXT, "h = Gemm(x, W, b) r = Relu(h) g = Gemm(r, V, c) z = ReduceSum(r) s = Add(g, z) y = MatMul(s, H)"),
        (TEXT, "h = Gemm(x, W, b) r = Softmax(h) g = Gemm(r, V, c) s = Tanh(g) y = MatMul(s, H)"),
        (TEXT, "h = Gemm(x, W, b) r = Mul(h, h) g = Gemm(r, V, c) s = Tanh(g) y = MatMul(s, H)"),
    ],
)
def test_nothing_is_packed_where_somebody_else_looks(text: str, body: str) -> None:
    w = weights()
    w["V"][[1, 4, 5]] = 0
    w["W"][:, 2] = 0
    compare(graph(text % body, **w), 0)


def test_shared_weights_stay() -> None:
    body = "h = Gemm(x, W, b) r = Relu(h) q = Tanh(h) g = MatMul(r, V) k = MatMul(q, V) t = Add(g, k) y = MatMul(t, H)"
    w = weights()
    del w["c"]
    w["V"][[1, 4]] = 0
    compare(graph(TEXT % body, **w), 0)


def test_tiny_weights_are_zero() -> None:
    """As weight decay leaves them: the products are denormal numbers."""
    w = weights()
    w["W"][:, 3] *= 1e-30
    w["b"][3] = 0.5
    model = graph(TEXT % BODY, **w)
    made = compare(model, 1, "too small to be told from 0")
    assert (12, 15) in shapes(made)
    assert all(
        (abs(a := numpy_helper.to_array(t)) > 1e-25).all() or not a.any() for t in made.graph.initializer
    )  # fmt: skip


def test_nothing_to_pack() -> None:
    net = Network(graph(TEXT % BODY, **weights()))
    before = net.finished().SerializeToString(deterministic=True)
    assert pack(net) == [] and net.finished().SerializeToString(deterministic=True) == before


def test_half_the_units_masked() -> None:
    rng = RNG(0)
    body = "h = Gemm(x, A, a) r = Relu(h) g = Gemm(r, B, b) s = Relu(g) y = MatMul(s, C)"
    text = f"(float[N,64] x) => (float[N,1] y) {{ {body} }}"
    w = {"A": (64, 256), "a": (256,), "B": (256, 256), "b": (256,), "C": (256, 1)}
    made = {k: (rng.normal(size=s) / np.sqrt(s[0])).astype(np.float32) for k, s in w.items()}
    made["A"][:, ::2] = 0
    made["a"][::2] = 0
    made["B"][:, 1::2] = 0
    made["b"][1::2] = 0
    model = graph(text, **made)
    net = Network(model)
    pack(net)
    x = rng.normal(size=(100, 64)).astype(np.float32)
    before, after = (session(m).run(None, {"x": x})[0] for m in (model, net.finished()))
    assert after == pytest.approx(before, abs=1e-6)
    assert shapes(net.finished()) == [(64, 128), (128, 1), (128, 128)]


TABLES = {
    "one lookup": (
        "e = Gather(D, i) x = Concat<axis=1>(u, e) h = MatMul(x, W) y = ReduceSum<keepdims=1>(h, one)", 14, 1),
    "a bias, and two readers": (
        "e = Gather(D, i) x = Concat<axis=-1>(e, u) h = Gemm(x, W, b) g = Gemm(e, V) k = Add(h, g)"
        " y = ReduceSum<keepdims=1>(k, one)", 14, 1),
    "several fields flat": (
        "j = Concat<axis=1>(i2, i2) e = Gather(D, j) f = Reshape(e, flat) x = Concat<axis=1>(u, f) h = Gemm(x, W, b)"
        " y = ReduceSum<keepdims=1>(h, one)", 22, 1),
    "flattened": ("e = Gather(D, i2) f = Flatten(e) h = Gemm(f, V, b) y = ReduceSum<keepdims=1>(h, one)", 0, 1),
    "read by a product of features": (
        "e = Gather(D, i) q = Mul(e, e) x = Concat<axis=1>(u, e) h = MatMul(x, W) s = ReduceSum<keepdims=1>(q, one)"
        " t = ReduceSum<keepdims=1>(h, one) y = Add(s, t)", 14, 0),
    "an axis more": (
        "e = Gather(D, i) a = Reshape(e, apart) h = MatMul(a, V) g = Flatten(h) y = ReduceSum<keepdims=1>(g, one)",
        0, 0),
    "an activation between": ("e = Gather(D, i) q = Relu(e) h = MatMul(q, V) y = ReduceSum<keepdims=1>(h, one)", 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_columns_of_tables(name: str) -> None:
    """Two columns are constant, one of them 0, and two are equal: three go, one of each constant and of the pair."""
    body, rows, packed = TABLES[name]
    rng = RNG(0)
    held = {"D": (300, 8), "W": (rows, 5), "V": (8, 5), "b": (5,)}
    w = {k: rng.normal(size=s).astype(np.float32) for k, s in held.items()}
    w["D"][:, 2], w["D"][:, 5], w["D"][:, 7] = 0, 0.75, w["D"][:, 1]
    w |= {"one": np.array([1]), "flat": np.array([-1, 16]), "apart": np.array([-1, 1, 8])}
    text = f"(float[N,6] u, int64[N] i, int64[N,1] i2) => (float[N,1] y) {{ {body} }}"
    model = graph(text, **{k: v for k, v in w.items() if f" {k})" in body or f" {k}," in body or f"({k}," in body})
    net = Network(model)
    told = [str(p) for p in pack(net)]
    assert told == ["3 columns of e are constant or equal to others"] * packed
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    ids = rng.integers(0, 300, 40)
    feed = {"u": rng.normal(size=(40, 6)).astype(np.float32), "i": ids, "i2": ids[:, None]}
    before, after = (session(m).run(None, feed)[0] for m in (model, made))
    assert after == pytest.approx(before, rel=1e-5, abs=1e-5)
    if packed:
        assert (300, 5) in shapes(made)
