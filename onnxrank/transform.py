"""One rewrite of a studied model: its signature, its outputs, and the new graph put together."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxrank import (
    activations,
    cost,
    factors,
    facts,
    feeds,
    keys,
    reshapes,
    residuals,
    runtime,
    scalars,
    siblings,
    underflow,
)
from onnxrank import model as files
from onnxrank.contract import RULE, forget
from onnxrank.emitter import Emitted, Emitter
from onnxrank.errors import ModelError
from onnxrank.graphs import captured_by, names_in, reads, rename, versions
from onnxrank.interpreter import Interpreter
from onnxrank.plans import LEAVE, Choice, Place, Site, label
from onnxrank.report import RuleUse
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule, SiteFailed
from onnxrank.study import Study, extents_of
from onnxrank.values import (
    CANDIDATES,
    Dims,
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

_NO_SITE = {None, "movement", "interface"}


@dataclass(frozen=True)
class Saving:
    """What a rule saved at one place, per request at the expected number of candidates.

    Attributes:
        node: Index of the original node.
        rule: The rule.
        macs: Multiply-adds.
        seconds: Predicted time on one core.
    """

    node: int
    rule: str
    macs: int
    seconds: float


class Transformation:
    """One rewrite of a studied model."""

    def __init__(
        self,
        study: Study,
        rules: Sequence[Rule],
        interface: str,
        guard: bool,
        candidates: float,
        choice: Choice | None = None,
    ) -> None:
        self.study = study
        self.interface = interface
        self.guard = guard and interface == "same"
        graph = study.model.graph
        self._overridable = files.overridable(study.model)
        self._own_names = names_in(graph)
        opset = versions(study.model)[""]
        self.emit = Emitter(self._own_names, opset)
        outputs = frozenset(o.name for o in graph.output)
        self.rw = Rewrite(
            study.facts,
            rules,
            self.emit,
            study.dtypes,
            candidates=max(1, round(candidates)),
            outputs=outputs,
            choice=choice or Choice(),
        )
        if self.rw.uses("select"):
            self.rw.needed = study.flow.needs
        self.inputs: list[onnx.ValueInfoProto] = []
        self.notes: list[str] = []
        self._extents: dict[str, tuple[facts.Extent, ...]] = {}
        self._kept: list[Emitted] = []

    def run(self) -> ModelProto:
        """Rewrites the model."""
        graph = self.study.model.graph
        self.rw.declare_initializers(self.study.model, self.study.loaded.folder)
        infos = {i.name: i for i in graph.input}
        with self.emit.under("interface"):
            for i in self.study.declared:
                self.rw.values[i.name] = self._input(i, infos[i.name])
        Interpreter(self.rw).run(graph.node)
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
                    self.rw.layout.sizes.extent_of.setdefault(s, (where, axis, held))
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
                if name in self._own_names:
                    raise ModelError(
                        f"the input {i.name} is divided into {i.name}.request and {i.name}.candidate, but the model "
                        f"has a {name!r} already: rename that, or use --interface same"
                    )
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
        lengths = [s for s in symbols(i.dims) if not is_candidate_symbol(s)]
        once = keep_symbols(i.dims, lengths)
        if i.dtype == TensorProto.STRING or set(symbols(i.dims)) != {CANDIDATES, *lengths}:
            return row
        shape = [1 if lengths else max(1, extents((d,))[0]) for d in once]
        zeros = self.emit.constant(np.zeros(shape, helper.tensor_dtype_to_np_dtype(i.dtype)))
        if lengths:
            zeros = self.emit.add("Expand", [zeros, self.rw.layout.sizes.vector(once)], hint=i.name)
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
        fed = {i.name for i in self.inputs}
        # Callers have what they give already: as it is, with all its rows.
        given = fed if self.interface == "same" else set()
        given |= {t.name for t in self.study.model.graph.initializer}
        made = [name if name in given else rw.full(name) for name in names]
        with emit.under("interface"):
            valid = self._guards() if self.guard else None
        if any(name in fed and tensor != name for name, tensor in zip(names, made, strict=True)):
            raise Unrepresentable("an output is an input, and cannot keep its name")
        final: dict[str, str] = {}
        for name, tensor in zip(names, made, strict=True):
            dtype = rw.values[name].dtype
            if valid is not None and dtype in runtime.FLOATS and name not in given:
                nan = emit.constant(np.array(np.nan, rw.constant_type(dtype)))
                with emit.under("interface"):
                    tensor = emit.add("Where", [valid, tensor, nan], hint=name)
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
            rename(e.proto, {old: new})
        self.rw.sources.rename(old, new)

    def _guards(self) -> str | None:
        """Whether all rows of every request-level input are equal, as a bool scalar."""
        emit = self.emit
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
        return emit.add("Equal", [total, emit.constant(np.array(0, np.int32))], hint="guard")

    # --- assembling ------------------------------------------------------------------------------------------------

    def _assemble(self) -> ModelProto:
        self._finish_outputs()
        keys.extend(self.rw)
        if self.rw.uses(underflow.NAME):
            underflow.avoid(self.rw)
        if self.rw.uses(factors.RULE):
            factors.move(self.rw)
        if self.rw.uses(activations.NAME):
            activations.shorten(self.rw)
        siblings.join(self.rw)
        reshapes.cancel(self.rw)
        scalars.widen(self.rw)
        residuals.apart(self.rw)
        base = self.study.model
        outputs = [o.name for o in base.graph.output]
        self._kept = _sorted_live(self.emit.nodes, outputs)
        self._refuse_undefined()
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
        forget(made)
        graph = made.graph
        graph.name, graph.doc_string = base.graph.name, base.graph.doc_string
        graph.metadata_props.extend(base.graph.metadata_props)
        graph.quantization_annotation.extend(base.graph.quantization_annotation)
        graph.output.extend(base.graph.output)
        graph.input.extend(self.inputs)
        graph.node.extend(e.proto for e in self._kept)
        for node, e in zip(graph.node, self._kept, strict=True):
            if e.rule is not None and not _is_own(node, base.graph.node, e.origin):
                _mark(node, e.rule)
        # What callers may give stays in the signature, like inputs that nobody reads.
        read = {i for e in self._kept for i in e.proto.input} | set(outputs) | self._overridable
        for e in self._kept:
            read |= captured_by(e.proto)
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
        described = {v.name for v in graph.value_info}
        made_here = {o for e in self._kept for o in e.proto.output} - described - {o.name for o in graph.output}
        graph.value_info.extend(v for name, v in self.emit.described.items() if name in made_here)
        return made

    def _refuse_undefined(self) -> None:
        """Refuses a graph in which a node reads what is not there, as one of a faulty rule may.

        Raises:
            SiteFailed: It is such a graph.
        """
        base = self.study.model.graph
        there = {i.name for i in (*self.inputs, *base.input)} | {t.name for t in base.initializer}
        there |= self.emit.initializers.keys() | {t.values.name for t in base.sparse_initializer}
        for e in self._kept:
            lost = next((i for i in e.proto.input if i and i not in there), None)
            if lost is not None:
                raise SiteFailed(e.origin, f"{e.proto.op_type} reads {lost!r}, which nothing makes")
            there.update(e.proto.output)

    def decisions(self) -> list[Site]:
        """Which rule took which node, what rules decided by cost, and what was left alone; in the order of the graph.

        Alternatives are only told of decisions by cost.
        """
        nodes = self.study.model.graph.node
        found = [(Place(rule, k), form) for k, (rule, form) in self.rw.taken.items()]
        found += [(p, LEAVE) for p in self.rw.choice.left if p.index < len(nodes)]
        sites = {p: Site(p, label(nodes[p.index]), nodes[p.index].op_type, (), form) for p, form in found}
        sites |= self.rw.decisions.declined | self.rw.decisions.decided
        return sorted(sites.values(), key=lambda s: (s.place.index, s.place.rule, s.place.step))

    def sites(self) -> dict[str, list[int]]:
        """Per rule the original nodes at which it applied."""
        out: dict[str, set[int]] = {}
        for e in self._kept:
            if e.rule not in _NO_SITE:
                assert e.rule is not None
                out.setdefault(e.rule, set()).add(e.origin)
        return {rule: sorted(at) for rule, at in out.items()}

    def savings(self, before: cost.Shapes, after: cost.Shapes) -> list[Saving]:
        """What was saved at every site: an original node's costs against those of the nodes that replace it."""
        nodes = self.study.model.graph.node
        new = [[0, 0.0] for _ in range(len(nodes) + 1)]
        owner: dict[int, str] = {}
        for e in self._kept:
            new[e.origin][0] += cost.node_macs(e.proto, after)
            new[e.origin][1] += cost.node_seconds(e.proto, after)
            if e.rule not in _NO_SITE and e.rule is not None:
                # A site is told for the rule that does most there.
                owner[e.origin] = max(owner.get(e.origin, e.rule), e.rule, key=_standing)
        return [
            Saving(
                k,
                owner[k],
                int(cost.node_macs(nodes[k], before) - new[k][0]),
                cost.node_seconds(nodes[k], before) - new[k][1],
            )
            for k in sorted(owner)
            if k < len(nodes)
        ]

    def rule_uses(self, before: cost.Shapes, after: cost.Shapes) -> list[RuleUse]:
        """Sites per rule and what they saved."""
        nodes, found = self.study.model.graph.node, self.savings(before, after)
        break_even = self.rw.decisions.break_even
        out = []
        for rule in dict.fromkeys([r.name for r in self.rw.rules]):
            own = [s for s in found if s.rule == rule]
            if own:
                at, pays = tuple(label(nodes[s.node]) for s in own), tuple(break_even.get(s.node) for s in own)
                out.append(RuleUse(rule, len(own), sum(s.macs for s in own), at, pays))
        return out

    def emitted(self) -> list[Emitted]:
        """The nodes of the result, in its order, with where they come from."""
        return list(self._kept)


def _is_own(node: NodeProto, original: Sequence[NodeProto], origin: int) -> bool:
    """Whether a node is the user's own message, which stays as it was even where it runs for one row now."""
    return origin < len(original) and node == original[origin]


def _mark(node: NodeProto, rule: str) -> None:
    """Notes in a node's metadata which rule it comes from, so that profiles can tell."""
    stale = [k for k, p in enumerate(node.metadata_props) if p.key == RULE]
    for k in stale[::-1]:
        del node.metadata_props[k]
    node.metadata_props.add(key=RULE, value=rule)


def _standing(rule: str) -> int:
    """Rules by how much they do beyond others; those of third parties come first."""
    order = (
        "broadcast",
        "activation",
        "underflow",
        "select",
        "pool",
        "fm",
        "fc",
        "norm",
        "gru",
        "dot",
        "attention",
        "history",
        "fold",
        "cross",
    )
    return order.index(rule) if rule in order else len(order)


def _sorted_live(nodes: Sequence[Emitted], outputs: Sequence[str]) -> list[Emitted]:
    """The nodes that outputs depend on, in topological order, close to that of the original."""
    producer = {o: k for k, e in enumerate(nodes) for o in e.proto.output if o}

    def operands(k: int) -> set[int]:
        return {producer[i] for i in reads(nodes[k].proto) if i in producer}

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
