"""Numbers beside tensors whose last axis has one entry: written with as many axes as those.

onnxruntime passes over axes of one entry where all operands have them. A number of fewer axes is applied entry by entry
instead, which takes ten times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np
from onnx import NodeProto

from onnxrank import cost
from onnxrank.emitter import Emitted
from onnxrank.operators import Trait, domain_of, traits
from onnxrank.plans import LEAVE, TAKE, Alternative
from onnxrank.rewrite import Rewrite
from onnxrank.values import Level, Origin, Source, extents, is_candidate_symbol

RULE = "movement"
"""The rule that it is accounted to."""
_KINDS = Trait.ELEMENTWISE | Trait.PARAMETERS
_ENTRY = 1e-8
"""Seconds that an entry takes by which a number of fewer axes is applied: 11 us more for 1,024 of them."""


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
        _reshape(rw, own, e, made, sources)
        if own != node:
            rw.emit.nodes[k] = replace(e, proto=own, rule=e.rule or RULE)


def _wide(rw: Rewrite, name: str, rank: int) -> str:
    """A stored constant of one entry with more axes, and any other tensor as it is."""
    data = rw.number(name)
    return name if data is None or data.ndim >= rank else rw.emit.constant(data.reshape((1,) * rank), name)


def _reshape(rw: Rewrite, node: NodeProto, e: Emitted, made: Source, sources: Mapping[str, Source]) -> None:
    """The same for numbers that are computed, which takes a step and is a decision."""
    found = (sources.get(i) for i in node.input)
    numbers = {s.name for s in found if s is not None and not any(s.dims) and len(s.dims) < len(made.dims)}
    if not numbers or made.level is not Level.CANDIDATE:
        return
    entries = prod(extents(made.dims)) * cost.LENGTH ** sum(not is_candidate_symbol(s) for s in made.symbols)
    ways = [
        Alternative(LEAVE, "", 0.0, entries * _ENTRY),
        Alternative(TAKE, "exact", cost.estimate(launches=len(numbers)), 0.0),
    ]
    emit = rw.emit
    with emit.at(Origin(e.origin, node.output[0], RULE)):
        if rw.decide(RULE, ways) == TAKE:
            shape = emit.constant(np.ones(len(made.dims), np.int64))
            node.input[:] = [emit.add("Reshape", [i, shape]) if i in numbers else i for i in node.input]
