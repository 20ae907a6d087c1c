"""`norm`: normalisations over entries of several levels, folded into the linear map that follows.

LayerNorm couples its axis only through a mean and a variance. With the entries of each level centred on their own mean
(`u~`, `x~`; means `m_u`, `m_x` over `p` and `q` entries, `d = m_u - m_x`), the variance is
`(|u~|^2 + |x~|^2 + p q / (p + q) d^2) / (p + q)` (Chan, Golub, LeVeque 1979: no cancellation), and

    LN(u ++ x) W = (u~ G_u + x~ G_x + d (q 1'G_u - p 1'G_x) / (p + q)) / sigma + beta W,    G = diag(gamma) W

so the request-level product is made once. `d` is one more column of the candidate-level operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank import cost
from onnxrank.graphs import attribute
from onnxrank.grouping import groups
from onnxrank.operators import operator
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    HOLE,
    Abstract,
    Affine,
    Dims,
    Level,
    Value,
    canonical,
    codes_of,
    cut_repeats,
    extents,
    split_axis,
    symbols,
    view,
    with_extents,
)

from .elementwise import is_square, pointwise
from .pieces import Division, Piece
from .rowwise import by_rows, rowwise

_STEPS = 20
"""Operators that a split adds: thirty for means, squares and what rounding leaves, where there were one to ten."""


def normalised(
    rw: Rewrite,
    x: Value,
    node: NodeProto,
    epsilon: float,
    gamma: NDArray[Any] | None = None,
    beta: NDArray[Any] | None = None,
) -> Affine | None:
    """LayerNorm over the last axis, if that has entries of exactly two levels."""
    parts = _two_levels(rw, x)
    if parts is None:
        return None
    first, second = parts
    p, q = len(first.members), len(second.members)
    width, rows = p + q, x.dims[:-1]
    with rw.emit.under("norm"):
        made = _centred(rw, parts, rw.constant_type(x.dtype), epsilon)
    base = np.zeros((*extents(rows), width + 2), np.int64)
    for part, name, physical in zip(parts, made.parts, made.shapes, strict=True):
        codes = codes_of(rw.sources.add(physical, x.dtype, name))
        base[..., part.members] = codes[..., part.columns]
    per_row: Dims = (*made.shapes[1][:-1], ())
    base[..., -2:-1] = codes_of(rw.sources.add(per_row, x.dtype, made.apart))
    base[..., -1:] = codes_of(rw.sources.add(per_row, x.dtype, made.left))

    # Rows for the distance, by which part a column belongs to, and for what is left of the mean.
    balance = np.zeros((2, width))
    balance[0, first.members], balance[0, second.members] = q, -p
    balance[1] = -width
    dims = (*rows, canonical([width + 2]))
    factor = rw.new((*rows, ()), x.dtype, symbols(per_row), made.scale)
    return _Normalised(x.dims, x.dtype, view(dims, x.dtype, base), factor, rw, node, balance, gamma, beta)


def _two_levels(rw: Rewrite, x: Value) -> tuple[Piece, Piece] | None:
    """The request-level and the candidate-level columns of a value; None where it has not exactly those, each once."""
    if symbols(x.dims[-1:]):
        return None
    found = list(Division(rw, "norm").pieces(x.codes, x.dims))
    if len(found) != 2 or any(p.group.index is not Ellipsis or p.codes.shape[-1] != len(p.members) for p in found):
        return None
    first, second = sorted(found, key=lambda p: p.level)
    return (first, second) if (first.level, second.level) == (Level.REQUEST, Level.CANDIDATE) else None


@dataclass(frozen=True)
class _Centred:
    """Two parts of rows, each less its own mean.

    Attributes:
        parts: Their tensors.
        shapes: The shapes of these.
        apart: Mean of the first less that of the second.
        left: What rounding left of the mean of all.
        scale: One over the standard deviation of all.
    """

    parts: list[str]
    shapes: list[Dims]
    apart: str
    left: str
    scale: str


def _centred(rw: Rewrite, parts: Sequence[Piece], kind: np.dtype[Any], epsilon: float) -> _Centred:
    """Writes the two parts of rows, and the moments of both together."""
    add, reduce = rw.emit.add, rw.emit.reduce
    p, q = (len(part.members) for part in parts)
    rank = max(len(part.dims) for part in parts)

    def scalar(v: float) -> str:
        return rw.emit.number(v, kind, rank)

    means, centred, squares, shapes = [], [], [], []
    for part in parts:
        name, physical = rw.layout.realise(part.codes, part.dims)
        axis = len(physical) - 1
        means.append(reduce("ReduceMean", name, [axis], True))
        centred.append(add("Sub", [name, means[-1]]))
        squares.append(reduce("ReduceSumSquare", centred[-1], [axis], True))
        shapes.append(physical)
    # The means are rounded: what is left of them in the centred parts is taken into account.
    rest = [reduce("ReduceMean", c, [len(s) - 1], True) for c, s in zip(centred, shapes, strict=True)]
    apart = add("Sub", means)
    left = add("Add", [add("Mul", [rest[1], scalar(q)]), add("Mul", [rest[0], scalar(p)])])
    left = add("Div", [left, scalar(p + q)])
    inner = [
        add("Sub", [total, add("Mul", [add("Mul", [r, r]), scalar(n)])])
        for total, r, n in zip(squares, rest, (p, q), strict=True)
    ]
    exact = add("Add", [add("Sub", [rest[0], rest[1]]), apart])
    between = add("Div", [add("Mul", [add("Mul", [exact, exact]), scalar(p * q)]), scalar(p + q)])
    total = add("Add", [add("Add", inner[::-1]), between])
    variance = add("Add", [add("Div", [total, scalar(p + q)]), scalar(epsilon)])
    return _Centred(centred, shapes, apart, left, add("Reciprocal", [add("Sqrt", [variance])]))


@dataclass(eq=False)
class _Kept(Affine):
    """A value kept apart from its normalisation, behind some of the model's nodes.

    Attributes:
        rw: The rewrite.
        node: The last of those nodes.
    """

    rw: Rewrite
    node: NodeProto

    def __post_init__(self) -> None:
        self._whole = self.rw.once(self._make)

    def whole(self) -> Value:
        return self._whole()

    def _make(self) -> Value:
        over_last = operator(self.node) == "LayerNormalization"
        made = rowwise(self.rw, self.node, [self.rank - 1]) if over_last else pointwise(self.rw, self.node)
        assert made is not None
        return self.rw.settle(made[0])


@dataclass(eq=False)
class _Normalised(_Kept):
    """What a LayerNorm gives, of parts that are centred on their own.

    Attributes:
        balance: Rows for the distance between the means, and for what rounding left of the mean, times the width.
        gamma: Factor per column; None for none.
        beta: Summand per column; None for none.
    """

    balance: NDArray[Any]
    gamma: NDArray[Any] | None
    beta: NDArray[Any] | None

    def fold(self, weight: str) -> tuple[str, str | None]:
        """Nodes of constants, which the runtime folds when it loads the model: nothing is rounded here."""
        add, kind = self.rw.emit.add, self.rw.constant_type(self.dtype)

        def constant(v: NDArray[Any]) -> str:
            return self.rw.emit.constant(np.ascontiguousarray(v, kind))

        scaled = weight if self.gamma is None else add("Mul", [constant(self.gamma[:, None]), weight])
        width = self.rw.emit.constant(np.array(self.balance.shape[1], kind))
        rows = add("Div", [add("MatMul", [constant(self.balance), scaled]), width])
        shift = None if self.beta is None else add("MatMul", [constant(self.beta), weight])
        return add("Concat", [scaled, rows], {"axis": 0}), shift


@dataclass(eq=False)
class _Stepped(_Kept):
    """The same behind a factor or a summand per column.

    Attributes:
        before: What it is applied to.
        vector: The factors or summands.
    """

    before: Affine
    vector: NDArray[Any]

    def fold(self, weight: str) -> tuple[str, str | None]:
        """Nodes of constants, as above."""
        add, constant = self.rw.emit.add, self.rw.emit.constant
        if operator(self.node) == "Mul":
            return self.before.fold(add("Mul", [constant(self.vector[:, None]), weight]))
        folded, shift = self.before.fold(weight)
        mine = add("MatMul", [constant(self.vector), weight])
        return folded, mine if shift is None else add("Add", [shift, mine])


def worth_splitting(rw: Rewrite, x: Value, node: NodeProto) -> bool:
    """Whether linear maps read the result, and the request-level part of them outweighs the extra steps.

    Nearly all of these work on `[N, 1]` or on one row, so that what they take is to be launched.
    """
    lines = rw.sources.levels(x.codes).reshape(-1, extents(x.dims)[-1])
    if not ((lines == Level.CANDIDATE).any(-1) & (lines == Level.REQUEST).any(-1)).any():
        return False  # every row is of one level: there is nothing to split
    once = int((lines[0] <= Level.REQUEST).sum())
    columns = rw.linear_columns(node.output[0])
    if not columns:
        rw.refuse("norm", "something other than linear maps with constant weights reads the result")
        return False
    steps = cost.estimate(launches=_STEPS)
    if rw.pays("norm", steps, 0, cost.estimate(once * columns)):
        return True
    reason = (
        f"the linear maps behind it would save too little: the {_STEPS} steps that a split adds take as long as "
        f"{steps / cost.estimate(1):.0f} MACs per request"
    )
    rw.refuse("norm", reason, once * columns * rw.candidates)
    return False


def layer_norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """The LayerNormalization operator over a mixed last axis."""
    x = rw.value(node, 0)
    gamma, beta = rw.array(node, 1), rw.array(node, 2)
    last = attribute(node, "axis", -1) % x.rank == x.rank - 1
    if x.whole is not None or rw.single_level(x) or not last or gamma is None or len([o for o in node.output if o]) > 1:
        return None
    if (beta is None and len(node.input) > 2 and node.input[2]) or by_rows(rw, node, 1):
        return None
    if not worth_splitting(rw, x, node):
        return None

    width = extents(x.dims)[-1]
    gamma = np.broadcast_to(gamma.reshape(-1), (width,))
    beta = None if beta is None else np.broadcast_to(beta.reshape(-1), (width,))
    made = normalised(rw, x, node, attribute(node, "epsilon", 1e-5), gamma, beta)
    return None if made is None else [made]


def divided(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """The last division of a LayerNorm that the exporter wrote out: `(x - mean) / sqrt(var + eps)`."""
    found = _written_out(rw, node)
    if found is None:
        return None
    x, epsilon = found
    if x.whole is not None or rw.single_level(x) or not worth_splitting(rw, x, node):
        return None
    made = normalised(rw, x, node, epsilon)
    return None if made is None else [made]


def _written_out(rw: Rewrite, node: NodeProto) -> tuple[Value, float] | None:
    """Recognises ReduceMean, Sub, Pow or Mul, ReduceMean, Add, Sqrt, Div over the last axis."""

    def made_by(name: str, op: str) -> NodeProto | None:
        n = rw.producers.get(name)
        return n if n is not None and operator(n) == op else None

    def mean_of(name: str) -> str | None:
        n = made_by(name, "ReduceMean")
        if n is None or not attribute(n, "keepdims", 1):
            return None
        axes = attribute(n, "axes")
        if axes is None:
            given = rw.array(n, 1)
            axes = None if given is None else given.tolist()
        rank = rw.values[n.input[0]].rank
        return n.input[0] if axes is not None and [a % rank for a in axes] == [rank - 1] else None

    sub, root = made_by(node.input[0], "Sub"), made_by(node.input[1], "Sqrt")
    if sub is None or root is None or mean_of(sub.input[1]) != sub.input[0]:
        return None
    plus = made_by(root.input[0], "Add")
    if plus is None:
        return None
    for k in (0, 1):
        eps, square = rw.array(plus, k), mean_of(plus.input[1 - k])
        power = rw.producers.get(square) if square else None
        if eps is None or eps.size != 1 or power is None or power.input[0] != sub.output[0]:
            continue
        if is_square(rw, power):
            return rw.value(sub, 0), float(eps.reshape(-1)[0])
    return None


def affine_step(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """`* gamma` and `+ beta` behind a normalisation that was kept apart."""
    for k in (0, 1):
        x, data = rw.operand(node, k), rw.array(node, 1 - k)
        if isinstance(x, Affine) and data is not None and data.size in (1, data.shape[-1:] and data.shape[-1]):
            width = extents(x.dims)[-1]
            if data.size in (1, width):
                vector = np.ascontiguousarray(np.broadcast_to(data.reshape(-1), (width,)))
                return [_Stepped(x.dims, x.dtype, x.base, x.scale, rw, node, x, vector)]
    return None


def batch_norm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """BatchNormalization in inference: each level's channels alone, with their part of the parameters."""
    x = rw.value(node, 0)
    params = [rw.array(node, k) for k in range(1, 5)]
    if (
        rw.single_level(x)
        or x.rank < 2
        or attribute(node, "training_mode", 0)
        or len([o for o in node.output if o]) > 1
    ):
        return None
    codes = x.codes
    levels = rw.sources.levels(codes).astype(np.int64)
    found = split_axis(levels)
    if found is None or found[0] != 1 or any(p is None for p in params):
        return None
    out = np.full(codes.shape, HOLE)
    for group in groups(levels, x.dims, flat=False):
        part, at = group.take(codes), group.index[1]
        part = cut_repeats(part, [k for k in range(part.ndim) if k != 1])
        name, physical = rw.layout.realise(part, with_extents(group.dims, part.shape))
        own = [rw.emit.constant(np.ascontiguousarray(p[at])) for p in params if p is not None]
        made = rw.emit.fresh(f"{node.output[0]}/{group.level.name.lower()}")
        with rw.emit.under("norm" if group.level is Level.REQUEST else None):
            rw.emit.copy(node, [name, *own], [made])
        group.put(out, codes_of(rw.sources.add(physical, x.dtype, made)))
    return [rw.tidy(x.dims, x.dtype, out)]


RULE = Rule(
    name="norm",
    title="Splits BatchNorm by channels and LayerNorm by partial moments, folding its tail into the next linear map.",
    identity="LN(u ++ x) W = (u~ G_u + x~ G_x + d (q 1'G_u - p 1'G_x) / (p + q)) / sigma + beta W",
    source="MaRI (arXiv 2602.23105); moments by Chan, Golub, LeVeque (1979)",
    legal="The normalised axis is the last one and holds one request-level and one candidate-level part.",
    refuses="Normalisations that no linear map follows, or of parts too small to pay for the extra steps.",
    exactness="reassociates",
    operators={
        "LayerNormalization": layer_norm,
        "Div": divided,
        "Mul": affine_step,
        "Add": affine_step,
        "BatchNormalization": batch_norm,
    },
)
