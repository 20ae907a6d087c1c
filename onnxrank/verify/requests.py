"""Holds a model that takes several requests per call against the original, which takes one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxrank import batches
from onnxrank.errors import ModelError
from onnxrank.feeds import Feed
from onnxrank.model import LoadedModel
from onnxrank.verify import compare, inputs, judge, sessions
from onnxrank.verify.inputs import ORDINARY
from onnxrank.verify.options import LEVELS
from onnxrank.verify.report import Case, Place
from onnxrank.verify.side import Side
from onnxrank.workers import Crashed, Outputs

if TYPE_CHECKING:
    from onnxrank.verify.engine import Engine

_TRUTH = "float64"
_SEED = 9000


def several(engine: Engine) -> None:
    """Scores several requests per call and puts what comes of it into the report."""
    loaded = engine.optimized.loaded
    assert loaded.batch is not None
    told = batches.convention(loaded.batch)
    assert told is not None
    second = LoadedModel(loaded.batch, loaded.path, loaded.folder, loaded.sha256, loaded.size, loaded.external)
    guarded = list(engine.options.providers) == ["cpu"]
    side = Side("optimized", second, engine.options.timeout, engine.options.memory, guarded)
    good = False
    try:
        _Several(engine, side, told).run()
        good = True
    except Crashed as e:
        engine.report.find("metamorphic", e.kind, f"A process failed while several requests were scored: {e}.")
    except ModelError as e:
        engine.report.find(
            "metamorphic", "difference", f"The model does not run on several requests: {e}", model="optimized"
        )
    finally:
        side.close(good)


class _Several:
    """One run.

    Args:
        engine: What it belongs to.
        side: The model for several requests.
        told: How it takes them.
    """

    def __init__(self, engine: Engine, side: Side, told: Mapping[str, Any]) -> None:
        self.engine, self.side, self.told = engine, side, told
        self.provider = engine.options.providers[0]
        self.level = ""
        self.maker = inputs.Kind(ORDINARY, engine.binding.declared, engine.inputs.ranges)

    def run(self) -> None:
        """Compares at every number of requests: in float64 where that can be, and as it is served."""
        for level in dict.fromkeys([_TRUTH if self.engine.truth else LEVELS[0], LEVELS[-1]]):
            self.level = level
            how = {"precision": "double"} if level == _TRUTH else sessions.settings(self.engine, self.provider, level)
            self.side.open(self._session, **how)
            self._run()

    @property
    def _session(self) -> str:
        return _TRUTH if self.level == _TRUTH else f"{self.provider}/{self.level}"

    def _run(self) -> None:
        cases: list[Case] = []
        for count in self.engine.options.requests:
            counts = self._counts(count)
            feeds = [self._feed(k, n) for k, n in enumerate(counts)]
            given = [f for f, _ in feeds if f is not None]
            answers = iter(self.engine.original.run(self._session, given, self.engine.shared))
            wanted = [None if f is None else next(answers) for f, _ in feeds]
            bound = [b for _, b in feeds]
            cases += self._compared(f"{count} requests", bound, counts, wanted)
            if count > 1:
                order = np.random.default_rng(count).permutation(count).tolist()
                mixed = [[x[k] for k in order] for x in (bound, counts, wanted)]
                cases += self._compared(f"{count} requests in another order", *mixed)
                half = count // 2
                for part in (slice(None, half), slice(half, None)):
                    cases += self._compared(f"a part of {count} requests", bound[part], counts[part], wanted[part])
        if any(counts):
            cases += self._guarded(bound, sum(counts))
        self.engine.verdicts.file("metamorphic", cases)

    def _counts(self, requests: int) -> list[int]:
        """Candidates of each request: none, one, and many among them."""
        rng = np.random.default_rng(requests)
        many = 200 if self.engine.options.level == "full" else 40
        if self.told["form"] == "padded":
            return [int(rng.integers(2, 9))] * requests
        found = [int(n) for n in rng.integers(1, 12, requests)]
        if requests > 1:
            found[0], found[-1] = 0, many
        if requests > 4:
            found[1:4] = 1, 0, 0
        return found

    def _feed(self, k: int, candidates: int) -> tuple[Feed | None, Feed]:
        """Inputs of the original, none without candidates, and of the other model as if it took one request."""
        engine = self.engine
        setting = inputs.point(engine.inputs.symbols, max(candidates, 1), _SEED + k, engine.usual)
        feed = self.maker(setting)
        if candidates:
            return feed, engine.binding(feed)
        return None, engine.binding.without_candidates(feed)[1]

    def _compared(
        self, name: str, bound: Sequence[Feed], counts: Sequence[int], wanted: Sequence[Outputs | None]
    ) -> list[Case]:
        if not any(counts):
            return []
        where = Case("metamorphic", self.provider, self.level, name, sum(counts), _SEED, "", 0.0, 0.0, True)
        (answer,) = self.side.run(self._session, [batches.joined(self.told, bound)], self.engine.shared)
        if isinstance(answer, ModelError):
            raise answer
        try:
            found = batches.parted(self.told, answer, counts)
        except (IndexError, ValueError) as e:
            raise ModelError("it gives another number of rows than its requests have candidates") from e
        cases = []
        for output in self.engine.shared:
            worst, limit, place = 0.0, 0.0, None
            for k, (want, got) in enumerate(zip(wanted, found, strict=True)):
                if want is None or isinstance(want, ModelError):
                    continue
                gap = compare.gap(want[output], got[output])
                limit = max(limit, self._allowed(output, compare.scale(want[output])))
                if gap.largest > worst:
                    worst, place = gap.largest, self._place(output, k, want[output], got[output], gap.at)
            passed = worst <= limit
            cases.append(replace(where, output=output, error=worst, allowed=limit, passed=passed,
                                 place=None if passed else place))  # fmt: skip
        return cases

    def _guarded(self, bound: Sequence[Feed], candidates: int) -> list[Case]:
        """Whether scores are NaN where what tells the requests apart contradicts itself."""
        stored = self.told.get("guard", True)
        feeds = batches.contradicting(self.told, batches.joined(self.told, bound)) if stored else []
        where = Case("metamorphic", self.provider, self.level, "requests that do not add up", candidates, _SEED, "",
                     0.0, 0.0, True)  # fmt: skip
        cases = []
        for answer in self.side.run(self._session, feeds, self.engine.shared) if feeds else []:
            if isinstance(answer, ModelError):
                continue
            for output, data in answer.items():
                if data.dtype.kind == "f":
                    wrong = float((~np.isnan(data)).sum())
                    cases.append(replace(where, output=output, error=wrong, passed=not wrong))
        return cases

    def _allowed(self, output: str, scale: float) -> float:
        m = self.engine.verdicts.held.get((self.provider, ORDINARY, output))
        if self.level == _TRUTH:
            return judge.ALGEBRA * max(scale, m.scale if m else 0.0)
        return m.allowed if m else 0.0

    def _place(self, output: str, k: int, want: NDArray[Any], got: NDArray[Any], at: tuple[int, ...] | None) -> Place:
        shown = [f"{float(x[at]):.9g}" if at is not None else str(list(x.shape)) for x in (want, got)]
        return Place(output, at or (), at[0] if at else None, f"request {k}", *shown)
