"""Where the requests lie in a tensor.

A tensor of the model for one request has, in the model for many, its values for one request behind those of another,
along one axis. Request-level tensors have a row per request, candidate-level ones a row per candidate.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxrank.extents import Expr

Size = int | Expr


class Impossible(Exception):
    """A node whose requests cannot be kept apart."""


@dataclass(frozen=True)
class Rows:
    """The axis along which requests lie one behind the other.

    Attributes:
        each: Whether there is a row per candidate; else there is one per request.
        axis: The axis.
        outer: How often all rows come along that axis: `outer * rows * inner` is its extent.
        inner: Entries along that axis per row.
        added: Whether the tensor for one request lacks the axis; `outer` and `inner` are 1 then.
    """

    each: bool
    axis: int
    outer: Size = 1
    inner: Size = 1
    added: bool = False

    @property
    def plain(self) -> bool:
        """Whether the axis holds rows and nothing else."""
        return self.outer == 1 and self.inner == 1


@dataclass(frozen=True)
class Count:
    """An extent of so many entries per row."""

    each: bool
    factor: Size = 1


@dataclass(frozen=True)
class Tensor:
    """A tensor of the new graph.

    Attributes:
        name: Its name.
        sizes: Its shape for one request.
        rows: Where the requests lie; None where it is the same for all of them.
    """

    name: str
    sizes: tuple[Size, ...]
    rows: Rows | None = None

    @property
    def rank(self) -> int:
        """Number of axes for one request."""
        return len(self.sizes)

    @property
    def axes(self) -> int:
        """Number of axes in the new graph."""
        return len(self.sizes) + (self.rows is not None and self.rows.added)

    @property
    def place(self) -> int:
        """The axis of the requests, counted from the end: negative."""
        assert self.rows is not None
        return self.rows.axis - self.axes

    @property
    def each(self) -> bool:
        """Whether it has a row per candidate."""
        return self.rows is not None and self.rows.each

    def size(self, place: int) -> Size:
        """The extent for one request along an axis counted from the end; 1 where there is none."""
        return self.sizes[place] if -place <= self.rank else 1

    def axis(self, k: int) -> int:
        """The place in the new graph of an axis of the tensor for one request."""
        k %= max(self.rank, 1)
        return k + (self.rows is not None and self.rows.added and k >= self.rows.axis)

    def shape(self) -> tuple[Size | Count, ...]:
        """Its extents in the new graph."""
        if self.rows is None:
            return self.sizes
        out: list[Size | Count] = list(self.sizes)
        count = Count(self.rows.each, self.rows.outer * self.rows.inner)
        out[self.rows.axis : self.rows.axis + (not self.rows.added)] = [count]
        return tuple(out)
