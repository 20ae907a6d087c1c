"""Recorded requests through both models: in several pairs of processes, a batch at a time, never all in memory."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from onnxrank.errors import ModelError
from onnxrank.verify import judge, ranking
from onnxrank.verify.inputs import outside, rows, violations
from onnxrank.verify.judge import Measure, Sample
from onnxrank.verify.options import LEVELS
from onnxrank.verify.points import Point
from onnxrank.verify.recorded import Request, source
from onnxrank.verify.report import Case, Ranking
from onnxrank.verify.side import Side, run_both
from onnxrank.workers import Crashed

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine

RECORDED = "recorded"
_BATCH = 64
_BATCH_BYTES = 16 << 20
_MOST_FAILURES = 200
"""Failing comparisons that are kept; the others are counted."""
_TRUTH = "float64"


@dataclass
class _Done:
    """What came of one batch."""

    samples: list[Sample] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    trouble: list[tuple[str, str, str, str, str | None]] = field(default_factory=list)


def replay(engine: Engine) -> None:
    """Compares the models of an engine on recorded requests and puts what it finds into the engine's report.

    Raises:
        UsageError: The data cannot be used.
    """
    options, report = engine.options, engine.report
    assert options.data is not None
    found = source(options.data, engine.binding.declared, options.request_id, options.labels)
    jobs = options.jobs or (1 if any(s.large for s in engine.sides) else os.cpu_count() or 1)
    pool = _Pairs(engine, jobs)
    total = _Totals(engine)
    engine.say("recorded requests")
    try:
        with ThreadPoolExecutor(jobs) as threads:
            pending: set[Future[_Done]] = set()
            try:
                for batch in _batches(engine, total, found.read()):
                    pending.add(threads.submit(pool.run, batch))
                    if len(pending) >= 2 * jobs:
                        pending = _collect(pending, total, found.rows)
                while pending:
                    pending = _collect(pending, total, found.rows)
            except BaseException:
                for f in pending:
                    f.cancel()
                raise
    finally:
        pool.close()
    total.finish()
    if not total.requests:
        report.find("data", "empty", f"{os.fspath(options.data)} holds no request.", "error")
        return
    report.settle("data", True)


def _collect(pending: set[Future[_Done]], total: _Totals, rows_known: int | None) -> set[Future[_Done]]:
    done, left = wait(pending, return_when=FIRST_COMPLETED)
    for f in done:
        total.add(f.result(), rows_known)
    return left


def _batches(engine: Engine, total: _Totals, requests: Iterator[Request]) -> Iterator[list[Point]]:
    """Requests that keep the contract, in batches; the others are findings."""
    batch: list[Point] = []
    size = 0
    for number, r in enumerate(requests):
        total.requests += 1
        broken = violations(engine.binding.declared, r.feed)
        if broken:
            total.violated(r.name, broken)
            continue
        count = rows(engine.binding.declared, r.feed) or 0
        if count == 0:
            total.empty += 1
            continue
        batch.append(Point(RECORDED, count, number, r.feed, engine.binding(r.feed), r.name, r.labels))
        size += sum(v.nbytes for v in r.feed.values())
        if len(batch) >= _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Pairs:
    """Pairs of processes, each with both models."""

    def __init__(self, engine: Engine, jobs: int) -> None:
        self._engine = engine
        self._free: queue.SimpleQueue[tuple[Side, ...]] = queue.SimpleQueue()
        self._all: list[tuple[Side, ...]] = [engine.sides]
        self._free.put(engine.sides)
        for _ in range(jobs - 1):
            pair = tuple(s.twin() for s in engine.sides)
            self._all.append(pair)
            self._free.put(pair)

    def close(self) -> None:
        """Ends the further processes."""
        for pair in self._all[1:]:
            for s in pair:
                s.close(good=False)

    def run(self, batch: list[Point]) -> _Done:
        """Runs a batch everywhere."""
        sides = self._free.get()
        try:
            return self._run(sides, batch)
        finally:
            self._free.put(sides)

    def _run(self, sides: tuple[Side, ...], batch: list[Point]) -> _Done:
        engine, out = self._engine, _Done(points=batch)
        feeds = [[p.feed for p in batch], [p.bound for p in batch]]
        truths = list(zip(*run_both(sides, _TRUTH, feeds, engine.shared), strict=True)) if engine.truth else None
        for provider in engine.options.providers:
            for level in LEVELS:
                first, second = run_both(sides, f"{provider}/{level}", feeds, engine.shared)
                for k, (p, a, b) in enumerate(zip(batch, first, second, strict=True)):
                    name = str(p.request)
                    if isinstance(a, ModelError):
                        kind = a.kind if isinstance(a, Crashed) else "run"
                        text = f"The original does not run on a recorded request: {a}"
                        strange = outside(engine.binding.declared, engine.ranges, p.feed)
                        if strange and kind == "run":
                            told = f"A recorded request holds ids that no table has: {'; '.join(strange)}"
                            out.trouble.append(("data", "range", told, name, "original"))
                        else:
                            out.trouble.append(("rounding", kind, text, name, "original"))
                        continue
                    if isinstance(b, ModelError):
                        kind = b.kind if isinstance(b, Crashed) else "run"
                        text = f"It does not run on a recorded request that the original runs on: {b}"
                        out.trouble.append(("rounding", kind, text, name, "optimized"))
                        continue
                    pair = truths[k] if truths is not None else ()
                    exact = [t for t in pair if isinstance(t, dict)]
                    for o in engine.shared:
                        true = [t[o] for t in exact] if len(exact) == 2 else [None, None]
                        out.samples.append(
                            Sample(
                                provider, level, RECORDED, p.candidates, p.seed, o, a[o], b[o], true[0], true[1], name
                            )
                        )
        return out


class _Totals:
    """What all batches come to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.requests = 0
        self.rows = 0
        self.empty = 0
        self._violations = 0
        self._inputs: dict[str, tuple[int, str, int]] = {}
        self._held: dict[tuple[str, str, str], Measure] = dict(engine.held)
        self._passed: dict[str, int] = {}
        self._failed: dict[str, int] = {}
        self._ranks: dict[str, Ranking] = {}
        self._auc: dict[str, list[float]] = {}
        self._loss: dict[str, list[float]] = {}

    def violated(self, name: str, broken: list[tuple[str, int]]) -> None:
        """Counts a request that does not keep the contract."""
        self._violations += 1
        for what, row in broken:
            count, first, at = self._inputs.get(what, (0, name, row))
            self._inputs[what] = (count + 1, first, at)

    def add(self, done: _Done, rows_known: int | None) -> None:
        """Judges a batch."""
        engine = self._engine
        for verdict, kind, text, name, model in done.trouble:
            engine.report.find(verdict, kind, f"{text} ({name}).", model=model)
        new = judge.measures(done.samples, engine.coarse, engine.step)
        for key, m in new.items():
            old = [self._held[k] for k in (key, (key[0], "random", key[2])) if k in self._held]
            self._held[key] = Measure(*(max([x, *(getattr(o, n) for o in old)]) for n, x in vars(m).items()))
        cases = [] if engine.rounds_weights else judge.algebra(done.samples)
        cases += judge.rounding(done.samples, self._held, engine.options.tolerance)
        order, ranks = judge.ranked(done.samples, self._held, engine.options.top_k)
        self._merge(ranks)
        for c in [*cases, *order]:
            self._count(c, done)
        self._labels(done)
        self.rows += sum(p.candidates for p in done.points)
        engine.count(self.rows, rows_known)

    def _count(self, c: Case, done: _Done) -> None:
        if c.passed:
            self._passed[c.verdict] = self._passed.get(c.verdict, 0) + 1
            return
        self._failed[c.verdict] = self._failed.get(c.verdict, 0) + 1
        engine = self._engine
        engine.report.settle(c.verdict, False)
        if sum(self._failed.values()) <= _MOST_FAILURES:
            engine.report.cases.append(c)
            if not any(p.seed == c.seed and p.inputs == RECORDED for p in engine.points):
                engine.points.extend(p for p in done.points if p.seed == c.seed)

    def _merge(self, ranks: list[Ranking]) -> None:
        for r in ranks:
            old = self._ranks.get(r.output, replace(r, requests=0))
            self._ranks[r.output] = replace(
                r,
                requests=old.requests + r.requests,
                overlap=min(old.overlap, r.overlap),
                tau=min(old.tau, r.tau),
                move=max(old.move, r.move),
            )

    def _labels(self, done: _Done) -> None:
        """AUC and log loss of one level of the first provider."""
        options = self._engine.options
        if options.labels is None:
            return
        labels = {p.seed: p.labels for p in done.points}
        for s in done.samples:
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
                    sums = self._auc.setdefault(name, [0.0, 0.0, 0.0])
                    for k, value in enumerate((auc[0], auc[1], 1.0)):
                        sums[k] += value
                loss = [ranking.logloss(x, mine) for x in (a, b)]
                if loss[0] is not None and loss[1] is not None:
                    held = self._loss.setdefault(name, [0.0, 0.0, 0.0])
                    held[0] += float(loss[0].sum())
                    held[1] += float(loss[1].sum())
                    held[2] += len(loss[0])

    def finish(self) -> None:
        """Puts the sums into the report."""
        report = self._engine.report
        report.requests += self.requests - self._violations - self.empty
        for what, (count, first, row) in self._inputs.items():
            report.find(
                "data",
                "contract",
                f"The request-level input {what!r} differs within a request in {count} of {self.requests} recorded "
                f"requests, first in {first}, row {row}: its role is wrong, or the data is. These were not "
                "compared.",
            )
        if self.empty:
            report.find("data", "empty", f"{self.empty} recorded requests have no candidate.", "note")
        for verdict, count in self._passed.items():
            if count and report.verdicts[verdict] == "skipped":
                report.settle(verdict, True)
        dropped = sum(self._failed.values()) - _MOST_FAILURES
        if dropped > 0:
            report.find("rounding", "more", f"{dropped} more comparisons on recorded requests failed.", "note")
        for name, r in self._ranks.items():
            auc, loss = self._auc.get(name), self._loss.get(name)
            done = replace(
                r,
                output=f"{name} (recorded)",
                auc_before=auc[0] / auc[2] if auc else None,
                auc_after=auc[1] / auc[2] if auc else None,
                logloss_before=loss[0] / loss[2] if loss and loss[2] else None,
                logloss_after=loss[1] / loss[2] if loss and loss[2] else None,
            )
            report.ranking.append(done)
