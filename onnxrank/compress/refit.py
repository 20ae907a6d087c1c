"""The last layers, fitted again in closed form: to the original's logits, on what the compressed model gives them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnxrank.network import Bias, Network, Product
from onnxrank.operators import Trait, operator, traits

Floats = NDArray[np.float64]
_RIDGE = 1e-4


@dataclass(frozen=True)
class Head:
    """The layer behind which an output is only a sum and a sigmoid.

    Attributes:
        output: The output.
        site: The layer, of one output.
        inputs: What it reads.
        bias: The constant that is added to it; None where there is none.
    """

    output: str
    site: Product
    inputs: str
    bias: Bias | None


def heads(net: Network) -> list[Head]:
    """The last layer of every output that has one to itself, the widest where several are added."""
    products = {p.nodes[0].output[0]: p for p in net.products() if len(p.nodes) == 1 and p.shape[1] == 1}
    out = []
    for output in [o.name for o in net.model.graph.output]:
        found: list[tuple[Product, Bias | None]] = []
        waiting, sigmoids = [(output, False)], 0
        while waiting:
            tensor, added = waiting.pop()
            node = net.maker.get(tensor)
            if node is None:
                continue
            if tensor in products:
                found.append((products[tensor], net.bias(node, 1)))
            elif operator(node) == "Sigmoid":
                sigmoids += 1
                if sigmoids == 1 and not added:
                    waiting.append((node.input[0], added))
            elif Trait.MOVEMENT | Trait.FREE in traits(node):
                waiting.append((node.input[0], added))
            elif operator(node) == "Add":
                waiting += [(i, True) for i in node.input if net.array(i) is None]
        if found:
            site, bias = max(found, key=lambda f: f[0].shape[0])
            out.append(Head(output, site, site.nodes[0].input[0], bias))
    return out


def refit(net: Network, head: Head, x: Floats, off: Floats) -> bool:
    """Changes a last layer by what brings the logits nearest to the wanted ones.

    Args:
        net: The model, which is changed.
        head: The layer.
        x: What it reads, `[R, inputs]`.
        off: Wanted logits minus those that there are, `[R]`.

    Returns:
        Whether it was changed.
    """
    if len(x) != len(off) or len(x) < 4 * x.shape[1]:
        return False
    design = np.concatenate([x, np.ones((len(x), 1))], 1) if head.bias is not None else x
    gram = design.T @ design
    # Little is asked of directions in which the rows hardly vary.
    gram[np.diag_indices_from(gram)] += _RIDGE * float(np.trace(gram)) / len(gram)
    change = np.linalg.solve(gram, design.T @ off)
    node = head.site.nodes[0]
    data = net.array(head.site.weight)
    assert data is not None
    made = data.astype(np.float64) + change[: x.shape[1]].reshape(data.shape)
    node.input[1] = net.constant(made.astype(data.dtype), f"{head.site.weight}.refit")
    if head.bias is not None:
        old = net.array(head.bias.node.input[head.bias.place])
        assert old is not None
        net.set_bias(head.bias, old.astype(np.float64) + change[-1])
    net.renewed()
    return True
