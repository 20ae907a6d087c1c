"""`inspect` on real models, held against counts by running them and against what `optimize` then does."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import yaml
import yardstick
from coverage import Requests
from exports import every_export
from modelkit import graph, w
from onnx import helper

from onnxrank import cli, optimize
from onnxrank.errors import UsageError
from onnxrank.formats import INSPECT
from onnxrank.inspection.engine import dims_text, explain, inspect
from onnxrank.inspection.render import print_explanation, print_inspection
from onnxrank.inspection.report import Inspection
from onnxrank.roles import load_spec
from onnxrank.scopes import scope_of
from onnxrank.writers import as_text, to_json

ROOT = Path(__file__).resolve().parents[3]
MODELS = ROOT / "models" / "onnx"
SCHEMA = json.loads((ROOT / "onnxrank" / "inspect.schema.json").read_text())
N = 37


def roles(name: str) -> Path:
    return MODELS / f"{name.split('.')[0]}.roles.yaml"


def counted_apart(name: str) -> None:
    """Stops a test of a model whose sequences are taken apart: its counts are those of the segments."""
    if name.startswith(("hstu", "onetrans")):
        pytest.xfail("inspect counts the model as it is after its sequences are taken apart")


@cache
def found(name: str, candidates: int = N) -> Inspection:
    return inspect(MODELS / name, spec=load_spec(roles(name)), candidates=candidates, lifts=False)


def counted(model: Any, feed: Any) -> int:
    """Multiply-adds of products, convolutions, attention and recurrent layers, by running the model."""
    trace = yardstick.Trace(model)
    return yardstick.count(trace, feed)


def requests(name: str) -> Requests:
    return Requests(onnx.load(MODELS / name), yaml.safe_load(roles(name).read_text()))


@pytest.mark.slow
@every_export
def test_macs_are_those_that_a_run_counts(name: str) -> None:
    shown = found(name)
    before, _ = requests(name)(N, 0)
    counted_apart(name)
    assert shown.macs_before == counted(MODELS / name, before)
    assert sum(n.macs for n in shown.nodes) == shown.layers[0].macs == shown.macs_before
    joined = any(o.startswith("lookup/") for n in shown.nodes for o in n.outputs)  # nodes are those that rules see
    if not joined:
        assert sum(n.parameters for n in shown.nodes) == sum(c.parameters for c in shown.before.values())
        assert sum(n.bytes for n in shown.nodes) == sum(c.bytes for c in shown.before.values())


@pytest.mark.slow
@every_export
def test_the_predicted_saving_is_what_optimize_achieves(name: str) -> None:
    shown = found(name)
    made = optimize(MODELS / name, spec=load_spec(roles(name)), candidates=N)
    assert made.report.macs_after == shown.macs_after and made.changed == bool(shown.result)
    before, after = requests(name)(N, 0)
    assert shown.macs_after == counted(made.model, after if made.changed else before)
    assert [(r.rule, r.reason) for r in shown.refusals] == sorted(
        {(r.rule, r.reason): None for r in made.report.refusals},
        key=[(r.rule, r.reason) for r in shown.refusals].index,
    )
    if made.changed:
        assert [n.name for n in shown.result] == [n.name for n in made.model.graph.node]
        assert sum(n.macs for n in shown.result) == shown.macs_after
        assert sum(o.macs for o in shown.opportunities) >= sum(n.saved for n in shown.nodes)


@pytest.mark.slow
# Of din, a run takes the entries of padding, which are always zero, for unknown; of wukong, a few behind its norms.
@every_export
def test_block_ideal(name: str) -> None:
    draw = requests(name)
    trace = yardstick.Trace(MODELS / name)
    once, each = yardstick.block_ideal(trace, lambda n, seed: draw(n, seed)[0])
    counted_apart(name)
    rel = 0.04 if name.startswith("din") else 0.01 if name.startswith("wukong") else 1e-3
    assert found(name).ideal.macs == pytest.approx(once + N * each, rel=rel)


@pytest.mark.parametrize("name", ["dlrm.dynamo.onnx", "din.torchscript.onnx", "history_transformer.dynamo.onnx"])
def test_levels_are_seen(name: str) -> None:
    """No tensor, and no block, is called the same for all candidates that a run sees to differ."""
    shown = found(name)
    model = onnx.load(MODELS / name)
    names = [t.name for t in shown.tensors if t.level != "constant" and t.dims[:1] == ("N",)]
    made = {o for n in model.graph.node for o in n.output}
    have = {o.name for o in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(o) for o in names if o in made - have)
    from onnxrank import runtime

    values = runtime.run(runtime.session(model), requests(name)(N, 3)[0])
    seen = 0
    for t in shown.tensors:
        data = values.get(t.name)
        if data is None or t.dims[:1] != ("N",):
            continue
        same = np.isclose(data, data[:1], rtol=1e-4, atol=1e-6, equal_nan=True).all(0)
        if t.level in ("request", "constant"):
            assert same.all(), t
            seen += 1
        for b in t.blocks:
            if b.level in ("request", "constant") and b.axis > 0:
                part = np.take(same, _positions(b.positions), b.axis - 1)
                assert part.all(), (t, b)
                seen += 1
    assert seen >= 5


def _positions(text: str) -> list[int]:
    out: list[int] = []
    for part in text.split(","):
        first, _, end = part.partition(":")
        out += range(int(first), int(end) if end else int(first) + 1)
    return out


@pytest.mark.slow
@every_export
def test_schema(name: str) -> None:
    form = json.loads(to_json(found(name)))
    jsonschema.validate(form, SCHEMA)
    assert set(form) == set(SCHEMA["properties"])


def test_schema_describes_every_field() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for part in (SCHEMA, *SCHEMA["$defs"].values()):
        for name, field in part["properties"].items():
            assert field["description"], name


def two_context_inputs() -> Any:
    """A layer on `[u | ctx | item]` of 8, 16 and 8 columns, into one score."""
    model = graph(
        "(float[N,8] u, float[N,16] ctx, float[N,8] item) => (float[N,1] y) "
        "{ c = Concat<axis=1>(u, ctx, item) h = MatMul(c, W) r = Relu(h) y = MatMul(r, V) }",
        W=w(32, 512),
        V=w(512, 1),
    )
    return model


def test_what_declaring_an_input_would_save() -> None:
    """`ctx` has twice the columns of `u`; declaring it saves what optimize then saves beyond what it saves now."""
    shown = inspect(two_context_inputs(), request=["u"], candidates=512)
    gains = {i.name: i.gain for i in shown.inputs}
    then = inspect(two_context_inputs(), request=["u", "ctx"], candidates=512)
    assert gains["u"] is None
    assert gains["ctx"] == pytest.approx((shown.macs_after - then.macs_after) / shown.macs_before)
    assert gains["ctx"] == pytest.approx(2 * gains["item"], rel=1e-6) and gains["ctx"] > 0.4


def test_what_would_lift_a_refusal() -> None:
    """A normalisation of `u` and `ctx` together: of two levels, until `ctx` is request-level too."""
    text = (
        "(float[N,24] u, float[N,24] ctx, float[N,24] item) => (float[N,1] y) {"
        "c = Concat<axis=1>(u, ctx) s = LayerNormalization<axis=-1>(c, G) t = Tanh(s)"
        "d = Concat<axis=1>(t, item) h = MatMul(d, W) r = Relu(h) y = MatMul(r, V) }"
    )
    model = graph(text, W=w(72, 512), V=w(512, 1), G=np.ones(48, np.float32))
    (refused,) = inspect(model, request=["u"]).refusals
    assert (refused.rule, refused.nodes) == ("norm", ("s",)) and refused.lift.startswith("declare ctx request-level")
    assert not any(r.rule == "norm" for r in inspect(model, request=["u", "ctx"]).refusals)


def test_nothing_lifts_an_operator_that_mixes_rows() -> None:
    model = graph(
        "(float[N,8] u, float[N,8] ctx, float[N,8] item) => (float[N,64] y) "
        "{ s = CumSum(u, zero) c = Concat<axis=1>(s, ctx, item) y = MatMul(c, W) }",
        W=w(24, 64),
        zero=np.array(0, np.int64),
    )
    refusals = inspect(model, request=["u"]).refusals
    assert any(r.nodes == ("s",) for r in refusals) and not any(r.lift for r in refusals if r.nodes == ("s",))


def test_nothing_declared() -> None:
    shown = inspect(two_context_inputs())
    assert not shown.result and shown.macs_after == shown.macs_before
    assert {i.role for i in shown.inputs} == {"candidate"} and "candidate-level" in shown.notes[0]
    assert all(i.gain is not None and i.gain > 0.1 for i in shown.inputs)


def test_more_candidates_are_needed() -> None:
    model = two_context_inputs()
    shown = inspect(model, request=["u"], candidates=2, lifts=False)
    assert not shown.result
    (note,) = [n for n in shown.notes if "would pay from about" in n]
    at = int(note.split("about ")[1].split()[0])
    assert inspect(model, request=["u"], candidates=4 * at, lifts=False).result


def test_blocks() -> None:
    shown = inspect(two_context_inputs(), request=["u"], lifts=False)
    c = next(t for t in shown.tensors if t.name == "c")
    assert c.level == "mixed" and c.once == 0.25 and c.dims == ("N", "32")
    assert [(b.axis, b.positions, b.level) for b in c.blocks] == [(1, "0:8", "request"), (1, "8:32", "candidate")]
    levels = {t.name: t.level for t in shown.tensors}
    assert (levels["u"], levels["item"], levels["h"], levels["y"]) == ("request", "candidate", "candidate", "candidate")


def test_tables_and_sequences() -> None:
    shown = found("din.torchscript.onnx")
    tables = {t.name: t for t in shown.tables}
    assert {t.level for t in shown.tables} == {"request", "mixed"}
    shared = next(t for t in shown.tables if t.level == "mixed")
    assert {"hist_ids", "item_id"} <= set(shared.inputs) or {"hist_categories", "item_category"} <= set(shared.inputs)
    assert N < shared.needed < shared.lookups and shared.bytes == 4 * shared.rows * shared.width
    sequence = next(s for s in shown.sequences if s.input == "hist_ids")
    assert sequence.level == "request" and sequence.length > 1 and set(sequence.tables) <= set(tables)
    gru = found("gru_history.dynamo.onnx").sequences
    assert any("GRU" in s.readers for s in gru)


def test_refusals_name_their_nodes() -> None:
    shown = found("autoint.torchscript.onnx")
    assert shown.refusals
    names = {n.name for n in shown.nodes}
    assert all(r.reason and set(r.nodes) <= names for r in shown.refusals)


@pytest.mark.slow
@every_export
def test_refusals_by_cost(name: str) -> None:
    """What costs most comes first, and no place that is left alone is missing."""
    shown = found(name)
    costs = [(r.lost, r.macs) for r in shown.refusals]
    assert costs == sorted(costs, reverse=True)
    made = optimize(MODELS / name, spec=load_spec(roles(name)), candidates=N, check=False)
    assert sum(r.lost for r in shown.refusals) == sum(r.lost for r in made.report.refusals)
    assert {n for r in shown.refusals for n in r.nodes} == {r.node for r in made.report.refusals} - {""}


# --- one tensor ----------------------------------------------------------------------------------------------------


def test_explain_candidate_level() -> None:
    shown = found("dlrm.torchscript.onnx")
    told = explain(shown, "/top/top.0/Gemm")
    assert told.tensor.level == "candidate" and told.node is not None and told.node.op == "Gemm"
    assert told.chain[0].tensor.startswith("item_") and told.chain[-1].tensor == told.tensor.name
    made = {o: n for n in shown.nodes for o in n.outputs}
    for before, after in zip(told.chain, told.chain[1:], strict=False):
        assert before.tensor in made[after.tensor].inputs and before.level in ("candidate", "mixed")
    assert told.chain[0].tensor in told.reason
    assert {i.role for i in told.inputs} == {"request", "candidate"}


def test_explain_request_level() -> None:
    told = explain(found("dlrm.torchscript.onnx"), "/bottom/bottom.0/Gemm_output_0")
    assert told.tensor.level == "request" and told.chain[0].tensor == "user_dense"
    assert "request-level" in told.reason and [i.name for i in told.inputs] == ["user_dense"]


def test_explain_mixed_and_inputs() -> None:
    shown = inspect(two_context_inputs(), request=["u"], lifts=False)
    assert "and others" in explain(shown, "c").reason
    assert explain(shown, "u").chain[0].tensor == "u"
    told = explain(shown, "item")
    assert told.node is None and told.tensor.level == "candidate"


def test_explain_what_mixes_rows() -> None:
    model = graph(
        "(float[N,8] u, float[N,8] item) => (float[N,8] y) { p = CumSum(u, zero) y = Mul(p, item) }",
        zero=np.array(0, np.int64),
    )
    told = explain(inspect(model, request=["u"], lifts=False), "p")
    assert told.tensor.level == "candidate" and told.chain[0].op == "CumSum"
    assert "not known to treat rows independently" in told.reason


def test_explain_nothing() -> None:
    with pytest.raises(UsageError, match=r"no node or tensor 'item_'.*item_0"):
        explain(found("dlrm.torchscript.onnx"), "item_")


# --- scopes and dims -----------------------------------------------------------------------------------------------


def test_scopes() -> None:
    node = helper.make_node("Relu", ["a"], ["b"], name="/top/top.1/Relu")
    assert scope_of(node) == ("top", "top.1")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'deep', 'deep.4', 'linear_5']")
    assert scope_of(node) == ("deep", "4")
    node.metadata_props[0].value = "not a list ["
    assert scope_of(node) == ("top", "top.1")
    assert scope_of(helper.make_node("Relu", ["a"], ["b"])) == ()


def test_a_product_of_no_entries() -> None:
    """A layer on the tokens before the first, of which there are none."""
    model = graph(
        """(float[N,4] user, float[N,4] item) => (float[N,1] y) {
            tokens = Unsqueeze(user, axis)
            before = Slice(tokens, first, first, axis)
            left = MatMul(before, W)
            sums = ReduceSum<keepdims = 0>(left, axis)
            x = Add(sums, item)
            y = MatMul(x, V)
        }""",
        W=w(4, 4), V=w(4, 1), axis=np.array([1], np.int64), first=np.array([0], np.int64),
    )  # fmt: skip
    assert inspect(model, request=["user"], lifts=False).ideal.each == 4


def test_dims_text() -> None:
    assert dims_text([(1, ("N",)), (50, ("N",)), (64, ()), (1, ()), (1, ("S:length",)), (1, ("N~2+1",))]) == (
        "N", "50*N", "64", "1", "length", "?",
    )  # fmt: skip


# --- terminal and command ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("name", ["dlrm.dynamo.onnx", "din.torchscript.onnx", "history_transformer.torchscript.onnx"])
def test_fits_80_columns(name: str, encoding: str, verbose: bool) -> None:
    shown = found(name, 512)
    text = as_text(lambda console: print_inspection(shown, console, verbose), encoding, 80)
    names = [shown.source or "", *(n.name for n in shown.nodes)]
    long = [line for line in text.splitlines() if len(line) > 80 and not any(n in line for n in names)]
    assert not long and "\x1b" not in text and text.encode(encoding)
    for words in ("Inputs", "Costs by level", "block ideal", "Layers", "Best opportunities", "Embedding tables"):
        assert words in text, words


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_explanation_on_a_terminal(encoding: str) -> None:
    told = explain(found("dlrm.torchscript.onnx"), "/Concat")
    text = as_text(lambda console: print_explanation(told, console), encoding, 80)
    assert "Why" in text and "level mixed" in text and "axis 1, positions" in text and "Inputs behind it" in text


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, spec = str(MODELS / "dlrm.torchscript.onnx"), str(roles("dlrm"))
    targets = [f"--report={form}:{tmp_path / ('i.' + form)}" for form in INSPECT.names]
    assert cli.main(["inspect", model, "--roles", spec, "--candidates", "64..4096", *targets]) == 0
    assert "optimize would save" in capsys.readouterr().out
    assert json.loads((tmp_path / "i.json").read_text())["candidates"] == [64, 4096]
    assert "Layers" in (tmp_path / "i.text").read_text() and "<canvas" in (tmp_path / "i.html").read_text()
    assert cli.main(["inspect", model, "--roles", spec, "--node", "/Concat"]) == 0
    assert "Why" in capsys.readouterr().out
    assert cli.main(["inspect", model, "--roles", spec, "--node", "nobody"]) == 2
    assert "no node or tensor 'nobody'" in capsys.readouterr().err
    assert cli.main(["inspect", model, "--select", "nothing"]) == 2
    assert cli.main(["inspect", model, "--report", f"html:{model}"]) == 2
    assert "would replace the model" in capsys.readouterr().err


def test_an_optimised_model(tmp_path: Path) -> None:
    fast = tmp_path / "fast.onnx"
    made = optimize(MODELS / "mmoe.dynamo.onnx", spec=load_spec(roles("mmoe")))
    made.save(fast)
    shown = inspect(fast, lifts=False)
    assert shown.optimised and shown.macs_before == made.report.macs_after == shown.macs_after
