"""Attention as one operator, and what turns its operands."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import NodeProto

from onnxrank import extents as ex
from onnxrank import transfers
from onnxrank.operators.entry import Extents, Operator, Trait
from onnxrank.operators.known import Partial
from onnxrank.operators.shapers import same
from onnxrank.operators.use import Use


def _attention(u: Use) -> list[Partial | None]:
    """Onnxruntime's attention with its projections packed: `[batch, length, width] x [width, q + k + v]`."""
    batch, length, _ = u.shape(0)
    sizes = u.attribute("qkv_hidden_sizes")
    return [[batch, length, int(sizes[2]) if sizes else ex.divide(u.shape(1)[-1], 3)], None]


def _multi_head_attention(u: Use) -> list[Partial | None]:
    """Onnxruntime's attention behind projections; keys and values may be packed with the queries."""
    query = u.shape(0)
    if len(query) != 3 or not u.has(2) or len(u.shape(2)) != 3:
        return [[*query[:2], None]]
    return [[*query[:2], u.shape(2)[2]], None, None]


def _packed_attention_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    """Of `[batch, length, width]`, by weights `[width, 3 * hidden]` of queries, keys and values; both products."""
    rows, weights = (*x, None, None)[:2]
    if rows is None or weights is None:
        return 0
    *batch, length, _ = rows
    return prod(rows) * weights[-1] + 2 * prod(batch) * length * length * (weights[-1] // 3)


def _attention_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    """Of every query with every key, and of every weight with every value; `[..., heads, length, size]` or merged."""
    queries, keys = (*x, None, None)[:2]
    if queries is None or keys is None:
        return 0
    values = x[2] if len(x) > 2 and x[2] is not None else keys
    return prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


OPERATORS = {
    "Attention": Operator(traits=Trait.PRODUCT, levels=transfers.whole_rows, macs=_attention_macs),
    "com.microsoft::Attention": Operator(
        _attention, traits=Trait.PRODUCT, levels=transfers.whole_rows, macs=_packed_attention_macs
    ),
    "com.microsoft::MultiHeadAttention": Operator(
        _multi_head_attention, traits=Trait.PRODUCT, levels=transfers.whole_rows, macs=_attention_macs
    ),
    "RotaryEmbedding": Operator(levels=transfers.whole_rows),
    "com.microsoft::RotaryEmbedding": Operator(same, levels=transfers.whole_rows),
}
