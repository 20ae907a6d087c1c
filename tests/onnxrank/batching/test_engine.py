"""Several requests per call: the same scores as one after the other, whatever tells them apart; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from helpers import INT64, Graph, run, session, whole_numbers
from onnx import ModelProto, TensorProto, helper, numpy_helper
from split_models import history_model, ranker_model

import onnxrank
from onnxrank import batches, cost
from onnxrank import model as files
from onnxrank.batching import assembly
from onnxrank.batching.engine import Options, batch
from onnxrank.cli.app import cli
from onnxrank.errors import CheckFailed, ModelError, UsageError
from onnxrank.graphs import subgraphs
from onnxrank.splitting import split
from onnxrank.verify import Options as Checks
from onnxrank.verify import verify
from onnxrank.writers import to_json

Arrays = dict[str, np.ndarray[Any, Any]]
FORMS = [{"rows": r} for r in ("lengths", "offsets", "index", "triton")] + [{"interface": "padded"}]
COUNTS = [[4], [1, 3], [0, 2, 0, 0, 300, 1, 0], [2] * 32]


@pytest.fixture(autouse=True)
def _only_products_cost() -> Iterator[None]:
    """Models as small as these are rewritten, whatever that costs besides products."""
    with mock.patch.object(cost, "CPU", cost.Target(launch=0.0, byte=1e-16, mac=1 / 25e9)):
        yield


def _batch(model: ModelProto, request: str = "user", check: Any = False, **options: Any) -> ModelProto:
    return batch(model, request=[request], check=check, options=Options(**options)).model


def _requests(
    counts: list[int], once: str = "user", shape: tuple[int, ...] = (6,)
) -> tuple[list[Arrays], list[Arrays]]:
    """Per request the inputs of the original, and of a model that takes one row of what is the request's."""
    whole, single = [], []
    for k, n in enumerate(counts):
        user, items = whole_numbers(1, *shape, seed=k), whole_numbers(max(n, 1), 4, seed=50 + k)[:n]
        whole.append({once: np.repeat(user, n, 0), "item": items})
        single.append({once: user, "item": items})
    return whole, single


def _told(made: ModelProto) -> dict[str, Any]:
    told = batches.convention(made)
    assert told is not None
    return told


def _held(model: ModelProto, made: ModelProto, counts: list[int], **how: Any) -> None:
    """Holds one call against the original, request by request."""
    told, (whole, single) = _told(made), _requests(counts, **how)
    got = batches.parted(told, run(made, batches.joined(told, single)), counts)
    for feed, n, found in zip(whole, counts, got, strict=True):
        if n:
            np.testing.assert_array_equal(found["score"], run(model, feed)["score"])
        else:
            assert found["score"].shape[0] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("counts", COUNTS)
def test_scores_are_those_of_single_requests(form: dict[str, str], counts: list[int]) -> None:
    model = ranker_model()
    made = _batch(model, **form)
    onnx.checker.check_model(made, full_check=True)
    _held(model, made, [3] * len(counts) if "interface" in form else counts)


@pytest.mark.parametrize("form", FORMS)
def test_keys_that_a_request_makes_meet_its_own_candidates(form: dict[str, str]) -> None:
    """A product of candidates with what their request gives: packed, and back."""
    model = history_model()
    made = _batch(model, "history", **form)
    for counts in ([5], [2, 1, 3], [0, 4, 0, 1, 90]):
        _held(model, made, [3] * len(counts) if "interface" in form else counts, once="history", shape=(7, 4))


def test_what_is_the_requests_is_computed_once_per_request() -> None:
    made = _batch(ranker_model())
    shown = session(_several(made, "Relu"))
    _, single = _requests([3, 4])
    feed = batches.joined(_told(made), single)
    assert {o.shape[0] for o in shown.run(None, feed)} == {2, 7}


def _several(made: ModelProto, op: str) -> ModelProto:
    """The nodes for several requests, with the results of an operator as outputs."""
    out = ModelProto()
    out.CopyFrom(made)
    (last,) = (n for n in made.graph.node if n.op_type == "If")
    body = helper.get_node_attr_value(last, "else_branch")
    del out.graph.node[-1], out.graph.output[:]
    out.graph.node.extend(body.node)
    out.graph.initializer.extend(body.initializer)
    out.graph.output.extend(helper.make_empty_tensor_value_info(n.output[0]) for n in body.node if n.op_type == op)
    return out


def test_each_branch_has_the_weights_of_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(made: ModelProto) -> tuple[set[str], list[int]]:
        """Weights outside, and how many of them each branch has."""
        (last,) = (n for n in made.graph.node if n.op_type == "If")
        weights = {i for n in ranker_model().graph.node if n.op_type in ("Gemm", "MatMul") for i in n.input[1:]}
        outside = {t.name for t in made.graph.initializer}
        inside = [{t.name.rpartition("/")[0] for t in g.initializer} for g in subgraphs(last)]
        assert not {t.name for g in subgraphs(last) for t in g.initializer} & outside
        return outside & weights, [len(own & weights) for own in inside]

    monkeypatch.setattr(assembly, "_SMALL", 0)
    outside, inside = stored(_batch(ranker_model()))
    assert not outside and min(inside) > 0
    _held(ranker_model(), _batch(ranker_model()), [2, 0, 3])
    monkeypatch.setattr(assembly, "_PRODUCTS", 0)
    outside, inside = stored(_batch(ranker_model()))
    assert outside and inside == [0, 0]


# --- relations -------------------------------------------------------------------------------------------------------


def test_requests_do_not_influence_each_other() -> None:
    """Permuted, joined, divided, and with another user: the others' scores stay."""
    made = _batch(ranker_model())
    told, runs = _told(made), session(made)
    counts = [2, 0, 3, 1, 4]
    _, single = _requests(counts)

    def scores(order: list[int], feeds: list[Arrays]) -> dict[int, np.ndarray[Any, Any]]:
        given = [feeds[k] for k in order]
        parts = batches.parted(told, run(runs, batches.joined(told, given)), [counts[k] for k in order])
        return {k: p["score"] for k, p in zip(order, parts, strict=True)}

    plain = scores([0, 1, 2, 3, 4], single)
    changed = [*single]
    changed[2] = {**single[2], "user": single[2]["user"] + 1}
    for found in (
        scores([3, 1, 4, 0, 2], single),
        scores([0, 1], single) | scores([2, 3, 4], single),
        {k: v for k, v in scores([0, 1, 2, 3, 4], changed).items() if k != 2} | {2: plain[2]},
        {k: scores([k], single)[k] for k in (0, 2, 3, 4)} | {1: plain[1]},
    ):
        for k, want in plain.items():
            np.testing.assert_array_equal(found[k], want)
    assert (scores([0, 1, 2, 3, 4], changed)[2] != plain[2]).any()


# --- the guard -------------------------------------------------------------------------------------------------------

WRONG = {
    "lengths": [[3, 3], [2, 4], [-1, 6], [5], [2, 3, 0], [0, 0], [2**62, 2**62]],
    "offsets": [[0, 2, 6], [1, 2, 5], [0, 6, 5], [0, 5], [0, 0, 0]],
    "index": [[0, 1, 0, 1, 1], [0, 0, 2, 2, 2], [-1, 0, 0, 1, 1], [1, 1, 0, 0, 0]],
    "triton": [[[3, 4], [3, 4]], [[-1, 4], [6, 4]], [[5, 4]]],
}


@pytest.mark.parametrize("rows", WRONG)
def test_what_does_not_add_up_gives_nan(rows: str) -> None:
    made = _batch(ranker_model(), rows=rows)
    told, runs = _told(made), session(made)
    feed = batches.joined(told, _requests([2, 3])[1])
    assert not np.isnan(run(runs, feed)["score"]).any()
    for wrong in WRONG[rows]:
        got = run(runs, {**feed, told["name"]: np.array(wrong, feed[told["name"]].dtype)})
        assert got["score"].size == 5 and np.isnan(got["score"]).all(), wrong


def test_rows_of_another_number_of_requests_give_no_scores() -> None:
    """Not even one that could be broadcast to all requests."""
    g = Graph(17)
    user, place, item = (g.input(name, ["N", 4]) for name in ("user", "place", "item"))
    g.op("Relu", g.op("Add", g.op("Mul", user, place), item))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    made = batch(g.model(), request=["user", "place"], check=False).model
    feed = {"user": whole_numbers(2, 4), "place": whole_numbers(2, 4), "item": whole_numbers(5, 4)}
    feed |= {"request_lengths": np.array([2, 3])}
    assert not np.isnan(run(made, feed)["score"]).any()
    assert np.isnan(run(made, {**feed, "place": feed["place"][:1]})["score"]).all()
    with pytest.raises(Exception, match="out of data bounds"):
        run(made, {**feed, "user": feed["user"][:1], "place": feed["place"][:1]})


def test_no_guard() -> None:
    plain, guarded = _batch(ranker_model(), guard=False), _batch(ranker_model())
    assert "Where" in [n.op_type for n in _several(guarded, "Relu").graph.node]
    model = ranker_model()
    _held(model, plain, [2, 3])


# --- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{"rows": "lengths"}, {"rows": "triton"}, {"interface": "padded"}])
def test_verify_takes_it(form: dict[str, str]) -> None:
    model = ranker_model()
    made = _batch(model, check="quick", **form)
    found = verify(model, made, Checks(level="quick", requests=(1, 3)))
    assert found.passed
    names = {c.inputs for c in found.cases}
    assert {"1 requests", "3 requests", "3 requests in another order", "a part of 3 requests"} <= names
    assert ("requests that do not add up" in names) == ("rows" in form)


def test_verify_sees_candidates_of_another_user() -> None:
    """Wrong where there are several requests only: with one, its nodes are those for one."""
    model, made = ranker_model(), _batch(ranker_model())
    (last,) = (n for n in made.graph.node if n.op_type == "If")
    body = next(a.g for a in last.attribute if a.name == "else_branch")
    sums = {n.output[0] for n in body.node if n.op_type == "CumSum"}
    gather = next(n for n in body.node if n.op_type == "Gather" and n.input[1] in sums)
    body.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "none"))
    at = list(body.node).index(gather)
    body.node.insert(at, helper.make_node("Mul", [gather.input[1], "none"], ["first"]))
    gather.input[1] = "first"
    found = verify(model, made, Checks(level="quick", requests=(1, 2)))
    assert not found.passed
    assert {c.inputs for c in found.failed_cases} >= {"2 requests"}
    assert all(c.inputs != "1 requests" for c in found.failed_cases)


def test_verify_tells_of_rows_that_are_missing() -> None:
    made = _batch(ranker_model())
    made.graph.output[0].name = "whole"
    (last,) = (n for n in made.graph.node if n.op_type == "If")
    last.output[0] = "whole"
    # Right for one request, and one row short for several.
    made.graph.node.append(helper.make_node("Shape", ["user"], ["several"], start=0, end=1))
    made.graph.initializer.append(numpy_helper.from_array(np.array([1]), "row"))
    made.graph.node.append(helper.make_node("Min", ["several", "two"], ["start"]))
    made.graph.initializer.append(numpy_helper.from_array(np.array([2]), "two"))
    made.graph.node.append(helper.make_node("Sub", ["start", "row"], ["left_out"]))
    made.graph.initializer.append(numpy_helper.from_array(np.array([1 << 40]), "end"))
    made.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
    made.graph.node.append(helper.make_node("Slice", ["whole", "left_out", "end", "axis"], ["score"]))
    made.graph.output[0].name = "score"
    found = verify(ranker_model(), made, options=Checks(level="quick"))
    assert not found.passed and any("another number of rows" in f.message for f in found.findings)


def test_a_model_for_one_request_stands_for_it(tmp_path: Any) -> None:
    for form in FORMS:
        made = _batch(ranker_model(), **form)
        one = batches.single(files.load(made))
        assert one.batch is made
        onnx.checker.check_model(one.proto, full_check=True)
        whole, single = _requests([3])
        np.testing.assert_array_equal(run(one.proto, single[0])["score"], run(ranker_model(), whole[0])["score"])
    plain = files.load(ranker_model())
    assert batches.single(plain) is plain


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("each", [False, True])
def test_shapes_that_are_found_in_the_data_run_request_by_request(form: dict[str, str], each: bool) -> None:
    g = Graph(17)
    user, item = g.input("user", ["N", 6]), g.input("item", ["N", 4])
    first = g.op("Gather", user, g.ints(0), axis=1)
    places = g.op("Transpose", g.op("NonZero", g.op("Greater", item if each else user, first)))
    if each:  # entries are picked, and put back among zeros
        picked = g.op("Mul", g.op("GatherND", item, places), g.const([3.0]))
        odd = g.op("ScatterND", g.op("Mul", item, g.const([0.0])), places, picked)
    else:  # a number for all candidates of a request
        odd = g.op("ReduceSum", g.op("Cast", places, to=TensorProto.FLOAT), keepdims=0)
    g.op("Add", odd, g.op("Relu", item))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    made = batch(g.model(), request=["user"], check=False, options=Options(**form))
    assert any("found in the data" in n for n in made.report.notes)
    for counts in COUNTS if "rows" in form else [[4], [2] * 32]:
        _held(g.model(), made.model, counts)


@pytest.mark.parametrize("form", FORMS)
def test_columns_are_padded(form: dict[str, str]) -> None:
    """Of candidates, of requests, and of what lies in another order; rows of candidates are not."""
    g = Graph(17)
    user, item = g.input("user", ["N", 6]), g.input("item", ["N", 4])
    wide = g.op("Pad", item, g.ints(0, 1, 0, 2), mode="edge")
    mine = g.op("Pad", g.op("Relu", user), g.ints(0, 0, 0, 1), mode="edge")
    turned = g.op("Pad", g.op("Transpose", user, perm=[1, 0]), g.ints(1, 0, 0, 0), mode="edge")
    g.op("Add", g.op("Mul", wide, mine), g.op("Mul", g.op("Transpose", turned, perm=[1, 0]), wide))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 7])
    made = batch(g.model(), request=["user"], check=False, options=Options(**form))
    for counts in COUNTS if "rows" in form else [[4], [2] * 32]:
        _held(g.model(), made.model, counts)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_candidates_that_influence_each_other_are_refused() -> None:
    g = Graph(17)
    user, item = g.input("user", ["N", 4]), g.input("item", ["N", 4])
    both = g.op("Add", user, item)
    g.op("Sub", both, g.op("ReduceMean", both, axes=[0], keepdims=1))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    with pytest.raises(ModelError, match="takes in candidates together"):
        _batch(g.model())


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("Squeeze", r"number of axes of .* is not known \(Squeeze: without axes it drops every axis of 1"),
        ("NonZero", r"found in the data of each request \(.*: NonZero gives an extent that is not proved\)"),
    ],
)
def test_shapes_that_differ_between_requests_are_refused_with_their_cause(op: str, reason: str) -> None:
    g = Graph(17)
    user, item = g.input("user", ["N", 4]), g.input("item", ["N", 4])
    both = g.op("Unsqueeze", g.op("Add", user, item), g.ints(2))
    if op == "Squeeze":
        g.op("Add", g.op("Squeeze", both), item)
    else:
        g.op("Cast", g.op("NonZero", both), to=TensorProto.FLOAT)
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 4])
    with pytest.raises(ModelError, match=reason):
        _batch(g.model())


def test_what_nobody_knows_is_refused_for_candidates_and_runs_alone_for_requests() -> None:
    def model(on: str) -> ModelProto:
        g = Graph(17)
        user, item = g.input("user", ["N", 4]), g.input("item", ["N", 4])
        odd = g.op("Trilu", g.op("Reshape", user if on == "user" else item, g.ints(-1, 2, 2)))
        odd = g.op("Reshape", odd, g.ints(-1, 4))
        g.op("Add", odd, item if on == "user" else user)
        g.nodes[-1].output[0] = "score"
        g.output("score", ["N", 4])
        return g.model()

    with pytest.raises(ModelError, match=r"Trilu.*not known to treat rows independently"):
        _batch(model("item"))
    made = batch(model("user"), request=["user"], check=False)
    assert any("run request by request" in n for n in made.report.notes)
    schema = json.loads((Path(onnxrank.__file__).parent / "optimize.schema.json").read_text())
    jsonschema.validate(json.loads(to_json(made.report)), schema)
    _held(model("user"), made.model, [2, 0, 3], shape=(4,))


def test_names_and_options() -> None:
    made = _batch(ranker_model(), name="sizes")
    assert "sizes" in {i.name for i in made.graph.input}
    with pytest.raises(UsageError, match="--rows-name"):
        _batch(ranker_model(), name="item")
    with pytest.raises(UsageError, match="leave the rows"):
        Options(interface="padded", rows="index")
    with pytest.raises(UsageError, match="not known"):
        Options(rows="counts")
    with pytest.raises(UsageError, match="'batch' or 'padded'"):
        Options(interface="same")
    with pytest.raises(UsageError, match="0 requests"):
        Options(requests=0)


@pytest.mark.parametrize("opset", [11, 12, 13, 18])
def test_opsets(opset: int) -> None:
    g = Graph(opset)
    user, item = g.input("user", ["N", 4]), g.input("item", ["N", 4])
    tower = g.op("Relu", g.op("MatMul", user, g.const(whole_numbers(4, 4))))
    g.op("Mul", g.op("MatMul", g.op("Add", tower, item), g.const(whole_numbers(4, 3))), g.const(whole_numbers(3)))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 3])
    model = g.model()
    for form in FORMS:
        made = _batch(model, **form)
        for counts in ([3], [2, 2, 2]):
            _held(model, made, counts, shape=(4,))


def test_what_takes_several_requests_is_not_optimised_again() -> None:
    made = _batch(ranker_model())
    for again in (onnxrank.optimize, split, batch):
        with pytest.raises(ModelError, match=r"takes several requests per call .*Give the original"):
            again(made)
    stored = json.loads(next(p.value for p in made.metadata_props if p.key == "onnxrank.contract"))
    assert (stored["interface"], stored["requests"], stored["rows"]["form"]) == ("batch", 8, "lengths")


@pytest.mark.slow
def test_a_model_that_was_optimised_for_one_request_is_taken() -> None:
    model = ranker_model()
    one = onnxrank.optimize(model, request=["user"], check=False).model
    _held(model, batch(one, check="quick").model, [1, 0, 5])


def test_a_failing_check_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxrank.batching.rows import Requests

    monkeypatch.setattr(Requests, "index", lambda self, *how: self._zeros(self.candidates()))
    with pytest.raises(CheckFailed, match="several requests did not pass"):
        _batch(ranker_model(), check="quick")


def test_command_line(tmp_path: Any) -> None:
    path, out = tmp_path / "m.onnx", tmp_path / "b.onnx"
    onnx.save(ranker_model(), path)
    options = ["--request", "user", "--interface", "batch", "--rows", "offsets", "--tune", "0", "--check", "quick"]
    result = CliRunner().invoke(cli, ["optimize", str(path), str(out), *options])
    assert result.exit_code == 0, result.output
    assert [i.name for i in onnx.load(out).graph.input if i.type.tensor_type.elem_type == INT64] == ["request_offsets"]
    verified = ["verify", str(path), str(out), "--requests", "1,4", "--level", "quick"]
    result = CliRunner().invoke(cli, verified)
    assert result.exit_code == 0 and "PASSED" in result.output
    result = CliRunner().invoke(cli, ["optimize", str(path), str(out), "--request", "user", "--rows", "index"])
    assert result.exit_code == 2
