"""A folder that appears whole or not at all, and takes the place of one that `split` wrote before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from onnxrank import ranker
from onnxrank.errors import EnvironmentProblem, UsageError
from onnxrank.model import LoadedModel

_LEFT_BY_PYTHON = "__pycache__"


def check(out: str | os.PathLike[str], source: Path | None = None) -> Path:
    """Finds out before any work whether a folder can be written, or replaced.

    Args:
        out: The folder.
        source: The model's file, which must not go with it.

    Returns:
        The folder itself, links followed.

    Raises:
        UsageError: It cannot.
    """
    place = Path(os.path.realpath(out))
    try:
        if place.exists() and not place.is_dir():
            raise UsageError(f"{out} is a file; name a folder to write.")
        if not place.parent.is_dir():
            raise UsageError(f"{out} cannot be written: the folder {place.parent} does not exist. Create it first.")
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise UsageError(f"There is no right to write {out}.")
        if source is not None and Path(os.path.realpath(source)).is_relative_to(place):
            raise UsageError(f"{out} holds the model itself; name another folder.")
        _check_content(out, place)
    except OSError as e:
        raise UsageError(f"{out} cannot be written: {e.strerror}.") from e
    return place


def _check_content(out: str | os.PathLike[str], place: Path) -> None:
    """Refuses to replace what is not, as a whole and unchanged, of an earlier run."""
    there = sorted(p.relative_to(place) for p in place.rglob("*") if not p.is_dir() or p.is_symlink())
    if not there:
        return
    try:
        known = dict(json.loads((place / ranker.CONTRACT_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"{out} is there already, and no result of onnxrank split. Choose another folder.") from None
    for file in there:
        name = file.as_posix()
        if name == ranker.CONTRACT_FILE or _LEFT_BY_PYTHON in file.parts:
            continue
        if name not in known:
            raise UsageError(f"{out} holds {name}, which onnxrank split did not write. Move it away first.")
        if known[name] != digest(place / file):
            raise UsageError(
                f"{out} holds {name}, which was changed since onnxrank split wrote it. Move it away first."
            )


def digest(file: Path) -> str:
    """Hash of a file's bytes."""
    with open(file, "rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


@contextlib.contextmanager
def staged(place: Path | None) -> Iterator[Path]:
    """A new folder, which goes again; beside the one that it will become, if any.

    Raises:
        UsageError: It cannot be made there.
        EnvironmentProblem: There is no space.
    """
    try:
        if place is None:
            stage = Path(tempfile.mkdtemp(prefix="onnxrank-"))
        else:
            stage = place.parent / f".onnxrank-{secrets.token_hex(8)}.tmp"
            stage.mkdir()
        try:
            yield stage
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as e:
        raise EnvironmentProblem(f"The models cannot be written: {e.strerror or e}. Nothing was written.") from e


def put(stage: Path, files: Mapping[str, bytes]) -> None:
    """Writes files, and the folders that they lie in."""
    for name, data in files.items():
        target = stage / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def share(stage: Path, folder: str, locations: list[str], loaded: LoadedModel) -> list[str]:
    """Puts external data beside a model: as a second name of the same file, as a copy only where that cannot be.

    Args:
        stage: Where everything is written.
        folder: Where the model lies in there.
        locations: Files that it reads, relative to it.
        loaded: The model that they belong to.

    Returns:
        Files that were put there, relative to `stage`.
    """
    made = []
    for location in locations:
        assert loaded.folder is not None
        source, target = Path(os.path.realpath(loaded.folder / location)), stage / folder / location
        made.append(target.relative_to(stage).as_posix())
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, target)
    return made


def take_place(stage: Path, place: Path) -> None:
    """Puts a folder where another may be, which goes then.

    Raises:
        OSError: That cannot be; everything is as it was.
    """
    if not place.exists():
        stage.rename(place)
        return
    old = place.parent / f".onnxrank-{secrets.token_hex(8)}.old"
    place.rename(old)
    try:
        stage.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
