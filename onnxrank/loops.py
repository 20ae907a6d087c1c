"""Loops that take equal runs of a tensor's rows together, as exporters write EmbeddingBag, without the loop.

Iteration i looks at rows `i * w` to `i * w + w` and reduces them to one. Where that is proved, for every number of
candidates, the loop is one Reshape to `[rows / w, w, ...]` and one reduction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from onnxrank import extents as ex
from onnxrank.emitter import Emitter, emitter_for, replaced
from onnxrank.extents import Expr
from onnxrank.facts import Facts
from onnxrank.graphs import attribute, names_in, subgraphs, versions
from onnxrank.operators import Trait, having, operator

REDUCTIONS = frozenset({"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"})
_SAME = frozenset([*having(Trait.MOVEMENT | Trait.FREE), *having(Trait.CAST)])
"""Operators that leave a whole number as it is."""


@dataclass(frozen=True)
class _Line:
    """The whole number `first + step * i`, of iteration i, or entry i of a vector."""

    first: int
    step: int


@dataclass(frozen=True)
class _Flag:
    """A condition that is the same in every iteration."""

    value: bool


@dataclass(frozen=True)
class _More:
    """Whether another iteration is to come: `line < end`."""

    line: _Line
    end: int | Expr


@dataclass(frozen=True)
class _Window:
    """Rows `start` to `start + width` of a tensor, or of `table` looked up with them.

    Attributes:
        data: The outer tensor that they are rows of.
        start: First row.
        width: Their number.
        table: Outer tensor in which they are ids; None where they are no ids.
        reduce: The node that reduces them to one.
    """

    data: str
    start: _Line
    width: int
    table: str | None = None
    reduce: NodeProto | None = None


@dataclass(frozen=True)
class _Collected:
    """A sequence to which every iteration adds one entry."""

    entry: _Window


_Value = _Line | _Flag | _More | _Window | _Collected


def without_loops(model: ModelProto, facts: Facts) -> ModelProto | None:
    """A copy of a model without the loops that are such reductions; None if there are none.

    Args:
        model: The model, functions inlined.
        facts: Its shapes and constants.
    """
    outer = _Outer(model, facts)
    found = {id(node): bag for node in model.graph.node if (bag := _Loop(outer, node).bag()) is not None}
    if not found:
        return None
    emit = emitter_for(model)
    # A sequence is read by one ConcatFromSequence, which makes what the loop is replaced by.
    joined = {bag.result for bag in found.values()}

    def write(node: NodeProto) -> bool:
        if id(node) in found:
            _write(found[id(node)], emit)
        return id(node) in found or not joined.isdisjoint(node.output)

    return replaced(model, emit, write)


@dataclass(frozen=True)
class _Bag:
    """What a loop does.

    Attributes:
        window: The rows of one iteration, reduced.
        rest: Extents of `window.data` behind the first.
        result: The tensor of all iterations' results.
    """

    window: _Window
    rest: tuple[int, ...]
    result: str


def _write(bag: _Bag, emit: Emitter) -> None:
    window, reduce = bag.window, bag.window.reduce
    assert reduce is not None
    shape = emit.constant(np.array([-1, window.width, *bag.rest], np.int64))
    rows = emit.add("Reshape", [window.data, shape], hint=bag.result)
    if window.table is not None:
        rows = emit.add("Gather", [window.table, rows], {"axis": 0}, hint=bag.result)
    emit.reduce(operator(reduce), rows, [1], False, output=bag.result)


class _Outer:
    """The graph around a loop."""

    def __init__(self, model: ModelProto, facts: Facts) -> None:
        self.model, self.facts = model, facts
        self.outputs = {o.name for o in model.graph.output}
        given = {i.name for i in model.graph.input}
        self.stored = {t.name: t for t in model.graph.initializer if t.name not in given}
        self.version = versions(model)[""]

    @cached_property
    def made(self) -> dict[str, NodeProto]:
        """Nodes by their outputs."""
        return {o: n for n in self.model.graph.node for o in n.output if o}

    @cached_property
    def readers(self) -> dict[str, list[NodeProto]]:
        """Nodes by what they read."""
        out: dict[str, list[NodeProto]] = {}
        for n in self.model.graph.node:
            for i in {*n.input, *(c for g in subgraphs(n) for c in names_in(g))}:
                out.setdefault(i, []).append(n)
        return out

    def number(self, name: str) -> int | None:
        """A constant of one entry, whole or a condition."""
        if name in self.facts.folded:
            dims, data = self.facts.folded[name]
            fixed = not any(isinstance(f, str) for d in dims for f in d)
            return int(data.reshape(-1)[0]) if fixed and data.size == 1 and data.dtype.kind in "iub" else None
        return one_entry(self.stored[name]) if name in self.stored else None

    def amount(self, name: str) -> int | Expr | None:
        """A whole number that is constant or an extent."""
        fixed = self.number(name)
        node = self.made.get(name)
        if fixed is not None or node is None:
            return fixed
        sizes = self.facts.sizes.get(node.input[0]) if node.input else None
        if operator(node) == "Size" and sizes is not None:
            return ex.product(sizes)
        if operator(node) == "Shape" and sizes is not None and len(sizes) == 1 and self.facts.sizes.get(name) == (1,):
            return sizes[0]
        if operator(node) == "Gather" and (source := self.made.get(node.input[0])) is not None:
            position, of = self.number(node.input[1]), self.facts.sizes.get(source.input[0]) if source.input else None
            whole = operator(source) == "Shape" and not source.attribute
            if whole and of is not None and position is not None and -len(of) <= position < len(of):
                return of[position]
        if operator(node) in _SAME:
            whole = attribute(node, "to", TensorProto.INT64) == TensorProto.INT64
            return self.amount(node.input[0]) if whole else None
        return None

    def count(self, name: str) -> int | Expr | None:
        """Number of entries of a vector."""
        sizes = self.facts.sizes.get(name)
        return sizes[0] if sizes is not None and len(sizes) == 1 else None

    def vector(self, name: str) -> _Line | None:
        """A vector that is an arithmetic progression."""
        node = self.made.get(name)
        if node is None:
            return None
        if operator(node) == "Range":
            first, step = self.number(node.input[0]), self.number(node.input[2])
            return None if first is None or step is None else _Line(first, step)
        if operator(node) == "Identity":
            return self.vector(node.input[0])
        if operator(node) == "Concat" and len(node.input) == 2:
            line, count, last = self.vector(node.input[0]), self.count(node.input[0]), self.amount(node.input[1])
            goes_on = line is not None and count is not None and self.count(node.input[1]) == 1
            return line if goes_on and line and count is not None and last == line.first + line.step * count else None
        if operator(node) == "Slice" and self.version >= 10 and len(node.input) >= 3:
            line, start = self.vector(node.input[0]), self.number(node.input[1])
            step = 1 if len(node.input) < 5 else self.number(node.input[4])
            if line is not None and start is not None and start >= 0 and step == 1:
                return _Line(line.first + line.step * start, line.step)
        return None


class _Loop:
    """One node that may be such a loop."""

    def __init__(self, outer: _Outer, node: NodeProto) -> None:
        self.outer, self.node = outer, node
        self.known: dict[str, _Value | None] = {}
        self.local: set[str] = set()
        self.rounds: int | Expr = 0
        self.sequence = self.again = ""
        self.made: dict[str, NodeProto] = {}
        self.stored: dict[str, TensorProto] = {}

    def bag(self) -> _Bag | None:
        """What the loop does; None if that is not such a reduction, or not proved."""
        if operator(self.node) != "Loop":
            return None
        body = attribute(self.node, "body")
        self._enter(body)
        trip, condition, *carried = self.node.input
        position, again, *states = (i.name for i in body.input)
        self.known = {position: _Line(0, 1), again: None}
        self.local, self.again = {i.name for i in body.input}, again
        outs = [o.name for o in body.output]
        if not carried:
            rounds, collected, result = self._counted(trip, condition, outs)
        else:
            rounds, collected, result = self._while(trip, condition, carried, states, outs)
        if rounds is None or collected is None:
            return None
        sizes = self.outer.facts.sizes.get(collected.data)
        if sizes is None or not all(isinstance(n, int) for n in sizes[1:]):
            return None
        rest = tuple(n for n in sizes[1:] if isinstance(n, int))
        # The runs follow each other from the first row to the last.
        whole = collected.start == _Line(0, collected.width) and sizes[0] == collected.width * rounds
        ids = collected.table is None or not rest
        return _Bag(collected, rest, result) if whole and ids else None

    def _counted(self, trip: str, condition: str, outs: list[str]) -> tuple[int | Expr | None, _Window | None, str]:
        """A number of iterations given beforehand, of which each gives one row."""
        nothing = None, None, ""
        if len(outs) != 2 or not trip or (condition and self.outer.number(condition) != 1):
            return nothing
        rounds = self.outer.amount(trip)
        if rounds is None:
            return nothing
        self.rounds = rounds
        # It holds at first, and from one iteration to the next.
        self.known[self.again] = _Flag(True)
        if not _holds(self._value(outs[0])):
            return nothing
        entry = self._value(outs[1])
        if not isinstance(entry, _Window) or entry.reduce is None or _keeps(entry.reduce):
            return nothing
        return rounds, entry, self.node.output[0]

    def _while(
        self, trip: str, condition: str, carried: list[str], states: list[str], outs: list[str]
    ) -> tuple[int | Expr | None, _Window | None, str]:
        """A counter that runs from 0 to an extent, and a sequence that takes up a row at a time."""
        nothing = None, None, ""
        first = self.outer.made.get(condition)
        if trip or len(carried) != 2 or len(outs) != 3 or first is None or operator(first) != "Less":
            return nothing
        rounds = self.outer.amount(first.input[1])
        empty = self.outer.made.get(carried[1])
        if self.outer.number(carried[0]) != 0 or self.outer.number(first.input[0]) != 0 or empty is None:
            return nothing
        if rounds is None or operator(empty) != "SequenceEmpty":
            return nothing
        self.rounds = rounds
        self.known |= {states[0]: _Line(0, 1), states[1]: None}
        self.sequence = states[1]
        if self._value(outs[1]) != _Line(1, 1) or self._value(outs[0]) != _More(_Line(1, 1), rounds):
            return nothing
        taken = self._value(outs[2])
        counter, sequence = (*self.node.output, "")[:2]
        readers = self.outer.readers.get(sequence, [])
        if not isinstance(taken, _Collected) or self.outer.readers.get(counter) or len(readers) != 1:
            return nothing
        join, entry = readers[0], taken.entry
        joins = operator(join) == "ConcatFromSequence" and attribute(join, "axis") == 0
        if not joins or attribute(join, "new_axis", 0):
            return nothing
        if {counter, sequence} & self.outer.outputs or entry.reduce is None or not _keeps(entry.reduce):
            return nothing
        return rounds, entry, join.output[0]

    def _enter(self, graph: GraphProto) -> None:
        self.made |= {o: n for n in graph.node for o in n.output if o}
        self.stored |= {t.name: t for t in graph.initializer}

    def _inside(self, name: str) -> bool:
        """Whether a tensor belongs to the body."""
        return name in self.made or name in self.stored or name in self.local

    def _value(self, name: str) -> _Value | None:
        """What a tensor of the body is in iteration i; None where that is not known."""
        if name not in self.known:
            self.known[name] = self._found(name)
        return self.known[name]

    def _found(self, name: str) -> _Value | None:
        node = self.made.get(name)
        if node is None:
            stored = self.stored.get(name)
            fixed = self.outer.number(name) if stored is None else one_entry(stored)
            return None if fixed is None else _Line(fixed, 0)
        op = operator(node)
        if op in REDUCTIONS:
            return self._reduced(node)
        reader = {
            "Constant": self._constant,
            "Add": self._added,
            "Equal": self._equal,
            "Less": self._less,
            "If": self._branch,
            "Slice": self._sliced,
            "Gather": self._gathered,
            "SequenceInsert": self._inserted,
        }.get(op, self._same if op in _SAME else None)
        return None if reader is None else reader(node)

    def _constant(self, node: NodeProto) -> _Value | None:
        value = attribute(node, "value")
        fixed = None if value is None else one_entry(value)
        return None if fixed is None else _Line(fixed, 0)

    def _line(self, name: str) -> _Line | None:
        found = self._value(name)
        return found if isinstance(found, _Line) else None

    def _same(self, node: NodeProto) -> _Value | None:
        found = self._value(node.input[0])
        kind = attribute(node, "to")
        if kind == TensorProto.BOOL and isinstance(found, _Line) and found.step == 0:
            return _Flag(bool(found.first))
        if isinstance(found, _Window):
            return found if operator(node) == "Identity" else None
        return found if kind in (None, TensorProto.INT64, TensorProto.BOOL) else None

    def _added(self, node: NodeProto) -> _Value | None:
        a, b = map(self._line, node.input)
        return None if a is None or b is None else _Line(a.first + b.first, a.step + b.step)

    def _equal(self, node: NodeProto) -> _Value | None:
        a, b = map(self._line, node.input)
        return _Flag(a == b) if a is not None and b is not None and a.step == b.step else None

    def _less(self, node: NodeProto) -> _Value | None:
        line, end = self._line(node.input[0]), self.outer.amount(node.input[1])
        return None if line is None or end is None else _More(line, end)

    def _branch(self, node: NodeProto) -> _Value | None:
        condition = self._value(node.input[0])
        if not isinstance(condition, _Flag):
            return None
        name = "then_branch" if condition.value else "else_branch"
        branch = attribute(node, name)
        if any(self._inside(o) for o in _given(branch)):
            return None  # two scopes with the same name
        self._enter(branch)
        return self._value(branch.output[0].name)

    def _within(self, line: _Line, name: str) -> bool:
        """Whether an outer vector has the entry that a line says, in every iteration."""
        count = self.outer.count(name)
        if count is None or line.first < 0 or line.step < 0:
            return False
        return ex.bounds(count - (line.first + line.step * (self.rounds - 1)) - 1)[0] >= 0

    def _entry(self, name: str, line: _Line) -> _Line | None:
        """An entry of an outer vector."""
        vector = self.outer.vector(name)
        if self._inside(name) or vector is None or not self._within(line, name):
            return None
        return _Line(vector.first + vector.step * line.first, vector.step * line.step)

    def _sliced(self, node: NodeProto) -> _Value | None:
        data, start, end = node.input[0], self._line(node.input[1]), self._line(node.input[2])
        axis = self._line(node.input[3]) if len(node.input) > 3 else _Line(0, 0)
        step = self._line(node.input[4]) if len(node.input) > 4 else _Line(1, 0)
        if self._inside(data) or start is None or end is None or axis != _Line(0, 0) or step != _Line(1, 0):
            return None
        width = end.first - start.first
        if start.step != end.step or width < 1 or start.first < 0:
            return None
        entry = self._entry(data, start) if width == 1 else None
        return entry if entry is not None else _Window(data, start, width)

    def _gathered(self, node: NodeProto) -> _Value | None:
        if attribute(node, "axis", 0) != 0 or self._inside(node.input[0]):
            return None
        index = self._value(node.input[1])
        if isinstance(index, _Window) and index.table is None and index.reduce is None:
            return replace(index, table=node.input[0])
        return self._entry(node.input[0], index) if isinstance(index, _Line) else None

    def _reduced(self, node: NodeProto) -> _Value | None:
        window = self._value(node.input[0])
        if not isinstance(window, _Window) or window.reduce is not None:
            return None
        axes: list[int] | None = attribute(node, "axes")
        if len(node.input) > 1:
            line = self._line(node.input[1])
            axes = [line.first] if line is not None and line.step == 0 else None
        return replace(window, reduce=node) if axes == [0] else None

    def _inserted(self, node: NodeProto) -> _Value | None:
        entry = self._value(node.input[1])
        at_end = len([i for i in node.input if i]) == 2 and node.input[0] == self.sequence
        return _Collected(entry) if at_end and isinstance(entry, _Window) and entry.reduce is not None else None


def _holds(condition: _Value | None) -> bool:
    """Whether a condition is true in every iteration."""
    return condition == _Flag(True) or (isinstance(condition, _Line) and condition.step == 0 and condition.first != 0)


def _given(graph: GraphProto) -> set[str]:
    """Names that a graph gives."""
    return {o for n in graph.node for o in n.output if o} | {t.name for t in graph.initializer}


def _keeps(reduce: NodeProto) -> bool:
    """Whether a reduction leaves an axis of one entry."""
    return bool(attribute(reduce, "keepdims", 1))


def one_entry(tensor: TensorProto) -> int | None:
    """The entry of a constant that has but one, a whole number or a condition."""
    whole = tensor.data_type in (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
    if not whole or tensor.data_location == TensorProto.EXTERNAL or int(np.prod(tensor.dims)) != 1:
        return None
    return int(numpy_helper.to_array(tensor).reshape(-1)[0])
