"""Operators that look up entries at positions, or find positions."""

from __future__ import annotations

import numpy as np

from onnxrank import moves, transfers
from onnxrank.extents import Expr, Unproved
from onnxrank.operators import signatures
from onnxrank.operators.entry import Operator, Trait
from onnxrank.operators.known import Known, Partial, constant, known, whole
from onnxrank.operators.shapers import same_as
from onnxrank.operators.use import Use


def _gather(u: Use) -> list[Partial | None]:
    have, ids = u.shape(0), u.shape(1)
    axis = u.axis(0, len(have))
    return [[*have[:axis], *ids, *have[axis + 1 :]]]


def _gather_entries(u: Use) -> list[Known | None]:
    x, ids = u.value(0), u.value(1)
    (found,) = _gather(u)
    assert found is not None
    shape = whole(found)
    axis = u.axis(0, len(x.shape))
    n = x.shape[axis]
    if not ids.concrete or isinstance(n, Expr):
        raise Unproved("positions on a symbolic axis")
    at = np.where(ids.data < 0, ids.data + n, ids.data)
    if at.size and (at.min() < 0 or at.max() >= n):
        raise Unproved("a position outside")
    return [known(shape, np.take(x.data, at.astype(np.int64), axis), x.dtype)]


def _gather_nd(u: Use) -> list[Partial | None]:
    have, ids = u.shape(0), u.shape(1)
    if isinstance(ids[-1], Expr):
        return [None]
    batch = int(u.attribute("batch_dims", 0))
    return [[*ids[:-1], *have[batch + ids[-1] :]]]


def _one_hot(u: Use) -> list[Partial | None]:
    have, axis = list(u.shape(0)), _one_hot_axis(u)
    found = u.values[1]
    depth = found.sizes()[0] if found is not None and found.dtype.kind in "iu" else None
    return [[*have[:axis], depth, *have[axis:]]]


def _one_hot_axis(u: Use) -> int:
    axis = int(u.attribute("axis", -1))
    return axis + len(u.shape(0)) + 1 if axis < 0 else axis


def _one_hot_entries(u: Use) -> list[Known | None]:
    ids, values = u.value(0), u.value(2)
    (found,) = _one_hot(u)
    assert found is not None
    shape, axis = whole(found), _one_hot_axis(u)
    depth = shape[axis]
    if not ids.fixed or isinstance(depth, Expr):
        raise Unproved("positions on a symbolic axis")
    at = np.where(ids.data < 0, ids.data + depth, ids.data)
    hot = np.moveaxis(at[..., None] == np.arange(depth), -1, axis)
    return [known(shape, values.data[hot.astype(np.int64)], values.dtype)]


def _non_zero(u: Use) -> list[Partial | None]:
    return [[len(u.shape(0)) or 1, None]]


def _non_zero_entries(u: Use) -> list[Known | None]:
    x = u.value(0)
    if not x.fixed:
        raise Unproved("positions along a symbolic axis")
    return [constant(np.array(np.nonzero(np.atleast_1d(x.data)), np.int64))]


OPERATORS = {
    "Gather": Operator(
        _gather,
        _gather_entries,
        traits=Trait.MOVEMENT | Trait.PICK | Trait.LOOKUP,
        move=moves.gather,
        levels=transfers.gather,
    ),
    "GatherND": Operator(
        _gather_nd,
        traits=Trait.MOVEMENT | Trait.LOOKUP,
        move=moves.gather_nd,
        levels=transfers.gather_nd,
        signature=signatures.gather_nd,
    ),
    "GatherElements": Operator(same_as(1), traits=Trait.LOOKUP, levels=transfers.gather_elements),
    "OneHot": Operator(_one_hot, _one_hot_entries, levels=transfers.one_hot),
    "NonZero": Operator(_non_zero, _non_zero_entries),
}
