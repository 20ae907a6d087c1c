"""Two models in one: the same scores at every N, nothing large stored twice, a condition made of an extent."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import xor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers import Graph, run, session
from onnx import ModelProto, numpy_helper

from onnxrank.graphs import attribute, captured, names_in, subgraphs
from onnxrank.joining import ALONE, NAME, SINGLE, Count, crossovers, joined

BELOW = 5
WIDTH = 96


def ranker(split: bool, opset: int = 17, bias: float = 1.0) -> ModelProto:
    """Two layers over a user and items, the first whole or divided, with a lookup in front that is the same."""
    g, rng = Graph(opset), np.random.default_rng(0)
    user, ids = g.input("user", [1, WIDTH]), g.input("ids", ["N"], onnx.TensorProto.INT64)
    table, first = g.const(rng.integers(-3, 4, (50, WIDTH))), rng.integers(-2, 3, (2 * WIDTH, WIDTH))
    second, last = (g.const(rng.integers(-2, 3, s)) for s in ((WIDTH, WIDTH), (WIDTH, 1)))
    item = g.op("Gather", table, ids)
    if split:
        hidden = g.op("Add", g.op("MatMul", user, g.const(first[:WIDTH])), g.op("MatMul", item, g.const(first[WIDTH:])))
    else:
        rows = g.op("Concat", g.op("Shape", ids), g.ints(WIDTH), axis=0)
        hidden = g.op("MatMul", g.op("Concat", g.op("Expand", user, rows), item, axis=1), g.const(first))
    hidden = g.op("Relu", g.op("Add", hidden, g.const(np.full(WIDTH, bias))))
    g.output(g.op("MatMul", g.op("Relu", g.op("MatMul", hidden, second)), last), ["N", 1])
    return named(g.model())


def named(model: ModelProto) -> ModelProto:
    """A model whose outputs are called alike, whatever else it has."""
    for k, o in enumerate(model.graph.output):
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [f"out {k}" if n == o.name else n for n in names]
        o.name = f"out {k}"
    return model


def both(opset: int = 17, **options: float) -> ModelProto:
    made = joined(ranker(False, opset, **options), ranker(True, opset), BELOW, Count("ids", 0))
    assert made is not None
    onnx.checker.check_model(made, full_check=True)
    return made


def crossover(model: ModelProto) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == NAME)


@pytest.mark.parametrize("n", [0, 1, BELOW - 1, BELOW, BELOW + 1, 4096])
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_scores_are_those_of_both(n: int, level: str) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    made = onnxruntime.InferenceSession(both().SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(n)
    feed = {"user": rng.integers(-2, 3, (1, WIDTH)).astype(np.float32), "ids": rng.integers(0, 50, n)}
    (scores,) = run(made, feed).values()
    for split in (False, True):
        np.testing.assert_array_equal(scores, next(iter(run(ranker(split), feed).values())))


@pytest.mark.parametrize(("n", "same"), [(BELOW - 1, False), (BELOW, True)])
def test_the_condition_counts_candidates(n: int, same: bool) -> None:
    feed = {"user": np.ones((1, WIDTH), np.float32), "ids": np.arange(n)}
    found, wanted = (next(iter(run(m, feed).values())) for m in (both(bias=2.0), ranker(True)))
    assert np.array_equal(found, wanted) == same


def condition(model: ModelProto) -> list[onnx.NodeProto]:
    """What the `If` asks, from the last node back to the first."""
    maker = {o: n for n in model.graph.node for o in n.output}
    found, name = [], crossover(model).input[0]
    while name in maker:
        found.append(maker[name])
        name = maker[name].input[0]
    return found


def test_the_condition_is_made_of_extents_alone() -> None:
    made = both(opset=14)
    less, gather, shape = found = condition(made)
    assert [n.op_type for n in found] == ["Less", "Gather", "Shape"]
    assert list(shape.input) == ["ids"]
    stored = {t.name for t in made.graph.initializer}
    assert {gather.input[1], less.input[1]} <= stored


def test_one_extent_is_asked_for_where_that_can_be() -> None:
    less, shape = condition(both(opset=15))
    assert (less.op_type, shape.op_type, list(shape.input)) == ("Less", "Shape", ["ids"])
    assert {a.name: a.i for a in shape.attribute} == {"start": 0, "end": 1}


def test_an_extent_that_both_read_is_read_once() -> None:
    few, many = ranker(False), ranker(True)
    for k, model in enumerate((few, many)):
        model.graph.node.insert(0, onnx.helper.make_node("Shape", ["ids"], [f"rows {k}"], "as many", start=0, end=1))
        model.graph.node.append(onnx.helper.make_node("Identity", [f"rows {k}"], ["out 1"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("out 1", onnx.TensorProto.INT64, [1]))
    made = joined(few, many, BELOW, Count("ids", 0))
    assert made is not None
    assert [n.name for n in condition(made)] == ["", "as many"]
    for n in (0, BELOW - 1, BELOW):
        feed = {"user": np.ones((1, WIDTH), np.float32), "ids": np.arange(n)}
        for wanted, found in zip(run(few, feed).values(), run(made, feed).values(), strict=True):
            np.testing.assert_array_equal(wanted, found)


def test_small_weights_are_handed_to_no_branch() -> None:
    """Whatever a branch captures costs a little in every run."""
    made = both()
    large = {t.name for t in made.graph.initializer if t.ByteSize() > 1 << 14}
    stored = {t.name for t in made.graph.initializer}
    for branch in crossover(made).attribute:
        assert captured(branch.g) & stored <= large
        assert len(branch.g.initializer) > 0


def test_what_both_do_alike_stands_outside() -> None:
    made = both()
    outside = [n.op_type for n in made.graph.node]
    assert (
        outside == ["Gather", "Shape", "Gather", "Less", "If", "MatMul", "Relu", "MatMul"] or outside.count("If") == 1
    )
    inside = [n.op_type for a in crossover(made).attribute for n in a.g.node]
    assert inside.count("MatMul") == 3
    assert "Relu" in inside  # a runtime fuses it with what is before it
    assert outside.count("MatMul") == 2


def test_weights_are_stored_once() -> None:
    made = both()
    assert made.ByteSize() < ranker(False).ByteSize() * 1.1
    weights = [t for t in made.graph.initializer if list(t.dims) == [2 * WIDTH, WIDTH]]
    assert len(weights) == 1
    few, many = (attribute(crossover(made), f"{b}_branch") for b in ("then", "else"))
    assert weights[0].name in captured(few) & captured(many)
    assert [n.op_type for n in many.node][:2] == ["Gather", "Gather"]


def test_selections_of_weights_are_folded_when_the_model_is_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.onnx")
    onnxruntime.InferenceSession(both().SerializeToString(), options, providers=["CPUExecutionProvider"])
    many = attribute(crossover(onnx.load(tmp_path / "m.onnx")), "else_branch")
    assert "Gather" not in [n.op_type for n in many.node]


def keys(branch: onnx.GraphProto, shapes: dict[str, Callable[[int], list[int]]]) -> set[int]:
    """What onnxruntime tells requests of several numbers of candidates apart by, when it plans memory."""
    given = captured(branch) & shapes.keys()
    return {reduce(xor, (e for g in given for e in shapes[g](n)), 0) for n in (1, 2, 5, 100)}


@pytest.mark.parametrize(("more", "taken"), [(False, "Flatten"), (True, "Neg")])
def test_a_branch_plans_memory_for_every_number_of_candidates(more: bool, taken: str) -> None:
    """Not where an even number of tensors with rows of candidates is handed in: so one more is, or a view of one."""
    few, many = ranker(False), ranker(True)
    for model in (few, many) if more else ():
        model.graph.node.insert(0, onnx.helper.make_node("Neg", ["ids"], ["out 1"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("out 1", onnx.TensorProto.INT64, ["N"]))
    item = next(n.output[0] for n in many.graph.node if n.op_type == "Gather")
    shapes = {"user": lambda n: [1, WIDTH], "ids": lambda n: [n], item: lambda n: [n, WIDTH], "out 1": lambda n: [n]}

    def shape(name: str, candidates: int) -> list[int] | None:
        return shapes[name](candidates) if name in shapes else None

    plain, made = (joined(few, many, BELOW, Count("ids", 0), s) for s in (None, shape))
    assert plain is not None and made is not None
    onnx.checker.check_model(made, full_check=True)
    few_of = [attribute(crossover(m), "then_branch") for m in (plain, made)]
    makers = {o: n.op_type for n in made.graph.node for o in n.output}
    (extra,) = captured(few_of[1]) - captured(few_of[0])
    assert makers[extra] == taken
    shapes.setdefault(extra, lambda n: [1, n])
    assert [len(keys(b, shapes)) for b in few_of] == [1, 4]
    for n in (0, 2, BELOW, 40):
        feed = {"user": np.ones((1, WIDTH), np.float32), "ids": np.arange(n)}
        for wanted, found in zip(run(plain, feed).values(), run(made, feed).values(), strict=True):
            np.testing.assert_array_equal(wanted, found)


def optimised(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A model as onnxruntime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "m.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "m.onnx")


def test_branches_have_copies_of_weights_that_are_packed(tmp_path: Path) -> None:
    """Made when the model is loaded: none of the branches captures a weight of a product then, and none copies it."""
    made = both()
    stored = {t.name for t in made.graph.initializer}
    for name in ("else_branch", "then_branch"):
        branch = attribute(crossover(made), name)
        assert not stored & {i for n in branch.node if n.op_type == "MatMul" for i in n.input}
        run = attribute(crossover(optimised(made, tmp_path)), name)
        multiplied = {i for n in run.node if "Gemm" in n.op_type or "MatMul" in n.op_type for i in n.input}
        assert not multiplied & captured(run) & stored and "Gather" not in {n.op_type for n in run.node}
        assert {t.name for t in run.initializer} & multiplied


def asked(split: bool) -> ModelProto:
    """The ranker, whose second layer is in a graph of its own, chosen by what the user is."""
    model = ranker(split)
    *nodes, second, relu, last = model.graph.node
    ways = []
    for way, op in (("then", "Neg"), ("else", "Abs")):
        inner = [onnx.helper.make_node("MatMul", second.input, [f"{way} hidden"])]
        inner.append(onnx.helper.make_node(op, [f"{way} hidden"], [f"{way} given"]))
        out = onnx.helper.make_tensor_value_info(f"{way} given", onnx.TensorProto.FLOAT, ["N", WIDTH])
        ways.append(onnx.helper.make_graph(inner, way, [], [out]))
    chosen = onnx.helper.make_node("If", ["liked"], second.output, then_branch=ways[0], else_branch=ways[1])
    nodes.append(onnx.helper.make_node("ReduceMax", ["user"], ["most"], keepdims=0))
    nodes.append(onnx.helper.make_node("Greater", ["most", "zero"], ["liked"]))
    nodes += [chosen, relu, last]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    return model


def test_a_graph_inside_a_branch_has_copies_of_its_own(tmp_path: Path) -> None:
    made = joined(asked(False), asked(True), BELOW, Count("ids", 0))
    assert made is not None
    onnx.checker.check_model(made, full_check=True)
    for n in (0, 1, BELOW, 30):
        for liking in (-1, 1):
            feed = {"user": np.full((1, WIDTH), liking, np.float32), "ids": np.arange(n) % 50}
            for split in (False, True):
                np.testing.assert_array_equal(*(next(iter(run(m, feed).values())) for m in (made, asked(split))))
    for branch in crossover(optimised(made, tmp_path)).attribute:
        inner = [n for n in branch.g.node if n.op_type == "If"]
        for graph in (g for n in inner for g in subgraphs(n)):
            assert {i for n in graph.node if n.op_type == "MatMul" for i in n.input} & {
                t.name for t in graph.initializer
            }


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_a_single_candidate_in_front_of_both(level: str, tmp_path: Path) -> None:
    """What stands two graphs deep has weights of its own, too, and each number of candidates its plan."""
    two = both()
    made = joined(ranker(False, bias=2.0), two, SINGLE, Count("ids", 0), name=ALONE)
    assert made is not None
    onnx.checker.check_model(made, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for n in (0, 1, 2, BELOW - 1, BELOW, 4096):
        feed = {"user": np.ones((1, WIDTH), np.float32), "ids": np.arange(n) % 50}
        (wanted,) = run(ranker(False, bias=2.0) if n == 1 else two, feed).values()
        np.testing.assert_array_equal(next(iter(run(session, feed).values())), wanted)
    (inner,) = crossovers(optimised(made, tmp_path).graph)
    for name in ("else_branch", "then_branch"):
        branch = attribute(inner, name)
        multiplied = {i for n in branch.node if "Gemm" in n.op_type or "MatMul" in n.op_type for i in n.input}
        assert {t.name for t in branch.initializer} & multiplied
        assert "Gather" not in {n.op_type for n in branch.node}


def test_nothing_is_shared_where_memory_is_planned_once_for_all() -> None:
    """With an even number of inputs with rows of candidates, what stands outside has a plan for one number alone."""
    few, many = ranker(False), ranker(True)
    for model in (few, many):
        model.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.INT64, ["N"]))
        model.graph.node.append(onnx.helper.make_node("Neg", ["more"], ["out 1"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info("out 1", onnx.TensorProto.INT64, ["N"]))
    known = {"user": lambda n: [1, WIDTH], "ids": lambda n: [n], "more": lambda n: [n]}

    def shape(name: str, candidates: int) -> list[int] | None:
        return known[name](candidates) if name in known else None

    plain, made = (joined(few, many, BELOW, Count("ids", 0), s) for s in (None, shape))
    assert plain is not None and made is not None
    onnx.checker.check_model(made, full_check=True)
    assert {"Gather", "Neg"} <= {n.op_type for n in plain.graph.node}
    assert {n.op_type for n in made.graph.node} <= {"Shape", "Less", "If", "Flatten"}
    for n in (0, 2, BELOW, 40):
        feed = {"user": np.ones((1, WIDTH), np.float32), "ids": np.arange(n), "more": np.arange(n)}
        for wanted, found in zip(run(plain, feed).values(), run(made, feed).values(), strict=True):
            np.testing.assert_array_equal(wanted, found)


def test_what_is_declared_of_tensors_is_kept() -> None:
    """What a branch gives has no declared type of its own, beside which another would be a contradiction."""
    few, many = (onnx.shape_inference.infer_shapes(ranker(split)) for split in (False, True))
    made = joined(few, many, BELOW, Count("ids", 0))
    assert made is not None
    onnx.checker.check_model(made, full_check=True)
    branches = {a.name: a.g for a in crossover(made).attribute}
    for branch in branches.values():
        own = {o for n in branch.node for o in n.output}
        described = {v.name for v in branch.value_info}
        assert described and described <= own and not described & {o.name for o in branch.output}


def test_names_are_given_once() -> None:
    made = both()
    branches = [attribute(crossover(made), f"{b}_branch") for b in ("then", "else")]
    given = [{o for n in b.node for o in n.output} for b in branches]
    outer = {o for n in made.graph.node for o in n.output} | {t.name for t in made.graph.initializer}
    assert not given[0] & given[1]
    assert not (given[0] | given[1]) & outer
    assert names_in(made.graph)


def test_weights_of_one_name_that_differ_are_kept_apart() -> None:
    few, many = ranker(True, bias=3.0), ranker(True)
    made = joined(few, many, BELOW, Count("ids", 0))
    assert made is not None
    for n, model in ((2, few), (9, many)):
        feed = {"user": np.ones((1, WIDTH), np.float32), "ids": np.arange(n)}
        np.testing.assert_array_equal(*(next(iter(run(m, feed).values())) for m in (made, model)))


def test_rows_per_candidate_count() -> None:
    made = joined(ranker(False), ranker(True), 3, Count("ids", 0, 2))
    assert made is not None
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    assert stored[f"{NAME}/below"] == 6


def test_models_of_other_outputs_do_not_stand_in_one() -> None:
    few = ranker(False)
    few.graph.output[0].name = "other"
    assert joined(few, ranker(True), BELOW, Count("ids", 0)) is None


def test_before_whole_numbers_could_be_compared_there_is_no_such_file() -> None:
    few, many = ranker(False), ranker(True)
    for model in (few, many):
        model.opset_import[0].version = 8
    assert joined(few, many, BELOW, Count("ids", 0)) is None


def test_a_frontier_that_is_made_outside_is_handed_on() -> None:
    """A branch may give what stands in front of the `If`."""

    def model(doubled: bool) -> ModelProto:
        g = Graph()
        x = g.input("x", ["N", 4])
        y = g.op("Relu", x)
        z = g.op("Add", y, y) if doubled else y
        w = g.const(np.eye(4))
        g.output(g.op("MatMul", z, w), ["N", 4])
        g.output(g.op("Neg", y), ["N", 4])
        return named(g.model())

    made = joined(model(False), model(True), BELOW, Count("x", 0))
    assert made is not None
    for n in (1, 7):
        x = np.arange(4.0 * n, dtype=np.float32).reshape(n, 4)
        first = next(iter(session(made).run(None, {"x": x})))
        np.testing.assert_array_equal(first, x * (2 if n >= BELOW else 1))
