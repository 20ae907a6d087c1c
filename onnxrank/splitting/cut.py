"""Where to cut a graph in two: what is cheapest to hand over, and to do again for every call with candidates.

A step is a node of the graph that depends on the request alone. It runs in the request model, once, or in the candidate
model, at every call. A tensor that is made in the request model and read in the candidate model is part of the state,
which costs its bytes times a price; a step in the candidate model costs its time. The cheapest division is a minimum
cut. So a step that makes something large of something small, and is quick, ends up behind the cut by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnxrank.maxflow import NEVER, Network

PRICE = 1e-9
"""Seconds per byte of state: what it takes to fetch it, at a gigabyte per second."""
_LEAST = 1e-7
"""Seconds of a step that is said to cost nothing: what else is equal stays in the request model."""
_UNIT = 1e12
"""Capacities are whole picoseconds, so that sums are exact."""


@dataclass(frozen=True)
class Step:
    """A node that depends on the request alone.

    Attributes:
        reads: Tensors that it reads, without constants.
        gives: Tensors that it makes.
        seconds: Its time, were it to run at every call; None if it must not.
    """

    reads: tuple[str, ...]
    gives: tuple[str, ...]
    seconds: float | None = 0.0


@dataclass(frozen=True)
class Problem:
    """What is to be divided.

    Attributes:
        steps: The steps, each behind those that it reads from.
        sizes: Bytes of the tensors that they read and make, inputs of the request among them; None for what no state
            can hold.
        wanted: Tensors that the candidate model needs in any case.
    """

    steps: Sequence[Step]
    sizes: Mapping[str, int | None]
    wanted: Collection[str]


@dataclass(frozen=True)
class Cut:
    """A division.

    Attributes:
        request: Steps of the request model, by place.
        state: Tensors that the candidate model is given, in the order in which they are made.
        bytes: Size of these.
        seconds: Time of the steps that run in the candidate model.
    """

    request: frozenset[int]
    state: tuple[str, ...]
    bytes: int
    seconds: float


class Impossible(Exception):
    """No division hands over only what a state can hold.

    Attributes:
        tensor: A tensor that would have to be in the state, and cannot be.
    """

    def __init__(self, tensor: str) -> None:
        super().__init__(tensor)
        self.tensor = tensor


def least(problem: Problem, price: float = PRICE) -> Cut:
    """The cheapest division.

    Args:
        problem: What is to be divided.
        price: Seconds per byte of state.

    Raises:
        Impossible: There is none.
    """
    steps = problem.steps
    tensors = {name: len(steps) + k for k, name in enumerate(problem.sizes)}
    source, sink = len(steps) + len(tensors), len(steps) + len(tensors) + 1
    net = Network(sink + 1)
    maker = {name: k for k, s in enumerate(steps) for name in s.gives}
    for name, at in tensors.items():
        size = problem.sizes[name]
        net.join(maker.get(name, source), at, NEVER if size is None else round(size * price * _UNIT))
    for name in problem.wanted:
        net.join(tensors[name], sink, NEVER)
    for k, s in enumerate(steps):
        net.join(source, k, NEVER if s.seconds is None else round(max(s.seconds, _LEAST) * _UNIT))
        for name in s.reads:
            net.join(tensors[name], k, NEVER)
            if name in maker:
                net.join(k, maker[name], NEVER)  # what it reads has been made where it runs
    if net.flow(source, sink) >= NEVER:
        raise Impossible(_blocking(problem))
    late = net.before(sink)
    return divided(problem, frozenset(k for k in range(len(steps)) if k not in late))


def divided(problem: Problem, request: frozenset[int]) -> Cut:
    """The division with given steps in the request model."""
    steps = problem.steps
    needed = set(problem.wanted) | {name for k, s in enumerate(steps) if k not in request for name in s.reads}
    late = {name for k, s in enumerate(steps) if k not in request for name in s.gives}
    state = tuple(name for name in problem.sizes if name in needed and name not in late)
    return Cut(
        request,
        state,
        sum(problem.sizes[name] or 0 for name in state),
        sum(s.seconds or 0.0 for k, s in enumerate(steps) if k not in request),
    )


def cost(problem: Problem, cut: Cut, price: float = PRICE) -> int:
    """What a division costs, in picoseconds, as it is minimised; None of the state's sizes may be None."""
    state = sum(round((problem.sizes[name] or 0) * price * _UNIT) for name in cut.state)
    late = (s.seconds or 0.0 for k, s in enumerate(problem.steps) if k not in cut.request)
    return state + sum(round(max(seconds, _LEAST) * _UNIT) for seconds in late)


def _blocking(problem: Problem) -> str:
    """A tensor without a size that has to be handed over."""
    inside = {name for s in problem.steps if s.seconds is None for name in s.gives}
    made = {name for s in problem.steps for name in s.gives}
    held = [name for name, size in problem.sizes.items() if size is None]
    return next((name for name in held if name in inside or name not in made), held[0] if held else "")
