"""What makes a model wrong, and the failing case that is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from helpers import Graph, candidate, request, rewritten, whole_numbers
from mutants import FOLDER, MUTANTS

import onnxrank
from onnxrank.errors import CheckFailed
from onnxrank.feeds import describe
from onnxrank.forms import Form
from onnxrank.model import load
from onnxrank.passes import choosing
from onnxrank.roles import resolve
from onnxrank.study import Study
from onnxrank.verify import Options, verify

RULE = '''
from dataclasses import replace

from onnxrank.rules import fc


def gemm(rw, node):
    """Adds the bias twice, at one node."""
    made = fc.gemm(rw, node)
    if made is None or node.name != {node!r}:
        return made
    terms = rw.terms(made[0])
    return [rw.add([*terms, terms[-1]], made[0].dims, made[0].dtype)]


RULES = [replace(fc.RULE, operators={{**fc.RULE.operators, "Gemm": gemm}})]
'''


def repro(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script where only onnx, numpy and onnxruntime can be imported."""
    guard = folder / "guard.py"
    guard.write_text(
        "import importlib.abc, runpy, sys\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('onnxrank', 'onnx_graphsurgeon', 'click', 'rich', 'yaml', 'pyarrow'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"runpy.run_path({str(folder / 'repro.py')!r}, run_name='__main__')\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([sys.executable, str(guard)], capture_output=True, text=True, env=env, cwd=folder.parent)


@pytest.mark.parametrize(
    "node",
    ["/experts.1/experts.1.0/Gemm", pytest.param("/experts.2/experts.2.0/Gemm", marks=pytest.mark.slow)],
)
def test_rule_and_site(tmp_path: Path, node: str) -> None:
    """A rule that is broken at one node is named, and so is the node."""
    (tmp_path / "broken.py").write_text(RULE.format(node=node))
    path = FOLDER / "mmoe.torchscript.onnx"
    made = rewritten(path, request=["user_*"], extra_rules=[tmp_path / "broken.py"])
    options = Options(level="quick", bisect=True, rules=[tmp_path / "broken.py"], save_failing=tmp_path / "out")
    found = verify(path, made.model, options)
    assert not found.passed and found.culprit is not None
    assert (found.culprit.rule, found.culprit.node) == ("fc", node)
    assert any(f.rule == "fc" and f.node == node for f in found.findings)
    done = repro(tmp_path / "out")
    assert done.returncode == 1 and done.stdout.endswith("the models differ\n"), done.stdout + done.stderr
    sizes = [len(onnx.load(tmp_path / "out" / f"{m}.onnx").graph.node) for m in ("original", "optimized")]
    assert max(sizes) < 10


def test_operators_that_were_written_out(tmp_path: Path) -> None:
    """The plan in the contract says which; others stay, under a new name where they make a row per request."""
    g, given = Graph(17), [request("u", 5), candidate("c", 2)]
    u, c = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1)
    fused = {"domain": "com.microsoft", "activation": "Relu"}
    h = g.op("FusedGemm", x, g.const(whole_numbers(7, 64)), g.const(whole_numbers(64)), **fused)
    other = g.op("FusedGemm", u, g.const(whole_numbers(5, 64)), **{**fused, "activation": "Softplus"})
    g.output(h, ["N", 64])
    g.output(other, ["N", 64])
    model = g.model()
    study = Study(model, resolve(describe(model), request=["u"]), load(model))
    node = next(n.name for n in study.written_out([h]).model.graph.node if n.op_type == "Gemm")
    (tmp_path / "broken.py").write_text(RULE.format(node=node))
    with mock.patch.object(Form, "seconds", lambda self, *_: -float(len(self.study.model.graph.node))):
        made = rewritten(model, request=["u"], extra_rules=[tmp_path / "broken.py"])
    assert [s.op for s in made.plan.written_out] == ["FusedGemm"]
    found = verify(model, made.model, Options(level="quick", bisect=True, rules=[tmp_path / "broken.py"]))
    assert not found.passed and found.culprit is not None
    assert (found.culprit.rule, found.culprit.node) == ("fc", node)


def test_optimize_refuses_a_broken_rule(tmp_path: Path) -> None:
    """The same engine checks what `optimize` makes; nothing is written."""
    (tmp_path / "broken.py").write_text(RULE.format(node="/experts.1/experts.1.0/Gemm"))
    path, out = FOLDER / "mmoe.torchscript.onnx", tmp_path / "out.onnx"
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0), pytest.raises(CheckFailed, match="algebra") as e:
        onnxrank.optimize(path, request=["user_*"], extra_rules=[tmp_path / "broken.py"], strict=True).save(out)
    assert e.value.report is not None and not all(c.passed for c in e.value.report.checks)
    assert {c.candidates for c in e.value.report.checks} == {0, 1, 2, 17, 512} and not out.exists()


def test_rules_that_are_right(tmp_path: Path) -> None:
    """A model that was edited after it was written: no rule is to blame, the tensor is named."""
    path = FOLDER / "mmoe.torchscript.onnx"
    made = rewritten(path, request=["user_*"]).model
    softmax = [n for n in made.graph.node if n.op_type == "Softmax"][1]
    softmax.attribute[0].i = 0
    found = verify(path, made, Options(level="quick", bisect=True))
    assert found.culprit is not None and found.culprit.rule is None
    assert found.culprit.tensor == softmax.output[0] and "edited since" in found.culprit.message


def test_passing_writes_nothing(tmp_path: Path) -> None:
    path = FOLDER / "mmoe.torchscript.onnx"
    made = rewritten(path, request=["user_*"]).model
    found = verify(path, made, Options(level="quick", bisect=True, save_failing=tmp_path / "out"))
    assert found.passed and found.culprit is None and found.saved is None and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "what",
    [
        "an error for N = 0 only",
        "swapped outputs",
        "hidden layer in 16 bits",
        "wrong for an empty history",
        *(
            pytest.param(what, marks=pytest.mark.slow)
            for what in ("GRU gates permuted", "Tile for repeat-interleave", "cancellation")
        ),
    ],
)
def test_saved_case_fails_alone(tmp_path: Path, what: str) -> None:
    """The script needs nothing of onnxrank and shows the difference."""
    mutant = next(m for m in MUTANTS if m.what == what)
    made = mutant.pair()
    options = Options(roles=made.roles, save_failing=tmp_path / "out", candidates=(0, 1, 2, 17), seeds=1)
    found = verify(made.original, made.optimized, options)
    assert found.saved == str(tmp_path / "out")
    done = repro(tmp_path / "out")
    assert done.returncode == 1 and "the models differ" in done.stdout, done.stdout + done.stderr
    for name in ("original", "optimized"):
        assert np.load(tmp_path / "out" / f"{name}.npz").files is not None
