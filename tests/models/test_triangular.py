"""Models that keep rank: masks, what is once per request in their exports at every depth, and conversion from DCNv2."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch

import onnxrank
from models import TRIANGULAR, build, roles
from models.dcn import DCNv2LowRank, DCNv2Mix, DCNv2Parallel, DCNv2Stacked
from models.layers import initialise
from models.rdcn import RDCNStacked, TriangularCross, from_dcnv2
from models.spec import InputSpec
from models.triangular import field_levels, triangular
from scripts.export_models import arguments, check, export_dynamo, export_torchscript

EXPORTERS = {"torchscript": export_torchscript, "dynamo": export_dynamo}
# Sizes of which no two layers have the same, so that sums of multiply-adds tell them apart.
CROSS = dict(user=5, item=3, vocab=20, dim=4)


def _optimised(model, exporter: str, n: int = 512) -> onnxrank.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = EXPORTERS[exporter](model, model.specs)
    check(made, model, model.specs)
    return onnxrank.optimize(made, spec=roles(model.specs), candidates=n)


def _costs(result: onnxrank.Result, n: int = 512) -> tuple[int, float]:
    """Multiply-adds of the optimised model once per request and per candidate, by the optimiser's own count."""
    assert result.changed
    after = result.report.after
    return after["request"].macs, after["candidate"].macs / n


# --- masks --------------------------------------------------------------------------------------------------------


def test_a_mask_is_block_triangular_once_context_comes_first() -> None:
    mask = triangular(["request", "request", "candidate"], [2, 1, 2])
    assert mask.int().tolist() == [[1, 1, 1, 0, 0]] * 3 + [[1] * 5] * 2
    mixed = triangular(["candidate", "request"], 2)
    assert mixed.int().tolist() == [[1, 1, 1, 1]] * 2 + [[0, 0, 1, 1]] * 2
    assert triangular(["request"] * 3).all()


def test_levels_of_inputs() -> None:
    specs = [
        InputSpec("item_0", "int64", ("N",), "candidate", 0, 9),
        InputSpec("user_ids", "int64", ("N", 2), "request", 0, 9),
        InputSpec("packed", "int64", ("N", 4), "mixed", 0, 9, request_columns="0,2:4"),
    ]
    found = field_levels(specs)
    assert [level[0] for level in found] == list("crrrcrr")


def test_bad_features() -> None:
    with pytest.raises(ValueError, match="mixed"):
        triangular(["request", "mixed"])
    with pytest.raises(ValueError, match="3 widths for 2"):
        triangular(["request", "candidate"], [1, 2, 3])


def test_the_mask_on_dcnv2_is_rdcn() -> None:
    """DCNv2 with its matrices masked gives what the divided layers give."""
    torch.manual_seed(0)
    model = DCNv2Stacked(hidden=(6,), layers=3, **CROSS)
    initialise(model, 0)
    order = ["request" if level == "user" else "candidate" for level, _ in model.fields.order]
    for layer in model.cross:
        layer.weight.data *= triangular(order, CROSS["dim"])
    made = from_dcnv2(model)
    feed = arguments(model.specs, 9)
    torch.testing.assert_close(made(*feed), model(*feed), rtol=1e-5, atol=1e-6)


# --- what is once per request -------------------------------------------------------------------------------------


slow = pytest.mark.slow
# Both exporters at every depth; the default run has one of them.
CROSSES = [
    pytest.param(e, depth, rank, marks=[] if (e, depth, rank) == ("torchscript", 3, 0) else slow)
    for e in EXPORTERS
    for depth in (1, 2, 3, 4)
    for rank in (0, 3)
]
DEPTHS = [pytest.param(e, k, marks=[] if (e, k) == ("torchscript", 2) else slow) for e in EXPORTERS for k in (1, 2, 3)]


@pytest.mark.parametrize(("exporter", "layers", "rank"), CROSSES)
def test_cross_layers_have_the_context_once(exporter: str, layers: int, rank: int) -> None:
    c, t = 20, 12
    model = RDCNStacked(hidden=(), rank=rank, layers=layers, **CROSS)
    initialise(model, 0)
    once, each = _costs(_optimised(model, exporter))
    # What a candidate asks for is t W_tt of every layer, and its part of the linear unit.
    assert each == layers * (2 * t * rank if rank else t * t) + t
    # Once: c W_cc and c W_ct of every layer, the context's part of the linear unit.
    assert once == layers * (3 * c * rank if rank else c * (c + t)) + c


@pytest.mark.slow
def test_two_thirds_of_the_cross_network_go_at_four_fields_of_seven() -> None:
    """The paper's claim, by the optimiser's count: 67 % fewer multiply-adds per candidate than DCNv2 has."""
    width, its, layers = 7 * 4, 4 * 4, 3
    model = RDCNStacked(hidden=(), layers=layers, user=3, item=4, vocab=20, dim=4)
    initialise(model, 0)
    _, each = _costs(_optimised(model, "torchscript"))
    assert (each - its) / (layers * width * width) <= 1 - 0.67


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "blocks"), DEPTHS)
def test_attention_has_context_tokens_once(exporter: str, blocks: int) -> None:
    user, item, dim, inner = 5, 3, 8, 8
    model, _ = build("triangular_autoint", layers=blocks)
    once, each = _costs(_optimised(model, exporter))
    # Query, key, value and residual of the candidate's tokens; their scores and sums over all keys; the linear unit.
    assert each == blocks * (item * 4 * dim * inner + 2 * item * (user + item) * inner) + item * inner
    assert once >= blocks * user * 4 * dim * inner


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "blocks"), DEPTHS)
def test_token_mixing_has_context_tokens_once(exporter: str, blocks: int) -> None:
    model, _ = build("triangular_rankmixer", blocks=blocks)
    once, each = _costs(_optimised(model, exporter))
    tokens, width, group, hidden, tasks, factor = 2, 8, 8, 8, 2, 2
    own = tokens * (group * width + blocks * 2 * width * factor * width)  # of the tokens of either level
    assert each == own + tasks * (width * hidden + hidden)
    assert once == own


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIANGULAR)
@pytest.mark.parametrize("exporter", EXPORTERS)
def test_no_product_is_of_both_levels(name: str, exporter: str) -> None:
    """By levels of the optimised graph: a product is once per request as a whole, or of candidates as a whole."""
    result = _optimised(build(name)[0], exporter)
    analysis = onnxrank.analyse(result.model)
    assert not analysis.opaque
    products = [node for node in analysis.study.model.graph.node if node.op_type in ("MatMul", "Gemm", "Einsum")]
    assert any(analysis.is_once(node.output[0]) for node in products)
    for node in products:
        share = analysis.once_share(node)
        assert share == (1.0 if analysis.is_once(node.output[0]) else 0.0), node.name


# --- in place of DCNv2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DCNv2Parallel, DCNv2Stacked, DCNv2LowRank])
def test_a_converted_model_has_the_same_weights_but_one_block(kind: type) -> None:
    sizes = {**kind.scales["small"], "layers": 2}
    model = kind(**sizes)
    initialise(model, 0)
    made = from_dcnv2(model)
    assert [(s.name, s.shape) for s in made.specs] == [(s.name, s.shape) for s in model.specs]
    assert made.training == model.training
    feed = arguments(model.specs, 9)
    assert not torch.allclose(made(*feed), model(*feed))
    entries = torch.arange(model.width).view(-1, sizes["dim"])
    c, t = (entries[p].flatten() for p in (model.fields.user_positions, model.fields.item_positions))
    with torch.no_grad():
        for k in range(model.layers):
            if kind is DCNv2LowRank:  # the block has no weights of its own: the context's rows of the product read c
                continue
            model.cross[k].weight[c[:, None], t] = 0
    if kind is DCNv2LowRank:
        down, up = model.down, model.up

        def forward(*inputs):
            x0 = x = model.embed(inputs)
            for d, u in zip(down, up, strict=True):
                product = u.weight @ d.weight
                product[c[:, None], t] = 0
                x = x0 * (x @ product.T + u.bias) + x
            return torch.sigmoid(model.deep(x))

        torch.testing.assert_close(made(*feed), forward(*feed), rtol=1e-4, atol=1e-6)
    else:
        torch.testing.assert_close(made(*feed), model(*feed), rtol=1e-4, atol=1e-6)


def test_only_models_that_have_one_are_converted() -> None:
    model = DCNv2Mix(**DCNv2Mix.scales["small"])
    with pytest.raises(TypeError, match="DCNv2Mix"):
        from_dcnv2(model)


def test_the_control_has_no_term_across_levels() -> None:
    """Without blocks between levels, what a candidate adds does not depend on the context."""
    torch.manual_seed(0)
    cross = TriangularCross(6, 4, 3, across=False)
    c, t = torch.randn(5, 6), torch.randn(7, 4)
    one = [cross(c[i : i + 1].expand(7, 6), t)[1] for i in range(5)]
    assert all(torch.equal(a, b) for a, b in pairwise(one))
    full = TriangularCross(6, 4, 3)
    assert not torch.allclose(full(c[:1].expand(7, 6), t)[1], full(c[1:2].expand(7, 6), t)[1])
