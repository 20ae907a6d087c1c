"""`movement`: positions are followed at compile time; nothing along the candidate axis is taken for a position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers import Graph, candidate, operators, optimised, request, rules, whole_numbers

import onnxrank

N = 512
GIVEN = [request("u", 3, 4), candidate("c", 2, 4)]
Move = Callable[[Graph, str], str]


def fields(opset: int = 17) -> tuple[Graph, str]:
    """[N, 5, 4]: three request-level fields and two candidate-level ones."""
    g = Graph(opset)
    return g, g.op("Concat", *(i.declare(g) for i in GIVEN), axis=1)


MOVES: dict[str, tuple[Move, int, int]] = {
    "slice": (lambda g, x: g.op("Slice", x, g.ints(1), g.ints(4), g.ints(1)), 8, 4),
    "slice backwards": (lambda g, x: g.op("Slice", x, g.ints(4), g.ints(-(1 << 40)), g.ints(1), g.ints(-1)), 12, 8),
    "slice with steps": (lambda g, x: g.op("Slice", x, g.ints(0), g.ints(99), g.ints(-2), g.ints(2)), 8, 4),
    "gather": (lambda g, x: g.op("Gather", x, g.ints(-1, 0, 3), axis=1), 4, 8),
    "gather one": (lambda g, x: g.op("Gather", x, g.const(2, np.int64), axis=2), 3, 2),
    "gather a matrix": (lambda g, x: g.op("Gather", x, g.const([[0, 4], [1, 3]], np.int64), axis=1), 8, 8),
    "split": (lambda g, x: g.op("Concat", *g.ops("Split", 2, x, g.ints(1, 3), axis=2)[::-1], axis=2), 12, 8),
    "transpose": (lambda g, x: g.op("Transpose", x, perm=[0, 2, 1]), 12, 8),
    "rows last and back": (
        lambda g, x: g.op("Transpose", g.op("Transpose", x, perm=[1, 2, 0]), perm=[2, 0, 1]), 12, 8),
    "rows merged and back": (lambda g, x: g.op("Reshape", g.op("Reshape", x, g.ints(-1, 4)), g.ints(-1, 5, 4)), 12, 8),
    "squeeze": (lambda g, x: g.on_axes("Squeeze", g.on_axes("Unsqueeze", x, [1, 3]), [3]), 12, 8),
    "tile": (lambda g, x: g.op("Tile", x, g.ints(1, 2, 1)), 12, 8),
    "half of it twice": (
        lambda g, x: g.op("Slice", g.op("Tile", x, g.ints(1, 2, 1)), g.ints(0), g.ints(2), g.ints(2)), 6, 4),
    "expand": (lambda g, x: g.op("Expand", g.on_axes("Unsqueeze", x, [2]), g.ints(1, 1, 3, 1)), 12, 8),
    "identity": (lambda g, x: g.op("Cast", g.op("Identity", x), to=1), 12, 8),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
def test_moves_into_weights(move: str) -> None:
    """Every kind of movement ahead of a layer goes into the weights: each entry is multiplied once."""
    g, x = fields()
    how, user, item = MOVES[move]
    x = g.op("Flatten", how(g, x))
    width = {"slice": 12, "slice with steps": 12, "gather": 12, "gather one": 5, "gather a matrix": 16}.get(move, 20)
    width = {"tile": 40, "expand": 60}.get(move, width)
    g.output(g.op("MatMul", x, g.const(whole_numbers(width, 3))), ["N", 3])
    result = optimised(g, GIVEN)
    assert rules(result)["fc"] == 1
    assert result.report.after["request"].macs == user * 3
    assert result.report.after["candidate"].macs == N * item * 3


@pytest.mark.parametrize("move", MOVES)
def test_moves_to_outputs(move: str) -> None:
    """The same layouts, asked for as they are."""
    g, x = fields()
    y = MOVES[move][0](g, x)
    g.output(
        g.op("Relu", y),
        ["N", *[None] * {"gather one": 1, "squeeze": 3, "expand": 3, "gather a matrix": 3}.get(move, 2)],
    )
    optimised(g, GIVEN)


@pytest.mark.parametrize("rank", [2, 3])
def test_as_many_entries_again(rank: int) -> None:
    """Half of a tensor, twice: as many entries as it has, and no order of them."""
    g, x = fields()
    half = g.op("Slice", g.op("Tile", "c", g.ints(1, 2, 1)), g.ints(0), g.ints(2), g.ints(2))
    g.output(g.op("Reshape", half, g.ints(*[-1, 8] if rank == 2 else [-1, 1, 8])), ["N", *[None] * (rank - 1)])
    g.output(g.op("MatMul", g.op("Flatten", x), g.const(whole_numbers(20, 3))), ["N", 3])
    optimised(g, GIVEN)


@pytest.mark.parametrize("repeat", [False, True])
def test_rows_last(repeat: bool) -> None:
    """Several tensors of one shape, with the candidates on the last axis."""
    given = [request("u", 4), candidate("c", 5), candidate("d", 5)]
    g = Graph()
    u, c, d = (i.declare(g) for i in given)
    parts = [g.op("Relu", u), c, d, *[c] * repeat]
    x = g.op("Concat", *parts, axis=1)
    g.output(g.op("Transpose", x, perm=[1, 0]), [4 + 5 * (len(parts) - 1), "N"])
    optimised(g, given)


def test_rows_last_of_mixed_fields() -> None:
    """The same without repetition, and rows in the middle."""
    for perm in ([1, 2, 0], [1, 0, 2], [2, 1, 0]):
        g, x = fields()
        g.output(g.op("Transpose", g.op("Relu", x), perm=perm), [None, None, None])
        optimised(g, GIVEN)


def rolled(g: Graph, x: str) -> str:
    ends = [g.op("Slice", x, g.ints(a), g.ints(b), g.ints(0)) for a, b in ((1, 1 << 40), (0, 1))]
    return g.op("Concat", *ends, axis=0)


ALONG_CANDIDATES: dict[str, Move] = {
    "slice": lambda g, x: g.op("Slice", x, g.ints(0), g.ints(1), g.ints(0)),
    "reverse": lambda g, x: g.op("Slice", x, g.ints(-1), g.ints(-(1 << 40)), g.ints(0), g.ints(-1)),
    "gather": lambda g, x: g.op("Gather", x, g.ints(0, 0), axis=0),
    "concat": lambda g, x: g.op("Concat", x, g.op("Neg", x), axis=0),
    "flatten all": lambda g, x: g.op("Reshape", x, g.ints(5, -1)),
    "cut through": lambda g, x: g.op("Reshape", x, g.ints(1, -1, 10)),
    "tile": lambda g, x: g.op("Tile", x, g.ints(2, 1, 1)),
    "roll": rolled,
}


@pytest.mark.parametrize("move", ALONG_CANDIDATES)
def test_candidate_axis(move: str) -> None:
    """Movement along the candidate axis is left to the runtime, on all rows."""
    g, x = fields()
    y = ALONG_CANDIDATES[move](g, g.op("Relu", x))
    g.output(g.op("Neg", y), [None] * (2 if move == "flatten all" else 3))
    optimised(g, GIVEN, counts=(1, 2, 5))


def test_candidate_axis_of_request_level() -> None:
    """All rows of a request-level tensor are equal, but how many there are counts."""
    for name, move in ALONG_CANDIDATES.items():
        if name in ("flatten all", "cut through"):
            continue
        given = [request("u", 5, 4), candidate("c", 2)]
        g = Graph()
        u, c = (i.declare(g) for i in given)
        g.output(move(g, g.op("Relu", u)), [None, 5, 4])
        g.output(g.op("Neg", c), ["N", 2])
        optimised(g, given, counts=(1, 2, 5))


def test_positions_at_run_time() -> None:
    """Positions that depend on the candidate, or on the request, are no constants."""
    for level in (request, candidate):
        given = [*GIVEN, level("at", ids=5)]
        g = Graph()
        u, c, at = (i.declare(g) for i in given)
        x = g.op("Concat", u, c, axis=1)
        hot = g.op("OneHot", at, g.const(5, np.int64), g.const([0.0, 1.0]), axis=-1)
        picked = g.op("MatMul", g.on_axes("Unsqueeze", hot, [1]), x)
        g.output(g.on_axes("Squeeze", picked, [1]), ["N", 4])
        optimised(g, given, counts=(1, 2, 5))


def test_shape_of_request_level() -> None:
    """The number of rows is read from a tensor that has one row now."""
    given = [request("u", 3), candidate("c", 2)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    tower = g.op("Relu", u)
    count = g.op("Gather", g.op("Shape", tower), g.ints(0), axis=0)
    zeros = g.op("ConstantOfShape", g.op("Concat", count, g.ints(3), axis=0))
    g.output(g.op("Concat", g.op("Add", zeros, tower), c, axis=1), ["N", 5])
    g.output(g.op("Cast", g.op("Size", tower), to=1), [])
    optimised(g, given)


def test_nothing_moved_without_levels() -> None:
    """Movement within one level keeps the user's nodes."""
    given = [request("u", 3), candidate("c", 2, 4)]
    g = Graph()
    u, c = (i.declare(g) for i in given)
    y = g.op("Flatten", g.op("Transpose", g.op("Relu", c), perm=[0, 2, 1]))
    g.output(g.op("Concat", g.op("Neg", u), y, axis=1), ["N", 11])
    result = optimised(g, given)
    assert {"Transpose", "Flatten"} <= set(operators(result.model))
    assert onnxrank.optimize(result.model, check=False).model.SerializeToString() == result.model.SerializeToString()


def test_a_mask_of_queries_and_keys_is_expanded_to_heads_once_per_request() -> None:
    given = [request("h", "L", 4), candidate("c", 4)]
    g = Graph()
    h, c = (i.declare(g) for i in given)
    size = g.op("Shape", h, start=1, end=2)
    shape = g.op("Concat", g.ints(0), size, g.ints(2, 2), axis=0)
    q, k, v = (
        g.op("Transpose", g.op("Reshape", g.op("MatMul", h, g.const(whole_numbers(4, 4, seed=s))), shape), perm=order)
        for s, order in ((1, [0, 2, 1, 3]), (2, [0, 2, 3, 1]), (3, [0, 2, 1, 3]))
    )
    at = g.op("Range", g.const(0, np.int64), g.op("Squeeze", size), g.const(1, np.int64))
    mask = g.op("Greater", at, g.on_axes("Unsqueeze", at, [1]))
    target = g.op("Concat", g.op("Shape", c, start=0, end=1), g.ints(2), size, size, axis=0)
    hidden = g.op("Expand", g.on_axes("Unsqueeze", mask, [0, 1]), target)
    weights = g.op("Where", hidden, g.const(0.0), g.op("MatMul", q, k))
    out = g.op("Reshape", g.op("Transpose", g.op("MatMul", weights, v), perm=[0, 2, 1, 3]), g.ints(0, -1, 4))
    g.output(g.op("Mul", g.on_axes("ReduceSum", out, [1], keepdims=0), c), ["N", 4])
    result = optimised(g, given, lengths=[{"L": n} for n in (0, 1, 2, 9, 61)])
    assert result.report.after["candidate"].macs == 0


# --- blocks of rows, one behind the other --------------------------------------------------------------------------

BLOCKS = [request("u", 3, 4), candidate("c", 2, 4)]


def taken_apart(g: Graph, y: str, how: str, count: int) -> list[str]:
    """The blocks of rows of [count * N, ...], each [N, ...]."""
    if how == "split":
        return g.ops("Split", count, y, axis=0)
    rows = g.op("Gather", g.op("Shape", y), g.ints(0), axis=0)
    if how == "chunk":  # as torch.chunk is exported: an extent divided and rounded up
        rows = g.op("Add", rows, g.ints(count - 1))
    one = g.op("Div", rows, g.ints(count))
    if how == "sizes":
        return g.ops("Split", count, y, g.op("Concat", *[one] * count, axis=0), axis=0)
    bounds = [g.ints(0), *(g.op("Mul", one, g.ints(k)) for k in range(1, count))]
    ends = [*bounds[1:], g.ints(2**62) if how == "open" else g.op("Mul", one, g.ints(count))]
    return [g.op("Slice", y, *at, g.ints(0)) for at in zip(bounds, ends, strict=True)]


@pytest.mark.parametrize("how", ["split", "sizes", "slices", "open", "chunk"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("level", ["both", "request"])
def test_blocks_of_rows(how: str, count: int, level: str) -> None:
    """Parts of rows stacked along the rows, a product of them, and apart again: request-level entries stay that."""
    g = Graph(17 if how == "chunk" else 15)
    u, c = (i.declare(g) for i in BLOCKS)
    x = g.op("Concat", u, c, axis=1) if level == "both" else u
    fields = 5 if level == "both" else 3
    parts = [g.op("MatMul", x, g.const(whole_numbers(4, 2, seed=k))) for k in range(count)]
    y = g.op("Relu", g.op("MatMul", g.op("Concat", *parts, axis=0), g.const(whole_numbers(2, 3))))
    joined = g.op("Flatten", g.op("Concat", *taken_apart(g, y, how, count), axis=2))
    score = g.op("MatMul", joined, g.const(whole_numbers(fields * 3 * count, 1)))
    if level == "request":
        score = g.op("Add", score, g.op("MatMul", g.op("Flatten", c), g.const(whole_numbers(8, 1))))
    g.output(score, ["N", 1])
    result = optimised(g, BLOCKS, counts=(0, 1, 2, 5, 9))
    each = {"both": count * 2 * (4 * 2 + 2 * 3 + 3), "request": 8}[level]
    assert result.report.after["candidate"].macs == 512 * each


def test_blocks_of_other_sizes() -> None:
    """A cut that is no whole number of blocks is not followed."""
    g = Graph()
    u, c = (i.declare(g) for i in BLOCKS)
    x = g.op("Concat", u, c, axis=1)
    y = g.op("Concat", *(g.op("MatMul", x, g.const(whole_numbers(4, 2, seed=k))) for k in (0, 1)), axis=0)
    rows = g.op("Gather", g.op("Shape", x), g.ints(0), axis=0)
    half = g.op("Div", rows, g.ints(2))
    top = g.op("Slice", y, half, g.op("Add", half, rows), g.ints(0))
    g.output(g.op("MatMul", g.op("Flatten", top), g.const(whole_numbers(10, 1))), ["N", 1])
    optimised(g, BLOCKS, counts=(0, 1, 2, 5, 8))


@pytest.mark.slow
@pytest.mark.parametrize("mask", [False, True])
def test_heads_in_front(mask: bool) -> None:
    """Attention with the heads as blocks of rows, as `concat(split(q, heads, 2), 0)` writes it."""
    g = Graph()
    given = [request("u", 24, 16), candidate("c", 1, 16)]
    u, c = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1)

    def heads(seed: int) -> str:
        q = g.op("MatMul", x, g.const(whole_numbers(16, 32, seed=seed) / 16))
        return g.op("Concat", *g.ops("Split", 2, q, axis=2), axis=0)

    scores = g.op("MatMul", heads(0), g.op("Transpose", heads(1), perm=[0, 2, 1]))
    if mask:
        scores = g.op("Add", scores, g.const(np.where(np.eye(25), -1e9, 0)[None]))
    pooled = g.op("MatMul", g.op("Softmax", scores, axis=2), heads(2))
    y = g.op("Relu", g.op("Concat", *g.ops("Split", 2, pooled, axis=0), axis=2))
    g.output(g.op("MatMul", g.op("Flatten", y), g.const(whole_numbers(800, 1))), ["N", 1])
    result = optimised(g, given, counts=(1, 2, 5, 9), tolerance=1e-5)
    if not mask:
        # A query of the candidate's on all keys, those of the request on its key, and scores times values likewise.
        assert rules(result)["attention"] >= 2
        assert result.report.after["candidate"].macs < 0.25 * result.report.before["candidate"].macs
