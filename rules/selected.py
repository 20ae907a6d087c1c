"""Linear maps of rows that were selected from fewer rows: made before the selection, once for each different row.

`[x[i] | y[j]] W = (x W_x)[i] + (y W_y)[j]`, as graphs over fields and products of pairs ask for. What is selected
behind the map is mostly narrower than in front of it, and where rows are laid out by `i` and `j` nothing is selected at
all: the sum is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxrank import cost
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import HOLE, Abstract, Codes, Dims, Level, Value, canonical, view, with_extents

_MOST = 4
"""Selections at most that the columns of an operand are divided into: a bound on the size of the result."""


@dataclass(frozen=True)
class _Selection:
    """Columns of an operand whose rows are selected in the same way.

    Attributes:
        columns: Which, as a mask.
        rows: The different rows of them.
        places: Of each row, which of those it is.
    """

    columns: NDArray[np.bool_]
    rows: NDArray[np.int64]
    places: NDArray[np.int64]


def selected_after(
    rw: Rewrite, x: Value, axis: int, linear: Callable[[Value], Abstract], rule: str, width: int
) -> Abstract:
    """A linear map of an axis, of which rows that repeat are made once.

    Args:
        rw: The rewrite.
        x: The operand.
        axis: The axis that is mapped.
        linear: The map of other values, which may have fewer rows; it leaves out columns of 0.
        rule: Name of the rule, for the plan.
        width: Entries of the axis behind the map.
    """
    for along in range(x.rank):
        found = _selections(x, axis, along) if along != axis and x.whole is None else []
        if found and _pays(rw, x, axis, along, found, rule, width):
            dims = (*x.dims[:axis], canonical([width]), *x.dims[axis + 1 :])
            terms = [t for one in found for t in _selected(rw, x, axis, along, one, linear, dims)]
            return rw.add(terms, dims, x.dtype)
    return linear(x)


def _selected(
    rw: Rewrite, x: Value, axis: int, along: int, one: _Selection, linear: Callable[[Value], Abstract], dims: Dims
) -> list[Value]:
    """The map of some columns, selected behind it."""
    mask = np.expand_dims(one.columns, [k for k in range(x.rank) if k != axis])
    part = np.where(mask, x.codes, rw.zero(x.dtype)).take(one.rows, along)
    made = linear(view(with_extents(x.dims, part.shape), x.dtype, part))
    return rw.terms(rw.moved(made, dims, lambda codes: codes.take(one.places, along)))


def _pays(rw: Rewrite, x: Value, axis: int, along: int, found: Sequence[_Selection], rule: str, width: int) -> bool:
    """Decides whether rows are selected behind the map."""
    rows = x.codes.size // x.codes.shape[axis]
    columns, others = x.codes.shape[axis], rows // x.codes.shape[along]
    macs = others * sum(len(one.rows) * int(one.columns.sum()) for one in found)
    first = cost.estimate(macs=rows * columns * width, written=4 * rows * columns)
    after = cost.estimate(macs=macs * width, written=4 * rows * width * len(found))
    often = rw.level(x) is Level.CANDIDATE
    left, made = (
        Alternative(name, exactness, *((0.0, time) if often else (time, 0.0)))
        for name, exactness, time in ((LEAVE, "", first), (TAKE, "reassociates", after))
    )
    return rw.decide(rule, (left, made)) == TAKE


def _selections(x: Value, axis: int, along: int) -> list[_Selection]:
    """How rows along an axis are selected from fewer ones; nothing where they are not, or in too many ways.

    Rows that are all alike are no selection: they are broadcast in any case.
    """
    count = x.codes.shape[along]
    if count < 3 or (x.codes == HOLE).any():
        return []
    flat = np.moveaxis(x.codes, (along, axis), (0, -1)).reshape(count, -1, x.codes.shape[axis])
    columns: dict[bytes, list[int]] = {}
    for k in range(flat.shape[-1]):
        columns.setdefault(_places(flat[..., k]).tobytes(), []).append(k)
        if len(columns) > _MOST:
            return []
    out = []
    for key, own in columns.items():
        rows, places = np.unique(np.frombuffer(key, np.int64), return_inverse=True)
        out.append(_Selection(np.isin(np.arange(flat.shape[-1]), own), rows, places))
    return out if any(1 < len(one.rows) < count for one in out) else []


def _places(rows: Codes) -> NDArray[np.int64]:
    """Of each row, the first one that is the same."""
    _, first, back = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return np.asarray(first[back.reshape(-1)], np.int64)
