"""Training of factors: torch gives what onnxruntime gives, gradients find what was lost, and that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from onnxrank.cli import main
from onnxrank.compress import engine
from onnxrank.compress.engine import Options, compress
from onnxrank.compress.gate import Limits
from onnxrank.compress.plan import Plan, Step, Tuning
from onnxrank.errors import EnvironmentProblem, ModelError
from tests.support.modelkit import graph, session

torch = pytest.importorskip("torch")
finetune = pytest.importorskip("onnxrank.compress.finetune")

RNG = np.random.default_rng
ROWS = 6000
HEAD = "(float[N,16] x) => (float[N,1] y) { %s }"


def weights() -> dict[str, np.ndarray]:
    rng = RNG(0)
    shapes = {"W": (16, 32), "b": (32,), "V": (32, 32), "c": (32,), "H": (32, 1), "s": (32,)}
    return {k: (rng.normal(size=s) / np.sqrt(s[0]) * 1.5).astype(np.float32) for k, s in shapes.items()}


def ranker(body: str = "g = Gemm(r, V, c)", head: str = "k = Relu(g)") -> ModelProto:
    nodes = f"h = Gemm(x, W, b) r = Relu(h) {body} {head} z = MatMul(k, H) y = Sigmoid(z)"
    return graph(HEAD % nodes, **{n: w for n, w in weights().items() if f"{n})" in nodes or f" {n}," in nodes})


def recorded(model: ModelProto, path: Path) -> Path:
    """Requests whose labels are drawn from a ranker's own scores."""
    x = RNG(1).normal(size=(ROWS, 16)).astype(np.float32)
    (p,) = session(model).run(None, {"x": x})
    labels = (RNG(2).random(ROWS) < p[:, 0]).astype(np.int8)
    np.savez(path, x=x, label=labels, request_id=np.arange(ROWS) // 20)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(ranker(), tmp_path_factory.mktemp("data") / "requests.npz")


def made(model: ModelProto, data: Path, how: Tuning | None, rank: int = 6, **more: Any) -> engine.Result:
    sha = engine.files.load(model).sha256
    (name,) = [n.name or n.output[0] for n in model.graph.node if "V" in n.input]
    plan = Plan(sha, (Step(name, (("low-rank", rank), *more.pop("then", ()))),), finetune=how)
    options = {
        "labels": ("label",),
        "limits": Limits(loss=0.2, overlap=0.0, calibration=1.0, rmse=9.0),
        "seconds": 0.02,
        **more,
    }
    return compress(model, data, Options(plan=plan, choice=2000, **options), request=[])


def off(model: ModelProto, other: ModelProto) -> float:
    x = RNG(7).normal(size=(2000, 16)).astype(np.float32)
    a, b = (session(m).run(None, {"x": x})[0] for m in (model, other))
    return float(np.sqrt(((a - b) ** 2).mean()))


@pytest.mark.slow
@pytest.mark.parametrize("relu", [False, True])
def test_training_brings_back_what_was_lost(data: Path, relu: bool) -> None:
    model = ranker()
    plain = made(model, data, None)
    tuned = made(model, data, Tuning(40, relu, 0))
    assert off(model, tuned.model) < 0.9 * off(model, plain.model)
    assert not any("training" in n for n in tuned.report.notes)
    onnx.checker.check_model(tuned.model, full_check=True)
    assert [n.op_type for n in tuned.model.graph.node].count("Relu") == 2 + relu
    assert tuned.report.plan is not None and tuned.report.plan.finetune == Tuning(40, relu, 0)
    again = Plan.from_dict(json.loads(json.dumps(tuned.report.plan.to_dict())))
    assert again == tuned.report.plan


@pytest.mark.slow
@pytest.mark.parametrize("relu", [False, True])
def test_layers_that_share_a_factor_are_trained_together(data: Path, relu: bool) -> None:
    model = ranker("g = Gemm(r, V, c) l = MatMul(r, U)", "j = Concat<axis=1>(g, l) q = Relu(j) k = Gemm(q, M, s)")
    rng = RNG(6)
    for name, shape in (("U", (32, 32)), ("M", (64, 32))):
        data_of = (rng.normal(size=shape) / 8).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(data_of, name))
    (site,) = engine.Network(model).joints(8)
    how: dict[str, Any] = {"labels": (), "limits": Limits(loss=0.2, overlap=0.0, calibration=1.0, rmse=9.0)}
    sha = engine.files.load(model).sha256
    plans = [Plan(sha, (Step(site.name, (("low-rank", 8),)),), finetune=t) for t in (None, Tuning(12, relu))]
    plain, tuned = (compress(model, data, Options(plan=p, choice=2000, seconds=0.02, **how)) for p in plans)
    assert tuned.report.plan is not None and tuned.report.plan.finetune is not None, tuned.report.notes
    assert off(model, tuned.model) < 0.95 * off(model, plain.model)
    onnx.checker.check_model(tuned.model, full_check=True)
    assert [n.op_type for n in tuned.model.graph.node].count("Relu") == 2 + relu
    assert tuned.report.points[-1].macs == 512 * (16 * 32 + 8 * (32 + 64) + 64 * 32 + 32)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes(data: Path) -> None:
    one, two, other = (made(ranker(), data, Tuning(1, True, seed)).model for seed in (3, 3, 4))
    assert one.SerializeToString() == two.SerializeToString() != other.SerializeToString()


@pytest.mark.slow
def test_behind_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command; its plan does the same again."""
    model = ranker()
    u, d, v = np.linalg.svd(weights()["V"])
    d[8:] *= 0.1  # a rank to lose
    held = next(t for t in model.graph.initializer if t.name == "V")
    held.CopyFrom(onnx.numpy_helper.from_array(((u * d) @ v).astype(np.float32), "V"))
    onnx.save(model, tmp_path / "m.onnx")
    data = recorded(model, tmp_path / "requests.npz")
    limits = ["--max-loss", "0.1", "--min-overlap", "0.5", "--choice-rows", "2000"]
    wanted = [str(data), "--labels", "label", "--methods", "low-rank", *limits]
    made = [str(tmp_path / n) for n in ("out.onnx", "again.onnx", "plan.json")]
    tune = ["--size", "1.2x", "--finetune-relu", "--epochs", "20", "--seed", "5", "--plan-out", made[2]]
    assert main(["compress", str(tmp_path / "m.onnx"), made[0], "--data", *wanted, *tune]) == 0
    assert "finetune" in capsys.readouterr().out
    assert json.loads(Path(made[2]).read_text())["finetune"] == {"epochs": 20, "relu": True, "seed": 5}
    assert main(["compress", str(tmp_path / "m.onnx"), made[1], "--data", *wanted, "--plan", made[2]]) == 0
    assert Path(made[0]).read_bytes() == Path(made[1]).read_bytes()


@pytest.mark.slow
def test_what_does_not_pass_yet_may_be_better(data: Path) -> None:
    """A plan may ask for ranks that lose too much; training is kept even where it cannot make up for all of that."""
    strict = Limits(loss=1e-6, overlap=1.0)
    result = made(ranker(), data, Tuning(5), rank=2, limits=strict)
    assert result.report.verdict != "passed"
    assert result.report.plan is not None and result.report.plan.finetune is not None


@pytest.mark.slow
def test_factors_are_kept_in_fewer_bytes_behind_it(data: Path) -> None:
    result = made(ranker(), data, Tuning(2), rank=12, then=(("fp16", 0),))
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in result.model.graph.initializer)
    assert result.report.plan is not None and result.report.plan.finetune is not None


@pytest.mark.slow
def test_layers_of_optimised_models(data: Path) -> None:
    """A candidate-level block adds what is computed for one row."""
    model = ranker("q = ReduceMean<axes=[0]>(x) p = MatMul(q, W) u = Tanh(p) g = Gemm(r, V, u)")
    result = made(model, data, Tuning(2))
    assert result.report.plan is not None and result.report.plan.finetune is not None, result.report.notes


@pytest.mark.slow
def test_what_torch_does_not_run_is_left(data: Path) -> None:
    model = ranker(head="t = CumSum(g, one) k = Relu(t)")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one"))
    result = made(model, data, Tuning(1))
    assert [(r.method, r.reason) for r in result.report.refusals] == [("finetune", "torch does not run CumSum here")]
    assert result.report.plan is not None and result.report.plan.finetune is None
    assert any("training did not" in n for n in result.report.notes)


@pytest.mark.slow
def test_nothing_to_train(data: Path) -> None:
    options = Options(labels=("label",), methods=("fp16",), finetune=Tuning(), seconds=0.02, choice=2000, size=1.1)
    result = compress(ranker(), data, options)
    assert "no layer has a low rank, so nothing was trained" in result.report.notes


def test_without_torch(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(ranker(), tmp_path / "m.onnx")
    with mock.patch.object(engine, "find_spec", lambda name: None):
        with pytest.raises(EnvironmentProblem, match=r"onnxrank\[train\]"):
            compress(ranker(), data, Options(finetune=Tuning()))
        files = [str(tmp_path / "m.onnx"), str(tmp_path / "out.onnx")]
        assert main(["compress", *files, "--data", str(data), "--finetune"]) == 4
    assert "onnxrank[train]" in capsys.readouterr().err and not (tmp_path / "out.onnx").exists()


OPERATORS = {
    "Gemm": "k = Gemm<alpha=0.5,beta=2.0,transB=1>(g, V, c)",
    "movement": "a = Reshape(g, i8) b2 = Transpose<perm=[0,2,1]>(a) d = Unsqueeze(b2, one) e = Squeeze(d, one)"
    " f = Flatten(e) l, m = Split<axis=1>(f)"
    " o = Concat<axis=1>(m, l) p = Gather<axis=1>(o, pick) k = Mul(p, s)",
    "slices": "a = Slice(g, one, i8s, one) q = ReduceSum<keepdims=1>(a, one)"
    " p = ReduceMean<axes=[1]>(g) d = Add(q, p) k = Sub(g, d)",
    "functions": "a = Sigmoid(g) d = Tanh(g) e = LeakyRelu<alpha=0.3>(g) f = PRelu(g, s) l = Softmax(g) m = Elu(g)"
    " o = Softplus(g) p = Sum(a, d, e, f, l, m, o) k = Clip(p, low, high)",
    "normalised": "a = LayerNormalization(g, s, c) d = Exp(a) e = Sqrt(d) f = Log(e) l = Neg(f)"
    " m = Abs(l) o = Erf(m) p = Pow(o, two) q = Reciprocal(two) t = Div(p, q)"
    " k = BatchNormalization(t, s, c, c, s2)",
    "selection": 'a = Greater(r, r2) d = Where(a, g, r) e = Einsum<equation="ab,b->ab">(d, s)'
    " n = Shape(g) f = Expand(e, n) l = Cast<to=1>(f) k = Identity(l)",
}


@pytest.mark.parametrize("name", OPERATORS)
def test_torch_gives_what_onnxruntime_gives(name: str) -> None:
    """Between a layer and the score, operator by operator; then gradients reach the factors."""
    body = OPERATORS[name]
    text = f"h = Gemm(x, W, b) r = Relu(h) t0 = MatMul(r, A) g = MatMul(t0, B) {body} y = MatMul(k, H)"
    held = {**weights(), "A": RNG(3).normal(size=(32, 4)).astype(np.float32)}
    held |= {"B": RNG(4).normal(size=(4, 32)).astype(np.float32) / 4, "s2": np.abs(weights()["s"]) + 1}
    held |= {"one": np.array([1]), "i8": np.array([0, 8, -1]), "i8s": np.array([8]), "pick": np.arange(32)[::-1] - 32}
    held |= {"low": np.float32(-20), "high": np.float32(90), "two": np.float32(2), "r2": np.float32(0.5)}
    model = graph(HEAD % text, **{k: v for k, v in held.items() if f"{k})" in text or f" {k}," in text})
    x = RNG(5).normal(size=(9, 16)).astype(np.float32)
    site = finetune.Factors("layer", "A", "B", ["t0"], ["g"])
    tuner = finetune.Tuner(model, [site], ["y"], 4)
    assert not tuner.cone.refused
    shown = ModelProto()
    shown.CopyFrom(model)
    fed = [n for n in tuner.cone.fed if n != "x"]
    shown.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in fed)
    y, *others = session(shown).run(["y", *fed], {"x": x})
    given = {"x": x, **dict(zip(fed, others, strict=True))}
    tuner.check(given, {"y": y})
    with pytest.raises(ModelError, match="other scores"):
        tuner.check(given, {"y": y + 1})
    before = tuner.found()["layer"]
    losses = [tuner.step([given], {"y": y[:, 0].astype(np.float64) - 2}, {}) for _ in range(4)]
    after = tuner.found()["layer"]
    assert losses[-1] < losses[0] and all(not np.array_equal(before[k], after[k]) for k in ("first", "second"))
