"""Roles that are read off recorded requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from rolekit import OPEN, info, levels

from onnxrank.errors import ModelError, UsageError
from onnxrank.roles import (
    InputInfo,
    InputRole,
    ValueRange,
    infer,
)

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
