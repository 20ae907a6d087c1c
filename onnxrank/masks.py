"""Which scores masks hide: of a softmax's entries, the share of those that are so far below that they weigh nothing.

Runtimes give such entries denormal numbers as weights, of which processors take their time (`cost.Target.denormal`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.operators import Trait, operator, traits

MOST = 1 << 20
"""Entries of a constant at most that are looked through."""
_FAR = 80.0
"""A constant of this size, among what scores are made of, is a mask: exp of minus that is near the least number."""
_MASKED = 0.5
"""Share of entries that are taken to be masked where only requests tell: histories are half full."""


class Masks:
    """Finds what hides scores.

    Args:
        nodes: The nodes of a graph.
        data: Entries of a tensor that is constant; None for others, and for those of more than `MOST` entries.
    """

    def __init__(self, nodes: Iterable[NodeProto], data: Callable[[str], NDArray[Any] | None]) -> None:
        self._made = {o: node for node in nodes for o in node.output if o}
        self._data = data

    def share(self, name: str) -> float:
        """Share of a tensor's entries that masks hide, among what it is made of by steps on single entries."""
        seen, open_, found = set[str](), [name], 0.0
        while open_:
            name = open_.pop()
            node = self._made.get(name)
            if name in seen or node is None:
                continue
            seen.add(name)
            if operator(node) == "Max" and any(operator(self._made[i]) == "Sub" for i in node.input if i in self._made):
                return 0.0  # it is bounded from below
            if traits(node) & (Trait.ELEMENTWISE | Trait.MOVEMENT):
                read = [i for i in node.input if i]
            elif operator(node) == "Gemm":
                read = list(node.input[2:])  # what is added to the product
            else:
                continue
            found = max([found, *(self._hidden(node, i) for i in read)])
            open_ += read
        return found

    def _hidden(self, node: NodeProto, name: str) -> float:
        """Share of entries that a constant hides where a node reads it; 0 for what is no mask."""
        data = self._data(name)
        if data is None or data.dtype.kind != "f" or not data.size:
            return 0.0
        share = float((np.abs(data) >= _FAR).mean())
        if data.size > 1 or not share:
            return share
        chosen = self._data(node.input[0]) if operator(node) == "Where" else None
        if chosen is None:
            return _MASKED
        return float(chosen.mean() if name == node.input[1] else 1 - chosen.mean())
