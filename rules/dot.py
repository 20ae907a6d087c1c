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
    Value,
    broadcast_dims,
    canonical,
    codes_of,
    constant_along,
    extents,
    is_candidate_symbol,
    keep_symbols,
    symbols,
    with_extents,
)

_MOVES = set("Reshape Flatten Squeeze Unsqueeze Transpose Gather GatherND Slice Split Concat Identity".split())
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
    if rw.needed.get(node.output[0]) is None and a.whole is not None and b.whole is not None:
        return [_product(rw, node, a, b, dims)]
    rows, columns = _runs(rw, a, -1), _runs(rw, b, -2)
    if rows is None or columns is None or len(rows) * len(columns) == 1:
        return None
    if not _stays_apart(rw, node.output[0]):
        rw.refuse("dot", "what reads the product needs its blocks side by side again")
        return None
    return [_blocks(rw, node, a, b, dims, rows, columns)]


def _stays_apart(rw: Rewrite, name: str) -> bool:
    """Whether all that reads a tensor, behind any data movement, is linear: then blocks are never joined again."""
    readers = rw.readers(name)
    return bool(readers) and all(
        n.op_type in _LINEAR or n.op_type == "Shape" or (n.op_type in _MOVES and _stays_apart(rw, n.output[0]))
        for n in readers
    )


def _runs(rw: Rewrite, x: Value, inner: int) -> list[tuple[Level, NDArray[np.int64]]] | None:
    """Positions along the outer matrix axis by level; None where the level depends on other axes, or the inner one."""
    outer = -3 - inner
    levels = np.moveaxis(rw.sources.levels(x.codes), outer % x.rank, 0)
    flat = levels.reshape(levels.shape[0], -1)
    if not (flat == flat[:, :1]).all() or (flat == Level.UNREAD).any():
        return None
    return [(Level(int(k)), np.flatnonzero(flat[:, 0] == k)) for k in np.unique(flat[:, 0])]


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
    codes: Codes = x.codes.take(at, axis)
    for k in range(codes.ndim - 2):
        if constant_along(codes, k):
            codes = codes.take([0], k)
    return Value(with_extents(x.dims, codes.shape), x.dtype, None, codes)


def _product(rw: Rewrite, node: NodeProto | None, a: Value, b: Value, dims: Dims, hint: str = "") -> Value:
    """One product; the candidates are rows of one matrix where the other operand has none."""
    first, da = (rw.tensor(a), a.whole.dims) if a.whole else rw.layout.realise(a.codes, a.dims)
    second, db = (rw.tensor(b), b.whole.dims) if b.whole else rw.layout.realise(b.codes, b.dims)
    held = {*symbols(da), *symbols(db)}
    if symbols(da) and len(db) > 2 and all(d == () for d in db[:-2]) and len(da) >= len(db):
        # One matrix for all rows.
        second, db = rw.layout.reshape(second, db, db[-2:]), db[-2:]
    if node is not None:
        (made,) = rw.keep(node, [first, second], [dims], held)
        return rw.settle(made)
    name = rw.emit.add("MatMul", [first, second], hint=hint)
    own = keep_symbols((*broadcast_dims([da[:-2], db[:-2]]), da[-2], db[-1]), held)
    source = rw.sources.add(own, a.dtype, name, block=True)
    return Value(dims, a.dtype, None, np.broadcast_to(codes_of(source), extents(dims)))


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
