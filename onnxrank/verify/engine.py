"""Holds one model against another under a contract: `verify`."""

from __future__ import annotations

import difflib
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from onnx import ModelProto

from onnxrank import baked, batches, halves, matrices, runtime, workers
from onnxrank import model as files
from onnxrank.contract import stored_contract
from onnxrank.errors import EnvironmentProblem, ModelError, UsageError
from onnxrank.feeds import Known
from onnxrank.values import CANDIDATES
from onnxrank.verify import sizes, structure, tables
from onnxrank.verify.condition import Condition
from onnxrank.verify.emptiness import Emptiness
from onnxrank.verify.inputs import ORDINARY
from onnxrank.verify.judge import Sample
from onnxrank.verify.options import LEVELS, Options
from onnxrank.verify.pairing import Terms, bind, terms
from onnxrank.verify.points import Point, generate, weight
from onnxrank.verify.reach import MOST_BYTES, Reach, lacks_memory
from onnxrank.verify.relations import relate
from onnxrank.verify.report import Report, Severity
from onnxrank.verify.requests import several
from onnxrank.verify.side import MODEL, Side, open_both, run_both
from onnxrank.verify.sizes import Span
from onnxrank.verify.verdicts import Verdicts
from onnxrank.verify.words import count, listed, sentence, worst
from onnxrank.workers import Crashed, Outputs

Progress = Callable[[str], None]
_TRUTH = "float64"


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
        self._open_ahead()
        self.say("reading the contract")
        self._not_swapped()
        self._limits_known()
        found = self._terms()
        self.roles = found.roles
        self.binding = bind(self.original.proto, self.optimized.proto, found.roles)
        self._environment()
        fed = structure.inspect(self.original.loaded, self.optimized.loaded, self.binding, self.report)
        self._tables()
        self._trusted_rows()
        self.say("checking the structure")
        loads = self._check() and fed
        if loads:
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
            self._only_recorded(str(e))
        self._find_precision()
        self.truth = self._open_truth()
        if not self.compare(self.points):
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

    # --- before anything runs ----------------------------------------------------------------------------------------

    def _not_swapped(self) -> None:
        stored = stored_contract(self.original.proto) or {}
        if stored.get("source_sha256") == self.optimized.loaded.sha256 != self.original.loaded.sha256:
            names = [s.loaded.path or f"the {s.name} model" for s in self.sides]
            raise UsageError(
                f"The arguments are swapped: {names[0]} was made of {names[1]}, so the original is the latter and goes "
                "first."
            )

    def _limits_known(self) -> None:
        for what, limits in (("--rtol", self.options.rtol), ("--atol", self.options.atol)):
            for name in limits:
                if name is not None and name not in self.names:
                    near = difflib.get_close_matches(name, self.names, 1)
                    hint = f"Did you mean {near[0]!r}?" if near else f"They are {', '.join(map(repr, self.names[:8]))}."
                    raise UsageError(f"{what} names {name!r}, which is no output of the original. {hint}")

    def _terms(self) -> Terms:
        o = self.options
        original, optimized = self.original.proto, self.optimized.proto
        found = terms(original, optimized, o.request, o.spec, o.roles)
        for note in found.notes:
            self.report.find("structure", "contract", f"{note[0].upper()}{note[1:]}.", "warning")
        told = not (o.request or o.spec or o.roles) and found.source.startswith("told")
        if told and all(r.level == "candidate" for r in found.roles.inputs.values()):
            self.report.find(
                "structure",
                "contract",
                "Nothing says that an input is the same for all candidates of a request, so all of them were varied. "
                "Name such inputs with --request or --roles.",
                "note",
            )
        self.report.contract = {"source": found.source, **found.roles.to_dict()}
        return found

    def _environment(self) -> None:
        # The original's process is asked, so that a runtime that cannot be loaded is not met here.
        about = self.original.call("available")
        cuda = "cuda" in self.options.providers
        self.report.environment = {
            "onnxrank": self.report.version,
            "onnxruntime": about["version"],
            "providers": list(self.options.providers),
            "available": about["providers"],
            "tf32": ("on" if self.options.tf32 else "off") if cuda else "not used",
            "python": platform.python_version(),
            "machine": platform.machine(),
        }

    def _check(self) -> bool:
        """ONNX's own checker on both; whether the second model is one."""
        before = self._calmly(self.original, "check", key=MODEL)
        after = self._calmly(self.optimized, "check", key=MODEL)
        if before is None or after is None:
            return False
        if "error" in after:
            severity: Severity = "warning" if "error" in before else "error"
            self.report.find(
                "structure",
                "checker",
                f"Not valid ONNX: {after['error']}",
                severity,
                model="optimized",
            )
            return severity != "error"
        if "inference" in after and not before:
            self.report.find(
                "structure",
                "checker",
                f"Its declared types or shapes contradict each other: {after['inference']}",
                model="optimized",
            )
        return True

    def _tables(self) -> None:
        """Compares embedding tables row by row."""
        first, second = self.original.loaded, self.optimized.loaded
        if structure.changes_precision(first.proto, second.proto):
            return
        self.changed, lost = tables.changed(first, second)
        for c in self.changed:
            self.report.find("structure", "tables", c.says, "warning", model="optimized")
        if lost and not structure.made_of(first, second):
            what = "embedding table" if len(lost) == 1 else "embedding tables"
            self.report.unseen.append(
                f"rows of the {what} {listed(lost)} that no generated id met: the optimized model has none of its "
                "type, shape and content"
            )

    def _trusted_rows(self) -> None:
        """Tells of requests that the roles rule out although the second model takes them."""
        if self.known is not None:  # by whoever rewrote the model, and put its guard there
            return
        whole = [
            i.name
            for i in self.binding.declared
            if i.role.level != "candidate" and i.role.candidate_axis is not None
            if (i.name, False) in self.binding.sources.values()
        ]
        if whole:
            self.report.find(
                "structure",
                "contract",
                "Calls whose rows differ where roles say that they are the same were not looked at: the optimized "
                f"model takes all rows of {listed(whole)}.",
                "note",
            )

    def _calmly(self, side: Side, do: str, **arguments: Any) -> Any:
        """Has a model do something; a crash becomes a finding, and None is returned."""
        try:
            return side.call(do, **arguments)
        except Crashed as e:
            self._crash("structure", side, f"in {do}", e)
            return None

    def _crash(self, verdict: str, side: Side, doing: str, e: Crashed) -> None:
        self.report.find(verdict, e.kind, f"The {side.name} model made its process fail {doing}: {e}.", model=side.name)

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

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _open_ahead(self) -> None:
        """Has sessions made while the rest is done, where it is known which and where they fit into memory."""
        if not any(s.large or runtime.has_half(s.proto) for s in self.sides):
            for side in self.sides:
                open_ahead(side, self.options)

    def session(self, provider: str, level: str) -> dict[str, Any]:
        """How a session is made."""
        return _session(self.options, provider, level, self.precision)

    def _open(self, provider: str, level: str) -> bool:
        """Makes a session of each model; whether the second model loads."""
        how = self.session(provider, level)
        where = f"({provider}, optimisations {level})"
        first, second = open_both(self.sides, f"{provider}/{level}", **how)
        if isinstance(first, Crashed):
            raise ModelError(f"The original makes onnxruntime fail while it is loaded {where}: {first}.") from first
        if isinstance(first, ModelError):
            raise ModelError(f"The original does not load {where}: {first}.") from first
        if isinstance(second, Crashed):
            self._crash("structure", self.optimized, f"while it was loaded {where}", second)
            return False
        if isinstance(second, ModelError):
            message = f"onnxruntime does not load it {where}: {second}"
            self.report.find("structure", "runtime", message, model="optimized")
            return False
        for trouble in (first, second):
            if trouble is not None:
                raise trouble
        return True

    def _find_precision(self) -> None:
        """Models with 16-bit floats that the runtime has no kernels for here are compared in float32.

        That is told by the original: where it runs as it is, the other one must run as it is too.
        """
        if not any(runtime.has_half(s.proto) for s in self.sides):
            return
        how = {"provider": self.options.providers[0], "level": "disabled"}
        for side in self.sides:
            try:
                side.open("try", precision="own", **how)
                if side is self.original and runtime.has_half(side.proto):
                    return
            except Crashed:
                return
            except ModelError:
                self.precision = "float"
                self.report.find(
                    "rounding",
                    "precision",
                    "onnxruntime has no 16-bit kernels here for these models: they were compared in float32.",
                    "note",
                )
                return

    def _open_truth(self) -> bool:
        """Makes float64 sessions of both models; whether there are such."""
        for side, trouble in zip(self.sides, open_both(self.sides, _TRUTH, precision="double"), strict=True):
            if trouble is not None:
                self.no_truth(side, trouble)
                return False
        return True

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

    # --- comparing ---------------------------------------------------------------------------------------------------

    def compare(self, points: Sequence[Point]) -> bool:
        """Runs both models everywhere and judges what they give; whether the second model loads everywhere."""
        theirs = {o.name for o in self.optimized.proto.graph.output}
        self.shared = [n for n in self.names if n in theirs]
        if not self.shared:
            return False
        truths = self._run_truth(points)
        for provider in self.options.providers:
            for level in LEVELS:
                self.say(f"comparing on {provider}, optimisations {level}")
                if not self._open(provider, level):
                    return False
                self._run_level(points, provider, level, truths)
                for side in self.sides:
                    side.spare(f"{provider}/{level}")
        return True

    def _run_truth(self, points: Sequence[Point]) -> list[tuple[Outputs, Outputs] | None]:
        if not self.truth:
            return [None] * len(points)
        self.say("comparing in float64")
        first, second = run_both(self.sides, _TRUTH, [[p.feed for p in points], [p.bound for p in points]], self.shared)
        for side, answers in zip(self.sides, (first, second), strict=True):
            why = next(
                (a for p, a in zip(points, answers, strict=True) if isinstance(a, ModelError) and p.candidates > 1),
                None,
            )
            if why is not None:
                self.no_truth(side, why)
                return [None] * len(points)
        return list(zip(first, second, strict=True))

    def _run_level(
        self, points: Sequence[Point], provider: str, level: str, truths: Sequence[tuple[Outputs, Outputs] | None]
    ) -> None:
        feeds = [[p.feed for p in points], [p.bound for p in points]]
        first, second = run_both(self.sides, f"{provider}/{level}", feeds, self.shared)
        if not self._trusted(first, truths):
            truths = [None] * len(points)
        where = f"({provider}, optimisations {level})"
        for p, a, b, t in zip(points, first, second, truths, strict=True):
            if isinstance(a, ModelError):
                self._original_fails(p, a, b, where)
                continue
            if isinstance(b, Crashed):
                doing = f"with {p.candidates} candidates and {p.inputs} inputs {where}"
                self._crash("rounding", self.optimized, doing, b)
                continue
            if isinstance(b, ModelError):
                if not p.candidates and self.emptiness.excused(p, b, provider):
                    continue
                self.report.find(
                    "rounding",
                    "run",
                    f"It does not run where the original does (N = {p.candidates}, {p.inputs} inputs) {where}: {b}",
                    model="optimized",
                )
                continue
            pair = t if t is not None and not any(isinstance(x, ModelError) for x in t) else None
            for k in self.shared:
                if p.candidates == 0 and self.emptiness.vacuous(k, a[k], b[k]):
                    continue
                truth = pair[0][k] if pair is not None else None  # type: ignore[index]
                raised = pair[1][k] if pair is not None else None  # type: ignore[index]
                self.samples.append(
                    Sample(provider, level, p.inputs, p.candidates, p.seed, k, a[k], b[k], truth, raised, p.request)
                )

    def _trusted(self, own: Sequence[Outputs], truths: Sequence[tuple[Outputs, Outputs] | None]) -> bool:
        """Whether float64 gives the shapes that the runtime gives, as kernels of the reference evaluator may not."""
        for a, t in zip(own, truths, strict=True):
            if self.truth and isinstance(a, dict) and t is not None and isinstance(t[0], dict):
                odd = next((k for k in self.shared if a[k].shape != t[0][k].shape), None)
                if odd is not None:
                    shapes = f"{list(t[0][odd].shape)}, where onnxruntime gives {list(a[odd].shape)}"
                    self.no_truth(self.original, ModelError(f"{odd!r} would have the shape {shapes}"))
        return self.truth

    def _original_fails(self, p: Point, why: ModelError, other: Outputs, where: str) -> None:
        if p.candidates > 1 and p.inputs == ORDINARY:
            if isinstance(why, Crashed):
                self._crash("rounding", self.original, f"with {p.candidates} candidates {where}", why)
                return
            if self.options.data is not None:
                self._only_recorded(str(why))
                return
            if lacks_memory(why):
                raise EnvironmentProblem(
                    f"The original needs more memory for {p.candidates} candidates than its process may use: name "
                    "smaller numbers with --candidates, or allow it more with --memory."
                )
            raise ModelError(
                f"The original does not run with {p.candidates} candidates: {why}. If an input takes values of its "
                "own, give their range in a roles file."
            )
        dies = isinstance(why, Crashed)
        runs = "" if isinstance(other, ModelError) else " (the optimized model does)"
        how = f"makes onnxruntime fail ({why})" if dies else "does not run"
        self.report.find(
            "rounding",
            "original",
            f"The original {how} with {count(p.candidates)} and {p.inputs} inputs{runs}, so nothing was compared "
            "there.",
            "warning" if dies else "note",
            model="original",
        )

    def _only_recorded(self, why: str) -> None:
        self.report.find(
            "rounding",
            "original",
            f"The original does not run on some generated inputs, so recorded requests speak for those: {why}",
            "warning",
            model="original",
        )


def open_ahead(side: Side, options: Options) -> None:
    """Has the sessions of a model made that it is compared in, without anybody waiting; what takes longest first."""
    optimised = [(provider, LEVELS[-1]) for provider in options.providers]
    others = [(provider, level) for provider in options.providers for level in LEVELS[:-1]]
    for provider, level in optimised:
        side.ahead(f"{provider}/{level}", **_session(options, provider, level, "own"))
    side.ahead(_TRUTH, precision="double")
    for provider, level in others:
        side.ahead(f"{provider}/{level}", **_session(options, provider, level, "own"))


def _session(options: Options, provider: str, level: str, precision: str) -> dict[str, Any]:
    return {"provider": provider, "level": level, "precision": precision, "tf32": options.tf32}


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
