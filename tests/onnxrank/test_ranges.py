"""The ranges that are served stand in the report and in the contract."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from helpers import Graph, candidate, request, rewritten, whole_numbers
from onnx import ModelProto

import onnxrank
from onnxrank.contract import CONTRACT, stored_contract
from onnxrank.errors import UsageError
from onnxrank.render import to_text
from onnxrank.writers import to_json

SCHEMA = json.loads((Path(__file__).resolve().parents[2] / "onnxrank" / "optimize.schema.json").read_text())


def history() -> ModelProto:
    """The sum over a history of any length, and a candidate, before a layer."""
    g, given = Graph(), [request("h", "L", 24), candidate("x", 8)]
    h, x = (i.declare(g) for i in given)
    pooled = g.op("ReduceSum", h, g.ints(1), keepdims=0)
    g.output(g.op("MatMul", g.op("Concat", pooled, x, axis=1), g.const(whole_numbers(32, 64))), ["N", 64])
    return g.model()


@pytest.mark.parametrize(("declared", "span"), [({}, (1, 1024)), ({"L": (0, 50)}, (0, 50))])
def test_lengths_are_told(declared: dict[str, tuple[int, int]], span: tuple[int, int]) -> None:
    result = rewritten(history(), request=["h"], lengths=declared, candidates=(64, 2048))
    assert result.changed and result.report.lengths == {"L": span} and result.report.usual == 362
    form = json.loads(to_json(result.report))
    jsonschema.validate(form, SCHEMA)
    assert form["lengths"] == {"L": list(span)} and form["usual"] == 362
    text = to_text(result.report)
    assert f"\nlengths: L {span[0]}..{span[1]}\n" in text and "N = 362 (64..2048)" in text
    contract = stored_contract(result.model)
    assert contract is not None and contract["lengths"] == {"L": list(span)}


def test_without_lengths() -> None:
    """A model whose histories have a fixed length says nothing of them, in its contract neither."""
    g, given = Graph(), [request("u", 24), candidate("x", 8)]
    u, x = (i.declare(g) for i in given)
    g.output(g.op("MatMul", g.op("Concat", u, x, axis=1), g.const(whole_numbers(32, 64))), ["N", 64])
    result = rewritten(g.model(), request=["u"])
    assert result.changed and result.report.lengths == {} and "lengths:" not in to_text(result.report)
    assert "lengths" not in json.loads(next(p.value for p in result.model.metadata_props if p.key == CONTRACT))


def test_other_lengths_are_another_use() -> None:
    """A result is left as it is for the lengths of its contract, and made again for others."""
    made = rewritten(history(), request=["h"], lengths={"L": (1, 50)}).model

    def done(**lengths: tuple[int, int]) -> bool:
        notes = onnxrank.optimize(made, check=False, lengths=lengths).report.notes
        return any("optimised before, for the same use" in n for n in notes)

    assert done() and done(L=(1, 50)) and not done(L=(1, 51))


def test_an_unknown_length() -> None:
    """A name that no length has is an error, though nothing is checked."""
    with pytest.raises(UsageError, match="No input has a length named 'M'"):
        rewritten(history(), request=["h"], lengths={"M": (1, 2)})
