"""The documents speak of what is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
MODULES = [p.relative_to(ROOT).as_posix() for p in (ROOT / "onnxrank").rglob("*.py") if p.name != "__init__.py"]
SCRIPTS = [p.relative_to(ROOT).as_posix() for f in ("rules", "scripts", "tests") for p in (ROOT / f).rglob("*.py")]

WRITTEN = {"my_rule.py", "repro.py"}
"""Files that a user writes, or that onnxrank writes for one."""


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", read(path)):
        assert (path.parent / target).exists(), target


def files_named(name: str) -> list[str]:
    """The files of Python that a document may mean by a name."""
    return [m for m in (*MODULES, *SCRIPTS) if f"/{m}".endswith(f"/{name}")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_that_are_named_exist(path: Path) -> None:
    """In `code` and in commands; other people's files are named where they are written."""
    text = read(path)
    named = set(re.findall(r"`([\w./]+\.py)(?:: [^`]*)?`", text)) | set(re.findall(r"python ([\w./]+\.py)", text))
    assert not {n for n in named - WRITTEN if not files_named(n)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_names_in_files_exist(path: Path) -> None:
    """`flow.py: Walk` is in that file."""
    for name, what in re.findall(r"`([\w./]+\.py): ([\w., ]+)`", read(path)):
        found = [read(ROOT / f) for f in files_named(name)]
        for word in re.findall(r"\w+", what):
            assert any(re.search(rf"^\s*(?:def |class |async def )?{word}\b", text, re.MULTILINE) for text in found), (
                name,
                word,
            )


def test_entries_of_the_map_exist() -> None:
    """The functions and classes of its first table are in the files of their row."""
    rows = re.findall(r"^\| [\w ]+ \| (`.*?) \| (`.*?) \| ", read(ROOT / "ARCHITECTURE.md"), re.MULTILINE)
    assert len(rows) > 10
    for places, entries in rows:
        files = [f for p in re.findall(r"`([\w./]+)`", places) for f in (*files_named(p), *MODULES) if p in f]
        texts = [read(ROOT / f) for f in files]
        for entry in re.findall(r"`([\w.]+)`", entries):
            for word in entry.split("."):
                defined = any(re.search(rf"^\s*(?:def|class) {word}\b", text, re.MULTILINE) for text in texts)
                assert defined or any(f.endswith(f"/{word}.py") for f in files), (places, entry)


def test_the_map_has_every_module() -> None:
    text = read(ROOT / "ARCHITECTURE.md")
    whole = ("cli", "verify/reports")  # told as folders
    missing = [m for m in MODULES if not m.startswith(tuple(f"onnxrank/{w}/" for w in whole))
               and not re.search(rf"(?<!\w){re.escape(Path(m).name)}", text)]  # fmt: skip
    assert not missing


def found(name: str) -> Any:
    """What a dotted name stands for."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            here: Any = importlib.import_module(".".join(parts[:k]))
        except ImportError:
            continue
        for part in parts[k:]:
            here = getattr(here, part, None) or getattr(here, "__dataclass_fields__", {})[part]
        return here
    raise LookupError(name)


def renamed() -> list[tuple[str, str]]:
    table = read(ROOT / "CHANGELOG.md").split("| old | new |")[1].split("\n\n")[0]
    return re.findall(r"^\| (`.*) \| (`.*) \|$", table, re.MULTILINE)


@pytest.mark.parametrize(("old", "new"), renamed(), ids=lambda t: t[:40])
def test_names_that_changed(old: str, new: str) -> None:
    """The new ones are there, and the old ones are not, or not defined there any more."""
    for name in re.findall(r"`(onnxrank(?:\.\w+)+)", new):
        assert found(name) is not None
    if "cli" in old or "[...]" in old or not old.startswith("`onnxrank"):
        return
    first, *others = re.findall(r"`([\w.]+)`", old)
    stem = first.rpartition(".")[0]
    for name in (first, *(o if o.startswith("onnxrank.") else f"{stem}.{o}" for o in others)):
        try:
            here = found(name)
        except (LookupError, AttributeError):
            continue
        assert here.__module__ != name.rpartition(".")[0], f"{name} is where it was"
