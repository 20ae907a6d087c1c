"""Other tools run as they are, in processes of their own; here they are stand-ins that do what such tools may do."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import benchmark, compare

FOLDER = Path(__file__).resolve().parents[2] / "models" / "onnx"
TOOLS = ("onnxsim", "onnxslim", "onnxrank")
COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
EDIT = """
import sys, onnx
m = onnx.load(sys.argv[1])
{}
onnx.save(m, sys.argv[2])
"""
# A few percent: more than rounding, less than what shows at once.
WRONG = EDIT.format("t = max(m.graph.initializer, key=lambda t: len(t.raw_data)); t.raw_data = bytes(len(t.raw_data))")
SAME = EDIT.format("m.producer_name = 'another'")
BROKEN = EDIT.format("m.graph.node[0].op_type = 'Nothing'")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("two_tower.torchscript.onnx", "two_tower.roles.yaml"):
        shutil.copy(FOLDER / name, tmp_path / name)
    return tmp_path / "two_tower.torchscript.onnx"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a program in the place of a tool."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(programs))

    def put(tool: str, text: str) -> None:
        (programs / f"{tool}.py").write_text(text)

    return put


def measured(model: Path, folder: Path, tools: tuple[str, ...] = TOOLS) -> dict[str, Any]:
    compare.prepare(model, tools, folder)
    return compare.measure(model, folder, [5], 0.0, 1)


def test_every_form_is_timed(model: Path, tmp_path: Path, stand_in: Any) -> None:
    stand_in("onnxsim", SAME)
    stand_in("onnxslim", COPY)
    found = measured(model, tmp_path / "made")
    assert not any("failed" in entry for entry in found["tools"].values())
    assert found["tools"]["onnxrank"]["rules"]
    # What has been left as it is is not timed, but counts.
    assert set(found["milliseconds"]["5"]) == {*compare.LEVELS, "onnxsim", "onnxrank"}
    assert found["ratio"]["5"]["onnxslim"] == 1.0
    assert found["ratio"]["5"]["original"] == 1.0
    times = found["milliseconds"]["5"]
    assert found["ratio"]["5"]["onnxrank"] == pytest.approx(times["original"] / times["onnxrank"], rel=0.02)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; print('no such operator', file=sys.stderr); sys.exit(3)", "exit code 3: no such operator"),
        ("import os; os.abort()", "exit code -6"),
        ("", "exit code 0: no output"),
        (WRONG, "of the output's scale"),
        (BROKEN, "fails: "),
    ],
)
def test_failures_of_tools(model: Path, tmp_path: Path, stand_in: Any, program: str, reason: str) -> None:
    stand_in("onnxsim", program)
    found = measured(model, tmp_path / "made", ("onnxsim", "onnxrank"))
    assert reason in found["tools"]["onnxsim"]["failed"]
    assert "onnxsim" not in found["ratio"]["5"]
    assert "onnxrank" in found["ratio"]["5"]
    assert list(compare.summary({"a/b": found})["failures"]["onnxsim"]) == ["a/b"]


def test_only_what_was_prepared_is_timed(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--prepare"):
        compare.measure(model, tmp_path / "made", [5], 0.0, 1)
    compare.prepare(model, (), tmp_path / "made")
    model.write_bytes((FOLDER / "two_tower.dynamo.onnx").read_bytes())
    with pytest.raises(ValueError, match="changed"):
        compare.measure(model, tmp_path / "made", [5], 0.0, 1)


def test_missing_tools_are_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "missing", lambda tools: ["onnxslim"])
    monkeypatch.setattr(sys, "argv", ["compare.py", str(model)])
    with pytest.raises(SystemExit) as stopped:
        compare.main()
    assert stopped.value.code == 2
    assert "pip install onnxslim" in capsys.readouterr().err


def test_earlier_results_stay(
    model: Path, tmp_path: Path, stand_in: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.json"
    earlier = {"tools": {}, "milliseconds": {}, "ratio": {"5": {"original": 1.0, "onnxrank": 4.0}}}
    out.write_text(json.dumps({"models": {"before/one": earlier}}))
    arguments = [str(model), "--json", str(out), "--candidates", "5", "--seconds", "0", "--least", "1"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments, "--without", "onnxsim", "onnxslim"])
    assert compare.main() == 0
    body = json.loads(out.read_text())
    assert body["models"]["before/one"] == earlier
    assert compare.name_of(model) in body["models"]
    assert body["summary"]["all"]["models"] == 2
    assert "| 5 | onnxrank | 2 |" in capsys.readouterr().out


def result(tool: str, ratio: float | None) -> dict[str, Any]:
    failed = {"failed": "why"} if ratio is None else {}
    ratios = {"original": 1.0, "onnxrank": 2.0, **({} if ratio is None else {tool: ratio})}
    return {"tools": {tool: failed, "onnxrank": {}}, "ratio": {"32": ratios}}


def test_summary() -> None:
    results = {"x/a": result("onnxsim", 0.5), "x/b": result("onnxsim", 4.0), "y/c": result("onnxsim", None)}
    said = compare.summary(results)
    row = said["candidates"]["32"]["onnxsim"]
    assert row["geometric_mean"] == pytest.approx(math.sqrt(2.0))
    assert (row["models"], row["faster"], row["slower"]) == (2, 1, {"x/a": 0.5})
    assert said["failures"] == {"onnxsim": {"y/c": "why"}, "onnxrank": {}}
    assert said["candidates"]["32"]["onnxrank"]["models"] == 3
    assert {k: v["models"] for k, v in compare.summaries(results).items()} == {"x": 2, "y": 1, "all": 3}
    assert "y/c: why" in compare.as_markdown("all", said)


@pytest.mark.parametrize(
    ("a", "b", "wrong"),
    [
        ([1.0, 2.0], [1.0, 2.00001], False),
        ([1.0, 2.0], [1.0, 2.001], True),
        ([1.0, np.nan], [1.0, np.nan], False),
        ([1.0, np.nan], [1.0, 0.0], True),
        ([1.0], [[1.0]], True),
        ([0.0], [1e-3], True),
        ([3], [4], True),
    ],
)
def test_difference(a: Any, b: Any, wrong: bool) -> None:
    assert bool(compare.difference([np.array(a)], [np.array(b)])) == wrong


def test_twins_and_models_without_roles_are_left_out(model: Path, tmp_path: Path) -> None:
    shutil.copy(model, tmp_path / "two_tower.twin.onnx")
    shutil.copy(model, tmp_path / "other.onnx")
    assert compare.models([tmp_path], "*") == [model]


def test_medians_over_sessions_keep_forms_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions are opened in changing orders; every figure still belongs to its form, and is a median."""
    orders = []

    def medians(opened: Any, feeds: Any, seconds: float, least: int) -> list[float]:
        orders.append(opened)
        return [len(name) + feed["seed"] for name, feed in zip(opened, feeds, strict=True)]

    monkeypatch.setattr(benchmark, "medians", medians)
    names = ["a", "bb", "ccc", "dddd"]
    found = benchmark.medians_over_sessions(names, lambda name, seed: (name, {"seed": seed}), 3, 0.0)
    assert found == {name: len(name) + 1 for name in names}
    assert len(set(orders)) > 1
