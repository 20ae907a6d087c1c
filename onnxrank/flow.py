"""The levels of all tensors of a graph: a forward walk that runs nothing and writes nothing.

What an operator does to levels is in the registry. A tensor that cannot be followed is opaque, with the reason: it has
all rows that its shape has, and is the same for all candidates only if that has none.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto

from onnxrank import model as files
from onnxrank import needed, transfers
from onnxrank.extents import Unproved
from onnxrank.facts import Facts, constant_data
from onnxrank.graphs import versions
from onnxrank.intervals import Interval, Intervals
from onnxrank.moves import Movement
from onnxrank.operators import Flow, Operator, Trait, domain_of, find, operator
from onnxrank.transfers import Levels, Made, Transfer, highest, is_uniform, uniform
from onnxrank.values import (
    MAX_ENTRIES,
    Dims,
    Level,
    Unrepresentable,
    canonical,
    extents,
    is_candidate_symbol,
    symbols,
)

_KEPT = 1 << 22
"""Bytes of a constant up to which its entries are kept, once loaded."""
_LARGEST_LIST = 1 << 20
"""Bytes of an initializer of positions up to which it is loaded to see who reads what."""
_INVALID = (Unproved, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What nodes raise whose operands or attributes are none that their operator takes; the runtime says what is wrong."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """What is known of a tensor.

    Attributes:
        name: Its name.
        dims: Its factored shape.
        levels: Level of every entry of a row, in the shape of its constant extents. What is large, or of one level, is
            one entry that is broadcast; what has more than `values.MAX_ENTRIES` entries has one level.
        opaque: Why it could not be followed; None where it was.
    """

    name: str
    dims: Dims
    levels: Levels
    opaque: str | None = None

    @property
    def level(self) -> Level:
        """The highest level of any entry."""
        return Level(highest(self.levels))

    @property
    def present(self) -> set[Level]:
        """The levels that its entries have."""
        if is_uniform(self.levels):
            return {self.level}
        return {Level(int(n)) for n in np.unique(self.levels)}


Given = tuple[Dims, Levels]
"""Factored shape and levels of an input."""

_BY_TRAIT: tuple[tuple[Trait, Transfer], ...] = (
    (Trait.ELEMENTWISE, transfers.elementwise),
    (Trait.IMAGES, transfers.images),
    (Trait.NORMALISATION, transfers.normalised),
    (Trait.REDUCTION, transfers.reduced),
    (Trait.EXTENTS, transfers.extents_only),
)
"""What follows from what an operator is; the first one that holds counts."""


class Walk:
    """Follows levels through a graph, in its order.

    Args:
        model: The model, functions inlined.
        inputs: Factored shapes and levels of its inputs.
        facts: Proved shapes and constants.
        folder: Where its external data lies.
        dtypes: Element types of what nodes make, where known.

    Attributes:
        tensors: Everything that nodes, initializers and callers give, by name.
        zeros: Entries that are 0 for sure, of tensors that have any.
        producers: The node that makes each tensor.
    """

    def __init__(
        self,
        model: ModelProto,
        inputs: Mapping[str, Given],
        facts: Facts,
        folder: str | os.PathLike[str] | None,
        dtypes: Mapping[str, int],
    ) -> None:
        self.facts, self._model, self._folder = facts, model, folder
        self._opsets = versions(model)
        self._stored: dict[str, TensorProto | SparseTensorProto] = {}
        self._loaded: dict[str, NDArray[Any]] = {}
        self._types = {t.name: t.data_type for t in model.graph.initializer}
        self._types |= {i.name: i.type.tensor_type.elem_type for i in model.graph.input} | dict(dtypes)
        self.producers = {o: n for n in model.graph.node for o in n.output if o}
        self.tensors: dict[str, Tensor] = {}
        self.zeros: dict[str, NDArray[np.bool_]] = {}
        self._intervals = Intervals(self)
        self._initializers()
        for name, (dims, levels) in inputs.items():
            self.tensors[name] = Tensor(name, dims, levels)
        for node in model.graph.node:
            self._step(node)

    # --- asking ------------------------------------------------------------------------------------------------------

    @cached_property
    def needs(self) -> dict[str, needed.Needs]:
        """Per tensor that is not read in full, per axis the positions that anybody reads."""
        graph, replaced = self._model.graph, files.overridable(self._model)
        constants = {n: data for n, (_, data) in self.facts.folded.items()}
        for t in graph.initializer:
            if t.data_type == TensorProto.INT64 and t.ByteSize() < _LARGEST_LIST and t.name not in replaced:
                constants[t.name] = constant_data(t, self._folder)
        shapes = {t.name: tuple(t.dims) for t in graph.initializer}
        outputs = [o.name for o in graph.output]
        opset = self._opsets.get("", 1)
        return needed.positions_needed(graph.node, outputs, self.facts, shapes, constants, opset)

    def data_of(self, name: str) -> NDArray[Any] | None:
        """A constant's entries, in the shape of its constant extents; None where they are not known."""
        if name in self._loaded:
            return self._loaded[name]
        if name in self.facts.folded:
            dims, data = self.facts.folded[name]
            return data.reshape(extents(dims))
        stored = self._stored.get(name)
        if stored is None:
            return None
        if isinstance(stored, TensorProto):
            data = constant_data(stored, self._folder)
        else:
            data = files.sparse_data(stored, self._folder)
        if data.nbytes <= _KEPT:
            self._loaded[name] = data
        return data

    def shape_of(self, name: str) -> Dims | None:
        """A tensor's factored shape."""
        found = self.tensors.get(name)
        return None if found is None else found.dims

    def type_of(self, name: str) -> int:
        """A tensor's element type; 0 where it is not known."""
        return int(self._types.get(name, 0))

    def interval(self, name: str) -> Interval:
        """Least and greatest value of every entry, of shapes that broadcast to its constant extents."""
        return self._intervals.of(name)

    def moves_of(self, node: NodeProto) -> list[Movement] | None:
        """What a node moves where; None where it does something else, or that is decided at run time."""
        entry = find(node)
        if entry is None or entry.move is None:
            return None
        try:
            return entry.move(self._flow(node, entry))
        except (Unrepresentable, *_INVALID):
            return None

    # --- walking -----------------------------------------------------------------------------------------------------

    def _initializers(self) -> None:
        """Constants; what callers may replace is the request's."""
        replaced = files.overridable(self._model)
        graph = self._model.graph
        every: list[tuple[str, TensorProto | SparseTensorProto]] = [(t.name, t) for t in graph.initializer]
        every += [(s.values.name, s) for s in graph.sparse_initializer]
        for name, stored in every:
            dims = tuple(canonical([n]) for n in stored.dims)
            level = Level.REQUEST if name in replaced else Level.CONSTANT
            self.tensors[name] = Tensor(name, dims, uniform(level, dims))
            if name not in replaced:
                self._stored[name] = stored

    def _step(self, node: NodeProto) -> None:
        """One node."""
        outputs = [o for o in node.output if o]
        if outputs and all(o in self.facts.folded for o in outputs):
            for o in outputs:
                dims = self.facts.folded[o][0]
                self.tensors[o] = Tensor(o, dims, uniform(Level.CONSTANT, dims))
            return
        made: Sequence[Made] | None = None
        reason = ""
        missing = next((i for i in node.input if i and (i in self.facts.unknown or i not in self.tensors)), None)
        if missing is not None:
            reason = f"it depends on {missing!r}, whose number of dimensions is not proved"
        else:
            try:
                made = self._followed(node)
            except Unrepresentable as e:
                reason = f"the layout is not one that can be followed: {e}"
            except _INVALID as e:
                reason = f"{operator(node)} is not used as it should be ({type(e).__name__}: {e})"
        for k, o in enumerate(node.output):
            if o:
                found = made[k] if made is not None and k < len(made) else None
                self._note(node, o, found, reason)

    def _note(self, node: NodeProto, name: str, made: Made | None, reason: str) -> None:
        """Takes up what was found of a result, if that is what is proved of its shape."""
        proved = self.facts.sizes.get(name)
        if any(n == 0 for n in proved or ()):
            dims = self.facts.dims(name)
            assert dims is not None
            self.tensors[name] = Tensor(name, dims, uniform(Level.CONSTANT, dims))
            return
        if made is not None and proved is not None and tuple(map(self.facts.size_of, made.dims)) != proved:
            made, reason = None, "the layout is not one that can be followed"
        if made is None:
            self._opaque(node, name, reason)
            return
        levels = made.levels
        if levels.size > MAX_ENTRIES and not is_uniform(levels):
            levels = uniform(highest(levels), made.dims)
        if not any(map(is_candidate_symbol, symbols(made.dims))) and highest(levels) > Level.REQUEST:
            levels = np.minimum(levels, np.int8(Level.REQUEST)) if not is_uniform(levels) else uniform(1, made.dims)
        levels = self._unread(name, made.dims, levels)
        if not is_uniform(levels) and (levels == levels.flat[0]).all():
            levels = uniform(int(levels.flat[0]), made.dims)
        self.tensors[name] = Tensor(name, made.dims, levels)
        if made.zeros is not None and made.zeros.any():
            self.zeros[name] = made.zeros

    def _unread(self, name: str, dims: Dims, levels: Levels) -> Levels:
        """Levels without those of entries that nobody reads."""
        needs = self.needs.get(name)
        if not needs or prod(extents(dims)) > MAX_ENTRIES:
            return levels
        out = levels.copy()
        for axis, positions in needs.items():
            left = np.ones(out.shape[axis], bool)
            left[positions] = False
            out[tuple(left if k == axis else slice(None) for k in range(out.ndim))] = Level.UNREAD
        return out

    def _opaque(self, node: NodeProto, name: str, reason: str) -> None:
        """A tensor of which nothing is known but its shape."""
        if not reason:
            entry = find(node)
            what = (
                "is not an operator that is known" if entry is None else "works in a way that cannot be followed here"
            )
            what = "may give something else each time" if entry is not None and entry.random else what
            reason = f"{operator(node)} {what}"
        dims = self.facts.dims(name)
        if dims is None:
            dims = ((f"N~?{name}",),)
            reason = self.facts.unknown.get(name, reason)
        rows = any(map(is_candidate_symbol, symbols(dims)))
        self.tensors[name] = Tensor(name, dims, uniform(Level.CANDIDATE if rows else Level.REQUEST, dims), reason)

    def _followed(self, node: NodeProto) -> Sequence[Made] | None:
        """What the registry says of a node's results."""
        entry = find(node)
        if entry is None or Trait.RANDOM in entry.traits:
            return None
        flow = self._flow(node, entry)
        if entry.levels is not None:
            return entry.levels(flow)
        if entry.move is not None:
            return transfers.moved(flow, entry.move(flow))
        found = next((transfer for trait, transfer in _BY_TRAIT if trait in entry.traits), None)
        return transfers.alone(flow) if found is None else found(flow)

    def _flow(self, node: NodeProto, entry: Operator) -> Flow:
        operands = [self.tensors.get(i) if i else None for i in node.input]

        def level(k: int) -> Levels:
            found = operands[k]
            if found is None:
                raise Unrepresentable(f"nothing is known of input {k}")
            return found.levels

        return Flow(
            node,
            self._opsets.get(domain_of(node), 1),
            (),
            (),
            dims=[None if t is None else t.dims for t in operands],
            facts=self.facts,
            data=lambda k: self._plain(node.input[k]),
            entry=entry,
            level=level,
            zero=lambda k: self.zeros.get(node.input[k]),
            hidden=lambda axis: self._hidden(node, axis),
        )

    def _plain(self, name: str) -> NDArray[Any] | None:
        """A constant's entries if it has no symbolic extents."""
        found = self.tensors.get(name)
        return None if found is None or symbols(found.dims) else self.data_of(name)

    def _hidden(self, node: NodeProto, axis: int) -> NDArray[np.bool_] | None:
        """Candidate-level scores that a mask hides from rows that have others."""
        x = self.tensors[node.input[0]]
        kinds = x.levels == Level.CANDIDATE
        mixed = kinds.any(axis, keepdims=True) & (x.levels <= Level.REQUEST).any(axis, keepdims=True)
        if axis != len(x.dims) - 1 or not mixed.any():
            return None
        hidden, _ = self._intervals.hidden(node.input[0], x.dims, axis)
        if hidden is None:
            return None
        hidden = hidden & kinds & mixed
        return hidden if hidden.any() else None
