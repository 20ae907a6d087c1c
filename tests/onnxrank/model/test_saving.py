"""Files written whole or not at all: every named error, and no temporary file left behind by any of them."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from filekit import COLUMNS, ROWS, external, fails, tiny, tree
from onnx import ModelProto, numpy_helper

from onnxrank import model
from onnxrank.errors import EnvironmentProblem, ModelError, UsageError
from onnxrank.model import check_output, load, protos, save, save_unchanged, saving


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
