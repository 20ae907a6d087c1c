"""Operators that put entries elsewhere: reshapes, transposes, slices, joins, repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank import extents as ex
from onnxrank import moves, transfers
from onnxrank.extents import Expr, Unproved
from onnxrank.operators import signatures
from onnxrank.operators.entry import Operator, Shaper, Trait, Valuer
from onnxrank.operators.known import Known, Partial, Shape, kept, known, objects, whole
from onnxrank.operators.shapers import broadcast, same, unknown
from onnxrank.operators.use import Use

_UNBOUNDED = (1 << 31) - 1
"""Bounds of slices from here on mean the end of the axis."""


def _moved(shape: Shaper, move: Callable[[Use, NDArray[Any], Shape], NDArray[Any]]) -> Valuer:
    """Entries of an operator that puts those of its first input elsewhere."""

    def value(u: Use) -> list[Known | None]:
        x = u.value(0)
        found = shape(u)[0]
        if found is None:
            raise Unproved("the number of dimensions")
        out = whole(found)
        return [known(out, move(u, x.data, out), x.dtype)]

    return value


def _as_shape(u: Use, data: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """Entries in another shape: symbolic axes stay where they are, between as many entries as before."""
    if data.size == 1:
        return np.broadcast_to(data.reshape(()), kept(shape))
    if _segments(u.shape(0)) != _segments(shape):
        raise Unproved("entries move along a symbolic axis")
    return data.reshape(kept(shape))


def _segments(shape: Shape) -> list[int | Expr]:
    """The symbolic extents of a shape in order, and the number of entries between them."""
    out: list[int | Expr] = [1]
    for n in shape:
        if isinstance(n, Expr):
            out += [n, 1]
        else:
            out[-1] = out[-1] * n
    return out


def _reshape(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    rank = u.shape(1)
    if len(rank) != 1 or isinstance(rank[0], Expr):
        return [None]
    found = u.values[1] if len(u.values) > 1 else None
    if found is None:
        return [unknown(rank[0])]
    target: list[int | Expr | None] = list(found.sizes())
    empty = bool(u.attribute("allowzero", 0))
    inferred = [k for k, n in enumerate(target) if not isinstance(n, Expr) and n == -1]
    for k, n in enumerate(target):
        if isinstance(n, Expr):
            if ex.bounds(n)[0] < 0:
                target[k] = None
        elif n == 0 and not empty:
            target[k] = have[k] if k < len(have) else None
    if len(inferred) == 1:
        (at,) = inferred
        rest = [n for k, n in enumerate(target) if k != at]
        if any(n is None for n in rest):
            target[at] = None
        else:
            target[at] = ex.divide(ex.product(have), ex.product(whole(rest)))
    return [target]


def _flatten(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axis = int(u.attribute("axis", 1))
    axis = axis + len(have) if axis < 0 else axis
    return [[ex.product(have[:axis]), ex.product(have[axis:])]]


def _squeeze(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axes = u.integers(1, "axes")
    if axes is None:
        if any(isinstance(n, Expr) and _may_be_one(n) for n in have):
            raise Unproved("without axes it drops every axis of 1, which the candidates' may be")
        return [[n for n in have if n != 1]]
    gone = {a % len(have) for a in axes}
    return [[n for k, n in enumerate(have) if k not in gone]]


def _may_be_one(n: Expr) -> bool:
    low, high = ex.bounds(n)
    return low <= 1 <= high


def _unsqueeze(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axes = u.integers(1, "axes") or []
    rank = len(have) + len(axes)
    new = {a % rank for a in axes}
    old = iter(have)
    return [[1 if k in new else next(old) for k in range(rank)]]


def _perm(u: Use) -> list[int]:
    rank = len(u.shape(0))
    return [int(p) for p in u.attribute("perm", list(range(rank))[::-1])]


def _transpose(u: Use) -> list[Partial | None]:
    return [[u.shape(0)[p] for p in _perm(u)]]


def _slices(u: Use) -> list[tuple[int, int | Expr | None, int | Expr | None, int]]:
    """Axis, start, end and step per axis that is cut; None for bounds that are not known."""
    rank = len(u.shape(0))
    if u.opset < 10:
        starts, ends = list(u.attribute("starts")), list(u.attribute("ends"))
        axes: list[Any] = list(u.attribute("axes", range(len(starts))))
        return [(int(a) % rank, int(s), int(e), 1) for a, s, e in zip(axes, starts, ends, strict=True)]

    def entries(k: int) -> list[int | Expr] | None:
        found = u.values[k] if k < len(u.values) else None
        return None if found is None else found.sizes()

    starts_, ends_ = entries(1), entries(2)
    given = entries(3) if u.has(3) else None
    if u.has(3) and given is None:
        raise Unproved("the axes")
    steps = entries(4) if u.has(4) else None
    if u.has(4) and (steps is None or any(isinstance(s, Expr) for s in steps)):
        raise Unproved("the steps")
    count = next((len(x) for x in (given, starts_, ends_) if x is not None), None)
    if count is None:
        length = u.shape(1)[0]
        if isinstance(length, Expr):
            raise Unproved("the axes")
        count = length
    out = []
    for k in range(count):
        axis = given[k] if given is not None else k
        assert isinstance(axis, int)
        step = steps[k] if steps is not None else 1
        assert isinstance(step, int)
        start = starts_[k] if starts_ is not None else None
        out.append((axis % rank, start, ends_[k] if ends_ is not None else None, step))
    return out


def _slice(u: Use) -> list[Partial | None]:
    out: list[int | Expr | None] = list(u.shape(0))
    try:
        cuts = _slices(u)
    except Unproved:
        return [[None] * len(out)]
    for axis, start, end, step in cuts:
        n = out[axis]
        assert n is not None
        out[axis] = None if start is None or end is None else sliced(n, start, end, step)
    return [out]


def sliced(n: int | Expr, start: int | Expr, end: int | Expr, step: int) -> int | Expr | None:
    """Extent of a slice of an axis of `n` entries; None if it cannot be told."""
    if isinstance(n, int) and isinstance(start, int) and isinstance(end, int):
        cut = slice(start, None if step < 0 and end < -n - 1 else end, step)
        return len(range(n)[cut])
    if step < 0:
        whole_axis = start in (-1,) or (isinstance(start, int) and start >= _UNBOUNDED)
        return n if step == -1 and whole_axis and isinstance(end, int) and end <= -_UNBOUNDED else None
    first, last = _position(start, n), _position(end, n)
    if first is None or last is None:
        return None
    if last == n and isinstance(start, int):
        count = ex.maximum(n - start, 0) if start >= 0 else ex.minimum(n, -start)
    else:
        count = ex.maximum(last - first, 0)
    return count if step == 1 else ex.ceil_divide(count, step)


def _position(at: int | Expr, n: int | Expr) -> int | Expr | None:
    """A bound of a slice, brought between 0 and `n`."""
    if isinstance(at, int) and at >= _UNBOUNDED:
        return n
    if isinstance(at, int) and at <= -_UNBOUNDED:
        return 0
    low, high = ex.bounds(at)
    if low >= 0:
        return ex.minimum(at, n)
    if high < 0:
        return ex.maximum(n + at, 0)
    return None


def _slice_entries(u: Use, data: NDArray[Any], shape: Shape) -> NDArray[Any]:
    have = u.shape(0)
    index: list[slice] = [slice(None)] * len(have)
    for axis, start, end, step in _slices(u):
        if isinstance(have[axis], Expr):
            continue  # constant along it
        if not isinstance(start, int) or not isinstance(end, int):
            raise Unproved("the bounds")
        index[axis] = slice(start, None if step < 0 and end < -(1 << 30) else end, step)
    return data[tuple(index)].reshape(kept(shape))


def _split(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axis = u.axis(0, len(have))
    count = len(u.node.output)
    sizes: list[int | Expr] | None
    given = u.attribute("split")
    if given is not None:
        sizes = [int(n) for n in given]
    elif u.has(1):
        found = u.values[1]
        sizes = None if found is None else found.sizes()
        if sizes is None:
            return [[*have[:axis], None, *have[axis + 1 :]]] * count
    else:
        n = have[axis]
        if isinstance(n, int):
            each = -(-n // count)
            sizes = [min(each, n - k * each) for k in range(count)]
        else:
            part = ex.divide(n, count)
            if part is None:
                return [[*have[:axis], None, *have[axis + 1 :]]] * count
            sizes = [part] * count
    return [[*have[:axis], n, *have[axis + 1 :]] for n in sizes]


def _split_entries(u: Use) -> list[Known | None]:
    x, out = u.value(0), []
    axis, at = u.axis(0, len(u.shape(0))), 0
    for found in _split(u):
        assert found is not None
        shape = whole(found)
        n = shape[axis]
        if isinstance(n, Expr):
            raise Unproved("parts of a symbolic axis")
        out.append(known(shape, x.data.take(range(at, at + n), axis), x.dtype))
        at += n
    return list(out)


def concat(u: Use) -> list[Partial | None]:
    """Shape of operands side by side."""
    shapes = [u.shape(k) for k in range(len(u.node.input))]
    axis = u.axis(0, len(shapes[0]))
    if any(len(s) != len(shapes[0]) for s in shapes):
        return [None]
    out: list[int | Expr | None] = []
    for k in range(len(shapes[0])):
        found = {s[k] for s in shapes}
        if k == axis:
            total: int | Expr = 0
            for s in shapes:
                total = total + s[k]
            out.append(total)
        elif len(found) == 1:
            out.append(found.pop())
        else:
            # They are equal wherever the model runs.
            fixed = [n for n in found if isinstance(n, int)]
            out.append(fixed[0] if len(fixed) == 1 else None)
    return [out]


def _concat_entries(u: Use) -> list[Known | None]:
    operands = [u.value(k) for k in range(len(u.node.input))]
    (found,) = concat(u)
    assert found is not None
    shape = whole(found)
    axis = u.axis(0, len(shape))
    if isinstance(shape[axis], Expr):
        raise Unproved("a symbolic axis")
    if all(o.concrete for o in operands):
        return [known(shape, np.concatenate([o.data for o in operands], axis), operands[0].dtype)]
    return [known(shape, np.concatenate([objects(o.data) for o in operands], axis), operands[0].dtype)]


def _expand(u: Use) -> list[Partial | None]:
    have, length = u.shape(0), u.shape(1)
    if isinstance(length[0], Expr):
        return [None]
    found = u.values[1]
    if found is None:
        return [unknown(max(len(have), length[0]))]
    return [broadcast([have, tuple(found.sizes())])]


def _expand_entries(u: Use, data: NDArray[Any], shape: Shape) -> NDArray[Any]:
    goal = kept(shape)
    # One entry is held along symbolic axes, also where the tensor had all of a constant one: that is no broadcast.
    return np.broadcast_to(data, goal)


def _tile(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    found = u.values[1]
    if found is None:
        return [[None] * len(have)]
    return [[n * r for n, r in zip(have, found.sizes(), strict=True)]]


def _tile_entries(u: Use, data: NDArray[Any], shape: Shape) -> NDArray[Any]:
    repeats = [1 if isinstance(n, Expr) else n // max(1, k) for n, k in zip(shape, data.shape, strict=True)]
    if any(isinstance(n, Expr) and k > 1 for n, k in zip(shape, data.shape, strict=True)):
        raise Unproved("entries that repeat a symbolic number of times")
    return np.tile(data, repeats)


def _pad(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    given = u.attribute("pads")
    if given is not None:
        pads: list[int | Expr] = [int(p) for p in given]
    else:
        found = u.values[1] if len(u.values) > 1 else None
        if found is None:
            return [[None] * len(have)]
        pads = found.sizes()
    axes = [a % len(have) for a in u.integers(3, "axes") or []] if u.has(3) else list(range(len(have)))
    out: list[int | Expr | None] = list(have)
    for k, axis in enumerate(axes):
        out[axis] = have[axis] + pads[k] + pads[k + len(axes)]
    return [out]


def _compress(u: Use) -> list[Partial | None]:
    have, given, kept = u.shape(0), u.attribute("axis"), u.values[1]
    axis = None if given is None else u.axis(0, len(have))
    length = ex.product(have) if axis is None else have[axis]
    # A condition that is longer than the axis is cut to it.
    known = kept is not None and kept.concrete and isinstance(length, int)
    count = int(np.count_nonzero(kept.data[:length])) if known and kept is not None else None
    return [[count] if axis is None else [count if k == axis else n for k, n in enumerate(have)]]


def _resized(u: Use) -> list[Partial | None]:
    """Resize by constants, or to constant lengths; extents that are kept may be symbolic."""
    kept, found = signatures.resize(u).outputs[0], signatures.resized(u)
    out: list[int | Expr | None] = []
    for k, n in enumerate(u.shape(0)):
        longer = int(found[k]) if k in found and u.has(3) else None
        if longer is None and k in found and isinstance(n, int):
            longer = int(np.float32(n) * np.float32(found[k]))
        out.append(longer if kept[k] is None else n)
    return [out]


def _image(u: Use) -> list[Partial | None]:
    """Col2Im: the image, and as many channels as blocks of entries there are."""
    (rows, columns, *_), size = u.shape(0), u.entries(1)
    block = u.entries(2)
    if size is None or block is None:
        raise Unproved("the image")
    return [[rows, ex.divide(columns, ex.product(block)), *size]]


def _put_together(u: Use) -> signatures.Signature:
    """Col2Im: of every row its blocks, put into an image."""
    (size,) = u.shape(1)
    if isinstance(size, Expr):
        raise Unproved("an image of an unknown number of dimensions")
    return signatures.rows(2 + size)(u)


_MOVED = Trait.MOVEMENT
_PICKED = Trait.MOVEMENT | Trait.PICK
_IN_ORDER = Trait.MOVEMENT | Trait.ONCE | Trait.FREE | Trait.RESHAPE


def _reshaping(shape: Shaper, move: moves.Mover) -> Operator:
    """An operator that gives entries another shape and leaves them in their order."""
    return Operator(shape, _moved(shape, _as_shape), traits=_IN_ORDER, move=move)


OPERATORS = {
    "Identity": Operator(
        same,
        lambda u: [u.value(0)],
        traits=Trait.ELEMENTWISE | Trait.MOVEMENT | Trait.ONCE | Trait.FREE,
        move=moves.identity,
    ),
    "Reshape": _reshaping(_reshape, moves.reshape),
    "Flatten": _reshaping(_flatten, moves.reshape),
    "Squeeze": _reshaping(_squeeze, moves.squeeze),
    "Unsqueeze": _reshaping(_unsqueeze, moves.unsqueeze),
    "Transpose": Operator(
        _transpose,
        _moved(_transpose, lambda u, d, s: d.transpose(_perm(u))),
        traits=_MOVED | Trait.ONCE,
        move=moves.transpose,
    ),
    "Slice": Operator(
        _slice, _moved(_slice, _slice_entries), traits=_PICKED | Trait.ONCE, move=moves.slice_, levels=transfers.slice_
    ),
    "Split": Operator(_split, _split_entries, traits=_PICKED, move=moves.split),
    "Concat": Operator(concat, _concat_entries, traits=_PICKED, move=moves.concat, levels=transfers.concat),
    "Expand": Operator(_expand, _moved(_expand, _expand_entries), traits=_PICKED, move=moves.expand),
    "Tile": Operator(_tile, _moved(_tile, _tile_entries), traits=_MOVED, move=moves.tile),
    "Pad": Operator(_pad, levels=transfers.pad, signature=signatures.pad),
    "DepthToSpace": Operator(traits=_MOVED | Trait.ONCE, move=moves.depth_to_space, signature=signatures.rows()),
    "SpaceToDepth": Operator(traits=_MOVED | Trait.ONCE, move=moves.space_to_depth, signature=signatures.rows()),
    "ReverseSequence": Operator(same, signature=signatures.reverse_sequence),
    **dict.fromkeys(("Scatter", "ScatterElements"), Operator(same, signature=signatures.scatter_elements)),
    "ScatterND": Operator(same, signature=signatures.scatter_nd),
    "TensorScatter": Operator(same, signature=signatures.rows(places=(0, 1, 2))),
    "Compress": Operator(_compress, signature=signatures.compress),
    "CenterCropPad": Operator(signature=signatures.around(lambda u: u.attribute("axes", range(len(u.shape(0)))))),
    "Resize": Operator(_resized, signature=signatures.resize),
    "GridSample": Operator(signature=signatures.grid_sample),
    "RoiAlign": Operator(signature=signatures.roi_align),
    "Col2Im": Operator(_image, signature=_put_together),
}
