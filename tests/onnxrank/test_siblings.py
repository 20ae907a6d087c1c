"""Parts of one tensor that go through the same function, or side by side again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from helpers import Given, Graph, operators, optimised, refusals, whole_numbers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, shape_inference

ROWS = 9
COUNTS = (0, 1, 2, 7, 90)
EXAMPLES = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


def cut(g: Graph, x: str, columns: Sequence[int], how: str = "slice") -> list[str]:
    """Columns of a matrix, each by itself."""
    if how == "split":
        assert list(columns) == list(range(len(columns)))
        return g.ops("Split", len(columns), x, axis=1, **({"num_outputs": len(columns)} if g.opset >= 18 else {}))
    if how == "gather":
        return [g.op("Gather", x, g.ints(k), axis=1) for k in columns]
    if how == "column":
        return [g.on_axes("Unsqueeze", g.op("Gather", x, g.const(k, np.int64), axis=1), [1]) for k in columns]
    return [g.op("Slice", x, g.ints(k), g.ints(k + 1), g.ints(1)) for k in columns]


def packed(how: str = "slice", opset: int = 17, columns: int = 8, own: int = 4) -> tuple[Graph, list[Given]]:
    """A matrix of ids as floats, converted and looked up one by one, of which the first are the request's."""
    g = Graph(opset)
    inputs = [Given("x", (columns,), "mixed", tuple(range(own)), ids=None)]
    x = g.op("Abs", inputs[0].declare(g)) if how == "split" else inputs[0].declare(g)
    tables = [g.const(whole_numbers(2 * ROWS, 2, seed=k)) for k in range(columns)]
    ids = [g.op("Cast", c, to=TensorProto.INT64) for c in cut(g, x, range(columns), how)]
    found = [g.op("Flatten", g.op("Gather", t, i)) for t, i in zip(tables, ids, strict=True)]
    y = g.op("MatMul", g.op("Concat", *found, axis=1), g.const(whole_numbers(2 * columns, 256)))
    g.output(y, ["N", 256])
    return g, inputs


@pytest.mark.parametrize("opset", [11, 13, 18])
@pytest.mark.parametrize("how", ["slice", "split", "gather", "column"])
def test_ids_are_converted_once_per_level(how: str, opset: int) -> None:
    g, inputs = packed(how, opset)
    result = optimised(g, inputs, counts=COUNTS)
    assert Counter(operators(result.model))["Cast"] == 2


@pytest.mark.slow
def test_joined_lookups_take_their_ids_in_one_step() -> None:
    g, inputs = packed()
    result = optimised(g, inputs, counts=COUNTS, joined=True)
    made = Counter(operators(result.model))
    assert made["Cast"] == 2 and made["Gather"] == 2 and not made["Split"]
    assert made["Concat"] == 0


def mapped(parts: Sequence[tuple[int, int]], function: str = "Neg", width: int = 8) -> Counter[str]:
    """Operators of a result where columns from and to go through a function, beside a layer that is rewritten."""
    g = Graph()
    inputs = [Given("u", (64,), "request"), Given("c", (width,), "candidate")]
    u, c = (i.declare(g) for i in inputs)
    cuts = [g.op("Slice", c, g.ints(a), g.ints(b), g.ints(1)) for a, b in parts]
    made = [g.op(function, s) for s in cuts]
    apart = g.op("Concat", *(g.op("Mul", m, m) for m in made), axis=1)
    size = 64 + sum(b - a for a, b in parts)
    g.output(g.op("MatMul", g.op("Concat", u, apart, axis=1), g.const(whole_numbers(size, 2))), ["N", 2])
    return Counter(operators(optimised(g, inputs, counts=COUNTS).model))


def test_functions_of_parts_are_taken_once() -> None:
    made = mapped([(5, 7), (0, 2), (3, 5)])
    assert made["Neg"] == 1 and made["Split"] == 1 and not made["Slice"]


@pytest.mark.parametrize(
    ("parts", "width"),
    [([(0, 2), (3, 5)], 8), ([(0, 3), (2, 5), (5, 8)], 8), ([(0, 1), (1, 2), (9, 10)], 10)],
    ids=["few", "overlapping", "of few columns"],
)
def test_functions_of_other_parts_stay(parts: Sequence[tuple[int, int]], width: int) -> None:
    made = mapped(parts, width=width)
    assert made["Neg"] == len(parts) and not made["Split"]


def together(parts: Sequence[tuple[int, int]], width: int = 12) -> Counter[str]:
    """Operators of a result where columns from and to are brought side by side, beside a layer that is rewritten."""
    g = Graph()
    inputs = [Given("u", (64,), "request"), Given("c", (width,), "candidate")]
    u, c = (i.declare(g) for i in inputs)
    x = g.op("Softmax", c, axis=1)
    cuts = [g.op("Slice", x, g.ints(a), g.ints(b), g.ints(1)) for a, b in parts]
    apart = g.op("Softmax", g.op("Concat", *cuts, axis=1), axis=1)
    size = 64 + sum(b - a for a, b in parts)
    g.output(g.op("MatMul", g.op("Concat", u, apart, axis=1), g.const(whole_numbers(size, 2))), ["N", 2])
    return Counter(operators(optimised(g, inputs, counts=COUNTS, tolerance=1e-6).model))


@pytest.mark.parametrize(
    ("parts", "made"),
    [
        ([(0, 4), (4, 12)], {"Slice": 0, "Gather": 0}),
        ([(1, 4), (4, 11)], {"Slice": 1, "Gather": 0}),
        ([(0, 2), (7, 9), (4, 5)], {"Slice": 0, "Gather": 1}),
        ([(0, 1), (3, 4)], {"Slice": 2, "Gather": 0}),
        ([(0, 6), (1, 7), (2, 8)], {"Slice": 3, "Gather": 0}),
    ],
    ids=["all", "neighbours", "scattered", "too few", "wide"],
)
def test_parts_side_by_side(parts: Sequence[tuple[int, int]], made: dict[str, int]) -> None:
    found = together(parts)
    assert {op: found[op] for op in made} == made


def test_text_is_read_where_it_was() -> None:
    """A column that nobody reads may be no number."""
    g = Graph()
    inputs = [Given("user", (5,), "request", ids=ROWS), Given("item", (3,), "candidate")]
    user, item = (i.declare(g) for i in inputs)
    texts = cut(g, g.op("Cast", user, to=TensorProto.STRING), range(4))
    numbers = [g.op("Cast", t, to=TensorProto.FLOAT) for t in texts]
    y = g.op("MatMul", g.op("Concat", *numbers, item, axis=1), g.const(whole_numbers(7, 256)))
    g.output(y, ["N", 256])
    assert Counter(operators(optimised(g, inputs, counts=COUNTS).model))["Cast"] == 5


@pytest.mark.slow
@EXAMPLES
@given(
    width=st.integers(3, 12),
    opset=st.sampled_from([11, 13, 18]),
    seed=st.integers(0, 2**31),
    function=st.sampled_from(["Neg", "Relu", "Cast", "Abs"]),
)
def test_any_parts(width: int, opset: int, seed: int, function: str) -> None:
    """Whatever is cut out, mapped and brought together again, scores stay the same bit by bit."""
    rng = np.random.default_rng(seed)
    g = Graph(opset)
    own = sorted(rng.permutation(width)[: rng.integers(1, width)].tolist())
    inputs = [Given("x", (width,), "mixed", tuple(own)), Given("c", (2,), "candidate")]
    x, c = (i.declare(g) for i in inputs)
    tensors = [c]
    for _ in range(rng.integers(2, 9)):
        start = int(rng.integers(0, width))
        stop = int(rng.integers(start + 1, width + 1))
        part = g.op("Slice", x, g.ints(start), g.ints(stop - width if stop < width else 2**31), g.ints(-1))
        if rng.integers(4):
            how = {"to": int(rng.choice([TensorProto.INT64, TensorProto.INT32]))} if function == "Cast" else {}
            part = g.op(function, part, **how)
        part = g.op("Cast", part, to=TensorProto.FLOAT) if function == "Cast" else part
        tensors.insert(int(rng.integers(len(tensors) + 1)), part)
    both = g.op("Concat", *tensors, axis=1)
    total = sum(_width(g, t) for t in tensors)
    g.output(g.op("MatMul", both, g.const(whole_numbers(total, 2))), ["N", 2])
    assert "nothing makes" not in refusals(optimised(g, inputs, counts=COUNTS))


def _width(g: Graph, name: str) -> int:
    inferred = shape_inference.infer_shapes(g.model()).graph
    found = {v.name: v for v in [*inferred.value_info, *inferred.input]}
    return found[name].type.tensor_type.shape.dim[1].dim_value
