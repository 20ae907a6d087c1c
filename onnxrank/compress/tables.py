"""Tables of fewer columns: their principal components, or the few entries of each row that are not 0."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from onnxrank.columns import fold
from onnxrank.compress.low_rank import ranks, subspace
from onnxrank.compress.method import LEAST_SAVING, Method, Refused, distance, float_type, lookups
from onnxrank.compress.statistics import Moments, Statistics
from onnxrank.network import Network, Site, Table, made_by


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
    most = int((LEAST_SAVING * rows * width - width) / (rows + width))
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
                net.node("sparse-tables", "Cast", [v], [wide], to=float_type(data)),
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
    return distance(data, made, lookups(site, stats))


PCA_TABLES = Method(
    "pca-tables",
    "D[id] -> ((D - mean) U)[id] U^T + mean, U the leading eigenvectors over looked-up rows",
    "arXiv 2405.18146, embedding tables",
    False, False, Table, _pca_offers, _pca, _pca_error,
)  # fmt: skip

SPARSE_TABLES = Method(
    "sparse-tables",
    "the k entries of each row that are not 0, and their positions",
    "tables trained with k entries per row (arXiv 2402.02855)",
    False, False, Table, _sparse_offers, _sparse, _sparse_error,
)  # fmt: skip
