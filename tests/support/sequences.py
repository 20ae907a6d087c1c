"""Random models over a sequence `[history; candidate]` of symbolic length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from helpers import BOOL, Given, Graph, candidate, request
from onnx import TensorProto, helper

D = 4
INF, FAR = float("-inf"), -1e9
LENGTHS = (0, 1, 2, 7, 61)


@dataclass
class Sequence:
    """A graph over tokens `[N, L + k, D]`, k of them the candidate's.

    Attributes:
        graph: The graph.
        tokens: The tensor of all tokens.
        given: The inputs.
        own: How many are the candidate's.
        first: Whether those come first.
        at: Positions `[L + k]`.
    """

    graph: Graph
    tokens: str
    given: list[Given]
    own: int = 1
    first: bool = False

    def __post_init__(self) -> None:
        g = self.graph
        size = g.op("Gather", g.op("Shape", self.tokens), g.const(1, np.int64), axis=0)
        self.size = size
        self.at = g.op("Range", g.const(0, np.int64), size, g.const(1, np.int64))

    @property
    def rows(self) -> str:
        """Positions as a column."""
        return self.graph.on_axes("Unsqueeze", self.at, [1])


def sequence(first: bool = False, own: int = 1, opset: int = 17, length: int | str = "L") -> Sequence:
    """Tokens of the history and of the candidate, or the other way round."""
    g = Graph(opset)
    given = [request("h", length, D), candidate("c", own, D), request("seen", length)]
    h, c, _ = (i.declare(g) for i in given)
    return Sequence(g, g.op("Concat", *((c, h) if first else (h, c)), axis=1), given, own, first)


def fc(s: Sequence, x: str, out: int = D, seed: int = 0) -> str:
    """A layer on each token."""
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(0, 0.5, (D, out)), rng.normal(0, 0.5, out)
    return s.graph.op("Add", s.graph.op("MatMul", x, s.graph.const(weight)), s.graph.const(bias))


def causal(s: Sequence, fill: float = INF, how: str = "range") -> Callable[[str], str]:
    """A mask that hides later tokens, put on scores."""
    g = s.graph
    if how == "range":
        later = g.op("Greater", s.at, s.rows)
        return lambda x: g.op("Where", later, g.const(fill), x)
    if how == "added":
        mask = g.op("Where", g.op("Less", s.rows, s.at), g.const(fill), g.const(0.0))
        return lambda x: g.op("Add", x, mask)
    if how in TABLES:
        return _of_table(s, how, np.where(np.triu(np.ones((80, 80), bool), 1), fill, 0.0))
    both = g.op("Concat", *[g.on_axes("Unsqueeze", s.size, [0])] * 2, axis=0)
    if how == "trilu":
        full = g.op("Trilu", g.op("Expand", g.const([[fill]]), both), g.const(1, np.int64), upper=1)
        return lambda x: g.op("Add", x, full)
    ones = g.op("ConstantOfShape", both, value=helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0]))
    lower = g.op("Cast", g.op("Trilu", ones, upper=0), to=BOOL)
    hidden = g.op("Not", lower)
    return lambda x: g.op("Where", hidden, g.const(fill), x)


WAYS = ("range", "added", "trilu", "lower")
TABLES = ("table", "table, axis by axis", "table of flags")


def _of_table(s: Sequence, how: str, table: np.ndarray) -> Callable[[str], str]:
    """A constant of more positions, cut to those that there are."""
    g, size = s.graph, s.graph.on_axes("Unsqueeze", s.size, [0])
    fill = float(table.min())
    whole = g.const(table == fill, bool) if how == "table of flags" else g.const(table)
    if how == "table":
        cut = g.op("Slice", whole, g.ints(0, 0), g.op("Concat", size, size, axis=0), g.ints(0, 1))
    else:
        rows = g.op("Slice", whole, g.ints(0), size, g.ints(0), g.ints(1))
        cut = g.op("Slice", rows, g.ints(0), size, g.ints(-1))
    if how == "table of flags":
        return lambda x: g.op("Where", cut, g.const(fill), x)
    return lambda x: g.op("Add", x, cut)


def open_table(s: Sequence) -> Callable[[str], str]:
    """The same, of which one entry does not hide a later position."""
    table = np.where(np.triu(np.ones((80, 80), bool), 1), INF, 0.0)
    table[3, 4] = 0.0
    return _of_table(s, "table", table)


def attention(s: Sequence, x: str, mask: Callable[[str], str] | None, heads: int = 1, seed: int = 0) -> str:
    """Self-attention of all tokens, with a mask on the scores."""
    g = s.graph
    q, k, v = (fc(s, x, seed=seed + j) for j in range(3))
    if heads > 1:
        shape = g.ints(0, -1, heads, D // heads)
        q, k, v = (g.op("Transpose", g.op("Reshape", t, shape), perm=[0, 2, 1, 3]) for t in (q, k, v))
    turned = g.op("Transpose", k, perm=[0, 1, 3, 2] if heads > 1 else [0, 2, 1])
    scores = g.op("Div", g.op("MatMul", q, turned), g.const(float(D // heads) ** 0.5))
    weights = g.op("Softmax", mask(scores) if mask else scores, axis=-1)
    out = g.op("MatMul", weights, v)
    if heads > 1:
        out = g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.ints(0, -1, D))
    return out


def pointwise_attention(s: Sequence, x: str, masked: str, seed: int = 0) -> str:
    """Attention whose weights are an activation of each score, `silu(q k) / T`, under a causal mask."""
    g = s.graph
    q, k, v = (fc(s, x, seed=seed + j) for j in range(3))
    scores = g.op("MatMul", q, g.op("Transpose", k, perm=[0, 2, 1]))
    weights = g.op("Div", g.op("Mul", scores, g.op("Sigmoid", scores)), g.op("Cast", s.size, to=1))
    earlier = g.op("LessOrEqual", s.at, s.rows)
    if masked == "table":
        # Along its rows the table meets the whole sequence at the scores only.
        size, table = g.on_axes("Unsqueeze", s.size, [0]), g.const(np.tri(80))
        cut = g.op("Slice", table, g.ints(0, 0), g.op("Concat", size, size, axis=0), g.ints(0, 1))
        some = g.op("Cast", g.op("GreaterOrEqual", s.at, g.const(0, np.int64)), to=1)
        weights = g.op("Mul", weights, g.op("Mul", cut, g.on_axes("Unsqueeze", some, [0])))
    elif masked == "chosen":
        weights = g.op("Where", earlier, weights, g.const(0.0))
    else:
        weights = g.op("Mul", weights, g.op("Cast", earlier, to=1))
    return g.op("MatMul", weights, v)


def norm(s: Sequence, x: str) -> str:
    """Layer normalisation."""
    return s.graph.op("LayerNormalization", x, s.graph.const(np.ones(D)), s.graph.const(np.zeros(D)), axis=-1)


def padding(s: Sequence, fill: float) -> str:
    """What is added to scores of positions of the history that the request says are empty; the candidate's is not."""
    g = s.graph
    empty = g.op("Less", "seen", g.const(0.0))
    shown = g.op("Expand", g.const(False, bool), g.op("Concat", g.op("Shape", "seen", end=1), g.ints(s.own), axis=0))
    hidden = g.op("Concat", empty, shown, axis=1)
    return g.on_axes("Unsqueeze", g.op("Where", hidden, g.const(fill), g.const(0.0)), [1])


def random_model(seed: int) -> tuple[Graph, list[Given]]:
    """Some layers of a transformer over a sequence, in random forms, with masks or without."""
    random = Random(seed)
    s = sequence(first=random.random() < 0.2, own=random.choice([1, 1, 1, 2]))
    g, x = s.graph, s.tokens
    if random.random() < 0.6:
        table = g.const(np.random.default_rng(seed).normal(0, 1, (80, D)))
        cut = g.op("Slice", table, g.ints(0), g.on_axes("Unsqueeze", s.size, [0]), g.ints(0))
        x = g.op("Add", x, random.choice([cut, g.op("Gather", table, s.at)]))
    fill = random.choice([INF, INF, FAR])
    mask = random.choice([None, *(causal(s, fill, how) for how in WAYS)])
    if random.random() < 0.4 and mask is not None:
        pad, inner, heads = padding(s, FAR), mask, 1
        mask = lambda t: g.op("Add", inner(t), pad)  # noqa: E731
    else:
        heads = random.choice([1, 2])
    for layer in range(random.randint(1, 3)):
        step = random.choice(["attention", "attention", "fc", "gate", "mean"])
        if step == "attention":
            x = g.op("Add", x, attention(s, norm(s, x), mask, heads, seed + layer))
        elif step == "fc":
            x = g.op("Add", x, fc(s, g.op("Relu", fc(s, norm(s, x), seed=seed + layer)), seed=seed))
        elif step == "gate":
            x = g.op("Mul", x, g.op("Sigmoid", fc(s, x, seed=seed)))
        else:
            x = g.op("Sub", x, g.on_axes("ReduceMean", x, [1], keepdims=1))
    end = random.choice(["last", "slice", "mean", "all", "sum"])
    if end == "last":
        out, shape = g.op("Gather", x, g.const(-1, np.int64), axis=1), ["N", D]
    elif end == "slice":
        out, shape = g.op("Slice", x, g.ints(-1), g.ints((1 << 63) - 1), g.ints(1)), ["N", 1, D]
    elif end == "mean":
        out, shape = g.on_axes("ReduceMean", x, [1], keepdims=0), ["N", D]
    elif end == "sum":
        out, shape = g.on_axes("ReduceSum", g.op("Mul", x, x), [1, 2], keepdims=0), ["N"]
    else:
        out, shape = x, ["N", "T", D]
    g.output(out, shape)
    return g, s.given
