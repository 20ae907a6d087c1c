"""The model around the nodes for several requests: an `If` between them and those for one, inputs, and outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from onnxrank import batches, halves
from onnxrank import model as files
from onnxrank.batching.rows import PADDED
from onnxrank.batching.tensors import Rows, Tensor
from onnxrank.contract import RULE
from onnxrank.emitter import Emitter
from onnxrank.graphs import captured, reads, rename, subgraphs
from onnxrank.operators import Trait, traits

_SMALL = 1 << 12
"""Bytes of a constant up to which each branch of an `If` has its own: what is outside costs time at every run."""
_PRODUCTS = 64 << 20
"""Bytes up to which weights of products are stored for each branch: one that captures them, packed, plans no memory."""


class Assembly:
    """A model for one request and the nodes for several, put together.

    Args:
        base: The model for one request.
        emit: The nodes for several.
        form: How requests are told apart.
        given: Where requests lie in each input.
        tensors: Where they lie in every tensor.
    """

    def __init__(
        self, base: ModelProto, emit: Emitter, form: str, given: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> None:
        self._base, self._emit, self._form, self._given, self._tensors = base, emit, form, given, tensors
        self.further = 0
        """How many nodes several requests take beyond those of one."""

    def run(self, outputs: Mapping[str, str], alone: str, inputs: Sequence[onnx.ValueInfoProto]) -> ModelProto:
        """Makes the model.

        Args:
            outputs: Which tensor is which output.
            alone: The tensor that says whether there is one request.
            inputs: Descriptions of the inputs.
        """
        live, first = self._live(outputs, alone)
        made = _emptied(self._base)
        made.graph.node.extend(first)
        early = {n.output[0] for n in first}
        made.graph.node.append(self._either(alone, list(outputs), [n for n in live if n.output[0] not in early]))
        self._store(made.graph)
        self._ends(made.graph, inputs)
        return made

    def _live(self, outputs: Mapping[str, str], alone: str) -> tuple[list[NodeProto], list[NodeProto]]:
        """The nodes that several requests need, and which of them one needs, too."""
        several = [*((e.proto, e.rule) for e in self._emit.nodes), *((n, None) for n in self._named(outputs))]
        front = {alone} | ({t.name for t in self._given.values()} if self._form == "triton" else set())
        live = _live(several, {f"{name}/several" for name in outputs} | front)
        self.further = max(0, len(live) - len(self._base.graph.node))
        for node, rule in live:
            if rule == "batch" and not any(p.key == RULE for p in node.metadata_props):
                node.metadata_props.add(key=RULE, value="batch")
        return [n for n, _ in live], [n for n, _ in _live(live, front)]

    def _either(self, alone: str, names: Sequence[str], several: Sequence[NodeProto]) -> NodeProto:
        """The `If`."""
        infos = {o.name: o for o in self._base.graph.output}
        bodies = {"then_branch": ("one", self._one(names)), "else_branch": ("several", several)}
        branches = {
            key: _body(kind, nodes, [(f"{n}/{kind}", infos[n]) for n in names]) for key, (kind, nodes) in bodies.items()
        }
        return helper.make_node("If", [alone], names, name=batches.NODE, **branches)

    def _store(self, graph: GraphProto) -> None:
        """Puts constants where they are read."""
        base, branches = self._base, subgraphs(graph.node[-1])
        outside = {i for n in graph.node for i in n.input if i} | files.overridable(base)
        read = outside.union(*map(captured, branches))
        stored = [t for t in (*base.graph.initializer, *self._emit.initializers.values()) if t.name in read]
        inner = {t.name: t for t in stored if t.name not in outside and not t.external_data}
        weights = set().union(*map(_weights, branches)) & {name for name, t in inner.items() if t.ByteSize() > _SMALL}
        if sum(inner[name].ByteSize() for name in weights) > _PRODUCTS:
            weights = set()
        for t in stored:
            if t.name in weights or (t.name in inner and t.ByteSize() <= _SMALL):
                for branch in branches:
                    _give(branch, t, branch.name)
            else:
                graph.initializer.append(t)
        graph.sparse_initializer.extend(t for t in base.graph.sparse_initializer if t.values.name in read)

    def _ends(self, graph: GraphProto, inputs: Sequence[onnx.ValueInfoProto]) -> None:
        """Says what comes in and what goes out."""
        graph.input.extend(inputs)
        fed, have = {i.name for i in inputs}, {t.name for t in graph.initializer}
        graph.input.extend(i for i in self._base.graph.input if i.name in have and i.name not in fed)
        graph.output.extend(self._output(info) for info in self._base.graph.output)

    def _named(self, outputs: Mapping[str, str]) -> list[NodeProto]:
        """Gives outputs a name of their own, since the model's are those of the `If`; what is to be done for that."""
        names = {name: f"{name}/several" for name, tensor in outputs.items() if name == tensor}
        own = {o for e in self._emit.nodes for o in e.proto.output}
        hidden = {name: self._emit.fresh(f"{name}/rows") for name in outputs if name in own and name not in names}
        for e in self._emit.nodes:
            rename(e.proto, hidden | names)
        return [
            helper.make_node("Identity", [hidden.get(tensor, tensor)], [f"{name}/several"], name=f"{name}/several")
            for name, tensor in outputs.items()
            if name != tensor
        ]

    def _one(self, outputs: Sequence[str]) -> list[NodeProto]:
        """The nodes for one request."""
        before: list[NodeProto] = []
        behind: list[NodeProto] = []
        names: dict[str, str] = {}
        for name, t in self._given.items():
            if self._apart(t):
                names[name] = f"{name}/one"
                before.append(self._first_axis("Squeeze", name, names[name]))
            elif t.name != name:
                names[name] = t.name
        for name in outputs:
            t = self._tensors[name]
            if self._apart(t):
                names[name] = f"{name}/plain"
                behind.append(self._first_axis("Unsqueeze", names[name], f"{name}/one"))
            elif self._flat(t):
                names[name] = f"{name}/plain"
                flat = self._emit.constant(np.array([-1]))
                behind.append(helper.make_node("Reshape", [names[name], flat], [f"{name}/one"], name=f"{name}/one"))
            else:
                names[name] = f"{name}/one"
        return [*before, *(halves.renamed(n, names) for n in self._base.graph.node), *behind]

    def _apart(self, t: Tensor) -> bool:
        """Whether requests have a first axis of their own, which a single one is without."""
        return t.rows is not None and (t.rows.added or (self._form == PADDED and t.rows.each))

    def _flat(self, t: Tensor) -> bool:
        """Whether callers see a tensor of several axes flat."""
        return self._form == "triton" and t.each and t.axes > 1

    def _first_axis(self, op: str, name: str, result: str) -> NodeProto:
        """Squeeze or Unsqueeze."""
        if self._emit.opset < 13:
            return helper.make_node(op, [name], [result], name=result, axes=[0])
        return helper.make_node(op, [name, self._emit.constant(np.array([0]))], [result], name=result)

    def _output(self, info: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
        """The description of an output."""
        made = onnx.ValueInfoProto()
        made.CopyFrom(info)
        t = self._tensors[info.name]
        dims = [*made.type.tensor_type.shape.dim]
        assert t.rows is not None
        if not made.type.tensor_type.HasField("shape"):
            return made
        if self._flat(t):
            del made.type.tensor_type.shape.dim[:]
            made.type.tensor_type.shape.dim.add().dim_param = f"{info.name}.entries"
        elif self._form == PADDED and t.each:
            declared(made, dims, Rows(False, 0, added=True), "requests")
            made.type.tensor_type.shape.dim[t.rows.axis + 1].Clear()
        elif not t.each:
            declared(made, dims, t.rows, "requests")
        return made


def _emptied(base: ModelProto) -> ModelProto:
    """A model without its graph's contents."""
    made = ModelProto()
    made.CopyFrom(base)
    graph = made.graph
    for field in (graph.node, graph.input, graph.output, graph.value_info, graph.initializer, graph.sparse_initializer):
        del field[:]
    return made


def _body(name: str, nodes: Sequence[NodeProto], outputs: Sequence[tuple[str, onnx.ValueInfoProto]]) -> onnx.GraphProto:
    """A branch of an `If`."""
    kinds = [helper.make_tensor_value_info(n, o.type.tensor_type.elem_type, None) for n, o in outputs]
    return helper.make_graph(list(nodes), name, [], kinds)


def _weights(graph: onnx.GraphProto) -> set[str]:
    """Operands of products in a graph and in those inside it."""
    own = {i for n in graph.node if traits(n) & (Trait.PRODUCT | Trait.RECURRENT) for i in n.input if i}
    return own.union(*(_weights(g) for n in graph.node for g in subgraphs(n)))


def _give(graph: onnx.GraphProto, t: TensorProto, whose: str) -> None:
    """Puts a constant where it is read: into a graph, or those inside it, under a name that no other one has."""
    if t.name not in captured(graph):
        return
    if any(t.name in n.input for n in graph.node):
        own = graph.initializer.add()
        own.CopyFrom(t)
        own.name = f"{t.name}/{whose}"
        for n in graph.node:
            rename(n, {t.name: own.name})
        return
    for k, inner in enumerate(g for n in graph.node for g in subgraphs(n)):
        _give(inner, t, f"{whose}.{k}")


def _live(marked: Sequence[tuple[NodeProto, str | None]], wanted: set[str]) -> list[tuple[NodeProto, str | None]]:
    """The nodes that some tensors depend on, in order."""
    kept, needed = [], set(wanted)
    for node, rule in reversed(marked):
        if needed & set(node.output):
            kept.append((node, rule))
            needed |= reads(node)
    return kept[::-1]


def declared(made: onnx.ValueInfoProto, dims: Sequence[onnx.TensorShapeProto.Dimension], rows: Rows, name: str) -> None:
    """Gives a description the axis of the requests."""
    copied = [onnx.TensorShapeProto.Dimension.FromString(d.SerializeToString()) for d in dims]
    axis = onnx.TensorShapeProto.Dimension(dim_param=name)
    if not rows.added and not rows.plain:
        axis.Clear()
    copied[rows.axis : rows.axis + (not rows.added)] = [axis]
    shape = made.type.tensor_type.shape
    del shape.dim[:]
    shape.dim.extend(copied)
