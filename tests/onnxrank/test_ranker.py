"""The module that serves two models: its cache, states as bytes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto
from split_models import feeds, ranker_model

from onnxrank.ranker import Ranker, State, StateCache, StateError, _key, pack, unpack
from onnxrank.splitting import Options, split

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "out"
    split(ranker_model(), out, request=["user"], check="quick", options=Options(format="python"))
    return out


@pytest.fixture(scope="module")
def model() -> ModelProto:
    return ranker_model()


@pytest.mark.parametrize("n", [0, 1, 8, 10_000])
def test_scores(folder: Path, model: ModelProto, n: int) -> None:
    ranker = Ranker(folder)
    whole, request, candidates = feeds(n)
    for _ in range(2):
        got = ranker.score(request, candidates)
        assert got["score"].shape == (n, 1)
        np.testing.assert_array_equal(got["score"], run(model, whole)["score"])
    assert (ranker.cache.counters.hits, ranker.cache.counters.misses) == (1, 1)
    np.testing.assert_array_equal(ranker.score_with(ranker.state(request), candidates)["score"], got["score"])


def test_the_module_needs_nothing_else(folder: Path, model: ModelProto) -> None:
    """What is written runs by itself, in a process in which onnxrank and onnx cannot be imported."""
    whole, request, candidates = feeds(5)
    np.savez(folder.parent / "inputs.npz", **request, **candidates)
    code = (
        "import sys\n"
        "for name in ('onnxrank', 'onnx', 'google', 'ml_dtypes', 'click', 'rich'): sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "import numpy as np\n"
        "from ranker import Ranker\n"
        f"given = np.load({str(folder.parent / 'inputs.npz')!r})\n"
        "ranker = Ranker()\n"
        "ranker.prepare({'user': given['user']}).result()\n"
        "print(ranker.score({'user': given['user']}, {'item': given['item']})['score'].ravel().tolist())\n"
        "print(ranker.cache.counters.hits, ranker.cache.counters.misses)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    scores, counters = done.stdout.splitlines()
    assert json.loads(scores) == run(model, whole)["score"].ravel().tolist() and counters == "1 1"


def test_the_module_says_what_it_takes(folder: Path) -> None:
    doc = (folder / "ranker.py").read_text().split('"""')[1]
    assert "user: float32 [1, 6]" in doc and "item: float32 [N, 4]" in doc and "score: float32 [N, 1]" in doc


def test_different_requests_have_different_states(folder: Path, model: ModelProto) -> None:
    ranker = Ranker(folder)
    for seed in (1, 2, 1, 3, 2):
        whole, request, candidates = feeds(4, seed)
        np.testing.assert_array_equal(ranker.score(request, candidates)["score"], run(model, whole)["score"])
    counters = ranker.cache.counters
    assert (counters.hits, counters.misses, counters.states) == (2, 3, 3)
    ranker.cache.clear()
    assert ranker.cache.counters.bytes == 0
    # The caller's own key stands for whatever is given.
    first = ranker.state(feeds(1, 1)[1], key="someone")
    assert ranker.state(feeds(1, 2)[1], key="someone") is first


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_keys_differ_where_requests_do(data: st.DataObject) -> None:
    """Joined entries of several inputs are not taken for others, whatever their types, shapes and lengths."""

    def request() -> dict[str, np.ndarray[Any, Any]]:
        out = {}
        for name in ("a", "b"):
            shape = data.draw(st.sampled_from([(0,), (1, 1), (2,), (1, 2), (2, 1), (300,)]))
            kind = data.draw(st.sampled_from(["int64", "int32", "float32", "object"]))
            values = np.random.default_rng(data.draw(st.integers(0, 2))).integers(0, 2, shape)
            out[name] = np.array(values.astype(str), object) if kind == "object" else values.astype(kind)
        return out

    one, other = request(), request()
    same = all(
        one[n].dtype == other[n].dtype and one[n].shape == other[n].shape and (one[n] == other[n]).all() for n in one
    )
    assert (_key(one) == _key(other)) == same and hash(_key(one)) is not None
    assert _key({n: np.asfortranarray(v) for n, v in one.items()}) == _key(one)


def test_the_cache_is_bounded_in_bytes(folder: Path) -> None:
    ranker = Ranker(folder, cache_bytes=100)  # three states of 32 bytes
    for seed in range(10):
        ranker.state(feeds(1, seed)[1])
        assert ranker.cache.counters.bytes <= 100
    counters = ranker.cache.counters
    assert (counters.states, counters.evictions, counters.misses) == (3, 7, 10)
    ranker.state(feeds(1, 9)[1])
    ranker.state(feeds(1, 0)[1])  # the first went first
    assert (ranker.cache.counters.hits, ranker.cache.counters.misses) == (1, 11)
    none = Ranker(folder, cache_bytes=0)
    none.state(feeds(1)[1])
    none.state(feeds(1)[1])
    assert none.cache.counters.misses == 2 and none.cache.counters.states == 0


def _state(size: int, version: int = 0) -> State:
    return State(version, {"s": np.zeros(size, np.uint8)})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 64), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), max_size=60))
def test_the_cache_keeps_what_was_used_last(most: int, asked: list[tuple[int, int]]) -> None:
    sizes: dict[int, int] = {}
    order: list[int] = []
    cache = StateCache(most)
    for key, size in asked:
        size = sizes.setdefault(key, size)
        before = cache.counters
        assert cache.get(key, lambda size=size: _state(size)).nbytes == size
        assert (cache.counters.hits > before.hits) == (key in order)
        if key in order:
            order.remove(key)
        if size <= most:
            order.append(key)
        while sum(sizes[k] for k in order) > most:
            order.pop(0)
        assert cache.counters.bytes == sum(sizes[k] for k in order) and cache.counters.states == len(order)


def test_one_thread_makes_a_state_that_many_want() -> None:
    cache, made = StateCache(1 << 20), []

    def make() -> State:
        made.append(threading.get_ident())
        time.sleep(0.05)
        return _state(8)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: cache.get("user", make), range(16)))
    assert len(made) == 1 and all(s is found[0] for s in found)
    assert (cache.counters.hits, cache.counters.misses) == (15, 1)


def test_a_failure_is_not_kept() -> None:
    cache = StateCache(1 << 20)

    def fail() -> State:
        raise RuntimeError("no")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            cache.get("user", fail)
    assert cache.get("user", lambda: _state(8)).nbytes == 8


def test_many_threads_share_a_ranker(folder: Path, model: ModelProto) -> None:
    ranker = Ranker(folder, cache_bytes=64)

    def ask(seed: int) -> None:
        whole, request, candidates = feeds(1 + seed % 7, seed % 5)
        want = run(model, whole)["score"]
        np.testing.assert_array_equal(ranker.score(request, candidates)["score"], want)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(200)))
    assert ranker.cache.counters.hits + ranker.cache.counters.misses == 200


def test_the_request_side_is_made_ahead(folder: Path, model: ModelProto) -> None:
    ranker = Ranker(folder)
    whole, request, candidates = feeds(3)
    ahead = ranker.prepare(request)
    np.testing.assert_array_equal(ranker.score(request, candidates)["score"], run(model, whole)["score"])
    assert ahead.result().version == ranker.contract["state_version"]
    assert ranker.cache.counters.misses == 1
    with pytest.raises(ValueError, match="'user' is missing"):
        ranker.prepare({}).result()
    ranker.close()
    ranker.close()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_state_of_another_version(folder: Path) -> None:
    ranker = Ranker(folder)
    _, request, candidates = feeds(3)
    state = ranker.state(request)
    other = State(state.version ^ 1, state.tensors)
    with pytest.raises(StateError, match="another request model"):
        ranker.score_with(other, candidates)
    with pytest.raises(StateError, match="another request model"):
        ranker.score_with(ranker.pack(other), candidates)


@pytest.mark.parametrize("replaced", ["request.onnx", "candidate.onnx"])
def test_a_rollout_that_replaces_one_file_first(folder: Path, tmp_path: Path, replaced: str) -> None:
    """Both states have one shape, so nothing but their version tells them apart; no mixture is scored."""
    split(ranker_model(seed=7), tmp_path / "new", request=["user"], check="quick", options=Options(format="python"))
    shutil.copytree(folder, tmp_path / "out")
    shutil.copy(tmp_path / "new" / replaced, tmp_path / "out")
    _, request, candidates = feeds(3)
    ranker = Ranker(tmp_path / "out")
    if replaced == "request.onnx":
        for _ in range(2):
            with pytest.raises(StateError, match="another request model"):
                ranker.score(request, candidates)
    else:
        assert np.isnan(ranker.score(request, candidates)["score"]).all()


def test_nobody_changes_a_state_of_others(folder: Path) -> None:
    ranker = Ranker(folder)
    _, request, _ = feeds(3)
    for tensor in ranker.state(request).tensors.values():
        with pytest.raises(ValueError, match="read-only"):
            tensor[:] = 0


def test_states_as_bytes(folder: Path) -> None:
    ranker = Ranker(folder)
    _, request, candidates = feeds(3)
    data = ranker.pack(ranker.state(request))
    want = ranker.score(request, candidates)["score"]
    np.testing.assert_array_equal(ranker.score_with(data, candidates)["score"], want)
    np.testing.assert_array_equal(ranker.score_with(memoryview(data), candidates)["score"], want)
    (told,) = ranker.contract["state"]["tensors"]
    assert (
        data[told["offset"] : told["offset"] + told["bytes"]] == ranker.state(request).tensors[told["name"]].tobytes()
    )
    for end in range(len(data)):  # cut short anywhere
        with pytest.raises(StateError):
            ranker.score_with(data[:end], candidates)
    for wrong in (data + b"\0" * 8, b"", b"x" * len(data)):
        with pytest.raises(StateError):
            ranker.score_with(wrong, candidates)


def test_a_state_of_another_shape(folder: Path) -> None:
    ranker = Ranker(folder)
    state = ranker.state(feeds(1)[1])
    (name,) = state.tensors
    for tensors, says in (
        ({}, "has no tensor"),
        ({name: state.tensors[name][:, :4]}, "is float32"),
        ({name: state.tensors[name].astype(np.float64)}, "is float64"),
    ):
        with pytest.raises(StateError, match=says):
            ranker.pack(State(state.version, tensors))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_bytes_hold_any_state(data: st.DataObject) -> None:
    """Any number of tensors of any type, some of lengths that vary."""
    tensors, told, at = {}, [], 16
    count = data.draw(st.integers(0, 5))
    varies = sorted(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    for k in range(count):
        kind = data.draw(st.sampled_from(["float32", "float16", "int64", "bool", "uint8", "float64"]))
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        named: list[int | str] = [f"L{k}" if varies[k] and j == 0 else n for j, n in enumerate(shape)]
        fixed = all(isinstance(n, int) for n in named)
        array = np.random.default_rng(k).integers(0, 2, shape).astype(kind)
        tensors[f"t{k}"] = array
        told.append({"name": f"t{k}", "type": kind, "shape": named, "offset": at if fixed else None})
        if fixed and not any(varies[: k + 1]):
            at += array.nbytes + -array.nbytes % 8
        elif fixed:
            told[-1]["offset"] = -1  # behind one that varies; its place follows from that
    contract = {"state_version": 7, "state": {"tensors": told}}
    packed = pack(contract, State(7, tensors))
    found = unpack(contract, packed)
    assert found.version == 7 and found.tensors.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(found.tensors[name], array)
    if len(packed) > 16:
        with pytest.raises(StateError):
            unpack(contract, packed[:-1])
    for t in told:
        if isinstance(t["offset"], int) and t["offset"] > 0:
            array = tensors[str(t["name"])]
            assert packed[t["offset"] : t["offset"] + array.nbytes] == array.tobytes()


def test_inputs_that_are_missing(folder: Path) -> None:
    ranker = Ranker(folder)
    _, request, candidates = feeds(3)
    with pytest.raises(ValueError, match="request model's input 'user' is missing"):
        ranker.score(candidates, candidates)
    with pytest.raises(ValueError, match="candidate model's input 'item' is missing"):
        ranker.score(request, request)


def test_a_contract_of_another_version(folder: Path, tmp_path: Path) -> None:
    told = json.loads((folder / "contract.json").read_text())
    (tmp_path / "contract.json").write_text(json.dumps(told | {"schema_version": 99}))
    with pytest.raises(ValueError, match="not a contract of version 1"):
        Ranker(tmp_path)
