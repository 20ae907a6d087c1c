"""The entries of all kinds put together, and how one is found."""

from __future__ import annotations

from onnx import NodeProto

from onnxrank.graphs import domain
from onnxrank.operators import (
    attention,
    elementwise,
    lookups,
    machine_learning,
    movements,
    normalisations,
    products,
    quantised,
    recurrent,
    reductions,
    sources,
)
from onnxrank.operators.entry import Operator, Trait

KINDS = (
    elementwise,
    movements,
    lookups,
    reductions,
    normalisations,
    products,
    recurrent,
    attention,
    quantised,
    machine_learning,
    sources,
)
REGISTRY: dict[str, Operator] = {name: entry for kind in KINDS for name, entry in kind.OPERATORS.items()}
"""Entries by operator, as `operator` names them."""


def operator(node: NodeProto) -> str:
    """The key of a node's operator: its type alone for ONNX's own, `domain::Type` for any other domain.

    What is compared to a name must be this, never the bare type: `com.acme::Softmax` is not ONNX's Softmax.
    """
    own, kind = node.domain, str(node.op_type)
    return f"{own}::{kind}" if own and domain(own) else kind


def domain_of(node: NodeProto) -> str:
    """A node's domain; ONNX's own is empty."""
    return domain(node.domain)


def find(node: NodeProto) -> Operator | None:
    """The entry of a node's operator."""
    return REGISTRY.get(operator(node))


def traits(node: NodeProto) -> Trait:
    """What a node's operator is; nothing, where the registry has no entry of it."""
    entry = find(node)
    return Trait.NONE if entry is None else entry.traits


def having(traits: Trait) -> list[str]:
    """The operators of the registry that have all of some traits, as `operator` names them."""
    return [name for name, entry in REGISTRY.items() if traits in entry.traits]
