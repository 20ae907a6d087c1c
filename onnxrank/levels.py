"""How often the entries of tensors and the products of nodes need be made, read off the abstract values."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, helper

from onnxrank.rewrite import Rewrite
from onnxrank.values import Abstract, Affine, Level, Sum, extents

_MATRIX = {"MatMul", "Gemm", "FusedMatMul", "MatMulInteger"}
_MOST_ENTRIES = 1 << 22

Levels = NDArray[np.int8]


def entry_levels(rw: Rewrite, value: Abstract) -> Levels:
    """Level of every entry of a row, in the shape of the value's constant extents; nothing is written for it."""
    shape = extents(value.dims)
    if isinstance(value, Sum):
        parts = [entry_levels(rw, t) for t in value.terms]
        joint = np.maximum.reduce([np.broadcast_to(p.reshape(_ranked(p.shape, len(shape))), shape) for p in parts])
        return np.broadcast_to(joint, shape)
    if isinstance(value, Affine) or value.whole is not None or prod(shape) > _MOST_ENTRIES:
        return np.broadcast_to(np.int8(rw.level(value)), shape)
    return rw.sources.levels(value.codes)


def _ranked(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + shape


def once_share(rw: Rewrite, node: NodeProto) -> float:
    """Share of a node's multiply-adds whose two factors are both the same for all candidates."""
    masks = [_once(rw, i) for i in node.input if i]
    if any(m is None for m in masks) or len(masks) < 2:
        return _whole(rw, node)
    a, b = masks[:2]
    assert a is not None and b is not None
    if not (a.size and b.size):
        return 0.0  # a product of no entries
    if node.op_type in _MATRIX:
        return _matrix_share(node, a, b)
    if node.op_type == "Einsum" and len(masks) == 2:
        return _einsum_share(node, a, b)
    if node.op_type == "Conv" and b.ndim >= 3 and set(b.shape[2:]) == {1} and _attribute(node, "group", 1) == 1:
        return float(a.mean())
    return _whole(rw, node)


def _once(rw: Rewrite, name: str) -> NDArray[np.bool_] | None:
    value = rw.values.get(name)
    return None if value is None else entry_levels(rw, value) < Level.CANDIDATE


def _whole(rw: Rewrite, node: NodeProto) -> float:
    found = [rw.values[o] for o in node.output if o in rw.values]
    return float(bool(found) and all(rw.level(v) < Level.CANDIDATE for v in found))


def _attribute(node: NodeProto, name: str, default: Any = 0) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _matrix_share(node: NodeProto, a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    a = a[None, :] if a.ndim == 1 else a.swapaxes(-1, -2) if _attribute(node, "transA") else a
    b = b[:, None] if b.ndim == 1 else b.swapaxes(-1, -2) if _attribute(node, "transB") else b
    rows, columns = a.mean(-2), b.mean(-1)  # per inner position, the share that is the same
    if rows.shape[-1] != columns.shape[-1]:
        return 0.0  # an inner axis that is factored differently
    return float((rows * columns).mean())


def _einsum_share(node: NodeProto, a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    terms = _attribute(node, "equation").decode().replace(" ", "").split("->")[0].split(",")
    try:
        both = float(np.einsum(f"{','.join(terms)}->", a.astype(float), b.astype(float), optimize=True))
        every = float(np.einsum(f"{','.join(terms)}->", np.ones(a.shape), np.ones(b.shape), optimize=True))
    except ValueError:
        return 0.0
    return both / every if every else 0.0
