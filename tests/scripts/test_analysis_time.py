"""The script that holds the analysis against a rewrite."""

from __future__ import annotations

from analysis_time import FOLDER, timed


def test_a_model() -> None:
    found = timed(FOLDER / "pnn.torchscript.onnx", rounds=1)
    assert set(found) == {"analysis", "rewrite", "inspect"} and all(t > 0 for t in found.values())
