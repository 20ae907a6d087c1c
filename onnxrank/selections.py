"""Selections by GatherND that take the same positions of every row: they become a Gather of these.

`masked_select(x, mask)` is exported as `GatherND(x, Transpose(NonZero(Expand(mask))))`, whose number of rows is found
in the data. With a mask that is constant and the same for all rows, row n gives the entries at the mask's positions,
and row n + 1 follows:

    masked_select(x, mask) = reshape(gather(reshape(x, [N, entries]), positions), [N * count])

`x[arange(N)[:, None], positions]`, which masks of attention are read by, is exported as `GatherND(x, Concat(rows,
positions))`. Where the positions do not vary along rows, each row gives those of its own:

    x[rows, positions] = gather(x, positions, axis=1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from onnxrank.emitter import emitter_for, replaced
from onnxrank.extents import Expr
from onnxrank.facts import Extent, Facts
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, operator, traits
from onnxrank.values import extents, symbols


def resolved(model: ModelProto, facts: Facts, inputs: Mapping[str, Sequence[Extent]]) -> ModelProto | None:
    """Replaces every selection of the same positions of all rows by a Gather.

    Args:
        model: The model.
        facts: Its shapes and constants.
        inputs: Shapes of its inputs.

    Returns:
        A model of the same outputs; None where there is nothing to replace.
    """
    made = {o: n for n in model.graph.node for o in n.output if o}
    picks = [n for n in model.graph.node if operator(n) == "GatherND" and not attribute(n, "batch_dims", 0)]
    masked = {n.output[0]: found for n in picks if (found := _positions(n, made, facts)) is not None}
    rows = {name: facts.size_of((dims[0][0], *dims[0][1])) for name, dims in inputs.items() if dims}
    rows |= {name: sizes[0] for name, sizes in facts.sizes.items() if sizes}
    paired = {n.output[0]: own for n in picks if (own := _of_own_row(n, made, facts, rows)) is not None}
    if not masked and not paired:
        return None
    emit = emitter_for(model)

    def write(node: NodeProto) -> bool:
        name = node.output[0] if node.output else ""
        if name in masked:
            entries = prod(n for n in facts.sizes[node.input[0]][1:] if isinstance(n, int))
            flat = emit.add("Reshape", [node.input[0], emit.constant(np.array([-1, entries], np.int64))])
            picked = emit.add("Gather", [flat, emit.constant(masked[name])], {"axis": 1})
            emit.add("Reshape", [picked, emit.constant(np.array([-1], np.int64))], output=name)
        elif name in paired:
            own = paired[name]
            first = emit.constant(np.array(0, np.int64))
            ids = emit.add("Gather", [own, first], {"axis": 0}) if isinstance(own, str) else emit.constant(own)
            emit.add("Gather", [node.input[0], ids], {"axis": 1}, output=name)
        return name in masked or name in paired

    return replaced(model, emit, write)


def _positions(node: NodeProto, made: Mapping[str, NodeProto], facts: Facts) -> NDArray[np.int64] | None:
    """The positions within a row that a mask selects; None if the node is no such selection."""
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


def _of_own_row(
    node: NodeProto, made: Mapping[str, NodeProto], facts: Facts, rows: Mapping[str, int | Expr]
) -> str | NDArray[Any] | None:
    """The positions that are taken of every row, as `_same_for_rows`; None if a node does not take each row's own."""
    pair = made.get(node.input[1])
    if pair is None or operator(pair) != "Concat" or len(pair.input) != 2:
        return None
    shapes = [facts.sizes.get(name, ()) for name in pair.input]
    if any(len(s) < 2 or s[-1] != 1 for s in shapes) or attribute(pair, "axis") not in (-1, len(shapes[0]) - 1):
        return None
    if shapes[0][0] != rows.get(node.input[0]) or _counted(pair.input[0], made, facts) != 0:
        return None
    return _same_for_rows(pair.input[1], made, facts)


def _counted(name: str, made: Mapping[str, NodeProto], facts: Facts) -> int | None:
    """The axis along which a tensor's entries are 0, 1, 2, ..., the same along all others; None if there is none."""
    node, sizes = made.get(name), facts.sizes.get(name)
    if node is None or sizes is None:
        return None
    if operator(node) == "Range":
        start, limit, step = (facts.entries.get(i) or _number(i, facts) for i in node.input)
        return 0 if (start, limit, step) == ([0], [*sizes], [1]) else None
    if operator(node) != "Expand" and Trait.RESHAPE not in traits(node):
        return None
    before = _counted(node.input[0], made, facts)
    if before is None:
        return None
    had = facts.sizes[node.input[0]]
    if operator(node) == "Expand":
        axis = before + len(sizes) - len(had)
        return axis if sizes[axis] == had[before] else None
    own, now = ([k for k, n in enumerate(s) if n != 1] for s in (had, sizes))
    same = [had[k] for k in own] == [sizes[k] for k in now]
    return now[own.index(before)] if same and before in own else None


def _number(name: str, facts: Facts) -> list[int]:
    """The entries of a constant."""
    return [int(n) for n in facts.folded[name][1].reshape(-1)] if name in facts.folded else []


def _same_for_rows(name: str, made: Mapping[str, NodeProto], facts: Facts) -> str | NDArray[Any] | None:
    """What is the same for all rows, without its last axis of 1: a constant row, or a tensor of one row."""
    if name in facts.folded:
        dims, data = facts.folded[name]
        return None if extents(dims[:1]) != (1,) or symbols(dims[1:]) else data[0, ..., 0]
    node = made.get(name)
    wide = made.get(node.input[0]) if node is not None and operator(node) == "Unsqueeze" else None
    if wide is None or operator(wide) != "Expand":
        return None
    few, many = (facts.sizes.get(t, ()) for t in (wide.input[0], wide.output[0]))
    return wide.input[0] if (*many,) == (*facts.sizes[name][:-1],) and few == (1, *many[1:]) else None
