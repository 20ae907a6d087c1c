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

Run = Callable[[int], float]
"""Runs a request, named by its number, and returns the seconds it took."""

RESOLUTION = 0.02
"""Two sessions of one model differ by up to so much, by where their memory lies; no smaller difference is reported."""
NARROW = 0.01
"""Half the width of an interval, relative to its middle, that is narrow enough to stop."""
_TURN = 0.05  # seconds that a turn should take
_LONG = 0.25  # seconds of a run that gains nothing from warm caches, and that a turn takes at most if it is one of many
_MOST_IN_TURN = 50
_FEWEST_ROUNDS = 12
_LOOK_AGAIN = 1.25  # times as many rounds
_RESAMPLES = 1000
_MOST_ROUNDS = 1000  # in a bootstrap
_SIDES = (2.5, 97.5)
_FINE = 1e-6  # seconds that a clock must tell apart


def _of_thread() -> Callable[[], float]:
    found: Callable[[], float] | None = getattr(time, "thread_time", None)
    fine = found is not None and time.get_clock_info("thread_time").resolution <= _FINE
    return found if found is not None and fine else time.perf_counter


of_thread = _of_thread()
"""Tells for how long this thread has run, in seconds: a session on one thread is timed right on a machine that is busy,
too, where others take the processor away in the middle of a run. The wall's time where the system does not tell it."""


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
    warm = [run(0) for run in runs]
    again = max(warm) < _LONG
    if again:
        warm = [run(k) for k in (1, 2) for run in runs]
    fast, slow = max(min(warm), 1e-7), max(*warm, 1e-7)
    count = max(1 + again, min(round(_TURN / fast), round(_LONG / slow), _MOST_IN_TURN))
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
