"""One file for every number of candidates: when two plans are taken, and what a file of two has to stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from helpers import Graph, run, session
from onnx import ModelProto, numpy_helper

import onnxrank
from onnxrank import cost, crossover, tune
from onnxrank.contract import stored_contract
from onnxrank.crossover import Pair
from onnxrank.errors import UsageError
from onnxrank.graphs import attribute
from onnxrank.joining import ALONE, NAME, crossovers, is_crossover
from onnxrank.plans import Measured, Plan
from onnxrank.profiling.engine import profile
from onnxrank.values import CANDIDATES
from onnxrank.verify import Options, verify

WIDE = (1, 4096)


@cache
def ranker(dead: bool = False) -> ModelProto:
    """Experts over a user and an item: each is one operator more when it is divided, which pays for many.

    With `dead` there is a layer behind them of which a unit does nothing: it is packed away before any rule looks.
    """
    g, rng = Graph(), np.random.default_rng(0)
    user, item = g.input("user", ["N", 96]), g.input("item", ["N", 32])
    both = g.op("Concat", user, item, axis=1)
    hidden = []
    for _ in range(24):
        weight, bias = g.const(rng.integers(-2, 3, (128, 48))), g.const(rng.integers(0, 3, 48))
        hidden.append(g.op("Relu", g.op("Gemm", both, weight, bias)))
    last = g.op("Sum", *hidden)
    if dead:
        kept = np.arange(48) != 5
        last = g.op("Relu", g.op("Gemm", last, g.const(rng.integers(-2, 3, (48, 48)) * kept), g.const(1.0 * kept)))
    g.output(g.op("MatMul", last, g.const(rng.integers(-2, 3, (48, 1)))), ["N", 1])
    return g.model()


@cache
def made(interface: str = "request") -> onnxrank.Result:
    return onnxrank.optimize(ranker(), request=["user"], candidates=WIDE, interface=interface)


def below(result: onnxrank.Result) -> int:
    assert result.plan.few is not None
    return result.plan.few.below


def agree(result: onnxrank.Result, counts: Sequence[int]) -> None:
    rng = np.random.default_rng(1)
    for n in counts:
        user, item = (rng.integers(-2, 3, s).astype(np.float32) for s in ((1, 96), (n, 32)))
        repeated = np.repeat(user, n, 0)
        old = run(ranker(), {"user": repeated, "item": item})
        new = run(result.model, {"user": user if result.report.interface == "request" else repeated, "item": item})
        for name in old:
            np.testing.assert_array_equal(old[name], new[name], err_msg=f"N = {n}")


def branch(model: ModelProto, name: str) -> onnx.GraphProto:
    found: onnx.GraphProto = attribute(next(filter(is_crossover, model.graph.node)), name)
    return found


@pytest.mark.parametrize("interface", ["request", "same"])
def test_two_plans_where_one_is_not_enough(interface: str) -> None:
    result = made(interface)
    at = below(result)
    assert 1 < at < 4096
    assert result.report.below == at
    agree(result, (0, 1, at - 1, at, at + 1, 4096))
    ratios = [p.ratio for p in result.report.predictions]
    assert ratios == sorted(ratios)
    assert ratios[0] > 0.7
    assert ratios[-1] > 1.5


def test_what_costs_decide_is_decided_for_many_too() -> None:
    """Pairs of fields before a layer: weights made anew per request pay for 256 candidates, and not for 16."""
    users, items, d, width = 8, 12, 16, 256
    g, rng = Graph(), np.random.default_rng(0)
    user, item = g.input("user", [1, users, d]), g.input("item", ["N", items, d])
    pairs = g.op("Mul", g.on_axes("Unsqueeze", item, [1]), g.on_axes("Unsqueeze", user, [2]))
    flat = g.op("Reshape", pairs, g.ints(-1, users * items * d))
    g.output(g.op("MatMul", flat, g.const(rng.integers(-2, 3, (users * items * d, width)))), ["N", width])
    assert not onnxrank.optimize(g.model(), request=["user"], candidates=16).changed
    result = onnxrank.optimize(g.model(), request=["user"], candidates=(1, 256))
    assert [s.chosen for s in result.plan.sites if s.place.rule == "fold"] == ["take"]
    assert 1 < below(result) < 256
    again = onnxrank.optimize(g.model(), plan=result.plan)
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)
    for n in (0, 1, below(result) - 1, below(result), 4096):
        data = {"user": rng.integers(-2, 3, (1, users, d)), "item": rng.integers(-2, 3, (n, items, d))}
        feeds = {name: x.astype(np.float32) for name, x in data.items()}
        for old, new in zip(*(run(m, feeds).values() for m in (g.model(), result.model)), strict=True):
            np.testing.assert_array_equal(old, new, err_msg=f"N = {n}")


def test_the_guard_holds_on_both_sides() -> None:
    result = made("same")
    for n in (2, below(result) + 3):
        user = np.ones((n, 96), np.float32)
        user[-1] = 2
        (scores,) = run(result.model, {"user": user, "item": np.ones((n, 32), np.float32)}).values()
        assert np.isnan(scores).all()


def test_one_plan_where_the_range_is_narrow() -> None:
    for span in (512, (1024, 4096)):
        result = onnxrank.optimize(ranker(), request=["user"], candidates=span, check=False)
        assert result.changed
        assert result.plan.few is None
        assert not any(map(is_crossover, result.model.graph.node))


def test_the_check_runs_around_the_crossover() -> None:
    at = below(made())
    assert {at - 1, at, at + 1} <= {c.candidates for c in made().report.checks}


def test_weights_are_stored_once() -> None:
    single = onnxrank.optimize(ranker(), request=["user"], candidates=512, check=False)
    assert made().model.ByteSize() < 1.1 * max(single.model.ByteSize(), ranker().ByteSize())


def test_a_plan_of_two_is_replayed_to_the_same_bytes(tmp_path: Path) -> None:
    result = made()
    file = tmp_path / "plan.json"
    file.write_text(result.plan.to_json())
    again = onnxrank.optimize(ranker(), plan=file, check="quick")
    assert again.model.SerializeToString() == result.model.SerializeToString()
    assert Plan.from_dict(json.loads(file.read_text())) == result.plan
    stored = stored_contract(result.model)
    assert stored is not None
    told = Plan.from_contract(stored)
    assert told.few is not None
    assert told.few.below == below(result)
    from_contract = onnxrank.optimize(ranker(), plan=told, check=False)
    assert from_contract.model.SerializeToString() == result.model.SerializeToString()


def test_the_crossover_of_a_plan_may_be_edited() -> None:
    told = made().plan.to_dict()
    told["few"]["below"] = 100
    result = onnxrank.optimize(ranker(), plan=Plan.from_dict(told))
    assert result.report.below == 100
    agree(result, (99, 100, 101))


def test_a_plan_with_a_broken_crossover_is_refused() -> None:
    told = made().plan.to_dict()
    told["few"]["below"] = "many"
    with pytest.raises(UsageError, match="cannot be read"):
        Plan.from_dict(told)


@pytest.mark.parametrize("name", ["then_branch", "else_branch"])
def test_a_wrong_branch_is_found(name: str) -> None:
    damaged = ModelProto()
    damaged.CopyFrom(made().model)
    graph = branch(damaged, name)
    last = graph.output[0].name
    node = next(n for n in graph.node if last in n.output)
    node.output[0] = "undamaged"
    graph.node.append(onnx.helper.make_node("Neg", ["undamaged"], [last]))
    report = verify(ranker(), damaged, Options(level="standard"))
    assert not report.passed
    assert (min(c.candidates for c in report.failed_cases) < below(made())) == (name == "then_branch")


@pytest.mark.slow
def test_a_second_plan_that_fails_the_check_is_taken_back() -> None:
    whole = Pair.model

    def wrong(self: Pair, *many: ModelProto) -> ModelProto | None:
        model = whole(self)
        assert model is not None
        graph = branch(model, "then_branch")
        last = graph.output[0].name
        next(n for n in graph.node if last in n.output).output[0] = "undamaged"
        graph.node.append(onnx.helper.make_node("Neg", ["undamaged"], [last]))
        return model

    with mock.patch.object(Pair, "model", wrong):
        result = onnxrank.optimize(ranker(), request=["user"], candidates=WIDE)
    assert result.plan.few is None
    assert [r.rule for r in result.report.retreats] == [crossover.RULE]
    assert any("one plan was kept" in n for n in result.report.notes)
    if result.changed:
        agree(result, (1, 5, 100))


def test_it_is_not_optimised_twice() -> None:
    again = onnxrank.optimize(made().model, candidates=WIDE)
    assert not again.changed
    assert "optimised before" in again.report.notes[0]


def test_for_another_use_the_plan_for_many_is_optimised() -> None:
    again = onnxrank.optimize(made().model, candidates=2048)
    if again.changed:
        agree(again, (1, 100))


@pytest.mark.slow
def test_a_profile_looks_into_the_plan_that_runs() -> None:
    """Kernels of either plan have their level and rule, and the `If` is told for what it costs itself."""
    times = onnxrank.profile(made().model, candidates=[2, 64], seconds=0.01, memory=False)
    for kernels in times.models[0].kernels:
        spent = sum(k.seconds for k in kernels.levels)
        assert spent == pytest.approx(kernels.seconds)
        assert kernels.seconds < kernels.session
    few, many = ({s.name for s in k.rules} for k in times.models[0].kernels)
    assert "fc" in many - few


@pytest.mark.slow
def test_it_is_timed_around_the_crossover(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured moves the crossover, and is replayed."""
    asked: list[tuple[int, ...]] = []

    def measure(race: tune.Race, made: ModelProto, feeds: Sequence[Any], seconds: float) -> tuple[Measured, ...]:
        asked.append(race.points)
        both = any(map(is_crossover, made.graph.node))
        ratios = [2.0 if both else 1.5 if n >= 7 else 0.5 for n in race.points]
        return tuple(Measured(n, r, r * 0.99, r * 1.01) for n, r in zip(race.points, ratios, strict=True))

    monkeypatch.setattr(tune.Race, "measure", measure)
    result = onnxrank.optimize(ranker(), request=["user"], candidates=WIDE, tune=1.0, check="quick")
    assert asked[0] == (1,)  # what a single candidate alone would get
    assert set(asked[2]) == {1, 64, 4096}
    slower = max(n for n in asked[1] if n < 7)
    assert slower < below(result) <= min(n for n in asked[1] if n >= 7)
    agree(result, (1, below(result) - 1, below(result)))
    assert onnxrank.optimize(ranker(), plan=result.plan, check=False).model == result.model


@pytest.fixture(scope="module")
def alone() -> onnxrank.Result:
    """Two plans that are measured to be slower for a single candidate, unless that has a branch of its own."""

    def measure(race: tune.Race, made: ModelProto, feeds: Sequence[Any], seconds: float) -> tuple[Measured, ...]:
        slow = [not any(n.name == ALONE for n in made.graph.node)] if any(crossovers(made.graph)) else []
        ratios = [0.9 if n == 1 and any(slow) else 2.0 if slow or n >= 7 else 0.5 for n in race.points]
        return tuple(Measured(n, r, r * 0.99, r * 1.01) for n, r in zip(race.points, ratios, strict=True))

    with mock.patch.object(tune.Race, "measure", measure):
        return onnxrank.optimize(ranker(), request=["user"], candidates=WIDE, tune=1.0, check="quick")


def test_a_single_candidate_has_a_branch_where_both_lose_there(alone: onnxrank.Result) -> None:
    assert alone.plan.few is not None and alone.plan.few.alone and alone.report.retreats == []
    agree(alone, (0, 1, 2, below(alone) - 1, below(alone), 90))
    assert onnxrank.optimize(ranker(), plan=alone.plan, check=False).model == alone.model
    kept = Plan.from_dict(alone.plan.to_dict())
    assert kept == alone.plan


@pytest.mark.slow
def test_both_plans_are_found_behind_a_single_candidate(alone: onnxrank.Result) -> None:
    """By a profile, which looks at either, by `verify`, and by whoever optimises for another use."""
    times = onnxrank.profile(alone.model, candidates=[1, 2, 64], seconds=0.01, memory=False)
    _, few, many = ({s.name for s in k.rules} for k in times.models[0].kernels)
    assert "fc" in many - few
    held = verify(ranker(), alone.model, Options(level="quick"))
    assert held.passed
    again = onnxrank.optimize(alone.model, candidates=2048)
    if again.changed:
        agree(again, (1, 100))


@pytest.mark.slow
@pytest.mark.parametrize("turn", [200, 9000])
def test_the_crossover_is_looked_for_until_it_is_found(monkeypatch: pytest.MonkeyPatch, turn: int) -> None:
    """It may be predicted at far too few candidates."""
    asked: list[tuple[int, ...]] = []

    def measure(race: tune.Race, made: ModelProto, feeds: Sequence[Any], seconds: float) -> tuple[Measured, ...]:
        if any(map(is_crossover, made.graph.node)):
            return tuple(Measured(n, 2.0, 1.9, 2.1) for n in race.points)
        asked.append(race.points)
        return tuple(Measured(n, r := 1.5 if n >= turn else 0.5, r, r) for n in race.points)

    monkeypatch.setattr(tune.Race, "measure", measure)
    result = onnxrank.optimize(ranker(), request=["user"], candidates=WIDE, tune=1.0, check="quick", blocks=0)
    points = [n for more in asked for n in more]
    assert len(asked) > 1 and points == sorted(set(points)) and points[-1] <= WIDE[1]
    if turn <= WIDE[1]:
        assert max(n for n in points if n < turn) < below(result) <= points[-1]
        assert points[-2] < 2 * turn
    else:
        assert points[-1] == WIDE[1] < below(result)


@pytest.mark.slow
def test_two_plans_that_are_not_faster_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(race: tune.Race, made: ModelProto, feeds: Sequence[Any], seconds: float) -> tuple[Measured, ...]:
        r = 0.5 if any(map(is_crossover, made.graph.node)) else 2.0
        return tuple(Measured(n, r, r * 0.99, r * 1.01) for n in race.points)

    monkeypatch.setattr(tune.Race, "measure", measure)
    result = onnxrank.optimize(ranker(), request=["user"], candidates=WIDE, tune=1.0, check="quick")
    assert result.plan.few is None
    assert [r.rule for r in result.report.retreats][:1] == [crossover.RULE]


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((0.5, 0.8, 1.25, 2.0), 36),  # in the middle of 20 and 64, on a scale of ratios
        ((1.5, 1.6, 1.7, 1.8), 4),
        ((0.5, 0.6, 0.7, 0.8), 257),
        ((0.5, 1.1, 0.9, 1.5), 87),
    ],
)
def test_the_crossover_is_where_the_second_plan_becomes_faster(ratios: tuple[float, ...], expected: int) -> None:
    points = (4, 20, 64, 256)
    times = [Measured(n, r, r, r) for n, r in zip(points, ratios, strict=True)]
    pair = Pair(None, None, 30)  # type: ignore[arg-type]
    assert abs(pair.measured(times).below - expected) <= 1


def test_external_data_stay_where_they_are(tmp_path: Path) -> None:
    source = tmp_path / "ranker.onnx"
    model = ModelProto()
    model.CopyFrom(ranker())
    onnx.save(model, source, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    result = onnxrank.optimize(source, request=["user"], candidates=WIDE)
    assert result.plan.few is not None
    out = tmp_path / "out"
    out.mkdir()
    result.save(out / "fast.onnx")
    assert (out / "fast.onnx").stat().st_size < 1.1 * made().model.ByteSize()
    rng = np.random.default_rng(0)
    for n in (1, below(result), 50):
        user, item = (rng.integers(-2, 3, s).astype(np.float32) for s in ((1, 96), (n, 32)))
        old = run(ranker(), {"user": np.repeat(user, n, 0), "item": item})
        new = run(session(str(out / "fast.onnx")), {"user": user, "item": item})
        np.testing.assert_array_equal(*(next(iter(f.values())) for f in (old, new)))


def test_the_report_says_so() -> None:
    from onnxrank import render

    at = below(made())
    assert f"from N = {at} on" in render.to_text(made().report)
    assert made().report.to_dict()["below"] == at
    assert NAME in [n.name for n in made().model.graph.node]
    assert numpy_helper.to_array(
        next(t for t in made().model.graph.initializer if t.name == f"{NAME}/below")
    ) == at  # fmt: skip


def test_another_plan_may_stand_for_few() -> None:
    """Of three ways, none, one that costs little once, and one that costs little each, the last two are a pair."""
    study, nothing = object(), SimpleNamespace(time=lambda n: 5.0 * n)

    def form(once: float, each: float) -> Any:
        return SimpleNamespace(study=study, sites=(), limited=lambda _: nothing, time=lambda n: once + n * each)

    little, much = form(10.0, 2.0), form(100.0, 1.0)
    found = {(id(p.few), id(p.many)): p.below for p in crossover._pairs([much, little], WIDE)}
    assert found == {(id(nothing), id(much)): 25, (id(little), id(much)): 90, (id(nothing), id(little)): 4}
    other = SimpleNamespace(**{**vars(little), "study": object()})
    assert (id(other), id(much)) not in {(id(p.few), id(p.many)) for p in crossover._pairs([much, other], WIDE)}


@pytest.mark.slow
def test_the_original_as_it_is_may_stand_for_few() -> None:
    """Not as it was prepared for the plan for many; and the plan says which."""
    model, find = ranker(dead=True), crossover.find

    def found(*given: Any) -> Pair | None:
        pair = find(*given)
        return pair and replace(pair, few=given[-1])

    with mock.patch.object(crossover, "find", found):
        result = onnxrank.optimize(model, request=["user"], candidates=WIDE, check="quick")
    few = result.plan.few
    assert few is not None and few.original and not few.sites
    assert any(s.place.rule == "pack" and s.taken for s in result.plan.sites)
    for plan in (Plan.from_dict(result.plan.to_dict()), Plan.from_contract(stored_contract(result.model) or {})):
        assert plan.few is not None and plan.few.original
        again = onnxrank.optimize(model, plan=plan, check=False)
        assert again.model.SerializeToString() == result.model.SerializeToString()


@pytest.mark.slow
def test_two_plans_are_tried_with_the_original_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plans that are slow are timed with the original as it is for few, before they are taken back."""
    tried: list[bytes] = []

    def measure(race: tune.Race, made: ModelProto, feeds: Sequence[Any], seconds: float) -> tuple[Measured, ...]:
        r = 2.0
        if any(map(is_crossover, made.graph.node)):
            tried.append(branch(made, "then_branch").SerializeToString(deterministic=True))
            r = 0.5 if tried[-1] == tried[0] else 2.0
        return tuple(Measured(n, r, r * 0.99, r * 1.01) for n in race.points)

    monkeypatch.setattr(tune.Race, "measure", measure)
    result = onnxrank.optimize(ranker(dead=True), request=["user"], candidates=WIDE, tune=1.0, blocks=0, check="quick")
    assert len(set(tried)) == 2
    assert result.plan.few is not None and result.plan.few.original
    assert not any(r.rule == crossover.RULE for r in result.report.retreats)


def test_predictions_are_those_at_each_number_of_candidates() -> None:
    """Costs over the number of candidates need be no line: what does not fit a cache costs more for each."""
    seconds = cost.seconds

    def bent(graph: onnx.GraphProto, shapes: cost.Shapes) -> float:
        return seconds(graph, shapes) + 1e-9 * shapes.symbols[CANDIDATES] ** 2

    with mock.patch.object(cost, "seconds", bent):
        result = onnxrank.optimize(ranker(), request=["user"], check=False)
        assert result.study is not None and result.form is not None
        for p in result.report.predictions:
            old = bent(result.study.model.graph, result.study.shapes(p.candidates))
            assert p.ratio == round(old / result.form.time(p.candidates), 3)


@pytest.mark.slow
def test_profile_counts_the_plan_that_runs() -> None:
    """Below the crossover the multiply-adds are those of the plan for few, which here is the original."""
    result = made()
    at = below(result)
    found = profile(ranker(), result.model, candidates=[at - 1, at], seconds=1e-3, memory=False)
    per_candidate = {n: n * (24 * 128 + 1) * 48 for n in (at - 1, at)}
    before, after = (m.works for m in found.models)
    assert {w.candidates: w.all.macs for w in before} == per_candidate
    few, many = after
    assert few.all.macs == per_candidate[at - 1]
    assert {w.name: w.macs for w in many.levels} == {"request": 24 * 96 * 48, "candidate": at * (24 * 32 + 1) * 48}
