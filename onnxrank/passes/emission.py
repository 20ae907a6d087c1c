"""The result: the model with its contract, the plan behind it, the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from onnx import ModelProto

from onnxrank import blocks, cost, plans, remarks
from onnxrank import model as files
from onnxrank.contract import store
from onnxrank.crossover import Pair
from onnxrank.errors import UsageError
from onnxrank.forms import Form
from onnxrank.joining import TOGETHER
from onnxrank.passes.job import Job
from onnxrank.plans import Measured, Plan
from onnxrank.report import Prediction, Report, RuleUse
from onnxrank.study import Study

_SCAN = (1, 8, 32, 128, 512, 2048)


@dataclass
class Result:
    """A rewritten model and what was done to it.

    Attributes:
        model: The new model, or the original where nothing applied. External data are referenced, not loaded.
        report: What was done.
        loaded: The input.
        study: What is known of the original; None where its contract said all there was to do.
        form: How it was rewritten, or would have been; None where that was not tried.
        full: The form with all rules, whatever it costs: it knows most about levels.
        plan: Every decision behind the new model.
    """

    model: ModelProto
    report: Report
    loaded: files.LoadedModel
    study: Study | None = None
    form: Form | None = None
    full: Form | None = None
    plan: Plan = field(kw_only=True)

    @property
    def changed(self) -> bool:
        """Whether anything applied."""
        return self.report.changed

    def save(self, out: str | os.PathLike[str]) -> None:
        """Writes the model; the input's own bytes where nothing applied.

        Raises:
            UsageError: The place cannot be written to.
            EnvironmentProblem: There is no space left.
        """
        if self.changed:
            files.save(self.model, self.loaded, out)
        else:
            files.save_unchanged(self.loaded, out)
        self.report.output = os.fspath(out)


def plan_of(job: Job, form: Form | None) -> Plan:
    """Every decision behind a form of the model; None for the original."""
    form = form if form is not None and (form.changed or job.blocks) else None
    rules = () if form is None else (r.name for r in form.rules if form.choice.uses(r.name))
    return Plan(
        source_sha256=job.loaded.sha256,
        made_by=job.report.version,
        interface=job.options.interface,
        guard=job.options.guard,
        candidates=job.options.span,
        roles=job.roles.to_dict(),
        offered=job.options.names,
        rules=tuple(dict.fromkeys(rules)),
        sites=() if form is None else (*job.preparation.sites, *form.sites),
        changed=form is not None,
        measured=job.measured,
        few=job.pair.stored() if job.pair is not None and form is not None else None,
        blocks=job.blocks if form is not None else 0,
        blocks_from=job.blocks_from if form is not None and job.blocks else 0,
    )


def emitted(job: Job) -> ModelProto:
    """The result with its contract."""
    form = job.chosen
    if job.made is not None and job.made[:-1] == (form, job.pair, job.measured, job.blocks, job.blocks_from):
        return job.made[-1]
    made = ModelProto()
    made.CopyFrom(written(job))
    contract = {
        "version": job.report.version,
        "source_sha256": job.loaded.sha256,
        "interface": job.options.interface,
        "candidates": list(job.options.span),
        "roles": job.roles.to_dict(),
        "rules": {r.name: r.sites for r in _uses(job)},
        "offered": list(job.options.names),
        "plan": plan_of(job, form).stored(),
    }
    if job.report.lengths:
        contract["lengths"] = {name: list(span) for name, span in job.report.lengths.items()}
    store(made, contract)
    job.made = form, job.pair, job.measured, job.blocks, job.blocks_from, made
    return made


def written(job: Job) -> ModelProto:
    """The result without its contract."""
    return for_many(job) if job.pair is None else _joined(job.pair.model(for_many(job)))


def for_many(job: Job) -> ModelProto:
    """The same where there are so many candidates that no other plan holds."""
    form = job.chosen
    try:
        many = blocks.blocked(form, job.blocks) if job.blocks else form.model
    except blocks.Impossible as e:
        raise UsageError(f"candidates cannot be scored in blocks: {e}") from e
    return _joined(Pair(form, form, job.blocks_from).model(many, TOGETHER) if job.blocks and job.blocks_from else many)


def _joined(model: ModelProto | None) -> ModelProto:
    if model is None:
        raise UsageError("the plan cannot be replayed: its two ways cannot stand in one file any more")
    return model


def _uses(job: Job) -> list[RuleUse]:
    """The rules that are applied, and what they save."""
    form, base, n = job.chosen, job.preparation.base, job.options.usual
    uses = form.rewrite.rule_uses(form.original_shapes(n), form.shapes(n))
    if base.packed:
        after = sum(c.macs for c in cost.by_level(base.model.graph, base.shapes(n)).values())
        for rule in plans.PACKING[::-1]:
            places = dict.fromkeys(p.name for p in base.packed if p.rule == rule)
            saved = job.report.macs_before - after if rule == plans.PACK else 0
            uses[:0] = [RuleUse(rule, len(places), saved, tuple(places))] if places else []
    return uses


def _remark(job: Job, form: Form | None) -> None:
    """Says of every place that was left alone why it was."""
    if form is not None:
        job.report.refusals = remarks.by_loss([*job.remarks.of(form), *job.others])


def result(job: Job) -> Result:
    """The result, and the report of it."""
    form = job.form
    if form is None or form.model is None:
        return unchanged(job)
    _remark(job, form if form.changed else job.full)
    job.notes += [*dict.fromkeys(map(str, form.study.packed)), *form.rewrite.notes]
    made, shapes = emitted(job), form.shapes(job.options.usual)
    job.report.changed = True
    job.report.after = cost.by_level(form.model.graph, shapes)
    job.report.rules = _uses(job)
    job.report.size_after = made.ByteSize()
    if job.pair is not None:
        job.report.below = job.pair.below
    job.report.predictions = _predictions(job.before(), _time(job), job.measured)
    return Result(made, job.report, job.loaded, job.study, form, job.full, plan=plan_of(job, form))


def unchanged(job: Job) -> Result:
    """The original, and the report of why it is that."""
    job.report.changed = False
    form = job.form or job.full
    _remark(job, form)
    return Result(job.loaded.proto, job.report, job.loaded, job.study, form, job.full, plan=plan_of(job, None))


def _time(job: Job) -> Callable[[int], float]:
    """Predicted seconds of the result, by the number of candidates."""
    form, pair = job.chosen, job.pair

    def many(n: int) -> float:
        divided = job.blocks and n >= job.blocks_from
        return blocks.seconds(form, job.blocks, n) if divided else form.time(n)

    def time(n: int) -> float:
        if pair is None:
            return many(n)
        return pair.time(n) if n < pair.below else many(n) + pair.overhead

    return time


def _predictions(
    old: Callable[[int], float], new: Callable[[int], float], measured: Iterable[Measured]
) -> list[Prediction]:
    """Predicted ratios over the number of candidates, and measured ones."""
    seen = {m.candidates: (m.ratio, m.low, m.high) for m in measured}
    return [Prediction(n, round(old(n) / new(n), 3), *seen.get(n, ())) for n in sorted({*_SCAN, *seen})]
