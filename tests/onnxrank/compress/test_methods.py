"""Each method against its identity, on small graphs; what it refuses; and what estimates are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from onnxrank.compress.low_rank import break_even, ranks, subspace
from onnxrank.compress.method import Refused
from onnxrank.compress.methods import METHODS
from onnxrank.compress.quantised import column_scales
from onnxrank.compress.statistics import Moments, Statistics, counted, reduced_rank
from onnxrank.compress.tables import fold_pca
from onnxrank.network import Hidden, Joint, Network, Product, Table
from tests.support.modelkit import graph, session

RNG = np.random.default_rng
LAYER = "(float[N,12] x) => (float[N,16] y) { %s }"
FORMS = {
    "MatMul": "y = MatMul(x, W)",
    "MatMul and Add": "p = MatMul(x, W) y = Add(p, b)",
    "Add from the left": "p = MatMul(x, W) y = Add(b, p)",
    "Gemm": "y = Gemm(x, W, b)",
    "Gemm without bias": "y = Gemm(x, W)",
    "Gemm, bias computed": "c = Mul(b, b) y = Gemm(x, W, c)",
    "Gemm flipped": "y = Gemm<transB=1>(x, V, b)",
    "transposed": "t = Transpose<perm=[1,0]>(V) p = MatMul(x, t) y = Add(p, b)",
    "read twice": "p = MatMul(x, W) q = Add(p, b) r = Relu(p) y = Add(q, r)",
}


def layer(form: str, inner: int = 12, outer: int = 16) -> ModelProto:
    rng = RNG(0)
    weight = rng.normal(size=(inner, outer)).astype(np.float32)
    own = {"W": weight, "V": weight.T.copy(), "b": rng.normal(size=outer).astype(np.float32)}
    used = {k: v for k, v in own.items() if f" {k})" in FORMS[form] or f"{k}," in FORMS[form] or f"({k}" in FORMS[form]}
    text = LAYER.replace("N,12", f"N,{inner}").replace("N,16", f"N,{outer}") % FORMS[form]
    model = graph(text, **used)
    onnx.checker.check_model(model)
    return model


def inputs(rows: int = 400, inner: int = 12, rank: int = 12, seed: int = 1) -> np.ndarray:
    rng = RNG(seed)
    x = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, inner)) + rng.normal(size=inner)
    return x.astype(np.float32)


def run(model: ModelProto, feed: dict[str, np.ndarray], name: str = "y") -> np.ndarray:
    found: Any = session(model).run([name], feed)[0]
    return np.asarray(found, np.float64)


def statistics(net: Network, x: np.ndarray) -> Statistics:
    (site,) = net.products()
    return Statistics(len(x), {site.name: Moments.of(x.astype(np.float64) @ net.matrix(site))})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, 5])
def test_low_rank_is_the_projection(form: str, rank: int) -> None:
    model, x = layer(form), inputs()
    net = Network(model)
    stats = statistics(net, x)
    (site,) = net.products()
    product = x.astype(np.float64) @ net.matrix(site)
    mean = product.mean(0)
    basis = np.linalg.svd(product - mean, full_matrices=False)[2][:rank]
    projected = mean + (product - mean) @ basis.T @ basis
    left = METHODS["low-rank"].apply(net, site, rank, stats)
    made = net.finished()
    onnx.checker.check_model(made)
    off = run(made, {"x": x}) - run(model, {"x": x})
    if form != "read twice":
        assert off == pytest.approx(projected - product, abs=2e-4)
        relative = np.sqrt((off**2).sum() / ((product - mean) ** 2).sum())
        assert METHODS["low-rank"].error(Network(model), site, rank, stats) == pytest.approx(relative, rel=1e-3)
    assert [s.shape for s in left] == [(12, rank), (rank, 16)]
    assert not any(t.name in ("W", "V") for t in made.graph.initializer)


@pytest.mark.parametrize("form", FORMS)
def test_full_rank_changes_nothing(form: str) -> None:
    model, x = layer(form), inputs()
    net = Network(model)
    METHODS["low-rank"].apply(net, net.products()[0], 12, statistics(net, x))
    fresh = inputs(50, seed=2)
    assert run(net.finished(), {"x": fresh}) == pytest.approx(run(model, {"x": fresh}), abs=1e-4)


def test_inputs_of_low_rank_lose_nothing() -> None:
    """What calibration rows never do costs nothing, unlike with a plain decomposition of the weights."""
    model, x = layer("MatMul and Add"), inputs(rank=3)
    net = Network(model)
    METHODS["low-rank"].apply(net, net.products()[0], 3, statistics(net, x))
    assert run(net.finished(), {"x": x}) == pytest.approx(run(model, {"x": x}), abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9))
def test_no_other_map_of_the_rank_is_nearer(seed: int, rank: int) -> None:
    rng = RNG(seed)
    y = rng.normal(size=(60, 10)) @ rng.normal(size=(10, 10)) + rng.normal(size=10)
    moments = Moments.of(y)
    basis = subspace(moments)[1][:, :rank]
    mean = moments.mean
    best = ((y - mean - (y - mean) @ basis @ basis.T) ** 2).sum()
    other = np.linalg.qr(basis + 0.1 * rng.normal(size=basis.shape))[0]
    shift = mean + 0.1 * rng.normal(size=10)
    assert best <= ((y - shift - (y - shift) @ other @ other.T) ** 2).sum() + 1e-9


def test_chain_of_factors_in_fewer_bytes() -> None:
    model, x = layer("MatMul and Add", 64, 64), inputs(inner=64)
    net = Network(model)
    stats = statistics(net, x)
    for part in METHODS["low-rank"].apply(net, net.products()[0], 16, stats):
        METHODS["fp16"].apply(net, part, 0, stats)
    made = net.finished()
    assert len(made.SerializeToString()) < 0.4 * len(model.SerializeToString())
    y = run(model, {"x": x})
    assert run(made, {"x": x}) == pytest.approx(y, abs=0.02 * float(np.abs(y).max()))


@pytest.mark.parametrize("name", ["int8", "int8-fused"])
@pytest.mark.parametrize("form", FORMS)
def test_int8(form: str, name: str) -> None:
    model, x = layer(form, 96, 64), inputs(inner=96, rank=96)
    net = Network(model)
    (site,) = net.products()
    estimate = METHODS["int8"].error(net, site, 0, Statistics())
    METHODS[name].apply(net, site, 0, Statistics())
    made = net.finished()
    onnx.checker.check_model(made)
    y = run(model, {"x": x})
    off = float(np.sqrt(((run(made, {"x": x}) - y) ** 2).mean() / y.var()))
    assert 0.001 < off < 0.03 and off < 3 * estimate
    assert {o.domain for o in made.opset_import} == ({""} if name == "int8" else {"", "com.microsoft"})
    assert METHODS[name].contrib == (name == "int8-fused")


def test_int8_saturates_nowhere() -> None:
    """Two neighbouring products at their largest fit into 16 bits, which older processors add them up in."""
    scales = column_scales(np.array([[3.0], [-3.0]]), 63)
    assert scales == pytest.approx(3 / 63)
    assert 2 * 255 * 63 < 2**15


def test_shared_weights_are_changed_at_all_their_readers() -> None:
    rng = RNG(0)
    text = (
        "(float[N,64] x, float[N,64] z) => (float[N,64] y) "
        "{ p = MatMul(x, W) q = MatMul(z, W) a = Add(p, b) t = Add(q, c) r = Mul(a, t) y = Relu(r) }"
    )
    weight = rng.normal(size=(64, 64)).astype(np.float32)
    model = graph(text, W=weight, b=np.ones(64, np.float32), c=np.zeros(64, np.float32))
    x, z = inputs(inner=64, rank=6), inputs(inner=64, rank=6, seed=1)
    z = z[::-1].copy()
    for name, parameter, close in (("low-rank", 7, 1e-3), ("fp16", 0, 2e-3), ("int8", 0, 0.1)):
        net = Network(model)
        (site,) = net.products()
        assert len(site.nodes) == 2
        stats = Statistics(1, {site.name: Moments.of(np.concatenate([x, z]) @ weight)})
        METHODS[name].apply(net, site, parameter, stats)
        made = net.finished()
        y = run(model, {"x": x, "z": z})
        assert run(made, {"x": x, "z": z}) == pytest.approx(y, abs=close * float(np.abs(y).max())), name
        assert all(t.name != "W" for t in made.graph.initializer)


def table(rows: int = 200, width: int = 8, ids: str = "N,3", seed: int = 0, **how: Any) -> ModelProto:
    rng = RNG(seed)
    data = rng.normal(size=(rows, 3)) @ rng.normal(size=(3, width)) * 0.5 + rng.normal(size=width)
    data += 0.01 * rng.normal(size=(rows, width))
    shape = f"{ids},{width}"
    return graph(f"(int64[{ids}] ids) => (float[{shape}] y) {{ y = Gather(D, ids) }}", D=data.astype(np.float32), **how)


@pytest.mark.parametrize("ids", ["N", "N,3", "N,2,3"])
@pytest.mark.parametrize(("name", "parameter", "close"), [("fp16-tables", 0, 2e-3), ("int8-tables", 0, 0.03),
                                                          ("pca-tables", 3, 0.1)])  # fmt: skip
def test_tables(name: str, parameter: int, close: float, ids: str) -> None:
    model = table(ids=ids)
    net = Network(model)
    (site,) = net.tables()
    assert isinstance(site, Table) and site.shape == (200, 8)
    drawn = RNG(1).integers(-200, 200, [7 if d == "N" else int(d) for d in ids.split(",")])
    stats = Statistics(7, {}, {site.name: counted(drawn, 200)}, {"ids": drawn.ndim})
    METHODS[name].apply(net, site, parameter, stats)
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    y = run(model, {"ids": drawn})
    assert run(made, {"ids": drawn}) == pytest.approx(y, abs=close)
    assert len(made.SerializeToString()) < 0.75 * len(model.SerializeToString())


def test_pca_follows_what_is_looked_up() -> None:
    """Rows that nobody looks up do not count, however far they are from the others."""
    model = table()
    data = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    data[100:] = 50 * RNG(5).normal(size=(100, 8))
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(data, "D"))
    net = Network(model)
    (site,) = net.tables()
    ids = RNG(1).integers(0, 100, (40, 3))
    stats = Statistics(40, {}, {site.name: counted(ids, 200)}, {"ids": 2})
    METHODS["pca-tables"].apply(net, site, 3, stats)
    assert run(net.finished(), {"ids": ids}) == pytest.approx(run(model, {"ids": ids}), abs=0.1)
    assert METHODS["pca-tables"].error(Network(model), site, 3, stats) < 0.05


FOLDED = {
    "one lookup": ("g = Gather(D, ids) e = Flatten(g) y = Gemm(e, W, b)", True),
    "beside others": ("g = Gather(D, ids) f = Reshape(g, s) e = Concat<axis=1>(f, x) y = MatMul(e, W)", True),
    "two layers": ("g = Gather(D, ids) e = Flatten(g) p = Gemm(e, W, b) q = MatMul(e, V) y = Add(p, q)", True),
    "low rank behind": ("g = Gather(D, ids) e = Flatten(g) l = MatMul(e, V) y = MatMul(l, U)", True),
    "read by others": (
        "g = Gather(D, ids) e = Flatten(g) p = MatMul(e, W) r = Relu(e) q = MatMul(r, V) y = Add(p, q)", False,
    ),
    "between": ("g = Gather(D, ids) e = Flatten(g) r = Tanh(e) y = MatMul(r, W)", False),
}  # fmt: skip


@pytest.mark.parametrize("second", [None, "fp16-tables", "int8-tables"])
@pytest.mark.parametrize("body", FOLDED)
def test_products_behind_tables_are_folded_into_layers(body: str, second: str | None) -> None:
    rng = RNG(0)
    text, expected = FOLDED[body]
    wide = 24 + 5 * ("x)" in text)
    own = {
        "D": onnx.numpy_helper.to_array(table().graph.initializer[0]), "W": rng.normal(size=(wide, 6)),
        "V": rng.normal(size=(24, 6)), "U": rng.normal(size=(6, 6)), "b": rng.normal(size=6), "s": np.array([-1, 24]),
    }  # fmt: skip
    used = {
        k: v.astype(v.dtype if k == "s" else np.float32) for k, v in own.items() if f"({k}," in text or f" {k}" in text
    }
    given = "int64[N,3] ids" + (", float[N,5] x" if "x)" in text else "")
    model = graph(f"({given}) => (float[N,6] y) {{ {text} }}", **used)
    ids = RNG(1).integers(0, 200, (40, 3))
    feed = {"ids": ids} | ({"x": RNG(2).normal(size=(40, 5)).astype(np.float32)} if "x)" in text else {})
    net = Network(model)
    (site,) = net.tables()
    stats = Statistics(40, {}, {site.name: counted(ids, 200)}, {"ids": 2})
    left = METHODS["pca-tables"].apply(net, site, 3, stats)
    if second is not None:
        METHODS[second].apply(net, left[0], 0, stats)
    plain = net.finished()
    folded = fold_pca(net)
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    assert run(made, feed) == pytest.approx(run(plain, feed), abs=1e-4)
    assert bool(folded) == expected
    shapes = {tuple(p.shape) for p in net.products()}
    if expected:
        assert folded.keys() == {"g"} and set(folded["g"]) == {"e"} and (3, 8) not in shapes
        assert {(wide - 3 * 5, 6)} <= shapes and sum(a for a, _ in shapes) < wide
        assert all(i.name not in ("W", "V") or "U" in used for i in made.graph.initializer)
    else:
        assert (3, 8) in shapes and made == plain


def test_sparse_tables() -> None:
    model = table(300, 32)
    data = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    keep = np.argsort(RNG(0).random(data.shape), axis=1)[:, :5]
    sparse = np.zeros_like(data)
    np.put_along_axis(sparse, keep, np.take_along_axis(data, keep, 1), 1)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(sparse, "D"))
    net = Network(model)
    (site,) = net.tables()
    assert list(METHODS["sparse-tables"].offers(net, site, Statistics())) == [5]
    METHODS["sparse-tables"].apply(net, site, 5, Statistics())
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    ids = RNG(1).integers(0, 300, (9, 3))
    assert run(made, {"ids": ids}) == pytest.approx(run(model, {"ids": ids}), abs=2e-3)
    assert len(made.SerializeToString()) < 0.2 * len(model.SerializeToString())
    with pytest.raises(Refused, match="fullest row holds 32 of 32"):
        METHODS["sparse-tables"].offers(Network(table(300, 32)), site, Statistics())


def test_what_is_no_site() -> None:
    """Tables that something else reads, constants that are not looked up by computed ids, products of two values."""
    text = (
        "(int64[N] ids, float[N,4] x) => (float[N,4] y, float[9,4] D2) "
        "{ a = Gather(D, ids) D2 = Identity(D) b = Gather(E, one) c = MatMul(x, K) z = MatMul(x, c2) "
        "t = Add(a, z) y = Add(t, c) c2 = MatMul(K, K) }"
    )
    model = graph(text, D=np.ones((9, 4), np.float32), E=np.ones((9, 4), np.float32), one=np.array([1]),
                  K=np.eye(4, dtype=np.float32))  # fmt: skip
    nodes = sorted(model.graph.node, key=lambda n: n.output[0] != "c2")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    net = Network(model)
    assert net.tables() == []
    assert [p.weight for p in net.products()] == ["K"] and len(net.products()[0].nodes) == 1


def test_initializers_that_callers_may_replace_are_no_constants() -> None:
    model = layer("MatMul")
    model.graph.input.append(onnx.helper.make_tensor_value_info("W", 1, [12, 16]))
    assert Network(model).products() == []


def test_refusals() -> None:
    small = Network(layer("MatMul", 4, 6))
    (site,) = small.products()
    with pytest.raises(Refused, match="no rank to lose"):
        METHODS["low-rank"].offers(small, site, Statistics())
    with pytest.raises(Refused, match="too small"):
        METHODS["int8"].offers(small, site, Statistics())
    with pytest.raises(Refused, match="too few"):
        METHODS["fp16"].offers(small, site, Statistics())
    net = Network(layer("MatMul", 64, 64))
    (wide,) = net.products()
    with pytest.raises(Refused, match="no calibration row"):
        METHODS["low-rank"].offers(net, wide, Statistics())
    still = Statistics(9, {wide.name: Moments.of(np.ones((9, 64)))})
    with pytest.raises(Refused, match="does not vary"):
        METHODS["low-rank"].offers(net, wide, still)
    net.constant(np.zeros(1), "unused")
    large = Network(table())
    (one,) = large.tables()
    data = large.array(one.weight)
    assert data is not None
    big = Network(table())
    big.tensors[0] = onnx.numpy_helper.from_array(data * 1e6, "D")
    big.renewed()
    with pytest.raises(Refused, match="65504"):
        METHODS["fp16-tables"].offers(big, big.tables()[0], Statistics())


def test_ranks_keep_energy() -> None:
    values = 2.0 ** -np.arange(32)
    found = ranks(values, 30)
    assert found == sorted(found, reverse=True) and max(found) <= 30 and min(found) >= 1
    assert break_even((256, 256)) == int(0.95 * 128)
    assert ranks(np.zeros(4), 4) == [] and ranks(values, 0) == []


def test_sums_add_up() -> None:
    rng = RNG(0)
    y = rng.normal(size=(90, 5)) + 3
    whole, parts = Moments.of(y), Moments.of(y[:40]) + Moments.of(y[40:])
    assert parts.covariance == pytest.approx(whole.covariance, rel=1e-12)
    assert whole.covariance == pytest.approx(np.cov(y.T, ddof=0))
    assert whole.less(np.arange(5.0)).covariance == pytest.approx(whole.covariance)
    assert whole.less(np.arange(5.0)).mean == pytest.approx(whole.mean - np.arange(5))
    rows = rng.integers(0, 3, 90)
    weighted = Moments.of(y[:3], np.bincount(rows, minlength=3).astype(float))
    assert weighted.covariance == pytest.approx(np.cov(y[rows].T, ddof=0))


def test_ids_from_the_end_count() -> None:
    assert counted(np.array([[0, -1], [2, -1]]), 4).tolist() == [1, 0, 1, 2]


def test_reduced_rank_regression_beats_the_projection_on_other_inputs() -> None:
    """Inputs that the compressed layers before it have moved."""
    rng = RNG(0)
    x = rng.normal(size=(500, 12))
    y = x @ rng.normal(size=(12, 16)) + 1
    seen = x @ np.diag([1.0] * 6 + [0.05] * 6) + 0.3
    found = reduced_rank(Moments.of(seen), seen.T @ y, Moments.of(y), 12)
    assert seen @ found.first @ found.second + found.shift == pytest.approx(y, abs=0.05)
    for rank in (2, 5):
        low = reduced_rank(Moments.of(seen), seen.T @ y, Moments.of(y), rank)
        got = ((seen @ low.first @ low.second + low.shift - y) ** 2).sum()
        full = np.linalg.lstsq(np.c_[seen, np.ones(500)], y, rcond=None)[0]
        fitted = np.c_[seen, np.ones(500)] @ full
        u, s, vt = np.linalg.svd(fitted - fitted.mean(0), full_matrices=False)
        best = ((fitted.mean(0) + (u[:, :rank] * s[:rank]) @ vt[:rank] - y) ** 2).sum()
        assert got == pytest.approx(best, rel=1e-3)


def test_methods_say_what_they_are() -> None:
    for m in METHODS.values():
        assert "->" in m.identity or m.name == "sparse-tables"
        assert len(m.source) > 20 and m.takes in (Product, Table, Hidden, (Product, Joint))


JOINT = "(float[N,%s] x) => (float[N,%s] y) { %s }"
SHARED = {
    "MatMul": "q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V)",
    "biases": "q = Gemm(x, Q, bq) p = MatMul(x, K) k = Add(p, bk) v = Gemm(x, V)",
    "flipped, other nodes between": (
        "t = Transpose(V) v = MatMul(x, t) r = Relu(x) k = MatMul(r, E) q = Gemm<transB=1>(x, Q, bq)"
    ),
    "bias computed": "c = Mul(bq, bq) q = Gemm(x, Q, c) k = MatMul(x, K) v = MatMul(x, V)",
}  # fmt: skip


def shared(form: str, inner: str = "12") -> ModelProto:
    """Layers that read the same tensor, their results side by side."""
    rng = RNG(0)
    body = SHARED[form]
    names = ["Q", "K", "V", "E", "bq", "bk"]
    shapes = {"Q": (12, 10), "K": (12, 16), "V": (12, 8), "E": (12, 16), "bq": (10,), "bk": (16,)}
    if "flipped" in form:
        shapes |= {"Q": (10, 12), "V": (8, 12)}
    used = {n: rng.normal(size=shapes[n]).astype(np.float32) for n in names if f"{n})" in body or f" {n}," in body}
    model = graph(JOINT % (inner, f"{inner[:-2]}34", f"{body} y = Concat<axis=-1>(q, k, v)"), **used)
    onnx.checker.check_model(model)
    return model


def joint_statistics(net: Network, x: np.ndarray) -> tuple[Joint, Statistics]:
    (site,) = net.joints(8)
    return site, Statistics(len(x), {site.name: Moments.of(x.astype(np.float64) @ net.matrix(site))})


@pytest.mark.parametrize(("form", "inner"), [*((form, "12") for form in SHARED), ("MatMul", "3,12")])
def test_layers_that_read_the_same_get_one_basis(form: str, inner: str) -> None:
    model = shared(form, inner=inner)
    net = Network(model)
    rows = inputs(rank=12)
    x = rows[:399].reshape(-1, *(int(n) for n in inner.split(",")))
    site, stats = joint_statistics(net, rows[:399])
    weight = net.matrix(site).astype(np.float64)
    product = x.astype(np.float64) @ weight
    mean = product.reshape(-1, weight.shape[1]).mean(0)
    basis = np.linalg.svd((product - mean).reshape(-1, weight.shape[1]), full_matrices=False)[2][:5]
    expected = mean + (product - mean) @ basis.T @ basis - product
    error = METHODS["low-rank"].error(net, site, 5, stats)
    assert error == pytest.approx(np.sqrt((expected**2).sum() / ((product - mean) ** 2).sum()), rel=1e-3)
    left = METHODS["low-rank"].apply(net, site, 5, stats)
    made = net.finished()
    onnx.checker.check_model(made, full_check=True)
    off = run(made, {"x": x}) - run(model, {"x": x})
    columns = {"q": slice(0, 10), "k": slice(10, 26), "v": slice(26, 34)}
    given = np.split(expected, np.cumsum([p.shape[1] for p in site.members])[:-1], axis=-1)
    changed = np.zeros(off.shape)
    for p, part in zip(site.members, given, strict=True):
        which = {"Q": "q", "K": "k", "V": "v", "t": "v"}[p.weight]
        changed[..., columns[which]] = part
    assert off == pytest.approx(changed, abs=2e-4)
    assert [s.shape for s in left] == [(12, 5), *((5, p.shape[1]) for p in site.members)]
    firsts = [n for n in made.graph.node if n.op_type == "MatMul" and n.input[0] == "x"]
    assert len(firsts) == 1 and not any(n.op_type == "Gemm" and n.input[0] == "x" for n in made.graph.node)


def test_one_basis_at_every_tensor_that_is_read() -> None:
    """Weights that are shared between a history and a candidate."""
    rng = RNG(0)
    text = (
        "(float[N,12] x, float[N,12] z) => (float[N,32] y, float[N,32] w) { a = MatMul(x, K) b = MatMul(x, V) "
        "c = MatMul(z, K) d = MatMul(z, V) y = Concat<axis=1>(a, b) w = Concat<axis=1>(c, d) }"
    )
    held = {n: rng.normal(size=(12, 16)).astype(np.float32) for n in "KV"}
    model = graph(text, **held)
    net = Network(model)
    x, z = inputs(rank=4), inputs(rank=4)[::-1].copy()
    site, stats = joint_statistics(net, np.concatenate([x, z]))
    assert [len(p.nodes) for p in site.members] == [2, 2] and site.inputs == ("x", "z")
    METHODS["low-rank"].apply(net, site, 4, stats)
    made = net.finished()
    assert [n.op_type for n in made.graph.node].count("MatMul") == 6
    for name in "yw":
        assert run(made, {"x": x, "z": z}, name) == pytest.approx(run(model, {"x": x, "z": z}, name), abs=1e-3)


def test_what_is_not_joined() -> None:
    model = shared("MatMul")
    net = Network(model)
    (site,) = net.joints(8)
    assert [p.weight for p in site.members] == ["Q", "K", "V"] and site.shape == (12, 34)
    assert Network(model).joints(9)[0].shape == (12, 26)  # the narrow one stays by itself
    assert Network(layer("MatMul")).joints() == [] and Network(layer("read twice")).joints() == []
    wide = graph(
        "(float[N,40] x) => (float[N,20] y) { a = MatMul(x, A) b = MatMul(x, B) y = Concat<axis=1>(a, b) }",
        A=np.ones((40, 10), np.float32), B=np.ones((40, 10), np.float32),
    )  # fmt: skip
    with pytest.raises(Refused, match="too few to be worth one basis"):
        METHODS["low-rank"].offers(Network(wide), Network(wide).joints(8)[0], Statistics())
