"""`optimize`: from a user's model to a rewritten, checked one."""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner

from onnxrank import check as checking
from onnxrank import cost, facts, feeds, needed, runtime
from onnxrank import model as files
from onnxrank.emit import Emitted, Emitter, captured, rename_captured, subgraphs
from onnxrank.errors import CheckFailed, ModelError, UsageError
from onnxrank.facts import Facts
from onnxrank.report import Prediction, Report, RuleUse
from onnxrank.rewrite import Refusal, Rewrite, Rule
from onnxrank.roles import InputInfo, InputRole, Roles, ValueRange, infer, resolve
from onnxrank.values import (
    CANDIDATES,
    Dims,
    Level,
    Unrepresentable,
    Value,
    canonical,
    codes_of,
    extents,
    is_candidate_symbol,
    keep_symbols,
    symbols,
    view,
)

CONTRACT = "onnxrank.contract"
"""Key of the contract in a model's metadata."""

_NO_SITE = {None, "movement", "interface"}
_DATA_SHAPED = {"NonZero", "Unique", "Compress", "Loop", "If", "Scan", "NonMaxSuppression"}
_SHAPE_OPERANDS = {"Reshape": 1, "Expand": 1, "Tile": 1, "ConstantOfShape": 0, "Range": 0, "Slice": 1, "TopK": 1}
_FORMS = ("cross",)
"""Rules whose forms pay or not as a whole, not site by site."""
_LEAST_GAIN = 0.9
"""A predicted ratio of times below this is a loss; the prediction is a tenth too careful with small models."""
_SCAN = (1, 8, 32, 128, 512, 2048)


@dataclass
class Result:
    """A rewritten model and what was done to it.

    Attributes:
        model: The new model, or the original where nothing applied. External data are referenced, not loaded.
        report: What was done.
        loaded: The input.
    """

    model: ModelProto
    report: Report
    loaded: files.LoadedModel

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
    model: str | os.PathLike[str] | ModelProto,
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
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Result:
    """Rewrites a ranking model so that what is the same for all candidates is computed once per request.

    Args:
        model: A path, or a model in memory.
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
        check: Whether to hold the result against the original.
        progress: Called with the name of each stage.

    Returns:
        The rewritten model and the report.

    Raises:
        UsageError: Roles or options are wrong.
        ModelError: The model is invalid or not supported.
        CheckFailed: The rewritten model does not give the original's scores.
        EnvironmentProblem: onnxruntime is missing, or memory ran out.
    """
    say = progress or (lambda stage: None)
    if interface not in ("request", "same"):
        raise UsageError(f"interface {interface!r} is not known; use 'request' or 'same'")
    span = (candidates, candidates) if isinstance(candidates, int) else candidates
    if span[0] < 1 or span[1] < span[0]:
        raise UsageError(f"candidates {candidates!r} is not a number of at least 1 or a range of such")
    say("reading")
    loaded = files.load(model)
    original = loaded.proto
    if runtime_domain_only(original):
        raise ModelError("the model holds no operators of the default ONNX domain")
    working = inliner.inline_local_functions(original) if original.functions else original
    notes: list[str] = []
    described = feeds.describe(working)
    stored = stored_contract(original)
    if stored is not None and roles is None and _is_done(stored, interface, span):
        return _left_alone(loaded, stored, interface, span)
    if roles is None:
        if infer_from is not None:
            roles, lines = infer(described, infer_from)
            notes += lines
        else:
            if stored is not None:
                roles = _again(described, stored)
                notes.append("the model was optimised before; its roles are those of its contract")
            else:
                roles = resolve(described, request=request, spec=spec)
    rules = choose_rules(select, ignore, extra_rules)
    report = _report(loaded, interface, span, roles.to_dict(), notes)
    say("measuring shapes")
    study = Study(working, roles, loaded)
    if study.facts.note:
        notes.append(study.facts.note)
    stray = study.unproven_shapes()
    if stray is not None:
        report.refusals = [stray]
        report.before = report.after = cost.by_level(
            study.model.graph, cost.shapes_of(study.model, study.facts, study.input_extents(), report_candidates(span))
        )
        return Result(original, report, loaded)
    say("rewriting")
    before = cost.shapes_of(study.model, study.facts, study.input_extents(), report_candidates(span))
    forms = [Form(study, rules, interface, guard, span)]
    if forms[0].uses(_FORMS):
        # Which form is best changes with the number of candidates: the cheapest is taken.
        forms.append(Form(study, [r for r in rules if r.name not in _FORMS], interface, guard, span))

    def original_seconds(n: int) -> float:
        return cost.seconds(study.model.graph, replace(before, symbols={**before.symbols, CANDIDATES: n}))

    # Of forms that are all out the last is the plainest.
    chosen = min(reversed(forms), key=lambda f: f.seconds(span, original_seconds))
    made, rewrite = chosen.model, chosen.rewrite
    report.refusals = rewrite.rw.refusals
    notes += rewrite.notes
    report.before = report.after = cost.by_level(study.model.graph, before)
    if made is None or not rewrite.sites():
        return Result(original, report, loaded)
    say("measuring the result")
    contract = {
        "version": report.version,
        "source_sha256": loaded.sha256,
        "interface": interface,
        "candidates": list(span),
        "roles": roles.to_dict(),
        "rules": {},
    }
    assert chosen.probe is not None
    probe, after = chosen.probe, chosen.shapes(report_candidates(span))
    if cost.seconds(study.model.graph, before) < _LEAST_GAIN * cost.seconds(made.graph, after):
        notes.append(f"the rewritten model would not be faster at N = {report_candidates(span)}, so it was not taken")
        return Result(original, report, loaded)
    report.changed = True
    report.after = cost.by_level(made.graph, after)
    report.rules = rewrite.rule_uses(before, after)
    contract["rules"] = {r.name: r.sites for r in report.rules}
    entry = made.metadata_props.add()
    entry.key, entry.value = CONTRACT, json.dumps(contract, sort_keys=True)
    report.size_after = made.ByteSize()
    report.predictions = _predictions(
        original_seconds,
        lambda n: cost.seconds(made.graph, replace(after, symbols={**after.symbols, CANDIDATES: n})),
    )
    if check:
        say("checking")
        verify(study, made, probe, rewrite, report)
    return Result(made, report, loaded)


def _report(
    loaded: files.LoadedModel, interface: str, span: tuple[int, int], roles: dict[str, Any], notes: list[str]
) -> Report:
    """A report of a run that has not changed anything yet."""
    source = None if loaded.path is None else os.fspath(loaded.path)
    report = Report(metadata.version("onnxrank"), source, loaded.sha256, interface, span, roles, notes=notes)
    report.size_before = report.size_after = loaded.size
    return report


class Form:
    """One way to rewrite a model, with its measured shapes.

    Attributes:
        rewrite: The transformation.
        model: Its result; None where the model as a whole cannot be rewritten.
    """

    def __init__(self, study: Study, rules: Sequence[Rule], interface: str, guard: bool, span: tuple[int, int]) -> None:
        self.rewrite = Transformation(study, rules, interface, guard, report_candidates(span))
        self.model: ModelProto | None = None
        self.probe: facts.Probe | None = None
        try:
            self.model = self.rewrite.run()
        except Unrepresentable as e:
            self.rewrite.rw.refuse("movement", f"the model as a whole was left alone: {e}")
            return
        if self.rewrite.sites():
            self.probe = facts.Probe(self.model, study.symbols, study.loaded.folder)
            self.facts = self.probe.measure(lambda setting: self.rewrite.translate(study.maker(setting)))

    def uses(self, rules: Iterable[str]) -> bool:
        """Whether any of some rules applied."""
        return not self.rewrite.applied.isdisjoint(rules)

    def shapes(self, candidates: int) -> cost.Shapes:
        """Shapes at a number of candidates."""
        assert self.model is not None
        return cost.shapes_of(self.model, self.facts, self.rewrite.input_extents(), candidates)

    def seconds(self, span: tuple[int, int], original: Callable[[int], float]) -> float:
        """Predicted time at the expected number of candidates.

        Args:
            span: Least and most candidates expected.
            original: Predicted time of the original; a form that is slower at a quarter of the least is out.
        """
        if self.model is None or self.probe is None:
            return float("inf")
        few = max(1, span[0] // 4)
        if cost.seconds(self.model.graph, self.shapes(few)) > original(few):
            return float("inf")
        return cost.seconds(self.model.graph, self.shapes(report_candidates(span)))


def report_candidates(span: tuple[int, int]) -> int:
    """The number of candidates that costs are told for: the geometric middle of the range."""
    middle: float = (span[0] * span[1]) ** 0.5
    return round(middle)


def _predictions(before: Callable[[int], float], after: Callable[[int], float]) -> list[Prediction]:
    """Predicted ratios over the number of candidates; costs are lines in it."""

    def line(cost_at: Callable[[int], float]) -> Callable[[int], float]:
        low, high = cost_at(1), cost_at(2)
        return lambda n: low + (n - 1) * (high - low)

    old, new = line(before), line(after)
    return [Prediction(n, round(old(n) / new(n), 3)) for n in _SCAN]


def verify(study: Study, made: ModelProto, probe: facts.Probe, rewrite: Transformation, report: Report) -> None:
    """Checks the rewritten model and fills the report's checks.

    Raises:
        CheckFailed: It is not a valid model, onnxruntime does not load it, or a score differs.
    """
    try:
        onnx.checker.check_model(made if not study.loaded.external else _without_external(made))
    except onnx.checker.ValidationError as e:
        raise CheckFailed(f"the rewritten model is not valid ONNX: {runtime.first_line(e)}") from e
    if study.facts.note:
        raise ModelError(f"the result cannot be checked: {study.facts.note}; --no-check writes it unchecked")
    try:
        report.checks, more = checking.compare(
            study.model,
            made,
            study.maker,
            rewrite.translate,
            study.symbols,
            study.loaded.folder,
            sessions=(study.probe.session, probe.session),
        )
    except ModelError as e:
        raise CheckFailed(f"the rewritten model does not run: {e}") from e
    report.notes += more
    failed = [c for c in report.checks if not c.passed]
    if failed:
        worst = max(failed, key=lambda c: c.error / max(c.tolerance, 1e-300))
        report.changed = False
        raise CheckFailed(
            f"output {worst.output!r} differs by {worst.error:.3g} where {worst.tolerance:.3g} is allowed "
            f"(N = {worst.candidates}, seed {worst.seed}; {len(failed)} of {len(report.checks)} comparisons failed)",
            report,
        )


def _without_external(model: ModelProto) -> ModelProto:
    """A copy whose external tensors are empty, for the checker, which looks for them in the current folder."""
    out = ModelProto()
    out.CopyFrom(model)
    for t in files.tensors(out):
        if t.data_location == TensorProto.EXTERNAL:
            t.ClearField("external_data")
            t.data_location = TensorProto.DEFAULT
            del t.dims[:]
            t.dims.append(0)
    return out


def stored_contract(model: ModelProto) -> dict[str, Any] | None:
    """The contract in a model's metadata."""
    for p in model.metadata_props:
        if p.key == CONTRACT:
            try:
                found = json.loads(p.value)
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None


def _is_done(contract: Mapping[str, Any], interface: str, span: tuple[int, int]) -> bool:
    """Whether this version has optimised the model already, for the same use."""
    mine = {"version": metadata.version("onnxrank"), "interface": interface, "candidates": list(span)}
    return all(contract.get(key) == value for key, value in mine.items())


def _left_alone(
    loaded: files.LoadedModel, contract: Mapping[str, Any], interface: str, span: tuple[int, int]
) -> Result:
    """The result for a model that was optimised before: nothing to do."""
    note = "the model's contract says that it was optimised before, for the same use"
    report = _report(loaded, interface, span, dict(contract.get("roles", {})), [note])
    return Result(loaded.proto, report, loaded)


def _again(described: Sequence[InputInfo], contract: Mapping[str, Any]) -> Roles:
    """Roles of a model that was optimised before: request-level inputs have their one row by now.

    Under the interface `same` rows are taken inside, and every input counts as candidate-level from outside.
    """
    before = Roles.from_dict(contract.get("roles", {})).inputs
    divided = contract.get("interface") == "request"
    out: dict[str, InputRole] = {}
    for info in described:
        stem, _, part = info.name.rpartition(".")
        role = before.get(info.name) or before.get(stem)
        axis = 0 if role is None else role.candidate_axis
        record = None if role is None else role.record
        once = role is not None and divided and (part == "request" or role.level == "request")
        if role is not None and divided and info.name not in before and record is not None:
            record = record - len(role.request) if part == "candidate" else None
        level = "request" if once or axis is None else "candidate"
        ranges = () if role is None else _moved_ranges(role, part if info.name not in before else "")
        along = 0 if record is not None or role is None or role.axis is None else role.axis
        out[info.name] = InputRole(
            info.name,
            level,
            None if once else axis,
            axis=along if any(r.positions is not None for r in ranges) else None,
            record=None if once else record,
            ranges=ranges,
        )
    return Roles(out)


def _moved_ranges(role: InputRole, part: str) -> tuple[ValueRange, ...]:
    """Ranges of an input, or of one part of one that was divided: positions count within the part."""
    if not part:
        return role.ranges
    out = []
    taken = set(role.request)
    for r in role.ranges:
        if r.positions is None:
            out.append(r)
            continue
        before = sorted(taken) if part == "request" else [k for k in range(max(r.positions) + 1) if k not in taken]
        kept = tuple(before.index(p) for p in r.positions if (p in taken) == (part == "request"))
        if kept:
            out.append(replace(r, positions=kept))
    return tuple(out)


def runtime_domain_only(model: ModelProto) -> bool:
    """Whether no node is of the default domain."""
    return bool(model.graph.node) and all(n.domain not in ("", "ai.onnx") for n in model.graph.node)


def choose_rules(
    select: Sequence[str] | None, ignore: Sequence[str], extra: Sequence[str | os.PathLike[str]]
) -> tuple[Rule, ...]:
    """The rules to use: onnxrank's own, those of installed packages (entry points `onnxrank.rules`), those of files.

    Raises:
        UsageError: A name is not that of a rule, or a file cannot be used.
    """
    from onnxrank.rules import RULES

    found: list[Rule] = []
    for path in extra:
        found += _rules_in(path)
    for point in metadata.entry_points(group="onnxrank.rules"):
        found += list(point.load())
    found += RULES
    names = {r.name for r in found}
    for name in [*(select or ()), *ignore]:
        if name not in names:
            raise UsageError(f"there is no rule {name!r}; the rules are {', '.join(sorted(names))}")
    # Without the movement rule nothing can be followed, so it is not up for selection.
    wanted = names if select is None else {*select, "movement", "broadcast"}
    return tuple(r for r in found if r.name in wanted and (r.name not in ignore or r.name == "movement"))


def _rules_in(path: str | os.PathLike[str]) -> list[Rule]:
    import runpy

    try:
        space = runpy.run_path(os.fspath(path))
    except OSError as e:
        raise UsageError(f"the rules file {os.fspath(path)} cannot be read: {e.strerror}") from e
    except (Exception, SystemExit) as e:
        raise UsageError(f"the rules file {os.fspath(path)} fails: {type(e).__name__}: {e}") from e
    found = space.get("RULES")
    if not isinstance(found, Sequence) or not all(isinstance(r, Rule) for r in found):
        raise UsageError(f"the rules file {os.fspath(path)} must define RULES, a sequence of onnxrank.Rule")
    return list(found)


# --- studying the original -----------------------------------------------------------------------------------------


class Study:
    """What is known of the original: its nodes with extents resolved, inputs, shapes, constants and types."""

    def __init__(self, model: ModelProto, roles: Roles, loaded: files.LoadedModel) -> None:
        self.loaded = loaded
        self.model = model
        self.declared = feeds.inputs(model, roles)
        self.symbols = sorted({s for i in self.declared for s in symbols(i.dims)})
        if CANDIDATES not in self.symbols:
            raise UsageError("no input has a candidate axis: name the inputs that differ between candidates")
        self.maker = feeds.Maker(self.declared, None)
        self.probe = facts.Probe(model, self.symbols, loaded.folder)
        self.facts = self._first_look()
        resolved = resolve_ifs(self.model, self.facts)
        if resolved is not None:
            self.model = resolved
            self.probe = facts.Probe(resolved, self.symbols, loaded.folder)
            self.facts = self.probe.measure(self.maker)
        self.dtypes = element_types(self.model)
        self.maker = feeds.Maker(self.declared, self._ranges())
        if self._data_shaped():
            self.facts = self.probe.measure(self.maker)

    def _first_look(self) -> Facts:
        """Shapes, from inputs that most models accept: ids of 1, or else of 0."""
        try:
            return self.probe.measure(self.maker)
        except ModelError:
            self.maker = feeds.Maker(self.declared, None, fill=0)
        try:
            return self.probe.measure(self.maker)
        except ModelError as e:
            shown = ", ".join(f"{i.name} {_shown(i.dims)}" for i in self.declared)
            raise ModelError(
                f"the model does not run at several numbers of candidates with inputs of these roles: {shown}. {e}. "
                "If it is a static batch export, export it again with a dynamic one (torch: dynamic_axes or "
                "dynamic_shapes; tf2onnx: a batch of None); if an input takes values of its own, give their range in a "
                "roles file."
            ) from e

    def constants(self) -> dict[str, Value]:
        """Values of the initializers; their data are loaded when asked for."""
        from onnxrank.values import Source

        graph = self.model.graph
        listed = {i.name for i in graph.input} if self.model.ir_version >= 4 else set()
        out = {}
        for k, t in enumerate(graph.initializer):
            if t.name in listed:
                continue
            dims: Dims = tuple((n,) if n != 1 else () for n in t.dims)

            def load(t: TensorProto = t) -> NDArray[Any]:
                return facts.constant_data(t, self.loaded.folder)

            out[t.name] = Value(dims, t.data_type, Source(-1 - k, dims, t.data_type, Level.CONSTANT, t.name, load))
        return out

    def _ranges(self) -> feeds.Ranges:
        from onnxrank.rules import movement

        return feeds.find_ranges(self.model, self.declared, self.facts, self.constants(), self.dtypes, movement.RULE)

    def _data_shaped(self) -> bool:
        """Whether a shape may depend on the data of the inputs, which the first run fed with zeros."""
        fixed = set(self.facts.folded) | self.facts.varying | {t.name for t in self.model.graph.initializer}
        for n in self.model.graph.node:
            if n.op_type in _DATA_SHAPED:
                return True
            first = _SHAPE_OPERANDS.get(n.op_type)
            if first is not None and any(i and i not in fixed for i in n.input[first:]):
                return True
        return False

    def unproven_shapes(self) -> Refusal | None:
        """A shape that is computed from the number of candidates in a way that a few runs cannot tell."""
        for n in self.model.graph.node:
            first = _SHAPE_OPERANDS.get(n.op_type)
            if first is not None and self.facts.unproven.intersection(n.input[first:]):
                reason = "a shape is computed from the number of candidates in a way that cannot be followed"
                return Refusal("movement", _label(n), n.op_type, reason)
        return None

    def input_extents(self) -> dict[str, tuple[facts.Extent, ...]]:
        """Extents of the inputs."""
        return {i.name: extents_of(i.dims) for i in self.declared}


def _shown(dims: Dims) -> str:
    """A factored shape in a message."""
    return "[" + ", ".join("*".join(str(f).removeprefix("S:") for f in d) or "1" for d in dims) + "]"


def extents_of(dims: Dims) -> tuple[facts.Extent, ...]:
    """A factored shape as constants times symbols."""
    return tuple((extents((d,))[0], symbols([d])) for d in dims)


def element_types(model: ModelProto) -> dict[str, int]:
    """Element types of tensors, as far as onnx's inference knows them."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:
        return {}
    out = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info if v.type.HasField("tensor_type")}
    out |= {o.name: o.type.tensor_type.elem_type for o in model.graph.output}
    return {name: t for name, t in out.items() if t}


def resolve_ifs(model: ModelProto, found: Facts) -> ModelProto | None:
    """Replaces every `If` whose condition is an extent's, and the same for all numbers of candidates, by its branch."""
    if not any(n.op_type == "If" and n.input[0] in found.folded for n in model.graph.node):
        return None
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    taken = {o for n in model.graph.node for o in n.output} | {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "If" or node.input[0] not in found.folded:
            out.graph.node.append(node)
            continue
        chosen = "then_branch" if bool(found.folded[node.input[0]][1].reshape(-1)[0]) else "else_branch"
        branch = next(a.g for a in node.attribute if a.name == chosen)
        names = dict(zip((o.name for o in branch.output), node.output, strict=True))
        local = {o for n in branch.node for o in n.output} | {t.name for t in branch.initializer}
        for name in sorted(local - names.keys()):
            if name in taken:
                names[name] = f"{node.output[0]}/{name}"
            taken.add(names.get(name, name))
        for t in branch.initializer:
            copy = out.graph.initializer.add()
            copy.CopyFrom(t)
            copy.name = names.get(t.name, t.name)
        for inner in branch.node:
            copied = out.graph.node.add()
            copied.CopyFrom(inner)
            copied.input[:] = [names.get(i, i) if i in local else i for i in inner.input]
            copied.output[:] = [names.get(o, o) for o in inner.output]
            rename_captured(copied, {n: names[n] for n in names if n in local})
        made = {o for n in branch.node for o in n.output}
        for inner_name, outer in zip((o.name for o in branch.output), node.output, strict=True):
            if inner_name not in made:
                out.graph.node.append(helper.make_node("Identity", [inner_name], [outer], name=outer))
    return out


# --- writing the new graph -----------------------------------------------------------------------------------------


class Transformation:
    """One rewrite of a studied model."""

    def __init__(self, study: Study, rules: Sequence[Rule], interface: str, guard: bool, candidates: float) -> None:
        self.study = study
        self.interface = interface
        self.guard = guard and interface == "same"
        graph = study.model.graph
        taken = {i.name for i in graph.input} | {t.name for t in graph.initializer}
        for node in graph.node:
            taken |= {*node.input, *node.output, node.name}
            taken |= {c for g in subgraphs(node) for c in captured(g)}
        opset = next(o.version for o in study.model.opset_import if o.domain in ("", "ai.onnx"))
        self.emit = Emitter(taken, opset)
        outputs = frozenset(o.name for o in graph.output)
        self.rw = Rewrite(
            study.facts, rules, self.emit, study.dtypes, candidates=max(1, round(candidates)), outputs=outputs
        )
        if any(r.name == "select" for r in rules):
            constants = {n: v[1] for n, v in study.facts.folded.items()}
            constants |= {t.name: facts.constant_data(t, study.loaded.folder) for t in graph.initializer
                          if t.data_type == TensorProto.INT64 and t.ByteSize() < 1 << 20}  # fmt: skip
            shapes = {t.name: tuple(t.dims) for t in graph.initializer}
            self.rw.needed = needed.positions_needed(
                graph.node, [o.name for o in graph.output], study.facts, shapes, constants
            )
        self.inputs: list[onnx.ValueInfoProto] = []
        self.notes: list[str] = []
        self._extents: dict[str, tuple[facts.Extent, ...]] = {}
        self._kept: list[Emitted] = []

    def run(self) -> ModelProto:
        """Rewrites the model."""
        graph = self.study.model.graph
        for name, value in self.study.constants().items():
            assert value.whole is not None
            source = self.rw.sources.add(value.whole.dims, value.dtype, name, load=value.whole.load)
            self.rw.values[name] = Value(value.dims, value.dtype, source)
        for t in graph.initializer:
            if t.name not in self.rw.values:
                dims: Dims = tuple((n,) if n != 1 else () for n in t.dims)
                self.rw.values[t.name] = Value(dims, t.data_type, self.rw.sources.add(dims, t.data_type, t.name))
        self.emit.rule = "interface"
        infos = {i.name: i for i in graph.input}
        for i in self.study.declared:
            self.rw.values[i.name] = self._input(i, infos[i.name])
        self.emit.rule = None
        self.rw.interpret(graph.node)
        return self._assemble()

    # --- inputs ----------------------------------------------------------------------------------------------------

    def _input(self, i: feeds.Input, info: onnx.ValueInfoProto) -> Value:
        """The value of an input, and what the new graph's signature has for it."""
        role, sources = i.role, self.rw.sources
        for s in symbols(i.dims):
            if role.level != "request" or not is_candidate_symbol(s):
                axis = next(k for k, d in enumerate(i.dims) if s in d)
                where = i.name
                if role.level == "mixed" and self.interface == "request":
                    where = f"{i.name}.candidate"
                held = extents((i.dims[axis],))[0]
                if role.level == "mixed" and self.interface == "request" and axis == i.mixed_axis:
                    held = len(i.candidate_positions)
                if symbols([i.dims[axis]]) == (s,):
                    self.rw.layout.extent_of.setdefault(s, (where, axis, held))
        if role.level == "candidate" or role.candidate_axis is None:
            self._declare(info, i.name, i.dims)
            return Value(i.dims, i.dtype, sources.add(i.dims, i.dtype, i.name))
        rows = [s for s in symbols(i.dims) if not is_candidate_symbol(s)]
        once = keep_symbols(i.dims, rows)
        if role.level == "request":
            if self.interface == "request":
                self._declare(info, i.name, once)
                return Value(i.dims, i.dtype, sources.add(once, i.dtype, i.name))
            self._declare(info, i.name, i.dims)
            return Value(i.dims, i.dtype, sources.add(once, i.dtype, self._first_row(i)))
        axis = i.mixed_axis
        positions = {"request": role.request, "candidate": i.candidate_positions}
        codes = np.zeros(extents(i.dims), np.int64)
        for part, at in positions.items():
            dims = list(once if part == "request" else i.dims)
            dims[axis] = canonical(len(at) if isinstance(f, int) else f for f in dims[axis])
            index = tuple(list(at) if k == axis else slice(None) for k in range(codes.ndim))
            if self.interface == "request":
                name = f"{i.name}.{part}"
                self._declare(info, name, tuple(dims))
                codes[index] = codes_of(sources.add(tuple(dims), i.dtype, name))
            elif part == "candidate":
                codes[index] = codes_of(sources.add(i.dims, i.dtype, i.name))[index]
                self._declare(info, i.name, i.dims)
            else:
                row = self._first_row(i)
                if role.record is None:
                    name = self.emit.add("Gather", [row, self.emit.constant(np.array(at, np.int64))], {"axis": axis},
                                         hint=i.name)  # fmt: skip
                    codes[index] = codes_of(sources.add(tuple(dims), i.dtype, name))
                else:
                    codes[index] = codes_of(sources.add(once, i.dtype, row))[index]
        return view(i.dims, i.dtype, codes)

    def _first_row(self, i: feeds.Input) -> str:
        """Row 0 of an input whose signature stays; zeros where there are no rows at all."""
        axis = i.role.candidate_axis
        assert axis is not None
        ends = [self.emit.constant(np.array([v], np.int64)) for v in (0, i.role.record or 1, axis)]
        row = self.emit.add("Slice", [i.name, *ends], hint=i.name)
        once = keep_symbols(i.dims, ())
        if i.dtype == TensorProto.STRING or symbols(i.dims) != (CANDIDATES,):
            return row
        shape = [max(1, extents((d,))[0]) for d in once]
        zeros = self.emit.constant(np.zeros(shape, helper.tensor_dtype_to_np_dtype(i.dtype)))
        both = self.emit.add("Concat", [row, zeros], {"axis": axis}, hint=i.name)
        return self.emit.add("Slice", [both, *ends], hint=i.name)

    def _declare(self, info: onnx.ValueInfoProto, name: str, dims: Dims) -> None:
        """Adds an input to the new signature."""
        self._extents[name] = extents_of(dims)
        made = onnx.ValueInfoProto()
        made.CopyFrom(info)
        made.name = name
        for axis, (dim, d) in enumerate(zip(dims, made.type.tensor_type.shape.dim, strict=True)):
            fixed = not symbols([dim])
            size = extents((dim,))[0]
            if fixed and (not d.HasField("dim_value") or d.dim_value != size):
                d.dim_value = size
            elif not fixed and name != info.name and symbols([dim]) == (CANDIDATES,) and size == 1:
                original = info.type.tensor_type.shape.dim[axis].dim_param
                d.dim_param = original if original.isidentifier() else "candidates"
        self.inputs.append(made)

    def translate(self, feed: runtime.Feeds) -> runtime.Feeds:
        """Inputs of the new signature from inputs of the old one."""
        return feeds.divided(self.study.declared, feed) if self.interface == "request" else feed

    def input_extents(self) -> dict[str, tuple[facts.Extent, ...]]:
        """Extents of the new graph's inputs."""
        return self._extents

    # --- outputs ---------------------------------------------------------------------------------------------------

    def _finish_outputs(self) -> None:
        """Brings the outputs to their names, with all their rows."""
        emit, rw = self.emit, self.rw
        emit.origin = len(self.study.model.graph.node)
        names = [o.name for o in self.study.model.graph.output]
        made = [rw.tensor(rw.values[name], full=True) for name in names]
        valid = self._guards() if self.guard else None
        fed = {i.name for i in self.inputs}
        if any(name in fed and tensor != name for name, tensor in zip(names, made, strict=True)):
            raise Unrepresentable("an output is an input, and cannot keep its name")
        final: dict[str, str] = {}
        for name, tensor in zip(names, made, strict=True):
            dtype = rw.values[name].dtype
            if valid is not None and dtype in runtime.FLOATS:
                nan = emit.constant(np.array(np.nan, rw.constant_type(dtype)))
                emit.rule = "interface"
                tensor = emit.add("Where", [valid, tensor, nan], hint=name)
                emit.rule = None
            final[name] = tensor
        for name, tensor in final.items():
            if tensor == name:
                continue
            own = [e for e in emit.nodes if tensor in e.proto.output]
            self._rename(name, emit.fresh(f"{name}/rows"))
            if not own or tensor in names or list(final.values()).count(tensor) > 1:
                emit.add("Identity", [final[name]], output=name)
            else:
                self._rename(tensor, name)

    def _rename(self, old: str, new: str) -> None:
        for e in self.emit.nodes:
            for field in (e.proto.input, e.proto.output):
                for k, n in enumerate(field):
                    if n == old:
                        field[k] = new
            rename_captured(e.proto, {old: new})

    def _guards(self) -> str | None:
        """Whether all rows of every request-level input are equal, as a bool scalar."""
        emit = self.emit
        emit.rule = "interface"
        parts: list[str] = []
        for i in self.study.declared:
            if i.role.level == "candidate" or i.role.candidate_axis is None:
                continue
            if i.dtype == TensorProto.STRING and emit.opset < 19:
                self.notes.append(f"rows of {i.name} are not guarded: strings cannot be compared at this opset")
                continue
            data, axis = i.name, i.role.candidate_axis
            if i.role.record is not None:
                data = emit.add("Reshape", [data, emit.constant(np.array([-1, i.role.record], np.int64))], hint=i.name)
            if i.role.level == "mixed":
                at = emit.constant(np.array(i.role.request, np.int64))
                along = 1 if i.role.record is not None else i.mixed_axis
                data = emit.add("Gather", [data, at], {"axis": along}, hint=i.name)
            ends = [np.array([v], np.int64) for v in (0, 1, axis)]
            first = emit.add("Slice", [data, *(emit.constant(e) for e in ends)], hint=i.name)
            same = emit.add("Equal", [data, first], hint=i.name)
            if i.dtype in runtime.FLOATS:
                both = [emit.add("IsNaN", [t], hint=i.name) for t in (data, first)]
                same = emit.add("Or", [same, emit.add("And", both, hint=i.name)], hint=i.name)
            differs = emit.add(
                "Cast", [emit.add("Not", [same], hint=i.name)], {"to": int(TensorProto.INT32)}, hint=i.name
            )
            rank = len(i.dims) + (i.role.record is not None)
            parts.append(emit.reduce("ReduceSum", differs, list(range(rank)), False, hint=i.name))
        if not parts:
            return None
        total = parts[0]
        for p in parts[1:]:
            total = emit.add("Add", [total, p], hint="guard")
        valid = emit.add("Equal", [total, emit.constant(np.array(0, np.int32))], hint="guard")
        emit.rule = None
        return valid

    # --- assembling ------------------------------------------------------------------------------------------------

    def _assemble(self) -> ModelProto:
        self._finish_outputs()
        base = self.study.model
        outputs = [o.name for o in base.graph.output]
        self._kept = _sorted_live(self.emit.nodes, outputs)
        made = ModelProto()
        for field, value in base.ListFields():
            if field.name != "graph":
                if field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED:
                    getattr(made, field.name).extend(value)
                elif field.message_type is not None:
                    getattr(made, field.name).CopyFrom(value)
                else:
                    setattr(made, field.name, value)
        del made.functions[:]
        stale = [k for k, p in enumerate(made.metadata_props) if p.key == CONTRACT]
        for k in stale[::-1]:
            del made.metadata_props[k]
        graph = made.graph
        graph.name, graph.doc_string = base.graph.name, base.graph.doc_string
        graph.metadata_props.extend(base.graph.metadata_props)
        graph.quantization_annotation.extend(base.graph.quantization_annotation)
        graph.output.extend(base.graph.output)
        graph.input.extend(self.inputs)
        graph.node.extend(e.proto for e in self._kept)
        read = {i for e in self._kept for i in e.proto.input} | set(outputs)
        for e in self._kept:
            read |= {c for g in subgraphs(e.proto) for c in captured(g)}
        for t in base.graph.initializer:
            was_read = t.name in read
            if was_read:
                graph.initializer.append(t)
        graph.initializer.extend(t for name, t in self.emit.initializers.items() if name in read)
        if base.ir_version < 4:
            graph.input.extend(
                helper.make_tensor_value_info(name, t.data_type, t.dims)
                for name, t in self.emit.initializers.items()
                if name in read
            )
        graph.sparse_initializer.extend(t for t in base.graph.sparse_initializer if t.values.name in read)
        have = {t.name for t in graph.initializer}
        fed = {i.name for i in self.inputs}
        graph.input.extend(i for i in base.graph.input if i.name in have and i.name not in fed)
        untouched = {o for e in self._kept if e.rule is None for o in e.proto.output}
        graph.value_info.extend(v for v in base.graph.value_info if v.name in untouched)
        return made

    @property
    def applied(self) -> set[str]:
        """Names of the rules that took a node, whatever became of it."""
        return self.rw.applied

    def sites(self) -> dict[str, list[int]]:
        """Per rule the original nodes at which it applied."""
        out: dict[str, set[int]] = {}
        for e in self._kept:
            if e.rule not in _NO_SITE:
                assert e.rule is not None
                out.setdefault(e.rule, set()).add(e.origin)
        return {rule: sorted(at) for rule, at in out.items()}

    def rule_uses(self, before: cost.Shapes, after: cost.Shapes) -> list[RuleUse]:
        """Sites per rule and what they saved: an original node's products against those that replace it."""
        nodes = self.study.model.graph.node
        old = [cost.node_macs(n, before) for n in nodes]
        new = [0] * (len(nodes) + 1)
        owner: dict[int, str] = {}
        for e in self._kept:
            new[e.origin] += cost.node_macs(e.proto, after)
            if e.rule not in _NO_SITE and e.rule is not None:
                # A site is told for the rule that does most there.
                owner[e.origin] = max(owner.get(e.origin, e.rule), e.rule, key=_standing)
        out = []
        for rule in dict.fromkeys([r.name for r in self.rw.rules]):
            at = sorted(k for k, r in owner.items() if r == rule and k < len(nodes))
            if at:
                saved = sum(old[k] - new[k] for k in at)
                out.append(RuleUse(rule, len(at), saved, tuple(_label(nodes[k]) for k in at)))
        return out


def _standing(rule: str) -> int:
    """Rules by how much they do beyond others; those of third parties come first."""
    order = ("broadcast", "select", "pool", "fc", "norm", "gru", "dot", "fold", "cross")
    return order.index(rule) if rule in order else len(order)


def _label(node: NodeProto) -> str:
    return node.name or (node.output[0] if node.output else node.op_type)


def _sorted_live(nodes: Sequence[Emitted], outputs: Sequence[str]) -> list[Emitted]:
    """The nodes that outputs depend on, in topological order, close to that of the original."""
    producer = {o: k for k, e in enumerate(nodes) for o in e.proto.output if o}

    def operands(k: int) -> set[int]:
        proto = nodes[k].proto
        read = {*proto.input, *(c for g in subgraphs(proto) for c in captured(g))}
        return {producer[i] for i in read if i in producer}

    live: set[int] = set()
    stack = [producer[o] for o in outputs if o in producer]
    needs: dict[int, set[int]] = {}
    while stack:
        k = stack.pop()
        if k in live:
            continue
        live.add(k)
        needs[k] = operands(k)
        stack.extend(needs[k])
    users: dict[int, list[int]] = {}
    waiting = {k: len(needs[k]) for k in live}
    for k in live:
        for p in needs[k]:
            users.setdefault(p, []).append(k)
    ready = [(nodes[k].origin, k) for k in live if not waiting[k]]
    heapq.heapify(ready)
    out = []
    while ready:
        _, k = heapq.heappop(ready)
        out.append(nodes[k])
        for u in users.get(k, []):
            waiting[u] -= 1
            if not waiting[u]:
                heapq.heappush(ready, (nodes[u].origin, u))
    return out
