"""`broadcast`: what does not depend on the candidate is computed for one row.

Broadcasting is pushed as far down as it goes: an operator that treats rows (or the entries along any other axis)
independently gives, on equal rows, equal rows, so it may run on one of them. Elementwise operators are in
`elementwise.py`, sums in `addition.py` and what works on rows in `rowwise.py`; this module has the rest, and the rule:
lookups, and operators that are kept as a whole, on as few rows as their operands have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from onnx import NodeProto, helper

from onnxrank.graphs import attribute
from onnxrank.grouping import groups
from onnxrank.operators import Trait, having, operator
from onnxrank.operators.products import matmul_order
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    HOLE,
    Abstract,
    Dims,
    Level,
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

from .addition import addition
from .alone import ALONE, alone
from .elementwise import pointwise
from .rowwise import ROWWISE

ELEMENTWISE = having(Trait.ELEMENTWISE)


def lookup(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Gather from a table that has no rows of candidates: every id is looked up once."""
    table, ids = rw.value(node, 0), rw.value(node, 1)
    axis = attribute(node, "axis", 0) % table.rank
    if any(is_candidate_symbol(s) for s in symbols(table.dims)):
        if any(map(is_candidate_symbol, symbols([*ids.dims, table.dims[axis]]))):
            return None
    table = rw.held(table, symbols([table.dims[axis]]))
    before, after = table.dims[:axis], table.dims[axis + 1 :]
    dims: Dims = (*before, *ids.dims, *after)
    held = rw.present(table)
    data = rw.tensor(table)
    if ids.whole is not None and _counts(rw, node, ids):
        # What onnxruntime makes of it, too, in more steps.
        ends = [rw.emit.constant(np.zeros(1, np.int64)), rw.layout.sizes.vector(ids.dims)]
        ends.append(rw.emit.constant(np.array([axis], np.int64)))
        name = rw.emit.add("Slice", [data, *ends], output=rw.claim(node.output[0]))
        return [rw.new(dims, table.dtype, held | rw.present(ids), name)]
    if ids.whole is not None:
        return rw.keep(node, [data, rw.tensor(ids)], [dims], held | rw.present(ids))
    if table.whole is None or (any(extents(before)) and len(before)):
        name = rw.tensor(ids)
        return rw.keep(node, [data, name], [dims], held | rw.present(ids))
    dtype = table.dtype
    tail = extents(after)
    out = np.full(extents(dims), HOLE)
    for group in groups(rw.sources.levels(ids.codes).astype(np.int64), ids.dims):
        part = cut_repeats(group.take(ids.codes))
        name, physical = rw.layout.realise(part, with_extents(group.dims, part.shape))
        lowered = group.level is Level.REQUEST and any(is_candidate_symbol(s) for s in symbols(ids.dims))
        whole = group.index is Ellipsis
        made = (rw.claim(node.output[0]) if whole else None) or rw.emit.fresh(
            f"{node.output[0]}/{group.level.name.lower()}"
        )
        with rw.emit.under("broadcast" if lowered else None):
            rw.emit.copy(node, [data, name], [made])
        source = rw.sources.add((*physical, *keep_symbols(after, held)), dtype, made)
        codes = codes_of(source).reshape(part.shape + tail)
        wide = np.broadcast_to(codes, extents(group.dims) + tail)
        target = out[group.index] if not whole else out
        if whole:
            out[...] = wide
        else:
            out[group.index] = wide.reshape(target.shape)
    return [rw.tidy(dims, dtype, out)]


def _counts(rw: Rewrite, node: NodeProto, ids: Value) -> bool:
    """Whether a Gather takes the first positions, as many as a length of an input: `0, 1, 2, ...`."""
    made = rw.producers.get(node.input[1])
    if made is None or operator(made) != "Range":
        return False
    start, step = (rw.array(made, k) for k in (0, 2))
    if start is None or step is None or int(start) != 0 or int(step) != 1:
        return False
    rows = rw.present(ids)
    return (
        bool(rows) and not any(map(is_candidate_symbol, rows)) and rw.layout.sizes.tells(rw.facts.size_of(ids.dims[0]))
    )


def _gather_nd(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    table, ids = rw.value(node, 0), rw.value(node, 1)
    rows = any(map(is_candidate_symbol, symbols([*table.dims, ids.dims[-1]])))
    if rows or attribute(node, "batch_dims", 0):
        return alone(rw, node)
    width = extents(ids.dims)[-1]
    table = rw.held(table, symbols(table.dims[:width]))
    dims = (*ids.dims[:-1], *table.dims[width:])
    return rw.keep(node, [rw.tensor(table), rw.tensor(ids)], [dims], rw.present(table) | rw.present(ids))


def _gather_elements(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    data, ids = rw.value(node, 0), rw.value(node, 1)
    axis = attribute(node, "axis", 0) % data.rank
    if any(map(is_candidate_symbol, symbols([data.dims[axis], ids.dims[axis]]))):
        return None
    if any(a != b for k, (a, b) in enumerate(zip(data.dims, ids.dims, strict=True)) if k != axis):
        return None
    data = rw.held(data, symbols([data.dims[axis]]))
    held = rw.present(data) | rw.present(ids)
    full = len(held) != len(rw.present(data)) or len(held) != len(rw.present(ids))
    return rw.keep(node, [rw.rows_along(v, held) if full else rw.tensor(v) for v in (data, ids)], [ids.dims], held)


def note_fused(rw: Rewrite, node: NodeProto, places: Iterable[int]) -> None:
    """Notes a fused operator whose operands hold several levels: written out as its steps it could be divided.

    Args:
        rw: The rewrite.
        node: The node.
        places: The operands that are computed; of those, constants are passed over.
    """
    found: set[int] = set()
    for k in places:
        x = rw.operand(node, k) if k < len(node.input) and node.input[k] else None
        if x is not None and rw.array(node, k) is None:
            terms = [np.broadcast_to(t.codes, extents(x.dims)) for t in rw.terms(x)]
            found.update(np.unique(rw.grouping.joint_levels(terms)).tolist())
    if Level.CANDIDATE in found and min(found - {Level.UNREAD}) <= Level.REQUEST:
        rw.fused.append(node.output[0])


def _fused_gemm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A Gemm with its activation, as a whole."""
    note_fused(rw, node, (0, 1, 2))
    if attribute(node, "transA", 0):
        return None
    values = {k: rw.value(node, k) for k, i in enumerate(node.input) if i}
    inner, width = values[1].dims[:: -1 if attribute(node, "transB", 0) else 1]
    if any(map(is_candidate_symbol, symbols([values[0].dims[-1], inner, width]))):
        return None
    values |= {k: rw.held(values[k], symbols([inner])) for k in (0, 1)}
    held = rw.present(values[0])
    if not {s for v in values.values() for s in rw.present(v)} <= held:
        return None  # it does not broadcast its first operand
    names = [rw.tensor(values[k]) if k in values else "" for k in range(len(node.input))]
    return rw.keep(node, names, [(values[0].dims[0], width)], held)


def _fused_matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A product with its transpositions and its factor, as a whole."""
    note_fused(rw, node, (0, 1))
    return _product(rw, node, [matmul_order(node, k, rw.value(node, k).rank) for k in (0, 1)])


def _cast_like(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A Cast to the type of another tensor, of which nothing else is read."""
    like = rw.operand(node, 1)
    assert like is not None
    cast = NodeProto()
    cast.CopyFrom(node)
    cast.op_type = "Cast"
    del cast.input[1:]
    cast.attribute.append(helper.make_attribute("to", like.dtype))
    return pointwise(rw, cast)


def _turned_matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """FusedMatMul by its older name, which nothing is written out of."""
    return _product(rw, node, [matmul_order(node, k, rw.value(node, k).rank) for k in (0, 1)])


def _skip_norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A normalisation of the sum of two tensors of one shape, as a whole."""
    note_fused(rw, node, (0, 1))
    values = [rw.value(node, k) if i else None for k, i in enumerate(node.input)]
    rows, skip, *others = values
    if rows is None or skip is None or rows.dims != skip.dims or any(node.output[1:]):
        return None
    along = symbols(rows.dims[-1:])
    if any(is_candidate_symbol(s) for s in (*along, *(s for v in others if v is not None for s in symbols(v.dims)))):
        return None
    both = [rw.held(v, along) for v in (rows, skip)]
    held = {s for v in both for s in rw.present(v)}
    names = [rw.rows_along(v, held) for v in both] + [rw.tensor(v) if v is not None else "" for v in others]
    return rw.keep(node, names, [rows.dims], held)


def _matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A product of two operands that no rule divides."""
    return _product(rw, node, [range(rw.value(node, k).rank) for k in (0, 1)])


def _product(rw: Rewrite, node: NodeProto, orders: Sequence[Sequence[int]]) -> list[Abstract] | None:
    """A product of two operands as a whole, the axes of each in some order."""
    a, b = rw.value(node, 0), rw.value(node, 1)
    if a.rank < 2 or b.rank < 2:
        return None
    left, right = (tuple(v.dims[p] for p in order) for v, order in zip((a, b), orders, strict=True))
    inner = symbols([left[-1], right[-2]])
    if any(map(is_candidate_symbol, [*inner, *symbols(right[-1:])])):
        return None
    dims = (*broadcast_dims([left[:-2], right[:-2]]), left[-2], right[-1])
    a, b = (rw.held(v, inner) for v in (a, b))
    held = rw.present(a) | rw.present(b)
    names = []
    for k, (v, own) in enumerate(((a, left), (b, right))):
        along = rw.present(v) if v.rank < 3 or batches_agree(rw, v, own[:-2], held) else held
        names.append(rw.layout.factor(rw.rows_along(v, along), keep_symbols(v.dims, along), orders[k][-1 - k], True))
    return rw.keep(node, names, [dims], held)


def batches_agree(rw: Rewrite, value: Value, batch: Dims, held: set[str]) -> bool:
    """Whether a stack of matrices has all the rows of the product: runtimes do not broadcast 1 against 0 of them."""
    stack = {s for s in symbols(batch) if s in held}
    return stack <= rw.present(value)


def _one_hot(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    ids, depth = rw.value(node, 0), rw.array(node, 1)
    if depth is None:
        return None
    axis = attribute(node, "axis", -1) % (ids.rank + 1)
    dims = (*ids.dims[:axis], canonical([int(depth.reshape(-1)[0])]), *ids.dims[axis:])
    return rw.keep(node, [rw.tensor(rw.value(node, k)) for k in range(3)], [dims], rw.present(ids))


def _rotary(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """RotaryEmbedding, as a whole."""
    note_fused(rw, node, range(len(node.input)))
    return _whole_rows(rw, node)


def _whole_rows(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Fused attention and its like: rows on axis 0 of every input; all request-level or all with full rows."""
    values = [rw.value(node, k) for k, i in enumerate(node.input) if i]
    if len([o for o in node.output if o]) > 1 or any(rw.level(v) is Level.CANDIDATE for v in values):
        return None
    known = rw.facts.dims(node.output[0])
    if known is None or any("~" in s for s in symbols(known)):
        return None
    for v in values:
        if any(map(is_candidate_symbol, symbols(v.dims[1:]))):
            return None
    values = [rw.held(v, symbols(v.dims[1:])) for v in values]
    present: set[str] = set().union(*(rw.present(v) for v in values))
    names = iter([rw.rows_along(v, present) for v in values])
    return rw.keep(node, [next(names) if i else "" for i in node.input], [known], present)


RULE = Rule(
    name="broadcast",
    title="Computes once what is the same for every candidate, or along any other axis.",
    identity="f(tile(u)) = tile(f(u)) for every operator f that treats rows independently",
    source="MaRI (arXiv 2602.23105); design of one-shot user towers",
    legal="No operand varies along the axis, and the operator does not mix entries along it.",
    refuses="Operators that are not known, or known to mix rows: they run on all rows, as before.",
    exactness="exact",
    operators={
        **ALONE,
        **dict.fromkeys(ELEMENTWISE, pointwise),
        **dict.fromkeys(("Add", "Sub"), addition),
        "CastLike": _cast_like,
        **ROWWISE,
        "Gather": lookup,
        "GatherND": _gather_nd,
        "GatherElements": _gather_elements,
        "OneHot": _one_hot,
        "MatMul": _matmul,
        "com.microsoft::FusedGemm": _fused_gemm,
        "com.microsoft::FusedMatMul": _fused_matmul,
        "com.microsoft::TransposeMatMul": _turned_matmul,
        "com.microsoft::SkipLayerNormalization": _skip_norm,
        **dict.fromkeys(("RotaryEmbedding", "com.microsoft::RotaryEmbedding"), _rotary),
        **dict.fromkeys(("Attention", "com.microsoft::Attention", "com.microsoft::MultiHeadAttention"), _whole_rows),
    },
)
