"""The last pass: original and result are timed in turns, and what is not faster is taken back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from onnx import ModelProto

from onnxrank import cost, crossover, plans, tune
from onnxrank.crossover import Pair
from onnxrank.errors import ModelError
from onnxrank.facts import Setting
from onnxrank.forms import Form
from onnxrank.joining import SINGLE
from onnxrank.passes.checking import check, gated
from onnxrank.passes.choosing import go_on_with, promising, take, uncross
from onnxrank.passes.emission import written
from onnxrank.passes.job import Job
from onnxrank.plans import Measured
from onnxrank.report import Retreat
from onnxrank.runtime import Feeds
from onnxrank.study import Study
from onnxrank.values import CANDIDATES

_MOST_ROUNDS = 2
"""How many rules are left out for the sake of time before the model as a whole is left alone."""
_AGAIN = 2
"""How often a narrow loss is timed again, and once more so often where sessions do not agree."""
_MOST_SESSIONS = 1 + 2 * _AGAIN
"""In how many sessions a result is timed at most."""
_MORE = 3
"""Within so many candidates more than the least an original is looked for that runs, where it does not with these."""
_PATIENCE = 4
"""Once timing took so many times as long as it may, nothing more is tried for what is not faster."""


def measure(job: Job) -> bool:
    """Times original and result in turns, and takes back what is not faster; whether anything is left."""
    if not job.options.tune or job.form is None:
        return job.form is not None
    race = race_of(job, tune.points(job.span, job.options.usual))
    try:
        crossed = None if job.pair is None else job.pair.many
        if job.pair is not None:
            if any(_pair_measured(job, race, pair) for pair in crossover.with_any_few(job.pair, job.plain)):
                return True
            if not (uncross(job, "tune", f"measured {tune.told(job.measured)} with two") and check(job)):
                job.form = None
                return False
        job.measured, job.without = timed(job, race, job.form, 0.5), job.form.choice.without
        reason = f"measured {tune.told(job.measured)}"
        if not (
            _faster(job, job.measured)
            or (job.form is not crossed and _with_few(job, race))
            or _with_less(job, race, job.form, reason)
            or _other(job, race, reason)
        ):
            job.measured = ()
            slow = [times for times in job.tried if not _faster(job, times)]
            allowed = [n for times in slow if (n := tune.needed(times)) is not None]
            hint = f" (--slowdown {min(allowed)} would allow what was timed)" if allowed else ""
            job.give_up("tune", reason + hint)
    except ModelError as e:
        if _with_more(job):
            return measure(job)
        job.give_up("tune", f"it could not be timed: {e}")
    return job.form is not None


def _with_more(job: Job) -> bool:
    """Has timing begin with as many candidates as the original needs to run; whether these are more than before."""
    (low, high), usual = job.span, job.options.usual
    more = [n for n in range(low + 1, low + _MORE) if n <= usual]
    least = next((n for n in more if _runs(job, n)), None) if not _runs(job, low) else None
    if least is not None:
        job.span = least, high
        job.notes.append(f"the original does not run at N = {low}: it is timed from N = {least} on")
    return least is not None


def _runs(job: Job, candidates: int) -> bool:
    """Whether the original runs with so many candidates."""
    race = race_of(job, (candidates,))
    try:
        race.measure(job.loaded.proto, race.feeds, 0.0)
    except ModelError:
        return False
    return True


def _with_few(job: Job, race: tune.Race) -> bool:
    """Leaves few candidates to the original, where the form is faster for many alone; whether both are faster."""
    form, single = job.chosen, job.measured
    most = max(single, key=lambda m: m.candidates)
    pair = Pair(form.limited(()), form, 1).measured(single)
    if most.low <= 1 or pair.below <= job.span[0] or pair.model() is None:
        return False
    for tried in crossover.with_any_few(pair, job.plain):
        if _pair_measured(job, race, tried):
            job.notes.append(f"for few candidates the original stands: measured {tune.told(single)} without")
            return True
    job.pair, job.measured = None, single
    return False


def _pair_measured(job: Job, race: tune.Race, pair: Pair) -> bool:
    """Times two plans against each other, to see from where on which is faster; whether both together are."""
    checked, job.pair = job.pair, pair.measured(around(job, pair, _model(pair.many)))
    job.measured = timed(job, race, pair.many, 0.25, made=written(job))
    if job.pair.below > SINGLE and any(m.candidates == 1 and m.ratio < 1 for m in job.measured):
        two, job.pair = job.pair, replace(job.pair, alone=True)
        times = timed(job, race, pair.many, 0.25, made=written(job))
        if _rank(job, times) > _rank(job, job.measured):
            job.measured = times
        else:
            job.pair = two
    same = job.pair == checked
    return _faster(job, job.measured) and (not job.options.check or same or gated(job).passed)


def around(job: Job, pair: Pair, many: ModelProto) -> list[Measured]:
    """Times the plan for many candidates against that for few, and goes on with more candidates until it is faster."""
    most, study, found = job.span[1], pair.many.study, list[Measured]()
    while not any(m.ratio > 1 for m in found) and all(m.candidates < most for m in found):
        known = max((m.candidates for m in found), default=0)
        points = tuple(n for n in pair.around(job.span) if n > known)
        for alone in (True, False):
            at = tuple(n for n in points if (n == 1) == alone)
            if at:
                few = pair.few.single if alone else _model(pair.few)
                feeds = tuple(pair.many.rewrite.translate(study.maker(_setting(study, n))) for n in at)
                race = tune.Race(replace(job.loaded, proto=few), at, feeds)
                found += against(job, race, many, feeds, 0.25)
        pair = replace(pair, below=2 * points[-1])
    return found


def _with_less(job: Job, race: tune.Race, form: Form, reason: str) -> bool:
    """Leaves out the rules without which the result is faster; whether there are such."""
    best = job.measured
    for _ in range(_MOST_ROUNDS):
        tried = _without_each(job, race, form)
        for _, other, times in tried:
            if _taken(job, other, times):
                left = ", ".join(sorted(other.choice.without - job.without))
                note = f"left out, because it was not faster: {left} ({reason}; {tune.told(times)} without)"
                job.report.retreats += [Retreat(r, None, "tune", reason) for r in left.split(", ")]
                job.notes.append(note)
                take(job, other)
                return True
        if not tried or tune.worst(tried[0][2]) <= tune.worst(best):
            return False
        _, form, best = tried[0]
    return False


def _taken(job: Job, form: Form, times: tuple[Measured, ...]) -> bool:
    """Whether a form is faster, and right."""
    job.form, job.measured = form, times
    return _faster(job, times) and (not job.options.check or gated(job).passed)


def _without_each(job: Job, race: tune.Race, form: Form) -> list[tuple[str, Form, tuple[Measured, ...]]]:
    """Times a form without each of its rules; the best first."""
    rules = [r for r in _suspects(form) if form.choice.uses(r)]
    tried: list[tuple[str, Form, tuple[Measured, ...]]] = []
    for rule in rules:
        other = form.leaving(form.choice.leaving(rules=[rule]))
        if other.changed and (not tried or _patient(job)):
            tried.append((rule, other, timed(job, race, other, 0.5 / len(rules))))
    return sorted(tried, key=lambda t: _rank(job, t[2]), reverse=True)


def _other(job: Job, race: tune.Race, reason: str) -> bool:
    """Takes the best of the other ways to rewrite the model; whether one is faster."""
    first = job.chosen
    forms = promising(job, [f for f in job.found if f.changed and f.model != first.model])
    tried = [(f, timed(job, race, f, 0.5 / len(forms))) for f in forms if _patient(job)]
    for form, times in sorted(tried, key=lambda t: _rank(job, t[1]), reverse=True):
        go_on_with(job, form)
        if _taken(job, form, times):
            job.notes.append(f"rewritten in another way than predicted to be fastest: {reason}; {tune.told(times)} now")
            return True
    go_on_with(job, first)
    return False


def _patient(job: Job) -> bool:
    return job.spent < _PATIENCE * job.options.tune


def _faster(job: Job, times: Sequence[Measured]) -> bool:
    """Whether what was timed is faster, and nowhere slower by more than is allowed."""
    return tune.faster(times, job.options.slowdown)


def _rank(job: Job, times: Sequence[Measured]) -> tuple[bool, float]:
    """What is faster comes first, by the mean; of the rest, what is least slow where it is slowest."""
    found = _faster(job, times)
    return found, tune.mean(times) if found else tune.worst(times)


def race_of(job: Job, points: tuple[int, ...]) -> tune.Race:
    """The original and the requests that it is timed with."""
    study = job.study
    return tune.Race(job.loaded, points, tuple(study.maker(_setting(study, n)) for n in points))


def timed(job: Job, race: tune.Race, form: Form, share: float, made: ModelProto | None = None) -> tuple[Measured, ...]:
    """Times a form, or what is made of it, for a share of the time there is; between the ends where that is faster."""
    made = _model(form) if made is None else made
    found = _raced(job, race, form, share, made)
    points = tune.between(job.span, job.options.usual)
    if points and _faster(job, found):  # sessions see the usual number first, as a server's do
        found += _raced(job, race_of(job, (job.options.usual, *points)), form, share, made)[1:]
    job.tried.append(found)
    return found


def _raced(job: Job, race: tune.Race, form: Form, share: float, made: ModelProto) -> tuple[Measured, ...]:
    """Times what is made of a form; more than once, in other sessions, where it seems to lose a little, or may."""
    feeds = [form.rewrite.translate(f) for f in race.feeds]
    tries = [against(job, race, made, feeds, share)]
    allowed = job.options.slowdown
    again = tune.unsure(tries[0], allowed) or (_faster(job, tries[0]) and tune.near(tries[0], allowed))
    while again and len(tries) < _MOST_SESSIONS:
        tries += [against(job, race, made, feeds, share) for _ in range(_AGAIN)]
        again = tune.disputed(tries, allowed)
    return tune.middle(tries)


def against(job: Job, race: tune.Race, made: ModelProto, feeds: Sequence[Feeds], share: float) -> tuple[Measured, ...]:
    """Times a model against another one, and adds up what that takes."""
    begin = time.monotonic()
    found = race.measure(made, feeds, share * job.options.tune)
    job.spent += time.monotonic() - begin
    return found


def _model(form: Form) -> ModelProto:
    assert form.model is not None
    return form.model


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
