"""Loading and saving: every named error, and no file or temporary file left behind by any of them."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxrank import model
from onnxrank.errors import EnvironmentProblem, ModelError, OnnxrankError, UsageError
from onnxrank.model import check_output, load, protos, save, save_unchanged, saving, tensors

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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "m.onnx"
    file.write_bytes(tiny().SerializeToString())
    return file


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


# --- loading -------------------------------------------------------------------------------------------------


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


# --- external data -------------------------------------------------------------------------------------------


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


def test_model_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    external(tmp_path / "store")
    (tmp_path / "m.onnx").symlink_to("store/m.onnx")
    assert load(tmp_path / "m.onnx").folder == (tmp_path / "store").resolve()


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


def test_external_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = external(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with fails(tmp_path, UsageError, "no right to read"):
        load(path)


def test_external_of_a_proto(tmp_path: Path) -> None:
    path = external(tmp_path)
    with fails(tmp_path, UsageError, "without its file"):
        load(onnx.load(path, load_external_data=False))
    assert load(onnx.load(path)).external == ()


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


# --- saving --------------------------------------------------------------------------------------------------


def renamed(loaded: model.LoadedModel) -> ModelProto:
    proto = ModelProto()
    proto.CopyFrom(loaded.proto)
    proto.producer_name = "changed"
    return proto


def writers(loaded: model.LoadedModel) -> list[Callable[[Path], None]]:
    return [lambda out: save(renamed(loaded), loaded, out), lambda out: save_unchanged(loaded, out)]


def test_save(tmp_path: Path, path: Path) -> None:
    loaded = load(path)
    before = path.read_bytes()
    proto = renamed(loaded)
    save(proto, loaded, tmp_path / "out.onnx")
    save(proto, loaded, str(tmp_path / "again.onnx"))
    assert onnx.load(tmp_path / "out.onnx") == proto
    assert tree(tmp_path) == dict.fromkeys(["again.onnx", "out.onnx"], proto.SerializeToString()) | {"m.onnx": before}
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out.onnx").stat().st_mode) == 0o666 & ~umask


def test_save_relative(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    loaded = load("m.onnx")
    save(renamed(loaded), loaded, "m.onnx")
    assert load("m.onnx").proto.producer_name == "changed"


def test_save_over_the_input(path: Path) -> None:
    path.chmod(0o640)
    loaded = load(path)
    save(renamed(loaded), loaded, path)
    assert load(path).proto.producer_name == "changed"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(tree(path.parent)) == ["m.onnx"]


def test_save_through_a_link(tmp_path: Path, path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link = tmp_path / "folder" / "link.onnx"
    link.symlink_to(path)
    loaded = load(link)
    save(renamed(loaded), loaded, link)
    assert link.is_symlink()
    assert load(path).proto.producer_name == "changed"
    assert list(tree(tmp_path)) == ["folder", "folder/link.onnx", "m.onnx"]


def test_save_over_a_hard_link(tmp_path: Path, path: Path) -> None:
    os.link(path, tmp_path / "other.onnx")
    before = path.read_bytes()
    loaded = load(path)
    save(renamed(loaded), loaded, tmp_path / "other.onnx")
    assert path.read_bytes() == before
    assert load(tmp_path / "other.onnx").proto.producer_name == "changed"


def test_save_external_same_folder(tmp_path: Path) -> None:
    loaded = load(external(tmp_path))
    save(renamed(loaded), loaded, tmp_path / "out.onnx")
    assert list(tree(tmp_path)) == ["m.onnx", "out.onnx", "w.bin"]


@pytest.mark.parametrize("how", ["changed", "unchanged"])
def test_save_external_other_folder(tmp_path: Path, how: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    loaded = load(external(tmp_path / "in", "weights/w.bin"))
    # Twice: the second time the data is there already.
    for _ in range(2):
        if how == "changed":
            save(renamed(loaded), loaded, tmp_path / "out" / "m.onnx")
        else:
            save_unchanged(loaded, tmp_path / "out" / "m.onnx")
        assert list(tree(tmp_path / "out")) == ["m.onnx", "weights", "weights/w.bin"]
        assert load(tmp_path / "out" / "m.onnx").external == ("weights/w.bin",)
    np.testing.assert_array_equal(
        numpy_helper.to_array(onnx.load(tmp_path / "out" / "m.onnx").graph.initializer[0]),
        numpy_helper.to_array(tiny().graph.initializer[0]),
    )


def test_save_only_external_in_use(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    loaded = load(external(tmp_path / "in"))
    save(tiny(), loaded, tmp_path / "out" / "m.onnx")
    assert list(tree(tmp_path / "out")) == ["m.onnx"]


@pytest.mark.parametrize("content", [b"other", bytes(ROWS * COLUMNS * 4)])
def test_save_external_in_the_way(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "w.bin").write_bytes(content)
    loaded = load(external(tmp_path / "in"))
    for write in writers(loaded):
        with fails(tmp_path, UsageError, r"w\.bin is there already and differs"):
            write(tmp_path / "out" / "m.onnx")


def test_save_over_the_external_data(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    loaded = load(external(tmp_path / "in"))
    os.link(tmp_path / "in" / "w.bin", tmp_path / "linked.bin")
    for out in (tmp_path / "in" / "w.bin", tmp_path / "out" / "w.bin", tmp_path / "linked.bin"):
        for write in writers(loaded):
            with fails(tmp_path, UsageError, "take the place of the external data"):
                write(out)


def test_save_unchanged(tmp_path: Path, path: Path) -> None:
    # Bytes that no serialiser would write: the fields in another order.
    proto = tiny()
    parts = ModelProto(opset_import=proto.opset_import), ModelProto(graph=proto.graph), ModelProto(ir_version=8)
    path.write_bytes(b"".join(p.SerializeToString() for p in parts))
    loaded = load(path)
    save_unchanged(loaded, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes() != loaded.proto.SerializeToString()
    before = path.stat()
    save_unchanged(loaded, path)
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_save_unchanged_proto(tmp_path: Path) -> None:
    save_unchanged(load(tiny()), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == tiny().SerializeToString()


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("none/out.onnx", "does not exist"),
        ("", "is a folder"),
        ("m.onnx/out.onnx", "does not exist"),
        ("n" * 300, "name too long"),
    ],
)
def test_save_nowhere(tmp_path: Path, path: Path, out: str, words: str) -> None:
    loaded = load(path)
    steps: list[Callable[[Path], object]] = [*writers(loaded), check_output]
    for write in steps:
        with fails(tmp_path, UsageError, f"(?i){words}"):
            write(tmp_path / out)


def test_save_to_a_device(tmp_path: Path, path: Path) -> None:
    # Renaming over it would take the device away from the whole system.
    loaded = load(path)
    with fails(tmp_path, UsageError, "not a regular file"):
        save(renamed(loaded), loaded, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("target", ["folder", "file"])
def test_save_without_right(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    loaded = load(path)
    refused = tmp_path if target == "folder" else path
    monkeypatch.setattr(os, "access", lambda p, *_: Path(p) != refused)
    with fails(tmp_path, UsageError, "no right to write"):
        save(renamed(loaded), loaded, path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root has every right")
def test_save_to_a_read_only_folder(tmp_path: Path, path: Path) -> None:
    loaded = load(path)
    tmp_path.chmod(0o555)
    try:
        with fails(tmp_path, UsageError, "no right to write"):
            save(renamed(loaded), loaded, tmp_path / "out.onnx")
    finally:
        tmp_path.chmod(0o755)


FAILURES: list[tuple[BaseException, type[BaseException], str]] = [
    (OSError(errno.ENOSPC, "No space left on device"), EnvironmentProblem, "no space"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), EnvironmentProblem, "no space"),
    (OSError(errno.EROFS, "Read-only file system"), UsageError, "no right to write"),
    (PermissionError(errno.EACCES, "Permission denied"), UsageError, "no right to write"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory"), UsageError, "cannot be written"),
    (OSError(errno.EIO, "Input/output error"), EnvironmentProblem, "cannot be written"),
    (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    (SystemExit(143), SystemExit, "143"),
]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize(("error", "kind", "words"), FAILURES)
def test_save_fails_midway(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    kind: type[BaseException],
    words: str,
    calls: int,
    step: str,
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "m.onnx").write_bytes(b"precious")
    loaded = load(external(tmp_path / "in", "deep/er/w.bin"))
    before = tree(tmp_path)
    real, left = getattr(os, step), [calls]

    def fail(*args: object) -> object:
        left[0] -= 1
        if not left[0]:
            raise error
        return real(*args)

    monkeypatch.setattr(os, step, fail)
    for write in writers(loaded):
        left[0] = calls
        with pytest.raises(kind, match=words) as caught:
            write(tmp_path / "out" / "m.onnx")
        assert ".tmp" not in str(caught.value)
        assert tree(tmp_path) == before


def test_save_without_space_for_real(tmp_path: Path, path: Path) -> None:
    code = (
        "import resource, sys; from onnxrank.model import load, save; m = load(sys.argv[1]); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); save(m.proto, m, sys.argv[2])"
    )
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(path.with_name("out.onnx"))], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "EnvironmentProblem: There is no space to write" in done.stderr
    assert tree(tmp_path) == before


def test_save_too_large(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(path)
    monkeypatch.setattr(protos, "LIMIT", 100)
    with fails(tmp_path, ModelError, "external data"):
        save(renamed(loaded), loaded, tmp_path / "out.onnx")
    with fails(tmp_path, ModelError, "external data"):
        load(tiny())


def test_save_without_memory(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(path)

    def serialise(proto: ModelProto) -> bytes:
        raise MemoryError

    monkeypatch.setattr(saving, "serialise", serialise)
    with fails(tmp_path, EnvironmentProblem, "not enough memory"):
        save(renamed(loaded), loaded, tmp_path / "out.onnx")
