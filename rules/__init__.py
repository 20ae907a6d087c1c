"""The rewrite rules, in order of preference: the first that takes a node decides."""

from onnxrank.rule import Rule

from . import (
    activation,
    attention,
    broadcast,
    cross,
    dot,
    fc,
    fm,
    fold,
    gru,
    history,
    lookup,
    movement,
    norm,
    pack,
    picks,
    reduce,
    select,
    underflow,
)

RULES: tuple[Rule, ...] = (
    picks.RULE,
    movement.RULE,
    norm.RULE,
    cross.RULE,
    fc.RULE,
    history.RULE,
    attention.RULE,
    dot.RULE,
    fold.RULE,
    fm.RULE,
    reduce.RULE,
    gru.RULE,
    select.RULE,
    pack.RULE,
    lookup.RULE,
    underflow.RULE,
    activation.RULE,
    broadcast.RULE,
)
