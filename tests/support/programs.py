"""Random programs over blocks of several levels whose float32 results are exact."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from random import Random
from typing import Any

import numpy as np
import onnx
from helpers import Given, Graph

N = "N"
LIMIT = 1 << 20
Dim = tuple[Any, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor of the program: factored shape, and what its entries can be (multiples of 2^-bits, below `bound`)."""

    name: str
    dims: tuple[Dim, ...]
    bound: int
    bits: int = 0

    @property
    def rank(self) -> int:
        return len(self.dims)

    @property
    def sizes(self) -> list[int]:
        """Extents without candidates and lengths."""
        return [prod(f for f in d if isinstance(f, int)) for d in self.dims]

    def shape(self, rows: Any = -1) -> list[Any]:
        """Extents, candidates (merged or not) as `rows`."""
        return [rows if N in d else n for d, n in zip(self.dims, self.sizes, strict=True)]

    @property
    def fixed(self) -> list[int]:
        """Axes of constant extent."""
        return [k for k, d in enumerate(self.dims) if all(isinstance(f, int) for f in d)]


@dataclass(frozen=True)
class Program:
    model: onnx.ModelProto
    inputs: tuple[Given, ...]


class Writer:
    """Appends random operators to a graph."""

    operators = tuple(
        """concat concat concat concat slice split gather gather reshape reshape flatten flatten transpose transpose
        unsqueeze squeeze expand tile unary unary binary binary binary binary constant reduce reduce
        fc fc fc fc""".split()
    )

    def __init__(self, random: Random) -> None:
        self.random = random
        self.graph = Graph(self.pick([11, 13, 17, 20]))
        self.inputs: list[Given] = []
        self.values: list[Tensor] = []
        self.made = 0
        self.candidate = ""
        self.width, self.fields = self.pick([2, 4]), self.pick([2, 3, 4])  # few extents, so that shapes meet

    def pick(self, options: Any) -> Any:
        return self.random.choice(list(options))

    def some(self, options: Any, least: int, most: int) -> list[Any]:
        return [self.pick(options) for _ in range(self.number(least, most))]

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def weights(self, *shape: int) -> np.ndarray:
        return np.random.default_rng(self.number(0, 1 << 16)).integers(-2, 3, shape).astype(np.float32)

    def put(self, name: str, dims: Any, bound: int, bits: int = 0) -> None:
        self.values.append(Tensor(name, tuple(tuple(f for f in d if f != 1) for d in dims), max(bound, 1), bits))
        self.made += 1

    # --- inputs ----------------------------------------------------------------------------------------------------

    def declare(self, level: str) -> None:
        kind = "matrix" if level == "mixed" else self.pick(["matrix", "fields", "scalar", "ids", "idlist", "sequence"])
        name = f"{level[0]}{len(self.inputs)}"
        shape: tuple[int, ...] = {
            "matrix": lambda: (self.pick([self.width, self.fields, 5]),),
            "fields": lambda: (self.fields, self.width),
            "scalar": lambda: (),
            "ids": lambda: (),
            "idlist": lambda: (self.fields,),
            "sequence": lambda: (4, self.width),
        }[kind]()
        columns: tuple[int, ...] = ()
        if level == "mixed":
            columns = tuple(sorted(self.random.sample(range(shape[0]), self.number(1, shape[0] - 1))))
        made = Given(name, shape, level, columns, 5 if kind in ("ids", "idlist") else None)
        made.declare(self.graph)
        self.inputs.append(made)
        if level == "candidate":
            self.candidate = name
        rows: Dim = () if level == "once" else (N,)
        dims = [rows, *((n,) for n in shape)]
        if made.ids is None:
            self.put(name, dims, 3)
        else:
            width = self.pick([1, self.width, self.width])
            table = self.graph.const(self.weights(5, width))
            self.put(self.graph.op("Gather", table, name, axis=0), [*dims, (width,)], 2)

    def lookups(self, count: int) -> None:
        """Ids with tables of several sizes, some of which are shared, and their rows side by side."""
        shared = [(n, self.graph.const(self.weights(n, 2))) for n in (3, 5)]
        shape = self.pick([(), (1,), (2,)])
        names = []
        for _ in range(count):
            rows, table = self.pick(shared)
            if self.number(0, 2):
                rows = self.number(2, 9)
                table = self.graph.const(self.weights(rows, 2))
            made = Given(f"f{len(self.inputs)}", shape, self.pick(["request", "request", "candidate"]), (), rows)
            made.declare(self.graph)
            self.inputs.append(made)
            names.append(self.graph.op("Gather", table, made.name, axis=0))
            if shape:
                names[-1] = self.graph.op("Flatten", names[-1], axis=1)
        width = 2 * count * (shape[0] if shape else 1)
        self.put(self.graph.op("Concat", *names, axis=1), [(N,), (width,)], 2)

    # --- operators -------------------------------------------------------------------------------------------------

    def partner(self, x: Tensor, options: list[Tensor]) -> Tensor:
        """Another value rather than the same one, where there is one."""
        return self.pick([v for v in options if v.name != x.name] or options)

    def step(self) -> None:
        x = self.pick(self.values[-6:] if self.number(0, 2) else self.values)
        getattr(self, f"op_{self.pick(self.operators)}")(x)

    def mix(self) -> None:
        """Rows of several values side by side, as ahead of a tower."""
        rows = [v for v in self.values if v.rank > 1 and v.dims[0] == (N,) and prod(v.sizes) <= 16]
        rows = [v for v in rows if v.fixed == list(range(1, v.rank))]
        parts = self.random.sample(rows, min(len(rows), self.number(2, 4)))
        if len(parts) < 2:
            return
        names = [p.name if p.rank == 2 else self.graph.op("Flatten", p.name, axis=1) for p in parts]
        name = self.graph.op("Concat", *names, axis=1)
        size = sum(prod(p.sizes) for p in parts)
        self.put(name, [(N,), (size,)], max(p.bound for p in parts), max(p.bits for p in parts))
        if self.number(0, 1):
            self.op_fc(self.values[-1])

    def op_concat(self, x: Tensor) -> None:
        if not x.fixed:
            return
        axis = self.pick(x.fixed)
        rest = x.dims[:axis] + x.dims[axis + 1 :]
        like = [v for v in self.values if v.rank == x.rank and v.dims[:axis] + v.dims[axis + 1 :] == rest]
        like = [v for v in like if axis in v.fixed]
        parts = [x, self.partner(x, like), *self.some(like, 0, 2)]
        if self.number(0, 1):
            parts = parts[::-1]
        size = sum(p.sizes[axis] for p in parts)
        if size > 24:
            return
        dims = [(size,) if k == axis else d for k, d in enumerate(x.dims)]
        name = self.graph.op("Concat", *(p.name for p in parts), axis=axis - (x.rank if self.number(0, 1) else 0))
        self.put(name, dims, max(p.bound for p in parts), max(p.bits for p in parts))

    def _axis(self, x: Tensor, least: int = 2) -> int | None:
        axes = [a for a in x.fixed if x.sizes[a] >= least]
        return self.pick(axes) if axes else None

    def _cut(self, x: Tensor, axis: int, size: int) -> list[Dim]:
        return [(size,) if k == axis else d for k, d in enumerate(x.dims)]

    def op_slice(self, x: Tensor) -> None:
        axis = self._axis(x)
        if axis is None:
            return
        n = x.sizes[axis]
        step = self.pick([1, 1, 2, -1])
        start, end = self.number(0, n - 1), self.number(1, n)
        at = range(n)[slice(start, end, step)] if step > 0 else range(n)[::-1]
        if not at:
            return
        ends = (start, end) if step > 0 else (n - 1, -(1 << 40))
        name = self.graph.op("Slice", x.name, *(self.graph.ints(v) for v in (*ends, axis, step)))
        self.put(name, self._cut(x, axis, len(at)), x.bound, x.bits)

    def op_split(self, x: Tensor) -> None:
        axis = self._axis(x)
        if axis is None:
            return
        n = x.sizes[axis]
        first = self.number(1, n - 1)
        if self.graph.opset >= 13:
            names = self.graph.ops("Split", 2, x.name, self.graph.ints(first, n - first), axis=axis)
        else:
            names = self.graph.ops("Split", 2, x.name, axis=axis, split=[first, n - first])
        for name, size in zip(names, (first, n - first), strict=True):
            self.put(name, self._cut(x, axis, size), x.bound, x.bits)

    def op_gather(self, x: Tensor) -> None:
        axis = self._axis(x)
        if axis is None:
            return
        n = x.sizes[axis]
        if self.number(0, 3) == 0:
            at = np.array(self.number(-n, n - 1), np.int64)
            dims = [d for k, d in enumerate(x.dims) if k != axis]
        else:
            at = np.array(self.some(range(-n, n), 1, 6), np.int64)
            dims = self._cut(x, axis, len(at))
        self.put(self.graph.op("Gather", x.name, self.graph.const(at, np.int64), axis=axis), dims, x.bound, x.bits)

    def op_reshape(self, x: Tensor) -> None:
        """Groups the factors of a shape anew; candidates may be merged with what is next to them."""
        stream = [f for d in x.dims for f in d]
        dims: list[Dim] = []
        for f in stream:
            whole = f
            if f != N and f in (4, 6) and self.number(0, 2) == 0:
                dims.append((2,))
                whole = f // 2
            together = bool(dims) and self.number(0, 1) == 1
            if together and not (whole != N and N in dims[-1] and len(dims[-1]) > 1):
                last = dims[-1]
                dims[-1] = (
                    (last[0] * whole,) if last and last[0] != N and whole != N and len(last) == 1 else (*last, whole)
                )
            else:
                dims.append((whole,))
        if any(len(d) > 2 or (len(d) == 2 and N not in d) for d in dims) or not dims or len(dims) > 5:
            return
        if self.number(0, 4) == 0:
            dims.insert(self.number(0, len(dims)), ())
        goal = Tensor("", tuple(dims), 1)
        if self.number(0, 3) == 0 and goal.fixed != list(range(len(dims))) and len([d for d in dims if N in d]) == 1:
            # As exporters write it: the extent is computed from a shape.
            (where,) = [d for d in dims if N in d]
            shape = self.graph.op("Shape", self.candidate)
            rows = self.graph.op("Gather", shape, self.graph.ints(0), axis=0)
            rows = self.graph.op("Mul", rows, self.graph.ints(prod(f for f in where if f != N)))
            parts = [rows if N in d else self.graph.ints(n) for d, n in zip(dims, goal.sizes, strict=True)]
            target = self.graph.op("Concat", *parts, axis=0)
        else:
            target = self.graph.ints(*goal.shape())
        self.put(self.graph.op("Reshape", x.name, target), dims, x.bound, x.bits)

    def op_flatten(self, x: Tensor) -> None:
        if x.rank < 2 or x.dims[0] != (N,):
            return
        self.put(self.graph.op("Flatten", x.name, axis=1), [(N,), (prod(x.sizes[1:]),)], x.bound, x.bits)

    def op_transpose(self, x: Tensor) -> None:
        if x.rank < 2:
            return
        perm = self.random.sample(range(x.rank), x.rank)
        self.put(self.graph.op("Transpose", x.name, perm=list(perm)), [x.dims[p] for p in perm], x.bound, x.bits)

    def op_unsqueeze(self, x: Tensor) -> None:
        if x.rank > 3:
            return
        axis = self.number(0, x.rank)
        dims = [*x.dims[:axis], (), *x.dims[axis:]]
        self.put(self.graph.on_axes("Unsqueeze", x.name, [axis]), dims, x.bound, x.bits)

    def op_squeeze(self, x: Tensor) -> None:
        axes = [k for k, d in enumerate(x.dims) if d == ()]
        if not axes or x.rank < 2:
            return
        axis = self.pick(axes)
        dims = [d for k, d in enumerate(x.dims) if k != axis]
        self.put(self.graph.on_axes("Squeeze", x.name, [axis]), dims, x.bound, x.bits)

    def op_expand(self, x: Tensor) -> None:
        axes = [k for k, d in enumerate(x.dims) if d == ()]
        if not axes:
            return
        axis, n = self.pick(axes), self.pick([2, 4])
        dims = [(n,) if k == axis else d for k, d in enumerate(x.dims)]
        if self.number(0, 1):
            target = self.graph.ints(*(n if k == axis else 1 for k in range(x.rank)))
            name = self.graph.op("Expand", x.name, target)
        elif not any(N in d for d in x.dims):
            rows = self.graph.op("Gather", self.graph.op("Shape", self.candidate), self.graph.ints(0), axis=0)
            parts = [rows if k == axis else self.graph.ints(s) for k, s in enumerate(x.sizes)]
            name = self.graph.op("Expand", x.name, self.graph.op("Concat", *parts, axis=0))
            dims[axis] = (N,)
        else:
            name = self.graph.op("Tile", x.name, self.graph.ints(*(n if k == axis else 1 for k in range(x.rank))))
        self.put(name, dims, x.bound, x.bits)

    def op_tile(self, x: Tensor) -> None:
        axis = self._axis(x, 1)
        if axis is None or x.sizes[axis] > 8:
            return
        name = self.graph.op("Tile", x.name, self.graph.ints(*(2 if k == axis else 1 for k in range(x.rank))))
        self.put(name, self._cut(x, axis, 2 * x.sizes[axis]), x.bound, x.bits)

    def op_unary(self, x: Tensor) -> None:
        self.put(self.graph.op(self.pick(["Relu", "Neg", "Abs", "Identity"]), x.name), x.dims, x.bound, x.bits)

    def _joined(self, a: Tensor, b: Tensor) -> list[Dim] | None:
        rank = max(a.rank, b.rank)
        pairs = zip(((),) * (rank - a.rank) + a.dims, ((),) * (rank - b.rank) + b.dims, strict=True)
        out = []
        for p, q in pairs:
            if p != q and p != () and q != ():
                return None
            out.append(p or q)
        small = prod(prod(f for f in d if isinstance(f, int)) for d in out) <= 96
        return out if small and self.may_hold(out) else None

    def may_hold(self, dims: list[Dim]) -> bool:
        """Whether a tensor may have this shape."""
        return sum(N in d for d in dims) < 2

    def op_binary(self, x: Tensor) -> None:
        matching = [v for v in self.values if self._joined(x, v) is not None]
        if not matching:
            return
        y = self.partner(x, matching)
        dims = self._joined(x, y)
        assert dims is not None
        if self.number(0, 1):
            x, y = y, x
        op = self.pick(["Add", "Add", "Mul", "Sub", "Max", "Where"])
        bits = max(x.bits, y.bits)
        if op == "Mul":
            bits, bound = x.bits + y.bits, x.bound * y.bound
        else:
            bound = x.bound + y.bound if op in ("Add", "Sub") else max(x.bound, y.bound)
        if bound << bits > LIMIT:
            return
        names = [x.name, y.name]
        if op == "Where":
            test = self.pick(names)
            names.insert(0, self.graph.op("Greater", test, self.graph.const(0)))
        self.put(self.graph.op(op, *names), dims, bound, bits)

    def op_constant(self, x: Tensor) -> None:
        """Addition of, or multiplication with, a constant along one axis."""
        shape = [1] * x.rank
        if x.fixed:
            axis = self.pick(x.fixed)
            shape[axis] = x.sizes[axis]
        op = self.pick(["Add", "Mul"])
        bound = x.bound + 2 if op == "Add" else 2 * x.bound
        if bound << x.bits <= LIMIT:
            names = [x.name, self.graph.const(self.weights(*shape))]
            self.put(self.graph.op(op, *(names if self.number(0, 1) else names[::-1])), x.dims, bound, x.bits)

    def op_reduce(self, x: Tensor) -> None:
        axis = self._axis(x, 1)
        if axis is None or x.rank < 2:
            return
        axes = [axis]
        if len(x.fixed) > 1 and self.number(0, 3) == 0:
            axes = sorted({axis, self.pick(x.fixed)})
        if len(axes) == x.rank:
            return
        keep = self.number(0, 1)
        count = prod(x.sizes[a] for a in axes)
        if not count:
            return
        op = self.pick(["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"])
        if op == "ReduceMean" and count & (count - 1):
            op = "ReduceSum"
        bits = x.bits + (count.bit_length() - 1 if op == "ReduceMean" else 0)
        bound = x.bound * count if op == "ReduceSum" else x.bound
        if (bound << bits) > LIMIT:
            return
        dims = [() if k in axes else d for k, d in enumerate(x.dims) if keep or k not in axes]
        signed = [a - (x.rank if self.number(0, 1) else 0) for a in axes]
        self.put(self.graph.on_axes(op, x.name, signed, keepdims=keep), dims, bound, bits)

    def op_fc(self, x: Tensor) -> None:
        form = self.pick(["MatMul", "MatMul", "Gemm", "bias", "left", "Conv", "Einsum"])
        axis = {"left": x.rank - 2, "Conv": 1}.get(form, x.rank - 1)
        if (
            x.rank < 2
            or axis not in x.fixed
            or (form == "Gemm" and x.rank != 2)
            or (form == "Conv" and x.rank not in (3, 4))
            or (form in ("left", "Conv") and not x.sizes[axis])  # onnxruntime leaves the memory of these as it was
        ):
            return
        k, width = x.sizes[axis], self.pick([1, 2, 3, 4])
        bound = 2 * k * x.bound + 2
        if bound << x.bits > LIMIT or (form in ("Conv", "left") and not {*range(axis, x.rank)} <= {*x.fixed}):
            return
        g, w = self.graph, self.weights(k, width)
        if form == "Gemm":
            turned = self.number(0, 1)
            operands = [x.name, g.const(w.T if turned else w)]
            if self.number(0, 1):
                operands.append(g.const(self.weights(width)))
            name = g.op("Gemm", *operands, transB=turned)
        elif form == "left":
            name = g.op("MatMul", g.const(w.T), x.name)
        elif form == "Conv":
            kernel = w.T.reshape(width, k, *(1,) * (x.rank - 2))
            extra = [g.const(self.weights(width))] if self.number(0, 1) else []
            name = g.op("Conv", x.name, g.const(kernel), *extra)
        elif form == "Einsum" and g.opset >= 12:
            letters = "abcdef"[: x.rank]
            flip = self.number(0, 1)
            its = f"z{letters[-1]}" if flip else f"{letters[-1]}z"
            name = g.op("Einsum", x.name, g.const(w.T if flip else w), equation=f"{letters},{its}->{letters[:-1]}z")
        else:
            name = g.op("MatMul", x.name, g.const(w))
            if form == "bias":
                name = g.op("Add", name, g.const(self.weights(width)))
        self.put(name, self._cut(x, axis, width), bound, x.bits)


def program(seed: int, steps: int, fields: int = 0) -> Program:
    """A random model whose float32 results are exact, with so many ids that are looked up and brought side by side."""
    w = Writer(Random(seed))
    for level in ["candidate", "request", *w.some(["request", "candidate", "mixed", "once"], 0, 3)]:
        w.declare(level)
    if fields:
        w.lookups(fields)
    for k in range(steps):
        w.step()
        if k % 8 == 3:
            w.mix()
    read = {i for node in w.graph.nodes for i in node.input}
    ends = [v for v in w.values if v.name not in read and v.name not in {i.name for i in w.inputs}]
    if not ends:
        w.op_unary(w.values[0])
        ends = w.values[-1:]
    for v in ends[-w.number(1, 4) :]:
        w.graph.output(v.name, [
            (N if len(d) == 1 else f"rows{k}") if N in d else n
            for k, (d, n) in enumerate(zip(v.dims, v.sizes, strict=True))
        ])  # fmt: skip
    return Program(w.graph.model(), tuple(w.inputs))
