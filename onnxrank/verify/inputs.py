"""Generated inputs of several kinds; all keep the contract: request-level entries are the same in every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from onnxrank.facts import Setting, settings
from onnxrank.feeds import FALLBACK_IDS, Feed, Input, Maker, Ranges
from onnxrank.runtime import FLOATS
from onnxrank.values import CANDIDATES, extents, symbols

ORDINARY = "random"
FINITE = (ORDINARY, "edges", "padding", "fractions", "zeros", "large", "denormal")
"""Kinds that most models give finite scores for."""
POISONED = ("nan candidate", "inf candidate", "nan request")
"""Kinds with a value in one row that is no number."""
_HISTORY = 8
"""Integer inputs with so many positions, 0 among their values, are histories."""
_UNSIGNED = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64)


class Kind(Maker):
    """Makes inputs of one kind.

    Args:
        kind: `random`: ids and numbers from their ranges. `edges`: the least and the largest of them. `padding`:
            histories that are full, empty, of one entry, padded before or behind. `fractions`: ids that come as floats
            and are not whole numbers. `zeros`, `large`, `denormal`: floats
            of such sizes. `nan candidate`, `inf candidate`: one candidate's floats. `nan request`: the request's.
        declared: The inputs.
        ranges: Value ranges per entry.
    """

    def __init__(self, kind: str, declared: Sequence[Input], ranges: Ranges) -> None:
        super().__init__(declared, ranges)
        self.kind = kind
        self._seed = 0

    def __call__(self, setting: Setting) -> Feed:
        """Inputs of the original signature."""
        self._seed = setting.seed
        return super().__call__(setting)

    def _values(self, i: Input, shape: list[int], factors: list[Any], rng: np.random.Generator) -> NDArray[Any]:
        data = super()._values(i, shape, factors, rng)
        if self.kind == ORDINARY or i.dtype == TensorProto.STRING or data.dtype.kind == "b" or self.ranges is None:
            return data
        low, high, *_ = self.bounds(i)
        if data.dtype.kind in "iu":
            return self._whole(i, data, low, high, rng)
        return self._real(i, data, low, high, factors, rng)

    def _whole(
        self, i: Input, data: NDArray[Any], low: NDArray[Any], high: NDArray[Any], rng: np.random.Generator
    ) -> NDArray[Any]:
        if self.kind == "edges":
            return np.where(rng.random(data.shape) < 0.5, low, high - 1).astype(data.dtype)
        if self.kind == "padding" and data.ndim and data.shape[-1] >= _HISTORY and i.role.level == "request":
            return self._padded(data, low, high)
        return data

    def _padded(self, data: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> NDArray[Any]:
        """A history with another pattern of padding for each seed."""
        if (low > 0).any():
            return data
        length = data.shape[-1]
        full = np.where(data == 0, np.minimum(1, high - 1), data)
        keep = np.zeros(length, bool)
        pattern = self._seed % 5
        if pattern == 0:
            keep[:] = True
        elif pattern == 1:
            keep[: length // 3] = True
        elif pattern == 2:
            keep[-(length // 3) :] = True
        elif pattern == 3:
            keep[0] = True
        return np.where(keep, full, 0).astype(data.dtype)

    def _real(
        self,
        i: Input,
        data: NDArray[Any],
        low: NDArray[Any],
        high: NDArray[Any],
        factors: list[Any],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        assert self.ranges is not None
        whole = self.ranges[i.name][2]
        free = np.broadcast_to(np.isinf(high), data.shape)
        ids = np.broadcast_to(whole.reshape(low.shape), data.shape)
        number = ~ids
        if self.kind in ("edges", "large"):
            top = np.where(np.isinf(high), 0, high)
            edge = np.where(data >= (low + top) / 2, np.where(ids, top - 1, np.nextafter(top, low)), low)
            factor = 1000 if self.kind == "large" else 1
            return np.where(free, data.astype(np.float64) * factor, edge).astype(data.dtype)
        if self.kind == "fractions":
            return (data + np.where(ids, 0.5 * rng.random(data.shape), 0)).astype(data.dtype)
        allowed = free | ((low <= 0) & (high > 0))
        if self.kind == "zeros":
            return np.where(number & allowed, 0, data).astype(data.dtype)
        if self.kind == "denormal":
            tiny = {2: 2e-7, 4: 1e-40, 8: 1e-310}.get(data.dtype.itemsize, 1e-40)
            return np.where(number & allowed, np.sign(data.astype(np.float64)) * tiny, data).astype(data.dtype)
        if self.kind in POISONED:
            value = np.inf if self.kind.startswith("inf") else np.nan
            out = np.array(data)
            if self.kind == "nan request":
                return np.where(number, value, out).astype(data.dtype) if CANDIDATES not in factors or (
                    data.shape[factors.index(CANDIDATES)] == 1 and i.role.level != "candidate"
                ) else out  # fmt: skip
            if CANDIDATES in factors and i.role.level != "request":
                axis = factors.index(CANDIDATES)
                at: list[Any] = [slice(None)] * out.ndim
                at[axis] = poisoned_row(data.shape[axis])
                if data.shape[axis] > 1:
                    row = out[tuple(at)]
                    out[tuple(at)] = np.where(number[tuple(at)], value, row)
            return out
        return data


class Full(Maker):
    """Makes inputs whose histories end where their axis does: no id of padding, counts as large as they can be.

    The last position is hidden by a mask of bools for odd seeds only, whatever the mask means by true.
    """

    def __call__(self, setting: Setting) -> Feed:
        """Inputs of the original signature."""
        self._setting = setting
        return super().__call__(setting)

    def _values(self, i: Input, shape: list[int], factors: list[Any], rng: np.random.Generator) -> NDArray[Any]:
        data = super()._values(i, shape, factors, rng)
        along = [k for k, f in enumerate(factors) if isinstance(f, str) and f != CANDIDATES]
        if data.dtype.kind == "b" and along and data.size:
            at: list[Any] = [slice(None)] * data.ndim
            at[along[-1]] = -1
            data[tuple(at)] = self._setting.seed % 2 == 0
        if data.dtype.kind not in "iu" or self.ranges is None:
            return data
        low, high, *_ = self.bounds(i)
        if along:
            fill = super()._values(i, shape, factors, rng)
            other = np.where(fill == 0, np.maximum(np.minimum(1, high - 1), low), fill)
            return np.where(data == 0, other, data).astype(data.dtype)
        if _unknown(i, low, high).all():  # it may be how much of the history counts
            most = max((n for s, n in self._setting.symbols.items() if s != CANDIDATES), default=0)
            return np.full_like(data, most)
        return data


class Rows(Maker):
    """Makes inputs whose ids are given rows of a table, wherever an entry may be an id of it.

    Args:
        declared: The inputs.
        ranges: Value ranges per entry.
        rows: The rows; further seeds begin further on.
        size: Number of rows of the table; None for numbers that are rows of none.
    """

    def __init__(
        self, declared: Sequence[Input], ranges: Ranges, rows: NDArray[np.int64], size: int | None = None
    ) -> None:
        super().__init__(declared, ranges)
        self._rows, self._size = rows, size

    def _values(self, i: Input, shape: list[int], factors: list[Any], rng: np.random.Generator) -> NDArray[Any]:
        data = super()._values(i, shape, factors, rng)
        if self.ranges is None or i.dtype == TensorProto.STRING or data.dtype.kind == "b":
            return data
        least, most, integral, _ = self.bounds(i)
        low, high = np.broadcast_to(least, shape), np.broadcast_to(most, shape)
        whole = np.broadcast_to(integral, shape)
        rows = np.resize(self._rows, shape)
        # An id may be shifted on its way; one of which nothing is known may be any.
        shifted = whole & (high - low == self._size)
        free = whole & _unknown(i, low, high)
        fits = whole & (rows >= low) & (rows < high)
        start = np.where(np.isfinite(low), low, 0)
        return np.where(shifted, start + rows, np.where(free | fits, rows, data)).astype(data.dtype)


class FromEnd(Maker):
    """Makes inputs whose ids count from the ends of their tables: the first row, the last, any.

    Args:
        declared: The inputs.
        ranges: Value ranges per entry.
        names: The inputs that have such ids.
        share: How many of these entries do.
    """

    def __init__(self, declared: Sequence[Input], ranges: Ranges, names: Sequence[str], share: float) -> None:
        super().__init__(declared, ranges)
        self._names, self._share = names, share

    def _values(self, i: Input, shape: list[int], factors: list[Any], rng: np.random.Generator) -> NDArray[Any]:
        data = super()._values(i, shape, factors, rng)
        if i.name not in self._names:
            return data
        low, high, whole, _ = self.bounds(i)
        which, size = rng.integers(3, size=shape), np.where(np.isfinite(high), high, 1)
        back = np.select([which == 0, which == 1], [-size, -1], np.floor(rng.random(shape) * size) - size)
        taken = _counted(i, low, high, whole) & (rng.random(shape) < self._share)
        return np.where(taken, back, data).astype(data.dtype)


def _counted(
    i: Input, low: NDArray[np.float64], high: NDArray[np.float64], whole: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Ids that may count from the end of their table, from minus its size on: those that come to it as they are."""
    return np.asarray(whole & np.isfinite(high) & (low == 0) & ~_unknown(i, low, high), np.bool_)


def countable(declared: Sequence[Input], ranges: Ranges) -> list[str]:
    """Inputs with ids that may count from the end of their table, and that no role keeps from it."""
    return [
        i.name
        for i in declared
        if i.name in ranges and i.dtype not in _UNSIGNED and not i.role.ranges and _counted(i, *ranges[i.name]).any()
    ]


def _unknown(i: Input, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The whole numbers of an input of which nothing is known: neither roles nor a table say where they are."""
    fallback: NDArray[np.bool_] = (low == FALLBACK_IDS[0]) & (high == FALLBACK_IDS[1])
    return np.zeros_like(fallback) if i.role.ranges else fallback


def unknown(declared: Sequence[Input], ranges: Ranges) -> list[str]:
    """Inputs with whole numbers that are drawn without knowing where they are."""
    return [
        i.name
        for i in declared
        if i.dtype not in (TensorProto.STRING, TensorProto.BOOL) and i.name in ranges
        if (_unknown(i, *ranges[i.name][:2]) & ranges[i.name][2]).any()
    ]


def poisoned_row(candidates: int) -> int:
    """The candidate whose values are no numbers."""
    return candidates // 2


def kinds(declared: Sequence[Input], ranges: Ranges, names: Sequence[str]) -> dict[str, Kind]:
    """The makers of some kinds, without those that would make just ordinary inputs."""
    floats = _has(declared, ranges, real=True)
    histories = any(
        i.role.level == "request" and i.dtype in (TensorProto.INT64, TensorProto.INT32) and _last(i) >= _HISTORY
        for i in declared
    )
    useful = {"padding": histories, "zeros": floats, "large": floats, "denormal": floats}
    useful["fractions"] = _has(declared, ranges, real=False)
    useful |= {
        "nan candidate": _has(declared, ranges, real=True, levels=("candidate", "mixed")),
        "inf candidate": _has(declared, ranges, real=True, levels=("candidate", "mixed")),
        "nan request": _has(declared, ranges, real=True, levels=("request", "mixed")),
    }
    return {name: Kind(name, declared, ranges) for name in names if useful.get(name, True)}


def _last(i: Input) -> int:
    """Extent of the last axis; that of an axis of unknown size counts as large."""
    if not i.dims or i.role.candidate_axis == len(i.dims) - 1:
        return 0
    return _HISTORY if symbols([i.dims[-1]]) else int(extents((i.dims[-1],))[0])


def _has(
    declared: Sequence[Input], ranges: Ranges, real: bool, levels: Sequence[str] = ("request", "candidate", "mixed")
) -> bool:
    """Whether an input of floats of some level has entries that are real, or else whole, numbers."""
    floats = [i.name for i in declared if i.dtype in FLOATS and i.role.level in levels]
    return any(bool((ranges[name][2] != real).any()) for name in floats)


def point(symbols: Sequence[str], candidates: int, seed: int, lengths: Mapping[str, int] | None = None) -> Setting:
    """The extents of one run.

    Args:
        symbols: Symbols of the inputs' shapes.
        candidates: Number of candidates.
        seed: For the values.
        lengths: Extents of other symbols, where they are not those that `facts.settings` gives.
    """
    (found,) = settings(symbols, (candidates,))
    return Setting({**found.symbols, **(lengths or {})}, 100 * candidates + seed)


# --- rows --------------------------------------------------------------------------------------------------------


def rows(declared: Sequence[Input], feed: Mapping[str, NDArray[Any]]) -> int | None:
    """The number of candidates in a feed; None if no input has rows."""
    for i in declared:
        if i.role.candidate_axis is not None:
            return int(feed[i.name].shape[i.role.candidate_axis]) // (i.role.record or 1)
    return None


def take(declared: Sequence[Input], feed: Mapping[str, NDArray[Any]], index: Sequence[int] | NDArray[Any]) -> Feed:
    """Some of the candidates, in the order given; any may come several times."""
    out: Feed = {}
    at = np.asarray(index, np.int64)
    for i in declared:
        data, axis, record = feed[i.name], i.role.candidate_axis, i.role.record
        if axis is None:
            out[i.name] = data
        elif record is not None:
            out[i.name] = np.ascontiguousarray(data.reshape(-1, record)[at].reshape(-1))
        else:
            out[i.name] = np.ascontiguousarray(np.take(data, at, axis))
    return out


def with_request(
    declared: Sequence[Input], feed: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]
) -> Feed:
    """A feed's candidates with the request-level entries of another feed of as many rows."""
    out: Feed = {}
    for i in declared:
        mine, its = feed[i.name], other[i.name]
        if i.role.level == "candidate":
            out[i.name] = mine
        elif i.role.level == "request":
            out[i.name] = its
        else:
            record = i.role.record
            new = np.array(mine).reshape(-1, record) if record is not None else np.array(mine)
            its = its.reshape(-1, record) if record is not None else its
            at: list[Any] = [slice(None)] * new.ndim
            at[1 if record is not None else i.mixed_axis] = list(i.role.request)
            new[tuple(at)] = its[tuple(at)]
            out[i.name] = new.reshape(mine.shape)
    return out


def replaced(
    declared: Sequence[Input], feed: Mapping[str, NDArray[Any]], row: int, other: Mapping[str, NDArray[Any]]
) -> Feed:
    """A feed with one candidate replaced by that of another feed of as many rows and the same request."""
    count = rows(declared, feed)
    assert count is not None
    both = joined(declared, feed, other)
    index = list(range(count))
    index[row] += count
    return take(declared, both, index)


def joined(declared: Sequence[Input], feed: Mapping[str, NDArray[Any]], more: Mapping[str, NDArray[Any]]) -> Feed:
    """The candidates of two feeds of one request behind each other."""
    out: Feed = {}
    for i in declared:
        axis = i.role.candidate_axis
        out[i.name] = feed[i.name] if axis is None else np.concatenate([feed[i.name], more[i.name]], axis)
    return out


def violations(declared: Sequence[Input], feed: Mapping[str, NDArray[Any]]) -> list[tuple[str, int]]:
    """Request-level inputs that differ within one request, with the first row that differs from row 0."""
    found = []
    for i in declared:
        axis, record = i.role.candidate_axis, i.role.record
        if axis is None or i.role.level == "candidate":
            continue
        data = feed[i.name].reshape(-1, record) if record is not None else np.moveaxis(feed[i.name], axis, 0)
        if i.role.level == "mixed":
            along = 1 if record is not None else i.mixed_axis + (1 if i.mixed_axis < axis else 0)
            data = np.take(data, list(i.role.request), along)
        if len(data) < 2:
            continue
        with np.errstate(invalid="ignore"):
            differs = (data != data[:1]) & ~((data != data) & (data[:1] != data[:1]))
        bad = differs.reshape(len(data), -1).any(axis=1)
        if bad.any():
            found.append((i.name, int(bad.argmax())))
    return found


def outside(declared: Sequence[Input], ranges: Ranges, feed: Mapping[str, NDArray[Any]]) -> list[str]:
    """Ids that are beyond their tables or declared ranges, in words; none for ranges that nothing is known of.

    Args:
        declared: The inputs.
        ranges: Values of their entries.
        feed: A request. Ids from minus the size of a table on count from its end.
    """
    found = []
    for i in declared:
        if i.name not in ranges or i.dtype == TensorProto.STRING:
            continue
        data = feed[i.name]
        shape = [
            f if isinstance(f, int) else data.shape[axis] // extents((d,))[0]
            for axis, d in enumerate(i.dims)
            for f in (d or (1,))
        ]
        factors = [f for d in i.dims for f in (d or (1,))]
        given = [n if isinstance(f, int) else 1 for n, f in zip(shape, factors, strict=True)]
        low, high, whole = (np.broadcast_to(a.reshape(given), shape) for a in ranges[i.name])
        known = whole & np.isfinite(high) & ~_unknown(i, low, high)
        values = data.reshape(shape).astype(np.float64)
        least = np.where(_counted(i, low, high, whole), -high, low)
        bad = known & ((values < least) | (values >= high))
        if bad.any():
            at = np.unravel_index(int(bad.argmax()), bad.shape)
            found.append(
                f"{i.name!r} holds {values[at]:.0f} where ids are in {low[at]:.0f}..{high[at] - 1:.0f} "
                f"({int(bad.sum())} of {bad.size} entries)"
            )
    return found
