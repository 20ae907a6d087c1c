"""Products by level: how the contraction of an axis is divided into rectangles of one level, and written.

This is the mechanism of `fc`, `pool` and `norm`. A sum over an axis is the sum over its parts; each part of one level
is made once per level, over the axes it varies along, and its layout is folded into the weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank import cost
from onnxrank.rewrite import LARGE, Group, Rewrite, Weights
from onnxrank.values import (
    HOLE,
    Abstract,
    Affine,
    Codes,
    Dims,
    Level,
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
    orders = {k: o for k, o in rw.memory_order([codes[index]]).items() if k < codes.ndim - 1}
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


Product = Callable[[Piece, str, Dims], tuple[Dims, Callable[[str | None, Dims], str]]]
"""Writes the contraction of a piece, given as a tensor of a physical shape; gives the result's shape and a writer that
takes the name and shape of a tensor to add."""

WeightedProduct = Callable[[str, Dims, str], tuple[Dims, Callable[[str | None, Dims], str]]]
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
    note: Callable[[Source, Piece], None] | None = None,
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
        note: Called with the result and the piece of each contraction.
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
            made_dims, writer = write(piece, "", ())
            source = rw.sources.add(made_dims, x.dtype, product=rw.later(writer, tag))
            part = codes_of(source).reshape(*small, width)
        else:
            linear = _summed(rw, piece, axis) if additive else None
            operand, own, at = _operand(piece, axis) if weighted else _moved(piece, axis)
            if linear is None:
                operand = cut_repeats(operand, stack)
                name, physical = rw.layout.realise(operand, with_extents(own, operand.shape))
                made_dims, writer = write(piece, name, physical)
            else:
                made_dims, writer = _postponed(rw, piece, operand, own, at, write)
            source = rw.sources.add(made_dims, x.dtype, product=rw.later(writer, tag), linear=linear)
            part = np.moveaxis(codes_of(source).reshape(*small[:axis], width, *small[axis:]), axis, -1)
        if note is not None:
            note(source, piece)
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


def _summed(rw: Rewrite, piece: Piece, axis: int) -> Callable[[], tuple[Codes, Codes]] | None:
    """The sums of a piece's products that were not made yet, as sums of products themselves."""
    unique = len(piece.members) == piece.codes.shape[-1]
    if piece.level is not Level.CANDIDATE or not unique or not fold.is_open(rw, piece.codes).all():
        return None

    def linear() -> tuple[Codes, Codes]:
        factors = fold.expand(rw, piece.codes)
        a, b = (f.reshape(*f.shape[:-2], -1) for f in factors)
        return np.expand_dims(a, axis), np.expand_dims(b, axis)

    return linear


def _postponed(
    rw: Rewrite, piece: Piece, operand: Codes, own: Dims, axis: int, write: Product
) -> tuple[Dims, Callable[[str | None, Dims], str]]:
    """A contraction whose operand is only written if the result is."""
    physical = keep_symbols(own, rw.sources.symbols(operand))

    def writer(addend: str | None, have: Dims) -> str:
        name, seen = rw.layout.realise(operand, own)
        return write(piece, name, seen)[1](addend, have)

    return (*physical[:axis], (), *physical[axis + 1 :]), writer


def contract(
    rw: Rewrite, x: Value, axis: int, weight: Weights, write: WeightedProduct, rule: str, unread: Any = None
) -> Abstract:
    """Contracts an axis with the rows of a weight matrix, one product per level; the result is their sum."""

    def one(piece: Piece, name: str, physical: Dims) -> tuple[Dims, Callable[[str | None, Dims], str]]:
        if piece.fold is not None:
            return fold.product(rw, piece.fold, weight, piece.members)
        return write(name, physical, piece.weights(rw, weight))

    width = weight.data.shape[1]

    def note(source: Source, piece: Piece) -> None:
        if piece.level is not Level.CANDIDATE or unread:
            return
        if prod(piece.codes.shape[:-1]) == 1 and not (piece.fold and piece.fold.along):
            _explain(rw, source, piece, weight, axis)
        elif piece.fold is None and axis == x.rank - 1:
            _by_columns(rw, source, piece, weight)

    parts = partials(rw, x, axis, width, one, rule, unread, weighted=True, note=note)
    dims = (*x.dims[:axis], canonical([width]), *x.dims[axis + 1 :])
    return rw.add(parts, dims, x.dtype)


_LARGEST_AFFINE = 1 << 20


def _explain(rw: Rewrite, source: Source, piece: Piece, weight: Weights, axis: int) -> None:
    """Tells how a product that is not written yet comes from candidate-level entries, and how to take part of it."""
    width = weight.data.shape[1]
    order = np.empty(len(piece.members), np.int64)
    count = piece.codes.shape[-1]
    plain = count == len(piece.members) and len(np.unique(piece.columns)) == count
    if piece.fold is None and (not plain or count * width > _LARGEST_AFFINE):
        return
    order[piece.columns] = piece.members

    def affine() -> tuple[Codes, Codes]:
        if piece.fold is not None:
            codes, basis = fold.matrix(rw, piece.fold, weight, piece.members), piece.fold.basis
        else:
            data = weight.data[order]
            codes, basis = rw.constant(data).codes.reshape(data.shape), piece.codes.reshape(-1)
        return codes.T, np.broadcast_to(basis, (width, len(basis)))

    def other(part: Weights, rule: str, piece: Piece = piece) -> Source:
        columns = part.data.shape[1]
        dims = with_extents(source.dims, [columns if n > 1 else 1 for n in extents(source.dims)])
        if piece.fold is not None:
            writer, rule = fold.product(rw, piece.fold, part, piece.members)[1], "fold"
        else:
            operand, own, at = _operand(piece, axis)
            _, writer = _postponed(rw, piece, operand, own, at, _narrowed(rw, part, at, len(own)))
        return rw.sources.add(dims, source.dtype, product=rw.later(writer, rule))

    def narrow(columns: NDArray[np.int64]) -> Source:
        part = weight.part(rw.emit, 1, columns)
        made = other(part, "fc")
        _explain(rw, made, piece, part, axis)
        return made

    def again(name: str, columns: int) -> Source:
        both = rw.emit.add("MatMul", [weight.rows(rw.emit, piece.members), name])
        made = Weights(np.empty((len(piece.members), columns), weight.data.dtype), both)
        return other(made, "cross", replace(piece, members=np.arange(len(piece.members))))

    source.again = again
    source.affine, source.narrow = affine, narrow


def _by_columns(rw: Rewrite, source: Source, piece: Piece, weight: Weights) -> None:
    """Tells how to take some columns of a product that is not written yet, or to scale it; columns are last."""
    operand, own, at = _operand(piece, len(piece.dims) - 1)

    def other(part: Weights) -> Source:
        dims = (*source.dims[:-1], canonical([part.data.shape[1]]))
        _, writer = _postponed(rw, piece, operand, own, at, _narrowed(rw, part, at, len(own)))
        made = rw.sources.add(dims, source.dtype, product=rw.later(writer, "fc"))
        _by_columns(rw, made, piece, part)
        return made

    def scaled(name: str, times: bool) -> Source:
        own = weight.rows(rw.emit, np.arange(len(weight.data)))
        return other(Weights(weight.data, rw.emit.add("Mul" if times else "Div", [own, name])))

    source.narrow = lambda columns: other(weight.part(rw.emit, 1, columns))
    source.scaled = scaled


def _narrowed(rw: Rewrite, part: Weights, axis: int, rank: int) -> Product:
    """The product over the last axis, or over the last but one of a vector per row."""
    make = right_product if axis == rank - 1 else left_product
    return lambda piece, name, physical: make(rw, part.data.shape[1])(name, physical, piece.weights(rw, part))


def right_product(rw: Rewrite, width: int, real: bool = True) -> WeightedProduct:
    """`x @ W` with the contracted axis last: a Gemm where there is something to add to a matrix."""
    column = canonical([width])

    def write(name: str, physical: Dims, weight: str) -> tuple[Dims, Callable[[str | None, Dims], str]]:
        def writer(addend: str | None, have: Dims) -> str:
            if len(physical) == 2 and addend is not None and real:
                return rw.emit.add("Gemm", [name, weight, addend])
            result = (*physical[:-1], column)
            bias = all(d == () for d in have[:-1])
            if addend is not None and real and (bias or have == result):
                # Added on the way out of the product, not in a pass of its own.
                flat = (tuple(f for d in physical[:-1] for f in d), physical[-1])
                if sum(isinstance(f, int) for f in flat[0]) <= 1:
                    rows = rw.layout.reshape(name, physical, flat)
                    other = rw.layout.reshape(addend, have, have[-1:] if bias else (flat[0], column))
                    made = rw.emit.add("Gemm", [rows, weight, other])
                    return rw.layout.reshape(made, (flat[0], column), result)
            return with_addend(rw, rw.emit.add("MatMul", [name, weight]), addend)

        return (*physical[:-1], column), writer

    return write


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
    before, rw.emit.rule = rw.emit.rule, "norm"
    folded, shift = x.fold(weight.name or rw.emit.constant(weight.data))
    width = weight.data.shape[1]

    def one(piece: Piece, name: str, physical: Dims) -> tuple[Dims, Callable[[str | None, Dims], str]]:
        order = np.empty(len(piece.members), np.int64)
        order[piece.columns] = piece.members
        rows = rw.emit.add("Gather", [folded, rw.emit.constant(order)], {"axis": 0})
        return right_product(rw, width)(name, physical, rows)

    parts = partials(rw, x.base, x.rank - 1, width, one, "norm", unread)
    dims = (*x.dims[:-1], canonical([width]))
    made = rw.settle(rw.add(parts, dims, x.dtype))
    name = rw.emit.add("Mul", [rw.tensor(made), rw.tensor(x.scale)])
    rw.emit.rule = before
    terms = [rw.new(dims, x.dtype, rw.present(made) | rw.present(x.scale), name)]
    if shift is not None:
        terms.append(rw.new((canonical([width]),), x.dtype, (), shift))
    return rw.add(terms, dims, x.dtype)


def left_product(rw: Rewrite, width: int) -> WeightedProduct:
    """`W @ y` over the last axis of `y` but one, given W transposed."""

    def write(name: str, physical: Dims, weight: str) -> tuple[Dims, Callable[[str | None, Dims], str]]:
        made: Dims = (*physical[:-2], canonical([width]), physical[-1])
        if physical[-1] == ():
            # A vector per row: rows become the matrix's, one product instead of one for each.
            flat = (*physical[:-2], physical[-2])
            rows = rw.layout.reshape(name, physical, flat)
            inner_dims, inner = right_product(rw, width)(rows, flat, weight)
            return made, lambda addend, have: with_addend(
                rw, rw.layout.reshape(inner(None, ()), inner_dims, made), addend
            )

        def writer(addend: str | None, have: Dims) -> str:
            back = rw.emit.add("Transpose", [weight], {"perm": [1, 0]})
            return with_addend(rw, rw.emit.add("MatMul", [back, name]), addend)

        return made, writer

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
