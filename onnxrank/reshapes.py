"""Reshapes that undo each other, with functions of single entries between: left out.

Rules write products with two axes and what they add to them with those of the model. A Reshape moves nothing, but takes
as long to be launched as any node, which with one candidate is what counts. With `R` to a shape and `S` to another:

    S(R(x)) = S(x), which is x where it has that shape
    S(f(R(x), y)) = f(x, S(y)) where x has the shape of S
    f(R(x), y) = f(x, y) where R only gives x, or takes from it, first axes of one entry
    R(sum over an axis, which is kept) = the sum over it, which is not, where R leaves the axis out

Those that keep a runtime from fusing what is before and behind them stay, and so do all behind a Transpose, which
onnxruntime would take into a product, or join with another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import dropwhile

import numpy as np
from onnx import NodeProto, helper

from onnxrank.emitter import Emitted
from onnxrank.graphs import reads, rename
from onnxrank.operators import Trait, domain_of, operator, traits
from onnxrank.rewrite import Rewrite
from onnxrank.values import Dims
from onnxrank.written import MOST_AXES, Written

RULE = "movement"
"""The rule that it is accounted to."""


def cancel(rw: Rewrite) -> None:
    """Leaves out Reshapes that others undo, which changes no result.

    Args:
        rw: A rewrite that has written its nodes.
    """
    while _Round(rw).run():
        pass


class _Round:
    """One look at every node; what a change makes possible is found in the next."""

    def __init__(self, rw: Rewrite) -> None:
        self._rw, self._emit, self._written = rw, rw.emit, Written(rw)
        self._made = {o: e for e in rw.emit.nodes for o in e.proto.output if o}
        self._readers: dict[str, list[Emitted]] = {}
        for e in rw.emit.nodes:
            for name in reads(e.proto):
                self._readers.setdefault(name, []).append(e)
        self._touched: set[str] = set()
        self._names: dict[str, str] = {}
        self._changed: dict[int, Sequence[NodeProto]] = {}

    def run(self) -> bool:
        """Makes what changes do not meet in one node; whether there were any."""
        for e in self._emit.nodes:
            if self._is_kept(e.proto):
                continue
            if not self._touched & {*e.proto.input, *e.proto.output}:
                _ = self._is_undone(e) or self._is_reduced(e) or self._is_between(e) or self._is_broadcast(e)
        out: list[Emitted] = []
        for e in self._emit.nodes:
            new = self._changed.get(id(e))
            out += [e] if new is None else [Emitted(n, e.origin, e.rule or RULE) for n in new]
        for e in out if self._names else ():
            rename(e.proto, self._names)
        self._emit.nodes[:] = out
        return bool(self._changed or self._names)

    def _change(self, e: Emitted, *new: NodeProto) -> None:
        self._changed[id(e)] = new
        for node in (e.proto, *new):
            self._touched |= {*node.input, *node.output}

    def _is_undone(self, e: Emitted) -> bool:
        """Takes a Reshape of another one, or of a tensor that has its shape already."""
        if operator(e.proto) != "Reshape":
            return False
        name, before = e.proto.output[0], self._reshaped(e.proto.input[0])
        dims, before = self._written.dims(name), None if before in self._touched else before
        for x in [e.proto.input[0], *([before] if before is not None else [])]:
            if dims is not None and self._written.dims(x) == dims and name not in self._rw.outputs:
                self._names[name] = x
                self._change(e)
                self._touched.add(x)
                return True
        if before is None or not self._is_absolute(e.proto):
            return False
        own = NodeProto()
        own.CopyFrom(e.proto)
        own.input[0] = before
        self._change(e, own)
        return True

    def _is_reduced(self, e: Emitted) -> bool:
        """Has a reduction keep its axes or leave them out, where a Reshape does no more behind it."""
        found = self._made.get(e.proto.input[0]) if operator(e.proto) == "Reshape" else None
        if found is None or not found.proto.op_type.startswith("Reduce") or not self._alone(found.proto.output[0]):
            return False
        node, wanted = found.proto, self._written.dims(e.proto.output[0])
        x = self._written.dims(node.input[0])
        axes = self._written.axes(node, len(x)) if x else None
        if x is None or wanted is None or axes is None or domain_of(node) or self._touched & {*node.input}:
            return False
        kept = tuple(() if k in axes else d for k, d in enumerate(x))
        ways = {0: tuple(d for k, d in enumerate(x) if k not in axes), 1: kept}
        keep = next((k for k, dims in ways.items() if dims == wanted), None)
        if keep is None:
            return False
        own = NodeProto()
        own.CopyFrom(node)
        own.output[0] = e.proto.output[0]
        kinds = [a for a in node.attribute if a.name != "keepdims"]
        del own.attribute[:]
        own.attribute.extend([*kinds, helper.make_attribute("keepdims", keep)])
        self._change(found, own)
        self._change(e)
        return True

    def _is_between(self, e: Emitted) -> bool:
        """Computes a function of single entries in the shape that its operands had, and its readers want."""
        node = e.proto
        if not _is_entrywise(node):
            return False
        name, dims = node.output[0], self._written.dims(node.output[0])
        behind = self._readers.get(name, [])
        wanted = self._written.dims(behind[0].proto.output[0]) if behind else None
        if dims is None or wanted is None or dims == wanted or name in self._rw.outputs or len(behind) != 1:
            return False
        last = behind[0].proto
        if operator(last) != "Reshape" or last.input[0] != name or self._is_kept(last):
            return False
        if self._touched & {*last.input, *last.output}:
            return False
        own, made, saved, back = NodeProto(), list[NodeProto](), 1, False
        own.CopyFrom(node)
        own.output[0] = last.output[0]
        for k, i in enumerate(node.input):
            found = self._operand(i, dims, wanted, last)
            if found is None:
                return False
            own.input[k], added, gone = found
            made += [] if added is None else [added]
            saved += gone - (added is not None)
            back = back or own.input[k] == self._reshaped(i)
        if saved < 1 or not back:
            return False
        self._change(e, *made, own)
        self._change(behind[0])
        return True

    def _is_broadcast(self, e: Emitted) -> bool:
        """Takes operands as they are where a Reshape only gives them, or takes from them, first axes of one entry."""
        node, dims = e.proto, self._written.dims(e.proto.output[0])
        if not _is_entrywise(node) or dims is None:
            return False
        own = NodeProto()
        own.CopyFrom(node)
        for k, i in enumerate(node.input if operator(node) != "PRelu" else ()):  # its slope has no more axes than x
            before = self._reshaped(i)
            now, was = self._written.dims(i), None if before is None else self._written.dims(before)
            if before is None or before in self._touched or now is None or was is None or len(was) > len(dims):
                continue
            if _behind_ones(now) == _behind_ones(was):
                own.input[k] = before
        if own == node or all(len(self._written.dims(i) or ()) < len(dims) for i in own.input):
            return False
        self._change(e, own)
        return True

    def _operand(
        self, name: str, dims: Dims, wanted: Dims, last: NodeProto
    ) -> tuple[str, NodeProto | None, int] | None:
        """An operand in another shape: what it is called, what gives it, and how many Reshapes go for it.

        Args:
            name: The operand.
            dims: The shape of the result.
            wanted: The shape that it is to have.
            last: The Reshape of the result.
        """
        number = self._rw.number(name)
        if number is not None:
            return self._emit.constant(number.reshape((1,) * len(wanted)), name), None, 0
        if self._written.dims(name) != dims:
            return None
        before = self._reshaped(name)
        if before is not None and before not in self._touched and self._written.dims(before) == wanted:
            return before, None, int(self._alone(name))
        own = NodeProto()
        own.CopyFrom(last)
        own.name = own.output[0] = self._emit.fresh(f"{name}/reshape")
        own.input[0] = name
        return own.output[0], own, 0

    def _reshaped(self, name: str) -> str | None:
        """What a Reshape is of that gives a tensor, and need not stay."""
        e = self._made.get(name)
        if e is None or operator(e.proto) != "Reshape" or self._is_kept(e.proto):
            return None
        return str(e.proto.input[0])

    def _is_kept(self, node: NodeProto) -> bool:
        """Whether a Reshape has to stay where it is."""
        return operator(node) == "Reshape" and (
            node.input[0] in self._emit.turned or node.output[0] in self._emit.apart
        )

    def _alone(self, name: str) -> bool:
        return len(self._readers.get(name, [])) == 1 and name not in self._rw.outputs

    def _is_absolute(self, node: NodeProto) -> bool:
        """Whether a Reshape says its shape without what it is of."""
        shape = self._rw.stored(node.input[1], MOST_AXES) if len(node.input) > 1 else None
        return shape is not None and bool((np.asarray(shape) != 0).all())


def _is_entrywise(node: NodeProto) -> bool:
    """Whether a node is a function of ONNX of the entries in one place, of operands that are broadcast together."""
    return traits(node) & (Trait.ELEMENTWISE | Trait.PARAMETERS) == Trait.ELEMENTWISE and not domain_of(node)


def _behind_ones(dims: Dims) -> Dims:
    """A shape without the first axes of one entry."""
    return tuple(dropwhile(lambda d: not d, dims))
