"""Where one plan is not enough: which two plans a file holds, and from how many candidates on the second one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, log

from onnx import ModelProto

from onnxrank import cost
from onnxrank.forms import Form
from onnxrank.joining import ALONE, LAUNCHES, NAME, SINGLE, Count, joined
from onnxrank.plans import LEAVE, Alternative, Few, Measured
from onnxrank.values import CANDIDATES

RULE = "crossover"
"""In the place of a rule, where two plans are taken back."""
NEAR = 1.03
"""A plan is as good as the best one at a number of candidates if it takes at most so many times as long."""
_POINTS = 12
"""Numbers of candidates that plans are compared at, at most, from one end of what is expected to the other."""
_AROUND = (1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Where the crossover is looked for, by where it is predicted."""

Seconds = Callable[[int], float]
"""Time of a model, by the number of candidates."""


@dataclass(frozen=True)
class Pair:
    """Two ways to rewrite a model, of which one holds for few candidates and one for all others.

    Attributes:
        few: That for few candidates.
        many: The other one.
        below: The number of candidates from which on the second one holds.
        alone: Whether a single candidate has a branch of its own, where the first one is for more.
    """

    few: Form
    many: Form
    below: int
    alone: bool = False

    def model(self, many: ModelProto | None = None, name: str = NAME) -> ModelProto | None:
        """Both in one model; None where that cannot be written.

        Args:
            many: What stands for the second one; its own model if None.
            name: What the `If` is called.
        """
        many, count = many or self.many.model, where(self.many)
        if self.few.model is None or many is None or count is None:
            return None
        shapes = self.many.shapes

        def both(few: ModelProto, many: ModelProto, below: int, name: str) -> ModelProto | None:
            return joined(few, many, below, count, lambda t, n: shapes(n).shape(t), name)

        if self.below == SINGLE:
            return both(self.few.single, many, SINGLE, name)
        made = both(self.few.model, many, self.below, name)
        return both(self.few.single, made, SINGLE, ALONE) if self.alone and made is not None else made

    def time(self, candidates: int) -> float:
        """Predicted seconds at a number of candidates."""
        if candidates == 1 and (self.alone or self.below == SINGLE):
            return self.few.time(1) - self.few.spared + cost.estimate(launches=LAUNCHES)
        form = self.few if candidates < self.below else self.many
        return form.time(candidates) + self.overhead

    @property
    def overhead(self) -> float:
        """Predicted seconds of the choice between them, for more than one candidate."""
        return cost.estimate(launches=LAUNCHES * (1 + self.alone))

    def around(self, span: tuple[int, int]) -> tuple[int, ...]:
        """Numbers of candidates at which to time one against the other, within a range."""
        return tuple(dict.fromkeys(min(max(span[0], round(f * self.below)), span[1]) for f in _AROUND))

    def measured(self, times: Sequence[Measured]) -> Pair:
        """The same with the second one from where it was measured to be faster than the first."""
        slower = [m.candidates for m in times if m.ratio <= 1]
        faster = [m.candidates for m in times if m.ratio > 1 and m.candidates > max(slower, default=0)]
        if not faster:
            return replace(self, below=max(slower) + 1)
        if not slower:
            return replace(self, below=max(faster[0], 2))
        last, first = (next(m for m in times if m.candidates == n) for n in (max(slower), faster[0]))
        if last.ratio == first.ratio:
            return replace(self, below=first.candidates)
        share = -log(last.ratio) / (log(first.ratio) - log(last.ratio))
        middle = last.candidates * (first.candidates / last.candidates) ** share
        return replace(self, below=max(last.candidates + 1, ceil(middle)))

    def stored(self) -> Few:
        """What a plan says of the first one."""
        rules = tuple(dict.fromkeys(r.name for r in self.few.rules if self.few.choice.uses(r.name)))
        return Few(self.below, rules, self.few.sites, self.few.study is not self.many.study, self.alone)


def where(form: Form) -> Count | None:
    """Where a result reads the number of candidates; None where no input tells it."""
    found = form.rewrite.rw.layout.sizes.extent_of.get(CANDIDATES)
    return None if found is None else Count(*found)


def find(
    forms: Sequence[Form], single: Seconds, original: Seconds, span: tuple[int, int], plain: Form | None = None
) -> Pair | None:
    """The two plans that serve a range of numbers of candidates where a single one does not.

    Args:
        forms: The ways to rewrite the model.
        single: Time of the single plan that would be taken, or of the original where none pays.
        original: Time of the original.
        span: Least and most candidates expected.
        plain: The original as it is, which may stand beside any of the forms.

    Returns:
        The pair; None where the single plan is near the best one everywhere, or two are not nearer.
    """
    known = [f for f in forms if f.changed and where(f) is not None]
    points = list(_points(span))
    if len(points) < 2 or not known:
        return None
    times = [original, *(f.time for f in known)]
    best = {n: min(t(n) for t in times) for n in points}

    def behind(time: Seconds) -> float:
        """By how much a plan is slower than the best one, at most."""
        return max(time(n) / best[n] for n in points)

    if behind(single) <= NEAR:
        return None
    pairs = list(_pairs(sorted(known, key=lambda f: f.time(span[1])), span, plain))
    found = min(pairs, key=lambda p: behind(p.time), default=None)
    if found is None or behind(found.time) * NEAR > behind(single) or found.model() is None:
        return None
    return found


def with_any_few(pair: Pair, plain: Form) -> Iterator[Pair]:
    """A pair, and the same with the original for few candidates, in the form that the pair does not have already.

    Args:
        pair: The pair.
        plain: The original as it is, where that is not what the plan for many was made of.
    """
    yield pair
    if plain.study is not pair.many.study:
        yield replace(pair, few=pair.many.limited(()) if pair.few is plain else plain)


def _points(span: tuple[int, int]) -> Iterator[int]:
    """Numbers of candidates from one end to the other, each a multiple of the one before."""
    low, high = span
    yield from dict.fromkeys(round(low * (high / low) ** (k / (_POINTS - 1))) for k in range(_POINTS))


def _pairs(known: Sequence[Form], span: tuple[int, int], plain: Form | None = None) -> Iterator[Pair]:
    """Plans, the best for many candidates first, and what may stand beside each for few.

    That is the original, as it is or as it was prepared, or another plan; beside the first one also less of it.
    """
    for many in known:
        others = [f for f in known if f is not many and f.study is many.study]
        as_it_is = [plain] if plain is not None and plain.study is not many.study else []
        for few in [*as_it_is, *_fewer(many, span[0], many is known[0]), *others]:
            below = _crossing(few.time, many.time, span)
            if below is not None:
                yield Pair(few, many, below)


def _fewer(form: Form, candidates: int, partly: bool) -> Iterator[Form]:
    """Ways that do less than another one: nothing and, if `partly`, what pays at a number of candidates."""
    yield form.limited(())
    if not partly:
        return
    dear = [s.place for s in form.sites if s.taken and _costs_more(s.alternatives, s.chosen, candidates)]
    if dear:
        yield form.leaving(form.choice.leaving(dear))


def _costs_more(alternatives: Iterable[Alternative], chosen: str, candidates: int) -> bool:
    known = {a.name: a for a in alternatives if a.known}
    if chosen not in known or LEAVE not in known:
        return False
    return known[chosen].seconds(candidates) > known[LEAVE].seconds(candidates)


def _crossing(few: Seconds, many: Seconds, span: tuple[int, int]) -> int | None:
    """The least number of candidates from which on a plan is faster than another; None if that is none in a range."""
    low, high = span
    if few(low) >= many(low) or few(high) <= many(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if few(middle) < many(middle) else (low, middle)
    return high
