"""Fewer units: the order in which they go, what the others make up for, and models that are narrower by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from onnxrank.compress.method import Refused
from onnxrank.compress.methods import METHODS
from onnxrank.compress.statistics import Moments, Statistics
from onnxrank.compress.units import MOST, counts, needed
from onnxrank.network import Hidden, Network, Product
from onnxrank.packing import drop_units, hidden
from tests.support.modelkit import graph, session

RNG = np.random.default_rng
INNER, UNITS, RANK = 12, 32, 5
BODIES = {
    "Gemm": "h = Gemm(x, A, a) r = Relu(h) y = Gemm(r, B, b)",
    "MatMul without biases": "h = MatMul(x, A) r = Tanh(h) y = MatMul(r, B)",
    "two readers": "h = Gemm(x, A, a) r = Relu(h) p = Gemm(r, B, b) q = MatMul(r, C) y = Add(p, q)",
    "stored the other way round": "h = MatMul(x, A) s = Add(h, a) r = Relu(s) y = Gemm<transB=1>(r, D, b)",
}


def mlp(body: str) -> ModelProto:
    """Layers whose units are combinations of a few, so that most can go."""
    rng = RNG(0)
    few = rng.normal(size=(INNER, RANK))
    a = np.maximum(rng.normal(size=(RANK, UNITS)), 0)
    held = {
        "A": few @ a, "a": rng.normal(size=UNITS) / 10, "B": rng.normal(size=(UNITS, 6)), "b": rng.normal(size=6),
        "C": rng.normal(size=(UNITS, 6)), "D": rng.normal(size=(6, UNITS)),
    }  # fmt: skip
    text = BODIES[body]
    used = {k: v.astype(np.float32) for k, v in held.items() if f" {k})" in text or f" {k}," in text}
    return graph(f"(float[N,{INNER}] x) => (float[N,6] y) {{ {text} }}", **used)


def read(model: ModelProto, tensor: str, x: np.ndarray) -> np.ndarray:
    shown = ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    found: Any = session(shown).run([tensor], {"x": x})[0]
    return np.asarray(found, np.float64)


def prepared(body: str, x: np.ndarray) -> tuple[Network, Hidden, Statistics]:
    net = Network(mlp(body))
    (site,) = hidden(net)
    weights = np.concatenate([net.matrix(r) for r in site.readers], axis=1).astype(np.float64)
    found = needed(weights, Moments.of(read(net.finished(), site.tensor, x)))
    return net, site, Statistics(len(x), hidden={site.name: found})


X = RNG(1).normal(size=(600, INNER)).astype(np.float32)


@pytest.mark.parametrize("body", BODIES)
def test_narrower_layers_give_nearly_the_same(body: str) -> None:
    net, site, stats = prepared(body, X)
    before = read(net.finished(), "y", X)
    method = METHODS["units"]
    offered = method.offers(net, site, stats)
    assert offered and all(k % 4 == 0 and k < UNITS for k in offered) and list(offered) == sorted(offered)[::-1]
    kept = offered[-1]
    assert method.apply(net, site, kept, stats) == []
    plain = net.finished()
    assert {p.shape for p in net.products()} >= {(INNER, UNITS)}  # weights are 0, and nothing is narrower yet
    drop_units(net)
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    assert {p.shape for p in net.products()} == {(INNER, kept), (kept, 6)}
    after = read(made, "y", X)
    assert after == pytest.approx(read(plain, "y", X), abs=1e-4)
    rows = before - before.mean(0)
    assert np.linalg.norm(after - before) / np.linalg.norm(rows) == pytest.approx(
        method.error(net, site, kept, stats), rel=0.05 if "two" not in body else 1.0
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_what_is_lost_is_the_least_squares_residue(seed: int) -> None:
    """Whatever the order: the share that is said to be lost is that of the best fit by those units."""
    rng = RNG(seed)
    width, outer = int(rng.integers(2, 9)), int(rng.integers(1, 4))
    x = rng.normal(size=(80, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
    w = rng.normal(size=(width, outer))
    found = needed(w, Moments.of(x))
    assert sorted(found.order) == list(range(width))
    y = (x - x.mean(0)) @ w
    for k in range(width + 1):
        kept = (x - x.mean(0))[:, found.order[:k]]
        rest = y - (kept @ np.linalg.lstsq(kept, y, rcond=None)[0] if k else 0)
        assert found.lost[k] == pytest.approx((rest**2).sum() / (y**2).sum(), abs=1e-5)


def test_a_unit_that_others_tell_goes_first() -> None:
    x = RNG(0).normal(size=(200, 4))
    x[:, 2] = x[:, 0] - 2 * x[:, 3]
    w = np.eye(4)
    found = needed(w, Moments.of(x))
    assert found.order[-1] in (0, 2, 3) and found.lost[3] < 1e-6 < found.lost[2]


def test_counts() -> None:
    lost = np.array([1.0, 0.5, 0.2, 0.05, 0.0])
    assert counts(lost, [0.5, 0.1, 0.001], 3) == [3, 1]
    assert counts(np.linspace(1, 0, 65), [0.5, 0.1], 60) == [32]  # 58 and more is rounded to 64


def test_layers_of_low_rank_and_in_16_bits_around_them() -> None:
    """What is done to the layers themselves goes on the units that are left."""
    net, site, stats = prepared("Gemm", X)
    before = read(net.finished(), "y", X)
    first, second = net.products()
    products = {p.name: Moments.of(read(net.finished(), p.outputs[0], X)) for p in (first, second)}
    stats = Statistics(len(X), products, hidden=stats.hidden)
    METHODS["units"].apply(net, site, 16, stats)
    renewed = {p.name: p for p in net.products()}
    METHODS["low-rank"].apply(net, renewed[first.name], 6, stats)
    METHODS["fp16"].apply(net, renewed[second.name], 0, stats)
    drop_units(net)
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    shapes = {p.shape for p in net.products()}
    assert shapes == {(INNER, 6), (6, 16), (16, 6)}
    (half,) = [t for t in made.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert list(half.dims) == [16, 6]
    assert np.linalg.norm(read(made, "y", X) - before) < 0.1 * np.linalg.norm(before - before.mean(0))


def test_refusals() -> None:
    net, site, stats = prepared("Gemm", X)
    with pytest.raises(Refused, match="no calibration row"):
        METHODS["units"].offers(net, site, Statistics())
    with pytest.raises(Refused, match="32 units, and not 33"):
        METHODS["units"].apply(net, site, 33, stats)

    def of(width: int) -> Hidden:
        layer = Product("l", "W", (4, width), site.layer.nodes, False)
        return Hidden(layer, site.readers)

    with pytest.raises(Refused, match="7 units only"):
        METHODS["units"].offers(net, of(7), stats)
    with pytest.raises(Refused, match="too long"):
        METHODS["units"].offers(net, of(MOST + 1), stats)


@pytest.mark.parametrize("body", [
    "h = MatMul(x, A) r = Relu(h) s = Softmax(r) y = MatMul(s, B)",
    "h = MatMul(x, A) r = Relu(h) p = MatMul(r, B) q = ReduceSum(r, o) y = Add(p, q)",
])  # fmt: skip
def test_units_that_something_else_reads_are_no_site(body: str) -> None:
    rng = RNG(0)
    held = {"A": rng.normal(size=(INNER, UNITS)), "B": rng.normal(size=(UNITS, 6))}
    own: dict[str, Any] = {k: v.astype(np.float32) for k, v in held.items()}
    own |= {"o": np.array([1])} if " o)" in body else {}
    assert hidden(Network(graph(f"(float[N,{INNER}] x) => (float[N,6] y) {{ {body} }}", **own))) == []
