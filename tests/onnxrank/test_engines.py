"""Parts worked on by threads: results in the order of parts, whoever is first, and nothing left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from onnxrank.engines import Local
from onnxrank.errors import UsageError


class Slow:
    """Parts that wait for those behind them."""

    def __init__(self, jobs: int) -> None:
        self.opened = self.closed = 0
        self.good: list[bool] = []
        self.seen: list[int] = []
        self._meeting = threading.Barrier(jobs)
        self._last = threading.Event()

    def open(self) -> list[int]:
        self.opened += 1
        return []

    def run(self, held: list[int], part: int) -> int:
        held.append(part)
        if part < self._meeting.parties:
            self._meeting.wait(30)  # all are under way
            if part == 0:
                assert self._last.wait(30)  # the first part ends behind the second
            else:
                self._last.set()
        self.seen.append(part)
        if part == 7:
            raise UsageError("part 7")
        return part * part

    def close(self, held: list[int], good: bool) -> None:
        self.closed += 1
        self.good.append(good)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_results_are_in_order(jobs: int) -> None:
    task = Slow(jobs)
    if jobs == 1:
        task._last.set()
    assert list(Local(jobs).each(task, range(6))) == [0, 1, 4, 9, 16, 25]
    assert jobs == 1 or task.seen[0] != 0
    assert task.opened == task.closed <= jobs and all(task.good)


def test_an_error_ends_all() -> None:
    task = Slow(2)
    with pytest.raises(UsageError, match="part 7"):
        list(Local(2).each(task, range(10_000)))
    assert task.opened == task.closed and not any(task.good) and len(task.seen) < 100


def test_parts_are_asked_for_a_few_ahead() -> None:
    asked: list[int] = []

    def parts() -> Iterator[int]:
        for k in range(100):
            asked.append(k)
            yield k

    task = Slow(1)
    task._last.set()
    found = Local(1).each(task, parts())
    assert next(found) == 0 and len(asked) == 2
    found.close()  # type: ignore[attr-defined]
    assert task.closed == 1 and task.good == [False]
