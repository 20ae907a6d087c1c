"""Models as runtimes, quantisers and converters leave them. `scripts/variants.py` makes all variants of all models."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import variants

FOLDER = Path(__file__).resolve().parents[2] / "models" / "onnx"


@pytest.mark.parametrize("variant", ["ort-extended", "q-qdq", "fp16-blocks", "opset-21"])
def test_one_is_optimised(tmp_path: Path, variant: str) -> None:
    found = variants.outcome(FOLDER / "hadamard_pairs.torchscript.onnx", variant, tmp_path, "quick")
    assert found.what == "optimised" and found.saved > 0.2, found


@pytest.mark.slow
@pytest.mark.parametrize("variant", variants.VARIANTS)
@pytest.mark.parametrize("model", ["din.torchscript", "dlrm.dynamo", "history_transformer.dynamo"])
def test_none_is_wrong(tmp_path: Path, model: str, variant: str) -> None:
    found = variants.outcome(FOLDER / f"{model}.onnx", variant, tmp_path, "quick")
    assert not found.bad, found


def test_the_table() -> None:
    """What is saved is told relative to the plain models that there is the variant of."""
    kept, gone = variants.Outcome("optimised", saved=0.4), variants.Outcome("not made")
    found = {"plain": {"a": kept, "b": kept}, "other": {"a": variants.Outcome("left alone"), "b": gone}}
    _, plain, other = variants.table(found)
    assert plain.split()[1:8] == ["2", "2", "0", "0", "0", "0", "40.0%"] and plain.split()[8] == "100.0%"
    assert other.split()[1:9] == ["1", "0", "1", "0", "0", "0", "0.0%", "0.0%"]
