"""Which operators are followed segment by segment, and by what."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from onnx import NodeProto

from onnxrank.operators import Trait, having
from onnxrank.segments.division import Division, Tensor
from onnxrank.segments.elementwise import elementwise
from onnxrank.segments.movements import (
    concat,
    constant_of_shape,
    expand,
    gather,
    pad,
    range_,
    reshape,
    shape,
    squeeze,
    transpose,
    trilu,
    unsqueeze,
)
from onnxrank.segments.products import einsum, mat_mul
from onnxrank.segments.reductions import norm, reduction, softmax
from onnxrank.segments.slices import slice_, split

Step = Callable[[Division, NodeProto], "Tensor | list[Tensor]"]

SOURCES: Mapping[str, Step] = {
    "Concat": concat,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "Pad": pad,
}
"""What makes tensors as long as a sequence of none."""

STEPS: Mapping[str, Step] = {
    **dict.fromkeys((*having(Trait.ELEMENTWISE), *having(Trait.PARAMETERS)), elementwise),
    **dict.fromkeys(
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization"), norm
    ),
    **dict.fromkeys((f"Reduce{kind}" for kind in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2")), reduction),
    "MatMul": mat_mul,
    "Einsum": einsum,
    "Softmax": softmax,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Squeeze": squeeze,
    "Reshape": reshape,
    "Expand": expand,
    "Trilu": trilu,
    "Gather": gather,
    "Slice": slice_,
    "Split": split,
    "Concat": concat,
    "Pad": pad,
    "Shape": shape,
}
"""What is done segment by segment."""
