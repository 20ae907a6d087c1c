"""Whether two lists of scores put the candidates of a request in the same order.

Scores that are closer than rounding can tell are ties, and no order among them is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 512


@dataclass(frozen=True)
class Order:
    """How the order of one list of candidates changed.

    Attributes:
        overlap: Share of the top k that stayed; a candidate that ties with the last of them counts as one of them.
        tau: Kendall's tau over the pairs that are no ties: agreeing minus disagreeing, over all.
        move: Largest number of others that one candidate changed places with, though they are no ties.
        mover: That candidate.
    """

    overlap: float
    tau: float
    move: int
    mover: int | None


def order(before: NDArray[Any], after: NDArray[Any], tie: float, top_k: int) -> Order:
    """Compares two lists of scores.

    Args:
        before: Scores of the original, `[N]`.
        after: Scores of the other model, `[N]`.
        tie: Scores of the original this close to each other are ties.
        top_k: Number of best candidates to compare.
    """
    a, b = _sunk(before), _sunk(after)
    n = len(a)
    agreeing = disagreeing = 0
    moves = np.zeros(n, np.int64)
    for start in range(0, n, _CHUNK):
        rows = slice(start, start + _CHUNK)
        with np.errstate(invalid="ignore"):
            apart = a[rows, None] - a[None, :]
            other = b[rows, None] - b[None, :]
        above, below = apart > tie, apart < -tie
        # Scores that are equal now, though they were not, have lost their order too.
        wrong = (above & ~(other > 0)) | (below & ~(other < 0))
        agreeing += int((above | below).sum()) - int(wrong.sum())
        disagreeing += int(wrong.sum())
        moves[rows] = wrong.sum(axis=1)
    k = min(top_k, n)
    overlap = 1.0
    if k:
        last = np.sort(a)[::-1][k - 1]
        best = np.argsort(-b, kind="stable")[:k]
        with np.errstate(invalid="ignore"):
            stayed = (a[best] >= last - tie) | (a[best] == last)
        overlap = float(stayed.mean())
    total = agreeing + disagreeing
    tau = (agreeing - disagreeing) / total if total else 1.0
    move = int(moves.max()) if n else 0
    return Order(overlap, tau, move, int(moves.argmax()) if move else None)


def rank(scores: NDArray[Any], candidate: int) -> int:
    """The place of a candidate, the best being 1; those of one score share the best place of theirs."""
    found = _sunk(scores)
    return int((found > found[candidate]).sum()) + 1


def _sunk(scores: NDArray[Any]) -> NDArray[np.float64]:
    """Scores in float64; NaN ranks last."""
    out = scores.astype(np.float64)
    return np.where(np.isnan(out), -np.inf, out)


def auc(scores: NDArray[Any], labels: NDArray[Any]) -> float | None:
    """Chance that a positive scores above a negative, ties counting half; None without both."""
    s, y = _sunk(scores), labels.astype(bool)
    positive, negative = int(y.sum()), int((~y).sum())
    if not positive or not negative:
        return None
    _, back, counts = np.unique(s, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[back]
    return float((ranks[y].sum() - positive * (positive + 1) / 2) / (positive * negative))


def logloss(scores: NDArray[Any], labels: NDArray[Any]) -> NDArray[np.float64] | None:
    """Loss per candidate in nats of scores that are probabilities; None if they are not."""
    p, y = scores.astype(np.float64), labels.astype(np.float64)
    if not np.isfinite(p).all() or (p < 0).any() or (p > 1).any():
        return None
    p = np.clip(p, 1e-15, 1 - 1e-15)
    return np.asarray(-(y * np.log(p) + (1 - y) * np.log1p(-p)))


def columns(output: NDArray[Any], candidates: int) -> NDArray[Any] | None:
    """An output as lists of scores `[N, columns]`; None if it is none."""
    if output.ndim == 0 or output.shape[0] != candidates or output.dtype.kind not in "fV":
        return None
    flat = output.reshape(candidates, -1)
    return flat if 1 <= flat.shape[1] <= _MOST_COLUMNS else None


_MOST_COLUMNS = 16
