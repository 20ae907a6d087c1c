"""Selections of the same positions of every row become a Gather of these; others are left as they are."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import numpy as np
import pytest
from helpers import Given, Graph, candidate, operators, optimised, request, rewritten, whole_numbers
from hypothesis import strategies as st
from numpy.typing import NDArray

FIELDS = [request("u", 3, 2), candidate("c", 2, 2)]


def select(g: Graph, x: str, mask: str) -> str:
    """`masked_select(x, mask)` as exporters write it."""
    wide = g.op("Expand", mask, g.op("Shape", x))
    return g.op("GatherND", x, g.op("Transpose", g.op("NonZero", wide), perm=[1, 0]))


def pairs(mask: NDArray[np.bool_], opset: int = 17) -> tuple[Graph, list[Given]]:
    """Products of pairs of fields, those of a mask, behind a layer."""
    g = Graph(opset)
    x = g.op("Concat", *(i.declare(g) for i in FIELDS), axis=1)
    products = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    chosen = g.op("Reshape", select(g, products, g.const(mask, bool)), g.ints(-1, int(mask.sum())))
    g.output(g.op("MatMul", chosen, g.const(whole_numbers(int(mask.sum()), 2))), ["N", 2])
    return g, FIELDS


@pytest.mark.parametrize("opset", [13, 17, 21])
def test_pairs_of_a_triangle(opset: int) -> None:
    result = optimised(*pairs(np.triu(np.ones((5, 5), bool), 1), opset), counts=(0, 1, 2, 5, 300))
    assert not {"NonZero", "GatherND"} & set(operators(result.model))
    assert result.report.macs_after < 0.8 * result.report.macs_before


@pytest.mark.slow
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(st.lists(st.booleans(), min_size=25, max_size=25).filter(any))
def test_any_mask(bits: list[bool]) -> None:
    optimised(*pairs(np.array(bits).reshape(5, 5)), counts=(0, 1, 7))


def test_a_mask_of_the_request_is_left_alone() -> None:
    g = Graph()
    given = [request("mask", 4), candidate("c", 4)]
    mask, c = (i.declare(g) for i in given)
    g.output(select(g, c, g.op("Greater", mask, g.const(0.0))), ["M"])
    assert "GatherND" in operators(rewritten(g.model(), request=["mask"]).model)


def test_a_mask_of_nothing_is_left_alone() -> None:
    g = Graph()
    given = [request("u", 4), candidate("c", 4)]
    u, c = (i.declare(g) for i in given)
    g.output(select(g, g.op("Add", u, c), g.const(np.zeros(4), bool)), ["M"])
    assert "NonZero" in operators(rewritten(g.model(), request=["u"]).model)


def of_own_row(g: Graph, x: str, positions: str, first: int = 0) -> str:
    """`x[arange(first, first + rows)[:, None], positions]` as exporters write it, for `positions` [1, K]."""
    one, zero = g.const(1, np.int64), g.const(first, np.int64)
    rows = g.op("Range", zero, g.op("Add", g.op("Gather", g.op("Shape", x), g.const(0, np.int64)), zero), one)
    column = g.on_axes("Unsqueeze", rows, [1])
    both = g.op("Shape", g.op("Max", column, positions))
    wide = [g.on_axes("Unsqueeze", g.op("Expand", i, both), [-1]) for i in (column, positions)]
    return g.op("GatherND", x, g.op("Concat", *wide, axis=-1))


def encoder(mask: Given, positions: Callable[[Graph], str], first: int = 0) -> tuple[Graph, list[Given]]:
    """Self-attention of a history under a mask that is read by rows and positions, then the candidate's product."""
    g = Graph()
    given = [request("u", "L", 4), mask, candidate("c", 4)]
    u, m, c = (i.declare(g) for i in given)
    picked = g.on_axes("Unsqueeze", of_own_row(g, m, positions(g), first), [1])
    keys = g.op("MatMul", u, g.op("Transpose", g.op("MatMul", u, g.const(whole_numbers(4, 4))), perm=[0, 2, 1]))
    read = g.op("MatMul", g.op("Mul", keys, picked), u)
    g.output(g.op("Mul", g.on_axes("ReduceSum", read, [1], keepdims=0), c), ["N", 4])
    return g, given


def all_positions(g: Graph) -> str:
    length = g.op("Gather", g.op("Shape", "u"), g.const(1, np.int64))
    numbers = g.op("Range", g.const(0, np.int64), length, g.const(1, np.int64))
    return g.on_axes("Unsqueeze", numbers, [0])


@pytest.mark.parametrize("length", ["L", 6])
def test_positions_of_own_rows(length: int | str) -> None:
    constant = None if length == "L" else np.array([[5, 0, 2, 2, 1, 4]])
    positions = all_positions if constant is None else lambda g: g.const(constant, np.int64)
    g, given = encoder(request("mask", length), positions)
    lengths = [{"L": n} for n in ((0, 1, 3, 70) if constant is None else (6,))]
    result = optimised(g, given, lengths=lengths, counts=(1, 2, 5, 300))
    assert "GatherND" not in operators(result.model)
    assert result.report.macs_after < 0.1 * result.report.macs_before


def test_positions_of_other_rows_are_left_alone() -> None:
    g, given = encoder(request("mask", "L"), all_positions, first=-1)
    result = optimised(g, given, lengths=[{"L": 3}], counts=(2, 5, 300))
    assert "GatherND" in operators(result.model)


def test_every_second_number_is_none_of_a_row() -> None:
    """From -N to N by 2 there are N numbers, too, and all of them name rows."""
    g, given = Graph(), [request("u", 6, 4), candidate("c", 6, 4)]
    u, c = (i.declare(g) for i in given)
    count = g.op("Gather", g.op("Shape", c), g.const(0, np.int64))
    rows = g.op("Range", g.op("Neg", count), count, g.const(2, np.int64))
    positions = g.const([[1, 4]], np.int64)
    both = g.op("Concat", g.op("Reshape", count, g.ints(1)), g.ints(2, 1), axis=0)
    wide = [g.op("Expand", g.on_axes("Unsqueeze", i, a), both) for i, a in ((rows, [1, 2]), (positions, [2]))]
    pairs = g.op("Concat", *wide, axis=-1)
    g.output(g.op("Add", g.op("GatherND", u, pairs), g.op("GatherND", c, pairs)), ["N", 2, 4])
    optimised(g, given, counts=(1, 2, 5, 300))
