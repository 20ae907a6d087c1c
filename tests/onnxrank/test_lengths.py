"""Random programs with lengths that differ from request to request, at counts and lengths far from those measured."""

from __future__ import annotations

import pytest
from helpers import patterns, rewritten, session
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from lengths import difference, program, reduces, text


@pytest.mark.parametrize("interface", ["request", "same"])
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 24))
def test_same_scores(interface: str, seed: int, steps: int) -> None:
    """Exact results to the bit, the others closely. `scripts/fuzz_programs.py` tries many more."""
    made = program(seed, steps)
    note(text(made.model))
    result = rewritten(made.model, request=patterns(made.inputs), interface=interface)
    if not result.changed:
        return
    before, after = session(made.model), session(result.model)
    for n, at in made.points(seed, 4):
        if 0 not in (n, *at.values()) or not reduces(made.model):
            assert difference(made, before, after, interface, n, at) is None
