"""Fused attention operators are divided by their steps where their operands hold several levels, and kept elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
from helpers import (
    Given,
    Graph,
    assert_same_scores,
    candidate,
    feeds,
    optimised,
    patterns,
    refusals,
    request,
    rewritten,
    rules,
    run,
    session,
    whole_numbers,
)
from onnx import ModelProto, helper

import onnxrank
from onnxrank import operators
from onnxrank.errors import ModelError
from onnxrank.feeds import describe
from onnxrank.forms import Form
from onnxrank.fused import OPERATORS, Unsupported
from onnxrank.model import load
from onnxrank.operators.products import matmul_order
from onnxrank.passes import choosing
from onnxrank.roles import resolve
from onnxrank.study import Study

MS = "com.microsoft"
USERS, ITEMS, D = 5, 2, 8
COUNT = USERS + ITEMS
KINDS = ["onnx", "onnx by heads", "multi-head", "multi-head with bias", "packed"]


def weight(g: Graph, *shape: int) -> str:
    return g.const(np.random.default_rng(len(g.initializers)).normal(0, 0.4, shape))


class Fused:
    """Fields `[N, 7, 8]`, five of them request-level, through a fused operator and a layer.

    Args:
        kind: The operator, and how it is used.
        levels: Which fields there are: `mixed`, `candidate`, or a `query` of the candidate on keys of the request.
        heads: Number of heads.
        mask: A tensor to add or select by, if the operator takes one.
        attrs: Further attributes.
    """

    def __init__(
        self, kind: str, levels: str = "mixed", heads: int = 2, mask: np.ndarray | None = None, **attrs: object
    ) -> None:
        self.g = g = Graph(23 if kind.startswith("onnx") else 17)
        self.given: list[Given] = [request("u", USERS, D), candidate("c", ITEMS, D)]
        u, c = (i.declare(g) for i in self.given)
        x = g.op("Concat", u, c, axis=1) if levels == "mixed" else c
        queries, keys = (c, u) if levels == "query" else (x, x)
        added = [] if mask is None else [g.const(mask, bool if mask.dtype == bool else np.float32)]
        if kind.startswith("packed"):
            more = ["", "", *added] if added else []
            y = g.op("Attention", x, weight(g, D, 3 * D), weight(g, 3 * D), *more, domain=MS, num_heads=heads, **attrs)
        else:
            q, k, v = (g.op("MatMul", t, weight(g, D, D)) for t in (queries, keys, keys))
            if kind == "onnx":
                y = g.op("Attention", q, k, v, *added, q_num_heads=heads, kv_num_heads=heads, **attrs)
            elif kind == "onnx by heads":
                split = (g.op("Reshape", t, g.ints(0, 0, heads, D // heads)) for t in (q, k, v))
                y = g.op("Attention", *(g.op("Transpose", t, perm=[0, 2, 1, 3]) for t in split), *added, **attrs)
                y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), g.ints(0, 0, D))
            else:
                bias = weight(g, 3 * D) if "bias" in kind else ""
                more = [bias, "", *added] if bias or added else []
                y = g.op("MultiHeadAttention", q, k, v, *more, domain=MS, num_heads=heads, **attrs)
        y = g.op("Tanh", g.on_axes("ReduceSum", y, [1], keepdims=0))
        if levels != "mixed":
            y = g.op("Add", y, g.on_axes("ReduceSum", u, [1], keepdims=0))
        g.output(g.op("MatMul", y, weight(g, D, 3)), ["N", 3])

    def model(self) -> ModelProto:
        model = self.g.model()
        try:
            session(model)
        except Exception:
            pytest.skip("onnxruntime has no such operator here")
        return model


@contextmanager
def forced() -> Iterator[None]:
    """Takes the form with the attention rule and most nodes to start from, whatever it costs."""

    def seconds(self: Form, *_: object) -> float:
        return -float(self.uses("attention")) * len(self.study.model.graph.node)

    with mock.patch.object(Form, "seconds", seconds):
        yield


def divided(made: Fused, **options: object) -> onnxrank.Result:
    """Optimised with the steps written out, and held against the original."""
    model = made.model()
    with forced(), mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = rewritten(model, request=patterns(made.given), **options)
    assert_same_scores(model, result, made.given, counts=(1, 2, 5), tolerance=2e-5)
    return result


def study_of(made: Fused) -> Study:
    model = made.model()
    return Study(model, resolve(describe(model), request=patterns(made.given)), load(model))


def outputs(model: ModelProto) -> list[str]:
    return [n.output[0] for n in model.graph.node if n.op_type in OPERATORS]


MASKS = {
    "none": None,
    "added": np.where(np.random.default_rng(7).random((COUNT, COUNT)) < 0.4, -3, 0).astype(np.float32),
    "hidden": np.where(np.eye(COUNT, k=1) + np.eye(COUNT, k=3) > 0, -np.inf, 0).astype(np.float32),
    "true or false": ~(np.eye(COUNT, k=1) + np.eye(COUNT, k=3) > 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_levels_of_fields(kind: str, mask: str, heads: int) -> None:
    """Self-attention over fields of both levels is divided, whatever the operator and the mask."""
    data = MASKS[mask]
    if data is not None and not kind.startswith("onnx"):
        if data.dtype == bool:
            pytest.skip("this operator's mask is added")
        data = data[None, None]
    result = divided(Fused(kind, heads=heads, mask=data))
    assert "attention" in rules(result) and not outputs(result.model)
    assert result.report.macs_after < result.report.macs_before


@pytest.mark.slow
def test_contradictions_of_what_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator whose steps are misjudged stays as it is, and the report says why."""
    made = Fused("multi-head")
    wrong = operators.Operator(lambda use: [[*use.shape(0)[:-1], 99]])
    monkeypatch.setitem(operators.REGISTRY, "Softmax", wrong)
    with pytest.raises(ModelError, match="an error of onnxrank"):
        study_of(made).written_out(outputs(made.model()))
    result = divided(made)
    assert outputs(result.model)
    assert any("left as it is" in note and "an error of onnxrank" in note for note in result.report.notes)


@pytest.mark.parametrize("kind", KINDS)
def test_causal(kind: str) -> None:
    """The operator's own causal mask: the history does not see the candidate."""
    attrs = {"is_causal": 1} if kind.startswith("onnx") else {"unidirectional": 1}
    result = divided(Fused(kind, **attrs))
    assert not outputs(result.model)


@pytest.mark.parametrize("kind", KINDS)
def test_scale(kind: str) -> None:
    """A scale of the model's own."""
    divided(Fused(kind, scale=0.3))


@pytest.mark.parametrize("kind", ["onnx", "onnx by heads", "multi-head", "multi-head with bias"])
def test_queries_of_the_candidate(kind: str) -> None:
    """Keys and values of the request: projected once."""
    result = divided(Fused(kind, "query"))
    assert not outputs(result.model) and "attention" in rules(result)


@pytest.mark.parametrize("kind", ["multi-head", "packed"])
def test_padding(kind: str) -> None:
    """A mask of keys, `[N, keys]`, 1 for those that count."""
    g = Graph(17)
    given = [request("u", USERS, D), candidate("c", ITEMS, D), request("ids", COUNT, ids=2)]
    u, c, ids = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1)
    kept = g.op("Cast", g.op("Less", ids, g.const(1, np.int64)), to=6)
    if kind == "packed":
        y = g.op("Attention", x, weight(g, D, 3 * D), weight(g, 3 * D), kept, domain=MS, num_heads=2)
    else:
        q, k, v = (g.op("MatMul", x, weight(g, D, D)) for _ in range(3))
        y = g.op("MultiHeadAttention", q, k, v, "", kept, domain=MS, num_heads=2)
    g.output(g.op("MatMul", g.on_axes("ReduceSum", y, [1], keepdims=0), weight(g, D, 3)), ["N", 3])
    made = Fused.__new__(Fused)
    made.g, made.given = g, given
    assert not outputs(divided(made).model)


@pytest.mark.parametrize("kind", KINDS)
def test_written_out(kind: str) -> None:
    """The steps give what the operator gives, on any inputs, and nothing else of the model changes."""
    made = Fused(kind, mask=None if kind == "packed" else MASKS["added"][None, None], scale=0.4)
    study = study_of(made)
    out = study.written_out(outputs(study.model)).model
    assert not outputs(out)
    own = {n.SerializeToString() for n in out.graph.node}
    assert all(n.SerializeToString() in own for n in study.model.graph.node if n.op_type not in OPERATORS)
    for n in (1, 4):
        old, _ = feeds(made.given, n, seed=n)
        for name, want in run(study.model, old).items():
            np.testing.assert_allclose(run(out, old)[name], want, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_elsewhere(kind: str) -> None:
    """Where all operands are the candidate's there is nothing to divide."""
    made = Fused(kind, "candidate")
    result = rewritten(made.model(), request=patterns(made.given))
    assert len(outputs(result.model)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_left_out(kind: str) -> None:
    """Without the rule the operator stays."""
    made = Fused(kind)
    result = rewritten(made.model(), request=patterns(made.given), ignore=["attention"])
    assert len(outputs(result.model)) == 1


@pytest.mark.parametrize(
    ("kind", "attrs", "said"),
    [
        ("onnx", {"softcap": 2.0}, "softcap"),
        ("onnx", {"softmax_precision": 1}, "softmax_precision"),
    ],
)
def test_not_written_out(kind: str, attrs: dict[str, object], said: str) -> None:
    """What is not known is refused, and the note says why."""
    made = Fused(kind, **attrs)
    study = study_of(made)
    with pytest.raises(Unsupported, match=said):
        study.written_out(outputs(study.model))
    result = rewritten(made.model(), request=patterns(made.given))
    assert len(outputs(result.model)) == 1
    assert any(said in note and "fused attention" in note for note in result.report.notes)


BLIND = np.arange(COUNT)[:, None] != np.full(COUNT, 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["added", "true or false"])
def test_rows_that_see_nothing(kind: str, how: str) -> None:
    """Operators differ in what they make of a row whose keys are all hidden: such masks are refused."""
    if how == "true or false" and not kind.startswith("onnx"):
        pytest.skip("this operator's mask is added")
    data = BLIND if how == "true or false" else np.where(BLIND, 0, -np.inf).astype(np.float32)
    made = Fused(kind, mask=data if kind.startswith("onnx") else data[None, None])
    study = study_of(made)
    with pytest.raises(Unsupported, match="hides all keys"):
        study.written_out(outputs(study.model))


@pytest.mark.parametrize("kind", ["onnx", "onnx by heads"])
def test_computed_mask(kind: str) -> None:
    """A mask that depends on an input may hide all keys of a row."""
    made = Fused(kind, mask=MASKS["added"])
    (node,) = (n for n in made.g.nodes if n.op_type == "Attention")
    mask = made.g.op("Mul", node.input[3], made.g.op("ReduceMax", "u", keepdims=0))
    made.g.nodes.insert(made.g.nodes.index(node), made.g.nodes.pop())
    made.g.nodes.insert(made.g.nodes.index(node) - 1, made.g.nodes.pop())
    node.input[3] = mask
    study = study_of(made)
    with pytest.raises(Unsupported, match="computed"):
        study.written_out(outputs(study.model))


@pytest.mark.parametrize("kind", ["onnx", "onnx by heads"])
def test_float64_agrees(kind: str) -> None:
    """The whole check passes: algebra in float64, rounding, ranking."""
    made = Fused(kind, mask=MASKS["added"])
    with forced(), mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(made.model(), request=patterns(made.given), check=True)
    assert result.changed and all(c.passed for c in result.report.checks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "packed"])
def test_data_in_another_file(kind: str, tmp_path: Path) -> None:
    """A mask and weights that lie beside the model are found there."""
    made = Fused(kind, mask=MASKS["hidden"] if kind.startswith("onnx") else MASKS["hidden"][None, None])
    path = tmp_path / "model.onnx"
    onnx.save(made.model(), path, save_as_external_data=True, location="model.data", size_threshold=128)
    with forced(), mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = onnxrank.optimize(path, request=patterns(made.given), check=True)
    assert result.changed and not outputs(result.model)


# --- what onnxruntime's optimiser makes of several operators ---------------------------------------------------------

GEMM = {"activation": "Relu", "transB": 1}
MADE = {
    "gemm": ("FusedGemm", GEMM),
    "sigmoid": ("FusedGemm", {"activation": "Sigmoid"}),
    "leaky": ("FusedGemm", {"activation": "LeakyRelu", "activation_alpha": 0.25}),
    "matmul": ("FusedMatMul", {"alpha": 0.5}),
    "turned": ("FusedMatMul", {"transB": 1}),
    "norm": ("SkipLayerNormalization", {"epsilon": 1e-5}),
}
LOOSE = {"sigmoid": 1e-6, "norm": 2e-5}


def saved(kind: str, levels: str = "mixed", **more: object) -> tuple[Graph, list[Given]]:
    """One such operator between a Concat of both levels and a layer."""
    op, attrs = MADE[kind]
    g = Graph(17)
    given = [request("u", USERS), candidate("c", ITEMS)]
    u, c = (i.declare(g) for i in given)
    x = {"mixed": lambda: g.op("Concat", u, c, axis=1), "request": lambda: u, "candidate": lambda: c}[levels]()
    width = {"mixed": COUNT, "request": USERS, "candidate": ITEMS}[levels]
    shape = (D, width) if attrs.get("transB") else (width, D)
    if op == "SkipLayerNormalization":
        w = [g.op("Mul", x, g.const(2)), *(g.const(whole_numbers(width)) for _ in range(3))]
    else:
        w = [g.const(whole_numbers(*shape)), *([g.const(whole_numbers(D))] if op == "FusedGemm" else [])]
    y = g.op(op, x, *w, domain=MS, **{**attrs, **more})
    y = g.op("MatMul", y, g.const(whole_numbers(width if op == "SkipLayerNormalization" else D, 2)))
    g.output(y if levels == "mixed" else g.op("Add", y, g.on_axes("ReduceSum", c, [1], keepdims=1)), ["N", 2])
    return g, given


@contextmanager
def written() -> Iterator[None]:
    """Takes the form with most nodes to start from, whatever it costs."""
    with mock.patch.object(Form, "seconds", lambda self, *_: -float(len(self.study.model.graph.node))):
        yield


@pytest.mark.parametrize("kind", MADE)
def test_saved_by_the_runtime(kind: str) -> None:
    """Its operators are divided as those that they were made of."""
    g, given = saved(kind)
    with written():
        result = optimised(g, given, tolerance=LOOSE.get(kind, 0), counts=(1, 2, 5, 101))
    assert not outputs(result.model) and ("broadcast" if kind == "norm" else "fc") in rules(result)


@pytest.mark.parametrize("levels", ["request", "candidate"])
@pytest.mark.parametrize("kind", MADE)
def test_saved_by_the_runtime_of_one_level(kind: str, levels: str) -> None:
    """They are kept as they are, on one row where they are the request's."""
    g, given = saved(kind, levels)
    result = optimised(g, given, tolerance=LOOSE.get(kind, 0))
    assert len(outputs(result.model)) == 1 and not [r for r in refusals(result) if "not known" in r]
    assert ("broadcast" in rules(result)) == (levels == "request")


def test_unknown_activation() -> None:
    """It is kept, on all rows, with a note; what stands beside it is divided."""
    g, given = saved("gemm", activation="Softplus")
    other = g.op(
        "FusedGemm", "concat_1", g.const(whole_numbers(D, COUNT)), g.const(whole_numbers(D)), domain=MS, **GEMM
    )
    g.output(g.op("MatMul", other, g.const(whole_numbers(D, 2))), ["N", 2])
    with written():
        result = optimised(g, given, tolerance=1e-6)
    assert len(outputs(result.model)) == 1
    assert any("Softplus" in note for note in result.report.notes)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("turned", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_transposed_stacks(turned: tuple[int, int], batch: int) -> None:
    """Rows of candidates in the first axis or, moved there by the operator, in the second; against onnxruntime."""
    g, given = Graph(17), [request("u", 3, 4), candidate("c", 3, 4)]
    u, c = (i.declare(g) for i in given)
    order = matmul_order(helper.make_node("FusedMatMul", [], [], transA=turned[0], transBatchA=batch), 0, 3)
    a = g.op("Transpose", g.op("Add", u, c), perm=list(np.argsort(order)))  # [N, 3, 4], as the operator takes it
    b = g.op("Transpose", g.op("Mul", u, g.const(2)), perm=[0, 1, 2] if turned[1] else [0, 2, 1])
    y = g.op("FusedMatMul", a, b, domain=MS, transA=turned[0], transB=turned[1], transBatchA=batch, alpha=0.5)
    g.output(y, ["N", 3, 3])
    kept = optimised(g, given, counts=(1, 2, 5, 33))
    with written():
        result = optimised(g, given, counts=(1, 2, 5, 33))
    assert not outputs(result.model) and kept.changed


def test_sum_that_is_read_too() -> None:
    """The sum before the normalisation may be an output of the operator."""
    g, given = Graph(17), [request("u", 4), candidate("c", 4)]
    u, c = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1)
    y, *_, total = g.ops("SkipLayerNormalization", 4, x, g.op("Relu", x), g.const(whole_numbers(8)), domain=MS)
    g.nodes[-1].output[1] = g.nodes[-1].output[2] = ""
    g.output(g.op("Add", *(g.op("MatMul", t, g.const(whole_numbers(8, 2))) for t in (y, total))), ["N", 2])
    with written():
        result = optimised(g, given, tolerance=2e-5)
    assert not outputs(result.model)


def rotary(
    domain: str, levels: str = "mixed", rank: int = 3, heads: int = 2, part: int = 0, **how: int
) -> tuple[Graph, list[Given]]:
    """Fields `[N, 7, 8]`, each turned by the angles of its position, before a layer."""
    g, given = Graph(23), [request("u", USERS, D), candidate("c", ITEMS, D)]
    u, c = (i.declare(g) for i in given)
    x = g.op("Concat", u, c, axis=1) if levels == "mixed" else u if levels == "request" else c
    count, half = {"mixed": COUNT, "request": USERS, "candidate": ITEMS}[levels], (part or D // heads) // 2
    angles = np.outer(np.arange(20), 0.3 ** np.arange(half))
    caches = [g.const(np.cos(angles)), g.const(np.sin(angles))]
    rows = g.op("Slice", g.op("Shape", x), g.ints(0), g.ints(2), g.ints(0))
    at = g.op("Expand", g.const(np.arange(count)[::-1] + 3, np.int64), rows)
    if rank == 4:
        x = g.op("Transpose", g.op("Reshape", x, g.ints(0, 0, heads, -1)), perm=[0, 2, 1, 3])
    more = (
        [at, *caches]
        if domain
        else [*caches, at]
        if how.pop("positions", 1)
        else [g.op("Gather", t, at) for t in caches]
    )
    attrs = {"num_heads": heads, "rotary_embedding_dim": part, **how}
    y = g.op("RotaryEmbedding", x, *more, **attrs, **({"domain": domain} if domain else {}))
    if rank == 4:
        y = g.op("Transpose", y, perm=[0, 2, 1, 3])
    y = g.op("MatMul", g.op("Reshape", y, g.ints(0, -1)), g.const(whole_numbers(count * D, 2)))
    g.output(
        y
        if levels != "request"
        else g.op("Add", y, g.op("ReduceMax", g.op("ReduceMax", c, g.ints(2)), g.ints(1), keepdims=0)),
        ["N", 2],
    )
    return g, given


@pytest.mark.parametrize(
    "how", [{}, {"interleaved": 1}, {"rank": 4}, {"part": 2}, {"positions": 0, "heads": 1}], ids=str
)
@pytest.mark.parametrize("domain", ["", MS])
def test_rotary_embedding(domain: str, how: dict[str, int]) -> None:
    """Positions of the request are turned once."""
    g, given = rotary(domain, **({k: v for k, v in how.items() if not domain or k != "positions"}))
    with written():
        result = optimised(g, given, tolerance=1e-5, counts=(1, 2, 5, 101))
    assert not [n for n in result.model.graph.node if n.op_type == "RotaryEmbedding"]
    assert result.report.macs_after < 0.4 * result.report.macs_before


@pytest.mark.parametrize("levels", ["request", "candidate"])
@pytest.mark.parametrize("domain", ["", MS])
def test_rotary_embedding_of_one_level(domain: str, levels: str) -> None:
    """It is kept as it is, on one row where it is the request's."""
    g, given = rotary(domain, levels)
    result = optimised(g, given, tolerance=1e-5)
    assert [n.op_type for n in result.model.graph.node].count("RotaryEmbedding") == 1
    assert ("broadcast" in rules(result)) == (levels == "request")


@pytest.mark.parametrize("how", [{"scale": 2.0}, {"offset": 1}], ids=str)
def test_rotary_embeddings_that_are_kept(how: dict[str, float]) -> None:
    """Positions that are an offset, and what a later version may do with a scale, are left alone with a note."""
    g, given = rotary(MS, **({"scale": 2.0} if "scale" in how else {}))
    if "offset" in how:
        (node,) = (n for n in g.nodes if n.op_type == "RotaryEmbedding")
        node.input[1] = g.ints(3)
    with written():
        result = optimised(g, given, tolerance=1e-5)
    assert any("RotaryEmbedding" in note for note in result.report.notes)


def test_plans_name_what_was_written_out() -> None:
    """And give the same bytes again."""
    g, given = saved("gemm")
    with written():
        first = rewritten(g.model(), request=patterns(given))
    assert any(s.op == "FusedGemm" for s in first.plan.written_out)
    again = onnxrank.optimize(g.model(), plan=first.plan)
    assert again.model.SerializeToString(deterministic=True) == first.model.SerializeToString(deterministic=True)
