"""One of the two models, in its process; the process is started again where the model killed it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank.errors import ModelError, OnnxrankError
from onnxrank.model import LoadedModel
from onnxrank.workers import Crashed, Outputs, Worker, give, hand, memory_limit, place, take

MODEL = "model"
_BATCH = 64 << 20
_MOST_DEATHS = 3
_LARGE = 256 << 20


class Side:
    """A model and the process that runs it.

    Args:
        name: `original` or `optimized`.
        loaded: The model.
        timeout: Seconds for one step.
        memory: Bytes of address space; None for a default by the model's size.
        guarded: Whether the address space is limited at all, which GPU libraries do not stand.
    """

    def __init__(
        self, name: str, loaded: LoadedModel, timeout: float, memory: int | None = None, guarded: bool = True
    ) -> None:
        self.name = name
        self.loaded = loaded
        self.timeout = timeout
        self._memory = (memory or memory_limit(_size(loaded))) if guarded else None
        self._worker: Worker | None = None
        self._opened: dict[str, dict[str, Any]] = {}
        self._there: dict[str, str] = {}
        self._due = 0  # answers to what is asked for before the model is there
        self._begun: set[str] = set()  # sessions that are made without anybody waiting
        self._asked: set[str] = set()  # sessions that somebody waits for

    @property
    def proto(self) -> ModelProto:
        """The model."""
        return self.loaded.proto

    @property
    def large(self) -> bool:
        """Whether it is too large to be kept in memory several times."""
        return _size(self.loaded) > _LARGE

    def twin(self) -> Side:
        """The same model with the same sessions for another process."""
        other = Side(self.name, self.loaded, self.timeout, self._memory, self._memory is not None)
        other._opened = dict(self._opened)
        return other

    def start(self) -> Worker:
        """The process, with the model in it."""
        worker = self._begin()
        self._settle()
        return worker

    def _begin(self) -> Worker:
        """The process, with the model on its way to it."""
        if self._worker is None or not self._worker.alive:
            self._worker = take()
            self._there = {}
            self._begun.clear()
            self._asked.clear()
            self._worker.ask("limit", memory=self._memory)
            hand(self._worker, MODEL, self.loaded.proto, self.loaded.folder, self.timeout)
            if self.loaded.split is not None:
                self._worker.ask("split", key=MODEL, folder=str(self.loaded.split))
            self._due = self._worker.pending
        return self._worker

    def _settle(self) -> None:
        """Waits for the model to be there."""
        while self._due:
            assert self._worker is not None
            self._due -= 1
            try:
                self._worker.result(self.timeout)
            except OnnxrankError as e:
                self._due = 0
                if not self._died_of_others(e):
                    raise
                self._begin()

    def _died_of_others(self, e: OnnxrankError) -> bool:
        """Whether the process may have died of a session that was being made, and not of what it was asked.

        Such sessions are made again where they are needed, one at a time, so that it is known which is to blame.
        """
        others = isinstance(e, Crashed) and e.kind == "crash" and bool(self._begun)
        self._begun.clear()
        return others

    def close(self, good: bool = True) -> None:
        """Gives the process back, or ends it."""
        if self._worker is not None:
            if good and not self._begun:  # such sessions may be in the making still
                give(self._worker)
            else:
                self._worker.kill()
            self._worker = None
        self._due = 0

    def replace(self, loaded: LoadedModel) -> None:
        """Takes another model that computes the same; sessions that were made stay."""
        self.loaded = loaded
        place(self.start(), MODEL, loaded.proto, loaded.folder, self.timeout)

    def call(self, do: str, **arguments: Any) -> Any:
        """Has the process do something.

        Raises:
            Crashed: The process died of it.
            ModelError: It cannot be done.
        """
        try:
            return self.start().call(do, self.timeout, **arguments)
        except Crashed as e:
            if not self._died_of_others(e):
                raise
            return self.start().call(do, self.timeout, **arguments)

    def ask(self, do: str, **arguments: Any) -> None:
        """Has the process do something; `result` waits for it."""
        self.start().ask(do, **arguments)

    def outputs(self, seconds: float | None = None) -> list[Outputs]:
        """What came of a run that was asked for.

        Args:
            seconds: How long to wait, if that is less than a step may take.
        """
        assert self._worker is not None
        return self._worker.outputs(self.timeout if seconds is None else min(seconds, self.timeout))

    def result(self, seconds: float | None = None) -> Any:
        """What came of what was asked.

        Args:
            seconds: How long to wait, if that is less than a step may take.
        """
        assert self._worker is not None
        return self._worker.result(self.timeout if seconds is None else min(seconds, self.timeout))

    def open(self, session: str, **how: Any) -> str:
        """Makes a session; `how` is as for `host.Host.open`.

        Returns:
            What it runs on: `onnxruntime`, `parts` or `reference`.
        """
        self.request(session, **how)
        return self.opened(session)

    def request(self, session: str, **how: Any) -> None:
        """Asks for a session, unless there is one made alike; `opened` waits for it."""
        if self._alike(session, how):
            return
        self._opened[session] = {"key": MODEL} | how
        self.ask("open", session=session, **self._opened[session])
        self._asked.add(session)

    def ahead(self, session: str, **how: Any) -> None:
        """Has a session made while the process does other things; `open` waits for it where it is needed."""
        if session in self._begun or self._alike(session, how):
            return
        self._opened[session] = {"key": MODEL} | how
        self._begin().ask("begin", session=session, **self._opened[session])
        self._due += 1
        self._begun.add(session)

    def _alike(self, session: str, how: Mapping[str, Any]) -> bool:
        """Whether a session was made before in the same way."""
        alive = self._worker is not None and self._worker.alive
        return alive and session in self._there and self._opened[session] == {"key": MODEL} | dict(how)

    def opened(self, session: str) -> str:
        """What a session that was asked for runs on."""
        if session in self._asked:
            self._asked.discard(session)
            others = self._begun - {session}
            try:
                made = self.result()
            except Crashed as e:
                if not others or not self._died_of_others(e):
                    raise
                made = self.start().call("open", self.timeout, session=session, **self._opened[session])
            finally:
                self._begun.discard(session)
            self._there[session] = str(made["how"])
        return self._there[session]

    def ensure(self, session: str) -> None:
        """Makes a session again that died with its process."""
        self.start()
        if session not in self._there:
            self.open(session, **self._opened[session])

    def spare(self, session: str) -> None:
        """Closes the session of a model too large to be kept several times; it is made again where it is needed."""
        if session in self._there and self.large:
            self.call("close", session=session)
            self._there.pop(session)

    def run(self, session: str, feeds: Sequence[Mapping[str, NDArray[Any]]], outputs: Sequence[str]) -> list[Outputs]:
        """Runs a session on several feeds.

        Returns:
            Per feed the outputs, or why there are none.
        """
        self.ensure(session)
        self.ask("run", session=session, feeds=list(feeds), outputs=list(outputs))
        return self.outputs()


def open_both(sides: Sequence[Side], session: str, **how: Any) -> list[OnnxrankError | None]:
    """Makes a session of each model, all models at once.

    Args:
        sides: The models.
        session: The session's key.
        **how: As for `host.Host.open`.

    Returns:
        Per model why there is none, or None.
    """
    asked: list[OnnxrankError | None] = []
    for side in sides:
        try:
            side.request(session, **how)
            asked.append(None)
        except OnnxrankError as e:
            asked.append(e)
    for k, side in enumerate(sides):
        if asked[k] is None:
            try:
                side.opened(session)
            except OnnxrankError as e:
                asked[k] = e
    return asked


def run_both(
    sides: Sequence[Side],
    session: str,
    feeds: Sequence[Sequence[Mapping[str, NDArray[Any]]]],
    outputs: Sequence[str],
) -> list[list[Outputs]]:
    """Runs a session of each model on its feeds, all models at once.

    Returns:
        Per model its answers; `Crashed` for the feeds that its process does not survive.
    """
    got: list[list[Outputs]] = [[] for _ in sides]
    count = len(feeds[0])
    at = 0
    while at < count:
        end, size = at, 0
        while end < count and (end == at or size < _BATCH):
            size += sum(v.nbytes for given in feeds for v in given[end].values())
            end += 1
        ready = []
        for side, given in zip(sides, feeds, strict=True):
            try:
                side.ensure(session)
                side.ask("run", session=session, feeds=list(given[at:end]), outputs=list(outputs))
                ready.append(True)
            except ModelError:
                ready.append(False)
        for k, (side, given) in enumerate(zip(sides, feeds, strict=True)):
            try:
                if not ready[k]:
                    raise Crashed("its process did not start again", "crash")
                got[k] += side.outputs()
            except ModelError:
                got[k] += _one_by_one(side, session, given[at:end], outputs)
        at = end
    return got


def run_once(
    sides: Sequence[Side],
    session: str,
    feeds: Sequence[Mapping[str, NDArray[Any]]],
    outputs: Sequence[str],
    seconds: float,
) -> list[Outputs]:
    """Runs a session of each model on one request, all models at once.

    Args:
        sides: The models.
        session: The session's key.
        feeds: Inputs of each.
        outputs: What is wanted.
        seconds: How long to wait; a process that has not answered by then is ended.

    Returns:
        Per model its outputs, or why there are none.
    """
    asked: list[ModelError | None] = []
    for side, feed in zip(sides, feeds, strict=True):
        try:
            side.ensure(session)
            side.ask("run", session=session, feeds=[feed], outputs=list(outputs))
            asked.append(None)
        except ModelError as e:
            asked.append(e)
    end = time.monotonic() + seconds
    got: list[Outputs] = []
    for side, trouble in zip(sides, asked, strict=True):
        try:
            if trouble is not None:
                raise trouble
            got += side.outputs(max(end - time.monotonic(), 0.1))
        except ModelError as e:
            got.append(e)
    return got


def _one_by_one(
    side: Side, session: str, feeds: Sequence[Mapping[str, NDArray[Any]]], outputs: Sequence[str]
) -> list[Outputs]:
    """Runs feeds alone, to find those that the process does not survive; gives up after a few of them."""
    out: list[Outputs] = []
    deaths = 0
    last: ModelError = ModelError("")
    for feed in feeds:
        if deaths >= _MOST_DEATHS:
            out.append(last)
            continue
        try:
            out += side.run(session, [feed], outputs)
        except ModelError as e:
            deaths, last = deaths + 1, e
            out.append(e)
    return out


def _size(loaded: LoadedModel) -> int:
    """Bytes of a model with its external data."""
    size = loaded.size
    if loaded.folder is not None:
        size += sum((loaded.folder / e).stat().st_size for e in loaded.external)
    return size
