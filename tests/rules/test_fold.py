"""`fold`: products of request-level with candidate-level values go into the linear map that reads them."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from helpers import (
    Given,
    Graph,
    candidate,
    feeds,
    operators,
    optimised,
    patterns,
    request,
    rows,
    rules,
    run,
    whole_numbers,
)
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from onnxrank.rules.fold import Fold

import onnxrank
from onnxrank.passes import choosing

N = 512
USER, ITEM, D = 12, 3, 4


def made_by(result: onnxrank.Result, given: list[Given], kind: str = "Mul") -> list[int]:
    """Largest extent of all that an operator gives, at 50 candidates."""
    extents = rows(result, given, 50)
    return [extents[n.output[0]] for n in result.model.graph.node if n.op_type == kind]


def macs(result: onnxrank.Result) -> tuple[int, int]:
    """Once per request, and for all candidates."""
    return result.report.after["request"].macs, result.report.after["candidate"].macs


def layer(g: Graph, x: str, count: int, width: int, seed: int = 0) -> str:
    w, b = whole_numbers(count, width, seed=seed), whole_numbers(width, seed=seed + 1)
    return g.op("Relu", g.op("Gemm", x, g.const(w), g.const(b)))


# --- products of fields --------------------------------------------------------------------------------------------


def picked(g: Graph, u: str, c: str, users: int, items: int) -> tuple[str, int]:
    """All pairs of all fields, by two gathers."""
    x = g.op("Concat", u, c, axis=1)
    i, j = np.triu_indices(users + items, 1)
    return g.op("Mul", *(g.op("Gather", x, g.ints(*k), axis=1) for k in (i, j))), len(i)


def one_by_one(g: Graph, u: str, c: str, users: int, items: int) -> tuple[str, int]:
    """All pairs of all fields, a node each."""
    x = g.op("Concat", c, u, axis=1)
    i, j = np.triu_indices(users + items, 1)
    fields = [g.op("Slice", x, g.ints(k), g.ints(k + 1), g.ints(1)) for k in range(users + items)]
    return g.op("Concat", *(g.op("Mul", fields[b], fields[a]) for a, b in zip(i, j, strict=True)), axis=1), len(i)


def crossed(g: Graph, u: str, c: str, users: int, items: int) -> tuple[str, int]:
    """Pairs of different levels only, by broadcasting."""
    y = g.op("Mul", g.on_axes("Unsqueeze", c, [1]), g.on_axes("Unsqueeze", u, [2]))
    return g.op("Reshape", y, g.ints(-1, users * items, D)), users * items


@pytest.mark.parametrize("few", [1, 2])
@pytest.mark.parametrize("form", [picked, one_by_one, crossed])
def test_pairs(form: object, few: int) -> None:
    """Hadamard products of all pairs before a layer: no product of two levels is made for every candidate.

    With one or two candidates making them costs less than the weights would.
    """
    given = [request("u", USER, D), candidate("c", ITEM, D)]
    g = Graph()
    y, pairs = form(g, *(i.declare(g) for i in given), USER, ITEM)  # type: ignore[operator]
    width = 16
    g.output(layer(g, g.op("Flatten", y), pairs * D, width), ["N", width])
    users, items = (0, 0) if form is crossed else (USER * (USER - 1) // 2, ITEM * (ITEM - 1) // 2)
    unit = D * width
    folded = optimised(g, given, candidates=N)
    assert folded.report.macs_before == N * pairs * unit
    assert macs(folded) == ((users + USER * ITEM) * unit, N * (ITEM + items) * unit)
    plain = optimised(g, given, candidates=few)
    if plain.changed:
        assert macs(plain) == (users * unit, few * (USER * ITEM + items) * unit)
    else:
        assert form is crossed
    if form is crossed:
        assert rules(folded)["fold"] == 1
        assert max(made_by(folded, given), default=1) < 50


def test_left_out() -> None:
    """`ignore` leaves the products as they are."""
    given = [request("u", USER, D), candidate("c", ITEM, D)]
    g = Graph()
    y, pairs = crossed(g, *(i.declare(g) for i in given), USER, ITEM)
    g.output(layer(g, g.op("Flatten", y), pairs * D, 16), ["N", 16])
    result = optimised(g, given, ignore=["fold"])
    assert "fold" not in rules(result)
    assert result.report.macs_after == result.report.macs_before


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("width", [1, 8])
def test_dot_products_of_fields(width: int, weighted: bool) -> None:
    """Products summed over the width of the fields: inner PNN, or with one weight per pair FwFM."""
    given = [request("u", USER, D), candidate("c", ITEM, D)]
    g = Graph()
    y, pairs = picked(g, *(i.declare(g) for i in given), USER, ITEM)
    x = g.on_axes("ReduceSum", y, [2], keepdims=0)
    if weighted:
        x = g.op("Mul", x, g.const(whole_numbers(pairs, seed=7)))
    g.output(g.op("MatMul", x, g.const(whole_numbers(pairs, width))), ["N", width])
    result = optimised(g, given, counts=(1, 2, 5))  # onnxruntime gives wrong shapes for reductions of no rows
    users, items = USER * (USER - 1) // 2, ITEM * (ITEM - 1) // 2
    assert result.report.macs_before == N * pairs * width
    if width == 1 and not weighted:
        # Folded: D * ITEM entries, each with its own weight, instead of USER * ITEM products of D entries.
        assert result.report.after["candidate"].macs == N * (ITEM * D + items) * width
        assert result.report.after["request"].macs == (users + USER * ITEM * D) * width
        assert result.report.after["candidate"].bytes < result.report.before["candidate"].bytes / 3
        assert not {"Expand", "Transpose"} & set(operators(result.model))  # one product of the fields with all weights
    few = optimised(g, given, counts=(1, 2, 5), candidates=1)
    assert few.report.after["candidate"].macs == (USER * ITEM + items) * width


@pytest.mark.parametrize("seed", range(16))
def test_any_pairs(seed: int) -> None:
    """Random fields, pairs in any order and more than once, factors themselves beside them: exact to the bit."""
    rng = np.random.default_rng(seed)
    users, items, d, width = (int(k) for k in rng.integers((1, 1, 1, 1), (9, 4, 5, 9)))
    given = [request("u", users, d), candidate("c", items, d)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    i, j = rng.integers(0, users + items, (2, int(rng.integers(1, 60))))
    y = g.op("Mul", *(g.op("Gather", x, g.ints(*k), axis=1) for k in (i, j)))
    parts, count = [g.op("Flatten", y)], len(i) * d
    if seed % 2:
        parts, count = [g.op("Flatten", x), *parts], count + (users + items) * d
    if seed % 3 == 0:
        parts, count = [*parts, g.op("Flatten", g.op("Gather", x, g.ints(users), axis=1))], count + d
    x = g.op("Concat", *parts, axis=1)
    order = rng.permutation(count)
    g.output(layer(g, g.op("Gather", x, g.ints(*order), axis=1), count, width, seed), ["N", width])
    for n in (3, 20000):
        optimised(g, given, candidates=n)


@pytest.mark.parametrize("reader", ["Relu", "output", "Softmax", "ReduceMax"])
def test_also_read_as_it_is(reader: str) -> None:
    """A product that something else needs as well is made, and both readers are right."""
    given = [request("u", USER, D), candidate("c", ITEM, D)]
    g = Graph()
    y, pairs = crossed(g, *(i.declare(g) for i in given), USER, ITEM)
    g.output(layer(g, g.op("Flatten", y), pairs * D, 8), ["N", 8])
    if reader == "output":
        g.output(y, ["N", pairs, D])
    elif reader == "ReduceMax":
        g.output(g.on_axes(reader, y, [2], keepdims=0), ["N", pairs])
    else:
        g.output(g.op("MatMul", g.op(reader, y), g.const(whole_numbers(D, 2))), ["N", pairs, 2])
    counts = (1, 2, 5) if reader == "ReduceMax" else (0, 1, 2, 5)
    result = optimised(g, given, counts=counts, tolerance=1e-6 if reader == "Softmax" else 0)
    assert max(made_by(result, given)) >= 50


def test_two_linear_maps() -> None:
    """Two layers on the same products, one of them behind a permutation: both are folded."""
    given = [request("u", USER, D), candidate("c", ITEM, D)]
    g = Graph()
    y, pairs = crossed(g, *(i.declare(g) for i in given), USER, ITEM)
    g.output(layer(g, g.op("Flatten", y), pairs * D, 8), ["N", 8])
    g.output(layer(g, g.op("Flatten", g.op("Transpose", y, perm=[0, 2, 1])), pairs * D, 5, 3), ["N", 5])
    result = optimised(g, given)
    assert rules(result)["fold"] == 2
    assert macs(result) == (USER * ITEM * D * 13, N * ITEM * D * 13)
    assert max(made_by(result, given), default=1) < 50


@pytest.mark.parametrize("kind", ["computed", "transposed", "left"])
def test_forms_of_weights(kind: str) -> None:
    """Weights that nodes of constants make, transposed ones, and ones on the left of a column."""
    given = [request("u", USER, D), candidate("c", ITEM, D)]
    g = Graph()
    y, pairs = crossed(g, *(i.declare(g) for i in given), USER, ITEM)
    x, count = g.op("Flatten", y), pairs * D
    if kind == "computed":
        w = g.op("Mul", g.const(whole_numbers(count, 8)), g.const(whole_numbers(count, 1, seed=1)))
        z = g.op("MatMul", x, w)
    elif kind == "transposed":
        z = g.op("MatMul", x, g.op("Transpose", g.const(whole_numbers(8, count)), perm=[1, 0]))
    else:
        z = g.op("MatMul", g.const(whole_numbers(8, count)), g.on_axes("Unsqueeze", x, [2]))
        z = g.on_axes("Squeeze", z, [2])
    g.output(z, ["N", 8])
    result = optimised(g, given)
    assert rules(result)["fold"] == 1
    assert result.report.after["candidate"].macs == N * ITEM * D * 8


def test_weights_of_the_request() -> None:
    """Weights that are an input are no constants: nothing is folded."""
    given = [request("u", 6), candidate("c", 6), request("w", 6, 3)]
    g = Graph()
    u, c, w = (i.declare(g) for i in given)
    y = g.op("MatMul", g.on_axes("Unsqueeze", g.op("Mul", u, c), [1]), w)
    g.output(g.on_axes("Squeeze", y, [1]), ["N", 3])
    assert "fold" not in rules(optimised(g, given))


# --- scales and sums -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 64])
def test_scaled_by_the_request(width: int) -> None:
    """`(s * x) W = x (diag(s) W)`: a gate of the request before a layer, where its columns are few."""
    given = [request("s", 32), candidate("c", 32)]
    g = Graph()
    s, c = (i.declare(g) for i in given)
    g.output(g.op("Relu", g.op("MatMul", g.op("Mul", c, g.op("Tanh", s)), g.const(whole_numbers(32, width)))), None)
    result = optimised(g, given, tolerance=1e-5, candidates=8192)
    if width <= 3:
        assert rules(result)["fold"] == 1
        assert max(made_by(result, given), default=1) < 50
    assert result.report.after["candidate"].macs == 8192 * 32 * width


def test_one_factor_for_all_columns() -> None:
    """A scalar of the request per row."""
    given = [request("s", 1), candidate("c", 8)]
    g = Graph()
    s, c = (i.declare(g) for i in given)
    g.output(g.op("MatMul", g.op("Mul", s, c), g.const(whole_numbers(8, 3))), ["N", 3])
    for n in (1, 512, 100000):
        optimised(g, given, candidates=n)


@pytest.mark.parametrize("kind", ["MatMul", "Einsum"])
def test_cross_layers_by_a_vector(kind: str) -> None:
    """`x_0 (x w) + b + x`, as DCN has it, with `x w` as a product or as torch exports a tensordot."""
    given = [request("u", 48), candidate("c", 16)]
    g = Graph()
    x = start = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    for k in range(3):
        w, b = g.const(whole_numbers(64, 1, seed=k)), g.const(whole_numbers(64, seed=k + 3))
        scale = g.op("MatMul", x, w) if kind == "MatMul" else g.op("Einsum", x, w, equation="ij,jk->ik")
        x = g.op("Add", g.op("Add", g.op("Mul", start, scale), b), x)
    g.output(g.op("MatMul", x, g.const(whole_numbers(64, 2))), ["N", 2])
    assert rules(optimised(g, given, tolerance=1e-5)).get("fold", 0) >= 2


def test_sum_of_products() -> None:
    """`a * x + b * y + x` before a layer, factors in common or not."""
    given = [request("a", 16), request("b", 16), candidate("x", 16), candidate("y", 16)]
    g = Graph()
    a, b, x, y = (i.declare(g) for i in given)
    total = g.op("Add", g.op("Add", g.op("Mul", a, x), g.op("Mul", y, b)), x)
    g.output(g.op("MatMul", total, g.const(whole_numbers(16, 2))), ["N", 2])
    g.output(g.op("MatMul", g.op("Sub", g.op("Mul", a, x), g.op("Mul", b, x)), g.const(whole_numbers(16, 2))), ["N", 2])
    for n in (1, 512, 100000):
        optimised(g, given, candidates=n)


def test_products_of_three() -> None:
    """Factors of the request before and behind the candidate's."""
    given = [request("a", 16), request("b", 16), candidate("x", 16)]
    g = Graph()
    a, b, x = (i.declare(g) for i in given)
    y = g.op("Mul", g.op("Mul", a, x), b)
    g.output(g.op("MatMul", y, g.const(whole_numbers(16, 2))), ["N", 2])
    g.output(g.op("MatMul", g.op("Mul", y, x), g.const(whole_numbers(16, 2))), ["N", 2])
    for n in (1, 512, 100000):
        optimised(g, given, candidates=n)


# --- target attention ----------------------------------------------------------------------------------------------

L, WIDTH = 10, 8


def target(kind: str, opset: int = 17) -> tuple[Graph, list[Given]]:
    """The first layer of DIN's attention on [q, h, q - h, q * h]."""
    given = [request("h", L, D), candidate("q", D)]
    g = Graph(opset)
    h, q = (i.declare(g) for i in given)
    wide = g.op("Expand", g.on_axes("Unsqueeze", q, [1]), g.ints(1, L, 1))
    parts = {"q": wide, "h": h, "-": g.op("Sub", wide, h), "*": g.op("Mul", wide, h)}
    x = g.op("Concat", *(parts[k] for k in kind), axis=2)
    y = g.op("Add", g.op("MatMul", x, g.const(whole_numbers(len(kind) * D, WIDTH))), g.const(whole_numbers(WIDTH)))
    g.output(g.op("Relu", y), ["N", L, WIDTH])
    return g, given


@pytest.mark.parametrize("kind", ["*", "*h", "q*", "qh*"])
def test_target_attention(kind: str) -> None:
    """`(q * h) W` has weights `diag(h_l) W` for every position, made once; `q` itself adds to them or is apart."""
    g, given = target(kind)
    result = optimised(g, given, candidates=N)
    assert result.report.macs_before == N * L * len(kind) * D * WIDTH
    each = result.report.after["candidate"].macs
    assert N * L * D * WIDTH <= each <= N * (L + 1) * D * WIDTH
    assert max(made_by(result, given), default=1) < 50
    optimised(g, given, candidates=1)


def test_activation_behind_the_fold() -> None:
    """It follows the product itself, not a reshape of it: runtimes fuse the two."""
    g, given = target("*h")
    result = optimised(g, given, candidates=N)
    maker = {o: n.op_type for n in result.model.graph.node for o in n.output}
    assert [maker[n.input[0]] for n in result.model.graph.node if n.op_type == "Relu"] == ["Gemm"]


def test_difference_beside_the_product() -> None:
    """`q - h` is divided as it is without the product: `q` is one row per candidate, not one per position."""
    g, given = target("qh-*")
    result, apart = optimised(g, given, candidates=N), optimised(g, given, candidates=N, ignore=["fold"])
    assert apart.report.after["candidate"].macs == N * (L + 1) * D * WIDTH
    assert result.report.after["candidate"].macs <= apart.report.after["candidate"].macs


# --- rows with entries of their own --------------------------------------------------------------------------------


class CIN:
    """A compressed interaction network on `[u; c]`: maps of products of maps with fields, column by column.

    Args:
        form: How the products are written: `einsum`, `mul` of unsqueezed tensors, or `matmul`, with the columns in
            front of the products.
        users: Request-level fields.
        items: Candidate-level fields.
        dim: Columns.
    """

    def __init__(self, form: str, users: int = USER, items: int = ITEM, dim: int = D) -> None:
        self.given = [request("u", users, dim), candidate("c", items, dim)]
        self.form, self.count, self.dim, self.g = form, users + items, dim, Graph()
        self.x0 = self.g.op("Concat", *(i.declare(self.g) for i in self.given), axis=1)

    def products(self, x: str, maps: int) -> str:
        """`[N, maps * fields, dim]`."""
        g = self.g
        if self.form == "einsum":
            y = g.op("Einsum", x, self.x0, equation="bhd,bmd->bhmd")
        else:
            y = g.op("Mul", g.on_axes("Unsqueeze", x, [2]), g.on_axes("Unsqueeze", self.x0, [1]))
        return g.op("Reshape", y, g.ints(-1, maps * self.count, self.dim))

    def layer(self, x: str, maps: int, width: int, seed: int = 0, kernel: int = 1) -> str:
        """The next maps, `[N, width, dim]`."""
        g, y, count = self.g, self.products(x, maps), maps * self.count
        w, b = whole_numbers(width, count, kernel, seed=seed), whole_numbers(width, seed=seed + 1)
        if self.form == "matmul":
            y = g.op("MatMul", g.op("Transpose", y, perm=[0, 2, 1]), g.const(w[..., 0].T))
            return g.op("Transpose", g.op("Relu", g.op("Add", y, g.const(b))), perm=[0, 2, 1])
        pads = [(kernel - 1) // 2] * 2
        return g.op("Relu", g.op("Conv", y, g.const(w), g.const(b), kernel_shape=[kernel], pads=pads))

    def head(self, *maps: str) -> Graph:
        """All maps, summed over the columns."""
        x = self.g.op("Concat", *maps, axis=1) if len(maps) > 1 else maps[0]
        self.g.output(x, None)
        return self.g


COUNTS = (1, 2, 7)
"""Not 0: onnxruntime's Einsum ends the process."""


@pytest.mark.parametrize("form", ["einsum", "mul", "matmul"])
def test_interaction_layer(form: str) -> None:
    """One layer: a product per column, of the candidate's entries with weights made once per request."""
    width = 16
    cin = CIN(form)
    g = cin.head(cin.layer(cin.x0, cin.count, width))
    result = optimised(g, cin.given, counts=COUNTS if form == "einsum" else (0, *COUNTS), candidates=N)
    assert rules(result)["fold"] == 1
    (none,) = run(result.model, feeds(cin.given, 0)[1]).values()
    assert none.shape == (0, width, D)
    unit, pairs = D * width, cin.count**2
    # Exporters' Einsum counts as a product itself.
    assert result.report.macs_before == N * (pairs * unit + (pairs * D if form == "einsum" else 0))
    assert macs(result) == ((USER**2 + 2 * USER * ITEM) * unit, N * (ITEM + ITEM**2) * unit)
    few = optimised(g, cin.given, counts=COUNTS, candidates=1)
    assert "fold" not in rules(few)
    assert few.report.after["candidate"].macs == (2 * USER * ITEM + ITEM**2) * unit


@pytest.mark.parametrize("form", ["einsum", "mul", "matmul"])
def test_two_interaction_layers(form: str) -> None:
    """The second layer multiplies candidate-level maps with request-level fields."""
    first, second = 6, 5
    cin = CIN(form)
    x1 = cin.layer(cin.x0, cin.count, first)
    g = cin.head(x1, cin.layer(x1, first, second, seed=3))
    result = optimised(g, cin.given, counts=COUNTS, candidates=4096)
    assert rules(result)["fold"] == 2
    once = (USER**2 + 2 * USER * ITEM) * D * first + USER * D * first * second
    each = (ITEM + ITEM**2) * D * first + (1 + ITEM) * first * D * second
    assert macs(result) == (once, 4096 * each)


@pytest.mark.parametrize("form", ["einsum", "mul"])
def test_split_half(form: str) -> None:
    """Half of a layer's maps go on to the next one, the other half to the head."""
    cin = CIN(form)
    layers, x, maps = [], cin.x0, cin.count
    for k, width in enumerate((8, 8, 4)):
        y = cin.layer(x, maps, width, seed=2 * k)
        if k == 2:
            layers.append(y)
        else:
            x, direct = cin.g.ops("Split", 2, y, cin.g.ints(width // 2, width // 2), axis=1)
            layers.append(direct)
            maps = width // 2
    joined = cin.g.op("Concat", *layers, axis=1)
    total = cin.g.on_axes("ReduceSum", joined, [2], keepdims=0)
    cin.g.output(cin.g.op("MatMul", total, cin.g.const(whole_numbers(12, 1))), ["N", 1])
    result = optimised(cin.g, cin.given, counts=COUNTS, candidates=4096)
    assert rules(result)["fold"] == 3


@pytest.mark.parametrize(
    "equation", ["bdh,bmd->bhmd", "bhd,bmd->bmhd", "bdh,bdm->bhdm", "dhb,bdm->bmhd", "hdb,bm->bhmd"]
)
def test_axes_of_products(equation: str) -> None:
    """Products that Einsum turns on the way, and an operand without an axis of the other."""
    sizes = {"h": ITEM, "m": USER, "d": D}
    g = Graph()
    given = [candidate("c", ITEM, D), request("u", USER, D) if "d" in equation[4:7] else request("u", USER)]
    names = [i.declare(g) for i in given]
    left, out = equation.split("->")
    axes = ["bhd", "bmd" if len(given[1].shape) == 2 else "bm"]
    x = [
        g.op("Transpose", n, perm=[a.index(k) for k in t]) for n, a, t in zip(names, axes, left.split(","), strict=True)
    ]
    y = g.op("Reshape", g.op("Einsum", *x, equation=equation), g.ints(-1, ITEM * USER * D))
    assert out[0] == "b" and set(out[1:]) == set(sizes)
    g.output(layer(g, y, ITEM * USER * D, 8), ["N", 8])
    result = optimised(g, given, counts=COUNTS, candidates=N)
    assert rules(result)["fold"] == 1
    assert macs(result) == (ITEM * USER * D * 8, N * ITEM * D * 8)


@pytest.mark.parametrize("seed", range(8))
def test_any_interaction(seed: int) -> None:
    """Random numbers of fields, columns and maps, one column and one field among them: exact to the bit."""
    rng = np.random.default_rng(seed)
    users, items, dim, width = (int(k) for k in rng.integers((1, 1, 1, 1), (6, 4, 4, 6)))
    cin = CIN(str(rng.choice(["einsum", "mul", "matmul"])), users, items, dim)
    x1 = cin.layer(cin.x0, cin.count, width, seed)
    g = cin.head(x1, cin.layer(x1, width, 2, seed + 1)) if seed % 2 else cin.head(x1)
    for n in (2, 100000):
        optimised(g, cin.given, counts=COUNTS, candidates=n)


@pytest.mark.parametrize("reader", ["Relu", "output", "Softmax", "kernel"])
def test_interaction_not_before_a_linear_map(reader: str) -> None:
    """Products that something else reads are made."""
    cin = CIN("einsum")
    if reader == "kernel":  # it joins columns
        g = cin.head(cin.layer(cin.x0, cin.count, 4, kernel=3))
    else:
        y = cin.products(cin.x0, cin.count)
        g = cin.head(y if reader == "output" else cin.g.op(reader, y))
    result = optimised(g, cin.given, counts=COUNTS, tolerance=1e-6 if reader == "Softmax" else 0, candidates=N)
    assert "fold" not in rules(result)


def fold_of(place: list[list[int]], plain: list[list[int]] | None = None) -> Fold:
    one = np.zeros((1, 1, 1), np.int64)
    return Fold(one, one[0], np.arange(len(place)), np.array(place), np.array(plain or [], np.int64))


def test_order() -> None:
    """Entries by rows, where each belongs to one row and all rows have as many."""
    apart = [[0, -1], [-1, 1], [2, -1], [-1, 3]]
    np.testing.assert_array_equal(fold_of(apart).order, [[0, 2], [1, 3]])
    np.testing.assert_array_equal(fold_of([[-1, 0], [1, -1]]).order, [[1], [0]])
    assert fold_of([[0], [1]]).order is None  # one row
    assert fold_of([[0, 1], [2, -1], [-1, 3]]).order is None  # an entry of both rows
    assert fold_of([[0, -1], [1, -1], [-1, 2]]).order is None  # rows of different lengths
    assert fold_of([[0, -1], [-1, 1], [-1, -1]]).order is None  # an entry of no row
    assert fold_of(apart, [[0, 1]]).order is None


# --- the check -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [picked, one_by_one, crossed])
def test_float64_agrees(form: object) -> None:
    """With any numbers, the algebra agrees to 1e-10 in float64 and float32 is no worse than the original."""
    given = [request("u", USER, D), candidate("c", ITEM, D)]
    g = Graph()
    y, pairs = form(g, *(i.declare(g) for i in given), USER, ITEM)  # type: ignore[operator]
    rng = np.random.default_rng(0)
    h = g.op("Sigmoid", g.op("MatMul", g.op("Flatten", y), g.const(rng.normal(size=(pairs * D, 16)))))
    g.output(g.op("MatMul", h, g.const(rng.normal(size=(16, 1)))), ["N", 1])
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(g.model(), request=patterns(given), candidates=N, check=True)
    items = 0 if form is crossed else ITEM * (ITEM - 1) // 2
    assert result.report.after["candidate"].macs == N * ((ITEM + items) * D * 16 + 16)
    assert result.report.checks and all(c.passed for c in result.report.checks)
    assert not any("float64" in note for note in result.report.notes)
    assert "Sigmoid" in operators(result.model)


# --- factors per field -------------------------------------------------------------------------------------------

GATED = [request("u", 5, 4), candidate("c", 2, 4), candidate("a", 7, 1)]


def gated(g: Graph, form: str, outer: str = "MatMul") -> None:
    """Pairs of fields weighted by `a`, as in SENet and FiBiNET: a map of each left one, times the right one."""
    u, c, a = (i.declare(g) for i in GATED)
    x = g.op("Mul", g.op("Concat", u, c, axis=1), a)
    left, right = np.triu_indices(7, 1)
    if form == "shared":
        y = g.op("Gather", g.op("MatMul", x, g.const(whole_numbers(4, 4))), g.ints(*left), axis=1)
    elif form == "pairs first":
        y = g.op("MatMul", g.op("Gather", x, g.ints(*left), axis=1), g.const(whole_numbers(4, 4)))
    elif form == "by field":
        y = g.op("Einsum", x, g.const(whole_numbers(7, 4, 4)), equation="nfd,fde->nfe")
        y = g.op("Gather", y, g.ints(*left), axis=1)
    else:
        column = g.on_axes("Unsqueeze", g.op("Gather", x, g.ints(*left), axis=1), [3])
        y = g.on_axes("Squeeze", g.op("MatMul", g.const(whole_numbers(21, 4, 4)), column), [3])
    pairs = g.op("Mul", y, g.op("Gather", x, g.ints(*right), axis=1))
    if outer == "Relu":
        pairs = g.op("Relu", pairs)
    flat = g.op("Reshape", pairs, g.ints(-1, 21 * 4))
    g.output(g.op("MatMul", flat, g.const(whole_numbers(21 * 4, 3))), ["N", 3])


@pytest.mark.parametrize("form", ["shared", "pairs first", "by field", "by pair"])
def test_factors_per_field(form: str) -> None:
    """What only differs by a factor per candidate is mapped once, and pairs of such cost one weight per column."""
    g = Graph()
    gated(g, form)
    result = optimised(g, GATED, counts=(1, 2, 5, 9))
    both, rest = 10, 11  # pairs of two request-level fields, and others
    each = result.report.after["candidate"].macs / N
    # One field of the candidate's is mapped; the other is read as a right one only.
    assert each == 16 + both * 3 + rest * 4 * 3


def test_factors_and_a_step_that_is_not_linear() -> None:
    """Pairs that a Relu reads are made as they were."""
    g = Graph()
    gated(g, "shared", "Relu")
    result = optimised(g, GATED, counts=(1, 2, 5, 9))
    assert result.report.after["candidate"].macs == N * (6 * 16 + 21 * 4 * 3)


def test_factors_within_fields() -> None:
    """A factor for every entry of a field does not commute with a matrix."""
    given = [request("u", 5, 4), candidate("a", 5, 4)]
    g = Graph()
    x = g.op("Mul", *(i.declare(g) for i in given))
    y = g.op("Relu", g.op("MatMul", x, g.const(whole_numbers(4, 3))))
    g.output(y, ["N", 5, 3])
    result = optimised(g, given, counts=(1, 2, 5, 9))
    assert result.report.after["candidate"].macs == N * 5 * 4 * 3


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@drawn(st.lists(st.sampled_from("ucab"), min_size=2, max_size=6), st.booleans(), st.integers(0, 99))
def test_factors_of_any_fields(kinds: list[str], stacked: bool, seed: int) -> None:
    """Fields that are the request's, the candidate's, or the request's times one number or several of the candidate."""
    given = [request("u", len(kinds), 3), candidate("c", len(kinds), 3), candidate("a", len(kinds), 1)]
    g = Graph()
    u, c, a = (i.declare(g) for i in given)
    made = {"u": u, "c": c, "a": g.op("Mul", u, a), "b": g.op("Mul", c, u)}
    picked = [g.op("Slice", made[k], g.ints(at), g.ints(at + 1), g.ints(1)) for at, k in enumerate(kinds)]
    x = g.op("Concat", *picked, axis=1)
    w = whole_numbers(*((len(kinds),) if stacked else ()), 3, 3, seed=seed)
    y = g.op("Einsum", x, g.const(w), equation="nfd,fde->nfe") if stacked else g.op("MatMul", x, g.const(w))
    y = g.op("Mul", y, g.op("Gather", x, g.ints(*np.random.default_rng(seed).permutation(len(kinds))), axis=1))
    g.output(g.op("MatMul", g.op("Flatten", y), g.const(whole_numbers(3 * len(kinds), 2))), ["N", 2])
    optimised(g, given, counts=(1, 3, 8))
