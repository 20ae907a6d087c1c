"""The search on models that are not run: errors, bytes and seconds of every step are given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxrank.compress.gate import Limits
from onnxrank.compress.plan import Plan, Step
from onnxrank.compress.report import Point, Speed
from onnxrank.compress.search import Held, Made, Option, Search
from onnxrank.compress.statistics import Statistics
from onnxrank.network import Network
from tests.support.modelkit import graph

LAYERS = ("a", "b", "c")
SIZE, SECONDS = 1000, 1.0


class Given(Search):
    """Models that a table makes: what a step does alone, and what two do together beyond that."""

    def __init__(self, targets: tuple[float | None, float | None], together: Mapping[frozenset[str], float]) -> None:
        nodes = "a = MatMul(x, A) b = MatMul(x, B) r = Relu(b) c = MatMul(r, C) s = Add(a, c) y = Relu(s)"
        held = {n: np.ones((8, 8), np.float32) for n in "ABC"}
        model = graph(f"(float[N,8] x) => (float[N,8] y) {{ {nodes} }}", **held)
        nothing: Any = None
        super().__init__(
            model, Network(model), SIZE, Statistics(), nothing, nothing, Limits(), [], (), targets, False, "", False,
            {}, 0, 0.1, lambda _: None,
        )  # fmt: skip
        self.together = together
        self.known: list[Option] = []
        self.slower: Mapping[frozenset[str], float] = {}
        self.failing = math.inf

    def options(self) -> list[Option]:
        return self.known

    def made(self, plan: Plan, stats: Statistics | None = None) -> Made:
        done = [o for o in self.known if o.step in plan.steps]
        error = sum(o.error for o in done)
        error += sum(more for sites, more in self.together.items() if sites <= {o.step.site for o in done})
        return Made(plan, self.original, (), error)

    def passes(self, made: Made) -> bool:
        return made.error < self.failing

    def note(self, made: Made, step: str, site: str) -> None:
        done = [o for o in self.known if o.step in made.plan.steps]
        seconds = SECONDS - sum(o.seconds for o in done) + self.slower.get(frozenset(o.step.site for o in done), 0.0)
        left = SIZE - sum(o.bytes for o in done)
        speed = Speed(seconds, SECONDS / seconds, 0.0, 9.0)
        self.points.append(Point(step, site, left, 0, 0, speed, made.error, None, None))


def option(site: str, k: int, error: float, saved: int, seconds: float = 0.0) -> Option:
    return Option(Step(site, (("fp16", k),)), error, saved, seconds)


def test_a_place_gives_back_what_is_not_needed() -> None:
    """The last greedy step makes an earlier one needless."""
    search = Given((2.0, None), {})
    search.known = [option("a", 1, 1.0, 200), option("c", 1, 4.0, 500)]
    made = search.run()
    assert made.error == 4.0 and [s.site for s in made.plan.steps] == ["c"]
    assert [(p.step, p.site) for p in search.points] == [
        ("", ""), ("fp16 1", "a"), ("fp16 1", "c"), ("nothing", "a"),
    ]  # fmt: skip
    assert search.stopped == "targets" and search.history[-1] is made


def test_what_two_places_do_together_is_measured() -> None:
    """Alone the pair is best; together it is worse than what was expected of another."""
    search = Given((2.0, None), {frozenset("ac"): 5.0})
    search.known = [option("a", 1, 1.0, 300), option("b", 1, 1.9, 210), option("c", 1, 1.0, 220)]
    made = search.run()
    assert {s.site for s in made.plan.steps} == {"a", "c"} and made.error == 7.0  # nothing is expected to be better
    search = Given((2.0, None), {frozenset("ac"): -0.5, frozenset("bc"): 5.0})
    search.known = [option("b", 1, 1.0, 300), option("c", 1, 1.0, 220), option("a", 1, 0.9, 250)]
    made = search.run()
    assert {s.site for s in made.plan.steps} == {"a", "b"} and made.error == 1.9


def test_what_is_measured_to_be_no_better_is_not_kept() -> None:
    search = Given((2.0, None), {frozenset("c"): 9.0, frozenset("ac"): -9.0})
    search.known = [option("a", 1, 1.0, 300), option("c", 1, 2.0, 500)]
    made = search.run()
    assert {s.site for s in made.plan.steps} == {"a", "c"} and made.error == 3.0
    assert [p.site for p in search.points] == ["", "a", "c"] and len(search.history) == 3


def test_what_is_measured_to_be_too_slow_is_not_kept() -> None:
    search = Given((None, 1.25), {})
    search.known = [option("a", 1, 1.0, 0, 0.1), option("c", 1, 4.0, 0, 0.25)]
    search.slower = {frozenset("c"): 0.2}
    made = search.run()
    assert {s.site for s in made.plan.steps} == {"a", "c"} and search.reached()
    assert [p.site for p in search.points] == ["", "a", "c"] and len(search.history) == 3
    search = Given((None, 1.25), {})
    search.known = [option("a", 1, 1.0, 0, 0.1), option("c", 1, 4.0, 0, 0.25)]
    assert [s.site for s in search.run().plan.steps] == ["c"] and search.reached()


def test_the_loss_that_is_won_back_is_spent() -> None:
    """Where the target was not reached the search goes on with what an exchange leaves."""
    search = Given((4.0, None), {frozenset("ab"): 2.0})
    search.known = [
        option("a", 1, 1.0, 300), option("a", 2, 1.4, 320), option("b", 1, 1.5, 310), option("c", 1, 1.4, 300),
        option("a + b", 1, 2.0, 610),
    ]  # fmt: skip
    search.failing = 4.0
    made = search.run()
    assert {s.site for s in made.plan.steps} == {"a + b", "c"} and made.error == pytest.approx(3.4)
    assert search.points[-1].bytes == 90 and search.stopped == "targets"


def test_layers_and_what_they_share_exclude_each_other() -> None:
    search = Given((None, None), {})
    search.known = [option("a", 1, 1.0, 100), option("b", 1, 1.0, 90), option("a + b", 1, 1.5, 400)]
    assert {s.site for s in search.run().plan.steps} == {"a + b"}
    held: Held = {"a": search.known[0]}
    assert set(search._with(held, search.known[1])) == {"a", "b"}
    assert set(search._with(held, search.known[2])) == {"a + b"}
    both: Held = {"a + b": search.known[2]}
    assert set(search._with(both, search.known[0])) == {"a"}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(2.0, None), (None, 1.5), (1.5, 1.2), (None, None)]))
def test_neighbours_are_all_of_one_or_two_changes(seed: int, targets: tuple[float | None, float | None]) -> None:
    rng = np.random.default_rng(seed)
    search = Given(targets, {})
    search.known = [
        option(site, k, float(rng.integers(1, 20)), int(rng.integers(20, 200)), float(rng.integers(0, 20)) / 128)
        for site in (*LAYERS, "a + b") for k in (1, 2, 3)
    ]  # fmt: skip
    held: Held = {}
    for o in rng.permutation(np.array(search.known, dtype=object))[: int(rng.integers(1, 5))]:
        held = search._with(held, o)
    search.begin()
    search.note(search.made(Plan("", tuple(o.step for o in held.values()))), "some", "where")
    found = list(search._neighbours(held, search.known))
    errors = [sum(o.error for o in h.values()) for h in found]
    assert errors == sorted(errors) and all(e < sum(o.error for o in held.values()) for e in errors)
    for h in found:
        point = search.points[-1]
        search.note(search.made(Plan("", tuple(o.step for o in h.values()))), "other", "where")
        assert not search._lost(point, search.points.pop())
        assert len(set(h) - set(held)) <= 2
    expected = {frozenset(search._with(held, o).values()) for o in search.known}
    for site, old in held.items():
        rest = {s: o for s, o in held.items() if s != site}
        milder = [o for o in search.known if o.step.site == site and o.error < old.error]
        elsewhere = [o for o in search.known if not search._at({site: old}, o)]
        for less in (rest, *(search._with(rest, o) for o in milder)):
            expected |= {frozenset(search._with(less, o).values()) for o in elsewhere} | {frozenset(less.values())}

    def allowed(several: frozenset[Option]) -> bool:
        point = search.points[-1]
        search.note(search.made(Plan("", tuple(o.step for o in several))), "other", "where")
        after = search.points.pop()
        return after.logit_error < 0.98 * point.logit_error and not search._lost(point, after)

    assert {frozenset(h.values()) for h in found} == {several for several in expected if allowed(several)}
