"""The last pass: original and result are timed in turns, and what is not faster is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onnx import ModelProto

from onnxrank import cost, plans, tune
from onnxrank.errors import ModelError
from onnxrank.facts import Setting
from onnxrank.forms import Form
from onnxrank.passes.checking import check, gated
from onnxrank.passes.choosing import take, uncross
from onnxrank.passes.emission import written
from onnxrank.passes.job import Job
from onnxrank.plans import Measured
from onnxrank.report import Retreat
from onnxrank.runtime import Feeds
from onnxrank.study import Study
from onnxrank.values import CANDIDATES

_MOST_ROUNDS = 2
"""How many rules are left out for the sake of time before the model as a whole is left alone."""


def measure(job: Job) -> bool:
    """Times original and result in turns, and takes back what is not faster; whether anything is left."""
    if not job.options.tune or job.form is None:
        return job.form is not None
    race = _race(job)
    try:
        if job.pair is not None:
            if _pair_measured(job, race):
                return True
            if not (uncross(job, "tune", f"measured {tune.told(job.measured)} with two") and check(job)):
                job.form = None
                return False
        job.measured, job.without = _timed(job, race, job.form, 0.5), job.form.choice.without
        if not tune.faster(job.measured):
            _slower(job, race, job.form)
    except ModelError as e:
        job.give_up("tune", f"it could not be timed: {e}")
    return job.form is not None


def _pair_measured(job: Job, race: tune.Race) -> bool:
    """Times two plans against each other, to see from where on which is faster; whether both together are."""
    assert job.pair is not None
    pair, study, loaded = job.pair, job.pair.many.study, job.loaded
    points = pair.around(job.options.span)
    feeds = tuple(pair.many.rewrite.translate(study.maker(_setting(study, n))) for n in points)
    assert pair.few.model is not None
    times = _timed(job, tune.Race(replace(loaded, proto=pair.few.model), points, feeds), pair.many, 0.25, feeds)
    job.pair = pair.measured(times)
    right = not job.options.check or job.pair.below == pair.below or gated(job).passed
    job.measured = _timed(job, race, pair.many, 0.25, made=written(job))
    return right and tune.faster(job.measured)


def _slower(job: Job, race: tune.Race, form: Form) -> None:
    """Leaves out the rules without which the result is faster; the model, where that is no help."""
    reason, best = f"measured {tune.told(job.measured)}", job.measured
    for _ in range(_MOST_ROUNDS):
        tried = _without_each(job, race, form)
        for _, other, times in tried:
            job.form, job.measured = other, times
            if tune.faster(times) and (not job.options.check or gated(job).passed):
                left = ", ".join(sorted(other.choice.without - job.without))
                note = f"left out, because it was not faster: {left} ({reason}; {tune.told(times)} without)"
                job.report.retreats += [Retreat(r, None, "tune", reason) for r in left.split(", ")]
                job.notes.append(note)
                take(job, other)
                return
        if not tried or tried[0][2][0].ratio <= best[0].ratio:
            break
        _, form, best = tried[0]
    job.measured = ()
    job.give_up("tune", reason)


def _without_each(job: Job, race: tune.Race, form: Form) -> list[tuple[str, Form, tuple[Measured, ...]]]:
    """Times a form without each of its rules; the fastest first."""
    rules = [r for r in _suspects(form) if form.choice.uses(r)]
    tried = []
    for rule in rules:
        other = form.leaving(form.choice.leaving(rules=[rule]))
        if other.changed:
            tried.append((rule, other, _timed(job, race, other, 0.5 / len(rules))))
    return sorted(tried, key=lambda t: -t[2][0].ratio)


def _race(job: Job) -> tune.Race:
    """The original and the requests that it is timed with."""
    study = job.study
    points = tune.points(job.options.span, job.options.usual)
    return tune.Race(job.loaded, points, tuple(study.maker(_setting(study, n)) for n in points))


def _timed(
    job: Job,
    race: tune.Race,
    form: Form,
    share: float,
    feeds: Sequence[Feeds] | None = None,
    made: ModelProto | None = None,
) -> tuple[Measured, ...]:
    """Times a form, or what is made of it, for a share of the time there is."""
    made = made or form.model
    assert made is not None
    feeds = feeds or [form.rewrite.translate(f) for f in race.feeds]
    return race.measure(made, feeds, share * job.options.tune)


def _suspects(form: Form) -> list[str]:
    """The rules that were applied, those first whose costs are known least."""
    used = [
        r.name
        for r in form.rules
        if form.uses(r.name) or any(s.place.rule == r.name and s.taken for s in form.rewrite.decisions())
    ]
    used = [name for name in dict.fromkeys(used) if name not in plans.ALWAYS]
    formed = [r.name for r in form.rules if r.forms is not None and r.name in used]
    return list(dict.fromkeys([*formed, *(s for s in tune.SUSPECTS if s in used), *used]))


def _setting(study: Study, candidates: int) -> Setting:
    """Symbols of a request that is timed: of so many candidates, and lengths as costs have them."""
    lengths = dict.fromkeys(study.symbols, max(cost.LENGTH, study.shortest))
    return Setting({**lengths, CANDIDATES: candidates}, seed=0)
