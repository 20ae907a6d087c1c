"""The trace that the benchmark of serving replays, and in which order clients ask."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from scripts.serve_benchmark import Arrays, Request, Serve, Variant, race, users

ROW = {"score": np.zeros((1, 1), np.float32)}


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
def test_users_come_again_as_often_as_asked(rate: float) -> None:
    drawn = users(600, rate, np.random.default_rng(0))
    assert 1 - len(set(drawn)) / len(drawn) == pytest.approx(rate, abs=0.05)


def test_a_users_requests_follow_each_other() -> None:
    """Each is asked once, by many clients at the same time, but no user by two: states made are users."""
    lock, under_way, asked, most = threading.Lock(), set[int](), list[int](), [0]

    def serve(request: Request) -> Arrays:
        with lock:
            assert request.user not in under_way
            under_way.add(request.user)
            asked.append(request.user)
            most[0] = max(most[0], len(under_way))
        time.sleep(0.001)
        with lock:
            under_way.remove(request.user)
        return ROW

    def client() -> Serve:
        return serve

    trace = [Request(k * k % 5, {}, {}, {}) for k in range(90)]
    variant = Variant("any", client)
    race([variant], trace, [ROW] * len(trace), 4, Request(-1, {}, {}, {}))
    assert asked[:4] == [-1] * 4 and sorted(asked[4:]) == sorted(r.user for r in trace)
    assert len(variant.seconds) == 90 and variant.wrong == 0 and most[0] > 1
    assert variant.hits.count(False) == len({r.user for r in trace})


def test_a_client_that_fails_ends_the_run() -> None:
    def serve(request: Request) -> Arrays:
        if request.user == 3:
            raise ValueError("refused")
        return ROW

    trace = [Request(k % 5, {}, {}, {}) for k in range(40)]
    with pytest.raises(ValueError, match="refused"):
        race([Variant("any", lambda: serve)], trace, [ROW] * 40, 3, Request(-1, {}, {}, {}))
