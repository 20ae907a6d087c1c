"""Every place that could have been divided and was not says why, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import kinds
import numpy as np
import programs
import pytest
from exports import every_export
from helpers import FLOAT, Graph, candidate, exposed, feeds, patterns, request, rewritten, run, whole_numbers
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from onnx import NodeProto, helper

import onnxrank
from onnxrank import Result, remarks
from onnxrank.operators import Trait, having, operator, traits
from onnxrank.plans import label
from onnxrank.remarks import Place, by_loss, places
from onnxrank.roles import load_spec
from onnxrank.rule import Refusal
from onnxrank.values import CANDIDATES, Level, extents, symbols

MODELS = Path(__file__).resolve().parents[2] / "models" / "onnx"
EXAMPLES = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
COUNTED = {"MatMul", "Gemm", *having(Trait.REDUCTION), *having(Trait.NORMALISATION)}
LENGTH = 3
WIDTH = 64


def remarks_at(result: Result, node: str) -> list[Refusal]:
    return [r for r in result.report.refusals if r.node == node]


def found_places(result: Result) -> dict[str, Place]:
    """Places by label of the node."""
    assert result.form is not None
    return {label(result.form.study.model.graph.node[p.index]): p for p in places(result.form)}


# --- random programs -----------------------------------------------------------------------------------------------


def entries_per_candidate(result: Result, given: Any, at: Mapping[str, int]) -> dict[int, float]:
    """Per original node, the most entries per candidate of what its product, sum or normalisation is made of.

    Counted by running the result for 5 and for 6 candidates.
    """
    assert result.form is not None
    session = exposed(result.model)
    sizes = []
    for n in (5, 6):
        new = feeds(given, n, lengths=at)[int(result.changed)]
        seen = {**run(session, new), **new}
        sizes.append({name: data.size for name, data in seen.items() if isinstance(data, np.ndarray)})
    out: dict[int, float] = {}
    for e in result.form.rewrite.emitted():
        name = e.proto.input[0] if e.proto.input else ""
        if operator(e.proto) in COUNTED and name in sizes[0]:
            out[e.origin] = max(out.get(e.origin, 0), sizes[1][name] - sizes[0][name])
    return out


def asked_for(result: Result, node: NodeProto) -> int | None:
    """Entries per candidate that a node with constant weights need take in; None if none is the request's."""
    assert result.form is not None
    rw = result.form.rewrite.rw
    rest = [rw.values[i] for i in node.input[1:] if i]
    value = rw.values[node.input[0]]
    if any(rw.level(v) is not Level.CONSTANT for v in rest) or len(set(symbols(value.dims))) < len(symbols(value.dims)):
        return None
    made = rw.settle(value)
    levels = rw.sources.levels(made.codes)
    if not (levels == Level.REQUEST).any() or CANDIDATES not in symbols(value.dims):
        return None
    if any("~" in s for s in symbols(value.dims)):
        return None
    long = LENGTH ** sum(s != CANDIDATES for s in symbols(value.dims))
    return int((levels == Level.CANDIDATE).sum()) * long if made.whole is None or prod(extents(made.dims)) else None


@pytest.mark.slow
@pytest.mark.parametrize("writer", [programs, kinds], ids=["fixed", "lengths"])
@EXAMPLES
@given(seed=st.integers(0, 1 << 32), steps=st.integers(4, 20))
def test_none_is_silent(writer: Any, seed: int, steps: int) -> None:
    """A node that takes in request-level entries for every candidate has a remark; one that does not, has no place."""
    made_up = writer.program(seed, steps)
    result = rewritten(made_up.model, request=patterns(made_up.inputs))
    if not result.changed:
        return
    assert result.form is not None
    at = dict.fromkeys(getattr(made_up, "lengths", []), LENGTH)
    entries, found = entries_per_candidate(result, made_up.inputs, at), found_places(result)
    decided = {p.index for p, s in result.form.rewrite.rw.decisions.decided.items() if s.taken}
    for k, node in enumerate(result.form.study.model.graph.node):
        if operator(node) not in COUNTED or not node.input or k in decided:
            continue
        wanted = asked_for(result, node)
        if wanted is None:
            continue
        note(f"{label(node)}: {entries.get(k, 0)} entries per candidate where {wanted} need be")
        if entries.get(k, 0) > wanted:
            assert remarks_at(result, label(node)), label(node)
        elif operator(node) not in ("MatMul", "Gemm"):
            assert label(node) not in found
    assert all(remarks_at(result, name) for name in found)


# --- exports -------------------------------------------------------------------------------------------------------


@cache
def optimised_export(name: str) -> Result:
    spec = load_spec(MODELS / f"{name.split('.')[0]}.roles.yaml")
    return onnxrank.optimize(MODELS / name, spec=spec, check=False)


@pytest.mark.slow
@every_export
def test_exports(name: str) -> None:
    """Every place has its remark, and those that cost most come first."""
    result = optimised_export(name)
    lost = [r.lost for r in result.report.refusals]
    assert lost == sorted(lost, reverse=True) and result.form is not None
    nodes = result.form.study.model.graph.node
    for node, place in found_places(result).items():
        told = remarks_at(result, node)
        assert told and all(r.reason for r in told)
        if traits(nodes[place.index]) & remarks._WEIGHTED:  # what is lost is told in multiply-adds
            assert sum(r.lost for r in told) >= round(place.lost * 512) or place.work == place.once == 0


# --- results -------------------------------------------------------------------------------------------------------


def silent(result: Result) -> list[str]:
    """What a result makes of the request's entries on all rows, without a remark at the node or at one before it.

    The result is analysed anew: nothing that its rewrite knew is asked, but which node it wrote what for.
    """
    assert result.form is not None
    found = onnxrank.analyse(result.model)
    nodes = result.form.study.model.graph.node
    made_for = {o: e.origin for e in result.form.rewrite.emitted() for o in e.proto.output}
    told = {r.node for r in result.report.refusals}
    taken = result.form.rewrite.rw.taken
    by_attention = {k for k, (rule, _) in taken.items() if rule == "attention"}
    attended = {o for e in result.form.rewrite.emitted() if e.origin in by_attention for o in e.proto.output}
    nodes_of = [(e.rule, e.proto) for e in result.form.rewrite.emitted()]
    ones = {o for _, n in nodes_of if operator(n) in ("Expand", "Min") for o in n.output}
    longer = {
        n.output[0]
        for rule, n in nodes_of
        if rule in ("dot", "underflow") and operator(n) == "Concat" and not ones.isdisjoint(n.input)
    }

    def repeats(node: NodeProto) -> bool:
        if operator(node) == "MatMul" and node.input[0] in longer:
            return False  # what was added to scores is a column of the keys, which rows meet with a one
        if not traits(node) & Trait.REDUCTION and not traits(node) & Trait.NORMALISATION:
            return found.once_share(node) > 0 and CANDIDATES in symbols(found.tensors[node.output[0]].dims)
        rows = node.input[0] in found.tensors and CANDIDATES in symbols(found.tensors[node.input[0]].dims)
        return rows and bool((found.levels(node.input[0]) == Level.REQUEST).any())

    def explained(node: NodeProto) -> bool:
        wanted, at = set(node.output), made_for.get(node.output[0], len(nodes) - 1)
        for k in range(min(at, len(nodes) - 1), -1, -1):
            if k == at or not wanted.isdisjoint(nodes[k].output):
                if label(nodes[k]) in told:
                    return True
                wanted.update(nodes[k].input)
        return False

    def summed_up(node: NodeProto) -> bool:
        """Whether it is a softmax over candidates' keys, to which the request's were summed up in a single entry."""
        return operator(node) == "Softmax" and node.output[0] in attended

    walked = [n for n in found.study.model.graph.node if operator(n) in COUNTED | {"Einsum"} and not summed_up(n)]
    return [label(n) for n in walked if repeats(n) and not explained(n)]


@pytest.mark.slow
@every_export
def test_exports_say_what_is_left(name: str) -> None:
    result = optimised_export(name)
    assert not result.changed or not silent(result)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(61_000_000, 61_000_060))
def test_programs_say_what_is_left(seed: int) -> None:
    made_up = kinds.program(seed, 4 + seed % 20)
    result = rewritten(made_up.model, request=patterns(made_up.inputs))
    assert not result.changed or not silent(result)


# --- causes --------------------------------------------------------------------------------------------------------


def tower(g: Graph, x: str, width: int) -> str:
    """Two layers behind a tensor of a width."""
    h = g.op("Relu", g.op("MatMul", x, g.const(whole_numbers(width, WIDTH))))
    return g.op("MatMul", h, g.const(whole_numbers(WIDTH, 2, seed=1)))


def test_an_operator_on_the_request_alone() -> None:
    """It is named first, with the products behind it, which would be made once."""
    g, given = Graph(), [request("u", 8), candidate("x", 4)]
    u, x = (i.declare(g) for i in given)
    strange = g.op("Strange", u, domain="com.acme")
    shaped = g.op("Reshape", strange, g.ints(-1, 8))
    g.output(g.op("Add", tower(g, shaped, 8), tower(g, x, 4)), ["N", 2])
    result = rewritten(g.model(), request=["u"], ignore=["pack"])
    first = result.report.refusals[0]
    assert (first.node, first.op) == (strange, "Strange") and "com.acme::Strange is not known" in first.reason
    assert sum(r.node == strange for r in result.report.refusals) == 1
    assert first.lost == 512 * (8 * WIDTH + WIDTH * 2)


def test_an_operator_in_front_of_a_layer() -> None:
    """Of mixed entries, what would be the request's behind it, if it went entry by entry."""
    g, given = Graph(), [request("u", 24), candidate("x", 8)]
    u, x = (i.declare(g) for i in given)
    both = g.op("Concat", u, x, axis=1)
    strange = g.op("Bernoulli", both)
    g.output(tower(g, g.op("Relu", strange), 32), ["N", 2])
    first = rewritten(g.model(), request=["u"], ignore=["pack"]).report.refusals[0]
    assert first.node == strange and "Bernoulli is not known to treat rows independently" in first.reason
    assert first.lost == 512 * 24 * WIDTH


def test_encoders_in_branches() -> None:
    """Of a history that the request alone chooses how to encode: the choice stays, and so does what reads it."""
    g, given = Graph(), [request("h", "L", 8), request("kind", 1), candidate("x", 4)]
    h, kind, x = (i.declare(g) for i in given)
    test = g.op("Greater", g.on_axes("Squeeze", g.op("Gather", kind, g.const(0, np.int64), axis=0), [0]), g.const(0))
    ways = []
    for op in ("Relu", "Neg"):
        weights, made, out = g.const(whole_numbers(8, 4)), g.fresh("made"), g.fresh("encoded")
        nodes = [helper.make_node("MatMul", [h, weights], [made]), helper.make_node(op, [made], [out])]
        ends = [helper.make_tensor_value_info(out, FLOAT, None)]
        ways.append(helper.make_graph(nodes, g.fresh("way"), [], ends))
    encoded = g.op("If", test, then_branch=ways[0], else_branch=ways[1])
    pooled = g.on_axes("ReduceSum", encoded, [1], keepdims=0)
    g.output(tower(g, g.op("Mul", pooled, x), 4), ["N", 2])
    (told,) = remarks_at(rewritten(g.model(), request=["h", "kind"], ignore=["pack"]), encoded)
    assert told.op == "If" and "not known to treat rows independently" in told.reason


def test_a_length_that_is_not_constant() -> None:
    """A history of each candidate, of any length: products with it cannot become weights, and are named first."""
    g, given = Graph(), [request("u", 16), candidate("h", "L", 16)]
    u, h = (i.declare(g) for i in given)
    user = g.op("Unsqueeze", u, g.ints(1))
    x = g.op("Concat", h, g.op("Mul", user, h), axis=2)
    layer = g.op("MatMul", x, g.const(whole_numbers(32, WIDTH)))
    g.output(g.op("ReduceSum", g.op("Relu", layer), g.ints(1), keepdims=0), ["N", WIDTH])
    told = rewritten(g.model(), request=["u"]).report.refusals
    assert (told[0].rule, told[0].node) == ("fold", layer) and told[0].lost > 0
    assert "along L, whose extent is not constant" in told[0].reason


def test_a_decision_by_cost() -> None:
    """It says what the rule would have cost: once, per candidate, and at which number of candidates."""
    g, given = Graph(), [request("u", 8), candidate("x", 8)]
    u, x = (i.declare(g) for i in given)
    g.output(g.op("MatMul", g.op("Mul", u, x), g.const(whole_numbers(8, 4))), ["N", 4])
    told = [r for r in rewritten(g.model(), request=["u"], candidates=3).report.refusals if r.rule == "fold"]
    assert len(told) == 1 and told[0].op == "MatMul"
    assert "it does not pay at N = 3: " in told[0].reason and " once and " in told[0].reason
    assert told[0].reason.endswith("per candidate as it is")


@pytest.mark.parametrize("reader", ["small", "Relu"])
def test_a_normalisation(reader: str) -> None:
    """Of request-level and candidate-level entries together: too small to pay, or read by something else."""
    g, given = Graph(), [request("u", 8), candidate("x", 8)]
    u, x = (i.declare(g) for i in given)
    gain = g.const(np.ones(16))
    made = g.op("LayerNormalization", g.op("Concat", u, x, axis=1), gain)
    made = g.op("Relu", made) if reader == "Relu" else made
    g.output(g.op("MatMul", made, g.const(whole_numbers(16, 2))), ["N", 2])
    result = rewritten(g.model(), request=["u"])
    (told,) = [r for r in result.report.refusals if r.op == "LayerNormalization"]
    words = "other than linear maps" if reader == "Relu" else "would save too little"
    assert told.rule == "norm" and words in told.reason
    assert told.lost == (0 if reader == "Relu" else 8 * 2 * 512)


def test_rows_of_one_level_are_no_place() -> None:
    """A normalisation whose rows are each of one level is divided by rows, and nothing is said of it."""
    g, given = Graph(), [request("u", 3, 8), candidate("x", 2, 8)]
    u, x = (i.declare(g) for i in given)
    made = g.op("LayerNormalization", g.op("Concat", u, x, axis=1), g.const(np.ones(8)))
    g.output(g.op("MatMul", g.op("Relu", made), g.const(whole_numbers(8, 2))), ["N", 5, 2])
    result = rewritten(g.model(), request=["u"])
    assert result.changed and not [r for r in result.report.refusals if r.op == "LayerNormalization"]


def test_a_reduction_that_no_rule_divides() -> None:
    g, given = Graph(), [request("u", 8), candidate("x", 8)]
    u, x = (i.declare(g) for i in given)
    made = g.op("ReduceL2", g.op("Concat", g.op("Exp", u), x, axis=1), axes=[1])
    g.output(g.op("Add", made, tower(g, u, 8)), ["N", 2])
    (told,) = [r for r in rewritten(g.model(), request=["u"], ignore=["pack"]).report.refusals if r.op == "ReduceL2"]
    assert told.reason.startswith("it takes in request-level and candidate-level entries together")


def test_the_model_as_a_whole() -> None:
    """A result that would not be faster is not taken: the remark has what it would have saved."""
    result = optimised_export("edcn.torchscript.onnx")
    first = result.report.refusals[0]
    assert not result.changed and (first.rule, first.node) == ("model", "")
    assert "would not be faster at N = 512" in first.reason and first.lost > 0


def test_a_rule_that_does_not_pay() -> None:
    """A form of the model that is not chosen says what the model would take with the rule and without."""
    told = [r for r in optimised_export("autoint.torchscript.onnx").report.refusals if r.rule == "attention"]
    assert [r.node for r in told] == [""] and told[0].reason.startswith("it does not pay: at N = ")


def test_by_loss() -> None:
    a, b, c = (Refusal("r", name, "Op", "why", lost) for name, lost in (("a", 0), ("b", 5), ("c", 5)))
    assert by_loss([a, b, a, c]) == [b, c, a]
