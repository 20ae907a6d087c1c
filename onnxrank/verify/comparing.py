"""Runs both models at points, in float64 and in every session, and keeps what they give as samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxrank.errors import EnvironmentProblem, ModelError
from onnxrank.verify.inputs import ORDINARY
from onnxrank.verify.judge import Sample
from onnxrank.verify.options import LEVELS
from onnxrank.verify.points import Point
from onnxrank.verify.reach import lacks_memory
from onnxrank.verify.sessions import opened
from onnxrank.verify.side import run_both
from onnxrank.verify.words import count
from onnxrank.workers import Crashed, Outputs

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine

_TRUTH = "float64"


def compare(engine: Engine, points: Sequence[Point]) -> bool:
    """Runs both models everywhere and judges what they give; whether the second model loads everywhere."""
    theirs = {o.name for o in engine.optimized.proto.graph.output}
    engine.shared = [n for n in engine.names if n in theirs]
    if not engine.shared:
        return False
    truths = _run_truth(engine, points)
    for provider in engine.options.providers:
        for level in LEVELS:
            engine.say(f"comparing on {provider}, optimisations {level}")
            if not opened(engine, provider, level):
                return False
            _run_level(engine, points, provider, level, truths)
            for side in engine.sides:
                side.spare(f"{provider}/{level}")
    return True


def _run_truth(engine: Engine, points: Sequence[Point]) -> list[tuple[Outputs, Outputs] | None]:
    if not engine.truth:
        return [None] * len(points)
    engine.say("comparing in float64")
    first, second = run_both(engine.sides, _TRUTH, [[p.feed for p in points], [p.bound for p in points]], engine.shared)
    for side, answers in zip(engine.sides, (first, second), strict=True):
        why = next(
            (a for p, a in zip(points, answers, strict=True) if isinstance(a, ModelError) and p.candidates > 1),
            None,
        )
        if why is not None:
            engine.no_truth(side, why)
            return [None] * len(points)
    return list(zip(first, second, strict=True))


def _run_level(
    engine: Engine, points: Sequence[Point], provider: str, level: str, truths: Sequence[tuple[Outputs, Outputs] | None]
) -> None:
    feeds = [[p.feed for p in points], [p.bound for p in points]]
    first, second = run_both(engine.sides, f"{provider}/{level}", feeds, engine.shared)
    if not _trusted(engine, first, truths):
        truths = [None] * len(points)
    where = f"({provider}, optimisations {level})"
    for p, a, b, t in zip(points, first, second, truths, strict=True):
        if isinstance(a, ModelError):
            _original_fails(engine, p, a, b, where)
            continue
        if isinstance(b, Crashed):
            doing = f"with {p.candidates} candidates and {p.inputs} inputs {where}"
            engine.crashed("rounding", engine.optimized, doing, b)
            continue
        if isinstance(b, ModelError):
            if not p.candidates and engine.emptiness.excused(p, b, provider):
                continue
            engine.report.find(
                "rounding",
                "run",
                f"It does not run where the original does (N = {p.candidates}, {p.inputs} inputs) {where}: {b}",
                model="optimized",
            )
            continue
        pair = t if t is not None and not any(isinstance(x, ModelError) for x in t) else None
        for k in engine.shared:
            if p.candidates == 0 and engine.emptiness.vacuous(p, k, a[k], b[k]):
                continue
            truth = pair[0][k] if pair is not None else None  # type: ignore[index]
            raised = pair[1][k] if pair is not None else None  # type: ignore[index]
            engine.samples.append(
                Sample(provider, level, p.inputs, p.candidates, p.seed, k, a[k], b[k], truth, raised, p.request)
            )


def _trusted(engine: Engine, own: Sequence[Outputs], truths: Sequence[tuple[Outputs, Outputs] | None]) -> bool:
    """Whether float64 gives the shapes that the runtime gives, as kernels of the reference evaluator may not."""
    for a, t in zip(own, truths, strict=True):
        if engine.truth and isinstance(a, dict) and t is not None and isinstance(t[0], dict):
            odd = next((k for k in engine.shared if a[k].shape != t[0][k].shape), None)
            if odd is not None:
                shapes = f"{list(t[0][odd].shape)}, where onnxruntime gives {list(a[odd].shape)}"
                engine.no_truth(engine.original, ModelError(f"{odd!r} would have the shape {shapes}"))
    return engine.truth


def _original_fails(engine: Engine, p: Point, why: ModelError, other: Outputs, where: str) -> None:
    if p.candidates > 1 and p.inputs == ORDINARY:
        if isinstance(why, Crashed):
            engine.crashed("rounding", engine.original, f"with {p.candidates} candidates {where}", why)
            return
        if engine.options.data is not None:
            engine.only_recorded(str(why))
            return
        if lacks_memory(why):
            raise EnvironmentProblem(
                f"The original needs more memory for {p.candidates} candidates than its process may use: name "
                "smaller numbers with --candidates, or allow it more with --memory."
            )
        ranges = any(i.role.ranges for i in engine.binding.declared) and len(engine.inputs.symbols) > 1
        hint = " An input that counts entries of a history of any length is better without one." if ranges else ""
        raise ModelError(
            f"The original does not run with {p.candidates} candidates: {why}. If an input takes values of its "
            f"own, give their range in a roles file.{hint}"
        )
    dies = isinstance(why, Crashed)
    runs = "" if isinstance(other, ModelError) else " (the optimized model does)"
    how = f"makes onnxruntime fail ({why})" if dies else "does not run"
    engine.report.find(
        "rounding",
        "original",
        f"The original {how} with {count(p.candidates)} and {p.inputs} inputs{runs}, so nothing was compared there.",
        "warning" if dies else "note",
        model="original",
    )
