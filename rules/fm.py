"""`fm`: sums over fields in the second order of a factorisation machine, by level.

All pairs of fields together are `(|sum_i v_i|^2 - sum_i |v_i|^2) / 2`: two sums over fields, of which each level has
its own. The request-level ones are made once per request, whatever is squared, summed up or weighted behind them. Pairs
written out one by one are products, which `fold` and `dot` take.
"""

from __future__ import annotations

from onnx import NodeProto

from onnxrank.operators import Trait, operator, traits
from onnxrank.rewrite import Rewrite
from onnxrank.rule import Rule
from onnxrank.values import Abstract

from .elementwise import is_square
from .reduce import reduce


def sum_over_fields(rw: Rewrite, node: NodeProto) -> list[Abstract] | None:
    """Either sum of the two; other reductions are left to `pool`."""
    squared = rw.producers.get(node.input[0])
    of_squares = squared is not None and is_square(rw, squared) and _has_squared_sum(rw, squared.input[0])
    squares = [o for n in rw.readers(node.input[0]) if is_square(rw, n) for o in n.output]
    of_fields = _is_squared(rw, node.output[0]) and any(_sums(rw, o) for o in squares)
    return reduce(rw, node, "fm") if of_squares or of_fields else None


def _sums(rw: Rewrite, name: str) -> list[NodeProto]:
    return [n for n in rw.readers(name) if operator(n) == "ReduceSum"]


def _is_squared(rw: Rewrite, name: str) -> bool:
    """Whether a sum is squared, perhaps in another shape."""

    def judge(node: NodeProto, _: str) -> bool | None:
        return True if is_square(rw, node) else None if Trait.RESHAPE in traits(node) else False

    return rw.graph.behind(name, "squared", judge, lambda _, answers: any(answers))


def _has_squared_sum(rw: Rewrite, name: str) -> bool:
    return any(_is_squared(rw, n.output[0]) for n in _sums(rw, name))


RULE = Rule(
    name="fm",
    title="Sums over the fields of a factorisation machine: those of the request once.",
    identity="|s_u + s_x|^2 - (q_u + q_x), with sums s of fields and q of their squares, by level",
    source="Rendle 2010; rank-aware decomposition (arXiv 2605.27450)",
    legal="The fields are blocks of several levels, and both their sum's square and the sum of their squares are made.",
    refuses="Sums over the candidates.",
    exactness="reassociates",
    operators={"ReduceSum": sum_over_fields},
    cost="Sums of the request-level fields, and of their squares, are made once; each row gets one addition per sum.",
)
