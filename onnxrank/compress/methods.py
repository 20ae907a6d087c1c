"""All methods by name, in the order in which they are told."""

from __future__ import annotations

from collections.abc import Mapping

from onnxrank.compress.low_rank import LOW_RANK
from onnxrank.compress.method import Method
from onnxrank.compress.quantised import FP16, FP16_TABLES, INT8, INT8_FUSED, INT8_TABLES
from onnxrank.compress.tables import PCA_TABLES, SPARSE_TABLES
from onnxrank.compress.units import UNITS

METHODS: Mapping[str, Method] = {
    m.name: m for m in (FP16_TABLES, LOW_RANK, UNITS, INT8_TABLES, INT8, INT8_FUSED, FP16, PCA_TABLES, SPARSE_TABLES)
}
"""All that choose a format or a size for a site; `pack`, which needs no choice, is in `packing.py`."""

MIXING = frozenset({"int8", "int8-fused"})
"""Methods by which a score depends a little on the other rows of a run: inputs are rounded in the range of them all."""
