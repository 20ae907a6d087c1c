"""Passes that would find something stay in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import Graph

from onnxrank import graph_passes


def gelu(g: Graph, x: str) -> str:
    y = g.op("Erf", g.op("Div", x, g.const(np.float32(2**0.5))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", y, g.const(1.0))), g.const(0.5))


def layer_norm(g: Graph, x: str) -> str:
    apart = g.op("Sub", x, g.op("ReduceMean", x, axes=[-1], keepdims=1))
    spread = g.op("ReduceMean", g.op("Pow", apart, g.const(2.0)), axes=[-1], keepdims=1)
    normal = g.op("Div", apart, g.op("Sqrt", g.op("Add", spread, g.const(np.float32(1e-5)))))
    return g.op("Add", g.op("Mul", normal, g.const(np.ones(8, np.float32))), g.const(np.zeros(8, np.float32)))


def swish(g: Graph, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


@pytest.mark.parametrize(
    ("pattern", "made", "pass_name"),
    [
        (gelu, "Gelu", "GeluFusionL2"),
        (layer_norm, "LayerNormalization", "LayerNormFusionL2"),
        (swish, "QuickGelu", "QuickGeluFusion"),
    ],
)
def test_what_is_there_is_fused(
    pattern: Callable[[Graph, str], str], made: str, pass_name: str, tmp_path: Path
) -> None:
    g = Graph()
    g.output(pattern(g, g.input("x", ["N", 8])), ["N", 8])
    given = g.model().SerializeToString()
    left_out = graph_passes.idle(given)
    assert pass_name not in left_out and "MatMulNBitsFusion" in left_out
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "made.onnx"), 4
    onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out)
    assert made in {n.op_type for n in onnx.load(tmp_path / "made.onnx").graph.node}


def test_quantised_operators_are_told() -> None:
    g = Graph()
    g.output(g.op("DequantizeLinear", g.input("x", ["N"], onnx.TensorProto.INT8), g.const(0.5)), ["N"])
    assert graph_passes.is_quantised(g.model().SerializeToString())
    assert "QDQFinalCleanupTransformer" not in graph_passes.idle(g.model().SerializeToString())
