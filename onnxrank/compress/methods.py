"""The ways to make a layer or a table smaller: what each computes, where it comes from, and when it is left alone.

A method changes a site of a `Network` by a parameter and returns the sites that it leaves behind, so that methods can
follow each other: the two factors of a layer may be kept in fewer bytes again. Everything is standard ONNX, but for
what a method asks to be allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.columns import fold
from onnxrank.compress import units
from onnxrank.compress.statistics import Fitted, Moments, Needed, Statistics
from onnxrank.network import Hidden, Joint, Layer, Network, Product, Single, Site, Table, made_by

Floats = NDArray[np.float64]
_LEAST_SAVING = 0.95
"""Share of a layer's entries at which factors are not worth a further product."""
_ENERGIES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.9995)
LEAST_WIDTH = 8
"""Inputs or outputs below which a layer has no rank to lose."""
_LARGEST_HALF = 65504.0
_TABLE = 127
_LAYER = 63
"""Largest whole numbers. Two products of 255 and 63 fit into 16 bits, so that no kernel of any processor saturates."""
_SMALL = 256
"""Entries of a constant below which fewer bytes are not worth a node."""


class Refused(Exception):
    """A method leaves a site alone; the message says why."""


@dataclass(frozen=True)
class Method:
    """One way to make sites smaller.

    Attributes:
        name: What `--methods` calls it.
        identity: What it computes instead.
        source: Where it comes from.
        exact: Whether scores stay what they are but for rounding.
        contrib: Whether it needs operators of onnxruntime's own.
        takes: The kind of site, or kinds.
        offers: Parameters worth trying at a site, the mildest first; raises `Refused`.
        apply: Changes the site by a parameter and returns the sites left behind; raises `Refused`.
        error: Estimates the relative distance of what the site gives: root of the mean square over that of its spread.
    """

    name: str
    identity: str
    source: str
    exact: bool
    contrib: bool
    takes: type[Site] | tuple[type[Site], ...]
    offers: Callable[[Network, Any, Statistics], Sequence[int]]
    apply: Callable[[Network, Any, int, Statistics], list[Site]]
    error: Callable[[Network, Any, int, Statistics], float]


# --- low rank -----------------------------------------------------------------------------------------------------


def subspace(moments: Moments) -> tuple[Floats, Floats]:
    """Eigenvalues of a covariance, largest first and none below 0, and the eigenvectors as columns."""
    values, vectors = np.linalg.eigh(moments.covariance)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def break_even(shape: tuple[int, int]) -> int:
    """The largest rank at which two factors are worth it."""
    inner, outer = shape
    return int(_LEAST_SAVING * inner * outer / (inner + outer))


def ranks(values: Floats, most: int) -> list[int]:
    """Ranks that keep so much of a spectrum, the largest first, none above `most`."""
    total = float(values.sum())
    if total <= 0 or most < 1:
        return []
    kept = np.cumsum(values) / total
    found = {int(np.searchsorted(kept, e)) + 1 for e in _ENERGIES}
    # Kernels work on groups of columns: what lies between two of them costs as much as the next.
    step = 8 if most >= 32 else 4 if most >= 8 else 1
    found = {min(most, -(-k // step) * step) for k in found}
    return sorted((k for k in found if k >= 1), reverse=True)


def _low_rank_offers(net: Network, site: Layer, stats: Statistics) -> Sequence[int]:
    inner, outer = site.shape
    if min(site.shape) < LEAST_WIDTH:
        raise Refused(f"a layer of {inner} x {outer} has no rank to lose")
    if isinstance(site, Joint) and not site.wide:
        raise Refused(f"its layers read {inner} columns and give {outer}, too few to be worth one basis for all")
    found = ranks(subspace(_moments(site, stats))[0], break_even(site.shape))
    if not found:
        raise Refused("what it gives does not vary over the calibration rows")
    return found


def _low_rank(net: Network, site: Layer, rank: int, stats: Statistics) -> list[Site]:
    """`y' = ((x - 0) W U) U^T + (I - U U^T) mean(y)`, U the leading eigenvectors of Cov(y).

    Of layers that read the same tensors y is what they give side by side, and `x W U` is made once for all.
    """
    return factor(net, site, fitted(net, site, rank, stats), "low-rank")


def fitted(net: Network, site: Layer, rank: int, stats: Statistics) -> Fitted:
    """A layer of low rank: as it was fitted to what the compressed model sees, else by the moments of what it gives.

    Raises:
        Refused: There is no such rank, or no calibration row.
    """
    if not 1 <= rank <= min(site.shape):
        raise Refused(f"a layer of {site.shape[0]} x {site.shape[1]} has no rank {rank}")
    found = stats.maps.get(site.name)
    if found is not None and found.rank == rank:
        first = found.first.copy()
        first[(net.matrix(site) == 0).all(axis=1)] = 0  # units that are gone stay so
        return replace(found, first=first)
    moments = _moments(site, stats)
    basis = subspace(moments)[1][:, :rank]
    shift = moments.mean - basis @ (basis.T @ moments.mean)
    return Fitted(rank, net.matrix(site).astype(np.float64) @ basis, basis.T, shift)


def factor(net: Network, site: Layer, how: Fitted, method: str) -> list[Site]:
    """Puts `(x A) B + shift`, with a ReLU between the two if asked for, in the place of `x W`; the bias stays.

    Args:
        net: The model.
        site: The layer; of a `Joint` every layer has its own columns of B, and `x A` is made once.
        how: The factors, and what is added.
        method: What the nodes say made them.

    Returns:
        The first factor, and the second one of every layer.
    """
    inner, rank = how.first.shape
    first = net.constant(how.first.astype(_kind(net, site.members[0])), f"{site.members[0].weight}.0")
    ends = np.cumsum([p.shape[1] for p in site.members])[:-1]
    parts = list(zip(np.split(how.second, ends, axis=1), np.split(how.shift, ends), strict=True))
    seconds = [
        net.constant(part.astype(_kind(net, p)), f"{p.weight}.1")
        for p, (part, _) in zip(site.members, parts, strict=True)
    ]
    place = {id(n): k for k, n in enumerate(net.nodes)}
    low: list[NodeProto] = []
    high: list[list[NodeProto]] = [[] for _ in site.members]
    for nodes in zip(*(p.nodes for p in site.members), strict=True):
        before, given = _first(net, nodes[0], first, how.lift, method)
        low.append(before[0])
        for k in sorted(range(len(nodes)), key=lambda k: place[id(nodes[k])]):  # what all read comes before the first
            high[k].append(_second(net, nodes[k], before, given, seconds[k], parts[k][1], method))
            before = []
    return [
        Product(f"{site.name}.0", first, (inner, rank), tuple(low), False),
        *(
            Product(f"{site.name}.{k + 1}", name, (rank, p.shape[1]), tuple(made), False)
            for k, (p, name, made) in enumerate(zip(site.members, seconds, high, strict=True))
        ),
    ]


def _kind(net: Network, site: Product) -> np.dtype[Any]:
    data = net.array(site.weight)
    assert data is not None
    return data.dtype


def _first(net: Network, node: NodeProto, weight: str, lift: Floats | None, method: str) -> tuple[list[NodeProto], str]:
    """The nodes of a first factor, with a ReLU behind it where there is something to lift, and what they give."""
    low = net.fresh(f"{node.output[0]}.low")
    made = [net.node(method, "MatMul", [node.input[0], weight], [low])]
    if lift is None:
        return made, low
    lifted, bent = (net.fresh(f"{node.output[0]}.{part}") for part in ("lifted", "bent"))
    data = net.array(weight)
    assert data is not None
    constant = net.constant(lift.astype(data.dtype), f"{node.output[0]}.lift")
    made += [net.node(method, "Add", [low, constant], [lifted]), net.node(method, "Relu", [lifted], [bent])]
    return made, bent


def _second(
    net: Network, node: NodeProto, before: Sequence[NodeProto], given: str, weight: str, shift: Floats, method: str
) -> NodeProto:
    """Puts a second factor in the place of a product, behind other nodes, with what is added to it."""
    data = net.array(weight)
    assert data is not None
    kind, width = data.dtype, len(shift)
    if node.op_type != "Gemm":
        held = net.bias(node, width)
        made = net.node(method, "MatMul", [given, weight], [node.output[0]])
        net.replace(node, [*before, made])
        if held is not None:
            old = net.array(held.node.input[held.place])
            assert old is not None
            net.set_bias(held, old.astype(np.float64).reshape(-1) + shift)
        elif np.abs(shift).max() > 0:
            net.add_bias(made, shift.astype(kind), method)
        return made
    added = node.input[2] if len(node.input) > 2 else ""
    bias = net.array(added) if added else np.zeros(width, kind)
    several = list(before)
    if bias is not None:
        total = (bias.astype(np.float64).reshape(-1) + shift).astype(kind)
        vector = net.constant(np.broadcast_to(total, (width,)), f"{node.output[0]}.bias")
    else:  # what is added is computed, for one row as a rule
        vector = net.fresh(f"{node.output[0]}.shifted")
        constant = net.constant(shift.astype(kind), f"{node.output[0]}.shift")
        several.append(net.node(method, "Add", [added, constant], [vector]))
    made = net.node(method, "Gemm", [given, weight, vector], [node.output[0]])
    net.replace(node, [*several, made])
    return made


def _low_rank_error(net: Network, site: Layer, rank: int, stats: Statistics) -> float:
    values = subspace(_moments(site, stats))[0]
    return math.sqrt(float(values[rank:].sum()) / (float(values.sum()) or 1.0))


def _moments(site: Layer, stats: Statistics) -> Moments:
    found = stats.products.get(site.name)
    if found is None or found.count < 2:
        raise Refused("no calibration row reached it")
    return found


# --- fewer units --------------------------------------------------------------------------------------------------


def _units_offers(net: Network, site: Hidden, stats: Statistics) -> Sequence[int]:
    found = _needed(site, stats)
    return units.counts(found.lost, [1 - e for e in _ENERGIES], int(_LEAST_SAVING * site.width))


def _fewer_units(net: Network, site: Hidden, kept: int, stats: Statistics) -> list[Site]:
    """`x_S C_SS^-1 C_S W` and a constant, S the units that are needed most, C the covariance of all."""
    if not 1 <= kept <= site.width:
        raise Refused(f"there are {site.width} units, and not {kept}")
    found = _needed(site, stats)
    units.keep(net, site, found.order[:kept], found.moments)
    return []


def _units_error(net: Network, site: Hidden, kept: int, stats: Statistics) -> float:
    return math.sqrt(float(_needed(site, stats).lost[kept]))


def _needed(site: Hidden, stats: Statistics) -> Needed:
    if site.width < LEAST_WIDTH:
        raise Refused(f"there are {site.width} units only")
    if site.width > units.MOST:
        raise Refused(f"among {site.width} units those that are needed least take too long to find")
    found = stats.hidden.get(site.name)
    if found is None or found.moments.count < 2:
        raise Refused("no calibration row reached them")
    return found


# --- fewer bytes --------------------------------------------------------------------------------------------------


def _half_offers(net: Network, site: Single, stats: Statistics) -> Sequence[int]:
    data = net.array(site.weight)
    assert data is not None
    if data.size < _SMALL:
        raise Refused(f"{data.size} entries are too few to be worth a node")
    if np.abs(data).max(initial=0) > _LARGEST_HALF:
        raise Refused("entries beyond 65504 do not fit into 16 bits")
    return [0]


def _half_table(net: Network, site: Table, _: int, stats: Statistics) -> list[Site]:
    """`Cast(Gather(half(D), ids))`."""
    data = net.array(site.weight)
    assert data is not None
    name = net.constant(data.astype(np.float16), f"{site.weight}.half")
    for node in site.nodes:
        inner = net.fresh(f"{node.output[0]}.half")
        look = net.node("fp16-tables", "Gather", [name, node.input[1]], [inner], axis=0)
        net.replace(node, [look, net.node("fp16-tables", "Cast", [inner], node.output, to=_type(data))])
    return []


def _half_layer(net: Network, site: Product, _: int, stats: Statistics) -> list[Site]:
    """`x Cast(half(W))`; onnxruntime casts once, when the model is loaded."""
    data = net.array(site.weight)
    assert data is not None
    name = net.constant(data.astype(np.float16), f"{site.weight}.half")
    wide = net.fresh(f"{site.weight}.wide")
    for k, node in enumerate(site.nodes):
        made = _copied(node)
        made.input[1] = wide
        net.replace(node, [*([net.node("fp16", "Cast", [name], [wide], to=_type(data))] if k == 0 else []), made])
    return []


def _copied(node: NodeProto) -> NodeProto:
    made = NodeProto()
    made.CopyFrom(node)
    return made


def _half_error(net: Network, site: Single, _: int, stats: Statistics) -> float:
    data = net.array(site.weight)
    assert data is not None
    return _distance(data, data.astype(np.float16), _weights(site, stats))


def _int8_table_offers(net: Network, site: Table, stats: Statistics) -> Sequence[int]:
    data = net.array(site.weight)
    assert data is not None
    if data.size < _SMALL or site.shape[0] < 32:
        raise Refused(f"{site.shape[0]} rows are too few to be worth scales")
    if net.opset < 13:
        raise Refused(f"scales per column need opset 13, and the model has {net.opset}")
    return [0]


def column_scales(data: NDArray[Any], most: int) -> NDArray[np.float32]:
    """Scales of symmetric whole numbers up to `most` per column: of a few clippings the one with the least error."""
    largest = np.abs(data).max(axis=0).astype(np.float64)
    largest[largest == 0] = 1.0
    best, least = largest / most, np.full(largest.shape, np.inf)
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7):
        scale = share * largest / most
        off = ((np.clip(np.rint(data / scale), -most, most) * scale - data) ** 2).sum(axis=0)
        best, least = np.where(off < least, scale, best), np.minimum(least, off)
    return np.asarray(best.astype(np.float32))


def _quantised(data: NDArray[Any], scales: NDArray[np.float32], most: int) -> NDArray[np.int8]:
    return np.clip(np.rint(data / scales), -most, most).astype(np.int8)


def _int8_table(net: Network, site: Table, _: int, stats: Statistics) -> list[Site]:
    """`DequantizeLinear(Gather(int8(D), ids))`, a scale per column."""
    data = net.array(site.weight)
    assert data is not None
    if data.dtype != np.float32:
        raise Refused(f"a table of {data.dtype} is not quantised")
    scales = column_scales(data, _TABLE)
    name = net.constant(_quantised(data, scales, _TABLE), f"{site.weight}.int8")
    scale = net.constant(scales, f"{site.weight}.scale")
    zero = net.constant(np.zeros(site.shape[1], np.int8), f"{site.weight}.zero")
    for node in site.nodes:
        inner = net.fresh(f"{node.output[0]}.int8")
        look = net.node("int8-tables", "Gather", [name, node.input[1]], [inner], axis=0)
        axis = stats.depth(node.input[1])
        if axis is None:
            raise Refused("the number of axes of its ids is not known")
        wide = net.node("int8-tables", "DequantizeLinear", [inner, scale, zero], node.output, axis=axis)
        net.replace(node, [look, wide])
    return []


def _int8_table_error(net: Network, site: Table, _: int, stats: Statistics) -> float:
    data = net.array(site.weight)
    assert data is not None
    scales = column_scales(data, _TABLE)
    return _distance(data, _quantised(data, scales, _TABLE) * scales, _weights(site, stats))


def _int8_offers(net: Network, site: Product, stats: Statistics) -> Sequence[int]:
    if site.shape[0] * site.shape[1] < 16 * _SMALL:
        raise Refused(f"a layer of {site.shape[0]} x {site.shape[1]} is too small to gain from whole numbers")
    data = net.array(site.weight)
    assert data is not None
    if data.dtype != np.float32:
        raise Refused(f"weights of {data.dtype} are not quantised")
    return [0]


def _int8(net: Network, site: Product, _: int, stats: Statistics) -> list[Site]:
    """`s_x (q(x) - z_x) q(W) s_W`: inputs quantised as they come, weights once, a scale per output."""
    weight = net.matrix(site)
    scales = column_scales(weight, _LAYER)
    name = net.constant(_quantised(weight, scales, _LAYER), f"{site.weight}.int8")
    scale = net.constant(scales, f"{site.weight}.scale")
    shared: dict[str, list[str]] = {}
    for node in site.nodes:
        y = node.output[0]
        made = []
        if node.input[0] not in shared:
            parts = [net.fresh(f"{y}.{part}") for part in ("q", "step", "zero")]
            shared[node.input[0]] = parts
            made.append(net.node("int8", "DynamicQuantizeLinear", [node.input[0]], parts))
        q, step, zero = shared[node.input[0]]
        whole, wide, both, plain = (net.fresh(f"{y}.{part}") for part in ("whole", "wide", "scale", "plain"))
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] else ""
        made += [
            net.node("int8", "MatMulInteger", [q, name, zero], [whole]),
            net.node("int8", "Cast", [whole], [wide], to=1),
            net.node("int8", "Mul", [step, scale], [both]),
            net.node("int8", "Mul", [wide, both], [plain if bias else y]),
        ]
        if bias:
            made.append(net.node("int8", "Add", [plain, bias], [y]))
        net.replace(node, made)
    return []


def _int8_fused(net: Network, site: Product, _: int, stats: Statistics) -> list[Site]:
    """The same as one operator of onnxruntime's own."""
    weight = net.matrix(site)
    scales = column_scales(weight, _LAYER)
    name = net.constant(_quantised(weight, scales, _LAYER), f"{site.weight}.int8")
    scale = net.constant(scales, f"{site.weight}.scale")
    zero = net.constant(np.zeros(site.shape[1], np.int8), f"{site.weight}.zero")
    net.uses("com.microsoft", 1)
    for node in site.nodes:
        given = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
        bias = net.array(given) if given else None
        y = node.output[0]
        held = [given] if bias is not None and bias.shape == (site.shape[1],) else []
        plain = net.fresh(f"{y}.plain") if given and not held else y
        operands = [node.input[0], name, scale, zero, *held]
        made = [net.node("int8-fused", "DynamicQuantizeMatMul", operands, [plain], domain="com.microsoft")]
        if plain != y:
            made.append(net.node("int8-fused", "Add", [plain, given], [y]))
        net.replace(node, made)
    return []


def _int8_error(net: Network, site: Product, _: int, stats: Statistics) -> float:
    weight = net.matrix(site).astype(np.float64)
    scales = column_scales(weight, _LAYER)
    off = _quantised(weight, scales, _LAYER) * scales.astype(np.float64) - weight
    # Inputs are rounded to a 255th of their range, which a few outliers set: a percent, more or less.
    return math.sqrt(float((off**2).sum() / (weight**2).sum() or 1.0) + 1e-4)


# --- fewer columns ------------------------------------------------------------------------------------------------


def _table_moments(net: Network, site: Table, stats: Statistics) -> Moments:
    data = net.array(site.weight)
    assert data is not None
    counts = stats.lookups.get(site.name)
    if counts is None or counts.sum() < 2:
        raise Refused("no calibration row looks it up")
    return Moments.of(data.astype(np.float64), counts.astype(np.float64))


def _pca_offers(net: Network, site: Table, stats: Statistics) -> Sequence[int]:
    rows, width = site.shape
    if width < 4 or rows <= 4 * width:
        raise Refused(f"{rows} x {width} entries are not worth a product behind the lookup")
    values = subspace(_table_moments(net, site, stats))[0]
    most = int((_LEAST_SAVING * rows * width - width) / (rows + width))
    return [k for k in dict.fromkeys(ranks(values, most)) if k < width]


def _pca(net: Network, site: Table, rank: int, stats: Statistics) -> list[Site]:
    """`Gather((D - mean) U, ids) U^T + mean` over looked-up rows, U the leading eigenvectors of their covariance."""
    data = net.array(site.weight)
    assert data is not None
    moments = _table_moments(net, site, stats)
    if not 1 <= rank <= site.shape[1]:
        raise Refused(f"a table of width {site.shape[1]} has no rank {rank}")
    basis = subspace(moments)[1][:, :rank]
    name = net.constant(((data - moments.mean) @ basis).astype(data.dtype), f"{site.weight}.pca")
    back = net.constant(basis.T.astype(data.dtype), f"{site.weight}.back")
    mean = net.constant(moments.mean.astype(data.dtype), f"{site.weight}.mean")
    made = []
    for node in site.nodes:
        low, plain = net.fresh(f"{node.output[0]}.low"), net.fresh(f"{node.output[0]}.plain")
        look = net.node("pca-tables", "Gather", [name, node.input[1]], [low], axis=0)
        made.append(look)
        net.replace(
            node,
            [
                look,
                net.node("pca-tables", "MatMul", [low, back], [plain]),
                net.node("pca-tables", "Add", [plain, mean], node.output),
            ],
        )
    return [Table(f"{site.name}.0", name, (site.shape[0], rank), tuple(made))]


def fold_pca(net: Network) -> dict[str, list[str]]:
    """Folds the products behind tables of fewer columns into the layers behind these, wherever that can be done.

    It comes last: what is done to layers is told by what they read before.

    Returns:
        Per lookup, by the name of what it gave, the inputs of the layers that read it.
    """
    out = {}
    for node in [n for n in net.nodes if n.op_type == "MatMul" and made_by(n, "pca-tables")]:
        after = net.alone(node.output[0])
        back = net.array(node.input[1])
        mean = None if after is None else net.array(after.input[1])
        if after is None or back is None or mean is None:
            continue
        layers = fold(net, after.output[0], node.input[0], back, mean, "pca-tables")
        if layers:
            out[after.output[0]] = layers
            net.nodes = [n for n in net.nodes if n is not node and n is not after]
            net.renewed()
    return out


def _pca_error(net: Network, site: Table, rank: int, stats: Statistics) -> float:
    values = subspace(_table_moments(net, site, stats))[0]
    return math.sqrt(float(values[rank:].sum()) / (float(values.sum()) or 1.0))


def _sparse_offers(net: Network, site: Table, stats: Statistics) -> Sequence[int]:
    """As many entries per row as the fullest row has; what was not trained to be sparse is not made so."""
    data = net.array(site.weight)
    assert data is not None
    width = site.shape[1]
    most = int((data != 0).sum(1).max(initial=0))
    if not 1 <= most <= width // 4 or width > 256:
        raise Refused(f"its fullest row holds {most} of {width} entries; a quarter at most is worth positions")
    if net.opset < 11:
        raise Refused("ScatterElements needs opset 11")
    return [most]


def _sparse(net: Network, site: Table, kept: int, stats: Statistics) -> list[Site]:
    """The `kept` largest entries of each row and their positions: two lookups, scattered into zeros."""
    data = net.array(site.weight)
    assert data is not None
    width = site.shape[1]
    places = np.sort(np.argsort(-np.abs(data), axis=1, kind="stable")[:, :kept], axis=1)
    values = net.constant(np.take_along_axis(data, places, 1).astype(np.float16), f"{site.weight}.values")
    where = net.constant(places.astype(np.uint8), f"{site.weight}.places")
    for node in site.nodes:
        y = node.output[0]
        parts = ("values", "wide", "places", "index", "shape", "last", "all", "zeros")
        v, wide, p, index, shape, last, whole, zeros = (net.fresh(f"{y}.{part}") for part in parts)
        first = net.constant(np.array([width], np.int64), f"{y}.width")
        none = net.constant(np.zeros((), data.dtype), f"{y}.none")
        net.replace(
            node,
            [
                net.node("sparse-tables", "Gather", [values, node.input[1]], [v], axis=0),
                net.node("sparse-tables", "Cast", [v], [wide], to=_type(data)),
                net.node("sparse-tables", "Gather", [where, node.input[1]], [p], axis=0),
                net.node("sparse-tables", "Cast", [p], [index], to=7),
                net.node("sparse-tables", "Shape", [node.input[1]], [shape]),
                net.node("sparse-tables", "Concat", [shape, first], [whole], axis=0),
                net.node("sparse-tables", "Expand", [none, whole], [zeros]),
                net.node("sparse-tables", "ScatterElements", [zeros, index, wide], [y], axis=-1),
            ],
        )
        del last
    return []


def _sparse_error(net: Network, site: Table, kept: int, stats: Statistics) -> float:
    data = net.array(site.weight)
    assert data is not None
    places = np.argsort(-np.abs(data), axis=1, kind="stable")[:, :kept]
    made = np.zeros_like(data)
    np.put_along_axis(made, places, np.take_along_axis(data, places, 1).astype(np.float16), 1)
    return _distance(data, made, _weights(site, stats))


# --- what they share ----------------------------------------------------------------------------------------------


def _type(data: NDArray[Any]) -> int:
    return 11 if data.dtype == np.float64 else 1


def _weights(site: Single, stats: Statistics) -> NDArray[np.float64] | None:
    """How often each row of a table was looked up; None for layers."""
    counts = stats.lookups.get(site.name) if isinstance(site, Table) else None
    return None if counts is None or not counts.sum() else counts.astype(np.float64)


def _distance(data: NDArray[Any], made: NDArray[Any], weights: NDArray[np.float64] | None) -> float:
    """Root mean square of a difference over that of the data about its mean, rows by weight."""
    by = np.ones(len(data)) if weights is None else weights
    off = by @ ((made.astype(np.float64) - data) ** 2)
    about = by @ ((data - np.average(data, axis=0, weights=by)) ** 2)
    return math.sqrt(float(off.sum()) / (float(about.sum()) or 1.0))


METHODS: Mapping[str, Method] = {
    m.name: m
    for m in (
        Method(
            "fp16-tables",
            "D[id] -> float(half(D)[id])",
            "half precision, rounded once; half the bytes at the same time",
            False, False, Table, _half_offers, _half_table, _half_error,
        ),
        Method(
            "low-rank",
            "x W + b -> (x W U) U^T + U U^T b + (I - U U^T) E[y], U the leading eigenvectors of Cov(y); of layers that "
            "read the same tensor W = [W_1 W_2 ...], so that x W U is made once",
            "atomic feature mimicking (arXiv 2405.18146) without its ReLU: of all layers of rank k that with the least "
            "mean square error on the calibration rows",
            False, False, (Product, Joint), _low_rank_offers, _low_rank, _low_rank_error,
        ),
        Method(
            "units",
            "x W -> x_S C_SS^-1 C_S W and a constant, S the units that are needed most, C their covariance",
            "optimal brain surgeon (Hassibi and Stork, 1993) on what the next layers give, a unit at a time; the units "
            "are packed away",
            False, False, Hidden, _units_offers, _fewer_units, _units_error,
        ),
        Method(
            "int8-tables",
            "D[id] -> s * int8(D / s)[id], a scale per column",
            "linear quantisation, DequantizeLinear behind the lookup; a quarter of the bytes",
            False, False, Table, _int8_table_offers, _int8_table, _int8_table_error,
        ),
        Method(
            "int8",
            "x W -> s_x s_W (q(x) - z) q(W), inputs quantised as they come, weights with a scale per output",
            "dynamic quantisation, which onnxruntime fuses into DynamicQuantizeMatMul",
            False, False, Product, _int8_offers, _int8, _int8_error,
        ),
        Method(
            "int8-fused",
            "x W -> s_x s_W (q(x) - z) q(W), by DynamicQuantizeMatMul of com.microsoft",
            "as int8, for runtimes that do not fuse it: one operator of onnxruntime's own",
            False, True, Product, _int8_offers, _int8_fused, _int8_error,
        ),
        Method(
            "fp16",
            "W -> float(half(W)), cast when the model is loaded",
            "half precision in the file only: half the bytes, the same time",
            False, False, Product, _half_offers, _half_layer, _half_error,
        ),
        Method(
            "pca-tables",
            "D[id] -> ((D - mean) U)[id] U^T + mean, U the leading eigenvectors over looked-up rows",
            "arXiv 2405.18146, embedding tables",
            False, False, Table, _pca_offers, _pca, _pca_error,
        ),
        Method(
            "sparse-tables",
            "the k entries of each row that are not 0, and their positions",
            "tables trained with k entries per row (arXiv 2402.02855)",
            False, False, Table, _sparse_offers, _sparse, _sparse_error,
        ),
    )
}  # fmt: skip
"""All methods that choose a format or rank for a site; `pack`, which needs no choice, is in `packing.py`."""

MIXING = frozenset({"int8", "int8-fused"})
"""Methods by which a score depends a little on the other rows of a run: inputs are rounded in the range of them all."""
