"""What is planted: reproducible, labelled, with a bound that no score beats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from models.spec import InputSpec
from onnxrank import feeds
from onnxrank.roles import load_spec, resolve
from onnxrank.verify.recorded import source
from scripts import planted

TRAINED = Path(__file__).resolve().parents[2] / "models" / "trained"
SPECS = [
    InputSpec("user_ids", "int64", ("N", 5), "request", 0, 60),
    InputSpec("item_ids", "int64", ("N", 3), "candidate", 0, 60),
]


def test_requests_are_rankers_input() -> None:
    world = planted.World(vocab=50)
    rows = world.requests(20, 7, seed=3)
    assert (rows["users"].reshape(20, 7, -1) == rows["users"].reshape(20, 7, -1)[:, :1]).all()
    assert (rows["history"].reshape(20, 7, -1) == rows["history"].reshape(20, 7, -1)[:, :1]).all()
    assert rows["items"].min() >= 1 and rows["items"].max() < 50 and len(set(rows["request_id"])) == 20
    again = world.requests(20, 7, seed=3)
    assert all((rows[k] == again[k]).all() for k in rows)
    other = world.requests(20, 7, seed=4)
    assert not set(other["request_id"]) & set(rows["request_id"]) and (other["items"] != rows["items"]).any()


def test_ids_are_uneven() -> None:
    items = planted.World(vocab=200).requests(200, 32)["items"][:, 0]
    counts = np.sort(np.bincount(items, minlength=200))[::-1]
    assert counts[0] > 20 * max(1, counts[150])


def test_no_score_beats_the_planted_one() -> None:
    rows = planted.World(vocab=50).requests(500, 32)
    p = rows["probability_0"]
    best = planted.bayes_auc(p)
    drawn = planted.bayes_auc(rows["label_0"].astype(float), p)
    assert best == pytest.approx(drawn, abs=0.01) and 0.75 < best < 0.9
    noisy = p + np.random.default_rng(0).normal(0, 0.1, len(p))
    assert planted.bayes_auc(p, noisy) < best and planted.bayes_auc(p, -p) == pytest.approx(1 - best)


def test_every_term_is_there() -> None:
    """Context and candidate alone tell less than both: the labels ask for cross terms."""
    rows = planted.World(vocab=50).requests(800, 32)
    p = rows["probability_0"]
    alone = np.zeros(50)
    for item in range(50):
        mine = rows["items"][:, 0] == item
        alone[item] = p[mine].mean() if mine.any() else p.mean()
    assert planted.bayes_auc(p, alone[rows["items"][:, 0]]) < planted.bayes_auc(p) - 0.1


def test_files_are_read_as_recorded_requests(tmp_path: Path) -> None:
    for name in ("r.npz", "r.parquet"):
        path = tmp_path / name
        assert planted.write_requests(path, SPECS, 30, 4, seed=7, world=0) == 120
        model = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]> g (int64[N,5] user_ids, int64[N,3] item_ids) => (int64[N,8] y)'
            " { y = Concat<axis=1>(user_ids, item_ids) }"
        )
        declared = feeds.inputs(model, resolve(feeds.describe(model), request=["user_*"]))
        found = list(source(path, declared, labels="label").read())
        assert len(found) == 30 and all(len(r.labels) == 4 for r in found if r.labels is not None)


@pytest.mark.parametrize("name", ["dcnv2_parallel", "dlrm"])
def test_trained_models_know_something(name: str) -> None:
    model = onnx.load(TRAINED / f"{name}.onnx")
    roles = load_spec(str(TRAINED / f"{name}.roles.yaml"))["inputs"]
    specs = [
        InputSpec(
            i.name,
            "int64" if i.type.tensor_type.elem_type == onnx.TensorProto.INT64 else "float32",
            ("N", *(d.dim_value for d in i.type.tensor_type.shape.dim[1:])),
            "candidate",
            *roles[i.name]["range"],
        )
        for i in model.graph.input
    ]
    rows = planted.world_of(specs).requests(400, 32, seed=500)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, planted.feed(specs, rows))[0][:, 0]
    best = planted.bayes_auc(rows["probability_0"])
    assert 0.72 < planted.bayes_auc(rows["probability_0"], found) < best
