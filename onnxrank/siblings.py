"""Parts of one tensor that all go through the same function, or side by side again: taken once, and not one by one.

A packed input has a column for every feature. Exporters cut each out and convert it by itself, and rules bring those
of one level together again:

    f(x[:, a:b]), f(x[:, c:d]), ... = Split(f(x))
    Concat(x[:, a:b], x[:, c:d], ...) = Gather(x, [a, ..., b - 1, c, ..., d - 1, ...])

With a row or a few of them the number of nodes is what takes time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnxrank import surgery
from onnxrank.emitter import Emitted
from onnxrank.graphs import attribute, kind, rename
from onnxrank.operators import Trait, operator, traits
from onnxrank.rewrite import Rewrite
from onnxrank.values import Dims, extents, symbols
from onnxrank.written import Written

RULE = "movement"
"""The rule that it is accounted to."""
_LEAST = 3
"""Parts from which on fewer nodes are worth what else is computed, or copied one entry at a time."""
_UNREAD = 2
"""A function is computed of at most so many times the entries that are read."""
_WIDE = 4
"""Parts of more positions on average are copied faster as they lie than position by position."""
_TYPES = (TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64)
"""Types that runtimes split."""
_SPLIT_BY_INPUT = 13
"""Version of ONNX from which on Split reads its sizes."""
_FEW = 8
"""Entries of bounds and axes at most that are looked at."""


@dataclass(frozen=True, order=True)
class _Part:
    """Positions of one axis of a tensor.

    Attributes:
        start: The first.
        stop: The one behind the last.
        axis: The axis.
        whole: The tensor.
    """

    start: int
    stop: int
    axis: int
    whole: str


def join(rw: Rewrite) -> None:
    """Takes parts of tensors together, which changes no result.

    Args:
        rw: A rewrite that has written its nodes.
    """
    siblings = _Siblings(rw)
    while siblings.functions():
        pass
    siblings.concatenations()


class _Siblings:
    """The nodes of a rewrite, and which of them give parts of tensors."""

    def __init__(self, rw: Rewrite) -> None:
        self._rw, self._emit, self._written = rw, rw.emit, Written(rw)
        self._made = {o: e.proto for e in rw.emit.nodes for o in e.proto.output if o}
        self._dims: dict[str, Dims] = {}
        self._types: dict[str, int] = {}

    def functions(self) -> bool:
        """Has functions that parts of a tensor go through come before these are cut out; whether there were any."""
        found: dict[tuple[str, int, bytes], list[Emitted]] = {}
        for e in self._emit.nodes:
            node = e.proto
            if len(node.input) != 1 or not traits(node) & Trait.ELEMENTWISE:
                continue
            part = self._part(node.input[0])
            if part is not None:
                found.setdefault((part.whole, part.axis, kind(node)), []).append(e)
        return any([self._before(group) for group in found.values()])

    def _before(self, group: Sequence[Emitted]) -> bool:
        """Computes a function of a tensor, and then cuts out its parts; whether that pays."""
        own = {part: e for e in reversed(group) if (part := self._part(e.proto.input[0])) is not None}
        parts = sorted(own)
        first = own[parts[0]]
        whole, axis = parts[0].whole, parts[0].axis
        dims, before = self._shape(whole), self._type(whole)
        assert dims is not None
        size, dtype = extents(dims)[axis], attribute(first.proto, "to", before)
        if len(parts) < _LEAST or any(a.stop > b.start for a, b in pairwise(parts)):
            return False
        if size > _UNREAD * sum(p.stop - p.start for p in parts) or dtype not in _TYPES:
            return False
        if before is None or before == TensorProto.STRING:  # what is no number cannot be read as one
            return False
        made = self._emit.fresh(f"{whole}/{first.proto.op_type.lower()}")
        node = NodeProto()
        node.CopyFrom(first.proto)
        node.name, node.input[:], node.output[:] = made, [whole], [made]
        self._dims[made], self._types[made] = dims, dtype
        bounds = sorted({0, size, *(p.start for p in parts), *(p.stop for p in parts)})
        names = {p.start: own[p].proto.output[0] for p in parts}
        outputs = [names.get(a) or self._emit.fresh(f"{made}/unread") for a in bounds[:-1]]
        sizes = [b - a for a, b in pairwise(bounds)]
        if self._emit.opset >= _SPLIT_BY_INPUT:
            given = [made, self._emit.constant(np.array(sizes, np.int64), made)]
            split = surgery.node("Split", given, outputs, {"axis": axis})
        else:
            split = surgery.node("Split", [made], outputs, {"axis": axis, "split": sizes})
        self._replace(list(own.values()), [node, split])
        return True

    def concatenations(self) -> None:
        """Takes parts that are brought side by side from their tensor in one step."""
        for e in list(self._emit.nodes):
            if operator(e.proto) == "Concat":
                self._concatenation(e)

    def _concatenation(self, e: Emitted) -> None:
        operands: list[str] = []
        nodes: list[NodeProto] = []
        for part, group in groupby(e.proto.input, lambda name: self._along(e.proto, name)):
            names = list(group)
            parts = [p for p in map(self._part, names) if p is not None]
            taken = None if part is None else self._taken(parts, names[0])
            operands += names if taken is None else [taken.output[0] if isinstance(taken, NodeProto) else taken]
            nodes += [taken] if isinstance(taken, NodeProto) else []
        if len(operands) == len(e.proto.input):
            return
        if len(operands) > 1:
            own = NodeProto()
            own.CopyFrom(e.proto)
            own.input[:] = operands
            self._replace([e], [*nodes, own])
        elif nodes:
            rename(nodes[0], {operands[0]: e.proto.output[0]})
            self._replace([e], nodes)
        elif e.proto.output[0] not in self._rw.outputs:
            self._replace([e], [])
            for other in self._emit.nodes:
                rename(other.proto, {e.proto.output[0]: operands[0]})

    def _along(self, node: NodeProto, name: str) -> tuple[str, int] | None:
        """Of which tensor an operand of a Concat is a part, along the axis that it is concatenated along."""
        part = self._part(name)
        dims = None if part is None else self._shape(part.whole)
        if part is None or dims is None or attribute(node, "axis") % len(dims) != part.axis:
            return None
        return part.whole, part.axis

    def _taken(self, parts: Sequence[_Part], hint: str) -> NodeProto | str | None:
        """What gives parts of one tensor side by side: a node, or the tensor itself; None where that does not pay."""
        if len(parts) < 2:
            return None
        whole, axis = parts[0].whole, parts[0].axis
        dims = self._shape(whole)
        assert dims is not None
        positions = np.concatenate([np.arange(p.start, p.stop) for p in parts])
        if np.array_equal(positions, np.arange(extents(dims)[axis])):
            return whole
        name = self._emit.fresh(f"{hint}/together")
        if all(a.stop == b.start for a, b in pairwise(parts)):
            ends = [self._numbers(n) for n in (parts[0].start, parts[-1].stop, axis)]
            return surgery.node("Slice", [whole, *ends], [name], {}) if self._emit.opset >= 10 else None
        if len(parts) < _LEAST or len(positions) > _WIDE * len(parts):
            return None
        return surgery.node("Gather", [whole, self._emit.constant(positions, name)], [name], {"axis": axis})

    def _numbers(self, number: int) -> str:
        return self._emit.constant(np.array([number], np.int64))

    def _replace(self, old: Sequence[Emitted], new: Sequence[NodeProto]) -> None:
        """Puts nodes in the place of others."""
        first, gone = old[0], {id(e) for e in old}
        kept = [e for e in self._emit.nodes if id(e) not in gone]
        self._emit.nodes[:] = [*kept, *(Emitted(n, first.origin, first.rule or RULE) for n in new)]
        self._made |= {o: n for n in new for o in n.output}

    # --- parts -----------------------------------------------------------------------------------------------------

    def _part(self, name: str) -> _Part | None:
        """Which part of another tensor one is; None if it is not cut out of an axis of a constant extent."""
        node = self._made.get(name)
        dims = self._shape(node.input[0]) if node is not None and node.input else None
        if node is None or dims is None:
            return None
        if operator(node) == "Slice":
            return self._sliced(node, dims)
        if operator(node) == "Split":
            return self._split(node, dims, list(node.output).index(name))
        if operator(node) == "Gather":
            return self._gathered(node, dims)
        if operator(node) == "Unsqueeze":
            return self._column(node)
        return None

    def _sliced(self, node: NodeProto, dims: Dims) -> _Part | None:
        if self._emit.opset < 10:
            return None
        given = [self._constant(i) if i else None for i in node.input[1:]]
        if len(given) < 3 or any(g is None or g.size != 1 for g in given):
            return None
        start, stop, axis, *step = (int(g.item()) for g in given if g is not None)
        axis %= len(dims)
        if symbols((dims[axis],)) or step not in ([], [1]):
            return None
        found = range(extents(dims)[axis])[start:stop]
        return _Part(found.start, found.stop, axis, node.input[0]) if found else None

    def _split(self, node: NodeProto, dims: Dims, at: int) -> _Part | None:
        axis = attribute(node, "axis", 0) % len(dims)
        if symbols((dims[axis],)):
            return None
        size, count = extents(dims)[axis], len(node.output)
        sizes = [size // count] * count if size % count == 0 else None
        given = attribute(node, "split", None)
        if len(node.input) > 1 and node.input[1]:
            held = self._constant(node.input[1], size)
            given = [] if held is None else held.tolist()
        if given is not None:
            sizes = [int(n) for n in given]
        if sizes is None or len(sizes) != count or not sizes[at]:
            return None
        return _Part(sum(sizes[:at]), sum(sizes[: at + 1]), axis, node.input[0])

    def _gathered(self, node: NodeProto, dims: Dims) -> _Part | None:
        """One position that keeps its axis."""
        at, axis = self._constant(node.input[1]), attribute(node, "axis", 0) % len(dims)
        if at is None or at.shape != (1,) or symbols((dims[axis],)):
            return None
        start = int(at.item()) % extents(dims)[axis]
        return _Part(start, start + 1, axis, node.input[0])

    def _column(self, node: NodeProto) -> _Part | None:
        """One position whose axis is taken away and put back."""
        picked = self._made.get(node.input[0])
        dims = self._shape(picked.input[0]) if picked is not None and operator(picked) == "Gather" else None
        if picked is None or dims is None:
            return None
        at, axis = self._constant(picked.input[1]), attribute(picked, "axis", 0) % len(dims)
        axes = self._constant(node.input[1]) if len(node.input) > 1 else np.array(attribute(node, "axes", ()))
        if at is None or at.shape or symbols((dims[axis],)) or axes is None or axes.size != 1:
            return None
        if int(axes.item()) % len(dims) != axis:
            return None
        start = int(at) % extents(dims)[axis]
        return _Part(start, start + 1, axis, picked.input[0])

    def _constant(self, name: str, most: int = _FEW) -> NDArray[np.int64] | None:
        return self._rw.stored(name, most)

    def _shape(self, name: str) -> Dims | None:
        return self._dims.get(name) or self._written.dims(name)

    def _type(self, name: str) -> int | None:
        source = self._written.source(name)
        return self._types.get(name) if source is None else source.dtype
