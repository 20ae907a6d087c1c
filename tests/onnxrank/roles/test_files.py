"""Roles files as they are read, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rolekit import info

from onnxrank.errors import UsageError
from onnxrank.roles import (
    load_spec,
    resolve,
)

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


@pytest.mark.slow
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
