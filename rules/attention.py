"""`attention`: softmax over keys of which some are request-level.

A query's scores over the request-level keys, `a`, join those over the candidate-level keys, `b`, as one more key that
stands for all of them (online softmax). With `l = log sum exp a`,

    softmax(a ++ b) = t softmax(a) ++ q    where    q ++ t = softmax((b - l) ++ 0)

and behind the softmax `t (softmax(a) V_a) + q V_b`: for a request-level query the bracket is made once per request, for
all keys. Where a mask may have been added, all scores of a row can be so low that `l` loses `log sum exp`; then the sum
is kept apart: with `m = max a` and `s = sum exp(a - m)`, `q ++ t = softmax(b ++ m)` is weighted afterwards, by
`1 / (1 + (s - 1) t)`, and `s` times that.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.graphs import attribute
from onnxrank.operators import Trait, operator, traits
from onnxrank.rewrite import MOVES, Rewrite
from onnxrank.rule import Rule, Transfer
from onnxrank.values import (
    HOLE,
    Abstract,
    Codes,
    Dims,
    Level,
    OpenProduct,
    Scalable,
    Sum,
    Value,
    codes_of,
    cut_repeats,
    extended,
    extents,
    keep_symbols,
    offsets,
    rectangles,
    source_numbers,
    split_merged,
    symbols,
    view,
    with_extents,
)

from . import dot
from .broadcast import note_fused
from .elementwise import elementwise, mark_unread

_MOVES = MOVES | {"Split", "Gather"}
_STEPS = Trait.SCALING | Trait.ADDITIVE | Trait.CHOICE | Trait.CAST
"""What scales and masks scores, beside dropout."""
_MOST_BOXES = 32
"""Parts at most that queries are divided into: a bound on the size of the result."""
_MASKED = 3
"""Beside the levels: a score that gets weight 0."""


def matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """The products before and behind a softmax."""
    return _matmul(rw, node, stacked=False)


def stacked_matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """The same with all heads in one product, which costs more moves and fewer launches."""
    return _matmul(rw, node, stacked=True)


def _matmul(rw: Rewrite, node: NodeProto, stacked: bool) -> list[Abstract] | None:
    if not (reaches_softmax(rw, node.output[0]) or _is_softmax(rw, node.input[0])):
        return None
    return dot.matmul(rw, node, "attention", stacked)


def reaches_softmax(rw: Rewrite, name: str, steps: int = 8) -> bool:
    """Whether what reads a tensor, behind scaling, masks and data movement, is a softmax."""

    def judge(node: NodeProto, _: str) -> int | None:
        if operator(node) == "Softmax":
            return 0
        passed = operator(node) in _MOVES | {"Dropout"} or traits(node) & _STEPS
        return None if passed else steps

    # The answers are numbers of steps.
    return rw.graph.behind(name, ("softmax", steps), judge, lambda _, answers: 1 + min(answers, default=steps)) <= steps


def _is_softmax(rw: Rewrite, name: str) -> bool:
    """Whether a tensor is, behind data movement, the result of a softmax."""
    while (made := rw.producers.get(name)) is not None:
        if operator(made) == "Softmax":
            return True
        if operator(made) not in _MOVES | {"Dropout", "Cast"}:
            return False
        name = made.input[0]
    return False


def _is_plain(rw: Rewrite, name: str) -> bool:
    """Whether scores are products, perhaps scaled: then none of them stands for a key that is masked."""
    made = rw.producers.get(name)
    while made is not None:
        if operator(made) in ("MatMul", "Einsum"):
            return True
        scaled = operator(made) in ("Mul", "Div") and any(rw.array(made, k) is not None for k in (0, 1))
        if not scaled and operator(made) not in _MOVES | {"Cast"}:
            return False
        made = rw.producers.get(made.input[0])
    return False


def scaled(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Queries, keys or scores times a number: taken into a product that is not written yet."""
    places = [k for k in (1, 0) if (v := rw.array(node, k)) is not None and v.size == 1]
    if not places or (operator(node) == "Div" and places[0] == 0) or len(rw.readers(node.input[1 - places[0]])) > 1:
        return None
    x = rw.operand(node, 1 - places[0])
    number = rw.array(node, places[0])
    if not isinstance(x, Value | Sum) or number is None or number.ndim > x.rank or number.dtype.kind in "iu":
        return None
    # The tensor, not its data: what the model computes is rounded in these.
    factor = rw.value(node, places[0])
    terms, unread = rw.terms(x), rw.needed.get(node.output[0])
    if unread:
        terms = [view(t.dims, t.dtype, mark_unread(t.codes, unread)) for t in terms]
    moving = [s for t in terms for s in rw.sources.of(t.codes) if s.level is Level.CANDIDATE]
    if not any(s.offers(Scalable) for s in moving):
        return None
    if not (reaches_softmax(rw, node.output[0]) or _leads_to_product(rw, node.output[0])):
        return None
    return [rw.add([_times(rw, node, t, factor, 1 - places[0]) for t in terms], x.dims, x.dtype)]


def _leads_to_product(rw: Rewrite, name: str) -> bool:
    """Whether, behind data movement, only products with computed operands read a tensor."""

    def judge(node: NodeProto, _: str) -> bool | None:
        if operator(node) == "Shape" or (operator(node) == "MatMul" and rw.computed(node)):
            return True
        return None if operator(node) in _MOVES | {"Add"} else False

    return rw.graph.behind(name, "product", judge, lambda _, answers: bool(answers) and all(answers))


def _times(rw: Rewrite, node: NodeProto, x: Value, factor: Value, place: int) -> Value:
    """A term times (or divided by) a number: products that are not written yet get it in their weights."""
    out, name = x.codes.copy(), rw.layout.reshape(rw.tensor(factor), factor.dims, ())
    zero = rw.zero(x.dtype)
    numbers = source_numbers(x.codes)
    done = (x.codes == zero) | (x.codes == HOLE)
    for s in rw.sources.of(x.codes):
        if product := s.offers(Scalable):
            at = numbers == s.number
            out[at] = codes_of(product.scale(name, operator(node) == "Mul")).reshape(-1)[offsets(x.codes[at])]
            done |= at
    if not done.all():
        left = view(x.dims, x.dtype, np.where(done, HOLE, x.codes))
        operands = [left, factor]
        made = elementwise(rw, operator(node), operands if place == 0 else operands[::-1], node.output[0])
        out = np.where(done, out, made.codes)
    return rw.tidy(x.dims, x.dtype, out)


def softmax(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Softmax of scores of several levels."""
    return joined(rw, node, None, "attention")


def joined(rw: Rewrite, node: NodeProto, masked: NDArray[np.bool_] | None, rule: str) -> list[Abstract] | None:
    """Softmax row by row, each kind of row in its own way.

    Args:
        rw: The rewrite.
        node: The Softmax.
        masked: Scores that are known to get weight 0 in their rows; the others of a row then do.
        rule: Name of the rule, for the report.
    """
    x = rw.value(node, 0)
    axis = attribute(node, "axis", -1 if rw.emit.opset >= 13 else 1) % x.rank
    if symbols(x.dims[axis : axis + 1]) or (masked is None and x.whole is not None):
        return None
    if rw.emit.opset < 13 and any(d != () for d in x.dims[axis + 1 :]):
        return None  # it was over all axes from this one on
    unread = {a: p for a, p in rw.needed.get(node.output[0], {}).items() if a != axis}
    codes = mark_unread(x.codes, unread) if unread else x.codes
    codes, all_dims = np.moveaxis(codes, axis, -1), (*x.dims[:axis], *x.dims[axis + 1 :], x.dims[axis])
    masked = None if masked is None else np.moveaxis(masked, axis, -1)
    levels = rw.sources.levels(codes).astype(np.int64)
    if masked is not None:
        levels = np.where(masked & (levels != Level.UNREAD), _MASKED, levels)
    lines, inverse = np.unique(levels.reshape(-1, codes.shape[-1]), axis=0, return_inverse=True)
    kinds = inverse.reshape(codes.shape[:-1])
    unseen = np.flatnonzero((lines == Level.UNREAD).any(-1))
    found = rectangles(np.where(np.isin(kinds, unseen), -1, kinds), _MOST_BOXES)
    if found is None:
        rw.refuse(rule, "the keys that are request-level differ from query to query")
        return None
    out = np.full(codes.shape, HOLE)
    maker = _Softmax(rw, node, rule)
    for box in found:
        line = lines[kinds[np.ix_(*box)].flat[0]]
        if (line == Level.UNREAD).any():
            continue
        orders = rw.grouping.memory_order([codes[np.ix_(*box, np.arange(codes.shape[-1]))]])
        box = tuple(at[orders[k]] if k in orders else at for k, at in enumerate(box))
        rows = codes[np.ix_(*box, np.arange(codes.shape[-1]))]
        dims = with_extents(all_dims, rows.shape)
        once, each = np.flatnonzero(line <= Level.REQUEST), np.flatnonzero(line == Level.CANDIDATE)
        once, each = dot.in_memory_order(rows, once, -1), dot.in_memory_order(rows, each, -1)
        made = np.full(rows.shape, rw.zero(x.dtype))
        if len(once) > 1 and len(each):
            made[..., once], made[..., each] = maker.merged(rows[..., once], rows[..., each], dims)
        else:
            seen = np.concatenate([once, each])
            made[..., seen] = maker.plain(rows[..., seen], with_extents(dims, (*rows.shape[:-1], len(seen))))
        out[np.ix_(*box, np.arange(codes.shape[-1]))] = made
    return [rw.tidy(x.dims, rw.dtype(node.output[0], x.dtype), np.moveaxis(out, -1, axis))]


def fused(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A fused operator whose operands hold several levels is noted: written out as its steps it could be divided."""
    note_fused(rw, node, range(1 if operator(node) == "com.microsoft::Attention" else 3))
    return None


class _Softmax:
    """Writes the softmax of one node.

    Args:
        rw: The rewrite.
        node: The Softmax.
        rule: Name of the rule.
    """

    def __init__(self, rw: Rewrite, node: NodeProto, rule: str) -> None:
        self.rw, self.rule = rw, rule
        self.plain_scores = _is_plain(rw, node.input[0])
        self.dtype = rw.dtype(node.output[0], rw.value(node, 0).dtype)

    def plain(self, codes: Codes, dims: Dims) -> Codes:
        """Softmax over the last axis of rows that are not divided."""
        out = np.empty(codes.shape, np.int64)
        for box in self.rw.grouping.boxes([codes], rows=True):
            part = codes[box]
            made = self._softmax(part, with_extents(dims, part.shape))
            out[box] = np.broadcast_to(made, part.shape)
        return out

    def _softmax(self, codes: Codes, dims: Dims) -> Codes:
        rw = self.rw
        small = cut_repeats(codes, range(codes.ndim - 1))
        own = with_extents(dims, small.shape)
        shape, keep = small.shape, extended(own, rw.sources.symbols(small))
        small, own = small.reshape([shape[k] for k in keep]), tuple(own[k] for k in keep)
        order = rw.layout.native_order(small, own)
        if order is None or order[-1] != len(own) - 1:
            order = list(range(len(own)))
        lowered = rw.sources.levels(small).max() <= Level.REQUEST
        with rw.emit.under(self.rule if lowered else None):
            name, physical = rw.layout.realise(small.transpose(order), tuple(own[k] for k in order))
            made = rw.emit.add("Softmax", [name], {"axis": len(physical) - 1})
        source = rw.sources.add(physical, self.dtype, made, part=True)
        return codes_of(source).transpose(np.argsort(order)).reshape(shape)

    def merged(self, once: Codes, each: Codes, dims: Dims) -> tuple[Codes, Codes]:
        """Softmax over request-level scores `[rows..., A]` and candidate-level scores `[rows..., B]` together."""
        rw, emit = self.rw, self.rw.emit
        kind = rw.constant_type(self.dtype)
        small = cut_repeats(once, range(once.ndim - 1))
        own = with_extents(dims, small.shape)
        with emit.under(self.rule):
            scores, physical = rw.layout.realise(small, own)
            last, row = len(physical) - 1, (*physical[:-1], ())
            top = emit.reduce("ReduceMax", scores, [last], True)
            # All keys of a row may be at minus infinity.
            least = np.array(float(ml_dtypes.finfo(kind).min), kind)  # type: ignore[no-untyped-call]
            floor = top if self.plain_scores else emit.add("Max", [top, emit.constant(least)])
            weights = emit.add("Exp", [emit.add("Sub", [scores, floor])])
            total = emit.reduce("ReduceSum", weights, [last], True)
            if self.plain_scores:
                weights = emit.add("Div", [weights, total])
                added = emit.add("Neg", [emit.add("Add", [top, emit.add("Log", [total])])])
            else:
                added = top
        shared = np.broadcast_to(codes_of(rw.sources.add(physical, self.dtype, weights)), once.shape)
        ahead = np.broadcast_to(codes_of(rw.sources.add(row, self.dtype, added)), (*once.shape[:-1], 1))
        sums = np.broadcast_to(codes_of(rw.sources.add(row, self.dtype, total)), (*once.shape[:-1], 1))
        factor, out = np.empty((*each.shape[:-1], 1), np.int64), np.empty(each.shape, np.int64)
        for box in rw.grouping.boxes([each], rows=True):
            part = each[box]
            at = with_extents(dims, part.shape)
            out[box], factor[box] = (self._relative if self.plain_scores else self._weighted)(
                part, at, ahead[box], sums[box]
            )
        return self._spread(factor, shared, with_extents(dims, once.shape)), out

    def _relative(self, part: Codes, dims: Dims, ahead: Codes, sums: Codes) -> tuple[Codes, Codes]:
        """`softmax((b - l) ++ 0)`, given `-l`."""
        rw = self.rw
        terms = [view(dims, self.dtype, np.broadcast_to(c, extents(dims))) for c in (part, ahead)]
        relative = rw.settle(rw.add(terms, dims, self.dtype)).codes
        zeros = np.full((*part.shape[:-1], 1), rw.zero(self.dtype))
        made = self._joint(relative, zeros, dims)
        return made[..., :-1], made[..., -1:]

    def _joint(self, scores: Codes, other: Codes, dims: Dims) -> Codes:
        both = np.concatenate([scores, other], -1)
        return np.broadcast_to(self._softmax(both, with_extents(dims, both.shape)), both.shape)

    def _weighted(self, part: Codes, dims: Dims, ahead: Codes, sums: Codes) -> tuple[Codes, Codes]:
        """`softmax(b ++ m)`, of which `m` counts `s` times."""
        rw, name = self.rw, self.rw.emit.hint
        made = self._joint(part, ahead, dims)
        row = with_extents(dims, (*part.shape[:-1], 1))

        def step(op: str, a: Codes, b: Codes, own: Dims) -> Codes:
            values = [view(with_extents(own, c.shape), self.dtype, c) for c in (a, b)]
            return elementwise(rw, op, values, rw.emit.fresh(f"{name}/{op.lower()}")).codes

        one = np.full((1,) * part.ndim, rw.one(self.dtype))
        more = step("Sub", sums, one, row)
        held = step("Mul", more, made[..., -1:], row)
        norm = step("Add", held, one, row)
        return step("Div", made[..., :-1], norm, dims), step("Div", made[..., -1:], norm, row)

    def _spread(self, factor: Codes, shared: Codes, dims: Dims) -> Codes:
        """The weights of the request-level keys, as products that somebody may want to have made."""
        rw = self.rw
        held = rw.sources.symbols(factor) | rw.sources.symbols(shared)

        made = _SharedWeights(rw, dims, factor, shared)
        return codes_of(rw.defer(keep_symbols(dims, held), self.dtype, made, None, part=True))


@dataclass(eq=False)
class _SharedWeights(OpenProduct):
    """Weights of keys that are the request's: what one candidate gives all of them, times what they share of it.

    Attributes:
        rw: The rewrite.
        dims: Logical shape.
        factor: Per query, what all of them have.
        shared: Their own weights among each other.
    """

    rw: Rewrite
    dims: Dims
    factor: Codes
    shared: Codes

    def materialise(self) -> str:
        # What lacks a factor of a merged dimension only broadcasts where it stands alone.
        rw, split = self.rw, split_merged(self.dims)
        lead = extents(split)[:-1]
        each, once = (np.broadcast_to(c, (*self.shared.shape[:-1], c.shape[-1])) for c in (self.factor, self.shared))
        parts = each.reshape(*lead, -1), cut_repeats(once.reshape(*lead, -1), range(len(lead)))
        name = rw.emit.add("Mul", [rw.layout.realise(c, with_extents(split, c.shape))[0] for c in parts])
        held = {s for c in parts for s in rw.sources.symbols(c)}
        return rw.layout.reshape(name, keep_symbols(split, held), keep_symbols(self.dims, held))

    def factors(self) -> tuple[Codes, Codes]:
        return self.shared[..., None], np.broadcast_to(self.factor, self.shared.shape)[..., None]


_OPERATORS: dict[str, Transfer] = {
    "Softmax": softmax,
    "MatMul": matmul,
    "Mul": scaled,
    "Div": scaled,
    "Attention": fused,
    "com.microsoft::Attention": fused,
    "com.microsoft::MultiHeadAttention": fused,
}

RULE = Rule(
    name="attention",
    title="Divides attention by the levels of queries and keys; request-level keys join each softmax as one.",
    identity="softmax(a ++ b) = t softmax(a) ++ q where q ++ t = softmax((b - log sum exp a) ++ 0)",
    source="rank-aware decomposition (arXiv 2605.27450); online softmax (Milakov, Gimelshein 2018)",
    legal="The softmax is over one axis, and the same keys are request-level for all queries of a kind.",
    refuses="Scores whose levels follow no rows and columns; fused operators with a cache, a cap or a computed mask.",
    exactness="reassociates",
    operators=_OPERATORS,
    forms=({**_OPERATORS, "MatMul": stacked_matmul},),
    cost="Products of request-level queries with request-level keys and values are made once, and pairs of the two "
    "levels have the candidates as rows of one matrix. Heads become products of their own, or stay one, whichever is "
    "predicted to be faster, and each softmax has one more key.",
)
