"""`cross`: cross layers stay affine in the candidate on their request-level side.

In a cross layer `y = x0 * (x W + b) + x` the request-level half of `x0` scales products of the candidate. For a fixed
request that half of `y` is an affine function of candidate-level entries, `A C + r`, and so is that of the next layer:
it is never made per candidate. `A` is made once per request, and the next linear map is folded into it
(`rules/fold.py`). Only the candidate-level half of each layer, which multiplies candidates with candidates, is made for
every one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.operators import operator
from onnxrank.rewrite import MOVES, Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    CANDIDATES,
    Abstract,
    AffineProduct,
    Codes,
    Level,
    Multiplicable,
    OpenProduct,
    Source,
    Sum,
    Value,
    canonical,
    codes_of,
    extents,
    offsets,
    source_numbers,
    symbols,
    view,
    with_extents,
)

from .elementwise import elementwise

_THROUGH = frozenset({"Add"})


def last_layer(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """The product of a layer that no other cross layer follows; the first splits as a linear map does."""
    return scaled(rw, node) if _is_last(rw, node.output[0]) else None


def _is_last(rw: Rewrite, name: str) -> bool:
    """Whether no linear map that reads a tensor, behind additions and movement, scales another value."""

    def judge(node: NodeProto, _: str) -> bool | None:
        if operator(node) == "Mul" and rw.computed(node):
            return False
        return None if operator(node) in {"Add", "MatMul", "Gemm", "Concat"} | MOVES else True

    return rw.graph.behind(name, "last layer", judge, lambda _, answers: all(answers))


def scaled(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A pending sum with a product, times a value that is request-level in part."""
    found = _Scaled.of(rw, node)
    affine = found.affine() if found is not None else None
    if found is None or affine is None:
        return None
    if not rw.read_by_linear_maps(node.output[0], _THROUGH):
        rw.refuse("cross", "something other than additions and linear maps reads the result")
        return None
    return [found.made(affine)]


@dataclass(frozen=True)
class _Scaled:
    """A pending sum times a value: a vector per candidate, entry by entry.

    Attributes:
        rw: The rewrite.
        name: The original tensor.
        x: The sum.
        scale: Codes of the value.
        once: Entries where the value is the request's.
        each: Entries where it is the candidate's.
        moving: Candidate-level terms of the sum, at the entries `once`.
        still: Its other terms, there.
    """

    rw: Rewrite
    name: str
    x: Sum
    scale: Codes
    once: NDArray[np.int64]
    each: NDArray[np.int64]
    moving: Sequence[Codes]
    still: Sequence[Codes]

    @classmethod
    def of(cls, rw: Rewrite, node: NodeProto) -> _Scaled | None:
        """What a node multiplies; None where it is not such a product."""
        operands = [rw.operand(node, k) for k in (0, 1)]
        sums = [o for o in operands if isinstance(o, Sum)]
        if len(sums) != 1 or not rw.uses("fold"):
            return None
        (x,) = sums
        (other,) = (o for o in operands if o is not x)
        if other is None or rw.needed.get(node.output[0]):
            return None
        v = rw.settle(other)
        shape = extents(x.dims)
        if v.dims != x.dims or symbols(x.dims) != (CANDIDATES,) or prod(shape) != max(shape) or prod(shape) == 1:
            return None
        scale = v.codes.reshape(-1)
        levels = rw.sources.levels(scale)
        once, each = np.flatnonzero(levels <= Level.REQUEST), np.flatnonzero(levels == Level.CANDIDATE)
        moving: list[Codes] = []
        still: list[Codes] = []
        for t in x.terms:
            own = t.codes.reshape(-1)[once]
            (moving if (rw.sources.levels(own) == Level.CANDIDATE).any() else still).append(own)
        if not moving or not len(each):
            return None
        moving = [rw.grouping.narrowed(t) for t in moving]
        return cls(rw, node.output[0], x, scale, once, each, moving, still)

    def affine(self) -> tuple[Codes, Codes] | None:
        """The terms `moving` as coefficients and candidate-level entries, `[columns, terms]` each, if that is known."""
        found = [_affine(self.rw, t) for t in self.moving]
        factors = [f for f in found if f is not None]
        if len(factors) < len(found):
            return None
        return np.concatenate([f[0] for f in factors], 1), np.concatenate([f[1] for f in factors], 1)

    def made(self, affine: tuple[Codes, Codes]) -> Sum:
        """The product: what stays affine in the candidate, and everything else."""
        shape, plain = extents(self.x.dims), self._plain()
        opened = np.full(len(self.scale), self.rw.zero(self.x.dtype))
        opened[self.once] = codes_of(self._layer(affine)).reshape(-1)
        terms = [view(self.x.dims, self.x.dtype, c.reshape(shape)) for c in (opened, plain)]
        return Sum(self.x.dims, self.x.dtype, terms)

    def _part(self, codes: Codes) -> Value:
        """Some entries as a vector of their own."""
        shape = extents(self.x.dims)
        axis = int(np.argmax(shape))
        dims = with_extents(self.x.dims, [len(codes) if k == axis else 1 for k in range(len(shape))])
        return view(dims, self.x.dtype, codes.reshape(extents(dims)))

    def _plain(self) -> Codes:
        """Products of the request with itself, once per request, and of anything with the candidate's scale."""
        rw, x, zero = self.rw, self.x, self.rw.zero(self.x.dtype)
        out = np.full(len(self.scale), zero)
        lead = self._part(self.scale[self.once])
        fixed = self._part(np.full(len(self.once), zero))
        if self.still:
            fixed = rw.settle(rw.add([self._part(t) for t in self.still], lead.dims, x.dtype))
        request = elementwise(rw, "Mul", [lead, fixed], rw.emit.fresh(f"{self.name}/request"))
        out[self.once] = request.codes.reshape(-1)
        by = self._part(self.scale[self.each])
        terms = [self._part(rw.grouping.narrowed(t.codes.reshape(-1)[self.each])) for t in x.terms]
        whole = rw.settle(rw.add(terms, by.dims, x.dtype))
        candidate = elementwise(rw, "Mul", [by, whole], rw.emit.fresh(f"{self.name}/candidate"))
        out[self.each] = candidate.codes.reshape(-1)
        return out

    def _layer(self, affine: tuple[Codes, Codes]) -> Source:
        """The products of the candidate, scaled by what the request has there, put off."""
        rw, lead, count = self.rw, self._part(self.scale[self.once]), len(self.once)
        products = [s for t in self.moving for s in rw.sources.of(t) if s.level is Level.CANDIDATE]
        followed: list[Multiplicable] = [s.deferred for s in products if isinstance(s.deferred, Multiplicable)]
        whole = all(s.size == count for s in products) and len(followed) == len(products)
        layer = _Layer(rw, lead, [self._part(t) for t in self.moving], affine)
        if whole and all(np.array_equal(offsets(t), np.arange(count)) for t in self.moving):
            layer = _WholeLayer(rw, lead, layer.products, layer.affine, followed)
        return rw.defer(lead.dims, self.x.dtype, layer, None)


@dataclass(eq=False)
class _Layer(OpenProduct):
    """The request-level side of a cross layer: products of the candidate, scaled by what the request has there.

    Attributes:
        rw: The rewrite.
        lead: The scale.
        products: What is scaled: the sum of these.
        affine: The same as coefficients and candidate-level entries, `[columns, terms]` each.
    """

    rw: Rewrite
    lead: Value
    products: Sequence[Value]
    affine: tuple[Codes, Codes]

    def __post_init__(self) -> None:
        self._made = self.rw.once(self._factors)

    def materialise(self) -> str:
        rw = self.rw
        made = rw.settle(rw.add(self.products, self.lead.dims, self.lead.dtype))
        return rw.emit.add("Mul", [rw.tensor(made), rw.tensor(self.lead)])

    def factors(self) -> tuple[Codes, Codes]:
        return self._made()

    def _factors(self) -> tuple[Codes, Codes]:
        rw, scale, (left, right) = self.rw, self.lead.codes.reshape(-1), self.affine
        # Candidate-level entries along the rows: so they lie for the product with the next weights.
        made = []
        for part in np.split(left.T, np.flatnonzero(np.diff(source_numbers(left[0]))) + 1):
            dims = (canonical([len(part)]), canonical([len(scale)]))
            coefficients, _ = rw.layout.realise(part, dims)
            by, _ = rw.layout.realise(scale[None], ((), dims[1]))
            source = rw.sources.add(dims, self.lead.dtype, rw.emit.add("Mul", [coefficients, by]))
            made.append(codes_of(source).reshape(part.shape))
        codes = np.concatenate(made).T.reshape(*extents(self.lead.dims), -1)
        return codes, right.reshape(codes.shape)


@dataclass(eq=False)
class _WholeLayer(_Layer, Multiplicable):
    """The same of whole products, into whose weights scale and another matrix can be multiplied.

    Attributes:
        followed: Those products.
    """

    followed: Sequence[Multiplicable]

    def then_matmul(self, weight: str, width: int) -> list[Source]:
        rw, scale = self.rw, self.lead.codes.reshape(-1, 1)
        by, _ = rw.layout.realise(scale, (canonical([len(scale)]), ()))
        scaled_by = rw.emit.add("Mul", [weight, by])
        return [s for p in self.followed for s in p.then_matmul(scaled_by, width)]


def _affine(rw: Rewrite, codes: Codes) -> tuple[Codes, Codes] | None:
    """Entries of products that are not written yet, as sums of coefficients times candidate-level entries."""
    zero = rw.zero(rw.sources.of(codes)[0].dtype)
    found = [s for s in rw.sources.of(codes) if s.level is Level.CANDIDATE]
    known_products = [(s, p) for s in found if (p := s.offers(AffineProduct))]
    if len(known_products) < len(found):
        return None
    numbers = source_numbers(codes)
    known = np.isin(numbers, [s.number for s in found]) | (codes == zero)
    if not known.all():
        return None
    lefts, rights = [], []
    for s, product in known_products:
        a, b = product.coefficients()
        at = numbers == s.number
        left = np.full((len(codes), a.shape[1]), zero)
        right = np.repeat(b[:1], len(codes), 0)
        left[at], right[at] = a[offsets(codes[at])], b[offsets(codes[at])]
        lefts.append(left)
        rights.append(right)
    return np.concatenate(lefts, 1), np.concatenate(rights, 1)


RULE = Rule(
    name="cross",
    title="Keeps the request-level side of cross layers affine in the candidate, at every depth.",
    identity="u * ([u | x] W + b) + u = x (W_xu diag(u)) + u * (u W_uu + b_u) + u",
    source="rank-aware decomposition (arXiv 2605.27450) for the first layer; onnxrank beyond it",
    legal="The product is scaled by a value that is request-level in part, and only additions and linear maps read it.",
    refuses="Cross layers whose result something other than a linear map reads.",
    exactness="reassociates",
    operators={"Mul": scaled},
    forms=({"Mul": last_layer},),
)
