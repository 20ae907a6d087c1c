"""`fm`: the two sums over fields of a factorisation machine, by level."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Graph, candidate, operators, optimised, request, rules, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

N = 512
USERS, ITEMS, WIDTH = 6, 3, 4
GIVEN = [request("u", USERS, WIDTH), candidate("c", ITEMS, WIDTH)]


def fields() -> tuple[Graph, str]:
    g = Graph()
    return g, g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)


def square(g: Graph, x: str, how: str) -> str:
    return g.op("Mul", x, x) if how == "Mul" else g.op("Pow", x, g.const(2))


def second_order(g: Graph, x: str, how: str = "Mul", keepdims: int = 0, axis: int = 1) -> str:
    """`(sum x)^2 - sum x^2`, `[N, WIDTH]`."""
    sums = [g.on_axes("ReduceSum", v, [axis], keepdims=keepdims) for v in (x, square(g, x, how))]
    if keepdims:
        sums = [g.on_axes("Squeeze", s, [axis]) for s in sums]
    return g.op("Sub", square(g, sums[0], how), sums[1])


@pytest.mark.parametrize("how", ["Mul", "Pow"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_second_order(how: str, keepdims: int) -> None:
    """Both sums are divided, and nothing of the request's fields is made for every candidate."""
    g, x = fields()
    pairs = second_order(g, x, how, keepdims)
    g.output(g.op("Mul", g.on_axes("ReduceSum", pairs, [1], keepdims=1), g.const(0.5)), ["N", 1])
    result = optimised(g, GIVEN)
    assert rules(result)["fm"] == 2 and "pool" not in rules(result)
    assert operators(result.model).count("ReduceSum") == 5


def test_before_a_layer() -> None:
    """NFM: the pooled products go into a layer instead of being summed up."""
    g, x = fields()
    g.output(g.op("MatMul", second_order(g, x), g.const(whole_numbers(WIDTH, 3))), ["N", 3])
    assert rules(optimised(g, GIVEN))["fm"] == 2


@pytest.mark.parametrize("left", ["squares", "sum"])
def test_half_of_it(left: str) -> None:
    """A sum of squares, or a squared sum, is no factorisation machine by itself."""
    g, x = fields()
    if left == "squares":
        y = g.on_axes("ReduceSum", square(g, x, "Mul"), [1], keepdims=0)
    else:
        y = square(g, g.on_axes("ReduceSum", x, [1], keepdims=0), "Mul")
    g.output(y, ["N", WIDTH])
    found = rules(optimised(g, GIVEN))
    assert "fm" not in found and found["pool"] == 1


def test_another_power() -> None:
    """Cubes are none."""
    g, x = fields()
    first = g.op("Pow", g.on_axes("ReduceSum", x, [1], keepdims=0), g.const(3))
    g.output(g.op("Sub", first, g.on_axes("ReduceSum", g.op("Pow", x, g.const(3)), [1], keepdims=0)), ["N", WIDTH])
    assert "fm" not in rules(optimised(g, GIVEN))


def test_over_candidates() -> None:
    """Sums over the candidates are refused, by the rule's name."""
    g, x = fields()
    pairs = g.on_axes("ReduceSum", second_order(g, x, axis=0), [0, 1], keepdims=0)
    g.output(g.op("Add", g.on_axes("ReduceSum", x, [1, 2], keepdims=0), pairs), ["N"])
    result = optimised(g, GIVEN)
    assert "fm" not in rules(result)
    assert any(r.rule == "fm" and "over the candidates" in r.reason for r in result.report.refusals)


def test_left_out() -> None:
    """`ignore` leaves the sums to `pool`."""
    g, x = fields()
    g.output(second_order(g, x), ["N", WIDTH])
    assert rules(optimised(g, GIVEN, ignore=["fm"]))["pool"] == 2


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    users=st.integers(1, 5),
    items=st.integers(1, 4),
    width=st.integers(1, 4),
    how=st.sampled_from(["Mul", "Pow"]),
    seed=st.integers(0, 99),
)
def test_any_fields(users: int, items: int, width: int, how: str, seed: int) -> None:
    """Any number of fields, in any order: exact to the bit."""
    inputs = [request("u", users, width), candidate("c", items, width)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in inputs), axis=1)
    order = np.random.default_rng(seed).permutation(users + items)
    x = g.op("Gather", x, g.ints(*order), axis=1)
    g.output(second_order(g, x, how), ["N", width])
    assert rules(optimised(g, inputs))["fm"] == 2
