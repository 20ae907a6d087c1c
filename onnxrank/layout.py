"""From codes back to tensors: which few nodes bring entries of several sources into one layout.

`Layout.realise` is the only place where data movement is paid for at run time. It looks for, in this order: a tensor
that is there already, a reshape, a slice or transpose of one tensor, a Concat of such pieces along one axis, and, where
the layout has no structure, one Gather over the flattened entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from hashlib import blake2b
from math import prod

import numpy as np

from onnxrank.emitter import Emitter
from onnxrank.extents import Expr
from onnxrank.values import (
    HOLE,
    Codes,
    Dim,
    Dims,
    Factor,
    Level,
    Origin,
    Source,
    Sources,
    Unrepresentable,
    canonical,
    cut_repeats,
    extents,
    is_candidate_symbol,
    keep_symbols,
    offsets,
    source_numbers,
    split_merged,
    stream,
    symbols,
    with_extents,
)
from onnxrank.views import Views, join_is_faster, labelled

_MOST_CUTS = 16
"""Pieces of a grid at most that are joined one by one: a bound on the size of the result."""


class Layout(Views):
    """Writes tensors for codes.

    Args:
        sources: The sources that codes refer to.
        emitter: Receives the nodes.
        expressions: What symbols stand for that are not extents of inputs.
        writing: The context in which deferred tensors are written; the emitter's, at their origin, if not given.
    """

    def __init__(
        self,
        sources: Sources,
        emitter: Emitter,
        expressions: Mapping[str, Expr],
        writing: Callable[[Origin], AbstractContextManager[None]] | None = None,
    ) -> None:
        super().__init__(emitter, expressions, sources.journal)
        self.writing = writing or emitter.at
        self.sources = sources
        self._done: dict[tuple[object, ...], str] = {}
        sources.journal.watch(self._done)

    def name_of(self, source: Source) -> str:
        """The source's tensor, written if it is not in the graph yet."""
        if source.name is None:
            if source.deferred is not None:
                with self.writing(source.origin):
                    name = source.deferred.materialise()
            else:
                name = self.emit.constant(source.data)
            self.sources.journal.put(source, "name", name)
        assert source.name is not None
        return source.name

    def realise(self, codes: Codes, dims: Dims, full: bool = False) -> tuple[str, Dims]:
        """Makes the tensor with these entries.

        Args:
            codes: Entries, one axis per dimension; holes become any value.
            dims: Logical shape.
            full: Whether the tensor must hold all the rows of `dims` instead of one along a symbol it does not vary
                along.

        Returns:
            The tensor's name and physical shape.

        Raises:
            Unrepresentable: The layout cannot be written with the shapes known.
        """
        key = (blake2b(codes.tobytes(), digest_size=16).digest(), dims, full)
        present = set(symbols(dims)) if full else self.sources.symbols(codes)
        physical = keep_symbols(dims, present)
        if key not in self._done:
            self._done[key] = self._make(codes, physical)
        return self._done[key], physical

    def stack(self, codes: Codes, dims: Dims, hint: str | None = None) -> str:
        """Makes `[rows, columns]` or a stack of those, the left operand of a MatMul, with all rows.

        Where it may be a Transpose, a Reshape follows: onnxruntime takes that into the MatMul, then divides by no rows.
        """
        return self.kept_apart(self.realise(codes, dims, full=True)[0], dims, hint)

    def _make(self, codes: Codes, dims: Dims) -> str:
        """Makes the tensor with all the symbols in `dims` present."""
        if (codes == HOLE).any():
            some = codes[codes != HOLE]
            codes = np.where(codes == HOLE, some[0] if some.size else 0, codes)
        found = self.sources.of(codes)
        if len(found) == 1 and found[0].dims == dims and np.array_equal(offsets(codes).reshape(-1), _range(codes.size)):
            return self.name_of(found[0])
        reduced = cut_repeats(codes)
        held = self.sources.symbols(reduced)
        small = keep_symbols(with_extents(dims, reduced.shape), held)
        if small != dims:
            return self.expand(self._make(reduced, small), small, dims)
        if all(s.level is Level.CONSTANT and not s.rounded for s in found):
            return self.emit.constant(self.sources.constants(codes).reshape(extents(dims)))
        if len(found) == 1:
            return self._from_one(found[0], codes, dims)
        split = split_merged(dims)
        if split != dims:
            return self.reshape(self._make(codes.reshape(extents(split)), split), split, dims)
        return self._concat(codes, dims) or self._gather_flat(codes, dims)

    def native_order(self, codes: Codes, dims: Dims) -> list[int] | None:
        """The order of axes in which a whole tensor lies in memory.

        Returns:
            None for the order they have, and for entries that are not those of one tensor.
        """
        found = self.sources.of(codes)
        if len(found) != 1 or found[0].size != codes.size or any(len(d) > 1 for d in dims):
            return None
        factors = [f for d in found[0].dims for f in d]
        sizes = [f if isinstance(f, int) else 1 for f in factors]
        strides = [prod(sizes[k + 1 :]) for k in range(len(sizes))]
        place: dict[int, tuple[int, int]] = {}
        for axis, d in enumerate(dims):
            if symbols([d]):
                if d[0] not in factors:
                    return None
                place[axis] = (factors.index(d[0]), 0)
            elif codes.shape[axis] > 1:
                step = int(np.moveaxis(codes, axis, 0)[1].flat[0] - codes.flat[0])
                fits = (k for k, n in enumerate(sizes) if strides[k] <= step < strides[k] * n)
                place[axis] = (next(fits, -1), -step)
        wanted = sorted(place, key=lambda a: place[a])
        order = [a for a in range(len(dims)) if a not in place] + wanted
        if wanted == sorted(wanted) or not np.array_equal(
            offsets(codes.transpose(order)).reshape(-1), _range(codes.size)
        ):
            return None
        return order

    # --- several sources -------------------------------------------------------------------------------------------

    def _concat(self, codes: Codes, dims: Dims) -> str | None:
        """A Concat of pieces with fewer sources each, along the axis with the fewest pieces."""
        numbers = source_numbers(codes)
        levels = self.sources.levels(codes).astype(np.int64)
        best: tuple[int, int, Codes] | None = None
        for axis in range(codes.ndim):
            n = codes.shape[axis]
            if n == 1 or len(dims[axis]) > 1:
                continue
            for keys in (levels, numbers):
                flat = np.moveaxis(keys, axis, 0).reshape(n, -1)
                if not (flat == flat[:, :1]).all():
                    continue
                cuts = np.flatnonzero(flat[1:, 0] != flat[:-1, 0]) + 1
                # Pieces of one level are brought to full rows together: few large Expands, not many small ones.
                if len(cuts) and (best is None or len(cuts) < best[0]):
                    best = (len(cuts), axis, cuts)
        best = best or _grid(numbers, dims)
        if best is None:
            return None
        _, axis, cuts = best
        order = _native_order(np.split(codes, cuts, axis)[0], axis)
        if order is not None:
            back = [int(k) for k in np.argsort(order)]
            turned = tuple(dims[k] for k in order)
            name, have = self.turned(self._make(codes.transpose(order), turned), turned, back)
            return self.reshape(name, have, dims)
        picked = self._picked(codes, dims, axis, len(cuts))
        if picked:
            return picked
        pieces = self._stacked(codes, dims, axis, cuts)
        if len(pieces) == 1:
            return pieces[0]
        return self.emit.add("Concat", pieces, {"axis": axis})

    def _picked(self, codes: Codes, dims: Dims, axis: int, cuts: int) -> str | None:
        """Positions that repeat or alternate: every different one once, in order of level, then one Gather."""
        rows = np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1)
        unique, inverse = np.unique(rows, axis=0, return_inverse=True)
        order = np.argsort(self.sources.levels(unique).max(-1), kind="stable")
        numbers = source_numbers(unique[order])
        pieces = int((numbers[1:] != numbers[:-1]).any(-1).sum())
        if cuts <= 2 * pieces + 4:
            return None
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        shape = list(codes.shape)
        shape[axis] = len(order)
        packed = np.moveaxis(unique[order].reshape(len(order), *np.moveaxis(codes, axis, 0).shape[1:]), 0, axis)
        name = self._make(packed, with_extents(dims, shape))
        index = self.emit.constant(place[inverse.reshape(-1)].astype(np.int64))
        return self.emit.add("Gather", [name, index], {"axis": axis})

    def _stacked(self, codes: Codes, dims: Dims, axis: int, cuts: Codes) -> list[str]:
        """The pieces along an axis; runs of whole tensors of one shape such as `[N, 1, d]` are joined as they are.

        Instead of one Reshape for each there is one Concat and one Reshape for a run.
        """
        out: list[str] = []
        pieces = np.split(codes, cuts, axis)
        k = 0
        while k < len(pieces):
            run = [k]
            shape, along = self._stackable(pieces[k], dims, axis)
            while shape and run[-1] + 1 < len(pieces):
                other, _ = self._stackable(pieces[run[-1] + 1], dims, axis)
                if other != shape:
                    break
                run.append(run[-1] + 1)
            if shape and len(run) > 1:
                found = [self.sources[int(source_numbers(pieces[r]).flat[0])] for r in run]
                name = self.emit.add("Concat", [self.name_of(s) for s in found], {"axis": along})
                joined = list(extents(found[0].dims))
                joined[along] = sum(extents(s.dims)[along] for s in found)
                want = list(codes.shape)
                want[axis] = sum(pieces[r].shape[axis] for r in run)
                out.append(self.reshape(name, with_extents(found[0].dims, joined), with_extents(dims, want)))
            else:
                out += [self._make(pieces[r], with_extents(dims, pieces[r].shape)) for r in run]
            k = run[-1] + 1
        return out

    def _stackable(self, piece: Codes, dims: Dims, axis: int) -> tuple[tuple[Dim | None, ...], int]:
        """Shape, but for the axis to join along, of a whole tensor that would have to be reshaped; () if it is not."""
        numbers = source_numbers(piece)
        source = self.sources[int(numbers.flat[0])]
        along = next((k for k, d in enumerate(source.dims) if not symbols([d])), None)
        if along is None or piece.size != piece.shape[axis] or (numbers != source.number).any():
            return (), 0
        want = with_extents(dims, piece.shape)
        if any(symbols([d]) for d in dims[axis:]):
            return (), 0
        if symbols(source.dims) != symbols(dims) or any(symbols([d]) for d in source.dims[along:]):
            return (), 0
        if any(isinstance(f, int) for d in source.dims[:along] for f in d):
            return (), 0
        if not np.array_equal(offsets(piece).reshape(-1), _range(source.size)):
            return (), 0
        if self.before_reshape(self.name_of(source), source.dims, want) is not None:
            return (), 0
        return tuple(None if k == along else d for k, d in enumerate(source.dims)), along

    def _gather_flat(self, codes: Codes, dims: Dims) -> str:
        """Every entry used, once, side by side; then a Gather."""
        unique, inverse = np.unique(codes.reshape(-1), return_inverse=True)
        syms = tuple((s,) for s in symbols(dims))
        flat: Dims = (*syms, canonical([len(unique)]))
        if len(flat[-1]) == 0:
            raise Unrepresentable("a single entry")
        packed = self._make(unique.reshape((1,) * len(syms) + (-1,)), flat)
        taken = self.emit.add(
            "Gather", [packed, self.emit.constant(inverse.reshape(-1).astype(np.int64))], {"axis": len(syms)}
        )
        return self.arranged(taken, (*syms, canonical([codes.size])), dims)

    # --- one source ------------------------------------------------------------------------------------------------

    def _from_one(self, source: Source, codes: Codes, dims: Dims) -> str:
        name, have, at = self._cut(source, offsets(codes))
        total = prod(extents(have))
        if at.size == total and np.array_equal(np.sort(at, None), _range(total)):
            if np.array_equal(at.reshape(-1), _range(total)) and symbols(have) == symbols(dims):
                if stream(have) == stream(dims):
                    return self.reshape(name, have, dims)
            moved = self._transpose(name, have, at, dims)
            if moved:
                return moved
            finer = _finer(at, dims)
            moved = self._transpose(name, have, *finer) if finer else None
            if finer and moved:
                return self.reshape(moved, finer[1], dims)
        # No structure left: flatten the source and pick entry by entry.
        syms = tuple((s,) for s in symbols(dims))
        flat = self.flat(name, have, syms)
        flat = self._taken(flat, (*syms, canonical([total])), at.reshape(-1), len(syms))
        return self.arranged(flat, (*syms, (at.size,) if at.size > 1 else ()), dims)

    def _cut(self, source: Source, at: Codes) -> tuple[str, Dims, Codes]:
        """Takes the positions used along each axis of a source, where each axis is addressed by one axis of `at`.

        Returns:
            The tensor, its shape, and where its entries go; the source itself where no axis can be cut.
        """
        name, have = self.name_of(source), source.dims
        squeezed = tuple(d for d in have if d != ())
        ready = self.before_reshape(name, have, squeezed) if at.size < source.size else None
        if ready is not None:  # what is cut from it has axes of its own
            name, have = ready, squeezed
        found = _positions(at, extents(have))
        if found is None and at.shape:
            # What lies side by side may be part of a longer axis.
            split = _split_last(have, _side_by_side(at))
            found = _positions(at, extents(split)) if split else None
            if found is not None and split is not None:
                name, have = self.reshape(name, have, split), split
        if found is None:
            return name, have, at
        positions, axes = found
        changed = [k for k, p in enumerate(positions) if not np.array_equal(p, _range(extents(have)[k]))]
        if any(len(have[k]) > 1 for k in changed):
            return name, have, at
        new = list(extents(have))
        for k in changed:
            name = self._taken(name, with_extents(have, new), positions[k], k)
            new[k] = len(positions[k])
        place = [
            np.zeros(at.shape, np.int64)
            if a is None
            else np.broadcast_to(_range(at.shape[a]).reshape([-1 if k == a else 1 for k in range(at.ndim)]), at.shape)
            for a in axes
        ]
        return name, with_extents(have, new), np.ravel_multi_index(place, new) if new else at

    def _taken(self, name: str, have: Dims, at: Codes, axis: int) -> str:
        """Positions along an axis: cut out where they are evenly spaced, or such runs of them joined."""
        if np.array_equal(at, _range(extents(have)[axis])):
            return name
        step = int(at[1] - at[0]) if len(at) > 1 else 1
        if len(at) == 1 or (step > 0 and (np.diff(at) == step).all()):
            ends = [np.array([v], np.int64) for v in (int(at[0]), int(at[-1]) + 1, axis, step)]
            return self.emit.add("Slice", [name, *map(self.emit.constant, ends)])
        runs = np.split(at, np.flatnonzero(np.diff(at) != 1) + 1)
        if join_is_faster(have, axis, len(at), len(runs)):
            return self.emit.add("Concat", [self._taken(name, have, run, axis) for run in runs], {"axis": axis})
        return self.emit.add("Gather", [name, self.emit.constant(at.astype(np.int64))], {"axis": axis})

    def _transpose(self, name: str, have: Dims, at: Codes, dims: Dims) -> str | None:
        """Reshape, Transpose and Reshape, where the entries are a permutation of the source's axes."""
        strides = []
        for axis in range(at.ndim):
            strides.append(int(np.moveaxis(at, axis, 0)[1].flat[0] - at.flat[0]) if at.shape[axis] > 1 else 0)
        grid = np.zeros(at.shape, np.int64)
        for axis, s in enumerate(strides):
            grid += (np.arange(at.shape[axis]) * s).reshape([-1 if k == axis else 1 for k in range(at.ndim)])
        if not np.array_equal(grid, at) or any(s < 0 for s in strides):
            return None
        axes = sorted((a for a in range(at.ndim) if at.shape[a] > 1), key=lambda a: -strides[a])
        # Factors of the source in its own order, each with the target axis it becomes.
        factors: list[tuple[Factor, int | str]] = []
        left = list(axes)
        for f, label in labelled(f for d in have for f in d):
            if isinstance(f, str):
                factors.append((f, label))
                continue
            need = f
            while need > 1:
                if not left or need % at.shape[left[0]]:
                    return None
                a = left.pop(0)
                need //= at.shape[a]
                factors.append((at.shape[a], a))
        wanted = [(f, axis) for axis, d in enumerate(dims) for f in d]
        named = labelled(f for f, _ in wanted)
        order: list[int | str] = [
            label if isinstance(f, str) else axis for (f, axis), (_, label) in zip(wanted, named, strict=True)
        ]
        labels = [label for _, label in factors]
        if sorted(map(str, labels)) != sorted(map(str, order)):
            return None
        perm = [labels.index(o) for o in order]
        split: Dims = tuple((f,) for f, _ in factors)
        lead = next((k for k, d in enumerate(dims) if d != ()), 0)
        rows = any(map(is_candidate_symbol, symbols(have)))
        before = self.unreshaped(name, have) != (name, split)
        if lead and before and dims[lead:] == tuple(split[p] for p in perm) and not rows:
            # The Reshape before gives the axes in front, too, so that there is none behind.
            split, perm = (((),) * lead + split), [*range(lead), *(p + lead for p in perm)]
            return self.turned(self.reshape(name, have, split), split, perm)[0]
        return self.reshape(*self.permuted(name, have, split, perm), dims)


def _grid(numbers: Codes, dims: Dims) -> tuple[int, int, Codes] | None:
    """The axis along which rows of several tensors, side by side, are followed by rows of others; and where."""
    best: tuple[int, int, Codes] | None = None
    for axis, n in enumerate(numbers.shape):
        flat = np.moveaxis(numbers, axis, 0).reshape(n, -1)
        cuts = np.flatnonzero((flat[1:] != flat[:-1]).any(1)) + 1
        if len(dims[axis]) > 1 or not 0 < len(cuts) <= _MOST_CUTS:
            continue
        most = max(len(np.unique(piece)) for piece in np.split(flat, cuts))
        if most < len(np.unique(numbers)) and (best is None or len(cuts) < best[0]):
            best = (len(cuts), axis, cuts)
    return best


def _native_order(piece: Codes, axis: int) -> list[int] | None:
    """The order of axes in which a piece of one source lies in memory, the joined axis before the entries of a piece.

    Returns:
        None where that is the order the axes have.
    """
    if piece.shape[axis] != 1 or (source_numbers(piece) != source_numbers(piece).flat[0]).any():
        return None
    inner = [k for k in range(piece.ndim) if piece.shape[k] > 1]
    strides = {k: int(np.moveaxis(piece, k, 0)[1].flat[0] - piece.flat[0]) for k in inner}
    wanted = [axis, *sorted(inner, key=lambda k: -strides[k])]
    if not inner or wanted == sorted(wanted):
        return None
    slots = iter(wanted)
    return [next(slots) if k in wanted else k for k in range(piece.ndim)]


def _finer(at: Codes, dims: Dims) -> tuple[Codes, Dims] | None:
    """Axes that go through several axes of a source, split into one for each."""
    split: list[Dim] = []
    for axis, d in enumerate(dims):
        line = np.moveaxis(at, axis, 0).reshape(at.shape[axis], -1)[:, 0]
        sizes: list[int] = []
        while len(line) > 1:
            jumps = np.flatnonzero(np.diff(line) != line[1] - line[0])
            run = int(jumps[0]) + 1 if len(jumps) else len(line)
            if len(line) % run or run == 1:
                return None
            sizes.insert(0, run)
            line = line[::run]
        if len(sizes) > 1 and len(d) > 1:
            return None
        split += [(n,) for n in sizes] if len(sizes) > 1 else [d]
    return None if len(split) == len(dims) else (at.reshape(extents(tuple(split))), tuple(split))


def _positions(at: Codes, shape: tuple[int, ...]) -> tuple[list[Codes], list[int | None]] | None:
    """Per axis of a source, the positions taken along it and the axis of `at` they run along.

    Returns:
        None where an axis of the source is addressed by several axes of `at`, or the other way round.
    """
    positions: list[Codes] = []
    axes: list[int | None] = []
    for coordinate in np.unravel_index(at, shape) if shape else ():
        mine = [a for a in range(at.ndim) if at.shape[a] > 1 and (coordinate != coordinate.take([0], a)).any()]
        if len(mine) > 1 or (mine and mine[0] in axes):
            return None
        axes.append(mine[0] if mine else None)
        flat = np.moveaxis(coordinate, mine[0], 0).reshape(at.shape[mine[0]], -1)[:, 0] if mine else coordinate.flat[:1]
        positions.append(np.asarray(flat, np.int64))
    if any(at.shape[a] > 1 and a not in axes for a in range(at.ndim)):
        return None
    return positions, axes


def _side_by_side(at: Codes) -> int:
    """How many entries lie side by side: the extent of the axis along which they do, the last one where none does."""
    steps = (a for a in range(at.ndim) if at.shape[a] > 1 and int(np.moveaxis(at, a, 0)[1].flat[0] - at.flat[0]) == 1)
    return int(at.shape[next(steps, -1)])


def _split_last(dims: Dims, size: int) -> Dims | None:
    """Splits the last constant factor in two, the second of a size."""
    if not dims or symbols(dims[-1:]) or not dims[-1] or size < 2:
        return None
    total = extents(dims[-1:])[0]
    if total % size or total == size:
        return None
    return (*dims[:-1], (total // size,), (size,))


def _range(n: int) -> Codes:
    return np.arange(n, dtype=np.int64)
