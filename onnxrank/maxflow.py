"""The largest flow through a network, and with it the smallest cut of one."""

from __future__ import annotations

from collections import deque

NEVER = 1 << 80
"""A capacity that no flow fills."""


class Network:
    """A network with capacities, and the largest flow through it (Dinic)."""

    def __init__(self, count: int) -> None:
        self._edges: list[list[int]] = [[] for _ in range(count)]
        self._to: list[int] = []
        self._room: list[int] = []

    def join(self, a: int, b: int, capacity: int) -> None:
        """Adds an edge."""
        for end, other, room in ((a, b, capacity), (b, a, 0)):
            self._edges[end].append(len(self._to))
            self._to.append(other)
            self._room.append(room)

    def flow(self, source: int, sink: int) -> int:
        """The largest flow; `NEVER` or more if nothing limits it."""
        total = 0
        while total < NEVER:
            depth = self._depths(source)
            if sink not in depth:
                return total
            at = [0] * len(self._edges)
            while total < NEVER and (pushed := self._push(source, sink, depth, at)):
                total += pushed
        return total

    def _depths(self, source: int) -> dict[int, int]:
        depth, line = {source: 0}, deque([source])
        while line:
            a = line.popleft()
            for e in self._edges[a]:
                b = self._to[e]
                if self._room[e] and b not in depth:
                    depth[b] = depth[a] + 1
                    line.append(b)
        return depth

    def _push(self, source: int, sink: int, depth: dict[int, int], at: list[int]) -> int:
        """Sends what one path takes; `at` says which edges of a node are used up."""
        path: list[int] = []
        here = source
        while here != sink:
            edges = self._edges[here]
            while at[here] < len(edges):
                e = edges[at[here]]
                if self._room[e] and depth.get(self._to[e]) == depth[here] + 1:
                    path.append(e)
                    here = self._to[e]
                    break
                at[here] += 1
            else:
                if here == source:
                    return 0
                here = self._to[path.pop() ^ 1]
                at[here] += 1
        amount = min(self._room[e] for e in path)
        for e in path:
            self._room[e] -= amount
            self._room[e ^ 1] += amount
        return amount

    def before(self, sink: int) -> set[int]:
        """Who can still send something to the sink."""
        seen, line = {sink}, deque([sink])
        while line:
            b = line.popleft()
            for e in self._edges[b]:
                a = self._to[e]
                if self._room[e ^ 1] and a not in seen:
                    seen.add(a)
                    line.append(a)
        return seen
