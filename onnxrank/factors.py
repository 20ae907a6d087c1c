"""Factors along the axis that a product sums over go to the side that is made once per request.

    (A diag(s)) V = A (diag(s) V)

Masks of attention without softmax, and what its weights are divided by, are such factors: on the weights they take a
pass over every candidate's, on the values one over the request's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank import cost
from onnxrank.emitter import Emitted
from onnxrank.operators import Trait, operator, traits
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import Level, Origin, Source
from onnxrank.written import Written, entries

RULE = "dot"
"""The rule that it is a decision of."""


def move(rw: Rewrite) -> None:
    """Takes factors from a product's left side to its right one, wherever that pays.

    Args:
        rw: A rewrite that has written its nodes.
    """
    products = [(k, e) for k, e in enumerate(rw.emit.nodes) if operator(e.proto) == "MatMul"]
    if not products:
        return
    graph = _Products(rw, Written(rw))
    for k, e in products:
        found = graph.moved(e)
        if found is not None:
            rw.emit.nodes[k] = found


@dataclass
class _Products:
    """The products that were written.

    Attributes:
        rw: The rewrite.
        written: What it has written.
    """

    rw: Rewrite
    written: Written

    def moved(self, e: Emitted) -> Emitted | None:
        """A product that does without the factors of its left side; None where there are none, or they stay."""
        left, right = e.proto.input
        rows = self._as_rows(left)
        whole = self.written.source(left if rows is None else rows.input[0])
        if whole is None or whole.level is not Level.CANDIDATE or whole.dtype != TensorProto.FLOAT:
            return None
        found = list(self._factors(left if rows is None else rows.input[0], whole))
        if (
            not found
            or len(whole.dims) < 2
            or self.written.level(right) is not Level.REQUEST
            or self._is_vector(e.proto)
        ):
            return None
        emit = self.rw.emit
        with emit.at(Origin(e.origin, e.proto.output[0], RULE)):
            if self.rw.decide(RULE, _ways(whole, len(found))) != TAKE:
                return None
            for op, factor, _ in found:
                if any(self.written.dims(factor) or ()):
                    factor = emit.add("Reshape", [factor, emit.constant(np.array([-1, 1], np.int64))])
                right = emit.add(op, [right, factor])
            left = found[-1][2]
            if rows is not None:
                left = emit.reshaped_as(left, rows)
        own = NodeProto()
        own.CopyFrom(e.proto)
        own.input[:] = [left, right]
        return replace(e, proto=own, rule=e.rule or RULE)

    def _is_vector(self, product: NodeProto) -> bool:
        """Whether a product's right side is a vector; only one that the original has can be, whose result is known."""
        left, made = self.written.source(product.input[0]), self.written.source(product.output[0])
        return left is not None and made is not None and len(made.dims) < len(left.dims)

    def _as_rows(self, name: str) -> NodeProto | None:
        """The Reshape that brings a tensor into rows and leaves its last axis as it is, if there is one."""
        node = self.written.own_maker(name)
        if node is None or operator(node) != "Reshape":
            return None
        source = self.written.source(node.input[0])
        last = source.dims[-1:] if source is not None else ()
        return node if last and self.written.keeps_columns(node, last) else None

    def _factors(self, name: str, whole: Source) -> Iterator[tuple[str, str, str]]:
        """Operators and factors that a tensor is the last result of, each with what it is applied to."""
        while (node := self.written.own_maker(name)) is not None:
            if not traits(node) & Trait.SCALING:
                return
            sides = [(0, 1)] if operator(node) == "Div" else [(0, 1), (1, 0)]
            both = ((node.input[a], node.input[b]) for a, b in sides)
            found = next(
                (p for p in both if self.written.dims(p[0]) == whole.dims and self._is_factor(p[1], whole)), None
            )
            if found is None:
                return
            name = found[0]
            yield operator(node), found[1], name

    def _is_factor(self, name: str, whole: Source) -> bool:
        """Whether a tensor is one number, or one for each entry of the last axis, the same for all candidates."""
        dims = self.written.dims(name)
        return dims is not None and not any(dims[:-1]) and dims[-1:] in ((), ((),), whole.dims[-1:])


def _ways(whole: Source, count: int) -> list[Alternative]:
    """What factors cost where they are, per candidate, and on the other side, per request."""
    passes = cost.estimate(written=4 * count * entries(whole.dims))
    launches = cost.estimate(launches=count)
    return [Alternative(LEAVE, "", launches, passes), Alternative(TAKE, "reassociates", 2 * launches + passes, 0.0)]
