"""Positions with the number of the row beside them, or added to them."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Graph, candidate, optimised, request, rules, whole_numbers

WIDTH = 4


def numbers(g: Graph, start: int = 0, step: int = 1) -> str:
    """The number of every row, `[N, 1]`: or so many numbers that begin elsewhere, or go backwards."""
    first, each = g.const(start, np.int64), g.const(step, np.int64)
    count = g.op("Squeeze", g.op("Shape", "h", start=0, end=1), g.ints(0))
    end = count if (start, step) == (0, 1) else g.op("Add", g.op("Mul", count, each), first)
    return g.on_axes("Unsqueeze", g.op("Range", first, end, each), [1])


def best(g: Graph) -> str:
    """The places of the two entries that are most like the item."""
    scores = g.on_axes("Squeeze", g.op("MatMul", "h", g.on_axes("Unsqueeze", "c", [2])), [2])
    return g.ops("TopK", 2, scores, g.ints(2), axis=1)[1]


def model(length: int | str = 9) -> tuple[Graph, list[object]]:
    g, given = Graph(17), [request("h", length, WIDTH), candidate("c", WIDTH), candidate("i", 2, ids=3)]
    for i in given:
        i.declare(g)
    return g, given  # type: ignore[return-value]


def finished(g: Graph, rows: str) -> None:
    """A layer behind rows `[N, 2, WIDTH]`, and the positions as an output, so that all inputs are read."""
    g.output(g.op("MatMul", rows, g.const(whole_numbers(WIDTH, 8))), None)
    g.output(g.op("Cast", "i", to=1), None)


def pairs(g: Graph, rows: str, places: str) -> str:
    """Row and position side by side, `[N, 2, 2]`."""
    wide = g.op("Expand", rows, g.op("Shape", places))
    return g.op("Concat", g.on_axes("Unsqueeze", wide, [2]), g.on_axes("Unsqueeze", places, [2]), axis=-1)


def length_of(g: Graph) -> str:
    return g.op("Gather", g.op("Shape", "h"), g.const(1, np.int64))


def merged(g: Graph) -> str:
    """All rows of all candidates, `[N * length, WIDTH]`."""
    return g.op("Reshape", "h", g.ints(-1, WIDTH))


LENGTHS = pytest.mark.parametrize("length", [2, 9, "L"])


def taken(g: Graph, given: list[object], length: int | str = 9) -> int:
    lengths = [{"L": 3}, {"L": 60}] if length == "L" else [{}]
    result = optimised(g, given, counts=(0, 1, 2, 5, 40), lengths=lengths)  # type: ignore[arg-type]
    return rules(result).get("picks", 0)


@LENGTHS
def test_beside(length: int | str) -> None:
    g, given = model(length)
    finished(g, g.op("GatherND", "h", pairs(g, numbers(g), best(g))))
    assert taken(g, given, length)


@LENGTHS
def test_batch_dims(length: int | str) -> None:
    """As TensorFlow's gather with a batch dimension."""
    g, given = model(length)
    finished(g, g.op("GatherND", "h", g.on_axes("Unsqueeze", best(g), [2]), batch_dims=1))
    assert taken(g, given, length)


@LENGTHS
@pytest.mark.parametrize("kind", ["Gather", "GatherND"])
@pytest.mark.parametrize("flat", [False, True])
def test_added(length: int | str, kind: str, flat: bool) -> None:
    g, given = model(length)
    at = g.op("Add", best(g), g.op("Mul", numbers(g), length_of(g)))
    at = g.op("Reshape", at, g.ints(-1)) if flat else at
    at = g.on_axes("Unsqueeze", at, [1 + (not flat)]) if kind == "GatherND" else at
    rows = g.op(kind, merged(g), at)
    finished(g, g.op("Reshape", rows, g.ints(-1, 2, WIDTH)) if flat else rows)
    assert taken(g, given, length)


@pytest.mark.parametrize("shape", [(2, -1), (2, -1, 1), (1, -1, 2)])
def test_sums_in_another_order(shape: tuple[int, ...]) -> None:
    """`[N, 2]` read as `[2, N]`: the positions of some candidates stand where those of others were."""
    g, given = model(9)
    at = g.op("Add", g.op("Mul", numbers(g), length_of(g)), best(g))
    finished(g, g.op("Gather", merged(g), g.op("Reshape", at, g.ints(*shape))))
    assert bool(taken(g, given)) == (shape[0] == 1)


def test_constant_length() -> None:
    g, given = model()
    at = g.op("Add", g.op("Mul", g.const([[9]], np.int64), g.op("Cast", numbers(g), to=7)), best(g))
    finished(g, g.op("Gather", merged(g), at))
    assert taken(g, given)


@pytest.mark.parametrize("wrong", ["start", "step", "factor", "rows"])
def test_other_numbers(wrong: str) -> None:
    """Rows of others, and not one's own."""
    g, given = model()
    if wrong == "factor":
        at = g.op("Add", best(g), g.op("Mul", numbers(g), g.const(5, np.int64)))
        finished(g, g.op("Gather", merged(g), at))
    elif wrong == "rows":
        zero = g.op("Mul", numbers(g), g.const(0, np.int64))
        finished(g, g.op("GatherND", "h", pairs(g, zero, best(g))))
    else:
        n = numbers(g, start=-1) if wrong == "start" else numbers(g, step=-1)
        finished(g, g.op("GatherND", "h", pairs(g, n, best(g))))
    # The history is the same for all, so that the scores are, too: but nothing says so of these positions.
    assert not taken(g, given)


def test_positions_that_may_lie_elsewhere() -> None:
    """What is added could lead to another row; as a pair, it could not."""
    g, given = model()
    finished(g, g.op("Gather", merged(g), g.op("Add", "i", g.op("Mul", numbers(g), length_of(g)))))
    assert not taken(g, given)
    g, given = model()
    finished(g, g.op("GatherND", "h", pairs(g, numbers(g), "i")))
    assert taken(g, given)


def test_places_along_another_axis() -> None:
    """The best of 30 are not all among 9."""
    g, given = model()
    given.append(candidate("s", 30))
    given[-1].declare(g)  # type: ignore[attr-defined]
    at = g.op("Mod", g.ops("TopK", 2, "s", g.ints(2), axis=1)[1], g.const(9, np.int64))
    finished(g, g.op("Gather", merged(g), g.op("Add", at, g.op("Mul", numbers(g), length_of(g)))))
    assert not taken(g, given)


def test_rows_of_candidates() -> None:
    """A history of each candidate's own."""
    g = Graph(17)
    given: list[object] = [candidate("h", 9, WIDTH), candidate("c", WIDTH), request("i", 2, ids=3)]
    for i in given:
        i.declare(g)  # type: ignore[attr-defined]
    finished(g, g.op("GatherND", "h", pairs(g, numbers(g), best(g))))
    assert not taken(g, given)
