"""Serves one trace of requests by the original, by one optimised file, and by two models with a cache of states.

python scripts/serve_benchmark.py MODEL --roles ROLES [--length L=128] [--triton] [--json FILE]

python scripts/serve_benchmark.py MODELS --batch 1x512,8x64,32x16 [--interface padded] [--rows lengths]

With --batch it scores so many requests of so many candidates each in one call of `optimize --interface batch`, and one
after the other with the model for one request, in turns; MODELS is a model, or a folder of models with their roles.

Users of the trace are Zipf-distributed, and so many that the hit rate of an unbounded cache is the one asked for.
Numbers of candidates are log-uniform. A user's requests follow each other, whatever the number of clients: one comes
when the one before has its answer. Variants take turns in pieces of the trace, so that a machine that does other things
too slows all of them; with one number of candidates (--candidates 64..64) the best times say what the models take.
Every score is held against the original's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

import onnxrank
from onnxrank import batches, feeds
from onnxrank import model as files
from onnxrank.batching.engine import Options as BatchOptions
from onnxrank.facts import Setting
from onnxrank.ranker import Ranker
from onnxrank.roles import Roles, load_spec, resolve
from onnxrank.splitting import Options, split
from onnxrank.splitting import contract as contracts
from onnxrank.splitting import triton as configs
from onnxrank.splitting.lint import lint
from onnxrank.splitting.pbtxt import write
from onnxrank.study import Study
from onnxrank.values import CANDIDATES

Arrays = dict[str, NDArray[Any]]
_PIECE = 40
"""Requests that a variant serves before it is another's turn."""
_STRANGER = 1 << 25
"""A user, and a request, of no trace."""
_FAR = 1e-4
"""Largest difference of a score, of the output's scale, that is none."""


@dataclass(frozen=True)
class Request:
    """One request: what is the user's, what is the candidates', and what the original takes."""

    user: int
    once: Arrays
    many: Arrays
    whole: Arrays


@dataclass
class Row:
    """What one variant did with one trace."""

    runtime: str
    variant: str
    hit_rate: float
    concurrency: int
    requests: int
    per_second: float
    p50_ms: float
    p99_ms: float
    best_ms: float = 0.0
    best_hit_ms: float | None = None
    best_miss_ms: float | None = None
    p50_hit_ms: float | None = None
    p50_miss_ms: float | None = None
    request_executions: int | None = None
    cache_hits: int | None = None
    executions: int | None = None
    wrong: int = 0


# --- the trace -------------------------------------------------------------------------------------------------------


def users(count: int, rate: float, rng: np.random.Generator) -> list[int]:
    """Users of a trace, Zipf-distributed, of whom a share comes again."""
    if rate <= 0:
        return list(range(count))
    low, high = 1, 1 << 24
    while low < high:  # more users, fewer that come again
        middle = (low + high) // 2
        found = _drawn(count, middle, np.random.default_rng(0))
        low, high = (middle + 1, high) if 1 - len(set(found)) / count > rate else (low, middle)
    return _drawn(count, low, rng)


def _drawn(count: int, most: int, rng: np.random.Generator) -> list[int]:
    """Users out of a number of them, the k-th as often as 1 / k."""
    # The inverse of the distribution, as if users were a continuum: exact enough, and quick for millions.
    return [int(u) for u in np.floor((most + 1) ** rng.random(count) - 1)]


class Trace:
    """Requests for a model.

    Args:
        study: What is known of it.
        lengths: Extents of its lengths.
        span: Least and most candidates.
        seed: Of everything.
    """

    def __init__(self, study: Study, lengths: Mapping[str, int], span: tuple[int, int], seed: int = 0) -> None:
        self._study, self._span, self._seed = study, span, seed
        unknown = {s.removeprefix("S:") for s in study.symbols if s != CANDIDATES}
        self._symbols = {f"S:{name}": lengths.get(name, 32) for name in unknown}

    def make(self, count: int, rate: float) -> list[Request]:
        """So many requests, of which a share is of users that came before."""
        rng = np.random.default_rng(self._seed)
        low, high = np.log(self._span[0]), np.log(self._span[1])
        sizes = np.exp(rng.uniform(low, high, count)).round().astype(int)
        return [self.request(u, int(n), k) for k, (u, n) in enumerate(zip(users(count, rate, rng), sizes, strict=True))]

    def first(self) -> Request:
        """A request of a user of whom the others know nothing, with most candidates: what warms up."""
        return self.request(_STRANGER, self._span[1], _STRANGER)

    def request(self, user: int, n: int, k: int) -> Request:
        """One request of a user, with so many candidates."""
        maker, declared = self._study.maker, self._study.declared
        candidates = maker(Setting({**self._symbols, CANDIDATES: n}, seed=50_000_000 + k))
        own = feeds.divided(declared, maker(Setting({**self._symbols, CANDIDATES: 1}, seed=user)))
        many = feeds.divided(declared, candidates)
        once, whole = {}, {}
        for i in declared:
            if i.role.level == "mixed":
                raise SystemExit("inputs of several levels are not part of this benchmark")
            if i.role.level == "candidate":
                whole[i.name] = many[i.name]
                continue
            once[i.name] = whole[i.name] = own[i.name]
            if i.role.candidate_axis is not None:
                whole[i.name] = np.repeat(own[i.name], n, i.role.candidate_axis)
        return Request(user, once, {name: many[name] for name in many if name not in once}, whole)


# --- variants --------------------------------------------------------------------------------------------------------

Serve = Callable[[Request], Arrays]


@dataclass
class Variant:
    """One way to serve requests.

    Attributes:
        name: What it is called.
        client: Makes what one client calls.
        counted: How often the request model ran, how often it did not have to, and how often what scores candidates
            ran, as far as that is known.
    """

    name: str
    client: Callable[[], Serve]
    counted: Callable[[], tuple[int | None, int | None, int | None]] | None = None
    seconds: list[float] = field(default_factory=list)
    hits: list[bool] = field(default_factory=list)
    busy: float = 0.0
    wrong: int = 0
    before: tuple[int | None, int | None, int | None] = (None, None, None)


def _session(source: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class Joiner:
    """Scores what waits in one call, for several clients.

    Args:
        path: A model for several requests.
        most: Requests of a call at most.
    """

    def __init__(self, path: str, most: int = 64) -> None:
        told = batches.convention(onnx.load(path, load_external_data=False))
        assert told is not None
        self.told, self.most, self.calls = told, most, 0
        self._session = _session(path)
        self._names = [o.name for o in self._session.get_outputs()]
        self._waiting: SimpleQueue[tuple[Arrays, Future[Arrays]]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def score(self, request: Request) -> Arrays:
        """Scores of one request."""
        done: Future[Arrays] = Future()
        self._waiting.put(({**request.once, **request.many}, done))
        return done.result()

    def _work(self) -> None:
        while True:
            taken = [self._waiting.get()]
            while len(taken) < self.most and not self._waiting.empty():
                taken.append(self._waiting.get())
            feeds_ = [feed for feed, _ in taken]
            found = self._session.run(self._names, batches.joined(self.told, feeds_))
            counts = [batches.candidates(self.told, f) for f in feeds_]
            self.calls += 1
            parts = batches.parted(self.told, dict(zip(self._names, found, strict=True)), counts)
            for (_, done), part in zip(taken, parts, strict=True):
                done.set_result(part)


def plain(original: str, one: str, two: Path, batch: str) -> list[Variant]:
    """The variants in onnxruntime itself."""
    sessions, ranker = [_session(original), _session(one)], Ranker(two)
    names = [o.name for o in sessions[0].get_outputs()]

    def run(session: onnxruntime.InferenceSession, feed: Arrays) -> Arrays:
        return dict(zip(names, session.run(names, feed), strict=True))

    joiner = Joiner(batch)

    def counted() -> tuple[int | None, int | None, int | None]:
        return ranker.cache.counters.misses, ranker.cache.counters.hits, None

    return [
        Variant("original", lambda: lambda r: run(sessions[0], r.whole)),
        Variant("one file", lambda: lambda r: run(sessions[1], {**r.once, **r.many})),
        Variant("two files", lambda: lambda r: ranker.score(r.once, r.many), counted),
        Variant("batch", lambda: joiner.score, lambda: (None, None, joiner.calls)),
    ]


@contextmanager
def served(original: str, one: str, batch: str, repository: Path, name: str) -> Iterator[list[Variant]]:
    """The variants in Triton, on loopback; `repository` holds the models of both splits and gets the others."""
    from triton_server import Client, serving

    for other, path in ((f"{name}_original", original), (f"{name}_one", one), (f"{name}_batch", batch)):
        model = onnx.load(path, load_external_data=False)
        inputs, outputs = (
            [contracts.described(v) for v in values] for values in (model.graph.input, model.graph.output)
        )
        text = write(configs.model(other, inputs, outputs, 2, batches.convention(model)))
        (repository / other / "1").mkdir(parents=True, exist_ok=True)
        (repository / other / "1" / "model.onnx").write_bytes(Path(path).read_bytes())
        (repository / other / configs.CONFIG).write_text(text)
    found = lint(repository)
    if found:
        raise SystemExit("\n".join(map(str, found)))
    with ExitStack() as open_, serving(repository, cache=256 << 20) as first:

        def client(model: str, parts: Callable[[Request], Arrays], joined: bool = False) -> Callable[[], Serve]:
            def connect() -> Serve:
                own = open_.enter_context(closing(Client(first.port)))
                if not joined:
                    return lambda r: own.infer(model, parts(r))
                return lambda r: {n: v[0] for n, v in own.infer(model, parts(r)).items()}

            return connect

        def counted(*models: str) -> Callable[[], tuple[int | None, int | None, int | None]]:
            def count() -> tuple[int | None, int | None, int | None]:
                scores = first.statistics(f"{name}_{models[-1]}")["executions"]
                if len(models) == 1:
                    return None, None, scores
                states = first.statistics(f"{name}_{models[0]}")
                return states["executions"], states["hits"], scores

            return count

        def both(r: Request) -> Arrays:
            return {**r.once, **r.many}

        def item(r: Request) -> Arrays:
            return {**r.once, **{n: v[None] for n, v in r.many.items()}}

        yield [
            Variant("original", client(f"{name}_original", lambda r: r.whole), counted("original")),
            Variant("one file", client(f"{name}_one", both), counted("one")),
            Variant("two files", client(name, both), counted("request", "candidate")),
            Variant("batch", client(f"{name}_batch", item, True), counted("batch")),
            Variant("two, joined", client(f"{name}_joined", item, True), counted("joined_request", "joined_candidate")),
        ]


# --- several requests per call ---------------------------------------------------------------------------------------


@dataclass
class Joined:
    """What one call for several requests takes, and the same requests one after the other."""

    model: str
    requests: int
    candidates: int
    call_us: float
    loop_us: float
    ratio: float
    wrong: int


def joined(path: Path, roles: Roles, points: Sequence[tuple[int, int]], how: BatchOptions) -> list[Joined]:
    """Times a model at numbers of requests and of candidates of each.

    Args:
        path: The original.
        roles: Roles of its inputs.
        points: Requests, and candidates of each.
        how: How several requests are taken.
    """
    loaded = files.load(path)
    trace = Trace(Study(files.flattened(loaded.proto), roles, loaded), {}, (1, 1))
    first = _session(str(path))
    names = [o.name for o in first.get_outputs()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        one, many = (str(Path(folder, f"{n}.onnx")) for n in ("one", "many"))
        for count, candidates in points:
            result = onnxrank.optimize(path, roles=roles, candidates=candidates, check=False)
            result.save(one)
            options = replace(how, requests=count)
            made = onnxrank.batch(path, options=options, roles=roles, candidates=candidates, check=False)
            made.save(many)
            told = batches.convention(made.model)
            assert told is not None
            alone, together = _session(one), _session(many)
            requests = [trace.request(k, candidates, k) for k in range(count)]
            single = [{**r.once, **r.many} for r in requests]
            # A model that would not gain with so few candidates is left as it is.
            loop = single if result.changed else [r.whole for r in requests]
            call = partial(together.run, names, batches.joined(told, single))
            parts = batches.parted(told, dict(zip(names, call(), strict=True)), [candidates] * count)
            want = [dict(zip(names, first.run(names, r.whole), strict=True)) for r in requests]
            wrong = sum(not _same(p, w) for p, w in zip(parts, want, strict=True))
            once, after = _in_turns(call, partial(_loop, alone, names, loop))
            rows.append(Joined(path.name, count, candidates, once, after, after / once, wrong))
            times = f"{once:9.0f} us {after:9.0f} us {after / once:6.2f}x {wrong} wrong"
            print(f"{path.name:<40} {count:3d} x {candidates:<4d} {times}", flush=True)
    return rows


def _loop(session: onnxruntime.InferenceSession, names: Sequence[str], feeds: Sequence[Arrays]) -> None:
    for feed in feeds:
        session.run(names, feed)


def _in_turns(*runs: Callable[[], object]) -> tuple[float, ...]:
    """Median microseconds of the processor that each takes, in turns: what others do on the machine does not count."""
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + 2.0
    while time.perf_counter() < end or len(times[0]) < 15:
        for own, run in zip(times, runs, strict=True):
            begin = time.process_time()
            run()
            own.append(1e6 * (time.process_time() - begin))
    return tuple(statistics.median(t[2:]) for t in times)


def joined_all(given: argparse.Namespace) -> int:
    """`--batch`: a table, and geometric means."""
    points = [(int(r), int(n)) for r, _, n in (p.partition("x") for p in given.batch.split(","))]
    how = BatchOptions(given.interface, given.rows, turns=not given.no_turns)
    models = sorted(given.model.glob("*.onnx")) if given.model.is_dir() else [given.model]
    rows: list[Joined] = []
    for path in models:
        spec = given.roles or path.with_name(path.name.split(".")[0] + ".roles.yaml")
        roles = resolve(feeds.describe(files.load(path).proto), request=given.request, spec=load_spec(spec))
        rows += joined(path, roles, points, how)
    for r, n in points:
        own = [x.ratio for x in rows if (x.requests, x.candidates) == (r, n)]
        print(f"R = {r}, N = {n}: {statistics.geometric_mean(own):.3f}x over {len(own)} models")
    if given.json is not None:
        given.json.write_text(json.dumps([vars(r) for r in rows], indent=2) + "\n")
    return int(any(r.wrong for r in rows))


# --- measuring -------------------------------------------------------------------------------------------------------


def race(
    variants: Sequence[Variant], trace: Sequence[Request], wanted: Sequence[Arrays], clients: int, first: Request
) -> None:
    """Has every variant serve the trace, in turns, when each of its clients has warmed up with a first request."""
    serves = [[v.client() for _ in range(clients)] for v in variants]
    for own in serves:
        for serve in own:
            serve(first)
    for v in variants:
        v.before = v.counted() if v.counted is not None else (None, None, None)
    seen = set()
    repeats = []
    for r in trace:
        repeats.append(r.user in seen)
        seen.add(r.user)
    with ThreadPoolExecutor(clients) as pool:
        for k, start in enumerate(range(0, len(trace), _PIECE)):
            order = list(range(len(variants)))
            for j in order[k % len(order) :] + order[: k % len(order)]:
                _piece(
                    pool, variants[j], serves[j], range(start, min(start + _PIECE, len(trace))), trace, wanted, repeats
                )


def _piece(
    pool: ThreadPoolExecutor,
    variant: Variant,
    serves: Sequence[Serve],
    which: range,
    trace: Sequence[Request],
    wanted: Sequence[Arrays],
    repeats: Sequence[bool],
) -> None:
    waiting, served, free = list(which), set[int](), threading.Condition()

    def following() -> int | None:
        """The next request whose user does not wait for another; None where there is none."""
        return next((k for k in waiting if trace[k].user not in served), None)

    def work(serve: Serve) -> list[tuple[int, float, Arrays]]:
        done = []
        while True:
            with free:
                free.wait_for(lambda: not waiting or following() is not None)
                k = following()
                if k is None:
                    return done
                waiting.remove(k)
                served.add(trace[k].user)
            begin = time.perf_counter()
            try:
                got = serve(trace[k])
            finally:
                seconds = time.perf_counter() - begin
                with free:
                    served.discard(trace[k].user)
                    free.notify_all()
            done.append((k, seconds, got))

    begin = time.perf_counter()
    found = [d for part in pool.map(work, serves) for d in part]
    variant.busy += time.perf_counter() - begin
    for k, seconds, got in found:
        variant.seconds.append(seconds)
        variant.hits.append(repeats[k])
        variant.wrong += not _same(got, wanted[k])


def _same(got: Arrays, want: Arrays) -> bool:
    return all(
        got[name].shape == v.shape and np.all(np.abs(got[name] - v) <= _FAR * max(1e-6, np.abs(v).max(initial=0.0)))
        for name, v in want.items()
    )


def summary(runtime: str, variant: Variant, rate: float, clients: int) -> Row:
    """A variant's row."""
    ms = sorted(1e3 * s for s in variant.seconds)
    by = {h: [1e3 * s for s, hit in zip(variant.seconds, variant.hits, strict=True) if hit == h] for h in (True, False)}
    counts: list[int | None] = [None] * 3
    if variant.counted is not None:
        counts = [
            None if before is None or after is None else after - before
            for before, after in zip(variant.before, variant.counted(), strict=True)
        ]
    split_ = counts[0] is not None
    return Row(
        runtime,
        variant.name,
        rate,
        clients,
        len(ms),
        len(ms) / variant.busy,
        statistics.median(ms),
        ms[min(len(ms) - 1, int(0.99 * len(ms)))],
        ms[0],
        min(by[True]) if split_ and by[True] else None,
        min(by[False]) if split_ and by[False] else None,
        statistics.median(by[True]) if split_ and by[True] else None,
        statistics.median(by[False]) if split_ and by[False] else None,
        *counts,
        variant.wrong,
    )


def _shown(row: Row) -> str:
    def number(value: float | None) -> str:
        return f"{'-':>9}" if value is None else f"{value:9.3f}"

    counts = "" if row.request_executions is None else f"  {row.request_executions} states made, {row.cache_hits} hits"
    counts += "" if row.executions is None else f"  {row.executions} executions"
    times = "".join(map(number, (row.p50_ms, row.p99_ms, row.p50_hit_ms, row.p50_miss_ms)))
    times += "".join(map(number, (row.best_ms, row.best_hit_ms, row.best_miss_ms)))
    return (
        f"{row.runtime:<12} {row.variant:<11} {row.hit_rate:4.0%} {row.concurrency:3d} {row.per_second:9.0f}/s"
        f"{times} {row.wrong:5d}{counts}"
    )


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _lengths(texts: Sequence[str]) -> dict[str, int]:
    return {name: int(n) for name, _, n in (t.rpartition("=") for t in texts)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--roles", type=Path)
    parser.add_argument("--request", action="append", default=[])
    parser.add_argument("--requests", type=int, default=600, help="requests of each trace")
    parser.add_argument("--candidates", default="8..512")
    parser.add_argument("--hits", type=_numbers, default=[0, 50, 90], help="hit rates in per cent")
    parser.add_argument("--clients", type=_numbers, default=[1])
    parser.add_argument("--length", action="append", default=[], metavar="NAME=N")
    parser.add_argument("--no-original", action="store_true", help="leave the original out, which takes longest")
    parser.add_argument("--only", help="one variant, such as 'two, joined'")
    parser.add_argument("--triton", action="store_true", help="in Triton too: see scripts/triton_server.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", metavar="RxN,…", help="several requests per call instead of a trace")
    parser.add_argument("--interface", default="batch")
    parser.add_argument("--rows", default="lengths")
    parser.add_argument("--no-turns", action="store_true", help="with --batch: no loop over requests in the model")
    given = parser.parse_args()
    if given.batch is not None:
        return joined_all(given)
    low, high = (int(n) for n in given.candidates.split(".."))
    spec = None if given.roles is None else load_spec(given.roles)
    loaded = files.load(given.model)
    roles = resolve(feeds.describe(loaded.proto), request=given.request, spec=spec)
    study = Study(files.flattened(loaded.proto), roles, loaded)
    trace = Trace(study, _lengths(given.length), (low, high))
    warm = trace.first()
    rows: list[Row] = []

    def chosen(variants: list[Variant]) -> list[Variant]:
        return [v for v in variants[int(given.no_original) :] if given.only in (None, v.name)]

    load = os.getloadavg()[0]
    heads = "".join(f"{what:>9}" for what in ("p50 ms", "p99 ms", "hit", "miss", "best", "hit", "miss"))
    print(f"{'':<23} hits  cl            {heads} wrong")
    with tempfile.TemporaryDirectory() as folder:
        home, one = Path(folder), str(Path(folder, "one.onnx"))
        result = onnxrank.optimize(given.model, roles=roles, candidates=(low, high))
        result.save(one)
        batch, flat = str(home / "batch.onnx"), str(home / "flat.onnx")
        for place, form in ((batch, "lengths"), (flat, "triton")):
            how = BatchOptions(rows=form)
            onnxrank.batch(given.model, options=how, roles=roles, candidates=(low, high), check=False).save(place)
        report = split(given.model, home / "two", roles=roles, candidates=(low, high)).report
        for rate in given.hits:
            requests = trace.make(given.requests, rate / 100)
            first = _session(str(given.model))
            names = [o.name for o in first.get_outputs()]
            wanted = [dict(zip(names, first.run(names, r.whole), strict=True)) for r in requests]
            for clients in given.clients:
                # A cache and a server of their own, so that no trace finds what another one left.
                rows += _measured(
                    "onnxruntime",
                    chosen(plain(str(given.model), one, home / "two", batch)),
                    requests,
                    wanted,
                    rate,
                    clients,
                    warm,
                )
                if given.triton:
                    print(f"{len({r.user for r in requests})} users", flush=True)
                    place = home / f"repository-{rate}-{clients}"
                    _repository(given.model, place, roles, (low, high))
                    with served(str(given.model), one, flat, place, "ranker") as variants:
                        rows += _measured("triton", chosen(variants), requests, wanted, rate, clients, warm)
    print(f"\n{_table(rows)}\n\nload of the machine: {load:.1f} before, {os.getloadavg()[0]:.1f} after")
    if given.json is not None:
        about = {
            "model": given.model.name,
            "state_bytes": report.state_bytes,
            "advice": report.advice.files,
            "lengths": _lengths(given.length),
            "candidates": [low, high],
            "onnxruntime": onnxruntime.__version__,
            "load": [load, os.getloadavg()[0]],
        }
        given.json.write_text(json.dumps({**about, "rows": [vars(r) for r in rows]}, indent=2) + "\n")
    return int(any(r.wrong for r in rows))


def _repository(model: Path, place: Path, roles: Roles, span: tuple[int, int]) -> None:
    """The models of both splits: that which scores request by request, and that which joins requests."""
    for name, rows in (("ranker", None), ("ranker_joined", "triton")):
        how = Options("triton", name=name, rows=rows)
        split(model, place.with_name(name), options=how, roles=roles, candidates=span, check=False)
        for part in place.with_name(name).iterdir():
            if part.is_dir():
                place.mkdir(exist_ok=True)
                part.rename(place / part.name)
        shutil.rmtree(place.with_name(name))


def _table(rows: Sequence[Row]) -> str:
    """Markdown: a line per variant, columns per number of clients."""
    clients = sorted({r.concurrency for r in rows})
    heads = [f"{c} client{'s' * (c > 1)}: per s, p50, p99 ms" for c in clients]
    lines = [f"| | | hits | {' | '.join(heads)} |", "|---" * (3 + len(clients)) + "|"]
    for runtime, variant, rate in dict.fromkeys((r.runtime, r.variant, r.hit_rate) for r in rows):
        own = {r.concurrency: r for r in rows if (r.runtime, r.variant, r.hit_rate) == (runtime, variant, rate)}
        cells = [f"{own[c].per_second:.0f}, {own[c].p50_ms:.1f}, {own[c].p99_ms:.1f}" for c in clients]
        lines.append(f"| {runtime} | {variant} | {rate:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _measured(
    runtime: str,
    variants: Sequence[Variant],
    requests: list[Request],
    wanted: list[Arrays],
    rate: int,
    clients: int,
    first: Request,
) -> list[Row]:
    if variants:
        race(variants, requests, wanted, clients, first)
    rows = [summary(runtime, v, rate / 100, clients) for v in variants]
    for row in rows:
        print(_shown(row), flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
