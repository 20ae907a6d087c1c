"""The one place that talks to onnx-graphsurgeon.

Nodes are built with its IR and exported one by one. The user's own nodes never go through its exporter, which drops
node metadata and overloads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from onnx import NodeProto


@cache
def _graphsurgeon() -> tuple[Any, Any]:
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    return gs, OnnxExporter


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], attrs: dict[str, Any]) -> NodeProto:
    """Builds a node of the default domain, named after its first output."""
    gs, exporter = _graphsurgeon()
    made = gs.Node(
        op=op,
        name=outputs[0],
        attrs=attrs,
        inputs=[gs.Variable(i) if i else gs.Variable.empty() for i in inputs],
        outputs=[gs.Variable(o) for o in outputs],
    )
    proto: NodeProto = exporter.export_node(made)
    return proto
