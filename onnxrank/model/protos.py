"""The normal form of a model that everything else works on, and its bytes."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from google.protobuf.message import EncodeError
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, SparseTensorProto, helper, inliner, numpy_helper

from onnxrank.errors import ModelError
from onnxrank.graphs import captured, subgraphs
from onnxrank.model.external import tensor_data

LIMIT = 1 << 31  # of a protobuf message


def flattened(model: ModelProto) -> ModelProto:
    """The model with its functions inlined, sparse constants dense, and nodes in order; itself where it is that.

    Raises:
        ModelError: A function cannot be inlined, a sparse constant does not fit, or nodes read each other's results.
    """
    out = model
    if model.functions:
        try:
            out = inliner.inline_local_functions(_with_defaults(_one_opset(model)))
        except Exception as e:
            raise ModelError(f"The model's functions cannot be inlined: {e}.") from e
    sparse = [k for k, n in enumerate(out.graph.node) if any(a.HasField("sparse_tensor") for a in n.attribute)]
    if sparse and out is model:
        out = ModelProto()
        out.CopyFrom(model)
    for k in sparse:
        node = out.graph.node[k]
        if node.op_type == "Constant":
            value = numpy_helper.from_array(sparse_data(node.attribute[0].sparse_tensor))
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", value))
    return _in_order(out)


def _in_order(model: ModelProto) -> ModelProto:
    """The model with every node behind those that it reads, which runtimes do not insist on; itself where it is so."""
    nodes = model.graph.node
    maker = {o: k for k, n in enumerate(nodes) for o in n.output if o}
    read = [{*n.input}.union(*map(captured, subgraphs(n))) for n in nodes]
    before = [{maker[i] for i in names if i in maker} for names in read]
    if all(max(first, default=-1) < k for k, first in enumerate(before)):
        return model
    after: dict[int, list[int]] = {}
    for k, first in enumerate(before):
        for j in first:
            after.setdefault(j, []).append(k)
    ready = [k for k, first in enumerate(before) if not first]
    order: list[int] = []
    while ready:
        k = heapq.heappop(ready)
        order.append(k)
        for j in after.get(k, []):
            before[j].discard(k)
            if not before[j]:
                heapq.heappush(ready, j)
    if len(order) < len(nodes):
        left = next(n for k, n in enumerate(nodes) if before[k])
        raise ModelError(f"The node {left.name or left.output[0]!r} ({left.op_type}) reads what depends on itself.")
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    out.graph.node.extend(nodes[k] for k in order)
    return out


def _one_opset(model: ModelProto) -> ModelProto:
    """The model with its functions written for its own opsets, as onnxruntime takes them; the inliner leaves others."""
    own = {o.domain: o.version for o in model.opset_import}
    if all(o.version == own.get(o.domain, o.version) for f in model.functions for o in f.opset_import):
        return model
    out = ModelProto()
    out.CopyFrom(model)
    for f in out.functions:
        for o in f.opset_import:
            o.version = own.get(o.domain, o.version)
    return out


def _with_defaults(model: ModelProto) -> ModelProto:
    """The model with all attributes at calls of its functions, which the inliner does not pass on to inner calls."""
    defaults = {(f.domain, f.name, f.overload): f.attribute_proto for f in model.functions if f.attribute_proto}
    if not defaults:
        return model
    out = ModelProto()
    out.CopyFrom(model)

    def fill(nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            given = {a.name for a in node.attribute}
            kept = defaults.get((node.domain, node.op_type, node.overload), ())
            node.attribute.extend(a for a in kept if a.name not in given)
            for inner in subgraphs(node):
                fill(inner.node)

    for nodes in (out.graph.node, *(f.node for f in out.functions)):
        fill(nodes)
    return out


def overridable(model: ModelProto) -> set[str]:
    """Initializers that callers may replace, because they are listed as inputs: they are no constants.

    Before IR version 4 all initializers had to be listed, and were constants.
    """
    if model.ir_version < 4:
        return set()
    held = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    return held & {i.name for i in model.graph.input}


def sparse_data(t: SparseTensorProto, folder: str | os.PathLike[str] | None = None) -> NDArray[Any]:
    """A sparse tensor as a dense array.

    Raises:
        ModelError: Its values, indices and dimensions do not fit each other.
    """
    values, indices = tensor_data(t.values, folder).reshape(-1), tensor_data(t.indices, folder)
    if any(d < 0 for d in t.dims) or math.prod(t.dims) * values.dtype.itemsize >= LIMIT:
        raise ModelError(f"The sparse tensor {t.values.name!r} of {list(t.dims)} entries cannot be made dense.")
    out = np.zeros(tuple(t.dims), values.dtype)
    try:
        if indices.ndim == 2:
            out[tuple(indices.T)] = values
        else:
            out.reshape(-1)[indices] = values
    except (IndexError, ValueError) as e:
        raise ModelError(f"The sparse tensor {t.values.name!r} does not fit its dimensions: {e}.") from e
    return out


def serialise(proto: ModelProto) -> bytes:
    """The bytes of a model, the same for the same model.

    Raises:
        ModelError: It does not fit into one file.
    """
    try:
        data: bytes = proto.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as e:
        raise ModelError(_too_large()) from e
    if len(data) >= LIMIT:
        raise ModelError(_too_large())
    return data


def _too_large() -> str:
    return (
        "The model does not fit into one file, which ends below 2 GiB. Keep its weights as external data: "
        "onnx.save(model, path, save_as_external_data=True), and pass that path."
    )
