"""Models for several requests, held against requests one after the other by nothing of what is tested."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from onnxrank import batches
from scripts import several_requests

MODELS = Path(__file__).resolve().parents[2] / "models" / "onnx"


def test_right_and_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("two_tower.torchscript.onnx", "two_tower.roles.yaml"):
        shutil.copy(MODELS / name, tmp_path)
    assert several_requests.main([str(tmp_path), "--forms", "lengths", "--pack-inputs"]) == 0
    assert "1 models, 0 wrong" in capsys.readouterr().out
    parted = batches.parted
    monkeypatch.setattr(batches, "parted", lambda *given: parted(*given)[::-1])
    assert several_requests.main([str(tmp_path), "--forms", "padded"]) == 1
    assert "1 models, 1 wrong" in capsys.readouterr().out


def test_distance() -> None:
    ones, scale = {"score": np.ones((2, 1), np.float32)}, {"score": 1.0}
    assert several_requests._distance(ones, ones, scale) == 0
    assert several_requests._distance(ones, {"score": 1.5 * ones["score"]}, scale) == 0.5
    assert several_requests._distance(ones, {"score": 1.5 * ones["score"]}, {"score": 4.0}) == 0.125
    assert several_requests._distance(ones, {"score": ones["score"][:1]}, scale) == np.inf
    assert several_requests._distance(ones, {"score": np.nan * ones["score"]}, scale) == np.inf
    assert several_requests._distance({}, {"score": ones["score"]}, scale) == 0
