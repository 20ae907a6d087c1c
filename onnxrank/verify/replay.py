"""Recorded requests through both models: part by part (`engines.py`), a batch at a time, never all in memory.

Every part is judged by itself, and what came of it is added up in the order of the parts: the same report whoever
worked on which, on one machine or on many.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxrank import cluster
from onnxrank.errors import ModelError
from onnxrank.feeds import Ranges
from onnxrank.verify import judge, ranking
from onnxrank.verify.inputs import outside, rows, violations
from onnxrank.verify.judge import Measure, Sample
from onnxrank.verify.options import LEVELS, Options
from onnxrank.verify.pairing import Binding
from onnxrank.verify.points import Point
from onnxrank.verify.recorded import Part, Source, source
from onnxrank.verify.report import Case, Ranking
from onnxrank.verify.side import Side, run_both
from onnxrank.workers import Crashed, Outputs

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine

RECORDED = "recorded"
_PART = 8192
"""About how many candidates are judged at once."""
_BATCH = 64
_BATCH_BYTES = 16 << 20
_MOST_FAILURES = 200
"""Failing comparisons that are kept; the others are counted."""
_TRUTH = "float64"


@dataclass(frozen=True)
class _Setting:
    """What is known of the run by whoever judges requests; see `Engine`."""

    binding: Binding
    options: Options
    shared: Sequence[str]
    truth: bool
    coarse: np.dtype[Any] | None
    step: float
    rounds_weights: bool
    held: Mapping[tuple[str, str, str], Measure]
    ranges: Ranges


@dataclass
class _Found:
    """What came of some requests; of those that follow each other, added up in their order.

    Attributes:
        requests: Their number.
        rows: Candidates that were compared.
        empty: Requests without any.
        violations: Requests that do not keep the contract.
        inputs: Per input that differs within a request: in how many, the first, and its row.
        trouble: Findings.
        passed: Comparisons that did, by verdict.
        failed: Those that did not.
        cases: The first of these.
        points: Their requests.
        ranks: How well the order stayed, by output.
        auc: Sums of the AUC of both models, and of requests that have one.
        loss: Sums of the log loss of both models, and of rows.
    """

    requests: int = 0
    rows: int = 0
    empty: int = 0
    violations: int = 0
    inputs: dict[str, tuple[int, str, int]] = field(default_factory=dict)
    trouble: list[tuple[str, str, str, str | None]] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    cases: list[Case] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    ranks: dict[str, Ranking] = field(default_factory=dict)
    auc: dict[str, list[float]] = field(default_factory=dict)
    loss: dict[str, list[float]] = field(default_factory=dict)

    def violated(self, name: str, broken: Iterable[tuple[str, int]]) -> None:
        """Counts a request that does not keep the contract."""
        self.violations += 1
        for what, row in broken:
            self._broken(what, (1, name, row))

    def _broken(self, what: str, more: tuple[int, str, int]) -> None:
        count, first, row = self.inputs.get(what, (0, *more[1:]))
        self.inputs[what] = (count + more[0], first, row)

    def fail(self, c: Case, points: Iterable[Point]) -> None:
        """Keeps a comparison that failed, and its request, if there are not too many yet."""
        if len(self.cases) < _MOST_FAILURES:
            self.cases.append(c)
            if not any(p.seed == c.seed for p in self.points):
                self.points.extend(p for p in points if p.seed == c.seed)

    def rank(self, r: Ranking) -> None:
        """Takes in how well an order stayed."""
        old = self.ranks.get(r.output, replace(r, requests=0))
        self.ranks[r.output] = replace(
            r,
            requests=old.requests + r.requests,
            overlap=min(old.overlap, r.overlap),
            tau=min(old.tau, r.tau),
            move=max(old.move, r.move),
        )

    def add(self, more: _Found) -> None:
        """Takes in what came of the requests that follow."""
        for what, broken in more.inputs.items():
            self._broken(what, broken)
        self.trouble += more.trouble
        points = [replace(p, seed=p.seed + self.requests) for p in more.points]
        for c in more.cases:
            self.fail(replace(c, seed=c.seed + self.requests), points)
        for r in more.ranks.values():
            self.rank(r)
        self.passed += more.passed
        self.failed += more.failed
        for mine, its in ((self.auc, more.auc), (self.loss, more.loss)):
            for name, sums in its.items():
                mine[name] = [a + b for a, b in zip(mine.get(name, [0.0] * len(sums)), sums, strict=True)]
        self.requests += more.requests
        self.rows += more.rows
        self.empty += more.empty
        self.violations += more.violations


def replay(engine: Engine) -> None:
    """Compares the models of an engine on recorded requests and puts what it finds into the engine's report.

    Raises:
        UsageError: The data cannot be used.
    """
    options, report = engine.options, engine.report
    assert options.data is not None
    found = source(options.data, engine.binding.declared, options.request_id, options.labels, _PART)
    jobs = options.jobs or (1 if any(s.large for s in engine.sides) else os.cpu_count() or 1)
    where = cluster.engine(options.engine, min(jobs, len(found.parts)))
    known = engine.verdicts
    setting = _Setting(
        engine.binding, options, engine.shared, engine.truth, known.coarse, known.step, known.rounds_weights,
        known.held, engine.inputs.ranges,
    )  # fmt: skip
    total = _Found()
    engine.say("recorded requests")
    for its in where.each(_Replay(found, setting, tuple(s.twin() for s in engine.sides), [engine.sides]), found.parts):
        total.add(its)
        engine.count(total.rows, found.rows)
    if not total.requests:
        report.find("data", "empty", f"{os.fspath(options.data)} holds no request.", "error")
        return
    _told(engine, total)
    report.settle("data", True)


class _Replay:
    """The task of comparing models on a part of the requests.

    Args:
        requests: All of them.
        setting: What is known.
        sides: The models, without processes.
        ready: Pairs that have processes already, whose owner ends them; they stay where they are.
    """

    def __init__(
        self, requests: Source, setting: _Setting, sides: tuple[Side, ...], ready: Sequence[tuple[Side, ...]] = ()
    ) -> None:
        self._requests, self._setting, self._sides = requests, setting, sides
        self._ready, self._own = list(ready), tuple(ready)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._requests, self._setting, self._sides)

    def open(self) -> tuple[Side, ...]:
        """A pair of processes, with both models."""
        return self._ready.pop() if self._ready else tuple(s.twin() for s in self._sides)

    def close(self, held: tuple[Side, ...], good: bool) -> None:
        """Ends a pair of processes."""
        if held not in self._own:
            for s in held:
                s.close(good=False)

    def run(self, held: tuple[Side, ...], part: Part) -> _Found:
        """Compares on one part."""
        found = _Found()
        judge_ = _Judge(self._setting, found)
        for batch in self._batches(part, found):
            judge_.add(self._run(held, batch, found), batch)
        return found

    def _batches(self, part: Part, found: _Found) -> Iterator[list[Point]]:
        """Requests that keep the contract, in batches; the others are findings."""
        binding = self._setting.binding
        batch: list[Point] = []
        size = 0
        for number, r in enumerate(self._requests.read(part)):
            found.requests += 1
            broken = violations(binding.declared, r.feed)
            if broken:
                found.violated(r.name, broken)
                continue
            count = rows(binding.declared, r.feed) or 0
            if count == 0:
                found.empty += 1
                continue
            batch.append(Point(RECORDED, count, number, r.feed, binding(r.feed), r.name, r.labels))
            size += sum(v.nbytes for v in r.feed.values())
            if len(batch) >= _BATCH or size >= _BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _run(self, sides: tuple[Side, ...], batch: list[Point], found: _Found) -> list[Sample]:
        """Runs a batch everywhere."""
        known = self._setting
        samples: list[Sample] = []
        feeds = [[p.feed for p in batch], [p.bound for p in batch]]
        truths = list(zip(*run_both(sides, _TRUTH, feeds, known.shared), strict=True)) if known.truth else None
        for provider in known.options.providers:
            for level in LEVELS:
                first, second = run_both(sides, f"{provider}/{level}", feeds, known.shared)
                for k, (p, a, b) in enumerate(zip(batch, first, second, strict=True)):
                    if isinstance(a, ModelError) or isinstance(b, ModelError):
                        found.trouble.append(self._trouble(p, a, b))
                        continue
                    pair = truths[k] if truths is not None else ()
                    exact = [t for t in pair if isinstance(t, dict)]
                    for o in known.shared:
                        true = [t[o] for t in exact] if len(exact) == 2 else [None, None]
                        samples.append(
                            Sample(
                                provider, level, RECORDED, p.candidates, p.seed, o, a[o], b[o], true[0], true[1],
                                str(p.request),
                            )
                        )  # fmt: skip
        return samples

    def _trouble(self, p: Point, a: Outputs, b: Outputs) -> tuple[str, str, str, str | None]:
        """The finding of a request that one of the models does not run on."""
        if not isinstance(a, ModelError):
            kind = b.kind if isinstance(b, Crashed) else "run"
            text = f"It does not run on a recorded request that the original runs on: {b}"
            return "rounding", kind, f"{text} ({p.request}).", "optimized"
        kind = a.kind if isinstance(a, Crashed) else "run"
        strange = outside(self._setting.binding.declared, self._setting.ranges, p.feed)
        if strange and kind == "run":
            text = f"A recorded request holds ids that no table has: {'; '.join(strange)}"
            return "data", "range", f"{text} ({p.request}).", "original"
        return "rounding", kind, f"The original does not run on a recorded request: {a} ({p.request}).", "original"


class _Judge:
    """Judges batches of one part, each held against what is known of the run and of the part so far."""

    def __init__(self, setting: _Setting, found: _Found) -> None:
        self._setting, self._found = setting, found
        self._held: dict[tuple[str, str, str], Measure] = dict(setting.held)

    def add(self, samples: list[Sample], batch: list[Point]) -> None:
        """Judges a batch."""
        known, found = self._setting, self._found
        new = judge.measures(samples, known.coarse, known.step)
        for key, m in new.items():
            old = [self._held[k] for k in (key, (key[0], "random", key[2])) if k in self._held]
            self._held[key] = Measure(*(max([x, *(getattr(o, n) for o in old)]) for n, x in vars(m).items()))
        cases = [] if known.rounds_weights else judge.algebra(samples)
        cases += judge.rounding(samples, self._held, known.options.tolerance)
        order, ranks = judge.ranked(samples, self._held, known.options.top_k)
        for r in ranks:
            found.rank(r)
        for c in [*cases, *order]:
            if c.passed:
                found.passed[c.verdict] += 1
            else:
                found.failed[c.verdict] += 1
                found.fail(c, batch)
        self._labels(samples, batch)
        found.rows += sum(p.candidates for p in batch)

    def _labels(self, samples: list[Sample], batch: list[Point]) -> None:
        """AUC and log loss of one level of the first provider."""
        options = self._setting.options
        if options.labels is None:
            return
        labels = {p.seed: p.labels for p in batch}
        for s in samples:
            mine = labels.get(s.seed)
            if (s.provider, s.level) != (options.providers[0], LEVELS[-1]) or mine is None:
                continue
            before, after = (ranking.columns(x, s.candidates) for x in (s.original, s.optimized))
            if before is None or after is None:
                continue
            for column in range(before.shape[1]):
                name = s.output if before.shape[1] == 1 else f"{s.output}[:, {column}]"
                a, b = before[:, column], after[:, column]
                auc = [ranking.auc(x, mine) for x in (a, b)]
                if auc[0] is not None and auc[1] is not None:
                    sums = self._found.auc.setdefault(name, [0.0, 0.0, 0.0])
                    for k, value in enumerate((auc[0], auc[1], 1.0)):
                        sums[k] += value
                loss = [ranking.logloss(x, mine) for x in (a, b)]
                if loss[0] is not None and loss[1] is not None:
                    held = self._found.loss.setdefault(name, [0.0, 0.0, 0.0])
                    held[0] += float(loss[0].sum())
                    held[1] += float(loss[1].sum())
                    held[2] += len(loss[0])


def _told(engine: Engine, total: _Found) -> None:
    """Puts what came of all requests into the report."""
    report = engine.report
    report.requests += total.requests - total.violations - total.empty
    for verdict, kind, text, model in total.trouble:
        report.find(verdict, kind, text, model=model)
    for what, (count, first, row) in total.inputs.items():
        report.find(
            "data",
            "contract",
            f"The request-level input {what!r} differs within a request in {count} of {total.requests} recorded "
            f"requests, first in {first}, row {row}: its role is wrong, or the data is. These were not "
            "compared.",
        )
    if total.empty:
        report.find("data", "empty", f"{total.empty} recorded requests have no candidate.", "note")
    for verdict in total.failed:
        report.settle(verdict, False)
    for verdict in total.passed:
        if report.verdicts[verdict] == "skipped":
            report.settle(verdict, True)
    report.cases.extend(total.cases)
    engine.points.extend(total.points)
    dropped = sum(total.failed.values()) - _MOST_FAILURES
    if dropped > 0:
        report.find("rounding", "more", f"{dropped} more comparisons on recorded requests failed.", "note")
    for name, r in total.ranks.items():
        auc, loss = total.auc.get(name), total.loss.get(name)
        report.ranking.append(
            replace(
                r,
                output=f"{name} (recorded)",
                auc_before=auc[0] / auc[2] if auc else None,
                auc_after=auc[1] / auc[2] if auc else None,
                logloss_before=loss[0] / loss[2] if loss and loss[2] else None,
                logloss_after=loss[1] / loss[2] if loss and loss[2] else None,
            )
        )
