"""Recorded requests of every kind."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import INT64, Graph
from mutants import pair
from onnx import numpy_helper

from onnxrank.errors import ModelError, UsageError
from onnxrank.verify import Options, Report, verify
from onnxrank.verify.pairing import bind
from onnxrank.verify.recorded import source

RANKER = "mmoe.torchscript"
RNG = np.random.default_rng(0)
Arrays = dict[str, np.ndarray]


def request(count: int, number: int = 0) -> Arrays:
    rng = np.random.default_rng(number)
    user = np.repeat(rng.integers(0, 50, (1, 5)), count, 0)
    return {"user_ids": user, "item_ids": rng.integers(0, 50, (count, 3)), "request_id": np.full(count, number)}


def several(counts: list[int]) -> Arrays:
    parts = [request(n, k) for k, n in enumerate(counts)]
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def check(data: Path, **options: Any) -> Report:
    right = pair(RANKER)
    return verify(
        right.original,
        right.optimized,
        Options(roles=right.roles, level="quick", candidates=(2,), seeds=1, data=data, jobs=2, **options),
    )


def table(arrays: Arrays) -> pa.Table:
    columns = {}
    for name, data in arrays.items():
        flat = pa.array(data.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, data.shape[1]) if data.ndim == 2 else flat
    return pa.table(columns)


def test_npz(tmp_path: Path) -> None:
    """Rows of a request need not be next to each other."""
    data = several([3, 1, 5])
    order = RNG.permutation(9)
    np.savez(tmp_path / "r.npz", **{k: v[order] for k, v in data.items()})
    found = check(tmp_path / "r.npz")
    assert found.passed, found.errors
    assert found.requests == 3 and found.verdicts["data"] == "passed"
    assert {r.output for r in found.ranking} >= {"task_0 (recorded)"}


def test_one_request_without_identity(tmp_path: Path) -> None:
    data = request(4)
    del data["request_id"]
    np.savez(tmp_path / "r.npz", **data)
    assert check(tmp_path / "r.npz").requests == 1


def test_folder(tmp_path: Path) -> None:
    for k in range(3):
        np.savez(tmp_path / f"{k}.npz", **request(2 + k, k))
    assert check(tmp_path).requests == 3


def test_test_data(tmp_path: Path) -> None:
    for k in range(2):
        folder = tmp_path / f"test_data_set_{k}"
        folder.mkdir()
        data = request(3, k)
        for n, name in enumerate(("user_ids", "item_ids")):
            (folder / f"input_{n}.pb").write_bytes(numpy_helper.from_array(data[name], name).SerializeToString())
    assert check(tmp_path).requests == 2


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_parquet(tmp_path: Path, rows: int) -> None:
    """Requests that go on in the next row group are one."""
    counts = [3, 1, 5, 2, 7]
    data = several(counts) | {"label": RNG.integers(0, 2, sum(counts)), "unused": np.arange(sum(counts))}
    pq.write_table(table(data), tmp_path / "r.parquet", row_group_size=rows)
    found = check(tmp_path / "r.parquet", labels="label")
    assert found.passed, found.errors
    assert found.requests == len(counts)
    recorded = next(r for r in found.ranking if r.output == "task_0 (recorded)")
    assert recorded.auc_before == recorded.auc_after and recorded.logloss_before is not None
    assert recorded.requests == 2 * sum(n > 1 for n in counts)


def test_many_requests(tmp_path: Path) -> None:
    """More than one batch, over two pairs of processes."""
    pq.write_table(table(several([2] * 300)), tmp_path / "r.parquet", row_group_size=77)
    found = check(tmp_path / "r.parquet")
    assert found.passed and found.requests == 300


def test_violation_is_a_finding(tmp_path: Path) -> None:
    data = several([3, 4, 2])
    data["user_ids"][5, 1] += 1
    np.savez(tmp_path / "r.npz", **data)
    found = check(tmp_path / "r.npz")
    assert not found.passed and found.verdicts["data"] == "failed" and found.verdicts["rounding"] == "passed"
    (error,) = found.errors
    assert "'user_ids' differs within a request in 1 of 3" in error.message and "row 2" in error.message
    assert found.requests == 2


def test_difference_names_the_request(tmp_path: Path) -> None:
    """A model that is wrong for one id is caught by the request that has it, and the case can be saved."""
    right = pair(RANKER)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(right.optimized)
    gather = [n for n in wrong.graph.node if n.op_type == "Gather"][-1]
    table_of = next(t for t in wrong.graph.initializer if t.name == gather.input[0])
    data = numpy_helper.to_array(table_of).copy()
    data[100 + 37] += 1
    table_of.CopyFrom(numpy_helper.from_array(data, table_of.name))
    recorded = several([4, 4, 4])
    recorded["item_ids"] %= 30
    recorded["item_ids"][6, 2] = 37
    np.savez(tmp_path / "r.npz", **recorded)
    quiet = verify(right.original, wrong, Options(roles=right.roles, level="quick", candidates=(2,), seeds=1))
    found = verify(
        right.original,
        wrong,
        Options(roles=right.roles, level="quick", candidates=(2,), seeds=1, data=tmp_path / "r.npz",
                save_failing=tmp_path / "out", bisect=True),
    )  # fmt: skip
    assert quiet.passed and not found.passed
    places = {c.place.request for c in found.failed_cases if c.place is not None}
    assert places and all("request_id 1" in p for p in places)
    assert (tmp_path / "out" / "repro.py").exists()
    assert found.culprit is not None and found.culprit.tensor == gather.output[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("item_ids"), "nothing named 'item_ids'"),
        (lambda d: d.update(item_ids=d["item_ids"][:, :2]), "has the shape"),
        (lambda d: d.update(item_ids=d["item_ids"][:-1]), "number of candidates"),
        (lambda d: d.update(item_ids=d["item_ids"] + 0.5), "float64 values"),
        (lambda d: d.update(request_id=d["request_id"][:2]), "entries for"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, change: Any, words: str) -> None:
    data = request(4)
    change(data)
    np.savez(tmp_path / "r.npz", **data)
    with pytest.raises(UsageError, match=words):
        check(tmp_path / "r.npz")


@pytest.mark.slow
def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK nonsense")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "none.npz", **{k: v[:0] for k, v in request(1).items()})
    for name, words in (
        ("a.npz", "not an .npz file"),
        ("a.parquet", "no Parquet file"),
        ("a.csv", "neither"),
        ("empty", "holds no"),
        ("nothing.npz", "do not exist"),
    ):
        with pytest.raises(UsageError, match=words):
            check(tmp_path / name)
    ragged = pa.table({"user_ids": [[1, 2], [1]], "item_ids": [[1, 2, 3]] * 2, "request_id": [1, 1]})
    pq.write_table(ragged, tmp_path / "ragged.parquet")
    with pytest.raises(UsageError, match="several lengths"):
        check(tmp_path / "ragged.parquet")
    missing = pa.table({"user_ids": [[1] * 5, None], "item_ids": [[1, 2, 3]] * 2, "request_id": [1, 1]})
    pq.write_table(missing, tmp_path / "missing.parquet")
    with pytest.raises(UsageError, match="missing values"):
        check(tmp_path / "missing.parquet")
    pq.write_table(pa.table({"user_ids": [[1] * 5], "item_ids": [[1, 2, 3]]}), tmp_path / "anonymous.parquet")
    with pytest.raises(UsageError, match="--request-id"):
        check(tmp_path / "anonymous.parquet")


@pytest.mark.slow
def test_no_request(tmp_path: Path) -> None:
    pq.write_table(table(several([2])).slice(0, 0), tmp_path / "r.parquet")
    found = check(tmp_path / "r.parquet")
    assert not found.passed and "holds no request" in found.errors[0].message


def test_out_of_range_is_named(tmp_path: Path) -> None:
    """An id that no table has: the original fails on it, which is no fault of the other model."""
    data = request(3)
    data["item_ids"][1, 0] = 10**6
    np.savez(tmp_path / "r.npz", **data)
    found = check(tmp_path / "r.npz")
    assert not found.passed
    assert found.errors[0].model == "original" and "request_id 0" in found.errors[0].message


@pytest.mark.slow
def test_values_of_their_own(tmp_path: Path) -> None:
    """Generated ids miss a table that is looked up with every third row; recorded ones do not."""
    g = Graph(17)
    user, item = g.input("user", ["N", 2]), g.input("item", ["N"], INT64)
    table_of = g.const(np.arange(24, dtype=np.float32).reshape(12, 2))
    rows = g.op("Gather", table_of, g.op("Mul", item, g.const(3, np.int64)))
    g.output(g.op("ReduceSum", g.op("Mul", user, rows), g.ints(1), keepdims=0), ["N"])
    model = g.model()
    with pytest.raises(ModelError, match="give their range"):
        verify(model, model, Options(request=["user"]))
    np.savez(tmp_path / "r.npz", user=np.ones((4, 2), np.float32), item=np.array([0, 1, 2, 3]))
    found = verify(model, model, Options(request=["user"], data=tmp_path / "r.npz"))
    assert found.passed and found.requests == 1
    assert any("recorded requests speak for those" in f.message for f in found.findings)
    model.graph.initializer[0].raw_data = bytes(96)
    wrong = onnx.ModelProto()
    wrong.CopyFrom(model)
    assert not verify(g.model(), wrong, Options(request=["user"], data=tmp_path / "r.npz")).passed


@pytest.mark.parametrize("rows", [1, 3, 4, 100])
@pytest.mark.parametrize("most", [1, 2, 7, 1000])
def test_parts_are_the_whole(tmp_path: Path, rows: int, most: int) -> None:
    """Each part is read alone, by a copy that another process could have, and none has a request of another."""
    counts = [3, 1, 9, 2, 5, 1, 1, 7]
    data = several(counts)
    pq.write_table(table(data), tmp_path / "a.parquet", row_group_size=rows)
    pq.write_table(table(several([4])), tmp_path / "b.parquet")
    np.savez(tmp_path / "r.npz", **data)
    right = pair(RANKER)
    declared = bind(right.original, right.original, right.roles).declared
    for path, also in ((tmp_path, [4]), (tmp_path / "a.parquet", []), (tmp_path / "r.npz", [])):
        found = source(path, declared, rows=most)
        whole = list(found.read())
        assert [len(r.feed["item_ids"]) for r in whole] == counts + also
        assert most > 100 or len(found.parts) > 1 or path.suffix == ".npz"
        parted = [r for part in found.parts for r in pickle.loads(pickle.dumps(found)).read(part)]
        assert [r.name for r in parted] == [r.name for r in whole]
        for a, b in zip(parted, whole, strict=True):
            assert all(np.array_equal(a.feed[n], b.feed[n]) for n in a.feed)
