"""One product of two computed operands, written as runtimes make it in the least time.

The candidates are rows of one matrix where the other operand has none, if that costs less than a product for each of
them; what is computed is put off until somebody reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto

from onnxrank import cost
from onnxrank.rewrite import Rewrite
from onnxrank.values import (
    Codes,
    DeferredMatMul,
    Dim,
    Dims,
    Level,
    Scalable,
    Source,
    Unrepresentable,
    Value,
    broadcast_dims,
    canonical,
    codes_of,
    extents,
    is_candidate_symbol,
    keep_symbols,
    symbols,
)

from .broadcast import batches_agree
from .elementwise import elementwise
from .products import with_addend


def product(rw: Rewrite, node: NodeProto | None, a: Value, b: Value, dims: Dims, hint: str = "") -> Value:
    """One product.

    Args:
        rw: The rewrite.
        node: The original node, where it is all of that; None where it is a part.
        a: The left operand, `[..., R, K]`.
        b: The right operand, `[..., K, C]`.
        dims: The shape of the product.
        hint: What to call it; the node's output if not given.
    """
    a_rows, b_rows = ({s for s in rw.present(v) if is_candidate_symbol(s)} for v in (a, b))
    hint = hint or (node.output[0] if node else "")
    heads = prod(extents(dims[:-2]))
    if a_rows and not b_rows and (node is None or _side_by_side_pays(a, b, heads)):
        return _as_rows(rw, a, b, dims, hint)
    if b_rows and not a_rows:
        first, second = _turned(b), _turned(a)
        if node is None or _side_by_side_pays(first, second, heads, turned=True):
            made = _as_rows(rw, first, second, (*dims[:-2], dims[-1], dims[-2]), hint)
            return rw.tidy(dims, made.dtype, made.codes.swapaxes(-1, -2))
    if a_rows and b_rows and dims[-2:] == ((), ()) and not symbols(a.dims[-1:]):
        return _dots(rw, a, b, dims, hint)
    if a_rows and b_rows and a.dims[-1] == b.dims[-2] == ():  # nothing is added up
        return elementwise(rw, "Mul", [a, b], rw.emit.fresh(f"{hint}/mul"))
    held = rw.present(a) | rw.present(b)
    whole = dims
    if node is None:
        a, b, dims = _fewer(a, b, dims, held)
    full = [v.rank > 2 and not batches_agree(rw, v, v.dims[:-2], held) for v in (a, b)]
    if a_rows and not b_rows and all(d == () for d in keep_symbols(b.dims, rw.present(b))[:-2]):
        # One matrix for all rows.
        b = Value(b.dims[-2:], b.dtype, None, b.codes.reshape(b.codes.shape[-2:]))
        full[1] = False

    left, right = (_Operand(rw, v, held if full[k] else None, -1 - k) for k, v in enumerate((a, b)))
    if node is not None:
        (kept,) = rw.keep(node, [left.write(), right.write()], [dims], held)
        return rw.settle(kept)
    shapes = [keep_symbols(v.dims, held if wide else rw.present(v)) for v, wide in zip((a, b), full, strict=True)]
    own = (*broadcast_dims([s[:-2] for s in shapes]), shapes[0][-2], shapes[1][-1])
    kind = _ScalableBlock if rw.level(b) <= Level.REQUEST else _Block
    source = kind(rw, own, a.dtype, left, right, hint, rw.emit.rule).source()
    return Value(whole, a.dtype, None, np.broadcast_to(codes_of(source), extents(dims)).reshape(extents(whole)))


def _side_by_side_pays(a: Value, b: Value, heads: int, turned: bool = False) -> bool:
    """Whether bringing rows of all candidates side by side costs less than a product for each candidate.

    Args:
        a: What has the rows.
        b: The other operand.
        heads: Matrices of a stack.
        turned: Whether rows and columns have to change their places for that, of operand and result.
    """
    many = cost.MANY
    if heads == 1 and not turned:
        return True
    rows, inner, columns = (_length(d) for d in (a.dims[-2], a.dims[-1], b.dims[-1]))
    written, macs = 4 * many * heads * rows * columns, many * heads * rows * inner * columns
    each = cost.CPU.seconds(cost.Bill("stack", written, many * heads, macs))
    if heads > 1 or turned:  # the other operand has to have rows of candidates too: see `batches_agree`
        each += cost.CPU.seconds(cost.Bill("expand", 4 * many * heads * inner * columns, many))
    at_once = cost.CPU.seconds(cost.Bill("stack", written, heads, macs))
    for width in (inner, columns):
        entries = heads * rows * width
        bill = cost.transposed(4 * many * entries, 4 * rows * width, many * heads)
        if turned and rows > 1:
            bill = cost.Bill("permute", 4 * many * entries, many * entries)
        at_once += cost.CPU.seconds(bill)
    return at_once <= each


def _length(dim: Dim) -> int:
    """The extent of a dimension, symbols taken as they usually are."""
    return int(extents((dim,))[0] * cost.LENGTH ** len(symbols([dim])))


def _dots(rw: Rewrite, a: Value, b: Value, dims: Dims, hint: str) -> Value:
    """A row by a column for every candidate, and head: entry by entry, which takes runtimes a tenth of the time."""
    products = elementwise(rw, "Mul", [a, _turned(b)], rw.emit.fresh(f"{hint}/mul"))
    present = rw.present(products)
    name = rw.emit.reduce("ReduceSum", rw.tensor(products), [products.rank - 1], True, hint=hint)
    return rw.new(dims, a.dtype, present, name)


@dataclass(frozen=True)
class _Operand:
    """A value as an operand of a product.

    Attributes:
        rw: The rewrite.
        value: The value.
        held: The symbols along which it needs all rows; None where it needs no more than it has.
        inner: The axis that is summed over.
    """

    rw: Rewrite
    value: Value
    held: set[str] | None
    inner: int

    def write(self) -> str:
        """Writes it."""
        rw, value = self.rw, self.value
        name = rw.tensor(value) if self.held is None else rw.rows_along(value, self.held)
        held = rw.present(value) if self.held is None else self.held
        return rw.layout.factor(name, keep_symbols(value.dims, held), self.inner)


@dataclass(frozen=True)
class _Stack:
    """Entries as a stack of matrices.

    Attributes:
        rw: The rewrite.
        codes: The entries.
        dims: Their shape.
        hint: What to call it.
        plain: Whether it is written in whatever way, without regard to what the runtime makes of a Transpose in it.
    """

    rw: Rewrite
    codes: Codes
    dims: Dims
    hint: str
    plain: bool = False

    def write(self) -> str:
        """Writes it."""
        layout = self.rw.layout
        return (
            layout.realise(self.codes, self.dims)[0] if self.plain else layout.stack(self.codes, self.dims, self.hint)
        )


@dataclass(eq=False)
class _Block(DeferredMatMul):
    """A product of two computed operands.

    Attributes:
        rw: The rewrite.
        dims: Its shape.
        dtype: Element type.
        left: The left operand.
        right: The right operand.
        hint: What to call it.
        rule: Name of the rule that it is accounted to.
        factor: A scalar that the right operand is multiplied with (True) or divided by (False).
    """

    rw: Rewrite
    dims: Dims
    dtype: int
    left: _Operand | _Stack
    right: _Operand | _Stack
    hint: str
    rule: str | None
    factor: tuple[str, bool] | None = None

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        emit, left, right = self.rw.emit, self.left.write(), self.right.write()
        if self.factor is not None:
            number, times = self.factor
            right = emit.add("Mul" if times else "Div", [right, number], hint=self.hint)
        if addend is not None and len(self.dims) == 2:
            return emit.add("Gemm", [left, right, addend], hint=self.hint)
        addend = None if addend is None else self.rw.layout.unled(addend, have)
        return with_addend(self.rw, emit.add("MatMul", [left, right], hint=self.hint), addend)

    def source(self) -> Source:
        """The product as a tensor that is written when somebody reads it."""
        return self.rw.defer(self.dims, self.dtype, self, self.rule, block=True, part=True)


class _ScalableBlock(_Block, Scalable):
    """A product whose right operand is made once per request, and can take a number."""

    def scale(self, number: str, times: bool) -> Source:
        scaled = _Block(
            self.rw, self.dims, self.dtype, self.left, self.right, self.hint, self.rule, factor=(number, times)
        )
        return scaled.source()


def _fewer(a: Value, b: Value, dims: Dims, held: set[str]) -> tuple[Value, Value, Dims]:
    """The operands and the shape of a product without dimensions of a stack that hold one matrix."""
    lead = len(dims) - 2
    keep = [k for k, d in enumerate(keep_symbols(dims, held)) if k >= lead or d != ()]

    def few(v: Value) -> Value:
        mine = [k - (len(dims) - v.rank) for k in keep if k >= len(dims) - v.rank]
        return Value(tuple(v.dims[k] for k in mine), v.dtype, None, v.codes.reshape([v.codes.shape[k] for k in mine]))

    return few(a), few(b), tuple(dims[k] for k in keep)


def _turned(x: Value) -> Value:
    """The last two axes exchanged."""
    return Value((*x.dims[:-2], x.dims[-1], x.dims[-2]), x.dtype, None, x.codes.swapaxes(-1, -2))


def _as_rows(rw: Rewrite, a: Value, b: Value, dims: Dims, hint: str) -> Value:
    """`a @ b` for a candidate-level `a` and a request-level `b`: `[stack, N * rows, K] @ [stack, K, columns]`."""
    lead = len(dims) - 2
    a_codes = a.codes.reshape((1,) * (lead + 2 - a.rank) + a.codes.shape)
    b_codes = b.codes.reshape((1,) * (lead + 2 - b.rank) + b.codes.shape)
    a_dims = ((),) * (lead + 2 - a.rank) + a.dims
    b_dims = ((),) * (lead + 2 - b.rank) + b.dims
    inner = {s for d in (a_dims[-1], b_dims[-2]) for s in symbols([d])}
    syms = [s for s in symbols(a_dims[:-2]) if s in rw.present(a)]
    if len(syms) != 1 or any(s in rw.present(b) for s in symbols(b_dims[:-2])):
        raise Unrepresentable("rows of several extents")
    (rows,) = syms
    lines, columns = keep_symbols(a_dims[-2:-1], rw.present(a))[0], keep_symbols(b_dims[-1:], rw.present(b))[0]
    if rows in lines or not inner <= rw.present(a) & rw.present(b):
        raise Unrepresentable("rows of several extents")
    stack = tuple(canonical(f for f in d if f != rows) for d in a_dims[:-2])
    if any(len(d) > 1 for d in a_dims[:-2]) or symbols(stack):
        raise Unrepresentable("merged rows")
    many = tuple(k for k in range(lead) if max(a_codes.shape[k], b_codes.shape[k]) > 1)
    stacked = [np.broadcast_to(a_codes, np.broadcast_shapes(a_codes.shape, (*b_codes.shape[:-2], 1, 1))), b_codes]
    shape_a = (*(stacked[0].shape[k] for k in many), *a_codes.shape[-2:])
    shape_b = (*(b_codes.shape[k] for k in many), *b_codes.shape[-2:])
    own_a = (*(canonical([n]) for n in shape_a[:-2]), canonical([rows, *lines]), a_dims[-1])
    own_b = (*(canonical([n]) for n in shape_b[:-2]), b_dims[-2], columns)

    left = _Stack(rw, stacked[0].reshape(shape_a), own_a, hint)
    # A length may be 0, and what onnxruntime takes into a MatMul then divides by it.
    right = _Stack(rw, b_codes.reshape(shape_b), own_b, hint, plain=not symbols(own_b))
    source = _ScalableBlock(rw, (*own_a[:-1], own_b[-1]), a.dtype, left, right, hint, rw.emit.rule).source()
    stack_shape = np.broadcast_shapes(a_codes.shape[:-2], b_codes.shape[:-2])
    codes = codes_of(source).reshape(*stack_shape, a_codes.shape[-2], b_codes.shape[-1])
    return rw.tidy(dims, a.dtype, np.broadcast_to(codes, extents(dims)))
