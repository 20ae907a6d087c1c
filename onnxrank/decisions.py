"""What rules decide by cost while a graph is rewritten, as sites of its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import NodeProto

from onnxrank.journal import Journal
from onnxrank.operators import operator
from onnxrank.plans import LEAVE, TAKE, Alternative, Choice, Place, Site, break_even, label
from onnxrank.rule import Rule


class Decisions:
    """Decides between ways to write a node.

    Args:
        rules: Transfer rules.
        choice: What a plan asks for.
        candidates: Number of candidates per request that a decision should pay at.
        node_at: An original node by its place.
        journal: Undoes decisions of rules that gave up.

    Attributes:
        decided: What was decided, and how.
        declined: Nodes that a rule does not take because that would not pay.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        choice: Choice,
        candidates: int,
        node_at: Callable[[int], NodeProto],
        journal: Journal,
    ) -> None:
        self.rules, self.choice, self.candidates, self._node_at = rules, choice, candidates, node_at
        self.decided: dict[Place, Site] = {}
        self.declined: dict[Place, Site] = {}
        journal.watch(self.decided)

    @property
    def break_even(self) -> dict[int, int]:
        """Per original node, by its place, from how many candidates on what is made for it once per request pays."""
        out: dict[int, int] = {}
        for place, site in self.decided.items():
            pays = break_even(site.alternatives) if site.taken else None
            if pays is not None:
                out[place.index] = max(pays, out.get(place.index, 0))
        return out

    def uses(self, rule: str) -> bool:
        """Whether a rule is selected, and none that the plan leaves out."""
        return self.choice.uses(rule) and any(r.name == rule for r in self.rules)

    def pays(self, rule: str, at: int, once: float, each: float, left: float) -> bool:
        """As `Rewrite.pays`, for the node at a place."""
        exactness = next(r.exactness for r in self.rules if r.name == rule)
        ways = (Alternative(LEAVE, "", 0, left), Alternative(TAKE, exactness, once, each))
        site = self._site(Place(rule, at), ways)
        (self.decided if site.taken else self.declined)[site.place] = site
        return site.taken

    def decide(self, rule: str, at: int, alternatives: Sequence[Alternative]) -> str:
        """As `Rewrite.decide`, for the node at a place."""
        takes = any(r.name == rule and operator(self._node_at(at)) in r.operators for r in self.rules)
        step = takes + sum(p.rule == rule and p.index == at and p.step >= takes for p in self.decided)
        site = self._site(Place(rule, at, step), alternatives)
        self.decided[site.place] = site
        return site.chosen

    def _site(self, place: Place, alternatives: Sequence[Alternative]) -> Site:
        node, chosen = self._node_at(place.index), self.choice.decide(place, alternatives, self.candidates)
        return Site(place, label(node), node.op_type, tuple(alternatives), chosen)
