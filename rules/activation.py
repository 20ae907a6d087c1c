"""`activation`: activations with learnt slopes, in fewer steps and by operators that take many entries at a time.

The work is done once all nodes are written, by `onnxrank.activations`; this module names and explains it.
"""

from __future__ import annotations

from onnxrank.rule import Rule

RULE = Rule(
    name="activation",
    title="Writes PReLU by operators whose kernels take many entries at a time, and Dice in fewer steps.",
    identity="prelu(x; a) = leaky_relu(x; a) for one slope, max(x, a x) for slopes in (0, 1], max(x, 0) + a min(x, 0); "
    "a (1 - p) x + p x = x ((1 - a) p + a)",
    source="onnxrank; Dice by Zhou et al. (Deep Interest Network, 2018)",
    legal="Entries are float32, slopes finite constants; those of Dice of at most 8.",
    refuses="Other types, slopes that are computed, and steps that something else reads, too.",
    exactness="reassociates",
    operators={},
    cost="Up to three more launches for PReLU, whose entries take from a twentieth to a fifth of the time.",
)
