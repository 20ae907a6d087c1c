"""The rewrite rules, in order of preference: the first that takes a node decides."""

from onnxrank.rules import broadcast, dot, fc, gru, movement, norm, reduce, select

from onnxrank.rewrite import Rule

RULES: tuple[Rule, ...] = (
    movement.RULE,
    norm.RULE,
    fc.RULE,
    dot.RULE,
    reduce.RULE,
    gru.RULE,
    select.RULE,
    broadcast.RULE,
)
