"""One product of two computed operands."""

from __future__ import annotations

import pytest
from helpers import Graph, candidate, optimised, request, rows


@pytest.mark.parametrize(("lines", "inner", "together"), [(2, 8, True), (12, 8, True), (24, 8, False), (32, 16, False)])
def test_rows_of_a_stack(lines: int, inner: int, together: bool) -> None:
    """Rows of all candidates are brought side by side where that costs less than a product for each candidate."""
    given = [request("k", 4, inner, 40), candidate("q", 4, lines, inner)]
    g = Graph()
    k, q = (i.declare(g) for i in given)
    g.output(g.op("MatMul", g.op("Relu", q), g.op("Relu", k)), ["N", 4, lines, 40])
    result = optimised(g, given)
    extents = rows(result, given, 50)
    (product,) = (n for n in result.model.graph.node if n.op_type == "MatMul")
    assert (extents[product.input[0]] == 50 * lines) == together
