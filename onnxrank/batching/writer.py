"""Writes the graph for many requests, and brings the rows of its tensors to where an operator wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from onnxrank.batching.rows import PADDED, Requests
from onnxrank.batching.tensors import Count, Impossible, Rows, Size, Tensor
from onnxrank.emitter import Emitter
from onnxrank.extents import Expr
from onnxrank.facts import Facts
from onnxrank.layout import Layout
from onnxrank.surgery import node as make


class Writer:
    """The new graph while it grows.

    Args:
        emit: Receives the nodes.
        layout: Writes extents that vary.
        facts: Proved shapes of the model for one request.
        requests: What is known of the requests.
    """

    def __init__(self, emit: Emitter, layout: Layout, facts: Facts, requests: Requests) -> None:
        self.emit, self.layout, self.facts, self.requests = emit, layout, facts, requests

    def constant(self, value: object, kind: type = np.int64) -> str:
        """A constant."""
        return self.emit.constant(np.array(value, kind))

    def copy(self, node: NodeProto, inputs: Sequence[str], attributes: Mapping[str, Any] | None = None) -> list[str]:
        """A node of the model with other operands and attributes; its results keep their names."""
        out = list(node.output)
        self.emit.copy(node, inputs, out)
        emitted = self.emit.nodes[-1]
        if attributes:
            made = emitted.proto
            kept = [a for a in made.attribute if a.name not in attributes]
            changed = make(node.op_type, inputs, out, {k: v for k, v in attributes.items() if v is not None}).attribute
            del made.attribute[:]
            made.attribute.extend([*kept, *changed])
        if emitted.proto == node:
            emitted.rule = None
        return out

    # --- shapes ------------------------------------------------------------------------------------------------------

    def reshape(self, name: str, shape: Sequence[Size | Count]) -> str:
        """A tensor in another shape."""
        if all(isinstance(n, Count) or (isinstance(n, int) and n > 0) for n in shape):
            if sum(isinstance(n, Count) for n in shape) <= 1:
                return self.emit.add(
                    "Reshape", [name, self.constant([-1 if isinstance(n, Count) else n for n in shape])]
                )
        return self.shaped(name, self.vector(shape))

    def shaped(self, name: str, shape: str) -> str:
        """A tensor in a shape that is computed, in which 0 stands for no entries."""
        return self.emit.add("Reshape", [name, shape], {"allowzero": 1} if self.emit.opset >= 14 else None)

    def vector(self, shape: Sequence[Size | Count]) -> str:
        """A shape as int64 [rank]."""
        parts: list[str] = []
        run: list[int] = []
        for n in shape:
            if isinstance(n, int):
                run.append(n)
                continue
            if run:
                parts.append(self.constant(run))
                run = []
            parts.append(self._extent(n))
        if run or not parts:
            parts.append(self.constant(run))
        return parts[0] if len(parts) == 1 else self.emit.add("Concat", parts, {"axis": 0})

    def _extent(self, n: Expr | Count) -> str:
        if isinstance(n, Expr):
            return self.layout.sizes.extent(self.facts.symbol_of(n))
        rows = self.requests.candidates() if n.each else self.requests.count()
        if n.factor == 1:
            return rows
        other = self._extent(n.factor) if isinstance(n.factor, Expr) else self.constant([n.factor])
        return self.emit.add("Mul", [rows, other])

    def transpose(self, name: str, order: Sequence[int]) -> str:
        """A tensor with its axes in another order."""
        if list(order) == sorted(order):
            return name
        return self.emit.add("Transpose", [name], {"perm": list(order)})

    # --- rows --------------------------------------------------------------------------------------------------------

    def first(self, x: Tensor) -> str:
        """A tensor with its rows along an axis of their own before all others: `[rows, *sizes]`.

        That of one with a row per candidate lacks the axis that counts them.
        """
        rows = x.rows
        assert rows is not None
        at = rows.axis
        rest = [*x.sizes[:at], *x.sizes[at + (rows.each and not rows.added) :]]
        if rows.added or (rows.each and rows.plain):
            return self.transpose(x.name, [at, *(k for k in range(x.axes) if k != at)])
        if rows.each:
            rest[at:at] = [n for n in (rows.outer, rows.inner) if n != 1]
        count = Count(rows.each)
        lead = [*x.sizes[:at], rows.outer]
        if all(n == 1 for n in lead):
            return self.reshape(x.name, [count, *rest])
        apart = self.reshape(x.name, [*lead, count, rows.inner, *x.sizes[at + 1 :]])
        moved = self.transpose(apart, [at + 1, *(k for k in range(x.rank + 2) if k != at + 1)])
        return self.reshape(moved, [count, *rest])

    def leading(self, x: Tensor) -> Tensor:
        """A request-level tensor with its rows along a first axis of their own."""
        assert x.rows is not None and not x.rows.each
        if x.rows.added and x.rows.axis == 0:
            return x
        return Tensor(self.first(x), x.sizes, Rows(False, 0, added=True))

    def merged(self, x: Tensor) -> Tensor:
        """A tensor whose rows lie along its first axis, whatever else lies there."""
        assert x.rows is not None
        if x.rows.axis == 0 and not x.rows.added:
            return x
        if x.rows.each or not x.rank:
            raise Impossible("its rows do not lie along the first axis")
        name = self.reshape(self.first(x), [Count(False, x.sizes[0]), *x.sizes[1:]])
        return Tensor(name, x.sizes, Rows(False, 0, 1, x.sizes[0]))

    def at(self, x: Tensor, place: int, rank: int) -> str:
        """A request-level tensor with its rows at an axis, counted from the end, where it has an extent of 1.

        Args:
            x: The tensor.
            place: The axis; the one before all of `rank` axes puts them in front.
            rank: Number of axes that it is broadcast to.
        """
        assert x.rows is not None and not x.rows.each
        if x.rows.plain and x.place == place and (x.rows.added == (-place > x.rank)):
            return x.name
        if x.size(place) != 1:
            raise Impossible("its rows do not lie along an axis of their own")
        sizes = (*(1,) * (max(rank, -place) - x.rank), *x.sizes) if -place > x.rank else x.sizes
        if -place > rank:
            sizes = sizes[1:]
            return self.reshape(self.first(x), [Count(False), *sizes]) if len(sizes) != x.rank else self.first(x)
        k = len(sizes) + place
        lead = self.first(x)
        if all(n == 1 for n in sizes[:k]):
            return self.reshape(lead, [*sizes[:k], Count(False), *sizes[k + 1 :]])
        rest = [n for a, n in enumerate(sizes) if a != k]
        apart = self.reshape(lead, [Count(False), *rest])
        return self.transpose(apart, [*range(1, k + 1), 0, *range(k + 1, len(sizes))])

    def spread(self, x: Tensor, like: Tensor, rank: int) -> str:
        """A request-level tensor with a row for every candidate, where another tensor has them."""
        assert like.rows is not None
        name = self.at(x, like.place, rank)
        axis = max(x.rank, -like.place) + like.place
        return self.emit.add("Gather", [name, self.requests.index(like.rows.outer, like.rows.inner)], {"axis": axis})

    def packed(self, name: str, rest: Sequence[Size]) -> str:
        """`[candidates, *rest]` as `[requests, most, *rest]`, the candidates of a request side by side."""
        requests = self.requests
        if requests.form != PADDED:
            return self.emit.add("Gather", [name, requests.pack()], {"axis": 0})
        parts = [requests.count(), requests.most(), self.vector(rest)]
        return self.shaped(name, self.emit.add("Concat", parts, {"axis": 0}))

    def unpacked(self, name: str, rest: Sequence[Size]) -> str:
        """`[requests, most, *rest]` as `[candidates, *rest]`."""
        if self.requests.form != PADDED:
            return self.emit.add("GatherND", [name, self.requests.unpack()])
        return self.reshape(name, [Count(True), *rest])

    def aligned(self, tensors: Sequence[Tensor], sizes: Sequence[Size]) -> tuple[list[str], Rows]:
        """Brings operands that are broadcast against each other to one place of the rows.

        Args:
            tensors: The operands.
            sizes: Shape of the result for one request.

        Returns:
            Their names, and where the rows of the result lie.

        Raises:
            Impossible: They cannot be kept apart.
        """
        rank = len(sizes)
        many = [t for t in tensors if t.each]
        if many:
            like = many[0]
            assert like.rows is not None
            for t in tensors:
                if t.each and (t.place, t.rows.outer, t.rows.inner) != (like.place, like.rows.outer, like.rows.inner):  # type: ignore[union-attr]
                    raise Impossible("candidates lie along several axes")
                if not t.each and t.size(like.place) != 1:
                    raise Impossible("an operand has other entries for every candidate")
            names = [t.name if t.rows is None or t.each else self.spread(t, like, rank) for t in tensors]
            return names, Rows(True, rank + like.place, like.rows.outer, like.rows.inner)
        own = [t for t in tensors if t.rows is not None]
        place = self._place(own, tensors, sizes)
        if place is None:
            rows = own[0].rows
            assert rows is not None
            return [t.name for t in tensors], Rows(False, rank + own[0].place, rows.outer, rows.inner)
        names = [t.name if t.rows is None else self.at(t, place, rank) for t in tensors]
        return names, Rows(False, max(rank + place, 0), added=-place > rank)

    def _place(self, own: Sequence[Tensor], every: Sequence[Tensor], sizes: Sequence[Size]) -> int | None:
        """Where rows are to be; None for where they are, together with other entries."""
        rank = len(sizes)
        kinds = {(t.place, t.rows.outer, t.rows.inner, t.rows.added) for t in own if t.rows is not None}
        if len(kinds) == 1:
            place, outer, inner, added = next(iter(kinds))
            others = all(t.size(place) == 1 for t in every if t.rows is None)
            if not added and others and sizes[place] == outer * inner and not (outer == 1 and inner == 1):
                return None
        fits = [t.place for t in own if -t.place <= rank and sizes[t.place] == 1]
        return max(fits, key=fits.count) if fits else -(rank + 1)
