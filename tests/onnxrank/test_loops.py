"""Loops over bags of ids, as exporters write EmbeddingBag, are one lookup and one reduction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from helpers import run, session, transformation
from onnx import numpy_helper

from onnxrank import facts, optimize
from onnxrank.loops import without_loops

MODELS = Path(__file__).resolve().parents[2] / "models" / "onnx"

COUNTED = """
<ir_version: 8, opset_import: ["" : 17]>
bags (int64[N, 3] item_ids, float[N, 2] user) => (float[N, 4] y, float[N, 2] z)
<int64[1] flatten = {{-1}}, int64 zero = {{0}}, int64 one = {{1}}, int64 step = {{{step}}}, bool yes = {{1}},
 int64[1] first = {{1}}, int64[1] last = {{9223372036854775807}}, int64[1] axis = {{{axis}}}, int64[1] row = {{0}}>
{{
  z = Relu(user)
  flat = Reshape(item_ids, flatten)
  all = Shape(item_ids)
  total = ReduceProd<keepdims = 0>(all)
  starts = Range({start}, total, step)
  length = Shape(flat)
  offsets = Concat<axis = 0>(starts, length)
  ends = Slice(offsets, first, last)
  shape = Shape(ends)
  rounds = Gather(shape, zero)
  y = Loop(rounds, yes) <body = body (int64 i, bool again) => (bool go, float[d] sum) {{
    begin = Gather(offsets, i)
    end = Gather(ends, i)
    begin1 = Unsqueeze(begin, row)
    end1 = Unsqueeze(end, row)
    ids = Slice(flat, begin1, end1, row)
    rows = Gather(table, ids)
    sum = {reduce}<keepdims = 0>(rows{axes})
    go = {go}
  }}>
}}
"""


def counted(step: int = 3, start: str = "zero", axis: int = 0, reduce: str = "ReduceSum", go: str = "Identity(again)"):
    """A loop with a known number of iterations, over bags of `step` ids."""
    text = COUNTED.format(step=step, start=start, axis=axis, reduce=reduce, go=go, axes=", axis")
    if reduce != "ReduceSum":
        text = text.replace("<keepdims = 0>(rows, axis)", f"<axes = [{axis}], keepdims = 0>(rows)")
    model = onnx.parser.parse_model(text)
    table = np.arange(40, dtype=np.float32).reshape(10, 4) % 7
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    onnx.checker.check_model(model)
    return model


ROLES = {"inputs": {"item_ids": {"range": [0, 10]}, "user": {"level": "request"}}}


def loops(model: onnx.ModelProto) -> int:
    return sum(n.op_type == "Loop" for n in transformation(model, ROLES).study.model.graph.node)


@pytest.mark.parametrize("reduce", ["ReduceSum", "ReduceMean", "ReduceMax"])
def test_bags(reduce: str) -> None:
    """The same rows, at numbers of candidates that nobody ran."""
    model = counted(reduce=reduce)
    study = transformation(model, ROLES).study
    assert not any(n.op_type == "Loop" for n in study.model.graph.node)
    rng = np.random.default_rng(0)
    for n in (1, 2, 41, 500):
        feeds = {"item_ids": rng.integers(0, 10, (n, 3)), "user": rng.random((n, 2), np.float32)}
        want, got = run(session(model), feeds), run(session(study.model), feeds)
        for name, scores in want.items():
            np.testing.assert_array_equal(got[name], scores)


@pytest.mark.parametrize(
    "other", [{"step": 2}, {"start": "one"}, {"axis": 1}, {"go": "Not(again)"}], ids=lambda o: str(*o)
)
def test_other_loops_stay(other: dict) -> None:
    """Runs that overlap, begin elsewhere, or end early; another axis."""
    assert loops(counted(**other)) == 1


@pytest.mark.parametrize("op", [None, "Range", "Concat", "Slice", "Gather"])
def test_operators_of_other_domains_stay(op: str | None) -> None:
    """What another domain calls by the name of an ONNX operator is not that, in the loop or before it."""
    model = counted()
    found = facts.derive(model, {"item_ids": ((1, ("N",)), (3, ())), "user": ((1, ("N",)), (2, ()))}, None)
    other = onnx.ModelProto()
    other.CopyFrom(model)
    (loop,) = (n for n in other.graph.node if n.op_type == "Loop")
    for node in (*other.graph.node, *loop.attribute[0].g.node):
        if node.op_type == op:
            node.domain = "com.acme"
    assert (without_loops(other, found) is None) == (op is not None)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_exports(exporter: str) -> None:
    """EmbeddingBag as torch writes it: the user's lookups are made once, and all pairs are divided."""
    path = MODELS / f"dlrm_bags.{exporter}.onnx"
    made = optimize(path, spec=yaml.safe_load((MODELS / "dlrm_bags.roles.yaml").read_text()), check=False)
    assert not {"Loop", "ConcatFromSequence"} & {n.op_type for n in made.model.graph.node}
    assert made.report.macs_after < 0.4 * made.report.macs_before
