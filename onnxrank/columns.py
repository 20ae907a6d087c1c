"""Columns of embedding tables that other columns tell: constant ones, equal ones, and combinations of others.

Where all that a lookup goes to is layers, with nothing but concatenation and flattening between, `(z B + m) W` is
`z (B W) + m W`: layers read `z`, which has fewer columns. Of a table some columns of which are constant, and some
equal, `B` says which column is which, and `m` has the constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.graphs import attribute
from onnxrank.network import Network, Product, Table
from onnxrank.operators import operator

Shapes = Mapping[str, Sequence[int | None]]
_SOME = 256
"""Rows by which most columns are told apart."""


@dataclass
class _Ways:
    """Where the columns of a table go.

    Attributes:
        layers: Every layer with the places of the table's first column among its inputs.
        tensors: What has another width then.
        flattened: Nodes that bring so many lookups side by side.
    """

    layers: dict[str, tuple[Product, list[int]]] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=list)
    flattened: list[tuple[NodeProto, int, int]] = field(default_factory=list)


def pack_columns(net: Network, most: int | None, allowed: Callable[[Table], bool]) -> list[tuple[Table, int]]:
    """Packs columns away, in place.

    Args:
        net: The model.
        most: Entries above which a table is not looked at.
        allowed: Whether a table may be changed.

    Returns:
        The tables, and how many columns went.
    """
    out = []
    shapes: Shapes | None = None
    for table in net.tables(most):
        data = net.array(table.weight)
        assert data is not None
        like = _like(data) if allowed(table) else np.arange(table.shape[1])
        keep = like == np.arange(len(like))
        if keep.all() or not keep.any():
            continue
        shapes = _shapes(net) if shapes is None else shapes
        ways = _ways(net, [n.output[0] for n in table.nodes], table.shape[1], shapes)
        if ways is not None:
            back = (np.flatnonzero(keep)[:, None] == like[None, :]).astype(np.float64)
            _narrow(net, ways, back, np.where(like < 0, data[0], 0.0).astype(np.float64), "pack")
            name = net.constant(data[:, keep], f"{table.weight}.packed")
            for node in table.nodes:
                node.input[0] = name
            net.renewed()
            shapes = None
            out.append((table, int((~keep).sum())))
    return out


def fold(net: Network, made: str, low: str, back: NDArray[Any], mean: NDArray[Any], method: str) -> list[str]:
    """Has layers read `low` instead of `low @ back + mean`, in place.

    Args:
        net: The model.
        made: The tensor that is that sum.
        low: `[..., columns]`, of fewer columns.
        back: `[columns, width]`.
        mean: `[width]`.
        method: What does it.

    Returns:
        The layers' inputs, once for every time that they read it; none where something else reads it.
    """
    ways = _ways(net, [made], back.shape[1], _shapes(net))
    if ways is None:
        return []
    _narrow(net, ways, back.astype(np.float64), mean.astype(np.float64), method)
    for node in net.readers[made]:
        node.input[list(node.input).index(made)] = low
    net.renewed()
    return [layer.inputs[0] for layer, places in ways.layers.values() for _ in places]


def _like(data: NDArray[np.float32]) -> NDArray[np.int64]:
    """Per column the first one that is equal to it; -1 for columns of one number."""
    like = np.arange(data.shape[1])
    if len(data) < 2 or not np.isfinite(data).all():
        return like
    some = data[:_SOME]
    if len(np.unique(some[0])) == len(like) and (some != some[0]).any(0).all():
        return like  # no two are equal in the first row, and none has one number
    _, first, back = np.unique(some, axis=1, return_index=True, return_inverse=True)
    for k, j in enumerate(first[back.reshape(-1)]):
        if (some[:, k] == some[0, k]).all() and (data[:, k] == data[0, k]).all():
            like[k] = -1
        elif j < k and like[j] == j and (data[:, j] == data[:, k]).all():
            like[k] = j
    return like


def _shapes(net: Network) -> Shapes:
    """Shapes as far as onnx's inference knows them."""
    graph = onnx.shape_inference.infer_shapes(net.finished()).graph
    known = [*graph.input, *graph.value_info, *graph.output]
    return {
        v.name: [d.dim_value if d.HasField("dim_value") else None for d in v.type.tensor_type.shape.dim]
        for v in known
        if v.type.tensor_type.HasField("shape")
    }


def _ways(net: Network, tensors: Sequence[str], columns: int, shapes: Shapes) -> _Ways | None:
    """Where the columns of some tensors go, where that is layers only."""
    found = _Ways()
    layers = {id(n): p for p in net.products() for n in p.nodes}
    waiting = [(t, [0], columns) for t in tensors]
    while waiting:
        tensor, places, width = waiting.pop()
        readers = net.readers.get(tensor, [])
        if tensor in net.outputs or tensor in net.inner or not readers or shapes.get(tensor, [None])[-1:] != [width]:
            return None
        found.tensors.append(tensor)
        for node in readers:
            layer = layers.get(id(node))
            if list(node.input).count(tensor) > 1:
                return None
            if layer is not None and node.input[0] == tensor and len(layer.nodes) == 1:
                found.layers.setdefault(layer.weight, (layer, []))[1].extend(places)
                continue
            behind = _through(net, node, tensor, places, shapes, found)
            if behind is None:
                return None
            waiting.append((node.output[0], *behind))
    return found


def _through(
    net: Network, node: NodeProto, tensor: str, places: Sequence[int], shapes: Shapes, found: _Ways
) -> tuple[list[int], int] | None:
    """Where a node puts columns along the last axis, and how long that is; None where it does something else."""
    shape, made = shapes[tensor], shapes.get(node.output[0], [])
    if not made or made[-1] is None:
        return None
    if operator(node) == "Concat" and attribute(node, "axis") in (-1, len(shape) - 1):
        before = list(node.input)[: list(node.input).index(tensor)]
        widths = [shapes.get(i, [None])[-1] for i in before]
        return None if None in widths else ([sum(w or 0 for w in widths) + p for p in places], made[-1])
    if operator(node) in ("Reshape", "Flatten") and node.input[0] == tensor:
        inner = shape[len(made) - 1 :]
        count = math.prod(n or 0 for n in inner[:-1])
        target = net.array(node.input[1]) if operator(node) == "Reshape" else np.array([-1])
        # All axes but the last ones stay, and these become one.
        if not inner or inner[-1] is None or len(made) < 2:
            return None
        if count < 1 or count * inner[-1] != made[-1] or target is None:
            return None
        if operator(node) == "Flatten" and len(made) != 2:
            return None
        found.flattened.append((node, count, made[-1]))
        return [k * inner[-1] + p for k in range(count) for p in places], made[-1]
    return None


def _narrow(net: Network, ways: _Ways, back: NDArray[np.float64], mean: NDArray[np.float64], method: str) -> None:
    """Has layers read `z` where they read `z @ back + mean`; whoever gives that is to give `z`."""
    columns, width = back.shape
    for layer, places in ways.layers.values():
        weight = net.matrix(layer).astype(np.float64)
        parts, at = [], 0
        shift = np.zeros(weight.shape[1])
        for start in sorted(places):
            block = weight[start : start + width]
            parts += [weight[at:start], back @ block]
            shift += mean @ block
            at = start + width
        net.shift(layer, shift, method)
        net.set_matrix(layer, np.concatenate([*parts, weight[at:]]).astype(net.matrix(layer).dtype))
    for node, count, inner in ways.flattened:
        if operator(node) == "Reshape":
            target = net.array(node.input[1])
            assert target is not None
            if target[-1] == inner:
                shape = np.concatenate([target[:-1], [inner - count * (width - columns)]]).astype(np.int64)
                node.input[1] = net.constant(shape, f"{node.output[0]}.shape")
    net.resized(ways.tensors)
    net.renewed()
