"""Packed inputs, timed: every variant runs and gives the original's scores."""

from __future__ import annotations

import pytest

from scripts import packed_inputs


def test_all_variants(capsys: pytest.CaptureFixture[str]) -> None:
    rows = packed_inputs.measured("3x2", 2, [2], 0.01)
    assert {r.part for r in rows} == {"one file", "request model"}
    assert {r.variant for r in rows} >= {"before", "joined and packed", "joined and packed, by name"}
    assert not any(r.wrong for r in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
