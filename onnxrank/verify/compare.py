"""Distances between arrays: absolute, relative, in units in the last place; NaN and infinity count as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank.runtime import is_float

_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_KNOWN, _UNKNOWN = 32, 512


def epsilon(dtype: np.dtype[Any]) -> float:
    """Distance of 1 from the next number of a float type; 0 for other types."""
    return _EPSILON.get(dtype.name, 0.0)


def floor(dtype: np.dtype[Any], exact: bool) -> float:
    """Allowed difference in units of the output's scale: rounding of a few dozen operations.

    Args:
        dtype: Type of the output.
        exact: Whether the comparison is with a float64 truth (or else with the original's own rounded result).
    """
    return epsilon(dtype) * (_KNOWN if exact else _UNKNOWN)


@dataclass(frozen=True)
class Gap:
    """How far two arrays are apart.

    Attributes:
        largest: Largest absolute difference; infinite where shape or type differ, or only one is finite.
        at: Index of the worst element; None where they are equal or cannot be compared by element.
        reason: Why it is infinite.
    """

    largest: float
    at: tuple[int, ...] | None = None
    reason: str = ""


def gap(a: NDArray[Any], b: NDArray[Any]) -> Gap:
    """Compares two arrays; types must be of one kind, floats may differ in width."""
    if a.shape != b.shape:
        return Gap(float("inf"), None, f"shape {list(b.shape)} instead of {list(a.shape)}")
    if not is_float(a) or not is_float(b):
        if is_float(a) != is_float(b) or a.dtype.kind != b.dtype.kind:
            return Gap(float("inf"), None, f"type {b.dtype} instead of {a.dtype}")
        unequal = np.asarray(a != b)
        if not unequal.any():
            return Gap(0.0)
        at = _index(np.argmax(unequal), a.shape)
        if a.dtype.kind in "iu":
            x, y = a.astype(np.float64), b.astype(np.float64)
            return Gap(float(np.abs(x - y).max()), _index(np.argmax(np.abs(x - y)), a.shape))
        return Gap(float("inf"), at, "values differ")
    x, y = a.astype(np.float64), b.astype(np.float64)
    if not x.size:
        return Gap(0.0)
    with np.errstate(invalid="ignore"):
        same = (x == y) | (np.isnan(x) & np.isnan(y))
        distance = np.where(same, 0.0, np.abs(x - y))
    broken = ~np.isfinite(distance) | (np.isfinite(x) != np.isfinite(y))
    if broken.any():
        at = _index(np.argmax(broken), a.shape)
        return Gap(float("inf"), at, f"{x[at]:g} became {y[at]:g}")
    worst = int(np.argmax(distance))
    return Gap(float(distance.reshape(-1)[worst]), _index(worst, a.shape) if distance.any() else None)


def _index(flat: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(k) for k in np.unravel_index(int(flat), shape)) if shape else ()


def scale(data: NDArray[Any]) -> float:
    """Largest finite absolute value; 0 for types that are no floats."""
    if not is_float(data):
        return 0.0
    x = data.astype(np.float64)
    x = np.abs(x[np.isfinite(x)])
    return float(x.max()) if x.size else 0.0


def ulps(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Differences in units in the last place of `a`'s type, element by element, where both are finite.

    Floats of one sign are ordered as their bits are, so the distance is that of the bits, zero being in the middle.
    """
    if a.shape != b.shape or not is_float(a) or a.dtype.itemsize not in (2, 4, 8):
        return np.zeros(0)
    other = b.astype(a.dtype)
    with np.errstate(all="ignore"):
        finite = np.isfinite(a.astype(np.float64)) & np.isfinite(other.astype(np.float64))
    width = np.dtype(f"i{a.dtype.itemsize}")
    least = -(1 << (8 * a.dtype.itemsize - 1))

    def line(x: NDArray[Any]) -> NDArray[np.float64]:
        bits = np.ascontiguousarray(x[finite]).view(width).astype(np.int64)
        return np.where(bits < 0, -(bits - least), bits).astype(np.float64)

    return np.abs(line(a) - line(other))


def relative(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Smallest rtol with which `b` would pass for `a`; infinite where no rtol does."""
    if a.shape != b.shape or not is_float(a) or not is_float(b):
        return 0.0 if a.shape == b.shape and np.array_equal(a, b) else float("inf")
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    off = x != y
    if not off.any():
        return 0.0
    with np.errstate(divide="ignore"):
        return float((np.abs(x[off] - y[off]) / np.abs(x[off])).max())


def nudged(data: NDArray[Any], rng: np.random.Generator) -> NDArray[Any]:
    """Floats moved by one unit in the last place, up or down at random; zeros and what is no number stay."""
    if data.dtype.name == "bfloat16":
        return data
    up = rng.random(data.shape) < 0.5
    moved = np.nextafter(data, np.where(up, np.inf, -np.inf).astype(data.dtype))
    return np.where((data == 0) | ~np.isfinite(data), data, moved).astype(data.dtype)
