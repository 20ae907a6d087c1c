"""Measured choice: original and result are timed in turns, in a process of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from onnxrank import workers
from onnxrank.model import LoadedModel
from onnxrank.plans import Measured
from onnxrank.runtime import Feeds
from onnxrank.turns import RESOLUTION, ratio

_TIMEOUT = 120.0
"""Seconds for loading a model, or beyond the time that is asked for."""
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
        """Times original and result in turns: one thread, all of onnxruntime's own optimisations, one process.

        Args:
            made: The result.
            feeds: Its inputs at each point.
            seconds: Time to spend, half of it at the first point.

        Raises:
            ModelError: A model does not run, or its process dies.
        """
        worker = workers.take()
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
        except BaseException:
            worker.kill()
            raise
        workers.give(worker)
        return tuple(out)


def points(span: tuple[int, int], usual: int) -> tuple[int, ...]:
    """Numbers of candidates to time at: the usual one, and the ends of the declared range."""
    return tuple(dict.fromkeys([usual, *span]))


def faster(measured: Sequence[Measured]) -> bool:
    """Whether a result is faster at the usual number of candidates, beyond noise, and slower at no other."""
    usual, *ends = measured
    wins = usual.low > 1 and math.log(usual.ratio) > RESOLUTION
    return wins and not any(m.high < 1 and math.log(m.ratio) < -RESOLUTION for m in ends)


def told(measured: Sequence[Measured]) -> str:
    """What was measured, in words."""
    return ", ".join(f"{m.ratio:.3g}x at N = {m.candidates}" for m in measured)
