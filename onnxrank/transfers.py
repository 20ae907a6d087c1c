"""How levels flow through operators: the level of every entry of a result from those of the operands.

A transfer says what is so whatever rules there are: an operator that treats rows independently gives equal rows for
equal rows. It returns None, or raises `Unrepresentable`, where that cannot be said; then the result is opaque.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from onnxrank import moves
from onnxrank.errors import ModelError
from onnxrank.extents import is_cut_of
from onnxrank.graphs import einsum_terms
from onnxrank.values import (
    Dim,
    Dims,
    Level,
    Unrepresentable,
    broadcast_dims,
    canonical,
    extents,
    is_candidate_symbol,
    symbols,
)

if TYPE_CHECKING:
    from onnxrank.operators import Flow

Levels = NDArray[np.int8]
"""Level of every entry of a row, in the shape of a tensor's constant extents."""
Zeros = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Made:
    """A result.

    Attributes:
        dims: Factored shape.
        levels: Level of every entry.
        zeros: Entries that are 0 for sure, whatever the inputs; None where none is known to be.
    """

    dims: Dims
    levels: Levels
    zeros: Zeros | None = None


_MOST = 1 << 60
"""Entries that no machine holds."""
_MOST_AXES = 64
"""More than tensors have."""

Transfer = Callable[["Flow"], "list[Made] | None"]


def uniform(level: int, dims: Dims) -> Levels:
    """One level for all entries, which takes no memory.

    Raises:
        ModelError: No tensor can have the shape.
    """
    shape = extents(dims)
    if min(shape, default=0) < 0 or prod(shape) > _MOST:
        raise ModelError(f"a tensor has the shape {list(shape)}, which none can have")
    return np.broadcast_to(np.int8(level), shape)


def is_uniform(levels: Levels) -> bool:
    """Whether all entries have one level, and are held as one."""
    return levels.size <= 1 or not any(levels.strides)


def highest(levels: Levels) -> int:
    """The highest level of any entry; of a tensor without entries that of a constant."""
    if not levels.size:
        return int(Level.CONSTANT)
    return int(levels.flat[0]) if is_uniform(levels) else int(levels.max())


def along(levels: Levels, axes: Sequence[int]) -> Levels:
    """The highest level along some axes, which become 1."""
    if is_uniform(levels) or not axes:
        shape = tuple(1 if k in axes else n for k, n in enumerate(levels.shape))
        return np.broadcast_to(np.int8(highest(levels)), shape) if axes else levels
    made: Levels = levels.max(axis=tuple(axes), keepdims=True)
    return made


def joined(dims: Dims, parts: Sequence[Levels]) -> Levels:
    """The higher of several levels, entry by entry; parts are broadcast to the shape."""
    shape = extents(dims)
    if all(map(is_uniform, parts)):
        return uniform(max(map(highest, parts)), dims)
    out = parts[0]
    for p in parts[1:]:
        out = np.maximum(out, p)
    return np.broadcast_to(out, shape)


def _has_rows(dims: Sequence[Dim]) -> bool:
    return any(map(is_candidate_symbol, symbols(dims)))


def _others(f: Flow, first: int = 1) -> int | None:
    """The highest level of the operands behind the first ones; None where one of them has rows of candidates."""
    level = int(Level.CONSTANT)
    for k in range(first, len(f.node.input)):
        if f.has(k):
            if _has_rows(f.dim(k)):
                return None
            level = max(level, highest(f.level(k)))
    return level


def moved(f: Flow, found: Sequence[moves.Movement] | None) -> list[Made] | None:
    """Levels moved as entries are."""
    if found is None:
        return None
    count = len(f.node.input) if found[0].joins else 1
    levels, zeros = [f.level(k) for k in range(count)], [f.zero(k) for k in range(count)]
    out = []
    for m in found:
        if all(map(is_uniform, levels)) and len({highest(x) for x in levels}) == 1:
            made = uniform(highest(levels[0]), m.dims)
        else:
            made = m.take(*levels)
        known = None
        if any(z is not None for z in zeros):
            known = m.take(*(np.zeros(x.shape, bool) if z is None else z for x, z in zip(levels, zeros, strict=True)))
        out.append(Made(m.dims, made, known))
    return out


def elementwise(f: Flow) -> list[Made] | None:
    """Entries from those in their place."""
    given = [k for k in range(len(f.node.input)) if f.has(k)]
    dims = broadcast_dims(_fitted(f, [f.dim(k) for k in given]))
    return [Made(dims, joined(dims, [f.level(k) for k in given]))]


def _fitted(f: Flow, shapes: Sequence[Dims]) -> list[Dims]:
    """Shapes to be broadcast, with one name for extents that are equal wherever the model runs (`is_cut_of`)."""
    rank = max(map(len, shapes))
    wide = [((),) * (rank - len(dims)) + dims for dims in shapes]
    for k in range(rank):
        found = {dims[k] for dims in wide} - {()}
        sizes = {d: f.size(d) for d in found} if len(found) > 1 else {}
        names = {d: whole for d in sizes for whole in sizes if len(whole) == 1 and is_cut_of(sizes[d], sizes[whole])}
        wide = [(*dims[:k], names.get(dims[k], dims[k]), *dims[k + 1 :]) for dims in wide]
    return wide


def concat(f: Flow) -> list[Made] | None:
    """Concat; along an extent that is not constant what is joined is known together."""
    every = [f.dim(k) for k in range(len(f.node.input))]
    axis = f.axis(0, len(every[0]))
    along_axis = [d[axis] for d in every]
    if not symbols(along_axis) or _has_rows(along_axis):
        return moved(f, moves.concat(f))
    if len({d[:axis] + d[axis + 1 :] for d in every}) > 1:
        return None
    dims = (*every[0][:axis], f.known(0)[axis], *every[0][axis + 1 :])
    return [Made(dims, joined(dims, [along(f.level(k), [axis]) for k in range(len(every))]))]


def slice_(f: Flow) -> list[Made] | None:
    """Slice; along an extent that is not constant by any number of entries."""
    found = moves.cut(f)
    if found is None or not found.along:
        return None if found is None else moved(f, moves.slice_(f))
    rest = _others(f)  # of bounds that are computed
    if rest is None:
        return None
    levels = joined(found.dims, [along(f.level(0)[found.index], found.along)])
    return [Made(found.dims, np.maximum(levels, np.int8(rest)) if rest else levels)]


def kept(f: Flow) -> list[Made] | None:
    """Entries of the first operand where they are, each changed by parameters that have no rows of candidates."""
    rest = _others(f)
    if rest is None:
        return None
    made = Made(f.dim(0), np.maximum(f.level(0), np.int8(rest)) if rest else f.level(0))
    return [made] * len(f.node.output)


def kept_zero(f: Flow) -> list[Made] | None:
    """The same, of which an entry of 0 stays that: Cast and Trilu."""
    made = kept(f)
    return None if made is None else [Made(m.dims, m.levels, f.zero(0)) for m in made]


def dropout(f: Flow) -> list[Made] | None:
    """Dropout, which does nothing unless it trains."""
    training = f.array(2) if f.has(2) else np.array(False)
    if training is None or training.any():
        return None
    return [Made(f.dim(0), f.level(0), f.zero(0)), Made(f.dim(0), f.level(0))][: len(f.node.output)]


def batch_normalised(f: Flow) -> list[Made] | None:
    """BatchNormalization by moments that are given: channel by channel."""
    made = None if f.attribute("training_mode", 0) else kept(f)
    return None if made is None else made[:1]


def where(f: Flow) -> list[Made] | None:
    """Where; what is 0 on both sides is 0."""
    made = elementwise(f)
    assert made is not None
    zeros = [f.zero(k) for k in (1, 2)]
    if not any(z is not None for z in zeros):
        return made
    data = [f.array(k) for k in (1, 2)]
    both = [np.asarray(d == 0) if z is None and d is not None else z for z, d in zip(zeros, data, strict=True)]
    first, second = both
    if first is None or second is None:
        return made
    known = np.broadcast_to(first & second, extents(made[0].dims))
    return [Made(made[0].dims, np.where(known, np.int8(Level.CONSTANT), made[0].levels), known)]


def _axes(f: Flow) -> list[int] | None:
    """The axes that are taken in together; None where candidates lie along one of them."""
    dims = f.dim(0)
    found = f.core()
    if found is None:
        return None
    core = sorted(a % len(dims) for a in found) if dims else []
    return None if _has_rows([dims[a] for a in core]) else core


def normalised(f: Flow) -> list[Made] | None:
    """Of the first operand's shape, with entries that depend on all along some axes, row by row."""
    core, rest = _axes(f), _others(f)
    if core is None or rest is None:
        return None
    dims = f.dim(0)
    rows = joined(tuple(() if k in core else d for k, d in enumerate(dims)), [along(f.level(0), core)])
    rows = np.maximum(rows, np.int8(rest)) if rest else rows
    level = uniform(highest(rows), dims) if is_uniform(rows) else np.broadcast_to(rows, extents(dims))
    moments = Made(tuple(() if k in core else d for k, d in enumerate(dims)), rows)
    return [Made(dims, level), moments, moments][: len(f.node.output)]


def softmax(f: Flow) -> list[Made] | None:
    """Softmax: a key that a mask hides for sure gets weight 0 and reaches no other."""
    made, core = normalised(f), _axes(f)
    if made is None or core is None or len(core) != 1 or is_uniform(f.level(0)):
        return made
    (axis,), levels = core, f.level(0)
    hidden = f.hidden(axis)
    if hidden is None:
        return made
    seen = np.where(hidden, np.int8(Level.UNREAD), levels).max(axis=axis, keepdims=True)
    wide = np.broadcast_to(seen, levels.shape)
    return [Made(f.dim(0), np.where(hidden, np.int8(Level.CONSTANT), wide), hidden)]


def reduced(f: Flow) -> list[Made] | None:
    """Entries along some axes taken in together, which go or become 1."""
    core, rest = _axes(f), _others(f)
    if core is None or rest is None:
        return None
    keep = bool(f.attribute("keepdims", 1))
    dims, levels = f.dim(0), along(f.level(0), core)
    left = [k for k in range(len(dims)) if keep or k not in core]
    made = tuple(() if k in core else dims[k] for k in left)
    levels = levels.reshape(extents(made)) if not is_uniform(levels) else uniform(highest(levels), made)
    return [Made(made, levels)]


def top_k(f: Flow) -> list[Made] | None:
    """TopK: the places are taken in together."""
    core, k = _axes(f), f.attribute("k")
    given = f.array(1)
    count = k if k is not None else None if given is None else int(given.reshape(-1)[0])
    if core is None or count is None:
        return None
    dims = tuple(canonical([count]) if a in core else d for a, d in enumerate(f.dim(0)))
    made = Made(dims, joined(dims, [along(f.level(0), core)]))
    return [made, made][: len(f.node.output)]


def images(f: Flow) -> list[Made] | None:
    """Rows lie along the first axis, and everything behind it is taken in together."""
    dims, seen, rest = f.dim(0), f.target(0), _others(f)
    behind = f.known(0)[1:]
    if rest is None or _has_rows(behind) or len(seen) != len(dims) or _has_rows(dims[1:]):
        return None
    if extents(dims[:1]) != (1,) or (seen[0][0], tuple(symbols(dims[:1]))) != seen[0]:
        return None
    made = (dims[0], *behind)
    return [Made(made, uniform(max(rest, highest(f.level(0))), made))]


def conv(f: Flow) -> list[Made] | None:
    """A convolution; of kernel 1 position by position."""
    if f.dims[1] is None or any(s != 1 for s in f.attribute("strides") or []):
        return images(f)
    if prod(extents(f.dim(1)[2:])) != 1 or any(f.attribute("pads") or []) or symbols(f.dim(0)[1:2]):
        return images(f)
    rest, group = _others(f), f.attribute("group", 1)
    if rest is None or symbols(f.dim(1)):
        return None
    dims = (f.dim(0)[0], f.dim(1)[0], *f.dim(0)[2:])
    level = f.level(0)
    if group == 1 or is_uniform(level):
        level = along(level, [1])
    else:
        by_group = level.reshape(level.shape[0], group, -1, *level.shape[2:]).max(2)
        level = np.repeat(by_group, extents(dims)[1] // group, 1)
    return [Made(dims, joined(dims, [level, np.full((1,) * len(dims), rest, np.int8)]))]


def pad(f: Flow) -> list[Made] | None:
    """Pad: with a constant around entries, else of every line alone."""
    found = moves.padding(f)
    value = f.array(2) if f.has(2) else np.zeros(())
    if found is None or value is None or value.size != 1:
        return alone(f)
    dims, around = found
    levels = np.pad(f.level(0), around, constant_values=int(Level.CONSTANT))
    if value.reshape(-1)[0] != 0:
        return [Made(dims, levels)]
    known = f.zero(0)
    zeros = np.zeros(f.level(0).shape, bool) if known is None else known
    return [Made(dims, levels, np.pad(zeros, around, constant_values=True))]


def alone(f: Flow) -> list[Made] | None:
    """What works on some axes one by one, by its signature."""
    if f.entry.signature is None:
        return None
    found = f.entry.signature(f)
    given = [k for k in range(len(f.node.input)) if f.has(k)]
    if found.as_set and any(highest(f.level(k)) > Level.REQUEST for k in given):
        return None
    if any(_has_rows([d for d, a in zip(f.dim(k), found.inputs[k], strict=True) if a is None]) for k in given):
        return None
    shared = shared_dims([f.dim(k) for k in given], [found.inputs[k] for k in given])
    out = []
    for k, axes in enumerate(found.outputs[: len(f.node.output)]):
        if not f.node.output[k]:
            out.append(Made((), uniform(Level.CONSTANT, ())))
            continue
        new = f.known(k) if None in axes else ()
        dims = tuple(new[j] if a is None else shared[a] for j, a in enumerate(axes))
        if _has_rows([d for d, a in zip(dims, axes, strict=True) if a is None]):
            return None
        sides: list[tuple[Levels, Zeros | None]] = [(f.level(k), None) for k in given]
        if found.as_set:
            out.append(Made(dims, uniform(max(highest(x) for x, _ in sides), dims)))
        else:
            terms = [_numbered(found.inputs[k], -1) for k in given]
            out.append(Made(dims, _contracted(sides, terms, _numbered(axes, -1 - _MOST_AXES), dims)))
    return out


def shared_dims(shapes: Sequence[Dims], axes: Sequence[Sequence[int | None]]) -> dict[int, Dim]:
    """Extents of the axes that a signature names, from the operands that have them.

    Raises:
        Unrepresentable: Operands have them factored differently.
    """
    out: dict[int, Dim] = {}
    for dims, names in zip(shapes, axes, strict=True):
        for d, a in zip(dims, names, strict=True):
            if a is None:
                continue
            if out.get(a, ()) == ():
                out[a] = d
            elif d not in ((), out[a]):
                raise Unrepresentable("operands of differently factored shapes")
    return out


def _numbered(axes: Sequence[int | None], first: int) -> list[int]:
    """The axes of a signature, with numbers of their own, from the first one down, for those that have none."""
    return [first - k if a is None else a for k, a in enumerate(axes)]


# --- look-ups --------------------------------------------------------------------------------------------------------


def gather(f: Flow) -> list[Made] | None:
    """Gather: movement where the positions are constants, else a look-up."""
    found = moves.gather(f)
    if found is not None:
        return moved(f, found)
    table, ids = f.dim(0), f.dim(1)
    axis = f.axis(0, len(table))
    if _has_rows(table) and _has_rows([*ids, table[axis]]):
        return None
    dims = (*table[:axis], *ids, *table[axis + 1 :])
    rows, picked = along(f.level(0), [axis]), f.level(1)
    rows = rows.reshape((*rows.shape[:axis], *(1,) * len(ids), *rows.shape[axis + 1 :]))
    return [Made(dims, joined(dims, [rows, picked.reshape(picked.shape + (1,) * (len(table) - axis - 1))]))]


def gather_nd(f: Flow) -> list[Made] | None:
    """GatherND, of a tensor without rows of candidates where the positions are computed."""
    found = moves.gather_nd(f)
    if found is not None:
        return moved(f, found)
    table, ids = f.dim(0), f.dim(1)
    if _has_rows(table) or f.attribute("batch_dims", 0) or _has_rows(ids[-1:]):
        return alone(f)
    dims = (*ids[:-1], *table[extents(ids)[-1] :])
    return [Made(dims, uniform(max(highest(f.level(0)), highest(f.level(1))), dims))]


def gather_elements(f: Flow) -> list[Made] | None:
    """GatherElements of two tensors of one shape but along the axis."""
    data, ids = f.dim(0), f.dim(1)
    axis = f.axis(0, len(data))
    if _has_rows([data[axis], ids[axis]]) or data[:axis] + data[axis + 1 :] != ids[:axis] + ids[axis + 1 :]:
        return None
    return [Made(ids, joined(ids, [along(f.level(0), [axis]), f.level(1)]))]


def one_hot(f: Flow) -> list[Made] | None:
    """OneHot of a constant depth."""
    depth, ids = f.array(1), f.dim(0)
    rest = _others(f)
    if depth is None or rest is None:
        return None
    axis = f.attribute("axis", -1) % (len(ids) + 1)
    dims = (*ids[:axis], canonical([int(depth.reshape(-1)[0])]), *ids[axis:])
    return [Made(dims, joined(dims, [np.expand_dims(f.level(0), axis), np.full((1,) * len(dims), rest, np.int8)]))]


# --- products --------------------------------------------------------------------------------------------------------


def _contracted(
    sides: Sequence[tuple[Levels, Zeros | None]], terms: Sequence[Sequence[int]], out: Sequence[int], dims: Dims
) -> Levels:
    """The levels of a sum of products.

    Args:
        sides: The levels of each factor, and its entries that are 0 for sure.
        terms: The letters of each factor's axes, as numbers.
        out: The letters of the result's axes.
        dims: Shape of the result.
    """
    if len(sides) == 2 and any(z is not None and z.any() for _, z in sides):
        return _around_zeros(sides, terms, out, dims)
    parts = []
    for (levels, _), term in zip(sides, terms, strict=True):
        gone = [k for k, c in enumerate(term) if c not in out]
        left = along(levels, gone).reshape([n for k, n in enumerate(levels.shape) if k not in gone])
        names = [c for c in term if c in out]
        order = sorted(range(len(names)), key=lambda k: out.index(names[k]))
        place = {names[k]: left.shape[k] for k in order}
        parts.append(left.transpose(order).reshape([place.get(c, 1) for c in out]))
    return joined(dims, parts)


def _around_zeros(
    sides: Sequence[tuple[Levels, Zeros | None]], terms: Sequence[Sequence[int]], out: Sequence[int], dims: Dims
) -> Levels:
    """The same, without the products of which a factor is 0."""
    size: dict[int, int] = {}
    for (levels, _), term in zip(sides, terms, strict=True):
        for c, n in zip(term, levels.shape, strict=True):
            size[c] = max(n, size.get(c, 1))
    there, wide = [], []
    for (levels, zeros), term in zip(sides, terms, strict=True):
        shape = [size[c] for c in term]
        wide.append(np.broadcast_to(levels, shape))
        there.append(np.broadcast_to(1.0 if zeros is None else (~zeros).astype(np.float64), shape))
    made = np.full(extents(dims), int(Level.CONSTANT), np.int8)
    for level in (Level.REQUEST, Level.CANDIDATE):
        count = np.zeros(extents(dims))
        for k in (0, 1):
            factors = [t * (w >= level) if j == k else t for j, (t, w) in enumerate(zip(there, wide, strict=True))]
            count = count + np.einsum(factors[0], list(terms[0]), factors[1], list(terms[1]), list(out))
        made[count > 0] = level
    return made


def mat_mul(f: Flow, orders: Sequence[Sequence[int]] | None = None, scales: int = 2) -> list[Made] | None:
    """A product of two matrices, or stacks of them.

    Args:
        f: The node.
        orders: The order in which the axes of each are taken.
        scales: The first input that is neither of them, but a part of each product: a scale, say.
    """
    sides = []
    for k in (0, 1):
        dims, levels, zeros = f.dim(k), f.level(k), f.zero(k)
        if orders is not None:
            dims = tuple(dims[a] for a in orders[k])
            levels, zeros = levels.transpose(orders[k]), None if zeros is None else zeros.transpose(orders[k])
        if len(dims) == 1:
            where_ = (0, -1)[k]
            dims = ((), *dims) if k == 0 else (*dims, ())
            levels = np.expand_dims(levels, where_)
            zeros = None if zeros is None else np.expand_dims(zeros, where_)
        sides.append((dims, levels, zeros))
    (left, a, za), (right, b, zb) = sides
    rest = _others(f, scales)
    if not left or not right or rest is None or _has_rows([left[-1], right[-2]]):
        return None
    batch = broadcast_dims([left[:-2], right[:-2]])
    dims = (*batch, left[-2], right[-1])
    if a.shape[-1] != b.shape[-2]:
        level = joined(dims, [along(a, [a.ndim - 1]), along(b, [b.ndim - 2])])
    else:
        letters = list(range(len(batch)))
        row, inner, column = len(batch), len(batch) + 1, len(batch) + 2
        terms = [
            [*letters[len(batch) - a.ndim + 2 :], row, inner],
            [*letters[len(batch) - b.ndim + 2 :], inner, column],
        ]
        level = _contracted([(a, za), (b, zb)], terms, [*letters, row, column], dims)
    level = np.maximum(level, np.int8(rest)) if rest else level
    made: list[Dim] = [*batch]
    if len(f.dim(0)) > 1:
        made.append(left[-2])
    if len(f.dim(1)) > 1:
        made.append(right[-1])
    shape = extents(tuple(made))
    return [Made(tuple(made), level.reshape(shape) if not is_uniform(level) else uniform(highest(level), tuple(made)))]


def gemm(f: Flow) -> list[Made] | None:
    """Gemm."""
    if len(f.dim(0)) != 2 or len(f.dim(1)) != 2:
        return None
    orders = [[1, 0] if f.attribute(name, 0) else [0, 1] for name in ("transA", "transB")]
    made = mat_mul(f, orders, scales=len(f.node.input))
    if made is None or not f.has(2):
        return made
    dims = broadcast_dims([made[0].dims, f.dim(2)])
    return [Made(dims, joined(dims, [made[0].levels, f.level(2)]))]


def einsum(f: Flow) -> list[Made] | None:
    """Einsum of any number of operands."""
    terms, out = einsum_terms(f.attribute("equation"), [len(d) if d is not None else 0 for d in f.dims])
    size: dict[str, Dim] = {}
    for k, term in enumerate(terms):
        if len(set(term)) < len(term):
            return alone(f)
        for c, d in zip(term, f.dim(k), strict=True):
            if size.get(c, ()) in ((), d):
                size[c] = d
            elif d != ():
                return None
    if _has_rows([d for c, d in size.items() if c not in out]):
        return None
    number = {c: k for k, c in enumerate(size)}
    sides = [(f.level(k), f.zero(k)) for k in range(len(terms))]
    dims = tuple(size[c] for c in out)
    return [Made(dims, _contracted(sides, [[number[c] for c in t] for t in terms], [number[c] for c in out], dims))]


def linear(f: Flow) -> list[Made] | None:
    """Rows of a matrix times constants of the node's own."""
    dims = (f.dim(0)[0], canonical([int(f.attribute("targets", 1))]))
    return None if _has_rows(f.dim(0)[1:]) else [Made(dims, joined(dims, [along(f.level(0), [1])]))]


def quantised(f: Flow) -> list[Made] | None:
    """A product of matrices each of which is followed by its scale and its zero point."""
    if any(f.has(k) and _has_rows(f.dim(k)) for k in (1, 2, 4, 5, 6, 7)):
        return None
    a, b = f.dim(0), f.dim(3)
    if len(a) < 2 or len(b) < 2 or _has_rows([a[-1], b[-2]]):
        return None
    dims = (*broadcast_dims([a[:-2], b[:-2]]), a[-2], b[-1])
    rest = max(highest(f.level(k)) for k in range(len(f.node.input)) if f.has(k) and k not in (0, 3))
    own = [along(f.level(0), [len(a) - 1]), along(f.level(3), [len(b) - 2])]
    return [Made(dims, joined(dims, [*own, np.full((1,) * len(dims), rest, np.int8)]))]


def whole_rows(f: Flow) -> list[Made] | None:
    """Rows along the first axis of every operand that has any; of each everything is taken in together."""
    dims = f.known(0)
    given = [k for k in range(len(f.node.input)) if f.has(k)]
    if any("~" in s for s in symbols(dims)) or any(_has_rows(f.dim(k)[1:]) for k in given):
        return None
    return [Made(dims, uniform(max(highest(f.level(k)) for k in given), dims))]


def recurrent(f: Flow) -> list[Made] | None:
    """GRU, LSTM and RNN: rows are the batch axis of every input."""
    x, hidden = f.dim(0), f.dim(2)[-1]
    batch = 0 if f.attribute("layout", 0) else 1
    if len(x) != 3 or _has_rows([d for k, d in enumerate(x) if k != batch]):
        return None
    given = [k for k in range(len(f.node.input)) if f.has(k)]
    if any(_has_rows(f.dim(k)) for k in (1, 2, 3) if k in given):
        return None
    rows, steps, both = x[batch], x[1 - batch], f.dim(1)[0]
    states = (rows, both, hidden) if batch == 0 else (both, rows, hidden)
    outputs = (rows, steps, both, hidden) if batch == 0 else (steps, both, rows, hidden)
    level = max(highest(f.level(k)) for k in given)
    return [Made(d, uniform(level, d)) for d in (outputs, states, states)][: len(f.node.output)]


def extents_only(f: Flow) -> list[Made] | None:
    """Extents: those of a request, whatever the candidates are."""
    dims = f.known(0)
    return [Made(dims, uniform(Level.REQUEST, dims))]


def skip_normalised(f: Flow) -> list[Made] | None:
    """A normalisation of the sum of two tensors of one shape along the last axis."""
    dims, rest = f.dim(0), _others(f, 2)
    if dims != f.dim(1) or rest is None or _has_rows(dims[-1:]):
        return None
    level = along(joined(dims, [f.level(0), f.level(1)]), [len(dims) - 1])
    return [Made(dims, joined(dims, [level, np.full((1,) * len(dims), rest, np.int8)]))]
