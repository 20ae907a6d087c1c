"""External data held against the files there are."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import onnx
import pytest
from filekit import COLUMNS, ROWS, external, fails, refer, tiny
from onnx import TensorProto

from onnxrank.errors import ModelError, UsageError
from onnxrank.model import load


def test_external(tmp_path: Path) -> None:
    loaded = load(external(tmp_path, "weights/w.bin", offset=0, length=ROWS * COLUMNS * 4))
    assert loaded.external == (os.path.join("weights", "w.bin"),)
    assert loaded.proto.graph.initializer[0].data_location == TensorProto.EXTERNAL
    assert not loaded.proto.graph.initializer[0].raw_data


def test_external_is_not_read(tmp_path: Path) -> None:
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].dims[0] = 200_000_000
    path.write_bytes(proto.SerializeToString())
    os.truncate(tmp_path / "w.bin", 3_200_000_000)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert load(path).external == ("w.bin",)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../w.bin", "a/../../w.bin", "C:\\w.bin", "C:w.bin", "\\\\host\\w.bin", "..\\w.bin"]
)
def test_external_outside(tmp_path: Path, location: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(ROWS * COLUMNS * 4))
    path = external(tmp_path / "model")
    proto = tiny()
    refer(proto.graph.initializer[0], location=location)
    path.write_bytes(proto.SerializeToString())
    with fails(tmp_path, ModelError, "outside the model's folder"):
        load(path)


def test_external_link_outside(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model")
    (tmp_path / "model" / "w.bin").rename(tmp_path / "w.bin")
    (tmp_path / "model" / "w.bin").symlink_to(tmp_path / "w.bin")
    with fails(tmp_path, ModelError, "outside the model's folder"):
        load(path)


def test_external_link_inside(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "w.bin").rename(tmp_path / "real.bin")
    (tmp_path / "w.bin").symlink_to("real.bin")
    assert load(path).external == ("w.bin",)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "none.bin"}, r"'none\.bin' of tensor 'w' is missing"),
        ({"location": ""}, "without a location"),
        ({}, "without a location"),
        ({"location": "folder"}, "not a regular file"),
        ({"location": "w.bin", "offset": 4}, "ends at byte 644 of 'w.bin', which has only 640"),
        ({"location": "w.bin", "offset": 600, "length": 41}, "ends at byte 641"),
        ({"location": "w.bin", "length": 641}, "ends at byte 641"),
        ({"location": "w.bin", "offset": -1}, "no number"),
        ({"location": "w.bin", "length": "many"}, "no number"),
    ],
)
def test_external_damaged(tmp_path: Path, entries: dict[str, object], words: str) -> None:
    path = external(tmp_path)
    (tmp_path / "folder").mkdir()
    proto = tiny()
    refer(proto.graph.initializer[0], **entries)
    path.write_bytes(proto.SerializeToString())
    with fails(tmp_path, ModelError, words):
        load(path)


def test_external_of_a_proto(tmp_path: Path) -> None:
    path = external(tmp_path)
    with fails(tmp_path, UsageError, "without its file"):
        load(onnx.load(path, load_external_data=False))
    assert load(onnx.load(path)).external == ()
