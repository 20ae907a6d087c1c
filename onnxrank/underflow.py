"""Softmax over masked scores, without numbers so small that the processor takes a hundred times as long for them.

Scores that a mask hides are a billion below the others, or infinitely far. What runtimes make of them is no 0 but a
denormal number, of which processors take their time: in the softmax, and in the product behind it. Scores that are at
least 60 below the largest of their row weigh nothing in float32, wherever below that they are:

    softmax(x) = softmax(max(x, m - d)) + O(width * exp(-60)), m = max(row), d = max(60, 1e-5 |m|)

Where a whole row is masked, m is so large that m - 60 would be rounded to m: d is many units in its last place.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank import cost
from onnxrank.emitter import Emitted, Emitter
from onnxrank.graphs import attribute
from onnxrank.masks import MOST, Masks
from onnxrank.operators import operator
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import Level, Origin, Source, extents, is_candidate_symbol, symbols

NAME = "underflow"
_BELOW = 60.0
"""What is so far below the largest score of a row has a weight of 1e-26, and is far from where exp gives denormals."""
_SHARE = 1e-5
"""The same as a share of that score, where it is larger: a hundred units in the last place."""


def avoid(rw: Rewrite) -> None:
    """Keeps the weights of masked scores from being denormal, wherever that pays.

    Args:
        rw: A rewrite that has written its nodes.
    """
    emit = rw.emit
    found = [(k, e) for k, e in enumerate(emit.nodes) if operator(e.proto) == "Softmax"]
    if not found:
        return
    masks, sources = Masks((e.proto for e in emit.nodes), partial(rw.stored, most=MOST)), rw.sources.named()
    for k, e in found:
        source = sources.get(e.proto.output[0])
        if source is None or source.dtype != TensorProto.FLOAT or source.level is Level.CONSTANT:
            continue
        axis, share = _axis(e.proto, emit.opset), masks.share(e.proto.input[0])
        if axis is None or not share:
            continue
        with emit.at(Origin(e.origin, e.proto.output[0], NAME)):
            if rw.decide(NAME, _ways(source, share)) == TAKE:
                emit.nodes[k] = _bounded(emit, e, axis, len(source.dims))


def _axis(node: NodeProto, opset: int) -> int | None:
    """The axis that a softmax goes over; None where it is over several, as it may be in old opsets."""
    axis: int = attribute(node, "axis", -1 if opset >= 13 else 1)
    return axis if opset >= 13 or axis == -1 else None


def _ways(source: Source, share: float) -> list[Alternative]:
    """What it costs to leave weights as they are, and to bound scores."""
    entries = prod(extents(source.dims)) * cost.LENGTH ** sum(not is_candidate_symbol(s) for s in source.symbols)
    each = any(map(is_candidate_symbol, symbols(source.dims)))
    left = entries * share * cost.CPU.denormal
    more, launches = entries * cost.BOUNDED, cost.estimate(launches=6)
    return [
        Alternative(LEAVE, "", 0.0 if each else left, left if each else 0.0),
        Alternative(TAKE, "reassociates", launches + (0.0 if each else more), more if each else 0.0),
    ]


def _bounded(emit: Emitter, e: Emitted, axis: int, rank: int) -> Emitted:
    """A softmax of bounded scores in place of one."""
    x, own = e.proto.input[0], NodeProto()
    largest = emit.reduce("ReduceMax", x, [axis], True)
    share = emit.add("Mul", [emit.add("Abs", [largest]), emit.number(_SHARE, np.float32, rank)])
    least = emit.add("Sub", [largest, emit.add("Max", [share, emit.number(_BELOW, np.float32, rank)])])
    own.CopyFrom(e.proto)
    own.input[0] = emit.add("Max", [x, least])
    return replace(e, proto=own, rule=e.rule or NAME)
