"""What a rewrite has written: who makes and who reads its tensors, how often they are made, and their shapes.

Passes that come once all nodes are written ask this; rules ask `rewrite.Rewrite`.
"""

from __future__ import annotations

from math import prod

from onnx import NodeProto

from onnxrank import cost
from onnxrank.graphs import attribute, reads
from onnxrank.operators import operator
from onnxrank.rewrite import Rewrite
from onnxrank.values import Dims, Level, Source, canonical, extents, is_candidate_symbol, symbols

_MOST_AXES = 8
"""Axes of a shape at most that is looked at."""


def entries(dims: Dims) -> int:
    """Entries of a tensor, per candidate where it has rows of them; lengths count as `cost.LENGTH`."""
    count: int = prod(extents(dims)) * cost.LENGTH ** sum(not is_candidate_symbol(s) for s in symbols(dims))
    return count


class Written:
    """The new graph as it was when this was made.

    Args:
        rw: A rewrite that has written its nodes.

    Attributes:
        sources: The tensors that the rewrite knows, by name.
    """

    def __init__(self, rw: Rewrite) -> None:
        self._rw = rw
        nodes = [e.proto for e in rw.emit.nodes]
        self._made = {o: n for n in nodes for o in n.output if o}
        self._readers: dict[str, list[NodeProto]] = {}
        for n in nodes:
            for i in reads(n):
                self._readers.setdefault(i, []).append(n)
        self._outputs = set(rw.outputs)
        self.sources = rw.sources.named()
        self._levels: dict[str, Level] = {}

    def maker(self, name: str) -> NodeProto | None:
        """The node that makes a tensor."""
        return self._made.get(name)

    def only_reader(self, name: str) -> NodeProto | None:
        """The node that reads a tensor, once, where nothing else does."""
        found = self._readers.get(name, [])
        return found[0] if len(found) == 1 and name not in self._outputs else None

    def own_maker(self, name: str) -> NodeProto | None:
        """The node that makes a tensor which one other reads, and that once: it is free to go with that one."""
        return self._made.get(name) if self.only_reader(name) is not None else None

    def source(self, name: str) -> Source | None:
        """What the rewrite knows of a tensor."""
        return self.sources.get(name)

    def level(self, name: str) -> Level:
        """How often a tensor is made: as often as what it is computed from."""
        if name not in self._levels:
            source, node = self.sources.get(name), self._made.get(name)
            if source is not None:
                self._levels[name] = source.level
            elif name in self._rw.emit.initializers:
                self._levels[name] = Level.CONSTANT
            else:
                read = reads(node) if node is not None else []
                self._levels[name] = max((self.level(i) for i in read if i), default=Level.CANDIDATE)
        return self._levels[name]

    def keeps_columns(self, node: NodeProto, columns: Dims) -> bool:
        """Whether a Reshape leaves the last axis as it is, which is given."""
        if operator(node) != "Reshape":
            return False
        shape, held = self._rw.stored(node.input[1], _MOST_AXES), self._rw.layout.sizes.held.get(node.input[1])
        if shape is None:
            return held is not None and held[-1:] == columns != ()
        return bool(shape.size and not symbols(columns) and shape[-1] == extents(columns)[0])

    def dims(self, name: str) -> Dims | None:
        """Shape of a tensor that is known."""
        source, stored = self.sources.get(name), self._rw.emit.initializers.get(name)
        if source is not None:
            return source.dims
        if stored is not None:
            return tuple(canonical([n]) for n in stored.dims)
        node = self._made.get(name)
        if node is None:
            return None
        step = {
            "Concat": self._joined,
            "Div": self._scaled,
            "Expand": self._expanded,
            "Mul": self._scaled,
            "Reshape": self._reshaped,
            "Slice": self._cut,
            "Transpose": self._turned,
        }.get(operator(node))
        return None if step is None else step(node)

    def rank(self, name: str) -> int | None:
        """Number of a tensor's axes, where that is known."""
        found, node = self.dims(name), self._made.get(name)
        if found is None and node is not None and operator(node) == "Reshape":
            shape = self._rw.stored(node.input[1], _MOST_AXES)
            return None if shape is None else shape.size
        return None if found is None else len(found)

    def _expanded(self, node: NodeProto) -> Dims | None:
        """Shape that an Expand gives of a tensor of as many axes, whose extents are all constant."""
        x, shape = self.dims(node.input[0]), self._rw.stored(node.input[1], _MOST_AXES)
        if x is None or shape is None or shape.size != len(x) or symbols(x):
            return None
        return tuple(canonical([max(n, int(m))]) for n, m in zip(extents(x), shape, strict=True))

    def _turned(self, node: NodeProto) -> Dims | None:
        """Shape that a Transpose gives."""
        x = self.dims(node.input[0])
        return None if x is None else tuple(x[a] for a in attribute(node, "perm") or range(len(x))[::-1])

    def _cut(self, node: NodeProto) -> Dims | None:
        """Shape that a Slice gives by constant ends, forwards along axes of constant extents."""
        x, given = self.dims(node.input[0]), [self._rw.stored(i, _MOST_AXES) for i in node.input[1:]]
        if x is None or len(given) != 4 or any(g is None for g in given):
            return None
        out = list(x)
        for start, end, axis, step in zip(*(g.tolist() for g in given if g is not None), strict=True):
            if symbols((out[axis],)) or step < 1:
                return None
            out[axis] = canonical([len(range(extents((out[axis],))[0])[start:end:step])])
        return tuple(out)

    def _joined(self, node: NodeProto) -> Dims | None:
        """Shape that a Concat along an axis of constant extents gives."""
        parts, axis = [self.dims(i) for i in node.input], attribute(node, "axis", 0)
        known = [p for p in parts if p is not None]
        if len(known) < len(parts) or symbols(tuple(p[axis] for p in known)):
            return None
        out = list(known[0])
        out[axis] = canonical([sum(extents((p[axis],))[0] for p in known)])
        return tuple(out)

    def _scaled(self, node: NodeProto) -> Dims | None:
        """Shape of a tensor of which every entry meets a number."""
        found = [self.dims(i) for i in node.input]
        for x, number in (found, found[::-1]):
            if x is not None and number is not None and not any(number) and len(number) <= len(x):
                return x
        return None

    def _reshaped(self, node: NodeProto) -> Dims | None:
        """Shape that a Reshape gives."""
        shape = self._rw.stored(node.input[1], _MOST_AXES)
        if shape is None:
            return self._rw.layout.sizes.held.get(node.input[1])
        if (shape >= 1).all():
            return tuple(canonical([int(n)]) for n in shape)
        x = self.dims(node.input[0])
        if x is None or (shape == 0).any() or (shape < 0).sum() != 1:
            return None
        # What is left for the open axis: nothing but symbols, or nothing but a number.
        fixed = prod(int(n) for n in shape if n > 0)
        left, rest = prod(extents(x)) // max(1, fixed), symbols(x)
        if left * fixed != prod(extents(x)) or (left != 1 and rest):
            return None
        return tuple(canonical(rest if n < 0 and rest else [left if n < 0 else int(n)]) for n in shape)
