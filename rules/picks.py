"""`picks`: what candidates pick of a request's rows is mapped before it is picked.

Search-based interest models pick a few rows of the history for every candidate, those that are most like it, and
project them. There are far fewer rows to pick from than are picked in all, and for each row a map gives the same
wherever it is picked:

    f(H)[i] = f(H[i])

Where rows are picked by `GatherElements`, whose index holds every position once for each entry, the history was brought
to all candidates besides. It is a `Gather` of whole rows here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import numpy as np
from onnx import NodeProto, helper

from onnxrank import cost
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, find, having
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    CANDIDATES,
    Abstract,
    Dims,
    Level,
    Value,
    constant_along,
    extents,
    is_candidate_symbol,
    stream,
    symbols,
)

from . import own_rows, picked
from .elementwise import repeated
from .movement import placed
from .picked import Picked
from .products import linear_last
from .rowwise import by_rows


def gather_elements(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """GatherElements whose index is the same for all entries of a row, of rows that are the same for all candidates."""
    data, ids = rw.value(node, 0), rw.value(node, 1)
    axis = attribute(node, "axis", 0) % data.rank
    if any(map(is_candidate_symbol, symbols([data.dims[axis], ids.dims[axis]]))) or rw.level(ids) < Level.CANDIDATE:
        return None
    if any(a != b for k, (a, b) in enumerate(zip(data.dims, ids.dims, strict=True)) if k != axis):
        return None
    before, behind = range(axis), range(axis + 1, data.rank)
    if not _is_repeated(rw, data, before) or not _is_repeated(rw, ids, behind):
        return None
    data = rw.held(data, symbols([data.dims[axis]]))
    return [Picked(rw, _part(rw, data, before), _part(rw, ids, behind)).made]


def gather_nd(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """GatherND by which every row of candidates picks of what is the same for all of them."""
    of, at = rw.values[node.input[0]].dims, rw.values[node.input[1]].dims
    batch, last = attribute(node, "batch_dims", 0), extents(at)[-1]
    if batch == 0 and last == 1:
        return _of_merged(rw, node, at[:-1])
    if batch > 1 or last != 2 - batch or len(of) < 2 or of[0] != (CANDIDATES,):
        return None
    found = _part(rw, rw.value(node, 1), [len(at) - 1]) if batch else own_rows.beside(rw, node.input[1])
    if found is None or found.dims[:1] != of[:1]:
        return None
    data = rw.value(node, 0)
    if not _is_repeated(rw, data, [0]) or any(map(is_candidate_symbol, symbols(of[1:]))):
        return None
    return [Picked(rw, _part(rw, rw.held(data, symbols([of[1]])), [0]), found).made]


def gather(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Gather by which every row of candidates picks of its own part of what is the same for all of them."""
    return None if attribute(node, "axis", 0) else _of_merged(rw, node, rw.values[node.input[1]].dims)


def _of_merged(rw: Rewrite, node: NodeProto, dims: Dims) -> list[Abstract] | None:
    """Rows `[N L, d]` of all candidates, picked at `n L + i`."""
    first, *others = rw.values[node.input[0]].dims
    if len(first) < 2 or first[0] != CANDIDATES or any(map(is_candidate_symbol, symbols([first[1:], *others]))):
        return None
    found = own_rows.added(rw, node.input[1], first[1:])
    if found is None:
        return None
    data = rw.value(node, 0)
    if CANDIDATES in rw.present(data):
        return None
    table = rw.held(rw.tidy((first[1:], *others), data.dtype, data.codes), symbols([first[1:]]))
    return [Picked(rw, table, rw.tidy(dims, found.dtype, found.codes.reshape(extents(dims)))).made]


def _is_repeated(rw: Rewrite, value: Value, axes: Sequence[int]) -> bool:
    """Whether a value does not vary along some of its axes."""
    along = {s for k in axes for s in symbols([value.dims[k]])}
    return along.isdisjoint(rw.present(value)) and all(
        value.codes.shape[k] == 1 or constant_along(value.codes, k) for k in axes
    )


def _part(rw: Rewrite, value: Value, axes: Sequence[int]) -> Value:
    """A value without axes along which it is the same."""
    kept = [k for k in range(value.rank) if k not in axes]
    codes = value.codes[tuple(0 if k in axes else slice(None) for k in range(value.rank))]
    return rw.tidy(tuple(value.dims[k] for k in kept), value.dtype, codes)


def _pays(rw: Rewrite, rows: Picked, macs: int) -> bool:
    """Whether it costs less to map all rows that there are, than those that each candidate picks.

    Args:
        rw: The rewrite.
        rows: The rows.
        macs: Multiply-adds for each.
    """
    written = 4 * prod(extents(rows.table.dims[1:]))
    there, here = map(picked.counted, (rows.table.dims[:1], rows.ids.dims))
    return rw.pays("picks", cost.estimate(macs * there, written * there), 0, cost.estimate(macs * here, written * here))


def reshape(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A reshape that divides or joins axes of candidates and of what each picks, and leaves rows as they are."""
    rows, entry = picked.of(rw.operand(node, 0)), find(node)
    if rows is None or entry is None or entry.move is None:
        return None
    found = entry.move(placed(rw, node))
    if not found:
        return None
    (dims,) = (m.dims for m in found)
    ids = _along(rw, rows, dims)
    return None if ids is None else [replace(rows, ids=ids).made]


def _along(rw: Rewrite, rows: Picked, dims: Dims) -> Value | None:
    """Positions in the shape that rows have in another; None where their entries are not the last axes of that."""
    lead, ids = len(dims) - rows.table.rank + 1, rows.ids
    if lead < 0 or dims[lead:] != rows.table.dims[1:] or stream(dims[:lead]) != stream(ids.dims):
        return None
    return rw.tidy(dims[:lead], ids.dtype, ids.codes.reshape(extents(dims[:lead])))


def matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A product of picked rows with constants."""
    rows, weight = picked.of(rw.operand(node, 0)), rw.weights(node, 1)
    if rows is None or weight is None or rows.table.rank < 2:
        return None
    inner, width = weight.data.shape
    if not _pays(rw, rows, prod(extents(rows.table.dims[1:-1])) * inner * width):
        return None
    mapped = rw.settle(linear_last(rw, rows.table, weight, "picks"))
    for source in rw.sources.of(mapped.codes):
        if source.origin.rule is None:
            source.origin = replace(source.origin, rule="picks")
    return [Picked(rw, mapped, rows.ids).made]


def pointwise(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """An elementwise operator of rows that are picked in the same way, and of what is the same for all of them."""
    values = {k: v for k, i in enumerate(node.input) if i and (v := rw.operand(node, k)) is not None}
    found = {k: rows for k, v in values.items() if (rows := picked.of(v)) is not None}
    if not found:
        return None
    first = next(iter(found.values()))
    if any(rows.table.dims != first.table.dims or not _are_same(rows.ids, first.ids) for rows in found.values()):
        return None
    entries = first.table.rank - 1
    operands = {k: found[k].table if k in found else _per_entry(rw, node, k, entries) for k in values}
    given = {k: v for k, v in operands.items() if v is not None}
    if len(given) < len(values) or not _pays(rw, first, 0):
        return None
    made = repeated(rw, node, given, rw.emit.fresh(f"{node.output[0]}/rows"))
    return [Picked(rw, made, first.ids).made] if made.dims == first.table.dims else None


def _are_same(one: Value, other: Value) -> bool:
    """Whether two values have the same entries for sure."""
    return one.dims == other.dims and np.array_equal(one.codes, other.codes)


def _per_entry(rw: Rewrite, node: NodeProto, k: int, entries: int) -> Value | None:
    """An operand that is the same for all rows, and has an entry for every entry of a row; None for others.

    Args:
        rw: The rewrite.
        node: The node.
        k: The operand's place.
        entries: Axes of a row.
    """
    found = rw.operand(node, k)
    if found is None or rw.level(found) > Level.REQUEST:
        return None
    value = rw.settle(found)
    lead = range(value.rank - entries)
    return _part(rw, value, lead) if _is_repeated(rw, value, lead) else None


def norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A normalisation of every row."""
    rows = picked.of(rw.operand(node, 0))
    if rows is None or any(node.output[1:]) or any(rw.array(node, k) is None for k in range(1, len(node.input))):
        return None
    axis = attribute(node, "axis", -1) % len(rows.dims) - rows.ids.rank + 1
    if axis < 1 or by_rows(rw, node, rows.table.rank - axis) or not _pays(rw, rows, 0):
        return None
    own, name = NodeProto(), rw.emit.fresh(f"{node.output[0]}/rows")
    own.CopyFrom(node)
    del own.attribute[:]
    own.attribute.extend(a for a in node.attribute if a.name != "axis")
    own.attribute.append(helper.make_attribute("axis", axis))
    others = [rw.tensor(rw.value(node, k)) for k in range(1, len(node.input))]
    with rw.emit.under("picks"):
        rw.emit.copy(own, [rw.tensor(rows.table), *others], [name])
    made = rw.new(rows.table.dims, rows.table.dtype, rw.present(rows.table), name)
    return [Picked(rw, made, rows.ids).made]


RULE = Rule(
    name="picks",
    title="Maps rows of the request before candidates pick some of them.",
    identity="f(H)[i] = f(H[i]), for rows i",
    source="onnxrank; search-based interest models (SIM, arXiv 2006.05639; ETA, arXiv 2108.04468)",
    legal="The rows are the same for all candidates, one position picks a whole row, and the map is one of every row.",
    refuses="Rows that differ between candidates, and maps that know which candidate picks.",
    exactness="reassociates",
    operators={
        "GatherElements": gather_elements,
        "GatherND": gather_nd,
        "Gather": gather,
        **dict.fromkeys(having(Trait.RESHAPE), reshape),
        "MatMul": matmul,
        **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), norm),
        **dict.fromkeys(having(Trait.ELEMENTWISE), pointwise),
    },
    cost="All rows of the history are mapped once, where each candidate mapped those that it picks.",
)
