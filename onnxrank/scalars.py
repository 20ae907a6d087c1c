"""Numbers beside tensors whose last axis has one entry: written with as many axes as those.

onnxruntime passes over axes of one entry where all operands have them. A number of fewer axes is applied entry by entry
instead, which takes ten times as long.
"""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto

from onnxrank.operators import Trait, domain_of, traits
from onnxrank.rewrite import Rewrite
from onnxrank.values import symbols

_KINDS = Trait.ELEMENTWISE | Trait.PARAMETERS


def widen(rw: Rewrite) -> None:
    """Gives numbers the axes of the columns that they are broadcast over, which changes no result.

    Args:
        rw: A rewrite that has written its nodes.
    """
    sources = rw.sources.named()
    for k, e in enumerate(rw.emit.nodes):
        node = e.proto
        if len(node.input) < 2 or domain_of(node) or traits(node) & _KINDS != Trait.ELEMENTWISE:
            continue
        made = sources.get(node.output[0])
        if made is None or not made.dims or made.dims[-1] != () or not any(made.dims):
            continue
        own = NodeProto()
        own.CopyFrom(node)
        own.input[:] = [_wide(rw, name, len(made.dims)) for name in node.input]
        if own != node:
            rw.emit.nodes[k] = replace(e, proto=own, rule=e.rule or "movement")


def _wide(rw: Rewrite, name: str, rank: int) -> str:
    """A constant of one entry with more axes, and any other tensor as it is."""
    data, (dims, _) = rw.stored(name, 1), rw.facts.folded.get(name, ((), None))
    if data is None or data.ndim >= rank or symbols(dims):
        return name
    return rw.emit.constant(data.reshape((1,) * rank), name)
