"""`history`: a mask that hides the appended candidate keeps the history request-level through all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import onnx
import pytest
from helpers import (
    Feed,
    Given,
    Graph,
    candidate,
    exposed,
    feeds,
    patterns,
    refusals,
    request,
    rewritten,
    rules,
    run,
    transformation,
)
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from onnxrank.rules.history import Masks

import onnxrank
from onnxrank import runtime
from onnxrank.forms import Form
from onnxrank.passes import choosing
from onnxrank.values import extents
from onnxrank.verify.truth import Truth

L, D = 5, 4
T = L + 1
N = 53
EXACT = 1e-12
REFUSED = "history Softmax: the mask does not prove"
INF, FAR, LEAST = float("-inf"), -1e9, float(np.finfo(np.float32).min)

Apply = Callable[[str], str]
"""Puts a mask, made before, on scores."""


def later(rows: int = T, columns: int = T) -> NDArray[np.bool_]:
    """What a causal mask hides."""
    return np.triu(np.ones((rows, columns), bool), 1)


# --- models --------------------------------------------------------------------------------------------------------


class Encoder:
    """A transformer over `[history; candidate]`.

    Args:
        layers: Number of layers.
        heads: Heads of each; 0 for one head without an axis of its own.
        merged: Whether heads lie in the batch axis, as `nn.MultiheadAttention` exports them.
        norm: `pre`, `post` or no LayerNorm; with one there is a feed-forward part, too.
        scale: Whether scores are divided before the mask, after it, or the query is.
        length: Positions of the history.
        dtype: Type of inputs and weights.
    """

    def __init__(
        self,
        *,
        layers: int = 1,
        heads: int = 0,
        merged: bool = False,
        norm: str = "",
        scale: str = "before",
        length: int = L,
        dtype: Any = np.float32,
        extra: Sequence[Given] = (),
    ) -> None:
        self.layers, self.heads, self.merged, self.norm, self.scale = layers, heads, merged, norm, scale
        self.length, self.dtype = length, dtype
        self.rng = np.random.default_rng(layers + 8 * heads + length)
        self.given = [request("h", length, D), candidate("c", 1, D), request("ids", length, ids=3), *extra]
        self.g = Graph()
        kind = int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
        self.names = [
            self.g.input(i.name, ["N", *i.shape], kind) if i.ids is None else i.declare(self.g) for i in self.given
        ]
        self.x = self.g.op("Concat", *self.names[:2], axis=1)
        self.ids = self.names[2]

    def weight(self, *shape: int) -> str:
        return self.g.const(self.rng.normal(0, shape[0] ** -0.5, shape), self.dtype)

    def linear(self, x: str, rows: int, columns: int) -> str:
        return self.g.op("Add", self.g.op("MatMul", x, self.weight(rows, columns)), self.weight(columns))

    def layer_norm(self, x: str) -> str:
        scale = self.g.const(self.rng.uniform(0.5, 2, D), self.dtype)
        return self.g.op("LayerNormalization", x, scale, self.weight(D), axis=-1)

    def split(self, x: str) -> str:
        g, heads = self.g, max(self.heads, 1)
        if not self.heads:
            return x
        if self.merged:  # [T, N * heads, d] between
            x = g.op("Reshape", g.op("Transpose", x, perm=[1, 0, 2]), g.ints(self.length + 1, -1, D // heads))
            return g.op("Transpose", x, perm=[1, 0, 2])
        x = g.op("Reshape", x, g.ints(-1, self.length + 1, heads, D // heads))
        return g.op("Transpose", x, perm=[0, 2, 1, 3])

    def join(self, x: str) -> str:
        g = self.g
        if not self.heads:
            return x
        if self.merged:
            x = g.op("Reshape", g.op("Transpose", x, perm=[1, 0, 2]), g.ints(self.length + 1, -1, D))
            return g.op("Transpose", x, perm=[1, 0, 2])
        return g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1, 3]), g.ints(-1, self.length + 1, D))

    def attention(self, x: str, mask: Apply | None, after: Apply | None = None) -> str:
        g = self.g
        q, k, v = (self.split(self.linear(x, D, D)) for _ in range(3))
        root = g.const((D // max(self.heads, 1)) ** 0.5, self.dtype)
        if self.scale == "query":
            q = g.op("Div", q, root)
        perm = [0, 1, 3, 2] if self.heads and not self.merged else [0, 2, 1]
        scores = g.op("MatMul", q, g.op("Transpose", k, perm=perm))
        if self.scale == "before":
            scores = g.op("Div", scores, root)
        if mask is not None:
            scores = mask(scores)
        if self.scale == "after":
            scores = g.op("Mul", scores, g.const(0.5, self.dtype))
        weights = g.op("Softmax", scores, axis=-1)
        if after is not None:
            weights = after(weights)
        return self.linear(self.join(g.op("MatMul", weights, v)), D, D)

    def encoded(self, mask: Apply | None, after: Apply | None = None) -> str:
        """All layers: `[N, T, D]`."""
        g, x = self.g, self.x
        for _ in range(self.layers):
            y = g.op("Add", x, self.attention(self.layer_norm(x) if self.norm == "pre" else x, mask, after))
            if self.norm:
                y = self.layer_norm(y) if self.norm == "post" else y
                z = self.layer_norm(y) if self.norm == "pre" else y
                z = self.linear(g.op("Relu", self.linear(z, D, 2 * D)), 2 * D, D)
                y = g.op("Add", y, z)
                y = self.layer_norm(y) if self.norm == "post" else y
            x = y
        return x

    def model(self, mask: Apply | None, out: str = "last", after: Apply | None = None) -> ModelProto:
        g, x = self.g, self.encoded(mask, after)
        kind = int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))
        if out in ("last", "both"):
            last = g.op("Gather", x, g.const(self.length, np.int64), axis=1)
            g.output(self.linear(last, D, 2), ["N", 2], kind)
        if out in ("all", "both"):
            g.output(x, ["N", self.length + 1, D], kind)
        return g.model()


def batches(given: Sequence[Given]) -> Iterator[tuple[str, Feed, Feed]]:
    """Inputs for both models: any padding, none, at the front, at the end, and nothing else."""
    (length,) = next(i.shape for i in given if i.name == "ids")
    paddings: dict[str, Any] = {"any": None, "none": np.ones(length), "all": np.zeros(length)}
    paddings |= {"front": np.arange(length) >= length // 2, "end": np.arange(length) < length // 2}
    for k, (what, ids) in enumerate(paddings.items()):
        for n in (1, 2, 5) if ids is None else (3,):
            old, new = feeds(given, n, seed=k)
            if ids is not None:
                old["ids"], new["ids"] = np.repeat(ids[None], n, 0).astype(np.int64), ids[None].astype(np.int64)
            yield f"{what} at N = {n}", old, new


def difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Largest; infinite where shapes differ, or one is NaN and the other is not."""
    if a.shape != b.shape or not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    return float(np.abs(a - b)[~np.isnan(a)].max(initial=0))


def assert_agrees(model: ModelProto, result: onnxrank.Result, given: Sequence[Given], share: float = EXACT) -> None:
    """In float64, to a share of the output's scale, whatever is padded; NaN where the original has NaN."""
    names = [o.name for o in model.graph.output]
    before, after = Truth(model), Truth(result.model)
    for what, old, new in batches(given):
        want = before.run(old, names)
        got = after.run(new if result.changed and result.report.interface == "request" else old, names)
        for name in names:
            scale = np.abs(want[name][np.isfinite(want[name])]).max(initial=1e-3)
            assert difference(want[name], got[name]) <= share * scale, f"{name}, padding {what}"


@contextmanager
def forced() -> Iterator[None]:
    """Takes the form with most of the rules, whatever it costs: small models are cheapest as they are."""

    def seconds(self: Form, *_: object) -> float:
        return -float(self.uses("history")) - float(self.uses("attention"))

    with mock.patch.object(Form, "seconds", seconds):
        yield


def made(
    encoder: Encoder, mask: Apply | None, *, out: str = "last", after: Apply | None = None, **options: Any
) -> onnxrank.Result:
    """Optimised, and held against the original."""
    model = encoder.model(mask, out, after)
    with forced():
        result = rewritten(model, request=patterns(encoder.given), **options)
    assert_agrees(model, result, encoder.given)
    return result


def per_candidate(result: onnxrank.Result, e: Encoder) -> dict[str, int]:
    """Entries per candidate of all that is made for every candidate."""
    seen = run(exposed(result.model), feeds(e.given, N)[1])
    rows = {name: data.shape for name, data in seen.items() if any(n and n % N == 0 for n in data.shape)}
    return {name: prod(shape) // N for name, shape in rows.items()}


def assert_isolated(result: onnxrank.Result, e: Encoder) -> None:
    """The rule applied, and nothing as large as the history is made for every candidate."""
    assert rules(result)["history"] == e.layers - 1, refusals(result)
    assert max(per_candidate(result, e).values()) < e.length * D


# --- masks ---------------------------------------------------------------------------------------------------------


def add(e: Encoder, mask: str) -> Apply:
    return lambda scores: e.g.op("Add", scores, mask)


def fill(e: Encoder, hidden: str, number: float = INF) -> Apply:
    return lambda scores: e.g.op("Where", hidden, e.g.const(number, e.dtype), scores)


def keep(e: Encoder, seen: str, number: float = INF) -> Apply:
    return lambda scores: e.g.op("Where", seen, scores, e.g.const(number, e.dtype))


def causal(e: Encoder, number: float = INF) -> str:
    """A mask to be added."""
    return e.g.const(np.where(later(e.length + 1, e.length + 1), number, 0), e.dtype)


def hides(e: Encoder) -> str:
    """A causal mask of truth values."""
    return e.g.const(later(e.length + 1, e.length + 1), bool)


def over_heads(e: Encoder, x: str) -> str:
    """`[N, T]` to what broadcasts to scores."""
    g = e.g
    if not e.heads:
        return g.on_axes("Unsqueeze", x, [1])
    x = g.on_axes("Unsqueeze", x, [1, 2])
    if e.merged:
        x = g.op("Reshape", g.op("Expand", x, g.ints(1, e.heads, 1, 1)), g.ints(-1, 1, e.length + 1))
    return x


def empty(e: Encoder) -> str:
    """Which keys are padding; the candidate never is."""
    g = e.g
    rows = g.op("Slice", g.op("Shape", e.ids), g.ints(0), g.ints(1))
    ones = g.op("ConstantOfShape", g.op("Concat", rows, g.ints(1), axis=0),
                value=onnx.helper.make_tensor("value", TensorProto.INT64, [1], [1]))  # fmt: skip
    ids = g.op("Concat", e.ids, ones, axis=1)
    return over_heads(e, g.op("Equal", ids, g.const(0, np.int64)))


def padding(e: Encoder, number: float) -> str:
    """A mask to be added, of padding: ones for the candidate beside the history's."""
    g = e.g
    seen = g.op("Cast", g.op("Not", empty(e)), to=int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(e.dtype))))
    return g.op("Mul", g.op("Sub", g.const(1, e.dtype), seen), g.const(number, e.dtype))


def itself(e: Encoder) -> str:
    """Padding, but for each row's own key."""
    return e.g.op("And", empty(e), e.g.const(~np.eye(e.length + 1, dtype=bool), bool))


def positions(e: Encoder, kind: str) -> str:
    """`[T, T]`: what a causal mask hides, made from the tensors' shape."""
    g = e.g
    length = g.op("Gather", g.op("Shape", e.x), g.const(1, np.int64))
    if kind == "range":
        at = g.op("Range", g.const(0, np.int64), length, g.const(1, np.int64))
        return g.op("Greater", g.on_axes("Unsqueeze", at, [0]), g.on_axes("Unsqueeze", at, [1]))
    square = g.op("Concat", *(g.on_axes("Unsqueeze", length, [0]) for _ in range(2)), axis=0)
    ones = g.op("ConstantOfShape", square, value=onnx.helper.make_tensor("value", TensorProto.FLOAT, [1], [1]))
    if kind == "trilu":
        return g.op("Cast", g.op("Trilu", ones, g.const(1, np.int64), upper=1), to=int(TensorProto.BOOL))
    counts = [g.op("CumSum", ones, g.const(axis, np.int64)) for axis in (0, 1)]
    return g.op("Less", *counts)


FORMS: dict[str, Callable[[Encoder], Apply]] = {
    "added": lambda e: add(e, causal(e)),
    "added, finite": lambda e: add(e, causal(e, FAR)),
    "added, least": lambda e: add(e, causal(e, LEAST)),
    "taken away": lambda e: lambda x: e.g.op("Sub", x, causal(e, 1e9)),
    "filled": lambda e: fill(e, hides(e)),
    "filled, finite": lambda e: fill(e, hides(e), FAR),
    "filled, least": lambda e: fill(e, hides(e), LEAST),
    "kept": lambda e: keep(e, e.g.op("Not", hides(e))),
    "or": lambda e: fill(e, e.g.op("Or", hides(e), empty(e))),
    "and": lambda e: keep(e, e.g.op("And", e.g.op("Not", empty(e)), e.g.op("Not", hides(e)))),
    "not or": lambda e: keep(e, e.g.op("Not", e.g.op("Or", empty(e), hides(e)))),
    "or, least, sees itself": lambda e: fill(e, e.g.op("Or", hides(e), itself(e)), LEAST),
    "where": lambda e: add(e, e.g.op("Where", e.g.op("Or", hides(e), empty(e)), e.g.const(INF), e.g.const(0))),
    "where on where": lambda e: add(
        e, e.g.op("Where", hides(e), e.g.const(INF), e.g.op("Where", empty(e), e.g.const(FAR), e.g.const(0)))
    ),
    "one minus": lambda e: add(
        e,
        e.g.op(
            "Mul",
            e.g.op("Sub", e.g.const(1), e.g.op("Cast", e.g.op("Not", e.g.op("Or", hides(e), itself(e))), to=1)),
            e.g.const(FAR),
        ),
    ),
    "minus": lambda e: add(e, e.g.op("Sub", causal(e), e.g.op("Mul", e.g.op("Cast", itself(e), to=1), e.g.const(1e9)))),
    "two sums": lambda e: lambda x: e.g.op("Add", e.g.op("Add", x, padding(e, FAR)), causal(e)),
    "sum of masks": lambda e: add(e, e.g.op("Add", causal(e), padding(e, -1e4))),
    "minimum": lambda e: add(e, e.g.op("Min", padding(e, FAR), causal(e))),
    "maximum": lambda e: add(e, e.g.op("Neg", e.g.op("Max", e.g.op("Neg", causal(e)), e.g.op("Neg", padding(e, FAR))))),
    "turned": lambda e: fill(e, e.g.op("Transpose", e.g.const(later(e.length + 1, e.length + 1).T, bool), perm=[1, 0])),
    "range": lambda e: fill(e, positions(e, "range")),
    "trilu": lambda e: fill(e, e.g.op("Or", positions(e, "trilu"), empty(e))),
    "cumsum": lambda e: keep(e, e.g.op("Not", positions(e, "cumsum"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_masks(form: str) -> None:
    """Two layers: the first is request-level for all rows of the history."""
    e = Encoder(layers=2, heads=2 * (list(FORMS).index(form) % 2))
    assert_isolated(made(e, FORMS[form](e)), e)


MORE_FORMS: dict[str, Callable[[Encoder], Apply]] = {
    "product is 0": lambda e: fill(
        e, e.g.op("Equal", e.g.op("Mul", seen_keys(e), e.g.const(~later(), np.int64)), e.g.const(0, np.int64))
    ),
    "sliced": lambda e: fill(
        e, e.g.op("Slice", e.g.op("Or", hides(e), empty(e)), e.g.ints(0), e.g.ints(T), e.g.ints(1))
    ),
    "halved": lambda e: add(e, e.g.op("Add", causal(e), e.g.op("Div", padding(e, FAR), e.g.const(2)))),
    "length of at least 1": lambda e: fill(e, e.g.op("Or", hides(e), beyond(e, 1)), FAR),
}


def beyond(e: Encoder, least: int) -> str:
    """Which keys lie beyond the history's length, which is counted and cut from below; the candidate's never does."""
    g = e.g
    ids = g.op("Cast", g.op("Not", g.op("Equal", e.ids, g.const(0, np.int64))), to=int(TensorProto.INT64))
    length = g.op("Clip", g.on_axes("ReduceSum", ids, [1], keepdims=1), g.const(least, np.int64))
    at = np.arange(e.length + 1)
    inside = g.op("Less", g.const(at, np.int64), length)
    return over_heads(e, g.op("And", g.op("Not", inside), g.const(at < e.length, bool)))


def seen_keys(e: Encoder) -> str:
    return e.g.op("Cast", e.g.op("Not", empty(e)), to=int(TensorProto.INT64))


@pytest.mark.parametrize("form", MORE_FORMS)
def test_more_forms_of_masks(form: str) -> None:
    """More ways to write the same masks."""
    e = Encoder(layers=2)
    assert_isolated(made(e, MORE_FORMS[form](e)), e)


# --- transformers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["before", "after", "query"])
@pytest.mark.parametrize("form", ["or", "two sums"])
def test_scale(form: str, scale: str) -> None:
    """A mask before and after scaling, and scaled queries."""
    e = Encoder(layers=2, heads=2, scale=scale)
    assert_isolated(made(e, FORMS[form](e)), e)


@pytest.mark.parametrize("form", ["added", "or"])
def test_heads_in_the_batch_axis(form: str) -> None:
    """Heads merged with the candidates."""
    e = Encoder(layers=2, heads=2, merged=True)
    result = made(e, FORMS[form](e))
    if "history" in rules(result):
        assert_isolated(result, e)
    else:
        assert "merged rows" in refusals(result)


@pytest.mark.parametrize(("layers", "heads", "norm"), [(1, 2, "pre"), (2, 0, "post"), (3, 1, ""), (3, 2, "pre")])
@pytest.mark.parametrize("interface", ["same", pytest.param("request", marks=pytest.mark.slow)])
def test_layers(layers: int, heads: int, norm: str, interface: str) -> None:
    """One to three layers with LayerNorm and feed-forward, before or behind the residual."""
    e = Encoder(layers=layers, heads=heads, norm=norm)
    result = made(e, FORMS["or"](e), interface=interface)
    if interface == "request" and layers > 1:
        assert_isolated(result, e)
    elif layers == 1:
        assert "history" not in rules(result)  # only the candidate's row is read


@pytest.mark.parametrize("layers", [1, 2])
def test_all_rows_are_read(layers: int) -> None:
    """Where the history's rows are outputs, too, they are made once, then repeated."""
    e = Encoder(layers=layers, heads=2, norm="pre")
    result = made(e, FORMS["or"](e), out="both")
    assert rules(result)["history"] == layers
    # The output itself, and the history repeated for it.
    assert sum(size >= e.length * D for size in per_candidate(result, e).values()) <= 2


@pytest.mark.slow
def test_work() -> None:
    """Of the layers but the last the history's part is once per request; per candidate there is one row."""
    length = 8
    for layers in (1, 2, 3):
        e = Encoder(layers=layers, heads=2, length=length)
        result = made(e, FORMS["or"](e), candidates=N)
        tokens, square = length + 1, D * D
        assert result.report.macs_before == N * (layers * (4 * tokens * square + 2 * tokens**2 * D) + 2 * D)
        full = 4 * length * square + 2 * length**2 * D
        last = 2 * length * square  # keys and values alone
        assert result.report.after["request"].macs == (layers - 1) * full + last
        alone = 2 * D  # a query by its own key, and its weight by its own value, are no products of matrices
        each = layers * (4 * square + 2 * tokens * D - alone) + 2 * D
        assert result.report.after["candidate"].macs == N * each


@pytest.mark.slow
def test_left_out() -> None:
    """`ignore` leaves the first layer as it is, for every candidate."""
    e = Encoder(layers=2)
    result = made(e, FORMS["or"](e), ignore=["history"])
    assert "history" not in rules(result)
    assert max(per_candidate(result, e).values()) >= L * D


@pytest.mark.slow
def test_float32() -> None:
    """The check passes, as it is and in float64."""
    e = Encoder(layers=2, heads=2, norm="pre", length=12)
    model = e.model(FORMS["or, least, sees itself"](e))
    with forced(), mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(model, request=patterns(e.given), check=True)
    assert "history" in rules(result)
    assert result.report.checks and all(c.passed for c in result.report.checks)
    assert not any("float64" in note for note in result.report.notes)


# --- rows without a key --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("out", ["last", "both"])
def test_rows_of_nan(out: str, layers: int) -> None:
    """Padding at the front under minus infinity: the first rows are NaN, with one layer they alone."""
    e = Encoder(layers=layers, heads=2)
    model = e.model(FORMS["or"](e), out)
    with forced():
        result = rewritten(model, request=patterns(e.given))
    assert ("history" in rules(result)) == (layers > 1 or out == "both")
    assert_agrees(model, result, e.given)
    old = next(old for what, old, _ in batches(e.given) if what.startswith("front"))
    scores = list(run(model, old).values())
    if layers == 2:
        assert all(np.isnan(s).all() for s in scores)
    else:
        assert np.isfinite(scores[0]).all()
        assert out == "last" or (np.isnan(scores[1]).any() and not np.isnan(scores[1]).all())


def test_nan_made_zero() -> None:
    """Weights of rows without a key set to zero behind the softmax, as exporters write attention with a mask."""
    e = Encoder(layers=2, heads=2)

    def zeros(weights: str) -> str:
        return e.g.op("Where", e.g.op("IsNaN", weights), e.g.const(0), weights)

    assert_isolated(made(e, FORMS["or"](e), after=zeros), e)


# --- masks that do not prove it ------------------------------------------------------------------------------------

UNPROVEN: dict[str, Callable[[Encoder], Apply]] = {
    "both finite": lambda e: lambda x: e.g.op("Add", e.g.op("Add", x, padding(e, FAR)), causal(e, FAR)),
    "both finite, filled": lambda e: fill(e, e.g.op("Or", hides(e), empty(e)), FAR),
    "one minus": lambda e: add(
        e,
        e.g.op(
            "Mul",
            e.g.op("Sub", e.g.const(1), e.g.op("Cast", e.g.op("Not", e.g.op("Or", hides(e), empty(e))), to=1)),
            e.g.const(FAR),
        ),
    ),
    "both least": lambda e: lambda x: fill(e, hides(e), LEAST)(fill(e, empty(e), LEAST)(x)),
    "infinite padding": lambda e: lambda x: fill(e, empty(e))(add(e, causal(e, FAR))(x)),
    "finite on infinite": lambda e: lambda x: fill(e, hides(e), FAR)(fill(e, empty(e))(x)),
    "too near": lambda e: add(e, causal(e, -1e4)),
    "length of 0": lambda e: fill(e, e.g.op("Or", hides(e), beyond(e, 0)), FAR),
    "infinite padding added": lambda e: add(
        e, e.g.op("Add", causal(e, FAR), e.g.op("Where", empty(e), e.g.const(INF), e.g.const(0)))
    ),
}


@pytest.mark.parametrize(
    "form", [f if k % 3 == 0 else pytest.param(f, marks=pytest.mark.slow) for k, f in enumerate(UNPROVEN)]
)
def test_unproven(form: str) -> None:
    """All keys of a row may be masked alike: then softmax spreads over the candidate's, too.

    Such rows are outputs here: as keys they are padding, which nobody sees.
    """
    e = Encoder(layers=2, heads=2)
    result = made(e, UNPROVEN[form](e), out="both")
    assert "history" not in rules(result)
    assert REFUSED in refusals(result)


@pytest.mark.parametrize("interface", ["same", "request"])
@pytest.mark.parametrize("norm", ["", "pre"])
def test_no_mask(norm: str, interface: str) -> None:
    """Every row sees the candidate."""
    e = Encoder(layers=2, heads=2, norm=norm)
    result = made(e, None, interface=interface)
    assert "history" not in rules(result) and "attention" in rules(result)
    assert "history" not in refusals(result)


@pytest.mark.parametrize("number", [INF, FAR])
def test_padding_alone(number: float) -> None:
    """Padding that hides nothing of the candidate."""
    e = Encoder(layers=2, heads=2)
    assert "history" not in rules(made(e, add(e, padding(e, number))))


@pytest.mark.parametrize("kind", ["float", "bool", "filled", "per candidate"])
def test_mask_of_the_caller(kind: str) -> None:
    """A mask that is an input may be anything."""
    shape = (T, T)
    mask = candidate("mask", *shape) if kind == "per candidate" else request("mask", *shape)
    if kind in ("bool", "filled"):
        mask = request("mask", *shape, ids=2)
    e = Encoder(layers=2, extra=[mask])
    if kind in ("bool", "filled"):
        hidden = e.g.op("Cast", e.names[3], to=int(TensorProto.BOOL))
        apply = fill(e, hidden) if kind == "filled" else keep(e, hidden, FAR)
    else:
        apply = add(e, e.g.op("Mul", e.names[3], e.g.const(1e9)))
    result = made(e, apply)
    assert "history" not in rules(result)
    # Scores that a mask makes candidate-level in all places have nothing to gain.
    assert (REFUSED in refusals(result)) == (kind != "per candidate")


@pytest.mark.parametrize("seeing", [[1], [0, 3], [4], [0, 1, 2, 3]])
@pytest.mark.parametrize("layers", [1, 2])
def test_hidden_from_some_rows(layers: int, seeing: list[int]) -> None:
    """Rows that see the candidate are candidate-level, and so is what sees them."""
    e = Encoder(layers=layers, heads=2)
    hidden = later(T, T)
    hidden[seeing, L] = False
    result = made(e, fill(e, e.g.op("Or", e.g.const(hidden, bool), empty(e))), out="both")
    assert "history" in rules(result)


def test_several_tokens_of_the_candidate() -> None:
    """More than one token at the end; they see each other."""
    e = Encoder(layers=2, heads=2, extra=[candidate("more", 2, D)])
    e.x = e.g.op("Concat", e.x, e.names[3], axis=1)
    e.length += 2
    hidden = later(T + 2, T + 2)
    hidden[L:, L:] = False
    result = made(e, fill(e, e.g.const(hidden, bool)))
    assert rules(result)["history"] == 1
    assert max(per_candidate(result, e).values()) <= 2 * 3 * (T + 2)  # scores of three queries


@pytest.mark.parametrize("number", [INF, FAR])
def test_mask_across_candidates(number: float) -> None:
    """A mask whose rows belong to other candidates than they did before a reshape."""
    e = Encoder(layers=2)
    g = e.g
    rows = g.op("Slice", g.op("Shape", e.ids), g.ints(0), g.ints(1))
    table = np.where(later(), number, 0)[:, None]
    mask = g.op("Expand", g.const(table), g.op("Concat", g.ints(T), rows, g.ints(T), axis=0))
    made(e, add(e, g.op("Reshape", mask, g.ints(-1, T, T))))


@pytest.mark.slow
def test_candidate_first() -> None:
    """The candidate in front of the history, and in the middle of it."""
    for place in (0, 2):
        e = Encoder(layers=2, heads=2)
        order = np.insert(np.arange(L), place, L)
        e.x = e.g.op("Gather", e.x, e.g.ints(*order), axis=1)
        hidden = np.zeros((T, T), bool)
        hidden[:, place] = True
        hidden[place, place] = False
        result = made(e, add(e, e.g.const(np.where(hidden, FAR, 0))), out="all")
        assert rules(result)["history"] == 2


def added_product(e: Encoder) -> Apply:
    other = e.g.op("MatMul", e.x, e.g.op("Transpose", e.x, perm=[0, 2, 1]))
    return lambda scores: e.g.op("Add", e.g.op("Add", scores, causal(e, FAR)), other)


def scaled_by_scores(e: Encoder) -> Apply:
    return lambda scores: e.g.op("Mul", add(e, causal(e, FAR))(scores), e.g.op("Relu", scores))


def scores_as_condition(e: Encoder) -> Apply:
    """Keys whose score is not 0 count alike."""
    return lambda scores: e.g.op("Where", e.g.op("Cast", scores, to=9), e.g.const(0), e.g.const(INF))


@pytest.mark.parametrize(
    "mask",
    [
        added_product,
        scaled_by_scores,
        scores_as_condition,
    ],
)
def test_products_are_no_masks(mask: Callable[[Encoder], Apply]) -> None:
    """What a product gives is not known, whatever is done to it."""
    e = Encoder(layers=2)
    assert "history" not in rules(made(e, mask(e)))


def by_truth(e: Encoder, number: float = 1e9) -> str:
    """A mask of padding to be added, as truth values: which keys are padding, the candidate's perhaps as well."""
    g = e.g
    ids = g.op("Concat", e.ids, e.names[3], axis=1)
    pads = g.op("Cast", g.on_axes("Unsqueeze", g.op("Equal", ids, g.const(0, np.int64)), [1]), to=1)
    return g.op("Cast", g.op("Mul", pads, g.const(number)), to=9)


@pytest.mark.parametrize("finite", [False, True])
@pytest.mark.parametrize(
    "number",
    [
        1e9,
        FAR,
    ],
)
def test_numbers_as_truth(number: float, finite: bool) -> None:
    """Casts to truth values: only 0 is false."""
    e = Encoder(layers=2, extra=[candidate("item", 1, ids=2)])
    if finite:  # rows of padding alone see the candidate
        pads = by_truth(e, number)
        mask = keep(e, e.g.op("Not", pads), FAR)
        result = made(e, lambda x: fill(e, hides(e), FAR)(mask(x)), out="both")
    else:  # padding alone is seen
        result = made(e, keep(e, by_truth(e, number)))
    assert "history" not in rules(result)


def test_whole_numbers() -> None:
    """Casts to whole numbers cut what is behind the point."""
    e = Encoder(layers=2, extra=[candidate("item", 1, ids=2)])
    g = e.g
    share = g.op("Sub", g.op("Mul", g.op("Cast", e.names[3], to=1), g.const(0.5)), g.const(0.75))  # -0.75, -0.25
    number = g.op("Mul", g.op("Cast", g.op("Cast", share, to=6), to=1), g.const(1e9))  # 0
    mask = g.op("Concat", g.op("Mul", g.op("Cast", e.ids, to=1), g.const(0)), number, axis=1)
    made(e, add(e, g.on_axes("Unsqueeze", mask, [1])))


@pytest.mark.parametrize(
    "operands",
    [1, 2, 3],
)
@pytest.mark.parametrize("op", ["Max", "Min"])
def test_variadic(op: str, operands: int) -> None:
    """Min and Max take any number of operands."""
    e = Encoder(layers=2)
    g = e.g
    if op == "Max":  # the candidate is seen
        parts = [g.op("Add", causal(e), padding(e, FAR)), causal(e), g.op("Where", empty(e), g.const(INF), g.const(0))]
    else:  # of a row whose keys are all padding nothing is seen for sure
        own = g.op("Where", itself(e), g.const(FAR), causal(e, FAR))
        parts = [own, g.const(np.zeros((T, T))), padding(e, FAR)]
    result = made(e, add(e, g.op(op, *parts[:operands])), out="both")
    assert ("history" in rules(result)) == (operands < 3)


def test_beyond_the_precision() -> None:
    """A million below a key is nothing where the key's own mask is far beyond."""
    e = Encoder(layers=2)
    everything = e.g.op("Where", empty(e), e.g.const(-1e15), e.g.const(-1e15))
    model = e.model(lambda x: e.g.op("Add", e.g.op("Add", x, everything), causal(e, -4e6)))
    with forced():
        result = rewritten(model, request=patterns(e.given))
    for what, old, new in batches(e.given):
        want, got = (next(iter(run(m, f).values())) for m, f in ((model, old), (result.model, new)))
        assert difference(want, got) <= 1e-5 * np.abs(want).max(), what


@pytest.mark.parametrize(("number", "proven"), [(-1e4, True), (-3e4, True), (-5e3, False)])
def test_float16(number: float, proven: bool) -> None:
    """Sixteen bits have no room for a million: ten thousand is enough there."""
    e = Encoder(layers=2, heads=2, dtype=np.float16)
    result = made(e, add(e, causal(e, number)))
    assert ("history" in rules(result)) == proven
    assert (REFUSED in refusals(result)) != proven


@pytest.mark.slow
@pytest.mark.parametrize(("number", "proven"), [(-1e4, False), (-999999.0, False), (-1e6, True)])
def test_gap(number: float, proven: bool) -> None:
    """A million in float32."""
    e = Encoder(layers=2, heads=2)
    assert ("history" in rules(made(e, add(e, causal(e, number))))) == proven
    e = Encoder(layers=2, scale="after")  # half of it is left
    assert ("history" in rules(made(e, add(e, causal(e, 2 * number))))) == proven


# --- intervals -----------------------------------------------------------------------------------------------------


NUMBERS = st.lists(st.sampled_from([0, 1, -1, 0.5, -4, FAR, INF]), min_size=3, max_size=5)


def grow(draw: st.DrawFn, g: Graph, ids: str, truths: list[str], numbers: list[str], size: int) -> None:
    """Adds random steps to tensors of truth values and of numbers that broadcast to `[N, size, size]`."""
    count = g.op("Slice", g.op("Shape", ids), g.ints(0), g.ints(1))
    whole = g.op("Concat", count, g.ints(size, size), axis=0)
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from("tttnnnnwwcmm"))
        pool = draw(st.sampled_from([truths, numbers])) if kind == "m" else truths if kind == "t" else numbers
        a, b = (draw(st.sampled_from(pool)) for _ in "ab")
        if kind in "tn":
            op = draw(
                st.sampled_from(["And", "Or", "Not"] if kind == "t" else ["Add", "Sub", "Mul", "Min", "Max", "Neg"])
            )
            pool.append(g.op(op, a) if op in ("Not", "Neg") else g.op(op, a, b))
        elif kind == "w":
            pool.append(g.op("Where", draw(st.sampled_from(truths)), a, b))
        elif kind == "c":
            pool.append(g.op("Cast", draw(st.sampled_from(truths)), to=int(TensorProto.FLOAT)))
        else:
            a, b = (g.op("Expand", x, whole) for x in (a, b))
            how = draw(st.sampled_from(["Transpose", "Reshape", "Concat"]))
            if how == "Concat":
                axis, cut = draw(st.sampled_from([1, 2])), draw(st.integers(1, size - 1))
                parts = [
                    g.op("Slice", x, g.ints(i), g.ints(j), g.ints(axis)) for x, i, j in ((a, 0, cut), (b, cut, size))
                ]
                a = g.op("Concat", *parts, axis=axis)
            else:
                a = g.op("Transpose", a, perm=[0, 2, 1])
            if how == "Reshape":
                a = g.op("Reshape", g.op("Reshape", a, g.ints(-1, size * size)), g.ints(-1, size, size))
            pool.append(a)


@st.composite
def programs(draw: st.DrawFn) -> tuple[Graph, list[Given], list[str]]:
    """A graph, its inputs, and the tensors of truth values and of numbers in it."""
    size, g = 3, Graph()
    given = [request("ids", size, ids=3), candidate("item", 1, ids=2), request("x", size)]
    ids, item, x = (i.declare(g) for i in given)
    square = np.array(draw(st.lists(st.booleans(), min_size=size * size, max_size=size * size))).reshape(size, size)
    truths = [g.const(square, bool), g.const(later(size, size), bool)]
    truths += [g.op("Equal", g.on_axes("Unsqueeze", i, [1]), g.const(0, np.int64)) for i in (ids, item)]
    numbers = [g.const(v) for v in draw(NUMBERS)]
    numbers += [g.const(np.where(square, FAR, 0)), g.const(np.where(square, 0, INF)), g.on_axes("Unsqueeze", x, [1])]
    grow(draw, g, ids, truths, numbers, size)
    total = g.op("Add", g.op("Cast", truths[-1], to=int(TensorProto.FLOAT)), numbers[-1])
    g.output(g.op("Add", total, g.on_axes("Unsqueeze", x, [1])), None)
    return g, given, truths + numbers


@pytest.mark.slow
@hypothesis.settings(max_examples=100, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(programs())
def test_intervals_hold(made: tuple[Graph, list[Given], list[str]]) -> None:
    """No entry of a mask that is a number is ever outside what is said of it."""
    g, inputs, names = made
    model = runtime.retype(g.model(), TensorProto.DOUBLE)  # as exact as the intervals
    finished = transformation(model, request=patterns(inputs))
    masks, opened = Masks(finished.rw), exposed(model)
    for seed in range(4):
        old = feeds(inputs, 3, seed)[0]
        seen = run(opened, {**old, "x": old["x"].astype(np.float64)})
        for name in set(names) & set(seen) & finished.rw.values.keys():  # what no output depends on is not there
            low, high = masks.of(name)
            np.broadcast_shapes(low.shape, high.shape, extents(finished.rw.values[name].dims))
            data = seen[name].astype(np.float64)
            unknown = np.isnan(low) | np.isnan(high) | ((low == -np.inf) & (high == np.inf)) | np.isnan(data)
            assert (unknown | ((data >= low) & (data <= high))).all(), name


@st.composite
def masked(draw: st.DrawFn) -> tuple[Encoder, ModelProto]:
    """An encoder under a random mask."""
    length = 2
    e = Encoder(layers=2, length=length, extra=[candidate("item", 1, ids=2)])
    g, size = e.g, length + 1
    square = np.array(draw(st.lists(st.booleans(), min_size=size * size, max_size=size * size))).reshape(size, size)
    keys = g.on_axes("Unsqueeze", g.op("Concat", e.ids, e.names[3], axis=1), [1])
    truths = [g.const(square, bool), hides(e), g.op("Equal", keys, g.const(0, np.int64)), empty(e), hides(e)]
    numbers = [g.const(v) for v in draw(NUMBERS)]
    numbers += [causal(e), causal(e, FAR), g.const(np.where(square, FAR, 0))]
    grow(draw, g, e.ids, truths, numbers, size)
    how = draw(st.sampled_from(["add", "fill", "both"]))

    def apply(scores: str) -> str:
        scores = scores if how == "fill" else add(e, numbers[-1])(scores)
        return scores if how == "add" else fill(e, truths[-1], FAR)(scores)

    return e, e.model(apply, "both")


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(masked())
def test_any_mask(made: tuple[Encoder, ModelProto]) -> None:
    """Scores are the original's under any mask; not where only double precision tells -1e9 from -1e9 + 1."""
    e, model = made
    truth, names = Truth(model), [o.name for o in model.graph.output]
    for _, old, _ in batches(e.given):
        exact, rounded = truth.run(old, names), run(model, old)
        hypothesis.assume(all(difference(exact[n], rounded[n]) < 1e-3 for n in names))
    with forced():
        result = rewritten(model, request=patterns(e.given))
    # Scores beside -1e9 have seven digits left.
    assert_agrees(model, result, e.given, 1e-6)
