"""Layers of low rank: two factors in the place of a matrix, as they are nearest on the calibration rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.compress.method import ENERGIES, LEAST_SAVING, LEAST_WIDTH, Method, Refused
from onnxrank.compress.statistics import Fitted, Moments, Statistics
from onnxrank.network import Joint, Layer, Network, Product, Site

Floats = NDArray[np.float64]


def subspace(moments: Moments) -> tuple[Floats, Floats]:
    """Eigenvalues of a covariance, largest first and none below 0, and the eigenvectors as columns."""
    values, vectors = np.linalg.eigh(moments.covariance)
    return np.maximum(values[::-1], 0.0), vectors[:, ::-1]


def break_even(shape: tuple[int, int]) -> int:
    """The largest rank at which two factors are worth it."""
    inner, outer = shape
    return int(LEAST_SAVING * inner * outer / (inner + outer))


def ranks(values: Floats, most: int) -> list[int]:
    """Ranks that keep so much of a spectrum, the largest first, none above `most`."""
    total = float(values.sum())
    if total <= 0 or most < 1:
        return []
    kept = np.cumsum(values) / total
    found = {int(np.searchsorted(kept, e)) + 1 for e in ENERGIES}
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


LOW_RANK = Method(
    "low-rank",
    "x W + b -> (x W U) U^T + U U^T b + (I - U U^T) E[y], U the leading eigenvectors of Cov(y); of layers that "
    "read the same tensor W = [W_1 W_2 ...], so that x W U is made once",
    "atomic feature mimicking (arXiv 2405.18146) without its ReLU: of all layers of rank k that with the least "
    "mean square error on the calibration rows",
    False, False, (Product, Joint), _low_rank_offers, _low_rank, _low_rank_error,
)  # fmt: skip
