"""What is wrong, refused by the runtime, or fails, is left out; the rest is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers import Graph, run
from onnx import ModelProto

import onnxrank
from onnxrank import cli, retreat
from onnxrank.contract import stored_contract
from onnxrank.errors import CheckFailed
from onnxrank.passes import choosing
from onnxrank.plans import Choice, Place, Site
from onnxrank.retreat import GaveUp, Search
from onnxrank.verify import gate
from onnxrank.verify.engine import Engine
from onnxrank.workers import Worker

LAYERS = ("first", "second", "third")


def rules_file(name: str, source: str) -> str:
    """A file with one rule, for Gemm: the function `gemm` of some source, which has `fc` to go on from."""
    return f'''
from onnxrank import Rule
from onnxrank.rules import fc
{source}

RULES = [
    Rule(
        name="{name}", title="", identity="", source="", legal="", refuses="", exactness="exact",
        operators={{"Gemm": gemm}},
    )
]
'''


def wrong(*at: str) -> str:
    return rules_file(
        "twice",
        f'''
def gemm(rw, node):
    """Adds the bias twice, at some nodes."""
    made = fc.gemm(rw, node)
    if made is None or node.name not in {at!r}:
        return made
    terms = rw.terms(made[0])
    return [rw.add([*terms, terms[-1]], made[0].dims, made[0].dtype)]
''',
    )


RAISES = rules_file(
    "zero",
    '''
def gemm(rw, node):
    """Writes something, and fails."""
    rw.emit.add("Neg", [rw.tensor(rw.value(node, 0))])
    return [1 // 0]
''',
)

REFUSED = rules_file(
    "refused",
    '''
def gemm(rw, node):
    """Writes, at one node, an operator that no runtime has; its deferred neighbours fail when they are written."""
    value = fc.gemm(rw, node)
    if value is None or node.name != "second":
        return value
    name = rw.tensor(value[0])
    made = value[0]
    return [rw.new(made.dims, made.dtype, rw.present(rw.settle(made)), rw.emit.add("NoSuchOperator", [name]))]
''',
)

ONE_ROW = rules_file(
    "second_row",
    '''
import numpy as np


def gemm(rw, node):
    """Reads, at one node, the second row, which is not there where a request has one candidate."""
    made = fc.gemm(rw, node)
    if made is None or node.name != "second":
        return made
    value = rw.settle(made[0])
    name = rw.tensor(value)
    row = rw.emit.add("Gather", [name, rw.emit.constant(np.array([1]))], {"axis": 0})
    same = rw.emit.add("Add", [name, rw.emit.add("Sub", [row, row])])
    return [rw.new(value.dims, value.dtype, rw.present(value), same)]
''',
)

LATER = rules_file(
    "later",
    '''
from onnxrank.values import Deferred


class Failing(Deferred):
    def materialise(self):
        raise ZeroDivisionError("later")


def gemm(rw, node):
    """Puts off, at one node, what fails when it is asked for."""
    made = fc.gemm(rw, node)
    if made is None or node.name != "second":
        return made

    source = rw.defer(made[0].dims, made[0].dtype, Failing(), "later")
    return [type(rw.settle(made[0]))(made[0].dims, made[0].dtype, source)]
''',
)


def towers(quantised: bool = False) -> ModelProto:
    """Three layers beside each other, each on [user | item], with whole-number weights; 8 bits behind them or not."""
    g, rng = Graph(), np.random.default_rng(0)
    user, item = g.input("user", ["N", 96]), g.input("item", ["N", 16])
    both = g.op("Concat", user, item, axis=1)
    made = []
    for name in LAYERS:
        weight, bias = rng.integers(-2, 3, (112, 32)), rng.integers(1, 4, 32)
        made.append(g.op("Relu", g.op("Gemm", both, g.const(weight), g.const(bias))))
        next(n for n in g.nodes if n.op_type == "Gemm" and n.name not in LAYERS).name = name
    y = g.op("Concat", *made, axis=1)
    if quantised:
        how = [g.const(4), g.const(0, np.uint8)]
        y = g.op("DequantizeLinear", g.op("QuantizeLinear", y, *how), *how)
    g.output(y, ["N", 96])
    return g.model()


def optimised(
    rules: str, folder: Path, quantised: bool = False, **options: object
) -> tuple[ModelProto, onnxrank.Result]:
    """The towers, with further rules, whatever it costs."""
    (folder / "rules.py").write_text(rules)
    model = towers(quantised)
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(model, request=["user"], extra_rules=[folder / "rules.py"], **options)  # type: ignore[arg-type]
    return model, result


def agree(model: ModelProto, result: onnxrank.Result) -> None:
    """The result gives the original's scores, to the bit."""
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 300):
        user = rng.integers(-3, 4, (1, 96)).astype(np.float32)
        item = rng.integers(-3, 4, (n, 16)).astype(np.float32)
        old = run(model, {"user": np.repeat(user, n, 0), "item": item})
        new = run(result.model, {"user": user, "item": item})
        for name, scores in old.items():
            np.testing.assert_array_equal(scores, new[name])


def sites(result: onnxrank.Result) -> dict[str, tuple[str, ...]]:
    return {r.name: r.nodes for r in result.report.rules}


@pytest.mark.parametrize("at", [("first",), ("second",), ("third",), ("first", "third")])
def test_a_wrong_site_is_left_out(tmp_path: Path, at: Sequence[str]) -> None:
    """The other sites of the rule stay; rule, site, inputs and numbers are named; the plan says so too."""
    model, result = optimised(wrong(*at), tmp_path)
    agree(model, result)
    assert result.changed and all(c.passed for c in result.report.checks)
    assert [(r.rule, r.node, r.cause) for r in result.report.retreats] == [("twice", node, "check") for node in at]
    for retreat_ in result.report.retreats:
        assert all(word in retreat_.reason for word in ("off by", "N =", "inputs", "seed"))
    taken = {s.node: s.chosen for s in result.plan.sites if s.place.rule == "twice"}
    assert taken == {name: "leave" if name in at else "take" for name in LAYERS}
    assert set(sites(result)["fc"]) == set(LAYERS)  # the marks are those of the rule that is called
    assert any("twice" in note and at[0] in note and "left out" in note for note in result.report.notes)


@pytest.mark.slow
def test_the_original_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is rewritten, and for all checks of one run together, however many retreats there are."""
    expected = optimised(wrong("first", "third"), tmp_path)[1]
    monkeypatch.setattr(gate, "_MANY", 1)
    sessions: list[str] = []
    checks: list[Engine] = []
    ask, run_ = Worker.ask, Engine.run

    def asked(worker: Worker, do: str, **arguments: Any) -> None:
        sessions.extend([arguments["session"]] if do == "open" else [])
        ask(worker, do, **arguments)

    monkeypatch.setattr(Worker, "ask", asked)
    monkeypatch.setattr(Engine, "run", lambda engine: checks.append(engine) or run_(engine))  # type: ignore[func-returns-value]
    model, result = optimised(wrong("first", "third"), tmp_path)
    agree(model, result)
    assert result.model == expected.model and len(result.report.retreats) == 2
    assert len(checks) > 2 and sessions.count("cpu/all") == len(checks) + 1
    assert all(e.original is checks[0].original for e in checks)


def test_strict(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed, match="algebra") as e:
        optimised(wrong("second"), tmp_path, strict=True)
    assert e.value.report is not None and not e.value.report.changed and not e.value.report.retreats


@pytest.mark.slow
def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 with what could be kept, 1 with --strict and no file, 0 with the original's bytes where nothing could."""
    (tmp_path / "rules.py").write_text(wrong("second"))
    source, out = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(towers().SerializeToString())
    arguments = ["optimize", str(source), str(out), "--request", "user", "--rules", str(tmp_path / "rules.py")]
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        assert cli.main([*arguments, "--strict"]) == 1 and not out.exists()
        assert cli.main(arguments) == 0 and out.read_bytes() != source.read_bytes()
        with mock.patch.object(retreat, "MOST_TRIES", 0), mock.patch.object(Search, "right", side_effect=GaveUp):
            assert cli.main([*arguments, "--require-change", "-q"]) == 5
            assert cli.main(arguments) == 0 and out.read_bytes() == source.read_bytes()
    assert "given up" in capsys.readouterr().out


def test_a_rule_that_raises(tmp_path: Path) -> None:
    """A remark asks for a report, and nothing of what it wrote is left: the bytes are those without the rule."""
    model, result = optimised(RAISES, tmp_path)
    agree(model, result)
    found = [r for r in result.report.refusals if r.rule == "zero"]
    assert {r.node for r in found} == set(LAYERS)
    assert all("internal error in rule 'zero' at node" in r.reason and "report" in r.reason for r in found)
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        plain = onnxrank.optimize(model, request=["user"])
    assert plain.model.graph == result.model.graph


@pytest.mark.slow
def test_a_node_that_the_runtime_refuses(tmp_path: Path) -> None:
    model, result = optimised(REFUSED, tmp_path)
    agree(model, result)
    taken = {s.node: s.chosen for s in result.plan.sites if s.place.rule == "refused"}
    assert taken == {"first": "take", "second": "leave", "third": "take"}
    (found,) = result.report.retreats
    assert (found.rule, found.node, found.cause) == ("refused", "second", "check")
    assert "NoSuchOperator" in found.reason


def test_what_does_not_run_for_one_number_of_candidates(tmp_path: Path) -> None:
    """The site is looked for where the model does not run, and not where it does."""
    model, result = optimised(ONE_ROW, tmp_path)
    agree(model, result)
    taken = {s.node: s.chosen for s in result.plan.sites if s.place.rule == "second_row"}
    assert taken == {"first": "take", "second": "leave", "third": "take"}
    (found,) = result.report.retreats
    assert (found.rule, found.node, found.cause) == ("second_row", "second", "check") and "N = " in found.reason


def test_what_is_put_off_and_fails(tmp_path: Path) -> None:
    """The site that put it off is left out, not the node at which it is asked for."""
    model, result = optimised(LATER, tmp_path)
    agree(model, result)
    taken = {s.node: s.chosen for s in result.plan.sites if s.place.rule == "later"}
    assert taken == {"first": "take", "second": "leave", "third": "take"}
    (found,) = [r for r in result.report.refusals if r.rule == "later"]
    assert found.node == "second" and "ZeroDivisionError: later" in found.reason


def test_a_node_that_reads_nothing(tmp_path: Path) -> None:
    """A tensor that no node makes is met before the runtime is asked."""
    model, result = optimised(REFUSED.replace("[name]", '["nobody makes this"]'), tmp_path)
    agree(model, result)
    (found,) = [r for r in result.report.refusals if r.rule == "refused"]
    assert found.node == "second" and "nothing makes" in found.reason


@pytest.mark.parametrize(
    "rules", [wrong("second"), pytest.param(REFUSED, marks=pytest.mark.slow)], ids=["wrong", "refused"]
)
def test_replay_after_a_retreat(tmp_path: Path, rules: str) -> None:
    """The plan in the contract gives the same bytes, and nothing is looked for again."""
    model, result = optimised(rules, tmp_path)
    contract = stored_contract(result.model)
    assert contract is not None
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(result.plan.to_dict()))
    with mock.patch.object(Search, "culprit", side_effect=AssertionError):
        again = onnxrank.optimize(model, plan=path, extra_rules=[tmp_path / "rules.py"])
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)


# --- the search ----------------------------------------------------------------------------------------------------


def site(rule: str, index: int) -> Site:
    return Site(Place(rule, index), f"node {index}", "MatMul", (), "take")


def search(wrong: Callable[[set[tuple[str, int]]], bool], tries: int = 64) -> tuple[Search, list[Site]]:
    """A search among three sites of each of three rules, of which some sets are wrong."""
    every = [site(rule, k) for k, rule in enumerate(["a", "b", "c"] * 3)]

    def make(choice: Choice) -> tuple[ModelProto | None, list[Site]]:
        found = [s for s in every if choice.at(s.place) != "leave"]
        made = ModelProto()
        made.doc_string = json.dumps([[s.place.rule, s.place.index] for s in found])
        return made, found

    def right(made: ModelProto) -> bool:
        return not wrong({(rule, k) for rule, k in json.loads(made.doc_string)})

    return Search(make, right, tries), every


@pytest.mark.parametrize("index", range(9))
def test_each_site_is_found(index: int) -> None:
    looking, every = search(lambda found: (every[index].place.rule, index) in found)
    guilty = looking.culprit(Choice(), ["a", "b", "c"])
    assert guilty.sites == (every[index],) and (guilty.number, guilty.count) == (index // 3 + 1, 3)
    assert guilty.without(Choice()).at(every[index].place) == "leave"


def test_two_sites_together() -> None:
    """The later of the two is named: without it the result is right."""
    looking, every = search(lambda found: {("a", 3), ("b", 7)} <= found)
    guilty = looking.culprit(Choice(), ["a", "b", "c"])
    assert guilty.sites == (every[7],)


def test_a_rule_that_is_wrong_everywhere() -> None:
    """Where even none of its sites is right the rule is named."""
    choices: list[Choice] = []

    def make(choice: Choice) -> tuple[ModelProto | None, list[Site]]:
        choices.append(choice)
        return ModelProto(), [site("a", 0), site("b", 1)]

    guilty = Search(make, lambda made: "b" in choices[-1].without).culprit(Choice(), ["a", "b"])
    assert (guilty.rule, guilty.sites) == ("b", ()) and not guilty.without(Choice()).uses("b")


def test_a_search_gives_up() -> None:
    looking, _ = search(lambda found: ("c", 8) in found, tries=2)
    with pytest.raises(GaveUp):
        looking.culprit(Choice(), ["a", "b", "c"])


@pytest.mark.slow
def test_sites_that_are_alike_are_left_out_at_once(tmp_path: Path) -> None:
    """Of values that are quantised on the way: behind the second that fails no third is looked for."""
    _, result = optimised(wrong("first", "second", "third"), tmp_path, quantised=True)
    assert result.changed and all(c.passed for c in result.report.checks)
    assert [(r.rule, r.node) for r in result.report.retreats] == [("twice", name) for name in LAYERS]
    assert result.report.retreats[2].reason == "as at 'second'"
