"""The node that the runtime dies of."""

from __future__ import annotations

import pytest
from fatal import fatal, rows
from onnx import helper

from onnxrank.culprit import culprit


@pytest.mark.slow
@pytest.mark.parametrize("optimise", [False, True])
def test_node(optimise: bool) -> None:
    model = fatal(least=5)
    gru = next(n for n in model.graph.node if n.op_type == "GRU")
    assert culprit(model, None, rows(5), optimise=optimise) == f"GRU {gru.name}"


def test_none() -> None:
    model = fatal(least=5)
    assert culprit(model, None, rows(4)) is None
    assert culprit(model, None, rows(5), seconds=0) is None


def test_dead_nodes_are_not_blamed() -> None:
    model = fatal(least=5)
    model.graph.node.append(helper.make_node("Sin", ["item"], ["other"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_empty_tensor_value_info("other"))
    assert culprit(model, None, rows(5)) is None
