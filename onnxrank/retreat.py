"""Which decision of a plan makes a result wrong: found by halving, so that it is left out and the rest is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from onnxrank.plans import ALWAYS, PACKING, Choice, Site

MOST_TRIES = 64
"""Results that are tried in one search."""
MOST_SECONDS = 60.0
"""Time that one search may take; what is being tried is finished."""


class GaveUp(Exception):
    """A search has used up its tries or its time."""


@dataclass(frozen=True)
class Guilty:
    """What makes a result wrong.

    Attributes:
        rule: The rule.
        sites: Where it does: the decisions at one node; empty where no single node does.
        number: Of the nodes at which the rule was applied, which in the order of the graph; 0 without one.
        count: How many those are.
    """

    rule: str
    sites: tuple[Site, ...]
    number: int
    count: int

    @property
    def node(self) -> str | None:
        """The node's label."""
        return self.sites[0].node if self.sites else None

    def without(self, choice: Choice) -> Choice:
        """A choice that leaves it alone: the node, or the whole rule."""
        if self.sites:
            return choice.leaving(s.place for s in self.sites)
        return choice.leaving(rules=[self.rule])

    def __str__(self) -> str:
        if self.sites:
            return f"rule {self.rule!r} at node {self.node!r} (site {self.number} of {self.count})"
        return f"rule {self.rule!r} (no single one of {self.count} sites)"


Make = Callable[[Choice], tuple[ModelProto | None, Sequence[Site]]]
"""Applies what a choice allows: the result, None if it is the original, and where the rules were applied."""
Right = Callable[[ModelProto], bool]


class Search:
    """Looks for what makes a result wrong.

    Args:
        make: Makes a result.
        right: Whether a result is right.
        tries: Results that may be tried.
        seconds: Time that may be used.
    """

    def __init__(self, make: Make, right: Right, tries: int = MOST_TRIES, seconds: float = MOST_SECONDS) -> None:
        self._make, self._right = make, right
        self._tries, self._end = tries, time.monotonic() + seconds

    def right(self, choice: Choice) -> bool:
        """Whether the result of a choice is right.

        Raises:
            GaveUp: No more may be tried.
        """
        if self._tries == 0 or time.monotonic() > self._end:
            raise GaveUp
        self._tries -= 1
        made, _ = self._make(choice)
        return made is None or self._right(made)

    def culprit(self, choice: Choice, rules: Sequence[str]) -> Guilty:
        """The first rule, and its first site, that make the result wrong.

        Args:
            choice: A choice whose result is wrong.
            rules: The names of the rules, each once, in the order in which they are added.

        Raises:
            GaveUp: Too much was tried.
        """

        def added(count: int) -> Choice:
            return choice.leaving(rules=rules[count:])

        count = self._first_wrong(len(rules), lambda k: self.right(added(k)))
        rule, some = rules[count - 1], added(count)
        _, sites = self._make(some)
        own = [s for s in sites if s.place.rule == rule and s.taken]
        nodes = sorted({s.place.index for s in own})

        def at(count: int) -> Choice:
            return some.at_only(rule, nodes[:count])

        if not nodes or not self.right(at(0)):
            return Guilty(rule, (), 0, len(nodes))
        number = self._first_wrong(len(nodes), lambda k: self.right(at(k)))
        return Guilty(rule, tuple(s for s in own if s.place.index == nodes[number - 1]), number, len(nodes))

    @staticmethod
    def _first_wrong(count: int, right: Callable[[int], bool]) -> int:
        """A number that is wrong where the one before it is right, given that `count` is wrong and 0 right."""
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if right(middle) else (low, middle)
        return high


def order(rules: Sequence[str]) -> list[str]:
    """The names of rules, each once, those first without which no other can be applied, and that which prepares."""
    names, first = list(dict.fromkeys(rules)), (*ALWAYS, *PACKING)
    return [n for n in first if n in names] + [n for n in names if n not in first]
