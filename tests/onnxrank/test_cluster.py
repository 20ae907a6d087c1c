"""A Ray cluster of two nodes gives what this machine gives, with a process killed half way, and a node lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import numpy_helper

from onnxrank import cluster
from onnxrank.compress import requests
from onnxrank.compress.engine import Options, compress
from onnxrank.compress.gate import Limits
from onnxrank.compress.passes import Scoring, Summing, scored, summed
from onnxrank.compress.plan import Plan, Step
from onnxrank.compress.requests import Requests
from onnxrank.compress.statistics import Moments
from onnxrank.engines import Local
from onnxrank.errors import EnvironmentProblem
from onnxrank.feeds import describe
from onnxrank.model import load
from onnxrank.network import Network
from onnxrank.roles import load_spec, resolve
from onnxrank.verify import Options as Verifying
from onnxrank.verify import replay, verify

ROOT = Path(__file__).resolve().parents[2]
DLRM = ROOT / "models" / "trained" / "dlrm.onnx"
SPEC = load_spec(str(DLRM.with_suffix(".roles.yaml")))
REQUESTS, CANDIDATES = 300, 16
PART = 700
PATIENT = 900.0
"""Seconds for one step of a model: whoever hangs is not looked for here."""
BUSY = {
    "RAY_raylet_start_wait_time_s": "900",
    "RAY_gcs_server_port_wait_time_s": "900",
    "RAY_worker_register_timeout_seconds": "900",
    "RAY_gcs_rpc_server_connect_timeout_s": "300",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "900",
    "RAY_raylet_client_connect_timeout_milliseconds": "60000",
    "RAY_health_check_timeout_ms": "900000",
}
"""How long Ray waits for processes that are there and slow. One that is gone refuses connections: it is found at once,
however long that is."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", **BUSY}  # before it is imported
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'onnxrank[ray]'")
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 1, "object_store_memory": 100 << 20}
    made = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    made.add_node(**size)
    ray.init(address=made.address, log_to_driver=False)
    made.wait_for_nodes(900)
    # What tests define is no module that another process could import.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Parquet files, whose row groups end within requests."""
    from tests.onnxrank.compress.test_engine import recorded

    folder = tmp_path_factory.mktemp("log")
    with np.load(recorded(folder / "all.npz", REQUESTS, candidates=CANDIDATES)) as held:
        arrays = dict(held)
    (folder / "all.npz").unlink()
    columns = {
        n: pa.array(v) if v.ndim == 1 else pa.FixedSizeListArray.from_arrays(pa.array(v.reshape(-1)), v.shape[1])
        for n, v in arrays.items()
    }
    half = REQUESTS // 2 * CANDIDATES
    whole = pa.table(columns)
    pq.write_table(whole.slice(0, half), folder / "0.parquet", row_group_size=250)
    pq.write_table(whole.slice(half), folder / "1.parquet", row_group_size=2000)
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_PORTION", PART)
    monkeypatch.setattr(replay, "_PART", PART)


def asked(data: Path) -> Requests:
    found = Requests(data, onnx.load(DLRM), resolve(describe(onnx.load(DLRM)), spec=SPEC), ("label",))
    assert len(found.portions) >= 7
    return found


@dataclass(frozen=True)
class Killed(Summing):
    """Sums whose process is killed once, half way, as an operator or the kernel would."""

    mark: str = ""

    def run(self, held: Any, part: Any) -> Any:
        if part == self.data.portions[4] and not os.path.exists(self.mark):
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(held, part)


def summing(data: Path) -> Summing:
    net = Network(onnx.load(DLRM))
    names = {f"p:{p.name}": list(p.outputs) for p in net.products()}
    exposed = [t for ts in names.values() for t in ts]
    return Summing(asked(data), net.finished(), PATIENT, None, exposed, False, names)


def same(one: Any, other: Any) -> None:
    assert one.found.keys() == other.found.keys() and one.rows == other.rows and one.requests == other.requests
    assert one.seen == other.seen and one.rows + 0 > 1000
    for name, m in one.found.items():
        its = other.found[name]
        assert isinstance(m, Moments) and isinstance(its, Moments)
        for a, b in ((m.count, its.count), (m.total, its.total), (m.squares, its.squares)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_sums_do_not_depend_on_who_makes_them(data: Path) -> None:
    same(summed(Local(1), summing(data), lambda _: None), summed(Local(3), summing(data), lambda _: None))


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EnvironmentProblem, match=r"install 'onnxrank\[ray\]'"):
        cluster.engine("ray")


@pytest.mark.slow
def test_sums_with_a_process_killed(nodes: Any, data: Path, tmp_path: Path) -> None:
    task = summing(data)
    mark = tmp_path / "killed"
    found = summed(cluster.engine("ray"), Killed(**vars(task), mark=str(mark)), lambda _: None)
    assert mark.exists()
    same(summed(Local(1), task, lambda _: None), found)


@pytest.mark.slow
def test_compress(nodes: Any, data: Path) -> None:
    net = Network(onnx.load(DLRM))
    plan = Plan(load(DLRM).sha256, (Step(max(net.products(), key=lambda p: p.shape).name, (("low-rank", 20),)),))
    how: dict[str, Any] = {"labels": ("label",), "limits": Limits(loss=0.2, overlap=0.1), "plan": plan, "seconds": 0.05,
                           "timeout": PATIENT}  # fmt: skip
    here, there = (compress(DLRM, data, Options(engine=e, **how), spec=SPEC) for e in ("local", "ray"))
    assert here.model.SerializeToString(deterministic=True) == there.model.SerializeToString(deterministic=True)
    (one,), (other,) = here.report.outcomes, there.report.outcomes
    assert one.rows == other.rows > 1000 and one.verdict == other.verdict
    for a, b in zip(one.criteria, other.criteria, strict=True):
        assert a.name == b.name
        np.testing.assert_allclose([a.value, a.low, a.high], [b.value, b.low, b.high], rtol=1e-12, atol=1e-15)


@pytest.mark.slow
def test_verify(nodes: Any, data: Path) -> None:
    wrong = onnx.load(DLRM)
    table = next(t for t in wrong.graph.initializer if len(t.dims) == 2 and t.dims[0] >= 60)
    values = numpy_helper.to_array(table).copy()
    values[3] += 1
    table.CopyFrom(numpy_helper.from_array(values, table.name))
    for other in (onnx.load(DLRM), wrong):
        how: dict[str, Any] = {"spec": SPEC, "level": "quick", "candidates": (2,), "seeds": 1, "budget": 0.0,
                               "timeout": PATIENT}  # fmt: skip
        here, there = (
            verify(DLRM, other, Verifying(data=data, labels="label", engine=e, jobs=1, **how)) for e in ("local", "ray")
        )
        assert here.requests == there.requests == REQUESTS
        assert here.verdicts == there.verdicts and (other is wrong) == (here.verdicts["rounding"] == "failed")
        assert here.ranking == there.ranking and here.failed_cases == there.failed_cases


@pytest.mark.slow
def test_a_lost_node(nodes: Any, data: Path) -> None:
    """The last test: the node does not come back."""
    task = summing(data)
    scoring = Scoring(task.data, task.model, PATIENT, None, outputs=[o.name for o in task.model.graph.output])
    here = scored(Local(1), scoring)
    found = cluster.engine("ray").each(scoring, task.data.portions)
    several = [next(found)]
    (other,) = [n for n in nodes.list_all_nodes() if not n.head]
    nodes.remove_node(other, allow_graceful=False)
    several += list(found)
    there = type(here).together([s for s in several if s is not None], scoring.outputs)  # type: ignore[union-attr]
    assert here is not None and here.names == there.names
    for name, value in here.scores.items():
        assert np.array_equal(value, there.scores[name])
    assert replace(here, scores={}).labels is not None and np.array_equal(here.labels, there.labels)  # type: ignore[arg-type]
