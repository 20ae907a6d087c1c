"""What tells which candidates belong to which request, and what follows from it in the graph.

However callers say it, the graph gets one index, `[candidates]`, from candidates to requests, and, where products need
the candidates of a request side by side, one pair of indices there and back. Whatever callers give, these indices lie
inside what they index; where what is given contradicts itself, `valid` is false.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from onnxrank.batching.tensors import Size
from onnxrank.emitter import Emitter
from onnxrank.extents import Expr

FORMS = ("lengths", "offsets", "index", "triton")
"""How callers may say it."""
PADDED = "padded"
"""Every request has as many candidates, `[R, M, ...]`, so there is nothing to be said."""
NAMES = {
    "lengths": "request_lengths",
    "offsets": "request_offsets",
    "index": "request_index",
    "triton": "request_shapes",
}
"""What the further input is called."""


@dataclass
class Requests:
    """The requests of a call, in the graph.

    Attributes:
        emit: Receives the nodes.
        form: How callers say which candidates are whose; one of `FORMS`, or `PADDED`.
        name: The input that says it.
        many: A tensor and the axis along which it has a row per candidate, by how many entries each.
        once: Request-level inputs, and the axis along which each has a row per request, by how many entries.
        record: Entries of the input behind `triton`'s shapes that are one candidate.
        width: With `PADDED`: an input, and the axis of the candidates of a request.
    """

    emit: Emitter
    form: str
    name: str
    many: tuple[str, int, int] = ("", 0, 1)
    once: list[tuple[str, int, int]] = field(default_factory=list)
    record: int = 1
    width: tuple[str, int] | None = None
    _made: dict[object, str] = field(default_factory=dict)

    def inputs(self) -> list[ValueInfoProto]:
        """The further input."""
        if self.form == PADDED:
            return []
        kind, shape = {
            "lengths": (TensorProto.INT64, ["requests"]),
            "offsets": (TensorProto.INT64, ["requests + 1"]),
            "index": (TensorProto.INT64, ["candidates"]),
            "triton": (TensorProto.INT32, ["requests", "axes"]),
        }[self.form]
        return [helper.make_tensor_value_info(self.name, kind, shape)]

    # --- writing -----------------------------------------------------------------------------------------------------

    def _add(self, op: str, operands: list[str], **attributes: Any) -> str:
        return self.emit.add(op, operands, attributes, hint="requests")

    def _const(self, value: object) -> str:
        return self.emit.constant(np.array(value, np.int64), hint="requests")

    def _scalar(self, name: str) -> str:
        return self._add("Reshape", [name, self.emit.constant(np.zeros(0, np.int64), hint="requests")])

    def _range(self, count: str) -> str:
        return self._add("Range", [self._const(0), self._scalar(count), self._const(1)])

    def _slice(self, name: str, start: int, end: int) -> str:
        return self._add("Slice", [name, self._const([start]), self._const([end]), self._const([0])])

    def _extent(self, name: str, axis: int) -> str:
        if self.emit.opset >= 15:
            return self._add("Shape", [name], start=axis, end=axis + 1)
        return self._add("Gather", [self._add("Shape", [name]), self._const([axis])], axis=0)

    def _none(self, wrong: str) -> str:
        """Whether no entry is true, as bool [1]."""
        count = self._add("Cast", [wrong], to=int(TensorProto.INT64))
        return self._add("Equal", [self.emit.reduce("ReduceSum", count, [0], True, hint="requests"), self._const([0])])

    # --- counts ------------------------------------------------------------------------------------------------------

    def candidates(self) -> str:
        """The number of candidates of all requests, int64 [1]."""
        return self._rows(*self.many)

    def count(self) -> str:
        """The number of requests, int64 [1]."""
        if self.form == "index" or self.form == PADDED:
            return self._rows(*self.once[0])
        rows = self._extent(self.name, 0)
        return self._add("Sub", [rows, self._const([1])]) if self.form == "offsets" else rows

    def _rows(self, name: str, axis: int, each: int) -> str:
        count = self._extent(name, axis)
        return self._add("Div", [count, self._const([each])]) if each > 1 else count

    def most(self) -> str:
        """With `PADDED`: candidates of every request, int64 [1]."""
        assert self.width is not None
        return self._extent(*self.width)

    def turns(self) -> str:
        """The number of requests, int64 []."""
        return self._scalar(self.count())

    def span(self) -> tuple[str, str, str]:
        """Which candidates stand for every request, from and to, and how many are its own, int64 [requests] each.

        Where it has none, it is one of another's, since models may fail without any: what comes of it is to be dropped.
        """
        starts = self._starts_of()
        lengths = self.most() if self.form == PADDED else self._lengths()
        own = self._add("Expand", [lengths, self.count()])
        one = self._const([1])
        begin = self._add("Min", [starts, self._add("Sub", [self.candidates(), one])])
        return begin, self._add("Add", [begin, self._add("Max", [own, one])]), own

    # --- what callers say --------------------------------------------------------------------------------------------

    def _given(self) -> str:
        """The lengths as callers give them, int64 [requests]."""
        if self.form == "offsets":
            return self._add("Sub", [self._slice(self.name, 1, np.iinfo(np.int64).max), self._slice(self.name, 0, -1)])
        if self.form == "triton":
            column = self._add("Gather", [self.name, self._const(0)], axis=1)
            wide = self._add("Cast", [column], to=int(TensorProto.INT64))
            return self._add("Div", [wide, self._const([self.record])]) if self.record > 1 else wide
        return self.name

    def valid(self) -> str | None:
        """Whether what callers say adds up, bool [1]; None where there is nothing to be said."""
        if "valid" not in self._made:
            found = [self._valid_index()] if self.form == "index" else []
            found += [self._valid_lengths()] if self.form not in ("index", PADDED) else []
            if len(self.once) > (self.form in ("index", PADDED)):
                rows = self._add("Concat", [self._rows(*i) for i in self.once], axis=0)
                found.append(self._none(self._add("Not", [self._add("Equal", [rows, self.count()])])))
            if not found:
                return None
            self._made["valid"] = found[0] if len(found) == 1 else self._add("And", found)
        return self._made["valid"]

    def alone(self) -> str:
        """Whether there is one request, which all candidates are of, bool []."""
        if self.form == "index":
            valid = self.valid()
            assert valid is not None
            return self._scalar(self._add("And", [valid, self._add("Equal", [self.count(), self._const([1])])]))
        given, wanted = [self._rows(*i) for i in self.once], [self._const([1] * len(self.once))] * bool(self.once)
        if self.form != PADDED:
            first = self._add(
                "Concat", [self._given() if self.form == "triton" else self.name, self._const([-1, -1])], axis=0
            )
            given += [self._extent(self.name, 0), self._slice(first, 0, 2 if self.form == "offsets" else 1)]
            wanted += [self._const([2, 0] if self.form == "offsets" else [1]), self.candidates()]
        same = self._add("Equal", [self._add("Concat", x, axis=0) for x in (given, wanted)])
        least = self.emit.reduce(
            "ReduceMin", self._add("Cast", [same], to=int(TensorProto.INT32)), [0], False, hint="requests"
        )
        return self._add("Cast", [least], to=int(TensorProto.BOOL))

    def _valid_lengths(self) -> str:
        lengths, count = self._given(), self.candidates()
        odd = self._add("Or", [self._add("Less", [lengths, self._const([0])]), self._add("Greater", [lengths, count])])
        total = self.emit.reduce("ReduceSum", lengths, [0], True, hint="requests")
        good = self._add("And", [self._none(odd), self._add("Equal", [total, count])])
        if self.form == "offsets":
            start = self._add("Equal", [self._slice(self.name, 0, 1), self._const([0])])
            good = self._add("And", [good, start])
        return good

    def _valid_index(self) -> str:
        index = self.name
        odd = self._add(
            "Or",
            [
                self._add("Less", [index, self._const([0])]),
                self._add("Not", [self._add("Less", [index, self.count()])]),
            ],
        )
        later, earlier = self._slice(index, 1, np.iinfo(np.int64).max), self._slice(index, 0, -1)
        good = self._add("And", [self._none(odd), self._none(self._add("Less", [later, earlier]))])
        same = self._add("Equal", [self._extent(index, 0), self.candidates()])
        return self._add("And", [good, same])

    def _lengths(self) -> str:
        """Lengths that add up to the candidates, whatever callers say, int64 [requests]."""
        if "lengths" not in self._made:
            self._made["lengths"] = self._lengths_of_index() if self.form == "index" else self._safe_lengths()
        return self._made["lengths"]

    def _safe_lengths(self) -> str:
        valid = self._valid_lengths()
        first = self._add("Equal", [self._range(self.count()), self._const([0])])
        alone = self._add("Mul", [self._add("Cast", [first], to=int(TensorProto.INT64)), self.candidates()])
        return self._add("Where", [valid, self._given(), alone])

    def _lengths_of_index(self) -> str:
        """From where the index changes: every request that has candidates ends there."""
        index, count = self.index(), self.candidates()
        after = self._add("Concat", [self._slice(index, 1, np.iinfo(np.int64).max), self._const([-1])], axis=0)
        last = self._add("Not", [self._add("Equal", [self._cut(after, count), index])])
        whose = self._add("Compress", [index, last], axis=0)
        ends = self._add("Add", [self._add("Compress", [self._range(count), last], axis=0), self._const([1])])
        lengths = self._add("Sub", [ends, self._cut(self._add("Concat", [self._const([0]), ends], axis=0), None)])
        zeros = self._zeros(self.count())
        return self._add("ScatterElements", [zeros, whose, lengths], axis=0)

    def _cut(self, name: str, count: str | None) -> str:
        """The first entries; all but the last without a number."""
        end = self._const([-1]) if count is None else count
        return self._add("Slice", [name, self._const([0]), end, self._const([0])])

    def _zeros(self, count: str) -> str:
        return self._add("Expand", [self._const([0]), count])

    # --- indices -----------------------------------------------------------------------------------------------------

    def index(self, outer: Size = 1, inner: Size = 1) -> str:
        """The request of every candidate, int64 [candidates].

        Args:
            outer: How often all of them come.
            inner: How often each of them comes, one behind the other.
        """
        key = ("index", outer, inner)
        if key not in self._made:
            self._made[key] = self._index() if key[1:] == (1, 1) else self._repeated(outer, inner)
        return self._made[key]

    def _index(self) -> str:
        if self.form == "index":
            valid = self._valid_index()
            return self._add("Where", [valid, self.name, self._zeros(self.candidates())])
        if self.form == PADDED:
            rows = self._add("Reshape", [self._range(self.count()), self._const([-1, 1])])
            shape = self._add("Concat", [self.count(), self.most()], axis=0)
            return self._add("Reshape", [self._add("Expand", [rows, shape]), self._const([-1])])
        # Where a request begins that has candidates, the index goes up to its number from that of the one before.
        lengths = self._lengths()
        some = self._add("Greater", [lengths, self._const([0])])
        whose = self._add("Compress", [self._range(self.count()), some], axis=0)
        starts = self._add("Compress", [self._starts(), some], axis=0)
        before = self._cut(self._add("Concat", [self._const([0]), whose], axis=0), None)
        steps = self._add("Sub", [whose, before])
        marks = self._add("ScatterElements", [self._zeros(self.candidates()), starts, steps], axis=0)
        return self._add("CumSum", [marks, self._const(0)])

    def _repeated(self, outer: Size, inner: Size) -> str:
        if isinstance(outer, Expr) or isinstance(inner, Expr):
            raise ValueError("repeated as often as a length says")
        column = self._add("Reshape", [self.index(), self._const([1, -1, 1])])
        return self._add("Reshape", [self._add("Expand", [column, self._const([outer, 1, inner])]), self._const([-1])])

    def _starts(self) -> str:
        """Where the candidates of every request begin, int64 [requests]."""
        lengths = self._lengths()
        return self._add("Sub", [self._add("CumSum", [lengths, self._const(0)]), lengths])

    def pack(self) -> str:
        """Where the candidates of every request are, int64 [requests, most]; any where it has none."""
        if "pack" not in self._made:
            self._made["pack"] = self._pack()
        return self._made["pack"]

    def _pack(self) -> str:
        if self.form == PADDED:
            shape = self._add("Concat", [self.count(), self.most()], axis=0)
            zero = {"allowzero": 1} if self.emit.opset >= 14 else {}
            return self._add("Reshape", [self._range(self.candidates()), shape], **zero)
        lengths = self._add("Concat", [self._lengths(), self._const([0])], axis=0)
        most = self.emit.reduce("ReduceMax", lengths, [0], True, hint="requests")
        starts = self._add("Reshape", [self._starts(), self._const([-1, 1])])
        at = self._add("Add", [starts, self._range(most)])
        last = self._add("Sub", [self.candidates(), self._const([1])])
        return self._add("Where", [self._add("Less", [at, last]), at, last])

    def unpack(self) -> str:
        """Where every candidate is in what was packed, int64 [candidates, 2]: its request, and its place in that."""
        if "unpack" not in self._made:
            index = self.index()
            start = self._add("Gather", [self._starts_of(), index], axis=0)
            place = self._add("Sub", [self._range(self.candidates()), start])
            both = [self._add("Reshape", [x, self._const([-1, 1])]) for x in (index, place)]
            self._made["unpack"] = self._add("Concat", both, axis=1)
        return self._made["unpack"]

    def _starts_of(self) -> str:
        if self.form == PADDED:
            return self._add("Mul", [self._range(self.count()), self.most()])
        return self._starts()
