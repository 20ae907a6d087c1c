"""Packing: what is computed and does nothing, as masks and weight decay leave it.

- Weights that are tiny against their layer count as 0. Dead units decay to them, and products with them are denormal
  numbers, which processors take a hundred times longer for.
- A unit that nothing behind it reads (its row of the next layer is 0) is dropped.
- A unit that reads nothing (its column is 0) is a constant, which is added to the next layer's bias.
- Columns of tables that are constant, or equal to others, go into the layers that read them (`columns.py`).

Scores stay what they are but for rounding. A layer is packed only where all that reads it is known: a tensor that is an
output, or is read by anything else than per-unit functions and layers, stays as it is. `compress` packs what it can;
`optimize` by sites of its plan, with stricter bounds, since nobody gives it labels to see a loss by.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.columns import pack_columns
from onnxrank.graphs import attribute
from onnxrank.network import Hidden, Network, Product, Single
from onnxrank.operators import Trait, operator, traits
from onnxrank.plans import LOOKUP, PACK

Floats = NDArray[np.float64]
UNITS, WEIGHTS, COLUMNS, LOOKUPS = 0, 1, 2, 3
"""What is packed at a layer or table: the units behind it, its own weights, columns, or lookups with others."""
TINY = 2.0**-50
"""Share of a layer's largest weight below which a weight is 0: it moves no sum by as much as rounding does."""
LEAST = 2.0**-100
"""Where no labels show a loss, weights must be below this as well: times an input of a million they are 1e-24."""
MOST = 1 << 24
"""Entries of a table that are looked at where nobody asked for anything to be given up."""
MOST_WEIGHTS = 1 << 28
"""Entries of all layers together above which that is not done at all: a model may be larger than memory."""
MOST_JOINED = 1 << 28
"""Bytes of a table above which it is not copied into another: that takes memory, and saves no more than a small one."""
LARGEST = 2.0**64
"""Inputs up to this must leave a unit finite that is dropped: 0 times infinity is no 0."""


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
class Packed:
    """What was packed at a layer.

    Attributes:
        index: The layer's node, by its place in the model as it was given.
        kind: `UNITS`, `WEIGHTS`, `COLUMNS` or `LOOKUPS`.
        name: The layer's name.
        count: How many.
    """

    index: int
    kind: int
    name: str
    count: int

    @property
    def rule(self) -> str:
        """The rule that does it."""
        return LOOKUP if self.kind == LOOKUPS else PACK

    def __str__(self) -> str:
        if self.kind == LOOKUPS:
            return f"{self.count} lookups are one in a joined table"
        if self.kind == UNITS:
            return f"{self.count} units behind {self.name} did nothing"
        if self.kind == COLUMNS:
            return f"{self.count} columns of {self.name} are constant or equal to others"
        return f"{self.count} weights of {self.name} are too small to be told from 0"


@dataclass(frozen=True)
class _Run:
    """What lies between a layer and those that read it.

    Attributes:
        nodes: Functions of one unit each, in order.
        readers: The layers behind them.
    """

    nodes: tuple[NodeProto, ...]
    readers: tuple[Product, ...]


def pack(net: Network) -> list[Packed]:
    """Packs away, in place, what does nothing, tables' weights included; says what."""
    return _packed(net, _tiny(net, None, np.inf), None, lambda *_: True)


def pack_at(net: Network, places: Collection[tuple[int, int]] | None = None) -> list[Packed]:
    """The same at some places only, and only what needs no labels to be seen to do nothing.

    Args:
        net: The model.
        places: Nodes, by their places in the model, each with what may be packed there; None for all.
    """
    if net.weights() > MOST_WEIGHTS:
        return []
    at = {id(n): k for k, n in enumerate(net.nodes)}
    free = places is None

    def allowed(kind: int, site: Single) -> bool:
        return free or (at[id(site.nodes[0])], kind) in (places or ())

    found = _tiny(net, MOST, LEAST)
    layers = {id(n) for p in net.products() for n in p.nodes} if found else set()
    tiny = [
        (site, bound)
        for site, bound in found
        if allowed(WEIGHTS, site) and all(_is_smooth(net, n.output[0], layers) for n in site.nodes)
    ]
    return _packed(net, tiny, MOST, allowed)


def hidden(net: Network) -> list[Hidden]:
    """The units behind every layer all readers of which are known, in the graph's order."""
    products = net.products()
    runs = [(p, _run(net, p, products)) for p in products]
    return [Hidden(p, run.readers) for p, run in runs if run is not None]


def drop_units(net: Network) -> None:
    """Packs units away, in place, and nothing else."""
    while _once(net, lambda _: True) is not None:
        pass


def _tiny(net: Network, most: int | None, least: float) -> list[tuple[Single, float]]:
    """Layers and tables with weights that are too small, and what these are below.

    Args:
        net: The model.
        most: Entries above which a table is not looked at.
        least: What such weights are below in any case; where that is finite, of floats only that have no more digits.
    """
    out = []
    sites: list[Single] = [*net.products(), *net.tables(most)]
    for site in sites:
        data = net.array(site.weight)
        assert data is not None
        if data.dtype != np.float32 and np.isfinite(least):
            continue
        size = np.abs(data)
        bound = min(least, TINY * float(size.max(initial=0)))
        if ((size > 0) & (size < bound)).any():
            out.append((site, bound))
    return out


def _packed(
    net: Network, tiny: Sequence[tuple[Single, float]], most: int | None, allowed: Callable[[int, Single], bool]
) -> list[Packed]:
    """Packs weights below their bounds, columns of tables of so many entries, and units, where that is allowed."""
    at = {id(n): k for k, n in enumerate(net.nodes)}
    out = []
    for site, bound in tiny:
        out.append(Packed(at[id(site.nodes[0])], WEIGHTS, site.name, _flush(net, site, bound)))
    for table, count in pack_columns(net, most, lambda t: allowed(COLUMNS, t)):
        out.append(Packed(at[id(table.nodes[0])], COLUMNS, table.name, count))
    found: dict[int, Packed] = {}
    while (units := _once(net, lambda p: allowed(UNITS, p))) is not None:
        site, count = units
        k = at[id(site.nodes[0])]
        before = found.get(k)
        found[k] = Packed(k, UNITS, site.name, count + (before.count if before else 0))
    return out + list(found.values())


def _is_smooth(net: Network, tensor: str, layers: Collection[int]) -> bool:
    """Whether a small difference stays small up to the next layers: nothing divides by it, normalises or compares.

    Args:
        net: The model.
        tensor: What may differ.
        layers: The nodes of layers, by their identity.
    """
    waiting, seen = [tensor], {tensor}
    while waiting:
        at = waiting.pop()
        if at in net.inner:
            return False
        for node in net.readers.get(at, []):
            if id(node) in layers and at not in node.input[1:]:
                continue
            if not traits(node) & (Trait.SMOOTH | Trait.MOVEMENT):
                return False
            waiting += [o for o in node.output if o not in seen]
            seen.update(node.output)
    return True


def _flush(net: Network, site: Single, bound: float) -> int:
    """Makes weights below a bound 0; returns how many there are."""
    data = net.array(site.weight)
    assert data is not None
    tiny = (data != 0) & (np.abs(data) < bound)
    name = net.constant(np.where(tiny, data.dtype.type(0), data), f"{site.weight}.flushed")
    for node in site.nodes:
        node.input[1 if isinstance(site, Product) else 0] = name
    net.renewed()
    return int(tiny.sum())


def _once(net: Network, allowed: Callable[[Product], bool]) -> tuple[Product, int] | None:
    """Packs one layer; the layer and how many units went, or None where there is none."""
    products = net.products()
    for site in products:
        run = _run(net, site, products) if allowed(site) else None
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
        if keep.all() or not _stay_finite(net, site, run, unread & ~keep):
            continue
        if constant.any():
            value = _constants(net, site, run)
            if value is None:
                continue
            for r in run.readers:
                net.shift(r, value[constant] @ net.matrix(r)[constant].astype(np.float64), "pack")
        for r in run.readers:
            net.set_matrix(r, net.matrix(r)[keep])
        net.set_matrix(site, weight[:, keep])
        _vectors(net, site, run, keep)
        net.resized([site.nodes[0].output[0], *(o for n in run.nodes for o in n.output)])
        return site, int((~keep).sum())
    return None


def _stay_finite(net: Network, site: Product, run: _Run, units: NDArray[np.bool_]) -> bool:
    """Whether units give finite numbers for all inputs that are not enormous."""
    value = LARGEST * np.abs(net.matrix(site)[:, units].astype(np.float64)).sum(axis=0)
    for node, place in _places(site, run):
        data = net.array(node.input[place])
        assert data is not None
        wide = np.broadcast_to(np.abs(data.astype(np.float64).reshape(-1)), len(units))[units]
        value = value * np.maximum(wide, 1) + wide
    return bool((value < np.finfo(net.matrix(site).dtype).max).all())


def _run(net: Network, site: Product, products: list[Product]) -> _Run | None:
    """What lies between a layer and those that read it, where that is all that does."""
    if len(site.nodes) != 1:
        return None
    first = site.nodes[0]
    if operator(first) == "Gemm" and len(first.input) > 2 and first.input[2]:
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
    if operator(node) in _UNARY:
        return True
    if operator(node) in _BINARY and node.input[0] != node.input[1]:
        place = _other(node, tensor)
        if operator(node) in ("Sub", "PRelu") and place == 0:
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
    if operator(first) == "Gemm" and len(first.input) > 2 and first.input[2]:
        bias = net.array(first.input[2])
        assert bias is not None
        value = np.broadcast_to(bias.astype(np.float64).reshape(-1), value.shape)
    tensor = first.output[0]
    for n in run.nodes:
        if operator(n) in _UNARY:
            value = _UNARY[operator(n)](value, n)
        else:
            other = net.array(n.input[_other(n, tensor)])
            assert other is not None
            value = _BINARY[operator(n)](value, other.astype(np.float64).reshape(-1))
        tensor = n.output[0]
    return value if np.isfinite(value).all() else None


def _places(site: Product, run: _Run) -> list[tuple[NodeProto, int]]:
    """Where constants per unit are read: the layer's own bias, and those of the functions behind it."""
    first = site.nodes[0]
    places = [(first, 2)] if operator(first) == "Gemm" and len(first.input) > 2 and first.input[2] else []
    tensor = first.output[0]
    for n in run.nodes:
        if operator(n) in _BINARY:
            places.append((n, _other(n, tensor)))
        tensor = n.output[0]
    return places


def _vectors(net: Network, site: Product, run: _Run, keep: NDArray[np.bool_]) -> None:
    """Cuts the constants per unit."""
    for node, place in _places(site, run):
        data = net.array(node.input[place])
        assert data is not None
        if data.size == len(keep) and data.size > 1:
            node.input[place] = net.constant(data[..., keep], f"{node.output[0]}.packed")
    net.renewed()
