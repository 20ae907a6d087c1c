"""Einsum in the rule `fc`: linear maps written as index equations."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from onnxrank.graphs import attribute, einsum_terms
from onnxrank.grouping import groups
from onnxrank.rewrite import Rewrite
from onnxrank.values import (
    HOLE,
    Abstract,
    Level,
    Sum,
    Value,
    canonical,
    codes_of,
    cut_repeats,
    extent,
    extents,
    is_candidate_symbol,
    symbols,
    view,
    with_extents,
)
from onnxrank.weights import Weights

from . import dot, stacks
from .attention import reaches_softmax
from .elementwise import elementwise
from .products import linear_last, worthwhile


def einsum(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Einsum of one operand with constants, or of two that are computed."""
    if len(node.input) != 2:
        return None
    terms, out = einsum_terms(attribute(node, "equation"), [rw.values[i].rank for i in node.input])
    for k in (0, 1):
        weight, x = rw.array(node, 1 - k), rw.operand(node, k)
        if weight is None or x is None or not worthwhile(rw, x, None):
            continue
        made = _einsum_linear(rw, rw.unless_sum(x), terms[k], terms[1 - k], out, weight)
        made = made or _einsum_stack(rw, node, k, rw.unless_sum(x), terms[k], terms[1 - k], out)
        if made is not None:
            return [made]
    for k in (0, 1):
        weight, x = rw.array(node, 1 - k), rw.operand(node, k)
        if weight is not None and x is not None and worthwhile(rw, x, None):
            return _einsum_by_rows(rw, node, rw.settle(x), k, terms, out, weight)
    values = [rw.value(node, k) for k in (0, 1)]
    made = _as_matrices(rw, node, values, terms, out) or _as_products(rw, node, values, terms, out)
    if made is not None:
        return [made]
    sizes: dict[str, tuple[Any, ...]] = {}
    for term, v in zip(terms, values, strict=True):
        for c, d in zip(term, v.dims, strict=True):
            if sizes.setdefault(c, d) not in (d, ()):
                return None
            if d != ():
                sizes[c] = d
    if any(c not in out and any(map(is_candidate_symbol, symbols([d]))) for c, d in sizes.items()):
        return None
    summed = symbols(d for c, d in sizes.items() if c not in out)
    values = [rw.held(v, summed) for v in values]
    held = [rw.present(v) for v in values]
    joined = held[0] | held[1]
    full = any(h != joined for h in held)
    dims = tuple(sizes[c] for c in out)
    return rw.keep(node, [rw.rows_along(v, joined) if full else rw.tensor(v) for v in values], [dims], joined)


def _as_matrices(rw: Rewrite, node: NodeProto, values: list[Value], terms: list[str], out: str) -> Abstract | None:
    """Einsum of two computed operands that are not one tensor each, as a stack of matrix products."""
    if all(v.whole is not None for v in values) and rw.level(values[0]) == rw.level(values[1]):
        return None
    first, second = terms
    if any(len(set(t)) != len(t) for t in (*terms, out)) or not set(out) <= set(first + second):
        return None
    stack = [c for c in out if c in first and c in second]
    rows, columns = ([c for c in t if c in out and c not in stack] for t in terms)
    inner = [c for c in first if c in second and c not in out]
    if [len(rows), len(columns), len(inner)] != [1, 1, 1] or len(first) + len(second) != 2 * len(stack) + 4:
        return None

    def turned(v: Value, term: str, letters: list[str]) -> Value:
        order = [term.index(c) for c in letters]
        return rw.tidy(tuple(v.dims[k] for k in order), v.dtype, v.codes.transpose(order))

    a, b = turned(values[0], first, [*stack, *rows, *inner]), turned(values[1], second, [*stack, *inner, *columns])
    order = [[*stack, *rows, *columns].index(c) for c in out]
    unread = {order[k]: at for k, at in rw.needed.get(node.output[0], {}).items()}
    rule = "attention" if reaches_softmax(rw, node.output[0]) else "dot"
    found = dot.multiply(rw, a, b, node.output[0], rule, unread=unread)
    if found is None:
        return None
    made = found[0]
    dims = tuple(made.dims[k] for k in order)
    return rw.moved(made, dims, lambda codes: codes.transpose(order))


def _as_products(rw: Rewrite, node: NodeProto, values: list[Value], terms: list[str], out: str) -> Abstract | None:
    """Einsum that sums over nothing: an elementwise product, of which request x candidate entries may be folded."""
    if all(v.whole is not None for v in values) and rw.level(values[0]) == rw.level(values[1]):
        return None
    if any(len(set(t)) != len(t) for t in (*terms, out)) or set(out) != set(terms[0] + terms[1]):
        return None
    wide = []
    for v, term in zip(values, terms, strict=True):
        order = sorted(range(len(term)), key=lambda k: out.index(term[k]))
        there = iter(order)
        dims = tuple(v.dims[next(there)] if c in term else () for c in out)
        wide.append(view(dims, v.dtype, v.codes.transpose(order).reshape(extents(dims))))
    return elementwise(rw, "Mul", wide, node.output[0])


def _einsum_linear(rw: Rewrite, x: Value | Sum, mine: str, its: str, out: str, weight: NDArray[Any]) -> Abstract | None:
    """Einsum with a constant whose letters are all contracted or all its own: a linear map of the contracted axes."""
    inner = [c for c in mine if c in its and c not in out]
    outer = [c for c in its if c not in mine]
    rows = [c for c in mine if c not in inner]
    if not inner or len(set(mine)) != len(mine) or sorted(inner + outer) != sorted(its):
        return None
    if sorted(out) != sorted(rows + outer) or any(symbols([x.dims[mine.index(c)]]) for c in inner):
        return None
    sizes = dict(zip(its, weight.shape, strict=True))
    joined = canonical([prod(sizes[c] for c in inner)])
    dims = (*(x.dims[mine.index(c)] for c in rows), joined)
    turned = [mine.index(c) for c in (*rows, *inner)]
    terms = [view(dims, t.dtype, t.codes.transpose(turned).reshape(extents(dims))) for t in rw.terms(x)]
    matrix = weight.transpose([its.index(c) for c in (*inner, *outer)]).reshape(extents(dims)[-1], -1)
    operand = terms[0] if len(terms) == 1 else Sum(dims, x.dtype, terms)
    made = linear_last(rw, operand, Weights(np.ascontiguousarray(matrix)), "fc")
    split = (*dims[:-1], *(canonical([sizes[c]]) for c in outer))
    order = [(*rows, *outer).index(c) for c in out]
    result = tuple(split[k] for k in order)
    return rw.moved(made, result, lambda codes: codes.reshape(extents(split)).transpose(order))


def _einsum_stack(
    rw: Rewrite, node: NodeProto, k: int, x: Value | Sum, mine: str, its: str, out: str
) -> Abstract | None:
    """Einsum with a constant of which there is a matrix for every position of some axes of the operand."""
    weight = rw.array(node, 1 - k)
    assert weight is not None
    stack, inner = ([c for c in its if c in mine and (c in out) is kept] for kept in (True, False))
    outer, rows = [c for c in its if c not in mine], [c for c in mine if c not in its]
    if not stack or not inner or len(set(mine)) != len(mine) or sorted(its) != sorted([*stack, *inner, *outer]):
        return None
    if sorted(out) != sorted([*rows, *stack, *outer]):
        return None
    sizes = dict(zip(its, weight.shape, strict=True))
    front = [*rows, *stack]
    own = {c: x.dims[mine.index(c)] for c in mine}
    if any(symbols([own[c]]) or extent(own[c]) not in (sizes[c], 1) for c in (*stack, *inner)):
        return None
    if any(extent(own[c]) != sizes[c] for c in inner):
        return None
    order = [mine.index(c) for c in (*front, *inner)]
    dims = (*(own[c] for c in front), canonical([prod(sizes[c] for c in inner)]))
    turned = rw.moved(x, dims, lambda codes: codes.transpose(order).reshape(extents(dims)))
    axes = [tuple(its.index(c) for c in letters) for letters in (stack, inner, outer)]
    unread = {front.index(out[a]): at for a, at in rw.needed.get(node.output[0], {}).items() if out[a] in front}
    places = range(len(rows), len(front))
    given = stacks.Stack(node, 1 - k, weight.shape, *axes)
    found = stacks.linear(rw, given, turned, len(dims), len(front), places, unread)
    if found is None:
        return None
    split = (*found[0].dims[:-1], *(canonical([sizes[c]]) for c in outer))
    back = [[*front, *outer].index(c) for c in out]
    result = tuple(split[a] for a in back)
    return rw.moved(found[0], result, lambda codes: codes.reshape(extents(split)).transpose(back))


def _einsum_by_rows(
    rw: Rewrite, node: NodeProto, x: Value, k: int, terms: list[str], out: str, weight: NDArray[Any]
) -> list[Abstract] | None:
    """Einsum with constant weights, which may differ by row: rows of each level with their own weights."""
    mine, its = terms[k], terms[1 - k]
    if len(set(mine)) != len(mine) or any(c not in mine + its for c in out):
        return None
    inner = [a for a, c in enumerate(mine) if c not in out]
    if any(map(is_candidate_symbol, symbols([x.dims[a] for a in inner]))):
        return None
    if any(symbols([x.dims[a]]) for a, c in enumerate(mine) if c in its):
        return None
    x = rw.held(x, symbols(x.dims[a] for a in inner))
    sizes = dict(zip(its, (canonical([n]) for n in weight.shape), strict=True)) | dict(zip(mine, x.dims, strict=True))
    levels = rw.sources.levels(x.codes).astype(np.int64)
    levels = np.broadcast_to(levels.max(tuple(inner), keepdims=True), levels.shape)
    dims = tuple(sizes[c] for c in out)
    result = np.full(extents(dims), HOLE)
    for group in groups(levels, x.dims, flat=False):
        part, w = group.take(x.codes), weight
        chosen: dict[str, NDArray[np.int64]] = {}
        if group.index is not ...:
            axis = next(a for a, i in enumerate(group.index) if not isinstance(i, slice))
            chosen = {mine[axis]: group.index[axis]}
            if mine[axis] in its:
                w = np.ascontiguousarray(weight.take(group.index[axis], its.index(mine[axis])))
        # An axis that the weights run along too is not one that results repeat along.
        part = cut_repeats(part, [a for a in range(part.ndim) if a not in inner and mine[a] not in its])
        own = with_extents(group.dims, part.shape)
        name, physical = rw.layout.realise(part, own)
        made = rw.emit.fresh(f"{node.output[0]}/{group.level.name.lower()}")
        operands = [name, rw.emit.constant(w)]
        with rw.emit.under("fc" if group.level is Level.REQUEST else None):
            rw.emit.copy(node, operands if k == 0 else operands[::-1], [made])
        had = dict(zip(its, (canonical([n]) for n in w.shape), strict=True)) | dict(zip(mine, physical, strict=True))
        source = rw.sources.add(tuple(had[c] for c in out), x.dtype, made)
        at = tuple(chosen.get(c, slice(None)) for c in out)
        result[at] = np.broadcast_to(codes_of(source), result[at].shape)
    return [rw.tidy(dims, x.dtype, result)]
