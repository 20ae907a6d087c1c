"""Sequences of symbolic length taken apart: same scores, one level per tensor, masks that are proved or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
import sequences as sq
from helpers import Given, Graph, candidate, feeds, operators, patterns, request, rewritten, run, session
from onnx import ModelProto, TensorProto, helper
from sequences import FAR, INF, LENGTHS, D, Sequence

import onnxrank
from onnxrank import feeds as declared
from onnxrank import model as files
from onnxrank.errors import UsageError
from onnxrank.passes import choosing
from onnxrank.plans import SEGMENTS
from onnxrank.roles import resolve
from onnxrank.segments import spans
from onnxrank.study import Study

COUNTS = (1, 3, 33)


def study_of(model: ModelProto, given: list[Given]) -> Study:
    return Study(model, resolve(declared.describe(model), request=patterns(given)), files.load(model))


def divided(model: ModelProto, given: list[Given]) -> ModelProto:
    study = study_of(model, given)
    assert study.sequences
    return study.divided(study.sequences).model


def assert_equal(
    before: ModelProto, after: ModelProto, given: list[Given], tolerance: float, cut: bool = False, least: int = 1
) -> None:
    """Holds one model against the other, at lengths and numbers beyond those that are measured."""
    a, b = session(before), session(after)
    for n in COUNTS:
        for length in LENGTHS:
            old, new = feeds(given, n, lengths={"L": length})
            try:
                wanted = run(a, old)
            except Exception:
                assert length < least, "the original must run"
                continue
            for name, got in run(b, new if cut else old).items():
                scale = max(1.0, float(np.nanmax(np.abs(wanted[name]), initial=0.0)))
                what = f"{name} at N = {n}, L = {length}"
                assert got.shape == wanted[name].shape, what
                np.testing.assert_allclose(got, wanted[name], rtol=0, atol=tolerance * scale, err_msg=what)


# --- operators -----------------------------------------------------------------------------------------------------

Build = Callable[[Sequence], str]


def _op(kind: str, **attrs: object) -> Build:
    return lambda s: s.graph.op(kind, s.tokens, **attrs)


def _split_heads(s: Sequence) -> str:
    g = s.graph
    shape = g.op("Concat", g.ints(-1), g.on_axes("Unsqueeze", s.size, [0]), g.ints(2, D // 2), axis=0)
    return g.op(
        "Reshape", g.op("Transpose", g.op("Reshape", s.tokens, shape), perm=[0, 2, 1, 3]), g.ints(0, 2, -1, D // 2)
    )


def _scores(s: Sequence) -> str:
    return s.graph.op("MatMul", s.tokens, s.graph.op("Transpose", s.tokens, perm=[0, 2, 1]))


def _pooled(s: Sequence) -> str:
    g = s.graph
    return g.op("MatMul", g.op("Softmax", _scores(s), axis=-1), s.tokens)


def _positions(s: Sequence) -> str:
    table = s.graph.const(np.arange(80 * D).reshape(80, D))
    return s.graph.op("Add", s.tokens, s.graph.op("Gather", table, s.at))


def _cut_positions(s: Sequence) -> str:
    g = s.graph
    table = g.const(np.arange(80 * D).reshape(80, D))
    cut = g.op("Slice", table, g.ints(0), g.on_axes("Unsqueeze", s.size, [0]), g.ints(0))
    return g.op("Add", s.tokens, cut)


def _lookup(s: Sequence) -> str:
    g = s.graph
    ids = g.op("Cast", g.op("Abs", g.op("Gather", s.tokens, g.const(0, np.int64), axis=2)), to=int(TensorProto.INT64))
    return g.op("Gather", g.const(np.arange(5 * D).reshape(5, D)), ids)


def _einsum(s: Sequence) -> str:
    g = s.graph
    scores = g.op("Einsum", s.tokens, s.tokens, equation="bid,bjd->bij")
    return g.op("Einsum", g.op("Softmax", scores, axis=-1), s.tokens, equation="bij,bjd->bid")


def _mean_of_others(s: Sequence) -> str:
    return s.graph.op("Sub", s.tokens, s.graph.on_axes("ReduceMean", s.tokens, [1], keepdims=1))


def _second_sequence(s: Sequence) -> str:
    g = s.graph
    return g.op("Add", g.op("Concat", "h", g.op("Neg", "c"), axis=1), s.tokens)


def _from_outside(s: Sequence) -> str:
    g = s.graph
    s.given.append(candidate("w", "L", D))
    other = g.op("Concat", s.given[-1].declare(g), "c", axis=1)
    return g.op("Mul", s.tokens, other)


def _appended(s: Sequence) -> str:
    return s.graph.op("Concat", s.tokens, s.graph.op("Neg", "c"), axis=1)


def _rows(s: Sequence) -> str:
    """All tokens of all rows, one after another."""
    return s.graph.op("Reshape", s.tokens, s.graph.ints(-1, D))


def _apart_again(s: Sequence, rows: str, width: int) -> str:
    g = s.graph
    return g.op("Reshape", rows, g.op("Concat", g.ints(-1), g.on_axes("Unsqueeze", s.size, [0]), g.ints(width), axis=0))


def _merged_entries(s: Sequence) -> str:
    g, rows = s.graph, _rows(s)
    both = g.op("Concat", g.op("Relu", rows), g.op("Mul", rows, g.const(np.arange(1, 1 + D).reshape(1, D))), axis=1)
    return _apart_again(s, both, 2 * D)


def _merged_lookups(s: Sequence) -> str:
    g = s.graph
    first = g.op("Gather", s.tokens, g.const(0, np.int64), axis=2)
    ids = g.op("Reshape", g.op("Cast", g.op("Abs", first), to=int(TensorProto.INT64)), g.ints(-1))
    tables = [g.const(np.arange(5 * D).reshape(5, D) * k) for k in (1, 3)]
    return _apart_again(s, g.op("Concat", *(g.op("Gather", t, ids) for t in tables), axis=-1), 2 * D)


def _slice(start: int, end: int) -> Build:
    return lambda s: s.graph.op("Slice", s.tokens, s.graph.ints(start), s.graph.ints(end), s.graph.ints(1))


def _flags(s: Sequence, fill: float = 0.0) -> str:
    """What is known of the history alone, with a number for the candidate, beside the tokens."""
    g = s.graph
    row = g.op("Cast", g.op("Equal", "seen", g.const(0.0)), to=int(TensorProto.FLOAT))
    own = (s.own, 0) if s.first else (0, s.own)
    padded = g.op("Pad", row, g.ints(0, own[0], 0, own[1]), g.const(fill))
    return g.op("Add", s.tokens, g.on_axes("Unsqueeze", padded, [2]))


def _pyramid(s: Sequence) -> str:
    """The last five tokens ask all; a tensor of five is added to what they get."""
    g = s.graph
    last = g.op("Slice", s.tokens, g.ints(-5), g.ints(1 << 40), g.ints(1))
    weights = g.op("Softmax", g.op("MatMul", last, g.op("Transpose", s.tokens, perm=[0, 2, 1])), axis=-1)
    pooled = g.op("Reshape", g.op("MatMul", weights, s.tokens), g.ints(-1, 5, D))
    return g.op("Add", last, pooled)


FOLLOWED: dict[str, Build] = {
    "padded flags": _flags,
    "padded with a number": lambda s: _flags(s, 3.0),
    "relu": _op("Relu"),
    "where": lambda s: s.graph.op(
        "Where", s.graph.op("Greater", s.tokens, s.graph.const(0.0)), s.tokens, s.graph.const(2.0)
    ),
    "clip": lambda s: s.graph.op("Clip", s.tokens, s.graph.const(-1.0), s.graph.const(1.0)),
    "fc": lambda s: sq.fc(s, s.tokens),
    "norm": lambda s: sq.norm(s, s.tokens),
    "softmax over entries": _op("Softmax", axis=-1),
    "softmax over tokens": _op("Softmax", axis=1),
    "transpose": _op("Transpose", perm=[2, 1, 0]),
    "unsqueeze": lambda s: s.graph.on_axes("Unsqueeze", s.tokens, [1]),
    "squeeze": lambda s: s.graph.on_axes("Squeeze", s.graph.on_axes("Unsqueeze", s.tokens, [0]), [0]),
    "heads": _split_heads,
    "scores": _scores,
    "attention": _pooled,
    "einsum": _einsum,
    "positions": _positions,
    "cut positions": _cut_positions,
    "lookup": _lookup,
    "last": lambda s: s.graph.op("Gather", s.tokens, s.graph.const(-1, np.int64), axis=1),
    "last ones": lambda s: s.graph.op("Gather", s.tokens, s.graph.ints(-1, -1), axis=1),
    "all but the last": lambda s: s.graph.op("Slice", s.tokens, s.graph.ints(0), s.graph.ints(-1), s.graph.ints(1)),
    "slice of the last": lambda s: s.graph.op(
        "Slice", s.tokens, s.graph.ints(-1), s.graph.ints(1 << 40), s.graph.ints(1)
    ),
    "last of the history": _slice(-4, -1),
    "last of both": _slice(-4, 1 << 40),
    "last of the history but one": _slice(-5, -2),
    "merged and apart again": _merged_entries,
    "lookups of merged ids": _merged_lookups,
    "slice of entries": lambda s: s.graph.op("Slice", s.tokens, s.graph.ints(1), s.graph.ints(3), s.graph.ints(2)),
    "mean over tokens": _mean_of_others,
    "sum over tokens": lambda s: s.graph.on_axes("ReduceSum", s.tokens, [1, 2], keepdims=0),
    "largest entry": lambda s: s.graph.on_axes("ReduceMax", s.tokens, [2], keepdims=0),
    "a second sequence": _second_sequence,
    "a sequence of other levels": _from_outside,
    "one more": _appended,
    "joined entries": lambda s: s.graph.op("Concat", s.tokens, s.graph.op("Neg", s.tokens), axis=2),
}
JOINING = {"softmax over tokens", "one more"}
"""What joins segments by itself."""
LEFT: dict[str, Build] = {
    "padded tokens": lambda s: s.graph.op("Pad", s.tokens, s.graph.ints(0, 1, 0, 0, 1, 0)),
    "reflected": lambda s: s.graph.op("Pad", s.tokens, s.graph.ints(0, 0, 1, 0, 0, 1), mode="reflect"),
    "cumsum": lambda s: s.graph.op("CumSum", s.tokens, s.graph.const(1, np.int64)),
    "largest token": lambda s: s.graph.on_axes("ReduceMax", s.tokens, [1], keepdims=0),
    "second to last": lambda s: s.graph.op("Gather", s.tokens, s.graph.const(-2, np.int64), axis=1),
    "all but the first": lambda s: s.graph.op(
        "Slice", s.tokens, s.graph.ints(1), s.graph.ints(1 << 40), s.graph.ints(1)
    ),
    "merged": _rows,
    "merged and summed": lambda s: s.graph.on_axes("ReduceSum", s.graph.op("Relu", _rows(s)), [0], keepdims=1),
    "merged and one after another": lambda s: s.graph.op("Concat", _rows(s), s.graph.op("Neg", _rows(s)), axis=0),
    "softmax over merged rows": lambda s: _apart_again(s, s.graph.op("Softmax", _rows(s), axis=0), D),
    "first of merged rows": lambda s: s.graph.op("Gather", _rows(s), s.graph.ints(0), axis=0),
    "all but the last but one": _slice(-1 << 40, -2),
}


@pytest.mark.parametrize("first", [False, True], ids=["history first", "candidate first"])
@pytest.mark.parametrize("name", [*FOLLOWED, *LEFT])
def test_operators(name: str, first: bool) -> None:
    s = sq.sequence(first)
    out = {**FOLLOWED, **LEFT}[name](s)
    s.graph.output(out, None)
    model = s.graph.model()
    made = divided(model, s.given)
    assert_equal(model, made, s.given, 1e-6)
    if name in FOLLOWED.keys() - JOINING and not first:
        joined = [n for n in made.graph.node if n.op_type == "Concat" and set(n.input) >= {"h", "c"}]
        assert not joined, "no operator reads the whole sequence"
        assert "Pad" not in operators(made), "what is added to the history is a segment"


@pytest.mark.parametrize("own", [2, 3])
def test_a_pyramid(own: int) -> None:
    """It runs with five tokens or more, and then has five queries; with fewer, its segments are not there either."""
    s = sq.sequence(own=own)
    s.graph.output(_pyramid(s), None)
    model = s.graph.model()
    made = divided(model, s.given)
    assert_equal(model, made, s.given, 1e-6, least=5 - own)
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        run(session(made), feeds(s.given, 3, lengths={"L": 1})[0])
    assert not [n for n in made.graph.node if n.op_type == "Concat" and set(n.input) >= {"h", "c"}]
    found = study_of(made, s.given).facts.sizes[model.graph.output[0].name]
    assert [str(n) for n in found] == ["N", "5", str(D)]


def _with_user_tokens() -> Sequence:
    """Tokens of the history, a separator, two of the user, and two of the candidate."""
    g = Graph(17)
    given = [request("h", "L", D), request("u", 2, D), candidate("c", 2, D), request("seen", "L")]
    h, u, c, _ = (i.declare(g) for i in given)
    separator = g.op("Mul", g.op("Slice", u, g.ints(0), g.ints(1), g.ints(1)), g.const(0.5))
    return Sequence(g, g.op("Concat", h, separator, u, c, axis=1), given, 2)


def _own_layers(s: Sequence) -> str:
    """A layer for all tokens but the last three, and another for each of these, of which one is the user's."""
    g = s.graph
    shared = sq.fc(s, g.op("Slice", s.tokens, g.ints(0), g.ints(-3), g.ints(1)))
    rest = g.op("Slice", s.tokens, g.ints(-3), g.ints(1 << 40), g.ints(1))
    rest = g.op("MatMul", g.op("Transpose", rest, perm=[1, 0, 2]), g.const(np.arange(3 * D * D).reshape(3, D, D) / 9))
    return g.op("Concat", shared, g.op("Transpose", rest, perm=[1, 0, 2]), axis=1)


def _padded_flags(s: Sequence) -> str:
    g = s.graph
    flags = g.on_axes("Unsqueeze", g.op("Pad", "seen", g.ints(0, 0, 0, 5), g.const(3.0)), [2])
    return g.op("Add", s.tokens, flags)


OF_SEVERAL: dict[str, Build] = {
    "fc": lambda s: sq.fc(s, s.tokens),
    "own layers": _own_layers,
    "padded flags": _padded_flags,
    "pyramid": lambda s: s.graph.op("Concat", _pyramid(s), s.graph.op("Neg", _pyramid(s)), axis=2),
    "softmax over tokens": _op("Softmax", axis=1),
    "all but the candidate's": lambda s: s.graph.op(
        "Slice", s.tokens, s.graph.ints(0), s.graph.ints(-2), s.graph.ints(1)
    ),
    "all but more": lambda s: s.graph.op("Slice", s.tokens, s.graph.ints(0), s.graph.ints(-4), s.graph.ints(1)),
}
"""What is read of a sequence of several parts that are the request's."""


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_neighbours_that_are_the_requests_are_one_segment(name: str) -> None:
    s = _with_user_tokens()
    s.graph.output(s.graph.op("Sigmoid", OF_SEVERAL[name](s)), None)
    model = s.graph.model()
    made = divided(model, s.given)
    assert_equal(model, made, s.given, 1e-6)
    assert operators(made).count("Sigmoid") == (1 if name.startswith("all but") else 2)
    assert not [n for n in made.graph.node if n.op_type == "Concat" and set(n.input) >= {"h", "c"}]


@pytest.mark.parametrize("op", ["Mul", "Div", "Where"])
def test_a_mask_behind_softmax_that_shows_all_of_a_segment(op: str) -> None:
    """Weights of the candidate stay as they are, which stand before those of the history that do not."""
    s = sq.sequence(first=True)
    g = s.graph
    row = g.op("Cast", g.op("Greater", "seen", g.const(0.0)), to=int(TensorProto.FLOAT))
    shown = g.op("Pad", g.op("Add", row, g.const(0.5)), g.ints(0, 1, 0, 0), g.const(1.0))
    shown = g.on_axes("Unsqueeze", shown, [1])
    weights = g.op("Softmax", _scores(s), axis=-1)
    if op == "Where":
        weights = g.op("Where", g.op("Equal", shown, g.const(1.0)), weights, g.const(0.25))
    else:
        weights = g.op(op, weights, shown)
    g.output(g.op("MatMul", weights, s.tokens), None)
    model = g.model()
    made = divided(model, s.given)
    assert_equal(model, made, s.given, 1e-6)
    if op != "Where":
        assert operators(made).count(op) == 2, "one for the rows of the candidate, and one for those of the history"


def test_the_candidate_first() -> None:
    s = sq.sequence(first=True)
    s.graph.output(s.graph.op("Gather", s.tokens, s.graph.const(0, np.int64), axis=1), None)
    made = divided(s.graph.model(), s.given)
    assert [i for n in made.graph.node for i in n.input if i in ("h", "c")] == ["c"]


def test_a_tensor_that_is_one_segment_is_an_output() -> None:
    s = sq.sequence()
    kept = s.graph.op("Slice", s.tokens, s.graph.ints(0), s.graph.ints(-1), s.graph.ints(1))
    s.graph.output(kept, None)
    s.graph.output(s.tokens, None)
    model = s.graph.model()
    assert_equal(model, divided(model, s.given), s.given, 0.0)


def test_bodies_read_what_is_joined_again() -> None:
    s = sq.sequence()
    x = s.graph.op("Relu", s.tokens)
    bodies = []
    for op in ("Neg", "Abs"):
        out = helper.make_tensor_value_info(f"y_{op}", TensorProto.FLOAT, None)
        bodies.append(helper.make_graph([helper.make_node(op, [x], [out.name])], op, [], [out]))
    positive = s.graph.op("Greater", s.graph.on_axes("ReduceSum", "c", [0, 1, 2], keepdims=0), s.graph.const(0.0))
    s.graph.output(s.graph.op("If", positive, then_branch=bodies[0], else_branch=bodies[1]), ["N", "T", D])
    model = s.graph.model()
    assert_equal(model, divided(model, s.given), s.given, 0.0)


def test_what_is_no_such_sequence() -> None:
    for given in ([request("h", "L", D), request("c", 1, D)], [request("h", 5, D), candidate("c", 1, D)]):
        g = Graph()
        h, c = (i.declare(g) for i in given)
        g.output(g.op("Add", g.op("Concat", h, c, axis=1), candidate("x", 1, D).declare(g)), None)
        assert study_of(g.model(), [*given, candidate("x", 1, D)]).sequences == []


# --- masks ---------------------------------------------------------------------------------------------------------


def attended(mask: Callable[[Sequence], Callable[[str], str] | None], layers: int = 2, own: int = 1) -> Sequence:
    s = sq.sequence(own=own)
    x, put = s.tokens, mask(s)
    for layer in range(layers):
        x = s.graph.op("Add", x, sq.attention(s, sq.norm(s, x), put, 2, layer))
    s.graph.output(s.graph.op("Gather", x, s.graph.const(-1, np.int64), axis=1), ["N", D])
    return s


def _padded(fill: float, inner: float) -> Callable[[Sequence], Callable[[str], str]]:
    def put(s: Sequence) -> Callable[[str], str]:
        causal, pad = sq.causal(s, inner), s.graph.on_axes("Unsqueeze", sq.padding(s, fill), [1])
        return lambda x: s.graph.op("Add", causal(x), pad)

    return put


def _self_seen(s: Sequence) -> Callable[[str], str]:
    """Causal and padding in one finite mask that leaves every token itself."""
    g = s.graph
    empty = g.op("Less", g.on_axes("Unsqueeze", sq.padding(s, -1.0), [1]), g.const(0.0))
    other = g.op("Not", g.op("Equal", s.at, s.rows))
    hidden = g.op("Or", g.op("Greater", s.at, s.rows), g.op("And", empty, other))
    return lambda x: g.op("Where", hidden, g.const(FAR), x)


def _given_by_caller(s: Sequence) -> Callable[[str], str]:
    s.given.append(request("mask", "L", "L"))
    mask = s.given[-1].declare(s.graph)
    rows = s.graph.op("Pad", mask, s.graph.ints(0, 0, 0, 0, s.own, s.own))
    return lambda x: s.graph.op("Add", x, s.graph.on_axes("Unsqueeze", rows, [1]))


def _weak(s: Sequence) -> Callable[[str], str]:
    return sq.causal(s, -10.0)


def _earlier(s: Sequence) -> Callable[[str], str]:
    """Hides earlier tokens: the candidate is seen by all."""
    later = s.graph.op("Less", s.at, s.rows)
    return lambda x: s.graph.op("Where", later, s.graph.const(INF), x)


HIDING = {
    **{
        f"{how} {fill}": (lambda s, how=how, fill=fill: sq.causal(s, fill, how))
        for how in sq.WAYS
        for fill in (INF, FAR)
    },
    "with padding": _padded(FAR, INF),
    "rows see themselves": _self_seen,
}
SHOWING = {
    "no mask": lambda s: None,
    "weak": _weak,
    "of earlier tokens": _earlier,
    "finite, with padding": _padded(FAR, FAR),
    "of the caller": _given_by_caller,
}


@pytest.mark.slow
@pytest.mark.parametrize("own", [1, 2])
@pytest.mark.parametrize("name", [*HIDING, *SHOWING])
def test_masks(name: str, own: int) -> None:
    assert_proved({**HIDING, **SHOWING}[name], name in HIDING, own)


@pytest.mark.slow
@pytest.mark.parametrize("how", sq.TABLES)
def test_triangles_cut_to_the_length(how: str) -> None:
    """Whatever the length, a later segment's positions are greater: what hides is above the constant's diagonal."""
    assert_proved(lambda s: sq.causal(s, INF, how), True)


@pytest.mark.slow
def test_triangles_with_holes() -> None:
    assert_proved(sq.open_table, False)


def test_a_constant_that_meets_no_sequence() -> None:
    """It may have fewer rows than the sequence."""
    s = sq.sequence()
    g, size = s.graph, s.graph.on_axes("Unsqueeze", s.size, [0])
    cut = g.op("Slice", g.const(np.eye(40)), g.ints(0, 0), g.op("Concat", size, size, axis=0), g.ints(0, 1))
    g.output(g.op("Sub", g.const(1.0), cut), ["a", "b"])
    g.output(g.op("Neg", s.tokens), ["N", "T", D])
    model = g.model()
    assert_equal(model, divided(model, s.given), s.given, 0.0)


def assert_proved(mask: Callable[[Sequence], Callable[[str], str] | None], hiding: bool, own: int = 1) -> None:
    """Holds a model against what is made of it, and whether the mask was seen to hide the candidate."""
    s = attended(mask, own=own)
    model = s.graph.model()
    made = divided(model, s.given)
    assert_equal(model, made, s.given, 2e-6)
    result = rewritten(model, request=patterns(s.given))
    assert_equal(model, result.model, s.given, 2e-6, cut=result.changed)
    share = result.report.macs_after / result.report.macs_before
    if hiding:
        assert share < 0.25, "the history is encoded once"
    elif own == 1:
        assert share > 0.25


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed: int) -> None:
    check_random_model(seed)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(12, 112, 25))
def test_more_random_models(start: int) -> None:
    for seed in range(start, start + 25):
        check_random_model(seed)


def check_random_model(seed: int) -> None:
    graph, given = sq.random_model(seed)
    model = graph.model()
    assert_equal(model, divided(model, given), given, 5e-6)
    for interface in ("request", "same"):
        result = rewritten(model, request=patterns(given), interface=interface)
        assert_equal(model, result.model, given, 5e-6, cut=result.changed and interface == "request")


@pytest.mark.parametrize("length", ["L", 12])
@pytest.mark.parametrize("masked", ["chosen", "multiplied", "table"])
def test_attention_without_softmax(masked: str, length: int | str) -> None:
    s = sq.sequence(length=length)
    x = s.tokens
    for layer in range(2):
        x = s.graph.op("Add", x, sq.pointwise_attention(s, sq.norm(s, x), masked, layer))
    s.graph.output(s.graph.op("Gather", x, s.graph.const(-1, np.int64), axis=1), ["N", D])
    model = s.graph.model()
    result = rewritten(model, request=patterns(s.given))
    assert_equal(model, result.model, s.given, 2e-6, cut=True)
    assert result.report.macs_after < 0.25 * result.report.macs_before, "the history is encoded once"
    assert any(p.place.rule == SEGMENTS and p.taken for p in result.plan.sites)


def _products_of_turned(s: Sequence) -> str:
    """Weights that are no softmax of scores, and values that a Transpose makes, of heads or of entries."""
    g = s.graph
    heads = g.op("Transpose", g.op("Reshape", s.tokens, g.ints(0, -1, 2, D // 2)), perm=[0, 2, 1, 3])
    scores = g.op("Relu", g.op("MatMul", heads, g.op("Transpose", heads, perm=[0, 1, 3, 2])))
    entries = g.op("Transpose", s.tokens, perm=[0, 2, 1])
    both = g.op("MatMul", entries, g.op("MatMul", g.op("Relu", s.tokens), g.const(np.ones((D, D)))))
    return g.op("Add", g.on_axes("ReduceSum", g.op("MatMul", scores, heads), [1, 2, 3], keepdims=0),
                g.on_axes("ReduceSum", both, [1, 2], keepdims=0))  # fmt: skip


@pytest.mark.parametrize("ignored", [[], ["dot"], ["dot", "broadcast"]], ids=["all", "no dot", "no broadcast"])
def test_products_over_a_history_of_nothing(ignored: list[str]) -> None:
    """A product with no entries to sum is 0 without being looked at, whoever writes it."""
    s = sq.sequence()
    s.graph.output(_products_of_turned(s), ["N"])
    model = s.graph.model()
    made = divided(model, s.given)
    assert "Where" not in operators(made)
    assert_equal(model, made, s.given, 1e-6)
    result = rewritten(model, request=patterns(s.given), ignore=ignored)
    assert_equal(model, result.model, s.given, 1e-6, cut=result.changed)


def _lengths_of_requests(s: Sequence, length: int) -> str:
    """A causal mask of constants and the request's padding, expanded to heads as exporters do."""
    g = s.graph
    count = g.on_axes("ReduceSum", g.op("Cast", g.op("Greater", "seen", g.const(0.0)), to=1), [1], keepdims=1)
    causal = g.const(np.tril(np.ones((length + 1, length + 1), bool)), bool)
    within = g.op("Less", g.const(np.arange(length + 1)), g.on_axes("Unsqueeze", count, [1]))
    mine = g.const(np.eye(length + 1, dtype=bool), bool)
    shown = g.op("Or", g.op("And", causal, within), mine)
    shape = g.op("Concat", g.op("Shape", "c", end=1), g.ints(2, length + 1, length + 1), axis=0)
    return g.op("Not", g.op("Expand", g.on_axes("Unsqueeze", shown, [1]), shape))


@pytest.mark.slow
def test_constant_masks_with_lengths_of_requests() -> None:
    length = 12
    s = sq.sequence(length=length)
    hidden = _lengths_of_requests(s, length)
    x = s.tokens
    for layer in range(2):
        put = lambda t: s.graph.op("Where", hidden, s.graph.const(FAR), t)  # noqa: E731
        x = s.graph.op("Add", x, sq.attention(s, sq.norm(s, x), put, 2, layer))
    s.graph.output(s.graph.op("Gather", x, s.graph.const(-1, np.int64), axis=1), ["N", D])
    model = s.graph.model()
    result = rewritten(model, request=patterns(s.given))
    assert_equal(model, result.model, s.given, 2e-6, cut=True)
    assert result.report.macs_after < 0.25 * result.report.macs_before


@pytest.mark.parametrize(("start", "end"), [(-3, 1 << 40), (2, -1), (0, 5), (9, 13), (-1, 1 << 40), (12, 13)])
def test_some_positions_of_a_fixed_sequence(start: int, end: int) -> None:
    s = sq.sequence(length=12)
    g = s.graph
    kept = g.op("Slice", s.tokens, g.ints(start), g.ints(end), g.ints(1))
    scores = g.op("MatMul", kept, g.op("Transpose", s.tokens, perm=[0, 2, 1]))
    g.output(g.on_axes("ReduceSum", scores, [1], keepdims=0), None)
    model = g.model()
    study = study_of(model, s.given)
    assert study.fixed_sequences and not study.sequences
    made = study.divided(study.fixed_sequences).model
    assert_equal(model, made, s.given, 1e-6)
    assert not [n for n in made.graph.node if n.op_type == "Concat" and set(n.input) >= {"h", "c"}]


# --- plans ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_plans_say_what_was_taken_apart_and_replay_it(tmp_path: Path) -> None:
    s = attended(lambda s: sq.causal(s))
    onnx.save(s.graph.model(), tmp_path / "m.onnx")
    result = rewritten(tmp_path / "m.onnx", request=patterns(s.given))
    (site,) = [p for p in result.plan.sites if p.place.rule == SEGMENTS]
    assert (site.op, site.chosen) == ("Concat", "take")
    again = onnxrank.optimize(tmp_path / "m.onnx", plan=result.plan, check=False)
    assert again.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)
    assert "Concat" not in operators(result.model) or not any(
        set(n.input) >= {"h", "c"} for n in result.model.graph.node
    )


def test_a_plan_of_another_model_is_refused(tmp_path: Path) -> None:
    s = attended(lambda s: sq.causal(s))
    onnx.save(s.graph.model(), tmp_path / "m.onnx")
    result = rewritten(tmp_path / "m.onnx", request=patterns(s.given))
    g = Graph()
    given = [request("u", D), candidate("c", D)]
    g.output(g.op("Add", *(i.declare(g) for i in given)), None)
    other = study_of(g.model(), given)
    with pytest.raises(UsageError, match="does not fit"):
        other.prepared(result.plan.preparation)


@pytest.mark.slow
def test_the_check_passes_at_all_lengths() -> None:
    s = attended(lambda s: sq.causal(s), layers=3)
    model = s.graph.model()
    result = onnxrank.optimize(model, request=patterns(s.given), check="full", strict=True)
    assert result.changed


@pytest.mark.slow
def test_what_fails_the_check_is_joined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in what takes sequences apart costs what it saves, and nothing else."""
    s = attended(lambda s: sq.causal(s, -1.0), layers=1)
    user = request("u", 8)
    s.given.append(user)
    g = s.graph
    tower = g.op("MatMul", user.declare(g), g.const(np.ones((8, 64))))
    g.output(g.op("Sigmoid", g.op("Add", tower, g.op("MatMul", "c_row", g.const(np.ones((D, 64)))))), ["N", 64])
    g.nodes.insert(0, helper.make_node("Squeeze", ["c", g.ints(1)], ["c_row"]))
    model = g.model()
    monkeypatch.setattr(spans, "hides", lambda *_: True)
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(model, request=patterns(s.given), check="quick")
    assert [r.rule for r in result.report.retreats] == [SEGMENTS]
    assert result.changed, "the tower still runs once"
    assert_equal(model, result.model, s.given, 2e-6, cut=True)
    (site,) = [p for p in result.plan.sites if p.place.rule == SEGMENTS]
    assert site.chosen == "leave"


def test_shapes_of_what_is_cut_in_old_opsets() -> None:
    """Min and Max take no integers up to opset 11."""
    s = sq.sequence(opset=11)
    g = s.graph
    cut = g.op("Slice", s.tokens, g.ints(-50), g.ints(1 << 40), g.ints(0))
    g.output(g.op("Add", cut, g.op("ConstantOfShape", g.op("Shape", cut))), None)
    model = g.model()
    assert_equal(model, divided(model, s.given), s.given, 1e-6)
