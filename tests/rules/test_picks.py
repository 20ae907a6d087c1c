"""Rows that candidates pick of a request's: mapped before they are picked, and picked as rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import INT64, Graph, candidate, operators, optimised, request, rewritten, rules, run, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto

import onnxrank
from onnxrank.batching.engine import Options as Batch
from onnxrank.batching.engine import batch
from onnxrank.verify import verify

LENGTH, WIDTH = 7, 4
GIVEN = [request("h", LENGTH, WIDTH), candidate("i", 2, 1, ids=LENGTH)]


def picked(g: Graph, rows: str = "h", ids: str = "i", width: int = WIDTH) -> str:
    """Rows of a history at positions that have an axis for the entries, as torch's gather takes them."""
    return g.op("GatherElements", rows, g.op("Expand", ids, g.ints(1, 1, width)), axis=1)


def declared(*more: str) -> tuple[Graph, str]:
    """A graph with a history and positions, and the rows that these pick."""
    g = Graph(17)
    for i in GIVEN:
        i.declare(g)
    return g, picked(g)


def gathered(result: onnxrank.Result) -> bool:
    """Whether rows are picked as such, of the history as it is."""
    found = operators(result.model)
    return "Gather" in found and not {"GatherElements", "Expand"} & set(found)


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_map_of_rows(opset: int) -> None:
    g = Graph(opset)
    for i in GIVEN:
        i.declare(g)
    k = g.op("MatMul", picked(g), g.const(whole_numbers(WIDTH, 8)))
    g.output(g.op("Relu", g.op("Add", k, g.const(whole_numbers(8, seed=1)))), None)
    result = optimised(g, GIVEN, counts=(0, 1, 2, 5, 600))
    assert gathered(result) and rules(result)["picks"] == 2
    assert operators(result.model)[-1] == "Gather"


def test_symbolic_length() -> None:
    g, more = Graph(17), [request("h", "L", WIDTH), candidate("i", 2, 1, ids=3)]
    for i in more:
        i.declare(g)
    g.output(g.op("MatMul", picked(g), g.const(whole_numbers(WIDTH, 8))), None)
    result = optimised(g, more, counts=(0, 1, 5), lengths=[{"L": 3}, {"L": 50}, {"L": 300}])
    assert gathered(result)


def test_parts_of_several_levels() -> None:
    """Positions in the history are constants: the row is put together once."""
    g = Graph(17)
    for i in GIVEN:
        i.declare(g)
    shape = g.op("Concat", g.op("Shape", "h", start=0, end=1), g.ints(LENGTH, 2), axis=0)
    rows = g.op("Concat", "h", g.op("Expand", g.const(whole_numbers(1, LENGTH, 2)), shape), axis=2)
    g.output(g.op("MatMul", picked(g, rows, width=WIDTH + 2), g.const(whole_numbers(WIDTH + 2, 8))), None)
    assert gathered(optimised(g, GIVEN, counts=(0, 1, 5, 40)))


def test_mask_of_rows() -> None:
    """A tensor of one entry a row, picked by the positions as they are."""
    g, more = Graph(17), [request("m", LENGTH), candidate("i", 2, ids=LENGTH)]
    for i in more:
        i.declare(g)
    g.output(g.op("Mul", g.op("GatherElements", "m", "i", axis=1), g.const(np.float32(3))), None)
    assert gathered(optimised(g, more, counts=(0, 1, 5, 40)))


def test_residual() -> None:
    """Both operands are picked at the same positions."""
    g, p = declared()
    g.output(g.op("Add", p, g.op("Tanh", g.op("MatMul", p, g.const(whole_numbers(WIDTH, WIDTH))))), None)
    result = optimised(g, GIVEN, counts=(0, 1, 5, 40))
    assert gathered(result) and operators(result.model).count("Gather") == 1


def test_normalisation() -> None:
    g, p = declared()
    scale, shift = g.const(whole_numbers(WIDTH)), g.const(whole_numbers(WIDTH, seed=1))
    g.output(g.op("LayerNormalization", p, scale, shift, axis=-1), None)
    result = optimised(g, GIVEN, counts=(0, 1, 5, 40), tolerance=1e-6)
    assert rules(result)["picks"] == 1 and operators(result.model)[-1] == "Gather"


def test_normalisation_over_the_rows_that_are_picked() -> None:
    """It knows which rows stand beside each other."""
    g, p = declared()
    g.output(g.op("LayerNormalization", p, g.const(whole_numbers(2, WIDTH)), axis=1), None)
    result = optimised(g, GIVEN, counts=(0, 1, 5, 40), tolerance=1e-6)
    assert rules(result)["picks"] == 1 and operators(result.model)[-1] == "LayerNormalization"


@pytest.mark.parametrize("count", [2, LENGTH])
@pytest.mark.parametrize("op", ["LayerNormalization", "RMSNormalization"])
def test_normalisation_with_a_scale_for_each_row(op: str, count: int) -> None:
    """The number of a row is that of its place among those picked, not in the history; they may be as many."""
    given = [request("h", LENGTH, WIDTH), candidate("i", count, 1, ids=LENGTH)]
    g = Graph(23)
    for i in given:
        i.declare(g)
    g.output(g.op(op, picked(g), g.const(whole_numbers(count, WIDTH))), None)
    result = optimised(g, given, counts=(0, 1, 5, 40), tolerance=1e-6)
    assert rules(result)["picks"] == 1 and operators(result.model)[-1] == op


def test_negative_positions() -> None:
    g = Graph(17)
    h, i = g.input("h", ["N", LENGTH, WIDTH]), g.input("i", ["N", 2, 1], INT64)
    g.output(g.op("MatMul", picked(g, h, i), g.const(whole_numbers(WIDTH, 3))), ["N", 2, 3])
    result = rewritten(g.model(), request=["h"])
    assert gathered(result)
    ids = np.random.default_rng(0).integers(-LENGTH, LENGTH, (90, 2, 1))
    rows = whole_numbers(1, LENGTH, WIDTH)
    want = run(g.model(), {"h": np.repeat(rows, 90, 0), "i": ids})
    for name, got in run(result.model, {"h": rows, "i": ids}).items():
        np.testing.assert_array_equal(got, want[name])
    with pytest.raises(Exception, match=r"ndices|ndex"):
        run(result.model, {"h": rows, "i": ids + LENGTH})


@pytest.mark.parametrize(
    "kind", ["other positions", "factor per candidate", "term per place", "rows of candidates", "positions of entries"]
)
def test_what_is_not_of_rows(kind: str) -> None:
    """Maps that know who picks, or at which place, come after."""
    g, more = Graph(17), [*GIVEN, candidate("j", 2, 1, ids=LENGTH), candidate("c", 1, WIDTH)]
    more += [candidate("r", LENGTH, WIDTH), candidate("e", 2, WIDTH, ids=LENGTH)]
    for i in more:
        i.declare(g)
    p = picked(g)
    if kind == "other positions":
        x = g.op("Add", p, picked(g, ids="j"))
    elif kind == "factor per candidate":
        x = g.op("Mul", p, "c")
    elif kind == "term per place":
        x = g.op("Add", p, g.const(whole_numbers(2, WIDTH, seed=3)))
    elif kind == "rows of candidates":
        x = picked(g, "r")
    else:
        x = g.op("GatherElements", "h", "e", axis=1)
    g.output(g.op("Relu", x), None)
    taken = {"other positions": 2, "factor per candidate": 1, "term per place": 1}
    result = optimised(g, more, counts=(0, 1, 2, 5, 40))
    assert rules(result).get("picks", 0) == taken.get(kind, 0)


def test_few_candidates() -> None:
    """For one that picks few of many rows, mapping all of them takes longer."""
    g, more = Graph(17), [request("h", 500, WIDTH), candidate("i", 2, 1, ids=500)]
    for i in more:
        i.declare(g)
    g.output(g.op("MatMul", picked(g), g.const(whole_numbers(WIDTH, 64))), None)
    assert operators(optimised(g, more, candidates=2).model)[-1] == "MatMul"
    assert operators(optimised(g, more, candidates=2000).model)[-1] == "Gather"


def _search(length: int | str = 30) -> ModelProto:
    """The three of a history that are most like the item, projected, and summed by weights."""
    g = Graph(17)
    h, item = g.input("history", ["N", length, WIDTH]), g.input("item", ["N", WIDTH])
    scores = g.on_axes("Squeeze", g.op("MatMul", h, g.on_axes("Unsqueeze", item, [2])), [2])
    best, at = g.ops("TopK", 2, scores, g.ints(3), axis=1)
    rows = picked(g, h, g.on_axes("Unsqueeze", at, [2]))
    values = g.op("MatMul", rows, g.const(whole_numbers(WIDTH, 6, seed=1)))
    weights = g.op("Softmax", best, axis=1)
    pooled = g.on_axes("ReduceSum", g.op("Mul", values, g.on_axes("Unsqueeze", weights, [2])), [1], keepdims=0)
    x = g.op("Concat", pooled, item, axis=1)
    g.output(g.op("MatMul", x, g.const(whole_numbers(6 + WIDTH, 1, seed=2))), ["N", 1])
    return g.model()


@pytest.mark.slow
@pytest.mark.parametrize("length", [30, "L"])
def test_other_commands(tmp_path: Path, length: int | str) -> None:
    """The gate, batches of requests, and the two models of `split`."""
    model = _search(length)
    result = onnxrank.optimize(model, request=["history"])
    assert result.changed and rules(result)["picks"] == 1 and not result.report.retreats
    for rows in ("lengths", "index"):
        made = batch(model, request=["history"], check="quick", options=Batch(rows=rows))
        assert made.changed and not made.report.retreats
        assert verify(model, made.model).passed
    halves = onnxrank.split(model, tmp_path / "out", request=["history"])
    assert halves.request is not None
    onnx.save(model, tmp_path / "model.onnx")
    assert verify(tmp_path / "model.onnx", tmp_path / "out").passed


@st.composite
def chains(draw: st.DrawFn) -> tuple[Graph, list[object]]:
    """Maps, elementwise operators and moves behind rows that are picked, at one place or two."""
    g = Graph(17)
    length, count = draw(st.sampled_from([1, 2, 9, "L"])), draw(st.integers(1, 3))
    least = 2 if length == "L" else int(length)
    more = [request("h", length, WIDTH), candidate("i", count, 1, ids=least), candidate("c", 1, WIDTH)]
    for i in more:
        i.declare(g)
    x = picked(g)
    made = [x]
    for k in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["map", "bias", "relu", "add", "turn", "rows", "candidate", "clip", "where"]))
        if kind == "map":
            x = g.op("MatMul", x, g.const(whole_numbers(WIDTH, WIDTH, seed=k)))
        elif kind == "bias":
            shape = draw(st.sampled_from([(), (WIDTH,), (1, 1, WIDTH), (count, 1), (1, 1, 1, 1)]))
            x = g.op("Add", x, g.const(whole_numbers(*shape, seed=k)))
            x = g.on_axes("Squeeze", x, [0]) if len(shape) == 4 else x
        elif kind == "relu":
            x = g.op("Relu", x)
        elif kind == "add":
            x = g.op("Sub", x, draw(st.sampled_from(made)))
        elif kind == "turn":
            x = g.op("Transpose", g.op("Transpose", x, perm=[0, 2, 1]), perm=[0, 2, 1])
        elif kind == "rows":
            x = g.op("Add", x, "c")
        elif kind == "candidate":
            x = g.op("Mul", "c", x)
        elif kind == "clip":
            x = g.op("Clip", x, g.const(np.float32(-3)), g.const(np.float32(9)))
        else:
            x = g.op("Where", g.op("Greater", x, g.const(np.float32(0))), x, draw(st.sampled_from(made)))
        made.append(x)
    g.output(x, None)
    if draw(st.booleans()):
        g.output(draw(st.sampled_from(made)), None)
    return g, more  # type: ignore[return-value]


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(chains())
def test_chains(made: tuple[Graph, list[object]]) -> None:
    g, more = made
    lengths = [{"L": 2}, {"L": 70}] if any("L" in i.shape for i in more) else [{}]  # type: ignore[attr-defined]
    optimised(g, more, counts=(0, 1, 5, 40), lengths=lengths)  # type: ignore[arg-type]


def test_types() -> None:
    """Positions of 32 bits, rows of 16."""
    g = Graph(17)
    h, i = g.input("h", ["N", LENGTH, WIDTH], TensorProto.FLOAT16), g.input("i", ["N", 2, 1], TensorProto.INT32)
    g.output(g.op("Cast", picked(g, h, i), to=1), ["N", 2, WIDTH])
    result = rewritten(g.model(), request=["h"])
    assert gathered(result)
    feed = {"h": whole_numbers(1, LENGTH, WIDTH).astype(np.float16), "i": np.zeros((9, 2, 1), np.int32)}
    want = run(g.model(), {**feed, "h": np.repeat(feed["h"], 9, 0)})
    for name, got in run(result.model, feed).items():
        np.testing.assert_array_equal(got, want[name])
