"""Several requests of one call: what tells them apart, and what contradicts itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxrank import batches


@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_a_contradicting_index_is_in_no_order(counts: list[int]) -> None:
    """Whatever requests are without candidates, the first among them: it goes down, or below 0."""
    index = np.repeat(np.arange(len(counts)), counts)
    for feed in batches.contradicting({"form": "index", "name": "i"}, {"i": index}):
        wrong = feed["i"]
        assert wrong.dtype == index.dtype and len(wrong) == len(index)
        assert not len(wrong) or wrong.min() < 0 or (np.diff(wrong) < 0).any()


@pytest.mark.parametrize(("form", "right"), [("lengths", [2, 0, 3]), ("offsets", [0, 2, 2, 5])])
def test_contradicting_counts(form: str, right: list[int]) -> None:
    """They add up to another number of candidates, or are below 0."""
    data = np.array(right)
    for feed in batches.contradicting({"form": form, "name": "n"}, {"n": data}):
        wrong = feed["n"]
        total = wrong.sum() if form == "lengths" else wrong[-1]
        assert total != 5 or wrong.min() < 0 or (form == "offsets" and wrong[0] != 0)


def test_padded_requests_cannot_contradict_themselves() -> None:
    assert batches.contradicting({"form": "padded"}, {}) == []
