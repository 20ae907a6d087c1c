"""Roles from patterns, roles files and recorded requests, and every error on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from onnxrank import errors
from onnxrank.errors import ModelError, UsageError
from onnxrank.roles import (
    InputInfo,
    InputRole,
    Roles,
    ValueRange,
    check_positions,
    format_ranges,
    infer,
    load_spec,
    parse_ranges,
    resolve,
)

Dim = int | str | None


def info(name: str, *dims: Dim, dtype: int = TensorProto.FLOAT) -> InputInfo:
    return InputInfo(name, dtype, dims)


TWO = [info("user_age", "b0", 1), info("user_ids", "b1", 4, dtype=TensorProto.INT64), info("item", "b2", 8)]
PACKED = [info("X", "N", 21)]


def levels(roles: Roles) -> dict[str, str]:
    return {name: role.level for name, role in roles.inputs.items()}


# --- errors ------------------------------------------------------------------------------------------------


def test_exit_codes() -> None:
    codes = {
        errors.OnnxrankError: 70,
        errors.CheckFailed: 1,
        errors.UsageError: 2,
        errors.ModelError: 3,
        errors.EnvironmentProblem: 4,
        errors.NothingApplied: 5,
    }
    assert all(cls.exit_code == code and issubclass(cls, errors.OnnxrankError) for cls, code in codes.items())


# --- ranges ------------------------------------------------------------------------------------------------


def test_ranges() -> None:
    assert format_ranges((0, 1, 2, 20)) == "0:3,20"
    assert parse_ranges("0:3,20") == (0, 1, 2, 20)
    assert parse_ranges(" 20, 1 : 3 ,2") == (1, 2, 20)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_ranges_round_trip(positions: set[int]) -> None:
    assert parse_ranges(format_ranges(list(positions))) == tuple(sorted(positions))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a list of positions"),
        ("1,", "not a list of positions"),
        ("-1", "not a list of positions"),
        (":3", "not a list of positions"),
        ("0-3", "not a list of positions"),
        ("²", "not a list of positions"),
        ("3:3", "empty"),
        ("5:3", "empty"),
        ("0:99999999999", "limit"),
    ],
)
def test_bad_ranges(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_ranges(text)


# --- patterns ----------------------------------------------------------------------------------------------


def test_glob() -> None:
    roles = resolve(TWO, request=["user_*"])
    assert levels(roles) == {"user_age": "request", "user_ids": "request", "item": "candidate"}
    assert roles.request_names() == ("user_age", "user_ids")
    assert list(roles.inputs) == ["user_age", "user_ids", "item"]
    assert {role.candidate_axis for role in roles.inputs.values()} == {0}
    assert resolve(TWO, request="user_*") == roles


def test_columns() -> None:
    role = resolve(PACKED, request=["X[0:13,20]", "X[12:14]"]).inputs["X"]
    assert role == InputRole("X", "mixed", 0, axis=1, request=(*range(14), 20))
    assert resolve([info("X", "N", None)], request=["X[3]"]).inputs["X"].request == (3,)


def test_columns_of_a_table_by_rows() -> None:
    role = resolve([info("T", 26, "N")], request=["T[0:20]"], spec={"candidate_axis": 1}).inputs["T"]
    assert (role.candidate_axis, role.axis, role.request) == (1, 0, tuple(range(20)))


def test_all_columns_are_the_whole_input() -> None:
    roles = resolve([*PACKED, info("item", "N", 3)], request=["X[0:21]"])
    assert roles.inputs["X"] == InputRole("X", "request", 0)


def test_literal_name_wins() -> None:
    infos = [info("f[0]", "N", 2), info("f", "N", 2), info("f0", "N", 2), info("a*", "N"), info("ab", "N")]
    assert resolve(infos, request=["f[0]", "a*"]).request_names() == ("f[0]", "a*")
    assert resolve(infos[1:], request=["f[0]"]).inputs["f"].request == (0,)
    assert resolve(infos[2:], request=["f[0]"]).request_names() == ("f0",)
    assert resolve(infos, request=["f[0][1]"]).inputs["f[0]"].request == (1,)
    assert resolve([info("f", "N", 2), info("f0", "N")], request=["f[0-9]"]).request_names() == ("f0",)


@pytest.mark.parametrize(
    ("infos", "request_", "says"),
    [
        (TWO, ["usr_age"], r"matches no input\. Did you mean 'user_age'.* The inputs are 'user_age', "),
        (TWO, ["usr_ids[0:2]"], r"'usr_ids\[0:2\]' matches no input\. Did you mean 'user_ids'"),
        (TWO, ["zzz*"], r"'zzz\*' matches no input\. The inputs are"),
        (
            PACKED,
            ["X[0:22]"],
            r"range 0:22 of input 'X' \(float\[N, 21\]\) lies outside axis 1, which has 21",
        ),
        (PACKED, ["X[a:b]"], r"--request 'X\[a:b\]'.*not a list of positions"),
        (PACKED, ["X[3:1]"], "empty"),
        (PACKED, ["X", "X[0:3]"], "contradictory.*as a whole and by columns"),
        (PACKED, ["X[0:3]", "*"], "contradictory.*as a whole and by columns"),
        ([info("X", "N", 3, 4)], ["X[0]"], "no matrix.*axis"),
        ([info("X", "M")], ["X[0]"], "no matrix.*record"),
        (PACKED, ["X"], "Every input is request-level"),
        (PACKED, [], r"(?s)Nothing says.*  X  float\[N, 21\]\nFor example: --request 'X\[0:10\]'"),
        (TWO, [], r"(?s)  user_ids  int64\[b1, 4\]\n.*--request 'user_age'"),
        ([info("X", None, "w")], [], r"(?s)float\[\?, w\].*X\[0:8\]"),
        ([info("x", "N", dtype=999)], [], r"type 999\[N\]"),
        ([info("flag"), info("x", "N")], [], "Nothing says"),
    ],
)
def test_pattern_errors(infos: Sequence[InputInfo], request_: Sequence[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        resolve(infos, request=request_)


# --- inputs that speak for themselves, and models that cannot ---------------------------------------------


def test_one_row_inputs() -> None:
    infos = [
        info("user", 1, 8),
        info("history", 100, 64),
        info("long", 1, "L"),
        info("flag"),
        info("item", "N", 8),
    ]
    roles = resolve(infos)
    assert roles.request_names() == ("user", "history", "long", "flag")
    assert all(roles.inputs[name].candidate_axis is None for name in roles.request_names())
    assert roles.inputs["item"] == InputRole("item", "candidate", 0)
    assert resolve(infos, request=["user", "flag", "history"]) == roles


def test_one_row_beside_another_candidate_axis() -> None:
    infos = [info("user", 1, 8), info("flag"), info("table", 26, "N")]
    roles = resolve(infos, request=["user"], spec={"inputs": {"table": {"candidate_axis": -1}}})
    assert roles.inputs["user"] == InputRole("user", "request", None)
    assert roles.inputs["table"].candidate_axis == 1
    infos = [info("user", 8), info("flag"), info("table", 26, "N")]
    assert resolve(infos, spec={"candidate_axis": 1}).request_names() == ("user", "flag")
    batch = [info("user", 1, 7), info("items", 1, "N", 3)]
    assert levels(resolve(batch, spec={"candidate_axis": 1})) == {"user": "request", "items": "candidate"}


def test_one_row_ranges() -> None:
    spec = {"inputs": {"u": {"ranges": {"0:2": [0, 9]}}, "h": {"record": 3, "ranges": {0: [0, 5]}}}}
    roles = resolve([info("u", 1, 8), info("h", 3), info("x", "N")], spec=spec)
    assert roles.inputs["u"] == InputRole("u", "request", None, axis=1, ranges=(ValueRange(0, 9, (0, 1)),))
    assert roles.inputs["h"] == InputRole("h", "request", None, axis=0, ranges=(ValueRange(0, 5, (0,)),))


@pytest.mark.parametrize(
    ("infos", "kwargs", "says"),
    [
        ([InputInfo("x", TensorProto.FLOAT, None)], {}, "'x' has a dynamic rank"),
        ([info("x", 512, 8)], {}, "'x'.*fixed size 512 on its candidate axis 0.*dynamic_axes.*tf2onnx"),
        ([info("u", 1, 8), info("x", 1, 8)], {"request": ["u"]}, "static batch"),
        ([info("u", "N"), info("x", 512, "L")], {"request": ["u"]}, "'x'.*static batch"),
        ([info("u", 512, "L"), info("x", "N")], {"request": ["u"]}, "'u'.*static batch"),
        (
            [info("u", 1, 8), info("x", 26, "N")],
            {"request": ["u"]},
            "'x'.*fixed size 26.*set candidate_axis in the roles file",
        ),
        (
            [info("u", "N"), info("x", 26, 8)],
            {"spec": {"inputs": {"u": "request", "x": {"candidate_axis": 1}}}},
            "axis 1",
        ),
        ([info("flag")], {"request": ["flag"]}, "no input with an axis"),
        ([], {}, "no input with an axis"),
    ],
)
def test_model_errors(infos: Sequence[InputInfo], kwargs: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        resolve(infos, **kwargs)


# --- the roles file ----------------------------------------------------------------------------------------


def test_spec() -> None:
    infos = [info("user_a", "N", 3), info("user_b", "N"), info("ctx", "L", 8), info("item", "N", 5)]
    spec = {
        "request": "user_a",
        "inputs": {
            "user_*": "request",
            "user_b": {"level": "request", "range": [0, 10]},
            "ctx": {"candidate_axis": None},
            "item": {"level": "candidate", "ranges": {"0:2": [0, 7], 4: [-1.5, 2]}},
        },
    }
    roles = resolve(infos, request=["user_?"], spec=spec)
    assert roles.inputs["user_a"] == InputRole("user_a", "request", 0)
    assert roles.inputs["user_b"] == InputRole("user_b", "request", 0, ranges=(ValueRange(0, 10, None),))
    assert roles.inputs["ctx"] == InputRole("ctx", "request", None)
    assert roles.inputs["item"] == InputRole(
        "item", "candidate", 0, axis=1, ranges=(ValueRange(0, 7, (0, 1)), ValueRange(-1.5, 2, (4,)))
    )


def test_spec_only_null_axis_counts_as_said() -> None:
    spec = {"candidate_axis": None, "inputs": {"x": {"candidate_axis": 0}}}
    assert resolve([info("h", "L", 4), info("x", "N")], spec=spec).request_names() == ("h",)


def test_spec_equal_patterns_and_numbered_names() -> None:
    spec = {"inputs": {"u*": "request", "*1": "request", 7: "candidate"}}
    assert resolve([info("u1", "N"), info("7", "N")], spec=spec).request_names() == ("u1",)


def test_spec_mixed_along_any_axis() -> None:
    spec = {"inputs": {"x": {"request": [0, "2:4"], "axis": -1, "candidate_axis": 1}}}
    role = resolve([info("x", "B", "N", 6)], spec=spec).inputs["x"]
    assert role == InputRole("x", "mixed", 1, axis=2, request=(0, 2, 3))


def test_option_and_spec_agree() -> None:
    spec = {"inputs": {"X": {"request": "0:3", "level": "mixed", "range": [0, 1]}}}
    assert resolve(PACKED, request=["X[0:2]", "X[2]"], spec=spec) == resolve(PACKED, spec=spec)
    only_axis = {"inputs": {"x": {"axis": 2}}}
    assert resolve([info("x", "N", 3, 4)], request=["x[1]"], spec=only_axis).inputs["x"].axis == 2


def test_records() -> None:
    spec = {"inputs": {"h": {"record": 65, "request": "0:64", "ranges": {"64": [0, 9]}}}}
    role = resolve([info("h", "M")], spec=spec).inputs["h"]
    ranges = (ValueRange(0, 9, (64,)),)
    assert role == InputRole("h", "mixed", 0, None, tuple(range(64)), 65, ranges)
    whole = {"inputs": {"h": {"record": 2, "request": "0:2"}}}
    assert resolve([info("h", "M"), info("x", "N")], spec=whole).inputs["h"] == InputRole("h", "request", 0, record=2)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ([], "a mapping with the keys inputs, request, candidate_axis is expected, not list"),
        ({"input": {}}, "unknown key 'input'. Allowed are inputs, request, candidate_axis"),
        ({"request": 3}, "request must be a list of patterns"),
        ({"request": [3]}, "request must be a list of patterns"),
        ({"request": ["y"]}, "request in the roles file: 'y' matches no input"),
        ({"inputs": ["X"]}, "inputs must be a mapping of input names to roles, not list"),
        ({"inputs": {True: "request"}}, "True under inputs is not an input name"),
        ({"inputs": {1.5: "request"}}, "1.5 under inputs is not an input name"),
        (
            {"inputs": {"Y": "request"}},
            "inputs in the roles file: 'Y' matches no input.*inputs are 'X', 'x1'",
        ),
        ({"inputs": {"X": "mixed"}}, "must be request, candidate or a mapping.*not 'mixed'"),
        ({"inputs": {"X": None}}, "must be request, candidate or a mapping.*not None"),
        (
            {"inputs": {"X": {"levle": "request"}}},
            "'X': unknown key 'levle'. Allowed are level, request, axis",
        ),
        ({"inputs": {"X": {"level": "user"}}}, "level must be one of request, candidate, mixed, not 'user'"),
        ({"inputs": {"X": {"level": "mixed"}}}, "mixed but has no request positions"),
        (
            {"inputs": {"X": {"level": "request", "request": "0"}}},
            "contradictory: level request, and request pos",
        ),
        ({"inputs": {"X": {"level": "candidate", "request": "0"}}}, "contradictory: level candidate, and"),
        ({"inputs": {"X": {"request": True}}}, "request must be positions such as"),
        ({"inputs": {"X": {"request": []}}}, "request must be positions such as"),
        ({"inputs": {"X": {"request": "a"}}}, "input 'X': request: 'a' is not a list of positions"),
        ({"inputs": {"X": {"request": "0:40"}}}, "0:40 of input 'X' .* lies outside axis 1"),
        ({"inputs": {"X": {"request": "0", "axis": "1"}}}, "axis must be an integer, not '1'"),
        ({"inputs": {"X": {"request": "0", "axis": 0}}}, "cannot lie along axis 0"),
        ({"inputs": {"X": {"request": "0", "axis": 2}}}, "cannot lie along axis 2"),
        ({"inputs": {"X": {"candidate_axis": 1.0}}}, "candidate_axis must be an integer"),
        ({"inputs": {"X": {"candidate_axis": 2}}}, "Candidate axis not found: input 'X'"),
        ({"candidate_axis": 1}, "Candidate axis not found: input 'x1'"),
        ({"candidate_axis": "0"}, "candidate_axis must be an integer"),
        ({"inputs": {"x1": {"record": True}}}, "record must be an integer"),
        ({"inputs": {"x1": {"record": 0}}}, "record must be at least 1"),
        ({"inputs": {"x1": {"record": 3, "axis": 0}}}, "axis and record exclude each other"),
        (
            {"inputs": {"x1": {"record": 3, "request": "2:4"}}},
            "2:4 of input 'x1' .* outside the record of 3 entr",
        ),
        ({"inputs": {"X": {"record": 3, "request": "0"}}}, "cannot hold flat records of 3"),
        ({"inputs": {"X": {"range": 3}}}, r"two numbers \[low, high\), not 3"),
        ({"inputs": {"X": {"range": [0, 1, 2]}}}, "two numbers"),
        ({"inputs": {"X": {"range": "01"}}}, "two numbers"),
        ({"inputs": {"X": {"range": [0, float("inf")]}}}, "two numbers"),
        ({"inputs": {"X": {"range": [0, 10**400]}}}, "two numbers"),
        ({"inputs": {"X": {"range": [5, 5]}}}, r"\[5, 5\] is empty"),
        ({"inputs": {"X": {"ranges": [0, 1]}}}, "ranges must be a mapping"),
        ({"inputs": {"X": {"ranges": {"x": [0, 1]}}}}, "ranges: 'x' is not a list of positions"),
        ({"inputs": {"X": {"request": "0", "ranges": {"40": [0, 1]}}}}, "40 of input 'X' .* lies outside"),
        (
            {"inputs": {"X*": "request", "*X": "candidate"}},
            r"contradictory: 'X\*' and '\*X' both match input 'X'",
        ),
        ({"inputs": {"X": "candidate", "x1": "candidate"}}, "Nothing says"),
    ],
)
def test_spec_errors(spec: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        resolve([*PACKED, info("x1", "M")], spec=spec)


@pytest.mark.parametrize(
    ("request_", "name", "entry", "says"),
    [
        (
            ["X"],
            "X",
            "candidate",
            "request-level by --request and candidate-level by inputs in the roles file",
        ),
        (["X"], "X", {"request": "0:3"}, "request-level by --request and request-level at 0:3 by inputs"),
        (["X[0:2]"], "X", {"request": "0:3"}, "request-level at 0:2 by --request and request-level at 0:3"),
        (["X[0:2]"], "X", "candidate", "request-level at 0:2 by --request and candidate-level"),
        ([], "one", "candidate", "'one' .*carries one row per request, so it cannot be candidate-level"),
        (["one[0]"], "one", {"request": "0"}, "'one' .*cannot be partly candidate-level"),
        ([], "item", {"level": "candidate", "candidate_axis": None}, "'item'.*cannot be candidate-level"),
    ],
)
def test_contradictory(request_: Sequence[str], name: str, entry: Any, says: str) -> None:
    infos = [*PACKED, info("one", 1, 3), info("item", "N")]
    with pytest.raises(UsageError, match=f"contradictory.*{says}"):
        resolve(infos, request=request_, spec={"inputs": {name: entry}})


def test_contradictory_within_the_file() -> None:
    with pytest.raises(UsageError, match=r"contradictory.*by request in the roles file and candidate-level by inputs"):
        resolve(PACKED, spec={"request": ["X[0]"], "inputs": {"X": "candidate"}})


# --- reading the file --------------------------------------------------------------------------------------

YAML = """
request: ["user_*"]
inputs:
  X: {request: 1:13, ranges: {1:3: [0, 50], 20: [0, 1.5]}}
  items: &c {level: candidate}
  more: *c
"""


def test_load_spec(tmp_path: Path) -> None:
    path = tmp_path / "roles.yaml"
    path.write_text(YAML)
    spec = load_spec(path)
    assert spec["inputs"]["X"] == {"request": "1:13", "ranges": {"1:3": [0, 50], 20: [0, 1.5]}}
    as_json = tmp_path / "roles.JSON"
    as_json.write_text(json.dumps(spec))
    assert load_spec(str(as_json))["inputs"]["more"] == {"level": "candidate"}
    infos = [info("user_a", "N"), info("X", "N", 21), info("items", "N"), info("more", "N")]
    assert resolve(infos, spec=load_spec(as_json)) == resolve(infos, spec=spec)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "r.yaml",
            "",
            "r.yaml: a mapping with the keys inputs, request, candidate_axis is expected, not nothing",
        ),
        ("r.yaml", "- a", "is expected, not list"),
        ("r.yaml", "a: [", "r.yaml is not valid YAML"),
        ("r.yaml", "a: 1\n--- \nb: 2", "r.yaml is not valid YAML"),
        ("r.yaml", "inputs: {X: request, X: candidate}", "r.yaml is contradictory: 'X' stands there twice"),
        ("r.yaml", "request: [" + "[" * 5000, "not valid YAML"),
        ("r.yaml", "levels: 3", "r.yaml: unknown key 'levels'"),
        ("r.yaml", "inputs: {X: {axis: a}}", "r.yaml: input 'X': axis must be an integer"),
        ("r.json", "{", "r.json is not valid JSON"),
        ("r.json", '{"inputs": {"X": "request", "X": "candidate"}}', "r.json is contradictory"),
        ("r.json", "[1]", "is expected, not list"),
    ],
)
def test_load_spec_errors(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        load_spec(path)


def test_load_spec_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read: No such file"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UsageError, match=r"bin\.yaml is not UTF-8"):
        load_spec(tmp_path / "bin.yaml")


# --- storing -----------------------------------------------------------------------------------------------

POSITIONS = st.sets(st.integers(0, 40), min_size=1).map(lambda found: tuple(sorted(found)))
NUMBERS = st.floats(-1e9, 1e9)
RANGES = st.builds(ValueRange, low=NUMBERS, high=NUMBERS, positions=st.none() | POSITIONS)
ROLES = st.builds(
    InputRole,
    name=st.text(min_size=1),
    level=st.sampled_from(["request", "candidate", "mixed"]),
    candidate_axis=st.none() | st.integers(0, 3),
    axis=st.none() | st.integers(0, 3),
    request=st.just(()) | POSITIONS,
    record=st.none() | st.integers(1, 99),
    ranges=st.lists(RANGES, max_size=3).map(tuple),
)


@given(st.lists(ROLES, unique_by=lambda role: role.name))
def test_dict_round_trip(items: list[InputRole]) -> None:
    roles = Roles({role.name: role for role in items})
    text = json.dumps(roles.to_dict(), sort_keys=True)
    back = Roles.from_dict(json.loads(text))
    assert back == roles
    assert list(back.inputs) == list(roles.inputs)
    assert json.dumps(back.to_dict(), sort_keys=True) == text


@pytest.mark.parametrize(
    "stored",
    [
        {},
        [],
        {"inputs": 3},
        {"inputs": ["x"]},
        {"inputs": [{"name": "x"}]},
        {"inputs": [{"name": "x", "level": "user", "candidate_axis": 0}]},
        {"inputs": [{"name": "x", "level": "mixed", "candidate_axis": 0, "request": "no"}]},
    ],
)
def test_from_dict_errors(stored: Any) -> None:
    with pytest.raises(ModelError, match="stored roles cannot be read"):
        Roles.from_dict(stored)


# --- recorded requests -------------------------------------------------------------------------------------

INFOS = [
    info("user", "N", 3, dtype=TensorProto.INT64),
    info("X", "N", 4),
    info("item", "N", dtype=TensorProto.INT32),
    info("table", 5, 2),
]


def recorded() -> dict[str, np.ndarray[Any, Any]]:
    """Three requests of 3, 2 and 1 rows, not in order."""
    ids = np.array([7, 3, 7, 7, 3, 9])
    x = np.arange(24, dtype=np.float32).reshape(6, 4)
    x[:, 0] = ids
    x[:, 2] = np.where(ids == 7, np.nan, 1)
    user = np.stack([ids, ids + 1, ids * 0], axis=1)
    return {"request_id": ids, "user": user, "X": x, "item": np.array([4, 9, 2, 3, 8, 5], np.int32)}


def test_infer() -> None:
    roles, notes = infer(INFOS, recorded())
    assert levels(roles) == {"user": "request", "X": "mixed", "item": "candidate", "table": "request"}
    assert roles.inputs["X"] == InputRole("X", "mixed", 0, axis=1, request=(0, 2))
    assert roles.inputs["item"].ranges == (ValueRange(2, 10, None),)
    assert roles.inputs["user"].ranges == (
        ValueRange(3, 10, (0,)),
        ValueRange(4, 11, (1,)),
        ValueRange(0, 1, (2,)),
    )
    assert roles.inputs["table"].candidate_axis is None
    assert notes == [
        "user: request-level (constant within each of 3 requests); values in [0, 11)",
        "X: columns 0,2 request-level (constant within each of 3 requests), others candidate-level",
        "item: candidate-level; values in [2, 10)",
        "table: request-level (one row per request by its shape)",
    ]


def test_infer_one_request() -> None:
    data = {"u": np.array([[np.nan], [np.nan]]), "x": np.array([[1.0, 5], [2, 5]])}
    roles, notes = infer([info("u", "N", 1), info("x", "N", 2)], data)
    assert levels(roles) == {"u": "request", "x": "mixed"}
    assert notes[0] == "u: request-level (constant over the only request)"
    assert notes[1].endswith("; columns 1 constant over the only request")


def test_infer_constant_over_the_file() -> None:
    data = {"u": np.ones(4), "x": np.arange(4.0), "request_id": np.array([["a"], ["a"], ["b"], ["b"]])}
    roles, notes = infer([info("u", "N"), info("x", "N")], data)
    assert roles.request_names() == ("u",)
    assert notes[0] == "u: request-level (constant over all 2 requests)"


def test_infer_never_splits_other_than_matrices() -> None:
    data = {"h": np.zeros((2, 2, 2), np.int64), "u": np.zeros(2)}
    data["h"][1, 1, 1] = 1
    roles, _ = infer([info("h", "N", 2, 2, dtype=TensorProto.INT64), info("u", "N")], data)
    assert roles.inputs["h"] == InputRole("h", "candidate", 0, ranges=(ValueRange(0, 2, None),))


def change(**arrays: np.ndarray[Any, Any] | None) -> Mapping[str, np.ndarray[Any, Any]]:
    data = {**recorded(), **arrays}
    return {name: array for name, array in data.items() if array is not None}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (change(user=None, item=None), "no key for input 'user', 'item'"),
        (change(usr=np.zeros(6)), "the key 'usr', which is no input. The inputs are 'user'"),
        (change(item=np.zeros(5, np.int32)), "differ in their number of rows.*'item' 5"),
        (change(request_id=np.zeros(5)), "differ in their number of rows.*'request_id' 5"),
        (change(request_id=np.zeros((6, 2))), r"request_id .* shape \[6, 2\]"),
        (change(request_id=np.array(3)), "request_id .* shape"),
        (change(X=np.zeros((6, 5))), r"'X' \(float\[N, 4\]\) has the shape \[6, 5\]"),
        (change(item=np.zeros((6, 1), np.int32)), r"'item' .* has the shape \[6, 1\]"),
        (change(item=np.array(3)), r"'item' .* has the shape \[\]"),
        (change(item=np.zeros(6)), "'item' holds float64 values; the input takes integers"),
        (change(request_id=np.arange(6)), "no request with two rows"),
    ],
)
def test_infer_data_errors(data: Mapping[str, np.ndarray[Any, Any]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        infer(INFOS, data)


def test_infer_undecided() -> None:
    infos = [info("u", "N"), info("x", "N"), info("flag")]
    with pytest.raises(UsageError, match="No input and no column is constant"):
        infer(infos, {"u": np.arange(3.0), "x": np.arange(3.0)})
    with pytest.raises(UsageError, match="Every input is constant within every request"):
        infer(infos, {"u": np.ones(3), "x": np.ones(3)})


def test_infer_unusable_model() -> None:
    with pytest.raises(ModelError, match="dynamic rank"):
        infer([InputInfo("x", TensorProto.FLOAT, None)], {"x": np.zeros(2)})
    with pytest.raises(ModelError, match="static batch"):
        infer([info("x", 4, 2)], {"x": np.zeros((4, 2))})
    with pytest.raises(ModelError, match="static batch"):
        infer([info("x", 4, "L")], {"x": np.array([[1, 2], [1, 3], [1, 4], [1, 5]])})


# --- axes without a fixed extent ---------------------------------------------------------------------------

OPEN = [info("hist", "N", "L", dtype=TensorProto.INT64), info("item", "N", dtype=TensorProto.INT64)]


def open_recording(shared: int) -> dict[str, np.ndarray[Any, Any]]:
    """Three requests of four candidates; histories of 20, of which so many columns are the request's."""
    rng = np.random.default_rng(0)
    hist = np.repeat(rng.integers(0, 100, (3, 20)), 4, axis=0)
    hist[:, shared:] = rng.integers(0, 100, (12, 20 - shared))
    return {"hist": hist, "item": rng.integers(5, 50, 12), "request_id": np.repeat(np.arange(3), 4)}


def test_infer_with_a_symbolic_length() -> None:
    """The ranges of one recording's columns say nothing of a history that is longer."""
    data = open_recording(20)
    roles, notes = infer(OPEN, data)
    low, high = int(data["hist"].min()), int(data["hist"].max()) + 1
    assert roles.inputs["hist"] == InputRole("hist", "request", 0, ranges=(ValueRange(low, high),))
    assert notes[0] == f"hist: request-level (constant within each of 3 requests); values in [{low}, {high})"


def test_infer_columns_of_a_symbolic_axis_do_not_count() -> None:
    data = open_recording(10) | {"user": np.repeat(np.arange(3), 4)}
    roles, notes = infer([*OPEN, info("user", "N", dtype=TensorProto.INT64)], data)
    assert levels(roles) == {"hist": "candidate", "item": "candidate", "user": "request"}
    assert "axis 1 has no fixed extent, so that the constant columns 0:10 do not count" in notes[0]


@pytest.mark.parametrize("hist", [info("hist", "N", "L"), info("hist", "N", None), info("hist", 1, "L")])
def test_ranges_of_positions_on_an_open_axis(hist: InputInfo) -> None:
    role = resolve(
        [hist, OPEN[1]], spec={"inputs": {"hist": {"level": "request", "ranges": {"0:50": [0, 100]}}}}
    ).inputs["hist"]
    with pytest.raises(UsageError, match=r"Axis 1 of input 'hist'.*range: .low, high."):
        check_positions(hist, role)
    check_positions(info("hist", "N", 50), role)


def test_request_positions_on_an_open_axis() -> None:
    role = resolve(OPEN, request=["hist[0:3]"]).inputs["hist"]
    with pytest.raises(UsageError, match=r"cannot have request-level positions \(0:3\)"):
        check_positions(OPEN[0], role)
