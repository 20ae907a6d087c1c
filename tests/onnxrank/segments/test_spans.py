"""What is claimed of entries by their position holds for every position and every extent."""

from __future__ import annotations

from itertools import product

import hypothesis
import pytest
from hypothesis import strategies as st

from onnxrank import extents as ex
from onnxrank.extents import Expr
from onnxrank.segments import spans
from onnxrank.segments.spans import ANY, TRUTH, Known, Span

L = ex.symbol("S:L")
NUMBERS = st.integers(-3, 3)


@st.composite
def ends(draw: st.DrawFn) -> int | Expr:
    """A polynomial of degree one in the length and the positions."""
    row, column, length, rest = (draw(NUMBERS) for _ in range(4))
    return row * ex.symbol("#1") + column * ex.symbol("#0") + length * L + rest


def value(end: object, row: int, column: int, length: int) -> float:
    """An end at one position."""
    if not isinstance(end, Expr):
        return float(end)  # type: ignore[arg-type]
    return ex.evaluate(end, {"#1": row, "#0": column, "S:L": length})


@hypothesis.given(ends(), ends(), st.sampled_from(["Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"]))
def test_comparisons(a: int | Expr, b: int | Expr, op: str) -> None:
    does = {
        "Equal": lambda x, y: x == y,
        "Less": lambda x, y: x < y,
        "LessOrEqual": lambda x, y: x <= y,
        "Greater": lambda x, y: x > y,
        "GreaterOrEqual": lambda x, y: x >= y,
    }[op]
    made = spans.compared(op, spans.of(Span(a, a)), spans.of(Span(b, b)), [L + 1, L])
    for length in range(6):
        for row, column in product(range(length), range(length + 1)):
            truth = does(value(a, row, column, length), value(b, row, column, length))
            for known in [made.all] + [made.diagonal] * (row == column):
                assert known.low <= truth <= known.high


@hypothesis.given(ends())
def test_ends_of_expressions(end: int | Expr) -> None:
    low, high = spans.least(end, [L, 3]), spans.greatest(end, [L, 3])
    for length in range(6):
        for row, column in product(range(3), range(length)):
            assert low <= value(end, row, column, length) <= high


def test_a_key_of_the_candidate_is_later_than_every_query_of_the_history() -> None:
    query, key = Span(ex.symbol("#1"), ex.symbol("#1")), Span(L, L)
    made = spans.compared("Greater", spans.of(key), spans.of(query), [1, L])
    assert made.all == Span(1, 1)
    own = spans.compared("Greater", spans.of(Span(ex.symbol("#0"), ex.symbol("#0"))), spans.of(query), [L, L])
    assert (own.all, own.diagonal) == (TRUTH, Span(0, 0))


def test_axes_that_move_take_positions_along() -> None:
    at = spans.of(Span(ex.symbol("#0"), ex.symbol("#0")))
    assert at.moved({0: 1}).all == Span(ex.symbol("#1"), ex.symbol("#1"))
    known = Known(TRUTH, Span(0, 0))
    assert known.moved({0: 0, 1: 1, 2: 3}).diagonal == Span(0, 0)
    assert known.moved({0: 1, 1: 0}).diagonal == TRUTH, "other entries are on the diagonal now"


numbers = st.sampled_from([float("-inf"), -2.0, -1.0, 0.0, 0.5, 1.0, float("inf")])


@hypothesis.given(st.lists(numbers, min_size=4, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_arithmetic(given: list[float], x: float, y: float) -> None:
    spans_of = [Span(*sorted(given[:2])), Span(*sorted(given[2:]))]
    a, b = (
        s.low if at < 0.5 or abs(s.high) == float("inf") else s.high for s, at in zip(spans_of, (x, y), strict=True)
    )
    assert isinstance(a, float) and isinstance(b, float)
    made = spans_of[0] + spans_of[1]
    if a + b == a + b:
        assert made.low <= a + b <= made.high  # type: ignore[operator]
    assert (-spans_of[0]).low <= -a <= (-spans_of[0]).high  # type: ignore[operator]
    joined = spans_of[0].hull(spans_of[1])
    assert joined.low <= min(a, b) and max(a, b) <= joined.high  # type: ignore[operator]
    for cut, want in ((spans_of[0].largest(spans_of[1]), max(a, b)), (spans_of[0].smallest(spans_of[1]), min(a, b))):
        assert cut.low <= want <= cut.high  # type: ignore[operator]
    truth = spans_of[0].truth()
    assert truth.low <= (a != 0) <= truth.high  # type: ignore[operator]
    for factor in (-2.0, 0.5):
        scaled = spans_of[0].times(factor)
        assert scaled.low <= a * factor <= scaled.high  # type: ignore[operator]


@pytest.mark.parametrize("a", [Span(0, 0), Span(1, 1), TRUTH])
@pytest.mark.parametrize("b", [Span(0, 0), Span(1, 1), TRUTH])
def test_truth(a: Span, b: Span) -> None:
    for x, y in product(range(int(a.low), int(a.high) + 1), range(int(b.low), int(b.high) + 1)):  # type: ignore[arg-type]
        for made, want in ((a.both(b), x and y), (a.either(b), x or y), (a.inverted(), not x)):
            assert made.low <= want <= made.high  # type: ignore[operator]
    assert a.both(Span(0, 0)) == Span(0, 0)
    assert a.either(Span(1, 1)) == Span(1, 1)


def test_what_is_not_known() -> None:
    expression = Span(L, L)
    assert expression.truth() == TRUTH
    assert expression.times(2.0) == ANY
    assert expression.hull(Span(0, 0)) == ANY
    assert expression.largest(Span(1, 1)) == Span(1, float("inf"))
    assert expression.smallest(Span(1, 1)) == Span(float("-inf"), 1)
    assert expression.number is None
    assert (expression + Span(0.5, 0.5)) == ANY
    assert spans.least(ex.product([ex.symbol("#0"), L]), [L]) == float("-inf")


@pytest.mark.parametrize(
    ("dtype", "masked", "visible", "hidden"),
    [
        (1, float("-inf"), -1e9, True),
        (1, -1e9, 0.0, True),
        (1, -1e5, 0.0, False),
        (10, -1e5, 0.0, True),
        (1, -1.000001e13, -1e13, False),
        (11, -1.000001e13, -1e13, True),
    ],
)
def test_hiding(dtype: int, masked: float, visible: float, hidden: bool) -> None:
    assert spans.hides(dtype, masked, visible) == hidden
