"""Orders of candidates, against their definitions."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onnxrank.verify import ranking

SCORES = st.lists(st.integers(-6, 6), min_size=0, max_size=9)


@given(SCORES, st.randoms(use_true_random=False), st.integers(1, 5), st.integers(0, 2))
def test_order(before: list[int], random: object, top_k: int, tie: int) -> None:
    """Pair by pair, as one would write it down."""
    after = list(before)
    random.shuffle(after)  # type: ignore[attr-defined]
    a, b = np.array(before, np.float32), np.array(after, np.float32)
    found = ranking.order(a, b, tie, top_k)
    n = len(a)
    wrong = [
        [abs(a[i] - a[j]) > tie and np.sign(a[i] - a[j]) != np.sign(b[i] - b[j]) for j in range(n)] for i in range(n)
    ]
    clear = sum(a[i] - a[j] > tie for i in range(n) for j in range(n))
    bad = sum(map(sum, wrong)) / 2
    assert found.move == max(map(sum, wrong), default=0)
    assert np.isclose(found.tau, (clear - 2 * bad) / clear if clear else 1.0)
    assert 0 <= found.overlap <= 1


@given(SCORES)
def test_same_order(before: list[int]) -> None:
    a = np.array(before, np.float32)
    assert ranking.order(a, 2 * a + 1, 0, 3) == ranking.Order(1.0, 1.0, 0, None)


def test_ties_and_nan() -> None:
    """What ties may change places; equal scores where there were different ones are a loss; NaN ranks last."""
    a = np.array([3.0, 2.0, 1.0])
    assert ranking.order(a, a[[1, 0, 2]], 1.0, 1).move == 0
    assert ranking.order(a, a[[1, 0, 2]], 0.5, 1) == ranking.Order(0.0, 1 / 3, 1, 0)
    assert ranking.order(a, np.zeros(3), 0.5, 1).tau == -1
    assert ranking.order(np.array([1.0, np.nan]), np.array([0.5, np.nan]), 0.1, 1).move == 0
    assert ranking.order(np.array([1.0, np.nan]), np.array([np.nan, 1.0]), 0.1, 1).move == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12))
def test_auc(data: list[tuple[int, bool]]) -> None:
    scores, labels = np.array([s for s, _ in data], float), np.array([y for _, y in data], bool)
    pairs = [(p > q) + 0.5 * (p == q) for p in scores[labels] for q in scores[~labels]]
    found = ranking.auc(scores, labels)
    assert found is None if not pairs else np.isclose(found or 0, np.mean(pairs))


def test_logloss() -> None:
    y = np.array([1, 0])
    assert np.allclose(ranking.logloss(np.array([0.5, 0.25]), y), [np.log(2), -np.log(0.75)])  # type: ignore[arg-type]
    assert ranking.logloss(np.array([0.5, 1.25]), y) is None
    assert np.isfinite(ranking.logloss(np.array([0.0, 1.0]), y)).all()  # type: ignore[arg-type]


def test_rank() -> None:
    scores = np.array([0.5, np.nan, 2.0, 0.5])
    assert [ranking.rank(scores, k) for k in range(4)] == [2, 4, 1, 2]


def test_columns() -> None:
    assert ranking.columns(np.zeros((3, 2), np.float32), 3).shape == (3, 2)  # type: ignore[union-attr]
    assert ranking.columns(np.zeros(3, np.float32), 3).shape == (3, 1)  # type: ignore[union-attr]
    assert ranking.columns(np.zeros((1, 2), np.float32), 3) is None
    assert ranking.columns(np.zeros(3, np.int64), 3) is None
    assert ranking.columns(np.zeros((3, 400), np.float32), 3) is None
