"""Which nodes run request by request, and that they give the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from helpers import Graph, run, whole_numbers
from onnx import ModelProto, helper

from onnxrank import batches
from onnxrank.batching import regions
from onnxrank.batching.engine import Options, batch
from onnxrank.batching.tensors import Rows, Tensor
from onnxrank.graphs import subgraphs


def _attention(width: int, length: int = 40) -> ModelProto:
    """Candidates that are held against a history of their request, and a layer behind."""
    g = Graph(17)
    history, item = g.input("history", ["N", length, width]), g.input("item", ["N", width])
    keys = g.op("MatMul", history, g.const(whole_numbers(width, width)))
    weights = g.op("Relu", g.op("MatMul", keys, g.op("Unsqueeze", item, g.ints(2))))
    both = g.op("MatMul", g.op("Transpose", weights, perm=[0, 2, 1]), keys)
    flat = g.op("Relu", g.op("Reshape", both, g.ints(-1, width)))
    g.op("MatMul", flat, g.const(whole_numbers(width, 1, seed=3)))
    g.nodes[-1].output[0] = "score"
    g.output("score", ["N", 1])
    return g.model()


def _loops(model: ModelProto) -> list[set[str]]:
    """Operators of each loop."""
    branches = [g for n in model.graph.node for g in subgraphs(n)]
    return [{m.op_type for m in g.node} for b in branches for n in b.node if n.op_type == "Loop" for g in subgraphs(n)]


def test_what_does_not_fit_a_cache_runs_in_turns() -> None:
    how = {"request": ["history"], "check": False, "candidates": 64}
    large = batch(_attention(64, 400), options=Options(requests=32), **how)
    assert any("MatMul" in ops for ops in _loops(large.model))
    assert any("loop over requests" in note for note in large.report.notes)
    assert not _loops(batch(_attention(64, 400), options=Options(requests=32, turns=False), **how).model)
    assert not _loops(batch(_attention(4), options=Options(requests=8), **how).model)


@pytest.mark.parametrize("form", [{"rows": "lengths"}, {"rows": "index"}, {"interface": "padded"}])
def test_scores_are_those_of_single_requests(form: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions._Choice, "_gain", lambda self, k: 1.0)
    model = _attention(6)
    made = batch(model, request=["history"], check=False, options=Options(**form)).model
    assert _loops(made)
    told = batches.convention(made)
    assert told is not None
    for counts in ([], [3], [2, 1, 3], [0, 4, 0, 1, 90], [0, 0]):
        own = [3] * len(counts) if "interface" in form else counts
        if not own and "interface" in form:
            continue
        single = [
            {"history": whole_numbers(1, 40, 6, seed=k), "item": whole_numbers(max(n, 1), 6, seed=90 + k)[:n]}
            for k, n in enumerate(own)
        ]
        if not own:
            none = {"history": np.zeros((0, 40, 6), np.float32), "item": np.zeros((0, 6), np.float32)}
            say = "request_index" if form["rows"] == "index" else "request_lengths"
            assert run(made, {**none, say: np.zeros(0, np.int64)})["score"].shape == (0, 1)
            continue
        got = batches.parted(told, run(made, batches.joined(told, single)), own)
        for feed, n, found in zip(single, own, got, strict=True):
            if n:
                want = run(model, {"history": np.repeat(feed["history"], n, 0), "item": feed["item"]})
                np.testing.assert_array_equal(found["score"], want["score"])
            else:
                assert found["score"].shape == (0, 1)


def test_it_passes_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 too, which what a loop collects takes part in."""
    monkeypatch.setattr(regions._Choice, "_gain", lambda self, k: 1.0)
    made = batch(_attention(6), request=["history"], check="quick")
    assert _loops(made.model) and made.report.checks


def _chosen(ops: Sequence[tuple[str, str]], sizes: dict[str, int]) -> list[frozenset[int]]:
    nodes = [helper.make_node("Relu" if " " not in i else "Add", i.split(), [o]) for i, o in ops]
    tensors = {
        name: Tensor(name, (1,), Rows(name.isupper(), 0)) for pair in ops for text in pair for name in text.split()
    }
    return regions.regions(nodes, tensors, lambda name: sizes.get(name, 1 << 20), lambda node: 0, 8)


def test_no_way_leads_out_of_a_region_and_back() -> None:
    # B is small, but lies between two large ones; F, behind, does not.
    small = {"B": 8, "F": 8, "G": 8}
    ops = [("A", "C"), ("C", "B"), ("B", "D"), ("D C", "E"), ("E", "F"), ("F", "G")]
    (found,) = _chosen(ops, small)
    assert found == {0, 1, 2, 3, 4}


def test_two_regions_do_not_wait_for_each_other() -> None:
    """Each hands something small over to the other, and no way leads from a node of one back to itself."""
    ops = [("A", "B"), ("B", "P"), ("P", "Q"), ("X", "D"), ("D", "R"), ("R", "S"), ("D Q", "E"), ("B S", "F")]
    assert _chosen(ops, dict.fromkeys("AXPQRSEF", 8)) == [set(range(8))]
    one_way = _chosen([*ops[:7], ("B", "F")], dict.fromkeys("AXPQRSEF", 8))
    assert sorted(map(sorted, one_way)) == [[0, 1, 7], [3, 4, 6]]


def test_small_ones_stay_together() -> None:
    assert _chosen([("A", "B"), ("B", "C")], dict.fromkeys("ABC", 1000)) == []


def test_a_loop_is_worth_what_goes_in_and_out() -> None:
    assert _chosen([("A", "B")], {}) == []
    assert _chosen([("A", "B")], {"A": 8, "B": 1 << 20}) == []
    assert _chosen([("A", "B"), ("B", "C")], {"A": 8, "C": 8}) == [{0, 1}]


def test_order_keeps_regions_together() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Relu", ["a"], ["late"]),
        helper.make_node("Relu", ["x"], ["early"]),
        helper.make_node("Add", ["a", "early"], ["b"]),
        helper.make_node("Add", ["late", "b"], ["c"]),
    ]
    assert regions.ordered(nodes, [frozenset({0, 3})]) == [[2], [0, 3], [1], [4]]
