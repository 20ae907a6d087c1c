"""Embedding tables and sequences: what is looked up where, and by whom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from onnx import NodeProto, TensorProto, helper

from onnxrank import cost
from onnxrank.feeds import Input
from onnxrank.inspection.report import Sequence as SequenceInput
from onnxrank.inspection.report import Table
from onnxrank.operators import Trait, operator, traits
from onnxrank.study import Study
from onnxrank.values import is_candidate_symbol, symbols

_READERS = Trait.PRODUCT | Trait.RECURRENT | Trait.REDUCTION | Trait.NORMALISATION
_FLOATS = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Links:
    """Who makes and who reads every tensor."""

    made_by: dict[str, NodeProto]
    read_by: dict[str, list[NodeProto]]

    @classmethod
    def of(cls, nodes: Iterable[NodeProto]) -> Links:
        """The links between nodes."""
        made: dict[str, NodeProto] = {}
        read: dict[str, list[NodeProto]] = {}
        for node in nodes:
            made.update({o: node for o in node.output if o})
            for i in set(node.input):
                read.setdefault(i, []).append(node)
        return cls(made, read)

    def inputs_of(self, name: str, inputs: Iterable[str]) -> list[str]:
        """The graph inputs that a tensor depends on, in graph order."""
        seen, stack = {name}, [name]
        while stack:
            node = self.made_by.get(stack.pop())
            for i in node.input if node is not None else ():
                if i and i not in seen:
                    seen.add(i)
                    stack.append(i)
        return [i for i in inputs if i in seen]


def tables(study: Study, links: Links, shapes: cost.Shapes, levels: dict[str, str]) -> list[Table]:
    """The tables that computed ids are looked up in, largest first.

    Args:
        study: The model.
        links: Its links.
        shapes: Shapes at the expected number of candidates.
        levels: Level per tensor.
    """
    tensors = {t.name: t for t in study.model.graph.initializer}
    names = [i.name for i in study.declared]
    found: dict[str, Table] = {}
    for table, ids in _lookups(study.model.graph.node, set(tensors)):
        t = tensors[table]
        shape = shapes.shape(ids)
        inputs = links.inputs_of(ids, names)
        if len(t.dims) != 2 or shape is None or not inputs:
            continue
        level = levels.get(ids, "candidate")
        count = prod(shape)
        needed = count // max(1, _rows(shapes, ids)) if level in ("constant", "request") else count
        size = prod(t.dims) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize
        before = found.get(table)
        if before is not None:
            count, needed = count + before.lookups, needed + before.needed
            inputs = list(dict.fromkeys([*before.inputs, *inputs]))
            level = level if level == before.level else "mixed"
        found[table] = Table(table, t.dims[0], t.dims[1], size, count, needed, level, tuple(inputs))
    return sorted(found.values(), key=lambda t: -t.bytes)


def _rows(shapes: cost.Shapes, name: str) -> int:
    """Number of rows of candidates that a tensor has."""
    found = shapes.facts.extents.get(name) or shapes.inputs.get(name) or ()
    return prod(shapes.symbol(s) for _, syms in found for s in syms if is_candidate_symbol(s))


def _lookups(nodes: Iterable[NodeProto], tables: set[str]) -> Iterable[tuple[str, str]]:
    """Tables and the ids that are looked up in them."""
    for node in nodes:
        if operator(node) in ("Gather", "GatherND") and node.input[0] in tables and node.input[1] not in tables:
            yield node.input[0], node.input[1]


def sequences(study: Study, links: Links) -> list[SequenceInput]:
    """Inputs that hold a sequence per row: ids looked up together, or vectors, and who takes them in."""
    initializers = {t.name for t in study.model.graph.initializer}
    out = []
    for i in study.declared:
        steps = _steps(i)
        if steps is None:
            continue
        looked_up = _looked_up(i.name, links, initializers)
        if i.dtype not in _FLOATS and not looked_up:
            continue
        begin = [o for node, _ in looked_up for o in node.output] or [i.name]
        used = tuple(dict.fromkeys(table for _, table in looked_up))
        out.append(SequenceInput(i.name, steps, i.role.level, used, _readers(begin, links)))
    return out


def _steps(i: Input) -> int | None:
    """Steps of an input that may be a sequence: an id or a vector per step; None for other inputs."""
    axis = i.role.candidate_axis
    rest = [d for k, d in enumerate(i.dims) if k != (0 if axis is None else axis)]
    steps = rest[0] if len(rest) == (2 if i.dtype in _FLOATS else 1) else None
    if not steps or i.role.record is not None:
        return None
    return 0 if symbols([steps]) else int(steps[0])


def _looked_up(name: str, links: Links, tables: set[str]) -> list[tuple[NodeProto, str]]:
    """Lookups that a tensor's entries reach as they are."""
    out, stack, seen = [], [name], {name}
    while stack:
        current = stack.pop()
        for node in links.read_by.get(current, []):
            if operator(node) == "Gather" and node.input[1] == current and node.input[0] in tables:
                out.append((node, node.input[0]))
            elif _passes(node):
                fresh = [o for o in node.output if o and o not in seen]
                seen.update(fresh)
                stack += fresh
    return out


def _passes(node: NodeProto) -> bool:
    """Whether ids that a node reads are among those that it gives, in their order."""
    found = traits(node)
    apart = found & (Trait.PICK | Trait.LOOKUP) and operator(node) != "Expand"
    return bool(found & (Trait.CHOICE | Trait.CAST)) or (Trait.MOVEMENT in found and not apart)


def _readers(begin: Sequence[str], links: Links) -> tuple[str, ...]:
    """The first operators downstream that take in more than one step at a time."""
    out: list[str] = []
    stack, seen = list(begin), set(begin)
    while stack:
        for node in links.read_by.get(stack.pop(0), []):
            if traits(node) & _READERS or operator(node) in ("Scan", "Loop", "TopK"):
                out.append(node.op_type)
                continue
            fresh = [o for o in node.output if o and o not in seen]
            seen.update(fresh)
            stack += fresh
    return tuple(dict.fromkeys(out))
