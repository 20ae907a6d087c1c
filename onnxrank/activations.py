"""Activations with learnt slopes, in fewer steps and by operators whose kernels take many entries at a time.

onnxruntime's PRelu takes entries one after the other on CPUs and branches on their signs, which takes twenty times as
long as a Relu. The same entries, to the last bit:

    prelu(x; a) = leaky_relu(x; a)            for one slope; a product in front of it takes that in
    prelu(x; a) = max(x, a x)                 for slopes above 0, up to 1
    prelu(x; a) = max(x, 0) + a min(x, 0)     for any other

Dice (Zhou et al., Deep Interest Network, 2018) is written as it is defined, in five steps behind its sigmoid p. As a
sum of two products that have x in common it takes three:

    a (1 - p) x + p x = x ((1 - a) p + a)

where x is finite: of an infinite one the sum is no number, where the product may be one. So it is taken where x and p
come of ids and tables alone, by steps that keep what is finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from onnxrank import cost, runtime
from onnxrank.emitter import Emitted, Emitter
from onnxrank.graphs import attribute
from onnxrank.operators import Trait, operator, traits
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import Level, Origin, Source
from onnxrank.written import Written, entries

NAME = "activation"
_MOST = 1 << 16
"""Slopes that are not too many to look at."""
_LARGEST = 8.0
"""Coefficients of a sum up to which rounding them costs no more than a few units in the last place of its terms."""
_STEPS = 16
"""Steps of a product that are looked at."""
_WHOLE = Trait.BOOLEAN | Trait.EXTENTS
"""Gives conditions or extents, not numbers."""
_KEEPING = Trait.SMOOTH | Trait.MOVEMENT | Trait.CHOICE | Trait.CAST
"""Makes finite numbers of finite ones."""


def shorten(rw: Rewrite) -> None:
    """Writes activations in other steps, wherever that pays.

    Args:
        rw: A rewrite that has written its nodes.
    """
    nodes, sources = rw.emit.nodes, rw.sources.named()
    blends: _Blends | None = None
    for k, e in enumerate(list(nodes)):
        made = sources.get(e.proto.output[0])
        if made is None or made.dtype != TensorProto.FLOAT or made.level is Level.CONSTANT:
            continue
        found: _Prelu | _Blend | None = None
        if operator(e.proto) == "PRelu":
            found = _prelu(rw, e.proto)
        elif operator(e.proto) == "Add":
            blends = blends or _Blends(rw, Written(rw))
            found = blends.found(e.proto)
        if found is None:
            continue
        with rw.emit.at(Origin(e.origin, e.proto.output[0], NAME)):
            if rw.decide(NAME, _ways(made, found)) == TAKE:
                nodes[k] = replace(e, proto=found.last(rw.emit, e), rule=NAME)


def _ways(made: Source, found: _Prelu | _Blend) -> list[Alternative]:
    """What it costs to leave steps over so many entries, and to write others."""
    size, each = 4 * entries(made.dims), made.level is Level.CANDIDATE
    was, now = found.steps
    left = size * was * cost.CPU.rate(found.kind).byte
    taken = size * now * cost.CPU.rate("elementwise").byte
    return [
        Alternative.at(LEAVE, "", cost.estimate(launches=was), left, each),
        Alternative.at(TAKE, found.exactness, cost.estimate(launches=now), taken, each),
    ]


# --- PReLU -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Prelu:
    """A PRelu.

    Attributes:
        x: What it is of.
        a: Its slopes.
        slopes: The same as numbers.
        computed: Whether nodes compute them.
    """

    x: str
    a: str
    slopes: NDArray[Any]
    computed: bool
    kind = "serial"
    exactness = "exact"

    @property
    def steps(self) -> tuple[int, int]:
        """How many steps there are, and how many there would be."""
        if (self.slopes == self.slopes.flat[0]).all() and not self.computed:
            return 1, 1
        # With a slope of 0, an infinite entry would give a number that is none.
        return 1, 2 if ((self.slopes > 0) & (self.slopes <= 1)).all() else 4

    def last(self, emit: Emitter, e: Emitted) -> NodeProto:
        """The last node, in the place of the PRelu; those before it are added."""
        made, name = list(e.proto.output), e.proto.name
        _, steps = self.steps
        if steps == 1:
            return helper.make_node("LeakyRelu", [self.x], made, name, alpha=float(self.slopes.flat[0]))
        if steps == 2:
            return helper.make_node("Max", [self.x, emit.add("Mul", [self.x, self.a])], made, name)
        below = emit.add("Min", [self.x, emit.constant(np.array(0, np.float32))])
        return helper.make_node("Add", [emit.add("Relu", [self.x]), emit.add("Mul", [below, self.a])], made, name)


def _prelu(rw: Rewrite, node: NodeProto) -> _Prelu | None:
    """A PRelu of constant slopes; infinite ones would make numbers of 0 that are none."""
    slopes = rw.stored(node.input[1], _MOST)
    if slopes is None or not slopes.size or not np.isfinite(slopes).all():
        return None
    return _Prelu(node.input[0], node.input[1], slopes, rw.is_computed(node.input[1]))


# --- Dice ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Numbers:
    """Constants; what is computed of them is left to nodes, so that it is as exact as the rest of the model.

    Attributes:
        data: The numbers.
        name: The tensor that stores them; empty for those that are computed, and for whole numbers that nothing stores.
        op: The operator that computes them; empty for none.
        of: Its operands.
    """

    data: NDArray[np.float64]
    name: str = ""
    op: str = ""
    of: tuple[_Numbers, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether this is a number that is known as it is."""
        return not self.name and not self.op

    def __mul__(self, other: _Numbers) -> _Numbers:
        if self.is_whole and other.is_whole:
            return _Numbers(self.data * other.data)
        for one, rest in ((self, other), (other, self)):
            if one.is_whole and one.data in (0, 1):
                return rest if one.data else one
        return _Numbers(self.data * other.data, op="Mul", of=(self, other))

    def __add__(self, other: _Numbers) -> _Numbers:
        if self.is_whole and other.is_whole:
            return _Numbers(self.data + other.data)
        for none, rest in ((self, other), (other, self)):
            if none.is_whole and not none.data:
                return rest
        return _Numbers(self.data + other.data, op="Add", of=(self, other))

    def written(self, emit: Emitter) -> str:
        """The tensor that holds them."""
        if self.op:
            return emit.add(self.op, [n.written(emit) for n in self.of])
        return self.name or emit.constant(self.data.astype(np.float32))


_NONE, _ONE, _MINUS = (_Numbers(np.array(n, np.float64)) for n in (0, 1, -1))


@dataclass(frozen=True)
class _Line:
    """`slope p + offset`, of numbers or of one for each column.

    Attributes:
        p: The tensor; None for an offset alone.
        slope: Its factor.
        offset: What is added.
        steps: The nodes that make this, which nothing else reads.
    """

    p: str | None
    slope: _Numbers
    offset: _Numbers
    steps: int = 0

    def scaled(self, by: _Numbers) -> _Line:
        """The same times some numbers."""
        return replace(self, slope=self.slope * by, offset=self.offset * by)


@dataclass(frozen=True)
class _Blend:
    """A sum of two products of one tensor, `x (slope p + offset)`.

    Attributes:
        x: The tensor.
        line: What it is multiplied by.
    """

    x: str
    line: _Line
    kind = "elementwise"
    exactness = "reassociates"

    @property
    def steps(self) -> tuple[int, int]:
        """How many steps there are, and how many there would be."""
        return self.line.steps, 1 + bool((self.line.slope.data != 1).any()) + bool(self.line.offset.data.any())

    def last(self, emit: Emitter, e: Emitted) -> NodeProto:
        """The last node, in the place of the sum; those before it are added."""
        assert self.line.p is not None
        factor, slope, offset = self.line.p, self.line.slope, self.line.offset
        if (slope.data != 1).any():
            factor = emit.add("Mul", [factor, slope.written(emit)])
        if offset.data.any():
            factor = emit.add("Add", [factor, offset.written(emit)])
        return helper.make_node("Mul", [self.x, factor], list(e.proto.output), e.proto.name)


@dataclass(frozen=True)
class _Blends:
    """The sums that were written.

    Attributes:
        rw: The rewrite.
        written: What it has written.
        known: Which tensors are finite whatever callers give, of those that were asked for, and of what these read.
    """

    rw: Rewrite
    written: Written
    known: dict[str, bool] = field(default_factory=dict)

    def found(self, node: NodeProto) -> _Blend | None:
        """The two products of one tensor that an Add adds, if these take more steps than one does."""
        if len(set(node.input)) < 2:
            return None
        (first, one), (second, other) = (self._factors(i) for i in node.input)
        for x in dict.fromkeys(f for f in first if f in second and self._numbers(f) is None):
            lines = [self._line(_without(factors, x)) for factors in (first, second)]
            a, b = lines
            if a is None or b is None or len({line.p for line in lines if line is not None} - {None}) != 1:
                continue
            p = a.p or b.p
            made = _Line(p, a.slope + b.slope, a.offset + b.offset, a.steps + b.steps + one + other + 1)
            size = max(float(np.abs(c.data).max()) for line in (a, b, made) for c in (line.slope, line.offset))
            blend = _Blend(x, made)
            was, now = blend.steps
            if now < was and size <= _LARGEST and self._finite(x) and p is not None and self._finite(p):
                return blend
        return None

    def _finite(self, name: str) -> bool:
        """Whether a tensor is finite whatever callers give: their floats do not go into it, nor what may overflow."""
        waiting, seen = [name], {name}
        while waiting:
            at = waiting.pop()
            read = [] if self.known.get(at) else self._read(at)
            if read is None or self.known.get(at) is False:
                self.known[name] = False
                return False
            waiting += [i for i in read if i not in seen]
            seen.update(read)
        self.known.update(dict.fromkeys(seen, True))
        return True

    def _read(self, name: str) -> list[str] | None:
        """What has to be finite for a tensor to be; None where that is not enough, or where callers give it."""
        source, node = self.written.source(name), self.written.maker(name)
        if source is not None and source.dtype not in runtime.FLOATS:
            return []
        if self.written.level(name) is Level.CONSTANT:
            # Large tables have learnt entries.
            data = self.rw.stored(name, _MOST)
            return [] if data is None or np.isfinite(data).all() else None
        if node is None:
            return None
        if traits(node) & _WHOLE or (
            Trait.CAST in traits(node) and attribute(node, "to", TensorProto.FLOAT) not in runtime.FLOATS
        ):
            return []
        return [i for i in node.input if i] if traits(node) & _KEEPING else None

    def _numbers(self, name: str) -> _Numbers | None:
        """Numbers that are constant."""
        data = self.rw.stored(name, _MOST)
        return None if data is None or not data.size else _Numbers(data.astype(np.float64), name)

    def _factors(self, name: str) -> tuple[list[str], int]:
        """What is multiplied to a tensor, and in how many steps that nothing else needs."""
        out, waiting, steps = [], [name], 0
        while waiting:
            at = waiting.pop()
            node = self.written.own_maker(at)
            if node is not None and operator(node) == "Mul" and steps < _STEPS:
                waiting += node.input
                steps += 1
            else:
                out.append(at)
        return out, steps

    def _line(self, factors: Sequence[str]) -> _Line | None:
        """A product as a line in one tensor; None where there are several in it."""
        numbers = [(f, self._numbers(f)) for f in factors]
        rest = [f for f, found in numbers if found is None]
        if len(rest) > 1:
            return None
        line = self._sum(rest[0]) if rest else _Line(None, _NONE, _ONE)
        for _, found in numbers:
            line = line if found is None else line.scaled(found)
        return line

    def _sum(self, name: str) -> _Line:
        """A tensor as a line in the one that numbers were added to, or that was taken from them."""
        steps = [*self._steps(name)]
        line = _Line(steps[-1][1] if steps else name, _ONE, _NONE, len(steps))
        for sign, _, added in steps[::-1]:
            line = line.scaled(sign)
            line = replace(line, offset=line.offset + added)
        return line

    def _steps(self, name: str) -> Iterator[tuple[_Numbers, str, _Numbers]]:
        """Signs, tensors and numbers that are added, which a tensor comes of step by step, the last step first."""
        for _ in range(_STEPS):
            node = self.written.own_maker(name)
            if node is None or operator(node) not in ("Add", "Sub", "Neg"):
                return
            if operator(node) == "Neg":
                name = node.input[0]
                yield _MINUS, name, _NONE
                continue
            a, b = (self._numbers(i) for i in node.input)
            if (a is None) == (b is None):
                return
            name = node.input[a is not None]
            if a is not None:
                yield _MINUS if operator(node) == "Sub" else _ONE, name, a
            elif b is not None:
                yield _ONE, name, b * _MINUS if operator(node) == "Sub" else b


def _without(factors: Sequence[str], x: str) -> list[str]:
    """Factors but for one."""
    at = list(factors).index(x)
    return [*factors[:at], *factors[at + 1 :]]
