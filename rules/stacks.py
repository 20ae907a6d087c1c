"""Stacks of constant matrices in the rule `fc`: a linear map of its own for every position of some axes.

`y[s] = x[s] W[s]`, as for tokens, fields or heads with weights of their own. Positions whose entries have the same
levels go together, the weights cut along both axes: `x[R] W[R]` is made once per request, `x[C] W[C]` per candidate
with the candidates as rows of one matrix per position, and positions of several levels are the sum of a product for
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.rewrite import Rewrite
from onnxrank.values import (
    Abstract,
    Codes,
    DeferredMatMul,
    Dims,
    Sum,
    Value,
    canonical,
    constant_along,
    extents,
    symbols,
    view,
)
from onnxrank.weights import Weights

from . import open_sums
from .pieces import Piece
from .products import (
    Contraction,
    RightMatrix,
    commuted,
    distribute,
    linear_last,
    linear_left,
    partials,
    with_addend,
    worthwhile,
)


@dataclass(frozen=True)
class Stack:
    """An operand of constants as a stack of matrices.

    Attributes:
        node: The node.
        k: Which of its inputs.
        shape: The shape that its axes below are those of; neighbouring axes of the input may be apart in it.
        positions: The axes along which there is a matrix for each position.
        inner: Those that are contracted.
        outer: Those of the matrices' columns.
    """

    node: NodeProto
    k: int
    shape: tuple[int, ...]
    positions: tuple[int, ...]
    inner: tuple[int, ...]
    outer: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of each matrix."""
        return prod(self.shape[a] for a in self.outer)

    @property
    def depth(self) -> int:
        """Entries that each of them contracts."""
        return prod(self.shape[a] for a in self.inner)

    @property
    def counts(self) -> list[int]:
        """Positions, per axis."""
        return [self.shape[a] for a in self.positions]

    def weights(self, rw: Rewrite) -> Weights:
        """All matrices, `[positions, K, columns]`."""
        order = (*self.positions, *self.inner, *self.outer)
        return rw.arranged(self.node, self.k, self.shape, order, (prod(self.counts), self.depth, self.width))

    def side_by_side(self, rw: Rewrite) -> Weights:
        """One matrix, `[K, positions * columns]`."""
        order = (*self.inner, *self.positions, *self.outer)
        return rw.arranged(self.node, self.k, self.shape, order, (self.depth, prod(self.counts) * self.width))


def matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """MatMul with a stack of constant matrices on either side."""
    for k in (1, 0):
        data, x, unread = rw.array(node, k), rw.operand(node, 1 - k), rw.needed.get(node.output[0], {})
        if data is None or x is None or data.ndim < 3 or x.rank < 2:
            continue
        rank, lead = max(x.rank, data.ndim), data.ndim - 2
        places = [a for a in range(lead) if data.shape[a] > 1]
        shape = (*(data.shape[a] for a in places), *data.shape[lead:])
        inner, outer = (len(places) + (0 if k else 1), len(places) + (1 if k else 0))
        given = Stack(node, k, shape, tuple(range(len(places))), (inner,), (outer,))
        return linear(rw, given, x, rank, rank - (1 if k else 2), [rank - data.ndim + a for a in places], unread)
    return None


def linear(
    rw: Rewrite,
    given: Stack,
    x: Abstract,
    rank: int,
    axis: int,
    places: Sequence[int],
    unread: dict[int, NDArray[np.int64]],
) -> list[Abstract] | None:
    """Contracts an axis with a matrix of its own for every position of other axes.

    Args:
        rw: The rewrite.
        given: The matrices.
        x: The other operand.
        rank: Its rank; axes that it lacks are in front.
        axis: Its contracted axis, one of the last two.
        places: Its axes that have weights of their own, in the order of the weights' positions.
        unread: Positions read per axis of the result, if not all.

    Returns:
        The result, with the columns in the place of the contracted axis; None where there is nothing to divide.
    """
    dims: Dims = ((),) * (rank - x.rank) + x.dims
    if not worthwhile(rw, x, unread) or any(symbols([dims[a]]) for a in (axis, *places)):
        return None
    x = rw.settle(x) if isinstance(x, Sum) and open_sums.has_open(rw, x) else rw.unless_sum(x)
    x = rw.moved(x, dims, lambda codes: codes.reshape(extents(dims)))
    stack = dict(zip(places, given.counts, strict=True))
    if all(t.codes.shape[a] == 1 or constant_along(t.codes, a) for t in rw.terms(x) for a in stack):
        return [_joined(rw, x, axis, stack, given.side_by_side(rw), given.width)]
    weight = given.weights(rw)

    def one(v: Value) -> Abstract:
        return _contracted(rw, v, axis, stack, weight, unread)

    return [distribute(rw, x, axis, lambda v: commuted(rw, v, axis, one), "fc", given.width)]


def conv(rw: Rewrite, node: NodeProto, x: Abstract, weight: NDArray[Any], group: int) -> list[Abstract] | None:
    """A convolution with kernel 1 by groups of channels: a linear map of its own for each group."""
    apart = (group, weight.shape[0] // group, weight.shape[1])
    given = Stack(node, 1, apart, (0,), (2,), (1,))
    if x.rank < 3 or extents(x.dims)[1] != group * weight.shape[1] or symbols([x.dims[1]]):
        return None
    rest, inside = x.dims[2:], (canonical([group]), canonical([weight.shape[1]]))
    order = [0, *range(3, x.rank + 1), 1, 2]
    split: Dims = (x.dims[0], *inside, *rest)
    moved: Dims = (x.dims[0], *rest, *inside)
    unread: dict[int, NDArray[np.int64]] = {}
    turned = rw.moved(rw.unless_sum(x), moved, lambda codes: codes.reshape(extents(split)).transpose(order))
    made = linear(rw, given, turned, len(moved), len(moved) - 1, [len(moved) - 2], unread)
    if made is None:
        return None
    channels = canonical([weight.shape[0]])
    dims: Dims = (x.dims[0], channels, *rest)
    back = [0, len(moved) - 2, len(moved) - 1, *range(1, len(moved) - 2)]
    return [rw.moved(made[0], dims, lambda codes: codes.transpose(back).reshape(extents(dims)))]


def _joined(rw: Rewrite, x: Abstract, axis: int, stack: dict[int, int], weight: Weights, width: int) -> Abstract:
    """All matrices side by side, where the operand is the same for each."""
    rank, count = x.rank, len(stack)
    once = tuple(slice(0, 1) if a in stack else slice(None) for a in range(rank))
    x = rw.moved(x, tuple(() if a in stack else d for a, d in enumerate(x.dims)), lambda codes: codes[once])
    made = linear_last(rw, x, weight, "fc") if axis == rank - 1 else linear_left(rw, x, weight, None)
    dims = (*_stacked(made.dims, stack)[:axis], canonical([width]), *made.dims[axis + 1 :])
    places = iter(range(axis, axis + count))
    order = [next(places) if a in stack else a + count * (a >= axis) for a in range(rank)]

    def spread(codes: Codes) -> Codes:
        apart = codes.reshape(*codes.shape[:axis], *stack.values(), width, *codes.shape[axis + 1 :])
        return apart.transpose(*order, *stack).reshape(extents(dims))

    return rw.moved(made, dims, spread)


def _stacked(dims: Dims, stack: dict[int, int]) -> Dims:
    """A shape with the extents of the weights."""
    return tuple(canonical([stack[a]]) if a in stack else d for a, d in enumerate(dims))


def _contracted(
    rw: Rewrite, x: Value, axis: int, stack: dict[int, int], weight: Weights, unread: dict[int, NDArray[np.int64]]
) -> Abstract:
    """A product for every group of positions: `[positions, rows, K] @ [positions, K, columns]`."""
    whole = _stacked(x.dims, stack)
    # Symbols first: a dimension that merges all rows has one constant factor.
    rest = sorted((a for a in range(x.rank) if a != axis and a not in stack), key=lambda a: not symbols([whole[a]]))
    order = [*stack, *rest, axis]
    count, _, width = weight.data.shape
    own = (canonical([count]), *(whole[a] for a in (*rest, axis)))
    turned = np.broadcast_to(x.codes, extents(whole)).transpose(order).reshape(extents(own))
    places = {a: k for k, a in enumerate(rest, 1)} | ({next(iter(stack)): 0} if len(stack) == 1 else {})
    read = {places[a]: at for a, at in unread.items() if a in places}
    terms = partials(rw, view(own, x.dtype, turned), len(own) - 1, _Stacked(rw, weight), "fc", read, stack=(0,))
    dims = (*whole[:axis], canonical([width]), *whole[axis + 1 :])
    apart = (*stack.values(), *(extents(dims)[a] for a in (*rest, axis)))
    back = np.argsort(order)
    return rw.add([view(dims, x.dtype, t.codes.reshape(apart).transpose(back)) for t in terms], dims, x.dtype)


@dataclass(eq=False)
class _Stacked(Contraction):
    """Products of pieces with rows of one matrix for each of their positions.

    Attributes:
        rw: The rewrite.
        weight: The matrices.
    """

    rw: Rewrite
    weight: Weights

    def __post_init__(self) -> None:
        self.width = int(self.weight.data.shape[-1])

    def of(self, piece: Piece, name: str, physical: Dims) -> DeferredMatMul:
        rw, weight, at = self.rw, self.weight, piece.group.index
        chosen = weight if at is ... or isinstance(at[0], slice) else weight.part(rw.emit, 0, at[0])
        count = len(chosen.data)
        if count == 1:
            matrix = chosen.reshaped(rw.emit, chosen.data.shape[1:])
            rows = rw.layout.reshape(name, physical, physical[1:])
            return RightMatrix(rw, self.width).of(rows, physical[1:], piece.weights(rw, matrix))
        own = (physical[0], canonical(f for d in physical[1:-1] for f in d), physical[-1])
        rows = rw.layout.kept_apart(rw.layout.reshape(name, physical, own), own)
        dims = (canonical([count]), own[1], canonical([self.width]))
        return _StackProduct(rw, rows, piece.weights(rw, chosen), dims)


@dataclass(eq=False)
class _StackProduct(DeferredMatMul):
    """`[positions, rows, K] @ [positions, K, columns]`.

    Attributes:
        rw: The rewrite.
        name: The left operand.
        weight: Name of the weights.
        dims: Shape of the result.
    """

    rw: Rewrite
    name: str
    weight: str
    dims: Dims

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        return with_addend(self.rw, self.rw.emit.add("MatMul", [self.name, self.weight]), addend)
