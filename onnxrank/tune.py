"""Measured choice: original and result are timed in turns, in a process of their own."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import ModelProto

from onnxrank import workers
from onnxrank.model import LoadedModel
from onnxrank.plans import Measured
from onnxrank.runtime import Feeds
from onnxrank.turns import RESOLUTION, ratio

_TIMEOUT = 120.0
"""Seconds for loading a model, or beyond the time that is asked for."""
_STEP = 8
"""Between the ends of a range each number of candidates that is timed is about so many times the one before."""
SLOWDOWN = 0.0175
"""By which share a result may be slower unless more is allowed: 2 % are what two sessions of one model differ by."""
_CLOSE = 0.0475
"""Logarithm of what may still come, beyond that, from where the memory of two sessions lies: others are timed then."""
SUSPECTS = ("fold", "cross", "attention")
"""Rules that trade multiply-adds for moving data, those whose predictions miss most first."""


@dataclass(frozen=True)
class Race:
    """A model against which others are timed.

    Attributes:
        original: The original.
        points: Numbers of candidates, that which is served most often first.
        feeds: Inputs of the original at each.
    """

    original: LoadedModel
    points: tuple[int, ...]
    feeds: tuple[Feeds, ...]

    def measure(self, made: ModelProto, feeds: Sequence[Feeds], seconds: float) -> tuple[Measured, ...]:
        """Times original and result in turns: one thread, all of onnxruntime's own optimisations, one fresh process.

        Args:
            made: The result.
            feeds: Its inputs at each point.
            seconds: Time to spend, half of it at the first point.

        Raises:
            ModelError: A model does not run, or its process dies.
        """
        worker = workers.fresh()
        try:
            worker.call("limit", _TIMEOUT, memory=None)
            for key, model in (("original", self.original.proto), ("made", made)):
                workers.place(worker, key, model, self.original.folder, _TIMEOUT)
                worker.call("open", _TIMEOUT, session=key, key=key, level="all")
            shares = [0.5, *[0.5 / (len(self.points) - 1)] * (len(self.points) - 1)] if len(self.points) > 1 else [1.0]
            out = []
            for n, old, new, share in zip(self.points, self.feeds, feeds, shares, strict=True):
                turns = worker.call(
                    "race",
                    _TIMEOUT + seconds,
                    sessions=["original", "made"],
                    feeds=[dict(old), dict(new)],
                    seconds=share * seconds,
                )
                first, second = np.median(turns, axis=2)
                out.append(Measured(n, *(round(x, 4) for x in ratio(first, second))))
        finally:
            worker.kill()
        return tuple(out)


def points(span: tuple[int, int], usual: int) -> tuple[int, ...]:
    """Numbers of candidates to time at: the usual one, and the ends of the declared range."""
    return tuple(dict.fromkeys([usual, *span]))


def between(span: tuple[int, int], usual: int) -> tuple[int, ...]:
    """Numbers of candidates between those, where a result is looked at that is slower at none of them."""
    low, high = span
    steps = round(math.log(high / low, _STEP))
    found = [round(low * (high / low) ** (k / steps)) for k in range(1, steps)]
    return tuple(n for n in dict.fromkeys(found) if n not in points(span, usual))


def faster(measured: Sequence[Measured], slowdown: float = SLOWDOWN) -> bool:
    """Whether a result is faster on the whole, somewhere beyond noise, and nowhere slower by more than a share."""
    wins = any(m.low > 1 and math.log(m.ratio) > RESOLUTION for m in measured)
    return wins and mean(measured) > 1 and not any(m.high < 1 and _beyond(m, slowdown) > 0 for m in measured)


def unsure(measured: Sequence[Measured], slowdown: float = SLOWDOWN) -> bool:
    """Whether a result that is faster elsewhere loses so little, or so unsurely, that other sessions may say else."""
    lost = [m for m in measured if _beyond(m, slowdown) > 0]
    return bool(lost) and mean(measured) > 1 and all(m.high >= 1 or _beyond(m, slowdown) < _CLOSE for m in lost)


def near(measured: Sequence[Measured], slowdown: float = SLOWDOWN) -> bool:
    """Whether a result is slower somewhere by hardly less than it may be: in other sessions it may be by more."""
    return any(-math.log1p(SLOWDOWN) < _beyond(m, slowdown) <= 0 for m in measured)


def disputed(tries: Sequence[Sequence[Measured]], slowdown: float = SLOWDOWN) -> bool:
    """Whether a result is slower somewhere in some sessions by more than it may be, and in others not at all."""
    return any(_beyond(of[0], slowdown) > 0 and of[-1].ratio >= 1 for of in _ordered(tries))


def _ordered(tries: Sequence[Sequence[Measured]]) -> list[list[Measured]]:
    """Of several measurements at the same numbers of candidates those at each, the slowest first."""
    return [sorted(of, key=lambda m: m.ratio) for of in zip(*tries, strict=True)]


def _beyond(m: Measured, slowdown: float) -> float:
    """By how much more than a share a result is slower, as a logarithm."""
    return -math.log(m.ratio) - math.log1p(slowdown)


def needed(measured: Sequence[Measured]) -> int | None:
    """Per cent that would have to be allowed for a result that is faster at some numbers; None where it is at none."""
    if not faster(measured, math.inf):
        return None
    return math.ceil(100 * max(1 / m.ratio - 1 for m in measured)) + 1


def worst(measured: Sequence[Measured]) -> float:
    """The least ratio."""
    return min(m.ratio for m in measured)


def mean(measured: Sequence[Measured]) -> float:
    """The geometric mean of the ratios."""
    return statistics.geometric_mean(m.ratio for m in measured)


def middle(tries: Sequence[Sequence[Measured]]) -> tuple[Measured, ...]:
    """Of several measurements at the same numbers of candidates the median one at each, with the interval of all.

    What sessions differ by is more than what is seen within one of them, so that intervals of single ones say little.
    Of five the outermost do not count, or a loss were none as soon as a single session does not see it.
    """
    if len(tries) == 1:
        return tuple(tries[0])
    outer = len(tries) // 4
    return tuple(replace(of[len(of) // 2], low=of[outer].ratio, high=of[-1 - outer].ratio) for of in _ordered(tries))


def told(measured: Sequence[Measured]) -> str:
    """What was measured, in words."""
    return ", ".join(f"{m.ratio:.3g}x at N = {m.candidates}" for m in measured)
