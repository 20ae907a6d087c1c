"""Data movement: arithmetic on index maps, at no cost, until somebody needs the entries side by side.

Where every operand has one level the user's own node stays; where levels are mixed no node is written here at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import NodeProto

from onnxrank import moves
from onnxrank.contract import RULE as RULE_KEY
from onnxrank.graphs import attribute
from onnxrank.moves import Movement
from onnxrank.operators import Placed, Trait, find, having, operator, traits
from onnxrank.plans import LOOKUP
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    Abstract,
    Dims,
    Level,
    Sum,
    Unrepresentable,
    Value,
    canonical,
    extents,
    is_candidate_symbol,
    keep_symbols,
    symbols,
    view,
)

from . import picked
from .unstack import is_stack, is_summed

_PICKS = {"Split", "Slice", "Gather"}
_POSITIONS = frozenset(having(Trait.MOVEMENT | Trait.LOOKUP))


def placed(rw: Rewrite, node: NodeProto) -> Placed:
    """A node as the registry takes it."""
    dims = [rw.values[i].dims if i else None for i in node.input]
    return Placed(node, rw.emit.opset, (), (), dims, rw.facts, lambda k: rw.array(node, k))


def _data(rw: Rewrite, node: NodeProto) -> Value | Sum:
    found = rw.operand(node, 0)
    assert found is not None
    return rw.unless_sum(found)


def move(rw: Rewrite, node: NodeProto, x: Value | Sum, found: Sequence[Movement]) -> list[Abstract]:
    """Moves entries: by the user's own node if `x` is one tensor, else on the index map."""
    if isinstance(x, Sum):
        parts = [(m.dims, [view(m.dims, t.dtype, m.take(t.codes)) for t in x.terms]) for m in found]
        pending = [{s.number for t in p for s in rw.sources.of(t.codes) if s.is_pending} for _, p in parts]
        if sum(map(len, pending)) == len(set().union(*pending)):
            return [rw.add(p, dims, x.dtype) for dims, p in parts]
        # A product that several results hold is better made with what is added to it.
        x = rw.settle(x)
    linear = operator(node) in _PICKS and all(rw.read_by_linear_maps(o) for o in node.output if o)
    # Positions computed of the number of rows hold for tensors that have them all.
    told = all(rw.array(node, k) is not None for k, i in enumerate(node.input) if k and i)
    entire = x.whole is not None and (told or x.whole.dims == x.dims)
    if entire and not rw.is_open(x) and not linear and not _of_lookup(rw, node) and not _turned_back(rw, node):
        names = [rw.tensor(rw.value(node, k)) if i else "" for k, i in enumerate(node.input)]
        return rw.keep(node, names, [m.dims for m in found], rw.present(x))
    return [rw.tidy(m.dims, x.dtype, m.take(x.codes)) for m in found]


def _of_lookup(rw: Rewrite, node: NodeProto) -> bool:
    """Whether a node only brings ids to a joined lookup, or rows away from it: entries are followed there."""

    def judge(reader: NodeProto, name: str) -> bool | None:
        if _is_joined(reader):
            return True
        return None if traits(reader) & Trait.MOVEMENT and reader.input[0] == name else False

    def join(name: str, found: list[bool]) -> bool:
        return name not in rw.outputs and bool(found) and all(found)

    return _is_joined(node) or all(rw.graph.behind(o, LOOKUP, judge, join) for o in node.output if o)


def _turned_back(rw: Rewrite, node: NodeProto) -> bool:
    """Whether a Transpose is undone behind steps by entries or channels: then these are made as entries lie."""
    if operator(node) != "Transpose":
        return False
    axes = range(rw.values[node.input[0]].rank)
    order = list(attribute(node, "perm") or axes[::-1])
    back = [order.index(k) for k in axes]

    def judge(reader: NodeProto, name: str) -> bool | None:
        if operator(reader) == "Transpose":
            return list(attribute(reader, "perm") or axes[::-1]) == back
        return None if Trait.ELEMENTWISE in traits(reader) or operator(reader) == "BatchNormalization" else False

    def join(name: str, found: list[bool]) -> bool:
        return name not in rw.outputs and bool(found) and all(found)

    (made,) = node.output
    return rw.graph.behind(made, ("turned back", *back), judge, join)


def _is_joined(node: NodeProto) -> bool:
    return any(p.key == RULE_KEY and p.value == LOOKUP for p in node.metadata_props)


def moved(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Whatever the registry says how to move."""
    entry, x = find(node), rw.operand(node, 0)
    if entry is None or entry.move is None or x is None:
        return None
    if operator(node) in _POSITIONS and rw.level(x) is Level.CONSTANT:
        return None  # a lookup in a table is another rule's
    found = entry.move(placed(rw, node))
    return None if found is None else move(rw, node, _data(rw, node), found)


def reshape(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Reshape and Flatten."""
    x, (found,) = _data(rw, node), moves.reshape(placed(rw, node))
    fixed = operator(node) == "Flatten" or rw.array(node, 1) is not None
    if isinstance(x, Value) and x.whole is not None and not fixed and not rw.is_open(x):
        # The shape is computed at run time, perhaps from a tensor that has one row now.
        return [_reshaped(rw, node, x, found.dims)]
    return move(rw, node, x, [found])


def _reshaped(rw: Rewrite, node: NodeProto, x: Value, dims: Dims) -> Value:
    assert x.whole is not None
    held = x.whole.symbols
    name = rw.layout.reshape(rw.layout.name_of(x.whole), x.whole.dims, keep_symbols(dims, held))
    return rw.new(dims, x.dtype, held, name)


def squeeze(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Squeeze; without axes, the axes are those that go at more than one candidate."""
    found, x = moves.squeeze(placed(rw, node)), _data(rw, node)
    if found is None:
        return None
    implicit = attribute(node, "axes") is None and not node.input[1:]
    if implicit and isinstance(x, Value) and x.whole is not None and x.whole.dims != x.dims:
        return [_reshaped(rw, node, x, found[0].dims)]
    return move(rw, node, x, found)


def slice_(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Slice along axes of constant extent; along others by the node itself, or if it takes everything."""
    x, cut = _data(rw, node), moves.cut(placed(rw, node))
    if cut is None:
        return None
    if not cut.along:
        found = moves.slice_(placed(rw, node))
        assert found is not None
        taken = cut.told or any(at != slice(None) for at in cut.index)
        return move(rw, node, x, found) if taken else [x]
    if not isinstance(x, Value) or x.whole is None:
        raise Unrepresentable("a slice along a symbolic extent")
    if any(not rw.present(x) >= set(symbols([x.dims[a]])) for a in cut.along):
        raise Unrepresentable("a slice of an axis that the tensor does not vary along")
    names = [rw.tensor(rw.value(node, k)) if i else "" for k, i in enumerate(node.input)]
    made = {s for a in cut.along for s in symbols([cut.dims[a]])}
    return rw.keep(node, names, [cut.dims], (rw.present(x) & set(symbols(cut.dims))) | made)


def concat(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Concat: blocks along an axis."""
    operands = [rw.operand(node, k) for k in range(len(node.input))]
    if any(isinstance(o, Sum) for o in operands) and rw.read_by_linear_maps(node.output[0]):
        return _concat_sums(rw, node, [rw.unless_sum(o) for o in operands if o is not None])
    values = [rw.value(node, k) for k in range(len(node.input))]
    rank = values[0].rank
    axis = attribute(node, "axis") % rank
    if any(symbols([v.dims[axis]]) for v in values) and not all(
        any(map(is_candidate_symbol, symbols([v.dims[axis]]))) for v in values
    ):
        return _concat_symbolic(rw, node, values, axis)
    (joined,) = moves.concat(placed(rw, node))
    held = {s for v in values for s in rw.present(v)}
    plain = all(
        v.whole is not None and v.whole.dims == keep_symbols(v.dims, held) and not rw.is_open(v) for v in values
    )
    if any(map(picked.of, values)) and rw.read_by_linear_maps(node.output[0]):
        plain = False
    made = joined.take(*(v.codes for v in values))
    stack = is_stack(rw, made, axis) and is_summed(rw, node.output[0], rank, axis)
    if plain and not stack and not _of_lookup(rw, node):
        return rw.keep(node, [rw.tensor(v) for v in values], [joined.dims], held)
    return [rw.tidy(joined.dims, values[0].dtype, made)]


def _concat_sums(rw: Rewrite, node: NodeProto, operands: list[Value | Sum]) -> list[Abstract]:
    """Pending sums stay pending: a sum of Concats, with zeros for operands of fewer terms."""
    (joined,) = moves.concat(placed(rw, node))
    terms, dtype = [rw.terms(o) for o in operands], operands[0].dtype
    zero = rw.zero(dtype)
    made = []
    for k in range(max(len(t) for t in terms)):
        parts = [
            t[k].codes if k < len(t) else np.full(extents(o.dims), zero) for t, o in zip(terms, operands, strict=True)
        ]
        made.append(view(joined.dims, dtype, joined.take(*parts)))
    return [rw.add(made, joined.dims, dtype)]


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
    """Pad with a constant, of axes that do not go over rows, entry by entry; `broadcast` has all others."""
    found, x = moves.padding(placed(rw, node)), rw.value(node, 0)
    if found is None:
        return None
    filler = rw.zero(x.dtype)
    if len(node.input) > 2 and node.input[2]:
        value = rw.value(node, 2)
        if value.whole is None or value.whole.level is not Level.CONSTANT or value.whole.size != 1:
            return None
        filler = int(value.codes.reshape(-1)[0])
    dims, around = found
    return [rw.tidy(dims, x.dtype, np.pad(x.codes, around, constant_values=filler))]


def expand(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Expand: broadcasting that is only noted."""
    x, (found,) = _data(rw, node), moves.expand(placed(rw, node))
    if isinstance(x, Sum):
        return [rw.moved(x, found.dims, found.take)]
    dims, rank = found.dims, len(found.dims)
    old = ((),) * (rank - x.rank) + x.dims
    if x.whole is not None and extents(dims) == extents(old) and rank == x.rank:
        return [Value(dims, x.dtype, x.whole)]
    if x.whole is not None and len(set(symbols(dims))) < len(symbols(dims)):
        # An axis that is there twice, as in a mask of queries and keys, cannot be followed entry by entry.
        held = rw.present(x) | {s for s in symbols(dims) if symbols(dims).count(s) > 1}
        physical, wanted = keep_symbols(old, rw.present(x)), keep_symbols(dims, held)
        lifted = rw.layout.reshape(rw.tensor(x), x.whole.dims, physical)
        return [rw.new(dims, x.dtype, held, rw.layout.expand(lifted, physical, wanted))]
    return [rw.tidy(dims, x.dtype, found.take(x.codes))]


def tile(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Tile: repeats are the outer factor of a dimension."""
    x, (found,) = rw.settle(_data(rw, node)), moves.tile(placed(rw, node))
    if x.whole is not None and extents(found.dims) == extents(x.dims):
        return [Value(found.dims, x.dtype, x.whole)]
    return [rw.tidy(found.dims, x.dtype, found.take(x.codes))]


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
    name = rw.layout.sizes.vector(wanted)
    return [rw.new((canonical([len(wanted)]),), rw.dtype(node.output[0], 7), (), name)]


def identity(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Identity, and Casts to the type that the tensor has."""
    x = rw.operand(node, 0)
    if x is None or (operator(node) == "Cast" and attribute(node, "to") != x.dtype):
        return None
    if isinstance(x, Value) and x.whole is not None and x.whole.level is not Level.CONSTANT:
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
        **dict.fromkeys(having(Trait.MOVEMENT), moved),
        "Reshape": reshape,
        "Flatten": reshape,
        "Squeeze": squeeze,
        "Slice": slice_,
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
