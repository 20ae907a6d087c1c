"""Inputs for running a model: what is declared of them, and data that a model accepts.

Ids must lie inside the tables that they look up. Where the roles file gives no range, the lookups are found by
following every entry of every input through casts, offsets and data movement to the Gathers it ends in.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxrank.emit import Emitter
from onnxrank.facts import Facts, Setting
from onnxrank.graphs import subgraphs
from onnxrank.operators import domain_of
from onnxrank.rewrite import Rewrite, Rule
from onnxrank.roles import InputInfo, InputRole, Roles, check_positions
from onnxrank.values import (
    CANDIDATES,
    Abstract,
    Codes,
    Dims,
    Value,
    broadcast_dims,
    canonical,
    codes_of,
    extents,
    offsets,
    source_numbers,
    symbols,
    view,
    with_extents,
)

Feed = dict[str, NDArray[Any]]
FALLBACK_IDS = (0, 8)
"""Range of whole numbers that nothing is known of."""


def graph_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs that a caller feeds; initializers listed as inputs, as old exporters do, are not among them."""
    known = {t.name for t in model.graph.initializer}
    return [i for i in model.graph.input if i.name not in known]


def describe(model: ModelProto) -> list[InputInfo]:
    """The inputs as declared."""
    out = []
    for i in graph_inputs(model):
        kind = i.type.tensor_type
        dims: tuple[int | str | None, ...] | None = None
        if i.type.HasField("tensor_type") and kind.HasField("shape"):
            dims = tuple(
                d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else d.dim_param or None
                for d in kind.shape.dim
            )
        out.append(InputInfo(i.name, kind.elem_type, dims))
    return out


@dataclass(frozen=True)
class Input:
    """A graph input with its role and factored shape."""

    name: str
    dtype: int
    dims: Dims
    role: InputRole

    @property
    def mixed_axis(self) -> int:
        """The axis that a mixed input is divided along; the candidate axis for flat records."""
        axis = self.role.candidate_axis if self.role.record is not None else self.role.axis
        assert axis is not None
        return axis

    @property
    def candidate_positions(self) -> tuple[int, ...]:
        """Positions of a mixed input that are candidate-level."""
        count = extents(self.dims)[self.mixed_axis]
        taken = set(self.role.request)
        return tuple(k for k in range(count) if k not in taken)


def inputs(model: ModelProto, roles: Roles) -> list[Input]:
    """The inputs with factored shapes.

    Raises:
        UsageError: A role has positions along an axis that has no fixed extent.
    """
    out = []
    for info in describe(model):
        role = roles.inputs[info.name]
        check_positions(info, role)
        dims = []
        for axis, d in enumerate(info.dims or ()):
            if axis == role.candidate_axis:
                dims.append(canonical([CANDIDATES, role.record or 1]))
            elif isinstance(d, int):
                dims.append(canonical([d]))
            else:
                dims.append((f"S:{d or f'{info.name}.{axis}'}",))
        out.append(Input(info.name, info.elem_type, tuple(dims), role))
    return out


Ranges = dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]]
"""Per input, shaped as its entries per row: least value, least value not taken, whether it must be a whole number."""


class Maker:
    """Makes inputs that obey the roles.

    Args:
        declared: The inputs.
        ranges: Value ranges per entry, from `find_ranges`; None gives `fill` everywhere, as far as the declared ranges
            allow.
        fill: A value that tables and lengths are likely to accept.
    """

    def __init__(self, declared: Sequence[Input], ranges: Ranges | None, fill: int = 1) -> None:
        self.declared = declared
        self.ranges = ranges
        self.fill = fill

    def __call__(self, setting: Setting) -> Feed:
        """Inputs of the original signature: request-level entries are the same in every row."""
        rng = np.random.default_rng(1000 + setting.seed)
        return {i.name: self._draw(i, setting, rng) for i in self.declared}

    def _draw(self, i: Input, setting: Setting, rng: np.random.Generator) -> NDArray[Any]:
        # Drawn with one axis per factor, then brought into shape: the rows are where the candidate symbol is.
        factors = [f for d in i.dims for f in (d or (1,))]
        shape = [f if isinstance(f, int) else setting.symbols[f] for f in factors]
        once = [1 if f == CANDIDATES else n for f, n in zip(factors, shape, strict=True)]
        final = [
            int(np.prod([f if isinstance(f, int) else setting.symbols[f] for f in d], dtype=np.int64)) for d in i.dims
        ]
        same = self._values(i, once, factors, rng)
        if i.role.level == "request":
            data = np.broadcast_to(same, shape)
        else:
            data = self._values(i, shape, factors, rng)
            if i.role.level == "mixed":
                axis = next(
                    k for k, f in enumerate(factors) if isinstance(f, int) and _owner(i.dims, k) == i.mixed_axis
                )
                at = [slice(None)] * len(shape)
                at[axis] = list(i.role.request)  # type: ignore[call-overload]
                data[tuple(at)] = np.broadcast_to(same, shape)[tuple(at)]
        return np.ascontiguousarray(data).reshape(final)

    def _values(self, i: Input, shape: list[int], factors: list[Any], rng: np.random.Generator) -> NDArray[Any]:
        if i.dtype == TensorProto.STRING:
            return rng.choice(np.array(["", "a", "b", "onnxrank"], dtype=object), shape)
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(i.dtype))
        if self.ranges is None:
            least = max((r.low for r in i.role.ranges), default=0.0)
            most = min((r.high for r in i.role.ranges), default=np.inf)
            return np.full(shape, min(max(self.fill, least), most - 1) if most > least + 1 else least).astype(kind)
        if kind.kind == "b":
            return rng.random(shape) < 0.5
        low, high, whole = (
            a.reshape([n if isinstance(f, int) else 1 for n, f in zip(shape, factors, strict=True)])
            for a in self.ranges[i.name]
        )
        data = low + rng.random(shape) * (high - low)
        data = np.where(whole, np.minimum(np.floor(data), high - 1), np.where(np.isinf(high), 0, data))
        free = np.broadcast_to(np.isinf(high), shape)
        data = np.where(free, rng.standard_normal(shape), data)
        if kind.kind in "iu" and shape and shape[-1] >= 8 and i.role.level == "request" and (low <= 0).all():
            # Histories are padded with zeros behind their end.
            data[..., rng.integers(shape[-1] // 2, shape[-1] + 1) :] = 0
        return data.astype(kind)


def _owner(dims: Dims, factor: int) -> int:
    """The dimension that a factor belongs to."""
    k = 0
    for axis, d in enumerate(dims):
        k += len(d or (1,))
        if factor < k:
            return axis
    raise IndexError(factor)


def divided(declared: Sequence[Input], feed: Mapping[str, NDArray[Any]]) -> Feed:
    """The same inputs under the `request` interface: one row of what is request-level."""
    out: Feed = {}
    for i in declared:
        data, role = feed[i.name], i.role
        if role.level == "candidate" or role.candidate_axis is None:
            out[i.name] = data
            continue
        rows = data.reshape(-1, role.record) if role.record is not None else np.moveaxis(data, role.candidate_axis, 0)
        if role.level == "request":
            one = rows[:1]
            out[i.name] = one.reshape(-1) if role.record is not None else np.moveaxis(one, 0, role.candidate_axis)
            continue
        if role.record is not None:
            out[f"{i.name}.request"] = rows[:1, list(role.request)].reshape(-1)
            out[f"{i.name}.candidate"] = rows[:, list(i.candidate_positions)].reshape(-1)
        else:
            one = np.take(data, [0], role.candidate_axis) if data.shape[role.candidate_axis] else data
            out[f"{i.name}.request"] = np.take(one, role.request, i.mixed_axis)
            out[f"{i.name}.candidate"] = np.take(data, i.candidate_positions, i.mixed_axis)
    return out


# --- ranges --------------------------------------------------------------------------------------------------------


class _Lookups:
    """Follows input entries to the lookups that they index."""

    def __init__(self, declared: Sequence[Input]) -> None:
        self.bounds: Ranges = {}
        self._entry: dict[int, str] = {}
        self._derived: dict[int, list[tuple[Codes, NDArray[np.float64]]]] = {}
        for i in declared:
            shape = extents(i.dims)
            whole = np.full(shape, np.dtype(helper.tensor_dtype_to_np_dtype(i.dtype)).kind in "iu")
            self.bounds[i.name] = (np.full(shape, -np.inf), np.full(shape, np.inf), whole)

    def own(self, number: int, name: str) -> None:
        """Registers the source that holds an input's entries."""
        self._entry[number] = name

    def limit(self, codes: Codes, low: float, high: float) -> None:
        """Notes that entries must lie in `[low, high)`; infinite bounds note only that they are whole numbers."""
        flat = codes.reshape(-1)
        self._limit(flat, np.full(flat.shape, low), np.full(flat.shape, high))

    def _limit(self, flat: Codes, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        told: dict[int, list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]]] = {}
        # A source has a higher number than those that it is made of, so each passes on all that it was told at once.
        ahead: list[int] = []

        def tell(codes: Codes, least: NDArray[np.float64], most: NDArray[np.float64]) -> None:
            numbers = source_numbers(codes)
            for number in np.unique(numbers).tolist():
                at = numbers == number
                if number not in told:
                    heapq.heappush(ahead, -number)
                told.setdefault(number, []).append((offsets(codes[at]), least[at], most[at]))

        tell(flat, low, high)
        while ahead:
            number = -heapq.heappop(ahead)
            found, least, most = (np.concatenate(part) for part in zip(*told.pop(number), strict=True))
            where, back = np.unique(found, return_inverse=True)
            lows, highs = np.full(len(where), -np.inf), np.full(len(where), np.inf)
            np.maximum.at(lows, back, least)
            np.minimum.at(highs, back, most)
            if number in self._entry:
                least, most, whole = (a.reshape(-1) for a in self.bounds[self._entry[number]])
                least[where], most[where] = np.maximum(least[where], lows), np.minimum(most[where], highs)
                whole[where] = True
            for parents, shift in self._derived.get(number, []):
                delta = shift.reshape(-1)[where]
                tell(parents.reshape(-1)[where], lows - delta, highs - delta)

    def rule(self) -> Rule:
        """Transfer rules that only follow."""
        return Rule("lookups", "", "", "", "", "", "exact", {
            "Cast": self._cast,
            "Add": self._shift,
            "Sub": self._shift,
            **{op: self._pass for op in ("Identity", "Where", "Mul", "Max", "Min", "Abs", "Clip", "Relu")},
            "GRU": self._recur,
            "LSTM": self._recur,
            "RNN": self._recur,
            "Gather": self._gather,
            "GatherND": self._gather_nd,
        })  # fmt: skip

    def _cast(self, rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
        x = rw.value(node, 0)
        to = next(a.i for a in node.attribute if a.name == "to")
        if np.dtype(helper.tensor_dtype_to_np_dtype(to)).kind in "iu":
            self.limit(x.codes, -np.inf, np.inf)
        return [x]

    def _shift(self, rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
        for k in (0, 1):
            data = rw.array(node, 1 - k)
            if data is None or data.dtype.kind not in "iu" or (node.op_type == "Sub" and k):
                continue
            sign = -1.0 if node.op_type == "Sub" else 1.0
            return self._follow(rw, node, [(rw.value(node, k), sign * data.astype(np.float64))])
        return None

    def _pass(self, rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
        """Operators that give one of their operands, or 0: whole numbers in a range stay in it."""
        values = [rw.value(node, k) for k, i in enumerate(node.input) if i and rw.array(node, k) is None]
        kinds = [np.dtype(helper.tensor_dtype_to_np_dtype(v.dtype)).kind for v in values]
        if not values or any(k not in "iub" for k in kinds):
            return None
        return self._follow(rw, node, [(v, np.zeros(())) for v, k in zip(values, kinds, strict=True) if k != "b"])

    def _follow(
        self, rw: Rewrite, node: NodeProto, parents: list[tuple[Value, NDArray[np.float64]]]
    ) -> list[Abstract] | None:
        found = rw.facts.extents.get(node.output[0])
        if found is None or not parents:
            return None
        dims = broadcast_dims([v.dims for v, _ in parents])
        shape = np.broadcast_shapes(extents(dims), *(shift.shape for _, shift in parents))
        if len(shape) != len(dims):
            return None
        dims = with_extents(dims, shape)
        made = rw.new(dims, parents[0][0].dtype, symbols(dims), "derived")
        assert made.whole is not None
        self._derived[made.whole.number] = [
            (
                np.broadcast_to(v.codes.reshape((1,) * (len(shape) - v.rank) + v.codes.shape), shape),
                np.broadcast_to(shift, shape),
            )
            for v, shift in parents
        ]
        return [view(dims, made.dtype, codes_of(made.whole))]

    def _recur(self, rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
        if len(node.input) > 4 and node.input[4]:
            steps = extents(rw.value(node, 0).dims)[0]
            self.limit(rw.value(node, 4).codes, 1, steps + 1)
        return None

    def _gather(self, rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        self.look_up(rw, rw.value(node, 0), rw.value(node, 1), axis)
        return None

    def _gather_nd(self, rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
        ids = rw.value(node, 1)
        if extents(ids.dims)[-1] == 1:
            self.look_up(rw, rw.value(node, 0), ids, 0)
        return None

    def look_up(self, rw: Rewrite, table: Value, ids: Value, axis: int) -> None:
        """Notes that ids are positions along an axis of a table."""
        d = table.dims[axis % table.rank]
        if not symbols([d]) and (ids.whole is None or ids.whole.load is None):
            self.limit(ids.codes, 0, extents((d,))[0])


_SAME_ENTRIES = {"Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose", "Slice", "Expand"}
"""Operators whose result holds entries of their first input, wherever and however often."""


def _bodies(lookups: _Lookups, rw: Rewrite, graph: GraphProto, ids: Mapping[str, frozenset[str]]) -> None:
    """Limits ids that are looked up in the body of a control-flow node, as EmbeddingBag is exported.

    Args:
        lookups: Receives the limits.
        rw: Values of the tensors outside.
        graph: The body.
        ids: Tensors outside whose entries a tensor of the surrounding bodies holds.
    """
    known = dict(ids)

    def origins(name: str) -> frozenset[str]:
        return known.get(name, frozenset({name}) if name in rw.values else frozenset())

    for node in graph.node:
        if domain_of(node):
            continue
        if node.op_type == "Gather":
            table = rw.values.get(node.input[0])
            for origin in origins(node.input[1]):
                found = rw.values[origin]
                if isinstance(found, Value) and isinstance(table, Value):
                    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                    lookups.look_up(rw, table, found, axis)
        if node.op_type in _SAME_ENTRIES or node.op_type == "Gather":
            known[node.output[0]] = origins(node.input[0])
        for inner in subgraphs(node):
            _bodies(lookups, rw, inner, known)


def find_ranges(
    model: ModelProto,
    declared: Sequence[Input],
    facts: Facts,
    folder: str | os.PathLike[str] | None,
    dtypes: dict[str, int],
    movement: Rule,
) -> Ranges:
    """Value ranges of every input entry: declared ones first, then those of the tables that it looks up.

    Args:
        model: The model.
        declared: Its inputs.
        facts: Shapes, measured with zeros for inputs.
        folder: Where its external data lies.
        dtypes: Element types of tensors.
        movement: The rule that follows data movement.
    """
    lookups = _Lookups(declared)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    rw = Rewrite(facts, (lookups.rule(), movement), Emitter((), opset), dtypes, keep_moves=False)
    for i in declared:
        source = rw.sources.add(i.dims, i.dtype, i.name)
        lookups.own(source.number, i.name)
        rw.values[i.name] = Value(i.dims, i.dtype, source)
    rw.declare_initializers(model, folder)
    for s in {s for i in declared for s in symbols(i.dims)}:
        rw.layout.extent_of[s] = (declared[0].name, 0, 1)  # nothing written here is ever run
    rw.interpret(model.graph.node)
    for node in model.graph.node:
        for body in subgraphs(node):
            _bodies(lookups, rw, body, {})
    out: Ranges = {}
    for i in declared:
        low, high, whole = lookups.bounds[i.name]
        unknown = whole & np.isinf(high)
        low, high = np.where(unknown, FALLBACK_IDS[0], low), np.where(unknown, FALLBACK_IDS[1], high)
        for r in i.role.ranges:
            index: list[Any] = [slice(None)] * low.ndim
            if r.positions is not None:
                index[i.role.axis if i.role.axis is not None else i.mixed_axis] = list(r.positions)
            low[tuple(index)], high[tuple(index)] = r.low, r.high
        low = np.where(np.isinf(low) & ~np.isinf(high), np.minimum(0, high - 1), low)
        out[i.name] = (np.where(np.isinf(high), 0, low), high, whole)
    return out
