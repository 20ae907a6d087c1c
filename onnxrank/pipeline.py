"""`optimize`: from a user's model to a rewritten, checked one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, inliner

from onnxrank import cost, facts, feeds
from onnxrank import model as files
from onnxrank.contract import CONTRACT, is_done, roles_again, stored_contract
from onnxrank.errors import CheckFailed, ModelError, UsageError
from onnxrank.fused import Unsupported
from onnxrank.report import Prediction, Report
from onnxrank.rewrite import Rule
from onnxrank.roles import Roles, infer, resolve
from onnxrank.study import Study
from onnxrank.transform import Transformation
from onnxrank.values import CANDIDATES, Unrepresentable
from onnxrank.verify import failure, gate, isolate

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
        study: What is known of the original; None where its contract said all there was to do.
        form: How it was rewritten, or would have been; None where that was not tried.
        full: The form with all rules, whatever it costs: it knows most about levels.
    """

    model: ModelProto
    report: Report
    loaded: files.LoadedModel
    study: Study | None = None
    form: Form | None = None
    full: Form | None = None

    def __post_init__(self) -> None:
        for owner in (self.study, self.form, self.full):
            if owner is not None and owner.probe is not None:
                owner.probe.release()

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
    if check:
        isolate.warm()
    say("reading")
    loaded = files.load(model)
    original = loaded.proto
    if runtime_domain_only(original):
        raise ModelError("the model holds no operators of the default ONNX domain")
    working = inliner.inline_local_functions(original) if original.functions else original
    notes: list[str] = []
    described = feeds.describe(working)
    stored = stored_contract(original)
    if stored is not None and roles is None and is_done(stored, interface, span):
        return _left_alone(loaded, stored, interface, span)
    if roles is None:
        if infer_from is not None:
            roles, lines = infer(described, infer_from)
            notes += lines
        else:
            if stored is not None:
                roles = roles_again(described, stored)
                notes.append("the model was optimised before; its roles are those of its contract")
            else:
                roles = resolve(described, request=request, spec=spec)
    rules = choose_rules(select, ignore, extra_rules)
    report = _report(loaded, interface, span, roles.to_dict(), notes)
    say("measuring shapes")
    study = Study(working, roles, loaded)
    if study.facts.note:
        notes.append(study.facts.note)
    before = cost.shapes_of(study.model, study.facts, study.input_extents(), report_candidates(span))
    report.before = report.after = cost.by_level(study.model.graph, before)
    stray = study.unproven_shapes()
    if stray is not None:
        report.refusals = [stray]
        return Result(original, report, loaded, study)
    say("rewriting")
    forms = _forms(study, rules, interface, guard, span)
    fused = forms[0].rewrite.rw.fused
    if fused:
        try:
            forms = _forms(study.written_out(fused), rules, interface, guard, span) + forms
        except (Unsupported, ModelError) as e:
            notes.append(f"fused attention is left as it is, though its operands hold several levels: {e}")

    whole, shapes = study.model.graph, before

    def original_seconds(n: int) -> float:
        return cost.seconds(whole, replace(shapes, symbols={**shapes.symbols, CANDIDATES: n}))

    # Of forms that are all out the last is the plainest.
    chosen = min(reversed(forms), key=lambda f: f.seconds(span, original_seconds))
    made, rewrite = chosen.model, chosen.rewrite
    full = next(f for f in forms if f.study is chosen.study)
    if chosen.study is not study:
        study = chosen.study
        before = cost.shapes_of(study.model, study.facts, study.input_extents(), report_candidates(span))
    report.refusals = list(rewrite.rw.refusals)
    for name in sorted(full.rewrite.rw.applied - rewrite.rw.applied):
        # What it would refuse is worth knowing, too.
        report.refusals += [r for r in full.rewrite.rw.refusals if r.rule == name]
        notes.append(f"{name} would not pay at N = {report_candidates(span)}, so it was left out")
    notes += rewrite.notes
    if made is None or not rewrite.sites():
        return Result(original, report, loaded, study, chosen, full)
    contract = {
        "version": report.version,
        "source_sha256": loaded.sha256,
        "interface": interface,
        "candidates": list(span),
        "roles": roles.to_dict(),
        "rules": {},
    }
    after = chosen.shapes(report_candidates(span))
    if cost.seconds(study.model.graph, before) < _LEAST_GAIN * cost.seconds(made.graph, after):
        notes.append(f"the rewritten model would not be faster at N = {report_candidates(span)}, so it was not taken")
        return Result(original, report, loaded, study, chosen, full)
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
        verify(study, made, roles, report)
    return Result(made, report, loaded, study, chosen, full)


def _forms(study: Study, rules: Sequence[Rule], interface: str, guard: bool, span: tuple[int, int]) -> list[Form]:
    """The ways to rewrite a model, with all rules first."""
    forms = [Form(study, rules, interface, guard, span)]
    for rule in rules:
        # Which form is best changes with the number of candidates: the cheapest is taken.
        if rule.forms is not None and forms[0].uses(rule.name):
            others = [replace(rule, operators=o) for o in rule.forms] + [None]
            forms += [Form(study, _replaced(rules, rule, o), interface, guard, span) for o in others]
    return forms


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
        study: What is known of the original.
        rewrite: The transformation.
        model: Its result; None where the model as a whole cannot be rewritten.
    """

    def __init__(self, study: Study, rules: Sequence[Rule], interface: str, guard: bool, span: tuple[int, int]) -> None:
        self.study = study
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

    def uses(self, rule: str) -> bool:
        """Whether a rule applied."""
        return rule in self.rewrite.rw.applied

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


def _replaced(rules: Sequence[Rule], rule: Rule, other: Rule | None) -> list[Rule]:
    """Rules with another in the place of one, or none."""
    return [r for r in (other if r is rule else r for r in rules) if r is not None]


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


def verify(study: Study, made: ModelProto, roles: Roles, report: Report) -> None:
    """Checks the rewritten model and fills the report's checks.

    Raises:
        CheckFailed: It is not a valid model, onnxruntime does not load it, or a score differs.
    """
    if study.facts.note:
        raise ModelError(f"the result cannot be checked: {study.facts.note}; --no-check writes it unchecked")
    assert study.maker.ranges is not None
    found = gate.gate(study.loaded, made, roles, study.maker.ranges, study.symbols)
    report.checks = gate.comparisons(found)
    report.notes += [f.message for f in found.findings if f.severity != "error"]
    if not found.passed:
        report.changed = False
        raise CheckFailed(f"the rewritten model did not pass its check: {failure(found)}", report)


def _left_alone(
    loaded: files.LoadedModel, contract: Mapping[str, Any], interface: str, span: tuple[int, int]
) -> Result:
    """The result for a model that was optimised before: nothing to do."""
    note = "the model's contract says that it was optimised before, for the same use"
    report = _report(loaded, interface, span, dict(contract.get("roles", {})), [note])
    return Result(loaded.proto, report, loaded)


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
