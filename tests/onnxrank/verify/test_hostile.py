"""Damaged and malicious models: a clean error or a finding, in bounded time and memory, and no file."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from helpers import Graph
from mutants import FOLDER, pair
from onnx import ModelProto, TensorProto, helper

from onnxrank import cli
from onnxrank.formats import VERIFY
from onnxrank.verify import verify

ROOT = Path(__file__).resolve().parents[3]
OPTIONS = ["--candidates", "0,1,3", "--seeds", "1", "--timeout", "20", "--memory", "4"]


def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_verify", ROOT / "scripts" / "fuzz_verify.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """A sample of what `scripts/fuzz_verify.py` tries."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(7000 + seed)
    how = [fuzz().damage, fuzz().structured][seed % 2]
    right = (
        (FOLDER / "two_tower.torchscript.onnx").read_bytes(),
        pair("two_tower.torchscript").optimized.SerializeToString(),
    )
    files = list(right)
    files[seed % 4 == 0] = how(files[seed % 4 == 0], rng)
    for name, data in zip("ab", files, strict=True):
        Path(f"{name}.onnx").write_bytes(data)
    code = cli.main(["verify", "a.onnx", "b.onnx", "--request", "user_*", *OPTIONS])
    text = "".join(capsys.readouterr())
    assert code in (0, 1, 2, 3, 4), text
    assert "Traceback" not in text and not any(c in text for c in "\x00\x1b\x07")
    assert sorted(os.listdir()) == ["a.onnx", "b.onnx"]


def names_of_every_kind() -> ModelProto:
    """Control characters in all names."""
    bad = "a\x1b]0;b\x07\r\n::error::<&>"
    model = ModelProto()
    g = Graph(17)
    x = g.input("item", ["N", 4])
    g.output(g.op("MatMul", x, g.const(np.ones((4, 1), np.float32))), ["N", 1])
    model.CopyFrom(g.model())
    node = model.graph.node[0]
    node.name = bad
    node.output[0] = model.graph.output[0].name = f"out{bad}"
    node.input[0] = model.graph.input[0].name = f"in{bad}"
    return model


def test_control_characters() -> None:
    wrong = names_of_every_kind()
    wrong.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.full((4, 1), 2, np.float32), wrong.graph.initializer[0].name)
    )
    found = verify(names_of_every_kind(), wrong)
    assert not found.passed
    for form in VERIFY.names:
        text = VERIFY.render(found, form)
        assert "\x1b" not in text and "\x07" not in text and "\r" not in text, form
        assert not any(line.startswith("::error::<") for line in text.splitlines())


def deep(levels: int) -> ModelProto:
    """Ifs within Ifs."""

    def branch(level: int, name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(f"{name}o", TensorProto.FLOAT, None)
        if level == 0:
            return helper.make_graph([helper.make_node("Identity", ["item"], [f"{name}o"])], name, [], [out])
        inner = helper.make_node("If", ["c"], [f"{name}o"], then_branch=branch(level - 1, f"{name}t"),
                                 else_branch=branch(0, f"{name}e"))  # fmt: skip
        return helper.make_graph([inner], name, [], [out])

    g = Graph(17)
    g.input("item", ["N", 4])
    node = helper.make_node("If", ["c"], ["score"], then_branch=branch(levels, "t"), else_branch=branch(0, "e"))
    condition = onnx.numpy_helper.from_array(np.array(True), "c")
    output = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", 4])
    graph = helper.make_graph([node], "g", g.inputs, [output], [condition])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


def test_deep_nesting() -> None:
    assert verify(deep(5), deep(5)).passed


def field(number: int, data: bytes) -> bytes:
    """A field of bytes as protobuf writes it."""
    length, out = len(data), bytearray([number << 3 | 2])
    while True:
        out.append(length & 127 | (128 if length > 127 else 0))
        length >>= 7
        if not length:
            return bytes(out) + data


@pytest.mark.parametrize("levels", [30, 2000])
def test_too_deep_nesting(tmp_path: Path, capsys: pytest.CaptureFixture[str], levels: int) -> None:
    """Graphs in attributes of nodes of graphs, deeper than any library takes."""
    graph = b""
    for _ in range(levels):
        graph = field(1, field(5, field(6, graph)))
    data = b"\x08\x0a" + field(7, graph) + field(8, b"\x10\x11")
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx").write_bytes(data)
    assert cli.main(["verify", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), *OPTIONS]) == 3
    err = capsys.readouterr().err
    assert "Traceback" not in err and len(err.splitlines()) == 1


@pytest.mark.slow
def test_huge_dims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tensors that declare more than there is, in the graph and in the weights."""
    g = Graph(17)
    x = g.input("item", ["N", 4])
    g.output(g.op("MatMul", x, g.const(np.ones((4, 1), np.float32))), ["N", 1])
    (tmp_path / "a.onnx").write_bytes(g.model().SerializeToString())

    def output(m: ModelProto) -> None:
        m.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2**62

    def weight(m: ModelProto) -> None:
        m.graph.initializer[0].dims[0] = 2**62

    def fill(m: ModelProto) -> None:
        m.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2**31, 2**31]), "large"))
        m.graph.node.insert(0, helper.make_node("ConstantOfShape", ["large"], ["filled"]))
        m.graph.node[1].input[1] = "filled"

    for change in (output, weight, fill):
        made = g.model()
        change(made)
        (tmp_path / "b.onnx").write_bytes(made.SerializeToString())
        start = time.monotonic()
        assert cli.main(["verify", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), *OPTIONS]) in (1, 3, 4)
        assert time.monotonic() - start < 60
        assert "Traceback" not in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "b.onnx"]


@pytest.mark.slow
def test_output_without_rows() -> None:
    """The second model gives one row whatever it is asked."""
    g = Graph(17)
    x = g.input("item", ["N", 4])
    y = g.op("ReduceSum", x, g.ints(0), keepdims=1)
    g.output(y, [1, 4])
    h = Graph(17)
    h.input("item", ["N", 4])
    h.output(h.op("Identity", "item"), ["N", 4])
    right, wrong = h.model(), g.model()
    right.graph.node[-1].output[0] = right.graph.output[0].name = y
    found = verify(right, wrong)
    assert not found.passed and found.verdicts["algebra"] == "failed"


@pytest.mark.slow
def test_interrupt_ends_all(tmp_path: Path) -> None:
    """No process is left behind."""
    if sys.platform == "win32":
        pytest.skip("signals")
    path = FOLDER / "history_transformer.torchscript.onnx"
    command = [sys.executable, "-m", "onnxrank.cli", "verify", str(path), str(path), "--seeds", "200"]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    time.sleep(2.5)
    children = [int(c) for c in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
    running.terminate()
    assert running.wait(20) == 143
    assert children
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{c}").exists() for c in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{c}").exists() for c in children)
