"""`compress` from the file to the verdict, as command and as function: what it writes, refuses and reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

import onnxrank
from onnxrank.cli import main
from onnxrank.compress.engine import Options, compress
from onnxrank.compress.gate import Limits, Scores, judge
from onnxrank.compress.plan import Plan, Step
from onnxrank.compress.report import Report
from onnxrank.errors import ModelError, UsageError
from onnxrank.formats import COMPRESS, Style
from onnxrank.model import load
from onnxrank.network import Network
from onnxrank.packing import pack
from tests.support.modelkit import graph, session

ROOT = Path(__file__).resolve().parents[3]
DLRM = ROOT / "models" / "trained" / "dlrm.onnx"
ROLES = DLRM.with_suffix(".roles.yaml")
SCHEMA = json.loads((ROOT / "onnxrank" / "compress.schema.json").read_text())
QUICK = ("low-rank", "fp16", "pack")
LOOSE = Limits(loss=0.01)


def recorded(path: Path, requests: int, seed: int = 600, candidates: int = 16) -> Path:
    """Labelled requests of the trained DLRM."""
    from models.spec import InputSpec
    from scripts import planted

    model = onnx.load(DLRM)
    specs = []
    for i in model.graph.input:
        kind = i.type.tensor_type
        shape = ("N", *(d.dim_value for d in kind.shape.dim[1:]))
        specs.append(InputSpec(i.name, "int64" if kind.elem_type == 7 else "float32", shape, "candidate", 0, 60))
    specs.sort(key=lambda s: s.dtype)  # ids tell the world's size
    rows = planted.world_of(sorted(specs, key=lambda s: s.dtype == "float32")).requests(requests, candidates, seed)
    np.savez(path, **planted.recorded(specs, rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("data") / "requests.npz", 1200)


@pytest.fixture(scope="module")
def changed(data: Path) -> Callable[..., Path]:
    """Recorded requests with something changed."""

    def make(name: str, **arrays: Any) -> Path:
        with np.load(data) as held:
            both = {**held, **{k: f(dict(held)) for k, f in arrays.items()}}
        path = data.with_name(f"{name}.npz")
        np.savez(path, **both)
        return path

    return make


def options(**how: Any) -> Options:
    return Options(**{"labels": ("label",), "methods": QUICK, "limits": LOOSE, "choice": 4000, "seconds": 0.05, **how})


@pytest.fixture(scope="module")
def result(data: Path) -> onnxrank.compress.engine.Result:
    return compress(DLRM, data, options(size=1.7))


@pytest.mark.slow
def test_it_is_smaller_and_says_so(result: Any, data: Path, tmp_path: Path) -> None:
    report: Report = result.report
    assert result.passed and report.changed and report.stopped == "targets"
    out = tmp_path / "out.onnx"
    result.save(out)
    made = onnx.load(out)
    onnx.checker.check_model(made, full_check=True)
    assert DLRM.stat().st_size / out.stat().st_size == pytest.approx(report.ratios["size"], rel=0.06)
    assert report.ratios["size"] >= 1.7 and report.points[0].bytes == DLRM.stat().st_size
    with np.load(data) as held:
        feed = {i.name: held[i.name] for i in made.graph.input}
    before, after = (session(m).run(None, feed)[0] for m in (DLRM, out))
    assert 0 < float(np.abs(before - after).max()) < 0.2
    assert [o.name for o in made.graph.output] == ["score"]
    assert report.rows["calibration"] + report.rows["gate"] == 1200 * 16
    assert any(p.key == "onnxrank.compress" and "low-rank" in p.value for p in made.metadata_props)
    steps = {s for p in report.points for s in p.step.split(", ")}
    assert "pack" in steps and any(s.startswith("low-rank") for s in steps)
    rules = {p.value for n in made.graph.node for p in n.metadata_props if p.key == "onnxrank.compress"}
    assert rules <= {"low-rank", "fp16"} and rules


def test_reports(result: Any) -> None:
    form = json.loads(COMPRESS.render(result.report, "json"))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(form, SCHEMA)
    text = COMPRESS.render(result.report, "text")
    assert "smaller" in text and "as fast" in text and "AUC falls" in text and "passed, by labels" in text
    assert "Left alone" in COMPRESS.render(result.report, "text", Style(verbose=True))
    assert "| step | size |" in COMPRESS.render(result.report, "markdown")
    page = COMPRESS.render(result.report, "html")
    assert "<svg" in page and "the front" in page and "http://www.w3.org" in page
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 1  # only the policy's name
    assert all(len(line) <= 100 for line in text.splitlines())


def test_macs_are_those_of_the_layers(result: Any) -> None:
    first, last = result.report.points[0], result.report.points[-1]
    layers = [(8, 4), (64, 44), (64, 64), (1, 64)]
    assert first.macs == 512 * sum(a * b for a, b in layers)
    assert last.macs < first.macs and last.parameters < first.parameters


@pytest.mark.slow
def test_a_plan_does_the_same_again(result: Any, data: Path, tmp_path: Path) -> None:
    plan = result.report.plan
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    found = compress(DLRM, data, options(plan=again))
    assert found.passed and found.report.stopped == "plan"
    assert found.model.SerializeToString(deterministic=True) == result.model.SerializeToString(deterministic=True)


@pytest.mark.slow
def test_fewer_units_and_fewer_casts(data: Path) -> None:
    """Layers are as wide as units are left, whatever else is done to them, and one cast is behind all lookups."""
    base = Network(onnx.load(DLRM))
    pack(base)
    first, second = (p for p in base.products() if min(p.shape) > 8)
    steps = [Step(t.name, (("fp16-tables", 0),)) for t in base.tables()]
    steps += [Step(first.name, (("low-rank", 20), ("fp16", 0))), Step(f"units of {first.name}", (("units", 48),))]
    plan = Plan(load(DLRM).sha256, tuple(steps), pack=True)
    found = compress(DLRM, data, options(plan=plan, limits=Limits(0.2, 0.1)))
    assert found.passed, found.report.outcomes
    shapes = [p.shape for p in Network(found.model).products() if min(p.shape) > 8]
    assert shapes == [(first.shape[0], 20), (20, 48), (48, second.shape[1])]
    least = 512 * sum(a * b for a, b in shapes)
    assert found.report.points[-1].macs == least + 512 * sum(
        p.shape[0] * p.shape[1] for p in base.products() if min(p.shape) <= 8
    )
    (cast,) = [n for n in found.model.graph.node if n.op_type == "Cast" and "weight" not in n.input[0]]
    assert len(base.tables()) == 8 and cast.output[0] in {i for n in found.model.graph.node for i in n.input}


@pytest.mark.parametrize(
    ("data_", "message"),
    [
        ({"kind": "other"}, "no plan"),
        ({}, "no plan"),
        ({"kind": "onnxrank.compress.plan", "schema_version": 1, "model_sha256": "", "steps": 3}, "no plan"),
    ],
)
def test_plans_that_are_none(data_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Plan.from_dict(data_)


@pytest.mark.slow
def test_plans_of_others(result: Any, data: Path) -> None:
    plan = result.report.plan
    for wrong, message in (
        (Plan("0" * 64), "another model"),
        (Plan(plan.model_sha256, (Step("nowhere", (("fp16", 0),)),)), "'nowhere'"),
        (Plan(plan.model_sha256, (Step("/top/top.0/Gemm", (("magic", 0),)),)), "'magic'"),
        (Plan(plan.model_sha256, (Step("/top/top.0/Gemm", (("fp16-tables", 0),)),)), "not of the kind"),
    ):
        with pytest.raises(UsageError, match=message):
            compress(DLRM, data, options(plan=wrong))


def run(*args: object) -> int:
    return main([str(a) for a in args])


@pytest.mark.slow
def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page, plan = (tmp_path / n for n in ("out.onnx", "page.html", "plan.json"))
    code = run("compress", DLRM, out, "--data", data, "--labels", "label", "--roles", ROLES, "--size", "1.5x",
               "--max-loss", "0.01", "--methods", "fp16,fp16-tables", "--choice-rows", 2000, "--report", page,
               "--plan-out", plan)  # fmt: skip
    said = capsys.readouterr().out
    assert code == 0, said
    assert f"Written to {out}" in said and out.stat().st_size * 1.5 <= DLRM.stat().st_size and page.is_file()
    assert next(m for s in Plan.read(plan).steps for m, _ in s.chain).startswith("fp16")
    again = tmp_path / "again.onnx"
    code = run("compress", DLRM, again, "--data", data, "--labels", "label", "--max-loss", "0.01", "--choice-rows",
               2000, "--plan", plan, "-q", "--methods", "fp16,fp16-tables")  # fmt: skip
    assert code == 0 and again.read_bytes() == out.read_bytes()


def refused(capsys: pytest.CaptureFixture[str], out: Path, code: int, *args: object) -> str:
    assert run("compress", DLRM, out, *args) == code
    assert not out.exists()
    return capsys.readouterr().err


@pytest.mark.slow
def test_the_gate_refuses_a_layer_of_rank_1(
    data: Path, tmp_path: Path, result: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(result.report.plan.model_sha256, (Step("/top/top.0/Gemm", (("low-rank", 1),)),))
    path, page = tmp_path / "plan.json", tmp_path / "r.json"
    path.write_text(json.dumps(plan.to_dict()))
    said = refused(
        capsys, tmp_path / "o.onnx", 1, "--data", data, "--labels", "label", "--plan", path, "--report", page
    )
    assert "The gate refuses" in said and "AUC may fall by at most" in said and "Nothing was written" in said
    found = json.loads(page.read_text())
    assert found["verdict"] == "failed" and found["output"] is None and not found["changed"]


@pytest.mark.slow
def test_the_gate_cannot_tell_by_shuffled_labels(
    changed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed("shuffled", label=lambda d: np.random.default_rng(0).permutation(d["label"]))
    said = refused(capsys, tmp_path / "o.onnx", 1, "--data", path, "--labels", "label", "--methods", "fp16")
    assert "cannot tell" in said and "do not tell these labels apart" in said


@pytest.mark.slow
def test_the_gate_cannot_tell_by_200_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded(tmp_path / "few.npz", 25)
    said = refused(capsys, tmp_path / "o.onnx", 1, "--data", path, "--labels", "label", "--methods", "fp16")
    assert "cannot tell" in said and "too few to tell" in said and "rows would do" in said


def test_the_gate_refuses_a_table_of_another_model(data: Path) -> None:
    model = onnx.load(DLRM)
    other = ModelProto()
    other.CopyFrom(model)
    tables = {t.name: t for t in other.graph.initializer if "item_tables" in t.name}
    first, second, *_ = tables.values()
    swapped = numpy_helper.to_array(second)
    second.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(first), second.name))
    first.CopyFrom(numpy_helper.from_array(swapped, first.name))
    with np.load(data) as held:
        feed = {i.name: held[i.name] for i in model.graph.input}
        a, b = (session(m).run(None, feed)[0][:, 0].astype(float) for m in (model, other))
        _, request = np.unique(held["request_id"], return_inverse=True)
        found = judge(Scores(a, b, request, held["label"].astype(float)), Limits())
    assert found.verdict == "failed"


def test_calibration_rows_may_not_be_the_gates(
    data: Path, changed: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--labels", "label", "--methods", "fp16")
    said = refused(capsys, tmp_path / "o.onnx", 2, "--data", data, "--gate-data", data, *common)
    assert "request_id" in said and "is for the gate too" in said
    renamed = changed("renamed", request_id=lambda d: d["request_id"] + 1_000_000)
    said = refused(capsys, tmp_path / "o.onnx", 2, "--data", data, "--gate-data", renamed, *common)
    assert "is the same as one of" in said


@pytest.mark.slow
def test_gate_data_of_its_own(data: Path, tmp_path: Path) -> None:
    other = recorded(tmp_path / "gate.npz", 300, seed=700)
    found = compress(DLRM, data, options(gate_data=other, methods=("fp16",)))
    assert found.passed and found.report.requests == {"calibration": 1200, "gate": 300}


def test_parts_share_no_request_and_follow_the_identity(data: Path, changed: Callable[..., Path]) -> None:
    from onnxrank.compress.requests import Requests
    from onnxrank.roles import InputRole, Roles

    model = onnx.load(DLRM)
    roles = Roles({i.name: InputRole(i.name, "candidate", 0) for i in model.graph.input})
    parts: dict[str, set[str]] = {}
    for path in (data, changed("mixed", label=lambda d: d["label"])):
        for b in Requests(path, model, roles, ("label",)).batches():
            parts.setdefault(f"{b.part}", set()).update(n.rpartition(" ")[2] for n in b.names)
            assert (
                b.labels is not None and len(b.labels) == len(b.request) and len(np.unique(b.request)) == len(b.names)
            )
    assert not parts["calibration"] & parts["gate"]
    assert 0.4 < len(parts["gate"]) / 1200 < 0.6


@pytest.mark.slow
def test_without_labels_it_says_what_it_was_held_against(data: Path, tmp_path: Path) -> None:
    found = compress(DLRM, data, options(labels=(), methods=("fp16",)))
    assert found.passed and found.report.outcomes[0].basis == "original"
    assert "against the original's scores only" in COMPRESS.render(found.report, "markdown")


@pytest.mark.slow
def test_nothing_to_do_gives_the_bytes_of_the_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.onnx"
    how = ("--data", data, "--labels", "label", "--methods", "sparse-tables", "--choice-rows", 2000)
    assert run("compress", DLRM, out, *how, "-q") == 0
    assert out.read_bytes() == DLRM.read_bytes()
    out.unlink()
    assert "could be compressed" in refused(capsys, out, 5, *how, "--require-change")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--methods", "magic"), "'magic' is not known"),
        (("--methods", "int8-fused"), "allow that with --allow-contrib"),
        (("--size", "big"), "not a ratio"),
        (("--size", "0.5x"), "not a ratio"),
        (("--labels", "nothing"), "nothing named 'nothing'"),
        (("--labels", "label,label_1"), "2 labels for 1 outputs"),
        (("--labels", "user_dense"), "is an input of the model"),
        (("--labels", "request_id"), "neither 0 nor 1"),
        (("--sites", "*nowhere*"), "No layer or table is named '*nowhere*'"),
        (("--report", "r.what"), "cannot be told"),
        (("--plan", "missing.json"), "cannot be read"),
    ],
)
def test_usage(
    args: tuple[str, ...], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--data", data, *(() if "--methods" in args else ("--methods", "fp16")), *args)
    assert message in refused(capsys, tmp_path / "o.onnx", 2, *given)


def test_missing_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "do not exist" in refused(capsys, tmp_path / "o.onnx", 2, "--data", tmp_path / "none.npz")


@pytest.mark.slow
def test_sites_are_chosen_by_name(data: Path) -> None:
    found = compress(DLRM, data, options(sites=("*top.2*",), methods=("fp16", "fp16-tables", "low-rank")))
    assert found.report.plan is not None
    assert set(found.report.plan.by_site) == {"/top/top.2/Gemm"}


@pytest.mark.slow
def test_the_gate_scores_requests_by_themselves_where_rows_are_rounded_together(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxrank.compress.requests import GATE, Batch, Requests

    feeds: list[tuple[int, int]] = []
    batches = Requests.batches

    def watched(self: Requests, only: str | None = None) -> Iterator[Batch]:
        for b in batches(self, only):
            if only == GATE:
                feeds.append((len(b.feeds), len(b.names)))
            yield b

    monkeypatch.setattr(Requests, "batches", watched)
    site = "/top/top.2/Gemm"
    found = compress(DLRM, data, options(methods=("int8",), sites=(site,)))
    assert found.passed and found.report.plan is not None and found.report.plan.by_site[site].chain == (("int8", 0),)
    assert feeds and all(a == b for a, b in feeds) and any("other candidates" in n for n in found.report.notes)
    found = compress(DLRM, data, options(methods=("fp16",), sites=(site,)))
    assert found.passed and not any("other candidates" in n for n in found.report.notes)


@pytest.mark.slow
def test_optimised_models_are_compressed_by_the_requests_of_the_original(data: Path, tmp_path: Path) -> None:
    from onnxrank.roles import load_spec

    fast = onnxrank.optimize(DLRM, spec=load_spec(str(ROLES)))
    path = tmp_path / "fast.onnx"
    fast.save(path)
    found = compress(path, data, options(size=1.2))
    assert found.passed and found.report.changed, found.report.outcomes
    assert next(i.type.tensor_type.shape.dim[0].dim_value for i in found.model.graph.input) == 1


@pytest.mark.slow
def test_optimised_models_with_divided_inputs(tmp_path: Path) -> None:
    """Columns of one input that the optimised model takes in two parts."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(24, 64)).astype(np.float32) / 5
    model = graph(
        "(float[N,24] X) => (float[N,1] y) { h = Gemm(X, W, b) r = Relu(h) g = Gemm(r, V, c) s = Relu(g) "
        "z = MatMul(s, H) y = Sigmoid(z) }",
        W=weight, b=np.zeros(64, np.float32), V=rng.normal(size=(64, 64)).astype(np.float32) / 8,
        c=np.zeros(64, np.float32), H=rng.normal(size=(64, 1)).astype(np.float32),
    )  # fmt: skip
    path, fast = tmp_path / "m.onnx", tmp_path / "fast.onnx"
    onnx.save(model, path)
    made = onnxrank.optimize(path, request=["X[0:16]"])
    made.save(fast)
    names = [i.name for i in onnx.load(fast).graph.input]
    assert names == ["X.request", "X.candidate"]
    rows = rng.normal(size=(300, 12, 24)).astype(np.float32)
    rows[:, :, :16] = rows[:, :1, :16]
    np.savez(tmp_path / "r.npz", X=rows.reshape(-1, 24), request_id=np.repeat(np.arange(300), 12))
    found = compress(fast, tmp_path / "r.npz", options(labels=(), methods=("fp16",)))
    assert found.passed and found.report.changed and found.report.rows["gate"] > 1000


@pytest.mark.slow
def test_guarded_models_are_run_request_by_request(data: Path, tmp_path: Path) -> None:
    """With the signature kept, rows of several users in one run give NaN."""
    from onnxrank.roles import load_spec

    fast = onnxrank.optimize(DLRM, spec=load_spec(str(ROLES)), interface="same")
    fast.save(tmp_path / "same.onnx")
    found = compress(tmp_path / "same.onnx", data, options(methods=("fp16",)))
    assert found.passed and found.report.changed


@pytest.mark.slow
def test_external_data(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(onnx.load(DLRM), path, save_as_external_data=True, location="m.data", size_threshold=100)
    found = compress(path, data, options(methods=("fp16", "fp16-tables"), size=1.3))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    found.save(folder / "o.onnx")
    assert [p.name for p in folder.iterdir()] == ["o.onnx"]
    whole = path.stat().st_size + (tmp_path / "m.data").stat().st_size
    assert found.report.points[0].bytes == pytest.approx(whole, rel=0.1)
    assert (folder / "o.onnx").stat().st_size < whole / 1.3


@pytest.mark.slow
def test_several_outputs_each_with_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 2)).astype(np.float32)
    model = graph(
        "(float[N,16] x) => (float[N,1] a, float[N,1] b, float[N,64] extra) { h = MatMul(x, W) extra = Relu(h) "
        "p = MatMul(extra, A) q = MatMul(extra, B) a = Sigmoid(p) b = Sigmoid(q) }",
        W=rng.normal(size=(16, 64)).astype(np.float32) / 4, A=rng.normal(size=(64, 1)).astype(np.float32) / 8,
        B=rng.normal(size=(64, 1)).astype(np.float32) / 8,
    )  # fmt: skip
    del w
    x = rng.normal(size=(8000, 16)).astype(np.float32)
    a, b, _ = session(model).run(None, {"x": x})
    labels = {k: (rng.random(8000) < p[:, 0]).astype(np.int8) for k, p in (("la", a), ("lb", b))}
    np.savez(tmp_path / "r.npz", x=x, request_id=np.arange(8000) // 20, **labels)
    found = compress(model, tmp_path / "r.npz", options(labels=("la", "lb"), methods=("fp16",)))
    assert [o.output for o in found.report.outcomes] == ["a", "b"] and found.passed
    assert {o.basis for o in found.report.outcomes} == {"labels"}
    assert any("extra" in n for n in found.report.notes)
    again = compress(model, tmp_path / "r.npz", options(labels=("la",), methods=("fp16",)))
    assert [o.basis for o in again.report.outcomes] == ["labels", "original"]


@pytest.mark.slow
def test_what_tables_of_fewer_columns_cost(tmp_path: Path) -> None:
    """Folded into the layer behind, their product costs nothing, and the layer less."""
    rng = np.random.default_rng(0)
    model = graph(
        "(int64[N,2] ids) => (float[N,1] y) { g = Gather(D, ids) e = Flatten(g) h = Gemm(e, W, b) r = Relu(h) "
        "z = MatMul(r, A) y = Sigmoid(z) }",
        D=(rng.normal(size=(300, 3)) @ rng.normal(size=(3, 8))).astype(np.float32), b=np.zeros(20, np.float32),
        W=rng.normal(size=(16, 20)).astype(np.float32) / 8, A=rng.normal(size=(20, 1)).astype(np.float32),
    )  # fmt: skip
    ids = rng.integers(0, 300, (8000, 2))
    (y,) = session(model).run(None, {"ids": ids})
    labels = (rng.random(8000) < y[:, 0]).astype(np.int8)
    np.savez(tmp_path / "r.npz", ids=ids, label=labels, request_id=np.arange(8000) // 20)
    (name,) = (t.name for t in Network(model).tables())
    plan = Plan(load(model).sha256, (Step(name, (("pca-tables", 3),)),))
    found = compress(model, tmp_path / "r.npz", options(plan=plan, refit=False))
    assert found.passed and [p.macs for p in found.report.points] == [512 * 20 * (16 + 1), 512 * 20 * (6 + 1)]
    assert {tuple(t.dims) for t in found.model.graph.initializer} >= {(300, 3), (6, 20)}


def attention(seed: int = 0) -> ModelProto:
    """Queries, keys and values that use the same few directions of what they read."""
    rng = np.random.default_rng(seed)
    basis = rng.normal(size=(24, 4)) / 5
    own = {n: (basis @ rng.normal(size=(4, 24))).astype(np.float32) for n in "QKV"}
    return graph(
        "(float[N,16] x) => (float[N,1] y) { h = Gemm(x, W, b) q = MatMul(h, Q) k = MatMul(h, K) v = Gemm(h, V, c) "
        "p = Mul(q, k) s = Tanh(p) r = Mul(s, v) t = Add(r, q) z = MatMul(t, A) y = Sigmoid(z) }",
        W=rng.normal(size=(16, 24)).astype(np.float32) / 4, b=np.ones(24, np.float32), c=np.ones(24, np.float32),
        A=rng.normal(size=(24, 1)).astype(np.float32) / 40, **own,
    )  # fmt: skip


@pytest.fixture(scope="module")
def attended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Requests of that model, with labels drawn from its scores."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(8000, 16)) * np.linspace(2, 0.1, 16)).astype(np.float32)
    (y,) = session(attention()).run(None, {"x": x})
    path = tmp_path_factory.mktemp("attention") / "r.npz"
    np.savez(path, x=x, label=(rng.random(8000) < y[:, 0]).astype(np.int8), request_id=np.arange(8000) // 20)
    return path


@pytest.mark.slow
def test_layers_that_read_the_same_are_factored_together(attended: Path) -> None:
    model = attention()
    (site,) = Network(model).joints(8)
    found = compress(model, attended, options(methods=("low-rank",), size=99.0, sites=("[qkv]",)))
    assert found.report.plan is not None and found.report.points[-1].logit_error < 1e-3
    assert found.report.plan.by_site == {site.name: Step(site.name, (("low-rank", 4),))}
    assert found.report.points[-1].macs == 512 * (16 * 24 + 4 * (24 + 72) + 24)
    again = compress(model, attended, options(plan=found.report.plan))
    assert again.model.SerializeToString(deterministic=True) == found.model.SerializeToString(deterministic=True)
    alone = compress(model, attended, options(methods=("low-rank",), size=1.2, sites=("[qk]",)))
    assert alone.report.plan is not None and site.name not in alone.report.plan.by_site
    both = (*found.report.plan.steps, Step(site.members[0].name, (("fp16", 0),)))
    with pytest.raises(UsageError, match="twice"):
        compress(model, attended, options(plan=Plan(found.report.plan.model_sha256, both)))


@pytest.mark.slow
def test_layers_that_share_what_they_read_and_add_what_is_computed(attended: Path) -> None:
    """As the candidate-level blocks of layers in optimised models."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(16, 4)) / 4
    model = graph(
        "(float[N,16] x) => (float[N,1] y) { m = ReduceMean<axes=[0]>(x) u = MatMul(m, U) h = Tanh(x) "
        "p = Gemm(h, P, u) q = Gemm(h, Q, u) s = Tanh(p) t = Mul(s, q) z = MatMul(t, A) y = Sigmoid(z) }",
        A=rng.normal(size=(24, 1)).astype(np.float32) / 9, U=rng.normal(size=(16, 24)).astype(np.float32),
        **{n: (basis @ rng.normal(size=(4, 24))).astype(np.float32) for n in "PQ"},
    )  # fmt: skip
    (site,) = Network(model).joints(8)
    plan = Plan(load(model).sha256, (Step(site.name, (("low-rank", 4),)),))
    found = compress(model, attended, options(plan=plan, labels=()))
    assert found.passed and found.report.points[-1].logit_error < 1e-3


@pytest.mark.slow
def test_what_layers_share_is_fitted_to_what_they_see(attended: Path) -> None:
    """Behind a layer that lost rank, the columns of all of them are found by one regression."""
    model = attention()
    first, (site,) = Network(model).products()[0], Network(model).joints(8)
    steps = (Step(site.name, (("low-rank", 2),)), Step(first.name, (("low-rank", 5),)))
    limits = Limits(loss=1.0, overlap=0.0, rmse=9.0, calibration=1.0)
    plain, fitted = (
        compress(model, attended, options(plan=Plan(load(model).sha256, steps, sequential=s), limits=limits))
        for s in (False, True)
    )
    assert fitted.report.plan is not None and fitted.report.plan.sequential
    assert fitted.report.points[-1].logit_error < 0.97 * plain.report.points[-1].logit_error


@pytest.mark.slow
def test_several_processes_find_the_same(data: Path) -> None:
    one, two = (
        compress(DLRM, data, options(methods=("low-rank",), sites=("*top.2*",), jobs=j, size=9.0)) for j in (1, 2)
    )
    assert one.report.plan == two.report.plan and one.report.rows == two.report.rows
    assert one.report.points[-1].logit_error == pytest.approx(two.report.points[-1].logit_error, rel=1e-4)


@pytest.mark.slow
def test_fitting_in_sequence_is_no_worse(data: Path) -> None:
    how = {"methods": ("low-rank",), "limits": Limits(loss=0.05, overlap=0.5, rmse=1.0), "refit": False, "size": 9.0}
    plain = compress(DLRM, data, options(**how))
    fitted = compress(DLRM, data, options(**how, sequential=True))
    assert fitted.report.points[-1].logit_error <= plain.report.points[-1].logit_error
    assert fitted.report.plan is not None and fitted.report.plan.sequential


def test_models_without_scores(tmp_path: Path) -> None:
    model = graph("(float[N,4] x) => (float[N,3] y) { y = MatMul(x, W) }", W=np.ones((4, 3), np.float32))
    np.savez(tmp_path / "r.npz", x=np.ones((9, 4), np.float32), request_id=np.arange(9))
    with pytest.raises(ModelError, match="no output with one score per candidate"):
        compress(model, tmp_path / "r.npz", options(labels=()))
