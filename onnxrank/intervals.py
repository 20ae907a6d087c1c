"""Bounds of entries, and which scores a mask hides.

A mask of minus infinity hides a key whatever else there is (a row without any key left is NaN before and after). A
finite one does so only in rows that see another key for sure: where all keys of a row are masked alike, softmax spreads
over all of them. Bounds speak of numbers: an entry that is none, as 0 times infinity, is outside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnxrank import runtime
from onnxrank.graphs import attribute
from onnxrank.moves import Movement
from onnxrank.operators import Trait, having, operator, traits
from onnxrank.segments import spans
from onnxrank.values import Dims, extents

_LARGEST = 1 << 22
Interval = tuple[NDArray[np.float64], NDArray[np.float64]]
Step = Callable[[NodeProto, Sequence[Interval]], "Interval | None"]
"""Least and greatest value of every entry; truth is 0 or 1."""


class Tensors(Protocol):
    """What has to be known of a graph's tensors."""

    @property
    def producers(self) -> Mapping[str, NodeProto]:
        """The node that makes each tensor."""

    def shape_of(self, name: str) -> Dims | None:
        """A tensor's factored shape, if known."""

    def type_of(self, name: str) -> int:
        """A tensor's element type; 0 where it is not known."""

    def moves_of(self, node: NodeProto) -> list[Movement] | None:
        """What a node moves where; None where that cannot be told."""

    def data_of(self, name: str) -> NDArray[Any] | None:
        """A constant's entries, in the shape of its constant extents."""


class Intervals:
    """Intervals of tensors, and of what masks add to scores.

    Args:
        tensors: The graph.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._known: dict[str, Interval] = {}

    def hidden(self, name: str, dims: Dims, axis: int) -> tuple[NDArray[np.bool_] | None, bool]:
        """Which scores get weight 0 in a softmax, whatever the inputs, where their row has others.

        Args:
            name: The scores.
            dims: Their factored shape.
            axis: The axis that the softmax is along.

        Returns:
            The scores; None where they are not one product that is scaled, masked and moved. And whether there seems
            to be a mask at all.
        """
        found = self.scores(name)
        if found is None:
            return None, False
        low, high = (np.broadcast_to(part, extents(dims)) for part in found)
        seen = low.max(axis, keepdims=True)
        hidden = spans.hides(self._tensors.type_of(name), high, seen)
        return hidden, bool((high < 0).any() or (low < 0).any())

    def scores(self, name: str, steps: int = 16) -> Interval | None:
        """Interval of what is added to scores that a tensor holds: scores count as 0 themselves.

        Returns:
            None where the tensor is not one product, scaled, masked and moved.
        """
        made = self._tensors.producers.get(name)
        if made is None or not steps or self._constant(name) is not None:
            return None
        if operator(made) in ("MatMul", "Einsum"):
            return np.zeros(()), np.zeros(())
        if not traits(made) & _ON_SCORES and operator(made) not in ("Transpose", "Cast", "Where", "Dropout"):
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
            made = self._tensors.producers.get(top)
            needs = [i for i in made.input if i] if made is not None and self._constant(top) is None else []
            missing = [i for i in needs if i not in self._known] if made and _is_followed(made) else []
            if missing and top not in self._known:
                stack += missing
            else:
                self._known.setdefault(top, self._interval(top, made))
                stack.pop()
        return self._known[name]

    def _extents(self, name: str) -> tuple[int, ...]:
        dims = self._tensors.shape_of(name)
        assert dims is not None
        return extents(dims)

    def _constant(self, name: str) -> NDArray[np.float64] | None:
        dims = self._tensors.shape_of(name)
        if dims is None or prod(extents(dims)) > _LARGEST:
            return None
        data = self._tensors.data_of(name)
        return data.astype(np.float64) if data is not None and data.dtype.kind in "biuf" else None

    def _interval(self, name: str, made: NodeProto | None) -> Interval:
        data = self._constant(name)
        if data is not None:
            return data, data
        truth, dims = self._tensors.type_of(name) == TensorProto.BOOL, self._tensors.shape_of(name)
        unknown = (np.zeros(()), np.ones(())) if truth else (np.array(-np.inf), np.array(np.inf))
        if made is None or not _is_followed(made) or dims is None or prod(extents(dims)) > _LARGEST:
            return unknown
        with np.errstate(invalid="ignore"):
            found = self._step(made, [self._known[i] for i in made.input if i])
        if found is None or any(np.isnan(part).any() for part in found):
            return unknown
        return found

    def _step(self, node: NodeProto, x: list[Interval]) -> Interval | None:
        """One operator on intervals; None where nothing is known of the result."""
        step = _STEPS.get(operator(node))
        return self._moved(node, x) if step is None else step(node, x)

    def _moved(self, node: NodeProto, x: list[Interval]) -> Interval | None:
        """Bounds moved as entries are."""
        if x[0][0].ndim == 0 and operator(node) != "Concat":
            return x[0]
        found = self._tensors.moves_of(node)
        if found is None or len(found) != 1:
            return None
        shapes = [self._extents(i) for i in (node.input if found[0].joins else node.input[:1])]
        low, high = (
            found[0].take(*(np.broadcast_to(x[j][k], shape) for j, shape in enumerate(shapes))) for k in (0, 1)
        )
        return low, high


_ON_SCORES = Trait.FREE | Trait.ADDITIVE | Trait.SCALING
"""What scores meet between their product and a softmax, beside transposes, casts, choices by a mask, and dropout."""


def _cast(low: NDArray[np.float64], high: NDArray[np.float64], to: int) -> Interval:
    """An interval in another type: truth of numbers, whole numbers, or as it is."""
    if to == TensorProto.BOOL:
        away = (low > 0) | (high < 0)
        return away.astype(np.float64), ((low != 0) | (high != 0)).astype(np.float64)
    return (low, high) if to in runtime.FLOATS else (np.trunc(low), np.trunc(high))


def _clipped(node: NodeProto, x: Sequence[Interval]) -> Interval:
    """An interval cut at both ends, which are operands, or attributes before opset 11."""
    ends = dict(zip([k for k, i in enumerate(node.input) if i], x, strict=True))
    for k, (name, number) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
        ends.setdefault(k, (np.array(attribute(node, name, number)),) * 2)
    low, high = (np.minimum(np.maximum(x[0][k], ends[1][k]), ends[2][k]) for k in (0, 1))
    return low, high


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


def _folded(do: Callable[..., NDArray[np.float64]]) -> Step:
    """An operator on any number of operands that grows with each."""

    def step(node: NodeProto, x: Sequence[Interval]) -> Interval:
        low, high = (reduce(do, [part[k] for part in x]) for k in (0, 1))
        return low, high

    return step


def _chosen(node: NodeProto, x: Sequence[Interval]) -> Interval:
    """Where: one of two intervals, or what holds both, as the condition is known or not."""
    (when, sure), (a, b), (c, d) = x
    low = np.where(sure > 0, np.where(when > 0, a, np.minimum(a, c)), c)
    return low, np.where(sure > 0, np.where(when > 0, b, np.maximum(b, d)), d)


def _product(node: NodeProto, x: Sequence[Interval]) -> Interval:
    """Every product of ends may be one of the result."""
    ends = np.broadcast_arrays(*(a * b for a in x[0] for b in x[1]))
    return np.minimum.reduce(ends), np.maximum.reduce(ends)


def _quotient(node: NodeProto, x: Sequence[Interval]) -> Interval | None:
    """A product with the reciprocal, where that has one sign."""
    low, high = x[1]
    return None if (low <= 0).any() else _product(node, [x[0], (1 / high, 1 / low)])


def _is_followed(node: NodeProto) -> bool:
    """Whether bounds of an operator's result follow from those of its operands."""
    return operator(node) in _STEPS or Trait.MOVEMENT in traits(node)


_STEPS: dict[str, Step] = {
    **{op: _folded(np.minimum) for op in ("And", "Min")},
    **{op: _folded(np.maximum) for op in ("Or", "Max")},
    **{op: _folded(np.add) for op in ("Add", "Sum")},
    **dict.fromkeys(having(Trait.COMPARISON), lambda node, x: _compared(operator(node), x[0], x[1])),
    "Cast": lambda node, x: _cast(*x[0], attribute(node, "to")),
    "Clip": _clipped,
    "Dropout": lambda node, x: x[0],
    "Not": lambda node, x: (1 - x[0][1], 1 - x[0][0]),
    "Neg": lambda node, x: (-x[0][1], -x[0][0]),
    "Sub": lambda node, x: (x[0][0] - x[1][1], x[0][1] - x[1][0]),
    "Mul": _product,
    "Div": _quotient,
    "Where": _chosen,
}
"""What becomes of intervals, beside movement."""
