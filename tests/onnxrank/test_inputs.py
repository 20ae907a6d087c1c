"""Every form of input that exporters write: roles, opsets, constants, types, batch symbols, files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from modelkit import (
    GEMM,
    HEAD,
    HIDDEN,
    SIZES,
    agree,
    compare,
    dims,
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
    signature,
    w,
)
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxrank
from onnxrank.errors import ModelError, UsageError

# --- roles ---------------------------------------------------------------------------------------------------------


def packed() -> ModelProto:
    return mlp(f"(float[N,7] X) => (float[N,1] y) {{ c = Identity(X) {HEAD} }}")


def packed_columns() -> ModelProto:
    """deepctr-torch: every column cut out, float ids cast, some columns twice."""
    body = "".join(
        f"s{k} = Slice(X, f{k}, f{k + 1}, ax, st) i{k} = Cast<to=7>(s{k}) e{k} = Gather(T, i{k}) "
        f"t{k} = Slice(X, f{k}, f{k + 1}, ax, st) j{k} = Cast<to=7>(t{k}) l{k} = Gather(L, j{k}) "
        for k in range(4)
    )
    return mlp(
        f"(float[N,6] X) => (float[N,1] y) {{ {body} d = Slice(X, f4, f6, ax, st)"
        "ee = Concat<axis=2>(e0, e1, e2, e3) ef = Flatten<axis=1>(ee) c = Concat<axis=1>(ef, d)"
        "ll = Concat<axis=1>(l0, l1, l2, l3) lo = ReduceSum<keepdims=0>(ll, ax)"
        "h = Gemm(c, W, b) r = Relu(h) z = Gemm(r, V) y = Add(z, lo) }",
        width=18, T=w(6, 4), L=w(6, 1, seed=1), ax=i64(1), st=i64(1), **{f"f{k}": i64(k) for k in range(7)},
    )  # fmt: skip


def table_rows() -> ModelProto:
    """DLRM: one id per table and candidate, tables on axis 0, the batch on axis 1."""
    body = "".join(f"i{k} = Squeeze(p{k}, zero) e{k} = Gather(T{k}, i{k}) " for k in range(3))
    return mlp(
        f"(int64[3,N] ids) => (float[N,1] y) {{ p0, p1, p2 = Split<axis=0>(ids, ones) {body}"
        f"c = Concat<axis=1>(e0, e1, e2) {HEAD} }}",
        width=12, zero=i64(0), ones=i64(1, 1, 1), **{f"T{k}": w(5, 4, seed=k) for k in range(3)},
    )  # fmt: skip


def batch_of_candidates() -> ModelProto:
    """`[batch, candidates, d]`, the user expanded inside."""
    return graph(
        "(float[B,4] user, float[B,C,3] item) => (float[B,C,1] y) {"
        "u = Unsqueeze(user, one) s = Shape<start=0, end=2>(item) t = Concat<axis=0>(s, four) e = Expand(u, t)"
        "c = Concat<axis=-1>(e, item) m = MatMul(c, W) h = Add(b, m) r = Relu(h) y = MatMul(r, V) }",
        one=i64(1), four=i64(4), W=w(7, HIDDEN), b=w(HIDDEN), V=w(HIDDEN, 1),
    )  # fmt: skip


def record() -> ModelProto:
    """Long histories: `[5 * N]`, four history ids and then the target."""
    return mlp(
        "(int64[M] seq) => (float[N,1] y) { e = Gather(T, seq) s = Reshape(e, shape)"
        "h0 = Slice(s, zero, minus, one) p = ReduceMean<axes=[1], keepdims=0>(h0) t = Gather<axis=1>(s, last)"
        f"c = Concat<axis=1>(p, t) {HEAD} }}",
        width=8, T=w(9, 4), shape=i64(-1, 5, 4), zero=i64(0), minus=i64(-1), one=i64(1), last=np.array(-1),
    )  # fmt: skip


def positions() -> ModelProto:
    """`[N, 5, 4]`: history and target as positions of one input."""
    return graph(
        "(float[N,5,4] seq) => (float[N,1] y) { m = MatMul(seq, W) h = Add(b, m) r = Relu(h) s = MatMul(r, V)"
        "y = ReduceSum<keepdims=0>(s, one) }",
        W=w(4, HIDDEN), b=w(HIDDEN), V=w(HIDDEN, 1), one=i64(1),
    )  # fmt: skip


def own_shape() -> ModelProto:
    """The request is one row already, and expanded inside."""
    return mlp(
        "(float[1,4] user, float[N,3] item) => (float[N,1] y) { n = Shape<start=0, end=1>(item)"
        f"s = Concat<axis=0>(n, four) u = Expand(user, s) c = Concat<axis=1>(u, item) {HEAD} }}",
        four=i64(4),
    )


ROLES: dict[str, tuple[Any, dict[str, Any], int, float]] = {
    "named": (mlp, {"request": ["us*"]}, 5, 0.6),
    "packed": (packed, {"request": ["X[0:3,5]"]}, 5, 0.6),
    "packed columns": (packed_columns, {"request": ["X[0:3,4]"]}, 6, 0.4),
    "table rows": (table_rows, {"spec": {"inputs": {"ids": {"candidate_axis": 1, "request": "0,2"}}}}, 5, 0.5),
    "batch of candidates": (
        batch_of_candidates,
        {"spec": {"inputs": {"user": {"candidate_axis": None}, "item": {"candidate_axis": 1}}}},
        5,
        0.6,
    ),
    "record": (record, {"spec": {"inputs": {"seq": {"record": 5, "request": "0:4"}}}}, 9, 0.7),
    "positions": (positions, {"spec": {"inputs": {"seq": {"axis": 1, "request": "0:4"}}}}, 5, 0.3),
    "own shape": (own_shape, {}, 5, 0.6),
}


@pytest.mark.parametrize("interface", ["request", "same", "same, no guard"])
@pytest.mark.parametrize("name", ROLES)
def test_roles(name: str, interface: str) -> None:
    make, how, ids, share = ROLES[name]
    model = make()
    result = hold(
        model, **how, ids=ids, share=share, interface=interface.split(",")[0], guard=interface != "same, no guard"
    )
    if interface != "request":
        assert signature(result.model.graph.input) == signature(model.graph.input)


def test_request_interface_signature() -> None:
    def inputs(name: str) -> list[Any]:
        make, how, _, _ = ROLES[name]
        return [(v.name, dims(v)) for v in optimised(make(), **how).model.graph.input]

    assert inputs("named") == [("user", [1, 4]), ("item", ["N", 3])]
    assert inputs("packed") == [("X.request", [1, 4]), ("X.candidate", ["N", 3])]
    assert inputs("table rows") == [("ids.request", [2, 1]), ("ids.candidate", [1, "N"])]
    assert inputs("positions") == [("seq.request", [1, 4, 4]), ("seq.candidate", ["N", 1, 4])]
    assert inputs("own shape") == [("user", [1, 4]), ("item", ["N", 3])]
    ((_, kept), (_, rest)) = inputs("record")
    assert kept == [4] and isinstance(rest[0], str)


@pytest.mark.parametrize("name", [n for n in ROLES if n not in ("batch of candidates", "own shape")])
@pytest.mark.parametrize("interface", ["request", "same"])
def test_rows_that_differ(name: str, interface: str) -> None:
    """The old N rows fail loudly under `request`; under `same` every score is NaN, or row 0 counts without a guard."""
    make, how, ids, _ = ROLES[name]
    model = make()
    result = optimised(model, **how, interface=interface)
    roles, run = roles_of(result), session(result.model)
    feed = draw(model, roles, 3, 0, ids)
    if interface == "request":
        with pytest.raises(Exception, match=r"(?i)invalid|required inputs|unexpected|got"):
            run.run(None, feed)
        return
    wrong = {k: v.copy() for k, v in feed.items()}
    role = next(r for r in roles.inputs.values() if r.level != "candidate")
    data = wrong[role.name]
    rows = data.reshape(-1, role.record) if role.record else np.moveaxis(data, role.candidate_axis, 0)
    rows[(2, *[0] * (rows.ndim - 1))] = (rows[(0, *[0] * (rows.ndim - 1))] + 1) % 5
    (scores,) = run.run(None, wrong)
    assert scores.shape == (3, 1) and np.isnan(scores).all()
    free = optimised(model, **how, interface="same", guard=False)
    (scores,) = session(free.model).run(None, wrong)
    (expected,) = session(model).run(None, feed)
    agree(expected, scores, "row 0")


def test_infer() -> None:
    rng = np.random.default_rng(0)
    requests = np.repeat(np.arange(4), 3)
    data = rng.standard_normal((12, 7)).astype(np.float32)
    data[:, [0, 3]] = data[requests * 3][:, [0, 3]]
    result = hold(packed(), infer_from={"X": data, "request_id": requests}, share=0.8)
    assert roles_of(result).inputs["X"].request == (0, 3)
    assert any("0,3" in note for note in result.report.notes)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"request": ["usr"]}, UsageError, "'user'"),
        ({"request": ["user[0:9]"]}, UsageError, "outside"),
        ({"request": ["user", "user[0:2]"]}, UsageError, "contradictory"),
        ({"request": ["user"], "spec": {"inputs": {"user": "candidate"}}}, UsageError, "contradictory"),
        ({"request": ["user", "item"]}, UsageError, "Every input is request-level"),
        ({}, UsageError, "--request"),
        ({"spec": {"inputs": {"user": {"candidate_axis": 3}}}}, UsageError, "Candidate axis not found"),
        ({"spec": {"inputs": {"user": {"level": "request", "candidate_axis": 1}}}}, ModelError, "static batch"),
        ({"request": ["user"], "interface": "both"}, UsageError, "interface"),
        ({"request": ["user"], "candidates": (5, 2)}, UsageError, "candidates"),
        ({"request": ["user"], "select": ["nonsense"]}, UsageError, "no rule"),
    ],
)
def test_roles_that_cannot_be(how: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        onnxrank.optimize(mlp(), **how)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GEMM.replace("N", "16"), r"(?s)static batch.*dynamic_axes"),
        (GEMM.replace("float[N,4] user", "float[16,4] user"), "(?s)static batch|fixed size"),
        (GEMM.replace("float[N,4] user", "float user"), None),
        (GEMM.replace("float[N,3] item", "float[] item"), "dynamic rank"),
    ],
)
def test_models_that_cannot_be(text: str, says: str | None) -> None:
    if says is None:  # a scalar where a matrix belongs: not a model that runs
        with pytest.raises((ModelError, UsageError)):
            optimised(mlp(text), request=["user"])
        return
    with pytest.raises((ModelError, UsageError), match=says):
        optimised(mlp(text), request=["user"])


@pytest.mark.slow
def test_several_batch_axes_keep_their_symbols() -> None:
    """`[batch, candidates, d]`: users in one batch must not be mixed up."""
    make, how, _, _ = ROLES["batch of candidates"]
    model = make()
    result = optimised(model, **how)
    rng = np.random.default_rng(0)
    for users, n in ((1, 1), (1, 5), (3, 1), (3, 5)):
        feed = {"user": rng.standard_normal((users, 4)), "item": rng.standard_normal((users, n, 3))}
        feed = {k: v.astype(np.float32) for k, v in feed.items()}
        agree(session(model).run(None, feed)[0], session(result.model).run(None, feed)[0], f"{users} x {n}")


# --- opsets and IR versions ----------------------------------------------------------------------------------------


def exported(opset: int, ir: int) -> ModelProto:
    """Looks-ups, masked attention pooling, squeezes and a tower, in the form of one opset."""
    old = opset < 13

    def axes(op: str, x: str, axis: int, keep: str = "") -> str:
        flag = "keepdims=0" if keep else ""
        if old or (op == "ReduceMean" and opset < 18):
            return f"{op}<axes=[{axis}]{', ' + flag if flag else ''}>({x})"
        return f"{op}{'<' + flag + '>' if flag else ''}({x}, ax{axis})"

    softmax = "a = Softmax<axis=1>(sq)" if old else "a = Softmax(sq)"
    norm = "ln = LayerNormalization(h, g, gb)" if opset >= 17 else "ln = Identity(h)"
    body = f"""(int64[N,5] hist, float[N,4] user, int64[N,1] item) => (float[N,1] y) {{
        eh = Gather(T, hist) ei3 = Gather(T, item) ei = {axes("Squeeze", "ei3", 1)}
        m = Equal(hist, zero) k = Not(m) kf = Cast<to=1>(k)
        s = MatMul(eh, q) sq = {axes("Squeeze", "s", 2)} {softmax} am = Mul(a, kf)
        au = {axes("Unsqueeze", "am", 2)} wp = Mul(eh, au) pool = {axes("ReduceSum", "wp", 1, "drop")}
        mean = {axes("ReduceMean", "eh", 1, "drop")}
        c = Concat<axis=1>(user, ei, pool, mean) h = Gemm(c, W, b) {norm} r = Relu(ln) y = Gemm(r, V) }}"""
    return graph(
        body, opset=opset, ir=ir, T=w(5, 4), q=w(4, 1), W=w(16, HIDDEN), b=w(HIDDEN), V=w(HIDDEN, 1), g=w(8),
        gb=w(8, seed=2), zero=i64(0), ax1=i64(1), ax2=i64(2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("opset", "ir"), [(11, 6), (13, 7), (14, 7), (17, 8), (18, 8), (20, 9), (21, 10), (23, 11), (24, 12)]
)
def test_opsets(opset: int, ir: int) -> None:
    hold(exported(opset, ir), ["hist", "user"], share=0.4, rules=["fc", "broadcast"])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("opset", [11, 13])
def test_softmax_over_blocks(opset: int, axis: int) -> None:
    """Up to opset 12 Softmax flattens what follows the axis: two fields of one row then share a sum."""
    model = graph(
        f"(float[N,2,4] user, float[N,1,4] item) => (float[N,12] y) {{ c = Concat<axis=1>(user, item)"
        f"m = MatMul(c, W) s = Softmax<axis={axis}>(m) y = Reshape(s, shape) }}",
        opset=opset, ir=7, W=w(4, 4), shape=i64(-1, 12),
    )  # fmt: skip
    hold(model, ["user"], share=0.5)


def test_initializers_as_inputs_of_ir_3() -> None:
    """Old exporters list every weight as an input; below IR 4 these are constants."""
    model = mlp(ir=3, opset=11)
    for t in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
    result = hold(model, ["user"], share=0.6)
    listed = {i.name for i in result.model.graph.input}
    assert {t.name for t in result.model.graph.initializer} <= listed, "IR 3 wants every initializer listed"


def test_weights_that_callers_may_replace() -> None:
    """From IR 4 on an initializer that is an input is a default: it stays one, and replacing it still works."""
    model = mlp()
    for t in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(t.name, t.data_type, t.dims))
    result = optimised(model, request=["user"])
    roles = roles_of(result)
    compare(model, result)
    assert {i.name for i in result.model.graph.input} >= {"W", "b", "V"}
    feed = draw(model, roles, 3, 0)
    mine = divide(feed, roles) if result.changed else feed
    for other in ({"W": w(7, HIDDEN, seed=9)}, {"b": w(HIDDEN, seed=9), "V": w(HIDDEN, 1, seed=9)}):
        a = session(model, False).run(None, feed | other)[0]
        agree(a, session(result.model, False).run(None, mine | other)[0], str(list(other)))


# --- constants and functions ---------------------------------------------------------------------------------------


def test_model_local_functions() -> None:
    text = """<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
    g (float[N,4] user, float[N,3] item) => (float[N,1] y) {
        c = Concat<axis=1>(user, item) h = local.Tower<bias: float = 0.5>(c, W) y = local.Head(h, V) }
    <domain: "local", opset_import: ["" : 18]>
    Tower<bias: float = 0.0>(x, weight) => (out) {
        k = Constant<value_float: float = @bias>() m = MatMul(x, weight) s = Add(m, k) out = Relu(s) }
    <domain: "local", opset_import: ["" : 18]>
    Head(x, weight) => (out) { out = MatMul(x, weight) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in {"W": w(7, HIDDEN), "V": w(8, 1)}.items())
    onnx.checker.check_model(model)
    result = optimised(model, request=["user"])
    compare(model, result)
    assert "fc" in fired(result) and result.report.macs_after < 0.6 * result.report.macs_before


CONSTANTS = {
    "Identity": "W2 = Identity(W) W3 = Identity(W2)",
    "no-op Cast": "W2 = Cast<to=1>(W) W3 = Identity(W2)",
    "Transpose": "W3 = Transpose<perm=[1, 0]>(WT)",
    "Transpose of an alias": "W2 = Identity(WT) W3 = Transpose(W2)",
    "Gather": "W2 = Gather<axis=0>(WW, k) W3 = Identity(W2)",
    "Unsqueeze and Squeeze": "W2 = Unsqueeze(W, k1) W3 = Squeeze(W2, k1)",
    "half in storage": "W3 = Cast<to=1>(WH)",
    "double in storage": "W3 = Cast<to=1>(WD)",
    "Mul": "W3 = Mul(W, WM)",
    "Concat": "p, q = Split<axis=0>(W, sp) W3 = Concat<axis=0>(p, q)",
    "Reshape": "W3 = Reshape(WF, sh)",
    "Tile": "W3 = Tile(WC, rep)",
}


@pytest.mark.parametrize("form", CONSTANTS)
@pytest.mark.parametrize("product", ["Gemm(c, W3, b)", "MatMul(c, W3)"])
def test_weights_behind(form: str, product: str) -> None:
    base = w(7, HIDDEN)
    weights = {
        "W": base, "WT": np.ascontiguousarray(base.T), "WW": np.stack([base, -base]), "k": np.array(1), "k1": i64(0),
        "WH": base.astype(np.float16), "WD": base.astype(np.float64), "WM": w(1, 8), "sp": i64(3, 4),
        "WF": base.reshape(-1), "sh": i64(7, 8), "WC": base[:, :1], "rep": i64(1, 8),
    }  # fmt: skip
    read = {k: v for k, v in weights.items() if re.search(rf"\b{k}\b", CONSTANTS[form])}
    model = graph(
        f"(float[N,4] user, float[N,3] item) => (float[N,1] y) {{ {CONSTANTS[form]} c = Concat<axis=1>(user, item)"
        f"h = {product} r = Relu(h) y = Gemm(r, V) }}",
        opset=18, **read, b=w(HIDDEN), V=w(HIDDEN, 1),
    )  # fmt: skip
    hold(model, ["user"], share=0.6)


def test_constant_nodes() -> None:
    """TorchScript: Constant nodes for everything, no-op Casts and Concats, Flatten of matrices."""
    model = mlp(
        "(float[N,4] user, int64[N,3] ids) => (float[N,1] y) {"
        "a = Constant<value_ints = [0]>() z = Constant<value_ints = [2]>() ax = Constant<value = int64[1] {1}>()"
        "st = Constant<value_ints = [1]>() i = Cast<to=7>(ids) i2 = Cast<to=7>(i) f = Slice(i2, a, z, ax, st)"
        "l = Constant<value_int = -1>() last = Gather<axis=1>(i2, l)"
        "e = Gather(T, f) ef = Flatten<axis=1>(e) t = Gather(T, last) u = Concat<axis=1>(user) u2 = Flatten(u)"
        f"k = Constant<value_float = 0.5>() u3 = Mul(u2, k) c = Concat<axis=1>(u3, ef, t) {HEAD} }}",
        width=16, T=w(5, 4),
    )  # fmt: skip
    hold(model, ["user", "ids[0:2]"], share=0.5, ids=5)


def test_bias_is_added_once() -> None:
    """Biases on either side, scaled Gemms and bias-free ones on one Concat; small integers make it exact."""

    def ints(*shape: int) -> np.ndarray:
        return np.random.default_rng(shape).integers(-3, 4, shape).astype(np.float32)

    model = graph(
        "(float[N,4] user, float[N,3] item) => (float[N,8] a, float[N,8] z, float[N,8] d, float[N,8] e) {"
        "c = Concat<axis=1>(user, item) m = MatMul(c, W) a = Add(b, m) z = Gemm<alpha=2.0, beta=4.0>(c, W, b)"
        "d = Gemm<transB=1>(c, WT) f = Gemm<transB=1>(c, WT, row) e = Add(f, col) }",
        W=ints(7, 8), b=ints(8), WT=ints(8, 7), row=ints(1, 8), col=ints(8),
    )  # fmt: skip
    result = hold(model, ["user"], share=0.6)
    feed = {k: np.round(v * 4) for k, v in draw(model, roles_of(result), 5, 0).items()}
    mine = divide(feed, roles_of(result))
    for x, y in zip(session(model).run(None, feed), session(result.model).run(None, mine), strict=True):
        assert np.array_equal(x, y)


# --- tf2onnx -------------------------------------------------------------------------------------------------------


def test_tf2onnx() -> None:
    """A batch symbol per input, Tensordot, Split and Squeeze, int32 ids, NHWC transposes, an invented output symbol."""
    model = graph(
        """(int32[unk__1,1] user_id, int32[unk__2,6] hist, float[unk__3,2] user_dense, int32[unk__4,1] item_id)
           => (float[unk__9,1] scores) {
        u3 = Gather(T, user_id) i3 = Gather(T, item_id) h3 = Gather(T, hist)
        p0, p1 = Split<axis=1>(user_dense, halves) d0 = Squeeze(p0, one) d1 = Unsqueeze(d0, one)
        hn = Unsqueeze(h3, one) ht = Transpose<perm=[0, 3, 1, 2]>(hn) hp = AveragePool<kernel_shape=[1, 6]>(ht)
        hb = Transpose<perm=[0, 2, 3, 1]>(hp) hs = Squeeze(hb, one)
        c3 = Concat<axis=-1>(u3, hs, i3)
        sh = Shape(c3) shi = Cast<to=6>(sh) n = Gather(shi, first) n2 = Concat<axis=0>(n, units) n3 = Cast<to=7>(n2)
        flat = Reshape(c3, tof) m = MatMul(flat, W) r3 = Reshape(m, n3) ab = Add(r3, b) act = Relu(ab)
        fl = Reshape(act, back) c = Concat<axis=-1>(fl, d1) z = MatMul(c, V) scores = Sigmoid(z) }""",
        T=w(5, 4), halves=i64(1, 1), one=i64(1), first=i64(0, 1), units=np.array([8], np.int32), tof=i64(-1, 12),
        back=i64(-1, 8), W=w(12, HIDDEN), b=w(HIDDEN), V=w(9, 1),
    )  # fmt: skip
    hold(model, ["user*", "hist"], share=0.5, ids=5)


@pytest.mark.parametrize("name", ["batch*2", "N + 1", "s77 // 2", "unk__12", "65*batch", "", "batch size", "3N"])
def test_batch_symbols(name: str) -> None:
    """Dim names say nothing, and unnamed ones are the same."""
    model = mlp()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        if name:
            value.type.tensor_type.shape.dim[0].dim_param = name
    hold(model, ["user"], share=0.6)


def test_batch_of_minus_one() -> None:
    model = mlp()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    result = optimised(model, request=["user"])
    assert "fc" in fired(result)
    rng = np.random.default_rng(0)
    user, item = rng.standard_normal((1, 4), np.float32), rng.standard_normal((6, 3), np.float32)
    named = mlp()
    (expected,) = session(named).run(None, {"user": np.repeat(user, 6, 0), "item": item})
    agree(expected, session(result.model).run(None, {"user": user, "item": item})[0], "y")


@pytest.mark.parametrize("shared", [True, False])
def test_sequence_length_as_a_symbol(shared: bool) -> None:
    """Library exporters leave the history's length open; two histories may share the symbol or not."""
    second = "L" if shared else "M"
    model = graph(
        f"(int64[N,L] hist, int64[N,{second}] cats, float[N,4] item) => (float[N,1] y) {{"
        "e = Gather(T, hist) f = Gather(T, cats) m = MatMul(e, Q) t = Tanh(m) p = ReduceMean<axes=[1], keepdims=0>(t)"
        "q = ReduceSum<keepdims=0>(f, one) c = Concat<axis=1>(p, q, item) h = Gemm(c, W, b) r = Relu(h)"
        "y = Gemm(r, V) }",
        T=w(5, 4), Q=w(4, 4), one=i64(1), W=w(12, HIDDEN), b=w(HIDDEN), V=w(HIDDEN, 1),
    )  # fmt: skip
    result = hold(model, ["hist", "cats"], share=0.5, rules=["fc", "broadcast"])
    assert [dims(v) for v in result.model.graph.input] == [[1, "L"], [1, second], ["N", 4]]


def test_target_attention_over_an_open_length() -> None:
    """The candidate is expanded along a length read from the request's ids."""
    model = graph(
        "(int64[N,L] hist, int64[N] item) => (float[N,1] y) { k = Gather(T, hist) t = Gather(T, item)"
        "t3 = Unsqueeze(t, one) s = Shape(k) q = Expand(t3, s) d = Sub(q, k) p = Mul(q, k)"
        "c = Concat<axis=2>(q, k, d, p) m = MatMul(c, W) a = Add(b, m) r = Sigmoid(a) v = MatMul(r, V)"
        "x = Mul(v, k) o = ReduceSum<keepdims=0>(x, one) y = Gemm(o, U) }",
        T=w(6, 4), one=i64(1), W=w(16, HIDDEN), b=w(HIDDEN), V=w(HIDDEN, 1), U=w(4, 1),
    )  # fmt: skip
    hold(model, ["hist"], rules=["fc"], share=0.9, ids=6)


# --- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["int32", "int64", "uint8", "float", "double", "float16"])
def test_types_of_ids(ids: str) -> None:
    cast = "" if ids in ("int32", "int64") else "<to=7>"
    how = f"ui = Cast{cast}(user) ii = Cast{cast}(item)" if cast else "ui = Identity(user) ii = Identity(item)"
    model = mlp(
        f"({ids}[N,2] user, {ids}[N] item) => (float[N,1] y) {{ {how} u = Gather(T, ui) u2 = Flatten(u)"
        f"t = Gather(T, ii) c = Concat<axis=1>(u2, t) {HEAD} }}",
        width=12, T=w(5, 4),
    )  # fmt: skip
    hold(model, ["user"], share=0.5)


def test_bool_and_string_inputs() -> None:
    model = mlp(
        "(bool[N,4] flags, string[N] country, float[N,3] item) => (float[N,1] y) {"
        'f = Cast<to=1>(flags) k = ai.onnx.ml.LabelEncoder<keys_strings = ["a", "b"], values_int64s = [1, 2],'
        f"default_int64 = 0>(country) e = Gather(T, k) c = Concat<axis=1>(f, e, item) {HEAD} }}",
        width=11,
        domains={"ai.onnx.ml": 2},
        T=w(3, 4),
    )
    hold(model, ["flags", "country"], rules=["fc"], share=0.8)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_float_types(dtype: Any) -> None:
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    model = mlp(GEMM.replace("float", kind), **{k: w(*s, dtype=dtype) for k, s in
                                                  {"W": (7, 8), "b": (8,), "V": (8, 1)}.items()})  # fmt: skip
    result = hold(model, ["user"], share=0.6)
    stored = {t.data_type for t in result.model.graph.initializer}
    assert stored <= {helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), TensorProto.INT64}


def test_bfloat16() -> None:
    """onnxruntime has few bfloat16 kernels on a CPU: both models are compared behind casts to float32."""
    import ml_dtypes

    def bf(*shape: int) -> np.ndarray:
        return w(*shape).astype(ml_dtypes.bfloat16)

    model = mlp(GEMM.replace("float", "bfloat16"), opset=18, W=bf(7, 8), b=bf(8), V=bf(8, 1))
    result = optimised(model, request=["user"])
    assert "fc" in fired(result) and result.report.macs_after < 0.6 * result.report.macs_before
    assert all(c.passed for c in result.report.checks) and result.report.checks
    assert {t.data_type for t in result.model.graph.initializer} == {TensorProto.BFLOAT16}
    from onnxrank.runtime import retype

    wide = retype(model, TensorProto.FLOAT)
    rewritten = retype(result.model, TensorProto.FLOAT)
    feed = draw(wide, roles_of(result), 5, 0)
    (a,) = session(wide).run(None, feed)
    (b,) = session(rewritten).run(None, divide(feed, roles_of(result)))
    agree(a, b, "y", 2e-2)


QDQ = "{0}q = QuantizeLinear({0}, s, z) {0}d = DequantizeLinear({0}q, s, z) "


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_qdq(per_channel: bool, axis: int) -> None:
    """Activations quantised per tensor, weights stored as int8; the axis is the one of the per-channel scales."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.01, 0.02, (7, 8)[axis]).astype(np.float32) if per_channel else one(0.015)
    zeros = np.zeros(scales.shape, np.int8)
    model = mlp(
        "(float[N,4] user, float[N,3] item) => (float[N,1] y) {"
        f"{QDQ.format('user')}{QDQ.format('item')} c = Concat<axis=1>(userd, itemd) {QDQ.format('c')}"
        f"wd = DequantizeLinear<axis={axis}>(W8, ws, wz) h = Gemm(cd, wd, b) r = Relu(h) {QDQ.format('r')}"
        "y = Gemm(rd, V) }",
        s=one(0.03), z=np.array(3, np.int8), W8=rng.integers(-100, 100, (7, 8)).astype(np.int8), ws=scales, wz=zeros,
    )  # fmt: skip
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "W"))
    hold(model, ["user"], share=0.6, runtime_optimises=False)


# --- files ---------------------------------------------------------------------------------------------------------


def test_external_data(tmp_path: Path) -> None:
    """Weights in a side file, the divided layer and a table among them."""
    model = mlp(
        f"(int64[N] user, float[N,3] item) => (float[N,1] y)"
        f" {{ e = Gather(T, user) c = Concat<axis=1>(e, item) {HEAD} }}",
        width=67, W=w(67, 32), b=w(32), V=w(32, 1), T=w(50, 64),
    )  # fmt: skip
    source = tmp_path / "in.onnx"
    onnx.save(model, source, save_as_external_data=True, location="in.data", size_threshold=256)
    result = optimised(source, request=["user"])
    assert "fc" in fired(result) and all(c.passed for c in result.report.checks)
    assert result.report.macs_after < 0.1 * result.report.macs_before
    out = tmp_path / "out.onnx"
    result.save(out)
    kept = next(t for t in onnx.load(out, load_external_data=False).graph.initializer if t.name == "T")
    assert kept.data_location == TensorProto.EXTERNAL
    for n in SIZES:
        feed = draw(model, roles_of(result), n, n, ids=50)
        (a,) = session(source).run(None, feed)
        agree(a, session(out).run(None, divide(feed, roles_of(result)))[0], f"N = {n}")


def test_nothing_to_do(tmp_path: Path) -> None:
    """Where no rule applies, the output is the input's own bytes."""
    model = graph("(float[1,4] bias, float[N,4] item) => (float[N,4] y) { y = Add(item, bias) }")
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(model.SerializeToString())
    result = optimised(source)
    assert not result.changed and not result.report.rules
    result.save(out)
    assert out.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ROLES)
def test_twice_is_once(name: str) -> None:
    """Optimising again changes nothing, and the same input gives the same bytes."""
    make, how, _, _ = ROLES[name]
    first, again = (optimised(make(), **how) for _ in range(2))
    assert first.model.SerializeToString(deterministic=True) == again.model.SerializeToString(deterministic=True)
    if name != "batch of candidates":
        second = optimised(first.model)
        assert not second.changed, [(r.name, r.nodes) for r in second.report.rules]
