"""The campaign's steps, on the CPU: the same code as on a GPU, and a file that it goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
from scripts import gpu_campaign


@pytest.mark.slow
def test_all_steps_once_and_not_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "campaign.json"
    given = ["--ep", "cpu", "--quick", "--seconds", "0.1", "--out", str(out)]
    assert gpu_campaign.main(given) == 0
    found = json.loads(out.read_text())
    assert found["machine"]["provider"] == "cpu"
    assert {k.split()[0] for k in found} == {"machine", "verify", "times", "padded"}
    assert not [k for k, v in found.items() if "error" in v]
    assert "| deepfm | float32 | plain |" in capsys.readouterr().out
    found["machine"]["seconds"] = -1
    out.write_text(json.dumps(found))
    assert gpu_campaign.main(given) == 0
    assert json.loads(out.read_text()) == found, "what is done is not done again"


def test_a_file_of_another_provider_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "campaign.json"
    out.write_text(json.dumps({"machine": {"provider": "cuda"}}))
    with pytest.raises(SystemExit, match="another file"):
        gpu_campaign.main(["--ep", "cpu", "--out", str(out)])


@pytest.mark.slow
def test_a_gpu_that_is_not_there_ends_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="not there"):
        gpu_campaign.main(["--ep", "cuda", "--out", str(tmp_path / "campaign.json")])


def test_a_step_that_fails_is_done_again(tmp_path: Path) -> None:
    made = gpu_campaign.Campaign(tmp_path / "c.json", "cpu", float("inf"), 0.1, True, tmp_path)
    made.step("one", lambda: 1 / 0)
    assert "ZeroDivisionError" in made.found["one"]["error"]
    made.step("one", lambda: {"passed": True})
    assert made.found["one"]["passed"]
    late = gpu_campaign.Campaign(tmp_path / "c.json", "cpu", 0.0, 0.1, True, tmp_path)
    late.step("two", lambda: {})
    assert "two" not in late.found
