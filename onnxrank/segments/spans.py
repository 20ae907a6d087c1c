"""Intervals of entries whose ends are expressions in the position of the entry.

A causal mask compares positions: `j > i` holds for every key j of the candidate, at `L`, and every query i of the
history, because `L - i >= 1` for all `i <= L - 1`. An end may therefore name the position of the entry, `#0` along the
last axis, `#1` along the one before it, and so on, counted from the start of a segment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxrank import extents as ex
from onnxrank.extents import Expr

Size = int | Expr
Bound = int | float | Expr

_GAPS = {int(TensorProto.FLOAT16): 1e4}
"""How far below a visible key a masked one must be; other types have more room (`_GAP`)."""
_GAP = 1e6
_PRECISION = {int(TensorProto.FLOAT16): 2.0**-10, int(TensorProto.BFLOAT16): 2.0**-7, int(TensorProto.DOUBLE): 2.0**-52}
"""Steps of the types at 1; of single precision where there is none."""
_MARGIN = 1e4
"""How many steps of the type, at the size of what is added to scores, a masked key must be below a visible one."""


@dataclass(frozen=True)
class Span:
    """Least and greatest value of some entries; truth is 0 or 1."""

    low: Bound
    high: Bound

    @property
    def number(self) -> float | None:
        """The one value that all entries have; None if they may differ."""
        if isinstance(self.low, Expr) or isinstance(self.high, Expr) or self.low != self.high:
            return None
        return float(self.low)

    @property
    def fixed(self) -> bool:
        """Whether neither end depends on extents or positions."""
        return not isinstance(self.low, Expr) and not isinstance(self.high, Expr)

    def __add__(self, other: Span) -> Span:
        return Span(_difference(self.low, -other.low, -inf), _difference(self.high, -other.high, inf))

    def __neg__(self) -> Span:
        return Span(-self.high, -self.low)

    def times(self, factor: float) -> Span:
        """The entries times a number that is not 0."""
        if isinstance(self.low, Expr) or isinstance(self.high, Expr):
            return ANY
        low, high = self.low * factor, self.high * factor
        return Span(min(low, high), max(low, high))

    def hull(self, other: Span) -> Span:
        """The entries of both."""
        if self == other:
            return self
        if isinstance(self.low, Expr) or isinstance(self.high, Expr):
            return ANY
        if isinstance(other.low, Expr) or isinstance(other.high, Expr):
            return ANY
        return Span(min(self.low, other.low), max(self.high, other.high))

    def both(self, other: Span) -> Span:
        """Truth of a conjunction."""
        return -(-self).either(-other)

    def either(self, other: Span) -> Span:
        """Truth of a disjunction."""
        ends = (self.low, other.low, self.high, other.high)
        low, other_low, high, other_high = (0 if isinstance(e, Expr) else e for e in ends)
        return Span(max(low, other_low), max(high, other_high))

    def inverted(self) -> Span:
        """Truth of the opposite."""
        return Span(1, 1) + -self

    def largest(self, other: Span) -> Span:
        """The larger of two entries, as far as that is known without comparing expressions."""
        if self == other:
            return self
        lows = [s.low for s in (self, other) if not isinstance(s.low, Expr)]
        highs = [inf if isinstance(s.high, Expr) else s.high for s in (self, other)]
        return Span(max(lows, default=-inf), max(highs))

    def smallest(self, other: Span) -> Span:
        """The smaller of two entries."""
        return -(-self).largest(-other)

    def truth(self) -> Span:
        """Whether entries are not 0."""
        if isinstance(self.low, Expr) or isinstance(self.high, Expr):
            return TRUTH
        return Span(int(self.low > 0 or self.high < 0), int(not self.low == self.high == 0))

    def whole(self) -> Span:
        """The entries as whole numbers, where they are that anyway."""
        ends = [e for e in (self.low, self.high) if not isinstance(e, Expr)]
        return self if all(abs(e) != inf and e == int(e) for e in ends) else ANY

    def chosen(self, a: Span, b: Span) -> Span:
        """`a` where this holds, `b` where it does not."""
        return a if self.low == 1 else b if self.high == 0 else a.hull(b)


ANY = Span(-inf, inf)
TRUTH = Span(0, 1)


@dataclass(frozen=True)
class Known:
    """What is known of the entries of a segment.

    Attributes:
        all: What holds of all of them.
        diagonal: What holds of those at the same position along the last two axes.
    """

    all: Span
    diagonal: Span

    def map(self, do: Callable[..., Span], *others: Known) -> Known:
        """Both parts through an operation on spans."""
        return Known(do(self.all, *(o.all for o in others)), do(self.diagonal, *(o.diagonal for o in others)))

    def moved(self, places: Mapping[int, int]) -> Known:
        """The same for entries whose axes went elsewhere.

        Args:
            places: Where each axis went, both counted from the last one.
        """
        names = {f"#{a}": f"#{b}" for a, b in places.items()}
        wide = Span(_renamed(self.all.low, names), _renamed(self.all.high, names))
        if any(places.get(k) != k for k in (0, 1)):
            return Known(wide, wide)
        return Known(wide, Span(_renamed(self.diagonal.low, names), _renamed(self.diagonal.high, names)))

    def anywhere(self) -> Known:
        """What holds of all entries, of which it is not known which are on the diagonal."""
        return Known(self.all, self.all)


def of(span: Span) -> Known:
    """What is known where the place makes no difference."""
    return Known(span, span)


UNKNOWN = of(ANY)
BOOLEAN = of(TRUTH)
ZERO = of(Span(0, 0))


def compared(op: str, a: Known, b: Known, sizes: Sequence[Size]) -> Known:
    """Whether a comparison holds.

    Args:
        op: The operator, `Equal`, `Less`, `GreaterOrEqual` ...
        a: The first operand.
        b: The second one.
        sizes: Extents of the result, the last axis first.
    """
    found = _compared(op, a.all, b.all, sizes, False)
    return Known(found, _compared(op, a.diagonal, b.diagonal, sizes, True) if len(sizes) > 1 else found)


def _compared(op: str, a: Span, b: Span, sizes: Sequence[Size], diagonal: bool) -> Span:
    if op.startswith("Less"):
        return _compared(op.replace("Less", "Greater"), b, a, sizes, diagonal)
    ends = [_difference(a.low, b.high, -inf), _difference(a.high, b.low, inf)]
    if diagonal:
        ends = [_renamed(e, {"#0": "#1"}) for e in ends]
    low, high = least(ends[0], sizes), greatest(ends[1], sizes)
    if op == "Equal":
        return Span(int(low == high == 0), int(low <= 0 <= high))
    if op == "Greater":
        return Span(int(low > 0), int(high > 0))
    return Span(int(low >= 0), int(high >= 0))


def _difference(a: Bound, b: Bound, unknown: float) -> Bound:
    """One end less another; `unknown` where one of them is infinite, or no whole number beside an expression."""
    if not isinstance(a, Expr) and not isinstance(b, Expr):
        return unknown if abs(a) == abs(b) == inf else a - b
    ends = [e if isinstance(e, Expr) else int(e) if abs(e) != inf and e == int(e) else None for e in (a, b)]
    return unknown if ends[0] is None or ends[1] is None else ends[0] - ends[1]


def least(end: Bound, sizes: Sequence[Size]) -> float:
    """The least value of an expression over all positions and all extents.

    Args:
        end: The expression.
        sizes: Extents that positions lie in, the last axis first.
    """
    if not isinstance(end, Expr):
        return end
    found: Size = 0
    for atoms, c in end.terms:
        own = [a for a in atoms if isinstance(a, str) and a.startswith("#")]
        if len(own) > 1 or (own and len(atoms) > 1):
            return -inf
        if own:
            found = found + c * (0 if c > 0 else sizes[int(own[0][1:])] - 1)
        else:
            found = found + (Expr(((atoms, c),)) if atoms else c)
    return ex.bounds(found)[0]


def greatest(end: Bound, sizes: Sequence[Size]) -> float:
    """The greatest value of an expression over all positions and all extents; see `least`."""
    return -least(-end, sizes)


def _renamed(end: Bound, names: Mapping[str, str]) -> Bound:
    """An end with other names for positions."""
    if not isinstance(end, Expr):
        return end
    out: Size = 0
    for atoms, c in end.terms:
        factors = [Expr((((a,), 1),)) if not isinstance(a, str) else ex.symbol(names.get(a, a)) for a in atoms]
        out = out + ex.product([c, *factors])
    return out


def distance(dtype: int) -> tuple[float, float]:
    """How far below a visible key a masked one must be: so much, and that share of what is added to the visible one."""
    return _GAPS.get(dtype, _GAP), _PRECISION.get(dtype, 2.0**-23) * _MARGIN


def hides(dtype: int, masked: Any, visible: Any) -> Any:
    """Whether softmax gives keys no weight at all beside another one of their row.

    Args:
        dtype: Element type of the scores.
        masked: The most that is added to the score of each key, a number or an array.
        visible: The least that is added to that of the other one, which the row sees for sure.

    Returns:
        Truth, of the shape of the arguments.
    """
    least, share = distance(dtype)
    with np.errstate(invalid="ignore"):
        # Where much is added to all keys of a row, scores and smaller gaps are rounded away.
        gap = np.maximum(least, np.abs(visible) * share)
        return (masked == -inf) | (visible - masked >= gap)
