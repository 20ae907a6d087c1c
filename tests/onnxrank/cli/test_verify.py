"""`onnxrank verify` from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import rewritten
from mutants import FOLDER

from onnxrank import cli
from onnxrank.cli import output

ORIGINAL = FOLDER / "mmoe.torchscript.onnx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a right and a wrong model."""
    made = rewritten(ORIGINAL, request=["user_*"]).model
    (tmp_path / "a.onnx").write_bytes(ORIGINAL.read_bytes())
    (tmp_path / "b.onnx").write_bytes(made.SerializeToString())
    softmax = next(n for n in made.graph.node if n.op_type == "Softmax")
    softmax.attribute[0].i = 0
    (tmp_path / "wrong.onnx").write_bytes(made.SerializeToString())
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ["--level", "quick", "--candidates", "2,5", "--seeds", "1"]


def test_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "a.onnx", "b.onnx", *QUICK]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("PASSED: the models give the same scores.") and err == ""
    assert "TF32 not used" in out and "passes with atol" in out
    assert sorted(os.listdir()) == ["a.onnx", "b.onnx", "wrong.onnx"]


def test_fail(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "a.onnx", "wrong.onnx", *QUICK]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].startswith("FAILED: algebra, rounding")
    assert err.startswith("onnxrank: error: algebra, rounding") and len(err.splitlines()) == 1


def test_quiet_and_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = ["json:r.json", "r.xml", "r.sarif", "r.md", "text:r.txt", "github"]
    args = [x for t in targets for x in ("--report", t)]
    assert cli.main(["verify", "a.onnx", "b.onnx", *QUICK, "-q", *args]) == 0
    out, err = capsys.readouterr()
    assert out == "::notice file=b.onnx,title=onnxrank verify::PASSED: the models give the same scores.\n" and err == ""
    assert json.loads(Path("r.json").read_text())["passed"] is True
    assert {"r.json", "r.xml", "r.sarif", "r.md", "r.txt"} <= set(os.listdir())


def test_report_on_stdout_displaces_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "a.onnx", "b.onnx", *QUICK, "--report", "json:-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["schema"] == "onnxrank.verify" and "PASSED" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["a.onnx"], 2, "OPTIMIZED"),
        (["a.onnx", "nothing.onnx"], 3, "nothing.onnx does not exist"),
        (["a.onnx", "b.onnx", "--ep", "tpu"], 2, "'tpu' is not cpu"),
        (["a.onnx", "b.onnx", "--ep", "cpu,cuda"], 4, "CUDAExecutionProvider"),
        (["a.onnx", "b.onnx", "--candidates", "1,x"], 2, "no list of numbers"),
        (["a.onnx", "b.onnx", "--candidates", "1000001"], 2, "more than the 1,000,000 that are run"),
        (["a.onnx", "b.onnx", "--rtol", "y:z"], 2, "[OUTPUT:]VALUE"),
        (["a.onnx", "b.onnx", "--atol", "-1"], 2, "[OUTPUT:]VALUE"),
        (["a.onnx", "b.onnx", "--labels", "label"], 2, "--labels needs recorded requests"),
        (["a.onnx", "b.onnx", "--data", "none.npz"], 2, "none.npz do not exist"),
        (["a.onnx", "b.onnx", "--report", "x.pdf"], 2, "cannot be told from the file's ending"),
        (["a.onnx", "b.onnx", "--report", "json:b.onnx"], 2, "would replace the model"),
        (["a.onnx", "b.onnx", "--save-failing", "."], 2, "is not empty"),
        (["a.onnx", "b.onnx", "--save-failing", "no/such"], 2, "cannot be written"),
        (["a.onnx", "b.onnx", "--roles", "none.yaml"], 2, "none.yaml cannot be read"),
        (["a.onnx", "b.onnx", "--request", "xyz*"], 2, "matches no input"),
        (["a.onnx", "b.onnx", "-q", "-v"], 2, "exclude each other"),
    ],
)
def test_usage(folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, words: str) -> None:
    before = sorted(os.listdir())
    assert cli.main(["verify", *args]) == code
    out, err = capsys.readouterr()
    assert words in err and out == "" and "Traceback" not in err
    assert sorted(os.listdir()) == before


@pytest.mark.slow
def test_options_reach_the_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("r.npz", user_ids=np.ones((3, 5), int), item_ids=np.array([[1, 2, 3]] * 3), clicked=np.array([1, 0, 1]))
    args = ["--data", "r.npz", "--labels", "clicked", "--top-k", "1", "--atol", "task_0:1", "--rtol", "0.5", "-v"]
    assert cli.main(["verify", "a.onnx", "b.onnx", *QUICK, *args, "--report", "r.json", "--jobs", "1"]) == 0
    found = json.loads(Path("r.json").read_text())
    assert found["requests"] == 1 and {r["top_k"] for r in found["ranking"]} == {1}
    assert [r["auc_before"] for r in found["ranking"] if "recorded" in r["output"]] == [0.5, 0.5]
    assert "recorded requests" in capsys.readouterr().err


@pytest.mark.slow
def test_save_and_bisect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "a.onnx", "wrong.onnx", *QUICK, "--bisect", "--save-failing", "out"]) == 1
    out = capsys.readouterr().out
    assert "bisect: " in out and "The failing case is in out" in out
    assert sorted(os.listdir("out")) == ["optimized.npz", "optimized.onnx", "original.npz", "original.onnx", "repro.py"]


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--request", "--roles", "--ep", "--data", "--candidates", "--seeds", "--rtol", "--atol", "--top-k",
                   "--labels", "--level", "--report", "--save-failing", "--bisect"):  # fmt: skip
        assert option in out


def test_progress_of_recorded_requests() -> None:
    """A bar where the total is known, a count where it is not."""
    shown: list[str] = []
    steps = output.Steps(shown.append)
    steps("recorded requests")
    steps.advance(50, 200)
    steps.advance(200, 200)
    steps.advance(7, None)
    assert shown[0] == "recorded requests" and shown[1].endswith(" 25 %") and shown[2].endswith(" 100 %")
    assert shown[1].count("━") == 7 and "╌" not in shown[2] and shown[3] == "recorded requests: 7 candidates"
