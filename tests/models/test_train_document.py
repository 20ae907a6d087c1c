"""The code in docs/train.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "train.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^<!-- (\w+) -->\n```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", ["mask", "convert", pytest.param("sparse", marks=pytest.mark.slow)])
def test_block(name: str) -> None:
    exec(BLOCKS[name], {})
