"""Parts of recorded data on a Ray cluster, and the choice between that and this machine. The only import of Ray.

Every part is a Ray task, which is tried again elsewhere when its process or its machine is lost. Machines need onnxrank
and onnxruntime, and the data under the same path; models are sent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

from onnxrank.engines import Engine, Local, Part, Result, Task, ahead
from onnxrank.errors import EnvironmentProblem, OnnxrankError

RETRIES = 5
"""How often a part is tried again after its process or machine was lost."""
_held: tuple[str, Task[Any, Any], Any] | None = None
"""In a process of Ray: the task that it works for, and what that opened."""


def engine(name: str, jobs: int = 1) -> Engine:
    """The engine of a name.

    Args:
        name: `local` or `ray`.
        jobs: Processes of `local`; Ray has as many as its cluster has cores.

    Raises:
        EnvironmentProblem: Ray is asked for and not installed, or there is no cluster to be had.
    """
    return Local(jobs) if name == "local" else Cluster()


class Cluster:
    """A Ray cluster: that of RAY_ADDRESS, one that runs on this machine, or one that is started here.

    Raises:
        EnvironmentProblem: There is none.
    """

    def __init__(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves the machine
        try:
            import ray
        except ImportError as e:
            raise EnvironmentProblem("--engine ray needs Ray: install 'onnxrank[ray]'.") from e
        self._ray: Any = ray
        if not ray.is_initialized():
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            except Exception as e:  # whatever a cluster can be the matter with
                why = (str(e).strip().splitlines() or [type(e).__name__])[0]
                raise EnvironmentProblem(f"No Ray cluster is to be had: {why}.") from e

    def each(self, task: Task[Part, Result], parts: Iterable[Part]) -> Iterator[Result]:
        """What comes of every part, in their order."""
        ray = self._ray
        sent, mark = ray.put(task), uuid.uuid4().hex
        remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_work)
        most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        started: list[Any] = []

        def begin(part: Part) -> Any:
            started.append(remote.remote(mark, sent, part))
            return started[-1]

        def end(reference: Any) -> Result:
            started.remove(reference)
            try:
                found, trouble = ray.get(reference)
            except ray.exceptions.RayError as e:
                raise EnvironmentProblem(f"Ray gave up on a part of the data: {_first(e)}.") from e
            if trouble is not None:
                raise trouble
            return found  # type: ignore[no-any-return]

        try:
            yield from ahead(begin, parts, most, end)
        finally:
            for reference in started:
                with contextlib.suppress(Exception):
                    ray.cancel(reference)


def _work(mark: str, task: Task[Part, Result], part: Part) -> tuple[Result | None, OnnxrankError | None]:
    """Works on a part, in a process of Ray, which keeps what the task opens for further parts."""
    global _held
    try:
        if _held is None or _held[0] != mark:
            if _held is not None:
                _, before, held = _held
                _held = None
                before.close(held, True)
            _held = (mark, task, task.open())
        _, own, held = _held  # the task that came first: what it has read is kept with it
        return own.run(held, part), None
    except OnnxrankError as e:
        return None, e


def _first(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return (lines[-1] if lines else type(e).__name__)[:200].rstrip(".")
