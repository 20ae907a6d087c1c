"""What is done to a model before any rule looks at it: packing, sequences taken apart, fused operators written out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from onnx import ModelProto

from onnxrank import cost, plans
from onnxrank.errors import ModelError
from onnxrank.forms import Form, forms, preparing_sites
from onnxrank.fused import Unsupported
from onnxrank.lookups import Lookups
from onnxrank.packing import Packed
from onnxrank.passes.options import Options
from onnxrank.plans import LEAVE, TAKE, Alternative, Choice, Place, Plan, Site, label
from onnxrank.remarks import Remarks
from onnxrank.rule import Refusal, Rule
from onnxrank.study import Study

MUCH = 0.05
"""Share of the multiply-adds from which on it is worth trying another way."""
_MOST_WRITINGS = 8
"""How often fused operators are written out, each time with those that hold several levels since the last time."""


@dataclass
class Way:
    """A model that rules may look at: the original, or with its sequences taken apart.

    Attributes:
        base: What is known of it.
        written_out: The same with fused operators written out.
        places: The nodes of the original whose sequences are taken apart.
        could: Those that hold several levels, by their places in `base`.
        done: Those of them that can be written out.
    """

    base: Study
    written_out: Study
    places: Sequence[int] = ()
    could: frozenset[int] = frozenset()
    done: frozenset[int] = frozenset()


class Preparation:
    """The models that rules may look at, in one run of `optimize`.

    Attributes:
        original: What is known of the original.
        base: The same of the original with what does nothing packed away.
        sites: What was decided before the rules, for the form that was chosen.
    """

    def __init__(self, original: Study, options: Options, remarks: Remarks, notes: list[str]) -> None:
        """Starts with the original as it is.

        Args:
            original: What is known of the original.
            options: What the caller chose.
            remarks: Why places were left alone.
            notes: Where to say what could not be done.
        """
        self.original = self.base = original
        self.sites: list[Site] = []
        self._options, self._remarks, self._notes = options, remarks, notes
        self._unpacked: frozenset[Place] = frozenset()
        self._ways: list[Way] = []

    def candidates(self) -> list[Form]:
        """The ways to rewrite the model, those with all rules first."""
        study = self.base = self._packed()
        self._ways = []
        found = self._forms(study)
        places = list(study.sequences)
        if study.fixed_sequences and self._loses(found[0]):
            places = sorted({*places, *study.fixed_sequences})
        if places:
            try:
                found = self._forms(study.divided(places), places) + found
            except ModelError as e:
                self._notes.append(f"a sequence of the history and the candidate is not taken apart: {e}")
        if study.packed:  # it pays by itself
            o = self._options
            found.append(Form(study, o.rules, o.interface, o.guard, o.span, Choice().leaving(rules=_optional(o.rules))))
        return found

    def _packed(self) -> Study:
        """The original with what does nothing packed away."""
        study = self.original
        places = {(p.index, p.kind) for p in self._packing() if _place(p) not in self._unpacked}
        try:
            return study.pack(places) if places else study
        except ModelError as e:
            self._notes.append(f"what does nothing is not packed away: {e}")
            self._unpacked = frozenset(map(_place, self._packing()))
            return study

    def _packing(self) -> Sequence[Packed]:
        """What can be packed away, as far as rules are allowed."""
        rules = {r.name for r in self._options.rules}
        found = self.original.packable if plans.PACK in rules else []
        return [*found, *(self._lookups.packed if plans.LOOKUP in rules else ())]

    @property
    def _lookups(self) -> Lookups:
        usual, span = self._options.usual, self._options.span
        return self.original.lookups(usual, [n for n in dict.fromkeys(span) if n != usual])

    @property
    def refusals(self) -> list[Refusal]:
        """Lookups that were left by themselves, and why."""
        return list(self._lookups.refusals) if any(r.name == plans.LOOKUP for r in self._options.rules) else []

    def _loses(self, form: Form) -> bool:
        """Whether much that is the request's is done for every candidate."""
        lost, n = sum(r.lost for r in self._remarks.of(form)), self._options.usual
        graph, shapes = self.original.model.graph, self.original.shapes(n)
        if form.model is not None and form.changed:
            graph, shapes = form.model.graph, form.shapes(n)
        return lost > MUCH * sum(c.macs for c in cost.by_level(graph, shapes).values())

    def _forms(self, study: Study, places: Sequence[int] = ()) -> list[Form]:
        """The ways to rewrite a model as it is, and with fused operators written out that hold several levels."""
        o = self._options
        way = Way(study, study, places)
        self._ways.append(way)
        plain = found = forms(study, o.rules, o.interface, o.guard, o.span)
        written: set[str] = set()
        refused: set[str] = set()
        for _ in range(_MOST_WRITINGS):  # what one is written out as may bring several levels to the next one
            fused = {*written, *found[0].rewrite.rw.fused} - refused
            if fused == written:
                break
            try:
                found = forms(study.written_out(fused), o.rules, o.interface, o.guard, o.span)
                written, way.written_out = fused, found[0].study
            except Unsupported as e:
                refused.add(e.output)
                self._not_written(study, [e.output], str(e))
            except ModelError as e:
                self._not_written(study, fused, str(e))
                break
        nodes = study.model.graph.node
        way.could = frozenset(k for k, n in enumerate(nodes) if n.output and n.output[0] in written | refused)
        way.done = frozenset(k for k in way.could if nodes[k].output[0] in written)
        return plain if found is plain else found + plain

    def _not_written(self, study: Study, outputs: Collection[str], why: str) -> None:
        """Says why fused operators, known by their first outputs, are left as they are."""
        found = {n.op_type for n in study.model.graph.node if n.output and n.output[0] in outputs}
        what = " and ".join(sorted({"fused attention" if "Attention" in op else op for op in found}))
        self._notes.append(f"{what} is left as it is, though its operands hold several levels: {why}")

    def way(self, form: Form) -> Way | None:
        """The model that a form rewrites; None where a plan is replayed."""
        return next((w for w in self._ways if form.study in (w.base, w.written_out)), None)

    def settle_on(self, form: Form) -> None:
        """Notes what was decided before the rules for a form that is gone on with."""
        way = self.way(form)
        assert way is not None
        tried, done = {k for w in self._ways for k in w.places}, way.done if form.study is not way.base else ()
        self.sites = [self._packed_at(p, LEAVE if _place(p) in self._unpacked else TAKE) for p in self._packing()]
        self.sites += preparing_sites(plans.SEGMENTS, self.base, tried, way.places)
        self.sites += preparing_sites(plans.WRITTEN_OUT, way.base, way.could, done)

    def undo(self) -> None:
        """Leaves the original as it is."""
        self.base, self.sites = self.original, []

    def repeat(self, plan: Plan) -> Study:
        """Prepares the model as a plan says."""
        self.sites = list(plan.preparation)
        packed = [s for s in self.sites if s.place.rule in plans.PACKING]
        self.base = self.original.prepared(packed)
        return self.base.prepared([s for s in self.sites if s not in packed])

    def packing(self, choice: Choice) -> tuple[ModelProto, list[Site]]:
        """The original with some of what was packed away packed away, and where."""
        sites = [self._packed_at(p, choice.at(_place(p))) for p in self.base.packed]
        return self.original.pack({(s.place.index, s.place.step) for s in sites if s.taken}).model, sites

    def leave_unpacked(self, sites: Iterable[Site]) -> None:
        """Leaves the original as it is at some places, from the next `candidates` on."""
        self._unpacked |= {s.place for s in sites}

    def _packed_at(self, packed: Packed, chosen: str) -> Site:
        """The site of something that can be packed away."""
        node = self.original.model.graph.node[packed.index]
        choices = (Alternative(TAKE, "exact"), Alternative(LEAVE)) if packed.rule == plans.LOOKUP else ()
        return Site(_place(packed), label(node), node.op_type, choices, chosen)


def _place(packed: Packed) -> Place:
    """Where something is packed away, as plans have it."""
    return Place(packed.rule, packed.index, packed.kind)


def _optional(rules: Iterable[Rule]) -> list[str]:
    """Names of the rules without which others can be applied."""
    return [r.name for r in rules if r.name not in plans.ALWAYS]
