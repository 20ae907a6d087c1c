"""Sizes of tensors and times of nodes of the model that is cut, at usual lengths and at the longest served."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from math import prod

import numpy as np

from onnxrank import cost, halves
from onnxrank import report as reports
from onnxrank.study import Study
from onnxrank.verify import sizes

_WEIGHT = 1e-10
"""Seconds per byte of the weights of a product, which one row has to read as a whole."""


class Estimates:
    """What is predicted of a model.

    Args:
        study: What is known of it.
        report: What its rewriting said: for how many candidates and which lengths.
        dtype: In which type floats are handed over.
    """

    def __init__(self, study: Study, report: reports.Report, dtype: str) -> None:
        self.study, self.report, self.dtype = study, report, dtype

    @cached_property
    def spans(self) -> dict[str, tuple[int, int]]:
        """Least and most of the lengths, by symbol."""
        known = {sizes.name_of(s) for s in sizes.lengths_of(self.study.symbols)}
        return sizes.spans(self.study.symbols, {k: v for k, v in self.report.lengths.items() if k in known})

    @cached_property
    def usual(self) -> cost.Shapes:
        """Shapes at the usual number of candidates and usual lengths."""
        study = self.study
        at = self.report.usual
        found = cost.shapes_of(study.model, study.facts, study.input_extents(), at, study.loaded.folder)
        lengths = {s: min(max(cost.LENGTH, low), high) for s, (low, high) in self.spans.items()}
        return replace(found, symbols={**found.symbols, **lengths})

    @cached_property
    def longest(self) -> cost.Shapes:
        """Shapes at the longest lengths served."""
        most = {s: high for s, (_, high) in self.spans.items()}
        return replace(self.usual, symbols={**self.usual.symbols, **most})

    @cached_property
    def types(self) -> dict[str, int]:
        """Element types of tensors."""
        return self.study.dtypes | {i.name: i.dtype for i in self.study.declared}

    def bytes(self, name: str, shapes: cost.Shapes) -> int | None:
        """Size of a tensor; None if no state can hold it."""
        kind, shape = self.types.get(name), shapes.shape(name)
        found = None if kind is None else halves.type_name(kind)
        if found is None or shape is None:
            return None
        width = 2 if found == "float32" and self.dtype == "float16" else np.dtype(found).itemsize
        return prod(shape) * width

    def bounded(self, name: str) -> bool:
        """Whether a tensor's extents follow from lengths of inputs."""
        facts = self.study.facts
        for _, symbols in facts.extents.get(name) or self.study.input_extents().get(name) or ():
            for s in symbols:
                known = facts.expressions.get(s)
                if s not in self.spans and (known is None or not known.symbols <= self.spans.keys()):
                    return False
        return True

    def seconds(self, k: int, shapes: cost.Shapes) -> float:
        """Predicted time of a step of the request. It has one row, so a product takes the time to read its weights."""
        node = self.study.model.graph.node[k]
        held = [shapes.initializers[i] for i in node.input if i in shapes.initializers]
        weights = sum(map(prod, held)) if cost.node_macs(node, shapes) else 0
        return cost.node_seconds(node, shapes) + 4 * weights * _WEIGHT
