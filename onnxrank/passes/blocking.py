"""The last pass: candidates are scored in blocks where that is asked for, or measured to be faster."""

from __future__ import annotations

from dataclasses import replace

from onnxrank import blocks, tune
from onnxrank.crossover import Pair
from onnxrank.errors import CheckFailed, ModelError, UsageError
from onnxrank.passes.checking import gated
from onnxrank.passes.emission import written
from onnxrank.passes.job import Job
from onnxrank.passes.timing import against, race_of, timed
from onnxrank.plans import Measured
from onnxrank.report import Retreat
from onnxrank.verify import failure

RULE = "blocks"
"""In the place of a rule, where blocks are taken back."""
LEAST = 1024
"""Candidates that must be expected at most before blocks are tried: with fewer, intermediates stay in the cache."""
ROWS = (64, 128, 256)
"""Candidates per block that are timed."""
_SHARE = 0.25
"""Of the time for timing, for each of them."""


def divide(job: Job) -> bool:
    """Scores candidates in blocks, or leaves them together; there is always something to go on with."""
    o = job.options
    if o.blocks == 0 or (o.blocks is None and (not o.tune or o.span[1] < LEAST)):
        return True
    try:
        blocks.split(job.chosen)
    except blocks.Impossible as e:
        if o.blocks:
            raise UsageError(f"candidates cannot be scored in blocks of {o.blocks}: {e}") from e
        job.notes.append(f"candidates were not tried in blocks: {e}")
        return True
    before = job.blocks, job.pair, job.measured
    slow = None
    try:
        if o.blocks is None:
            slow = _fastest(job)
        else:
            job.blocks = o.blocks
            job.measured = _against_original(job) if o.tune else ()
    except ModelError as e:
        slow = f"they could not be timed: {e}"
    wrong = None if slow or not o.check else _wrong(job)
    if slow or wrong:
        job.blocks, job.pair, job.measured = before
        job.notes.append(f"candidates are not scored in blocks: {slow or wrong}")
    else:
        job.notes.append(
            f"candidates are scored in blocks of {job.blocks} at most, so that their rows stay in the cache; for a GPU "
            "use --blocks 0"
        )
    if wrong:
        job.report.retreats.append(Retreat(RULE, None, "check", wrong))
        gated(job)  # the report is about the result in one piece again
    return True


def _fastest(job: Job) -> str | None:
    """Takes the blocks that are fastest; why none are taken, if so."""
    rows, times = max(_tried(job), key=lambda t: tune.mean(t[1]))
    told = f"{tune.told(times)} in blocks of {rows}"
    job.blocks = rows
    if not any(m.low > 1 for m in times if m.candidates >= LEAST):
        return told
    if not tune.faster(times):
        if job.pair is not None:
            return told
        job.pair = Pair(job.chosen, job.chosen, 1).measured(times)
    measured = _against_original(job)
    if not tune.faster(measured):
        return f"{tune.told(measured)} of the original's speed in blocks of {rows}"
    job.measured = measured
    return None


def _tried(job: Job) -> list[tuple[int, tuple[Measured, ...]]]:
    """Times the result in blocks against itself in one piece, at rising numbers of candidates."""
    form, (low, high) = job.chosen, job.options.span
    low = max(low, 1 if job.pair is None else job.pair.below)
    points = tuple(sorted({low, high, *(n for n in (job.options.usual, LEAST) if low < n < high)}))
    feeds = tuple(form.rewrite.translate(f) for f in race_of(job, points).feeds)
    whole = tune.Race(replace(job.loaded, proto=written(job)), points, feeds)
    out = []
    for rows in ROWS:
        job.blocks = rows
        out.append((rows, against(job, whole, written(job), feeds, _SHARE)))
    return out


def _against_original(job: Job) -> tuple[Measured, ...]:
    race = race_of(job, tune.points(job.options.span, job.options.usual))
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
