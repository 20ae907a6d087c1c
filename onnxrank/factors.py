"""Factors along the axis that a product sums over go to the side that is made once per request.

    (A diag(s)) V = A (diag(s) V)

Masks of attention without softmax, and what its weights are divided by, are such factors: on the weights they take a
pass over every candidate's, on the values one over the request's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank import cost
from onnxrank.emitter import Emitted
from onnxrank.operators import Trait, operator, traits
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import Dims, Level, Origin, Source, canonical, extents, is_candidate_symbol, symbols

RULE = "dot"
"""The rule that it is a decision of."""
_MOST_AXES = 8
"""Axes of a shape at most that is looked at."""


def move(rw: Rewrite) -> None:
    """Takes factors from a product's left side to its right one, wherever that pays.

    Args:
        rw: A rewrite that has written its nodes.
    """
    products = [(k, e) for k, e in enumerate(rw.emit.nodes) if operator(e.proto) == "MatMul"]
    graph = _Graph(rw) if products else None
    for k, e in products:
        assert graph is not None
        found = graph.moved(e)
        if found is not None:
            rw.emit.nodes[k] = found


@dataclass
class _Graph:
    """What was written, with who makes and who reads its tensors.

    Attributes:
        rw: The rewrite.
    """

    rw: Rewrite

    def __post_init__(self) -> None:
        nodes = [e.proto for e in self.rw.emit.nodes]
        self._made = {o: n for n in nodes for o in n.output if o}
        self._reads = Counter(i for n in nodes for i in n.input)
        self._reads.update(self.rw.outputs)
        self._sources = self.rw.sources.named()
        self._once: dict[str, bool] = {}

    def moved(self, e: Emitted) -> Emitted | None:
        """A product that does without the factors of its left side; None where there are none, or they stay."""
        left, right = e.proto.input
        rows = self._as_rows(left)
        whole = self._sources.get(left if rows is None else rows.input[0])
        if whole is None or whole.level is not Level.CANDIDATE or whole.dtype != TensorProto.FLOAT:
            return None
        found = list(self._factors(left if rows is None else rows.input[0], whole))
        if not found or len(whole.dims) < 2 or not self._is_once(right) or self._is_vector(e.proto):
            return None
        emit = self.rw.emit
        with emit.at(Origin(e.origin, e.proto.output[0], RULE)):
            if self.rw.decide(RULE, _ways(whole, len(found))) != TAKE:
                return None
            for op, factor, _ in found:
                if any(self._dims(factor) or ()):
                    factor = emit.add("Reshape", [factor, emit.constant(np.array([-1, 1], np.int64))])
                right = emit.add(op, [right, factor])
            left = found[-1][2]
            if rows is not None:
                left = emit.add("Reshape", [left, rows.input[1]])
        own = NodeProto()
        own.CopyFrom(e.proto)
        own.input[:] = [left, right]
        return replace(e, proto=own, rule=e.rule or RULE)

    def _is_vector(self, product: NodeProto) -> bool:
        """Whether a product's right side is a vector; only one that the original has can be, whose result is known."""
        left, made = self._sources.get(product.input[0]), self._sources.get(product.output[0])
        return left is not None and made is not None and len(made.dims) < len(left.dims)

    def _as_rows(self, name: str) -> NodeProto | None:
        """The Reshape that brings a tensor into rows and leaves its last axis as it is, if there is one."""
        node = self._made.get(name)
        if node is None or operator(node) != "Reshape" or self._reads[name] > 1:
            return None
        source, shape = self._sources.get(node.input[0]), self.rw.stored(node.input[1], _MOST_AXES)
        if source is None or shape is None or not source.dims or symbols(source.dims[-1:]):
            return None
        return node if shape[-1] == extents(source.dims)[-1] else None

    def _factors(self, name: str, whole: Source) -> Iterator[tuple[str, str, str]]:
        """Operators and factors that a tensor is the last result of, each with what it is applied to."""
        while self._reads[name] == 1 and name in self._made:
            node = self._made[name]
            if not traits(node) & Trait.SCALING:
                return
            sides = [(0, 1)] if operator(node) == "Div" else [(0, 1), (1, 0)]
            both = ((node.input[a], node.input[b]) for a, b in sides)
            found = next((p for p in both if self._dims(p[0]) == whole.dims and self._is_factor(p[1], whole)), None)
            if found is None:
                return
            name = found[0]
            yield operator(node), found[1], name

    def _is_factor(self, name: str, whole: Source) -> bool:
        """Whether a tensor is one number, or one for each entry of the last axis, the same for all candidates."""
        dims = self._dims(name)
        return dims is not None and not any(dims[:-1]) and dims[-1:] in ((), ((),), whole.dims[-1:])

    def _dims(self, name: str) -> Dims | None:
        """Shape of a tensor that is known."""
        source, stored = self._sources.get(name), self.rw.emit.initializers.get(name)
        if source is not None:
            return source.dims
        if stored is not None:
            return tuple(canonical([n]) for n in stored.dims)
        node = self._made.get(name)
        shape = self.rw.stored(node.input[1], _MOST_AXES) if node is not None and operator(node) == "Reshape" else None
        if node is None or shape is None:
            return None
        if (shape >= 1).all():
            return tuple(canonical([int(n)]) for n in shape)
        # One axis, wherever it is put.
        axes = [d for d in self._dims(node.input[0]) or () if d != ()]
        if len(axes) != 1 or sorted(shape)[1:] != [1] * (len(shape) - 1):
            return None
        return tuple(() if n == 1 else axes[0] for n in shape)

    def _is_once(self, name: str) -> bool:
        """Whether a tensor is computed from what is the request's."""
        if name not in self._once:
            source, node = self._sources.get(name), self._made.get(name)
            if source is not None:
                self._once[name] = source.level is Level.REQUEST
            else:
                read = [i for i in node.input if i not in self.rw.emit.initializers] if node is not None else []
                self._once[name] = bool(read) and all(map(self._is_once, read))
        return self._once[name]


def _ways(whole: Source, count: int) -> list[Alternative]:
    """What factors cost where they are, per candidate, and on the other side, per request."""
    entries = prod(extents(whole.dims)) * cost.LENGTH ** sum(not is_candidate_symbol(s) for s in whole.symbols)
    passes = cost.estimate(written=4 * count * entries)
    launches = cost.estimate(launches=count)
    return [Alternative(LEAVE, "", launches, passes), Alternative(TAKE, "reassociates", 2 * launches + passes, 0.0)]
