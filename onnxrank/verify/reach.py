"""Compares the models of an engine beyond ordinary inputs, as far as the time set for it goes."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto

from onnxrank.errors import ModelError
from onnxrank.values import CANDIDATES, symbols
from onnxrank.verify import compare, inputs, points, sizes, tables
from onnxrank.verify.judge import Sample
from onnxrank.verify.options import LEVELS
from onnxrank.verify.points import Point
from onnxrank.verify.side import MODEL, run_once
from onnxrank.verify.sizes import MANY, Size
from onnxrank.verify.tables import Changed
from onnxrank.verify.words import listed
from onnxrank.workers import Crashed, Outputs

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine

MOST_BYTES = 1 << 30
"""Of the inputs of one request that somebody asks for."""
_MOST_BYTES = 256 << 20
"""The same where nobody does."""
_MOST_EXACT = {"quick": 1 << 12, "standard": 1 << 14, "full": 1 << 20}
"""Candidates times lengths up to which a request is run in float64 too, by level."""
_FEW = 64
"""Candidates up to which it is at levels other than `full`."""
_MEMORY = re.compile(r"memory|bad_?alloc|allocate", re.IGNORECASE)
_TRUTH = "float64"
_Ran = tuple[Point, list[tuple[str, dict[str, Any], dict[str, Any]]]]
"""A request, and per provider what both models gave."""
_MOST_TABLES = 16
_MOST_ROUNDS = 64
_SHARES = (1.0, 0.5)
"""Of the ids that may, those that count from the ends of their tables."""
_LATE = "the time was up"
_SHARE = 3
"""One request may take a third of the time that is left."""


def lacks_memory(e: Exception) -> bool:
    """Whether a model did not run for want of memory."""
    return _MEMORY.search(str(e)) is not None


class Reach:
    """Requests beyond the ordinary ones, and what came of them.

    Args:
        engine: The run they belong to.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._start = time.monotonic()
        self._seen: list[Point] = []
        self._exposed: set[str] = set()
        self._unseen: dict[str, list[Size]] = {}
        self._refused: list[Size] = []
        self._why = ""
        self._unsteady: list[Size] = []

    @property
    def _left(self) -> float:
        return self.engine.options.seconds - (time.monotonic() - self._start)

    @property
    def _patience(self) -> float:
        return min(self._left, max(1.0, self._left / _SHARE))

    def run(self) -> None:
        """Runs what time allows; samples, points and what to say of them go to the engine."""
        engine, options = self.engine, self.engine.options
        wanted = self._sizes()
        engine.report.budget = options.seconds
        ran = [done for changed in engine.changed[:_MOST_TABLES] for done in self._rows(changed)]
        ran += self._compared()
        ran += self._from_end()
        for changed in engine.changed[_MOST_TABLES:]:
            engine.report.unseen.append(f"the changed rows of table {changed.name!r}: too many tables changed")
        ran += [done for p in self._points(wanted) if (done := self._compare(p)) is not None]
        truths = [self._exact(point) for point, _ in ran]
        if options.candidates is None and options.level != "full":
            # The last, for some kernels end their process.
            for p in self._points([Size(0)]):
                done = self._compare(p)
                if done is not None:
                    ran.append(done)
                    truths.append(None)
        for provider in options.providers:
            for side in engine.sides:
                side.spare(f"{provider}/{LEVELS[-1]}")
        for (point, pairs), truth in zip(ran, truths, strict=True):
            for provider, a, b in pairs:
                for k in engine.shared:
                    if _empty(point) and engine.emptiness.vacuous(point, k, a[k], b[k], _lengths(point)):
                        continue
                    pair = (truth[0][k], truth[1][k]) if truth is not None else (None, None)
                    engine.samples.append(
                        Sample(provider, LEVELS[-1], point.inputs, point.candidates, point.seed, k, a[k], b[k], *pair)
                    )
            self._seen.append(point)
        engine.points += self._seen
        self._tell()

    def _sizes(self) -> list[Size]:
        engine, options = self.engine, self.engine.options
        if options.sizes is not None:
            return list(options.sizes)
        many = [] if options.candidates is not None else sizes.many_of(engine.span, options.level, options.counts)
        given = [s for s in engine.spans if sizes.name_of(s) in options.lengths]
        served = sizes.many_of(engine.span, "standard", (1, 2)) if many else []
        models = [s.proto for s in engine.sides]
        if options.candidates is None:
            many = [*(n for n in sizes.turns(models) if n not in options.counts), *many]
        return sizes.plan(engine.spans, given, models, many, served)

    def _points(self, wanted: Iterable[Size]) -> Iterator[Point]:
        """The requests that fit into memory; more than one of a size where bools may be a mask."""
        engine = self.engine
        declared = engine.binding.declared
        masked = any(i.dtype == TensorProto.BOOL and sizes.lengths_of(symbols(i.dims)) for i in declared)
        for size in wanted:
            extents = {CANDIDATES: size.candidates, **engine.usual, **size.lengths}
            bytes_ = points.weight(engine.binding.declared, extents)
            if bytes_ > _MOST_BYTES:
                self._unseen.setdefault(f"the inputs alone take {bytes_ / (1 << 30):.1f} GiB", []).append(size)
                continue
            for seed in range(2 if masked and size.full and size.lengths else 1):
                if self._left <= 0:
                    self._miss(size, _LATE)
                    continue
                yield points.sized(engine.binding, engine.inputs, engine.usual, size, seed)

    def _miss(self, size: Size, why: str) -> None:
        found = self._unseen.setdefault(why, [])
        if size not in found:
            found.append(size)

    # --- changed rows ------------------------------------------------------------------------------------------------

    def _rows(self, changed: Changed) -> list[_Ran]:
        """Runs requests whose ids are the rows of a table that changed."""
        engine, declared = self.engine, self.engine.binding.declared
        missing = set(changed.rows.tolist())
        about = f"ids of changed rows of {changed.name!r}"
        size = Size(min(max(len(missing), 2), _FEW), about=about)
        ran: list[_Ran] = []
        for seed in range(_MOST_ROUNDS):
            left = np.array([r for r in changed.rows.tolist() if r in missing], np.int64)
            if not len(left) or self._left <= 0:
                break
            maker = inputs.Rows(declared, engine.inputs.ranges, left, changed.size)
            feed = maker(inputs.point(engine.inputs.symbols, size.candidates, seed, engine.usual))
            point = Point(about, size.candidates, seed, feed, engine.binding(feed), size=size)
            met = self._met(changed, point)
            if not met & missing:
                break
            done = self._compare(point)
            if done is None:
                break
            ran.append(done)
            missing -= met
        if f"ids/{changed.name}" in self._exposed:
            engine.original.call("close", session=f"ids/{changed.name}")
        seen = len(changed.rows) - len(missing)
        if seen:
            engine.report.looked.append(f"{seen:,} changed rows of table {changed.name!r}")
        if missing:
            why = "the time was up" if self._left <= 0 else "no generated id reaches them"
            if seen:
                why = "too many"
            engine.report.unseen.append(
                f"{len(missing):,} changed rows of table {changed.name!r} ({tables.names(missing)}): {why}"
            )
        return ran

    def _met(self, changed: Changed, point: Point) -> set[int]:
        """Rows that the original looks up in a table."""
        side = self.engine.original
        given = [point.feed[i] for i in changed.ids if i in point.feed]
        made = [i for i in changed.ids if i not in point.feed]
        if made:
            session = f"ids/{changed.name}"
            try:
                if session not in self._exposed:
                    side.call("expose", key=session, of=MODEL, names=made)
                    side.call("open", session=session, key=session, level=LEVELS[0], precision=self.engine.precision)
                    self._exposed.add(session)
                (answer,) = side.call("run", session=session, feeds=[point.feed], outputs=made)
            except ModelError:
                return set()
            given += answer.get("outputs", {}).values()
        found: set[int] = set()
        for ids in given:
            found |= {int(i) for i in np.unique(ids)}
        return {i % changed.size for i in found}

    # --- numbers that something is compared with ---------------------------------------------------------------------

    def _compared(self) -> list[_Ran]:
        """Runs requests whose ids are numbers that either graph compares with, or next to them."""
        engine, declared = self.engine, self.engine.binding.declared
        if engine.options.level != "full" or engine.known is not None:
            return []
        found = sizes.landmarks(s.proto for s in engine.sides).compared
        numbers = sorted({m for n in found for m in (n - 1, n, n + 1)})[:_MOST_ROUNDS]
        size = Size(min(max(len(numbers), 2), _FEW), about="ids that the graphs compare with")
        ran = []
        for seed in range(len(numbers)):
            if self._left <= 0:
                self._miss(size, _LATE)
                break
            maker = inputs.Rows(declared, engine.inputs.ranges, np.roll(np.array(numbers), -seed))
            feed = maker(inputs.point(engine.inputs.symbols, size.candidates, seed, engine.usual))
            done = self._compare(Point(size.about, size.candidates, seed, feed, engine.binding(feed), size=size))
            if done is None:
                break
            ran.append(done)
        return ran

    # --- ids that count from the end ---------------------------------------------------------------------------------

    def _from_end(self) -> list[_Ran]:
        """Runs requests whose ids count from the ends of their tables, of every input of which the original takes it.

        Where it does not take all at once, the inputs are halved.
        """
        engine = self.engine
        ran: list[_Ran] = []
        seen: list[str] = []
        groups = [inputs.countable(engine.binding.declared, engine.inputs.ranges)]
        while groups:
            names = groups.pop()
            before = len(self._refused)
            done = [d for seed in range(len(_SHARES)) if names and (d := self._compare(self._backwards(names, seed)))]
            refused = len(self._refused) > before
            if refused and len(names) > 1:
                del self._refused[before:]
                groups += [names[: len(names) // 2], names[len(names) // 2 :]]
                continue
            ran += done
            seen += names if done and not refused else []
        if seen:
            engine.report.looked.append(_ends(seen))
        return ran

    def _backwards(self, names: Sequence[str], seed: int) -> Point:
        """A request in which ids of some inputs count from the ends of their tables: all, or every other."""
        engine = self.engine
        size = Size(points.MOST_ODD, about=_ends(names))
        maker = inputs.FromEnd(engine.binding.declared, engine.inputs.ranges, names, _SHARES[seed])
        feed = maker(inputs.point(engine.inputs.symbols, size.candidates, seed, engine.usual))
        return Point(size.about, size.candidates, seed, feed, engine.binding(feed), size=size)

    # --- running -----------------------------------------------------------------------------------------------------

    def _compare(self, p: Point) -> _Ran | None:
        """Runs both models in their own types."""
        engine = self.engine
        assert p.size is not None
        out = []
        for provider in engine.options.providers:
            session, patience = f"{provider}/{LEVELS[-1]}", self._patience
            if patience <= 0:
                self._miss(p.size, _LATE)
                return None
            a, b = run_once(engine.sides, session, (p.feed, p.bound), engine.shared, patience)
            if isinstance(a, ModelError):
                if p.size.full and p.size.lengths and not isinstance(a, Crashed):
                    # Counts that nothing is known of may have been too much for it.
                    size = Size(p.size.candidates, p.size.lengths, False)
                    plain = points.sized(engine.binding, engine.inputs, engine.usual, size, p.seed)
                    if any(not np.array_equal(plain.feed[k], v) for k, v in p.feed.items()):
                        return self._compare(plain)
                self._original(p.size, a)
                return None
            if isinstance(b, ModelError):
                # Kernels that give nothing the wrong shape may pass it to others that do not take it.
                odd = next((k for k in engine.shared if _empty(p) and not engine.emptiness.declares(k, a[k])), None)
                if odd is not None:
                    engine.emptiness.malformed(odd, a[odd], _lengths(p))
                elif not _empty(p) or not engine.emptiness.excused(p, b, provider, _lengths(p)):
                    self._optimized(p, b, provider, patience)
                return None
            if 0 in p.size.lengths.values() and not self._determined(p, a, provider):
                return None
            out.append((provider, a, b))
        return p, out

    def _determined(self, p: Point, first: dict[str, Any], provider: str) -> bool:
        """Whether the original gives the same again, as kernels that meet no entries at all do not always."""
        assert p.size is not None
        for level in (LEVELS[-1], LEVELS[0]):
            (again,) = run_once(
                self.engine.sides[:1], f"{provider}/{level}", (p.feed,), self.engine.shared, self._patience
            )
            if isinstance(again, ModelError) or any(
                compare.gap(first[k], again[k]).largest > 1e-3 * max(1.0, compare.scale(first[k])) for k in first
            ):
                self._unsteady.append(p.size)
                return False
        return True

    def _original(self, size: Size, why: ModelError) -> None:
        if isinstance(why, Crashed):
            self._miss(size, "the original takes too long" if why.kind == "timeout" else f"the original {why}")
        elif lacks_memory(why):
            self._miss(size, "the original needs too much memory")
        else:
            self._refused.append(size)
            self._why = self._why or str(why)

    def _optimized(self, p: Point, why: ModelError, provider: str, patience: float) -> None:
        engine = self.engine
        assert p.size is not None
        where = f"(N = {p.candidates}{f', {p.size.kind}' if p.size.lengths or p.size.about else ''}, {provider})"
        if isinstance(why, Crashed) and why.kind == "timeout" and patience < engine.optimized.timeout:
            self._miss(p.size, "the optimized model takes longer than the time left")
        elif lacks_memory(why):
            self._miss(p.size, "the optimized model needs too much memory")
        else:
            kind = why.kind if isinstance(why, Crashed) else "run"
            text = f"It does not run where the original does {where}: {why}"
            engine.points.append(p)
            engine.report.find("rounding", kind, text, model="optimized")

    def _exact(self, p: Point) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Both models in float64, where that is quick enough."""
        engine = self.engine
        assert p.size is not None
        extent = p.candidates * prod(max(n, 1) for n in p.size.lengths.values())
        level = engine.options.level
        small = extent <= _MOST_EXACT[level] and (p.candidates <= _FEW or level == "full")
        if not engine.truth or self._left <= 0 or not small:
            return None
        found: list[Outputs] = run_once(engine.sides, _TRUTH, (p.feed, p.bound), engine.shared, self._patience)
        first, second = found
        if isinstance(first, ModelError) or isinstance(second, ModelError):
            return None
        return first, second

    # --- telling -----------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        report, engine = self.engine.report, self.engine
        report.looked += sizes.listing(p.size for p in self._seen if p.size is not None)
        free = inputs.unknown(engine.binding.declared, engine.inputs.ranges) if engine.known is None else []
        if free:
            report.unseen.append(
                f"large values of {listed(free)}: neither a range in the roles nor a table says where they are"
            )
        for why, found in self._unseen.items():
            report.unseen += [f"{line}: {why}" for line in _listing(found)]
        for found, what in (
            (self._refused, f"does not run ({self._why})"),
            (self._unsteady, "gives other scores each time"),
        ):
            if found:
                text = f"The original {what} at {'; '.join(_listing(found))}: nothing was compared there."
                report.find("rounding", "original", text, "note", model="original")
        if any(p.inputs == MANY for p in self._seen) and engine.options.level != "full":
            report.looked.append(f"N beyond {max(engine.options.counts)}, with onnxruntime's optimisations on only")


def _ends(names: Sequence[str]) -> str:
    return f"ids that count from the ends of tables ({listed(names)})"


def _listing(found: Sequence[Size]) -> list[str]:
    """Extents in words, and what inputs were about."""
    return [*sizes.listing(found), *dict.fromkeys(size.about for size in found if size.about)]


def _lengths(p: Point) -> str:
    """The lengths of a request in which nothing is left of something; empty where it is the candidates."""
    assert p.size is not None
    return ", ".join(f"{sizes.name_of(s)} = 0" for s, n in p.size.lengths.items() if not n)


def _empty(p: Point) -> bool:
    """Whether a request has no candidates, or nothing along a length."""
    return not p.candidates or bool(_lengths(p))
