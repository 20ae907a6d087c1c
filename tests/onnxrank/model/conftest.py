"""A model in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from filekit import tiny


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "m.onnx"
    file.write_bytes(tiny().SerializeToString())
    return file
