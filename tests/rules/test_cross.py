"""`cross`: cross layers that stay affine in the candidate on their request-level side."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
from helpers import (
    Given,
    Graph,
    assert_same_scores,
    candidate,
    exposed,
    optimised,
    patterns,
    request,
    rewritten,
    rules,
    run,
)

import onnxrank
from onnxrank.forms import Form
from onnxrank.passes import choosing

FORMS = ["affine", "plain"]


@contextmanager
def forced(form: str) -> Iterator[None]:
    """Takes the form with or without the rule, whatever it costs."""

    def seconds(self: Form, *_: object) -> float:
        return float(self.uses("cross") != (form == "affine"))

    with mock.patch.object(Form, "seconds", seconds):
        yield


class Cross:
    """Cross layers on [u | c], with weights from -1 to 1 so that float32 is exact at every depth."""

    def __init__(self, users: int, items: int, *, shuffled: bool = False, seed: int = 0, scale: float = 0) -> None:
        self.given: list[Given] = [request("u", users), candidate("c", items)]
        self.g, self.width = Graph(), users + items
        self.rng, self.scale = np.random.default_rng(seed), scale
        x = self.g.op("Concat", *(i.declare(self.g) for i in self.given), axis=1)
        if shuffled:
            order = np.random.default_rng(1).permutation(self.width)
            x = self.g.op("Gather", x, self.g.ints(*order), axis=1)
        self.x0 = x

    def weight(self, *shape: int) -> str:
        if self.scale:
            return self.g.const(self.rng.normal(0, self.scale, shape))
        return self.g.const(self.rng.integers(-1, 2, shape))

    def matmul(self, x: str) -> str:
        return self.g.op("Add", self.g.op("MatMul", x, self.weight(self.width, self.width)), self.weight(self.width))

    def no_bias(self, x: str) -> str:
        return self.g.op("MatMul", x, self.weight(self.width, self.width))

    def gemm(self, x: str) -> str:
        return self.g.op("Gemm", x, self.weight(self.width, self.width), self.weight(self.width), transB=1)

    def left(self, x: str) -> str:
        y = self.g.op("MatMul", self.weight(self.width, self.width), x)
        return self.g.op("Add", y, self.weight(self.width, 1))

    def low_rank(self, x: str) -> str:
        y = self.g.op("MatMul", x, self.weight(self.width, 2))
        return self.g.op("Add", self.g.op("MatMul", y, self.weight(2, self.width)), self.weight(self.width))

    def vector(self, x: str) -> str:
        """The first version of the network: one column."""
        return self.g.op("MatMul", x, self.weight(self.width, 1))

    def layers(self, kind: str, depth: int, swapped: bool = False) -> str:
        """`x0 * (x W + b) + x`, `depth` times."""
        g, x0 = self.g, self.x0
        if kind == "left":
            x0 = g.on_axes("Unsqueeze", x0, [2])
        x = x0
        for _ in range(depth):
            y = getattr(self, kind)(x)
            x = g.op("Add", x, g.op("Mul", y, x0)) if swapped else g.op("Add", g.op("Mul", x0, y), x)
        return g.on_axes("Squeeze", x, [2]) if kind == "left" else x

    def head(self, x: str, width: int, kind: str) -> None:
        y = self.g.op("MatMul", x, self.weight(width, 1 if kind == "linear" else 4))
        if kind == "deep":
            y = self.g.op("Relu", self.g.op("Add", y, self.weight(4)))
        self.g.output(y, ["N", 1 if kind == "linear" else 4])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", ["linear", "deep"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["matmul", "no_bias", "gemm", "left"])
def test_stack(kind: str, depth: int, head: str, form: str) -> None:
    """One to four layers, in every way of writing them, before a linear head and before a layer with ReLU."""
    made = Cross(5, 3, shuffled=depth % 2 == 0, seed=depth)
    made.head(made.layers(kind, depth, swapped=depth == 3), 8, head)
    with forced(form):
        result = optimised(made.g, made.given)
    if form == "plain":
        assert rules(result) == {"fc": 1}
        assert result.report.macs_after < result.report.macs_before
    else:
        assert rules(result).get("fc", 0) > 1  # the affine form divides more than the first layer


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_request_side_is_never_made(depth: int) -> None:
    """No product gives the request's columns for every candidate; with a linear head that is narrow one may be wide."""
    users, items, n = 40, 4, 8192
    made = Cross(users, items)
    made.head(made.layers("matmul", depth), users + items, "linear")
    with forced("affine"):
        affine = optimised(made.g, made.given, counts=(1, 2, 5), candidates=n)
    with forced("plain"):
        plain = optimised(made.g, made.given, counts=(1, 2, 5), candidates=n)
    whole = users + items
    assert plain.report.after["candidate"].macs == n * (items * whole + (depth - 1) * whole**2 + whole)
    assert affine.report.after["candidate"].macs < n * depth * (depth + 1) * items * (items + 2)
    new = {"u": np.ones((1, users), np.float32), "c": np.ones((50, items), np.float32)}
    seen = run(exposed(affine.model), new)
    assert max(v.size for v in seen.values() if v.shape[:1] == (50,)) < 50 * users


def test_one_layer_before_a_head() -> None:
    """`x1 w`: the candidate's columns, the request's as one vector made once, and those of the head."""
    users, items, n = 20, 4, 512
    made = Cross(users, items)
    made.head(made.layers("gemm", 1), users + items, "linear")
    with forced("affine"):
        result = optimised(made.g, made.given, candidates=n)
    assert result.report.after["candidate"].macs == n * (items * items + 2 * items)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_beside_a_deep_part(depth: int, form: str) -> None:
    """The parallel network: the cross output and an MLP on x0 side by side into the head."""
    made = Cross(9, 3, shuffled=True)
    deep = made.g.op("Relu", made.g.op("Gemm", made.x0, made.weight(12, 5), made.weight(5)))
    x = made.g.op("Concat", made.layers("gemm", depth), deep, axis=1)
    made.head(x, 17, "linear")
    with forced(form):
        result = optimised(made.g, made.given)
    assert result.report.macs_after < result.report.macs_before


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["last", "between", "output", "softmax"])
def test_also_read_as_it_is(where: str, form: str) -> None:
    """A layer's result that a ReLU, a softmax or the caller reads is made, and so is right."""
    made = Cross(7, 3)
    g = made.g
    first = made.layers("matmul", 1)
    y = g.op("Add", g.op("Mul", made.x0, made.matmul(first)), first)
    made.head(y, 10, "linear")
    read = first if where == "between" else y
    if where == "output":
        g.output(read, ["N", 10])
    else:
        g.output(g.op("Softmax", read, axis=-1) if where == "softmax" else g.op("Relu", read), ["N", 10])
    with forced(form):
        result = optimised(g, made.given, tolerance=1e-6 if where == "softmax" else 0.0)
    if where != "between":
        assert "cross" not in rules(result)


def test_only_nonlinear_readers() -> None:
    """Layers that end in a ReLU are not affine where that reads them."""
    made = Cross(7, 3)
    made.g.output(made.g.op("Relu", made.layers("matmul", 1)), ["N", 10])
    assert "cross" not in rules(optimised(made.g, made.given))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("users", "items"), [(1, 1), (1, 6), (6, 1), (2, 2)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_narrow(depth: int, users: int, items: int, form: str) -> None:
    """One column on either side."""
    for head in ("linear", "deep"):
        made = Cross(users, items)
        made.head(made.layers("gemm", depth), users + items, head)
        with forced(form):
            optimised(made.g, made.given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["low_rank", "vector"])
def test_factored(kind: str, depth: int, form: str) -> None:
    """`U (V x)`, and the vector of the network's first version."""
    for head in ("linear", "deep"):
        made = Cross(6, 3, shuffled=True)
        made.head(made.layers(kind, depth), 9, head)
        with forced(form):
            result = optimised(made.g, made.given)
        assert "fc" in rules(result)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", ["request", "candidate", "both"])
def test_gated(gate: str, form: str) -> None:
    """Gated cross layers: `x0 * (x W + b) * g + x` with a gate that is not linear in x."""
    for depth in (1, 2):
        made = Cross(5, 3)
        g, x = made.g, made.x0
        for _ in range(depth):
            source = {"request": "u", "candidate": "c", "both": x}[gate]
            count = {"request": 5, "candidate": 3, "both": 8}[gate]
            opened = g.op("Clip", g.op("MatMul", source, made.weight(count, 8)), g.const(-1), g.const(1))
            x = g.op("Add", g.op("Mul", g.op("Mul", made.x0, made.matmul(x)), opened), x)
        made.head(x, 8, "linear")
        with forced(form):
            optimised(g, made.given)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(10))
def test_any_stack(seed: int, form: str) -> None:
    """Random widths, depths, ways of writing, heads, mixtures of two stacks: exact to the bit."""
    rng = np.random.default_rng(seed)
    users, items = (int(k) for k in rng.integers(1, 6, 2))
    made = Cross(users, items, shuffled=bool(seed % 2), seed=seed)
    kinds = ["matmul", "no_bias", "gemm", "left", "low_rank"]
    stacks = [
        made.layers(str(rng.choice(kinds)), int(rng.integers(1, 4)), swapped=bool(rng.integers(2))) for _ in range(2)
    ]
    joined = made.g.op("Concat", *stacks, axis=1) if seed % 3 else made.g.op("Add", *stacks)
    made.head(joined, (users + items) * (2 if seed % 3 else 1), str(rng.choice(["linear", "deep"])))
    with forced(form):
        optimised(made.g, made.given, candidates=int(rng.choice([2, 512, 50000])))


@pytest.mark.parametrize("head", ["linear", "deep"])
def test_choice_by_candidates(head: str) -> None:
    """A large part once per request pays with many candidates only; each file gives right scores at any number."""
    made = Cross(90, 10, scale=0.05)
    made.head(made.layers("gemm", 3), 100, head)
    model = made.g.model()
    few = rewritten(model, request=patterns(made.given), candidates=8)
    many = rewritten(model, request=patterns(made.given), candidates=8192)
    assert few.changed and many.changed
    assert "cross" not in rules(few) and rules(few) == {"fc": 1}
    assert "cross would not pay at N = 8, so it was left out" in few.report.notes
    assert len(set(rules(many)) & {"cross", "fold"}) > 0
    assert many.report.after["request"].macs > few.report.after["request"].macs
    assert many.report.after["candidate"].macs / 8192 < few.report.after["candidate"].macs / 8 / 2
    for result in (few, many):
        assert_same_scores(model, result, made.given, counts=(0, 1, 2, 5, 64, 300), tolerance=2e-5)


def test_wide_layers() -> None:
    """Wide candidate-level halves are not joined, and the head takes the maps that the last layer needs anyway."""
    made = Cross(80, 40, scale=0.05)
    made.head(made.layers("gemm", 3), 120, "linear")
    model = made.g.model()
    with forced("affine"):
        result = rewritten(model, request=patterns(made.given), candidates=8192)
    assert_same_scores(model, result, made.given, tolerance=2e-5)
    nodes, shapes = result.model.graph.node, {t.name: list(t.dims) for t in result.model.graph.initializer}
    assert not any(n.op_type == "Concat" for n in nodes)
    # W (u * h) for the head's weights h: of the last layer, not of those before it.
    assert sum(n.op_type == "MatMul" and shapes.get(n.input[0]) == [80, 80] for n in nodes) == 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("head", ["linear", "deep"])
@pytest.mark.parametrize(("users", "items"), [(20, 8), (70, 35)])
def test_float64_agrees(users: int, items: int, head: str, form: str) -> None:
    """With any numbers, the algebra agrees to 1e-10 in float64 and float32 is no worse than the original."""
    made = Cross(users, items, scale=0.2 * (28 / (users + items)) ** 0.5, shuffled=True)
    made.head(made.layers("matmul", 3), users + items, head)
    with forced(form), mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(made.g.model(), request=patterns(made.given), candidates=4096, check=True)
    assert result.changed and result.report.checks
    assert all(c.passed for c in result.report.checks)
    assert not any("float64" in note for note in result.report.notes)


def test_left_out() -> None:
    """`ignore` gives the plain form."""
    made = Cross(40, 4)
    made.head(made.layers("gemm", 2), 44, "linear")
    with forced("affine"):
        result = optimised(made.g, made.given, ignore=["cross"], candidates=8192)
    assert rules(result) == {"fc": 1}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("users, items", [(16, 4), pytest.param(24, 24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts", [[1, 1, 2], [2, 2], [None, None, 2, 2], [2, None, 2, None], [0, 0, 2]])
def test_joined_twice(parts: list[int | None], users: int, items: int, form: str) -> None:
    """A layer's result, or the candidate itself, that is joined twice counts twice in the layer behind."""
    made = Cross(users, items)
    layers = [made.x0]
    for _ in range(2):
        layers.append(made.g.op("Add", made.g.op("Mul", made.x0, made.matmul(layers[-1])), layers[-1]))
    x = made.g.op("Concat", *("c" if p is None else layers[p] for p in parts), axis=1)
    made.head(x, sum(items if p is None else users + items for p in parts), "deep")
    with forced(form):
        optimised(made.g, made.given, counts=(1, 5), tolerance=1e-6)
