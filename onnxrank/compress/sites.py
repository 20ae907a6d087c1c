"""Places of a model where something can be done, by name, and what they consist of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from onnxrank.compress.method import LEAST_WIDTH
from onnxrank.network import Hidden, Joint, Layer, Network, Product, Site, Table
from onnxrank.packing import hidden

Floats = NDArray[np.float64]


def named(net: Network) -> dict[str, Site]:
    """All sites of a model by name: tables, layers, layers that share what they read, and units between layers."""
    several: list[Site] = [*net.tables(), *net.products(), *net.joints(LEAST_WIDTH), *hidden(net)]
    return {s.name: s for s in several}


def parts(site: Site) -> tuple[str, ...]:
    """Names of the tables, units or layers that a site consists of."""
    return (site.name,) if isinstance(site, (Table, Hidden)) else tuple(p.name for p in site.members)


def gemm_bias(net: Network, site: Layer) -> Floats | None:
    """The bias within a layer's nodes, where they have one and the same; None where they have none."""
    several = [_gemm_bias(net, p) for p in site.members]
    if all(b is None for b in several):
        return None
    return np.concatenate(
        [np.zeros(p.shape[1]) if b is None else b for p, b in zip(site.members, several, strict=True)]
    )


def _gemm_bias(net: Network, site: Product) -> Floats | None:
    for node in site.nodes:
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
            data = net.array(node.input[2])
            if data is not None:
                return np.broadcast_to(data.astype(np.float64).reshape(-1), (site.shape[1],))
    return None


def layer(site: Site) -> Layer:
    """A site that is a layer."""
    assert not isinstance(site, (Table, Hidden))
    return site


def renewed(site: Site) -> Site:
    """A site whose weights may be others by now."""
    if isinstance(site, Product):
        return replace(site, weight=site.nodes[0].input[1])
    if isinstance(site, Joint):
        return Joint(tuple(replace(p, weight=p.nodes[0].input[1]) for p in site.members))
    return site
