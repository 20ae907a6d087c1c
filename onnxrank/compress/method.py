"""What a method is: a way to make a place of a model smaller, and what all of them share.

A method changes a site of a `Network` by a parameter and returns the sites that it leaves behind, so that methods can
follow each other: the two factors of a layer may be kept in fewer bytes again. Everything is standard ONNX, but for
what a method asks to be allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank.compress.statistics import Statistics
from onnxrank.network import Network, Single, Site, Table

LEAST_SAVING = 0.95
"""Share of a site's entries or units at which less of them is not worth it."""
ENERGIES = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.9995)
"""Shares of a variance that are worth being tried."""
LEAST_WIDTH = 8
"""Inputs, outputs or units below which a layer has none to lose."""


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


def float_type(data: NDArray[Any]) -> int:
    """ONNX's number for the type of floats."""
    return 11 if data.dtype == np.float64 else 1


def lookups(site: Single, stats: Statistics) -> NDArray[np.float64] | None:
    """How often each row of a table was looked up; None for layers."""
    counts = stats.lookups.get(site.name) if isinstance(site, Table) else None
    return None if counts is None or not counts.sum() else counts.astype(np.float64)


def distance(data: NDArray[Any], made: NDArray[Any], weights: NDArray[np.float64] | None) -> float:
    """Root mean square of a difference over that of the data about its mean, rows by weight."""
    by = np.ones(len(data)) if weights is None else weights
    off = by @ ((made.astype(np.float64) - data) ** 2)
    about = by @ ((data - np.average(data, axis=0, weights=by)) ** 2)
    return math.sqrt(float(off.sum()) / (float(about.sum()) or 1.0))
