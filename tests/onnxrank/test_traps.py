"""What real exports contain that a rewrite can trip over: each is optimised right, or left alone with a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from modelkit import (
    HEAD,
    HIDDEN,
    agree,
    compare,
    divide,
    draw,
    fired,
    graph,
    hold,
    i64,
    mlp,
    one,
    optimised,
    roles_of,
    session,
    w,
)
from onnx import ModelProto, TensorProto, helper

import onnxrank
from onnxrank.errors import ModelError
from onnxrank.pipeline import Result

TWO = "(float[N,4] user, float[N,3] item) => "


def reasons(result: Result) -> str:
    return "\n".join(f"{r.rule} {r.op} {r.reason}" for r in result.report.refusals)


def left_alone(model: ModelProto, request: list[str], op: str = "", **how: Any) -> Result:
    """The model runs as before, and the report says why `op` was left."""
    result = hold(model, request, rules=(), **how)
    if op:
        assert any(r.op == op and r.reason for r in result.report.refusals), reasons(result)
    return result


# --- 1, 5: extents read from what has one row now ------------------------------------------------------------------

ROWS = "s = Shape(user) n = Gather(s, zero) n1 = Concat<axis=0>(n, wide)"
EXTENTS = {
    "Reshape": f"{ROWS} i2 = Reshape(item, n1) c = Concat<axis=1>(user, i2)",
    "Reshape of both": f"{ROWS} k = Mul(user, item3) i2 = Reshape(item, n1) k2 = Reshape(k, n4) c ="
    f" Concat<axis=1>(k2, i2)",
    "Expand of a constant": f"{ROWS} e = Expand(row, n1) i2 = Add(item, e) c = Concat<axis=1>(user, i2)",
    "ConstantOfShape": f"{ROWS} z = ConstantOfShape(n1) i2 = Add(item, z) c = Concat<axis=1>(user, i2)",
    "ones": f"{ROWS} z = ConstantOfShape<value = float[1] {{2.0}}>(n1) i2 = Mul(item, z) c = Concat<axis=1>(user, i2)",
    "zeros in Where": f"{ROWS} z = ConstantOfShape(n1) g = Greater(item, z) i2 = Where(g, item, z)"
    " c = Concat<axis=1>(user, i2)",
    "Range": "s = Shape(user) n0 = Gather(s, z0) q = Range(z0, n0, o0) f = Cast<to=1>(q) g = Unsqueeze(f, ax1) "
    "k = Mul(g, nil) i2 = Add(item, k) c = Concat<axis=1>(user, i2)",
    "rows by position": "s = Shape(user) n0 = Gather(s, z0) q = Range(z0, n0, o0) i2 = Gather(item, q)"
    " c = Concat<axis=1>(user, i2)",
    "Tile": "s = Shape(user) n = Gather(s, zero) rep = Concat<axis=0>(n, ax1) e = Tile(row, rep) i2 = Add(item, e)"
    " c = Concat<axis=1>(user, i2)",
    "Slice": "s = Shape(user) n = Gather(s, zero) i2 = Slice(item, zero, n, zero) c = Concat<axis=1>(user, i2)",
    "request rows expanded like itself": f"{ROWS} uh = Slice(user, zero, wide, ax1) ue = Expand(uh, n1)"
    " d = Sub(ue, item) uc = Slice(user, wide, four, ax1) c = Concat<axis=1>(ue, d, uc)",
    "torch expand": "s = Shape(user) o = ConstantOfShape<value = int64[1] {1}>(two) mi = Mul(o, minus) eq ="
    " Equal(t, mi)"
    " wh = Where(eq, o, t) e = Expand(row, wh) i2 = Add(item, e) c = Concat<axis=1>(user, i2)",
}
CONSTANTS = {
    "zero": i64(0), "wide": i64(3), "row": w(1, 3, seed=5), "z0": np.array(0), "o0": np.array(1),
    "ax1": i64(1),
    "nil": one(0.0), "four": i64(4), "two": i64(2), "minus": i64(-1), "t": i64(-1, 3),
    "item3": w(1, 4), "n4": i64(-1, 4),
}  # fmt: skip


@pytest.mark.parametrize("interface", ["request", "same"])
@pytest.mark.parametrize("form", EXTENTS)
def test_extents_of_a_request_level_tensor(form: str, interface: str) -> None:
    model = mlp(f"{TWO}(float[N,1] y) {{ {EXTENTS[form]} {HEAD} }}", **CONSTANTS)
    hold(model, ["user"], share=0.65, interface=interface)


@pytest.mark.parametrize("source", ["user", "item", "c"])
@pytest.mark.parametrize("order", ["Add(z, l)", "Add(l, z)"])
def test_zero_accumulators(source: str, order: str) -> None:
    """deepctr's linear logit: zeros of N rows, to which logits are added; the request's must stay one row."""
    model = graph(
        f"{TWO}(float[N,1] y) {{ c = Concat<axis=1>(user, item) s = Shape({source}) n = Gather(s, zero)"
        f"s1 = Concat<axis=0>(n, units) z = ConstantOfShape(s1) l = MatMul(user, L) a = {order} k = MatMul(item, M)"
        "t = Add(a, k) h = Gemm(c, W, b) r = Relu(h) d = MatMul(r, V) f = Add(t, d) y = Sigmoid(f) }",
        zero=i64(0), units=i64(1), L=w(4, 1), M=w(3, 1), W=w(7, HIDDEN), b=w(HIDDEN), V=w(HIDDEN, 1),
    )  # fmt: skip
    hold(model, ["user"], share=0.6)


# Extents with a threshold far above the numbers of candidates that a quick look at the model would try.
THRESHOLDS = {
    "at most 100 rows": "a = Slice(item, z, hundred, z) u = Slice(user, z, hundred, z) c = Concat<axis=1>(u, a)",
    "at most 100 rows of both": "k = Concat<axis=1>(user, item) c = Slice(k, z, hundred, z)",
    "the last 100 rows": "s = Shape(item) n = Gather(s, z) m = Sub(n, hundred) f = Max(m, z)"
    " a = Slice(item, f, n, z) u = Slice(user, f, n, z) c = Concat<axis=1>(u, a)",
    "scaled above 100": "s = Shape(item) n = Gather(s, z) q = Greater(n, hundred) f = Cast<to=1>(q) g = Add(f, onef)"
    " u = Mul(user, g) c = Concat<axis=1>(u, item)",
    "clipped count": "s = Shape(item) n = Gather(s, z) m = Min(n, hundred) p = Div(n, m) f = Cast<to=1>(p)"
    " u = Mul(user, f) c = Concat<axis=1>(u, item)",
    "other branch above 100": "s = Shape(user) n = Gather(s, k0) q = Less(n, k100) u = If(q) <"
    "then_branch = t () => (float[N,4] a) { a = Identity(user) },"
    "else_branch = e () => (float[N,4] d) { d = Neg(user) }> c = Concat<axis=1>(u, item)",
    "in chunks of 100": "s = Shape(item) n = Gather(s, z) m = Add(n, most) p = Div(m, hundred) f = Cast<to=1>(p)"
    " u = Div(user, f) c = Concat<axis=1>(u, item)",
    "every hundredth row": "a = Slice(item, z, big, z, hundred) u = Slice(user, z, big, z, hundred) c ="
    " Concat<axis=1>(u, a)",
}


@pytest.mark.parametrize("interface", ["request", "same"])
@pytest.mark.parametrize("form", THRESHOLDS)
def test_thresholds_on_the_number_of_candidates(form: str, interface: str) -> None:
    model = mlp(
        f"{TWO}(float[M,1] y) {{ {THRESHOLDS[form]} {HEAD} }}",
        z=i64(0), hundred=i64(100), onef=one(1.0), k0=np.array(0), k100=np.array(100), most=i64(99), big=i64(2**40),
    )  # fmt: skip
    hold(model, ["user"], rules=(), sizes=(1, 2, 7, 99, 100, 101, 250, 512), seeds=1, interface=interface)


# --- 2: squeezes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interface", ["request", "same"])
@pytest.mark.parametrize(
    "dense", ["h = Gemm(c, W, b) r = Relu(h) y = Gemm(r, V)", "h = MatMul(c, W) r = Relu(h) y = MatMul(r, V)"]
)
def test_squeeze_without_axes(interface: str, dense: str) -> None:
    """`[N, 1, 4]` squeezed without axes is `[4]` at one row: what shrank must not lose its rows' axis."""
    model = mlp(
        "(int64[N,1] user, int64[N,1] item) => (float[N,1] y) { u = Gather(T, user) v = Gather(T, item)"
        f"us = Squeeze(u) vs = Squeeze(v) c = Concat<axis=-1>(us, vs) {dense} }}",
        width=8, T=w(5, 4),
    )  # fmt: skip
    # With one candidate the squeezed tensors have another rank: behind them the model is left as it is.
    result = hold(model, ["user"], rules=(), share=1.0, sizes=(1, 2, 3, 9), interface=interface)
    assert any(r.op == "Squeeze" for r in result.report.refusals)


@pytest.mark.parametrize("where", ["item", "user"])
def test_if_around_a_squeeze(where: str) -> None:
    """TorchScript's `squeeze(1)`: an If on an extent that is always 1."""
    model = mlp(
        "(float[N,1,4] user, float[N,1,3] item) => (float[N,1] y) {"
        f"s = Shape({where}) d = Gather(s, k1) q = Equal(d, k1) x = If(q) <"
        f"then_branch = t () => (float[N,M] sq) {{ sq = Squeeze({where}, ax) }},"
        f"else_branch = e () => (float[N,1,M] id) {{ id = Identity({where}) }}>"
        f"o = Squeeze({'user' if where == 'item' else 'item'}, ax)"
        f"c = Concat<axis=1>({'o, x' if where == 'item' else 'x, o'}) {HEAD} }}",
        k1=np.array(1), ax=i64(1),
    )  # fmt: skip
    result = hold(model, ["user"], share=0.6)
    assert "If" not in [n.op_type for n in result.model.graph.node]


def test_if_on_the_number_of_candidates() -> None:
    """An If that takes one branch for one candidate and another for more stays."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ s = Shape(user) d = Gather(s, k0) q = Equal(d, k1) x = If(q) <"
        "then_branch = t () => (float[N,4] a) { a = Mul(user, two) },"
        f"else_branch = e () => (float[N,4] b2) {{ b2 = Identity(user) }}> c = Concat<axis=1>(x, item) {HEAD} }}",
        k0=np.array(0), k1=np.array(1), two=one(2.0),
    )  # fmt: skip
    result = left_alone(model, ["user"])
    assert "If" in [n.op_type for n in result.model.graph.node]


# --- 3, 4: the batch elsewhere -------------------------------------------------------------------------------------

ELSEWHERE = {
    "positions first": "u = Gather(T, hist) s = Transpose<perm=[1, 0, 2]>(u) m = MatMul(s, Q) t = Tanh(m)"
    " p = ReduceMean<axes=[0], keepdims=0>(t) c = Concat<axis=1>(p, item)",
    "fields and rows merged": "u = Gather(T, hist) i1 = Unsqueeze(item, ax1) s = Concat<axis=1>(u, i1) f ="
    " Reshape(s, m4)"
    " m = Gemm(f, Q, q) t = Relu(m) g = Reshape(t, m64) p = ReduceSum<keepdims=0>(g, ax1) c = Concat<axis=1>(p, item)",
    "rows and fields merged, fields first": "u = Gather(T, hist) i1 = Unsqueeze(item, ax1) s = Concat<axis=1>(u, i1)"
    " x = Transpose<perm=[1, 0, 2]>(s) f = Reshape(x, m4) m = Gemm(f, Q, q) t = Relu(m) g = Reshape(t, s6m)"
    " p = ReduceSum<keepdims=0>(g, ax0) c = Concat<axis=1>(p, item)",
    "GatherND behind a transpose": "u = Gather(T, hist) i1 = Unsqueeze(item, ax1) s = Concat<axis=1>(u, i1)"
    " x = Transpose<perm=[1, 0, 2]>(s) a = GatherND(x, ia) d = GatherND(x, ib) ap = Transpose<perm=[1, 0, 2]>(a)"
    " dp = Transpose<perm=[1, 0, 2]>(d) m = Mul(ap, dp) p = Reshape(m, m12) c = Concat<axis=1>(p, item)",
    "pairs flat, rows last": "u = Gather(T, hist) i1 = Unsqueeze(item, ax1) s = Concat<axis=1>(u, i1)"
    " x = Transpose<perm=[0, 2, 1]>(s) m = MatMul(s, x) a = Transpose<perm=[1, 2, 0]>(m) f = Flatten<axis=2>(a)"
    " g = Gather(f, flat) r0 = Transpose(g) c = Concat<axis=1>(r0, item)",
    "rows on the last axis": "u = Gather(T, hist) i1 = Unsqueeze(item, ax1) s = Concat<axis=1>(u, i1)"
    " x = Transpose<perm=[1, 2, 0]>(s) z = Transpose<perm=[2, 0, 1]>(x) m = MatMul(z, Q)"
    " p = ReduceSum<keepdims=0>(m, ax1) c = Concat<axis=1>(p, item)",
    "middle inferred": "u = Gather(T, hist) s = Transpose<perm=[1, 0, 2]>(u) m = MatMul(s, Q) g = Reshape(m, s5m)"
    " t = Transpose<perm=[1, 0, 2, 3]>(g) p = ReduceSum<keepdims=0>(t, ax13) c = Concat<axis=1>(p, item)",
}


@pytest.mark.parametrize("form", ELSEWHERE)
def test_batch_elsewhere(form: str) -> None:
    width = {"pairs flat, rows last": 8, "middle inferred": 6, "GatherND behind a transpose": 16}.get(form, 8)
    model = mlp(
        f"(int64[N,5] hist, float[N,4] item) => (float[N,1] y) {{ {ELSEWHERE[form]} {HEAD} }}",
        width=width, T=w(6, 4), Q=w(4, 4), q=w(4), ax0=i64(0), ax1=i64(1), m4=i64(-1, 4), m64=i64(-1, 6, 4),
        s6m=i64(6, -1, 4), ia=np.array([[0], [1], [0]]), ib=np.array([[5], [2], [3]]), flat=i64(1, 5, 12, 35),
        s5m=i64(5, -1, 2, 2), ax13=i64(1, 3), m12=i64(-1, 12),
    )  # fmt: skip
    shares = {"GatherND behind a transpose": 0.9, "pairs flat, rows last": 1.0, "rows on the last axis": 0.8}
    hold(model, ["hist"], rules=["fc"], share=shares.get(form, 0.7), ids=6)


@pytest.mark.parametrize("kind", ["scores", "heads merged", "heads first"])
def test_attention_over_history(kind: str) -> None:
    """Self-attention over a request's history and the candidate behind it; nn.MultiheadAttention merges N and heads."""
    project = " ".join(f"{k} = MatMul(s, W{k}) " for k in "qkv")
    forms = {
        "scores": project + "kt = Transpose<perm=[0, 2, 1]>(k) a = MatMul(q, kt) p = Softmax<axis=-1>(a) o ="
        " MatMul(p, v)",
        "heads merged": "t = Transpose<perm=[1, 0, 2]>(s) "
        + project.replace("(s,", "(t,")
        + " ".join(f"{k}r = Reshape({k}, lnh) {k}m = Transpose<perm=[1, 0, 2]>({k}r) " for k in "qkv")
        + "kt = Transpose<perm=[0, 2, 1]>(km) a = MatMul(qm, kt) p = Softmax<axis=-1>(a) om = MatMul(p, vm)"
        "ot = Transpose<perm=[1, 0, 2]>(om) ol = Reshape(ot, lne) o = Transpose<perm=[1, 0, 2]>(ol)",
        "heads first": project
        + " ".join(f"{k}r = Reshape({k}, nlhd) {k}m = Transpose<perm=[2, 0, 1, 3]>({k}r) " for k in "qkv")
        + 'a = Einsum<equation = "bnik,bnjk->bnij">(qm, km) p = Softmax<axis=-1>(a) om = MatMul(p, vm)'
        "ot = Transpose<perm=[1, 2, 0, 3]>(om) o = Reshape(ot, nle)",
    }
    model = mlp(
        "(int64[N,5] hist, int64[N,1] item) => (float[N,1] y) { e = Gather(T, hist) i = Gather(T, item)"
        f"s = Concat<axis=1>(e, i) {forms[kind]} f = Reshape(o, flat) c = Relu(f) {HEAD} }}",
        width=24, T=w(6, 4), Wq=w(4, 4, seed=1), Wk=w(4, 4, seed=2), Wv=w(4, 4, seed=3), lnh=i64(6, -1, 2),
        lne=i64(6, -1, 4), nlhd=i64(-1, 6, 2, 2), nle=i64(-1, 6, 4), flat=i64(-1, 24),
    )  # fmt: skip
    # The sequence is taken apart where that leaves less: then there is no layer over both levels to divide.
    rules = {"heads merged": ["broadcast"]}.get(kind, ["fc"])
    hold(model, ["hist"], rules=rules, share=0.75, ids=6)


@pytest.mark.slow
def test_encoder_of_the_request_alone() -> None:
    """All work is the request's: an encoder, of whose rows one is read, and a dot product with the candidate."""
    model = graph(
        "(int64[N,6] hist, int64[N,1] item) => (float[N,1] y) { e = Gather(T, hist) q = MatMul(e, Wq) k = MatMul(e, Wk)"
        "kt = Transpose<perm=[0, 2, 1]>(k) a = MatMul(q, kt) am = Add(a, mask) p = Softmax<axis=-1>(am) o ="
        " MatMul(p, e)"
        "l = Gather<axis=1>(o, last) t3 = Gather(T, item) t = Squeeze(t3, ax1) m = Mul(l, t) y = ReduceSum(m, ax1) }",
        T=w(7, HIDDEN), Wq=w(8, HIDDEN), Wk=w(8, 8, seed=1), last=np.array(-1), ax1=i64(1),
        mask=np.triu(np.full((6, 6), -1e9, np.float32), 1),
    )  # fmt: skip
    hold(model, ["hist"], rules=["broadcast"], share=0.01, ids=7)


# --- 6, 7, 8: sharing and layouts ----------------------------------------------------------------------------------


def test_table_shared_by_history_and_target() -> None:
    model = mlp(
        "(int64[N,5] hist, int64[N] item, float[N,2] ctx) => (float[N,1] y) { e = Gather(T, hist) t = Gather(T, item)"
        "p = ReduceMean<axes=[1], keepdims=0>(e) t3 = Unsqueeze(t, ax) tt = Transpose<perm=[0, 2, 1]>(t3)"
        f"s = MatMul(e, tt) a = Softmax<axis=1>(s) x = Mul(a, e) g = ReduceSum<keepdims=0>(x, ax)"
        f"c = Concat<axis=1>(t, p, ctx, g) {HEAD} }}",
        width=14, T=w(9, 4), ax=i64(1),
    )  # fmt: skip
    result = hold(model, ["hist", "ctx"], share=0.9, ids=9)
    assert [t.name for t in result.model.graph.initializer].count("T") == 1
    assert sum(np.prod(t.dims) for t in result.model.graph.initializer if list(t.dims) == [9, 4]) == 36


def test_concatenated_ids() -> None:
    """Library B: raw ids of both levels side by side, offsets, one lookup, and a Split behind it."""
    model = mlp(
        "(int64[N,3] user, int64[N,2] item) => (float[N,1] y) { i = Concat<axis=1>(item, user, item) o = Add(i, off)"
        f"e = Gather(T, o) p, q = Split<axis=1>(e, sp) pf = Flatten(p) qf = Flatten(q) c = Concat<axis=1>(qf,"
        f" pf) {HEAD} }}",
        width=28, T=w(35, 4), off=np.arange(7)[None] * 5, sp=i64(3, 4),
    )  # fmt: skip
    hold(model, ["user"], share=0.6)


def test_one_concat_for_many() -> None:
    """Experts, gates and two outputs on one Concat: each is divided, and the request's part is made once for each."""
    body = "".join(f"h{k} = Gemm(c, W{k}, b{k}) r{k} = Relu(h{k}) u{k} = Unsqueeze(r{k}, ax) " for k in range(4))
    body += "e = Concat<axis=1>(u0, u1, u2, u3) "
    for t in "ab":
        body += f"g{t} = MatMul(c, G{t}) p{t} = Softmax(g{t}) x{t} = Unsqueeze(p{t}, ax2) m{t} = Mul(e, x{t}) "
        body += f"s{t} = ReduceSum<keepdims=0>(m{t}, ax) o{t} = MatMul(s{t}, H{t}) {t} = Sigmoid(o{t}) "
    model = graph(
        f"(float[N,12] user, float[N,4] item) => (float[N,1] a, float[N,1] b)"
        f" {{ c = Concat<axis=1>(user, item) {body} }}",
        **{f"W{k}": w(16, 8, seed=k) for k in range(4)}, **{f"b{k}": w(8, seed=k) for k in range(4)},
        **{f"G{t}": w(16, 4, seed=ord(t)) for t in "ab"}, **{f"H{t}": w(8, 1, seed=ord(t)) for t in "ab"},
        ax=i64(1), ax2=i64(2),
    )  # fmt: skip
    result = hold(model, ["user"], share=0.4)
    assert sum(r.sites for r in result.report.rules if r.name == "fc") == 6


@pytest.mark.parametrize("seed", range(4))
def test_interleaved_columns(seed: int) -> None:
    """Request columns anywhere, some repeated, some dropped; small integers, so the bits must be the same."""
    rng = np.random.default_rng(seed)
    request = sorted(rng.choice(12, 7, False).tolist())
    picks = rng.integers(-12, 12, 20)
    model = graph(
        "(float[N,12] X) => (float[N,8] y, float[N,4] z) { g = Gather<axis=1>(X, picks) y = Gemm(g, W, b)"
        "a = Slice(X, from, to, ax, step) z = MatMul(a, U) }",
        picks=picks, W=rng.integers(-3, 4, (20, 8)).astype(np.float32), b=w(HIDDEN).round(),
        U=rng.integers(-3, 4, (6, 4)).astype(np.float32),
        **{"from": i64(11), "to": i64(-13), "ax": i64(1), "step": i64(-2)},
    )  # fmt: skip
    result = hold(model, [f"X[{','.join(map(str, request))}]"], share=0.9)
    feed = {k: np.round(v * 4) for k, v in draw(model, roles_of(result), 5, seed).items()}
    mine = divide(feed, roles_of(result))
    for a, b in zip(session(model).run(None, feed), session(result.model).run(None, mine), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("order", ["tile", "interleave", "tile rows", "interleave rows", "tile columns"])
def test_order_of_repeats(order: str) -> None:
    """`[q0 q1 q0 q1]` and `[q0 q0 q1 q1]` differ, and so do repeats merged with rows."""
    forms = {
        "tile": "t = Tile(item, r13) x = Reshape(t, n34)",
        "interleave": "i3 = Unsqueeze(item, ax2) t = Tile(i3, r113) x = Reshape(t, n34)",
        "tile rows": "t = Tile(item, r13) x = Reshape(t, n34)",
        "interleave rows": "i3 = Unsqueeze(item, ax1) e = Expand(i3, s131) f = Reshape(e, m4) g = MatMul(f, Q)"
        " x = Reshape(g, n34)",
        "tile columns": "u = Tile(user, r13) k = Reshape(u, n34) i3 = Unsqueeze(item, ax1) x = Add(k, i3)",
    }
    model = graph(
        f"(float[N,4] user, float[N,4] item) => (float[N,3,2] y) {{ {forms[order]} u3 = Unsqueeze(user, ax1)"
        "uw = Mul(u3, P) c = Concat<axis=2>(uw, x) m = MatMul(c, W) h = Add(b, m) r = Relu(h) y = MatMul(r, V) }",
        r13=i64(1, 3), r113=i64(1, 1, 3), n34=i64(-1, 3, 4), ax1=i64(1), ax2=i64(2), s131=i64(1, 3, 1), m4=i64(-1, 4),
        Q=w(4, 4), P=w(1, 3, 4), W=w(8, HIDDEN), b=w(HIDDEN), V=w(8, 2),
    )  # fmt: skip
    hold(model, ["user"], share=0.8)


def test_rows_tiled_across_the_batch() -> None:
    """Tile along the candidate axis itself: rows of the output are rows of other candidates. Nothing may go wrong."""
    model = graph(
        f"{TWO}(float[M,8] y) {{ c = Concat<axis=1>(user, item) t = Tile(c, twice) y = MatMul(t, W) }}",
        twice=i64(2, 1), W=w(7, HIDDEN),
    )  # fmt: skip
    hold(model, ["user"], rules=())


# --- 9: ties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["request ids", "candidate scores", "ArgMax", "ties"])
def test_top_k(form: str) -> None:
    """Retrieval from the history: what is picked must not change, ties included."""
    score = {
        "request ids": "s = ReduceSum<keepdims=0>(e, ax2)",
        "candidate scores": "t2 = Transpose<perm=[0, 2, 1]>(t) s3 = MatMul(e, t2) s = Squeeze(s3, ax2)",
        "ties": "d = Sub(e, t) sg = Sign(d) ab = Abs(sg) s = ReduceSum<keepdims=0>(ab, ax2)",
        "ArgMax": "t2 = Transpose<perm=[0, 2, 1]>(t) s3 = MatMul(e, t2) s = Squeeze(s3, ax2)",
    }[form]
    pick = "v, i = TopK(s, two)" if form != "ArgMax" else "i = ArgMax<axis=1, keepdims=1>(s)"
    k = 1 if form == "ArgMax" else 2
    model = mlp(
        f"(int64[N,6] hist, int64[N,1] item) => (float[N,1] y, int64[N,{k}] i)"
        f" {{ e = Gather(T, hist) t = Gather(T, item)"
        f"{score} {pick} j = Unsqueeze(i, ax2) x = Expand(j, s114) g = GatherElements<axis=1>(e, x)"
        f"p = ReduceMean<axes=[1], keepdims=0>(g) tf = Flatten(t) c = Concat<axis=1>(p, tf) {HEAD} }}",
        width=8, T=np.round(w(7, 4) * 2), two=i64(2), ax2=i64(2), s114=i64(1, 1, 4),
    )  # fmt: skip
    result = hold(model, ["hist"], rules=(), ids=7)
    if form == "request ids":
        assert "broadcast" in fired(result) and result.report.macs_after < result.report.macs_before


# --- 11: outputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interface", ["request", "same"])
@pytest.mark.parametrize("guard", [True, False])
def test_outputs_of_every_kind(interface: str, guard: bool) -> None:
    """Of no candidate, of candidates only, mixed, an input's, integers: names, order, types and N rows."""
    model = graph(
        "(float[N,4] user, int64[N,3] ids, float[N,3] item, float[N,2] unused)"
        "=> (float[N,2] tower, float[N,4] user_out, float[N,3] item_out, int64[N,3] ids_out, float[N,1] y,"
        " float[N,1] z,"
        "float[N,1] y2, bool[N,4] positive, float[1,4] fixed) {"
        "t = MatMul(user, U) tower = Relu(t) user_out = Identity(user) item_out = Identity(item) ids_out ="
        " Identity(ids)"
        "c = Concat<axis=1>(user, item) h = Gemm(c, W, b) r = Relu(h) y = Gemm(r, V) y2 = Identity(y) z = Sigmoid(y)"
        "positive = Greater(user, zero) fixed = Identity(K) }",
        U=w(4, 2), W=w(7, HIDDEN), b=w(HIDDEN), V=w(HIDDEN, 1), zero=one(0.0), K=w(1, 4),
    )  # fmt: skip
    result = hold(model, ["user", "ids"], share=0.7, interface=interface, guard=guard)
    names = {i.name for i in result.model.graph.input}
    assert names == {"user", "ids", "item", "unused"}


def test_output_is_an_input() -> None:
    model = graph(
        f"{TWO}(float[N,4] user, float[N,8] y) {{ c = Concat<axis=1>(user, item) y = MatMul(c, W) }}", W=w(7, HIDDEN)
    )
    result = optimised(model, request=["user"], interface="same", guard=False)
    compare(model, result)
    # Under `request` an input of one row cannot have the name of an output with N rows.
    try:
        other = optimised(model, request=["user"])
    except ModelError as e:
        assert "user" in str(e)
    else:
        compare(model, other)


def test_output_is_an_initializer() -> None:
    model = graph(
        f"{TWO}(float[N,8] y, float[7,8] W) {{ c = Concat<axis=1>(user, item) y = MatMul(c, W) }}", W=w(7, HIDDEN)
    )
    hold(model, ["user"], share=0.6)


def test_only_outputs_of_the_request() -> None:
    """Nothing depends on a candidate: scores are the same in all rows, and there are still N of them."""
    model = graph(f"{TWO}(float[N,2] y) {{ t = MatMul(user, U) y = Relu(t) }}", U=w(4, 2))
    hold(model, ["user"], rules=["broadcast"], share=0.1)


def test_constant_output_of_n_rows() -> None:
    model = graph(
        f"{TWO}(float[N,1] bias, float[N,8] y) {{ s = Shape(user) n = Gather(s, z) n1 = Concat<axis=0>(n, o)"
        "bias = ConstantOfShape<value = float[1] {0.5}>(n1) c = Concat<axis=1>(user, item) y = MatMul(c, W) }",
        W=w(7, HIDDEN), z=i64(0), o=i64(1),
    )  # fmt: skip
    hold(model, ["user"], share=0.6)


def test_duplicate_outputs() -> None:
    model = graph(
        f"{TWO}(float[N,8] y, float[N,8] again, float[N,4] u, float[N,4] v) {{ c = Concat<axis=1>(user, item)"
        "y = MatMul(c, W) again = Identity(y) u = Relu(user) v = Identity(u) }",
        W=w(7, HIDDEN),
    )  # fmt: skip
    hold(model, ["user"], share=0.6)


# --- shapes of all kinds -------------------------------------------------------------------------------------------


def test_scalar_and_empty_inputs() -> None:
    model = mlp(
        "(float temperature, float[N,4] user, float[N,3] item, float[N,0] none, float[0] nothing) => (float[N,1] y) {"
        f"u = Mul(user, temperature) s = ReduceSum(nothing) us = Add(u, s) c = Concat<axis=1>(us, none, item) {HEAD} }}"
    )
    hold(model, ["user"], share=0.6)


def test_no_candidates() -> None:
    """N = 0 gives no scores where it did before."""
    model = mlp(f"{TWO}(float[N,1] y) {{ c = Concat<axis=1>(user, item) {HEAD} }}")
    result = optimised(model, request=["user"])
    feed = {"user": np.ones((1, 4), np.float32), "item": np.ones((0, 3), np.float32)}
    assert session(result.model).run(None, feed)[0].shape == (0, 1)
    same = optimised(model, request=["user"], interface="same")
    feed["user"] = np.ones((0, 4), np.float32)
    assert session(model).run(None, feed)[0].shape == (0, 1)
    assert session(same.model).run(None, feed)[0].shape == (0, 1)


@pytest.mark.parametrize(
    "form",
    [
        "i = Identity(item)",
        "i = Clip(item, lo, hi)",
        "q = Equal(item, nine) i = Where(q, lo, item)",
        "i = Mod(item, six)",
        "q = Equal(item, lo) k = Not(q) m = Cast<to=7>(k) i = Mul(item, m)",
        "i = Max(item, lo)",
        "i = Abs(item)",
        "f = Cast<to=1>(item) i = Cast<to=7>(f)",
        "a = Unsqueeze(item, o) x = Tile(a, rep) s = Slice(x, z, o, o) i = Squeeze(s, o)",
    ],
)
def test_ids_on_their_way_to_a_table(form: str) -> None:
    """Ids must lie in the tables, whatever stands between."""
    model = mlp(
        f"(float[N,4] user, int64[N] item) => (float[N,1] y) {{ {form} e0 = Gather(T, i) e = Reshape(e0, sh)"
        f"c = Concat<axis=1>(user, e) {HEAD} }}",
        width=8, T=w(6, 4), lo=np.array(0), hi=np.array(5), nine=np.array(9), six=np.array(6), sh=i64(-1, 4),
        rep=i64(1, 2), z=i64(0), o=i64(1),
    )  # fmt: skip
    hold(model, ["user"], share=0.6, ids=6)


@pytest.mark.parametrize("where", ["user", "item"])
def test_shapes_that_depend_on_data(where: str) -> None:
    """NonZero and Compress: as many entries as the data says."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ q = Greater({where}, zero) z = NonZero(q) t = Transpose(z) g = GatherND({where}, t)"
        f"s = ReduceSum<keepdims=0>(g) c0 = Concat<axis=1>(user, item) c = Add(c0, s) {HEAD} }}",
        zero=one(0.0),
    )  # fmt: skip
    left_alone(model, ["user"])


def test_as_many_as_the_data_says_are_counted() -> None:
    """Whole rows of a mask set anew, as `mask[mask.all(-1), 0] = 0` is exported: only NonZero knows how many."""
    model = mlp(
        "(float[N,5] mask, float[N,8] user, float[N,3] item) => (float[N,1] y) { full = ReduceMin<axes=[1]>(mask)"
        "z = NonZero(full) t = Transpose(z) s = Shape(t) k = Slice(s, i0, i1, i0) v = Expand(zero, k)"
        f"m = ScatterND(mask, t, v) c = Concat<axis=1>(user, item, m) {HEAD} }}",
        width=16, i0=i64(0), i1=i64(1), zero=one(0.0),
    )  # fmt: skip
    hold(model, ["mask", "user"], rules=["fc"], share=0.9)


def test_boolean_mask_with_row_numbers() -> None:
    """A triangle by NonZero over `[N, 3, 3]`: its coordinates hold the row's number."""
    model = mlp(
        "(float[N,2,4] user, float[N,1,4] item) => (float[N,1] y) { f = Concat<axis=1>(user, item)"
        "ft = Transpose<perm=[0, 2, 1]>(f) m = MatMul(f, ft) s = Shape(m) tri = Expand(T, s) nz = NonZero(tri)"
        f"nt = Transpose(nz) g = GatherND(m, nt) p = Reshape(g, sh) k = Flatten(f) c = Concat<axis=1>(p, k) {HEAD} }}",
        width=15, T=np.triu(np.ones((3, 3), np.int64), 1), sh=i64(-1, 3),
    )  # fmt: skip
    hold(model, ["user"], rules=(), ids=5)


# --- operators that are left alone ---------------------------------------------------------------------------------

ACROSS = {
    "Softmax over N": "m = Softmax<axis=0>({x})",
    "mean over N": "a = ReduceMean<axes=[0], keepdims=1>({x}) m = Sub({x}, a)",
    "sum over everything": "a = ReduceSum<keepdims=0>({x}) m = Mul({x}, a)",
    "maximum over N": "a = ReduceMax<axes=[0], keepdims=1>({x}) m = Sub({x}, a)",
    "CumSum over N": "m = CumSum({x}, zero)",
    "reversed rows": "m = Slice({x}, last, first, ax0, back)",
    "flattened and put back": "a = Flatten<axis=0>({x}) d = Softmax<axis=1>(a) m = Reshape(d, m4)",
    "sorted rows": "a = Gather<axis=1>({x}, zero) s = Shape(a) v, i = TopK<axis=0>(a, s) m = Gather({x}, i)",
    "L2 over N": "m = LpNormalization<axis=0>({x})",
    "first row": "a = Gather<axis=0>({x}, k0) d = Unsqueeze(a, ax0) m = Sub({x}, d)",
    "shifted rows": "a = Slice({x}, ax0, minus, ax0) m = Pad({x}, pads)",
    "rows against rows": "t = Transpose({x}) a = MatMul({x}, t) p = Softmax(a) m = MatMul(p, {x})",
    "number of rows": "s = Shape({x}) n = Gather(s, k0) f = Cast<to=1>(n) m = Div({x}, f)",
}


@pytest.mark.parametrize("x", ["user", "item"])
@pytest.mark.parametrize("form", ACROSS)
def test_across_candidates(form: str, x: str) -> None:
    """What mixes candidates sees all N rows, also those that are equal."""
    model = mlp(
        f"(float[N,4] user, float[N,4] item) => (float[N,1] y) {{ {ACROSS[form].format(x=x)}"
        f"c = Concat<axis=1>({'m, item' if x == 'user' else 'user, m'}) {HEAD} }}",
        width=8, zero=np.array(0), last=i64(-1), first=i64(-(2**62)), ax0=i64(0), back=i64(-1), m4=i64(-1, 4),
        k0=np.array(0), minus=i64(-1), pads=i64(0, 0, 0, 0),
    )  # fmt: skip
    if form == "shifted rows":
        model.graph.node.remove(next(n for n in model.graph.node if n.op_type == "Slice"))
    result = hold(model, ["user"], rules=())
    if x == "item":
        assert "fc" in fired(result) and result.report.macs_after < result.report.macs_before


def test_batch_statistics() -> None:
    """Normalised by the mean and variance of the candidates of this call."""
    model = mlp(
        f"{TWO}(float[N,1] y)"
        f" {{ c0 = Concat<axis=1>(user, item) a = ReduceMean<axes=[0]>(c0) d = Sub(c0, a) q = Mul(d, d)"
        f"v = ReduceMean<axes=[0]>(q) e = Add(v, eps) s = Sqrt(e) c = Div(d, s) {HEAD} }}",
        eps=one(0.1),
    )
    left_alone(model, ["user"])


@pytest.mark.parametrize("op", ["RandomNormalLike(user)", "RandomUniformLike(user)", "Bernoulli(pu)"])
def test_random_operators(op: str) -> None:
    """Every candidate has a random number of its own: one row of them is not the same."""
    model = mlp(
        f"{TWO}(float[N,1] y, float[N,4] noise) {{ pu = Sigmoid(user) noise = {op} k = Mul(noise, nil) u = Add(user, k)"
        f"c = Concat<axis=1>(u, item) {HEAD} }}",
        nil=one(0.0),
    )
    result = optimised(model, request=["user"], check=False)
    roles = roles_of(result)
    feed = draw(model, roles, 9, 0)
    mine = divide(feed, roles) if result.changed else feed
    score, noise = session(result.model).run(None, mine)
    agree(session(model).run(["y"], feed)[0], score, "y")
    assert noise.shape == (9, 4) and len(np.unique(noise, axis=0)) > (1 if "Bernoulli" in op else 5)


def test_custom_operators() -> None:
    """Nothing is known of them and they cannot be run: reported, and written only unchecked."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ u = acme.Secret<strength: int = 3>(user) t = MatMul(user, U) v = acme.Secret(t)"
        f"c = Concat<axis=1>(user, item) {HEAD.replace('y =', 'y0 =')} y1 = Add(y0, u) y = Add(y1, v) }}",
        domains={"acme": 1}, U=w(4, HIDDEN),
    )  # fmt: skip
    with pytest.raises(ModelError, match="acme"):
        optimised(model, request=["user"])
    result = optimised(model, request=["user"], check=False)
    assert "fc" in fired(result) and any("acme" in n for n in result.report.notes)
    assert any(r.op == "Secret" for r in result.report.refusals)
    secrets = [n for n in result.model.graph.node if n.op_type == "Secret"]
    assert len(secrets) == 2 and all(n.domain == "acme" for n in secrets)
    assert [d.domain for d in result.model.opset_import] == ["", "acme"]
    # With an operator that treats rows alike in its place, the scores are the original's.
    for m in (model, result.model):
        for n in m.graph.node:
            if n.op_type == "Secret":
                n.CopyFrom(helper.make_node("ReduceMean", n.input, n.output, axes=[1]))
    compare(model, result)


def test_nothing_but_custom_operators() -> None:
    model = graph(
        "(float[N,4] user, float[N,3] item) => (float[N,1] y) { y = acme.All(user, item) }", domains={"acme": 1}
    )
    with pytest.raises(ModelError):
        optimised(model, request=["user"])


# --- subgraphs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["user", "item"])
def test_if_reads_outer_tensors(flag: str) -> None:
    """An If on data, whose branches read request-level and candidate-level tensors from outside."""
    model = mlp(
        f"{TWO}(float[N,1] y)"
        f" {{ u2 = MatMul(user, U) s = ReduceSum<keepdims=0>({flag}) q = Greater(s, zero) x = If(q) <"
        "then_branch = t () => (float[N,4] a) { ub = Sub(u2, one) a = Mul(ub, user) },"
        "else_branch = e () => (float[N,4] d) { ib = Slice(item, z, o, o) d = Add(u2, ib) }>"
        f"c = Concat<axis=1>(x, item) {HEAD} }}",
        U=w(4, 4), zero=one(0.0), one=one(1.0), z=i64(0), o=i64(1),
    )  # fmt: skip
    result = left_alone(model, ["user"], "If")
    assert result.changed


def embedding_bag() -> ModelProto:
    """EmbeddingBag as TorchScript writes it: a Loop over rows, reading ids and the table from outside."""
    return mlp(
        "(int64[N,3] user, float[N,4] item) => (float[N,1] y) { s = Shape(user) n = Gather(s, k0) ok = Identity(yes)"
        "bags = Loop(n, ok) <body = b (int64 i, bool cond) => (bool cond_out, float[4] bag) {"
        "row = Gather(user, i) e = Gather(T, row) bag = ReduceSum<keepdims=0>(e, ax0) cond_out = Identity(cond) }>"
        f"c = Concat<axis=1>(bags, item) {HEAD} }}",
        width=8, T=w(6, 4), k0=np.array(0), ax0=i64(0), yes=np.array(True),
    )  # fmt: skip


def test_embedding_bag_loop() -> None:
    left_alone(embedding_bag(), ["user"], "Loop", ids=6)


def test_loop_with_state() -> None:
    """A Loop that carries request-level state through a fixed number of steps."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ u = Loop(steps, yes, user) <body = b (int64 i, bool cond, float[N,4] x)"
        "=> (bool cond_out, float[N,4] x_out) { m = MatMul(x, U) a = Add(m, user) x_out = Tanh(a)"
        f"cond_out = Identity(cond) }}> c = Concat<axis=1>(u, item) {HEAD} }}",
        U=w(4, 4), steps=np.array(3), yes=np.array(True),
    )  # fmt: skip
    left_alone(model, ["user"], "Loop")


def test_branches_read_what_has_no_rank() -> None:
    """The state of a Loop whose body declares no rank: nothing is declared of what follows from it either."""
    model = mlp(
        "(float[N,4] user, float[N,4] item) => (float[N,1] y) {"
        "u = Loop(steps, yes, item) <body = b (int64 i, bool cond, float[] s) => (bool cond_out, float[] s_out)"
        "{ s_out = Add(s, item) cond_out = Identity(cond) }> k = Mul(u, item)"
        "t = ReduceSum<keepdims=0>(item) q = Greater(t, nil) x = If(q) <"
        "then_branch = p () => (float[] a) { a = Neg(k) }, else_branch = e () => (float[] d) { d = Relu(k) }>"
        "f = Concat<axis=-1>(x, item) g = ReduceSum<keepdims=1>(f, last)"
        "c = Concat<axis=1>(user, item) h = Gemm(c, W, b) r = Relu(h) o = Gemm(r, V) y = Add(o, g) }",
        width=8, steps=np.array(2), yes=np.array(True), nil=one(0.0), last=i64(-1),
    )  # fmt: skip
    result = hold(model, ["user"])
    assert not result.report.retreats


def test_scan_over_history() -> None:
    model = mlp(
        "(float[N,5,4] hist, float[N,4] item) => (float[N,1] y) { z = ReduceSum<keepdims=0>(hist, ax1) k = Mul(z, nil)"
        "o, all = Scan<num_scan_inputs=1, scan_input_axes=[1], body = b (float[N,4] s, float[N,4] x)"
        "=> (float[N,4] s_out, float[N,4] each) { m = Add(s, x) s_out = Tanh(m) each = Mul(s_out, k) }>(k, hist)"
        f"c = Concat<axis=1>(o, item) {HEAD} }}",
        width=8, ax1=i64(1), nil=one(0.0),
    )  # fmt: skip
    left_alone(model, ["hist"], "Scan")


def test_scan_without_declared_shapes() -> None:
    """onnxruntime infers no rank behind a Reshape to a computed shape, and refuses such a state of a Scan."""
    model = mlp(
        "(float[N,L,4] hist, float[N,M,4] other, float[N,4] item) => (float[N,1] y) {"
        "t = Transpose<perm=[0,2,1]>(other) e = MatMul(hist, t) first = Gather<axis=0>(e, k0) k = Mul(first, nil)"
        "o, all = Scan<num_scan_inputs=1, body = b (float[] s, float[] x)"
        "=> (float[] s_out, float[] each) { s_out = Add(s, x) each = Identity(s_out) }>(k, e)"
        f"a = ReduceSum<keepdims=0>(all, ax12) n1 = Unsqueeze(a, ax1) c = Concat<axis=1>(n1, item) {HEAD} }}",
        opset=13, width=5, ax1=i64(1), ax12=i64(1, 2), nil=one(0.0), k0=np.array(0),
    )  # fmt: skip
    result = hold(model, ["hist", "other"], rules=("broadcast",), sizes=(1, 5), seeds=1, check="quick")
    assert not result.report.retreats and any(r.op == "Scan" and r.reason for r in result.report.refusals)


def test_sequences() -> None:
    """SplitToSequence and back."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ q = SplitToSequence<axis=1, keepdims=1>(user) e = SequenceAt(q, k1) f = Relu(e)"
        f"l = SequenceInsert(q, f) u = ConcatFromSequence<axis=1>(l) c = Concat<axis=1>(u, item) {HEAD} }}",
        width=8, k1=np.array(1),
    )  # fmt: skip
    left_alone(model, ["user"])


# --- recurrent -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("op", ["GRU", "LSTM", "RNN"])
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("state", ["none", "zeros", "request", "candidate", "lengths"])
def test_recurrent(op: str, layout: int, state: str) -> None:
    """Sequence first or batch first, the initial state from ConstantOfShape(Shape) or from an input."""
    if layout and not _runs_batch_first(op):
        pytest.skip("onnxruntime's CPU provider has no batch-first layout")
    layout_text = ", layout=1" if layout else ""
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    h0 = {
        "none": "",
        "lengths": "l0 = Cast<to=6>(len)",
        "zeros": "sh = Shape(hist) n = Gather(sh, k0) s3 = Concat<axis=0>(o1, n, o4) h0 = ConstantOfShape(s3)",
        "request": "uh = MatMul(user, U) h0 = Unsqueeze(uh, k0)",
        "candidate": "uh = MatMul(item, U) h0 = Unsqueeze(uh, k0)",
    }[state]
    lengths, initial = ("l0", "") if state == "lengths" else ("", "" if state == "none" else "h0")
    cell = ", c0" if op == "LSTM" and initial else ""
    if cell:
        h0 += " c0 = Identity(h0)"
    more = f", {lengths}, {initial}{cell}" if (lengths or initial) else ""
    outputs = "all, last" + (", cell" if op == "LSTM" else "")
    model = mlp(
        f"(float[N,5,4] hist, float[N,4] user, int64[N] len, float[N,4] item) => (float[N,1] y) {{ {h0}"
        f"x = {'Identity(hist)' if layout else 'Transpose<perm=[1, 0, 2]>(hist)'}"
        f"{outputs} = {op}<hidden_size=4{layout_text}>(x, WX, WR, WB{more}) l = Squeeze(last, k0)"
        f"sq = Squeeze(all, k1) p = ReduceMax<axes=[0], keepdims=0>(sq) c = Concat<axis=1>(l, p, item) {HEAD} }}",
        width=12, opset=14, WX=w(1, 4 * gates, 4), WR=w(1, 4 * gates, 4), WB=w(1, 8 * gates), k0=i64(0), k1=i64(1),
        o1=i64(1), o4=i64(4), U=w(4, 4),
    )  # fmt: skip
    request = ["hist", "user", "len"]
    how: dict[str, Any] = {"spec": {"inputs": {"len": {"range": [0, 6]}}}} if state == "lengths" else {}
    result = hold(model, request, rules=() if state == "candidate" else ["gru"], share=0.9, ids=6, **how)
    if state == "candidate":
        assert "gru" not in fired(result) and any(r.rule == "gru" for r in result.report.refusals)


def test_lengths_without_a_range() -> None:
    """What is a sequence's length can be told from where it is used, as ids are from their tables."""
    model = mlp(
        "(float[N,5,4] hist, int32[N] len, float[N,4] item) => (float[N,1] y) { x = Transpose<perm=[1, 0, 2]>(hist)"
        f"all, last = GRU<hidden_size=4>(x, WX, WR, , len) l = Squeeze(last, k0) c = Concat<axis=1>(l, item) {HEAD} }}",
        width=8, WX=w(1, 12, 4), WR=w(1, 12, 4), k0=i64(0),
    )  # fmt: skip
    hold(model, ["hist", "len"], rules=["gru", "fc"], share=0.6, ids=6)


def _runs_batch_first(op: str) -> bool:
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    model = graph(
        f"(float[2,3,4] x) => (float[2,3,1,4] y) {{ y = {op}<hidden_size=4, layout=1>(x, WX, WR) }}",
        opset=14, WX=w(1, 4 * gates, 4), WR=w(1, 4 * gates, 4),
    )  # fmt: skip
    try:
        session(model).run(None, {"x": np.zeros((2, 3, 4), np.float32)})
    except Exception:
        return False
    return True


# --- normalisation, gates, pooling ---------------------------------------------------------------------------------

MORE = {
    "BatchNorm between Concat and Gemm": "k = Concat<axis=1>(user, item) c = BatchNormalization(k, g, b7, mu, va)",
    "LayerNorm": "k = Concat<axis=1>(user, item) c = LayerNormalization(k, g, b7)",
    "LayerNorm by hand": "k = Concat<axis=1>(user, item) a = ReduceMean<axes=[-1]>(k) d = Sub(k, a) q = Pow(d, two)"
    " v = ReduceMean<axes=[-1]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(d, s) n1 = Mul(n, g) c = Add(n1, b7)",
    "gate of the request": "k = Concat<axis=1>(user, item) t = MatMul(user, G) gz = Sigmoid(t) c = Mul(k, gz)",
    "gate of both": "k = Concat<axis=1>(user, item) t = MatMul(k, GG) gz = Sigmoid(t) c = Mul(k, gz)",
    "PRelu": "k = Concat<axis=1>(user, item) c = PRelu(k, b7)",
    "Dropout": "k = Concat<axis=1>(user, item) c = Dropout(k)",
    "Where": "k = Concat<axis=1>(user, item) q = Greater(k, eps) c = Where(q, k, b7)",
    "Softmax of the Concat": "k = Concat<axis=1>(user, item) c = Softmax(k)",
    "sum and mean over it": "k = Concat<axis=1>(user, item) s = ReduceSum(k, ax) m = ReduceMean<axes=[1]>(k)"
    " x = ReduceMax<axes=[1]>(k) t = Add(s, m) u = Mul(t, x) c = Add(k, u)",
    "Sub and Div of levels": "u3 = Slice(user, z, th, ax) d = Sub(u3, item) c = Concat<axis=1>(user, d)",
    "product of levels": "u3 = Slice(user, z, th, ax) d = Mul(u3, item) c = Concat<axis=1>(user, d)",
    "Dice": "k = Concat<axis=1>(user, item) n = BatchNormalization(k, g, b7, mu, va) p = Sigmoid(n) o = Sub(onef, p)"
    " a = Mul(o, g) x = Mul(a, k) d = Mul(p, k) c = Add(x, d)",
    "CumSum along columns": "k = Concat<axis=1>(user, item) c = CumSum(k, ax0d)",
}


@pytest.mark.parametrize("form", MORE)
def test_between_concat_and_product(form: str) -> None:
    rng = np.random.default_rng(0)
    model = mlp(
        f"{TWO}(float[N,1] y) {{ {MORE[form]} {HEAD} }}",
        g=w(7, seed=1), b7=w(7, seed=2), mu=w(7, seed=3), va=rng.uniform(0.5, 2, 7).astype(np.float32), two=one(2.0),
        eps=one(1e-3), onef=one(1.0), G=w(4, 7), GG=w(7, 7), ax=i64(1), z=i64(0), th=i64(3), ax0d=np.array(1),
    )  # fmt: skip
    divides = form not in {
        "LayerNorm", "LayerNorm by hand", "Softmax of the Concat", "gate of both", "sum and mean over it",
        "CumSum along columns",
    }  # fmt: skip
    hold(model, ["user"], rules=["fc"] if divides else (), share=0.75)


@pytest.mark.parametrize("equation", ["nd,dk->nk", "nfd,dk->nfk", "nfd,fdk->nk", "nfd,fd->n", "fdk,nfd->nk"])
def test_einsum(equation: str) -> None:
    """A product with constants, in Einsum's notation."""
    operands, out = equation.split("->")
    data = next(o for o in operands.split(",") if "n" in o)
    size = {"n": "N", "f": 7, "d": 7 if len(data) == 2 else 3, "k": 8}
    constant = w(*[size[c] for c in next(o for o in operands.split(",") if "n" not in o)])
    user, item = (",".join(["N", "4" if a else "3", "3"][: len(data)]) for a in (1, 0))
    outputs = ",".join(str(size[c]) for c in out)
    model = graph(
        f"(float[{user}] user, float[{item}] item) => (float[{outputs}] y)"
        f"{{ c = Concat<axis=1>(user, item) e = Einsum<equation = \"{equation}\">"
        f"({'c, K' if operands.split(',')[0] == data else 'K, c'}) y = Tanh(e) }}",
        K=constant,
    )  # fmt: skip
    hold(model, ["user"], share=0.7)


@pytest.mark.parametrize("experts", [0, 2])
def test_products_with_the_weights_on_the_left(experts: int) -> None:
    """DCN-mix: `W[k, n] @ x[N, n, 1]`, also batched over experts."""
    shape, lift = (f"{experts},", "c4 = Unsqueeze(c3, ax1)") if experts else ("", "c4 = Identity(c3)")
    model = graph(
        f"{TWO}(float[N,{shape}8,1] y) {{ c = Concat<axis=1>(user, item) c3 = Unsqueeze(c, ax2) {lift}"
        "m = MatMul(WL, c4) y = Tanh(m) }",
        WL=w(*([experts] if experts else []), 8, 7), ax1=i64(1), ax2=i64(2),
    )  # fmt: skip
    hold(model, ["user"], share=0.7)


@pytest.mark.parametrize("bias", [True, False])
def test_conv_over_fields(bias: bool) -> None:
    """A 1 x 1 convolution whose channels are fields of both levels, and one behind it."""
    model = graph(
        "(float[N,3,4] user, float[N,2,4] item) => (float[N,6] y) { c = Concat<axis=1>(item, user)"
        f"k = Conv<kernel_shape=[1]>(c, W{', b' if bias else ''}) r = Relu(k) k2 = Conv(r, W2)"
        "y = ReduceSum<keepdims=0>(k2, ax2) }",
        W=w(6, 5, 1), b=w(6), W2=w(6, 6, 1), ax2=i64(2),
    )  # fmt: skip
    hold(model, ["user"], share=0.9)


def test_conv_across_fields() -> None:
    """A convolution over neighbouring fields mixes them: right, whether divided or not."""
    model = graph(
        "(float[N,3,4] user, float[N,2,4] item) => (float[N,2,3,2] y) { c = Concat<axis=1>(user, item)"
        "c4 = Unsqueeze(c, ax1) k = Conv<kernel_shape=[3, 2], strides=[1, 2]>(c4, W) y = Tanh(k) }",
        W=w(2, 1, 3, 2), ax1=i64(1),
    )  # fmt: skip
    hold(model, ["user"], rules=())


# Bodies from `user` [N, 4] and `item` [N, 4] to a `c` of 8 columns, and whether the layer behind it is divided.
FORMS: dict[str, tuple[str, bool]] = {
    "rank 1": (
        "u0 = Gather<axis=1>(user, k0) a = Gather<axis=1>(item, k1) d = Add(u0, a) e = Unsqueeze(d, ax1)"
        " f = Unsqueeze(u0, ax1) g = Concat<axis=1>(e, f, f, f) c = Concat<axis=1>(g, user)",
        True,
    ),
    "flat and back": ("f = Reshape(item, m1) g = Relu(f) i2 = Reshape(g, m4) c = Concat<axis=1>(user, i2)", True),
    "request flat and back": ("f = Reshape(user, m1) g = Relu(f) u2 = Reshape(g, m4) c = Concat<axis=1>(u2,"
        " item)", True),
    "both flat and back": ("k = Concat<axis=1>(user, item) f = Reshape(k, m1) g = Relu(f) c = Reshape(g, m8)", True),
    "request cut across rows": ("f = Reshape(user, m1) g = Reshape(f, x2) e = Reshape(g, m4) c ="
        " Concat<axis=1>(e, item)", False),
    "rows in pairs": (
        "k = Concat<axis=0>(user, item) p = Reshape(k, s2m4) t = Transpose<perm=[1, 0, 2]>(p) c = Reshape(t,"
        " m8)", False,
    ),
    "rows behind rows": (
        "k = Concat<axis=0>(user, item) m = Relu(k) a, d = Split<axis=0>(m) c = Concat<axis=1>(a, d)", False,
    ),
    "stacked rows through one product": (
        "k = Concat<axis=0>(user, item) m = MatMul(k, Q) p = Reshape(m, s2m4) t = Transpose<perm=[1, 0, 2]>(p)"
        " c = Reshape(t, m8)",
        False,
    ),
    "transposed product": (
        "t = Transpose(user) g = Gemm<transA=1>(t, Q) c = Concat<axis=1>(g, item)", False,
    ),
    "product of the transposed Concat": (
        "k = Concat<axis=1>(user, item) t = Transpose(k) g = Gemm<transA=1>(t, R8) c = Relu(g)", False,
    ),
    "addend of the request": ("k = Concat<axis=1>(item, item) u8 = Concat<axis=1>(user, user) c = Gemm(k, R8,"
        " u8)", False),
    "addend of the candidate": ("k = Concat<axis=1>(user, user) i8 = Concat<axis=1>(item, item) c = Gemm(k, R8,"
        " i8)", False),
    "addend of one column": ("k = Concat<axis=1>(user, item) u0 = Slice(user, z0, ax1, ax1) c = Gemm(k, R8, u0)", True),
    "batched products of levels": (
        "u3 = Unsqueeze(user, ax1) i3 = Unsqueeze(item, ax2) p = MatMul(i3, u3) q = MatMul(u3, i3) f = Reshape(p, m16)"
        " g = MatMul(f, Q16) h1 = Reshape(q, m1x1) k = Concat<axis=1>(user, item) a = Add(g, h1) c = Add(k, a)",
        False,
    ),
    "outer product by broadcasting": (
        "u3 = Unsqueeze(user, ax1) i3 = Unsqueeze(item, ax2) p = Mul(u3, i3) f = Reshape(p, m16) c = MatMul(f,"
        " Q16)", False,
    ),
    "choice by the request": ("q = Greater(user, nil) d = Where(q, item, user) c = Concat<axis=1>(user, d)", True),
    "choice by the candidate": ("q = Greater(item, nil) d = Where(q, user, nil) c = Concat<axis=1>(user, d)", True),
    "gathered elements": (
        "s = Mul(item, five) a = Abs(s) f = Cast<to=7>(a) m = Mod(f, i4) g = GatherElements<axis=1>(user, m)"
        " c = Concat<axis=1>(user, g)",
        True,
    ),
    "gathered by row": (
        "s = Mul(item, five) a = Abs(s) f = Cast<to=7>(a) m = Mod(f, i4) m3 = Unsqueeze(m, ax2)"
        " g = GatherND<batch_dims=1>(user, m3) c = Concat<axis=1>(user, g)",
        True,
    ),
    "scattered": (
        "s0 = Shape(user) n0 = Gather(s0, z0) n11 = Concat<axis=0>(n0, ax1) jj = Expand(ax1, n11) kk ="
        " Expand(nil1, n11)"
        " s = ScatterElements<axis=1>(user, jj, kk) c = Concat<axis=1>(s, item)",
        False,
    ),
    "one hot": (
        "s = Mul(user, five) a = Abs(s) f = Cast<to=7>(a) m = Mod(f, i4) m0 = Gather<axis=1>(m, k0) o ="
        " OneHot(m0, d4, onoff)"
        " c = Concat<axis=1>(o, item)",
        True,
    ),
    "padded": ("u = Slice(user, z0, th, ax1) p = Pad(u, pads) c = Concat<axis=1>(p, item)", False),
    "number of entries": (
        "n = Size(user) f = Cast<to=1>(n) s = Reciprocal(f) d = Mul(item, s) c = Concat<axis=1>(user, d)", True,
    ),
    "mean over rows by count": (
        "n = Size(user) f = Cast<to=1>(n) s = ReduceSum(user, z0) d = Div(s, f) a = Add(item, d) c ="
        " Concat<axis=1>(user, a)",
        True,
    ),
    "row numbers as ids": (
        "s = Shape(user) n = Gather(s, k0) r0 = Range(k0, n, k1) m = Mod(r0, i4) e = Gather(Q, m) c ="
        " Concat<axis=1>(user, e)",
        False,
    ),
    "max pool": (
        "u3 = Unsqueeze(user, ax1) p = MaxPool<kernel_shape=[2], strides=[1], pads=[0, 1]>(u3) u = Squeeze(p, ax1)"
        " c = Concat<axis=1>(u, item)",
        True,
    ),
    "top of the request": ("v, j = TopK<axis=1, largest=0>(user, four) c = Concat<axis=1>(v, item)", True),
    "top of both": ("k = Concat<axis=1>(user, item) c, j = TopK(k, eight)", False),
    "norm": ("a = LpNormalization(user) d = ReduceL2<axes=[1]>(item) e = Div(item, d) c = Concat<axis=1>(a, e)", True),
    "cosine": (
        "a = LpNormalization(user) d = LpNormalization(item) m = Mul(a, d) s = ReduceSum(m, ax1)"
        " k = Concat<axis=1>(user, item) c = Add(k, s)",
        False,
    ),
    "log of sums": ("a = ReduceLogSumExp<axes=[1]>(user) d = Sub(user, a) c = Concat<axis=1>(d, item)", True),
    "nothing reduced": ("a = ReduceSum<noop_with_empty_axes=1>(user) c = Concat<axis=1>(a, item)", True),
    "float8 of the whole": (
        "k = Concat<axis=1>(user, item) q, sc, zp = DynamicQuantizeLinear(k) c = DequantizeLinear(q, sc, zp)", False,
    ),
    "instance norm": (
        "u3 = Unsqueeze(user, ax1) k = InstanceNormalization(u3, onev, zerov) u = Squeeze(k, ax1) c ="
        " Concat<axis=1>(u, item)",
        True,
    ),
    "mean and variance of rows": (
        "u4 = Unsqueeze(user, ax23) k = MeanVarianceNormalization<axes=[0, 2, 3]>(u4) u = Squeeze(k, ax23)"
        " c = Concat<axis=1>(u, item)",
        False,
    ),
    "reversed sequence": (
        "s0 = Shape(user) n0 = Gather(s0, z0) lens = Expand(th, n0) u = ReverseSequence<batch_axis=0,"
        " time_axis=1>(user, lens) c = Concat<axis=1>(u, item)", True,
    ),
    "steps backwards": ("u = Slice(user, last, first, ax1, back) c = Concat<axis=1>(item, u)", True),
    "empty slice": ("u = Slice(user, th, th, ax1) c = Concat<axis=1>(user, u, item)", True),
    "scaled by the row count of the other": (
        "s = Shape(item) n = Gather(s, k0) f = Cast<to=1>(n) d = Div(user, f) c = Concat<axis=1>(d, item)", True,
    ),
    "int product": (
        "s = Mul(user, five) f = Cast<to=6>(s) t = Mul(item, five) g = Cast<to=6>(t) k = Concat<axis=1>(f, g)"
        " m = MatMul(k, RI) c = Cast<to=1>(m)",
        True,
    ),
    "same operand twice": ("k = Concat<axis=1>(user, item) a = Add(k, k) c = Mul(a, a)", True),
    "chain of sums": (
        "a = MatMul(user, Q) d = MatMul(item, Q) e = Add(a, d) f = Add(e, a) g = Sub(f, d) h1 = Neg(g) i2 ="
        " Mul(h1, five)"
        " t = Tanh(i2) c = Concat<axis=1>(user, t)",
        True,
    ),
    "sum used twice": (
        "k = Concat<axis=1>(user, item) m = MatMul(k, R8) a = Relu(m) d = Sigmoid(m) e = Mul(a, d) c = Add(e, m)", True,
    ),
    "product of a product": ("k = Concat<axis=1>(user, item) u8 = Concat<axis=1>(user, user) m = MatMul(k, R8)"
        " n = Add(m, u8) c = MatMul(n, R8)", True),
    "division by the sum": ("s = ReduceSum(item, ax1) a = Abs(s) p = Add(a, five) d = Div(user, p) c ="
        " Concat<axis=1>(user, d)",
                            True),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["request", "same"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, interface: str) -> None:
    body, divided = FORMS[form]
    constants: dict[str, np.ndarray] = {
        "k0": np.array(0), "k1": np.array(1), "ax1": i64(1), "ax2": i64(2), "ax23": i64(2, 3), "m1": i64(-1),
        "m4": i64(-1, 4), "m8": i64(-1, 8), "x2": i64(2, -1), "s2m4": i64(2, -1, 4), "Q": w(4, 4), "R8": w(8, HIDDEN),
        "z0": i64(0), "m16": i64(-1, 16), "Q16": w(16, HIDDEN), "m1x1": i64(-1, 1), "nil": one(0.0), "five": one(5.0),
        "i4": np.array(4), "nil1": np.zeros(1, np.float32), "d4": np.array(4), "onoff": np.array([-1, 2], np.float32),
        "th": i64(3), "pads": i64(0, 0, 0, 1), "four": i64(4), "eight": i64(8), "onev": np.ones(1, np.float32),
        "zerov": np.zeros(1, np.float32), "last": i64(-1), "first": i64(-(2**62)), "back": i64(-1),
        "RI": np.random.default_rng(0).integers(-3, 4, (8, 8)).astype(np.int32),
    }  # fmt: skip
    model = mlp(f"(float[N,4] user, float[N,4] item) => (float[N,1] y) {{ {body} {HEAD} }}", width=8, **constants)
    hold(model, ["user"], rules=["fc"] if divided else (), share=1.0, interface=interface)


@pytest.mark.parametrize("x", ["user", "k"])
def test_training_mode(x: str) -> None:
    """BatchNormalization in training mode takes its statistics from the rows it sees."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ k = Concat<axis=1>(user, item) n, rm, rv = BatchNormalization<training_mode=1>"
        f"({x}, g, b0, mu, va) c = {'Concat<axis=1>(n, item)' if x == 'user' else 'Identity(n)'} {HEAD} }}",
        **{k: np.ones(4 if x == "user" else 7, np.float32) for k in ("g", "b0", "mu", "va")},
    )  # fmt: skip
    try:
        session(model)
    except Exception:
        pytest.skip("onnxruntime has no training mode here")
    hold(model, ["user"], rules=())


def test_dropout_in_training_mode() -> None:
    """Every candidate's mask is its own."""
    model = mlp(
        f"{TWO}(float[N,1] y, float[N,4] u) {{ ones = Sub(user, user) o1 = Add(ones, full) u = Dropout(o1, half, train)"
        f"c0 = Concat<axis=1>(user, item) c = Identity(c0) {HEAD} }}",
        full=one(1.0), half=one(0.5), train=np.array(True),
    )  # fmt: skip
    result = optimised(model, request=["user"], check=False)
    feed = draw(model, roles_of(result), 40, 0)
    mine = divide(feed, roles_of(result)) if result.changed else feed
    before, after = (session(m).run(["u"], f)[0] for m, f in ((model, feed), (result.model, mine)))
    assert before.shape == after.shape == (40, 4)
    assert len(np.unique(before, axis=0)) > 4, "rows of the original differ"
    assert len(np.unique(after, axis=0)) > 4, "rows of the result differ"


@pytest.mark.parametrize("opset", [22, 23])
def test_attention_operators(opset: int) -> None:
    """onnxruntime's fused attention over the history, or opset 23's."""
    ops = {
        22: "o = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, v)",
        23: "o = Attention<q_num_heads=2, kv_num_heads=2>(q, k, v)",
    }
    model = mlp(
        "(int64[N,5] hist, float[N,4] item) => (float[N,1] y) { e = Gather(T, hist) q = MatMul(e, Wq) k = MatMul(e, Wk)"
        f"v = MatMul(e, Wv) {ops[opset]} p = ReduceMax<keepdims=0>(o, ax1) c = Concat<axis=1>(p, item) {HEAD} }}",
        width=8, opset=opset, ir=10, domains={"com.microsoft": 1} if opset == 22 else {}, T=w(6, 4), Wq=w(4, 4, seed=1),
        Wk=w(4, 4, seed=2), Wv=w(4, 4, seed=3), ax1=i64(1),
    )  # fmt: skip
    try:
        session(model)
    except Exception:
        pytest.skip("onnxruntime has no such operator here")
    hold(model, ["hist"], rules=["broadcast", "fc"], share=0.2, ids=6)


@pytest.mark.parametrize("which", ["user", "item"])
def test_input_read_for_its_extent_only(which: str) -> None:
    """An input of which only the number of rows matters."""
    other, width = ("item", 3) if which == "user" else ("user", 4)
    model = graph(
        f"{TWO}(float[N,8] y) {{ s = Shape({which}) n = Gather(s, z) n1 = Concat<axis=0>(n, o)"
        f"k = ConstantOfShape<value = float[1] {{0.5}}>(n1) c = Concat<axis=1>(k, {other}) m = MatMul(c, W) y ="
        f" Relu(m) }}",
        z=i64(0), o=i64(1), W=w(width + 1, 8),
    )  # fmt: skip
    hold(model, ["user"], rules=())


def test_dead_code() -> None:
    """Nodes and weights that no output needs, one of which would fail if its rows were cut."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ dead = MatMul(user, D) dead2 = Relu(dead) dt = Transpose(user) d3 = MatMul(item3, dt)"
        f"item3b = Identity(item3) c = Concat<axis=1>(user, item) {HEAD} }}",
        D=w(4, 9), item3=w(2, 4), unused=w(3, 3),
    )  # fmt: skip
    hold(model, ["user"], share=0.6)


def test_outputs_that_nobody_reads() -> None:
    """Left-out and unused outputs of operators with several."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ k = Concat<axis=1>(user, item) a, mask = Dropout(k) p, q, r0 = Split<axis=1>(a, sp)"
        f"v, j = TopK(p, three) c = Concat<axis=1>(v, q) {HEAD} }}",
        width=6, sp=i64(4, 3, 0), three=i64(3),
    )  # fmt: skip
    hold(model, ["user"], share=0.7)


@pytest.mark.slow
def test_large_table() -> None:
    """A table of more entries than are followed one by one, behind an alias."""
    model = mlp(
        "(int64[N,2] user, int64[N] item, float[N,2] ctx) => (float[N,1] y) { T2 = Identity(T) e = Gather(T2, user)"
        f"t = Gather(T2, item) ef = Flatten(e) c = Concat<axis=1>(ef, t, ctx) {HEAD} }}",
        width=8, T=np.random.default_rng(0).standard_normal((2_100_000, 2), np.float32),
    )  # fmt: skip
    result = hold(model, ["user", "ctx"], share=0.6, ids=2_100_000)
    assert result.model.ByteSize() < model.ByteSize() + 4096


@pytest.mark.parametrize("how", [{"ignore": ["fc"]}, {"select": ["pool"]}])
def test_rules_left_out(how: dict[str, Any]) -> None:
    model = mlp(f"{TWO}(float[N,1] y) {{ c = Concat<axis=1>(user, item) {HEAD} }}")
    result = hold(model, ["user"], rules=(), **how)
    assert "fc" not in fired(result)


@pytest.mark.parametrize(
    "kind", ["float", "double", "float16", "int64", "int32", "int16", "int8", "uint8", "uint16", "bool", "string"]
)
@pytest.mark.parametrize("opset", [11, 17, 21])
def test_guard_of_every_type(kind: str, opset: int) -> None:
    """Rows of any type are compared where the signature stays, or the report says that they are not."""
    encode = 'ai.onnx.ml.LabelEncoder<keys_strings = ["a"], values_int64s = [1], default_int64 = 0>(flag)'
    read = f"k = {encode} f = Cast<to=1>(k)" if kind == "string" else "f = Cast<to=1>(flag)"
    model = mlp(
        f"({kind}[N,2] flag, float[N,2] user, float[N,3] item) => (float[N,1] y) {{ {read}"
        f"c = Concat<axis=1>(f, user, item) {HEAD} }}",
        opset=opset, ir=7 if opset == 11 else 8, domains={"ai.onnx.ml": 2},
    )  # fmt: skip
    try:
        session(model)
    except Exception:
        pytest.skip("onnxruntime does not run the original")
    result = hold(model, ["flag", "user"], share=0.9, interface="same")
    feed = draw(model, roles_of(result), 4, 0)
    other = {"bool": lambda v: ~v, "string": lambda v: "b" if v == "a" else "a"}.get(kind, lambda v: v + 1)
    feed["flag"][3, 1] = other(feed["flag"][3, 1])
    (scores,) = session(result.model).run(None, feed)
    if kind == "string" and opset < 19:
        assert any("flag are not guarded" in note for note in result.report.notes)
    else:
        assert np.isnan(scores).all()


def test_guard_and_special_values() -> None:
    """NaN equals NaN and 0 equals -0 in a guard; an infinite feature is a feature."""
    model = mlp(
        f"{TWO}(float[N,1] y) {{ k = Concat<axis=1>(user, item) q = IsNaN(k) c = Where(q, z, k) {HEAD} }}", z=one(0.0)
    )
    result = hold(model, ["user"], share=0.7, interface="same")
    feed = draw(model, roles_of(result), 3, 0)
    feed["user"][:] = [np.nan, 0.0, 1.0, 2.0]
    feed["user"][1, 1] = -0.0
    (a,), (b,) = (session(m).run(None, feed) for m in (model, result.model))
    assert np.isfinite(a).all()
    agree(a, b, "y")


def test_candidates_against_candidates() -> None:
    """A listwise model: an input that has the candidates on both axes."""
    model = mlp(
        "(float[N,4] user, float[N,3] item, float[N,N] mask) => (float[N,1] y) { t = Transpose(item) s ="
        " MatMul(item, t)"
        f"m = Add(s, mask) p = Softmax(m) o = MatMul(p, item) c = Concat<axis=1>(user, o) {HEAD} }}"
    )
    try:
        result = optimised(model, request=["user"])
    except ModelError as e:
        assert "mask" in str(e), e
        return
    for n in (1, 2, 7):
        rng = np.random.default_rng(n)
        user, item, mask = (rng.standard_normal(s, np.float32) for s in ((1, 4), (n, 3), (n, n)))
        (a,) = session(model).run(None, {"user": np.repeat(user, n, 0), "item": item, "mask": mask})
        mine = {"user": user if result.changed else np.repeat(user, n, 0), "item": item, "mask": mask}
        agree(a, session(result.model).run(None, mine)[0], f"N = {n}")


def test_several_mixed_inputs() -> None:
    """Two packed matrices and a table of rows, each divided its own way."""
    model = mlp(
        "(float[N,5] X, int64[3,N] ids, float[N,2,3] Z) => (float[N,1] y) { p0, p1, p2 = Split<axis=0>(ids, ones)"
        + "".join(f"i{k} = Squeeze(p{k}, z) e{k} = Gather(T, i{k}) " for k in range(3))
        + f"zf = Flatten(Z) c = Concat<axis=1>(e2, X, e0, zf, e1) {HEAD} }}",
        width=17, ones=i64(1, 1, 1), z=i64(0), T=w(6, 2),
    )  # fmt: skip
    spec = {"request": ["X[1,3:5]"], "inputs": {"ids": {"candidate_axis": 1, "request": "1:3"},
                                              "Z": {"axis": 2, "request": "0,2"}}}  # fmt: skip
    for interface in ("request", "same"):
        hold(model, spec=spec, share=0.65, ids=6, interface=interface)


@pytest.mark.parametrize("level", ["request", "candidate"])
@pytest.mark.parametrize("cut", ["Slice", "Range"])
def test_histories_cut_to_the_longest(level: str, cut: str) -> None:
    """How many positions are kept depends on the lengths in the data."""
    forms = {
        "Slice": "k = Slice(e, z, mx, o) p = ReduceSum<keepdims=0>(k, o)",
        "Range": "m0 = Squeeze(mx, z) r0 = Range(k0, m0, k1) k = Gather<axis=1>(e, r0) p = ReduceSum<keepdims=0>(k, o)",
    }
    model = mlp(
        "(int64[N,6] hist, int64[N,1] len, float[N,4] item) => (float[N,1] y) { e = Gather(T, hist)"
        f"mz = ReduceMax<keepdims=0>(len) mx = Reshape(mz, o) {forms[cut]} c = Concat<axis=1>(p, item) {HEAD} }}",
        width=8, T=w(9, 4), z=i64(0), o=i64(1), k0=np.array(0), k1=np.array(1),
    )  # fmt: skip
    request = ["hist", "len"] if level == "request" else ["hist"]
    spec = {"inputs": {"len": {"range": [0, 7]}}}
    hold(model, request, spec=spec, rules=(), ids={"hist": 9, "len": 7}, seeds=6)


@pytest.mark.parametrize("mask", ["left", "right", "all"])
def test_padded_histories(mask: str) -> None:
    """Row 0 is padded as every request is: masks, lengths and all-padding histories come out the same."""
    model = mlp(
        "(int64[N,6] hist, int64[N,1] item, float[N,2] ctx) => (float[N,1] y) { e = Gather(T, hist) t = Gather(T, item)"
        "q = Equal(hist, zero) k = Not(q) kf = Cast<to=1>(k) n = ReduceSum(kf, ax1) tt = Expand(t, s161)"
        "d = Sub(tt, e)"
        "x = Mul(tt, e) cc = Concat<axis=2>(tt, e, d, x) m = MatMul(cc, A) a = Add(ab, m) r0 = Sigmoid(a)"
        "s = MatMul(r0, B) sq = Squeeze(s, ax2) sm = Where(q, low, sq) p = Softmax(sm) pz = Where(q, nil, p)"
        "pu = Unsqueeze(pz, ax1) o = MatMul(pu, e) os = Squeeze(o, ax1) n1 = Max(n, onef) ku = Unsqueeze(kf, ax2)"
        "se = Mul(e, ku) sum = ReduceSum<keepdims=0>(se, ax1) mean = Div(sum, n1) tf = Flatten(t)"
        f"c = Concat<axis=1>(os, mean, tf, ctx) {HEAD} }}",
        width=14, T=w(9, 4), zero=np.array(0), ax1=i64(1), ax2=i64(2), s161=i64(1, 6, 1), A=w(16, HIDDEN), ab=w(HIDDEN),
        B=w(8, 1), low=one(-4e9), nil=one(0.0), onef=one(1.0),
    )  # fmt: skip
    result = hold(model, ["hist", "ctx"], share=0.85, ids=9)
    roles = roles_of(result)
    for n in (1, 5):
        feed = draw(model, roles, n, n, ids=9)
        feed["hist"][:, {"left": slice(0, 4), "right": slice(2, 6), "all": slice(0, 6)}[mask]] = 0
        agree(session(model).run(None, feed)[0], session(result.model).run(None, divide(feed, roles))[0], f"N = {n}")


def test_names_that_clash() -> None:
    """Tensors already have the names that a rewrite would give."""
    model = graph(
        "(float[N,4] user, float[N,3] item) => (float[N,1] y) { c = Concat<axis=1>(user, item) h = Gemm(c, W, b)"
        "r = Relu(h) y = Gemm(r, V) }",
        W=w(7, HIDDEN), b=w(HIDDEN), V=w(HIDDEN, 1),
    )  # fmt: skip
    plain = optimised(model, request=["user"])
    new = [n.output[0] for n in plain.model.graph.node] + [t.name for t in plain.model.graph.initializer]
    taken = sorted({n for n in new if "/" in n} | {"X.request", "y/rows", "candidates"})
    assert len(taken) > 3
    last = "item"
    for k, name in enumerate(taken):  # a chain of Identity nodes with all these names between item and the Concat
        model.graph.node.insert(k, helper.make_node("Identity", [last], [name]))
        last = name
    next(n for n in model.graph.node if n.op_type == "Concat").input[1] = last
    hold(model, ["user"], share=0.6)


def test_input_named_like_a_divided_one() -> None:
    """`X` is divided into `X.request` and `X.candidate`, which exist."""
    model = mlp(
        '(float[N,5] X, float[N,1] "X.request", float[N,1] "X.candidate") => (float[N,1] y) {'
        f'c = Concat<axis=1>(X, "X.request", "X.candidate") {HEAD} }}'
    )
    try:
        result = optimised(model, request=["X[0:3]"])
    except onnxrank.errors.ModelError as e:
        assert "X.request" in str(e)
        return
    names = [i.name for i in result.model.graph.input]
    assert len(set(names)) == len(names) == 4
    onnx.checker.check_model(result.model)
    session(result.model)


def test_metadata_survives() -> None:
    model = mlp(f"{TWO}(float[N,1] y) {{ c = Concat<axis=1>(user, item) {HEAD} }}")
    model.doc_string, model.producer_name, model.model_version, model.domain = "doc", "pytorch", 3, "com.example"
    model.graph.doc_string = "graph doc"
    entry = model.metadata_props.add()
    entry.key, entry.value = "owner", "ranking"
    note = model.graph.quantization_annotation.add()
    note.tensor_name = "y"
    for node in model.graph.node:
        node.doc_string, node.name = f"made by {node.op_type}", f"/m/{node.op_type}/{node.output[0]}"
        prop = node.metadata_props.add()
        prop.key, prop.value = "namespace", node.op_type
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    result = hold(model, ["user"], share=0.6)
    made = result.model
    for key in ("doc_string", "producer_name", "model_version", "domain"):
        assert getattr(made, key) == getattr(model, key)
    assert made.graph.doc_string == "graph doc" and made.graph.quantization_annotation[0].tensor_name == "y"
    props = {p.key: p.value for p in made.metadata_props}
    assert props["owner"] == "ranking" and set(props) == {"owner", "onnxrank.contract"}
    before = {n.name: n for n in model.graph.node}
    after = {n.name: n for n in made.graph.node}
    assert after["/m/Gemm/y"].SerializeToString() == before["/m/Gemm/y"].SerializeToString()
    relu = after["/m/Relu/r"]
    assert relu.doc_string == "made by Relu" and relu.metadata_props[0].value == "Relu"
    assert made.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


def test_a_product_of_constants_is_not_rounded() -> None:
    """Positions through a layer, added to two levels in another rank: made by the graph, as in the original."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N, 6, 16] user, float[N, 1, 8] item) => (float[N, 6, 1] y) {
            at = MatMul(P, Q)
            a = MatMul(user, U)
            b = MatMul(item, W)
            q = Add(b, at)
            s = Add(q, a)
            t = Tanh(s)
            y = MatMul(t, V)
        }"""
    )
    rng = np.random.default_rng(0)
    shapes = {"P": (6, 8), "Q": (8, 32), "U": (16, 32), "W": (8, 32), "V": (32, 1)}
    for name, shape in shapes.items():
        data = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(data, name))
    made = onnxrank.optimize(model, request=["user"], check="quick")
    assert made.changed and not made.report.retreats
