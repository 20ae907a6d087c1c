"""Weights, norms and sums along axes of tensors in segments."""

from __future__ import annotations

from math import inf

import numpy as np
from onnx import NodeProto

from onnxrank import extents as ex
from onnxrank.extents import Expr
from onnxrank.graphs import attribute
from onnxrank.operators import operator
from onnxrank.segments import spans
from onnxrank.segments.division import Division, Index, Left, Part, Tensor, indices, total
from onnxrank.segments.elementwise import FLOATS
from onnxrank.segments.movements import axes_of
from onnxrank.segments.spans import UNKNOWN, ZERO


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
    x, op, axes = d.tensor(node.input[0]), operator(node), axes_of(d, node)
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
    if op not in ("ReduceSum", "ReduceMean") or (op == "ReduceMean" and x.dtype not in FLOATS):
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
