"""What the rewrite makes sure of for all rules: axes of one extent, axes without entries, remarks."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import FLOAT, Graph, candidate, optimised, refusals, request, rewritten, whole_numbers
from onnx import helper

from onnxrank.operators import operator

GIVEN = [request("u", 4), candidate("c", 4)]
COUNTS = (1, 2, 5, 33)
LENGTHS = ({"L": 1}, {"L": 5}, {"L": 50})


def tower(g: Graph, name: str) -> str:
    """Some steps worth making once."""
    return g.op("Relu", g.op("MatMul", name, g.const(whole_numbers(4, 4))))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("op", ["Mul", "Add", "Sub", "Max", "Less"])
def test_two_candidate_axes(op: str, turned: bool) -> None:
    """[N] of the request meets [N, 1] of the candidate: along which N a tensor varies is not in its symbols."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    q = g.on_axes("ReduceSum", tower(g, u), [1], keepdims=0)
    k = g.on_axes("ReduceSum", c, [1], keepdims=1)
    z = g.op(op, *((k, q) if turned else (q, k)))
    z = g.op("Cast", z, to=1) if op == "Less" else z
    g.output(g.on_axes("ReduceSum", z, [1], keepdims=0), ["N"])
    g.output(g.op("Transpose", z, perm=[1, 0]), ["N", "N"])
    optimised(g, GIVEN, counts=COUNTS)


@pytest.mark.parametrize("axis", [0, 1])
def test_in_batch_product(axis: int) -> None:
    """[N, 4] with [4, N], both of several levels, and what follows along either axis."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    x = g.op("Concat", tower(g, u), c, axis=1)
    z = g.op("MatMul", g.op("MatMul", x, g.const(whole_numbers(8, 4))), g.op("Transpose", tower(g, u), perm=[1, 0]))
    g.output(g.on_axes("ReduceMax", g.op("Relu", g.op("Add", z, g.const(2))), [axis], keepdims=0), ["N"])
    optimised(g, GIVEN, counts=COUNTS)


def test_one_length_twice() -> None:
    """A causal comparison of positions, [L, L], before scores of queries with keys of one history."""
    given = [request("h", "L", 4), candidate("c", 4)]
    g = Graph()
    h, c = (i.declare(g) for i in given)
    k = g.op("MatMul", h, g.const(whole_numbers(4, 4)))
    rows = g.on_axes("ReduceSum", h, [2], keepdims=1)
    seen = g.op("Cast", g.op("LessOrEqual", rows, g.op("Transpose", rows, perm=[0, 2, 1])), to=1)
    scores = g.op("Mul", g.op("MatMul", k, g.op("Transpose", h, perm=[0, 2, 1])), seen)
    pooled = g.on_axes("ReduceSum", g.op("MatMul", scores, h), [1], keepdims=0)
    g.output(g.op("Add", pooled, c), ["N", 4])
    optimised(g, given, counts=COUNTS, lengths=LENGTHS)


@pytest.mark.parametrize("follow", [[], ["Relu"], ["Softmax"], ["Relu", "Neg"]])
def test_no_entries(follow: list[str]) -> None:
    """A slice of nothing, steps on it, joined and summed up again."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    x = g.op("Concat", tower(g, u), c, axis=1)
    q = g.op("Slice", x, g.ints(3), g.ints(3), g.ints(1))
    for op in follow:
        q = g.op(op, q)
    joined = g.op("MatMul", g.op("Concat", q, x, axis=1), g.const(whole_numbers(8, 4)))
    g.output(g.op("Add", joined, g.on_axes("ReduceSum", q, [1], keepdims=1)), ["N", 4])
    g.output(g.op("Identity", q), ["N", 0])
    result = optimised(g, GIVEN, counts=COUNTS)
    assert result.changed


def test_empty_input() -> None:
    """An input without columns."""
    given = [request("u", 4), candidate("c", 4), candidate("e", 0)]
    g = Graph()
    u, c, e = (i.declare(g) for i in given)
    x = g.op("Concat", e, tower(g, u), c, axis=1)
    g.output(g.op("MatMul", x, g.const(whole_numbers(8, 4))), ["N", 4])
    optimised(g, given, counts=COUNTS)


@pytest.mark.parametrize("mixed", [False, True])
def test_unknown_operator_leaves_a_remark(mixed: bool) -> None:
    """What onnxrank does not know runs on all rows, and the report says which operator that was."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    x = tower(g, u)
    x = g.op("Concat", x, c, axis=1) if mixed else x
    g.output(g.op("Unique", x), ["M"])
    g.output(g.op("Relu", c), ["N", 4])
    made = optimised(g, GIVEN, counts=(1, 2, 5))
    assert "Unique is not known to treat rows independently" in refusals(made)


@pytest.mark.parametrize("op", ["Reshape", "Softmax", "Identity"])
def test_other_domains(op: str) -> None:
    """`com.acme::Reshape` is no Reshape: nobody knows what it does."""
    assert operator(helper.make_node(op, ["x"], ["y"])) == op
    assert operator(helper.make_node(op, ["x"], ["y"], domain="ai.onnx")) == op
    assert operator(helper.make_node(op, ["x"], ["y"], domain="com.acme")) == f"com.acme::{op}"


def test_operators_of_other_domains_are_barriers() -> None:
    """A local function has no such name; a custom operator called like ONNX's is left alone, with all rows."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    x = tower(g, u)
    y = g.ops("Reshape", 1, x, g.ints(-1, 2, 2), domain="com.acme")[0]
    g.output(g.op("Add", g.op("Reshape", y, g.ints(-1, 4)), c), ["N", 4])
    result = rewritten(g.model(), request=["u"])
    assert "com.acme::Reshape is not known to treat rows independently" in refusals(result)
    if result.changed:
        made = {o: n for n in result.model.graph.node for o in n.output}
        (custom,) = (n for n in result.model.graph.node if n.domain == "com.acme")
        assert made[custom.input[0]].op_type == "Expand"


@pytest.mark.parametrize("level", ["request", "candidate"])
@pytest.mark.parametrize("form", ["Expand", "Tile", "Mul"])
def test_repeated_for_every_candidate(form: str, level: str) -> None:
    """[N, 4] given another axis of candidates in front: it has one entry along that as long as nobody needs more."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    x = tower(g, u) if level == "request" else g.op("Relu", c)
    x = g.on_axes("Unsqueeze", x, [0])
    count = g.op("Gather", g.op("Shape", c), g.ints(0), axis=0)
    target = g.op("Concat", count, g.ints(1), g.ints(1), axis=0)
    if form == "Mul":
        ones = g.op("ConstantOfShape", target, value=helper.make_tensor("one", FLOAT, [1], [1.0]))
        x = g.op("Mul", x, ones)
    else:
        x = g.op(form, x, target)
    g.output(g.op("Neg", x), ["N", "N", 4])
    g.output(x, ["N", "N", 4])
    optimised(g, GIVEN, counts=COUNTS)


@pytest.mark.parametrize("op", ["MatMul", "Einsum", "GatherElements"])
def test_rows_of_the_request_only(op: str) -> None:
    """Operands of the request of which one varies along a length and one does not: nothing has rows of candidates."""
    given = [request("h", "L", 4), request("u", 4, 4), candidate("c", 4)]
    g = Graph()
    h, u, c = (i.declare(g) for i in given)
    if op == "Einsum":
        y = g.op(op, h, u, equation="nlk,nkj->nlj")
    elif op == "MatMul":
        y = g.op(op, g.on_axes("Unsqueeze", h, [2]), g.on_axes("Unsqueeze", u, [1]))
        y = g.on_axes("Squeeze", y, [2])
    else:
        size = g.op("Concat", g.ints(1), g.op("Slice", g.op("Shape", h), g.ints(1), g.ints(2)), g.ints(1), axis=0)
        at = g.op("Greater", g.op("Gather", u, g.ints(0), axis=1), g.const(0))
        at = g.op("Cast", at, to=7)
        y = g.op(op, h, g.op("Expand", at, size), axis=2)
    y = g.op("Concat", y, g.op("Exp", g.op("Relu", h)), axis=2)
    g.output(g.op("Relu", y), ["N", "L", 8])
    g.output(g.op("Relu", c), ["N", 4])
    optimised(g, given, counts=COUNTS, tolerance=1e-6, lengths=LENGTHS)


@pytest.mark.parametrize("length", ["L", 7])
def test_lengths_are_told_once(length: str | int) -> None:
    """Exporters read lengths off whatever is at hand, in nodes of its own for each place."""
    given = [request("h", length, 4), candidate("c", 4)]
    g = Graph()
    h, c = (i.declare(g) for i in given)

    def extent(name: str, axis: int) -> str:
        return g.op("Gather", g.op("Shape", name), g.const(axis, np.int64), axis=0)

    def vector(*parts: str | int) -> str:
        return g.op(
            "Concat", *(g.ints(p) if isinstance(p, int) else g.on_axes("Unsqueeze", p, [0]) for p in parts), axis=0
        )

    x = g.op("Concat", tower(g, h), g.on_axes("Unsqueeze", c, [1]), axis=1)
    y = g.op("Relu", g.op("MatMul", x, g.const(whole_numbers(4, 4))))
    heads = g.op("Reshape", y, vector(-1, extent(y, 1), 2, 2))
    scale = g.op("Cast", extent(g.op("Transpose", heads, perm=[0, 2, 1, 3]), 2), to=FLOAT)
    pooled = g.on_axes("ReduceSum", g.op("Reshape", heads, vector(extent(x, 0), extent(x, 1), 4)), [1], keepdims=0)
    more = g.op("Add", scale, g.op("Cast", g.op("Mul", extent(h, 1), extent(c, 0)), to=FLOAT))
    g.output(g.op("Mul", pooled, more), ["N", 4])
    lengths = [{"L": n} for n in (0, 1, 2, 61)] if length == "L" else [{}]
    result = optimised(g, given, counts=(1, 2, 5, 33), lengths=lengths)
    shapes = [n for n in result.model.graph.node if n.op_type == "Shape"]
    assert len(shapes) <= 2, "N and L, each of one input"


def test_a_product_of_what_nobody_knows_the_dimensions_of() -> None:
    """A Transpose of a tensor of unknown rank before a product: nothing is claimed of its shape."""
    g = Graph()
    u, c = (i.declare(g) for i in (request("u", 3, 4), candidate("c", 3, 4)))
    x = g.op("ConcatFromSequence", g.op("SequenceConstruct", c, g.op("Relu", u)), axis=2)
    y = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    towers = g.on_axes("ReduceSum", g.op("Relu", g.op("MatMul", u, g.const(whole_numbers(4, 4)))), [1, 2], keepdims=0)
    g.output(g.op("Add", g.on_axes("ReduceSum", y, [1, 2], keepdims=0), towers), ["N"])
    optimised(g, [request("u", 3, 4), candidate("c", 3, 4)], counts=COUNTS)
