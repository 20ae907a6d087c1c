"""Data movement: arithmetic on index maps, at no cost, until somebody needs the entries side by side.

Where every operand has one level the user's own node stays; where levels are mixed no node is written here at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
from onnx import NodeProto

from onnxrank.facts import Extent
from onnxrank.operators import operator
from onnxrank.rewrite import Rewrite, Rule
from onnxrank.values import (
    Abstract,
    Codes,
    Dim,
    Dims,
    Level,
    Sum,
    Unrepresentable,
    Value,
    canonical,
    extents,
    is_candidate_symbol,
    keep_symbols,
    regroup,
    symbols,
    view,
    with_extents,
)

from .broadcast import attribute

Move = Callable[[Codes], Codes]
_PICKS = {"Split", "Slice", "Gather"}


def _data(rw: Rewrite, node: NodeProto) -> Value | Sum:
    found = rw.operand(node, 0)
    assert found is not None
    return rw.unless_sum(found)


def move(rw: Rewrite, node: NodeProto, x: Value | Sum, outputs: Sequence[tuple[Dims, Move]]) -> list[Abstract]:
    """Moves entries: by the user's own node if `x` is one tensor, else on the index map."""
    if isinstance(x, Sum):
        parts = [(dims, [view(dims, t.dtype, codes(t.codes)) for t in x.terms]) for dims, codes in outputs]
        pending = [{s.number for t in p for s in rw.sources.of(t.codes) if s.is_pending} for _, p in parts]
        if sum(map(len, pending)) == len(set().union(*pending)):
            return [rw.add(p, dims, x.dtype) for dims, p in parts]
        # A product that several results hold is better made with what is added to it.
        x = rw.settle(x)
    linear = operator(node) in _PICKS and all(rw.read_by_linear_maps(o) for o in node.output if o)
    if x.whole is not None and rw.keep_moves and not rw.is_open(x) and not linear:
        names = [rw.tensor(rw.value(node, k)) if i else "" for k, i in enumerate(node.input)]
        return rw.keep(node, names, [d for d, _ in outputs], rw.present(x))
    return [rw.tidy(dims, x.dtype, codes(x.codes)) for dims, codes in outputs]


def _target(rw: Rewrite, node: NodeProto) -> Sequence[Extent]:
    found = rw.facts.extents.get(node.output[0])
    if found is None:
        raise Unrepresentable(f"the shape of {node.output[0]} is not known")
    return found


def reshape(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Reshape and Flatten."""
    x = _data(rw, node)
    dims = regroup(x.dims, _target(rw, node))
    fixed = operator(node) == "Flatten" or rw.array(node, 1) is not None
    if isinstance(x, Value) and x.whole is not None and not fixed and rw.keep_moves and not rw.is_open(x):
        # The shape is computed at run time, perhaps from a tensor that has one row now.
        return [_reshaped(rw, node, x, dims)]
    return move(rw, node, x, [(dims, lambda c: c.reshape(extents(dims)))])


def _reshaped(rw: Rewrite, node: NodeProto, x: Value, dims: Dims) -> Value:
    assert x.whole is not None
    held = x.whole.symbols
    name = rw.layout.reshape(rw.layout.name_of(x.whole), x.whole.dims, keep_symbols(dims, held))
    return rw.new(dims, x.dtype, held, name)


def squeeze(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Squeeze; without axes, the axes are those that go at more than one candidate."""
    x = _data(rw, node)
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        given = rw.array(node, 1)
        if given is None:
            return None
        axes = given.tolist()
    implicit = axes is None
    if implicit and node.output[0] in rw.facts.unknown:
        raise Unrepresentable("squeezes the candidate axis too where there is a single candidate")
    if axes is None:
        axes = [k for k, d in enumerate(x.dims) if d == ()]
    gone = {a % x.rank for a in axes}
    if any(x.dims[a] != () for a in gone):
        raise Unrepresentable("squeezes an axis that is not 1")
    dims = tuple(d for k, d in enumerate(x.dims) if k not in gone)
    if implicit and isinstance(x, Value) and x.whole is not None and x.whole.dims != x.dims:
        return [_reshaped(rw, node, x, dims)]
    return move(rw, node, x, [(dims, lambda c: c.reshape(extents(dims)))])


def unsqueeze(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Unsqueeze."""
    x = _data(rw, node)
    axes = attribute(node, "axes")
    if axes is None:
        given = rw.array(node, 1)
        if given is None:
            return None
        axes = given.reshape(-1).tolist()
    rank = x.rank + len(axes)
    new = {a % rank for a in axes}
    old = iter(x.dims)
    dims = tuple(() if k in new else next(old) for k in range(rank))
    return move(rw, node, x, [(dims, lambda c: c.reshape(extents(dims)))])


def transpose(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Transpose."""
    x = _data(rw, node)
    perm = attribute(node, "perm") or list(range(x.rank))[::-1]
    return move(rw, node, x, [(tuple(x.dims[p] for p in perm), lambda c: c.transpose(perm))])


def _cut(dim: Dim, n: int) -> Dim:
    if symbols([dim]):
        raise Unrepresentable(f"cuts the extent {dim}")
    return canonical([n])


def slice_(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Slice along axes of constant extent; along others only if it takes everything."""
    x = _data(rw, node)
    starts, ends = rw.array(node, 1), rw.array(node, 2)
    axes = rw.array(node, 3) if len(node.input) > 3 and node.input[3] else None
    steps = rw.array(node, 4) if len(node.input) > 4 and node.input[4] else None
    if len(node.input) > 3 and node.input[3] and axes is None:
        return None
    if len(node.input) > 4 and node.input[4] and steps is None:
        return None
    count = len(starts) if starts is not None else len(axes) if axes is not None else x.rank
    on = [int(a) % x.rank for a in (axes if axes is not None else range(count))]
    seen = rw.facts.extents.get(node.output[0])
    index: list[slice] = [slice(None)] * x.rank
    dims = list(x.dims)
    cut: list[int] = []
    for k, a in enumerate(on):
        step = int(steps[k]) if steps is not None else 1
        if not symbols([x.dims[a]]) and starts is not None and ends is not None:
            index[a] = slice(*slice(int(starts[k]), _end(int(ends[k]), step), step).indices(extents(x.dims)[a]))
            if step < 0 and index[a].stop < 0:
                index[a] = slice(index[a].start, None, step)
            dims[a] = _cut(x.dims[a], len(range(extents(x.dims)[a])[index[a]]))
            continue
        if step != 1 or seen is None:
            raise Unrepresentable("a slice along a symbolic extent")
        if rw.facts.size_of(x.dims[a]) == rw.facts.sizes[node.output[0]][a]:
            continue  # for all extents it takes as many as there are, so it takes them all
        if any(map(is_candidate_symbol, symbols([x.dims[a]]))) or not isinstance(x, Value) or x.whole is None:
            raise Unrepresentable("a slice along a symbolic extent")
        known = rw.facts.dims(node.output[0])
        assert known is not None
        dims[a] = known[a]
        cut.append(a)
    out = tuple(dims)
    if cut:
        assert isinstance(x, Value)
        if any(symbols([x.dims[a]]) and not rw.present(x) >= set(symbols([x.dims[a]])) for a in cut):
            raise Unrepresentable("a slice of an axis that the tensor does not vary along")
        names = [rw.tensor(rw.value(node, k)) if i else "" for k, i in enumerate(node.input)]
        made = {s for a in cut for s in symbols([out[a]])}
        return rw.keep(node, names, [out], (rw.present(x) & set(symbols(out))) | made)
    if starts is None or ends is None:
        if out == x.dims:
            return [x]
        raise Unrepresentable("slice bounds computed at run time")
    return move(rw, node, x, [(out, lambda c: c[tuple(index)])])


def _end(end: int, step: int) -> int | None:
    return None if step < 0 and end < -(1 << 30) else end


def split(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Split."""
    x = _data(rw, node)
    axis = attribute(node, "axis", 0) % x.rank
    sizes = attribute(node, "split")
    if sizes is None and len(node.input) > 1 and node.input[1]:
        given = rw.array(node, 1)
        if given is None:
            return None
        sizes = given.tolist()
    n = extents(x.dims)[axis]
    if sizes is None:
        each = -(-n // len(node.output))
        sizes = [min(each, n - k * each) for k in range(len(node.output))]
    at = np.cumsum([0, *sizes])

    def part(k: int) -> tuple[Dims, Move]:
        dims = (*x.dims[:axis], _cut(x.dims[axis], sizes[k]), *x.dims[axis + 1 :])
        return dims, lambda c: c.take(np.arange(at[k], at[k + 1]), axis)

    return move(rw, node, x, [part(k) for k in range(len(sizes))])


def gather(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Gather of constant positions; a lookup in a table is another rule's."""
    ids = rw.array(node, 1)
    found = rw.operand(node, 0)
    if ids is None or found is None or rw.level(found) is Level.CONSTANT:
        return None
    x = _data(rw, node)
    axis = attribute(node, "axis", 0) % x.rank
    if symbols([x.dims[axis]]):
        return None
    n = extents(x.dims)[axis]
    at = np.where(ids < 0, ids + n, ids)
    dims = (*x.dims[:axis], *(canonical([k]) for k in ids.shape), *x.dims[axis + 1 :])
    return move(rw, node, x, [(dims, lambda c: np.take(c, at, axis))])


def gather_nd(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """GatherND of constant positions, as in the selection of a triangle."""
    ids = rw.array(node, 1)
    found = rw.operand(node, 0)
    if ids is None or found is None or rw.level(found) is Level.CONSTANT or attribute(node, "batch_dims", 0):
        return None
    x = _data(rw, node)
    width = ids.shape[-1]
    if any(symbols([d]) for d in x.dims[:width]):
        return None
    at = tuple(np.moveaxis(ids, -1, 0))
    dims = (*(canonical([k]) for k in ids.shape[:-1]), *x.dims[width:])
    return move(rw, node, x, [(dims, lambda c: c[at])])


def concat(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Concat: blocks along an axis of constant extent."""
    operands = [rw.operand(node, k) for k in range(len(node.input))]
    if any(isinstance(o, Sum) for o in operands) and rw.read_by_linear_maps(node.output[0]):
        return _concat_sums(rw, node, [rw.unless_sum(o) for o in operands if o is not None])
    values = [rw.value(node, k) for k in range(len(node.input))]
    rank = values[0].rank
    axis = attribute(node, "axis") % rank
    if any(symbols([v.dims[axis]]) for v in values):
        return _concat_symbolic(rw, node, values, axis)
    other = values[0].dims
    for v in values:
        if v.dims[:axis] + v.dims[axis + 1 :] != other[:axis] + other[axis + 1 :]:
            raise Unrepresentable("operands of differently factored shapes")
    dims = (*other[:axis], canonical([sum(extents(v.dims)[axis] for v in values)]), *other[axis + 1 :])
    held = {s for v in values for s in rw.present(v)}
    plain = all(
        v.whole is not None and v.whole.dims == keep_symbols(v.dims, held) and not rw.is_open(v) for v in values
    )
    if rw.keep_moves and plain:
        return rw.keep(node, [rw.tensor(v) for v in values], [dims], held)
    return [rw.tidy(dims, values[0].dtype, np.concatenate([v.codes for v in values], axis))]


def _concat_sums(rw: Rewrite, node: NodeProto, operands: list[Value | Sum]) -> list[Abstract]:
    """Pending sums stay pending: a sum of Concats, with zeros for operands of fewer terms."""
    axis = attribute(node, "axis") % operands[0].rank
    if any(symbols([o.dims[axis]]) for o in operands):
        raise Unrepresentable("joins along an extent that is not constant")
    dtype, other = operands[0].dtype, operands[0].dims
    if any(o.dims[:axis] + o.dims[axis + 1 :] != other[:axis] + other[axis + 1 :] for o in operands):
        raise Unrepresentable("operands of differently factored shapes")
    dims = (*other[:axis], canonical([sum(extents(o.dims)[axis] for o in operands)]), *other[axis + 1 :])
    terms = [rw.terms(o) for o in operands]
    zero = rw.zero(dtype)
    joined = []
    for k in range(max(len(t) for t in terms)):
        parts = [
            t[k].codes if k < len(t) else np.full(extents(o.dims), zero) for t, o in zip(terms, operands, strict=True)
        ]
        joined.append(view(dims, dtype, np.concatenate(parts, axis)))
    return [rw.add(joined, dims, dtype)]


def _concat_symbolic(rw: Rewrite, node: NodeProto, values: list[Value], axis: int) -> list[Abstract] | None:
    """Along an extent that is not constant: whole tensors, each with all rows that any of them has."""
    known = rw.facts.dims(node.output[0])
    if known is None or any(map(is_candidate_symbol, symbols(v.dims[axis] for v in values))):
        return None
    dims = (*values[0].dims[:axis], known[axis], *values[0].dims[axis + 1 :])
    values = [rw.held(v, symbols([v.dims[axis]])) for v in values]
    held = {s for v in values for s in rw.present(v)}
    if len({any(map(is_candidate_symbol, rw.present(v))) for v in values}) > 1:
        rw.refuse("movement", "it joins levels along an extent that is not constant, so all of it has all rows")
    names = [rw.rows_along(v, held) for v in values]
    return rw.keep(node, names, [dims], held | set(symbols([known[axis]])))


def pad(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Pad with a constant, of axes that do not go over rows."""
    x, pads = rw.value(node, 0), rw.array(node, 1)
    given = node.input[2] if len(node.input) > 2 else ""
    if pads is None or attribute(node, "mode", b"constant") != b"constant" or (len(node.input) > 3 and node.input[3]):
        return None
    before, after = pads.astype(int).reshape(2, -1).tolist()
    if min(*before, *after) < 0 or any(symbols([d]) for d, a, b in zip(x.dims, before, after, strict=True) if a or b):
        return None
    filler = rw.zero(x.dtype)
    if given:
        value = rw.value(node, 2)
        if value.whole is None or value.whole.level is not Level.CONSTANT or value.whole.size != 1:
            return None
        filler = int(value.codes.reshape(-1)[0])
    codes = np.pad(x.codes, list(zip(before, after, strict=True)), constant_values=filler)
    return [rw.tidy(with_extents(x.dims, codes.shape), x.dtype, codes)]


def expand(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Expand: broadcasting that is only noted."""
    x = _data(rw, node)
    seen = _target(rw, node)
    rank = len(seen)
    old = ((),) * (rank - x.rank) + x.dims
    dims = tuple(d if d != () else canonical([*syms, c]) for d, (c, syms) in zip(old, seen, strict=True))

    def wide(c: Codes) -> Codes:
        return np.broadcast_to(c.reshape((1,) * (rank - c.ndim) + c.shape), extents(dims))

    if isinstance(x, Sum):
        return [rw.moved(x, dims, wide)]
    if x.whole is not None and extents(dims) == extents(old) and rank == x.rank:
        return [Value(dims, x.dtype, x.whole)]
    if x.whole is not None and len(set(symbols(dims))) < len(symbols(dims)):
        # An axis that is there twice, as in a mask of queries and keys, cannot be followed entry by entry.
        held = rw.present(x) | {s for s in symbols(dims) if symbols(dims).count(s) > 1}
        physical, wanted = keep_symbols(old, rw.present(x)), keep_symbols(dims, held)
        lifted = rw.layout.reshape(rw.tensor(x), x.whole.dims, physical)
        return [rw.new(dims, x.dtype, held, rw.layout.expand(lifted, physical, wanted))]
    return [rw.tidy(dims, x.dtype, wide(x.codes))]


def tile(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Tile: repeats are the outer factor of a dimension."""
    x = rw.settle(_data(rw, node))
    dims: list[Dim] = []
    repeats: list[int] = []
    for d, (c, syms) in zip(x.dims, _target(rw, node), strict=True):
        have, mine = prod(f for f in d if isinstance(f, int)), list(symbols([d]))
        extra = list(syms)
        for s in mine:
            if s not in extra:
                raise Unrepresentable("repeats to an unknown extent")
            extra.remove(s)
        if c % have:
            raise Unrepresentable("repeats to an unknown extent")
        repeats.append(c // have)
        if extra and c // have > 1:
            raise Unrepresentable("repeats along two factors at once")
        dims.append(canonical([*extra, c // have, *d]))
    if x.whole is not None and prod(repeats) == 1:
        return [Value(tuple(dims), x.dtype, x.whole)]
    return [rw.tidy(tuple(dims), x.dtype, np.tile(x.codes, repeats))]


def shape(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Shape of a tensor that may have fewer rows now than it had: extents come from an input that has them."""
    x = rw.operand(node, 0)
    assert x is not None
    if isinstance(x, Value) and x.whole is not None and x.whole.dims == x.dims:
        return None
    if operator(node) == "Size":
        raise Unrepresentable("the number of entries of a tensor of several levels")
    start, end = attribute(node, "start", 0), attribute(node, "end", x.rank)
    wanted = x.dims[start:end]
    name = rw.layout.shape_vector(wanted)
    return [rw.new((canonical([len(wanted)]),), rw.dtype(node.output[0], 7), (), name)]


def identity(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Identity, and Casts to the type that the tensor has."""
    x = rw.operand(node, 0)
    if x is None or (operator(node) == "Cast" and attribute(node, "to") != x.dtype):
        return None
    if isinstance(x, Value) and x.whole is not None and x.whole.level is not Level.CONSTANT and rw.keep_moves:
        return None
    return [x]


RULE = Rule(
    name="movement",
    title="Follows data movement by index maps instead of copies.",
    identity="gather(concat(a, b), i) and all its kin are arithmetic on i",
    source="onnxrank",
    legal="Positions are constants, and the axis does not count candidates.",
    refuses="Movement along the candidate axis, by computed positions, or along extents that are not constant.",
    exactness="exact",
    operators={
        "Reshape": reshape,
        "Flatten": reshape,
        "Squeeze": squeeze,
        "Unsqueeze": unsqueeze,
        "Transpose": transpose,
        "Slice": slice_,
        "Split": split,
        "Gather": gather,
        "GatherND": gather_nd,
        "Concat": concat,
        "Pad": pad,
        "Expand": expand,
        "Tile": tile,
        "Shape": shape,
        "Size": shape,
        "Identity": identity,
        "Cast": identity,
    },
)
