"""Sums that layer normalisations read: written so that onnxruntime does not join both in one kernel.

Of an Add of two tensors with three axes and the normalisation behind it, onnxruntime makes a SkipLayerNormalization,
whose kernel for CPUs goes entry by entry and takes longer than both. A Sum of two tensors is the same
addition by the kernel that an Add has, and is joined with nothing. On GPUs, where the joint kernel is a good one, that
costs a pass over the sum.
"""

from __future__ import annotations

from dataclasses import replace

from onnx import NodeProto, TensorProto

from onnxrank.operators import operator
from onnxrank.rewrite import Rewrite
from onnxrank.values import Level
from onnxrank.written import Written

RULE = "movement"
"""The rule that it is accounted to."""
_AXES = 3
"""Axes of what is joined; of fewer or more it is not."""


def apart(rw: Rewrite) -> None:
    """Writes additions in front of layer normalisations as Sum, which changes no result.

    Args:
        rw: A rewrite that has written its nodes.
    """
    read: dict[str, set[str]] = {"LayerNormalization": set(), "ReduceMean": set(), "Sub": set()}
    for e in rw.emit.nodes:
        if operator(e.proto) in read:
            read[operator(e.proto)].add(e.proto.input[0])
    # Before there was an operator for it, exporters wrote it as x - mean(x), over the root of its mean square.
    normalised = read["LayerNormalization"] | (read["ReduceMean"] & read["Sub"])
    written: Written | None = None
    for k, e in enumerate(rw.emit.nodes):
        if operator(e.proto) != "Add" or e.proto.output[0] not in normalised:
            continue
        written = written or Written(rw)
        made = written.source(e.proto.output[0])
        if made is None or made.dtype != TensorProto.FLOAT or len(made.dims) != _AXES:
            continue
        if all(written.level(i) is not Level.CONSTANT for i in e.proto.input):  # a bias joins the product before it
            own = NodeProto()
            own.CopyFrom(e.proto)
            own.op_type, own.name = "Sum", own.name and f"{own.name}/sum"
            rw.emit.nodes[k] = replace(e, proto=own, rule=e.rule or RULE)
