"""The registry of operators: what each one is, and does to shapes, entries, levels and costs.

An operator is found by its domain and its name (`find`). Where it has no entry, onnx's own inference for that operator
is asked for shapes; what neither knows is opaque, and whoever depends on it is left alone.

`entry.py` says what an entry is, and `use.py` what it is asked about: a node, with what is known of its operands
(`known.py`: entries that are constants or extents). The entries stand by kind, one module each: `elementwise`,
`movements`, `lookups`, `reductions`, `normalisations`, `products`, `recurrent`, `attention`, `quantised`, `sources`;
what several of them do to shapes is in `shapers.py`. `registry.py` puts them together and finds them.
"""

from onnxrank.operators.element_types import element_type
from onnxrank.operators.entry import Operator, Trait
from onnxrank.operators.known import Known, Shape, constant
from onnxrank.operators.registry import REGISTRY, domain_of, find, having, operator, traits
from onnxrank.operators.use import Flow, Placed, Use

__all__ = [
    "REGISTRY",
    "Flow",
    "Known",
    "Operator",
    "Placed",
    "Shape",
    "Trait",
    "Use",
    "constant",
    "domain_of",
    "element_type",
    "find",
    "having",
    "operator",
    "traits",
]
