"""The normal form of models."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
from filekit import COLUMNS, ROWS, external, fails, refer, tiny
from onnx import TensorProto, helper, numpy_helper

from onnxrank.errors import ModelError
from onnxrank.model import load, tensors


def test_narrow_types_are_packed(tmp_path: Path) -> None:
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].data_type = TensorProto.INT4
    path.write_bytes(proto.SerializeToString())
    os.truncate(tmp_path / "w.bin", ROWS * COLUMNS // 2)
    assert load(path).external == ("w.bin",)
    os.truncate(tmp_path / "w.bin", ROWS * COLUMNS // 2 - 1)
    with fails(tmp_path, ModelError, "ends at byte 80"):
        load(path)


def test_tensors_everywhere(tmp_path: Path) -> None:
    def tensor(name: str) -> TensorProto:
        return numpy_helper.from_array(np.ones(2, np.float32), name)

    def constant(name: str) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=tensor(name))

    proto = tiny()
    inner = helper.make_graph([constant("deep")], "inner", [], [], [tensor("inner")])
    branch = helper.make_graph([helper.make_node("If", ["c"], ["d"], then_branch=inner)], "branch", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=branch))
    many = helper.make_node("Custom", [], ["e"], domain="d", all=[tensor("list")], bodies=[branch])
    proto.graph.node.append(many)
    sparse = helper.make_sparse_tensor(tensor("values"), numpy_helper.from_array(np.arange(2), "indices"), [4])
    proto.graph.sparse_initializer.append(sparse)
    proto.graph.node.append(helper.make_node("Constant", [], ["s"], sparse_value=sparse))
    proto.functions.append(
        helper.make_function("f", "F", [], ["out"], [constant("function")], [helper.make_opsetid("", 17)])
    )
    found = sorted(t.name for t in tensors(proto))
    assert found == ["deep"] * 2 + ["function"] + ["indices"] * 2 + ["inner"] * 2 + ["list"] + ["values"] * 2 + ["w"]
    for k, t in enumerate(tensors(proto)):
        refer(t, location=f"{k:02}.bin")
        (tmp_path / f"{k:02}.bin").write_bytes(bytes(1000))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert load(tmp_path / "m.onnx").external == tuple(f"{k:02}.bin" for k in range(len(found)))
