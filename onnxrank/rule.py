"""What a rewrite rule is, and what it says of the places that it leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnx import NodeProto

from onnxrank.plans import TAKE

if TYPE_CHECKING:
    from onnxrank.rewrite import Rewrite
    from onnxrank.values import Abstract

Transfer = Callable[["Rewrite", NodeProto], "list[Abstract] | None"]
"""What a rule makes of a node: its outputs' values, or None to leave it to the next rule."""


@dataclass(frozen=True)
class Rule:
    """A rewrite rule.

    Attributes:
        name: Its name in reports and for `--select` and `--ignore`.
        title: What it does, in a line.
        identity: The identity it uses.
        source: Where the identity comes from.
        legal: When it applies.
        refuses: When it leaves a site alone.
        exactness: `exact` if results are bit-identical, `reassociates` if the order of additions changes.
        operators: Transfer function per operator type (default domain unless written `domain::Op`). A transfer returns
            None to leave the node to the next rule.
        forms: Other transfer functions, each of which is the rule as a whole in another form. Which form is cheapest
            changes with the number of candidates: each is tried where it has other functions for operators that the
            rule takes, and so is leaving the rule out. None for a rule that pays, or does not, site by site.
        cost: What it saves, and what it adds.
        example: Some nodes before and after, a line each.
    """

    name: str
    title: str
    identity: str
    source: str
    legal: str
    refuses: str
    exactness: str
    operators: Mapping[str, Transfer]
    forms: tuple[Mapping[str, Transfer], ...] | None = None
    cost: str = ""
    example: tuple[str, str] = ("", "")

    def alternatives(self, op: str) -> dict[str, Transfer]:
        """The ways in which it may take a node, by the names that plans have for them.

        Args:
            op: The operator, as in `operators`.
        """
        forms = {f"form {k}": form for k, form in enumerate(self.forms or (), 1)}
        return {name: form[op] for name, form in {TAKE: self.operators, **forms}.items() if op in form}


@dataclass(frozen=True)
class Refusal:
    """A remark: a place that was left alone, and why.

    Attributes:
        rule: The rule that looked at it, or could have done something there; `model` for the model as a whole.
        node: The original node; empty where it is not a matter of one.
        op: Its operator.
        reason: Why.
        lost: Multiply-adds per request that are made for every candidate because of it and need be made but once, at
            the expected number of candidates; 0 where there are none, or nothing is known of them.
    """

    rule: str
    node: str
    op: str
    reason: str
    lost: int = 0


class SiteFailed(Exception):
    """What was decided at a site cannot be carried out: the site has to be left alone for the rest to stand.

    Attributes:
        index: The original node, by its place.
        reason: Why, in words for a remark.
        layout: Whether its value cannot be written: then one of the nodes before it may be at fault.
    """

    def __init__(self, index: int, reason: str, layout: bool = False) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason
        self.layout = layout


def opaque_reason(op: str, known: bool) -> str:
    """Why a node runs on all rows that no rule follows.

    Args:
        op: Its operator.
        known: Whether there are rules for that.
    """
    if known:
        return f"no rule can tell that {op} treats the rows of these operands independently, so it runs on all of them"
    return f"{op} is not known to treat rows independently, so it runs on all of them"


def internal_error(rule: str, node: str, e: Exception) -> str:
    """A remark on a rule that failed where it should have given up."""
    return f"internal error in rule {rule!r} at node {node!r} ({type(e).__name__}: {e}): please report it"
