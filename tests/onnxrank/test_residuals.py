"""Sums in front of layer normalisations, which onnxruntime is to leave apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers import Given, Graph, candidate, optimised, request, whole_numbers

SIZE = 8


def block(
    residual: str = "computed", rank: int = 3, opset: int = 17, read: str = "norm", double: bool = False
) -> tuple[Graph, list[Given]]:
    """A layer over mixed tokens of the user and the item, added to these, and what reads the sum."""
    g, kind = Graph(opset), np.float64 if double else np.float32
    given = [request("u", 2, SIZE), candidate("c", 1, SIZE)]
    u, c = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1)
    x = g.op("Relu", g.op("MatMul", g.const(whole_numbers(3, 3, seed=5)), x))  # from here on all is the candidate's
    if double:
        x = g.op("Cast", x, to=onnx.TensorProto.DOUBLE)
    if rank == 2:
        x = g.op("Reshape", x, g.ints(-1, 3 * SIZE))
    width = SIZE if rank == 3 else 3 * SIZE
    h = g.op("Relu", g.op("MatMul", x, g.const(whole_numbers(width, width, seed=1), kind)))
    other = x if residual == "computed" else g.const(whole_numbers(width, seed=2), kind)
    s = g.op("Add", h, other)
    if read != "norm":
        y = g.op("Sigmoid", s)
    elif opset >= 17:
        y = g.op("LayerNormalization", s, g.const(np.ones(width), kind), g.const(np.zeros(width), kind))
    else:
        d = g.op("Sub", s, g.on_axes("ReduceMean", s, [-1]))
        square = g.on_axes("ReduceMean", g.op("Pow", d, g.const(2.0, kind)), [-1])
        y = g.op("Div", d, g.op("Sqrt", g.op("Add", square, g.const(1e-5, kind))))
    y = g.op("Reshape", y, g.ints(-1, 3 * SIZE))
    y = g.op("MatMul", y, g.const(whole_numbers(3 * SIZE, 2, seed=3), kind))
    g.output(g.op("Cast", y, to=onnx.TensorProto.FLOAT), ["N", 2])
    return g, given


def fused(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """Operators of a model as onnxruntime runs it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("opset", [13, 17])
def test_a_sum_of_two_tensors_is_left_apart(opset: int, tmp_path: Path) -> None:
    g, given = block(opset=opset)
    result = optimised(g, given, counts=(0, 1, 2, 7, 90), tolerance=1e-5)
    made = Counter(n.op_type for n in result.model.graph.node)
    assert made["Sum"]
    assert not fused(result.model, tmp_path)["SkipLayerNormalization"]


@pytest.mark.parametrize(
    "how", [{"residual": "a bias"}, {"rank": 2}, {"double": True}, {"read": "sigmoid"}], ids=lambda how: next(iter(how))
)
def test_other_sums_stay(how: dict) -> None:
    """What a product takes in, what is not joined, and what has no kernel of that kind."""
    g, given = block(**how)
    result = optimised(g, given, counts=(1, 2, 7), tolerance=1e-5)
    assert "Sum" not in {n.op_type for n in result.model.graph.node}
