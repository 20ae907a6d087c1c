"""Softmax over masked scores, without numbers so small that the processor takes a hundred times as long for them.

Scores that a mask hides are a billion below the others, or infinitely far. What runtimes make of them is no 0 but a
denormal number, of which processors take their time: in the softmax, and in the product behind it. Scores that are at
least 60 below the largest of their row weigh nothing in float32, wherever below that they are:

    softmax(x) = softmax(max(x, m - d)) + O(width * exp(-60)), m = max(row), d = max(60, 1e-5 |m|)

Where a whole row is masked, m is so large that m - 60 would be rounded to m: d is many units in its last place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnxrank import cost
from onnxrank.emitter import Emitted, Emitter
from onnxrank.facts import constant_data
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, operator, traits
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import Level, Origin, Source, Value, extents, is_candidate_symbol, symbols

NAME = "underflow"
_BELOW = 60.0
"""What is so far below the largest score of a row has a weight of 1e-26, and is far from where exp gives denormals."""
_SHARE = 1e-5
"""The same as a share of that score, where it is larger: a hundred units in the last place."""
_MASKS = 80.0
"""A constant of this size, among what scores are made of, is a mask: exp of minus that is near the least number."""
_MASKED = 0.5
"""Share of entries that are taken to be masked where only requests tell: histories are half full."""
_LARGEST = 1 << 20
"""Entries of a constant at most that are looked through."""


def avoid(rw: Rewrite) -> None:
    """Keeps the weights of masked scores from being denormal, wherever that pays.

    Args:
        rw: A rewrite that has written its nodes.
    """
    emit = rw.emit
    found = [(k, e) for k, e in enumerate(emit.nodes) if operator(e.proto) == "Softmax"]
    if not found:
        return
    masks, sources = _Masks(rw), rw.sources.named()
    for k, e in found:
        source = sources.get(e.proto.output[0])
        if source is None or source.dtype != TensorProto.FLOAT or source.level is Level.CONSTANT:
            continue
        axis, share = _axis(e.proto, emit.opset), masks.share(e.proto.input[0])
        if axis is None or not share:
            continue
        with emit.at(Origin(e.origin, e.proto.output[0], NAME)):
            if rw.decide(NAME, _ways(source, share)) == TAKE:
                emit.nodes[k] = _bounded(emit, e, axis)


@dataclass
class _Masks:
    """Finds what hides scores.

    Attributes:
        rw: The rewrite.
    """

    rw: Rewrite

    def __post_init__(self) -> None:
        self._made = {o: e.proto for e in self.rw.emit.nodes for o in e.proto.output if o}

    def share(self, name: str) -> float:
        """Share of a tensor's entries that masks hide, among what it is made of by steps on single entries."""
        seen, open_, found = set[str](), [name], 0.0
        while open_:
            name = open_.pop()
            node = self._made.get(name)
            if name in seen or node is None:
                continue
            seen.add(name)
            if operator(node) == "Max" and any(operator(self._made[i]) == "Sub" for i in node.input if i in self._made):
                return 0.0  # it is bounded from below
            if traits(node) & (Trait.ELEMENTWISE | Trait.MOVEMENT):
                read = [i for i in node.input if i]
            elif operator(node) == "Gemm":
                read = list(node.input[2:])  # what is added to the product
            else:
                continue
            found = max([found, *(self._hidden(node, i) for i in read)])
            open_ += read
        return found

    def _hidden(self, node: NodeProto, name: str) -> float:
        """Share of entries that a constant hides where a node reads it; 0 for what is no mask."""
        data = self._data(name)
        if data is None or data.dtype.kind != "f" or not data.size:
            return 0.0
        share = float((np.abs(data) >= _MASKS).mean())
        if data.size > 1 or not share:
            return share
        chosen = self._data(node.input[0]) if operator(node) == "Where" else None
        if chosen is None:
            return _MASKED
        return float(chosen.mean() if name == node.input[1] else 1 - chosen.mean())

    def _data(self, name: str) -> NDArray[Any] | None:
        """Entries of a constant of the original or of the new graph; None for large ones, and for other tensors."""
        if name in self.rw.facts.folded:
            data = self.rw.facts.folded[name][1]
            return data if data.size <= _LARGEST else None
        made, value = self.rw.emit.initializers.get(name), self.rw.values.get(name)
        if made is not None:
            return constant_data(made, None) if prod(made.dims) <= _LARGEST else None
        source = value.whole if isinstance(value, Value) else None
        if source is None or source.level is not Level.CONSTANT or source.size > _LARGEST:
            return None
        return source.data


def _axis(node: NodeProto, opset: int) -> int | None:
    """The axis that a softmax goes over; None where it is over several, as it may be in old opsets."""
    axis: int = attribute(node, "axis", -1 if opset >= 13 else 1)
    return axis if opset >= 13 or axis == -1 else None


def _ways(source: Source, share: float) -> list[Alternative]:
    """What it costs to leave weights as they are, and to bound scores."""
    entries = prod(extents(source.dims)) * cost.LENGTH ** sum(not is_candidate_symbol(s) for s in source.symbols)
    each = any(map(is_candidate_symbol, symbols(source.dims)))
    left = entries * share * cost.DENORMAL
    more, launches = entries * cost.BOUNDED, cost.estimate(launches=6)
    return [
        Alternative(LEAVE, "", 0.0 if each else left, left if each else 0.0),
        Alternative(TAKE, "reassociates", launches + (0.0 if each else more), more if each else 0.0),
    ]


def _bounded(emit: Emitter, e: Emitted, axis: int) -> Emitted:
    """A softmax of bounded scores in place of one."""
    x, own = e.proto.input[0], NodeProto()
    largest = emit.reduce("ReduceMax", x, [axis], True)
    share = emit.add("Mul", [emit.add("Abs", [largest]), _number(emit, _SHARE)])
    least = emit.add("Sub", [largest, emit.add("Max", [share, _number(emit, _BELOW)])])
    own.CopyFrom(e.proto)
    own.input[0] = emit.add("Max", [x, least])
    return replace(e, proto=own, rule=e.rule or NAME)


def _number(emit: Emitter, value: float) -> str:
    return emit.constant(np.array(value, np.float32))
