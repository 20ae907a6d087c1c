"""Replaying: what a plan says is done, and nothing is decided or timed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from onnxrank import plans
from onnxrank.crossover import Pair
from onnxrank.errors import UsageError
from onnxrank.forms import Form
from onnxrank.passes.choosing import take
from onnxrank.passes.emission import plan_of
from onnxrank.passes.job import Job
from onnxrank.passes.options import Options, span_of
from onnxrank.plans import Plan, label
from onnxrank.ruleset import choose_rules
from onnxrank.study import fit


def follow(job: Job, found: Plan) -> bool:
    """Rewrites the model as a plan says; whether that changes anything.

    Raises:
        UsageError: The plan does not fit the model or the rules.
    """
    if not found.changed:
        return False
    study = job.preparation.repeat(found)
    fit([s for s in found.sites if s.place.rule not in plans.PREPARING], study)
    o = job.options
    rules = [r for r in o.rules if r.name in found.rules]
    job.full = Form(study, rules, o.interface, o.guard, o.span, found.choice())
    job.measured = found.measured
    job.blocks = found.blocks if o.blocks is None else o.blocks
    job.blocks_from = found.blocks_from
    take(job, job.full)
    if found.few is not None:
        rules = [r for r in o.rules if r.name in found.few.rules]
        base = job.plain if found.few.original else job.full
        few = base.limited(rules, found.few.choice())
        job.pair = Pair(few, job.full, found.few.below, found.few.alone)
    wanted, made = (
        {(s.place, s.chosen) for s in (*p.sites, *(p.few.sites if p.few else ()))}
        for p in (found, plan_of(job, job.full))
    )
    lost = sorted(wanted ^ made, key=lambda d: (d[0].index, d[0].rule))
    if lost:
        node = label(study.model.graph.node[lost[0][0].index])
        raise UsageError(
            f"the plan cannot be replayed: at node {node!r} rule {lost[0][0].rule!r} does something else by now; "
            f"the plan was made by onnxrank {found.made_by}, with its rules"
        )
    return job.full.changed or job.blocks > 0


def replayed_options(
    found: Plan,
    given: Options,
    select: Sequence[str] | None,
    ignore: Sequence[str],
    extra_rules: Sequence[str | os.PathLike[str]],
) -> Options:
    """The options of a run that replays a plan.

    Raises:
        UsageError: Something else is asked for than what the plan says, or a rule of it is not there.
    """
    default = Options()
    for name, value, own, plain in (
        ("interface", given.interface, found.interface, default.interface),
        ("candidates", given.span, found.candidates, default.span),
        ("guard", given.guard, found.guard, default.guard),
        ("tune", given.tune, 0.0, default.tune),
        ("blocks", given.blocks or None, found.blocks, default.blocks),
        ("select", select, None, None),
        ("ignore", tuple(ignore), (), ()),
    ):
        if value not in (own, plain):
            raise UsageError(f"the plan says all that {name} does: leave {name} out, or the plan")
    known = {r.name for r in choose_rules(None, (), extra_rules)}
    missing = [r for r in found.rules if r not in known]
    if missing:
        raise UsageError(f"the plan uses the rule {missing[0]!r}, which is not there; name its file with --rules")
    rules = choose_rules(found.rules, (), extra_rules)
    return replace(
        given,
        interface=found.interface,
        guard=found.guard,
        span=span_of(found.candidates),
        rules=rules,
        offered=found.offered,
        strict=True,
    )
