"""What elementwise operators do to tensors in segments, and to what is known of their entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import inf

from onnx import NodeProto, TensorProto

from onnxrank import extents as ex
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, operator, traits
from onnxrank.segments import spans
from onnxrank.segments.division import Division, Left, Part, Sizes, Tensor, total
from onnxrank.segments.spans import BOOLEAN, UNKNOWN, ZERO, Known, Size, Span

_EXACT_FLOATS = frozenset({int(TensorProto.FLOAT), int(TensorProto.DOUBLE)})
"""Types in which positions are what they are."""

FLOATS = _EXACT_FLOATS | {int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)}


def elementwise(d: Division, node: NodeProto) -> Tensor:
    """Operators that treat entries independently, with broadcasting."""
    if Trait.PARAMETERS in traits(node):
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
    return _picked(node, operands, made)


def _opened(d: Division, name: str, tensor: Tensor) -> Tensor:
    """A constant of queries and keys, such as a causal mask, cut along both; other operands as they are."""
    if is_mask(d, name):
        for k, n in enumerate(tensor.sizes):
            cut = d.segments(n)
            if cut is not None:
                tensor = d.cut(name, tensor, k, cut)
    return tensor


def is_mask(d: Division, name: str) -> bool:
    """Whether a tensor is a constant, or the first positions of one, with two axes as long as a sequence."""
    data = d.leading(name)
    if data is None or data.ndim < 2:
        return False
    return sum(d.segments(n) is not None for n in d.facts.sizes.get(name, data.shape)) > 1 and d.reaches(name)


def _fitted(d: Division, name: str, tensor: Tensor, cuts: Sequence[Sizes]) -> Tensor:
    """An operand, cut where the result is, unless it is broadcast there."""
    for k, want in enumerate(cuts[len(cuts) - tensor.rank :]):
        own = tensor.cuts[k]
        if len(want) > 1 and len(own) == 1 and own != (1,):
            if own[0] != total(want) and not ex.is_cut_of(own[0], total(want)):
                raise Left
            tensor = d.cut(name, tensor, k, want)
    return tensor


def _picked(node: NodeProto, given: Sequence[Tensor | None], made: Tensor) -> Tensor:
    """With segments that are those of an operand as these: what Where takes for sure, or what is multiplied by 1."""
    parts = dict(made.parts)
    for i in parts:
        numbers = [None if t is None else t.at(i).known.all.number for t in given]
        taken = next((given[k] for k in _taken(operator(node), numbers)), None)
        if taken is not None and taken.sizes_of(taken.own(i)) == made.sizes_of(i):
            # Other segments may not be as softmax made them any more.
            parts[i] = replace(taken.at(i), score=parts[i].score, joint=None)
    return replace(made, parts=parts)


def _taken(op: str, numbers: Sequence[float | None]) -> list[int]:
    """The operands that an elementwise operator gives as they are, by what all entries of each of them are."""
    if op == "Where":
        return [] if numbers[0] is None else [1 if numbers[0] else 2]
    neutral = {"Mul": 1, "And": 1, "Or": 0, "Div": 1}.get(op)
    if neutral is None or len(numbers) != 2:
        return []
    return [k for k in ((0,) if op == "Div" else (0, 1)) if numbers[1 - k] == neutral]


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
    if op == "Identity" or (op == "Cast" and attribute(node, "to") in FLOATS):
        return score
    return None


def _known(node: NodeProto, x: Sequence[Known], sizes: Sequence[Size]) -> Known:
    """What an elementwise operator makes of what is known of its operands."""
    op = operator(node)
    if Trait.COMPARISON in traits(node):
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
    elif Trait.COMPARISON in traits(node) or op in _SPANS or op in ("Cast", "Clip", "Mul"):
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
    return x.map(lambda a: a if to in FLOATS and a.fixed else a.whole() if to not in FLOATS else spans.ANY)


def _product(x: Sequence[Known]) -> Known:
    """Entries times a number; a mask of 0 hides what it is multiplied with, as a weight of 0 does in a product."""
    numbers = [k.all.number for k in x]
    if 0.0 in numbers:
        return ZERO if not any(n is not None and abs(n) == inf for n in numbers) else UNKNOWN
    factor, other = (numbers[0], x[1]) if numbers[0] is not None else (numbers[1], x[0])
    return UNKNOWN if factor is None else other.map(lambda a: a.times(factor))
