"""Joined lookups: one Gather on one table in place of many.

Where a request looks up a hundred features, a Gather each takes longer to be launched than to copy its one row. Tables
of one width and type become one, one below the other, and ids are brought to where their own table lies in it, or, if
they are outside of that, outside of all (`joint.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from onnxrank import cost
from onnxrank.flow import Walk
from onnxrank.graphs import attribute, kind, reads
from onnxrank.joint import bring
from onnxrank.network import Network
from onnxrank.operators import Trait, operator, traits
from onnxrank.packing import LOOKUPS, MOST_JOINED, Packed
from onnxrank.plans import LOOKUP, label
from onnxrank.rule import Refusal
from onnxrank.values import Dim, Level, extents, is_candidate_symbol, symbols

_ALONE = 1.6
"""Launches that a lookup by itself takes as long as: the Gather, and an operand of what brings rows side by side."""
_BROUGHT = 14.0
"""The same for bringing ids to their tables."""
_OPERAND = 0.5
"""The same for one operand or result more: an id by itself, or cut out of others."""
_LITTLE = 0.03
"""Share of the whole model's time that they may cost at other numbers of candidates than the usual one."""
_PER_ID = 5.7e-9
"""Seconds per id on the way: three conditions, three choices and a sum, by kernels that take number after number."""
_FLOAT = 4
"""Bytes of a float."""
_ID = 2
"""Floats that an id is as long as."""


@dataclass(frozen=True)
class _Lookup:
    """A Gather of rows of a constant.

    Attributes:
        node: The node.
        index: Its place in the model as it was given.
        rows: Rows of the table.
        columns: Ids per row of the ids; None for ids that are a vector.
        along: Rows of the ids.
        kind: Type of the ids.
        level: Their level.
        width: Floats, or as many bytes, per row of the table.
        place: Which Concat brings the rows side by side with others, and as which operand.
        like: What joined lookups must have in common.
    """

    node: NodeProto
    index: int
    rows: int
    columns: int | None
    along: Dim
    kind: int
    level: Level
    width: int
    place: tuple[int, int]
    like: tuple[object, ...]


def pays(before: float, after: float) -> bool:
    """Whether joined lookups are taken, by predicted seconds of both."""
    return after < before


class Lookups:
    """The lookups of a model that can be joined.

    Args:
        net: The model.
        flow: What is known of its tensors.
        candidates: Number of candidates that costs are told for; None for all lookups, whether that pays or not.
        at: Places of nodes in the model as it was given, by their identity; where they are now if None.
        whole: Predicted seconds of the model at other numbers of candidates, at which they may cost little of it.

    Attributes:
        groups: Those that are joined with each other.
        refusals: Those that would be joined with others but for their tables.
    """

    def __init__(
        self,
        net: Network,
        flow: Walk,
        candidates: int | None = None,
        at: Mapping[int, int] | None = None,
        whole: Mapping[int, float] = MappingProxyType({}),
    ) -> None:
        self._net, self._flow, self._candidates, self._whole = net, flow, candidates, whole
        self._now = {id(n): k for k, n in enumerate(net.nodes)}
        self._at = self._now if at is None else at
        self.refusals: list[Refusal] = []
        self.groups = self._groups()

    @property
    def packed(self) -> list[Packed]:
        """The lookups, as sites of a plan."""
        return [Packed(x.index, LOOKUPS, label(x.node), len(g)) for g in self.groups for x in g]

    def _groups(self) -> list[list[_Lookup]]:
        found: dict[tuple[object, ...], list[_Lookup]] = {}
        depth: dict[str, int] = {}
        for node in self._net.nodes:
            below = max((depth.get(i, 0) for i in reads(node)), default=0)
            lookup = self._lookup(node, below)
            if lookup is not None:
                found.setdefault(lookup.like, []).append(lookup)
            depth.update(dict.fromkeys(node.output, below + (lookup is not None)))
        families: dict[tuple[object, ...], list[list[_Lookup]]] = {}
        for group in found.values():
            own = self._own(group)
            families.setdefault(_ids(own), []).append(own)
        return [g for family in families.values() if self._pay(family) for g in family]

    def _lookup(self, node: NodeProto, depth: int) -> _Lookup | None:
        """A node as a lookup, if it is one that could be joined with others.

        Args:
            node: The node.
            depth: Number of lookups that its ids depend on: one of another depth may be what it depends on.
        """
        if operator(node) != "Gather" or attribute(node, "axis"):
            return None
        table, ids = self._net.stored(node.input[0]), self._flow.tensors.get(node.input[1])
        if table is None or ids is None or not table.dims or table.dims[0] < 1 or ids.opaque is not None:
            return None
        level, dims = ids.level, ids.dims
        if level not in (Level.REQUEST, Level.CANDIDATE) or len(ids.present - {Level.UNREAD}) > 1:
            return None
        if len(dims) not in (1, 2) or (len(dims) == 2 and symbols(dims[1:])):
            return None
        kind = self._flow.type_of(node.input[1])
        if kind not in (TensorProto.INT32, TensorProto.INT64):
            return None
        columns = extents(dims)[1] if len(dims) == 2 else None
        like = (tuple(table.dims[1:]), table.data_type, kind, dims[0], level, depth)
        index, place = self._at.get(id(node)), self._side_by_side(node)
        if index is None or place is None:
            return None
        size = helper.tensor_dtype_to_np_dtype(table.data_type).itemsize
        width = -(-prod(table.dims[1:]) * size // _FLOAT)
        return _Lookup(node, index, table.dims[0], columns, dims[0], kind, level, width, place, like)

    def _side_by_side(self, node: NodeProto) -> tuple[int, int] | None:
        """Where the rows of a lookup are brought side by side with others; None where something else is done to them.

        Rows that are read one by one would have to be taken out of the joined ones again.
        """
        net, found = self._net, []
        waiting = [node.output[0]]
        while waiting:
            name = waiting.pop()
            if name in net.outputs or name in net.inner:
                return None
            for reader in net.readers.get(name, []):
                if operator(reader) == "Concat":
                    found.append((self._now[id(reader)], list(reader.input).index(name)))
                elif Trait.RESHAPE in traits(reader) and name not in reader.input[1:]:
                    waiting.append(reader.output[0])
                else:
                    return None
        return min(found, default=None)

    def _own(self, group: list[_Lookup]) -> list[_Lookup]:
        """Those of a group whose tables go into the joined one as a whole, and are not stored twice."""
        group = sorted(group, key=lambda x: x.place)
        mine = {id(x.node) for x in group}
        reasons = [self._held_back(x.node.input[0], mine) for x in group]
        if self._candidates is not None and self._pay([group]):
            self.refusals += [
                Refusal(LOOKUP, label(x.node), x.node.op_type, r) for x, r in zip(group, reasons, strict=True) if r
            ]
        return [x for x, r in zip(group, reasons, strict=True) if r is None]

    def _held_back(self, table: str, group: Collection[int]) -> str | None:
        """Why a table is not copied into another."""
        net = self._net
        held = net.stored(table)
        assert held is not None
        if held.data_location == TensorProto.EXTERNAL:
            return f"{table} is external data, which stays where it is"
        if prod(held.dims) * helper.tensor_dtype_to_np_dtype(held.data_type).itemsize > MOST_JOINED:
            return f"{table} has more than {MOST_JOINED >> 20} MiB, which would be copied"
        others = [n for n in net.readers[table] if id(n) not in group or table in n.input[1:]]
        if others or table in net.outputs or table in net.inner:
            return f"{table} is read elsewhere, too, so its bytes would be stored twice"
        return None

    def _pay(self, groups: Sequence[Sequence[_Lookup]]) -> bool:
        """Whether one Gather each is predicted to be faster, of groups that read the same ids in the same way."""
        if len(groups[0]) < 2 or self._candidates is None:
            return len(groups[0]) > 1
        if not pays(*self._seconds(groups, self._candidates)):
            return False
        ends = {n: self._seconds(groups, n) for n in self._whole}
        return all(after - before <= _LITTLE * self._whole[n] for n, (before, after) in ends.items())

    def _seconds(self, groups: Sequence[Sequence[_Lookup]], candidates: int) -> tuple[float, float]:
        """Predicted seconds of lookups by themselves, and joined."""
        group = groups[0]
        rows = extents((group[0].along,))[0]
        if group[0].level is Level.CANDIDATE and any(map(is_candidate_symbol, symbols([group[0].along]))):
            rows *= candidates
        ids = sum(x.columns or 1 for x in group)
        together = self._lie_together(group)
        operands = _OPERAND * len(group)
        launched = _ALONE * sum(map(len, groups)) + (operands if together else 0)
        brought = _ALONE * len(groups) + _BROUGHT + (0 if together else operands)
        before = cost.estimate(launches=launched) + sum(self._copied(g, rows) for g in groups)
        return before, cost.estimate(launches=brought) + rows * ids * (_PER_ID + cost.beside(_ID))

    def _lie_together(self, group: Sequence[_Lookup]) -> bool:
        """Whether ids are parts of one tensor that go through the same functions, which are taken in one step."""
        return len({self._origin(x.node.input[1]) for x in group}) == 1

    def _origin(self, name: str) -> tuple[object, ...]:
        """The tensor that ids are a part of, and what is done to them; a tensor that is no part is one by itself."""
        ways: list[bytes] = []
        node = self._net.maker.get(name)
        while node is not None and len(node.input) == 1 and traits(node) & Trait.ELEMENTWISE:
            ways.append(kind(node))
            name = node.input[0]
            node = self._net.maker.get(name)
        if node is not None and operator(node) in ("Slice", "Split", "Gather"):
            name = node.input[0]
        return (name, *ways)

    def _copied(self, group: Sequence[_Lookup], rows: int) -> float:
        """Seconds of copying what each lookup gives beside the others, which joined ones need not."""
        widths = [(x.columns or 1) * x.width for x in group]
        alone = sum(widths) >= cost.WIDE and all(self._contracted(self._net.nodes[x.place[0]]) for x in group)
        if not alone:  # copied in one piece, then
            return rows * len(group) * cost.beside(0)
        return cost.CPU.seconds(cost.Bill("copy", _FLOAT * sum(widths) * rows, len(group) * rows))

    def _contracted(self, node: NodeProto) -> bool:
        """Whether products alone read what a node gives, in this shape or another."""
        readers = self._net.readers.get(node.output[0], [])
        return bool(readers) and all(
            Trait.PRODUCT in traits(r) or (Trait.RESHAPE in traits(r) and self._contracted(r)) for r in readers
        )


def join(net: Network, flow: Walk, at: Mapping[int, int], places: Collection[int]) -> list[Packed]:
    """Joins, in place, the lookups at some places; says which. The nodes are in no order then.

    Args:
        net: The model.
        flow: What is known of its tensors.
        at: Places of its nodes in the model as it was given, by their identity.
        places: The places.
    """
    if not places:
        return []
    out: list[Packed] = []
    brought: dict[tuple[object, ...], str] = {}
    for group in Lookups(net, flow, at=at).groups:
        taken = [x for x in group if x.index in places]
        if len(taken) > 1:
            _Joined(net, taken).write(brought)
            out += [Packed(x.index, LOOKUPS, label(x.node), len(taken)) for x in taken]
    return out


def _ids(group: Sequence[_Lookup]) -> tuple[object, ...]:
    """What tells where ids are brought: the ids, and which of them belong to a table of how many rows."""
    numbers: dict[str, int] = {}
    return tuple((x.node.input[1], x.rows, numbers.setdefault(x.node.input[0], len(numbers)), x.columns) for x in group)


class _Joined:
    """Some lookups, written as one.

    Args:
        net: The model.
        group: The lookups.
    """

    def __init__(self, net: Network, group: Sequence[_Lookup]) -> None:
        self._net, self._group = net, group
        self._made: list[NodeProto] = []
        self._first: dict[str, int] = {}
        self._total = 0
        for x in group:
            if x.node.input[0] not in self._first:
                self._first[x.node.input[0]] = self._total
                self._total += x.rows
        self._cast = group[0].kind != TensorProto.INT64 and 2 * self._total > np.iinfo(np.int32).max
        self._type = np.int64 if self._cast or group[0].kind == TensorProto.INT64 else np.int32

    def write(self, brought: dict[tuple[object, ...], str]) -> None:
        """Puts the nodes in the place of the lookups.

        Args:
            brought: Ids that are at their places already, by what `_ids` says of them; receives these.
        """
        net, group = self._net, self._group
        counts = [x.columns or 1 for x in group]
        asked = _ids(group)
        places = brought[asked] = brought.get(asked) or self._places(counts)
        found = self._add("Gather", [net.stack(list(self._first), "lookup/table"), places], "lookup/rows", axis=0)
        parts = [x.node.output[0] if x.columns is not None else net.fresh(f"{x.node.output[0]}/rows") for x in group]
        sizes = {"split": counts} if net.opset < 13 else {}
        operands = [found] if sizes else [found, net.constant(np.array(counts, np.int64), "lookup/counts")]
        self._made.append(net.node(LOOKUP, "Split", operands, parts, axis=1, **sizes))
        for x, part in zip(group, parts, strict=True):
            if x.columns is None:
                self._axis("Squeeze", part, x.node.output[0])
        gone = {id(x.node) for x in group}
        net.nodes[:] = [n for n in net.nodes if id(n) not in gone] + self._made
        net.renewed()

    def _places(self, counts: Sequence[int]) -> str:
        """Brings ids to the places of their tables in the joined one, so many for each lookup."""
        group = self._group
        ids = [x.node.input[1] if x.columns is not None else self._axis("Unsqueeze", x.node.input[1]) for x in group]
        joined = self._add("Concat", ids, "lookup/ids", axis=1)
        if self._cast:
            joined = self._add("Cast", [joined], "lookup/wide", to=int(TensorProto.INT64))
        rows = np.repeat([x.rows for x in group], counts)
        begin = np.repeat([self._first[x.node.input[0]] for x in group], counts)
        return bring(self._add, self._numbers, joined, rows, begin, self._total)

    def _add(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        name = self._net.fresh(hint)
        self._made.append(self._net.node(LOOKUP, op, inputs, [name], **attributes))
        return name

    def _numbers(self, data: Any, hint: str) -> str:
        return self._net.constant(np.array(data, self._type), hint)

    def _axis(self, op: str, name: str, result: str | None = None) -> str:
        """Unsqueeze or Squeeze of the axis of columns."""
        made = result or self._net.fresh(f"{name}/column")
        old = self._net.opset < 13
        operands = [name] if old else [name, self._net.constant(np.array([1], np.int64), "lookup/axis")]
        self._made.append(self._net.node(LOOKUP, op, operands, [made], **({"axes": [1]} if old else {})))
        return made
