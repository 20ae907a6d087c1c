"""One tensor in other shapes and orders of its axes."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import FLOAT, run
from onnx import helper

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
