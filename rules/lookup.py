"""`lookup`: lookups in many tables become one in a joined table.

The work is done by `onnxrank.lookups`, before any other rule looks at the model; this module names and explains it.
"""

from __future__ import annotations

from onnxrank.packing import MOST_JOINED
from onnxrank.plans import LOOKUP
from onnxrank.rule import Rule

RULE = Rule(
    name=LOOKUP,
    title="Joins lookups of one width and type to one Gather on a joined table, where launching them is what costs.",
    identity="T_k[i] = [T_1; T_2; ...][i + o_k], for o_k the rows before those of T_k, and i within T_k",
    source="onnxrank",
    legal="The ids have one level, are vectors or matrices with as many rows, and do not depend on each other's "
    "results. Nothing else reads the tables. An id outside its own table is brought outside of all, so that it fails "
    "as it did.",
    refuses="Tables that are read elsewhere, too, or are external data, whose bytes would be stored twice; tables "
    f"above {MOST_JOINED >> 20} MiB; lookups that are too few to pay, as those of hundreds of candidates are.",
    exactness="exact",
    operators={},
)
