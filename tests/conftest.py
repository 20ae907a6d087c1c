"""Lets the tests import what `support` and `scripts` hold."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Not this folder itself: its `onnxrank` would hide the package of an editable install.
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

# What is measured differs from run to run: the tests of timing ask for it.
os.environ["ONNXRANK_TUNE"] = "0"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write what is made now to the golden files")
