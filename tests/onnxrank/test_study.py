"""What is derived of a model is held against runs; a contradiction is an error of onnxrank that leaves it alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import FLOAT, Graph, candidate, request
from modelkit import mlp
from onnx import ModelProto

import onnxrank
from onnxrank import cli, facts, operators
from onnxrank.errors import ModelError
from onnxrank.extents import minimum
from onnxrank.feeds import describe
from onnxrank.model import load
from onnxrank.operators import Operator, Use
from onnxrank.roles import resolve
from onnxrank.study import Study, resolve_ifs

ERROR = "an error of onnxrank: "


def entered(monkeypatch: pytest.MonkeyPatch, op: str, entry: Operator) -> None:
    """Puts a wrong entry into the registry."""
    monkeypatch.setitem(operators.REGISTRY, op, entry)


def wider(use: Use) -> list[Any]:
    rows, columns = use.shape(0)
    return [[rows, columns + 1]]


def studied(model: ModelProto, *patterns: str) -> Study:
    return Study(model, resolve(describe(model), request=patterns), load(model))


def test_a_right_entry_is_not_contradicted() -> None:
    assert studied(mlp(), "user").contradicted() is None


def test_large_and_long_tensors_are_measured_within_the_run() -> None:
    """Those of few entries are given as they are; of all of them, shapes alone come back, and all are held."""
    g = Graph(17)
    item, hist = g.input("item", ["N", 4]), g.input("hist", ["N", "L", 4])
    wide = g.op("MatMul", item, g.const(np.ones((4, 2048), np.float32)))
    pooled = g.op("ReduceSum", g.op("Neg", hist), g.ints(0, 1, 2), keepdims=0)
    g.output(g.op("Add", g.op("Relu", wide), pooled), ["N", 2048])
    study = studied(g.model(), "hist")
    made = {o for n in study.model.graph.node for o in n.output}
    small = study._small() & made
    assert {n.output[0] for n in study.model.graph.node if n.op_type == "ReduceSum"} == small
    with facts.Probe(study.model, None, small) as probe:
        found = probe.measure({"item": np.ones((3, 4), np.float32), "hist": np.ones((3, 5, 4), np.float32)})
    assert found.keys() == made
    assert {wide: (3, 2048), pooled: ()}.items() <= found.items() and (3, 5, 4) in found.values()


@pytest.mark.slow
def test_a_contradiction_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own bytes come back, and the reason names the tensor, both shapes and where that was."""
    entered(monkeypatch, "Relu", Operator(wider))
    model = mlp()
    result = onnxrank.optimize(model, request=["user"])
    assert not result.changed and result.model.SerializeToString() == model.SerializeToString()
    (found,) = result.report.refusals
    assert (found.node, found.op) == ("r", "Relu")
    assert found.reason.startswith(f"{ERROR}'r' has the shape [2, 8] where [2, 9] was derived (N = 2)")
    assert "please report it" in found.reason
    assert not result.plan.changed and not result.plan.sites


@pytest.mark.slow
def test_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 0, or 5 where a change was required; the output is the input's own bytes."""
    entered(monkeypatch, "Relu", Operator(wider))
    source, out, report = tmp_path / "in.onnx", tmp_path / "out.onnx", tmp_path / "report.json"
    onnx.save(mlp(), source)
    args = ["optimize", str(source), str(out), "--request", "user", "--report", str(report)]
    assert cli.main(args) == 0
    assert out.read_bytes() == source.read_bytes()
    assert ERROR in json.dumps(json.loads(report.read_text())["refusals"]) and ERROR in capsys.readouterr().out
    assert cli.main([*args, "--require-change"]) == 5


def history() -> ModelProto:
    g = Graph()
    h, c = g.input("h", ["N", "L", 4]), g.input("c", ["N", 4])
    pooled = g.on_axes("ReduceSum", g.op("Relu", h), [1], keepdims=0)
    g.output(g.op("Add", pooled, c), ["N", 4], FLOAT)
    return g.model()


def test_what_only_long_histories_contradict(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that is right up to a length of 40: the run at long ones tells."""

    def cut(use: Use) -> list[Any]:
        rows, length, width = use.shape(0)
        return [[rows, minimum(length, 40), width]]

    entered(monkeypatch, "Relu", Operator(cut))
    found = studied(history(), "h").contradicted()
    assert found is not None and "[1, 67, 4] where [1, 40, 4] was derived" in found.reason


def test_a_rank_is_held_against_runs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    entered(monkeypatch, "Relu", Operator(lambda use: [[*use.shape(0), 1]]))
    found = studied(mlp(), "user").contradicted()
    assert found is not None and "[2, 8] where [2, 8, 1] was derived" in found.reason


@pytest.mark.slow
def test_a_model_that_does_not_run_is_no_contradiction() -> None:
    g = Graph()
    u, c = (i.declare(g) for i in (request("u", 4), candidate("c", 4)))
    x = g.op("Reshape", g.op("Concat", u, c, axis=1), g.ints(3, 8))
    g.output(x, [3, 8])
    with pytest.raises(ModelError, match="does not run at several numbers of candidates"):
        studied(g.model(), "u")


def test_a_branch_that_extents_choose_is_taken() -> None:
    """A branch that is taken at every number of candidates takes the place of its If."""
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,4] u, float[N,4] c) => (float[N,4] y) {'
        " s = Shape<start=1, end=2>(u) four = Constant<value_ints=[4]>() same = Equal(s, four) is = Squeeze(same)"
        " x = If(is) <then_branch = t () => (float[N,4] a) { a = Add(u, c) },"
        " else_branch = e () => (float[N,4] b) { b = Sub(u, c) }> y = Relu(x) }"
    )
    model = onnx.parser.parse_model(text)
    made = studied(model, "u")
    assert "If" not in [n.op_type for n in made.model.graph.node] and made.contradiction is None
    assert "Add" in [n.op_type for n in made.model.graph.node]
    assert resolve_ifs(made.model, made.facts) is None
