"""The last pass: candidates are scored in blocks where that is asked for, or measured to be faster."""

from __future__ import annotations

from dataclasses import replace

from onnxrank import blocks, tune
from onnxrank.crossover import NEAR, Pair
from onnxrank.errors import CheckFailed, ModelError, UsageError
from onnxrank.passes.checking import gated
from onnxrank.passes.choosing import as_it_is, go_on_with
from onnxrank.passes.emission import for_many, written
from onnxrank.passes.job import Job
from onnxrank.passes.timing import against, around, race_of, timed
from onnxrank.plans import Measured
from onnxrank.report import Retreat
from onnxrank.verify import failure

RULE = "blocks"
"""In the place of a rule, where blocks are taken back."""
LEAST = 1024
"""Candidates that must be expected at most before blocks are tried: with fewer, intermediates stay in the cache."""
ROWS = (128, 64, 256)
"""Candidates per block that are timed, as long as the first ones may be faster than one piece."""
_BETWEEN = (256, LEAST)
"""Where blocks are timed, between the ends: below two blocks they cost something, and save nothing."""
_SHARE = 0.25
"""Of the time for timing, for each of them."""


def divide(job: Job) -> bool:
    """Scores candidates in blocks, or leaves them together; whether there is anything to go on with.

    Where nothing pays in one piece, it may in blocks: what is predicted to be fastest for many candidates is tried,
    and the original as it is.
    """
    o = job.options
    if o.blocks == 0 or (o.blocks is None and (not o.tune or o.span[1] < LEAST)):
        return job.kept
    if not job.kept:
        return o.blocks is None and _anew(job)
    if not _divided(job) and any(r.rule == RULE for r in job.report.retreats):
        gated(job)  # the report is about the result in one piece again
    return True


def _anew(job: Job) -> bool:
    """Goes on with what pays in blocks alone; whether there is such."""
    before = job.form, job.full, job.pair, job.study, job.others, job.measured
    ways = sorted((f for f in job.found if f.changed), key=lambda f: f.time(job.span[1]))[:1]
    for form in [*ways, *([job.plain] if job.found else [])]:
        if form.changed:
            go_on_with(job, form)
        else:
            as_it_is(job)
        if _divided(job):
            job.report.retreats = [r for r in job.report.retreats if r.rule]
            return True
    job.form, job.full, job.pair, job.study, job.others, job.measured = before
    return False


def _divided(job: Job) -> bool:
    """Scores the candidates of the chosen form in blocks, if that is right, and faster or asked for; whether it is."""
    o = job.options
    try:
        blocks.split(job.chosen)
    except blocks.Impossible as e:
        if o.blocks:
            raise UsageError(f"candidates cannot be scored in blocks of {o.blocks}: {e}") from e
        job.notes.append(f"candidates were not tried in blocks: {e}")
        return False
    before = job.blocks, job.blocks_from, job.pair, job.measured
    slow = wrong = None
    try:
        if o.blocks is None:
            slow = _fastest(job)
        else:
            job.blocks = o.blocks
            job.measured = _against_original(job) if o.tune else ()
        wrong = None if slow or not o.check else _wrong(job)
    except ModelError as e:
        slow = f"they could not be timed, or checked: {e}"
    if slow or wrong:
        job.blocks, job.blocks_from, job.pair, job.measured = before
        job.notes.append(f"{_what(job)} not scored in blocks: {slow or wrong}")
        if wrong:
            job.report.retreats.append(Retreat(RULE, None, "check", wrong))
        return False
    since = f" from N = {job.blocks_from} on" if job.blocks_from else ""
    job.notes.append(
        f"{_what(job)} scored in blocks of {job.blocks} at most{since}, so that their rows stay in the cache; for a "
        "GPU use --blocks 0"
    )
    return True


def _what(job: Job) -> str:
    return "candidates are" if job.chosen.changed else "candidates of the original as it is are"


def _fastest(job: Job) -> str | None:
    """Takes the blocks that are fastest; why none are taken, if so."""
    rows, times = max(_tried(job), key=lambda t: tune.mean(t[1]))
    told = f"{tune.told(times)} in blocks of {rows}"
    job.blocks = rows
    if not any(m.low > 1 and m.ratio > NEAR for m in times if m.candidates >= LEAST):
        return told
    if not tune.faster(times):
        # They begin where they gain more than two sessions of one model differ by.
        found = Pair(job.plain, job.chosen, 1).measured([replace(m, ratio=m.ratio / NEAR) for m in times])
        if job.kept:
            job.blocks_from = found.below
        else:
            job.pair = found
    if job.kept and job.pair is not None and job.blocks_from <= job.pair.below:
        job.pair = job.pair.measured(around(job, job.pair, for_many(job)))
    measured = _against_original(job)
    if not tune.faster(measured, job.options.slowdown):
        return f"{tune.told(measured)} of the original's speed in blocks of {rows}"
    job.measured = measured
    return None


def _tried(job: Job) -> list[tuple[int, tuple[Measured, ...]]]:
    """Times the result in blocks against itself in one piece, or the original, at rising numbers of candidates."""
    form, (low, high) = job.chosen, job.span
    low = max(low, 1 if job.pair is None else job.pair.below)
    between = () if job.kept else tune.between(job.span, job.options.usual)
    points = tuple(sorted({low, high, *(n for n in (job.options.usual, *_BETWEEN, *between) if low < n < high)}))
    feeds = tuple(form.rewrite.translate(f) for f in race_of(job, points).feeds)
    together = written(job) if job.kept else job.plain.model
    assert together is not None
    whole = tune.Race(replace(job.loaded, proto=together), points, feeds)
    out: list[tuple[int, tuple[Measured, ...]]] = []
    for rows in ROWS:
        if not out or any(m.high > 1 for m in out[0][1] if m.candidates >= LEAST):
            job.blocks = rows
            out.append((rows, against(job, whole, written(job), feeds, _SHARE)))
    return out


def _against_original(job: Job) -> tuple[Measured, ...]:
    race = race_of(job, tune.points(job.span, job.options.usual))
    return timed(job, race, job.chosen, _SHARE, made=written(job))


def _wrong(job: Job) -> str | None:
    """Holds the result against the original; how it fails, if so."""
    found = gated(job)
    if found.passed:
        return None
    reason = failure(found)
    if job.options.strict:
        job.report.changed = False
        raise CheckFailed(f"the model in blocks did not pass its check: {reason}", job.report)
    return reason
