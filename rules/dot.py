"""`dot`: products of two computed operands by blocks of levels.

For a dot interaction `X X'` with request-level rows `U` and candidate-level rows `C`,

    X X' = [[U U', U C'], [C U', C C']]

`U U'` is made once per request, `C U'` is one matrix product with candidates as rows, and `U C'` is its transpose. What
is selected of the result, a triangle say, folds into the weights of the layer that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.grouping import COLUMNS
from onnxrank.operators import Trait, having, operator
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    HOLE,
    Abstract,
    Codes,
    DeferredMatMul,
    Dims,
    Level,
    Scalable,
    Selectable,
    Source,
    Sum,
    Unrepresentable,
    Value,
    broadcast_dims,
    canonical,
    codes_of,
    cut_repeats,
    extents,
    is_candidate_symbol,
    keep_symbols,
    rectangles,
    split_merged,
    symbols,
    view,
    with_extents,
)

from . import fold
from .broadcast import ELEMENTWISE, batches_agree
from .elementwise import as_split, elementwise, mark_unread
from .products import with_addend

_MOVES = frozenset(having(Trait.MOVEMENT))
_FEW_ROWS = 4
"""Up to this many rows per candidate, bringing them side by side for one product costs less than many products."""
_LINEAR = {*having(Trait.LINEAR), "ReduceSum", "ReduceMean"}
_BLOCKWISE = frozenset(ELEMENTWISE)
_MOST_HEADS = 16
"""Matrices of a stack at most that become products of their own: a bound on the size of the result.

Whether those before and behind a softmax do is a choice of the plan, between forms of `attention`.
"""


@dataclass(frozen=True)
class Operand:
    """One side of a product: the terms of a sum that may not have been made, and the level of every entry.

    Attributes:
        dims: Logical shape.
        dtype: Element type.
        terms: Codes, each of the whole shape.
        kinds: A key per entry: its level, and whether it is a product of a request-level with a candidate-level entry
            that was put off.
        whole: Whether its columns are not made for each matrix of a stack alone.
    """

    dims: Dims
    dtype: int
    terms: list[Codes]
    kinds: NDArray[np.int64]
    whole: bool = False

    def part(self, box: tuple[NDArray[np.int64], ...]) -> Operand:
        """Some matrices of the stack, with the keys of one, which are those of all."""
        lead = len(self.dims) - 2
        own = box[len(box) - lead :]
        at = np.ix_(*(p if n > 1 else p[:1] * 0 for p, n in zip(own, self.kinds.shape, strict=False)))
        kinds = self.kinds[at].reshape(-1, *self.kinds.shape[-2:])[0]
        terms = [t[at] for t in self.terms]
        return replace(self, dims=with_extents(self.dims, terms[0].shape), terms=terms, kinds=kinds)

    def level(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Level:
        """Level of a part that has one."""
        return Level(int(self.kinds[rows[0], columns[0]]) & 3)


def operand(rw: Rewrite, x: Value | Sum, unread: dict[int, NDArray[np.int64]]) -> Operand:
    """An operand by levels, of every matrix of its stack."""
    whole = _narrow(rw, x)
    x = rw.settle(x) if whole else x
    shape = extents(x.dims)
    terms = [np.broadcast_to(t.codes, shape) for t in rw.terms(x)]
    if unread:
        terms = [mark_unread(t, unread) for t in terms]
    kinds = rw.grouping.joint_levels(terms)
    if len(terms) == 1:
        kinds = kinds + 4 * (fold.is_open(rw, terms[0]) & (kinds == Level.CANDIDATE))
    return Operand(x.dims, x.dtype, terms, kinds, whole)


def _narrow(rw: Rewrite, x: Value | Sum) -> bool:
    """Whether a stack is heads so narrow that their columns, made one head at a time, take longer than all at once."""
    heads = prod(extents(x.dims)[:-2])
    found = [s for t in rw.terms(x) for s in rw.sources.of(t.codes) if s.offers(Selectable)]
    return heads > 1 and any(extents(s.dims)[-1] < heads * COLUMNS for s in found)


def _alike(left: Operand, right: Operand, stack: tuple[int, ...]) -> list[tuple[NDArray[np.int64], ...]] | None:
    """Parts of a stack in which all matrices have the same levels, as positions per axis; None if they are many."""
    keys = np.zeros(stack, np.int64)
    for x in (left, right):
        flat = x.kinds.reshape(-1, prod(x.kinds.shape[-2:]))
        _, found = np.unique(flat, axis=0, return_inverse=True)
        keys = keys * len(flat) + found.reshape(x.kinds.shape[:-2])
    return rectangles(keys, _MOST_HEADS)


def matmul(rw: Rewrite, node: NodeProto, rule: str = "dot", stacked: bool = False) -> list[Abstract] | None:
    """MatMul of two operands that are not constant."""
    a, b = (rw.unless_sum(rw.values[i]) for i in node.input)
    return multiply(rw, a, b, node.output[0], rule, node, stacked=stacked)


def multiply(
    rw: Rewrite,
    a: Value | Sum,
    b: Value | Sum,
    output: str,
    rule: str,
    node: NodeProto | None = None,
    unread: dict[int, NDArray[np.int64]] | None = None,
    stacked: bool = False,
) -> list[Abstract] | None:
    """The product of two computed operands, by blocks of one level each.

    Args:
        rw: The rewrite.
        a: The left operand, `[..., R, K]`.
        b: The right operand, `[..., K, C]`.
        output: The original tensor that it is, or belongs to.
        rule: Name of the rule, for the report.
        node: The original node, if that is a MatMul.
        unread: Positions read per axis of the product, if not all, where its axes are not those of `output`.
        stacked: Whether the matrices of a stack stay one product, and do not become one each.

    Returns:
        The product; None where it is left to another rule.
    """
    if a.rank < 2 or b.rank < 2 or Level.CONSTANT in (rw.level(a), rw.level(b)):
        return None
    if any(is_candidate_symbol(s) for s in symbols([a.dims[-1], b.dims[-2], b.dims[-1]])):
        return None
    dims = (*broadcast_dims([a.dims[:-2], b.dims[:-2]]), a.dims[-2], b.dims[-1])
    inner = symbols([a.dims[-1], b.dims[-2]])
    if inner:
        if a.dims[-1] != b.dims[-2]:
            raise Unrepresentable("an inner axis that is factored differently")
        a, b = rw.held(a, inner), rw.held(b, inner)
    unread = rw.needed.get(output, {}) if unread is None else unread
    if node is not None and not unread and all(isinstance(v, Value) and v.whole is not None for v in (a, b)):
        return [_product(rw, node, rw.settle(a), rw.settle(b), dims)]
    if a.dims[-1] == () and not unread and extents(a.dims)[-1] == extents(b.dims)[-2] == 1:
        return [elementwise(rw, "Mul", [rw.settle(a), rw.settle(b)], output)]
    split = split_merged(dims[:-2])
    if split != dims[:-2]:
        read = {len(split) + 2 - k: unread[len(dims) - k] for k in (1, 2) if len(dims) - k in unread}
        found = multiply(rw, _apart(a, dims), _apart(b, dims), output, rule, unread=read, stacked=stacked)
        return None if found is None else [rw.moved(found[0], dims, lambda codes: codes.reshape(extents(dims)))]
    places = [({v.rank - k: p} if (p := unread.get(len(dims) - k)) is not None else {}) for v, k in ((a, 2), (b, 1))]
    left, right = operand(rw, a, places[0]), operand(rw, b, places[1])
    boxes = _alike(left, right, extents(dims[:-2]))
    if boxes is None:
        rw.refuse(rule, "the matrices of a stack differ in their levels in a way that follows no axis")
        return None
    shapes = [with_extents(dims, (*map(len, box), *extents(dims[-2:]))) for box in boxes]
    how = _How(rw, output, rule, stacked)
    parts = [_Blocks(how, left.part(box), right.part(box), own) for box, own in zip(boxes, shapes, strict=True)]
    # Queries of several levels on request-level keys: rows that are request-level stay so behind any softmax.
    once = any(rw.level(v) <= Level.REQUEST for v in (a, b))
    if not once and any(len(p.rows) * len(p.columns) > 1 for p in parts) and not _stays_apart(rw, output):
        rw.refuse(rule, "what reads the product needs its blocks side by side again")
        return None
    return [parts[0].made() if len(parts) == 1 else _in_stack(rw, boxes, [p.made() for p in parts], dims)]


def _in_stack(
    rw: Rewrite, boxes: Sequence[tuple[NDArray[np.int64], ...]], made: Sequence[Abstract], dims: Dims
) -> Abstract:
    """The product of a stack, of those of its parts."""
    dtype = made[0].dtype
    terms: list[Codes] = []
    for box, part in zip(boxes, made, strict=True):
        for slot, term in enumerate(rw.terms(part)):
            if slot == len(terms):
                terms.append(np.full(extents(dims), HOLE if slot == 0 else rw.zero(dtype)))
            terms[slot][np.ix_(*box)] = term.codes
    return rw.add([view(dims, dtype, t) for t in terms], dims, dtype)


def _apart(x: Value | Sum, dims: Dims) -> Value | Sum:
    """An operand with those dimensions of its stack apart that are merged in the product."""
    own = (*dims[:-2], (), ())
    if isinstance(x, Value):
        return as_split(x, own)
    terms = [as_split(t, own) for t in x.terms]
    return Sum(terms[0].dims, x.dtype, terms)


def alike(kinds: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Groups of rows with the same keys, in order of first appearance; without those that nobody reads."""
    _, first, inverse = np.unique(kinds, axis=0, return_index=True, return_inverse=True)
    found = [np.flatnonzero(inverse.reshape(-1) == k) for k in np.argsort(first)]
    return [at for at in found if (kinds[at[0]] != Level.UNREAD).all()]


def in_memory_order(codes: Codes, at: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Positions along an axis in the order in which their entries lie in memory, where any order will do."""
    first = np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1)[at, 0]
    return at[np.argsort(first, kind="stable")]


def _stays_apart(rw: Rewrite, name: str) -> bool:
    """Whether all that reads a tensor, behind data movement and elementwise steps, works block by block."""
    blockwise = _MOVES | _BLOCKWISE | ({"Softmax"} if rw.uses("attention") else set())

    def judge(node: NodeProto, _: str) -> bool | None:
        if operator(node) in _LINEAR or operator(node) == "Shape":
            return True
        return None if operator(node) in blockwise else False

    def join(tensor: str, answers: list[bool]) -> bool:
        return bool(answers) and tensor not in rw.outputs and all(answers)

    return rw.graph.behind(name, "apart", judge, join)


@dataclass(frozen=True)
class _How:
    """What a product is written for.

    Attributes:
        rw: The rewrite.
        output: The original tensor.
        rule: Name of the rule.
        stacked: Whether the matrices of a stack stay one product.
    """

    rw: Rewrite
    output: str
    rule: str
    stacked: bool


class _Blocks:
    """The blocks of one product.

    Args:
        how: What it is written for.
        left: Left operand.
        right: Right operand.
        dims: Logical shape of the product.

    Attributes:
        rows: Rows of the left operand that have the same levels.
        columns: The same for columns of the right one.
    """

    def __init__(self, how: _How, left: Operand, right: Operand, dims: Dims) -> None:
        self.how, self.rw, self.left, self.right, self.dims = how, how.rw, left, right, dims
        self.zero = how.rw.zero(left.dtype)
        self.rows = [in_memory_order(left.terms[0], at, -2) for at in alike(left.kinds)]
        self.columns = [in_memory_order(right.terms[0], at, -1) for at in alike(right.kinds.T)]
        same = len(left.terms) == len(right.terms) == 1 and left.terms[0].shape == right.terms[0].swapaxes(-1, -2).shape
        self.mirrored = same and np.array_equal(left.terms[0], right.terms[0].swapaxes(-1, -2))

    def made(self) -> Abstract:
        """All blocks; where the inner axis holds several levels, the sum of one product for each."""
        terms: list[Codes] = []
        for i in self.rows:
            for j in self.columns:
                parts = self._inner(i, j)
                whole = len(parts) == 1
                if whole and self.mirrored and self.left.kinds[i[0], 0] < self.left.kinds[j[0], 0]:
                    continue
                for slot, part in enumerate(parts):
                    if slot == len(terms):
                        terms.append(np.full(extents(self.dims), HOLE if slot == 0 else self.zero))
                    made = self._block(i, j, part)
                    terms[slot][..., i[:, None], j] = made
                    if whole and self.mirrored and self.left.kinds[i[0], 0] > self.left.kinds[j[0], 0]:
                        terms[slot][..., j[:, None], i] = made.swapaxes(-1, -2)
        if len(terms) == 1:
            return self.rw.tidy(self.dims, self.left.dtype, terms[0])
        # Entries nobody reads have a hole in the first term; what is added to it does not matter.
        return self.rw.add([view(self.dims, self.left.dtype, t) for t in terms], self.dims, self.left.dtype)

    def _inner(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Positions along the inner axis by the levels of both operands; without those that hold 0 only."""
        keys = self.left.kinds[i[0]] * 64 + self.right.kinds[:, j[0]]
        for terms, at, axis in ((self.left.terms, i, -2), (self.right.terms, j, -1)):
            if len(terms) == 1:
                lines = np.moveaxis(terms[0].take(at, axis) == self.zero, -1 if axis == -2 else -2, -1)
                keys = np.where(lines.reshape(-1, lines.shape[-1]).all(0), -1, keys)
        if (keys < 0).all():
            keys[0] = 0
        found = [np.flatnonzero(keys == k) for k in dict.fromkeys(keys.tolist()) if k >= 0]
        return [in_memory_order(self.left.terms[0][..., i[:1], :], at, -1) for at in found]

    def _block(self, i: NDArray[np.int64], j: NDArray[np.int64], inner: NDArray[np.int64]) -> Codes:
        """The codes of one block's product over some inner positions, `[stack..., rows, columns]`."""
        rw = self.rw
        levels = self.left.level(i, inner), self.right.level(inner, j)
        own = with_extents(self.dims, (*extents(self.dims[:-2]), len(i), len(j)))
        out = np.full(extents(own), HOLE)
        low = max(levels) <= Level.REQUEST
        stack = extents(own[:-2])
        each_head = 1 < prod(stack) <= _MOST_HEADS and not low and not self.how.stacked
        # One row per candidate: heads side by side cost less than a product for each.
        each_head = each_head and max(len(i) if levels[0] == Level.CANDIDATE else 1,
                                      len(j) if levels[1] == Level.CANDIDATE else 1) > 1  # fmt: skip
        places: list[tuple[int, ...]] = list(np.ndindex(*stack)) if each_head else [()]
        for at in places:
            a, b = self._part(self.left, at, i, inner), self._part(self.right, at, inner, j)
            cut = with_extents(own, ((1,) * len(stack) if each_head else stack) + extents(own[-2:]))
            with rw.emit.under(self.how.rule if low or levels[0] != levels[1] else None):
                made = self._put_off(a, b, cut) or _product(rw, None, a, b, cut, self.how.output)
            wide = np.broadcast_to(made.codes, extents(cut))
            out[at or ...] = wide.reshape(wide.shape[-2:]) if at else wide
        return out

    def _part(self, x: Operand, head: tuple[int, ...], i: NDArray[np.int64], j: NDArray[np.int64]) -> Value:
        """Some rows and columns of an operand, of one matrix of the stack if `head` says which."""
        rw = self.rw
        terms: list[Value] = []
        shape: tuple[int, ...] = ()
        for t in x.terms:
            lead = t.shape[:-2]
            if head:
                mine = head[len(head) - len(lead) :]
                t = t[tuple(p if n > 1 else 0 for p, n in zip(mine, lead, strict=True))]
                t = t.reshape((1,) * len(lead) + t.shape)
            part = t[..., i[:, None], j]
            shape = part.shape
            if (part != self.zero).any():
                part = rw.grouping.narrowed(part) if head and not x.whole else part
                terms.append(view(with_extents(x.dims, shape), x.dtype, part))
        dims = with_extents(x.dims, shape)
        if not terms:
            return view(dims, x.dtype, np.full(shape, self.zero))
        codes = rw.settle(rw.add(terms, dims, x.dtype)).codes if len(terms) > 1 else terms[0].codes
        codes = cut_repeats(codes, range(len(dims) - 2))
        return Value(with_extents(dims, codes.shape), x.dtype, None, codes)

    def _put_off(self, a: Value, b: Value, dims: Dims) -> Value | None:
        """`(t * e) b` for a factor `t` per candidate and row: `t * (e b)`, the bracket once per request."""
        rw = self.rw
        if not fold.is_open(rw, a.codes).all() or rw.level(b) > Level.REQUEST:
            return None
        factors, by = fold.expand(rw, a.codes)
        if by.shape[-1] != 1 or not (by == by[..., :1, :]).all():
            return None
        inner = symbols([a.dims[-1]])
        if not rw.sources.symbols(by).isdisjoint(inner):
            return None
        left = rw.held(view(a.dims, a.dtype, factors[..., 0]), inner)
        pooled = _product(rw, None, left, b, dims, self.how.output)
        scale = view((*a.dims[:-1], ()), a.dtype, by[..., :1, 0])
        return elementwise(rw, "Mul", [scale, pooled], rw.emit.fresh(f"{self.how.output}/mul"))


def _product(rw: Rewrite, node: NodeProto | None, a: Value, b: Value, dims: Dims, hint: str = "") -> Value:
    """One product; the candidates are rows of one matrix where the other operand has none."""
    a_rows, b_rows = ({s for s in rw.present(v) if is_candidate_symbol(s)} for v in (a, b))
    hint = hint or (node.output[0] if node else "")
    if a_rows and not b_rows and (node is None or extents(a.dims)[-2] <= _FEW_ROWS):
        return _as_rows(rw, a, b, dims, hint)
    if b_rows and not a_rows and (node is None or extents(b.dims)[-1] <= _FEW_ROWS):
        turned = (*dims[:-2], dims[-1], dims[-2])
        made = _as_rows(rw, _turned(b), _turned(a), turned, hint)
        return rw.tidy(dims, made.dtype, made.codes.swapaxes(-1, -2))
    heads = prod(extents(dims[:-2]))
    if a_rows and b_rows and heads > 1 and dims[-2:] == ((), ()) and not symbols(a.dims[-1:]):
        return _dots(rw, a, b, dims, hint)
    held = rw.present(a) | rw.present(b)
    whole = dims
    if node is None:
        a, b, dims = _fewer(a, b, dims, held)
    full = [v.rank > 2 and not batches_agree(rw, v, v.dims[:-2], held) for v in (a, b)]
    if a_rows and not b_rows and all(d == () for d in keep_symbols(b.dims, rw.present(b))[:-2]):
        # One matrix for all rows.
        b = Value(b.dims[-2:], b.dtype, None, b.codes.reshape(b.codes.shape[-2:]))
        full[1] = False

    left, right = (_Operand(rw, v, held if wide else None) for v, wide in zip((a, b), full, strict=True))
    if node is not None:
        (kept,) = rw.keep(node, [left.write(), right.write()], [dims], held)
        return rw.settle(kept)
    shapes = [keep_symbols(v.dims, held if wide else rw.present(v)) for v, wide in zip((a, b), full, strict=True)]
    own = (*broadcast_dims([s[:-2] for s in shapes]), shapes[0][-2], shapes[1][-1])
    kind = _ScalableBlock if rw.level(b) <= Level.REQUEST else _Block
    source = kind(rw, own, a.dtype, left, right, hint, rw.emit.rule).source()
    return Value(whole, a.dtype, None, np.broadcast_to(codes_of(source), extents(dims)).reshape(extents(whole)))


def _dots(rw: Rewrite, a: Value, b: Value, dims: Dims, hint: str) -> Value:
    """A row by a column for every candidate and head: entry by entry, which takes runtimes a tenth of the time."""
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
    """

    rw: Rewrite
    value: Value
    held: set[str] | None

    def write(self) -> str:
        """Writes it."""
        rw, value = self.rw, self.value
        name = rw.tensor(value) if self.held is None else rw.rows_along(value, self.held)
        if rw.emit.op_of.get(name) != "Transpose" or not symbols(value.dims[-2:]):
            return name
        # A length may be 0: of no entries, a product into which onnxruntime takes a Transpose gives what lay in memory.
        held = rw.present(value) if self.held is None else self.held
        return rw.layout.written_anew(name, keep_symbols(value.dims, held))


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


RULE = Rule(
    name="dot",
    title="Divides products of features with features into blocks of one level each.",
    identity="[U; C] [U; C]' = [[U U', (C U')'], [C U', C C']]",
    source="rank-aware decomposition (arXiv 2605.27450)",
    legal="Rows of the left and columns of the right operand have one level each.",
    refuses="Operands whose inner axis holds several levels.",
    exactness="reassociates",
    operators={"MatMul": matmul},
)
