"""The nodes for many requests: inputs, every node of the model for one, outputs, and the guard."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from onnxrank import cost, runtime
from onnxrank import extents as ex
from onnxrank.batching import regions, rules
from onnxrank.batching.assembly import Assembly, declared
from onnxrank.batching.rows import NAMES, PADDED, Requests
from onnxrank.batching.site import Site
from onnxrank.batching.tensors import Count, Impossible, Rows, Size, Tensor
from onnxrank.batching.writer import Writer
from onnxrank.emitter import Emitter
from onnxrank.errors import ModelError, UsageError
from onnxrank.facts import constant_data
from onnxrank.feeds import Input
from onnxrank.graphs import attribute, names_in, reads, versions
from onnxrank.layout import Layout
from onnxrank.operators import Known, Use, constant, domain_of, operator
from onnxrank.plans import label
from onnxrank.study import Study
from onnxrank.values import CANDIDATES, Sources, extents, is_candidate_symbol, symbols

_LARGE = 1 << 12
"""Entries of initializers that operators may read their options from."""


@dataclass(frozen=True)
class Shape:
    """How a model takes several requests.

    Attributes:
        form: `lengths`, `offsets`, `index`, `triton` or `padded`.
        name: What the further input is called.
        guard: Whether scores become NaN where what it says does not add up.
    """

    form: str = "lengths"
    name: str = NAMES["lengths"]
    guard: bool = True


def joined(
    study: Study, axes: dict[str, int | None], shape: Shape, usual: int, requests: int
) -> tuple[Batch, ModelProto]:
    """Makes a model for many requests, some nodes of which run request by request.

    That are those for which it is quicker, or, in a model that has such, those that make or read what has another shape
    for each request.

    Args:
        study: What is known of the model for one request.
        axes: Per request-level input the axis along which the original has rows of candidates; None where it has none.
        shape: How requests are told apart.
        usual: Number of candidates that a request usually has.
        requests: Number of requests that a call usually has; 1 for a model without loops that are there to be quicker.

    Raises:
        ModelError: It cannot be done, with the node and the reason.
    """
    alone = unproved(study)
    if alone and versions(study.model)[""] >= regions.SINCE:
        found = regions.obliged(study.model.graph.node, alone)
        try:
            return _in_turns(Batch(study, axes, shape, found), "the shapes of what they make are found in the data")
        except Impossible as e:
            raise ModelError(f"Several requests cannot be scored in one call: {e}.") from e
    plain = Batch(study, axes, shape)
    made = plain.run()
    shapes = study.shapes(usual)

    def size(name: str) -> int:
        return shapes.width(name) * math.prod(shapes.shape(name) or (0,))

    if requests > 1 and plain.emit.opset >= regions.SINCE:
        nodes = study.model.graph.node
        found = regions.regions(nodes, plain.tensors, size, lambda node: cost.node_macs(node, shapes), requests)
        with contextlib.suppress(Impossible):
            if found:
                return _in_turns(
                    Batch(study, axes, shape, found, plain.tensors),
                    "what they make of one stays in the cache, and what they make of all does not; for a GPU use "
                    "--no-turns",
                )
    return plain, made


def _in_turns(graph: Batch, why: str) -> tuple[Batch, ModelProto]:
    made = graph.run()
    graph.notes.append(f"{sum(map(len, graph.turns))} nodes run in a loop over requests: {why}")
    return graph, made


def unproved(study: Study) -> set[int]:
    """The nodes, by place, that make or read what has another shape for each request, found in the data.

    None where an output is of that kind: outputs of several requests cannot be put together then.
    """
    facts, graph = study.facts, study.model.graph
    moving, odd, places = {i.name for i in graph.input}, set[str](), set[int]()
    for k, node in enumerate(graph.node):
        read = reads(node)
        if not read & moving:
            continue
        moving |= set(node.output)
        odd |= {o for o in node.output if o and facts.unproved(o) is not None}
        if odd & (read | set(node.output)):
            places.add(k)
    return set() if odd & {o.name for o in graph.output} else places


class Batch:
    """A model for one request made into one for many.

    Args:
        study: What is known of the model for one request.
        axes: Per request-level input the axis along which the original has rows of candidates; None where it has none.
        shape: How requests are told apart.
        turns: Sets of nodes that run request by request, by place.
        known: Where the requests lie in all tensors without that.

    Raises:
        ModelError: It cannot be done, with the node and the reason.
    """

    def __init__(
        self,
        study: Study,
        axes: dict[str, int | None],
        shape: Shape,
        turns: Sequence[frozenset[int]] = (),
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.study, self.axes, self.shape, self.turns, self._before = study, axes, shape, turns, known or {}
        graph = study.model.graph
        opset = versions(study.model)[""]
        taken = names_in(graph)
        if shape.name in taken and shape.form != PADDED:
            raise UsageError(f"The model has a tensor called {shape.name!r}: choose another name with --rows-name.")
        self.emit = Emitter([*taken, shape.name], opset)
        self.emit.rule = "batch"
        self.layout = Layout(Sources(), self.emit, study.facts.expressions)
        self.inputs: list[onnx.ValueInfoProto] = []
        self.tensors: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        """The inputs, as callers give them but for `triton` and `padded`."""
        self.notes: list[str] = []
        self.alone: list[str] = []
        """Nodes that run request by request."""
        self.further = 0
        """How many nodes several requests take beyond those of one."""
        self._varying: set[str] = set()
        self._stored = {t.name: t for t in graph.initializer}
        self._sparse = {t.values.name: t for t in graph.sparse_initializer}
        self._constants: dict[str, Known | None] = {}
        self._shown = {o.name for o in graph.output}
        self.requests = Requests(self.emit, shape.form, shape.name)
        self.writer = Writer(self.emit, self.layout, study.facts, self.requests)
        self._types = study.dtypes | {i.name: i.dtype for i in study.declared}
        self._types |= {t.name: t.data_type for t in graph.initializer}

    def run(self) -> ModelProto:
        """Makes the model."""
        self._inputs()
        nodes = self.study.model.graph.node
        for k, *more in regions.ordered(nodes, self.turns):
            self.emit.origin, self.emit.hint = k, next((o for o in nodes[k].output if o), nodes[k].name)
            if frozenset([k, *more]) in self.turns:
                self._in_turns([k, *more])
            else:
                self._step(nodes[k])
        outputs = self._outputs()
        frame = Assembly(self.study.model, self.emit, self.shape.form, self.given, self.tensors)
        made = frame.run(outputs, self.requests.alone(), self.inputs)
        self.further = frame.further
        return made

    def _in_turns(self, places: Sequence[int]) -> None:
        """Writes nodes that run request by request."""
        nodes = self.study.model.graph.node
        inside = set(places)
        maker = {o: k for k, n in enumerate(nodes) for o in n.output if o}
        # What varies with the number of candidates is written for one request where it is read.
        line = list(places)
        while line:
            near = {maker[i] for i in reads(nodes[line.pop()]) & self._varying} - inside
            inside |= near
            line += near
        own = {o for k in inside for o in nodes[k].output if o}
        read = set().union(*(reads(nodes[k]) for k in inside)) - own
        others = set().union(*(reads(n) for k, n in enumerate(nodes) if k not in inside))
        wanted = [o for k in sorted(places) for o in nodes[k].output if o in others | self._shown]
        known = self._before or self._placed(wanted)
        # The others vary with the number of candidates, and are written for one request where they are read.
        results = {o: known[o] for o in wanted if o in known}
        self._varying |= {o for o in wanted if o not in known}
        loop = regions.Turns(self.writer, self._types, f"{label(nodes[places[0]])}/turns")
        made = loop.run([nodes[k] for k in sorted(inside)], {i: self._tensor(i) for i in sorted(read)}, results)
        self.tensors |= made
        self._types |= {t.name: self._types[o] for o, t in made.items()}

    def _placed(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Where the requests lie in what nodes make that can only run request by request; extents are left out.

        Raises:
            Impossible: Candidates lie along several axes, or between other entries.
        """
        found = {}
        facts = self.study.facts
        for name in (n for n in names if n not in facts.entries):
            each = [axis for axis, n in enumerate(facts.sizes[name]) if CANDIDATES in ex.symbols_of(n)]
            inner, of = facts.extent(facts.sizes[name][each[0]]) if each else (1, ())
            if len(each) > 1 or (each and of != (CANDIDATES,)):
                raise Impossible(f"candidates of {name!r} lie between other entries")
            rows = Rows(True, each[0], 1, inner) if each else Rows(False, 0, added=True)
            found[name] = Tensor(name, facts.sizes[name], rows)
        return found

    # --- inputs ------------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        infos = {i.name: i for i in self.study.model.graph.input}
        declared = self.study.declared
        moving = [i for i in declared if i.role.level != "request"]
        for i in declared:
            self._input(i, infos[i.name])
        self.given = dict(self.tensors)
        if not moving:
            raise ModelError("No input has a row per candidate.")
        first = moving[0]
        if self.shape.form == "triton":
            rank = len(first.dims)
            self.requests.record = first.role.record or 1
            self.notes.append(f"{self.shape.name} is the item shape of {first.name!r}, [requests, {rank}]")
        self.inputs += self.requests.inputs()

    def _input(self, i: Input, info: onnx.ValueInfoProto) -> None:
        sizes = tuple(self.study.facts.size_of(d) for d in i.dims)
        made = onnx.ValueInfoProto()
        made.CopyFrom(info)
        self.inputs.append(made)
        if i.role.level == "request":
            axis = self.axes.get(i.name)
            rows = Rows(False, 0, added=True) if axis is None else Rows(False, axis, 1, sizes[axis])
            tensor = Tensor(i.name, sizes, rows)
            declared(made, [*made.type.tensor_type.shape.dim], rows, "requests")
            if not isinstance(rows.inner, int):
                raise ModelError(f"The rows of {i.name!r} have a length that varies.")
            self.requests.once.append((i.name, rows.axis, rows.inner))
            self.tensors[i.name] = tensor
            self._lengths(i, i.name, rows)
            return
        axis = i.role.candidate_axis
        if axis is None:
            raise ModelError(f"The input {i.name!r} has no row per candidate.")
        record = i.role.record or 1
        rows, name = Rows(True, axis, 1, record), i.name
        tensor = Tensor(i.name, sizes, rows)
        dims = [*made.type.tensor_type.shape.dim]
        if self.shape.form == "triton":
            if axis:
                raise ModelError(
                    f"Triton joins requests along the first axis, and candidates of {i.name!r} lie along another."
                )
            del made.type.tensor_type.shape.dim[:]
            made.type.tensor_type.shape.dim.add().dim_param = f"{i.name}.entries"
            name = i.name if len(sizes) == 1 else self.writer.reshape(i.name, tensor.shape())
        elif self.shape.form == PADDED:
            name = self._padded(i, made, dims, sizes, record)
        self._lengths(i, name, rows)
        self.tensors[i.name] = Tensor(name, sizes, rows)
        if not self.requests.many[0]:
            self.requests.many = name, axis, record

    def _padded(
        self, i: Input, made: onnx.ValueInfoProto, dims: list[onnx.TensorShapeProto.Dimension], sizes: tuple[Size, ...],
        record: int,
    ) -> str:  # fmt: skip
        """`[R, ...]` as `[..., R * M, ...]`."""
        axis = i.role.candidate_axis
        assert axis is not None
        if record > 1:
            raise ModelError(f"The input {i.name!r} is flat: --interface padded has no axis for its requests.")
        declared(made, dims, Rows(False, 0, added=True), "requests")
        if self.requests.width is None:
            self.requests.width = i.name, axis + 1
        self.requests.once.append((i.name, 0, 1))
        name = self.writer.transpose(i.name, [*range(1, axis + 1), 0, *range(axis + 1, len(sizes) + 1)])
        shape: list[Size | Count] = list(sizes)
        shape[axis] = Count(True)
        if all(isinstance(n, int) and n > 0 for k, n in enumerate(sizes) if k != axis):
            return self.writer.reshape(name, shape)
        parts = [
            self.writer.vector(shape[:axis]), self.emit.add("Mul", [self.requests.count(), self.requests.most()]),
            self.writer.vector(shape[axis + 1 :]),
        ]  # fmt: skip
        return self.writer.shaped(name, self.emit.add("Concat", parts, {"axis": 0}))

    def _lengths(self, i: Input, name: str, rows: Rows) -> None:
        """Notes where lengths can be read."""
        if self.shape.form == "triton" and rows.each:
            return
        for axis, d in enumerate(i.dims):
            syms = symbols([d])
            if len(syms) == 1 and not is_candidate_symbol(syms[0]):
                at = axis + (rows.added and axis >= rows.axis)
                if self.shape.form == PADDED and rows.each:
                    name, at = i.name, axis + 1
                self.layout.sizes.extent_of.setdefault(syms[0], (name, at, extents((d,))[0]))

    # --- nodes -------------------------------------------------------------------------------------------------------

    def _sizes(self, name: str) -> tuple[Size, ...] | None:
        if name in self._stored:
            return tuple(self._stored[name].dims)
        if name in self._sparse:
            return tuple(self._sparse[name].dims)
        return self.study.facts.sizes.get(name)

    def _tensor(self, name: str) -> Tensor:
        if name not in self.tensors:
            sizes = self._sizes(name)
            if sizes is None:
                raise self._unknown(name)
            self.tensors[name] = Tensor(name, sizes)
        return self.tensors[name]

    def _step(self, node: NodeProto) -> None:
        names = [i for i in node.input if i]
        read = reads(node)
        moving = {i for i in read if i in self.tensors and self.tensors[i].rows is not None}
        if not moving and not read & self._varying:
            # A tensor that is one constant may have another name by now.
            self.emit.copy(node, [self.tensors[i].name if i in self.tensors else i for i in node.input], node.output)
            self.emit.nodes[-1].rule = None
            return
        if self._from_shapes(node, read & self._varying, moving):
            return
        try:
            if read - set(names) & moving or any(i in self._varying for i in read - set(names)):
                raise Impossible("a body reads what differs between requests")
            self._translated(node)
        except Impossible as e:
            raise ModelError(
                f"Several requests cannot be scored in one call: at node {label(node)!r} ({node.op_type}), {e}."
            ) from e

    def _translated(self, node: NodeProto) -> None:
        operands: list[Tensor | None] = []
        for k, i in enumerate(node.input):
            if i in self._varying and not (k == 1 and operator(node) in ("Reshape", "Expand")):
                raise Impossible(f"it reads {i!r}, which varies with the number of candidates")
            if i in self._varying:
                operands.append(None)
            else:
                operands.append(self._tensor(i) if i else None)
        sizes = [self._known(o) if o else () for o in node.output]
        use = Use(
            node,
            versions(self.study.model).get(domain_of(node), 1),
            [None if t is None else t.sizes for t in operands],
            [self._constant(i) for i in node.input],
        )
        mark = len(self.emit.nodes)
        made = rules.translate(Site(self.writer, node, operands, sizes, use, self._types))
        self.alone += [label(node)] if any(e.proto.op_type == "Scan" for e in self.emit.nodes[mark:]) else []
        for o, t in zip(node.output, made, strict=True):
            if o:
                self.tensors[o] = t
                self._types.setdefault(t.name, self._types.get(o, 0))

    def _known(self, name: str) -> tuple[Size, ...]:
        sizes = self.study.facts.sizes.get(name)
        if sizes is None:
            raise self._unknown(name)
        reason = self.study.facts.unproved(name)
        if reason is not None:
            raise Impossible(f"the shape of {name!r} is found in the data of each request ({reason})")
        return sizes

    def _unknown(self, name: str) -> Impossible:
        """What stops at a tensor whose rank is not proved."""
        reason = self.study.facts.unknown.get(name)
        return Impossible(f"the number of axes of {name!r} is not known{f' ({reason})' if reason else ''}")

    def _constant(self, name: str) -> Known | None:
        if name not in self._constants:
            found = None
            folded = self.study.facts.folded.get(name)
            t = self._stored.get(name)
            if folded is not None and not symbols(folded[0]):
                found = constant(folded[1])
            elif t is not None and int(np.prod(t.dims, dtype=np.int64)) <= _LARGE:
                found = constant(constant_data(t, self.study.loaded.folder))
            self._constants[name] = found
        return self._constants[name]

    def _from_shapes(self, node: NodeProto, varying: set[str], moving: set[str]) -> bool:
        """Nodes that shapes are computed with; whether it is one."""
        outputs = [o for o in node.output if o]
        if outputs and all(
            o in self.study.facts.folded and not symbols(self.study.facts.folded[o][0]) for o in outputs
        ):
            for o in outputs:
                data = self.study.facts.folded[o][1].reshape(
                    [n if isinstance(n, int) else 1 for n in self.study.facts.sizes[o]]
                )
                self.tensors[o] = Tensor(self.emit.constant(data), tuple(data.shape))
            return True
        if operator(node) == "Shape":
            whole = self._tensor(node.input[0]).sizes
            sizes = whole[attribute(node, "start", 0) : attribute(node, "end", len(whole))]
            if any(CANDIDATES in ex.symbols_of(n) for n in sizes):
                self._varying |= set(outputs)
            else:
                self.tensors[outputs[0]] = Tensor(self.writer.vector(sizes), (len(sizes),))
            return True
        if varying and not moving and operator(node) != "Expand":
            self._varying |= set(outputs)
            return True
        return False

    # --- outputs -----------------------------------------------------------------------------------------------------

    def _outputs(self) -> dict[str, str]:
        """Which tensor is which output."""
        self.emit.origin, self.emit.hint = len(self.study.model.graph.node), "requests"
        out = {}
        valid = self.requests.valid() if self.shape.guard else None
        for info in self.study.model.graph.output:
            name = info.name
            if name in self._varying:
                raise ModelError(f"The output {name!r} is the number of candidates.")
            t = self._tensor(name)
            tensor = t.name
            if t.rows is None:
                raise ModelError(f"The output {name!r} is the same for all requests.")
            if self.shape.form == "triton" and t.axes > 1:
                tensor = self.writer.reshape(tensor, [Count(True)]) if t.each else tensor
            elif self.shape.form == PADDED and t.each:
                tensor = self._divided(t)
            kind = self._types.get(name, 0)
            if valid is not None and kind in runtime.FLOATS:
                nan = self.emit.constant(np.array(np.nan, helper.tensor_dtype_to_np_dtype(kind)))
                tensor = self.emit.add("Where", [valid, tensor, nan], hint=name)
            elif valid is not None:
                self.notes.append(f"{name!r} is not guarded: it is no float")
            out[name] = tensor
        return out

    def _divided(self, t: Tensor) -> str:
        """An output of all candidates as `[requests, ..., candidates, ...]`."""
        assert t.rows is not None
        at, count = t.rows.axis, self.requests.count()
        most = self.requests.most()
        if t.rows.outer != 1:
            raise ModelError("An output mixes candidates with other entries.")
        if t.rows.inner != 1:
            inner = self.writer.vector([t.rows.inner])
            most = self.emit.add("Mul", [most, inner])
        parts = [*([self.writer.vector(t.sizes[:at])] if at else []), count, most]
        parts += [self.writer.vector(t.sizes[at + 1 :])] if at + 1 < t.rank else []
        name = self.writer.shaped(t.name, self.emit.add("Concat", parts, {"axis": 0}))
        return self.writer.transpose(name, [at, *range(at), *range(at + 1, t.rank + 1)])
