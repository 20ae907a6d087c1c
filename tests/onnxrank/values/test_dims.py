"""Factored shapes: their algebra, against numpy."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from onnxrank.values import (
    Dim,
    Dims,
    Factor,
    Unrepresentable,
    broadcast_dims,
    canonical,
    extended,
    extent,
    extents,
    is_candidate_symbol,
    keep_symbols,
    regroup,
    split_merged,
    stream,
    symbols,
    with_extents,
)

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
