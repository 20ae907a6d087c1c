"""Elementwise operators, entry by entry: each is made for as many rows as what it is made of varies along.

Entries of one level are made by one node, in the shape and the order in which their operands lie in memory; entries
that are equal are made once. A product of a request-level with a candidate-level entry is put off until somebody needs
it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from onnxrank.graphs import attribute
from onnxrank.grouping import groups, permuted, restored
from onnxrank.operators import Trait, operator, traits
from onnxrank.rewrite import Rewrite
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
    Unrepresentable,
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
    rectangles,
    source_numbers,
    split_axis,
    split_merged,
    stream,
    symbols,
    view,
    with_extents,
)

from . import fold, unstack

_LARGEST_SCALED = 1 << 18
"""Entries per row up to which a product is put off: whoever takes it apart looks at each of them."""
_FIRST_DECIDES = {"PRelu"}
"""Elementwise operators whose first operand has the result's shape: the others are broadcast to it."""


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
    return [_Elementwise(rw, node, present, result_type(rw, node, values)).of(values)]


def elementwise(rw: Rewrite, op: str, values: Sequence[Value], output: str) -> Value:
    """An elementwise operator that the original graph does not hold.

    Args:
        rw: The rewrite.
        op: Operator type.
        values: Operands.
        output: The original tensor that the result is, or belongs to.
    """
    node = helper.make_node(op, [f"operand{k}" for k in range(len(values))], [output], name=output)
    return _Elementwise(rw, node, list(range(len(values))), values[op == "Where"].dtype).of(values)


def repeated(rw: Rewrite, node: NodeProto, values: Mapping[int, Value], output: str) -> Value:
    """An elementwise operator of other operands than those of the original's node.

    Args:
        rw: The rewrite.
        node: The original's node.
        values: Operands by their places.
        output: A name that no tensor has.
    """
    own = NodeProto()
    own.CopyFrom(node)
    own.output[:] = [output]
    operands = list(values.values())
    return _Elementwise(rw, own, list(values), result_type(rw, node, operands)).of(operands)


@dataclass(frozen=True)
class _Elementwise:
    """An elementwise operator.

    Attributes:
        rw: The rewrite.
        node: The node.
        present: Which inputs of the node its operands are.
        dtype: Element type of the result.
    """

    rw: Rewrite
    node: NodeProto
    present: Sequence[int]
    dtype: int

    @property
    def op(self) -> str:
        """The operator's name."""
        return operator(self.node)

    def of(self, values: Sequence[Value]) -> Value:
        """The operator of some operands."""
        rw = self.rw
        values = rw.fitted(values)
        dims = broadcast_dims([v.dims for v in values])
        same = neutral(self.node, values, dims)
        if same is not None:
            return same
        if len(set(symbols(dims))) < len(symbols(dims)):  # which of the axes entries vary along is not told
            if any(v.whole is None for v in values):
                raise Unrepresentable("two axes of one extent")
            return self._entire(values, dims)
        unread = rw.needed.get(self.node.output[0])
        if not unread and _merges_differently(rw, values, dims):
            made = self.of([as_split(v, dims) for v in values])
            assert made.dims == split_merged(dims)
            return rw.tidy(dims, self.dtype, made.codes.reshape(extents(dims)))
        idle = _idle(rw, self.node, values, dims)
        if idle is None and all(v.whole is not None for v in values) and not unread:
            scaled = _scaled(rw, self.node, values, dims, self.dtype)
            return self._entire(values, dims) if scaled is None else scaled
        return self._by_level(values, dims, unread or {}, idle)

    def _entire(self, values: Sequence[Value], dims: Dims) -> Value:
        """The user's node, of tensors as they are."""
        rw = self.rw
        held = {s for v in values for s in rw.present(v)}
        if self.op in _FIRST_DECIDES:
            values = [rw.held(values[0], held), *values[1:]]
        found = [(rw.tensor(v), keep_symbols(v.dims, rw.present(v))) for v in values]
        names = dict(zip(self.present, unled(rw, found, len(dims)), strict=True))
        operands = [names.get(k, "") for k in range(len(self.node.input))]
        (kept,) = rw.keep(self.node, operands, [dims], held, dtype=self.dtype)
        return rw.settle(kept)

    def _by_level(self, values: Sequence[Value], dims: Dims, unread: dict[int, Any], idle: Codes | None) -> Value:
        """A node for the entries of each level, and for each large tensor that they lie in; none for idle ones."""
        rw, rank = self.rw, len(dims)
        wide = [np.broadcast_to(v.codes.reshape((1,) * (rank - v.rank) + v.codes.shape), extents(dims)) for v in values]
        if unread:
            wide = [mark_unread(w, unread) for w in wide]
        if idle is not None:
            wide = [np.where(idle == HOLE, w, HOLE) for w in wide]
        ranks = [v.rank for v in values]
        wide, keys = self._keyed(values, wide, dims)
        orders = rw.grouping.memory_order(wide)
        wide, keys = [permuted(w, orders) for w in wide], permuted(keys, orders)
        boxes = unstack.apart(rw, self.node.output[0], wide) or rw.grouping.boxes(wide)
        alone = len(boxes) == 1 and not orders
        out = np.full(extents(dims), HOLE)
        for box in boxes:
            some = [w[box] for w in wide]
            part = np.full(some[0].shape, HOLE)
            for group in groups(keys[box], with_extents(dims, part.shape)):
                parts, whole = [group.take(w) for w in some], alone and group.index is Ellipsis
                group.put(part, _Entries(self, group.level, group.dims, parts, ranks, whole).made())
            out[box] = part
        made = restored(out, orders)
        return rw.tidy(dims, self.dtype, made if idle is None else np.where(idle == HOLE, made, idle))

    def _keyed(self, values: Sequence[Value], wide: list[Codes], dims: Dims) -> tuple[list[Codes], NDArray[np.int64]]:
        """The operands, of commutative operators by level, and a key per entry: those of one key are made together."""
        rw = self.rw
        outer, entire = _is_outer(wide), self._keeps_whole(values, dims)
        if (
            not entire
            and Trait.COMMUTATIVE in traits(self.node)
            and len(wide) == 2
            and values[0].rank == values[1].rank
        ):
            wide = _ordered(rw, wide)
        keys = rw.grouping.joint_levels(wide) if entire else _kinds(rw, wide, outer)
        if self.op == "Mul" and len(wide) == 2 and rw.uses("fold"):
            keys = _by_factors(rw, wide, keys)
        return wide, keys

    def _keeps_whole(self, values: Sequence[Value], dims: Dims) -> bool:
        """Whether a tensor that is there as one would be cut up: then the other operand is rather brought to its rows.

        But for products that a linear map reads: those with a request-level entry fold into it, and what is only
        multiplied by a factor per row is mapped once.
        """
        rw = self.rw
        if not any(v.whole is not None and v.whole.level is Level.CANDIDATE for v in values):
            return False
        if self.op != "Mul" or not rw.uses("fold"):
            return True
        single = all(v.whole is None or v.whole.size == 1 for v in values)
        narrow = dims[-1] != () and all(v.whole is None or v.dims[-1:] == ((),) for v in values)
        through = {"Add", "Mul", "Gather", "Split"} if narrow else {"Add"} if single else set()
        return not rw.read_by_linear_maps(self.node.output[0], frozenset(through))


@dataclass(frozen=True)
class _Entries:
    """Entries of one level that an elementwise operator makes together.

    Attributes:
        by: The operator.
        level: The level.
        dims: Logical shape.
        parts: Codes of the operands, each of this shape or cut to 1 where it does not vary.
        ranks: Ranks of the operands, by which scalars stay that: some operators take no others.
        whole: Whether these are all entries as they are, so that the result may keep its name.
    """

    by: _Elementwise
    level: Level
    dims: Dims
    parts: Sequence[Codes]
    ranks: Sequence[int]
    whole: bool

    @property
    def symbols(self) -> set[str]:
        """The symbols along which an operand varies."""
        return {s for part in self.parts for s in self.by.rw.sources.symbols(part)}

    def _in(self, dims: Dims, parts: Sequence[Codes]) -> _Entries:
        """The same entries, in another shape."""
        return replace(
            self, dims=dims, parts=parts, ranks=[len(dims) if rank else 0 for rank in self.ranks], whole=False
        )

    def made(self) -> Codes:
        """Makes the entries; gives their codes in the shape of the first operand."""
        rw, node, dims, shape = self.by.rw, self.by.node, self.dims, self.parts[0].shape
        parts = self.parts
        if self.by.op == "Mul" and len(parts) == 2 and self.level is Level.CANDIDATE and rw.uses("fold"):
            parts = _factors_first(rw, node, parts, dims)
        if _repeats_differ(rw, parts, dims):
            split = split_merged(dims)
            return self._in(split, [p.reshape(extents(split)) for p in parts]).made().reshape(shape)
        order = _memory_order(rw, parts, dims)
        if order is not None:
            made = self._in(tuple(dims[k] for k in order), [p.transpose(order) for p in parts]).made()
            return made.transpose(np.argsort(order))
        source = _as_it_lies(rw, parts, dims)
        if source is not None:
            return self._in(source.dims, [codes_of(source)]).made().reshape(shape)
        return replace(self, parts=parts)._as_they_are()

    def _as_they_are(self) -> Codes:
        """The same in the shape and the order that they have; entries that are equal are made once."""
        shape = self.parts[0].shape
        few = self._cut()
        keep = few._dimensions()
        full = tuple(shape[k] for k in keep)
        if len(keep) < len(shape):
            few = few._squeezed(keep)
        repeats = _repeats(few.parts)
        if repeats is not None:
            syms = tuple((s,) for s in symbols(few.dims))
            few = few._in((*syms, (1,)), [repeats[0].reshape((1,) * len(syms) + (-1,))])
        small = with_extents(few.dims, np.broadcast_shapes(*(p.shape for p in few.parts)))
        lowered = self.level is Level.REQUEST and any(is_candidate_symbol(s) for s in symbols(self.dims))
        fewer = prod(extents(small)) < prod(shape)
        few = replace(few, whole=few.whole and few.parts[0].shape == full)
        codes = few._written(small, "broadcast" if lowered or fewer else None)
        made = codes if repeats is None else codes.reshape(-1)[repeats[1]]
        return np.broadcast_to(made, full).reshape(shape)

    def _cut(self) -> _Entries:
        """The same without repeats along axes on which no operand varies."""
        parts = self.parts
        for axis in range(len(self.dims)):
            if all(constant_along(p, axis) or p.shape[axis] == 1 for p in parts):
                parts = [p.take([0], axis) for p in parts]
        return replace(self, parts=parts)

    def _dimensions(self) -> list[int]:
        """The dimensions that a node needs; all of them where several tensors would each have to be reshaped."""
        single = all(len(self.by.rw.sources.of(p)) == 1 for p in self.parts)
        if self.level is Level.CONSTANT or not single:
            return list(range(len(self.dims)))
        return extended(self.dims, self.symbols)

    def _squeezed(self, keep: Sequence[int]) -> _Entries:
        """The same in some of the dimensions."""
        return replace(
            self,
            dims=tuple(self.dims[k] for k in keep),
            parts=[p.reshape([p.shape[k] for k in keep]) for p in self.parts],
            ranks=[sum(k >= len(self.dims) - r for k in keep) for r in self.ranks],
            whole=False,
        )

    def _written(self, small: Dims, rule: str | None) -> Codes:
        """Writes the node, or puts it off; gives the codes of the result, of shape `small`."""
        rw, dtype = self.by.rw, self.by.dtype
        physical = keep_symbols(small, self.symbols)
        part = rw.grouping.is_part(self.parts)
        if self.level is Level.CANDIDATE and _multiplies_levels(rw, self.by.node, self.parts, extents(small)):
            return codes_of(rw.defer(physical, dtype, _ProductOfEntries(self, small), rule, part=part))
        with rw.emit.under(rule):
            return codes_of(rw.sources.add(physical, dtype, _NodeOfEntries(self, small).materialise(), part=part))


@dataclass(eq=False)
class _NodeOfEntries(Deferred):
    """A node of the model over some of its entries.

    Attributes:
        entries: The entries.
        dims: Shape of the result.
    """

    entries: _Entries
    dims: Dims

    def materialise(self) -> str:
        entries, by = self.entries, self.entries.by
        rw, node = by.rw, by.node
        names = [""] * len(node.input)
        found = []
        for k, part, rank in zip(by.present, entries.parts, entries.ranks, strict=True):
            decides = k == 0 and by.op in _FIRST_DECIDES
            found.append(self._decisive(part) if decides else self._operand(part, rank))
        for k, own in zip(by.present, unled(rw, found, len(entries.dims)), strict=True):
            names[k] = own
        name = rw.claim(node.output[0]) if entries.whole else None
        name = name or rw.emit.fresh(f"{node.output[0]}/{entries.level.name.lower()}")
        rw.emit.copy(node, names, [name])
        return name

    def _decisive(self, part: Codes) -> tuple[str, Dims]:
        """The operand that has the shape of the result, and that shape."""
        physical = keep_symbols(self.dims, self.entries.symbols)
        return self.entries.by.rw.layout.realise(np.broadcast_to(part, extents(self.dims)), physical, full=True)

    def _operand(self, part: Codes, rank: int) -> tuple[str, Dims]:
        """An operand as it is broadcast to the others, and its shape."""
        part = cut_repeats(part)
        lead = part.ndim - rank
        if lead > 0 and all(n == 1 for n in part.shape[:lead]):
            part = part.reshape(part.shape[lead:])
        dims = self.entries.dims
        own = with_extents(dims[len(dims) - part.ndim :], part.shape)
        return self.entries.by.rw.layout.realise(part, own)


class _ProductOfEntries(_NodeOfEntries, OpenProduct):
    """A product of request-level with candidate-level entries."""

    def factors(self) -> tuple[Codes, Codes]:
        rw, shape = self.entries.by.rw, extents(self.dims)
        once, each = (np.broadcast_to(p, shape) for p in self.entries.parts)
        if not fold.is_open(rw, each).all():
            return once[..., None], each[..., None]
        # A product that was put off itself: its request-level factor takes the other.
        left, right = fold.expand(rw, each)
        dims = tuple(canonical([n]) for n in shape)
        values = [view(dims, rw.sources.of(each)[0].dtype, c) for c in (once, left[..., 0])]
        if left.shape[-1] > 1 or rw.sources.symbols(once) | rw.sources.symbols(left):
            return once[..., None], each[..., None]
        name = rw.emit.fresh(f"{self.entries.by.node.output[0]}/request")
        return elementwise(rw, "Mul", values, name).codes[..., None], right


def unled(rw: Rewrite, operands: Sequence[tuple[str, Dims]], rank: int) -> list[str]:
    """Operands without axes of one entry in front that they were only reshaped for, where one has all the axes.

    Args:
        rw: The rewrite.
        operands: Tensors that are broadcast to each other, with their shapes.
        rank: How many axes the result has.
    """
    full = [k for k, (_, dims) in enumerate(operands) if len(dims) == rank]
    widest = max(full, key=lambda k: sum(d != () for d in operands[k][1]), default=None)
    if widest is None:
        return [name for name, _ in operands]
    return [name if k == widest else rw.layout.unled(name, dims) for k, (name, dims) in enumerate(operands)]


def as_split(value: Value, dims: Dims) -> Value:
    """An operand with the dimensions apart that are merged in the result."""
    own: list[Dim] = []
    for d, whole in zip(value.dims, dims[len(dims) - value.rank :], strict=True):
        own += [(f,) for f in d] if len(whole) > 1 and d else [()] * max(1, len(whole)) if len(whole) > 1 else [d]
    return view(tuple(own), value.dtype, value.codes.reshape(extents(tuple(own))))


def mark_unread(codes: Codes, needed: dict[int, Any]) -> Codes:
    """Codes with a hole wherever nobody reads."""
    out = codes.copy()
    for axis, positions in needed.items():
        at = np.ones(codes.shape[axis], bool)
        at[positions] = False
        out[tuple(at if k == axis else slice(None) for k in range(codes.ndim))] = HOLE
    return out


def is_square(rw: Rewrite, node: NodeProto) -> bool:
    """Whether a node squares its first input."""
    if operator(node) == "Pow":
        exponent = rw.array(node, 1)
        return exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) == 2.0
    return operator(node) == "Mul" and node.input[0] == node.input[1]


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


def neutral(node: NodeProto, values: Sequence[Value], dims: Dims) -> Value | None:
    """`x + 0` with a zero that only carries rows: exporters make accumulators of N zeros this way."""
    if operator(node) not in ("Add", "Sum") or len(values) != 2:
        return None
    for zero, other in (values, values[::-1]):
        whole = zero.whole
        if whole is not None and whole.level is Level.CONSTANT and symbols(zero.dims) and not whole.data.any():
            if extents(other.dims) == extents(dims)[len(dims) - other.rank :] and other.rank == len(dims):
                return Value(dims, other.dtype, other.whole, None if other.whole else other.codes)
    return None


def _idle(rw: Rewrite, node: NodeProto, values: Sequence[Value], dims: Dims) -> Codes | None:
    """`x or false`, `x and true`: the entries of rows in which a constant changes nothing, holes elsewhere.

    Rows of a causal mask that hide nothing are alike then, and need not be told apart. In other rows, entries that a
    constant decides would only have to be joined with those that it does not.
    """
    if operator(node) not in ("And", "Or") or not dims or prod(extents(dims)) > _LARGEST_SCALED:
        return None
    wide = [
        np.broadcast_to(v.codes.reshape((1,) * (len(dims) - v.rank) + v.codes.shape), extents(dims)) for v in values
    ]
    constant = [rw.sources.levels(w) == Level.CONSTANT for w in wide]
    known = constant[0] & constant[1]
    out, busy = np.full(extents(dims), HOLE), ~(constant[0] | constant[1])
    for mine, other, fixed in (*zip(wide, wide[::-1], constant, strict=True),):
        alone = fixed & ~known
        if alone.any():
            passes = np.zeros(alone.shape, bool)
            passes[alone] = rw.sources.constants(mine[alone]) == (operator(node) == "And")
            out, busy = np.where(passes, other, out), busy | (alone & ~passes)
    idle = ~busy.any(-1, keepdims=True) & ~known.all(-1, keepdims=True)
    if not idle.any():
        return None
    decided = known & idle
    if decided.any():
        join = np.logical_and if operator(node) == "And" else np.logical_or
        truth = join(*(rw.sources.constants(w[decided]) for w in wide))
        out[decided] = np.where(truth, rw.one(TensorProto.BOOL), rw.zero(TensorProto.BOOL))
    return np.where(idle, out, HOLE)


def _ordered(rw: Rewrite, wide: list[Codes]) -> list[Codes]:
    """Operands of a commutative operator, the entry of the lower level first."""
    first, second = (rw.sources.levels(w) for w in wide)
    swap = first > second
    return [np.where(swap, wide[1], wide[0]), np.where(swap, wide[0], wide[1])]


def _kinds(rw: Rewrite, wide: list[Codes], outer: bool) -> Any:
    """A key per entry: its level, and which operands have which, where that keeps to one axis.

    So it is where each kind is a single box, and no candidate-level tensor would have to be cut up for it.

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
    kinds = len(np.unique(keys))
    if kinds == len(np.unique(joint)):
        return joint
    if outer or split_axis(keys) is not None:
        return keys
    return keys if rectangles(keys, kinds) is not None and not _cuts(rw, wide, keys) else joint


def _cuts(rw: Rewrite, wide: list[Codes], keys: NDArray[np.int64]) -> bool:
    """Whether a candidate-level tensor has some entries of one key, and others of another."""
    for w in wide:
        at = rw.sources.levels(w) == Level.CANDIDATE
        of_key = np.unique(np.stack([w[at], keys[at]]), axis=1)
        parts = np.stack([source_numbers(of_key[0]), of_key[1]])
        for number in np.unique(parts[0]):
            counts = np.unique(parts[1, parts[0] == number], return_counts=True)[1]
            if (counts < np.unique(w[source_numbers(w) == number]).size).any():
                return True
    return False


def _is_outer(wide: list[Codes]) -> bool:
    """Whether each of two operands varies along an axis of its own: as blocks of one level none has to be repeated."""
    along = [{k for k in range(w.ndim) if w.shape[k] > 1 and not constant_along(w, k)} for w in wide]
    return len(wide) == 2 and all(a - b for a, b in (along, along[::-1]))


def _repeats(parts: Sequence[Codes]) -> tuple[Codes, Codes] | None:
    """The different entries of a single operand, and which of them each one is; None where few are equal."""
    if len(parts) > 1 or parts[0].size <= 1:
        return None
    unique, inverse = np.unique(parts[0].reshape(-1), return_inverse=True)
    return (unique, inverse.reshape(parts[0].shape)) if 2 * unique.size <= parts[0].size else None


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


def _multiplies_levels(rw: Rewrite, node: NodeProto, parts: Sequence[Codes], shape: tuple[int, ...]) -> bool:
    """Whether a node multiplies request-level with candidate-level entries, and is better put off."""
    if operator(node) != "Mul" or len(parts) != 2 or not rw.uses("fold") or prod(shape) > _LARGEST_SCALED:
        return False
    low, high = (rw.sources.levels(p) for p in parts)
    return bool(low.max() == Level.REQUEST and high.min() == Level.CANDIDATE)


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


def _factors_first(rw: Rewrite, node: NodeProto, parts: Sequence[Codes], dims: Dims) -> Sequence[Codes]:
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
