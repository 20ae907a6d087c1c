"""Sessions, and what they leave out of what they would do for nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import Graph, session, whole_numbers
from onnx import ModelProto, TensorProto, helper

from onnxrank import graph_passes, runtime

MODELS = Path(__file__).resolve().parents[2] / "models" / "onnx"
SKIPPED = "session.disable_quant_qdq"


def optimised(path: Path, to: Path, skipped: bool) -> bytes:
    """The graph that the runtime makes of a model at its highest level but for layouts of its own."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(to)
    options.log_severity_level = 4
    idle: list[str] = []
    if skipped:
        options.add_session_config_entry(SKIPPED, "1")
        idle = graph_passes.idle(path.read_bytes())
        assert idle
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=idle)
    return onnx.load(to).SerializeToString(deterministic=True)


FEW = ["din.dynamo", "dcnv2_mix.torchscript", "gru_history.torchscript", "hyformer.dynamo"]
OTHERS = [p.stem for p in sorted(MODELS.glob("*.onnx")) if p.stem not in FEW]


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)])
def test_without_idle_passes_the_same_graph_is_run(name: str, tmp_path: Path) -> None:
    path = MODELS / f"{name}.onnx"
    assert runtime.session(onnx.load(path)).get_session_options().get_session_config_entry(SKIPPED) == "1"
    assert optimised(path, tmp_path / "a.onnx", False) == optimised(path, tmp_path / "b.onnx", True)


def rounded(inside: bool) -> ModelProto:
    """Numbers on a grid, by operators of the graph, or of a branch of it."""
    g = Graph()
    scale, zero = g.const(0.5), g.const(3, np.uint8)
    x = g.input("x", ["N", 4])
    if not inside:
        q = g.op("QuantizeLinear", x, scale, zero)
        g.output(g.op("DequantizeLinear", q, scale, zero), ["N", 4])
        return g.model()
    branches = []
    for operators in (("Identity",), ("QuantizeLinear", "DequantizeLinear")):
        held, nodes = x, []
        for k, op in enumerate(operators):
            more = [] if op == "Identity" else [scale, zero]
            nodes.append(helper.make_node(op, [held, *more], [held := f"{op}{k}"]))
        out = [helper.make_tensor_value_info(held, TensorProto.FLOAT, ["N", 4])]
        branches.append(helper.make_graph(nodes, operators[0], [], out))
    condition = g.op("Greater", g.op("ReduceMax", x, keepdims=0), g.const(1.0))
    g.output(g.op("If", condition, then_branch=branches[0], else_branch=branches[1]), ["N", 4])
    return g.model()


@pytest.mark.parametrize("inside", [False, True])
def test_quantised_operators_are_optimised_as_ever(inside: bool) -> None:
    with pytest.raises(RuntimeError):  # not set
        runtime.session(rounded(inside)).get_session_options().get_session_config_entry(SKIPPED)


def test_without_reuse_of_memory_the_same_numbers_come_out() -> None:
    g = Graph()
    x = g.op("MatMul", g.input("x", [3, 8]), g.const(whole_numbers(8, 8)))
    for op in ("Tanh", "Exp", "Neg", "Abs"):
        x = g.op("Add", g.op(op, x), x)
    g.output(x, [3, 8])
    feed = {"x": np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)}
    made = runtime.session(g.model(), reuse=False)
    assert not made.get_session_options().enable_mem_reuse
    (expected,) = session(g.model()).run(None, feed)
    assert np.array_equal(made.run(None, feed)[0], expected)
