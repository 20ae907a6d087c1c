"""Sessions in processes of their own, and processes that do not keep to the protocol."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from fatal import endless, fatal, rows
from helpers import Graph
from onnx import ModelProto

from onnxrank import workers
from onnxrank.errors import ModelError, OutOfMemory
from onnxrank.workers import Crashed, RemoteSession


def plain() -> ModelProto:
    g = Graph(17)
    g.output(g.op("Sin", g.input("item", ["N", 2])), ["N", 2])
    return g.model()


def test_runs() -> None:
    model = plain()
    with RemoteSession(model) as session:
        (name, out), *_ = session.run(rows(3)).items()
        assert name == model.graph.output[0].name and np.allclose(out, np.sin(1))
        assert session.run(rows(1), [name])[name].shape == (1, 2)
        with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
            session.run({"item": np.ones((3, 5), np.float32)})
        assert session.run(rows(2))[name].shape == (2, 2)


def test_double() -> None:
    with RemoteSession(plain(), precision="double") as session:
        (out,) = session.run(rows(2)).values()
    assert out.dtype == np.float64 and np.abs(out - np.sin(1.0)).max() < 1e-15


def test_not_a_model() -> None:
    model = plain()
    model.graph.node[0].op_type = "Sine"
    with pytest.raises(ModelError, match="Sine"):
        RemoteSession(model)


def test_process_is_used_again() -> None:
    first = RemoteSession(plain())
    process = first._worker
    first.close()
    with RemoteSession(plain()) as second:
        assert second._worker is process


def test_fresh_process() -> None:
    """It is none that has run anything, and what waits to be used again still does."""
    process = workers.take()
    workers.give(process)
    other = workers.fresh()
    assert other is not process and other.alive
    other.kill()
    assert workers.take() is process
    workers.give(process)


def test_process_that_does_not_forget_is_not_used_again() -> None:
    process = workers.take()
    workers.give(process)
    assert workers.take() is process
    process.ask("nothing")
    workers._IDLE.append(process)
    other = workers.take()
    assert other is not process and other.alive and not process.alive
    workers.give(other)


def test_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where it lies, also if the model itself goes through a file."""
    g = Graph(17)
    g.output(g.op("MatMul", g.input("item", ["N", 2]), g.const(np.full((2, 600), 3, np.float32))), ["N", 600])
    onnx.save(g.model(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    monkeypatch.chdir(tmp_path)
    for large in (workers._LARGE, 0):
        monkeypatch.setattr(workers, "_LARGE", large)
        with RemoteSession(model, ".") as session:
            (out,) = session.run(rows(2)).values()
        assert (out == 6).all()


@pytest.mark.slow
def test_crash_names_the_signal_and_the_next_run_is_a_new_process() -> None:
    with RemoteSession(fatal(least=3)) as session:
        with pytest.raises(Crashed, match="died of SIG") as e:
            session.run(rows(3))
        assert e.value.kind == "crash"
        (out,) = session.run(rows(2)).values()
        assert out.shape == (2, 2)


@pytest.mark.slow
def test_timeout() -> None:
    with (
        RemoteSession(endless(dead=False), timeout=3) as session,
        pytest.raises(Crashed, match="no answer within 3 s") as e,
    ):
        session.run(rows(2))
    assert e.value.kind == "timeout"


def test_memory() -> None:
    g = Graph(17)
    x = g.input("item", ["N", 2])
    large = g.op("ConstantOfShape", g.ints(1 << 20, 1 << 11))
    g.output(g.op("Add", x, g.op("ReduceMax", large, keepdims=0)), ["N", 2])
    with RemoteSession(g.model(), memory=4 << 30) as session, pytest.raises(OutOfMemory):
        session.run(rows(2))


def message(head: bytes, *buffers: bytes) -> bytes:
    out = struct.pack("<Q", len(head)) + head + struct.pack("<Q", len(buffers))
    return out + b"".join(struct.pack("<Q", len(b)) + b for b in buffers)


NONSENSE = {
    "length": b"\xff" * 8,
    "length of a buffer": message(b'{"result": 1}')[:-8] + struct.pack("<Q", 1) + struct.pack("<Q", 1 << 63),
    "number of buffers": message(b'{"result": 1}')[:-8] + b"\xff" * 8,
    "index": message(json.dumps({"result": {"\0": "array", "at": 5, "type": 1, "shape": [1]}}).encode()),
    "no index": message(json.dumps({"result": {"\0": "bytes"}}).encode()),
    "type": message(json.dumps({"result": {"\0": "array", "at": 0, "type": 8, "shape": [1]}}).encode(), b"12345678"),
    "shape": message(json.dumps({"result": {"\0": "array", "at": 0, "type": 1, "shape": [1 << 62]}}).encode(), b"1234"),
    "kind": message(json.dumps({"result": {"\0": [], "at": {}}}).encode()),
    "list": message(b"[1]"),
    "null": message(b"null"),
    "empty": message(b"{}"),
    "error": message(b'{"error": [1], "kind": {}}'),
    "depth": message(b"[" * 100_000 + b"]" * 100_000),
    "depth of mappings": message(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "no json": message(b"\x00\xff{"),
}


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bytes], workers.Worker]:
    """Makes processes that say something whatever they are asked, and then wait."""
    real = subprocess.Popen

    def make(data: bytes) -> workers.Worker:
        (tmp_path / "answer").write_bytes(data)
        code = "import sys, time; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read()); sys.stdout.flush()"
        code += "; time.sleep(600)"
        command = [sys.executable, "-c", code, str(tmp_path / "answer")]
        with monkeypatch.context() as m:
            m.setattr(subprocess, "Popen", lambda _, **how: real(command, **how))
            return workers.Worker()

    return make


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense(answering: Callable[[bytes], workers.Worker], what: str) -> None:
    """It is met at once, and is no error of our own."""
    process = answering(NONSENSE[what])
    start = time.monotonic()
    with pytest.raises(Crashed, match="answered nonsense") as e:
        process.call("available", 60)
    assert time.monotonic() - start < 30 and e.value.kind == "crash"
    assert not process.alive


@pytest.mark.parametrize("result", [1, None, {}, [1], [{}], [{"outputs": 1}], [{"outputs": {"y": 1}}], [{"error": 1}]])
def test_nonsense_for_outputs(answering: Callable[[bytes], workers.Worker], result: object) -> None:
    process = answering(message(json.dumps({"result": result}).encode()))
    process.ask("run")
    with pytest.raises(Crashed, match="answered nonsense"):
        process.outputs(60)


def test_closed_pipe(answering: Callable[[bytes], workers.Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that says nothing any longer but does not end is ended."""
    monkeypatch.setattr(workers, "_GRACE", 0.5)
    process = answering(b"")
    process._answers.put(workers._GONE)
    with pytest.raises(Crashed, match="answered nonsense"):
        process.call("available", 60)
    assert not process.alive


@pytest.mark.slow
def test_nobody_left_to_answer() -> None:
    """A process that hangs in a model ends with the one that started it, even if that is killed."""
    code = (
        "import os, sys; sys.path[:0] = sys.argv[1:]; import test_workers as t; "
        "s = t.RemoteSession(t.endless(False)); print(s._worker._process.pid, flush=True); "
        "s._worker.ask('run', session='session', feeds=[t.rows(2)], outputs=None); os.kill(os.getpid(), 9)"
    )
    here = Path(__file__).parent
    asked = [sys.executable, "-c", code, str(here), str(here.parent / "support")]
    pid = int(subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False).stdout)
    end = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_children_take_no_modules_from_the_current_folder(tmp_path: Path) -> None:
    """Also if this process was started so that it would."""
    for name in ("json", "ml_dtypes", "numpy", "onnx"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('taken')")
    code = (
        "import sys; sys.path[:] = [p for p in sys.path if p]; from onnxrank import workers; "
        "sys.path.insert(0, sys.argv[1]); import os; os.chdir(sys.argv[1]); "
        "print(workers.Worker().call('available', 60)['version'])"
    )
    asked = [sys.executable, "-P", "-c", code, str(tmp_path)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "." in done.stdout, done.stderr
