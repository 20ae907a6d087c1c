"""Element types of what operators give."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import onnx
from onnx import NodeProto, TensorProto

from onnxrank.operators.registry import domain_of, find

_KINDS = {f"tensor({kind.lower()})": int(number) for kind, number in TensorProto.DataType.items()}


def element_type(node: NodeProto, k: int, version: int, types: Mapping[str, int]) -> int | None:
    """Element type of an output of a node; None where it cannot be told.

    Args:
        node: The node.
        k: Which output.
        version: Version of its domain.
        types: Element types of its operands, as far as they are known.
    """
    given = _type_names(node.op_type, version, domain_of(node))
    if given is None:
        entry = find(node)
        if entry is None or entry.like >= len(node.input):
            return None
        return types.get(node.input[entry.like])
    inputs, outputs = given
    own = next((a for a in node.attribute if a.name in ("to", "dtype")), None)
    if own is not None and own.i:
        return int(own.i)
    kind = outputs[min(k, len(outputs) - 1)]
    if kind.startswith("tensor("):
        return _KINDS.get(kind)
    for at, name in enumerate(node.input):
        if name in types and inputs[min(at, len(inputs) - 1)] == kind:
            return types[name]
    return None


@cache
def _type_names(op: str, version: int, domain: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """What onnx's schema calls the types of an operator's inputs and outputs; None where it has none."""
    if not onnx.defs.has(op, version, domain):
        return None
    schema = onnx.defs.get_schema(op, version, domain)
    only = {c.type_param_str: c.allowed_type_strs[0] for c in schema.type_constraints if len(c.allowed_type_strs) == 1}
    inputs, outputs = ([only.get(x.type_str, x.type_str) for x in side] for side in (schema.inputs, schema.outputs))
    return tuple(inputs), tuple(outputs)
