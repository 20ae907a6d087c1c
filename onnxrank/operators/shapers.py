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


def windows(u: Use) -> list[Partial | None]:
    """What windows that slide over the axes behind the first two give: convolutions and pools.

    Raises:
        Unproved: The last window is cut off, or the windows are of no constant length.
    """
    have, weights = u.shape(0), u.shape(1) if u.has(1) else None
    space = len(have) - 2
    given: Sequence[int | Expr] = u.attribute("kernel_shape") or (weights or ())[2:]
    kernel = [int(k) for k in given if not isinstance(k, Expr)]
    if u.attribute("ceil_mode", 0) or space < 1 or len(kernel) != space:
        raise Unproved("windows of another form")
    out: list[int | Expr | None] = [have[0], have[1] if weights is None else weights[0]]
    steps, apart = (u.attribute(name) or [1] * space for name in ("strides", "dilations"))
    pads, auto = u.attribute("pads") or [0] * 2 * space, u.attribute("auto_pad", b"NOTSET")
    for k, n in enumerate(have[2:]):
        if auto.startswith(b"SAME"):
            out.append(ex.ceil_divide(n, int(steps[k])))
            continue
        around = int(pads[k]) + int(pads[k + space]) if auto == b"NOTSET" else 0
        room = n + around - int(apart[k]) * (kernel[k] - 1) - 1
        # No window that fits none: such a model does not run.
        out.append(room + 1 if steps[k] == 1 else ex.floor_divide(ex.maximum(room + steps[k], 0), int(steps[k])))
    return [out] * len(u.node.output)


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
