"""Fewer units between two layers: those that the next layers need least go, and the others make up for them.

What the next layers give is `x W`. With the units S alone the best that they can give, over the calibration rows, is
`x_S C_SS^-1 C_S W` and a constant, C the covariance of x. Units are taken away one by one, each time the one by which
that loses least: with P the inverse of C over those that are left, and W as it is fitted then, `|W_j|^2 / P_jj` for
unit j (optimal brain surgeon, Hassibi and Stork, 1993, on the outputs of a layer).

A method only makes weights 0, so that whatever else is done at these layers finds them as they were; `packing` takes
the units out of the model behind everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from onnxrank.compress.method import ENERGIES, LEAST_SAVING, LEAST_WIDTH, Method, Refused
from onnxrank.compress.statistics import Moments, Needed, Statistics
from onnxrank.network import Hidden, Network, Site

Floats = NDArray[np.float64]
_RIDGE = 1e-8
"""Added to the variance of every unit, relative to the mean variance."""
MOST = 2048
"""Units above which the order in which they go takes too long to find."""


def needed(matrix: Floats, moments: Moments) -> Needed:
    """Orders units by how much they are needed.

    Args:
        matrix: The weights of the next layers side by side, `[units, outputs]`.
        moments: Of what these read.
    """
    inverse, left = np.linalg.inv(_covariance(moments)), matrix.copy()
    whole = float(np.einsum("io,ij,jo->", matrix, moments.covariance, matrix)) or 1.0
    here = np.arange(len(matrix))
    gone: list[int] = []
    lost = [0.0]
    while len(here):
        costs = (left**2).sum(axis=1) / np.diag(inverse)
        j = int(costs.argmin())
        gone.append(int(here[j]))
        lost.append(lost[-1] + float(costs[j]) / whole)
        others = np.arange(len(here)) != j
        column = inverse[:, j] / inverse[j, j]
        left = (left - np.outer(column, left[j]))[others]
        inverse = (inverse - np.outer(column, inverse[j]))[np.ix_(others, others)]
        here = here[others]
    return Needed(moments, np.array(gone[::-1], np.int64), np.array(lost[::-1]))


def keep(net: Network, site: Hidden, units: NDArray[np.int64], moments: Moments) -> None:
    """Has the next layers read some units alone, and give as nearly what they gave as they can."""
    kept = np.sort(units)
    spread = _covariance(moments)
    for layer in site.readers:
        before = net.matrix(layer)
        made = np.zeros(before.shape)
        made[kept] = np.linalg.solve(spread[np.ix_(kept, kept)], spread[kept] @ before.astype(np.float64))
        net.shift(layer, moments.mean @ (before - made), "units")
        net.set_matrix(layer, made.astype(before.dtype))


def counts(lost: Floats, shares: Sequence[float], most: int) -> list[int]:
    """Numbers of units that lose so much at most, the largest first, none above `most`."""
    found = [int(np.flatnonzero(lost <= share)[0]) for share in shares]
    step = 8 if most >= 32 else 4 if most >= 8 else 1  # kernels work on groups of columns
    rounded = {-(-max(k, 1) // step) * step for k in found}
    return sorted((k for k in rounded if k <= most), reverse=True)


def _covariance(moments: Moments) -> Floats:
    made = moments.covariance
    made[np.diag_indices_from(made)] += _RIDGE * float(np.trace(made)) / len(made) + 1e-12
    return made


def _units_offers(net: Network, site: Hidden, stats: Statistics) -> Sequence[int]:
    found = _needed(site, stats)
    return counts(found.lost, [1 - e for e in ENERGIES], int(LEAST_SAVING * site.width))


def _fewer_units(net: Network, site: Hidden, kept: int, stats: Statistics) -> list[Site]:
    """`x_S C_SS^-1 C_S W` and a constant, S the units that are needed most, C the covariance of all."""
    if not 1 <= kept <= site.width:
        raise Refused(f"there are {site.width} units, and not {kept}")
    found = _needed(site, stats)
    keep(net, site, found.order[:kept], found.moments)
    return []


def _units_error(net: Network, site: Hidden, kept: int, stats: Statistics) -> float:
    return math.sqrt(float(_needed(site, stats).lost[kept]))


def _needed(site: Hidden, stats: Statistics) -> Needed:
    if site.width < LEAST_WIDTH:
        raise Refused(f"there are {site.width} units only")
    if site.width > MOST:
        raise Refused(f"among {site.width} units those that are needed least take too long to find")
    found = stats.hidden.get(site.name)
    if found is None or found.moments.count < 2:
        raise Refused("no calibration row reached them")
    return found


UNITS = Method(
    "units",
    "x W -> x_S C_SS^-1 C_S W and a constant, S the units that are needed most, C their covariance",
    "optimal brain surgeon (Hassibi and Stork, 1993) on what the next layers give, a unit at a time; the units "
    "are packed away",
    False, False, Hidden, _units_offers, _fewer_units, _units_error,
)  # fmt: skip
