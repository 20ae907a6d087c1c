"""Linear maps of rows that were selected from fewer: each different row is mapped once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from helpers import Given, Graph, candidate, operators, optimised, request, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

N = 512
USERS, ITEMS, WIDTH = 3, 2, 8
GIVEN = [request("u", USERS, WIDTH), candidate("c", ITEMS, WIDTH)]
FIELDS = USERS + ITEMS
PAIRS = [(i, j) for i in range(FIELDS) for j in range(FIELDS)]


def pairs(out: int, chosen: Sequence[tuple[int, int]] = PAIRS, sides: Sequence[Given] = GIVEN) -> tuple[Graph, str]:
    """A linear map of pairs of fields, joined."""
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in sides), axis=1)
    both = [g.op("Gather", x, g.ints(*at), axis=1) for at in zip(*chosen, strict=True)]
    joined = g.op("Concat", *both, axis=2)
    return g, g.op("MatMul", joined, g.const(whole_numbers(2 * WIDTH, out)))


def test_edges_of_a_graph() -> None:
    """Every field is mapped once for each side of its edges, and nothing is gathered, in front of the map or behind."""
    g, y = pairs(1)
    g.output(g.op("Relu", g.op("Reshape", y, g.ints(-1, FIELDS, FIELDS))), ["N", FIELDS, FIELDS])
    result = optimised(g, GIVEN)
    assert result.report.macs_before == N * len(PAIRS) * 2 * WIDTH
    assert result.report.macs_after == 2 * WIDTH * (USERS + N * ITEMS)
    assert "Gather" not in operators(result.model)


def test_what_follows_may_need_the_rows_as_they_were() -> None:
    g, y = pairs(2)
    g.output(g.op("Relu", y), ["N", len(PAIRS), 2])
    assert optimised(g, GIVEN).report.macs_after == 2 * 2 * WIDTH * (USERS + N * ITEMS)


def test_wide_results_are_not_selected() -> None:
    """Moving them costs more than the products."""
    wide, chosen = 4096, [(3, 4), (3, 4), (4, 3)]
    g, y = pairs(wide, chosen)
    g.output(g.op("Relu", y), ["N", 3, wide])
    result = optimised(g, GIVEN, counts=(1, 3))
    assert result.report.macs_after == result.report.macs_before == N * 3 * 2 * WIDTH * wide


@pytest.mark.parametrize("chosen", [[(3, 4)], [(3, 4), (4, 3)], [(0, 3), (1, 4)]])
def test_rows_that_are_all_different_stay(chosen: Sequence[tuple[int, int]]) -> None:
    g, y = pairs(1, chosen)
    g.output(g.op("Relu", y), ["N", len(chosen), 1])
    result = optimised(g, GIVEN)
    own = sum((i >= USERS) + (j >= USERS) for i, j in chosen)
    assert result.report.after["candidate"].macs == N * own * WIDTH


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, FIELDS - 1), st.integers(0, FIELDS - 1)), min_size=1, max_size=7),
    st.sampled_from([1, 3]),
)
def test_any_pairs(chosen: list[tuple[int, int]], out: int) -> None:
    """Results are equal bit by bit, and no row is mapped more often than there are different ones, or rows."""
    g, y = pairs(out, chosen)
    g.output(g.op("Relu", y), ["N", len(chosen), out])
    result = optimised(g, GIVEN, counts=(1, 3, 7))
    rows = [sum(k >= USERS for k in at) for at in zip(*chosen, strict=True)]
    assert result.report.after["candidate"].macs <= N * sum(rows) * WIDTH * out
    if len(chosen) > 2 and out == 1:
        different = [len({k for k in at if k >= USERS}) for at in zip(*chosen, strict=True)]
        assert result.report.after["candidate"].macs <= N * sum(different) * WIDTH


def test_one_side_for_every_row() -> None:
    """Rows that are all alike are broadcast, as they were."""
    g, y = pairs(1, [(3, j) for j in range(FIELDS)])
    g.output(g.op("Relu", y), ["N", FIELDS, 1])
    assert optimised(g, GIVEN).report.after["candidate"].macs == N * WIDTH * (1 + ITEMS)
