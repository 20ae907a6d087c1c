"""`fc`: a linear map with constant weights over entries of several levels is done once per level.

`[u | x] W + b = x W_x + (u W_u + b)`, over any layout: the weights' rows are gathered once, offline, so that each level
has one product with its entries side by side. The request-level product rides in the candidate-level Gemm's C.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from onnx import NodeProto

from onnxrank.graphs import attribute
from onnxrank.operators import operator
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import (
    Abstract,
    DeferredMatMul,
    Dims,
    Level,
    Value,
    canonical,
    extended,
    is_candidate_symbol,
    symbols,
)
from onnxrank.weights import Weights

from . import stacks
from .einsum import einsum
from .products import MatrixProduct, contract, distribute, linear_last, linear_left, with_addend, worthwhile


def matmul(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """MatMul with a constant on either side; two computed operands are left to other rules."""
    x, unread = rw.operand(node, 0), rw.needed.get(node.output[0])
    weight = rw.weights(node, 1)
    if weight is not None and x is not None and x.rank >= 2:
        if not worthwhile(rw, x, unread) and not _takes_bias(rw, node, x):
            return _plain(rw, node, rw.settle(x), weight.data.shape[1])
        return [linear_last(rw, x, weight, "fc", unread)]
    turned, y = rw.weights(node, 0, turned=True), rw.operand(node, 1)
    if turned is not None and y is not None and y.rank >= 2:
        return [linear_left(rw, y, turned, unread)] if worthwhile(rw, y, unread) else None
    return stacks.matmul(rw, node)


def _takes_bias(rw: Rewrite, node: NodeProto, x: Abstract) -> bool:
    """Whether a product could take the bias behind it, were it one of matrices, and nothing is moved for it."""
    if x.rank < 3 or not any(map(is_candidate_symbol, symbols(x.dims))):
        return False
    if rw.level(x) > Level.REQUEST and len(extended(x.dims)) > 2:
        return False
    found = rw.readers(node.output[0])
    return len(found) == 1 and operator(found[0]) == "Add" and any(rw.array(found[0], k) is not None for k in (0, 1))


def _plain(rw: Rewrite, node: NodeProto, x: Value, width: int) -> list[Abstract]:
    names = [rw.tensor(rw.value(node, k)) if i else "" for k, i in enumerate(node.input)]
    return rw.keep(node, names, [(*x.dims[:-1], canonical([width]))], rw.present(x))


def gemm(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Gemm with a constant B."""
    turned = bool(attribute(node, "transB", 0))
    x, unread = rw.operand(node, 0), rw.needed.get(node.output[0])
    if x is None or attribute(node, "transA", 0):
        return None
    weight = rw.weights(node, 1, turned)
    bias = rw.operand(node, 2)
    if weight is None:
        # Gemm does not broadcast its matrices, so both must hold the rows they have.
        b = rw.value(node, 1)
        if any(map(is_candidate_symbol, symbols(b.dims))):
            return None
        inner, width = b.dims[:: 1 if not turned else -1]
        values = {k: rw.value(node, k) for k, i in enumerate(node.input) if i}
        values |= {k: rw.held(values[k], symbols([inner])) for k in (0, 1)}
        v = values[0]
        names = [rw.tensor(values[k]) if k in values else "" for k in range(len(node.input))]
        held = {s for own in values.values() for s in rw.present(own)}
        return rw.keep(node, names, [(v.dims[0], width)], held) if held == rw.present(v) else None
    if not worthwhile(rw, x, unread) and (bias is None or rw.level(bias) <= rw.level(x)):
        return _plain(rw, node, rw.settle(x), weight.data.shape[1])
    if attribute(node, "alpha", 1.0) != 1.0 or (bias is not None and attribute(node, "beta", 1.0) != 1.0):
        rw.refuse("fc", "alpha or beta is not 1")
        return None
    made = linear_last(rw, x, weight, "fc", unread)
    if bias is None:
        return [made]
    return [rw.add([*rw.terms(made), rw.settle(bias)], made.dims, made.dtype)]


@dataclass(eq=False)
class _Conv(DeferredMatMul):
    """A convolution with kernel 1.

    Attributes:
        rw: The rewrite.
        name: Its operand.
        weight: Name of its weights, `[channels, width]`.
        kernel: Shape that the convolution takes these in, transposed.
        dims: Shape of the result.
    """

    rw: Rewrite
    name: str
    weight: str
    kernel: tuple[int, ...]
    dims: Dims

    def materialise(self, addend: str | None = None, have: Dims = ()) -> str:
        emit = self.rw.emit
        turned = emit.add("Transpose", [self.weight], {"perm": [1, 0]})
        kernel = emit.add("Reshape", [turned, emit.constant(np.array(self.kernel, np.int64))])
        return with_addend(self.rw, emit.add("Conv", [self.name, kernel]), addend)


@dataclass(frozen=True)
class _Kernel(MatrixProduct):
    """A convolution with kernel 1, its channels the contracted axis.

    Attributes:
        rw: The rewrite.
        width: Channels of the result.
        trail: Extents of the kernel.
    """

    rw: Rewrite
    width: int
    trail: tuple[int, ...]

    def of(self, name: str, physical: Dims, weight: str) -> DeferredMatMul:
        dims = (physical[0], canonical([self.width]), *physical[2:])
        return _Conv(self.rw, name, weight, (self.width, -1, *self.trail), dims)


def conv(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """A convolution with kernel 1 is a linear map of the channels."""
    weight, x, bias = rw.array(node, 1), rw.operand(node, 0), rw.array(node, 2)
    if weight is None or x is None or not worthwhile(rw, x, None) or prod(weight.shape[2:]) != 1:
        return None
    if any(s != 1 for s in attribute(node, "strides") or []):
        return None
    if any(attribute(node, "pads") or []) or (len(node.input) > 2 and bias is None):
        return None
    group = attribute(node, "group", 1)
    trail, width = (1,) * (weight.ndim - 2), weight.shape[0]

    kernel = _Kernel(rw, width, trail)
    matrix = Weights(np.ascontiguousarray(weight.reshape(weight.shape[:2]).T))

    def one(v: Value) -> Abstract:
        return contract(rw, v, 1, matrix, kernel, "fc")

    made = [distribute(rw, x, 1, one, "fc", width)] if group == 1 else stacks.conv(rw, node, x, weight, group)
    if bias is None or made is None:
        return made
    return [rw.add([*rw.terms(made[0]), rw.constant(bias.reshape(-1, *trail))], made[0].dims, made[0].dtype)]


RULE = Rule(
    name="fc",
    title="Splits fully connected layers into a request-level and a candidate-level product.",
    identity="[u | x] W + b = x W_x + (u W_u + b)",
    source="MaRI (arXiv 2602.23105); rank-aware decomposition (arXiv 2605.27450)",
    legal="The weights are constants and the contracted axis is made of blocks of several levels.",
    refuses="Weights that the caller may override, or that are computed per candidate.",
    exactness="reassociates",
    operators={"MatMul": matmul, "Gemm": gemm, "Conv": conv, "Einsum": einsum},
)
