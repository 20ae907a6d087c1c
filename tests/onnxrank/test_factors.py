"""Factors along the axis that a product sums over, and where they go."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Given, Graph, candidate, operators, optimised, request, whole_numbers
from onnx import ModelProto

LENGTH, WIDTH = 40, 5


def attention(step: str, rows: int = 0) -> tuple[Graph, list[Given]]:
    """Weights of every candidate, in some rows or in none, some steps, and values of the request."""
    g = Graph(17)
    own = (rows, LENGTH) if rows else (LENGTH,)
    given = [request("v", LENGTH, WIDTH), request("m", *own[:-1], LENGTH), candidate("c", *own), candidate("f", *own)]
    v, m, c, f = (i.declare(g) for i in given)
    if rows:
        m = g.op("Slice", m, g.ints(0), g.ints(1), g.ints(1))
    else:
        v = g.op("Gather", v, g.const(0, np.int64), axis=0)
    x, two = g.op("Relu", c), g.const(2.0)
    made = {
        "mask": lambda: g.op("Mul", x, m),
        "mask first": lambda: g.op("Mul", m, x),
        "number": lambda: g.op("Mul", x, two),
        "both": lambda: g.op("Mul", g.op("Div", x, two), m),
        "of the candidate": lambda: g.op("Mul", x, f),
        "below": lambda: g.op("Div", two, g.op("Add", x, two)),
        "read twice": lambda: g.op("Mul", x, m),
    }[step]()
    y = g.op("MatMul", made, v)
    if step == "read twice":
        y = g.op("Concat", y, made, axis=-1)
    width = max(rows, 1) * (WIDTH + LENGTH * (step == "read twice"))
    flat = g.op("Reshape", y, g.ints(-1, width))
    g.output(g.op("MatMul", flat, g.const(whole_numbers(width, 3))), ["N", 3])
    return g, given


def scaled(model: ModelProto) -> int:
    """How many factors stand between the candidate's Relu and the product."""
    made = {o: n for n in model.graph.node for o in n.output}
    (product,) = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[0] in made and n.input[1] in made]
    found, behind = 0, [product.input[0]]
    while behind:
        node = made.get(behind.pop())
        if node is not None and node.op_type != "Relu":
            found += node.op_type in ("Mul", "Div")
            behind += node.input
    return found


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("step", ["mask", "mask first", "number", "both"])
def test_moved(step: str, rows: int) -> None:
    g, given = attention(step, rows)
    result = optimised(g, given, counts=(0, 1, 2, 7, 50))
    assert scaled(result.model) == 0
    assert any(s.place.rule == "dot" and s.taken for s in result.plan.sites)


@pytest.mark.parametrize("step", ["of the candidate", "below", "read twice"])
def test_left(step: str) -> None:
    """Factors of a candidate's own, what a number is divided by, and what something else reads."""
    g, given = attention(step)
    result = optimised(g, given, counts=(1, 2, 7), tolerance=1e-6)
    assert {"Mul", "Div"} & set(operators(result.model))


def test_along_a_length_of_the_request() -> None:
    """A mask over a history of symbolic length, brought into the shape of two heads, and that length."""
    g = Graph(17)
    given = [request("h", "L", WIDTH), request("m", "L"), candidate("c", 2, 1, WIDTH)]
    h, m, c = (i.declare(g) for i in given)
    values = g.on_axes("Unsqueeze", h, [1])
    scores = g.op("MatMul", c, g.op("Transpose", values, perm=[0, 1, 3, 2]))
    length = g.op("Cast", g.op("Gather", g.op("Shape", h), g.const(1, np.int64), axis=0), to=1)
    weights = g.op("Div", g.op("Relu", scores), length)
    weights = g.op("Mul", weights, g.on_axes("Unsqueeze", m, [1, 2]))
    g.output(g.op("MatMul", weights, values), ["N", 2, 1, WIDTH])
    at = [{"L": n} for n in (0, 1, 2, 7, 50)]
    made = optimised(g, given, counts=(0, 1, 2, 50), tolerance=1e-6, lengths=at).model.graph
    scored = {o for n in made.node if n.op_type == "Relu" for o in n.output}
    assert not {"Mul", "Div"} & {n.op_type for n in made.node if scored & set(n.input)}


@pytest.mark.parametrize("factor", ["number", "vector"])
def test_product_with_a_vector(factor: str) -> None:
    """A vector has no rows that factors could go to: beside one column of them it would become a matrix."""
    given = [Given("v", (WIDTH,), "once"), candidate("c", WIDTH)]
    g = Graph(17)
    v, c = (i.declare(g) for i in given)
    vector = g.op("Squeeze", v, g.ints(0))
    x = g.op("Mul", c, g.const(2.0) if factor == "number" else vector)
    g.output(g.op("MatMul", x, g.op("Relu", vector)), ["N"])
    optimised(g, given, counts=(1, 2, 5, 90))
