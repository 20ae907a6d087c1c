"""`fold`: the cheapest order of products of constant, request-level and candidate-level factors.

A product of a request-level and a candidate-level entry that only a linear map reads need not be made. With entries
`R_k C_u(k)` and weights `W[k, h]`,

    sum_k W[k, h] R_k C_u(k) = sum_u M[u, h] C_u    with    M[u, h] = sum_{k: u(k) = u} R_k W[k, h]

and `M` is made once per request. Pairs of 24 request-level with 8 candidate-level fields of width d before a layer of h
columns cost 192 d h per candidate as they stand, and 8 d h folded. The same holds for sums of such products (dot
products of fields) and where rows share the candidate's entries (target attention: `M` gets a column per position).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnxrank.rewrite import Rewrite, Rule, Weights
from onnxrank.values import (
    CANDIDATES,
    Codes,
    Dims,
    Level,
    canonical,
    codes_of,
    source_numbers,
    symbols,
)

_LARGEST = 1 << 24
_SECONDS_PER_MAC = 1 / 25e9
_SECONDS_PER_ENTRY = 4 / 8e9
_SECONDS_PER_LAUNCH = 1.5e-6


@dataclass(frozen=True)
class Fold:
    """How a contraction becomes one over the candidate-level factors.

    Attributes:
        coefficients: Request-level factors `[groups, items, terms]`.
        columns: Which of the folded columns' weights belong to each term: `[groups, terms]`.
        basis: The candidate-level factors, once each.
        place: Number of the item, over all groups, that is the weight of a basis entry in a row: `[basis, rows]`; -1
            for none.
    """

    coefficients: Codes
    columns: NDArray[np.int64]
    basis: Codes
    place: NDArray[np.int64]


def expand(rw: Rewrite, codes: Codes) -> tuple[Codes, Codes]:
    """Entries as sums of products not made yet.

    Returns:
        Request-level and candidate-level factors, `[..., terms]` each; what is no such sum is 1 times itself.
    """
    one = rw.one(rw.sources.of(codes)[0].dtype)
    found = []
    for source in rw.sources.of(codes):
        if source.linear is not None and source.name is None:
            found.append((source.number, *source.linear()))
    width = max([a.shape[-1] for _, a, _ in found], default=1)
    left = np.full((*codes.shape, width), rw.zero(rw.sources.of(codes)[0].dtype))
    right = np.repeat(codes[..., None], width, -1)
    left[..., 0] = one
    numbers = source_numbers(codes)
    for number, a, b in found:
        at = numbers == number
        where = (codes & ((1 << 40) - 1))[at]
        terms = a.shape[-1]
        left[at] = rw.zero(rw.sources[number].dtype)
        left[at, :terms] = a.reshape(-1, terms)[where]
        right[at, :terms] = b.reshape(-1, terms)[where]
        right[at, terms:] = b.reshape(-1, terms)[where][:, :1]
    return left, right


def is_open(rw: Rewrite, codes: Codes) -> NDArray[np.bool_]:
    """Whether an entry is a sum of products not made yet."""
    out = np.zeros(codes.shape, bool)
    numbers = source_numbers(codes)
    for source in rw.sources.of(codes):
        if source.linear is not None and source.name is None:
            out |= numbers == source.number
    return out


def find(rw: Rewrite, part: Codes, candidate: NDArray[np.bool_], width: int) -> tuple[NDArray[np.int64], Fold] | None:
    """Looks for columns to fold.

    Args:
        rw: The rewrite.
        part: Entries `[rows..., columns]` of the contracted operand.
        candidate: Which columns are candidate-level.
        width: Columns of the weights.

    Returns:
        The columns and how; None where nothing can be folded, or it would not pay.
    """
    if not candidate.any():
        return None
    flat = part.reshape(-1, part.shape[-1])
    opened = (is_open(rw, flat) & candidate).any(0)
    if not opened.any():
        return None
    left, right = expand(rw, flat[:, opened])
    basis = np.unique(right)
    if any(s.symbols != (CANDIDATES,) for s in rw.sources.of(basis)):
        return None
    chosen = opened | (candidate & np.isin(flat, basis).all(0))
    columns = np.flatnonzero(chosen)
    left, right = expand(rw, flat[:, columns])
    rows = flat.shape[0]
    r, k, j = np.nonzero(left != rw.zero(rw.sources.of(basis)[0].dtype))
    item = np.searchsorted(basis, right[r, k, j]) * rows + r
    order = np.lexsort((k, item))
    item, k, coefficient = item[order], k[order], left[r, k, j][order]
    items, start, count = np.unique(item, return_index=True, return_counts=True)
    terms = int(count.max())
    if len(items) * terms > _LARGEST:
        return None
    lists = np.full((len(items), terms), -1)
    values = np.full((len(items), terms), rw.zero(rw.sources.of(basis)[0].dtype))
    at = (np.repeat(np.arange(len(items)), count), np.arange(len(item)) - np.repeat(start, count))
    lists[at], values[at] = k, coefficient
    kinds, kind = np.unique(lists, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    sizes = np.bincount(kind)
    groups, most = len(kinds), int(sizes.max())
    if groups * most * terms > 2 * len(item) + 64 or groups * terms * width > _LARGEST:
        return None
    by_kind = np.argsort(kind, kind="stable")
    within = np.empty(len(items), np.int64)
    within[by_kind] = np.arange(len(items)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    coefficients = np.full((groups, most, terms), rw.zero(rw.sources.of(basis)[0].dtype))
    coefficients[kind, within] = values
    place = np.full((len(basis), rows), -1)
    place.reshape(-1)[items] = kind * most + within
    made = rows * int(opened.sum())
    direct = made * _SECONDS_PER_ENTRY * 2 + (rows * len(columns) * width + len(item)) * _SECONDS_PER_MAC
    folded = len(basis) * rows * width * _SECONDS_PER_MAC
    once = (groups * terms + groups * most) * width * _SECONDS_PER_ENTRY * 2 + 5 * _SECONDS_PER_LAUNCH
    if once + rw.candidates * folded >= rw.candidates * direct:
        return None
    return columns, Fold(coefficients, np.maximum(kinds, 0), basis, place)


def product(
    rw: Rewrite, fold: Fold, weight: Weights, members: NDArray[np.int64]
) -> tuple[Dims, Callable[[str | None, Dims], str]]:
    """Writes a folded contraction.

    Args:
        rw: The rewrite.
        fold: What to fold.
        weight: The weights.
        members: Which of their rows belong to the folded columns.

    Returns:
        The result's physical shape, `[N, rows * width]`, and its writer.
    """
    groups, items, terms = fold.coefficients.shape
    width, rows = weight.data.shape[1], fold.place.shape[1]
    dims: Dims = ((CANDIDATES,), canonical([rows * width]))

    def writer(addend: str | None, have: Dims) -> str:
        factors, physical = rw.layout.realise(
            fold.coefficients, (canonical([groups]), canonical([items]), canonical([terms]))
        )
        assert not symbols(physical)
        made = rw.emit.add("MatMul", [factors, weight.rows(rw.emit, members[fold.columns])])
        dtype = rw.sources.of(fold.basis)[0].dtype
        source = rw.sources.add((canonical([groups]), canonical([items]), canonical([width])), dtype, made)
        codes = codes_of(source).reshape(groups * items, width)[fold.place]
        codes[fold.place < 0] = rw.zero(dtype)
        count = len(fold.basis)
        matrix, _ = rw.layout.realise(
            codes.reshape(count, rows * width), (canonical([count]), canonical([rows * width]))
        )
        basis, _ = rw.layout.realise(fold.basis.reshape(1, count), ((CANDIDATES,), canonical([count])))
        if addend is not None and prod(rows_of(have)) in (width, rows * width) and not symbols(have):
            if prod(rows_of(have)) == rows * width:
                row = rw.layout.reshape(addend, have, ((), canonical([rows * width])))
                return rw.emit.add("Gemm", [basis, matrix, row])
        if addend is not None and rows == 1:
            return rw.emit.add("Gemm", [basis, matrix, rw.layout.reshape(addend, have, _flat(have))])
        out = rw.emit.add("MatMul", [basis, matrix])
        assert addend is None
        return out

    return dims, writer


def rows_of(dims: Dims) -> tuple[int, ...]:
    """Constant extents of a shape."""
    return tuple(f for d in dims for f in d if isinstance(f, int))


def _flat(dims: Dims) -> Dims:
    syms = symbols(dims)
    return (tuple(syms), canonical([prod(rows_of(dims))]))


RULE = Rule(
    name="fold",
    title="Folds products of request-level and candidate-level values into the linear map that reads them.",
    identity="sum_k W_k R_k C_u(k) = sum_u (sum_{k: u(k)=u} R_k W_k) C_u",
    source="onnxrank; beyond rank-aware decomposition (arXiv 2605.27450)",
    legal="The product is read by linear maps with constant weights, and the weights made per request are regular.",
    refuses="Products that are needed as they are, and numbers of candidates at which the weights cost more than they save.",
    exactness="reassociates",
    operators={},
)

__all__ = ["RULE", "Fold", "Level", "expand", "find", "is_open", "product"]
