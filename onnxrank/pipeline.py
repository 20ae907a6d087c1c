"""`optimize`: from a user's model to a rewritten, checked one."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from math import isclose
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import baked, cost, crossover, feeds, plans, remarks, tune, workers
from onnxrank import model as files
from onnxrank.analysis import Analysis
from onnxrank.contract import CONTRACT, is_done, roles_again, same_roles, stored_contract
from onnxrank.crossover import Pair
from onnxrank.errors import CheckFailed, DoesNotRun, ModelError, UsageError
from onnxrank.facts import Setting
from onnxrank.forms import Form, forms, preparing_sites
from onnxrank.fused import Unsupported
from onnxrank.operators import domain_of, find, operator
from onnxrank.packing import Packed
from onnxrank.plans import LEAVE, TAKE, Choice, Measured, Place, Plan, Site, label
from onnxrank.report import Prediction, Report, Retreat, RuleUse, report_candidates
from onnxrank.retreat import GaveUp, Guilty, Search, order
from onnxrank.rewrite import Refusal, Rule
from onnxrank.roles import InputInfo, Roles, infer, resolve
from onnxrank.ruleset import choose_rules
from onnxrank.runtime import Feeds
from onnxrank.study import Study, fit
from onnxrank.transform import Transformation
from onnxrank.values import CANDIDATES, symbols
from onnxrank.verify import failure, gate, sizes
from onnxrank.verify import report as verdicts
from onnxrank.verify.options import CHECKS
from onnxrank.verify.structure import quantises

__all__ = ["CONTRACT", "Form", "Result", "Study", "Transformation", "choose_rules", "optimize", "report_candidates"]

_LEAST_GAIN = 0.97
"""A predicted ratio of times below this is a loss; predictions are a little too careful with small models."""
_SCAN = (1, 8, 32, 128, 512, 2048)
_MUCH = 0.05
"""Share of the multiply-adds from which on it is worth trying another way."""
_MOST_ROUNDS = 2
"""How many rules are left out for the sake of time before the model as a whole is left alone."""
_MOST_WRITINGS = 8
"""How often fused operators are written out, each time with those that hold several levels since the last time."""
_MOST_RETREATS = 8
"""Sites that are left out, one after the other, before the model as a whole is left alone."""


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


def optimize(
    model: str | os.PathLike[str] | ModelProto | files.LoadedModel,
    *,
    roles: Roles | None = None,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
    interface: str = "request",
    guard: bool = True,
    candidates: int | tuple[int, int] = 512,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    extra_rules: Sequence[str | os.PathLike[str]] = (),
    check: bool | str = True,
    lengths: Mapping[str, tuple[int, int]] | None = None,
    strict: bool = False,
    tune: float = 0.0,
    plan: Plan | str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Rewrites a ranking model so that what is the same for all candidates is computed once per request.

    What does not pass the check is taken back, site by site, and so is, with `tune`, what is not faster; the report
    says what. Where nothing can be kept the model is left as it is.

    Args:
        model: A path, or a model in memory or as it was loaded.
        roles: Which inputs are request-level; or give `request`, `spec` or `infer_from`.
        request: Patterns on input names, `user_*`, and columns, `X[0:13,20]`, that are request-level.
        spec: A roles file's content.
        infer_from: Recorded requests to infer the roles from.
        interface: `request`: request-level inputs take one row. `same`: the signature stays.
        guard: With `same`: whether scores become NaN where rows of a request-level input differ.
        candidates: Expected number of candidates per request, or its range.
        select: Names of the rules to use; None for all.
        ignore: Names of rules to leave out.
        extra_rules: Python files with a `RULES` sequence of further rules.
        check: Whether to hold the result against the original, or how thoroughly: `quick`, `standard` (what True
            stands for) or `full`.
        lengths: Least and most of the inputs' symbolic lengths, by the name in their shape or `input.axis`, for the
            check; 1..1024 for those not named.
        strict: Whether a result that does not pass its check is an error instead of taken back in part.
        tune: Seconds to time original and result in turns; 0 for none. What was measured makes the bytes depend on the
            machine; `Result.plan` gives the same ones again.
        plan: A plan, or its file, to be replayed: it has roles, interface, candidates, guard and rules.
        progress: Called with the name of each stage.

    Returns:
        The rewritten model and the report.

    Raises:
        UsageError: Roles or options are wrong, or the plan does not belong to the model.
        ModelError: The model is invalid or not supported.
        CheckFailed: With `strict` or `plan`: the rewritten model does not give the original's scores.
        EnvironmentProblem: onnxruntime is missing, or memory ran out.
    """
    span, how = span_of(candidates), "standard" if check is True else check
    options = Options(interface, guard, span, check=how, lengths=lengths, strict=strict, tune=tune, progress=progress)
    if check:
        workers.warm()
    options.say("reading")
    loaded = read(model)
    if plan is not None:
        found = Plan.of(plan)
        told = (roles, request, spec, infer_from)
        return replay(loaded, found, replayed_options(found, options, select, ignore, extra_rules), told)
    options = replace(options, rules=choose_rules(select, ignore, extra_rules))
    given, notes = roles_of(loaded, roles, request, spec, infer_from)
    contract = stored_contract(loaded.proto)
    use = (given, options.interface, options.span, options.names, options.lengths or {})
    if contract is not None and roles is None and is_done(contract, described(loaded), *use):
        return left_alone(loaded, options, given)
    passes = [STUDY, REWRITE, *([CHECK] if options.check else []), *([TIME] if options.tune else [])]
    try:
        return Job(loaded, given, options, notes).run(passes)
    except DoesNotRun:
        known = baked.with_lengths(loaded, given)
        if known is None:
            raise
    fixed, note = known
    free = {sizes.name_of(s) for i in feeds.inputs(fixed.proto, given) for s in symbols(i.dims)}
    left = {name: span for name, span in (lengths or {}).items() if name in free}
    return Job(fixed, given, replace(options, lengths=left), [*notes, note]).run(passes)


@dataclass(frozen=True)
class Options:
    """What a caller of `optimize` may choose; see there.

    Attributes:
        interface: `request` or `same`.
        guard: Whether unequal rows give NaN.
        span: Expected number of candidates, least and most.
        rules: The rules, in order of preference.
        offered: Their names, as the caller allows them; those of `rules` if None.
        check: How thoroughly the result is held against the original; False for not at all.
        lengths: Least and most of symbolic lengths, for the check.
        strict: Whether a failing check is an error.
        tune: Seconds for timing.
        progress: Called with the name of each stage.

    Raises:
        UsageError: A value is not one that there is.
    """

    interface: str = "request"
    guard: bool = True
    span: tuple[int, int] = (512, 512)
    rules: tuple[Rule, ...] = ()
    offered: tuple[str, ...] | None = None
    check: str | bool = "standard"
    lengths: Mapping[str, tuple[int, int]] | None = None
    strict: bool = False
    tune: float = 0.0
    progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if self.interface not in ("request", "same"):
            raise UsageError(f"interface {self.interface!r} is not known; use 'request' or 'same'")
        if self.check is not False and self.check not in CHECKS:
            raise UsageError(
                f"the check {self.check!r} is not known; use {', '.join(map(repr, CHECKS))}, True or False"
            )
        if not 0 <= self.tune < float("inf"):
            raise UsageError(f"tune {self.tune!r} is not a number of seconds")

    def say(self, stage: str) -> None:
        """Tells what is being done."""
        if self.progress is not None:
            self.progress(stage)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rules that are allowed, sorted."""
        return tuple(sorted({r.name for r in self.rules})) if self.offered is None else self.offered

    @property
    def usual(self) -> int:
        """The number of candidates that costs are told for."""
        return report_candidates(self.span)


def span_of(candidates: int | tuple[int, int]) -> tuple[int, int]:
    """Least and most candidates expected.

    Raises:
        UsageError: It is no number or range of such.
    """
    span = (candidates, candidates) if isinstance(candidates, int) else candidates
    if span[0] < 1 or span[1] < span[0]:
        raise UsageError(f"candidates {candidates!r} is not a number of at least 1 or a range of such")
    return span


# --- reading -------------------------------------------------------------------------------------------------------


def read(model: str | os.PathLike[str] | ModelProto | files.LoadedModel) -> files.LoadedModel:
    """Reads a model that can be worked on.

    Raises:
        UsageError: The file cannot be read.
        ModelError: It is no valid model, or holds no operator that is known.
    """
    loaded = model if isinstance(model, files.LoadedModel) else files.load(model)
    if all_foreign(loaded.proto):
        raise ModelError("the model holds no operators of the default ONNX domain, nor others that are known")
    return loaded


def described(loaded: files.LoadedModel) -> list[InputInfo]:
    """The model's inputs as declared."""
    return feeds.describe(loaded.proto)


def roles_of(
    loaded: files.LoadedModel,
    roles: Roles | None = None,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
) -> tuple[Roles, list[str]]:
    """The roles of a model's inputs: those given, else those of its contract.

    Returns:
        The roles, and what the user should know of them.

    Raises:
        UsageError: They are wrong, or nothing is said of them.
        ModelError: The contract holds roles that do not fit the model.
    """
    if roles is not None:
        return roles, []
    inputs, contract = described(loaded), stored_contract(loaded.proto)
    if infer_from is not None:
        return infer(inputs, infer_from)
    if contract is not None and not request and spec is None:
        note = "the model was optimised before; its roles are those of its contract"
        return roles_again(inputs, contract), [note]
    return resolve(inputs, request=request, spec=spec), []


def left_alone(loaded: files.LoadedModel, options: Options, roles: Roles) -> Result:
    """The result for a model that was optimised before: nothing to do."""
    report = new_report(loaded, options, roles)
    report.notes = ["the model's contract says that it was optimised before, for the same use"]
    return Result(loaded.proto, report, loaded, plan=Job(loaded, roles, options).plan())


def new_report(loaded: files.LoadedModel, options: Options, roles: Roles) -> Report:
    """A report of a run that has not changed anything yet."""
    source = None if loaded.path is None else os.fspath(loaded.path)
    version, interface = metadata.version("onnxrank"), options.interface
    report = Report(version, source, loaded.sha256, interface, options.span, roles.to_dict())
    report.size_before = report.size_after = loaded.size
    return report


# --- the steps -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """A step of `optimize`.

    Attributes:
        name: What is said while it runs.
        policy: What it may do to the model: `none`, `exact` for what gives the same scores but for rounding and is
            checked, or `undo` for what only takes back.
        run: Goes on from a job's model, analysis, options and report, which it changes; whether there is anything to
            go on with, or the original has to be kept.
    """

    name: str
    policy: str
    run: Callable[[Job], bool]


@dataclass
class _Way:
    """A model that rules may look at: the original, or with its sequences taken apart.

    Attributes:
        base: What is known of it.
        written_out: The same with fused operators written out.
        places: The nodes of the original whose sequences are taken apart.
        could: Those that hold several levels, by their places in `base`.
        done: Those of them that can be written out.
    """

    base: Study
    written_out: Study
    places: Sequence[int] = ()
    could: frozenset[int] = frozenset()
    done: frozenset[int] = frozenset()


@dataclass
class Job:
    """One run of `optimize` on a model: what its passes hand on. A step is a method, in their order.

    Attributes:
        loaded: The original.
        roles: Roles of its inputs.
        options: What the caller chose.
        notes: Anything worth knowing, a sentence each.
        known: What is known of the original's tensors, where somebody has analysed it already.
        report: What was done so far.
        study: What is known of the original, in the form that is rewritten.
        form: The way that was chosen to rewrite it.
        full: The form with all rules.
        measured: What timing gave.
        pair: That form, and another one for few candidates; None where it holds for any number.
    """

    loaded: files.LoadedModel
    roles: Roles
    options: Options
    notes: list[str] = field(default_factory=list)
    known: Analysis | None = None

    def __post_init__(self) -> None:
        self.report = new_report(self.loaded, self.options, self.roles)
        self.report.notes = self.notes
        self.study: Study | None = None
        self.form: Form | None = None
        self.full: Form | None = None
        self.measured: tuple[Measured, ...] = ()
        self.pair: Pair | None = None
        self._original: Study | None = None
        self._base: Study | None = None
        self._unpacked: frozenset[Place] = frozenset()
        self._prepared: list[Site] = []
        self._others: list[Refusal] = []
        self._ways: list[_Way] = []
        self._found: tuple[Form, ...] = ()
        self._kept = False
        self._without: frozenset[str] = frozenset()
        self._guilty: set[tuple[str, str]] = set()
        self._emitted: tuple[Form, Pair | None, tuple[Measured, ...], ModelProto] | None = None

    def run(self, passes: Iterable[Pass]) -> Result:
        """Goes through passes, as far as they leave anything to go on with."""
        for step in passes:
            self.options.say(step.name)
            if not step.run(self):
                return self.unchanged()
        return self.result()

    def studied(self) -> bool:
        """Derives the original's shapes; the runs that confirm them are waited for by `confirmed`."""
        if self.known is None:
            self.known = Analysis(Study(files.flattened(self.loaded.proto), self.roles, self.loaded, wait=False))
        study = self.study = self._original = self.known.study
        self.notes += [study.facts.note] if study.facts.note else []
        served = sizes.spans(study.symbols, self.options.lengths or {})
        self.report.lengths = {sizes.name_of(s): span for s, span in served.items()}
        shapes = study.shapes(self.options.usual)
        self.report.before = self.report.after = cost.by_level(study.model.graph, shapes)
        return True

    def confirmed(self) -> bool:
        """Whether runs of the original confirm its shapes, so that it can be rewritten at all.

        Raises:
            ModelError: It does not run.
        """
        assert self._original is not None
        stray = self._original.contradicted()
        self.report.refusals = [stray] if stray is not None else []
        return stray is None

    def rewritten(self) -> bool:
        """Rewrites the model in the way that costs least; whether anything applied, and pays."""
        try:
            ways = self.candidates()
        except Exception:
            self.confirmed()  # a model that does not run may be rewritten to anything, and says so itself
            raise
        if not self.confirmed():
            return False
        self.choose(ways)
        return self.crosses() or self.pays()

    def candidates(self) -> list[Form]:
        """The ways to rewrite the model, those with all rules first."""
        study = self._base = self._packed()
        self._ways = []
        found = self._forms(study)
        places = list(study.sequences)
        if study.fixed_sequences and self._loses(found[0]):
            places = sorted({*places, *study.fixed_sequences})
        if places:
            try:
                found = self._forms(study.divided(places), places) + found
            except ModelError as e:
                self.notes.append(f"a sequence of the history and the candidate is not taken apart: {e}")
        if study.packed:  # it pays by itself
            o = self.options
            found.append(Form(study, o.rules, o.interface, o.guard, o.span, Choice().leaving(rules=_optional(o.rules))))
        return found

    def _packed(self) -> Study:
        """The original with what does nothing packed away."""
        study = self._original
        assert study is not None
        places = {(p.index, p.kind) for p in self._packing() if _place(p) not in self._unpacked}
        try:
            return study.pack(places) if places else study
        except ModelError as e:
            self.notes.append(f"what does nothing is not packed away: {e}")
            self._unpacked = frozenset(map(_place, self._packing()))
            return study

    def _packing(self) -> Sequence[Packed]:
        """What can be packed away, as far as rules are allowed."""
        study, rules = self._original, {r.name for r in self.options.rules}
        assert study is not None
        found = study.packable if plans.PACK in rules else []
        return [*found, *(study.lookups(self.options.usual).packed if plans.LOOKUP in rules else ())]

    def _loses(self, form: Form) -> bool:
        """Whether much that is the request's is done for every candidate."""
        lost = sum(r.lost for r in remarks.remarks(form, self.options.usual))
        if form.model is None or not form.changed:
            return lost > _MUCH * self.report.macs_before
        shapes = form.shapes(self.options.usual)
        return lost > _MUCH * sum(c.macs for c in cost.by_level(form.model.graph, shapes).values())

    def _forms(self, study: Study, places: Sequence[int] = ()) -> list[Form]:
        """The ways to rewrite a model as it is, and with fused operators written out that hold several levels."""
        o = self.options
        way = _Way(study, study, places)
        self._ways.append(way)
        plain = found = forms(study, o.rules, o.interface, o.guard, o.span)
        written: set[str] = set()
        refused: set[str] = set()
        for _ in range(_MOST_WRITINGS):  # what one is written out as may bring several levels to the next one
            fused = {*written, *found[0].rewrite.rw.fused} - refused
            if fused == written:
                break
            try:
                found = forms(study.written_out(fused), o.rules, o.interface, o.guard, o.span)
                written, way.written_out = fused, found[0].study
            except Unsupported as e:
                refused.add(e.output)
                self._not_written(study, [e.output], str(e))
            except ModelError as e:
                self._not_written(study, fused, str(e))
                break
        nodes = study.model.graph.node
        way.could = frozenset(k for k, n in enumerate(nodes) if n.output and n.output[0] in written | refused)
        way.done = frozenset(k for k in way.could if nodes[k].output[0] in written)
        return plain if found is plain else found + plain

    def _not_written(self, study: Study, outputs: Collection[str], why: str) -> None:
        """Says why fused operators, known by their first outputs, are left as they are."""
        found = {n.op_type for n in study.model.graph.node if n.output and n.output[0] in outputs}
        what = " and ".join(sorted({"fused attention" if "Attention" in op else op for op in found}))
        self.notes.append(f"{what} is left as it is, though its operands hold several levels: {why}")

    def choose(self, found: Sequence[Form]) -> None:
        """Takes the form that costs least at the expected number of candidates."""
        seconds = self._before()
        self._found = tuple(found)
        # Of forms that are all out the last is the plainest.
        self._choose(min(reversed(found), key=lambda f: f.seconds(self.options.span, seconds)))

    def _choose(self, chosen: Form) -> None:
        """Goes on with one of the ways to rewrite the model."""
        base, found, self.pair = self._base, self._found, None
        assert base is not None and self._original is not None
        self.full = next(f for f in found if f.study is chosen.study)
        self.form = chosen
        way = self._way()
        assert way is not None
        tried, done = {k for w in self._ways for k in w.places}, way.done if chosen.study is not way.base else ()
        nodes = self._original.model.graph.node
        self._prepared = [
            Site(
                _place(p),
                label(nodes[p.index]),
                nodes[p.index].op_type,
                (),
                LEAVE if _place(p) in self._unpacked else TAKE,
            )
            for p in self._packing()
        ]
        self._prepared += preparing_sites(plans.SEGMENTS, base, tried, way.places)
        self._prepared += preparing_sites(plans.WRITTEN_OUT, way.base, way.could, done)
        self._take(chosen)

    def crosses(self) -> bool:
        """Whether a second plan for few candidates stands beside the one for many, where one alone is not enough."""
        assert self.form is not None
        before, n = self._before(), self.options.usual
        kept = self.form.changed and before(n) >= _LEAST_GAIN * self.form.time(n)
        pair = crossover.find(self._found, self.form.time if kept else before, before, self.options.span)
        if pair is not None:
            if pair.many is not self.form:
                self._choose(pair.many)
            self.pair = pair
        return pair is not None

    def _uncross(self, cause: str, reason: str) -> bool:
        """Goes on with a single plan; whether there is one that pays."""
        self.pair, self.measured = None, ()
        self.report.retreats.append(Retreat(crossover.RULE, None, cause, reason))
        self.notes.append(f"one plan was kept for any number of candidates: {reason}")
        if self._found:
            self.choose(self._found)
        return self.pays()

    def _before(self) -> Callable[[int], float]:
        """Predicted time of the original, by the number of candidates."""
        study = self._original
        assert study is not None
        return _seconds(study.model, study.shapes)

    def _take(self, form: Form) -> None:
        """Goes on with a form, and says what was left alone."""
        self.form, self.study = form, form.study
        self.pair = self.pair and replace(self.pair, many=form)
        study = self._original
        self._others = list(study.lookups(self.options.usual).refusals) if study is not None else []
        assert self.full is not None
        for name in sorted(self.full.rewrite.rw.applied - form.rewrite.rw.applied):
            # What it would refuse is worth knowing, too.
            self._others += [r for r in self.full.rewrite.rw.refusals if r.rule == name]
            if not form.choice.uses(name) and not any(r.rule == name for r in self.report.retreats):
                note = f"{name} would not pay at N = {self.options.usual}, so it was left out"
                self.notes += [note] if note not in self.notes else []
                self._others += remarks.left_out(name, form, self.full, self.options.span)
        self.report.refusals = [*form.refusals, *self._others]

    def pays(self) -> bool:
        """Whether anything applied, and is predicted to be faster than the original."""
        assert self.form is not None
        if not self.form.changed:
            return False
        n = self.options.usual
        original, made = self.form.study.model, self.form.model
        before, after = self._before()(n), self.form.time(n)
        same = made is not None and _operators(made) == _operators(original) and isclose(before, after)
        if same and not self.form.study.packed:
            self.notes.append("the rewritten model would do the same work in another order, so it was not taken")
            return False
        if before < _LEAST_GAIN * after:
            reason = f"the rewritten model would not be faster at N = {n}, so it was not taken"
            self.notes.append(reason)
            self._others.append(remarks.not_taken(self.form, reason, n))
            return False
        return True

    def follow(self, found: Plan) -> bool:
        """Rewrites the model as a plan says; whether that changes anything.

        Raises:
            UsageError: The plan does not fit the model or the rules.
        """
        study = self.study
        assert study is not None
        if not found.changed:
            return False
        self._prepared = list(found.preparation)
        packed = [s for s in self._prepared if s.place.rule in plans.PACKING]
        self._base = study.prepared(packed)
        study = self._base.prepared([s for s in self._prepared if s not in packed])
        fit([s for s in found.sites if s.place.rule not in plans.PREPARING], study)
        o = self.options
        self.full = Form(study, o.rules, o.interface, o.guard, o.span, found.choice())
        self.measured = found.measured
        self._take(self.full)
        if found.few is not None:
            rules = [r for r in o.rules if r.name in found.few.rules]
            few = self.full.limited(rules, found.few.choice())
            self.pair = Pair(few, self.full, found.few.below)
        wanted, made = (
            {(s.place, s.chosen) for s in (*p.sites, *(p.few.sites if p.few else ()))} for p in (found, self.plan())
        )
        lost = sorted(wanted ^ made, key=lambda d: (d[0].index, d[0].rule))
        if lost:
            node = label(study.model.graph.node[lost[0][0].index])
            raise UsageError(
                f"the plan cannot be replayed: at node {node!r} rule {lost[0][0].rule!r} does something else by now; "
                f"the plan was made by onnxrank {found.made_by}, with its rules"
            )
        return True

    def check(self) -> bool:
        """Holds the result against the original, and takes back what does not pass; whether anything is left.

        Raises:
            CheckFailed: With `strict`: it does not pass as it is.
            ModelError: It cannot be checked.
        """
        if not self.options.check:
            return True
        for _ in range(_MOST_RETREATS):
            found = self._gated()
            if found.passed:
                return True
            if self.options.strict:
                self.report.changed = False
                raise CheckFailed(f"the rewritten model did not pass its check: {failure(found)}", self.report)
            self.options.say("looking for what fails the check")
            if self._few_fail(found):
                if not self._uncross("check", failure(found)):
                    return False
                continue
            way, base, counts = self._way(), self._base, gate.failing_candidates(found)
            if base is not None and base.packed and not self._held(base.model, counts).passed:
                self._unpack(base, failure(found), counts)
            elif way is not None and way.places and not self._held(way.base.model, counts).passed:
                self._join(way, "check", failure(found))
            else:
                guilty = self._culprit(found)
                if guilty is None:
                    break
                self._retreat(guilty, "check", failure(found))
            if self.pair is None and not self.pays():
                self.form = None
                return False
        self._give_up("check", failure(found))
        return False

    def _few_fail(self, found: verdicts.Report) -> bool:
        """Whether a result of two plans fails for few candidates, or not for a number of them alone."""
        failed = [c.candidates for c in found.failed_cases]
        return self.pair is not None and (not failed or min(failed) < self.pair.below)

    def _gated(self) -> verdicts.Report:
        """What holding the result against the original finds."""
        made, study = self.emitted(), self.study
        assert study is not None
        if study.facts.note:
            raise ModelError(f"the result cannot be checked: {study.facts.note}; --no-check writes it unchecked")
        assert study.maker.ranges is not None
        found = self._held(made)
        self.report.looked, self.report.unseen = found.looked, found.unseen
        self.report.checks = gate.comparisons(found)
        if found.passed:
            self.notes += [f.message for f in found.findings if f.severity != "error"]
        return found

    def _held(self, made: ModelProto, candidates: Sequence[int] | None = None) -> verdicts.Report:
        """Holds a model against the original, at some numbers of candidates or all of the check's."""
        study, level = self.study, str(self.options.check)
        assert study is not None and study.maker.ranges is not None
        return gate.gate(
            self.loaded,
            made,
            self.roles,
            study.maker.ranges,
            study.symbols,
            level,
            self.options.lengths,
            candidates,
        )

    def _culprit(self, found: verdicts.Report) -> Guilty | None:
        """Which decision makes the check fail; None where that cannot be told in time."""
        form, counts = self.form, gate.failing_candidates(found)
        assert form is not None

        def right(made: ModelProto) -> bool:
            return self._held(made, counts).passed

        try:
            return Search(form.made, right).culprit(form.choice, order([r.name for r in self.options.rules]))
        except GaveUp:
            return None

    def _retreat(self, guilty: Guilty, cause: str, reason: str) -> None:
        """Leaves a site out, or a rule, and goes on with the rest.

        Where values are quantised on the way, whatever moves their last digit may be a step off, and one such site is
        as good as another: from the second of a rule at an operator on, all that are alike are left out at once.
        """
        assert self.form is not None
        choice = guilty.without(self.form.choice)
        alike = self._alike(guilty)
        self._guilty |= {(guilty.rule, s.op) for s in guilty.sites}
        self.report.retreats.append(Retreat(guilty.rule, guilty.node, cause, reason))
        self.report.retreats += [Retreat(s.place.rule, s.node, cause, f"as at {guilty.node!r}") for s in alike]
        others = f", and so were {len(alike)} like it" if alike else ""
        self.notes.append(f"{guilty} was left out{others}: {reason}")
        self._take(self.form.leaving(choice.leaving(s.place for s in alike)))

    def _alike(self, guilty: Guilty) -> list[Site]:
        """Sites to be left out with one that fails."""
        assert self.form is not None
        kinds = {(guilty.rule, s.op) for s in guilty.sites} & self._guilty
        if not kinds or not quantises(self.loaded.proto):
            return []
        own = {s.place for s in guilty.sites}
        return [s for s in self.form.sites if s.taken and (s.place.rule, s.op) in kinds and s.place not in own]

    def _way(self) -> _Way | None:
        """The way that the form belongs to; None where a plan is replayed."""
        assert self.form is not None
        study = self.form.study
        return next((w for w in self._ways if study in (w.base, w.written_out)), None)

    def _unpack(self, base: Study, reason: str, counts: Sequence[int]) -> None:
        """Leaves what makes the check fail unpacked, and goes on with the rest."""
        original = self._original
        assert original is not None
        nodes = original.model.graph.node

        rules = [r for r in plans.PACKING if any(p.rule == r for p in base.packed)]

        def made(choice: Choice) -> tuple[ModelProto, list[Site]]:
            sites = [
                Site(_place(p), label(nodes[p.index]), nodes[p.index].op_type, (), choice.at(_place(p)))
                for p in base.packed
            ]
            return original.pack({(s.place.index, s.place.step) for s in sites if s.taken}).model, sites

        try:
            guilty = Search(made, lambda m: self._held(m, counts).passed).culprit(Choice(), rules)
        except GaveUp:
            guilty = None
        wrong = guilty.sites if guilty is not None and guilty.sites else made(Choice())[1]
        self._unpacked |= {s.place for s in wrong}
        self.report.retreats += [Retreat(s.place.rule, s.node, "check", reason) for s in wrong]
        for rule in dict.fromkeys(s.place.rule for s in wrong):
            shown = dict.fromkeys(s.node for s in wrong if s.place.rule == rule)
            self.notes.append(f"{rule} was left out at {', '.join(shown)}: {reason}")
        self.choose(self.candidates())

    def _join(self, way: _Way, cause: str, reason: str) -> None:
        """Leaves sequences as they are joined, and goes on with the rest."""
        assert self._base is not None
        nodes = self._base.model.graph.node
        self.report.retreats += [Retreat(plans.SEGMENTS, label(nodes[k]), cause, reason) for k in way.places]
        self.notes.append(f"sequences were left as they are joined: {reason}")
        self.choose([f for f in self._found if f.study not in (way.base, way.written_out)])

    def _give_up(self, cause: str, reason: str) -> None:
        """Leaves the model alone after all."""
        self.report.retreats.append(Retreat("", None, cause, reason))
        self.notes.append(f"the rewritten model was given up, so the original is kept: {reason}")
        self.form = self.pair = None

    def measure(self) -> bool:
        """Times original and result in turns, and takes back what is not faster; whether anything is left."""
        if not self.options.tune or self.form is None:
            return self.form is not None
        race = self._race()
        try:
            if self.pair is not None:
                if self._pair_measured(race):
                    return True
                if not (self._uncross("tune", f"measured {tune.told(self.measured)} with two") and self.check()):
                    self.form = None
                    return False
            self.measured, self._without = self._timed(race, self.form, 0.5), self.form.choice.without
            if not tune.faster(self.measured):
                self._slower(race, self.form)
        except ModelError as e:
            self._give_up("tune", f"it could not be timed: {e}")
        return self.form is not None

    def _pair_measured(self, race: tune.Race) -> bool:
        """Times two plans against each other, to see from where on which is faster; whether both together are."""
        assert self.pair is not None
        pair, study, loaded = self.pair, self.pair.many.study, self.loaded
        points = pair.around(self.options.span)
        feeds = tuple(pair.many.rewrite.translate(study.maker(_setting(study, n))) for n in points)
        assert pair.few.model is not None
        times = self._timed(tune.Race(replace(loaded, proto=pair.few.model), points, feeds), pair.many, 0.25, feeds)
        self.pair = pair.measured(times)
        right = not self.options.check or self.pair.below == pair.below or self._gated().passed
        self.measured = self._timed(race, pair.many, 0.25, made=self._written())
        return right and tune.faster(self.measured)

    def _slower(self, race: tune.Race, form: Form) -> None:
        """Leaves out the rules without which the result is faster; the model, where that is no help."""
        reason, best = f"measured {tune.told(self.measured)}", self.measured
        for _ in range(_MOST_ROUNDS):
            tried = self._without_each(race, form)
            for _, other, times in tried:
                self.form, self.measured = other, times
                if tune.faster(times) and (not self.options.check or self._gated().passed):
                    left = ", ".join(sorted(other.choice.without - self._without))
                    note = f"left out, because it was not faster: {left} ({reason}; {tune.told(times)} without)"
                    self.report.retreats += [Retreat(r, None, "tune", reason) for r in left.split(", ")]
                    self.notes.append(note)
                    self._take(other)
                    return
            if not tried or tried[0][2][0].ratio <= best[0].ratio:
                break
            _, form, best = tried[0]
        self.measured = ()
        self._give_up("tune", reason)

    def _without_each(self, race: tune.Race, form: Form) -> list[tuple[str, Form, tuple[Measured, ...]]]:
        """Times a form without each of its rules; the fastest first."""
        rules = [r for r in _suspects(form) if form.choice.uses(r)]
        tried = []
        for rule in rules:
            other = form.leaving(form.choice.leaving(rules=[rule]))
            if other.changed:
                tried.append((rule, other, self._timed(race, other, 0.5 / len(rules))))
        return sorted(tried, key=lambda t: -t[2][0].ratio)

    def _race(self) -> tune.Race:
        study = self.study
        assert study is not None
        points = tune.points(self.options.span, self.options.usual)
        return tune.Race(self.loaded, points, tuple(study.maker(_setting(study, n)) for n in points))

    def _timed(
        self,
        race: tune.Race,
        form: Form,
        share: float,
        feeds: Sequence[Feeds] | None = None,
        made: ModelProto | None = None,
    ) -> tuple[Measured, ...]:
        """Times a form, or what is made of it, for a share of the time there is."""
        made = made or form.model
        assert made is not None
        feeds = feeds or [form.rewrite.translate(f) for f in race.feeds]
        return race.measure(made, feeds, share * self.options.tune)

    # --- reporting ---------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """Every decision behind the result, as far as it has got."""
        form = self.form if self.form is not None and self.form.changed and not self._kept else None
        rules = () if form is None else (r.name for r in self.options.rules if form.choice.uses(r.name))
        return Plan(
            source_sha256=self.loaded.sha256,
            made_by=self.report.version,
            interface=self.options.interface,
            guard=self.options.guard,
            candidates=self.options.span,
            roles=self.roles.to_dict(),
            offered=self.options.names,
            rules=tuple(dict.fromkeys(rules)),
            sites=() if form is None else (*self._prepared, *form.sites),
            changed=form is not None,
            measured=self.measured,
            few=self.pair.stored() if self.pair is not None and form is not None else None,
        )

    def emitted(self) -> ModelProto:
        """The result with its contract."""
        form = self.form
        assert form is not None and form.model is not None
        if self._emitted is not None and self._emitted[:3] == (form, self.pair, self.measured):
            return self._emitted[3]
        made = ModelProto()
        made.CopyFrom(self._written())
        contract = {
            "version": self.report.version,
            "source_sha256": self.loaded.sha256,
            "interface": self.options.interface,
            "candidates": list(self.options.span),
            "roles": self.roles.to_dict(),
            "rules": {r.name: r.sites for r in self._uses()},
            "offered": list(self.options.names),
            "plan": self.plan().stored(),
        }
        if self.report.lengths:
            contract["lengths"] = {name: list(span) for name, span in self.report.lengths.items()}
        made.metadata_props.add(key=CONTRACT, value=json.dumps(contract, sort_keys=True))
        self._emitted = form, self.pair, self.measured, made
        return made

    def _written(self) -> ModelProto:
        """The result without its contract."""
        assert self.form is not None
        written = self.form.model if self.pair is None else self.pair.model()
        if written is None:
            raise UsageError("the plan cannot be replayed: its two ways cannot stand in one file any more")
        return written

    def _uses(self) -> list[Any]:
        form, base, n = self.form, self._base, self.options.usual
        assert form is not None and base is not None
        uses: list[Any] = form.rewrite.rule_uses(form.original_shapes(n), form.shapes(n))
        if base.packed:
            after = sum(c.macs for c in cost.by_level(base.model.graph, base.shapes(n)).values())
            for rule in plans.PACKING[::-1]:
                places = dict.fromkeys(p.name for p in base.packed if p.rule == rule)
                saved = self.report.macs_before - after if rule == plans.PACK else 0
                uses[:0] = [RuleUse(rule, len(places), saved, tuple(places))] if places else []
        return uses

    def _remark(self, form: Form | None) -> None:
        """Says of every place that was left alone why it was."""
        if form is not None:
            self.report.refusals = remarks.by_loss([*remarks.remarks(form, self.options.usual), *self._others])

    def result(self) -> Result:
        """The result, and the report of it."""
        form = self.form
        if form is None or form.model is None:
            return self.unchanged()
        self._remark(form)
        self.notes += [*dict.fromkeys(map(str, form.study.packed)), *form.rewrite.notes]
        made, shapes = self.emitted(), form.shapes(self.options.usual)
        self.report.changed = True
        self.report.after = cost.by_level(form.model.graph, shapes)
        self.report.rules = self._uses()
        self.report.size_after = made.ByteSize()
        time = _line(form.time)
        if self.pair is not None:
            self.report.below = self.pair.below
            few, more, below = _line(self.pair.few.time), self.pair.overhead, self.pair.below
            many, time = time, lambda n: (few if n < below else many)(n) + more
        self.report.predictions = _predictions(_line(self._before()), time, self.measured)
        return Result(made, self.report, self.loaded, self.study, form, self.full, plan=self.plan())

    def unchanged(self) -> Result:
        """The original, and the report of why it is that."""
        self.report.changed, self._kept = False, True
        form = self.form or self.full
        self._remark(form)
        return Result(self.loaded.proto, self.report, self.loaded, self.study, form, self.full, plan=self.plan())


STUDY = Pass("deriving shapes", "none", Job.studied)
REWRITE = Pass("rewriting", "exact", Job.rewritten)
CHECK = Pass("checking", "undo", Job.check)
TIME = Pass("timing", "undo", Job.measure)


def _place(packed: Packed) -> Place:
    """Where something is packed away, as plans have it."""
    return Place(packed.rule, packed.index, packed.kind)


def _optional(rules: Iterable[Rule]) -> list[str]:
    """Names of the rules without which others can be applied."""
    return [r.name for r in rules if r.name not in plans.ALWAYS]


def _operators(model: ModelProto) -> Counter[str]:
    """How often each operator occurs."""
    return Counter(operator(n) for n in model.graph.node)


def _suspects(form: Form) -> list[str]:
    """The rules that were applied, those first whose costs are known least."""
    used = [
        r.name
        for r in form.rules
        if form.uses(r.name) or any(s.place.rule == r.name and s.taken for s in form.rewrite.decisions())
    ]
    used = [name for name in dict.fromkeys(used) if name not in plans.ALWAYS]
    formed = [r.name for r in form.rules if r.forms is not None and r.name in used]
    return list(dict.fromkeys([*formed, *(s for s in tune.SUSPECTS if s in used), *used]))


def _setting(study: Study, candidates: int) -> Setting:
    """Symbols of a request that is timed: of so many candidates, and lengths as costs have them."""
    return Setting({**dict.fromkeys(study.symbols, cost.LENGTH), CANDIDATES: candidates}, seed=0)


def _seconds(model: ModelProto, shapes: Callable[[int], cost.Shapes]) -> Callable[[int], float]:
    """Predicted time of a model, by the number of candidates."""
    return lambda n: cost.seconds(model.graph, shapes(n))


def _line(cost_at: Callable[[int], float]) -> Callable[[int], float]:
    """Costs over the number of candidates, which are a line in it."""
    low, high = cost_at(1), cost_at(2)
    return lambda n: low + (n - 1) * (high - low)


def _predictions(
    old: Callable[[int], float], new: Callable[[int], float], measured: Iterable[Measured]
) -> list[Prediction]:
    """Predicted ratios over the number of candidates, and measured ones."""
    seen = {m.candidates: (m.ratio, m.low, m.high) for m in measured}
    return [Prediction(n, round(old(n) / new(n), 3), *seen.get(n, ())) for n in sorted({*_SCAN, *seen})]


# --- replaying -----------------------------------------------------------------------------------------------------


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


def replay(
    loaded: files.LoadedModel, found: Plan, options: Options, told: tuple[Any, ...] = (None, (), None, None)
) -> Result:
    """Does what a plan says; nothing is decided or timed.

    Args:
        loaded: The original.
        found: The plan.
        options: From `replayed_options`.
        told: Roles that the caller gave after all, as for `roles_of`.

    Raises:
        UsageError: The plan does not belong to the model, or to this version's rules.
        CheckFailed: The result does not give the original's scores.
    """
    if found.source_sha256 != loaded.sha256:
        raise UsageError(
            f"the plan belongs to another model: to one of SHA-256 {found.source_sha256[:12]}..., and this one is "
            f"{loaded.sha256[:12]}..."
        )
    roles = Roles.from_dict(found.roles)
    if any(told) and not same_roles(roles_of(loaded, *told)[0], roles):
        raise UsageError("the plan was made for other roles than those given: leave them out, or the plan")
    follow = Pass(REWRITE.name, REWRITE.policy, lambda job: job.confirmed() and job.follow(found))
    return Job(loaded, roles, options).run([STUDY, follow, *([CHECK] if options.check else [])])


def for_one(result: Result) -> tuple[ModelProto, Roles, dict[str, Any]]:
    """The model for one request under the interface `request`.

    Where rewriting it does not pay it is the original, with rows of what is request-level repeated inside.

    Returns:
        The model, roles of its inputs, and its contract.
    """
    report, made = result.report, result.model
    stored = stored_contract(made)
    if stored is not None:
        return made, roles_again(feeds.describe(made), stored), stored
    study = result.study
    assert study is not None
    form = Form(study, (), "request", False, report.candidates)
    if form.model is None:
        raise ModelError("The model cannot be written with one row of what is request-level.")
    told = {
        "version": report.version,
        "source_sha256": report.source_sha256,
        "interface": "request",
        "candidates": list(report.candidates),
        "roles": report.roles,
        "rules": {name: len(at) for name, at in form.rewrite.sites().items()},
    }
    return form.model, roles_again(feeds.describe(form.model), told), told


def all_foreign(model: ModelProto) -> bool:
    """Whether all nodes are of other domains than the default one, and neither known nor functions of the model."""
    own = {(f.domain, f.name) for f in model.functions}
    known = (not domain_of(n) or find(n) or (n.domain, n.op_type) in own for n in model.graph.node)
    return bool(model.graph.node) and not any(known)
