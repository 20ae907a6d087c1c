"""`attention`: softmax over keys of which some are request-level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest
from helpers import (
    Feed,
    Given,
    Graph,
    assert_same_scores,
    candidate,
    exposed,
    feeds,
    operators,
    patterns,
    refusals,
    request,
    rules,
    run,
    session,
)
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

import onnxrank
from onnxrank.forms import Form
from onnxrank.passes import choosing, preparation

N = 512
COUNTS = (0, 1, 2, 7)
LOW = -1e9
Array = NDArray[np.float64]


@contextmanager
def forced(divided: bool = True, stacked: bool = False) -> Iterator[None]:
    """Takes the form with or without the rule, with heads in one product or in one each, whatever it costs."""

    def seconds(self: Form, *_: object) -> float:
        return 2.0 * (self.uses("attention") != divided) + (("attention" in self.choice.forms) != stacked)

    with mock.patch.object(Form, "seconds", seconds), mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        yield


def held(
    g: Graph,
    given: Sequence[Given],
    *,
    counts: Sequence[int] = COUNTS,
    interfaces: Sequence[str] = ("request",),
    tolerance: float = 5e-6,
    stacked: bool = False,
) -> onnxrank.Result:
    """Optimises with the rule; holds the scores against the original's, and by the optimiser's check in float64."""
    model = g.model()
    with forced(stacked=stacked):
        for interface in interfaces:
            result = onnxrank.optimize(model, request=patterns(given), interface=interface)
            assert_same_scores(model, result, given, interface, counts, tolerance)
    assert result.report.checks and all(c.passed for c in result.report.checks)
    assert not any("float64" in note for note in result.report.notes)
    return result


def made(g: Graph, given: Sequence[Given], stacked: bool = False) -> tuple[ModelProto, onnxrank.Result]:
    """The original, and its rewrite with the rule, unchecked."""
    model = g.model()
    with forced(stacked=stacked):
        result = onnxrank.optimize(model, request=patterns(given), check=False)
    assert "attention" in rules(result) and "Exp" in operators(result.model)
    return model, result


def agree(model: ModelProto, result: onnxrank.Result, old: Feed, new: Feed, tolerance: float = 5e-6) -> Feed:
    """The same scores of one request, with NaN and infinity in the same places; returns those of the original."""
    want, got = run(model, old), run(result.model, new)
    for name, score in want.items():
        finite = np.abs(score[np.isfinite(score)]).max(initial=1e-6)
        np.testing.assert_allclose(got[name], score, rtol=0, atol=tolerance * float(finite), err_msg=name)
    return want


# --- models --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class How:
    """How attention is written.

    Attributes:
        heads: Number of heads.
        layout: Where heads are: `rows` [N, H, F, d], `first` [H, N, F, d], `split` the same by Split and Concat,
            `merged` [N H, F, d], `none`.
        scale: What is scaled, by which operator.
        bias: Whether projections have one.
        mask: Kind of mask, if any.
        low: What a masked key's score becomes, or is lowered by.
        behind: What follows: `relu` residual and ReLU, `none`.
    """

    heads: int = 2
    layout: str = "rows"
    scale: str = "scores Mul"
    bias: bool = False
    mask: str = ""
    low: float = LOW
    behind: str = "relu"


class Fields:
    """Request-level and candidate-level rows [N, F, D], and what attends to them.

    Args:
        users: Request-level rows.
        items: Candidate-level rows.
        width: Columns.
        shuffled: Seed of the order of rows; the request's first if None.
        spread: Spread of the weights, per root of their rows.
    """

    def __init__(
        self, users: int, items: int, width: int = 6, shuffled: int | None = None, seed: int = 0, spread: float = 0.5
    ) -> None:
        self.users, self.items, self.width, self.count, self.spread = users, items, width, users + items, spread
        self.given: list[Given] = [request("u", users, width), candidate("c", items, width)]
        self.g, self.rng = Graph(), np.random.default_rng(seed)
        self.order = np.arange(self.count)
        if shuffled is not None:
            self.order = np.random.default_rng(shuffled).permutation(self.count)
        self.x = self.joined(self.given[0].declare(self.g), self.given[1].declare(self.g))

    def joined(self, user: str, item: str, axis: int = 1) -> str:
        x = self.g.op("Concat", user, item, axis=axis)
        if (self.order != np.arange(self.count)).any():
            x = self.g.op("Gather", x, self.g.ints(*self.order), axis=axis)
        return x

    def weight(self, *shape: int) -> str:
        return self.g.const(self.rng.normal(0, self.spread / np.sqrt(shape[0]), shape))

    def linear(self, x: str, width: int, bias: bool) -> str:
        y = self.g.op("MatMul", x, self.weight(self.width, width))
        return self.g.op("Add", self.weight(width), y) if bias else y

    def visible(self, name: str, level: str) -> str:
        """Whether the keys of a level may be seen, [N, keys], by an input of its own."""
        make, keys = {"u": (request, self.users), "c": (candidate, self.items)}[level]
        self.given.append(make(name, keys))
        return self.g.op("Greater", self.given[-1].declare(self.g), self.g.const(-1))

    def mask(self, how: How) -> str:
        """A mask of the keys [N, F], as numbers to add or as booleans; of queries and keys [F, F] if constant."""
        g = self.g
        if how.mask == "constant":
            seen = np.random.default_rng(5).random((self.count, self.count)) < 0.7
            np.fill_diagonal(seen, True)
            return g.const(np.where(seen, 0, how.low))
        user = self.visible("m", "u")
        if how.mask == "where":
            return self.joined(user, self.visible("mc", "c"))
        numbers = [g.op("Where", user, g.const(0), g.const(how.low))]
        if how.mask == "add both":
            numbers.append(g.op("Where", self.visible("mc", "c"), g.const(0), g.const(how.low)))
        else:
            count = g.op("Gather", g.op("Shape", self.x), g.ints(0))
            numbers.append(g.op("Expand", g.const(0), g.op("Concat", count, g.ints(self.items), axis=0)))
        return self.joined(numbers[0], numbers[1])

    def apart(self, x: str, how: How) -> str:
        """Heads apart: [N, H, F, d] or as the layout has it."""
        g, d, f = self.g, self.width // how.heads, self.count
        if how.layout == "rows":
            return g.op("Transpose", g.op("Reshape", x, g.ints(-1, f, how.heads, d)), perm=[0, 2, 1, 3])
        if how.layout == "first":
            return g.op("Transpose", g.op("Reshape", x, g.ints(-1, f, how.heads, d)), perm=[2, 0, 1, 3])
        if how.layout == "split":
            parts = g.ops("Split", how.heads, x, g.ints(*[d] * how.heads), axis=2)
            parts = parts if how.heads > 1 else [parts[0]]
            return g.op("Concat", *(g.on_axes("Unsqueeze", p, [0]) for p in parts), axis=0)
        if how.layout == "merged":
            turned = g.op("Reshape", g.op("Transpose", x, perm=[1, 0, 2]), g.ints(f, -1, d))
            return g.op("Transpose", turned, perm=[1, 0, 2])
        return x

    def together(self, x: str, how: How) -> str:
        g, f = self.g, self.count
        if how.layout == "merged":
            turned = g.op("Reshape", g.op("Transpose", x, perm=[1, 0, 2]), g.ints(f, -1, self.width))
            return g.op("Transpose", turned, perm=[1, 0, 2])
        perm = {"rows": [0, 2, 1, 3], "first": [1, 2, 0, 3], "split": [1, 2, 0, 3]}.get(how.layout)
        return x if perm is None else g.op("Reshape", g.op("Transpose", x, perm=perm), g.ints(-1, f, self.width))

    def masked(self, scores: str, mask: str, how: How) -> str:
        g = self.g
        if how.mask != "constant":
            mask = g.on_axes("Unsqueeze", mask, {"rows": [1, 2], "none": [1], "merged": [1, 2]}.get(how.layout, [0, 2]))
            if how.layout == "merged":
                mask = g.op("Reshape", g.op("Expand", mask, g.ints(1, how.heads, 1, 1)), g.ints(-1, 1, self.count))
        if how.mask == "where":
            return g.op("Where", mask, scores, g.const(how.low))
        return g.op("Add", scores, mask)

    def scores(self, x: str, how: How, mask: str | None) -> tuple[str, str]:
        """Scores [.., F, F] behind scaling and mask, and the values."""
        g = self.g
        d = self.width // how.heads
        what, _, op = how.scale.partition(" ")

        def scaled(y: str, at: str) -> str:
            return g.op(op, y, g.const(d**-0.5 if op == "Mul" else d**0.5)) if what == at else y

        q, k, v = (self.linear(x, self.width, how.bias) for _ in range(3))
        q, k = scaled(q, "query"), scaled(k, "key")
        q, k, v = (self.apart(y, how) for y in (q, k, v))
        if how.layout in ("first", "split"):
            z = g.op("Einsum", q, k, equation="bnik,bnjk->bnij")
        else:
            z = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2] if how.layout == "rows" else [0, 2, 1]))
        z = scaled(z, "scores")
        return (z if mask is None else self.masked(z, mask, how)), v

    def layer(self, x: str, how: How, mask: str | None = None) -> str:
        g = self.g
        z, v = self.scores(x, how, mask)
        p = g.op("Softmax", z, axis=-1)
        y = g.op("Einsum", p, v, equation="bnij,bnjk->bnik") if how.layout == "first" else g.op("MatMul", p, v)
        y = self.together(y, how)
        if how.behind == "relu":
            y = g.op("Relu", g.op("Add", y, self.linear(x, self.width, how.bias)))
        return y

    def stack(self, how: How, layers: int = 1) -> str:
        mask = self.mask(how) if how.mask else None
        x = self.x
        for _ in range(layers):
            x = self.layer(x, how, mask)
        return x

    def head(self, x: str, last: bool = False) -> None:
        """A linear layer of two scores on all rows, or on the last."""
        flat = self.g.op("Gather", x, self.g.const(-1, np.int64), axis=1) if last else self.g.op("Flatten", x)
        self.g.output(self.g.op("MatMul", flat, self.weight(self.width * (1 if last else self.count), 2)), ["N", 2])


def build(users: int, items: int, how: How, layers: int = 1, shuffled: int | None = None, **more: Any) -> Fields:
    f = Fields(users, items, shuffled=shuffled, **more)
    f.head(f.stack(how, layers))
    return f


# --- matching ------------------------------------------------------------------------------------------------------


LAYOUTS = ["rows", "first", "split", "merged"]


def counts(layout: str) -> Sequence[int]:
    """Numbers of candidates to compare at: an Einsum of no rows ends onnxruntime's process."""
    return COUNTS if layout in ("rows", "merged", "none") else COUNTS[1:]


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, heads: int) -> None:
    """Self-attention over fields of both levels, heads wherever they are."""
    f = build(4, 2, How(heads, layout), shuffled=heads if heads > 1 else None)
    result = held(f.g, f.given, counts=counts(layout))
    assert rules(result)["attention"] >= 2
    assert "Log" in operators(result.model)


@pytest.mark.parametrize("shuffled", [None, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_no_heads(bias: bool, shuffled: int | None) -> None:
    """One head that nothing is reshaped for; rows of both levels in any order."""
    f = build(5, 3, How(1, "none", bias=bias), shuffled=shuffled)
    assert rules(held(f.g, f.given))["attention"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("op", ["Mul", "Div"])
@pytest.mark.parametrize("what", ["query", "key", "scores"])
@pytest.mark.parametrize("bias", [False, True])
def test_scaling(what: str, op: str, bias: bool) -> None:
    """Scaling before or behind the product of queries and keys."""
    f = build(4, 2, How(2, "rows", f"{what} {op}", bias))
    assert "attention" in rules(held(f.g, f.given))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("behind", ["relu", "none"])
def test_two_layers(layout: str, behind: str) -> None:
    """All rows of the second layer are candidate-level; the first is divided all the same."""
    f = build(4, 2, How(2, layout, bias=True, behind=behind), layers=2)
    assert "attention" in rules(held(f.g, f.given, counts=counts(layout)))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_history_and_candidate(layers: int, last: bool) -> None:
    """A behaviour sequence transformer: the history's rows and the candidate's, all attending to all."""
    f = Fields(7, 1)
    f.head(f.stack(How(2, "rows", bias=True, mask="add"), layers), last)
    assert "attention" in rules(held(f.g, f.given))


@pytest.mark.parametrize("row", [0, 2, 5, -1])
@pytest.mark.parametrize("layout", ["rows", "none"])
def test_one_row_read(layout: str, row: int) -> None:
    """Of all queries one is read, request-level or candidate-level, wherever it stands."""
    f = Fields(4, 2, shuffled=3)
    y = f.stack(How(1 if layout == "none" else 2, layout, behind="none"))
    y = f.g.op("Gather", y, f.g.const(row, np.int64), axis=1)
    f.g.output(f.g.op("MatMul", y, f.weight(6, 2)), ["N", 2])
    held(f.g, f.given)


@pytest.mark.parametrize(("users", "items"), [(1, 1), (1, 4), (2, 1), (9, 5)])
@pytest.mark.parametrize("layout", ["rows", pytest.param("first", marks=pytest.mark.slow)])
def test_few_rows(layout: str, users: int, items: int) -> None:
    """A single request-level key joins nothing; more do."""
    f = build(users, items, How(2, layout, mask="add both"))
    result = held(f.g, f.given, counts=counts(layout))
    assert ("Exp" in operators(result.model)) == (users > 1)


# --- masks ---------------------------------------------------------------------------------------------------------


MASKS = [(kind, low) for kind in ("add", "add both", "where") for low in (LOW, -np.inf)]
FLOAT_MIN = float(np.finfo(np.float32).min)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["rows", "first", "none"])
@pytest.mark.parametrize(("kind", "low"), [*MASKS, ("add", FLOAT_MIN), ("where", FLOAT_MIN), ("constant", LOW)])
def test_masks(kind: str, low: float, layout: str) -> None:
    """Keys masked by request-level and candidate-level padding, in every way of writing it."""
    f = build(4, 3, How(1 if layout == "none" else 2, layout, mask=kind, low=low), shuffled=2)
    result = held(f.g, f.given, counts=counts(layout))
    assert sum(rules(result).get(name, 0) for name in ("attention", "dot")) >= 2
    assert "Exp" in operators(result.model) and "Log" not in operators(result.model)


@pytest.mark.parametrize("kind", ["add both", "where"])
def test_masks_of_merged_heads(kind: str) -> None:
    """Padding repeated for each head, where heads and candidates are one dimension."""
    f = build(4, 3, How(2, "merged", mask=kind))
    held(f.g, f.given)


def fill(old: Feed, new: Feed, name: str, data: Any) -> None:
    """Puts the same into an input of both models."""
    for feed in (old, new):
        feed[name] = np.broadcast_to(np.asarray(data, np.float32), feed[name].shape).copy()


@pytest.mark.parametrize("layout", ["rows", pytest.param("first", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("kind", "low"), [*MASKS, ("add", FLOAT_MIN), ("where", FLOAT_MIN)])
def test_all_keys_masked(kind: str, low: float, layout: str) -> None:
    """All keys of a level masked, all but one, all keys of some candidates: uniform weights, or NaN as before."""
    f = build(4, 3, How(2, layout, bias=True, mask=kind, low=low), shuffled=1)
    model, result = made(f.g, f.given)
    hidden, seen = -3, 3
    for which in ("request", "one request", "candidate", "one candidate", "all"):
        old, new = feeds(f.given, 7)
        fill(old, new, "m", hidden if which in ("request", "all") else seen)
        if which == "one request":
            fill(old, new, "m", [seen, hidden, hidden, hidden])
        if "mc" in old:
            fill(old, new, "mc", seen)
            if which in ("candidate", "all"):
                fill(old, new, "mc", np.where(np.arange(7) % 2, hidden, seen)[:, None])
            elif which == "one candidate":
                fill(old, new, "mc", [[hidden, hidden, seen]])
        (scores,) = agree(model, result, old, new).values()
        lost = which == "all" and low == -np.inf and "mc" in old
        assert np.isnan(scores).any(-1).tolist() == [lost and k % 2 == 1 for k in range(7)], which


def test_uniform_weights() -> None:
    """All keys masked by the same finite number so low that scores vanish beside it: each gets the same weight."""
    f = Fields(3, 2)
    how = How(1, "none", mask="add both", low=-1e30)
    z, _ = f.scores(f.x, how, f.mask(how))
    f.g.output(f.g.op("MatMul", f.g.op("Softmax", z, axis=-1), f.g.const(np.eye(5)[:, :3])), ["N", 5, 3])
    model, result = made(f.g, f.given)
    old, new = feeds(f.given, 4)
    fill(old, new, "m", -3)
    fill(old, new, "mc", -3)
    agree(model, result, old, new)
    (scores,) = run(result.model, new).values()
    np.testing.assert_allclose(scores, 0.2, rtol=1e-6)


# --- numbers -------------------------------------------------------------------------------------------------------


def products(users: int, items: int, mask: bool = False) -> tuple[list[Given], Graph]:
    """Rows that attend to themselves: scores are their products."""
    f = Fields(users, items, 2)
    z = f.g.op("MatMul", f.x, f.g.op("Transpose", f.x, perm=[0, 2, 1]))
    if mask:
        how = How(1, "none", mask="where")
        z = f.masked(z, f.mask(how), how)
    y = f.g.op("MatMul", f.g.op("Softmax", z, axis=-1), f.x)
    f.g.output(f.g.op("MatMul", f.g.op("Flatten", y), f.weight(2 * f.count, 2)), ["N", 2])
    return f.given, f.g


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1)])
def test_large_scores(signs: tuple[int, int], mask: bool) -> None:
    """Scores near 1e4 and -1e4 that differ by little: nothing overflows; they are whole numbers, and so exact.

    `log sum exp` rounds at their size, and with it the weights of the request-level keys as a whole.
    """
    given, g = products(4, 3, mask)
    model, result = made(g, given)
    old, new = feeds(given, 7)
    for feed in (old, new):
        for name, sign in zip("uc", signs, strict=True):
            feed[name] = sign * 70 + np.sign(feed[name])
    (scores,) = agree(model, result, old, new, 5e-6 if mask else 1e4 * 2.0**-23).values()
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("scale", "mask"),
    [(1e-30, False), (1e-30, True), (1e-5, False), (1e-5, True), (25, False), (25, True), (1e15, True)],
)
def test_scale_of_scores(scale: float, mask: bool) -> None:
    """From all weights equal to one key that takes all, or several that are equal."""
    given, g = products(4, 3, mask)
    model, result = made(g, given)
    old, new = feeds(given, 7)
    for feed in (old, new):
        for name in "uc":
            feed[name] = (feed[name] * scale).astype(np.float32)
    (scores,) = agree(model, result, old, new).values()
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, *(pytest.param(x, marks=pytest.mark.slow) for x in (-np.inf, 1e38))])
@pytest.mark.parametrize("mask", ["", "add both", "where"])
@pytest.mark.parametrize("layout", ["rows", "none"])
def test_one_bad_candidate(layout: str, mask: str, bad: float) -> None:
    """NaN, infinity and overflow stay in their own row."""
    f = build(4, 2, How(1 if layout == "none" else 2, layout, mask=mask))
    model, result = made(f.g, f.given)
    old, new = feeds(f.given, 7)
    good = run(result.model, new)
    for feed in (old, new):
        feed["c"] = feed["c"].copy()
        feed["c"][2, 1, 3] = bad
    want, got = run(model, old), run(result.model, new)
    others = np.arange(7) != 2
    for name, score in want.items():
        np.testing.assert_allclose(got[name][others], score[others], rtol=0, atol=5e-6 * np.abs(score[others]).max())
        np.testing.assert_array_equal(got[name][others], good[name][others])
        assert np.array_equal(np.isfinite(got[name]), np.isfinite(score))


@pytest.mark.parametrize(
    ("dtype", "mask"),
    [
        *((t, m) for t in (TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16) for m in (False, True)),
    ],
)
def test_types(dtype: int, mask: bool) -> None:
    """Other types than float32, as the optimiser's check sees them."""
    g, kind = Graph(), int(dtype)
    x = g.op("Concat", g.input("u", ["N", 5, 4], kind), g.input("c", ["N", 2, 4], kind), axis=1)
    z = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    if mask:
        numbers = g.op("Concat", g.input("m", ["N", 5], kind), g.input("mc", ["N", 2], kind), axis=1)
        z = g.op("Add", z, g.on_axes("Unsqueeze", numbers, [1]))
    y = g.op("MatMul", g.op("Softmax", z, axis=-1), x)
    g.output(g.op("Flatten", y), ["N", 28], kind)
    with forced():
        result = onnxrank.optimize(g.model(), request=["u", *(["m"] if mask else [])])
    assert "Exp" in operators(result.model)
    assert result.report.checks and all(c.passed for c in result.report.checks)


# --- identity ------------------------------------------------------------------------------------------------------

DOUBLE = int(TensorProto.DOUBLE)
ONCE, EACH, ROWS = 3, 2, 3


def reference(a: Array, b: Array, va: Array, vb: Array) -> Array:
    """`softmax(a ++ b) (va ++ vb)`; NaN where no key is left."""
    z = np.concatenate([np.broadcast_to(a, (len(b), a.shape[1])), b], 1)
    with np.errstate(invalid="ignore"):
        e = np.exp(z - z.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    v = np.concatenate([np.broadcast_to(va, (len(vb), *va.shape[1:])), vb], 1)
    pooled: Array = np.einsum("nk,nkd->nd", p, v)
    return pooled


@cache
def pooled(plain: bool) -> onnxruntime.InferenceSession:
    """Softmax over given scores of both levels in float64; behind a product, if plain, none stands for a mask."""
    g = Graph()
    a, b = g.input("a", ["N", ONCE], DOUBLE), g.input("b", ["N", EACH], DOUBLE)
    va, vb = g.input("va", ["N", ONCE, 2], DOUBLE), g.input("vb", ["N", EACH, 2], DOUBLE)
    z, v = g.op("Concat", a, b, axis=1), g.op("Concat", va, vb, axis=1)
    if plain:
        one = g.op("MatMul", g.on_axes("Unsqueeze", z, [2]), g.const([[1.0]], np.float64))
        z = g.op("Reshape", one, g.ints(-1, 1, ONCE + EACH))
    else:
        z = g.on_axes("Unsqueeze", z, [1])
    y = g.op("MatMul", g.op("Softmax", z, axis=-1), v)
    g.output(g.on_axes("Squeeze", y, [1]), ["N", 2], DOUBLE)
    with forced():
        result = onnxrank.optimize(g.model(), request=["a", "va"], check=False)
    assert "attention" in rules(result)
    assert ("Log" in operators(result.model)) == plain
    return session(result.model)


def numbers(*shape: int, of: st.SearchStrategy[float]) -> st.SearchStrategy[Array]:
    count = int(np.prod(shape))
    return st.lists(of, min_size=count, max_size=count).map(lambda v: np.array(v).reshape(shape))


SOME = st.floats(-30, 30)
HIGH = st.one_of(SOME, st.sampled_from([0.0, 1e4, -1e4, 9999.0, -9999.0, 700.0, -746.0]))
ANY = st.one_of(HIGH, st.sampled_from([-np.inf, LOW, LOW, -1e30, FLOAT_MIN, LOW - 1]))
VALUES = st.floats(-4, 4)


@settings(max_examples=80, deadline=None)
@drawn(
    a=numbers(1, ONCE, of=HIGH),
    b=numbers(ROWS, EACH, of=ANY),
    va=numbers(1, ONCE, 2, of=VALUES),
    vb=numbers(ROWS, EACH, 2, of=VALUES),
)
def test_relative_to_log_sum_exp(a: Array, b: Array, va: Array, vb: Array) -> None:
    """`softmax(a ++ b) V = t (softmax(a) V_a) + q V_b` with `q ++ t = softmax((b - l) ++ 0)`."""
    want = reference(a, b, va, vb)
    top = a.max()
    log_sum = top + np.log(np.exp(a - top).sum())
    joint = np.concatenate([b - log_sum, np.zeros((ROWS, 1))], 1)
    joint = np.exp(joint - joint.max(1, keepdims=True))
    joint /= joint.sum(1, keepdims=True)
    bracket = reference(a, np.zeros((1, 0)), va, np.zeros((1, 0, 2)))
    got = joint[:, -1:] * bracket + np.einsum("nk,nkd->nd", joint[:, :-1], vb)
    allowed = 1e-14 * max(100, float(np.abs(a).max()))
    np.testing.assert_allclose(got, want, rtol=0, atol=allowed)
    (ran,) = pooled(True).run(None, {"a": a, "b": b, "va": va, "vb": vb})
    np.testing.assert_allclose(ran, want, rtol=0, atol=allowed)


@settings(max_examples=120, deadline=None)
@drawn(
    a=numbers(1, ONCE, of=ANY),
    b=numbers(ROWS, EACH, of=ANY),
    va=numbers(1, ONCE, 2, of=VALUES),
    vb=numbers(ROWS, EACH, 2, of=VALUES),
)
def test_weighted_afterwards(a: Array, b: Array, va: Array, vb: Array) -> None:
    """`q ++ t = softmax(b ++ m)` over `1 + (s - 1) t`, where masks may leave scores of any size, or none at all."""
    want = reference(a, b, va, vb)
    floor = np.maximum(a.max(), np.finfo(np.float64).min)
    weights = np.exp(a - floor)
    total = weights.sum()
    joint = np.concatenate([b, np.full((ROWS, 1), a.max())], 1)
    with np.errstate(invalid="ignore"):
        joint = np.exp(joint - joint.max(1, keepdims=True))
    joint /= joint.sum(1, keepdims=True)
    norm = 1 + (total - 1) * joint[:, -1:]
    got = (joint[:, -1:] * (weights @ va[0]) + np.einsum("nk,nkd->nd", joint[:, :-1], vb)) / norm
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    (ran,) = pooled(False).run(None, {"a": a, "b": b, "va": va, "vb": vb})
    np.testing.assert_allclose(ran, want, rtol=0, atol=1e-12)
    assert np.array_equal(np.isnan(ran).all(1), np.isneginf(a).all() & np.isneginf(b).all(1))


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("seed", range(14))
def test_any_attention(seed: int, stacked: bool) -> None:
    """Random numbers of rows, widths, orders, layouts, scalings, masks and layers."""
    rng = np.random.default_rng(seed)
    users, items = (int(k) for k in rng.integers(1, 7, 2))
    layout = str(rng.choice([*LAYOUTS, "none"]))
    heads = 1 if layout == "none" else int(rng.choice([1, 2, 3]))
    scale = str(rng.choice(["", "query Mul", "key Div", "scores Mul", "scores Div"]))
    mask = str(rng.choice(["", "constant"] if layout == "merged" else ["", "constant", "add", "add both", "where"]))
    how = How(heads, layout, scale, bool(rng.integers(2)), mask, behind=str(rng.choice(["relu", "none"])))
    shuffled = None if rng.integers(2) else seed
    f = build(users, items, how, int(rng.integers(1, 3)), shuffled, width=6 * int(rng.integers(1, 3)), seed=seed)
    held(f.g, f.given, counts=counts(layout), interfaces=("same", "request"), stacked=stacked)


# --- structure -----------------------------------------------------------------------------------------------------


def test_each_block_once() -> None:
    """Scores and pooling among request-level rows, and projections of those, are made once per request."""
    users, items, d = 9, 2, 6
    f = build(users, items, How(1, "none", scale=""))
    result = held(f.g, f.given, interfaces=("same", "request"))
    before, after = result.report.before, result.report.after
    count = users + items
    assert sum(c.macs for c in before.values()) == N * (4 * count * d * d + 2 * count**2 * d + count * d * 2)
    assert after["request"].macs == 4 * users * d * d + 2 * users**2 * d
    mixed = 2 * (count**2 - users**2) * d
    assert after["candidate"].macs == N * (4 * items * d * d + mixed + count * d * 2)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_macs_with_heads(layout: str, heads: int) -> None:
    """Heads change nothing of that."""
    users, items, d = 7, 2, 6
    f = build(users, items, How(heads, layout), shuffled=3)
    _, result = made(f.g, f.given)
    after = result.report.after
    count = users + items
    assert after["request"].macs == 4 * users * d * d + 2 * users**2 * d
    assert after["candidate"].macs == N * (4 * items * d * d + 2 * (count**2 - users**2) * d + count * d * 2)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "mask"), [("rows", ""), ("rows", "add both"), ("merged", "")])
def test_heads_in_one_product(layout: str, mask: str) -> None:
    """Three heads in one product each make the same multiply-adds, and fewer products, than one by one."""
    f = build(7, 2, How(3, layout, mask=mask), shuffled=3 if layout == "rows" else None)
    model, apart = made(f.g, f.given)
    _, stacked = made(f.g, f.given, stacked=True)
    assert_same_scores(model, stacked, f.given, counts=(*counts(layout), 700), tolerance=5e-6)
    assert stacked.report.macs_after == apart.report.macs_after
    assert operators(stacked.model).count("MatMul") < operators(apart.model).count("MatMul")
    chosen = [{s.chosen for s in r.plan.sites if s.place.rule == "attention" and s.taken} for r in (apart, stacked)]
    assert chosen == [{"take"}, {"form 1"}]
    again = onnxrank.optimize(model, plan=stacked.plan, check=False)
    assert again.model.SerializeToString() == stacked.model.SerializeToString()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "apart"), [(2, True), (4, False)])
def test_narrow_heads_are_projected_together(heads: int, apart: bool, bias: bool) -> None:
    """A product of eight columns takes as long as one of sixteen: heads of so many are cut from one for all."""
    f = build(5, 2, How(heads, "rows", bias=bias), width=32)
    model, result = made(f.g, f.given)
    shape = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    read = [shape[i] for n in result.model.graph.node if n.op_type in ("MatMul", "Gemm") for i in n.input if i in shape]
    assert ((32, 32 // heads) in read) == apart
    assert_same_scores(model, result, f.given, counts=(*COUNTS, 700), tolerance=5e-6)


@pytest.mark.parametrize("mask", ["", "add both"])
@pytest.mark.parametrize("layout", ["rows", "first", "none"])
def test_no_keys_for_every_candidate(layout: str, mask: str) -> None:
    """No request-level keys, values or scores are brought to the rows of all candidates, nor joined with such."""
    n, users = 50, 11
    f = build(users, 2, How(1 if layout == "none" else 2, layout, mask=mask, behind="none"))
    _, result = made(f.g, f.given)
    new = feeds(f.given, n)[1]
    found = run(exposed(result.model), new) | new
    joins = [o for o in result.model.graph.node if o.op_type in ("Expand", "Concat", "Tile")]
    joins = [o for o in joins if n in found[o.output[0]].shape[:2]]
    assert joins
    for node in joins:
        once = [found[i] for i in node.input if i in found and n not in found[i].shape]
        # A number per query and head at most.
        assert all(data.size <= 2 * users for data in once if data.dtype.kind == "f"), node.name


@pytest.mark.parametrize("heads", [1, 2])
def test_request_level_queries_read_by_a_linear_map(heads: int) -> None:
    """`t (P_a V_a) W` behind the factor: the weights of the request-level keys are never made for all candidates."""
    n, users = 50, 11
    f = build(users, 1, How(heads, "rows", behind="none"))
    _, result = made(f.g, f.given)
    found = run(exposed(result.model), feeds(f.given, n)[1])
    for node in result.model.graph.node:
        if node.op_type == "Mul" and n in found[node.output[0]].shape:
            assert found[node.output[0]].shape[-1] <= f.width, node.output


# --- refusals ------------------------------------------------------------------------------------------------------


def squares(users: int, items: int, opset: int = 17) -> tuple[list[Given], Graph, str, str]:
    """Rows and their products."""
    given = [request("u", users, 4), candidate("c", items, 4)]
    g = Graph(opset)
    x = g.op("Concat", *(i.declare(g) for i in given), axis=1)
    z = g.op("MatMul", x, g.op("Transpose", x, perm=[0, 2, 1]))
    return given, g, x, g.op("Mul", z, g.const(0.125))


@pytest.mark.parametrize("count", [5, 40])
def test_levels_without_rows_and_columns(count: int) -> None:
    """Keys that are request-level for one query and candidate-level for the next; of few kinds each has its own way."""
    given = [request("a", count**2), candidate("b", count**2), candidate("v", count, 2)]
    g = Graph()
    a, b, v = (i.declare(g) for i in given)
    below = np.tril(np.ones((count, count), bool)).reshape(-1)
    chosen = np.arange(count**2) + np.where(below, 0, count**2)
    mixed = g.op("Gather", g.op("Concat", a, b, axis=1), g.ints(*chosen), axis=1)
    mixed = g.op("Reshape", mixed, g.ints(-1, count, count))
    y = g.op("MatMul", g.op("Softmax", mixed, axis=-1), v)
    g.output(g.op("MatMul", g.op("Flatten", y), g.const(np.ones((2 * count, 1)) / count)), ["N", 1])
    model = g.model()
    with forced():
        result = onnxrank.optimize(model, request=patterns(given), check=False)
    assert_same_scores(model, result, given, counts=COUNTS, tolerance=5e-6)
    refused = "attention Softmax: the keys that are request-level differ from query to query" in refusals(result)
    assert refused == (count == 40)
    assert ("Exp" in operators(result.model)) == (count == 5)


def test_over_several_axes() -> None:
    """The older form of Softmax, over queries and keys together, is left as it is."""
    given, g, x, z = squares(5, 2, 12)
    p = g.op("Softmax", z, axis=1)
    g.output(g.op("Flatten", g.op("MatMul", p, x)), ["N", 28])
    model = g.model()
    for divided in (False, True):
        with forced(divided):
            result = onnxrank.optimize(model, request=patterns(given), check=False)
        assert_same_scores(model, result, given, counts=COUNTS[1:], tolerance=5e-6)
        assert "Exp" not in operators(result.model)


@pytest.mark.parametrize("heads", [False, True])
def test_another_axis(heads: bool) -> None:
    """Softmax over an axis that is not the last: scores with the keys first."""
    given, g, x, z = squares(5, 2)
    p = g.op("Softmax", g.on_axes("Unsqueeze", z, [2]) if heads else z, axis=1)
    p = g.on_axes("Squeeze", p, [2]) if heads else p
    y = g.op("MatMul", g.op("Transpose", p, perm=[0, 2, 1]), x)
    g.output(g.op("MatMul", g.op("Flatten", y), g.const(np.ones((28, 2)) / 28)), ["N", 2])
    model = g.model()
    for divided in (False, True):
        with forced(divided):
            result = onnxrank.optimize(model, request=patterns(given))
        assert all(c.passed for c in result.report.checks)
        assert_same_scores(model, result, given, counts=COUNTS[1:], tolerance=5e-6)


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_operator_sets(opset: int) -> None:
    """The last axis by either form of Softmax, with what each operator set has for reductions."""
    given, g, x, z = squares(5, 2, opset)
    y = g.op("MatMul", g.op("Softmax", z, axis=2), x)
    g.output(g.op("MatMul", g.op("Flatten", y), g.const(np.ones((28, 2)) / 28)), ["N", 2])
    result = held(g, given)
    assert "Exp" in operators(result.model)


@pytest.mark.parametrize("by", ["number", "vector", "request"])
def test_form_by_what_scales(by: str) -> None:
    """Scores times constants stand for keys that are there; times anything computed, they may stand for a mask."""
    given, g, x, z = squares(5, 2)
    if by == "vector":
        z = g.op("Mul", z, g.const(np.linspace(0.1, 1, 7)))
    elif by == "request":
        given.append(request("m", 1, 1))
        z = g.op("Mul", z, g.op("Exp", given[-1].declare(g)))
    y = g.op("MatMul", g.op("Softmax", z, axis=-1), x)
    g.output(g.op("MatMul", g.op("Flatten", y), g.const(np.ones((28, 2)) / 28)), ["N", 2])
    result = held(g, given)
    assert operators(result.model).count("Exp") == (2 if by == "request" else 1)
    assert ("Log" in operators(result.model)) == (by != "request")


@pytest.mark.parametrize("also", [False, True])
def test_read_by_an_output(also: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that the caller reads are needed side by side."""
    monkeypatch.setattr(preparation, "MUCH", float("inf"))  # fields are not taken apart as a sequence is
    given, g, x, z = squares(5, 2)
    p = g.op("Softmax", z, axis=-1)
    g.output(p, ["N", 7, 7])
    if also:
        y = g.op("MatMul", p, x)
        g.output(g.op("MatMul", g.op("Flatten", y), g.const(np.ones((28, 2)) / 28)), ["N", 2])
    model = g.model()
    for divided in (False, True):
        with forced(divided):
            result = onnxrank.optimize(model, request=patterns(given), check=False)
        assert_same_scores(model, result, given, counts=COUNTS, tolerance=5e-6)
        assert "what reads the product needs its blocks side by side again" in refusals(result)
        assert "Exp" not in operators(result.model)


@pytest.mark.parametrize("layout", ["rows", "first"])
def test_left_out(layout: str) -> None:
    """Without the rule the scores are the same, and the softmax has all keys in one."""
    f = build(6, 2, How(2, layout, mask="add both"))
    model = f.g.model()
    with forced(False):
        plain = onnxrank.optimize(model, request=patterns(f.given), check=False, ignore=["attention"])
    _, result = made(f.g, f.given)
    assert "attention" not in rules(plain) and "Exp" not in operators(plain.model)
    assert_same_scores(model, plain, f.given, counts=counts(layout), tolerance=5e-6)
    assert_same_scores(model, result, f.given, counts=counts(layout), tolerance=5e-6)
    assert result.report.macs_after < plain.report.macs_after


@pytest.mark.parametrize(("users", "taken"), [(40, True), (2, False)])
def test_taken_where_it_pays(users: int, taken: bool) -> None:
    """The form that is predicted to be faster is taken, with or without the rule."""
    f = build(users, 2, How(2, "rows"), width=24)
    model = f.g.model()
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(model, request=patterns(f.given), check=False)
    assert ("Exp" in operators(result.model)) == taken
    assert_same_scores(model, result, f.given, counts=COUNTS, tolerance=5e-6)
