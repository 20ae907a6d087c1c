"""Positions that exporters write with the number of the row beside them, or added: each row picks of its own.

`h[arange(N)[:, None], i]` becomes `GatherND` of the pairs `(n, i)`, or `Gather` of `h`, reshaped to `[N L, d]`, at
`n L + i`.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank.extents import Expr
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, operator, traits
from onnxrank.rewrite import Rewrite
from onnxrank.values import CANDIDATES, Dim, Value, extents, is_candidate_symbol, stream, symbols

_WHOLE = (TensorProto.INT32, TensorProto.INT64)


def beside(rw: Rewrite, name: str) -> Value | None:
    """The positions in pairs of row and position, `[N, ..., 2]`; None where the first is not the row for sure."""
    node = rw.producers.get(name)
    if node is None or operator(node) != "Concat" or len(node.input) != 2:
        return None
    numbers, value = node.input[0], rw.values.get(node.input[1])
    if value is None or attribute(node, "axis") not in (-1, value.rank - 1) or not _are_rows(rw, numbers):
        return None
    if any(rw.values[i].dims[-1] != () for i in node.input):
        return None
    made = rw.settle(value)
    return rw.tidy(made.dims[:-1], made.dtype, made.codes[..., 0])


def added(rw: Rewrite, name: str, extent: Dim) -> Value | None:
    """The positions `i` in sums `n L + i`, for rows of so many entries `L`; None where that is not so for sure.

    A position below 0, or of `L` or more, would be one in another row: it is known to be none of those.
    """
    shape, node = rw.values[name].dims, rw.producers.get(name)
    while node is not None and Trait.RESHAPE in traits(node):
        node = rw.producers.get(node.input[0])
    if node is None or operator(node) != "Add":
        return None
    for first, second in (node.input, node.input[::-1]):
        if _are_multiples(rw, first, rw.facts.size_of(extent)) and _are_inside(rw, second, extent):
            found = rw.value(node, list(node.input).index(second))
            whole = rw.values[node.output[0]].dims
            if stream(shape) != stream(whole):
                return None
            codes = np.broadcast_to(found.codes, extents(whole))
            return rw.tidy(shape, found.dtype, codes.reshape(extents(shape)))
    return None


def _are_rows(rw: Rewrite, name: str) -> bool:
    """Whether every entry is the number of its row, along a first axis of candidates."""
    node, _ = _behind_moves(rw, name)
    if node is None or operator(node) != "Range":
        return False
    start, step = rw.array(node, 0), rw.array(node, 2)
    return start is not None and step is not None and not start.any() and bool((step == 1).all())


def _are_multiples(rw: Rewrite, name: str, extent: int | Expr) -> bool:
    """Whether every entry is the number of its row times a number."""
    node, _ = _behind_moves(rw, name)
    if node is None or operator(node) != "Mul":
        return False
    return any(_are_rows(rw, node.input[k]) and _number(rw, node, 1 - k) == extent for k in (0, 1))


def _number(rw: Rewrite, node: NodeProto, k: int) -> int | Expr | None:
    """The one entry of an operand that is made of constants and extents."""
    found = rw.facts.entries.get(node.input[k])
    if found is not None:
        return found[0] if len(found) == 1 else None
    data = rw.array(node, k)
    return int(data.reshape(-1)[0]) if data is not None and data.size == 1 and data.dtype.kind in "iu" else None


def _are_inside(rw: Rewrite, name: str, extent: Dim) -> bool:
    """Whether every entry is the place of one along an axis of an extent: `TopK` and `ArgMax` give those."""
    node, made = _behind_moves(rw, name)
    if node is None or operator(node) not in ("TopK", "ArgMax", "ArgMin"):
        return False
    best = operator(node) == "TopK"
    of = rw.values[node.input[0]].dims
    axis = attribute(node, "axis", -1 if best else 0) % len(of)
    return of[axis] == extent and not (best and made == node.output[0])


def _behind_moves(rw: Rewrite, name: str) -> tuple[NodeProto | None, str]:
    """The tensor that has the entries of another, each in the row in which it is there, and the node that makes it."""
    while True:
        value, node = rw.values.get(name), rw.producers.get(name)
        if value is None or node is None or value.dims[:1] != ((CANDIDATES,),):
            return None, name
        if any(map(is_candidate_symbol, symbols(value.dims[1:]))):
            return None, name
        moves = Trait.RESHAPE in traits(node) or operator(node) in ("Expand", "Identity")
        if not moves and (operator(node) != "Cast" or attribute(node, "to") not in _WHOLE):
            return node, name
        name = node.input[0]
