"""Ranges of inputs, found by following their entries to the tables that they look up."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import INT64, Graph, whole_numbers
from modelkit import HEAD, i64, mlp, w

from onnxrank import feeds, model
from onnxrank.roles import resolve
from onnxrank.study import Study


def ranges(proto: onnx.ModelProto, name: str) -> tuple[float, float]:
    loaded = model.load(proto)
    study = Study(proto, resolve(feeds.describe(proto), request=["user"]), loaded)
    assert study.maker.ranges is not None
    low, high, whole = study.maker.ranges[name]
    assert whole.all() and (low == low.flat[0]).all() and (high == high.flat[0]).all()
    return float(low.flat[0]), float(high.flat[0])


def test_ids_that_only_a_loop_looks_up() -> None:
    """EmbeddingBag, as exporters write it, slices the ids of a row inside a Loop."""
    made = mlp(
        "(int64[N,3] user, float[N,4] item) => (float[N,1] y) { s = Shape(user) n = Gather(s, k0) ok = Identity(yes)"
        "flat = Reshape(user, all) bags = Loop(n, ok) <body = b (int64 i, bool cond) => (bool cond_out, float[4] bag) {"
        "j = Mul(i, three) a = Unsqueeze(j, ax0) z = Add(a, three) ids = Slice(flat, a, z, ax0) e = Gather(T, ids)"
        "bag = ReduceSum<keepdims=0>(e, ax0) cond_out = Identity(cond) }>"
        f"c = Concat<axis=1>(bags, item) {HEAD} }}",
        width=8, T=w(3, 4), k0=np.array(0), ax0=i64(0), yes=np.array(True), all=i64(-1), three=np.array(3),
    )  # fmt: skip
    assert ranges(made, "user") == (0, 3)


def test_tables_inside_nested_bodies() -> None:
    made = mlp(
        "(int64[N,3] user, float[N,4] item) => (float[N,1] y) { q = Greater(threshold, zero) e = If(q) <"
        "then_branch = t () => (float[N,3,4] a) { p = Cast<to=7>(user) a = If(q) <"
        "then_branch = tt () => (float[N,3,4] b) { b = Gather(T, p) },"
        "else_branch = te () => (float[N,3,4] d) { d = Gather(S, user) }> },"
        "else_branch = f () => (float[N,3,4] g) { g = Gather(S, user) }> u = ReduceSum<keepdims=0>(e, ax1)"
        f"c = Concat<axis=1>(u, item) {HEAD} }}",
        width=8, T=w(5, 4), S=w(7, 4), threshold=np.float32(1), zero=np.float32(0), ax1=i64(1),
    )  # fmt: skip
    assert ranges(made, "user") == (0, 5)


@pytest.mark.parametrize("doubled", [False, True])
def test_ids_behind_a_long_chain(doubled: bool) -> None:
    """Ids that go through thousands of steps, each of one operand or of two that are the same, to their table."""
    g = Graph()
    user, item = g.input("user", ["N"], INT64), g.input("item", ["N"], INT64)
    ids = user
    for _ in range(60 if doubled else 3000):
        ids = g.op("Max", ids, ids) if doubled else g.op("Add", ids, g.const(0, np.int64))
    table = g.const(whole_numbers(7, 2))
    g.output(g.op("Add", g.op("Gather", table, ids, axis=0), g.op("Gather", table, item, axis=0)), ["N", 2])
    assert ranges(g.model(), "user") == (0, 7)
