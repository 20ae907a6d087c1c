"""`underflow`: weights of masked scores are kept from being denormal numbers, which processors are slow with.

The work is done once all nodes are written, by `onnxrank.keys` where scores are a product with keys of the request, and
by `onnxrank.underflow` otherwise; this module names and explains it.
"""

from __future__ import annotations

from onnxrank.rule import Rule

RULE = Rule(
    name="underflow",
    title="Bounds masked scores from below, or brings masked keys near, so that no weight is a denormal number.",
    identity="softmax(x) = softmax(max(x, m - max(60, 1e-5 |m|))) + O(1e-26), m = max(row); or "
    "q k_hidden + b_hidden = mean(q k_visible + b_visible) - 50 - rounding",
    source="onnxrank",
    legal="Scores are float32, and a mask is among what they are made of.",
    refuses="Scores of 16 bits, and fused attention.",
    exactness="reassociates",
    operators={},
    cost="A few nodes, which take much less than denormal numbers do wherever some scores are masked.",
)
