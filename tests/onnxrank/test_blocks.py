"""Candidates in blocks: right for every number of them, refused where candidates meet, taken where it is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers import INT64, Graph, rewritten, run
from onnx import ModelProto

import onnxrank
from onnxrank import blocks
from onnxrank.batching.engine import batch
from onnxrank.crossover import Pair
from onnxrank.errors import CheckFailed, ModelError, UsageError
from onnxrank.passes import blocking, choosing
from onnxrank.plans import Measured, Plan
from onnxrank.verify import sizes

B = 8
COUNTS = (0, 1, B - 1, B, B + 1, 2 * B, 2 * B + 1, 1000)
WIDE = (1, 4096)


def whole(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng([seed, *shape]).integers(-2, 3, shape)


Head = Callable[[Graph, str], str]


def ranker(head: Head = lambda g, x: x) -> ModelProto:
    """A user's layer beside an item, ids from 3 on, whose table has two rows; `head` is done to scores of [N, 4]."""
    g = Graph()
    user, item, ids = g.input("user", ["N", 96]), g.input("item", ["N", 32]), g.input("ids", ["N"], INT64)
    row = g.op("Gather", g.const(whole(2, 32)), g.op("Sub", ids, g.const(3, np.int64)), axis=0)
    both = g.op("Concat", user, item, row, axis=1)
    hidden = g.op("Relu", g.op("Gemm", both, g.const(whole(160, 48)), g.const(whole(48))))
    g.output(head(g, g.op("MatMul", hidden, g.const(whole(48, 4)))), ["N", 4])
    return g.model()


def made(model: ModelProto, rows: int | None = B, **how: Any) -> onnxrank.Result:
    spec = {"inputs": {"user": {"level": "request"}, "ids": {"range": [3, 5]}}}
    return onnxrank.optimize(model, spec=spec, blocks=rows, **{"check": False, **how})


@cache
def plain() -> onnxrank.Result:
    return made(ranker())


def feed(n: int, rows: int = 1) -> dict[str, Any]:
    items = whole(n, 32, seed=n).astype(np.float32)
    user = np.repeat(whole(1, 96).astype(np.float32), rows, 0)
    return {"user": user, "item": items, "ids": np.random.default_rng(n).integers(3, 5, n)}


def agree(result: onnxrank.Result, original: ModelProto) -> None:
    assert result.plan.blocks and any(n.op_type == "Scan" for n in result.model.graph.node)
    for n in COUNTS:
        old = run(original, feed(n, n))
        new = run(result.model, feed(n, n if result.report.interface == "same" else 1))
        for name in old:
            np.testing.assert_array_equal(old[name], new[name], err_msg=f"N = {n}")


def fields_first(g: Graph, x: str) -> str:
    """Columns behind one another, all candidates of one before those of the next, and back."""
    stacked = g.op("Concat", *g.ops("Split", 2, x, g.ints(2, 2), axis=1), axis=0)
    return g.op("Concat", *g.ops("Split", 2, g.op("Neg", stacked), axis=0), axis=1)


def attention(g: Graph, x: str) -> str:
    """A product of every candidate with itself, whose rows are not along the first axis meanwhile."""
    rows = g.op("Transpose", g.op("Reshape", x, g.ints(-1, 2, 2)), perm=[1, 0, 2])
    squared = g.op("Einsum", rows, rows, equation="inj,knj->nik")
    return g.op("Reshape", squared, g.ints(-1, 4))


def masked(g: Graph, x: str) -> str:
    """Extents of the candidates make a tensor that they are added to."""
    shape = g.op("Concat", g.op("Gather", g.op("Shape", x), g.ints(0)), g.ints(4), axis=0)
    ones = g.op("Expand", g.const(np.ones((1, 4))), shape)
    return g.op("Add", g.op("ReduceSum", x, g.ints(1), keepdims=1), ones)


@pytest.mark.parametrize("head", [lambda g, x: x, fields_first, attention, masked])
def test_scores_are_the_same_for_any_number_of_candidates(head: Head) -> None:
    model = ranker(head)
    agree(made(model), model)


def test_what_a_request_needs_once_stands_outside() -> None:
    (scan,) = (n for n in plain().model.graph.node if n.op_type == "Scan")
    outside = {n.op_type for n in plain().model.graph.node}
    assert outside & {"Gemm", "MatMul"}  # the user's part of the layer
    (body,) = (a.g for a in scan.attribute if a.name == "body")
    assert len(body.input) == 2 and not body.initializer


def test_the_signature_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "LEAST_GAIN", 0.0)
    agree(made(ranker(), interface="same", candidates=4096), ranker())


def test_inputs_side_by_side() -> None:
    spec = {"inputs": {"user": {"level": "request"}, "ids": {"range": [3, 5]}}}
    result = onnxrank.pack_inputs(ranker(), spec=spec, blocks=B, check="quick")
    assert [n.op_type for n in result.model.graph.node].count("Scan") == 1
    assert {i.name for i in result.model.graph.input} >= {"candidate.ids", "candidate.values"}


def listwise(g: Graph, x: str) -> str:
    return g.op("Softmax", x, axis=0)


def centred(g: Graph, x: str) -> str:
    return g.op("Sub", x, g.op("ReduceMean", x, axes=[0], keepdims=1))


def crossed(g: Graph, x: str) -> str:
    scores = g.op("MatMul", x, g.op("Transpose", x, perm=[1, 0]))
    return g.op("MatMul", scores, x)


def summed(g: Graph, x: str) -> str:
    return g.op("CumSum", x, g.const(0, np.int64))


def regrouped(g: Graph, x: str) -> str:
    """[N, 4] read as [4, N]: entries of several candidates come together."""
    turned = g.op("Reshape", x, g.ints(4, -1))
    return g.op("Transpose", turned, perm=[1, 0])


def reversed_(g: Graph, x: str) -> str:
    return g.op("Slice", x, g.ints(-1), g.ints(-(2**31)), g.ints(0), g.ints(-1))


def counted(g: Graph, x: str) -> str:
    n = g.op("Cast", g.op("Gather", g.op("Shape", x), g.const(0, np.int64)), to=1)
    return g.op("Div", x, n)


def placed(g: Graph, x: str) -> str:
    n = g.op("Gather", g.op("Shape", x), g.const(0, np.int64))
    places = g.op("Range", g.const(0, np.int64), n, g.const(1, np.int64))
    return g.op("Add", x, g.op("Unsqueeze", g.op("Cast", places, to=1), g.ints(1)))


@pytest.mark.parametrize("head", [listwise, centred, crossed, summed, regrouped, reversed_, counted, placed])
def test_candidates_that_meet_cannot_be_parted(head: Head) -> None:
    with pytest.raises(UsageError, match=f"cannot be scored in blocks of {B}: "):
        made(ranker(head))
    assert made(ranker(head), rows=0).changed


def test_rows_of_a_length_for_every_candidate() -> None:
    """As many rows for each candidate as its sequence is long: no constant tells how many to cut off."""
    g = Graph()
    user, item = g.input("user", ["N", 4]), g.input("item", ["N", "L", 4])
    rows = g.op("Add", item, g.on_axes("Unsqueeze", g.op("MatMul", user, g.const(whole(4, 4))), [1]))
    g.output(g.op("Reshape", rows, g.ints(-1, 4)), ["rows", 4])
    with pytest.raises(UsageError, match="one behind the other"):
        rewritten(g.model(), request=["user"], blocks=B)


def test_scores_without_entries() -> None:
    g = Graph()
    user, item = g.input("user", ["N", 4]), g.input("item", ["N", 4])
    nothing = g.op("Slice", g.op("Add", user, item), g.ints(4), g.ints(9), g.ints(1))
    g.output(g.op("Add", g.op("MatMul", user, g.const(whole(4, 4))), item), ["N", 4])
    g.output(g.op("Concat", nothing, nothing, axis=1), ["N", 0])
    with pytest.raises(UsageError, match="one behind the other"):
        rewritten(g.model(), request=["user"], blocks=B)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"interface": "same"}, {}])
def test_a_note_says_why_there_are_none(how: Any) -> None:
    with mock.patch.object(blocking, "against", side_effect=AssertionError("nothing to time")):
        result = made(ranker(listwise), rows=None, candidates=WIDE, tune=1e-3, **how)
    assert not result.plan.blocks
    assert not result.changed or any("not tried in blocks" in n for n in result.report.notes)


def test_old_opsets_are_left() -> None:
    g = Graph(opset=12)
    user, item = g.input("user", ["N", 96]), g.input("item", ["N", 32])
    g.output(g.op("Gemm", g.op("Concat", user, item, axis=1), g.const(whole(128, 4)), g.const(whole(4))), ["N", 4])
    with pytest.raises(UsageError, match="opset 12"):
        onnxrank.optimize(g.model(), request=["user"], blocks=B, check=False)


def test_several_requests_have_a_loop_of_their_own() -> None:
    with pytest.raises(UsageError, match="one request per call"):
        batch(ranker(), request=["user"], blocks=B)
    with pytest.raises(ModelError, match="in blocks: start from the original"):
        batch(plain().model, request=["user"], check=False)


def test_a_plan_gives_the_same_bytes() -> None:
    plan = Plan.from_dict(plain().plan.to_dict())
    assert plan.blocks == B
    again = onnxrank.optimize(ranker(), plan=plan, check=False)
    assert again.model.SerializeToString() == plain().model.SerializeToString()
    assert Plan.from_contract(onnxrank.contract.stored_contract(again.model) or {}).blocks == B
    apart = onnxrank.optimize(ranker(), plan=plan, blocks=0, check=False)
    assert not apart.plan.blocks and "Scan" not in {n.op_type for n in apart.model.graph.node}
    with pytest.raises(UsageError, match="the plan says all that blocks does"):
        onnxrank.optimize(ranker(), plan=plan, blocks=B + 1, check=False)


def test_a_plan_that_fits_no_more_says_so() -> None:
    model = ranker(listwise)
    plan = replace(made(model, rows=0).plan, blocks=B)
    with pytest.raises(UsageError, match="cannot be scored in blocks"):
        onnxrank.optimize(model, plan=plan, check=False)


def test_the_check_looks_around_blocks() -> None:
    assert {B - 1, B, B + 1, 2 * B - 1, 2 * B, 2 * B + 1} <= set(sizes.turns([plain().model]))
    result = made(ranker(), check="standard")
    assert result.plan.blocks == B
    assert any(str(2 * B + 1) in line for line in result.report.looked)


def _wrong(self: Any, op: str, operands: Any, **attributes: Any) -> str:
    return _add(self, "Max" if op == "Min" else op, operands, **attributes)


_add = blocks._Writer._add


def test_blocks_that_fail_the_check_are_taken_back() -> None:
    with mock.patch.object(blocks._Writer, "_add", _wrong):
        result = made(ranker(), check="quick")
        with pytest.raises(CheckFailed, match="in blocks"):
            made(ranker(), check="quick", strict=True)
    assert result.changed and not result.plan.blocks
    assert [(r.rule, r.cause) for r in result.report.retreats] == [("blocks", "check")]
    assert all(c.passed for c in result.report.checks)


def timed(ratios: dict[int, float]) -> Any:
    """Stands for timing: the ratio of a result in blocks of so many to that in one piece, 1024 candidates and more."""

    def against(job: Any, race: Any, model: Any, feeds: Any, share: float) -> tuple[Measured, ...]:
        many = ratios[job.blocks]
        return tuple(Measured(n, r, r, r) for n in race.points for r in [many if n >= 1024 else ratios.get(0, 1.0)])

    return mock.patch.object(blocking, "against", against)


def original(ratio: float) -> Any:
    return mock.patch.object(blocking, "_against_original", lambda job: (Measured(4096, ratio, ratio, ratio),))


def tuned(ratios: dict[int, float], of_original: float = 2.0, **how: Any) -> onnxrank.Result:
    always = mock.patch("onnxrank.pipeline.TIME", onnxrank.pipeline.Pass("timing", "undo", lambda job: True))
    with timed(ratios), original(of_original), always:
        return made(ranker(), rows=None, **{"candidates": WIDE, "tune": 1e-3, **how})


def test_the_fastest_blocks_are_taken() -> None:
    result = tuned({64: 1.1, 128: 1.3, 256: 1.2})
    assert result.plan.blocks == 128
    assert [m.ratio for m in result.plan.measured] == [2.0]


def test_blocks_that_are_not_faster_are_not() -> None:
    result = tuned({64: 0.9, 128: 0.99, 256: 1.0})
    assert result.changed and not result.plan.blocks
    assert not tuned({64: 1.1, 128: 1.3, 256: 1.2}, of_original=0.9).plan.blocks


def test_few_candidates_are_scored_in_one_piece_where_that_is_faster() -> None:
    result = tuned({0: 0.8, 64: 1.1, 128: 1.3, 256: 1.2})
    assert result.plan.blocks_from > 1 and result.plan.few is None
    ops = [n.op_type for n in result.model.graph.node]
    assert ops.count("If") == 1 and "Scan" not in ops
    at = result.plan.blocks_from
    assert {at - 1, at, at + 1, 128, 256} <= set(sizes.turns([result.model]))
    for n in (0, 1, at - 1, at, at + 1, 1000):
        np.testing.assert_equal(run(result.model, feed(n)), run(ranker(), feed(n, n)))
    again = onnxrank.optimize(ranker(), plan=result.plan, check=False)
    assert again.model.SerializeToString() == result.model.SerializeToString()


def test_blocks_begin_where_they_gain_more_than_noise() -> None:
    def against(job: Any, race: Any, model: Any, feeds: Any, share: float) -> tuple[Measured, ...]:
        ratios = {n: 0.9 if n < 256 else 1.02 if n < 1024 else 1.2 for n in race.points}
        return tuple(Measured(n, r, r, r) for n, r in ratios.items())

    with mock.patch.object(blocking, "against", against), original(2.0):
        always = onnxrank.pipeline.Pass("timing", "undo", lambda job: True)
        with mock.patch("onnxrank.pipeline.TIME", always):
            result = made(ranker(), rows=None, candidates=WIDE, tune=1e-3)
    assert 256 < result.plan.blocks_from <= 1024


@pytest.mark.parametrize("how", [{"candidates": 512}, {"tune": 0.0}])
def test_blocks_are_not_timed_where_few_are_expected(how: Any) -> None:
    assert not tuned({64: 2.0, 128: 2.0, 256: 2.0}, **how).plan.blocks


@pytest.mark.slow
def test_both_ends_have_a_plan_of_their_own() -> None:
    """The original for few, one piece for more, blocks for many: each `If` is in the branch of the one before."""
    pair = mock.patch("onnxrank.crossover.find", lambda forms, *_: Pair(forms[0].limited(()), forms[0], 5))
    with pair, mock.patch("onnxrank.passes.timing.measure"):
        result = tuned({0: 0.8, 64: 1.1, 128: 1.3, 256: 1.2})
    few, at = result.plan.few, result.plan.blocks_from
    assert few is not None and 5 == few.below < at and result.plan.blocks == 128
    assert {4, 5, at - 1, at, 128, 256} <= set(sizes.turns([result.model]))
    assert "Scan" not in {n.op_type for n in result.model.graph.node}
    for n in (0, 4, 5, at - 1, at, 1000):
        np.testing.assert_equal(run(result.model, feed(n)), run(ranker(), feed(n, n)))
    again = onnxrank.optimize(ranker(), plan=Plan.from_dict(result.plan.to_dict()), check=False)
    assert again.model.SerializeToString() == result.model.SerializeToString()
    stored = onnxrank.contract.stored_contract(result.model) or {}
    assert Plan.from_contract(stored).blocks_from == at
    assert onnxrank.profile(result.model, candidates=[2, at], seconds=0.01, memory=False).models[0].kernels


def test_with_blocks_the_second_plan_begins_where_it_is_faster_then() -> None:
    """The crossover of two plans in one piece is not that of the same with the second one in blocks."""

    def against(job: Any, race: Any, made: ModelProto, feeds: Any, share: float) -> tuple[Measured, ...]:
        ops = [n.op_type for n in made.graph.node]
        assert "Scan" in ops and "If" not in ops
        return tuple(Measured(n, n / 100, n / 100, n / 100) for n in race.points)

    pair = mock.patch("onnxrank.crossover.find", lambda forms, *_: Pair(forms[0].limited(()), forms[0], 400))
    with pair, mock.patch("onnxrank.passes.timing.measure"), mock.patch("onnxrank.passes.timing.against", against):
        result = tuned({64: 1.1, 128: 1.3, 256: 1.2})
    assert result.plan.few is not None and result.plan.few.below == 101 and not result.plan.blocks_from
    for n in (0, 1, 100, 101, 102, 1000):
        np.testing.assert_equal(run(result.model, feed(n)), run(ranker(), feed(n, n)))


def left_alone(ratios: dict[int, float], of_original: float = 2.0, **how: Any) -> onnxrank.Result:
    """The ranker, of which nothing is faster than the original in one piece."""
    slow = onnxrank.pipeline.Pass("timing", "undo", lambda job: job.give_up("tune", "slow") or False)
    with timed(ratios), original(of_original), mock.patch("onnxrank.pipeline.TIME", slow):
        return made(ranker(), rows=None, **{"candidates": WIDE, "tune": 1e-3, **how})


def test_what_is_slow_in_one_piece_may_be_fast_in_blocks() -> None:
    result = left_alone({0: 0.8, 64: 1.1, 128: 1.3, 256: 1.2})
    assert result.changed and result.plan.blocks == 128 and not result.plan.blocks_from
    few = result.plan.few
    assert few is not None and few.below > 1 and not few.rules
    assert any(s.taken for s in result.plan.sites)
    assert not result.report.retreats
    for n in (0, 1, few.below - 1, few.below, 1000):
        np.testing.assert_equal(run(result.model, feed(n)), run(ranker(), feed(n, n)))
    again = onnxrank.optimize(ranker(), plan=result.plan, check="quick")
    assert again.model.SerializeToString() == result.model.SerializeToString()


@pytest.mark.parametrize("few", [0.8, 1.1])
def test_the_original_alone_may_be_fast_in_blocks(few: float) -> None:
    """Where what the rules make of it is slow in blocks, too."""
    split = blocks.split

    def of_original(form: Any) -> blocks.Split:
        if form.changed:
            raise blocks.Impossible("not this one")
        return split(form)

    with mock.patch.object(blocks, "split", of_original):
        result = left_alone({0: few, 64: 1.1, 128: 1.3, 256: 1.2}, check="quick")
    assert result.changed and result.plan.changed and result.plan.blocks == 128
    assert not result.plan.sites and (result.plan.few is None) == (few > 1)
    assert all(c.passed for c in result.report.checks)
    assert any("the original as it is" in n for n in result.report.notes)
    for n in COUNTS:
        np.testing.assert_equal(run(result.model, feed(n)), run(ranker(), feed(n, n)))
    assert not onnxrank.optimize(ranker(), plan=result.plan, blocks=0, check=False).changed
    for plan in (result.plan, Plan.from_contract(onnxrank.contract.stored_contract(result.model) or {})):
        again = onnxrank.optimize(ranker(), plan=plan, check=False)
        assert again.model.SerializeToString() == result.model.SerializeToString()


def test_predictions_are_those_of_blocks() -> None:
    """What spills out of the cache in one piece costs less: hidden rows of 2048 candidates are 6 MB, of 64 0.2."""
    g = Graph()
    both = g.op("Concat", g.input("user", ["N", 96]), g.input("item", ["N", 32]), axis=1)
    wide = g.op("Relu", g.op("Exp", g.op("Gemm", both, g.const(whole(128, 768)), g.const(whole(768)))))
    g.output(g.op("MatMul", wide, g.const(whole(768, 1))), ["N", 1])
    model = g.model()
    one, divided = (onnxrank.optimize(model, request=["user"], blocks=b, check=False) for b in (0, 64))
    assert one.form is not None
    assert blocks.seconds(one.form, 64, 2048) < 0.9 * one.form.time(2048)
    assert blocks.seconds(one.form, 64, 64) > one.form.time(64)
    for whole_, parts in zip(one.report.predictions, divided.report.predictions, strict=True):
        assert (whole_.ratio < parts.ratio) == (whole_.candidates > 128)


def test_what_is_slow_in_blocks_too_is_left_alone() -> None:
    result = left_alone({0: 0.8, 64: 0.9, 128: 0.9, 256: 0.9})
    assert not result.changed and not result.plan.changed and not result.plan.blocks
    assert [r.rule for r in result.report.retreats] == [""]
    assert result.model.SerializeToString() == ranker().SerializeToString()
    with mock.patch.object(blocks._Writer, "_add", _wrong):
        assert not left_alone({64: 1.1, 128: 1.3, 256: 1.2}, check="quick").changed
