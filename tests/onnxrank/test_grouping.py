"""How entries are divided: every one that is read is in one group, of one level, and comes back where it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from onnxrank.grouping import Grouping, groups, permuted, restored
from onnxrank.values import (
    HOLE,
    Level,
    Sources,
    Unrepresentable,
    canonical,
    codes_of,
    extents,
    symbols,
)

LEVELS = [Level.UNREAD, Level.CONSTANT, Level.REQUEST, Level.CANDIDATE]


@st.composite
def levels(draw: st.DrawFn) -> NDArray[np.int64]:
    """Levels of any pattern: single entries, lines, rectangles."""
    shape = draw(st.tuples(*[st.integers(1, 5)] * draw(st.integers(1, 3))))
    kind = draw(st.sampled_from(["any", "line", "rectangles"]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    if kind == "any":
        return rng.choice(np.array(LEVELS, np.int64), shape)
    if kind == "line":
        axis = draw(st.integers(0, len(shape) - 1))
        line = rng.choice(np.array(LEVELS, np.int64), shape[axis])
        return np.broadcast_to(line.reshape([-1 if k == axis else 1 for k in range(len(shape))]), shape).copy()
    halves = [
        rng.integers(0, 2, n).reshape([-1 if a == k else 1 for a in range(len(shape))]) for k, n in enumerate(shape)
    ]
    return np.array(LEVELS, np.int64)[np.broadcast_to(sum(halves) % 4, shape)]


@given(levels(), st.integers(1, 7))
def test_groups_divide_what_is_read(found: NDArray[np.int64], high: int) -> None:
    """Whatever the pattern; larger keys tell groups of one level apart."""
    dims = (("N",), *(canonical([n]) for n in found.shape))
    keys = np.where(found < 0, found, found + 4 * high * (np.indices(found.shape)[0] % 2))[None]
    numbers = np.arange(found.size).reshape(keys.shape)
    back = np.full(keys.shape, -1)
    for group in groups(keys, dims):
        part = group.take(numbers)
        assert part.shape == extents(group.dims) and symbols(group.dims) == ("N",)
        assert len(np.unique(group.take(keys))) == 1 and (group.take(found[None]) == group.level).all()
        assert (group.take(back) == -1).all()
        group.put(back, part)
    assert np.array_equal(back, np.where(keys < 0, -1, numbers))


def test_no_common_axis() -> None:
    keys = np.array([[1, 2, 1], [2, 1, 1], [1, 1, 2]])
    dims = (canonical([3]), canonical([3]))
    with pytest.raises(Unrepresentable):
        groups(keys, dims, flat=False)
    assert {g.level for g in groups(keys, dims)} == {Level.REQUEST, Level.CANDIDATE}


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_orders_are_undone(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    orders: Any = {0: rng.permutation(rows), 1: rng.permutation(columns)}
    array = rng.integers(0, 99, (rows, columns))
    assert np.array_equal(restored(permuted(array, orders), orders), array)


def test_joint_levels_and_memory() -> None:
    """An entry is made as often as the operand that varies most; what nobody reads is not; memory decides on orders."""
    sources = Sources()
    once = codes_of(sources.add(((), (6,)), TensorProto.FLOAT, "u"))[0]
    each = codes_of(sources.add((("N",), (6,)), TensorProto.FLOAT, "x"))[0]
    grouping = Grouping(sources)
    mixed = np.where(np.arange(6) < 2, once, each)
    assert grouping.joint_levels([once, mixed]).tolist() == [Level.REQUEST] * 2 + [Level.CANDIDATE] * 4
    assert grouping.joint_levels([np.full(6, HOLE), mixed]).tolist() == [Level.UNREAD] * 6
    assert grouping.memory_order([each]) == {}
    order = grouping.memory_order([each[[3, 0, 4, 1, 5, 2]]])[0]
    assert np.array_equal(each[[3, 0, 4, 1, 5, 2]][order], each)
    assert not grouping.memory_order([once[[3, 0, 4, 1, 5, 2]]])


def test_large_tensors_side_by_side_are_divided() -> None:
    """Each alone, where all are whole; tensors that would be cut, small ones and factors per column stay together."""
    sources = Sources()
    grouping = Grouping(sources)

    def made(rows: int, level: str = "N") -> NDArray[np.int64]:
        dims = (("N",), (rows,), (32,)) if level == "N" else ((), (rows,), (32,))
        load = (lambda: np.ones((rows, 32), np.float32)) if level == "constant" else None
        return codes_of(sources.add(dims, TensorProto.FLOAT, f"t{sources.count}", load=load))

    def divided(*arrays: NDArray[np.int64]) -> int:
        return len(grouping.boxes(arrays))

    large, other = made(20), made(8)
    side = np.concatenate([large, other], 1)
    bias = np.broadcast_to(
        codes_of(sources.add(((), (), (32,)), TensorProto.FLOAT, load=lambda: np.ones(32))), side.shape
    )
    once = np.concatenate([made(20, "request"), made(8)], 1)
    assert divided(side) == divided(side, bias) == divided(side, once) == 2
    assert divided(side, made(28)) == 1  # the other would be cut
    assert divided(np.concatenate([large, other[:, :4]], 1)) == 1
    assert divided(side, made(28, "constant")) == 1
    assert divided(np.concatenate([large, made(2)], 1)) == 1
    assert len(grouping.boxes([side], rows=True)) == 1
