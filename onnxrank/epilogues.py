"""What a runtime makes part of the product before it: additions and activations."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod

from onnx import GraphProto, NodeProto

from onnxrank.operators import operator

ShapeOf = Callable[[str], "tuple[int, ...] | None"]
_ACTIVATIONS = ("Relu", "LeakyRelu", "Sigmoid", "Tanh")


@dataclass(frozen=True)
class ProductSum:
    """An addition right behind products, which a runtime makes part of one of them where what is added is a row.

    Attributes:
        products: First outputs of the products that nothing else reads.
        node: The addition.
        behind: The addition, and the activation right behind it, if there is one.
    """

    products: tuple[str, ...]
    node: NodeProto
    behind: tuple[NodeProto, ...]

    def adds_row(self, shape: ShapeOf) -> bool:
        """Whether what is added is a row, given shapes of tensors."""
        for product in self.products:
            out = shape(product) or ()
            if len(out) == 2 and any(prod(shape(i) or (0,)) == out[1] for i in self.node.input if i != product):
                return True
        return False


def behind_products(graph: GraphProto) -> tuple[list[ProductSum], set[str]]:
    """Additions right behind products, and the first outputs of activations that are part of a product in any case."""
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for i in node.input:
            readers.setdefault(i, []).append(node)
    kept = {o.name for o in graph.output}

    def only(node: NodeProto, operators: Collection[str]) -> NodeProto | None:
        """The only reader of a node's result, if it is one of some operators."""
        after = readers.get(node.output[0], [])
        alone = len(after) == 1 and node.output[0] not in kept
        return after[0] if alone and operator(after[0]) in operators else None

    sums: dict[str, ProductSum] = {}
    activations: set[str] = set()
    for node in graph.node:
        op = operator(node)
        if op == "Gemm" and (after := only(node, _ACTIVATIONS)) is not None:
            activations.add(after.output[0])
        elif op == "MatMul" and (plus := only(node, ("Add",))) is not None:
            after = only(plus, _ACTIVATIONS)
            products = sums[plus.output[0]].products if plus.output[0] in sums else ()
            behind = (plus,) if after is None else (plus, after)
            sums[plus.output[0]] = ProductSum((*products, node.output[0]), plus, behind)
    return list(sums.values()), activations
