"""The worked examples of CONTRIBUTING.md: a rule written from scratch, an operator, and their tests."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest
import textform
from modelkit import compare
from onnx import TensorProto, helper
from onnxrank.rules import movement

import onnxrank
from onnxrank import cli, operators
from onnxrank.errors import UsageError
from onnxrank.ruleset import choose_rules
from onnxrank.values import Level

TOWER = """\
(float[N,4] user, float[N,3,4] item) => (float[N,3,4] y)
<int32 axis = {1}, float[4,4] W> {
  h = MatMul(user, W)
  r = Relu(h)
  u = com.microsoft.ExpandDims(r, axis)
  y = Mul(u, item)
}"""

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


@pytest.mark.slow
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


# --- rules that others wrote ---------------------------------------------------------------------------------------


def offered(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An installed package offers rules."""
    points = [metadata.EntryPoint("mine", value, "onnxrank.rules")]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "onnxrank.rules" else [])


def test_a_package_offers_the_rule(rule: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the document says it of entry points: without `--rules` it is there, and first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    offered(monkeypatch, "my_rule:RULES")
    assert choose_rules(None, (), ())[0].name == "linear_regressor"
    assert "linear_regressor" not in {r.name for r in choose_rules(None, ["linear_regressor"], ())}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("nowhere_rules:RULES", "fails: ModuleNotFoundError: No module named 'nowhere_rules'"),
        ("my_rule:NAME", "must name a sequence of onnxrank.Rule, and is 'my_rule:NAME'"),
        ("my_rule:GONE", "fails: AttributeError: module 'my_rule' has no attribute 'GONE'"),
    ],
)
def test_a_package_whose_rules_cannot_be_used(
    rule: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, text: str
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    offered(monkeypatch, value)
    with pytest.raises(UsageError, match=re.escape(text)) as e:
        choose_rules(None, (), ())
    assert "the entry point 'mine' of" in str(e.value)


HEAD = "import onnxrank\nRULES = []\n"


@pytest.mark.parametrize(
    "text",
    [
        "from onnxrank.study import label, gone",
        "from onnxrank.pipeline import verify_pair",
        "from onnxrank.render import parse_target",
        "import onnxrank.verify.worker",
        "onnxrank.values.settle",
        "onnxrank.Rule(name='mine', title='', transfer=None)",
    ],
)
def test_a_rule_for_an_earlier_version(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that are gone: exit code 2, the file, the name, and where the new names stand."""
    (tmp_path / "old.py").write_text(HEAD + text)
    onnx.save(textform.parse(TOWER), tmp_path / "in.onnx")
    model, rules = str(tmp_path / "in.onnx"), str(tmp_path / "old.py")
    assert cli.main(["optimize", model, "--dry-run", "--request", "user", "--rules", rules]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "old.py" in said.replace(" ", "") and "CHANGELOG.md lists the names that have changed" in said
    assert "Traceback" not in said


def test_an_error_of_the_file_itself_is_no_matter_of_versions(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("1 / 0")
    with pytest.raises(UsageError, match=r"fails: ZeroDivisionError: division by zero$"):
        choose_rules(None, (), [tmp_path / "wrong.py"])


# --- an operator ---------------------------------------------------------------------------------------------------


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The document's entry in the registry, and what rules read off it when they are loaded."""
    space = {**vars(operators.movements), "OPERATORS": {}}
    exec(block("operator") + block("entry"), space)
    made = space["OPERATORS"]
    assert made.keys() == {"com.microsoft::ExpandDims"} and not made.keys() & operators.REGISTRY.keys()
    for key, entry in made.items():
        monkeypatch.setitem(operators.REGISTRY, key, entry)
    for name in set(operators.having(operators.Trait.MOVEMENT)) - movement.RULE.operators.keys():
        monkeypatch.setitem(movement.RULE.operators, name, movement.moved)  # type: ignore[arg-type]


def test_the_operator_is_opaque_before() -> None:
    reasons = [r.reason for r in textform.rewritten(textform.parse(TOWER)).report.refusals]
    assert any("ExpandDims is not an operator whose shapes onnxrank knows" in r for r in reasons)


@pytest.mark.usefixtures("entered")
def test_its_test_passes() -> None:
    space = runpy.run_path(str(DOCUMENT.parent / "tests" / "onnxrank" / "test_shapes.py"))
    exec(block("operator test"), space)
    space["test_expand_dims"]()


@pytest.mark.usefixtures("entered")
def test_the_operator_is_followed() -> None:
    model = textform.parse(TOWER)
    result = textform.rewritten(model)
    assert not result.report.refusals
    (line,) = (x for x in textform.text_of(result.model, (), once=True).splitlines() if "ExpandDims" in x)
    assert line.endswith("# once")
    analysis = onnxrank.analyse(model, request=["user"])
    assert not analysis.opaque and analysis.levels("u").tolist() == [[[Level.REQUEST] * 4]]
    compare(model, result, sizes=(1, 3, 101))
