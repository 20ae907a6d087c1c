"""Factored shapes: a product of numbers and symbols per dimension."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Factor = int | str

Dim = tuple[Factor, ...]

Dims = tuple[Dim, ...]

CANDIDATES = "N"
"""Name of the symbolic extent that counts candidates; every symbol that depends on it starts with it."""


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


def rows_of(dims: Dims) -> Dims | None:
    """The shape with everything in front of the last axis in one; None where several constants would be in that."""
    rows = tuple(f for d in dims[:-1] for f in d)
    return None if sum(isinstance(f, int) for f in rows) > 1 else (rows, dims[-1])


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
