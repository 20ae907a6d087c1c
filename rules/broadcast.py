"""`broadcast`: what does not depend on the candidate is computed for one row.

Broadcasting is pushed as far down as it goes: an operator that treats rows (or the entries along any other axis)
independently gives, on equal rows, equal rows, so it may run on one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from onnxrank.graphs import attribute as attribute
from onnxrank.grouping import Group, groups, permuted, restored
from onnxrank.operators import Trait, having, matmul_order, operator, traits
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    HOLE,
    Abstract,
    Codes,
    Deferred,
    Dim,
    Dims,
    Level,
    OpenProduct,
    Source,
    Sum,
    Value,
    broadcast_dims,
    canonical,
    codes_of,
    constant_along,
    cut_repeats,
    extended,
    extents,
    is_candidate_symbol,
    keep_symbols,
    split_axis,
    split_merged,
    stream,
    symbols,
    view,
    with_extents,
)

from . import fold, unstack

ELEMENTWISE = having(Trait.ELEMENTWISE)
_LARGEST_SCALED = 1 << 18
_COMMUTATIVE = {"Add", "Mul", "Max", "Min"}
_FIRST_DECIDES = {"PRelu"}
"""Elementwise operators whose first operand has the result's shape: the others are broadcast to it."""
_NORMALISE = {
    *("Softmax", "LogSoftmax", "Hardmax", "LpNormalization"),
    *("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
}
"""Operators that keep the shape, and whose axis is an attribute, the last one if there is none."""


def result_type(rw: Rewrite, node: NodeProto, values: Sequence[Value]) -> int:
    """Element type of an elementwise operator's result."""
    if Trait.BOOLEAN in traits(node):
        return int(TensorProto.BOOL)
    if operator(node) == "Cast":
        return int(attribute(node, "to"))
    if operator(node) in ("Where", "CastLike", "DequantizeLinear"):
        return values[1].dtype
    return rw.dtype(node.output[0], values[0].dtype)


def pointwise(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Elementwise operators, of any number of operands, with numpy's broadcasting."""
    present = [k for k, i in enumerate(node.input) if i]
    values = [rw.value(node, k) for k in present]
    return [_elementwise(rw, node, values, present, result_type(rw, node, values))]


def elementwise(rw: Rewrite, op: str, values: Sequence[Value], output: str) -> Value:
    """An elementwise operator that the original graph does not hold.

    Args:
        rw: The rewrite.
        op: Operator type.
        values: Operands.
        output: The original tensor that the result is, or belongs to.
    """
    node = helper.make_node(op, [f"operand{k}" for k in range(len(values))], [output], name=output)
    return _elementwise(rw, node, values, list(range(len(values))), values[op == "Where"].dtype)


def _elementwise(rw: Rewrite, node: NodeProto, values: Sequence[Value], present: list[int], dtype: int) -> Value:
    values = rw.fitted(values)
    dims = broadcast_dims([v.dims for v in values])
    same = _neutral(node, values, dims)
    if same is not None:
        return same
    unread = rw.needed.get(node.output[0])
    if not unread and _merges_differently(rw, values, dims):
        split = split_merged(dims)
        apart = [as_split(v, dims) for v in values]
        made = _elementwise(rw, node, apart, present, dtype)
        assert made.dims == split
        return rw.tidy(dims, dtype, made.codes.reshape(extents(dims)))
    if all(v.whole is not None for v in values) and not unread:
        scaled = _scaled(rw, node, values, dims, dtype)
        if scaled is not None:
            return scaled
        held = {s for v in values for s in rw.present(v)}
        if operator(node) in _FIRST_DECIDES:
            values = [rw.held(values[0], held), *values[1:]]
        names = dict(zip(present, (rw.tensor(v) for v in values), strict=True))
        (kept,) = rw.keep(node, [names.get(k, "") for k in range(len(node.input))], [dims], held, dtype=dtype)
        return rw.settle(kept)
    rank = len(dims)
    wide = [np.broadcast_to(v.codes.reshape((1,) * (rank - v.rank) + v.codes.shape), extents(dims)) for v in values]
    if unread:
        wide = [mark_unread(w, unread) for w in wide]
    ranks = [v.rank for v in values]
    out = np.full(extents(dims), HOLE)
    # A tensor that is there as one would have to be cut up: then the other operand is rather brought to its rows.
    entire = any(v.whole is not None and v.whole.level is Level.CANDIDATE for v in values)
    if operator(node) == "Mul" and rw.uses("fold") and entire:
        # But for products that a linear map reads: those with a request-level entry fold into it, and what is only
        # multiplied by a factor per row is mapped once.
        single = all(v.whole is None or v.whole.size == 1 for v in values)
        narrow = dims[-1] != () and all(v.whole is None or v.dims[-1:] == ((),) for v in values)
        through = {"Add", "Mul", "Gather", "Split"} if narrow else {"Add"} if single else set()
        entire = not rw.read_by_linear_maps(node.output[0], frozenset(through))
    outer = _is_outer(wide)
    if not entire and operator(node) in _COMMUTATIVE and len(wide) == 2 and ranks[0] == ranks[1]:
        wide = _ordered(rw, wide)
    keys = rw.grouping.joint_levels(wide) if entire else _kinds(rw, wide, outer)
    if operator(node) == "Mul" and len(wide) == 2 and rw.uses("fold"):
        keys = _by_factors(rw, wide, keys)
    orders = rw.grouping.memory_order(wide)
    wide, keys = [permuted(w, orders) for w in wide], permuted(keys, orders)
    boxes = unstack.apart(rw, node.output[0], wide) or rw.grouping.boxes(wide)
    alone = len(boxes) == 1 and not orders
    for box in boxes:
        some = [w[box] for w in wide]
        part = np.full(some[0].shape, HOLE)
        for group in groups(keys[box], with_extents(dims, part.shape)):
            parts = [group.take(w) for w in some]
            group.put(part, _group(rw, node, group, parts, ranks, present, dtype, alone))
        out[box] = part
    return rw.tidy(dims, dtype, restored(out, orders))


def _merges_differently(rw: Rewrite, values: Sequence[Value], dims: Dims) -> bool:
    """Whether a dimension like `N * 50` meets one that holds 50 entries only: then neither is 1, nor are they equal."""
    merged = {s for d in dims if len(d) > 1 for s in symbols([d])}
    return bool(merged) and len({frozenset(merged & rw.present(v)) for v in values if v.rank}) > 1


def _repeats_differ(rw: Rewrite, parts: Sequence[Codes], dims: Dims) -> bool:
    """The same for entries of one level, which may also repeat along the constant part of a merged dimension."""
    merged = [k for k, d in enumerate(dims) if len(d) > 1]
    held = {s for k in merged for s in symbols([dims[k]])}
    parts = [p for p in parts if p.size > 1 or rw.sources.symbols(p)]
    kinds = {
        (frozenset(held & rw.sources.symbols(p)), tuple(constant_along(p, k) for k in merged)) for p in parts if merged
    }
    return len(kinds) > 1


def as_split(value: Value, dims: Dims) -> Value:
    """An operand with the dimensions apart that are merged in the result."""
    own: list[Dim] = []
    for d, whole in zip(value.dims, dims[len(dims) - value.rank :], strict=True):
        own += [(f,) for f in d] if len(whole) > 1 and d else [()] * max(1, len(whole)) if len(whole) > 1 else [d]
    return view(tuple(own), value.dtype, value.codes.reshape(extents(tuple(own))))


def _scaled(rw: Rewrite, node: NodeProto, values: Sequence[Value], dims: Dims, dtype: int) -> Value | None:
    """A product of a request-level and a candidate-level tensor, which is written when somebody needs it as it is."""
    if operator(node) != "Mul" or len(values) != 2 or not rw.uses("fold") or prod(extents(dims)) > _LARGEST_SCALED:
        return None
    low, high = sorted(values, key=rw.level)
    if (rw.level(low), rw.level(high)) != (Level.REQUEST, Level.CANDIDATE):
        return None
    held = rw.present(low) | rw.present(high)
    made = _ScaledTensor(rw, node, values, (low, high), dims)
    return Value(dims, dtype, rw.defer(keep_symbols(dims, held), dtype, made, None))


@dataclass(eq=False)
class _ScaledTensor(OpenProduct):
    """The user's own Mul of two tensors.

    Attributes:
        rw: The rewrite.
        node: The node.
        values: Its operands.
        by_level: The same, the request-level one first.
        dims: Logical shape.
    """

    rw: Rewrite
    node: NodeProto
    values: Sequence[Value]
    by_level: tuple[Value, Value]
    dims: Dims

    def materialise(self) -> str:
        rw, output = self.rw, self.node.output[0]
        name = rw.claim(output) or rw.emit.fresh(output)
        rw.emit.copy(self.node, [rw.tensor(v) for v in self.values], [name])
        return name

    def factors(self) -> tuple[Codes, Codes]:
        shape = extents(self.dims)
        low, high = (
            np.broadcast_to(v.codes.reshape((1,) * (len(shape) - v.rank) + v.codes.shape), shape) for v in self.by_level
        )
        return low[..., None], high[..., None]


def _ordered(rw: Rewrite, wide: list[Codes]) -> list[Codes]:
    """Operands of a commutative operator, the entry of the lower level first."""
    first, second = (rw.sources.levels(w) for w in wide)
    swap = first > second
    return [np.where(swap, wide[1], wide[0]), np.where(swap, wide[0], wide[1])]


def _kinds(rw: Rewrite, wide: list[Codes], outer: bool) -> Any:
    """A key per entry: its level, and where that keeps to one axis, which operands have which.

    Told apart like that, no operand has to be brought to full rows only because other entries of it have them.

    Args:
        rw: The rewrite.
        wide: The operands.
        outer: Whether the blocks of an outer product may be told apart, too, which keep to two axes.
    """
    joint = rw.grouping.joint_levels(wide)
    keys = joint.copy()
    for w in wide:
        keys = keys * 4 + rw.sources.levels(w)
    keys = np.where(joint == Level.UNREAD, Level.UNREAD, keys * 4 + joint)
    several = len(np.unique(keys)) > len(np.unique(joint))
    return keys if several and (outer or split_axis(keys) is not None) else joint


def _is_outer(wide: list[Codes]) -> bool:
    """Whether each of two operands varies along an axis of its own: as blocks of one level none has to be repeated."""
    along = [{k for k in range(w.ndim) if w.shape[k] > 1 and not constant_along(w, k)} for w in wide]
    return len(wide) == 2 and all(a - b for a, b in (along, along[::-1]))


def mark_unread(codes: Codes, needed: dict[int, Any]) -> Codes:
    """Codes with a hole wherever nobody reads."""
    out = codes.copy()
    for axis, positions in needed.items():
        at = np.ones(codes.shape[axis], bool)
        at[positions] = False
        out[tuple(at if k == axis else slice(None) for k in range(codes.ndim))] = HOLE
    return out


def _group(
    rw: Rewrite,
    node: NodeProto,
    group: Group,
    parts: list[Codes],
    ranks: list[int],
    present: list[int],
    dtype: int,
    whole: bool,
) -> Codes:
    """Writes the node for the entries of one level; entries that are equal are computed once.

    Args:
        rw: The rewrite.
        node: The node.
        group: The entries.
        parts: Codes of the operands.
        ranks: Ranks of the operands.
        present: Which inputs of the node the operands are.
        dtype: Element type of the result.
        whole: Whether these may be all entries.
    """
    dims, shape = group.dims, parts[0].shape

    def again(parts: list[Codes], dims: Dims) -> Codes:
        """The same entries in another shape."""
        turned = Group(group.level, ..., dims)
        return _group(rw, node, turned, parts, _raised(ranks, dims), present, dtype, False)

    if operator(node) == "Mul" and len(parts) == 2 and group.level is Level.CANDIDATE and rw.uses("fold"):
        parts = _factors_first(rw, node, parts, dims)
    if _repeats_differ(rw, parts, dims):
        split = split_merged(dims)
        return again([p.reshape(extents(split)) for p in parts], split).reshape(shape)
    order = _memory_order(rw, parts, dims)
    if order is not None:
        made = again([p.transpose(order) for p in parts], tuple(dims[k] for k in order))
        return made.transpose(np.argsort(order))
    source = _as_it_lies(rw, parts, dims)
    if source is not None:
        return again([codes_of(source)], source.dims).reshape(shape)
    return _written(rw, node, group, parts, ranks, present, dtype, whole)


def _written(
    rw: Rewrite,
    node: NodeProto,
    group: Group,
    parts: list[Codes],
    ranks: list[int],
    present: list[int],
    dtype: int,
    whole: bool,
) -> Codes:
    """The same for entries in the shape and the order in which they are to be made."""
    dims, shape = group.dims, parts[0].shape
    for axis in range(len(dims)):
        if all(constant_along(p, axis) or p.shape[axis] == 1 for p in parts):
            parts = [p.take([0], axis) for p in parts]
    keep = extended(dims, {s for part in parts for s in rw.sources.symbols(part)})
    # Several tensors would each have to be reshaped.
    if len(keep) < len(dims) and group.level is not Level.CONSTANT and all(len(rw.sources.of(p)) == 1 for p in parts):
        whole = False
        ranks = [sum(k >= len(dims) - r for k in keep) for r in ranks]
        dims, parts = tuple(dims[k] for k in keep), [p.reshape([p.shape[k] for k in keep]) for p in parts]
    now = tuple(shape[k] for k in keep) if len(dims) < len(shape) else shape
    repeats = _repeats(parts)
    if repeats is not None:
        unique, spread = repeats
        syms = tuple((s,) for s in symbols(dims))
        parts, dims = [unique.reshape((1,) * len(syms) + (-1,))], (*syms, (1,))
        ranks = _raised(ranks, dims)
    small = with_extents(dims, np.broadcast_shapes(*(p.shape for p in parts)))
    whole = whole and group.index is Ellipsis and repeats is None and parts[0].shape == now
    physical = keep_symbols(small, {s for part in parts for s in rw.sources.symbols(part)})
    lowered = group.level is Level.REQUEST and any(is_candidate_symbol(s) for s in symbols(group.dims))
    fewer = prod(extents(small)) < prod(shape)

    opens = group.level is Level.CANDIDATE and _multiplies_levels(rw, node, parts, extents(small))
    kind = _ProductOfEntries if opens else _NodeOfEntries
    step = kind(rw, node, group.level, parts, ranks, present, dims, small, whole)
    tag, part = "broadcast" if lowered or fewer else None, rw.grouping.is_part(parts)
    if opens:
        codes = codes_of(rw.defer(physical, dtype, step, tag, part=part))
    else:
        with rw.emit.under(tag):
            codes = codes_of(rw.sources.add(physical, dtype, step.materialise(), part=part))
    made = codes if repeats is None else codes.reshape(-1)[spread]
    return np.broadcast_to(made, now).reshape(shape)


def _repeats(parts: Sequence[Codes]) -> tuple[Codes, Codes] | None:
    """The different entries of a single operand, and which of them each one is; None where few are equal."""
    if len(parts) > 1 or parts[0].size <= 1:
        return None
    unique, inverse = np.unique(parts[0].reshape(-1), return_inverse=True)
    return (unique, inverse.reshape(parts[0].shape)) if 2 * unique.size <= parts[0].size else None


def _raised(ranks: Sequence[int], dims: Dims) -> list[int]:
    """Ranks of operands that get the dimensions of a result; scalars stay that, for some operators take no others."""
    return [len(dims) if rank else 0 for rank in ranks]


def _as_it_lies(rw: Rewrite, parts: Sequence[Codes], dims: Dims) -> Source | None:
    """The tensor of which a single operand is a reshape: the step rather follows it, and may be fused with it."""
    found = rw.sources.of(parts[0])
    if len(parts) != 1 or len(found) != 1 or found[0].size != parts[0].size or found[0].level is not Level.CANDIDATE:
        return None
    physical = keep_symbols(dims, found[0].symbols)
    if physical == found[0].dims or stream(physical) != stream(found[0].dims):
        return None
    return found[0] if np.array_equal(parts[0].reshape(-1), codes_of(found[0]).reshape(-1)) else None


def _memory_order(rw: Rewrite, parts: Sequence[Codes], dims: Dims) -> list[int] | None:
    """The order of axes in which all candidate-level operands lie in memory, where that is another than they have."""
    orders = set()
    for part in parts:
        small = cut_repeats(part)
        if rw.sources.levels(small).max() == Level.CANDIDATE and small.size > 1:
            orders.add(tuple(rw.layout.native_order(small, with_extents(dims, small.shape)) or ()))
    (order,) = orders if len(orders) == 1 else ((),)
    return list(order) or None


def _scaled_rows(rw: Rewrite, codes: Codes) -> NDArray[np.bool_]:
    """Entries of rows that are a candidate-level factor times a request-level vector, not made yet.

    Of one row alone none are: what is made apart for each of many rows costs more steps than it saves.
    """
    rows = np.asarray(fold.is_open(rw, codes).all(-1))
    if rows.size < 2 or codes.shape[-1] < 2:
        rows = np.zeros_like(rows)
    if rows.any():
        once, each = fold.expand(rw, codes[rows])
        rows[rows] = (each == each[:, :1]).all((-1, -2)) & (once.shape[-1] == 1)
    return np.broadcast_to(rows[..., None], codes.shape)


def _by_factors(rw: Rewrite, wide: Sequence[Codes], keys: Any) -> Any:
    """The keys of groups, with rows of two such operands apart from others, where that keeps to one axis."""
    if wide[0].ndim == 0:
        return keys
    both = _scaled_rows(rw, wide[0]) & _scaled_rows(rw, wide[1])
    if not both.any() or both.all():
        return keys
    apart = np.where(keys < 0, keys, keys + ((both * (int(keys.max()) // 4 + 1)) << 2))
    return apart if split_axis(apart) is not None else keys


def _factors_first(rw: Rewrite, node: NodeProto, parts: list[Codes], dims: Dims) -> list[Codes]:
    """`(s u) (t v) = (u v) (s t)` for factors `s`, `t` per candidate: the first bracket once, the second narrow."""
    wide = [np.broadcast_to(p, extents(dims)) for p in parts]
    if not dims or not all(_scaled_rows(rw, w).all() for w in wide):
        return parts
    (a, s), (b, t) = (fold.expand(rw, w) for w in wide)
    dtype, narrow = rw.sources.of(a)[0].dtype, (*dims[:-1], ())
    once = elementwise(
        rw, "Mul", [view(dims, dtype, c[..., 0]) for c in (a, b)], rw.emit.fresh(f"{node.output[0]}/once")
    )
    each = [view(narrow, dtype, c[..., :1, 0]) for c in (s, t)]
    factor = elementwise(rw, "Mul", each, rw.emit.fresh(f"{node.output[0]}/factor"))
    return [once.codes, factor.codes]


@dataclass(eq=False)
class _NodeOfEntries(Deferred):
    """A node of the model over some of its entries.

    Attributes:
        rw: The rewrite.
        node: The node.
        level: The level of the entries.
        parts: Codes of the operands.
        ranks: Their ranks.
        present: Which inputs of the node they are.
        dims: Shape of what the operands are taken from.
        small: Shape of the result, where it has several entries.
        whole: Whether these are all entries, so that the tensor may keep its name.
    """

    rw: Rewrite
    node: NodeProto
    level: Level
    parts: Sequence[Codes]
    ranks: Sequence[int]
    present: Sequence[int]
    dims: Dims
    small: Dims
    whole: bool

    def materialise(self) -> str:
        rw, node = self.rw, self.node
        names = [""] * len(node.input)
        for k, part, rank in zip(self.present, self.parts, self.ranks, strict=True):
            names[k] = (
                self._decisive(part) if k == 0 and operator(node) in _FIRST_DECIDES else self._operand(part, rank)
            )
        name = rw.claim(node.output[0]) if self.whole else None
        name = name or rw.emit.fresh(f"{node.output[0]}/{self.level.name.lower()}")
        rw.emit.copy(node, names, [name])
        return name

    def _decisive(self, part: Codes) -> str:
        """The operand that has the shape of the result."""
        held = {s for p in self.parts for s in self.rw.sources.symbols(p)}
        physical = keep_symbols(self.small, held)
        return self.rw.layout.realise(np.broadcast_to(part, extents(self.small)), physical, full=True)[0]

    def _operand(self, part: Codes, rank: int) -> str:
        part = cut_repeats(part)
        lead = part.ndim - rank
        if lead > 0 and all(n == 1 for n in part.shape[:lead]):
            part = part.reshape(part.shape[lead:])
        own = with_extents(self.dims[len(self.dims) - part.ndim :], part.shape)
        return self.rw.layout.realise(part, own)[0]


class _ProductOfEntries(_NodeOfEntries, OpenProduct):
    """A product of request-level with candidate-level entries."""

    def factors(self) -> tuple[Codes, Codes]:
        rw, shape = self.rw, extents(self.small)
        once, each = (np.broadcast_to(p, shape) for p in self.parts)
        if not fold.is_open(rw, each).all():
            return once[..., None], each[..., None]
        # A product that was put off itself: its request-level factor takes the other.
        left, right = fold.expand(rw, each)
        dims = tuple(canonical([n]) for n in shape)
        values = [view(dims, rw.sources.of(each)[0].dtype, c) for c in (once, left[..., 0])]
        if left.shape[-1] > 1 or rw.sources.symbols(once) | rw.sources.symbols(left):
            return once[..., None], each[..., None]
        name = rw.emit.fresh(f"{self.node.output[0]}/request")
        return elementwise(rw, "Mul", values, name).codes[..., None], right


def _multiplies_levels(rw: Rewrite, node: NodeProto, parts: list[Codes], shape: tuple[int, ...]) -> bool:
    """Whether a node multiplies request-level with candidate-level entries, and is better put off."""
    if operator(node) != "Mul" or len(parts) != 2 or not rw.uses("fold") or prod(shape) > _LARGEST_SCALED:
        return False
    low, high = (rw.sources.levels(p) for p in parts)
    return bool(low.max() == Level.REQUEST and high.min() == Level.CANDIDATE)


def _neutral(node: NodeProto, values: Sequence[Value], dims: Dims) -> Value | None:
    """`x + 0` with a zero that only carries rows: exporters make accumulators of N zeros this way."""
    if operator(node) not in ("Add", "Sum") or len(values) != 2:
        return None
    for zero, other in (values, values[::-1]):
        whole = zero.whole
        if whole is not None and whole.level is Level.CONSTANT and symbols(zero.dims) and not whole.data.any():
            if extents(other.dims) == extents(dims)[len(dims) - other.rank :] and other.rank == len(dims):
                return Value(dims, other.dtype, other.whole, None if other.whole else other.codes)
    return None


def add(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """An addition of parts that vary along different axes stays a pending sum."""
    operands = [rw.operand(node, k) for k in range(len(node.input))]
    unread = rw.needed.get(node.output[0])
    if any(o is None for o in operands) or len(operands) != 2:
        return None
    if unread and not any(isinstance(o, Sum) for o in operands):
        return None
    if rw.read_by_linear_maps(node.output[0], frozenset({"Add"})):
        operands = [fold.apart(rw, o) if isinstance(o, Value) else o for o in operands]
    for k, o in enumerate(operands):
        if isinstance(o, Sum) and fold.has_open(rw, o):
            other = operands[1 - k]
            assert other is not None
            terms = [*o.terms, *rw.terms(other)]
            if operator(node) == "Sub" or broadcast_dims([t.dims for t in terms]) != o.dims:
                break
            return [fold.compact(rw, terms, o.dims, o.dtype)]
    # What others read too is made once, not once for each.
    operands = [
        rw.settle(o) if o is not None and len(rw.readers(i)) > 1 else o
        for i, o in zip(node.input, operands, strict=True)
    ]
    a, b = (rw.unless_sum(o) for o in operands if o is not None)
    if a.dtype not in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return None
    if isinstance(a, Value) and isinstance(b, Value):
        a, b = rw.fitted([a, b])
    dims = broadcast_dims([a.dims, b.dims])
    alone = [len(rw.readers(i)) == 1 for i in node.input]
    waits = any(single and (isinstance(v, Sum) or _pending(rw, v)) for single, v in zip(alone, (a, b), strict=True))
    apart = waits or _varies_apart(rw, node, a, b, dims)
    if not apart or (operator(node) == "Sub" and waits):
        return None
    if operator(node) == "Sub":
        b = elementwise(rw, "Neg", [rw.settle(b)], rw.emit.fresh(f"{node.output[0]}/negative"))
    terms = [*rw.terms(a), *rw.terms(b)]
    if unread:
        terms = [view(dims, t.dtype, mark_unread(np.broadcast_to(t.codes, extents(dims)), unread)) for t in terms]
    same = None if len(terms) != 2 else _neutral(node, [rw.settle(a), rw.settle(b)], dims)
    return [same] if same is not None else [rw.add(terms, dims, a.dtype)]


def _varies_apart(rw: Rewrite, node: NodeProto, a: Value | Sum, b: Value | Sum, dims: Dims) -> bool:
    """Whether each operand varies along something the other does not, and what reads the result is linear."""
    if isinstance(a, Sum) or isinstance(b, Sum) or not rw.read_by_linear_maps(node.output[0]):
        return False
    own = []
    for v in (a, b):
        lead = len(dims) - v.rank
        axes = {lead + k for k, n in enumerate(extents(v.dims)) if n > 1 and not constant_along(v.codes, k)}
        own.append(axes | rw.present(v))
    return not own[0] <= own[1] and not own[1] <= own[0]


def _sum(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    made = add(rw, node)
    return made if made is not None else pointwise(rw, node)


def _pending(rw: Rewrite, value: Value) -> bool:
    """Whether the value holds a product that could still take an addend."""
    found = [value.whole] if value.whole is not None else rw.sources.of(value.codes)
    return any(s.is_pending for s in found)


def rowwise(
    rw: Rewrite,
    node: NodeProto,
    core: Sequence[int],
    reshape: Callable[[Dims], list[Dims]] = lambda dims: [dims],
) -> list[Abstract] | None:
    """Operators that work on some axes of their first input as a whole and on every row of the others alone.

    Args:
        rw: The rewrite.
        node: The node.
        core: Axes that the operator works on.
        reshape: Logical shapes of the outputs for that of the input.

    Returns:
        The outputs; None where the candidate axis is among those worked on.
    """
    x = rw.value(node, 0)
    core = [c % x.rank for c in core]
    along = symbols(x.dims[c] for c in core)
    if any(map(is_candidate_symbol, along)):
        rw.refuse("broadcast", f"{node.op_type} works along the candidate axis")
        return None
    x = rw.held(x, along)
    others = [rw.value(node, k) if node.input[k] else None for k in range(1, len(node.input))]
    if any(v is not None and any(map(is_candidate_symbol, symbols(v.dims))) for v in others):
        return None
    rest = [rw.tensor(v) if v is not None else "" for v in others]
    # Positions read of one output are not those of another.
    unread = rw.needed.get(node.output[0]) if len([o for o in node.output if o]) == 1 else None
    if unread and len(reshape(x.dims)[0]) != x.rank and max(unread) >= min(core, default=x.rank):
        # Axes that went move those behind them: positions of the result are not positions of the operand.
        unread = None
    held = {s for v in others if v is not None for s in rw.present(v)}
    if x.whole is not None and not unread:
        return rw.keep(node, [rw.tensor(x), *rest], reshape(x.dims), held | rw.present(x))
    codes = mark_unread(x.codes, {a: p for a, p in unread.items() if a not in core}) if unread else x.codes
    dims_out = reshape(x.dims)
    found = rw.grouping.memory_order([codes]) if dims_out == [x.dims] else {}
    orders = {k: o for k, o in found.items() if k not in core}
    codes = permuted(codes, orders)
    levels = rw.sources.levels(codes).astype(np.int64).max(axis=tuple(core), keepdims=True)
    levels = np.broadcast_to(levels, codes.shape)
    out = [np.full(extents(d), HOLE) for d in dims_out]
    for group in groups(levels, x.dims, flat=False):
        part = group.take(codes)
        part = cut_repeats(part, set(range(part.ndim)) - set(core))
        own = with_extents(group.dims, part.shape)
        kept = extended(own, rw.sources.symbols(part))
        tag = "broadcast" if group.level is Level.REQUEST else None
        if operator(node) in _NORMALISE and core == [x.rank - 1] and len(kept) < x.rank:
            few = part.reshape([part.shape[k] for k in kept])
            with rw.emit.under(tag):
                made_rows = _row_by_row(rw, node, rest, few, tuple(own[k] for k in kept))
            group.put(out[0], made_rows.reshape(part.shape))
            continue
        name, physical = rw.layout.realise(part, own)
        small = reshape(own)
        present = held | set(symbols(physical))
        if group.index is Ellipsis and part.shape == codes.shape and not orders:
            made = rw.keep(node, [name, *rest], small, present)
            sources = [m.whole for m in made if isinstance(m, Value)]
        else:
            names = [rw.emit.fresh(f"{o}/{group.level.name.lower()}") if o else "" for o in node.output]
            with rw.emit.under(tag):
                rw.emit.copy(node, [name, *rest], names)
            sources = [
                rw.sources.add(keep_symbols(d, present), rw.dtype(o, x.dtype), n)
                for d, o, n in zip(small, node.output, names, strict=False)
            ]
        for k, source in enumerate(sources):
            assert source is not None
            wide = with_extents(dims_out[k], extents(reshape(group.dims)[k]))
            Group(group.level, _match(group.index, out[k]), wide).put(out[k], codes_of(source))
    out = [restored(c, orders) for c in out]
    return [rw.tidy(d, rw.dtype(o, x.dtype), c) for d, o, c in zip(dims_out, node.output, out, strict=False)]


def _row_by_row(rw: Rewrite, node: NodeProto, rest: Sequence[str], codes: Codes, dims: Dims) -> Codes:
    """An operator over the last axis, of rows in as few dimensions as they need."""
    name, physical = rw.layout.realise(codes, dims)
    level = rw.sources.levels(codes).max()
    made = [rw.emit.fresh(f"{node.output[0]}/{Level(int(level)).name.lower()}")]
    own = NodeProto()
    own.CopyFrom(node)
    for a in own.attribute:
        if a.name == "axis":
            a.i = len(dims) - 1
    rw.emit.copy(own, [name, *rest], made)
    dtype = rw.dtype(node.output[0], TensorProto.FLOAT)
    return codes_of(rw.sources.add(physical, dtype, made[0], part=rw.grouping.is_part([codes])))


def _match(index: Any, out: Codes) -> Any:
    """The same selection on an output that kept the rank, or lost trailing core axes."""
    return index if index is Ellipsis else tuple(index[: out.ndim])


def is_square(rw: Rewrite, node: NodeProto) -> bool:
    """Whether a node squares its first input."""
    if operator(node) == "Pow":
        exponent = rw.array(node, 1)
        return exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0
    return operator(node) == "Mul" and node.input[0] == node.input[1]


def _softmax(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    rank = rw.value(node, 0).rank
    if rw.emit.opset >= 13:
        return rowwise(rw, node, [attribute(node, "axis", -1)])
    axis = attribute(node, "axis", 1) % rank
    return rowwise(rw, node, range(axis, rank))


def _along_axis(default: int) -> Callable[[Rewrite, NodeProto], list[Abstract] | None]:
    return lambda rw, node: rowwise(rw, node, [attribute(node, "axis", default)])


def _cumsum(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    axis = rw.array(node, 1)
    return None if axis is None else rowwise(rw, node, [int(axis.reshape(-1)[0])])


def _last_axes(count: int) -> Callable[[Rewrite, NodeProto], list[Abstract] | None]:
    return lambda rw, node: rowwise(rw, node, range(-count, 0))


def _layer_norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    if sum(1 for o in node.output if o) > 1:
        return None
    rank = rw.value(node, 0).rank
    return rowwise(rw, node, range(attribute(node, "axis", -1) % rank, rank))


def _arg(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    axis = attribute(node, "axis", 0) % rw.value(node, 0).rank
    keep = attribute(node, "keepdims", 1)
    if not keep and axis != rw.value(node, 0).rank - 1:
        return None
    return rowwise(rw, node, [axis], lambda d: [d[:axis] + (((),) if keep else ()) + d[axis + 1 :]])


def _topk(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    k = rw.array(node, 1)
    if k is None:
        return None
    axis, n = attribute(node, "axis", -1) % rw.value(node, 0).rank, int(k.reshape(-1)[0])
    return rowwise(rw, node, [axis], lambda d: [(*d[:axis], canonical([n]), *d[axis + 1 :])] * 2)


def _quantise(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    scale = rw.value(node, 1)
    if scale.rank == 0 or extents(scale.dims) == (1,) * scale.rank:
        return pointwise(rw, node) if scale.rank == 0 else rowwise(rw, node, [])
    return rowwise(rw, node, [attribute(node, "axis", 1)])


def _batch_first(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Operators over images: rows on axis 0, everything else is theirs."""
    x = rw.value(node, 0)
    seen = rw.facts.extents.get(node.output[0])
    if seen is None or any(s for _, s in seen[1:]) or len(seen) != x.rank or len([o for o in node.output if o]) > 1:
        return None
    if extents(x.dims[:1]) != (1,) or (seen[0][0], tuple(symbols(x.dims[:1]))) != seen[0]:
        return None
    rest = tuple(canonical([c]) for c, _ in seen[1:])
    return rowwise(rw, node, range(1, x.rank), lambda d: [(d[0], *rest)])


def lookup(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Gather from a table that has no rows of candidates: every id is looked up once."""
    table, ids = rw.value(node, 0), rw.value(node, 1)
    axis = attribute(node, "axis", 0) % table.rank
    if any(is_candidate_symbol(s) for s in symbols(table.dims)):
        if any(map(is_candidate_symbol, symbols([*ids.dims, table.dims[axis]]))):
            return None
    table = rw.held(table, symbols([table.dims[axis]]))
    before, after = table.dims[:axis], table.dims[axis + 1 :]
    dims: Dims = (*before, *ids.dims, *after)
    held = rw.present(table)
    data = rw.tensor(table)
    if ids.whole is not None:
        return rw.keep(node, [data, rw.tensor(ids)], [dims], held | rw.present(ids))
    if table.whole is None or (any(extents(before)) and len(before)):
        name = rw.tensor(ids)
        return rw.keep(node, [data, name], [dims], held | rw.present(ids))
    dtype = table.dtype
    tail = extents(after)
    out = np.full(extents(dims), HOLE)
    for group in groups(rw.sources.levels(ids.codes).astype(np.int64), ids.dims):
        part = cut_repeats(group.take(ids.codes))
        name, physical = rw.layout.realise(part, with_extents(group.dims, part.shape))
        lowered = group.level is Level.REQUEST and any(is_candidate_symbol(s) for s in symbols(ids.dims))
        whole = group.index is Ellipsis
        made = (rw.claim(node.output[0]) if whole else None) or rw.emit.fresh(
            f"{node.output[0]}/{group.level.name.lower()}"
        )
        with rw.emit.under("broadcast" if lowered else None):
            rw.emit.copy(node, [data, name], [made])
        source = rw.sources.add((*physical, *keep_symbols(after, held)), dtype, made)
        codes = codes_of(source).reshape(part.shape + tail)
        wide = np.broadcast_to(codes, extents(group.dims) + tail)
        target = out[group.index] if not whole else out
        if whole:
            out[...] = wide
        else:
            out[group.index] = wide.reshape(target.shape)
    return [rw.tidy(dims, dtype, out)]


def _gather_nd(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    table, ids = rw.value(node, 0), rw.value(node, 1)
    if any(map(is_candidate_symbol, symbols(table.dims))) or attribute(node, "batch_dims", 0):
        return None
    width = extents(ids.dims)[-1]
    if any(map(is_candidate_symbol, symbols([ids.dims[-1]]))):
        return None
    table = rw.held(table, symbols(table.dims[:width]))
    dims = (*ids.dims[:-1], *table.dims[width:])
    return rw.keep(node, [rw.tensor(table), rw.tensor(ids)], [dims], rw.present(table) | rw.present(ids))


def _gather_elements(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    data, ids = rw.value(node, 0), rw.value(node, 1)
    axis = attribute(node, "axis", 0) % data.rank
    if any(map(is_candidate_symbol, symbols([data.dims[axis], ids.dims[axis]]))):
        return None
    if any(a != b for k, (a, b) in enumerate(zip(data.dims, ids.dims, strict=True)) if k != axis):
        return None
    data = rw.held(data, symbols([data.dims[axis]]))
    held = rw.present(data) | rw.present(ids)
    full = len(held) != len(rw.present(data)) or len(held) != len(rw.present(ids))
    return rw.keep(node, [rw.rows_along(v, held) if full else rw.tensor(v) for v in (data, ids)], [ids.dims], held)


def note_fused(rw: Rewrite, node: NodeProto, places: Iterable[int]) -> None:
    """Notes a fused operator whose operands hold several levels: written out as its steps it could be divided.

    Args:
        rw: The rewrite.
        node: The node.
        places: The operands that are computed; of those, constants are passed over.
    """
    found: set[int] = set()
    for k in places:
        x = rw.operand(node, k) if k < len(node.input) and node.input[k] else None
        if x is not None and rw.array(node, k) is None:
            terms = [np.broadcast_to(t.codes, extents(x.dims)) for t in rw.terms(x)]
            found.update(np.unique(rw.grouping.joint_levels(terms)).tolist())
    if Level.CANDIDATE in found and min(found - {Level.UNREAD}) <= Level.REQUEST:
        rw.fused.append(node.output[0])


def _fused_gemm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A Gemm with its activation, as a whole."""
    note_fused(rw, node, (0, 1, 2))
    if attribute(node, "transA", 0):
        return None
    values = {k: rw.value(node, k) for k, i in enumerate(node.input) if i}
    inner, width = values[1].dims[:: -1 if attribute(node, "transB", 0) else 1]
    if any(map(is_candidate_symbol, symbols([values[0].dims[-1], inner, width]))):
        return None
    values |= {k: rw.held(values[k], symbols([inner])) for k in (0, 1)}
    held = rw.present(values[0])
    if not {s for v in values.values() for s in rw.present(v)} <= held:
        return None  # it does not broadcast its first operand
    names = [rw.tensor(values[k]) if k in values else "" for k in range(len(node.input))]
    return rw.keep(node, names, [(values[0].dims[0], width)], held)


def _fused_matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A product with its transpositions and its factor, as a whole."""
    note_fused(rw, node, (0, 1))
    return _product(rw, node, [matmul_order(node, k, rw.value(node, k).rank) for k in (0, 1)])


def _skip_norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A normalisation of the sum of two tensors of one shape, as a whole."""
    note_fused(rw, node, (0, 1))
    values = [rw.value(node, k) if i else None for k, i in enumerate(node.input)]
    rows, skip, *others = values
    if rows is None or skip is None or rows.dims != skip.dims or any(node.output[1:]):
        return None
    along = symbols(rows.dims[-1:])
    if any(is_candidate_symbol(s) for s in (*along, *(s for v in others if v is not None for s in symbols(v.dims)))):
        return None
    both = [rw.held(v, along) for v in (rows, skip)]
    held = {s for v in both for s in rw.present(v)}
    names = [rw.rows_along(v, held) for v in both] + [rw.tensor(v) if v is not None else "" for v in others]
    return rw.keep(node, names, [rows.dims], held)


def _matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A product of two operands that no rule divides."""
    return _product(rw, node, [range(rw.value(node, k).rank) for k in (0, 1)])


def _product(rw: Rewrite, node: NodeProto, orders: Sequence[Sequence[int]]) -> list[Abstract] | None:
    """A product of two operands as a whole, the axes of each in some order."""
    a, b = rw.value(node, 0), rw.value(node, 1)
    if a.rank < 2 or b.rank < 2:
        return None
    left, right = (tuple(v.dims[p] for p in order) for v, order in zip((a, b), orders, strict=True))
    inner = symbols([left[-1], right[-2]])
    if any(map(is_candidate_symbol, [*inner, *symbols(right[-1:])])):
        return None
    dims = (*broadcast_dims([left[:-2], right[:-2]]), left[-2], right[-1])
    a, b = (rw.held(v, inner) for v in (a, b))
    held = rw.present(a) | rw.present(b)
    names = [
        rw.tensor(v) if v.rank < 3 or batches_agree(rw, v, own[:-2], held) else rw.rows_along(v, held)
        for v, own in ((a, left), (b, right))
    ]
    return rw.keep(node, names, [dims], held)


def batches_agree(rw: Rewrite, value: Value, batch: Dims, held: set[str]) -> bool:
    """Whether a stack of matrices has all the rows of the product: runtimes do not broadcast 1 against 0 of them."""
    stack = {s for s in symbols(batch) if s in held}
    return stack <= rw.present(value)


def _batch_norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    if attribute(node, "training_mode", 0) or len([o for o in node.output if o]) > 1:
        return None
    return rowwise(rw, node, [1] if rw.value(node, 0).rank > 1 else [])


def _dropout(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    training = rw.array(node, 2) if len(node.input) > 2 and node.input[2] else np.array(False)
    if training is None or training.any():
        return None
    return rowwise(rw, node, [], lambda dims: [dims] * len(node.output))


def _one_hot(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    ids, depth = rw.value(node, 0), rw.array(node, 1)
    if depth is None:
        return None
    axis = attribute(node, "axis", -1) % (ids.rank + 1)
    dims = (*ids.dims[:axis], canonical([int(depth.reshape(-1)[0])]), *ids.dims[axis:])
    return rw.keep(node, [rw.tensor(rw.value(node, k)) for k in range(3)], [dims], rw.present(ids))


def _rotary(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """RotaryEmbedding, as a whole."""
    note_fused(rw, node, range(len(node.input)))
    return _whole_rows(rw, node)


def _whole_rows(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Fused attention and its like: rows on axis 0 of every input; all request-level or all with full rows."""
    values = [rw.value(node, k) for k, i in enumerate(node.input) if i]
    if len([o for o in node.output if o]) > 1 or any(rw.level(v) is Level.CANDIDATE for v in values):
        return None
    known = rw.facts.dims(node.output[0])
    if known is None or any("~" in s for s in symbols(known)):
        return None
    for v in values:
        if any(map(is_candidate_symbol, symbols(v.dims[1:]))):
            return None
    values = [rw.held(v, symbols(v.dims[1:])) for v in values]
    present: set[str] = set().union(*(rw.present(v) for v in values))
    names = iter([rw.tensor(v) for v in values])
    return rw.keep(node, [next(names) if i else "" for i in node.input], [known], present)


RULE = Rule(
    name="broadcast",
    title="Computes once what is the same for every candidate, or along any other axis.",
    identity="f(tile(u)) = tile(f(u)) for every operator f that treats rows independently",
    source="MaRI (arXiv 2602.23105); design of one-shot user towers",
    legal="No operand varies along the axis, and the operator does not mix entries along it.",
    refuses="Operators that are not known, or known to mix rows: they run on all rows, as before.",
    exactness="exact",
    operators={
        **dict.fromkeys(ELEMENTWISE, pointwise),
        "Add": _sum,
        "Sub": _sum,
        "QuantizeLinear": _quantise,
        "DequantizeLinear": _quantise,
        "Softmax": _softmax,
        "LogSoftmax": _softmax,
        "Hardmax": _softmax,
        "LpNormalization": _along_axis(-1),
        "CumSum": _cumsum,
        "Trilu": _last_axes(2),
        "LayerNormalization": _layer_norm,
        "RMSNormalization": _layer_norm,
        "SimplifiedLayerNormalization": _layer_norm,
        "ArgMax": _arg,
        "ArgMin": _arg,
        "TopK": _topk,
        **dict.fromkeys(having(Trait.IMAGES), _batch_first),
        "BatchNormalization": _batch_norm,
        "Dropout": _dropout,
        "Gather": lookup,
        "GatherND": _gather_nd,
        "GatherElements": _gather_elements,
        "OneHot": _one_hot,
        "MatMul": _matmul,
        "Attention": _whole_rows,
        "com.microsoft::FusedGemm": _fused_gemm,
        "com.microsoft::FusedMatMul": _fused_matmul,
        "com.microsoft::SkipLayerNormalization": _skip_norm,
        **dict.fromkeys(("RotaryEmbedding", "com.microsoft::RotaryEmbedding"), _rotary),
        "com.microsoft::BiasGelu": _last_axes(1),
        "com.microsoft::Attention": _whole_rows,
        "com.microsoft::MultiHeadAttention": _whole_rows,
    },
)
