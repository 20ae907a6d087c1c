"""Operators on numbers that are stored as small whole ones, with a scale and a zero point."""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from onnxrank import transfers
from onnxrank.operators.entry import Operator, Shaper, Trait
from onnxrank.operators.known import Partial
from onnxrank.operators.movements import concat
from onnxrank.operators.products import MATRIX, gemm, mat_mul, matrix_macs
from onnxrank.operators.shapers import broadcast, same
from onnxrank.operators.use import Use


def _quantised(shape: Shaper, first: int = 0) -> Shaper:
    """An operator each of whose operands is followed by its scale and its zero point.

    Args:
        shape: That of the operator on real numbers.
        first: Place of the first operand.
    """

    def shaped(u: Use) -> list[Partial | None]:
        node = NodeProto(op_type=u.node.op_type, input=u.node.input[first::3], attribute=u.node.attribute)
        return shape(replace(u, node=node, shapes=u.shapes[first::3], values=[None] * len(node.input)))

    return shaped


def _both(u: Use) -> list[Partial | None]:
    """Two operands, each with its scale and zero point."""
    return [broadcast([u.shape(0), u.shape(3)])]


OPERATORS = {
    "QuantizeLinear": Operator(same, levels=transfers.kept),
    "DequantizeLinear": Operator(same, levels=transfers.kept),
    "DynamicQuantizeLinear": Operator(lambda u: [u.shape(0), (), ()]),
    "MatMulInteger": Operator(mat_mul, traits=MATRIX, levels=transfers.mat_mul, macs=matrix_macs),
    "QLinearMatMul": Operator(
        _quantised(mat_mul), traits=MATRIX, levels=transfers.quantised, factors=(0, 3), macs=matrix_macs
    ),
    "ConvInteger": Operator(traits=Trait.PRODUCT),
    "QLinearConv": Operator(traits=Trait.PRODUCT, factors=(0, 3)),
    "com.microsoft::QuantizeLinear": Operator(same, like=2),
    "com.microsoft::DequantizeLinear": Operator(same, like=1),
    "com.microsoft::QGemm": Operator(_quantised(gemm), like=8, traits=MATRIX, factors=(0, 3), macs=matrix_macs),
    "com.microsoft::DynamicQuantizeMatMul": Operator(mat_mul, traits=MATRIX, macs=matrix_macs),
    "com.microsoft::MatMulIntegerToFloat": Operator(
        mat_mul, like=2, traits=MATRIX, levels=transfers.mat_mul, macs=matrix_macs
    ),
    "com.microsoft::MatMulNBits": Operator(traits=Trait.PRODUCT),
    "com.microsoft::QLinearConcat": Operator(_quantised(concat, 2), like=1),
    **{f"com.microsoft::QLinear{op}": Operator(_both) for op in ("Add", "Mul")},
    **{f"com.microsoft::QLinear{op}": Operator(same) for op in ("Sigmoid", "LeakyRelu", "Softmax")},
}
