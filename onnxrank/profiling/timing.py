"""Interleaved timing of several models, and what may be concluded from it.

The models take *turns*, each a few runs of one model behind one run that is not timed, which brings its data back into
the caches. A turn is the unit of the statistics: runs within one share what the machine was doing. The order within a
round of turns alternates, so that a drift of the machine's speed hits all models alike, and the speed-up is the median
over the rounds of the ratio of the two turns' medians. Its 95 % interval, and those of the medians, are percentile
bootstraps over rounds (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxrank.profiling.report import BreakEven, Line, Point, Speedup, Times

Run = Callable[[int], float]
"""Runs a request, named by its number, and returns the seconds it took."""

RESOLUTION = 0.02
"""Two sessions of one model differ by up to so much, by where their memory lies; no smaller difference is reported."""
STRAIGHT = 0.05
"""Largest relative error of a straight line through the times for which it is not bent."""
NARROW = 0.01
"""Half the width of an interval, relative to its middle, that is narrow enough to stop."""
_TURN = 0.05  # seconds that a turn should take
_LONG = 0.25  # seconds of a run that gains nothing from warm caches
_MOST_IN_TURN = 50
_FEWEST_ROUNDS = 12
_LOOK_AGAIN = 1.25  # times as many rounds
_RESAMPLES = 1000
_MOST_ROUNDS = 1000  # in a bootstrap
_SIDES = (2.5, 97.5)


@dataclass(frozen=True)
class Rounds:
    """Times of several models in rounds of turns.

    Attributes:
        seconds: `[models, rounds, runs of a turn]`, in seconds.
        settled: Whether the intervals were narrow before the time was used up.
    """

    seconds: NDArray[np.float64]
    settled: bool


def interleave(runs: Sequence[Run], seconds: float, clock: Callable[[], float] = time.perf_counter) -> Rounds:
    """Times models in turns until the intervals are narrow or the time is used up.

    Args:
        runs: One per model.
        seconds: Most seconds to spend, warm-up included; at least three rounds are made.
        clock: Tells the time.
    """
    begin = clock()
    warm = [run(k) for k in range(3) for run in runs][len(runs) :]
    each = max(min(warm), 1e-7)
    again = each < _LONG
    count = min(max(1 + again, round(_TURN / each)), _MOST_IN_TURN)
    rounds: list[list[list[float]]] = []
    settled, look = False, _FEWEST_ROUNDS
    while not settled:
        turn: list[list[float]] = [[] for _ in runs]
        order = range(len(runs)) if len(rounds) % 2 == 0 else range(len(runs))[::-1]
        for m in order:
            if again:
                runs[m](len(rounds))
            turn[m] = [runs[m](len(rounds) + k) for k in range(count)]
        rounds.append(turn)
        spent = clock() - begin
        if spent >= seconds and len(rounds) >= 3:
            break
        if len(rounds) >= look:
            look = math.ceil(look * _LOOK_AGAIN)
            settled = _narrow(np.array(rounds).transpose(1, 0, 2))
    return Rounds(np.array(rounds).transpose(1, 0, 2), settled)


def _narrow(seconds: NDArray[np.float64]) -> bool:
    turns = np.median(seconds, axis=2)
    if len(turns) == 2:
        _, low, high = ratio(turns[0], turns[1])
    else:
        low, high = interval(turns[0])
    return high - low <= NARROW * (high + low)


def _resampled(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (_RESAMPLES, count))


def interval(turns: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the median of turns."""
    turns = turns[:: max(1, len(turns) // _MOST_ROUNDS)]
    middles = np.median(turns[_resampled(len(turns))], axis=1)
    low, high = np.percentile(middles, _SIDES)
    return float(low), float(high)


def ratio(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median over rounds of the ratio of two models' turns, and its 95 % interval."""
    ratios = first / second
    low, high = interval(ratios)
    return float(np.median(ratios)), low, high


def point(candidates: int, rounds: Rounds, copies: Sequence[float | None]) -> Point:
    """Sums up the rounds at one number of candidates.

    Args:
        candidates: The number.
        rounds: The times.
        copies: Per model, seconds per run for copies between host and device, where known.
    """
    turns = np.median(rounds.seconds, axis=2)
    times = []
    for model, own, copied in zip(rounds.seconds, turns, copies, strict=True):
        every = model.reshape(-1)
        median, p90, p99 = (float(v) for v in np.percentile(every, (50, 90, 99)))
        low, high = interval(own)
        rate = candidates / median
        times.append(Times(every.size, median, min(low, median), max(high, median), p90, p99, rate, copied))
    speedup = None
    if len(turns) == 2:
        middle, low, high = ratio(turns[0], turns[1])
        apart = (low > 1 or high < 1) and abs(math.log(middle)) > RESOLUTION
        speedup = Speedup(middle, low, high, apart)
    return Point(candidates, tuple(times), speedup, rounds.settled)


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
