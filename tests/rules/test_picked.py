"""Rows that candidates pick, among the columns of a product: multiplied before they are picked."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Given, Graph, candidate, operators, optimised, request, rules, whole_numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxrank import Result

PICKED, COUNTS = 4, (0, 1, 2, 5, 40)


def inputs(length: int | str = 9, width: int = 32) -> list[Given]:
    least = 3 if length == "L" else int(length)
    return [
        request("h", length, width),
        request("u", 1, width),
        candidate("q", 1, width),
        candidate("i", PICKED, 1, ids=least),
        candidate("j", PICKED, 1, ids=least),
    ]


class Search:
    """A graph with a candidate's query and rows that it picks of a history, at two lists of positions."""

    def __init__(self, length: int | str = 9, width: int = 32) -> None:
        self.g, self.width, self.given = Graph(17), width, inputs(length, width)
        for one in self.given:
            one.declare(self.g)
        self.q = self.g.op("Expand", "q", self.g.ints(1, PICKED, 1))
        self.k, self.other = (
            self.g.op("GatherElements", "h", self.g.op("Expand", i, self.g.ints(1, 1, width)), axis=1) for i in "ij"
        )

    def columns(self, *names: str) -> str:
        """Parts side by side: `q`, `k`, `k2`, a constant per place, what the user has, and two of them with a sign."""
        return self.g.op("Concat", *(self.part(name) for name in names), axis=2)

    def part(self, name: str) -> str:
        if len(name) == 3:
            kind = {"-": "Sub", "+": "Add", "*": "Mul"}[name[1]]
            return self.g.op(kind, self.part(name[0]), self.part(name[2]))
        place = self.g.const(whole_numbers(1, PICKED, self.width, seed=7)) if name == "c" else ""
        return {"q": self.q, "k": self.k, "o": self.other, "u": "u", "c": place}[name]

    def layer(self, x: str, columns: int, out: int = 32, flat: bool = False) -> str:
        """A layer behind columns."""
        g = self.g
        x = g.op("Reshape", x, g.ints(-1, columns)) if flat else x
        bias = g.const(whole_numbers(out, seed=2))
        made = g.op("Relu", g.op("Add", g.op("MatMul", x, g.const(whole_numbers(columns, out))), bias))
        return g.op("Reshape", made, g.ints(-1, PICKED, out)) if flat else made

    def result(self, **options: object) -> Result:
        """What the graph becomes; scores are held against those of the original. All inputs are read."""
        read = [i.name for i in self.given if not any(i.name in n.input for n in self.g.nodes)]
        for name in read:
            self.g.output(self.g.op("Cast", name, to=1), None)
        more = any("L" in i.shape for i in self.given)
        lengths = [{"L": 3}, {"L": 50}] if more else [{}]
        return optimised(self.g, self.given, counts=COUNTS, lengths=lengths, **options)  # type: ignore[arg-type]


FOUR = ("q", "k", "q-k", "q*k")


@pytest.mark.parametrize("length", [9, "L"])
@pytest.mark.parametrize("flat", [False, True])
def test_four_parts(length: int | str, flat: bool) -> None:
    """Two picks: of the history for `q * k`, and of what its two parts of the layer give."""
    s = Search(length)
    s.g.output(s.layer(s.columns(*FOUR), 4 * s.width, flat=flat), None)
    result = s.result()
    found = operators(result.model)
    assert found.count("Gather") == 2 and "Sub" not in found


def test_few_candidates() -> None:
    """For two that pick few of many rows it takes longer: the difference is made of what was picked."""
    s = Search(500)
    s.g.output(s.layer(s.columns(*FOUR), 4 * s.width), None)
    found = operators(s.result(candidates=2).model)
    assert found.count("Gather") == 1 and found.count("Sub") == 1 and "Neg" not in found


@pytest.mark.parametrize("names", [("k-q", "k"), ("k+c", "q"), ("q+k",), ("q+k", "q-k"), ("k*u", "k", "q")])
def test_sums(names: tuple[str, ...]) -> None:
    """Nothing is picked but what the layer gives."""
    s = Search()
    s.g.output(s.layer(s.columns(*names) if len(names) > 1 else s.part(*names), len(names) * s.width), None)
    result = s.result()
    assert operators(result.model).count("Gather") == 1 and "Sub" not in operators(result.model)


def test_beside_a_whole_tensor() -> None:
    s = Search()
    s.g.output(s.layer(s.columns("k", "q*k"), 2 * s.width), None)
    result = s.result()
    found = operators(result.model)
    assert found.count("Gather") == 2


def test_two_lists_of_positions() -> None:
    s = Search()
    s.g.output(s.layer(s.columns("k", "o", "k-o"), 3 * s.width), None)
    result = s.result()
    assert operators(result.model).count("Gather") == 2


def test_other_readers() -> None:
    """What is also read as it is, is made."""
    s = Search()
    x = s.columns(*FOUR)
    s.g.output(s.layer(x, 4 * s.width), None)
    s.g.output(s.g.op("Tanh", x), None)
    s.result(tolerance=1e-6)


@pytest.mark.parametrize("kind", ["rows of candidates", "normalised", "rows of entries"])
def test_what_is_not_picked(kind: str) -> None:
    s = Search()
    if kind == "rows of candidates":
        s.given.append(candidate("r", 9, s.width))
        s.given[-1].declare(s.g)
        s.k = s.g.op("GatherElements", "r", s.g.op("Expand", "i", s.g.ints(1, 1, s.width)), axis=1)
    if kind == "rows of entries":
        s.k = s.g.op("Transpose", s.g.op("Reshape", s.k, s.g.ints(-1, s.width, PICKED)), perm=[0, 2, 1])
    x = s.columns(*FOUR)
    if kind == "normalised":
        x = s.g.op("Softmax", x, axis=2)
    s.g.output(s.layer(x, 4 * s.width), None)
    result = s.result(tolerance=1e-6)
    assert rules(result).get("picks", 0) < 2


@st.composite
def operands(draw: st.DrawFn) -> tuple[Search, list[str], bool]:
    """Parts of all kinds, in any order, before a layer; sometimes as rows of all candidates."""
    one = st.sampled_from("qkouc")
    two = st.tuples(one, st.sampled_from("+-*"), one).map("".join)
    names = draw(st.lists(st.one_of(one, two), min_size=2, max_size=5))
    names = [n for n in names if set(n) & set("qko")] or ["k", "q"]
    length = draw(st.sampled_from([3, 9, "L"]))
    return Search(length, draw(st.sampled_from([1, 3, 8]))), names, draw(st.booleans())


def held(made: tuple[Search, list[str], bool]) -> None:
    s, names, flat = made
    # Concat does not broadcast what is narrower.
    parts = [s.g.op("Expand", s.part(n), s.g.op("Shape", s.k)) for n in names]
    x = s.g.op("Concat", *parts, axis=2) if len(parts) > 1 else parts[0]
    s.g.output(s.layer(x, len(parts) * s.width, flat=flat), None)
    s.result(candidates=int(np.random.default_rng(len(names)).choice([2, 600])))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(operands())
def test_operands(made: tuple[Search, list[str], bool]) -> None:
    held(made)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(operands())
def test_many_operands(made: tuple[Search, list[str], bool]) -> None:
    held(made)
