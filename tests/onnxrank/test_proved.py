# ruff: noqa: E501
"""Results are right at candidates and lengths far from those that the optimiser ever runs, or the site is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from modelkit import graph as text_graph
from modelkit import optimised, session
from onnx import ModelProto

from onnxrank import cost
from onnxrank.pipeline import Result

COUNTS = (0, 1, 2, 7, 19, 20, 21, 65, 99, 101, 512, 1500)
LENGTHS = (0, 1, 2, 5, 49, 50, 51, 80, 300)


def whole(*shape: int, seed: int = 0) -> np.ndarray:
    """Small whole numbers, so that sums are exact in whatever order they are made."""
    return np.random.default_rng((seed, *shape)).integers(-1, 2, shape).astype(np.float32)


def right_everywhere(
    model: ModelProto, request: list[str], interface: str = "request", changed: bool = True, **how: Any
) -> Result:
    """Optimises without a check, and compares with the original at every number of candidates and length."""
    result = optimised(model, request=request, check=False, interface=interface, **how)
    assert result.changed or not changed, (result.report.refusals, result.report.notes)
    before, after = session(model, False), session(result.model, False)
    symbolic = {d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim if d.dim_param} - {"N"}
    for n in COUNTS:
        for length in LENGTHS if symbolic else (0,):
            rng = np.random.default_rng(n * 1000 + length)
            feed, once = {}, {}
            for i in model.graph.input:
                dims = i.type.tensor_type.shape.dim
                shape = [d.dim_value or (n if d.dim_param == "N" else length) for d in dims]
                data = rng.integers(-2, 3, shape)
                data = data.astype(np.float32) if i.type.tensor_type.elem_type == 1 else np.abs(data)
                if i.name in request:
                    row = rng.integers(0, 3, [1, *shape[1:]]).astype(data.dtype)
                    data = np.repeat(row, n, 0)
                    once[i.name] = row
                feed[i.name] = data
            try:
                expected = before.run(None, feed)
            except Exception:  # the original does not run there
                continue
            found = after.run(None, {**feed, **once} if interface == "request" else feed)
            for a, b in zip(expected, found, strict=True):
                assert a.shape == b.shape, (n, length)
                assert np.array_equal(a, b), (n, length)
    return result


TABLE = {"E": whole(3, 16), "A": whole(32, 24), "CC": whole(24, 16), "T": whole(16, 16, seed=1), "V": whole(16, 16)}
CUTS = {
    "last 50": "s = Constant<value_ints=[-50]>() e = Constant<value_ints=[9223372036854775807]>()",
    "first 50": "s = Constant<value_ints=[0]>() e = Constant<value_ints=[50]>()",
    "but the first": "s = Constant<value_ints=[1]>() e = Constant<value_ints=[9223372036854775807]>()",
    "but the last": "s = Constant<value_ints=[0]>() e = Constant<value_ints=[-1]>()",
    "second to tenth": "s = Constant<value_ints=[1]>() e = Constant<value_ints=[10]>()",
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("interface", ["request", "same"])
def test_history_cut_and_summed(cut: str, interface: str) -> None:
    model = text_graph(
        "(int64[N,L] h, int64[N] i) => (float[N,16] y) { e9 = Gather(E, i) a1 = Constant<value_ints=[1]>()"
        f" {CUTS[cut]} ht = Slice(h, s, e, a1) k0 = Gather(E, ht) k1 = MatMul(k0, T) kr = Relu(k1) k = MatMul(kr, V)"
        " sh = Shape(k) ix = Constant<value_int=1>() n = Gather(sh, ix) nf = Cast<to=1>(n)"
        " t = ReduceSum<keepdims=0>(k, a1) m = Add(t, nf)"
        " c = Concat<axis=1>(m, e9) y0 = MatMul(c, A) y1 = Relu(y0) y = MatMul(y1, CC) }",
        **TABLE,
    )
    right_everywhere(model, ["h"], interface)


@pytest.mark.parametrize("cut", CUTS)
def test_target_attention_over_a_cut_history(cut: str) -> None:
    model = text_graph(
        "(int64[N,L] h, int64[N] i) => (float[N,16] y) { a1 = Constant<value_ints=[1]>()"
        f" {CUTS[cut]} ht = Slice(h, s, e, a1) k = Gather(E, ht) e9 = Gather(E, i) q = Unsqueeze(e9, a1) sh = Shape(k)"
        " qb = Expand(q, sh) p = Mul(qb, k) d = Sub(qb, k) x = Concat<axis=2>(qb, k, d, p) s0 = MatMul(x, A4)"
        " s0b = Add(s0, b1) s1 = Relu(s0b) s3 = MatMul(s1, B) w = Mul(s3, k) o = ReduceSum<keepdims=0>(w, a1)"
        " c = Concat<axis=1>(o, e9) y = MatMul(c, C2) }",
        E=TABLE["E"], A4=whole(64, 8), b1=whole(8), B=whole(8, 1), C2=whole(32, 16),
    )  # fmt: skip
    right_everywhere(model, ["h"])


REPEATS = {
    "unsqueezed and expanded": "s3 = Concat<axis=0>(one, n1, one) e1 = Expand(q, s3)",
    "expanded to a shape": "e1 = Expand(q, sh)",
    "tiled": "t3 = Concat<axis=0>(one, n1, one) e1 = Tile(q, t3)",
    "repeated by ones": "z3 = Concat<axis=0>(one, n1, one) e9 = ConstantOfShape<value = float[1] {1.0}>(z3) e1 = Mul(q, e9)",
}
POOLS = {
    "product": "wt = Transpose<perm=[0, 2, 1]>(w) o3 = MatMul(wt, k) o = Squeeze(o3, one)",
    "weighted sum": "wk = Mul(w, k) o = ReduceSum<keepdims=0>(wk, one)",
    "scores alone": "o4 = ReduceSum<keepdims=0>(w, one) o = Mul(o4, e)",
}


def target_attention(
    repeat: str, pool: str, opset: int = 17, parts: str = "e1, k, d, p", width: int = 64
) -> ModelProto:
    """Attention of the candidate over a history of any length, by a layer of `[q, k, q - k, q * k]` and a mask."""
    return text_graph(
        "(int64[N,L] h, int64[N] i) => (float[N,16] y) { one = Constant<value_ints=[1]>() m1 = Constant<value_ints=[-1]>()"
        " e = Gather(E, i) q = Unsqueeze(e, one) k = Gather(E, h) sh = Shape(k) n1 = Gather(sh, one)"
        f" {REPEATS[repeat]} d = Sub(e1, k) p = Mul(e1, k) x = Concat<axis=-1>({parts}) a0 = MatMul(x, W1)"
        " a1 = Add(a0, b1) a2 = Relu(a1) a3 = MatMul(a2, W2) a4 = Relu(a3) a5 = MatMul(a4, W3)"
        " zero = Constant<value_int=0>() hidden = Equal(h, zero) hid = Unsqueeze(hidden, m1)"
        " none0 = Constant<value_float=0.0>() w = Where(hid, none0, a5)"
        f" {POOLS[pool]} c = Concat<axis=1>(o, e) y = MatMul(c, C2) }}",
        opset=opset, E=whole(3, 16), W1=whole(width, 8), b1=whole(8), W2=whole(8, 4), W3=whole(4, 1), C2=whole(32, 16),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("repeat", REPEATS)
def test_target_attention_over_any_length(repeat: str, pool: str) -> None:
    result = right_everywhere(target_attention(repeat, pool), ["h"])
    assert not any("several extents" in r.reason for r in result.report.refusals)
    # Of the 64 entries of a pair of candidate and position, one product over the candidate's 16 is left.
    wide = {n.op_type: t.dims[0] for n in result.model.graph.node if n.op_type in ("MatMul", "Gemm") for t in
            result.model.graph.initializer if t.name == n.input[1] and t.dims[-1] == 8}  # fmt: skip
    assert max(wide.values(), default=16) <= 16


@pytest.mark.parametrize("repeat", REPEATS)
def test_a_free_length_saves_what_a_fixed_one_does(repeat: str) -> None:
    free, fixed = (target_attention(repeat, "product") for _ in range(2))
    fixed.graph.input[0].type.tensor_type.shape.dim[1].dim_value = cost.LENGTH  # which a free one is counted at
    left, least = (optimised(m, request=["h"], check=False).report for m in (free, fixed))
    assert left.macs_before == least.macs_before and left.macs_after <= least.macs_after < left.macs_before / 2


@pytest.mark.slow
@pytest.mark.parametrize("opset", [13, 14, 15, 20])
@pytest.mark.parametrize("interface", ["request", "same"])
def test_target_attention_by_opset_and_interface(opset: int, interface: str) -> None:
    right_everywhere(target_attention("expanded to a shape", "product", opset), ["h"], interface)


def query(heads: int, opset: int, weights: str) -> ModelProto:
    """The candidate as a query of some heads on a history of any length; `weights` makes `w` of scores `s3`."""
    size = 16 // heads
    return text_graph(
        "(int64[N,L] h, int64[N] i) => (float[N,16] y) { one = Constant<value_ints=[1]>()"
        " e = Gather(E, i) q0 = MatMul(e, T) k0 = Gather(E, h) km = MatMul(k0, T) vm = MatMul(k0, V)"
        f" k1 = Add(km, b1) v1 = Add(vm, b1) sq = Constant<value_ints=[-1, 1, {heads}, {size}]>() q1 = Reshape(q0, sq) q = Transpose<perm=[0, 2, 1, 3]>(q1)"
        f" sh = Shape(h) n = Gather(sh, one) hs = Constant<value_ints=[{heads}, {size}]>()"
        " z0 = Constant<value_ints=[0]>() nn = Gather(sh, z0) sk = Concat<axis=0>(nn, n, hs)"
        " k2 = Reshape(k1, sk) kt = Transpose<perm=[0, 2, 3, 1]>(k2)"
        " v2 = Reshape(v1, sk) v = Transpose<perm=[0, 2, 1, 3]>(v2) s = MatMul(q, kt) two = Constant<value_float=2.0>()"
        " s2 = Mul(s, two) zero = Constant<value_int=0>() hidden = Equal(h, zero) a12 = Constant<value_ints=[1, 2]>()"
        f" hid = Unsqueeze(hidden, a12) none0 = Constant<value_float=0.0>() s3 = Where(hid, none0, s2) {weights}"
        " o = MatMul(w, v) ot = Transpose<perm=[0, 2, 1, 3]>(o) so = Constant<value_ints=[-1, 16]>() o1 = Reshape(ot, so)"
        " c = Concat<axis=1>(o1, e) y = MatMul(c, C2) }",
        opset=opset, C2=whole(32, 16), b1=whole(16), **{k: TABLE[k] for k in "ETV"},
    )  # fmt: skip


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("heads", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_candidate_as_a_query_of_several_heads(heads: int, opset: int) -> None:
    result = right_everywhere(query(heads, opset, "w = Relu(s3)"), ["h"])
    assert not any("several extents" in r.reason for r in result.report.refusals)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_no_history_at_all(heads: int) -> None:
    """What onnxruntime takes into products, it must not divide by a length of 0."""
    model = query(heads, 17, "w = Softmax<axis=-1>(s3)")
    result = optimised(model, request=["h"], check=False)
    assert result.changed
    before, after = session(model), session(result.model)
    for n in (1, 3):
        feed = {"h": np.zeros((n, 0), np.int64), "i": np.arange(n) % 3}
        assert np.array_equal(*(s.run(None, f)[0] for s, f in ((before, feed), (after, {**feed, "h": feed["h"][:1]}))))


def test_two_factors_of_one_table() -> None:
    """Weights made per request are a stack of products over the two factors of each of the candidate's entries."""
    model = text_graph(
        "(int64[N,L] h, int64[N] i) => (float[N,1] y) { one = Constant<value_ints=[1]>() e = Gather(E, i)"
        " q = Unsqueeze(e, one) k = Gather(E2, h) ka, kb = Split<axis=2>(k, s16) pa = Mul(q, ka) pb = Mul(q, kb)"
        " x = Concat<axis=-1>(pa, pb) a0 = MatMul(x, W1) a1 = Relu(a0) a2 = MatMul(a1, W2)"
        " y = ReduceSum<keepdims=0>(a2, one) }",
        E=whole(3, 16), E2=whole(3, 32), W1=whole(32, 8), W2=whole(8, 1), s16=np.array([16, 16]),
    )  # fmt: skip
    result = right_everywhere(model, ["h"])
    assert "fold" in {use.name for use in result.report.rules}
    feed = {"h": np.zeros((1, 0), np.int64), "i": np.arange(3)}
    assert not session(result.model).run(None, feed)[0].any()


@pytest.mark.parametrize(
    "parts", ["p", *(pytest.param(p, marks=pytest.mark.slow) for p in ("p, e1", "p, d", "k, p, e1"))]
)
def test_target_attention_of_some_parts(parts: str) -> None:
    model = target_attention("unsqueezed and expanded", "product", parts=parts, width=16 * len(parts.split(",")))
    right_everywhere(model, ["h"])


@pytest.mark.parametrize("table", [512, 64])
@pytest.mark.parametrize(
    "add",
    [
        "k1 = Add(k0, p)",
        "k1 = Add(p, k0)",
        "q = Neg(p) k1 = Sub(k0, q)",
        "m = MatMul(k0, T) b = Add(m, B) k1 = Add(p, b)",
    ],
)
def test_positions_cut_to_the_length_are_the_requests(add: str, table: int) -> None:
    """What is cut to `min(L, 64)` rows has L of them wherever it is added to L rows."""
    model = text_graph(
        "(int64[N,L] h, float[N,16] c) => (float[N,1] y) { a1 = Constant<value_ints=[1]>()"
        " a2 = Constant<value_ints=[2]>() k0 = Gather(E, h) sh = Shape(h) n = Slice(sh, a1, a2)"
        f" z = Constant<value_ints=[0]>() p = Slice(P, z, n, z) {add} k2 = MatMul(k1, T) kr = Relu(k2)"
        " q1 = Unsqueeze(c, a2) s = MatMul(kr, q1) t = ReduceSum<keepdims=0>(s, a1) y = Identity(t) }",
        P=whole(table, 16, seed=3), B=whole(16, seed=4), **TABLE,
    )  # fmt: skip
    result = right_everywhere(model, ["h"])
    assert not [r for r in result.report.refusals if "extents" in r.reason]
    assert result.report.macs_after < result.report.macs_before / 10


@pytest.mark.parametrize("positions", ["table", "range"])
def test_positions_of_a_history(positions: str) -> None:
    how = {
        "table": "z1 = Constant<value_ints=[0]>() n1 = Slice(sh, a1, a2, z1) p = Slice(P, z1, n1, z1)",
        "range": "ix = Constant<value_int=1>() n = Gather(sh, ix) z = Constant<value_int=0>()"
        " one = Constant<value_int=1>() r = Range(z, n, one) m = Constant<value_int=400>() rc = Min(r, m)"
        " p = Gather(P, rc)",
    }
    model = text_graph(
        "(int64[N,L] h, float[N,16] c) => (float[N,16] y) { a1 = Constant<value_ints=[1]>()"
        " a2 = Constant<value_ints=[2]>() k0 = Gather(E, h) sh = Shape(k0)"
        f" {how[positions]} k1 = Add(k0, p) k2 = MatMul(k1, T) kr = Relu(k2) t = ReduceSum<keepdims=0>(kr, a1)"
        " x = Concat<axis=1>(t, c) y0 = MatMul(x, A) y = MatMul(y0, CC) }",
        P=whole(512, 16, seed=3), **TABLE,
    )  # fmt: skip
    right_everywhere(model, ["h"])


TOWER = " h = MatMul(u, W) r = Relu(h) v = MatMul(r, V)"
BIG = {"W": whole(8, 16), "V": whole(16, 8), "CC": whole(16, 8)}


@pytest.mark.parametrize("count", [100, 1000])
def test_candidates_cut_to_the_first(count: int) -> None:
    model = text_graph(
        f"(float[N,8] u, float[N,8] c) => (float[1,8] y, float[M,8] z) {{ {TOWER}"
        f" s = Constant<value_ints=[0]>() e = Constant<value_ints=[{count}]>() ct = Slice(c, s, e) sh = Shape(ct)"
        " o = Constant<value_ints=[1]>() v0 = Slice(v, s, o) ve = Expand(v0, sh) y0 = Relu(ve)"
        " y = ReduceSum<keepdims=1>(y0, s) z = Mul(ve, ct) }",
        **BIG,
    )
    right_everywhere(model, ["u"], changed=False)


def test_filter_whose_count_is_found_in_the_data() -> None:
    model = text_graph(
        f"(float[N,8] u, float[N,8] c, float[N] price) => (float[1,8] y) {{ {TOWER}"
        " z0 = Constant<value_ints=[0]>() o = Constant<value_ints=[1]>() m = Constant<value_float=-1.0>()"
        " w = Greater(price, m) nz = NonZero(w) ix = Squeeze(nz, z0) cf = Gather(c, ix) sh = Shape(cf)"
        " v0 = Slice(v, z0, o) ve = Expand(v0, sh) vp = Relu(ve) y = ReduceSum<keepdims=1>(vp, z0) }",
        **BIG,
    )
    right_everywhere(model, ["u"], changed=False)


def test_top_k_of_a_share_of_the_candidates() -> None:
    model = text_graph(
        f"(float[N,8] u, float[N,8] c) => (float[N,8] y) {{ {TOWER}"
        " sh = Shape(c) i0 = Constant<value_int=0>() n = Gather(sh, i0) nf = Cast<to=1>(n)"
        " p = Constant<value_float=0.05>() kf = Mul(nf, p) k0 = Cast<to=7>(kf) one = Constant<value_int=1>()"
        " k = Add(k0, one) z = Constant<value_ints=[0]>() k1 = Unsqueeze(k, z) a = Constant<value_ints=[1]>()"
        " pop = ReduceSum<keepdims=0>(c, a) top, at = TopK<axis=0>(pop, k1) best = ReduceSum<keepdims=1>(top, z)"
        " x = Concat<axis=1>(v, c) y0 = MatMul(x, CC) y = Add(y0, best) }",
        **BIG,
    )
    right_everywhere(model, ["u"])


def test_every_twentieth_candidate_as_a_sample() -> None:
    model = text_graph(
        f"(float[N,8] u, float[N,8] c) => (float[N,8] y) {{ {TOWER}"
        " sh = Shape(c) i0 = Constant<value_int=0>() n = Gather(sh, i0) st = Constant<value_int=20>()"
        " ids = Range(i0, n, st) some = Gather(c, ids) z = Constant<value_ints=[0]>()"
        " ctx = ReduceSum<keepdims=1>(some, z) x = Concat<axis=1>(v, c) y0 = MatMul(x, CC) y = Add(y0, ctx) }",
        **BIG,
    )
    right_everywhere(model, ["u"])


def test_rows_padded_to_a_least_batch() -> None:
    model = text_graph(
        f"(float[N,8] u, float[N,8] c) => (float[M,8] y) {{ {TOWER}"
        " sh = Shape(c) i0 = Constant<value_ints=[0]>() n = Gather(sh, i0) least = Constant<value_ints=[64]>()"
        " lack = Sub(least, n) more = Max(lack, i0) z3 = Constant<value_ints=[0, 0]>() z1 = Constant<value_ints=[0]>()"
        " pads = Concat<axis=0>(z3, more, z1) padded = Pad(c, pads) ps = Shape(padded) v0 = Slice(v, z1, o1)"
        " ve = Expand(v0, ps) y = Add(ve, padded) }",
        o1=np.array([1]), **BIG,
    )  # fmt: skip
    right_everywhere(model, ["u"], changed=False)


def test_an_initializer_that_callers_may_replace_is_no_constant() -> None:
    model = text_graph(
        "(float[N,8] u, float[N,5,8] s, int64[1] pos) => (float[N,8] y) { p = MatMul(s, V8) r = Relu(p)"
        " last = Gather<axis=1>(r, pos) l = Squeeze(last, a1) x = Concat<axis=1>(u, l) y0 = MatMul(x, CC) y = Relu(y0) }",
        V8=whole(8, 8), CC=BIG["CC"], a1=np.array([1]), pos=np.array([4]),
    )  # fmt: skip
    result = optimised(model, request=["u"], check=False)
    before, after = session(model, False), session(result.model, False)
    rng = np.random.default_rng(0)
    row, s = whole(1, 8), rng.integers(-2, 3, (7, 5, 8)).astype(np.float32)
    for pos in (4, 2):
        at = np.array([pos])
        (a,) = before.run(None, {"u": np.repeat(row, 7, 0), "s": s, "pos": at})
        (b,) = after.run(None, {"u": row if result.changed else np.repeat(row, 7, 0), "s": s, "pos": at})
        assert np.array_equal(a, b)
