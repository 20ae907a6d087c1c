"""What may be concluded from the times of models that ran in turns: speed-up, costs, break-even."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxrank.profiling.report import BreakEven, Call, Line, Point, Several, Speedup, Times
from onnxrank.turns import NARROW, RESOLUTION, Rounds, Run, interleave, interval, ratio

__all__ = [
    "NARROW",
    "RESOLUTION",
    "STRAIGHT",
    "Rounds",
    "Run",
    "break_even",
    "fit",
    "interleave",
    "interval",
    "point",
    "ratio",
    "several",
]

STRAIGHT = 0.05
"""Largest relative error of a straight line through the times for which it is not bent."""


def point(candidates: int, rounds: Rounds, copies: Sequence[float | None], peak: float) -> Point:
    """Sums up the rounds at one number of candidates.

    Args:
        candidates: The number.
        rounds: The times.
        copies: Per model, seconds per run for copies between host and device, where known.
        peak: Multiply-adds per second of one large product.
    """
    turns = np.median(rounds.seconds, axis=2)
    times = []
    for model, own, copied in zip(rounds.seconds, turns, copies, strict=True):
        every = model.reshape(-1)
        median, p90, p99 = (float(v) for v in np.percentile(every, (50, 90, 99)))
        low, high = interval(own)
        rate = candidates / median
        times.append(Times(every.size, median, min(low, median), max(high, median), p90, p99, rate, copied))
    return Point(candidates, tuple(times), _speedup(turns), rounds.settled, peak)


def _speedup(turns: NDArray[np.float64]) -> Speedup | None:
    if len(turns) != 2:
        return None
    middle, low, high = ratio(turns[0], turns[1])
    apart = (low > 1 or high < 1) and abs(math.log(middle)) > RESOLUTION
    return Speedup(middle, low, high, apart)


def several(requests: int, candidates: int, rounds: Rounds, together: Sequence[bool]) -> Several:
    """Sums up the rounds at one number of requests.

    Args:
        requests: The number.
        candidates: Number of candidates of each.
        rounds: The times, of all requests.
        together: Per model whether one call scores them all.
    """
    turns = np.median(rounds.seconds, axis=2)
    calls = []
    for model, own, one in zip(rounds.seconds, turns, together, strict=True):
        median = float(np.median(model))
        low, high = interval(own)
        each = median / requests
        calls.append(Call(one, model.size, median, min(low, median), max(high, median), each, each / candidates))
    return Several(requests, candidates, tuple(calls), _speedup(turns), rounds.settled)


def fitted(candidates: Sequence[int]) -> list[int]:
    """The numbers of candidates that a line is fitted to: all but 1, where there are three others."""
    several = [n for n in candidates if n > 1]
    return several if len(several) >= 3 else list(candidates)


def fit(candidates: Sequence[int], seconds: Sequence[float]) -> Line | None:
    """Fits costs to times: least squares of relative errors, no cost negative.

    A candidate costs more once the rows of all of them no longer fit a cache, so where one line misses a time by more
    than `STRAIGHT` the line may bend at one of the numbers measured. A single candidate runs other kernels (a product
    with one row is a product with a vector), so it only counts where there are fewer than three other numbers.

    Returns:
        The costs; None with fewer than two numbers of candidates.
    """
    n, t = np.array(candidates, np.float64), np.array(seconds, np.float64)
    if len(n) < 2:
        return None
    counted = np.isin(n, fitted(candidates))
    n, t = n[counted], t[counted]
    best = _bent(n, t, None)
    if best.error > STRAIGHT and len(n) > 3:
        best = min([best, *(_bent(n, t, int(k)) for k in n[1:-1])], key=lambda line: line.error)
    return best


def _bent(n: NDArray[np.float64], t: NDArray[np.float64], knee: int | None) -> Line:
    """The best line that bends at `knee`."""
    at = n.max() if knee is None else knee
    basis = np.stack([np.ones_like(n), np.minimum(n, at), np.maximum(n - at, 0)], axis=1) / t[:, None]
    count = 2 if knee is None else 3
    found: list[tuple[float, NDArray[np.float64]]] = []
    for mask in range(1, 1 << count):  # every set of costs that are not 0
        used = [k for k in range(count) if mask >> k & 1]
        costs = np.zeros(3)
        costs[used] = np.linalg.lstsq(basis[:, used], np.ones(len(n)), rcond=None)[0]
        if (costs >= 0).all():
            found.append((float(((basis @ costs - 1) ** 2).sum()), costs))
    _, (once, each, beyond) = min(found, key=lambda f: f[0])
    error = float(np.abs(basis @ [once, each, beyond] - 1).max())
    return Line(float(once), float(each), knee, float(each if knee is None else beyond), error)


def break_even(points: Sequence[Point], lines: Sequence[Line | None]) -> BreakEven:
    """From how many candidates on the second model is faster.

    Args:
        points: In ascending order of candidates.
        lines: Fitted costs of the two models.
    """
    gaps = [p.times[0].median - p.times[1].median for p in points]
    if all(g > 0 for g in gaps):
        return BreakEven("always", points[0].candidates)
    if gaps[-1] > 0:
        k = max(i for i, g in enumerate(gaps) if g <= 0)
        a, b = points[k].candidates, points[k + 1].candidates
        return BreakEven("measured", math.ceil(a - gaps[k] * (b - a) / (gaps[k + 1] - gaps[k])))
    first, second = lines
    if first is not None and second is not None and first.beyond > second.beyond:
        last = points[-1].candidates
        at = last + math.ceil((second.at(last) - first.at(last)) / (first.beyond - second.beyond))
        if at > last:
            return BreakEven("extrapolated", at)
    return BreakEven("never", None)
