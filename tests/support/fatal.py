"""Models that kill onnxruntime, or never end."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import BOOL, FLOAT, INT64, Graph
from onnx import ModelProto, helper


def fatal(least: int = 1) -> ModelProto:
    """Kills onnxruntime from so many candidates on: a GRU over a batch of none."""
    g = Graph(17)
    x = g.input("item", ["N", 2])
    u = g.input("user", ["N", 2])
    dense = g.op("MatMul", u, g.const(np.ones((2, 2), np.float32)))
    count = g.op("Slice", g.op("Shape", x), g.ints(0), g.ints(1))
    fewer = g.op("Max", g.op("Sub", g.ints(least), count), g.ints(0))  # none from `least` on
    some = g.op("Slice", g.op("Concat", x, *[x] * least, axis=0), g.ints(0), fewer)
    weights = [g.const(np.ones((1, 6, 2), np.float32)) for _ in range(2)]
    y = g.ops("GRU", 2, g.op("Unsqueeze", some, g.ints(0)), *weights, hidden_size=2)[1]
    total = g.op("ReduceSum", g.op("Squeeze", y, g.ints(0)), g.ints(0))
    g.output(g.op("Add", g.op("Add", dense, total), x), ["N", 2])
    return g.model()


def rows(n: int) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs of `fatal`."""
    return {"item": np.ones((n, 2), np.float32), "user": np.ones((n, 2), np.float32)}


def sines(g: Graph, x: str, steps: int) -> str:
    """The sine of the sine of a tensor `[N, 2]`, and so on, in a loop."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Sin", ["v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", BOOL, []),
            helper.make_tensor_value_info("v", FLOAT, ["N", 2]),
        ],
        [helper.make_tensor_value_info("on", BOOL, []), helper.make_tensor_value_info("w", FLOAT, ["N", 2])],
    )
    return g.op("Loop", g.const(steps, np.int64), g.const(True, bool), x, body=body)


def endless(dead: bool) -> ModelProto:
    """A ranker with a loop of 2**40 steps, whose result is part of the scores or read by nobody."""
    g = Graph(17)
    x = g.input("item", ["N", 2])
    u = g.input("user", ["N", 2])
    dense = g.op("MatMul", u, g.const(np.ones((2, 2), np.float32)))
    y = sines(g, x, 1 << 40)
    g.output(g.op("Add", dense, x if dead else y), ["N", 2])
    return g.model()
