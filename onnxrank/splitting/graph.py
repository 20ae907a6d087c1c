"""A graph by level, as the cut asks for it, and the two graphs that a cut makes of it.

Which level a node has is a question of what it can be reached from: a node that depends on a candidate-level input is
candidate-level, one that depends on other inputs only is request-level, and one that depends on none is a constant,
which belongs to whoever reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxrank.contract import CONTRACT
from onnxrank.feeds import graph_inputs
from onnxrank.graphs import captured, claimed, names_in, subgraphs
from onnxrank.halves import renamed
from onnxrank.operators import find
from onnxrank.ranker import VERSION
from onnxrank.roles import Roles

_WORD = re.compile(r"[A-Za-z0-9]+")
_LONG = 64


@dataclass(frozen=True)
class Levels:
    """The nodes of a graph by level, by place.

    Attributes:
        constant, request, candidate: The nodes.
        inputs: Request-level inputs.
        wanted: Request-level tensors that candidate-level nodes read, or that are outputs.
    """

    constant: frozenset[int]
    request: tuple[int, ...]
    candidate: tuple[int, ...]
    inputs: tuple[str, ...]
    wanted: frozenset[str]


def reads(node: NodeProto) -> set[str]:
    """What a node reads, in its bodies too."""
    return {i for i in node.input if i}.union(*map(captured, subgraphs(node)))


def is_random(node: NodeProto) -> bool:
    """Whether two runs of a node may differ."""
    found = find(node)
    return (found is not None and found.random) or any(is_random(n) for g in subgraphs(node) for n in g.node)


def levels(model: ModelProto, roles: Roles) -> Levels:
    """The levels of a model's nodes.

    Args:
        model: The model, with functions inlined.
        roles: Roles of its inputs.
    """
    names = [i.name for i in graph_inputs(model)]
    inputs = tuple(n for n in names if roles.inputs[n].level == "request")
    once, many = set(inputs), set(names) - set(inputs)
    # An initializer that callers may replace is theirs to give to both models, so it stays a constant here.
    constant, request, candidate = [], [], []
    wanted: set[str] = set()
    for k, node in enumerate(model.graph.node):
        operands = reads(node)
        if operands & many:
            candidate.append(k)
            many |= set(node.output)
            wanted |= operands & once
        elif operands & once or is_random(node):
            request.append(k)
            once |= set(node.output)
        else:
            constant.append(k)
    once.discard("")
    wanted |= {o.name for o in model.graph.output} & once
    return Levels(frozenset(constant), tuple(request), tuple(candidate), inputs, frozenset(wanted))


def state_names(model: ModelProto, tensors: Iterable[str]) -> dict[str, str]:
    """Names of state tensors: words of the tensors' own names, unlike any name in the model."""
    taken = names_in(model.graph) | {VERSION}
    out = {}
    for tensor in tensors:
        words = _WORD.findall(re.sub(r"_output_\d+", "", tensor)) or ["tensor"]
        kept = [w for k, w in enumerate(words) if not k or w != words[k - 1]]
        while len("_".join(kept)) > _LONG and len(kept) > 1:
            del kept[0]
        out[tensor] = claimed(f"state_{'_'.join(kept)[-_LONG:]}", taken, "_")
    return out


@dataclass(frozen=True)
class Handed:
    """One tensor that the models hand over.

    Attributes:
        tensor: What it is in the whole model; what an input is called, where it is one.
        name: What both models call it.
        type: Its ONNX element type in the whole model.
        shape: Its extents, numbers or names.
    """

    tensor: str
    name: str
    type: int
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Layout:
    """How the state is handed over.

    Attributes:
        tensors: Its tensors, in order.
        packed: Name of the vector that holds them all; None where each is handed over by itself.
        half: Whether floats of 32 bits are rounded to 16.
        whole: Tensors that are not, because they have values beyond the range of 16 bits.
    """

    tensors: tuple[Handed, ...]
    packed: str | None = None
    half: bool = False
    whole: frozenset[str] = frozenset()

    @property
    def vector(self) -> int:
        """Entries of the vector."""
        return sum(_count(t) for t in self.tensors)

    @property
    def kind(self) -> int:
        """Element type of the vector."""
        return int(TensorProto.FLOAT16 if self.half else TensorProto.FLOAT)

    def type_of(self, t: Handed) -> int:
        """The type in which a tensor is handed over by itself."""
        rounded = self.half and t.type == TensorProto.FLOAT and t.tensor not in self.whole
        return int(TensorProto.FLOAT16 if rounded else t.type)


def _count(t: Handed) -> int:
    return int(np.prod([d for d in t.shape if isinstance(d, int)], dtype=np.int64))


@dataclass
class _Half:
    """One of the two models while it is put together; `prefix` begins the names of nodes that are added."""

    model: ModelProto
    prefix: str = "onnxrank/state"
    nodes: list[NodeProto] = field(default_factory=list)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)

    def add(self, op: str, operands: Sequence[str], result: str, **attributes: Any) -> str:
        """Adds a node."""
        name = f"{self.prefix}/{result}"
        self.nodes.append(helper.make_node(op, list(operands), [result], name=name, **attributes))
        return result

    def constant(self, name: str, value: object, kind: type = np.int64) -> str:
        """Adds a constant."""
        return self.add("Constant", [], name, value=numpy_helper.from_array(np.array(value, kind), name))

    def done(self, names: Mapping[str, str]) -> ModelProto:
        """The model, with what its nodes read, and under other names."""
        base, out = self.model, ModelProto()
        for part in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
            if base.HasField(part):
                setattr(out, part, getattr(base, part))
        out.opset_import.extend(base.opset_import)
        out.metadata_props.extend(p for p in base.metadata_props if p.key != CONTRACT)
        graph = out.graph
        graph.name, graph.doc_string = base.graph.name, base.graph.doc_string
        graph.node.extend(renamed(n, names) for n in self.nodes)
        read = set().union(*map(reads, graph.node)) | {o.name for o in self.outputs}
        graph.initializer.extend(t for t in base.graph.initializer if t.name in read)
        graph.sparse_initializer.extend(t for t in base.graph.sparse_initializer if t.values.name in read)
        graph.quantization_annotation.extend(a for a in base.graph.quantization_annotation if a.tensor_name in read)
        held = {t.name for t in graph.initializer}
        graph.input.extend(self.inputs)
        graph.input.extend(i for i in base.graph.input if i.name in held)
        graph.output.extend(self.outputs)
        made = {o for n in graph.node for o in n.output}
        shown = {o.name for o in graph.output}
        graph.value_info.extend(v for v in base.graph.value_info if v.name in made - shown and v.name not in names)
        return out


def divide(model: ModelProto, found: Levels, request: frozenset[int], layout: Layout) -> tuple[ModelProto, ModelProto]:
    """The two models, without what says their version.

    Args:
        model: The whole model.
        found: Its levels.
        request: Nodes of the request model, by place.
        layout: The state.

    Returns:
        The request model and the candidate model.
    """
    by_name = {i.name: i for i in model.graph.input}
    first, second = _Half(model), _Half(model)
    tensors = {t.tensor: t for t in layout.tensors}
    late = frozenset(found.candidate) | frozenset(found.request) - request
    first.nodes = _live(model, request | found.constant, set(tensors))
    second.nodes = _live(model, late | found.constant, {o.name for o in model.graph.output} - tensors.keys())
    once = set(found.inputs)
    first.inputs = [by_name[n] for n in found.inputs]
    second.inputs = [i for i in graph_inputs(model) if i.name not in once]
    second.outputs = list(model.graph.output)
    if layout.packed is not None:
        names: dict[str, str] = {}
        _hand_over_packed(first, second, layout, layout.packed, names)
        return first.done({}), second.done(names)
    # A tensor takes its new name where it is made and read, but for what must keep its own, and what is rounded.
    outputs = {o.name for o in model.graph.output}
    made: dict[str, str] = {}
    taken: dict[str, str] = {}
    early: list[NodeProto] = []
    for t in layout.tensors:
        kind = layout.type_of(t)
        first.outputs.append(helper.make_tensor_value_info(t.name, kind, t.shape))
        second.inputs.append(helper.make_tensor_value_info(t.name, kind, t.shape))
        if kind != t.type:
            first.add("Cast", [t.tensor], t.name, to=kind)
            second.add("Cast", [t.name], _again(t, once, taken), to=t.type)
            early.append(second.nodes.pop())
        elif t.tensor in outputs:
            first.add("Identity", [t.tensor], t.name)
            second.add("Identity", [t.name], t.tensor)
            early.append(second.nodes.pop())
        else:
            taken[t.tensor] = t.name
            if t.tensor in once:
                first.add("Identity", [t.tensor], t.name)
            else:
                made[t.tensor] = t.name
    second.nodes = [*early, *second.nodes]
    return first.done(made), second.done(taken)


def _again(t: Handed, inputs: set[str], names: dict[str, str]) -> str:
    """What the candidate model calls a tensor that it makes of the state: an input's name stays the request's."""
    if t.tensor in inputs:
        names[t.tensor] = f"{t.name}/whole"
    return names.get(t.tensor, t.tensor)


def _hand_over_packed(first: _Half, second: _Half, layout: Layout, vector: str, names: dict[str, str]) -> None:
    """Joins the state in one vector, and cuts it again; notes what has another name there."""
    inputs = {i.name for i in first.inputs}
    kind, size = layout.kind, layout.vector
    first.outputs.append(helper.make_tensor_value_info(vector, kind, [size]))
    second.inputs.append(helper.make_tensor_value_info(vector, kind, [size]))
    body, second.nodes = second.nodes, []
    flat = []
    flatten = first.constant(f"{vector}/flat", [-1])
    for t in layout.tensors:
        row = first.add("Reshape", [t.tensor, flatten], f"{t.name}/row")
        flat.append(row if t.type == kind else first.add("Cast", [row], f"{t.name}/cast", to=kind))
    first.add("Concat", flat, vector, axis=0)
    at = 0
    for t in layout.tensors:
        start = second.constant(f"{t.name}/start", [at])
        at += _count(t)
        end = second.constant(f"{t.name}/end", [at])
        row = second.add("Slice", [vector, start, end], f"{t.name}/row")
        if t.type != kind:
            row = second.add("Cast", [row], f"{t.name}/cast", to=t.type)
        second.add("Reshape", [row, second.constant(f"{t.name}/shape", list(t.shape))], _again(t, inputs, names))
    second.nodes += body


def _live(model: ModelProto, allowed: frozenset[int], wanted: set[str]) -> list[NodeProto]:
    """Of some nodes those that tensors depend on, in order."""
    nodes, kept, needed = model.graph.node, [], set(wanted)
    for k in sorted(allowed, reverse=True):
        if needed & set(nodes[k].output):
            kept.append(nodes[k])
            needed |= reads(nodes[k])
    return kept[::-1]


# --- the version -----------------------------------------------------------------------------------------------------


def say_version(request: ModelProto, version: int) -> None:
    """Has the request model give the version of its state, in place."""
    half = _Half(request, "onnxrank/version")
    half.constant(VERSION, [version])
    request.graph.node.extend(half.nodes)
    request.graph.output.append(helper.make_tensor_value_info(VERSION, TensorProto.INT64, [1]))


def guard(candidate: ModelProto, version: int) -> list[str]:
    """Has the candidate model give NaN for states of other versions, in place.

    Returns:
        Outputs that cannot be NaN, because they are no floats, or constants.
    """
    half = _Half(candidate, "onnxrank/guard")
    kinds = {TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64, TensorProto.FLOAT16: np.float16}
    candidate.graph.input.append(helper.make_tensor_value_info(VERSION, TensorProto.INT64, [1]))
    half.constant(f"{VERSION}/own", [version])
    half.add("Equal", [VERSION, f"{VERSION}/own"], f"{VERSION}/equal")
    half.constant(f"{VERSION}/scalar", np.zeros(0))
    half.add("Reshape", [f"{VERSION}/equal", f"{VERSION}/scalar"], f"{VERSION}/valid")
    names, others = {}, []
    made = {o for n in candidate.graph.node for o in n.output}
    for o in candidate.graph.output:
        kind = kinds.get(o.type.tensor_type.elem_type)
        if kind is None or o.name not in made:
            others.append(o.name)
            continue
        names[o.name] = f"{o.name}/unguarded"
        nan = f"{VERSION}/nan.{o.type.tensor_type.elem_type}"
        if all(nan not in n.output for n in half.nodes):
            half.constant(nan, np.nan, kind)
        half.add("Where", [f"{VERSION}/valid", names[o.name], nan], o.name)
    nodes = [renamed(n, names) for n in candidate.graph.node]
    del candidate.graph.node[:]
    candidate.graph.node.extend([*nodes, *half.nodes])
    return others


def parameters(model: ModelProto) -> int:
    """Entries of a model's initializers."""
    return sum(int(np.prod(t.dims, dtype=np.int64)) for t in model.graph.initializer)


# --- rows per request ------------------------------------------------------------------------------------------------


def in_rows(request: ModelProto, candidate: ModelProto) -> None:
    """Gives every tensor of the state a first axis of 1, in place, along which the states of requests can lie."""
    opset = next(o.version for o in candidate.opset_import if o.domain in ("", "ai.onnx"))
    first, second = _Half(request, "onnxrank/rows"), _Half(candidate, "onnxrank/rows")
    given = {i.name: i for i in candidate.graph.input}
    outputs, inputs = {}, {}
    for o in request.graph.output:
        extents = o.type.tensor_type.shape.dim
        if len(extents) > 1 and extents[0].HasField("dim_value") and extents[0].dim_value == 1:
            continue
        outputs[o.name] = inputs[o.name] = f"{o.name}/row"
        for half, op, names in (
            (first, "Unsqueeze", (f"{o.name}/row", o.name)),
            (second, "Squeeze", (o.name, f"{o.name}/row")),
        ):
            if opset < 13:
                half.add(op, names[:1], names[1], axes=[0])
            else:
                half.add(op, [names[0], half.constant(f"{o.name}/first", [0])], names[1])
        for value in (o, given[o.name]):
            kept = [d for d in value.type.tensor_type.shape.dim]
            made = helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, [1])
            made.type.tensor_type.shape.dim.extend(kept)
            value.CopyFrom(made)
    for model, half, other in ((request, first, outputs), (candidate, second, inputs)):
        nodes = [renamed(n, other) for n in model.graph.node]
        del model.graph.node[:]
        model.graph.node.extend([*nodes, *half.nodes] if half is first else [*half.nodes, *nodes])
