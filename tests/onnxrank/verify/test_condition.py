"""What the original itself cannot keep is no fault of the other model, and nothing else is excused."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import FLOAT, Graph
from onnx import ModelProto

from onnxrank.verify import Options, Report, compare, verify
from onnxrank.verify.condition import FACTOR

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 16)).astype(np.float32)
V = RNG.standard_normal((16, 1)).astype(np.float32)


def logarithmic(split: bool, power: float = 8.0, error: float = 0.0) -> ModelProto:
    """A logarithmic network, `exp(log|x| W)`: the rounding of a sum becomes a factor."""
    g = Graph(17)
    u, i = g.input("user", [1 if split else "N", 4]), g.input("item", ["N", 4])
    weights = (power * W).astype(np.float32)

    def logs(x: str) -> str:
        return g.op("Log", g.op("Add", g.op("Abs", x), g.const(1e-6)))

    if split:
        made = g.op("Add", g.op("MatMul", logs(i), g.const(weights[4:])), g.op("MatMul", logs(u), g.const(weights[:4])))
    else:
        made = g.op("MatMul", g.op("Concat", logs(u), logs(i), axis=1), g.const(weights))
    y = g.op("MatMul", g.op("Exp", made), g.const(V))
    if error:
        y = g.op("Mul", y, g.const(1 + error))
    g.output(y, ["N", 1])
    g.nodes[-1].output[0] = g.outputs[0].name = "score"
    return g.model()


def cancelling(split: bool, offset: float, error: float = 0.0) -> ModelProto:
    """Differences of large numbers, taken pair by pair; or sums of each kind, and then their difference."""
    g = Graph(17)
    u, i = g.input("user", [1 if split else "N", 16]), g.input("item", ["N", 16])
    u, i = (g.op("Add", g.op("Abs", x), g.const(offset)) for x in (u, i))
    if split:
        parts = [g.op("MatMul", x, g.const(np.full((16, 1), sign))) for x, sign in ((u, 1.0), (i, -1.0 - error))]
        g.output(g.op("Add", *parts), ["N", 1])
    else:
        pairs = g.op("Concat", g.op("Unsqueeze", u, g.ints(2)), g.op("Unsqueeze", i, g.ints(2)), axis=2)
        signs = np.tile(np.array([[1.0], [-1.0]]), (16, 1))
        g.output(g.op("MatMul", g.op("Reshape", pairs, g.ints(-1, 32)), g.const(signs)), ["N", 1])
    g.nodes[-1].output[0] = g.outputs[0].name = "score"
    return g.model()


def odds(written_out: bool, error: float = 0.0) -> ModelProto:
    """Odds from a sigmoid, as an operator or as its steps: far out the runtime's float64 sigmoid is off by 3e-10."""
    g = Graph(17)
    u, i = g.input("user", [1 if written_out else "N", 4]), g.input("item", ["N", 4])
    x = g.op("Neg", g.op("Abs", g.op("Mul", g.op("Mul", u, i), g.const(8.0))))
    back = g.op("Exp", g.op("Neg", x))
    steps = ("Reciprocal", g.op("Add", back, g.const(1 + error))) if written_out else ("Sigmoid", x)
    gate = g.op(*steps)
    g.output(g.op("MatMul", g.op("Mul", back, gate), g.const(W[:4, :1])), ["N", 1])
    g.nodes[-1].output[0] = g.outputs[0].name = "score"
    return g.model()


def repeated(split: bool, error: float = 0.0, ranked: bool = False) -> ModelProto:
    """The sum of an entry over a length: onnxruntime adds a single row up in another order than several."""
    g = Graph(17)
    u, hist = g.input("user", [1 if split else "N", 4]), g.input("hist", [1 if split else "N", "L"])
    i = g.input("item", ["N", 4])
    shape = g.op("Concat", g.op("Shape", hist), g.ints(4), axis=0)
    many = g.op(
        "Expand", g.op("Unsqueeze", g.op("Add", g.op("Mul", u, g.const(1e-4)), g.const(-1.8338)), g.ints(1)), shape
    )
    total = g.op("ReduceSum", many, g.ints(1), keepdims=0)
    if error:
        total = g.op("Mul", total, g.const(1 + error))
    g.output(g.op("Add", total, g.op("ReduceMax", i, axes=[0], keepdims=1) if ranked else i), ["N", 4])
    g.nodes[-1].output[0] = g.outputs[0].name = "score"
    return g.model()


def check(a: ModelProto, b: ModelProto, level: str = "standard") -> Report:
    return verify(a, b, Options(request=["user"], level=level))


@pytest.mark.parametrize("power", [1.0, 8.0])
def test_exponents_and_logarithms(power: float) -> None:
    found = check(logarithmic(False, power), logarithmic(True, power))
    assert found.passed, found.errors


@pytest.mark.parametrize("level", ["standard", "full"])
def test_what_was_allowed_is_told(level: str) -> None:
    found = check(cancelling(False, 1e6), cancelling(True, 1e6), level)
    assert found.passed, found.errors
    told = [f for f in found.findings if f.kind == "conditioning"]
    assert told and all(f.severity == "note" and "last place" in f.message for f in told)


def test_errors_are_still_found() -> None:
    """Far larger ones than conditioning explains, at any power."""
    assert not check(cancelling(False, 1e6), cancelling(True, 1e6, error=1e-5)).passed
    for power in (0.25, 1.0):
        assert not check(logarithmic(False, power), logarithmic(True, power, error=1e-2)).passed


def test_sigmoid_is_not_exact_in_float64() -> None:
    found = check(odds(False), odds(True))
    assert found.passed, found.errors
    assert not check(odds(False), odds(True, error=5e-4)).passed


def summed(split: bool, error: float = 0.0, ranked: bool = False) -> Report:
    """How `repeated` compares at a length of 1,000 and two candidates, as the quick level has them."""
    roles = Options(request=["user", "hist"], level="quick", lengths={"L": (1, 1000)})
    return verify(repeated(False, ranked=ranked), repeated(split, error, ranked), roles)


def test_a_row_is_added_up_otherwise_than_several() -> None:
    found = summed(True)
    assert found.passed, found.errors
    assert [f for f in found.findings if f.kind == "conditioning" and "alone" in f.message]
    assert not summed(False, error=1e-4).passed and not summed(True, error=1e-4).passed


def test_scores_that_hang_on_other_candidates_are_no_excuse() -> None:
    """Alone they are others, in float64 too."""
    assert not summed(True, error=1e-4, ranked=True).passed


def test_limits_of_the_user_stay() -> None:
    found = verify(
        logarithmic(False, 8.0), logarithmic(True, 8.0), Options(request=["user"], level="quick", rtol={None: 0.0})
    )
    assert not found.passed


def test_nudged() -> None:
    x = np.array([0.0, 1.0, -2.0, np.inf, np.nan, 1e-30], np.float32)
    y = compare.nudged(x, np.random.default_rng(0))
    assert y.dtype == np.float32 and y[0] == 0 and np.isinf(y[3]) and np.isnan(y[4])
    assert (compare.ulps(x[[1, 2, 5]], y[[1, 2, 5]]) == 1).all()
    assert FACTOR > 1 and FLOAT
