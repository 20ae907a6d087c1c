"""What a rewrite has written: who makes and who reads its tensors, how often they are made, and their shapes.

Passes that come once all nodes are written ask this; rules ask `rewrite.Rewrite`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import NodeProto

from onnxrank import cost
from onnxrank.graphs import attribute, reads
from onnxrank.operators import Trait, domain_of, operator, traits
from onnxrank.rewrite import Rewrite
from onnxrank.values import Dim, Dims, Level, Source, canonical, extents, is_candidate_symbol, symbols

MOST_AXES = 8
"""Axes of a shape at most that is looked at."""
_DEEP = 40
"""Nodes at most by which a shape follows from others."""


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
        self._shapes: dict[str, Dims | None] = {}

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
        shape, held = self._rw.stored(node.input[1], MOST_AXES), self._rw.layout.sizes.held.get(node.input[1])
        if shape is None:
            return held is not None and held[-1:] == columns != ()
        return bool(shape.size and not symbols(columns) and shape[-1] == extents(columns)[0])

    def dims(self, name: str, deep: int = _DEEP) -> Dims | None:
        """Shape of a tensor, where that is known or follows from what it is made of.

        Args:
            name: The tensor.
            deep: Nodes at most by which it may follow from others.
        """
        if name not in self._shapes:
            self._shapes[name] = self._shape(name, deep)
        return self._shapes[name]

    def axes(self, node: NodeProto, rank: int) -> set[int] | None:
        """The axes of a reduction; None where they are not constants."""
        given = attribute(node, "axes", None)
        if len(node.input) > 1 and node.input[1]:
            held = self._rw.stored(node.input[1], MOST_AXES)
            given = None if held is None else held.tolist()
        return None if given is None or len(given) == 0 else {int(a) % rank for a in given}

    def rank(self, name: str) -> int | None:
        """Number of a tensor's axes, where that is known."""
        found, node = self.dims(name), self._made.get(name)
        if found is None and node is not None and operator(node) == "Reshape":
            shape = self._rw.stored(node.input[1], MOST_AXES)
            return None if shape is None else shape.size
        return None if found is None else len(found)

    def _shape(self, name: str, deep: int) -> Dims | None:
        source, stored, node = self.sources.get(name), self._rw.emit.initializers.get(name), self._made.get(name)
        if source is not None:
            return source.dims
        if stored is not None:
            return tuple(canonical([n]) for n in stored.dims)
        if node is None or not deep or domain_of(node) or name != node.output[0] or not node.input:
            return None
        given = [self.dims(i, deep - 1) for i in node.input]
        moved = {
            "Concat": self._joined,
            "Expand": self._expanded,
            "Gather": self._picked,
            "Reshape": self._reshaped,
            "Slice": self._cut,
            "Transpose": self._turned,
        }.get(operator(node))
        return self._computed(node, given) if moved is None else moved(node, given)

    def _computed(self, node: NodeProto, given: Sequence[Dims | None]) -> Dims | None:
        """Shape that a node gives which moves nothing."""
        op, first = operator(node), given[0]
        if traits(node) & Trait.ELEMENTWISE:
            return first if traits(node) & Trait.PARAMETERS else _together(given)
        if first is None or op == "Softmax" or op.endswith("Normalization"):
            return first
        if op in ("Gemm", "MatMul"):
            second = given[1]
            if second is None or min(len(first), len(second)) < 2:
                return None
            if op == "Gemm":
                return first[bool(attribute(node, "transA", 0))], second[not attribute(node, "transB", 0)]
            lead = _together([first[:-2], second[:-2]])
            return None if lead is None else (*lead, first[-2], second[-1])
        axes = self.axes(node, len(first)) if op.startswith("Reduce") and first else None
        if axes is None:
            return None
        keep = attribute(node, "keepdims", 1)
        return tuple(() if k in axes else d for k, d in enumerate(first) if keep or k not in axes)

    def _expanded(self, node: NodeProto, given: Sequence[Dims | None]) -> Dims | None:
        """Shape that an Expand gives of a tensor of as many axes, whose extents are all constant."""
        x, shape = given[0], self._rw.stored(node.input[1], MOST_AXES)
        if x is None or shape is None or shape.size != len(x) or symbols(x):
            return None
        return tuple(canonical([max(n, int(m))]) for n, m in zip(extents(x), shape, strict=True))

    def _picked(self, node: NodeProto, given: Sequence[Dims | None]) -> Dims | None:
        """Shape that a Gather gives."""
        x, at = given
        if not x or at is None:
            return None
        axis = attribute(node, "axis", 0) % len(x)
        return (*x[:axis], *at, *x[axis + 1 :])

    def _turned(self, node: NodeProto, given: Sequence[Dims | None]) -> Dims | None:
        """Shape that a Transpose gives."""
        x = given[0]
        return None if x is None else tuple(x[a] for a in attribute(node, "perm") or range(len(x))[::-1])

    def _cut(self, node: NodeProto, given: Sequence[Dims | None]) -> Dims | None:
        """Shape that a Slice gives by constant ends, forwards along axes of constant extents."""
        x, ends = given[0], [self._rw.stored(i, MOST_AXES) for i in node.input[1:]]
        if x is None or len(ends) != 4 or any(e is None for e in ends):
            return None
        out = list(x)
        for start, end, axis, step in zip(*(e.tolist() for e in ends if e is not None), strict=True):
            if symbols((out[axis],)) or step < 1:
                return None
            out[axis] = canonical([len(range(extents((out[axis],))[0])[start:end:step])])
        return tuple(out)

    def _joined(self, node: NodeProto, given: Sequence[Dims | None]) -> Dims | None:
        """Shape that a Concat along an axis of constant extents gives."""
        known, axis = [p for p in given if p is not None], attribute(node, "axis", 0)
        if len(known) < len(given) or symbols(tuple(p[axis] for p in known)):
            return None
        out = list(known[0])
        out[axis] = canonical([sum(extents((p[axis],))[0] for p in known)])
        return tuple(out)

    def _reshaped(self, node: NodeProto, given: Sequence[Dims | None]) -> Dims | None:
        """Shape that a Reshape gives."""
        shape = self._rw.stored(node.input[1], MOST_AXES)
        if shape is None:
            return self._rw.layout.sizes.held.get(node.input[1])
        if (shape >= 1).all():
            return tuple(canonical([int(n)]) for n in shape)
        x = given[0]
        if x is None or (shape == 0).any() or (shape < 0).sum() != 1:
            return None
        # What is left for the open axis: nothing but symbols, or nothing but a number.
        fixed = prod(int(n) for n in shape if n > 0)
        left, rest = prod(extents(x)) // max(1, fixed), symbols(x)
        if left * fixed != prod(extents(x)) or (left != 1 and rest):
            return None
        return tuple(canonical(rest if n < 0 and rest else [left if n < 0 else int(n)]) for n in shape)


def _together(given: Sequence[Dims | None]) -> Dims | None:
    """Shape of tensors that are broadcast together, where extents are equal or constant ones."""
    out: list[Dim] = []
    for dims in given:
        if dims is None:
            return None
        short, long = sorted((list(dims), out), key=len)
        short = [()] * (len(long) - len(short)) + short
        out = [a or b for a, b in zip(short, long, strict=True)]
        if any(a and b and a != b for a, b in zip(short, long, strict=True)):
            return None
    return tuple(out)
