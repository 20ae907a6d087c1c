"""`dot`: products of two computed operands by blocks of levels.

For a dot interaction `X X'` with request-level rows `U` and candidate-level rows `C`,

    X X' = [[U U', U C'], [C U', C C']]

`U U'` is made once per request, `C U'` is one matrix product with candidates as rows, and `U C'` is its transpose. What
is selected of the result, a triangle say, folds into the weights of the layer that follows.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.rewrite import Rewrite, Rule
from onnxrank.values import (
    HOLE,
    Abstract,
    Codes,
    Dims,
    Level,
    Unrepresentable,
    Value,
    broadcast_dims,
    canonical,
    codes_of,
    cut_repeats,
    extents,
    is_candidate_symbol,
    keep_symbols,
    symbols,
    with_extents,
)

from .broadcast import batches_agree, mark_unread

_MOVES = set("Reshape Flatten Squeeze Unsqueeze Transpose Gather GatherND Slice Split Concat Identity".split())
_FEW_ROWS = 4
"""Up to this many rows per candidate, bringing them side by side for one product costs less than many products."""
_LINEAR = {"MatMul", "Gemm", "ReduceSum", "ReduceMean", "Conv"}


def matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """MatMul of two operands that are not constant."""
    a, b = rw.value(node, 0), rw.value(node, 1)
    if a.rank < 2 or b.rank < 2 or Level.CONSTANT in (rw.level(a), rw.level(b)):
        return None
    if any(is_candidate_symbol(s) for s in symbols([a.dims[-1], b.dims[-2], b.dims[-1]])):
        return None
    lead = broadcast_dims([a.dims[:-2], b.dims[:-2]])
    dims = (*lead, a.dims[-2], b.dims[-1])
    unread = rw.needed.get(node.output[0], {})
    if not unread and a.whole is not None and b.whole is not None:
        return [_product(rw, node, a, b, dims)]
    a, b = _read(a, unread.get(len(dims) - 2), a.rank - 2), _read(b, unread.get(len(dims) - 1), b.rank - 1)
    rows, columns = _runs(rw, a, -1), _runs(rw, b, -2)
    if rows is None or columns is None:
        rw.refuse("dot", "the inner axis, or another than the outer ones, holds several levels")
        return None
    if len(rows) * len(columns) == 1:
        return [_blocks(rw, node, a, b, dims, rows, columns)]
    # Queries of several levels on request-level keys: rows that are request-level stay so behind any softmax.
    once = any(len(side) == 1 and side[0][0] <= Level.REQUEST for side in (rows, columns))
    if not once and not _stays_apart(rw, node.output[0]):
        rw.refuse("dot", "what reads the product needs its blocks side by side again")
        return None
    return [_blocks(rw, node, a, b, dims, rows, columns)]


def _stays_apart(rw: Rewrite, name: str) -> bool:
    """Whether all that reads a tensor, behind any data movement, is linear: then blocks are never joined again."""
    readers = rw.readers(name)
    return (
        bool(readers)
        and name not in rw.outputs
        and all(
            n.op_type in _LINEAR or n.op_type == "Shape" or (n.op_type in _MOVES and _stays_apart(rw, n.output[0]))
            for n in readers
        )
    )


def _read(x: Value, positions: NDArray[np.int64] | None, axis: int) -> Value:
    """The operand with holes where nobody reads."""
    return x if positions is None else Value(x.dims, x.dtype, None, mark_unread(x.codes, {axis: positions}))


def _runs(rw: Rewrite, x: Value, inner: int) -> list[tuple[Level, NDArray[np.int64]]] | None:
    """Positions along the outer matrix axis by level; None where the level depends on other axes, or the inner one."""
    outer = -3 - inner
    levels = np.moveaxis(rw.sources.levels(x.codes), outer % x.rank, 0)
    flat = levels.reshape(levels.shape[0], -1)
    if not (flat == flat[:, :1]).all():
        return None
    return [(Level(int(k)), np.flatnonzero(flat[:, 0] == k)) for k in np.unique(flat[:, 0]) if k != Level.UNREAD]


def _blocks(
    rw: Rewrite,
    node: NodeProto,
    a: Value,
    b: Value,
    dims: Dims,
    rows: list[tuple[Level, NDArray[np.int64]]],
    columns: list[tuple[Level, NDArray[np.int64]]],
) -> Value:
    out = np.full(extents(dims), HOLE)
    mirrored = a.rank == b.rank and a.codes.shape == b.codes.swapaxes(-1, -2).shape
    mirrored = mirrored and np.array_equal(a.codes, b.codes.swapaxes(-1, -2))
    for la, i in rows:
        for lb, j in columns:
            if mirrored and la < lb:
                continue
            part_a = _part(a, i, -2)
            part_b = _part(b, j, -1)
            own = (*dims[:-2], canonical([len(i)]), canonical([len(j)]))
            rw.emit.rule = "dot" if max(la, lb) <= Level.REQUEST or la != lb else None
            made = _product(rw, None, part_a, part_b, own, node.output[0])
            rw.emit.rule = None
            wide = np.broadcast_to(made.codes, extents(own))
            out[..., i[:, None], j] = wide
            if mirrored and la > lb:
                out[..., j[:, None], i] = wide.swapaxes(-1, -2)
    return rw.tidy(dims, a.dtype, out)


def _part(x: Value, at: NDArray[np.int64], axis: int) -> Value:
    codes: Codes = cut_repeats(x.codes.take(at, axis), range(x.rank - 2))
    return Value(with_extents(x.dims, codes.shape), x.dtype, None, codes)


def _product(rw: Rewrite, node: NodeProto | None, a: Value, b: Value, dims: Dims, hint: str = "") -> Value:
    """One product; the candidates are rows of one matrix where the other operand has none."""
    a_rows, b_rows = ({s for s in rw.present(v) if is_candidate_symbol(s)} for v in (a, b))
    if a_rows and not b_rows and extents(a.dims)[-2] <= _FEW_ROWS:
        return _as_rows(rw, a, b, dims, hint or (node.output[0] if node else ""))
    if b_rows and not a_rows and extents(b.dims)[-1] <= _FEW_ROWS:
        turned = (*dims[:-2], dims[-1], dims[-2])
        made = _as_rows(rw, _turned(b), _turned(a), turned, hint or (node.output[0] if node else ""))
        return rw.tidy(dims, made.dtype, made.codes.swapaxes(-1, -2))
    held = rw.present(a) | rw.present(b)
    full = [v.rank > 2 and not batches_agree(rw, v, held) for v in (a, b)]
    if a_rows and not b_rows and all(d == () for d in keep_symbols(b.dims, rw.present(b))[:-2]):
        # One matrix for all rows.
        b = Value(b.dims[-2:], b.dtype, None, b.codes.reshape(b.codes.shape[-2:]))
        full[1] = False
    names, shapes = [], []
    for v, wide in zip((a, b), full, strict=True):
        if v.whole is not None:
            names.append(rw.tensor(v, full=wide))
            shapes.append(v.dims if wide else v.whole.dims)
        else:
            name, physical = rw.layout.realise(v.codes, v.dims, wide)
            names.append(name)
            shapes.append(physical)
    if node is not None:
        (kept,) = rw.keep(node, names, [dims], held)
        return rw.settle(kept)
    name = rw.emit.add("MatMul", names, hint=hint)
    own = (*broadcast_dims([s[:-2] for s in shapes]), shapes[0][-2], shapes[1][-1])
    source = rw.sources.add(own, a.dtype, name, block=True)
    return Value(dims, a.dtype, None, np.broadcast_to(codes_of(source), extents(dims)))


def _turned(x: Value) -> Value:
    """The last two axes exchanged."""
    return Value((*x.dims[:-2], x.dims[-1], x.dims[-2]), x.dtype, None, x.codes.swapaxes(-1, -2))


def _as_rows(rw: Rewrite, a: Value, b: Value, dims: Dims, hint: str) -> Value:
    """`a @ b` for a candidate-level `a` and a request-level `b`: `[stack, N * rows, K] @ [stack, K, columns]`."""
    lead = len(dims) - 2
    a_codes = a.codes.reshape((1,) * (lead + 2 - a.rank) + a.codes.shape)
    b_codes = b.codes.reshape((1,) * (lead + 2 - b.rank) + b.codes.shape)
    a_dims = ((),) * (lead + 2 - a.rank) + a.dims
    b_dims = ((),) * (lead + 2 - b.rank) + b.dims
    syms = [s for s in symbols(a_dims[:-2]) if s in rw.present(a)]
    if len(syms) != 1 or len(symbols([a_dims[-2]])) or symbols(b_dims[-2:]):
        raise Unrepresentable("rows of several extents")
    (rows,) = syms
    stack = tuple(canonical(f for f in d if f != rows) for d in a_dims[:-2])
    if any(len(d) > 1 for d in a_dims[:-2]) or symbols(stack):
        raise Unrepresentable("merged rows")
    many = tuple(k for k in range(lead) if max(a_codes.shape[k], b_codes.shape[k]) > 1)
    stacked = [np.broadcast_to(a_codes, np.broadcast_shapes(a_codes.shape, (*b_codes.shape[:-2], 1, 1))), b_codes]
    shape_a = (*(stacked[0].shape[k] for k in many), *a_codes.shape[-2:])
    shape_b = (*(b_codes.shape[k] for k in many), *b_codes.shape[-2:])
    own_a = (*(canonical([n]) for n in shape_a[:-2]), canonical([rows, shape_a[-2]]), canonical([shape_a[-1]]))
    own_b = tuple(canonical([n]) for n in shape_b)
    left, _ = rw.layout.realise(stacked[0].reshape(shape_a), own_a, full=True)
    if shape_a[:-2]:
        # A Reshape in between: onnxruntime fuses a Transpose of the stack into the MatMul, then divides by no rows.
        shape = np.array([*shape_a[:-2], -1, shape_a[-1]], np.int64)
        left = rw.emit.add("Reshape", [left, rw.emit.constant(shape)], hint=hint)
    right, _ = rw.layout.realise(b_codes.reshape(shape_b), own_b)
    name = rw.emit.add("MatMul", [left, right], hint=hint)
    made = rw.sources.add((*own_a[:-1], own_b[-1]), a.dtype, name, block=True)
    codes = codes_of(made).reshape(
        *(np.broadcast_shapes(a_codes.shape[:-2], b_codes.shape[:-2])), *(a_codes.shape[-2], b_codes.shape[-1])
    )
    return rw.tidy(dims, a.dtype, np.broadcast_to(codes, extents(dims)))


RULE = Rule(
    name="dot",
    title="Divides products of features with features into blocks of one level each.",
    identity="[U; C] [U; C]' = [[U U', (C U')'], [C U', C C']]",
    source="rank-aware decomposition (arXiv 2605.27450)",
    legal="Rows of the left and columns of the right operand have one level each.",
    refuses="Operands whose inner axis holds several levels.",
    exactness="reassociates",
    operators={"MatMul": matmul},
)
