"""From codes back to tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from helpers import FLOAT, run
from numpy.typing import NDArray
from onnx import helper

from onnxrank.emit import Emitter
from onnxrank.layout import Layout
from onnxrank.values import CANDIDATES, Codes, Dims, Sources, codes_of


def test_alternating_columns() -> None:
    """Rows whose first entries lie side by side, and second ones alternate between tensors: packed once at most."""
    sources, emit = Sources(), Emitter(["a", "b", "c"], 17)
    layout, rows = Layout(sources, emit), 10
    own: Dims = ((CANDIDATES,), (rows,))
    a, b, c = (codes_of(sources.add(own, FLOAT, name)) for name in "abc")
    codes: Codes = _columns(a, b, c)
    name, physical = layout.realise(codes, (*own, (2,)))
    assert physical == (*own, (2,))

    inputs = [helper.make_tensor_value_info(i, FLOAT, ["N", rows]) for i in "abc"]
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["N", rows, 2])]
    nodes = [n.proto for n in emit.nodes]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(emit.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feed = {i: np.arange(3 * rows, dtype=np.float32).reshape(3, rows) + 100 * k for k, i in enumerate("abc")}
    np.testing.assert_array_equal(run(model, feed)[name], _columns(feed["a"], feed["b"], feed["c"]))


def _columns(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> NDArray[Any]:
    """Of three arrays `[..., 10]`: (a, b), (a, c), (a, b) ... and at last (b, a) and (c, a)."""
    at = np.arange(10)
    first = np.where(at < 8, a, np.where(at == 8, b, c))
    return np.stack([first, np.where(at > 7, a, np.where(at % 2 == 0, b, c))], -1)
