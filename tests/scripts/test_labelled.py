"""Rows to train on, and what is concluded from runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from models.spec import InputSpec
from scripts import planted
from scripts.labelled import Planted, Recorded, _codes, arrays, claim

SPECS = [
    InputSpec("user_ids", "int64", ("N", 3), "request", 0, 30),
    InputSpec("item_ids", "int64", ("N", 4), "candidate", 0, 30),
]
WORLD = planted.World(vocab=30, users=3, items=4, tasks=1, unseen=0.0)


def test_what_models_cannot_see_is_not_planted() -> None:
    rows = WORLD.requests(50, 8)
    other = {**rows, "dense": -rows["dense"], "categories": rows["categories"][::-1]}
    assert (WORLD.logits(rows) == WORLD.logits(other)).all()
    seen = planted.World(vocab=30, users=3, items=4, tasks=1)
    assert (seen.logits(rows) != seen.logits(other)).any()


def test_planted_rows_are_kept_and_judged_by_probabilities() -> None:
    data = Planted(WORLD, 20, held=100)
    assert data.training(3) is data.training(3)
    assert (data.training(3)["items"] != data.training(4)["items"]).any()
    assert 0.7 < data.best == data.auc(lambda rows: rows["probability_0"]) < 0.9
    assert data.auc(lambda rows: -rows["probability_0"]) == pytest.approx(1 - data.best)
    assert data.sizes == {"user": 3, "item": 4, "vocab": 30}


def test_a_users_own_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    rows = WORLD.requests(300, 8)
    planted.write_parquet(path, SPECS, iter([rows]))
    data = Recorded.of(path, ["user_*"], "label", "request_id", 1000)
    assert data.sizes["user"] == 3 and data.sizes["item"] == 4 and data.vocab <= 30
    train = data.training(0)
    held = len(rows["label_0"]) - len(train["label_0"])
    assert 0.1 < held / len(rows["label_0"]) < 0.3 and held % 8 == 0  # whole requests
    apart = data.training(0, apart=True)  # without those to choose by, which are neither trained nor judged on
    chosen: list[set[int]] = []
    for score in (data.auc, data.watched):
        score(lambda part: chosen.append(set(part["request_id"])) or part["label_0"])  # type: ignore[func-returns-value]
    assert chosen[0].isdisjoint(train["request_id"]) and chosen[1] <= set(train["request_id"])
    assert set(apart["request_id"]) == set(train["request_id"]) - chosen[1] and len(chosen[1]) > 30
    found = arrays(SPECS, train)
    assert found["user_ids"].shape == (len(train["label_0"]), 3) and found["item_ids"].max() < data.vocab
    # Ids are told apart as before, by other numbers.
    for old, new in zip(rows["items"].T, data.rows["items"].T, strict=True):
        assert len(set(zip(old, new, strict=True))) == len(set(old))
    best = data.auc(lambda part: rows["probability_0"][np.isin(data.rows["request_id"], part["request_id"])])
    assert 0.7 < best < 0.9


def test_bad_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    planted.write_parquet(path, SPECS, iter([WORLD.requests(3, 4)]))
    with pytest.raises(SystemExit, match="no column 'click'"):
        Recorded.of(path, ["user_*"], "click", "request_id", 10)
    with pytest.raises(SystemExit, match="request-level"):
        Recorded.of(path, ["nobody"], "label", "request_id", 10)


def test_columns_become_ids() -> None:
    assert _codes(np.array(["b", "a", "b", "c", "b", "a"]), 10).tolist() == [0, 1, 0, 2, 0, 1]
    assert _codes(np.array([7, 5, 7, 3, 9]), 2).max() == 1
    numbers = _codes(np.append(np.linspace(0, 1, 1000), np.nan), 100)
    assert 30 <= len(set(numbers.tolist())) <= 34


def test_runs_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    claim(tmp_path / "out", {"rate": 1, "sizes": (1, 2)})
    claim(tmp_path / "out", {"rate": 1, "sizes": (1, 2)})
    with pytest.raises(SystemExit, match="other settings"):
        claim(tmp_path / "out", {"rate": 2, "sizes": (1, 2)})


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="parity.py trains with torch")
def test_parity_is_claimed_only_beside_a_control_that_fails(tmp_path: Path) -> None:
    from scripts import parity

    def verdict(**by_kind: list[float]) -> bool:
        for kind, several in by_kind.items():
            for seed, value in enumerate(several):
                (tmp_path / f"{kind}-2-{seed}.json").write_text(json.dumps({"auc": value}))
        return parity.verdict(parity.accuracy(tmp_path)[2])[3]

    close = dict(dcnv2=[0.780, 0.781, 0.782], rdcn=[0.781, 0.780, 0.7825])
    assert verdict(**close, control=[0.70, 0.70, 0.70])
    assert not verdict(**close, control=[0.77, 0.77, 0.77])
    assert not verdict(dcnv2=[0.780, 0.781, 0.782], rdcn=[0.77, 0.77, 0.7701], control=[0.6, 0.6, 0.6])
