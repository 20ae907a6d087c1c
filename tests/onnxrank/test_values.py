"""The abstract domain's own operations, against numpy."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto

from onnxrank.values import (
    HOLE,
    MAX_ENTRIES,
    Dim,
    Dims,
    Factor,
    Level,
    Sources,
    Unrepresentable,
    broadcast_dims,
    canonical,
    codes_of,
    constant_along,
    cut_repeats,
    extended,
    extent,
    extents,
    is_candidate_symbol,
    keep_symbols,
    offsets,
    rectangles,
    regroup,
    source_numbers,
    split_axis,
    split_merged,
    stream,
    symbols,
    view,
    with_extents,
)

FLOAT = int(TensorProto.FLOAT)
SIZES = {"N": 5, "S:L": 7, "N~b": 11}
"""Extents of symbols that no constant in these tests shares a factor with."""

factors: st.SearchStrategy[Factor] = st.one_of(st.integers(1, 4), st.sampled_from(sorted(SIZES)))
raw = st.lists(factors, max_size=4)


@st.composite
def shapes(draw: st.DrawFn, rank: int = 4) -> Dims:
    """Factored shapes, each symbol once at most."""
    names = draw(st.permutations(sorted(SIZES)))
    out: list[Dim] = []
    for _ in range(draw(st.integers(1, rank))):
        own = [names.pop()] if names and draw(st.booleans()) else []
        out.append(canonical(draw(st.permutations([*own, draw(st.sampled_from([1, 2, 3, 4, 6]))]))))
    return tuple(out)


def sized(dims: Dims) -> tuple[int, ...]:
    """The shape in numbers."""
    return tuple(prod(f if isinstance(f, int) else SIZES[f] for f in d) for d in dims)


# --- factors -------------------------------------------------------------------------------------------------------


@given(raw)
def test_canonical_keeps_the_product_and_the_order(found: list[Factor]) -> None:
    try:
        made = canonical(found)
    except Unrepresentable:
        return
    assert sized((made,)) == sized((tuple(found),))
    assert symbols([made]) == symbols([tuple(found)])
    assert 1 not in made and sum(isinstance(f, int) for f in made) <= 1
    assert canonical(made) == made


def test_constants_on_both_sides_of_a_symbol_are_no_dimension() -> None:
    assert canonical([2, 1, 3, "N", 1]) == (6, "N")
    with pytest.raises(Unrepresentable, match="N"):
        canonical([2, "N", 3])
    assert canonical([2, "N", 1]) == (2, "N")


def test_extent() -> None:
    assert [extent(d) for d in ((), ("N",), (50,), ("N", 50))] == [1, 1, 50, 50]
    assert extents((("N", 2), (), (3,))) == (2, 1, 3)
    assert is_candidate_symbol("N") and is_candidate_symbol("N~min(N, 5)") and not is_candidate_symbol("S:L")


@given(shapes(), st.sets(st.sampled_from(sorted(SIZES))))
def test_keep_symbols(dims: Dims, kept: set[str]) -> None:
    physical = keep_symbols(dims, kept)
    assert extents(physical) == extents(dims)
    assert symbols(physical) == tuple(s for s in symbols(dims) if s in kept)


@given(shapes(), st.data())
def test_with_extents(dims: Dims, data: st.DataObject) -> None:
    """An axis cut to fewer entries keeps its symbols, in their place where it had a constant."""
    shape = [data.draw(st.integers(1, extent(d))) for d in dims]
    made = with_extents(dims, shape)
    assert extents(made) == tuple(shape)
    assert [symbols([d]) for d in made] == [symbols([d]) for d in dims]
    assert with_extents(made, extents(made)) == made


@given(shapes())
def test_split_merged_and_stream_keep_the_entries(dims: Dims) -> None:
    assert prod(sized(split_merged(dims))) == prod(sized(dims))
    assert all(len(d) <= 1 for d in split_merged(dims))
    assert stream(split_merged(dims)) == stream(dims)


def test_extended_keeps_two_dimensions() -> None:
    dims: Dims = ((), ("N",), (), (4,))
    assert extended(dims) == [1, 3]
    assert extended(dims, held=()) == [2, 3]
    assert extended(((),)) == [0]


# --- shapes against numpy ------------------------------------------------------------------------------------------


@given(shapes(), st.data())
def test_regroup_there_and_back(dims: Dims, data: st.DataObject) -> None:
    """What numpy's reshape does to positions, regrouping does to factors: the same factors in the same order."""
    flat = [f for d in dims for f in d]
    target: list[Dim] = []
    while flat:
        taken = data.draw(st.integers(1, len(flat)))
        try:
            target.append(canonical(flat[:taken]))
        except Unrepresentable:
            assume(False)
        flat = flat[taken:]
    wanted = [(extent(d), symbols([d])) for d in target]
    try:
        made = regroup(dims, wanted)
    except Unrepresentable:
        return  # a boundary of constants alone, which may lie elsewhere
    assert sized(made) == sized(tuple(target)) and stream(made) == stream(dims)
    assert regroup(made, [(extent(d), symbols([d])) for d in dims]) == dims


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_regroup_cuts_constants(a: int, b: int, c: int, merged: bool) -> None:
    whole: Dims = (canonical(["N", a * b * c]),) if merged else (("N",), canonical([a * b * c]))
    assert regroup(whole, [(1, ("N",)), (a, ()), (b, ()), (c, ())]) == (("N",), *(canonical([n]) for n in (a, b, c)))


@pytest.mark.parametrize(
    ("dims", "target"),
    [
        ((("N",), (6,)), [(6, ()), (1, ("N",))]),  # as a transposition would
        ((("N",), (6,)), [(2, ("N",)), (2, ())]),  # fewer entries
        ((("N",), (6,)), [(2, ("N",)), (6, ())]),  # more
        ((("N",), (6,)), [(1, ("N",)), (4, ())]),
        ((("N",), (2,), ("S:L",)), [(1, ("N", "S:L")), (2, ())]),
        ((("N",), (0,)), [(1, ("N",)), (0, ())]),
    ],
)
def test_regroup_gives_up_where_rows_would_mix(dims: Dims, target: list[tuple[int, tuple[str, ...]]]) -> None:
    with pytest.raises(Unrepresentable):
        regroup(dims, target)


@given(shapes(3), st.data())
def test_broadcast_dims(dims: Dims, data: st.DataObject) -> None:
    """Numpy's broadcasting of the shapes in numbers."""
    others = [
        tuple(data.draw(st.sampled_from([d, ()])) for d in dims[data.draw(st.integers(0, len(dims))) :])
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    made = broadcast_dims(others)
    assert sized(made) == np.broadcast_shapes(*map(sized, others))


def test_extents_that_differ_are_not_broadcast() -> None:
    with pytest.raises(Unrepresentable):
        broadcast_dims([(("N",),), (("S:L",),)])
    with pytest.raises(Unrepresentable):
        broadcast_dims([(("N", 2),), ((2, "N"),)])


# --- codes ---------------------------------------------------------------------------------------------------------

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
    first = sources.add((("N",), (7,)), FLOAT, "a")
    second = sources.add(((4,),), FLOAT, "b")
    pool = np.concatenate([codes_of(first).reshape(-1), codes_of(second)])
    codes = pool[found * 3 % len(pool)]
    origin = [("a", k) for k in range(7)] + [("b", k) for k in range(4)]
    for code, at in zip(codes.reshape(-1), (found * 3 % len(pool)).reshape(-1), strict=True):
        one = np.array([code])
        assert (sources[int(source_numbers(one)[0])].name, int(offsets(one)[0])) == origin[at]
    want = list(dict.fromkeys(origin[at][0] for at in (found * 3 % len(pool)).reshape(-1)))
    assert [s.name for s in sources.of(codes)] == want
    assert sources.symbols(codes) == ({"N"} if "a" in want else set())


def constant(sources: Sources, data: NDArray[Any]) -> Any:
    dims = tuple(canonical([n]) for n in data.shape)
    return sources.add(dims, FLOAT, load=lambda: data)


def test_levels_are_read_off_the_sources() -> None:
    sources = Sources()
    made = [
        constant(sources, np.arange(3.0)),
        sources.add((("S:L",), (3,)), FLOAT, "u"),
        sources.add((("N",), (3,)), FLOAT, "x"),
        sources.add((("N~?k.0",), (3,)), FLOAT, "k"),
    ]
    assert [s.level for s in made] == [Level.CONSTANT, Level.REQUEST, Level.CANDIDATE, Level.CANDIDATE]
    codes = np.array([codes_of(s).reshape(-1)[0] for s in made] + [HOLE])
    assert sources.levels(codes).tolist() == [0, 1, 2, 2, -1]
    assert sources.of(np.array([HOLE])) == [] and sources.symbols(np.array([HOLE])) == set()


def test_constants_are_looked_up_by_code() -> None:
    sources = Sources()
    a, b = (constant(sources, d) for d in (np.arange(6.0).reshape(2, 3), np.array([10.0, 20.0])))
    codes = np.concatenate([codes_of(a)[::-1].reshape(-1), codes_of(b)]).reshape(4, 2)
    assert sources.constants(codes).tolist() == [[3, 4], [5, 0], [1, 2], [10, 20]]


def test_sources_taken_back_are_noticed_by_their_codes() -> None:
    sources = Sources()
    sources.add((), FLOAT, "kept")
    since = sources.count
    gone = codes_of(sources.add((), FLOAT, "gone"))
    sources.forget(since)
    assert sources.add((), FLOAT, "later").number == since + 1
    with pytest.raises(LookupError, match="taken back"):
        sources.of(gone)


def test_a_view_has_a_code_per_entry() -> None:
    with pytest.raises(AssertionError):
        view(((2,),), FLOAT, np.zeros(3, np.int64))
    large = Sources().add(((MAX_ENTRIES + 1,),), FLOAT, "t")
    with pytest.raises(Unrepresentable, match="entries per row"):
        codes_of(large)
