"""`fc`: linear maps with constant weights over blocks of several levels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import (
    Graph,
    candidate,
    operators,
    optimised,
    patterns,
    refusals,
    request,
    rewritten,
    rules,
    run,
    whole_numbers,
)
from onnx import helper

import onnxrank

N = 512
USER, ITEM = 6, 3
GIVEN = [request("u", USER), candidate("c", ITEM)]


def joined(opset: int = 17) -> tuple[Graph, str]:
    g = Graph(opset)
    names = [i.declare(g) for i in GIVEN]
    return g, g.op("Concat", *names, axis=1)


def matmul(g: Graph, x: str, w: np.ndarray) -> str:
    return g.op("MatMul", x, g.const(w))


def biased(g: Graph, x: str, w: np.ndarray) -> str:
    return g.op("Add", matmul(g, x, w), g.const(whole_numbers(w.shape[1], seed=9)))


def gemm(g: Graph, x: str, w: np.ndarray) -> str:
    return g.op("Gemm", x, g.const(w), g.const(whole_numbers(w.shape[1], seed=9)))


def turned_gemm(g: Graph, x: str, w: np.ndarray) -> str:
    return g.op("Gemm", x, g.const(w.T), g.const(whole_numbers(1, w.shape[1], seed=9)), transB=1)


def einsum(g: Graph, x: str, w: np.ndarray) -> str:
    return g.op("Einsum", x, g.const(w.T), equation="nk,ok->no")


def left(g: Graph, x: str, w: np.ndarray) -> str:
    y = g.op("MatMul", g.const(w.T), g.on_axes("Unsqueeze", x, [2]))
    return g.on_axes("Squeeze", y, [2])


def conv(g: Graph, x: str, w: np.ndarray) -> str:
    bias = g.const(whole_numbers(w.shape[1], seed=9))
    y = g.op("Conv", g.on_axes("Unsqueeze", x, [2]), g.const(w.T[:, :, None]), bias, kernel_shape=[1])
    return g.on_axes("Squeeze", y, [2])


@pytest.mark.parametrize("opset", [11, 17, 20])
@pytest.mark.parametrize("form", [matmul, biased, gemm, turned_gemm, einsum, left, conv])
def test_forms(form: Callable[[Graph, str, np.ndarray], str], opset: int) -> None:
    """Every way of writing the layer is divided, and the request-level part is made once."""
    if form is einsum and opset < 12:
        pytest.skip("Einsum is of opset 12")
    g, x = joined(opset)
    g.output(form(g, x, whole_numbers(USER + ITEM, 4)), ["N", 4])
    result = optimised(g, GIVEN)
    assert rules(result)["fc"] == 1
    assert result.report.macs_before == N * (USER + ITEM) * 4
    assert result.report.macs_after == (USER + N * ITEM) * 4


def test_gemm_chain() -> None:
    """The request-level product rides in the candidate-level Gemm's C, so no row-wise addition is left."""
    g, x = joined()
    g.output(g.op("Relu", biased(g, x, whole_numbers(9, 4))), ["N", 4])
    result = optimised(g, GIVEN)
    assert sorted(operators(result.model)) == ["Gemm", "Gemm", "Relu"]
    first, second = (n for n in result.model.graph.node if n.op_type == "Gemm")
    assert second.input[2] == first.output[0]


def test_residual_chain() -> None:
    """A bias and the request-level product ride in the product; a residual of every row is added to every row."""
    given = [request("u", USER), candidate("c", ITEM), candidate("r", 4)]
    g = Graph()
    u, c, r = (i.declare(g) for i in given)
    y = biased(g, g.op("Concat", u, c, axis=1), whole_numbers(USER + ITEM, 4))
    g.output(g.op("Relu", g.op("Add", r, y)), ["N", 4])
    result = optimised(g, given)
    assert operators(result.model) == ["Gemm", "Gemm", "Add", "Relu"]
    first, second, added, _ = result.model.graph.node
    assert second.input[2] == first.output[0] and sorted(added.input) == sorted(["r", second.output[0]])


def test_interleaved_blocks() -> None:
    """Many segments of alternating level: one product per level, no segment moved at run time but to be joined."""
    given = [*(request(f"u{k}", 2) for k in range(4)), *(candidate(f"c{k}", 3) for k in range(4))]
    g = Graph()
    names = [i.declare(g) for i in given]
    x = g.op("Concat", *(names[k + at] for k in range(4) for at in (0, 4)), axis=1)
    g.output(matmul(g, x, whole_numbers(20, 5)), ["N", 5])
    result = optimised(g, given)
    assert sum(op in ("MatMul", "Gemm") for op in operators(result.model)) == 2
    assert not {"Gather", "Slice", "Transpose"} & set(operators(result.model))
    assert result.report.macs_after == (8 + N * 12) * 5


def test_same_block_twice() -> None:
    """Equal columns share one row of the weights."""
    g = Graph()
    u, c = (i.declare(g) for i in GIVEN)
    x = g.op("Concat", c, u, c, axis=1)
    g.output(matmul(g, x, whole_numbers(2 * ITEM + USER, 4)), ["N", 4])
    result = optimised(g, GIVEN)
    assert result.report.after["candidate"].macs == N * ITEM * 4
    assert result.report.after["request"].macs == USER * 4


def test_fields_flattened_and_permuted() -> None:
    """[N, fields, d] of both levels, transposed and flattened: the order goes into the weights."""
    given = [request("u", 4, 2), candidate("c", 3, 2)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    x = g.op("Flatten", g.op("Transpose", x, perm=[0, 2, 1]))
    g.output(matmul(g, x, whole_numbers(14, 5)), ["N", 5])
    result = optimised(g, given)
    assert result.report.macs_after == (8 + N * 6) * 5
    assert {"Transpose", "Gather"} & set(operators(result.model)) == set()


def test_more_axes() -> None:
    """A layer on [N, L, k] with the request's part broadcast along L."""
    given = [request("u", 4), candidate("c", 5, 3)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    wide = g.op("Expand", g.on_axes("Unsqueeze", u, [1]), g.ints(1, 5, 4))
    g.output(matmul(g, g.op("Concat", wide, c, axis=2), whole_numbers(7, 2)), ["N", 5, 2])
    result = optimised(g, given)
    assert result.report.macs_after == (4 + N * 5 * 3) * 2


def test_several_heads() -> None:
    """Experts and gates on one input: the operands are joined once per level."""
    given = [request("u", 2), request("v", 2), candidate("c", 3)]
    g = Graph()
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    for k in range(3):
        g.output(g.op("Relu", gemm(g, x, whole_numbers(7, 4, seed=k))), ["N", 4])
    result = optimised(g, given)
    assert rules(result)["fc"] == 3
    assert operators(result.model).count("Concat") <= 1
    assert result.report.macs_after == 3 * (4 + N * 3) * 4


def test_gate() -> None:
    """A gate that depends on the request alone is made once."""
    g, x = joined()
    gate = g.op("Relu", matmul(g, "u", whole_numbers(USER, 4, seed=3)))
    g.output(g.op("Mul", matmul(g, x, whole_numbers(9, 4)), gate), ["N", 4])
    assert optimised(g, GIVEN).report.macs_after == (USER + N * ITEM + USER) * 4


def test_two_layers() -> None:
    """The second layer mixes levels, so it stays whole."""
    g, x = joined()
    hidden = g.op("Relu", gemm(g, x, whole_numbers(9, 4)))
    g.output(gemm(g, hidden, whole_numbers(4, 2)), ["N", 2])
    assert optimised(g, GIVEN).report.macs_after == (USER + N * ITEM) * 4 + N * 4 * 2


def test_linear_layers_in_a_row() -> None:
    """Nothing between two layers: the pending sum goes through the second."""
    g, x = joined()
    hidden = gemm(g, x, whole_numbers(9, 4))
    g.output(gemm(g, hidden, whole_numbers(4, 2)), ["N", 2])
    assert optimised(g, GIVEN).report.macs_after <= (USER + N * ITEM) * 4 + N * 4 * 2 + 4 * 2


@pytest.mark.parametrize("readers", [1, 2])
def test_bias_before_layers(readers: int) -> None:
    """A bias that no product can take goes through the layers behind it, and becomes theirs."""
    given = [request("u", 3, 4), candidate("c", 2, 4)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1)
    own = g.op("MatMul", g.on_axes("Unsqueeze", x, [2]), g.const(whole_numbers(5, 4, 4, seed=5)))
    states = g.op("Add", g.on_axes("Squeeze", own, [2]), g.const(whole_numbers(4, seed=6)))
    both = g.op("Concat", states, x, axis=2)
    for k in range(readers):
        g.output(g.op("Relu", biased(g, both, whole_numbers(8, 8, seed=k))), ["N", 5, 8])
    assert "Add" not in operators(optimised(g, given).model)


def test_bias_that_rides_before_a_layer() -> None:
    """What one product takes on its way costs nothing there, and others may read it."""
    g, x = joined()
    hidden = biased(g, x, whole_numbers(9, 40))
    g.output(g.op("Relu", hidden), ["N", 40])
    g.output(biased(g, hidden, whole_numbers(40, 8)), ["N", 8])
    assert optimised(g, GIVEN).report.macs_after == (USER + N * ITEM) * 40 + N * 40 * 8


def test_layer_then_candidates_merged() -> None:
    """A pending sum reshaped so that candidates and columns share an axis."""
    g, x = joined()
    g.output(g.op("Reshape", gemm(g, x, whole_numbers(9, 4)), g.ints(-1)), ["rows"])
    assert "fc" in rules(optimised(g, GIVEN))


def test_layer_and_residual_again() -> None:
    """What a block adds to its own layer leaves nothing for a second run."""
    given = [request("u", 2), candidate("c", 2), candidate("d", 8)]
    g = Graph()
    u, c, d = (i.declare(g) for i in given)
    mixed = g.op("Gather", g.op("Concat", u, c, axis=1), g.ints(0, 2), axis=1)
    y = gemm(g, g.op("Concat", mixed, mixed, d, axis=1), whole_numbers(12, 2))
    g.output(g.op("Add", mixed, y), ["N", 2])
    result = optimised(g, given)
    assert not onnxrank.optimize(result.model, check=False).changed


def test_candidates_only() -> None:
    """Nothing to divide: the input's own bytes."""
    given = [request("u", 2), candidate("c", 3)]
    g = Graph()
    g.op("Identity", given[0].declare(g))
    g.output(gemm(g, given[1].declare(g), whole_numbers(3, 4)), ["N", 4])
    model = g.model()
    result = rewritten(model, request=patterns(given))
    assert not result.changed
    assert result.model.SerializeToString() == model.SerializeToString()


def test_overridable_weights() -> None:
    """Weights that are listed as an input may be replaced by the caller, so they are not known."""
    g, x = joined()
    w = whole_numbers(9, 4)
    weight = g.const(w)
    g.inputs.append(helper.make_tensor_value_info(weight, 1, [9, 4]))
    g.output(g.op("MatMul", x, weight), ["N", 4])
    model = g.model()
    result = rewritten(model, request=["u"])
    assert "fc" not in rules(result)
    rng = np.random.default_rng(0)
    u, c = rng.integers(-3, 4, (1, USER)).astype(np.float32), rng.integers(-3, 4, (5, ITEM)).astype(np.float32)
    for other in ({}, {weight: w + 1}):
        want = run(model, {"u": np.repeat(u, 5, 0), "c": c, **other})
        got = run(result.model, {"u": u if result.changed else np.repeat(u, 5, 0), "c": c, **other})
        for name, score in want.items():
            np.testing.assert_array_equal(got[name], score)


def test_scaled_gemm() -> None:
    """`alpha` and `beta` other than 1 are refused, and still right."""
    g, x = joined()
    g.output(g.op("Gemm", x, g.const(whole_numbers(9, 4)), g.const(whole_numbers(4)), alpha=2.0, beta=0.5), ["N", 4])
    result = optimised(g, GIVEN)
    assert "fc" in rules(result) or "alpha or beta" in refusals(result)


@pytest.mark.parametrize("on_the_right", [False, True])
def test_weights_of_candidates(on_the_right: bool) -> None:
    """A matrix per candidate is no weight."""
    given = [request("u", 1, 3), candidate("c", 3, 2)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    y = g.op("MatMul", u, c) if on_the_right else g.op("MatMul", g.op("Transpose", c, perm=[0, 2, 1]), g.op("Relu", c))
    g.output(y, ["N", None, None])
    result = optimised(g, given, counts=(1, 2, 5))
    assert "fc" not in rules(result)


def test_batched_product_without_candidates() -> None:
    """A product of a matrix per candidate with one of the request, for no candidates."""
    given = [request("u", 5, 4), candidate("c", 2, 5)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    g.output(g.op("MatMul", c, u), ["N", 2, 4])
    g.output(g.op("MatMul", g.op("Transpose", u, perm=[0, 2, 1]), g.op("Transpose", c, perm=[0, 2, 1])), ["N", 4, 2])
    optimised(g, given, counts=(0, 1, 2, 5))


def test_gram_matrix_of_candidates() -> None:
    """Products over the candidate axis mix candidates and run on all rows."""
    g, x = joined()
    gram = g.op("Gemm", x, x, transA=1)
    g.output(g.op("MatMul", x, gram), ["N", 9])
    optimised(g, GIVEN, counts=(1, 2, 5))


def test_ignored() -> None:
    """`ignore` leaves the layer as it was."""
    g, x = joined()
    g.output(gemm(g, x, whole_numbers(9, 4)), ["N", 4])
    result = optimised(g, GIVEN, ignore=["fc"])
    assert "fc" not in rules(result)
    assert result.report.macs_after == result.report.macs_before


@pytest.mark.parametrize("beside", [True, False])
def test_axis_of_a_selection(beside: bool) -> None:
    """Rows of weights belong to positions that are not told apart where their number is found in the data."""
    g, x = joined(17)
    chosen = g.op("Compress", x, g.const([True] * 2 + [False] * (USER + ITEM - 2), np.bool_), axis=1)
    both = g.op("Concat", chosen, x if beside else chosen, axis=1)
    h = matmul(g, both, whole_numbers(2 + (USER + ITEM if beside else 2), 3))
    g.output(g.op("Gather", h, g.ints(1), axis=1), ["N", 1])
    g.output(g.op("MatMul", x, g.const(whole_numbers(USER + ITEM, 2))), ["N", 2])
    result = rewritten(g.model(), request=["u"])
    assert result.changed
    feed = {"u": np.tile(whole_numbers(1, USER), (5, 1)), "c": whole_numbers(5, ITEM, seed=3)}
    want, got = run(g.model(), feed), run(result.model, {**feed, "u": feed["u"][:1]})
    for name, data in want.items():
        np.testing.assert_array_equal(got[name], data)
