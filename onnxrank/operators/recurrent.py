"""Steps along a sequence, with products in each."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from onnx import NodeProto

from onnxrank import transfers
from onnxrank.operators.entry import Extents, Operator, Trait
from onnxrank.operators.known import Partial
from onnxrank.operators.use import Use


def _recurrent(u: Use) -> list[Partial | None]:
    steps, batch, _ = u.shape(0)
    directions = u.shape(1)[0]
    hidden = u.shape(2)[-1]
    if u.attribute("layout", 0):
        steps, batch = batch, steps
        return [[batch, steps, directions, hidden], [batch, directions, hidden], [batch, directions, hidden]]
    return [[steps, directions, batch, hidden], [directions, batch, hidden], [directions, batch, hidden]]


def _recurrent_macs(node: NodeProto, x: Sequence[Extents | None], out: Extents | None) -> int:
    sequence, weights, again = (*x, None, None, None)[:3]
    if sequence is None or weights is None or again is None:
        return 0
    return prod(sequence[:2]) * (prod(weights) + prod(again))


OPERATORS = dict.fromkeys(
    ("GRU", "LSTM", "RNN"),
    Operator(_recurrent, traits=Trait.RECURRENT, levels=transfers.recurrent, macs=_recurrent_macs),
)
