"""Models that are compressed, in processes of their own: scores, statistics and times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import workers
from onnxrank.compress.requests import Batch
from onnxrank.compress.statistics import Moments
from onnxrank.errors import ModelError
from onnxrank.feeds import Feed
from onnxrank.turns import interval, ratio
from onnxrank.workers import Crashed, Worker

Scores = dict[str, NDArray[np.float64]]
KEPT = "choice"
ORIGINAL = "original"


class Runner:
    """Processes that hold the same models.

    Args:
        jobs: How many.
        timeout: Seconds for one step.
        memory: Bytes of address space of each.
    """

    def __init__(self, jobs: int = 1, timeout: float = 120.0, memory: int | None = None) -> None:
        self._timeout, self._memory = timeout, memory
        self._crew: list[Worker] = []
        self._jobs = max(1, jobs)
        self._numbers = count()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for w in self._crew:
            if kind is None:
                workers.give(w)
            else:
                w.kill()
        self._crew = []

    def load(self, key: str, model: ModelProto, folder: Path | None = None) -> None:
        """Gives a model to all processes."""
        if not self._crew:
            self._crew = [workers.take() for _ in range(self._jobs)]
            limit = self._memory or workers.memory_limit(model.ByteSize())
            for w in self._crew:
                w.call("limit", self._timeout, memory=limit)
        for w in self._crew:
            workers.place(w, key, model, folder, self._timeout)

    def open(
        self, session: str, key: str, expose: Sequence[str] = (), optimise: bool = True, all_of_them: bool = True
    ) -> None:
        """Makes a session of a model, in the first process or in all."""
        for w in self._crew if all_of_them else self._crew[:1]:
            with told(key):
                w.call(
                    "compress", self._timeout, what="open", session=session, key=key, expose=list(expose),
                    optimise=optimise,
                )  # fmt: skip

    def close(self, session: str) -> None:
        """Forgets a session."""
        for w in self._crew:
            w.call("compress", self._timeout, what="forget", session=session)

    # --- many requests ---------------------------------------------------------------------------------------

    def each(self, batches: Iterator[Batch], what: str, **how: Any) -> Iterator[tuple[Batch, Any]]:
        """Has every batch worked on, and gives what came of it, in order.

        Batches go to the processes in turn, so that sums are made in the same order in every run.
        """

        def done(w: Worker, batch: Batch) -> Any:
            with told("the model"):
                return w.call("compress", self._timeout, what=what, feeds=batch.feeds, **how)

        with contextlib.ExitStack() as stack:
            threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in self._crew]
            pending: list[tuple[Batch, Future[Any]]] = []
            try:
                for k, batch in enumerate(batches):
                    at = k % len(threads)
                    pending.append((batch, threads[at].submit(done, self._crew[at], batch)))
                    if len(pending) >= 2 * len(threads):
                        first, found = pending.pop(0)
                        yield first, found.result()
                for batch, future in pending:
                    yield batch, future.result()
            except BaseException:
                for _, future in pending:
                    future.cancel()
                raise

    def collected(self) -> dict[str, Moments | NDArray[np.int64]]:
        """The sums of all processes, together."""
        out: dict[str, Any] = {}
        for w in self._crew:
            for name, found in w.call("compress", self._timeout, what="collected").items():
                value = Moments(**found) if isinstance(found, dict) else found
                out[name] = out[name] + value if name in out else value
        return out

    # --- requests that are kept --------------------------------------------------------------------------------

    def keep(self, feeds: Sequence[Feed]) -> None:
        """Keeps requests in the first process, for `scores`."""
        self._crew[0].call("compress", self._timeout, what="keep", name=KEPT, feeds=list(feeds))

    def scores(self, session: str, names: Sequence[str]) -> Scores:
        """Tensors of a session on the requests that are kept, `[R, columns]`."""
        with told("the compressed model"):
            found = self._crew[0].call(
                "compress", self._timeout * 4, what="scores", session=session, names=list(names), kept=KEPT
            )
        return {n: v.astype(np.float64) for n, v in found.items()}

    def of_feeds(self, session: str, names: Sequence[str], feeds: Sequence[Feed]) -> Scores:
        """Tensors of a session on some requests, `[R, columns]`."""
        found = self._crew[0].call(
            "compress", self._timeout, what="scores", session=session, names=list(names), feeds=list(feeds)
        )
        return {n: v.astype(np.float64) for n, v in found.items()}

    def shapes(self, session: str, feed: Feed, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors on one request."""
        found = self._crew[0].call(
            "compress", self._timeout, what="depths", session=session, feed=feed, names=list(names)
        )
        return {n: tuple(v) for n, v in found.items()}

    def crossed(self, seen: str, wanted: str, x: Sequence[str], y: Sequence[str]) -> tuple[Moments, Moments, Any]:
        """What a layer sees in one session with what it gives in another; see `Inside.crossed`."""
        found = self._crew[0].call(
            "compress", self._timeout * 4, what="crossed", seen=seen, wanted=wanted, kept=KEPT, x=list(x), y=list(y)
        )
        return Moments(**found["seen"]), Moments(**found["wanted"]), found["both"]

    # --- training --------------------------------------------------------------------------------------------

    def prepare(
        self, model: ModelProto, sites: Sequence[Mapping[str, Any]], outputs: Sequence[str], **how: Any
    ) -> tuple[list[str], dict[str, str]]:
        """Makes the first process ready to train a model; see `Inside.prepare`."""
        workers.place(self._crew[0], "tuned", model, None, self._timeout)
        found = self._crew[0].call(
            "compress", self._timeout, what="prepare", key="tuned", sites=list(sites), outputs=list(outputs), **how
        )
        return found["sites"], found["refused"]

    def tune(self, batch: Batch, labels: Mapping[str, NDArray[np.float64]]) -> float:
        """Trains a step; returns the loss."""
        with told("the model that is trained"):
            return float(
                self._crew[0].call(
                    "compress", self._timeout, what="tune", original=ORIGINAL, feeds=batch.feeds, labels=dict(labels)
                )
            )

    def tuned(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """What was trained, by layer."""
        found: dict[str, dict[str, NDArray[np.float64]]] = self._crew[0].call("compress", self._timeout, what="tuned")
        return found

    # --- one model of many -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def session(self, model: ModelProto, expose: Sequence[str] = ()) -> Iterator[str]:
        """A session of a model in the first process, as long as it is needed."""
        key = f"made {next(self._numbers)}"
        workers.place(self._crew[0], "made", model, None, self._timeout)
        try:
            self._crew[0].call("compress", self._timeout, what="open", session=key, key="made", expose=list(expose))
            yield key
        finally:
            if self._crew and self._crew[0].alive:
                self._crew[0].call("compress", self._timeout, what="forget", session=key)

    def race(self, sessions: Sequence[str], feed: Feed, seconds: float) -> NDArray[np.float64]:
        """Times sessions of the first process in turns: median seconds per turn, `[sessions, rounds]`."""
        turns = self._crew[0].call(
            "compress", self._timeout + seconds, what="race", sessions=list(sessions), feed=feed, seconds=seconds
        )
        return np.asarray(np.median(turns, axis=2))


def speed(turns: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Of two sessions: median seconds of the second, and the time of the first over its with the interval's ends."""
    return (float(np.median(turns[1])), *ratio(turns[0], turns[1]))


def median(turns: NDArray[np.float64]) -> tuple[float, float, float]:
    """Median seconds of one session's turns and the ends of its interval."""
    return (float(np.median(turns)), *interval(turns))


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Says whose process died, where one does."""
    try:
        yield
    except Crashed as e:
        how = f"gave {e}" if e.kind == "timeout" else str(e)
        raise ModelError(f"{what} makes onnxruntime fail: its process {how}.") from e
