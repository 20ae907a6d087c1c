"""Extents as tensors: what a graph says of a shape that is known only when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from math import prod

import numpy as np

from onnxrank.emitter import Emitter
from onnxrank.extents import Call, Expr, bounds, symbols_of
from onnxrank.values import Dims, Unrepresentable, extents, is_candidate_symbol, symbols


class ShapeTensors:
    """Writes tensors that hold extents.

    Args:
        emitter: Receives the nodes.
        expressions: What symbols stand for that are not extents of inputs.

    Attributes:
        extent_of: Per symbol: a graph input, or a tensor whose extent is found in the data, the axis on which it is,
            and by what to divide that extent.
        held: The shapes that vectors hold of which an extent is not constant, by their names.
    """

    def __init__(self, emitter: Emitter, expressions: Mapping[str, Expr]) -> None:
        self.emit, self.expressions = emitter, expressions
        self.extent_of: dict[str, tuple[str, int, int]] = {}
        self.held: dict[str, Dims] = {}

    def vector(self, dims: Dims) -> str:
        """An int64 vector holding a shape; extents that are not constant are read from a graph input."""
        if not symbols(dims):
            return self.emit.constant(np.array(extents(dims), np.int64))
        parts: list[str] = []
        run: list[int] = []
        for d in dims:
            syms = symbols([d])
            if not syms:
                run.append(prod(f for f in d if isinstance(f, int)))
                continue
            if run:
                parts.append(self.emit.constant(np.array(run, np.int64)))
                run = []
            part = self.extent(syms[0])
            for s in syms[1:]:
                part = self.emit.add("Mul", [part, self.extent(s)])
            c = prod(f for f in d if isinstance(f, int))
            parts.append(self.emit.add("Mul", [part, self.emit.constant(np.array([c], np.int64))]) if c > 1 else part)
        if run:
            parts.append(self.emit.constant(np.array(run, np.int64)))
        made = parts[0] if len(parts) == 1 else self.emit.add("Concat", parts, {"axis": 0}, hint="candidates")
        self.held.setdefault(made, dims)
        return made

    def extent(self, symbol: str) -> str:
        """A one-element int64 tensor with the value of a symbol.

        Raises:
            Unrepresentable: No tensor is known to have the extent.
        """
        if symbol in self.expressions:
            return self.size(self.expressions[symbol])
        if symbol not in self.extent_of:
            raise Unrepresentable(f"the extent {symbol} is not that of an input")
        name, axis, divisor = self.extent_of[symbol]
        hint = "candidates" if is_candidate_symbol(symbol) else "extent"
        if self.emit.opset >= 15:
            out = self.emit.add("Shape", [name], {"start": axis, "end": axis + 1}, hint=hint)
        else:
            shape = self.emit.add("Shape", [name], hint=hint)
            index = self.emit.constant(np.array([axis], np.int64))
            out = self.emit.add("Gather", [shape, index], {"axis": 0}, hint=hint)
        if divisor > 1:
            out = self.emit.add("Div", [out, self.emit.constant(np.array([divisor], np.int64))], hint=hint)
        return out

    def tells(self, size: int | Expr) -> bool:
        """Whether a number can be told from extents that are known where the graph runs."""
        return all(s in self.extent_of for s in symbols_of(size))

    def has(self, symbol: str) -> bool:
        """Whether the value of a symbol can be told."""
        return self.tells(self.expressions[symbol]) if symbol in self.expressions else symbol in self.extent_of

    def scalar(self, size: int | Expr) -> str:
        """An int64 tensor without dimensions with the value of an expression."""
        if not isinstance(size, Expr):
            return self.emit.constant(np.array(size, np.int64))
        return self.emit.add("Reshape", [self.size(size), self.emit.constant(np.zeros(0, np.int64))])

    def size(self, size: int | Expr) -> str:
        """A one-element int64 tensor with the value of an expression.

        Raises:
            Unrepresentable: No tensor is known to have an extent that it depends on.
        """
        if not isinstance(size, Expr):
            return self.emit.constant(np.array([size], np.int64))
        total: str | None = None
        for atoms, c in size.terms:
            parts = [self.extent(a) if isinstance(a, str) else self._called(a) for a in atoms]
            if c != 1 or not parts:
                parts.append(self.emit.constant(np.array([c], np.int64)))
            made = parts[0]
            for other in parts[1:]:
                made = self.emit.add("Mul", [made, other], hint="extent")
            total = made if total is None else self.emit.add("Add", [total, made], hint="extent")
        assert total is not None
        return total

    def _called(self, call: Call) -> str:
        """A one-element int64 tensor with the value of a function of extents."""
        if call.op in ("min", "max"):
            if self.emit.opset < 12:  # Min and Max took no integers
                return reduce(lambda a, b: self._chosen(call.op, a, b), map(self.size, call.args))
            return self.emit.add(call.op.capitalize(), [self.size(a) for a in call.args], hint="extent")
        if bounds(call.args[0])[0] < 0:
            raise Unrepresentable(f"{call} of a number that may be negative")
        op = "Div" if call.op == "//" else "Mod"
        return self.emit.add(op, [self.size(a) for a in call.args], hint="extent")

    def _chosen(self, op: str, a: str, b: str) -> str:
        """The smaller or the larger of two one-element int64 tensors."""
        first, second = (a, b) if op == "min" else (b, a)
        less = self.emit.add("Less", [first, second], hint="extent")
        return self.emit.add("Where", [less, a, b], hint="extent")
