"""Stacks of constant matrices in the rule `fc`: a linear map of its own for every position of some axes.

`y[s] = x[s] W[s]`, as for tokens, fields or heads with weights of their own. Positions whose entries have the same
levels go together, the weights cut along both axes: `x[R] W[R]` is made once per request, `x[C] W[C]` per candidate
with the candidates as rows of one matrix per position, and positions of several levels are the sum of a product for
each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.rewrite import Rewrite, Weights
from onnxrank.values import Abstract, Affine, Codes, Dims, Sum, Value, canonical, constant_along, extents, symbols, view

from . import fold
from .products import (
    Piece,
    Product,
    distribute,
    linear_last,
    linear_left,
    partials,
    right_product,
    with_addend,
    worthwhile,
)


def matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """MatMul with a stack of constant matrices on either side."""
    for k in (1, 0):
        weight, x = rw.array(node, k), rw.operand(node, 1 - k)
        if weight is None or x is None or weight.ndim < 3 or x.rank < 2:
            continue
        rank = max(x.rank, weight.ndim)
        lead, last = weight.ndim - 2, weight.ndim - 1
        order = [*range(lead), lead, last] if k else [*range(lead), last, lead]
        stack = {rank - weight.ndim + a: n for a, n in enumerate(weight.shape[:-2]) if n > 1}
        return linear(rw, node, k, order, x, rank - (1 if k else 2), stack)
    return None


def linear(
    rw: Rewrite, node: NodeProto, k: int, order: Sequence[int], x: Abstract, axis: int, stack: dict[int, int]
) -> list[Abstract] | None:
    """Contracts an axis with a matrix of its own for every position of other axes.

    Args:
        rw: The rewrite.
        node: The node.
        k: Which of its inputs is the stack of matrices.
        order: The order of that input's axes as `[stack..., contracted, columns]`.
        x: The other operand; axes that it lacks are in front.
        axis: Its contracted axis, counted with those.
        stack: Its axes that have weights of their own, with their extents, in the order of the weights.

    Returns:
        The result, with the columns in the place of the contracted axis; None where there is nothing to divide.
    """
    unread, data = rw.needed.get(node.output[0], {}), rw.array(node, k)
    if data is None or not worthwhile(rw, x, unread):
        return None
    x = rw.settle(x) if isinstance(x, Affine) or (isinstance(x, Sum) and fold.has_open(rw, x)) else x
    rank = max(x.rank, 1 + max(axis, *stack, 0))
    if x.rank < rank:
        dims: Dims = ((),) * (rank - x.rank) + x.dims
        x = rw.moved(x, dims, lambda codes: codes.reshape(extents(dims)))
    if any(symbols([x.dims[a]]) for a in (axis, *stack)):
        return None
    inner, width = (data.shape[a] for a in order[-2:])
    shape = (prod(stack.values()), inner, width)
    if all(t.codes.shape[a] == 1 or constant_along(t.codes, a) for t in rw.terms(x) for a in stack):
        weight = rw.arranged(node, k, [order[-2], *order[:-2], order[-1]], (inner, shape[0] * width))
        return [_joined(rw, x, axis, stack, weight, width)]
    weight = rw.arranged(node, k, order, shape)
    return [distribute(rw, x, axis, lambda v: _contracted(rw, v, axis, stack, weight, unread))]


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
    terms = partials(rw, view(own, x.dtype, turned), len(own) - 1, width, _written(rw, weight), "fc", read, stack=(0,))
    dims = (*whole[:axis], canonical([width]), *whole[axis + 1 :])
    apart = (*stack.values(), *(extents(dims)[a] for a in (*rest, axis)))
    back = np.argsort(order)
    return rw.add([view(dims, x.dtype, t.codes.reshape(apart).transpose(back)) for t in terms], dims, x.dtype)


def _written(rw: Rewrite, weight: Weights) -> Product:
    """How to write the product of a piece, rows of one matrix for each of its positions."""
    column = canonical([weight.data.shape[-1]])

    def write(piece: Piece, name: str, physical: Dims) -> tuple[Dims, Callable[[str | None, Dims], str]]:
        at = piece.group.index
        chosen = weight if at is ... or isinstance(at[0], slice) else weight.part(rw.emit, 0, at[0])
        count = len(chosen.data)
        if count == 1:
            matrix = chosen.reshaped(rw.emit, chosen.data.shape[1:])
            rows = rw.layout.reshape(name, physical, physical[1:])
            return right_product(rw, chosen.data.shape[-1])(rows, physical[1:], piece.weights(rw, matrix))
        own = (physical[0], canonical(f for d in physical[1:-1] for f in d), physical[-1])
        made: Dims = (canonical([count]), own[1], column)

        def writer(addend: str | None, have: Dims) -> str:
            rows = rw.layout.kept_apart(rw.layout.reshape(name, physical, own), own)
            return with_addend(rw, rw.emit.add("MatMul", [rows, piece.weights(rw, chosen)]), addend)

        return made, writer

    return write
