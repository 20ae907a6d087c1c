"""Reading models: every named error, and no file left behind by any of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from filekit import external, fails, tiny
from onnx import ModelProto

from onnxrank.errors import EnvironmentProblem, ModelError, OnnxrankError, UsageError
from onnxrank.model import load


def test_load_file(path: Path) -> None:
    import hashlib

    data = path.read_bytes()
    loaded = load(str(path))
    assert loaded.proto == tiny()
    assert (loaded.path, loaded.folder) == (path, path.parent.resolve())
    assert (loaded.sha256, loaded.size, loaded.external) == (hashlib.sha256(data).hexdigest(), len(data), ())


def test_load_proto() -> None:
    proto = tiny()
    loaded = load(proto)
    assert loaded.proto is proto
    assert (loaded.path, loaded.folder, loaded.external) == (None, None, ())
    assert loaded.size == len(proto.SerializeToString())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"ir_version: 8\ngraph { name: 'g' }\n", "looks like text"),
        (b"<!DOCTYPE html><html>404</html>", "looks like a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"\x1c\0\0\0TFL3" + bytes(40), "TensorFlow Lite"),
        (b"\x1c\0\0\0ORTM" + bytes(40), "onnxruntime's own format"),
        (b'\x40\0\0\0\0\0\0\0{"w":{"dtype":"F32"}}' + bytes(40), "safetensors"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
        (b"GGUF\3\0\0\0" + bytes(40), "GGUF"),
        (b"\x93NUMPY\1\0v\0{'descr'", "NumPy"),
        (b"\x80\x04\x95\0\0", "pickle"),
        (b"\x1f\x8b\x08\0" + bytes(20), "gzip"),
        (b"\xff" * 100, "is not an ONNX model"),
        (b"\x08\x08", "holds no graph"),
    ],
)
def test_not_onnx(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "m.onnx"
    file.write_bytes(content)
    with fails(tmp_path, ModelError, words):
        load(file)


def test_truncated_anywhere(path: Path) -> None:
    data = path.read_bytes()
    # The import of the opset is the last field: without it the rest is whole, and says so differently.
    whole = len(data) - len(b"\x42\x04\x0a\x00\x10\x11")
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        word = "does not say its opset" if size == whole else "holds no graph" if data[:size] == b"\x08\x08" else None
        if size == 1 or word is None:
            word = "truncated|is not an ONNX model"
        with pytest.raises(ModelError, match=word):
            load(path)
    path.write_bytes(data[: len(data) // 2])
    with fails(path.parent, ModelError, rf"truncated: at least {whole - len(data) // 2} bytes are missing"):
        load(path)


def test_missing_and_folder(tmp_path: Path, path: Path) -> None:
    with fails(tmp_path, ModelError, "does not exist"):
        load(tmp_path / "none.onnx")
    with fails(tmp_path, ModelError, r"is a folder.*m\.onnx"):
        load(tmp_path)
    with fails(tmp_path, ModelError, "no file that can be read"):
        load(tmp_path / ("n" * 300))


def test_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with fails(tmp_path, ModelError, "not a regular file"):
        load(tmp_path / "pipe")


def test_larger_than_a_message(tmp_path: Path) -> None:
    with open(tmp_path / "m.onnx", "wb") as file:
        file.truncate(1 << 31)  # sparse
    with pytest.raises(ModelError, match="2 GiB"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), UsageError, "no right to read"),
        (OSError(errno.EIO, "Input/output error"), EnvironmentProblem, "cannot be read"),
        (MemoryError(), EnvironmentProblem, "not enough memory"),
    ],
)
def test_unreadable(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[OnnxrankError], words: str
) -> None:
    def read(self: Path) -> bytes:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        with pytest.raises(kind, match=words):
            load(path)


def versions(change: Callable[[ModelProto], None]) -> ModelProto:
    proto = tiny()
    change(proto)
    return proto


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.ClearField("opset_import"), "does not say its opset"),
        (lambda m: setattr(m.opset_import[0], "domain", "com.microsoft"), "does not say its opset"),
        (lambda m: setattr(m.opset_import[0], "version", 10), r"opset 10; at least 11.*convert_version"),
        (lambda m: setattr(m.opset_import[0], "version", 9999), "opset 9999.*update onnx"),
        (lambda m: setattr(m, "ir_version", 9999), "IR version 9999.*update onnx"),
        (lambda m: m.ClearField("graph"), "holds no graph"),
    ],
)
def test_versions(tmp_path: Path, as_file: bool, change: Callable[[ModelProto], None], words: str) -> None:
    proto = versions(change)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with fails(tmp_path, ModelError, words):
        load(tmp_path / "m.onnx" if as_file else proto)


@pytest.mark.parametrize("opset", [11, onnx.defs.onnx_opset_version()])
def test_versions_at_the_edge(opset: int) -> None:
    assert load(tiny(opset)).proto.opset_import[0].version == opset


def test_model_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    external(tmp_path / "store")
    (tmp_path / "m.onnx").symlink_to("store/m.onnx")
    assert load(tmp_path / "m.onnx").folder == (tmp_path / "store").resolve()


def test_external_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with fails(tmp_path, UsageError, "no right to read"):
        load(path)
