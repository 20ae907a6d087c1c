"""Models in processes of their own, with a time and a memory limit: a crash there is an answer, not an end."""

from __future__ import annotations

import atexit
import contextlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

from onnxrank.errors import EnvironmentProblem, ModelError, OnnxrankError, UsageError
from onnxrank.verify import wire

_IDLE: list[Worker] = []
_LOCK = threading.Lock()
_MOST_IDLE = 4


class Crashed(ModelError):
    """The process that ran a model died of it, or did not answer in time.

    Attributes:
        kind: `crash` or `timeout`.
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class Worker:
    """A process that runs models. One thread at a time may use it."""

    def __init__(self) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        # The modules of this process, and none that happen to lie in the current folder.
        script = f"import sys; sys.path[:] = {sys.path!r}; from onnxrank.verify.worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # an interrupt from the keyboard is for us alone
        )
        self._answers: queue.Queue[Any] = queue.Queue()
        self._pending = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        source = self._process.stdout
        assert source is not None
        try:
            while True:
                self._answers.put(wire.receive(source))  # type: ignore[arg-type]
        except (EOFError, ValueError, OSError):
            self._answers.put(None)

    @property
    def alive(self) -> bool:
        """Whether it can be used still."""
        return self._process.poll() is None

    def ask(self, do: str, **arguments: Any) -> None:
        """Has it do something; `result` fetches what came of it.

        Args:
            do: Name of a method of `worker.Host`.
            **arguments: Its arguments.
        """
        self._pending += 1
        with contextlib.suppress(OSError):  # a process that died is met when its answer is fetched
            assert self._process.stdin is not None
            wire.send(self._process.stdin, {"do": do, "with": arguments})  # type: ignore[arg-type]

    def result(self, timeout: float | None = None) -> Any:
        """The result of what was asked first.

        Args:
            timeout: Seconds to wait; None for ever.

        Raises:
            Crashed: The process died or did not answer.
            OnnxrankError: What the process reports.
        """
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            self.kill()
            raise Crashed(f"no answer within {timeout:g} s", "timeout") from None
        self._pending -= 1
        if answer is None:
            raise Crashed(self._epitaph(), "crash")
        if "error" in answer:
            kinds: dict[int, type[OnnxrankError]] = {
                k.exit_code: k for k in (UsageError, ModelError, EnvironmentProblem)
            }
            raise kinds.get(answer["code"], ModelError)(answer["error"])
        return answer["result"]

    def call(self, do: str, timeout: float | None = None, **arguments: Any) -> Any:
        """`ask` and `result` in one."""
        self.ask(do, **arguments)
        return self.result(timeout)

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
        code = self._process.wait()
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
        """Forgets all models; whether it may be used for others."""
        if self._pending or not self.alive:
            return False
        try:
            self.call("reset", 10)
        except OnnxrankError:
            return False
        return True


def take() -> Worker:
    """A process, a new one or one that was given back."""
    with _LOCK:
        while _IDLE:
            found = _IDLE.pop()
            if found.alive:
                return found
    return Worker()


def give(worker: Worker) -> None:
    """Keeps a process for its next use, if it survived."""
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
    with _LOCK:
        while _IDLE:
            _IDLE.pop().kill()
