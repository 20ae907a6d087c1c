"""Products by level: how the contraction of an axis is divided into rectangles of one level, and written.

This is the mechanism of `fc`, `pool` and `norm`. A sum over an axis is the sum over its parts; each part of one level
is made once per level, over the axes it varies along, and its layout is folded into the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnxrank import cost
from onnxrank.grouping import LARGE, Group
from onnxrank.rewrite import Rewrite
from onnxrank.values import (
    HOLE,
    Abstract,
    Affine,
    AffineProduct,
    Codes,
    DeferredMatMul,
    Dims,
    Level,
    Multiplicable,
    OpenProduct,
    Scalable,
    Selectable,
    Source,
    Sum,
    Unrepresentable,
    Value,
    canonical,
    codes_of,
    cut_repeats,
    extended,
    extents,
    is_candidate_symbol,
    keep_symbols,
    source_numbers,
    split_axis,
    symbols,
    view,
    with_extents,
)
from onnxrank.weights import Weights

from . import fold
from .broadcast import elementwise, mark_unread


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
_MOST_PRODUCTS = 8


def pieces(
    rw: Rewrite, codes: Codes, dims: Dims, width: int = 0, sums: bool = False, stack: Sequence[int] = ()
) -> Iterator[Piece]:
    """Divides the entries `[rows..., columns]` of an operand that is contracted over its last axis.

    Args:
        rw: The rewrite.
        codes: The entries.
        dims: Logical shape.
        width: Columns of the weights that the pieces are for, which may undo entries nobody asked for by 0 and fold
            products; 0 for other contractions.
        sums: Whether entries are added up, so that zeros may be left out.
        stack: Axes of rows that have weights of their own, along which results vary where the operand does not.

    Raises:
        Unrepresentable: The levels follow no axis.
    """
    source = rw.sources.of(codes[..., :1])
    if source and codes.shape[-1] == codes.size == source[0].size > 1 and not source[0].is_open:
        if np.array_equal(codes.reshape(-1), codes_of(source[0]).reshape(-1)):
            # One tensor as it is, for a row: most products of most models.
            columns = np.arange(codes.size)
            yield Piece(source[0].level, Group(Level.CANDIDATE, ..., dims[:-1]), codes, dims, 0, columns, columns)
            return
    levels = rw.sources.levels(codes).astype(np.int64)
    mix = np.random.default_rng(0).integers(1, 1 << 40, codes.shape[-1])
    row_keys = ((levels + 2) * mix).sum(-1)
    numbers = source_numbers(codes)
    if 1 < len(np.unique(numbers)) <= _FEW and (numbers == numbers[..., :1]).all():
        # Rows of a few large tensors: contracted where they lie, they need not be joined.
        row_keys = row_keys + numbers[..., 0] * 1_000_003
    row_keys[(levels == Level.UNREAD).any(-1)] = 0
    rows = dims[:-1]
    groups: list[tuple[Any, Dims]] = [(..., dims)]
    if not (row_keys == row_keys.flat[0]).all():
        found = split_axis(row_keys)
        if found is None:
            # Rows differ in what they hold in a way that follows no axis: all columns together, at their highest level.
            levels = np.broadcast_to(levels.max(), levels.shape)
            found = (0, [np.arange(codes.shape[0])])
        axis, parts = found
        groups = []
        for at in parts:
            index = tuple(at if k == axis else slice(None) for k in range(codes.ndim - 1))
            groups.append((index, with_extents(dims, codes[index].shape)))
    for index, own in groups:
        index = _together(rw, codes, index)
        part, level_of = codes[index], levels[index].reshape(-1, codes.shape[-1])[0]
        if (level_of == Level.UNREAD).any():
            continue
        if (levels[index] != level_of).any():
            raise Unrepresentable("levels that follow no single axis")
        group = Group(Level.CANDIDATE, index, (*own[:-1],))
        slots = itertools.count()
        found_fold = None
        if width and rw.uses("fold"):
            found_fold = fold.find(rw, part, own, level_of == Level.CANDIDATE, width)
        if found_fold is not None:
            members, how = found_fold
            level_of = level_of.copy()
            level_of[members] = Level.UNREAD
            sub = part[..., members]
            columns = np.arange(len(members))
            yield Piece(Level.CANDIDATE, group, sub, with_extents(own, sub.shape), next(slots), columns, members, how)
        nothing = (part == rw.zero(rw.sources.of(part)[0].dtype)).all(tuple(range(part.ndim - 1))) & sums
        if nothing.all():
            nothing[0] = False
        level_of = np.where(nothing, Level.UNREAD, level_of)
        # Columns that vary along the same axes go together.
        signature = level_of.copy()
        for axis in range(len(rows)):
            if part.shape[axis] > 1:
                still = (part == part.take([0], axis)).all(tuple(range(len(rows))))
                signature = signature * 2 + ~still
        if width:
            signature = signature * (1 << 32) + _on_their_own(rw, part, level_of, width)
        for key in dict.fromkeys(signature.tolist()):
            members = np.flatnonzero(signature == key)
            if level_of[members[0]] == Level.UNREAD:
                continue
            sub = cut_repeats(part[..., members], [k for k in range(len(rows)) if k not in stack])
            flat = sub.reshape(-1, len(members))
            order = np.argsort(flat[0], kind="stable")
            ranked = flat[:, order]
            starts = np.concatenate([[True], (ranked[:, 1:] != ranked[:, :-1]).any(0)])
            keep, columns = order[starts], np.empty(len(members), np.int64)
            columns[order] = np.cumsum(starts) - 1
            sub = sub[..., keep]
            if width and flat.shape[0] == 1:
                sub, moved = _completed(rw, sub)
                columns = moved[columns]
            level = Level(int(level_of[members[0]]))
            yield Piece(level, group, sub, with_extents(own, sub.shape), next(slots), columns, members)


def _together(rw: Rewrite, codes: Codes, index: Any) -> Any:
    """The index of some rows with those of one tensor side by side."""
    orders = {k: o for k, o in rw.grouping.memory_order([codes[index]]).items() if k < codes.ndim - 1}
    if index is ...:
        return tuple(orders.get(k, slice(None)) for k in range(codes.ndim - 1)) if len(orders) == 1 else index
    return tuple(i[orders[k]] if k in orders and not isinstance(i, slice) else i for k, i in enumerate(index))


def _on_their_own(rw: Rewrite, codes: Codes, levels: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """Number of the tensor of each column that has a product of its own: large ones before narrow weights.

    To lie beside other columns they would have to be copied, which costs more than adding a narrow result.
    """
    out = np.zeros(codes.shape[-1], np.int64)
    if prod(codes.shape[:-1]) > 1 or codes.shape[-1] < 2 * LARGE:
        return out
    numbers = source_numbers(codes).reshape(-1)
    found, counts = np.unique(numbers[levels == Level.CANDIDATE], return_counts=True)
    if len(found) < 2 or len(found) > _MOST_PRODUCTS:
        return out
    for number, count in zip(found.tolist(), counts.tolist(), strict=True):
        source = rw.sources[number]
        if source.part and count >= max(LARGE, 4 * width) and count == source.size:
            out[numbers == number] = number + 1
    return out


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


Product = Callable[[Piece, str, Dims], DeferredMatMul]
"""How a piece, given as a tensor of a physical shape, is contracted."""

WeightedProduct = Callable[[str, Dims, str], DeferredMatMul]
"""The same with the name of the piece's weights."""


def partials(
    rw: Rewrite,
    x: Value,
    axis: int,
    width: int,
    write: Product,
    rule: str,
    unread: Any = None,
    idempotent: bool = False,
    weighted: bool = False,
    additive: bool = False,
    known: Callable[[DeferredMatMul, Piece], DeferredMatMul] | None = None,
    stack: Sequence[int] = (),
) -> list[Value]:
    """Contracts one axis of a value piece by piece.

    Args:
        rw: The rewrite.
        x: The operand.
        axis: The contracted axis; its extent is constant.
        width: Extent of the axis afterwards.
        write: Writes the contraction of one piece.
        rule: Name of the rule, for the report.
        unread: Positions read per axis of the result, if not all.
        weighted: Whether `write` multiplies with weights, of which 0 undoes an entry.
        additive: Whether the contraction is a plain sum.
        known: Gives the contraction of a piece in a form that more can be asked of, if there is one.
        idempotent: Whether rows with fewer pieces repeat one (maximum) instead of holding 0 (sum).
        stack: Other axes that have weights of their own: operands are cut along them where they do not vary, results
            are not.

    Returns:
        Partial results, to be added up (or joined by the idempotent operation).
    """
    codes = np.moveaxis(x.codes, axis, -1)
    dims = (*x.dims[:axis], *x.dims[axis + 1 :], x.dims[axis])
    if unread:
        rows = {a - (a > axis): p for a, p in unread.items() if a != axis}
        codes = mark_unread(codes, rows) if rows else codes
    column = canonical([width])
    shape = (*extents(dims[:-1]), width)
    zero = rw.zero(x.dtype)
    terms: list[Codes] = []
    split = not rw.single_level(x)
    apart = [a - (a > axis) for a in stack]
    for piece in pieces(rw, codes, dims, width if weighted else 0, not idempotent, apart):
        if piece.slot == len(terms):
            terms.append(np.full(shape, HOLE if unread or idempotent else zero))
        small = piece.codes.shape[:-1]
        lowered = piece.level is Level.REQUEST and any(map(is_candidate_symbol, symbols(dims)))
        tag = "fold" if piece.fold else rule if split or lowered else None
        if prod(small) < prod(shape[:-1]) and not stack:
            tag = tag or ("select" if unread else "broadcast")
        if piece.fold is not None:
            made = write(piece, "", ())
        elif additive and _is_open(rw, piece):
            made = _OpenSum(_Postponed.of(rw, piece, *_moved(piece, axis), write), axis)
        else:
            operand, own, _ = _operand(piece, axis) if weighted else _moved(piece, axis)
            operand = cut_repeats(operand, stack)
            made = write(piece, *rw.layout.realise(operand, with_extents(own, operand.shape)))
        source = rw.defer(made.dims, x.dtype, made if known is None else known(made, piece), tag)
        if piece.fold is not None:
            part = codes_of(source).reshape(*small, width)
        else:
            part = np.moveaxis(codes_of(source).reshape(*small[:axis], width, *small[axis:]), axis, -1)
        piece.put(terms[piece.slot], part)
    out_dims = (*x.dims[:axis], column, *x.dims[axis + 1 :])
    if idempotent:
        terms = [np.where(t == HOLE, terms[0], t) for t in terms]
    elif unread:
        # A row that is read is zero in the terms it has no piece in.
        read = np.any([t != HOLE for t in terms], axis=0)
        terms = [np.where(read & (t == HOLE), zero, t) for t in terms]
    return [view(out_dims, x.dtype, np.moveaxis(t, -1, axis)) for t in terms]


def _moved(piece: Piece, axis: int) -> tuple[Codes, Dims, int]:
    """A piece with its columns at an axis."""
    return np.moveaxis(piece.codes, -1, axis), (*piece.dims[:axis], piece.dims[-1], *piece.dims[axis:-1]), axis


def _operand(piece: Piece, axis: int) -> tuple[Codes, Dims, int]:
    """A piece before weights: with columns last, in as few dimensions as it needs."""
    if axis < len(piece.dims) - 1:
        return _moved(piece, axis)
    keep = extended(piece.dims)
    return piece.codes.reshape([piece.codes.shape[k] for k in keep]), tuple(piece.dims[k] for k in keep), len(keep) - 1


def _is_open(rw: Rewrite, piece: Piece) -> bool:
    """Whether a piece is sums of products that were not made yet, so that its sums are, too."""
    unique = len(piece.members) == piece.codes.shape[-1]
    return piece.level is Level.CANDIDATE and unique and bool(fold.is_open(rw, piece.codes).all())


@dataclass(eq=False)
class _Postponed(DeferredMatMul):
    """A contraction whose operand is only written if the result is.

    Attributes:
        rw: The rewrite.
        piece: What is contracted.
        operand: Its entries as the contraction takes them.
        own: Their logical shape.
        write: How it is contracted.
        dims: Shape of the result.
    """

    rw: Rewrite
    piece: Piece
    operand: Codes
    own: Dims
    write: Product
    dims: Dims

    @classmethod
    def of(
        cls, rw: Rewrite, piece: Piece, operand: Codes, own: Dims, axis: int, write: Product, width: int = 1
    ) -> Self:
        """A contraction of an axis to `width` entries."""
        physical = keep_symbols(own, rw.sources.symbols(operand))
        dims = (*physical[:axis], canonical([width]), *physical[axis + 1 :])
        return cls(rw, piece, operand, own, write, dims)

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        name, seen = self.rw.layout.realise(self.operand, self.own)
        return self.write(self.piece, name, seen).materialise(addend, have)


@dataclass(eq=False)
class _OpenSum(DeferredMatMul, OpenProduct):
    """A sum of sums of products that were not made yet: one of more terms.

    Attributes:
        made: The sum as a contraction.
        axis: The axis along which it is one.
    """

    made: _Postponed
    axis: int

    def __post_init__(self) -> None:
        self.dims = self.made.dims

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        return self.made.materialise(addend, have)

    def factors(self) -> tuple[Codes, Codes]:
        a, b = (f.reshape(*f.shape[:-2], -1) for f in fold.expand(self.made.rw, self.made.piece.codes))
        return np.expand_dims(a, self.axis), np.expand_dims(b, self.axis)


def contract(
    rw: Rewrite, x: Value, axis: int, weight: Weights, write: WeightedProduct, rule: str, unread: Any = None
) -> Abstract:
    """Contracts an axis with the rows of a weight matrix, one product per level; the result is their sum.

    Raises:
        Unrepresentable: The axis is not known to have as many entries as the matrix has rows.
    """
    if x.dims[axis] != canonical([len(weight.data)]):
        raise Unrepresentable("a product along an axis whose extent is not constant")

    def one(piece: Piece, name: str, physical: Dims) -> DeferredMatMul:
        if piece.fold is not None:
            return fold.product(rw, piece.fold, weight, piece.members)
        return write(name, physical, piece.weights(rw, weight))

    def known(made: DeferredMatMul, piece: Piece) -> DeferredMatMul:
        if piece.level is not Level.CANDIDATE or unread:
            return made
        if prod(piece.codes.shape[:-1]) == 1 and not (piece.fold and piece.fold.along):
            return _ProductOfVector.of(rw, x.dtype, made, piece, weight, axis) or made
        if piece.fold is None and axis == x.rank - 1:
            return _ProductOfRows(rw, x.dtype, made, piece, weight)
        return made

    parts = partials(rw, x, axis, weight.data.shape[1], one, rule, unread, weighted=True, known=known)
    dims = (*x.dims[:axis], canonical([weight.data.shape[1]]), *x.dims[axis + 1 :])
    return rw.add(parts, dims, x.dtype)


_LARGEST_AFFINE = 1 << 20


@dataclass(eq=False)
class _ProductOfPiece(DeferredMatMul, Selectable):
    """A product of a piece with weights, of which parts can be made instead.

    Attributes:
        rw: The rewrite.
        dtype: Element type.
        made: The product as a whole.
        piece: Its left operand.
        weight: Its weights, of which the piece has some rows.
    """

    rw: Rewrite
    dtype: int
    made: DeferredMatMul
    piece: Piece
    weight: Weights

    def __post_init__(self) -> None:
        self.dims = self.made.dims

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        return self.made.materialise(addend, have)

    def with_weights(self, part: Weights, axis: int, piece: Piece) -> DeferredMatMul:
        """The product of a piece, along one of its axes, with other weights."""
        operand, own, at = _operand(piece, axis)
        width = part.data.shape[1]
        return _Postponed.of(self.rw, piece, operand, own, at, _product_with(self.rw, part, at, len(own)), width)


@dataclass(eq=False)
class _ProductOfVector(_ProductOfPiece, AffineProduct, Multiplicable):
    """A product of a vector per candidate: affine in that, and another matrix can be multiplied into its weights.

    Attributes:
        axis: The contracted axis.
    """

    axis: int

    @classmethod
    def of(
        cls, rw: Rewrite, dtype: int, made: DeferredMatMul, piece: Piece, weight: Weights, axis: int
    ) -> _ProductOfVector | None:
        """The product; None where it is not one of different columns, or of too many weights to follow."""
        count = piece.codes.shape[-1]
        plain = count == len(piece.members) and len(np.unique(piece.columns)) == count
        if piece.fold is None and (not plain or count * weight.data.shape[1] > _LARGEST_AFFINE):
            return None
        return cls(rw, dtype, made, piece, weight, axis)

    def coefficients(self) -> tuple[Codes, Codes]:
        piece, weight, width = self.piece, self.weight, self.weight.data.shape[1]
        if piece.fold is not None:
            codes, basis = fold.matrix(self.rw, piece.fold, weight, piece.members), piece.fold.basis
        else:
            order = np.empty(len(piece.members), np.int64)
            order[piece.columns] = piece.members
            data = weight.data[order]
            codes, basis = self.rw.constant(data).codes.reshape(data.shape), piece.codes.reshape(-1)
        return codes.T, np.broadcast_to(basis, (width, len(basis)))

    def select_columns(self, columns: NDArray[np.int64]) -> Source:
        part = self.weight.part(self.rw.emit, 1, columns)
        made = self._with(part, self.piece)
        known = _ProductOfVector.of(self.rw, self.dtype, made, self.piece, part, self.axis)
        return self._source(known or made, "fc")

    def then_matmul(self, weight: str, width: int) -> list[Source]:
        both = self.rw.emit.add("MatMul", [self.weight.rows(self.rw.emit, self.piece.members), weight])
        part = Weights(np.empty((len(self.piece.members), width), self.weight.data.dtype), both)
        piece = replace(self.piece, members=np.arange(len(self.piece.members)))
        return [self._source(self._with(part, piece), "cross")]

    def _with(self, part: Weights, piece: Piece) -> DeferredMatMul:
        if piece.fold is not None:
            return fold.product(self.rw, piece.fold, part, piece.members)
        return self.with_weights(part, self.axis, piece)

    def _source(self, made: DeferredMatMul, rule: str) -> Source:
        return self.rw.defer(made.dims, self.dtype, made, "fold" if self.piece.fold is not None else rule)


@dataclass(eq=False)
class _ProductOfRows(_ProductOfPiece, Scalable):
    """A product of several rows per candidate, with its columns last."""

    def select_columns(self, columns: NDArray[np.int64]) -> Source:
        return self._source(self.weight.part(self.rw.emit, 1, columns))

    def scale(self, number: str, times: bool) -> Source:
        own = self.weight.rows(self.rw.emit, np.arange(len(self.weight.data)))
        return self._source(Weights(self.weight.data, self.rw.emit.add("Mul" if times else "Div", [own, number])))

    def _source(self, part: Weights) -> Source:
        made = self.with_weights(part, len(self.piece.dims) - 1, self.piece)
        known = _ProductOfRows(self.rw, self.dtype, made, self.piece, part)
        return self.rw.defer(made.dims, self.dtype, known, "fc")


def _product_with(rw: Rewrite, part: Weights, axis: int, rank: int) -> Product:
    """The product over the last axis, or over the last but one of a vector per row."""
    make = right_product if axis == rank - 1 else left_product
    return lambda piece, name, physical: make(rw, part.data.shape[1])(name, physical, piece.weights(rw, part))


@dataclass(eq=False)
class _RightProduct(DeferredMatMul):
    """`x @ W` with the contracted axis last: a Gemm where there is something to add to a matrix.

    Attributes:
        rw: The rewrite.
        name: The left operand.
        physical: Its shape.
        weight: Name of the weights.
        width: Their number of columns.
        real: Whether they are not integers, which Gemm does not take.
    """

    rw: Rewrite
    name: str
    physical: Dims
    weight: str
    width: int
    real: bool = True

    def __post_init__(self) -> None:
        self.dims = (*self.physical[:-1], canonical([self.width]))

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        rw, physical = self.rw, self.physical
        if len(physical) == 2 and addend is not None and self.real:
            return rw.emit.add("Gemm", [self.name, self.weight, addend])
        bias = all(d == () for d in have[:-1])
        if addend is not None and self.real and (bias or have == self.dims):
            # Added on the way out of the product, not in a pass of its own.
            flat = (tuple(f for d in physical[:-1] for f in d), physical[-1])
            if sum(isinstance(f, int) for f in flat[0]) <= 1:
                column = self.dims[-1]
                rows = rw.layout.reshape(self.name, physical, flat)
                other = rw.layout.reshape(addend, have, have[-1:] if bias else (flat[0], column))
                made = rw.emit.add("Gemm", [rows, self.weight, other])
                return rw.layout.reshape(made, (flat[0], column), self.dims)
        return with_addend(rw, rw.emit.add("MatMul", [self.name, self.weight]), addend)


def right_product(rw: Rewrite, width: int, real: bool = True) -> WeightedProduct:
    """How `x @ W` is written, with the contracted axis last."""
    return lambda name, physical, weight: _RightProduct(rw, name, physical, weight, width, real)


def commuted(rw: Rewrite, x: Value, axis: int, linear: Callable[[Value], Abstract]) -> Abstract:
    """A linear map of an axis, of which rows `t u` with a factor `t` per candidate become `t (u W)`.

    Args:
        rw: The rewrite.
        x: The operand.
        axis: The axis, along which the factor of a row is the same.
        linear: The map of other values of the same shape; it gives 0 for rows that nobody reads.
    """
    found = _factors(rw, np.moveaxis(x.codes, axis, -1)) if x.whole is None or x.whole.is_open else None
    if found is None:
        return linear(x)
    mask = np.moveaxis(found[0], -1, axis)
    once, factor = (np.moveaxis(codes, -1, axis) for codes in found[1:])
    own = rw.settle(linear(view(x.dims, x.dtype, once)))
    rows = np.broadcast_to(mask, extents(own.dims))
    kept = view(own.dims, x.dtype, np.where(rows, own.codes, HOLE))
    by = view((*x.dims[:axis], (), *x.dims[axis + 1 :]), x.dtype, factor)
    scaled = elementwise(rw, "Mul", [kept, by], rw.emit.fresh(f"{rw.emit.hint}/scaled")).codes
    if rows.all():
        return view(own.dims, x.dtype, scaled)
    rest = linear(view(x.dims, x.dtype, np.where(mask, HOLE, x.codes)))
    first, *others = rw.terms(rest)
    return rw.add([view(own.dims, x.dtype, np.where(rows, scaled, first.codes)), *others], own.dims, x.dtype)


def _factors(rw: Rewrite, codes: Codes) -> tuple[NDArray[np.bool_], Codes, Codes] | None:
    """Rows that are one candidate-level factor times a request-level vector.

    Returns:
        Which, `[rows..., 1]`; their vectors, with holes in other rows; their factors, `[rows..., 1]`; None where there
        are none, and for a single row, which folds.
    """
    rows = np.asarray(fold.is_open(rw, codes).all(-1))
    if not rw.uses("fold") or rows.size < 2 or not rows.any():
        return None
    once, each = fold.expand(rw, codes[rows])
    same = (each[..., 0] == each[:, :1, 0]).all(-1)
    if once.shape[-1] > 1 or not same.any():
        return None
    vectors, factor = np.full(codes.shape, HOLE), np.full((*rows.shape, 1), HOLE)
    vectors[rows] = np.where(same[:, None], once[..., 0], HOLE)
    factor[rows] = np.where(same[:, None], each[:, :1, 0], HOLE)
    return factor != HOLE, vectors, factor


def distribute(rw: Rewrite, x: Abstract, axis: int, linear: Callable[[Value], Abstract]) -> Abstract:
    """A linear map of a pending sum: of each term, where that is less work than of the sum."""
    if isinstance(x, Sum):
        if _crossing(rw, x, axis, rw.zero(x.dtype)):
            parts = [linear(t) for t in x.terms]
            return rw.add([t for p in parts for t in rw.terms(p)], parts[0].dims, x.dtype)
    return linear(rw.settle(x))


def _axes(rw: Rewrite, codes: Codes, axis: int, along: Sequence[str]) -> NDArray[np.bool_]:
    """Per column, along which other axes, and (last) along which symbols, it varies: `[columns, axes + symbols]`."""
    moved = np.moveaxis(codes, axis, -1)
    rows = tuple(range(moved.ndim - 1))
    out = [(moved != moved.take([0], k)).any(rows) for k in rows]
    numbers = source_numbers(moved)
    for symbol in along:
        held = [s.number for s in rw.sources.of(moved) if symbol in s.symbols]
        out.append(np.isin(numbers, held).any(rows))
    return np.stack(out, -1)


def _sizes(rw: Rewrite, dims: Dims, axis: int, along: Sequence[str]) -> NDArray[np.float64]:
    """Extents of the axes and symbols of `_axes`."""
    rows = [rw.candidates if is_candidate_symbol(s) else cost.LENGTH for s in along]
    return np.array([*np.delete(extents(dims), axis), *rows], np.float64)


def _crossing(rw: Rewrite, x: Sum, axis: int, zero: int) -> bool:
    """Whether the terms vary along different axes, so that their sum varies along more than any of them."""
    along = tuple(dict.fromkeys(symbols(x.dims)))
    sizes = _sizes(rw, x.dims, axis, along)
    apart, joint = 0.0, np.zeros((extents(x.dims)[axis], len(sizes)), bool)
    for t in x.terms:
        varies = _axes(rw, t.codes, axis, along)
        rows = np.where(varies, sizes, 1).prod(-1)
        apart += rows[~(np.moveaxis(t.codes, axis, -1) == zero).all(tuple(range(t.rank - 1)))].sum()
        joint |= varies
    return bool(apart < np.where(joint, sizes, 1).prod(-1).sum())


def worthwhile(rw: Rewrite, x: Abstract, unread: Any) -> bool:
    """Whether there is anything to gain over the user's own node."""
    if not isinstance(x, Value):
        return True
    return x.whole is None or bool(unread) or rw.is_open(x)


def linear_last(rw: Rewrite, x: Abstract, weight: Weights, rule: str, unread: Any = None) -> Abstract:
    """`x @ weight` over the last axis of `x`."""
    if isinstance(x, Affine):
        return _normalised_product(rw, x, weight, unread)
    axis = x.rank - 1
    real = weight.data.dtype.kind not in "iu"
    if isinstance(x, Sum) and fold.has_open(rw, x):
        return _of_open(rw, x, axis, weight, lambda v, w: linear_last(rw, v, w, rule, unread))

    def one(v: Value) -> Abstract:
        return contract(rw, v, axis, weight, right_product(rw, weight.data.shape[1], real), rule, unread)

    return distribute(rw, x, axis, lambda v: commuted(rw, v, axis, one))


def _of_open(rw: Rewrite, x: Sum, axis: int, weight: Weights, linear: Callable[[Value, Weights], Abstract]) -> Abstract:
    """A linear map of a sum with products that were put off: multiplied from its own side, or all terms together."""
    x = fold.compact(rw, x.terms, x.dims, x.dtype)
    pulled = fold.pulled(rw, x, axis, weight)
    if pulled is None:
        return linear(*fold.stacked(rw, x, axis, weight))
    rest = [linear(t, weight) for t in x.terms[1:]]
    terms = [t for r in rest for t in rw.terms(r)]
    dims = (*x.dims[:axis], canonical([weight.data.shape[1]]), *x.dims[axis + 1 :])
    return rw.add([*terms, *pulled], dims, x.dtype)


def _normalised_product(rw: Rewrite, x: Affine, weight: Weights, unread: Any) -> Abstract:
    """`(scale * (base @ M) + shift) @ W`, with `M @ W` and `shift @ W` made by nodes of constants."""
    width = weight.data.shape[1]
    dims = (*x.dims[:-1], canonical([width]))
    with rw.emit.under("norm"):
        folded, shift = x.fold(weight.name or rw.emit.constant(weight.data))

        def one(piece: Piece, name: str, physical: Dims) -> DeferredMatMul:
            order = np.empty(len(piece.members), np.int64)
            order[piece.columns] = piece.members
            rows = rw.emit.add("Gather", [folded, rw.emit.constant(order)], {"axis": 0})
            return _RightProduct(rw, name, physical, rows, width)

        made = rw.settle(rw.add(partials(rw, x.base, x.rank - 1, width, one, "norm", unread), dims, x.dtype))
        name = rw.emit.add("Mul", [rw.tensor(made), rw.tensor(x.scale)])
    terms = [rw.new(dims, x.dtype, rw.present(made) | rw.present(x.scale), name)]
    if shift is not None:
        terms.append(rw.new((canonical([width]),), x.dtype, (), shift))
    return rw.add(terms, dims, x.dtype)


@dataclass(eq=False)
class _LeftProduct(DeferredMatMul):
    """`W @ y` over the last axis of `y` but one, given W transposed.

    Attributes:
        rw: The rewrite.
        name: The right operand.
        weight: Name of the weights, transposed.
        dims: Shape of the result.
    """

    rw: Rewrite
    name: str
    weight: str
    dims: Dims

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        back = self.rw.emit.add("Transpose", [self.weight], {"perm": [1, 0]})
        return with_addend(self.rw, self.rw.emit.add("MatMul", [back, self.name]), addend)


@dataclass(eq=False)
class _Reshaped(DeferredMatMul):
    """A product in another shape."""

    rw: Rewrite
    product: DeferredMatMul
    dims: Dims

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        made = self.rw.layout.reshape(self.product.materialise(), self.product.dims, self.dims)
        return with_addend(self.rw, made, addend)


def left_product(rw: Rewrite, width: int) -> WeightedProduct:
    """How `W @ y` is written, over the last axis of `y` but one, given W transposed."""

    def write(name: str, physical: Dims, weight: str) -> DeferredMatMul:
        made: Dims = (*physical[:-2], canonical([width]), physical[-1])
        if physical[-1] != ():
            return _LeftProduct(rw, name, weight, made)
        # A vector per row: rows become the matrix's, one product instead of one for each.
        flat = (*physical[:-2], physical[-2])
        return _Reshaped(rw, _RightProduct(rw, rw.layout.reshape(name, physical, flat), flat, weight, width), made)

    return write


def linear_left(rw: Rewrite, y: Abstract, turned: Weights, unread: Any) -> Abstract:
    """`W @ y`, given W transposed: contracted over the last axis but one."""
    axis = y.rank - 2
    if isinstance(y, Sum) and fold.has_open(rw, y):
        return _of_open(rw, y, axis, turned, lambda v, w: linear_left(rw, v, w, unread))
    write = left_product(rw, turned.data.shape[1])
    return distribute(rw, y, axis, lambda v: contract(rw, v, axis, turned, write, "fc", unread))


def with_addend(rw: Rewrite, name: str, addend: str | None) -> str:
    """Adds a tensor to another, if there is one to add."""
    return name if addend is None else rw.emit.add("Add", [name, addend])
