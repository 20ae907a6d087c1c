"""Rows that candidates pick of a request's, as operands of what comes behind.

A product with constants is one of all its operand's columns, whatever those are made of. Where some hold rows that
candidates pick, in DIN's `[q, k, q - k, q * k] W` over what was found for each candidate, the rows are multiplied with
their part of the weights before they are picked:

    [q | H[i] | q - H[i] | q H[i]] W = q (W_1 + W_3) + (H (W_2 - W_3))[i] + (q H[i]) W_4
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray

from onnxrank import cost
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import (
    Abstract,
    Codes,
    Deferred,
    Dims,
    Source,
    Sum,
    Value,
    canonical,
    codes_of,
    extents,
    is_candidate_symbol,
    offsets,
    source_numbers,
    symbols,
    view,
)

from .elementwise import elementwise


@dataclass(eq=False)
class Picked(Deferred):
    """Rows that are picked of a tensor.

    Attributes:
        rw: The rewrite.
        table: What is picked of, `[rows, entries...]`, the same for all candidates.
        ids: Positions of rows.
    """

    rw: Rewrite
    table: Value
    ids: Value

    def materialise(self) -> str:
        """Picks the rows."""
        rw = self.rw
        return rw.emit.add("Gather", [rw.tensor(self.table), rw.tensor(self.ids)], {"axis": 0})

    @property
    def dims(self) -> Dims:
        """Logical shape of the rows that are picked."""
        return (*self.ids.dims, *self.table.dims[1:])

    @property
    def made(self) -> Value:
        """The rows, written when somebody asks for them."""
        rw, table = self.rw, self.table
        present = rw.present(self.ids) | (rw.present(table) & set(symbols(table.dims[1:])))
        return _deferred(rw, self.dims, table.dtype, present, self)


@dataclass(eq=False)
class _Negative(Deferred):
    """The negative of rows that are picked, as a term of a sum.

    Attributes:
        value: The rows.
        rows: How they are picked.
    """

    value: Value
    rows: Picked

    def materialise(self) -> str:
        rw = self.rows.rw
        return rw.emit.add("Neg", [rw.tensor(self.value)])


def _deferred(rw: Rewrite, dims: Dims, dtype: int, present: set[str], how: Deferred) -> Value:
    value = rw.new(dims, dtype, present)
    assert value.whole is not None
    return replace(value, whole=rw.defer(value.whole.dims, dtype, how, "picks"))


def of(value: Abstract | None) -> Picked | None:
    """How rows were picked, of a value that is as they were."""
    if not isinstance(value, Value) or value.whole is None:
        return None
    found = value.whole.deferred
    return found if isinstance(found, Picked) and found.dims == value.dims else None


def negative(rw: Rewrite, value: Value, output: str) -> Value:
    """The negative of a value; of rows that are picked, one that is not made yet.

    Args:
        rw: The rewrite.
        value: The value.
        output: A name that no tensor has.
    """
    rows = of(value)
    if rows is None:
        return elementwise(rw, "Neg", [value], output)
    return _deferred(rw, value.dims, value.dtype, rw.present(value), _Negative(value, rows))


def counted(dims: Dims) -> int:
    """Rows of a shape, for a candidate."""
    return int(prod(extents(dims)) * cost.LENGTH ** sum(not is_candidate_symbol(s) for s in symbols(dims)))


@dataclass(frozen=True)
class _Columns:
    """Columns of a term that hold rows picked in one way.

    Attributes:
        term: The term's place in its sum.
        columns: Which of its columns.
        rows: How they are picked.
        ids: Codes of the positions, for every row of the term.
        places: Of each column, which one of the table it is.
        positive: What they are the negative of; None where they are what is picked.
    """

    term: int
    columns: NDArray[np.int64]
    rows: Picked
    ids: Codes
    places: NDArray[np.int64]
    positive: Source | None

    @property
    def table(self) -> Codes:
        """What they are picked of, `[rows, columns]`."""
        rows = self.rows
        table = rows.table
        if self.positive is not None:
            table = elementwise(rows.rw, "Neg", [table], rows.rw.emit.fresh(f"{rows.rw.emit.hint}/negative"))
        codes = table.codes
        return codes.reshape(codes.shape[0], -1)[:, self.places]

    @property
    def way(self) -> tuple[object, ...]:
        """What is equal for columns that can be picked together."""
        return self.rows.table.dims[0], self.ids.tobytes()


def _columns(rw: Rewrite, terms: list[Value]) -> Iterator[_Columns]:
    """Columns of terms that hold rows that are picked."""
    for k, term in enumerate(terms):
        flat = term.codes.reshape(-1, term.codes.shape[-1])
        numbers = source_numbers(flat)
        for source in rw.sources.of(flat[:1]):
            how = source.deferred
            rows = how.rows if isinstance(how, _Negative) else how
            if not isinstance(rows, Picked) or symbols(rows.table.dims[1:]):
                continue
            columns = np.flatnonzero((numbers == source.number).all(0))
            width = prod(extents(rows.table.dims[1:]))
            at, places = np.divmod(offsets(flat[:, columns]), width)
            if len(columns) and (at == at[:, :1]).all() and (places == places[:1]).all():
                ids = rows.ids.codes.reshape(-1)[at[:, 0]]
                positive = how.value.whole if isinstance(how, _Negative) else None
                yield _Columns(k, columns, rows, ids, places[0], positive)


def apart(rw: Rewrite, x: Value | Sum, width: int) -> tuple[Picked | None, Value | Sum | None]:
    """Divides the operand of a product with constants, over its last axis, by what candidates pick.

    Args:
        rw: The rewrite.
        x: The operand.
        width: Columns of the constants.

    Returns:
        The rows of the operand of which some columns are picked in one way, 0 in others; None where there are none, or
        it does not pay to multiply them before they are picked. And the operand without those; None if nothing is left.
    """
    if not rw.uses("picks") or (isinstance(x, Value) and x.whole is not None):
        return None, x
    terms = x.terms if isinstance(x, Sum) else [x]
    ways: dict[tuple[object, ...], list[_Columns]] = {}
    for one in _columns(rw, terms):
        ways.setdefault(one.way, []).append(one)
    if not ways:
        return None, x
    own = max(ways.values(), key=lambda found: sum(len(one.columns) for one in found))
    if not _pays(rw, own, x.dims[:-1], width):
        return None, _subtracted(rw, x) if isinstance(x, Sum) else x
    kept = [t.codes.copy() for t in terms]
    for one in own:
        kept[one.term][..., one.columns] = rw.zero(x.dtype)
    rest = [view(x.dims, x.dtype, codes) for codes in kept if (codes != rw.zero(x.dtype)).any()]
    return _rows(rw, own, x), rw.unless_sum(rw.add(rest, x.dims, x.dtype)) if rest else None


def _rows(rw: Rewrite, own: list[_Columns], x: Value | Sum) -> Picked:
    """Columns of an operand that are picked in one way, 0 in others, as rows that are picked."""
    first, lead = own[0], x.dims[:-1]
    dims, tables = (first.rows.table.dims[0], x.dims[-1]), []
    for one in own:
        codes = np.full(extents(dims), rw.zero(x.dtype))
        codes[:, one.columns] = one.table
        tables.append(view(dims, x.dtype, codes))
    ids = rw.tidy(lead, first.rows.ids.dtype, first.ids.reshape(extents(lead)))
    return Picked(rw, rw.settle(rw.add(tables, dims, x.dtype)), ids)


def _pays(rw: Rewrite, own: list[_Columns], lead: Dims, width: int) -> bool:
    """Decides whether columns are multiplied before they are picked."""
    columns = sum(len(one.columns) for one in own)
    there, here = counted(own[0].rows.table.dims[:1]), counted(lead)
    lookup, subtracted = cost.CPU.rate("lookup"), cost.CPU.rate("broadcast")
    # What is multiplied behind lies beside the other columns for that, and is subtracted from the candidate's before.
    differences = [len(one.columns) for one in own if one.positive is not None]
    left = here * (cost.estimate(columns * width) + cost.beside(columns))
    left += here * sum(4 * count * subtracted.byte + subtracted.run for count in differences)
    once = cost.estimate(there * columns * width, 4 * there * width)
    each = here * (4 * width * lookup.byte + lookup.run + cost.added(width)[1])
    ways = (Alternative(LEAVE, "", 0, left), Alternative(TAKE, "reassociates", once, each))
    return rw.decide("picks", ways) == TAKE


def _subtracted(rw: Rewrite, x: Sum) -> Value | Sum:
    """A sum in which what would be added as the negative of rows is subtracted as it is."""
    terms, zero = [t.codes.copy() for t in x.terms], rw.zero(x.dtype)
    for one in _columns(rw, x.terms) if len(terms) == 2 else ():
        minuend, columns = terms[1 - one.term], one.columns
        if one.positive is None or (minuend[..., columns] == zero).any():
            continue
        dims = (*x.dims[:-1], canonical([len(columns)]))
        rows = codes_of(one.positive).reshape(-1)[offsets(terms[one.term][..., columns])]
        operands = [rw.tidy(dims, x.dtype, codes) for codes in (minuend[..., columns], rows)]
        made = elementwise(rw, "Sub", operands, rw.emit.fresh(f"{rw.emit.hint}/difference"))
        minuend[..., columns], terms[one.term][..., columns] = made.codes, zero
    return rw.unless_sum(rw.add([view(x.dims, x.dtype, codes) for codes in terms], x.dims, x.dtype))
