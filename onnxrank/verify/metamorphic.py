"""What must hold of any ranker that scores candidates one by one, whatever another model says.

Candidates do not influence each other: what is done to their rows is done to the scores. Each relation is tried on the
original too; one that the original does not keep either is no fault of the other model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxrank.errors import ModelError
from onnxrank.feeds import Feed, Input
from onnxrank.verify import compare
from onnxrank.verify.inputs import joined, replaced, rows, take
from onnxrank.verify.report import Case, Place
from onnxrank.workers import Outputs

_MOST_ALONE = 8


@dataclass(frozen=True)
class Relation:
    """Inputs made from given ones, and which of the given scores theirs must be.

    Attributes:
        name: What was done.
        feeds: The inputs.
        index: Per feed, per candidate of it the candidate of the given feed whose score it must have; -1: any.
    """

    name: str
    feeds: tuple[Feed, ...]
    index: tuple[NDArray[np.int64], ...]


def relations(declared: Sequence[Input], feed: Feed, other: Feed, seed: int) -> list[Relation]:
    """The relations to try.

    Args:
        declared: Inputs of the original.
        feed: A request with several candidates.
        other: Further candidates of the same request, as many.
        seed: For the permutation.
    """
    count = rows(declared, feed)
    assert count is not None
    rng = np.random.default_rng(seed)
    everything = np.arange(count)

    def picked(name: str, *indices: NDArray[np.int64]) -> Relation:
        return Relation(name, tuple(take(declared, feed, i) for i in indices), indices)

    row = int(rng.integers(count))
    changed = everything.copy()
    changed[row] = -1
    alone = tuple(np.array([k]) for k in range(min(count, _MOST_ALONE)))
    return [
        picked("permuted", rng.permutation(count)),
        picked("duplicated", np.repeat(everything, 2)),
        picked("dropped", everything[: max(1, count // 2)]),
        picked("one by one", *alone),
        Relation("appended", (joined(declared, feed, other),), (np.concatenate([everything, np.full(count, -1)]),)),
        Relation("one changed", (replaced(declared, feed, row, other),), (changed,)),
    ]


@dataclass(frozen=True)
class Broken:
    """How far a relation is from holding, per output."""

    relation: str
    output: str
    error: float
    scale: float
    place: Place | None


def test(
    count: int, given: Outputs, made: Sequence[Relation], answers: Sequence[Outputs], per_row: Mapping[str, int]
) -> list[Broken] | ModelError:
    """Holds a model against the relations.

    Args:
        count: Candidates of the given request.
        given: What the model gives for it.
        made: The relations.
        answers: What it gives for their inputs, relation by relation.
        per_row: Outputs with a row per candidate, and how many entries of axis 0 belong to each.

    Returns:
        Per relation and output how far it is from holding; relations that the model does not run for are left out.
    """
    if isinstance(given, ModelError):
        return given
    for name, each in per_row.items():
        if given[name].shape[:1] != (each * count,):
            return ModelError(f"output {name!r} has no row for every candidate")
    found: list[Broken] = []
    left = iter(answers)
    for relation in made:
        own = [next(left) for _ in relation.feeds]
        for name, base in given.items():
            worst: tuple[float, Place | None] = (0.0, None)
            seen = False
            for answer, index in zip(own, relation.index, strict=True):
                if isinstance(answer, ModelError):
                    continue
                seen = True
                kept = index >= 0
                want, got = base, answer[name]
                if name in per_row:
                    want = _rows(base, per_row[name])[index[kept]]
                    if got.shape[0] != per_row[name] * len(index):
                        worst = (
                            float("inf"),
                            Place(name, (), None, relation.name, f"{len(index)} rows", str(got.shape[0])),
                        )
                        break
                    got = _rows(got, per_row[name])[kept]
                gap = compare.gap(want, got)
                if gap.largest > worst[0]:
                    at = gap.at or ()
                    candidate = int(index[kept][at[0]]) if name in per_row and at else None
                    shown = [f"{float(x[at]):.9g}" if gap.at is not None else str(list(x.shape)) for x in (want, got)]
                    worst = (gap.largest, Place(name, at, candidate, relation.name, *shown))
            if seen:
                found.append(Broken(relation.name, name, worst[0], compare.scale(base), worst[1]))
    return found


def _rows(data: NDArray[Any], each: int) -> NDArray[Any]:
    return data.reshape(-1, each, *data.shape[1:]) if each != 1 else data


def user_matters(first: Outputs, second: Outputs) -> set[str] | ModelError:
    """Outputs that differ between two requests with the same candidates."""
    for answer in (first, second):
        if isinstance(answer, ModelError):
            return answer
    assert isinstance(first, dict) and isinstance(second, dict)
    return {k for k in first if compare.gap(first[k], second[k]).largest > 0}


def judge(
    original: Sequence[Broken], optimized: Sequence[Broken], allowed: Callable[[str, float], float], where: Case
) -> tuple[list[Case], list[str]]:
    """Cases from what was found, and relations that the original does not keep either.

    Args:
        original: What was found for the original.
        optimized: What was found for the other model.
        allowed: Largest error by output and scale.
        where: Provider, level, seed and number of candidates.
    """
    own = {(b.relation, b.output): b.error for b in original}
    cases, excused = [], []
    for b in optimized:
        limit = allowed(b.output, b.scale)
        before = own.get((b.relation, b.output), 0.0)
        if before > limit:
            excused.append(f"{b.relation} ({b.output})")
            continue
        passed = b.error <= limit
        made = replace(where, inputs=b.relation, output=b.output, error=b.error, allowed=limit, passed=passed)
        cases.append(made if passed else replace(made, place=b.place))
    return cases, excused
