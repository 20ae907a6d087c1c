"""Models in float64, whole and in parts."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from helpers import INT64, Graph, run
from mutants import FOLDER
from onnx import ModelProto, helper
from onnx.reference import ReferenceEvaluator

from onnxrank import runtime
from onnxrank.errors import ModelError
from onnxrank.verify import verify
from onnxrank.verify.truth import Truth

RNG = np.random.default_rng(0)


def weights(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def mixed() -> ModelProto:
    """Products before and behind two operators that onnxruntime has no float64 kernel for, one behind the other."""
    g = Graph(17)
    x = g.op("MatMul", g.input("item", ["N", 4]), g.const(weights(4, 6)))
    steps = g.op("Unsqueeze", x, g.ints(0))
    y = g.ops("GRU", 2, steps, g.const(weights(1, 9, 6)), g.const(weights(1, 9, 3)), hidden_size=3)[1]
    flat = g.op("Squeeze", y, g.ints(0))
    image = g.op("Unsqueeze", flat, g.ints(1))
    conv = g.op("Conv", image, g.const(weights(2, 1, 2)))
    total = g.op("Add", g.op("Flatten", conv), g.op("ReduceSum", x, g.ints(1), keepdims=1))
    g.output(g.op("MatMul", total, g.const(weights(4, 1))), ["N", 1])
    g.output(flat, ["N", 3])
    return g.model()


def test_parts() -> None:
    """Only what has no kernel is left to the reference evaluator; the result is that of all by it."""
    model = mixed()
    truth = Truth(model)
    feed = {"item": weights(5, 4)}
    names = [o.name for o in model.graph.output]
    out = truth.run(feed, names)
    assert truth.how == "parts"
    assert all(v.dtype == np.float64 for v in out.values())
    whole = ReferenceEvaluator(runtime.retype(model, onnx.TensorProto.DOUBLE))
    for name, want in zip(names, whole.run(names, {"item": feed["item"].astype(np.float64)}), strict=True):
        np.testing.assert_allclose(out[name], want, rtol=1e-12, atol=1e-13)
    for name, single in run(model, feed).items():
        np.testing.assert_allclose(out[name], single, rtol=1e-4, atol=1e-5)
    assert truth.run({"item": weights(2, 4)}, names)[names[0]].shape == (2, 1)


def test_scales_stay_wide() -> None:
    """What quantising gives as float32 by definition goes on in float64, between two parts too."""
    g = Graph(21)
    parts = g.ops("DynamicQuantizeLinear", 3, g.op("Tile", g.input("item", ["N", 4]), g.ints(1, 2)))
    g.output(g.op("DequantizeLinear", *parts), ["N", 8])
    feed = {"item": weights(5, 4)}
    (got,) = Truth(g.model()).run(feed).values()
    (want,) = ReferenceEvaluator(runtime.retype(g.model(), onnx.TensorProto.DOUBLE)).run(
        None, {"item": feed["item"].astype(np.float64)}
    )
    np.testing.assert_allclose(got, want, rtol=1e-13)


@pytest.mark.parametrize("cast", [True, False])
def test_single_by_definition(cast: bool) -> None:
    """What `ai.onnx.ml` gives is float32 however a model is written: with an idle Cast behind it, or not."""
    g = Graph(17)
    scaled = g.op("Scaler", g.input("item", ["N", 2]), domain="ai.onnx.ml", offset=[0.1, 0.3], scale=[0.7, 0.7])
    x = g.op("Cast", scaled, to=onnx.TensorProto.FLOAT) if cast else scaled
    w = weights(2, 3)
    g.output(g.op("MatMul", x, g.const(w)), ["N", 3])
    truth, feed = Truth(g.model()), {"item": np.array([[0.1, 0.2], [5.3, 0.9]], np.float32)}
    (got,) = truth.run(feed).values()
    assert truth.how == "onnxruntime"
    single = (feed["item"] - np.float32([0.1, 0.3])) * np.float32(0.7)
    np.testing.assert_allclose(got, single.astype(np.float64) @ w, rtol=1e-7)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.torchscript.onnx")), ids=lambda p: p.name)
def test_every_model_loads(path: object) -> None:
    """No committed ranker is left to the reference evaluator as a whole."""
    assert Truth(onnx.load(str(path))).how in ("onnxruntime", "parts")


@pytest.mark.parametrize("going", [True, False, None])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4), (0, 2)])
def test_a_loop_gives_what_its_turns_give(shape: tuple[int, ...], going: bool | None) -> None:
    """One entry per turn along an axis of its own, whether or not a condition says that there is a first turn."""
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["item", "turn"], ["row"], axis=0),
            helper.make_node("Add", ["turn", "total"], ["sum"]),
            helper.make_node("Identity", ["go"], ["on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", INT64, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("total", INT64, []),
        ],
        [
            helper.make_tensor_value_info("on", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", INT64, []),
            helper.make_tensor_value_info("row", onnx.TensorProto.FLOAT, shape[1:]),
        ],
    )
    g = Graph(17)
    item = g.input("item", ["N", *shape[1:]])
    most = g.op("Reshape", g.op("Shape", item, start=0, end=1), g.ints())
    on = "" if going is None else g.const(going, bool)
    total, rows = g.ops("Loop", 2, most, on, g.const(5, np.int64), body=body)
    g.output(total, [], INT64)
    g.output(rows, ["turns", *shape[1:]])
    model, feed = g.model(), {"item": weights(*shape)}
    truth = Truth(model, avoided=["Loop"])
    assert truth.how == "parts"
    found = truth.run(feed)
    for name, want in run(model, feed).items():
        np.testing.assert_array_equal(found[name], want)


def test_failing_run_is_no_missing_kernel() -> None:
    g = Graph(17)
    table = g.op("Gather", g.const(weights(4, 2)), g.input("item", ["N"], onnx.TensorProto.INT64))
    g.output(table, ["N", 2])
    truth = Truth(g.model())
    with pytest.raises(ModelError):
        truth.run({"item": np.array([9])}, [table])
    assert truth.how == "onnxruntime"
    assert truth.run({"item": np.array([1])}, [table])[table].shape == (1, 2)


def test_too_large() -> None:
    model = mixed()
    model.graph.initializer[0].dims[:] = [1 << 15, 1 << 15]
    with pytest.raises(ModelError, match="too large"):
        Truth(model)


def test_unknown_operator() -> None:
    g = Graph(17)
    x = g.input("item", ["N", 2])
    g.nodes.append(helper.make_node("Nothing", [x], ["y"], domain="nowhere"))
    graph = helper.make_graph(g.nodes, "g", g.inputs, [helper.make_tensor_value_info("y", 1, ["N", 2])])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("nowhere", 1)]
    with pytest.raises(ModelError):
        Truth(helper.make_model(graph, opset_imports=imports, ir_version=10)).run({"item": weights(1, 2)}, ["y"])


def test_what_the_runtime_made() -> None:
    """Operators of onnxruntime's optimiser have no float64 kernels: they are run as the steps they stand for."""
    g = Graph(17)
    x = g.input("item", ["N", 3, 4])
    w = [g.const(weights(*shape)) for shape in ((4,), (4, 5), (5,))]
    y = g.op("SkipLayerNormalization", x, x, w[0], domain="com.microsoft")
    y = g.op("FusedMatMul", y, x, domain="com.microsoft", transB=1, alpha=0.5)
    y = g.op("FusedMatMul", y, x, domain="com.microsoft")
    y = g.op("Squeeze", g.op("Gather", y, g.ints(0), axis=1), g.ints(1))
    y = g.op("FusedGemm", y, *w[1:], domain="com.microsoft", activation="LeakyRelu", activation_alpha=0.5)
    g.output(y, ["N", 5])
    model = g.model()
    truth = Truth(model)
    assert truth.how == "onnxruntime"
    for n in (1, 7):
        feed = {"item": weights(n, 3, 4)}
        (found,) = truth.run(feed).values()
        assert found.dtype == np.float64
        (own,) = run(model, feed).values()
        np.testing.assert_allclose(found, own, rtol=0, atol=1e-5)
        assert not np.array_equal(found.astype(np.float32), found)


def test_a_kernel_that_gives_another_shape_is_no_truth() -> None:
    """The reference evaluator's GlobalMaxPool takes the largest of all channels where there is one spatial axis."""
    g = Graph(17)
    g.output(g.op("GlobalMaxPool", g.op("Add", g.input("item", ["N", 3, 4]), g.const(weights(3, 4)))), ["N", 3, 1])
    model = g.model()
    found = verify(model, model)
    assert found.passed, found.errors
    assert any(f.kind == "no truth" and "would have the shape" in f.message for f in found.findings)
