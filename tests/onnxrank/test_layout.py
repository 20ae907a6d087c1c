"""From codes back to tensors."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from helpers import FLOAT, INT64, run
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from onnxrank import extents as ex
from onnxrank.emitter import Emitter
from onnxrank.layout import Layout
from onnxrank.values import (
    CANDIDATES,
    HOLE,
    Codes,
    Dims,
    Sources,
    Unrepresentable,
    codes_of,
    extents,
    keep_symbols,
    offsets,
    source_numbers,
    symbols,
)


def test_alternating_columns() -> None:
    """Rows whose first entries lie side by side, and second ones alternate between tensors: packed once at most."""
    sources, emit = Sources(), Emitter(["a", "b", "c"], 17)
    layout, rows = Layout(sources, emit, {}), 10
    own: Dims = ((CANDIDATES,), (rows,))
    a, b, c = (codes_of(sources.add(own, FLOAT, name)) for name in "abc")
    codes: Codes = _columns(a, b, c)
    name, physical = layout.realise(codes, (*own, (2,)))
    assert physical == (*own, (2,))

    inputs = [helper.make_tensor_value_info(i, FLOAT, ["N", rows]) for i in "abc"]
    outputs = [helper.make_tensor_value_info(name, FLOAT, ["N", rows, 2])]
    nodes = [n.proto for n in emit.nodes]
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(emit.initializers.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feed = {i: np.arange(3 * rows, dtype=np.float32).reshape(3, rows) + 100 * k for k, i in enumerate("abc")}
    np.testing.assert_array_equal(run(model, feed)[name], _columns(feed["a"], feed["b"], feed["c"]))


@pytest.mark.parametrize("perm", [(2, 1, 3, 0), (3, 2, 1, 0), (1, 0, 3, 2), (3, 1, 0, 2)])
def test_rows_of_candidates_are_moved_axis_by_axis(perm: tuple[int, ...]) -> None:
    """Where several axes change their places at once, onnxruntime would go entry by entry."""
    sources, emit = Sources(), Emitter(["a"], 17)
    own: Dims = ((4,), (CANDIDATES,), (3,), (2,))
    layout = Layout(sources, emit, {})
    codes = codes_of(sources.add(own, FLOAT, "a")).transpose(perm)
    name, physical = layout.realise(codes, tuple(own[p] for p in perm))
    assert physical == tuple(own[p] for p in perm)
    turned = [list(n.proto.attribute[0].ints) for n in emit.nodes if n.proto.op_type == "Transpose"]
    assert len(turned) == 2 + (perm == (3, 2, 1, 0))
    for n in (0, 1, 5):
        data = np.arange(4 * n * 6, dtype=np.float32).reshape(4, n, 3, 2)
        got = written(emit, name, {"a": data})
        np.testing.assert_array_equal(got, data.transpose(perm))


@pytest.mark.parametrize("perm", [(1, 2, 0), (1, 0, 2), (2, 0, 1)])
def test_a_part_of_every_row_is_cut_and_turned(perm: tuple[int, ...]) -> None:
    """Keys among the columns of one product, by head: entries of a head lie side by side, wherever that axis goes."""
    rows, heads, width = 5, 3, 4
    sources, emit = Sources(), Emitter(["a"], 17)
    whole = codes_of(sources.add(((rows,), (24,)), FLOAT, "a"))
    codes = whole[:, 8:20].reshape(rows, heads, width).transpose(perm)
    name, _ = Layout(sources, emit, {}).realise(codes, tuple((n,) for n in codes.shape))
    assert sorted({n.proto.op_type for n in emit.nodes}) == ["Reshape", "Slice", "Transpose"]
    data = np.arange(rows * 24, dtype=np.float32).reshape(rows, 24)
    got = written(emit, name, {"a": data})
    np.testing.assert_array_equal(got, data[:, 8:20].reshape(rows, heads, width).transpose(perm))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 60),
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 8)), min_size=1, max_size=6),
    st.sampled_from([(), (CANDIDATES,)]),
)
def test_runs_of_columns(rows: int, runs: list[tuple[int, int]], symbol: tuple[str, ...]) -> None:
    """Columns in any order, in runs or alone, once or several times."""
    at = np.concatenate([np.arange(begin, begin + count) for begin, count in runs])
    sources, emit = Sources(), Emitter(["a"], 17)
    codes = codes_of(sources.add((symbol, (rows,) if rows > 1 else (), (23,)), FLOAT, "a")).take(at, -1)
    dims: Dims = tuple(d for d in (symbol, (rows,) if rows > 1 else (), (len(at),) if len(at) > 1 else ()))
    name, physical = Layout(sources, emit, {}).realise(codes, dims)
    for n in (0, 1, 3) if symbol else (1,):
        data = np.arange(n * rows * 23, dtype=np.float32).reshape(n, rows, 23)
        got = written(emit, name, {"a": data})
        want = data.take(at, -1)
        np.testing.assert_array_equal(got.reshape(want.shape), want)
        assert got.ndim == len(physical)


@pytest.mark.parametrize(("columns", "wanted"), [("two blocks", {"Slice", "Concat"}), ("alternating", {"Gather"})])
def test_long_runs_of_columns_are_cut_and_joined(columns: str, wanted: set[str]) -> None:
    """A Gather along the last axis goes entry by entry."""
    at = np.r_[64:128, 192:256] if columns == "two blocks" else np.r_[0:256:4, 1:256:4]
    sources, emit = Sources(), Emitter(["a"], 17)
    codes = codes_of(sources.add(((128,), (256,)), FLOAT, "a")).take(at, 1)
    Layout(sources, emit, {}).realise(codes, ((128,), (128,)))
    assert {n.proto.op_type for n in emit.nodes} == wanted


def _columns(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any]) -> NDArray[Any]:
    """Of three arrays `[..., 10]`: (a, b), (a, c), (a, b) ... and at last (b, a) and (c, a)."""
    at = np.arange(10)
    first = np.where(at < 8, a, np.where(at == 8, b, c))
    return np.stack([first, np.where(at > 7, a, np.where(at % 2 == 0, b, c))], -1)


# --- entries realised are those that numpy would pick --------------------------------------------------------------

LENGTH = "S:L"
TENSORS: dict[str, Dims] = {
    "a": ((CANDIDATES,), (6,)),
    "b": ((CANDIDATES,), (2,), (3,)),
    "u": ((), (4,)),
    "h": ((), (LENGTH,), (3,)),
    "c": ((CANDIDATES,), (LENGTH,), (2,)),
}
SHAPES: list[Dims] = [
    ((CANDIDATES,), (12,)),
    ((CANDIDATES,), (3,), (4,)),
    ((CANDIDATES,), (4,), (3,), ()),
    ((CANDIDATES, 3), (4,)),
    ((CANDIDATES,), (LENGTH,), (6,)),
    ((CANDIDATES, LENGTH), (5,)),
    ((CANDIDATES,), (LENGTH, 2), (3,)),
]
AT = [{CANDIDATES: 1, LENGTH: 1}, {CANDIDATES: 4, LENGTH: 5}]


def concrete(dims: Dims, at: dict[str, int]) -> list[int]:
    return [prod(f if isinstance(f, int) else at[f] for f in d) for d in dims]


def by_entry(data: NDArray[Any], dims: Dims, at: dict[str, int]) -> NDArray[Any]:
    """Rows, positions along the length, and the entries flat; one of what the tensor does not vary along."""
    factors = [f for d in dims for f in d]
    shaped = data.reshape([f if isinstance(f, int) else at[f] for f in factors])
    for axis, symbol in enumerate((CANDIDATES, LENGTH)):
        if symbol in factors:
            found = factors.index(symbol)
            shaped = np.moveaxis(shaped, found, axis)
            factors.insert(axis, factors.pop(found))
        else:
            shaped = np.expand_dims(shaped, axis)
            factors.insert(axis, symbol)
    return shaped.reshape(*shaped.shape[:2], -1)


@st.composite
def pictures(draw: st.DrawFn) -> tuple[Dims, NDArray[np.int64]]:
    """A shape, and per entry which one of the pool: in strides, as movement gives them, or any."""
    dims = draw(st.sampled_from(SHAPES))
    shape = extents(dims)
    if draw(st.booleans()):
        steps = [draw(st.integers(0, 7)) for _ in shape]
        at = draw(st.integers(0, 30)) + sum(np.arange(n).reshape(-1, *[1] * (len(shape) - k - 1)) * step
                                            for k, (n, step) in enumerate(zip(shape, steps, strict=True)))  # fmt: skip
        at = np.broadcast_to(at, shape).copy()
    else:
        found = draw(st.lists(st.integers(0, 40), min_size=prod(shape), max_size=prod(shape)))
        at = np.array(found, np.int64).reshape(shape)
    if draw(st.booleans()):
        at[draw(st.tuples(*(st.integers(0, n - 1) for n in shape)))] = -1
    return dims, at


@pytest.mark.slow
@pytest.mark.parametrize("opset", [11, 17])
@given(picture=pictures(), full=st.booleans())
@settings(max_examples=120, deadline=None)
def test_entries_are_those_of_their_sources(opset: int, picture: tuple[Dims, NDArray[np.int64]], full: bool) -> None:
    dims, at = picture
    sources, emit = Sources(), Emitter(TENSORS, opset)
    layout = Layout(sources, emit, {})
    layout.sizes.extent_of = {CANDIDATES: ("a", 0, 1), LENGTH: ("h", 1, 1)}
    data = np.arange(5, dtype=np.float32) + 900
    made = [sources.add(d, FLOAT, n) for n, d in TENSORS.items() if set(symbols(d)) <= set(symbols(dims))]
    made.append(sources.add(((5,),), FLOAT, load=lambda: data))
    pool = np.concatenate([codes_of(s).reshape(-1) for s in made])
    codes = np.where(at < 0, HOLE, pool[at % len(pool)])
    name, physical = layout.realise(codes, dims, full)
    assert physical == keep_symbols(dims, symbols(dims) if full else sources.symbols(codes))
    for values in AT:
        feed = {n: np.arange(prod(shape := concrete(d, values)), dtype=np.float32).reshape(shape) + 1000 * (k + 1)
                for k, (n, d) in enumerate(TENSORS.items())}  # fmt: skip
        entries = by_entry(written(emit, name, feed, opset), physical, values)
        held = {s.number: by_entry(feed.get(s.name or "", data), s.dims, values) for s in made}
        for k, code in enumerate(codes.reshape(-1)):
            if code != HOLE:
                want = held[int(source_numbers(code))][..., int(offsets(code))]
                assert np.array_equal(entries[..., k], np.broadcast_to(want, entries.shape[:2])), (k, values)


@pytest.mark.parametrize("perm", [(1, 0, 2), (1, 2, 0)])
def test_axes_in_front_come_with_the_reshape_before(perm: tuple[int, ...]) -> None:
    """Heads of a history, with an axis for the rows of candidates that it has none of: no Reshape behind."""
    emit = Emitter(["h"], 17)
    sources = Sources()
    layout = Layout(sources, emit, {})
    source = sources.add((("S:L",), (6,)), FLOAT, "h")
    apart: Dims = (("S:L",), (2,), (3,))
    codes = codes_of(source).reshape(1, 2, 3).transpose(perm)
    name, physical = layout.realise(codes[None], ((), *(apart[p] for p in perm)))
    made, at, kinds = {n.proto.output[0]: n.proto for n in emit.nodes}, name, []
    while at in made:
        kinds.append(made[at].op_type)
        at = made[at].input[0]
    assert kinds == ["Transpose", "Reshape"]
    for length in (0, 1, 7):
        data = np.arange(length * 6, dtype=np.float32).reshape(length, 6)
        assert np.array_equal(written(emit, name, {"h": data}), data.reshape(length, 2, 3).transpose(perm)[None])
    assert physical[0] == ()


def written(emit: Emitter, name: str, feed: dict[str, NDArray[Any]], opset: int = 17) -> NDArray[Any]:
    """Runs what was written, for one tensor."""
    inputs = [helper.make_tensor_value_info(n, FLOAT, [None] * x.ndim) for n, x in feed.items()]
    nodes = [n.proto for n in emit.nodes]
    if name in emit.initializers or name in feed:
        nodes.append(helper.make_node("Identity", [name], ["out"]))
        name = "out"
    kind = INT64 if name.startswith(("candidates", "extent")) else FLOAT
    output = helper.make_tensor_value_info(name, kind, None)
    graph = helper.make_graph(nodes, "g", inputs, [output], list(emit.initializers.values()))
    return run(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), feed)[name]


@pytest.mark.parametrize("opset", [11, 17])
def test_extents_are_computed_from_those_of_inputs(opset: int) -> None:
    """Polynomials and functions of extents, at numbers on both sides of every threshold."""
    n, length = ex.symbol(CANDIDATES), ex.symbol(LENGTH)
    sizes = {
        "N~p": n * length * 2 + 3,
        "~min": ex.minimum(length, 50),
        "~max": ex.maximum(length - 4, 0),
        "~div": ex.floor_divide(length + 19, 20),
        "~mod": ex.modulo(length, 7),
    }
    for symbol, size in sizes.items():
        emit = Emitter(TENSORS, opset)
        layout = Layout(Sources(), emit, sizes)
        layout.sizes.extent_of = {CANDIDATES: ("a", 0, 1), LENGTH: ("h", 1, 1)}
        found = layout.sizes.extent(symbol)
        for rows in (1, 3, 60):
            for long in (0, 1, 19, 21, 50, 51, 300):
                feed = {"a": np.zeros((rows, 6), np.float32), "h": np.zeros((1, long, 3), np.float32)}
                want = ex.evaluate(size, {CANDIDATES: rows, LENGTH: long})
                assert written(emit, found, feed, opset).tolist() == [want], (symbol, rows, long)


def test_an_extent_that_no_input_has() -> None:
    with pytest.raises(Unrepresentable, match="not that of an input"):
        Layout(Sources(), Emitter([], 17), {}).sizes.extent("~?y.0")
