"""One tensor in another shape, or with its axes in another order, as onnxruntime brings it there in the least time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import numpy as np

from onnxrank import cost
from onnxrank.cost import Bill
from onnxrank.emitter import Emitter
from onnxrank.extents import Expr
from onnxrank.journal import Journal
from onnxrank.moves import one_by_one
from onnxrank.shape_tensors import ShapeTensors
from onnxrank.values import (
    Dim,
    Dims,
    Factor,
    Unrepresentable,
    canonical,
    extents,
    is_candidate_symbol,
    stream,
    symbols,
)

_FLOAT = 4
"""Bytes of an entry."""
_NOT_TAKEN_IN = {"MatMul", "Add", "Mul", "Div", "Softmax", "Reshape"}
"""Operators that onnxruntime does not take into a product that follows."""


class Views:
    """Writes Reshape, Transpose and Expand.

    Args:
        emitter: Receives the nodes.
        expressions: What symbols stand for that are not extents of inputs.
        journal: Undoes what is noted of tensors that were given up.
    """

    def __init__(self, emitter: Emitter, expressions: Mapping[str, Expr], journal: Journal) -> None:
        self.sizes = ShapeTensors(emitter, expressions)
        self.emit = emitter
        self._reshaped: dict[str, tuple[str, Dims]] = {}
        journal.watch(self._reshaped, self.sizes.held)

    def reshape(self, name: str, have: Dims, want: Dims) -> str:
        """A Reshape between two groupings of the same factors; no Shape is read where one -1 will do."""
        ready = self.before_reshape(name, have, want)
        if ready is not None:
            return ready
        name, have = self.unreshaped(name, have)
        target: list[int] = []
        unknown = 0
        for k, d in enumerate(want):
            if not symbols([d]):
                target.append(prod(f for f in d if isinstance(f, int)))
            elif k < len(have) and have[k] == d:
                target.append(0)
            else:
                unknown += 1
                target.append(-1)
        literal: dict[str, int] = {}
        if unknown > 1 or (unknown and 0 in target):
            # Each of the symbols may be 0, and then -1 is no quotient of what is left.
            shape, literal = self.sizes.vector(want), self._literal(have, want)
        else:
            if target.count(0) == 1:
                # -1 also holds for a tensor without entries, and is what people expect to read.
                target[target.index(0)] = -1
            shape = self.emit.constant(np.array(target, np.int64))
        made = self.emit.add("Reshape", [name, shape], literal)
        self._reshaped[made] = (name, have)
        return made

    def _literal(self, have: Dims, want: Dims) -> dict[str, int]:
        """Attributes of a Reshape whose target says 0 where there are no entries.

        Raises:
            Unrepresentable: Before opset 14, 0 is the extent that is there, which is another one.
        """
        if self.emit.opset >= 14:
            return {"allowzero": 1}
        there = [set(symbols([d])) for d in have] + [set[str]()] * len(want)
        if not all(set(symbols([w])) <= h for w, h in zip(want, there, strict=False)):
            raise Unrepresentable("a reshape between two extents that may be 0, before opset 14")
        return {}

    def note_reshape(self, name: str, source: str, dims: Dims) -> None:
        """Notes that a tensor is another one, of this physical shape, in a new shape."""
        self._reshaped[name] = (source, dims)

    def unreshaped(self, name: str, dims: Dims) -> tuple[str, Dims]:
        """The tensor that this one was reshaped from, and its shape, or the tensor itself."""
        while name in self._reshaped:
            name, dims = self._reshaped[name]
        return name, dims

    def before_reshape(self, name: str, have: Dims, want: Dims) -> str | None:
        """The tensor of the wanted shape that this one was reshaped from, or the tensor itself."""
        while have != want:
            if name not in self._reshaped:
                return None
            name, have = self._reshaped[name]
        return name

    def unled(self, name: str, dims: Dims) -> str:
        """A tensor without axes of one entry in front that it was only reshaped for, or as it is.

        What it is broadcast to by a step has them, so that nothing else need.
        """
        lead = next((k for k, d in enumerate(dims) if d != ()), len(dims))
        before = (self.before_reshape(name, dims, dims[k:]) for k in range(1, lead + 1))
        return next((b for b in before if b is not None), name)

    def expand(self, name: str, have: Dims, want: Dims) -> str:
        """Repeats a tensor along the symbols and constant axes that `want` has and `have` lacks."""
        split_have: list[Dim] = []
        split_want: list[Dim] = []
        for h, w in zip(have, want, strict=True):
            if h == w or h == ():
                split_have.append(h)
                split_want.append(w)
                continue
            held = list(h)
            for f in w:
                split_want.append((f,))
                split_have.append((held.pop(0),) if held and held[0] == f else ())
            if held:
                raise Unrepresentable(f"expand {h} to {w}")
        inner, outer = tuple(split_have), tuple(split_want)
        name = self.reshape(name, have, inner) if inner != have else name
        goal = tuple(w if h != w else () for h, w in zip(inner, outer, strict=True))
        name = self.emit.add("Expand", [name, self.sizes.vector(goal)])
        return self.reshape(name, outer, want)

    def kept_apart(self, name: str, dims: Dims, hint: str | None = None) -> str:
        """A stack of matrices that onnxruntime does not take a Transpose before it into the product behind it."""
        turned = self.emit.turned.get(name)
        if len(dims) == 2 or (self.emit.op_of.get(name) in _NOT_TAKEN_IN and turned is None):
            return name
        return name if turned is not None and _fusion(turned) is None else self.written_anew(name, dims, hint)

    def written_anew(self, name: str, dims: Dims, hint: str | None = None) -> str:
        """A tensor behind a Reshape to its own shape, so that what makes it is not fused with what follows."""
        free = [k for k, d in enumerate(dims) if symbols([d])]
        if len(free) > 1:
            made = self.emit.add("Reshape", [name, self.sizes.vector(dims)], self._literal(dims, dims), hint=hint)
        else:  # One -1 is the quotient, 0 too, as no other extent is.
            shape = np.array([-1 if k in free else extents(dims)[k] for k in range(len(dims))], np.int64)
            made = self.emit.add("Reshape", [name, self.emit.constant(shape)], hint=hint)
        self.emit.apart[made] = None
        return made

    def factor(self, name: str, dims: Dims, inner: int, own: bool = False) -> str:
        """A tensor as an operand of a product, where lengths may be 0.

        Of no entries, a product into which onnxruntime takes a Transpose gives what lay in memory, and divides by 0
        where that moves the axis of a stack.

        Args:
            name: The tensor.
            dims: Its shape; of extents that are not told it is left as it is.
            inner: The axis that is summed over.
            own: Whether it is the user's own product, which of no candidates does what it did.
        """
        turned = self.emit.turned.get(name)
        taken = None if turned is None else _fusion(turned)
        empty = symbols(dims) if taken == "stack" else symbols([dims[inner]]) if taken == "matrix" else ()
        empty = tuple(s for s in empty if not (own and is_candidate_symbol(s)))
        return self.written_anew(name, dims) if empty and all(map(self.sizes.has, symbols(dims))) else name

    def permuted(self, name: str, have: Dims, split: Dims, perm: list[int]) -> tuple[str, Dims]:
        """A tensor with its factors in another order; its physical shape groups them as is convenient."""
        exchanged = self._exchanged(name, have, split, perm)
        if exchanged is not None:
            return exchanged
        return self.turned(self.reshape(name, have, split), split, perm)

    def turned(self, name: str, have: Dims, perm: list[int]) -> tuple[str, Dims]:
        """A tensor with its axes in another order; its physical shape groups them as is convenient.

        Rows of candidates are moved axis by axis, which copies what lies between; all at once goes entry by entry.
        Reshapes in between keep onnxruntime from making one Transpose of them again.
        """
        steps = one_by_one(tuple(perm))
        if len(steps) < 2 or perm[-1] == len(perm) - 1 or not any(map(is_candidate_symbol, symbols(have))):
            name = self.emit.add("Transpose", [name], {"perm": perm}) if steps else name
            return name, tuple(have[p] for p in perm)
        split, order = _side_by_side(have, perm)
        for step in one_by_one(tuple(order)):
            joined, turned = _side_by_side(split, step)
            name = self.emit.add("Transpose", [self.reshape(name, have, joined)], {"perm": turned})
            have, split = tuple(joined[p] for p in turned), tuple(split[p] for p in step)
        return name, have

    def _exchanged(self, name: str, have: Dims, split: Dims, perm: list[int]) -> tuple[str, Dims] | None:
        """Rows and parts of narrow rows exchanged: cut and joined, where that copies faster than a Transpose does.

        Returns:
            The tensor and its shape; None where a Transpose is as good.
        """
        if perm != [1, 0, *range(2, len(perm))] or symbols(split[2:]) or len(symbols(split[:2])) != 1:
            return None
        (rows,), count = symbols(split[:2]), max(extents(split[:2]))
        width = prod(extents(split[2:]))
        if not is_candidate_symbol(rows) or not _cut_is_faster(count, width):
            return None
        wide, narrow = canonical([count * width]), canonical([width])
        if split[0] == (rows,):
            parts = self.emit.split(self.reshape(name, have, ((rows,), wide)), 1, count)
            return self.emit.add("Concat", parts, {"axis": 0}), (canonical([count, rows]), narrow)
        parts = self.emit.split(self.reshape(name, have, ((count,), (rows,), narrow)), 0, count)
        return self.emit.add("Concat", parts, {"axis": 2}), ((), (rows,), wide)

    def flat(self, name: str, have: Dims, syms: Dims) -> str:
        """A tensor with symbols as its first axes, and all other entries as the last one."""
        total = prod(extents(have))
        flat: Dims = (*syms, (total,) if total > 1 else ())
        factors = stream(have)
        labels = [label for _, label in labelled(factors)]
        own = [labels.index(label) for _, label in labelled(s for (s,) in syms)]
        order = own + [k for k, f in enumerate(factors) if isinstance(f, int)]
        if order != sorted(order):
            split: Dims = tuple((f,) for f in factors)
            name, have = self.permuted(name, have, split, order)
        return self.reshape(name, have, flat)

    def arranged(self, name: str, have: Dims, dims: Dims) -> str:
        """A tensor that is as `flat` makes them, in a shape."""
        factors = stream(dims)
        order = [k for k, f in enumerate(factors) if isinstance(f, str)] + [
            k for k, f in enumerate(factors) if isinstance(f, int)
        ]
        if order == sorted(order):
            return self.reshape(name, have, dims)
        split: Dims = tuple((factors[k],) for k in order)
        name, have = self.turned(self.reshape(name, have, split), split, [int(k) for k in np.argsort(order)])
        return self.reshape(name, have, dims)


def _fusion(perm: tuple[int, ...]) -> str | None:
    """How onnxruntime takes a Transpose into a product: as one of each `matrix`, or of the `stack` too; None if not.

    Args:
        perm: The order of axes that it gives; none where it does not say.
    """
    if not perm:
        return "stack"
    last = len(perm) - 1
    if last and perm == (*range(last - 1), last, last - 1):
        return "matrix"
    return "stack" if perm[:-2] == tuple(range(1, last)) and {*perm[-2:]} == {0, last} and last > 1 else None


def _cut_is_faster(count: int, width: int) -> bool:
    """Whether parts of rows are cut and joined in less time than a Transpose exchanges them with the rows.

    Args:
        count: Parts of a row.
        width: Entries of a part.
    """
    moved, parts = _FLOAT * cost.MANY * count * width, cost.MANY * count
    exchanged = cost.CPU.seconds(cost.transposed(moved, _FLOAT * width, parts))
    return sum(cost.CPU.seconds(Bill("copy", moved, n)) for n in (parts, count)) < exchanged


def join_is_faster(have: Dims, axis: int, count: int, runs: int) -> bool:
    """Whether positions along an axis are cut out run by run and joined in less time than they are picked.

    That is more steps, so it is asked for few rows: what pays there pays for many.

    Args:
        have: Shape of the tensor.
        axis: The axis.
        count: Positions.
        runs: How many runs of positions that follow one another they are.
    """
    rows, entries = (
        prod(extents(part)) * cost.LENGTH ** len(symbols(part)) for part in (have[:axis], have[axis + 1 :])
    )
    moved, parts = _FLOAT * rows * count * entries, rows * runs
    ways = Bill("copy", moved, parts, launches=runs), Bill("copy", moved, parts), Bill("regroup", moved, rows * count)
    cut, joined, picked = map(cost.CPU.seconds, ways)
    return cut + joined < picked


def labelled(factors: Iterable[Factor]) -> list[tuple[Factor, str]]:
    """Factors with names of their own: those of one symbol, as in `[L, L]`, keep their order."""
    out: list[tuple[Factor, str]] = []
    for f in factors:
        out.append((f, f"{f}.{sum(g == f for g, _ in out)}"))
    return out


def _side_by_side(dims: Dims, perm: Sequence[int]) -> tuple[Dims, list[int]]:
    """A shape and an order of its axes, with those that stay side by side as one, where that is a dimension."""
    runs: list[list[int]] = []
    for axis in perm:
        if runs and axis == runs[-1][-1] + 1 and _joins([dims[k] for k in (*runs[-1], axis)]):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    before = sorted(runs)
    joined = tuple(canonical(f for k in run for f in dims[k]) for run in before)
    return joined, [before.index(run) for run in runs]


def _joins(dims: Sequence[Dim]) -> bool:
    """Whether dimensions are one in canonical form."""
    try:
        canonical(f for d in dims for f in d)
    except Unrepresentable:
        return False
    return True
