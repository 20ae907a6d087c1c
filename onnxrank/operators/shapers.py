"""Shapes, axes and entries that operators of several kinds have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from onnxrank import extents as ex
from onnxrank.extents import Expr, Unproved
from onnxrank.operators.entry import Shaper, Valuer
from onnxrank.operators.known import Known, Partial, Shape, whole
from onnxrank.operators.use import Use

_MOST_DIMENSIONS = 64


def broadcast(shapes: Sequence[Shape]) -> list[int | Expr | None]:
    """Numpy's broadcasting; None for an extent that depends on which symbols are 1."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[int | Expr | None] = []
    for k in range(rank):
        found = {s[k - rank + len(s)] for s in shapes if k >= rank - len(s)} - {1}
        found -= {n for n in found if any(ex.is_cut_of(n, other) for other in found)}
        out.append(1 if not found else next(iter(found)) if len(found) == 1 else None)
    return out


def broadcast_together(u: Use) -> list[Partial | None]:
    """One result, in the shape that all operands are broadcast to."""
    return [broadcast([u.shape(k) for k in range(len(u.node.input)) if u.has(k)])]


def same(u: Use) -> list[Partial | None]:
    """One result, in the shape of the first operand."""
    return [u.shape(0)]


def same_as(*positions: int) -> Shaper:
    """Outputs with the shapes of inputs."""
    return lambda u: [u.shape(k) for k in positions]


def unknown(count: int) -> Partial:
    """So many extents that are not known, as far as a tensor of a damaged model can have them."""
    if count > _MOST_DIMENSIONS:
        raise Unproved(f"{count} dimensions")
    return [None] * count


def fixed_only(do: Callable[..., Any]) -> Valuer:
    """Entries of an operator on constants alone, which numpy computes to the last bit as any runtime does."""

    def value(u: Use) -> list[Known | None]:
        operands = [u.value(k) for k in range(len(u.node.input)) if u.has(k)]
        if not all(o.concrete for o in operands):
            raise Unproved("an operator on extents")
        shape = whole(broadcast([o.shape for o in operands]))
        with np.errstate(all="ignore"):
            data = np.asarray(do(*(o.data for o in operands)))
        return [Known(shape, data, data.dtype)]

    return value


def from_axis(default: int) -> Callable[[Use], Sequence[int]]:
    """All axes from the attribute on."""
    return lambda u: range(u.axis(default, len(u.shape(0))), len(u.shape(0)))


def one_axis(default: int) -> Callable[[Use], Sequence[int]]:
    """The axis of the attribute."""
    return lambda u: [u.axis(default, len(u.shape(0)))]
