"""What operators do to tensors in segments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import inf
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from onnxrank import extents as ex
from onnxrank.extents import Expr
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, having, operator, traits
from onnxrank.segments import spans
from onnxrank.segments.division import Division, Index, Left, Part, Sizes, Tensor, indices, total
from onnxrank.segments.spans import BOOLEAN, UNKNOWN, ZERO, Known, Size, Span

_FIRST = frozenset({"CastLike", "Clip", "Dropout"})
"""Elementwise operators whose further operands are numbers, or give a type."""
_COMPARED = frozenset(having(Trait.COMPARISON))
_ELEMENTWISE = frozenset(having(Trait.ELEMENTWISE))
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization"})
_REDUCED = frozenset({"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"})
_EXACT_FLOATS = frozenset({int(TensorProto.FLOAT), int(TensorProto.DOUBLE)})
"""Types in which positions are what they are."""
_FLOATS = _EXACT_FLOATS | {int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)}
_END = (1 << 31) - 1
"""Ends of slices from here on are the end of the axis."""


# --- elementwise -----------------------------------------------------------------------------------------------------


def elementwise(d: Division, node: NodeProto) -> Tensor:
    """Operators that treat entries independently, with broadcasting."""
    if operator(node) in _FIRST:
        others = d.rest(node)
        x = d.tensor(node.input[0])
        return d.copies(node, x.cuts, lambda i: [d.name(x, i), *others], lambda i: x.parts[i].candidate)
    given = [None if t is None else _opened(d, name, t) for name, t in zip(node.input, d.operands(node), strict=True)]
    sizes = d.sizes(node.output[0])
    cuts: list[Sizes] = [(n,) for n in sizes]
    for t in given:
        for k, c in enumerate(t.cuts if t else (), len(sizes) - (t.rank if t else 0)):
            if len(c) > 1 and len(cuts[k]) > 1 and cuts[k] != c:
                raise Left
            cuts[k] = c if len(c) > 1 else cuts[k]
    operands = [None if t is None else _fitted(d, name, t, cuts) for name, t in zip(node.input, given, strict=True)]
    held = [t for t in operands if t is not None]
    made = d.copies(
        node,
        cuts,
        lambda i: ["" if t is None else d.name(t, t.own(i)) for t in operands],
        lambda i: any(t.at(i).candidate for t in held),
        lambda i: _entries(node, [t.at(i) for t in held], [c[k] for c, k in zip(cuts, i, strict=True)][::-1]),
    )
    return _picked(operands, made) if operator(node) == "Where" else made


def _opened(d: Division, name: str, tensor: Tensor) -> Tensor:
    """A constant of queries and keys, such as a causal mask, cut along both; other operands as they are."""
    if is_mask(d, name):
        for k, n in enumerate(tensor.sizes):
            if n in d.totals:
                tensor = d.cut(name, tensor, k, d.totals[n])
    return tensor


def is_mask(d: Division, name: str) -> bool:
    """Whether a tensor is a constant with two axes as long as a sequence."""
    data = d.data(name)
    return data is not None and sum(n in d.totals for n in data.shape) > 1


def _fitted(d: Division, name: str, tensor: Tensor, cuts: Sequence[Sizes]) -> Tensor:
    """An operand, cut where the result is, unless it is broadcast there."""
    for k, want in enumerate(cuts[len(cuts) - tensor.rank :]):
        own = tensor.cuts[k]
        if len(want) > 1 and len(own) == 1 and own != (1,):
            if own[0] != total(want) and not ex.is_cut_of(own[0], total(want)):
                raise Left
            tensor = d.cut(name, tensor, k, want)
    return tensor


def _picked(given: Sequence[Tensor | None], made: Tensor) -> Tensor:
    """With segments of Where whose condition is known as the operand that is taken."""
    when, *branches = given
    parts = dict(made.parts)
    for i in parts:
        sure = when.at(i).known.all.number if when is not None else None
        taken = None if sure is None else branches[0 if sure else 1]
        if taken is not None and taken.sizes_of(taken.own(i)) == made.sizes_of(i):
            parts[i] = replace(taken.at(i), score=parts[i].score)
    return replace(made, parts=parts)


def _entries(node: NodeProto, parts: Sequence[Part], sizes: Sequence[Size]) -> tuple[Known, Known | None]:
    """What is known of a segment of an elementwise result, and of what it adds to scores."""
    known = _known(node, [p.known for p in parts], sizes)
    scored = [k for k, p in enumerate(parts) if p.score is not None]
    if len(scored) != 1:
        return known, None
    score = parts[scored[0]].score
    assert score is not None
    return known, _score(node, parts, scored[0], score)


def _score(node: NodeProto, parts: Sequence[Part], k: int, score: Known) -> Known | None:
    """What is added to scores that are the k-th operand; None where the result is no such sum."""
    op, others = operator(node), [p.known for j, p in enumerate(parts) if j != k]
    if op in ("Add", "Sum"):
        for other in others:
            score = score.map(Span.__add__, other)
        return score
    if op == "Sub" and k == 0:
        return score.map(lambda a, b: a + -b, others[0])
    if op in ("Mul", "Div") and (op == "Mul" or k == 0):
        number = others[0].all.number
        if number is not None and 0 < number < inf:
            factor = number if op == "Mul" else 1 / number
            return score.map(lambda a: a.times(factor))
        return None
    if op == "Where" and k > 0:
        return parts[0].known.map(Span.chosen, *(score if j == k else parts[j].known for j in (1, 2)))
    if op == "Identity" or (op == "Cast" and attribute(node, "to") in _FLOATS):
        return score
    return None


def _known(node: NodeProto, x: Sequence[Known], sizes: Sequence[Size]) -> Known:
    """What an elementwise operator makes of what is known of its operands."""
    op = operator(node)
    if op in _COMPARED:
        return spans.compared(op, x[0], x[1], sizes)
    if op == "Cast":
        return _cast(attribute(node, "to"), x[0])
    if op == "Mul":
        return _product(x)
    if op == "IsNaN":
        return x[0].map(lambda a: Span(0, 0) if a.number is not None else spans.TRUTH)
    if op == "Clip":
        return _clipped(node, x)
    if op in _SPANS:
        return x[0].map(_SPANS[op], *x[1:])
    return BOOLEAN if Trait.BOOLEAN in traits(node) else UNKNOWN


def note(d: Division, node: NodeProto) -> None:
    """Notes what is known of the result of a node that is left as it is, wherever its entries are."""
    op, outputs = operator(node), [o for o in node.output if o]
    if len(outputs) != 1 or not node.input:
        return
    if op == "Concat":
        first, *others = (_flat(d.known(i).all) for i in node.input)
        d.seen[outputs[0]] = reduce(Span.hull, others, first)
    elif Trait.MOVEMENT in traits(node):
        d.seen[outputs[0]] = _flat(d.known(node.input[0]).all)
    elif op in _COMPARED or op in _SPANS or op in ("Cast", "Clip", "Mul"):
        x = [spans.of(_flat(d.known(i).all)) for i in node.input if i]
        d.seen[outputs[0]] = _flat(_known(node, x, []).all)


def _flat(span: Span) -> Span:
    """What holds wherever an entry is."""
    return span if span.fixed else spans.ANY


_SPANS: Mapping[str, Callable[..., Span]] = {
    "Identity": lambda a: a,
    "And": Span.both,
    "Or": Span.either,
    "Not": Span.inverted,
    "Where": Span.chosen,
    "Add": Span.__add__,
    "Sub": lambda a, b: a + -b,
    "Neg": Span.__neg__,
    "Max": lambda a, *more: reduce(Span.largest, more, a),
    "Min": lambda a, *more: reduce(Span.smallest, more, a),
}


def _clipped(node: NodeProto, x: Sequence[Known]) -> Known:
    """Entries cut at both ends, where those are operands."""
    ends = dict(zip([k for k, i in enumerate(node.input) if i], x, strict=False))
    if len(ends) < 2:
        return UNKNOWN
    made = x[0].map(Span.largest, ends[1]) if 1 in ends else x[0]
    return made.map(Span.smallest, ends[2]) if 2 in ends else made


def _cast(to: int, x: Known) -> Known:
    """Entries as another type."""
    if to == TensorProto.BOOL:
        return x.map(Span.truth)
    if to in _EXACT_FLOATS:
        return x
    return x.map(lambda a: a if to in _FLOATS and a.fixed else a.whole() if to not in _FLOATS else spans.ANY)


def _product(x: Sequence[Known]) -> Known:
    """Entries times a number; a mask of 0 hides what it is multiplied with, as a weight of 0 does in a product."""
    numbers = [k.all.number for k in x]
    if 0.0 in numbers:
        return ZERO if not any(n is not None and abs(n) == inf for n in numbers) else UNKNOWN
    factor, other = (numbers[0], x[1]) if numbers[0] is not None else (numbers[1], x[0])
    return UNKNOWN if factor is None else other.map(lambda a: a.times(factor))


# --- contractions ----------------------------------------------------------------------------------------------------

Labels = list[Any]


def mat_mul(d: Division, node: NodeProto) -> Tensor:
    """MatMul."""
    a, b = d.tensor(node.input[0]), d.tensor(node.input[1])
    if min(a.rank, b.rank) < 2:
        raise Left
    rank = max(a.rank, b.rank)
    stack = list(range(rank - 2))
    terms = [[*stack[rank - a.rank :], "rows", "inner"], [*stack[rank - b.rank :], "inner", "columns"]]
    return _contraction(d, node, [a, b], terms, [*stack, "rows", "columns"])


def einsum(d: Division, node: NodeProto) -> Tensor:
    """Einsum of two operands, each axis named once per operand."""
    text = attribute(node, "equation").decode().replace(" ", "")
    before, arrow, after = text.partition("->")
    terms = [list(t) for t in before.split(",")]
    if not arrow or len(terms) != 2 or "." in text or any(len(set(t)) < len(t) for t in terms):
        raise Left
    return _contraction(d, node, [d.tensor(i) for i in node.input], terms, list(after))


def _contraction(
    d: Division, node: NodeProto, operands: list[Tensor], terms: Sequence[Labels], result: Labels
) -> Tensor:
    """Products of segments, added up along an axis that is summed over.

    Args:
        d: The division.
        node: The product.
        operands: Both operands.
        terms: A label per axis of each.
        result: A label per axis of the result.
    """
    cut: dict[Any, Sizes] = {}
    for t, labels in zip(operands, terms, strict=True):
        for c, label in zip(t.cuts, labels, strict=True):
            cut[label] = max(cut.get(label, c), c, key=lambda s: (len(s), s != (1,)))
    for k, labels in enumerate(terms):
        for axis, label in enumerate(labels):
            if len(cut[label]) > 1 and operands[k].cuts[axis] != (1,):
                operands[k] = d.cut(node.input[k], operands[k], axis, cut[label])
    inner = [label for label in cut if label not in result and len(cut[label]) > 1]
    if len(inner) > 1:
        raise Left
    along = inner[0] if inner else None

    def pairs(i: Index) -> list[tuple[Index, Index]]:
        at = dict(zip(result, i, strict=True))
        found = []
        for k in range(len(cut[along]) if along is not None else 1):
            place = {**at, along: k}
            both = [
                tuple(place.get(label, 0) if len(c) > 1 else 0 for c, label in zip(t.cuts, labels, strict=True))
                for t, labels in zip(operands, terms, strict=True)
            ]
            found.append((both[0], both[1]))
        return found

    axis = terms[1].index(along) if along is not None else 0
    sizes = cut[along] if along is not None else ()
    cuts = [cut[label] for label in result]
    parts = {i: _added(d, node, operands[0], operands[1], i, pairs(i), axis, sizes) for i in indices(cuts)}
    return d.made(node.output[0], cuts, parts)


def _added(
    d: Division,
    node: NodeProto,
    a: Tensor,
    b: Tensor,
    i: Index,
    pairs: list[tuple[Index, Index]],
    axis: int,
    sizes: Sizes,
) -> Part:
    """A segment of a product.

    Args:
        d: The division.
        node: The product.
        a: Its first operand.
        b: Its second one.
        i: The segment.
        pairs: The segments of both operands whose products are added.
        axis: The axis of `b` that is summed over.
        sizes: Its segments' extents.
    """
    used = [k for k, (left, _) in enumerate(pairs) if a.parts[left].known.all.number != 0] or [0]
    candidate = any(a.parts[pairs[k][0]].candidate or b.parts[pairs[k][1]].candidate for k in used)
    joint = a.parts[pairs[used[0]][0]].joint
    terms: list[str] = []
    if joint is not None and any(isinstance(sizes[k], Expr) for k in used):
        # One product with all that is the same for all candidates, zeros for the rest: no axis without entries then.
        name, held = joint
        once = [k for k in held if not b.parts[pairs[k][1]].candidate]
        rows = [d.name(b, pairs[k][1]) if k in once else d.zeros(b, pairs[k][1]) for k in held]
        if once:
            terms.append(d.copy(node, [name, d.emit.add("Concat", rows, {"axis": axis})], i))
            used = [k for k in held if k not in once]
    for k in used:
        made = d.copy(node, [d.name(a, pairs[k][0]), d.name(b, pairs[k][1])], i)
        some = len(sizes) > 1 and isinstance(sizes[k], Expr) and len(used) > 1
        terms.append(_or_zero(d, made, sizes[k], a.dtype) if some else made)
    out = terms[0]
    for term in terms[1:]:
        out = d.emit.add("Add", [out, term])
    return Part(out, UNKNOWN, ZERO, candidate)


def _or_zero(d: Division, made: str, size: Size, dtype: int) -> str:
    """A product over an axis that may have no entries: some versions of onnxruntime give no zeros then."""
    some = d.emit.add("Greater", [d.scalar(size), d.emit.constant(np.array(0, np.int64))])
    return d.emit.add("Where", [some, made, d.zero(dtype)])


# --- weights, normalisations, sums -----------------------------------------------------------------------------------


def softmax(d: Division, node: NodeProto) -> Tensor:
    """Softmax: segments that a mask hides for sure get 0; the others are weighed together."""
    x = d.tensor(node.input[0])
    axis = attribute(node, "axis", -1 if d.opset >= 13 else 1) % x.rank
    if d.opset < 13 and axis != x.rank - 1:
        raise Left  # it goes over all axes from there on
    if len(x.cuts[axis]) == 1:
        return d.along(node, x, x.cuts, [])
    parts: dict[Index, Part] = {}
    for i in indices([*x.cuts[:axis], (0,), *x.cuts[axis + 1 :]]):
        row = [(*i[:axis], k, *i[axis + 1 :]) for k in range(len(x.cuts[axis]))]
        held = [k for k, j in enumerate(row) if not _hidden(x, j, axis)] or list(range(len(row)))
        parts |= {j: Part(None, ZERO, None, False) for k, j in enumerate(row) if k not in held}
        candidate = any(x.parts[row[k]].candidate for k in held)
        names = [d.name(x, row[k]) for k in held]
        made = d.copy(node, [names[0] if len(names) == 1 else d.emit.add("Concat", names, {"axis": axis})], i)
        if len(held) == 1:
            parts[row[held[0]]] = Part(made, UNKNOWN, None, candidate)
            continue
        for n, k in enumerate(held):
            start = total(x.cuts[axis][j] for j in held[:n])
            ends = [d.vector((start,)), d.vector((start + x.cuts[axis][k],)), d.emit.constant(np.array([axis]))]
            joint = (made, tuple(held))
            parts[row[k]] = Part(d.emit.add("Slice", [made, *ends]), UNKNOWN, None, candidate, joint)
    return d.made(node.output[0], x.cuts, parts)


def _hidden(x: Tensor, index: Index, axis: int) -> bool:
    """Whether softmax gives all entries of a segment no weight, in every row."""
    score = x.parts[index].score
    if score is None or isinstance(score.all.high, Expr):
        return False
    if score.all.high == -inf:
        return True
    if axis != x.rank - 1 or x.rank < 2 or x.cuts[-1] != x.cuts[-2] or index[-1] == index[-2]:
        return False
    # A row that sees itself for sure.
    seen = x.parts[(*index[:-1], index[-2])].score
    if seen is None or isinstance(seen.diagonal.low, Expr):
        return False
    return bool(spans.hides(x.dtype, score.all.high, seen.diagonal.low))


def norm(d: Division, node: NodeProto) -> Tensor:
    """Normalisations over axes that are whole."""
    x, others = d.tensor(node.input[0]), d.rest(node)
    axis = attribute(node, "axis", -1) % x.rank
    over = x.cuts[axis : axis + 1] if operator(node) == "LpNormalization" else x.cuts[axis:]
    if any(len(c) > 1 for c in over):
        raise Left
    return d.along(node, x, x.cuts, others)


def reduction(d: Division, node: NodeProto) -> Tensor:
    """Sums and means; other reductions along axes that are whole."""
    x, op, axes = d.tensor(node.input[0]), operator(node), _axes(d, node)
    if axes is None:
        raise Left
    on, keep = sorted({a % x.rank for a in axes}), bool(attribute(node, "keepdims", 1))
    left = [k for k in range(x.rank) if k not in on]
    cuts = [x.cuts[k] if k in left else (1,) for k in range(x.rank) if keep or k in left]

    def place(i: Index) -> dict[int, int]:
        return dict(enumerate(i)) if keep else dict(zip(left, i, strict=True))

    def first(i: Index) -> Index:
        return tuple(place(i).get(k, 0) if k in left else 0 for k in range(x.rank))

    if all(len(x.cuts[k]) == 1 for k in on):
        return d.copies(
            node, cuts, lambda i: [d.name(x, first(i)), *node.input[1:]], lambda i: x.parts[first(i)].candidate
        )
    if op not in ("ReduceSum", "ReduceMean") or (op == "ReduceMean" and x.dtype not in _FLOATS):
        raise Left
    parts = {}
    for i in indices(cuts):
        mine = [j for j in sorted(x.parts) if all(j[k] == place(i)[k] for k in left)]
        found = [j for j in mine if x.parts[j].known.all.number != 0] or mine[:1]
        sums = [d.emit.reduce("ReduceSum", d.name(x, j), on, keep) for j in found]
        out = sums[0]
        for other in sums[1:]:
            out = d.emit.add("Add", [out, other])
        if op == "ReduceMean":
            count = d.scalar(ex.product(x.sizes[k] for k in on))
            out = d.emit.add("Div", [out, d.emit.add("Cast", [count], {"to": x.dtype})])
        parts[i] = Part(out, UNKNOWN, None, any(x.parts[j].candidate for j in found))
    return d.made(node.output[0], cuts, parts)


# --- movement --------------------------------------------------------------------------------------------------------


def _axes(d: Division, node: NodeProto) -> list[int] | None:
    """Axes, an attribute in old opsets and a constant input in new ones; None if they are not given."""
    given = attribute(node, "axes")
    if given is None and len(node.input) > 1 and node.input[1]:
        data = d.data(node.input[1])
        if data is None:
            raise Left
        given = data.reshape(-1).tolist()
    return None if given is None else [int(a) for a in given]


def transpose(d: Division, node: NodeProto) -> Tensor:
    """Transpose."""
    x = d.tensor(node.input[0])
    return d.moves(node, x, attribute(node, "perm") or list(range(x.rank))[::-1], [])


def unsqueeze(d: Division, node: NodeProto) -> Tensor:
    """Unsqueeze."""
    x, axes = d.tensor(node.input[0]), _axes(d, node) or []
    rank = x.rank + len(axes)
    new, old = {a % rank for a in axes}, iter(range(x.rank))
    return d.moves(node, x, [None if k in new else next(old) for k in range(rank)], list(node.input[1:]))


def squeeze(d: Division, node: NodeProto) -> Tensor:
    """Squeeze of axes that are named."""
    x, axes = d.tensor(node.input[0]), _axes(d, node)
    if axes is None or any(len(x.cuts[a % x.rank]) > 1 for a in axes):
        raise Left
    gone = {a % x.rank for a in axes}
    return d.moves(node, x, [k for k in range(x.rank) if k not in gone], list(node.input[1:]))


def reshape(d: Division, node: NodeProto) -> Tensor:
    """Reshape: an axis in segments has to stay an axis, or is merged with that of rows."""
    x, sizes = d.tensor(node.input[0]), d.sizes(node.output[0])
    if len(x.cuts) > 1 and len(x.cuts[1]) > 1 and sizes == (ex.product(x.sizes[:2]), *x.sizes[2:]):
        return replace(x, merged=2)
    order: list[int | None] = [None] * len(sizes)
    for a, c in enumerate(x.cuts):
        if len(c) > 1:
            before = ex.product(x.sizes[:a])
            same = (k for k, n in enumerate(sizes) if n == x.sizes[a] and ex.product(sizes[:k]) == before)
            k = next(same, None)
            if k is None:
                raise Left
            order[k] = a
    cuts = [x.cuts[a] if a is not None else (n,) for n, a in zip(sizes, order, strict=True)]
    parts = {}
    for i in indices(cuts):
        at = {a: k for a, k in zip(order, i, strict=True) if a is not None}
        own = tuple(at.get(a, 0) for a in range(x.rank))
        part, have, want = x.parts[own], x.sizes_of(own), tuple(c[k] for c, k in zip(cuts, i, strict=True))
        name = None if part.name is None else _reshaped(d, part.name, have, want)
        known = part.known.anywhere() if part.known.all.fixed else UNKNOWN
        score = part.score.anywhere() if part.score is not None and part.score.all.fixed else None
        parts[i] = Part(name, known, score, part.candidate)
    return d.made(node.output[0], cuts, parts)


def lead(given: Sequence[Tensor | None]) -> Sizes:
    """The first axes of operands, where the original has these as one.

    Raises:
        Left: They are not the same of all of them.
    """
    found = {t.sizes[: t.merged] for t in given if t is not None and t.merged > 1}
    if len(found) > 1:
        raise Left
    return found.pop() if found else ()


def by_row(node: NodeProto, given: Sequence[Tensor | None], rank: int) -> NodeProto:
    """A node of which merged rows are kept apart: its axis, if it has one, is counted from the last.

    Args:
        node: The node.
        given: Its operands.
        rank: Number of dimensions that its result has.

    Raises:
        Left: It may not treat the rows independently.
    """
    op, axis = operator(node), attribute(node, "axis")
    if op == "Gather":
        if axis or (given[0] is not None and given[0].merged > 1):
            raise Left
    elif op == "Concat" or op in _ELEMENTWISE:
        if axis in (0, -rank) or any(t.rank - t.merged + 1 != rank for t in given if t is not None and t.merged > 1):
            raise Left
    elif op != "Reshape":
        raise Left
    if op != "Concat" or axis < 0:
        return node
    out = NodeProto()
    out.CopyFrom(node)
    next(a for a in out.attribute if a.name == "axis").i = axis - rank
    return out


def _reshaped(d: Division, name: str, have: Sizes, want: Sizes) -> str:
    """A tensor in another shape; extents that stay where they are need not be computed."""
    target: list[Size] = [0 if have[k : k + 1] == (n,) and isinstance(n, Expr) else n for k, n in enumerate(want)]
    left = [k for k, n in enumerate(target) if isinstance(n, Expr)]
    if len(left) == 1 and 0 not in target:
        target[left[0]] = -1
    elif left or any(n == 0 for n in want if isinstance(n, int)):
        if d.opset < 14:
            raise Left
        return d.emit.add("Reshape", [name, d.vector(want)], {"allowzero": 1})
    return d.emit.add("Reshape", [name, d.emit.constant(np.array(target, np.int64))])


def expand(d: Division, node: NodeProto) -> Tensor:
    """Expand, of segments or to them."""
    x, sizes = d.tensor(node.input[0]), d.sizes(node.output[0])
    own = [(1,)] * (len(sizes) - x.rank) + list(x.cuts)
    cuts = [c if len(c) > 1 else d.totals.get(n, (n,)) if c == (1,) else (n,) for c, n in zip(own, sizes, strict=True)]
    parts = {}
    for i in indices(cuts):
        part = x.at(i)
        want = tuple(c[k] for c, k in zip(cuts, i, strict=True))
        name = None if part.name is None else d.emit.add("Expand", [part.name, d.vector(want)])
        parts[i] = replace(part, name=name, joint=None)
    return d.made(node.output[0], cuts, parts)


def constant_of_shape(d: Division, node: NodeProto) -> Tensor:
    """ConstantOfShape."""
    cuts = [d.totals.get(n, (n,)) for n in d.sizes(node.output[0])]
    given = attribute(node, "value")
    value = 0.0 if given is None else float(numpy_helper.to_array(given).reshape(-1)[0])
    known = (spans.of(Span(value, value)), None)
    return d.copies(
        node,
        cuts,
        lambda i: [d.vector(tuple(c[k] for c, k in zip(cuts, i, strict=True)))],
        lambda i: False,
        lambda i: known,
    )


def range_(d: Division, node: NodeProto) -> Tensor:
    """Range of whole numbers by ones."""
    (size,) = d.sizes(node.output[0])
    first, step = d.data(node.input[0]), d.data(node.input[2])
    if first is None or step is None or first.dtype != np.int64 or step.dtype != np.int64 or int(step) != 1:
        raise Left
    parts, start, cut = {}, int(first) + total(()), d.totals[size]
    for k, n in enumerate(cut):
        at = start if n == 1 else start + ex.symbol("#0")
        index: Index = (k,)
        parts[index] = Part(d.positions(start, n), spans.of(Span(at, at)), None, False)
        start = start + n
    return d.made(node.output[0], [cut], parts)


def trilu(d: Division, node: NodeProto) -> Tensor:
    """Triangles: whether an entry is kept depends on how far it is from the diagonal."""
    x, upper = d.tensor(node.input[0]), bool(attribute(node, "upper", 1))
    given = d.data(node.input[1]) if len(node.input) > 1 and node.input[1] else np.array(0)
    if given is None or x.rank < 2:
        raise Left
    offset = int(given.reshape(-1)[0])
    parts = {}
    for i, part in x.parts.items():
        rows, columns = (total(x.cuts[a][: i[a]]) for a in (-2, -1))
        # Kept above where j - i >= k, below where j - i <= k.
        away = columns - rows + ex.symbol("#0") - ex.symbol("#1") - offset
        low, high = spans.least(away, x.sizes_of(i)[::-1]), spans.greatest(away, x.sizes_of(i)[::-1])
        if (low >= 0) if upper else (high <= 0):
            parts[i] = part
        elif (high < 0) if upper else (low > 0):
            parts[i] = Part(None, ZERO, None, False)
        else:
            shift = d.scalar(offset + rows - columns)
            moved = d.emit.add("Trilu", [d.name(x, i), shift], {"upper": int(upper)})
            known = part.known.map(lambda a: a.hull(Span(0, 0)))
            if rows == columns:
                kept = offset <= 0 if upper else offset >= 0
                known = Known(known.all, part.known.diagonal if kept else Span(0, 0))
            parts[i] = Part(moved, known, None, part.candidate)
    return d.made(node.output[0], x.cuts, parts)


def gather(d: Division, node: NodeProto) -> Tensor:
    """Gather: by positions in segments, from a tensor in segments, or of some of its positions."""
    x, at = d.tensor(node.input[0]), d.tensor(node.input[1])
    axis = attribute(node, "axis", 0) % x.rank
    if len(x.cuts[axis]) > 1:
        return _taken(d, node, x, axis)
    cuts = (*x.cuts[:axis], *at.cuts, *x.cuts[axis + 1 :])

    def own(i: Index) -> tuple[Index, Index]:
        return (*i[:axis], 0, *i[axis + at.rank :]), i[axis : axis + at.rank]

    return d.copies(
        node,
        cuts,
        lambda i: [d.name(x, own(i)[0]), d.name(at, own(i)[1])],
        lambda i: x.parts[own(i)[0]].candidate or at.parts[own(i)[1]].candidate,
    )


def _taken(d: Division, node: NodeProto, x: Tensor, axis: int) -> Tensor:
    """Some positions of the first or the last segment."""
    ids, cut = d.data(node.input[1]), x.cuts[axis]
    if ids is None or not ids.size:
        raise Left
    if ids.max() < 0 and ex.bounds(cut[-1])[0] >= -ids.min():
        which = len(cut) - 1
    elif ids.min() >= 0 and ex.bounds(cut[0])[0] > ids.max():
        which = 0
    else:
        raise Left

    def own(i: Index) -> Index:
        return (*i[:axis], which, *i[axis + ids.ndim :])

    cuts = (*x.cuts[:axis], *((n,) for n in ids.shape), *x.cuts[axis + 1 :])
    return d.copies(node, cuts, lambda i: [d.name(x, own(i)), node.input[1]], lambda i: x.parts[own(i)].candidate)


def slice_(d: Division, node: NodeProto) -> Tensor:
    """Slice: of other axes, or of whole segments from the front or the back."""
    x, others, sizes = d.tensor(node.input[0]), d.rest(node), d.sizes(node.output[0])
    given = [d.data(i) if i else None for i in others]
    if len(others) < 2 or any(g is None for g, i in zip(given[2:], others[2:], strict=True) if i):
        raise Left
    starts, ends, axes, steps = [*given, None, None][:4]
    count = next((len(v) for v in (axes, starts, ends) if v is not None), x.rank)
    on = [int(a) % x.rank for a in (axes if axes is not None else range(count))]
    cut = [a for a in on if len(x.cuts[a]) > 1]
    if not cut:
        return d.along(node, x, [c if len(c) > 1 else (n,) for c, n in zip(x.cuts, sizes, strict=True)], others)
    if len(on) != 1 or (steps is not None and int(steps[0]) != 1):
        raise Left
    (axis,) = cut
    found = _stretches(x.cuts[axis], sizes[axis], starts, ends)
    cuts = (*x.cuts[:axis], tuple(s.count for s in found), *x.cuts[axis + 1 :])
    parts = {}
    for i in indices(cuts):
        taken = found[i[axis]]
        own = (*i[:axis], taken.segment, *i[axis + 1 :])
        part = x.parts[own]
        if taken.count != x.cuts[axis][taken.segment]:
            at = [d.emit.constant(np.array([v])) for v in (taken.start, taken.end, axis)]
            part = Part(d.emit.add("Slice", [d.name(x, own), *at]), UNKNOWN, None, part.candidate)
        parts[i] = replace(part, joint=None)
    return d.made(node.output[0], cuts, parts)


@dataclass(frozen=True)
class _Stretch:
    """What a slice takes of one segment.

    Attributes:
        segment: The segment.
        start: Where it starts in there; counted from its end if negative.
        end: Where it ends.
        count: How many positions it takes.
    """

    segment: int
    start: int
    end: int
    count: Size


def _stretches(segments: Sizes, size: Size, starts: Any, ends: Any) -> list[_Stretch]:
    """What a slice takes of each segment that it takes something of.

    Args:
        segments: Lengths of the segments.
        size: Length of the slice.
        starts: Where it starts, an array of one number; None if that is computed.
        ends: Where it ends.

    Raises:
        Left: That cannot be told.
    """
    out: list[_Stretch] = []
    if starts is not None and ends is not None and all(isinstance(n, int) for n in segments):
        at = 0
        taken = range(int(total(segments)))[int(starts[0]) : int(ends[0])]  # type: ignore[arg-type]
        for k, n in enumerate(segments):
            assert isinstance(n, int)
            low, high = max(taken.start, at), min(taken.stop, at + n)
            out += [_Stretch(k, low - at, high - at, high - low)] if low < high else []
            at += n
    elif starts is not None and int(starts[0]) == 0:
        k = next((k for k in range(1, len(segments) + 1) if total(segments[:k]) == size), 0)
        out = [_Stretch(j, 0, _END, segments[j]) for j in range(k)]
    elif starts is not None and ends is not None and int(starts[0]) < 0 and not 0 <= int(ends[0]) < _END:
        out = _from_the_back(segments, size, -int(starts[0]), -min(int(ends[0]), 0))
    elif ends is not None and int(ends[0]) >= _END:
        k = next((k for k in range(len(segments)) if total(segments[k:]) == size), len(segments))
        out = [_Stretch(j, 0, _END, segments[j]) for j in range(k, len(segments))]
    if not out:
        raise Left
    return out


def _from_the_back(segments: Sizes, size: Size, first: int, last: int) -> list[_Stretch]:
    """What a slice takes between positions that are counted from the end; of the first segment all that there is."""
    out: list[_Stretch] = []
    at = 0
    for k, n in list(enumerate(segments))[:0:-1]:
        if at >= first:
            break
        if not isinstance(n, int):
            raise Left
        low, high = max(last - at, 0), min(first - at, n)
        out += [_Stretch(k, n - high, n - low, high - low)] if low < high else []
        at += n
    if at < first:
        rest = max(last - at, 0)
        out.append(_Stretch(0, at - first, -rest if rest else _END, size - total(s.count for s in out)))
    return out[::-1]


def split(d: Division, node: NodeProto) -> list[Tensor]:
    """Split along an axis that is whole."""
    x, others, shapes = d.tensor(node.input[0]), d.rest(node), [d.sizes(o) for o in node.output]
    axis = attribute(node, "axis", 0) % x.rank
    if len(x.cuts[axis]) > 1:
        raise Left
    parts: list[dict[Index, Part]] = [{} for _ in shapes]
    for i, part in x.parts.items():
        names = [d.emit.fresh(f"{o}/segment{''.join(map(str, i))}") for o in node.output]
        d.emit.copy(node, [d.name(x, i), *others], names)
        for into, name in zip(parts, names, strict=True):
            into[i] = Part(name, UNKNOWN, None, part.candidate)
    return [
        d.made(o, [*x.cuts[:axis], (shape[axis],), *x.cuts[axis + 1 :]], into)
        for o, shape, into in zip(node.output, shapes, parts, strict=True)
    ]


def concat(d: Division, node: NodeProto) -> Tensor:
    """Concat: of a sequence, of more to one, or of tensors that are divided alike."""
    given = [d.tensor(i) for i in node.input]
    rank = given[0].rank
    axis = attribute(node, "axis", 0) % rank
    cuts = [max((t.cuts[k] for t in given), key=len) for k in range(rank)]
    for n, name in enumerate(node.input):
        for k in range(rank):
            if k != axis and len(cuts[k]) > 1:
                given[n] = d.cut(name, given[n], k, cuts[k])
    parted = tuple(n for t in given for n in t.cuts[axis])
    if max(len(t.cuts[axis]) for t in given) == 1 and parted not in d.totals.values():
        cuts[axis] = (total(t.cuts[axis][0] for t in given),)
        return d.copies(
            node, cuts, lambda i: [d.name(t, i) for t in given], lambda i: any(t.parts[i].candidate for t in given)
        )
    cuts[axis] = parted
    owners = [(t, k) for t in given for k in range(len(t.cuts[axis]))]
    parts = {}
    for i in indices(cuts):
        t, k = owners[i[axis]]
        part = t.parts[(*i[:axis], k, *i[axis + 1 :])]
        parts[i] = replace(part, known=part.known.anywhere(), score=None, joint=None)
    return d.made(node.output[0], cuts, parts)


def shape(d: Division, node: NodeProto) -> Tensor:
    """Shape: extents are known without the tensor."""
    sizes = d.tensor(node.input[0]).sizes
    wanted = sizes[slice(attribute(node, "start", 0), attribute(node, "end", len(sizes)))]
    made = Part(d.emit.add("Identity", [d.vector(wanted)], output=node.output[0]), UNKNOWN, None, False)
    return Tensor((len(wanted),), ((len(wanted),),), {(0,): made}, TensorProto.INT64)


Step = Callable[[Division, NodeProto], "Tensor | list[Tensor]"]
MASKED = frozenset({"Add", "And", "Mul", "Or", "Sub", "Where"})
"""What constant masks are put together with others by."""
SEVERAL = frozenset({"Split"})
"""What has several results."""
SOURCES: Mapping[str, Step] = {
    "Concat": concat,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
}
"""What makes tensors as long as a sequence of none."""
STEPS: Mapping[str, Step] = {
    **dict.fromkeys((*_ELEMENTWISE, *_FIRST), elementwise),
    **dict.fromkeys(_NORMS, norm),
    **dict.fromkeys(_REDUCED, reduction),
    "MatMul": mat_mul,
    "Einsum": einsum,
    "Softmax": softmax,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Squeeze": squeeze,
    "Reshape": reshape,
    "Expand": expand,
    "Trilu": trilu,
    "Gather": gather,
    "Slice": slice_,
    "Split": split,
    "Concat": concat,
    "Shape": shape,
}
"""What is done segment by segment."""
