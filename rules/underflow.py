"""`underflow`: weights of masked scores are kept from being denormal numbers, which processors are slow with.

The work is done by `onnxrank.underflow`, once all nodes are written; this module names and explains it.
"""

from __future__ import annotations

from onnxrank.rule import Rule

RULE = Rule(
    name="underflow",
    title="Bounds masked scores from below, so that no weight is a denormal number.",
    identity="softmax(x) = softmax(max(x, m - max(60, 1e-5 |m|))) + O(1e-26), m = max(row)",
    source="onnxrank",
    legal="Scores are float32, and a mask is among what they are made of.",
    refuses="Scores of 16 bits, and fused attention.",
    exactness="reassociates",
    operators={},
    cost="Six nodes, which take much less than denormal numbers do wherever some scores are masked.",
)
