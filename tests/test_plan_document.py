"""The excerpts of docs/plan.md are what the tool writes now; `--update-goldens` puts them there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import onnxrank
from onnxrank.plans import Plan

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "plan.md"
MODELS = ROOT / "models" / "onnx"
EXCERPT = re.compile(r"<!-- plan (\S+) ([\d ]+) -->\n```json\n(.*?)```\n<!-- /plan -->", re.DOTALL)


def plan(name: str, **how: Any) -> dict[str, Any]:
    spec = yaml.safe_load((MODELS / f"{name.split('.')[0]}.roles.yaml").read_text())
    found = onnxrank.optimize(MODELS / f"{name}.onnx", spec=spec, check=False, **how).plan
    return dict(json.loads(found.to_json()))


def rounded(value: Any) -> Any:
    """The same with fewer digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value


def shown(value: Any, depth: int = 0) -> str:
    """JSON; what is short on one line."""
    line = json.dumps(value)
    flat = not isinstance(value, (dict, list)) or all(isinstance(v, str) for v in value)
    if len(line) + depth <= 112 or (flat and not isinstance(value, dict)):
        return line
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        inner = (f"{pad}{json.dumps(k)}: {shown(v, depth + 1)}" for k, v in value.items())
    else:
        inner = (pad + shown(v, depth + 1) for v in value)
    ends = "{}" if isinstance(value, dict) else "[]"
    return f"{ends[0]}\n" + ",\n".join(inner) + f"\n{' ' * depth}{ends[1]}"


def excerpt(name: str, indices: set[int]) -> str:
    found = rounded(plan(name))
    return shown(found | {"sites": [s for s in found["sites"] if s["index"] in indices]})


def renewed(mark: re.Match[str]) -> str:
    """An excerpt as it comes out now, between its marks."""
    text = excerpt(mark[1], set(map(int, mark[2].split())))
    return f"<!-- plan {mark[1]} {mark[2]} -->\n```json\n{text}\n```\n<!-- /plan -->"


def test_excerpts_are_current(request: pytest.FixtureRequest) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    made = EXCERPT.sub(renewed, text)
    assert len(EXCERPT.findall(text)) == 2
    if request.config.getoption("--update-goldens"):
        DOCUMENT.write_text(made, encoding="utf-8")
    assert DOCUMENT.read_text(encoding="utf-8") == made


def test_every_key_is_explained() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = plan("mmoe.torchscript")
    keys = {*found, *found["sites"][0], *found["sites"][0]["alternatives"][0], "step"} - {"name"}
    assert not [k for k in keys if f"`{k}`" not in text]


def test_few_candidates_are_another_plan() -> None:
    """What the document says of 32 and of 16."""
    few = plan("hadamard_pairs.torchscript", candidates=32)
    assert [s["chosen"] for s in few["sites"] if s["rule"] == "fold"] == ["leave"]
    assert not plan("hadamard_pairs.torchscript", candidates=16)["changed"]


def test_an_edited_plan() -> None:
    """A site that is set to `leave` is left alone, and the rest is done."""
    found = plan("mmoe.torchscript")
    whole = onnxrank.optimize(MODELS / "mmoe.torchscript.onnx", plan=Plan.from_dict(found), check=False).report
    found["sites"][0]["chosen"] = "leave"
    less = onnxrank.optimize(MODELS / "mmoe.torchscript.onnx", plan=Plan.from_dict(found), check=False).report
    assert whole.macs_after < less.macs_after < less.macs_before


@pytest.mark.slow
def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (tmp_path / "ranker.onnx").write_bytes((MODELS / "mmoe.torchscript.onnx").read_bytes())
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(code, space)
    assert (
        space["again"].model.SerializeToString()
        == onnxrank.optimize("ranker.onnx", request=["user_*"]).model.SerializeToString()
    )
    assert "sites" in capsys.readouterr().out
