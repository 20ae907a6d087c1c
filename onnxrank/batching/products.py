"""What becomes of products when requests lie one behind the other.

Weights that the model holds take all rows at once. What a request gives meets its own candidates only: these are packed
side by side per request, multiplied by a matrix, or a stack of them, per request, and brought back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from onnx import TensorProto, helper

from onnxrank import extents as ex
from onnxrank.batching.site import Rule, Site
from onnxrank.batching.tensors import Count, Impossible, Rows, Size, Tensor
from onnxrank.graphs import attribute


def _product(site: Site) -> list[Tensor]:
    return [matmul(site, site.operand(0), site.operand(1), site.sizes[0], site.node.output[0])]


def matmul(site: Site, a: Tensor, b: Tensor, sizes: tuple[Size, ...], output: str | None = None) -> Tensor:
    """A product of matrices, or of stacks of them.

    Args:
        site: Where.
        a: The left operand.
        b: The right operand.
        sizes: Shape of the result for one request.
        output: A name for it.
    """
    if a.rows is not None and b.rows is not None and a.each != b.each and min(a.rank, b.rank) > 1:
        return _packed(site, a, b, sizes)
    if a.rows is None and b.rows is None:  # of a Gemm whose addend alone is the request's
        return Tensor(site.emit.add("MatMul", [a.name, b.name], hint=output), sizes, None)
    left, right, rows = _operands(site, a, b, sizes)
    return Tensor(site.emit.add("MatMul", [left, right], hint=output), sizes, rows)


def _operands(site: Site, a: Tensor, b: Tensor, sizes: tuple[Size, ...]) -> tuple[str, str, Rows]:
    """Operands of one product for all rows, and where it has them."""
    rank = len(sizes)
    if b.rank < 2 or a.rank < 2:
        if b.rank == 1 and b.rows is None and a.rows is not None and a.rank > 1 and a.place != -1:
            return a.name, b.name, a.rows
        raise Impossible("a product of vectors")
    if b.rows is None:
        name, rows = _beside(site, a, b, -2, rank)
        return name, b.name, rows
    if a.rows is None:
        name, rows = _beside(site, b, a, -1, rank)
        return a.name, name, rows
    if a.each:
        if a.place == b.place <= -3 and (a.rows.outer, a.rows.inner) == (b.rows.outer, b.rows.inner):
            return a.name, b.name, Rows(True, rank + a.place, a.rows.outer, a.rows.inner)
        raise Impossible("candidates meet other candidates")
    fits = [t.place for t in (a, b) if -rank <= t.place <= -3 and sizes[t.place] == 1]
    place = fits[0] if fits else -(rank + 1)
    names = [site.writer.at(t, place, rank) for t in (a, b)]
    return names[0], names[1], Rows(False, max(rank + place, 0), added=not fits)


def _beside(site: Site, moving: Tensor, other: Tensor, side: int, rank: int) -> tuple[str, Rows]:
    """An operand of a product with one that is the same for all requests, and where the result has its rows.

    Args:
        site: Where.
        moving: The operand.
        other: The other one.
        side: The axis of the operand that is not added up over.
        rank: Number of axes of the result.
    """
    place, rows = moving.place, moving.rows
    assert rows is not None
    free = place == side or (place <= -3 and other.size(place) == 1)
    if free and not (rows.added and other.rank > moving.rank):
        return moving.name, replace(rows, axis=max(rank + place, 0))
    if rows.each:
        raise Impossible("it adds up over candidates")
    return site.writer.at(moving, -(rank + 1), rank), Rows(False, 0, added=True)


def _packed(site: Site, a: Tensor, b: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    """A product of candidates with what their request gives: side by side per request, and back."""
    many, once = (a, b) if a.each else (b, a)
    assert many.rows is not None
    place = many.place
    if place == (-1 if many is a else -2):
        raise Impossible("it adds up over candidates")
    if place == -1:
        raise Impossible("candidates are columns")
    stacks = many.rank > 2 or any(n != 1 for n in once.sizes[:-2])
    if many.rows.outer == 1 and not stacks:
        return _packed_matrix(site, many, once, sizes)
    if not many.rows.plain:
        return _packed_apart(site, many, once, sizes, many is a)
    if place <= -3:
        return _packed_stacks(site, many, once, sizes, many is a)
    return _packed_rows(site, many, once, sizes)


def _packed_apart(site: Site, many: Tensor, once: Tensor, sizes: tuple[Size, ...], left: bool) -> Tensor:
    """A product in which an axis holds candidates and other entries: those get axes of their own meanwhile."""
    writer, rows, place = site.writer, many.rows, many.place
    assert rows is not None
    own = [*([rows.outer] if rows.outer != 1 else []), ex.symbol("N"), *([rows.inner] if rows.inner != 1 else [])]
    at, along, k = rows.axis, len(sizes) + place, max(0, once.rank + place)
    before = 0 if rows.outer == 1 else 1
    wide = (*many.sizes[:at], *own, *many.sizes[at + 1 :])
    apart = Tensor("", wide, Rows(True, at + before))
    apart = replace(apart, name=writer.reshape(many.name, apart.shape()))
    lead = (*once.sizes[:k], *(1,) * (len(own) - 1), *once.sizes[k:])
    weights = Tensor(writer.reshape(writer.first(once), [Count(False), *lead]), lead, Rows(False, 0, added=True))
    pair = (apart, weights) if left else (weights, apart)
    product = _packed(site, *pair, (*sizes[:along], *own, *sizes[along + 1 :]))
    out = Tensor("", sizes, Rows(True, along, rows.outer, rows.inner))
    return replace(out, name=writer.reshape(product.name, out.shape()))


def _merging(site: Site, packed: str, weights: str, left: Sequence[Size], columns: Size) -> str:
    """`[requests, most, *left]` times `[requests, left[-1], columns]`: one matrix per request."""
    rows = int(np.prod([n for n in left[:-1] if isinstance(n, int)] or [1]))
    shapes = [site.writer.constant([0, -1, *n]) for n in ((left[-1],), (rows, columns))]
    flat = site.emit.add("Reshape", [packed, shapes[0]])
    return site.emit.add("Reshape", [site.emit.add("MatMul", [flat, weights]), shapes[1]])


def _packed_matrix(
    site: Site, many: Tensor, once: Tensor, sizes: tuple[Size, ...], addend: Tensor | None = None
) -> Tensor:
    """A product of a matrix with a row, or several, per candidate; with a row of the request's added to all of them."""
    writer, rank = site.writer, len(sizes)
    assert many.rows is not None
    inner, depth, columns = many.rows.inner, many.sizes[-1], once.sizes[-1]
    weights = writer.first(once)
    if once.rank > 2:
        weights = writer.reshape(weights, [Count(False), depth, columns])
    lead = many.name if inner == 1 else writer.reshape(many.name, [Count(True), inner, depth])
    packed = writer.packed(lead, [depth] if inner == 1 else [inner, depth])
    if inner == 1:
        product = site.emit.add("MatMul", [packed, weights])
    elif all(isinstance(n, int) for n in (inner, depth, columns)):
        product = _merging(site, packed, weights, [inner, depth], columns)
    else:
        product = site.emit.add("MatMul", [packed, writer.reshape(weights, [Count(False), 1, depth, columns])])
    if addend is not None:
        ones = [1] if inner == 1 else [1, 1]
        row = writer.reshape(writer.first(addend), [Count(False), *ones, columns])
        product = site.emit.add("Add", [product, row])
    taken = writer.unpacked(product, [columns] if inner == 1 else [inner, columns])
    out = Tensor(taken, sizes, Rows(True, rank - 2, 1, inner))
    return out if inner == 1 and rank == 2 else Tensor(writer.reshape(taken, out.shape()), sizes, out.rows)


def _packed_stacks(site: Site, many: Tensor, once: Tensor, sizes: tuple[Size, ...], left: bool) -> Tensor:
    """A product of stacks of matrices, one stack per candidate."""
    writer, rank = site.writer, len(sizes)
    assert many.rows is not None
    place, axis = many.place, many.rows.axis
    if once.size(place) != 1:
        raise Impossible("an operand has other entries for every candidate")
    mine = [n for k, n in enumerate(many.sizes) if k != axis]
    its = [n for k, n in enumerate(once.sizes) if k != once.rank + place]
    lead = writer.transpose(many.name, [axis, *(k for k in range(many.rank) if k != axis)])
    if len(its) > len(mine):
        mine = [*(1,) * (len(its) - len(mine)), *mine]
        lead = writer.reshape(lead, [Count(True), *mine])
    packed = writer.packed(lead, mine)
    rest = [n for k, n in enumerate(sizes) if k != rank + place]
    own = writer.first(once)
    if left and all(n == 1 for n in its[:-2]) and all(isinstance(n, int) for n in (*mine, its[-1])):
        product = _merging(site, packed, writer.reshape(own, [Count(False), *its[-2:]]), mine, its[-1])
        taken = writer.reshape(writer.unpacked(product, [*mine[:-1], its[-1]]), [Count(True), *rest])
    else:
        own = writer.reshape(own, [Count(False), 1, *(1,) * (len(mine) - len(its)), *its])
        product = site.emit.add("MatMul", [packed, own] if left else [own, packed])
        taken = writer.unpacked(product, rest)
    at = rank + place
    return Tensor(writer.transpose(taken, [*range(1, at + 1), 0, *range(at + 1, rank)]), sizes, Rows(True, at))


def _packed_rows(site: Site, many: Tensor, once: Tensor, sizes: tuple[Size, ...]) -> Tensor:
    """A product of matrices with a row per candidate, one of a stack each, with others that the request gives."""
    writer, rank = site.writer, len(sizes)
    assert many.rows is not None
    packed = site.emit.add("Gather", [many.name, writer.requests.pack()], {"axis": many.rows.axis})
    own = writer.first(once)
    if once.rank > 2:
        own = writer.transpose(own, [*range(1, once.rank - 1), 0, once.rank - 1, once.rank])
    product = site.emit.add("MatMul", [packed, own])  # [..., requests, most, columns]
    lead = writer.transpose(product, [rank - 2, rank - 1, *range(rank - 2), rank])
    taken = site.emit.add("GatherND", [lead, writer.requests.unpack()])
    name = writer.transpose(taken, [*range(1, rank - 1), 0, rank - 1])
    return Tensor(name, sizes, Rows(True, rank - 2))


def _gemm(site: Site) -> list[Tensor]:
    node, writer = site.node, site.writer
    a, b, c = site.operand(0), site.operand(1), site.optional(2)
    sizes = site.sizes[0]
    turned = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
    if a.rows is not None and b.rows is None and not turned[0]:
        x = a if a.each else writer.merged(a)
        if x.rows is not None and not x.rows.added and x.rows.axis == 0:
            addend = [] if c is None else _addend(site, x, c)
            if addend is not None:
                return site.same([x.name, b.name, *addend], x.rows)
    a, b = (_turned(site, t) if turn else t for t, turn in zip((a, b), turned, strict=True))
    plain = attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0
    if c is not None and a.each and plain and _rides(a, b, c):
        return [_packed_matrix(site, a, b, sizes, c)]
    product = matmul(site, a, b, sizes)
    product = _times(site, product, attribute(node, "alpha", 1.0))
    if c is None:
        return [product]
    c = _times(site, c, attribute(node, "beta", 1.0))
    names, rows = writer.aligned([product, c], sizes)
    return [Tensor(site.emit.add("Add", names), sizes, rows)]


def _addend(site: Site, x: Tensor, c: Tensor) -> list[str] | None:
    """What is added to every row of a matrix, as the node itself adds it; None where it cannot."""
    assert x.rows is not None
    if c.size(-2) == 1 and c.rows is None:
        return [c.name]
    if c.size(-2) == 1 and not c.each and (x.each or x.rows.plain):
        return [site.writer.spread(c, x, 2) if x.each else site.writer.at(c, -2, 2)]
    return [c.name] if x.each and c.rows == x.rows else None


def _rides(a: Tensor, b: Tensor, c: Tensor) -> bool:
    """Whether an addend that the request gives is added where candidates meet weights that it gives."""
    once = [t.rows is not None and not t.each for t in (b, c)]
    whole = c.rank > 0 and c.sizes[-1] == b.sizes[-1] and c.size(-2) == 1
    return all(once) and whole and a.rows is not None and a.rows.axis == 0 and a.rows.outer == 1


def _turned(site: Site, x: Tensor) -> Tensor:
    """A matrix with its axes the other way round."""
    sizes = x.sizes[::-1]
    if x.rows is None:
        return Tensor(site.writer.transpose(x.name, [1, 0]), sizes)
    if x.rows.added:
        return Tensor(site.writer.transpose(x.name, [0, 2, 1]), sizes, x.rows)
    rows = Rows(x.rows.each, 1 - x.rows.axis, x.rows.outer, x.rows.inner)
    return Tensor(site.writer.transpose(x.name, [1, 0]), sizes, rows)


def _times(site: Site, x: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return x
    kind = helper.tensor_dtype_to_np_dtype(site.types.get(site.node.output[0], TensorProto.FLOAT))
    name = site.emit.add("Mul", [x.name, site.emit.constant(np.array(factor, kind))])
    return Tensor(name, x.sizes, x.rows)


def _einsum(site: Site) -> list[Tensor]:
    equation = attribute(site.node, "equation").decode().replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow or "." in equation:
        raise Impossible("the equation is not written out")
    tensors = site.given
    moving = [(k, t) for k, t in enumerate(tensors) if t.rows is not None]
    if len(moving) == 1 and moving[0][1].rows is not None and not moving[0][1].rows.added:
        k, t = moving[0]
        rows = t.rows
        assert rows is not None
        letter = terms[k][rows.axis]
        elsewhere = any(letter in term for j, term in enumerate(terms) if j != k)
        if letter in result and not elsewhere and terms[k].count(letter) == 1:
            return site.same([x.name for x in tensors], Rows(rows.each, result.index(letter), rows.outer, rows.inner))
    if any(t.each for t in tensors):
        return _einsum_of_candidates(site, terms, result)
    fresh = next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in equation)
    names = [t.name if t.rows is None else site.writer.leading(t).name for t in tensors]
    terms = [term if t.rows is None else fresh + term for term, t in zip(terms, tensors, strict=True)]
    equation = f"{','.join(terms)}->{fresh}{result}"
    return site.same(names, Rows(False, 0, added=True), {"equation": equation})


def _einsum_of_candidates(site: Site, terms: Sequence[str], result: str) -> list[Tensor]:
    """An Einsum in which one letter counts candidates; packed per request where it meets what the request gives."""
    tensors, sizes, writer = site.given, site.sizes[0], site.writer
    found = [(term[t.rows.axis], t.rows) for term, t in zip(terms, tensors, strict=True) if t.rows and t.rows.each]
    letter, rows = found[0]
    apart = all(term.count(letter) == int(t.each) for term, t in zip(terms, tensors, strict=True))
    if not apart or result.count(letter) != 1 or len({(x, r.outer, r.inner) for x, r in found}) > 1:
        raise Impossible("candidates meet other entries")
    at = result.index(letter)
    if all(t.each or t.rows is None for t in tensors):
        return site.same([t.name for t in tensors], Rows(True, at, rows.outer, rows.inner))
    if not rows.plain:
        raise Impossible("candidates lie together with other entries")
    fresh = next(c for c in "abcdefghijklmnopqrstuvwxyz" if c not in "".join([*terms, result]))
    names, packed = [], []
    for term, t in zip(terms, tensors, strict=True):
        if t.each:
            rest = [n for c, n in zip(term, t.sizes, strict=True) if c != letter]
            names.append(writer.packed(writer.first(t), rest))
            packed.append(fresh + letter + term.replace(letter, ""))
        else:
            names.append(t.name if t.rows is None else writer.leading(t).name)
            packed.append(term if t.rows is None else fresh + term)
    equation = f"{','.join(packed)}->{fresh}{letter}{result.replace(letter, '')}"
    product = site.emit.add("Einsum", names, {"equation": equation})
    taken = writer.unpacked(product, [n for k, n in enumerate(sizes) if k != at])
    name = writer.transpose(taken, [*range(1, at + 1), 0, *range(at + 1, len(sizes))])
    return [Tensor(name, sizes, Rows(True, at))]


RULES: dict[str, Rule] = {"MatMul": _product, "Gemm": _gemm, "Einsum": _einsum}
"""By operator."""
