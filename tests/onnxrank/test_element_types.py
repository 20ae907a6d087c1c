"""What is known of a model before it is rewritten: element types."""

from __future__ import annotations

import onnx
import pytest
from modelkit import graph, one
from onnx import TensorProto, helper

from onnxrank.study import element_types

HALF, FLOAT, INT8 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT8
COM = {"com.microsoft": 1, "com.acme": 1}


def test_stale_types_in_the_file() -> None:
    """Converters to 16 bits leave declarations of initializers that are of another type by now."""
    text = "(float16[N,4] x) => (float16[N,4] y) { a = Cast<to=1>(x) s = Mul(a, w) y = Cast<to=10>(s) }"
    model = graph(text, w=one(2.0))
    model.graph.value_info.append(helper.make_tensor_value_info("w", HALF, []))
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.shape_inference.infer_shapes(model)
    assert element_types(model) == {"a": FLOAT, "s": FLOAT, "y": HALF}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("h = com.microsoft.FusedMatMul(x, x)", HALF),
        ("h = com.microsoft.FusedGemm(x, x)", HALF),
        ("h = com.microsoft.MatMulIntegerToFloat(q, q, f, f)", FLOAT),
        ("h = com.microsoft.DynamicQuantizeMatMul(f, q, f)", FLOAT),
        ("h = com.microsoft.QLinearConcat(f, q, q, f, q)", INT8),
        ("h = com.microsoft.QLinearAdd(q, f, q, q, f, q, f, q)", INT8),
        ("h = com.microsoft.QGemm(q, f, q, q, f, q, b, f, q)", INT8),
        ("h = com.microsoft.QLinearSigmoid(q, f, q, f, q)", INT8),
        ("h = com.microsoft.QLinearSoftmax(q, f, q, f, q)", INT8),
        ("h = com.microsoft.DequantizeLinear(q, f)", FLOAT),
        ("h = com.microsoft.BiasGelu(x, x)", HALF),
    ],
)
def test_behind_operators_of_onnxruntime(text: str, kind: int) -> None:
    """Onnx's inference stops at them, and so knows nothing of what follows."""
    model = graph(
        f"(float16[N,4] x, int8[N,4] q, float f, int32[4] b) => (y) {{ {text} c = Cast<to=1>(h) r = Identity(h)"
        " k = Equal(r, r) y = Add(c, c) }",
        domains=COM,
    )
    boolean = TensorProto.BOOL
    assert element_types(model) == {"h": kind, "c": FLOAT, "r": kind, "k": boolean, "y": FLOAT}


def test_unknown_operator() -> None:
    model = graph("(float[N,4] x) => (y) { h = com.acme.Mystery(x) y = Relu(h) }", domains=COM)
    assert element_types(model) == {}
