"""Questions about what lies behind a tensor: asked once each, at any depth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import NodeProto, helper

import onnxrank
from onnxrank.uses import Uses
from tests.support.helpers import Graph, assert_same_scores, candidate, patterns, request, rewritten, whole_numbers

USER, ITEM = request("user", 4), candidate("item", 4)


def _reaches(uses: Uses, name: str, calls: list[str], op: str = "Relu") -> bool:
    def judge(node: NodeProto, _: str) -> bool | None:
        calls.append(node.output[0])
        return True if node.op_type == op else None if node.op_type == "Add" else False

    return uses.behind(name, ("all", op), judge, lambda _, answers: bool(answers) and all(answers))


def test_readers_are_listed_once_for_every_operand_and_left_out_operands_have_none() -> None:
    add, clip = helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Clip", ["y", "", "top"], ["z"])
    uses = Uses([add, clip])
    assert uses.readers("x") == [add, add] and uses.readers("") == [] and uses.readers("z") == []
    assert uses.producers == {"y": add, "z": clip}


def test_an_answer_is_that_of_all_readers() -> None:
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    assert _reaches(Uses(nodes), "x", []) and not _reaches(Uses(nodes), "z", [])
    assert not _reaches(Uses([*nodes, helper.make_node("Tanh", ["y"], ["t"])]), "x", [])


def test_paths_that_double_and_chains_of_any_length_are_walked_once() -> None:
    length = 5000
    nodes = [helper.make_node("Add", [f"x{k}", f"x{k}"], [f"x{k + 1}"]) for k in range(length)]
    uses, calls = Uses([*nodes, helper.make_node("Relu", [f"x{length}"], ["y"])]), list[str]()
    assert _reaches(uses, "x0", calls)
    assert len(calls) <= 4 * length + 2
    calls.clear()
    assert _reaches(uses, "x7", calls) and not calls
    assert not _reaches(uses, "x7", calls, op="Tanh"), "another question has answers of its own"


def test_answers_are_forgotten_when_what_they_depend_on_changes() -> None:
    constant = False
    uses = Uses([helper.make_node("MatMul", ["x", "w"], ["y"])])

    def ask() -> bool:
        return uses.behind("x", "constant", lambda node, _: constant, lambda _, answers: all(answers))

    assert not ask()
    constant = True
    assert not ask()
    uses.forget()
    assert ask()


def _chain(step: Callable[[Graph, str], str], steps: int) -> Graph:
    """A layer over both sides, steps behind it, and a layer that reads the last."""
    g = Graph()
    user, item = (g.input(given.name, ("N", *given.shape)) for given in (USER, ITEM))
    x = g.op("MatMul", g.op("Concat", user, item, axis=1), g.const(whole_numbers(8, 4)))
    for _ in range(steps):
        x = step(g, x)
    g.output(g.op("MatMul", x, g.const(whole_numbers(4, 3))), ("N", 3))
    return g


def _hold(g: Graph, tolerance: float) -> onnxrank.Result:
    """Rewrites a model, and holds it against the original."""
    model, given = g.model(), [USER, ITEM]
    result = rewritten(model, request=patterns(given))
    assert_same_scores(model, result, given, counts=(2, 7), tolerance=tolerance)
    return result


CHAINS: dict[str, Callable[[Graph, str], str]] = {
    "Add of a candidate": lambda g, x: g.op("Add", x, "item"),
    "Add of a constant": lambda g, x: g.op("Add", x, g.const(np.ones(4))),
    "Mul by the request": lambda g, x: g.op("Mul", x, g.op("Sign", "user")),
    "Mul by both": lambda g, x: g.op("Mul", g.op("Mul", x, g.op("Sign", "user")), g.op("Sign", "item")),
    "Neg": lambda g, x: g.op("Neg", x),
    "MatMul": lambda g, x: g.op("MatMul", x, g.const(np.eye(4)[::-1])),
    "Reshape": lambda g, x: g.op("Reshape", x, g.ints(-1, 4)),
    "residual": lambda g, x: g.op("Add", g.op("Relu", g.op("MatMul", x, g.const(-np.eye(4)))), x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_deeper_than_the_stack_is_rewritten(name: str) -> None:
    g = _chain(CHAINS[name], 450)
    _hold(g, 1e-6)


def test_a_chain_of_constants_deeper_than_the_stack_is_written() -> None:
    g = Graph()
    user, item = (g.input(given.name, ("N", *given.shape)) for given in (USER, ITEM))
    weight = g.const(whole_numbers(8, 4))
    for _ in range(450):
        weight = g.op("Neg", weight)
    g.output(g.op("MatMul", g.op("Concat", user, item, axis=1), weight), ("N", 4))
    assert _hold(g, 0).changed


def test_steps_that_double_every_path_are_taken_in_time() -> None:
    def step(g: Graph, x: str) -> str:
        turned = g.op("Transpose", x, perm=[0, 1])
        shifted = g.op("Div", turned, g.op("Add", g.op("Abs", "item"), g.const(4.0)))
        return g.op("Add", g.op("Add", x, shifted), "item")

    _hold(_chain(step, 64), 1e-5)


@pytest.mark.slow
def test_a_cross_network_of_many_layers_is_rewritten() -> None:
    g = Graph()
    user, item = (g.input(given.name, ("N", *given.shape)) for given in (USER, ITEM))
    first = x = g.op("Concat", user, item, axis=1)
    for _ in range(100):
        x = g.op("Add", g.op("Mul", first, g.op("MatMul", x, g.const(whole_numbers(8, 8) / 256))), x)
    g.output(g.op("MatMul", x, g.const(whole_numbers(8, 3))), ("N", 3))
    _hold(g, 1e-5)
