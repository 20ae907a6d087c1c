"""`dot`: products of two computed operands by blocks of levels.

For a dot interaction `X X'` with request-level rows `U` and candidate-level rows `C`,

    X X' = [[U U', U C'], [C U', C C']]

`U U'` is made once per request, `C U'` is one matrix product with candidates as rows, and `U C'` is its transpose. What
is selected of the result, a triangle say, folds into the weights of the layer that follows.

Where the right side is the request's, factors along the inner axis go there: `(A diag(s)) V = A (diag(s) V)`, and what
is added to all rows alike: `q K' + b = [q 1] [K b]'`. That is done by `onnxrank.factors` and `onnxrank.keys`, once all
nodes are written.
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
    Dims,
    Level,
    Selectable,
    Sum,
    Unrepresentable,
    Value,
    broadcast_dims,
    cut_repeats,
    extents,
    is_candidate_symbol,
    rectangles,
    split_merged,
    symbols,
    view,
    with_extents,
)

from . import bilinear, fold
from .broadcast import ELEMENTWISE
from .elementwise import as_split, elementwise, mark_unread

_MOVES = frozenset(having(Trait.MOVEMENT))
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
        return [bilinear.product(rw, node, rw.settle(a), rw.settle(b), dims)]
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
                made = self._put_off(a, b, cut) or bilinear.product(rw, None, a, b, cut, self.how.output)
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
        pooled = bilinear.product(rw, None, left, b, dims, self.how.output)
        scale = view((*a.dims[:-1], ()), a.dtype, by[..., :1, 0])
        return elementwise(rw, "Mul", [scale, pooled], rw.emit.fresh(f"{self.how.output}/mul"))


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
