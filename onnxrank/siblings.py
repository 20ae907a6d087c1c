"""Parts of one tensor that all go through the same function, or side by side again: taken once, and not one by one.

A packed input has a column for every feature. Exporters cut each out and convert it by itself, and rules bring those
of one level together again:

    f(x[:, a:b]), f(x[:, c:d]), ... = Split(f(x))
    Concat(x[:, a:b], x[:, c:d], ...) = Gather(x, [a, ..., b - 1, c, ..., d - 1, ...])

With a row or a few of them the number of nodes is what takes time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from onnxrank.values import extents, symbols
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
_BY_INPUT = 10
"""The same of Slice and its bounds."""
_FEW = 8
"""Entries of bounds and axes at most that are looked at."""
_COLUMNS = 1 << 14
"""Columns of a packed input at most that are looked at."""


@dataclass(frozen=True, order=True)
class _Part:
    """Positions of one axis of a tensor.

    Attributes:
        start: The first.
        stop: The one behind the last.
        axis: The axis.
        size: How many there are in all.
        rank: Number of the tensor's axes.
        whole: The tensor.
    """

    start: int
    stop: int
    axis: int
    size: int
    rank: int
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

    def functions(self) -> bool:
        """Has functions that parts of a tensor go through come before these are cut out; whether there were any."""
        found: dict[tuple[str, int, bytes], dict[_Part, Emitted]] = {}
        for e in self._emit.nodes:
            if len(e.proto.input) == 1 and traits(e.proto) & Trait.ELEMENTWISE:
                part = self._part(e.proto.input[0])
                if part is not None:
                    found.setdefault((part.whole, part.axis, kind(e.proto)), {}).setdefault(part, e)
        return any([self._before(own) for own in found.values()])

    def _before(self, own: Mapping[_Part, Emitted]) -> bool:
        """Computes a function of a tensor, and then cuts out its parts; whether that pays.

        Args:
            own: The parts, with the nodes that compute it of them.
        """
        parts = sorted(own)
        if len(parts) < _LEAST or any(a.stop > b.start for a, b in pairwise(parts)):
            return False
        first, part = own[parts[0]], parts[0]
        read, given = map(self._type, (first.proto.input[0], first.proto.output[0]))
        if given not in _TYPES or read in (None, TensorProto.STRING):  # not all text can be read as a number
            return False
        if part.size > _UNREAD * sum(p.stop - p.start for p in parts):
            return False
        node, made = NodeProto(), self._emit.fresh(f"{part.whole}/{first.proto.op_type.lower()}")
        node.CopyFrom(first.proto)
        node.name, node.input[:], node.output[:] = made, [part.whole], [made]
        bounds = sorted({0, part.size, *(p.start for p in parts), *(p.stop for p in parts)})
        names = {p.start: e.proto.output[0] for p, e in own.items()}
        outputs = [names.get(a) or self._emit.fresh(f"{made}/unread") for a in bounds[:-1]]
        sizes = [b - a for a, b in pairwise(bounds)]
        operands, attrs = [made], {"axis": part.axis, "split": sizes}
        if self._emit.opset >= _SPLIT_BY_INPUT:
            operands, attrs = [made, self._emit.constant(np.array(sizes, np.int64), made)], {"axis": part.axis}
        self._replace(list(own.values()), [node, surgery.node("Split", operands, outputs, attrs)])
        return True

    def concatenations(self) -> None:
        """Takes parts that are brought side by side from their tensor in one step."""
        for e in list(self._emit.nodes):
            if operator(e.proto) == "Concat":
                self._concatenation(e)

    def _concatenation(self, e: Emitted) -> None:
        operands: list[str] = []
        nodes: list[NodeProto] = []
        for whole, group in groupby(e.proto.input, lambda name: self._along(e.proto, name)):
            names = list(group)
            taken = None if whole is None else self._taken([p for n in names if (p := self._part(n))], names[0])
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

    def _along(self, node: NodeProto, name: str) -> str | None:
        """Of which tensor an operand of a Concat is a part, along the axis that it is concatenated along."""
        part = self._part(name)
        return part.whole if part is not None and attribute(node, "axis") % part.rank == part.axis else None

    def _taken(self, parts: Sequence[_Part], hint: str) -> NodeProto | str | None:
        """What gives parts of one tensor side by side: a node, or the tensor itself; None where that does not pay."""
        first, name = parts[0], self._emit.fresh(f"{hint}/together")
        positions = np.concatenate([np.arange(p.start, p.stop) for p in parts])
        if np.array_equal(positions, np.arange(first.size)):
            return first.whole
        if len(parts) > 1 and all(a.stop == b.start for a, b in pairwise(parts)):
            ends = [self._emit.constant(np.array([n])) for n in (first.start, parts[-1].stop, first.axis)]
            return surgery.node("Slice", [first.whole, *ends], [name], {}) if self._emit.opset >= _BY_INPUT else None
        if len(parts) < _LEAST or len(positions) > _WIDE * len(parts):
            return None
        at = self._emit.constant(positions, name)
        return surgery.node("Gather", [first.whole, at], [name], {"axis": first.axis})

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
        if node is None or not node.input:
            return None
        if operator(node) == "Unsqueeze":
            return self._column(node)
        of = {"Slice": self._sliced, "Split": self._split, "Gather": self._gathered}.get(operator(node))
        dims = self._written.dims(node.input[0]) or self._written.dims(name)
        return of(node, len(dims), name) if of is not None and dims else None

    def _sliced(self, node: NodeProto, rank: int, _: str) -> _Part | None:
        given = [self._constant(i) if i else None for i in node.input[1:]]
        if len(given) < 3 or any(g is None or g.size != 1 for g in given):
            return None
        start, stop, axis, *step = (int(g.item()) for g in given if g is not None)
        size = self._extent(node.input[0], axis % rank, rank)
        found = range(size or 0)[start:stop]
        if size is None or not found or step not in ([], [1]):
            return None
        return _Part(found.start, found.stop, axis % rank, size, rank, node.input[0])

    def _split(self, node: NodeProto, rank: int, name: str) -> _Part | None:
        axis, count, at = attribute(node, "axis", 0) % rank, len(node.output), list(node.output).index(name)
        size = self._extent(node.input[0], axis, rank)
        if size is None:
            return None
        given: Sequence[int] | None = attribute(node, "split", None)
        if len(node.input) > 1 and node.input[1]:
            held = self._constant(node.input[1], size)
            given = [] if held is None else held.tolist()
        elif given is None:
            given = [size // count] * count
        if len(given) != count or sum(given) != size or not given[at]:
            return None
        return _Part(sum(given[:at]), sum(given[: at + 1]), axis, size, rank, node.input[0])

    def _gathered(self, node: NodeProto, rank: int, _: str) -> _Part | None:
        """One position that keeps its axis."""
        at, axis = self._constant(node.input[1]), attribute(node, "axis", 0) % rank
        size = self._extent(node.input[0], axis, rank)
        if at is None or at.shape != (1,) or not size:
            return None
        return _Part(int(at.item()) % size, int(at.item()) % size + 1, axis, size, rank, node.input[0])

    def _column(self, node: NodeProto) -> _Part | None:
        """One position whose axis is taken away and put back."""
        picked = self._made.get(node.input[0])
        dims = self._written.dims(node.output[0])
        if picked is None or not dims or operator(picked) != "Gather":
            return None
        at, axis, rank = self._constant(picked.input[1]), attribute(picked, "axis", 0) % len(dims), len(dims)
        axes = self._constant(node.input[1]) if len(node.input) > 1 else np.array(attribute(node, "axes", ()))
        size = self._extent(picked.input[0], axis, rank)
        if at is None or at.shape or not size or axes is None or axes.size != 1 or int(axes.item()) % rank != axis:
            return None
        return _Part(int(at) % size, int(at) % size + 1, axis, size, rank, picked.input[0])

    def _extent(self, name: str, axis: int, rank: int) -> int | None:
        """A constant extent of a tensor with so many axes, one in which inputs of both levels lie together included."""
        dims, node = self._written.dims(name), self._made.get(name)
        if dims is not None:
            return None if len(dims) != rank or symbols((dims[axis],)) else extents(dims)[axis]
        if node is None:
            return None
        op, along = operator(node), attribute(node, "axis", 0) % rank
        if op == "Gather" and along == axis:
            at = self._constant(node.input[1], _COLUMNS)
            return at.size if at is not None and at.ndim == 1 else None
        if op == "Concat":
            sizes = [self._extent(i, axis, rank) for i in node.input]
            known = [n for n in sizes if n is not None]
            if along == axis:
                return sum(known) if len(known) == len(sizes) else None
            return known[0] if known else None
        if op == "Expand":
            size = self._extent(node.input[0], axis, rank)
            return size if size is not None and size > 1 else None
        alone = len(node.input) == 1 and traits(node) & Trait.ELEMENTWISE
        return self._extent(node.input[0], axis, rank) if alone else None

    def _type(self, name: str) -> int | None:
        """Type of a tensor's entries, where that is known."""
        source, node = self._written.source(name), self._made.get(name)
        if source is not None or node is None:
            return None if source is None else source.dtype
        if operator(node) == "Cast":
            return int(attribute(node, "to"))
        same = traits(node) & Trait.MOVEMENT or (traits(node) & Trait.ELEMENTWISE and not traits(node) & Trait.BOOLEAN)
        return self._type(node.input[0]) if same and node.input else None

    def _constant(self, name: str, most: int = _FEW) -> NDArray[np.int64] | None:
        return self._rw.stored(name, most)
