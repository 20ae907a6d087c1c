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
        return max((share for share, _ in self._found([(None, name)])), default=0.0)

    def added(self, node: NodeProto, name: str) -> tuple[float, float]:
        """What a node that reads a mask hides with it.

        Args:
            node: An addition to scores, or a choice between them and a number.
            name: What it adds, or the number.

        Returns:
            The share of entries, and how far below the others the nearest of them are; 0 where there are none.
        """
        found = [f for f in self._found([(node, name)]) if f[0]]
        return max((share for share, _ in found), default=0.0), min((far for _, far in found), default=0.0)

    def _found(self, open_: list[tuple[NodeProto | None, str]]) -> list[tuple[float, float]]:
        """Shares that constants hide, and how far, from tensors backwards, each as a node reads it."""
        seen, found = set[str](), list[tuple[float, float]]()
        while open_:
            reader, name = open_.pop()
            if reader is not None:
                found.append(self._hidden(reader, name))
            node = self._made.get(name)
            if name in seen or node is None:
                continue
            seen.add(name)
            if operator(node) == "Max" and any(operator(self._made[i]) == "Sub" for i in node.input if i in self._made):
                continue  # it is bounded from below
            if operator(node) == "Where":
                read = self._chosen(node)
            elif traits(node) & (Trait.ELEMENTWISE | Trait.MOVEMENT):
                read = [i for i in node.input if i]
            elif operator(node) == "Gemm":
                read = list(node.input[2:])  # what is added to the product
            else:
                continue
            open_ += [(node, i) for i in read]
        return found

    def _chosen(self, node: NodeProto) -> list[str]:
        """What entries of a choice may be; not those that give way where they are below something."""
        condition = self._made.get(node.input[0])
        replaced = condition is not None and operator(condition) == "Less" and condition.input[0] == node.input[2]
        return list(node.input[1:2] if replaced else node.input[1:])

    def _hidden(self, node: NodeProto, name: str) -> tuple[float, float]:
        """Share of entries that a constant hides where a node reads it, and how far; nothing for what is no mask."""
        data = self._data(name)
        if data is None or data.dtype.kind != "f" or not data.size:
            return 0.0, 0.0
        sizes = np.abs(data)
        share = float((sizes >= _FAR).mean())
        far = float(sizes[sizes >= _FAR].min()) if share else 0.0
        if data.size > 1 or not share:
            return share, far
        chosen = self._data(node.input[0]) if operator(node) == "Where" else None
        if chosen is None:
            return _MASKED, far
        return float(chosen.mean() if name == node.input[1] else 1 - chosen.mean()), far
