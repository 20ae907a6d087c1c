"""`fold`: the cheapest order of products of constant, request-level and candidate-level factors.

A product of a request-level and a candidate-level entry that only a linear map reads need not be made. With entries
`R_k C_u(k)` and weights `W[k, h]`,

    sum_k W[k, h] R_k C_u(k) = sum_u M[u, h] C_u    with    M[u, h] = sum_{k: u(k) = u} R_k W[k, h]

and `M` is made once per request. Pairs of 24 request-level with 8 candidate-level fields of width d before a layer of h
columns cost 192 d h per candidate as they stand, and 8 d h folded. The same holds for sums of such products (dot
products of fields) and where rows share the candidate's entries (target attention: `M` gets a column per position, also
where the number of positions differs from request to request). What differs by a factor per row only, `t u`, is mapped
once, `(t u) W = t (u W)`, and the factors of two such rows are multiplied apart, `(s u) (t v) = (s t) (u v)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnxrank import cost
from onnxrank.grouping import LARGE
from onnxrank.operators import operator
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    CANDIDATES,
    Codes,
    DeferredMatMul,
    Dims,
    Level,
    OpenProduct,
    Unrepresentable,
    Value,
    canonical,
    codes_of,
    extents,
    is_candidate_symbol,
    offsets,
    source_numbers,
    symbols,
)
from onnxrank.weights import Weights

_LARGEST = 1 << 24
"""Entries of weights made per request, and of what they are made of, at most; below, costs decide."""
_FEW = 3
"""Tensors at most that a basis is kept apart by: a bound on the number of products that one becomes."""


@dataclass(frozen=True)
class Fold:
    """How a contraction becomes one over the candidate-level factors.

    Attributes:
        coefficients: Request-level factors `[groups, items, terms]`.
        columns: Which of the folded columns' weights belong to each term: `[groups, terms]`.
        basis: The candidate-level factors, once each.
        place: Number of the item, over all groups, that is the weight of a basis entry in a row: `[basis, rows]`; -1
            for none.
        plain: Basis entries of the columns, behind those folded, that are candidate-level factors themselves:
            `[columns, rows]`.
        along: Symbols other than the number of candidates, such as the length of a history: the request-level factors
            differ along them, so the weights made per request have a column for each of their positions.
    """

    coefficients: Codes
    columns: NDArray[np.int64]
    basis: Codes
    place: NDArray[np.int64]
    plain: NDArray[np.int64]
    along: tuple[str, ...] = ()

    @property
    def order(self) -> NDArray[np.int64] | None:
        """The basis by rows, where every row has entries of its own and as many as the others: `[rows, entries]`.

        Then there is a product for each row instead of one with weights of 0 for other rows' entries.
        """
        used = self.place >= 0
        counts = used.sum(0)
        if self.place.shape[1] == 1 or len(self.plain) or (used.sum(1) != 1).any() or (counts != counts[0]).any():
            return None
        return np.argsort(used.argmax(1), kind="stable").reshape(self.place.shape[1], -1)


def expand(rw: Rewrite, codes: Codes) -> tuple[Codes, Codes]:
    """Entries as sums of products not made yet.

    Returns:
        Request-level and candidate-level factors, `[..., terms]` each; what is no such sum is 1 times itself.
    """
    sources = rw.sources.of(codes)
    one, zero = rw.one(sources[0].dtype), rw.zero(sources[0].dtype)
    found = []
    for source in sources:
        if opened := source.offers(OpenProduct):
            found.append((source.number, *opened.factors()))
    width = max([a.shape[-1] for _, a, _ in found], default=1)
    left = np.full((*codes.shape, width), zero)
    right = np.repeat(codes[..., None], width, -1)
    left[..., 0] = one
    numbers = source_numbers(codes)
    for number, a, b in found:
        at = numbers == number
        where = offsets(codes[at])
        terms = a.shape[-1]
        left[at] = zero
        left[at, :terms] = a.reshape(-1, terms)[where]
        right[at, :terms] = b.reshape(-1, terms)[where]
        right[at, terms:] = b.reshape(-1, terms)[where][:, :1]
    return left, right


def is_open(rw: Rewrite, codes: Codes) -> NDArray[np.bool_]:
    """Whether an entry is a sum of products not made yet."""
    out = np.zeros(codes.shape, bool)
    numbers = source_numbers(codes)
    for source in rw.sources.of(codes):
        if source.is_open:
            out |= numbers == source.number
    return out


def find(
    rw: Rewrite, part: Codes, dims: Dims, candidate: NDArray[np.bool_], width: int
) -> tuple[NDArray[np.int64], Fold] | None:
    """Looks for columns to fold.

    Args:
        rw: The rewrite.
        part: Entries `[rows..., columns]` of the contracted operand.
        dims: Their logical shape.
        candidate: Which columns are candidate-level.
        width: Columns of the weights.

    Returns:
        The columns and how; None where nothing can be folded, or it would not pay.
    """
    if not candidate.any():
        return None
    flat = part.reshape(-1, part.shape[-1])
    width = _columns_made(rw, width)
    opened: NDArray[np.bool_] = np.any(is_open(rw, flat) & candidate, axis=0)
    if not opened.any():
        return None
    basis = np.unique(expand(rw, flat[:, opened])[1])
    saved = (int(candidate.sum()) - len(basis)) * width * len(flat)
    if any(s.symbols != (CANDIDATES,) for s in rw.sources.of(basis)):
        _refuse_lengths(rw, basis, saved)
        return None
    joined = candidate & np.isin(flat, basis).all(0) & ~opened
    along = tuple(s for s in symbols(dims) if s != CANDIDATES)
    operand = _Operand(rw, flat, along, opened, basis, width)
    found = operand.fold(np.flatnonzero(opened | joined))
    if found is None and joined.any():
        # Columns that are candidate-level factors themselves add to the weights made per request.
        found = operand.fold(np.flatnonzero(opened), np.flatnonzero(joined))
    return found


def _columns_made(rw: Rewrite, width: int) -> int:
    """Of the columns of the current node's product, those that have to be made for every candidate.

    Behind a cross layer's factor the request-level columns stay affine in the candidate (`rules/cross.py`).
    """
    name = rw.node.output[0]
    while True:
        found = rw.readers(name)
        if len(found) != 1 or operator(found[0]) not in ("Add", "Mul"):
            return width
        (reader,) = found
        other = rw.values.get(next((i for i in reader.input if i != name), ""))
        if operator(reader) == "Mul":
            break
        if not isinstance(other, Value) or rw.level(other) is not Level.CONSTANT:
            return width
        name = reader.output[0]
    if not isinstance(other, Value) or not rw.uses("cross"):
        return width
    if not rw.read_by_linear_maps(reader.output[0], frozenset({"Add"})):
        return width
    return int((rw.sources.levels(other.codes) == Level.CANDIDATE).sum()) or width


def _refuse_lengths(rw: Rewrite, factors: Codes, saved: int) -> None:
    """Remarks on products along an axis of symbolic extent, of which no matrix can be made once and for all.

    Args:
        rw: The rewrite.
        factors: The factors that have the axis.
        saved: Multiply-adds per candidate and position along the axis that folding could save.
    """
    found = sorted(rw.sources.symbols(factors) - {CANDIDATES})
    named = ", ".join(s.removeprefix("S:") for s in found)
    rows = max(0, saved) * rw.candidates * cost.LENGTH ** len(found)
    reason = (
        f"the products that it reads vary along {named}, whose extent is not constant, so they cannot become weights"
    )
    rw.refuse("fold", reason, rows)


@dataclass(frozen=True)
class _Operand:
    """An operand that is contracted over its columns.

    Attributes:
        rw: The rewrite.
        flat: Its entries, `[rows, columns]`.
        along: Symbols other than the number of candidates along which it may vary.
        opened: Which columns are products that were put off.
        basis: The candidate-level factors of those.
        width: Columns of the weights.
    """

    rw: Rewrite
    flat: Codes
    along: tuple[str, ...]
    opened: NDArray[np.bool_]
    basis: Codes
    width: int

    def fold(
        self, columns: NDArray[np.int64], plain: NDArray[np.int64] | None = None
    ) -> tuple[NDArray[np.int64], Fold] | None:
        """The fold of some columns, if the weights are regular and pay; `plain` columns have their own weights added.

        Returns:
            The columns, those of `plain` last, and how; None where there is no such fold, or it does not pay.
        """
        rw = self.rw
        left, right = expand(rw, self.flat[:, columns])
        held = rw.sources.symbols(left)
        if any(is_candidate_symbol(s) for s in held):
            return None
        found = _regular(left, right, self.basis, rw.zero(rw.sources.of(self.basis)[0].dtype), self.width)
        if found is None:
            return None
        plain = np.zeros(0, np.int64) if plain is None else plain
        own = np.searchsorted(self.basis, self.flat[:, plain]).T
        fold = replace(found, plain=own, along=tuple(s for s in self.along if s in held))
        if fold.along and len(self.flat) > 1 and (fold.order is not None or len(plain)):
            return None
        members = np.concatenate([columns, plain])
        return (members, fold) if self._pays(fold, len(members)) else None

    def _pays(self, fold: Fold, columns: int) -> bool:
        """Decides for a fold of so many columns, or for products as they stand."""
        rw, rows, width = self.rw, len(self.flat), self.width
        groups, most, terms = fold.coefficients.shape
        long = cost.LENGTH ** len(fold.along)
        # Every product that is not folded is written, and read again.
        made = rows * int(self.opened.sum())
        multiplied = int((fold.coefficients != rw.zero(rw.sources.of(self.basis)[0].dtype)).sum())
        direct = cost.estimate(long * (rows * columns * width + multiplied), 8 * long * made)
        each = cost.estimate(long * len(self.basis) * (1 if fold.order is not None else rows) * width)
        written = 8 * (groups * terms + groups * most * long) * width
        once = cost.estimate(groups * most * long * terms * width, written, launches=5)
        ways = (Alternative(LEAVE, "", 0, direct), Alternative(TAKE, "reassociates", once, each))
        return rw.decide("fold", ways) != LEAVE


def _regular(left: Codes, right: Codes, basis: Codes, zero: int, width: int) -> Fold | None:
    """The weights of a fold as one stack of products, or None.

    Entries `[rows, columns, terms]` are sorted by the candidate-level factor and the row that they belong to: an item
    is the weight of one factor in one row, a sum over some columns. Items over the same columns are a group, and one
    product of their coefficients with the weights of these columns.

    Args:
        left: Request-level factors.
        right: Candidate-level factors.
        basis: The latter, once each.
        zero: Code of 0.
        width: Columns of the weights.
    """
    rows = len(left)
    r, k, j = np.nonzero(left != zero)
    item = np.searchsorted(basis, right[r, k, j]) * rows + r
    order = np.lexsort((k, item))
    item, k, coefficient = item[order], k[order], left[r, k, j][order]
    items, start, count = np.unique(item, return_index=True, return_counts=True)
    terms = int(count.max())
    if len(items) * terms > _LARGEST:
        return None
    lists = np.full((len(items), terms), -1)
    values = np.full((len(items), terms), zero)
    at = (np.repeat(np.arange(len(items)), count), np.arange(len(item)) - np.repeat(start, count))
    lists[at], values[at] = k, coefficient
    kinds, kind = np.unique(lists, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    sizes = np.bincount(kind)
    groups, most = len(kinds), int(sizes.max())
    if groups * terms * max(most, width) > _LARGEST:
        return None
    by_kind = np.argsort(kind, kind="stable")
    within = np.empty(len(items), np.int64)
    within[by_kind] = np.arange(len(items)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    coefficients = np.full((groups, most, terms), zero)
    coefficients[kind, within] = values
    place = np.full((len(basis), rows), -1)
    place.reshape(-1)[items] = kind * most + within
    return Fold(coefficients, np.maximum(kinds, 0), basis, place, np.zeros((0, rows), np.int64))


@dataclass(eq=False)
class _FoldedProduct(DeferredMatMul):
    """A folded contraction: candidate-level factors times weights made per request.

    Attributes:
        rw: The rewrite.
        fold: What to fold.
        weight: The weights.
        members: Which of their rows belong to the folded columns.
        dims: Shape of the result, `[N, rows * width]`; `[N, L * rows * width]` along a length L.
    """

    rw: Rewrite
    fold: Fold
    weight: Weights
    members: NDArray[np.int64]
    dims: Dims

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        rw, column = self.rw, self.dims[-1]
        name = addend
        if addend is not None:
            lead = tuple(s for s in symbols(have) if is_candidate_symbol(s))
            rest = canonical([*(s for s in symbols(have) if s not in lead), prod(extents(have))])
            name = rw.layout.reshape(addend, have, (lead, rest))
        for part in _by_tensor(self.fold, extents((column,))[0]):
            count = canonical([len(part.basis)])
            weights = matrix(rw, part, self.weight, self.members)
            made, _ = rw.layout.realise(weights, (count, column), full=bool(self.fold.along))
            basis, _ = rw.layout.realise(part.basis[None], ((CANDIDATES,), count))
            name = rw.emit.add("Gemm", [basis, made, name]) if name else rw.emit.add("MatMul", [basis, made])
        assert name is not None
        return name


class _FoldedRows(_FoldedProduct):
    """The same where rows have entries of their own: `[rows, N, entries] @ [rows, entries, width]`."""

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        rw, fold, order = self.rw, self.fold, self.fold.order
        assert order is not None
        (rows, entries), width = order.shape, self.weight.data.shape[1]
        stack = self.dims[:1]
        codes = matrix(rw, fold, self.weight, self.members).reshape(len(fold.basis), rows, width)
        own = codes[order, np.arange(rows)[:, None]]
        made, _ = rw.layout.realise(own, (*stack, canonical([entries]), canonical([width])))
        by_row = (*stack, (CANDIDATES,), canonical([entries]))
        basis = rw.layout.stack(fold.basis[order].reshape(rows, 1, entries), by_row)
        name = rw.emit.add("MatMul", [basis, made])
        return name if addend is None else rw.emit.add("Add", [name, addend])


def product(rw: Rewrite, fold: Fold, weight: Weights, members: NDArray[np.int64]) -> _FoldedProduct:
    """A folded contraction.

    Args:
        rw: The rewrite.
        fold: What to fold.
        weight: The weights.
        members: Which of their rows belong to the folded columns.
    """
    width, rows = weight.data.shape[1], fold.place.shape[1]
    if fold.order is not None:
        return _FoldedRows(rw, fold, weight, members, (canonical([rows]), (CANDIDATES,), canonical([width])))
    return _FoldedProduct(rw, fold, weight, members, ((CANDIDATES,), canonical([*fold.along, rows * width])))


def _by_tensor(fold: Fold, width: int) -> list[Fold]:
    """A fold for each of a few large tensors that hold the basis: adding up products costs less than joining those."""
    numbers = source_numbers(fold.basis)
    found, counts = np.unique(numbers, return_counts=True)
    alone = len(fold.coefficients) == fold.place.shape[1] == 1 and not len(fold.plain)
    if not alone or not 1 < len(found) <= _FEW or counts.min() < LARGE or (len(found) - 1) * width > len(numbers):
        return [fold]
    out = []
    for number in found:
        at = np.flatnonzero(numbers == number)
        own = fold.coefficients[:, fold.place[at, 0]]
        out.append(replace(fold, coefficients=own, basis=fold.basis[at], place=np.arange(len(at))[:, None]))
    return out


def matrix(rw: Rewrite, fold: Fold, weight: Weights, members: NDArray[np.int64]) -> Codes:
    """Writes the weights made per request; gives their codes, `[basis, rows * width]`, all of them along `along`."""
    groups, items, terms = fold.coefficients.shape
    width, rows, count = weight.data.shape[1], fold.place.shape[1], len(fold.basis)
    dtype = rw.sources.of(fold.basis)[0].dtype
    for source in rw.sources.of(fold.coefficients):
        rw.sources.journal.put(source, "folded", True)
    folded = members[: len(members) - len(fold.plain)]
    columns = folded[fold.columns]
    if (fold.coefficients == fold.coefficients[:1]).all():
        made = _of_groups(rw, fold, weight, columns)
    else:
        shape: Dims = (canonical([groups]), canonical([*fold.along, items]), canonical([terms]))
        factors = _factors(rw, fold, fold.coefficients, shape)
        name = rw.emit.add("MatMul", [factors, weight.rows(rw.emit, columns)])
        made = codes_of(rw.sources.add((*shape[:-1], canonical([width])), dtype, name))
    codes = made.reshape(groups * items, width)[fold.place]
    codes[fold.place < 0] = rw.zero(dtype)
    if len(fold.plain):
        codes = _with_plain(rw, fold, weight, members[len(folded) :], codes, dtype)
    return codes.reshape(count, rows * width)


def _factors(rw: Rewrite, fold: Fold, codes: Codes, dims: Dims) -> str:
    """Writes request-level factors, all rows of them where they differ along a symbol."""
    return rw.layout.stack(codes, dims) if fold.along else rw.layout.realise(codes, dims)[0]


def _of_groups(rw: Rewrite, fold: Fold, weight: Weights, columns: NDArray[np.int64]) -> Codes:
    """Writes the weights of groups with the same coefficients, `[groups, items, width]`, in one matrix product."""
    groups, items, terms = fold.coefficients.shape
    width, dtype = weight.data.shape[1], rw.sources.of(fold.basis)[0].dtype
    of_items, of_terms = canonical([*fold.along, items]), canonical([terms])
    if groups > 1 and width == 1 and not fold.along:
        # In this order the weights are in the order of the groups.
        one = canonical([1])  # a stack of one, as fields are embedded
        factors, _ = rw.layout.realise(fold.coefficients[:1].swapaxes(1, 2), (one, of_terms, of_items))
        own = weight.part(rw.emit, 0, columns.reshape(-1)).reshaped(rw.emit, (groups, terms)).tensor(rw.emit)
        made = rw.sources.add((one, canonical([groups]), of_items), dtype, rw.emit.add("MatMul", [own, factors]))
        return codes_of(made)
    factors = _factors(rw, fold, fold.coefficients[0], (of_items, of_terms))
    own = weight.part(rw.emit, 0, columns.T.reshape(-1)).reshaped(rw.emit, (terms, groups * width)).tensor(rw.emit)
    made = rw.sources.add((of_items, canonical([groups * width])), dtype, rw.emit.add("MatMul", [factors, own]))
    return codes_of(made).reshape(items, groups, width).swapaxes(0, 1)


def _with_plain(
    rw: Rewrite, fold: Fold, weight: Weights, columns: NDArray[np.int64], codes: Codes, dtype: int
) -> Codes:
    """Adds the own weights of candidate-level factors to the rows made for them, `[basis, rows, width]`."""
    _, rows, width = codes.shape
    touched = np.unique(fold.plain)
    place = np.searchsorted(touched, fold.plain)
    if (place == place[:, :1]).all():
        place = place[:, :1]
    chosen = np.zeros((len(touched), place.shape[1], len(columns)), bool)
    chosen[place, np.arange(place.shape[1]), np.arange(len(columns))[:, None]] = True
    if not chosen.any(-1).all():
        raise Unrepresentable("candidate-level factors of some rows only")
    dims: Dims = (canonical([len(touched)]), canonical([*fold.along, rows]), canonical([width]))
    base, _ = rw.layout.realise(codes[touched], dims, full=bool(fold.along))
    if chosen.sum(-1).max() == 1:
        own = weight.rows(rw.emit, columns[chosen.argmax(-1)])
    else:
        # Columns that hold the same entry: their weights are added up, by a node of constants.
        sums = rw.emit.constant(chosen.astype(weight.data.dtype))
        own = rw.emit.add("MatMul", [sums, weight.rows(rw.emit, columns)])
    added = rw.emit.add("Add", [base, own])
    codes = codes.copy()
    codes[touched] = codes_of(rw.sources.add(dims, dtype, added)).reshape(len(touched), rows, width)
    return codes


RULE = Rule(
    name="fold",
    title="Folds products of request-level and candidate-level values into the linear map that reads them.",
    identity="sum_k W_k R_k C_u(k) = sum_u (sum_{k: u(k)=u} R_k W_k) C_u",
    source="onnxrank; beyond rank-aware decomposition (arXiv 2605.27450)",
    legal="The product is read by linear maps with constant weights, and the weights made per request are regular.",
    refuses="Products needed as they are; numbers of candidates at which the weights cost more than they save.",
    exactness="reassociates",
    operators={},
)
