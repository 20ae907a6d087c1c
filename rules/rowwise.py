"""Operators that work on every row alone: equal rows give equal rows, so those of a request are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnxrank.graphs import attribute
from onnxrank.grouping import Group, groups, permuted, restored
from onnxrank.operators import Trait, having, traits
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Transfer
from onnxrank.values import (
    HOLE,
    Abstract,
    Codes,
    Dims,
    Level,
    Source,
    Value,
    canonical,
    codes_of,
    cut_repeats,
    extended,
    extents,
    is_candidate_symbol,
    keep_symbols,
    rows_of,
    symbols,
    view,
    with_extents,
)

from .elementwise import mark_unread, pointwise

TOGETHER = "it takes in request-level and candidate-level entries together, and no rule divides that"
"""Why what has request-level entries is made for every candidate."""


def note_together(rw: Rewrite, x: Value, core: Sequence[int]) -> None:
    """Says so where entries of the request and of candidates lie beside each other along axes that are worked on."""
    if x.whole is None:
        levels = rw.sources.levels(x.codes).astype(np.int64)
        highest = levels.max(axis=tuple(core), keepdims=True)
        if ((levels == Level.REQUEST) & (highest == Level.CANDIDATE)).any():
            rw.refuse("broadcast", TOGETHER)


def rowwise(
    rw: Rewrite,
    node: NodeProto,
    core: Sequence[int],
    reshape: Callable[[Dims], list[Dims]] = lambda dims: [dims],
    alike: bool = True,
) -> list[Abstract] | None:
    """Operators that work on some axes of their first input as a whole and on every row of the others alone.

    Args:
        rw: The rewrite.
        node: The node.
        core: Axes that the operator works on.
        reshape: Logical shapes of the outputs for that of the input.
        alike: Whether it does the same to every row; rows stay together where it does not.

    Returns:
        The outputs; None where the candidate axis is among those worked on.
    """
    x = rw.value(node, 0)
    core = [c % x.rank for c in core]
    along = symbols(x.dims[c] for c in core)
    if any(map(is_candidate_symbol, along)):
        rw.refuse("broadcast", f"{node.op_type} works along the candidate axis")
        return None
    others = [rw.value(node, k) if node.input[k] else None for k in range(1, len(node.input))]
    if any(v is not None and any(map(is_candidate_symbol, symbols(v.dims))) for v in others):
        return None
    rest = [rw.tensor(v) if v is not None else "" for v in others]
    held = {s for v in others if v is not None for s in rw.present(v)}
    x = rw.held(x, {*along, *held})
    unread = _unread(rw, node, x, core, reshape)
    if not alike:
        note_together(rw, x, range(x.rank))
    if not alike or (x.whole is not None and not unread):
        return rw.keep(node, [rw.tensor(x), *rest], reshape(x.dims), held | rw.present(x))
    codes = mark_unread(x.codes, {a: p for a, p in unread.items() if a not in core}) if unread else x.codes
    return _Rows(rw, node, x, core, reshape, rest, held).by_level(codes)


def _unread(
    rw: Rewrite, node: NodeProto, x: Value, core: Sequence[int], reshape: Callable[[Dims], list[Dims]]
) -> dict[int, NDArray[np.int64]]:
    """Positions that are read, per axis of the operand; none where nothing is known of that."""
    # Positions read of one output are not those of another.
    unread = rw.needed.get(node.output[0], {}) if len([o for o in node.output if o]) == 1 else {}
    if unread and len(reshape(x.dims)[0]) != x.rank and max(unread) >= min(core, default=x.rank):
        # Axes that went move those behind them: positions of the result are not positions of the operand.
        return {}
    return unread


@dataclass(frozen=True)
class _Rows:
    """An operator on the rows of one operand.

    Attributes:
        rw: The rewrite.
        node: The node.
        x: The operand.
        core: Axes that the operator works on as a whole.
        reshape: Logical shapes of the outputs for that of the input.
        rest: Tensors of the other operands.
        held: Symbols along which those vary.
        apart: Whether these are some of the rows only.
    """

    rw: Rewrite
    node: NodeProto
    x: Value
    core: Sequence[int]
    reshape: Callable[[Dims], list[Dims]]
    rest: Sequence[str]
    held: set[str]
    apart: bool = False

    def by_level(self, codes: Codes) -> list[Abstract]:
        """The outputs, by rows of one level; `codes` is the operand, with holes in rows that nobody reads."""
        rw, x, dims_out = self.rw, self.x, self.reshape(self.x.dims)
        boxes = self._boxes(codes) if dims_out == [x.dims] else [...]
        if len(boxes) > 1:
            joined = np.full(codes.shape, HOLE)
            for box in boxes:
                part = codes[box]
                some = view(with_extents(x.dims, part.shape), x.dtype, part)
                (made,) = replace(self, x=some, apart=True).by_level(part)
                joined[box] = rw.settle(made).codes
            return [rw.tidy(x.dims, rw.dtype(self.node.output[0], x.dtype), joined)]
        found = rw.grouping.memory_order([codes]) if dims_out == [x.dims] else {}
        orders = {k: o for k, o in found.items() if k not in self.core}
        codes = permuted(codes, orders)
        levels = rw.sources.levels(codes).astype(np.int64).max(axis=tuple(self.core), keepdims=True)
        out = [np.full(extents(d), HOLE) for d in dims_out]
        for group in groups(np.broadcast_to(levels, codes.shape), x.dims, flat=False):
            part = group.take(codes)
            part = cut_repeats(part, set(range(part.ndim)) - set(self.core))
            own = with_extents(group.dims, part.shape)
            keep = extended(own, rw.sources.symbols(part))
            few, kept = part.reshape([part.shape[k] for k in keep]), tuple(own[k] for k in keep)
            if Trait.AXIS in traits(self.node) and list(self.core) == [x.rank - 1] and self._moves(few, kept):
                group.put(out[0], self._flat(group, few, kept).reshape(part.shape))
                continue
            whole = not self.apart and group.index is Ellipsis and part.shape == codes.shape and not orders
            for k, source in enumerate(self._made(group, part, own, whole)):
                wide = with_extents(dims_out[k], extents(self.reshape(group.dims)[k]))
                Group(group.level, _match(group.index, out[k]), wide).put(out[k], codes_of(source))
        out = [restored(c, orders) for c in out]
        return [rw.tidy(d, rw.dtype(o, x.dtype), c) for d, o, c in zip(dims_out, self.node.output, out, strict=False)]

    def _boxes(self, codes: Codes) -> list[Any]:
        """Rows by the tensors that they lie in, where they are of symbolic length: other softmaxes have their rule."""
        last = self.x.rank - 1
        if list(self.core) != [last] or not symbols(self.x.dims[last:]) or self.apart:
            return [...]
        return self.rw.grouping.boxes([codes], rows=True)

    def _made(self, group: Group, part: Codes, own: Dims, whole: bool) -> list[Source]:
        """The node's outputs for some rows; `whole` are all of them, as they are, so that outputs keep their names."""
        rw, node = self.rw, self.node
        name, physical = rw.layout.realise(part, own)
        small, present = self.reshape(own), self.held | set(symbols(physical))
        if whole:
            made = rw.keep(node, [name, *self.rest], small, present)
            return [m.whole for m in made if isinstance(m, Value) and m.whole is not None]
        names = [rw.emit.fresh(f"{o}/{group.level.name.lower()}") if o else "" for o in node.output]
        with rw.emit.under(_rule(group)):
            rw.emit.copy(node, [name, *self.rest], names)
        return [
            rw.sources.add(keep_symbols(d, present), rw.dtype(o, self.x.dtype), n)
            for d, o, n in zip(small, node.output, names, strict=False)
        ]

    def _order(self, codes: Codes, dims: Dims) -> list[int] | None:
        """The order in which rows lie in memory, where that is another than they have; their own axis stays last."""
        order = self.rw.layout.native_order(codes, dims)
        return order if order is not None and order[-1] == len(dims) - 1 else None

    def _moves(self, codes: Codes, dims: Dims) -> bool:
        """Whether rows would be brought into another shape or order for nothing."""
        return codes.ndim < self.x.rank or self._order(codes, dims) is not None

    def _flat(self, group: Group, codes: Codes, dims: Dims) -> Codes:
        """An operator over the last axis, of rows in as few dimensions as they need, in the order that they lie in."""
        rw, node = self.rw, self.node
        order = self._order(codes, dims)
        if order is not None:
            made = self._flat(group, codes.transpose(order), tuple(dims[k] for k in order))
            return made.transpose(np.argsort(order))
        own = NodeProto()
        own.CopyFrom(node)
        for a in own.attribute:
            if a.name == "axis":
                a.i = len(dims) - 1
        with rw.emit.under(_rule(group)):
            name, physical = rw.layout.realise(codes, dims)
            output = rw.emit.fresh(f"{node.output[0]}/{group.level.name.lower()}")
            rw.emit.copy(own, [name, *self.rest], [output])
        dtype = rw.dtype(node.output[0], TensorProto.FLOAT)
        return codes_of(rw.sources.add(physical, dtype, output, part=rw.grouping.is_part([codes])))


def _rule(group: Group) -> str | None:
    """The rule that nodes for some rows are accounted to."""
    return "broadcast" if group.level is Level.REQUEST else None


def _match(index: Any, out: Codes) -> Any:
    """The same selection on an output that kept the rank, or lost trailing core axes."""
    return index if index is Ellipsis else tuple(index[: out.ndim])


def _softmax(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    rank = rw.value(node, 0).rank
    if rw.emit.opset >= 13:
        return rowwise(rw, node, [attribute(node, "axis", -1)])
    axis = attribute(node, "axis", 1) % rank
    return rowwise(rw, node, range(axis, rank))


def _along_axis(default: int) -> Transfer:
    return lambda rw, node: rowwise(rw, node, [attribute(node, "axis", default)])


def _cumsum(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    axis = rw.array(node, 1)
    return None if axis is None else rowwise(rw, node, [int(axis.reshape(-1)[0])])


def _last_axes(count: int) -> Transfer:
    return lambda rw, node: rowwise(rw, node, range(-count, 0))


def _layer_norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    if sum(1 for o in node.output if o) > 1:
        return None
    rank = rw.value(node, 0).rank
    core = range(attribute(node, "axis", -1) % rank, rank)
    return rowwise(rw, node, core, alike=not by_rows(rw, node, len(core)))


def by_rows(rw: Rewrite, node: NodeProto, core: int) -> bool:
    """Whether scale or bias of a normalisation have axes beside those that it goes over, for numbers of each row.

    Args:
        rw: The rewrite.
        node: The normalisation.
        core: How many axes it goes over.
    """
    return any(rw.value(node, k).rank > core for k in range(1, len(node.input)) if node.input[k])


def _topk(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    k = rw.array(node, 1)
    if k is None:
        return None
    axis, n = attribute(node, "axis", -1) % rw.value(node, 0).rank, int(k.reshape(-1)[0])
    note_together(rw, rw.value(node, 0), [axis])
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
    known = rw.facts.dims(node.output[0])
    if seen is None or known is None or len(seen) != x.rank or len([o for o in node.output if o]) > 1:
        return None
    rest = known[1:]
    if any(map(is_candidate_symbol, symbols(rest))):
        return None
    if extents(x.dims[:1]) != (1,) or (seen[0][0], tuple(symbols(x.dims[:1]))) != seen[0]:
        return None
    return rowwise(rw, node, range(1, x.rank), lambda d: [(d[0], *rest)])


def _batch_norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    if attribute(node, "training_mode", 0) or len([o for o in node.output if o]) > 1:
        return None
    return _channels_last(rw, node) or rowwise(rw, node, [1] if rw.value(node, 0).rank > 1 else [])


def _channels_last(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """BatchNormalization of a tensor that lies with its channels last: of its rows, so that it is not transposed."""
    x = rw.value(node, 0)
    order = None if x.whole is not None else rw.layout.native_order(x.codes, x.dims)
    if order is None or order[-1] != 1 or len(order) < x.rank:
        return None
    name, have = rw.layout.realise(x.codes.transpose(order), tuple(x.dims[k] for k in order))
    flat = rows_of(have)
    if flat is None:
        return None
    rest = [rw.tensor(rw.value(node, k)) for k in range(1, 5)]
    lowered = any(is_candidate_symbol(s) and s not in symbols(have) for s in symbols(x.dims))
    made = rw.emit.fresh(f"{node.output[0]}/rows")
    with rw.emit.under("broadcast" if lowered else None):
        rw.emit.copy(node, [rw.layout.reshape(name, have, flat), *rest], [made])
        result = rw.layout.reshape(made, flat, have)
    codes = codes_of(rw.sources.add(have, x.dtype, result))
    return [rw.tidy(x.dims, x.dtype, codes.transpose(np.argsort(order)))]


def _dropout(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    training = rw.array(node, 2) if len(node.input) > 2 and node.input[2] else np.array(False)
    if training is None or training.any():
        return None
    return rowwise(rw, node, [], lambda dims: [dims] * len(node.output))


ROWWISE: dict[str, Transfer] = {
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _quantise,
    "com.microsoft::QuantizeLinear": _quantise,
    "com.microsoft::DequantizeLinear": _quantise,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Hardmax": _softmax,
    "LpNormalization": _along_axis(-1),
    "CumSum": _cumsum,
    "CumProd": _cumsum,
    "Trilu": _last_axes(2),
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "SimplifiedLayerNormalization": _layer_norm,
    "TopK": _topk,
    **dict.fromkeys(having(Trait.IMAGES), _batch_first),
    "BatchNormalization": _batch_norm,
    "Dropout": _dropout,
    "com.microsoft::BiasGelu": _last_axes(1),
}
"""What works on every row alone, and how."""
