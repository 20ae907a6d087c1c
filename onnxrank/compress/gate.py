"""Whether scores are as good as those of the original: on held-out requests, with intervals, and never by a guess.

The AUC is compared by pairs: both models score the same rows, so what they share cancels, and the difference has a much
narrower interval than either of the two. Its variance is DeLong's (DeLong, DeLong and Clarke-Pearson, 1988) with the
rows of a request taken together (Obuchowski, 1997), because they share a user. Where rows are few enough a bootstrap
over requests is made as well, and the wider of the two counts.

Labels are weights here: a row counts as positive by its label and as negative by the rest. So the same code answers
where nothing is labelled: rows are then positive by the original's own probability, which says how well the scores
keep the original's order, and nothing about whether either is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Verdict = Literal["passed", "failed", "cannot tell"]

LEAST_ROWS = 1000
"""Rows below which the intervals themselves cannot be trusted."""
LEAST_OF_EACH = 50
"""Positive and negative rows below which they cannot be."""
LEAST_REQUESTS = 30
"""Requests below which they cannot be."""
_RESAMPLES = 200
_MOST_IN_BOOTSTRAP = 60_000
_CLIP = 1e-7


@dataclass(frozen=True)
class Limits:
    """What the compressed model may lose.

    Attributes:
        loss: AUC, and log loss in nats.
        overlap: Least share of the top k that stays, in the mean over requests.
        calibration: Share by which the mean score may move.
        rmse: Distance of logits, relative to the spread of the original's.
        top_k: Number of best candidates compared.
        level: Confidence of intervals.
    """

    loss: float = 0.0005
    overlap: float = 0.9
    calibration: float = 0.01
    rmse: float = 0.25
    top_k: int = 10
    level: float = 0.95


@dataclass(frozen=True)
class Scores:
    """Scores of both models on the same rows.

    Attributes:
        original: `[R]`.
        other: `[R]`.
        request: Number of the request of every row, `[R]`, from 0 without gaps.
        labels: `[R]`, 0 or 1; None where nothing is labelled.
        names: What each request is called.
    """

    original: Floats
    other: Floats
    request: NDArray[np.int64]
    labels: Floats | None = None
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Criterion:
    """One thing that is asked of the scores.

    Attributes:
        name: `auc`, `log_loss`, `calibration`, `logit_rmse` or `overlap`.
        value: What was found.
        low: Lower end of its interval.
        high: Upper end.
        limit: What is allowed: at least this for `auc` and `overlap`, at most this for the others.
        verdict: Whether it holds.
        rows: Rows that would tell, where these cannot; None where it is told, or where no number would do.
    """

    name: str
    value: float
    low: float
    high: float
    limit: float
    verdict: Verdict
    rows: int | None = None

    @property
    def used(self) -> float:
        """Share of what is allowed that is lost at the worse end of the interval: below 1 where the criterion holds."""
        lost = {"auc": -self.low, "overlap": 1 - self.low, "calibration": max(-self.low, self.high)}
        allowed = 1 - self.limit if self.name == "overlap" else abs(self.limit)
        return max(lost.get(self.name, self.high), 0.0) / allowed if allowed > 0 else math.inf


@dataclass(frozen=True)
class Worst:
    """The request that changed most.

    Attributes:
        name: What it is called.
        overlap: Share of its top k that stayed; None where it has no more candidates than that.
        logit_rmse: Distance of its logits, relative to the spread of all of the original's.
    """

    name: str
    overlap: float | None
    logit_rmse: float


@dataclass(frozen=True)
class Outcome:
    """What the gate says of one output.

    Attributes:
        output: Name of the output.
        verdict: The worst of the criteria's.
        basis: What it was held against: `labels`, or `original` where nothing is labelled.
        reasons: Why it is no pass, a sentence each.
        criteria: What was asked.
        rows: Number of rows.
        requests: Number of requests.
        positives: Number of positive labels; None without labels.
        auc: AUC of the original; None where scores are no probabilities and nothing is labelled.
        calibration: Sum of the scores over that of the labels, of original and other; None without labels or
            probabilities.
        worst: The request that changed most.
        level: Confidence of the intervals.
    """

    output: str
    verdict: Verdict
    basis: Literal["labels", "original"]
    reasons: tuple[str, ...]
    criteria: tuple[Criterion, ...]
    rows: int
    requests: int
    positives: int | None
    auc: float | None
    calibration: tuple[float, float] | None
    worst: Worst | None
    level: float = 0.95

    def criterion(self, name: str) -> Criterion | None:
        """A criterion by its name."""
        return next((c for c in self.criteria if c.name == name), None)


def judge(scores: Scores, limits: Limits, output: str = "score") -> Outcome:
    """Holds scores against the original's.

    Args:
        scores: Of both models, on rows that nothing was fitted to.
        limits: What may be lost.
        output: Name of the output.
    """
    a, b = scores.original, scores.other
    count = int(scores.request.max()) + 1 if len(scores.request) else 0
    positives = None if scores.labels is None else int(scores.labels.sum())
    basis: Literal["labels", "original"] = "original" if scores.labels is None else "labels"

    def said(verdict: Verdict, reasons: Sequence[str], **more: Any) -> Outcome:
        held: dict[str, Any] = {"criteria": (), "auc": None, "calibration": None, "worst": None, **more}
        return Outcome(
            output, verdict, basis, tuple(reasons), rows=len(a), requests=count, positives=positives,
            level=limits.level, **held,
        )  # fmt: skip

    if not np.isfinite(b).all() and np.isfinite(a).all():
        row = int(np.flatnonzero(~np.isfinite(b))[0])
        return said("failed", [f"the score of row {row} is {b[row]}, where the original's is {a[row]:.4g}"])
    sure = np.isfinite(a)
    if not sure.all():
        return said("cannot tell", [f"the original's own scores are no numbers in {int((~sure).sum())} rows"])
    few = _too_few(scores, count)
    if few:
        return said("cannot tell", few)
    probabilities = bool((a >= 0).all() and (a <= 1).all())
    weights = scores.labels if scores.labels is not None else a if probabilities else None
    criteria: list[Criterion] = []
    reasons: list[str] = []
    auc: float | None = None
    blind = False
    if weights is not None:
        pair = Paired(a, b, weights, scores.request, count)
        auc = pair.auc[0]
        low, high = pair.own(limits.level)
        if scores.labels is not None and low <= 0.5 <= high:
            blind = True
            reasons.append(
                f"the original's own scores do not tell these labels apart (AUC {auc:.4f}, {low:.4f} to {high:.4f}), "
                "so nothing could be seen to be lost: are they the labels of these rows?"
            )
        criteria.append(_at_least("auc", *pair.difference(limits.level), -limits.loss, len(a)))
    calibration = None
    if probabilities and not ((b < 0).any() or (b > 1).any()):
        if scores.labels is not None:
            rise = _losses(b, scores.labels) - _losses(a, scores.labels)
            criteria.append(
                _at_most("log_loss", *_mean(rise, scores.request, count, limits.level), limits.loss, len(a))
            )
            calibration = (float(a.sum() / max(positives or 0, 1)), float(b.sum() / max(positives or 0, 1)))
        middle, low, high = (v / float(a.mean()) for v in _mean(b - a, scores.request, count, limits.level))
        criteria.append(_around("calibration", middle, low, high, limits.calibration, len(a)))
    off = logits(b, probabilities) - logits(a, probabilities)
    spread = float(logits(a, probabilities).std()) or 1.0
    square, low, high = _mean(off**2, scores.request, count, limits.level)
    rmse, low, high = (math.sqrt(max(v, 0.0)) / spread for v in (square, low, high))
    criteria.append(_at_most("logit_rmse", rmse, low, high, limits.rmse, len(a)))
    shares, counted = overlaps(scores, limits.top_k, count)
    if counted.any():
        mean, low, high = _mean(shares[counted], np.arange(int(counted.sum())), int(counted.sum()), limits.level)
        criteria.append(_at_least("overlap", mean, low, min(high, 1.0), limits.overlap, len(a)))
    per = np.sqrt(np.bincount(scores.request, off**2, count) / np.bincount(scores.request, minlength=count)) / spread
    lead = np.where(counted, shares, 1.0) - per / (1 + per.max())
    k = int(lead.argmin())
    name = scores.names[k] if k < len(scores.names) else f"request {k}"
    worst = Worst(name, float(shares[k]) if counted[k] else None, float(per[k]))
    verdict: Verdict = "passed"
    if any(c.verdict == "failed" for c in criteria):
        verdict = "failed"
    elif blind or any(c.verdict == "cannot tell" for c in criteria):
        verdict = "cannot tell"
    reasons += [_told(c) for c in criteria if c.verdict != "passed"]
    return said(verdict, reasons, criteria=tuple(criteria), auc=auc, calibration=calibration, worst=worst)


def together(outcomes: Sequence[Outcome]) -> Verdict:
    """The verdict on all outputs: failed if one is, else unclear if one is."""
    found = {o.verdict for o in outcomes}
    return "failed" if "failed" in found else "cannot tell" if "cannot tell" in found or not found else "passed"


def _too_few(scores: Scores, requests: int) -> list[str]:
    """Why so few rows tell nothing, with the number of rows that would."""
    rows = len(scores.original)
    need = LEAST_ROWS
    why = []
    if scores.labels is not None:
        one = float(scores.labels.mean()) if rows else 0.0
        rarer = min(one, 1 - one)
        if rarer * rows < LEAST_OF_EACH:
            why.append(f"{round(rarer * rows)} labels of the rarer kind")
            need = max(need, math.ceil(LEAST_OF_EACH / rarer)) if rarer else need
    if requests < LEAST_REQUESTS:
        why.append(f"{requests} requests")
        need = max(need, math.ceil(rows * LEAST_REQUESTS / max(requests, 1)))
    if rows < LEAST_ROWS or why:
        told = " and ".join([f"{rows} rows", *why])
        return [f"{told} are too few to tell; about {need} rows would do"]
    return []


def _told(c: Criterion) -> str:
    what = {
        "auc": "the AUC may fall by at most {0:.4g}: it changes by {1:+.5f} ({2:+.5f} to {3:+.5f})",
        "log_loss": "the log loss may rise by at most {0:.4g}: it changes by {1:+.5f} ({2:+.5f} to {3:+.5f})",
        "calibration": "the mean score may move by {0:.1%}: it moves by {1:+.2%} ({2:+.2%} to {3:+.2%})",
        "logit_rmse": "logits may be {0:.2g} of their spread off: they are {1:.3f} off ({2:.3f} to {3:.3f})",
        "overlap": "{0:.3g} of the best candidates must stay: {1:.4f} do ({2:.4f} to {3:.4f})",
    }[c.name].format(abs(c.limit), c.value, c.low, c.high)
    if c.verdict == "failed":
        return what
    more = "; no number of rows would tell" if c.rows is None else f"; about {c.rows} rows would tell"
    return what + more


# --- AUC ----------------------------------------------------------------------------------------------------------


def soft_auc(scores: Floats, weights: Floats) -> float:
    """The AUC of scores where row i is positive by `weights[i]` and negative by the rest; ties count half.

    Args:
        scores: `[R]`.
        weights: `[R]`, in `[0, 1]`.
    """
    return _components(scores, weights)[0]


def _components(scores: Floats, weights: Floats) -> tuple[float, Floats]:
    """The AUC, and by how much each row moves it (DeLong's structural components, centred)."""
    _, back, size = np.unique(scores, return_inverse=True, return_counts=True)
    positive = np.bincount(back, weights, len(size))
    negative = np.bincount(back, 1.0 - weights, len(size))
    total_positive, total_negative = float(positive.sum()), float(negative.sum())
    if not total_positive > 0 or not total_negative > 0:
        return 0.5, np.zeros(len(scores))
    below = (np.cumsum(negative) - negative / 2) / total_negative
    above = 1 - (np.cumsum(positive) - positive / 2) / total_positive
    auc = float((positive * below).sum() / total_positive)
    moves = weights / total_positive * (below[back] - auc) + (1 - weights) / total_negative * (above[back] - auc)
    return auc, moves


class Paired:
    """The AUC of two lists of scores on the same rows.

    Args:
        first: `[R]`.
        second: `[R]`.
        weights: By how much each row is positive, `[R]`.
        request: Its request, `[R]`.
        count: Number of requests.

    Attributes:
        auc: Of the first and of the second.
    """

    def __init__(self, first: Floats, second: Floats, weights: Floats, request: NDArray[np.int64], count: int) -> None:
        one, mine = _components(first, weights)
        two, its = _components(second, weights)
        self.auc = (one, two)
        self._mine = np.bincount(request, mine, count)
        self._moves = np.bincount(request, its - mine, count)
        self._again = (first, second, weights, request, count)

    def own(self, level: float) -> tuple[float, float]:
        """Interval of the first AUC."""
        half = _half(float((self._mine**2).sum()), len(self._mine), level)
        return self.auc[0] - half, self.auc[0] + half

    def difference(self, level: float) -> tuple[float, float, float]:
        """Second minus first, and the ends of its interval."""
        off = self.auc[1] - self.auc[0]
        half = _half(float((self._moves**2).sum()), len(self._moves), level)
        low, high = off - half, off + half
        if len(self._again[0]) <= _MOST_IN_BOOTSTRAP:
            less, more = self.bootstrap(level)
            low, high = min(low, less), max(high, more)
        return off, low, high

    def bootstrap(self, level: float, resamples: int = _RESAMPLES) -> tuple[float, float]:
        """Interval of the difference by drawing requests again (percentiles, Efron and Tibshirani, chapter 13)."""
        first, second, weights, request, count = self._again
        rng = np.random.default_rng(0)
        ranked = [np.unique(s, return_inverse=True)[1] for s in (first, second)]
        found = np.empty(resamples)
        for k in range(resamples):
            times = np.bincount(rng.integers(0, count, count), minlength=count)[request].astype(np.float64)
            one, two = (_weighted(back, times * weights, times * (1 - weights)) for back in ranked)
            found[k] = two - one
        tail = 50 * (1 - level)
        low, high = np.percentile(found, (tail, 100 - tail))
        return float(low), float(high)


def _weighted(back: NDArray[np.int64], positive: Floats, negative: Floats) -> float:
    p, n = np.bincount(back, positive), np.bincount(back, negative)
    total = p.sum() * n.sum()
    return float((p * (np.cumsum(n) - n / 2)).sum() / total) if total else 0.5


# --- means by request ---------------------------------------------------------------------------------------------


def _mean(values: Floats, request: NDArray[np.int64], count: int, level: float) -> tuple[float, float, float]:
    """The mean over rows, and the ends of its interval over requests."""
    middle = float(values.mean())
    moves = np.bincount(request, (values - middle) / len(values), count)
    half = _half(float((moves**2).sum()), count, level)
    return middle, middle - half, middle + half


def _half(variance: float, count: int, level: float) -> float:
    """Half the width of an interval."""
    return NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt(variance * count / max(count - 1, 1))


def _at_least(name: str, value: float, low: float, high: float, limit: float, rows: int) -> Criterion:
    verdict: Verdict = "passed" if low > limit else "failed" if high < limit else "cannot tell"
    # A gain on few rows is luck, and no measure of how many would tell.
    likely = min(value, 0.0) if limit <= 0 else value
    return Criterion(name, value, low, high, limit, verdict, _needed(likely, value, low, high, limit, rows, verdict))


def _at_most(name: str, value: float, low: float, high: float, limit: float, rows: int) -> Criterion:
    verdict: Verdict = "passed" if high < limit else "failed" if low > limit else "cannot tell"
    likely = max(value, 0.0)
    return Criterion(name, value, low, high, limit, verdict, _needed(likely, value, low, high, limit, rows, verdict))


def _around(name: str, value: float, low: float, high: float, limit: float, rows: int) -> Criterion:
    far, near = max(-low, high), 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    verdict: Verdict = "passed" if far < limit else "failed" if near > limit else "cannot tell"
    rows_needed = _needed(abs(value), abs(value), near, far, limit, rows, verdict)
    return Criterion(name, value, low, high, limit, verdict, rows_needed)


def _needed(
    likely: float, value: float, low: float, high: float, limit: float, rows: int, verdict: Verdict
) -> int | None:
    """Rows at which an interval, which narrows by the square root of their number, would leave the limit out."""
    away = abs(likely - limit)
    if verdict != "cannot tell" or away <= 0:
        return None
    half = max(high - value, value - low)
    found = rows * (half / away) ** 2 * 1.05
    return math.ceil(found) if found < 1e12 else None


# --- scores -------------------------------------------------------------------------------------------------------


def logits(scores: Floats, probabilities: bool = True) -> Floats:
    """Log odds of probabilities; other scores stay as they are."""
    if not probabilities:
        return scores
    p = np.clip(scores, _CLIP, 1 - _CLIP)
    return np.asarray(np.log(p) - np.log1p(-p))


def _losses(scores: Floats, labels: Floats) -> Floats:
    p = np.clip(scores, _CLIP, 1 - _CLIP)
    return np.asarray(-(labels * np.log(p) + (1 - labels) * np.log1p(-p)))


def overlaps(scores: Scores, top_k: int, count: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Share of each request's best candidates that stayed, and whether it has more candidates than that.

    A candidate that the original scores as high as the last of its best counts as one of them.

    Returns:
        `[requests]` each.
    """
    sizes = np.bincount(scores.request, minlength=count)
    starts = np.cumsum(sizes) - sizes

    def places(values: Floats) -> NDArray[np.int64]:
        order = np.lexsort((-values, scores.request))
        out = np.empty(len(values), np.int64)
        out[order] = np.arange(len(values)) - starts[scores.request[order]]
        return out

    last = np.full(count, -np.inf)
    at = places(scores.original) == np.minimum(top_k, sizes)[scores.request] - 1
    last[scores.request[at]] = scores.original[at]
    best = places(scores.other) < top_k
    stayed = best & (scores.original >= last[scores.request])
    share = np.bincount(scores.request, stayed, count) / np.maximum(np.minimum(sizes, top_k), 1)
    return share, sizes > top_k
