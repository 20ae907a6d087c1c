"""Additions: a sum of parts that vary along different axes is not made before somebody needs it."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank.operators import operator
from onnxrank.rewrite import Rewrite
from onnxrank.values import Abstract, Dims, Sum, Value, broadcast_dims, constant_along, extents, symbols, view

from . import open_sums, picked
from .elementwise import mark_unread, neutral, pointwise


def addition(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Add and Sub: put off where that pays, and elementwise operators else."""
    made = _pending_sum(rw, node)
    return made if made is not None else pointwise(rw, node)


def _pending_sum(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """An addition of parts that vary along different axes stays a pending sum."""
    operands = [rw.operand(node, k) for k in range(len(node.input))]
    unread = rw.needed.get(node.output[0])
    if any(o is None for o in operands) or len(operands) != 2:
        return None
    if unread and not any(isinstance(o, Sum) for o in operands):
        return None
    if rw.read_by_linear_maps(node.output[0], frozenset({"Add"})):
        operands = [open_sums.apart(rw, o) if isinstance(o, Value) else o for o in operands]
    for k, o in enumerate(operands):
        if isinstance(o, Sum) and open_sums.has_open(rw, o):
            other = operands[1 - k]
            assert other is not None
            terms = [*o.terms, *rw.terms(other)]
            if operator(node) == "Sub" or broadcast_dims([t.dims for t in terms]) != o.dims:
                break
            return [open_sums.compact(rw, terms, o.dims, o.dtype)]
    # What others read too is made once, not once for each.
    operands = [
        rw.settle(o) if o is not None and len(rw.readers(i)) > 1 else o
        for i, o in zip(node.input, operands, strict=True)
    ]
    a, b = rw.fitted([rw.unless_sum(o) for o in operands if o is not None])
    if a.dtype not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return None
    dims = broadcast_dims([a.dims, b.dims])
    alone = [len(rw.readers(i)) == 1 for i in node.input]
    waits = any(
        single and (isinstance(v, Sum) or _takes_addend(rw, v)) for single, v in zip(alone, (a, b), strict=True)
    )
    apart = waits or _varies_apart(rw, node, a, b, dims)
    if not apart or (operator(node) == "Sub" and waits):
        return None
    if operator(node) == "Sub":
        b = picked.negative(rw, rw.settle(b), rw.emit.fresh(f"{node.output[0]}/negative"))
    terms = [*rw.terms(a), *rw.terms(b)]
    if unread:
        terms = [view(dims, t.dtype, mark_unread(np.broadcast_to(t.codes, extents(dims)), unread)) for t in terms]
    same = None if len(terms) != 2 else neutral(node, [rw.settle(a), rw.settle(b)], dims)
    return [same] if same is not None else [rw.add(terms, dims, a.dtype)]


def _varies_apart(rw: Rewrite, node: NodeProto, a: Value | Sum, b: Value | Sum, dims: Dims) -> bool:
    """Whether each operand varies along something the other does not, and what reads the result is linear."""
    if isinstance(a, Sum) or isinstance(b, Sum) or not rw.read_by_linear_maps(node.output[0]):
        return False
    own = []
    for v in (a, b):
        lead = len(dims) - v.rank
        axes = {lead + k for k, n in enumerate(extents(v.dims)) if n > 1 and not constant_along(v.codes, k)}
        rows = picked.of(v)
        if rows is not None:
            # They vary with the row that is picked, wherever that is done.
            entries = rows.table.dims[1:]
            own.append({k for k in axes if k >= len(dims) - len(entries)} | {*symbols(entries), rows})
        else:
            own.append(axes | rw.present(v))
    return not own[0] <= own[1] and not own[1] <= own[0]


def _takes_addend(rw: Rewrite, value: Value) -> bool:
    """Whether the value holds a product that could still take an addend."""
    found = [value.whole] if value.whole is not None else rw.sources.of(value.codes)
    return any(s.is_pending for s in found)
