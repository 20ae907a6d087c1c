"""Selections by constant masks, `masked_select(x, mask)`: which positions are taken is known.

Exporters write them as `GatherND(x, Transpose(NonZero(Expand(mask))))`, whose number of rows is found in the data. With
a mask that is the same for all rows, row n gives the entries at the mask's positions, and row n + 1 follows:

    masked_select(x, mask) = reshape(gather(reshape(x, [N, entries]), positions), [N * count])
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from onnxrank.emitter import emitter_for, replaced
from onnxrank.facts import Facts
from onnxrank.graphs import attribute
from onnxrank.operators import operator
from onnxrank.values import extents, symbols


def resolved(model: ModelProto, facts: Facts) -> ModelProto | None:
    """Replaces every selection by a mask that is the same for all rows by a Gather of its positions.

    Args:
        model: The model.
        facts: Its shapes and constants.

    Returns:
        A model of the same outputs; None where there is nothing to replace.
    """
    made = {o: n for n in model.graph.node for o in n.output if o}
    found = {
        node.output[0]: positions
        for node in model.graph.node
        if (positions := _positions(node, made, facts)) is not None
    }
    if not found:
        return None
    emit = emitter_for(model)

    def write(node: NodeProto) -> bool:
        positions = found.get(node.output[0]) if node.output else None
        if positions is None:
            return False
        entries = prod(n for n in facts.sizes[node.input[0]][1:] if isinstance(n, int))
        rows = emit.add("Reshape", [node.input[0], emit.constant(np.array([-1, entries], np.int64))])
        picked = emit.add("Gather", [rows, emit.constant(positions)], {"axis": 1})
        emit.add("Reshape", [picked, emit.constant(np.array([-1], np.int64))], output=node.output[0])
        return True

    return replaced(model, emit, write)


def _positions(node: NodeProto, made: Mapping[str, NodeProto], facts: Facts) -> NDArray[np.int64] | None:
    """The positions within a row that a node selects; None if it is no such selection."""
    if operator(node) != "GatherND" or attribute(node, "batch_dims", 0):
        return None
    turned = made.get(node.input[1])
    if turned is None or operator(turned) != "Transpose" or attribute(turned, "perm", [1, 0]) != [1, 0]:
        return None
    mask = made.get(turned.input[0])
    if mask is None or operator(mask) != "NonZero" or mask.input[0] not in facts.folded:
        return None
    dims, data = facts.folded[mask.input[0]]
    same = facts.sizes.get(mask.input[0]) == facts.sizes.get(node.input[0])
    if not same or len(dims) < 2 or len(symbols(dims[:1])) != 1 or symbols(dims[1:]):
        return None
    if extents(dims[:1]) != (1,) or not data.any() or 0 in extents(dims):
        return None
    return np.flatnonzero(data.reshape(extents(dims)[1:]))
