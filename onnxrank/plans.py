"""The plan: which rule takes which node, and how, as data that prints, is stored, replayed and changed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from onnx import NodeProto

from onnxrank.errors import UsageError

VERSION = 1
"""Version of the JSON form."""
TAKE, LEAVE = "take", "leave"
"""Alternatives that every site has: the rule takes the node, or the next rule may, or none."""
ALWAYS = ("movement", "broadcast")
"""Rules by which entries are followed: without them no other can be applied, so plans list only where they are not."""
WRITTEN_OUT = "fused"
"""In the place of a rule: a fused operator of the original, which may be written out as its steps."""
SEGMENTS = "segments"
"""In the place of a rule: where the original joins a sequence of symbolic length, which may be taken apart."""
PACK = "pack"
"""The rule whose sites are units and weights that do nothing."""
LOOKUP = "lookup"
"""The rule whose sites are lookups that are joined."""
PACKING = (PACK, LOOKUP)
"""Rules whose sites are nodes of the original, all at once."""
PREPARING = (*PACKING, SEGMENTS, WRITTEN_OUT)
"""What is decided before any rule looks at the model, in this order."""


def label(node: NodeProto) -> str:
    """What a node is called in reports: its name, or that of what it makes."""
    return node.name or (node.output[0] if node.output else node.op_type)


@dataclass(frozen=True)
class Alternative:
    """One way to go about a site.

    Attributes:
        name: `take`, `leave`, or the name of a form of the rule.
        exactness: As of `Rule.exactness`; empty for `leave`, which changes nothing.
        once: Predicted seconds per request; None where not known.
        each: Predicted seconds per candidate; None where not known.
    """

    name: str
    exactness: str = ""
    once: float | None = None
    each: float | None = None

    @classmethod
    def at(cls, name: str, exactness: str, once: float, work: float, each: bool) -> Alternative:
        """A way that takes seconds once, and others for its work, which is done for each candidate or once as well."""
        return cls(name, exactness, once, work) if each else cls(name, exactness, once + work, 0.0)

    @property
    def known(self) -> bool:
        """Whether its costs are known."""
        return self.once is not None and self.each is not None

    def seconds(self, candidates: float) -> float:
        """Predicted seconds; costs must be known."""
        assert self.once is not None and self.each is not None
        return self.once + candidates * self.each


def break_even(alternatives: Sequence[Alternative]) -> int | None:
    """From how many candidates on what is done once per request pays; None where that is no question."""
    costs = {a.name: a for a in alternatives}
    made, left = costs.get(TAKE), costs.get(LEAVE)
    if made is None or left is None or not (made.known and left.known):
        return None
    more, saved = (
        made.seconds(0) - left.seconds(0),
        left.seconds(1) - left.seconds(0) - (made.seconds(1) - made.seconds(0)),
    )
    return math.ceil(more / saved) if saved > 0 and more > 0 else None


@dataclass(frozen=True)
class Place:
    """Where a rule may be applied.

    Attributes:
        rule: The rule.
        index: The node, by its place among those of the original with functions inlined, and packed, sequences taken
            apart and fused operators written out as the plan says.
        step: Which of the rule's decisions at the node; 0 is whether a rule takes the node, for those that take any.
    """

    rule: str
    index: int
    step: int = 0


@dataclass(frozen=True)
class Site:
    """A place with what can be done there and what is.

    Attributes:
        place: The place.
        node: The node's label.
        op: Its operator.
        alternatives: What can be done.
        chosen: Name of the alternative chosen.
    """

    place: Place
    node: str
    op: str
    alternatives: tuple[Alternative, ...]
    chosen: str

    @property
    def taken(self) -> bool:
        """Whether the rule is applied."""
        return self.chosen != LEAVE


@dataclass(frozen=True)
class Measured:
    """What timing original and result in turns gave, at a number of candidates.

    Attributes:
        candidates: The number.
        ratio: Time of the original over that of the result, the median of all turns.
        low: Least ratio within its 95 % interval.
        high: Largest ratio within it.
    """

    candidates: int
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Few:
    """What holds for few candidates, where a plan has another way for them.

    Attributes:
        below: The number of candidates from which on the plan's own sites hold.
        rules: Names of the rules that could be applied.
        sites: Where they could be.
        original: Whether that is in the original as it is, and not as it was prepared for the plan's own sites.
        alone: Whether a single candidate has a branch of its own, in which nothing is repeated for candidates.
    """

    below: int
    rules: tuple[str, ...]
    sites: tuple[Site, ...]
    original: bool = False
    alone: bool = False

    def choice(self) -> Choice:
        """What a rewrite asks in order to do the same again."""
        return _replayed(self.sites)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which `from_dict` reads back."""
        said = {name: True for name in ("original", "alone") if getattr(self, name)}
        sites = [_site_to_dict(s) for s in self.sites]
        return {"below": self.below, "rules": list(self.rules), "sites": sites, **said}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Few:
        """Reads what `to_dict` returned."""
        rules, sites = (_as(list, d[key]) for key in ("rules", "sites"))
        taken = tuple(_as(str, r) for r in rules)
        original, alone = (_as(bool, d.get(name, False)) for name in ("original", "alone"))
        return cls(_as(int, d["below"]), taken, tuple(map(_site_from_dict, sites)), original, alone)


@dataclass(frozen=True)
class Plan:
    """Every decision of one run of `optimize`; to replay it gives the same bytes, on any machine.

    Attributes:
        source_sha256: Hash of the original's bytes.
        made_by: Version of onnxrank.
        interface: `request` or `same`.
        guard: Whether unequal rows give NaN, with `same`.
        candidates: Expected number of candidates, least and most.
        roles: The roles of the inputs.
        offered: Names of the rules that the caller allowed.
        rules: Names of those that could be applied, in order of preference.
        sites: Where they could be, in the order of the graph.
        changed: Whether anything was applied; if not, the result is the original.
        measured: What timing the result gave, if it was timed.
        few: What holds for few candidates instead; None where the sites hold for any number.
        blocks: Most candidates of a block, where they are scored in blocks; 0 where they are not.
        blocks_from: The number of candidates from which on they are; 0 for any number.
    """

    source_sha256: str
    made_by: str
    interface: str
    guard: bool
    candidates: tuple[int, int]
    roles: Mapping[str, Any]
    offered: tuple[str, ...]
    rules: tuple[str, ...]
    sites: tuple[Site, ...]
    changed: bool = True
    measured: tuple[Measured, ...] = ()
    few: Few | None = None
    blocks: int = 0
    blocks_from: int = 0

    @property
    def preparation(self) -> tuple[Site, ...]:
        """What is decided before any rule looks at the model."""
        return tuple(s for s in self.sites if s.place.rule in PREPARING)

    @property
    def written_out(self) -> tuple[Site, ...]:
        """The fused operators that are written out."""
        return tuple(s for s in self.sites if s.place.rule == WRITTEN_OUT and s.taken)

    def choice(self) -> Choice:
        """What a rewrite asks in order to do the same again."""
        return _replayed(s for s in self.sites if s.place.rule not in PREPARING)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which `from_dict` reads back."""
        few = {} if self.few is None else {"few": self.few.to_dict()}
        blocks = {k: n for k, n in (("blocks", self.blocks), ("blocks_from", self.blocks_from)) if n}
        return {
            "plan_version": VERSION,
            "source_sha256": self.source_sha256,
            "made_by": self.made_by,
            "interface": self.interface,
            "guard": self.guard,
            "candidates": list(self.candidates),
            "roles": self.roles,
            "offered": list(self.offered),
            "rules": list(self.rules),
            "changed": self.changed,
            "measured": [vars(m) for m in self.measured],
            "sites": [_site_to_dict(s) for s in self.sites],
            **few,
            **blocks,
        }

    def to_json(self) -> str:
        """The JSON form as text."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, d: Any, where: str = "the plan") -> Plan:
        """Reads what `to_dict` returned.

        Raises:
            UsageError: It is no such form, or one of a later version.
        """
        version = d.get("plan_version") if isinstance(d, dict) else None
        if version != VERSION:
            raise UsageError(f"{where} is no plan of version {VERSION}; write one with 'onnxrank optimize --plan-out'")
        try:
            low, high = d["candidates"]
            return cls(
                source_sha256=_as(str, d["source_sha256"]),
                made_by=_as(str, d["made_by"]),
                interface=_as(str, d["interface"]),
                guard=_as(bool, d["guard"]),
                candidates=(_as(int, low), _as(int, high)),
                roles=_as(dict, d["roles"]),
                offered=tuple(_as(str, r) for r in _as(list, d["offered"])),
                rules=tuple(_as(str, r) for r in _as(list, d["rules"])),
                changed=_as(bool, d["changed"]),
                measured=tuple(
                    Measured(_as(int, m["candidates"]), *(float(m[k]) for k in ("ratio", "low", "high")))
                    for m in _as(list, d.get("measured", []))
                ),
                sites=tuple(_site_from_dict(s) for s in _as(list, d["sites"])),
                few=Few.from_dict(_as(dict, d["few"])) if "few" in d else None,
                blocks=_as(int, d.get("blocks", 0)),
                blocks_from=_as(int, d.get("blocks_from", 0)),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise UsageError(f"{where} cannot be read: {type(e).__name__}: {e}") from e

    @classmethod
    def of(cls, given: Plan | str | os.PathLike[str]) -> Plan:
        """A plan that is given as such, or as its file.

        Raises:
            UsageError: The file cannot be read, or holds no plan.
        """
        return given if isinstance(given, Plan) else load(given)

    def stored(self) -> dict[str, Any]:
        """The form in a model's contract: what that does not say already, without what depends on a cost model."""
        few = None if self.few is None else replace(self.few, sites=_bare(self.few.sites))
        full = replace(self, sites=_bare(self.sites), few=few).to_dict()
        kept = ("plan_version", "guard", "rules", "changed", "measured", "sites", "few", "blocks", "blocks_from")
        return {k: full[k] for k in kept if k in full}

    @classmethod
    def from_contract(cls, contract: Mapping[str, Any]) -> Plan:
        """The plan that a model's contract tells.

        Raises:
            UsageError: It tells none.
        """
        if not isinstance(contract.get("plan"), dict):
            raise UsageError("the model's contract has no plan; it was written by an earlier version")
        shared = {k: contract.get(k) for k in ("source_sha256", "interface", "candidates", "roles", "offered")}
        return cls.from_dict({**contract["plan"], **shared, "made_by": contract.get("version")}, "the contract's plan")


def load(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan from a file.

    Raises:
        UsageError: The file cannot be read, or holds no plan.
    """
    where = f"the plan {os.fspath(path)}"
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as e:
        raise UsageError(f"{where} cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{where} is not JSON: {e}") from e
    return Plan.from_dict(found, where)


@dataclass(frozen=True)
class Choice:
    """What a rewrite asks: which rules may take which nodes, and how.

    Attributes:
        without: Rules that are not applied at all.
        left: Places that are left alone.
        only: Per rule the only nodes, by their places, at which it may be applied; rules not named may be at all.
        forms: Per rule the form in which it is applied everywhere; `take` where none is named.
        replayed: Every decision of a plan that is done again; None where rules decide for themselves.
    """

    without: frozenset[str] = frozenset()
    left: frozenset[Place] = frozenset()
    only: Mapping[str, frozenset[int]] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    replayed: Mapping[Place, str] | None = None

    def uses(self, rule: str) -> bool:
        """Whether a rule may be applied at all."""
        return rule not in self.without

    def at(self, place: Place) -> str:
        """The alternative by which a rule may take a node."""
        allowed = self.only.get(place.rule)
        if place.rule in self.without or place in self.left or (allowed is not None and place.index not in allowed):
            return LEAVE
        if self.replayed is not None:
            return self.replayed.get(place, TAKE if place.rule in ALWAYS else LEAVE)
        return self.forms.get(place.rule, TAKE)

    def decide(self, place: Place, alternatives: Sequence[Alternative], candidates: float) -> str:
        """Which of a rule's alternatives to take: that of least cost, unless something else is wanted.

        Args:
            place: Where.
            alternatives: What there is, `leave` among it, with costs; the first of equals is taken.
            candidates: The number of candidates that costs are compared for.
        """
        wanted = self.at(place)
        if wanted == LEAVE or (self.replayed is not None and any(a.name == wanted for a in alternatives)):
            return wanted
        return min(alternatives, key=lambda a: a.seconds(candidates)).name

    def leaving(self, places: Iterable[Place] = (), rules: Iterable[str] = ()) -> Choice:
        """The same, with more left alone."""
        return replace(self, left=self.left | set(places), without=self.without | set(rules))

    def at_only(self, rule: str, nodes: Iterable[int]) -> Choice:
        """The same, with a rule applied at some nodes at most."""
        return replace(self, only={**self.only, rule: frozenset(nodes)})


def _replayed(sites: Iterable[Site]) -> Choice:
    found = tuple(sites)
    return Choice(left=frozenset(s.place for s in found if not s.taken), replayed={s.place: s.chosen for s in found})


def _bare(sites: Iterable[Site]) -> tuple[Site, ...]:
    """Sites without what depends on a cost model."""
    return tuple(replace(s, alternatives=()) for s in sites)


def _as(kind: type[Any], value: Any) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value


def _site_to_dict(site: Site) -> dict[str, Any]:
    out: dict[str, Any] = {
        "index": site.place.index,
        "node": site.node,
        "op": site.op,
        "rule": site.place.rule,
        "chosen": site.chosen,
    }
    if site.place.step:
        out["step"] = site.place.step
    if site.alternatives:
        out["alternatives"] = [{k: v for k, v in vars(a).items() if v not in (None, "")} for a in site.alternatives]
    return out


def _site_from_dict(d: Mapping[str, Any]) -> Site:
    place = Place(_as(str, d["rule"]), _as(int, d["index"]), _as(int, d.get("step", 0)))
    found = tuple(
        Alternative(_as(str, a["name"]), _as(str, a.get("exactness", "")), a.get("once"), a.get("each"))
        for a in _as(list, d.get("alternatives", []))
    )
    return Site(place, _as(str, d["node"]), _as(str, d["op"]), found, _as(str, d["chosen"]))
