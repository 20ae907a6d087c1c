"""The new graph while it is being made: nodes kept from the user's model, nodes added to it, new initializers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxrank import surgery
from onnxrank.graphs import attribute, live, names_in, unused, versions
from onnxrank.journal import Journal
from onnxrank.operators import operator
from onnxrank.values import Origin

_PASSED_BY = ("Mul", "Div", "Cast")
"""Operators that onnxruntime takes out of the way between a Transpose and a product: factors may be numbers."""


@dataclass(eq=False)
class Emitted:
    """One node of the new graph.

    Attributes:
        proto: The node; a kept node is the user's own message wherever its inputs did not change.
        origin: Index of the original node that it belongs to.
        rule: Name of the rule that made it or moved it to one row; None for a node that is as it was.
    """

    proto: NodeProto
    origin: int
    rule: str | None


class Emitter:
    """Collects the nodes and initializers of the new graph.

    Args:
        taken: Names the user's model uses already; new names avoid them.
        opset: Version of the default domain, which decides how attributes are written.
    """

    def __init__(self, taken: Iterable[str], opset: int) -> None:
        self.nodes: list[Emitted] = []
        self.initializers: dict[str, TensorProto] = {}
        self.op_of: dict[str, str] = {}
        """Operator that makes each tensor written so far."""
        self.turned: dict[str, tuple[int, ...]] = {}
        """Tensors that a Transpose makes, from behind factors and casts, too, with the order of axes that it gives."""
        self.apart: dict[str, None] = {}
        """Tensors that a Reshape to their own shape makes, which keeps a runtime from fusing what is on its sides."""
        self.described: dict[str, ValueInfoProto] = {}
        """Tensors whose element type and number of dimensions are to be declared."""
        self.opset = opset
        self.origin = 0
        self.rule: str | None = None
        self.hint = ""
        self._taken = dict.fromkeys(taken)
        self._same: dict[tuple[Any, ...], str] = {}
        self._parts: dict[tuple[str, str, int, int], list[str]] = {}

    def watched_by(self, journal: Journal) -> None:
        """Has a journal undo what is written."""
        journal.watch(self.nodes, self.initializers, self.op_of, self.turned, self.apart, self.described)
        journal.watch(self._taken, self._same, self._parts)

    @contextmanager
    def at(self, origin: Origin) -> Iterator[None]:
        """Writes for another original node, and under another rule's name."""
        before = self.origin, self.hint, self.rule
        self.origin, self.hint, self.rule = origin.index, origin.hint, origin.rule
        try:
            yield
        finally:
            self.origin, self.hint, self.rule = before

    @contextmanager
    def under(self, rule: str | None) -> Iterator[None]:
        """Writes under a rule's name."""
        before, self.rule = self.rule, rule
        try:
            yield
        finally:
            self.rule = before

    def fresh(self, hint: str) -> str:
        """A name that nothing has yet, close to `hint`."""
        name = unused(hint, self._taken)
        self._taken[name] = None
        return name

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        attrs: dict[str, Any] | None = None,
        *,
        output: str | None = None,
        hint: str | None = None,
    ) -> str:
        """Adds a node with one output; an equal node made before is used again.

        Args:
            op: Operator of the default domain.
            inputs: Tensor names.
            attrs: Attributes.
            output: Output name; only for names of the original graph, which are not in use yet.
            hint: What to derive the output's name from.

        Returns:
            The output's name.
        """
        attrs = attrs or {}
        key = (op, tuple(inputs), tuple(sorted((k, str(v)) for k, v in attrs.items())))
        if output is None and key in self._same:
            return self._same[key]
        name = output or self.fresh(f"{hint or self.hint}/{op.lower()}")
        self._same.setdefault(key, name)
        proto = surgery.node(op, inputs, [name], attrs)
        if output is not None:
            proto.name = self.fresh(f"{output}/{op.lower()}")
        self._append(proto, self.rule or "movement")
        return name

    def split(self, name: str, axis: int, count: int) -> list[str]:
        """Cuts a tensor into equal parts along an axis."""
        key = ("split", name, axis, count)
        if key not in self._parts:
            self._parts[key] = [self.fresh(f"{self.hint}/split") for _ in range(count)]
            attrs = {"axis": axis} | ({"num_outputs": count} if self.opset >= 18 else {})
            self._append(surgery.node("Split", [name], self._parts[key], attrs), self.rule or "movement")
        return self._parts[key]

    def reshaped_as(self, name: str, reshape: NodeProto) -> str:
        """What a Reshape gives, of another tensor than its own that has the same shape."""
        return self.add("Reshape", [name, reshape.input[1]], {a.name: a.i for a in reshape.attribute})

    def copy(self, node: NodeProto, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Adds a copy of a node with other inputs and outputs."""
        proto = NodeProto()
        proto.CopyFrom(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(inputs)
        proto.output.extend(outputs)
        if list(outputs) != list(node.output):
            proto.name = self.fresh(outputs[0])
        moved = self.rule if self.rule else None if proto == node else "movement"
        self._append(proto, moved)

    def describe(self, name: str, dtype: int, rank: int) -> None:
        """Declares a tensor's element type and number of dimensions, for runtimes that cannot infer them."""
        self.described[name] = helper.make_tensor_value_info(name, dtype, [None] * rank)

    def _append(self, proto: NodeProto, rule: str | None) -> None:
        op = operator(proto)
        self.op_of.update(dict.fromkeys(proto.output, op))
        if op == "Transpose":
            self.turned[proto.output[0]] = tuple(attribute(proto, "perm", ()))
        before = [self.turned[i] for i in proto.input if i in self.turned] if op in _PASSED_BY else []
        self.turned.update(dict.fromkeys(proto.output, before[0]) if before else {})
        self.nodes.append(Emitted(proto, self.origin, rule))

    def constant(self, data: NDArray[Any], hint: str | None = None) -> str:
        """A new initializer with this data; equal data share one."""
        data = np.asarray(data, order="C")
        key = ("initializer", str(data.dtype), data.shape, data.tobytes())
        if key not in self._same:
            name = self.fresh(f"{hint or self.hint}/const" if data.ndim < 2 else f"{hint or self.hint}/weight")
            self.initializers[name] = numpy_helper.from_array(data, name)
            self._same[key] = name
        return self._same[key]

    def number(self, value: float, kind: DTypeLike, rank: int) -> str:
        """A number with as many axes as what it is broadcast over, which `scalars.py` says the reason of."""
        return self.constant(np.full((1,) * rank, value, kind))

    def reduce(
        self,
        op: str,
        data: str,
        axes: Sequence[int],
        keepdims: bool,
        *,
        output: str | None = None,
        hint: str | None = None,
    ) -> str:
        """A reduction; `axes` is an input or an attribute depending on the opset."""
        since = 13 if op == "ReduceSum" else 18
        attrs: dict[str, Any] = {"keepdims": int(keepdims)}
        inputs = [data]
        if self.opset >= since:
            inputs.append(self.constant(np.array(axes, np.int64)))
        else:
            attrs["axes"] = list(axes)
        return self.add(op, inputs, attrs, output=output, hint=hint)


def emitter_for(model: ModelProto) -> Emitter:
    """An emitter whose names are not those of a model."""
    return Emitter(names_in(model.graph), versions(model)[""])


def replaced(
    model: ModelProto,
    emit: Emitter,
    write: Callable[[NodeProto], bool],
    finish: Callable[[], None] = lambda: None,
) -> ModelProto:
    """A copy of a model in which other nodes stand in the place of some, without those that nobody needs any more.

    Args:
        model: The model.
        emit: Receives the new nodes; `emitter_for(model)`.
        write: Writes what is to stand before a node or in its place; called for each in order. Returns whether it goes.
        finish: Writes what is to stand behind the last.
    """
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]

    def flush() -> None:
        out.graph.node.extend(e.proto for e in emit.nodes)
        emit.nodes.clear()

    for node in model.graph.node:
        emit.hint = next((o for o in node.output if o), node.name)
        goes = write(node)
        flush()
        if not goes:
            out.graph.node.append(node)
    finish()
    flush()
    made = live(out)
    read = {i for n in made.graph.node for i in n.input}
    made.graph.initializer.extend(t for name, t in emit.initializers.items() if name in read)
    return made
