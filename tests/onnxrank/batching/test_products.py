"""Products of candidates with what their request gives, in stacks and without, several requests per call."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Graph, run, whole_numbers
from onnx import ModelProto

from onnxrank import batches
from onnxrank.batching.engine import Options, batch

FORMS = [{"rows": "lengths"}, {"interface": "padded"}]


def _product(own: list[int], order: list[int], joined: list[int] | None, keys: list[int], left: bool) -> ModelProto:
    """A product of candidates, brought into some layout, with keys that the request gives.

    Args:
        own: What a candidate is.
        order: The order in which its axes and, as 0, that of the candidates are.
        joined: What that is reshaped to; None for nothing.
        keys: Shape of the keys.
        left: Whether candidates are the left operand.
    """
    g = Graph(17)
    given, item = g.input("keys", keys), g.input("item", ["N", 8])
    moved = g.op("Transpose", g.op("Reshape", item, g.ints(-1, *own)), perm=order)
    if joined is not None:
        moved = g.op("Reshape", moved, g.ints(*joined))
    out = g.op("MatMul", *((moved, given) if left else (given, moved)))
    if joined is not None and order[0] != 0:  # outputs have rows of candidates and nothing else
        out = g.op("Reshape", out, g.ints(2, -1, keys[-1]))
    g.output(out, None)
    return g.model()


@pytest.mark.parametrize(
    ("own", "order", "joined", "keys", "left"),
    [
        pytest.param([8], [0, 1], None, [3, 8, 5], True, id="rows, stacked keys"),
        pytest.param([2, 4], [1, 0, 2], None, [3, 2, 4, 5], True, id="rows in a stack, stacks of keys"),
        pytest.param([2, 4], [0, 1, 2], None, [3, 1, 4, 5], True, id="matrices, stacked keys"),
        pytest.param([4, 2], [0, 1, 2], None, [3, 1, 5, 4], False, id="matrices to the right, stacked keys"),
        pytest.param([2, 4], [0, 1, 2], [-1, 4], [3, 4, 5], True, id="several rows, stacked keys"),
        pytest.param([2, 2, 2], [1, 0, 2, 3], [2, -1, 2], [2, 2, 5], True, id="several rows in a stack"),
        pytest.param([2, 4], [1, 0, 2], [-1, 4], [4, 5], True, id="all candidates several times"),
        pytest.param([2, 2, 2], [0, 1, 2, 3], [-1, 2, 2], [3, 1, 2, 5], True, id="several matrices, stacked keys"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_products_with_what_the_request_gives(
    own: list[int], order: list[int], joined: list[int] | None, keys: list[int], left: bool, form: dict[str, str]
) -> None:
    _held(_product(own, order, joined, keys, left), keys, form)


@pytest.mark.parametrize(
    ("keys", "own", "equation"),
    [
        pytest.param([3, 4, 5], [2, 4], "nak,hkc->hnac", id="candidates and keys"),
        pytest.param([4, 5], [2, 4], "nak,nbk,kc->nabc", id="candidates twice, and keys"),
        pytest.param([8], [2, 4], "nak,nbk->nab", id="candidates twice"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_einsum(keys: list[int], own: list[int], equation: str, form: dict[str, str]) -> None:
    g = Graph(17)
    given, item = g.input("keys", keys), g.input("item", ["N", 8])
    each = g.op("Reshape", item, g.ints(-1, *own))
    terms, _, result = equation.partition("->")
    out = g.op("Einsum", *(each if "n" in term else given for term in terms.split(",")), equation=equation)
    if result.index("n"):  # outputs have their rows of candidates first
        out = g.op("Transpose", out, perm=[1, 0, 2, 3])
    g.output(g.op("Add", out, g.op("ReduceSum", given, keepdims=0)), None)
    _held(g.model(), keys, form)


def test_a_product_of_constants_that_the_request_is_added_to() -> None:
    """As a bias goes through a layer, to which a product of the user's features is added."""
    g = Graph(17)
    given, item = g.input("keys", [1, 5]), g.input("item", ["N", 8])
    added = g.op("Gemm", g.const(whole_numbers(1, 3, seed=1)), g.const(whole_numbers(3, 5, seed=2)), given)
    g.output(g.op("Add", g.op("MatMul", item, g.const(whole_numbers(8, 5, seed=3))), added), None)
    for form in FORMS:
        _held(g.model(), [1, 5], form)


def test_tiles() -> None:
    """Of candidates, along their axis and others, and of what is the request's."""
    g = Graph(17)
    given, item = g.input("keys", [4]), g.input("item", ["N", 8])
    twice = g.op("Tile", item, g.ints(2, 1))  # all candidates, and all again
    each = g.op("ReduceMax", g.op("Reshape", twice, g.ints(2, -1, 8)), axes=[0], keepdims=0)
    own = g.op("Tile", g.op("Unsqueeze", given, g.ints(0)), g.ints(1, 4))
    g.output(g.op("Add", g.op("Tile", each, g.ints(1, 2)), own), None)
    for form in FORMS:
        _held(g.model(), [4], form)


def _held(model: ModelProto, keys: list[int], form: dict[str, str]) -> None:
    made = batch(model, request=["keys"], check=False, options=Options(**form)).model
    told = batches.convention(made)
    assert told is not None
    for counts in ([3], [2, 1, 3], [0, 4, 0, 90]):
        sizes = [3] * len(counts) if "interface" in form else counts
        single = [
            {"keys": whole_numbers(*keys, seed=k), "item": whole_numbers(max(n, 1), 8, seed=90 + k)[:n]}
            for k, n in enumerate(sizes)
        ]
        got = batches.parted(told, run(made, batches.joined(told, single)), sizes)
        for feed, n, found in zip(single, sizes, got, strict=True):
            for name, want in (run(model, feed) if n else {}).items():
                np.testing.assert_array_equal(found[name], want)
