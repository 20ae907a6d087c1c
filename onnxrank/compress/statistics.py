"""What is summed over calibration rows: first and second moments of what layers give, and how often rows are looked up.

Sums are float64 and add up, so they can be made in pieces: by batch, by process, by machine. A table's moments follow
from how often each of its rows was looked up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Sums over rows.

    Attributes:
        count: Number of rows.
        total: Sum of the rows, `[width]`.
        squares: Sum of their outer products, `[width, width]`.
    """

    count: float
    total: Floats
    squares: Floats

    @classmethod
    def of(cls, rows: NDArray[Any], weights: Floats | None = None) -> Moments:
        """Sums over rows `[R, width]`, each counted by its weight."""
        x = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
        w = x if weights is None else x * weights[:, None]
        return cls(float(len(x) if weights is None else weights.sum()), w.sum(0), w.T @ x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def less(self, vector: NDArray[Any]) -> Moments:
        """Those of the rows with a vector `[width]` taken off each."""
        v = vector.astype(np.float64)
        off = np.outer(self.total, v)
        return Moments(
            self.count, self.total - self.count * v, self.squares - off - off.T + self.count * np.outer(v, v)
        )

    def through(self, matrix: NDArray[Any]) -> Moments:
        """Those of the rows multiplied by a matrix `[width, outputs]`."""
        w = matrix.astype(np.float64)
        return Moments(self.count, self.total @ w, w.T @ self.squares @ w)

    @property
    def mean(self) -> Floats:
        """The mean row."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> Floats:
        """Covariance, over the number of rows."""
        mean = self.mean
        made = self.squares / max(self.count, 1) - np.outer(mean, mean)
        return (made + made.T) / 2


@dataclass(frozen=True)
class Fitted:
    """A layer of low rank that was fitted to what the compressed model sees.

    Attributes:
        rank: Its rank.
        first: `[inputs, rank]`.
        second: `[rank, outputs]`.
        shift: What is added to the product, `[outputs]`.
        lift: What is added before a ReLU between the two, `[rank]`; None where there is no ReLU.
    """

    rank: int
    first: Floats
    second: Floats
    shift: Floats
    lift: Floats | None = None


@dataclass(frozen=True)
class Needed:
    """Units of a layer by how much they are needed.

    Attributes:
        moments: Of what the next layers read.
        order: The units, the one that is needed most first.
        lost: Share of the variance of what the next layers give that is lost with the first k units alone,
            `[units + 1]`.
    """

    moments: Moments
    order: NDArray[np.int64]
    lost: Floats


@dataclass(frozen=True)
class Statistics:
    """What methods may ask of the calibration rows.

    Attributes:
        rows: Number of calibration rows.
        products: Moments of what layers give, without the bias of an Add, by the site's name.
        lookups: How often each row of a table was looked up, by the site's name.
        depths: Number of axes of ids, by tensor.
        maps: Layers fitted in sequence, by the site's name.
        hidden: Units between layers, by the site's name.
    """

    rows: int = 0
    products: Mapping[str, Moments] = field(default_factory=dict)
    lookups: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    depths: Mapping[str, int] = field(default_factory=dict)
    maps: Mapping[str, Fitted] = field(default_factory=dict)
    hidden: Mapping[str, Needed] = field(default_factory=dict)

    def depth(self, ids: str) -> int | None:
        """Number of axes of ids, which is the axis of the table's columns behind the lookup."""
        return self.depths.get(ids)


def counted(ids: NDArray[Any], rows: int) -> NDArray[np.int64]:
    """How often each of so many rows is looked up; negative ids count from the end."""
    flat = ids.reshape(-1).astype(np.int64)
    return np.bincount(np.where(flat < 0, flat + rows, flat), minlength=rows)


def reduced_rank(seen: Moments, both: Floats, wanted: Moments, rank: int, ridge: float = 1e-6) -> Fitted:
    """The map of a rank from what a layer really sees to what it should give (reduced-rank regression).

    Args:
        seen: Moments of the inputs `x'` that it sees.
        both: Sum of the outer products of `x'` and the wanted `y`, `[inputs, outputs]`.
        wanted: Moments of `y`.
        rank: The rank.
        ridge: Added to the spread of the inputs, relative to their mean variance.

    Returns:
        `y = x' A B + shift` with the least mean square error of all maps of that rank.
    """
    inner = seen.covariance
    cross = both / max(seen.count, 1) - np.outer(seen.mean, wanted.mean)
    inner[np.diag_indices_from(inner)] += ridge * float(np.trace(inner)) / len(inner) + 1e-12
    full = np.linalg.solve(inner, cross)  # ordinary least squares
    _, vectors = np.linalg.eigh(full.T @ inner @ full)
    basis = vectors[:, ::-1][:, :rank]
    first, second = full @ basis, basis.T
    return Fitted(rank, first, second, wanted.mean - seen.mean @ first @ second)
