"""Arrays of codes, divided: axes they do not vary along, axes whose position decides, boxes of one key."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]


def constant_along(codes: Codes, axis: int) -> bool:
    """Whether the value is the same at every position of an axis of more than one."""
    if codes.shape[axis] == 1:
        return False
    first = codes.take([0], axis)
    return bool((codes == first).all())


def cut_repeats(codes: Codes, axes: Iterable[int] | None = None) -> Codes:
    """Codes cut to one position along every axis (of `axes`) that the value does not vary along."""
    for axis in range(codes.ndim) if axes is None else axes:
        if constant_along(codes, axis):
            codes = codes.take([0], axis)
    return codes


def split_axis(keys: NDArray[np.int64]) -> tuple[int, list[NDArray[np.int64]]] | None:
    """Finds the axis along which `keys` is piecewise constant and on whose position alone it depends.

    Returns:
        The axis and, per distinct key in order of first appearance, the positions that have it; None if there is
        no such axis.
    """
    best: tuple[int, int, NDArray[np.int64]] | None = None
    for axis in range(keys.ndim):
        if keys.shape[axis] == 1:
            continue
        flat = np.moveaxis(keys, axis, 0).reshape(keys.shape[axis], -1)
        if not (flat == flat[:, :1]).all():
            continue
        runs = int((flat[1:, 0] != flat[:-1, 0]).sum())
        if best is None or runs < best[0]:
            best = (runs, axis, flat[:, 0])
    if best is None:
        return None
    _, axis, column = best
    found, first = np.unique(column, return_index=True)
    return axis, [np.flatnonzero(column == found[i]) for i in np.argsort(first)]


def rectangles(keys: NDArray[np.int64], most: int) -> list[tuple[NDArray[np.int64], ...]] | None:
    """Divides an array into boxes of one key each, each box a set of positions per axis.

    Args:
        keys: Key of every entry.
        most: Boxes allowed.

    Returns:
        The positions of each box, in order of first appearance; None if more boxes would be needed.
    """
    whole = tuple(np.arange(n) for n in keys.shape)
    if (keys == keys.flat[0]).all():
        return [whole]
    ways: list[tuple[int, int, NDArray[np.int64], NDArray[np.int64]]] = []
    for axis in range(keys.ndim):
        flat = np.moveaxis(keys, axis, 0).reshape(keys.shape[axis], -1)
        if len(flat) == 1 or (flat == flat[:1]).all():
            continue
        _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
        if len(first) <= most:
            ways.append((len(first), axis, first, inverse.reshape(-1)))
    for _, axis, first, inverse in sorted(ways, key=lambda w: w[:2]):
        out: list[tuple[NDArray[np.int64], ...]] = []
        for kind in np.argsort(first):
            at = np.flatnonzero(inverse == kind)
            inner = rectangles(keys.take(at[:1], axis), most - len(out))
            if inner is None:
                break
            out += [tuple(at if k == axis else p for k, p in enumerate(box)) for box in inner]
        else:
            if len(out) <= most:
                return out
    return None
