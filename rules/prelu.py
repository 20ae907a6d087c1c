"""`prelu`: PReLU by operators that take many entries at a time.

The work is done once all nodes are written, by `onnxrank.prelu`; this module names and explains it.
"""

from __future__ import annotations

from onnxrank.rule import Rule

RULE = Rule(
    name="prelu",
    title="Writes PReLU by operators whose kernels take many entries at a time.",
    identity="prelu(x; a) = leaky_relu(x; a) for one slope, max(x, a x) for slopes in (0, 1], max(x, 0) + a min(x, 0)",
    source="onnxrank",
    legal="Entries are float32, and slopes are finite constants.",
    refuses="Other types, and slopes that are computed.",
    exactness="exact",
    operators={},
    cost="Up to three more launches; on CPUs, an entry takes from a twentieth to a fifth of the time.",
)
