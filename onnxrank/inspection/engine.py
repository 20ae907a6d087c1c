"""`inspect`: what the analysis says of a model, and what the engine of `optimize` would save, which writes nothing."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from onnxrank import cost, feeds, matrices, pipeline
from onnxrank import model as files
from onnxrank.analysis import Analysis
from onnxrank.contract import RULE, find_roles, stored_contract
from onnxrank.errors import OnnxrankError, UsageError
from onnxrank.facts import Extent
from onnxrank.forms import Form
from onnxrank.inspection import lookups
from onnxrank.inspection.levels import summed_up
from onnxrank.inspection.report import (
    Ideal,
    InputTensor,
    Inspection,
    Layer,
    Node,
    Opportunity,
    Refused,
    Tensor,
)
from onnxrank.passes.choosing import LEAST_GAIN
from onnxrank.plans import label
from onnxrank.roles import InputRole, format_ranges
from onnxrank.rule import Refusal, Rule
from onnxrank.ruleset import choose_rules
from onnxrank.scopes import scope_of
from onnxrank.study import Study, extents_of
from onnxrank.transform import Saving
from onnxrank.values import CANDIDATES

_PATIENCE = 10.0  # seconds for trying inputs as request-level
_WORTH_A_WORD = 0.005  # of all multiply-adds; less is not worth a word


def inspect(
    model: str | os.PathLike[str] | ModelProto,
    *,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
    interface: str = "request",
    candidates: int | tuple[int, int] = 512,
    select: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    extra_rules: Sequence[str | os.PathLike[str]] = (),
    lifts: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """Tells what is in a model and what `optimize` would save, with the same options.

    Args:
        model: A path, or a model in memory.
        request: Patterns on names of inputs that are request-level, as for `optimize`.
        spec: A roles file's content.
        infer_from: Recorded requests to infer the roles from.
        interface: `request` or `same`.
        candidates: Expected number of candidates per request, or its range.
        select: Names of the rules to use; None for all.
        ignore: Names of rules to leave out.
        extra_rules: Python files with further rules.
        lifts: Whether to try out what declaring further inputs request-level would save.
        progress: Called with the name of each stage.

    Raises:
        UsageError: Roles or options are wrong.
        ModelError: The model is invalid or not supported.
        EnvironmentProblem: onnxruntime is missing, or memory ran out.
    """
    say = progress or (lambda stage: None)
    loaded = matrices.unpacked(files.load(model))
    working = files.flattened(loaded.proto)
    contract = stored_contract(loaded.proto)
    roles, notes = find_roles(
        feeds.describe(working), contract, request=request, spec=spec, infer_from=infer_from, lenient=True
    )
    result = pipeline.optimize(
        loaded,
        roles=roles,
        interface=interface,
        candidates=candidates,
        select=select,
        ignore=ignore,
        extra_rules=extra_rules,
        check=False,
        progress=progress,
    )
    assert result.study is not None
    found = _Findings(result, result.study)
    tried: dict[str, _Tried] = {}
    if lifts and result.form is not None:
        say("trying inputs as request-level")
        rules = choose_rules(select, ignore, extra_rules)
        tried, note = _try_all(result, result.study, rules)
        notes += [note] if note else []
    report = result.report
    at = _pays_from(result, found.shapes)
    if at is not None:
        notes.append(f"by the cost model it would pay from about {at} candidates on: see --candidates")
    return Inspection(
        version=report.version,
        source=report.source,
        source_sha256=report.source_sha256,
        optimised=contract is not None,
        interface=interface,
        candidates=report.candidates,
        roles=report.roles,
        inputs=found.inputs(tried),
        before=report.before,
        after=report.after,
        ideal=found.ideal(),
        layers=found.layers(),
        opportunities=found.opportunities(),
        refusals=found.refusals(tried),
        tables=tuple(lookups.tables(result.study, found.links, found.shapes, found.tensor_levels)),
        sequences=tuple(lookups.sequences(result.study, found.links)),
        predictions=tuple(report.predictions),
        tensors=found.tensors,
        nodes=found.nodes,
        result=found.result_nodes(),
        notes=(*notes, *report.notes),
    )


def dims_text(extents: Sequence[Extent]) -> tuple[str, ...]:
    """Extents as people write them: `N`, `50*N`, `64`; `?` for what depends on data."""
    out = []
    for constant, symbols in extents:
        factors = ["?" if "~" in s else s.removeprefix("S:") for s in symbols]
        out.append("*".join(([str(constant)] if constant != 1 or not factors else []) + factors))
    return tuple(out)


class _Findings:
    """Puts together the analysis and one run of the engine.

    Attributes:
        known: What is known of the tensors; None where nothing can be relied on.
        shapes: Shapes at the expected number of candidates.
        links: Who makes and reads what.
        tensors: All tensors of the original.
        tensor_levels: Level per tensor.
        nodes: All nodes of the original.
    """

    def __init__(self, result: pipeline.Result, study: Study) -> None:
        self.result, self.study = result, study
        self.graph = study.model.graph
        # Where a run contradicted a derived shape nothing is known.
        self.known: Analysis | None = Analysis(study) if study.contradiction is None else None
        n = result.report.usual
        self.shapes = study.shapes(n)
        few = [study.shapes(k) for k in (1, 2)]
        self._macs = [[cost.node_macs(node, s) for s in few] for node in self.graph.node]
        self.links = lookups.Links.of(self.graph.node)
        self.tensors = tuple(self._tensors())
        self.tensor_levels = {t.name: t.level for t in self.tensors}
        self._shares = [self._once(node) for node in self.graph.node]
        self._savings = self._all_savings()
        self.nodes = tuple(self._nodes())

    def _all_savings(self) -> list[Saving]:
        form = self.result.form
        if form is None or not self.result.changed:
            return []
        n = self.result.report.usual
        return form.rewrite.savings(self.shapes, form.shapes(n))

    def _tensors(self) -> list[Tensor]:
        initializers = {t.name for t in self.graph.initializer}
        names = [i.name for i in self.study.declared] + [o for n in self.graph.node for o in n.output if o]
        return [self._tensor(name) for name in names if name not in initializers]

    def _tensor(self, name: str) -> Tensor:
        extents = self.shapes.facts.extents.get(name) or self.shapes.inputs.get(name) or ()
        if self.known is None or name not in self.known.tensors:
            level = "candidate" if self.shapes.per_candidate(name) else "request"
            return Tensor(name, dims_text(extents), level, float(level == "request"))
        level, once, blocks = summed_up(self.known.levels(name))
        return Tensor(name, dims_text(extents), level, round(once, 6), blocks)

    def _once(self, node: Any) -> float:
        return self.known.once_share(node) if self.known is not None else 0.0

    def _once_macs(self, k: int) -> tuple[float, float]:
        """Multiply-adds of a node in the block ideal: per request, and per candidate."""
        one, two = self._macs[k]
        each = two - one
        return one - each + self._shares[k] * each, (1 - self._shares[k]) * each

    def _nodes(self) -> list[Node]:
        saved = {s.node: s for s in self._savings}
        seen: set[str] = set()
        out = []
        for k, node in enumerate(self.graph.node):
            macs = cost.node_macs(node, self.shapes)
            levels = {self.tensor_levels.get(o, "candidate") for o in node.output if o}
            level = next((v for v in ("candidate", "mixed", "request", "constant") if v in levels), "constant")
            parameters = 0
            for i in node.input:
                if i in self.shapes.initializers and i not in seen:
                    seen.add(i)
                    parameters += prod(self.shapes.initializers[i])
            each = self._macs[k][1] - self._macs[k][0]
            share = self._shares[k] if each else 1.0
            site = saved.get(k)
            out.append(
                Node(
                    label(node),
                    node.op_type,
                    "/".join(scope_of(node)),
                    tuple(i for i in node.input if i),
                    tuple(o for o in node.output if o),
                    level,
                    any(self.shapes.per_candidate(o) for o in node.output if o),
                    macs,
                    round(share * macs),
                    cost.node_bytes(node, self.shapes),
                    parameters,
                    site.macs if site else 0,
                    site.rule if site else "",
                )
            )
        return out

    def inputs(self, tried: Mapping[str, _Tried]) -> tuple[InputTensor, ...]:
        return tuple(
            InputTensor(
                i.name,
                TensorProto.DataType.Name(i.dtype).lower(),
                dims_text(extents_of(i.dims)),
                i.role.level,
                format_ranges(i.role.request) if i.role.request else "",
                tried[i.name].gain if i.name in tried else None,
            )
            for i in self.study.declared
        )

    def ideal(self) -> Ideal:
        costs = [self._once_macs(k) for k in range(len(self.graph.node))]
        once, each = (sum(c[part] for c in costs) for part in (0, 1))
        n = self.result.report.usual
        return Ideal(round(once), round(each), round(once + n * each))

    def layers(self) -> tuple[Layer, ...]:
        """Costs summed up by layer, in the order of their first nodes."""
        sums: dict[tuple[str, ...], list[int]] = {(): [0] * 6}
        for n in self.nodes:
            path = tuple(p for p in n.scope.split("/") if p)
            for depth in range(len(path) + 1):
                total = sums.setdefault(path[:depth], [0] * 6)
                for k, v in enumerate((1, n.macs, n.once, n.bytes, n.parameters, n.saved)):
                    total[k] += v
        ordered = sorted(sums, key=_in_order(list(sums)))
        return tuple(Layer("/".join(path), *sums[path]) for path in ordered)

    def opportunities(self) -> tuple[Opportunity, ...]:
        total = self.result.report.macs_before
        found = [s for s in self._savings if s.macs > 0 or s.seconds > 0]
        found.sort(key=lambda s: (-s.seconds, -s.macs, s.node))
        return tuple(
            Opportunity(
                s.rule,
                self.nodes[s.node].name,
                self.nodes[s.node].op,
                self.nodes[s.node].scope,
                s.macs,
                s.macs / total if total else 0.0,
                s.seconds,
            )
            for s in found
        )

    def refusals(self, tried: Mapping[str, _Tried]) -> tuple[Refused, ...]:
        """Refusals grouped by rule and reason, dearest first, and what would lift them."""
        groups: dict[tuple[str, str], list[Refusal]] = {}
        for r in self.result.report.refusals:
            groups.setdefault((r.rule, r.reason), []).append(r)
        macs = {n.name: n.macs for n in self.nodes}
        out = []
        for (rule, reason), several in groups.items():
            nodes = tuple(dict.fromkeys(r.node for r in several if r.node))
            lifting = [
                (t.gain, name)
                for name, t in tried.items()
                if t.gain >= _WORTH_A_WORD and any((rule, node) not in t.refused for node in nodes)
            ]
            lift = ""
            if lifting:
                gain, best = max(lifting, key=lambda g: g[0])
                lift = f"declare {best} request-level, if it is: {_signed(gain)} of multiply-adds"
            lost = sum(r.lost for r in several)
            out.append(Refused(rule, reason, nodes, sum(macs.get(n, 0) for n in nodes), lost, lift))
        return tuple(sorted(out, key=lambda r: (-r.lost, -r.macs, -len(r.nodes))))

    def result_nodes(self) -> tuple[Node, ...]:
        """The nodes of what `optimize` makes, in the layers of those they come from."""
        form = self.result.form
        if form is None or not self.result.changed:
            return ()
        shapes = form.shapes(self.result.report.usual)
        out = []
        graph = self.result.model.graph
        for (node, level), e in zip(cost.by_rows(graph, shapes), form.rewrite.emitted(), strict=True):
            rows, macs = level == "candidate", cost.node_macs(node, shapes)
            rule = next((p.value for p in node.metadata_props if p.key == RULE), e.rule or "")
            out.append(
                Node(
                    label(node),
                    node.op_type,
                    self.nodes[e.origin].scope if e.origin < len(self.nodes) else "",
                    tuple(i for i in node.input if i),
                    tuple(o for o in node.output if o),
                    level,
                    rows,
                    macs,
                    0 if rows else macs,
                    cost.node_bytes(node, shapes),
                    0,
                    0,
                    rule,
                )
            )
        return tuple(out)


def _in_order(paths: list[tuple[str, ...]]) -> Callable[[tuple[str, ...]], list[int]]:
    """A key that sorts layers as a tree, inner ones behind their outer one, in order of first appearance."""
    first = {path: k for k, path in enumerate(paths)}
    return lambda path: [first[path[:depth]] for depth in range(1, len(path) + 1)]


def _signed(share: float) -> str:
    return f"+{100 * share:.0f} %" if share >= 0.095 else f"+{100 * share:.1f} %"


@dataclass(frozen=True)
class _Tried:
    """What came of an input declared request-level.

    Attributes:
        gain: Share of all multiply-adds that is saved beyond what is saved now.
        refused: Rules and nodes that are still refused.
    """

    gain: float
    refused: frozenset[tuple[str, str]]


def _try_all(result: pipeline.Result, study: Study, rules: Sequence[Rule]) -> tuple[dict[str, _Tried], str | None]:
    """Tries out what declaring each further input request-level would save.

    Returns:
        What came of it per input, and a note of what was not tried.
    """
    report = result.report
    if not report.macs_before:
        return {}, None
    left: list[str] = []
    out: dict[str, _Tried] = {}
    end = time.monotonic() + _PATIENCE
    open_ones = [i for i in study.declared if i.role.level != "request"]
    for i in open_ones:
        # At least one input has to be left to tell candidates apart by.
        if len(open_ones) == 1:
            break
        if time.monotonic() > end:
            left.append(i.name)
            continue
        form = _form_if(study, i, rules, report.interface, report.candidates)
        if form is not None and form.model is not None:
            shapes = form.shapes(report.usual)
            macs = sum(cost.node_macs(n, shapes) for n in form.model.graph.node)
            still = frozenset((r.rule, r.node) for r in form.rewrite.rw.refusals)
            out[i.name] = _Tried((report.macs_after - macs) / report.macs_before, still)
    note = f"{len(left)} inputs were not tried as request-level, to save time: {', '.join(left[:5])}" if left else None
    return out, note


def _pays_from(result: pipeline.Result, before: cost.Shapes) -> int | None:
    """From how many candidates on a rewrite that was not taken would be faster; costs are lines in their number."""
    form, study = result.form, result.study
    if result.changed or form is None or form.model is None or form.facts is None or study is None:
        return None
    old, new = (
        [cost.seconds(graph, replace(shapes, symbols={**shapes.symbols, CANDIDATES: n})) for n in (1, 2)]
        for graph, shapes in ((study.model.graph, before), (form.model.graph, form.shapes(1)))
    )
    slope = (old[1] - old[0]) - LEAST_GAIN * (new[1] - new[0])
    if slope <= 0:
        return None
    at = 1 + math.ceil((LEAST_GAIN * new[0] - old[0]) / slope)
    return at if at > result.report.usual else None


def _form_if(
    study: Study, wanted: feeds.Input, rules: Sequence[Rule], interface: str, span: tuple[int, int]
) -> Form | None:
    """The rewrite if an input were request-level; None where there is none."""
    role = InputRole(wanted.name, "request", wanted.role.candidate_axis, record=wanted.role.record,
                     ranges=wanted.role.ranges)  # fmt: skip
    other = copy.copy(study)
    other.declared = [replace(i, role=role) if i is wanted else i for i in study.declared]
    if not any(CANDIDATES in d for i in other.declared if i.role.level != "request" for d in i.dims):
        return None
    try:
        form = Form(other, rules, interface, False, span)
    except OnnxrankError:
        return None
    return form if form.model is not None and form.facts is not None else None


# --- one tensor ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A step from a tensor towards the inputs that make its level what it is.

    Attributes:
        tensor: The tensor.
        level: Its level.
        dims: Its extents.
        op: Operator that makes it; empty for an input.
        node: The node that makes it.
    """

    tensor: str
    level: str
    dims: tuple[str, ...]
    op: str
    node: str


@dataclass(frozen=True)
class Explanation:
    """Why a tensor has its level.

    Attributes:
        tensor: The tensor.
        node: The node that makes it; None for an input.
        chain: From an input that decides the level to the tensor itself.
        inputs: All inputs it depends on, with their roles.
        reason: In words.
    """

    tensor: Tensor
    node: Node | None
    chain: tuple[Step, ...]
    inputs: tuple[InputTensor, ...]
    reason: str


def explain(found: Inspection, name: str) -> Explanation:
    """Explains the level of a tensor by the inputs and operators behind it.

    Args:
        found: The inspection.
        name: A tensor, or a node, whose first output is meant.

    Raises:
        UsageError: There is no such tensor or node.
    """
    tensors = {t.name: t for t in found.tensors}
    by_name = {n.name: n for n in found.nodes}
    if name not in tensors and name in by_name:
        name = by_name[name].outputs[0]
    if name not in tensors:
        raise UsageError(_no_such(name, [*tensors, *by_name]))
    made_by = {o: n for n in found.nodes for o in n.outputs}
    inputs = {i.name: i for i in found.inputs}
    order = [name]
    seen = {name}
    for current in order:
        node = made_by.get(current)
        fresh = [i for i in (node.inputs if node is not None else ()) if i in tensors and i not in seen]
        seen.update(fresh)
        order += fresh
    behind = [i for i in found.inputs if i.name in seen]
    top = tensors[name]
    # What is candidate-level comes from something candidate-level: only such steps are walked back along.
    deciding = ("candidate", "mixed") if top.level in ("candidate", "mixed") else (top.level,)
    chain = []
    for t in _first_cause(name, deciding, tensors, made_by, inputs):
        op, node_name = (made_by[t].op, made_by[t].name) if t in made_by else ("", "")
        chain.append(Step(t, tensors[t].level, tensors[t].dims, op, node_name))
    return Explanation(top, made_by.get(name), tuple(chain), tuple(behind), _reason(top, chain, behind, inputs))


def _first_cause(
    name: str,
    levels: Sequence[str],
    tensors: Mapping[str, Tensor],
    made_by: Mapping[str, Node],
    inputs: Mapping[str, InputTensor],
) -> list[str]:
    """The shortest path of tensors of these levels from where the level starts to a tensor; breadth first."""
    reached, order = {name: ""}, [name]
    end = name
    for current in order:
        node = made_by.get(current)
        wider = [i for i in (node.inputs if node else ()) if i in tensors and tensors[i].level in levels]
        if current in inputs or not wider:
            end = current
            break
        for i in wider:
            if i not in reached:
                reached[i] = current
                order.append(i)
    path = [end]
    while reached[path[-1]]:
        path.append(reached[path[-1]])
    return path


def _reason(
    top: Tensor, chain: Sequence[Step], behind: Sequence[InputTensor], inputs: Mapping[str, InputTensor]
) -> str:
    moving = [i.name for i in behind if i.role != "request"]
    if top.level == "constant":
        return "It depends on no input."
    if top.level == "request":
        if moving:
            return "All its entries come from request-level parts of what is before it."
        return "All inputs behind it are request-level."
    start = chain[0]
    if start.tensor not in inputs:
        return (
            f"{start.op} {start.node} makes it so, although nothing that it reads is candidate-level: the operator is "
            "not known to treat rows independently."
        )
    if top.level == "mixed":
        return (
            f"It holds entries that come from {start.tensor}, which is {inputs[start.tensor].role}-level, and others."
        )
    return f"It depends on {start.tensor}, which is {inputs[start.tensor].role}-level."


def _no_such(name: str, known: Sequence[str]) -> str:
    import difflib

    near = [k for k in known if name and name in k][:3] or difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    return f"The model has no node or tensor {name!r}.{hint}"
