"""What is added to all scores of a product alike becomes part of its keys, and so do masks.

    q K' + b = [q 1] [K b]'

A bias of positions, or a mask, takes a pass over every candidate's scores where it is added to them, and next to
nothing as one more column of the keys, which are the request's. Where a softmax reads the scores, what a mask hides is
brought near as well: weights that are so small that they are denormal numbers take processors long (`underflow`). A
hidden key becomes the mean of the visible ones, so that its score is the mean of theirs, and never above the largest:

    k_hidden = mean(k_visible), b_hidden = mean(b_visible) - 50:  weight <= exp(-50)

and no row's largest score has to be known. In floating point the mean of n numbers of at most K, a product of d of
them with a row q, and the sum of that and b are each off by units in the last place, u = 2^-24, of what they are made
of (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), which is more than 50 where scores are of
billions. Hidden scores are therefore lower by what visible and hidden ones may be off by together, at any size:

    q k + b + e (K |q|_1 + max|b|),  e = -2 u (n + 2 d + 8)  where k is hidden

with |q|_1 and e K as one more column of both. Which keys are hidden is found per request, by the distance that proves
it elsewhere (`segments.spans.distance`). Where all are masked alike none is hidden, and scores stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank import cost, underflow
from onnxrank.cost import Bill
from onnxrank.emitter import Emitted, Emitter
from onnxrank.graphs import attribute
from onnxrank.masks import MOST, Masks
from onnxrank.operators import Trait, operator, traits
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.segments import spans
from onnxrank.values import Dims, Level, Origin, Source, extents, symbols
from onnxrank.written import Written, entries

RULE = "dot"
"""The rule that it is a decision of, where nothing is hidden; `underflow` otherwise."""
_UNIT = 2.0**-24
"""Unit roundoff of float32."""
_BELOW = 50.0
"""How far below the mean of the visible scores hidden ones are: a weight of 2e-22, of which a thousand are lost in
rounding even in double precision, and which is no denormal number where no score is 37 above the mean."""
_BYTES = 4


def extend(rw: Rewrite) -> None:
    """Makes additions to scores part of the keys, wherever that pays.

    Args:
        rw: A rewrite that has written its nodes.
    """
    additions = [(k, e) for k, e in enumerate(rw.emit.nodes) if operator(e.proto) in ("Add", "Gemm", "Where")]
    if not additions:
        return
    graph = _Scores(rw)
    for k, e in additions:
        found = graph.extended(e)
        if found is not None:
            rw.emit.nodes[k] = found


@dataclass(frozen=True)
class _Addition:
    """Something that all rows of scores meet alike.

    Attributes:
        scores: What it is added to.
        bias: What is added, of a shape whose last axis alone is not 1; empty where keys are hidden by a condition.
        condition: Where scores give way to a number; empty for none.
        hides: Whether the condition hides where it holds.
        number: What hidden scores are then.
    """

    scores: str
    bias: str = ""
    condition: str = ""
    hides: bool = True
    number: float = 0.0


@dataclass(frozen=True)
class _Hidden:
    """What a mask comes to, per request; all of `[1, L]`, but for the weights.

    Attributes:
        where: Which keys are hidden.
        weights: One over the number of visible keys for each of them, `[L, 1]`.
        bias: What is added to scores.
        margin: What rounding may make of scores of 1, negative, for hidden keys; 0 for others.
    """

    where: str
    weights: str
    bias: str
    margin: str


@dataclass(frozen=True)
class _Product:
    """A product that makes scores, and what lies between both.

    Attributes:
        node: The product.
        steps: Factors of all scores, each with its operator, the last one first.
        reshape: What brings it into another shape, if anything does.
    """

    node: NodeProto
    steps: tuple[tuple[str, str], ...]
    reshape: NodeProto | None


@dataclass
class _Scores:
    """The scores that were written.

    Attributes:
        rw: The rewrite.
    """

    rw: Rewrite

    def __post_init__(self) -> None:
        self._written = Written(self.rw)
        self._hidden: dict[tuple[_Addition, int], _Hidden] = {}

    @cached_property
    def _masks(self) -> Masks:
        return Masks((e.proto for e in self.rw.emit.nodes), partial(self.rw.stored, most=MOST))

    def extended(self, e: Emitted) -> Emitted | None:
        """The last node of scores of longer keys, in the place of an addition; None where it stays."""
        made = self._written.source(e.proto.output[0])
        if e.origin >= len(self.rw.nodes):
            return None  # it brings outputs into their shape, and is no site of the model
        if made is None or made.level is not Level.CANDIDATE or made.dtype != TensorProto.FLOAT or len(made.dims) < 2:
            return None
        for addition in self._additions(e.proto, made):
            product = self._product(e.proto, addition, made)
            keys = None if product is None else self._written.dims(product.node.input[1])
            if product is None or keys is None or any(symbols(keys[:-1])):
                continue
            if keys[-1:] != made.dims[-1:]:
                continue  # a Reshape on the way takes columns apart
            share, far = self._masked(e.proto, addition)
            if share and (far < spans.distance(made.dtype)[0] or not self._is_softmax_behind(e.proto, made)):
                return None  # it may be that it hides nothing
            if not share and (addition.condition or operator(e.proto) == "Gemm"):
                return None
            if self.rw.uses(underflow.NAME if share else RULE):
                return self._decided(e, made, addition, product, keys, share)
        return None

    def _additions(self, node: NodeProto, made: Source) -> Iterator[_Addition]:
        """What a node does to all rows of scores, in the ways that it may be read."""
        if operator(node) == "Add":
            for a, b in ((0, 1), (1, 0)):
                if self._is_row(node.input[b], made):
                    yield _Addition(node.input[a], node.input[b])
        elif operator(node) == "Gemm":
            if len(node.input) == 3 and not node.attribute and self._is_row(node.input[2], made):
                yield _Addition("", node.input[2])
        elif self._is_row(node.input[0], made):
            for number, scores, hides in ((1, 2, True), (2, 1, False)):
                data = self.rw.stored(node.input[number], 1)
                if data is not None and data.size == 1 and (data < 0).all():
                    yield _Addition(node.input[scores], "", node.input[0], hides, float(data.reshape(())))

    def _is_row(self, name: str, made: Source) -> bool:
        """Whether a tensor is the same for all rows, and of the request."""
        dims = self._written.dims(name)
        return (
            dims is not None
            and 0 < len(dims) <= len(made.dims)
            and not any(dims[:-1])
            and dims[-1:] == made.dims[-1:] != ((),)
            and self._written.level(name) <= Level.REQUEST
        )

    def _product(self, node: NodeProto, addition: _Addition, made: Source) -> _Product | None:
        """The product that an addition is behind, of what is the candidate's and what is the request's."""
        written, name, reshape = self._written, addition.scores, None
        steps: list[tuple[str, str]] = []
        found = node if not name else None
        while found is None:
            step = written.maker(name)
            if step is None or written.only_reader(name) is None:
                return None
            if operator(step) == "MatMul":
                found = step
            elif operator(step) == "Reshape" and reshape is None and written.keeps_columns(step, made.dims[-1:]):
                name, reshape = step.input[0], step
            elif traits(step) & Trait.SCALING and (number := self.rw.stored(step.input[1], 1)) is not None:
                if number.size != 1:
                    return None
                steps.append((operator(step), step.input[1]))
                name = step.input[0]
            else:
                return None
        left, right = found.input[:2]
        if written.level(right) is not Level.REQUEST or written.level(left) is not Level.CANDIDATE:
            return None
        return _Product(found, tuple(steps), reshape)

    def _masked(self, node: NodeProto, addition: _Addition) -> tuple[float, float]:
        """The share of scores that an addition hides, and how far below the others they are at least."""
        if not addition.condition:
            return self._masks.added(node, addition.bias)
        return self._masks.added(node, node.input[1 if addition.hides else 2])

    def _is_softmax_behind(self, node: NodeProto, made: Source) -> bool:
        """Whether nothing but a softmax along the last axis reads scores, which may lie beside others there."""
        rank, behind = len(made.dims), self._written.only_reader(node.output[0])
        while behind is not None and self._keeps_rows(behind, made.dims[-1:], rank):
            rank = self._written.rank(behind.output[0]) or 0
            behind = self._written.only_reader(behind.output[0])
        if behind is not None and operator(behind) == "Concat" and attribute(behind, "axis", 0) in (-1, rank - 1):
            behind = self._written.only_reader(behind.output[0])
        if behind is None or operator(behind) != "Softmax":
            return False
        return attribute(behind, "axis", -1 if self.rw.emit.opset >= 13 else 1) in (-1, rank - 1)

    def _keeps_rows(self, node: NodeProto, columns: Dims, rank: int) -> bool:
        """Whether a node brings rows into another shape or order, and leaves each as it is."""
        if operator(node) == "Transpose":
            return bool((attribute(node, "perm") or [0])[-1] == rank - 1)
        return operator(node) == "Reshape" and self._written.keeps_columns(node, columns)

    def _decided(
        self,
        e: Emitted,
        made: Source,
        addition: _Addition,
        product: _Product,
        keys: Dims,
        share: float,
    ) -> Emitted | None:
        """Scores of longer keys, if these pay; `share` of the scores are hidden."""
        emit = self.rw.emit
        rule = underflow.NAME if share else RULE
        wide = self._written.rank(product.node.input[0])
        if wide is None:
            return None
        known = (replace(addition, scores=""), extents(keys)[-2])
        with emit.at(Origin(e.origin, e.proto.output[0], rule)):
            ways = _ways(made, keys, share, wide == len(keys) == 2, known in self._hidden)
            if self.rw.decide(rule, ways) != TAKE:
                return None
            left, right = product.node.input[:2]
            for op, number in product.steps[::-1]:
                right = emit.add(op, [right, number])
            if share:
                if known not in self._hidden:
                    self._hidden[known] = self._seen(*known)
                hidden = self._hidden[known]
                scores = self._longer(left, wide, _nearer(emit, hidden, right, len(keys)), keys, hidden.bias)
            else:
                bias = emit.add("Reshape", [addition.bias, emit.constant(np.array([1, -1], np.int64))])
                scores = self._longer(left, wide, [right], keys, bias)
            if product.reshape is not None:
                scores = emit.reshaped_as(scores, product.reshape)
        last = next(n.proto for n in reversed(emit.nodes) if scores in n.proto.output)
        own = NodeProto()
        own.CopyFrom(last)
        own.output[0] = e.proto.output[0]
        own.name = e.proto.name
        return replace(e, proto=own, rule=e.rule or rule)

    def _longer(self, left: str, wide: int, right: Sequence[str], keys: Dims, bias: str) -> str:
        """The product of rows and keys, and a bias `[1, L]`.

        Args:
            left: The rows.
            wide: Number of their axes.
            right: The keys; and what the sum of a row's sizes meets, which becomes a column of the rows.
            keys: Shape of the keys.
            bias: What is added to all rows of scores.
        """
        emit, rank = self.rw.emit, len(keys)
        flat, columns = wide == rank == 2, [left]
        if right[1:]:
            columns.append(_sizes(emit, left, wide))
        if not flat:
            columns.append(self._ones(left, wide, columns[1:]))
            if rank > 2:
                bias = emit.add("Expand", [bias, emit.constant(np.array([*extents(keys[:-2]), 1, 1], np.int64))])
            right = [*right, bias]
        rows = columns[0] if len(columns) == 1 else emit.add("Concat", columns, {"axis": wide - 1})
        longer = right[0] if len(right) == 1 else emit.add("Concat", right, {"axis": rank - 2})
        return emit.add("Gemm", [rows, longer, bias]) if flat else emit.add("MatMul", [rows, longer])

    def _ones(self, left: str, wide: int, sizes: Sequence[str]) -> str:
        """A one for every row: of a shape that is known, or made of the sums of their sizes, which are not below 0."""
        emit, dims, tensors = self.rw.emit, self._written.dims(left), self.rw.layout.sizes
        one = emit.number(1.0, np.float32, wide)
        if not sizes and dims is not None and all(map(tensors.has, symbols(dims[:-1]))):
            return emit.add("Expand", [one, tensors.vector((*dims[:-1], ()))])
        size = sizes[0] if sizes else _sizes(emit, left, wide)
        return emit.add("Min", [emit.add("Add", [size, one]), one])

    def _seen(self, addition: _Addition, inner: int) -> _Hidden:
        """Which keys a mask hides, what the visible ones count for, and what is added then.

        A number that stands in the place of scores is added to those of keys that are 0: where it hides all of them,
        that is the mean of no keys.

        Args:
            addition: The mask.
            inner: Entries of a key.
        """
        add, emit = self.rw.emit.add, self.rw.emit

        def number(value: float) -> str:
            return emit.number(value, np.float32, 2)

        def in_row(name: str) -> str:
            return add("Reshape", [name, emit.constant(np.array([1, -1], np.int64))])

        if addition.condition:
            where = in_row(addition.condition)
            if not addition.hides:
                where = add("Not", [where])
            row = add("Where", [where, number(addition.number), number(0.0)])
        else:
            row = in_row(addition.bias)
        largest = emit.reduce("ReduceMax", row, [1], True)
        least, share = spans.distance(TensorProto.FLOAT)
        gap = add("Max", [add("Mul", [add("Abs", [largest]), number(share)]), number(least)])
        below = add("Less", [row, add("Sub", [largest, gap])])
        if not addition.condition:
            where = below
        visible = add("Cast", [add("Not", [where])], {"to": int(TensorProto.FLOAT)})
        count = add("Max", [emit.reduce("ReduceSum", visible, [1], True), number(1.0)])
        weights = add("Reshape", [add("Div", [visible, count]), emit.constant(np.array([-1, 1], np.int64))])
        clean = add("Where", [below, number(0.0), row])
        terms = add("Add", [count, number(2.0 * inner + 8)])
        margin = add("Where", [where, add("Mul", [terms, number(-2 * _UNIT)]), number(0.0)])
        off = add("Mul", [margin, emit.reduce("ReduceMax", add("Abs", [clean]), [1], True)])
        near = add("Sub", [add("MatMul", [clean, weights]), number(_BELOW)])
        return _Hidden(where, weights, add("Where", [below, add("Add", [near, off]), clean]), margin)


def _sizes(emit: Emitter, rows: str, rank: int) -> str:
    """The sum of the sizes of each row's entries, in two steps, which are faster than a ReduceL1."""
    return emit.reduce("ReduceSum", emit.add("Abs", [rows]), [rank - 1], True)


def _nearer(emit: Emitter, hidden: _Hidden, keys: str, rank: int) -> list[str]:
    """Keys of which hidden ones are the mean of the others, and how far rounding takes their scores off, by `|q|_1`.

    What hidden keys are is not looked at: they may be no numbers, as those are that are divided by a length of 0.
    """
    visible = emit.add("Where", [hidden.where, emit.number(0.0, np.float32, 2), keys])
    mean = emit.add("MatMul", [visible, hidden.weights])
    largest = emit.reduce("ReduceMax", emit.add("Abs", [visible]), [rank - 2, rank - 1], True)
    return [emit.add("Where", [hidden.where, mean, visible]), emit.add("Mul", [hidden.margin, largest])]


def _ways(made: Source, keys: Dims, share: float, flat: bool, known: bool) -> list[Alternative]:
    """What it costs to pass over scores, and to make keys longer.

    Args:
        made: The scores.
        keys: Shape of the keys.
        share: Share of the scores that a mask hides.
        flat: Whether it is a product of two matrices.
        known: Whether it is known already what the mask hides.
    """
    count, rows = entries(made.dims), entries(made.dims[:-1])
    passed, launches = _moved("broadcast", _BYTES * count, rows), 1
    if share:
        passed += min(count * cost.BOUNDED, count * share * cost.CPU.denormal)
        launches += 6
    own = tuple(entries((d,)) for d in keys)
    size, inner = prod(own), own[-2]
    once = [Bill("copy", _BYTES * size, prod(own[:-1]))]
    each = 0.0
    if share:
        once += [Bill("where", _BYTES * size, prod(own[:-1]))] * 2 + [Bill("transpose", _BYTES * size, size)]
        once += [Bill("reduce", _BYTES * size, prod(own[:-2]))]
        once += [Bill("stack", _BYTES * inner, prod(own[:-2]), size)] + [Bill("other")] * (5 if known else 24)
        each = _moved("elementwise", _BYTES * rows * inner, 1) + _moved("reduce", _BYTES * rows * inner, rows)
    more = int(share > 0) + (not flat)
    if more:
        each += (
            _moved("copy", _BYTES * rows * (inner + more), rows * (1 + more))
            + count * more * cost.CPU.rate("stack").mac
        )
        once += [Bill("other")] * (2 + more)
    return [
        Alternative(LEAVE, "", cost.estimate(launches=launches), passed),
        Alternative(TAKE, "reassociates", sum(map(cost.CPU.seconds, once)), each),
    ]


def _moved(kind: str, written: int, runs: int) -> float:
    """Seconds per candidate of a pass over entries, beside its launch."""
    rate = cost.CPU.rate(kind)
    return written * rate.byte + runs * rate.run
