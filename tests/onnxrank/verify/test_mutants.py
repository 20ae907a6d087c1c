"""Every wrong model is caught, and none of the right ones is."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, Mutant, pair

from onnxrank.verify import Options, verify

RANKERS = sorted({m.ranker for m in MUTANTS} - {"by hand"})


def test_enough() -> None:
    assert len(MUTANTS) >= 40
    assert len(RANKERS) >= 8
    assert len({m.name for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("ranker", RANKERS)
def test_right(ranker: str) -> None:
    """What the mutants were made of passes."""
    right = pair(ranker)
    found = verify(right.original, right.optimized, Options(roles=right.roles))
    assert found.passed, found.errors
    assert {v: o for v, o in found.verdicts.items() if v != "data"} == dict.fromkeys(
        ("structure", "algebra", "rounding", "ranking", "metamorphic"), "passed"
    )


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_caught(mutant: Mutant) -> None:
    """A mutant fails, with the verdicts that its fault is one of."""
    made = mutant.pair()
    found = verify(made.original, made.optimized, Options(roles=made.roles))
    assert not found.passed
    failed = {v for v, outcome in found.verdicts.items() if outcome == "failed"}
    assert set(mutant.verdicts) <= failed, (failed, [f.message for f in found.errors])
    assert found.errors
