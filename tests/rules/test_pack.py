"""`pack`: units and weights that do nothing go, by sites of the plan, under the gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from modelkit import compare, fired, graph, optimised
from onnx import ModelProto, numpy_helper

import onnxrank
from onnxrank import packing
from onnxrank.errors import CheckFailed
from onnxrank.plans import PACK, Site
from onnxrank.verify import Options, verify

TEXT = "(float[N,8] user, float[N,8] item) => (float[N,1] y) { x = Concat<axis=1>(user, item) %s }"
BODY = "h = Gemm(x, W, b) r = Relu(h) g = Gemm(r, V, c) s = Relu(g) y = MatMul(s, H)"


def weights(hidden: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {"W": (16, hidden), "b": (hidden,), "V": (hidden, hidden), "c": (hidden,), "H": (hidden, 1)}
    return {k: (rng.normal(size=s) / 4).astype(np.float32) for k, s in made.items()}


def masked() -> ModelProto:
    """Half the units of both layers read nothing, and give nothing."""
    w = weights()
    w["W"][:, ::2], w["b"][::2] = 0, 0
    w["V"][:, 1::2], w["c"][1::2] = 0, 0
    return graph(TEXT % BODY, **w)


def decayed() -> ModelProto:
    """Weights that weight decay has left at denormal numbers, here and there."""
    w = weights()
    w["V"][::3, ::5] = 1e-40
    return graph(TEXT % BODY, **w)


def sites(result: Any) -> list[Site]:
    return [s for s in result.plan.sites if s.place.rule == PACK]


def sizes(model: ModelProto) -> int:
    """Entries of weights; a bias is one row."""
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] > 1)


def test_masked_units_go() -> None:
    model = masked()
    result = optimised(model, request=["user"])
    assert sizes(result.model) == 16 * 32 + 32 * 32 + 32
    assert [(s.op, s.place.step, s.taken) for s in sites(result)] == [("Gemm", packing.UNITS, True)] * 2
    (use,) = [r for r in result.report.rules if r.name == PACK]
    n = result.report.usual
    assert use.sites == 2 and use.macs_saved == n * (16 * 32 + 64 * 64 - 32 * 32 + 32)
    assert sum(r.macs_saved for r in result.report.rules) == result.report.macs_before - result.report.macs_after
    assert any("32 units behind" in note for note in result.report.notes)
    compare(model, result)


def test_packing_is_enough() -> None:
    """Where no other rule has anything to do."""
    result = optimised(masked(), request=["user"], select=["pack"])
    assert result.changed and {r.name for r in result.report.rules} <= {PACK, "broadcast"}
    assert sizes(result.model) == 16 * 32 + 32 * 32 + 32
    compare(masked(), result)


def test_weights_of_decay() -> None:
    model = decayed()
    result = optimised(model, request=["user"])
    assert [s.place.step for s in sites(result)] == [packing.WEIGHTS]
    held = [numpy_helper.to_array(t) for t in result.model.graph.initializer if t.data_type == 1]
    assert all(((abs(a) > 1e-30) | (a == 0)).all() for a in held)
    assert any("too small to be told from 0" in note for note in result.report.notes)
    compare(model, result)


@pytest.mark.parametrize(
    ("between", "packed"),
    [("s = Relu(g)", 1), ("q = Sigmoid(g) s = Concat<axis=1>(q, g)", 1), ("q = ReduceL2(g) s = Div(g, q)", 0),
     ("s = LayerNormalization(g, c)", 0), ("q = Mul(g, g) z = Sqrt(q) s = Div(g, z)", 0)],
)  # fmt: skip
def test_weights_that_a_norm_may_bring_back_stay(between: str, packed: int) -> None:
    """Divided by their own length, numbers of 1e-40 would be like any others."""
    w = weights()
    w["V"][::3, ::5] = 1e-40
    if "Concat" in between:
        w["H"] = np.concatenate([w["H"], w["H"]])
    assert len(sites(optimised(graph(TEXT % BODY.replace("s = Relu(g)", between), **w), request=["user"]))) == packed


def test_rows_of_tables() -> None:
    """Rows that nothing trains decay, too; of tables that are large nothing is read."""
    w = weights()
    w["D"] = np.random.default_rng(1).normal(size=(40, 8)).astype(np.float32)
    w["D"][7:] = 1e-41
    text = "(float[N,8] user, int64[N] item) => (float[N,1] y) { e = Gather(D, item) x = Concat<axis=1>(user, e) %s }"
    model = graph(text % BODY, **w)
    assert [(s.op, s.place.step) for s in sites(optimised(model, request=["user"]))] == [("Gather", packing.WEIGHTS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MOST", 300)
        assert not sites(optimised(model, request=["user"]))


def test_small_weights_of_a_layer_in_small_units_stay() -> None:
    """What is small next to the others of its layer only is data, and so are others that are all small."""
    w = weights()
    w["V"][::3, ::5] *= 1e-20
    w["W"] *= 1e-35
    w["b"] *= 1e-35
    w["V"] *= 1e35 / 4
    assert not sites(optimised(graph(TEXT % BODY, **w), request=["user"]))


@pytest.mark.parametrize("make", [masked, decayed])
def test_plans_replay_it(make: Any) -> None:
    model = make()
    first = optimised(model, request=["user"])
    again = onnxrank.optimize(model, plan=first.plan)
    assert again.model.SerializeToString() == first.model.SerializeToString()
    assert onnxrank.optimize(first.model).changed is False


def test_it_can_be_left_out() -> None:
    model = masked()
    for how in ({"ignore": ["pack"]}, {"select": ["fc"]}):
        result = optimised(model, request=["user"], **how)
        assert not sites(result) and sizes(result.model) == sizes(model)


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (TEXT.replace("y)", "y, float[N,64] r)"), BODY),
        (TEXT, BODY.replace("s = Relu(g)", "z = ReduceMax(r) q = Add(g, z) s = Relu(q)")),
        (TEXT, BODY.replace("r = Relu(h)", "r = Softmax(h)")),
    ],
)
def test_nothing_where_somebody_else_looks(text: str, body: str) -> None:
    w = weights()
    w["V"][[1, 4, 5]] = 0
    w["W"][:, 2] = 0
    result = optimised(graph(text % body, **w), request=["user"])
    assert not [s for s in sites(result) if s.place.step == packing.UNITS]


def test_units_that_may_become_infinite_stay() -> None:
    """The original gives 0 times infinity, which is no number."""
    w = weights()
    w["V"][3] = 0
    w["W"][:, 3] = 3e38
    assert not sites(optimised(graph(TEXT % BODY, **w), request=["user"], check=False))


def test_the_gate_leaves_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One site is wrong: it is left as it is, and the rest stays packed and divided."""
    w = weights()
    w["W"][:, ::2] = 0
    w["H"][5:9] = 0
    model = graph(TEXT % BODY, **w)
    right = packing._constants
    monkeypatch.setattr(packing, "_constants", lambda *a: right(*a) + 1)
    result = optimised(model, request=["user"])
    wrong, kept = sites(result)
    assert not wrong.taken and kept.taken
    assert [(r.rule, r.node, r.cause) for r in result.report.retreats] == [(PACK, wrong.node, "check")]
    assert fired(result) >= {PACK, "fc"}
    compare(model, result)
    assert onnxrank.optimize(model, plan=result.plan).model.SerializeToString() == result.model.SerializeToString()
    with pytest.raises(CheckFailed):
        optimised(model, request=["user"], strict=True)


@pytest.mark.slow
def test_bisect_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = packing._constants
    monkeypatch.setattr(packing, "_constants", lambda *a: right(*a) + 1)
    model = masked()
    made = optimised(model, request=["user"], check=False)
    found = verify(model, made.model, Options(level="quick", bisect=True))
    assert not found.passed and found.culprit is not None
    assert (found.culprit.rule, found.culprit.node) == (PACK, sites(made)[0].node)


def test_large_models_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_WEIGHTS", 16 * 64 + 64 * 64)
    assert not sites(optimised(masked(), request=["user"]))


def test_external_data(tmp_path: Path) -> None:
    onnx.save(masked(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    result = onnxrank.optimize(tmp_path / "m.onnx", request=["user"])
    assert len(sites(result)) == 2
    result.save(tmp_path / "out.onnx")
    assert verify(tmp_path / "m.onnx", tmp_path / "out.onnx", Options(level="quick")).passed
