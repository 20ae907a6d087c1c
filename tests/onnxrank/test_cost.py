"""What operators are billed for, by hand; and that what is billed can be replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from helpers import Graph
from onnx import TensorProto, helper, numpy_helper

import onnxrank
from onnxrank import cost
from onnxrank.facts import Facts, derive


def shapes(known: Mapping[str, tuple[int, ...]], **types: int) -> cost.Shapes:
    return cost.Shapes(Facts(), known, {}, {"N": 1}, types)


def bill(op: str, known: Mapping[str, tuple[int, ...]], inputs: int, outputs: int = 1, **attributes: Any) -> cost.Bill:
    node = helper.make_node(op, ["x", "w", "v"][:inputs], ["y", "z"][:outputs], **attributes)
    return cost.billed(node, shapes(known))


@pytest.mark.parametrize(
    ("op", "known", "inputs", "attributes", "kind", "runs"),
    [
        ("Gather", {"x": (512, 64), "w": (32,), "y": (512, 32)}, 2, {"axis": 1}, "regroup", 512 * 32),
        ("Gather", {"x": (512, 16, 8), "w": (4,), "y": (512, 4, 8)}, 2, {"axis": -2}, "regroup", 512 * 4),
        ("Gather", {"x": (512, 512), "w": (32,), "y": (512, 32)}, 2, {"axis": 1}, "regroup far", 512 * 32),
        ("Gather", {"x": (1000, 64), "w": (512,), "y": (512, 64)}, 2, {}, "elementwise", 0),
        ("Concat", {"x": (512, 8), "w": (512, 4), "y": (512, 12)}, 2, {"axis": 1}, "copy", 512 * 2),
        ("Concat", {"x": (512, 8), "w": (512, 8), "y": (1024, 8)}, 2, {"axis": 0}, "copy", 2),
        ("Concat", {"x": (512, 2048), "w": (512, 4), "y": (512, 2052)}, 2, {"axis": 1}, "copy far", 512 * 2),
        ("Split", {"x": (512, 8), "y": (512, 4), "z": (512, 4)}, 1, {"axis": -1}, "copy", 512 * 2),
        ("Slice", {"x": (512, 64), "y": (512, 16)}, 1, {}, "copy", 512),
        ("Slice", {"x": (512, 20, 16), "y": (512, 5, 16)}, 1, {}, "copy", 512),
        ("Expand", {"x": (1, 64), "y": (512, 64)}, 1, {}, "expand", 512),
        ("Transpose", {"x": (512, 64), "y": (64, 512)}, 1, {}, "transpose", 512 * 64),
        ("Transpose", {"x": (512, 4, 8), "y": (4, 512, 8)}, 1, {"perm": [1, 0, 2]}, "exchange", 512 * 4),
        ("Transpose", {"x": (512, 4, 2), "y": (4, 512, 2)}, 1, {"perm": [1, 0, 2]}, "transpose", 512 * 4),
        ("Transpose", {"x": (512, 4, 8), "y": (8, 4, 512)}, 1, {}, "permute", 512 * 32),
        ("Transpose", {"x": (512, 4, 8), "y": (8, 512, 4)}, 1, {"perm": [2, 0, 1]}, "transpose", 512 * 32),
        ("Transpose", {"x": (8, 512, 4, 2), "y": (4, 512, 2, 8)}, 1, {"perm": [2, 1, 3, 0]}, "permute", 512 * 64),
        ("Softmax", {"x": (512, 10), "y": (512, 10)}, 1, {}, "softmax", 512),
        ("Relu", {"x": (512, 10), "y": (512, 10)}, 1, {}, "elementwise", 0),
        ("TopK", {"x": (512, 10), "w": (1,), "y": (512, 3)}, 2, {}, "top", 512 * 3),
    ],
)
def test_data_movement_is_billed_by_pieces_that_lie_together(
    op: str, known: dict[str, tuple[int, ...]], inputs: int, attributes: dict[str, Any], kind: str, runs: int
) -> None:
    outputs = 2 if op == "Split" else 1
    made = bill(op, known, inputs, outputs, **attributes)
    assert (made.kind, made.runs, made.macs) == (kind, runs, 0)


def test_products_are_billed_by_multiply_adds_and_stacks_by_products_too() -> None:
    one = bill("MatMul", {"x": (512, 64), "w": (64, 32), "y": (512, 32)}, 2)
    assert (one.kind, one.runs, one.macs) == ("product", 0, 512 * 64 * 32)
    stack = bill("MatMul", {"x": (512, 4, 64), "w": (512, 64, 8), "y": (512, 4, 8)}, 2)
    assert (stack.kind, stack.runs, stack.macs) == ("stack", 512, 512 * 4 * 64 * 8)
    shared = bill("MatMul", {"x": (512, 4, 64), "w": (64, 8), "y": (512, 4, 8)}, 2)
    assert (shared.kind, shared.macs) == ("product", 512 * 4 * 64 * 8)


def test_shapes_alone_cost_nothing_and_unknown_shapes_are_no_error() -> None:
    assert bill("Reshape", {"x": (512, 64), "y": (64, 512)}, 1).launches == 0
    assert cost.CPU.seconds(bill("Reshape", {}, 1)) == 0
    for op in ("Gather", "Transpose", "MatMul", "Softmax", "Concat", "Slice"):
        assert cost.CPU.seconds(bill(op, {}, 2)) > 0


def test_bytes_follow_the_element_type() -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    known = {"x": (10, 8), "y": (10, 8)}
    for kind, width in ((TensorProto.FLOAT16, 2), (TensorProto.INT64, 8), (TensorProto.BOOL, 1), (0, 4)):
        assert cost.node_bytes(node, shapes(known, y=kind)) == 80 * width
    nodes = [
        helper.make_node("Cast", ["a"], ["b"], to=TensorProto.DOUBLE),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Greater", ["c", "c"], ["d"]),
        helper.make_node("Where", ["d", "a", "a"], ["e"]),
        helper.make_node("Shape", ["c"], ["f"]),
    ]
    given = helper.make_tensor_value_info("a", TensorProto.FLOAT16, ["N"])
    types = cost.types_of(helper.make_graph(nodes, "g", [given], []))
    assert [types[n] for n in "abcdef"] == [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.DOUBLE,
                                            TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.INT64]  # fmt: skip


def test_multiply_adds_of_fused_and_recurrent_layers() -> None:
    length, width, batch = 128, 64, 3
    known = {"x": (batch, length, width), "w": (width, 3 * width), "y": (batch, length, width)}
    fused = helper.make_node("Attention", ["x", "w"], ["y"], domain="com.microsoft", num_heads=4)
    products = batch * (length * width * 3 * width + 2 * length * length * width)
    assert cost.node_macs(fused, shapes(known)) == products
    known = {"x": (batch, length, width), "w": (batch, 50, width), "v": (batch, 50, 32)}
    heads = helper.make_node("MultiHeadAttention", ["x", "w", "v"], ["y"], domain="com.microsoft", num_heads=4)
    assert cost.node_macs(heads, shapes(known)) == batch * length * 50 * (width + 32)
    known = {"x": (length, batch, 32), "w": (1, 3 * width, 32), "v": (1, 3 * width, width)}
    gru = helper.make_node("GRU", ["x", "w", "v"], ["y"], hidden_size=width)
    macs = length * batch * 3 * width * (32 + width)
    assert cost.node_macs(gru, shapes(known)) == macs
    steps = length * batch
    # What it does at a step does not depend on which of its outputs somebody reads.
    assert cost.billed(gru, shapes(known)) == cost.Bill("recurrent", 4 * steps * width, steps, macs)


def test_costs_can_be_those_of_another_target() -> None:
    node = helper.make_node("Gather", ["x", "w"], ["y"], axis=1)
    known = shapes({"x": (512, 64), "w": (32,), "y": (512, 32)})
    other = cost.Target(1.0, 0.0, 0.0, {"regroup": cost.Rate(2.0, 0.0, run=1.0)})
    with mock.patch.object(cost, "CPU", other):
        assert cost.node_seconds(node, known) == 2.0 + 512 * 32
        assert cost.estimate(launches=3) == 3.0


@pytest.mark.parametrize(
    ("op", "operands", "out", "kind", "runs"),
    [
        ("Mul", ((512, 8, 8), (8, 1)), (512, 8, 8), "broadcast", 512 * 8),
        ("Add", ((512, 64), (64,)), (512, 64), "broadcast", 512),
        ("Mul", ((512, 1), ()), (512, 1), "broadcast", 512),  # onnxruntime takes up each row anew
        ("Mul", ((512, 8, 1), (1,)), (512, 8, 1), "broadcast", 512 * 8),
        ("Mul", ((512, 8, 1), (1, 1)), (512, 8, 1), "elementwise", 0),
        ("Mul", ((512, 8, 1), (512, 1, 1)), (512, 8, 1), "broadcast", 512),
        ("Mul", ((512, 1, 1), (512, 8, 1)), (512, 8, 1), "broadcast", 512),
        ("Add", ((512, 1, 8, 1), (8, 1)), (512, 1, 8, 1), "broadcast", 512),
        ("Mul", ((512, 64), ()), (512, 64), "elementwise", 0),
        ("Where", ((512, 1), (512, 8), (512, 8)), (512, 8), "where", 512),
        ("Gather", ((1000, 4), (512,)), (512, 4), "lookup", 512),
        ("Pow", ((512, 8), ()), (512, 8), "serial", 0),
        ("PRelu", ((512, 8), (8,)), (512, 8), "serial", 0),
        ("Log", ((512, 8),), (512, 8), "slow function", 0),
        ("Exp", ((512, 8),), (512, 8), "function", 0),
    ],
)
def test_what_is_broadcast_is_billed_by_the_pieces_gone_through(
    op: str, operands: Sequence[tuple[int, ...]], out: tuple[int, ...], kind: str, runs: int
) -> None:
    known = dict(zip("xwv", operands, strict=False)) | {"y": out}
    made = bill(op, known, len(operands))
    assert (made.kind, made.runs) == (kind, runs)


@pytest.mark.parametrize(("exponent", "kind"), [(2.0, "elementwise"), (3.0, "elementwise"), (0.5, "serial")])
def test_a_runtime_multiplies_for_small_whole_exponents(exponent: float, kind: str) -> None:
    g = Graph(17)
    c, u = g.input("c", ["N", 8]), g.input("u", ["N", 8])
    g.output(g.op("Pow", g.op("Sub", c, u), g.const(exponent)), ["N", 8])
    study = onnxrank.analyse(onnxrank.read(g.model()), request=["u"]).study
    assert [b.kind for b in cost.bills(study.model.graph, study.shapes(512))] == ["feed", "feed", "elementwise", kind]


@pytest.mark.parametrize(
    ("ends", "other", "once"),
    [((0, 1, 2, 4), None, True), ((0, 1, 2, 4), "Shape", True), ((0, 1, 2, 4), "Neg", False), ((0, 1, 3), None, False)],
)
def test_slices_of_all_of_a_tensor_are_one_split(ends: tuple[int, ...], other: str | None, once: bool) -> None:
    """That is what onnxruntime makes of them, if nothing else reads the entries."""
    g = Graph(17)
    c, u = g.input("c", ["N", 4]), g.input("u", ["N", 4])
    for a, b in pairwise(ends):
        g.output(g.op("Slice", c, g.ints(a), g.ints(b), g.ints(1)), ["N", b - a])
    if other == "Shape":
        g.output(g.op("Expand", g.op("Relu", u), g.op("Shape", c)), ["N", 4])
    elif other is not None:
        g.output(g.op(other, c), ["N", 4])
    study = onnxrank.analyse(onnxrank.read(g.model()), request=["u"]).study
    found = [b.launches for b in cost.bills(study.model.graph, study.shapes(512)) if b.kind == "copy"]
    assert all(n < 1 for n in found) == once


def test_each_operand_that_is_joined_takes_time() -> None:
    known = {"x": (512, 8), "w": (512, 8), "v": (512, 8), "y": (512, 24)}
    two, three = (bill("Concat", known, n, axis=1).launches for n in (2, 3))
    assert 1 < two < three


def test_einsum_is_billed_by_the_products_that_it_makes_one_after_the_other() -> None:
    known = {"x": (512, 8, 8), "w": (512, 6, 8), "y": (512, 8, 6, 8)}
    assert bill("Einsum", known, 2, equation="nhd,nmd->nhmd").runs == 512 * 8
    known = {"x": (512, 8), "w": (8, 4), "y": (512, 4)}
    assert bill("Einsum", known, 2, equation="nd,dh->nh").kind == "product"


def test_a_runtime_takes_biases_and_activations_into_products_and_folds_constants() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Reshape", ["d", "s"], ["e"]),
        helper.make_node("Neg", ["b"], ["constant"]),
        helper.make_node("Add", ["e", "e"], ["f"]),
        helper.make_node("Relu", ["f"], ["y"]),
    ]
    rows = {name: ((512, ()), (8, ())) for name in "xacdefy"}
    stored = {"w": (8, 8), "b": (8,), "s": (2,)}
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [512, 8])
    graph = helper.make_graph(nodes, "g", [given], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [512, 8])])
    found = list(cost.bills(graph, cost.Shapes(Facts(), stored, rows, {"N": 1})))
    assert [b.kind for b in found] == ["feed", "product", "view", "elementwise", "elementwise"]
    with mock.patch.object(cost, "CPU", cost.Target(1.0, 0.0, 0.0, call=10.0)):
        assert cost.seconds(graph, cost.Shapes(Facts(), stored, rows, {"N": 1})) == 15.0


def test_what_leaves_the_cache_costs_more() -> None:
    target = cost.Target(0.0, 1.0, 0.0, spill=2.0)
    few, more, many = (cost.Bill("other", k * cost.CACHE) for k in (1, 2, 4))
    assert target.seconds(few) == few.bytes and target.seconds(many) == 3.0 * many.bytes
    assert more.bytes < target.seconds(more) < 3.0 * more.bytes
    runs = cost.Target(0.0, 0.0, 0.0, {"copy": cost.Rate(0.0, 0.0, far=1.0)})
    assert runs.seconds(cost.Bill("copy", 64 * cost.CACHE, 1000)) == 1000
    assert runs.seconds(cost.Bill("copy", 64 * cost.CACHE, 16 * cost.CACHE)) == cost.CACHE
    assert runs.seconds(cost.Bill("copy", cost.CACHE, 1000)) == 0


def test_weights_beyond_the_cache_are_read_for_every_request() -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["v"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2]),
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    for columns, kinds in (
        (1 << 10, {"feed", "elementwise", "product"}),
        (1 << 20, {"feed", "elementwise", "product", "weights"}),
    ):
        rows = {"ids": ((1, ("N",)),), "x": ((1, ("N",)), (columns, ())), "w": ((columns, ()), (2, ()))}
        rows["y"] = ((1, ("N",)), (2, ()))
        stored = {"table": (1 << 20, columns), "v": (2, columns)}
        for n in (1, 100):
            found = {b.kind: b for b in cost.bills(graph, cost.Shapes(Facts(), stored, rows, {"N": n}))}
            assert found.keys() == kinds
            assert "weights" not in kinds or found["weights"] == cost.Bill("weights", 8 * columns)


def test_shape_reads_no_entries() -> None:
    known = shapes({"x": (512, 195), "s": (2,), "n": ()})
    for op, given in (("Shape", "s"), ("Size", "n")):
        assert cost.billed(helper.make_node(op, ["x"], [given]), known).bytes <= 4 * 2


def test_an_elementwise_operator_goes_through_what_it_reads() -> None:
    rows = {name: ((1, ("N",)), (8, ())) for name in "xyabcd"} | {"r": ((1, ("N",)), (1, ()))}
    shapes = cost.Shapes(Facts(), {"w": (8,)}, rows, {"N": 512})
    add, scale, bias, negate = (
        cost.billed(helper.make_node(op, operands, [given]), shapes)
        for op, operands, given in (("Add", "xy", "a"), ("Mul", "xr", "b"), ("Add", "xw", "c"), ("Neg", "x", "d"))
    )
    assert negate.bytes == 4 * 512 * 8 and add.bytes == 2 * negate.bytes
    assert scale.bytes == 4 * 512 * 9 and bias.bytes == 4 * (512 + 1) * 8


def two_products(added: str) -> tuple[Any, cost.Shapes]:
    """A layer, and a sum of two products, of which one is of as many rows as it has columns where N is 8."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["x", "w"], ["b"]),
        helper.make_node("Add", ["a", added], ["c"]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    rows = {name: ((1, ("N",)), (8, ())) for name in "xabcy"} | {"r": ((1, ("N",)),)}
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 8]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return graph, cost.Shapes(Facts(), {"w": (8, 8)}, rows, {"N": 512})


@pytest.mark.parametrize("added", ["b", "r"])
def test_what_runs_is_counted_once_and_billed_anew_for_each_number_of_candidates(added: str) -> None:
    graph, known = two_products(added)
    with mock.patch.object(cost, "CPU", cost.Target(1.0, 0.0, 0.0, call=10.0)):
        assert cost.seconds(graph, known) == 11.0 + 4
        # A row of as many entries as there are columns is added within the product.
        assert cost.seconds(graph, known.at(8)) == 11.0 + (4 if added == "b" else 2)
        assert cost.seconds(graph, known.at(512)) == 11.0 + 4


def test_times_do_not_depend_on_the_order_of_the_nodes() -> None:
    nodes = [helper.make_node("Relu", [f"x{k}"], [f"y{k}"]) for k in range(50)]
    rows = {f"{name}{k}": ((1, ("N",)), (7 * k % 50 + 1, ())) for k in range(50) for name in "xy"}
    ends = [helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, None) for k in range(50)]
    times = {
        cost.seconds(helper.make_graph(order, "g", [], ends), cost.Shapes(Facts(), {}, rows, {"N": 512}))
        for order in (nodes, nodes[::-1], sorted(nodes, key=lambda n: n.output[0]))
    }
    assert len(times) == 1


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a = Add(x, m)", 0.5),
        ("a = Where(half, x, far)", 0.25),
        ("a = Add(x, x)", 0.0),
        ("s = Add(x, m) t = ReduceMax<axes=[1], keepdims=1>(s) l = Sub(t, sixty) a = Max(s, l)", 0.0),
    ],
)
def test_a_softmax_of_masked_scores_is_billed_for_denormal_weights(text: str, share: float) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,8] x, float[N,8] hidden) => (float[N,8] y)'
        f"{{ m = Mul(hidden, far) {text} y = Softmax<axis=-1>(a) }}"
    )
    half = np.array([[1, 1, 1, 0, 1, 1, 1, 0]], bool)
    for name, data in {"far": np.float32(-1e9), "sixty": np.float32(60), "half": half}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(data), name))
    inputs = {"x": ((1, ("N",)), (8, ())), "hidden": ((1, ("N",)), (8, ()))}
    known = cost.shapes_of(model, derive(model, inputs, None), inputs, 512, None)
    (billed,) = [cost.billed(n, known) for n in model.graph.node if n.op_type == "Softmax"]
    assert billed.denormals == round(512 * 8 * share)
    free = replace(billed, denormals=0)
    extra = cost.CPU.seconds(billed) - cost.CPU.seconds(free)
    assert extra == pytest.approx(billed.denormals * cost.CPU.denormal, abs=1e-12)
