"""Tensors in segments: cutting them, joining them again, and writing copies of a node for every segment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from onnxrank import extents as ex
from onnxrank.emitter import Emitter
from onnxrank.extents import Expr
from onnxrank.facts import Facts
from onnxrank.graphs import attribute, names_in, versions
from onnxrank.layout import Layout
from onnxrank.operators import Trait, operator, traits
from onnxrank.segments import spans
from onnxrank.segments.spans import ANY, BOOLEAN, UNKNOWN, Known, Size, Span
from onnxrank.uses import Uses, changed_by
from onnxrank.values import Dims, Sources, canonical, symbols

Sizes = tuple[Size, ...]
Index = tuple[int, ...]
Data = Callable[[str], "NDArray[Any] | None"]

_MOST_CONSTANT = 1 << 20


class Left(Exception):
    """An operator that is left to the sequence as a whole."""


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
        merged: How many of the first axes the original has as one, `[N * L]` for `[N, L]`; they are kept apart here.
    """

    sizes: Sizes
    cuts: tuple[Sizes, ...]
    parts: Mapping[Index, Part]
    dtype: int
    merged: int = 1

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.cuts)

    @property
    def divided(self) -> bool:
        """Whether it is in several segments."""
        return len(self.parts) > 1

    def sizes_of(self, index: Index) -> Sizes:
        """Shape of a segment."""
        return tuple(c[k] for c, k in zip(self.cuts, index, strict=True))

    def own(self, index: Index) -> Index:
        """The number of the segment that belongs to one of a tensor this one is broadcast to."""
        mine = index[len(index) - self.rank :]
        return tuple(k if len(c) > 1 else 0 for c, k in zip(self.cuts, mine, strict=True))

    def at(self, index: Index) -> Part:
        """The segment that belongs to one of a tensor this one is broadcast to."""
        return self.parts[self.own(index)]


def indices(cuts: Iterable[Sizes]) -> Iterator[Index]:
    """The numbers of all segments."""
    return product(*(range(len(c)) for c in cuts))


def total(sizes: Iterable[Size]) -> Size:
    """The sum of extents."""
    out: Size = 0
    for n in sizes:
        out = out + n
    return out


def runs(candidate: Sequence[bool]) -> list[tuple[int, int]]:
    """Neighbours that are one segment: those that are the same for all candidates; from where to where each goes.

    Args:
        candidate: Per segment whether it may differ between candidates.
    """
    starts = [k for k, c in enumerate(candidate) if k == 0 or c or candidate[k - 1]]
    return list(zip(starts, [*starts[1:], len(candidate)], strict=True))


def _known_of(data: NDArray[Any]) -> Known:
    """What is known of a constant's entries."""
    if not data.size or data.size > _MOST_CONSTANT or data.dtype.kind not in "biuf":
        return UNKNOWN
    square = data.ndim > 1 and data.shape[-1] == data.shape[-2]
    found = [_span(data), _span(data.diagonal(axis1=-2, axis2=-1)) if square else _span(data)]
    return Known(*found)


def _known_between(data: NDArray[Any], row: int, column: int, single: bool) -> Known:
    """What is known of a leading block of a constant between two segments of both its axes, whatever their lengths.

    Args:
        data: The constant.
        row: The segment that the last axis but one is in.
        column: The segment of the last axis, which is divided like that: behind it all positions are greater.
        single: Whether that segment is of one position.
    """
    if row == column:
        diagonal = _span(data.diagonal(axis1=-2, axis2=-1))
        return Known(diagonal if single else _span(data), diagonal)
    whole = np.ones(data.shape[-2:], bool)
    found = data[..., np.triu(whole, 1) if row < column else np.tril(whole, -1)]
    return spans.of(_span(found)) if found.size else UNKNOWN


def _span(data: NDArray[Any]) -> Span:
    low, high = data.min(), data.max()
    kind = float if data.dtype.kind == "f" else int
    return ANY if low != low or high != high else Span(kind(low), kind(high))


class Division:
    """A graph whose sequences are being taken apart.

    Args:
        model: The model.
        facts: Its shapes and constants.
        dtypes: Element type per tensor, where known.
        inputs: Shapes of its inputs.
        candidate: Inputs that may differ between candidates.
        data: Entries of constants; None for what is none.
        places: The nodes that join a sequence, by their places.
    """

    def __init__(
        self,
        model: ModelProto,
        facts: Facts,
        dtypes: Mapping[str, int],
        inputs: Mapping[str, Dims],
        candidate: frozenset[str],
        data: Data,
        places: Sequence[int],
    ) -> None:
        graph = model.graph
        self.model, self.facts, self.data = model, facts, data
        self.opset = versions(model)[""]
        self.emit = Emitter(names_in(graph), self.opset)
        self.tensors: dict[str, Tensor] = {}
        self.seen: dict[str, Span] = {}
        """What is known of tensors that are left as they are."""
        self._dtypes, self._inputs = dtypes, inputs
        self._layout = Layout(Sources(), self.emit, facts.expressions)
        # Rows are counted by inputs that have them whatever becomes of the others.
        for name in sorted(inputs, key=lambda n: n not in candidate):
            for axis, d in enumerate(inputs[name]):
                held = next((f for f in d if isinstance(f, int)), 1)
                if len(symbols([d])) == 1:
                    self._layout.sizes.extent_of.setdefault(symbols([d])[0], (name, axis, held))
        self._depends = changed_by(graph.node, candidate)
        self._stored = {t.name: tuple(t.dims) for t in graph.initializer}
        self._cut: dict[tuple[str, tuple[Sizes, ...], int, Sizes], Tensor] = {}
        self._constants: dict[str, NDArray[Any]] = {}
        self._written: set[str] = set()
        self._uses = Uses(graph.node)
        self._outputs = {o.name for o in graph.output}
        self.lead: Sizes = ()
        """Axes that the node at hand has merged into its first one, and that are kept apart."""
        self.totals: dict[Size, Sizes] = {}
        """Per length of a sequence the lengths of its segments."""
        for k in places:
            node = graph.node[k]
            axis = attribute(node, "axis", 0) % len(facts.sizes[node.output[0]])
            cut = tuple(self.sizes(i)[axis] for i in node.input)
            joined = tuple(total(cut[a:b]) for a, b in runs([i in self._depends for i in node.input]))
            self.totals.setdefault(total(cut), joined)

    # --- reading -----------------------------------------------------------------------------------------------------

    def sizes(self, name: str) -> Sizes:
        """Shape of an original tensor, with axes apart that the node at hand has merged.

        Raises:
            Left: It is not proved.
        """
        found = self._original(name)
        return (*self.lead, *found[1:]) if self._merges(found) else found

    def _original(self, name: str) -> Sizes:
        """Shape of an original tensor."""
        found = self.facts.sizes.get(name, self._stored.get(name))
        if found is None and name in self._inputs:
            found = tuple(self.facts.size_of(d) for d in self._inputs[name])
        if found is None or any(s in self.facts.opaque for n in found for s in ex.symbols_of(n)):
            raise Left
        return tuple(found)

    def _merges(self, sizes: Sizes) -> bool:
        """Whether a shape's first axis is what the node at hand has merged."""
        return bool(self.lead and sizes) and sizes[0] == ex.product(self.lead)

    def dtype(self, name: str) -> int:
        """Element type of an original tensor; 0 if it is not known."""
        return self._dtypes.get(name, 0)

    def tensor(self, name: str) -> Tensor:
        """An original tensor, in segments or whole."""
        if name not in self.tensors:
            sizes = self.sizes(name)
            part = Part(name, self.known(name), None, name in self._depends)
            cuts = tuple((n,) for n in sizes)
            self.tensors[name] = Tensor(sizes, cuts, {(0,) * len(sizes): part}, self.dtype(name))
        return self.tensors[name]

    def operands(self, node: NodeProto) -> list[Tensor | None]:
        """A node's operands; None for what is left out."""
        return [self.tensor(i) if i else None for i in node.input]

    def touched(self, name: str) -> bool:
        """Whether a tensor is in segments, or is one of another tensor."""
        made = self.tensors.get(name)
        return made is not None and (made.divided or next(iter(made.parts.values())).name != name)

    def rest(self, node: NodeProto) -> list[str]:
        """Names of a node's operands but the first.

        Raises:
            Left: One of them is not there as a whole.
        """
        if any(self.touched(i) for i in node.input[1:]):
            raise Left
        return list(node.input[1:])

    def known(self, name: str) -> Known:
        """What is known of a tensor that is there as a whole."""
        if name in self.seen:
            return spans.of(self.seen[name])
        data = self.data(name)
        if data is None and name in self.facts.folded:  # the same along symbolic axes
            return spans.of(_known_of(self.facts.folded[name][1]).all)
        if data is None:
            return BOOLEAN if self.dtype(name) == TensorProto.BOOL else UNKNOWN
        return _known_of(data)

    def leading(self, name: str) -> NDArray[Any] | None:
        """The constant that a tensor is, or of which it has the first positions along some axes; None for others."""
        node, data = self._uses.producers.get(name), self.data(name)
        if data is not None or node is None or not node.input:
            return data
        if operator(node) == "Slice" and self.opset >= 10:
            starts, steps = self.data(node.input[1]), node.input[4:5]
            by = self.data(steps[0]) if steps and steps[0] else np.ones(1)
            first = starts is not None and by is not None and not starts.any() and bool((by == 1).all())
            return self.leading(node.input[0]) if first else None
        return None

    def reaches(self, name: str) -> bool:
        """Whether a tensor cut to the length of a sequence has all of it wherever the model runs.

        It meets entries of the whole sequence before anything else reads it, and would not be broadcast to fewer.
        """

        def judge(node: NodeProto, of: str) -> bool | None:
            made = self.facts.sizes.get(node.output[0], ())
            ends = [made[k] for k in self._cut_axes(of) if -k <= len(made)]
            if Trait.ELEMENTWISE not in traits(node) or len(ends) < len(self._cut_axes(of)):
                return False
            if all(n in self.totals for n in ends):
                return True
            return None if all(self.segments(n) is not None for n in ends) else False

        def join(tensor: str, answers: list[bool]) -> bool:
            return bool(answers) and tensor not in self._outputs and all(answers)

        return not self._cut_axes(name) or self._uses.behind(name, "meets the sequence", judge, join)

    def _cut_axes(self, name: str) -> list[int]:
        """Axes of a constant that is cut to the length of a sequence, counted from the last."""
        sizes = self.facts.sizes.get(name, ())
        return [k - len(sizes) for k, n in enumerate(sizes) if n not in self.totals and self.segments(n) is not None]

    def segments(self, size: Size) -> Sizes | None:
        """The segments of a sequence that has a length, or would where a constant is cut to it; None where none has."""
        return next((cut for n, cut in self.totals.items() if n == size or ex.is_cut_of(size, n)), None)

    # --- writing -----------------------------------------------------------------------------------------------------

    def name(self, tensor: Tensor, index: Index) -> str:
        """The tensor of a segment, zeros written out."""
        held = tensor.parts[index].name
        return self.zeros(tensor, index) if held is None else held

    def zeros(self, tensor: Tensor, index: Index) -> str:
        """Zeros of a segment's shape."""
        return self.emit.add("Expand", [self.zero(tensor.dtype), self.vector(tensor.sizes_of(index))])

    def zero(self, dtype: int) -> str:
        """The number 0."""
        return self.emit.constant(np.zeros((), helper.tensor_dtype_to_np_dtype(dtype)))

    def _dims(self, sizes: Sequence[Size]) -> Dims:
        """A shape as the rewriter has it."""
        dims = []
        for n in sizes:
            c, found = self.facts.extent(n)
            whole = n if len(found) > 1 else None
            dims.append(canonical([self.facts.symbol_of(whole)] if isinstance(whole, Expr) else [c, *found]))
        return tuple(dims)

    def vector(self, sizes: Sequence[Size]) -> str:
        """A shape as an int64 vector."""
        return self._layout.sizes.vector(self._dims(sizes))

    def scalar(self, size: Size) -> str:
        """An extent as a scalar."""
        return self._layout.sizes.scalar(size)

    def factor(self, tensor: Tensor, index: Index, inner: int) -> str:
        """The tensor of a segment as an operand of a product along an axis that may have no entries."""
        return self._layout.factor(self.name(tensor, index), self._dims(tensor.sizes_of(index)), inner)

    def positions(self, start: Size, count: Size) -> str:
        """`[start, ..., start + count - 1]`."""
        if not isinstance(start, Expr) and not isinstance(count, Expr):
            return self.emit.constant(np.arange(start, start + count, dtype=np.int64))
        if count == 1:
            return self.vector((start,))
        ends = [self.scalar(start), self.scalar(start + count), self.emit.constant(np.array(1, np.int64))]
        return self.emit.add("Range", ends)

    def made(self, output: str, cuts: Sequence[Sizes], parts: Mapping[Index, Part]) -> Tensor:
        """An original tensor of which all segments are there.

        Raises:
            Left: They do not have the shape that is proved of it.
        """
        sizes = tuple(map(total, cuts))
        proved = self.sizes(output)
        if len(sizes) != len(proved) or any(
            n != m and not ex.is_cut_of(m, n) for n, m in zip(sizes, proved, strict=True)
        ):
            raise Left
        merged = len(self.lead) if self._merges(self._original(output)) else 1
        return Tensor(sizes, tuple(cuts), parts, self.dtype(output), merged)

    def copies(
        self,
        node: NodeProto,
        cuts: Sequence[Sizes],
        operands: Callable[[Index], Sequence[str]],
        candidate: Callable[[Index], bool],
        known: Callable[[Index], tuple[Known, Known | None]] = lambda _: (UNKNOWN, None),
    ) -> Tensor:
        """A copy of a node for every segment of its result.

        Args:
            node: The node.
            cuts: How its result is cut.
            operands: The copy's inputs.
            candidate: Whether a segment may differ between candidates.
            known: What is known of a segment, and of what it adds to scores.
        """
        (output,) = (o for o in node.output if o)
        parts = {}
        for i in indices(cuts):
            entries, score = known(i)
            if entries.all.number == 0:
                parts[i] = Part(None, entries, score, False)
                continue
            made = self.copy(node, operands(i), i)
            parts[i] = Part(made, entries, score, candidate(i))
        return self.made(output, cuts, parts)

    def copy(self, node: NodeProto, operands: Sequence[str], index: Index) -> str:
        """A copy of a node that reads other tensors; the name of what it makes."""
        output = next(o for o in node.output if o)
        made = self.emit.fresh(f"{output}/segment{''.join(map(str, index))}")
        self.emit.copy(node, operands, [made])
        return made

    def along(self, node: NodeProto, x: Tensor, cuts: Sequence[Sizes], others: Sequence[str]) -> Tensor:
        """A copy per segment of an operator whose result is divided as its operand is, axes in order."""
        own = dict(zip(indices(cuts), sorted(x.parts), strict=True))
        return self.copies(node, cuts, lambda i: [self.name(x, own[i]), *others], lambda i: x.parts[own[i]].candidate)

    def moves(self, node: NodeProto, x: Tensor, order: Sequence[int | None], others: Sequence[str]) -> Tensor:
        """A copy per segment of an operator that puts axes elsewhere.

        Args:
            node: The operator.
            x: Its operand.
            order: Per axis of the result the axis that it was; None for a new one.
            others: The node's further inputs.
        """
        places = {x.rank - 1 - a: len(order) - 1 - k for k, a in enumerate(order) if a is not None}

        def own(i: Index) -> Index:
            at = {a: k for a, k in zip(order, i, strict=True) if a is not None}
            return tuple(at.get(a, 0) for a in range(x.rank))

        def known(i: Index) -> tuple[Known, Known | None]:
            p = x.parts[own(i)]
            return p.known.moved(places), None if p.score is None else p.score.moved(places)

        return self.copies(
            node,
            [x.cuts[a] if a is not None else (1,) for a in order],
            lambda i: [self.name(x, own(i)), *others],
            lambda i: x.parts[own(i)].candidate,
            known,
        )

    # --- cutting and joining -----------------------------------------------------------------------------------------

    def cut(self, name: str, tensor: Tensor, axis: int, cut: Sizes) -> Tensor:
        """A tensor with an axis, whole so far, in segments; positions that are not there fail at run time.

        Args:
            name: The original tensor.
            tensor: It, cut along other axes perhaps.
            axis: The axis.
            cut: Lengths of the segments.

        Raises:
            Left: It is in other segments.
        """
        if tensor.cuts[axis] == cut:
            return tensor
        if len(tensor.cuts[axis]) > 1:
            raise Left
        key = (name, tensor.cuts, axis, cut)
        if key not in self._cut:
            starts = [total(cut[:k]) for k in range(len(cut))]
            parts = {}
            for i, part in tensor.parts.items():
                for k, (start, n) in enumerate(zip(starts, cut, strict=True)):
                    held = self.name(tensor, i)
                    proved = tensor.sizes[axis] == total(cut)
                    parts[(*i[:axis], k, *i[axis + 1 :])] = self._stretch(held, part, axis, start, n, proved)
            sizes = (*tensor.sizes[:axis], total(cut), *tensor.sizes[axis + 1 :])
            cuts = (*tensor.cuts[:axis], cut, *tensor.cuts[axis + 1 :])
            data = self.leading(name) if cuts[-2:] == (cut, cut) else None
            if data is not None and self.data(name) is None and data.size <= _MOST_CONSTANT:
                parts = {
                    i: replace(p, known=_known_between(data, i[-2], i[-1], cut[i[-1]] == 1)) for i, p in parts.items()
                }
            self._cut[key] = Tensor(sizes, cuts, parts, tensor.dtype)
        return self._cut[key]

    def _stretch(self, name: str, part: Part, axis: int, start: Size, count: Size, proved: bool) -> Part:
        """Some positions of a tensor, of which entries are known where it is a constant; `proved` if they are there."""
        data = self._constants.get(name, self.data(name))
        if data is not None and not isinstance(start, Expr) and not isinstance(count, Expr):
            block = data.take(np.arange(start, start + count), axis)
            made = self.emit.constant(block)
            self._constants[made] = block
            return Part(made, _known_of(block), None, False)
        if proved and count != 1 and self.opset >= 10:
            ends = [self.vector((start,)), self.vector((start + count,)), self.emit.constant(np.array([axis]))]
            made = self.emit.add("Slice", [name, *ends])
        else:
            made = self.emit.add("Gather", [name, self.positions(start, count)], {"axis": axis})
        known = part.known if part.known.all.fixed else UNKNOWN
        return Part(made, known.anywhere(), None, part.candidate)

    def join(self, name: str) -> None:
        """Joins a tensor's segments again, under its own name."""
        if not self.touched(name) or name in self._written:
            return
        self._written.add(name)
        made = self.tensors[name]
        rows = {i: self.name(made, i) for i in made.parts}
        axes = [k for k, c in enumerate(made.cuts) if len(c) > 1]
        flat = made.merged > 1
        for axis in axes[::-1]:
            joined: dict[Index, list[str]] = {}
            for i in sorted(rows):
                joined.setdefault((*i[:axis], 0, *i[axis + 1 :]), []).append(rows[i])
            output = name if axis == axes[0] and not flat else None
            rows = {i: self.emit.add("Concat", names, {"axis": axis}, output=output) for i, names in joined.items()}
        if flat:
            shape = self.vector((ex.product(made.sizes[: made.merged]), *made.sizes[made.merged :]))
            self.emit.add("Reshape", [*rows.values(), shape], output=name)
        elif not axes:
            self.emit.add("Identity", list(rows.values()), output=name)
