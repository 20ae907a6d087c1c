"""Sums over tensors that a model stacks first: made tensor by tensor, so that nothing is copied side by side.

`sum_e g_e x_e` of experts is exported as a stack of them, a product with the gate, and a sum over the stack. That
copies all of them, goes over the copy for the product, and over that for the sum; one by one there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import NodeProto

from onnxrank.graphs import attribute
from onnxrank.operators import operator
from onnxrank.rewrite import Rewrite
from onnxrank.values import Codes, Level

_WIDE = 64
"""Entries of a row of each tensor from which on a pass over it takes longer than to begin one."""
_MOST = 16
"""Tensors that are added one by one."""


def axes_of(rw: Rewrite, node: NodeProto, rank: int) -> list[int] | None:
    """The axes that a reduction reduces; None if they are computed at run time."""
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        given = rw.array(node, 1)
        if given is None:
            return None
        axes = given.reshape(-1).tolist()
    if not axes:
        return [] if attribute(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(a % rank for a in axes)


def is_stack(rw: Rewrite, codes: Codes, axis: int) -> bool:
    """Whether each position of an axis holds a wide candidate-level tensor of its own, and all of it."""
    count = codes.shape[axis]
    if not 1 < count <= _MOST or codes.size < count * _WIDE:
        return False
    seen: set[int] = set()
    for part in np.moveaxis(codes, axis, 0):
        found = rw.sources.of(part)
        if len(found) != 1 or found[0].level is not Level.CANDIDATE or codes.size != found[0].size * count:
            return False
        seen.add(found[0].number)
    return len(seen) == int(count)


def summed(rw: Rewrite, name: str, rank: int) -> int | None:
    """The one axis that all readers of an original tensor sum it over; None if somebody does anything else."""
    readers = rw.readers(name)
    axes = [axes_of(rw, n, rank) if operator(n) == "ReduceSum" and n.input[0] == name else None for n in readers]
    (axis,) = axes[0] if axes and axes[0] is not None and len(axes[0]) == 1 else (None,)
    return None if name in rw.outputs or any(found != [axis] for found in axes) else axis


def is_summed(rw: Rewrite, name: str, rank: int, axis: int) -> bool:
    """Whether a tensor is only summed over an axis, after a product at most."""
    readers = rw.readers(name)
    if not any(operator(n) == "Mul" for n in readers):
        return summed(rw, name, rank) == axis
    return all(operator(n) == "Mul" and summed(rw, n.output[0], rank) == axis for n in readers)


def apart(rw: Rewrite, output: str, operands: Sequence[Codes]) -> list[Any] | None:
    """The positions of the axis that a stack has, of an elementwise result that is only summed over it.

    Args:
        rw: The rewrite.
        output: The result, in the original graph.
        operands: Codes of the operands, of one shape.

    Returns:
        An index for each; None where there is no stack, or somebody else reads the result.
    """
    shape = operands[0].shape
    axis = summed(rw, output, len(shape))
    if axis is None or not any(is_stack(rw, codes, axis) for codes in operands):
        return None
    return [tuple(slice(k, k + 1) if a == axis else slice(None) for a in range(len(shape))) for k in range(shape[axis])]
