"""Random programs with every operator of the registry, and some that it does not hold.

`KINDS` has a step per operator that `lengths` does not write: it appends that operator to a program, as exporters and
runtimes write it, or does nothing where the tensor at hand does not suit it. What only a few tensors suit is brought
about by `about`. Whole layers come from `layers`. `LEFT_OUT` names the operators of the registry that no program can
hold, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
from layers import LAYERS
from lengths import INEXACT, LengthWriter, Program, finished
from onnx import TensorProto, helper
from programs import Dim, N, Tensor

FLOAT, BOOL, INT64, INT32, UINT32 = (
    int(k) for k in (TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64, TensorProto.INT32, TensorProto.UINT32)
)
OPSETS = (11, 13, 17, 20, 24)
MS, ML = "com.microsoft", "ai.onnx.ml"

_RANDOM = "two runs of the original differ"
_NO_KERNEL = "onnxruntime has no kernel for it on a CPU"
LEFT_OUT = {
    **dict.fromkeys(
        "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike".split(), _RANDOM
    ),
    **dict.fromkeys(
        f"""{MS}::BiasSoftmax {MS}::FusedGelu {MS}::FusedMatMulActivation {MS}::SimplifiedLayerNormalization
        """.split(),
        _NO_KERNEL,
    ),
    **dict.fromkeys(
        f"""Attention Optional SequenceEmpty SequenceErase SequenceMap {ML}::CastMap {ML}::DictVectorizer {ML}::ZipMap
        com.microsoft.nchwc::Conv {MS}::FusedConv""".split(),
        "nothing writes it yet: node tests and saved models hold it (scripts/node_tests.py, variants.py)",
    ),
    **dict.fromkeys(
        f"""BitCast CenterCropPad Col2Im CumProd DFT DeformConv GridSample RegexFullMatch RoiAlign STFT
        StringConcat TensorScatter TfIdfVectorizer {ML}::CategoryMapper {ML}::SVMClassifier {ML}::TreeEnsemble
        {MS}::MatMulNBits""".split(),
        "few tensors suit it: tests/rules/test_alone.py holds it",
    ),
    "Scatter": "opset 11, the oldest of the programs, does not have it any more",
}
"""Operators of the registry that no program holds, and why."""

KINDS: dict[str, Callable[[Writer, Tensor], None]] = {}
"""By the key of an operator: appends it, or does nothing where it does not suit the tensor."""


class Writer(LengthWriter):
    """Appends the operators of `KINDS`, too."""

    operators = (*LengthWriter.operators, *("kind",) * 24, *("layer",) * 16)

    def __init__(self, random: Random) -> None:
        super().__init__(random)
        self.graph.opset = self.pick(OPSETS)
        self.graph.versions[ML] = 3

    def op_kind(self, x: Tensor) -> None:
        """An operator of the table, on some tensor that suits it."""
        self.append(self.pick(KINDS))

    def op_layer(self, _: Tensor) -> None:
        """A whole layer, over inputs of its own."""
        self.pick(LAYERS.values())(self)

    def append(self, key: str) -> bool:
        """Appends an operator to one of the latest tensors; whether there is one that suits it."""
        values, made = self.values[-12:], self.made
        for x in self.random.sample(values, len(values)):
            KINDS[key](self, x)
            if self.made > made:
                return True
        return False

    # --- what the steps share ----------------------------------------------------------------------------------------

    def like(self, x: Tensor) -> list[Tensor]:
        """Exact tensors of the same shape."""
        return [v for v in self.values if v.dims == x.dims and v.bits != INEXACT]

    def extended(self, x: Tensor, axis: int) -> bool:
        """Whether an axis has a constant extent of at least 1."""
        return x.rank > axis and axis in x.fixed and x.sizes[axis] > 0

    def told(self, dims: tuple[Dim, ...]) -> bool:
        """Whether the inputs tell all extents of a shape."""
        return all(self.has(f) for d in dims for f in d if isinstance(f, str))

    def ids(self, x: Tensor, count: int) -> str:
        """Whole numbers below a count, made of a tensor's entries."""
        g = self.graph
        return g.op("Cast", g.op("Clip", g.op("Abs", x.name), g.const(0), g.const(count - 1)), to=INT64)

    def number_of(self, symbol: str) -> str:
        """The value of a symbol, without dimensions."""
        return self.graph.on_axes("Squeeze", self.extent(symbol), [0])

    def filled(self, value: int, dim: Dim, dtype: int) -> str:
        """A vector of one number, as long as a dimension."""
        made = helper.make_tensor("value", dtype, [1], [value])
        return self.graph.op("ConstantOfShape", self.target([dim]), value=made)

    def quantised(self, x: Tensor, dtype: Any = np.uint8, domain: str = "") -> tuple[str, str, str]:
        """A tensor in 8 bits, its scale of a half and its zero point."""
        g = self.graph
        scale, zero = g.const(0.5), g.const(128 if dtype is np.uint8 else 0, dtype)
        return g.op("QuantizeLinear", x.name, scale, zero, domain=domain), scale, zero

    def plain(self, name: str, scale: str, zero: str) -> str:
        """A tensor of 8 bits as numbers."""
        return self.graph.op("DequantizeLinear", name, scale, zero)

    def body(self, nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
        """A subgraph."""
        return helper.make_graph(nodes, self.graph.fresh("body"), inputs, outputs)

    def info(self, name: str, dtype: int = FLOAT, shape: Any = None) -> Any:
        """Declares a tensor of a subgraph."""
        return helper.make_tensor_value_info(name, dtype, shape)


def about(key: str, seed: int, steps: int = 8) -> Program:
    """A random program that holds an operator of `KINDS`."""
    for attempt in range(200):
        w = _begun(Random(f"{key} {seed} {attempt}"))
        for _ in range(steps):
            w.step()
        if w.append(key):
            for _ in range(2):
                w.step()
            return finished(w)
    raise LookupError(f"no tensor suits {key}")


def layered(name: str, seed: int) -> Program:
    """A random program that holds a layer of `LAYERS`."""
    w = _begun(Random(f"{name} {seed}"))
    LAYERS[name](w)
    for _ in range(2):
        w.step()
    return finished(w)


def program(seed: int, steps: int, fields: int = 0) -> Program:
    """A random program, with so many ids that are looked up and brought side by side."""
    w = _begun(Random(seed))
    if fields:
        w.lookups(fields)
    for k in range(steps):
        w.step()
        if k % 8 == 3:
            w.mix()
    return finished(w)


def _begun(random: Random) -> Writer:
    w = Writer(random)
    for level in ["candidate", "request", *w.some(["request", "request", "candidate", "mixed", "once"], 1, 4)]:
        w.declare(level)
    return w


def _since(opset: int, *keys: str) -> Callable[[Callable[[Writer, Tensor, str], None]], Any]:
    """Adds a step to the table under the keys of operators, of which it is given the type."""

    def add(step: Callable[[Writer, Tensor, str], None]) -> Any:
        for key in keys:

            def run(w: Writer, x: Tensor, key: str = key) -> None:
                if w.graph.opset >= opset:
                    step(w, x, key.rpartition("::")[2])

            KINDS[key] = run
        return step

    return add


# --- entry by entry --------------------------------------------------------------------------------------------------


@_since(11, *"Acos Acosh Asin Asinh Atan Atanh Cos Cosh Log Reciprocal Sin Sinh Sqrt Tan".split())
def _curve(w: Writer, x: Tensor, op: str) -> None:
    if x.bits == INEXACT:
        return
    g = w.graph
    if op in ("Acosh", "Log", "Reciprocal", "Sqrt"):
        name = g.op("Add", g.op("Abs", x.name), g.const(1))
    else:
        name = g.op("Mul", x.name, g.const(0.9 / x.bound))
    w.put(g.op(op, name), x.dims, 200, INEXACT)


@_since(24, "Swish")
@_since(20, "Gelu")
@_since(18, "Mish")
@_since(14, "HardSwish")
def _activation(w: Writer, x: Tensor, op: str, domain: str = "") -> None:
    if x.bound <= 20:
        w.put(w.graph.op(op, x.name, domain=domain), x.dims, 200, INEXACT)


@_since(11, f"{MS}::Gelu", f"{MS}::FastGelu", f"{MS}::QuickGelu")
def _own_activation(w: Writer, x: Tensor, op: str) -> None:
    _activation(w, x, op, MS)


@_since(11, f"{MS}::BiasGelu")
def _bias_gelu(w: Writer, x: Tensor, op: str) -> None:
    if x.bound <= 20 and w.extended(x, x.rank - 1):
        w.put(w.graph.op(op, x.name, w.graph.const(w.weights(x.sizes[-1])), domain=MS), x.dims, 200, INEXACT)


@_since(11, "ThresholdedRelu", "Shrink")
def _stepped(w: Writer, x: Tensor, op: str) -> None:
    if x.bits != INEXACT:
        how = {"alpha": 1.0} if op == "ThresholdedRelu" else {"lambd": 1.0, "bias": 0.0}
        w.put(w.graph.op(op, x.name, **how), x.dims, x.bound, x.bits)


@_since(11, "Hardmax")
def _hardmax(w: Writer, x: Tensor, op: str) -> None:
    if x.bits != INEXACT and x.rank >= 2 and 0 not in x.dims[-1]:
        w.put(w.graph.op(op, x.name, axis=x.rank - 1), x.dims, 1)


@_since(11, "IsInf", "IsNaN")
def _odd(w: Writer, x: Tensor, op: str) -> None:
    g = w.graph
    w.put(g.op("Where", g.op(op, x.name), g.const(0), x.name), x.dims, x.bound, x.bits)


@_since(11, "BitShift")
def _shifted(w: Writer, x: Tensor, op: str) -> None:
    if x.bits != INEXACT and w.exact(x, 2 * x.bound):
        g = w.graph
        whole = g.op("Cast", g.op("Abs", x.name), to=UINT32)
        direction = w.pick(["LEFT", "RIGHT"])
        w.put(g.op("Cast", g.op(op, whole, g.const(1, np.uint32), direction=direction), to=FLOAT), x.dims, 2 * x.bound)


@_since(18, "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor")
def _bits(w: Writer, x: Tensor, op: str) -> None:
    like = [v for v in w.values if w._joined(x, v) is not None and v.bits != INEXACT]
    if x.bits == INEXACT or not like:
        return
    g, y = w.graph, w.partner(x, like)
    dims, bound = w._joined(x, y), 2 * (x.bound + y.bound) + 2
    whole = [g.op("Cast", v.name, to=INT32) for v in (x, y)]
    if op == "BitwiseNot":
        dims, whole = list(x.dims), whole[:1]
    if w.exact(x, bound):
        w.put(g.op("Cast", g.op(op, *whole), to=FLOAT), dims, bound)


@_since(11, "Mod")
def _modulo(w: Writer, x: Tensor, op: str) -> None:
    if x.bits == INEXACT:
        return
    g = w.graph
    if w.number(0, 1):
        w.put(g.op(op, x.name, g.const(2), fmod=1), x.dims, 2, x.bits)
    else:
        w.put(g.op("Cast", g.op(op, g.op("Cast", x.name, to=INT32), g.const(3, np.int32)), to=FLOAT), x.dims, 3)


@_since(15, "CastLike")
def _cast_like(w: Writer, x: Tensor, op: str) -> None:
    if x.bits != INEXACT:
        g = w.graph
        w.put(g.op(op, g.op(op, x.name, g.const(0, np.int32)), x.name), x.dims, x.bound)


@_since(11, "Dropout")
def _dropout(w: Writer, x: Tensor, op: str) -> None:
    w.put(w.graph.op(op, x.name), x.dims, x.bound, x.bits)


@_since(11, "Constant")
def _constant(w: Writer, x: Tensor, op: str) -> None:
    if w.exact(x, x.bound + 2):
        made = w.graph.op(op, value=helper.make_tensor("value", FLOAT, [1], [float(w.number(-2, 2))]))
        w.put(w.graph.op("Add", x.name, made), x.dims if x.rank else [()], x.bound + 2, x.bits)


@_since(11, "EyeLike")
def _eye(w: Writer, x: Tensor, op: str) -> None:
    if x.rank == 2:
        w.put(w.graph.op(op, x.name, k=w.number(-1, 1)), x.dims, 1)


@_since(11, "Size")
def _size(w: Writer, x: Tensor, op: str) -> None:
    if w.exact(x, x.bound + 7):
        g = w.graph
        number = g.op("Mod", g.op(op, x.name), g.const(7, np.int64))
        w.put(g.op("Add", x.name, g.op("Cast", number, to=FLOAT)), x.dims, x.bound + 7, x.bits)


# --- data movement by computed positions -----------------------------------------------------------------------------


@_since(11, "GatherElements")
def _gather_elements(w: Writer, x: Tensor, op: str) -> None:
    axis, like = w._axis(x, 1), w.like(x)
    if axis is not None and w.number(0, 1):
        _rows_picked(w, x, axis, op)
    elif axis is not None and like:
        at = w.ids(w.pick(like), x.sizes[axis])
        w.put(w.graph.op(op, x.name, at, axis=axis), x.dims, x.bound, x.bits)


def _rows_picked(w: Writer, x: Tensor, axis: int, op: str) -> None:
    """Whole rows at positions that something else gives, as torch's gather is used."""
    g, rest = w.graph, x.dims[axis + 1 :]
    found = [v for v in w.values if v.rank == axis + 1 and v.dims[:axis] == x.dims[:axis] and v.bits != INEXACT]
    if not found or not w.told(x.dims):
        return
    y = w.pick(found)
    at = w.ids(y, x.sizes[axis])
    dims = (*y.dims, *rest)
    if rest and w.told(dims):
        at = g.op("Expand", g.on_axes("Unsqueeze", at, range(axis + 1, x.rank)), w.target(dims))
    elif rest:
        return
    w.put(g.op(op, x.name, at, axis=axis), dims, x.bound, x.bits)


def _own_rows(w: Writer, x: Tensor) -> None:
    """Positions of every candidate's own rows: with the number of the row beside them, or added."""
    g = w.graph
    found = [v for v in w.values if v.rank == 2 and v.dims[0] == (N,) and w.extended(v, 1) and v.bits != INEXACT]
    if not found:
        return
    y = w.pick(found)
    zero, one = (g.const(n, np.int64) for n in (0, 1))
    rows = g.on_axes("Unsqueeze", g.op("Range", zero, w.number_of(N), one), [1])
    if y.dims[1] == x.dims[1] and w.number(0, 1):
        at = g.op("ArgMax", y.name, axis=1)
        merged = g.op("Reshape", x.name, w.target([(*x.dims[0], *x.dims[1]), *x.dims[2:]]))
        at = g.op("Add", at, g.op("Mul", rows, g.const(x.sizes[1], np.int64)))
        w.put(g.op("GatherND", merged, g.on_axes("Unsqueeze", at, [2])), [(N,), (), *x.dims[2:]], x.bound, x.bits)
        return
    at = w.ids(y, x.sizes[1])
    wide = g.op("Expand", rows, w.target(y.dims))
    pairs = g.op("Concat", *(g.on_axes("Unsqueeze", i, [2]) for i in (wide, at)), axis=2)
    w.put(g.op("GatherND", x.name, pairs), [*y.dims, *x.dims[2:]], x.bound, x.bits)


@_since(11, "GatherND")
def _gather_nd(w: Writer, x: Tensor, op: str) -> None:
    g = w.graph
    if x.rank < 2:
        return
    if x.dims[0] == (N,) and w.extended(x, 1) and w.told(x.dims) and w.number(0, 2):
        _own_rows(w, x)
    elif w.extended(x, 0):
        at = np.array(w.some(range(x.sizes[0]), 1, 4), np.int64)[:, None]
        w.put(g.op(op, x.name, g.const(at, np.int64)), [(len(at),), *x.dims[1:]], x.bound, x.bits)
    elif w.extended(x, 1) and g.opset >= 12:
        like = [v for v in w.values if v.rank == 2 and v.dims[0] == x.dims[0] and v.bits != INEXACT]
        if like:
            y = w.pick(like)
            at = g.on_axes("Unsqueeze", w.ids(y, x.sizes[1]), [2])
            w.put(g.op(op, x.name, at, batch_dims=1), [*y.dims, *x.dims[2:]], x.bound, x.bits)


@_since(11, "OneHot")
def _one_hot(w: Writer, x: Tensor, op: str) -> None:
    if x.bits == INEXACT or x.rank > 3:
        return
    axis, g = w.number(0, x.rank), w.graph
    depth = w.pick([g.ints(4), g.const(4, np.int64)])
    name = g.op(op, w.ids(x, 5), depth, g.const(w.pick([[0, 1], [-1, 2]])), axis=axis - (x.rank + 1) * w.number(0, 1))
    w.put(name, [*x.dims[:axis], (4,), *x.dims[axis:]], 2)


@_since(12, "NonZero")
def _non_zero(w: Writer, x: Tensor, op: str) -> None:
    g = w.graph
    if x.rank == 3 and x.dims[0] == (N,) and w.extended(x, 1) and w.extended(x, 2) and w.number(0, 1):
        mask = np.random.default_rng(w.number(0, 99)).integers(0, 2, (1, *x.sizes[1:])).astype(bool)
        mask[0, 0, 0] = True
        where = g.op("Expand", g.const(mask, np.bool_), w.target(x.dims))
        at = g.op("Transpose", g.op(op, where), perm=[1, 0])
        count = int(mask.sum())
        w.put(g.op("Reshape", g.op("GatherND", x.name, at), g.ints(-1, count)), [(N,), (count,)], x.bound, x.bits)
    elif x.bits != INEXACT and x.rank and w.exact(x, x.bound + 7):
        count_of = g.op("Gather", g.op("Shape", g.op(op, x.name)), g.const(1, np.int64), axis=0)
        number = g.op("Cast", g.op("Mod", count_of, g.const(7, np.int64)), to=FLOAT)
        w.put(g.op("Add", x.name, number), x.dims, x.bound + 7, x.bits)


@_since(11, "Compress")
def _compress(w: Writer, x: Tensor, op: str) -> None:
    if x.rank < 2:
        return
    g, axis = w.graph, w.number(0, x.rank - 1)
    if w.extended(x, axis):
        kept = np.random.default_rng(w.number(0, 99)).integers(0, 2, x.sizes[axis]).astype(bool)
        kept[-1] = True
        name = g.op(op, x.name, g.const(kept, np.bool_), axis=axis)
        w.put(name, w._cut(x, axis, int(kept.sum())), x.bound, x.bits)
        return
    lines = [v for v in w.values if v.dims == (x.dims[axis],) and v.bits != INEXACT]
    bound = x.bound * (512 if N in x.dims[axis] else w.size(x, axis))
    if lines and w.exact(x, bound):
        kept_rows = g.op("Greater", w.pick(lines).name, g.const(0))
        name = g.on_axes("ReduceSum", g.op(op, x.name, kept_rows, axis=axis), [axis], keepdims=1)
        w.put(name, w._cut(x, axis, 1), bound, x.bits)


@_since(11, "Unique")
def _unique(w: Writer, x: Tensor, op: str) -> None:
    bound = x.bound * (2 * x.bound + 1)
    if x.bits == 0 and w.exact(x, bound):
        w.put(w.graph.on_axes("ReduceSum", w.graph.op(op, x.name), [0], keepdims=1), [()], bound)


@_since(11, "ScatterElements")
def _scatter_elements(w: Writer, x: Tensor, op: str) -> None:
    axis, like = w._axis(x, 1), w.like(x)
    if axis is None or not like:
        return
    y, g = w.partner(x, like), w.graph
    order = np.array(w.random.sample(range(x.sizes[axis]), x.sizes[axis]))
    order = order.reshape([-1 if k == axis else 1 for k in range(x.rank)])
    at = g.op("Expand", g.const(order, np.int64), g.op("Shape", y.name))
    w.put(g.op(op, x.name, at, y.name, axis=axis), x.dims, max(x.bound, y.bound), max(x.bits, y.bits))


@_since(11, "ScatterND")
def _scatter_nd(w: Writer, x: Tensor, op: str) -> None:
    axis, like = w._axis(x, 1), w.like(x)
    if axis is None or not like or x.rank < 2:
        return
    y, g = w.partner(x, like), w.graph
    perm = [axis, *(k for k in range(x.rank) if k != axis)]
    data, other = (g.op("Transpose", v.name, perm=perm) for v in (x, y))
    at = w.number(0, x.sizes[axis] - 1)
    name = g.op(op, data, g.const([[at]], np.int64), g.op("Gather", other, g.ints(at), axis=0))
    name = g.op("Transpose", name, perm=np.argsort(perm).tolist())
    w.put(name, x.dims, max(x.bound, y.bound), max(x.bits, y.bits))


@_since(11, "ReverseSequence")
def _reversed(w: Writer, x: Tensor, op: str) -> None:
    if x.rank < 2 or not w.told(x.dims[:2]) or 0 in x.dims[0] or 0 in x.dims[1]:
        return
    g = w.graph
    whole = g.op("Expand", w.target([x.dims[1]]), w.target([x.dims[0]]))
    lengths = whole if w.number(0, 1) else w.filled(1, x.dims[0], INT64)
    w.put(g.op(op, x.name, lengths, batch_axis=0, time_axis=1), x.dims, x.bound, x.bits)


@_since(11, "SequenceConstruct", "SequenceInsert")
def _listed(w: Writer, x: Tensor, op: str) -> None:
    axis, g = w._axis(x, 1), w.graph
    if axis is None or x.sizes[axis] > 8:
        return
    both = g.op("SequenceConstruct", x.name, *([x.name] if op == "SequenceConstruct" else []))
    both = g.op(op, both, x.name) if op == "SequenceInsert" else both
    w.put(g.op("ConcatFromSequence", both, axis=axis), w._cut(x, axis, 2 * x.sizes[axis]), x.bound, x.bits)


@_since(11, "SplitToSequence")
def _sequence(w: Writer, x: Tensor, op: str) -> None:
    axis, g = w._axis(x, 1), w.graph
    if axis is not None:
        joined = g.op("ConcatFromSequence", g.op(op, x.name, g.const(1, np.int64), axis=axis), axis=axis)
        w.put(joined, x.dims, x.bound, x.bits)


@_since(13, "Resize")
def _resized(w: Writer, x: Tensor, op: str) -> None:
    if x.rank == 3 and w.extended(x, 2) and w.extended(x, 1) and x.sizes[2] < 9:
        name = w.graph.op(op, x.name, "", w.graph.const([1, 1, 2]), mode="nearest")
        w.put(name, w._cut(x, 2, 2 * x.sizes[2]), x.bound, x.bits)


@_since(13, "DepthToSpace", "SpaceToDepth")
def _blocks(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 3 or not w.extended(x, 1) or not w.extended(x, 2) or x.sizes[1] * x.sizes[2] > 64:
        return
    g = w.graph
    image = g.on_axes("Unsqueeze", x.name, [3])
    if op == "DepthToSpace" and x.sizes[1] % 4 == 0:
        name = g.op(op, image, blocksize=2, mode=w.pick(["DCR", "CRD"]))
        w.put(name, [x.dims[0], (x.sizes[1] // 4,), (2 * x.sizes[2],), (2,)], x.bound, x.bits)
    elif op == "SpaceToDepth" and x.sizes[2] % 2 == 0:
        name = g.op(op, g.op("Concat", image, g.op("Neg", image), axis=3), blocksize=2)
        w.put(name, [x.dims[0], (4 * x.sizes[1],), (x.sizes[2] // 2,), ()], x.bound, x.bits)


@_since(13, f"{ML}::ArrayFeatureExtractor", f"{ML}::FeatureVectorizer")
def _features(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 2 or not w.extended(x, 1) or 0 in x.sizes:
        return
    g, size = w.graph, x.sizes[1]
    if op == "ArrayFeatureExtractor":
        at = w.some(range(size), 1, 4)
        w.put(g.op(op, x.name, g.const(at, np.int64), domain=ML), w._cut(x, 1, len(at)), x.bound, x.bits)
        return
    y = w.partner(x, [v for v in w.values if v.rank == 2 and v.dims[0] == x.dims[0] and w.extended(v, 1)])
    if size + y.sizes[1] <= 24:
        # onnx does not infer how many dimensions that has, which onnxruntime wants to know for a Scan.
        name = g.op("Flatten", g.op(op, x.name, y.name, domain=ML, inputdimensions=[size, y.sizes[1]]))
        w.put(name, w._cut(x, 1, size + y.sizes[1]), max(x.bound, y.bound), max(x.bits, y.bits))


# --- reductions and pools --------------------------------------------------------------------------------------------


@_since(11, "ReduceProd", "ReduceLogSum")
def _reduced(w: Writer, x: Tensor, op: str) -> None:
    axis, g = w._axis(x, 1), w.graph
    if axis is None or x.rank < 2 or x.bits == INEXACT:
        return
    if op == "ReduceLogSum":
        name = g.op("Add", g.op("Abs", x.name), g.const(1))
        w.put(g.on_axes(op, name, [axis], keepdims=1), w._cut(x, axis, 1), 200, INEXACT)
        return
    size = x.sizes[axis]
    if size < 5 and w.exact(x, x.bound**size, x.bits * size):
        w.put(g.on_axes(op, x.name, [axis], keepdims=1), w._cut(x, axis, 1), x.bound**size, x.bits * size)


@_since(11, "GlobalAveragePool", "GlobalLpPool", "LpPool")
def _inexact_pool(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 3 or not w.extended(x, 1) or not w.extended(x, 2) or x.sizes[2] < 2 or x.bound > 100:
        return
    if op == "GlobalLpPool" and w.graph.opset >= 22:
        return  # onnxruntime has no kernel of that version
    if op == "LpPool":
        w.put(w.graph.op(op, x.name, kernel_shape=[2]), w._cut(x, 2, x.sizes[2] - 1), 2 * x.bound, INEXACT)
    else:
        w.put(w.graph.op(op, x.name), w._cut(x, 2, 1), 8 * x.bound, INEXACT)


@_since(11, "MaxPool", "AveragePool", "GlobalMaxPool")
def _pool(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 3 or not w.extended(x, 1) or not w.extended(x, 2) or x.sizes[2] < 2 or x.bits == INEXACT:
        return
    if op == "GlobalMaxPool":
        w.put(w.graph.op(op, x.name), w._cut(x, 2, 1), x.bound, x.bits)
    elif w.exact(x, 2 * x.bound, x.bits + 1):
        name = w.graph.op(op, x.name, kernel_shape=[2])
        w.put(name, w._cut(x, 2, x.sizes[2] - 1), 2 * x.bound, x.bits + (op == "AveragePool"))


# --- normalisations --------------------------------------------------------------------------------------------------


@_since(11, "BatchNormalization", "InstanceNormalization", "LRN", "MeanVarianceNormalization")
@_since(21, "GroupNormalization")
def _by_channel(w: Writer, x: Tensor, op: str) -> None:
    if not w.extended(x, 1) or x.bound > 100 or 0 in x.sizes or (x.rank != 3 and op != "BatchNormalization"):
        return
    g, size = w.graph, x.sizes[1]
    scale, shift = g.const(w.weights(size)), g.const(w.weights(size))
    if op == "BatchNormalization":
        mean, spread = g.const(w.weights(size)), g.const(np.abs(w.weights(size)) + 0.5)
        name = g.op(op, x.name, scale, shift, mean, spread)
    elif op == "InstanceNormalization":
        name = g.op(op, x.name, scale, shift, epsilon=0.1)
    elif op == "GroupNormalization":
        groups = w.pick([1, size])
        per = size if g.opset >= 21 else groups
        name = g.op(op, x.name, g.const(w.weights(per)), g.const(w.weights(per)), num_groups=groups, epsilon=0.1)
    elif op == "LRN":
        name = g.on_axes("Squeeze", g.op(op, g.on_axes("Unsqueeze", x.name, [3]), size=3), [3])
    else:
        name = g.op(op, x.name, axes=w.pick([[1], [2], [1, 2]]))
    w.put(name, x.dims, 200, INEXACT)


@_since(23, "RMSNormalization")
@_since(11, "SimplifiedLayerNormalization")
def _root_mean_square(w: Writer, x: Tensor, op: str) -> None:
    if w.extended(x, x.rank - 1) and x.rank >= 2 and x.bound <= 100:
        w.graph.checked &= op == "RMSNormalization"  # onnx does not know what onnxruntime adds to its domain
        name = w.graph.op(op, x.name, w.graph.const(w.weights(x.sizes[-1])), axis=-1, epsilon=0.1)
        w.put(name, x.dims, 50, INEXACT)


@_since(11, f"{MS}::SkipLayerNormalization", f"{MS}::SkipSimplifiedLayerNormalization")
def _skipping(w: Writer, x: Tensor, op: str) -> None:
    like = w.like(x)
    if x.rank != 3 or not w.extended(x, 2) or x.bound > 100 or not like or 0 in x.sizes:
        return
    g, size = w.graph, x.sizes[-1]
    terms = [g.const(w.weights(size)) for _ in range(1 if "Simplified" in op else 2)]
    w.put(g.op(op, x.name, w.partner(x, like).name, *terms, domain=MS, epsilon=0.1), x.dims, 50, INEXACT)


@_since(23, "RotaryEmbedding")
def _rotary(w: Writer, x: Tensor, op: str) -> None:
    _turned(w, x, "")


@_since(13, f"{MS}::RotaryEmbedding")
def _saved_rotary(w: Writer, x: Tensor, op: str) -> None:
    _turned(w, x, MS)


def _turned(w: Writer, x: Tensor, domain: str) -> None:
    if x.rank != 3 or not w.extended(x, 1) or not w.extended(x, 2) or x.sizes[2] % 2 or 0 in x.sizes or x.bound > 100:
        return
    g, steps, half = w.graph, x.sizes[1], x.sizes[2] // 2
    angles = np.outer(np.arange(steps), np.arange(1, half + 1))
    caches = [g.const(np.cos(angles)), g.const(np.sin(angles))]
    rows = g.op("Slice", g.op("Shape", x.name), g.ints(0), g.ints(2), g.ints(0))
    at = g.op("Expand", g.const(w.random.sample(range(steps), steps), np.int64), rows)
    more = [at, *caches] if domain else [*caches, at]
    how = {"interleaved": w.number(0, 1), "num_heads": 1, **({"domain": domain} if domain else {})}
    w.put(g.op("RotaryEmbedding", x.name, *more, **how), x.dims, 2 * x.bound, INEXACT)


@_since(11, "Det", f"{MS}::Inverse")
def _inverse(w: Writer, x: Tensor, op: str) -> None:
    if x.rank >= 2 and w.extended(x, x.rank - 1) and x.dims[-1] == x.dims[-2] and x.bits != INEXACT:
        g = w.graph
        near = g.op("Add", g.op("Mul", x.name, g.const(0.1 / x.bound)), g.const(np.eye(x.sizes[-1])))
        if op == "Det":
            w.put(g.op(op, near), x.dims[:-2], 50, INEXACT)
        else:
            w.put(g.op(op, near, domain=MS), x.dims, 50, INEXACT)


# --- products --------------------------------------------------------------------------------------------------------


@_since(11, f"{MS}::FusedMatMul", f"{MS}::TransposeMatMul", f"{MS}::FusedGemm", "ai.onnx.ml::LinearRegressor")
def _fused(w: Writer, x: Tensor, op: str) -> None:
    if x.rank < 2 or not w.extended(x, x.rank - 1) or (x.rank > 2 and op in ("FusedGemm", "LinearRegressor")):
        return
    g, k, width = w.graph, x.sizes[-1], w.pick([1, 2, 3])
    bound = 4 * k * x.bound + 2
    if not w.exact(x, bound):
        return
    kernel = w.weights(k, width)
    if op == "LinearRegressor":
        how = {"coefficients": kernel.T.reshape(-1).tolist(), "intercepts": w.weights(width).tolist()}
        name = g.op(op, x.name, domain="ai.onnx.ml", targets=width, **how)
    elif op == "FusedGemm":
        name = g.op(op, x.name, g.const(kernel), g.const(w.weights(width)), domain=MS, activation="Relu")
    else:
        turned = w.number(0, 1)
        name = g.op(op, x.name, g.const(kernel.T if turned else kernel), domain=MS, transB=turned, alpha=2.0)
    w.put(name, w._cut(x, x.rank - 1, width), bound, x.bits)


@_since(13, "MatMulInteger", "QLinearMatMul")
@_since(13, f"{MS}::DynamicQuantizeMatMul", f"{MS}::MatMulIntegerToFloat", f"{MS}::QGemm")
def _quantised_product(w: Writer, x: Tensor, op: str) -> None:
    if x.rank < 2 or not w.extended(x, x.rank - 1) or x.bits > 1 or x.bound > 60 or (op == "QGemm" and x.rank != 2):
        return
    g, k, width = w.graph, x.sizes[-1], 2
    weights, one = g.const(w.weights(k, width), np.int8), g.const(1)
    none = g.const(0, np.int8)
    bits, bound = 1, 4 * k * x.bound + 64
    if op == "DynamicQuantizeMatMul":
        name, bits = g.op(op, x.name, weights, one, none, domain=MS), INEXACT
    else:
        data, scale, zero = w.quantised(x)
        if op == "MatMulInteger":
            name = g.op("Cast", g.op(op, data, weights, zero, none), to=FLOAT)
            bits, bound = 0, 2 * bound
        elif op == "MatMulIntegerToFloat":
            name = g.op(op, data, weights, scale, one, zero, none, domain=MS)
        elif op == "QGemm":
            name = g.op(op, data, scale, zero, weights, one, none, "", scale, zero, domain=MS)
            name = w.plain(name, scale, zero)
        else:
            name = w.plain(g.op(op, data, scale, zero, weights, one, none, scale, zero), scale, zero)
    if bits == INEXACT or w.exact(x, bound, bits):
        w.put(name, w._cut(x, x.rank - 1, width), bound, bits)


@_since(13, "DynamicQuantizeLinear", f"{MS}::QuantizeLinear", f"{MS}::DequantizeLinear")
def _to_bytes(w: Writer, x: Tensor, op: str) -> None:
    if x.bits > 1 or x.bound > 60:
        return
    if op == "DynamicQuantizeLinear":
        w.put(w.plain(*w.graph.ops(op, 3, x.name)), x.dims, 70, INEXACT)
    else:
        made = w.quantised(x, domain=MS)
        w.put(w.graph.op("DequantizeLinear", *made, domain=MS), x.dims, 70, 1)


@_since(13, *(f"{MS}::QLinear{op}" for op in ("Add", "Mul", "Concat", "LeakyRelu", "Sigmoid", "Softmax")))
def _quantised_step(w: Writer, x: Tensor, op: str) -> None:
    if x.bits > 1 or x.bound > 60 or x.rank < 2 or 0 in x.sizes:
        return
    g, data = w.graph, w.quantised(x)
    out = (g.const(0.5), g.const(128, np.uint8))
    dims = list(x.dims)
    if op in ("QLinearAdd", "QLinearMul"):
        like = [v for v in w.values if (d := w._joined(x, v)) and tuple(d) == x.dims and v.bits < 2 and v.bound <= 60]
        if not like:
            return
        name = g.op(op, *data, *w.quantised(w.partner(x, like)), *out, domain=MS)
    elif op == "QLinearConcat":
        axis = w._axis(x, 1)
        if axis is None or x.sizes[axis] > 8:
            return
        name = g.op(op, *out, *data, *data, domain=MS, axis=axis)
        dims = w._cut(x, axis, 2 * x.sizes[axis])
    else:
        how = {"QLinearLeakyRelu": {"alpha": 0.5}, "QLinearSoftmax": {"axis": x.rank - 1, "opset": 13}}.get(op, {})
        name = g.op(op, *data, *out, domain=MS, **how)
    w.put(w.plain(name, *out), dims, 70, 1)


@_since(13, "ConvTranspose", "ConvInteger", "QLinearConv")
def _slid(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 3 or not w.extended(x, 1) or x.bits > 1 or x.bound > 60 or 0 in x.sizes:
        return
    g, (_, k, size) = w.graph, x.sizes
    more, bound = (1 if op == "ConvTranspose" else -1), 8 * k * x.bound + 64
    if not w.extended(x, 2) or size < 2 or not w.exact(x, bound, 1):
        return
    if op == "ConvTranspose":
        name, bits = g.op(op, x.name, g.const(w.weights(k, 2, 2))), x.bits
    else:
        data, scale, zero = w.quantised(x)
        kernel = np.abs(w.weights(2, k, 2))
        if op == "ConvInteger":
            name, bits = g.op("Cast", g.op(op, data, g.const(kernel, np.uint8), zero), to=FLOAT), 0
        else:
            none = g.const(0, np.int8)
            name = g.op(op, data, scale, zero, g.const(kernel, np.int8), g.const(1), none, scale, zero)
            name, bits = w.plain(name, scale, zero), 1
    w.put(name, [x.dims[0], (2,), (size + more,)], bound, bits)


# --- models that are no networks -------------------------------------------------------------------------------------


@_since(13, *(f"{ML}::{op}" for op in ("Binarizer", "Imputer", "LabelEncoder", "OneHotEncoder", "Scaler")))
def _prepared(w: Writer, x: Tensor, op: str) -> None:
    if x.bits == INEXACT or x.rank != 2 or not w.extended(x, 1) or 0 in x.sizes:
        return
    g, size = w.graph, x.sizes[1]
    columns = w.weights(w.pick([1, size])).tolist()
    if op in ("LabelEncoder", "OneHotEncoder"):
        keys = "keys_int64s" if op == "LabelEncoder" else "cats_int64s"
        values = {"values_floats": [2.0, -1.0, 1.0]} if op == "LabelEncoder" else {}
        dims = x.dims if op == "LabelEncoder" else (*x.dims, (3,))
        w.put(g.op(op, w.ids(x, 4), domain=ML, **{keys: [0, 1, 2]}, **values), dims, 2)
        return
    how: dict[str, Any] = {"threshold": 1.0}
    bound = x.bound + 2
    if op == "Imputer":
        how = {"imputed_value_floats": columns, "replaced_value_float": 1.0}
    elif op == "Scaler":
        how, bound = {"offset": columns, "scale": columns}, 2 * x.bound + 4
    if w.exact(x, bound):
        w.put(g.op(op, x.name, domain=ML, **how), x.dims, bound, x.bits)


@_since(13, f"{ML}::LinearClassifier", f"{ML}::SVMRegressor", f"{ML}::Normalizer")
def _classical(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 2 or not w.extended(x, 1) or 0 in x.sizes or not w.exact(x, 8 * x.sizes[1] * x.bound + 4):
        return
    g, size, bound = w.graph, x.sizes[1], 8 * x.sizes[1] * x.bound + 4
    if op == "Normalizer":
        name = g.op(op, g.op("Add", g.op("Abs", x.name), g.const(1)), domain=ML, norm=w.pick(["L1", "L2", "MAX"]))
        w.put(name, x.dims, 1, INEXACT)
    elif op == "LinearClassifier":
        how = {"coefficients": w.weights(3 * size).tolist(), "intercepts": w.weights(3).tolist()}
        _, scores = g.ops(op, 2, x.name, domain=ML, classlabels_ints=[0, 1, 2], **how)
        w.put(scores, w._cut(x, 1, 3), bound, x.bits)
    else:
        how = {"coefficients": w.weights(2).tolist(), "support_vectors": w.weights(2 * size).tolist(), "n_supports": 2}
        name = g.op(op, x.name, domain=ML, kernel_type="LINEAR", kernel_params=[0.0] * 3, rho=[1.0], **how)
        w.put(name, w._cut(x, 1, 1), bound, x.bits)


@_since(13, f"{ML}::TreeEnsembleClassifier", f"{ML}::TreeEnsembleRegressor")
def _trees(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 2 or not w.extended(x, 1) or 0 in x.sizes or x.bits == INEXACT:
        return
    features = [w.number(0, x.sizes[1] - 1) for _ in range(2)]
    kind, count = ("class", 3) if op == "TreeEnsembleClassifier" else ("target", 2)
    how: dict[str, Any] = {
        "nodes_treeids": [0, 0, 0, 1, 1, 1],
        "nodes_nodeids": [0, 1, 2] * 2,
        "nodes_featureids": [features[0], 0, 0, features[1], 0, 0],
        "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"] * 2,
        "nodes_values": [0.5, 0.0, 0.0, -0.5, 0.0, 0.0],
        "nodes_truenodeids": [1, 0, 0] * 2,
        "nodes_falsenodeids": [2, 0, 0] * 2,
        f"{kind}_treeids": [0, 0, 1, 1],
        f"{kind}_nodeids": [1, 2, 1, 2],
        f"{kind}_ids": [0, 1, count - 1, 0],
        f"{kind}_weights": [1.0, 2.0, 4.0, 8.0],
    }
    if kind == "target":
        name = w.graph.op(op, x.name, domain=ML, n_targets=count, **how)
    else:
        _, name = w.graph.ops(op, 2, x.name, domain=ML, classlabels_int64s=[0, 1, 2], **how)
    w.put(name, w._cut(x, 1, count), 16)


# --- layers ----------------------------------------------------------------------------------------------------------


@_since(11, "GRU", "LSTM", "RNN")
def _recurrent(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 3 or not w.extended(x, 2) or x.bound > 20 or 0 in x.sizes or len(x.dims[0]) > 1 or len(x.dims[1]) > 1:
        return
    g, size, hidden = w.graph, x.sizes[2], 2
    ways = w.pick(["forward", "forward", "reverse", "bidirectional"])
    count, gates = 1 + (ways == "bidirectional"), {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    operands = [g.op("Transpose", x.name, perm=[1, 0, 2])]
    operands += [g.const(0.2 * w.weights(count, gates * hidden, n)) for n in (size, hidden)]
    operands.append(g.const(0.2 * w.weights(count, 2 * gates * hidden)) if w.number(0, 1) else "")
    if w.number(0, 2) == 0 and w.told(x.dims[:1]):
        operands.append(w.filled(1, x.dims[0], INT32))
    how: dict[str, Any] = {"linear_before_reset": w.number(0, 1)} if op == "GRU" else {}
    every, last = g.ops(op, 2, *operands, hidden_size=hidden, direction=ways, **how)
    if w.number(0, 1):
        w.put(g.op("Transpose", last, perm=[1, 0, 2]), [x.dims[0], (count,), (hidden,)], 1, INEXACT)
    else:
        turned = g.op("Transpose", every, perm=[2, 0, 1, 3])
        w.put(turned, [x.dims[0], x.dims[1], (count,), (hidden,)], 1, INEXACT)


@_since(11, f"{MS}::Attention", f"{MS}::MultiHeadAttention")
def _attention(w: Writer, x: Tensor, op: str) -> None:
    if x.rank != 3 or not w.extended(x, 2) or x.bound > 20 or 0 in x.sizes or x.sizes[2] % 2:
        return
    g, size = w.graph, x.sizes[2]
    if op == "Attention":
        weights, shift = g.const(0.2 * w.weights(size, 3 * size)), g.const(0.2 * w.weights(3 * size))
        w.put(g.op(op, x.name, weights, shift, domain=MS, num_heads=2), x.dims, 200, INEXACT)
        return
    keys = [v for v in w.values if v.rank == 3 and v.dims[0] == x.dims[0] and v.dims[2] == x.dims[2] and v.bound <= 20]
    k = w.pick(keys)
    if 0 not in k.sizes:
        w.put(g.op(op, x.name, k.name, k.name, domain=MS, num_heads=2), x.dims, 200, INEXACT)


# --- control flow ----------------------------------------------------------------------------------------------------


@_since(11, "If")
def _if(w: Writer, x: Tensor, op: str) -> None:
    g, symbol = w.graph, w.pick([N, *(s for s in w.lengths if w.has(s))])
    test = g.op("Greater", g.op("Cast", w.number_of(symbol), to=FLOAT), g.const(w.pick([0, 1, 2, 50])))
    ways = []
    for kind in ("Neg", "Relu"):
        out = g.fresh("branch")
        ways.append(w.body([helper.make_node(kind, [x.name], [out])], [], [w.info(out)]))
    w.put(g.op(op, test, then_branch=ways[0], else_branch=ways[1]), x.dims, x.bound, x.bits)


@_since(13, "Loop")
def _loop(w: Writer, x: Tensor, op: str) -> None:
    g = w.graph
    k, go, still = g.fresh("k"), g.fresh("go"), g.fresh("still")
    given = [w.info(k, INT64, []), w.info(go, BOOL, [])]
    on = helper.make_node("Identity", [go], [still])
    if x.rank == 2 and x.dims[0] == (N,) and w.extended(x, 1) and w.number(0, 1) and x.bits != INEXACT:
        # Rows of ids that are looked up and added, one row after the other: EmbeddingBag.
        width, ids, table = w.width, w.ids(x, 5), g.const(w.weights(5, w.width))
        row, found, out = g.fresh("row"), g.fresh("found"), g.fresh("bag")
        nodes = [
            on,
            helper.make_node("Gather", [ids, k], [row], axis=0),
            helper.make_node("Gather", [table, row], [found], axis=0),
            helper.make_node("ReduceSum", [found, g.ints(0)], [out], keepdims=0),
        ]
        body = w.body(nodes, given, [w.info(still, BOOL, []), w.info(out)])
        w.put(g.op(op, w.number_of(N), "", body=body), [(N,), (width,)], 2 * x.sizes[1])
    elif w.exact(x, 4 * x.bound):
        state, out = g.fresh("state"), g.fresh("state")
        body = w.body([on, helper.make_node("Add", [state, x.name], [out])], [*given, w.info(state)],
                      [w.info(still, BOOL, []), w.info(out)])  # fmt: skip
        w.put(g.op(op, g.const(3, np.int64), "", x.name, body=body), x.dims, 4 * x.bound, x.bits)


@_since(11, "Scan")
def _scan(w: Writer, x: Tensor, op: str) -> None:
    if x.rank < 2 or 0 in x.sizes:
        return
    bound = x.bound * (512 if N in x.dims[0] else w.size(x, 0))
    if not w.exact(x, bound):
        return
    g = w.graph
    state, one, out, line = (g.fresh(n) for n in ("state", "one", "state", "line"))
    nodes = [helper.make_node("Add", [state, one], [out]), helper.make_node("Identity", [out], [line])]
    body = w.body(nodes, [w.info(state), w.info(one)], [w.info(out), w.info(line)])
    zero = g.op("Mul", g.op("Gather", x.name, g.const(0, np.int64), axis=0), g.const(0))
    _, lines = g.ops(op, 2, zero, x.name, body=body, num_scan_inputs=1)
    w.put(lines, x.dims, bound, x.bits)
