"""One way to rewrite a model, with its shapes; what cannot be carried out is left alone, and the rest is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from onnx import ModelProto, NodeProto

from onnxrank import cost
from onnxrank.facts import Facts, derive
from onnxrank.operators import operator
from onnxrank.plans import ALWAYS, LEAVE, TAKE, Alternative, Choice, Place, Site, label
from onnxrank.report import report_candidates
from onnxrank.rule import Refusal, Rule, SiteFailed
from onnxrank.single import of_one
from onnxrank.study import Study
from onnxrank.transform import Transformation
from onnxrank.values import Unrepresentable

_MOST_FAILURES = 24
"""Sites that are left alone before the model as a whole is."""


class Form:
    """One way to rewrite a model, with its shapes.

    Attributes:
        study: What is known of the original.
        rules: The rules that may be applied.
        choice: Where they may, and how; what turned out to fail is left alone.
        rewrite: The transformation.
        model: Its result; None where the model as a whole cannot be rewritten.
        remarks: Sites that had to be left alone, and why.
    """

    def __init__(
        self,
        study: Study,
        rules: Sequence[Rule],
        interface: str,
        guard: bool,
        span: tuple[int, int],
        choice: Choice | None = None,
    ) -> None:
        self.study, self.rules = study, rules
        self._how = (interface, guard, report_candidates(span))
        self.choice = choice or Choice()
        self.remarks: list[Refusal] = []
        self.model: ModelProto | None = None
        self._shapes: dict[int, cost.Shapes] = {}
        self._write()

    # --- making ----------------------------------------------------------------------------------------------------

    def transformed(self, choice: Choice) -> Transformation:
        """A transformation with another choice, not run yet."""
        return Transformation(self.study, self.rules, *self._how, choice)

    def _write(self) -> None:
        """Rewrites the model, without the sites that turn out to fail."""
        self.model = None
        most = 1
        for _ in range(_MOST_FAILURES):
            self.rewrite = self.transformed(self.choice)
            try:
                self.model = self.rewrite.run()
                return
            except SiteFailed as e:
                reason = e.reason
                guilty = self._blamed(e.index, most if e.layout else 1)
                if not guilty:
                    break
                self._leave(guilty, reason)
                most *= 2 if e.layout else 1
            except Unrepresentable as e:
                reason = str(e)
                break
        self.rewrite.rw.refuse("movement", f"the model as a whole was left alone: {reason}")

    def _blamed(self, index: int, most: int) -> list[Place]:
        """The last sites, up to a number, from a node back to the inputs."""
        taken, nodes = self.rewrite.rw.taken, self.rewrite.rw.nodes
        made_at = {o: k for k, n in enumerate(nodes) for o in n.output if o}
        found: list[Place] = []
        seen, level = {index}, [index]
        while level and len(found) < most:
            found += [Place(taken[k][0], k) for k in level if k in taken]
            before = {made_at[i] for k in level if 0 <= k < len(nodes) for i in nodes[k].input if i in made_at}
            level = sorted(before - seen, reverse=True)
            seen |= before
        return found[:most]

    def made(self, choice: Choice) -> tuple[ModelProto | None, list[Site]]:
        """The result of another choice, None if there is none; and where rules are applied."""
        other = self.transformed(choice)
        try:
            model = other.run()
        except (SiteFailed, Unrepresentable):
            return None, []
        return (model if other.sites() or self.study.packed else None), other.decisions()

    def leaving(self, choice: Choice, candidates: int | None = None) -> Form:
        """The same with another choice, perhaps for another number of candidates; what was left alone stays so."""
        other = self.limited(self.rules, choice, candidates)
        other.remarks[:0] = self.remarks
        return other

    def _leave(self, places: Collection[Place], reason: str, rules: Sequence[str] = ()) -> None:
        """Leaves sites alone, or rules, and remarks on it."""
        self.choice = self.choice.leaving(places, rules)
        nodes = self.study.model.graph.node
        self.remarks += [Refusal(p.rule, label(nodes[p.index]), nodes[p.index].op_type, reason) for p in places]
        self.remarks += [Refusal(rule, "", "", reason) for rule in rules]

    def limited(self, rules: Sequence[Rule], choice: Choice | None = None, candidates: int | None = None) -> Form:
        """The same with other rules, perhaps for another number of candidates."""
        interface, guard, expected = self._how
        at = expected if candidates is None else candidates
        return Form(self.study, rules, interface, guard, (at, at), choice)

    def decided_for(self, candidates: int) -> Form | None:
        """The same with what costs decide decided for another number of candidates; None where that changes nothing."""
        known = [s for s in self.rewrite.decisions() if s.alternatives and all(a.known for a in s.alternatives)]
        if all(self.choice.decide(s.place, s.alternatives, candidates) == s.chosen for s in known):
            return None
        return self.leaving(self.choice, candidates)

    # --- asking ----------------------------------------------------------------------------------------------------

    @cached_property
    def derived(self) -> Facts:
        """What is known of the tensors of the result, which may be the original with the result's signature."""
        assert self.model is not None
        study = self.study
        return derive(self.model, self.rewrite.input_extents(), study.loaded.folder, known=study.facts)

    @property
    def facts(self) -> Facts | None:
        """What is known of the result's tensors; None where it does not differ from the original."""
        return self.derived if self.changed else None

    @property
    def changed(self) -> bool:
        """Whether there is a result that differs from the original."""
        return self.model is not None and bool(self.rewrite.sites() or self.study.packed)

    @property
    def refusals(self) -> list[Refusal]:
        """What was left alone, and why."""
        return [*self.rewrite.rw.refusals, *self.remarks]

    def uses(self, rule: str) -> bool:
        """Whether a rule applied."""
        return rule in self.rewrite.rw.applied

    def operators(self, rule: str) -> set[str]:
        """The operators of the nodes that a rule took."""
        rw = self.rewrite.rw
        return {operator(rw.nodes[k]) for k, (name, _) in rw.taken.items() if name == rule}

    def shapes(self, candidates: int) -> cost.Shapes:
        """Shapes at a number of candidates."""
        assert self.model is not None
        if candidates not in self._shapes:
            known = next(iter(self._shapes.values()), None)
            inputs = self.rewrite.input_extents()
            made = known or cost.shapes_of(self.model, self.derived, inputs, candidates, self.study.loaded.folder)
            self._shapes[candidates] = made.at(candidates)
        return self._shapes[candidates]

    def original_shapes(self, candidates: int) -> cost.Shapes:
        """Shapes of the original at a number of candidates."""
        return self.study.shapes(candidates)

    def time(self, candidates: int) -> float:
        """Predicted seconds at a number of candidates."""
        assert self.model is not None
        return cost.seconds(self.model.graph, self.shapes(candidates))

    @cached_property
    def single(self) -> ModelProto:
        """The result for requests of exactly one candidate."""
        assert self.model is not None
        return of_one(self.model, self.derived, self.rewrite.input_extents())

    @cached_property
    def spared(self) -> float:
        """Predicted seconds that a single candidate takes less that way."""
        assert self.model is not None
        kept, shapes = {n.output[0] for n in self.single.graph.node}, self.shapes(1)
        return sum(cost.node_seconds(n, shapes) for n in self.model.graph.node if n.output[0] not in kept)

    def seconds(self, span: tuple[int, int], original: Callable[[int], float]) -> float:
        """Predicted time at the expected number of candidates.

        Args:
            span: Least and most candidates expected.
            original: Predicted time of the original; a form that is slower at a quarter of the least is out.
        """
        if not self.changed:
            return float("inf")
        few = fewest(span)
        return float("inf") if self.time(few) > original(few) else self.time(report_candidates(span))

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The decisions behind the result, in the order of the graph, with what they cost where that is known."""
        rules = {r.name: r for r in reversed(self.rules)}
        costs = self._costs()
        out = []
        for s in self.rewrite.decisions():
            if s.place.rule in ALWAYS and s.taken:
                continue
            if not s.alternatives and s.place.rule in rules:
                found = _alternatives(rules[s.place.rule], s, costs.get(s.place.index, {}))
                s = replace(s, alternatives=found)
            out.append(s)
        return tuple(out)

    def _costs(self) -> dict[int, dict[str, tuple[float, float]]]:
        """Per node what is made of it costs (`take`), and it itself (`leave`): per request, and per candidate."""
        if not self.changed:
            return {}
        out: dict[int, dict[str, tuple[float, float]]] = {}
        old, new = ([at(n) for n in (1, 2)] for at in (self.original_shapes, self.shapes))
        made: dict[int, list[NodeProto]] = {}
        for e in self.rewrite.emitted():
            made.setdefault(e.origin, []).append(e.proto)
        for k in self.rewrite.rw.taken:
            out[k] = {
                TAKE: _line(made.get(k, []), new),
                LEAVE: _line([self.study.model.graph.node[k]], old),
            }
        return out


def _line(nodes: Sequence[NodeProto], shapes: Sequence[cost.Shapes]) -> tuple[float, float]:
    """Seconds per request and per candidate, from shapes at one and two candidates."""
    one, two = (sum(cost.node_seconds(n, s) for n in nodes) for s in shapes)
    return 2 * one - two, two - one


def _alternatives(rule: Rule, site: Site, costs: Mapping[str, tuple[float, float]]) -> tuple[Alternative, ...]:
    """What a rule that takes nodes can do at one, with the costs of what it did."""
    names = [n for n in rule.alternatives(site.op) if n != site.chosen]
    known = {site.chosen if site.taken else TAKE: costs.get(TAKE), LEAVE: costs.get(LEAVE)}
    out = []
    for name in dict.fromkeys([site.chosen, *names, LEAVE]):
        once, each = known.get(name) or (None, None)
        out.append(Alternative(name, "" if name == LEAVE else rule.exactness, once, each))
    return tuple(out)


def forms(study: Study, rules: Sequence[Rule], interface: str, guard: bool, span: tuple[int, int]) -> list[Form]:
    """The ways to rewrite a model, with all rules first.

    Which form is best changes with the number of candidates: whoever asks takes the cheapest. Costs decide sites for
    the number that is expected; the form that is best for the most candidates is there once more, decided for these.
    """
    first = Form(study, rules, interface, guard, span)
    out = [first]
    for rule in rules:
        if rule.forms is not None and first.uses(rule.name):
            taken = first.operators(rule.name)
            ways = {f"form {k}": form for k, form in enumerate(rule.forms, 1)}
            names = [
                name for name, form in ways.items() if any(form.get(o) is not rule.operators.get(o) for o in taken)
            ]
            choices = [replace(first.choice, forms={rule.name: name}) for name in names]
            choices.append(first.choice.leaving(rules=[rule.name]))
            out += [Form(study, rules, interface, guard, span, choice) for choice in choices]
    made = [f for f in out if f.model is not None]
    if made and span[0] < span[1]:
        other = min(made, key=lambda f: f.time(span[1])).decided_for(span[1])
        out[1:1] = [other] if other is not None else []
    return out


def preparing_sites(kind: str, study: Study, places: Iterable[int], done: Collection[int]) -> list[Site]:
    """Sites of what may be done before any rule looks at a model.

    Args:
        kind: `SEGMENTS` or `WRITTEN_OUT`.
        study: What is known of the model before that.
        places: The nodes where it may be done.
        done: Those of them where it is.
    """
    nodes = study.model.graph.node
    return [
        Site(Place(kind, k), label(nodes[k]), nodes[k].op_type, (), TAKE if k in done else LEAVE)
        for k in sorted(places)
    ]


def fewest(span: tuple[int, int]) -> int:
    """The number of candidates at which no form may be slower than the original: a quarter of the least expected."""
    return max(1, span[0] // 4)
