"""Tensors of the new graph, and the codes that name their entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxrank.journal import Journal
from onnxrank.values.deferred import Deferred, DeferredMatMul, OpenProduct, Origin
from onnxrank.values.dims import Dims, Unrepresentable, extents, is_candidate_symbol, symbols
from onnxrank.values.division import Codes

_SHIFT = 40

_MASK = (1 << _SHIFT) - 1

HOLE = -1
"""Code of an entry that nobody reads."""

MAX_ENTRIES = 1 << 24
"""Above this many entries per row a tensor is taken as a whole: no index map is made for it."""


class Level(IntEnum):
    """How often a value has to be computed; `UNREAD` entries never."""

    UNREAD = -1
    CONSTANT = 0
    REQUEST = 1
    CANDIDATE = 2


Asked = TypeVar("Asked")


@dataclass(eq=False)
class Source:
    """A tensor of the new graph, or a constant.

    Attributes:
        number: Its place in `Sources`.
        dims: Physical shape: only the symbols the tensor varies along.
        dtype: ONNX element type.
        level: Whether it is a constant, made once per request or per candidate.
        name: Tensor name; None while the tensor has not been written.
        load: Gives the entries of a constant.
        deferred: How it is written when it is first asked for.
        origin: What it is written for then.
        block: Whether it is a block of dot products, of which a part may be taken by weights of 0.
        part: Whether it is one of a few large tensors that were made apart, and are better not copied side by side.
        folded: Whether weights are made of it per request.
        rounded: Whether a constant is a product of others that the graph makes itself, which its data give rounded.
    """

    number: int
    dims: Dims
    dtype: int
    level: Level
    name: str | None = None
    load: Callable[[], NDArray[Any]] | None = None
    deferred: Deferred | None = None
    origin: Origin = field(default_factory=Origin)
    block: bool = False
    part: bool = False
    folded: bool = False
    rounded: bool = False

    def offers(self, kind: type[Asked]) -> Asked | None:
        """What can be asked of the tensor, if that is of a kind and the tensor has not been written."""
        return self.deferred if self.name is None and isinstance(self.deferred, kind) else None

    @property
    def is_open(self) -> bool:
        """Whether it is a sum of products that has not been written."""
        return self.offers(OpenProduct) is not None

    @property
    def is_pending(self) -> bool:
        """Whether it is a matrix product that has not been written, and could take an addend."""
        return self.offers(DeferredMatMul) is not None

    @cached_property
    def data(self) -> NDArray[Any]:
        """The entries of a constant, shaped as its constant extents."""
        assert self.load is not None
        return self.load().reshape(extents(self.dims))

    @property
    def size(self) -> int:
        """Entries per row."""
        return prod(extents(self.dims))

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols the tensor varies along."""
        return symbols(self.dims)


class Sources:
    """All sources of one rewrite, and the codes that name their entries."""

    def __init__(self) -> None:
        self.journal = Journal()
        self._all: list[Source | None] = []
        self._levels = np.zeros(64, np.int8)

    def add(self, dims: Dims, dtype: int, name: str | None = None, **how: Any) -> Source:
        """Registers a tensor; its level follows from its symbols and whether its data are known."""
        if how.get("load") is not None:
            level = Level.CONSTANT
        elif any(is_candidate_symbol(s) for s in symbols(dims)):
            level = Level.CANDIDATE
        else:
            level = Level.REQUEST
        source = Source(len(self._all), dims, dtype, level, name, **how)
        self._all.append(source)
        if source.number >= len(self._levels):
            self._levels = np.concatenate([self._levels, np.zeros_like(self._levels)])
        self._levels[source.number] = level
        return source

    def __getitem__(self, number: int) -> Source:
        found = self._all[number]
        if found is None:
            raise LookupError(f"source {number} was taken back: whoever made a value of it has given up")
        return found

    @property
    def count(self) -> int:
        """How many there have been."""
        return len(self._all)

    def named(self) -> dict[str, Source]:
        """Those that have been written, by the names of their tensors."""
        return {s.name: s for s in self._all if s is not None and s.name is not None}

    def rename(self, old: str, new: str) -> None:
        """Has a tensor that was written under another name."""
        for source in self._all:
            if source is not None and source.name == old:
                self.journal.put(source, "name", new)

    def forget(self, since: int) -> None:
        """Takes back all sources from a number on; no other ever gets their numbers, so stale codes are noticed."""
        self._all[since:] = [None] * (len(self._all) - since)

    def levels(self, codes: Codes) -> NDArray[np.int8]:
        """Level of every entry."""
        holes = codes < 0
        found: NDArray[np.int8] = self._levels[np.where(holes, 0, codes) >> _SHIFT]
        return np.where(holes, np.int8(Level.UNREAD), found)

    def of(self, codes: Codes) -> list[Source]:
        """The sources that occur, in order of first appearance."""
        numbers = codes.reshape(-1) >> _SHIFT
        numbers = numbers[codes.reshape(-1) >= 0]
        if not numbers.size:
            return []
        if (numbers == numbers[0]).all():
            return [self[int(numbers[0])]]
        found, first = np.unique(numbers, return_index=True)
        return [self[int(found[i])] for i in np.argsort(first)]

    def symbols(self, codes: Codes) -> set[str]:
        """Symbols along which any of the entries varies."""
        return {s for source in self.of(codes) for s in source.symbols}

    def constants(self, codes: Codes) -> NDArray[np.generic]:
        """The data of entries that are all constants."""
        out: NDArray[np.generic] | None = None
        flat = codes.reshape(-1)
        for source in self.of(codes):
            if out is None:
                out = np.zeros(flat.shape, source.data.dtype)
            at = (flat >> _SHIFT) == source.number
            out[at] = source.data.reshape(-1)[flat[at] & _MASK]
        assert out is not None
        return out.reshape(codes.shape)


def codes_of(source: Source) -> Codes:
    """The code array of a whole source."""
    if source.size > MAX_ENTRIES:
        raise Unrepresentable(f"{source.size} entries per row")
    return (np.arange(source.size, dtype=np.int64) + (source.number << _SHIFT)).reshape(extents(source.dims))


def offsets(codes: Codes) -> Codes:
    """Position of every entry inside its source."""
    return codes & _MASK


def source_numbers(codes: Codes) -> Codes:
    """Number of the source of every entry; negative for holes."""
    return codes >> _SHIFT
