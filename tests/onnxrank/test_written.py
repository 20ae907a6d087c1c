"""Shapes and levels of what was written."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from onnx import NodeProto, helper, numpy_helper

from onnxrank.values import Dims, Level
from onnxrank.written import Written

KNOWN: dict[str, tuple[Dims, Level]] = {
    "x": (("N",), (4,), (6,)),
    "k": ((4,), (6,), (5,)),
    "l": (("L",), (4,)),
}


def written(*nodes: NodeProto) -> Written:
    """What a rewrite has written that knows three tensors, and gives the last node's result."""
    levels = {"x": Level.CANDIDATE, "k": Level.REQUEST, "l": Level.REQUEST}
    sources = {n: SimpleNamespace(dims=d, level=levels[n]) for n, d in KNOWN.items()}
    stored = {
        "two": np.array(2.0, np.float32),
        "wide": np.ones((1, 1, 1, 1), np.float32),
        "bias": np.ones((4, 1, 5), np.float32),
        "l2": np.ones((4, 7), np.float32),
        **{f"shape{s}": np.array(s, np.int64) for s in SHAPES},
        **{f"at{n}": np.array([n], np.int64) for n in (-1, 0, 1, 2, 9)},
    }
    rw = SimpleNamespace(
        emit=SimpleNamespace(
            nodes=[SimpleNamespace(proto=n) for n in nodes],
            initializers={n: numpy_helper.from_array(v, n) for n, v in stored.items()},
        ),
        sources=SimpleNamespace(named=lambda: sources),
        stored=lambda name, most: stored.get(name),
        outputs=[nodes[-1].output[0]],
        layout=SimpleNamespace(sizes=SimpleNamespace(held={"open": (("N",), (2,), ("L",))})),
    )
    return Written(rw)  # type: ignore[arg-type]


SHAPES = [(-1, 6, 4), (-1, 24), (-1, 12), (2, 2, 30), (4, 0, 5), (1, -1, 4), (1, 4, 1), (4, 3, 5)]


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "dims"),
    [
        ("Transpose", ["x"], {"perm": [1, 0, 2]}, ((4,), ("N",), (6,))),
        ("Transpose", ["k"], {}, ((5,), (6,), (4,))),
        ("Mul", ["two", "k"], {}, ((4,), (6,), (5,))),
        ("Div", ["k", "two"], {}, ((4,), (6,), (5,))),
        ("Mul", ["k", "wide"], {}, ((), (4,), (6,), (5,))),
        ("Mul", ["k", "bias"], {}, ((4,), (6,), (5,))),
        ("Add", ["k", "l2"], {}, None),
        ("Add", ["x", "x"], {}, (("N",), (4,), (6,))),
        ("Clip", ["l", "two", "two"], {}, (("L",), (4,))),
        ("Softmax", ["l"], {}, (("L",), (4,))),
        ("MatMul", ["l", "l2"], {}, (("L",), (7,))),
        ("Gemm", ["l", "l2"], {"transB": 1}, (("L",), (4,))),
        ("Gemm", ["l", "l2"], {"transA": 1}, ((4,), (7,))),
        ("Gather", ["x", "at2"], {"axis": 1}, (("N",), (), (6,))),
        ("ReduceSum", ["x", "at1"], {"keepdims": 0}, (("N",), (6,))),
        ("ReduceMax", ["x"], {"axes": [-1]}, (("N",), (4,), ())),
        ("ReduceSum", ["x"], {}, None),
        ("Shape", ["x"], {}, None),
        ("Concat", ["k", "bias"], {"axis": 1}, ((4,), (7,), (5,))),
        ("Concat", ["x", "x"], {"axis": 0}, None),
        ("Slice", ["k", "at1", "at9", "at1", "at2"], {}, ((4,), (3,), (5,))),
        ("Slice", ["k", "at-1", "at9", "at2", "at1"], {}, ((4,), (6,), ())),
        ("Slice", ["x", "at0", "at1", "at0", "at1"], {}, None),
        ("Slice", ["k", "at9", "at0", "at1", "at-1"], {}, None),
        ("Expand", ["bias", "shape(4, 3, 5)"], {}, ((4,), (3,), (5,))),
        ("Expand", ["x", "shape(4, 3, 5)"], {}, None),
        ("Reshape", ["x", "shape(-1, 6, 4)"], {}, (("N",), (6,), (4,))),
        ("Reshape", ["x", "shape(-1, 12)"], {}, None),
        ("Reshape", ["k", "shape(2, 2, 30)"], {}, ((2,), (2,), (30,))),
        ("Reshape", ["k", "shape(-1, 24)"], {}, ((5,), (24,))),
        ("Reshape", ["k", "shape(4, 0, 5)"], {}, None),
        ("Reshape", ["l", "shape(1, -1, 4)"], {}, ((), ("L",), (4,))),
        ("Softmax", ["nothing"], {}, None),
    ],
)
def test_dims(op: str, inputs: list[str], attributes: dict, dims: Dims | None) -> None:
    found = written(helper.make_node(op, inputs, ["y"], **attributes))
    assert found.dims("y") == dims
    if dims is not None:
        assert found.rank("y") == len(dims)


def test_rank_of_an_open_shape() -> None:
    """How many axes there are is told by the shape alone."""
    found = written(helper.make_node("Reshape", ["x", "shape(-1, 12)"], ["y"]))
    assert found.rank("y") == 2 and found.rank("nothing") is None


def test_levels() -> None:
    found = written(
        helper.make_node("Mul", ["two", "wide"], ["a"]),
        helper.make_node("Mul", ["a", "k"], ["b"]),
        helper.make_node("Add", ["b", "x"], ["c"]),
        helper.make_node("RandomNormal", [], ["d"], shape=[1]),
        helper.make_node("Add", ["d", "two"], ["e"]),
    )
    levels = {name: found.level(name) for name in "abcde"}
    assert levels == dict(zip("abcde", [0, 1, 2, 2, 2], strict=True))


def test_readers() -> None:
    found = written(
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Mul", ["a", "a"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Add", ["c", "b"], ["d"]),
        helper.make_node("Relu", ["d"], ["e"]),
    )
    readers = {name: found.only_reader(name) for name in "abcde"}
    assert {name: n and n.output[0] for name, n in readers.items()} == {
        "a": "b",
        "b": None,
        "c": "d",
        "d": "e",
        "e": None,
    }


@pytest.mark.parametrize(
    ("shape", "kept"), [((-1, 24), False), ((-1, 6, 4), False), ((2, 2, 30), False), ((4, 3, 5), True)]
)
def test_keeps_columns(shape: tuple[int, ...], kept: bool) -> None:
    node = helper.make_node("Reshape", ["k", f"shape{shape}"], ["y"])
    assert written(node).keeps_columns(node, ((5,),)) is kept
    assert not written(node).keeps_columns(node, (("L",),))


@pytest.mark.parametrize(("columns", "kept"), [((("L",),), True), ((("N",),), False), (((5,),), False), ((), False)])
def test_keeps_columns_of_a_symbolic_extent(columns: Dims, kept: bool) -> None:
    node = helper.make_node("Reshape", ["x", "open"], ["y"])
    assert written(node).keeps_columns(node, columns) is kept
    assert written(node).dims("y") == (("N",), (2,), ("L",))
    assert not written(node).keeps_columns(helper.make_node("Reshape", ["x", "elsewhere"], ["y"]), columns)
