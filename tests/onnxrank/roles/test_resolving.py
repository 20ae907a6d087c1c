"""Roles from patterns and roles files over declared inputs, and every error on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from onnx import TensorProto
from rolekit import OPEN, info, levels

from onnxrank.errors import ModelError, UsageError
from onnxrank.roles import (
    InputInfo,
    InputRole,
    ValueRange,
    check_positions,
    resolve,
)

TWO = [info("user_age", "b0", 1), info("user_ids", "b1", 4, dtype=TensorProto.INT64), info("item", "b2", 8)]
PACKED = [info("X", "N", 21)]


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
