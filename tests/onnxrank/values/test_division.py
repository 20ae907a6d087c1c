"""Index maps divided into rectangles and cut to what repeats, against numpy."""

from __future__ import annotations

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from onnxrank.values import (
    Sources,
    codes_of,
    constant_along,
    cut_repeats,
    offsets,
    rectangles,
    source_numbers,
    split_axis,
)

keys = st.integers(1, 3).flatmap(
    lambda rank: st.tuples(*[st.integers(1, 4)] * rank).flatmap(
        lambda shape: st.lists(st.integers(0, 3), min_size=prod(shape), max_size=prod(shape)).map(
            lambda found: np.array(found, np.int64).reshape(shape)
        )
    )
)


@given(keys, st.integers(1, 20))
def test_rectangles_cover_every_entry_once(found: NDArray[np.int64], most: int) -> None:
    boxes = rectangles(found, most)
    if boxes is None:
        assert len(np.unique(found)) > 1  # one box is never too many
        return
    assert len(boxes) <= most
    seen = np.zeros(found.shape, int)
    for box in boxes:
        part = found[np.ix_(*box)]
        assert (part == part.flat[0]).all()
        seen[np.ix_(*box)] += 1
    assert (seen == 1).all()


def test_rectangles_are_cut_along_the_axis_that_gives_few() -> None:
    """Both axes have two kinds of lines, and only columns make three boxes."""
    assert len(rectangles(np.array([[0, 0, 2], [0, 0, 2], [1, 1, 2]]), 3) or ()) == 3


@given(keys)
def test_rectangles_are_found_where_there_is_no_limit(found: NDArray[np.int64]) -> None:
    assert rectangles(found, found.size) is not None


@given(keys)
def test_split_axis(found: NDArray[np.int64]) -> None:
    """Parts along an axis, each of one key, together all positions."""
    made = split_axis(found)
    if made is None:
        along = [(found == found.take([0], k)).all() for k in range(found.ndim)]
        assert all(n == 1 for n in found.shape) or sum(not same for same in along) > 1
        return
    axis, parts = made
    assert sorted(np.concatenate(parts).tolist()) == list(range(found.shape[axis]))
    first = [found.take(part, axis) for part in parts]
    assert all((f == f.flat[0]).all() for f in first)
    assert len({int(f.flat[0]) for f in first}) == len(parts)
    assert [int(p[0]) for p in parts] == sorted(int(p[0]) for p in parts)


def test_split_axis_takes_the_axis_of_fewest_runs() -> None:
    assert split_axis(np.zeros((2, 3), np.int64)) is not None
    axis, parts = split_axis(np.array([[0, 1, 0, 2]] * 3)) or (None, [])
    assert axis == 1 and [p.tolist() for p in parts] == [[0, 2], [1], [3]]
    assert split_axis(np.array([[0, 1], [1, 0]])) is None


@given(keys)
def test_cut_repeats_loses_nothing(found: NDArray[np.int64]) -> None:
    cut = cut_repeats(found)
    assert np.array_equal(np.broadcast_to(cut, found.shape), found)
    assert not any(constant_along(cut, k) for k in range(cut.ndim))
    assert cut_repeats(found, ()).shape == found.shape


@given(keys)
def test_a_movement_of_codes_is_that_of_the_entries(found: NDArray[np.int64]) -> None:
    """Source and position of every entry are those numpy puts there."""
    sources = Sources()
    first = sources.add((("N",), (7,)), TensorProto.FLOAT, "a")
    second = sources.add(((4,),), TensorProto.FLOAT, "b")
    pool = np.concatenate([codes_of(first).reshape(-1), codes_of(second)])
    codes = pool[found * 3 % len(pool)]
    origin = [("a", k) for k in range(7)] + [("b", k) for k in range(4)]
    for code, at in zip(codes.reshape(-1), (found * 3 % len(pool)).reshape(-1), strict=True):
        one = np.array([code])
        assert (sources[int(source_numbers(one)[0])].name, int(offsets(one)[0])) == origin[at]
    want = list(dict.fromkeys(origin[at][0] for at in (found * 3 % len(pool)).reshape(-1)))
    assert [s.name for s in sources.of(codes)] == want
    assert sources.symbols(codes) == ({"N"} if "a" in want else set())
