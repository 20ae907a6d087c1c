"""Data movement: which steps a Transpose is made in."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from onnxrank.moves import one_by_one


@pytest.mark.parametrize("rank", range(6))
def test_axes_moved_one_by_one(rank: int) -> None:
    """Together the steps are the whole, each moves one axis, and there are as few as there can be."""
    steps = {tuple(range(rank)): 0}
    ways = [tuple(np.insert(np.delete(range(rank), a), b, a).tolist()) for a in range(rank) for b in range(rank)]
    for count in range(1, rank):
        steps |= {
            found: count
            for known in list(steps)
            for way in ways
            if (found := tuple(known[k] for k in way)) not in steps
        }
    data = np.arange(2 * 3 * 5 * 7 * 11).reshape([*[2, 3, 5, 7, 11][:rank], -1])
    for order in permutations(range(rank)):
        made = one_by_one(order)
        assert len(made) == steps[order]
        assert all(steps[step] == 1 for step in made)
        turned = data
        for step in made:
            turned = turned.transpose(*step, rank)
        np.testing.assert_array_equal(turned, data.transpose(*order, rank))
