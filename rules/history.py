"""`history`: keys that a mask hides from a query do not reach it.

A candidate that is appended to the user's history under a mask that hides it from the history's rows leaves those rows
request-level, through any number of layers: `softmax(a ++ (b - inf)) = softmax(a) ++ 0`. That a key is hidden is read
off the mask, for every row, by intervals (`onnxrank.intervals`): data-dependent padding may add to a mask, never take
from it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.graphs import attribute
from onnxrank.intervals import Intervals
from onnxrank.moves import Movement
from onnxrank.operators import find, operator
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import HOLE, Abstract, Dims, Level, Unrepresentable, Value, extents

from . import attention, movement
from .elementwise import elementwise


def softmax(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Softmax over keys some of which are hidden from some queries."""
    x = rw.value(node, 0)
    axis = attribute(node, "axis", -1 if rw.emit.opset >= 13 else 1) % x.rank
    if axis != x.rank - 1 or x.whole is not None or rw.single_level(x):
        return None
    levels = rw.sources.levels(x.codes)
    kinds = levels == Level.CANDIDATE
    mixed = kinds.any(-1) & (levels <= Level.REQUEST).any(-1)
    if not mixed.any():
        return None
    hidden, masked = Masks(rw).hidden(node.input[0], x.dims, axis)
    if hidden is None:
        return None
    hidden = hidden & kinds & mixed[..., None]
    if not hidden.any():
        if masked:
            rw.refuse("history", "the mask does not prove that a row cannot see the candidate: where all of its keys "
                      "may be masked alike, softmax spreads over all of them")  # fmt: skip
        return None
    return attention.joined(rw, node, hidden, "history")


class Masks(Intervals):
    """Intervals of masks, and of what they add to scores.

    Args:
        rw: The rewrite.
    """

    def __init__(self, rw: Rewrite) -> None:
        super().__init__(_Tensors(rw))


class _Tensors:
    """The original's tensors, as far as a rewrite has got."""

    def __init__(self, rw: Rewrite) -> None:
        self.producers, self._rw = rw.producers, rw

    def shape_of(self, name: str) -> Dims | None:
        found = self._rw.values.get(name)
        return None if found is None else found.dims

    def type_of(self, name: str) -> int:
        found = self._rw.values.get(name)
        return 0 if found is None else found.dtype

    def data_of(self, name: str) -> NDArray[Any] | None:
        found = self._rw.values.get(name)
        whole = getattr(found, "whole", None)
        if found is None or whole is None or whole.level is not Level.CONSTANT:
            return None
        data: NDArray[Any] = whole.data.reshape(extents(found.dims))
        return data

    def moves_of(self, node: NodeProto) -> list[Movement] | None:
        entry = find(node)
        try:
            return None if entry is None or entry.move is None else entry.move(movement.placed(self._rw, node))
        except Unrepresentable:
            return None


def nan_to_zero(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """`Where(IsNaN(w), 0, w)`, as exporters guard rows without keys: a weight that is 0 for sure stays that."""
    test, number = rw.producers.get(node.input[0]), rw.array(node, 1)
    if test is None or operator(test) != "IsNaN" or test.input[0] != node.input[2]:
        return None
    w = rw.value(node, 2)
    if number is None or number.any() or number.size != 1 or w.whole is not None:
        return None
    zero = rw.zero(w.dtype)
    known = w.codes == zero
    if not known.any() or rw.value(node, 0).dims != w.dims:
        return None
    values = [Value(v.dims, v.dtype, None, np.where(known, HOLE, v.codes)) for v in (rw.value(node, 0), w)]
    made = elementwise(rw, "Where", [values[0], rw.value(node, 1), values[1]], node.output[0])
    return [rw.tidy(w.dims, w.dtype, np.where(known, zero, made.codes))]


RULE = Rule(
    name="history",
    title="Keeps the history request-level where a mask hides the appended candidate from it, at every depth.",
    identity="softmax(a ++ (b - inf)) = softmax(a) ++ 0",
    source="candidate-isolating masks (M-FALCON, arXiv 2402.17152); proved from the mask here",
    legal="The mask is minus infinity for the candidate's key, or a million below a key that the row sees for sure.",
    refuses="Finite masks in rows all of whose keys may be masked, and masks the caller gives.",
    exactness="reassociates",
    operators={"Softmax": softmax, "Where": nan_to_zero},
    cost="The encoder runs over the history once instead of N times; each candidate is one query per layer. Nothing "
    "is added.",
)
