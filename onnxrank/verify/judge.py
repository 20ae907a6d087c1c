"""From what two models gave to verdicts on algebra, rounding and ranking.

- algebra: both in float64 agree to 1e-10 of the output's scale.
- rounding: the measure is the float64 result of the original. The other model may be at most twice as far from it as
  the original itself is, plus a few units of rounding. Where there is no float64 result, the original's own is the
  measure.
- ranking: pairs of candidates that are further apart than rounding explains keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank.runtime import is_float
from onnxrank.verify import compare, ranking
from onnxrank.verify.compare import Gap
from onnxrank.verify.inputs import ORDINARY
from onnxrank.verify.report import Case, Place, Ranking, Statistics

ALGEBRA = 1e-10
OWN = 2.0
"""How much further from the truth a model may be than the original itself."""
_LEAST_SCALE = 1e-30


@dataclass(frozen=True)
class Sample:
    """One output of both models for one request.

    Attributes:
        provider: Execution provider.
        level: ORT's optimisations.
        inputs: Kind of inputs.
        candidates: Number of candidates.
        seed: Seed of the inputs.
        output: Its name.
        original: What the original gives.
        optimized: What the other model gives.
        truth: What the original gives in float64, if known.
        raised: What the other model gives in float64, if known.
        request: Identity of a recorded request.
    """

    provider: str
    level: str
    inputs: str
    candidates: int
    seed: int
    output: str
    original: NDArray[Any]
    optimized: NDArray[Any]
    truth: NDArray[Any] | None = None
    raised: NDArray[Any] | None = None
    request: str | None = None


@dataclass(frozen=True)
class Measure:
    """What differences of one output are held against.

    Attributes:
        scale: Largest absolute value of the original.
        own: The original's largest distance from the truth.
        allowed: Largest distance of the other model from the truth that passes.
    """

    scale: float
    own: float
    allowed: float


def measures(
    samples: Iterable[Sample], coarse: np.dtype[Any] | None = None, step: float = 0.0
) -> dict[tuple[str, str, str], Measure]:
    """Scales and own errors by provider, kind of inputs and output, over all levels, numbers of candidates and seeds.

    Args:
        samples: All there is.
        coarse: The type that the other model computes in, if that is coarser than its outputs'.
        step: Least difference that passes in units of the output's scale, for models that quantise.
    """
    scales: dict[tuple[str, str, str], float] = {}
    owns: dict[tuple[str, str, str], float] = {}
    floors: dict[tuple[str, str, str], float] = {}
    for s in samples:
        key = (s.provider, s.inputs, s.output)
        scales[key] = max(scales.get(key, _LEAST_SCALE), compare.scale(s.original))
        own = 0.0
        if s.truth is not None:
            own = compare.gap(target(s), s.original.astype(target(s).dtype)).largest
        owns[key] = max(owns.get(key, 0.0), own if np.isfinite(own) else 0.0)
        kinds = [s.original.dtype, s.optimized.dtype, *([coarse] if coarse is not None else [])]
        exact = s.truth is not None
        unit = max(step, *(compare.floor(k, exact) for k in kinds)) if is_float(s.original) else 0.0
        floors[key] = max(floors.get(key, 0.0), unit)
    out = {}
    for provider, kind, output in scales:
        mine, plain = (provider, kind, output), (provider, ORDINARY, output)
        # An output that happens to be small for odd inputs is not to be had more exactly than ordinarily.
        scale = max(scales[mine], scales.get(plain, 0.0))
        own = max(owns[mine], owns.get(plain, 0.0))
        out[mine] = Measure(scale, own, OWN * own + floors[mine] * scale)
    return out


def target(s: Sample) -> NDArray[Any]:
    """What both models are held against: the truth, but the original where that is no number or overflows."""
    if s.truth is None or not is_float(s.original) or s.truth.shape != s.original.shape:
        return s.original
    finite = np.isfinite(s.original.astype(np.float64)) & np.isfinite(s.truth)
    return np.where(finite, s.truth, s.original.astype(np.float64))


def algebra(samples: Sequence[Sample]) -> list[Case]:
    """Judges float64 results; a sample per request and output, whatever its provider and level."""
    scales: dict[tuple[str, str], float] = {}
    for s in samples:
        if s.truth is not None:
            key = (s.inputs, s.output)
            scales[key] = max(scales.get(key, _LEAST_SCALE), compare.scale(s.truth))
    out, seen = [], set()
    for s in samples:
        point = (s.inputs, s.candidates, s.seed, s.output, s.request)
        if s.truth is None or s.raised is None or point in seen:
            continue
        seen.add(point)
        scale = max(scales[s.inputs, s.output], scales.get((ORDINARY, s.output), 0.0))
        found = compare.gap(s.truth, s.raised)
        allowed = ALGEBRA * scale if is_float(s.truth) else 0.0
        out.append(_case("algebra", s, found, allowed, s.truth, s.raised, level="float64"))
    return out


def rounding(
    samples: Sequence[Sample],
    held: dict[tuple[str, str, str], Measure],
    tolerance: Callable[[str], tuple[float, float] | None] = lambda output: None,
    unstable: Callable[[Sample, tuple[int, ...]], bool] = lambda *_: False,
) -> list[Case]:
    """Judges results in the models' own types.

    Args:
        samples: What to judge.
        held: From `measures`.
        tolerance: Further limits by output: relative and absolute.
        unstable: Whether the original itself is now a number and now none at an element.
    """
    out = []
    for s in samples:
        m = held[s.provider, s.inputs, s.output]
        measure = target(s)
        found = compare.gap(s.original, s.optimized)
        if not np.isfinite(found.largest) and found.at is not None and unstable(s, found.at):
            found = Gap(0.0)
        elif np.isfinite(found.largest) and is_float(s.original):
            found = compare.gap(measure, s.optimized.astype(measure.dtype))
        case = _case("rounding", s, found, m.allowed, measure, s.optimized)
        limits = tolerance(s.output)
        if case.passed and limits is not None:
            case = _within(s, limits) or case
        out.append(case)
    return out


def _within(s: Sample, limits: tuple[float, float]) -> Case | None:
    """The case that a tolerance given by the user makes of a sample; None if it holds."""
    a, b = s.original.astype(np.float64), s.optimized.astype(np.float64)
    with np.errstate(invalid="ignore"):
        room = limits[1] + limits[0] * np.abs(a)
        apart = np.abs(a - b)
        excess = np.where(np.isfinite(a), apart - room, 0.0)
    if not excess.size or excess.max() <= 0:
        return None
    at = tuple(int(k) for k in np.unravel_index(int(excess.argmax()), excess.shape))
    return _case("rounding", s, Gap(float(apart[at]), at), float(room[at]), a, b)


def _case(
    verdict: str,
    s: Sample,
    found: Gap,
    allowed: float,
    expected: NDArray[Any],
    got: NDArray[Any],
    level: str | None = None,
) -> Case:
    passed = found.largest <= allowed
    place = None if passed else place_of(s, found, expected, got)
    provider = "cpu" if level == "float64" else s.provider
    return Case(
        verdict,
        provider,
        level or s.level,
        s.inputs,
        s.candidates,
        s.seed,
        s.output,
        found.largest,
        allowed,
        passed,
        place,
    )


def place_of(s: Sample, found: Gap, expected: NDArray[Any], got: NDArray[Any]) -> Place:
    """Where two arrays differ most, in words."""
    request = s.request if s.request is not None else f"generated, seed {s.seed}"
    if found.at is None:
        return Place(s.output, (), None, request, f"{_kind(expected)}", f"{_kind(got)}")
    candidate = found.at[0] if expected.ndim and expected.shape[0] == s.candidates else None
    return Place(s.output, found.at, candidate, request, _value(expected[found.at]), _value(got[found.at]))


def _kind(data: NDArray[Any]) -> str:
    return f"{data.dtype}{list(data.shape)}"


def _value(value: Any) -> str:
    return f"{float(value):.9g}" if np.asarray(value).dtype.kind in "fV" else str(value)


def statistics(samples: Sequence[Sample], held: dict[tuple[str, str, str], Measure]) -> list[Statistics]:
    """How far the outputs are apart over ordinary inputs, by provider, level and output.

    The tolerances that would pass are those of all inputs, since all are held against what a user sets.
    """
    groups: dict[tuple[str, str, str], list[Sample]] = {}
    every: dict[tuple[str, str, str], list[Sample]] = {}
    levels: dict[tuple[str, str, str, int, int, str | None], list[NDArray[Any]]] = {}
    for s in samples:
        if is_float(s.original):
            every.setdefault((s.provider, s.level, s.output), []).append(s)
        if s.inputs == ORDINARY and is_float(s.original):
            groups.setdefault((s.provider, s.level, s.output), []).append(s)
            levels.setdefault((s.provider, s.inputs, s.output, s.candidates, s.seed, s.request), []).append(s.original)
    own_levels: dict[tuple[str, str], float] = {}
    for (provider, _, output, *_), found in levels.items():
        for other in found[1:]:
            key = (provider, output)
            own_levels[key] = max(own_levels.get(key, 0.0), compare.gap(found[0], other).largest)
    out = []
    for (provider, level, output), group in groups.items():
        m, others = held[provider, ORDINARY, output], every[provider, level, output]
        alike = [s for s in group if s.original.shape == s.optimized.shape]
        absolute = _apart(group)
        steps = [compare.ulps(s.original, s.optimized) for s in alike]
        ulp = np.concatenate(steps) if steps else np.zeros(0)
        errors = [compare.gap(target(s), s.optimized.astype(target(s).dtype)).largest for s in group]
        own = [compare.gap(target(s), s.original.astype(target(s).dtype)).largest for s in group]
        out.append(
            Statistics(
                provider,
                level,
                output,
                m.scale,
                max(own),
                max(errors),
                m.allowed,
                float(_apart(others).max(initial=0.0)),
                max((compare.relative(s.original, s.optimized) for s in others), default=0.0),
                _percentile(absolute, 50),
                _percentile(absolute, 99),
                _percentile(ulp, 50),
                _percentile(ulp, 99),
                float(ulp.max(initial=0.0)),
                own_levels.get((provider, output), 0.0),
            )
        )
    return out


def _apart(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Absolute differences of numbers."""
    alike = [s for s in samples if s.original.shape == s.optimized.shape]
    with np.errstate(invalid="ignore"):
        found = [np.abs(s.original.astype(np.float64) - s.optimized.astype(np.float64)).reshape(-1) for s in alike]
    apart = np.concatenate(found) if found else np.zeros(0)
    return np.asarray(apart[np.isfinite(apart)], np.float64)


def _percentile(data: NDArray[Any], share: float) -> float:
    return float(np.percentile(data, share)) if data.size else 0.0


def ranked(
    samples: Sequence[Sample], held: dict[tuple[str, str, str], Measure], top_k: int
) -> tuple[list[Case], list[Ranking]]:
    """Judges the order of candidates.

    Args:
        samples: What to judge; those of fewer than two candidates, and outputs that are no scores, are passed over.
        held: From `measures`.
        top_k: How many of the best candidates are compared.
    """
    cases: list[Case] = []
    worst: dict[str, Ranking] = {}
    for s in samples:
        if s.candidates < 2 or s.original.shape != s.optimized.shape:
            continue
        before, after = (ranking.columns(x, s.candidates) for x in (s.original, s.optimized))
        if before is None or after is None:
            continue
        m = held[s.provider, s.inputs, s.output]
        moves, mover = 0, (0, 0)
        for column in range(before.shape[1]):
            found = ranking.order(before[:, column], after[:, column], 2 * m.allowed, top_k)
            if found.move > moves:
                moves, mover = found.move, (found.mover or 0, column)
            name = s.output if before.shape[1] == 1 else f"{s.output}[:, {column}]"
            old = worst.get(name, Ranking(name, 0, top_k, 1.0, 1.0, 0))
            worst[name] = Ranking(
                name,
                old.requests + 1,
                top_k,
                min(old.overlap, found.overlap),
                min(old.tau, found.tau),
                max(old.move, found.move),
            )
        place = None
        if moves:
            row, column = mover
            request = s.request if s.request is not None else f"generated, seed {s.seed}"
            places = [ranking.rank(x[:, column], row) for x in (before, after)]
            place = Place(
                s.output, (row, column) if before.shape[1] > 1 else (row,), row, request, *(f"rank {p}" for p in places)
            )
        cases.append(
            Case(
                "ranking",
                s.provider,
                s.level,
                s.inputs,
                s.candidates,
                s.seed,
                s.output,
                float(moves),
                0.0,
                moves == 0,
                place,
            )
        )
    return cases, list(worst.values())
