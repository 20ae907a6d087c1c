"""What is added to all scores of a product alike becomes part of its keys, and so do masks.

    q K' + b = [q 1] [K b]'

A bias of positions, or a mask, takes a pass over every candidate's scores where it is added to them, and next to
nothing as one more column of the keys, which are the request's. Where a softmax reads the scores, what a mask hides is
brought near as well: weights that are so small that they are denormal numbers take processors long (`underflow`). A
hidden key becomes the mean of the visible ones, so that its score is the mean of theirs, and never above the largest:

    k_hidden = mean(k_visible), b_hidden = m - max(50, 1e-5 |m|), m = mean(b_visible):  weight <= exp(-50)

It holds of every row whose scores are rounded by less than 50, which float32 does up to 1e8 (beyond, rounding alone
decides between the visible ones), and no row's largest score has to be known. Which keys are hidden is found per
request, by the distance that proves it elsewhere (`segments.spans.distance`). Where all are masked alike none is
hidden, and scores stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

import numpy as np
from onnx import NodeProto, TensorProto

from onnxrank import cost, underflow
from onnxrank.cost import Bill
from onnxrank.emitter import Emitted
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
_BELOW = 50.0
"""How far below the mean of the visible scores hidden ones are: a weight of 2e-22, of which a thousand are lost in
rounding even in double precision, and which is no denormal number where no score is 37 above the mean."""
_SINCE = 11
"""The opset from which on Pad takes what it adds as inputs."""
_BYTES = 4


def extend(rw: Rewrite) -> None:
    """Makes additions to scores part of the keys, wherever that pays.

    Args:
        rw: A rewrite that has written its nodes.
    """
    additions = [(k, e) for k, e in enumerate(rw.emit.nodes) if operator(e.proto) in ("Add", "Gemm", "Where")]
    if not additions or rw.emit.opset < _SINCE:
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
    """

    where: str
    weights: str
    bias: str


@dataclass(frozen=True)
class _Product:
    """A product that makes scores, and what lies between both.

    Attributes:
        node: The product.
        steps: Factors of all scores, each with its operator, the last one first.
        shape: The shape that it is brought into; empty where it stays as it is.
    """

    node: NodeProto
    steps: tuple[tuple[str, str], ...]
    shape: str


@dataclass
class _Scores:
    """The scores that were written.

    Attributes:
        rw: The rewrite.
    """

    rw: Rewrite

    def __post_init__(self) -> None:
        self._written = Written(self.rw)
        self._hidden: dict[_Addition, _Hidden] = {}

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
            rank = None if product is None else self._written.rank(product.node.input[1])
            if product is None or rank is None or keys is None or any(symbols(keys[:-2])):
                continue
            if keys[-1:] != made.dims[-1:]:
                continue  # a Reshape on the way takes columns apart
            share, far = self._masked(e.proto, addition)
            if share and (far < spans.distance(made.dtype)[0] or not self._is_softmax_behind(e.proto, made)):
                return None  # it may be that it hides nothing
            if not share and (addition.condition or operator(e.proto) == "Gemm"):
                return None
            if self.rw.uses(underflow.NAME if share else RULE):
                return self._decided(e, made, addition, product, keys, rank, share)
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
        written, name, shape = self._written, addition.scores, ""
        steps: list[tuple[str, str]] = []
        found = node if not name else None
        while found is None:
            step = written.maker(name)
            if step is None or written.only_reader(name) is None:
                return None
            if operator(step) == "MatMul":
                found = step
            elif operator(step) == "Reshape" and not shape and written.keeps_columns(step, made.dims[-1:]):
                name, shape = step.input[0], step.input[1]
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
        return _Product(found, tuple(steps), shape)

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
        rank: int,
        share: float,
    ) -> Emitted | None:
        """Scores of longer keys, if these pay; `share` of the scores are hidden."""
        emit = self.rw.emit
        rule = underflow.NAME if share else RULE
        wide = self._written.rank(product.node.input[0])
        if wide is None:
            return None
        flat = wide == rank == 2
        with emit.at(Origin(e.origin, e.proto.output[0], rule)):
            if (
                self.rw.decide(rule, _ways(made, keys, share, flat, replace(addition, scores="") in self._hidden))
                != TAKE
            ):
                return None
            left, right = product.node.input[:2]
            for op, number in product.steps[::-1]:
                right = emit.add(op, [right, number])
            if share:
                right, bias = self._nearer(addition, right)
            else:
                bias = emit.add("Reshape", [addition.bias, emit.constant(np.array([1, -1], np.int64))])
            own = NodeProto()
            if flat:
                scores = emit.add("Gemm", [left, right, bias])
            else:
                if rank > 2:
                    batch = np.array([*extents(keys[:-2]), 1, 1], np.int64)
                    bias = emit.add("Expand", [bias, emit.constant(batch)])
                one = emit.constant(np.array(1, np.float32))
                ends = emit.constant(np.array([0] * (2 * wide - 1) + [1], np.int64))
                right = emit.add("Concat", [right, bias], {"axis": rank - 2})
                scores = emit.add("MatMul", [emit.add("Pad", [left, ends, one]), right])
            if product.shape:
                scores = emit.add("Reshape", [scores, product.shape])
        last = next(n.proto for n in reversed(emit.nodes) if scores in n.proto.output)
        own.CopyFrom(last)
        own.output[0] = e.proto.output[0]
        own.name = e.proto.name
        return replace(e, proto=own, rule=e.rule or rule)

    def _nearer(self, addition: _Addition, keys: str) -> tuple[str, str]:
        """Keys of which hidden ones are the mean of the others, and what is added to scores, `[1, L]`."""
        emit = self.rw.emit
        known = replace(addition, scores="")
        if known not in self._hidden:
            self._hidden[known] = self._seen(addition)
        found = self._hidden[known]
        mean = emit.add("MatMul", [keys, found.weights])
        return emit.add("Where", [found.where, mean, keys]), found.bias

    def _seen(self, addition: _Addition) -> _Hidden:
        """Which keys a mask hides, what the visible ones count for, and what is added then.

        A number that stands in the place of scores is added to those of keys that are 0: where it hides all of them,
        that is the mean of no keys.
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
        mean = add("MatMul", [clean, weights])
        apart = add("Max", [add("Mul", [add("Abs", [mean]), number(underflow.SHARE)]), number(_BELOW)])
        near = add("Sub", [mean, apart])
        return _Hidden(where, weights, add("Where", [below, near, clean]))


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
    passed, launches = _moved("broadcast", _BYTES * count, rows), 1.0
    if share:
        passed += min(count * cost.BOUNDED, count * share * cost.CPU.denormal)
        launches += 6
    own = tuple(entries((d,)) for d in keys)
    size, inner = prod(own), own[-2]
    once = [Bill("copy", _BYTES * size, prod(own[:-1]))]
    each = 0.0
    if share:
        once += [Bill("where", _BYTES * size, prod(own[:-1])), Bill("transpose", _BYTES * size, size)]
        once += [Bill("stack", _BYTES * inner, prod(own[:-2]), size)] + [Bill("other")] * (2 if known else 16)
    if not flat:
        once += [Bill("other")] * 2
        each = _moved("broadcast", _BYTES * rows * (inner + 1), rows) + count * cost.CPU.rate("stack").mac
    return [
        Alternative(LEAVE, "", cost.estimate(launches=launches), passed),
        Alternative(TAKE, "reassociates", sum(map(cost.CPU.seconds, once)), each),
    ]


def _moved(kind: str, written: int, runs: int) -> float:
    """Seconds per candidate of a pass over entries, beside its launch."""
    rate = cost.CPU.rate(kind)
    return written * rate.byte + runs * rate.run
