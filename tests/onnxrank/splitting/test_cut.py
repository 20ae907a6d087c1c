"""The cut: as cheap as the cheapest of all divisions, found by trying every one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxrank.splitting.cut import PRICE, Cut, Impossible, Problem, Step, cost, divided, least


def _every(problem: Problem) -> Iterator[Cut]:
    """All divisions in which whatever a step of the request model reads is made there, and the state can be held."""
    steps = problem.steps
    maker = {name: k for k, s in enumerate(steps) for name in s.gives}
    for size in range(len(steps) + 1):
        for chosen in itertools.combinations(range(len(steps)), size):
            inside = frozenset(chosen)
            if any(maker.get(name, -1) not in inside | {-1} for k in inside for name in steps[k].reads):
                continue
            if any(s.seconds is None for k, s in enumerate(steps) if k not in inside):
                continue
            found = divided(problem, inside)
            if all(problem.sizes[name] is not None for name in found.state):
                yield found


@st.composite
def _problems(draw: st.DrawFn) -> Problem:
    sizes: dict[str, int | None] = {}
    size = st.one_of(st.integers(0, 20_000), st.integers(0, 20), st.none())
    for k in range(draw(st.integers(1, 3))):
        sizes[f"in{k}"] = draw(size)
    steps = []
    for k in range(draw(st.integers(0, 9))):
        reads = draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, max_size=3, unique=True))
        gives = [f"t{k}.{j}" for j in range(draw(st.integers(1, 2)))]
        sizes |= {name: draw(size) for name in gives}
        seconds = draw(st.one_of(st.floats(0, 2e-5), st.just(0.0), st.none()))
        steps.append(Step(tuple(reads), tuple(gives), seconds))
    wanted = draw(st.lists(st.sampled_from(sorted(sizes)), min_size=1, max_size=3, unique=True))
    return Problem(steps, sizes, wanted)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(_problems(), st.sampled_from([PRICE, 1e-10, 1e-7, 1.0]))
def test_no_division_is_cheaper(problem: Problem, price: float) -> None:
    every = list(_every(problem))
    if not every:
        with pytest.raises(Impossible):
            least(problem, price)
        return
    found = least(problem, price)
    assert found in every  # nothing reads what is made behind the cut, and the state can be held
    assert cost(problem, found, price) == min(cost(problem, other, price) for other in every)
    # Whatever takes no more time per call has no smaller state.
    quick = [other for other in every if _late(problem, other) <= _late(problem, found)]
    assert found.bytes <= 1.05 * min(other.bytes for other in quick)
    if price == 1.0:  # bytes decide alone
        assert found.bytes == min(other.bytes for other in every)


def _late(problem: Problem, cut: Cut) -> int:
    return cost(problem, cut, 0.0)


def _step(reads: str, gives: str, seconds: float | None = 1e-6) -> Step:
    return Step(tuple(reads.split()), tuple(gives.split()), seconds)


def test_an_expander_goes_behind_the_cut() -> None:
    steps = [_step("user", "tower", 1e-4), _step("tower", "repeated", 1.5e-6), _step("repeated", "row", 0.0)]
    problem = Problem(steps, {"user": 40, "tower": 256, "repeated": 50_000, "row": 50_000}, ["row"])
    found = least(problem)
    assert found.state == ("tower",) and found.request == {0}


def test_what_takes_long_stays_in_front() -> None:
    steps = [_step("user", "tower", 1e-3)]
    found = least(Problem(steps, {"user": 8, "tower": 4096}, ["tower"]))
    assert found.state == ("tower",) and found.request == {0}


def test_work_that_is_cheaper_than_its_bytes_is_done_again() -> None:
    steps = [_step("user", "row", 2e-6)]
    found = least(Problem(steps, {"user": 8, "row": 100_000}, ["row"]))
    assert found.state == ("user",) and found.request == frozenset()


def test_what_a_state_cannot_hold_is_done_again() -> None:
    steps = [_step("user", "ids", 1e-5), _step("ids", "sequence", 1e-6)]
    found = least(Problem(steps, {"user": 8, "ids": 64, "sequence": None}, ["sequence"]))
    assert found.state == ("ids",)


def test_a_tensor_that_several_read_counts_once() -> None:
    steps = [_step("user", "h", 1e-3), _step("h", "a", 5e-7), _step("h", "b", 5e-7)]
    found = least(Problem(steps, {"user": 8, "h": 3000, "a": 2900, "b": 2900}, ["a", "b"]))
    assert found.state == ("h",)
    found = least(Problem(steps, {"user": 8, "h": 3000, "a": 1900, "b": 1900}, ["a", "b"]))
    assert found.state == ("a", "b")


def test_random_numbers_are_drawn_once() -> None:
    steps = [_step("user", "noise", None), _step("noise", "row", 1e-6)]
    found = least(Problem(steps, {"user": 8, "noise": 1000, "row": 100_000}, ["row"]))
    assert found.state == ("noise",)
    with pytest.raises(Impossible, match="noise"):
        least(Problem(steps, {"user": 8, "noise": None, "row": None}, ["row"]))


def test_many_steps_take_no_time() -> None:
    steps, sizes = [], {"user": 8}
    for k in range(4000):  # deeper than Python's stack
        steps.append(_step(f"t{k - 1}" if k else "user", f"t{k}"))
        sizes[f"t{k}"] = 400
    assert least(Problem(steps, sizes, ["t3999"])).state == ("t3999",)
