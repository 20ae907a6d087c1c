"""What an operator is called: its type, and the domain that says whose it is."""

from __future__ import annotations

from onnx import NodeProto


def operator(node: NodeProto) -> str:
    """The key of a node's operator: its type alone for ONNX's own, `domain::Type` for any other domain.

    What is compared to a name must be this, never the bare type: `com.acme::Softmax` is not ONNX's Softmax.
    """
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
