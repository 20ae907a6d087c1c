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


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", read(path)):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("name", ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"])
def test_files_that_are_named_exist(name: str) -> None:
    named = set(re.findall(r"`([\w./]+\.py)(?:: [^`]*)?`", read(ROOT / name)))
    known = ["/" + m for m in (*MODULES, *SCRIPTS)]
    lost = {n for n in named - {"my_rule.py", "repro.py"} if not any(m.endswith("/" + n) for m in known)}
    assert named and not lost


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
