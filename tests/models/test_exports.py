"""Every committed export loads and runs on inputs drawn from its roles file. Needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "models" / "onnx"
FILES = sorted(FOLDER.glob("*.onnx"))
ROWS = 3
DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def columns(text: str) -> list[int]:
    """Expands half-open column ranges such as `0:2,5`."""
    found: list[int] = []
    for part in text.split(","):
        first, _, end = part.partition(":")
        found += range(int(first), int(end) if end else int(first) + 1)
    return found


def draw(value: onnxruntime.NodeArg, role: dict, rng: np.random.Generator) -> np.ndarray:
    """Draws one input of `ROWS` candidates of one request."""
    shape = [ROWS, *value.shape[1:]]

    def numbers(low: float, high: float, size: list[int]) -> np.ndarray:
        if isinstance(low, int) and isinstance(high, int):
            return rng.integers(low, high, size)
        return rng.uniform(low, high, size)

    array = np.zeros(shape)
    if "ranges" in role:
        for text, (low, high) in role["ranges"].items():
            index = columns(text)
            array[:, index] = numbers(low, high, [ROWS, len(index)])
    else:
        array[:] = numbers(*role["range"], shape)
    if role.get("level") == "request":
        array[:] = array[:1]
    elif "request" in role:
        index = columns(role["request"])
        array[:, index] = array[:1, index]
    return array.astype(DTYPES[value.type])


def test_all_families_are_there() -> None:
    """Every family is committed, with its roles."""
    names = {path.name.split(".")[0] for path in FILES}
    assert len(names) == 46
    assert {path.name for path in FILES} == {f"{n}.{e}.onnx" for n in names for e in ("torchscript", "dynamo")}
    for name in names:
        assert (FOLDER / f"{name}.roles.yaml").exists()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_export_runs(path: Path) -> None:
    """Results are finite, not saturated, and tell the candidates apart."""
    roles = yaml.safe_load((FOLDER / f"{path.name.split('.')[0]}.roles.yaml").read_text())["inputs"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {value.name: draw(value, roles[value.name], rng) for value in session.get_inputs()}
    assert set(feeds) == set(roles)
    for result in session.run(None, feeds):
        assert result.shape[0] == ROWS
        assert np.isfinite(result).all()
        assert np.ptp(result) > 1e-4


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_export_is_portable(path: Path) -> None:
    """Batch axes are symbolic; nothing external, nothing of the exporting machine."""
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert all(value.type.tensor_type.shape.dim[0].dim_param == "N" for value in model.graph.input)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    content = path.read_bytes()
    assert b'File "' not in content
    assert b"site-packages" not in content
