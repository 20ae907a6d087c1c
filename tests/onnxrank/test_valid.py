"""Valid models of unusual make: all are taken, and give the original's scores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import onnxrank
from onnxrank import cli
from onnxrank.errors import ModelError
from onnxrank.model import flattened, load, overridable, tensor_data
from onnxrank.verify import verify
from tests.support.modelkit import w

ROWS = 7
WEIGHTS = {"W": w(64, 256), "V": w(256, 64), "C": w(64, 64), "CC": w(128, 64, seed=1)}
SEQUENCE = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
N = helper.make_node


def info(name: str, shape: Sequence[int | str] | None = None, dtype: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def tower() -> list[NodeProto]:
    """Work of the request, large enough to pay: `v` [N, 64]."""
    return [N("MatMul", ["u", "W"], ["h"]), N("Relu", ["h"], ["r"]), N("MatMul", ["r", "V"], ["v"])]


def layer(x: str = "CC") -> list[NodeProto]:
    """A layer over both sides."""
    return [N("Concat", ["v", "c"], ["x"], axis=1), N("MatMul", ["x", x], ["q"]), N("Relu", ["q"], ["y"])]


def model(
    nodes: Sequence[NodeProto],
    *,
    outputs: Sequence[onnx.ValueInfoProto] = (),
    domains: Sequence[tuple[str, int]] = (),
    **constants: Any,
) -> ModelProto:
    """A model of `u` and `c` [N, 64] with the output `y` and perhaps others."""
    graph = helper.make_graph(
        nodes,
        "g",
        [info("u", ["N", 64]), info("c", ["N", 64])],
        [info("y", ["N", 64]), *outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in {**WEIGHTS, **constants}.items()],
    )
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(d, v) for d, v in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def session(made: ModelProto | Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = os.fspath(made) if isinstance(made, Path) else made.SerializeToString()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def hold(made: ModelProto, **options: Any) -> onnxrank.Result:
    """Optimises, with the check, and holds the scores against the original's."""
    result = onnxrank.optimize(made, request=["u"], **options)
    rng = np.random.default_rng(0)
    user, items = rng.standard_normal((1, 64)).astype(np.float32), rng.standard_normal((ROWS, 64)).astype(np.float32)
    feed = {"u": np.repeat(user, ROWS, 0), "c": items}
    given = {"u": user, "c": items} if result.changed and options.get("interface") != "same" else feed
    for a, b in zip(session(made).run(None, feed), session(result.model).run(None, given), strict=True):
        if isinstance(a, np.ndarray):
            np.testing.assert_allclose(b, a, rtol=0, atol=1e-5)
        else:
            assert len(a) == len(b) and all(np.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))
    return result


SEQUENCES = {
    "split and joined": [
        *(N("Mul", ["v", "c"], ["m"]), N("SplitToSequence", ["m", "k"], ["s"], axis=1)),
        *(N("ConcatFromSequence", ["s"], ["p"], axis=1), N("MatMul", ["p", "C"], ["y"])),
    ],
    "features": [
        *(N("SequenceConstruct", ["v", "c"], ["s"]), N("ConcatFromSequence", ["s"], ["p"], axis=1)),
        N("MatMul", ["p", "CC"], ["y"]),
    ],
    "under another name": [
        *(N("SequenceConstruct", ["v", "c"], ["t"]), N("Identity", ["t"], ["s"]), N("SequenceAt", ["s", "one"], ["p"])),
        *(N("Mul", ["p", "v"], ["m"]), N("MatMul", ["m", "C"], ["y"])),
    ],
    "of the request": [
        *(N("SplitToSequence", ["v", "k"], ["s"], axis=1), N("ConcatFromSequence", ["s"], ["p"], axis=1)),
        *(N("Mul", ["p", "c"], ["m"]), N("MatMul", ["m", "C"], ["y"])),
    ],
    "optional": [
        *(N("Optional", ["v"], ["o"]), N("OptionalGetElement", ["o"], ["p"]), N("Mul", ["p", "c"], ["m"])),
        N("MatMul", ["m", "C"], ["y"]),
    ],
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_in_between(name: str) -> None:
    assert hold(model([*tower(), *SEQUENCES[name]], k=np.array(16), one=np.array(1))).changed


def test_a_sequence_from_either_branch() -> None:
    def branch(name: str, first: str, second: str) -> onnx.GraphProto:
        made = N("SequenceConstruct", [first, second], [name])
        return helper.make_graph([made], name, [], [helper.make_value_info(name, SEQUENCE)])

    choose = N("If", ["positive"], ["s"], then_branch=branch("t", "v", "c"), else_branch=branch("e", "c", "v"))
    test = [N("ReduceSum", ["c"], ["total"], keepdims=0), N("Greater", ["total", "zero"], ["positive"])]
    end = [N("ConcatFromSequence", ["s"], ["p"], axis=1), N("MatMul", ["p", "CC"], ["y"])]
    assert hold(model([*tower(), *test, choose, *end], zero=np.float32(0))).changed


def test_outputs_that_are_sequences_and_maps() -> None:
    parts = helper.make_value_info("parts", SEQUENCE)
    split = [N("Mul", ["v", "c"], ["y"]), N("SplitToSequence", ["y", "k"], ["parts"], axis=1)]
    assert hold(model([*tower(), *split], outputs=[parts], k=np.array(16))).changed
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    zipped = helper.make_value_info("z", helper.make_sequence_type_proto(kind))
    label = N("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=list(range(64)))
    nodes = [*tower(), N("Mul", ["v", "c"], ["m"]), N("Softmax", ["m"], ["y"]), label]
    made = model(nodes, outputs=[zipped], domains=[("ai.onnx.ml", 2)])
    result = onnxrank.optimize(made, request=["u"])
    assert result.changed and all(c.passed for c in result.report.checks)


@pytest.mark.parametrize("width", [64, 63])
def test_branches_with_initializers(width: int) -> None:
    """Of one branch, the output is an initializer; the other has one in a node, under a name that is used outside."""
    then = helper.make_graph(
        [N("Add", ["b", "b"], ["r2"]), N("Identity", ["r2"], ["t"])], "t", [], [info("t"), info("r2")],
        [numpy_helper.from_array(np.array([0.25], np.float32), "b")])  # fmt: skip
    other = helper.make_graph(
        [], "e", [], [info("h2"), info("h3")],
        [numpy_helper.from_array(np.array([v], np.float32), k) for k, v in (("h2", 1.5), ("h3", 3.0))])  # fmt: skip
    nodes = [
        *(N("Shape", ["c"], ["shape"]), N("Gather", ["shape", "one"], ["columns"])),
        N("Equal", ["columns", "width"], ["same"]),
        N("If", ["same"], ["bias", "second"], then_branch=then, else_branch=other),
        *(N("Sum", ["bias", "second"], ["b"]), *tower(), N("Concat", ["v", "c"], ["x"], axis=1)),
        *(N("MatMul", ["x", "CC"], ["q"]), N("Add", ["q", "b"], ["y"])),
    ]
    assert hold(model(nodes, one=np.array(1), width=np.array(width))).changed


def test_functions_written_for_another_opset_are_inlined_as_the_runtime_does() -> None:
    function = helper.make_function(
        "own", "Layer", ["x", "k"], ["o"], [N("MatMul", ["x", "k"], ["o"])], [helper.make_opsetid("", 13)]
    )
    nodes = [*tower(), N("Concat", ["v", "c"], ["x"], axis=1), N("Layer", ["x", "CC"], ["q"], domain="own")]
    made = model([*nodes, N("Relu", ["q"], ["y"])], domains=[("own", 1)])
    made.functions.append(function)
    before = made.SerializeToString(deterministic=True)
    assert "fc" in {r.name for r in hold(made).report.rules}
    assert made.SerializeToString(deterministic=True) == before, "the caller's model was changed"


def test_default_attributes_of_functions_reach_the_functions_that_they_call() -> None:
    functions = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18, "own" : 1]> g (float[N] x) => (float[N] y) { y = own.Outer(x) }
        <domain: "own", opset_import: ["" : 18]>
        Inner <slope: float = 0.25>(x) => (y) { y = LeakyRelu<alpha: float = @slope>(x) }
        <domain: "own", opset_import: ["" : 18, "own" : 1]>
        Outer <slope: float = 0.5>(x) => (y) { y = own.Inner<slope: float = @slope>(x) }
    """).functions
    nodes = [*tower(), N("Outer", ["v"], ["o"], domain="own"), N("Outer", ["c"], ["d"], domain="own", slope=0.125)]
    made = model([*nodes, N("Mul", ["o", "d"], ["m"]), N("Inner", ["m"], ["y"], domain="own")], domains=[("own", 1)])
    made.functions.extend(functions)
    before = made.SerializeToString(deterministic=True)
    assert hold(made).changed
    slopes = [n.attribute[0].f for n in flattened(made).graph.node if n.op_type == "LeakyRelu"]
    assert slopes == [0.5, 0.125, 0.25]
    assert made.SerializeToString(deterministic=True) == before, "the caller's model was changed"


@pytest.mark.parametrize("name", ["c", "u", "C"])
def test_outputs_that_are_inputs_or_initializers_keep_their_name(name: str) -> None:
    made = model([*tower(), *layer()], outputs=[info(name, [64 if name == "C" else "N", 64])])
    result = hold(made, interface="same")
    assert result.changed and [o.name for o in result.model.graph.output] == ["y", name]
    assert hold(made).changed is (name != "u"), "one row in, all rows out"


def test_a_divided_input_whose_parts_have_names_that_are_taken() -> None:
    made = model(layer())
    del made.graph.input[:]
    made.graph.input.extend([info("v", ["N", 64]), info("c", ["N", 64]), info("v.request", ["N", 64])])
    made.graph.node.append(N("Add", ["q", "v.request"], ["y"]))
    del made.graph.node[2]
    with pytest.raises(ModelError, match=r"has a 'v.request' already: rename that, or use --interface same"):
        onnxrank.optimize(made, request=["v[0:32]"])
    assert onnxrank.optimize(made, request=["v[0:32]"], interface="same").report.changed in (True, False)


@pytest.mark.parametrize("name", ["x.request", "x.candidate"])
@pytest.mark.parametrize("stored", [False, True])
def test_tensors_called_like_the_parts_of_a_divided_input(name: str, stored: bool) -> None:
    """Names that only the model itself knows are given up for those that callers have to know."""
    nodes = [N("MatMul", ["x", "CC"], [name]), N("Relu", [name], ["y"])]
    weights = dict(WEIGHTS)
    if stored:
        nodes, weights = [N("MatMul", ["x", name], ["q"]), N("Relu", ["q"], ["y"])], {**WEIGHTS, name: WEIGHTS["CC"]}
    made = helper.make_model(
        helper.make_graph(nodes, "g", [info("x", ["N", 128])], [info("y", ["N", 64])],
                          [numpy_helper.from_array(v, k) for k, v in weights.items()]),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    result = onnxrank.optimize(made, request=["x[0:64]"])
    assert result.changed and [i.name for i in result.model.graph.input] == ["x.request", "x.candidate"]
    rows = np.random.default_rng(0).standard_normal((ROWS, 128)).astype(np.float32)
    rows[:, :64] = rows[0, :64]
    before, after = (onnxruntime.InferenceSession(m.SerializeToString()) for m in (made, result.model))
    new = after.run(None, {"x.request": rows[:1, :64], "x.candidate": rows[:, 64:]})[0]
    np.testing.assert_allclose(new, before.run(None, {"x": rows})[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["v/expand", "candidates/shape", "q/weight", "q/gemm", "y/relu", "h::shape"])
def test_names_inside_subgraphs_are_not_given_again(name: str) -> None:
    then = helper.make_graph([N("Neg", ["v"], [name])], "t", [], [info(name)])
    other = helper.make_graph([N("Abs", ["v"], ["e"])], "e", [], [info("e")])
    test = [N("ReduceSum", ["c"], ["total"], keepdims=0), N("Greater", ["total", "zero"], ["positive"])]
    nodes = [*tower(), *test, N("If", ["positive"], ["s"], then_branch=then, else_branch=other), *layer()]
    nodes += [N("Add", ["y", "s"], ["z"])]
    result = hold(model(nodes, outputs=[info("z", ["N", 64])], zero=np.float32(0)))
    made = [o for n in result.model.graph.node for o in n.output]
    assert result.changed and name not in made


def test_a_tensor_called_like_a_measured_shape() -> None:
    nodes = [*tower(), N("Concat", ["v", "c"], ["x"], axis=1), N("Relu", ["x"], ["x::shape"])]
    assert hold(model([*nodes, N("MatMul", ["x::shape", "CC"], ["y"])])).changed


def _sparse(flat: bool) -> tuple[onnx.SparseTensorProto, np.ndarray]:
    data = np.zeros((128, 64), np.float32)
    data[3, 5], data[70, 20], data[127, 63] = 1, 2, -1
    index = np.flatnonzero(data) if flat else np.argwhere(data)
    values, where = numpy_helper.from_array(data[data != 0], "S"), numpy_helper.from_array(index.astype(np.int64), "at")
    return helper.make_sparse_tensor(values, where, data.shape), data


@pytest.mark.parametrize("flat", [False, True])
def test_sparse_initializers_and_constants(flat: bool) -> None:
    sparse, data = _sparse(flat)
    made = model([*tower(), *layer("S")])
    made.graph.sparse_initializer.append(sparse)
    assert "fc" in {r.name for r in hold(made).report.rules}
    constant = N("Constant", [], ["S"], sparse_value=sparse)
    made = model([constant, *tower(), *layer("S")])
    assert "fc" in {r.name for r in hold(made).report.rules}
    dense = flattened(made).graph.node[0].attribute[0]
    np.testing.assert_array_equal(numpy_helper.to_array(dense.t), data)


def test_initializers_that_callers_may_replace() -> None:
    made = model([*tower(), *layer(), N("Gather", ["y", "place"], ["z"], axis=1)], outputs=[info("z")],
                 place=np.array([3]), knob=np.float32(2))  # fmt: skip
    made.graph.input.extend([info("place", [1], TensorProto.INT64), info("knob", [])])
    assert overridable(made) == {"place", "knob"}
    result = hold(made)
    assert [i.name for i in result.model.graph.input] == ["u", "c", "place", "knob"]
    rng = np.random.default_rng(1)
    user, items = rng.standard_normal((1, 64)).astype(np.float32), rng.standard_normal((ROWS, 64)).astype(np.float32)
    other = {"place": np.array([60])}
    a = session(made).run(["z"], {"u": np.repeat(user, ROWS, 0), "c": items, **other})
    b = session(result.model).run(["z"], {"u": user, "c": items, **other})
    np.testing.assert_allclose(b[0], a[0], atol=1e-5)
    made.ir_version = 3
    assert overridable(made) == set(), "all had to be listed"


# --- external data -------------------------------------------------------------------------------------------------


def _external(folder: Path, location: str = "w.bin", **entries: str) -> Path:
    """A model whose first weights lie in a file, which the caller writes."""
    made = model([*tower(), *layer()])
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def _linked(folder: Path) -> None:
    (folder / "real.bin").write_bytes(WEIGHTS["W"].tobytes())
    (folder / "w.bin").symlink_to("real.bin")


def _hard_linked(folder: Path) -> None:
    (folder / "real.bin").write_bytes(WEIGHTS["W"].tobytes())
    os.link(folder / "real.bin", folder / "w.bin")


def _longer(folder: Path) -> None:
    (folder / "w.bin").write_bytes(WEIGHTS["W"].tobytes() + bytes(64))


@pytest.mark.parametrize("write", [_linked, _hard_linked, _longer])
def test_external_data_that_the_runtime_loads(tmp_path: Path, write: Any) -> None:
    path = _external(tmp_path)
    write(tmp_path)
    session(path)
    result = onnxrank.optimize(path, request=["u"])
    assert result.changed and all(c.passed for c in result.report.checks)
    loaded = load(path)
    np.testing.assert_array_equal(tensor_data(loaded.proto.graph.initializer[0], tmp_path), WEIGHTS["W"])


@pytest.mark.parametrize(
    ("entries", "dims", "said"),
    [
        ({"location": "a\0b"}, [64, 256], "is no name of a file"),
        ({"length": "100"}, [64, 256], "is said to have 100 bytes, but its type and shape"),
        ({"offset": "9" * 30}, [64, 256], "which has only"),
        ({"length": "9" * 30}, [64, 256], "which has only"),
        ({}, [-64, 256], "has a negative dimension"),
        ({}, [2**62, 2**62], "which has only"),
    ],
)
def test_external_data_that_does_not_fit(tmp_path: Path, entries: dict[str, str], dims: list[int], said: str) -> None:
    path = _external(tmp_path, **entries)
    made = ModelProto.FromString(path.read_bytes())
    made.graph.initializer[0].dims[:] = dims
    path.write_bytes(made.SerializeToString())
    (tmp_path / "w.bin").write_bytes(WEIGHTS["W"].tobytes())
    with pytest.raises(ModelError, match=said):
        load(path)


def test_external_data_that_shrinks_after_it_was_looked_at(tmp_path: Path) -> None:
    path = _external(tmp_path)
    (tmp_path / "w.bin").write_bytes(WEIGHTS["W"].tobytes())
    tensor = load(path).proto.graph.initializer[0]
    (tmp_path / "w.bin").write_bytes(b"1")
    with pytest.raises(ModelError, match="has become shorter"):
        tensor_data(tensor, tmp_path)
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="outside the model's folder"):
        tensor_data(tensor, tmp_path)


def test_operators_of_another_domain_alone() -> None:
    """Known operators of onnxruntime's own domain, and functions of the model: neither is foreign."""
    inputs = [info("u", ["N", 64]), info("c", ["N", 64])]
    node = N("FusedMatMul", ["u", "c"], ["y"], domain="com.microsoft", transB=1)
    function = helper.make_function(
        "own", "Score", ["a", "b"], ["y"], [N("Mul", ["a", "b"], ["y"])], [helper.make_opsetid("", 17)]
    )
    for made, functions in ((node, []), (N("Score", ["u", "c"], ["y"], domain="own"), [function])):
        graph = helper.make_graph([made], "g", inputs, [info("y", ["N", None])])
        opsets = [helper.make_opsetid(*o) for o in (("", 17), ("com.microsoft", 1), ("own", 1))]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)
        assert onnxrank.optimize(model, request=["u"]).report is not None
    foreign = helper.make_graph([N("Score", ["u", "c"], ["y"], domain="acme")], "g", inputs, [info("y")])
    opsets = [helper.make_opsetid("acme", 1), helper.make_opsetid("", 17)]
    with pytest.raises(ModelError, match="no operators of the default ONNX domain"):
        onnxrank.optimize(helper.make_model(foreign, opset_imports=opsets, ir_version=8), request=["u"])


@pytest.mark.parametrize("imported", [True, False])
def test_operators_of_trees_and_linear_models_alone(tmp_path: Path, imported: bool) -> None:
    """As converters of scikit-learn, CatBoost and XGBoost write: ONNX's other domain, whose import is the only one."""
    trees = N(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1, nodes_treeids=[0, 0, 0],
        nodes_nodeids=[0, 1, 2], nodes_featureids=[70, 0, 0], nodes_values=[0.5, 0.0, 0.0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0],
        target_treeids=[0, 0], target_nodeids=[1, 2], target_ids=[0, 0], target_weights=[1.0, 2.0],
    )  # fmt: skip
    graph = helper.make_graph([trees], "g", [info("x", ["N", 128])], [info("y", ["N", 1])])
    opsets = [helper.make_opsetid("ai.onnx.ml", 1), *([helper.make_opsetid("", 17)] if imported else [])]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path = tmp_path / "trees.onnx"
    onnx.save(made, path)
    result = onnxrank.optimize(path, request=["x[0:64]"])
    assert not result.changed and any("request-level and candidate-level" in r.reason for r in result.report.refusals)
    assert len(made.opset_import) == len(opsets)
    assert cli.main(["optimize", str(path), str(tmp_path / "out.onnx"), "--request", "x[0:64]", "-q"]) == 0
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()
    assert verify(path, tmp_path / "out.onnx").passed
