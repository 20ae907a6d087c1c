"""`norm`: LayerNorm and BatchNorm over blocks of several levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from helpers import (
    Given,
    Graph,
    candidate,
    feeds,
    optimised,
    refusals,
    request,
    rewritten,
    rows,
    rules,
    run,
    whole_numbers,
)
from numpy.typing import NDArray

N = 512
USER, ITEM, OUT = 96, 32, 64
EPSILON = 1e-5
GIVEN = [request("u", USER), candidate("c", ITEM)]
RNG = np.random.default_rng(0)
GAMMA, BETA = RNG.normal(1, 0.3, USER + ITEM).astype(np.float32), RNG.normal(0, 1, USER + ITEM).astype(np.float32)
WEIGHT = (RNG.normal(0, 1, (USER + ITEM, OUT)) / 11).astype(np.float32)


def operator(g: Graph, x: str, affine: bool) -> str:
    operands = [g.const(GAMMA), g.const(BETA)] if affine else [g.const(np.ones_like(GAMMA))]
    return g.op("LayerNormalization", x, *operands, axis=-1, epsilon=EPSILON)


def written_out(g: Graph, x: str, affine: bool, square: str = "Pow") -> str:
    centred = g.op("Sub", x, g.on_axes("ReduceMean", x, [-1], keepdims=1))
    power = g.op("Pow", centred, g.const(2)) if square == "Pow" else g.op("Mul", centred, centred)
    variance = g.on_axes("ReduceMean", power, [-1], keepdims=1)
    y = g.op("Div", centred, g.op("Sqrt", g.op("Add", variance, g.const(EPSILON))))
    return g.op("Add", g.op("Mul", y, g.const(GAMMA)), g.const(BETA)) if affine else y


def multiplied(g: Graph, x: str, affine: bool) -> str:
    return written_out(g, x, affine, "Mul")


FORMS = {
    "operator": (operator, 17),
    "written out": (written_out, 14),
    "multiplied": (multiplied, 17),
    "new": (operator, 20),
}


def build(form: str, affine: bool = True, relu: bool = False) -> Graph:
    how, opset = FORMS[form]
    g = Graph(opset)
    x = g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)
    y = how(g, x, affine)
    g.output(g.op("Gemm", y, g.const(WEIGHT), g.const(BETA[:OUT])), ["N", OUT])
    if relu:
        g.output(g.op("Relu", y), ["N", USER + ITEM])
    return g


def truth(x: NDArray[Any], affine: bool) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    if affine:
        y = y * GAMMA.astype(np.float64) + BETA.astype(np.float64)
    return y @ WEIGHT.astype(np.float64) + BETA[:OUT].astype(np.float64)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_layer_norm_ahead_of_a_layer(form: str, affine: bool) -> None:
    """The request-level columns of the product are multiplied once."""
    result = optimised(build(form, affine), GIVEN, counts=(1, 2, 5), tolerance=1e-5)
    assert rules(result)["norm"] >= 1
    assert result.report.before["candidate"].macs == N * (USER + ITEM) * OUT
    assert result.report.after["candidate"].macs <= N * (ITEM + 2) * OUT + N * ITEM


@pytest.mark.parametrize("form", FORMS)
def test_layer_norm_read_twice(form: str) -> None:
    """The normalised value is also read by something that is not linear."""
    optimised(build(form, relu=True), GIVEN, counts=(1, 2, 5), tolerance=1e-5)


SCALES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "plain": ((0, 1), (0, 1)),
    "large mean": ((1e3, 1), (1e3, 1)),
    "means apart": ((1e3, 1), (-1e3, 1)),
    "tiny deviation": ((100, 1e-3), (100, 1e-3)),
    "constant": ((5, 0), (5, 0)),
    "zero": ((0, 0), (0, 0)),
    "one part dominates": ((0, 1e-3), (0, 1e3)),
    "the other dominates": ((0, 1e3), (0, 1e-3)),
    "large": ((0, 1e6), (0, 1e6)),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("form", FORMS)
def test_layer_norm_is_as_accurate(form: str, scale: str) -> None:
    """No cancellation: at most twice the original's own distance from float64, and a few units of rounding."""
    model = build(form).model()
    result = rewritten(model, request=["u"])
    assert "norm" in rules(result)
    (mu, su), (mc, sc) = SCALES[scale]
    rng = np.random.default_rng(1)
    for _ in range(3):
        u = rng.normal(mu, su, (1, USER)).astype(np.float32)
        c = rng.normal(mc, sc, (17, ITEM)).astype(np.float32)
        wide = np.repeat(u, 17, 0)
        exact = truth(np.concatenate([wide, c], 1), True)
        (before,) = run(model, {"u": wide, "c": c}).values()
        (after,) = run(result.model, {"u": u, "c": c}).values()
        own, mine = np.abs(before - exact).max(), np.abs(after - exact).max()
        assert mine <= 2 * own + 32 * 2**-23 * np.abs(exact).max(), (own, mine)


def test_layer_norm_of_fields() -> None:
    """[N, L, d] with the request's part broadcast along L, normalised over the last axis."""
    given = [request("u", USER), candidate("c", 4, ITEM)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    wide = g.op("Expand", g.on_axes("Unsqueeze", u, [1]), g.ints(1, 4, USER))
    y = operator(g, g.op("Concat", wide, c, axis=2), True)
    g.output(g.op("MatMul", y, g.const(WEIGHT)), ["N", 4, OUT])
    optimised(g, given, tolerance=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_layer_norm_over_rows_of_one_level(axis: int) -> None:
    """[N, fields, d] normalised within each field: the request's fields once. Over the fields too: refused."""
    given = [request("u", 3, 8), candidate("c", 2, 8)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    shape = (8,) if axis == 2 else (5, 8)
    y = g.op("LayerNormalization", x, g.const(np.ones(shape)), g.const(np.full(shape, 0.5)), axis=axis)
    g.output(g.op("Relu", y), ["N", 5, 8])
    result = optimised(g, given, tolerance=1e-6)
    assert "norm" not in rules(result)
    assert ("broadcast" in rules(result)) == (axis == 2)


@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("shape", [(5, 8), (1, 5, 8), (5, 1)])
@pytest.mark.parametrize("counts", [(5, 0), (3, 2)])
def test_norm_with_a_scale_for_each_row(op: str, shape: tuple[int, ...], counts: tuple[int, int]) -> None:
    """Rows of the request and of candidates stay together, each at its place; the request alone is made once."""
    given = [request("u", counts[0], 8), candidate("c", *([counts[1], 8] if counts[1] else [5, 8]))]
    g = Graph(23)
    u, c = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1) if counts[1] else u
    y = g.op("MatMul", g.op(op, x, g.const(whole_numbers(*shape))), g.const(whole_numbers(8, OUT)))
    g.output(y if counts[1] else g.op("Add", y, g.op("MatMul", c, g.const(whole_numbers(8, OUT)))), ["N", 5, OUT])
    result = optimised(g, given, counts=(0, 1, 5, 40), tolerance=1e-6)
    assert ("broadcast" in rules(result)) == (not counts[1])
    assert ("takes in request-level and candidate-level entries together" in refusals(result)) == bool(counts[1])


@pytest.mark.parametrize("shape", [(USER + ITEM,), (4, USER + ITEM)])
def test_layer_norm_of_columns_with_a_scale_for_each_row(shape: tuple[int, ...]) -> None:
    """Columns of the request and of candidates: only where every row has the same scale can it be folded."""
    given = [request("u", 4, USER), candidate("c", 4, ITEM)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=2)
    y = g.op("LayerNormalization", x, g.const(whole_numbers(*shape)))
    g.output(g.op("MatMul", y, g.const(WEIGHT)), ["N", 4, OUT])
    result = optimised(g, given, tolerance=1e-5)
    assert ("norm" in rules(result)) == (len(shape) == 1)
    assert "internal error" not in refusals(result)


def test_layer_norm_without_a_layer_behind() -> None:
    """Nothing linear reads the result, so the split does not pay."""
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)
    g.output(g.op("Relu", operator(g, x, True)), ["N", USER + ITEM])
    assert "norm" not in rules(optimised(g, GIVEN, tolerance=1e-6))


def test_layer_norm_too_small() -> None:
    """Nor does it for a few columns."""
    given = [request("u", 4), candidate("c", 4)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    y = g.op("LayerNormalization", x, g.const(np.ones(8)), axis=-1)
    g.output(g.op("MatMul", y, g.const(whole_numbers(8, 2))), ["N", 2])
    assert "norm" not in rules(optimised(g, given, tolerance=1e-5))


def test_not_a_layer_norm() -> None:
    """Likenesses of the written-out form: another exponent, other means, an axis too few."""

    def other(g: Graph, x: str, kind: str) -> str:
        mean = g.on_axes("ReduceMean", x, [-1], keepdims=1)
        centred = g.op("Sub", x, mean)
        power = g.op("Pow", g.op("Abs", centred), g.const(3 if kind == "cubed" else 2))
        if kind == "uncentred":
            power = g.op("Pow", x, g.const(2))
        variance = g.on_axes("ReduceMean", power, [-1], keepdims=1)
        if kind == "max":
            variance = g.on_axes("ReduceMax", power, [-1], keepdims=1)
        if kind == "shifted":
            centred = g.op("Sub", x, g.on_axes("ReduceMax", x, [-1], keepdims=1))
        return g.op("Div", centred, g.op("Sqrt", g.op("Add", variance, g.const(EPSILON))))

    for kind in ("cubed", "uncentred", "max", "shifted"):
        g = Graph()
        x = g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)
        g.output(g.op("MatMul", other(g, x, kind), g.const(WEIGHT)), ["N", OUT])
        result = optimised(g, GIVEN, counts=(1, 2, 5), tolerance=1e-5)
        assert "norm" not in rules(result), kind


def parameters(g: Graph, count: int) -> list[str]:
    """Scale, bias, mean and a variance that has an exact root."""
    rng = np.random.default_rng(2)
    data = [
        rng.integers(-2, 3, count),
        rng.integers(-2, 3, count),
        rng.integers(-2, 3, count),
        4.0 ** rng.integers(-1, 2, count),
    ]
    return [g.const(d) for d in data]


@pytest.mark.parametrize("trail", [(), (3,), (2, 3)])
def test_batch_norm(trail: tuple[int, ...]) -> None:
    """Channels of both levels, of [N, C], [N, C, L] and images: the request's channels once, exactly."""
    given = [request("u", 3, *trail), candidate("c", 5, *trail)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    g.output(g.op("BatchNormalization", x, *parameters(g, 8), epsilon=0.0), ["N", 8, *trail])
    result = optimised(g, given)
    extents = rows(result, given, 50)
    parts = [n for n in result.model.graph.node if n.op_type == "BatchNormalization"]
    assert sorted(extents[n.output[0]] == 50 for n in parts) == [False, True]


def test_batch_norm_between_layers() -> None:
    """Concat, BatchNorm, layer: the normalisation does not stand in the way."""
    given = [request("u", 6), candidate("c", 3)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    y = g.op("BatchNormalization", x, *parameters(g, 9), epsilon=0.0)
    g.output(g.op("MatMul", y, g.const(whole_numbers(9, 4))), ["N", 4])
    assert optimised(g, given).report.macs_after == (6 + N * 3) * 4


def test_batch_norm_over_permuted_channels() -> None:
    """Channels that alternate between levels, the parameters with them."""
    given = [request("u", 4), candidate("c", 4)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    x = g.op("Gather", x, g.ints(7, 0, 6, 1, 1, 5), axis=1)
    g.output(g.op("BatchNormalization", x, *parameters(g, 6), epsilon=0.0), ["N", 6])
    optimised(g, given)


def test_batch_norm_with_levels_on_another_axis() -> None:
    """[N, C, L] of both levels along L."""
    given = [request("u", 3, 2), candidate("c", 3, 4)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=2)
    g.output(g.op("BatchNormalization", x, *parameters(g, 3), epsilon=0.0), ["N", 3, 6])
    optimised(g, given)


def turned(length: int | str, how: str = "", level: str = "candidate") -> tuple[Graph, list[Given]]:
    """Channels brought to the front for a normalisation, an activation of both, and back again."""
    g = Graph()
    given = [request("u", length, 4), candidate("c", length, 4), candidate("d", 3)]
    u, c, d = (i.declare(g) for i in given)
    x = g.op("MatMul", u, g.const(whole_numbers(4, 4, seed=1)))
    x = g.op("Relu", x if level == "request" else g.op("Add", x, c))
    t = g.op("Transpose", x, perm=[0, 2, 1])
    b = g.op("BatchNormalization", t, *parameters(g, 4), epsilon=0.0)
    y = g.op("Add", g.op("Mul", g.op("Relu", b), t), g.const(np.arange(4.0).reshape(4, 1)))
    z = g.op("Transpose", y, perm=[1, 2, 0] if how == "elsewhere" else [0, 2, 1])
    if how == "elsewhere":
        z = g.op("Transpose", z, perm=[2, 1, 0])
    z = g.op("MatMul", z, g.const(whole_numbers(4, 3)))
    if how == "summed":
        z = g.op("Add", z, g.on_axes("ReduceMax", t, [1, 2], keepdims=1))
    z = g.op("Mul", g.on_axes("ReduceSum", z, [1], keepdims=0), d)
    g.output(z, ["N", 3])
    return g, given


@pytest.mark.parametrize("level", ["candidate", "request"])
@pytest.mark.parametrize("length", [5, 2, 1, "L"])
def test_batch_norm_of_channels_that_are_brought_to_the_front_and_back(length: int | str, level: str) -> None:
    """Candidates' rows are normalised as they lie, and nothing is turned; what is the request's may be."""
    g, given = turned(length, level=level)
    lengths = [{"L": n} for n in (0, 1, 2, 33)] if length == "L" else [{}]
    result = optimised(g, given, counts=(0, 1, 2, 7, 90), lengths=lengths)
    kinds = [n.op_type for n in result.model.graph.node]
    assert kinds.count("BatchNormalization") == 1
    assert "Transpose" not in kinds or level == "request" or length == 1


@pytest.mark.parametrize("how", ["elsewhere", "summed"])
def test_channels_that_are_read_as_they_are_stay_in_front(how: str) -> None:
    g, given = turned(5, how)
    result = optimised(g, given, counts=(0, 1, 2, 7, 90))
    assert "Transpose" in [n.op_type for n in result.model.graph.node]


def test_batch_norm_of_candidates_as_channels() -> None:
    """A single row of which the candidates are the channels is not ours to divide."""
    given = [request("u", 3), candidate("c", 3)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    x = g.op("Transpose", g.op("Add", g.op("Relu", u), c), perm=[1, 0])
    y = g.op("MeanVarianceNormalization", g.op("Reshape", x, g.ints(1, 3, -1)), axes=[0, 2])
    g.output(g.op("Identity", y), [1, 3, "N"])
    optimised(g, given, counts=(1, 2, 5), tolerance=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_padded(form: str) -> None:
    """Zeros beside the entries of both levels count in mean and variance."""
    how, opset = FORMS[form]
    g = Graph(opset)
    x = g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)
    x = g.op("Pad", g.op("Slice", x, g.ints(0), g.ints(USER + ITEM - 16), g.ints(1)), g.ints(0, 7, 0, 9))
    g.output(g.op("MatMul", how(g, x, True), g.const(WEIGHT)), ["N", OUT])
    optimised(g, GIVEN, counts=(1, 2, 5), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_epsilon_is_kept(dtype: type) -> None:
    """What is written out stays such that onnxruntime, which fuses it, keeps its epsilon."""
    given, rng = [request("u", 4), candidate("c", 6)], np.random.default_rng(1)
    g = Graph(15)
    x = g.op("Cast", g.op("Concat", *(i.declare(g) for i in given), axis=1), to=1 if dtype is np.float32 else 11)
    x = g.op("Mul", x, g.const(0.05, dtype))
    centred = g.op("Sub", x, g.on_axes("ReduceMean", x, [-1], keepdims=1))
    variance = g.on_axes("ReduceMean", g.op("Pow", centred, g.const(2, dtype)), [-1], keepdims=1)
    y = g.op("Div", centred, g.op("Sqrt", g.op("Add", variance, g.const(0.1, dtype))))
    y = g.op("Add", g.op("Mul", y, g.const(rng.normal(size=10), dtype)), g.const(rng.normal(size=10), dtype))
    g.output(g.op("Cast", g.op("MatMul", y, g.const(rng.normal(size=(10, 3)), dtype)), to=1), ["N", 3])
    model = g.model()
    result = rewritten(model, request=["u"])
    old, new = feeds(given, 5)
    want, got = run(model, old), onnxruntime.InferenceSession(result.model.SerializeToString())
    names = [o.name for o in result.model.graph.output]
    for name, score in zip(names, got.run(names, new if result.changed else old), strict=True):
        np.testing.assert_allclose(score, want[name], rtol=0, atol=1e-5)
