"""Holds one model against another under a contract: `verify`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

from onnx import ModelProto

from onnxrank import baked, batches, halves, matrices, workers
from onnxrank import model as files
from onnxrank.contract import stored_contract
from onnxrank.errors import ModelError, UsageError
from onnxrank.feeds import Known
from onnxrank.values import CANDIDATES
from onnxrank.verify import preflight, sessions, sizes, tables
from onnxrank.verify.comparing import compare
from onnxrank.verify.condition import Condition
from onnxrank.verify.emptiness import Emptiness
from onnxrank.verify.judge import Sample
from onnxrank.verify.options import Options
from onnxrank.verify.pairing import Terms, bind
from onnxrank.verify.points import Point, generate, weight
from onnxrank.verify.reach import MOST_BYTES, Reach
from onnxrank.verify.relations import relate
from onnxrank.verify.report import Report
from onnxrank.verify.requests import several
from onnxrank.verify.side import MODEL, Side
from onnxrank.verify.sizes import Span
from onnxrank.verify.verdicts import Verdicts
from onnxrank.verify.words import sentence, worst
from onnxrank.workers import Crashed

Progress = Callable[[str], None]


def verify(
    original: str | os.PathLike[str] | ModelProto,
    optimized: str | os.PathLike[str] | ModelProto,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compares two models that should give the same scores.

    Args:
        original: The model that is right by definition: a path, or a model in memory.
        optimized: The model under test, or the folder that `split` wrote.
        options: Choices; the defaults if None.
        progress: Called with what is being done.

    Returns:
        What was found. `passed` is the verdict.

    Raises:
        UsageError: Options, roles or recorded data cannot be used.
        ModelError: The original does not run, or a file is no model.
        EnvironmentProblem: A runtime or a provider is missing.
    """
    workers.warm(2)
    chosen = options or Options()
    first = matrices.unpacked(files.load(original))
    second = halves.load(optimized) if halves.is_split(optimized) else batches.single(files.load(optimized))
    second = matrices.unpacked(second)
    with Engine(first, second, chosen, progress) as engine:
        return engine.run()


class Engine:
    """One run of `verify`.

    Args:
        original: The original.
        optimized: The model under test.
        options: Choices.
        progress: Called with what is being done.
        known: What is known of the original's inputs, where it was studied before.
        first: The original in its process, where somebody has it there already, who keeps it.
    """

    def __init__(
        self,
        original: files.LoadedModel,
        optimized: files.LoadedModel,
        options: Options,
        progress: Progress | None = None,
        known: Known | None = None,
        first: Side | None = None,
    ) -> None:
        self.options = options
        self.known = known
        self._progress = progress
        self.say = progress or (lambda stage: None)
        guarded = list(options.providers) == ["cpu"]
        self.original = first or Side("original", original, options.timeout, options.memory, guarded)
        self._kept = first
        self.optimized = Side("optimized", optimized, options.timeout, options.memory, guarded)
        self.sides = (self.original, self.optimized)
        paths = [None if s.loaded.path is None else os.fspath(s.loaded.path) for s in self.sides]
        self.report = Report(
            metadata.version("onnxrank"), paths[0], original.sha256, paths[1], optimized.sha256, options.level
        )
        self.names = [o.name for o in original.proto.graph.output]
        self.samples: list[Sample] = []
        self.shared: list[str] = []
        self.inputs = known or Known({}, ())
        self.spans: dict[str, Span] = {}
        self.changed: list[tables.Changed] = []
        self.usual: dict[str, int] = {}
        self.span: Span | None = None
        self.truth = False
        self.precision = "own"
        self.points: list[Point] = []
        self.condition = Condition(self)
        self.verdicts = Verdicts(self)
        self.emptiness = Emptiness(self)
        self._good = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        for s in self.sides:
            if s is not self._kept or not self._good:
                s.close(self._good)

    def count(self, done: int, total: int | None) -> None:
        """Tells how many recorded candidates were compared, of how many if that is known."""
        advance = getattr(self._progress, "advance", None)
        if advance is not None:
            advance(done, total)

    # --- the whole ---------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """Does everything."""
        start = time.monotonic()
        sessions.begin(self)
        self.say("reading the contract")
        found = preflight.agreed(self)
        self.roles = found.roles
        self.binding = bind(self.original.proto, self.optimized.proto, found.roles)
        if preflight.comparable(self):
            self._compare(found)
        self._explain()
        self.report.settle("structure", True)
        self.report.seconds = round(time.monotonic() - start, 3)
        self._good = True
        return self.report

    def _compare(self, found: Terms) -> None:
        self.say("finding the ranges of the inputs")
        try:
            self.inputs = self.known or self._study(found)
            self._extents()
            self.points = list(generate(self.binding, self.inputs, self.options, self.usual))
        except ModelError as e:
            if self.options.data is None:
                raise
            self.only_recorded(str(e))
        sessions.find_precision(self)
        self.truth = sessions.open_truth(self)
        if not compare(self, self.points):
            return
        self.verdicts.measure()
        self.say("permuting, dropping and changing candidates")
        relate(self)
        if self.optimized.loaded.batch is not None:
            self.say("scoring several requests per call")
            several(self)
        self.say("comparing at further numbers of candidates and lengths")
        Reach(self).run()
        self.verdicts.tell()
        if self.options.data is not None:
            from onnxrank.verify.replay import replay

            replay(self)

    def _explain(self) -> None:
        """What more is to be said of a failure."""
        failed = bool(self.report.failed_cases) or any(f.kind in ("crash", "timeout") for f in self.report.errors)
        for c in worst(self.report.failed_cases):
            self.report.find(c.verdict, "difference", sentence(c), place=c.place, model="optimized")
        if not failed:
            return
        if self.options.bisect:
            from onnxrank.verify.bisect import bisect

            self.say("looking for the culprit")
            self.report.culprit = bisect(self, lambda model: failing_points(self, model))
            culprit = self.report.culprit
            first = next((k for k, f in enumerate(self.report.findings) if f.kind == "difference"), None)
            if first is not None and (culprit.rule or culprit.tensor):
                self.report.findings[first] = replace(
                    self.report.findings[first], rule=culprit.rule, node=culprit.node or culprit.tensor
                )
        if self.options.save_failing is not None:
            from onnxrank.verify.minimise import save_failing

            self.say("cutting the models down")
            self.report.saved = save_failing(self, self.options.save_failing)

    # --- what is served ----------------------------------------------------------------------------------------------

    def _study(self, found: Terms) -> Known:
        """What a study of the original finds of its inputs."""
        try:
            made = self._studied(found)
        except Crashed as e:
            raise ModelError(f"The original made its process fail while it was studied: {e}.") from e
        if made["note"]:
            raise ModelError(f"The models cannot be compared: {made['note']}.")
        ranges = {k: (v[0], v[1], v[2]) for k, v in made["ranges"].items()}
        return Known(ranges, tuple(made["symbols"]), int(made["shortest"]))

    def _studied(self, found: Terms) -> dict[str, Any]:
        """What the original's process finds out: at the second model's declared lengths, if it runs at no others."""
        loaded = self.original.loaded
        about = {"key": MODEL, "roles": found.roles.to_dict(), "sha256": loaded.sha256, "size": loaded.size}
        try:
            return dict(self.original.call("study", **about))
        except Crashed:
            raise
        except ModelError:
            fixed = baked.declared_by(loaded, found.roles, self.optimized.proto)
            if fixed is None:
                raise
        self.original.replace(fixed)
        self.binding = bind(fixed.proto, self.optimized.proto, found.roles)
        made = dict(self.original.call("study", **about))
        self.report.find(
            "structure",
            "contract",
            "The original runs at no lengths but those that the optimized model declares, so it was compared there.",
            "note",
        )
        return made

    def _extents(self) -> None:
        """What is served: lengths and numbers of candidates."""
        options = self.options
        self.spans = sizes.spans(self.inputs.symbols, options.lengths, self.inputs.shortest)
        self.usual = sizes.usual(self.inputs.symbols, self.spans)
        stored = (stored_contract(self.optimized.proto) or {}).get("candidates")
        told = isinstance(stored, list) and len(stored) == 2 and all(isinstance(n, int) and n > 0 for n in stored)
        self.span = options.span or ((stored[0], stored[1]) if told and stored is not None else None)
        for n in options.counts:
            size = weight(self.binding.declared, {**self.usual, CANDIDATES: n})
            if size > MOST_BYTES:
                raise UsageError(
                    f"The inputs of one request with {n} candidates take {size / (1 << 30):.1f} GiB, more than the "
                    f"{MOST_BYTES >> 30} GiB that are run: name smaller numbers with --candidates."
                )
        self.report.looked = [f"N = {', '.join(map(str, options.counts))}{self._usually()}"]

    def _usually(self) -> str:
        shown = ", ".join(f"{sizes.name_of(s)} = {n}" for s, n in self.usual.items())
        return f" with {shown}" if shown else ""

    # --- findings ----------------------------------------------------------------------------------------------------

    def crashed(self, verdict: str, side: Side, doing: str, e: Crashed) -> None:
        """Tells that a model's process ended or hung."""
        self.report.find(verdict, e.kind, f"The {side.name} model made its process fail {doing}: {e}.", model=side.name)

    def no_truth(self, side: Side, e: Exception) -> None:
        """Does without float64, and tells why: what a model says against it."""
        self.truth = False
        self.report.find(
            "algebra",
            "no truth",
            f"No float64 run of the {side.name} model was possible ({e}), so the original's own scores were the "
            "measure.",
            "warning",
        )

    def only_recorded(self, why: str) -> None:
        """Tells that the original runs on recorded requests only."""
        self.report.find(
            "rounding",
            "original",
            f"The original does not run on some generated inputs, so recorded requests speak for those: {why}",
            "warning",
            model="original",
        )


def failing_points(engine: Engine, model: ModelProto) -> bool:
    """Whether another model than the one under test fails where that did.

    Args:
        engine: A failed run.
        model: The other model, with the interface of the one under test.
    """
    loaded = engine.original.loaded
    second = files.LoadedModel(model, None, loaded.folder, "", model.ByteSize(), loaded.external)
    counts, sized = {2}, []
    for c in engine.report.failed_cases[:1]:
        at = next((p.size for p in engine.points if (p.inputs, p.candidates) == (c.inputs, c.candidates)), None)
        if at is None:
            counts.add(c.candidates)
        else:
            sized.append(at)
    chosen = replace(
        engine.options,
        bisect=False,
        save_failing=None,
        data=None,
        roles=engine.roles,
        candidates=sorted(counts),
        sizes=sized,
    )
    known = engine.inputs if engine.inputs.symbols else None
    with Engine(loaded, second, replace(chosen, request=(), spec=None), known=known) as other:
        return not other.run().passed
