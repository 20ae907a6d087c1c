"""What models may do while they are measured, and what comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fatal import endless, fatal, rows
from helpers import Graph, rewritten
from onnx import ModelProto

from onnxrank import cli, workers
from onnxrank.contract import CONTRACT
from onnxrank.errors import CheckFailed, EnvironmentProblem, ModelError, UsageError
from onnxrank.inspection.engine import inspect
from onnxrank.profiling import engine
from onnxrank.profiling.bench import Entrant, RemoteBench
from onnxrank.profiling.engine import profile
from onnxrank.profiling.sessions import Target

QUICK: dict[str, Any] = {"request": ["user"], "candidates": [2, 16], "seconds": 1e-3, "memory": False}


def hungry(most: int = 4096) -> ModelProto:
    """Makes a tensor of so many numbers per candidate."""
    g = Graph(17)
    x = g.input("item", ["N", 1])
    u = g.input("user", ["N", 1])
    large = g.op("Add", g.op("Mul", x, u), g.const(np.ones((1, most), np.float32)))
    g.output(g.op("ReduceMax", g.op("Sin", large), axes=[1], keepdims=1), ["N", 1])
    return g.model()


@pytest.mark.slow
def test_crash_at_a_number_of_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fatal.onnx"
    onnx.save(fatal(least=8), path)
    args = ["--request", "user", "--candidates", "2,16", "--seconds", "0.01", "--no-memory"]
    assert cli.main(["profile", str(path), *args]) == 3
    err = capsys.readouterr().err
    assert f"{path} makes onnxruntime fail at N = 16 at node GRU" in err and "died of SIG" in err


@pytest.mark.parametrize("made", [pytest.param(False, marks=pytest.mark.slow), True])
def test_crash_of_the_second_model(made: bool) -> None:
    """What `optimize` made fails its check; any other model is one that does not run."""
    other = fatal(least=8)
    if made:
        entry = other.metadata_props.add()
        entry.key, entry.value = CONTRACT, json.dumps({"interface": "same"})
    kind = CheckFailed if made else ModelError
    with pytest.raises(kind, match="other model in memory makes onnxruntime fail at N = 16 at node GRU") as e:
        profile(fatal(least=100), other, **QUICK)
    assert e.value.exit_code == (1 if made else 3)


@pytest.mark.slow
def test_crash_while_shapes_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fatal.onnx"
    onnx.save(fatal(), path)
    for command in ("inspect", "profile", "optimize"):
        out = [str(tmp_path / "out.onnx")] * (command == "optimize")
        assert cli.main([command, str(path), *out, "--request", "user"]) == 3
        err = capsys.readouterr().err
        assert f"{path} makes onnxruntime fail at node GRU" in err and "died of SIG" in err
        assert len(err.splitlines()) == 1 and sorted(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_hang() -> None:
    model = entrant(endless(dead=False))
    with (
        pytest.raises(ModelError, match="fail at N = 2: its process gave no answer within 2 s"),
        RemoteBench(Target(), 60) as bench,
    ):
        bench.open(model)
        bench._timeout = 2
        bench.hold(model, 2, [rows(2)])


def entrant(model: ModelProto) -> Entrant:
    subject = engine._Subject.load(model, 0)
    return subject.entrant("0", False)


def test_dead_loop_is_not_run_where_it_needs_not_be() -> None:
    """Only timing runs a model as it stands."""
    shown = rewritten(endless(dead=True), request=["user"])
    assert shown.changed and not any(n.op_type == "Loop" for n in shown.model.graph.node)
    assert inspect(endless(dead=True), request=["user"]).before


@pytest.mark.slow
@pytest.mark.parametrize("answer", [None, 1, [], "x", {}, {"seconds": 1, "settled": 1, "copies": [None]}])
def test_nonsense(monkeypatch: pytest.MonkeyPatch, answer: object) -> None:
    model = entrant(fatal(least=100))
    with pytest.raises(ModelError, match="answered nonsense"), RemoteBench(Target(), 60) as bench:
        bench.open(model)
        monkeypatch.setattr(bench, "_call", lambda *a, **k: answer)
        bench.interleave([model], 2, 1e-3)


@pytest.mark.slow
def test_too_many_candidates_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 GB for what is made on the way, of which there is not enough; there would be for the inputs."""
    monkeypatch.setattr(workers, "available_memory", lambda: 3 << 30)
    with pytest.raises(EnvironmentProblem, match="not enough memory to run model in memory at N = 1000000") as e:
        profile(hungry(), **{**QUICK, "candidates": [2, 1_000_000]})
    assert e.value.exit_code == 4


@pytest.mark.slow
def test_too_many_candidates_for_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told before they are made."""
    monkeypatch.setattr(workers, "available_memory", lambda: 1 << 30)
    with pytest.raises(EnvironmentProblem, match=r"999999999 candidates: .*inputs alone .* 1.0 GiB are left"):
        profile(hungry(4), **{**QUICK, "candidates": [2, 999_999_999]})


def history() -> ModelProto:
    g = Graph(17)
    x = g.input("item", ["N", 1])
    h = g.input("user", ["N", "hist"])
    g.output(g.op("Add", x, g.op("ReduceMean", h, axes=[1], keepdims=1)), ["N", 1])
    return g.model()


@pytest.mark.slow
def test_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[int, ...]] = set()
    hold = RemoteBench.hold

    def watch(self: RemoteBench, model: Entrant, candidates: int, requests: Any) -> None:
        seen.update(r["user"].shape for r in requests)
        hold(self, model, candidates, requests)

    monkeypatch.setattr(RemoteBench, "hold", watch)
    assert any("hist = 64" in n for n in profile(history(), **QUICK).notes)
    assert any("hist = 9" in n for n in profile(history(), **QUICK, lengths={"hist": 9}).notes)
    assert seen == {(2, 64), (16, 64), (2, 9), (16, 9)}
    with pytest.raises(UsageError, match=r"no symbolic extent 'length'.*are hist"):
        profile(history(), **QUICK, lengths={"length": 9})
    with pytest.raises(UsageError, match="at least 1"):
        profile(history(), **QUICK, lengths={"hist": 0})


@pytest.mark.parametrize("length", ["hist", "hist=", "=3", "hist=0", "hist=1..3", "hist=x"])
def test_lengths_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], length: str) -> None:
    onnx.save(history(), tmp_path / "m.onnx")
    assert cli.main(["profile", str(tmp_path / "m.onnx"), "--length", length]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


@pytest.mark.slow
def test_no_module_of_the_current_folder_is_run(tmp_path: Path) -> None:
    """The command is started elsewhere; its children are where it is."""
    onnx.save(hungry(4), tmp_path / "m.onnx")
    for name in ("json", "ml_dtypes", "numpy", "onnxruntime", "onnxrank"):
        (tmp_path / f"{name}.py").write_text("open('taken', 'w')")
    code = "from onnxrank import cli; import sys; sys.exit(cli.main(sys.argv[1:]))"
    args = ["profile", "m.onnx", "--request", "user", "--candidates", "2", "--seconds", "0.001"]
    command = [sys.executable, "-P", "-c", code, *args]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "Resident memory" in done.stdout, done.stderr
    assert not (tmp_path / "taken").exists()
