"""Operators on numbers that are stored as small whole ones, with a scale and a zero point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from onnx import NodeProto

from onnxrank import transfers
from onnxrank.graphs import attribute
from onnxrank.operators import signatures
from onnxrank.operators.entry import Extents, Operator, Shaper, Trait
from onnxrank.operators.known import Partial
from onnxrank.operators.movements import concat
from onnxrank.operators.products import MATRIX, conv_macs, gemm, mat_mul, matrix_macs
from onnxrank.operators.shapers import broadcast, same, windows
from onnxrank.operators.use import Use


def _quantised(shape: Shaper, first: int = 0) -> Shaper:
    """An operator each of whose operands is followed by its scale and its zero point.

    Args:
        shape: That of the operator on real numbers.
        first: Place of the first operand.
    """

    def shaped(u: Use) -> list[Partial | None]:
        node = NodeProto(
            op_type=u.node.op_type, input=u.node.input[first::3], output=u.node.output, attribute=u.node.attribute
        )
        return shape(replace(u, node=node, shapes=u.shapes[first::3], values=[None] * len(node.input)))

    return shaped


def _both(u: Use) -> list[Partial | None]:
    """Two operands, each with its scale and zero point."""
    return [broadcast([u.shape(0), u.shape(3)])]


def _softmax_axes(u: Use) -> Sequence[int]:
    """The axes of QLinearSoftmax, which says by itself which version of Softmax it is."""
    rank = len(u.shape(0))
    axis = u.axis(-1, rank)
    return [axis] if u.attribute("opset", 13) >= 13 else range(axis, rank)


def _joined(u: Use) -> signatures.Signature:
    """QLinearConcat: the operands stand behind the scale and the zero point of the result, each before its own."""
    rank = len(u.shape(2))
    axes = tuple(None if k == u.axis(1, rank) else k for k in range(rank))
    return signatures.signed(u, {k: axes for k in range(2, len(u.node.input), 3)}, axes)


def _n_bits_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    return 0 if out is None else prod(out) * int(attribute(node, "K", 0))


def _quantised_conv_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    return conv_macs(node, x[::3], out)


_FIRST = signatures.matrices()
_FOURTH = signatures.matrices(0, 3)
_CONV = Trait.PRODUCT | Trait.IMAGES

OPERATORS = {
    "QuantizeLinear": Operator(same, levels=transfers.kept),
    "DequantizeLinear": Operator(same, levels=transfers.kept),
    "DynamicQuantizeLinear": Operator(lambda u: [u.shape(0), (), ()], signature=signatures.as_set),
    "MatMulInteger": Operator(mat_mul, traits=MATRIX, levels=transfers.mat_mul, macs=matrix_macs, signature=_FIRST),
    "QLinearMatMul": Operator(
        _quantised(mat_mul),
        traits=MATRIX,
        levels=transfers.quantised,
        factors=(0, 3),
        macs=matrix_macs,
        signature=_FOURTH,
    ),
    "ConvInteger": Operator(windows, traits=_CONV, macs=conv_macs),
    "QLinearConv": Operator(_quantised(windows), traits=_CONV, factors=(0, 3), macs=_quantised_conv_macs),
    "com.microsoft::QuantizeLinear": Operator(same, like=2, levels=transfers.kept),
    "com.microsoft::DequantizeLinear": Operator(same, like=1, levels=transfers.kept),
    "com.microsoft::QGemm": Operator(
        _quantised(gemm),
        like=8,
        traits=MATRIX,
        factors=(0, 3),
        macs=matrix_macs,
        signature=signatures.quantised_gemm,
    ),
    "com.microsoft::DynamicQuantizeMatMul": Operator(
        mat_mul, traits=MATRIX, macs=matrix_macs, signature=signatures.matrices(as_set=True)
    ),
    "com.microsoft::MatMulIntegerToFloat": Operator(
        mat_mul, like=2, traits=MATRIX, levels=transfers.mat_mul, macs=matrix_macs, signature=_FIRST
    ),
    "com.microsoft::MatMulNBits": Operator(
        lambda u: [[*u.shape(0)[:-1], int(u.attribute("N"))]],
        traits=Trait.PRODUCT,
        factors=(0,),
        macs=_n_bits_macs,
        signature=signatures.around(lambda u: [-1]),
    ),
    "com.microsoft::QLinearConcat": Operator(_quantised(concat, 2), like=1, signature=_joined),
    **{f"com.microsoft::QLinear{op}": Operator(_both, signature=signatures.together(0, 3)) for op in ("Add", "Mul")},
    **{
        f"com.microsoft::QLinear{op}": Operator(same, signature=signatures.entrywise())
        for op in ("Sigmoid", "LeakyRelu")
    },
    "com.microsoft::QLinearSoftmax": Operator(same, signature=signatures.around(_softmax_axes)),
}
