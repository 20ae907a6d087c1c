"""Lengths that are declared as free, and fixed by constants of the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import INT64, Graph, run
from onnx import ModelProto

import onnxrank
from onnxrank import cli, facts
from onnxrank.errors import ModelError
from onnxrank.verify import verify


def baked(how: str) -> ModelProto:
    """A history `[N, L]` of 12 ids, whatever it declares, beside an item."""
    g = Graph(17)
    ids, item = g.input("hist", ["N", "L"], INT64), g.input("item", ["N", 4])
    x = g.op("Gather", g.const(np.random.default_rng(0).standard_normal((50, 4))), ids)
    weight = np.random.default_rng(1).standard_normal((52, 8))
    if how == "rows left open":
        flat = g.op("Reshape", x, g.ints(-1, 48))
    elif how == "rows of the history":
        rows = g.op("Slice", g.op("Shape", ids), g.ints(0), g.ints(1))
        flat = g.op("Reshape", x, g.op("Concat", rows, g.ints(48), axis=0))
    elif how == "among computed axes":
        rows = g.op("Slice", g.op("Shape", ids), g.ints(0), g.ints(1))
        turned = g.op("Transpose", x, perm=[1, 0, 2])
        apart = g.op("Reshape", turned, g.op("Concat", g.ints(12), rows, g.ints(2, 2), axis=0))
        flat = g.op("Reshape", g.op("Transpose", apart, perm=[1, 0, 2, 3]), g.ints(-1, 48))
    elif how == "with the candidate behind":
        joined = g.op("Concat", x, g.op("Unsqueeze", item, g.ints(1)), axis=1)
        flat = g.op("Reshape", g.op("Tanh", joined), g.ints(-1, 52))
    elif how == "positions":
        flat = g.op("Flatten", g.op("Add", x, g.const(np.ones((1, 12, 4)))), axis=1)
    else:
        flat = g.op("Flatten", x, axis=1)
    if how == "product":
        h = g.op("Add", g.op("MatMul", flat, g.const(weight[:48])), g.op("MatMul", item, g.const(weight[48:])))
    else:
        both = flat if how == "with the candidate behind" else g.op("Concat", flat, item, axis=1)
        h = g.op("MatMul", both, g.const(weight))
    g.op("MatMul", g.op("Relu", h), g.const(np.ones((8, 1))))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    return g.model()


@pytest.mark.parametrize(
    "how",
    [
        "rows left open",
        "rows of the history",
        "among computed axes",
        "with the candidate behind",
        "positions",
        "product",
    ],
)
def test_the_length_that_runs_is_found(how: str) -> None:
    """No --length is asked for; the result declares what it takes, and verify compares there."""
    result = onnxrank.optimize(baked(how), request=["hist"], lengths={"L": (1, 100)})
    assert result.changed and not result.report.retreats
    assert any("L = 12 only" in note for note in result.report.notes)
    dims = next(i for i in result.model.graph.input if i.name == "hist").type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == [1, 12]
    rng = np.random.default_rng(3)
    feed = {"hist": np.tile(rng.integers(0, 50, (1, 12)), (40, 1)), "item": rng.standard_normal((40, 4), np.float32)}
    want, got = run(baked(how), feed), run(result.model, {**feed, "hist": feed["hist"][:1]})
    np.testing.assert_allclose(got["score"], want["score"], rtol=1e-4, atol=1e-4)
    report = verify(baked(how), result.model)
    assert report.passed and any("at no lengths but those" in f.message for f in report.findings)


def test_analysis() -> None:
    assert onnxrank.analyse(baked("product"), request=["hist"]).study.symbols == ["N"]


@pytest.mark.slow
def test_two_that_contradict() -> None:
    """A model that runs at no length is refused as before."""
    model = baked("rows left open")
    wide = next(n for n in model.graph.node if n.op_type == "Reshape")
    target = next(t for t in model.graph.initializer if t.name == wide.input[1])
    target.CopyFrom(onnx.numpy_helper.from_array(np.array([-1, 20], np.int64), target.name))
    with pytest.raises(ModelError, match="does not run at several numbers"):
        onnxrank.optimize(model, request=["hist"])


@pytest.mark.parametrize("op", ["Reshape", "Gather", "Tile", "MatMul"])
def test_damaged_nodes(op: str) -> None:
    """A node that lacks an input is refused by name."""
    model = baked("rows left open")
    node = next((n for n in model.graph.node if n.op_type == op), model.graph.node[-1])
    node.op_type = op
    del node.input[1:]
    with pytest.raises(ModelError, match="has fewer inputs than its operator takes"):
        onnxrank.optimize(model, request=["hist"], check=False)


def test_no_element_type() -> None:
    """An initializer of no type is refused by name."""
    model = baked("product")
    model.graph.initializer[0].data_type = 0
    with pytest.raises(ModelError, match="has element type 0, which ONNX does not have"):
        onnxrank.optimize(model, request=["hist"])


def test_output_of_nothing() -> None:
    """An output that no node gives is refused by name."""
    model = baked("product")
    model.graph.output[0].name = "z"
    with pytest.raises(ModelError, match="output 'z' is no input, initializer or result"):
        onnxrank.optimize(model, request=["hist"], check=False)


@pytest.mark.parametrize("op", ["Reshape", "Expand", "ConstantOfShape"])
def test_endless_dimensions(op: str) -> None:
    """A tensor that claims to be a shape of a billion extents takes no memory."""
    g = Graph(17)
    shape, item = g.input("shape", [1 << 30], INT64), g.input("item", ["N", 4])
    x = g.op(op, shape) if op == "ConstantOfShape" else g.op(op, item, shape)
    g.outputs.append(onnx.helper.make_empty_tensor_value_info(x))
    graph = onnx.helper.make_graph(g.nodes, "g", g.inputs, g.outputs, g.initializers)
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    found = facts.derive(made, {"shape": ((1 << 30, ()),), "item": ((1, ("N",)), (4, ()))}, None)
    assert "dimensions" in found.unknown[x]


@pytest.mark.slow
def test_export(tmp_path: Path) -> None:
    """`view(-1, 50 * d)` under a dynamic axis, as torch exports it."""
    torch = pytest.importorskip("torch")

    class Ranker(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.items, self.history = torch.nn.Embedding(100, 8), torch.nn.Embedding(500, 8)
            self.layers = torch.nn.Sequential(torch.nn.Linear(51 * 8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

        def forward(self, hist: object, item: object) -> object:
            return self.layers(torch.cat([self.history(hist).view(-1, 50 * 8), self.items(item)], 1))

    path = tmp_path / "ranker.onnx"
    given = (torch.randint(0, 500, (3, 50)), torch.randint(0, 100, (3,)))
    axes = {"hist": {0: "N", 1: "L"}, "item": {0: "N"}, "score": {0: "N"}}
    names = {"input_names": ["hist", "item"], "output_names": ["score"]}
    torch.onnx.export(Ranker().eval(), given, path, dynamic_axes=axes, dynamo=False, opset_version=17, **names)
    assert cli.main(["optimize", str(path), str(tmp_path / "out.onnx"), "--request", "hist"]) == 0
    assert cli.main(["verify", str(path), str(tmp_path / "out.onnx")]) == 0
    made = onnx.load(tmp_path / "out.onnx")
    assert made.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 50


def _largest() -> ModelProto:
    """A ranker that takes the 12 largest of a history: without 12 entries it does not run."""
    g = Graph(17)
    hist, item = g.input("hist", ["N", "L", 8]), g.input("item", ["N", 8])
    best, _ = g.ops("TopK", 2, g.on_axes("ReduceSum", hist, [2], keepdims=0), g.ints(12), axis=1)
    x = g.op("Concat", best, g.on_axes("ReduceMean", hist, [1], keepdims=0), item, axis=1)
    h = g.op("Relu", g.op("MatMul", x, g.const(np.random.default_rng(0).standard_normal((28, 16)))))
    g.output(g.op("MatMul", h, g.const(np.ones((16, 1)))), ["N", 1])
    return g.model()


@pytest.mark.slow
def test_histories_that_may_not_be_short() -> None:
    """From which length on a model runs is found, and said."""
    model = _largest()
    result = onnxrank.optimize(model, request=["hist"])
    assert result.changed and result.report.lengths == {"L": (12, 1024)}
    assert any("fewer than 12" in note for note in result.report.notes)
    declared = onnxrank.optimize(model, request=["hist"], lengths={"L": (20, 90)})
    assert declared.changed and declared.report.lengths == {"L": (20, 90)}
    rng = np.random.default_rng(1)
    feed = {"hist": rng.standard_normal((1, 400, 8), np.float32), "item": rng.standard_normal((40, 8), np.float32)}
    want = run(model, {**feed, "hist": np.repeat(feed["hist"], 40, 0)})
    for made in (result, declared):
        for name, got in run(made.model, feed).items():
            np.testing.assert_allclose(got, want[name], rtol=1e-4, atol=1e-4)
    assert verify(model, result.model).passed


@pytest.mark.slow
def test_short_histories_in_every_command(tmp_path: Path) -> None:
    """What makes inputs of such a model makes none that are shorter."""
    path, out = tmp_path / "ranker.onnx", tmp_path / "out"
    onnx.save(_largest(), path)
    analysis = onnxrank.analyse(path, request=["hist"])
    made = onnxrank.emit(analysis, onnxrank.plan(analysis))
    assert onnxrank.gate(analysis, made, level="quick").passed
    roles = ["--request", "hist"]
    assert cli.main(["optimize", str(path), str(tmp_path / "batch.onnx"), "--interface", "batch", *roles]) == 0
    assert cli.main(["optimize", str(path), str(tmp_path / "packed.onnx"), "--pack-inputs", *roles]) == 0
    assert cli.main(["split", str(path), str(out), "--state-dtype", "float16", *roles]) == 0
    assert cli.main(["verify", str(path), str(out), "--level", "quick"]) == 0


@pytest.mark.slow
def test_profile_of_histories_that_may_not_be_short() -> None:
    """More are needed than a profile takes by itself."""
    g = Graph(17)
    hist, item = g.input("hist", ["N", "L"]), g.input("item", ["N", 8])
    best, _ = g.ops("TopK", 2, hist, g.ints(80), axis=1)
    g.output(g.op("MatMul", g.op("Concat", best, item, axis=1), g.const(np.ones((88, 1)))), ["N", 1])
    report = onnxrank.profile(g.model(), candidates=[2], seconds=0.01, request=["hist"])
    assert any("L = 80" in note for note in report.notes)
