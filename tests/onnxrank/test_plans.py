"""Plans: what they say, that they give the same bytes again, and whose they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import Graph, run
from mutants import FOLDER
from onnx import ModelProto

import onnxrank
from onnxrank import cli
from onnxrank.contract import CONTRACT, stored_contract
from onnxrank.errors import ModelError, UsageError
from onnxrank.plans import LEAVE, TAKE, Alternative, Choice, Place, Plan, Site
from onnxrank.roles import load_spec

NAMES = ["dcnv2_parallel", "din", "mmoe", "field_attention", "hadamard_pairs", "history_transformer"]


def optimised(name: str, **options: Any) -> onnxrank.Result:
    options = {"spec": load_spec(FOLDER / f"{name}.roles.yaml"), "check": False} | options
    return onnxrank.optimize(FOLDER / f"{name}.torchscript.onnx", **options)


def data(result: onnxrank.Result) -> bytes:
    return result.model.SerializeToString(deterministic=True)


@pytest.mark.parametrize("interface", ["request", pytest.param("same", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_replay(name: str, interface: str, tmp_path: Path) -> None:
    """From the file and from the contract: the same bytes, with no roles or options given."""
    result = optimised(name, interface=interface, candidates=(16, 2048))
    path = tmp_path / "plan.json"
    path.write_text(result.plan.to_json())
    model = FOLDER / f"{name}.torchscript.onnx"
    again = onnxrank.optimize(model, plan=path, check=False)
    assert again.changed == result.changed and data(again) == data(result)
    assert again.plan.to_json() == result.plan.to_json()
    if result.changed:
        contract = stored_contract(result.model)
        assert contract is not None
        stored = Plan.from_contract(contract)
        assert data(onnxrank.optimize(model, plan=stored, check=False)) == data(result)


def test_sites() -> None:
    """A site says what could be done there, how exact that is, and what it costs."""
    plan = optimised("mmoe").plan
    found = [s for s in plan.sites if s.place.rule == "fc"]
    assert found and all(s.chosen == TAKE and s.op in ("Gemm", "MatMul", "Add") for s in found)
    for s in found:
        taken, left = (next(a for a in s.alternatives if a.name == name) for name in (TAKE, LEAVE))
        assert taken.exactness == "reassociates" and left.exactness == ""
        assert taken.each is not None and left.each is not None
    products = [s for s in found if s.op == "Gemm"]
    assert any(s.alternatives[0].each < s.alternatives[-1].each for s in products)  # type: ignore[operator]
    assert [s.place.index for s in plan.sites] == sorted(s.place.index for s in plan.sites)


def test_forms_are_alternatives() -> None:
    """A rule that has forms says so at its sites."""
    plan = optimised("dcnv2_parallel", candidates=32).plan
    names = {a.name for s in plan.sites if s.place.rule == "cross" for a in s.alternatives}
    assert "cross" not in plan.rules or {TAKE, LEAVE, "form 1"} >= names >= {LEAVE}


def test_decisions_by_cost() -> None:
    """Where a rule weighs costs the plan holds both, and what was chosen is the cheaper."""
    plan = optimised("hadamard_pairs").plan
    found = [s for s in plan.sites if s.place.rule == "fold"]
    assert found
    for s in found:
        costs = {a.name: a.seconds(512) for a in s.alternatives}
        assert costs[s.chosen] == min(costs.values())


def normalised() -> ModelProto:
    """A LayerNorm of which 96 of 128 columns are the request's, ahead of a layer of 64; and one of the request."""
    g, rng = Graph(), np.random.default_rng(0)
    user = g.input("user", ["N", 96])
    g.output(g.op("MatMul", user, g.const(rng.normal(0, 1, (96, 256)).astype(np.float32))), ["N", 256])
    x = g.op("Concat", user, g.input("item", ["N", 32]), axis=1)
    y = g.op("LayerNormalization", x, g.const(np.ones(128, np.float32)), axis=-1)
    g.output(g.op("MatMul", y, g.const(rng.normal(0, 1, (128, 64)).astype(np.float32))), ["N", 64])
    return g.model()


@pytest.mark.slow
def test_whether_a_rule_pays_is_a_decision() -> None:
    """From 84 candidates on the request's columns save more than 20 launches take: 20 * 340 / (96 * 64 * 0.0132)."""
    for candidates, chosen in ((83, LEAVE), (84, TAKE)):
        result = onnxrank.optimize(normalised(), request=["user"], candidates=candidates)
        (site,) = (s for s in result.plan.sites if s.place.rule == "norm")
        assert site.chosen == chosen and site.place.step == 0
        costs = {a.name: a.seconds(candidates) for a in site.alternatives}
        assert costs[chosen] == min(costs.values())
        assert data(onnxrank.optimize(normalised(), plan=result.plan)) == data(result)


def test_what_a_sum_is_mapped_as_is_a_decision() -> None:
    """Beside the site of the rule that takes the node; what is chosen otherwise gives the same scores otherwise."""
    result = optimised("din")
    (site,) = (s for s in result.plan.sites if s.place.step and s.place.rule == "fc")
    assert site.chosen == TAKE and Place("fc", site.place.index) in {s.place for s in result.plan.sites}
    costs = {a.name: a.seconds(512) for a in site.alternatives}
    assert costs[TAKE] == min(costs.values())
    sites = tuple(replace(s, chosen=LEAVE) if s == site else s for s in result.plan.sites)
    other = onnxrank.optimize(FOLDER / "din.torchscript.onnx", plan=replace(result.plan, sites=sites))
    assert other.report.macs_after > result.report.macs_after and other.report.checks


def edited(plan: Plan, **how: Any) -> dict[str, Any]:
    return plan.to_dict() | how


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"source_sha256": "0" * 64}, "belongs to another model"),
        ({"rules": ["fc", "nonesuch"]}, "'nonesuch', which is not there"),
        ({"plan_version": 99}, "no plan of version 1"),
        ({"candidates": "many"}, "cannot be read"),
        ({"candidates": [0, 0]}, "not a number of at least 1"),
        ({"interface": "other"}, "'other' is not known"),
        ({"sites": [{"rule": "fc"}]}, "cannot be read"),
        ({"sites": 3}, "cannot be read"),
        ({"sites": [{"rule": "fc", "index": 10**6, "node": "x", "op": "Gemm", "chosen": "take"}]}, "at place 1000000"),
        ({"sites": [{"rule": "fc", "index": 0, "node": "nobody", "op": "Gemm", "chosen": "take"}]}, "'nobody'"),
        ({"sites": []}, "does something else by now"),
        ({"measured": [{"candidates": 1}]}, "cannot be read"),
    ],
)
def test_plans_that_do_not_fit(tmp_path: Path, how: dict[str, Any], words: str) -> None:
    """Exit code 2, and no file."""
    plan = optimised("mmoe").plan
    if how == {"sites": []}:
        how = {"sites": [s | {"chosen": TAKE} for s in plan.to_dict()["sites"] if s["rule"] != "fc"]}
        index, node, op = next((s.place.index, s.node, s.op) for s in plan.sites if s.op == "Gemm")
        how["sites"].append({"rule": "gru", "index": index, "node": node, "op": op, "chosen": TAKE})
    path, out = tmp_path / "plan.json", tmp_path / "out.onnx"
    path.write_text(json.dumps(edited(plan, **how)))
    model = FOLDER / "mmoe.torchscript.onnx"
    with pytest.raises(UsageError, match=words):
        onnxrank.optimize(model, plan=path, check=False)
    assert cli.main(["optimize", str(model), str(out), "--plan", str(path), "-q"]) == 2 and not out.exists()


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"plan_version": 1}'])
def test_files_that_are_no_plans(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=r"plan\.json"):
        onnxrank.optimize(FOLDER / "mmoe.torchscript.onnx", plan=tmp_path / "plan.json")


def test_a_plan_excludes_what_it_says(tmp_path: Path) -> None:
    plan = optimised("mmoe").plan
    model = FOLDER / "mmoe.torchscript.onnx"
    for options in ({"interface": "same"}, {"candidates": 7}, {"select": ["fc"]}, {"ignore": ["fc"]}, {"tune": 1.0}):
        with pytest.raises(UsageError, match=next(iter(options))):
            onnxrank.optimize(model, plan=plan, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="other roles"):
        onnxrank.optimize(model, plan=plan, request=["item_*"])
    with pytest.raises(UsageError, match="cannot be read"):
        onnxrank.optimize(model, plan=tmp_path / "nowhere.json")


def test_command(tmp_path: Path) -> None:
    """`--plan-out`, then `--plan`: the same file, as often as one likes."""
    model, plan = FOLDER / "mmoe.torchscript.onnx", tmp_path / "plan.json"
    outs = [tmp_path / f"{k}.onnx" for k in range(2)]
    assert cli.main(["optimize", str(model), str(outs[0]), "--request", "user_*", "--plan-out", str(plan), "-q"]) == 0
    assert cli.main(["optimize", str(model), str(outs[1]), "--plan", str(plan), "-q"]) == 0
    assert outs[0].read_bytes() == outs[1].read_bytes() != model.read_bytes()
    assert cli.main(["optimize", str(model), "--dry-run", "--request", "user_*", "--plan-out", str(model)]) == 2


@pytest.mark.parametrize("seconds", [None, "3"])
def test_nothing_is_timed_by_default_with_a_plan(
    seconds: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the command times what it makes unless told otherwise; to ask for it is a contradiction."""
    model, plan, out = FOLDER / "mmoe.torchscript.onnx", tmp_path / "plan.json", tmp_path / "out.onnx"
    assert cli.main(["optimize", str(model), "--dry-run", "--request", "user_*", "--plan-out", str(plan), "-q"]) == 0
    monkeypatch.delenv("ONNXRANK_TUNE") if seconds is None else monkeypatch.setenv("ONNXRANK_TUNE", seconds)
    assert cli.main(["optimize", str(model), str(out), "--plan", str(plan), "-q"]) == 0 and out.exists()
    assert cli.main(["optimize", str(model), str(out), "--plan", str(plan), "-q", "--tune", "3"]) == 2


def test_left_alone_is_replayed(tmp_path: Path) -> None:
    """A plan for nothing gives the original."""
    result = optimised("mmoe", ignore=["fc", "broadcast", "select", "pool", "norm", "dot", "fold"])
    plan = result.plan
    assert plan.changed == result.changed
    again = onnxrank.optimize(FOLDER / "mmoe.torchscript.onnx", plan=plan, check=False)
    assert again.changed == result.changed and data(again) == data(result)


def test_choices() -> None:
    a, b = Place("fc", 3), Place("movement", 4)
    plain = Choice()
    assert plain.at(a) == TAKE and Choice(forms={"fc": "form 1"}).at(a) == "form 1"
    assert plain.leaving([a]).at(a) == LEAVE and plain.leaving(rules=["fc"]).at(a) == LEAVE
    assert plain.leaving([a]).uses("fc") and not plain.leaving(rules=["fc"]).uses("fc")
    assert plain.at_only("fc", [2]).at(a) == LEAVE and plain.at_only("fc", [3]).at(a) == TAKE
    replayed = Choice(replayed={})
    assert replayed.at(a) == LEAVE and replayed.at(b) == TAKE
    ways = (Alternative(LEAVE, "", 0, 2.0), Alternative(TAKE, "", 10, 1.0))
    assert [plain.decide(a, ways, n) for n in (9, 10, 11)] == [LEAVE, LEAVE, TAKE]
    assert Choice(replayed={a: TAKE}).decide(a, ways, 1) == TAKE and plain.leaving([a]).decide(a, ways, 99) == LEAVE


def test_sites_without_costs_are_read_back() -> None:
    site = Site(Place("fc", 3, 1), "n", "Gemm", (Alternative(TAKE, "exact", None, 1.0),), TAKE)
    plan = Plan("0" * 64, "0.1.0", "request", True, (1, 2), {"inputs": []}, ("fc",), ("fc",), (site,))
    assert Plan.from_dict(json.loads(plan.to_json())) == plan


# --- the contract --------------------------------------------------------------------------------------------------


def test_done_for_the_same_use() -> None:
    """What was optimised before is left alone, whether or not its roles are given again."""
    result = optimised("mmoe")
    for options in ({}, {"request": ["user_*"]}):
        again = onnxrank.optimize(result.model, check=False, **options)  # type: ignore[arg-type]
        assert not again.changed and any("optimised before" in n for n in again.report.notes)
        assert not again.plan.changed


def tower() -> ModelProto:
    """A layer on [user | context | item]."""
    g, rng = Graph(), np.random.default_rng(0)
    both = g.op("Concat", *(g.input(n, ["N", w]) for n, w in (("user", 256), ("context", 256), ("item", 32))), axis=1)
    hidden = g.op("Relu", g.op("Gemm", both, g.const(rng.integers(-2, 3, (544, 64))), g.const(rng.integers(0, 3, 64))))
    g.output(g.op("MatMul", hidden, g.const(rng.integers(-2, 3, (64, 1)))), ["N", 1])
    return g.model()


@pytest.mark.parametrize("interface", ["request", "same"])
def test_more_request_level_inputs(interface: str) -> None:
    """Other roles than those it was optimised for are another use."""
    options: dict[str, Any] = {"interface": interface}
    first = onnxrank.optimize(tower(), request=["user"], **options)
    same = onnxrank.optimize(first.model, request=["user"], **options)
    wider = onnxrank.optimize(first.model, request=["user", "context"], **options)
    assert first.changed and not same.changed
    assert any("for the same use" in note for note in same.report.notes)
    assert not any("for the same use" in note for note in wider.report.notes)
    if interface == "request":
        assert wider.changed and wider.report.macs_after < first.report.macs_after
    rng = np.random.default_rng(1)
    shapes = {"user": 256, "context": 256, "item": 32}
    for n in (1, 5):
        rows = {"user": 1, "context": 1, "item": n}
        new = {k: rng.integers(-2, 3, (rows[k], w)).astype(np.float32) for k, w in shapes.items()}
        old = {k: np.repeat(v, n // len(v), 0) for k, v in new.items()}
        fed = new if interface == "request" else old
        np.testing.assert_array_equal(*(next(iter(run(*x).values())) for x in ((tower(), old), (wider.model, fed))))


def test_other_rules_are_another_use() -> None:
    first = onnxrank.optimize(tower(), request=["user"], select=["fc"])
    again = onnxrank.optimize(first.model)
    assert first.changed and not any("for the same use" in note for note in again.report.notes)


ODD_ROLES: list[dict[str, Any]] = [
    {"candidate_axis": "0"}, {"candidate_axis": 7}, {"candidate_axis": -1}, {"candidate_axis": True}, {"record": 0},
    {"record": "x"}, {"axis": 9, "request": "0:3", "level": "mixed"}, {"axis": []}, {"name": 3}, {"level": "both"},
    {"level": "mixed"}, {"request": "0:3", "level": "request"}, {"request": 5}, {"ranges": 3},
    {"ranges": [{"low": "a", "high": 1}]},
]  # fmt: skip


def contract_of(model: ModelProto, **how: Any) -> ModelProto:
    """A copy of a model with another contract."""
    made = ModelProto()
    made.CopyFrom(model)
    entry = next(p for p in made.metadata_props if p.key == CONTRACT)
    entry.value = json.dumps(json.loads(entry.value) | how)
    return made


@pytest.mark.parametrize("odd", ODD_ROLES, ids=str)
@pytest.mark.parametrize("version", ["0.0", None])
def test_odd_roles_in_a_contract(odd: dict[str, Any], version: str | None) -> None:
    model = optimised("mmoe").model
    contract = stored_contract(model)
    assert contract is not None
    contract["roles"]["inputs"][0].update(odd)
    how = {"roles": contract["roles"]} | ({"version": version} if version else {})
    with pytest.raises(ModelError, match="stored roles"):
        onnxrank.optimize(contract_of(model, **how))


@pytest.mark.parametrize("roles", [None, 3, [], {}, {"inputs": None}, {"inputs": [3]}, {"inputs": [None]}], ids=str)
def test_odd_contracts(roles: Any) -> None:
    with pytest.raises(ModelError, match="stored roles"):
        onnxrank.optimize(contract_of(optimised("mmoe").model, roles=roles))


def test_an_odd_interface_in_a_contract() -> None:
    with pytest.raises(ModelError, match="interface 3"):
        onnxrank.optimize(contract_of(optimised("mmoe").model, interface=3))


@pytest.mark.parametrize("odd", [{"candidates": "x"}, {"offered": {}}, {"plan": 3}, {"rules": 3}])
def test_odd_values_are_another_use(odd: dict[str, Any]) -> None:
    """What says nothing of inputs is not read, and the model is optimised for itself."""
    again = onnxrank.optimize(contract_of(optimised("mmoe").model, **odd), check=False)
    assert isinstance(again.changed, bool)
