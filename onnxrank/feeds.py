"""Inputs for running a model: what is declared of them, and data that a model accepts.

Ids must lie inside the tables that they look up. Where the roles file gives no range, the lookups are found by
following every entry of every input through casts, offsets and data movement to the Gathers it ends in.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from onnxrank.facts import Setting
from onnxrank.flow import Given, Walk
from onnxrank.graphs import attribute, subgraphs
from onnxrank.joint import limits
from onnxrank.operators import Trait, operator, traits
from onnxrank.roles import InputInfo, InputRole, Roles, check_positions
from onnxrank.transfers import uniform
from onnxrank.values import (
    CANDIDATES,
    HOLE,
    MAX_ENTRIES,
    Codes,
    Dims,
    Level,
    Sources,
    Unrepresentable,
    canonical,
    codes_of,
    extents,
    is_candidate_symbol,
    offsets,
    source_numbers,
    symbols,
)

Feed = dict[str, NDArray[Any]]
FALLBACK_IDS = (0, 7.5)
"""Range of whole numbers that nothing is known of; no table has half a row, so none is taken for this."""


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


def levels(declared: Sequence[Input]) -> dict[str, Given]:
    """Shapes and levels of inputs, as their roles say."""
    out: dict[str, Given] = {}
    for i in declared:
        rows = any(map(is_candidate_symbol, symbols(i.dims)))
        each = Level.CANDIDATE if rows else Level.REQUEST
        if i.role.level == "mixed":
            found = np.full(extents(i.dims), each, np.int8)
            found[(slice(None),) * i.mixed_axis + (list(i.role.request),)] = Level.REQUEST
        else:
            found = uniform(
                Level.REQUEST if i.role.level == "request" and i.role.candidate_axis is not None else each, i.dims
            )
        out[i.name] = i.dims, found
    return out


Ranges = dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]]
"""Per input, shaped as its entries per row: least value, least value not taken, whether it must be a whole number."""


@dataclass(frozen=True)
class Known:
    """What a study of a model found of its inputs.

    Attributes:
        ranges: Values of their entries.
        symbols: Symbols of their shapes.
        shortest: The least length of histories at which the model runs.
    """

    ranges: Ranges
    symbols: tuple[str, ...]
    shortest: int = 1


class Bounds(NamedTuple):
    """The range of an input, in arrays with one axis per factor of its shape.

    Attributes:
        low: The least of every entry.
        high: What it stays below; infinite where nothing is known.
        whole: Whether it is a whole number.
        ids: Whether all are whole numbers of which something is known.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    whole: NDArray[np.bool_]
    ids: bool


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
        self._bounds: dict[str, Bounds] = {}

    def __call__(self, setting: Setting) -> Feed:
        """Inputs of the original signature: request-level entries are the same in every row."""
        rng = np.random.default_rng(1000 + setting.seed)
        return {i.name: self._draw(i, setting, rng) for i in self.declared}

    def bounds(self, i: Input) -> Bounds:
        """The range of an input; there must be ranges."""
        if i.name not in self._bounds:
            assert self.ranges is not None
            shape = [f if isinstance(f, int) else 1 for d in i.dims for f in (d or (1,))]
            low, high, whole = self.ranges[i.name]
            ids = bool((whole & ~np.isinf(high)).all())
            self._bounds[i.name] = Bounds(low.reshape(shape), high.reshape(shape), whole.reshape(shape), ids)
        return self._bounds[i.name]

    def _draw(self, i: Input, setting: Setting, rng: np.random.Generator) -> NDArray[Any]:
        # Drawn with one axis per factor, then brought into shape: the rows are where the candidate symbol is.
        factors = [f for d in i.dims for f in (d or (1,))]
        shape = [f if isinstance(f, int) else setting.symbols[f] for f in factors]
        once = [1 if f == CANDIDATES else n for f, n in zip(factors, shape, strict=True)]
        final = [prod(f if isinstance(f, int) else setting.symbols[f] for f in d) for d in i.dims]
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
        kind = _dtype(i.dtype)
        if self.ranges is None:
            least = max((r.low for r in i.role.ranges), default=0.0)
            most = min((r.high for r in i.role.ranges), default=np.inf)
            return np.full(shape, min(max(self.fill, least), most - 1) if most > least + 1 else least).astype(kind)
        if kind.kind == "b":
            return rng.random(shape) < 0.5
        low, high, whole, ids = self.bounds(i)
        data = low + rng.random(shape) * (high - low)
        free = rng.standard_normal(shape)  # drawn in any case: what is drawn next must not depend on it
        floor = np.asarray(np.minimum(np.floor(data), high - 1))
        data = floor if ids else np.where(np.isinf(high), free, np.where(whole, floor, data))
        if kind.kind in "iu" and shape and shape[-1] >= 8 and i.role.level == "request" and (low <= 0).all():
            # Histories are padded with zeros behind their end.
            data[..., rng.integers(shape[-1] // 2, shape[-1] + 1) :] = 0
        return data.astype(kind)


@cache
def _dtype(number: int) -> np.dtype[Any]:
    """NumPy's element type for ONNX's number of one."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(number))


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
        if role.level == "request" and role.record is None:
            first = [slice(None)] * data.ndim
            first[role.candidate_axis] = slice(1)
            out[i.name] = data[tuple(first)]
        elif role.record is not None:
            rows = data.reshape(-1, role.record)
            if role.level == "request":
                out[i.name] = rows[:1].reshape(-1)
                continue
            out[f"{i.name}.request"] = rows[:1, list(role.request)].reshape(-1)
            out[f"{i.name}.candidate"] = rows[:, list(i.candidate_positions)].reshape(-1)
        else:
            one = np.take(data, [0], role.candidate_axis) if data.shape[role.candidate_axis] else data
            out[f"{i.name}.request"] = np.take(one, role.request, i.mixed_axis)
            out[f"{i.name}.candidate"] = np.take(data, i.candidate_positions, i.mixed_axis)
    return out


# --- ranges --------------------------------------------------------------------------------------------------------


class _Lookups:
    """Follows input entries to the lookups that they index.

    Args:
        declared: The inputs.
        flow: What is known of the tensors.
    """

    def __init__(self, declared: Sequence[Input], flow: Walk) -> None:
        self.bounds: Ranges = {}
        self.codes: dict[str, Codes] = {}
        """Of tensors that hold entries of inputs, or such with a number added, which ones."""
        self._flow, self._sources = flow, Sources()
        self._entry: dict[int, str] = {}
        self._derived: dict[int, list[tuple[Codes, NDArray[np.float64]]]] = {}
        for i in declared:
            shape = extents(i.dims)
            whole = np.full(shape, np.dtype(helper.tensor_dtype_to_np_dtype(i.dtype)).kind in "iu")
            self.bounds[i.name] = (np.full(shape, -np.inf), np.full(shape, np.inf), whole)
            source = self._sources.add(i.dims, i.dtype, i.name)
            self._entry[source.number] = i.name
            with contextlib.suppress(Unrepresentable):
                self.codes[i.name] = codes_of(source)

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

    def step(self, node: NodeProto) -> None:
        """One node: limits what it looks up, and follows entries through it."""
        how = self._STEPS.get(operator(node))
        if how is not None:
            how(self, node)
        if node.output[:1] and node.output[0] not in self.codes:
            self._move(node)

    def _move(self, node: NodeProto) -> None:
        """Data movement; entries that come from no input are holes."""
        if not any(i in self.codes for i in node.input):
            return
        for name, m in zip(node.output, self._flow.moves_of(node) or (), strict=False):
            held = list(node.input) if m.joins else node.input[:1]
            shapes = [self._flow.shape_of(i) for i in held]
            if name and any(i in self.codes for i in held) and all(d is not None for d in shapes):
                whole = [self.codes.get(i, np.full(extents(d or ()), HOLE)) for i, d in zip(held, shapes, strict=True)]
                if prod(extents(m.dims)) <= MAX_ENTRIES:
                    self.codes[name] = m.take(*whole)

    def _kind(self, name: str) -> str:
        """Kind of a tensor's type, as numpy's letter for it."""
        dtype = self._flow.type_of(name)
        return np.dtype(helper.tensor_dtype_to_np_dtype(dtype)).kind if dtype else ""

    def _constant(self, name: str) -> NDArray[Any] | None:
        dims = self._flow.shape_of(name)
        return None if dims is None or symbols(dims) else self._flow.data_of(name)

    def _cast(self, node: NodeProto) -> None:
        codes = self.codes.get(node.input[0])
        if codes is None:
            return
        to = attribute(node, "to")
        if np.dtype(helper.tensor_dtype_to_np_dtype(to)).kind in "iu":
            self.limit(codes, -np.inf, np.inf)
        self.codes[node.output[0]] = codes

    def _shift(self, node: NodeProto) -> None:
        for k in (0, 1):
            if node.input[k] not in self.codes:
                continue
            data = self._constant(node.input[1 - k])
            if data is None or data.dtype.kind not in "iu" or (operator(node) == "Sub" and k):
                continue
            sign = -1.0 if operator(node) == "Sub" else 1.0
            return self._follow(node, [(node.input[k], sign * data.astype(np.float64))])

    def _pass(self, node: NodeProto) -> None:
        """Operators that give one of their operands, or 0: whole numbers in a range stay in it."""
        if self.codes.keys().isdisjoint(node.input):
            return
        given = [i for i in node.input if i and self._constant(i) is None]
        if all(self._kind(i) in tuple("iub") for i in given):
            self._follow(node, [(i, np.zeros(())) for i in given if self._kind(i) != "b"])

    def _follow(self, node: NodeProto, parents: list[tuple[str, NDArray[np.float64]]]) -> None:
        """Entries that are those of others with numbers added."""
        dims = self._flow.shape_of(node.output[0])
        own = [(self.codes[i], shift) for i, shift in parents if i in self.codes]
        if dims is None or not own or prod(extents(dims)) > MAX_ENTRIES:
            return
        shape = extents(dims)
        source = self._sources.add(dims, TensorProto.INT64, node.output[0])
        try:
            self._derived[source.number] = [
                (np.broadcast_to(codes, shape), np.broadcast_to(shift, shape)) for codes, shift in own
            ]
        except ValueError:  # another layout than that of the operands
            return
        self.codes[node.output[0]] = codes_of(source)

    def _recur(self, node: NodeProto) -> None:
        dims = self._flow.shape_of(node.input[0])
        if len(node.input) > 4 and node.input[4] in self.codes and dims is not None:
            self.limit(self.codes[node.input[4]], 1, extents(dims)[0] + 1)

    def _gather(self, node: NodeProto) -> None:
        found = limits(node.input[1], self._flow.producers, self._constant)
        if found is not None:
            self._joined(*found[:2])
        axis = attribute(node, "axis", 0)
        self.look_up(node.input[0], node.input[1], axis)

    def _joined(self, ids: str, rows: NDArray[np.int64]) -> None:
        """Ids of tables that are one by now: each within its own."""
        codes = self.codes.get(ids)
        if codes is not None:
            most = np.broadcast_to(rows, codes.shape).astype(np.float64).reshape(-1)
            self._limit(codes.reshape(-1), np.zeros(most.shape), most)

    def _gather_nd(self, node: NodeProto) -> None:
        ids = self._flow.shape_of(node.input[1])
        if ids is not None and extents(ids)[-1] == 1:
            self.look_up(node.input[0], node.input[1], 0)

    def look_up(self, table: str, ids: str, axis: int) -> None:
        """Notes that ids are positions along an axis of a table."""
        dims = self._flow.shape_of(table)
        if dims is None or ids not in self.codes:
            return
        d = dims[axis % len(dims)]
        if not symbols([d]):
            self.limit(self.codes[ids], 0, extents((d,))[0])

    _STEPS: ClassVar[dict[str, Callable[[_Lookups, NodeProto], None]]] = {
        "Cast": _cast,
        "Add": _shift,
        "Sub": _shift,
        **dict.fromkeys(("Where", "Mul", "Max", "Min", "Abs", "Clip", "Relu"), _pass),
        **dict.fromkeys(("GRU", "LSTM", "RNN"), _recur),
        "Gather": _gather,
        "GatherND": _gather_nd,
    }
    """What is done at an operator; all others move entries, or end them."""


def _bodies(lookups: _Lookups, graph: GraphProto, ids: Mapping[str, frozenset[str]]) -> None:
    """Limits ids that are looked up in the body of a control-flow node, as EmbeddingBag is exported.

    Args:
        lookups: Receives the limits.
        graph: The body.
        ids: Tensors outside whose entries a tensor of the surrounding bodies holds.
    """
    known = dict(ids)

    def origins(name: str) -> frozenset[str]:
        return known.get(name, frozenset({name}) if name in lookups.codes else frozenset())

    for node in graph.node:
        what = traits(node)
        if operator(node) == "Gather":
            axis = attribute(node, "axis", 0)
            for origin in origins(node.input[1]):
                lookups.look_up(node.input[0], origin, axis)
        if what & (Trait.MOVEMENT | Trait.CAST) and operator(node) != "Concat":
            known[node.output[0]] = origins(node.input[0])
        for inner in subgraphs(node):
            _bodies(lookups, inner, known)


def find_ranges(declared: Sequence[Input], flow: Walk, nodes: Sequence[NodeProto]) -> Ranges:
    """Value ranges of every input entry: declared ones first, then those of the tables that it looks up.

    Args:
        declared: The inputs.
        flow: What is known of the tensors.
        nodes: The nodes, in their order.
    """
    lookups = _Lookups(declared, flow)
    for node in nodes:
        lookups.step(node)
    for node in nodes:
        for body in subgraphs(node):
            _bodies(lookups, body, {})
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
