"""Layers of ranking models in random programs, whole, as exporters write them.

Operators that are drawn one by one hardly ever come together as a cross layer or as attention with heads. Each of
`LAYERS` declares inputs of its own, of several levels, and appends such a layer over them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from helpers import Given
from lengths import INEXACT, LENGTHS, LengthWriter
from onnx import TensorProto, helper
from programs import N, Tensor

LAYERS: dict[str, Callable[[LengthWriter], None]] = {}
"""By name: appends the layer to a program."""
_ROUNDED = 200


def _layer(step: Callable[[LengthWriter], None]) -> Callable[[LengthWriter], None]:
    LAYERS[step.__name__.strip("_")] = step
    return step


# --- what the layers share -------------------------------------------------------------------------------------------


def _given(w: LengthWriter, level: str, *shape: int | str) -> Tensor:
    """An input of its own."""
    made = Given(f"{level[0]}{len(w.inputs)}", shape, level)
    made.declare(w.graph)
    w.inputs.append(made)
    w.put(made.name, [() if level == "once" else (N,), *((d,) for d in shape)], 3)
    return w.values[-1]


def _beside(w: LengthWriter, axis: int, *parts: str) -> str:
    """Tensors side by side, in whatever order."""
    return w.graph.op("Concat", *w.random.sample(parts, len(parts)), axis=axis)


def _levels(w: LengthWriter, *wide: int) -> tuple[str, int]:
    """Entries of the request and of candidates along axis 1, and how many there are; `wide` are the axes behind."""
    counts = {level: w.pick([1, 2, 4]) for level in ("request", "candidate")}
    names = [_given(w, level, n, *wide).name for level, n in counts.items()]
    return _beside(w, 1, *names), sum(counts.values())


def _put(w: LengthWriter, name: str, shape: list[int], bound: int, bits: int = 0) -> None:
    w.put(name, [(N,), *((n,) for n in shape)], bound, bits)


def _mapped(w: LengthWriter, name: str, inner: int, width: int) -> str:
    return w.graph.op("MatMul", name, w.graph.const(w.weights(inner, width)))


def _history(w: LengthWriter, width: int) -> tuple[Tensor, Tensor, str]:
    """A history of some length, a candidate, and the candidate as one more position."""
    history, item = _given(w, "request", w.pick(w.lengths), width), _given(w, "candidate", width)
    return history, item, w.graph.on_axes("Unsqueeze", item.name, [1])


# --- towers ----------------------------------------------------------------------------------------------------------


@_layer
def _cross(w: LengthWriter) -> None:
    """Cross layers of DCN: of its first version with a vector, of its second with a matrix."""
    g = w.graph
    first, n = _levels(w)
    x, bound, width = first, 3, w.pick([1, n, n])
    for _ in range(w.number(1, 2)):
        product = g.op("Gemm", x, g.const(w.weights(n, width)), g.const(w.weights(width)))
        x, bound = g.op("Add", g.op("Mul", *w.random.sample([first, product], 2)), x), 3 * (2 * n * bound + 2) + bound
    _put(w, x, [n], bound)
    w.op_fc(w.values[-1])


@_layer
def _factorised(w: LengthWriter) -> None:
    """The second order of a factorisation machine."""
    g = w.graph
    fields, n = _levels(w, w.width)
    total = g.on_axes("ReduceSum", fields, [1], keepdims=0)
    squares = g.on_axes("ReduceSum", g.op("Mul", fields, fields), [1], keepdims=0)
    squared = g.op("Mul", total, total) if w.number(0, 1) else g.op("Pow", total, g.const(2))
    _put(w, g.op("Sub", squared, squares), [w.width], 9 * n * n + 9 * n)
    w.op_fc(w.values[-1])


@_layer
def _pairs(w: LengthWriter) -> None:
    """Products of pairs of fields, some of them read by a linear map."""
    g = w.graph
    fields, n = _levels(w, w.width)
    products = g.op("MatMul", fields, g.op("Transpose", fields, perm=[0, 2, 1]))
    flat = g.op("Reshape", products, g.ints(-1, n * n))
    first, second = np.triu_indices(n, 1)
    _put(w, g.op("Gather", flat, g.ints(*(first * n + second)), axis=1), [len(first)], 9 * w.width)
    w.op_fc(w.values[-1])


@_layer
def _products(w: LengthWriter) -> None:
    """Products of a request's fields with the candidate's, entry by entry, read by a linear map."""
    g, count = w.graph, w.pick([2, 4, 8])
    user, item = _given(w, "request", count, w.width), _given(w, "candidate", 1, w.width)
    flat = g.op("Reshape", g.op("Mul", user.name, item.name), g.ints(-1, count * w.width))
    if w.number(0, 1):
        flat = g.op("Add", flat, _given(w, w.pick(["request", "candidate"]), count * w.width).name)
    _put(w, flat, [count * w.width], 12)
    w.op_fc(w.values[-1])


@_layer
def _activated(w: LengthWriter) -> None:
    """PReLU or Dice over a sequence that ids look up, by channels that may be normalised, in front or behind."""
    g, length, turned = w.graph, w.pick(w.lengths), w.number(0, 1)
    table = g.const(w.weights(4, w.width))

    def looked_up(level: str, *shape: int | str) -> str:
        return g.op("Gather", table, g.op("Cast", _given(w, level, *shape).name, to=TensorProto.INT64), axis=0)

    def placed(x: str) -> str:
        return g.op("Transpose", x, perm=[0, 2, 1]) if turned else x

    def columns(numbers: list[float]) -> str:
        drawn = np.array([w.pick(numbers) for _ in range(w.width)])
        return g.const(drawn.reshape(-1, 1) if turned else drawn)

    x = g.op("Add", _mapped(w, looked_up("request", length), w.width, w.width), looked_up("candidate", 1))
    x, bound = placed(x), 4 * w.width + 2
    if turned and w.number(0, 1):
        scale, bias, mean = (g.const(w.weights(w.width)) for _ in range(3))
        x = g.op("BatchNormalization", x, scale, bias, mean, g.const(np.ones(w.width)), epsilon=0.0)
        bound = 2 * (bound + 2) + 2
    if w.number(0, 1):
        slopes = w.pick([[0.5], [0.25, 0.5, 1.0], [-1.0, 0.0, 0.5, 2.0]])
        y, bound = g.op("PRelu", x, g.const(slopes) if len(slopes) == 1 else columns(slopes)), 2 * bound
    else:
        p = g.op("Mul", placed(looked_up(w.pick(["request", "candidate"]), 1)), g.const(0.5))
        rest = g.op("Mul", columns([-2.0, -0.5, 0.0, 1.0]), g.op("Sub", g.const(1), p))
        y, bound = g.op("Add", g.op("Mul", rest, x), g.op("Mul", p, x)), 5 * bound
    w.put(placed(y), [(N,), (length,), (w.width,)], bound, 2)
    w.op_reduce(w.values[-1])


@_layer
def _stacked(w: LengthWriter) -> None:
    """A linear map of its own for each field."""
    g = w.graph
    fields, n = _levels(w, w.width)
    turned = g.op("MatMul", g.op("Transpose", fields, perm=[1, 0, 2]), g.const(w.weights(n, w.width, 3)))
    made = g.op("Transpose", turned, perm=[1, 0, 2])
    _put(w, g.op("Relu", made) if w.number(0, 1) else made, [n, 3], 6 * w.width)
    w.op_reduce(w.values[-1])


@_layer
def _normal_columns(w: LengthWriter) -> None:
    """A layer normalisation over what the request and the candidate give, and a linear map."""
    g = w.graph
    if g.opset < 17:
        return
    rows, n = _levels(w)
    how = [g.const(w.weights(n)) for _ in range(w.number(1, 2))]
    made = g.op("LayerNormalization", rows, *how, epsilon=0.1)
    _put(w, _mapped(w, made, n, 3), [3], _ROUNDED, INEXACT)


@_layer
def _normal_rows(w: LengthWriter) -> None:
    """A layer normalisation with numbers of its own for each row, and a linear map."""
    g = w.graph
    if g.opset < 17:
        return
    rows, n = _levels(w, w.width)
    shape = w.pick([(n, w.width), (1, n, w.width), (n, 1), (1, w.width), (w.width,)])
    how = [g.const(w.weights(*shape)) for _ in range(w.number(1, 2))]
    made = g.op("LayerNormalization", rows, *how, axis=w.pick([-1, 2]), epsilon=0.1)
    _put(w, _mapped(w, made, w.width, 3), [n, 3], _ROUNDED, INEXACT)


@_layer
def _last(w: LengthWriter) -> None:
    """One position of a layer that is made for all, beside something of the request."""
    g, count = w.graph, w.pick([2, 3, 5])
    x = _given(w, "candidate", count, w.width)
    made = g.op("Relu", _mapped(w, x.name, w.width, 3))
    one = g.op("Gather", made, g.const(w.number(-count, count - 1), np.int64), axis=1)
    _put(w, g.op("Mul", one, _mapped(w, _given(w, "request", w.width).name, w.width, 3)), [3], (6 * w.width) ** 2)


# --- histories -------------------------------------------------------------------------------------------------------


@_layer
def _interest(w: LengthWriter) -> None:
    """DIN: how much every position of a history is like the candidate, by a small network; their weighted sum."""
    g = w.graph
    history, _, query = _history(w, 2)
    queries = g.op("Expand", query, w.target(history.dims))
    parts = [queries, history.name, g.op("Sub", queries, history.name), g.op("Mul", queries, history.name)]
    hidden = g.op("Relu", _mapped(w, _beside(w, 2, *parts), 8, 2))
    weights = _mapped(w, hidden, 2, 1)
    if w.number(0, 1):
        seen = g.op("Greater", _given(w, "request", *history.dims[1], 1).name, g.const(0))
        weights = g.op("Where", seen, weights, g.const(0))
    weighted = g.op("Mul", weights, history.name)
    _put(w, g.on_axes("ReduceSum", weighted, [1], keepdims=0), [2], 4 * 144 * 3 * max(LENGTHS))


@_layer
def _weighed(w: LengthWriter) -> None:
    """Attention without a softmax, whose weights are masked and divided."""
    g = w.graph
    history, _, query = _history(w, 2)
    scores = g.op("MatMul", query, g.op("Transpose", history.name, perm=[0, 2, 1]))
    mask = _given(w, "request", *history.dims[1])
    scores = g.op("Div", g.op("Mul", scores, g.on_axes("Unsqueeze", mask.name, [1])), g.const(2))
    made = g.on_axes("Squeeze", g.op("MatMul", scores, history.name), [1])
    _put(w, made, [2], 2 * 9 * 3 * 3 * max(LENGTHS), 1)


@_layer
def _vector(w: LengthWriter) -> None:
    """Rows of candidates, each entry with a factor, times a vector of the request."""
    g = w.graph
    item, user = _given(w, "candidate", w.width), _given(w, "once", w.width)
    vector = g.on_axes("Squeeze", user.name, [0])
    scaled = g.op("Mul", item.name, w.pick([vector, g.const(w.weights(w.width)), g.const(2)]))
    _put(w, g.op("MatMul", scaled, g.op("Relu", vector)), [], 27 * w.width)


@_layer
def _searched(w: LengthWriter) -> None:
    """The positions of a history that are most like the candidate, mapped, beside it in a small network."""
    g, count = w.graph, w.pick([3, 5])
    history, item = _given(w, "request", count, w.width), _given(w, "candidate", w.width)
    scores = g.on_axes("Squeeze", g.op("MatMul", history.name, g.on_axes("Unsqueeze", item.name, [2])), [2])
    _, at = g.ops("TopK", 2, scores, g.ints(2), axis=1)
    wide = g.op("Expand", g.on_axes("Unsqueeze", at, [2]), g.ints(1, 1, w.width))
    rows = g.op("GatherElements", history.name, wide, axis=1)
    bound = 3
    if w.number(0, 1):
        rows, bound = g.op("Relu", _mapped(w, rows, w.width, w.width)), 6 * w.width
    if w.number(0, 1):
        query = g.op("Expand", g.on_axes("Unsqueeze", item.name, [1]), g.ints(1, 2, w.width))
        parts = [query, rows, g.op("Sub", query, rows), g.op("Mul", query, rows)]
        rows, bound = _mapped(w, _beside(w, 2, *parts), 4 * w.width, w.width), 8 * w.width * 3 * bound
    elif g.opset >= 17 and w.number(0, 1):
        shape = w.pick([(w.width,), (2, w.width), (1, w.width)])
        rows = g.op("LayerNormalization", rows, g.const(w.weights(*shape)), epsilon=0.1)
        _put(w, rows, [2, w.width], _ROUNDED, INEXACT)
        return
    _put(w, rows, [2, w.width], bound)
    w.op_reduce(w.values[-1])


@_layer
def _heads(w: LengthWriter) -> None:
    """Attention with heads: the candidate on a history, which is masked or not."""
    g, width = w.graph, 4
    history, _, query = _history(w, width)
    (length,) = history.dims[1]

    def heads(name: str, count: str | int) -> str:
        shape = w.target([(N,), (count,), (2,), (2,)]) if count != 1 else g.ints(-1, 1, 2, 2)
        made = g.op("Reshape", g.op("Mul", _mapped(w, name, width, width), g.const(0.2)), shape)
        return g.op("Transpose", made, perm=[0, 2, 1, 3])

    keys = g.op("Transpose", heads(history.name, length), perm=[0, 1, 3, 2])
    scores = g.op("MatMul", heads(query, 1), keys)
    if w.number(0, 1):
        seen = g.op("Greater", _given(w, "request", length).name, g.const(0))
        seen = g.on_axes("Unsqueeze", seen, [1, 2])
        scores = g.op("Where", seen, scores, g.const(w.pick([-1e4, -1e9])))
    made = g.op("MatMul", g.op("Softmax", scores, axis=3), heads(history.name, length))
    flat = g.op("Reshape", g.op("Transpose", made, perm=[0, 2, 1, 3]), g.ints(-1, width))
    _put(w, _mapped(w, flat, width, 3), [3], _ROUNDED, INEXACT)


@_layer
def _encoder(w: LengthWriter) -> None:
    """Layers of attention over a history and the candidate behind it, which the history does not see."""
    g, count, width = w.graph, w.pick([2, 3]), 4
    history, item = _given(w, "request", count, width), _given(w, "candidate", 1, width)
    x = g.op("Concat", history.name, item.name, axis=1)
    hidden = np.zeros((1, count + 1, count + 1), bool)
    hidden[:, :-1, -1] = True
    for _ in range(w.number(1, 2)):
        x = g.op("Mul", x, g.const(0.2))
        scores = g.op("MatMul", _mapped(w, x, width, width), g.op("Transpose", x, perm=[0, 2, 1]))
        scores = g.op("Where", g.const(hidden, bool), g.const(w.pick([-1e4, -1e9])), scores)
        x = _mapped(w, g.op("MatMul", g.op("Softmax", scores, axis=2), x), width, width)
    _put(w, g.op("Gather", x, g.const(count, np.int64), axis=1), [width], _ROUNDED, INEXACT)


@_layer
def _chosen(w: LengthWriter) -> None:
    """One of two encoders of the history, as the request says."""
    g = w.graph
    history, item = _given(w, "request", w.pick(w.lengths), w.width), _given(w, "candidate", 3)
    test = g.op("Gather", _given(w, "request", 1).name, g.const(0, np.int64), axis=0)
    test = g.op("Greater", g.on_axes("Squeeze", test, [0]), g.const(0))
    ways = []
    for kind in ("Relu", "Neg"):
        weights, made, out = g.const(w.weights(w.width, 3)), g.fresh("made"), g.fresh("branch")
        nodes = [helper.make_node("MatMul", [history.name, weights], [made]), helper.make_node(kind, [made], [out])]
        ends = [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)]
        ways.append(helper.make_graph(nodes, g.fresh("way"), [], ends))
    made = g.on_axes("ReduceSum", g.op("If", test, then_branch=ways[0], else_branch=ways[1]), [1], keepdims=0)
    _put(w, g.op("Add", made, item.name), [3], 6 * w.width * max(LENGTHS) + 3)
