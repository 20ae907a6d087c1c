"""The worked example of CONTRIBUTING.md: a rule written from scratch, and its test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import onnxrank
from onnxrank.errors import UsageError
from onnxrank.ruleset import choose_rules

SAID = ("title", "identity", "source", "legal", "refuses", "exactness")
DOCUMENT = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def block(name: str) -> str:
    """The Python below a mark."""
    found = re.search(rf"<!-- {name} -->\n```python\n(.*?)^```$", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    assert found, name
    return found[1]


@pytest.fixture
def rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The rule in a file, under the name that the document gives it, in the current folder."""
    (tmp_path / "my_rule.py").write_text(block("rule"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "my_rule.py"


def test_the_example_runs(rule: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block("test")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("targets", [16, 32])
def test_scores_are_equal(rule: Path, targets: int, step: int) -> None:
    """Bit by bit, at numbers of candidates that nothing else runs at; without the rule nothing is divided."""
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    linear = {"coefficients": rng.integers(-3, 4, 12 * targets).astype(np.float32), "targets": targets}
    linear |= {"intercepts": step * np.arange(float(targets))}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", k]) for n, k in (("user", 8), ("item", 4))]
    nodes = [
        helper.make_node("Concat", ["user", "item"], ["x"], axis=1),
        helper.make_node("LinearRegressor", ["x"], ["h"], domain="ai.onnx.ml", **linear),
        helper.make_node("Relu", ["h"], ["score"]),
    ]
    outputs = [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", targets])]
    graph = helper.make_graph(nodes, "ranker", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    result = onnxrank.optimize(model, request=["user"], extra_rules=[rule])
    used = next(r for r in result.report.rules if r.name == "linear_regressor")
    assert used.sites == 1 and used.macs_saved > 0
    run = [onnxruntime.InferenceSession(m.SerializeToString()).run for m in (model, result.model)]
    user = rng.integers(-5, 6, (1, 8)).astype(np.float32)
    for n in (1, 3, 101):
        item = rng.integers(-5, 6, (n, 4)).astype(np.float32)
        (before,) = run[0](None, {"user": user.repeat(n, 0), "item": item})
        (after,) = run[1](None, {"user": user, "item": item})
        assert np.array_equal(before, after)


def test_the_example_is_a_rule_like_others(rule: Path) -> None:
    """It is found by its name, comes before onnxrank's own, and explains itself; a file without rules is refused."""
    found = choose_rules(None, (), [rule])
    assert found[0].name == "linear_regressor"
    assert all(isinstance(getattr(found[0], f), str) and getattr(found[0], f) for f in SAID)
    rule.write_text("RULES = 3\n")
    with pytest.raises(UsageError, match="must define RULES"):
        choose_rules(None, (), [rule])
