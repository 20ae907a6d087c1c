"""Operators whose entries depend on all those along some axes, and that keep the shape."""

from __future__ import annotations

from collections.abc import Sequence

from onnxrank import transfers
from onnxrank.operators import signatures
from onnxrank.operators.entry import Operator, Trait
from onnxrank.operators.known import Partial
from onnxrank.operators.shapers import from_axis, one_axis, same
from onnxrank.operators.use import Use


def _softmax_axes(u: Use) -> Sequence[int]:
    return one_axis(-1)(u) if u.opset >= 13 else from_axis(1)(u)


def _layer_normalization(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axis = u.axis(-1, len(have))
    moments = [1 if k >= axis else n for k, n in enumerate(have)]
    return [have, moments, moments]


def _skip_normalization(u: Use) -> list[Partial | None]:
    return [u.shape(0), None, None, u.shape(0)]


def _mean_variance_axes(u: Use) -> Sequence[int]:
    return [int(a) for a in u.attribute("axes", [0, 2, 3])]


_WHOLE = Trait.NORMALISATION
_BY_ROWS = Trait.NORMALISATION | Trait.ROWS
_ALONG = Trait.NORMALISATION | Trait.AXIS
_ROWS_ALONG = _BY_ROWS | Trait.AXIS

OPERATORS = {
    "Softmax": Operator(same, traits=_ROWS_ALONG | Trait.SMOOTH, axes=_softmax_axes, levels=transfers.softmax),
    "LogSoftmax": Operator(same, traits=_ROWS_ALONG, axes=_softmax_axes),
    "Hardmax": Operator(same, traits=_ALONG, axes=_softmax_axes, levels=transfers.normalised),
    "com.microsoft::BiasSoftmax": Operator(same),
    "LayerNormalization": Operator(_layer_normalization, traits=_ROWS_ALONG, axes=from_axis(-1)),
    "RMSNormalization": Operator(same, traits=_ROWS_ALONG, axes=from_axis(-1)),
    "SimplifiedLayerNormalization": Operator(_layer_normalization, traits=_ALONG, axes=from_axis(-1)),
    "com.microsoft::SimplifiedLayerNormalization": Operator(_skip_normalization),
    "com.microsoft::SkipLayerNormalization": Operator(
        _skip_normalization, traits=_BY_ROWS, levels=transfers.skip_normalised
    ),
    "com.microsoft::SkipSimplifiedLayerNormalization": Operator(
        _skip_normalization,
        traits=_WHOLE,
        levels=transfers.skip_normalised,
        signature=signatures.around(lambda u: [-1], 0, 1),
    ),
    "BatchNormalization": Operator(same, traits=_WHOLE | Trait.SMOOTH, levels=transfers.batch_normalised),
    "LpNormalization": Operator(same, traits=_ALONG, axes=one_axis(-1)),
    "MeanVarianceNormalization": Operator(
        same, traits=_WHOLE, axes=_mean_variance_axes, signature=signatures.around(_mean_variance_axes)
    ),
    **dict.fromkeys(
        ("InstanceNormalization", "GroupNormalization", "LRN"), Operator(same, traits=_WHOLE | Trait.IMAGES)
    ),
}
