"""Sums of products that were put off: two terms at most, those and everything else, for the linear maps behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnxrank.rewrite import Rewrite
from onnxrank.values import (
    Codes,
    Dims,
    Multiplicable,
    OpenProduct,
    Source,
    Sum,
    Value,
    canonical,
    codes_of,
    extents,
    is_candidate_symbol,
    symbols,
    view,
    with_extents,
)
from onnxrank.weights import Weights

from . import fold

_NARROW = 4
"""Times that a matrix must be narrower than the products that it multiplies: others may have these made as well."""


def _is_vector(value: Value | Sum) -> bool:
    """Whether a value is a vector per candidate, not a matrix of a length that differs from request to request."""
    shape = extents(value.dims)
    return prod(shape) == max(shape, default=1) and all(is_candidate_symbol(s) for s in symbols(value.dims))


def has_open(rw: Rewrite, value: Sum) -> bool:
    """Whether a pending sum of vectors, one per candidate, holds products that were put off."""
    return _is_vector(value) and any(fold.is_open(rw, t.codes).any() for t in value.terms)


def apart(rw: Rewrite, value: Value) -> Value | Sum:
    """A vector per candidate that is, in part, products of few candidate-level entries, put off: those and the rest."""
    if value.whole is not None or not _is_vector(value):
        return value
    mask, zero = fold.is_open(rw, value.codes), rw.zero(value.dtype)
    if not mask.any() or mask.all() or len(np.unique(fold.expand(rw, value.codes[mask])[1])) * 4 > mask.sum():
        return value
    parts = (np.where(mask, value.codes, zero), np.where(mask, zero, value.codes))
    return Sum(value.dims, value.dtype, [view(value.dims, value.dtype, p) for p in parts])


def compact(rw: Rewrite, terms: Sequence[Value], dims: Dims, dtype: int) -> Sum:
    """A sum of two terms: products that were put off, and everything else."""
    zero = rw.zero(dtype)
    opened: list[Value] = []
    plain: list[Value] = []
    for t in terms:
        codes = np.broadcast_to(t.codes, extents(dims))
        mask = fold.is_open(rw, codes)
        if mask.any():
            opened.append(view(dims, dtype, np.where(mask, codes, zero)))
        if not mask.all():
            plain.append(view(dims, dtype, np.where(mask, zero, codes)))
    first = opened[0]
    for other in opened[1:]:
        first = _merged(rw, first, other)
    return Sum(dims, dtype, [first, rw.settle(rw.add(plain, dims, dtype))] if plain else [first])


def _merged(rw: Rewrite, a: Value, b: Value) -> Value:
    """Two terms of products that were put off as one; factors of the same candidate-level entry are added up."""
    dtype, zero = a.dtype, rw.zero(a.dtype)
    shape = a.codes.shape
    columns = np.flatnonzero((a.codes != zero).reshape(-1) | (b.codes != zero).reshape(-1))
    parts = [v.codes.reshape(-1)[columns] for v in (a, b)]
    factors = [fold.expand(rw, p) for p in parts]
    for (left, _), p in zip(factors, parts, strict=True):
        left[p == zero] = zero
    (la, ra), (lb, rb) = factors
    if (
        (ra == ra[:1]).all()
        and (rb == rb[:1]).all()
        and len(set(ra[0])) == ra.shape[1]
        and len(set(rb[0])) == rb.shape[1]
    ):
        both, ia, ib = np.intersect1d(ra[0], rb[0], return_indices=True)
        if len(both):
            matrix_dims: Dims = (canonical([len(both)]), canonical([len(columns)]))
            names = [rw.layout.realise(x[:, i].T, matrix_dims)[0] for x, i in ((la, ia), (lb, ib))]
            source = rw.sources.add(matrix_dims, dtype, rw.emit.add("Add", names))
            la = la.copy()
            la[:, ia] = codes_of(source).reshape(len(both), len(columns)).T
            keep = np.setdiff1d(np.arange(rb.shape[1]), ib)
            lb, rb = lb[:, keep], rb[:, keep]
    left, right = np.concatenate([la, lb], 1), np.concatenate([ra, rb], 1)
    made_dims = with_extents(a.dims, [len(columns) if n > 1 else 1 for n in shape])

    both_factors = left.reshape(*extents(made_dims), -1), right.reshape(*extents(made_dims), -1)
    merged, owners = _Merged(rw, parts, made_dims, both_factors), _owners(rw, parts, dtype)
    if owners:
        merged = _MergedOwners(rw, parts, made_dims, both_factors, dtype, owners)
    made = rw.defer(made_dims, dtype, merged, None)
    codes = np.full(a.codes.size, zero)
    codes[columns] = codes_of(made).reshape(-1)
    return view(a.dims, dtype, codes.reshape(shape))


@dataclass(eq=False)
class _Merged(OpenProduct):
    """The sum of two terms of products that were put off.

    Attributes:
        rw: The rewrite.
        parts: The entries of both.
        dims: Shape of the result.
        made: Its factors.
    """

    rw: Rewrite
    parts: Sequence[Codes]
    dims: Dims
    made: tuple[Codes, Codes]

    def materialise(self) -> str:
        shape = extents(self.dims)
        names = [self.rw.layout.realise(p.reshape(shape), self.dims, full=True)[0] for p in self.parts]
        return self.rw.emit.add("Add", names)

    def factors(self) -> tuple[Codes, Codes]:
        return self.made


@dataclass(frozen=True)
class _Owner:
    """A tensor of which a term has all entries.

    Attributes:
        deferred: How it is multiplied.
        codes: Its entries, in order.
        order: Which of the term's entries they are.
    """

    deferred: Multiplicable
    codes: Codes
    order: NDArray[np.int64]


@dataclass(eq=False)
class _MergedOwners(_Merged, Multiplicable):
    """The same where each term is a tensor that can be multiplied: the sum is, each term on its own.

    Attributes:
        dtype: Element type.
        owners: Those tensors.
    """

    dtype: int
    owners: Sequence[_Owner]

    def then_matmul(self, weight: str, width: int) -> list[Source]:
        rw = self.rw
        out: list[Source] = []
        for owner in self.owners:
            rows = rw.emit.add("Gather", [weight, rw.emit.constant(owner.order)], {"axis": 0})
            known = _known(rw, owner.codes)
            if known is None:
                out += owner.deferred.then_matmul(rows, width)
                continue
            own = Weights(np.empty((len(owner.order), width), rw.constant_type(self.dtype)), rows)
            made = fold.product(rw, known, own, np.arange(len(owner.order)))
            out.append(rw.defer(made.dims, self.dtype, made, "fold"))
        return out


def _owners(rw: Rewrite, parts: Sequence[Codes], dtype: int) -> list[_Owner]:
    """The tensor behind each term; none where one is made of several, or cannot be multiplied."""
    zero = rw.zero(dtype)
    owners: list[_Owner] = []
    for p in parts:
        at = np.flatnonzero(p != zero)
        found = rw.sources.of(p[at])
        if len(found) != 1 or not isinstance(found[0].deferred, Multiplicable) or found[0].size != len(at):
            return []
        order = at[np.argsort(p[at])]
        owners.append(_Owner(found[0].deferred, p[order], order))
    return owners


def _known(rw: Rewrite, codes: Codes) -> fold.Fold | None:
    """The fold of entries whose request-level factors stand ready, because weights are made of them already."""
    left, right = fold.expand(rw, codes)
    if (
        not all(s.folded for s in rw.sources.of(left))
        or (right != right[:1]).any()
        or len(set(right[0])) < len(right[0])
    ):
        return None
    order = np.argsort(right[0])
    count = np.arange(len(order))
    return fold.Fold(left[:, order].T[None], np.arange(len(codes))[None], right[0, order], count[:, None], count[:0])


def pulled(rw: Rewrite, x: Sum, axis: int, weight: Weights) -> list[Value] | None:
    """Products that were put off, in a sum made by `compact`, times a narrow matrix.

    Multiplied from the side of that matrix, `A (B w)`, nothing is made that is wider than it.
    """
    width = weight.data.shape[1]
    codes = np.moveaxis(x.terms[0].codes, axis, -1).reshape(-1, extents(x.dims)[axis])[0]
    columns = np.flatnonzero(codes != rw.zero(x.dtype))
    found = rw.sources.of(codes[columns])
    if len(found) != 1 or found[0].size != len(columns) or _NARROW * width > len(columns):
        return None
    opened = found[0].deferred
    if not isinstance(opened, Multiplicable):
        return None
    order = columns[np.argsort(codes[columns])]
    dims = (*x.dims[:axis], canonical([width]), *x.dims[axis + 1 :])
    made = opened.then_matmul(weight.rows(rw.emit, order), width)
    return [view(dims, x.dtype, codes_of(s).reshape(extents(dims))) for s in made]


def stacked(rw: Rewrite, x: Sum, axis: int, weight: Weights) -> tuple[Value, Weights]:
    """A sum made by `compact`, before a linear map: its terms side by side, weights repeated."""
    first = x.terms[0].codes
    columns = np.flatnonzero((first != rw.zero(x.dtype)).any(tuple(k for k in range(first.ndim) if k != axis)))
    codes = [first.take(columns, axis), *(t.codes for t in x.terms[1:])]
    count = extents(x.dims)[axis]
    index = np.concatenate([columns, *([np.arange(count)] * (len(codes) - 1))])
    joined = np.concatenate(codes, axis)
    dims = (*x.dims[:axis], canonical([len(index)]), *x.dims[axis + 1 :])
    return view(dims, x.dtype, joined), weight.part(rw.emit, 0, index)
