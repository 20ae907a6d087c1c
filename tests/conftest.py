"""Lets the tests import what `support` and `scripts` hold."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

# Not this folder itself: its `onnxrank` would hide the package of an editable install.
sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

# What is measured differs from run to run: the tests of timing ask for it.
os.environ["ONNXRANK_TUNE"] = "0"


MANY, EVERY = 8, 3
"""Of a test of more than so many cases, the one in so many that is no slow one: the others differ from it by little."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write what is made now to the golden files")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves most cases of tests of many to the slow run."""
    if config.getoption("--update-goldens"):
        return
    tests = [item.nodeid.split("[")[0] for item in items]
    many, seen = Counter(tests), Counter[str]()
    for test, item in zip(tests, items, strict=True):
        if many[test] > MANY and seen[test] % EVERY:
            item.add_marker(pytest.mark.slow)
        seen[test] += 1
