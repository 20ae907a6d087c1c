"""`history`: keys that a mask hides from a query do not reach it.

A candidate that is appended to the user's history under a mask that hides it from the history's rows leaves those rows
request-level, through any number of layers: `softmax(a ++ (b - inf)) = softmax(a) ++ 0`. That a key is hidden is read
off the mask, for every row, by intervals: data-dependent padding may add to a mask, never take from it.

A mask of minus infinity hides a key whatever else there is (a row without any key left is NaN before and after). A
finite one does so only in rows that see another key for sure: where all keys of a row are masked alike, softmax spreads
over all of them, the candidate too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnxrank import runtime
from onnxrank.operators import operator
from onnxrank.rewrite import RESHAPES, Rewrite, Rule
from onnxrank.segments import spans
from onnxrank.values import HOLE, Abstract, Level, Value, extents

from . import attention
from .broadcast import attribute, elementwise

_LARGEST = 1 << 22
_RESHAPES = RESHAPES | {"Identity", "Dropout"}
_SCORES = {"MatMul", "Einsum"}
_ON_SCORES = {*_RESHAPES, "Transpose", "Cast", "Add", "Sub", "Where", "Mul", "Div"}
Interval = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Least and greatest value of every entry; truth is 0 or 1."""


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
    found = Masks(rw).scores(node.input[0])
    if found is None:
        return None
    low, high = (np.broadcast_to(part, extents(x.dims)) for part in found)
    seen = low.max(-1, keepdims=True)
    hidden = spans.hides(x.dtype, high, seen)
    hidden &= kinds & mixed[..., None]
    if not hidden.any():
        if (high < 0).any() or (low < 0).any():
            rw.refuse("history", "the mask does not prove that a row cannot see the candidate: where all of its keys "
                      "may be masked alike, softmax spreads over all of them")  # fmt: skip
        return None
    return attention.joined(rw, node, hidden, "history")


class Masks:
    """Intervals of masks, and of what they add to scores.

    Args:
        rw: The rewrite.
    """

    def __init__(self, rw: Rewrite) -> None:
        self.rw = rw
        self._known: dict[str, Interval] = {}

    def scores(self, name: str, steps: int = 16) -> Interval | None:
        """Interval of what is added to scores that a tensor holds: scores count as 0 themselves.

        Returns:
            None where the tensor is not one product, scaled, masked and moved.
        """
        made = self.rw.producers.get(name)
        if made is None or not steps or self._constant(name) is not None:
            return None
        if operator(made) in _SCORES:
            return np.zeros(()), np.zeros(())
        if operator(made) not in _ON_SCORES:
            return None
        mine = [self.scores(i, steps - 1) if i else None for i in made.input]
        if sum(m is not None for m in mine) != 1 or (operator(made) in ("Sub", "Div") and mine[0] is None):
            return None
        if operator(made) == "Where" and mine[0] is not None:
            return None
        if operator(made) == "Cast" and attribute(made, "to") not in runtime.FLOATS:
            return None
        if operator(made) in ("Mul", "Div"):
            number = self._constant(made.input[1 if mine[0] is not None else 0])
            if number is None or number.size != 1 or number.reshape(-1)[0] <= 0:
                return None
            factor = number.reshape(-1)[0] if operator(made) == "Mul" else 1 / number.reshape(-1)[0]
            low, high = next(m for m in mine if m is not None)
            return low * factor, high * factor
        with np.errstate(invalid="ignore"):
            return self._step(
                made, [m if m is not None else self.of(i) for m, i in zip(mine, made.input, strict=True) if i]
            )

    def of(self, name: str) -> Interval:
        """Interval of every entry of an original tensor, of a shape that broadcasts to the tensor's."""
        stack = [name]
        while stack:
            top = stack[-1]
            made = self.rw.producers.get(top)
            needs = [i for i in made.input if i] if made is not None and self._constant(top) is None else []
            missing = [i for i in needs if i not in self._known] if made and operator(made) in _FOLLOWED else []
            if missing and top not in self._known:
                stack += missing
            else:
                self._known.setdefault(top, self._interval(top, made))
                stack.pop()
        return self._known[name]

    def _constant(self, name: str) -> NDArray[np.float64] | None:
        found = self.rw.values.get(name)
        whole = getattr(found, "whole", None)
        if whole is None or whole.level is not Level.CONSTANT or whole.size > _LARGEST or found is None:
            return None
        data = whole.data.reshape(extents(found.dims))
        return data.astype(np.float64) if data.dtype.kind in "biuf" else None

    def _interval(self, name: str, made: NodeProto | None) -> Interval:
        data = self._constant(name)
        if data is not None:
            return data, data
        dtype = self.rw.values[name].dtype if name in self.rw.values else 0
        unknown = (np.zeros(()), np.ones(())) if dtype == TensorProto.BOOL else (np.array(-np.inf), np.array(np.inf))
        if made is None or operator(made) not in _FOLLOWED or prod(extents(self.rw.values[name].dims)) > _LARGEST:
            return unknown
        with np.errstate(invalid="ignore"):
            found = self._step(made, [self._known[i] for i in made.input if i])
        if found is None or any(np.isnan(part).any() for part in found):
            return unknown
        return found

    def _step(self, node: NodeProto, x: list[Interval]) -> Interval | None:
        """One operator on intervals; None where nothing is known of the result."""
        op = operator(node)
        shape = extents(self.rw.values[node.output[0]].dims)
        (low, high) = x[0]
        if op in _VARIADIC:
            sides = [reduce(_VARIADIC[op], [part[k] for part in x]) for k in (0, 1)]
            return sides[0], sides[1]
        if op == "Cast":
            return _cast(low, high, attribute(node, "to"))
        if op in _COMPARED:
            return _compared(op, x[0], x[1])
        if op == "Slice":
            return self._slice(node, low, high)
        if op in _RESHAPES:
            if low.ndim == 0:
                return low, high
            own = extents(self.rw.values[node.input[0]].dims)
            return tuple(np.broadcast_to(p, own).reshape(shape) for p in x[0])  # type: ignore[return-value]
        if op == "Transpose":
            perm = attribute(node, "perm") or list(range(len(shape)))[::-1]
            own = extents(self.rw.values[node.input[0]].dims)
            return tuple(np.broadcast_to(p, own).transpose(perm) for p in x[0])  # type: ignore[return-value]
        if op == "Expand":
            return low, high
        if op == "Concat":
            wide = [[np.broadcast_to(p, extents(self.rw.values[i].dims)) for p in v]
                    for i, v in zip(node.input, x, strict=True)]  # fmt: skip
            axis = attribute(node, "axis") % len(shape)
            return tuple(np.concatenate([w[k] for w in wide], axis) for k in (0, 1))  # type: ignore[return-value]
        if op == "Not":
            return 1 - high, 1 - low
        if op == "Neg":
            return -high, -low
        if op == "Where":
            (when, sure), (a, b), (c, d) = x
            return np.where(sure > 0, np.where(when > 0, a, np.minimum(a, c)), c), np.where(
                sure > 0, np.where(when > 0, b, np.maximum(b, d)), d
            )
        (other, most) = x[1]
        if op == "Sub":
            return low - most, high - other
        if op == "Div":
            if (other <= 0).any():
                return None
            other, most = 1 / most, 1 / other
        ends = np.broadcast_arrays(*(a * b for a in (low, high) for b in (other, most)))
        return np.minimum.reduce(ends), np.maximum.reduce(ends)

    def _slice(self, node: NodeProto, low: NDArray[np.float64], high: NDArray[np.float64]) -> Interval | None:
        """A slice by constants."""
        own = extents(self.rw.values[node.input[0]].dims)
        given = [self._constant(i) if i else None for i in node.input[1:]]
        if len(node.input) < 3 or any(g is None for g, i in zip(given, node.input[1:], strict=True) if i):
            return None
        starts, ends = ([int(v) for v in g.reshape(-1)] for g in given[:2] if g is not None)
        axes = range(len(starts)) if len(given) < 3 or given[2] is None else given[2].reshape(-1).astype(int).tolist()
        steps = [1] * len(starts) if len(given) < 4 or given[3] is None else given[3].reshape(-1).astype(int).tolist()
        if any(own[a] == 1 for a in axes) or min(steps) < 1:
            return None  # an axis of rows
        index = [slice(None)] * len(own)
        for a, start, end, step in zip(axes, starts, ends, steps, strict=True):
            index[a] = slice(start, end, step)
        both = [np.broadcast_to(part, own)[tuple(index)] for part in (low, high)]
        return both[0], both[1]


_VARIADIC: dict[str, Callable[..., NDArray[np.float64]]] = {
    **{"And": np.minimum, "Min": np.minimum, "Or": np.maximum, "Max": np.maximum, "Add": np.add, "Sum": np.add}
}
_COMPARED = {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
_FOLLOWED = {*_RESHAPES, *_VARIADIC, *_COMPARED}
_FOLLOWED |= {"Transpose", "Expand", "Concat", "Cast", "Slice", "Not", "Neg", "Where", "Sub", "Mul", "Div"}


def _cast(low: NDArray[np.float64], high: NDArray[np.float64], to: int) -> Interval:
    """An interval in another type: truth of numbers, whole numbers, or as it is."""
    if to == TensorProto.BOOL:
        away = (low > 0) | (high < 0)
        return away.astype(np.float64), ((low != 0) | (high != 0)).astype(np.float64)
    return (low, high) if to in runtime.FLOATS else (np.trunc(low), np.trunc(high))


def _compared(op: str, a: Interval, b: Interval) -> Interval:
    """Whether a comparison is sure to hold, and whether it may."""
    if op.startswith("Greater"):
        a, b, op = b, a, op.replace("Greater", "Less")
    (low, high), (other, most) = a, b
    if op == "Equal":
        sure, may = (low == high) & (other == most) & (low == other), (low <= most) & (other <= high)
    elif op == "Less":
        sure, may = high < other, low < most
    else:
        sure, may = high <= other, low <= most
    return sure.astype(np.float64), may.astype(np.float64)


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
