"""PReLU and Dice in other steps: the same scores, at any slopes, and where it does not pay not at all."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import numpy as np
import pytest
from helpers import Given, Graph, candidate, operators, optimised, request, rewritten, rules, run, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import ModelProto, TensorProto

import onnxrank
from onnxrank.passes import choosing

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


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, UNITS])
def test_slopes_that_nodes_compute_are_not_written_into_attributes(count: int) -> None:
    """These have fewer digits than what the check computes, which would take the site back."""
    g = Graph(17)
    r, c = g.input("r", ["N", UNITS]), g.input("c", ["N", UNITS])
    x = g.op("Add", g.op("MatMul", r, g.const(np.eye(UNITS))), c)
    slopes = g.op("Div", g.const(np.ones(count)), g.const(np.full(count, 3.0)))
    g.output(g.op("PRelu", x, slopes), ["N", UNITS])
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(g.model(), request=["r"], check="full", strict=True)
    assert taken(result) and "Max" in operators(result.model) and not result.report.retreats


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
    assert rules(result)["activation"] == 1
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
    options = {"ignore": ["activation"]} if how == "left out" else {}
    result = rewritten(g.model(), request=["r", "a"] if how == "given" else ["r"], **options)
    assert "PRelu" in operators(result.model) and "activation" not in rules(result)


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


# --- Dice ------------------------------------------------------------------------------------------------------------

ALPHAS = {
    "columns": np.linspace(-2.0, 2.0, UNITS).reshape(1, UNITS),
    "one number": np.array(0.25),
    "zeros": np.zeros(UNITS),
    "ones": np.ones(UNITS),
}


def dice(
    alpha: np.ndarray, how: str = "as defined", kind: int = TensorProto.FLOAT, given_as: str = "ids"
) -> tuple[Graph, list[Given]]:
    """A layer over what ids look up and Dice behind it, of numbers that no step rounds."""
    g, dtype = Graph(17), np.float64 if kind == TensorProto.DOUBLE else np.float32
    given_ = [request("u", 2, ids=9), candidate("c", ids=9), candidate("q", ids=9)]
    if given_as == "floats":
        given_[1] = candidate("c", UNITS)
    u, c, q = (i.declare(g) for i in given_)
    table = g.const(whole_numbers(9, UNITS, seed=4))
    if given_as != "floats":
        c = g.op("Gather", table, c, axis=0)
    u, q = g.op("Reshape", g.op("Gather", table, u, axis=0), g.ints(-1, 2 * UNITS)), g.op("Gather", table, q, axis=0)
    x = g.op("Add", g.op("MatMul", u, g.const(whole_numbers(2 * UNITS, UNITS, seed=1))), c)
    if given_as == "logarithms":
        x = g.op("Log", g.op("Add", g.op("Abs", x), g.const(1.0)))
    p = g.op("Mul", q, g.const(0.5))
    if kind != TensorProto.FLOAT:
        x, p = (g.op("Cast", t, to=kind) for t in (x, p))
    one, a = g.const(1.0, dtype), g.const(alpha, dtype)
    if how == "as defined":
        y = g.op("Add", g.op("Mul", g.op("Mul", a, g.op("Sub", one, p)), x), g.op("Mul", p, x))
    elif how == "slope last":
        y = g.op("Add", g.op("Mul", p, x), g.op("Mul", g.op("Mul", x, g.op("Sub", one, p)), a))
    elif how == "negative":
        y = g.op("Add", g.op("Mul", x, p), g.op("Mul", x, g.op("Mul", g.op("Add", g.op("Neg", p), one), a)))
    elif how == "residual":
        y = g.op("Add", g.op("Mul", x, g.op("Add", g.op("Mul", p, a), one)), x)
    elif how == "two tensors":
        y = g.op("Add", g.op("Mul", g.op("Mul", a, g.op("Sub", one, p)), x), g.op("Mul", g.op("Relu", p), x))
    elif how == "nothing in common":
        y = g.op("Add", g.op("Mul", g.op("Mul", a, g.op("Sub", one, p)), x), g.op("Mul", p, g.op("Relu", x)))
    else:
        rest = g.op("Sub", one, p)
        y = g.op("Add", g.op("Mul", g.op("Mul", a, rest), x), g.op("Mul", p, x))
        y = g.op("Mul", y, rest)
    g.output(g.op("Cast", y, to=1), ["N", UNITS])
    return g, given_


def taken(result: onnxrank.Result) -> bool:
    return any(s.place.rule == "activation" and s.taken for s in result.plan.sites)


def computed(result: onnxrank.Result) -> Counter[str]:
    """Operators of what is not constant."""
    graph = result.model.graph
    fixed = {t.name for t in graph.initializer}
    found: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type == "Constant" or fixed.issuperset(node.input):
            fixed.update(node.output)
        else:
            found[node.op_type] += 1
    return found


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("how", ["as defined", "slope last", "negative"])
def test_dice(how: str, alpha: str) -> None:
    """Three steps at most behind the sigmoid; whole numbers and halves, so that scores are the same to the last bit."""
    g, given_ = dice(ALPHAS[alpha] if alpha != "columns" else np.arange(UNITS) % 5 - 2.0, how)
    result = optimised(g, given_, counts=(0, 1, 2, 7, 333))
    assert taken(result)
    found = computed(result)
    assert found["Sub"] == 0 and found["Neg"] == 0
    assert found["Mul"] <= 3 and found["Mul"] + found["Add"] <= 5


@pytest.mark.parametrize("how", ["as defined", "slope last", "negative"])
def test_dice_of_any_slopes(how: str) -> None:
    g, given_ = dice(ALPHAS["columns"], how)
    assert taken(optimised(g, given_, counts=(1, 2, 90), tolerance=1e-5))


@pytest.mark.parametrize("how", ["two tensors", "nothing in common", "read"])
def test_other_sums_stay(how: str) -> None:
    g, given_ = dice(ALPHAS["columns"], how)
    result = optimised(g, given_, counts=(1, 2, 90), tolerance=1e-5)
    assert operators(result.model).count("Sub") == 1


def test_large_slopes_and_other_types_stay() -> None:
    """Where slopes are large, terms cancel."""
    for alpha, kind in ((np.full(UNITS, 20.0), TensorProto.FLOAT), (np.ones(UNITS), TensorProto.DOUBLE)):
        g, given_ = dice(alpha, kind=kind)
        assert not taken(optimised(g, given_, counts=(1, 2, 90), tolerance=1e-5))


@pytest.mark.parametrize("given_as", ["floats", "logarithms"])
def test_what_may_be_infinite_stays(given_as: str) -> None:
    """Where x is infinite and p is 1, Dice is no number, and the product is infinite."""
    g, given_ = dice(ALPHAS["columns"], given_as=given_as)
    assert not taken(optimised(g, given_, counts=(1, 2, 90), tolerance=1e-5))


def test_a_factor_and_the_tensor_itself() -> None:
    """A residual of a gate is one more for the gate."""
    g, given_ = dice(np.full(UNITS, 2.0), "residual")
    result = optimised(g, given_, counts=(1, 2, 90))
    assert taken(result) and computed(result)["Add"] <= 2


@pytest.mark.slow
def test_numbers_are_computed_in_the_precision_of_the_model() -> None:
    """`1 - a` is left to nodes: stored as float32, it would be another number where the check has more digits."""
    g, _ = dice(np.linspace(-2.0, 2.0, UNITS) / 3)
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(g.model(), request=["u"], check="full", strict=True)
    assert taken(result) and result.report.checks
