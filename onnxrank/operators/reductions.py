"""Operators that take entries along some axes together: sums, extrema, pools, running sums, the first few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxrank import extents as ex
from onnxrank import transfers
from onnxrank.extents import Expr, Unproved
from onnxrank.operators import signatures
from onnxrank.operators.entry import Operator, Shaper, Trait, Valuer
from onnxrank.operators.known import Known, Partial, constant, kept, known, objects, whole
from onnxrank.operators.shapers import one_axis, same, windows
from onnxrank.operators.use import Use


def _reduced_axes(since: int) -> Callable[[Use], list[int]]:
    """The axes of a reduction, which are an input from an opset on."""

    def axes(u: Use) -> list[int]:
        rank = len(u.shape(0))
        given = u.integers(1, "axes") if u.opset >= since else u.attribute("axes")
        if not given:
            return [] if u.attribute("noop_with_empty_axes", 0) else list(range(rank))
        return sorted({int(a) % rank for a in given})

    return axes


def _reduction(since: int) -> Shaper:
    """A reduction whose axes are an input from an opset on."""
    axes = _reduced_axes(since)

    def shape(u: Use) -> list[Partial | None]:
        gone, have, keep = axes(u), u.shape(0), bool(u.attribute("keepdims", 1))
        return [[1 if k in gone else n for k, n in enumerate(have) if keep or k not in gone]]

    return shape


def _reduced(since: int, do: Callable[[Any, Any], Any]) -> Valuer:
    """Entries of a reduction of integers."""
    shaper = _reduction(since)

    def value(u: Use) -> list[Known | None]:
        x = u.value(0)
        (found,) = shaper(u)
        assert found is not None
        shape = whole(found)
        if x.dtype.kind not in "iu":
            raise Unproved("numbers that are no extents")
        gone = set(_reduced_axes(since)(u))
        if not gone and u.attribute("noop_with_empty_axes", 0):
            return [x]
        if any(isinstance(x.shape[a], Expr) for a in gone):
            raise Unproved("a symbolic axis")
        order = [k for k in range(x.data.ndim) if k not in gone] + sorted(gone)
        lines = objects(x.data).transpose(order).reshape([x.data.shape[k] for k in order if k not in gone] + [-1])
        out = np.empty(lines.shape[:-1], object)
        for at in np.ndindex(out.shape):
            total = lines[at][0] if len(lines[at]) else None
            if total is None:
                raise Unproved("no entries")
            for other in lines[at][1:]:
                total = do(total, other)
            out[at] = total
        return [known(shape, out.reshape(kept(shape)), x.dtype)]

    return value


def _arg_reduction(u: Use) -> list[Partial | None]:
    have = u.shape(0)
    axis = u.axis(0, len(have))
    keep = bool(u.attribute("keepdims", 1))
    return [[1 if k == axis else n for k, n in enumerate(have) if keep or k != axis]]


def _top_k(u: Use) -> list[Partial | None]:
    have = list(u.shape(0))
    axis = u.axis(-1, len(have))
    k: int | Expr | None = u.attribute("k")
    if k is None:
        found = u.values[1]
        (k,) = found.sizes() if found is not None else (None,)
    out: list[int | Expr | None] = [*have[:axis], k, *have[axis + 1 :]]
    return [out, out]


def _cum_sum_entries(u: Use) -> list[Known | None]:
    x, axis = u.value(0), u.value(1)
    if not x.fixed or not axis.fixed or u.attribute("exclusive", 0) or u.attribute("reverse", 0):
        raise Unproved("a sum of extents")
    return [constant(np.cumsum(x.data, int(axis.data), dtype=x.dtype))]


def _reducing(since: int, do: Callable[[Any, Any], Any] | None = None, traits: Trait = Trait.NONE) -> Operator:
    """A reduction whose axes are an input from an opset on, and what it does to two integers."""
    value = None if do is None else _reduced(since, do)
    return Operator(_reduction(since), value, traits=Trait.REDUCTION | traits, axes=_reduced_axes(since))


OPERATORS = {
    **{op: _reducing(18) for op in "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare".split()},
    "ReduceMean": _reducing(18, traits=Trait.SMOOTH),
    "ReduceSum": _reducing(13, lambda a, b: a + b, Trait.SMOOTH),
    "ReduceProd": _reducing(18, lambda a, b: a * b),
    "ReduceMax": _reducing(18, ex.maximum),
    "ReduceMin": _reducing(18, ex.minimum),
    **dict.fromkeys(
        ("ArgMax", "ArgMin"),
        Operator(_arg_reduction, traits=Trait.REDUCTION, axes=one_axis(0), signature=signatures.selected),
    ),
    "TopK": Operator(_top_k, axes=one_axis(-1), levels=transfers.top_k),
    "CumSum": Operator(
        same,
        _cum_sum_entries,
        traits=Trait.REDUCTION,
        axes=lambda u: u.integers(1, "axis") or [],
        levels=transfers.normalised,
    ),
    "CumProd": Operator(
        same, traits=Trait.REDUCTION, axes=lambda u: u.integers(1, "axis") or [], levels=transfers.normalised
    ),
    **dict.fromkeys(
        "GlobalAveragePool GlobalMaxPool GlobalLpPool".split(),
        Operator(lambda u: [[*u.shape(0)[:2], *(1 for _ in u.shape(0)[2:])]], traits=Trait.REDUCTION | Trait.IMAGES),
    ),
    **dict.fromkeys("AveragePool MaxPool LpPool".split(), Operator(windows, traits=Trait.REDUCTION | Trait.IMAGES)),
}
