"""Elementwise operators: which entries need no node."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Given, Graph, candidate, operators, optimised, request

LENGTH, TOKENS = 12, 3


def masked(how: str) -> tuple[Graph, list[Given]]:
    """Scores of a history's positions and the candidate's tokens, hidden where there is padding or what comes later."""
    total = LENGTH + TOKENS
    at = np.arange(total)
    later, others = at > at[:, None], at != at[:, None]
    g = Graph(17)
    given = [request("h", LENGTH, ids=3), candidate("s", TOKENS, total)]
    h, s = (i.declare(g) for i in given)
    padding = g.op("Equal", h, g.const(0, np.int64))
    padding = g.op("Pad", padding, g.ints(0, 0, 0, TOKENS), g.const(False, np.bool_))
    padding = g.on_axes("Unsqueeze", padding, [1])
    if how == "all rows":
        hidden = g.op("And", padding, g.const(others[-TOKENS:], np.bool_))
        hidden = g.op("Or", g.const(later[-TOKENS:], np.bool_), hidden)
    elif how == "not all":
        hidden = g.op("Or", padding, g.const((at % 5 == 0)[None] | later[-TOKENS:], np.bool_))
    else:
        hidden = g.op("And", padding, g.op("Not", padding))
    g.output(g.op("Where", hidden, g.const(-9.0), s), ["N", TOKENS, total])
    return g, given


def test_masks_that_hide_nothing() -> None:
    """Rows in which a constant changes nothing are the padding, and what is only constant needs no node either."""
    g, given = masked("all rows")
    made = optimised(g, given, counts=(0, 1, 2, 5, 40))
    assert not {"And", "Or"} & set(operators(made.model))


@pytest.mark.parametrize("how", ["not all", "of requests"])
def test_masks_that_hide(how: str) -> None:
    """Rows that a constant decides in part stay a node's, and so does what is computed of requests."""
    g, given = masked(how)
    made = optimised(g, given, counts=(0, 1, 2, 5, 40))
    assert {"And", "Or"} & set(operators(made.model))
