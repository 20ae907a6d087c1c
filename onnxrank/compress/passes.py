"""What is asked of all rows, portion by portion: sums for calibration, scores for the gate.

Each is a task for an engine (`engines.py`): portions are worked on anywhere, and put together in their order, so the
result is the same on one machine and on many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import workers
from onnxrank.compress.requests import CALIBRATION, GATE, Batch, Portion, Requests, Seen
from onnxrank.compress.runner import told
from onnxrank.compress.statistics import Moments
from onnxrank.engines import Engine
from onnxrank.workers import Worker

_MODEL = "model"
Sum = Moments | NDArray[np.int64]


@dataclass(frozen=True)
class _Pass:
    """A model over the rows of one part.

    Attributes:
        data: The requests.
        model: The model.
        timeout: Seconds for one step.
        memory: Bytes of address space of its process.
        expose: Tensors that it gives beside its outputs.
        optimise: Whether onnxruntime's own graph optimisations run.
    """

    data: Requests
    model: ModelProto
    timeout: float
    memory: int | None
    expose: Sequence[str] = ()
    optimise: bool = True

    def open(self) -> Worker:
        """A process with the model."""
        worker = workers.take()
        memory = self.memory or workers.memory_limit(self.model.ByteSize())
        with told("the model"):
            worker.call("limit", self.timeout, memory=memory)
            workers.place(worker, _MODEL, self.model, None, self.timeout)
            worker.call(
                "compress", self.timeout, what="open", session=_MODEL, key=_MODEL, expose=list(self.expose),
                optimise=self.optimise,
            )  # fmt: skip
        return worker

    def close(self, held: Worker, good: bool) -> None:
        """Gives the process back, or ends it."""
        if good:
            workers.give(held)
        else:
            held.kill()

    def _each(self, worker: Worker, batches: Iterator[Batch], what: str, **how: Any) -> Iterator[tuple[Batch, Any]]:
        """Has every batch worked on, the next one being read meanwhile."""
        before: Batch | None = None
        for batch in batches:
            if before is not None:
                yield before, self._result(worker)
            worker.ask("compress", what=what, session=_MODEL, feeds=batch.feeds, **how)
            before = batch
        if before is not None:
            yield before, self._result(worker)

    def _result(self, worker: Worker) -> Any:
        with told("the model"):
            return worker.result(self.timeout)


@dataclass
class Sums:
    """Sums over calibration rows.

    Attributes:
        found: By name.
        rows: Number of rows.
        requests: Number of requests.
        seen: Which requests there are, of both parts.
    """

    found: dict[str, Sum] = field(default_factory=dict)
    rows: int = 0
    requests: int = 0
    seen: Seen = field(default_factory=Seen)


@dataclass(frozen=True)
class Summing(_Pass):
    """Sums over calibration rows.

    Attributes:
        products: Per sum the tensors of which moments are taken.
        lookups: Per sum the tensors of ids, and the number of rows of the table.
    """

    products: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lookups: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def run(self, held: Worker, part: Portion) -> Sums:
        """Sums of one portion."""
        out = Sums()
        how: dict[str, Any] = {"products": self.products, "lookups": self.lookups, "outputs": []}
        for batch, _ in self._each(held, self.data.of(part, CALIBRATION, out.seen), "add", **how):
            out.rows += len(batch.request)
            out.requests += len(batch.names)
        with told("the model"):
            found = held.call("compress", self.timeout, what="collected")
        out.found = {k: Moments(**v) if isinstance(v, dict) else v for k, v in found.items()}
        return out


def summed(engine: Engine, task: Summing, say: Callable[[str], None]) -> Sums:
    """Sums over all calibration rows.

    Args:
        engine: Who works on it.
        task: What is summed.
        say: Told how far it is.

    Raises:
        UsageError: The data cannot be used, or a request is in both parts.
    """
    out = Sums()
    portions = task.data.portions
    for portion, its in zip(portions, engine.each(task, portions), strict=True):
        for name, value in its.found.items():
            out.found[name] = out.found[name] + value if name in out.found else value  # type: ignore[operator]
        out.rows += its.rows
        out.requests += its.requests
        task.data.together(out.seen, its.seen, portion)
        say(f"statistics: {out.rows} rows")
    return out


@dataclass(frozen=True)
class Scored:
    """Scores of rows.

    Attributes:
        scores: By output, `[R]`.
        request: Number of the request of every row, `[R]`.
        labels: `[R, labels]`; None where there are none.
        names: What the requests are called.
    """

    scores: Mapping[str, NDArray[np.float32]]
    request: NDArray[np.int64]
    labels: NDArray[np.float64] | None
    names: Sequence[str]

    @classmethod
    def together(cls, several: Sequence[Scored], outputs: Sequence[str]) -> Scored:
        """Those of parts that follow each other, of which at least one has rows."""
        numbers = np.cumsum([0, *(len(s.names) for s in several)])
        labels = [s.labels for s in several if s.labels is not None]
        return cls(
            {n: np.concatenate([s.scores[n] for s in several]) for n in outputs},
            np.concatenate([s.request + n for s, n in zip(several, numbers, strict=False)]),
            np.concatenate(labels) if labels else None,
            list(chain.from_iterable(s.names for s in several)),
        )


@dataclass(frozen=True)
class Scoring(_Pass):
    """Scores of the gate's rows.

    Attributes:
        outputs: Names of the scores.
    """

    outputs: Sequence[str] = ()

    def run(self, held: Worker, part: Portion) -> Scored | None:
        """Scores of one portion; None where it has no row for the gate."""
        several = [
            Scored(
                {n: made[n][:, 0].astype(np.float32) for n in self.outputs},
                batch.request - batch.request[0],
                batch.labels,
                batch.names,
            )
            for batch, made in self._each(held, self.data.of(part, GATE), "scores", names=list(self.outputs))
        ]
        return Scored.together(several, self.outputs) if several else None


def scored(engine: Engine, task: Scoring) -> Scored | None:
    """Scores of all of the gate's rows; None where there are none."""
    several = [s for s in engine.each(task, task.data.portions) if s is not None]
    return Scored.together(several, task.outputs) if several else None
