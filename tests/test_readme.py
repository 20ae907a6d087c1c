"""What the README and the documents tell people to run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models" / "onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its roles, under the names of the README."""
    shutil.copy(MODELS / "mmoe.torchscript.onnx", tmp_path / "ranker.onnx")
    shutil.copy(MODELS / "mmoe.roles.yaml", tmp_path / "roles.yaml")
    return tmp_path


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "verify.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def shell(command: str, folder: Path) -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env["GITHUB_STEP_SUMMARY"] = str(folder / "summary.md")
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_plain_shell(folder: Path) -> None:
    (command,) = [b for b in blocks("sh") if "onnxrank verify" in b]
    shell(command, folder)
    assert {"ranker.fast.onnx", "verify.json", "verify.xml"} <= set(os.listdir(folder))


@pytest.mark.slow
def test_github_actions(folder: Path) -> None:
    """The steps that are commands, one after the other, but for the installation."""
    (text,) = [b for b in blocks("yaml") if "onnxrank verify" in b]
    steps = yaml.safe_load(text)["jobs"]["verify"]["steps"]
    commands = [s["run"] for s in steps if "run" in s and not s["run"].startswith("pip ")]
    assert len(commands) == 3
    for command in commands:
        shell(command, folder)
    assert "PASSED" in (folder / "summary.md").read_text() and (folder / "verify.sarif").exists()


FROM_THE_CHECKOUT = """
import os, sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import onnxrank
folder, code = sys.argv[1:]
assert os.path.dirname(onnxrank.__file__) == os.path.join(os.getcwd(), "onnxrank")
os.chdir(folder)
exec(code)
"""


def test_python_in_the_checkout(folder: Path) -> None:
    """Without an editable installation: the current folder comes first, and the rules lie beside the package there."""
    (code,) = [b for b in blocks("python") if "onnxrank.optimize(" in b]
    code = code.replace("candidates=[32, 512]", "candidates=[2], seconds=0.01")
    done = subprocess.run(
        [sys.executable, "-c", FROM_THE_CHECKOUT, str(folder), code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "->" in done.stdout and (folder / "ranker.fast.onnx").exists()


@pytest.mark.slow
def test_serving(folder: Path) -> None:
    """The result takes what the README says, and answers with a row per candidate; so does its configuration."""
    shell("onnxrank optimize ranker.onnx ranker.fast.onnx --roles roles.yaml -q", folder)
    (code,) = [b for b in blocks("python") if "onnxruntime.InferenceSession" in b]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint([s.shape for s in scores])"], cwd=folder, capture_output=True, text=True
    )
    inputs, scores = done.stdout.splitlines()
    assert f"# {inputs}" in code and scores == "[(512, 1), (512, 1)]"
    # And the configuration is complete, and fits.
    (text,) = re.findall(
        r"^  ```\n(.*?max_batch_size: 0.*?)^  ```$", (ROOT / "README.md").read_text(), re.DOTALL | re.M
    )
    place = folder / "models" / "ranker"
    (place / "1").mkdir(parents=True)
    shutil.copy(folder / "ranker.fast.onnx", place / "1" / "model.onnx")
    (place / "config.pbtxt").write_text(text)
    shell("onnxrank lint models", folder)


@pytest.mark.slow
def test_several_requests(folder: Path) -> None:
    options = "--roles roles.yaml --interface batch -q"
    shell(f"onnxrank optimize ranker.onnx ranker.batch.onnx {options}", folder)
    (code,) = [b for b in blocks("python") if "request_lengths" in b]
    opened = "import numpy as np, onnxruntime\nsession = onnxruntime.InferenceSession('ranker.batch.onnx')\n"
    code = f"{opened}{code}\nprint([s.shape for s in scores])"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.stdout == "[(36, 1), (36, 1)]\n", done.stderr


def _split(folder: Path, form: str) -> None:
    """Runs the README's commands that divide a model in this format, but for those that need a server."""
    text = (ROOT / "README.md").read_text()
    (block,) = (b for b in re.findall(r"^```\n(onnxrank split .*?)^```$", text, re.DOTALL | re.MULTILINE) if form in b)
    for command in block.splitlines():
        if command.startswith("onnxrank"):
            shell(command, folder)


@pytest.mark.slow
def test_two_models_and_the_module_that_serves_them(folder: Path) -> None:
    _split(folder, "--format python")
    (code,) = [b for b in blocks("python") if "from ranker import Ranker" in b]
    code += "print(sorted((k, v.shape) for k, v in scores.items()), ranker.cache.counters.hits)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("[('task_0', (512, 1)), ('task_1', (512, 1))] ")
    assert "misses=1" in done.stdout


@pytest.mark.slow
def test_a_model_repository(folder: Path) -> None:
    _split(folder, "--format triton")
    assert (folder / "repository" / "ctr" / "config.pbtxt").exists()


@pytest.mark.slow
def test_commands_of_the_serving_document(folder: Path) -> None:
    """Those with names of files, in blocks and in sentences, one after the other, behind the README's first one."""
    text = (ROOT / "docs" / "serve.md").read_text()
    commands = re.findall(r"^    (onnxrank .*)$|`(onnxrank [^`]*)`", text, re.MULTILINE)
    shown = [c for pair in commands for c in pair if "ranker.onnx" in c or "ranker.fast.onnx" in c]
    assert len(shown) == 6
    for command in ["onnxrank optimize ranker.onnx ranker.fast.onnx --roles roles.yaml", *shown]:
        shell(command, folder)


def test_quick_start_is_two_lines_and_its_output() -> None:
    """`.ci/run` takes the second line from here; the output shown is what the first one prints."""
    text = (ROOT / "README.md").read_text()
    first, second = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[:2]
    assert first.count("\n") == second.count("\n") == 1 and "pytest" in second
    assert text.index(first) < text.index(second) < text.index("```\nlevel")
    command = first.split("&&")[1].strip()
    done = subprocess.run(
        ["bash", "-c", command.replace(" mmoe.onnx", " --dry-run")],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONUTF8": "1",
            "ONNXRANK_TUNE": "2",
        },
        capture_output=True,
        text=True,
    )
    shown = re.search(r"^```\n(level.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert shown and done.returncode == 0

    def exact(printed: str) -> list[str]:
        """Lines without what differs between machines: distances and predicted times, and where it went."""
        lines = [line.strip() for line in printed.splitlines()]
        return [re.sub(r"at most .* off", "", x) for x in lines if x and "×" not in x and "ritten" not in x]

    assert exact(shown[1]) == exact(done.stdout)[2:]
