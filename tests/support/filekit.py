"""Small models in files, with external data, and what must not change when something fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxrank.errors import OnnxrankError

ROWS, COLUMNS = 40, 4


def tiny(opset: int = 17) -> ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", ROWS])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", COLUMNS])
    w = numpy_helper.from_array(np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "tiny", [x], [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def refer(tensor: TensorProto, **entries: object) -> None:
    """Makes a tensor refer to external data."""
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)


def external(folder: Path, location: str = "w.bin", **entries: object) -> Path:
    """Writes a model whose weight lies in a file."""
    proto = tiny()
    data = folder / location
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_bytes(proto.graph.initializer[0].raw_data)
    refer(proto.graph.initializer[0], location=location, **entries)
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@contextlib.contextmanager
def fails(folder: Path, kind: type[OnnxrankError], words: str) -> Iterator[None]:
    """The block must raise the error by name and change nothing in the folder."""
    before = tree(folder)
    with pytest.raises(kind, match=words) as caught:
        yield
    assert type(caught.value) is kind
    assert tree(folder) == before
