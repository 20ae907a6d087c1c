"""The pieces of `optimize` give together what it gives; the document's examples run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Graph, whole_numbers
from onnx import ModelProto

import onnxrank
from onnxrank.errors import ModelError, UsageError
from onnxrank.values import Level

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models" / "onnx"


def tower(width: int = 64) -> ModelProto:
    g = Graph()
    x = g.op("Concat", g.input("user", ["N", 96]), g.input("item", ["N", 8]), axis=1)
    g.output(g.op("MatMul", x, g.const(whole_numbers(104, width))), ["N", width])
    return g.model()


def sums() -> ModelProto:
    g = Graph()
    g.output(g.op("Add", g.input("user", ["N", 8]), g.input("item", ["N", 8])), ["N", 8])
    return g.model()


def test_public_names() -> None:
    for name in onnxrank.__all__:
        assert getattr(onnxrank, name).__doc__, name


def block(name: str) -> str:
    text = (ROOT / "docs" / "python.md").read_text()
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found, name
    return found[1]


@pytest.mark.slow
def test_the_document(tmp_path: Path) -> None:
    shutil.copy(MODELS / "mmoe.torchscript.onnx", tmp_path / "ranker.onnx")
    done = subprocess.run([sys.executable, "-c", block("pieces")], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CANDIDATE") and "the same scores" in done.stdout
    exec(block("levels"), {})


@pytest.mark.parametrize("interface", ["request", "same"])
def test_they_give_what_optimize_gives(interface: str) -> None:
    model = tower(512)  # wide enough that the guard of `same` pays
    whole = onnxrank.optimize(model, request=["user"], interface=interface, candidates=(64, 256), check=False)
    analysis = onnxrank.analyse(onnxrank.read(model), request=["user"])
    plan = onnxrank.plan(analysis, interface=interface, candidates=(64, 256))
    assert plan.changed and plan == whole.plan
    made = onnxrank.emit(analysis, plan)
    assert made.SerializeToString(deterministic=True) == whole.model.SerializeToString(deterministic=True)
    assert onnxrank.gate(analysis, made, level="quick", candidates=[1, 3]).passed


def test_a_result_that_is_wrong_does_not_pass() -> None:
    model = tower()
    analysis = onnxrank.analyse(model, request=["user"])
    other = tower()
    other.graph.node[0].input[:] = ["item", "user"]
    assert not onnxrank.gate(analysis, other, level="quick", candidates=[2]).passed


def test_nothing_to_do() -> None:
    """Where nothing need be made but once, a plan changes nothing, and gives the original."""
    model = sums()
    analysis = onnxrank.analyse(model, request=["user"])
    plan = onnxrank.plan(analysis)
    assert not plan.changed and not plan.sites
    assert onnxrank.emit(analysis, plan) == model


def test_a_plan_of_another_model() -> None:
    plan = onnxrank.plan(onnxrank.analyse(tower(), request=["user"]))
    with pytest.raises(UsageError, match="belongs to another model"):
        onnxrank.emit(onnxrank.analyse(sums(), request=["user"]), plan)


def test_what_an_analysis_says() -> None:
    analysis = onnxrank.analyse(tower(), request=["user"])
    (weights,) = (t.name for t in analysis.study.model.graph.initializer)
    (concat, product) = analysis.study.model.graph.node
    assert analysis.level("user") is Level.REQUEST and analysis.is_once("user") and not analysis.is_once("item")
    data = analysis.constant(weights)
    assert data is not None and data.shape == (104, 64) and analysis.constant("user") is None
    low, high = analysis.interval(weights)
    assert low.min() == data.min() and high.max() == data.max()
    assert analysis.once_share(product) == 96 / 104 and analysis.once_share(concat) == 0.0
    assert set(analysis.ranges) == {"user", "item"} and list(map(str, analysis.extents(concat.output[0]))) == [
        "N",
        "104",
    ]


def test_what_cannot_be_analysed() -> None:
    with pytest.raises(UsageError):
        onnxrank.analyse(tower())
    with pytest.raises(ModelError):
        onnxrank.analyse("nowhere.onnx", request=["user"])
