"""Files that appear whole or not at all: models, and what is written beside them."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from onnx import ModelProto

from onnxrank.errors import EnvironmentProblem, UsageError
from onnxrank.model.external import locations_of
from onnxrank.model.protos import serialise
from onnxrank.model.reading import BAD_PATH, NO_RIGHT, LoadedModel

_CHUNK = 1 << 20

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def save(proto: ModelProto, loaded: LoadedModel, out: str | os.PathLike[str]) -> None:
    """Writes a model made from a loaded one; the file appears whole or not at all.

    External data stays where it is if the output goes to the same folder, and is copied next to the output otherwise.

    Args:
        proto: The model.
        loaded: What it was made from; `out` may be its own path.
        out: The file; a link is followed.

    Raises:
        ModelError: The model is too large for one file.
        UsageError: The folder is missing, there is no right to write, or another file is in the way.
        EnvironmentProblem: There is no space, or no memory.
    """
    target = check_output(out, loaded)
    try:
        data = serialise(proto)
    except MemoryError as e:
        raise EnvironmentProblem("There is not enough memory to write the model.") from e

    def write(file: BinaryIO) -> None:
        file.write(data)

    replace_files({**_copies(locations_of(proto), loaded, target), target: write})


def save_unchanged(loaded: LoadedModel, out: str | os.PathLike[str]) -> None:
    """Writes the loaded model's own bytes; does nothing where `out` is its own file.

    Args:
        loaded: The model.
        out: The file; a link is followed.

    Raises:
        UsageError: The folder is missing, there is no right to write, or another file is in the way.
        EnvironmentProblem: There is no space.
    """
    if loaded.path is None:
        save(loaded.proto, loaded, out)
        return
    target = check_output(out, loaded)
    if target.exists() and target.samefile(loaded.path):
        return
    replace_files({**_copies(loaded.external, loaded, target), target: functools.partial(_copy, loaded.path)})


def check_output(out: str | os.PathLike[str], loaded: LoadedModel | None = None) -> Path:
    """Finds out before any work whether a file can be written.

    Args:
        out: The file.
        loaded: The model it is made from, whose external data it must not replace.

    Returns:
        The file itself, links followed.

    Raises:
        UsageError: It is a folder or device, its folder is missing, or there is no right to write.
    """
    target = Path(os.path.realpath(out))
    try:
        _check_place(os.fspath(out), target)
    except OSError as e:
        raise _write_error(e, target) from e
    if loaded is not None and loaded.folder is not None:
        for location in loaded.external:
            source = loaded.folder / location
            if target.parent / location == target or (target.exists() and source.exists() and target.samefile(source)):
                raise UsageError(f"{out} would take the place of the external data {location!r}. Choose another name.")
    return target


def _check_place(out: str, target: Path) -> None:
    folder = target.parent
    if target.is_dir():
        raise UsageError(f"{target} is a folder; name a file to write.")
    if not folder.is_dir():
        raise UsageError(f"{out} cannot be written: the folder {folder} does not exist. Create it first.")
    if target.exists() and not target.is_file():
        raise UsageError(f"{out} is not a regular file, so it cannot be replaced.")
    if not os.access(folder, os.W_OK | os.X_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise UsageError(f"There is no right to write {out}.")


def _copies(locations: tuple[str, ...], loaded: LoadedModel, target: Path) -> dict[Path, Callable[[BinaryIO], None]]:
    """Writers of the external files that are not next to the target yet."""
    if loaded.folder is None or (locations and target.parent.samefile(loaded.folder)):
        return {}
    copies: dict[Path, Callable[[BinaryIO], None]] = {}
    for location in locations:
        source, goal = loaded.folder / location, target.parent / location
        if not goal.exists():
            copies[goal] = functools.partial(_copy, source)
        elif not _same_content(source, goal):
            raise UsageError(
                f"{goal} is there already and differs from the model's external data {source}. Move it away, or choose "
                "another folder."
            )
    return copies


def _copy(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as data:
        shutil.copyfileobj(data, file, _CHUNK)


def _same_content(a: Path, b: Path) -> bool:
    if a.samefile(b):
        return True
    if not b.is_file() or a.stat().st_size != b.stat().st_size:
        return False
    with open(a, "rb") as one, open(b, "rb") as other:
        return all(x == other.read(_CHUNK) for x in iter(lambda: one.read(_CHUNK), b""))


def replace_files(writers: Mapping[Path, Callable[[BinaryIO], None]]) -> None:
    """Writes files so that all of them appear whole, the last one last, or none.

    Args:
        writers: What writes the content of each file. All but the last must be files that do not exist yet.

    Raises:
        UsageError: A path cannot be written.
        EnvironmentProblem: There is no space, or the disk fails.
    """
    temporary: dict[Path, Path] = {}
    undo = contextlib.ExitStack()  # on failure: what was made, in reverse
    target = Path()
    with undo:
        try:
            for target, write in writers.items():
                for folder in reversed([f for f in target.parents if not f.exists()]):
                    undo.callback(_quietly, folder.rmdir)
                    folder.mkdir()
                temp = temporary[target] = target.parent / f".onnxrank-{secrets.token_hex(8)}.tmp"
                undo.callback(_quietly, temp.unlink)
                with open(temp, "xb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                if target.exists():
                    shutil.copymode(target, temp)
            for target, temp in temporary.items():
                if not target.exists():
                    undo.callback(_quietly, target.unlink)
                os.replace(temp, target)
        except OSError as e:
            raise _write_error(e, target, hidden=temporary.get(target)) from e
        undo.pop_all()


def _quietly(step: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        step()


def _write_error(e: OSError, target: Path, hidden: Path | None = None) -> UsageError | EnvironmentProblem:
    """What went wrong with a target; the name of its temporary file (`hidden`) would only confuse."""
    where = "" if e.filename is None or str(e.filename) in (str(hidden), str(target)) else f" ({e.filename})"
    detail = f"{e.strerror or e}{where}"
    if e.errno in _NO_SPACE:
        return EnvironmentProblem(f"There is no space to write {target}: {detail}. Nothing was written.")
    if e.errno in NO_RIGHT:
        return UsageError(f"There is no right to write {target}: {detail}.")
    if e.errno in BAD_PATH:
        return UsageError(f"{target} cannot be written: {detail}.")
    return EnvironmentProblem(f"{target} cannot be written: {detail}. Nothing was written.")
