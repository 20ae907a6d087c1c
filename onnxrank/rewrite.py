"""The state of one rewrite, and what rules may ask of it: operands, weights, levels, readers, writing of tensors."""

from __future__ import annotations

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
from onnxrank.decisions import Decisions
from onnxrank.emitter import Emitter
from onnxrank.errors import OnnxrankError
from onnxrank.facts import Facts, constant_data
from onnxrank.grouping import groups
from onnxrank.layout import Layout
from onnxrank.model import overridable, sparse_data
from onnxrank.operators import Trait, having, operator, traits
from onnxrank.plans import TAKE, Alternative, Choice, label
from onnxrank.rule import Refusal, Rule, SiteFailed, internal_error
from onnxrank.sums import Sums
from onnxrank.uses import Uses
from onnxrank.values import (
    Abstract,
    Affine,
    Codes,
    Deferred,
    Dim,
    Dims,
    Level,
    Origin,
    Source,
    Sources,
    Sum,
    Unrepresentable,
    Value,
    canonical,
    codes_of,
    extents,
    is_candidate_symbol,
    keep_symbols,
    symbols,
)
from onnxrank.weights import Weights

MOVES = frozenset(having(Trait.ONCE))
"""Operators that give some entries of one tensor other places."""
_EXACT = MOVES | {*having(Trait.FREE), "Gather", "Expand"}
_MOVES = MOVES | {"Concat", "Expand"}


T = TypeVar("T")
Operand = TypeVar("Operand", Value, Value | Sum)


@dataclass
class Rewrite:
    """State of one rewrite.

    Attributes:
        facts: Proved shapes and constants.
        rules: Transfer rules in order of preference.
        emit: The graph being written.
        dtypes: Element type per original tensor, where known.
        candidates: Number of candidates per request that the rewrite should pay at.
        needed: Per original tensor, per axis, the positions anybody reads; absent means all.
        outputs: Names of the graph's outputs.
        choice: Which rules may take which nodes.
        values: What is known of every original tensor.
        refusals: Sites left alone.
        fused: First outputs of fused operators whose steps could be divided by level, if they were written out.
        taken: Per original node, by its place, the rule that took it and by which of its alternatives.
        decisions: What rules decided by cost.
        node: The original node that is looked at.
        sums: How sums are put off and made.
        grouping: How entries are divided.
    """

    facts: Facts
    rules: Sequence[Rule]
    emit: Emitter
    dtypes: dict[str, int]
    candidates: int = 512
    needed: dict[str, dict[int, NDArray[np.int64]]] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    choice: Choice = field(default_factory=Choice)
    values: dict[str, Abstract] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.fused: list[str] = []
        self.taken: dict[int, tuple[str, str]] = {}
        self.nodes: Sequence[NodeProto] = ()
        self.graph = Uses()
        self.index_of: dict[str, int] = {}
        self.sources = Sources()
        self.layout = Layout(self.sources, self.emit, self.facts.expressions, self.writing)
        self._claimed: dict[str, None] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._made_once: dict[object, Any] = {}
        self.node = NodeProto()
        journal = self.sources.journal
        self.emit.watched_by(journal)
        journal.watch(self._claimed, self._numbers, self._made_once)
        self.decisions = Decisions(self.rules, self.choice, self.candidates, self._at, journal)
        self.sums = Sums(self.sources, self.emit, self.layout, self.zero, self.writing)
        self.grouping = self.sums.grouping

    @property
    def applied(self) -> set[str]:
        """Names of the rules that took a node, whatever became of it."""
        return {rule for rule, _ in self.taken.values()}

    # --- reading ---------------------------------------------------------------------------------------------------

    def entire(self, value: Abstract, along: set[str]) -> Abstract:
        """The value as one tensor that has been written, with all its rows along some symbols, if it has any."""
        if along.isdisjoint(symbols(value.dims)):
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
            if made.whole.dims == physical:
                return made
            return self.new(made.dims, made.dtype, present, self.rows_along(made, present))
        if all(wanted <= set(s.symbols) for s in self.sources.of(made.codes)):
            return made
        out = made.codes.copy()
        for group in groups(self.sources.levels(out).astype(np.int64), made.dims):
            part = group.take(made.codes)
            physical = keep_symbols(group.dims, wanted | self.sources.symbols(part))
            name, _ = self.layout.realise(part, physical, full=True)
            source = self.sources.add(physical, made.dtype, name, part=self.grouping.is_part([part]))
            group.put(out, codes_of(source))
        return self.tidy(made.dims, made.dtype, out)

    def fitted(self, values: Sequence[Operand]) -> list[Operand]:
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

    def _named(self, operand: Operand, names: Mapping[int, Mapping[Dim, Dim]]) -> Operand | Value:
        """A value with other names for some extents, by axes counted from the last."""
        dims = tuple(names[k - operand.rank].get(d, d) for k, d in enumerate(operand.dims))
        if dims == operand.dims:
            return operand
        value = self.settle(operand)
        if value.whole is None:
            raise Unrepresentable("extents of several names in a tensor of several parts")
        held = self.present(value)
        axes = zip(value.dims, dims, strict=True)
        present = {s for d, new in axes if not held.isdisjoint(symbols([d])) for s in symbols([new])}
        return self.new(dims, value.dtype, present, self.layout.name_of(value.whole))

    def refuse(self, rule: str, reason: str, lost: int = 0) -> None:
        """Notes why a rule leaves the current node alone, and the multiply-adds per request that this costs."""
        node = self.node
        made = Refusal(rule, label(node), node.op_type, reason, lost)
        if made not in self.refusals[-4:]:
            self.refusals.append(made)

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

    def stored(self, name: str, most: int) -> NDArray[Any] | None:
        """Entries of a constant of the original or of the new graph, one row of those that are equal along symbols.

        None for other tensors, and where they are many.

        Args:
            name: The tensor.
            most: How many entries are not too many.
        """
        if name in self.facts.folded:
            folded: NDArray[Any] = self.facts.folded[name][1]
            return folded if folded.size <= most else None
        made, value = self.emit.initializers.get(name), self.values.get(name)
        if made is not None:
            return constant_data(made, None) if prod(made.dims) <= most else None
        source = value.whole if isinstance(value, Value) else None
        if source is None or source.level is not Level.CONSTANT or source.size > most:
            return None
        return source.data

    def number(self, name: str) -> NDArray[Any] | None:
        """The entry of a stored constant that has one; None for other tensors.

        What nodes make of constants is not stored.
        """
        data, (dims, _) = self.stored(name, 1), self.facts.folded.get(name, ((), None))
        return None if data is None or data.size != 1 or symbols(dims) or self.is_computed(name) else data

    def is_computed(self, name: str) -> bool:
        """Whether a node computes a tensor: in float64 what it makes of constants has more digits than its data."""
        return self.emit.op_of.get(name, "Constant") != "Constant"

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
            raise SiteFailed(self.index_of.get(name, -1), reason, layout=True) from e

    def read_by_linear_maps(self, name: str, through: frozenset[str] = frozenset()) -> bool:
        """Whether all readers of an original tensor, behind data movement, are products with constant matrices.

        Args:
            name: The tensor.
            through: Further operators that may stand in between.
        """

        def judge(node: NodeProto, _: str) -> bool | None:
            if operator(node) == "Shape" or (Trait.LINEAR in traits(node) and not self.computed(node)):
                return True
            return None if operator(node) in _MOVES | through else False

        def join(tensor: str, answers: list[bool]) -> bool:
            return bool(answers) and tensor not in self.outputs and all(answers)

        return self.graph.behind(name, ("linear", through), judge, join)

    def uses(self, rule: str) -> bool:
        """Whether a rule is selected, and none that the plan leaves out."""
        return self.decisions.uses(rule)

    def pays(self, rule: str, once: float, each: float, left: float) -> bool:
        """Decides whether a rule takes the current node at all, and notes that in the plan.

        Args:
            rule: The rule that asks.
            once: Seconds per request of what it would make.
            each: The same per candidate.
            left: Seconds per candidate of what is done without it.
        """
        return self.decisions.pays(rule, self.emit.origin, once, each, left)

    def decide(self, rule: str, alternatives: Sequence[Alternative]) -> str:
        """Decides for one of several ways to write the current node, and notes that in the plan.

        Args:
            rule: The rule that asks.
            alternatives: The ways, with their costs, `leave` for what is done without the rule.

        Returns:
            The name of that which costs least at the expected number of candidates, the first of equals; or of that
            which a plan asks for.
        """
        return self.decisions.decide(rule, self.emit.origin, alternatives)

    def _at(self, index: int) -> NodeProto:
        """An original node by its place; the current one where that is none."""
        return self.nodes[index] if index < len(self.nodes) else self.node

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
                raise SiteFailed(origin.index, internal_error(owner, label(self._at(origin.index)), e)) from e

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
        if Trait.RESHAPE in traits(node) and inputs:
            operand = self.values.get(node.input[0])
            if isinstance(operand, Value) and operand.whole is not None and operand.whole.name == inputs[0]:
                self.layout.note_reshape(names[0], inputs[0], operand.whole.dims)
        with self.emit.under(rule if lowered else None):
            self.emit.copy(node, inputs, names)
        return [
            self.new(d, self.dtype(o, TensorProto.FLOAT if dtype is None else dtype), present, n)
            for o, n, d in zip(node.output, names, [*dims, *[()] * len(names)], strict=False)
        ]

    # --- sums ------------------------------------------------------------------------------------------------------

    def add(self, terms: Sequence[Value], dims: Dims, dtype: int) -> Abstract:
        """An addition, made later; where no entry has two terms that are not zero there is none to make."""
        return self.sums.add(terms, dims, dtype)

    def terms(self, value: Abstract) -> list[Value]:
        """The terms of a pending sum; anything else is its own only term."""
        return self.sums.terms(value)

    def moved(self, value: Abstract, dims: Dims, move: Callable[[Codes], Codes]) -> Abstract:
        """A value of another shape, with the entries of every term in other places."""
        return self.sums.moved(value, dims, move)

    def unless_sum(self, value: Abstract) -> Value | Sum:
        """A pending sum as it is; anything else made."""
        return self.sums.unless_sum(value)

    def settle(self, value: Abstract) -> Value:
        """Makes a pending sum or normalisation."""
        return self.sums.settle(value)

    def tidy(self, dims: Dims, dtype: int, codes: Codes) -> Value:
        """A value from codes; recognised as one whole tensor where it is that."""
        return self.sums.tidy(dims, dtype, codes)
