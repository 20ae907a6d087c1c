"""`masked_select` by a constant mask takes known positions; by any other it is left as it is."""

from __future__ import annotations

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


@hypothesis.settings(max_examples=25, deadline=None)
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
