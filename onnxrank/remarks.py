"""Why work for the request alone is still done for every candidate: a remark at every such place.

Rules remark on what they look at and leave alone. This pass comes after a rewrite and does not ask the rules: it holds
what was written for each product, sum, normalisation and recurrent layer against what its operands' levels, by the
analysis, ask for.
Where more is done per candidate, and no rule has said why, the cause is looked for: a decision by cost, an operator or
a shape that is not known, or a layout. A node that no rule follows is told once, with what is lost behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from onnx import NodeProto

from onnxrank import cost
from onnxrank.analysis import Analysis
from onnxrank.forms import Form, fewest
from onnxrank.graphs import reads
from onnxrank.operators import Trait, operator, traits
from onnxrank.plans import ALWAYS, LEAVE, Alternative, Site, label
from onnxrank.report import report_candidates
from onnxrank.rule import Refusal, opaque_reason
from onnxrank.uses import changed_by
from onnxrank.values import Level, is_candidate_symbol, symbols

MODEL = "model"
"""In the place of a rule: the model as a whole."""
_WEIGHTED = Trait.PRODUCT | Trait.RECURRENT
_PLACES = _WEIGHTED | Trait.REDUCTION | Trait.NORMALISATION
_SLACK = 1e-6


@dataclass(frozen=True)
class Place:
    """A node that does more per candidate than its operands' levels ask for.

    Attributes:
        index: The node, by its place in the original.
        work: What it does per candidate: multiply-adds, or entries read where it makes no products.
        once: Of that, what is the same for all candidates.
        done: What is done per candidate in the result.
    """

    index: int
    work: float
    once: float
    done: float

    @property
    def lost(self) -> float:
        """What is done per candidate and need be done but once."""
        return min(self.once, self.done - (self.work - self.once))


def places(form: Form) -> list[Place]:
    """Where work that is the same for all candidates is done for each of them, in the order of the graph."""
    return list(_Search(form, 1).places())


def remarks(form: Form, candidates: int) -> list[Refusal]:
    """What a form of the model leaves alone, and why.

    Args:
        form: The finished rewrite.
        candidates: Number of candidates that costs are told for.

    Returns:
        The rules' own remarks, and one for every other place that does more per candidate than it need do; those that
        cost most come first.
    """
    return _Search(form, candidates).remarks()


class Remarks:
    """Remarks on forms of a model, each looked for once.

    Attributes:
        candidates: Number of candidates that costs are told for.
    """

    def __init__(self, candidates: int) -> None:
        self.candidates = candidates
        self._found: dict[Form, list[Refusal]] = {}

    def of(self, form: Form) -> list[Refusal]:
        """What a form leaves alone, and why: see `remarks`."""
        if form not in self._found:
            self._found[form] = remarks(form, self.candidates)
        return self._found[form]


def left_out(rule: str, form: Form, full: Form, span: tuple[int, int]) -> list[Refusal]:
    """The remark on a rule that a form leaves out as a whole, because the model is predicted to be no faster with it.

    Args:
        rule: The rule.
        form: The form that is taken.
        full: The form with all rules.
        span: Expected number of candidates, least and most.

    Returns:
        The remark; none where one of the forms changes nothing at all.
    """
    if form.facts is None or full.facts is None:
        return []
    usual, few = report_candidates(span), fewest(span)
    original = cost.seconds(form.study.model.graph, form.original_shapes(few))
    at, other, word = usual, form.time(usual), "without"
    if full.time(few) > original:
        at, other, word = few, original, "as it is"
    taken = f"at N = {at} the model would take {_time(full.time(at))} with it and {_time(other)} {word}"
    lost = max(0, _macs(form, usual) - _macs(full, usual))
    return [Refusal(rule, "", "", f"it does not pay: {taken}", lost)]


def not_taken(form: Form, reason: str, candidates: int) -> Refusal:
    """The remark on a form that is not taken, with the multiply-adds that it would save."""
    shapes = form.original_shapes(candidates)
    before = sum(cost.node_macs(n, shapes) for n in form.study.model.graph.node)
    return Refusal(MODEL, "", "", reason, max(0, before - _macs(form, candidates)))


def _macs(form: Form, candidates: int) -> int:
    """Multiply-adds per request of what a form makes."""
    assert form.model is not None
    shapes = form.shapes(candidates)
    return sum(cost.node_macs(n, shapes) for n in form.model.graph.node)


def by_loss(found: Sequence[Refusal]) -> list[Refusal]:
    """Remarks, those that cost most first; equal ones once, in their order."""
    return sorted(dict.fromkeys(found), key=lambda r: -r.lost)


class _Search:
    """Looks through one finished rewrite."""

    def __init__(self, form: Form, candidates: int) -> None:
        self.form, self.candidates, self.rw = form, candidates, form.rewrite.rw
        self.known = Analysis(form.study)
        self.nodes: Sequence[NodeProto] = form.study.model.graph.node
        self.before = [form.original_shapes(n) for n in (1, 2)]
        # Where an extent is not proved that may depend on candidates, it is taken for their number.
        unproved = [s for s in form.study.facts.opaque if is_candidate_symbol(s)]
        self.guessed = [
            replace(shapes, symbols={**dict.fromkeys(unproved, n), **shapes.symbols})
            for n, shapes in zip((1, 2), self.before, strict=True)
        ]
        self.after = [form.shapes(n) for n in (1, 2)] if form.changed else []
        self.decided: dict[int, list[Site]] = {}
        for place, site in self.rw.decisions.decided.items():
            if self.rw.taken.get(place.index, ("",))[0] != place.rule:
                self.decided.setdefault(place.index, []).append(site)
        self._apart: dict[str, bool] = {}
        self._macs: dict[int, float] = {}
        self._entries: dict[int, float] = {}
        seen: set[tuple[int, str, str]] = set()
        for e in form.rewrite.emitted() if form.changed else ():
            operands = (e.origin, *(*e.proto.input, "", "")[:2])
            if operands not in seen:  # a product may be written twice, alone and with an addend
                self._macs[e.origin] = self._macs.get(e.origin, 0) + self._products(e.proto, self.after)
            seen.add(operands)
            if traits(e.proto) & _PLACES and not traits(e.proto) & _WEIGHTED:
                here = self._read(e.proto, self.after)
                self._entries[e.origin] = max(self._entries.get(e.origin, 0), here)

    # --- counting --------------------------------------------------------------------------------------------------

    @staticmethod
    def _products(node: NodeProto, shapes: Sequence[cost.Shapes]) -> float:
        """Multiply-adds of a node per candidate."""
        one, two = (cost.node_macs(node, s) for s in shapes)
        return two - one

    @staticmethod
    def _read(node: NodeProto, shapes: Sequence[cost.Shapes]) -> float:
        """Entries of a node's first operand per candidate."""
        one, two = (prod(s.shape(node.input[0]) or ()) for s in shapes)
        return two - one

    def places(self) -> Iterator[Place]:
        """Where more is done per candidate than need be."""
        for k, node in enumerate(self.nodes):
            found = self._place(k, node) if traits(node) & _PLACES and node.input else None
            if found is not None and found.lost > _SLACK * found.work:
                yield found

    def _place(self, k: int, node: NodeProto) -> Place | None:
        """What a node does; None where it has nothing that is the same for all candidates."""
        if not any(map(self._held_apart, node.input)):
            return None
        work = self._products(node, self.before)
        if work > 0:
            if any(s.taken for s in self.decided.get(k, ())):
                return None  # its products are made in another order, which costs less
            done = self._macs.get(k, 0) if self.after else work
            return Place(k, work, self._share(node) * work, done)
        if traits(node) & _WEIGHTED or not self._held_apart(node.input[0]):
            return None
        work, levels = self._read(node, self.before), self.known.levels(node.input[0])
        if work <= 0 or not (levels == Level.REQUEST).any():
            return None
        done = self._entries.get(k, 0) if self.after else work
        return Place(k, work, float((levels < Level.CANDIDATE).mean()) * work, done)

    def _held_apart(self, name: str) -> bool:
        """Whether the result has request-level entries of a tensor apart from others.

        Where those that there are were made for every candidate before, that is told of the node that does it.
        """
        if name not in self._apart:
            value = self.rw.values.get(name)
            self._apart[name] = value is not None and Level.REQUEST in self.rw.levels(value)
        return self._apart[name]

    def _share(self, node: NodeProto) -> float:
        """Share of a product's multiply-adds that are the same for all candidates."""
        share = self.known.once_share(node)
        rest = [self.known.level(i) for i in node.input[1:] if i in self.known.tensors]
        if share or Trait.MATRIX in traits(node) or any(level > Level.CONSTANT for level in rest):
            return share
        # Of weights with entries of several levels: what of them meets those of the request.
        return float((self.known.levels(node.input[0]) < Level.CANDIDATE).mean())

    # --- telling ---------------------------------------------------------------------------------------------------

    def remarks(self) -> list[Refusal]:
        """All remarks, those that cost most first."""
        lost: dict[str, float] = {}
        found = list(self.form.refusals)
        told = {r.node for r in found}
        for p in self.places():
            node = self.nodes[p.index]
            lost[label(node)] = p.lost if traits(node) & _WEIGHTED else 0
            if label(node) not in told:
                found.append(self._remark(p, node))
        for k, sites in sorted(self.decided.items()):
            node = self.nodes[k]
            left = [s for s in sites if not s.taken]
            if left and label(node) not in told | lost.keys():
                found.append(Refusal(left[0].place.rule, label(node), node.op_type, self._too_dear(left[0])))
        for k, behind in self._behind_barriers().items():
            node = self.nodes[k]
            lost[label(node)] = lost.get(label(node), 0) + behind
            if label(node) not in told:
                rule, reason = ("movement", self._barrier(node))
                if k in self.rw.taken:
                    rule, reason = (
                        self.rw.taken[k][0],
                        "its result is made as a whole, with entries that are the request's",
                    )
                found.append(Refusal(rule, label(node), node.op_type, reason))
        out = []
        for r in found:
            # Where several rules remark on a node, the loss is told but once.
            here = round(lost.pop(r.node, 0) * self.candidates)
            out.append(replace(r, lost=max(r.lost, here)))
        return by_loss(out)

    def _remark(self, place: Place, node: NodeProto) -> Refusal:
        """The remark on a place that no rule has said anything about."""
        made = self.rw.taken.get(place.index)
        for site in self.decided.get(place.index, ()):
            if not site.taken:
                return Refusal(site.place.rule, label(node), node.op_type, self._too_dear(site))
        if made is None:
            return Refusal("movement", label(node), node.op_type, self._barrier(node))
        rules = [r for r in self.rw.rules if operator(node) in r.operators and r.name not in (*ALWAYS, made[0])]
        left = [r for r in rules if any(p.rule == r.name and p.index == place.index for p in self.form.choice.left)]
        if left:
            return Refusal(left[0].name, label(node), node.op_type, "it was left out at this node")
        if not traits(node) & _WEIGHTED:
            reason = "it takes in request-level and candidate-level entries together, and no rule divides that"
            if rules:
                return Refusal(rules[0].name, label(node), node.op_type, _stated(reason, rules[0].refuses))
            return Refusal(made[0], label(node), node.op_type, reason)
        reason = "its request-level entries do not lie in blocks that can be taken apart from the others"
        made_of = [symbols(self.known.tensors[o].dims) for o in node.output if o]
        if any(len(set(syms)) < len(syms) for syms in made_of):
            reason = "it makes a tensor that has candidates along two axes, which is written as a whole"
        return Refusal(made[0], label(node), node.op_type, reason)

    def _too_dear(self, site: Site) -> str:
        """A decision by cost, with what it was taken by."""
        ways = {a.name: a for a in site.alternatives}
        made, left = next((a for n, a in ways.items() if n != LEAVE), None), ways.get(LEAVE)
        if made is None or left is None or None in (made.once, made.each, left.once, left.each):
            return f"it does not pay at N = {self.candidates}"
        return f"it does not pay at N = {self.candidates}: {_line(made)} against {_line(left)} as it is"

    def _barrier(self, node: NodeProto) -> str:
        """Why nothing is known of what a node makes."""
        facts = self.rw.facts
        for o in node.output:
            if o in facts.unknown:
                return f"the number of dimensions of {o!r} is not proved ({facts.unknown[o]})"
            for s in symbols(self.known.tensors[o].dims) if o else ():
                if s in facts.opaque:
                    return f"an extent of {o!r} is not proved ({facts.opaque[s][1]})"
        return opaque_reason(operator(node), self._is_known(node))

    def _is_known(self, node: NodeProto) -> bool:
        """Whether there are rules for a node's operator."""
        return any(operator(node) in r.operators for r in self.rw.rules)

    # --- behind what no rule follows ---------------------------------------------------------------------------------

    def _behind_barriers(self) -> dict[int, float]:
        """Per node that no rule follows, by its place: multiply-adds per candidate behind it that need be made once.

        These are products of what depends on the request alone, by the graph, and as far as shapes stay the same, the
        share of products that the node's request-level entries would have. Each is told for one such node. A node whose
        result a rule makes as a whole is one, too. Sums and normalisations behind it count as no multiply-adds.
        """
        given = [i.name for i in self.form.study.declared if i.role.level != "request"]
        by_candidate, out = changed_by(self.nodes, given), dict[int, float]()
        behind: dict[str, tuple[float, int]] = {}
        for k, node in enumerate(self.nodes):
            if self._is_barrier(k, node):
                share = self._kept_share(node)
                behind.update({o: (share if o in by_candidate else 1.0, k) for o in node.output if o})
                continue
            if self._is_merged(k, node):
                behind.update({o: (self._share_of(o), k) for o in node.output if o})
                continue
            share, barrier = max((behind[i] for i in node.input if i in behind), default=(0.0, -1))
            if not share:
                continue
            if traits(node) & _PLACES:
                work = self._guess(node) if traits(node) & _WEIGHTED else 0.0
                out[barrier] = out.get(barrier, 0) + share * work
            if by_candidate.isdisjoint(node.output):
                behind.update(dict.fromkeys(node.output, (1.0, barrier)))
            elif not traits(node) & _PLACES and share < 1:
                kept = share if self._same_shape(node) else self._share_of(node.output[0])
                behind.update(dict.fromkeys(node.output, (kept, barrier)))
        return out

    def _is_merged(self, k: int, node: NodeProto) -> bool:
        """Whether a rule made a node's result as a whole, though it has request-level entries as its operands have.

        What takes in several entries at once has a remark of its own.
        """
        if k not in self.rw.taken or traits(node) & _PLACES or not any(map(self._held_apart, node.input)):
            return False
        return any(self._share_of(o) > 0 for o in node.output)

    def _share_of(self, name: str) -> float:
        """Share of a tensor's entries that are the request's and made for every candidate."""
        if name not in self.known.tensors or self._held_apart(name) or not self._has_rows(name):
            return 0.0
        levels = self.known.levels(name)
        return float((levels < Level.CANDIDATE).mean()) if (levels == Level.REQUEST).any() else 0.0

    def _is_barrier(self, k: int, node: NodeProto) -> bool:
        """Whether a node takes in request-level entries, and nothing is known of what it makes."""
        values = self.rw.values
        outputs = [o for o in node.output if o in values]
        if k in self.rw.taken or not any(self._has_rows(o) for o in outputs):
            return False
        if self._is_known(node) and not any(o in self.rw.facts.unknown for o in outputs):
            return False  # it takes candidates together, or its operands do not lie as rules need it
        return any(Level.REQUEST in self.rw.levels(values[i]) for i in reads(node) if i in values)

    def _has_rows(self, name: str) -> bool:
        """Whether a tensor is taken to differ between candidates."""
        return self.rw.level(self.rw.values[name]) is Level.CANDIDATE

    def _guess(self, node: NodeProto) -> float:
        """Multiply-adds of a node per candidate; of unknown shapes, those of one row times its weights."""
        known = self._products(node, self.guessed)
        weights = self.guessed[0].initializers.get(node.input[1]) if len(node.input) > 1 else None
        if known or weights is None or self.guessed[0].shape(node.input[0]) is not None:
            return known
        return prod(weights)

    def _kept_share(self, node: NodeProto) -> float:
        """Share of a node's result that would be the same for all candidates, if it went entry by entry."""
        if not self._same_shape(node):
            return 0.0
        return float((self.known.levels(node.input[0]) < Level.CANDIDATE).mean())

    def _same_shape(self, node: NodeProto) -> bool:
        """Whether a node's result has its first operand's shape."""
        known = self.rw.facts.extents
        shape = known.get(node.input[0]) if node.input and node.input[0] in self.known.tensors else None
        return shape is not None and bool(node.output) and known.get(node.output[0]) == shape


def _stated(reason: str, refuses: str) -> str:
    """A reason with what a rule says that it leaves alone."""
    return f"{reason} (it leaves alone {refuses[:1].lower()}{refuses[1:].rstrip('.')})" if refuses else reason


def _line(way: Alternative) -> str:
    """What an alternative costs."""
    assert way.once is not None and way.each is not None
    once = f"{_time(way.once)} once and " if way.once else ""
    return f"{once}{_time(way.each)} per candidate"


def _time(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"
