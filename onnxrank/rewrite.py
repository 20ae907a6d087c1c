"""Abstract interpretation of a model that writes the optimised graph as it goes.

Every node's operator has transfer rules (`rules/`). A rule reads the abstract values of the operands and returns those
of the outputs, writing what must be computed through `Rewrite`. What no rule can follow is a barrier: its operands are
brought to the original layout with all rows and the node stays as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, SparseTensorProto, TensorProto, helper

from onnxrank import extents as ex
from onnxrank.emitter import Emitter
from onnxrank.errors import OnnxrankError
from onnxrank.facts import Facts, constant_data
from onnxrank.graphs import captured_by, rename_captured, subgraphs
from onnxrank.layout import Layout
from onnxrank.model import overridable, sparse_data
from onnxrank.operators import operator
from onnxrank.plans import LEAVE, TAKE, Alternative, Choice, Place, Site, label
from onnxrank.uses import Uses
from onnxrank.values import (
    CANDIDATES,
    HOLE,
    Abstract,
    Affine,
    Codes,
    Deferred,
    DeferredMatMul,
    Dim,
    Dims,
    Level,
    Origin,
    Selectable,
    Source,
    Sources,
    Sum,
    Unrepresentable,
    Value,
    broadcast_dims,
    canonical,
    codes_of,
    cut_repeats,
    extended,
    extents,
    is_candidate_symbol,
    keep_symbols,
    offsets,
    rectangles,
    source_numbers,
    split_axis,
    split_merged,
    stream,
    symbols,
    view,
    with_extents,
)

RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that give entries another shape."""
MOVES = RESHAPES | {"Transpose", "Slice", "Identity"}
"""Operators that give some entries of one tensor other places."""
_EXACT = MOVES | {"Constant", "Gather", "Expand"}
_MOVES = MOVES | {"Concat", "Expand"}
_LINEAR = {"MatMul", "Gemm", "Conv", "Einsum"}

_DEEPEST = 32
"""Steps put off on top of each other before they are made: each is made by the one behind it, on Python's stack."""
_MOST_BOXES = 16
_LARGEST = 1 << 20
LARGE = 32
"""Entries per row from which on a tensor is not copied to lie beside others."""

Transfer = Callable[["Rewrite", NodeProto], "list[Abstract] | None"]
T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """A rewrite rule.

    Attributes:
        name: Its name in reports and for `--select` and `--ignore`.
        title: What it does, in a line.
        identity: The identity it uses.
        source: Where the identity comes from.
        legal: When it applies.
        refuses: When it leaves a site alone.
        exactness: `exact` if results are bit-identical, `reassociates` if the order of additions changes.
        operators: Transfer function per operator type (default domain unless written `domain::Op`). A transfer returns
            None to leave the node to the next rule.
        forms: Other transfer functions, each of which is the rule as a whole in another form. Which form is cheapest
            changes with the number of candidates: each is tried where it has other functions for operators that the
            rule takes, and so is leaving the rule out. None for a rule that pays, or does not, site by site.
        cost: What it saves, and what it adds.
        example: Some nodes before and after, a line each.
    """

    name: str
    title: str
    identity: str
    source: str
    legal: str
    refuses: str
    exactness: str
    operators: Mapping[str, Transfer]
    forms: tuple[Mapping[str, Transfer], ...] | None = None
    cost: str = ""
    example: tuple[str, str] = ("", "")

    def alternatives(self, op: str) -> dict[str, Transfer]:
        """The ways in which it may take a node, by the names that plans have for them.

        Args:
            op: The operator, as in `operators`.
        """
        forms = {f"form {k}": form for k, form in enumerate(self.forms or (), 1)}
        return {name: form[op] for name, form in {TAKE: self.operators, **forms}.items() if op in form}


@dataclass(frozen=True)
class Weights:
    """A constant matrix `[K, columns]`, or a stack of those.

    Attributes:
        data: Its entries.
        name: A tensor that holds them, where the model computes them: parts are then taken of that, because the
            entries here are rounded to the model's type.
    """

    data: NDArray[Any]
    name: str | None = None

    def part(self, emit: Emitter, axis: int, index: NDArray[np.int64]) -> Weights:
        """Some of the positions along an axis, as weights of their own."""
        name = None
        if self.name is not None:
            name = emit.add("Gather", [self.name, emit.constant(index.astype(np.int64))], {"axis": axis})
        return Weights(np.ascontiguousarray(self.data.take(index, axis)), name)

    def reshaped(self, emit: Emitter, shape: Sequence[int]) -> Weights:
        """The same entries in a shape."""
        name = self.name
        if name is not None and self.data.shape != tuple(shape):
            name = emit.add("Reshape", [name, emit.constant(np.array(shape, np.int64))])
        return Weights(self.data.reshape(shape), name)

    def tensor(self, emit: Emitter) -> str:
        """Writes all of them."""
        return self.name if self.name is not None else emit.constant(self.data)

    def rows(self, emit: Emitter, index: NDArray[np.int64]) -> str:
        """Writes the rows at some positions, `[*index.shape, columns]`."""
        if self.name is None:
            return emit.constant(np.ascontiguousarray(self.data[index]))
        return emit.add("Gather", [self.name, emit.constant(index.astype(np.int64))], {"axis": 0})


@dataclass(frozen=True)
class Refusal:
    """A remark: a place that was left alone, and why.

    Attributes:
        rule: The rule that looked at it, or could have done something there; `model` for the model as a whole.
        node: The original node; empty where it is not a matter of one.
        op: Its operator.
        reason: Why.
        lost: Multiply-adds per request that are made for every candidate because of it and need be made but once, at
            the expected number of candidates; 0 where there are none, or nothing is known of them.
    """

    rule: str
    node: str
    op: str
    reason: str
    lost: int = 0


class SiteFailed(Exception):
    """What was decided at a site cannot be carried out: the site has to be left alone for the rest to stand.

    Attributes:
        index: The original node, by its place.
        reason: Why, in words for a remark.
        layout: Whether its value cannot be written: then one of the nodes before it may be at fault.
    """

    def __init__(self, index: int, reason: str, layout: bool = False) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason
        self.layout = layout


@dataclass(frozen=True)
class Group:
    """Entries of one level: where they are in the whole (`index`), and their shape."""

    level: Level
    index: Any
    dims: Dims

    def take(self, array: NDArray[Any]) -> NDArray[Any]:
        """The group's part of an array of the whole shape."""
        part: NDArray[Any] = array[self.index].reshape(extents(self.dims))
        return part

    def put(self, whole: NDArray[Any], part: NDArray[Any]) -> None:
        """Writes the group's part, broadcast to its shape, into an array of the whole shape."""
        wide = np.broadcast_to(part, extents(self.dims))
        whole[self.index] = wide.reshape(whole[self.index].shape)


@dataclass
class Rewrite:
    """State of one rewrite.

    Attributes:
        facts: Proved shapes and constants.
        rules: Transfer rules in order of preference.
        emit: The graph being written.
        dtypes: Element type per original tensor, where known.
        candidates: Number of candidates per request that the rewrite should pay at.
        keep_moves: Whether data movement of whole tensors keeps the user's nodes instead of following entries.
        needed: Per original tensor, per axis, the positions anybody reads; absent means all.
        outputs: Names of the graph's outputs.
        choice: Which rules may take which nodes.
        values: What is known of every original tensor.
        refusals: Sites left alone.
        fused: First outputs of fused operators whose steps could be divided by level, if they were written out.
        taken: Per original node, by its place, the rule that took it and by which of its alternatives.
        decided: What rules decided by cost.
    """

    facts: Facts
    rules: Sequence[Rule]
    emit: Emitter
    dtypes: dict[str, int]
    candidates: int = 512
    keep_moves: bool = True
    needed: dict[str, dict[int, NDArray[np.int64]]] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    choice: Choice = field(default_factory=Choice)
    values: dict[str, Abstract] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._settled: dict[int, tuple[Sum, Value]] = {}
        self.fused: list[str] = []
        self.taken: dict[int, tuple[str, str]] = {}
        self.decided: dict[Place, Site] = {}
        self.nodes: Sequence[NodeProto] = ()
        self.graph = Uses()
        self._index_of: dict[str, int] = {}
        self.sources = Sources()
        self.layout = Layout(self.sources, self.emit, self.facts.expressions, self.writing)
        self._claimed: dict[str, None] = {}
        self._depths: dict[str, int] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._made_once: dict[object, Any] = {}
        self._node = NodeProto()
        self._journal = self.sources.journal
        self.emit.watched_by(self._journal)
        self._journal.watch(self._settled, self.decided, self._claimed, self._numbers, self._made_once)

    @property
    def applied(self) -> set[str]:
        """Names of the rules that took a node, whatever became of it."""
        return {rule for rule, _ in self.taken.values()}

    @property
    def break_even(self) -> dict[int, int]:
        """Per original node, by its place, from how many candidates on what is made for it once per request pays."""
        out: dict[int, int] = {}
        for place, site in self.decided.items():
            pays = _break_even(site.alternatives) if site.taken else None
            if pays is not None:
                out[place.index] = max(pays, out.get(place.index, 0))
        return out

    # --- interpretation --------------------------------------------------------------------------------------------

    def interpret(self, nodes: Sequence[NodeProto]) -> None:
        """Runs the transfer rules over all nodes, in order."""
        self.nodes = nodes
        self.graph = Uses(nodes)
        self._index_of = {o: k for k, node in enumerate(nodes) for o in node.output if o}
        self.values.update({name: self._empty(name) for name in self.values if self._is_empty(name)})
        by_op: dict[str, list[tuple[Rule, dict[str, Transfer]]]] = {}
        for rule in self.rules:
            for op in dict.fromkeys(op for form in (rule.operators, *(rule.forms or ())) for op in form):
                by_op.setdefault(op, []).append((rule, rule.alternatives(op)))
        for k, node in enumerate(nodes):
            self.emit.origin, self.emit.hint, self._node = k, next((o for o in node.output if o), node.name), node
            outputs = [o for o in node.output if o]
            if outputs and all(o in self.facts.folded for o in outputs):
                for o in outputs:
                    self.values[o] = self._folded(node, o)
                self._bound_depth(k, node)
                continue
            if outputs and all(self._is_empty(o) for o in outputs):
                self.values.update({o: self._empty(o) for o in outputs})
                continue
            expected = [self.is_constant(o) for o in node.output]
            made = self._made(k, node, by_op.get(operator(node), []))
            for name, value in zip(node.output, made, strict=False):
                if name:
                    self.values[name] = self._empty(name) if self._is_empty(name) else value
            if expected != [self.is_constant(o) for o in node.output]:
                self.graph.forget()
            self._bound_depth(k, node)

    def _bound_depth(self, index: int, node: NodeProto) -> None:
        """Makes a node's results that were put off, if too many steps before them were, too.

        Raises:
            SiteFailed: They cannot be made.
        """
        depth = 1 + max((self._depths.get(i, 0) for i in node.input), default=0)
        for name in node.output:
            value = self.values.get(name)
            if value is None or not (isinstance(value, Sum) or self._put_off(value)):
                continue
            if depth <= _DEEPEST:
                self._depths[name] = depth
                continue
            try:
                made = self.values[name] = self.settle(value) if isinstance(value, Sum) else value
                for source in self._put_off(made):
                    self.layout.name_of(source)
            except Unrepresentable as e:
                raise SiteFailed(index, f"the layout is not one that can be followed: {e}", layout=True) from e

    def _put_off(self, value: Abstract) -> list[Source]:
        """The tensors in a value that are written when somebody asks for them."""
        if isinstance(value, Sum):
            return [s for t in value.terms for s in self._put_off(t)]
        if isinstance(value, Affine):
            return [s for v in (value.base, value.scale) for s in self._put_off(v)]
        found = [value.whole] if value.whole is not None else self.sources.of(value.codes)
        return [s for s in found if s.offers(Deferred) is not None]

    def _made(
        self, index: int, node: NodeProto, rules: Sequence[tuple[Rule, Mapping[str, Transfer]]]
    ) -> list[Abstract]:
        """The outputs of a node by the first rule that may take it and can follow it, or as a barrier."""
        if any(i in self.facts.unknown for i in node.input):
            self.refuse("movement", self._no_rank(node))
            return self.barrier(node)
        repeated = self._repeated(node)
        for rule, forms in rules:
            form = self.choice.at(Place(rule.name, index))
            made = self._tried(rule, forms[form], node, repeated) if form in forms else None
            if made is not None:
                self.taken[index] = (rule.name, form)
                return made
        return self.barrier(node, known=bool(rules))

    def _tried(self, rule: Rule, transfer: Transfer, node: NodeProto, repeated: set[str]) -> list[Abstract] | None:
        """What a rule makes of a node; where it gives up or fails, nothing of what it did is left, and a remark is."""
        self.emit.rule = None
        mark, sources = self._journal.mark(), self.sources.count
        given = {i: self.values[i] for i in node.input if i} if repeated else {}
        made: list[Abstract] | None = None
        try:
            self.values.update({i: self._entire(v, repeated) for i, v in given.items()})
            made = transfer(self, node)
            if made is not None:
                self._confirm(node, made, repeated)
                return [self._entire(v, repeated) for v in made] if repeated else made
        except Unrepresentable as e:
            self.refuse(rule.name, f"the layout is not one that can be followed: {e}")
        except (SiteFailed, OnnxrankError, MemoryError):
            raise
        except Exception as e:
            self.refuse(rule.name, _internal(rule.name, label(node), e))
        finally:
            self.values.update(given)
            self.emit.rule = None
        self._journal.back(mark)
        self.sources.forget(sources)
        return None

    def _repeated(self, node: NodeProto) -> set[str]:
        """Symbols that a tensor which the node reads or makes has more than once, as `[N, N]` has.

        Of such a tensor the domain cannot say that it varies along one of the axes only: it holds both, or neither.
        """
        shapes = [symbols(self.values[i].dims) for i in node.input if i]
        shapes += [tuple(s for _, syms in self.facts.extents.get(o, ()) for s in syms) for o in node.output if o]
        return {s for syms in shapes for s in syms if syms.count(s) > 1}

    def _entire(self, value: Abstract, along: set[str]) -> Abstract:
        """The value as one tensor that has been written, with all its rows along some symbols, if it has any."""
        if not self.keep_moves or along.isdisjoint(symbols(value.dims)):
            return value
        held = self.held(value, along)
        return self.new(held.dims, held.dtype, self.present(held), self.tensor(held))

    def held(self, value: Abstract, along: Iterable[str]) -> Value:
        """The value, in tensors that hold all of its rows along some symbols.

        An operator that works along an axis of symbolic extent counts its entries: a tensor of one entry will not do,
        even where all are equal.

        Args:
            value: The value.
            along: The symbols; those that its shape has not do not matter.

        Raises:
            Unrepresentable: The extent of a symbol cannot be computed.
        """
        made = self.settle(value)
        wanted = set(along) & set(symbols(made.dims))
        if made.whole is not None:
            present = wanted | self.present(made)
            physical = keep_symbols(made.dims, present)
            if made.whole.dims == physical or not self.keep_moves:
                return made
            return self.new(made.dims, made.dtype, present, self.rows_along(made, present))
        if not self.keep_moves or all(wanted <= set(s.symbols) for s in self.sources.of(made.codes)):
            return made
        out = made.codes.copy()
        for group in self.groups(self.sources.levels(out).astype(np.int64), made.dims):
            part = group.take(made.codes)
            physical = keep_symbols(group.dims, wanted | self.sources.symbols(part))
            name, _ = self.layout.realise(part, physical, full=True)
            source = self.sources.add(physical, made.dtype, name, part=self.is_part([part]))
            group.put(out, codes_of(source))
        return self.tidy(made.dims, made.dtype, out)

    def fitted(self, values: Sequence[Value]) -> list[Value]:
        """Operands to be broadcast, with one name for extents that are equal wherever the model runs.

        A table of positions that is cut to `min(L, c)` rows has L of them where it is added to L rows
        (`extents.is_cut_of`).
        """
        rank = max(v.rank for v in values)
        names: dict[int, dict[Dim, Dim]] = {}
        for k in range(rank):
            found = {v.dims[k - rank] for v in values if v.rank >= rank - k} - {()}
            sizes = {d: self.facts.size_of(d) for d in found} if len(found) > 1 else {}
            names[k - rank] = {
                d: whole for d in sizes for whole in sizes if len(whole) == 1 and ex.is_cut_of(sizes[d], sizes[whole])
            }
        return [self._named(v, names) for v in values] if any(names.values()) else list(values)

    def _named(self, value: Value, names: Mapping[int, Mapping[Dim, Dim]]) -> Value:
        """A value with other names for some extents, by axes counted from the last."""
        dims = tuple(names[k - value.rank].get(d, d) for k, d in enumerate(value.dims))
        if dims == value.dims:
            return value
        if value.whole is None:
            raise Unrepresentable("extents of several names in a tensor of several parts")
        held = self.present(value)
        axes = zip(value.dims, dims, strict=True)
        present = {s for d, new in axes if not held.isdisjoint(symbols([d])) for s in symbols([new])}
        return self.new(dims, value.dtype, present, self.layout.name_of(value.whole))

    def _is_empty(self, name: str) -> bool:
        """Whether an original tensor has an axis without entries, whatever the symbols are."""
        value, seen = self.values.get(name), self.facts.extents.get(name, ())
        return any(c == 0 for c, _ in seen) or (value is not None and 0 in extents(value.dims))

    def _empty(self, name: str) -> Value:
        """A tensor without entries: a constant."""
        value, known = self.values.get(name), self.facts.dims(name)
        dims = known if value is None or (known is not None and 0 in extents(known)) else value.dims
        assert dims is not None
        dtype = self.dtype(name, TensorProto.FLOAT if value is None else value.dtype)
        data = np.zeros(extents(dims), self.constant_type(dtype))
        return self.new(dims, dtype, (), load=lambda: data)

    def _confirm(self, node: NodeProto, made: list[Abstract], repeated: set[str]) -> None:
        """Holds the shapes that a rule gives against the proved ones, and against what the domain can tell apart."""
        for name in node.output[len(made) :]:
            if name and (name in self.outputs or self.readers(name)):
                raise Unrepresentable(f"nothing was made of {name}")
        for name, value in zip(node.output, made, strict=False):
            syms = symbols(value.dims)
            twice = {s for s in syms if syms.count(s) > 1}
            if not twice <= repeated or (twice and not (isinstance(value, Value) and value.whole is not None)):
                raise Unrepresentable(f"two axes of extent {min(twice)}")
            seen = self.facts.sizes.get(name) if name else None
            if seen is None:
                continue
            derived = tuple(self.facts.size_of(d) for d in value.dims)
            if derived != seen:
                raise Unrepresentable(f"a rule gives the shape {list(derived)} where {list(seen)} is proved")

    def _no_rank(self, node: NodeProto) -> str:
        """Why a node is left alone that reads a tensor of an unknown number of dimensions."""
        name = next(i for i in node.input if i in self.facts.unknown)
        return f"it reads {name!r}, whose number of dimensions is not proved ({self.facts.unknown[name]})"

    def refuse(self, rule: str, reason: str, lost: int = 0) -> None:
        """Notes why a rule leaves the current node alone, and the multiply-adds per request that this costs."""
        node = self._node
        made = Refusal(rule, label(node), node.op_type, reason, lost)
        if made not in self.refusals[-4:]:
            self.refusals.append(made)

    def barrier(self, node: NodeProto, known: bool = False) -> list[Abstract]:
        """Leaves a node as it is: operands get their original layout, with all rows.

        Args:
            node: The node.
            known: Whether there are rules for its operator, and it is a matter of its operands.
        """
        operands = [self.values[i] for i in node.input if i]
        inner = sorted(c for c in captured_by(node) if c in self.values)
        operands += [self.values[c] for c in inner]
        rows = any(is_candidate_symbol(s) for v in operands for s in symbols(v.dims))
        told = known and bool(self.refusals) and self.refusals[-1].node == label(node)
        if rows and not told and any(Level.REQUEST in self.levels(v) for v in operands):
            self.refuse("broadcast", opaque_reason(operator(node), known))
        dims: list[Dims] = []
        for o in node.output:
            found = self.facts.dims(o) if o else ()
            if found is None:
                found = ((f"{CANDIDATES}~?{o}",),)
            dims.append(found)
        if not self.keep_moves:
            # Entries are only followed, and end here: nothing needs to be written.
            return [self.new(d, self.dtype(o), symbols(d), o) for o, d in zip(node.output, dims, strict=True)]
        names = [self.full(i) if i else "" for i in node.input]
        if inner:
            renamed = NodeProto()
            renamed.CopyFrom(node)
            rename_captured(renamed, {c: self.full(c) for c in inner})
            node = renamed
        return self.keep(node, names, dims, {s for d in dims for s in symbols(d)}, opaque=True)

    # --- reading ---------------------------------------------------------------------------------------------------

    def operand(self, node: NodeProto, k: int) -> Abstract | None:
        """Abstract value of the k-th input; None if it is left out."""
        if k >= len(node.input) or not node.input[k]:
            return None
        return self.values[node.input[k]]

    def value(self, node: NodeProto, k: int) -> Value:
        """The k-th input with any pending sum made."""
        found = self.operand(node, k)
        assert found is not None
        return self.settle(found)

    def array(self, node: NodeProto, k: int) -> NDArray[Any] | None:
        """Data of the k-th input if it is a constant without symbolic extents; its node may come later."""
        name = node.input[k] if k < len(node.input) else ""
        if not self.is_constant(name):
            return None
        found = self.values.get(name)
        if isinstance(found, Value) and found.whole is not None:
            return found.whole.data.reshape(extents(found.dims))
        dims, data = self.facts.folded[name]
        return data.reshape(extents(dims))

    def is_constant(self, name: str) -> bool:
        """Whether an original tensor is a constant without symbolic extents; its node may come later."""
        found = self.values.get(name)
        if found is None:
            return name in self.facts.folded and not symbols(self.facts.folded[name][0])
        if not isinstance(found, Value) or found.whole is None or found.whole.level is not Level.CONSTANT:
            return False
        return not symbols(found.dims)

    def computed(self, node: NodeProto) -> bool:
        """Whether neither of a node's first two operands is a constant."""
        return not any(self.is_constant(i) for i in node.input[:2])

    def weights(self, node: NodeProto, k: int, turned: bool = False) -> Weights | None:
        """The k-th input if it is a constant matrix, transposed if `turned`."""
        data = self.array(node, k)
        if data is None or data.ndim != 2:
            return None
        order = (1, 0) if turned else (0, 1)
        return self.arranged(node, k, data.shape, order, [data.shape[a] for a in order])

    def arranged(
        self, node: NodeProto, k: int, apart: Sequence[int], order: Sequence[int], shape: Sequence[int]
    ) -> Weights:
        """The k-th input, a constant, as weights: of a shape, the axes of that in an order, and of another shape."""
        data = self.array(node, k)
        assert data is not None
        name: str | None = node.input[k]
        while name in self.producers and operator(self.producers[name]) in _EXACT:
            made = self.producers[name]
            name = made.input[0] if made.input else None
        tensor = self.tensor(self.values[node.input[k]]) if name in self.producers else None
        out = Weights(data, tensor).reshaped(self.emit, apart)
        if out.name is not None and list(order) != sorted(order):
            out = Weights(out.data, self.emit.add("Transpose", [out.name], {"perm": list(order)}))
        return Weights(np.ascontiguousarray(out.data.transpose(order)), out.name).reshaped(self.emit, shape)

    def level(self, value: Abstract) -> Level:
        """Highest level of any entry."""
        return max(self.levels(value))

    def levels(self, value: Abstract) -> set[Level]:
        """The levels of its entries; those of its terms or parts where it has not been made."""
        if isinstance(value, Sum):
            return set().union(*(self.levels(t) for t in value.terms))
        if isinstance(value, Affine):
            return self.levels(value.base) | self.levels(value.scale)
        if value.whole is not None:
            return {value.whole.level}
        return {Level(int(n)) for n in np.unique(self.sources.levels(value.codes))}

    def is_open(self, value: Value) -> bool:
        """Whether the value is one tensor that was put off, as a sum of products."""
        return value.whole is not None and value.whole.is_open

    def single_level(self, value: Value) -> bool:
        """Whether all entries have one level."""
        if value.whole is not None:
            return True
        levels = self.sources.levels(value.codes)
        return bool(levels.min() == levels.max())

    def present(self, value: Value) -> set[str]:
        """Symbols along which a value varies."""
        return set(value.whole.symbols) if value.whole is not None else self.sources.symbols(value.codes)

    def tensor(self, value: Abstract, full: bool = False) -> str:
        """A tensor with this value: one row along what it does not vary along, or all rows if `full`."""
        made = self.settle(value)
        if made.whole is not None and (not full or made.whole.dims == made.dims):
            return self.layout.name_of(made.whole)
        if made.whole is not None:
            return self.layout.expand(self.layout.name_of(made.whole), made.whole.dims, made.dims)
        return self.layout.realise(made.codes, made.dims, full)[0]

    def rows_along(self, value: Value, present: Iterable[str]) -> str:
        """A tensor with this value: all rows along some symbols, one row along others."""
        return self.tensor(Value(keep_symbols(value.dims, present), value.dtype, value.whole, value._codes), full=True)

    def full(self, name: str) -> str:
        """A tensor with the value of an original one, with all its rows.

        Raises:
            SiteFailed: It cannot be made, of what was made of the node behind it.
        """
        try:
            return self.tensor(self.values[name], full=True)
        except Unrepresentable as e:
            reason = f"the layout is not one that can be followed: {e}"
            raise SiteFailed(self._index_of.get(name, -1), reason, layout=True) from e

    def read_by_linear_maps(self, name: str, through: frozenset[str] = frozenset()) -> bool:
        """Whether all readers of an original tensor, behind data movement, are products with constant matrices.

        Args:
            name: The tensor.
            through: Further operators that may stand in between.
        """

        def judge(node: NodeProto, _: str) -> bool | None:
            if operator(node) == "Shape" or (operator(node) in _LINEAR and not self.computed(node)):
                return True
            return None if operator(node) in _MOVES | through else False

        def join(tensor: str, answers: list[bool]) -> bool:
            return bool(answers) and tensor not in self.outputs and all(answers)

        return self.graph.behind(name, ("linear", through), judge, join)

    def columns_made(self, width: int) -> int:
        """Of the columns of the current node's product, those that have to be made for every candidate.

        Behind a cross layer's factor the request-level columns stay affine in the candidate (`rules/cross.py`).
        """
        name = self._node.output[0]
        while True:
            found = self.readers(name)
            if len(found) != 1 or operator(found[0]) not in ("Add", "Mul"):
                return width
            (reader,) = found
            other = self.values.get(next((i for i in reader.input if i != name), ""))
            if operator(reader) == "Mul":
                break
            if not isinstance(other, Value) or self.level(other) is not Level.CONSTANT:
                return width
            name = reader.output[0]
        if not isinstance(other, Value) or not self.uses("cross"):
            return width
        if not self.read_by_linear_maps(reader.output[0], frozenset({"Add"})):
            return width
        return int((self.sources.levels(other.codes) == Level.CANDIDATE).sum()) or width

    def uses(self, rule: str) -> bool:
        """Whether a rule is selected, and none that the plan leaves out."""
        return self.choice.uses(rule) and any(r.name == rule for r in self.rules)

    def decide(self, rule: str, alternatives: Sequence[Alternative]) -> str:
        """Decides for one of several ways to write the current node, and notes that in the plan.

        Args:
            rule: The rule that asks.
            alternatives: The ways, with their costs, `leave` for what is done without the rule.

        Returns:
            The name of that which costs least at the expected number of candidates, the first of equals; or of that
            which a plan asks for.
        """
        at = self.emit.origin
        step = sum(p.rule == rule and p.index == at for p in self.decided)
        place = Place(rule, at, step)
        chosen = self.choice.decide(place, alternatives, self.candidates)
        node = self.nodes[at] if at < len(self.nodes) else self._node
        self.decided[place] = Site(place, label(node), node.op_type, tuple(alternatives), chosen)
        return chosen

    @property
    def producers(self) -> dict[str, NodeProto]:
        """The original node that makes each original tensor."""
        return self.graph.producers

    def readers(self, name: str) -> list[NodeProto]:
        """Original nodes that read an original tensor."""
        return self.graph.readers(name)

    def linear_columns(self, name: str) -> int:
        """Columns of all constant weights that a tensor is multiplied with, affine steps in between allowed."""

        def judge(node: NodeProto, tensor: str) -> int | None:
            if operator(node) in ("MatMul", "Gemm") and node.input[0] == tensor:
                weight = self.array(node, 1)
                if weight is None or weight.ndim != 2:
                    return 0
                return int(max(weight.shape) if operator(node) == "Gemm" else weight.shape[1])
            return None if operator(node) in ("Mul", "Add") and not self.computed(node) else 0

        return self.graph.behind(name, "columns", judge, lambda _, answers: sum(answers))

    @staticmethod
    def constant_type(dtype: int) -> np.dtype[Any]:
        """Numpy type of an ONNX element type."""
        return np.dtype(helper.tensor_dtype_to_np_dtype(dtype))

    # --- making ----------------------------------------------------------------------------------------------------

    def claim(self, name: str) -> str | None:
        """The original name, if no new tensor has it yet."""
        if name in self._claimed:
            return None
        self._claimed[name] = None
        return name

    def new(self, dims: Dims, dtype: int, present: Iterable[str], name: str | None = None, **how: Any) -> Value:
        """A value that is one new tensor."""
        source = self.sources.add(keep_symbols(dims, present), dtype, name, **how)
        return Value(dims, dtype, source)

    def declare_initializers(self, model: ModelProto, folder: str | os.PathLike[str] | None) -> None:
        """Gives every initializer its value; data are loaded when asked for.

        What is also listed as an input may be replaced by the caller, and is not a constant (IR version 4 and later;
        before it, all had to be listed).
        """
        listed = overridable(model)
        for t in model.graph.initializer:

            def load(t: TensorProto = t) -> NDArray[Any]:
                return constant_data(t, folder)

            dims = tuple(canonical([n]) for n in t.dims)
            self.values[t.name] = self.new(dims, t.data_type, (), t.name, load=None if t.name in listed else load)
        for s in model.graph.sparse_initializer:

            def dense(s: SparseTensorProto = s) -> NDArray[Any]:
                return sparse_data(s, folder)

            name, dims = s.values.name, tuple(canonical([n]) for n in s.dims)
            self.values[name] = self.new(dims, s.values.data_type, (), name, load=None if name in listed else dense)

    def constant(self, data: NDArray[Any], dims: Dims | None = None) -> Value:
        """A constant value."""
        shape: Dims = tuple((n,) if n != 1 else () for n in data.shape) if dims is None else dims
        return self.new(shape, helper.np_dtype_to_tensor_dtype(data.dtype), (), load=lambda: data)

    def zero(self, dtype: int) -> int:
        """Code of the constant 0."""
        return self._number(0, dtype)

    def one(self, dtype: int) -> int:
        """Code of the constant 1."""
        return self._number(1, dtype)

    def _number(self, value: int, dtype: int) -> int:
        if (value, dtype) not in self._numbers:
            data = np.array(value, self.constant_type(dtype))
            source = self.sources.add((), dtype, load=lambda: data)
            self._numbers[value, dtype] = int(codes_of(source))
        return self._numbers[value, dtype]

    def defer(
        self,
        dims: Dims,
        dtype: int,
        deferred: Deferred,
        rule: str | None,
        *,
        block: bool = False,
        part: bool = False,
    ) -> Source:
        """A tensor that is written when somebody asks for it, for the current node.

        Args:
            dims: Its physical shape.
            dtype: Its element type.
            deferred: How it is written.
            rule: Name of the rule that it is accounted to; None for none.
            block: As of `Source`.
            part: As of `Source`.
        """
        origin = Origin(self.emit.origin, self.emit.hint, rule)
        return self.sources.add(dims, dtype, deferred=deferred, origin=origin, block=block, part=part)

    @contextmanager
    def writing(self, origin: Origin) -> Iterator[None]:
        """Writes what was deferred, where it belongs.

        Raises:
            SiteFailed: It fails where it should have been given up before.
        """
        with self.emit.at(origin):
            try:
                yield
            except (SiteFailed, Unrepresentable, OnnxrankError, MemoryError):
                raise
            except Exception as e:
                owner = self.taken.get(origin.index, (origin.rule or "", TAKE))[0]
                node = self.nodes[origin.index] if origin.index < len(self.nodes) else self._node
                raise SiteFailed(origin.index, _internal(owner, label(node), e)) from e

    def once(self, make: Callable[[], T]) -> Callable[[], T]:
        """A function that does its work when first called, and again where that was undone."""
        key = object()

        def ask() -> T:
            if key not in self._made_once:
                self._made_once[key] = make()
            made: T = self._made_once[key]
            return made

        return ask

    def dtype(self, name: str, default: int = TensorProto.FLOAT) -> int:
        """Element type of an original tensor."""
        return self.dtypes.get(name, default)

    def keep(
        self,
        node: NodeProto,
        inputs: Sequence[str],
        dims: Sequence[Dims],
        present: Iterable[str],
        *,
        opaque: bool = False,
        dtype: int | None = None,
        rule: str = "broadcast",
    ) -> list[Abstract]:
        """Keeps a node, reading the given tensors.

        Args:
            node: The original node.
            inputs: Names of its inputs in the new graph.
            dims: Logical shapes of its outputs.
            present: Symbols along which the outputs vary.
            opaque: Whether nothing is claimed about the outputs.
            dtype: Element type of the outputs where the original graph does not say.
            rule: Name of the rule that it is accounted to where it has fewer rows than before.

        Returns:
            The outputs' values.
        """
        present = set(present)
        lowered = not opaque and any(is_candidate_symbol(s) and s not in present for d in dims for s in symbols(d))
        names = [(self.claim(o) or self.emit.fresh(o)) if o else "" for o in node.output]
        if operator(node) in RESHAPES and inputs:
            operand = self.values.get(node.input[0])
            if isinstance(operand, Value) and operand.whole is not None and operand.whole.name == inputs[0]:
                self.layout.note_reshape(names[0], inputs[0], operand.whole.dims)
        with self.emit.under(rule if lowered else None):
            self.emit.copy(node, inputs, names)
        return [
            self.new(d, self.dtype(o, TensorProto.FLOAT if dtype is None else dtype), present, n)
            for o, n, d in zip(node.output, names, [*dims, *[()] * len(names)], strict=False)
        ]

    def _folded(self, node: NodeProto, name: str) -> Value:
        """A constant: the user's own nodes if these make it from constants, else new data."""
        dims, data = self.facts.folded[name]
        dtype = self.dtype(name, helper.np_dtype_to_tensor_dtype(data.dtype))
        operands = [self.values.get(i) for i in node.input if i]
        own = all(
            isinstance(v, Value) and v.whole is not None and v.whole.level is Level.CONSTANT and v.whole.name != ""
            for v in operands
        )
        written = not symbols(dims) and own and operator(node) not in ("Shape", "Size") and not subgraphs(node)
        rounded = operator(node) in _LINEAR or any(
            isinstance(v, Value) and v.whole is not None and v.whole.rounded for v in operands
        )
        source = self.sources.add(
            keep_symbols(dims, ()),
            dtype,
            load=lambda: data,
            deferred=_OwnNode(self, node, name) if written else None,
            origin=Origin(self.emit.origin, self.emit.hint),
            rounded=written and rounded,
        )
        return Value(dims, dtype, source)

    # --- groups ----------------------------------------------------------------------------------------------------

    def joint_levels(self, arrays: Sequence[Codes]) -> NDArray[np.int64]:
        """How often each entry of an elementwise result must be computed; unread if an operand's entry is."""
        levels = [self.sources.levels(a) for a in arrays]
        unread = np.minimum.reduce(levels) == Level.UNREAD
        return np.where(unread, Level.UNREAD, np.maximum.reduce(levels)).astype(np.int64)

    def groups(self, levels: NDArray[np.int64], dims: Dims, flat: bool = True) -> list[Group]:
        """Divides entries by how often they have to be computed.

        Args:
            levels: Level of every entry, or any larger key whose last two bits are the level.
            dims: Logical shape.
            flat: Whether entries without a common axis may be taken one by one.

        Returns:
            The groups; entries nobody reads are in none.

        Raises:
            Unrepresentable: The levels do not follow an axis and `flat` is false.
        """
        if (levels == levels.flat[0]).all():
            level = _level(levels.flat[0])
            return [] if level is Level.UNREAD else [Group(level, ..., dims)]
        found = split_axis(levels)
        out = []
        boxes = rectangles(levels, _MOST_BOXES) if found is None and flat and levels.size < _LARGEST else None
        if boxes is not None:
            for box in boxes:
                places = np.ix_(*box)
                level = _level(levels[places].flat[0])
                if level is not Level.UNREAD:
                    out.append(Group(level, places, with_extents(dims, levels[places].shape)))
            return out
        if found is not None:
            axis, parts = found
            for at in parts:
                level = _level(levels.take(at[0], axis).flat[0])
                index = tuple(at if k == axis else slice(None) for k in range(levels.ndim))
                if level is not Level.UNREAD:
                    out.append(Group(level, index, with_extents(dims, levels[index].shape)))
            return out
        if not flat:
            raise Unrepresentable("levels that follow no single axis")
        syms = tuple((s,) for s in symbols(dims))
        for key in np.unique(levels):
            if key != Level.UNREAD:
                mask = levels == key
                size = int(mask.sum())
                out.append(Group(_level(key), mask, (*syms, (size,) if size > 1 else ())))
        return out

    def boxes(self, arrays: Sequence[Codes], rows: bool = False) -> list[Any]:
        """Divides entries by the candidate-level tensors they lie in, where those are few and large.

        What is made side by side would have to be copied side by side first.

        Args:
            arrays: Codes of the operands, of one shape.
            rows: Whether the last axis has to stay whole.

        Returns:
            Index of each part; one index of everything where tensors are small, do not follow rows and columns, or are
            not parts, such as embeddings, which a layer joins sooner or later.
        """
        shape = arrays[0].shape
        keys = np.zeros(shape, np.int64)
        for a in arrays:
            candidate = self.sources.levels(a) == Level.CANDIDATE
            found = [s for s in self.sources.of(a) if s.level is Level.CANDIDATE]
            if len(found) > 1 and not all(s.part or s.offers(Selectable) for s in found):
                return [...]
            keys = keys * 1_000_003 + np.where(candidate, source_numbers(a) + 1, 0)
        if (keys == keys.flat[0]).all():
            return [...]
        if rows:
            keys = (keys * np.random.default_rng(0).integers(1, 1 << 30, shape[-1])).sum(-1)
        width = shape[-1] if rows else 1
        boxes = rectangles(keys, _MOST_BOXES)
        if boxes is None or len(boxes) == 1 or any(prod(map(len, box)) * width < LARGE for box in boxes):
            return [...]
        return [(*np.ix_(*box), slice(None)) if rows else np.ix_(*box) for box in boxes]

    def is_part(self, arrays: Iterable[Codes]) -> bool:
        """Whether entries come from tensors that were made apart."""
        return any(s.part for a in arrays for s in self.sources.of(a))

    def memory_order(self, arrays: Sequence[Codes]) -> Orders:
        """Orders of positions in which what lies side by side in a tensor comes together.

        What is joined in this order need not be sorted afterwards, position by position.

        Args:
            arrays: Codes of the operands, of one shape.

        Returns:
            The order per axis, where there is something to gain.
        """
        moving = [a for a in arrays if a.size and (self.sources.levels(a) == Level.CANDIDATE).any()]
        out: Orders = {}
        for axis, n in enumerate(moving[0].shape if moving else ()):
            lines = [np.moveaxis(a, axis, 0).reshape(n, -1)[:, 0] for a in moving]
            order = np.argsort(np.where(lines[0] < 0, np.iinfo(np.int64).max, lines[0]), kind="stable")
            gains = [_breaks(line) - _breaks(line[order]) for line in lines]
            if min(gains) >= 0 and max(gains) > 0:
                out[axis] = order
        return out

    def narrowed(self, codes: Codes) -> Codes:
        """The same entries, of products that have no other columns."""
        out = codes.copy()
        numbers = source_numbers(codes)
        for s in self.sources.of(codes):
            product = s.offers(Selectable)
            if product is None:
                continue
            at = numbers == s.number
            width = extents(s.dims)[-1] if extents(s.dims)[-1] > 1 else s.size
            row, column = np.divmod(offsets(codes[at]), width)
            columns: NDArray[np.int64] = np.unique(column)
            if len(columns) < width:
                cut = codes_of(product.select_columns(columns)).reshape(-1)
                out[at] = cut[row * len(columns) + np.searchsorted(columns, column)]
        return out

    # --- sums ------------------------------------------------------------------------------------------------------

    def add(self, terms: Sequence[Value], dims: Dims, dtype: int) -> Abstract:
        """An addition, made later; where no entry has two terms that are not zero there is none to make."""
        zero = self.zero(dtype)
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
        zero = self.zero(value.dtype)
        # Terms that lack a factor of a merged dimension only broadcast where it stands alone.
        split = split_merged(value.dims)
        arrays = [t.codes.reshape(extents(split)) for t in value.terms]
        keys = self.joint_levels(arrays)
        out = np.full(extents(split), zero)
        out[keys == Level.UNREAD] = HOLE
        if any(s.is_open for a in arrays for s in self.sources.of(a)):
            # Entries with a product that was put off are not mixed with those that have none.
            held = sum(((a != zero).astype(np.int64) << k for k, a in enumerate(arrays)), np.zeros_like(keys))
            apart = np.where(keys < 0, keys, held * 4 + keys)
            keys = apart if split_axis(apart) is not None else keys
        orders = self.memory_order(arrays)
        arrays, keys, out = [permuted(a, orders) for a in arrays], permuted(keys, orders), permuted(out, orders)
        boxes = self.boxes(arrays)
        for box in boxes:
            part, whole = out[box], [a[box] for a in arrays]
            if len(boxes) > 1:
                whole = [self.narrowed(a) for a in whole]
            for group in self.groups(keys[box], with_extents(split, part.shape)):
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
        if rider is not None:
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
        codes = codes_of(self.sources.add(own, dtype, name, part=self.is_part(terms))).reshape(extents(have))
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
        with self.writing(product.origin):
            return product.deferred.materialise(addend, have)

    def tidy(self, dims: Dims, dtype: int, codes: Codes) -> Value:
        """A value from codes; recognised as one whole tensor where it is that."""
        found = self.sources.of(codes)
        if len(found) == 1 and found[0].size == codes.size:
            source = found[0]
            if keep_symbols(dims, source.symbols) == source.dims and np.array_equal(codes, codes_of(source)):
                return Value(dims, dtype, source)
        return view(dims, dtype, codes)


@dataclass(eq=False)
class _OwnNode(Deferred):
    """A constant that the user's own node makes of other constants.

    Attributes:
        rw: The rewrite.
        node: The node.
        output: Which of its outputs.
    """

    rw: Rewrite
    node: NodeProto
    output: str

    def materialise(self) -> str:
        rw = self.rw
        inputs = [rw.tensor(rw.values[i]) if i else "" for i in self.node.input]
        rw.emit.copy(self.node, inputs, [rw.claim(o) or o if o else "" for o in self.node.output])
        for o in self.node.output:
            made = rw.values.get(o)
            if isinstance(made, Value) and made.whole is not None:
                rw.sources.journal.put(made.whole, "name", o)
        return self.output


def opaque_reason(op: str, known: bool) -> str:
    """Why a node runs on all rows that no rule follows.

    Args:
        op: Its operator.
        known: Whether there are rules for that.
    """
    if known:
        return f"no rule can tell that {op} treats the rows of these operands independently, so it runs on all of them"
    return f"{op} is not known to treat rows independently, so it runs on all of them"


def _internal(rule: str, node: str, e: Exception) -> str:
    """A remark on a rule that failed where it should have given up."""
    return f"internal error in rule {rule!r} at node {node!r} ({type(e).__name__}: {e}): please report it"


def _break_even(alternatives: Sequence[Alternative]) -> int | None:
    """From how many candidates on what is done once per request pays; None where that is no question."""
    costs = {a.name: a for a in alternatives}
    made, left = costs.get(TAKE), costs.get(LEAVE)
    if made is None or left is None or None in (made.once, made.each, left.once, left.each):
        return None
    more, saved = (
        made.seconds(0) - left.seconds(0),
        left.seconds(1) - left.seconds(0) - (made.seconds(1) - made.seconds(0)),
    )
    return math.ceil(more / saved) if saved > 0 else None


Orders = dict[int, NDArray[np.int64]]
"""Per axis, an order of its positions."""


def permuted(array: NDArray[Any], orders: Orders) -> NDArray[Any]:
    """An array with its positions in other orders."""
    for axis, order in orders.items():
        array = array.take(order, axis)
    return array


def restored(array: NDArray[Any], orders: Orders) -> NDArray[Any]:
    """An array of which `permuted` changed the orders, as it was."""
    return permuted(array, {axis: np.argsort(order) for axis, order in orders.items()})


def _breaks(line: Codes) -> int:
    """How often a line of codes goes back, or to another source."""
    return int(((np.diff(line) < 0) | (np.diff(source_numbers(line)) != 0)).sum())


def _level(key: Any) -> Level:
    """The level in a key of `Rewrite.groups`."""
    return Level.UNREAD if key == Level.UNREAD else Level(int(key) & 3)


def _ranked(codes: Codes, rank: int) -> Codes:
    """Codes with leading axes of extent 1 up to a rank."""
    return codes.reshape((1,) * (rank - codes.ndim) + codes.shape)
