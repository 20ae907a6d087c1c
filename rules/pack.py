"""`pack`: units and weights that do nothing are packed away.

The work is done by `onnxrank.packing`, before any other rule looks at the model; this module names and explains it.
"""

from __future__ import annotations

from onnxrank.packing import TINY
from onnxrank.plans import PACK
from onnxrank.rule import Rule

RULE = Rule(
    name=PACK,
    title="Packs away units and columns of tables that say nothing, and weights too small to be told from 0.",
    identity="f(x W + b) V = f(x W_k + b_k) V_k + f(b_c) V_c, for k the units left and c the constant ones",
    source="onnxrank",
    legal="Units: between a MatMul or Gemm with constant weights and the layers that read it lie functions of one unit "
    "each only. Columns: constant or equal ones that are only concatenated and flattened before layers read them. "
    f"Weights of layers and tables: they are below 2^-100 and {TINY:.1e} of the largest of theirs.",
    refuses="Units that are an output, are read by anything else or may become infinite, and weights that several "
    "layers share. Tiny weights where something divides by what they give, normalises or compares it.",
    exactness="reassociates",
    operators={},
)
