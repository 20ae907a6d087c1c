"""What is timed and is not faster is left out; nothing here depends on a clock."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers import Graph, run
from onnx import ModelProto

import onnxrank
from onnxrank import tune, workers
from onnxrank.cli.optimize import optimize as optimize_command
from onnxrank.contract import stored_contract
from onnxrank.errors import ModelError, UsageError
from onnxrank.joining import is_crossover
from onnxrank.passes import choosing, studying, timing
from onnxrank.passes.job import Job
from onnxrank.passes.options import Options
from onnxrank.passes.reading import described, read
from onnxrank.plans import Measured
from onnxrank.roles import resolve
from onnxrank.ruleset import choose_rules
from onnxrank.verify import gate

Clock = Callable[[ModelProto, int], float]


def ranker() -> ModelProto:
    """Fields that are multiplied in pairs, and pooled, before a layer: `fold`, `pool` and `fc` apply."""
    g, rng = Graph(), np.random.default_rng(0)
    user, item = g.input("user", ["N", 6, 16]), g.input("item", ["N", 2, 16])
    pairs = g.op("Mul", user, g.op("Slice", item, g.ints(0), g.ints(1), g.ints(1)))
    fields = g.op("Concat", item, user, axis=1)
    pooled = g.on_axes("ReduceSum", fields, [1], keepdims=0)
    flat = g.op("Reshape", g.op("Concat", pairs, fields, axis=1), g.ints(-1, 224))
    weight, bias = rng.integers(-2, 3, (240, 64)), rng.integers(0, 3, 64)
    hidden = g.op("Relu", g.op("Gemm", g.op("Concat", flat, pooled, axis=1), g.const(weight), g.const(bias)))
    g.output(g.op("MatMul", hidden, g.const(rng.integers(-2, 3, (64, 1)))), ["N", 1])
    return g.model()


def rules_of(made: ModelProto) -> set[str]:
    return {p.value for n in made.graph.node for p in n.metadata_props if p.key == "onnxrank.rule"}


def tuned(clock: Clock, gain: float = 0.0, **options: Any) -> tuple[ModelProto, onnxrank.Result]:
    """The ranker, timed by a clock that tells the ratio at a number of candidates; `gain` has to be predicted."""

    def measure(race: tune.Race, made: ModelProto, feeds: Sequence[Any], seconds: float) -> tuple[Measured, ...]:
        assert len(feeds) == len(race.points)
        return tuple(Measured(n, r, r * 0.99, r * 1.01) for n in race.points for r in [clock(made, n)])

    model = ranker()
    with mock.patch.object(tune.Race, "measure", measure), mock.patch.object(choosing, "LEAST_GAIN", gain):
        return model, onnxrank.optimize(model, request=["user"], **{"tune": 1.0, **options})


def agree(model: ModelProto, result: onnxrank.Result) -> None:
    rng = np.random.default_rng(1)
    for n in (1, 3, 100):
        user, item = (rng.integers(-2, 3, s).astype(np.float32) for s in ((1, 6, 16), (n, 2, 16)))
        old = run(model, {"user": np.repeat(user, n, 0), "item": item})
        new = run(result.model, {"user": user if result.changed else np.repeat(user, n, 0), "item": item})
        np.testing.assert_array_equal(*(next(iter(x.values())) for x in (old, new)))


def test_what_is_faster_is_kept() -> None:
    model, result = tuned(lambda made, n: 1.5, candidates=(32, 2048))
    agree(model, result)
    assert result.changed and not result.report.retreats
    seen = {p.candidates: p.measured for p in result.report.predictions if p.measured is not None}
    assert seen == {32: 1.5, 256: 1.5, 2048: 1.5}
    assert {p.candidates for p in result.report.predictions} > {1, 8, 512}
    contract = stored_contract(result.model)
    assert contract is not None and [m["ratio"] for m in contract["plan"]["measured"]] == [1.5] * 3


def test_what_is_timed_need_not_be_predicted_to_gain_much() -> None:
    """The clock decides, where there is one."""
    assert not tuned(lambda made, n: 1.5, gain=1e9, tune=0.0)[1].changed
    model, result = tuned(lambda made, n: 1.5, gain=1e9, candidates=2048)
    agree(model, result)
    assert result.changed and result.plan.measured
    assert not tuned(lambda made, n: 1.5, gain=1e9, candidates=1)[1].changed


def test_the_rule_that_is_slow_is_left_out() -> None:
    """The rest is kept; the plan gives the same bytes without a clock."""
    model, result = tuned(lambda made, n: 0.5 if "fold" in rules_of(made) else 1.2)
    agree(model, result)
    assert result.changed and rules_of(result.model) and "fold" not in rules_of(result.model)
    assert [(r.rule, r.node, r.cause) for r in result.report.retreats] == [("fold", None, "tune")]
    assert "0.5x at N = 512" in result.report.retreats[0].reason
    with mock.patch.object(tune.Race, "measure", side_effect=AssertionError):
        again = onnxrank.optimize(model, plan=result.plan)
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)


def test_two_rules_that_are_slow_together() -> None:
    """Leaving out one is not enough to be faster, so another is left out as well."""

    def clock(made: ModelProto, n: int) -> float:
        return 1.1 - 0.4 * ("fold" in rules_of(made)) - 0.2 * ("pool" in rules_of(made))

    model, result = tuned(clock)
    agree(model, result)
    assert result.changed and rules_of(result.model) == {"fc", "movement"}
    assert {r.rule for r in result.report.retreats} == {"fold", "pool"}


def test_slow_without_any_rule() -> None:
    """The original is kept, with the reason."""
    model, result = tuned(lambda made, n: 0.9)
    assert not result.changed and result.model is not None
    assert [(r.rule, r.cause) for r in result.report.retreats] == [("", "tune")]
    assert any("given up" in note and "0.9x" in note for note in result.report.notes)
    assert not result.plan.changed
    again = onnxrank.optimize(model, plan=result.plan)
    assert not again.changed


def test_slower_at_an_end_of_the_range() -> None:
    _, result = tuned(lambda made, n: 0.8 if n == 8 else 1.5, candidates=(8, 512))
    assert not result.changed


@pytest.mark.slow
def test_a_caller_may_allow_a_loss_at_an_end_of_the_range() -> None:
    def clock(made: ModelProto, n: int) -> float:
        return 0.8 if n == 8 else 1.5

    refused = tuned(clock, candidates=(8, 512))[1]
    assert any("--slowdown 26 would allow" in note for note in refused.report.notes)
    assert not tuned(clock, candidates=(8, 512), slowdown=0.2)[1].changed
    model, result = tuned(clock, candidates=(8, 512), slowdown=0.26)
    agree(model, result)
    assert result.changed and [m.ratio for m in result.plan.measured if m.candidates == 8] == [0.8]
    for little in (0.9, 1.1):  # what is gained does not make up for what is lost
        assert not tuned(lambda made, n, r=little: r if n == 512 else 0.8, candidates=(8, 512), slowdown=0.26)[
            1
        ].changed
    with pytest.raises(UsageError, match="slowdown"):
        onnxrank.optimize(model, request=["user"], slowdown=-0.1)


def test_the_command_allows_what_the_library_does() -> None:
    (option,) = (p for p in optimize_command.params if p.name == "slowdown")
    assert option.default == round(100 * tune.SLOWDOWN, 6)


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        ([(512, 1.5, 1.4, 1.6)], True),
        ([(512, 1.5, 0.9, 2.1)], False),  # noise
        ([(512, 1.01, 1.005, 1.02)], False),  # less than two sessions of one model differ by
        ([(512, 1.5, 1.4, 1.6), (1, 0.8, 0.7, 1.1)], True),
        ([(512, 1.5, 1.4, 1.6), (1, 0.8, 0.7, 0.9)], False),
        ([(512, 1.5, 1.4, 1.6), (1, 0.981, 0.98, 0.982)], False),  # somebody else may measure a loss
    ],
)
def test_beyond_noise(measured: list[tuple[int, float, float, float]], found: bool) -> None:
    assert tune.faster([Measured(*m) for m in measured]) is found


@pytest.mark.slow
def test_a_loss_between_the_ends_counts() -> None:
    """A range is looked at in steps, not at its ends alone."""
    _, result = tuned(lambda made, n: 0.8 if n == 8 else 1.5, candidates=(1, 4096))
    assert not result.changed
    assert any("0.8x at N = 8" in note for note in result.report.notes)
    _, result = tuned(lambda made, n: 1.5, candidates=(1, 4096))
    assert [m.candidates for m in result.plan.measured] == [64, 1, 4096, 8, 512]
    assert tune.between((32, 2048), 256) == tune.between((2, 8), 4) == tune.between((7, 7), 7) == ()


def test_a_gain_for_many_alone_counts() -> None:
    assert tune.faster([Measured(64, 1.0, 0.99, 1.01), Measured(1, 0.99, 0.98, 1.0), Measured(4096, 1.3, 1.2, 1.4)])


@pytest.mark.slow
def test_for_few_candidates_the_original_may_stand() -> None:
    """Where one plan was predicted to be enough, and is measured to lose at few: the clock finds the second."""

    def clock(made: ModelProto, n: int) -> float:
        return 1.2 if any(map(is_crossover, made.graph.node)) else 0.8 if n < 50 else 1.5

    with mock.patch.object(choosing.crossover, "find", return_value=None):
        model, result = tuned(clock, candidates=(1, 4096), blocks=0)
    agree(model, result)
    assert result.plan.few is not None and 8 < result.plan.few.below <= 64
    assert "fold" in {s.place.rule for s in result.plan.sites if s.taken} and not result.plan.few.rules
    assert any("for few candidates the original stands" in n for n in result.report.notes)
    again = onnxrank.optimize(model, plan=result.plan)
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)
    slow = tuned(lambda made, n: 0.8 if n < 50 else 1.5, candidates=(1, 4096), blocks=0)[1]
    assert slow.plan.few is None and not slow.changed


def test_what_is_timed_again_has_the_interval_of_all() -> None:
    tries = [[Measured(1, r, r - 0.001, r + 0.001)] for r in (0.96, 1.01, 0.98)]
    assert tune.middle(tries) == (Measured(1, 0.98, 0.96, 1.01),)
    assert tune.middle(tries[:1]) == (Measured(1, 0.96, 0.959, 0.961),)
    tries += [[Measured(1, r, r, r)] for r in (0.9, 0.99)]
    assert tune.middle(tries) == (Measured(1, 0.98, 0.96, 0.99),)  # without the outermost
    assert tune.near([Measured(1, 0.99, 0.98, 1.0)]) and not tune.near([Measured(1, 0.9, 0.8, 1.0)])


@pytest.mark.parametrize(
    ("sessions", "expected"),
    [
        ([0.97, 0.99, 0.985], 0.985),  # a loss in all of them, which is small
        ([0.96, 1.0, 0.99, 0.98, 1.01], 0.99),
        ([0.96, 1.04, 0.93, 0.95, 0.94], None),  # one did not see it, which says nothing
    ],
)
def test_a_loss_that_may_be_none_is_timed_again(sessions: list[float], expected: float | None) -> None:
    """Where the memory of sessions lies makes some of it: the median of three counts, of five if they do not agree."""
    calls: list[float] = []

    def clock(made: ModelProto, n: int) -> float:
        calls.append(n)
        if n > 1:
            return 1.5
        return sessions[calls.count(1) - 1] if calls.count(1) <= len(sessions) else 0.9

    _, result = tuned(clock, candidates=(1, 9))
    assert result.changed == (expected is not None)
    if result.changed:
        assert calls.count(1) == len(sessions)
        assert {m.candidates: m.ratio for m in result.plan.measured} == {3: 1.5, 1: expected, 9: 1.5}
    surely = Measured(1, 0.9, 0.89, 0.91)
    assert not tune.unsure([Measured(3, 1.5, 1.4, 1.6), surely])
    assert tune.unsure([Measured(3, 1.5, 1.4, 1.6), Measured(1, 0.9, 0.8, 1.1)])
    assert not tune.unsure([Measured(3, 1.5, 1.4, 1.6), Measured(1, 0.99, 0.98, 1.1)])


@pytest.mark.slow
def test_another_way_is_taken() -> None:
    """One of those that the model can be rewritten in, where leaving out two rules is not enough."""
    model, result = tuned(lambda made, n: 1.5 if rules_of(made) == {"movement"} else 0.9, candidates=(1, 4096))
    agree(model, result)
    assert result.changed and rules_of(result.model) == {"movement"}
    assert any("in another way" in note for note in result.report.notes)
    again = onnxrank.optimize(model, plan=result.plan)
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)


def test_what_takes_long_to_time_is_not_tried_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def clock(made: ModelProto, n: int) -> float:
        calls.append(n)
        return 0.9

    ticks = itertools.count(0.0, 100.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    assert not tuned(clock)[1].changed
    assert len(calls) == 2  # the result, and that without its first rule


def test_for_a_range_the_clock_decides_what_is_predicted_to_lose_somewhere() -> None:
    """Three operators more for one candidate are a loss, as predicted; not as measured."""
    with mock.patch.object(choosing.crossover, "find", return_value=None):
        assert not tuned(lambda made, n: 1.5, tune=0.0, candidates=(1, 4096), gain=1.01)[1].changed
        model, result = tuned(lambda made, n: 1.5, candidates=(1, 4096))
    agree(model, result)
    assert "fold" in rules_of(result.model)


@pytest.mark.parametrize(("least", "left"), [(2, True), (50, False)])
def test_timing_begins_where_the_original_runs(least: int, left: bool) -> None:
    """Some models take away the axis of a single candidate; they are not left alone for that."""

    def clock(made: ModelProto, n: int) -> float:
        if n < least:
            raise ModelError(f"onnxruntime cannot run the model at N = {n}")
        return 1.5

    model, result = tuned(clock, candidates=(1, 4096))
    agree(model, result)
    assert result.changed == left
    said = [n for n in result.report.notes if "the original does not run at N = 1" in n]
    assert len(said) == left and all(m.candidates >= least for m in result.plan.measured)


def test_a_race() -> None:
    """Both models run, in one process, at every point; what cannot run is told."""
    model = ranker()
    loaded = read(model)
    options = Options(span=(2, 8), rules=choose_rules(None, (), ()), tune=0.01)
    job = Job(loaded, resolve(described(loaded), request=["user"]), options)
    assert studying.study(job)
    choosing.choose(job, job.preparation.candidates())
    timing.measure(job)
    assert [m.candidates for m in job.measured] == [4, 2, 8] or job.form is None
    assert all(m.low <= m.ratio <= m.high for m in job.measured)


def test_a_race_has_a_process_of_its_own() -> None:
    """One that ran other models before tells less."""
    model = ranker()
    feeds = [{"user": np.ones((2, 6, 16), np.float32), "item": np.ones((2, 2, 16), np.float32)}]
    race = tune.Race(read(model), (2,), tuple(feeds))
    with mock.patch.object(workers, "take", side_effect=AssertionError), mock.patch.object(workers, "give") as give:
        (measured,) = race.measure(model, feeds, 0.01)
    assert measured.candidates == 2 and measured.ratio > 0
    give.assert_not_called()


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_odd_times(seconds: float) -> None:
    with pytest.raises(UsageError, match="tune"):
        onnxrank.optimize(ranker(), request=["user"], tune=seconds)


@pytest.mark.slow
def test_the_check_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left after timing is held against the original, too."""
    calls: list[int] = []
    real = gate.gate

    def counted(*args: Any, **how: Any) -> Any:
        calls.append(1)
        return real(*args, **how)

    monkeypatch.setattr(gate, "gate", counted)
    _, result = tuned(lambda made, n: 0.5 if "fold" in rules_of(made) else 1.2)
    assert result.changed and len(calls) == 2
