"""`pieces`: which entries of an operand that is contracted go into one product."""

from __future__ import annotations

import pytest
from helpers import Graph, candidate, operators, optimised, patterns, request, rewritten, whole_numbers

from onnxrank import cost
from onnxrank.plans import TAKE

GIVEN = [request("u", 12, 8), candidate("c", 8, 8), candidate("x", 40)]


def dots_beside_features(width: int) -> Graph:
    """Products of a request's 12 and a candidate's 8 fields with the latter, beside 40 features, before a layer."""
    g = Graph()
    u, c, x = (i.declare(g) for i in GIVEN)
    both = g.op("Concat", u, c, axis=1)
    dots = g.op("Reshape", g.op("MatMul", both, g.op("Transpose", c, perm=[0, 2, 1])), g.ints(-1, 160))
    joined = g.op("Concat", dots, x, axis=1)
    g.output(g.op("Relu", g.op("MatMul", joined, g.const(whole_numbers(200, width)))), ["N", width])
    return g


@pytest.mark.parametrize("width", [8, 48, 128])
@pytest.mark.parametrize("candidates", [1, 512])
def test_a_product_for_each_tensor_or_one_behind_a_copy(width: int, candidates: int) -> None:
    """Whichever costs less: copying 96, 64 and 40 entries of a row, or adding as many as the layer has columns."""
    result = optimised(dots_beside_features(width), GIVEN, candidates=candidates)
    apart = candidates == 512 and width < 128
    assert ("Concat" in operators(result.model)) is not apart
    sites = [s for s in result.plan.sites if s.place.rule == "fc" and s.place.step and s.chosen == TAKE]
    assert len(sites) == apart
    assert (cost.beside(96) > cost.added(width)[1]) == (width < 128)


def test_the_plan_has_the_choice() -> None:
    """At another number of candidates, too, it is done as the plan says."""
    model, how = dots_beside_features(48).model(), {"request": patterns(GIVEN)}
    plan = rewritten(model, candidates=512, **how).plan
    assert "Concat" not in operators(rewritten(model, plan=plan, **how).model)
    assert "Concat" in operators(rewritten(model, candidates=1, **how).model)


@pytest.mark.parametrize(("wide", "apart"), [(600, True), (100, False)])
def test_what_is_wide_is_not_copied_beside_many_that_are_narrow(wide: int, apart: bool) -> None:
    given = [candidate("w", wide), *(candidate(f"c{k}", 2) for k in range(12)), request("u", 3)]
    g = Graph()
    names = [i.declare(g) for i in given]
    joined = g.op("Concat", g.op("Relu", names[0]), *names[1:], axis=1)
    g.output(g.op("Relu", g.op("MatMul", joined, g.const(whole_numbers(wide + 27, 16)))), ["N", 16])
    result = optimised(g, given, candidates=512)
    (concat,) = [n for n in result.model.graph.node if n.op_type == "Concat"]
    assert len(concat.input) == 12 + (not apart)
