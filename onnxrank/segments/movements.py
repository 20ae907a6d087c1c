"""Movement of tensors in segments: other shapes and orders, joins, repeats, lookups, triangles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from onnxrank import extents as ex
from onnxrank.extents import Expr
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, operator, traits
from onnxrank.segments import spans
from onnxrank.segments.division import Division, Index, Left, Part, Sizes, Tensor, indices, runs, total
from onnxrank.segments.spans import UNKNOWN, ZERO, Known, Size, Span


def axes_of(d: Division, node: NodeProto) -> list[int] | None:
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
    x, axes = d.tensor(node.input[0]), axes_of(d, node) or []
    rank = x.rank + len(axes)
    new, old = {a % rank for a in axes}, iter(range(x.rank))
    return d.moves(node, x, [None if k in new else next(old) for k in range(rank)], list(node.input[1:]))


def squeeze(d: Division, node: NodeProto) -> Tensor:
    """Squeeze of axes that are named."""
    x, axes = d.tensor(node.input[0]), axes_of(d, node)
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
    elif op == "Concat" or Trait.ELEMENTWISE in traits(node):
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


def pad(d: Division, node: NodeProto) -> Tensor:
    """Pad with a number, of segments of a sequence to all of it."""
    x, sizes = d.tensor(node.input[0]), d.sizes(node.output[0])
    pads, fill = attribute(node, "pads"), attribute(node, "value", 0.0)
    if pads is None:
        pads = d.data(node.input[1])
        fill = d.data(node.input[2]) if node.input[2:3] and node.input[2] else np.array(0)
    if pads is None or fill is None or attribute(node, "mode", b"constant") != b"constant" or node.input[3:]:
        raise Left
    before, behind = np.reshape(pads, (2, -1)).tolist()
    padded = [k for k in range(x.rank) if before[k] or behind[k]]
    if len(padded) != 1:
        raise Left
    (axis,) = padded
    cut = d.segments(sizes[axis]) or ()
    number = np.asarray(fill).astype(helper.tensor_dtype_to_np_dtype(x.dtype)).reshape(())
    ends = range(len(cut) + 1)
    held = ((a, b) for a in ends for b in ends if a < b and total(cut[:a]) == before[axis])
    a, b = next(((a, b) for a, b in held if total(cut[a:b]) == x.sizes[axis]), (0, 0))
    if a == b:
        x, a = _padded(d, x, axis, cut, before[axis], number)
        b = a + 1
    x = d.cut(node.input[0], x, axis, cut[a:b])
    cuts = (*x.cuts[:axis], cut, *x.cuts[axis + 1 :])
    known = spans.of(Span(float(number), float(number)))
    parts = {}
    for i in indices(cuts):
        if a <= i[axis] < b:
            own = x.parts[(*i[:axis], i[axis] - a, *i[axis + 1 :])]
            parts[i] = replace(own, known=own.known.anywhere(), score=None, joint=None)
        else:
            shape = d.vector(tuple(c[k] for c, k in zip(cuts, i, strict=True)))
            written = d.emit.add("Expand", [d.emit.constant(number), shape]) if number else None
            parts[i] = Part(written, known, None, False)
    return d.made(node.output[0], cuts, parts)


def _padded(d: Division, x: Tensor, axis: int, cut: Sizes, before: int, number: NDArray[Any]) -> tuple[Tensor, int]:
    """A tensor padded to the segment of a sequence that it lies in, and which that is.

    Args:
        d: The division.
        x: The tensor.
        axis: The axis.
        cut: The segments of the sequence.
        before: How many entries are put before the tensor, to the sequence.
        number: What is put there.

    Raises:
        Left: It lies in several segments.
    """
    for k in range(len(cut)):
        first, last = before - total(cut[:k]), total(cut[: k + 1]) - before - x.sizes[axis]
        if isinstance(first, int) and isinstance(last, int) and min(first, last) >= 0 and len(x.cuts[axis]) == 1:
            pads = np.zeros((2, x.rank), np.int64)
            pads[:, axis] = first, last
            ends = [d.emit.constant(pads.reshape(-1)), d.emit.constant(number)]
            known = spans.of(Span(float(number), float(number)))
            parts = {
                i: Part(
                    d.emit.add("Pad", [d.name(x, i), *ends]),
                    p.known.anywhere().map(Span.hull, known),
                    None,
                    p.candidate,
                )
                for i, p in x.parts.items()
            }
            sizes = (*x.sizes[:axis], cut[k], *x.sizes[axis + 1 :])
            return Tensor(sizes, (*x.cuts[:axis], (cut[k],), *x.cuts[axis + 1 :]), parts, x.dtype), k
    raise Left


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
    pieces = [(t, k) for t in given for k in range(len(t.cuts[axis]))]
    lengths = [t.cuts[axis][k] for t, k in pieces]
    sequence = _joined_to(d.totals.get(total(lengths), ()), lengths)
    if max(len(t.cuts[axis]) for t in given) == 1 and not sequence:
        cuts[axis] = (total(t.cuts[axis][0] for t in given),)
        return d.copies(
            node, cuts, lambda i: [d.name(t, i) for t in given], lambda i: any(t.parts[i].candidate for t in given)
        )
    levels = [any(p.candidate for i, p in t.parts.items() if i[axis] == k) for t, k in pieces]
    groups = sequence or (runs(levels) if any(levels) else [(k, k + 1) for k in range(len(pieces))])
    cuts[axis] = tuple(total(lengths[a:b]) for a, b in groups)
    parts = {}
    for i in indices(cuts):
        held = [(t, (*i[:axis], k, *i[axis + 1 :])) for t, k in pieces[slice(*groups[i[axis]])]]
        parts[i] = _one_of(d, held, axis)
    return d.made(node.output[0], cuts, parts)


def _joined_to(cut: Sizes, lengths: Sequence[Size]) -> list[tuple[int, int]]:
    """Which neighbours are each of the segments of a sequence, from where to where; none if they are not."""
    ends = [
        next((b for b in range(len(lengths) + 1) if total(lengths[:b]) == total(cut[:k])), -1)
        for k in range(len(cut) + 1)
    ]
    return list(pairwise(ends)) if cut and ends == sorted(set(ends)) and ends[0] == 0 else []


def _one_of(d: Division, held: Sequence[tuple[Tensor, Index]], axis: int) -> Part:
    """One segment of some that lie side by side."""
    parts = [t.parts[i] for t, i in held]
    known = reduce(lambda a, b: a.map(Span.hull, b), (p.known.anywhere() for p in parts))
    if len(parts) == 1:
        return replace(parts[0], known=known, score=None, joint=None)
    if known.all.number == 0:
        return Part(None, known, None, False)
    name = d.emit.add("Concat", [d.name(t, i) for t, i in held], {"axis": axis})
    return Part(name, known, None, any(p.candidate for p in parts))


def shape(d: Division, node: NodeProto) -> Tensor:
    """Shape: extents are known without the tensor."""
    sizes = d.tensor(node.input[0]).sizes
    wanted = sizes[slice(attribute(node, "start", 0), attribute(node, "end", len(sizes)))]
    made = Part(d.emit.add("Identity", [d.vector(wanted)], output=node.output[0]), UNKNOWN, None, False)
    return Tensor((len(wanted),), ((len(wanted),),), {(0,): made}, TensorProto.INT64)
