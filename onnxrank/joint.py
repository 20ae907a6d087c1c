"""Ids of a joined table: how they are brought to their places, and how that is read back.

An id outside its own table must fail as it did, and never read its neighbour's rows. With `rows` of a table that
begins at `first`, of `total` rows in all, Gather takes ids in `[-rows, rows)`, and the joined one

    Where(id < -rows, total, Where(id < rows, id + Where(id < 0, first + rows, first), total))

which is `total`, and fails, for every id that is not there. Nothing relies on what a sum that overflows gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.operators import operator


def bring(
    add: Callable[[str, Sequence[str], str], str],
    numbers: Callable[[Any, str], str],
    ids: str,
    rows: NDArray[np.int64],
    begin: NDArray[np.int64],
    total: int,
) -> str:
    """Brings ids to the places of their tables in a joined one, or outside of it.

    Args:
        add: Adds a node: operator, operands and a hint for the result's name.
        numbers: Adds a constant.
        ids: The ids, `[..., ids]`.
        rows: Rows of the table of each.
        begin: Where that begins.
        total: Rows of all tables.
    """
    outside = numbers(total, "lookup/outside")
    below = add("Less", [ids, numbers(-rows, "lookup/least")], "lookup/below")
    within = add("Less", [ids, numbers(rows, "lookup/most")], "lookup/within")
    negative = add("Less", [ids, numbers(0, "lookup/zero")], "lookup/negative")
    shift = add(
        "Where", [negative, numbers(begin + rows, "lookup/end"), numbers(begin, "lookup/begin")], "lookup/shift"
    )
    place = add("Add", [ids, shift], "lookup/place")
    inside = add("Where", [within, place, outside], "lookup/inside")
    return add("Where", [below, outside, inside], "lookup/places")


def limits(
    name: str, maker: Mapping[str, NodeProto], constant: Callable[[str], NDArray[Any] | None]
) -> tuple[str, NDArray[np.int64], NDArray[np.int64]] | None:
    """The ids behind the places that `bring` made, with the rows of the table of each, and where it begins.

    None for any other tensor.

    Args:
        name: The tensor.
        maker: What makes each tensor.
        constant: The entries of a constant.
    """

    def made(tensor: str, op: str) -> Sequence[str] | None:
        node = maker.get(tensor)
        return list(node.input) if node is not None and operator(node) == op else None

    outer = made(name, "Where")
    inner = made(outer[2], "Where") if outer is not None else None
    if outer is None or inner is None:
        return None
    below, within, place = made(outer[0], "Less"), made(inner[0], "Less"), made(inner[1], "Add")
    if below is None or within is None or place is None or not below[0] == within[0] == place[0]:
        return None
    shift = made(place[1], "Where")
    most, least, outside = constant(within[1]), constant(below[1]), constant(outer[1])
    begin = None if shift is None else constant(shift[2])
    if most is None or least is None or outside is None or begin is None:
        return None
    if outside.size != 1 or begin.shape != most.shape or not np.array_equal(least, -most):
        return None
    return place[0], np.asarray(most, np.int64), np.asarray(begin, np.int64)
