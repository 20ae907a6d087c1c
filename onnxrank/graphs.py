"""Questions about graphs and the graphs inside their nodes, and small changes to them."""

from __future__ import annotations

import string
from collections.abc import Container, Mapping, Sequence
from itertools import count
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, defs, helper

_GRAPH, _GRAPHS = int(AttributeProto.GRAPH), int(AttributeProto.GRAPHS)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """Value of an attribute of a node."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


def einsum_terms(equation: bytes, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The terms of an Einsum's equation and its result, a letter for every axis.

    Args:
        equation: The equation; an ellipsis gets letters of its own, and a result that is left out is numpy's.
        ranks: Number of dimensions of each operand.
    """
    left, arrow, out = equation.decode().replace(" ", "").partition("->")
    terms = left.split(",")
    counts = [rank - len(t.replace("...", "")) for t, rank in zip(terms, ranks, strict=True)]
    spare = "".join(c for c in string.ascii_letters if c not in left)[: max(0, *counts)]
    if not arrow:
        out = "..." * ("..." in left) + "".join(sorted(c for c in left if c.isalpha() and left.count(c) == 1))
    terms = [t.replace("...", spare[len(spare) - n :]) for t, n in zip(terms, counts, strict=True)]
    return terms, out.replace("...", spare)


def domain(name: str) -> str:
    """A domain as it is compared: ONNX's own, which has two names, is empty."""
    return "" if name == "ai.onnx" else name


def versions(model: ModelProto) -> dict[str, int]:
    """The version of each domain that a model imports."""
    return {domain(o.domain): o.version for o in model.opset_import}


def unused(name: str, taken: Container[str], joint: str = ".", first: int = 2) -> str:
    """A name that is not taken: the one asked for, or that with a number.

    Args:
        name: The name asked for.
        taken: Names that are.
        joint: What stands before the number.
        first: The first number.
    """
    return next(n for k in count(first - 1) if (n := name if k < first else f"{name}{joint}{k}") not in taken)


def claimed(name: str, taken: set[str], joint: str = ".", first: int = 2) -> str:
    """As `unused`; the name is taken then."""
    found = unused(name, taken, joint, first)
    taken.add(found)
    return found


def names_in(graph: GraphProto) -> set[str]:
    """All names of tensors and nodes in a graph and in the graphs inside it."""
    out = _given(graph) | {o.name for o in graph.output}
    for node in graph.node:
        out |= {*node.input, *node.output, node.name}
        for inner in subgraphs(node):
            out |= names_in(inner)
    return out


def _given(graph: GraphProto) -> set[str]:
    """Names of what a graph has before any of its nodes."""
    sparse = {t.values.name for t in graph.sparse_initializer}
    return {t.name for t in graph.initializer} | sparse | {i.name for i in graph.input}


def captured(graph: GraphProto) -> set[str]:
    """Names of outer tensors that a subgraph reads."""
    local = _given(graph)
    out: set[str] = set()
    for node in graph.node:
        out |= {i for i in node.input if i and i not in local}
        out |= {c for g in subgraphs(node) for c in captured(g) if c not in local}
        local |= set(node.output)
    out |= {o.name for o in graph.output if o.name not in local}
    return out


def captured_by(node: NodeProto) -> set[str]:
    """Names of outer tensors that the graphs inside a node read."""
    return {c for g in subgraphs(node) for c in captured(g)}


def reads(node: NodeProto) -> set[str]:
    """The tensors that a node reads, in the graphs inside it, too."""
    own = {i for i in node.input if i}
    return own | captured_by(node) if subgraphs(node) else own


def dangling(model: ModelProto) -> tuple[NodeProto, str] | None:
    """The first node, in order, that reads a tensor which nothing before it gives, and the tensor's name."""
    known = _given(model.graph)
    for node in model.graph.node:
        for name in (*node.input, *sorted(captured_by(node))):
            if name and name not in known:
                return node, name
        known.update(node.output)
    return None


def names_given(graph: GraphProto) -> set[str]:
    """Names of all that a graph's nodes, inputs and initializers give."""
    return _given(graph) | {o for n in graph.node for o in n.output}


def incomplete(model: ModelProto) -> NodeProto | None:
    """A node of the main graph with fewer inputs than its operator takes."""
    opsets = versions(model)
    node: NodeProto
    for node in model.graph.node:
        try:
            schema = defs.get_schema(node.op_type, opsets.get(domain(node.domain), 1), domain(node.domain))
        except defs.SchemaError:
            continue
        if len(node.input) < schema.min_input:
            return node
    return None


def live(model: ModelProto) -> ModelProto:
    """The model without the nodes that no output depends on, which onnxruntime would run all the same.

    Returns:
        A copy; the model itself where there are none.
    """
    maker = {o: k for k, node in enumerate(model.graph.node) for o in node.output if o}
    seen: set[int] = set()
    wanted = [o.name for o in model.graph.output]
    while wanted:
        k = maker.get(wanted.pop())
        if k is not None and k not in seen:
            seen.add(k)
            node = model.graph.node[k]
            wanted += reads(node)
    if len(seen) == len(model.graph.node):
        return model
    kept = [node for k, node in enumerate(model.graph.node) if k in seen]
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    out.graph.node.extend(kept)
    return out


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Bodies of a control-flow node."""
    out: list[GraphProto] = []
    for a in node.attribute:
        if a.type == _GRAPH:
            out.append(a.g)
        elif a.type == _GRAPHS:
            out.extend(a.graphs)
    return out


def renamed(model: ModelProto, names: dict[str, str]) -> ModelProto:
    """A copy in which tensors that nodes or initializers give have other names; inputs and outputs keep theirs."""
    out = ModelProto()
    out.CopyFrom(model)
    for node in out.graph.node:
        rename(node, names)
    sparse = (t.values for t in out.graph.sparse_initializer)
    for t in (*out.graph.initializer, *sparse, *out.graph.value_info):
        t.name = names.get(t.name, t.name)
    return out


def rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Renames, in place, what a node reads, in the graphs inside it too, and what it gives."""
    for field in (node.input, node.output):
        for k, name in enumerate(field):
            if name in names:
                field[k] = names[name]
    rename_captured(node, names)


def rename_captured(node: NodeProto, names: Mapping[str, str]) -> None:
    """Renames, in place, the outer tensors that a control-flow node's bodies read."""
    for graph in subgraphs(node):
        local = _given(graph)
        for inner in graph.node:
            for k, i in enumerate(inner.input):
                if i not in local and i in names:
                    inner.input[k] = names[i]
            rename_captured(inner, {a: b for a, b in names.items() if a not in local})
            local |= set(inner.output)
        for o in graph.output:
            if o.name not in local and o.name in names:
                o.name = names[o.name]


def kind(node: NodeProto) -> bytes:
    """What a node does to its operands, whatever it and they are called."""
    plain = NodeProto(op_type=node.op_type, domain=node.domain)
    plain.attribute.extend(sorted(node.attribute, key=lambda a: a.name))
    plain.output.extend("x" if o else "" for o in node.output)
    return bytes(plain.SerializeToString(deterministic=True))
