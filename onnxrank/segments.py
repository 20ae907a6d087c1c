"""A sequence that joins the user's history and the candidate, taken apart where its length is symbolic.

`[h_1, ..., h_L, c]`, a history with the candidate appended, has `L + 1` positions of which all but one are the same for
all candidates. Where L is a number, index maps tell the positions apart; where it is not, no index map can be written.
Then the graph is rewritten before anything else looks at it: what an operator does along the axis is done segment by
segment, `f(a ++ b) = f(a) ++ f(b)` for whatever treats positions independently, `(a ++ b) (c ++ d) = a c + b d` for
products that contract the axis, and `softmax(a ++ hidden) = softmax(a) ++ 0` where a mask is proved to hide a segment.
What comes out is a graph of ordinary operators in which every tensor has one level, and all rules apply as ever.

Masks are proved by intervals whose ends are expressions in the positions: `j > i` holds for every key j of the
candidate and every query i of the history because `L - i >= 1` for all `i <= L - 1`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxrank import extents as ex
from onnxrank.emit import Emitter
from onnxrank.extents import Expr
from onnxrank.facts import Facts
from onnxrank.graphs import captured, live, subgraphs
from onnxrank.layout import Layout
from onnxrank.operators import operator
from onnxrank.values import Dims, Sources, canonical, is_candidate_symbol, symbols

Size = int | Expr
Sizes = tuple[Size, ...]
Index = tuple[int, ...]
Bound = int | float | Expr
Data = Callable[[str], "NDArray[Any] | None"]

GAPS = {int(TensorProto.FLOAT16): 1e4}
"""How far below a visible key a masked one must be; other types have more room (`GAP`)."""
GAP = 1e6
PRECISION = {int(TensorProto.FLOAT16): 2.0**-10, int(TensorProto.BFLOAT16): 2.0**-7, int(TensorProto.DOUBLE): 2.0**-52}
MARGIN = 1e4
"""How many steps of the type, at the size of what is added to scores, a masked key must be below a visible one."""

_UNARY = frozenset(
    """Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish
    Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
    Softsign Sqrt Swish Tan Tanh ThresholdedRelu Cast Clip Dropout""".split()
)
_NARY = frozenset(
    """Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or
    PRelu Pow Sub Sum Where Xor""".split()
)
_BOOLEAN = frozenset("And Equal Greater GreaterOrEqual Less LessOrEqual Not Or Xor IsInf IsNaN".split())
_NORMS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization"})
_MOST_CONSTANT = 1 << 20
_ALL = (1 << 31) - 1


class _Left(Exception):
    """An operator is left to the sequence as a whole."""


# --- what is known of entries ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Least and greatest value of some entries; truth is 0 or 1.

    Ends may be expressions in the extents and in the position of the entry: `#0` along the last axis, `#1` along the
    one before it, and so on.
    """

    low: Bound
    high: Bound

    @property
    def number(self) -> float | None:
        """The one value that all entries have; None if they may differ."""
        same = not isinstance(self.low, Expr) and self.low == self.high
        return float(self.low) if same and not isinstance(self.low, Expr) else None


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
        """The same for entries of which axes went elsewhere, counted from the last one."""
        names = {f"#{a}": f"#{b}" for a, b in places.items()}
        same = all(places.get(k) == k for k in (0, 1))
        wide = Span(*(_renamed(e, names) for e in (self.all.low, self.all.high)))
        return Known(wide, Span(*(_renamed(e, names) for e in vars(self.diagonal).values())) if same else wide)


UNKNOWN = Known(ANY, ANY)
_ZERO = Known(Span(0, 0), Span(0, 0))


def _renamed(end: Bound, names: Mapping[str, str]) -> Bound:
    return _substituted(end, {a: ex.symbol(b) for a, b in names.items()}) if isinstance(end, Expr) else end


def _substituted(end: Expr, by: Mapping[str, Size]) -> Size:
    """A polynomial with some of its symbols replaced."""
    total: Size = 0
    for atoms, c in end.terms:
        total = total + ex.product(
            [c, *(by.get(a, ex.symbol(a)) if isinstance(a, str) else Expr((((a,), 1),)) for a in atoms)]
        )
    return total


def _least(end: Bound, sizes: Sequence[Size], sign: int = 1) -> float:
    """The least value of an expression over all positions and extents (the greatest for a sign of -1).

    Args:
        end: The expression.
        sizes: Extents that positions lie in, the last axis first.
        sign: Which end.
    """
    if not isinstance(end, Expr):
        return end
    total: Size = 0
    for atoms, c in end.terms:
        own = [a for a in atoms if isinstance(a, str) and a.startswith("#")]
        if len(own) > 1 or (own and len(atoms) > 1):
            return -inf * sign
        if own:
            total = total + c * (0 if c * sign > 0 else sizes[int(own[0][1:])] - 1)
        else:
            total = total + Expr(((atoms, c),)) if atoms else total + c
    return ex.bounds(total)[0 if sign > 0 else 1]


def _difference(a: Bound, b: Bound, unknown: float) -> Bound:
    """One end less another; what is unknown where one of them is infinite or no whole number beside an expression."""
    if not isinstance(a, Expr) and not isinstance(b, Expr):
        return unknown if abs(a) == abs(b) == inf else a - b
    ends = [e if isinstance(e, Expr) else int(e) if abs(e) != inf and e == int(e) else None for e in (a, b)]
    return unknown if ends[0] is None or ends[1] is None else ends[0] - ends[1]


def _compared(op: str, a: Span, b: Span, sizes: Sequence[Size], diagonal: bool) -> Span:
    """Whether a comparison is sure to hold, and whether it may."""
    if op.startswith("Less"):
        return _compared(op.replace("Less", "Greater"), b, a, sizes, diagonal)
    ends = [_difference(a.low, b.high, -inf), _difference(a.high, b.low, inf)]
    if diagonal:
        ends = [_renamed(e, {"#0": "#1"}) for e in ends]
    low, high = _least(ends[0], sizes), _least(ends[1], sizes, -1)
    if op == "Equal":
        return Span(int(low == high == 0), int(low <= 0 <= high))
    if op == "Greater":
        return Span(int(low > 0), int(high > 0))
    return Span(int(low >= 0), int(high >= 0))


def _fixed(span: Span) -> bool:
    return not isinstance(span.low, Expr) and not isinstance(span.high, Expr)


def _sum(a: Span, b: Span) -> Span:
    return Span(_difference(a.low, -b.low, -inf), _difference(a.high, -b.high, inf))


def _negated(a: Span) -> Span:
    return Span(-a.high, -a.low)


def _scaled(a: Span, factor: float) -> Span:
    """Times a number that is not 0."""
    if not _fixed(a):
        return ANY
    ends = sorted(float(e) * factor for e in (a.low, a.high) if not isinstance(e, Expr))
    return Span(ends[0], ends[1])


def _hull(a: Span, b: Span) -> Span:
    if a == b:
        return a
    if not _fixed(a) or not _fixed(b):
        return ANY
    return Span(min(a.low, b.low), max(a.high, b.high))  # type: ignore[type-var]


def _chosen(when: Span, a: Span, b: Span) -> Span:
    return a if when.low == 1 else b if when.high == 0 else _hull(a, b)


def _as_truth(a: Span) -> Span:
    if not _fixed(a):
        return TRUTH
    zero = a.low == a.high == 0
    away = a.low > 0 or a.high < 0  # type: ignore[operator]
    return Span(int(away), int(not zero))


# --- tensors in segments -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One segment of a tensor.

    Attributes:
        name: Its tensor; None for zeros that nobody has written.
        known: What is known of its entries.
        score: The same of what is added to the product in it, where it is scores of attention.
        candidate: Whether it may differ between candidates.
        joint: Where softmax went over several segments at once: that tensor, and which of them it holds.
    """

    name: str | None
    known: Known = UNKNOWN
    score: Known | None = None
    candidate: bool = True
    joint: tuple[str, tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Tensor:
    """A tensor of the original graph.

    Attributes:
        sizes: Its shape.
        cuts: Per axis the extents of its segments; one for an axis that is whole.
        parts: Per segment, by its number along every axis, what holds it.
        dtype: Element type.
    """

    sizes: Sizes
    cuts: tuple[Sizes, ...]
    parts: Mapping[Index, Part]
    dtype: int

    @property
    def divided(self) -> bool:
        """Whether it is in several segments."""
        return len(self.parts) > 1

    def sizes_of(self, index: Index) -> Sizes:
        """Shape of a segment."""
        return tuple(c[k] for c, k in zip(self.cuts, index, strict=True))

    def at(self, index: Index) -> Part:
        """The segment that belongs to one of a tensor this one is broadcast to."""
        own = index[len(index) - len(self.cuts) :]
        return self.parts[tuple(k if len(c) > 1 else 0 for c, k in zip(self.cuts, own, strict=True))]


def indices(cuts: Sequence[Sizes]) -> Iterator[Index]:
    """The numbers of all segments."""
    return product(*(range(len(c)) for c in cuts))


def sequences(model: ModelProto, facts: Facts, candidate: frozenset[str]) -> list[int]:
    """The nodes that join what the candidate changes and what it does not along an axis of symbolic length.

    Args:
        model: The model.
        facts: Its shapes.
        candidate: Inputs that may differ between candidates.

    Returns:
        Their places.
    """
    levels = _depends(model, candidate)
    out = []
    for k, node in enumerate(model.graph.node):
        if operator(node) != "Concat" or len({i in levels for i in node.input}) < 2:
            continue
        sizes, axis = facts.sizes.get(node.output[0]), _attribute(node, "axis", 0)
        if sizes is None or not sizes:
            continue
        size = sizes[axis % len(sizes)]
        if (
            isinstance(size, Expr)
            and not any(map(is_candidate_symbol, size.symbols))
            and size.symbols.isdisjoint(facts.opaque)
        ):
            out.append(k)
    return out


def _depends(model: ModelProto, candidate: frozenset[str]) -> set[str]:
    """The tensors that candidate-level inputs reach by their entries; extents do not count."""
    out = set(candidate)
    for node in model.graph.node:
        read = {*node.input, *(c for g in subgraphs(node) for c in captured(g))}
        if not read.isdisjoint(out) and operator(node) not in ("Shape", "Size"):
            out.update(o for o in node.output if o)
    return out


def _attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


@dataclass
class Division:
    """Takes the sequences of a model apart.

    Attributes:
        model: The model.
        facts: Its shapes and constants.
        dtypes: Element type per tensor, where known.
        inputs: Shapes of its inputs.
        candidate: Inputs that may differ between candidates.
        data: Entries of constants.
        chosen: The nodes at which a sequence is joined, by their places (`sequences`).
    """

    model: ModelProto
    facts: Facts
    dtypes: Mapping[str, int]
    inputs: Mapping[str, Dims]
    candidate: frozenset[str]
    data: Data
    chosen: Sequence[int]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        taken = {*(t.name for t in graph.initializer), *(i.name for i in graph.input)}
        taken |= {o for n in graph.node for o in n.output} | {n.name for n in graph.node}
        self.opset = next(o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx"))
        self.emit = Emitter(taken, self.opset)
        self.layout = Layout(Sources(), self.emit, self.facts.expressions)
        # Rows are counted by inputs that have them whatever becomes of the others.
        for name in sorted(self.inputs, key=lambda n: n not in self.candidate):
            for axis, d in enumerate(self.inputs[name]):
                held = next((f for f in d if isinstance(f, int)), 1)
                for s in symbols([d])[:1] if len(symbols([d])) == 1 else ():
                    self.layout.extent_of.setdefault(s, (name, axis, held))
        self.depends = _depends(self.model, self.candidate)
        self.shapes = {t.name: tuple(t.dims) for t in graph.initializer}
        self.node = NodeProto()
        self._cut: dict[tuple[str, int, Sizes], Tensor] = {}
        self._written: set[str] = set()
        self._totals: dict[Size, Sizes] = {}

    def run(self) -> ModelProto:
        """The model with its sequences in segments; what cannot be followed reads them joined again."""
        out = ModelProto()
        out.CopyFrom(self.model)
        del out.graph.node[:], out.graph.value_info[:]
        nodes = self.model.graph.node
        for k in self.chosen:
            axis = _attribute(nodes[k], "axis", 0) % len(self.facts.sizes[nodes[k].output[0]])
            parts = tuple(self._sizes(i)[axis] for i in nodes[k].input)
            self._totals.setdefault(total(parts), parts)
        for k, node in enumerate(nodes):
            self.node, self.emit.hint = node, next((o for o in node.output if o), node.name)
            if not self._divided(node, k):
                inner = [c for g in subgraphs(node) for c in captured(g)]
                for name in (*node.input, *inner):
                    self._whole(name)
                out.graph.node.extend(e.proto for e in self.emit.nodes)
                self.emit.nodes.clear()
                out.graph.node.append(node)
            else:
                out.graph.node.extend(e.proto for e in self.emit.nodes)
                self.emit.nodes.clear()
        for o in self.model.graph.output:
            self._whole(o.name)
        out.graph.node.extend(e.proto for e in self.emit.nodes)
        out.graph.initializer.extend(self.emit.initializers.values())
        return live(out)

    # --- tensors -------------------------------------------------------------------------------------------------------

    def _sizes(self, name: str) -> Sizes:
        found = self.facts.sizes.get(name, self.shapes.get(name))
        if found is None and name in self.inputs:
            found = tuple(self.facts.size_of(d) for d in self.inputs[name])
        if found is None or any(s in self.facts.opaque for n in found for s in ex.symbols_of(n)):
            raise _Left
        return tuple(found)

    def _tensor(self, name: str) -> Tensor:
        """A tensor, in segments or whole."""
        if name in self.tensors:
            return self.tensors[name]
        sizes = self._sizes(name)
        dtype = self.dtypes.get(name, 0)
        part = Part(name, self._of_constant(name, dtype), None, name in self.depends)
        made = Tensor(sizes, tuple((n,) for n in sizes), {(0,) * len(sizes): part}, dtype)
        self.tensors[name] = made
        return made

    def _of_constant(self, name: str, dtype: int) -> Known:
        data = self.data(name)
        unknown = Known(TRUTH, TRUTH) if dtype == TensorProto.BOOL else UNKNOWN
        if data is None or not data.size or data.size > _MOST_CONSTANT or data.dtype.kind not in "biuf":
            return unknown
        low, high = data.min(), data.max()
        if low != low or high != high:
            return unknown
        span = Span(
            low.item() if data.dtype.kind == "f" else int(low), high.item() if data.dtype.kind == "f" else int(high)
        )
        return Known(span, span)

    def _whole(self, name: str) -> None:
        """Joins a tensor's segments again, under its own name."""
        made = self.tensors.get(name)
        if made is None or not made.divided or name in self._written:
            if made is not None and not made.divided and name not in self._written:
                self._alias(name, made)
            return
        self._written.add(name)
        rows = {i: self._name(made, i) for i in made.parts}
        axes = [k for k, c in enumerate(made.cuts) if len(c) > 1]
        for axis in axes[::-1]:
            joined: dict[Index, list[str]] = {}
            for i in sorted(rows):
                joined.setdefault((*i[:axis], 0, *i[axis + 1 :]), []).append(rows[i])
            last = axis == axes[0]
            rows = {
                i: self.emit.add("Concat", names, {"axis": axis}, output=name if last else None)
                for i, names in joined.items()
            }

    def _alias(self, name: str, made: Tensor) -> None:
        """A tensor that is one segment of another one, under its own name."""
        (index,) = made.parts
        held = made.parts[index].name
        if held != name:
            self._written.add(name)
            self.emit.add("Identity", [self._name(made, index)], output=name)

    def _name(self, tensor: Tensor, index: Index) -> str:
        """The tensor of a segment, zeros written out."""
        part = tensor.parts[index]
        if part.name is not None:
            return part.name
        zero = self.emit.constant(np.zeros((), helper.tensor_dtype_to_np_dtype(tensor.dtype)))
        return self.emit.add("Expand", [zero, self._vector(tensor.sizes_of(index))])

    def _vector(self, sizes: Sizes) -> str:
        """A shape as an int64 vector."""
        dims = []
        for n in sizes:
            c, found = self.facts.extent(n)
            dims.append(canonical([c, *found]) if len(found) <= 1 else canonical([self.facts.symbol_of(n)]))  # type: ignore[arg-type]
        return self.layout.shape_vector(tuple(dims))

    def _scalar(self, size: Size) -> str:
        """An extent as a scalar."""
        if not isinstance(size, Expr):
            return self.emit.constant(np.array(size, np.int64))
        return self.emit.add("Reshape", [self._vector((size,)), self.emit.constant(np.zeros(0, np.int64))])

    def _cut_to(self, name: str, tensor: Tensor, axis: int, cut: Sizes) -> Tensor:
        """A tensor with an axis, whole so far, in segments; positions that are not there fail at run time."""
        if tensor.cuts[axis] == cut:
            return tensor
        if len(tensor.cuts[axis]) > 1:
            raise _Left
        key = (name, axis, cut)
        if key not in self._cut:
            parts = {}
            for i, part in tensor.parts.items():
                start: Size = 0
                for k, n in enumerate(cut):
                    at = self._positions(start, n)
                    made = self.emit.add("Gather", [self._name(tensor, i), at], {"axis": axis})
                    known = part.known if part.known.all.number is not None else _type_bounds(tensor.dtype)
                    parts[(*i[:axis], k, *i[axis + 1 :])] = Part(made, known, None, part.candidate)
                    start = start + n
            sizes = (*tensor.sizes[:axis], total(cut), *tensor.sizes[axis + 1 :])
            self._cut[key] = Tensor(sizes, (*tensor.cuts[:axis], cut, *tensor.cuts[axis + 1 :]), parts, tensor.dtype)
        return self._cut[key]

    def _positions(self, start: Size, count: Size) -> str:
        """`[start, ..., start + count - 1]`."""
        if not isinstance(start, Expr) and not isinstance(count, Expr):
            return self.emit.constant(np.arange(start, start + count, dtype=np.int64))
        if count == 1:
            return self._vector((start,))
        ends = [self._scalar(start), self._scalar(start + count), self.emit.constant(np.array(1, np.int64))]
        return self.emit.add("Range", ends)

    # --- operators -------------------------------------------------------------------------------------------------------

    def _divided(self, node: NodeProto, place: int) -> bool:
        """Whether a node is done segment by segment."""
        op = operator(node)
        mine = any(i in self.tensors and (self.tensors[i].divided or self._moved(i)) for i in node.input)
        source = _SOURCES.get(op)
        mark = len(self.emit.nodes)
        try:
            if place in self.chosen:
                made = self._concat(node)
            elif mine:
                handler = _HANDLERS.get(op)
                if handler is None or len([o for o in node.output if o]) != 1 or subgraphs(node):
                    raise _Left
                made = handler(self, node)
            elif source is not None and self._holds_sequence(node.output[0]):
                made = source(self, node)
            else:
                return False
        except (_Left, ex.Unproved):
            return False
        except Exception:
            del self.emit.nodes[mark:]
            raise
        self.tensors[node.output[0]] = made
        return True

    def _moved(self, name: str) -> bool:
        """Whether a tensor is one segment of another one."""
        made = self.tensors[name]
        return next(iter(made.parts.values())).name != name

    def _holds_sequence(self, name: str) -> bool:
        try:
            return any(n in self._totals for n in self._sizes(name))
        except _Left:
            return False

    def _copies(
        self,
        node: NodeProto,
        cuts: Sequence[Sizes],
        operands: Callable[[Index], Sequence[str]],
        known: Callable[[Index], tuple[Known, Known | None]] = lambda _: (UNKNOWN, None),
        candidate: Callable[[Index], bool] | None = None,
    ) -> Tensor:
        """A copy of a node for every segment of its result."""
        (output,) = (o for o in node.output if o)
        parts = {}
        for i in indices(cuts):
            entries, score = known(i)
            name = self.emit.fresh(f"{output}/segment{''.join(map(str, i))}")
            if entries.all.number == 0:
                parts[i] = Part(None, entries, score, False)
                continue
            self.emit.copy(node, operands(i), [name])
            parts[i] = Part(name, entries, score, candidate(i) if candidate else output in self.depends)
        return self._made(output, cuts, parts)

    def _made(self, output: str, cuts: Sequence[Sizes], parts: Mapping[Index, Part]) -> Tensor:
        sizes = self._sizes(output)
        if tuple(total(c) for c in cuts) != sizes:
            raise _Left
        return Tensor(sizes, tuple(cuts), parts, self.dtypes.get(output, 0))

    def _given(self, node: NodeProto) -> list[Tensor | None]:
        return [self._tensor(i) if i else None for i in node.input]

    def _others(self, node: NodeProto) -> list[str]:
        """Operands but the first, which have to be whole."""
        for i in node.input[1:]:
            if i and i in self.tensors and (self.tensors[i].divided or self._moved(i)):
                raise _Left
        return list(node.input[1:])

    def _elementwise(self, node: NodeProto) -> Tensor:
        """Operators that treat entries independently, with broadcasting."""
        given = self._given(node)
        if operator(node) in ("Clip", "Dropout"):
            self._others(node)
        sizes = self._sizes(node.output[0])
        cuts: list[Sizes] = [(n,) for n in sizes]
        for t in given:
            for k, c in enumerate(t.cuts if t else ()):
                at = len(sizes) - len(t.cuts) + k  # type: ignore[union-attr]
                if len(c) > 1 and len(cuts[at]) > 1 and cuts[at] != c:
                    raise _Left
                cuts[at] = c if len(c) > 1 else cuts[at]
        for j, t in enumerate(given):
            for k, c in enumerate(t.cuts if t else ()):
                assert t is not None
                want = cuts[len(sizes) - len(t.cuts) + k]
                if len(want) > 1 and len(c) == 1 and c != (1,) and operator(node) not in ("Clip", "Dropout"):
                    if total(want) != c[0] and not ex.is_cut_of(c[0], total(want)):
                        raise _Left
                    given[j] = t = self._cut_to(node.input[j], t, k, want)

        def operands(i: Index) -> list[str]:
            return [self._name(t, self._own(t, i)) if t is not None else "" for t in given]

        def known(i: Index) -> tuple[Known, Known | None]:
            return self._entries(node, given, i, cuts)

        def candidate(i: Index) -> bool:
            return any(t is not None and t.at(i).candidate for t in given)

        made = self._copies(node, cuts, operands, known, candidate)
        return self._picked(node, given, made)

    def _picked(self, node: NodeProto, given: Sequence[Tensor | None], made: Tensor) -> Tensor:
        """With segments of Where whose condition is known as the operand that is taken."""
        if operator(node) != "Where":
            return made
        parts = dict(made.parts)
        for i in parts:
            when = given[0].at(i).known.all.number  # type: ignore[union-attr]
            taken = given[1 if when else 2]
            if when is not None and taken is not None and taken.sizes_of(self._own(taken, i)) == made.sizes_of(i):
                parts[i] = replace(taken.at(i), score=parts[i].score)
        return replace(made, parts=parts)

    @staticmethod
    def _own(tensor: Tensor, index: Index) -> Index:
        """The number of an operand's segment."""
        own = index[len(index) - len(tensor.cuts) :]
        return tuple(k if len(c) > 1 else 0 for c, k in zip(tensor.cuts, own, strict=True))

    def _entries(
        self, node: NodeProto, given: Sequence[Tensor | None], i: Index, cuts: Sequence[Sizes]
    ) -> tuple[Known, Known | None]:
        """What is known of a segment of an elementwise result, and of what it adds to scores."""
        op, parts = operator(node), [t.at(i) for t in given if t is not None]
        x = [p.known for p in parts]
        sizes = [c[k] for c, k in zip(cuts[::-1], i[::-1], strict=True)]
        on = len(cuts) > 1 and cuts[-1] == cuts[-2] and i[-1] == i[-2]
        known = self._step(node, op, x, sizes, on)
        scored = [k for k, p in enumerate(parts) if p.score is not None]
        if len(scored) != 1:
            return known, None
        (k,) = scored
        mine, score = parts[k], parts[k].score
        assert score is not None and mine is not None
        others = [p.known for j, p in enumerate(parts) if j != k]
        made: Known | None = None
        if op in ("Add", "Sum"):
            made = score
            for other in others:
                made = made.map(_sum, other)
        elif op == "Sub" and k == 0:
            made = score.map(lambda a, b: _sum(a, _negated(b)), others[0])
        elif op in ("Mul", "Div"):
            number = others[0].all.number
            if number is not None and number > 0 and number != inf and (op == "Mul" or k == 0):
                made = score.map(lambda a: _scaled(a, number if op == "Mul" else 1 / number))
        elif op == "Where" and k > 0:
            branches = [score if j == k else parts[j].known for j in (1, 2)]
            made = x[0].map(_chosen, *branches)
        elif op == "Cast" and _attribute(node, "to") in _FLOATS or op in ("Identity", "Dropout"):
            made = score
        return known, made

    def _step(self, node: NodeProto, op: str, x: Sequence[Known], sizes: Sequence[Size], on: bool) -> Known:
        """What an elementwise operator makes of what is known of its operands."""
        unknown = Known(TRUTH, TRUTH) if op in _BOOLEAN else UNKNOWN
        if op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"):
            wide = _compared(op, x[0].all, x[1].all, sizes, False)
            return Known(wide, _compared(op, x[0].diagonal, x[1].diagonal, sizes, True) if on else wide)
        if op in ("And", "Or"):
            do = min if op == "And" else max
            return x[0].map(lambda a, b: Span(do(a.low, b.low), do(a.high, b.high)), x[1])  # type: ignore[type-var]
        if op == "Not":
            return x[0].map(lambda a: Span(1 - a.high, 1 - a.low))
        if op == "IsNaN":
            return x[0].map(lambda a: Span(0, 0) if a.number is not None else TRUTH)
        if op == "Where":
            return x[0].map(_chosen, x[1], x[2])
        if op == "Cast":
            to = _attribute(node, "to")
            if to == TensorProto.BOOL:
                return x[0].map(_as_truth)
            return x[0] if to in _FLOATS or x[0].map(_whole_numbers) == x[0] else unknown
        if op in ("Identity", "Dropout"):
            return x[0]
        if op == "Add":
            return x[0].map(_sum, x[1])
        if op == "Sub":
            return x[0].map(lambda a, b: _sum(a, _negated(b)), x[1])
        if op == "Neg":
            return x[0].map(_negated)
        if op == "Mul":
            numbers = [k.all.number for k in x]
            if 0.0 in numbers:
                # As masks have it: 0 times what is added to scores, which is finite.
                return _ZERO if all(n is not None and abs(n) != inf for n in numbers) else unknown
            for number, other in ((numbers[0], x[1]), (numbers[1], x[0])):
                if number is not None:
                    return other.map(lambda a, by=number: _scaled(a, by))
        return unknown

    def _mat_mul(self, node: NodeProto) -> Tensor:
        """MatMul: rows and columns in segments; along the contracted axis, products of segments are added."""
        a, b = self._given(node)
        assert a is not None and b is not None
        if min(len(a.cuts), len(b.cuts)) < 2:
            raise _Left
        inner = max(a.cuts[-1], b.cuts[-2], key=len)
        if len(inner) > 1:
            a = self._cut_to(node.input[0], a, len(a.cuts) - 1, inner)
            b = self._cut_to(node.input[1], b, len(b.cuts) - 2, inner)
        sizes = self._sizes(node.output[0])
        cuts: list[Sizes] = [(n,) for n in sizes]
        cuts[-2:] = [a.cuts[-2], b.cuts[-1]]
        for t in (a, b):
            for k, c in enumerate(t.cuts[:-2]):
                at = len(sizes) - len(t.cuts) + k
                if len(c) > 1:
                    if len(cuts[at]) > 1 and cuts[at] != c:
                        raise _Left
                    cuts[at] = c
        for t in (a, b):
            for k, c in enumerate(t.cuts[:-2]):
                want = cuts[len(sizes) - len(t.cuts) + k]
                if len(want) > 1 and len(c) == 1 and c != (1,):
                    raise _Left
        parts = {i: self._product(node, a, b, i, len(inner)) for i in indices(cuts)}
        return self._made(node.output[0], cuts, parts)

    def _product(self, node: NodeProto, a: Tensor, b: Tensor, i: Index, count: int) -> Part:
        left = [self._own(a, (*i[:-1], k)) for k in range(count)]
        right = [self._own(b, (*i[:-2], k, i[-1])) for k in range(count)]
        used = [k for k in range(count) if a.parts[left[k]].known.all.number != 0] or [0]
        joint = a.parts[left[used[0]]].joint
        candidate = any(a.parts[left[k]].candidate or b.parts[right[k]].candidate for k in used)
        terms: list[str] = []
        if joint is not None and any(isinstance(a.sizes_of(left[k])[-1], Expr) for k in used):
            # One product with all that the request gives, zeros for the rest: an axis of no entries is never contracted.
            name, held = joint
            rest = [b.parts[right[k]].candidate for k in held]
            rows = [
                self._zeros(b, right[k]) if moves else self._name(b, right[k])
                for k, moves in zip(held, rest, strict=True)
            ]
            if not all(rest):
                terms.append(self._term(node, name, self.emit.add("Concat", rows, {"axis": len(b.cuts) - 2})))
                used = [k for k, moves in zip(held, rest, strict=True) if moves]
        for k in used:
            made, size = self._term(node, self._name(a, left[k]), self._name(b, right[k])), a.sizes_of(left[k])[-1]
            terms.append(self._guarded(made, size, a.dtype) if isinstance(size, Expr) and len(used) > 1 else made)
        total = terms[0]
        for other in terms[1:]:
            total = self.emit.add("Add", [total, other])
        return Part(total, UNKNOWN, _ZERO, candidate)

    def _guarded(self, made: str, size: Size, dtype: int) -> str:
        """A product over an axis that may have no entries: some versions of onnxruntime give no zeros then."""
        some = self.emit.add("Greater", [self._scalar(size), self.emit.constant(np.array(0, np.int64))])
        zero = self.emit.constant(np.zeros((), helper.tensor_dtype_to_np_dtype(dtype)))
        return self.emit.add("Where", [some, made, zero])

    def _term(self, node: NodeProto, a: str, b: str) -> str:
        name = self.emit.fresh(f"{node.output[0]}/segment")
        self.emit.copy(node, [a, b], [name])
        return name

    def _zeros(self, tensor: Tensor, index: Index) -> str:
        """Zeros of a segment's shape, the same for all candidates."""
        zero = self.emit.constant(np.zeros((), helper.tensor_dtype_to_np_dtype(tensor.dtype)))
        return self.emit.add("Expand", [zero, self._vector(tensor.sizes_of(index))])

    def _softmax(self, node: NodeProto) -> Tensor:
        """Softmax: segments that a mask hides for sure get 0; the others are weighed together."""
        x, rank = self._tensor(node.input[0]), len(self._tensor(node.input[0]).cuts)
        axis = _attribute(node, "axis", -1 if self.opset >= 13 else 1) % rank
        if self.opset < 13 and axis != rank - 1:
            raise _Left
        if len(x.cuts[axis]) == 1:
            return self._copies(node, x.cuts, lambda i: [self._name(x, i)], candidate=lambda i: x.parts[i].candidate)
        parts: dict[Index, Part] = {}
        for i in indices([*x.cuts[:axis], (0,), *x.cuts[axis + 1 :]]):
            row = [(*i[:axis], k, *i[axis + 1 :]) for k in range(len(x.cuts[axis]))]
            held = [k for k, j in enumerate(row) if not self._hidden(x, j, row, axis)] or list(range(len(row)))
            for k, j in enumerate(row):
                if k not in held:
                    parts[j] = Part(None, _ZERO, None, False)
            candidate = any(x.parts[row[k]].candidate for k in held)
            names = [self._name(x, row[k]) for k in held]
            made = self.emit.fresh(f"{node.output[0]}/segment{''.join(map(str, i))}")
            self.emit.copy(
                node, [names[0] if len(names) == 1 else self.emit.add("Concat", names, {"axis": axis})], [made]
            )
            if len(held) == 1:
                parts[row[held[0]]] = Part(made, UNKNOWN, None, candidate)
                continue
            start: Size = 0
            for k in held:
                size = x.cuts[axis][k]
                ends = [*(self._vector((n,)) for n in (start, start + size)), self.emit.constant(np.array([axis]))]
                piece = self.emit.add("Slice", [made, *ends])
                joint = (made, tuple(held)) if axis == rank - 1 else None
                parts[row[k]] = Part(piece, UNKNOWN, None, candidate, joint)
                start = start + size
        return self._made(node.output[0], x.cuts, parts)

    def _hidden(self, x: Tensor, j: Index, row: Sequence[Index], axis: int) -> bool:
        """Whether softmax gives all entries of a segment the weight 0, in every row."""
        score = x.parts[j].score
        if score is None or isinstance(score.all.high, Expr):
            return False
        high = float(score.all.high)
        if high == -inf:
            return True
        if axis != len(x.cuts) - 1 or len(x.cuts) < 2 or x.cuts[-1] != x.cuts[-2] or high != high:
            return False
        seen = x.parts[(*j[:-1], j[-2])].score
        if seen is None or isinstance(seen.diagonal.low, Expr) or j[-1] == j[-2]:
            return False
        least = float(seen.diagonal.low)
        gap = max(GAPS.get(x.dtype, GAP), abs(least) * PRECISION.get(x.dtype, 2.0**-23) * MARGIN)
        return least - high >= gap

    def _norm(self, node: NodeProto) -> Tensor:
        """Normalisations over axes that are whole."""
        x, others = self._tensor(node.input[0]), self._others(node)
        axis = _attribute(node, "axis", -1) % len(x.cuts)
        over = x.cuts[axis:] if operator(node) != "LpNormalization" else x.cuts[axis : axis + 1]
        if any(len(c) > 1 for c in over):
            raise _Left
        return self._along(node, x, x.cuts, others)

    def _along(self, node: NodeProto, x: Tensor, cuts: Sequence[Sizes], others: Sequence[str]) -> Tensor:
        """A copy per segment of an operator whose result is divided as its operand is, axes in order."""
        own = dict(zip(indices(cuts), sorted(x.parts), strict=True))
        return self._copies(
            node, cuts, lambda i: [self._name(x, own[i]), *others], candidate=lambda i: x.parts[own[i]].candidate
        )

    def _moves(self, node: NodeProto, x: Tensor, order: Sequence[int | None], others: Sequence[str]) -> Tensor:
        """A copy per segment of an operator that puts axes elsewhere.

        Args:
            node: The operator.
            x: Its operand.
            order: Per axis of the result the axis that it was; None for a new one.
            others: The node's further inputs.
        """
        cuts = [x.cuts[a] if a is not None else (1,) for a in order]
        rank, new = len(x.cuts), len(order)
        places = {rank - 1 - a: new - 1 - k for k, a in enumerate(order) if a is not None}

        def own(i: Index) -> Index:
            at = {a: k for a, k in zip(order, i, strict=True) if a is not None}
            return tuple(at.get(a, 0) for a in range(rank))

        def known(i: Index) -> tuple[Known, Known | None]:
            p = x.parts[own(i)]
            return p.known.moved(places), None if p.score is None else p.score.moved(places)

        return self._copies(
            node, cuts, lambda i: [self._name(x, own(i)), *others], known, lambda i: x.parts[own(i)].candidate
        )

    def _transpose(self, node: NodeProto) -> Tensor:
        x = self._tensor(node.input[0])
        return self._moves(node, x, _attribute(node, "perm") or list(range(len(x.cuts)))[::-1], [])

    def _axes(self, node: NodeProto) -> list[int] | None:
        given = _attribute(node, "axes")
        if given is None and len(node.input) > 1 and node.input[1]:
            data = self.data(node.input[1])
            if data is None:
                raise _Left
            given = data.reshape(-1).tolist()
        return None if given is None else [int(a) for a in given]

    def _unsqueeze(self, node: NodeProto) -> Tensor:
        x, axes = self._tensor(node.input[0]), self._axes(node) or []
        rank = len(x.cuts) + len(axes)
        new, old = {a % rank for a in axes}, iter(range(len(x.cuts)))
        return self._moves(node, x, [None if k in new else next(old) for k in range(rank)], list(node.input[1:]))

    def _squeeze(self, node: NodeProto) -> Tensor:
        x, axes = self._tensor(node.input[0]), self._axes(node)
        if axes is None or any(len(x.cuts[a % len(x.cuts)]) > 1 for a in axes):
            raise _Left
        gone = {a % len(x.cuts) for a in axes}
        return self._moves(node, x, [k for k in range(len(x.cuts)) if k not in gone], list(node.input[1:]))

    def _reshape(self, node: NodeProto) -> Tensor:
        """Reshape: an axis in segments has to stay an axis."""
        x, sizes = self._tensor(node.input[0]), self._sizes(node.output[0])
        order: list[int | None] = [None] * len(sizes)
        for a, c in enumerate(x.cuts):
            if len(c) == 1:
                continue
            before = ex.product(x.sizes[:a])
            found = [k for k, n in enumerate(sizes) if n == x.sizes[a] and ex.product(sizes[:k]) == before]
            if not found:
                raise _Left
            order[found[0]] = a
        cuts = [x.cuts[a] if a is not None else (n,) for n, a in zip(sizes, order, strict=True)]
        parts = {}
        for i in indices(cuts):
            at = {a: k for a, k in zip(order, i, strict=True) if a is not None}
            own = tuple(at.get(a, 0) for a in range(len(x.cuts)))
            part, made = x.parts[own], tuple(c[k] for c, k in zip(cuts, i, strict=True))
            if part.name is None:
                parts[i] = part
                continue
            name = self._reshaped(self._name(x, own), x.sizes_of(own), made)
            plain = len(made) == len(x.sizes_of(own)) and made == x.sizes_of(own)
            known = part.known if plain or _fixed(part.known.all) else UNKNOWN
            parts[i] = Part(
                name, Known(known.all, known.all), None if part.score is None else part.score, part.candidate
            )
        return self._made(node.output[0], cuts, parts)

    def _reshaped(self, name: str, have: Sizes, want: Sizes) -> str:
        """A tensor in another shape; extents that stay where they are need not be computed."""
        target = [0 if k < len(have) and have[k] == n and isinstance(n, Expr) else n for k, n in enumerate(want)]
        left = [k for k, n in enumerate(target) if isinstance(n, Expr)]
        if not left:
            literal = any(n == 0 and isinstance(w, int) for n, w in zip(target, want, strict=True))
            if not literal:
                return self.emit.add("Reshape", [name, self.emit.constant(np.array(target, np.int64))])
        if len(left) == 1 and 0 not in target:
            target[left[0]] = -1
            return self.emit.add("Reshape", [name, self.emit.constant(np.array(target, np.int64))])
        if self.opset < 14:
            raise _Left
        return self.emit.add("Reshape", [name, self._vector(want)], {"allowzero": 1})

    def _expand(self, node: NodeProto) -> Tensor:
        """Expand, of segments or to them."""
        x, sizes = self._tensor(node.input[0]), self._sizes(node.output[0])
        skip = len(sizes) - len(x.cuts)
        cuts: list[Sizes] = []
        for k, n in enumerate(sizes):
            own = x.cuts[k - skip] if k >= skip else (1,)
            cuts.append(own if len(own) > 1 else self._totals.get(n, (n,)) if own == (1,) else (n,))
        parts = {}
        for i in indices(cuts):
            own_index = self._own(x, i)
            made = tuple(c[k] for c, k in zip(cuts, i, strict=True))
            part = x.parts[own_index]
            name = None if part.name is None else self.emit.add("Expand", [part.name, self._vector(made)])
            parts[i] = replace(part, name=name, joint=None)
        return self._made(node.output[0], cuts, parts)

    def _constant_of_shape(self, node: NodeProto) -> Tensor:
        sizes = self._sizes(node.output[0])
        cuts = [self._totals.get(n, (n,)) for n in sizes]
        given = _attribute(node, "value")
        value = 0.0 if given is None else float(numpy_helper.to_array(given).reshape(-1)[0])
        span = Span(value, value)
        return self._copies(
            node,
            cuts,
            lambda i: [self._vector(tuple(c[k] for c, k in zip(cuts, i, strict=True)))],
            lambda i: (Known(span, span), None),
            lambda i: False,
        )

    def _range(self, node: NodeProto) -> Tensor:
        """Range of whole numbers by ones."""
        (size,) = self._sizes(node.output[0])
        start, step = self.data(node.input[0]), self.data(node.input[2])
        cut = self._totals[size]
        if start is None or step is None or start.dtype != np.int64 or int(step) != 1:
            raise _Left
        parts, at = {}, int(start)
        first: Size = at
        for k, n in enumerate(cut):
            end = first + ex.symbol("#0") if n != 1 else first
            parts[(k,)] = Part(self._positions(first, n), Known(Span(end, end), Span(end, end)), None, False)
            first = first + n
        return self._made(node.output[0], [cut], parts)

    def _trilu(self, node: NodeProto) -> Tensor:
        """Triangles: whether an entry is kept depends on how far it is from the diagonal."""
        x = self._tensor(node.input[0])
        rank = len(x.cuts)
        offset = self.data(node.input[1]) if len(node.input) > 1 and node.input[1] else np.array(0)
        upper = bool(_attribute(node, "upper", 1))
        if offset is None or rank < 2:
            raise _Left
        parts = {}
        for i, part in x.parts.items():
            rows, columns = (total(x.cuts[a][: i[a]]) for a in (-2, -1))
            sizes = x.sizes_of(i)[::-1]
            # Kept above where j - i >= k, below where j - i <= k.
            away = columns - rows + ex.symbol("#0") - ex.symbol("#1") - int(offset.reshape(-1)[0])
            low, high = _least(away, sizes), _least(away, sizes, -1)
            if (low >= 0) if upper else (high <= 0):
                parts[i] = part
            elif (high < 0) if upper else (low > 0):
                parts[i] = Part(None, _ZERO, None, False)
            else:
                shift = int(offset.reshape(-1)[0]) + rows - columns
                moved = self.emit.add("Trilu", [self._name(x, i), self._scalar(shift)], {"upper": int(upper)})
                wide = part.known.map(lambda a: _hull(a, Span(0, 0)))
                on = rows == columns
                kept = int(offset.reshape(-1)[0]) <= 0 if upper else int(offset.reshape(-1)[0]) >= 0
                diagonal = wide.all if not on else part.known.diagonal if kept else Span(0, 0)
                parts[i] = Part(moved, Known(wide.all, diagonal), None, part.candidate)
        return self._made(node.output[0], x.cuts, parts)

    def _gather(self, node: NodeProto) -> Tensor:
        """Gather: by positions in segments, from a tensor in segments, or of some of its positions."""
        x, at = self._given(node)
        assert x is not None and at is not None
        axis = _attribute(node, "axis", 0) % len(x.cuts)
        if at.divided:
            if x.divided:
                raise _Left
            cuts = (*x.cuts[:axis], *at.cuts, *x.cuts[axis + 1 :])
            span = slice(axis, axis + len(at.cuts))
            own = self._own(x, (0,) * len(x.cuts))
            return self._copies(
                node,
                cuts,
                lambda i: [self._name(x, own), self._name(at, i[span])],
                candidate=lambda i: at.parts[i[span]].candidate or x.parts[own].candidate,
            )
        if self._moved(node.input[1]):
            raise _Left
        if len(x.cuts[axis]) == 1:
            order: list[int | None] = [*range(axis), *([None] * len(at.cuts)), *range(axis + 1, len(x.cuts))]
            cuts = tuple(x.cuts[a] if a is not None else () for a in order)
            cuts = (*cuts[:axis], *at.cuts, *cuts[axis + len(at.cuts) :])

            def place(i: Index) -> Index:
                found = {a: k for a, k in zip(order, i, strict=True) if a is not None}
                return tuple(found.get(a, 0) for a in range(len(x.cuts)))

            return self._copies(
                node,
                cuts,
                lambda i: [self._name(x, place(i)), node.input[1]],
                candidate=lambda i: x.parts[place(i)].candidate,
            )
        return self._taken(node, x, axis)

    def _taken(self, node: NodeProto, x: Tensor, axis: int) -> Tensor:
        """Some positions of the first or the last segment."""
        ids = self.data(node.input[1])
        if ids is None or not ids.size:
            raise _Left
        least, most, cut = int(ids.min()), int(ids.max()), x.cuts[axis]
        if most < 0 and ex.bounds(cut[-1])[0] >= -least:
            which = len(cut) - 1
        elif least >= 0 and ex.bounds(cut[0])[0] > most:
            which = 0
        else:
            raise _Left
        made = tuple((n,) for n in ids.shape)
        cuts = (*x.cuts[:axis], *made, *x.cuts[axis + 1 :])

        def own(i: Index) -> Index:
            return (*i[:axis], which, *i[axis + ids.ndim :])

        return self._copies(
            node, cuts, lambda i: [self._name(x, own(i)), node.input[1]], candidate=lambda i: x.parts[own(i)].candidate
        )

    def _slice(self, node: NodeProto) -> Tensor:
        """Slice: of other axes, or of whole segments from the front or the back."""
        x, others = self._tensor(node.input[0]), self._others(node)
        if len(node.input) < 3:
            raise _Left
        sizes, rank = self._sizes(node.output[0]), len(x.cuts)
        axes = self.data(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        steps = self.data(node.input[4]) if len(node.input) > 4 and node.input[4] else None
        if (axes is None and len(node.input) > 3 and node.input[3]) or (steps is None and len(others) > 3):
            raise _Left
        starts = self.data(node.input[1])
        ends = self.data(node.input[2])
        count = next((len(v) for v in (axes, starts, ends) if v is not None), rank)
        on = [int(a) % rank for a in (axes if axes is not None else range(count))]
        cut = [a for a in on if len(x.cuts[a]) > 1]
        if not cut:
            return self._along(node, x, [c if len(c) > 1 else (n,) for c, n in zip(x.cuts, sizes, strict=True)], others)
        if len(on) != 1 or (steps is not None and int(steps[0]) != 1):
            raise _Left
        (axis,) = cut
        own, size = x.cuts[axis], sizes[axis]
        if starts is not None and int(starts[0]) == 0:
            kept = next((slice(0, k) for k in range(1, len(own) + 1) if total(own[:k]) == size), None)
        elif ends is not None and int(ends[0]) >= _ALL:
            kept = next((slice(k, None) for k in range(len(own)) if total(own[k:]) == size), None)
        else:
            kept = None
        if kept is None:
            raise _Left
        first = kept.start
        cuts = (*x.cuts[:axis], own[kept], *x.cuts[axis + 1 :])
        whole = kept.stop is None and first == 0
        parts = {i: x.parts[(*i[:axis], i[axis] + first, *i[axis + 1 :])] for i in indices(cuts)}
        moved = {i: p if whole else replace(p, known=_apart(p.known), joint=None) for i, p in parts.items()}
        return self._made(node.output[0], cuts, moved)

    def _concat(self, node: NodeProto) -> Tensor:
        """Concat: along the axis of segments, or of tensors that are divided alike."""
        given = [self._tensor(i) for i in node.input]
        rank = len(given[0].cuts)
        axis = _attribute(node, "axis", 0) % rank
        cuts = [max((t.cuts[k] for t in given), key=len) for k in range(rank)]
        given = [self._alike(i, t, cuts, axis) for i, t in zip(node.input, given, strict=True)]
        apart = any(len(t.cuts[axis]) > 1 for t in given) or node.output[0] in self._chosen_outputs()
        dtype = next((t.dtype for t in given if t.dtype), 0)
        if apart:
            cuts[axis] = tuple(n for t in given for n in t.cuts[axis])
            owners = [(t, k) for t in given for k in range(len(t.cuts[axis]))]
            parts = {}
            for i in indices(cuts):
                t, k = owners[i[axis]]
                parts[i] = replace(t.parts[(*i[:axis], k, *i[axis + 1 :])], joint=None, score=None)
                if parts[i].known != UNKNOWN and not _fixed(parts[i].known.all):
                    parts[i] = replace(parts[i], known=UNKNOWN if dtype != TensorProto.BOOL else Known(TRUTH, TRUTH))
            return self._made(node.output[0], cuts, parts)
        cuts[axis] = (total(t.cuts[axis][0] for t in given),)
        return self._copies(
            node,
            cuts,
            lambda i: [self._name(t, i) for t in given],
            candidate=lambda i: any(t.parts[i].candidate for t in given),
        )

    def _alike(self, name: str, tensor: Tensor, cuts: Sequence[Sizes], axis: int) -> Tensor:
        for k, want in enumerate(cuts):
            if k != axis and len(want) > 1:
                tensor = self._cut_to(name, tensor, k, want)
        return tensor

    def _chosen_outputs(self) -> set[str]:
        return {self.model.graph.node[k].output[0] for k in self.chosen}

    def _reduce(self, node: NodeProto) -> Tensor:
        """Sums and means; others along axes that are whole."""
        x, op = self._tensor(node.input[0]), operator(node)
        axes, rank = self._axes(node), len(x.cuts)
        if axes is None:
            raise _Left
        on, keep = sorted({a % rank for a in axes}), bool(_attribute(node, "keepdims", 1))
        left = [k for k in range(rank) if k not in on]
        cuts = [x.cuts[k] if k not in on else (1,) for k in range(rank) if keep or k not in on]
        across = [k for k in on if len(x.cuts[k]) > 1]
        if across and op not in ("ReduceSum", "ReduceMean"):
            raise _Left

        def place(i: Index) -> dict[int, int]:
            return dict(enumerate(i)) if keep else dict(zip(left, i, strict=True))

        if not across:
            return self._copies(
                node,
                cuts,
                lambda i: [self._name(x, tuple(place(i).get(k, 0) for k in range(rank))), *node.input[1:]],
                candidate=lambda i: x.parts[tuple(place(i).get(k, 0) for k in range(rank))].candidate,
            )
        parts = {}
        for i in indices(cuts):
            found = [
                j for j in x.parts if all(j[k] == place(i)[k] for k in left) and x.parts[j].known.all.number != 0
            ] or [next(iter(x.parts))]
            sums = [self.emit.reduce("ReduceSum", self._name(x, j), on, keep) for j in sorted(found)]
            total = sums[0]
            for other in sums[1:]:
                total = self.emit.add("Add", [total, other])
            if op == "ReduceMean":
                count = self._scalar(ex.product(x.sizes[k] for k in on))
                total = self.emit.add("Div", [total, self.emit.add("Cast", [count], {"to": x.dtype})])
            parts[i] = Part(total, UNKNOWN, None, any(x.parts[j].candidate for j in found))
        return self._made(node.output[0], cuts, parts)

    def _shape(self, node: NodeProto) -> Tensor:
        """Extents are known without the tensor."""
        sizes = self._tensor(node.input[0]).sizes
        wanted = sizes[slice(_attribute(node, "start", 0), _attribute(node, "end", len(sizes)))]
        self.emit.add("Identity", [self._vector(wanted)], output=node.output[0])
        made = Part(node.output[0], UNKNOWN, None, False)
        return Tensor((len(wanted),), ((len(wanted),),), {(0,): made}, TensorProto.INT64)


def _type_bounds(dtype: int) -> Known:
    return Known(TRUTH, TRUTH) if dtype == TensorProto.BOOL else UNKNOWN


def _apart(known: Known) -> Known:
    """What is known of a segment that is not beside the others any more: nothing about its place."""
    return Known(known.all, known.all)


def _whole_numbers(span: Span) -> Span:
    ends = [e for e in (span.low, span.high) if not isinstance(e, Expr)]
    return span if all(abs(e) != inf and e == int(e) for e in ends) else ANY


def total(sizes: Any) -> Size:
    """The sum of extents."""
    out: Size = 0
    for n in sizes:
        out = out + n
    return out


_FLOATS = frozenset(
    {int(TensorProto.FLOAT), int(TensorProto.DOUBLE), int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)}
)
_Handler = Callable[[Division, NodeProto], Tensor]
_SOURCES: dict[str, _Handler] = {
    "Range": Division._range,
    "ConstantOfShape": Division._constant_of_shape,
    "Expand": Division._expand,
}
_HANDLERS: dict[str, _Handler] = {
    **dict.fromkeys(_UNARY | _NARY, Division._elementwise),
    **dict.fromkeys(_NORMS, Division._norm),
    **dict.fromkeys(("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2"), Division._reduce),
    "MatMul": Division._mat_mul,
    "Softmax": Division._softmax,
    "Transpose": Division._transpose,
    "Unsqueeze": Division._unsqueeze,
    "Squeeze": Division._squeeze,
    "Reshape": Division._reshape,
    "Expand": Division._expand,
    "Trilu": Division._trilu,
    "Gather": Division._gather,
    "Slice": Division._slice,
    "Concat": Division._concat,
    "Shape": Division._shape,
}
