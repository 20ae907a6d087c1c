"""Positions as ranges: written, read, and refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxrank.errors import UsageError
from onnxrank.roles import (
    format_ranges,
    parse_ranges,
)


def test_ranges() -> None:
    assert format_ranges((0, 1, 2, 20)) == "0:3,20"
    assert parse_ranges("0:3,20") == (0, 1, 2, 20)
    assert parse_ranges(" 20, 1 : 3 ,2") == (1, 2, 20)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_round_trip(positions: set[int]) -> None:
    assert parse_ranges(format_ranges(list(positions))) == tuple(sorted(positions))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a list of positions"),
        ("1,", "not a list of positions"),
        ("-1", "not a list of positions"),
        (":3", "not a list of positions"),
        ("0-3", "not a list of positions"),
        ("²", "not a list of positions"),
        ("3:3", "empty"),
        ("5:3", "empty"),
        ("0:99999999999", "limit"),
    ],
)
def test_bad_ranges(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_ranges(text)
