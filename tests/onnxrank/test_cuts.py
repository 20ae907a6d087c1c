"""Constants cut to the length of a request: one step along all axes, behind what is made of them alone."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import Given, Graph, candidate, operators, optimised, patterns, request, whole_numbers
from onnx import ModelProto

from onnxrank import feeds as declared
from onnxrank import model as files
from onnxrank.roles import resolve
from onnxrank.study import Study

D, LONGEST = 3, 40
LENGTHS = [{"L": n} for n in (0, 1, 2, 7, 39)]
AT = np.arange(LONGEST)
DISTANCES = AT[None] - AT[:, None] + LONGEST - 1


class Mixer:
    """A request's tokens `[1, L, D]`, mixed by a matrix `[L, L]`, behind which candidates are."""

    def __init__(self, opset: int = 17) -> None:
        self.graph = Graph(opset)
        self.given: list[Given] = [request("h", "L", D), candidate("c", D)]
        self.h, self.c = (i.declare(self.graph) for i in self.given)
        length = self.graph.op("Gather", self.graph.op("Shape", self.h), self.graph.const(1, np.int64), axis=0)
        self.length = self.graph.on_axes("Unsqueeze", length, [0])

    def square(self, constant: str, *more: str) -> str:
        """The first L rows and columns of a constant, a Slice for each."""
        g = self.graph
        rows = g.op("Slice", constant, g.ints(0), self.length, g.ints(0), *more)
        made: str = g.op("Slice", rows, g.ints(0), self.length, g.ints(1), *more)
        return made

    def finish(self, matrix: str) -> tuple[Graph, list[Given]]:
        """A score of every candidate."""
        g = self.graph
        mixed = g.on_axes("ReduceSum", g.op("MatMul", matrix, self.h), [1], keepdims=0)
        g.output(g.op("MatMul", g.op("Mul", mixed, self.c), g.const(whole_numbers(D, 1))), ["N", 1])
        return g, self.given


def studied(graph: Graph, given: list[Given]) -> ModelProto:
    model = graph.model()
    return Study(model, resolve(declared.describe(model), request=patterns(given)), files.load(model)).model


@pytest.mark.parametrize("opset", [11, 17, 21])
def test_slices_of_a_constant_are_one(opset: int) -> None:
    m = Mixer(opset)
    found = m.finish(m.square(m.graph.const(whole_numbers(LONGEST, LONGEST))))
    assert operators(studied(*found)).count("Slice") == 1
    optimised(*found, lengths=LENGTHS)


def test_steps_of_one_are_none() -> None:
    m = Mixer()
    found = m.finish(m.square(m.graph.const(whole_numbers(LONGEST, LONGEST)), m.graph.ints(1)))
    assert operators(studied(*found)).count("Slice") == 1
    optimised(*found, lengths=LENGTHS)


def test_a_bias_by_distances_is_looked_up_beforehand() -> None:
    """What is made of it, entry by entry, too, but not what another operand is different along the cut of."""
    m = Mixer()
    g = m.graph
    bias = g.op("Gather", g.const(whole_numbers(2 * LONGEST - 1)), m.square(g.const(DISTANCES, np.int64)))
    scaled = g.op("Mul", g.const(2.0), bias)
    found = m.finish(
        g.op("Sub", scaled, g.op("Slice", g.const(whole_numbers(LONGEST)), g.ints(0), m.length, g.ints(0)))
    )
    made = operators(studied(*found))
    assert made.count("Slice") == 2
    assert made.count("Mul") == 1, "that of the candidates"
    assert made.count("Sub") == 1
    optimised(*found, lengths=LENGTHS)


@pytest.mark.parametrize("columns", [1, 2])
def test_a_bias_by_distances_as_torch_export_writes_it(columns: int) -> None:
    """GatherND by the distances with one more axis; by two numbers it picks entries of a matrix."""
    m = Mixer()
    g = m.graph
    at = g.on_axes("Unsqueeze", m.square(g.const(DISTANCES, np.int64)), [2])
    if columns == 2:  # what joins is made when the model runs
        at = g.op("Concat", at, g.op("Sub", at, at), axis=2)
    table = whole_numbers(2 * LONGEST - 1, columns)
    bias = g.op("GatherND", g.const(table if columns == 2 else table[:, 0]), at)
    found = m.finish(bias)
    made = operators(studied(*found))
    assert ("GatherND" in made) == (columns == 2)
    optimised(*found, lengths=LENGTHS)


@pytest.mark.parametrize("opset", [11, 17])
def test_axes_are_added_beforehand(opset: int) -> None:
    """In front, too, which the cut follows."""
    m = Mixer(opset)
    g = m.graph
    cut = g.on_axes("Unsqueeze", m.square(g.const(whole_numbers(LONGEST, LONGEST))), [0])
    found = m.finish(g.op("Relu", cut))
    made = operators(studied(*found))
    assert made.count("Slice") == 1 and made.count("Unsqueeze") == 1, "that of the length"
    optimised(*found, lengths=LENGTHS)


def test_positions_that_the_table_does_not_have_stay_at_run_time() -> None:
    """A lookup of all positions fails, that of some does not."""
    m = Mixer()
    wrong = np.where(AT < LONGEST - 1, DISTANCES, 1000)
    table = m.graph.const(whole_numbers(2 * LONGEST - 1))
    found = m.finish(m.graph.op("Gather", table, m.square(m.graph.const(wrong, np.int64))))
    made = operators(studied(*found))
    assert made.count("Slice") == 1
    optimised(*found, lengths=LENGTHS)


def test_what_may_end_before_the_second_slice_is_left_alone() -> None:
    """`x[:L][:L + 1]` has L positions, not one more."""
    m = Mixer()
    g = m.graph
    square = m.square(g.const(whole_numbers(LONGEST, LONGEST)))
    again = g.op("Slice", square, g.ints(0), g.op("Add", m.length, g.ints(1)), g.ints(0))
    found = m.finish(again)
    assert operators(studied(*found)).count("Slice") == 2
    optimised(*found, lengths=LENGTHS)


def test_what_lies_within_the_first_slice_is_taken_at_once() -> None:
    """The last two of the first positions, along both axes, by a Slice and by a Gather."""
    m = Mixer()
    g = m.graph
    square = m.square(g.const(whole_numbers(LONGEST, LONGEST)))
    rows = g.op("Slice", square, g.ints(1), m.length, g.ints(0))
    first = g.op("Gather", square, g.ints(0), axis=0)
    found = m.finish(g.op("Concat", rows, first, axis=0))
    made = operators(studied(*found))
    assert made.count("Slice") == 2
    optimised(*found, lengths=LENGTHS[1:])


def test_a_cut_that_others_read_is_made_once() -> None:
    m = Mixer()
    g = m.graph
    rows = g.op("Slice", g.const(whole_numbers(LONGEST, LONGEST)), g.ints(0), m.length, g.ints(0))
    total = g.on_axes("ReduceSum", rows, [1], keepdims=1)
    found = m.finish(g.op("Add", g.op("Slice", rows, g.ints(0), m.length, g.ints(1)), total))
    assert operators(studied(*found)).count("Slice") == 2
    optimised(*found, lengths=LENGTHS)
