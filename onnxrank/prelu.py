"""PReLU: written by operators whose kernels take many entries at a time.

onnxruntime's PRelu takes entries one after the other on CPUs and branches on their signs, which takes twenty times as
long as a Relu. The same entries, to the last bit:

    prelu(x; a) = leaky_relu(x; a)            for one slope; a product in front of it takes that in
    prelu(x; a) = max(x, a x)                 for slopes above 0, up to 1
    prelu(x; a) = max(x, 0) + a min(x, 0)     for any other
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from onnxrank import cost
from onnxrank.emitter import Emitted, Emitter
from onnxrank.operators import operator
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import Level, Origin, Source
from onnxrank.written import entries

NAME = "prelu"
_MOST = 1 << 16
"""Slopes that are not too many to look at."""


def vectorise(rw: Rewrite) -> None:
    """Writes PRelu nodes by other operators, wherever that pays.

    Args:
        rw: A rewrite that has written its nodes.
    """
    sources = rw.sources.named()
    for k, e in [(k, e) for k, e in enumerate(rw.emit.nodes) if operator(e.proto) == "PRelu"]:
        made, slopes = sources.get(e.proto.output[0]), rw.stored(e.proto.input[1], _MOST)
        if made is None or made.dtype != TensorProto.FLOAT or made.level is Level.CONSTANT:
            continue
        # Slopes that are infinite make numbers of 0 that are none.
        if slopes is None or not slopes.size or not np.isfinite(slopes).all():
            continue
        steps = 1 if (slopes == slopes.flat[0]).all() else 2 if _between(slopes) else 4
        with rw.emit.at(Origin(e.origin, e.proto.output[0], NAME)):
            if rw.decide(NAME, _ways(made, steps)) == TAKE:
                rw.emit.nodes[k] = replace(e, proto=_written(rw.emit, e, slopes, steps), rule=NAME)


def _between(slopes: NDArray[np.float32]) -> bool:
    """Whether all slopes are above 0 and not above 1. With 0, an infinite entry would give a number that is none."""
    return bool(((slopes > 0) & (slopes <= 1)).all())


def _ways(made: Source, steps: int) -> list[Alternative]:
    """What it costs to leave a PRelu of so many entries, and to write it in some steps."""
    size, each = 4 * entries(made.dims), made.level is Level.CANDIDATE
    left, taken = (size * n * cost.CPU.rate(kind).byte for kind, n in (("serial", 1), ("elementwise", steps)))
    return [
        Alternative(LEAVE, "", cost.estimate(launches=1) + (0.0 if each else left), left if each else 0.0),
        Alternative(TAKE, "exact", cost.estimate(launches=steps) + (0.0 if each else taken), taken if each else 0.0),
    ]


def _written(emit: Emitter, e: Emitted, slopes: NDArray[np.float32], steps: int) -> NodeProto:
    """The last node, in the place of a PRelu; those before it are added."""
    x, a = e.proto.input
    made, name = list(e.proto.output), e.proto.name
    if steps == 1:
        return helper.make_node("LeakyRelu", [x], made, name, alpha=float(slopes.flat[0]))
    if steps == 2:
        return helper.make_node("Max", [x, emit.add("Mul", [x, a])], made, name)
    below = emit.add("Min", [x, emit.constant(np.array(0, np.float32))])
    return helper.make_node("Add", [emit.add("Relu", [x]), emit.add("Mul", [below, a])], made, name)
