"""PReLU by other operators: the same entries to the last bit, at any slopes, and where it does not pay not at all."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from helpers import Graph, candidate, operators, optimised, request, rewritten, rules, run, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import ModelProto, TensorProto

UNITS = 24
SLOPES = {
    "one": np.float32([0.25]),
    "one above 1": np.float32([3.5]),
    "one below 0": np.float32([-0.5]),
    "one of 0": np.float32([0.0]),
    "alike": np.full(UNITS, 0.1, np.float32),
    "within": np.linspace(0.01, 1.0, UNITS, dtype=np.float32),
    "with 0": np.linspace(0.0, 1.0, UNITS, dtype=np.float32),
    "beyond": np.linspace(-2.0, 3.0, UNITS, dtype=np.float32),
}
FORMS = {"within": ["Max", "Mul"], "with 0": ["Add", "Min", "Mul", "Relu"], "beyond": ["Add", "Min", "Mul", "Relu"]}
LARGEST = float(np.finfo(np.float32).max)


def activated(slopes: np.ndarray, opset: int = 17, columns: int = UNITS) -> ModelProto:
    """Slopes on what comes in, so that nothing but they can change a bit."""
    g = Graph(opset)
    x, r = g.input("x", ["N", columns]), g.input("r", ["N", columns])
    g.output(g.op("PRelu", x, g.const(slopes)), ["N", columns])
    g.output(g.op("Relu", g.op("MatMul", r, g.const(np.eye(columns)))), ["N", columns])
    return g.model()


def made(slopes: np.ndarray, opset: int = 17) -> tuple[ModelProto, ModelProto]:
    model = activated(slopes, opset)
    return model, rewritten(model, request=["r"]).model


def same(model: ModelProto, other: ModelProto, x: np.ndarray) -> None:
    """Equal entries, infinite ones and what is no number included; of 0 the sign does not count."""
    r = np.ones((1, UNITS), np.float32)
    wanted = run(model, {"x": x, "r": r.repeat(len(x), 0)})
    got = run(other, {"x": x, "r": r})
    for want, have in zip(wanted.values(), got.values(), strict=True):
        np.testing.assert_array_equal(have, want)


PAIRS = {name: made(slopes) for name, slopes in SLOPES.items()}


@pytest.mark.parametrize("name", SLOPES)
def test_forms(name: str) -> None:
    found = Counter(operators(PAIRS[name][1]))
    assert not found["PRelu"]
    for op in FORMS.get(name, ["LeakyRelu"]):
        assert found[op] >= 1


@pytest.mark.parametrize("name", SLOPES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(x=hnp.arrays(np.float32, (3, UNITS), elements=st.floats(width=32, allow_subnormal=True)))
def test_identity(name: str, x: np.ndarray) -> None:
    """Of any entries at all."""
    same(*PAIRS[name], x)


@pytest.mark.parametrize("name", SLOPES)
def test_ends(name: str) -> None:
    """At the ends of the numbers, at widths that kernels take in several steps, and without candidates."""
    ends = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, LARGEST, -LARGEST, 1e-45, -1e-45, 1.2e-38, -1.2e-38, -1.0])
    for n in (0, 1, 2, 333):
        same(*PAIRS[name], np.resize(ends, (n + 1, UNITS))[:n])


@pytest.mark.parametrize("opset", [11, 13, 18])
def test_opsets(opset: int) -> None:
    for name in ("one", "within", "beyond"):
        model, other = made(SLOPES[name], opset)
        assert "PRelu" not in operators(other)
        same(model, other, np.linspace(-3, 3, 5 * UNITS, dtype=np.float32).reshape(5, UNITS))


@pytest.mark.parametrize("slope", [0.25, -0.5, 2.0])
def test_within_a_product(slope: float) -> None:
    """A layer takes one slope in; scores are those of the original."""
    g = Graph(17)
    given_ = [request("u", 6), candidate("c", 4)]
    u, c = (i.declare(g) for i in given_)
    weights = g.const(whole_numbers(10, 70, seed=1)), g.const(np.arange(70.0) - 30)
    h = g.op("Gemm", g.op("Concat", u, c, axis=1), *weights)
    g.output(g.op("PRelu", h, g.const([slope])), ["N", 70])
    result = optimised(g, given_, counts=(0, 1, 2, 7, 90))
    assert rules(result)["prelu"] == 1
    assert "LeakyRelu" in operators(result.model)


def test_slopes_of_channels_and_of_all_there_is() -> None:
    """Slopes may have fewer axes than what they are for, and axes of one entry."""
    for shape in [(5, 1), (5, 4), (1, 5, 4), (1, 1, 1)]:
        g = Graph(17)
        given_ = [candidate("c", 5, 4), request("u", 5, 4)]
        c, u = (i.declare(g) for i in given_)
        slopes = np.linspace(0.125, 2.0, int(np.prod(shape))).reshape(shape)
        g.output(g.op("PRelu", g.op("Add", c, u), g.const(slopes)), ["N", 5, 4])
        result = optimised(g, given_, counts=(0, 1, 2, 7, 90))
        assert "PRelu" not in operators(result.model)


@pytest.mark.parametrize("how", ["double", "sixteen bits", "infinite", "no number", "computed", "given", "left out"])
def test_left_alone(how: str) -> None:
    kind = {"double": TensorProto.DOUBLE, "sixteen bits": TensorProto.FLOAT16}.get(how, TensorProto.FLOAT)
    g = Graph(17)
    x, r = g.input("x", ["N", UNITS]), g.input("r", ["N", UNITS])
    slopes = {"infinite": np.inf, "no number": np.nan}.get(how, 0.25)
    if how == "computed":
        a = g.op("Sigmoid", r)
    elif how == "given":
        a = g.input("a", [1])
    else:
        a = g.op("Cast", g.const([slopes]), to=kind)
    y = g.op("PRelu", g.op("Cast", g.op("Add", x, r), to=kind), a)
    g.output(g.op("Cast", y, to=1), ["N", UNITS])
    options = {"ignore": ["prelu"]} if how == "left out" else {}
    result = rewritten(g.model(), request=["r", "a"] if how == "given" else ["r"], **options)
    assert "PRelu" in operators(result.model) and "prelu" not in rules(result)


def test_a_few_entries_are_not_worth_more_steps() -> None:
    """What is there once and is small stays, since more steps are to be launched; one step takes no longer."""
    for slopes, stays in ((SLOPES["beyond"], True), (SLOPES["one"], False)):
        g = Graph(17)
        given_ = [request("u", UNITS), candidate("c", UNITS)]
        u, c = (i.declare(g) for i in given_)
        once = g.op("PRelu", u, g.const(slopes))
        g.output(g.op("Mul", once, g.op("PRelu", c, g.const(slopes))), ["N", UNITS])
        result = optimised(g, given_, counts=(1, 7))
        assert operators(result.model).count("PRelu") == stays
