"""Abstract values: what onnxrank knows of a tensor without running it.

A tensor's shape is a product of factors per dimension (`dims.py`), so that merged dimensions such as `[N * 50, D]` stay
`((N, 50), (D,))` and a later reshape back is free. Its entries, along everything but the symbolic factors, are an
integer array of *codes*, each naming an entry of a `Source` (`sources.py`): data movement (Concat, Slice, Transpose,
Reshape ...) is numpy on that array and costs nothing at run time, broadcasting along any axis is visible as repeated
codes, and which entries are request-level is read off the sources they come from.

`value.py` is what rules hand on, `deferred.py` what can be asked of tensors that are put off, and `division.py` divides
arrays of codes.
"""

from onnxrank.values.deferred import (
    AffineProduct,
    Deferred,
    DeferredMatMul,
    Multiplicable,
    OpenProduct,
    Origin,
    Scalable,
    Selectable,
)
from onnxrank.values.dims import (
    CANDIDATES,
    Dim,
    Dims,
    Factor,
    Unrepresentable,
    broadcast_dims,
    canonical,
    extended,
    extent,
    extents,
    is_candidate_symbol,
    keep_symbols,
    regroup,
    rows_of,
    split_merged,
    stream,
    symbols,
    with_extents,
)
from onnxrank.values.division import Codes, constant_along, cut_repeats, rectangles, split_axis
from onnxrank.values.sources import HOLE, MAX_ENTRIES, Level, Source, Sources, codes_of, offsets, source_numbers
from onnxrank.values.value import Abstract, Affine, Sum, Value, view

__all__ = [
    "CANDIDATES",
    "HOLE",
    "MAX_ENTRIES",
    "Abstract",
    "Affine",
    "AffineProduct",
    "Codes",
    "Deferred",
    "DeferredMatMul",
    "Dim",
    "Dims",
    "Factor",
    "Level",
    "Multiplicable",
    "OpenProduct",
    "Origin",
    "Scalable",
    "Selectable",
    "Source",
    "Sources",
    "Sum",
    "Unrepresentable",
    "Value",
    "broadcast_dims",
    "canonical",
    "codes_of",
    "constant_along",
    "cut_repeats",
    "extended",
    "extent",
    "extents",
    "is_candidate_symbol",
    "keep_symbols",
    "offsets",
    "rectangles",
    "regroup",
    "rows_of",
    "source_numbers",
    "split_axis",
    "split_merged",
    "stream",
    "symbols",
    "view",
    "with_extents",
]
