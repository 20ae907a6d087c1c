"""A model for requests of exactly one candidate: what is repeated for every candidate is there already.

At N = 1 an Expand of a request's rows to N gives what it takes, and so does a Tile. Without them, and without what
counts the candidates for them, a plan for a single candidate makes up for the choice of it (`joining`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto

from onnxrank import extents as ex
from onnxrank.extents import Expr
from onnxrank.facts import Extent, Facts
from onnxrank.graphs import live, rename
from onnxrank.operators import operator
from onnxrank.values import CANDIDATES


def of_one(model: ModelProto, facts: Facts, inputs: Mapping[str, Sequence[Extent]]) -> ModelProto:
    """A model that gives the same for one candidate, and may give anything for another number of them.

    Args:
        model: The model.
        facts: Its proved shapes.
        inputs: Those of its inputs.

    Returns:
        A copy; the model itself where nothing is repeated.
    """
    given = {o.name for o in model.graph.output}

    def shape(name: str) -> list[int | Expr] | None:
        """Shape of a tensor for one candidate; None where it is not proved."""
        sizes = [facts.size(e) for e in inputs[name]] if name in inputs else facts.sizes.get(name)
        return None if sizes is None else [ex.replaced(n, {CANDIDATES: 1}) for n in sizes]

    names: dict[str, str] = {}
    for node in model.graph.node:
        if operator(node) in ("Expand", "Tile") and node.output[0] not in given:
            made = shape(node.output[0])
            if made is not None and made == shape(node.input[0]):
                names[node.output[0]] = names.get(node.input[0], node.input[0])
    if not names:
        return model
    out = ModelProto()
    out.CopyFrom(model)
    for node in out.graph.node:
        if node.output[0] not in names:
            rename(node, names)
    return live(out)
