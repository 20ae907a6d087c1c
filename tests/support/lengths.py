"""Random programs with lengths that differ from request to request, and many more operators than `programs` has.

Weights and inputs are small whole numbers, so that results are exact; what no arithmetic gives exactly (a softmax, a
mean, a logarithm) is marked as such, read by little else, and held against the original within a tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from random import Random

import numpy as np
import onnx
from helpers import Given, feeds, run
from onnx import ModelProto, helper
from onnxruntime import InferenceSession
from programs import LIMIT, Dim, N, Tensor, Writer

from onnxrank.graphs import captured, subgraphs

COUNTS = (0, 1, 2, 3, 7, 33, 129, 512)
LENGTHS = (0, 1, 2, 5, 50, 51, 300)
_MOST_ENTRIES = 1 << 21
INEXACT = 99
"""Bits of entries that are not multiples of a power of 2."""
_FLOAT, _INT32 = 1, 6


@dataclass(frozen=True)
class Program:
    """A random model.

    Attributes:
        model: The model.
        inputs: Its inputs.
        shapes: Shapes of all its tensors.
        inexact: Outputs that are not exact.
        vague: What must not be empty: axes along which a matrix is multiplied with a batch of matrices. Of products
            over no entries onnxruntime leaves the memory as it was.
    """

    model: ModelProto
    inputs: tuple[Given, ...]
    shapes: tuple[tuple[Dim, ...], ...]
    inexact: frozenset[str]
    vague: tuple[Dim, ...] = ()

    @property
    def lengths(self) -> list[str]:
        """Names of the lengths."""
        return sorted({d for g in self.inputs for d in g.shape if isinstance(d, str)})

    def entries(self, sizes: Mapping[str, int]) -> int:
        """Entries of the largest tensor."""
        return max(prod(self.extent(d, sizes) for d in dims) for dims in self.shapes)

    @staticmethod
    def extent(dim: Dim, sizes: Mapping[str, int]) -> int:
        """Extent of an axis."""
        return prod(sizes.get(str(f), f) for f in dim)

    def points(self, seed: int, count: int) -> Iterator[tuple[int, dict[str, int]]]:
        """Some numbers of candidates, each with values of the lengths, at which tensors are not too large."""
        random = Random(seed)
        found = 0
        while found < count:
            n, at = random.choice(COUNTS), {name: random.choice(LENGTHS) for name in self.lengths}
            sizes = {N: n, **at}
            if all(self.extent(d, sizes) for d in self.vague) and self.entries(sizes) <= _MOST_ENTRIES:
                found += 1
                yield n, at


class LengthWriter(Writer):
    """Appends random operators to a graph whose tensors may have axes of candidates and of two lengths."""

    operators = tuple(
        """concat concat concat slice split gather transpose transpose unsqueeze squeeze tile unary unary binary binary
        binary binary binary constant reduce fc fc fc regroup regroup regroup lengthen lengthen lengthen count count
        count along along product product product summed summed compared stepped whole padded variadic smooth attend
        normal quantised lookup cutoff cutoff numbered doubled""".split()
    )

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.lengths = self.pick([["L"], ["L"], ["L", "M"]])
        self.twice = self.number(0, 3) == 0
        self.vague: list[Dim] = []

    def may_hold(self, dims: Sequence[Dim]) -> bool:
        """At most three symbols, and one of them twice in some programs only."""
        syms = [f for d in dims for f in d if isinstance(f, str)]
        return len(syms) < 4 and (len(set(syms)) == len(syms) or self.twice)

    # --- inputs ----------------------------------------------------------------------------------------------------

    def declare(self, level: str) -> None:
        length, name = self.pick(self.lengths), f"{level[0]}{len(self.inputs)}"
        kind = "matrix" if level == "mixed" else self.pick(
            ["matrix", "fields", "scalar", "sequence", "sequence", "ids", "mask", "mask", "idlist"]
        )  # fmt: skip
        shape: tuple[int | str, ...] = {
            "matrix": (self.pick([self.width, self.fields, 5]),),
            "fields": (self.fields, self.width),
            "scalar": (),
            "sequence": (length, self.width),
            "ids": (length,),
            "mask": (length,),
            "idlist": (self.fields,),
        }[kind]
        if kind == "fields" and self.number(0, 12) == 0:
            shape = (0, self.width)
        columns: tuple[int, ...] = ()
        if level == "mixed":
            columns = tuple(sorted(self.random.sample(range(int(shape[0])), self.number(1, int(shape[0]) - 1))))
        made = Given(name, shape, level, columns, 5 if kind in ("ids", "idlist") else None)
        made.declare(self.graph)
        self.inputs.append(made)
        if level == "candidate":
            self.candidate = name
        dims: list[Dim] = [() if level == "once" else (N,), *((d,) for d in shape)]
        if made.ids is None:
            self.put(name, dims, 3)
        else:
            table = self.graph.const(self.weights(5, self.width))
            self.put(self.graph.op("Gather", table, name, axis=0), [*dims, (self.width,)], 2)

    def extent(self, symbol: str) -> str:
        """A one-element tensor with the value of a symbol."""
        for g in self.inputs:
            shape = [N if g.level != "once" else 1, *g.shape]
            if symbol in shape and not (symbol == N and g.level != "candidate"):
                return self.graph.op(
                    "Gather", self.graph.op("Shape", g.name), self.graph.ints(shape.index(symbol)), axis=0
                )
        raise LookupError(symbol)

    def target(self, dims: Sequence[Dim]) -> str:
        """A shape, as exporters write it: constants, and products of extents that are computed."""
        parts = []
        for d in dims:
            syms, size = [f for f in d if isinstance(f, str)], prod(f for f in d if isinstance(f, int))
            part = None
            for s in syms:
                part = self.extent(s) if part is None else self.graph.op("Mul", part, self.extent(s))
            if part is not None and size != 1:
                part = self.graph.op("Mul", part, self.graph.ints(size))
            parts.append(part or self.graph.ints(size))
        return self.graph.op("Concat", *parts, axis=0) if parts else self.graph.const(np.zeros(0), np.int64)

    def has(self, symbol: str) -> bool:
        """Whether an input tells the value of a symbol."""
        return symbol == N or any(symbol in g.shape for g in self.inputs)

    # --- operators -------------------------------------------------------------------------------------------------

    def exact(self, x: Tensor, bound: int, bits: int | None = None) -> bool:
        """Whether a result with this bound is exact."""
        return bound << (x.bits if bits is None else bits) <= LIMIT

    def size(self, x: Tensor, axis: int) -> int:
        """Largest extent of an axis."""
        return prod(max(LENGTHS) if isinstance(f, str) else f for f in x.dims[axis])

    def op_regroup(self, x: Tensor) -> None:
        """A Reshape: neighbouring factors merged or taken apart."""
        dims: list[Dim] = []
        for f in (f for d in x.dims for f in d):
            whole = f
            if f in (4, 6) and self.number(0, 2) == 0:
                dims.append((2,))
                whole = f // 2
            if dims and self.number(0, 2) == 0 and len(dims[-1]) < 2:
                last = dims[-1]
                both_int = last and isinstance(last[0], int) and isinstance(whole, int)
                dims[-1] = (last[0] * whole,) if both_int else (*last, whole)
            else:
                dims.append((whole,))
        if self.number(0, 4) == 0:
            dims.insert(self.number(0, len(dims)), ())
        moving = [k for k, d in enumerate(dims) if any(isinstance(f, str) for f in d)]
        if not dims or len(dims) > 5 or 0 in x.sizes:
            return
        if len(moving) < 2 and self.number(0, 1):
            goal = self.graph.ints(*(-1 if k in moving else prod(d) for k, d in enumerate(dims)))
        else:
            goal = self.target(dims)
        self.put(self.graph.op("Reshape", x.name, goal), dims, x.bound, x.bits)

    def op_lengthen(self, x: Tensor) -> None:
        """Expand along an axis of 1 to a length, to the number of candidates, or to the shape of another tensor."""
        axes = [k for k, d in enumerate(x.dims) if d == ()]
        if not axes:
            if x.rank > 3:
                return
            axes = [self.number(0, x.rank)]
            x = Tensor(self.graph.on_axes("Unsqueeze", x.name, axes), (*x.dims[: axes[0]], (), *x.dims[axes[0] :]),
                       x.bound, x.bits)  # fmt: skip
        axis, symbol = self.pick(axes), self.pick([*self.lengths, *self.lengths, N])
        dims = [(symbol,) if k == axis else d for k, d in enumerate(x.dims)]
        if not self.has(symbol) or not self.may_hold(dims):
            return
        form = self.number(0, 2)
        if form == 0:
            goal = self.target(dims)
        elif form == 1:
            goal = self.target([d if k == axis else () for k, d in enumerate(dims)])
        else:
            ones = self.graph.op("ConstantOfShape", self.target([d if k == axis else () for k, d in enumerate(dims)]),
                                 value=helper.make_tensor("one", _FLOAT, [1], [1.0]))  # fmt: skip
            self.put(self.graph.op("Mul", x.name, ones), dims, x.bound, x.bits)
            return
        self.put(self.graph.op("Expand", x.name, goal), dims, x.bound, x.bits)

    def op_count(self, x: Tensor) -> None:
        """A reduction over one or two axes, of lengths rather than not, over the candidates now and then."""
        axes = [k for k, d in enumerate(x.dims) if d and (N not in d or self.number(0, 9) == 0)]
        moving = [k for k in axes if k not in x.fixed]
        if x.rank < 2 or not axes:
            return
        chosen = sorted({self.pick(moving or axes), *(self.some(axes, 1, 1) if self.number(0, 3) == 0 else [])})
        if len(chosen) == x.rank or 0 in (x.sizes[a] for a in chosen):
            return
        op, keep = (
            self.pick(["Sum", "Sum", "Sum", "Max", "Min", "SumSquare", "L1", "Mean", "LogSumExp", "L2"]),
            self.number(0, 1),
        )
        count = prod(512 if N in x.dims[a] else self.size(x, a) for a in chosen)
        bits, bound = x.bits, x.bound
        if op in ("Sum", "L1"):
            bound *= count
        elif op == "SumSquare":
            bits, bound = 2 * x.bits, x.bound**2 * count
        elif op in ("Mean", "LogSumExp", "L2"):
            bits, bound = INEXACT, x.bound * count
        if bits != INEXACT and op not in ("Max", "Min") and not self.exact(x, bound, bits):
            return
        if bits == INEXACT and x.bound > 100:
            return
        dims = [() if k in chosen else d for k, d in enumerate(x.dims) if keep or k not in chosen]
        self.put(self.graph.on_axes(f"Reduce{op}", x.name, chosen, keepdims=keep), dims, bound, bits)

    def op_along(self, x: Tensor) -> None:
        """What works along an axis and keeps it, or takes one position of it."""
        axes = [k for k, d in enumerate(x.dims) if N not in d and 0 not in d]
        if not axes or x.rank < 2:
            return
        axis = self.pick([k for k in axes if k not in x.fixed] or axes)
        op = self.pick(
            ["CumSum", "CumSum", "ArgMax", "ArgMin", "TopK", "Softmax", "LogSoftmax", "LpNormalization", "Trilu"]
        )
        g = self.graph
        if op == "CumSum" and self.exact(x, x.bound * self.size(x, axis)):
            how = {"reverse": self.number(0, 1), "exclusive": self.number(0, 1)}
            self.put(g.op(op, x.name, g.const(axis, np.int64), **how), x.dims, x.bound * self.size(x, axis), x.bits)
        elif op in ("ArgMax", "ArgMin") and x.bits != INEXACT:
            keep = self.number(0, 1)
            dims = [() if k == axis else d for k, d in enumerate(x.dims) if keep or k != axis]
            self.put(g.op("Cast", g.op(op, x.name, axis=axis, keepdims=keep), to=_FLOAT), dims, self.size(x, axis))
        elif op == "TopK" and x.bits != INEXACT:
            values, at = g.ops(op, 2, x.name, g.ints(1), axis=axis, largest=self.number(0, 1))
            self.put(values, self._cut(x, axis, 1), x.bound, x.bits)
            self.put(g.op("Cast", at, to=_FLOAT), self._cut(x, axis, 1), self.size(x, axis))
        elif op == "Trilu" and g.opset >= 14 and not any(N in d for d in x.dims[-2:]):
            self.put(g.op(op, x.name, upper=self.number(0, 1)), x.dims, x.bound, x.bits)
        elif op in ("Softmax", "LogSoftmax", "LpNormalization") and x.bound <= 100:
            if op == "LpNormalization" or g.opset >= 13 or axis == x.rank - 1:
                self.put(g.op(op, x.name, axis=axis), x.dims, 200, INEXACT)

    def op_product(self, x: Tensor) -> None:
        """MatMul of two computed values, of which one may have to be turned."""
        found = []
        for y in (v for v in self.values if v.rank >= 2 and x.rank >= 2):
            for turned in (False, True):
                rows, columns = y.dims[-2:] if not turned else y.dims[:-3:-1]
                if rows == x.dims[-1]:
                    found.append((y, turned, columns))
        if not found:
            return
        y, turned, columns = self.pick(found)
        lead = self._joined(Tensor("", x.dims[:-2], 1), Tensor("", y.dims[:-2], 1))
        size = 512 if N in x.dims[-1] else self.size(x, x.rank - 1)
        bound, bits = x.bound * y.bound * max(size, 1), x.bits + y.bits
        if lead is None or not self.exact(x, bound, bits) or not self.may_hold([*lead, x.dims[-2], columns]):
            return
        if (N in x.dims[-1] and self.number(0, 9)) or 0 in x.dims[-1]:
            return
        name = y.name
        if turned:
            name = self.graph.op("Transpose", name, perm=[*range(y.rank - 2), y.rank - 1, y.rank - 2])
        if x.rank < y.rank:
            self.vague.append(x.dims[-1])
        self.put(self.graph.op("MatMul", x.name, name), [*lead, x.dims[-2], columns], bound, bits)

    def op_summed(self, x: Tensor) -> None:
        """Einsum of two computed values over what they share, or part of that."""
        if self.graph.opset < 12 or any(len(d) > 1 or 0 in d for d in x.dims) or x.rank > 3:
            return
        letters = {d: c for c, d in zip("abcdefgh", dict.fromkeys(d for d in x.dims if d), strict=False)}
        if len(letters) < x.rank:
            return
        like = [v for v in self.values if v.rank < 4 and len(set(v.dims)) == v.rank and all(len(d) == 1 for d in v.dims)
                and 0 not in v.sizes]  # fmt: skip
        if not like:
            return
        y = self.pick(like)
        for d in y.dims:
            letters.setdefault(d, "abcdefgh"[len(letters)])
        shared = [d for d in x.dims if d in y.dims and N not in d]
        dropped = set(self.some(shared, 1, 2)) if shared else set()
        out = [d for d in letters if d not in dropped and d]
        size = prod(max(LENGTHS) if isinstance(d[0], str) else d[0] for d in dropped)
        bound, bits = x.bound * y.bound * size, x.bits + y.bits
        if not self.exact(x, bound, bits) or not out or len(out) > 4 or not self.may_hold(out):
            return
        self.random.shuffle(out)
        terms = ["".join(letters[d] for d in v.dims) for v in (x, y)]
        name = self.graph.op(
            "Einsum", x.name, y.name, equation=f"{','.join(terms)}->{''.join(letters[d] for d in out)}"
        )
        self.put(name, out, bound, bits)

    def _beside(self, x: Tensor) -> tuple[Tensor, list[Dim]] | None:
        """An exact value to be broadcast with another, and the shape of both; None where there is none."""
        matching = [v for v in self.values if self._joined(x, v) is not None and v.bits != INEXACT]
        if not matching or x.bits == INEXACT:
            return None
        y = self.partner(x, matching)
        dims = self._joined(x, y)
        return None if dims is None else (y, dims)

    def op_compared(self, x: Tensor) -> None:
        """A mask: where one value is less than, or equal to, another."""
        found = self._beside(x)
        if found is None:
            return
        y, dims = found
        g = self.graph
        test = g.op(
            self.pick(["Less", "Greater", "Equal"] + ["LessOrEqual", "GreaterOrEqual"] * (g.opset > 11)), x.name, y.name
        )
        if self.number(0, 2) == 0:
            test = g.op(self.pick(["And", "Or", "Xor"]), test, g.op("Less", x.name, g.const(1)))
        test = g.op("Not", test) if self.number(0, 2) == 0 else test
        self.put(g.op("Cast", test, to=_FLOAT), dims, 1)

    def op_stepped(self, x: Tensor) -> None:
        """An elementwise operator of one value that is exact."""
        if x.bits == INEXACT:
            return
        g, op = (
            self.graph,
            self.pick(["Floor", "Ceil", "Sign", "Clip", "PRelu", "Div", "Pow", "LeakyRelu", "Round", "Sub"]),
        )
        bits, bound, name = x.bits, x.bound, ""
        if op == "Clip":
            name = g.op(op, x.name, g.const(-1), g.const(2))
        elif op == "PRelu":
            like = [v for v in self.values if v.bits != INEXACT and (d := self._joined(x, v)) and tuple(d) == x.dims]
            if not like:
                return
            y = self.pick(like)
            bits, bound = x.bits + y.bits, x.bound * max(y.bound, 1)
            name = g.op(op, x.name, y.name)
        elif op == "Div":
            bits += 1
            name = g.op(op, x.name, g.const(2))
        elif op == "Pow":
            bits, bound = 2 * bits, bound**2
            name = g.op(op, x.name, g.const(2))
        elif op == "LeakyRelu":
            bits += 2
            name = g.op(op, x.name, alpha=0.25)
        elif op == "Sub":
            bound += 3
            name = g.op(op, g.const(3), x.name)
        else:
            name, bound = g.op(op, x.name), bound + 1
        if self.exact(x, bound, bits):
            self.put(name, x.dims, bound, bits)

    def op_whole(self, x: Tensor) -> None:
        """Whole numbers: division and means of those round towards 0."""
        if x.bits == INEXACT:
            return
        g, op = self.graph, self.pick(["Div", "ReduceMean", "ReduceSum", "Mul"])
        name, dims, bound = g.op("Cast", x.name, to=_INT32), list(x.dims), x.bound
        if op in ("Div", "Mul"):
            name = g.op(op, name, g.const(3, np.int32))
            bound *= 3
        else:
            axis = self._axis(x, 1)
            if axis is None or x.rank < 2 or not x.sizes[axis]:
                return
            bound *= x.sizes[axis]
            name, dims = g.on_axes(op, name, [axis], keepdims=1), self._cut(x, axis, 1)
        if self.exact(x, bound, 0):
            self.put(g.op("Cast", name, to=_FLOAT), dims, bound)

    def op_padded(self, x: Tensor) -> None:
        """Zeros around an axis of constant extent."""
        axis = self._axis(x, 0)
        if axis is None or x.sizes[axis] > 8:
            return
        before, after = self.number(0, 2), self.number(0, 1)
        pads = [0] * 2 * x.rank
        pads[axis], pads[x.rank + axis] = before, after
        dims = self._cut(x, axis, x.sizes[axis] + before + after)
        self.put(self.graph.op("Pad", x.name, self.graph.ints(*pads)), dims, x.bound, x.bits)

    def op_variadic(self, x: Tensor) -> None:
        """Operators of any number of operands."""
        found = self._beside(x)
        if found is None:
            return
        y, dims = found
        op, bits = self.pick(["Sum", "Max", "Min", "Mean"]), max(x.bits, y.bits)
        names = [x.name, y.name, *([x.name] if op in ("Sum", "Max", "Min") else [])]
        bits += op == "Mean"
        if self.exact(x, 3 * (x.bound + y.bound), bits):
            self.put(self.graph.op(op, *names), dims, 3 * (x.bound + y.bound), bits)

    def op_smooth(self, x: Tensor) -> None:
        """An elementwise operator that is not exact."""
        if x.bound > 20:
            return
        op = self.pick(["Sigmoid", "Tanh", "Exp", "Softplus", "Erf", "Softsign", "HardSigmoid", "Selu", "Elu", "Celu"])
        if op != "Celu" or self.graph.opset >= 12:
            self.put(self.graph.op(op, x.name), x.dims, 200, INEXACT)

    def op_normal(self, x: Tensor) -> None:
        """A layer normalisation, and a linear map behind it."""
        if x.rank < 2 or x.dims[-1] == () or x.rank - 1 not in x.fixed or x.bound > 100 or 0 in x.dims[-1]:
            return
        g, size = self.graph, x.sizes[-1]
        if g.opset >= 17 and self.number(0, 1):
            name = g.op(
                "LayerNormalization", x.name, g.const(self.weights(size)), g.const(self.weights(size)), epsilon=0.1
            )
        else:
            away = g.op("Sub", x.name, g.on_axes("ReduceMean", x.name, [-1], keepdims=1))
            square = g.op("Mul", away, away) if self.number(0, 1) else g.op("Pow", away, g.const(2))
            spread = g.op("Add", g.on_axes("ReduceMean", square, [-1], keepdims=1), g.const(0.1))
            name = g.op("Div", away, g.op("Sqrt", spread))
        if self.number(0, 1):
            name = g.op("MatMul", name, g.const(self.weights(size, 3)))
            self.put(name, self._cut(x, x.rank - 1, 3), 50, INEXACT)
        else:
            self.put(name, x.dims, 50, INEXACT)

    def op_attend(self, x: Tensor) -> None:
        """Queries, keys and values: the candidate on a history, or a history on itself, masked or not."""
        keys = [v for v in self.values if v.rank == 3 and v.dims[1] and N not in v.dims[1] and v.bits != INEXACT
                and v.dims[2] == x.dims[-1] and 0 not in v.sizes]  # fmt: skip
        if x.rank not in (2, 3) or not keys or x.bits == INEXACT or N in x.dims[-1]:
            return
        g, k = self.graph, self.pick(keys)
        q = g.on_axes("Unsqueeze", x.name, [1]) if x.rank == 2 else x.name
        dims = [x.dims[0], (), x.dims[1]] if x.rank == 2 else list(x.dims)
        lead = self._joined(Tensor("", tuple(dims[:1]), 1), Tensor("", k.dims[:1], 1))
        if lead is None or x.bound * k.bound > 50 or not self.may_hold([*lead, dims[1], k.dims[1]]):
            return
        turned = g.op("Transpose", k.name, perm=[0, 2, 1])
        scores = g.op("Mul", g.op("MatMul", q, turned), g.const(0.125))
        masks = [v for v in self.values if v.rank == 2 and v.dims == (k.dims[0], k.dims[1]) and v.bits != INEXACT]
        form = self.number(0, 2)
        if masks and form:
            seen = g.on_axes("Unsqueeze", g.op("Greater", self.pick(masks).name, g.const(0)), [1])
            if form == 1:
                scores = g.op("Where", seen, scores, g.const(-1e4))
            else:
                low = g.op("Mul", g.op("Sub", g.const(1), g.op("Cast", seen, to=_FLOAT)), g.const(-1e4))
                scores = g.op("Add", scores, low)
        weights = g.op("Softmax", scores, axis=2) if self.number(0, 2) else g.op("Sigmoid", scores)
        self.put(g.op("MatMul", weights, k.name), [*lead, dims[1], k.dims[2]], 300 * k.bound, INEXACT)

    def op_quantised(self, x: Tensor) -> None:
        """To 8 bits and back."""
        if x.bits > 1 or x.bound > 60 or self.graph.opset < 13:
            return
        g = self.graph
        how = [g.const(0.5), g.const(self.pick([0, 7]), np.int8)]
        self.put(g.op("DequantizeLinear", g.op("QuantizeLinear", x.name, *how), *how), x.dims, 70, 1)

    def op_lookup(self, x: Tensor) -> None:
        """The last position of an axis, counted backwards or by its extent."""
        axes = [k for k, d in enumerate(x.dims) if len(d) == 1 and d[0] in self.lengths and self.has(d[0])]
        if not axes or x.rank < 2:
            return
        axis, g = self.pick(axes), self.graph
        at = g.ints(-1) if self.number(0, 1) else g.op("Sub", self.extent(x.dims[axis][0]), g.ints(1))
        self.put(g.op("Gather", x.name, at, axis=axis), self._cut(x, axis, 1), x.bound, x.bits)

    def op_cutoff(self, x: Tensor) -> None:
        """Some positions of a history, or some candidates, counted from either end; then their sum."""
        axes = [k for k, d in enumerate(x.dims) if len(d) == 1 and isinstance(d[0], str)]
        if not axes or x.rank < 2 or 0 in x.sizes:
            return
        axis, g = self.pick(axes), self.graph
        start, end = self.pick(
            [(0, 3), (0, 50), (-50, 1 << 62), (-2, 1 << 62), (1, 1 << 62), (0, -1), (2, 60), (-9, -3)]
        )
        name = g.op("Slice", x.name, g.ints(start), g.ints(end), g.ints(axis), g.ints(self.pick([1, 1, 1, 2])))
        if self.number(0, 2) == 0:
            ones = g.op("ConstantOfShape", g.op("Shape", name), value=helper.make_tensor("one", _FLOAT, [1], [1.0]))
            name = g.op("Add", name, ones)
            x = Tensor(x.name, x.dims, x.bound + (1 << x.bits), x.bits)
        size = self.size(x, axis) if N not in x.dims[axis] else 512
        bound = x.bound * size
        if not self.exact(x, bound):
            return
        keep = self.number(0, 1)
        dims = [() if k == axis else d for k, d in enumerate(x.dims) if keep or k != axis]
        self.put(g.on_axes("ReduceSum", name, [axis], keepdims=keep), dims, bound, x.bits)

    def op_numbered(self, x: Tensor) -> None:
        """Positions along a length, by Range, stepped or not; or how many there are, as a number."""
        axes = [k for k, d in enumerate(x.dims) if len(d) == 1 and d[0] in self.lengths and self.has(d[0])]
        if not axes:
            return
        axis, g = self.pick(axes), self.graph
        count = g.op("Cast", self.extent(x.dims[axis][0]), to=_FLOAT)
        bound = x.bound + (max(LENGTHS) << x.bits)
        if not self.exact(x, bound):
            return
        if self.number(0, 1):
            self.put(g.op("Add", x.name, count), x.dims, bound, x.bits)
            return
        zero = g.const(0, np.int64)
        places = g.op("Range", zero, g.op("Squeeze", self.extent(x.dims[axis][0])), g.const(1, np.int64))
        column = g.op("Reshape", g.op("Cast", places, to=_FLOAT), g.ints(-1, *[1] * (x.rank - axis - 1)))
        self.put(g.op("Add", x.name, column), x.dims, bound, x.bits)

    def op_doubled(self, x: Tensor) -> None:
        """Two histories one behind the other, or one padded; then their sum."""
        axes = [k for k, d in enumerate(x.dims) if len(d) == 1 and d[0] in self.lengths]
        if not axes or x.rank < 2 or 0 in x.sizes:
            return
        axis, g = self.pick(axes), self.graph
        bound = 2 * x.bound * self.size(x, axis)
        like = [v for v in self.values if v.rank == x.rank and v.dims[:axis] + v.dims[axis + 1 :]
                == x.dims[:axis] + x.dims[axis + 1 :] and v.bound <= x.bound and v.bits <= x.bits]  # fmt: skip
        if not self.exact(x, bound):
            return
        if self.number(0, 2) and like:
            name = g.op("Concat", x.name, self.pick(like).name, axis=axis)
        else:
            pads = [0] * (2 * x.rank)
            pads[axis + x.rank * self.number(0, 1)] = self.number(1, 4)
            name = g.op("Pad", x.name, g.ints(*pads))
        dims = [d for k, d in enumerate(x.dims) if k != axis]
        self.put(g.on_axes("ReduceSum", name, [axis], keepdims=0), dims, bound, x.bits)


def finished(w: LengthWriter) -> Program:
    """The program that was written: some of what nobody reads become its outputs."""
    read = {i for node in w.graph.nodes for i in (*node.input, *(c for g in subgraphs(node) for c in captured(g)))}
    ends = [v for v in w.values if v.name not in read and v.name not in {i.name for i in w.inputs}]
    if not ends:
        w.put(w.graph.op("Neg", w.values[0].name), w.values[0].dims, w.values[0].bound)
        ends = w.values[-1:]
    ends = ends[-w.number(1, 4) :]
    for v in ends:
        w.graph.output(v.name, [
            (d[0] if len(d) == 1 else f"rows{k}") if any(isinstance(f, str) for f in d) else n
            for k, (d, n) in enumerate(zip(v.dims, v.sizes, strict=True))
        ])  # fmt: skip
    inexact = frozenset(v.name for v in ends if v.bits >= INEXACT)
    return Program(w.graph.model(), tuple(w.inputs), tuple(v.dims for v in w.values), inexact, tuple(w.vague))


def reduces(model: ModelProto) -> bool:
    """Whether a model reduces: of no rows onnxruntime gives wrong shapes, or crashes."""
    return any(n.op_type.startswith("Reduce") or n.op_type in _NOT_EMPTY for n in model.graph.node)


_NOT_EMPTY = {
    "GRU",
    "LSTM",
    "RNN",
    "TopK",
    "ArgMax",
    "ArgMin",
    "Gather",
    "FeatureVectorizer",
    "LpNormalization",
    "LayerNormalization",
    "Einsum",
    "CumSum",
}


def difference(
    made: Program, before: InferenceSession, after: InferenceSession, interface: str, n: int, at: Mapping[str, int]
) -> str | None:
    """Where two models differ at a number of candidates and lengths; None if nowhere, or if the first does not run."""
    old, new = feeds(made.inputs, n, n, interface, at)
    try:
        want = run(before, old)
    except Exception:
        return None
    try:
        got = run(after, new)
    except Exception as e:
        return f"does not run at N = {n}, {dict(at)}: {e}"
    for name, score in want.items():
        where = f"{name} at N = {n}, {dict(at)}"
        if got[name].dtype != score.dtype or got[name].shape != score.shape:
            return f"{where}: {got[name].dtype}{got[name].shape} instead of {score.dtype}{score.shape}"
        scale = float(np.abs(score[np.isfinite(score)]).max(initial=0.0))
        # What cancels to nothing keeps the rounding of its terms.
        allowed = 1e-4 * max(scale, 1e-2) if name in made.inexact else 0.0
        same = np.isclose(got[name], score, rtol=0, atol=allowed, equal_nan=True)
        if not same.all():
            values = f"{got[name][~same][:3]} instead of {score[~same][:3]}"
            return f"{where}: {int((~same).sum())} of {same.size} entries differ, {values}"
    return None


def text(model: ModelProto) -> str:
    """A model to read."""
    return str(onnx.printer.to_text(model))
