"""Softmax over masked scores, without numbers so small that the processor takes a hundred times as long for them.

Scores that a mask hides are a billion below the others, or infinitely far. What runtimes make of them is no 0 but a
denormal number, of which processors take their time: in the softmax, and in the product behind it. Scores that are at
least 60 below the largest of their row weigh nothing in float32, wherever below that they are:

    softmax(x) = softmax(max(x, m - d)) + O(width * exp(-60)), m = max(row), d = max(60, 1e-5 |m|)

Where a whole row is masked, m is so large that m - 60 would be rounded to m: d is many units in its last place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank import cost
from onnxrank.emitter import Emitter
from onnxrank.graphs import attribute
from onnxrank.masks import MOST, Masks
from onnxrank.operators import operator
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import Level, Origin, Source, is_candidate_symbol, symbols
from onnxrank.written import Written, entries

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
    masks, written = Masks((e.proto for e in emit.nodes), partial(rw.stored, most=MOST)), Written(rw)
    for k, e in found:
        source = written.source(e.proto.output[0])
        if source is None or source.dtype != TensorProto.FLOAT or source.level is Level.CONSTANT:
            continue
        axis = _axis(e.proto, emit.opset)
        if axis is None:
            continue
        joined, parts = _parts(written, e.proto, axis, len(source.dims))
        shares = [(i, share) for i in parts if (share := masks.share(i))]
        if not shares:
            continue
        sizes = [entries(written.dims(i) or source.dims) for i, _ in shares]
        with emit.at(Origin(e.origin, e.proto.output[0], NAME)):
            if rw.decide(NAME, _ways(source, [s for _, s in shares], sizes)) == TAKE:
                own = NodeProto()
                own.CopyFrom(e.proto)
                above = {i: _bounded(emit, i, axis, len(source.dims)) for i, _ in shares}
                if joined is None:
                    own.input[0] = above[own.input[0]]
                else:
                    own.input[0] = emit.add("Concat", [above.get(i, i) for i in joined.input], {"axis": axis})
                emit.nodes[k] = replace(e, proto=own, rule=e.rule or NAME)


def _parts(written: Written, node: NodeProto, axis: int, rank: int) -> tuple[NodeProto | None, list[str]]:
    """What the scores of a softmax are joined of, where nothing else reads them as a whole, and by which node.

    What is far below the largest score of one part is so below that of all, and there may be no mask but on few.
    """
    x = node.input[0]
    made = written.own_maker(x)
    if made is None or operator(made) != "Concat":
        return None, [x]
    if attribute(made, "axis", 0) % rank != axis % rank:
        return None, [x]
    return made, list(dict.fromkeys(made.input))


def _axis(node: NodeProto, opset: int) -> int | None:
    """The axis that a softmax goes over; None where it is over several, as it may be in old opsets."""
    axis: int = attribute(node, "axis", -1 if opset >= 13 else 1)
    return axis if opset >= 13 or axis == -1 else None


def _ways(source: Source, shares: Sequence[float], sizes: Sequence[int]) -> list[Alternative]:
    """What it costs to leave weights as they are, and to bound scores.

    Args:
        source: What the softmax gives.
        shares: Of each part, the share of the entries that are masked.
        sizes: Their entries.
    """
    each = any(map(is_candidate_symbol, symbols(source.dims)))
    left = sum(n * share * cost.CPU.denormal for n, share in zip(sizes, shares, strict=True))
    more, launches = sum(sizes) * cost.BOUNDED, cost.estimate(launches=6 * len(sizes))
    return [
        Alternative.at(LEAVE, "", 0.0, left, each),
        Alternative.at(TAKE, "reassociates", launches, more, each),
    ]


def _bounded(emit: Emitter, x: str, axis: int, rank: int) -> str:
    """Scores that are bounded from below along an axis."""
    largest = emit.reduce("ReduceMax", x, [axis], True)
    share = emit.add("Mul", [emit.add("Abs", [largest]), emit.number(_SHARE, np.float32, rank)])
    least = emit.add("Sub", [largest, emit.add("Max", [share, emit.number(_BELOW, np.float32, rank)])])
    return emit.add("Max", [x, least])
