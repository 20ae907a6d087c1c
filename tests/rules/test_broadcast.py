"""`broadcast`: what is the same for every candidate is computed for one row, and what mixes candidates is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from helpers import (
    BOOL,
    FLOAT,
    INT64,
    Given,
    Graph,
    candidate,
    feeds,
    operators,
    optimised,
    patterns,
    refusals,
    request,
    rewritten,
    rows,
    rules,
    run,
    whole_numbers,
)
from onnx import helper

import onnxrank

N = 512
GIVEN = [request("u", 4, 2), candidate("c", 4, 2)]
Op = Callable[[Graph, str], str]


def test_tower() -> None:
    """A request's tower runs at one row, and only its end meets the candidates."""
    given = [request("u", 3), candidate("c", 2)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    hidden = g.op("Relu", g.op("Gemm", u, g.const(whole_numbers(3, 4)), g.const(whole_numbers(4))))
    hidden = g.op("Relu", g.op("MatMul", hidden, g.const(whole_numbers(4, 2))))
    g.output(g.op("Mul", hidden, c), ["N", 2])
    result = optimised(g, given)
    assert rules(result)["broadcast"] == 4
    assert result.report.before["candidate"].macs == N * (12 + 8)
    assert result.report.after["candidate"].macs == 0
    assert result.report.macs_after == 12 + 8
    assert operators(result.model) == ["Gemm", "Relu", "MatMul", "Relu", "Mul"]


def test_lookups() -> None:
    """Ids of the request are looked up once."""
    given = [request("u", ids=9), request("h", 6, ids=9), candidate("c", ids=9)]
    g = Graph()
    table = g.const(whole_numbers(9, 4))
    u, h, c = (g.op("Gather", table, i.declare(g), axis=0) for i in given)
    pooled = g.on_axes("ReduceSum", h, [1], keepdims=0)
    g.output(g.op("Relu", g.op("Concat", u, pooled, c, axis=1)), ["N", 12])
    result = optimised(g, given, counts=(1, 2, 5))
    extents = rows(result, given, n=50)
    assert extents[u] < 50 and extents[h] < 50 and extents[c] == 50


def test_mixed_lookups() -> None:
    """One lookup of ids of both levels is divided."""
    given = [request("u", 3, ids=9), candidate("c", 2, ids=9)]
    g = Graph()
    ids = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    x = g.op("Gather", g.const(whole_numbers(9, 4)), ids, axis=0)
    g.output(g.op("MatMul", g.op("Flatten", x), g.const(whole_numbers(20, 3))), ["N", 3])
    result = optimised(g, given)
    assert operators(result.model).count("Gather") == 2
    assert result.report.macs_after == (12 + N * 8) * 3


EXPANSIONS: dict[str, Op] = {
    "expand": lambda g, rows: g.op("Expand", "u", g.op("Concat", rows, g.ints(3), axis=0)),
    "tile": lambda g, rows: g.op("Tile", "u", g.op("Concat", rows, g.ints(1), axis=0)),
    "zeros": lambda g, rows: g.op("Add", g.op("ConstantOfShape", g.op("Concat", rows, g.ints(1), axis=0)), "u"),
    "ones": lambda g, rows: g.op(
        "Mul", "u", g.op("ConstantOfShape", g.op("Concat", rows, g.ints(1), axis=0),
                         value=helper.make_tensor("v", FLOAT, [1], [1.0]))),
    "gather": lambda g, rows: g.op(
        "Gather", "u", g.op("ConstantOfShape", rows, value=helper.make_tensor("v", INT64, [1], [0])), axis=0),
}  # fmt: skip


@pytest.mark.parametrize("expansion", EXPANSIONS)
def test_expansion_in_the_graph(expansion: str) -> None:
    """A graph that takes one row of the request and expands it itself needs no roles; the expansion sinks."""
    g = Graph()
    g.input("u", [1, 3])
    c = g.input("c", ["N", 2])
    count = g.op("Gather", g.op("Shape", c), g.ints(0), axis=0)
    x = g.op("Concat", g.op("Relu", EXPANSIONS[expansion](g, count)), c, axis=1)
    g.output(g.op("MatMul", x, g.const(whole_numbers(5, 4))), ["N", 4])
    model = g.model()
    result = rewritten(model)
    assert result.report.macs_after == (3 + N * 2) * 4
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 5):
        feed = {
            "u": rng.integers(-3, 4, (1, 3)).astype(np.float32),
            "c": rng.integers(-3, 4, (n, 2)).astype(np.float32),
        }
        want, got = run(model, feed), run(result.model, feed)
        for name, score in want.items():
            np.testing.assert_array_equal(got[name], score)


def test_other_axes() -> None:
    """What is repeated along an axis of fields is computed once along it."""
    given = [request("u", 3), candidate("c", 4)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    wide = g.op("Expand", g.on_axes("Unsqueeze", c, [1]), g.ints(1, 10, 4))
    y = g.op("Relu", g.op("MatMul", g.op("Neg", wide), g.const(whole_numbers(4, 3))))
    g.output(g.op("Mul", y, g.on_axes("Unsqueeze", u, [1])), ["N", 10, 3])
    result = optimised(g, given)
    assert result.report.macs_before == N * 10 * 12
    assert result.report.macs_after == N * 12


def of_rows(kind: str, **attrs: object) -> Op:
    return lambda g, x: g.op(kind, x, **attrs)


def typed(g: Graph, x: str) -> str:
    whole = g.op("Cast", x, to=INT64)
    less = g.op("Pow", whole, g.const([2.0, 1.0]))
    same = g.op("Equal", less, g.op("Mod", whole, g.ints(3), fmod=0))
    return g.op("CastLike", g.op("Not", same), x)


def clipped(g: Graph, x: str) -> str:
    return g.op("Clip", x, g.const(-1), g.const(2))


def quantised(g: Graph, x: str) -> str:
    scale, zero = g.const(0.5), g.const(3, np.uint8)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero), scale, zero)


def quantised_by_channel(g: Graph, x: str) -> str:
    scale, zero = g.const(np.arange(1, 9) / 4), g.const(np.arange(8), np.uint8)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", x, scale, zero, axis=1), scale, zero, axis=1)


def largest(g: Graph, x: str) -> str:
    values, at = g.ops("TopK", 2, x, g.ints(3), axis=1)
    return g.op("Concat", values, g.op("Cast", at, to=FLOAT), axis=1)


def bits(g: Graph, x: str) -> str:
    return g.op("Cast", g.op("Clip", x, g.const(0), g.const(1)), to=INT64)


def switched(g: Graph, x: str) -> str:
    test = g.op("Greater", x, g.op("Neg", x))
    return g.op("Where", test, g.const(7), g.op("PRelu", x, g.const([0.5, 2.0])))


PER_ROW: dict[str, Op] = {
    "softmax over fields": of_rows("Softmax", axis=1),
    "softmax over the last axis": of_rows("Softmax", axis=-1),
    "log softmax": of_rows("LogSoftmax", axis=1),
    "hardmax": of_rows("Hardmax", axis=1),
    "cumulative sum": lambda g, x: g.op("CumSum", x, g.const(1, np.int64), exclusive=1),
    "cumulative sum within": lambda g, x: g.op("CumSum", x, g.const(-1, np.int64)),
    "cumulative sum on axis 2": lambda g, x: g.op("CumSum", x, g.const(2, np.int64)),
    "mean of one": lambda g, x: g.on_axes("ReduceMean", g.op("Slice", x, g.ints(1), g.ints(2), g.ints(2)), [2]),
    "largest of one": lambda g, x: g.on_axes("ReduceMax", g.op("Slice", x, g.ints(0), g.ints(1), g.ints(2)), [2]),
    "lp norm": of_rows("LpNormalization", axis=1, p=1),
    "argmax": lambda g, x: g.op("Cast", g.op("ArgMax", x, axis=1, keepdims=1), to=FLOAT),
    "argmin, axis gone": lambda g, x: g.op("Cast", g.op("ArgMin", x, axis=2, keepdims=0), to=FLOAT),
    "argmax, middle axis gone": lambda g, x: g.op("Cast", g.op("ArgMax", x, axis=1, keepdims=0), to=FLOAT),
    "triangle": lambda g, x: g.op("Trilu", x, upper=0),
    "top 3": largest,
    "types": typed,
    "clip": clipped,
    "quantised": quantised,
    "quantised by channel": quantised_by_channel,
    "where": switched,
    "dropout": of_rows("Dropout"),
    "max pool": of_rows("MaxPool", kernel_shape=[2]),
    "instance norm": lambda g, x: g.op("InstanceNormalization", x, g.const(np.ones(8)), g.const(np.zeros(8))),
    "elements": lambda g, x: g.op("GatherElements", x, bits(g, x), axis=2),
    "one hot": lambda g, x: g.op("OneHot", bits(g, x), g.const(4, np.int64), g.const([0.0, 1.0]), axis=-1),
    "gather nd": lambda g, x: g.op("GatherND", g.const(whole_numbers(4, 2)), bits(g, x)),
    "smooth": lambda g, x: g.op("Add", g.op("Sigmoid", x), g.op("Erf", g.op("Exp", g.op("Div", x, g.const(4))))),
}  # fmt: skip


@pytest.mark.parametrize("source", ["mixed", "request"])
@pytest.mark.parametrize("name", PER_ROW)
def test_operators_within_rows(name: str, source: str) -> None:
    """Operators within a row, on blocks of both levels and on the request alone."""
    g = Graph(20 if name in ("types",) else 17)
    u, c = (i.declare(g) for i in GIVEN)
    x = g.op("Concat", u, c, axis=1) if source == "mixed" else g.op("Concat", u, u, axis=1)
    y = PER_ROW[name](g, x)
    if source == "request":
        g.output(y, None)
        y = g.op("Neg", c)
    g.output(y, None)
    result = optimised(g, GIVEN, counts=(1, 2, 5), tolerance=1e-6)
    if source == "request" and name not in ("argmax, middle axis gone",):
        extents = rows(result, GIVEN, n=50)
        lowered = [n for n in result.model.graph.node if n.op_type not in ("Expand", "Neg", "Shape", "Concat")]
        assert lowered and all(extents[o] < 50 for n in lowered for o in n.output if o)


def test_old_softmax() -> None:
    """Below opset 13 Softmax flattens what is behind its axis."""
    for axis in (1, 2, -1):
        g = Graph(11)
        x = g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)
        g.output(g.op("Softmax", x, axis=axis), ["N", 8, 2])
        optimised(g, GIVEN, tolerance=1e-6)


def test_dropout_mask() -> None:
    """The second output of an operator that is taken for elementwise."""
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)
    y, mask = g.ops("Dropout", 2, x)
    g.output(y, ["N", 8, 2])
    g.output(mask, ["N", 8, 2], BOOL)
    optimised(g, GIVEN)


ACROSS: dict[str, Op] = {
    "softmax": of_rows("Softmax", axis=0),
    "cumulative sum": lambda g, x: g.op("CumSum", x, g.const(0, np.int64)),
    "centred": lambda g, x: g.op("Sub", x, g.on_axes("ReduceMax", x, [0])),
    "sorted": lambda g, x: g.ops("TopK", 2, x, g.op("Slice", g.op("Shape", x), g.ints(0), g.ints(1)), axis=0)[0],
    "lp norm": of_rows("LpNormalization", axis=0, p=1),
    "best": lambda g, x: g.op("Cast", g.op("ArgMax", x, axis=0), to=FLOAT),
    "all": lambda g, x: g.op("Add", x, g.op("ReduceSum", x, keepdims=0)),
    "other rows": lambda g, x: g.op("Gather", x, g.op("ArgMax", x, axis=0, keepdims=0), axis=0),
    "batch norm of rows as channels": lambda g, x: g.op(
        "Transpose", g.op("LayerNormalization", g.op("Transpose", x, perm=[1, 2, 0]), g.const([1.0])), perm=[2, 0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("level", ["request", "mixed", "candidate"])
@pytest.mark.parametrize("name", ACROSS)
def test_operators_across_candidates(name: str, level: str) -> None:
    """Operators along the candidate axis run on all rows, even those of the request, and say so."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    x = {"request": u, "mixed": g.op("Concat", u, c, axis=1), "candidate": c}[level]
    g.output(ACROSS[name](g, g.op("Relu", x)), None)
    g.output(g.op("Neg", g.op("Add", u, c)), ["N", 4, 2])
    result = optimised(g, GIVEN, counts=(1, 2, 5), tolerance=1e-6)
    if level != "candidate":
        assert "candidate" in refusals(result) or "on all of them" in refusals(result)


def test_random_operators() -> None:
    """Noise is drawn for every row, though all rows it is drawn for are equal."""
    for kind in ("RandomUniformLike", "RandomNormalLike", "Bernoulli"):
        g = Graph()
        u, c = (i.declare(g) for i in GIVEN)
        half = g.op("Add", g.op("Mul", u, g.const(0)), g.const(0.5))
        g.output(g.op("Add", g.op(kind, half, seed=1.0), g.op("Mul", c, g.const(0))), ["N", 4, 2])
        result = rewritten(g.model(), request=["u"])
        _, new = feeds(GIVEN, 64)
        ((_, got),) = run(result.model, new if result.changed else feeds(GIVEN, 64)[0]).items()
        assert got.shape == (64, 4, 2)
        assert (got != got[:1]).any(), kind


def test_dropout_in_training() -> None:
    """Dropout that does drop is random: rows of the request differ behind it."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    dropped = g.op("Dropout", g.op("Exp", u), g.const(0.5), g.const(True, bool), seed=1)
    g.output(g.op("Add", dropped, g.op("Mul", c, g.const(0))), ["N", 4, 2])
    result = rewritten(g.model(), request=["u"])
    ((_, got),) = run(result.model, feeds(GIVEN, 64)[int(result.changed)]).items()
    assert (got != got[:1]).any()


def test_unknown_operator() -> None:
    """An operator of another domain gets all its rows back."""
    given = [request("u", 3), candidate("c", 3)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    (y,) = g.ops("Mystery", 1, g.op("Relu", u), domain="my.ops")
    g.output(g.op("Mul", y, c), ["N", 3])
    g.output(g.op("Mul", g.op("Relu", u), c), ["N", 3])
    graph = helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.initializers)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)], ir_version=10
    )
    result = rewritten(model, request=["u"])
    assert "Mystery is not known to treat rows independently" in refusals(result)
    (node,) = (n for n in result.model.graph.node if n.op_type == "Mystery")
    (source,) = (n for n in result.model.graph.node if node.input[0] in n.output)
    assert source.op_type == "Expand"


def test_branches() -> None:
    """An `If` on data whose bodies read tensors of both levels from outside."""
    given = [request("u", 3), candidate("c", 3)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    tower = g.op("Relu", u)
    out = [helper.make_tensor_value_info(n, FLOAT, None) for n in ("then_out", "else_out")]
    then = helper.make_graph([helper.make_node("Add", [tower, c], ["then_out"])], "t", [], out[:1])
    other = helper.make_graph([helper.make_node("Mul", [tower, c], ["else_out"])], "e", [], out[1:])
    test = g.op("Greater", g.op("ReduceMax", c, keepdims=0), g.const(2.5))
    y = g.op("If", test, then_branch=then, else_branch=other)
    g.output(g.op("Concat", y, tower, axis=1), ["N", 6])
    optimised(g, given, counts=(1, 2, 5))


def test_request_level_output() -> None:
    """Outputs have all their rows, under their names, even where all rows are equal; node names stay unique."""
    given = [request("u", 3), candidate("c", 2)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    y = g.op("Relu", u)
    g.output(y, ["N", 3])
    g.output(g.op("Neg", y), ["N", 3])
    g.output(g.op("Concat", y, c, axis=1), ["N", 5])
    result = optimised(g, given)
    names = [n.name for n in result.model.graph.node]
    assert len(set(names)) == len(names)


def test_output_read_at_its_shape() -> None:
    """A request-level output whose rows are also reshaped by a shape computed at run time."""
    given = [request("u", 3), candidate("c", 2)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    y = g.on_axes("ReduceMax", g.op("Neg", u), [1], keepdims=1)
    count = g.op("Gather", g.op("Shape", c), g.ints(0), axis=0)
    g.output(y, ["N", 1])
    g.output(g.op("Reshape", y, g.op("Concat", count, g.ints(1), axis=0)), ["N", 1])
    optimised(g, given, counts=(1, 2, 5))


def test_rows_merged_with_fields() -> None:
    """[N * 2]: rows that are all equal do not broadcast against others once they are merged with another axis."""
    given = [request("u", 2), candidate("c", 2)]
    g = Graph()
    u, c = (g.op("Reshape", i.declare(g), g.ints(-1)) for i in given)
    g.output(g.op("Add", g.op("Relu", u), c), ["rows"])
    optimised(g, given)


def test_candidates_against_positions_of_all() -> None:
    """[N, 5, 1] with [N * L]: of a result with two axes of candidates nothing is divided, and nothing fails."""
    given = [request("u", 4), request("h", "L"), candidate("c", 5)]
    g = Graph()
    u, h, c = (i.declare(g) for i in given)
    pairs = g.op("Sub", g.op("Unsqueeze", c, g.ints(2)), g.op("Reshape", h, g.ints(-1)))
    y = g.op("Add", c, g.on_axes("ReduceMax", pairs, [2], keepdims=0))
    g.output(g.op("Concat", y, g.op("Relu", u), axis=1), ["N", 9])
    result = optimised(g, given, counts=(1, 2, 5), lengths=({"L": 1}, {"L": 7}))
    assert result.changed and "internal error" not in refusals(result)


@pytest.mark.parametrize("kind", ["float", "all nan", "int"])
def test_guard(kind: str) -> None:
    """Under `same`, rows that differ give NaN; rows that agree in being NaN do not count as different."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    g.output(g.op("Where", g.op("IsNaN", u), c, g.op("Add", g.op("Relu", u), c)), ["N", 4, 2])
    model = g.model()
    old, _ = feeds(GIVEN, 5)
    made = rewritten(model, request=patterns(GIVEN), interface="same").model
    bare = rewritten(model, request=patterns(GIVEN), interface="same", guard=False).model
    (want,) = run(model, old).values()
    if kind == "float":
        for value in (want[0, 0, 0], np.nan, np.inf):
            bad = {**old, "u": old["u"].copy()}
            bad["u"][4, 3, 1] = value if value != old["u"][0, 3, 1] else 99
            assert all(np.isnan(v).all() for v in run(made, bad).values())
            assert not any(np.isnan(v).any() for v in run(bare, bad).values())
    elif kind == "all nan":
        same = {**old, "u": np.full_like(old["u"], np.nan)}
        np.testing.assert_array_equal(next(iter(run(made, same).values())), next(iter(run(model, same).values())))
    else:
        given = [request("i", 2, ids=9), candidate("d", 2)]
        g = Graph()
        i, d = (x.declare(g) for x in given)
        g.output(g.op("Add", g.op("Relu", g.op("Cast", i, to=FLOAT)), d), ["N", 2])
        made = rewritten(g.model(), request=["i"], interface="same").model
        rows_, _ = feeds(given, 5)
        assert not np.isnan(next(iter(run(made, rows_).values()))).any()
        rows_["i"] = rows_["i"].copy()
        rows_["i"][2, 1] += 1
        assert np.isnan(next(iter(run(made, rows_).values()))).all()


def test_again_under_same() -> None:
    """A model that was optimised under `same` is left alone when it is optimised once more, with or without roles."""
    given = [request("u", 3), request("i", ids=5), candidate("c", 2)]
    g = Graph()
    u, i, c = (x.declare(g) for x in given)
    looked_up = g.op("Gather", g.const(whole_numbers(5, 2)), i, axis=0)
    g.output(g.op("Concat", g.op("Relu", u), g.op("Neg", looked_up), c, axis=1), ["N", 7])
    made = rewritten(g.model(), request=patterns(given), interface="same").model
    for roles in (patterns(given), []):
        again = onnxrank.optimize(made, request=roles, interface="same", check=False)
        assert again.model.SerializeToString() == made.SerializeToString()


def test_rows_of_one_request_taken_by_the_model() -> None:
    """Ids of which the model itself takes the first row are fed inside their table."""
    g = Graph()
    i, c = g.input("i", ["N", 2], INT64), g.input("c", ["N", 2])
    first = g.op("Slice", i, g.ints(0), g.ints(1), g.ints(0))
    looked_up = g.op("Gather", g.const(whole_numbers(3, 2)), first, axis=0)
    g.output(g.op("Add", g.op("Relu", g.on_axes("ReduceSum", looked_up, [1], keepdims=0)), c), ["N", 2])
    onnx.checker.check_model(rewritten(g.model(), request=["i"]).model)


def test_scalars() -> None:
    """A tensor without dimensions, picked out of others, in elementwise steps."""
    given = [Given("o", (), "once"), request("u", 3), candidate("c", 3)]
    g = Graph()
    o, u, c = (i.declare(g) for i in given)
    picked = g.op("Gather", g.op("Expand", o, g.ints(4)), g.const(2, np.int64), axis=0)
    y = g.op("Where", g.op("Greater", picked, g.const(0)), g.op("Add", picked, g.op("Neg", u)), c)
    g.output(y, ["N", 3])
    optimised(g, given)


@pytest.mark.parametrize("level", ["request", "candidate"])
@pytest.mark.parametrize(
    "op", ["Softmax", "LogSoftmax", "CumSum", "LpNormalization", "TopK", "ArgMax", "Gather", "Trilu"]
)
def test_along_a_length_that_does_not_matter(op: str, level: str) -> None:
    """Operators along a history of what is the same at all of its positions see that many."""
    given = [request("h", "L", 4), request("u", 4), candidate("c", 4)]
    g = Graph()
    h, u, c = (i.declare(g) for i in given)
    size = g.op("Gather", g.op("Shape", h), g.ints(1), axis=0)
    x = g.on_axes("Unsqueeze", g.op("Relu", u) if level == "request" else c, [1])
    x = g.op("Expand", x, g.op("Concat", g.ints(1), size, g.ints(1), axis=0))
    if op == "CumSum":
        y = g.op(op, x, g.const(1, np.int64))
    elif op == "TopK":
        y = g.ops(op, 2, x, g.ints(1), axis=1)[0]
    elif op == "Gather":
        y = g.op(op, x, g.op("Sub", size, g.ints(1)), axis=1)
    elif op == "Trilu":
        y = g.op(op, x)
    else:
        y = g.op(op, x, axis=1)
    y = g.op("Cast", y, to=1) if op == "ArgMax" else y
    g.output(g.op("Add", g.on_axes("ReduceSum", y, [1], keepdims=0), c), ["N", 4])
    optimised(g, given, counts=(1, 2, 5), tolerance=1e-6, lengths=({"L": 1}, {"L": 5}, {"L": 50}))


@pytest.mark.parametrize("perm", [[0, 1, 2], [0, 2, 1], [1, 0, 2]])
@pytest.mark.parametrize("op", ["QuantizeLinear", "Clip"])
def test_scalars_stay_scalars(op: str, perm: list[int]) -> None:
    """Scales and bounds have no dimensions, however the operand's are turned and split."""
    given = [request("u", 2, 4), candidate("c", 3, 4)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    x = g.op("Transpose", g.op("Concat", g.op("Relu", u), c, axis=1), perm=perm)
    if op == "Clip":
        y = g.op(op, x, g.const(-1.0), g.const(2.0))
    else:
        scale, zero = g.const(0.5), g.const(3, np.uint8)
        y = g.op("DequantizeLinear", g.op(op, x, scale, zero), scale, zero)
    y = g.op("Reshape", g.op("Transpose", y, perm=list(np.argsort(perm))), g.ints(-1, 20))
    g.output(g.op("MatMul", y, g.const(whole_numbers(20, 3))), ["N", 3])
    optimised(g, given, counts=(1, 2, 5))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("slope", ["request", "candidate", "mixed", "narrow", "constant"])
@pytest.mark.parametrize("level", ["request", "candidate", "mixed"])
def test_slopes(level: str, slope: str, dtype: type) -> None:
    """PRelu broadcasts its slopes to what it works on, and never that to its slopes."""
    given = [request("u", 3, 4), candidate("c", 3, 4)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    kind = 1 if dtype is np.float32 else 11
    u, c = g.op("Cast", g.op("Neg", u), to=kind), g.op("Cast", c, to=kind)
    parts = {"request": [u, u], "candidate": [c, c], "mixed": [u, c]}
    x = g.op("Concat", *parts[level], axis=1)
    if slope == "constant":
        s = g.const(whole_numbers(6, 1), dtype)
    elif slope == "narrow":
        s = g.on_axes("ReduceSum", c, [1], keepdims=1)
    else:
        s = g.op("Concat", *parts[slope], axis=1)
    g.output(g.op("Cast", g.op("PRelu", x, s), to=1), ["N", 6, 4])
    g.output(g.op("MatMul", g.op("Cast", x, to=1), g.const(whole_numbers(4, 2))), ["N", 6, 2])
    optimised(g, given, counts=(1, 2, 5))


def test_custom_domain() -> None:
    """`com.acme::Relu` is no elementwise operator: it gets all rows."""
    given = [request("u", 4), candidate("c", 4)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    x = g.ops("Relu", 1, g.op("Tanh", u), domain="com.acme")[0]
    g.output(g.op("Add", x, c), ["N", 4])
    assert "com.acme::Relu is not known" in refusals(rewritten(g.model(), request=["u"]))


@pytest.mark.parametrize("start", [0, 1])
def test_positions_of_a_length_are_cut(start: int) -> None:
    """The rows 0, 1, 2, ... of a table are the first ones of it."""
    given = [request("h", "L", 4), candidate("c", 4)]
    g = Graph()
    h, c = (i.declare(g) for i in given)
    length = g.op("Gather", g.op("Shape", h), g.const(1, np.int64), axis=0)
    end = g.op("Add", length, g.const(start, np.int64))
    at = g.op("Range", g.const(start, np.int64), end, g.const(1, np.int64))
    rows = g.op("Gather", g.const(whole_numbers(64, 4)), at, axis=0)
    pooled = g.on_axes("ReduceSum", g.op("Relu", g.op("Add", h, rows)), [1], keepdims=0)
    g.output(g.op("Mul", pooled, c), ["N", 4])
    result = optimised(g, given, lengths=[{"L": n} for n in (0, 1, 2, 61)])
    kinds = operators(result.model)
    assert ("Gather" not in kinds and "Range" not in kinds) == (start == 0)
