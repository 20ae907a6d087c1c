"""Products by level: how the contraction of an axis is divided into rectangles of one level, and written.

This is the mechanism of `fc`, `pool` and `norm`. A sum over an axis is the sum over its parts; each part of one level
is made once per level, over the axes it varies along, and its layout is folded into the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from onnxrank import cost
from onnxrank.plans import LEAVE, TAKE, Alternative
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
    rows_of,
    source_numbers,
    symbols,
    view,
    with_extents,
)
from onnxrank.weights import Weights

from . import fold, open_sums, picked
from .elementwise import elementwise, mark_unread
from .picked import Picked
from .pieces import Division, Piece
from .selected import selected_after


class Contraction(ABC):
    """How pieces of an operand are contracted along an axis.

    Attributes:
        width: Extent of the axis afterwards.
        weighted: Whether entries are multiplied with weights, of which 0 undoes one.
        additive: Whether it is a plain sum.
        idempotent: Whether rows with fewer pieces repeat one (maximum) instead of holding 0 (sum).
    """

    width: int
    weighted = False
    additive = False
    idempotent = False

    @abstractmethod
    def of(self, piece: Piece, name: str, physical: Dims) -> DeferredMatMul:
        """The contraction of a piece.

        Args:
            piece: The piece; one that folds is taken as it is.
            name: A tensor of its entries.
            physical: The shape of that.
        """

    def known(self, made: DeferredMatMul, piece: Piece) -> DeferredMatMul:
        """A piece's contraction in a form that more can be asked of, if there is one."""
        return made


class MatrixProduct(ABC):
    """How a tensor is multiplied with a matrix."""

    @abstractmethod
    def of(self, name: str, physical: Dims, weight: str) -> DeferredMatMul:
        """The product.

        Args:
            name: The tensor.
            physical: Its shape.
            weight: Name of the matrix.
        """


@dataclass(eq=False)
class Weighted(Contraction):
    """Products with rows of a matrix of weights.

    Attributes:
        rw: The rewrite.
        weight: The matrix.
        matrix: How a piece is multiplied with its rows.
    """

    rw: Rewrite
    weight: Weights
    matrix: MatrixProduct
    weighted = True

    def __post_init__(self) -> None:
        self.width = int(self.weight.data.shape[1])

    def of(self, piece: Piece, name: str, physical: Dims) -> DeferredMatMul:
        """The product of a piece with its rows."""
        if piece.fold is not None:
            return fold.product(self.rw, piece.fold, self.weight, piece.members)
        return self.matrix.of(name, physical, piece.weights(self.rw, self.weight))


@dataclass(eq=False)
class _Followed(Weighted):
    """The same, of which later nodes may ask for parts.

    Attributes:
        dtype: Element type.
        axis: The contracted axis of the operand.
        last: Whether that is its last one.
    """

    dtype: int
    axis: int
    last: bool

    def known(self, made: DeferredMatMul, piece: Piece) -> DeferredMatMul:
        if piece.level is not Level.CANDIDATE:
            return made
        if prod(piece.codes.shape[:-1]) == 1 and not (piece.fold and piece.fold.along):
            return _ProductOfVector.of(self.rw, self.dtype, made, piece, self.weight, self.axis) or made
        if piece.fold is None and self.last:
            return _ProductOfRows(self.rw, self.dtype, made, piece, self.weight)
        return made


def partials(
    rw: Rewrite, x: Value, axis: int, how: Contraction, rule: str, unread: Any = None, stack: Sequence[int] = ()
) -> list[Value]:
    """Contracts one axis of a value piece by piece.

    Args:
        rw: The rewrite.
        x: The operand.
        axis: The contracted axis; its extent is constant.
        how: How a piece is contracted.
        rule: Name of the rule, for the report.
        unread: Positions read per axis of the result, if not all.
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
    shape = (*extents(dims[:-1]), how.width)
    zero = rw.zero(x.dtype)
    terms: list[Codes] = []
    split = not rw.single_level(x)
    apart = [a - (a > axis) for a in stack]
    division = Division(rw, rule, how.width if how.weighted else 0, not how.idempotent, apart)
    for piece in division.pieces(codes, dims):
        if piece.slot == len(terms):
            terms.append(np.full(shape, HOLE if unread or how.idempotent else zero))
        small = piece.codes.shape[:-1]
        lowered = piece.level is Level.REQUEST and any(map(is_candidate_symbol, symbols(dims)))
        tag = "fold" if piece.fold else rule if split or lowered else None
        if prod(small) < prod(shape[:-1]) and not stack:
            tag = tag or ("select" if unread else "broadcast")
        made = how.known(_contracted(rw, piece, axis, how, stack), piece)
        part = codes_of(rw.defer(made.dims, x.dtype, made, tag))
        if piece.fold is not None:
            part = part.reshape(*small, how.width)
        else:
            part = np.moveaxis(part.reshape(*small[:axis], how.width, *small[axis:]), axis, -1)
        piece.put(terms[piece.slot], part)
    if how.idempotent:
        terms = [np.where(t == HOLE, terms[0], t) for t in terms]
    elif unread:
        # A row that is read is zero in the terms it has no piece in.
        read = np.any([t != HOLE for t in terms], axis=0)
        terms = [np.where(read & (t == HOLE), zero, t) for t in terms]
    out_dims = (*x.dims[:axis], canonical([how.width]), *x.dims[axis + 1 :])
    return [view(out_dims, x.dtype, np.moveaxis(t, -1, axis)) for t in terms]


def _contracted(rw: Rewrite, piece: Piece, axis: int, how: Contraction, stack: Sequence[int]) -> DeferredMatMul:
    """A piece contracted along what is the operand's axis."""
    if piece.fold is not None:
        return how.of(piece, "", ())
    if how.additive and _is_open(rw, piece):
        return _OpenSum(_Postponed.of(rw, piece, *_moved(piece, axis), how), axis)
    operand, own, _ = _operand(piece, axis) if how.weighted else _moved(piece, axis)
    operand = cut_repeats(operand, stack)
    return how.of(piece, *rw.layout.realise(operand, with_extents(own, operand.shape)))


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
        how: How it is contracted.
        dims: Shape of the result.
    """

    rw: Rewrite
    piece: Piece
    operand: Codes
    own: Dims
    how: Contraction
    dims: Dims

    @classmethod
    def of(cls, rw: Rewrite, piece: Piece, operand: Codes, own: Dims, axis: int, how: Contraction) -> Self:
        """A contraction of an axis."""
        physical = keep_symbols(own, rw.sources.symbols(operand))
        dims = (*physical[:axis], canonical([how.width]), *physical[axis + 1 :])
        return cls(rw, piece, operand, own, how, dims)

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        name, seen = self.rw.layout.realise(self.operand, self.own)
        return self.how.of(self.piece, name, seen).materialise(addend, have)


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
    rw: Rewrite, x: Value, axis: int, weight: Weights, matrix: MatrixProduct, rule: str, unread: Any = None
) -> Abstract:
    """Contracts an axis with the rows of a weight matrix, one product per level; the result is their sum.

    Raises:
        Unrepresentable: The axis is not known to have as many entries as the matrix has rows.
    """
    if x.dims[axis] != canonical([len(weight.data)]):
        raise Unrepresentable("a product along an axis whose extent is not constant")
    plain = Weighted(rw, weight, matrix)
    how = plain if unread else _Followed(rw, weight, matrix, x.dtype, axis, axis == x.rank - 1)
    parts = partials(rw, x, axis, how, rule, unread)
    return rw.add(parts, (*x.dims[:axis], canonical([how.width]), *x.dims[axis + 1 :]), x.dtype)


_LARGEST_AFFINE = 1 << 20
"""Weights of a product at most that are followed one by one: a bound on what rewriting takes."""


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
        rw, width = self.rw, part.data.shape[1]
        matrix = RightMatrix(rw, width) if at == len(own) - 1 else LeftMatrix(rw, width)
        return _Postponed.of(rw, piece, operand, own, at, Weighted(rw, part, matrix))


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
            flat = rows_of(physical)
            if flat is not None:
                column = self.dims[-1]
                rows = rw.layout.reshape(self.name, physical, flat)
                other = rw.layout.reshape(addend, have, have[-1:] if bias else (flat[0], column))
                made = rw.emit.add("Gemm", [rows, self.weight, other])
                return rw.layout.reshape(made, (flat[0], column), self.dims)
        return with_addend(rw, rw.emit.add("MatMul", [self.name, self.weight]), addend)


@dataclass(frozen=True)
class RightMatrix(MatrixProduct):
    """`x @ W`, with the contracted axis last.

    Attributes:
        rw: The rewrite.
        width: Columns of `W`.
        real: Whether entries are not integers.
    """

    rw: Rewrite
    width: int
    real: bool = True

    def of(self, name: str, physical: Dims, weight: str) -> DeferredMatMul:
        """`x @ W`."""
        return _RightProduct(self.rw, name, physical, weight, self.width, self.real)


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


def distribute(
    rw: Rewrite, x: Abstract, axis: int, linear: Callable[[Value], Abstract], rule: str, width: int
) -> Abstract:
    """A linear map of a pending sum: of each term, where that is less work than of the sum.

    Args:
        rw: The rewrite.
        x: The operand.
        axis: The axis that is mapped.
        linear: The map.
        rule: Name of the rule, for the plan.
        width: Entries of the axis behind the map.
    """
    if not isinstance(x, Sum):
        return linear(rw.settle(x))
    if _distributed(rw, x, axis, rule, width):
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


def _distributed(rw: Rewrite, x: Sum, axis: int, rule: str, width: int) -> bool:
    """Decides whether the terms of a sum are mapped one by one: they may vary along fewer axes than the sum does.

    A row of constants that is added to one term takes a pass over that, if it is no product that the row could ride in.
    What the row is mapped to rides in the product behind.
    """
    zero, along = rw.zero(x.dtype), tuple(dict.fromkeys(symbols(x.dims)))
    varies = [_axes(rw, t.codes, axis, along) for t in x.terms]
    held = [~(np.moveaxis(t.codes, axis, -1) == zero).all(tuple(range(t.rank - 1))) for t in x.terms]
    joint = np.logical_or.reduce(varies)
    moving = [t for t, v in zip(x.terms, varies, strict=True) if v.any()]
    same = [t for t, v in zip(x.terms, varies, strict=True) if not v.any() and rw.levels(t) == {Level.CONSTANT}]
    passes = len(same) if len(moving) == 1 and not _takes_row(rw, moving[0]) else 0
    entry = cost.estimate(width, written=4 * passes), cost.estimate(width)
    ways: list[tuple[float, float]] = []
    for candidates in (1, 2):
        rows = [candidates if is_candidate_symbol(s) else cost.LENGTH for s in along]
        sizes = np.array([*np.delete(extents(x.dims), axis), *rows], np.float64)
        apart = sum(np.where(v, sizes, 1).prod(-1)[h].sum() for v, h in zip(varies, held, strict=True))
        ways.append((float(np.where(joint, sizes, 1).prod(-1).sum()), float(apart)))
    left, made = (
        Alternative(name, exactness, seconds * (2 * one - two), seconds * (two - one))
        for name, exactness, seconds, one, two in zip((LEAVE, TAKE), ("", "reassociates"), entry, *ways, strict=True)
    )
    return rw.decide(rule, (left, made)) == TAKE


def _takes_row(rw: Rewrite, value: Value) -> bool:
    """Whether a value is one product that is not written yet, so that a row added to it takes no pass of its own."""
    found = rw.sources.of(value.codes) if value.whole is None else [value.whole]
    return len(found) == 1 and found[0].is_pending


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
    if isinstance(x, Sum) and open_sums.has_open(rw, x):
        return _of_open(rw, x, axis, weight, lambda v, w: linear_last(rw, v, w, rule, unread))

    width = weight.data.shape[1]
    if not unread:
        rows, rest = picked.apart(rw, rw.unless_sum(x), width)
        if rows is not None:
            return _of_picked(rw, rows, rest, weight, rule)
        assert rest is not None
        x = rest

    def one(v: Value) -> Abstract:
        return contract(rw, v, axis, weight, RightMatrix(rw, width, real), rule, unread)

    def each(v: Value) -> Abstract:
        return commuted(rw, v, axis, one)

    if unread:
        return distribute(rw, x, axis, each, rule, width)
    return distribute(rw, x, axis, lambda v: selected_after(rw, v, axis, each, rule, width), rule, width)


def _of_picked(rw: Rewrite, rows: Picked, rest: Abstract | None, weight: Weights, rule: str) -> Abstract:
    """A linear map of what is picked, made before, and of what is left without it."""
    mapped = rw.settle(linear_last(rw, rows.table, weight, rule))
    made = replace(rows, table=rw.held(mapped, symbols(mapped.dims[:1]))).made
    if rest is None:
        return made
    return rw.add([*rw.terms(linear_last(rw, rest, weight, rule)), made], made.dims, made.dtype)


def _of_open(rw: Rewrite, x: Sum, axis: int, weight: Weights, linear: Callable[[Value, Weights], Abstract]) -> Abstract:
    """A linear map of a sum with products that were put off: multiplied from its own side, or all terms together."""
    x = open_sums.compact(rw, x.terms, x.dims, x.dtype)
    pulled = open_sums.pulled(rw, x, axis, weight)
    if pulled is None:
        return linear(*open_sums.stacked(rw, x, axis, weight))
    rest = [linear(t, weight) for t in x.terms[1:]]
    terms = [t for r in rest for t in rw.terms(r)]
    dims = (*x.dims[:axis], canonical([weight.data.shape[1]]), *x.dims[axis + 1 :])
    return rw.add([*terms, *pulled], dims, x.dtype)


@dataclass(eq=False)
class _Gathered(Contraction):
    """Products with rows of a matrix that nodes of constants make.

    Attributes:
        rw: The rewrite.
        weight: Name of the matrix.
        width: Its columns.
    """

    rw: Rewrite
    weight: str
    width: int

    def of(self, piece: Piece, name: str, physical: Dims) -> DeferredMatMul:
        order = np.empty(len(piece.members), np.int64)
        order[piece.columns] = piece.members
        rows = self.rw.emit.add("Gather", [self.weight, self.rw.emit.constant(order)], {"axis": 0})
        return _RightProduct(self.rw, name, physical, rows, self.width)


def _normalised_product(rw: Rewrite, x: Affine, weight: Weights, unread: Any) -> Abstract:
    """`(scale * (base @ M) + shift) @ W`, with `M @ W` and `shift @ W` made by nodes of constants."""
    width = weight.data.shape[1]
    dims = (*x.dims[:-1], canonical([width]))
    with rw.emit.under("norm"):
        folded, shift = x.fold(weight.name or rw.emit.constant(weight.data))
        parts = partials(rw, x.base, x.rank - 1, _Gathered(rw, folded, width), "norm", unread)
        made = rw.settle(rw.add(parts, dims, x.dtype))
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


@dataclass(frozen=True)
class LeftMatrix(MatrixProduct):
    """`W @ y`, over the last axis of `y` but one, given W transposed.

    Attributes:
        rw: The rewrite.
        width: Rows of `W`.
    """

    rw: Rewrite
    width: int

    def of(self, name: str, physical: Dims, weight: str) -> DeferredMatMul:
        """`W @ y`."""
        rw, width = self.rw, self.width
        made: Dims = (*physical[:-2], canonical([width]), physical[-1])
        if physical[-1] != ():
            return _LeftProduct(rw, name, weight, made)
        # A vector per row: rows become the matrix's, one product instead of one for each.
        flat = (*physical[:-2], physical[-2])
        return _Reshaped(rw, _RightProduct(rw, rw.layout.reshape(name, physical, flat), flat, weight, width), made)


def linear_left(rw: Rewrite, y: Abstract, turned: Weights, unread: Any) -> Abstract:
    """`W @ y`, given W transposed: contracted over the last axis but one."""
    axis = y.rank - 2
    if isinstance(y, Sum) and open_sums.has_open(rw, y):
        return _of_open(rw, y, axis, turned, lambda v, w: linear_left(rw, v, w, unread))
    matrix = LeftMatrix(rw, turned.data.shape[1])
    return distribute(
        rw, y, axis, lambda v: contract(rw, v, axis, turned, matrix, "fc", unread), "fc", turned.data.shape[1]
    )


def with_addend(rw: Rewrite, name: str, addend: str | None) -> str:
    """Adds a tensor to another, if there is one to add."""
    return name if addend is None else rw.emit.add("Add", [name, addend])
