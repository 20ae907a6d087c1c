"""Two models of one: what they take and give, that together they give the same scores, and what is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from helpers import BOOL, FLOAT, INT64, Graph, run, whole_numbers
from onnx import ModelProto, TensorProto, helper
from split_models import feeds, history_model, numbers, ranker_model

import onnxrank
from onnxrank import batches, cost, halves, ranker
from onnxrank.contract import PACKED
from onnxrank.errors import CheckFailed, ModelError, NothingApplied, UsageError
from onnxrank.splitting import Options, Split, split
from onnxrank.splitting.engine import Job
from onnxrank.verify import Options as Checks
from onnxrank.verify import verify
from onnxrank.writers import to_json

PACKAGE = Path(onnxrank.__file__).parent
CONTRACT = json.loads((PACKAGE / "contract.schema.json").read_text())
REPORT = json.loads((PACKAGE / "split.schema.json").read_text())
MODELS = Path(__file__).resolve().parents[3] / "models" / "onnx"
Arrays = dict[str, np.ndarray[Any, Any]]


def _split(model: ModelProto, out: Path | None, request: str = "user", check: Any = "quick", **options: Any) -> Split:
    return split(model, out, request=[request], check=check, options=Options(**options))


def _scores(folder: Path, request: Arrays, candidates: Arrays) -> Arrays:
    """What both models give, by hand."""
    first, second = run(onnx.load(folder / "request.onnx"), request), onnx.load(folder / "candidate.onnx")
    return run(second, {**candidates, **first})


@pytest.mark.parametrize("n", [0, 1, 3, 700])
@pytest.mark.parametrize("how", [{}, {"state": "packed"}, {"guard": False}, {"state": "packed", "guard": False}])
def test_both_together_give_the_same_scores(tmp_path: Path, how: dict[str, Any], n: int) -> None:
    model = ranker_model()
    made = _split(model, tmp_path / "out", **how)
    whole, request, candidates = feeds(n)
    got = _scores(tmp_path / "out", request, candidates)
    assert got.keys() == {"score"}
    np.testing.assert_array_equal(got["score"], run(model, whole)["score"])
    jsonschema.validate(json.loads((tmp_path / "out" / "contract.json").read_text()), CONTRACT)
    jsonschema.validate(json.loads(to_json(made.report)), REPORT)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["candidate.onnx", "contract.json", "request.onnx"]


def test_what_the_models_take_and_give(tmp_path: Path) -> None:
    made = _split(ranker_model(), tmp_path / "out")
    (state,) = made.contract["state"]["tensors"]
    assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", state["name"])
    names = [
        [v.name for v in values] for m in (made.request, made.candidate) for values in (m.graph.input, m.graph.output)
    ]
    assert names == [["user"], [state["name"], "state_version"], ["item", state["name"], "state_version"], ["score"]]
    assert state["shape"] == [1, 8] and state["bytes"] == 32  # the first layer's part, narrower than the tower
    onnx.checker.check_model(made.request, full_check=True)
    onnx.checker.check_model(made.candidate, full_check=True)
    # Weights lie where they are read, and only there.
    weights = [{t.name for t in m.graph.initializer} for m in (made.request, made.candidate)]
    assert weights[0] and weights[1] and not weights[0] & weights[1]


def test_a_state_of_another_version_gives_no_scores(tmp_path: Path) -> None:
    _split(ranker_model(), tmp_path / "out")
    _, request, candidates = feeds(4)
    state = run(onnx.load(tmp_path / "out" / "request.onnx"), request)
    other = {**state, "state_version": state["state_version"] + 1}
    got = run(onnx.load(tmp_path / "out" / "candidate.onnx"), {**candidates, **other})
    assert got["score"].shape == (4, 1) and np.isnan(got["score"]).all()


@pytest.mark.slow
def test_the_version_changes_with_the_request_model_alone(tmp_path: Path) -> None:
    def weighted(which: int) -> int:
        model = ranker_model()
        model.graph.initializer[which].CopyFrom(
            onnx.numpy_helper.from_array(
                onnx.numpy_helper.to_array(model.graph.initializer[which]) + np.float32(1),
                model.graph.initializer[which].name,
            )
        )
        return int(_split(model, None).contract["state_version"])

    own = int(_split(ranker_model(), None).contract["state_version"])
    assert own == int(_split(ranker_model(), None).contract["state_version"])
    assert weighted(0) != own  # the tower
    assert weighted(1) != own  # the first layer, which is made for the user as well
    assert weighted(2) == own  # the last layer: states stay right
    assert int(_split(ranker_model(), None, state="packed").contract["state_version"]) != own
    assert 0 <= own < 1 << 53


def test_verify_takes_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ranker_model(), path)
    split(path, tmp_path / "out", request=["user"], check="quick")
    assert verify(path, tmp_path / "out", Checks(level="quick")).passed
    # What was damaged since is no longer what the contract tells of.
    data = bytearray((tmp_path / "out" / "request.onnx").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "request.onnx").write_bytes(data)
    with pytest.raises(ModelError):
        verify(path, tmp_path / "out", Checks(level="quick"))


def test_verify_finds_what_is_wrong_in_either_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ranker_model(), path)
    for part in ("request", "candidate"):
        out = tmp_path / part
        split(path, out, request=["user"], check="quick")
        _spoil(out, part)
        found = verify(path, out, Checks(level="quick"))
        assert not found.passed and found.verdicts["algebra"] == "failed", part


def _spoil(folder: Path, part: str) -> None:
    """Changes a weight of a model, and the contract with it."""
    model = onnx.load(folder / f"{part}.onnx")
    t = model.graph.initializer[0]
    t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t) * np.float32(1.5), t.name))
    onnx.save(model, folder / f"{part}.onnx")
    contract = json.loads((folder / "contract.json").read_text())
    from onnxrank.splitting.folder import digest

    contract["models"][part]["sha256"] = digest(folder / f"{part}.onnx")
    (folder / "contract.json").write_text(json.dumps(contract))


def test_nothing_is_written_where_the_check_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Job.write

    def spoilt(self: Job, stage: Path) -> Split:
        made = real(self, stage)
        _spoil(stage, "candidate")
        return made

    monkeypatch.setattr(Job, "write", spoilt)
    with pytest.raises(CheckFailed, match="Both models together"):
        _split(ranker_model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_lengths_that_vary_are_part_of_the_state(tmp_path: Path) -> None:
    model = history_model()
    made = _split(model, tmp_path / "out", "history")
    (state,) = made.contract["state"]["tensors"]
    assert "L" in state["shape"] and state["offset"] is None and state["bytes"] is None
    assert made.report.state[0].bytes == cost.LENGTH * 4 * 4 and made.report.most_state_bytes == 1024 * 4 * 4
    for length in (1, 7, 300):
        history, items = numbers(1, length, 4), numbers(9, 4, seed=6)
        want = run(model, {"history": np.repeat(history, 9, 0), "item": items})["score"]
        got = _scores(tmp_path / "out", {"history": history}, {"item": items})["score"]
        np.testing.assert_array_equal(got, want)


def test_lengths_that_vary_cannot_be_packed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'L'.*varies.*--state named"):
        _split(history_model(), tmp_path / "out", "history", state="packed")
    assert list(tmp_path.iterdir()) == []


def test_most_bytes_of_the_state(tmp_path: Path) -> None:
    model = history_model()
    free = _split(model, None, "history").report
    tight = _split(model, None, "history", most=1024 * 4 * 4).report
    assert tight.most_state_bytes == free.most_state_bytes == 1024 * 4 * 4
    with pytest.raises(UsageError, match="No state is as small as 16383 bytes: it has 16384 at least"):
        _split(model, None, "history", most=1024 * 4 * 4 - 1)
    made = split(model, None, request=["history"], lengths={"L": (1, 10)}, check="quick", options=Options(most=160))
    assert made.report.most_state_bytes == 160


def test_a_smaller_state_is_had_by_doing_more_again() -> None:
    g = Graph(17)
    user, item = g.input("user", ["N", 6]), g.input("item", ["N", 40])
    wide = g.op("Relu", g.op("MatMul", user, g.const(whole_numbers(6, 40))))
    g.op("ReduceSum", g.op("Max", wide, item), g.ints(1), keepdims=1)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    free, tight = (_split(g.model(), None, most=most).report for most in (None, 64))
    assert [t.shape for t in free.state] == [(1, 40)] and not free.sunk
    assert [t.shape for t in tight.state] == [(1, 6)] and {s.op for s in tight.sunk} == {"MatMul", "Relu"}


def test_states_of_16_bits_are_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    g = Graph(17)
    user, item = g.input("user", ["N", 6]), g.input("item", ["N", 6])
    tower = g.op("Tanh", g.op("MatMul", user, g.const(rng.standard_normal((6, 6)) / 3)))
    g.op("ReduceSum", g.op("Mul", tower, g.op("Tanh", item)), g.ints(1), keepdims=1)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    model = tmp_path / "m.onnx"
    onnx.save(g.model(), model)
    made = split(model, tmp_path / "out", request=["user"], check="quick", options=Options(dtype="float16"))
    (state,) = made.contract["state"]["tensors"]
    assert (state["type"], state["of"], state["bytes"]) == ("float16", "float32", 12)
    found = verify(model, tmp_path / "out", Checks(level="quick"))
    assert found.passed and found.verdicts["algebra"] == "passed"  # the same function, but for the rounding
    plain = split(model, tmp_path / "plain", request=["user"], check="quick")
    assert plain.contract["state"]["type"] == "float32"
    feed = (
        {"user": rng.standard_normal((1, 6)).astype(np.float32)},
        {"item": rng.standard_normal((9, 6)).astype(np.float32)},
    )
    a, b = (_scores(tmp_path / name, *feed)["score"] for name in ("out", "plain"))
    assert 0 < np.abs(a - b).max() < 1e-2


@pytest.mark.slow
def test_values_that_16_bits_do_not_hold_stay_as_they_are(tmp_path: Path) -> None:
    path = MODELS / "transact.dynamo.onnx"
    spec = yaml.safe_load((MODELS / "transact.roles.yaml").read_text())
    made = split(path, tmp_path / "out", spec=spec, check="quick", options=Options(dtype="float16"))
    mask = next(t for t in made.report.state if "where" in t.name)
    assert mask.type == "float32" and mask.bytes == 32 and any("16 bits do not hold" in n for n in made.report.notes)
    assert {t.type for t in made.report.state if t is not mask} == {"float16"}
    assert verify(path, tmp_path / "out", Checks(level="quick")).passed
    with pytest.raises(UsageError, match="cannot be packed in 16 bits"):
        split(path, None, spec=spec, check=False, options=Options(state="packed", dtype="float16"))


def test_the_limit_holds_for_what_is_handed_over() -> None:
    path = MODELS / "din.torchscript.onnx"
    spec = yaml.safe_load((MODELS / "din.roles.yaml").read_text())
    named = split(path, None, spec=spec, check=False).report.most_state_bytes
    assert named == 1866  # ten of these bytes are booleans, of four each in a vector of floats
    with pytest.raises(UsageError, match="The state has 1896 bytes as it is handed over"):
        split(path, None, spec=spec, check=False, options=Options(state="packed", most=named))


def test_rounding_that_costs_too_much_is_told(tmp_path: Path) -> None:
    g = Graph(17)
    user, item = g.input("user", ["N", 6]), g.input("item", ["N", 6])
    tower = g.op("MatMul", g.op("Tanh", user), g.const(3000 * whole_numbers(6, 6)))
    g.op("ReduceSum", g.op("Sin", g.op("Add", tower, item)), g.ints(1), keepdims=1)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    with pytest.raises(CheckFailed, match="--state-dtype float32"):
        _split(g.model(), tmp_path / "out", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_candidates_read_goes_through_the_state(tmp_path: Path) -> None:
    g = Graph(17)
    flag, user, item = g.input("flag", ["N", 1], BOOL), g.input("user", ["N", 4]), g.input("item", ["N", 4])
    g.op("Where", flag, g.op("Mul", g.op("Neg", user), item), item)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    model = g.model()
    made = split(model, tmp_path / "out", request=["flag", "user"], check="quick")
    assert {(t["type"], *t["shape"]) for t in made.contract["state"]["tensors"]} == {("bool", 1, 1), ("float32", 1, 4)}
    packed = split(model, tmp_path / "packed", request=["flag", "user"], check="quick", options=Options(state="packed"))
    (vector,) = packed.contract["state"]["tensors"]
    assert vector["shape"] == [5] and [p["offset"] for p in vector["parts"]] == [0, 4]
    for flagged in (True, False):
        feed = {"flag": np.array([[flagged]]), "user": numbers(1, 4)}, {"item": numbers(3, 4, seed=6)}
        want = np.where(flagged, -feed[0]["user"] * feed[1]["item"], feed[1]["item"])
        for name in ("out", "packed"):
            np.testing.assert_array_equal(_scores(tmp_path / name, *feed)["score"], want)


def test_whole_numbers_are_not_packed_into_floats(tmp_path: Path) -> None:
    g = Graph(17)
    user, item = g.input("user", ["N", 4], INT64), g.input("item", ["N", 4], INT64)
    g.op("Cast", g.op("ReduceSum", g.op("Mul", g.op("Neg", user), item), g.ints(1)), to=FLOAT)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    made = _split(g.model(), tmp_path / "out")
    assert [t["type"] for t in made.contract["state"]["tensors"]] == ["int64"]
    with pytest.raises(UsageError, match="int64, which a float32 does not hold exactly"):
        _split(g.model(), tmp_path / "packed", state="packed")


def test_an_output_of_the_request_comes_from_the_candidate_model(tmp_path: Path) -> None:
    g = Graph(17)
    user, item = g.input("user", [1, 4]), g.input("item", ["N", 4])
    g.op("Relu", g.op("MatMul", user, g.const(whole_numbers(4, 4))))
    g.nodes[-1].output[0] = "profile"
    g.op("MatMul", item, g.op("Transpose", "profile", perm=[1, 0]))
    g.nodes[-1].output[0] = "score"
    g.output("profile", [1, 4])
    g.output("score", ["N", 1])
    model = g.model()
    split(model, tmp_path / "out", check="quick")
    feed = {"user": numbers(1, 4)}, {"item": numbers(3, 4, seed=6)}
    got, want = _scores(tmp_path / "out", *feed), run(model, {**feed[0], **feed[1]})
    assert list(got) == ["profile", "score"]
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


def test_an_output_that_is_no_float_is_not_guarded(tmp_path: Path) -> None:
    model = ranker_model()
    model.graph.node.append(helper.make_node("Greater", ["score", model.graph.initializer[0].name], ["x"]))
    del model.graph.node[-1]
    model.graph.node.append(helper.make_node("Cast", ["score"], ["rank"], to=INT64))
    model.graph.output.append(helper.make_tensor_value_info("rank", INT64, ["N", 1]))
    made = _split(model, tmp_path / "out")
    assert any("does not guard 'rank'" in n for n in made.report.notes)
    _, request, candidates = feeds(3)
    state = run(onnx.load(tmp_path / "out" / "request.onnx"), request)
    got = run(onnx.load(tmp_path / "out" / "candidate.onnx"), {**candidates, **state, "state_version": np.array([7])})
    assert np.isnan(got["score"]).all() and got["rank"].shape == (3, 1)


def test_random_numbers_are_drawn_by_the_request_model() -> None:
    g = Graph(17)
    user, item = g.input("user", [1, 4]), g.input("item", ["N", 4])
    noise = g.op("RandomNormalLike", user)
    g.op("Mul", g.op("Add", noise, user), item)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    made = split(g.model(), None, check=False)
    assert "RandomNormalLike" in [n.op_type for n in made.request.graph.node]
    assert "RandomNormalLike" not in [n.op_type for n in made.candidate.graph.node]


def test_a_model_that_would_not_gain_in_one_file_is_divided_all_the_same(tmp_path: Path) -> None:
    path = MODELS / "edcn.torchscript.onnx"
    spec = yaml.safe_load((MODELS / "edcn.roles.yaml").read_text())
    assert not onnxrank.optimize(path, spec=spec, check=False).changed
    made = split(path, tmp_path / "out", spec=spec, check="quick")
    assert made.report.request.macs > 0 and any("in two its request side is kept" in n for n in made.report.notes)
    assert verify(path, tmp_path / "out", Checks(level="quick")).passed


def test_two_files_are_advised_where_the_request_takes_long() -> None:
    """And one where candidates do, or neither."""
    for width, n, files in ((16_384, 16, 2), (16_384, 1 << 17, 1), (12, 16, 1)):
        advice = split(ranker_model(width), request=["user"], candidates=n, check=False).report.advice
        assert advice.files == files, advice
        assert advice.hit_seconds < advice.miss_seconds


def test_a_model_that_was_optimised_before(tmp_path: Path) -> None:
    path, fast = tmp_path / "m.onnx", tmp_path / "fast.onnx"
    onnx.save(ranker_model(256), path)
    result = onnxrank.optimize(path, request=["user"], check=False)
    assert result.changed
    result.save(fast)
    split(fast, tmp_path / "out", check="quick")
    for original in (path, fast):
        assert verify(original, tmp_path / "out", Checks(level="quick")).passed


def test_nothing_to_divide(tmp_path: Path) -> None:
    g = Graph(17)
    user, item = g.input("user", ["N", 4]), g.input("item", ["N", 4])
    g.op("Mul", user, item)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    with pytest.raises(NothingApplied, match="nothing to divide"):
        _split(g.model(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"format": "zip"}, "format 'zip'"),
        ({"state": "boxed"}, "state 'boxed'"),
        ({"dtype": "int8"}, "state dtype 'int8'"),
        ({"most": 0}, "at most 0 bytes"),
        ({"name": "a/b"}, "'a/b'"),
    ],
)
def test_options_that_there_are_not(options: Mapping[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        Options(**options)


def test_branches_read_the_state(tmp_path: Path) -> None:
    """A tensor that is handed over has its new name inside the bodies of nodes, too."""
    g = Graph(17)
    user, item, flag = g.input("user", ["N", 4]), g.input("item", ["N", 4]), g.input("flag", ["N", 1], BOOL)
    tower = g.op("Relu", g.op("MatMul", user, g.const(whole_numbers(4, 4))))
    some = g.op("ReduceMax", g.op("Cast", flag, to=INT64), keepdims=0)
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, [tower, item], [f"{name}_result"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_result", FLOAT, ["N", 4])],
        )
        for name, op in (("then", "Add"), ("else", "Mul"))
    }
    g.op("If", g.op("Cast", some, to=BOOL), **branches)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    model = g.model()
    split(model, tmp_path / "out", request=["user"], check="quick")
    for flagged in (True, False):
        items = {"item": numbers(3, 4, seed=6), "flag": np.full((3, 1), flagged)}
        want = run(model, {"user": np.repeat(numbers(1, 4), 3, 0), **items})["score"]
        got = _scores(tmp_path / "out", {"user": numbers(1, 4)}, items)["score"]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("ir", [3, 8])
@pytest.mark.parametrize("state", ["named", "packed"])
def test_old_models(tmp_path: Path, opset: int, ir: int, state: str) -> None:
    """Before IR version 4 every initializer is an input, too."""
    model = ranker_model()
    model.ir_version = ir
    model.opset_import[0].version = opset
    if ir < 4:
        model.graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
        )
    _split(model, tmp_path / "out", state=state)
    whole, request, candidates = feeds(5)
    got = _scores(tmp_path / "out", request, candidates)["score"]
    np.testing.assert_array_equal(got, run(model, whole)["score"])


def test_constants_that_callers_may_replace_stay_so(tmp_path: Path) -> None:
    model = ranker_model()
    bias = onnx.numpy_helper.from_array(np.array([2.0], np.float32), "temperature")
    model.graph.initializer.append(bias)
    model.graph.input.append(helper.make_tensor_value_info("temperature", FLOAT, [1]))
    model.graph.node[-1].output[0] = "logit"
    model.graph.node.append(helper.make_node("Mul", ["logit", "temperature"], ["score"]))
    made = _split(model, tmp_path / "out")
    assert "temperature" in [i.name for i in made.candidate.graph.input]
    whole, request, candidates = feeds(5)
    for given in ({}, {"temperature": np.array([3.0], np.float32)}):
        got = _scores(tmp_path / "out", request, {**candidates, **given})["score"]
        np.testing.assert_array_equal(got, run(model, {**whole, **given})["score"])


@pytest.mark.slow
def test_a_failing_pair_is_cut_down_and_blamed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ranker_model(), path)
    split(path, tmp_path / "out", request=["user"], check="quick")
    _spoil(tmp_path / "out", "candidate")
    options = Checks(level="quick", bisect=True, save_failing=tmp_path / "case")
    found = verify(path, tmp_path / "out", options)
    assert not found.passed and found.culprit is not None and (tmp_path / "case" / "repro.py").exists()


def test_a_plan_says_how_the_model_is_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(ranker_model(), path)
    result = onnxrank.optimize(path, request=["user"], check=False)
    made = split(path, tmp_path / "out", plan=result.plan, check="quick")
    assert made.contract["optimize"]["plan"] == result.plan.stored()


# --- external data ---------------------------------------------------------------------------------------------------


def _external(folder: Path) -> Path:
    """A ranker whose tables lie in a file of their own."""
    g = Graph(17)
    user, item = g.input("user", ["N"], INT64), g.input("item", ["N"], INT64)
    rows = [g.op("Gather", g.const(whole_numbers(64, 32, seed=k)), i) for k, i in enumerate((user, item))]
    g.op("MatMul", g.op("Concat", *rows, axis=1), g.const(whole_numbers(64, 1, seed=3)))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    path = folder / "m.onnx"
    onnx.save(g.model(), path, save_as_external_data=True, location="tables.bin", size_threshold=1024)
    return path


@pytest.mark.parametrize("form", ["plain", "triton"])
def test_external_data_is_shared(tmp_path: Path, form: str) -> None:
    path = _external(tmp_path)
    made = split(path, tmp_path / "out", request=["user"], check="quick", options=Options(format=form))
    found = sorted((tmp_path / "out").rglob("tables.bin"))
    assert len(found) == (1 if form == "plain" else 2)
    assert all(f.samefile(tmp_path / "tables.bin") for f in found)
    assert verify(path, tmp_path / "out", Checks(level="quick")).passed
    state = made.contract["state_version"]
    data = bytearray((tmp_path / "tables.bin").read_bytes())
    data[3] ^= 1  # of the user's table; the model's file stays as it was
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tables.bin").write_bytes(data)
    (tmp_path / "other" / "m.onnx").write_bytes(path.read_bytes())
    again = split(tmp_path / "other" / "m.onnx", None, request=["user"], check=False, options=Options(format=form))
    assert again.contract["state_version"] != state


def test_external_data_on_another_disk_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _external(tmp_path)

    def elsewhere(*args: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    split(path, tmp_path / "out", request=["user"], check="quick")
    assert (tmp_path / "out" / "tables.bin").read_bytes() == (tmp_path / "tables.bin").read_bytes()


# --- the folder ------------------------------------------------------------------------------------------------------


def test_an_earlier_result_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # empty
    _split(ranker_model(), out)
    before = (out / "request.onnx").read_bytes()
    _split(ranker_model(20), out)
    assert (out / "request.onnx").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda out: (out / "notes.txt").write_text("mine"), "notes.txt, which onnxrank split did not write"),
        (lambda out: (out / "request.onnx").write_bytes(b"mine"), "request.onnx, which was changed since"),
        (lambda out: (out / "contract.json").write_text("{}"), "no result of onnxrank split"),
        (lambda out: (out / "contract.json").unlink(), "no result of onnxrank split"),
    ],
)
def test_what_is_not_a_result_is_not_replaced(tmp_path: Path, spoil: Any, says: str) -> None:
    out = tmp_path / "out"
    _split(ranker_model(), out)
    spoil(out)
    held = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(UsageError, match=re.escape(says)):
        _split(ranker_model(), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == held


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, says in ((tmp_path / "file", "is a file"), (tmp_path / "a" / "b", "does not exist")):
        with pytest.raises(UsageError, match=says):
            _split(ranker_model(), place)
    path = tmp_path / "home" / "m.onnx"
    path.parent.mkdir()
    onnx.save(ranker_model(), path)
    with pytest.raises(UsageError, match="holds the model itself"):
        split(path, tmp_path / "home", request=["user"])


def test_a_failing_replacement_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    _split(ranker_model(), out)
    held = {p.name: p.read_bytes() for p in out.iterdir()}
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(Exception, match="Input/output error"):
        _split(ranker_model(20), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == held
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# --- every model -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(MODELS.glob("*.onnx")), ids=lambda p: p.stem)
def test_every_model_is_divided(path: Path, tmp_path: Path) -> None:
    spec = yaml.safe_load((MODELS / f"{path.name.split('.')[0]}.roles.yaml").read_text())
    made = split(path, tmp_path / "out", spec=spec, check="quick")
    assert verify(path, tmp_path / "out", Checks(level="quick")).passed
    assert made.report.advice.files == 1  # they are small: one call more costs what the state saves
    jsonschema.validate(json.loads(json.dumps(made.contract)), CONTRACT)


def test_an_error_of_a_state_is_told_by_the_pair(tmp_path: Path) -> None:
    _split(ranker_model(), tmp_path / "out")
    pair = halves.Pair(tmp_path / "out")
    whole, request, candidates = feeds(3)
    (score,) = pair.run(["score"], {**request, **candidates})
    np.testing.assert_array_equal(score, run(ranker_model(), whole)["score"])
    assert [i.name for i in pair.get_inputs()] == ["user", "item"]
    pair._contract["state_version"] += 1
    with pytest.raises(ranker.StateError, match="another request model"):
        pair.run(["score"], {**request, **candidates})


def test_the_types_that_a_state_has_are_numpys() -> None:
    assert halves.type_name(TensorProto.FLOAT) == "float32" and halves.type_name(TensorProto.BOOL) == "bool"
    assert halves.type_name(TensorProto.STRING) is None and halves.type_name(TensorProto.BFLOAT16) is None
    assert onnxruntime.__version__


@pytest.mark.parametrize("form", ["plain", "python", "triton"])
def test_inputs_side_by_side(tmp_path: Path, form: str) -> None:
    """Both models take matrices, the contract says which columns are whose, and everything reads it."""
    g = Graph(17)
    ids = [g.input(f"user_{k}", ["N", 1], INT64) for k in range(3)]
    rows = [g.op("Gather", g.const(whole_numbers(5 + k, 4, seed=k)), i) for k, i in enumerate(ids)]
    parts = [g.op("Flatten", r, axis=1) for r in rows]
    user = g.op("Relu", g.op("MatMul", g.op("Concat", *parts, axis=1), g.const(whole_numbers(12, 12))))
    item, more = g.input("item", ["N", 4]), g.input("more", ["N"])
    column = g.op("Unsqueeze", more, g.ints(1))
    both = g.op("Concat", user, item, column, axis=1)
    hidden = g.op("Relu", g.op("MatMul", both, g.const(whole_numbers(17, 8, seed=1))))
    g.op("MatMul", hidden, g.const(whole_numbers(8, 1, seed=112)))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    model = g.model()
    out = tmp_path / "out"
    made = _split(model, out, "user*", format=form, pack=True, name="r")
    contract = json.loads((out / "contract.json").read_text())
    jsonschema.validate(contract, CONTRACT)
    request, candidate = ({i["name"]: i for i in contract["models"][p]["inputs"]} for p in ("request", "candidate"))
    assert [c["name"] for c in request["request.ids"]["columns"]] == ["user_0", "user_1", "user_2"]
    columns = candidate["candidate.values"]["columns"]
    assert [(c["name"], c["at"], c["width"]) for c in columns] == [("item", 0, 4), ("more", 4, 1)]
    assert "inputs are packed (request.ids: 3 inputs in 3 columns)" in made.report.notes
    assert verify(model, out, Checks(level="quick")).passed
    if form == "triton":
        text = (out / "r" / "config.pbtxt").read_text()
        assert '{ name: "request.ids" data_type: TYPE_INT64 dims: [ 1, 3 ] }' in text
        assert '{ name: "candidate.values" data_type: TYPE_FP32 dims: [ -1, 5 ] }' in text
        from onnxrank import cli

        assert cli.main(["lint", str(out)]) == 0
        return
    serve = ranker.Ranker(out)
    once = {f"user_{k}": np.array([[k]]) for k in range(3)}
    many = {"item": numbers(3, 4), "more": numbers(3, 1)[:, 0]}
    want = run(model, {k: np.repeat(v, 3, 0) for k, v in once.items()} | many)["score"]
    assert np.array_equal(serve.score(once, many)["score"], want)
    matrices = {"request.ids": np.array([[0, 1, 2]])}, {"candidate.values": np.c_[many["item"], many["more"]]}
    assert np.array_equal(serve.score(*matrices)["score"], want)
    assert (serve.cache.counters.hits, serve.cache.counters.misses) == (1, 1)
    with pytest.raises(ValueError, match="'user_1' is missing; it takes"):
        serve.score({"user_0": once["user_0"]}, many)
    with pytest.raises(ValueError, match=r"'user_1' is int64 \[2, 1\], and must be int64 \[1, 1\]"):
        serve.score({**once, "user_1": np.zeros((2, 1), np.int64)}, many)
    with pytest.raises(Exception, match="out of data bounds"):
        serve.score({**once, "user_0": np.array([[5]])}, many)
    if form == "python":
        text = (out / "ranker.py").read_text()
        assert "    user_1: int64 [1, 1]\n" in text
        assert "request.ids: int64 [1, 3], columns user_0, user_1, user_2" in text


# --- several requests per call ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["lengths", "offsets", "index"])
@pytest.mark.parametrize("how", [{}, {"state": "packed"}, {"guard": False}, {"pack": True}])
def test_the_candidate_model_takes_several_states(tmp_path: Path, rows: str, how: dict[str, Any]) -> None:
    model = ranker_model()
    made = _split(model, tmp_path / "out", rows=rows, **how)
    jsonschema.validate(json.loads((tmp_path / "out" / "contract.json").read_text()), CONTRACT)
    told = batches.convention(made.candidate)
    assert told is not None
    columns = told.get(PACKED, {})
    assert {k: v for k, v in told.items() if k != PACKED} == made.contract["models"]["candidate"]["rows"]
    assert set(columns) == ({"candidate.values"} if how.get("pack") else set())
    of_request = {k: v for k, v in made.contract["optimize"].get(PACKED, {}).items() if k not in columns}
    for counts in ([3], [2, 0, 5, 1]):
        every = [feeds(n, seed=10 * k) for k, n in enumerate(counts)]
        once = [run(made.request, ranker.matrices(of_request, request)) for _, request, _ in every]
        single = [{**state, **candidates} for state, (_, _, candidates) in zip(once, every, strict=True)]
        got = batches.parted(told, run(made.candidate, batches.joined(told, single)), counts)
        for (whole, _, _), found, n in zip(every, got, counts, strict=True):
            want = run(model, whole)["score"] if n else np.zeros((0, 1))
            np.testing.assert_array_equal(found["score"], want)
    assert verify(model, tmp_path / "out", options=Checks(level="quick")).passed


def test_one_stale_state_among_several(tmp_path: Path) -> None:
    """Its own scores are NaN, and nobody else's."""
    made = _split(ranker_model(), tmp_path / "out", rows="lengths")
    told = batches.convention(made.candidate)
    assert told is not None
    single = [{**run(made.request, r), **c} for _, r, c in (feeds(3, seed=k) for k in range(3))]
    feed = batches.joined(told, single)
    want = run(made.candidate, feed)["score"]
    feed["state_version"] = feed["state_version"] + np.array([[0], [1], [0]])
    got = run(made.candidate, feed)["score"]
    assert np.isnan(got[3:6]).all()
    np.testing.assert_array_equal(np.delete(got, range(3, 6), 0), np.delete(want, range(3, 6), 0))


def test_states_whose_length_varies(tmp_path: Path) -> None:
    model = history_model()
    made = _split(model, tmp_path / "out", "history", rows="index")
    told = batches.convention(made.candidate)
    assert told is not None
    counts, histories = [2, 4], [numbers(1, 6, 4, seed=k) for k in range(2)]
    items = [numbers(n, 4, seed=9 + n) for n in counts]
    single = [{**run(made.request, {"history": h}), "item": i} for h, i in zip(histories, items, strict=True)]
    got = batches.parted(told, run(made.candidate, batches.joined(told, single)), counts)
    for h, i, found in zip(histories, items, got, strict=True):
        want = run(model, {"history": np.repeat(h, len(i), 0), "item": i})["score"]
        np.testing.assert_array_equal(found["score"], want)


@pytest.mark.parametrize("options", [{"format": "python", "rows": "lengths"}, {"format": "triton", "rows": "index"},
                                     {"rows": "triton"}, {"rows": "counts"}])  # fmt: skip
def test_rows_that_a_format_does_not_have(options: Mapping[str, Any]) -> None:
    with pytest.raises(UsageError, match="rows"):
        Options(**options)


def test_the_module_for_one_request_says_so(tmp_path: Path) -> None:
    _split(ranker_model(), tmp_path / "out", rows="lengths")
    with pytest.raises(ValueError, match="several requests"):
        ranker.Ranker(tmp_path / "out")
