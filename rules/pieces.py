"""Which entries of an operand one product can take: rectangles of one level, of an axis that is contracted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank import cost
from onnxrank.grouping import LARGE, Group
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import (
    Codes,
    Dims,
    Level,
    Unrepresentable,
    codes_of,
    cut_repeats,
    source_numbers,
    split_axis,
    with_extents,
)
from onnxrank.weights import Weights

from . import fold


@dataclass(frozen=True)
class Piece:
    """A rectangle of operand entries of one level that one product can take.

    Attributes:
        level: Its level.
        group: The rows it contributes to.
        codes: Entries `[rows..., columns]`, axes along which they do not vary cut to 1.
        dims: Logical shape of `codes`.
        slot: Its number among the pieces of its rows.
        columns: Which column of the operand each entry stands for: `columns[j]` is the place, among the columns of
            `codes`, of operand column `members[j]`; equal columns share a place.
        members: The operand's columns that the piece covers.
        fold: How to contract it over the candidate-level factors alone, if that pays.
    """

    level: Level
    group: Group
    codes: Codes
    dims: Dims
    slot: int
    columns: NDArray[np.int64]
    members: NDArray[np.int64]
    fold: fold.Fold | None = None

    def put(self, whole: Codes, part: Codes) -> None:
        """Writes results `[rows..., width]` of the piece into an array over all rows."""
        target = whole[self.group.index]
        whole[self.group.index] = np.broadcast_to(part, target.shape)

    def weights(self, rw: Rewrite, weight: Weights) -> str:
        """The rows of weights, in each matrix of a stack, that belong to the piece; those of equal columns are added.

        The addition is a node of constants, which the runtime folds: no weight is rounded here.
        """
        count, axis = self.codes.shape[-1], weight.data.ndim - 2
        plain = len(np.unique(self.columns)) == len(self.members)
        if plain and count == len(self.members):
            order = np.empty(count, np.int64)
            order[self.columns] = self.members
            return weight.part(rw.emit, axis, order).tensor(rw.emit)
        if plain and weight.name is None and axis == 0:
            out = np.zeros((count, weight.data.shape[1]), weight.data.dtype)
            out[self.columns] = weight.data[self.members]
            return rw.emit.constant(out)
        chosen = np.zeros((count, len(self.members)), weight.data.dtype)
        chosen[self.columns, np.arange(len(self.members))] = 1
        return rw.emit.add(
            "MatMul", [rw.emit.constant(chosen), weight.part(rw.emit, axis, self.members).tensor(rw.emit)]
        )


_FEW = 3
"""Tensors at most whose rows are contracted apart: what comes of more is joined again sooner or later."""
_MOST_PRODUCTS = 8
"""Products at most that one becomes because tensors do not lie side by side: a bound on the size of the result."""


@dataclass(frozen=True)
class Division:
    """How an operand that is contracted over its last axis may be divided.

    Attributes:
        rw: The rewrite.
        rule: Name of the rule that contracts it.
        width: Columns of the weights that the pieces are for, which may undo entries nobody asked for by 0 and fold
            products; 0 for other contractions.
        sums: Whether entries are added up, so that zeros may be left out.
        stack: Axes of rows that have weights of their own, along which results vary where the operand does not.
    """

    rw: Rewrite
    rule: str
    width: int = 0
    sums: bool = False
    stack: Sequence[int] = ()

    def pieces(self, codes: Codes, dims: Dims) -> Iterator[Piece]:
        """Divides the entries `[rows..., columns]` of an operand.

        Args:
            codes: The entries.
            dims: Logical shape.

        Raises:
            Unrepresentable: The levels follow no axis.
        """
        whole = _whole(self.rw, codes, dims)
        if whole is not None:
            yield whole
            return
        levels, groups = _rows_alike(self.rw, codes, dims)
        for index, own in groups:
            index = _together(self.rw, codes, index)
            level_of = levels[index].reshape(-1, codes.shape[-1])[0]
            if (level_of == Level.UNREAD).any():
                continue
            if (levels[index] != level_of).any():
                raise Unrepresentable("levels that follow no single axis")
            yield from self._by_columns(codes[index], own, level_of, Group(Level.CANDIDATE, index, (*own[:-1],)))

    def _by_columns(self, part: Codes, own: Dims, level_of: NDArray[np.int64], group: Group) -> Iterator[Piece]:
        """Divides rows that are alike by their columns: what folds, then what varies along the same axes."""
        rw, slots = self.rw, itertools.count()
        found = None
        if self.width and rw.uses("fold"):
            found = fold.find(rw, part, own, level_of == Level.CANDIDATE, self.width)
        if found is not None:
            members, how = found
            level_of = level_of.copy()
            level_of[members] = Level.UNREAD
            sub = part[..., members]
            columns = np.arange(len(members))
            yield Piece(Level.CANDIDATE, group, sub, with_extents(own, sub.shape), next(slots), columns, members, how)
        nothing = (part == rw.zero(rw.sources.of(part)[0].dtype)).all(tuple(range(part.ndim - 1))) & self.sums
        if nothing.all():
            nothing[0] = False
        level_of = np.where(nothing, Level.UNREAD, level_of)
        signature = self._signature(part, level_of)
        for key in dict.fromkeys(signature.tolist()):
            members = np.flatnonzero(signature == key)
            if level_of[members[0]] == Level.UNREAD:
                continue
            sub, columns = self._distinct(part[..., members])
            level = Level(int(level_of[members[0]]))
            yield Piece(level, group, sub, with_extents(own, sub.shape), next(slots), columns, members)

    def _signature(self, part: Codes, level_of: NDArray[np.int64]) -> NDArray[np.int64]:
        """Per column a number: columns that vary along the same axes go together."""
        signature = level_of.copy()
        rows = tuple(range(part.ndim - 1))
        for axis in rows:
            if part.shape[axis] > 1:
                still = (part == part.take([0], axis)).all(rows)
                signature = signature * 2 + ~still
        if self.width:
            signature = signature * (1 << 32) + self._on_their_own(part, level_of)
        return signature

    def _distinct(self, part: Codes) -> tuple[Codes, NDArray[np.int64]]:
        """Columns without repeats, cut to 1 along axes where they do not vary; and which of them each one is."""
        sub = cut_repeats(part, [k for k in range(part.ndim - 1) if k not in self.stack])
        flat = sub.reshape(-1, sub.shape[-1])
        order = np.argsort(flat[0], kind="stable")
        ranked = flat[:, order]
        starts = np.concatenate([[True], (ranked[:, 1:] != ranked[:, :-1]).any(0)])
        keep, columns = order[starts], np.empty(sub.shape[-1], np.int64)
        columns[order] = np.cumsum(starts) - 1
        sub = sub[..., keep]
        if self.width and flat.shape[0] == 1:
            sub, moved = _completed(self.rw, sub)
            columns = moved[columns]
        return sub, columns

    def _on_their_own(self, codes: Codes, levels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the tensor of each column that has a product of its own; 0 for those that lie side by side.

        To lie beside other columns a tensor has to be copied; a product of its own gives a result more, that is added.
        """
        out = np.zeros(codes.shape[-1], np.int64)
        if prod(codes.shape[:-1]) > 1:
            return out
        numbers = source_numbers(codes).reshape(-1)
        found, counts = np.unique(numbers[levels == Level.CANDIDATE], return_counts=True)
        if len(found) < 2:
            return out
        least = LARGE if len(found) <= _MOST_PRODUCTS else cost.WIDE
        copied, (once, added) = [cost.beside(int(count)) for count in counts], cost.added(self.width)
        own = [
            k
            for k, (source, count) in enumerate(zip(map(self.rw.sources.__getitem__, found), counts, strict=True))
            if count == source.size >= (least if source.part else cost.WIDE) and copied[k] > added
        ]
        own = sorted(own, key=lambda k: -copied[k])[: _MOST_PRODUCTS - (len(own) < len(found))]
        rest = [c for k, c in enumerate(copied) if k not in own]
        # One product there is in any case, and what is alone is not copied.
        more = len(own) - (not rest)
        left = Alternative(LEAVE, "", 0, sum(copied))
        each = more * added + (sum(rest) if len(rest) > 1 else 0)
        apart = Alternative(TAKE, "reassociates", more * once, each)
        if own and self.rw.decide(self.rule, (left, apart)) == TAKE:
            for k in own:
                out[numbers == found[k]] = found[k] + 1
        return out


def _whole(rw: Rewrite, codes: Codes, dims: Dims) -> Piece | None:
    """The operand as a single piece where it is one tensor as it is, for a row: so are most products of most models."""
    source = rw.sources.of(codes[..., :1])
    if not source or not codes.shape[-1] == codes.size == source[0].size > 1 or source[0].is_open:
        return None
    if not np.array_equal(codes.reshape(-1), codes_of(source[0]).reshape(-1)):
        return None
    columns = np.arange(codes.size)
    return Piece(source[0].level, Group(Level.CANDIDATE, ..., dims[:-1]), codes, dims, 0, columns, columns)


def _rows_alike(rw: Rewrite, codes: Codes, dims: Dims) -> tuple[NDArray[np.int64], list[tuple[Any, Dims]]]:
    """The level of every entry, and rows whose columns have the same levels: index, and shape of their part."""
    levels = rw.sources.levels(codes).astype(np.int64)
    mix = np.random.default_rng(0).integers(1, 1 << 40, codes.shape[-1])
    row_keys = ((levels + 2) * mix).sum(-1)
    numbers = source_numbers(codes)
    if 1 < len(np.unique(numbers)) <= _FEW and (numbers == numbers[..., :1]).all():
        # Rows of a few large tensors: contracted where they lie, they need not be joined.
        row_keys = row_keys + numbers[..., 0] * 1_000_003
    row_keys[(levels == Level.UNREAD).any(-1)] = 0
    if (row_keys == row_keys.flat[0]).all():
        return levels, [(..., dims)]
    found = split_axis(row_keys)
    if found is None:
        # Rows differ in what they hold in a way that follows no axis: all columns together, at their highest level.
        levels = np.broadcast_to(levels.max(), levels.shape)
        found = (0, [np.arange(codes.shape[0])])
    axis, parts = found
    groups: list[tuple[Any, Dims]] = []
    for at in parts:
        index = tuple(at if k == axis else slice(None) for k in range(codes.ndim - 1))
        groups.append((index, with_extents(dims, codes[index].shape)))
    return levels, groups


def _together(rw: Rewrite, codes: Codes, index: Any) -> Any:
    """The index of some rows with those of one tensor side by side."""
    orders = {k: o for k, o in rw.grouping.memory_order([codes[index]]).items() if k < codes.ndim - 1}
    if index is ...:
        return tuple(orders.get(k, slice(None)) for k in range(codes.ndim - 1)) if len(orders) == 1 else index
    return tuple(i[orders[k]] if k in orders and not isinstance(i, slice) else i for k, i in enumerate(index))


def _completed(rw: Rewrite, codes: Codes) -> tuple[Codes, NDArray[np.int64]]:
    """Adds the missing entries of blocks of dot products that are used for the better part, such as a triangle.

    They get weights of 0: a few more products cost less than picking activations apart.

    Returns:
        The sorted entries, and where each given one has gone.
    """
    flat = codes.reshape(-1)
    extra = [flat]
    for number, count in zip(*np.unique(source_numbers(flat), return_counts=True), strict=True):
        source = rw.sources[int(number)]
        if source.block and count < source.size <= 2 * count + 1:
            extra.append(np.setdiff1d(codes_of(source).reshape(-1), flat))
    if len(extra) == 1:
        return codes, np.arange(flat.size)
    everything = np.sort(np.concatenate(extra))
    return everything.reshape(*codes.shape[:-1], -1), np.searchsorted(everything, flat)
