"""Which passes of onnxruntime's optimiser find nothing in a model.

Each of some forty passes sorts the whole graph before it looks for its patterns, which is most of the time that large
models take to load. Where none of the operators are there that the patterns are made of, it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

_QUANTISED = b"uantizeLinear"
_NORMALISED = (b"ReduceMean", b"Norm")

_PARTS: Mapping[str, tuple[bytes, ...]] = {
    "AttentionFusion": (b"Softmax", b"Attention"),
    "BiasDropoutFusion": (b"Dropout",),
    "BiasGeluFusion": (b"Gelu", b"Erf", b"Tanh"),
    "BiasSkipLayerNormFusion": _NORMALISED,
    "BiasSoftmaxFusion": (b"Softmax", b"Attention"),
    "ConvActivationFusion": (b"Conv",),
    "DoubleQDQPairsRemover": (_QUANTISED,),
    "DynamicQuantizeMatMulFusion": (b"MatMulInteger", b"DynamicQuantize"),
    "EmbedLayerNormFusion": _NORMALISED,
    "FastGeluFusion": (b"Gelu", b"Tanh"),
    "GatherSliceToSplitFusion": (b"Gather", b"Slice"),
    "GatherToSliceFusion": (b"Gather",),
    "GeluFusionL1": (b"Gelu", b"Erf"),
    "GeluFusionL2": (b"Gelu", b"Erf"),
    "GroupQueryAttentionFusion": (b"Attention",),
    "GroupQueryAttentionPreNormFusion": (b"Attention",),
    "LayerNormFusionL1": _NORMALISED,
    "LayerNormFusionL2": _NORMALISED,
    "MatMulIntegerToFloatFusion": (b"MatMulInteger", b"DynamicQuantize"),
    "MatMulNBitsFusion": (b"NBits",),
    "QDQFinalCleanupTransformer": (_QUANTISED,),
    "QuickGeluFusion": (b"Gelu", b"Sigmoid", b"Swish"),
    "SimplifiedLayerNormFusion": _NORMALISED,
    "SkipLayerNormFusion": _NORMALISED,
    "SliceConcatToSpaceToDepthFusion": (b"Slice",),
}
"""By pass, what the names of operators hold of which at least one is in everything that the pass looks for, or is a
function that stands for one."""


def is_quantised(model: bytes) -> bool:
    """Whether a model may hold operators that quantised models are written with."""
    return _QUANTISED in model


def idle(model: bytes) -> list[str]:
    """Passes that find nothing in a model, subgraphs and functions included.

    Args:
        model: The model as it is stored. What is not in these bytes is not in the name of an operator.

    Returns:
        Their names, as `disabled_optimizers` of onnxruntime's sessions takes them.
    """
    found = {part for parts in _PARTS.values() for part in parts if part in model}
    return [name for name, parts in _PARTS.items() if found.isdisjoint(parts)]
