"""Data movement, described once: which entries of its operands an operator's results hold, and where.

A description works on any array that has a tensor's constant extents, one entry per entry of a row: element ids in a
rewrite, levels in the analysis, bounds of values, ids of inputs. Nobody else says what a Transpose does to them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onnxrank.extents import divide
from onnxrank.values import (
    Dim,
    Dims,
    Unrepresentable,
    canonical,
    extents,
    is_candidate_symbol,
    regroup,
    symbols,
    with_extents,
)

if TYPE_CHECKING:
    from onnxrank.operators import Placed

Extent = tuple[int, tuple[str, ...]]
"""A constant times symbols."""


@dataclass(frozen=True)
class Movement:
    """One result of an operator that moves entries.

    Attributes:
        dims: Its factored shape.
        take: Gives its entries for those of the operand, an array of its shape; for those of all operands if it joins.
        joins: Whether it holds entries of all operands, not of the first one only.
    """

    dims: Dims
    take: Callable[..., NDArray[Any]]
    joins: bool = False


_HUGE = 1 << 30
"""A bound beyond all extents, as exporters write it for the end."""
Mover = Callable[["Placed"], "list[Movement] | None"]
"""What an operator moves where; None where that is decided at run time.

Raises `Unrepresentable` where the result's shape cannot be held against the operand's, or rows get mixed.
"""


def _reshaped(dims: Dims) -> Movement:
    """The same entries in the same order."""
    return Movement(dims, lambda x: x.reshape(extents(dims)))


def identity(p: Placed) -> list[Movement]:
    """Identity, and whatever keeps entries in their places."""
    return [Movement(p.dim(0), lambda x: x)]


def reshape(p: Placed) -> list[Movement]:
    """Reshape and Flatten."""
    return [_reshaped(regroup(p.dim(0), p.target(0)))]


def squeeze(p: Placed) -> list[Movement] | None:
    """Squeeze; without axes, the axes are those that go at more than one candidate."""
    dims, axes = p.dim(0), p.constants(1, "axes")
    if axes is None:
        if p.has(1):
            return None
        if p.targets[0] is None:
            raise Unrepresentable("squeezes the candidate axis too where there is a single candidate")
        axes = [k for k, d in enumerate(dims) if d == ()]
    gone = {a % len(dims) for a in axes}
    if any(dims[a] != () for a in gone):
        raise Unrepresentable("squeezes an axis that is not 1")
    return [_reshaped(tuple(d for k, d in enumerate(dims) if k not in gone))]


def unsqueeze(p: Placed) -> list[Movement] | None:
    """Unsqueeze."""
    axes = p.constants(1, "axes")
    if axes is None:
        return None
    rank = len(p.dim(0)) + len(axes)
    new, old = {a % rank for a in axes}, iter(p.dim(0))
    return [_reshaped(tuple(() if k in new else next(old) for k in range(rank)))]


def transpose(p: Placed) -> list[Movement]:
    """Transpose."""
    dims = p.dim(0)
    perm = p.attribute("perm") or list(range(len(dims)))[::-1]
    return [Movement(tuple(dims[k] for k in perm), lambda x: x.transpose(perm))]


def _cut(dim: Dim, n: int) -> Dim:
    if symbols([dim]):
        raise Unrepresentable(f"cuts the extent {dim}")
    return canonical([n])


def _blocks(dim: Dim) -> tuple[int, Dim]:
    """An extent as a number of blocks that lie one behind the other, and the symbols of each.

    Raises:
        Unrepresentable: The blocks are not the outer factor.
    """
    count, each = (dim[0], dim[1:]) if dim and isinstance(dim[0], int) else (1, dim)
    if any(isinstance(f, int) for f in each):
        raise Unrepresentable(f"cuts the extent {dim}")
    return count, each


@dataclass(frozen=True)
class Cut:
    """What a Slice takes.

    Attributes:
        dims: Shape of the result.
        index: Per axis of constant extent the positions.
        along: Axes of an extent that is not constant of which not all is taken, or not for sure.
        told: Whether the bounds are constants.
    """

    dims: Dims
    index: tuple[slice, ...]
    along: tuple[int, ...]
    told: bool


def cut(p: Placed) -> Cut | None:
    """What a Slice takes of axes of constant extent, and of others; None where axes or steps are computed."""
    dims = list(p.dim(0))
    starts, ends, axes, steps = (p.constants(k, name) for k, name in enumerate(("starts", "ends", "axes", "steps"), 1))
    if (p.has(3) and axes is None) or (p.has(4) and steps is None):
        return None
    count = len(starts) if starts is not None else len(axes) if axes is not None else len(dims)
    seen = p.targets[0]
    index = [slice(None)] * len(dims)
    along: list[int] = []
    for k, axis in enumerate(axes if axes is not None else range(count)):
        a = axis % len(dims)
        step, n = steps[k] if steps is not None else 1, extents((dims[a],))[0]
        if not symbols([dims[a]]) and starts is not None and ends is not None:
            index[a] = slice(*slice(starts[k], _end(ends[k], step), step).indices(n))
            if step < 0 and index[a].stop < 0:
                index[a] = slice(index[a].start, None, step)
            dims[a] = _cut(dims[a], len(range(n)[index[a]]))
            continue
        if step != 1 or seen is None:
            raise Unrepresentable("a slice along a symbolic extent")
        if p.size(dims[a]) == p.sizes(0)[a]:
            continue  # for all extents it takes as many as there are, so it takes them all
        taken = _whole_blocks(p, dims[a], k)
        if taken is not None:
            index[a] = slice(*taken)
            dims[a] = canonical([taken[1] - taken[0], *_blocks(dims[a])[1]])
            continue
        if any(map(is_candidate_symbol, symbols([dims[a]]))):
            raise Unrepresentable("a slice along a symbolic extent")
        dims[a] = p.known(0)[a]
        along.append(a)
    return Cut(tuple(dims), tuple(index), tuple(along), starts is not None and ends is not None)


def _whole_blocks(p: Placed, dim: Dim, k: int) -> tuple[int, int] | None:
    """From which to which block of an extent the k-th bounds of a Slice go; None where they are not known to."""
    starts, ends = p.entries(1), p.entries(2)
    if starts is None or ends is None or not dim or not isinstance(dim[0], int):
        return None
    count, each = _blocks(dim)
    found = []
    for bound in (starts[k], ends[k]):
        huge = isinstance(bound, int) and bound > _HUGE
        found.append(count if huge else divide(bound, p.size(each)))
    start, end = found
    if isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= count:
        return start, end
    return None


def _end(end: int, step: int) -> int | None:
    return None if step < 0 and end < -(1 << 30) else end


def slice_(p: Placed) -> list[Movement] | None:
    """Slice along axes of constant extent; along others only if it takes everything."""
    found = cut(p)
    if found is None:
        return None
    if found.along:
        raise Unrepresentable("a slice along a symbolic extent")
    if found.dims == p.dim(0) and not found.told:
        return identity(p)
    if found.told or any(at != slice(None) for at in found.index):
        return [Movement(found.dims, lambda x: x[found.index])]
    raise Unrepresentable("slice bounds computed at run time")


def split(p: Placed) -> list[Movement] | None:
    """Split."""
    dims, count = p.dim(0), len(p.node.output)
    axis = p.axis(0, len(dims))
    sizes = p.constants(1, "split")
    if symbols([dims[axis]]):
        return _split_blocks(p, axis)
    if sizes is None:
        if p.has(1):
            return None
        n = extents(dims)[axis]
        each = -(-n // count)
        sizes = [min(each, n - k * each) for k in range(count)]
    at = np.cumsum([0, *sizes])

    def part(k: int) -> Movement:
        places = np.arange(at[k], at[k + 1])
        made = (*dims[:axis], _cut(dims[axis], sizes[k]), *dims[axis + 1 :])
        return Movement(made, lambda x: x.take(places, axis))

    return [part(k) for k in range(len(sizes))]


def _split_blocks(p: Placed, axis: int) -> list[Movement]:
    """Split of an extent that is not constant into whole blocks."""
    dims = p.dim(0)
    count, each = _blocks(dims[axis])
    if any(found is None for found in p.targets):
        raise Unrepresentable(f"parts of the extent {dims[axis]} that nobody reads")
    sizes = [divide(p.sizes(k)[axis], p.size(each)) for k in range(len(p.node.output))]
    counts = [n for n in sizes if isinstance(n, int)]
    if len(counts) < len(sizes) or sum(counts) != count or min(counts) < 1:
        raise Unrepresentable(f"cuts the extent {dims[axis]}")
    ends = np.cumsum(counts)

    def part(end: int, n: int) -> Movement:
        made = (*dims[:axis], canonical([n, *each]), *dims[axis + 1 :])
        return Movement(made, lambda x: x.take(np.arange(end - n, end), axis))

    return [part(int(end), n) for end, n in zip(ends, counts, strict=True)]


def gather(p: Placed) -> list[Movement] | None:
    """Gather of constant positions along an axis of constant extent."""
    dims, ids = p.dim(0), p.array(1)
    axis = p.axis(0, len(dims))
    if ids is None or symbols([dims[axis]]):
        return None
    at = np.where(ids < 0, ids + extents(dims)[axis], ids)
    made = (*dims[:axis], *(canonical([k]) for k in ids.shape), *dims[axis + 1 :])
    return [Movement(made, lambda x: np.take(x, at, axis))]


def depth_to_space(p: Placed) -> list[Movement] | None:
    """DepthToSpace: channels become blocks of an image."""
    sizes, b = _image(p), int(p.attribute("blocksize"))
    if sizes is None:
        return None
    rows, (channels, height, width) = p.dim(0)[0], sizes
    depth = channels // (b * b)
    split, order = (depth, b, b), (0, 1, 4, 2, 5, 3)
    if p.attribute("mode", b"DCR") == b"DCR":
        split, order = (b, b, depth), (0, 3, 4, 1, 5, 2)
    made = (rows, *(canonical([n]) for n in (depth, height * b, width * b)))
    return [Movement(made, lambda x: x.reshape(-1, *split, height, width).transpose(order).reshape(extents(made)))]


def space_to_depth(p: Placed) -> list[Movement] | None:
    """SpaceToDepth: blocks of an image become channels."""
    sizes, b = _image(p), int(p.attribute("blocksize"))
    if sizes is None:
        return None
    rows, (channels, height, width) = p.dim(0)[0], sizes
    split = (channels, height // b, b, width // b, b)
    made = (rows, *(canonical([n]) for n in (channels * b * b, height // b, width // b)))
    return [Movement(made, lambda x: x.reshape(-1, *split).transpose(0, 3, 5, 1, 2, 4).reshape(extents(made)))]


def _image(p: Placed) -> tuple[int, ...] | None:
    """Channels, height and width of images; None where they are not constant."""
    dims = p.dim(0)
    return None if len(dims) != 4 or symbols(dims[1:]) else extents(dims[1:])


def gather_nd(p: Placed) -> list[Movement] | None:
    """GatherND of constant positions, as in the selection of a triangle."""
    dims, ids = p.dim(0), p.array(1)
    if ids is None or p.attribute("batch_dims", 0) or any(symbols([d]) for d in dims[: ids.shape[-1]]):
        return None
    at = tuple(np.moveaxis(ids, -1, 0))
    made = (*(canonical([k]) for k in ids.shape[:-1]), *dims[ids.shape[-1] :])
    return [Movement(made, lambda x: x[at])]


def concat(p: Placed) -> list[Movement]:
    """Concat: blocks along an axis, of constant extent or of as many rows each as others."""
    every = [p.dim(k) for k in range(len(p.node.input))]
    axis, other = p.axis(0, len(every[0])), every[0]
    counts, rows = zip(*(_blocks(d[axis]) for d in every), strict=True)
    if len(set(rows)) > 1:
        raise Unrepresentable("joins along an extent that is not constant")
    if any(d[:axis] + d[axis + 1 :] != other[:axis] + other[axis + 1 :] for d in every):
        raise Unrepresentable("operands of differently factored shapes")
    total = canonical([sum(counts), *rows[0]])
    return [Movement((*other[:axis], total, *other[axis + 1 :]), lambda *x: np.concatenate(x, axis), joins=True)]


def padding(p: Placed) -> tuple[Dims, list[tuple[int, int]]] | None:
    """The shape that Pad gives with a constant, and what it adds before and behind each axis.

    None where that is not constant, where a part is cut off, or along an extent that is not constant.
    """
    dims, pads = p.dim(0), p.constants(1, "pads")
    if pads is None or p.attribute("mode", b"constant") != b"constant" or p.attribute("value", 0.0) or p.has(3):
        return None
    around = list(zip(pads[: len(dims)], pads[len(dims) :], strict=True))
    if min(min(a) for a in around) < 0 or any(symbols([d]) for d, a in zip(dims, around, strict=True) if any(a)):
        return None
    made = [n + a + b for n, (a, b) in zip(extents(dims), around, strict=True)]
    return with_extents(dims, made), around


def expand(p: Placed) -> list[Movement]:
    """Expand: broadcasting that is only noted."""
    dims, seen = p.dim(0), p.target(0)
    rank = len(seen)
    old = ((),) * (rank - len(dims)) + dims
    made = tuple(d if d != () else canonical([*syms, c]) for d, (c, syms) in zip(old, seen, strict=True))
    return [Movement(made, lambda x: np.broadcast_to(x.reshape((1,) * (rank - x.ndim) + x.shape), extents(made)))]


def tile(p: Placed) -> list[Movement]:
    """Tile: repeats are the outer factor of a dimension."""
    dims: list[Dim] = []
    repeats: list[int] = []
    for d, (c, syms) in zip(p.dim(0), p.target(0), strict=True):
        have, extra = prod(f for f in d if isinstance(f, int)), list(syms)
        for s in symbols([d]):
            if s not in extra:
                raise Unrepresentable("repeats to an unknown extent")
            extra.remove(s)
        if c % have:
            raise Unrepresentable("repeats to an unknown extent")
        repeats.append(c // have)
        if extra and c // have > 1:
            raise Unrepresentable("repeats along two factors at once")
        dims.append(canonical([*extra, c // have, *d]))
    return [Movement(tuple(dims), lambda x: np.tile(x, repeats))]


@lru_cache(maxsize=4096)
def one_by_one(order: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """A Transpose as Transposes that move one axis each, as few as there can be.

    Where one axis moves, onnxruntime copies what lies between; where several do at once, it looks up every entry.

    Args:
        order: The order of the axes, as in `perm`.
    """
    now, steps = tuple(range(len(order))), []
    while now != order:
        # Whichever axis leaves the longest sequence of axes in the order that is wanted.
        moved = [_moved(a, b, len(order)) for a in range(len(order)) for b in range(len(order)) if a != b]
        best = max(moved, key=lambda step: _rising([order.index(now[k]) for k in step]))
        steps.append(best)
        now = tuple(now[k] for k in best)
    return tuple(steps)


def _moved(a: int, b: int, rank: int) -> tuple[int, ...]:
    """The order of axes in which one has been brought to another place."""
    out = list(range(rank))
    out.insert(b, out.pop(a))
    return tuple(out)


def _rising(numbers: Sequence[int]) -> int:
    """Length of the longest rising subsequence."""
    ends: list[int] = []
    for n in numbers:
        at = bisect_left(ends, n)
        ends[at : at + 1] = [n]
    return len(ends)
