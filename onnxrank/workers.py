"""Models in processes of their own, with a time and a memory limit: a crash there is an answer, not an end."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import wire
from onnxrank.errors import EnvironmentProblem, ModelError, OnnxrankError, OutOfMemory, UsageError

Feeds = Mapping[str, NDArray[Any]]
Outputs = dict[str, NDArray[Any]] | ModelError
"""Outputs of a run by name, or why there are none."""

Answer = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Answers one message."""

_IDLE: list[Worker] = []
_ALL: weakref.WeakSet[Worker] = weakref.WeakSet()
_LOCK = threading.Lock()
_GONE = object()
_OWNER = os.getpid()
_inside: Callable[[], Answer] | None = None
_MOST_IDLE = 4
_GRACE = 10.0  # seconds that a process may take to end
LIBRARIES = 2 << 30
"""Bytes of address space that a process has before it loads anything."""
_LARGE = 64 << 20
"""Bytes of a model from which on it goes through a file, so that it is not held by both ends of a pipe."""
_KINDS = {kind.__name__: kind for kind in (UsageError, ModelError, OutOfMemory, EnvironmentProblem)}
"""What a process may report, by name."""


class Crashed(ModelError):
    """The process that ran a model died of it, did not answer in time, or answered nonsense.

    Attributes:
        kind: `crash` or `timeout`.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[Crashed], tuple[str, str]]:
        return type(self), (str(self), self.kind)


def python(code: str) -> list[str]:
    """The command of a child that has the modules of this process, and none that lie in the current folder.

    Args:
        code: What it runs.
    """
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {_search_path()!r}; {code}"]


def _search_path() -> list[str]:
    """Where modules come from: not the current folder, unless this package lies there."""
    here, home = os.path.realpath(os.curdir), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    others = [p for p in sys.path if os.path.realpath(p or os.curdir) not in (here, os.path.realpath(home))]
    return [home, *others]


class Worker:
    """A process that runs models. One thread at a time may use it.

    Attributes:
        pending: Answers that were not fetched yet.
    """

    def __init__(self) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            python("from onnxrank.host import main; main()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # an interrupt from the keyboard is for us alone
        )
        self._answers: queue.Queue[Any] = queue.Queue()
        self.pending = 0
        _ALL.add(self)
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it can be used still."""
        return self._process.poll() is None

    def ask(self, do: str, **arguments: Any) -> None:
        """Has it do something; `result` fetches what came of it.

        Args:
            do: Name of a method of `host.Host`.
            **arguments: Its arguments.
        """
        self.pending += 1
        with contextlib.suppress(OSError):  # a process that died is met when its answer is fetched
            assert self._process.stdin is not None
            wire.send(self._process.stdin, {"do": do, "with": arguments})  # type: ignore[arg-type]

    def result(self, timeout: float | None = None) -> Any:
        """The result of what was asked first.

        Args:
            timeout: Seconds to wait; None for ever.

        Raises:
            Crashed: The process died, did not answer, or answered nonsense.
            OnnxrankError: What the process reports.
        """
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.kill()
            raise Crashed(f"no answer within {timeout:g} s", "timeout") from None
        self.pending -= 1
        if answer is _GONE:
            raise Crashed(self._epitaph(), "crash")
        return self._opened(answer)

    def _opened(self, answer: Any) -> Any:
        """The result in an answer."""
        if isinstance(answer, dict) and answer.keys() == {"result"}:
            return answer["result"]
        if not isinstance(answer, dict) or not isinstance(answer.get("error"), str):
            self.nonsense()
        raise _KINDS.get(str(answer.get("kind")), ModelError)(answer["error"])

    def nonsense(self) -> NoReturn:
        """Ends a process that does not keep to the protocol.

        Raises:
            Crashed: Always.
        """
        self.kill()
        raise Crashed("answered nonsense", "crash")

    def call(self, do: str, timeout: float | None = None, **arguments: Any) -> Any:
        """`ask` and `result` in one."""
        self.ask(do, **arguments)
        return self.result(timeout)

    def outputs(self, timeout: float | None = None) -> list[Outputs]:
        """`result` of `host.Host.run`: per feed its outputs, or why there are none.

        Raises:
            Crashed: The process died, did not answer, or answered nonsense.
        """
        out: list[Outputs] = []
        answers = self.result(timeout)
        if not isinstance(answers, list):
            self.nonsense()
        for a in answers:
            made = a.get("outputs") if isinstance(a, dict) else None
            if isinstance(made, dict) and all(isinstance(v, np.ndarray) for v in made.values()):
                out.append(made)
            elif isinstance(a, dict) and isinstance(a.get("error"), str):
                kind = OutOfMemory if a.get("kind") == OutOfMemory.__name__ else ModelError
                out.append(kind(a["error"]))
            else:
                self.nonsense()
        return out

    def kill(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._stderr):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:  # it only closed its end of the pipe
            self.nonsense()
        last = ""
        with contextlib.suppress(OSError, ValueError):
            self._stderr.seek(0)
            lines = self._stderr.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
            last = f": {lines[-1][:200]}" if lines else ""
        self.kill()
        if code < 0:
            try:
                return f"died of {signal.Signals(-code).name}{last}"
            except ValueError:
                return f"died of signal {-code}{last}"
        return f"ended with code {code}{last}"

    def reusable(self) -> bool:
        """Has it forget all models; whether it may be used for others, once it is `ready`."""
        if self.pending or not self.alive:
            return False
        self.ask("reset")
        return True

    def ready(self) -> bool:
        """Waits for it to have forgotten all models; one that does not is ended."""
        try:
            while self.pending:
                self.result(_GRACE)
        except OnnxrankError:
            self.kill()
        return self.alive


def _listen(source: BinaryIO, answers: queue.Queue[Any]) -> None:
    """Passes on what a process answers, `_GONE` at its end, and None for what is no message."""
    try:
        while True:
            answers.put(wire.receive(source))
    except (EOFError, OSError):
        answers.put(_GONE)
    except Exception:  # whatever a process that was taken over can think of
        answers.put(None)


class _Here(Worker):
    """What stands for a process within a process that runs models already: that very process."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._replies: list[Any] = []
        self.pending = 0

    @property
    def alive(self) -> bool:
        """Always."""
        return True

    def ask(self, do: str, **arguments: Any) -> None:
        """Does it."""
        # The limit of the process stays as it is.
        reply = {"result": None} if do == "limit" else self._answer({"do": do, "with": arguments})
        self._replies.append(reply)
        self.pending += 1

    def result(self, timeout: float | None = None) -> Any:
        """What came of it; whoever started this process minds the time."""
        self.pending -= 1
        return self._opened(self._replies.pop(0))

    def kill(self) -> None:
        """Forgets all models."""
        self._answer({"do": "reset", "with": {}})

    def reusable(self) -> bool:
        """Never: another costs nothing."""
        return False


def stay_here(make: Callable[[], Answer]) -> None:
    """From now on, this process runs models itself; for those that were started for it.

    Args:
        make: Makes what answers the messages that another process would be sent.
    """
    global _inside
    _inside = make


def take() -> Worker:
    """A process, a new one or one that was given back."""
    if _inside is not None:
        return _Here(_inside())
    while True:
        with _LOCK:
            found = _IDLE.pop() if _IDLE else None
        if found is None:
            return Worker()
        if found.ready():
            return found


def fresh() -> Worker:
    """A process that has run nothing yet.

    Where others have been, what a model allocates lies scattered over what they left: models of many small nodes are
    slower there, and of what two of them differ by less is seen.
    """
    return Worker() if _inside is None else _Here(_inside())


def give(worker: Worker) -> None:
    """Keeps a process for its next use, if it survived; nobody waits for it to have forgotten its models."""
    if worker.reusable():
        with _LOCK:
            if len(_IDLE) < _MOST_IDLE:
                _IDLE.append(worker)
                return
    worker.kill()


def warm(count: int = 2) -> None:
    """Starts processes ahead of their use: they import what they need while the caller does other things."""
    with _LOCK:
        missing = count - len(_IDLE)
        for _ in range(missing):
            _IDLE.append(Worker())


@atexit.register
def _end() -> None:
    """Ends all processes, those that are busy too: one that hangs would outlive this one."""
    if os.getpid() != _OWNER:  # a copy of the process that they belong to
        return
    with _LOCK:
        _IDLE.clear()
    for worker in list(_ALL):
        worker.kill()


def memory_limit(size: int) -> int:
    """Bytes of address space that a model of so many bytes gets where none are asked for: what the machine has left."""
    most = (8 << 30) + 4 * size
    left = available_memory()
    return most if left is None else min(most, left + LIBRARIES)


def available_memory() -> int | None:
    """Bytes of memory that processes can still take; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # no control group, or one without a limit
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("file "))
        found.append(max(most - used + cached, 0))
    return min(found, default=None)


class RemoteSession:
    """A model in a process of its own, which is started again after a crash.

    Within such a process it runs right there.

    Args:
        model: The model.
        folder: Where its external data lies; the process reads it there.
        optimise: Whether onnxruntime's own graph optimisations run.
        threads: Threads inside an operator.
        precision: `own`, `float` (16-bit types raised to float32) or `double` (all floats raised).
        timeout: Seconds for loading, and for every run.
        memory: Bytes of address space; None for a default by the model's size.
        ahead: Whether the first run, not this, waits for the model to be loaded, and raises what comes of that.

    Raises:
        ModelError: onnxruntime does not take the model; the message is its own.
        Crashed: It dies of it.
    """

    def __init__(
        self,
        model: ModelProto,
        folder: str | os.PathLike[str] | None = None,
        *,
        optimise: bool = False,
        threads: int = 1,
        precision: str = "own",
        timeout: float = 120.0,
        memory: int | None = None,
        ahead: bool = False,
    ) -> None:
        self._model, self._folder = model, folder
        self._how = {"level": "all" if optimise else "disabled", "threads": threads, "precision": precision}
        self._timeout = timeout
        self._memory = memory
        self._worker: Worker | None = None
        self._due = 0  # answers to what is asked for before the model can run
        self._asked = 0  # runs whose answers were not fetched yet
        self._begin()
        if not ahead:
            self._start()

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # modules may be gone when the interpreter ends
            self.close()

    def _begin(self) -> Worker:
        """The process, with the model on its way to it."""
        if self._worker is None or (not self._worker.alive and not self._asked and not self._due):
            self._worker = take()
            self._worker.ask("limit", memory=self._memory or memory_limit(self._model.ByteSize()))
            try:
                hand(self._worker, "model", self._model, self._folder, self._timeout)
            except OnnxrankError:
                self.close()
                raise
            self._worker.ask("open", session="session", key="model", **self._how)
            self._due = self._worker.pending
        return self._worker

    def _start(self) -> Worker:
        """The process, with the model in it."""
        worker = self._begin()
        try:
            while self._due:
                self._due -= 1
                worker.result(self._timeout)
        except OnnxrankError:
            self._due = self._asked = 0
            self.close()
            raise
        return worker

    def ask(self, feeds: Feeds, outputs: Sequence[str] | None = None, shapes: Sequence[str] = ()) -> None:
        """`run`, whose answer `answer` fetches: answers come in the order of the questions."""
        names = None if outputs is None else list(outputs)
        self._begin().ask("run", session="session", feeds=[feeds], outputs=names, shapes=list(shapes))
        self._asked += 1

    def answer(self) -> dict[str, NDArray[Any]]:
        """What came of the run that was asked for first.

        Raises:
            ModelError: onnxruntime does not take the model, or cannot run it; the message is the first line of its own.
            Crashed: Its process died, or took longer than the timeout.
        """
        worker = self._start()
        self._asked -= 1
        try:
            (answer,) = worker.outputs(self._timeout)
        except OnnxrankError:
            self._asked = 0
            raise
        if isinstance(answer, ModelError):
            raise answer
        return answer

    def run(
        self, feeds: Feeds, outputs: Sequence[str] | None = None, shapes: Sequence[str] = ()
    ) -> dict[str, NDArray[Any]]:
        """Runs the model on the feeds it knows.

        Args:
            feeds: Arrays by name of input; floats are given in the type it takes.
            outputs: Names of outputs; None for all.
            shapes: Those of which only the shapes are wanted.

        Raises:
            ModelError: onnxruntime cannot run it on them; the message has the first line of its own.
            Crashed: Its process died, or took longer than the timeout.
        """
        while self._asked:  # of what was asked before nobody wants to know any more
            with contextlib.suppress(ModelError):
                self.answer()
        self.ask(feeds, outputs, shapes)
        return self.answer()

    def close(self) -> None:
        """Gives the process back."""
        worker, self._worker = self._worker, None
        if worker is not None:
            give(worker)


def place(
    worker: Worker, key: str, model: ModelProto, folder: str | os.PathLike[str] | None, timeout: float | None = None
) -> None:
    """Hands a model to a process.

    Args:
        worker: The process.
        key: What the model is known by there.
        model: The model.
        folder: Where its external data lies.
        timeout: Seconds.
    """
    hand(worker, key, model, folder, timeout)
    while worker.pending:
        worker.result(timeout)


def hand(
    worker: Worker, key: str, model: ModelProto, folder: str | os.PathLike[str] | None, timeout: float | None = None
) -> None:
    """`place` without waiting, where the model is small: what comes of it is to be fetched."""
    data = model.SerializeToString(deterministic=True)
    where = None if folder is None else os.path.abspath(folder)
    if len(data) < _LARGE:
        worker.ask("model", key=key, data=data, folder=where)
        return
    with tempfile.TemporaryDirectory(prefix="onnxrank-") as own:
        path = Path(own, "model.onnx")
        path.write_bytes(data)
        del data
        worker.ask("model", key=key, data=str(path), folder=where)
        while worker.pending:  # the file is gone behind this
            worker.result(timeout)
