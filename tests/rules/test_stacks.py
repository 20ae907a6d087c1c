"""Stacks of constant matrices: a linear map of its own for every position of an axis that holds several levels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import Graph, candidate, operators, optimised, request, rules, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

USER, ITEM, WIDTH, OUT = 5, 3, 4, 2
N = 512
COUNTS = (1, 2, 5, 9)
"""Not 0: onnxruntime's batched products of no rows end the process."""


def tokens(g: Graph, order: np.ndarray) -> str:
    """[N, tokens, width] of both levels, in an order."""
    x = g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)
    return g.op("Gather", x, g.ints(*order), axis=1)


GIVEN = [request("u", USER, WIDTH), candidate("c", ITEM, WIDTH)]


def turned(g: Graph, x: str, w: np.ndarray) -> str:
    """Tokens in front, as per-token feed-forward layers are often written."""
    y = g.op("MatMul", g.op("Transpose", x, perm=[1, 0, 2]), g.const(w))
    return g.op("Transpose", y, perm=[1, 0, 2])


def row(g: Graph, x: str, w: np.ndarray) -> str:
    """A row per token, times its matrix."""
    y = g.op("MatMul", g.on_axes("Unsqueeze", x, [2]), g.const(w))
    return g.on_axes("Squeeze", y, [2])


def column(g: Graph, x: str, w: np.ndarray) -> str:
    """The matrix on the left of a column."""
    y = g.op("MatMul", g.const(w.transpose(0, 2, 1)), g.on_axes("Unsqueeze", x, [3]))
    return g.on_axes("Squeeze", y, [3])


def matrix(g: Graph, x: str, w: np.ndarray) -> str:
    """The matrix on the left of a matrix: two columns per token."""
    two = g.op("Reshape", x, g.ints(-1, len(w), WIDTH // 2, 2))
    left = w[:, : WIDTH // 2].transpose(0, 2, 1)
    return g.op("Reshape", g.op("MatMul", g.const(left), two), g.ints(-1, len(w), 2 * w.shape[-1]))


def einsum(g: Graph, x: str, w: np.ndarray) -> str:
    return g.op("Einsum", x, g.const(w), equation="nfd,fde->nfe")


def turned_einsum(g: Graph, x: str, w: np.ndarray) -> str:
    """The weights first, and another order of the result's axes."""
    y = g.op("Einsum", g.const(w.transpose(2, 0, 1)), x, equation="efd,nfd->fen")
    return g.op("Transpose", y, perm=[2, 0, 1])


def ellipsis(g: Graph, x: str, w: np.ndarray) -> str:
    return g.op("Einsum", x, g.const(w), equation="...fd,fde->...fe")


def convolved(g: Graph, x: str, w: np.ndarray) -> str:
    """Channels in groups."""
    channels = g.op("Reshape", x, g.ints(-1, x_width(w), 1))
    kernel = w.transpose(0, 2, 1).reshape(-1, w.shape[1], 1)
    bias = g.const(whole_numbers(len(kernel), seed=7))
    y = g.op("Conv", channels, g.const(kernel), bias, group=len(w), kernel_shape=[1])
    return g.op("Reshape", y, g.ints(-1, len(w), w.shape[2]))


def x_width(w: np.ndarray) -> int:
    return w.shape[0] * w.shape[1]


Form = Callable[[Graph, str, np.ndarray], str]
FORMS: list[Form] = [turned, row, column, matrix, einsum, turned_einsum, ellipsis, convolved]


def made(form: Form) -> int:
    """Entries that come of each token."""
    return 2 * OUT if form is matrix else OUT


def through(form: Form, order: np.ndarray) -> Graph:
    g = Graph()
    x = tokens(g, order)
    y = form(g, x, whole_numbers(len(order), WIDTH, OUT))
    y = g.op("Relu", g.op("Reshape", y, g.ints(-1, len(order) * made(form))))
    g.output(g.op("MatMul", y, g.const(whole_numbers(len(order) * made(form), 1))), ["N", 1])
    return g


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", [None, 1])
def test_forms(form: Form, seed: int | None) -> None:
    """Tokens in order or shuffled: the request's are multiplied once, in any form."""
    order = np.arange(USER + ITEM) if seed is None else np.random.default_rng(seed).permutation(USER + ITEM)
    result = optimised(through(form, order), GIVEN, counts=COUNTS)
    assert rules(result)["fc"] >= 1
    # And the layer behind, whose columns are divided too.
    each = WIDTH * OUT + made(form)
    assert result.report.macs_after == (USER + N * ITEM) * each
    assert "Conv" not in operators(result.model) and "Einsum" not in operators(result.model)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH), min_size=2, max_size=5), st.sampled_from(FORMS)
)
def test_any_entries(levels: list[list[bool]], form: Form) -> None:
    """Any entries of any token may be candidate-level; results are equal bit by bit, and no product is made twice."""
    where = np.array(levels)
    count, free = len(where), int(where.sum())
    sides = [request("u", max(1, where.size - free)), candidate("c", max(1, free))]
    g = Graph()
    flat = np.empty(where.size, np.int64)
    flat[~where.reshape(-1)] = np.arange(where.size - free)
    flat[where.reshape(-1)] = np.arange(free) + sides[0].shape[0]
    x = g.op("Concat", *(i.declare(g) for i in sides), axis=1)
    x = g.op("Reshape", g.op("Gather", x, g.ints(*flat), axis=1), g.ints(-1, count, WIDTH))
    g.output(g.op("Relu", form(g, x, whole_numbers(count, WIDTH, OUT))), ["N", count, made(form)])
    result = optimised(g, sides, counts=(1, 3, 7))
    if form is not matrix and 0 < free < where.size:
        assert result.report.macs_after == (where.size - free + N * free) * OUT


@pytest.mark.parametrize("form", [einsum, turned, column])
def test_levels_within_tokens(form: Form) -> None:
    """Tokens with entries of both levels: each is the sum of two products, of which the request's is made once."""
    sides = [request("u", USER, WIDTH - 1), candidate("c", USER, 1)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in sides), axis=2)
    g.output(g.op("Relu", form(g, x, whole_numbers(USER, WIDTH, OUT))), ["N", USER, OUT])
    result = optimised(g, sides, counts=COUNTS)
    assert result.report.macs_after == USER * OUT * (WIDTH - 1 + N)


def test_the_same_for_all() -> None:
    """One vector that every matrix is multiplied with: the matrices lie side by side in one product per level."""
    sides = [request("u", 3), candidate("c", 2)]
    g = Graph()
    x = g.on_axes("Unsqueeze", g.op("Concat", *(i.declare(g) for i in sides), axis=1), [0])
    g.output(g.op("Relu", g.op("MatMul", x, g.const(whole_numbers(4, 5, 6)))), [4, "N", 6])
    result = optimised(g, sides, counts=COUNTS)
    assert result.report.macs_after == 4 * 6 * (3 + 2 * N)
    assert {len(t.dims) for t in result.model.graph.initializer if t.data_type == 1} == {2}


def test_heads() -> None:
    """Weights per head and an axis of positions besides, some of which nobody reads."""
    sides = [request("u", 4, 2, 3), candidate("c", 2, 2, 3)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in sides), axis=1)
    y = g.op("Einsum", x, g.const(whole_numbers(2, 3, 5)), equation="nlhd,hde->nlhe")
    y = g.op("Slice", y, g.ints(2), g.ints(6), g.ints(1))
    g.output(g.op("Relu", y), ["N", 4, 2, 5])
    result = optimised(g, sides, counts=COUNTS)
    assert result.report.macs_after == 2 * 3 * 5 * (2 + 2 * N)


def test_weights_that_are_computed() -> None:
    """Weights that the model itself makes of constants are cut by nodes, and not rounded here."""
    g = Graph()
    x = tokens(g, np.arange(USER + ITEM))
    w = g.op("MatMul", g.const(whole_numbers(USER + ITEM, WIDTH, 3)), g.const(whole_numbers(3, OUT, seed=2)))
    y = g.op("MatMul", g.op("Transpose", x, perm=[1, 0, 2]), w)
    g.output(g.op("Relu", y), [USER + ITEM, "N", OUT])
    result = optimised(g, GIVEN, counts=COUNTS)
    assert rules(result)["fc"] == 1
    shapes = {tuple(t.dims) for t in result.model.graph.initializer}
    assert (USER + ITEM, WIDTH, 3) in shapes and (ITEM, WIDTH, OUT) not in shapes


@pytest.mark.parametrize("form", FORMS)
def test_one_level(form: Form) -> None:
    """Where all tokens are the candidate's there is nothing to divide, and the node stays."""
    sides = [request("u", 2), candidate("c", ITEM, WIDTH)]
    g = Graph()
    u, c = (i.declare(g) for i in sides)
    y = form(g, c, whole_numbers(ITEM, WIDTH, OUT))
    y = g.op("Reshape", y, g.ints(-1, ITEM * made(form)))
    joined = g.op("Concat", y, u, axis=1)
    g.output(g.op("MatMul", joined, g.const(whole_numbers(ITEM * made(form) + 2, 1))), ["N", 1])
    result = optimised(g, sides, counts=COUNTS)
    kept = next(n for n in result.model.graph.node if n.op_type in ("MatMul", "Einsum", "Conv"))
    assert kept.name in {n.name for n in g.nodes}
