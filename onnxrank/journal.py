"""Undoing: what a rule wrote before it gave up is taken back, so that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

Mark = tuple[int, ...]


class Journal:
    """Remembers what changes, at the cost of a few lengths per mark.

    Lists and dicts that only grow are watched by their length; single attributes are set through `put`.
    """

    def __init__(self) -> None:
        self._puts: list[tuple[Any, str, Any]] = []
        self._lists: list[list[Any]] = [self._puts]
        self._dicts: list[dict[Any, Any]] = []

    def watch(self, *containers: list[Any] | dict[Any, Any]) -> None:
        """Takes containers into what is undone; nothing may ever be removed from them, or put in the place of an entry.

        Args:
            *containers: Lists that are appended to, dicts that get new keys.
        """
        for c in containers:
            if isinstance(c, list):
                self._lists.append(c)
            else:
                self._dicts.append(c)

    def put(self, owner: object, attribute: str, value: Any) -> None:
        """Sets an attribute; the value that it had comes back when this is undone."""
        self._puts.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, value)

    def mark(self) -> Mark:
        """The state to come back to."""
        return (*map(len, self._lists), *map(len, self._dicts))

    def back(self, mark: Mark) -> None:
        """Undoes everything since a mark."""
        if mark == self.mark():  # most that give up have not written anything
            return
        for owner, attribute, value in reversed(self._puts[mark[0] :]):
            setattr(owner, attribute, value)
        for held, count in zip(self._lists, mark, strict=False):
            del held[count:]
        for known, count in zip(self._dicts, mark[len(self._lists) :], strict=True):
            while len(known) > count:
                known.popitem()
