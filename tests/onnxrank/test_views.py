"""One tensor in other shapes and orders of its axes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import FLOAT, run, session
from onnx import ModelProto, helper

from onnxrank.emitter import Emitter
from onnxrank.journal import Journal
from onnxrank.values import CANDIDATES, Dims, Unrepresentable
from onnxrank.views import Views, join_is_faster

ROWS: Dims = ((CANDIDATES,), (4,), (6,))


def views(opset: int = 17) -> Views:
    return Views(Emitter(["a"], opset), {}, Journal())


@pytest.mark.parametrize("count", [2, 20])
@pytest.mark.parametrize(("width", "cut"), [(1, False), (2, False), (4, True), (8, True), (48, False)])
@pytest.mark.parametrize("back", [False, True])
def test_parts_of_rows_are_cut_and_joined_where_that_is_faster(count: int, width: int, cut: bool, back: bool) -> None:
    """A Transpose moves up to 8 bytes as one number, and wide parts as fast as a Concat does."""
    made = views()
    split: Dims = ((CANDIDATES,), (count,), (width,)) if not back else ((count,), (CANDIDATES,), (width,))
    name, physical = made.permuted("a", split, split, [1, 0, 2])
    name = made.reshape(name, physical, (split[1], split[0], split[2]))
    kinds = {n.proto.op_type for n in made.emit.nodes}
    assert ("Split" in kinds) == cut and ("Transpose" in kinds) != cut
    nodes = [n.proto for n in made.emit.nodes]
    inputs = [helper.make_tensor_value_info("a", FLOAT, [None] * 3)]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(made.emit.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for n in (1, 7):
        shape = (count, n, width) if back else (n, count, width)
        data = np.arange(n * count * width, dtype=np.float32).reshape(shape)
        np.testing.assert_array_equal(run(model, {"a": data})[name], data.swapaxes(0, 1))


def test_a_reshape_is_taken_back() -> None:
    """Behind a Reshape, the shape before it is there already, and further ones start from that."""
    made = views()
    flat: Dims = ((CANDIDATES,), (24,))
    name = made.reshape("a", ROWS, flat)
    assert made.reshape(name, flat, ROWS) == "a" == made.before_reshape(name, flat, ROWS)
    assert made.unreshaped(made.reshape(name, flat, ((CANDIDATES,), (6,), (4,))), ((CANDIDATES,), (6,), (4,))) == (
        "a",
        ROWS,
    )


def test_extents_that_may_be_0_need_opset_14() -> None:
    """Two symbols in other places: 0 in a target means the extent that is there."""
    two: Dims = ((CANDIDATES,), ("S:L", 2))
    apart: Dims = ((CANDIDATES,), ("S:L",), (2,))
    made = views(13)
    made.sizes.extent_of |= {CANDIDATES: ("a", 0, 1), "S:L": ("a", 1, 2)}
    made.reshape("a", two, apart)
    with pytest.raises(Unrepresentable, match="before opset 14"):
        made.reshape("a", (("S:L",), (CANDIDATES,), (4,)), ((CANDIDATES,), ("S:L",), (2,), (2,)))


@pytest.mark.parametrize(
    ("have", "count", "runs", "joined"),
    [
        (((128,), (256,)), 128, 2, True),
        (((CANDIDATES,), (1024,)), 1024, 17, True),
        (((CANDIDATES,), (64,)), 28, 7, False),
        (((128,), (256,)), 128, 128, False),
        (((), (256,)), 128, 2, False),
    ],
)
def test_runs_are_joined_where_that_is_faster_for_few_rows(have: Dims, count: int, runs: int, joined: bool) -> None:
    assert join_is_faster(have, 1, count, runs) == joined


def _written(made: Views, name: str, inputs: dict[str, int]) -> ModelProto:
    """A model of what was written; ranks of its inputs."""
    values = [helper.make_tensor_value_info(i, FLOAT, [None] * rank) for i, rank in inputs.items()]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None)]
    nodes, stored = [n.proto for n in made.emit.nodes], list(made.emit.initializers.values())
    graph = helper.make_graph(nodes, "g", values, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("perm", "free", "apart"),
    [
        ((0, 2, 1), "inner", True),
        ((0, 2, 1), "rows", False),
        ((1, 0, 2), "inner", True),
        ((1, 0, 2), "rows", True),
        ((1, 2, 0), "rows", True),
        ((0, 2, 1, 3), "inner", False),
        ((0, 2, 3, 1), "inner", False),
        ((0, 1, 3, 2), "inner", True),
        ((1, 2, 0, 3), "rows", True),
    ],
)
@pytest.mark.parametrize("factor", [None, "Mul"])
def test_products_along_lengths_of_nothing(perm: tuple[int, ...], free: str, apart: bool, factor: str | None) -> None:
    """A Transpose that onnxruntime takes into a product stays apart where that has no entries, and no other does."""
    made, rank = views(), len(perm)
    dims: Dims = (*((2,),) * (rank - 2), ("S:L",) if free == "rows" else (3,), ("S:L",) if free == "inner" else (5,))
    made.sizes.extent_of["S:L"] = ("b", rank - (1 if free == "rows" else 2), 1)
    turned = made.emit.add("Transpose", ["a"], {"perm": perm})
    if factor is not None:
        turned = made.emit.add(factor, [turned, made.emit.constant(np.float32([2.0]))])
    name = made.factor(turned, dims, -1)
    assert (made.emit.op_of[name] == "Reshape") == apart
    assert "Shape" not in {n.proto.op_type for n in made.emit.nodes}, "the one length is what is left"
    product = made.emit.add("MatMul", [name, "b"])
    model = session(_written(made, product, {"a": rank, "b": rank}))
    for length in (7, 0, 7, 0, 1):
        shape = [length if isinstance(d[0], str) else d[0] for d in dims]
        left = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        right = np.ones((*shape[:-2], shape[-1], 4), np.float32)
        feed = {"a": np.ascontiguousarray(left.transpose(np.argsort(perm))), "b": right}
        wanted = (left * 2 if factor else left) @ right
        np.testing.assert_array_equal(run(model, feed)[product], wanted)


def test_products_of_no_candidates_are_the_users_own() -> None:
    """A Transpose that moves rows of candidates is taken in, as it was: with none of them it never ran."""
    made, dims = views(), ((2,), (CANDIDATES,), (4,))
    made.sizes.extent_of[CANDIDATES] = ("a", 0, 1)
    name = made.emit.add("Transpose", ["a"], {"perm": (1, 0, 2)})
    assert made.factor(name, dims, -1, own=True) == name != made.factor(name, dims, -1)


def test_axes_of_one_entry_in_front() -> None:
    """What a step is broadcast over it need not be reshaped to."""
    made = views()
    have: Dims = (("S:L",), (4,))
    wide: Dims = ((), (), ("S:L",), (4,))
    assert made.unled(made.reshape("a", have, wide), wide) == "a"
    flat: Dims = ((), ("S:L", 4))
    merged = made.reshape("a", have, flat)
    assert made.unled(merged, flat) == merged, "it has other axes, too"
    assert made.unled("a", have) == "a"
