"""What a run found, held against what may differ: the verdicts of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxrank import halves
from onnxrank.errors import EnvironmentProblem, ModelError
from onnxrank.verify import judge, structure
from onnxrank.verify.inputs import POISONED
from onnxrank.verify.judge import Sample
from onnxrank.verify.options import LEVELS
from onnxrank.verify.points import MOST_ODD
from onnxrank.verify.report import Case
from onnxrank.verify.side import run_both

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine

_TRUTH = "float64"
_ROUNDED = "rounded"
_RANKED = 1024
"""Candidates up to which the order is looked at in requests beyond the ordinary ones, at the level `full`."""
_STEP = 2.0**-7
"""A step of 8-bit quantisation, of a range of both signs."""


class Verdicts:
    """What an engine's samples are held against, and what comes of that.

    Attributes:
        held: By provider, kind of inputs and output, what differences are held against.
        coarse: The type that weights or the state are rounded to in one of the models only; None if in none.
        rounds_weights: Whether that is so for weights.
        step: What quantised values may be off by, as a share of the output's scale.

    Args:
        engine: The run.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.held: dict[tuple[str, str, str], judge.Measure] = {}
        self.rounds_weights = False
        self.coarse: np.dtype[Any] | None = None
        self.step = 0.0

    def measure(self) -> None:
        """Finds what differences are held against, from what was run so far."""
        report = self.engine.report
        self.rounds_weights = structure.changes_precision(self.engine.original.proto, self.engine.optimized.proto)
        rounds = self.rounds_weights or halves.rounds_state(self.engine.optimized.loaded)
        self.coarse = np.dtype(np.float16) if rounds else None
        steps = any(structure.quantises(s.proto) for s in self.engine.sides)
        if steps:
            report.find(
                "rounding",
                "precision",
                "Values are quantised on the way. One at the border of two steps may fall on either side, so 1/128 of "
                "the output's scale is allowed.",
                "note",
            )
        self.step = _STEP if steps else 0.0
        self.held = judge.measures(self.engine.samples, self.coarse, self.step)

    def tell(self) -> None:
        """Puts the verdicts on all samples into the report."""
        report, samples = self.engine.report, self.engine.samples
        self.held = judge.measures(samples, self.coarse, self.step)
        if self.engine.truth:
            if not self.rounds_weights:
                self.file("algebra", self.engine.condition.excused(judge.algebra(samples), self.engine.points))
            else:
                self._rounded_algebra()
        cases = judge.rounding(samples, self.held, self.engine.options.tolerance, self._unstable())
        self.file("rounding", self.engine.condition.excused(cases, self.engine.points))
        self.engine.condition.tell()
        report.statistics = judge.statistics(samples, self.held)
        most = _RANKED if self.engine.options.level == "full" else MOST_ODD
        sized = {(p.inputs, p.candidates) for p in self.engine.points if p.size is not None and p.candidates > most}
        plain = [s for s in samples if s.inputs not in POISONED and (s.inputs, s.candidates) not in sized]
        cases, report.ranking = judge.ranked(plain, self.held, self.engine.options.top_k)
        self.file("ranking", cases)
        for s in report.statistics:
            if s.own_levels > s.allowed and s.level == LEVELS[0]:
                report.find(
                    "rounding",
                    "runtime",
                    f"The original differs from itself by {s.own_levels:.3g} in {s.output!r} across onnxruntime's "
                    f"optimisation levels ({s.provider}): that much is the runtime's own.",
                    "note",
                    model="original",
                )

    def _rounded_algebra(self) -> None:
        """Compares models whose weights are rounded to different types: both in float64, with weights rounded alike."""
        points = [p for p in self.engine.points if p.candidates > 0 and p.inputs not in POISONED and p.size is None]
        try:
            for side in self.engine.sides:
                side.open(_ROUNDED, precision="rounded", to=structure.half_type(*(s.proto for s in self.engine.sides)))
        except (ModelError, EnvironmentProblem) as e:
            self.engine.no_truth(side, e)
            return
        answers = run_both(
            self.engine.sides, _ROUNDED, [[p.feed for p in points], [p.bound for p in points]], self.engine.shared
        )
        cases = judge.algebra(
            [
                Sample("cpu", _TRUTH, p.inputs, p.candidates, p.seed, k, a[k], b[k], a[k], b[k])
                for p, a, b in zip(points, *answers, strict=True)
                if not isinstance(a, ModelError) and not isinstance(b, ModelError)
                for k in self.engine.shared
            ]
        )
        failed = [c for c in cases if not c.passed]
        if not failed:
            self.file("algebra", cases)
            return
        far = max(failed, key=lambda c: c.error)
        self.engine.report.find(
            "algebra",
            "precision",
            "The models differ by more than the rounding of their weights to 16 bits: with weights rounded alike, "
            f"{far.output!r} is off by {far.error:.3g} in float64. Constants that were folded before they were "
            "rounded, or that 16 bits cannot hold, explain that; so does an error.",
            "warning",
            place=far.place,
        )

    def file(self, verdict: str, cases: Sequence[Case]) -> None:
        """Takes comparisons into the report."""
        self.engine.report.cases += cases
        if cases:
            self.engine.report.settle(verdict, all(c.passed for c in cases))

    def _unstable(self) -> Callable[[Sample, tuple[int, ...]], bool]:
        """Whether the original itself is now a number and now none, across levels or against float64."""
        groups: dict[tuple[Any, ...], list[NDArray[Any]]] = {}

        def key(s: Sample) -> tuple[Any, ...]:
            return s.provider, s.inputs, s.candidates, s.seed, s.output, s.request

        for s in self.engine.samples:
            groups.setdefault(key(s), []).extend([s.original, *([s.truth] if s.truth is not None else [])])

        def unstable(s: Sample, at: tuple[int, ...]) -> bool:
            seen = {_class(x[at]) for x in groups[key(s)] if x.shape == s.original.shape}
            return len(seen) > 1 and _class(s.optimized[at]) in seen

        return unstable


def _class(value: Any) -> str:
    x = float(value)
    return "nan" if np.isnan(x) else "finite" if np.isfinite(x) else str(x)
