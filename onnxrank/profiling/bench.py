"""Models that are timed, in a process of their own: both sides of it.

The sessions of all models stand in one process and take turns there, so that nothing but numbers has to come back
while the time is taken.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import workers
from onnxrank.culprit import culprit
from onnxrank.errors import CheckFailed, EnvironmentProblem, ModelError, OutOfMemory
from onnxrank.model import LoadedModel, flattened
from onnxrank.profiling import timing
from onnxrank.profiling.kernels import Event, Node, Tracer, telling
from onnxrank.profiling.report import Kernel, Kernels, Memory, Share
from onnxrank.profiling.sessions import Loop, Peak, Requests, Runner, Target, open_session
from onnxrank.workers import Crashed, Worker

_STATUS = Path("/proc/self/status")
_RUNS = 3  # for the peak of memory
_TURNS = 64
"""Times the duration of the longest run that timing may take beyond the seconds given to it."""


class Bench:
    """Sessions, and what is measured of them, within the process that runs them.

    Args:
        models: Models in memory by key, with the folders of their external data.
    """

    def __init__(self, models: Mapping[str, tuple[ModelProto, str | None]]) -> None:
        self._models = models
        self._sessions: dict[str, tuple[Any, Target]] = {}
        self._runners: dict[str, Runner | Loop] = {}
        self._peak: Peak | None = None
        self._tracer: Tracer | None = None

    def open(self, session: str, path: str | None, target: Sequence[Any]) -> list[str]:
        """Makes a session.

        Args:
            session: Its key, and that of the model if it is one in memory.
            path: The model's file; None for a model in memory.
            target: Where it runs.

        Returns:
            Its execution providers.
        """
        how = Target(*target)
        model, folder = (Path(path), None) if path is not None else self._inlined(session)
        made = open_session(model, how, folder)
        self._sessions[session] = made, how
        return list(made.get_providers())

    def hold(self, session: str, requests: Requests, turns: int = 1) -> float:
        """Takes requests for a session, in the place of those before, and runs each once.

        Args:
            session: Which.
            requests: The requests.
            turns: How many of them make a run, one after the other.

        Returns:
            Seconds of the longest run.
        """
        self._runners.pop(session, None)
        made, how = self._sessions[session]
        own = Runner(made, requests, how)
        run = self._runners[session] = own if turns == 1 else Loop(own, turns)
        return max(run(k) for k in range(len(requests) // turns))

    def interleave(self, sessions: Sequence[str], seconds: float) -> dict[str, Any]:
        """Times sessions in turns on the requests that they hold, and the machine's peak before and after."""
        runners = [self._runners[s] for s in sessions]
        self._peak = self._peak or Peak(self._sessions[sessions[0]][1])
        before = self._peak()
        rounds = timing.interleave(runners, seconds)
        copies = [r.copies for r in runners]
        peak = (before + self._peak()) / 2
        return {"seconds": rounds.seconds, "settled": rounds.settled, "copies": copies, "peak": peak}

    def scores(self, session: str) -> list[NDArray[Any]]:
        """Outputs for the first request that a session holds."""
        return [np.asarray(v) for v in self._runners[session].scores(0)]

    def memory(self, session: str, path: str | None, target: Sequence[Any], requests: Requests) -> list[int]:
        """Makes a session and runs requests on it.

        Returns:
            Bytes of resident memory before, with the session made, and at the peak.
        """
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
        start = _resident("VmRSS")
        self.open(session, path, target)
        loaded = _resident("VmRSS")
        made, how = self._sessions[session]
        run = Runner(made, requests, how)
        for k in range(_RUNS):
            run(k)
        return [start, loaded, _resident("VmHWM")]

    def trace(self, model: str, target: Sequence[Any]) -> None:
        """Makes a session under onnxruntime's profiler."""
        self._tracer = Tracer(*self._inlined(model), Target(*target))

    def traced(self, candidates: int, requests: Requests, once: bool) -> None:
        """Runs it at a number of candidates."""
        assert self._tracer is not None
        (self._tracer.once if once else self._tracer.runs)(candidates, requests)

    def kernels(self, nodes: Sequence[Sequence[Any]], candidates: Sequence[int]) -> dict[str, Any]:
        """Sums up what the profiler saw."""
        assert self._tracer is not None
        found, events = self._tracer.finish([Node(*n) for n in nodes], candidates)
        self._tracer = None
        return {"kernels": [asdict(k) for k in found], "events": events}

    def _inlined(self, key: str) -> tuple[ModelProto, str | None]:
        model, folder = self._models[key]
        return flattened(model), folder


DO: dict[str, Callable[..., Any]] = {
    do.__name__: do
    for do in (
        Bench.open, Bench.hold, Bench.interleave, Bench.scores, Bench.memory, Bench.trace, Bench.traced, Bench.kernels
    )
}  # fmt: skip
"""What may be asked for."""


def _resident(what: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    return 0


# --- the side of the command ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entrant:
    """A model that is measured.

    Attributes:
        key: What it is known by in the process.
        name: Its file, or a name for a model in memory.
        loaded: The model as given.
        working: The same with functions inlined.
        made: Whether it is what `optimize` made of another one that is measured, too.
    """

    key: str
    name: str
    loaded: LoadedModel
    working: ModelProto
    made: bool

    @property
    def path(self) -> str | None:
        """Its file."""
        return None if self.loaded.path is None else os.path.abspath(self.loaded.path)


class RemoteBench:
    """A process in which models are measured.

    Args:
        target: Where they run.
        timeout: Seconds for one step; timing gets more.
        fresh: Whether it must be a process that has run nothing yet.
    """

    def __init__(self, target: Target, timeout: float, fresh: bool = False) -> None:
        self._target = [getattr(target, f.name) for f in fields(target)]
        self._timeout = timeout
        self._worker: Worker = workers.fresh() if fresh else workers.take()
        self._longest = 0.0
        left = workers.available_memory() if target.provider == "cpu" else None  # GPU libraries reserve any amount
        limit = None if left is None else left + workers.LIBRARIES
        self._worker.call("limit", timeout, memory=limit)

    def __enter__(self) -> RemoteBench:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            workers.give(self._worker)
        else:
            self._worker.kill()

    def place(self, model: Entrant, proto: ModelProto) -> None:
        """Hands over a model in memory: the one given, or that with functions inlined."""
        with self._watching([model], "while it is read"):
            workers.place(self._worker, model.key, proto, model.loaded.folder, self._timeout)

    def open(self, model: Entrant) -> tuple[str, ...]:
        """Makes a session; returns its execution providers."""
        if model.path is None:
            self.place(model, model.loaded.proto)
        with self._watching([model], "while it is loaded"):
            return tuple(map(str, self._call("open", session=model.key, path=model.path, target=self._target)))

    def hold(self, model: Entrant, candidates: int, requests: Requests, turns: int = 1) -> None:
        """Hands over the requests of the next measurement, and runs each once; so many in turn make a run."""
        with self._watching([model], f"at N = {candidates}", requests[0]):
            took = float(self._call("hold", session=model.key, requests=list(requests), turns=turns))
            self._longest = max(self._longest, took)

    def interleave(
        self, models: Sequence[Entrant], candidates: int, seconds: float
    ) -> tuple[timing.Rounds, list[float | None], float]:
        """Times models in turns on the requests that they hold.

        Returns:
            The times, per model the seconds per run for copies between host and device, where known, and the
            multiply-adds per second of one large product.
        """
        keys = [m.key for m in models]
        with self._watching(models, f"at N = {candidates}"):
            got = self._call("interleave", seconds + _TURNS * self._longest, sessions=keys, seconds=seconds)
            took = np.asarray(got["seconds"], np.float64)
            if took.ndim != 3 or len(took) != len(models) or len(got["copies"]) != len(models):
                raise ValueError
            return timing.Rounds(took, bool(got["settled"])), list(got["copies"]), float(got["peak"])

    def scores(self, model: Entrant, candidates: int) -> list[NDArray[Any]]:
        """Outputs for the first request that a model holds."""
        with self._watching([model], f"at N = {candidates}"):
            return [np.asarray(v) for v in self._call("scores", session=model.key)]

    def kernels(
        self,
        model: Entrant,
        nodes: Sequence[Node],
        draw: Callable[[int], Requests],
        candidates: Sequence[int],
    ) -> tuple[list[Kernels], list[Event]]:
        """Profiles the kernels of a model at several numbers of candidates.

        Returns:
            The kernels per number of candidates, and events for a Chrome trace, a few runs each.
        """
        self.place(model, model.working)
        with self._watching([model], "under onnxruntime's profiler"):
            self._call("trace", model=model.key, target=self._target)
        first = telling(model.working)
        for k, n in enumerate((*first, *candidates)):
            with self._watching([model], f"under onnxruntime's profiler at N = {n}"):
                self._call("traced", self._longest, candidates=n, requests=list(draw(n)), once=k < len(first))
        with self._watching([model], "under onnxruntime's profiler"):
            got = self._call("kernels", nodes=[[n.name, n.rule, n.once] for n in nodes], candidates=list(candidates))
            return [_kernels(k) for k in got["kernels"]], list(got["events"])

    def memory(self, model: Entrant, requests: Requests, candidates: int) -> Memory:
        """Loads and runs a model for its resident memory."""
        if model.path is None:
            self.place(model, model.loaded.proto)
        with self._watching([model], f"at N = {candidates}"):
            got = self._call("memory", session=model.key, path=model.path, target=self._target, requests=list(requests))
            start, loaded, peak = map(int, got)
            return Memory(candidates, start, loaded, peak)

    def _call(self, what: str, more: float = 0.0, **arguments: Any) -> Any:
        return self._worker.call("bench", self._timeout + more, what=what, **arguments)

    @contextlib.contextmanager
    def _watching(self, models: Sequence[Entrant], where: str, feed: workers.Feeds | None = None) -> Iterator[None]:
        """Says which model did it, where its process dies, has too little memory or answers nonsense.

        Args:
            models: What runs.
            where: What is done, in words.
            feed: What it runs on, where that may tell the node.
        """
        names = " and ".join(m.name for m in models)
        try:
            yield
        except OutOfMemory as e:
            raise EnvironmentProblem(
                f"There is not enough memory to run {names} {where}: {e}. Give fewer --candidates."
            ) from e
        except Crashed as e:
            if "bad_alloc" in str(e) or "SIGKILL" in str(e):
                raise EnvironmentProblem(
                    f"There is not enough memory to run {names} {where}: its process {e}. Give fewer --candidates."
                ) from e
            kind = CheckFailed if all(m.made for m in models) else ModelError
            node = None
            if e.kind == "crash" and feed is not None:
                (model,) = models
                node = culprit(model.working, model.loaded.folder, feed, optimise=True)
            at = f" at node {node}" if node else ""
            raise kind(f"{names} makes onnxruntime fail {where}{at}: its process {_did(e)}.") from e
        except ModelError as e:
            raise ModelError(f"{names}, {where}: {e}") from e
        except (TypeError, KeyError, ValueError, AttributeError):
            with contextlib.suppress(Crashed):
                self._worker.nonsense()
            raise ModelError(f"{names} makes onnxruntime fail {where}: its process answered nonsense.") from None


def _did(e: Crashed) -> str:
    return f"gave {e}" if e.kind == "timeout" else str(e)


def _kernels(found: Mapping[str, Any]) -> Kernels:
    """Kernels as the process wrote them."""
    made = dict(found)
    for name in ("levels", "operators", "rules", "providers"):
        made[name] = tuple(Share(**s) for s in found[name])
    return Kernels(
        **{**made, "copies": Share(**found["copies"]), "longest": tuple(Kernel(**k) for k in found["longest"])}
    )
