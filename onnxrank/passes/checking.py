"""The third pass: the result is held against the original, and what does not pass is taken back, site by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from onnx import ModelProto

from onnxrank import plans
from onnxrank.errors import CheckFailed, ModelError
from onnxrank.model import LoadedModel
from onnxrank.passes.choosing import choose, pays, take, uncross
from onnxrank.passes.emission import Result, emitted
from onnxrank.passes.job import Job
from onnxrank.passes.preparation import Way
from onnxrank.plans import Choice, Site, label
from onnxrank.report import Comparison, Retreat
from onnxrank.retreat import GaveUp, Guilty, Search, order
from onnxrank.roles import Roles
from onnxrank.verify import Engine, Options, failure, gate
from onnxrank.verify import report as verdicts
from onnxrank.verify.structure import quantises

_MOST_RETREATS = 8
"""Sites that are left out, one after the other, before the model as a whole is left alone."""


def check(job: Job) -> bool:
    """Holds the result against the original, and takes back what does not pass; whether anything is left.

    Raises:
        CheckFailed: With `strict`: it does not pass as it is.
        ModelError: It cannot be checked.
    """
    if not job.options.check:
        return True
    for _ in range(_MOST_RETREATS):
        found = gated(job)
        if found.passed:
            return True
        if job.options.strict:
            job.report.changed = False
            raise CheckFailed(f"the rewritten model did not pass its check: {failure(found)}", job.report)
        job.options.say("looking for what fails the check")
        if _few_fail(job, found):
            if not uncross(job, "check", failure(found)):
                return False
            continue
        way, base, counts = job.preparation.way(job.chosen), job.preparation.base, gate.failing_candidates(found)
        if base.packed and not _held(job, base.model, counts).passed:
            _unpack(job, failure(found), counts)
        elif way is not None and way.places and not _held(job, way.base.model, counts).passed:
            _join(job, way, "check", failure(found))
        else:
            guilty = _culprit(job, found)
            if guilty is None:
                break
            _retreat(job, guilty, "check", failure(found))
        if job.pair is None and not pays(job):
            job.form = None
            return False
    job.give_up("check", failure(found))
    return False


def _few_fail(job: Job, found: verdicts.Report) -> bool:
    """Whether a result of two plans fails for few candidates, or not for a number of them alone."""
    failed = [c.candidates for c in found.failed_cases]
    return job.pair is not None and (not failed or min(failed) < job.pair.below)


def gated(job: Job) -> verdicts.Report:
    """What holding the result against the original finds."""
    made, study = emitted(job), job.study
    if study.facts.note:
        raise ModelError(f"the result cannot be checked: {study.facts.note}; --no-check writes it unchecked")
    found = _held(job, made)
    job.report.looked, job.report.unseen = found.looked, found.unseen
    job.report.checks = gate.comparisons(found)
    if found.passed:
        job.notes += [f.message for f in found.findings if f.severity != "error"]
    return found


class Told(Protocol):
    """A report that says what a check looked at."""

    checks: list[Comparison]
    looked: list[str]
    unseen: list[str]
    notes: list[str]


def held(
    result: Result, made: LoadedModel, level: str, lengths: Mapping[str, tuple[int, int]], report: Told
) -> verdicts.Report:
    """Holds what was made of a result, as a model of the original's inputs, against the original.

    Args:
        result: The result.
        made: What was made of it.
        level: How much is compared.
        lengths: Least and most of the inputs' symbolic lengths.
        report: Receives what was looked at, and what is worth knowing of it if nothing is wrong.
    """
    told, study = result.report, result.study
    known = None if study is None else study.known
    options = Options(roles=Roles.from_dict(told.roles), level=level, lengths=lengths, span=told.candidates)
    with Engine(result.loaded, made, options, known=known) as engine:
        found = engine.run()
    report.checks, report.looked, report.unseen = gate.comparisons(found), found.looked, found.unseen
    if found.passed:
        report.notes += [f.message for f in found.findings if f.severity != "error" and f.message not in report.notes]
    return found


def _held(job: Job, made: ModelProto, candidates: Sequence[int] | None = None) -> verdicts.Report:
    """Holds a model against the original, at some numbers of candidates or all of the check's."""
    level, lengths = str(job.options.check), job.options.lengths
    return gate.gate(job.loaded, made, job.roles, job.study.known, level, lengths, candidates, job.side)


def _culprit(job: Job, found: verdicts.Report) -> Guilty | None:
    """Which decision makes the check fail; None where that cannot be told in time."""
    form, counts = job.chosen, gate.failing_candidates(found)

    def right(made: ModelProto) -> bool:
        return _held(job, made, counts).passed

    try:
        return Search(form.made, right).culprit(form.choice, order([r.name for r in job.options.rules]))
    except GaveUp:
        return None


def _retreat(job: Job, guilty: Guilty, cause: str, reason: str) -> None:
    """Leaves a site out, or a rule, and goes on with the rest.

    Where values are quantised on the way, whatever moves their last digit may be a step off, and one such site is
    as good as another: from the second of a rule at an operator on, all that are alike are left out at once.
    """
    form = job.chosen
    choice = guilty.without(form.choice)
    alike = _alike(job, guilty)
    job.guilty |= {(guilty.rule, s.op) for s in guilty.sites}
    job.report.retreats.append(Retreat(guilty.rule, guilty.node, cause, reason))
    job.report.retreats += [Retreat(s.place.rule, s.node, cause, f"as at {guilty.node!r}") for s in alike]
    others = f", and so were {len(alike)} like it" if alike else ""
    job.notes.append(f"{guilty} was left out{others}: {reason}")
    take(job, form.leaving(choice.leaving(s.place for s in alike)))


def _alike(job: Job, guilty: Guilty) -> list[Site]:
    """Sites to be left out with one that fails."""
    kinds = {(guilty.rule, s.op) for s in guilty.sites} & job.guilty
    if not kinds or not quantises(job.loaded.proto):
        return []
    own = {s.place for s in guilty.sites}
    return [s for s in job.chosen.sites if s.taken and (s.place.rule, s.op) in kinds and s.place not in own]


def _unpack(job: Job, reason: str, counts: Sequence[int] | None) -> None:
    """Leaves what makes the check fail unpacked, and goes on with the rest."""
    packing, packed = job.preparation.packing, job.preparation.base.packed
    rules = [r for r in plans.PACKING if any(p.rule == r for p in packed)]
    try:
        guilty = Search(packing, lambda m: _held(job, m, counts).passed).culprit(Choice(), rules)
    except GaveUp:
        guilty = None
    wrong = guilty.sites if guilty is not None and guilty.sites else packing(Choice())[1]
    job.preparation.leave_unpacked(wrong)
    job.report.retreats += [Retreat(s.place.rule, s.node, "check", reason) for s in wrong]
    for rule in dict.fromkeys(s.place.rule for s in wrong):
        shown = dict.fromkeys(s.node for s in wrong if s.place.rule == rule)
        job.notes.append(f"{rule} was left out at {', '.join(shown)}: {reason}")
    choose(job, job.preparation.candidates())


def _join(job: Job, way: Way, cause: str, reason: str) -> None:
    """Leaves sequences as they are joined, and goes on with the rest."""
    nodes = job.preparation.base.model.graph.node
    job.report.retreats += [Retreat(plans.SEGMENTS, label(nodes[k]), cause, reason) for k in way.places]
    job.notes.append(f"sequences were left as they are joined: {reason}")
    choose(job, [f for f in job.found if f.study not in (way.base, way.written_out)])
