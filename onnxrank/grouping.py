"""How entries are divided before anything is computed of them: by level, by tensor, in what order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank.values import (
    Codes,
    Dims,
    Level,
    Selectable,
    Sources,
    Unrepresentable,
    codes_of,
    extents,
    is_candidate_symbol,
    offsets,
    rectangles,
    source_numbers,
    split_axis,
    symbols,
    with_extents,
)

_MOST_BOXES = 16
"""Rectangles at most that entries are divided into: a bound on the size of the result."""
_LARGEST = 1 << 20
"""Entries at most that are looked at one by one for rectangles: a bound on what rewriting takes."""
COLUMNS = 16
"""Columns of a product that a core makes at once: fewer take as long."""
LARGE = 32
"""Entries per row of the smallest tensor that is kept apart from others.

A bound on how finely a result is divided: whether larger ones lie side by side is decided by what that costs, where a
product reads them (`rules/pieces.py`).
"""
APART = 256
"""The same where they are no parts: beside an operator that is run once more, copying so many takes long."""
Orders = dict[int, NDArray[np.int64]]
"""Per axis, an order of its positions."""


def permuted(array: NDArray[Any], orders: Orders) -> NDArray[Any]:
    """An array with its positions in other orders."""
    for axis, order in orders.items():
        array = array.take(order, axis)
    return array


def restored(array: NDArray[Any], orders: Orders) -> NDArray[Any]:
    """An array of which `permuted` changed the orders, as it was."""
    return permuted(array, {axis: np.argsort(order) for axis, order in orders.items()})


@dataclass(frozen=True)
class Group:
    """Entries of one level: where they are in the whole (`index`), and their shape."""

    level: Level
    index: Any
    dims: Dims

    def take(self, array: NDArray[Any]) -> NDArray[Any]:
        """The group's part of an array of the whole shape."""
        part: NDArray[Any] = array[self.index].reshape(extents(self.dims))
        return part

    def put(self, whole: NDArray[Any], part: NDArray[Any]) -> None:
        """Writes the group's part, broadcast to its shape, into an array of the whole shape."""
        wide = np.broadcast_to(part, extents(self.dims))
        whole[self.index] = wide.reshape(whole[self.index].shape)


def groups(levels: NDArray[np.int64], dims: Dims, flat: bool = True) -> list[Group]:
    """Divides entries by how often they have to be computed.

    Args:
        levels: Level of every entry, or any larger key whose last two bits are the level.
        dims: Logical shape.
        flat: Whether entries without a common axis may be taken one by one.

    Returns:
        The groups; entries nobody reads are in none.

    Raises:
        Unrepresentable: The levels do not follow an axis and `flat` is false.
    """
    if (levels == levels.flat[0]).all():
        level = _level(levels.flat[0])
        return [] if level is Level.UNREAD else [Group(level, ..., dims)]
    found = split_axis(levels)
    out = []
    boxes = rectangles(levels, _MOST_BOXES) if found is None and flat and levels.size < _LARGEST else None
    if boxes is not None:
        for box in boxes:
            places = np.ix_(*box)
            level = _level(levels[places].flat[0])
            if level is not Level.UNREAD:
                out.append(Group(level, places, with_extents(dims, levels[places].shape)))
        return out
    if found is not None:
        axis, parts = found
        for at in parts:
            level = _level(levels.take(at[0], axis).flat[0])
            index = tuple(at if k == axis else slice(None) for k in range(levels.ndim))
            if level is not Level.UNREAD:
                out.append(Group(level, index, with_extents(dims, levels[index].shape)))
        return out
    if not flat:
        raise Unrepresentable("levels that follow no single axis")
    syms = tuple((s,) for s in symbols(dims))
    for key in np.unique(levels):
        if key != Level.UNREAD:
            mask = levels == key
            size = int(mask.sum())
            out.append(Group(_level(key), mask, (*syms, (size,) if size > 1 else ())))
    return out


@dataclass(frozen=True)
class Grouping:
    """What the tensors behind codes say about how entries are to be divided.

    Attributes:
        sources: The tensors.
        length: What symbols other than the number of candidates are taken as, where entries are counted.
    """

    sources: Sources
    length: int = 1

    def joint_levels(self, arrays: Sequence[Codes]) -> NDArray[np.int64]:
        """How often each entry of an elementwise result must be computed; unread if an operand's entry is."""
        levels = [self.sources.levels(a) for a in arrays]
        unread = np.minimum.reduce(levels) == Level.UNREAD
        return np.where(unread, Level.UNREAD, np.maximum.reduce(levels)).astype(np.int64)

    def boxes(self, arrays: Sequence[Codes], rows: bool = False) -> list[Any]:
        """Divides entries by the candidate-level tensors they lie in, where those are few and large.

        What is made side by side would have to be copied side by side first.

        Args:
            arrays: Codes of the operands, of one shape.
            rows: Whether the last axis has to stay whole.

        Returns:
            Index of each part; one index of everything where tensors are small or do not follow rows and columns. So it
            is for those that are not parts, such as embeddings, which a layer joins sooner or later, unless all are
            large, and none would have to be cut.
        """
        shape, parts = arrays[0].shape, True
        keys = np.zeros(shape, np.int64)
        for a in arrays:
            candidate = self.sources.levels(a) == Level.CANDIDATE
            found = [s for s in self.sources.of(a) if s.level is Level.CANDIDATE]
            parts &= len(found) < 2 or all(s.part or s.offers(Selectable) for s in found)
            keys = keys * 1_000_003 + np.where(candidate, source_numbers(a) + 1, 0)
        if (keys == keys.flat[0]).all() or (rows and not parts):
            return [...]
        if rows:
            keys = (keys * np.random.default_rng(0).integers(1, 1 << 30, shape[-1])).sum(-1)
        along = {s for a in arrays for s in self.sources.symbols(a) if not is_candidate_symbol(s)}
        width = (shape[-1] if rows else 1) * self.length ** len(along)
        boxes = rectangles(keys, _MOST_BOXES)
        least = LARGE if parts else APART
        if boxes is None or len(boxes) == 1 or any(prod(map(len, box)) * width < least for box in boxes):
            return [...]
        if not parts and any(self._cuts(a, boxes) or self._is_for_columns(a) for a in arrays):
            return [...]
        return [(*np.ix_(*box), slice(None)) if rows else np.ix_(*box) for box in boxes]

    def _cuts(self, codes: Codes, boxes: Sequence[Sequence[NDArray[np.int64]]]) -> bool:
        """Whether a box has some of the entries of a candidate-level tensor, but not each of them once."""
        for box in boxes:
            part = codes[np.ix_(*box)]
            found = [s for s in self.sources.of(part) if s.level is Level.CANDIDATE]
            if found and (len(found) > 1 or not found[0].size == part.size == np.unique(part).size):
                return True
        return False

    def _is_for_columns(self, codes: Codes) -> bool:
        """Whether entries are constants, one for each: what they scale goes side by side into a layer."""
        found = self.sources.of(codes)
        return len(found) == 1 and found[0].level is Level.CONSTANT and found[0].size == codes.size

    def is_part(self, arrays: Iterable[Codes]) -> bool:
        """Whether entries come from tensors that were made apart."""
        return any(s.part for a in arrays for s in self.sources.of(a))

    def memory_order(self, arrays: Sequence[Codes]) -> Orders:
        """Orders of positions in which what lies side by side in a tensor comes together.

        What is joined in this order need not be sorted afterwards, position by position.

        Args:
            arrays: Codes of the operands, of one shape.

        Returns:
            The order per axis, where there is something to gain.
        """
        moving = [a for a in arrays if a.size and (self.sources.levels(a) == Level.CANDIDATE).any()]
        out: Orders = {}
        for axis, n in enumerate(moving[0].shape if moving else ()):
            lines = [np.moveaxis(a, axis, 0).reshape(n, -1)[:, 0] for a in moving]
            order = np.argsort(np.where(lines[0] < 0, np.iinfo(np.int64).max, lines[0]), kind="stable")
            gains = [_breaks(line) - _breaks(line[order]) for line in lines]
            if min(gains) >= 0 and max(gains) > 0:
                out[axis] = order
        return out

    def narrowed(self, codes: Codes, least: int = 1) -> Codes:
        """The same entries, of products that have no other columns.

        Args:
            codes: The entries.
            least: Columns of a product from which on it is made alone.
        """
        out = codes.copy()
        numbers = source_numbers(codes)
        for s in self.sources.of(codes):
            product = s.offers(Selectable)
            if product is None:
                continue
            at = numbers == s.number
            width = extents(s.dims)[-1] if extents(s.dims)[-1] > 1 else s.size
            row, column = np.divmod(offsets(codes[at]), width)
            columns: NDArray[np.int64] = np.unique(column)
            if least <= len(columns) < width:
                cut = codes_of(product.select_columns(columns)).reshape(-1)
                out[at] = cut[row * len(columns) + np.searchsorted(columns, column)]
        return out


def _breaks(line: Codes) -> int:
    """How often a line of codes goes back, or to another source."""
    return int(((np.diff(line) < 0) | (np.diff(source_numbers(line)) != 0)).sum())


def _level(key: Any) -> Level:
    """The level in a key of `Rewrite.groups`."""
    return Level.UNREAD if key == Level.UNREAD else Level(int(key) & 3)
