"""Products along an axis in segments: `(a ++ b) (c ++ d) = a c + b d`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx import NodeProto

from onnxrank import extents as ex
from onnxrank.extents import Expr
from onnxrank.graphs import attribute
from onnxrank.segments.division import Division, Index, Left, Part, Sizes, Tensor, indices
from onnxrank.segments.spans import UNKNOWN, ZERO

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

    axes = (terms[0].index(along), terms[1].index(along)) if along is not None else (0, 0)
    sizes = cut[along] if along is not None else ()
    cuts = [cut[label] for label in result]
    parts = {i: _added(d, node, operands[0], operands[1], i, pairs(i), axes, sizes) for i in indices(cuts)}
    return d.made(node.output[0], cuts, parts)


def _added(
    d: Division,
    node: NodeProto,
    a: Tensor,
    b: Tensor,
    i: Index,
    pairs: list[tuple[Index, Index]],
    axes: tuple[int, int],
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
        axes: The axes of `a` and of `b` that are summed over.
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
            terms.append(d.copy(node, [name, d.emit.add("Concat", rows, {"axis": axes[1]})], i))
            used = [k for k in held if k not in once]
    for k in used:
        some = len(sizes) > 1 and ex.bounds(sizes[k])[0] < 1
        both = zip((a, b), pairs[k], axes, strict=True)
        names = [d.factor(t, at, inner) if some else d.name(t, at) for t, at, inner in both]
        terms.append(d.copy(node, names, i))
    out = terms[0]
    for term in terms[1:]:
        out = d.emit.add("Add", [out, term])
    return Part(out, UNKNOWN, ZERO, candidate)
