"""`profile` on real models; what it says of times is held against clocks in `scripts/profile_accuracy.py`, not here."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from split_models import ranker_model

import onnxrank
from onnxrank import cli, runtime
from onnxrank.batching.engine import Options
from onnxrank.contract import RULE
from onnxrank.errors import EnvironmentProblem, ModelError, UsageError
from onnxrank.formats import PROFILE
from onnxrank.pages import asset
from onnxrank.profiling.engine import profile
from onnxrank.profiling.page import to_html
from onnxrank.profiling.render import print_profile, to_csv, to_markdown
from onnxrank.profiling.report import Line, Profile
from onnxrank.profiling.sessions import Runner, Target, open_session
from onnxrank.roles import load_spec
from onnxrank.writers import as_text, to_json

ROOT = Path(__file__).resolve().parents[3]
MODELS = ROOT / "models" / "onnx"
SCHEMA = json.loads((ROOT / "onnxrank" / "profile.schema.json").read_text())
QUICK: dict[str, Any] = {"candidates": [2, 24], "seconds": 1e-3, "memory": False}


def spec(name: str) -> dict[str, Any]:
    return load_spec(MODELS / f"{name}.roles.yaml")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and what `optimize` makes of it."""
    fast = tmp_path_factory.mktemp("pair") / "fast.onnx"
    source = MODELS / "hadamard_pairs.torchscript.onnx"
    onnxrank.optimize(source, spec=spec("hadamard_pairs"), candidates=512).save(fast)
    return source, fast


@pytest.fixture(scope="module")
def found(pair: tuple[Path, Path]) -> tuple[Profile, dict[str, Any]]:
    trace: dict[str, Any] = {}
    return profile(*pair, **{**QUICK, "memory": True, "trace": trace}), trace


@pytest.mark.slow
def test_both_models_score_the_same_candidates(found: tuple[Profile, dict[str, Any]]) -> None:
    shown, _ = found
    assert shown.difference is not None and shown.difference < 1e-4 and not shown.notes
    assert [m.optimised for m in shown.models] == [False, True]
    assert [p.candidates for p in shown.points] == [2, 24]
    assert all(p.speedup is not None and p.speedup.low <= p.speedup.high for p in shown.points)
    assert {i["level"] for i in shown.roles["inputs"]} >= {"request", "candidate"}


def test_kernel_time_adds_up(found: tuple[Profile, dict[str, Any]]) -> None:
    for m in found[0].models:
        for k in m.kernels:
            for shares in (k.levels, k.operators, k.rules, k.providers):
                assert sum(s.seconds for s in shares) == pytest.approx(k.seconds)
            assert 0 < k.seconds < k.session
            assert [s.name for s in k.providers] == ["CPUExecutionProvider"] and not k.copies.kernels
            assert k.device is None


def test_levels_and_rules(found: tuple[Profile, dict[str, Any]], pair: tuple[Path, Path]) -> None:
    before, after = ({s.name: s.kernels for s in m.kernels[0].levels} for m in found[0].models)
    assert before["repeated"] and before["candidate"]
    assert after["request"] > before.get("request", 0) and not after.get("repeated")
    assert [s.name for s in found[0].models[0].kernels[0].rules] == ["none"]
    rules = {s.name for s in found[0].models[1].kernels[0].rules}
    made = {p.value for n in onnx.load(pair[1]).graph.node for p in n.metadata_props if p.key == RULE}
    assert {"fold", "fc"} & made and made & rules and "broadcast" in rules


def test_share_of_the_peak(found: tuple[Profile, dict[str, Any]]) -> None:
    """Multiply-adds add up over levels, and are held against the time of a request, and that of its kernels."""
    profile, _ = found
    for k, m in enumerate(profile.models):
        for point, works in zip(profile.points, m.works, strict=True):
            assert point.peak > 0 and works.candidates == point.candidates
            assert works.all.macs == sum(w.macs for w in works.levels)
            assert works.all.of_peak == pytest.approx(works.all.macs / point.times[k].median / point.peak)
            assert all(w.of_peak is not None and w.of_peak > 0 for w in works.levels)
    before, after = (m.works for m in profile.models)
    assert before[1].all.macs == 12 * before[0].all.macs
    assert [w.name for w in before[0].levels] == ["candidate"]
    assert [w.name for w in after[0].levels] == ["request", "candidate"]
    assert after[0].levels[0].macs == after[1].levels[0].macs
    assert after[1].all.macs < before[1].all.macs


def test_memory(found: tuple[Profile, dict[str, Any]]) -> None:
    for m in found[0].models:
        assert m.memory is not None and 0 < m.memory.start <= m.memory.loaded <= m.memory.peak


def test_schema(found: tuple[Profile, dict[str, Any]]) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    form = json.loads(to_json(found[0]))
    jsonschema.validate(form, SCHEMA)
    assert set(form) == set(SCHEMA["properties"])
    described(form, SCHEMA, SCHEMA)


def described(value: Any, part: dict[str, Any], schema: dict[str, Any], where: str = "report") -> None:
    """Every field must be in the schema and described there."""
    part = next((p for p in part.get("anyOf", []) if "$ref" in p), part)
    if "$ref" in part:
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[1]]
    if isinstance(value, dict) and "properties" in part:
        for key, inner in value.items():
            assert part["properties"][key].get("description"), f"{where}.{key}"
            described(inner, part["properties"][key], schema, f"{where}.{key}")
    elif isinstance(value, list) and "items" in part:
        for inner in value:
            described(inner, part["items"], schema, where)


def test_csv(found: tuple[Profile, dict[str, Any]]) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(found[0]))))
    assert [r["candidates"] for r in rows] == ["2", "2", "24", "24"]
    for r in rows:
        parts = sum(float(r[k]) for k in ("once", "repeated", "per_candidate"))
        assert parts == pytest.approx(float(r["kernels"])) and float(r["median"]) > 0
    assert not rows[0]["speedup"] and float(rows[1]["speedup"]) > 0
    for k, row in enumerate(rows):
        reached = found[0].models[k % 2].works[k // 2].all
        assert int(row["macs"]) == reached.macs and float(row["of_peak"]) == reached.of_peak


def test_trace(found: tuple[Profile, dict[str, Any]]) -> None:
    events = found[1]["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert len(names) == 2
    timed = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in timed)
    runs = sorted((e for e in timed if e["cat"] == "run" and e["pid"] == 1), key=lambda e: e["ts"])
    assert {r["args"]["candidates"] for r in runs} == {2, 24}
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in itertools.pairwise(runs))
    inside = [e for e in timed if e["cat"] in ("request", "repeated", "candidate") and e["pid"] == 1]
    assert inside and all(any(r["ts"] <= e["ts"] <= r["ts"] + r["dur"] for r in runs) for e in inside)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("verbose", [False, True])
def test_fits_80_columns(found: tuple[Profile, dict[str, Any]], encoding: str, verbose: bool) -> None:
    text = as_text(lambda console: print_profile(found[0], console, verbose), encoding, 80)
    names = [m.source for m in found[0].models]
    wide = [line for line in text.splitlines() if len(line) > 80 and not any(n in line for n in names)]
    # Names of nodes are never broken.
    assert not [line for line in wide if not line.startswith("    ")]
    assert "\x1b" not in text and text.encode(encoding)
    for words in ("Time per request", "Speed-up", "Fitted cost", "once per request", "rule fold", "Resident memory"):
        assert words in text, words
    assert ("us" in text or "ms" in text) and "N = 24" in text


@pytest.mark.parametrize("counts", [(1, 2, 8, 24), (1, 2, 24), (2, 8, 24)])
@pytest.mark.parametrize("knee", [None, 8])
def test_what_is_said_of_fitted_costs(
    found: tuple[Profile, dict[str, Any]], counts: tuple[int, ...], knee: int | None
) -> None:
    """A point that is left out of the fit is named, and there is no column for a bend that no line has."""
    first = found[0]
    line = Line(1e-6, 1e-7, knee, 2e-7, 0.01)
    shown = dataclasses.replace(
        first,
        models=[
            dataclasses.replace(m, line=line, kernels=[dataclasses.replace(m.kernels[0], candidates=n) for n in counts])
            for m in first.models
        ],
        points=[dataclasses.replace(first.points[0], candidates=n) for n in counts],
    )
    text = " ".join(as_text(lambda console: print_profile(shown, console, False), "utf-8", 80).split())
    for said in (text, to_html(shown)):
        assert ("N = 1 is left out of the fit" in said) == (counts == (1, 2, 8, 24))
    assert ("up to 8 candidates, 0.20 us beyond" in text) == (knee is not None)
    assert ("per candidate beyond" in to_html(shown)) == (knee is not None)


@pytest.mark.slow
def test_each_order_of_the_pair(pair: tuple[Path, Path]) -> None:
    shown = profile(pair[1], pair[0], **QUICK)
    assert [m.optimised for m in shown.models] == [True, False] and shown.difference < 1e-4


@pytest.mark.parametrize("interface", ["request", pytest.param("same", marks=pytest.mark.slow)])
def test_divided_matrix(tmp_path: Path, interface: str) -> None:
    """A packed matrix is brought into the parts that the optimised model takes."""
    source, fast = MODELS / "deepfm_packed.dynamo.onnx", tmp_path / "fast.onnx"
    onnxrank.optimize(source, spec=spec("deepfm_packed"), interface=interface).save(fast)
    shown = profile(source, fast, **QUICK)
    assert shown.difference is not None and shown.difference < 1e-4


def test_optimised_alone(pair: tuple[Path, Path]) -> None:
    shown = profile(pair[1], **QUICK)
    assert shown.difference is None and shown.break_even is None and shown.points[0].speedup is None
    assert "contract" in shown.notes[0]
    assert "rule fold" in as_text(lambda console: print_profile(shown, console), width=80)


@pytest.mark.slow
def test_nothing_said_of_roles() -> None:
    shown = profile(MODELS / "two_tower.dynamo.onnx", **QUICK)
    assert "candidate-level" in shown.notes[0]


def tower(rows: str | int = "N", width: int = 4, factor: float = 1.0) -> ModelProto:
    """`y = (user | item) W`, with the user's rows as given."""
    inputs = [
        helper.make_tensor_value_info("user", TensorProto.FLOAT, [rows, width]),
        helper.make_tensor_value_info("item", TensorProto.FLOAT, ["N", 3]),
    ]
    u = helper.make_tensor("u", TensorProto.FLOAT, [width, 2], np.full(width * 2, factor, np.float32))
    v = helper.make_tensor("v", TensorProto.FLOAT, [3, 2], np.ones(6, np.float32))
    nodes = [
        helper.make_node("MatMul", ["user", "u"], ["a"]),
        helper.make_node("MatMul", ["item", "v"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])
    graph = helper.make_graph(nodes, "tower", inputs, [out], [u, v])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_twin_without_a_contract() -> None:
    """A model written by hand that takes one row where the other takes N."""
    shown = profile(tower(), tower(rows=1), request=["user"], **QUICK)
    assert shown.difference is not None and shown.difference < 1e-6
    assert {s.name for s in shown.models[1].kernels[0].levels} == {"request", "candidate"}
    assert {s.name for s in shown.models[0].kernels[0].levels} == {"repeated", "candidate"}


def test_other_scores_are_told() -> None:
    shown = profile(tower(), tower(factor=2.0), request=["user"], **QUICK)
    assert "not give the same scores" in shown.notes[-1]


def test_one_row_that_nobody_declared() -> None:
    with pytest.raises(UsageError, match=r"takes user as \[1, 4\].*--request user"):
        profile(tower(), tower(rows=1), **QUICK)


def test_other_inputs_are_refused() -> None:
    other = tower()
    other.graph.input[0].name = other.graph.node[0].input[0] = "someone"
    with pytest.raises(UsageError, match="someone"):
        profile(tower(), other, request=["user"], **QUICK)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": []}, "at least 1"),
        ({"candidates": [0]}, "at least 1"),
        ({"threads": 0}, "threads"),
        ({"seconds": 0}, "seconds"),
        ({"provider": "tpu"}, "not known"),
        ({"cuda_graph": True}, "'cuda'"),
        ({"cuda_graph": True, "provider": "cuda", "io_binding": False}, "fixed memory"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        profile(tower(), **{**QUICK, **options})


# --- providers and binding ----------------------------------------------------------------------------------------


@pytest.mark.skipif("CUDAExecutionProvider" in runtime.onnxruntime().get_available_providers(), reason="CUDA is there")
def test_cuda_must_really_be_there(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EnvironmentProblem, match="has no CUDAExecutionProvider here"):
        profile(pair[0], provider="cuda", **QUICK)
    assert cli.main(["profile", str(pair[0]), "--ep", "cuda"]) == 4
    assert "onnxrank[cuda]" in capsys.readouterr().err


def test_a_provider_that_onnxruntime_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime falls back to the CPU silently where CUDA's libraries are missing."""
    ort = runtime.onnxruntime()
    real = ort.InferenceSession
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(
        ort, "InferenceSession", lambda *a, providers, **k: real(*a, providers=["CPUExecutionProvider"], **k)
    )
    with pytest.raises(EnvironmentProblem, match="gave up CUDAExecutionProvider"):
        open_session(tower(), Target("cuda"))


@pytest.mark.parametrize("name", ["two_tower.dynamo", "deepfm_packed.torchscript"])
def test_io_binding_gives_the_same_scores(name: str) -> None:
    from onnxrank import feeds, study
    from onnxrank import model as files
    from onnxrank.facts import Setting
    from onnxrank.roles import resolve

    loaded = files.load(MODELS / f"{name}.onnx")
    roles = resolve(feeds.describe(loaded.proto), spec=spec(name.split(".")[0]))
    known = study.Study(loaded.proto, roles, loaded)
    requests = [known.maker(Setting({**dict.fromkeys(known.symbols, 32), "N": 9}, k)) for k in range(3)]
    runners = []
    for binding in (False, True):
        target = Target(io_binding=binding)
        runners.append(Runner(open_session(loaded.proto, target), requests, target))
    for k in (0, 1, 2, 1):
        for a, b in zip(runners[0].scores(k), runners[1].scores(k), strict=True):
            np.testing.assert_array_equal(a, b)
        assert runners[1](k) > 0 and runners[1].copies is None


def test_fixed_places_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done for CUDA, on memory of the CPU: every request is copied to the same place, and its scores back."""
    ort = runtime.onnxruntime()
    for name in ("ortvalue_from_numpy", "ortvalue_from_shape_and_type"):
        real = getattr(ort.OrtValue, name)
        monkeypatch.setattr(ort.OrtValue, name, staticmethod(lambda *a, real=real: real(*a[:-2])))
    rng = np.random.default_rng(0)
    requests = [{"user": rng.random((7, 4), np.float32), "item": rng.random((7, 3), np.float32)} for _ in range(3)]
    session = open_session(tower(), Target())
    plain, placed = Runner(session, requests, Target()), Runner(session, requests, Target("cuda", 1, True, True))
    for k in (0, 1, 2, 1):
        np.testing.assert_array_equal(plain.scores(k)[0], placed.scores(k)[0])
    took = placed(2)
    assert placed.copies is not None and placed.copies > 0 and took > 0


def test_a_request_that_does_not_run() -> None:
    target = Target()
    run = Runner(
        open_session(tower(), target), [{"user": np.zeros((2, 9), np.float32), "item": np.zeros((2, 3))}], target
    )
    with pytest.raises(ModelError, match="cannot run"):
        run(0)


# --- command line --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [f"--report={form}:{tmp_path / ('p.' + form)}" for form in PROFILE.names]
    args = ["profile", *map(str, pair), "--candidates", "24,2", "--seconds", "0.001", "--no-memory", "--threads", "2"]
    assert cli.main([*args, *targets, "--io-binding", "--trace", str(tmp_path / "t.json")]) == 0
    out = capsys.readouterr().out
    assert "2 threads, I/O binding" in " ".join(out.split())
    assert json.loads((tmp_path / "p.json").read_text())["io_binding"] is True
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (tmp_path / "p.html").read_text().startswith("<!DOCTYPE html>")
    assert asset("page.css") in (tmp_path / "p.html").read_text()
    assert "Speed-up" in (tmp_path / "p.text").read_text()
    assert cli.main([*args, "--report", "csv:-"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("candidates,model") and "Speed-up" in shown.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--candidates", "1,x"], "comma list"),
        (["--candidates", "0"], "comma list"),
        (["--seconds", "0"], "0"),
        (["--ep", "tpu"], "tpu"),
        (["--report", "xml:x"], "html, json, csv, text or markdown"),
        (["--cuda-graph"], "CUDA graphs need"),
        (["--infer-roles", "a.npz", "--request", "u*"], "exclude"),
    ],
)
def test_usage(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], args: list[str], words: str) -> None:
    assert cli.main(["profile", str(pair[0]), *args]) == 2
    assert words in capsys.readouterr().err


def test_a_report_must_not_replace_a_model(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("--report", "--trace"):
        assert cli.main(["profile", *map(str, pair), place, f"{'json:' * (place == '--report')}{pair[1]}"]) == 2
        assert "would replace the model" in capsys.readouterr().err


# --- several requests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lengths", "triton", "padded"])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Profile:
    """A model, and one for several requests made of it."""
    how = {"interface": "padded"} if request.param == "padded" else {"rows": request.param}
    made = tmp_path_factory.mktemp("several") / "batch.onnx"
    onnxrank.batch(ranker_model(), request=["user"], check=False, options=Options(**how)).save(made)
    return profile(ranker_model(), made, request=["user"], **{**QUICK, "candidates": [3], "requests": [1, 4]})


def test_several_requests(several: Profile) -> None:
    assert several.difference is not None and several.difference < 1e-5
    assert [(p.requests, p.candidates) for p in several.several] == [(1, 3), (4, 3)]
    for p in several.several:
        assert [c.together for c in p.calls] == [False, True] and p.speedup is not None
        for c in p.calls:
            assert c.per_request == pytest.approx(c.median / p.requests)
            assert c.per_candidate == pytest.approx(c.per_request / 3)


def test_reports_of_several_requests(several: Profile) -> None:
    form = json.loads(to_json(several))
    jsonschema.validate(form, SCHEMA)
    described(form, SCHEMA, SCHEMA)
    rows = [r for r in csv.DictReader(io.StringIO(to_csv(several))) if r["requests"] == "4"]
    assert len(rows) == 2 and float(rows[1]["seconds_per_request"]) == pytest.approx(float(rows[1]["median"]) / 4)
    text = as_text(lambda console: print_profile(several, console), "utf-8")
    for shown in (text, to_markdown(several), to_html(several)):
        assert "Time of several requests" in shown and "one call" in shown and "4 calls" in shown


def test_a_model_for_several_requests_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "batch.onnx"
    onnxrank.batch(ranker_model(), request=["user"], check=False).save(path)
    quick = ["--candidates", "2", "--seconds", "0.01", "--no-memory"]
    assert cli.main(["profile", str(path), "--requests", "1,3", *quick]) == 0
    assert "one call" in capsys.readouterr().out
    assert cli.main(["profile", str(path), "--requests", "0", *quick]) == 2
    assert "--requests" in capsys.readouterr().err
    with pytest.raises(UsageError, match="requests"):
        profile(path, **QUICK, requests=[0])
