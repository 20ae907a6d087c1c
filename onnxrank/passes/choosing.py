"""The second pass: the rules rewrite the model in several ways, and the one that costs least is taken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isclose, isinf, log

from onnx import ModelProto

from onnxrank import crossover, remarks, tune
from onnxrank.forms import Form
from onnxrank.operators import operator
from onnxrank.passes.job import Job
from onnxrank.passes.studying import confirmed
from onnxrank.report import Retreat

LEAST_GAIN = 1.08
"""A predicted ratio of times below this may be a loss: predictions are off by as much (`scripts/calibrate.py`).

What is timed afterwards need only be predicted to be no slower, and at any of the numbers of candidates it is timed at.
"""


def rewrite(job: Job) -> bool:
    """Rewrites the model in the way that costs least; whether anything applied, and pays."""
    try:
        ways = job.preparation.candidates()
    except Exception:
        confirmed(job)  # a model that does not run may be rewritten to anything, and says so itself
        raise
    if not confirmed(job):
        return False
    choose(job, ways)
    return _crosses(job) or pays(job)


def choose(job: Job, found: Sequence[Form]) -> None:
    """Takes the form that costs least at the expected number of candidates."""
    seconds, span = job.before(), job.options.span
    job.found = tuple(found)
    if len(found) == 1:
        go_on_with(job, found[0])
        return
    # Of forms that are all out the last is the plainest.
    chosen = min(reversed(found), key=lambda f: f.seconds(span, seconds))
    tried = promising(job, found) if job.options.tune and isinf(chosen.seconds(span, seconds)) else []
    go_on_with(job, next(iter(tried), chosen))


def promising(job: Job, found: Iterable[Form]) -> list[Form]:
    """Forms by their predicted times at all numbers of candidates that they are timed at, the best first."""
    points = tune.points(job.options.span, job.options.usual)
    return sorted((f for f in found if f.changed), key=lambda f: sum(log(f.time(n)) for n in points))


def go_on_with(job: Job, chosen: Form) -> None:
    """Goes on with one of the ways to rewrite the model."""
    job.pair, job.form = None, chosen
    job.full = next(f for f in job.found if f.study is chosen.study)
    job.preparation.settle_on(chosen)
    take(job, chosen)


def take(job: Job, form: Form) -> None:
    """Goes on with a form, and says what was left alone."""
    job.form, job.study = form, form.study
    job.pair = job.pair and replace(job.pair, many=form)
    job.others = job.preparation.refusals
    assert job.full is not None
    for name in sorted(job.full.rewrite.rw.applied - form.rewrite.rw.applied):
        # What it would refuse is worth knowing, too.
        job.others += [r for r in job.full.rewrite.rw.refusals if r.rule == name]
        if not form.choice.uses(name) and not any(r.rule == name for r in job.report.retreats):
            note = f"{name} would not pay at N = {job.options.usual}, so it was left out"
            job.notes += [note] if note not in job.notes else []
            job.others += remarks.left_out(name, form, job.full, job.options.span)
    job.report.refusals = [*form.refusals, *job.others]


def as_it_is(job: Job) -> None:
    """Goes on with the original, of which something else than rules is made."""
    job.pair, job.form, job.study = None, job.plain, job.plain.study
    job.preparation.undo()


def _crosses(job: Job) -> bool:
    """Whether a second plan for few candidates stands beside the one for many, where one alone is not enough."""
    form, before, n, o = job.chosen, job.before(), job.options.usual, job.options
    if o.span[0] == o.span[1]:
        return False
    kept = form.changed and before(n) >= _least_gain(job) * form.time(n)
    pair = crossover.find(job.found, form.time if kept else before, before, o.span, job.plain)
    if pair is not None:
        if pair.many is not form:
            go_on_with(job, pair.many)
        job.pair = pair
    return pair is not None


def uncross(job: Job, cause: str, reason: str) -> bool:
    """Goes on with a single plan; whether there is one that pays."""
    job.pair, job.measured = None, ()
    job.report.retreats.append(Retreat(crossover.RULE, None, cause, reason))
    job.notes.append(f"one plan was kept for any number of candidates: {reason}")
    if job.found:
        choose(job, job.found)
    return pays(job)


def pays(job: Job) -> bool:
    """Whether anything applied, and is predicted to be faster than the original."""
    form = job.chosen
    if not form.changed:
        return False
    n = job.options.usual
    original, made = form.study.model, form.model
    before = job.before()
    same = made is not None and _operators(made) == _operators(original) and isclose(before(n), form.time(n))
    if same and not form.study.packed:
        job.notes.append("the rewritten model would do the same work in another order, so it was not taken")
        return False
    points = tune.points(job.options.span, n) if job.options.tune else (n,)
    if all(before(k) < _least_gain(job) * form.time(k) for k in points):
        short = "" if before(n) <= form.time(n) else f" by {100 * (LEAST_GAIN - 1):.0f} % or more"
        reason = f"the rewritten model would not be faster at N = {n}{short}, so it was not taken"
        job.notes.append(reason)
        job.others.append(remarks.not_taken(form, reason, n))
        return False
    return True


def _least_gain(job: Job) -> float:
    return min(1.0, LEAST_GAIN) if job.options.tune else LEAST_GAIN


def _operators(model: ModelProto) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(operator(n) for n in model.graph.node)
