"""Slices of tensors in segments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto

from onnxrank import extents as ex
from onnxrank.extents import Expr
from onnxrank.graphs import attribute
from onnxrank.segments.division import Division, Index, Left, Part, Sizes, Tensor, indices, total
from onnxrank.segments.spans import UNKNOWN, Size

_END = (1 << 31) - 1
"""Ends of slices from here on are the end of the axis."""


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
        whole = taken.count == x.cuts[axis][taken.segment]
        parts[i] = replace(x.parts[own], joint=None) if whole else _some(d, x, own, axis, taken)
    return d.made(node.output[0], cuts, parts)


def _some(d: Division, x: Tensor, own: Index, axis: int, taken: _Stretch) -> Part:
    """Some positions of a segment; if they are not there that fails at run time, where their number is proved."""
    part, name = x.parts[own], d.name(x, own)
    known = part.known.anywhere() if part.known.all.fixed else UNKNOWN
    score = part.score.anywhere() if part.score is not None and part.score.all.fixed else None
    if isinstance(taken.count, int) and isinstance(x.cuts[axis][taken.segment], Expr):
        first = taken.end - taken.count if taken.end < 0 else taken.start
        at = np.arange(first, first + taken.count, dtype=np.int64)
        return Part(d.emit.add("Gather", [name, d.emit.constant(at)], {"axis": axis}), known, score, part.candidate)
    ends = [d.emit.constant(np.array([v])) for v in (taken.start, taken.end, axis)]
    return Part(d.emit.add("Slice", [name, *ends]), known, score, part.candidate)


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
        if not k and ends is not None and int(ends[0]) < 0:
            out = _without_the_last(segments, size, -int(ends[0]))
    elif starts is not None and ends is not None and int(starts[0]) < 0 and not 0 <= int(ends[0]) < _END:
        out = _from_the_back(segments, size, -int(starts[0]), -min(int(ends[0]), 0))
    elif ends is not None and int(ends[0]) >= _END:
        k = next((k for k in range(len(segments)) if total(segments[k:]) == size), len(segments))
        out = [_Stretch(j, 0, _END, segments[j]) for j in range(k, len(segments))]
    if not out:
        raise Left
    return out


def _without_the_last(segments: Sizes, size: Size, dropped: int) -> list[_Stretch]:
    """What a slice takes up to a position that is counted from the end."""
    left, k = dropped, len(segments) - 1
    for n in segments[:0:-1]:
        if not isinstance(n, int) or n > left:
            break
        left, k = left - n, k - 1
    if k and ex.bounds(segments[k] - left)[0] < 0:
        raise Left
    whole = [_Stretch(j, 0, _END, n) for j, n in enumerate(segments[:k])]
    return [*whole, _Stretch(k, 0, -left or _END, size - total(segments[:k]))]


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
