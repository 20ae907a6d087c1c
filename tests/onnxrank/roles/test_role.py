"""Roles as they are stored."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxrank.errors import ModelError
from onnxrank.roles import (
    InputRole,
    Roles,
    ValueRange,
)

POSITIONS = st.sets(st.integers(0, 40), min_size=1).map(lambda found: tuple(sorted(found)))
NUMBERS = st.floats(-1e9, 1e9)
RANGES = st.builds(ValueRange, low=NUMBERS, high=NUMBERS, positions=st.none() | POSITIONS)
ROLES = st.builds(
    InputRole,
    name=st.text(min_size=1),
    level=st.sampled_from(["request", "candidate", "mixed"]),
    candidate_axis=st.none() | st.integers(0, 3),
    axis=st.none() | st.integers(0, 3),
    request=st.just(()) | POSITIONS,
    record=st.none() | st.integers(1, 99),
    ranges=st.lists(RANGES, max_size=3).map(tuple),
)


@pytest.mark.slow
@given(st.lists(ROLES, max_size=8, unique_by=lambda role: role.name))
def test_dict_round_trip(items: list[InputRole]) -> None:
    roles = Roles({role.name: role for role in items})
    text = json.dumps(roles.to_dict(), sort_keys=True)
    back = Roles.from_dict(json.loads(text))
    assert back == roles
    assert list(back.inputs) == list(roles.inputs)
    assert json.dumps(back.to_dict(), sort_keys=True) == text


@pytest.mark.parametrize(
    "stored",
    [
        {},
        [],
        {"inputs": 3},
        {"inputs": ["x"]},
        {"inputs": [{"name": "x"}]},
        {"inputs": [{"name": "x", "level": "user", "candidate_axis": 0}]},
        {"inputs": [{"name": "x", "level": "mixed", "candidate_axis": 0, "request": "no"}]},
    ],
)
def test_from_dict_errors(stored: Any) -> None:
    with pytest.raises(ModelError, match="stored roles cannot be read"):
        Roles.from_dict(stored)
