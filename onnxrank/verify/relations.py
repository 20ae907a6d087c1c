"""Holds both models of an engine against the relations of `metamorphic`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from onnxrank.errors import ModelError
from onnxrank.feeds import Feed
from onnxrank.verify import inputs, judge, metamorphic
from onnxrank.verify.inputs import ORDINARY
from onnxrank.verify.options import LEVELS
from onnxrank.verify.points import MOST_ODD
from onnxrank.verify.report import Case
from onnxrank.verify.side import run_both
from onnxrank.workers import Crashed

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine

_TRUTH = "float64"


def relate(engine: Engine) -> None:
    """Tries the relations, in float64 where both models run in it, and puts what comes of it into the report."""
    count = max([n for n in engine.options.counts if 2 <= n <= MOST_ODD], default=0)
    if not count or not engine.samples:
        return
    maker = inputs.Kind(ORDINARY, engine.binding.declared, engine.inputs.ranges)
    per_row = _per_row(engine)
    for seed in range(2 if engine.options.level == "full" else 1):
        feed = maker(inputs.point(engine.inputs.symbols, count, 50 + seed, engine.usual))
        user = maker(inputs.point(engine.inputs.symbols, count, 70 + seed, engine.usual))
        try:
            _relate(engine, feed, user, per_row, seed, count)
        except Crashed as e:
            engine.report.find("metamorphic", e.kind, f"A process failed while candidates were permuted: {e}.")
            return


def _relate(engine: Engine, feed: Feed, user: Feed, per_row: dict[str, int], seed: int, count: int) -> None:
    provider = engine.options.providers[0]
    level = _TRUTH if engine.truth else LEVELS[0]
    session = _TRUTH if engine.truth else f"{provider}/{level}"
    declared = engine.binding.declared

    def allowed(output: str, scale: float) -> float:
        m = engine.verdicts.held.get((provider, ORDINARY, output))
        if engine.truth:
            return judge.ALGEBRA * max(scale, m.scale if m else 0.0)
        return m.allowed if m else 0.0

    made = metamorphic.relations(declared, feed, inputs.with_request(declared, user, feed), seed)
    feeds = [feed, inputs.with_request(declared, feed, user), *(f for relation in made for f in relation.feeds)]
    answers = run_both(engine.sides, session, [feeds, [engine.binding(f) for f in feeds]], engine.shared)
    for answer in (a for found in answers for a in found):
        if isinstance(answer, Crashed):
            raise answer
    first, second = (metamorphic.test(count, found[0], made, found[2:], per_row) for found in answers)
    if isinstance(first, ModelError) or isinstance(second, ModelError):
        return
    where = Case("metamorphic", provider, level, "user changed", count, seed, "", 0.0, 0.0, True)
    cases, excused = metamorphic.judge(first, second, allowed, where)
    before, after = (metamorphic.user_matters(*found[:2]) for found in answers)
    if not isinstance(before, ModelError) and not isinstance(after, ModelError):
        for output in (k for k in engine.shared if k in before):
            lost = output not in after
            cases.append(replace(where, output=output, error=float(lost), passed=not lost))
    if excused:
        engine.report.find(
            "metamorphic",
            "original",
            f"The original's candidates influence each other too: {', '.join(sorted(set(excused))[:4])}.",
            "warning",
            model="original",
        )
    engine.verdicts.file("metamorphic", engine.condition.relaxed(cases, feed, provider, engine.truth))


def _per_row(engine: Engine) -> dict[str, int]:
    """Outputs with a row per candidate, and how many entries of axis 0 each has."""
    out = {}
    for name in engine.shared:
        mine = [s for s in engine.samples if s.output == name and s.candidates > 0]
        sizes = {(s.candidates, s.original.shape[0] if s.original.ndim else 0) for s in mine}
        each = {n / c for c, n in sizes}
        if len(each) == 1 and (factor := each.pop()) >= 1 and factor == int(factor):
            if len(sizes) > 1 or factor == 1:
                out[name] = int(factor)
    return out
