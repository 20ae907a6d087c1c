"""What a model costs per request, from its measured shapes: multiply-adds, bytes and launches by level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from onnx import GraphProto, ModelProto, NodeProto, helper

from onnxrank.extents import evaluate
from onnxrank.facts import Facts
from onnxrank.report import LevelCost
from onnxrank.values import CANDIDATES, is_candidate_symbol

LENGTH = 32
"""What symbols other than the number of candidates are taken as."""
_SECONDS_PER_MAC = 1 / 25e9
_SECONDS_PER_BYTE = 1 / 8e9
_SECONDS_PER_LAUNCH = 1.5e-6
_PRODUCTS = {"MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "Conv", "Einsum", "Attention", "MultiHeadAttention"}
_FREE = {"Constant", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Shapes:
    """Shapes of all tensors at one number of candidates."""

    facts: Facts
    initializers: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, tuple[tuple[int, tuple[str, ...]], ...]]
    symbols: Mapping[str, int]

    def symbol(self, name: str) -> int:
        """Value of a symbol, opaque ones included; 1 where the extent depends on data."""
        if name in self.symbols:
            return self.symbols[name]
        found = self.facts.expressions.get(name)
        if found is None or not found.symbols <= self.symbols.keys():
            return 1
        return evaluate(found, self.symbols)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, if known."""
        if name in self.initializers:
            return self.initializers[name]
        found = self.facts.extents.get(name) or self.inputs.get(name)
        if found is None:
            return None
        return tuple(c * prod(self.symbol(s) for s in syms) for c, syms in found)

    def per_candidate(self, name: str) -> bool:
        """Whether a tensor has rows of candidates."""
        found = self.facts.extents.get(name) or self.inputs.get(name) or ()
        return any(is_candidate_symbol(s) for _, syms in found for s in syms)


def _attribute(node: NodeProto, name: str, default: int = 0) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def node_macs(node: NodeProto, shapes: Shapes) -> int:
    """Multiply-adds of the matrix products of one node; 0 for other operators and unknown shapes."""
    op = node.op_type
    if op not in _PRODUCTS:
        return 0
    x = [shapes.shape(i) if i else None for i in node.input]
    if op in ("MatMul", "Gemm", "FusedMatMul", "MatMulInteger"):
        out, a = shapes.shape(node.output[0]), x[0]
        if out is None or a is None:
            return 0
        return prod(out) * (a[-2] if _attribute(node, "transA") and len(a) > 1 else a[-1])
    if op == "Conv":
        out, w = shapes.shape(node.output[0]), x[1]
        return 0 if out is None or w is None else prod(out) * prod(w[1:])
    if op == "Einsum":
        if len(node.input) < 2 or any(s is None for s in x):
            return 0
        equation = next(helper.get_attribute_value(a) for a in node.attribute if a.name == "equation").decode()
        size: dict[str, int] = {}
        for term, s in zip(equation.replace(" ", "").split("->")[0].split(","), x, strict=True):
            for c, n in zip(term, s or (), strict=False):
                size[c] = max(size.get(c, 1), n)
        return prod(size.values())
    if op in ("Attention", "MultiHeadAttention") and len(x) > 1 and x[0] and x[1]:
        return 2 * prod(x[0]) * x[1][-2]
    return 0


def node_bytes(node: NodeProto, shapes: Shapes) -> int:
    """Bytes that a node writes, four per entry."""
    if node.op_type in _FREE:
        return 0
    return sum(4 * prod(s) for o in node.output if o and (s := shapes.shape(o)) is not None)


def shapes_of(model: ModelProto, facts: Facts, inputs: Mapping[str, tuple[tuple[int, tuple[str, ...]], ...]],
              candidates: int) -> Shapes:  # fmt: skip
    """Shapes at a number of candidates; other symbols are taken as `LENGTH`."""
    initializers = {t.name: tuple(t.dims) for t in model.graph.initializer}
    others = {s for found in [*facts.extents.values(), *inputs.values()] for _, syms in found for s in syms}
    others |= {s for size in facts.expressions.values() for s in size.symbols}
    return Shapes(facts, initializers, inputs, {**{s: LENGTH for s in others if "~" not in s}, CANDIDATES: candidates})


def by_level(graph: GraphProto, shapes: Shapes) -> dict[str, LevelCost]:
    """Costs of a graph by level of its nodes."""
    totals = {level: [0, 0, 0, 0] for level in ("constant", "request", "candidate")}
    fixed = set(shapes.initializers)
    seen: set[str] = set()
    for node in graph.node:
        if any(o and shapes.per_candidate(o) for o in node.output):
            level = "candidate"
        elif all(not i or i in fixed for i in node.input) and node.op_type not in ("Shape", "Size"):
            level = "constant"
            fixed |= set(node.output)
        else:
            level = "request"
        t = totals[level]
        t[0] += 1
        for i in node.input:
            if i in shapes.initializers and i not in seen:
                seen.add(i)
                t[1] += prod(shapes.initializers[i])
        t[2] += node_macs(node, shapes)
        t[3] += node_bytes(node, shapes)
    return {level: LevelCost(*t) for level, t in totals.items()}


def _recurrent_macs(node: NodeProto, shapes: Shapes) -> int:
    """Multiply-adds inside a recurrent layer, which runs them step by step."""
    if node.op_type not in ("GRU", "LSTM", "RNN"):
        return 0
    x, w, r = (shapes.shape(i) for i in node.input[:3])
    return 0 if x is None or w is None or r is None else prod(x[:2]) * (prod(w) + prod(r))


def estimate(macs: float = 0, written: float = 0, launches: float = 0) -> float:
    """Seconds on one core.

    Args:
        macs: Multiply-adds of matrix products.
        written: Bytes written.
        launches: Operators run.
    """
    return macs * _SECONDS_PER_MAC + written * _SECONDS_PER_BYTE + launches * _SECONDS_PER_LAUNCH


def node_seconds(node: NodeProto, shapes: Shapes) -> float:
    """Predicted time of one node on one core."""
    macs = node_macs(node, shapes) + _recurrent_macs(node, shapes)
    return estimate(macs, node_bytes(node, shapes), node.op_type not in _FREE)


def seconds(graph: GraphProto, shapes: Shapes) -> float:
    """Predicted time of one request on one core."""
    return sum(node_seconds(n, shapes) for n in graph.node)
