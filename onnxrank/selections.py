"""Selections by constant masks, `masked_select(x, mask)`: which positions are taken is known.

Exporters write them as `GatherND(x, Transpose(NonZero(Expand(mask))))`, whose number of rows is found in the data. With
a mask that is the same for all rows, row n gives the entries at the mask's positions, and row n + 1 follows:

    masked_select(x, mask) = reshape(gather(reshape(x, [N, entries]), positions), [N * count])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from onnxrank.facts import Facts
from onnxrank.graphs import live, names_in
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
        k: positions
        for k, node in enumerate(model.graph.node)
        if (positions := _positions(node, made, facts)) is not None
    }
    if not found:
        return None
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    taken = names_in(model.graph)

    def fresh(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    def constant(name: str, data: Sequence[int] | NDArray[np.int64]) -> str:
        out.graph.initializer.append(numpy_helper.from_array(np.asarray(data, np.int64), fresh(name)))
        return str(out.graph.initializer[-1].name)

    for k, node in enumerate(model.graph.node):
        if k not in found:
            out.graph.node.append(node)
            continue
        (y,), x = node.output, node.input[0]
        entries = prod(n for n in facts.sizes[x][1:] if isinstance(n, int))
        rows, picked = fresh(f"{y}/rows"), fresh(f"{y}/picked")
        by_row, at, flat = (
            constant(f"{y}/{what}", data)
            for what, data in (("entries", [-1, entries]), ("positions", found[k]), ("all", [-1]))
        )
        out.graph.node.append(helper.make_node("Reshape", [x, by_row], [rows], name=rows))
        out.graph.node.append(helper.make_node("Gather", [rows, at], [picked], name=picked, axis=1))
        out.graph.node.append(helper.make_node("Reshape", [picked, flat], [y], name=node.name or y))
    return live(out)


def _positions(node: NodeProto, made: Mapping[str, NodeProto], facts: Facts) -> NDArray[np.int64] | None:
    """The positions within a row that a node selects; None if it is no such selection."""
    if operator(node) != "GatherND" or any(a.name == "batch_dims" and a.i for a in node.attribute):
        return None
    turned = made.get(node.input[1])
    mask = made.get(turned.input[0]) if turned is not None and operator(turned) == "Transpose" else None
    if mask is None or operator(mask) != "NonZero" or mask.input[0] not in facts.folded:
        return None
    perm = next((list(a.ints) for a in turned.attribute if a.name == "perm"), [1, 0])  # type: ignore[union-attr]
    dims, data = facts.folded[mask.input[0]]
    same = facts.sizes.get(mask.input[0]) == facts.sizes.get(node.input[0])
    if perm != [1, 0] or not same or len(dims) < 2 or len(symbols(dims[:1])) != 1 or symbols(dims[1:]):
        return None
    if extents(dims[:1]) != (1,) or not data.any() or 0 in extents(dims):
        return None
    return np.flatnonzero(data.reshape(extents(dims)[1:]))
