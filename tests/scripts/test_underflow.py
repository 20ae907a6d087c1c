"""What bounding scores gains, of a model with a mask and of one without."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import underflow

MODELS = Path(__file__).resolve().parents[2] / "models" / "onnx"


@pytest.mark.slow
def test_gains() -> None:
    found = underflow.gains(MODELS / "history_transformer.torchscript.onnx", 0.01)
    assert found is not None and len(found) == len(underflow.COUNTS)
    assert underflow.gains(MODELS / "dlrm.torchscript.onnx", 0.01) is None


def test_kernels() -> None:
    denormal, bounding = underflow.kernels(0.02)
    assert denormal > -1e-6 and bounding > -1e-6
