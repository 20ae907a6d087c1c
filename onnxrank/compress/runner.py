"""Models that are compressed, in a process of their own: scores of requests that are kept, fits, training, times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
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
    """A process that holds models.

    Args:
        timeout: Seconds for one step.
        memory: Bytes of its address space.
    """

    def __init__(self, timeout: float = 120.0, memory: int | None = None) -> None:
        self._timeout, self._memory = timeout, memory
        self._own: Worker | None = None
        self._numbers = count()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._own is not None:
            if kind is None:
                workers.give(self._own)
            else:
                self._own.kill()
        self._own = None

    @property
    def _worker(self) -> Worker:
        assert self._own is not None
        return self._own

    def load(self, key: str, model: ModelProto) -> None:
        """Gives it a model."""
        if self._own is None:
            self._own = workers.take()
            self._own.call("limit", self._timeout, memory=self._memory or workers.memory_limit(model.ByteSize()))
        workers.place(self._own, key, model, None, self._timeout)

    def open(self, session: str, key: str, expose: Sequence[str] = (), optimise: bool = True) -> None:
        """Makes a session of a model."""
        with told(key):
            self._worker.call(
                "compress", self._timeout, what="open", session=session, key=key, expose=list(expose),
                optimise=optimise,
            )  # fmt: skip

    def close(self, session: str) -> None:
        """Forgets a session."""
        self._worker.call("compress", self._timeout, what="forget", session=session)

    # --- requests that are kept --------------------------------------------------------------------------------

    def keep(self, feeds: Sequence[Feed]) -> None:
        """Keeps requests , for `scores`."""
        self._worker.call("compress", self._timeout, what="keep", name=KEPT, feeds=list(feeds))

    def scores(self, session: str, names: Sequence[str]) -> Scores:
        """Tensors of a session on the requests that are kept, `[R, columns]`."""
        with told("the compressed model"):
            found = self._worker.call(
                "compress", self._timeout * 4, what="scores", session=session, names=list(names), kept=KEPT
            )
        return {n: v.astype(np.float64) for n, v in found.items()}

    def of_feeds(self, session: str, names: Sequence[str], feeds: Sequence[Feed]) -> Scores:
        """Tensors of a session on some requests, `[R, columns]`."""
        found = self._worker.call(
            "compress", self._timeout, what="scores", session=session, names=list(names), feeds=list(feeds)
        )
        return {n: v.astype(np.float64) for n, v in found.items()}

    def shapes(self, session: str, feed: Feed, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Shapes of tensors on one request."""
        found = self._worker.call(
            "compress", self._timeout, what="depths", session=session, feed=feed, names=list(names)
        )
        return {n: tuple(v) for n, v in found.items()}

    def crossed(
        self, seen: str, wanted: str, x: Sequence[str], y: Sequence[Sequence[str]]
    ) -> tuple[Moments, Moments, Any]:
        """What a layer sees in one session with what it gives in another; see `Inside.crossed`."""
        found = self._worker.call(
            "compress",
            self._timeout * 4,
            what="crossed",
            seen=seen,
            wanted=wanted,
            kept=KEPT,
            x=list(x),
            y=[list(ts) for ts in y],
        )
        return Moments(**found["seen"]), Moments(**found["wanted"]), found["both"]

    # --- training --------------------------------------------------------------------------------------------

    def prepare(
        self, model: ModelProto, sites: Sequence[Mapping[str, Any]], outputs: Sequence[str], **how: Any
    ) -> tuple[list[str], dict[str, str]]:
        """Makes the process ready to train a model; see `Inside.prepare`."""
        workers.place(self._worker, "tuned", model, None, self._timeout)
        found = self._worker.call(
            "compress", self._timeout, what="prepare", key="tuned", sites=list(sites), outputs=list(outputs), **how
        )
        return found["sites"], found["refused"]

    def tune(self, batch: Batch, labels: Mapping[str, NDArray[np.float64]]) -> float:
        """Trains a step; returns the loss."""
        with told("the model that is trained"):
            return float(
                self._worker.call(
                    "compress", self._timeout, what="tune", original=ORIGINAL, feeds=batch.feeds, labels=dict(labels)
                )
            )

    def tuned(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """What was trained, by layer."""
        found: dict[str, dict[str, NDArray[np.float64]]] = self._worker.call("compress", self._timeout, what="tuned")
        return found

    # --- one model of many -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def session(self, model: ModelProto, expose: Sequence[str] = ()) -> Iterator[str]:
        """A session of a model , as long as it is needed."""
        key = f"made {next(self._numbers)}"
        workers.place(self._worker, "made", model, None, self._timeout)
        try:
            self._worker.call("compress", self._timeout, what="open", session=key, key="made", expose=list(expose))
            yield key
        finally:
            if self._own is not None and self._own.alive:
                self._worker.call("compress", self._timeout, what="forget", session=key)

    def race(self, sessions: Sequence[str], feed: Feed, seconds: float) -> NDArray[np.float64]:
        """Times sessions of the first process in turns: median seconds per turn, `[sessions, rounds]`."""
        turns = self._worker.call(
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
