"""Models that are divided, and inputs of them; whole numbers, so that scores are exact."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import Graph, whole_numbers
from onnx import ModelProto

Arrays = dict[str, np.ndarray[Any, Any]]


def ranker_model(width: int = 12, seed: int = 0) -> ModelProto:
    """A user tower, an item, and a layer over both; whole numbers, so that scores are exact; nothing can be packed."""
    g = Graph(17)
    user, item = g.input("user", ["N", 6]), g.input("item", ["N", 4])
    tower = g.op("Relu", g.op("MatMul", user, g.const(whole_numbers(6, width, seed=seed))))
    both = g.op("Concat", tower, item, axis=1)
    hidden = g.op("Relu", g.op("MatMul", both, g.const(whole_numbers(width + 4, 8, seed=seed + 1))))
    g.op("MatMul", hidden, g.const(whole_numbers(8, 1, seed=112)))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    return g.model()


def history_model() -> ModelProto:
    """A history of any length, of which the item looks up what is like it."""
    g = Graph(17)
    history, item = g.input("history", ["N", "L", 4]), g.input("item", ["N", 4])
    keys = g.op("MatMul", g.op("Relu", history), g.const(whole_numbers(4, 4)))
    column = g.op("Unsqueeze", item, g.ints(2))
    weights = g.op("MatMul", keys, column)
    g.op("ReduceMax", weights, axes=[1], keepdims=0)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    return g.model()


def numbers(*shape: int, seed: int = 5) -> np.ndarray[Any, Any]:
    return whole_numbers(*shape, seed=seed)


def feeds(n: int, seed: int = 5) -> tuple[Arrays, Arrays, Arrays]:
    """Inputs of the original, of the request, and of candidates."""
    user, items = numbers(1, 6, seed=seed), numbers(max(n, 1), 4, seed=seed + 1)[:n]
    return {"user": np.repeat(user, n, 0), "item": items}, {"user": user}, {"item": items}
