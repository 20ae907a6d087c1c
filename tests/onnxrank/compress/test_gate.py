"""The accuracy gate: known AUCs and intervals, and what it must refuse."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from onnxrank.compress.engine import milder
from onnxrank.compress.gate import Criterion, Limits, Outcome, Paired, Scores, judge, overlaps, soft_auc, together
from onnxrank.compress.plan import Plan
from onnxrank.compress.search import Made
from onnxrank.verify.ranking import auc, order

RNG = np.random.default_rng


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def drawn(requests: int = 1000, each: int = 32, seed: int = 0, rate: float = -1.0) -> tuple[np.ndarray, ...]:
    """Logits of an original that is right, labels drawn from it, and request numbers."""
    rng = RNG(seed)
    request = np.repeat(np.arange(requests), each)
    z = rate + rng.normal(size=requests)[request] * 0.5 + rng.normal(size=len(request))
    return z, (rng.random(len(z)) < sigmoid(z)).astype(float), request


def held(noise: float, seed: int = 1, labelled: bool = True, limits: Limits | None = None, **how: int) -> Outcome:
    z, y, request = drawn(**how)
    other = sigmoid(z + noise * RNG(seed).normal(size=len(z)))
    return judge(Scores(sigmoid(z), other, request, y if labelled else None), limits or Limits())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 40), st.booleans())
def test_auc_of_labels_is_the_usual_one(seed: int, size: int, ties: bool) -> None:
    rng = RNG(seed)
    s = rng.integers(0, 4, size).astype(float) if ties else rng.normal(size=size)
    y = np.r_[1.0, 0.0, rng.integers(0, 2, size - 2)]
    assert soft_auc(s, y) == pytest.approx(auc(s, y))


def test_soft_labels_are_the_mean_over_drawn_ones() -> None:
    rng = RNG(0)
    p, s = rng.random(400), rng.normal(size=400)
    s += 2 * p
    many = np.mean([auc(s, rng.random(400) < p) for _ in range(2000)])
    assert soft_auc(s, p) == pytest.approx(many, abs=2e-3)


def test_variance_is_delongs() -> None:
    """With a row per request: against the formula of the paper, written out over all pairs."""
    rng = RNG(3)
    y = (rng.random(120) < 0.4).astype(float)
    a, b = rng.normal(size=(2, 120)) + y
    pos, neg = y == 1, y == 0
    parts = []
    for s in (a, b):
        psi = (s[pos][:, None] > s[neg][None]).astype(float) + 0.5 * (s[pos][:, None] == s[neg][None])
        parts.append((psi.mean(1), psi.mean(0)))
    tens, ones = (np.stack([p[k] for p in parts]) for k in range(2))
    cov = np.cov(tens, ddof=0) / pos.sum() + np.cov(ones, ddof=0) / neg.sum()
    want = 1.959964 * np.sqrt((cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]) * 120 / 119)
    pair = Paired(a, b, y, np.arange(120), 120)
    pair.bootstrap = lambda *_: (np.inf, -np.inf)  # type: ignore[method-assign,assignment]
    off, low, high = pair.difference(0.95)
    assert off == pytest.approx(auc(b, y) - auc(a, y))
    assert (high - low) / 2 == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
def test_intervals_hold_what_they_promise() -> None:
    """Over many draws, 95 % intervals miss the true difference about one time in twenty, with users shared by rows."""
    z, _, request = drawn(40_000, 5, seed=9)
    rng = RNG(10)
    user = rng.normal(size=40_000)[request]  # an error that the rows of a request share
    other = z + 0.3 * user + 0.3 * rng.normal(size=len(z))
    truth = soft_auc(other, sigmoid(z)) - soft_auc(z, sigmoid(z))
    misses = narrow = 0
    for k in range(200):
        rows = slice(k * 1000, k * 1000 + 1000)
        y = (RNG(k).random(1000) < sigmoid(z[rows])).astype(float)
        pair = Paired(z[rows], other[rows], y, request[rows] - request[rows][0], 200)
        _, low, high = pair.difference(0.95)
        misses += not low <= truth <= high
        narrow += high - low < 0.06
    assert misses <= 20 and narrow > 150


def test_bootstrap_agrees_with_delong() -> None:
    z, y, request = drawn(400, 20)
    other = z + 0.2 * RNG(5).normal(size=len(z))
    pair = Paired(z, other, y, request, 400)
    low, high = pair.bootstrap(0.95, 1000)
    pair.bootstrap = lambda *_: (np.inf, -np.inf)  # type: ignore[method-assign,assignment]
    _, less, more = pair.difference(0.95)
    assert high - low == pytest.approx(more - less, rel=0.15)


def test_the_same_scores_pass() -> None:
    found = held(0.0)
    assert found.verdict == "passed" and found.basis == "labels"
    assert {c.name for c in found.criteria} == {"auc", "log_loss", "calibration", "logit_rmse", "overlap"}
    assert found.calibration is not None and found.calibration[0] == found.calibration[1] == pytest.approx(1, abs=0.05)


def test_a_little_noise_passes_with_enough_rows_only() -> None:
    limits = Limits(loss=0.0008)
    few, many = held(0.05, requests=60, limits=limits), held(0.05, requests=4000, limits=limits)
    assert many.verdict == "passed"
    assert few.verdict == "cannot tell"
    found = few.criterion("auc")
    assert found is not None and found.rows is not None and found.rows > 1920
    assert f"{found.rows} rows would tell" in " ".join(few.reasons)


@pytest.mark.slow
def test_the_number_of_rows_is_about_right() -> None:
    limits = Limits(loss=0.0008)
    asked = held(0.05, requests=60, limits=limits).criterion("auc")
    assert asked is not None and asked.rows is not None
    again = held(0.05, requests=2 * asked.rows // 32, seed=2, limits=limits).criterion("auc")
    assert again is not None and again.verdict == "passed"


@pytest.mark.slow
def test_what_is_used_up_says_what_holds_and_goes_by_the_noise() -> None:
    """The gate picks what it is asked about next by that."""
    found = {noise: held(noise, 3) for noise in (0.02, 0.05, 0.1, 0.2, 1.0)}
    for outcome in found.values():
        assert all((c.used < 1) == (c.verdict == "passed") for c in outcome.criteria)
    assert {o.verdict for o in found.values()} == {"passed", "cannot tell", "failed"}
    for name in ("auc", "log_loss", "logit_rmse", "overlap"):
        small, large = (found[n].criterion(name) for n in (0.05, 0.1))
        assert small is not None and large is not None and 1.5 < large.used / small.used < 4  # its square at most
    moved = held(0.05, limits=Limits(loss=0.0)).criterion("auc")
    assert moved is not None and moved.used == math.inf


def test_much_noise_fails() -> None:
    found = held(2.0)
    assert found.verdict == "failed"
    assert any(r.startswith("the AUC may fall by at most") for r in found.reasons)


def test_order_within_requests_counts_although_the_auc_stays() -> None:
    """Scores that are the same in the mean, and put each request's candidates in another order."""
    z, y, request = drawn(1000)
    z = 8 * RNG(1).normal(size=1000)[request] + 0.02 * z
    y = (RNG(2).random(len(z)) < sigmoid(z)).astype(float)
    found = judge(Scores(sigmoid(z), sigmoid(z + 0.02 * RNG(3).normal(size=len(z))), request, y), Limits())
    kept = found.criterion("overlap")
    auc_found = found.criterion("auc")
    assert auc_found is not None and auc_found.verdict == "passed"
    assert kept is not None and kept.verdict == "failed" and found.verdict == "failed"


def test_mean_scores_may_not_move() -> None:
    z, y, request = drawn()
    found = judge(Scores(sigmoid(z), sigmoid(z + 0.1), request, y), Limits())
    moved = found.criterion("calibration")
    assert moved is not None and moved.verdict == "failed" and moved.value > 0.01


def test_shuffled_labels_tell_nothing() -> None:
    z, y, request = drawn()
    found = judge(Scores(sigmoid(z), sigmoid(z), request, RNG(1).permutation(y)), Limits())
    assert found.verdict == "cannot tell" and "do not tell these labels apart" in found.reasons[0]


def test_few_rows_tell_nothing_even_of_equal_scores() -> None:
    z, y, request = drawn(20, 10)
    found = judge(Scores(sigmoid(z), sigmoid(z), request, y), Limits())
    assert found.verdict == "cannot tell" and "200 rows" in found.reasons[0] and "rows would do" in found.reasons[0]


def test_one_kind_of_labels_tells_nothing() -> None:
    z, _, request = drawn()
    found = judge(Scores(sigmoid(z), sigmoid(z), request, np.zeros(len(z))), Limits())
    assert found.verdict == "cannot tell" and "0 labels of the rarer kind" in found.reasons[0]


def test_scores_that_are_no_numbers_fail() -> None:
    z, y, request = drawn()
    other = sigmoid(z)
    other[17] = np.nan
    found = judge(Scores(sigmoid(z), other, request, y), Limits())
    assert found.verdict == "failed" and "row 17 is nan" in found.reasons[0]


def test_without_labels_it_says_so() -> None:
    found = held(0.02, labelled=False)
    assert found.basis == "original" and found.verdict == "passed" and found.criterion("log_loss") is None
    assert held(2.0, labelled=False).verdict == "failed"


def test_scores_that_are_no_probabilities() -> None:
    z, y, request = drawn()
    found = judge(Scores(z, z + 0.01, request, y), Limits())
    assert found.verdict == "passed" and found.criterion("log_loss") is None
    unlabelled = judge(Scores(z, z + 0.01, request), Limits())
    assert unlabelled.verdict == "passed" and unlabelled.criterion("auc") is None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 500), st.booleans())
def test_overlap_is_that_of_verify(seed: int, ties: bool) -> None:
    rng = RNG(seed)
    request = np.repeat(np.arange(6), rng.integers(1, 9, 6))
    rng.shuffle(request)
    a, b = (rng.integers(0, 5, len(request)).astype(float) if ties else rng.normal(size=len(request)) for _ in range(2))
    b = b + 1e-6 * rng.normal(size=len(b))
    _, request = np.unique(request, return_inverse=True)
    count = int(request.max()) + 1
    shares, counted = overlaps(Scores(a, b, request), 3, count)
    for k in range(count):
        mine = request == k
        assert shares[k] == pytest.approx(order(a[mine], b[mine], 0.0, 3).overlap)
        assert counted[k] == (mine.sum() > 3)


def test_the_worst_request_is_named() -> None:
    z, y, request = drawn()
    other = z.copy()
    other[request == 7] *= -1
    names = [f"r{k}" for k in range(1000)]
    found = judge(Scores(sigmoid(z), sigmoid(other), request, y, names), Limits())
    assert found.worst is not None and found.worst.name == "r7" and found.worst.overlap is not None
    assert found.worst.overlap < 0.6


@pytest.mark.slow
def test_together() -> None:
    good, bad, unclear = held(0.0), held(2.0), held(0.0, requests=5)
    assert together([good]) == "passed" and together([good, unclear]) == "cannot tell"
    assert together([unclear, bad]) == "failed" and together([]) == "cannot tell"


@pytest.mark.parametrize(
    ("at", "used", "expected"), [(5, 1.01, 4), (5, 2.0, 3), (5, 100.0, 1), (2, 0.9, 1), (3, 1e9, 0)]
)
def test_the_gate_asks_next_about_what_is_as_near_as_it_has_to_be(at: int, used: float, expected: int) -> None:
    """By how far logits are off, and not by the number of steps."""
    off = Criterion("logit_rmse", used / 4, used / 4, used / 4, 0.25, "failed")
    outcomes = (replace(held(0.0), verdict="failed", criteria=(off,)), held(0.0))
    assert off.used == pytest.approx(used)
    history = [Made(Plan(""), ModelProto(), (), e) for e in (0.0, 0.001, 0.3, 0.35, 0.7, 1.0)]
    assert milder(history, at, outcomes) == expected
