"""`dot`: products of two computed operands by blocks of levels."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import (
    BOOL,
    INT64,
    Given,
    Graph,
    candidate,
    exposed,
    feeds,
    operators,
    optimised,
    patterns,
    refusals,
    request,
    rewritten,
    rows,
    rules,
    run,
    whole_numbers,
)
from onnx import helper

import onnxrank
from onnxrank.graphs import attribute
from onnxrank.passes import preparation

N = 512


def fields(users: int, items: int, d: int, shuffled: int | None = None) -> tuple[Graph, list[Given], str]:
    """All fields [N, F, d], in the order of a seed."""
    given = [request("u", users, d), candidate("c", items, d)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    if shuffled is not None:
        order = np.random.default_rng(shuffled).permutation(users + items)
        x = g.op("Gather", x, g.ints(*order), axis=1)
    return g, given, x


def gram(g: Graph, x: str) -> str:
    return g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))


def flat(g: Graph, z: str, count: int) -> tuple[str, int]:
    """The lower triangle, by positions on the flattened axis."""
    i, j = np.tril_indices(count, -1)
    return g.op("Gather", g.op("Reshape", z, g.ints(-1, count**2)), g.ints(*(i * count + j)), axis=1), len(i)


def by_pairs(g: Graph, z: str, count: int) -> tuple[str, int]:
    """The lower triangle, as `z[:, i, j]` is exported."""
    i, j = np.tril_indices(count, -1)
    picked = g.op("GatherND", g.op("Transpose", z, perm=[1, 2, 0]), g.const(np.stack([i, j], 1), np.int64))
    return g.op("Transpose", picked, perm=[1, 0]), len(i)


def by_mask(g: Graph, z: str, count: int) -> tuple[str, int]:
    """The lower triangle, where a mask of the product's own shape is true."""
    square = g.op("Slice", g.op("Shape", z), g.ints(1), g.ints(3))
    ones = g.op("ConstantOfShape", square, value=helper.make_tensor("value", INT64, [1], [1]))
    mask = g.op("Cast", g.op("Trilu", ones, g.const(-1, np.int64), upper=0), to=BOOL)
    at = g.op("Transpose", g.op("NonZero", mask), perm=[1, 0])
    return g.op("Transpose", g.op("GatherND", g.op("Transpose", z, perm=[1, 2, 0]), at), perm=[1, 0]), count * (
        count - 1
    ) // 2


def everything(g: Graph, z: str, count: int) -> tuple[str, int]:
    return g.op("Flatten", z), count**2


def layer(g: Graph, x: str, rows: int, width: int, seed: int = 0) -> str:
    y = g.op("Gemm", x, g.const(whole_numbers(rows, width, seed=seed)), g.const(whole_numbers(width, seed=seed + 1)))
    return g.op("Relu", y)


def made_by(result: onnxrank.Result, given: list[Given], kind: str) -> list[int]:
    """Largest extent of all that an operator gives, at 50 candidates."""
    extents = rows(result, given, 50)
    return [extents[n.output[0]] for n in result.model.graph.node if n.op_type == kind]


# --- dot interaction -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [None, 1])
@pytest.mark.parametrize("pick", [flat, by_pairs, by_mask, everything])
def test_interaction(pick: object, shuffled: int | None) -> None:
    """Every block is multiplied once and at its own level; the triangle goes into the weights."""
    users, items, d, width = 6, 3, 4, 5
    g, given, x = fields(users, items, d, shuffled)
    picked, pairs = pick(g, gram(g, x), users + items)  # type: ignore[operator]
    g.output(layer(g, picked, pairs, width), ["N", width])
    result = optimised(g, given)
    assert rules(result) == {"dot": 1, "fc": 1}
    assert refusals(result) == ""
    before, after = result.report.before, result.report.after
    assert sum(c.macs for c in before.values()) == N * ((users + items) ** 2 * d + pairs * width)
    once = users * (users - 1) // 2 if pick is not everything else users**2
    each = items * users + (items * (items - 1) // 2 if pick is not everything else items**2)
    assert after["request"].macs == users**2 * d + once * width
    assert after["candidate"].macs == N * (items * (users + items) * d + each * width)
    assert "Expand" not in operators(result.model)


def test_candidates_are_rows_of_one_matrix() -> None:
    """`C U'` is a product of [N * items, d] with [d, users]; no operand of the request has rows of candidates."""
    g, given, x = fields(7, 2, 4)
    picked, pairs = flat(g, gram(g, x), 9)
    g.output(layer(g, picked, pairs, 3), ["N", 3])
    result = optimised(g, given)
    extents = rows(result, given, 50)
    made = {o: n for n in result.model.graph.node for o in n.output}
    products = [n for n in result.model.graph.node if n.op_type == "MatMul"]
    assert sorted(extents[n.output[0]] for n in products) == [7, 50, 100]
    (joined,) = (n for n in products if extents[n.output[0]] == 100)
    assert extents[joined.input[0]] == 100
    assert joined.input[1] not in made or extents[joined.input[1]] <= 7
    assert len(products) == 3  # the symmetric block is not made twice


@pytest.mark.parametrize(("heads", "size", "cut"), [(4, 8, True), (20, 4, True), (2, 48, False), (16, 2, False)])
def test_heads_of_the_candidate(heads: int, size: int, cut: bool) -> None:
    """Narrow heads are cut apart and joined again where that is faster than a Transpose; there may be no rows."""
    given = [request("k", heads, size, 3), request("u", 5), candidate("c", 3)]
    g = Graph()
    k, u, c = (i.declare(g) for i in given)
    q = g.op("MatMul", g.op("Concat", u, c, axis=1), g.const(whole_numbers(8, heads * size)))
    q = g.op("Transpose", g.op("Reshape", q, g.ints(-1, 1, heads, size)), perm=[0, 2, 1, 3])
    y = g.op("MatMul", g.op("Relu", g.op("MatMul", q, k)), g.op("Transpose", k, perm=[0, 1, 3, 2]))
    y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.ints(-1, heads * size))
    g.output(g.op("MatMul", y, g.const(whole_numbers(heads * size, 2, seed=1))), ["N", 2])
    result = optimised(g, given, counts=(0, 1, 2, 5))
    assert (50 in made_by(result, given, "Split")) == cut
    assert (50 in made_by(result, given, "Transpose")) != cut


@pytest.mark.parametrize("items", [1, 4, 5, 6])
def test_rows_per_candidate(items: int) -> None:
    """Few rows per candidate are brought side by side for one product; more are products of their own, one is none."""
    g, given, x = fields(3, items, 4)
    g.output(g.op("MatMul", g.op("Flatten", gram(g, x)), g.const(whole_numbers((3 + items) ** 2, 2))), ["N", 2])
    result = optimised(g, given)
    assert rules(result)["dot"] == 1
    dot = 9 * 4 + N * items * (3 + (items if items > 1 else 0)) * 4
    assert result.report.after["candidate"].macs + result.report.after["request"].macs - dot == (
        9 * 2 + N * items * (3 + items) * 2
    )


def test_beside_a_dense_part() -> None:
    """The usual DLRM: one more field from a request-level MLP, which also goes into the top layer by itself."""
    given = [request("dense", 5), request("u", 4, 3), candidate("c", 2, 3)]
    g = Graph()
    dense, u, c = (i.declare(g) for i in given)
    x = layer(g, dense, 5, 3)
    t = g.op("Concat", g.on_axes("Unsqueeze", x, [1]), u, c, axis=1)
    picked, pairs = flat(g, gram(g, t), 7)
    y = layer(g, g.op("Concat", x, picked, axis=1), 3 + pairs, 4, seed=5)
    g.output(g.op("MatMul", y, g.const(whole_numbers(4, 1))), ["N", 1])
    result = optimised(g, given, ignore=["pack"])
    assert {"dot", "fc", "broadcast"} <= set(rules(result))
    assert result.report.after["request"].macs == 5 * 3 + 25 * 3 + (3 + 10) * 4
    assert result.report.after["candidate"].macs == N * (2 * 7 * 3 + (10 + 1) * 4 + 4)


@pytest.mark.parametrize("turned", [False, True])
def test_two_operands(turned: bool) -> None:
    """`A B'` of two different operands, each with rows of both levels: no block mirrors another."""
    given = [request("u", 3, 2), request("v", 4, 2), candidate("c", 2, 2), candidate("e", 5, 2)]
    g = Graph()
    u, v, c, e = (i.declare(g) for i in given)
    a, b = g.op("Concat", c, u, axis=1), g.op("Concat", v, e, axis=1)
    if turned:
        a, b = b, a
    z = g.op("MatMul", a, g.op("Transpose", b, perm=[0, 2, 1]))
    g.output(g.op("MatMul", g.op("Flatten", z), g.const(whole_numbers(45, 3))), ["N", 3])
    result = optimised(g, given)
    assert rules(result)["dot"] == 1
    assert result.report.after["request"].macs == 3 * 4 * 2 + 12 * 3
    assert result.report.after["candidate"].macs == N * ((45 - 12) * 2 + (45 - 12) * 3)


@pytest.mark.parametrize("seed", range(12))
def test_any_layout(seed: int) -> None:
    """Random numbers of fields, widths, orders and choices of pairs; some fields occur twice."""
    rng = np.random.default_rng(seed)
    users, items, d, width = (int(k) for k in rng.integers(1, 6, 4))
    given = [request("u", users, d), candidate("c", items, d)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    order = rng.integers(0, users + items, users + items + int(rng.integers(0, 3)))
    order[:2] = 0, users  # one of each level at least
    x = g.op("Gather", x, g.ints(*rng.permutation(order)), axis=1)
    count = len(order)
    pairs = rng.permutation(count**2)[: int(rng.integers(1, count**2 + 1))]
    picked = g.op("Gather", g.op("Reshape", gram(g, x), g.ints(-1, count**2)), g.ints(*pairs), axis=1)
    g.output(layer(g, picked, len(pairs), width, seed), ["N", width])
    # Vectors of one entry have no dot product: their products are folded.
    assert rules(optimised(g, given)).get("fold" if d == 1 else "dot", 0) <= 1


def test_rows_summed() -> None:
    """A reduction is linear too: `sum_j x_i . x_j`."""
    g, given, x = fields(4, 3, 2)
    y = g.on_axes("ReduceSum", gram(g, x), [2], keepdims=0)
    g.output(g.op("MatMul", y, g.const(whole_numbers(7, 2))), ["N", 2])
    result = optimised(g, given, counts=(1, 2, 5))  # onnxruntime gives wrong shapes for reductions of no rows
    assert rules(result)["dot"] == 1


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["Softmax", "Relu"])
def test_blocks_kept_apart(reader: str) -> None:
    """Elementwise steps, and a softmax over keys of both levels, work block by block."""
    users, items = (30, 6) if reader == "Softmax" else (4, 3)
    g, given, x = fields(users, items, 8)
    y = g.op(reader, gram(g, x), **({"axis": -1} if reader == "Softmax" else {}))
    pairs = (users + items) ** 2
    g.output(g.op("MatMul", g.op("Flatten", y), g.const(whole_numbers(pairs, 2))), ["N", 2])
    result = optimised(g, given, tolerance=1e-6)
    assert rules(result)["attention" if reader == "Softmax" else "dot"] >= 1


@pytest.mark.parametrize("reader", ["output", "both", "output too"])
def test_blocks_needed_side_by_side(reader: str) -> None:
    """What needs the blocks joined again leaves the product whole."""
    g, given, x = fields(4, 3, 2)
    z = gram(g, x)
    if reader == "output":
        g.output(z, ["N", 7, 7])
    else:
        g.output(g.op("MatMul", g.op("Flatten", z), g.const(whole_numbers(49, 2))), ["N", 2])
        if reader == "both":
            g.output(g.op("Tanh", z), ["N", 7, 7])
        elif reader == "output too":
            g.output(z, ["N", 7, 7])
    result = optimised(g, given, tolerance=1e-6)
    assert "dot MatMul: what reads the product needs its blocks side by side again" in refusals(result)
    assert "dot" not in rules(result)


def test_inner_axis_of_both_levels() -> None:
    """The sum over the inner axis is one sum for each level."""
    given = [request("u", 3, 4), candidate("c", 3, 2)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=2)
    g.output(g.op("MatMul", g.op("Flatten", gram(g, x)), g.const(whole_numbers(9, 2))), ["N", 2])
    result = optimised(g, given)
    assert rules(result)["dot"] == 1
    assert result.report.after["request"].macs == 3 * 3 * 4
    assert result.report.after["candidate"].macs == N * (3 * 3 * 2 + 9 * 2)


def test_stack_of_both_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the level follows a stacked axis there is a product for each level, whether or not taken apart before."""
    given = [request("u", 1, 3, 2), candidate("c", 2, 3, 2)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    z = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 1, 3, 2]))
    g.output(g.op("MatMul", g.op("Flatten", z), g.const(whole_numbers(27, 2))), ["N", 2])
    result = optimised(g, given)
    assert result.report.after["request"].macs == 3 * 3 * 2 + 9 * 2
    monkeypatch.setattr(preparation, "MUCH", float("inf"))
    result = optimised(g, given)
    assert rules(result)["dot"] == 1
    assert result.report.after["request"].macs == 3 * 3 * 2 + 9 * 2


@pytest.mark.parametrize("order", ["", "02413", "40312"])
@pytest.mark.parametrize("outer", ["Relu", "Softmax", "MatMul"])
def test_stack_with_weights_of_the_request(order: str, outer: str) -> None:
    """Tokens of both levels, each times a matrix that the request makes for it: those of the request's once."""
    given = [request("u", 3, 1, 4), candidate("c", 2, 1, 4), request("w", 5, 4, 2)]
    g = Graph()
    u, c, w = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1)
    if order:
        x = g.op("Gather", x, g.ints(*map(int, order)), axis=1)
    y = g.op("MatMul", x, w)
    y = g.op("MatMul", g.op("Flatten", y), g.const(whole_numbers(10, 3))) if outer == "MatMul" else g.op(outer, y)
    g.output(y, ["N", 3] if outer == "MatMul" else ["N", 5, 1, 2])
    result = optimised(g, given, tolerance=1e-6 if outer == "Softmax" else 0)
    assert {"attention", "dot"} & set(rules(result))
    assert result.report.after["request"].macs == 3 * 4 * 2 + (3 * 2 * 3 if outer == "MatMul" else 0)
    assert result.report.after["candidate"].macs == N * (2 * 4 * 2 + (2 * 2 * 3 if outer == "MatMul" else 0))


def test_stack_of_many_levels() -> None:
    """Where levels follow no axes of the stack the product is left alone."""
    given = [request("u", 144, 2, 2), candidate("c", 144, 2, 2)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    rng = np.random.default_rng(0)
    order = np.where(rng.integers(0, 2, 144) > 0, np.arange(144), np.arange(144) + 144)
    x = g.op("Gather", g.op("Concat", u, c, axis=1), g.ints(*order), axis=1)
    x = g.op("Reshape", x, g.ints(-1, 12, 12, 2, 2))
    z = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 1, 2, 4, 3]))
    g.output(g.op("MatMul", g.op("Flatten", z), g.const(whole_numbers(576, 2))), ["N", 2])
    result = optimised(g, given)
    assert "dot MatMul: the matrices of a stack differ in their levels in a way" in refusals(result)


def test_product_over_candidates() -> None:
    """`C' C` over all candidates mixes them: the rows it goes over stay those of the original."""
    given = [request("u", 3), candidate("c", 4)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    mixed = g.op("MatMul", g.op("Transpose", g.op("Relu", u), perm=[1, 0]), c)
    g.output(g.op("MatMul", g.op("Tanh", u), mixed), ["N", 4])
    optimised(g, given, tolerance=1e-6)


def test_left_out() -> None:
    """Without the rule the scores are the same and the product stays."""
    g, given, x = fields(4, 3, 2)
    g.output(layer(g, g.op("Flatten", gram(g, x)), 49, 2), ["N", 2])
    with_rule, without = optimised(g, given), optimised(g, given, ignore=["dot"])
    assert "dot" in rules(with_rule) and "dot" not in rules(without)
    assert with_rule.report.macs_after < without.report.macs_after


# --- attention -----------------------------------------------------------------------------------------------------


L, D, HEADS = 6, 4, 2


def heads(g: Graph, x: str, length: int, perm: list[int], d: int = D, count: int = HEADS) -> str:
    return g.op("Transpose", g.op("Reshape", x, g.ints(-1, length, count, d // count)), perm=perm)


def attention(
    g: Graph, x: str, history: str, mask: str | None, seed: int, norm: bool, tokens: int = L + 1, keys: int = L
) -> str:
    """A layer of attention of all tokens on the history, with residual and a feed-forward part."""
    w = [g.const(whole_numbers(D, D, seed=seed + k)) for k in range(4)]
    q = heads(g, g.op("MatMul", x, w[0]), tokens, [0, 2, 1, 3])
    k = heads(g, g.op("MatMul", history, w[1]), keys, [0, 2, 3, 1])
    v = heads(g, g.op("MatMul", history, w[2]), keys, [0, 2, 1, 3])
    scores = g.op("MatMul", q, k)
    if norm:
        scores = g.op("Mul", scores, g.const(0.125))
        scores = g.op("Softmax", g.op("Add", scores, mask) if mask else scores, axis=-1)
    elif mask:
        scores = g.op("Mul", scores, mask)
    out = g.op("Reshape", g.op("Transpose", g.op("MatMul", scores, v), perm=[0, 2, 1, 3]), g.ints(-1, tokens, D))
    y = g.op("Add", x, g.op("MatMul", out, w[3]))
    return g.op("Relu", y) if norm else g.op("Clip", y, g.const(-2), g.const(2))  # small enough to be exact


def sequence(layers: int, norm: bool, last: bool, padded: bool = True) -> tuple[Graph, list[Given]]:
    given = [request("h", L, D), request("m", L), candidate("c", D)]
    g = Graph()
    h, m, c = (i.declare(g) for i in given)
    x = g.op("Concat", h, g.on_axes("Unsqueeze", c, [1]), axis=1)
    seen = np.tril(np.ones((L + 1, L)))
    there = g.op("Greater", m, g.const(-3 if padded else -99))
    wide = g.on_axes("Unsqueeze", there, [1, 2])
    if norm:
        mask = g.op("Add", g.op("Where", wide, g.const(0), g.const(-1e9)), g.const(np.where(seen, 0, -1e9)))
    else:
        mask = g.op("Mul", g.op("Cast", wide, to=1), g.const(seen))
    ends = [g.ints(k) for k in (0, L, 1)]
    for k in range(layers):
        x = attention(g, x, g.op("Slice", x, *ends), mask, 10 * k, norm)
    if last:
        y = g.op("Gather", x, g.const(-1, np.int64), axis=1)
        g.output(g.op("MatMul", y, g.const(whole_numbers(D, 2))), ["N", 2])
    else:
        g.output(g.op("MatMul", x, g.const(whole_numbers(D, 2))), ["N", L + 1, 2])
    return g, given


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layers", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_candidate_after_history(layers: int, norm: bool, last: bool) -> None:
    """Keys are the history: its rows stay request-level through all layers, and only the candidate's is made N times.

    Without softmax all numbers are whole, and the scores must be equal bit for bit.
    """
    g, given = sequence(layers, norm, last)
    result = optimised(g, given, tolerance=1e-5 if norm else 0.0)
    assert rules(result)["attention" if norm else "dot"] >= 2 * layers
    # Projections of query and output, scores, pooling, and the head.
    each = layers * (2 * D * D + 2 * L * D) + 2 * D
    assert result.report.after["candidate"].macs == N * each
    through = 4 * L * D * D + 2 * L * L * D
    idle = 2 * L * D * D + 2 * L * L * D  # of the last layer's history only keys and values are read
    assert result.report.after["request"].macs == layers * through - (idle if last else -2 * L * D)
    assert "Expand" not in operators(result.model) or not last  # all tokens are an output


def test_history_without_candidate_rows() -> None:
    """No tensor of the history has rows of candidates; no product has one small matrix per candidate."""
    g, given = sequence(2, True, True)
    result = optimised(g, given, tolerance=1e-5)
    made = made_by(result, given, "MatMul") + made_by(result, given, "Gemm")
    assert set(made) <= {D, L, 50}
    assert made.count(50) == 2 * 4 + 1  # two projections, scores and pooling per layer, and the head
    assert set(made_by(result, given, "Softmax")) == {6, 50}


def test_every_key_masked() -> None:
    """A row whose keys are all masked has equal weights, and still only sees the history."""
    g, given = sequence(2, True, True)
    model = g.model()
    result = rewritten(model, request=patterns(given))
    old, new = feeds(given, 5)
    old["m"], new["m"] = np.full_like(old["m"], -3), np.full_like(new["m"], -3)
    for name, score in run(model, old).items():
        np.testing.assert_allclose(run(result.model, new)[name], score, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [1, 3, 5])
def test_target_attention(many: int) -> None:
    """Several candidate-level queries on request-level keys: `q K'`, softmax, `P V`, with rows of candidates."""
    given = [request("h", L, D), candidate("c", many, D)]
    g = Graph()
    h, c = (i.declare(g) for i in given)
    scores = g.op("Softmax", g.op("MatMul", c, g.op("Transpose", h, perm=[0, 2, 1])), axis=-1)
    y = g.op("Flatten", g.op("MatMul", scores, h))
    g.output(g.op("MatMul", y, g.const(whole_numbers(many * D, 2))), ["N", 2])
    result = optimised(g, given, tolerance=1e-5)
    assert result.report.macs_after == result.report.macs_before
    assert max(made_by(result, given, "MatMul")) == 50 * many
    assert "Expand" not in operators(result.model)


@pytest.mark.parametrize("axis", [1, 2])
def test_rows_nobody_reads(axis: int) -> None:
    """Of a product only some rows or columns are read: the others are not made."""
    g, given, x = fields(5, 3, 4)
    kept = g.op("Gather", gram(g, x), g.ints(0, 1, 2, 6, 7), axis=axis)
    g.output(layer(g, g.op("Flatten", kept), 40, 3), ["N", 3])
    result = optimised(g, given)
    assert rules(result)["dot"] == 1
    assert result.report.before["candidate"].macs == N * (64 * 4 + 40 * 3)
    # 3 of the request's fields and 2 of the candidate's with 5 and 3.
    assert result.report.after["request"].macs == 15 * 4 + 15 * 3
    assert result.report.after["candidate"].macs == N * (25 * 4 + 25 * 3)


@pytest.mark.parametrize("length", ["L", 6])
@pytest.mark.parametrize("form", ["MatMul", "Einsum"])
def test_masked_scores(form: str, length: str | int) -> None:
    """Target attention without a softmax: scores times a mask of the request, times the history."""
    given = [request("h", length, 4), request("m", length), candidate("c", 4)]
    g = Graph()
    h, m, c = (i.declare(g) for i in given)
    pairs = g.op("Mul", h, g.on_axes("Unsqueeze", c, [1]))
    scores = g.op("Relu", g.op("MatMul", pairs, g.const(whole_numbers(4, 1))))
    scores = g.op("Mul", g.on_axes("Squeeze", scores, [2]), m)
    if form == "MatMul":
        pooled = g.on_axes("Squeeze", g.op("MatMul", g.on_axes("Unsqueeze", scores, [1]), h), [1])
    else:
        pooled = g.op("Einsum", scores, h, equation="nl,nld->nd")
    g.output(g.op("MatMul", g.op("Concat", pooled, c, axis=1), g.const(whole_numbers(8, 3))), ["N", 3])
    optimised(g, given, counts=(1, 2, 5), lengths=({"L": 1}, {"L": 5}, {"L": 50}))


@pytest.mark.parametrize("level", ["request", "candidate"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("form", ["MatMul", "Einsum"])
def test_over_a_length_that_does_not_matter(form: str, side: int, level: str) -> None:
    """A product over the positions of a history with what is the same at all of them."""
    given = [request("h", "L", 4), request("u", 3), candidate("c", 3)]
    g = Graph()
    h, u, c = (i.declare(g) for i in given)
    size = g.op("Gather", g.op("Shape", h), g.ints(1), axis=0)
    same = g.on_axes("Unsqueeze", g.op("Relu", u) if level == "request" else c, [1])
    same = g.op("Expand", same, g.op("Concat", g.ints(1), size, g.ints(1), axis=0))
    k = g.op("Relu", h)
    if form == "MatMul":
        a, b = (same, k) if side else (k, same)
        y = g.op("MatMul", g.op("Transpose", a, perm=[0, 2, 1]), b)
    else:
        y = g.op("Einsum", *((same, k) if side else (k, same)), equation="nla,nlb->nab")
    g.output(y, ["N", 3, 4] if side else ["N", 4, 3])
    g.output(g.op("Relu", c), ["N", 3])
    optimised(g, given, counts=(1, 2, 5), lengths=({"L": 1}, {"L": 5}, {"L": 50}))


@pytest.mark.parametrize("out", ["nij", "nji", "jni", "ijn"])
@pytest.mark.parametrize("read", [0, 1, 2])
def test_positions_read_of_an_einsum(read: int, out: str) -> None:
    """The axes of the result are not those of the product that it is made by."""
    given = [request("u", 3, 4), candidate("c", 2, 4)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    x = g.op("Concat", g.op("Relu", u), c, axis=1)
    y = g.op("Einsum", x, g.op("Concat", c, u, c, axis=1), equation=f"nik,njk->{out}")
    axis = {"i": 0, "j": 1}.get(out[read])
    y = g.op("Neg", y) if axis is None else g.op("Gather", y, g.const([(4, 6)[axis]], np.int64), axis=read)
    g.output(y, None)
    optimised(g, given, counts=(1, 2, 5))


def test_a_sum_over_a_length_of_nothing() -> None:
    """Einsum over a length is 0 without entries; onnxruntime's product of a transposed tensor is what lay in memory."""
    g, given = Graph(), [request("u", 4), candidate("c", "L", 2)]
    u, c = (i.declare(g) for i in given)
    y = g.op("Einsum", g.op("Tile", c, g.ints(1, 1, 2)), c, equation="abc,abd->acd")
    g.output(g.op("Add", y, g.op("Unsqueeze", g.op("ReduceSum", u, g.ints(1), keepdims=1), g.ints(2))), ["N", 4, 2])
    result = optimised(g, given, lengths=[{"L": n} for n in (0, 1, 40)], tolerance=1e-6)
    made = {o: n.op_type for n in result.model.graph.node for o in n.output}
    read = [made.get(i) for n in result.model.graph.node if n.op_type == "MatMul" for i in n.input]
    assert "Transpose" not in read


@pytest.mark.slow
@pytest.mark.parametrize("factor", [None, "Mul", "Div"])
def test_heads_over_a_length_of_nothing(factor: str | None) -> None:
    """Factors on queries and keys, as torch scales attention: onnxruntime takes a Transpose before them all the same.

    Where that moves heads to the front, it then divides by the length.
    """
    given = [request("h", "L", 16), request("k", "M", 16), candidate("c", 16)]
    g = Graph()
    h, k, c = (i.declare(g) for i in given)
    x = g.op("Concat", g.on_axes("Unsqueeze", c, [1]), g.op("Relu", h), g.op("Relu", k), axis=1)

    def heads(*perm: int) -> str:
        y = g.op("Add", g.op("MatMul", x, g.const(whole_numbers(16, 16))), g.const(whole_numbers(16)))
        turned = g.op("Transpose", g.op("Reshape", y, g.ints(0, -1, 2, 8)), perm=perm)
        return turned if factor is None else g.op(factor, turned, g.op("Sqrt", g.const(np.float32(0.25))))

    scores = g.op("Softmax", g.op("MatMul", heads(0, 2, 1, 3), heads(0, 2, 3, 1)), axis=-1)
    y = g.op("Transpose", g.op("MatMul", scores, heads(0, 2, 1, 3)), perm=[0, 2, 1, 3])
    g.output(g.op("ReduceSum", g.op("Reshape", y, g.ints(0, -1, 16)), g.ints(1), keepdims=0), ["N", 16])
    result = optimised(g, given, counts=(1, 2, 5), lengths=[{"L": n, "M": 7} for n in (0, 1, 40)], tolerance=1e-5)
    made = {o: n for n in result.model.graph.node for o in n.output}
    for name in (i for n in result.model.graph.node if n.op_type == "MatMul" for i in n.input):
        while name in made and made[name].op_type == factor:
            name = made[name].input[0]
        assert name not in made or made[name].op_type != "Transpose" or attribute(made[name], "perm")[0] == 0


def split_apart(g: Graph, x: str, count: int, d: int) -> str:
    """Fields [N, count, d] with the entries in front, `[d, N, count, 1]`, as tf2onnx exports split and stack."""
    parts = g.ops("Split", d, x, g.ints(*[1] * d), axis=2)
    return g.op("Concat", *(g.op("Unsqueeze", p, g.ints(0)) for p in parts), axis=0)


def outer(g: Graph, x: str, h: str, count: int, width: int, d: int) -> str:
    """All products of fields with maps, entry by entry, `[N, d, count * width]`."""
    left, right = split_apart(g, x, count, d), split_apart(g, h, width, d)
    z = g.op("MatMul", left, g.op("Transpose", right, perm=[0, 1, 3, 2]))
    return g.op("Transpose", g.op("Reshape", z, g.ints(d, -1, count * width)), perm=[1, 0, 2])


def interactions(g: Graph, x: str, count: int, d: int, sizes: tuple[int, ...]) -> str:
    """Compressed interactions as tf2onnx exports them, and their sums over the entries."""
    h, width, pooled = x, count, []
    for k, size in enumerate(sizes):
        z = outer(g, x, h, count, width, d)
        y = g.op("MatMul", z, g.const(whole_numbers(count * width, size, seed=k)))
        h, width = g.op("Transpose", g.op("Relu", y), perm=[0, 2, 1]), size
        pooled.append(h)
    return g.op("Squeeze", g.on_axes("ReduceSum", g.op("Concat", *pooled, axis=1), [2], keepdims=1), g.ints(2))


@pytest.mark.parametrize("shuffled", [None, 0, 1, 2])
def test_outer_products_in_blocks(shuffled: int | None) -> None:
    """Only what is of two candidate-level fields is multiplied, and no field is repeated for it."""
    users, items, d = 5, 3, 2
    g, given, x = fields(users, items, d, shuffled)
    g.output(interactions(g, x, users + items, d, (4,)), ["N", 4])
    result = optimised(g, given, counts=(0, 1, 2, 5, 700))
    assert rules(result)["fold"] == 1
    made = run(exposed(result.model), feeds(given, 7)[1])
    assert max(v.size for v in made.values()) == 7 * d * items * items


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize("heads", [1, 4])
def test_heads_of_one_row_by_one_column(heads: int, depth: int, turned: bool) -> None:
    """A query by a key of every head and candidate: entry by entry, not a product of one row by one column each."""
    g = Graph()
    given = [request("u", 8), candidate("a", heads, depth), candidate("b", heads, depth)]
    u, a, b = (i.declare(g) for i in given)
    query = g.on_axes("Unsqueeze", g.op("Relu", a), [2])
    key = g.on_axes("Unsqueeze", g.op("Relu", b), [2 if turned else 3])
    scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]) if turned else key)
    seen = g.op("Reshape", scores, g.ints(-1, heads))
    g.output(g.op("MatMul", g.op("Concat", u, seen, axis=1), g.const(whole_numbers(8 + heads, 3))), ["N", 3])
    result = optimised(g, given, counts=(0, 1, 2, 7, 40))
    assert "ReduceSum" in operators(result.model) or depth == 1
    weights = {t.name for t in result.model.graph.initializer}
    assert not [n for n in result.model.graph.node if n.op_type == "MatMul" and not weights & set(n.input)]


@pytest.mark.parametrize("rows", [1, 3])
def test_columns_by_rows_add_nothing_up(rows: int) -> None:
    """Weights of a candidate's own position, in a softmax beside those of the history, by its value."""
    g = Graph()
    given = [request("h", 5, 6), candidate("w", rows, 6), candidate("v", 1, 6)]
    h, w, v = (i.declare(g) for i in given)
    values = g.op("Concat", h, g.op("Relu", v), axis=1)
    g.output(g.op("MatMul", g.op("Relu", w), values), ["N", rows, 6])
    result = optimised(g, given, counts=(0, 1, 2, 7, 40))
    made = operators(result.model)
    assert made.count("MatMul") + made.count("Gemm") == 1 and "Mul" in made
