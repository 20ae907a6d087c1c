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


@pytest.mark.parametrize("apart", [True, False])
def test_masks_of_history_and_candidate(apart: bool) -> None:
    """A mask that one column has of the candidate: it gets rows of candidates only where a tensor would be cut up."""
    g = Graph(17)
    given = [request("m", 3), candidate("o", 1)]
    sizes = (3, 1) if apart else (4,)
    for k, size in enumerate(sizes):
        given += [request(f"h{k}", LENGTH, size), candidate(f"c{k}", 1, size)]
    m, o, *own = (i.declare(g) for i in given)
    rows = [g.op("Concat", *own[k : k + 2], axis=1) for k in range(0, len(own), 2)]
    joined = g.op("Concat", *rows, axis=2) if apart else rows[0]
    hidden = g.op("Greater", g.op("Concat", m, o, axis=1), g.const(0.0))
    g.output(g.op("Where", g.on_axes("Unsqueeze", hidden, [1]), g.const(-9.0), joined), ["N", LENGTH + 1, 4])
    made = optimised(g, given, counts=(0, 1, 2, 5, 40)).model.graph.node
    masks = {o for n in made if n.op_type == "Concat" for o in n.output}
    assert any(n.op_type == "Where" and n.input[0] in masks for n in made) != apart
