"""Every wrong model is caught, and none of the right ones is."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant, pair

from onnxrank.verify import Options, verify

RANKERS = sorted({m.ranker for m in MUTANTS} - {"by hand"})


def test_enough() -> None:
    assert len(MUTANTS) >= 90
    assert len(RANKERS) >= 8
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.slow
@pytest.mark.parametrize("ranker", RANKERS)
def test_right(ranker: str) -> None:
    """What the mutants were made of passes."""
    right = pair(ranker)
    found = verify(right.original, right.optimized, Options(roles=right.roles))
    assert found.passed, found.errors
    assert {v: o for v, o in found.verdicts.items() if v != "data"} == dict.fromkeys(
        ("structure", "algebra", "rounding", "ranking", "metamorphic"), "passed"
    )


QUICK = ("history cut to its first 50", "right only for an even N", "guard dropped", "NaN where a history is padded")


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(m, marks=() if m.what in QUICK else pytest.mark.slow, id=m.name) for m in MUTANTS],
)
def test_caught(mutant: Mutant) -> None:
    """A mutant fails, with the verdicts that its fault is one of; or the report says what was not looked at."""
    made = mutant.pair()
    found = verify(made.original, made.optimized, Options(roles=made.roles))
    if mutant.declared:
        assert found.passed and any(mutant.declared in f.message for f in found.findings)
        return
    assert not found.passed
    failed = {v for v, outcome in found.verdicts.items() if outcome == "failed"}
    assert set(mutant.verdicts) <= failed, (failed, [f.message for f in found.errors])
    assert found.errors
