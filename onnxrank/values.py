"""Abstract values: what onnxrank knows of a tensor without running it.

A tensor's shape is a product of factors per dimension (`Dims`), so that merged dimensions such as `[N * 50, D]` stay
`((N, 50), (D,))` and a later reshape back is free. Its entries, along everything but the symbolic factors, are an
integer array of *codes*, each naming an entry of a `Source`: data movement (Concat, Slice, Transpose, Reshape ...) is
numpy on that array and costs nothing at run time, broadcasting along any axis is visible as repeated codes, and which
entries are request-level is read off the sources they come from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxrank.journal import Journal

Factor = int | str
Dim = tuple[Factor, ...]
Dims = tuple[Dim, ...]
Codes = NDArray[np.int64]

CANDIDATES = "N"
"""Name of the symbolic extent that counts candidates; every symbol that depends on it starts with it."""

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


class Unrepresentable(Exception):
    """The abstract domain cannot follow this step; the caller falls back to the tensor as a whole."""


def is_candidate_symbol(symbol: str) -> bool:
    """Whether an extent of this name may depend on the number of candidates."""
    return symbol.startswith(CANDIDATES)


def canonical(factors: Iterable[Factor]) -> Dim:
    """Drops factors of 1 and merges neighbouring constants.

    Raises:
        Unrepresentable: Two constants with a symbol between them, `(2, N, 3)`, in one dimension.
    """
    out: list[Factor] = []
    for f in factors:
        if f == 1:
            continue
        last = out[-1] if out else None
        if isinstance(f, int) and isinstance(last, int):
            out[-1] = last * f
        else:
            out.append(f)
    if sum(isinstance(f, int) for f in out) > 1:
        raise Unrepresentable(f"a dimension of factors {out}")
    return tuple(out)


def extent(dim: Dim) -> int:
    """The constant factor of a dimension."""
    for f in dim:
        if isinstance(f, int):
            return f
    return 1


def extents(dims: Dims) -> tuple[int, ...]:
    """Shape of the code array of a value with these dimensions: one axis per dimension."""
    return tuple([extent(d) for d in dims])


def symbols(dims: Iterable[Dim]) -> tuple[str, ...]:
    """Symbolic factors in order of appearance."""
    return tuple([f for d in dims for f in d if isinstance(f, str)])


def extended(dims: Dims, held: Iterable[str] | None = None) -> list[int]:
    """The dimensions of more than one entry, and at least the last two: in fewer dimensions less is reshaped.

    Args:
        dims: Logical shape.
        held: The symbols that count; None for all.
    """
    physical = dims if held is None else keep_symbols(dims, held)
    keep = [k for k, d in enumerate(physical) if d != () or k == len(dims) - 1]
    return keep if len(keep) > 1 else list(range(max(0, len(dims) - 2), len(dims)))


def stream(dims: Iterable[Dim]) -> list[Factor]:
    """All factors in order, neighbouring constants merged: equal for two groupings of the same entries."""
    out: list[Factor] = []
    for f in (f for d in dims for f in d):
        if isinstance(f, int) and out and isinstance(out[-1], int):
            out[-1] *= f
        else:
            out.append(f)
    return out


def keep_symbols(dims: Dims, present: Iterable[str]) -> Dims:
    """The physical shape of a tensor that holds one entry along every symbol not in `present`."""
    keep = set(present)
    return tuple(tuple(f for f in d if isinstance(f, int) or f in keep) for d in dims)


def with_extents(dims: Dims, shape: Sequence[int]) -> Dims:
    """The same symbols with other constant factors (an axis cut to `shape[i]` entries)."""
    out: list[Dim] = []
    for d, n in zip(dims, shape, strict=True):
        if extent(d) == n:
            out.append(d)
        elif any(isinstance(f, int) for f in d):
            out.append(canonical(n if isinstance(f, int) else f for f in d))
        else:
            out.append(canonical((*d, n)))
    return tuple(out)


def regroup(dims: Dims, target: Sequence[tuple[int, tuple[str, ...]]]) -> Dims:
    """Shares out the factors of `dims`, in order, over the dimensions of a reshape's result.

    Args:
        dims: Shape before, as factors.
        target: Shape after: per dimension its constant part and the multiset of its symbols.

    Raises:
        Unrepresentable: The reshape cuts through a factor in a way that mixes rows.
    """
    stream: list[Factor] = [f for d in dims for f in d]
    out: list[Dim] = []
    at = 0
    for const, syms in target:
        need, left = const, list(syms)
        got: list[Factor] = []
        while need != 1 or left:
            if at == len(stream):
                raise Unrepresentable("reshape to another number of entries")
            f = stream[at]
            if isinstance(f, str):
                if f not in left:
                    raise Unrepresentable(f"reshape moves the boundary of {f}")
                left.remove(f)
                got.append(f)
                at += 1
            elif not f or not need:
                raise Unrepresentable("reshape of no entries")
            elif need % f == 0:
                need //= f
                got.append(f)
                at += 1
            elif f % need == 0 and need != 1:
                got.append(need)
                stream[at] = f // need
                need = 1
            else:
                raise Unrepresentable("reshape cuts through an axis")
        out.append(canonical(got))
    if any(f != 1 for f in stream[at:]):
        raise Unrepresentable("reshape to another number of entries")
    return tuple(out)


def broadcast_dims(all_dims: Sequence[Dims]) -> Dims:
    """Numpy's broadcasting over factored shapes.

    Raises:
        Unrepresentable: Two extents that are factored differently.
    """
    rank = max(len(d) for d in all_dims)
    out: list[Dim] = []
    for k in range(rank):
        dim: Dim = ()
        for dims in all_dims:
            j = k - (rank - len(dims))
            if j < 0 or dims[j] == () or dims[j] == dim:
                continue
            if dim != ():
                raise Unrepresentable(f"extents {dim} and {dims[j]}")
            dim = dims[j]
        out.append(dim)
    return tuple(out)


def split_merged(dims: Dims) -> Dims:
    """Every factor as a dimension of its own, dimensions of one factor as they are."""
    return tuple(part for d in dims for part in ([(f,) for f in d] if len(d) > 1 else [d]))


@dataclass(frozen=True)
class Origin:
    """What nodes are written for.

    Attributes:
        index: The original node that they belong to, by its place.
        hint: What the names of their tensors are derived from.
        rule: Name of the rule that they are accounted to; None for none.
    """

    index: int = 0
    hint: str = ""
    rule: str | None = None


class Deferred(ABC):
    """How a tensor is written that nobody has asked for yet.

    What else can be asked of it before it is written, it says by the other classes below that it belongs to.
    """

    @abstractmethod
    def materialise(self) -> str:
        """Writes the tensor; gives its name.

        Raises:
            Unrepresentable: The layout of an operand cannot be written.
        """


class DeferredMatMul(Deferred):
    """A matrix product that is not written yet: what is added to it can be added on the way.

    Attributes:
        dims: Its physical shape.
    """

    dims: Dims

    @abstractmethod
    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        """Writes the product, with a tensor added to it.

        Args:
            addend: The tensor; None for none.
            have: Its physical shape, of which `dims` is a broadcast.
        """


class OpenProduct(Deferred):
    """A sum of request-level times candidate-level entries.

    A linear map behind it can take the request-level factors into its weights (`rules/fold.py`).
    """

    @abstractmethod
    def factors(self) -> tuple[Codes, Codes]:
        """Request-level and candidate-level factors of every entry, `[extents..., terms]` each."""


class Multiplicable(Deferred):
    """A tensor that can be multiplied with a matrix without being written."""

    @abstractmethod
    def then_matmul(self, weight: str, width: int) -> list[Source]:
        """Multiplies with a matrix behind it.

        Args:
            weight: Name of the matrix, of a row for each entry.
            width: Its number of columns.

        Returns:
            Tensors `[N, width]` whose sum is the product.
        """


class Selectable(Deferred):
    """A product of which some columns can be made alone."""

    @abstractmethod
    def select_columns(self, columns: NDArray[np.int64]) -> Source:
        """The same product with some of its columns only."""


class Scalable(Deferred):
    """A product that takes a number into its weights."""

    @abstractmethod
    def scale(self, number: str, times: bool) -> Source:
        """The product times a scalar constant, or divided by it.

        Args:
            number: Name of the scalar.
            times: Whether to multiply; divides if not.
        """


class AffineProduct(Deferred):
    """A product with constants or request-level weights, for whom it pays to know those."""

    @abstractmethod
    def coefficients(self) -> tuple[Codes, Codes]:
        """Weights and candidate-level entries of every column, `[columns, terms]` each."""


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
    origin: Origin = Origin()
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


@dataclass(eq=False)
class Value:
    """A tensor of the original graph: logical shape, and where each entry comes from.

    `whole` is set where the value is one source and nothing else: then the codes are only made when asked for.
    """

    dims: Dims
    dtype: int
    whole: Source | None = None
    _codes: Codes | None = field(default=None, repr=False)

    @property
    def codes(self) -> Codes:
        """Codes, one axis per dimension.

        Raises:
            Unrepresentable: The tensor has too many entries per row to list them.
        """
        if self._codes is None:
            assert self.whole is not None
            self._codes = codes_of(self.whole)
        return self._codes

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)


@dataclass(eq=False)
class Sum:
    """An addition not made yet: the value is the sum of the terms, each broadcast to `dims`."""

    dims: Dims
    dtype: int
    terms: list[Value]

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)


@dataclass(eq=False)
class Affine(ABC):
    """A normalised value kept apart from its normalisation: `scale * (base @ matrix) + shift` along the last axis.

    Attributes:
        base: Blocks along the last axis, of `K + k` entries.
        scale: One factor per row (last axis of extent 1).
    """

    dims: Dims
    dtype: int
    base: Value
    scale: Value

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.dims)

    @abstractmethod
    def fold(self, weight: str) -> tuple[str, str | None]:
        """Writes `matrix @ W` and `shift @ W` (None for no shift) for the name of a weight matrix `W` of K rows."""

    @abstractmethod
    def whole(self) -> Value:
        """The value as the model computes it, for consumers that are not linear."""


Abstract = Value | Sum | Affine


def view(dims: Dims, dtype: int, codes: Codes) -> Value:
    """A value given by its codes."""
    assert codes.shape == extents(dims), (codes.shape, dims)
    return Value(dims, dtype, None, codes)


def constant_along(codes: Codes, axis: int) -> bool:
    """Whether the value is the same at every position of an axis of more than one."""
    if codes.shape[axis] == 1:
        return False
    first = codes.take([0], axis)
    return bool((codes == first).all())


def cut_repeats(codes: Codes, axes: Iterable[int] | None = None) -> Codes:
    """Codes cut to one position along every axis (of `axes`) that the value does not vary along."""
    for axis in range(codes.ndim) if axes is None else axes:
        if constant_along(codes, axis):
            codes = codes.take([0], axis)
    return codes


def split_axis(keys: NDArray[np.int64]) -> tuple[int, list[NDArray[np.int64]]] | None:
    """Finds the axis along which `keys` is piecewise constant and on whose position alone it depends.

    Returns:
        The axis and, per distinct key in order of first appearance, the positions that have it; None if there is
        no such axis.
    """
    best: tuple[int, int, NDArray[np.int64]] | None = None
    for axis in range(keys.ndim):
        if keys.shape[axis] == 1:
            continue
        flat = np.moveaxis(keys, axis, 0).reshape(keys.shape[axis], -1)
        if not (flat == flat[:, :1]).all():
            continue
        runs = int((flat[1:, 0] != flat[:-1, 0]).sum())
        if best is None or runs < best[0]:
            best = (runs, axis, flat[:, 0])
    if best is None:
        return None
    _, axis, column = best
    found, first = np.unique(column, return_index=True)
    return axis, [np.flatnonzero(column == found[i]) for i in np.argsort(first)]


def rectangles(keys: NDArray[np.int64], most: int) -> list[tuple[NDArray[np.int64], ...]] | None:
    """Divides an array into boxes of one key each, each box a set of positions per axis.

    Args:
        keys: Key of every entry.
        most: Boxes allowed.

    Returns:
        The positions of each box, in order of first appearance; None if more boxes would be needed.
    """
    whole = tuple(np.arange(n) for n in keys.shape)
    if (keys == keys.flat[0]).all():
        return [whole]
    best: tuple[int, int, NDArray[np.int64], NDArray[np.int64]] | None = None
    for axis in range(keys.ndim):
        flat = np.moveaxis(keys, axis, 0).reshape(keys.shape[axis], -1)
        if len(flat) == 1 or (flat == flat[:1]).all():
            continue
        _, first, inverse = np.unique(flat, axis=0, return_index=True, return_inverse=True)
        if len(first) <= most and (best is None or len(first) < best[0]):
            best = (len(first), axis, first, inverse.reshape(-1))
    if best is None:
        return None
    _, axis, first, inverse = best
    out: list[tuple[NDArray[np.int64], ...]] = []
    for kind in np.argsort(first):
        at = np.flatnonzero(inverse == kind)
        inner = rectangles(keys.take(at[:1], axis), most - len(out))
        if inner is None:
            return None
        out += [tuple(at if k == axis else p for k, p in enumerate(box)) for box in inner]
    return out if len(out) <= most else None
