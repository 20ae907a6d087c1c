"""`onnxrank split`, `onnxrank lint`, and `onnxrank verify` of a folder, as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import onnx
import pytest
from click.testing import CliRunner
from split_models import ranker_model

import onnxrank
from onnxrank import cli

SCHEMA = json.loads((Path(onnxrank.__file__).parent / "split.schema.json").read_text())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    onnx.save(ranker_model(), tmp_path / "in.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_models_and_their_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = ["--report", "report.json", "--report", "report.md", "--report", "text:report.txt"]
    assert cli.main(["split", "in.onnx", "out", "--request", "user", "--check", "quick", *reports]) == 0
    text = capsys.readouterr().out
    assert "Written to out: request.onnx, candidate.onnx, contract.json." in text and "Advice: one file" in text
    assert "State: 1 tensor, named, 32B" in text and max(map(len, text.splitlines())) <= 80
    found = json.loads((folder / "report.json").read_text())
    jsonschema.validate(found, SCHEMA)
    assert found["output"] == "out" and found["state_bytes"] == 32 and found["checks"]
    assert "request" in (folder / "report.md").read_text() and "version" in (folder / "report.txt").read_text()
    assert cli.main(["verify", "in.onnx", "out", "--level", "quick"]) == 0
    assert "PASSED" in capsys.readouterr().out


def test_formats(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--request", "user", "--no-check", "-q"]
    assert cli.main(["split", "in.onnx", "py", *quick, "--format", "python"]) == 0
    assert (folder / "py" / "ranker.py").exists()
    assert cli.main(["split", "in.onnx", "repo", *quick, "--format", "triton", "--name", "ctr"]) == 0
    assert sorted(os.listdir("repo")) == ["contract.json", "ctr", "ctr_candidate", "ctr_request"]
    assert capsys.readouterr().out == ""
    assert cli.main(["lint", "repo"]) == 0
    assert "agree" in capsys.readouterr().out
    config = folder / "repo" / "ctr_request" / "config.pbtxt"
    config.write_text(config.read_text().replace("[ 1, 6 ]", "[ 6 ]"))
    assert cli.main(["lint", "repo"]) == 1
    shown = capsys.readouterr()
    assert f"{Path('repo', 'ctr_request', 'config.pbtxt')}:8: input 'user' has 1 axes here" in shown.out
    assert "findings in repo" in shown.err


def test_nothing_is_written_on_a_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["split", "in.onnx", "--dry-run", "--request", "user", "--no-check"]) == 0
    assert "Nothing was written." in capsys.readouterr().out
    assert os.listdir(folder) == ["in.onnx"]
    assert cli.main(["split", "in.onnx", "out", "--dry-run", "--request", "user", "--no-check", "-q"]) == 0
    assert os.listdir(folder) == ["in.onnx"]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["in.onnx"], 2, "Missing argument 'OUT'"),
        (["in.onnx", "out"], 2, "Nothing says which inputs"),
        (["none.onnx", "out", "--request", "user"], 3, "does not exist"),
        (["in.onnx", "out", "--request", "user", "--max-state", "16"], 2, "No state is as small as 16 bytes"),
        (["in.onnx", "out", "--request", "user", "--max-state", "lots"], 2, "no number of bytes"),
        (["in.onnx", "out", "--request", "user", "--name", "a b"], 2, "other signs"),
        (["in.onnx", "in.onnx", "--request", "user"], 2, "is a file"),
        (["in.onnx", "out", "--request", "user", "--report", "in.onnx"], 2, "in.onnx"),
        (["in.onnx", "out", "--request", "user", "--length", "L=1..9"], 2, "no input has a length"),
        (["in.onnx", "out", "--request", "nobody"], 2, "nobody"),
    ],
)
def test_what_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, says: str
) -> None:
    assert cli.main(["split", *args]) == code
    shown = capsys.readouterr()
    assert says in " ".join(shown.err.split()) and "Traceback" not in shown.err
    assert os.listdir(folder) == ["in.onnx"]


def test_units_of_the_limit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("32", "1k", "1KB", "2m"):
        assert cli.main(["split", "in.onnx", "--dry-run", "--request", "user", "--no-check", "--max-state", size]) == 0


def test_help() -> None:
    for command in ("split", "lint"):
        text = CliRunner().invoke(cli.cli, [command, "--help"]).output
        assert max(map(len, text.splitlines())) <= 80
    for option in ("format", "state", "state-dtype", "max-state", "no-guard", "name", "roles", "candidates", "report"):
        assert f"--{option}" in CliRunner().invoke(cli.cli, ["split", "--help"]).output
    code = (
        "import sys; from onnxrank.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or bool({'numpy', 'onnx', 'rich', 'onnxruntime', 'yaml'} & set(sys.modules)))"
    )
    for args in (["split", "--help"], ["lint", "--help"]):
        assert subprocess.run([sys.executable, "-c", code, *args], capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_function_is_not_hidden_by_a_module() -> None:
    code = "import onnxrank, onnxrank.splitting.engine as e; assert onnxrank.split is onnxrank.split is e.split"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_field_of_the_schemas_is_described() -> None:
    home = Path(onnxrank.__file__).parent
    for name in ("split", "contract"):
        schema = json.loads((home / f"{name}.schema.json").read_text())
        jsonschema.Draft202012Validator.check_schema(schema)
        for field, told in schema["properties"].items():
            assert told.get("description"), (name, field)
