"""Pending sums and how they are made: group by group, constants and request-level terms first, products last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import prod

import numpy as np

from onnxrank import cost
from onnxrank.emitter import Emitter
from onnxrank.grouping import COLUMNS, Grouping, groups, permuted, restored
from onnxrank.layout import Layout
from onnxrank.values import (
    HOLE,
    Abstract,
    Affine,
    Codes,
    DeferredMatMul,
    Dims,
    Level,
    Origin,
    Source,
    Sources,
    Sum,
    Value,
    broadcast_dims,
    codes_of,
    cut_repeats,
    extended,
    extents,
    is_candidate_symbol,
    keep_symbols,
    offsets,
    split_axis,
    split_merged,
    stream,
    symbols,
    view,
    with_extents,
)


class Sums:
    """The sums of one rewrite: put off by `add`, made by `settle`.

    Attributes:
        sources: The tensors.
        emit: The graph being written.
        layout: Brings terms into one layout.
        grouping: Divides entries.
    """

    def __init__(
        self,
        sources: Sources,
        emit: Emitter,
        layout: Layout,
        zero: Callable[[int], int],
        writing: Callable[[Origin], AbstractContextManager[None]],
    ) -> None:
        """Starts without any.

        Args:
            sources: The tensors.
            emit: The graph being written.
            layout: Brings terms into one layout.
            zero: The code of 0 of an element type.
            writing: Under what is written that was deferred.
        """
        self.sources, self.emit, self.layout = sources, emit, layout
        self.grouping = Grouping(sources, cost.LENGTH)
        self._zero, self._writing = zero, writing
        self._settled: dict[int, tuple[Sum, Value]] = {}
        sources.journal.watch(self._settled)

    def add(self, terms: Sequence[Value], dims: Dims, dtype: int) -> Abstract:
        """An addition, made later; where no entry has two terms that are not zero there is none to make."""
        zero = self._zero(dtype)
        wide = [np.broadcast_to(_ranked(t.codes, len(dims)), extents(dims)) for t in terms]
        nonzero = [w != zero for w in wide]
        if len(wide) == 1 or np.sum(nonzero, axis=0).max() <= 1:
            codes = np.full(extents(dims), zero)
            for w, keep in zip(wide, nonzero, strict=True):
                codes = np.where(keep & (codes == zero), w, codes)
            return view(dims, dtype, codes)
        return Sum(dims, dtype, [view(dims, dtype, w) for w in wide])

    def terms(self, value: Abstract) -> list[Value]:
        """The terms of a pending sum; anything else is its own only term."""
        return value.terms if isinstance(value, Sum) else [self.settle(value)]

    def moved(self, value: Abstract, dims: Dims, move: Callable[[Codes], Codes]) -> Abstract:
        """A value of another shape, with the entries of every term in other places."""
        return self.add([view(dims, t.dtype, move(t.codes)) for t in self.terms(value)], dims, value.dtype)

    def unless_sum(self, value: Abstract) -> Value | Sum:
        """A pending sum as it is; anything else made."""
        return value if isinstance(value, Sum) else self.settle(value)

    def settle(self, value: Abstract) -> Value:
        """Makes a pending sum or normalisation."""
        if isinstance(value, Value):
            return value
        if isinstance(value, Affine):
            return value.whole()
        key = id(value)
        if key not in self._settled:
            self._settled[key] = (value, self._make_sum(value))
        return self._settled[key][1]

    def _make_sum(self, value: Sum) -> Value:
        zero = self._zero(value.dtype)
        # Terms that lack a factor of a merged dimension only broadcast where it stands alone.
        split = split_merged(value.dims)
        arrays = [t.codes.reshape(extents(split)) for t in value.terms]
        keys = self.grouping.joint_levels(arrays)
        out = np.full(extents(split), zero)
        out[keys == Level.UNREAD] = HOLE
        if any(s.is_open for a in arrays for s in self.sources.of(a)):
            # Entries with a product that was put off are not mixed with those that have none.
            held = sum(((a != zero).astype(np.int64) << k for k, a in enumerate(arrays)), np.zeros_like(keys))
            apart = np.where(keys < 0, keys, held * 4 + keys)
            keys = apart if split_axis(apart) is not None else keys
        orders = self.grouping.memory_order(arrays)
        arrays, keys, out = [permuted(a, orders) for a in arrays], permuted(keys, orders), permuted(out, orders)
        boxes = self.grouping.boxes(arrays)
        for box in boxes:
            part, whole = out[box], [a[box] for a in arrays]
            if len(boxes) > 1:
                whole = [self.grouping.narrowed(a, COLUMNS) for a in whole]
            for group in groups(keys[box], with_extents(split, part.shape)):
                terms = [t for t in map(group.take, whole) if (t != zero).any()]
                if len(terms) > 1:
                    terms = [self._added(terms, group.dims, value.dtype)]
                group.put(part, terms[0] if terms else np.array(zero))
            out[box] = part
        out = restored(out, orders)
        return self.tidy(value.dims, value.dtype, out.reshape(extents(value.dims)))

    def _added(self, terms: list[Codes], dims: Dims, dtype: int, turn: bool = True) -> Codes:
        """Adds terms of one group: constants and request-level terms first, products as Gemm chains."""
        keep = extended(dims, {s for t in terms for s in self.sources.symbols(t)})
        shape = tuple(1 if k not in keep else n for k, n in enumerate(extents(dims)))
        dims, terms = tuple(dims[k] for k in keep), [t.reshape([t.shape[k] for k in keep]) for t in terms]
        for t in terms if turn else ():
            # In the layout of a product that is not written yet, so that the rest rides in it.
            small = cut_repeats(t)
            order = self.layout.native_order(small, with_extents(dims, small.shape))
            if order is not None and self.sources.of(small)[0].is_pending:
                turned = self._added([u.transpose(order) for u in terms], tuple(dims[k] for k in order), dtype, False)
                return turned.transpose(np.argsort(order)).reshape(shape)
        parts: list[tuple[Source | None, Codes, Dims]] = []
        for t in terms:
            small = cut_repeats(t)
            held = self.sources.symbols(small)
            physical = keep_symbols(with_extents(dims, small.shape), held)
            (first, *others) = self.sources.of(small)
            whole = (
                not others and first.is_pending and np.array_equal(offsets(small).reshape(-1), np.arange(first.size))
            )
            parts.append((first if whole and stream(first.dims) == stream(physical) else None, small, physical))
        # What varies along least comes first, so that it is added to the least; products take what there is.
        parts.sort(
            key=lambda p: (
                self.sources.levels(p[1]).max(),
                len(symbols(p[2])),
                prod(extents(p[2])),
                p[0] is not None,
            )
        )
        low = sum(self.sources.levels(codes).max() <= Level.REQUEST for _, codes, _ in parts)
        rider = next((k for k, (product, *_) in enumerate(parts) if product is not None and k > low > 0), None)
        if rider is not None and (parts[low][0] is None or all(product for product, *_ in parts[low:rider])):
            # What is the same for all rows rides in a product; added to other entries, it would take a pass over them.
            parts.insert(low, parts.pop(rider))
        name: str | None = None
        have: Dims = ()
        for product, codes, physical in parts:
            if name is None:
                # A product that more will be added to need not be made on its own yet, but the first one must be.
                name, have = self.layout.realise(codes, physical)[0], physical
                continue
            joined = broadcast_dims([have, physical])
            made = self._product_with(product, name, have, physical) if product and joined == physical else None
            name = made or self.emit.add("Add", [self.layout.realise(codes, physical)[0], name])
            have = joined
        assert name is not None
        # In the shape it is made in: what follows may be fused with it.
        name, own = self.layout.unreshaped(name, have)
        codes = codes_of(self.sources.add(own, dtype, name, part=self.grouping.is_part(terms))).reshape(extents(have))
        return np.broadcast_to(codes, extents(dims)).reshape(shape)

    def _product_with(self, product: Source, name: str, have: Dims, physical: Dims) -> str | None:
        """A product with a tensor added to it on the way; both are given in one shape, the product has its own."""
        if product.dims == physical:
            return self._added_to(product, name, have)
        lead = next((k for k, d in enumerate(have) if d != ()), len(have))
        if have == physical:
            have, addend = product.dims, self.layout.reshape(name, have, product.dims)
        elif (
            have[lead:] == physical[lead:]
            and stream(have) == stream(product.dims[-1:])
            and not any(is_candidate_symbol(s) for s in symbols(have))
        ):
            have, addend = product.dims[-1:], self.layout.reshape(name, have, product.dims[-1:])
        else:
            return None
        return self.layout.reshape(self._added_to(product, addend, have), product.dims, physical)

    def _added_to(self, product: Source, addend: str, have: Dims) -> str:
        """A product that is not written yet with a tensor of its shape, or of a broadcast of it, added to it."""
        assert isinstance(product.deferred, DeferredMatMul)
        with self._writing(product.origin):
            return product.deferred.materialise(addend, have)

    def tidy(self, dims: Dims, dtype: int, codes: Codes) -> Value:
        """A value from codes; recognised as one whole tensor where it is that."""
        found = self.sources.of(codes)
        if len(found) == 1 and found[0].size == codes.size:
            source = found[0]
            if keep_symbols(dims, source.symbols) == source.dims and np.array_equal(codes, codes_of(source)):
                return Value(dims, dtype, source)
        return view(dims, dtype, codes)


def _ranked(codes: Codes, rank: int) -> Codes:
    """Codes with leading axes of extent 1 up to a rank."""
    return codes.reshape((1,) * (rank - codes.ndim) + codes.shape)
