"""Which method at which site: greedy by what is saved for the error it brings, every step measured on the whole model.

Each option is tried alone first. Its error is the mean square by which the model's logits move, which adds up nearly
over sites, because what different layers get wrong has little to do with each other. The next step is always the one
that saves most for the error it is expected to add. It is then made, in the model as it stands, with the last layers
fitted again, and kept only if the scores still pass on the calibration rows: what was expected decides the order, never
what is kept. Behind that steps are exchanged, by the same estimates and under the same condition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank.compress import gate
from onnxrank.compress.casts import join_casts
from onnxrank.compress.gate import Limits, Outcome
from onnxrank.compress.macs import multiply_adds
from onnxrank.compress.method import Refused
from onnxrank.compress.methods import METHODS
from onnxrank.compress.plan import Plan, Step
from onnxrank.compress.refit import heads, refit
from onnxrank.compress.report import Point, Refusal, Speed
from onnxrank.compress.runner import ORIGINAL, Runner, speed
from onnxrank.compress.sites import named, parts, renewed
from onnxrank.compress.statistics import Fitted, Statistics
from onnxrank.compress.tables import fold_pca
from onnxrank.errors import ModelError, UsageError
from onnxrank.feeds import Feed
from onnxrank.network import Hidden, Network, Site, Table, parameters
from onnxrank.packing import drop_units

Floats = NDArray[np.float64]
Chain = tuple[tuple[str, int], ...]
_LEAST = 1e-3
"""Share of the model that a step must save to be worth trying."""
_NEARER = 0.98
"""Share of the error to which an exchange must be expected to bring it."""
_MISSED = 4
"""Exchanges in a row that are no better than expected, after which no other is tried."""
_RECORD = "onnxrank.compress"
"""Key, in a model's metadata, of what was done to it."""


@dataclass(frozen=True)
class Option:
    """One way to change one site, tried alone.

    Attributes:
        step: What is done.
        error: Mean square by which logits move, relative to their variance.
        bytes: What the model loses in size.
        seconds: And in time of one request; 0 where that was not asked for.
    """

    step: Step
    error: float
    bytes: int
    seconds: float


Held = Mapping[str, Option]
"""What is done, by site."""


@dataclass
class Made:
    """A compressed model, measured on the calibration rows.

    Attributes:
        plan: What was done.
        model: The model.
        outcomes: What the gate would say, were these rows its own; empty where it was not asked.
        error: Root of the mean square by which logits move, relative to their spread.
        maps: Layers of low rank that were fitted to it, by their names.
        folded: Lookups of fewer columns, by what they gave in the original, with what reads them; see `fold_pca`.
    """

    plan: Plan
    model: ModelProto
    outcomes: tuple[Outcome, ...]
    error: float
    maps: Mapping[str, Fitted] = field(default_factory=dict)
    folded: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def standing(self) -> tuple[float, float]:
        """What two models are compared by: the least AUC as far as it is sure, and how near logits are."""
        aucs = [c.low for o in self.outcomes if (c := o.criterion("auc")) is not None]
        return min(aucs, default=0.0), -self.error


@dataclass
class Kept:
    """Calibration rows that models are tried on.

    Attributes:
        outputs: Names of outputs that are scores.
        original: The original's, by output, `[R]`.
        request: Number of the request of every row.
        labels: Per output, `[R]`; None where it has none.
        feed: One request with the usual number of candidates, for times.
    """

    outputs: tuple[str, ...]
    original: Mapping[str, Floats]
    request: NDArray[np.int64]
    labels: Mapping[str, Floats | None]
    feed: Feed


@dataclass
class Search:
    """Finds what to do at which site.

    Attributes:
        original: The original.
        base: The original, with what does nothing packed away.
        size: Bytes of the original.
        stats: What the calibration rows gave.
        kept: Rows to try models on.
        runner: Runs models; has the original's session.
        limits: What may be lost.
        methods: Names of the methods that are allowed.
        sites: Patterns on names of sites; all if there are none.
        targets: Ratios of size and time to reach; None for none.
        refit: Whether last layers are fitted again.
        sha256: Hash of the original.
        pack: Whether something was packed away.
        macs: Rows that each layer and table of the base works on, by name.
        before: Multiply-adds of the original.
        seconds: Time for timing one model.
        say: Told what is being done.
    """

    original: ModelProto
    base: Network
    size: int
    stats: Statistics
    kept: Kept
    runner: Runner
    limits: Limits
    methods: Sequence[str]
    sites: Sequence[str]
    targets: tuple[float | None, float | None]
    refit: bool
    sha256: str
    pack: bool
    macs: Mapping[str, int]
    before: int
    seconds: float
    say: Callable[[str], None]
    refusals: list[Refusal] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    history: list[Made] = field(default_factory=list)
    stopped: str = "options"

    def __post_init__(self) -> None:
        self._empty = Plan(self.sha256, pack=self.pack)
        self._whole = len(self.base.finished().SerializeToString())
        self._seconds = 1.0
        self.all = named(self.base)
        self.found = {n: s for n, s in self.all.items() if not self.sites or all(map(self._is_meant, parts(s)))}
        if self.sites and not self.found:
            raise UsageError(
                f"No layer or table is named {' or '.join(map(repr, self.sites))}. There are: "
                f"{', '.join(sorted(self.all)[:12]) or 'none'}."
            )

    def _is_meant(self, name: str) -> bool:
        return any(fnmatchcase(name, p) for p in self.sites)

    # --- making a model ---------------------------------------------------------------------------------------

    def build(self, plan: Plan, stats: Statistics | None = None, left: dict[str, list[Site]] | None = None) -> Network:
        """The model that a plan makes, its last layers as they were.

        Args:
            plan: The plan.
            stats: Other statistics than those of the calibration rows.
            left: Gets what each site's last method leaves behind.

        Raises:
            UsageError: The plan names what is not there.
            Refused: A method leaves a site alone.
        """
        net = self.base.copy()
        here = named(net)
        taken: dict[str, str] = {}
        for step in plan.by_site.values():
            if step.site not in here:
                raise UsageError(f"The plan names the site {step.site!r}, which this model does not have.")
            for part in parts(here[step.site]):
                if part in taken:
                    raise UsageError(f"The plan names {part!r} twice: at {taken[part]!r} and at {step.site!r}.")
                taken[part] = step.site
        # Units first: what is done to the layers around them then finds which of them are still read.
        for step in sorted(plan.by_site.values(), key=lambda s: not isinstance(here[s.site], Hidden)):
            sites: list[Site] = [renewed(here[step.site])]
            for name, parameter in step.chain:
                method = METHODS[name]
                if any(not isinstance(s, method.takes) for s in sites):
                    raise UsageError(f"The plan has {name} at {step.site!r}, which is not of the kind that it takes.")
                sites = [t for s in sites for t in method.apply(net, s, parameter, stats or self.stats)]
            if left is not None:
                left[step.site] = sites
        return net

    def _closed(self, net: Network, plan: Plan) -> dict[str, list[str]]:
        """Does what can be done when all steps are made; returns what `fold_pca` does."""
        if any(isinstance(self.all[s], Hidden) for s in plan.by_site):
            drop_units(net)
        folded = fold_pca(net)
        join_casts(net)
        return folded

    def scored(self, model: ModelProto, expose: Sequence[str] = ()) -> dict[str, Floats]:
        """What a model gives on the kept rows."""
        with self.runner.session(model, expose) as session:
            return self.runner.scores(session, [*self.kept.outputs, *dict.fromkeys(expose)])

    def off(self, scores: Mapping[str, Floats]) -> float:
        """Mean square by which logits move, relative to their variance, in the mean over outputs."""
        found = []
        for name in self.kept.outputs:
            a, b = self.kept.original[name], scores[name][:, 0]
            odds = _probabilities(a)
            z = gate.logits(a, odds)
            found.append(float(((gate.logits(b, odds) - z) ** 2).mean() / (z.var() or 1.0)))
        return float(np.mean(found))

    def made(self, plan: Plan, stats: Statistics | None = None) -> Made:
        """Makes a model and measures it on the kept rows, its last layers fitted again where that helps."""
        net = self.build(plan, stats)
        folded = self._closed(net, plan)
        model = net.finished()
        if self.refit and plan.steps and plan.finetune is None:
            several = [h for h in heads(net) if h.output in self.kept.outputs]
            scores = self.scored(model, [h.inputs for h in several])
            before = self.off(scores)
            again = Network(model)
            for h in [h for h in heads(again) if h.output in self.kept.outputs]:
                a = self.kept.original[h.output]
                odds = _probabilities(a)
                off = gate.logits(a, odds) - gate.logits(scores[h.output][:, 0], odds)
                if h.inputs in scores:
                    refit(again, h, scores[h.inputs], off)
            fitted = again.finished()
            after = self.scored(fitted)
            if self.off(after) < before:
                model, scores, plan = fitted, after, replace(plan, refit=True)
        else:
            scores = self.scored(model)
        return Made(plan, model, self.judged(scores), math.sqrt(self.off(scores)), folded=folded)

    def judged(self, scores: Mapping[str, Floats]) -> tuple[Outcome, ...]:
        """What the gate would say of scores on the kept rows."""
        k = self.kept
        return tuple(
            gate.judge(gate.Scores(k.original[n], scores[n][:, 0], k.request, k.labels[n]), self.limits, n)
            for n in k.outputs
        )

    # --- options ---------------------------------------------------------------------------------------------

    def chains(self, site: Site) -> list[Chain]:
        """What may be tried at a site: each method alone, and fewer columns in fewer bytes."""
        single: list[Chain] = []
        for name in self.methods:
            method = METHODS[name]
            if not isinstance(site, method.takes):
                continue
            try:
                single += [((name, k),) for k in method.offers(self.base, site, self.stats)]
            except Refused as e:
                self.refusals.append(Refusal(site.name, name, str(e)))
        out = list(single)
        second = ("fp16-tables", "int8-tables") if isinstance(site, Table) else ("fp16", "int8")
        for chain in single:
            if chain[0][0] in ("low-rank", "pca-tables"):
                out += [(*chain, (name, 0)) for name in second if name in self.methods]
        return out

    def options(self) -> list[Option]:
        """Everything that may be done.

        Each method is tried alone. Of two that follow each other the error is taken to be the sum of both: it decides
        the order only.
        """
        out: dict[Step, Option] = {}
        for name, site in self.found.items():
            self.say(f"trying {name}")
            for chain in self.chains(site):
                step = Step(name, chain)
                try:
                    plan = replace(self._empty, steps=(step,))
                    net = self.build(plan)
                    self._closed(net, plan)
                    model = net.finished()
                    saved = self._whole - len(model.SerializeToString())
                    found = self._chained(step, saved, out) if len(chain) > 1 else self._alone(step, model, saved)
                except Refused as e:
                    self.refusals.append(Refusal(name, step.told, str(e)))
                    continue
                except ModelError as e:
                    self.refusals.append(Refusal(name, step.told, f"onnxruntime does not run it: {e}"))
                    continue
                if found is None:
                    continue
                if not math.isfinite(found.error):
                    self.refusals.append(Refusal(name, step.told, "its scores are no numbers"))
                    continue
                out[step] = found
        return list(out.values())

    def _chained(self, step: Step, saved: int, known: Mapping[Step, Option]) -> Option | None:
        """What is expected of a method behind another, by what each does alone; None where that is not known."""
        first, second = step.chain
        before = known.get(Step(step.site, (first,)))
        behind = [known.get(Step(part, (second,))) for part in parts(self.all[step.site])]
        if before is None or any(o is None for o in behind):
            return None
        # The second works on what is left of the site only; what it saves in time is not known.
        return Option(step, before.error + sum(o.error for o in behind if o is not None), saved, before.seconds)

    def _alone(self, step: Step, model: ModelProto, saved: int) -> Option:
        """Runs a model in which one thing was done."""
        gain = 0.0
        with self.runner.session(model) as session:
            error = self.off(self.runner.scores(session, self.kept.outputs))
            timed = self.targets[1] is not None or self.targets[0] is None
            if timed and not isinstance(self.all[step.site], Table):
                turns = self.runner.race([ORIGINAL, session], self.kept.feed, self.seconds / 2)
                gain = self._seconds - float(np.median(turns[1] / turns[0])) * self._seconds
        return Option(step, error, saved, gain)

    # --- the search -------------------------------------------------------------------------------------------

    def run(self) -> Made:
        """Goes on until the targets are reached or the loss is used up; returns the last model that was kept."""
        now = self.begin()
        if not self.passes(now):
            return now
        first = self.points[0].speed
        self._seconds = first.seconds if first is not None else 1.0
        options = self.options()
        now, held = self._greedy(now, {}, options)
        better, held = self._exchanged(now, held, options)
        if better is not now and not self.reached():
            better, _ = self._greedy(better, held, options)
        self.stopped = "targets" if self.reached() else self.stopped
        return better

    def _greedy(self, now: Made, held: Held, options: Sequence[Option]) -> tuple[Made, Held]:
        """Takes the step that saves most for its error, again and again."""
        left = [o for o in options if o not in held.values()]
        while left and not self.reached():
            worth, k = max((self._worth(o, held), k) for k, o in enumerate(left))
            if worth <= 0:
                break
            option = left.pop(k)
            after = self._with(held, option)
            made = self._tried(after, option.step.told, option.step.site)
            if made is None:
                continue
            if self.passes(made):
                now, held = made, after
                self.history.append(now)
                self.note(now, option.step.told, option.step.site)
            else:
                self.stopped = "loss"
                # What is expected to be worse at the same site need not be tried.
                left = [o for o in left if o.step.site != option.step.site or o.error < option.error]
        return now, held

    def _exchanged(self, now: Made, held: Held, options: Sequence[Option]) -> tuple[Made, Held]:
        """Exchanges what is done at one or two places, as long as logits come nearer and no target is farther away.

        Greedy steps end beyond the target, and by the options that looked best when there was more to choose from. So
        a place gets a milder option, or none, where that is not needed, or where another place makes up for it.
        """
        missed, seen = 0, {frozenset(held.values())}
        while missed < _MISSED:
            new = (a for a in self._neighbours(held, options) if frozenset(a.values()) not in seen)
            after = next(new, None)
            if after is None:
                break
            seen.add(frozenset(after.values()))
            told, site = self._difference(held, after)
            made = self._tried(after, told, site)
            missed += 1
            if made is None or made.error >= now.error or not self.passes(made):
                continue
            self.note(made, told, site)
            if self._lost(*self.points[-2:]):
                self.points.pop()
                continue
            now, held, missed = made, after, 0
            self.history.append(now)
        return now, held

    def _neighbours(self, held: Held, options: Sequence[Option]) -> Iterator[Held]:
        """What one or two changes make of the options held, that of the least expected error first.

        One place gets a milder option or none, and another one, or none, an option instead of what is done there.
        Targets are expected to come no farther away.
        """
        back: list[tuple[Option | None, Option | None]] = [(None, None)]
        for o in held.values():
            milder = [m for m in options if m.step.site == o.step.site and m.error < o.error]
            back += [(o, m) for m in (None, *milder)]
        more = [None, *options]
        less = np.array([_sums([m] if m else []) - _sums([o] if o else []) for o, m in back]).reshape(-1, 1, 3)
        plus = np.array([_sums([o]) - _sums(self._at(held, o)) if o else np.zeros(3) for o in more])
        error, *saved = np.moveaxis(less + plus, 2, 0)
        good = error < (_NEARER - 1) * _sums(held.values())[0]
        for gain, room in zip(saved, self._slack(), strict=True):
            good &= gain >= -room
        for k in np.argsort(np.where(good, error, np.inf), axis=None)[: int(good.sum())]:
            (old, new), option = back[k // len(more)], more[k % len(more)]
            if old is not None and option is not None and self._at({old.step.site: old}, option):
                continue  # two changes at one place
            after: Held = {s: o for s, o in held.items() if o is not old}
            for change in (new, option):
                after = after if change is None else self._with(after, change)
            yield after

    def _slack(self) -> NDArray[np.float64]:
        """By how many bytes and seconds a model may be larger and slower, with all that was reached."""
        first, last = self.points[0], self.points[-1]
        have = zip(self.goals, (self.size, _seconds(first)), (last.bytes, _seconds(last)), strict=True)
        return np.array([max(before / goal - now, 0.0) if goal else math.inf for goal, before, now in have])

    def _lost(self, before: Point, after: Point) -> bool:
        """Whether a goal is farther away than before, which is not reached any more or was not."""
        have = zip(self.goals, self._ratios(before), self._ratios(after), strict=True)
        return any(new < min(goal, old) for goal, old, new in have)

    def _difference(self, held: Held, after: Held) -> tuple[str, str]:
        """What an exchange does, and where, in words."""
        found = [(o.step.told, s) for s, o in after.items() if held.get(s) != o]
        changed = {part for _, s in found for part in parts(self.all[s])}
        found += [("nothing", s) for s in held if s not in after and changed.isdisjoint(parts(self.all[s]))]
        *others, (told, site) = found
        return " and ".join([*(f"{t} at {s}" for t, s in others), told]), site

    def _at(self, held: Held, option: Option) -> list[Option]:
        """What is done so far at the layers of an option."""
        mine = set(parts(self.all[option.step.site]))
        return [o for s, o in held.items() if not mine.isdisjoint(parts(self.all[s]))]

    def _with(self, held: Held, option: Option) -> Held:
        """Options held, with one more in the place of those at the same layers."""
        gone = self._at(held, option)
        return {s: o for s, o in held.items() if o not in gone} | {option.step.site: option}

    def _tried(self, held: Held, told: str, site: str) -> Made | None:
        """The model of some options; None where it cannot be made or does not run."""
        self.say(f"{told} at {site}")
        try:
            return self.made(replace(self._empty, steps=tuple(o.step for o in held.values())))
        except (Refused, ModelError) as e:
            self.refusals.append(Refusal(site, told, str(e)))
            return None

    def begin(self) -> Made:
        """The model before anything is compressed; with the original, where something was packed away."""
        now = self.made(self._empty)
        self.note(replace(now, model=self.original), "", "")
        if self.pack:
            self.note(now, "pack", "all layers")
        self.history = [now]
        return now

    def passes(self, made: Made) -> bool:
        """Whether the scores on the kept rows keep all limits."""
        return gate.together(made.outcomes) == "passed"

    @property
    def goals(self) -> tuple[float, float]:
        """Ratios of size and time to reach: 0 where only the other is asked for, infinite where none is."""
        size, latency = (0.0 if t is None else t for t in self.targets)
        return (size, latency) if size or latency else (math.inf, math.inf)

    def _ratios(self, point: Point) -> tuple[float, float]:
        """How many times smaller and faster a model is."""
        return self.size / point.bytes, 1.0 if point.speed is None else point.speed.ratio

    def reached(self) -> bool:
        """Whether every target is reached; never without targets."""
        return all(has >= goal for has, goal in zip(self._ratios(self.points[-1]), self.goals, strict=True))

    def _worth(self, option: Option, held: Held) -> float:
        """What a step saves for the error that it adds, against what is done at its layers so far."""
        error, size, seconds = _sums([option]) - _sums(self._at(held, option))
        small, fast = (has < goal for has, goal in zip(self._ratios(self.points[-1]), self.goals, strict=True))
        saved = 0.0
        if small:
            saved += size / self.size
        if fast:
            saved += seconds / self._seconds
        if saved < _LEAST:
            return 0.0
        return float(saved / max(error, 1e-9))

    # --- what was reached -------------------------------------------------------------------------------------

    def note(self, made: Made, step: str, site: str) -> None:
        """Adds a model to the points of the report, with its time; the original has no step."""
        with self.runner.session(made.model) as session:
            turns = self.runner.race([ORIGINAL, session], self.kept.feed, self.seconds)
        took = Speed(*speed(turns))
        aucs = [c for o in made.outcomes if (c := o.criterion("auc")) is not None]
        kept = [c for o in made.outcomes if (c := o.criterion("overlap")) is not None]
        worst = min(aucs, key=lambda c: c.low, default=None)
        macs = multiply_adds(self.all, self.macs, made.plan, made.folded) if step else self.before
        self.points.append(
            Point(
                step, site, len(signed(made.model, made.plan).SerializeToString()) if step else self.size,
                parameters(made.model), macs, took, made.error,
                None if worst is None else (worst.value, worst.low, worst.high),
                min((c.value for c in kept), default=None),
            )
        )  # fmt: skip


def signed(model: ModelProto, plan: Plan) -> ModelProto:
    """A compressed model with what was done in its metadata."""
    out = ModelProto()
    out.CopyFrom(model)
    kept = [p for p in out.metadata_props if p.key != _RECORD]
    del out.metadata_props[:]
    out.metadata_props.extend(kept)
    done = {s.site: s.told for s in plan.steps}
    record = {"source_sha256": plan.model_sha256, "pack": plan.pack, "done": done}
    out.metadata_props.add(key=_RECORD, value=json.dumps(record, sort_keys=True, separators=(",", ":")))
    return out


def _sums(options: Iterable[Option]) -> Floats:
    """Error, bytes and seconds of several options, `[3]`, as if they added up."""
    several = [(0.0, 0.0, 0.0), *((o.error, o.bytes, o.seconds) for o in options)]
    return np.asarray(np.sum(several, axis=0), np.float64)


def _seconds(point: Point) -> float:
    return 1.0 if point.speed is None else point.speed.seconds


def _probabilities(scores: Floats) -> bool:
    return bool((scores >= 0).all() and (scores <= 1).all())
