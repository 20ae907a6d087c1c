"""Random programs with lengths that differ from request to request, at counts and lengths far from those measured."""

from __future__ import annotations

from contextlib import suppress

import pytest
from helpers import patterns, rewritten, session
from hypothesis import HealthCheck, currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from kinds import KINDS, LEFT_OUT, about, layered, program
from layers import LAYERS
from lengths import Program, difference, reduces, text

from onnxrank.errors import DoesNotRun
from onnxrank.operators import REGISTRY, operator


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["request", "same"])
@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 24))
def test_same_scores(interface: str, seed: int, steps: int) -> None:
    """Exact results to the bit, the others closely. `scripts/fuzz_programs.py` tries many more."""
    holds(program(seed, steps), seed, interface)


def test_positions_of_rows_that_do_not_differ_by_candidate() -> None:
    """RotaryEmbedding takes positions for every row: constant ones have as many rows as what is turned."""
    for seed in range(4):
        made = about("com.microsoft::RotaryEmbedding", seed)
        assert "com.microsoft::RotaryEmbedding" in written(made)
        holds(made, seed, "request")


@pytest.mark.slow
@pytest.mark.parametrize("interface", ["request", "same"])
@pytest.mark.parametrize("key", sorted(KINDS))
def test_every_operator(key: str, interface: str) -> None:
    held = 0
    for seed in range(20):
        made = about(key, seed)
        assert key in written(made)
        with suppress(DoesNotRun):  # a Scan wants shapes, which onnxruntime does not infer of every operator
            holds(made, seed, interface)
            held += 1
        if held == 2:
            return
    raise AssertionError("hardly any program runs")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_every_layer(name: str) -> None:
    """With decisions that cost least, and with others."""
    for seed in range(8):
        with suppress(DoesNotRun):
            decisions = seed if seed % 4 else None
            holds(layered(name, seed), seed, "request" if seed % 2 else "same", decisions=decisions)


@pytest.mark.slow
def test_the_programs_hold_the_registry() -> None:
    """A new operator has to be written by the programs, or to be left out for a reason."""
    found = {op for seed in range(400) for op in written(program(seed, 24))} | set(KINDS)
    keys = REGISTRY.keys()
    assert keys - set(LEFT_OUT) <= found
    assert not set(LEFT_OUT) & found and set(LEFT_OUT) <= keys


def written(made: Program) -> set[str]:
    """Keys of a program's operators."""
    return {operator(n) for n in made.model.graph.node}


def holds(made: Program, seed: int, interface: str, decisions: int | None = None) -> None:
    """Asserts that a program's result gives the scores of the original."""
    if currently_in_test_context():
        note(text(made.model))
    result = rewritten(made.model, decisions=decisions, request=patterns(made.inputs), interface=interface)
    assert not [r for r in result.report.refusals if "internal error" in r.reason]
    if not result.changed:
        return
    before, after = session(made.model), session(result.model)
    for n, at in made.points(seed, 4):
        if 0 not in (n, *at.values()) or not reduces(made.model):
            assert difference(made, before, after, interface, n, at) is None
