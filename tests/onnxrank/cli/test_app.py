"""The command line: options, exit codes, what goes to which stream, and files written or not.

The engine is replaced by a fake here; `test_for_real` runs the real one.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxrank
from onnxrank import cli, model
from onnxrank.cli import output
from onnxrank.errors import CheckFailed, EnvironmentProblem, ModelError, UsageError
from onnxrank.report import Report, RuleUse
from onnxrank.rule import Refusal


def tiny() -> ModelProto:
    """A tower of the user and the item: two rows of weights each."""
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 64]) for n in ("user", "item")]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 32])
    w = numpy_helper.from_array(np.linspace(-1, 1, 128 * 32, dtype=np.float32).reshape(128, 32), "w")
    nodes = [
        helper.make_node("Concat", ["user", "item"], ["c"], axis=1),
        helper.make_node("MatMul", ["c", "w"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Engine:
    """Stands in for `onnxrank.optimize`."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.changed = True
        self.error: BaseException | None = None
        self.before: Callable[[], None] = lambda: None

    def __call__(self, source: str, *, progress: Callable[[str], None] | None = None, **options: Any) -> Any:
        self.calls.append({"source": source, **options})
        loaded = model.load(source)
        if progress:
            progress("rewriting")
        self.before()
        if self.error:
            raise self.error
        made = ModelProto()
        made.CopyFrom(loaded.proto)
        made.producer_name = "optimised"
        shown = Report(
            "0.1.0",
            source,
            loaded.sha256,
            "request",
            (512, 512),
            {"inputs": []},
            changed=self.changed,
            notes=["a note"],
        )
        if self.changed:
            shown.rules = [RuleUse("fc", 1, 10, ("n",))]
        shown.refusals = [Refusal("fc", "the_node", "MatMul", "a reason")]

        def save(out: str) -> None:
            if self.changed:
                model.save(made, loaded, out)
            else:
                model.save_unchanged(loaded, out)
            shown.output = str(out)

        return SimpleNamespace(model=made, report=shown, loaded=loaded, changed=self.changed, save=save)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setitem(vars(onnxrank), "optimize", made)
    return made


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model in it."""
    (tmp_path / "in.onnx").write_bytes(tiny().SerializeToString())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refused(
    folder: Path, capsys: pytest.CaptureFixture[str], code: int, words: str, *args: str, lines: int | None = 1
) -> str:
    """Runs a command that must fail with one line on stderr and change no file."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert cli.main(args) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-1].startswith("onnxrank: error: ")
    assert words in captured.err
    assert lines is None or len(captured.err.splitlines()) == lines
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    return captured.err


# --- what is written and printed ---------------------------------------------------------------------------------


def test_optimize(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["optimize", "in.onnx", "out.onnx"]) == 0
    captured = capsys.readouterr()
    assert "Written to out.onnx." in captured.out and "1 × fc" in captured.out
    assert captured.err == ""
    assert model.load("out.onnx").proto.producer_name == "optimised"
    assert files(folder) == ["in.onnx", "out.onnx"]
    assert engine.calls == [
        {
            "source": "in.onnx",
            "request": (),
            "spec": None,
            "infer_from": None,
            "interface": "request",
            "guard": True,
            "candidates": 512,
            "select": None,
            "ignore": (),
            "extra_rules": (),
            "check": "standard",
            "lengths": {},
            "strict": False,
            "tune": 0.0,
            "slowdown": 0.0175,
            "blocks": None,
            "plan": None,
        }
    ]


def test_options_reach_the_engine(folder: Path, engine: Engine) -> None:
    (folder / "roles.yaml").write_text("inputs: {user: request}\n")
    options = "--request u* --request X[0:13,20] --roles roles.yaml --interface same --no-guard --candidates 64..2048"
    options += " --select fc,norm --select gru --ignore a, --rules a.py --rules b.py --no-check --strict -q"
    options += " --tune 2.5 --slowdown 5"
    assert cli.main(["optimize", "in.onnx", "out.onnx", *options.split()]) == 0
    assert engine.calls == [
        {
            "source": "in.onnx",
            "request": ("u*", "X[0:13,20]"),
            "spec": {"inputs": {"user": "request"}},
            "infer_from": None,
            "interface": "same",
            "guard": False,
            "candidates": (64, 2048),
            "select": ["fc", "norm", "gru"],
            "ignore": ["a"],
            "extra_rules": ("a.py", "b.py"),
            "check": False,
            "lengths": {},
            "strict": True,
            "tune": 2.5,
            "slowdown": 0.05,
            "blocks": None,
            "plan": None,
        }
    ]


def test_infer_roles(folder: Path, engine: Engine) -> None:
    np.savez_compressed("data.npz", user=np.arange(6).reshape(3, 2), request_id=np.array(["a", "a", "b"]))
    assert cli.main(["optimize", "in.onnx", "out.onnx", "--infer-roles", "data.npz"]) == 0
    given = engine.calls[0]["infer_from"]
    assert sorted(given) == ["request_id", "user"]
    np.testing.assert_array_equal(given["user"], np.arange(6).reshape(3, 2))


def test_quiet(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["optimize", "in.onnx", "out.onnx", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert files(folder) == ["in.onnx", "out.onnx"]


def test_verbose_and_explain(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["optimize", "in.onnx", "out.onnx", "-v", "--explain"]) == 0
    captured = capsys.readouterr()
    assert "MatMul the_node" in captured.out
    assert captured.err.endswith("s  rewriting\n")


@pytest.mark.parametrize("same", [False, True])
def test_nothing_applied(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str], same: bool) -> None:
    engine.changed = False
    out = "in.onnx" if same else "out.onnx"
    before = (folder / "in.onnx").read_bytes()
    assert cli.main(["optimize", "in.onnx", out]) == 0
    assert capsys.readouterr().out.endswith("\nNothing applied: the output is the input's own bytes.\n")
    assert (folder / out).read_bytes() == before
    assert files(folder) == sorted({"in.onnx", out})


def test_output_is_the_input(folder: Path, engine: Engine) -> None:
    assert cli.main(["optimize", "in.onnx", "./in.onnx"]) == 0
    assert model.load("in.onnx").proto.producer_name == "optimised"
    assert files(folder) == ["in.onnx"]


@pytest.mark.parametrize("out", [[], ["out.onnx"], ["none/out.onnx"]])
def test_dry_run(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str], out: list[str]) -> None:
    assert cli.main(["optimize", "in.onnx", *out, "--dry-run"]) == 0
    assert "No model was written." in capsys.readouterr().out
    assert files(folder) == ["in.onnx"]


def test_require_change(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["optimize", "in.onnx", "out.onnx", "--require-change"]) == 0
    (folder / "out.onnx").unlink()
    engine.changed = False
    capsys.readouterr()
    assert cli.main(["optimize", "in.onnx", "out.onnx", "--require-change"]) == 5
    captured = capsys.readouterr()
    assert "a reason" in captured.out and "No model was written." in captured.out
    assert captured.err == (
        "onnxrank: error: No rule applied, and --require-change asks for one. No model was written.\n"
    )
    assert files(folder) == ["in.onnx"]
    assert "error: No rule" in refused(
        folder, capsys, 5, "No rule", "optimize", "in.onnx", "o", "--require-change", "-q"
    )


def test_reports(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    reports = ["--report", "r.json", "--report", "r.txt", "--report", "text:r.out"]
    assert cli.main(["optimize", "in.onnx", "out.onnx", *reports, "-q"]) == 0
    assert json.loads((folder / "r.json").read_text())["output"] == "out.onnx"
    assert (folder / "r.txt").read_text() == (folder / "r.out").read_text()
    assert files(folder) == ["in.onnx", "out.onnx", "r.json", "r.out", "r.txt"]


def test_report_to_stdout_displaces_the_table(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["optimize", "in.onnx", "out.onnx", "--report", "json:-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["changed"] is True
    assert "1 × fc" in captured.err


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("", "Missing argument 'IN'. Try 'onnxrank optimize --help'."),
        ("in.onnx", "Missing argument 'OUT'"),
        ("in.onnx out.onnx extra", "unexpected extra argument"),
        ("in.onnx out.onnx --nonsense", "--nonsense"),
        ("in.onnx out.onnx -q -v", "-q and -v exclude each other"),
        ("in.onnx out.onnx --interface none", "'none' is not one of"),
        ("in.onnx out.onnx --candidates 0", "'--candidates': '0' starts below 1"),
        ("in.onnx out.onnx --candidates 9..3", "goes down"),
        ("in.onnx out.onnx --candidates many", "neither a number nor a range"),
        ("in.onnx out.onnx --candidates -5", "neither a number nor a range"),
        ("in.onnx out.onnx --infer-roles d.npz --request u", "exclude it"),
        ("in.onnx out.onnx --infer-roles d.npz --roles r.yaml", "exclude it"),
        ("in.onnx out.onnx --roles none.yaml", "none.yaml cannot be read"),
        ("in.onnx out.onnx --infer-roles none.npz", "none.npz cannot be read"),
        ("in.onnx out.onnx --report r.xml", "cannot be told from the file's ending"),
        ("in.onnx out.onnx --report xml:r", "format 'xml' is unknown"),
        ("in.onnx out.onnx --report none/r.json", "does not exist"),
        ("in.onnx out.onnx --report json:out.onnx", "would replace the model"),
        ("in.onnx out.onnx --report json:in.onnx", "would replace the model"),
        ("in.onnx none/out.onnx", "does not exist"),
        ("in.onnx .", "is a folder"),
        ("in.onnx /dev/null", "is not a regular file"),
    ],
)
def test_usage(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str], args: str, words: str) -> None:
    refused(folder, capsys, 2, words, "optimize", *args.split())
    assert engine.calls == []


def test_unknown_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(folder, capsys, 2, "No such command 'optimise'", "optimise")


@pytest.mark.parametrize("kind", ["text", "npy", "objects", "cut", "damaged", "empty", "folder"])
def test_bad_recordings(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = folder / "d.npz"
    if kind == "text":
        path.write_text("user,item\n1,2\n")
    elif kind == "npy":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "objects":
        np.savez(path, user=np.array([{}, None], dtype=object))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "folder":
        path.mkdir()
    else:
        np.savez_compressed(path, user=np.random.default_rng(0).random(1000))
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if kind == "cut" else data[:500] + bytes(500) + data[1000:])
    said = refused(folder, capsys, 2, "d.npz", "optimize", "in.onnx", "out.onnx", "--infer-roles", "d.npz")
    # numpy's own advice would be to load code from the file.
    assert "allow_pickle" not in said and "pickle.load" not in said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckFailed("output 'y' differs by 1"), 1, "output 'y' differs by 1"),
        (UsageError("no such input"), 2, "no such input"),
        (ModelError("dynamic rank"), 3, "dynamic rank"),
        (EnvironmentProblem("no onnxruntime"), 4, "no onnxruntime"),
        (MemoryError(), 4, "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 4, "no space left"),
        (RecursionError("maximum depth"), 70, "internal error: RecursionError: maximum depth. This is a bug"),
        (KeyError("x"), 70, "run again with -v for the traceback"),
    ],
)
def test_exit_codes(
    folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, words: str
) -> None:
    engine.error = error
    refused(folder, capsys, code, words, "optimize", "in.onnx", "out.onnx", "--report", "r.json")


def test_traceback_only_with_verbose(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.error = KeyError("x")
    text = refused(folder, capsys, 70, "please report it.", "optimize", "in.onnx", "out.onnx", "-v", lines=None)
    assert "Traceback" in text


def test_error_with_control_characters(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.error = ModelError("node 'a\x1b[2J'\nlisting")
    assert cli.main(["optimize", "in.onnx", "out.onnx"]) == 3
    assert capsys.readouterr().err == "onnxrank: error: node 'a\\x1b[2J'\nlisting\n"


def test_missing_model(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    refused(folder, capsys, 3, "none.onnx does not exist", "optimize", "none.onnx", "out.onnx")


def test_no_space_for_the_model(
    folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(folder, capsys, 4, "no space to write", "optimize", "in.onnx", "in.onnx")


def test_interrupt(folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.error = KeyboardInterrupt()
    assert cli.main(["optimize", "in.onnx", "out.onnx"]) == 130
    assert files(folder) == ["in.onnx"]
    assert "Traceback" not in capsys.readouterr().err


def test_termination_removes_temporary_files(folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def killed(fd: int) -> None:
        seen.append(files(folder))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(os, "fsync", killed)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        cli.main(["optimize", "in.onnx", "out.onnx"])
    assert caught.value.code == 143
    assert len(seen[0]) == 2 and files(folder) == ["in.onnx"]
    assert signal.getsignal(signal.SIGTERM) is handler


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "quiet", "shown"), [(0.0, False, False), (0.2, False, True), (0.2, True, False)])
def test_progress_on_a_terminal_after_a_while(
    folder: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float, quiet: bool, shown: bool
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output, "_PATIENCE", 0.1 if seconds else 60.0)
    engine.before = lambda: time.sleep(seconds)
    assert cli.main(["optimize", "in.onnx", "out.onnx", *(["-q"] if quiet else [])]) == 0
    assert ("rewriting" in terminal.getvalue()) is shown
    if not shown:
        assert terminal.getvalue() == ""


@pytest.fixture
def open_history(folder: Path) -> Path:
    """A model whose history has any length, and roles that count its positions; recorded requests of length 20."""
    tensors = [
        numpy_helper.from_array(np.ones((100, 4), np.float32), "table"),
        numpy_helper.from_array(np.ones((8, 1), np.float32), "weight"),
        numpy_helper.from_array(np.array([1]), "axis"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "hist"], ["h"]),
        helper.make_node("ReduceSum", ["h", "axis"], ["u"], keepdims=0),
        helper.make_node("Gather", ["table", "item"], ["i"]),
        helper.make_node("Concat", ["u", "i"], ["c"], axis=1),
        helper.make_node("MatMul", ["c", "weight"], ["y"]),
    ]
    ids = [helper.make_tensor_value_info(n, TensorProto.INT64, d) for n, d in (("hist", ["N", "L"]), ("item", ["N"]))]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])
    made = helper.make_model(
        helper.make_graph(nodes, "g", ids, [y], tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=9
    )
    (folder / "hist.onnx").write_bytes(made.SerializeToString())
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(3), 4)
    np.savez(folder / "d.npz", hist=rng.integers(0, 100, (3, 20))[request], item=np.arange(12), request_id=request)
    (folder / "r.yaml").write_text('inputs:\n  hist: {level: request, ranges: {"0:50": [0, 100]}}\n')
    return folder


def test_roles_of_a_history_of_any_length(open_history: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("optimize", "inspect"):
        args = [command, "hist.onnx", *(["--dry-run"] if command == "optimize" else []), "-q"]
        assert cli.main([*args, "--infer-roles", "d.npz"]) == 0
        assert cli.main([*args, "--roles", "r.yaml"]) == 2
        assert "has no fixed extent, so it cannot have value ranges of positions" in capsys.readouterr().err
        assert cli.main([*args, "--request", "hist[0:3]"]) == 2
        assert "cannot have request-level positions (0:3)" in capsys.readouterr().err


# --- help, rules -------------------------------------------------------------------------------------------------


def test_help_names_every_option() -> None:
    text = CliRunner().invoke(cli.cli, ["optimize", "--help"]).output
    for name in (
        *(
            "request",
            "roles",
            "infer-roles",
            "interface",
            "no-guard",
            "candidates",
            "select",
            "ignore",
            "rules",
            "report",
        ),
        *("explain", "dry-run", "no-check", "require-change", "quiet", "verbose"),
    ):
        assert f"--{name}" in text
    for command in ("optimize", "profile", "inspect", "rules"):
        text = CliRunner().invoke(cli.cli, [command, "--help"]).output
        assert max(map(len, text.splitlines())) <= 80
    text = CliRunner().invoke(cli.cli, []).output
    assert "Exit codes" in text and "130 interrupted" in text


def test_help_is_fast() -> None:
    code = (
        "import sys; from onnxrank.cli import main; code = main(sys.argv[1:]); "
        "slow = {'numpy', 'onnx', 'rich', 'onnxruntime', 'yaml'} & set(sys.modules); sys.exit(code or bool(slow))"
    )
    for args in (["--help"], *([c, "--help"] for c in ("optimize", "profile", "inspect")), ["--version"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == 0, (args, done)
        assert done.stderr == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("onnxrank ")


def test_rules(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from onnxrank.rules import RULES

    assert cli.main(["rules"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [r.name for r in RULES]
    for rule in RULES:
        assert cli.main(["rules", rule.name]) == 0
        text = " ".join(capsys.readouterr().out.split())
        for said in (rule.title, rule.identity, rule.source, rule.legal, rule.refuses, rule.exactness):
            assert " ".join(said.split()) in text
    refused(tmp_path, capsys, 2, "no rule 'brodcast'. Did you mean 'broadcast'?", "rules", "brodcast")
    refused(tmp_path, capsys, 2, "no rule 'nope'. Did you mean 'norm'?", "rules", "nope")


# --- as a process ------------------------------------------------------------------------------------------------


def process(*args: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "onnxrank.cli", *args], capture_output=True, **options)


@pytest.mark.slow
def test_ascii_locale() -> None:
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = process("optimize", "modèle.onnx", "out.onnx", env=plain)
    assert done.returncode == 3
    assert done.stderr.startswith(b"onnxrank: error: mod") and done.stderr.endswith(b"does not exist.\n")


@pytest.mark.parametrize("command", [pytest.param("profile", marks=pytest.mark.slow), "inspect"])
def test_reports_in_a_pipe_and_an_ascii_locale(folder: Path, command: str) -> None:
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    quick = ["--candidates", "2,3", "--seconds", "0.001", "--no-memory"] if command == "profile" else []
    done = process(command, "in.onnx", "--request", "user", *quick, env=plain)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode("ascii")
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 80
    assert ("per candidate" if command == "profile" else "block ideal") in text


@pytest.mark.slow
def test_broken_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "onnxrank.cli", "rules"], stdout=write, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.slow
def test_for_real(folder: Path) -> None:
    args = ["optimize", "in.onnx", "out.onnx", "--request", "user", "--report", "json:-"]
    done = process(*args)
    assert done.returncode == 0, done.stderr
    form = json.loads(done.stdout)
    jsonschema.validate(form, json.loads((Path(cli.__file__).parents[1] / "optimize.schema.json").read_text()))
    assert form["changed"] and form["output"] == "out.onnx"
    assert [rule["name"] for rule in form["rules"] if rule["macs_saved"]] == ["fc"]
    assert b"1 \xc3\x97 fc" in done.stderr
    assert files(folder) == ["in.onnx", "out.onnx"]
    wrong = process("optimize", "in.onnx", "o.onnx", "--request", "usr")
    assert wrong.returncode == 2 and b"'user'" in wrong.stderr and len(wrong.stderr.splitlines()) == 1
    assert files(folder) == ["in.onnx", "out.onnx"]
