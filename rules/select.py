"""`select`: positions that nobody reads are not computed.

The work is done by `onnxrank.needed`, which finds the positions, and by the other rules, which leave out entries that
are marked as unread; this module names and explains it.
"""

from __future__ import annotations

from onnxrank.rule import Rule

RULE = Rule(
    name="select",
    title="Moves a Gather or Slice of positions above the products whose other rows nobody reads.",
    identity="(X W)[i] = X[i] W, for rows i",
    source="onnxrank",
    legal="The positions are constants, and every path from the tensor passes such a selection along the same axis.",
    refuses="Positions computed at run time, and operators that mix positions on the way.",
    exactness="exact",
    operators={},
)
