"""Compression from the file to the verdict: statistics, search, the gate, and the report."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from onnxrank import cluster, engines, feeds, workers
from onnxrank import model as files
from onnxrank.compress import gate
from onnxrank.compress.behind import finetuned, sequential
from onnxrank.compress.gate import Limits, Outcome
from onnxrank.compress.method import LEAST_WIDTH
from onnxrank.compress.methods import METHODS, MIXING
from onnxrank.compress.passes import Scored, Scoring, Summing, scored, summed
from onnxrank.compress.plan import Plan, Tuning
from onnxrank.compress.report import Report
from onnxrank.compress.requests import CALIBRATION, GATE, Batch, Requests
from onnxrank.compress.runner import ORIGINAL, Runner
from onnxrank.compress.search import Kept, Made, Search, signed
from onnxrank.compress.sites import gemm_bias
from onnxrank.compress.statistics import Moments, Statistics
from onnxrank.compress.units import MOST, needed
from onnxrank.contract import find_roles, stored_contract
from onnxrank.errors import EnvironmentProblem, ModelError, UsageError
from onnxrank.network import Joint, Layer, Network, Product, Site
from onnxrank.packing import hidden, pack
from onnxrank.roles import Roles

PACK = "pack"
DEFAULT = ("fp16-tables", "low-rank", "units", "int8-tables", "int8", "fp16", "pca-tables", PACK)
"""Methods that are tried if none are named."""
NAMES = (*METHODS, PACK)
TUNED = 1024
"""Rows of a step of training."""
_SUMS = "sums"
_TRIES = 3
_LIKELY = 0.75
"""Share of what is allowed that a model is expected to take up which the gate is asked about after one was refused."""
_MOST_BYTES = 1 << 31


@dataclass(frozen=True)
class Options:
    """What a caller may choose.

    Attributes:
        size: How many times smaller the model should become; None for no target.
        latency: How many times faster; None for no target.
        limits: What may be lost.
        methods: Names of methods.
        sites: Patterns on names of layers and tables; all if there are none.
        holdout: Share of the requests that the gate gets.
        gate_data: Requests for the gate alone, instead of a share.
        labels: Names of labels: one for the first output, or one per output.
        request_id: Name of what tells requests apart.
        candidates: Number of candidates that times and multiply-adds are for.
        sequential: Whether layers of low rank are fitted to what they see in the compressed model.
        refit: Whether last layers are fitted again.
        finetune: How layers of low rank are trained behind the search, which needs torch; None if not.
        allow_contrib: Whether operators of onnxruntime's own may be written.
        plan: Decisions to follow instead of searching.
        choice: Most calibration rows that models are tried on.
        seconds: Time for timing one model.
        jobs: Processes that go over all rows, with the engine `local`.
        engine: Where all rows are gone over: `local`, or `ray`.
        timeout: Seconds for one step of a model.
        memory: Bytes of address space of each process.
        progress: Called with what is being done.

    Raises:
        UsageError: A value is not one that there is.
    """

    size: float | None = None
    latency: float | None = None
    limits: Limits = field(default_factory=Limits)
    methods: Sequence[str] = DEFAULT
    sites: Sequence[str] = ()
    holdout: float = 0.5
    gate_data: str | os.PathLike[str] | None = None
    labels: Sequence[str] = ()
    request_id: str = "request_id"
    candidates: int = 512
    sequential: bool = False
    refit: bool = True
    finetune: Tuning | None = None
    allow_contrib: bool = False
    plan: Plan | None = None
    choice: int = 32768
    seconds: float = 0.5
    jobs: int = 1
    engine: str = "local"
    timeout: float = 120.0
    memory: int | None = None
    progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        unknown = [m for m in self.methods if m not in NAMES]
        if unknown:
            raise UsageError(f"The method {unknown[0]!r} is not known; there are {', '.join(NAMES)}.")
        if not 0 < self.holdout < 1:
            raise UsageError(
                f"A holdout of {self.holdout:g} leaves nothing for one of the two; give a share in (0, 1)."
            )
        if self.engine not in engines.NAMES:
            raise UsageError(f"The engine {self.engine!r} is not known; there are {', '.join(engines.NAMES)}.")
        for name, value in (("size", self.size), ("latency", self.latency)):
            if value is not None and not 1 <= value < math.inf:
                raise UsageError(f"The target {name} must be at least 1 times, and not {value:g}.")
        contrib = [m for m in self.methods if m in METHODS and METHODS[m].contrib]
        if contrib and not self.allow_contrib:
            raise UsageError(f"{contrib[0]} writes operators of onnxruntime's own; allow that with --allow-contrib.")

    @property
    def tuning(self) -> Tuning | None:
        """How layers of low rank are trained: as the plan says, where there is one."""
        return self.finetune if self.plan is None else self.plan.finetune

    def say(self, step: str) -> None:
        """Tells what is being done."""
        if self.progress is not None:
            self.progress(step)


@dataclass(frozen=True)
class Result:
    """What came of it.

    Attributes:
        model: The compressed model; the original where nothing was kept or the gate said no.
        report: What was done and found.
        loaded: The original.
    """

    model: ModelProto
    report: Report
    loaded: files.LoadedModel

    @property
    def passed(self) -> bool:
        """Whether the gate let it pass."""
        return self.report.verdict == "passed"

    def save(self, out: str | os.PathLike[str]) -> None:
        """Writes the compressed model, or the original's own bytes where nothing was compressed.

        Raises:
            UsageError: It cannot be written, or the gate did not let it pass.
            EnvironmentProblem: There is no space.
        """
        if not self.passed:
            raise UsageError("The gate did not let the compressed model pass, so it is not written.")
        if self.report.changed:
            files.save(self.model, self.loaded, out)
        else:
            files.save_unchanged(self.loaded, out)
        self.report.output = os.fspath(out)


def compress(
    model: str | os.PathLike[str] | ModelProto,
    data: str | os.PathLike[str],
    options: Options | None = None,
    *,
    roles: Roles | None = None,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
) -> Result:
    """Makes a model smaller and faster, and holds it against the original on requests that nothing was fitted to.

    Args:
        model: A path, or a model in memory; as exported, or optimised.
        data: Recorded requests: `.npz`, Parquet, or a folder of them, with the inputs of the original.
        options: What to do; see there.
        roles: Which inputs are request-level; or give `request`, `spec` or `infer_from`, as to `optimize`. Without
            them, those of the model's contract; else all inputs count as candidate-level.
        request: Patterns on input names.
        spec: A roles file's content.
        infer_from: Recorded requests to infer the roles from.

    Returns:
        The compressed model and the report, whatever the gate says.

    Raises:
        UsageError: Options, roles or data are wrong, or a request is for calibration and for the gate.
        ModelError: The model is invalid or does not run.
        EnvironmentProblem: onnxruntime is missing, torch is missing and asked for, or memory ran out.
    """
    o = options or Options()
    if o.tuning is not None and find_spec("torch") is None:
        raise EnvironmentProblem("--finetune needs torch: install 'onnxrank[train]'.")
    o.say("reading")
    workers.warm(1)
    loaded = files.load(model)
    if roles is None:
        given: dict[str, Any] = {"request": request, "spec": spec, "infer_from": infer_from, "lenient": True}
        stored = None if request or spec is not None else stored_contract(loaded.proto)
        roles, notes = find_roles(feeds.describe(loaded.proto), stored, **given)
    else:
        notes = []
    return _Job(loaded, roles, o, data, [n for n in notes if "declared" not in n]).run()


class _Job:
    """One run, a step a method, in their order."""

    def __init__(
        self, loaded: files.LoadedModel, roles: Roles, options: Options, data: str | os.PathLike[str], notes: list[str]
    ) -> None:
        self.loaded, self.options = loaded, options
        self.engine = cluster.engine(options.engine, options.jobs)
        source = None if loaded.path is None else os.fspath(loaded.path)
        self.report = Report(metadata.version("onnxrank"), source, loaded.sha256, notes=notes)
        self.report.candidates = options.candidates
        self.report.targets = {"size": options.size, "latency": options.latency, "loss": options.limits.loss}
        self.data = Requests(
            data, loaded.proto, roles, options.labels, options.request_id, options.holdout, options.gate_data
        )
        held = sum(math.prod(t.dims) * 4 for t in files.tensors(loaded.proto))
        if held >= _MOST_BYTES:
            raise ModelError("The model's weights are beyond 2 GiB, which compress does not take so far.")
        self.original = Network(loaded.proto, loaded.folder)

    def run(self) -> Result:
        o, report = self.options, self.report
        base = self.original
        if PACK in o.methods or (o.plan is not None and o.plan.pack):
            base = self.original.copy()
            report.packed = [str(p) for p in pack(base)]
        with Runner(o.timeout, o.memory) as runner:
            runner.load(ORIGINAL, self.original.finished())
            runner.open(ORIGINAL, ORIGINAL)
            outputs = self._outputs(runner)
            self._joined(runner, outputs)
            stats, kept = self._statistics(runner, base, outputs)
            search = Search(
                self.original.finished(), base, self.loaded.size + self._external(), stats, kept, runner, o.limits,
                [m for m in o.methods if m != PACK], o.sites, (o.size, o.latency), o.refit, self.loaded.sha256,
                bool(report.packed), self._rows_of(runner, base), self._macs(runner), o.seconds, o.say,
            )  # fmt: skip
            made = self._follow(search) if o.plan is not None else self._search(search)
            report.points = search.points
            report.refusals = search.refusals
            report.stopped = "plan" if o.plan is not None else search.stopped
            made = self._gate(search, made)
        report.plan = made.plan
        report.changed = report.verdict == "passed" and bool(made.plan.steps or report.packed)
        if not report.changed:
            return Result(self.loaded.proto, report, self.loaded)
        return Result(signed(made.model, made.plan), report, self.loaded)

    def _external(self) -> int:
        """Bytes of the tensors in external data."""
        return sum(
            math.prod(t.dims) * 4 for t in files.tensors(self.loaded.proto) if t.data_location == TensorProto.EXTERNAL
        )

    # --- calibration rows ---------------------------------------------------------------------------------------

    def _outputs(self, runner: Runner) -> tuple[str, ...]:
        """Outputs that are lists of scores."""
        self.options.say("first request")
        names = [x.name for x in self.original.model.graph.output]
        feed = self.data.sample(3)
        shapes = runner.shapes(ORIGINAL, feed, names)
        found = tuple(n for n in names if shapes[n][:1] == (3,) and math.prod(shapes[n]) == 3)
        if not found:
            told = ", ".join(f"{n} {list(shapes[n])}" for n in names)
            raise ModelError(f"The model has no output with one score per candidate; it gives {told} for 3 candidates.")
        if len(found) < len(names):
            others = ", ".join(n for n in names if n not in found)
            self.report.notes.append(f"outputs without one score per candidate are not held against anything: {others}")
        if len(self.data.labels) > len(found):
            raise UsageError(f"There are {len(self.data.labels)} labels for {len(found)} outputs ({', '.join(found)}).")
        return found

    def _joined(self, runner: Runner, outputs: tuple[str, ...]) -> None:
        """Finds out whether rows of several requests may be scored in one run."""
        if not self.data.joined:
            return
        first = next(iter(self.data.batches()), None)
        if first is None:
            raise UsageError("The recorded requests are empty.")
        together = runner.of_feeds(ORIGINAL, outputs, first.feeds)
        self.data.joined = False
        alone = runner.of_feeds(ORIGINAL, outputs, next(iter(self.data.batches(first.part))).feeds)
        self.data.joined = all(
            len(together[n]) == len(alone[n]) and np.allclose(together[n], alone[n], 1e-4, 1e-6) for n in outputs
        )

    def _statistics(self, runner: Runner, base: Network, outputs: tuple[str, ...]) -> tuple[Statistics, Kept]:
        """Goes over the calibration rows once."""
        o = self.options
        o.say("statistics")
        products: list[Layer] = [*base.products(), *(j for j in base.joints(LEAST_WIDTH) if j.wide)]
        tables = base.tables()
        # Where a layer adds what is computed, or several read the same, what they give does not tell the product, or
        # not in one tensor: their inputs do.
        indirect = [isinstance(p, Joint) or base.adds_computed(p) for p in products]
        sums = {
            f"p:{k}:{j}": [t]
            for k, p in enumerate(products)
            for j, t in enumerate(p.inputs if indirect[k] else p.members[0].outputs)
        }
        wanted = {*o.methods, *(m for s in (o.plan.steps if o.plan else ()) for m, _ in s.chain)}
        sums = sums if "low-rank" in wanted else {}
        between = {f"h:{k}": h for k, h in enumerate(hidden(base))} if "units" in wanted else {}
        sums |= {key: [h.tensor] for key, h in between.items()}
        ids: dict[str, list[Any]] = {f"t:{k}": [list(t.ids), t.shape[0]] for k, t in enumerate(tables)}
        exposed = [*(n for ns in sums.values() for n in ns), *(i for t in tables for i in t.ids)]
        model = base.finished()
        runner.load(_SUMS, model)
        # Not optimised: what is exposed could keep the runtime from fusing, which changes nothing but the time.
        runner.open(_SUMS, _SUMS, exposed, optimise=False)
        shapes = runner.shapes(_SUMS, self.data.sample(3), [i for t in tables for i in t.ids])
        depths = {name: len(shape) for name, shape in shapes.items()}
        found = self._summed(model, exposed, sums, ids)
        runner.close(_SUMS)
        moments: dict[str, Moments] = {}
        for k, p in enumerate(products if "low-rank" in wanted else []):
            total: Moments | None = None
            vector = gemm_bias(base, p)
            for j in range(len(p.inputs)):
                m = found[f"p:{k}:{j}"]
                assert isinstance(m, Moments)
                m = m.through(base.matrix(p)) if indirect[k] else m if vector is None else m.less(vector)
                total = m if total is None else total + m
            assert total is not None
            moments[p.name] = total
        lookups = {t.name: found[f"t:{k}"] for k, t in enumerate(tables)}
        units = {
            h.name: needed(np.concatenate([base.matrix(r) for r in h.readers], axis=1), found[key])
            for key, h in between.items()
            if LEAST_WIDTH <= h.width <= MOST
        }
        stats = Statistics(self.report.rows[CALIBRATION], moments, lookups, depths, hidden=units)
        return stats, self._kept(runner, outputs)

    def _summed(self, model: ModelProto, exposed: list[str], sums: Any, ids: Any) -> Mapping[str, Any]:
        """Sums over all calibration rows."""
        o = self.options
        task = Summing(self.data, model, o.timeout, o.memory, exposed, False, sums, ids)
        found = summed(self.engine, task, o.say)
        self.report.rows[CALIBRATION], self.report.requests[CALIBRATION] = found.rows, found.requests
        if not found.rows:
            raise UsageError("No request is left for calibration: there are too few, or --holdout is too large.")
        return found.found

    def _kept(self, runner: Runner, outputs: tuple[str, ...]) -> Kept:
        """The first calibration rows, which models are tried on."""
        batches: list[Batch] = []
        for b in self.data.batches(CALIBRATION):
            batches.append(b)
            runner.keep(b.feeds)
            if sum(len(b.request) for b in batches) >= self.options.choice:
                break
        scores = runner.scores(ORIGINAL, outputs)
        request = np.concatenate([b.request for b in batches])
        labels = self._labels([b.labels for b in batches], outputs)
        feed = self.data.sample(self.options.candidates)
        return Kept(outputs, {n: scores[n][:, 0] for n in outputs}, request, labels, feed)

    def _labels(self, several: Sequence[Any], outputs: tuple[str, ...]) -> dict[str, NDArray[np.float64] | None]:
        """Labels by output; outputs without their own are held against the original."""
        out: dict[str, NDArray[np.float64] | None] = dict.fromkeys(outputs)
        for k, _ in enumerate(self.data.labels):
            out[outputs[k]] = np.concatenate([y[:, k] for y in several])
        return out

    def _rows_of(self, runner: Runner, base: Network) -> dict[str, int]:
        """How many rows each layer and table works on, at the usual number of candidates."""
        sites: list[Site] = [*base.tables(), *base.products()]
        names = {s.name: list(s.outputs if isinstance(s, Product) else [n.output[0] for n in s.nodes]) for s in sites}
        tensors = [t for ts in names.values() for t in ts]
        with runner.session(base.finished(), tensors) as session:
            shapes = runner.shapes(session, self.data.sample(self.options.candidates), tensors)
        return {s: sum(math.prod(shapes[t][:-1]) for t in ts) for s, ts in names.items()}

    def _macs(self, runner: Runner) -> int:
        """Multiply-adds of the original's layers."""
        rows = self._rows_of(runner, self.original)
        return sum(rows[p.name] * p.shape[0] * p.shape[1] for p in self.original.products())

    # --- decisions ----------------------------------------------------------------------------------------------

    def _search(self, search: Search) -> Made:
        made = search.run()
        if self.options.sequential and made.plan.steps:
            better = sequential(search, made)
            if better is not made:
                search.note(better, "sequential", "all layers of low rank")
                search.history.append(better)
                made = better
        if self.options.finetune is not None:
            better = self._finetuned(search, made, self.options.finetune)
            if better is not made:
                search.note(better, "finetune", "all layers of low rank")
                search.history.append(better)
                made = better
        return made

    def _finetuned(self, search: Search, made: Made, how: Tuning) -> Made:
        """Trains the layers of low rank, and says where that was no help."""
        if not any(s.chain[0][0] == "low-rank" for s in made.plan.by_site.values()):
            self.report.notes.append("no layer has a low rank, so nothing was trained")
            return made
        steps = how.epochs * -(-self.report.rows[CALIBRATION] // TUNED)
        better = finetuned(search, made, how, self.data.shuffled(how.epochs, TUNED, how.seed), steps)
        if better is made:
            self.report.notes.append("training did not make the model better, so it was left as it was fitted")
        return better

    def _follow(self, search: Search) -> Made:
        """Does what a plan says."""
        plan = self.options.plan
        assert plan is not None
        if plan.model_sha256 != self.loaded.sha256:
            raise UsageError("The plan belongs to another model: its hash is not that of this one.")
        unknown = [m for s in plan.steps for m, _ in s.chain if m not in METHODS]
        if unknown:
            raise UsageError(f"The plan names the method {unknown[0]!r}, which there is not.")
        search.refit = plan.refit
        first = search.begin()
        made = search.made(replace(plan, sequential=False, refit=False, finetune=None))
        if plan.sequential:
            made = sequential(search, made)
        if plan.finetune is not None:
            made = self._finetuned(search, made, plan.finetune)
        search.history = [first, made]
        search.note(made, "plan", f"{len(plan.by_site)} sites")
        return made

    # --- the gate -----------------------------------------------------------------------------------------------

    def _gate(self, search: Search, made: Made) -> Made:
        """Asks the gate about the last model, and where it says no about milder ones, at stricter levels each time.

        Of several models that are asked about one may pass by luck: every further try halves what is left of the chance
        that intervals may be wrong.
        """
        o, report = self.options, self.report
        history = search.history
        at = len(history) - 1
        limits = o.limits
        original: tuple[Scored, Any] | None = None
        while True:
            report.tries += 1
            if _mixes(history[at].plan):  # as it will be served: requests of their own
                self.data.joined = False
            o.say("the gate")
            original, report.outcomes = self._asked(history[at].model, search.kept.outputs, limits, original)
            report.verdict = gate.together(report.outcomes)
            told = any("too few to tell" in r or "tell these labels" in r for x in report.outcomes for r in x.reasons)
            if report.verdict == "passed" or at == 0 or told or o.plan is not None or report.tries == _TRIES:
                break
            at = milder(history, at, report.outcomes)
            limits = replace(limits, level=1 - (1 - limits.level) / 2)
        if _mixes(history[at].plan):
            report.notes.append(
                "int8 rounds the inputs of layers in the range of all candidates of a run, so a score depends a little "
                "on the other candidates; the gate scored every request by itself"
            )
        if at < len(history) - 1:
            left = len(history) - 1 - at
            report.notes.append(
                f"the gate did not let the last {left} steps pass, so they were taken back; intervals are at "
                f"{100 * limits.level:.4g} % since it was asked {report.tries} times"
            )
            del search.points[len(search.points) - left :]
        return history[at]

    def _asked(
        self, model: ModelProto, outputs: tuple[str, ...], limits: Limits, known: tuple[Scored, Any] | None
    ) -> tuple[tuple[Scored, Any], tuple[Outcome, ...]]:
        """Scores of both models on the gate's rows, and what the gate says."""
        if known is None:
            before = self._scores(self.original.finished(), outputs)
            if before is None:
                raise UsageError("No request is left for the gate: there are too few, or --holdout is too small.")
            known = before, self._labels([before.labels], outputs)
            self.report.rows[GATE], self.report.requests[GATE] = len(before.request), len(before.names)
        before, labels = known
        made = self._scores(model, outputs)
        assert made is not None
        return known, tuple(
            gate.judge(
                gate.Scores(
                    before.scores[n].astype(np.float64),
                    made.scores[n].astype(np.float64),
                    before.request,
                    labels[n],
                    before.names,
                ),
                limits,
                n,
            )
            for n in outputs
        )

    def _scores(self, model: ModelProto, outputs: tuple[str, ...]) -> Scored | None:
        """Scores of a model on the gate's rows."""
        o = self.options
        return scored(self.engine, Scoring(self.data, model, o.timeout, o.memory, outputs=outputs))


def milder(history: Sequence[Made], at: int, outcomes: Sequence[Outcome]) -> int:
    """Which of some models to ask the gate about next: the last one that can be expected to pass.

    What scores lose, and how wide the intervals of that are, goes about by how far logits are off. Steps differ in that
    by far, so their number says nothing.

    Args:
        history: The models, the one that nothing was done to first.
        at: The one that did not pass.
        outcomes: What the gate said of that.
    """
    used = max((c.used for o in outcomes for c in o.criteria), default=math.inf)
    error = history[at].error * _LIKELY / max(used, 1.0)
    return max((k for k in range(1, at) if history[k].error <= error), default=0)


def _mixes(plan: Plan) -> bool:
    """Whether scores depend on the other rows of a run."""
    return any(name in MIXING for step in plan.by_site.values() for name, _ in step.chain)


def failure(report: Report) -> str:
    """Why nothing was written, in a sentence or two."""
    reasons = [f"{o.output}: {r}" if len(report.outcomes) > 1 else r for o in report.outcomes for r in o.reasons]
    shown = "; ".join(reasons[:3])
    what = "The gate refuses the compressed model" if report.verdict == "failed" else "The gate cannot tell"
    return f"{what}: {shown}. Nothing was written."
