"""Casts behind concatenations: the same scores to the bit, fewer nodes, and none moved that something else reads."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from onnxrank.compress.casts import join_casts
from onnxrank.compress.methods import METHODS
from onnxrank.compress.statistics import Statistics
from onnxrank.network import Network
from tests.support.modelkit import graph, session

RNG = np.random.default_rng
LOOKUPS = "a = Gather(A, i) b = Gather(B, j) c = Gather(C, i) "
CASES = {
    "all of a concatenation": ("y = Concat<axis=1>(a, b, c)", 2),
    "shapes between": (
        "s = Unsqueeze(a, one) t = Unsqueeze(b, one) u = Reshape(c, wide) z = Concat<axis=-2>(s, t, u) y = Flatten(z)",
        2,
    ),
    "one concatenation into another": (
        "p = Concat<axis=1>(a, b) s = Unsqueeze(p, one) q = Squeeze(s, one) y = Concat<axis=1>(q, c)", 2,
    ),
    "one of them read beside": (
        "p = Concat<axis=1>(a, b) z = Concat<axis=1>(p, c) r = Relu(a) y = Concat<axis=1>(r, z)", 0,
    ),
    "one of them an output": ("y = Concat<axis=1>(a, b, c)", 0),
    "too few beside another": ("y = Concat<axis=1>(x, a, b, c)", 0),
    "the same twice": ("y = Concat<axis=1>(a, a)", 0),
    "computed between": ("r = Relu(a) y = Concat<axis=1>(r, b)", 0),
    "moved, not only shaped": ("t = Transpose<perm=[1,0]>(a) u = Transpose<perm=[1,0]>(b) y = Concat<axis=0>(t, u)", 0),
}  # fmt: skip


def halved(model: ModelProto) -> Network:
    """A model whose tables are in 16 bits, with a cast behind every lookup."""
    net = Network(model)
    for site in net.tables():
        METHODS["fp16-tables"].apply(net, site, 0, Statistics())
    return net


def nodes(model: ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def same(model: ModelProto, plain: ModelProto, feed: dict[str, np.ndarray]) -> None:
    for before, after in zip(session(plain).run(None, feed), session(model).run(None, feed), strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("case", CASES)
def test_one_cast_behind_what_is_brought_together(case: str) -> None:
    body, gone = CASES[case]
    held = {n: RNG(k).normal(size=(100, 8)).astype(np.float32) for k, n in enumerate("ABC")}
    held |= {"one": np.array([1]), "wide": np.array([-1, 1, 8])}
    used = {k: v for k, v in held.items() if f"({k}," in LOOKUPS + body or f" {k})" in LOOKUPS + body}
    given = "int64[N] i, int64[N] j" + (", float[N,3] x" if "(x," in body else "")
    beside = ", float[N,8] a" if "output" in case else ""
    model = graph(f"({given}) => (float[P,Q] y{beside}) {{ {LOOKUPS}{body} }}", **used)
    model = onnx.shape_inference.infer_shapes(model)  # the file declares types of what is between
    feed = {"i": RNG(4).integers(0, 100, 7), "j": RNG(5).integers(0, 100, 7)}
    feed |= {"x": RNG(6).normal(size=(7, 3)).astype(np.float32)} if "(x," in body else {}
    net = halved(model)
    plain = net.finished()
    assert join_casts(net) == gone
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    same(made, plain, feed)
    casts = nodes(plain)["Cast"]
    assert nodes(made) == nodes(plain) - Counter(Cast=gone) and nodes(made)["Cast"] == casts - gone
    assert join_casts(net) == 0


def many(tables: int, where: str) -> ModelProto:
    """So many lookups side by side, with a dense input before or behind them, or in the middle."""
    names = [f"g{k}" for k in range(tables)]
    order = {"before": ["x", *names], "behind": [*names, "x"], "between": [*names[:20], "x", *names[20:]]}[where]
    body = " ".join(f"g{k} = Gather(D{k}, i)" for k in range(tables))
    held = {f"D{k}": RNG(k).normal(size=(64, 4)).astype(np.float32) for k in range(tables)}
    text = f"(int64[N] i, float[N,3] x) => (float[N,M] y) {{ {body} y = Concat<axis=1>({', '.join(order)}) }}"
    return graph(text, **held)


@pytest.mark.parametrize(("tables", "where", "gone"), [(20, "before", 19), (20, "behind", 19), (15, "before", 0),
                                                       (40, "between", 38), (25, "between", 19)])  # fmt: skip
def test_many_beside_a_dense_input(tables: int, where: str, gone: int) -> None:
    net = halved(many(tables, where))
    plain = net.finished()
    assert join_casts(net) == gone
    feed = {"i": RNG(0).integers(0, 64, 9), "x": RNG(1).normal(size=(9, 3)).astype(np.float32)}
    same(net.finished(), plain, feed)
    assert nodes(net.finished())["Cast"] == tables - gone


def test_other_casts_stay() -> None:
    """What the model casts by itself is no business of the method's."""
    held = {n: RNG(k).normal(size=(100, 8)).astype(np.float16) for k, n in enumerate("AB")}
    body = "a = Gather(A, i) b = Gather(B, i) c = Cast<to=1>(a) d = Cast<to=1>(b) y = Concat<axis=1>(c, d)"
    net = halved(graph(f"(int64[N] i) => (float[N,16] y) {{ {body} }}", **held))
    assert join_casts(net) == 0
