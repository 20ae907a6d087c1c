"""Processes that run models, and what models do to them."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fatal import sines
from helpers import INT64, Graph
from onnx import ModelProto

from onnxrank import host, runtime, workers
from onnxrank.errors import EnvironmentProblem, ModelError, OnnxrankError
from onnxrank.model import load
from onnxrank.verify import verify
from onnxrank.verify.side import MODEL, Side, run_both
from onnxrank.workers import Crashed


def looping(steps: int) -> ModelProto:
    """Doubles a number for a long time."""
    g = Graph(17)
    x = g.input("item", ["N", 2])
    g.output(sines(g, x, steps), ["N", 2])
    return g.model()


def plain(last: str = "Sin") -> ModelProto:
    g = Graph(17)
    g.output(g.op(last, g.input("item", ["N", 2])), ["N", 2])
    return g.model()


def hungry() -> ModelProto:
    """Makes a tensor of 8 TiB on the way."""
    g = Graph(17)
    x = g.input("item", ["N", 2])
    large = g.op("ConstantOfShape", g.ints(1 << 20, 1 << 21))
    g.output(g.op("Add", x, g.op("ReduceMax", large, keepdims=0)), ["N", 2])
    return g.model()


def crashing() -> ModelProto:
    """Kills onnxruntime where there is no candidate (a GRU over a batch of none)."""
    g = Graph(17)
    x = g.op("Unsqueeze", g.input("item", ["N", 2]), g.ints(0))
    weights = [g.const(np.ones((1, 6, 2), np.float32)) for _ in range(2)]
    y = g.ops("GRU", 2, x, *weights, hidden_size=2)[1]
    g.output(g.op("Squeeze", y, g.ints(0)), ["N", 2])
    return g.model()


def crashing_as_it_loads() -> ModelProto:
    """Kills onnxruntime where it computes what is constant ahead."""
    g = Graph(17)
    nothing = g.op("ConstantOfShape", g.ints(1, 0, 2))
    weights = [g.const(np.ones((1, 6, 2), np.float32)) for _ in range(2)]
    y = g.op("ReduceSum", g.ops("GRU", 2, nothing, *weights, hidden_size=2)[1], keepdims=0)
    g.output(g.op("Add", g.input("item", ["N", 2]), y), ["N", 2])
    return g.model()


def side(model: ModelProto, timeout: float = 60, memory: int | None = None) -> Side:
    made = Side("optimized", load(model), timeout, memory)
    made.open("s", provider="cpu", level="disabled")
    return made


def rows(n: int) -> dict[str, np.ndarray]:
    return {"item": np.ones((n, 2), np.float32)}


def test_runs_and_is_used_again() -> None:
    made = side(plain())
    (out,) = made.run("s", [rows(3)], ["sin_1"])
    assert isinstance(out, dict) and np.allclose(out["sin_1"], np.sin(1))
    process = made.start()
    made.close()
    assert process.ready() and process.alive
    with pytest.raises(OnnxrankError):
        process.call("run", session="s", feeds=[rows(1)], outputs=["sin_1"])  # it has forgotten the model
    process.kill()


def test_error_is_an_answer() -> None:
    made = side(plain())
    (out,) = made.run("s", [{"item": np.ones((3, 5), np.float32)}], ["sin_1"])
    assert isinstance(out, ModelError)
    with pytest.raises(ModelError):
        made.call("nothing of this name")
    made.close()


@pytest.mark.slow
def test_timeout() -> None:
    made = side(looping(1 << 40), timeout=2)
    with pytest.raises(Crashed, match="no answer within 2 s") as e:
        made.run("s", [rows(2)], ["loop_3"])
    assert e.value.kind == "timeout"
    made.close(good=False)


def test_memory_limit() -> None:
    made = side(hungry(), memory=2 << 30)
    (out,) = made.run("s", [rows(2)], [load(hungry()).proto.graph.output[0].name])
    assert isinstance(out, ModelError)
    made.close()


@pytest.mark.slow
def test_crash_is_found_among_others() -> None:
    """The feed that kills the process has an error, and the others their results."""
    model = crashing()
    made = side(model)
    (answers,) = run_both([made], "s", [[rows(2), rows(0), rows(3)]], [model.graph.output[0].name])
    assert [isinstance(a, Crashed) for a in answers] == [False, True, False]
    made.close(good=False)


@pytest.mark.slow
def test_crash_is_a_finding() -> None:
    """Only the second model dies of having no candidate."""
    g = Graph(17)
    g.op("Mul", g.input("item", ["N", 2]), g.const(np.zeros(2, np.float32)))
    name = crashing().graph.output[0].name
    g.nodes[-1].output[0] = name
    g.output(name, ["N", 2])
    found = verify(g.model(), crashing())
    assert not found.passed
    assert any(f.kind == "crash" and f.model == "optimized" and "0 candidates" in f.message for f in found.errors)


@pytest.mark.slow
def test_original_that_crashes_is_named() -> None:
    """No candidate kills both: nothing can be said there, and the rest is compared."""
    found = verify(crashing(), crashing())
    assert found.passed
    assert any("makes onnxruntime fail" in f.message for f in found.findings)


def test_sessions_are_made_beside_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, real = threading.Event(), runtime.session

    def slow(*args: Any, **how: Any) -> Any:
        assert goes_on.wait(60)
        return real(*args, **how)

    monkeypatch.setattr(runtime, "session", slow)
    made = host.Host()
    made.model("m", plain().SerializeToString(), None)
    made.begin("s", "m", level="all")
    made.begin("exact", "m", precision="double")
    assert made.check("m") == {}
    with pytest.raises(ModelError, match="being made"):
        made.reset()
    goes_on.set()
    for session in ("exact", "s"):
        assert made.open(session, "m") == {"how": "onnxruntime"}
        (out,) = made.run(session, [rows(3)], None)
        assert np.allclose(out["outputs"]["sin_1"], np.sin(1))
    assert made.run("exact", [rows(1)], None)[0]["outputs"]["sin_1"].dtype == np.float64
    made.reset()


def test_what_is_no_model_and_what_only_contradicts_itself() -> None:
    made = host.Host()
    good, wrong, odd = plain(), plain(), plain()
    wrong.graph.node[0].op_type = "NoSuchOperator"
    odd.graph.output[0].type.tensor_type.elem_type = INT64
    for key, model in (("good", good), ("wrong", wrong), ("odd", odd)):
        made.model(key, model.SerializeToString(), None)
    assert made.check("good") == {}
    assert made.check("wrong").keys() == {"error"} and "NoSuchOperator" in made.check("wrong")["error"]
    assert made.check("odd").keys() == {"inference"}


def test_what_came_of_a_session_is_told_to_who_waits_for_it() -> None:
    model = plain()
    model.graph.node[0].op_type = "NoSuchOperator"
    made = Side("optimized", load(model), 60)
    made.ahead("s", level="all")
    assert "error" in made.call("check", key=MODEL)
    for _ in range(2):  # asked for anew where it was not made
        with pytest.raises(ModelError, match="NoSuchOperator"):
            made.open("s", level="all")
    made.close()


def test_process_with_a_session_that_nobody_waited_for_is_ended() -> None:
    made = Side("original", load(plain()), 60)
    made.ahead("s", level="all")
    process = made.start()
    made.close()
    assert not process.alive


@pytest.mark.slow
def test_death_of_a_session_is_not_that_of_others() -> None:
    made = Side("optimized", load(crashing_as_it_loads()), 60)
    for session in ("all", "disabled"):
        made.ahead(session, level=session)
    process = made.start()
    assert made.call("check", key=MODEL) == {}
    assert made.open("disabled", level="disabled") == "onnxruntime"
    with pytest.raises(Crashed, match="died of SIG"):
        made.open("all", level="all")
    assert not process.alive
    assert made.open("disabled", level="disabled") == "onnxruntime"
    made.close()


def test_process_that_cannot_answer() -> None:
    process = workers.Worker()
    process.ask("nothing")
    os.kill(process._process.pid, 9)
    with pytest.raises((Crashed, ModelError)):
        process.result(10)
        process.call("reset", 10)
    assert not process.reusable()
    process.kill()


class Broken:
    """onnxruntime with a CUDA provider that is listed but makes no session."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def get_available_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_silent_fallback_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that is not on the provider asked for says so with the exit code of the environment."""
    real = runtime.onnxruntime()
    monkeypatch.setattr(runtime, "onnxruntime", lambda: Broken(real))
    made = host.Host()
    made.model("m", plain().SerializeToString(), None)
    with pytest.warns(UserWarning), pytest.raises(EnvironmentProblem, match="silently fell back"):
        made.open("s", "m", provider="cuda")
    made.open("s", "m", provider="cpu")


@pytest.mark.slow
def test_modules_of_the_current_folder_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('taken')")
    (tmp_path / "onnxrank").mkdir()
    monkeypatch.chdir(tmp_path)
    made = workers.Worker()
    assert made.call("available", 60)["providers"]
    made.kill()


@pytest.mark.slow
def test_codes_come_through() -> None:
    process = workers.Worker()
    process.call("model", key="m", data=plain().SerializeToString(), folder=None)
    with pytest.raises(EnvironmentProblem, match="CUDAExecutionProvider"):
        process.call("open", session="s", key="m", provider="cuda")
    process.kill()
