"""A real Triton serves the repository that `split --format triton` writes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import run, session
from split_models import Arrays, feeds, history_model, numbers, ranker_model
from triton_server import Client, Missing, Refused, install, serving

from onnxrank import cli
from onnxrank.splitting import Options, split
from onnxrank.splitting.lint import lint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    out = tmp_path_factory.mktemp("repository") / "out"
    split(ranker_model(), out, request=["user"], options=Options("triton", name="ctr"))
    # A repository may hold several ensembles, and other files beside them.
    split(history_model(), out.parent / "more", request=["history"], options=Options("triton", name="history"))
    for model in (out.parent / "more").iterdir():
        if model.is_dir():
            model.rename(out / model.name)
    # And one whose candidate model takes several requests at once.
    for name, pack in (("joined", False), ("packed", True)):
        how = Options("triton", name=name, rows="triton", pack=pack)
        split(ranker_model(), out.parent / name, request=["user"], options=how)
        for model in (out.parent / name).iterdir():
            if model.is_dir():
                model.rename(out / model.name)
    assert lint(out) == []
    with _served(out) as found:
        yield found


@contextmanager
def _served(repository: Path, **how: Any) -> Iterator[Client]:
    """Triton with a repository; where there is no Triton, the test is skipped with the reason."""
    try:
        install()
    except Missing as e:
        pytest.skip(str(e))
    with serving(repository, **how) as found:
        yield found


def test_many_clients_get_their_own_scores(client: Client) -> None:
    model, lock, wrong = ranker_model(), threading.Lock(), []
    before = {name: client.statistics(name) for name in ("ctr_request", "ctr_candidate")}

    def ask(worker: int) -> None:
        with closing(Client(client.port)) as own:
            for k in range(50):
                seed = 100 + (worker * 50 + k) % 9
                whole, request, candidates = feeds(1 + k % 40, seed)
                got = own.infer("ctr", {**request, **candidates})["score"]
                if not np.array_equal(got, run(model, whole)["score"]):
                    with lock:
                        wrong.append(seed)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert wrong == []
    request, candidate = (
        {k: v - counts[k] for k, v in client.statistics(name).items()} for name, counts in before.items()
    )
    assert request["executions"] < 9 * 8 and request["hits"] + request["executions"] == 400
    assert candidate["executions"] == 400


def _ask_joined(port: int, count: int, users: int, name: str = "joined", inputs: Sequence[str] = ()) -> list[int]:
    """Requests of four clients to a model that joins requests; those with wrong scores."""
    user, item = inputs or ("user", "item")
    model, lock, wrong = session(ranker_model()), threading.Lock(), []

    def ask(worker: int) -> None:
        with closing(Client(port)) as own:
            for k in range(worker, count, 4):
                whole, request, candidates = feeds(1 + 7 * k % 60, 300 + k * k % users)
                got = own.infer(name, {user: request["user"], item: candidates["item"][None]})["score"]
                if not np.array_equal(got, run(model, whole)["score"][None]):
                    with lock:
                        wrong.append(k)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    return wrong


def test_requests_that_the_server_joins(client: Client) -> None:
    before = {name: client.statistics(name) for name in ("joined_request", "joined_candidate")}
    for user in range(12):  # users that two clients ask for at once would be made twice
        client.infer("joined_request", feeds(1, 300 + user)[1])
    assert _ask_joined(client.port, 400, 12) == []
    after = {name: client.statistics(name) for name in before}
    assert after["joined_request"]["executions"] - before["joined_request"]["executions"] == 12
    assert after["joined_candidate"]["executions"] - before["joined_candidate"]["executions"] < 400


def test_inputs_side_by_side_of_requests_that_the_server_joins(client: Client) -> None:
    before = client.statistics("packed_candidate")["executions"]
    assert _ask_joined(client.port, 200, 12, "packed", ("request.values", "candidate.values")) == []
    assert client.statistics("packed_candidate")["executions"] - before < 200


def test_states_of_another_version_among_others(client: Client) -> None:
    """Requests that are joined keep their own fate: NaN for one with a stale state, scores for the others."""
    stale, lock = [], threading.Lock()

    def ask(worker: int) -> None:
        with closing(Client(client.port)) as own:
            for k in range(40):
                whole, request, candidates = feeds(5, 400 + worker)
                state = own.infer("joined_request", request)
                if worker == 0:
                    state = {**state, "state_version": state["state_version"] + 1}
                got = own.infer("joined_candidate", {**state, "item": candidates["item"][None]})["score"]
                want = np.full((1, 5, 1), np.nan) if worker == 0 else run(ranker_model(), whole)["score"][None]
                if not np.array_equal(got, want, equal_nan=True):
                    with lock:
                        stale.append((worker, k))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert stale == []


@pytest.mark.parametrize("odd", ["short", "none", "many"])
def test_odd_requests_among_others(client: Client, odd: str) -> None:
    """A state that is cut short, no candidates, ten thousand: whoever is joined with that gets scores of their own."""
    wrong, lock, done = [], threading.Lock(), threading.Event()

    def ask(worker: int) -> None:
        with closing(Client(client.port)) as own:
            for k in range(30):
                whole, request, candidates = feeds(1 + k % 20, 450 + worker)
                state = own.infer("joined_request", request)
                got = own.infer("joined_candidate", {**state, "item": candidates["item"][None]})["score"]
                if not np.array_equal(got, run(model, whole)["score"][None]):
                    with lock:
                        wrong.append((worker, k))

    def ask_oddly() -> int:
        whole, request, candidates = feeds({"short": 5, "none": 0, "many": 10_000}[odd], 460)
        want, count = run(model, whole)["score"][None], 0
        with closing(Client(client.port)) as own:
            while not done.is_set():
                state = own.infer("joined_request", request)
                if odd == "short":
                    state = {name: v[:, :4] if v.ndim > 1 and v.shape[1] > 4 else v for name, v in state.items()}
                try:
                    got = own.infer("joined_candidate", {**state, "item": candidates["item"][None]})["score"]
                except Refused:
                    assert odd != "many"
                else:
                    assert odd != "short" and np.array_equal(got, want)
                count += 1
        return count

    model = ranker_model()
    with ThreadPoolExecutor(4) as pool:
        oddly = pool.submit(ask_oddly)
        list(pool.map(ask, range(3)))
        done.set()
        assert oddly.result() > 0
    assert wrong == [] and client.ready()


def test_users_that_several_clients_ask_for_at_once(client: Client) -> None:
    """Triton asks its cache before a request waits, and tells it after that ran: each may have the state made, once."""
    whole, request, candidates = feeds(3, 500)
    want, at_once = run(ranker_model(), whole)["score"], threading.Barrier(6)

    def ask(_: int) -> bool:
        with closing(Client(client.port)) as own:
            own.ready()
            at_once.wait()
            return np.array_equal(own.infer("ctr", {**request, **candidates})["score"], want)

    before = client.statistics("ctr_request")["executions"]
    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(6)))
    made = client.statistics("ctr_request")["executions"] - before
    assert 1 <= made <= 6
    client.infer("ctr", {**request, **candidates})
    assert client.statistics("ctr_request")["executions"] - before == made


def test_the_servers_cache_is_full(tmp_path: Path) -> None:
    """States that went are made again, and are their users' own."""
    model, users, rounds = ranker_model(), 150, 3
    split(model, tmp_path / "out", request=["user"], options=Options("triton", name="ctr"))
    with _served(tmp_path / "out", cache=1 << 14) as client:
        for k in range(rounds * users):
            whole, request, candidates = feeds(3, 600 + k % users)
            got = client.infer("ctr", {**request, **candidates})["score"]
            np.testing.assert_array_equal(got, run(model, whole)["score"])
        assert client.statistics("ctr_request")["executions"] > users


def test_the_request_model_runs_once_per_user(client: Client) -> None:
    before = client.statistics("ctr_request")
    for k in range(60):
        _, request, candidates = feeds(3, 200 + k % 5)
        client.infer("ctr", {**request, **candidates})
    after = client.statistics("ctr_request")
    assert after["executions"] - before["executions"] == 5 and after["hits"] - before["hits"] == 55


@pytest.mark.parametrize("n", [1, 10_000])
def test_numbers_of_candidates(client: Client, n: int) -> None:
    whole, request, candidates = feeds(n)
    got = client.infer("ctr", {**request, **candidates})["score"]
    np.testing.assert_array_equal(got, run(ranker_model(), whole)["score"])


def test_no_candidates_are_an_error_or_no_scores(client: Client) -> None:
    _, request, candidates = feeds(0)
    try:
        assert client.infer("ctr", {**request, **candidates})["score"].shape == (0, 1)
    except Refused as e:
        assert "item" in str(e) or "0" in str(e)
    assert client.ready()


def test_a_state_that_the_caller_has(client: Client) -> None:
    whole, request, candidates = feeds(4)
    state = client.infer("ctr_request", request)
    got = client.infer("ctr_candidate", {**state, **candidates})["score"]
    np.testing.assert_array_equal(got, run(ranker_model(), whole)["score"])
    other = {**state, "state_version": state["state_version"] + 1}
    assert np.isnan(client.infer("ctr_candidate", {**other, **candidates})["score"]).all()
    short = {name: v[:, :4] if v.ndim > 1 else v for name, v in state.items()}
    with pytest.raises(Refused, match="shape"):
        client.infer("ctr_candidate", {**short, **candidates})


def test_lengths_that_vary(client: Client) -> None:
    for length in (1, 5, 200):
        history, items = numbers(1, length, 4), numbers(6, 4, seed=6)
        got = client.infer("history", {"history": history, "item": items})["score"]
        want = run(history_model(), {"history": np.repeat(history, 6, 0), "item": items})["score"]
        np.testing.assert_array_equal(got, want)


def test_what_triton_refuses(client: Client) -> None:
    _, request, candidates = feeds(3)
    with pytest.raises(Refused, match="item"):
        client.infer("ctr", request)
    with pytest.raises(Refused):
        client.infer("ctr", {"user": np.repeat(request["user"], 3, 0), **candidates})


def test_a_client_that_leaves(client: Client) -> None:
    whole, request, candidates = feeds(2000, 77)
    for _ in range(5):
        gone = Client(client.port)
        gone.ready()  # connects
        body = b'{"inputs": []}'
        gone._connection.request("POST", "/v2/models/ctr/infer", body, {"Content-Length": str(len(body) + 100)})
        gone.close()
    got = client.infer("ctr", {**request, **candidates})["score"]
    np.testing.assert_array_equal(got, run(ranker_model(), whole)["score"])


@pytest.mark.parametrize("name", ["ctr", "joined"])
def test_clients_that_leave_before_their_answer(client: Client, name: str) -> None:
    model, lock, wrong, done = ranker_model(), threading.Lock(), [], threading.Event()

    def given(request: Arrays, candidates: Arrays) -> Arrays:
        return {**request, "item": candidates["item"][None] if name == "joined" else candidates["item"]}

    def leave() -> int:
        _, request, candidates = feeds(3000, 78)
        count = 0
        while not done.wait(0.02):
            with closing(Client(client.port)) as gone:
                gone.ask(name, given(request, candidates))
            count += 1
        return count

    def ask(worker: int) -> None:
        with closing(Client(client.port)) as own:
            for k in range(40):
                whole, request, candidates = feeds(1 + k % 30, 80 + worker)
                got = own.infer(name, given(request, candidates))["score"]
                if not np.array_equal(got.reshape(-1, 1), run(model, whole)["score"]):
                    with lock:
                        wrong.append((worker, k))

    with ThreadPoolExecutor(4) as pool:
        leaving = pool.submit(leave)
        list(pool.map(ask, range(3)))
        done.set()
        assert leaving.result() > 0
    assert wrong == [] and client.ready()


@pytest.mark.parametrize("rows", [None, "triton"])
@pytest.mark.parametrize("width", [12, 20])
def test_models_that_are_replaced_under_load(tmp_path: Path, rows: str | None, width: int) -> None:
    """In between, and from a cache of before, scores are those of one of the two models as a whole, or NaN.

    Where both states have one shape nothing but their version tells them apart.
    """
    old, new = ranker_model(), ranker_model(width, seed=7)
    how, out = Options("triton", name="ctr", rows=rows), tmp_path / "out"
    split(old, out, request=["user"], options=how)
    done, odd = threading.Event(), []
    seen = {"old": 0, "new": 0, "NaN": 0, "refused": 0}

    def ask(worker: int) -> None:
        with closing(Client(port)) as own:
            k = worker
            while not done.is_set():
                k += 1
                whole, request, candidates = feeds(4, k % 6)
                item = candidates["item"] if rows is None else candidates["item"][None]
                try:
                    got = own.infer("ctr", {**request, "item": item})["score"].reshape(-1, 1)
                except Refused:  # while the one's state does not have the other's name or shape
                    seen["refused"] += 1
                    continue
                kind = next((n for n, m in models.items() if np.array_equal(got, run(m, whole)["score"])), "NaN")
                seen[kind] += 1
                if kind == "NaN" and not np.isnan(got).all():
                    odd.append((k, got))

    models = {"old": old, "new": new}
    with _served(out, explicit=True) as client, ThreadPoolExecutor(4) as pool:
        port = client.port
        working = [pool.submit(ask, w) for w in range(4)]
        time.sleep(1)
        split(new, out, request=["user"], options=how)
        for name in ("ctr_request", "ctr_candidate", "ctr"):
            client.load(name)
            time.sleep(0.5)
        time.sleep(1)
        done.set()
        for w in working:
            w.result()
    assert odd == [] and seen["old"] and seen["new"], seen


def test_the_repository_of_the_readme(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "README.md").read_text()
    (command,) = re.findall(r"^onnxrank (split .* --format triton .*)$", text, re.MULTILINE)
    model = root / "models" / "onnx" / "mmoe.torchscript.onnx"
    places = {
        "ranker.onnx": str(model),
        "roles.yaml": str(model.parent / "mmoe.roles.yaml"),
        "repository": str(tmp_path / "repository"),
    }
    assert cli.main([places.get(word, word) for word in command.split()] + ["-q"]) == 0
    rng = np.random.default_rng(0)
    with _served(tmp_path / "repository") as client:
        for n in (1, 17, 512):
            user, items = rng.integers(0, 50, (1, 5)), rng.integers(0, 50, (n, 3))
            want = run(onnx.load(model), {"user_ids": np.repeat(user, n, 0), "item_ids": items})
            got = client.infer("ctr", {"user_ids": user, "item_ids": items})
            assert got.keys() == want.keys()
            for name in want:
                np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_a_repository_that_does_not_load_is_told(tmp_path: Path) -> None:
    split(ranker_model(), tmp_path / "out", request=["user"], check=False, options=Options("triton", name="ctr"))
    config = tmp_path / "out" / "ctr" / "config.pbtxt"
    config.write_text(config.read_text().replace('"ctr_request"', '"ctr_requests"'))
    with pytest.raises(Missing, match="ctr_requests"), _served(tmp_path / "out"):
        pass
