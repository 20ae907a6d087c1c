"""Where parts of recorded data are worked on: by processes of this machine here, by a cluster in `cluster.py`.

A task says how one part is worked on, alone. Engines give what came of all parts in the order of the parts, so nothing
that is made of it depends on who finished first, or on where that was.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

P = TypeVar("P", contravariant=True)
"""A part."""
R = TypeVar("R", covariant=True)
"""What comes of one."""
Part = TypeVar("Part")
Result = TypeVar("Result")

NAMES = ("local", "ray")


class Task(Protocol[P, R]):
    """How a part is worked on. Can be pickled; what it holds while it runs is made by `open`, in its place."""

    def open(self) -> Any:
        """Starts what is needed for any part: processes with models in them."""
        ...

    def run(self, held: Any, part: P) -> R:
        """Works on one part.

        Args:
            held: What `open` made; nobody else uses it meanwhile.
            part: The part.

        Raises:
            OnnxrankError: It cannot be done; a second try would not help.
        """
        ...

    def close(self, held: Any, good: bool) -> None:
        """Ends what `open` started.

        Args:
            held: What it made.
            good: Whether all went well, so that processes can be used again.
        """
        ...


class Engine(Protocol):
    """Works on parts."""

    def each(self, task: Task[Part, Result], parts: Iterable[Part]) -> Iterator[Result]:
        """What comes of every part, in their order, a few parts ahead of who asks."""
        ...


class Local:
    """Threads of this process, each with what its task opens.

    Args:
        jobs: How many.
    """

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = max(1, jobs)

    def each(self, task: Task[Part, Result], parts: Iterable[Part]) -> Iterator[Result]:
        """What comes of every part, in their order."""
        free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        several: list[Any] = []
        lock = threading.Lock()
        good = False

        def take() -> Any:
            with lock:  # the first few parts open what later ones use again
                if not free.empty():
                    return free.get()
                held = task.open()
                several.append(held)
                return held

        def run(part: Part) -> Result:
            held = take()
            try:
                return task.run(held, part)
            finally:
                free.put(held)

        try:
            with ThreadPoolExecutor(self._jobs) as threads:
                yield from ahead(lambda part: threads.submit(run, part), parts, 2 * self._jobs, Future.result)
            good = True
        finally:
            for held in several:
                task.close(held, good)


def ahead(
    begin: Callable[[Part], Any], parts: Iterable[Part], most: int, end: Callable[[Any], Result]
) -> Iterator[Result]:
    """Has so many parts under way at most, and gives the oldest first.

    Args:
        begin: Starts a part; what it returns can be cancelled where it has a method for that.
        parts: The parts.
        most: How many are under way.
        end: Waits for what was started.
    """
    pending: deque[Any] = deque()
    try:
        for part in parts:
            pending.append(begin(part))
            if len(pending) >= most:
                yield end(pending.popleft())
        while pending:
            yield end(pending.popleft())
    except BaseException:
        for started in pending:
            if isinstance(started, Future):
                started.cancel()
        raise
