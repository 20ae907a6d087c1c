"""The algebra of symbolic extents, against Python's integers."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxrank import extents as ex
from onnxrank.extents import Expr, Unproved, symbol

N, L = symbol("N"), symbol("S:L")
_VALUES = st.fixed_dictionaries({"N": st.integers(0, 4096), "S:L": st.integers(0, 1024)})


def _apply(op: str, a: int | Expr, b: int | Expr) -> int | Expr:
    if op == "+":
        return a + b
    if op == "-":
        return a - b
    if op == "*":
        return a * b
    if op == "//":
        return ex.floor_divide(a, b)
    if op == "%":
        return ex.modulo(a, b)
    return ex.minimum(a, b) if op == "min" else ex.maximum(a, b)


def _number(op: str, a: int, b: int) -> int:
    return {
        "+": a + b,
        "-": a - b,
        "*": a * b,
        "//": a // b if b else 0,
        "%": a % b if b else 0,
        "min": min(a, b),
        "max": max(a, b),
    }[op]


_PROGRAMS = st.lists(
    st.tuples(st.sampled_from(["+", "-", "*", "//", "%", "min", "max"]), st.integers(0, 9), st.integers(-3, 12)),
    min_size=1,
    max_size=6,
)


@given(_PROGRAMS, _VALUES)
def test_every_operation_is_that_of_integers(program: list[tuple[str, int, int]], values: dict[str, int]) -> None:
    stack: list[int | Expr] = [N, L, 7]
    numbers = [values["N"], values["S:L"], 7]
    for op, at, constant in program:
        other, number = (stack[at], numbers[at]) if at < len(stack) else (constant, constant)
        try:
            made = _apply(op, stack[-1], other)
        except Unproved:
            continue
        if op in ("//", "%") and number == 0:
            continue  # no model divides by 0
        stack.append(made)
        numbers.append(_number(op, numbers[-1], number))
        assert ex.evaluate(made, values) == numbers[-1]
        low, high = ex.bounds(made)
        assert low <= numbers[-1] <= high


@given(_PROGRAMS, _VALUES)
def test_factors_multiply_to_the_whole(program: list[tuple[str, int, int]], values: dict[str, int]) -> None:
    made: int | Expr = N * L
    for op, at, constant in program:
        if op in ("+", "-", "*"):
            made = _apply(op, made, [N, L, constant][at % 3])
    c, found = ex.factors(made)
    total = c
    for f in found:
        total *= values[f] if isinstance(f, str) else ex.evaluate(f, values)
    assert total == ex.evaluate(made, values)


def test_equal_polynomials_are_equal() -> None:
    assert (N + 1) * (L + 2) == N * L + 2 * N + L + 2
    assert hash((N + 1) * L) == hash(L + L * N)
    assert N - N == 0 and isinstance(N - N, int)
    assert 3 * N + N * -3 + 5 == 5


def test_exact_division() -> None:
    assert ex.divide(N * (L + 1) * 64, (L + 1) * 64) == N
    assert ex.divide(N * L * 50, 50 * N) == L
    assert ex.divide(N + 1, N) is None
    assert ex.divide(7 * N, 2) is None
    assert ex.divide(N * L + N, L + 1) == N


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (ex.minimum(L, 50), "min(S:L, 50)"),
        (ex.minimum(ex.minimum(L, 50), 20), "min(S:L, 20)"),
        (ex.maximum(L, 0), "S:L"),
        (ex.maximum(N - 1, 0), "max(N - 1, 0)"),
        (ex.floor_divide(4 * N + 3, 4), "N"),
        (ex.floor_divide(4 * N - 1, 4), "N - 1"),
        (ex.floor_divide(N + 1, 2), "((N + 1) // 2)"),
        (ex.modulo(6 * N + 7, 3), "1"),
        (ex.maximum(L - ex.maximum(L - 49, 0), 0), "min(S:L, 49)"),
        (ex.minimum(N - ex.minimum(N, 4), 7), "min(max(N - 4, 0), 7)"),
        (2 * N * L - 3, "2*N*S:L - 3"),
    ],
)
def test_canonical_form(made: int | Expr, text: str) -> None:
    assert str(made) == text


def test_bounds() -> None:
    assert ex.bounds(ex.minimum(L, 50) * 2 + 1) == (1, 101)
    assert ex.bounds(N - L) == (-inf, inf)


def test_extents_cut_to_constants() -> None:
    assert ex.is_cut_of(ex.minimum(L + 1, 80), L + 1) and ex.is_cut_of(ex.minimum(ex.minimum(L, 80), 9), L)
    assert not ex.is_cut_of(ex.minimum(L, N), L), "N may be 0, or 1, where L is not"
    assert not ex.is_cut_of(L, L) and not ex.is_cut_of(ex.minimum(L, 80), N) and not ex.is_cut_of(80, L)
    assert not ex.is_cut_of(ex.minimum(L, 0), L)


def test_truth_of_an_expression_is_not_guessed() -> None:
    with pytest.raises(Unproved, match="whether N is 0"):
        bool(N)


def test_division_by_what_may_be_negative_is_unproved() -> None:
    with pytest.raises(Unproved):
        ex.floor_divide(N, L - 3)
    with pytest.raises(Unproved):
        ex.modulo(N, L)


@given(_PROGRAMS, _VALUES, st.integers(0, 40))
def test_others_in_the_place_of_symbols(
    program: list[tuple[str, int, int]], values: dict[str, int], least: int
) -> None:
    """An extent of `L + least` is that of a longer history, and none of `min` goes that may count."""
    size: int | Expr = L
    for op, _, constant in program:
        try:
            size = _apply(op, size, constant)
        except Unproved:
            continue
    try:
        longer = ex.replaced(size, {"S:L": L + least})
    except Unproved:
        return
    at = values["S:L"]
    assert ex.evaluate(longer, values) == ex.evaluate(size, {**values, "S:L": at + least})
    for most in (at, at + 3):
        assert ex.evaluate(ex.within(size, {"S:L": most}), values) == ex.evaluate(size, values)


def test_extents_that_are_equal_wherever_a_model_runs() -> None:
    last = ex.minimum(L + 5, 7)
    assert ex.least_where(last, 7) == {"S:L": 2}
    assert ex.least_where(last * 8 - 16, 40) == {"S:L": 2}
    assert ex.least_where(last * 8, 57) == ex.least_where(L + 5, 7) == ex.least_where(7, 7) == {}
    assert ex.least_where(ex.maximum(L, 7), 9) == {}
    assert ex.most_where(ex.minimum(L + 1, 1001), L + 1) == {"S:L": 1000}
    assert ex.most_where(ex.minimum(L, 1), L) == ex.most_where(ex.minimum(L, 9), L + 1) == {}
    assert ex.within(ex.minimum(L + 5, 1005) * 2, {"S:L": 1000}) == L * 2 + 10
    assert isinstance(ex.within(ex.minimum(L + 5, 1004), {"S:L": 1000}), Expr)
    assert ex.within(ex.minimum(L + 5, 1004), {"S:L": 1000}) != L + 5
    inner = ex.maximum(ex.minimum(L + 5, 1005) - L - 3, 0)
    assert ex.within(inner, {"S:L": 1000}) == 2


def test_what_is_never_the_least_is_no_operand() -> None:
    assert ex.minimum(ex.minimum(L + 1, 1001), L) == ex.minimum(L, 1001)
    assert ex.maximum(ex.maximum(L, 9), L + 1) == ex.maximum(L + 1, 9)
