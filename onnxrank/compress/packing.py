"""Packing: what is computed and does nothing, as masks and weight decay leave it.

- Weights that are tiny against their layer count as 0. Dead units decay to them, and products with them are denormal
  numbers, which processors take a hundred times longer for.
- A unit that nothing behind it reads (its row of the next layer is 0) is dropped.
- A unit that reads nothing (its column is 0) is a constant, which is added to the next layer's bias.

Scores stay what they are but for rounding. A layer is packed only where all that reads it is known: a tensor that is an
output, or is read by anything else than per-unit functions and layers, stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.compress.network import Network, Product, Site, attribute

Floats = NDArray[np.float64]
TINY = 2.0**-50
"""Share of a layer's largest weight below which a weight is 0: it moves no sum by as much as rounding does."""


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


_UNARY: dict[str, Callable[[Floats, NodeProto], Floats]] = {
    "Relu": lambda x, n: np.maximum(x, 0),
    "Sigmoid": lambda x, n: _sigmoid(x),
    "Tanh": lambda x, n: np.tanh(x),
    "LeakyRelu": lambda x, n: np.where(x < 0, attribute(n, "alpha", 0.01) * x, x),
    "Identity": lambda x, n: x,
}
"""Functions of one unit, and what they make of a constant."""
_BINARY: dict[str, Callable[[Floats, Floats], Floats]] = {
    "Add": lambda x, c: x + c,
    "Sub": lambda x, c: x - c,
    "Mul": lambda x, c: x * c,
    "PRelu": lambda x, c: np.where(x < 0, c * x, x),
}
"""The same with a constant per unit as the second operand."""


@dataclass(frozen=True)
class _Run:
    """What lies between a layer and those that read it.

    Attributes:
        nodes: Functions of one unit each, in order.
        readers: The layers behind them.
    """

    nodes: tuple[NodeProto, ...]
    readers: tuple[Product, ...]


def pack(net: Network) -> list[str]:
    """Packs away, in place, what does nothing; says what, a sentence each."""
    said = _flushed(net)
    packed: dict[str, int] = {}
    while (found := _once(net)) is not None:
        name, count = found
        packed[name] = packed.get(name, 0) + count
    return said + [f"{n} units behind {name} did nothing" for name, n in packed.items()]


def _flushed(net: Network) -> list[str]:
    """Makes tiny weights 0."""
    said = []
    sites: list[Site] = [*net.products(), *net.tables()]
    for site in sites:
        data = net.array(site.weight)
        assert data is not None
        tiny = (data != 0) & (np.abs(data) < TINY * np.abs(data).max(initial=0))
        if not tiny.any():
            continue
        name = net.constant(np.where(tiny, data.dtype.type(0), data), f"{site.weight}.flushed")
        for node in site.nodes:
            node.input[1 if isinstance(site, Product) else 0] = name
        net.renewed()
        said.append(f"{int(tiny.sum())} weights of {site.name} are too small to be told from 0")
    return said


def _once(net: Network) -> tuple[str, int] | None:
    """Packs one layer; its name and how many units went, or None where there is none."""
    products = net.products()
    for site in products:
        run = _run(net, site, products)
        if run is None:
            continue
        weight = net.matrix(site)
        unread = np.all([~net.matrix(r).any(axis=1) for r in run.readers], axis=0)
        constant = ~weight.any(axis=0) & ~unread
        keep = ~(unread | constant)
        if keep.all():
            continue
        if not keep.any():  # a layer of no units is no layer
            keep[0] = True
            constant[0] = False
        if keep.all():
            continue
        if constant.any():
            value = _constants(net, site, run)
            if value is None:
                continue
            for r in run.readers:
                _add(net, r, value[constant] @ net.matrix(r)[constant].astype(np.float64))
            # Layers to which a bias was added are new nodes.
            now = {p.weight: p for p in net.products()}
            run = _Run(run.nodes, tuple(now[r.weight] for r in run.readers))
        for r in run.readers:
            _weights(net, r, net.matrix(r)[keep])
        _weights(net, site, weight[:, keep])
        _vectors(net, site, run, keep)
        return site.name, int((~keep).sum())
    return None


def _run(net: Network, site: Product, products: list[Product]) -> _Run | None:
    """What lies between a layer and those that read it, where that is all that does."""
    if len(site.nodes) != 1:
        return None
    first = site.nodes[0]
    if first.op_type == "Gemm" and len(first.input) > 2 and first.input[2]:
        if net.array(first.input[2]) is None:
            return None
    by_node = {id(n): p for p in products for n in p.nodes}
    tensor = first.output[0]
    nodes: list[NodeProto] = []
    while True:
        if tensor in net.outputs or tensor in net.inner:
            return None
        readers = net.readers.get(tensor, [])
        layers = [by_node.get(id(n)) for n in readers]
        if readers and all(p is not None and list(p.nodes[0].input).count(tensor) == 1 for p in layers):
            found = tuple(p for p in layers if p is not None)
            whole = all(len(p.nodes) == 1 and p.nodes[0].input[0] == tensor for p in found)
            return _Run(tuple(nodes), found) if whole and site not in found else None
        if len(readers) != 1 or not _per_unit(net, readers[0], tensor, site.shape[1]):
            return None
        nodes.append(readers[0])
        tensor = readers[0].output[0]


def _per_unit(net: Network, node: NodeProto, tensor: str, width: int) -> bool:
    """Whether a node is a function of each unit by itself."""
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type in _UNARY:
        return True
    if node.op_type in _BINARY and node.input[0] != node.input[1]:
        place = _other(node, tensor)
        if node.op_type in ("Sub", "PRelu") and place == 0:
            return False
        data = net.array(node.input[place])
        return data is not None and data.size in (1, width) and (data.size == 1 or data.shape[-1] == width)
    return False


def _other(node: NodeProto, tensor: str) -> int:
    return 1 - list(node.input).index(tensor)


def _constants(net: Network, site: Product, run: _Run) -> Floats | None:
    """What units that read nothing give to the next layer, `[units]`."""
    first = site.nodes[0]
    value = np.zeros(site.shape[1])
    if first.op_type == "Gemm" and len(first.input) > 2 and first.input[2]:
        bias = net.array(first.input[2])
        assert bias is not None
        value = np.broadcast_to(bias.astype(np.float64).reshape(-1), value.shape)
    tensor = first.output[0]
    for n in run.nodes:
        if n.op_type in _UNARY:
            value = _UNARY[n.op_type](value, n)
        else:
            other = net.array(n.input[_other(n, tensor)])
            assert other is not None
            value = _BINARY[n.op_type](value, other.astype(np.float64).reshape(-1))
        tensor = n.output[0]
    return value if np.isfinite(value).all() else None


def _add(net: Network, site: Product, vector: Floats) -> None:
    """Has a vector added to what a layer gives."""
    node = site.nodes[0]
    if not np.abs(vector).max() > 0:
        return
    held = net.bias(node, site.shape[1])
    kind = net.matrix(site).dtype
    if held is not None:
        old = net.array(held.node.input[held.place])
        assert old is not None
        net.set_bias(held, old.astype(np.float64).reshape(-1) + vector)
    elif node.op_type == "Gemm" and (len(node.input) < 3 or not node.input[2]):
        del node.input[2:]
        node.input.append(net.constant(vector.astype(kind), f"{node.output[0]}.bias"))
        net.renewed()
    else:
        net.add_bias(node, vector.astype(kind), "pack")


def _weights(net: Network, site: Product, matrix: NDArray[np.float32]) -> None:
    """Gives a layer other weights `[inputs, outputs]`."""
    name = net.constant(matrix.T if site.flipped else matrix, f"{site.weight}.packed")
    for node in site.nodes:
        node.input[1] = name
    net.renewed()


def _vectors(net: Network, site: Product, run: _Run, keep: NDArray[np.bool_]) -> None:
    """Cuts the constants per unit: the layer's own bias, and those of the functions behind it."""
    first = site.nodes[0]
    places = [(first, 2)] if first.op_type == "Gemm" and len(first.input) > 2 and first.input[2] else []
    tensor = first.output[0]
    for n in run.nodes:
        if n.op_type in _BINARY:
            places.append((n, _other(n, tensor)))
        tensor = n.output[0]
    for node, place in places:
        data = net.array(node.input[place])
        assert data is not None
        if data.size == len(keep) and data.size > 1:
            node.input[place] = net.constant(data[..., keep], f"{node.output[0]}.packed")
    net.renewed()
