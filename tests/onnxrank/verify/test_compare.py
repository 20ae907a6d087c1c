"""Distances between arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxrank.verify import compare

FLOATS = hnp.arrays(np.float32, st.integers(0, 6), elements=st.floats(width=32))


@given(FLOATS)
def test_equal(a: np.ndarray) -> None:
    """NaN and infinity are values: an array equals itself."""
    assert compare.gap(a, a.copy()).largest == 0
    assert compare.ulps(a, a).max(initial=0) == 0
    assert compare.relative(a, a) == 0


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([1, np.nan], [1, 2], "nan became 2"),
        ([1, 2], [np.nan, 2], "1 became nan"),
        ([np.inf, 2], [-np.inf, 2], "inf became -inf"),
        ([np.inf, 2], [np.nan, 2], "inf became nan"),
    ],
)
def test_not_a_number(a: list[float], b: list[float], reason: str) -> None:
    found = compare.gap(np.array(a, np.float32), np.array(b, np.float32))
    assert found.largest == np.inf and found.reason == reason and found.at is not None


def test_shapes_and_types() -> None:
    x = np.zeros((2, 3), np.float32)
    assert compare.gap(x, x[:1]).reason == "shape [1, 3] instead of [2, 3]"
    assert compare.gap(x, x.astype(np.int64)).largest == np.inf
    assert compare.gap(x, x.astype(np.float64)).largest == 0
    assert compare.gap(np.array([1, 5]), np.array([1, 2])) == compare.Gap(3.0, (1,))
    assert compare.gap(np.array(["a"], object), np.array(["b"], object)).at == (0,)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 40))
def test_ulps_count_steps(start: float, steps: int) -> None:
    """Across zero too."""
    x = np.float32(start)
    y = x
    with np.errstate(over="ignore"):
        for _ in range(steps):
            y = np.nextafter(y, np.float32(-np.inf))
    if np.isfinite(y):
        assert compare.ulps(np.array([x]), np.array([y])) == [steps]


def test_relative_and_scale() -> None:
    a = np.array([2.0, -4.0, np.inf, 0.0])
    b = np.array([2.0, -3.0, np.inf, 0.0])
    assert compare.relative(a, b) == 0.25
    assert compare.relative(a, b + 1) == np.inf
    assert compare.scale(a) == 4
    assert compare.floor(np.dtype(np.float32), True) == 32 * 2.0**-23
    assert compare.floor(np.dtype(np.int64), True) == 0
