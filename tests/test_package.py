"""What an installation that is not editable holds."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {p.parent.relative_to(ROOT) for p in (ROOT / "onnxrank").rglob("*.py")}
    assert listed == {".".join(f.parts) for f in folders} | {"onnxrank.rules"}
