"""Statistics of interleaved times, with clocks and models that are made up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxrank.profiling.report import Line, Point, Times
from onnxrank.profiling.timing import RESOLUTION, Rounds, break_even, fit, interleave, point


class Machine:
    """Runs that take made-up times on a clock that they move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def model(self, name: str, seconds: Callable[[int], float]) -> Callable[[int], float]:
        count = iter(range(1 << 30))

        def run(request: int) -> float:
            took = seconds(next(count))
            self.now += took
            self.log.append(name)
            return took

        return run

    def clock(self) -> float:
        return self.now


def noisy(median: float, share: float, seed: int) -> Callable[[int], float]:
    rng = np.random.default_rng(seed)
    return lambda k: float(median * np.exp(share * rng.standard_normal()))


def test_turns_alternate() -> None:
    machine = Machine()
    rounds = interleave([machine.model(n, lambda k: 1.0) for n in "ab"], 20, machine.clock)
    assert "".join(machine.log) == "ab" + "ab" + "baab" * 4
    assert rounds.seconds.shape == (2, 9, 1) and not rounds.settled


def test_short_runs_are_many_in_a_turn_and_the_first_does_not_count() -> None:
    machine = Machine()
    # Whoever comes after the other one pays for cold caches once.
    before: list[str] = [""]

    def cold(name: str) -> Callable[[int], float]:
        def seconds(k: int) -> float:
            changed, before[0] = before[0] != name, name
            return 5e-3 if changed else 1e-3

        return seconds

    rounds = interleave([machine.model(n, cold(n)) for n in "ab"], 2, machine.clock)
    assert rounds.settled and rounds.seconds.shape[2] >= 4
    assert (rounds.seconds == 1e-3).all()


def test_a_model_that_is_much_slower_does_not_have_its_runs_by_the_fast_one() -> None:
    """At most the time of three rounds of one run each, however many runs of the other one fit into a turn."""
    machine = Machine()
    slow, fast = machine.model("s", lambda k: 0.8), machine.model("f", lambda k: 1e-3)
    rounds = interleave([slow, fast], 1, machine.clock)
    assert machine.log.count("s") == 1 + 3 and rounds.seconds.shape == (2, 3, 1)


def test_stops_when_narrow() -> None:
    machine = Machine()
    steady = interleave([machine.model(n, noisy(1e-2, 0.001, k)) for k, n in enumerate("ab")], 1000, machine.clock)
    spent = machine.now
    wild = interleave([machine.model(n, noisy(1e-2, 0.2, k)) for k, n in enumerate("ab")], 1000, machine.clock)
    assert steady.settled and wild.settled and machine.now - spent > 4 * spent


def test_drift_does_not_matter() -> None:
    """A machine that gets slower all the time: the medians say nothing, the ratio is right."""
    machine = Machine()
    slow = [machine.model("a", lambda k: 1 + k / 10), machine.model("b", lambda k: (1 + k / 10) / 2)]
    found = point(8, interleave(slow, 400, machine.clock), [None, None], 1e9)
    assert found.speedup is not None and found.speedup.ratio == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_no_significant_difference(seed: int) -> None:
    machine = Machine()
    same = [machine.model(n, noisy(1e-2, 0.05, 10 * seed + k)) for k, n in enumerate("ab")]
    speedup = point(8, interleave(same, 30, machine.clock), [None, None], 1e9).speedup
    assert speedup is not None and not speedup.significant and speedup.low <= speedup.ratio <= speedup.high


@pytest.mark.parametrize(("ratio", "told"), [(1 + RESOLUTION / 2, False), (1.1, True), (0.9, True)])
def test_small_differences_are_not_told(ratio: float, told: bool) -> None:
    seconds = np.stack([np.full((20, 3), ratio), np.ones((20, 3))])
    speedup = point(8, Rounds(seconds, True), [None, None], 1e9).speedup
    assert speedup is not None and speedup.ratio == pytest.approx(ratio) and speedup.significant is told


def test_percentiles() -> None:
    seconds = np.arange(1, 101, dtype=float).reshape(1, 10, 10)
    (times,) = point(5, Rounds(seconds, True), [0.5], 1e9).times
    assert (times.runs, times.median, times.candidates_per_second) == (100, 50.5, 5 / 50.5)
    assert times.p90 == pytest.approx(90.1) and times.p99 == pytest.approx(99.01) and times.copies == 0.5
    assert times.low <= times.median <= times.high


costs = st.floats(1e-7, 1e-2)


@given(costs, costs)
def test_fit_finds_a_line(once: float, each: float) -> None:
    numbers = [1, 32, 128, 512, 2048]
    line = fit(numbers, [once + each * n for n in numbers])
    assert line is not None and line.knee is None and line.error < 1e-6
    for n in (2, 100, 5000):
        assert line.at(n) == pytest.approx(once + each * n, rel=1e-5)


@given(costs, costs, st.sampled_from([128, 512]), st.floats(1.5, 10))
def test_fit_bends_where_a_candidate_gets_dearer(once: float, each: float, knee: int, factor: float) -> None:
    truth = Line(once, each, knee, each * factor, 0)
    numbers = [32, 128, 512, 2048]
    line = fit(numbers, [truth.at(n) for n in numbers])
    assert line is not None and line.error <= 0.05
    for n in (64, 256, 1024):
        assert line.at(n) == pytest.approx(truth.at(n), rel=0.15)


def test_fit_is_never_negative() -> None:
    line = fit([8, 64, 512], [3.0, 2.0, 1.0])
    assert line is not None and line.once > 0 and line.each == 0
    line = fit([8, 64, 512], [0.1, 64.0, 512.0])
    assert line is not None and line.once == 0 and line.each > 0


def test_a_single_candidate_runs_other_kernels() -> None:
    line = fit([1, 32, 128, 512], [0.1, 32, 128, 512])
    assert line is not None and line.each == pytest.approx(1) and line.error < 1e-9
    assert fit([7], [1.0]) is None


def points(*pairs: tuple[int, float, float]) -> list[Point]:
    return [Point(n, tuple(Times(1, t, t, t, t, t, n / t) for t in (a, b)), None, True, 1e9) for n, a, b in pairs]


@pytest.mark.parametrize(
    ("pairs", "kind", "candidates"),
    [
        ([(1, 2, 1), (8, 9, 4)], "always", 1),
        ([(1, 1, 5), (11, 21, 15)], "measured", 5),
        ([(1, 2, 1), (10, 1, 2), (20, 4, 2)], "measured", 14),
        ([(1, 1, 5), (2, 2, 5.5)], "extrapolated", 9),
        ([(1, 1, 5), (8, 8, 12)], "never", None),
        ([(1, 5, 1), (8, 8, 12)], "never", None),
    ],
)
def test_break_even(pairs: list[tuple[int, float, float]], kind: str, candidates: int | None) -> None:
    made = points(*pairs)
    lines = [fit([p.candidates for p in made], [p.times[k].median for p in made]) for k in (0, 1)]
    found = break_even(made, lines)
    assert (found.kind, found.candidates) == (kind, candidates)
