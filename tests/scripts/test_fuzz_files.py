"""Damaged and hostile files: every kind of damage once. `scripts/fuzz_files.py` runs hundreds."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import fuzz_files

COUNT = len(fuzz_files.CASES)


@pytest.mark.parametrize(
    "number", [*range(COUNT), *(pytest.param(k, marks=pytest.mark.slow) for k in range(COUNT, 2 * COUNT))]
)
def test_a_damaged_file_ends_in_order(tmp_path: Path, number: int) -> None:
    (tmp_path / "secret.bin").write_bytes(fuzz_files.SECRET)
    code, _, kind, problem = fuzz_files.run(number, tmp_path)
    assert problem == "-", (kind, code, problem)
