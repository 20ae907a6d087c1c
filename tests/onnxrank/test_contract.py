"""What an optimised model says of itself, and what follows from that for the next run."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import pytest
from onnx import ModelProto, helper

from onnxrank.contract import CONTRACT, find_roles, forget, is_done, roles_again, same_roles, store, stored_contract
from onnxrank.errors import ModelError, UsageError
from onnxrank.roles import InputInfo, InputRole, Roles, ValueRange

FLOAT = 1


def info(name: str, *dims: int | str) -> InputInfo:
    return InputInfo(name, FLOAT, dims)


def model_with(text: str | None) -> ModelProto:
    model = helper.make_model(helper.make_graph([], "g", [], []))
    if text is not None:
        helper.set_model_props(model, {"owner": "ranking", CONTRACT: text})
    return model


RANGES = (ValueRange(0, 9, (0, 2, 5)), ValueRange(3, 4, None))
MIXED = InputRole("X", "mixed", 0, axis=1, request=(1, 2, 5), ranges=RANGES)
ROLES = Roles(
    {
        "u": InputRole("u", "request", 0),
        "c": InputRole("c", "candidate", 1),
        "s": InputRole("s", "request", None),
        "X": MIXED,
    }
)


def test_a_contract_takes_the_place_of_the_one_before_and_leaves_what_is_the_users():
    model = model_with('{"schema": 1}')
    model.metadata_props.add(key=CONTRACT, value='{"schema": 0}')
    store(model, {"schema": 1, "roles": {}})
    assert [(p.key, p.value) for p in model.metadata_props] == [
        ("owner", "ranking"),
        (CONTRACT, '{"roles": {}, "schema": 1}'),
    ]
    forget(model)
    assert [p.key for p in model.metadata_props] == ["owner"]


def contract_of(interface: str = "request", roles: Roles = ROLES, **more: Any) -> dict[str, Any]:
    return {
        "version": metadata.version("onnxrank"),
        "interface": interface,
        "candidates": [32, 512],
        "offered": ["fc"],
        "roles": roles.to_dict(),
    } | more


@pytest.mark.parametrize(
    ("text", "found"),
    [(None, None), ("", None), ("{", None), ("3", None), ("[1]", None), ("[" * 100000, None), ('{"a": 1}', {"a": 1})],
)
def test_stored(text: str | None, found: Any) -> None:
    """What is no object is no contract, whoever wrote it."""
    assert stored_contract(model_with(text)) == found


def test_roles_after_a_division() -> None:
    """Parts have the roles that the whole had; positions of ranges count within the part."""
    made = roles_again(
        [info("u", 1, 4), info("c", 4, "N"), info("s"), info("X.request", 1, 3), info("X.candidate", "N", 5)],
        contract_of(),
    ).inputs
    assert (made["u"].level, made["u"].candidate_axis) == ("request", None)
    assert (made["c"].level, made["c"].candidate_axis) == ("candidate", 1)
    assert (made["s"].level, made["s"].candidate_axis) == ("request", None)
    request, rest = made["X.request"], made["X.candidate"]
    assert (request.level, rest.level, rest.candidate_axis) == ("request", "candidate", 0)
    assert [(r.low, r.high, r.positions) for r in request.ranges] == [(0, 9, (1, 2)), (3, 4, None)]
    assert [(r.low, r.high, r.positions) for r in rest.ranges] == [(0, 9, (0,)), (3, 4, None)]


def test_roles_of_an_unchanged_signature() -> None:
    """Under `same` rows are taken inside: from outside all inputs differ between candidates."""
    made = roles_again([info("u", "N", 4), info("c", 4, "N"), info("X", "N", 8)], contract_of("same")).inputs
    assert {r.level for r in made.values()} == {"candidate"}
    assert [made[n].candidate_axis for n in ("u", "c", "X")] == [0, 1, 0]
    assert made["X"].ranges == RANGES


def test_inputs_that_the_contract_does_not_know() -> None:
    made = roles_again([info("new", "N", 4)], contract_of()).inputs["new"]
    assert (made.level, made.candidate_axis, made.ranges) == ("candidate", 0, ())


def test_contracts_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="candidate_axis of 'c' is 1, and it has 1 axes"):
        roles_again([info("c", "N")], contract_of())
    with pytest.raises(ModelError, match="axis of 'X' is 1, and it has 1 axes"):
        roles_again([info("X.request", 3)], contract_of())
    for interface in (None, "both", 3):
        with pytest.raises(ModelError, match=r"interface .* is not known"):
            roles_again([info("c", "N", 2)], contract_of(interface=interface))  # type: ignore[arg-type]


DESCRIBED = [info("u", "N", 4), info("c", 4, "N"), info("s"), info("X", "N", 8)]


def done(contract: dict[str, Any], roles: Roles = ROLES, **how: Any) -> bool:
    asked = {"interface": "request", "span": (32, 512), "rules": ["fc"], "lengths": {}} | how
    return is_done(contract, DESCRIBED, roles, asked["interface"], asked["span"], asked["rules"], asked["lengths"])


def test_the_same_use_is_done() -> None:
    assert done(contract_of())
    assert done(json.loads(json.dumps(contract_of())))
    assert done(contract_of(), roles_again(DESCRIBED, contract_of()))


@pytest.mark.parametrize(
    "other",
    [{"version": "0.0"}, {"interface": "same"}, {"candidates": [32, 513]}, {"offered": ["dot"]}, {"candidates": None}],
)
def test_another_use_is_not(other: dict[str, Any]) -> None:
    assert not done(contract_of() | other)


def test_other_roles_are_another_use() -> None:
    others = Roles({**ROLES.inputs, "c": InputRole("c", "request", 1)})
    assert not same_roles(ROLES, others) and not done(contract_of(), others)


def test_ranges_are_no_other_use() -> None:
    bare = Roles({**ROLES.inputs, "X": InputRole("X", "mixed", 0, axis=1, request=(1, 2, 5))})
    assert same_roles(ROLES, bare) and done(contract_of(), bare)


def test_where_roles_come_from() -> None:
    """From the contract, whatever else is said; else from what is said; else all may count as candidate-level."""
    described = [info("u", "N", 4), info("c", "N", 4)]
    found, notes = find_roles(described, contract_of(), request=["nobody"])
    assert found.inputs["u"].level == "request" and "those of its contract" in notes[0]
    found, notes = find_roles(described, request=["u"])
    assert (found.inputs["u"].level, found.inputs["c"].level, notes) == ("request", "candidate", [])
    found, notes = find_roles(described, lenient=True)
    assert {r.level for r in found.inputs.values()} == {"candidate"} and "--request" in notes[0]
    for how in ({}, {"lenient": True, "request": ["nobody"]}):
        with pytest.raises(UsageError):
            find_roles(described, **how)  # type: ignore[arg-type]
