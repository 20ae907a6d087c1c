"""`pool`: sums, means and extrema over entries of several levels, one partial result per level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank.graphs import attribute
from onnxrank.operators import operator
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    Abstract,
    DeferredMatMul,
    Dims,
    Sum,
    Value,
    canonical,
    extents,
    is_candidate_symbol,
    symbols,
    view,
)

from .elementwise import elementwise, is_square
from .pieces import Piece
from .products import Contraction, distribute, partials, with_addend
from .rowwise import rowwise
from .unstack import axes_of, is_stack

_ADDITIVE = {"ReduceSum": "ReduceSum", "ReduceMean": "ReduceSum", "ReduceSumSquare": "ReduceSum"}
_EXTREMA = {"ReduceMax": "Max", "ReduceMin": "Min"}


def reduce(rw: Rewrite, node: NodeProto, rule: str = "pool") -> list[Abstract] | None:
    """A reduction, by levels where it is additive or an extremum; `rule` is its name in the report."""
    x = rw.operand(node, 0)
    if x is None:
        return None
    axes = axes_of(rw, node, x.rank)
    if axes is None:
        return None
    keep = bool(attribute(node, "keepdims", 1))

    def result(dims: Dims) -> Dims:
        return tuple(() if k in axes else d for k, d in enumerate(dims) if keep or k not in axes)

    if any(is_candidate_symbol(s) for a in axes for s in symbols([x.dims[a]])):
        rw.refuse(rule, f"{node.op_type} goes over the candidates")
        return None
    op = operator(node)
    if op == "ReduceSumSquare" and not (isinstance(x, Value) and x.whole is not None):
        x = elementwise(rw, "Mul", [rw.settle(x)] * 2, rw.emit.fresh(f"{node.output[0]}/square"))
    by_level = (op in _ADDITIVE or op in _EXTREMA) and axes and not _divides_integers(rw, node, x)
    by_level = by_level and not _centres_other_than_float(rw, node, x)
    by_level = by_level and not any(symbols([x.dims[a]]) for a in axes)
    if not by_level or (isinstance(x, Value) and x.whole is not None):
        return _whole(rw, node, axes, result, keep)
    # The reduced axes become one, at the place of the first.
    order = [k for k in range(x.rank) if k not in axes]
    at = sum(k < axes[0] for k in order)
    order[at:at] = axes
    count = prod(extents(x.dims)[a] for a in axes)

    def merged(v: Value) -> Value:
        dims = tuple(v.dims[k] for k in order)
        joined = (*dims[:at], canonical([count]), *dims[at + len(axes) :])
        return view(joined, v.dtype, v.codes.transpose(order).reshape(extents(joined)))

    def unmerged(v: Value) -> Value:
        dims = result(tuple(x.dims[k] for k in range(x.rank)))
        codes = v.codes.reshape(extents(dims))
        return view(dims, v.dtype, codes)

    unread = rw.needed.get(node.output[0]) if axes == [x.rank - 1] and keep else None
    if op in _EXTREMA:
        parts = partials(rw, merged(rw.settle(x)), at, _Reduction(rw, at, op, x.dtype), rule, unread)
        parts = [unmerged(p) for p in parts]
        return [parts[0] if len(parts) == 1 else elementwise(rw, _EXTREMA[op], parts, node.output[0])]

    def one(v: Value) -> Abstract:
        if op == "ReduceSum" and len(axes) == 1 and is_stack(rw, v.codes, axes[0]):
            dims = result(v.dims)
            each = [part.reshape(extents(dims)) for part in np.moveaxis(v.codes, axes[0], 0)]
            return rw.add([view(dims, v.dtype, part) for part in each], dims, v.dtype)
        how = _Reduction(rw, at, _ADDITIVE[op], v.dtype, count if op == "ReduceMean" else 1)
        parts = partials(rw, merged(v), at, how, rule, unread)
        return rw.add([unmerged(p) for p in parts], result(v.dims), v.dtype)

    if isinstance(x, Sum) and len(axes) == 1:
        return [distribute(rw, x, axes[0], one, rule, 1)]
    return [one(rw.settle(x))]


def _divides_integers(rw: Rewrite, node: NodeProto, x: Abstract) -> bool:
    """Whether a mean is one of whole numbers: those of its parts are rounded, and do not add up to it."""
    return operator(node) == "ReduceMean" and rw.constant_type(x.dtype).kind in "iu"


def _centres_other_than_float(rw: Rewrite, node: NodeProto, x: Abstract) -> bool:
    """Whether a mean is that of a LayerNorm which is written out, of a type other than float32.

    Without that mean as it is, onnxruntime takes what is left for an RMSNorm, and of other types it does not read the
    epsilon: it takes 1e-5.
    """
    if x.dtype == TensorProto.FLOAT or operator(node) != "ReduceMean":
        return False
    centred = [n for n in rw.readers(node.output[0]) if list(n.input) == [node.input[0], node.output[0]]]
    return any(is_square(rw, n) for c in centred if operator(c) == "Sub" for n in rw.readers(c.output[0]))


def _whole(
    rw: Rewrite, node: NodeProto, axes: Sequence[int], result: Callable[[Dims], Dims], keep: bool
) -> list[Abstract] | None:
    trailing = list(axes) == list(range(rw.value(node, 0).rank - len(axes), rw.value(node, 0).rank))
    if not keep and not trailing and rw.value(node, 0).whole is None:
        # Without the reduced axes the others move, and index maps of groups would have to follow.
        v = rw.held(rw.value(node, 0), symbols(rw.value(node, 0).dims[a] for a in axes))
        names = [rw.tensor(v), *(rw.tensor(rw.value(node, k)) for k in range(1, len(node.input)))]
        return rw.keep(node, names, [result(v.dims)], rw.present(v))
    return rowwise(rw, node, axes, lambda d: [result(d)])


@dataclass(eq=False)
class _Reduced(DeferredMatMul):
    """A reduction of a piece; columns that are equal count as often as they occur.

    Attributes:
        rw: The rewrite.
        piece: The piece.
        name: Its tensor.
        dims: Shape of the result.
        axis: The reduced axis.
        op: The operator.
        divisor: What a sum is divided by.
        dtype: Element type.
    """

    rw: Rewrite
    piece: Piece
    name: str
    dims: Dims
    axis: int
    op: str
    divisor: int
    dtype: int

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        emit, kind, data = self.rw.emit, self.rw.constant_type(self.dtype), self.name
        counts = np.bincount(self.piece.columns, minlength=self.piece.codes.shape[-1])
        times = int(counts[0]) if (counts == counts[0]).all() else 1
        if self.op in _EXTREMA:
            times = 1
        elif (counts != times).any():
            shape = [-1 if k == self.axis else 1 for k in range(len(self.dims))]
            data = emit.add("Mul", [data, emit.constant(counts.reshape(shape).astype(kind))])
        out = data if len(counts) == 1 else emit.reduce(self.op, data, [self.axis], True)
        if times > 1:
            out = emit.add("Mul", [out, emit.number(times, kind, len(self.dims))])
        if self.divisor > 1:
            out = emit.add("Div", [out, emit.number(self.divisor, kind, len(self.dims))])
        return with_addend(self.rw, out, addend)


@dataclass(eq=False)
class _Reduction(Contraction):
    """Reductions of pieces.

    Attributes:
        rw: The rewrite.
        axis: The reduced axis.
        op: The reduction.
        dtype: Element type.
        divisor: What sums are divided by.
    """

    rw: Rewrite
    axis: int
    op: str
    dtype: int
    divisor: int = 1

    def __post_init__(self) -> None:
        self.width = 1
        self.additive = self.divisor == 1 and self.op == "ReduceSum"
        self.idempotent = self.op in _EXTREMA

    def of(self, piece: Piece, name: str, physical: Dims) -> DeferredMatMul:
        dims = (*physical[: self.axis], (), *physical[self.axis + 1 :])
        return _Reduced(self.rw, piece, name, dims, self.axis, self.op, self.divisor, self.dtype)


RULE = Rule(
    name="pool",
    title="Sums, means, maxima and minima over blocks: the request-level part once.",
    identity="sum(u ++ x) = sum(u) + sum(x); max(u ++ x) = max(max(u), max(x))",
    source="rank-aware decomposition (arXiv 2605.27450)",
    legal="The reduced axis has a constant extent and is made of blocks of several levels.",
    refuses="Reductions over the candidates.",
    exactness="reassociates",
    operators={
        f"Reduce{kind}": reduce
        for kind in ("Sum", "Mean", "SumSquare", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp")
    },
)
