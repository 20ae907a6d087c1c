"""Which positions along an axis anybody reads: the analysis behind the `select` rule.

A Gather or Slice of constant positions behind a chain of products (the last position of an encoder, say) means that the
other positions need not be computed. Going backwards over the nodes, every tensor learns per axis which positions its
consumers read; an axis that is not listed is read in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.facts import Facts
from onnxrank.graphs import attribute, captured_by
from onnxrank.operators import Trait, Use, find, operator, traits

Needs = dict[int, NDArray[np.int64]]


def positions_needed(
    nodes: Sequence[NodeProto],
    outputs: Iterable[str],
    facts: Facts,
    shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, NDArray[Any]],
    opset: int,
) -> dict[str, Needs]:
    """Positions read per tensor and axis.

    Args:
        nodes: All nodes, in order.
        outputs: Names of the graph's outputs, read in full.
        facts: Proved shapes.
        shapes: Shapes of initializers.
        constants: Small constants by name.
        opset: Version of the default domain.

    Returns:
        For tensors that are not read in full: per axis the positions read, sorted.
    """
    known: dict[str, Needs | None] = dict.fromkeys(outputs)
    for node in reversed(nodes):
        # Positions of one output are not those of another: who has several that are read is read in full.
        read = [o for o in node.output if o in known]
        mine = known[read[0]] if read == list(node.output[:1]) else None
        inner = captured_by(node)
        for k, name in enumerate([*node.input, *inner]):
            if not name:
                continue
            need = _through(node, k, mine, facts, shapes, constants, opset) if k < len(node.input) else None
            if name in known:
                known[name] = _union(known[name], need)
            else:
                known[name] = need
    out: dict[str, Needs] = {}
    for name, need in known.items():
        partly = {axis: at for axis, at in (need or {}).items() if len(at) != _extent(name, axis, facts)}
        if partly:
            out[name] = partly
    return out


def _rank(name: str, facts: Facts, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    if name in facts.extents:
        return len(facts.extents[name])
    return len(shapes[name]) if name in shapes else None


def _extent(name: str, axis: int, facts: Facts) -> int | None:
    found = facts.extents.get(name)
    if found is None or axis >= len(found) or found[axis][1]:
        return None
    return found[axis][0]


def _union(a: Needs | None, b: Needs | None) -> Needs | None:
    if not a or not b:
        return None
    out = {axis: np.union1d(a[axis], b[axis]) for axis in a.keys() & b.keys()}
    return out or None


def _through(
    node: NodeProto,
    k: int,
    mine: Needs | None,
    facts: Facts,
    shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, NDArray[Any]],
    opset: int,
) -> Needs | None:
    """What the node reads of its k-th input when `mine` is read of its first output; None for everything."""
    op, what, name = operator(node), traits(node), node.input[k]
    rank = _rank(name, facts, shapes)
    if rank is None:
        return None
    if op == "Gather" and k == 0:
        if node.input[1] not in constants:
            return None
        axis = attribute(node, "axis", 0) % rank
        n = _extent(name, axis, facts)
        if n is None:
            return None
        ids = constants[node.input[1]].reshape(-1)
        at = np.unique(np.where(ids < 0, ids + n, ids)).astype(np.int64)
        return {axis: at} if 0 < len(at) < n else None
    if op == "Slice" and k == 0:
        return _sliced(node, rank, facts, constants)
    if not mine:
        return None
    out_rank = _rank(node.output[0], facts, shapes)
    if out_rank is None:
        return None
    if Trait.ELEMENTWISE in what or op == "Dropout":
        shift = out_rank - rank
        out = {}
        for axis, at in mine.items():
            n = _extent(name, axis - shift, facts) if axis >= shift else None
            if n is not None and n > 1 and n == _extent(node.output[0], axis, facts):
                out[axis - shift] = at
        return out or None
    if Trait.NORMALISATION in what and k == 0:
        core = _axes(node, name, facts, opset)
        return None if core is None else {a: at for a, at in mine.items() if a < min(core, default=0)} or None
    if op == "Transpose":
        perm = attribute(node, "perm") or list(range(rank))[::-1]
        return {perm[a]: at for a, at in mine.items()} or None
    if Trait.FREE in what and k == 0:
        return _same_axes(node, mine, facts, rank, out_rank)
    if op in ("MatMul", "Gemm"):
        if k == 0 and not attribute(node, "transA"):
            shift = out_rank - rank
            return {a - shift: at for a, at in mine.items() if shift <= a < out_rank - 1} or None
        return None
    return None


def _axes(node: NodeProto, name: str, facts: Facts, opset: int) -> list[int] | None:
    """The axes that a normalisation takes in together; None where that is not known."""
    entry, sizes = find(node), facts.sizes.get(name)
    rank = _rank(name, facts, {})
    if entry is None or entry.axes is None or rank is None:
        return None
    use = Use(node, opset, [sizes or (0,) * rank], [None] * len(node.input))
    return [a % rank for a in entry.axes(use)]


def _same_axes(node: NodeProto, mine: Needs, facts: Facts, rank: int, out_rank: int) -> Needs | None:
    """Axes that a reshape leaves whole: the same extent behind the same number of entries per row."""
    before, after = facts.extents.get(node.input[0]), facts.extents.get(node.output[0])
    if before is None or after is None:
        return None

    def ends(shape: Sequence[tuple[int, tuple[str, ...]]]) -> list[tuple[int, tuple[str, ...]]]:
        total = 1
        syms: list[str] = []
        out: list[tuple[int, tuple[str, ...]]] = []
        for c, s in reversed(shape):
            out.append((total, tuple(sorted(syms))))
            total, syms = total * c, [*syms, *s]
        return out[::-1]

    inner, outer = ends(before), ends(after)
    out: Needs = {}
    for axis, at in mine.items():
        if after[axis][1] or after[axis][0] == 1:
            continue
        for a in range(rank):
            if before[a] == after[axis] and inner[a] == outer[axis]:
                out[a] = at
    return out or None


def _sliced(node: NodeProto, rank: int, facts: Facts, constants: Mapping[str, NDArray[Any]]) -> Needs | None:
    if any(i and i not in constants for i in node.input[1:]):
        return None
    args = [constants[i].reshape(-1) if i else None for i in node.input[1:]]
    starts, ends = args[0], args[1]
    if starts is None or ends is None:
        return None
    axes = args[2] if len(args) > 2 and args[2] is not None else np.arange(len(starts))
    steps = args[3] if len(args) > 3 and args[3] is not None else np.ones(len(starts), np.int64)
    out: Needs = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        n = _extent(node.input[0], int(axis) % rank, facts)
        if n is None or step < 0:
            continue
        at = np.arange(n)[slice(int(start), int(end), int(step))]
        if 0 < len(at) < n:
            out[int(axis) % rank] = at
    return out or None
