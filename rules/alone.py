"""Operators with a signature: where nothing varies along an axis that they work on one by one, it is made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onnx import NodeProto

from onnxrank.extents import Unproved
from onnxrank.operators import REGISTRY, find
from onnxrank.operators.signatures import Signature
from onnxrank.rewrite import Rewrite
from onnxrank.transfers import shared_dims
from onnxrank.values import Abstract, Dim, Dims, Level, Unrepresentable, Value, is_candidate_symbol, symbols

from .movement import placed
from .rowwise import TOGETHER, note_together, rowwise

NAME = "broadcast"


def alone(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A node by the signature of its operator."""
    entry = find(node)
    assert entry is not None and entry.signature is not None
    given = {k: rw.value(node, k) for k, i in enumerate(node.input) if i}
    try:
        found = entry.signature(placed(rw, node))
    except Unproved as e:
        _refuse(rw, given, f"which rows {node.op_type} takes in together cannot be told: {e}")
        return None
    if found.as_set:
        return _as_set(rw, node, found, given)
    core = {k: [d for d, a in zip(v.dims, found.inputs[k], strict=True) if a is None] for k, v in given.items()}
    if any(is_candidate_symbol(s) for dims in core.values() for s in symbols(dims)):
        _refuse(rw, given, f"{node.op_type} takes in the rows of several candidates together")
        return None
    if _is_rowwise(found, node):
        at = [k for k, a in enumerate(found.inputs[0]) if a is None]
        note_together(rw, given[0], at)
        return rowwise(rw, node, at, lambda dims: _made(rw, node, found, {0: dims}))
    given = {k: rw.held(v, symbols(core[k])) for k, v in given.items()}
    held = {s for v in given.values() for s in rw.present(v)}
    if {Level.REQUEST, Level.CANDIDATE} <= {level for v in given.values() for level in rw.levels(v)}:
        rw.refuse(NAME, TOGETHER)
    names = {k: rw.tensor(v) if found.broadcasts else rw.rows_along(v, held) for k, v in given.items()}
    dims = _made(rw, node, found, {k: v.dims for k, v in given.items()})
    return rw.keep(node, [names.get(k, "") for k in range(len(node.input))], dims, held)


def _refuse(rw: Rewrite, given: Mapping[int, Value], reason: str) -> None:
    """A remark, where there is anything of the request's."""
    if any(Level.REQUEST in rw.levels(v) for v in given.values()):
        rw.refuse(NAME, reason)


def _as_set(rw: Rewrite, node: NodeProto, found: Signature, given: dict[int, Value]) -> list[Abstract] | None:
    """What depends on all entries, however often each comes: once where all are the request's."""
    held = {s for v in given.values() for s in rw.present(v)}
    if any(map(is_candidate_symbol, held)):
        _refuse(rw, given, f"{node.op_type} takes in the rows of all candidates together")
        return None
    names = [rw.tensor(given[k]) if k in given else "" for k in range(len(node.input))]
    return rw.keep(node, names, _made(rw, node, found, {k: v.dims for k, v in given.items()}), held)


def _is_rowwise(found: Signature, node: NodeProto) -> bool:
    """Whether only the first operand has axes that count, and these stay where they are."""
    first, *others = found.inputs
    kept = dict(enumerate(first))
    moved = any(a is not None and kept.get(k) != a for axes in found.outputs for k, a in enumerate(axes))
    every = all({a for a in first if a is not None} <= {*axes} for axes in found.outputs[: len(node.output)])
    return every and not moved and all(a is None for axes in others for a in axes)


def _made(rw: Rewrite, node: NodeProto, found: Signature, given: dict[int, Dims]) -> list[Dims]:
    """Shapes of the results, from those of the operands."""
    shared = shared_dims([*given.values()], [found.inputs[k] for k in given])
    return [_shape(rw, o, axes, shared) for o, axes in zip(node.output, found.outputs, strict=False)]


def _shape(rw: Rewrite, name: str, axes: Sequence[int | None], shared: Mapping[int, Dim]) -> Dims:
    if not name:
        return ()
    known = rw.facts.dims(name) if None in axes else ((),) * len(axes)
    if known is None:
        raise Unrepresentable(f"the shape of {name} is not known")
    dims = tuple(d if a is None else shared[a] for d, a in zip(known, axes, strict=True))
    if any(is_candidate_symbol(s) for d, a in zip(dims, axes, strict=True) if a is None for s in symbols([d])):
        raise Unrepresentable("an extent that may depend on the candidates")
    return dims


ALONE: dict[str, Callable[[Rewrite, NodeProto], list[Abstract] | None]] = {
    name: alone for name, entry in REGISTRY.items() if entry.signature is not None
}
"""What has a signature."""
