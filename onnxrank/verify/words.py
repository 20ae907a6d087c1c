"""What a run of `verify` says in sentences."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from onnxrank.verify.report import Case, Report
from onnxrank.verify.sizes import MANY, NONE


def count(candidates: int) -> str:
    """A number of candidates."""
    return f"{candidates} candidate{'' if candidates == 1 else 's'}"


def listed(names: Collection[str], most: int = 4) -> str:
    """Names, the first of many."""
    shown = ", ".join(repr(n) for n in list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def worst(failed: Sequence[Case]) -> list[Case]:
    """The worst case of each verdict and output."""
    found: dict[tuple[str, str], Case] = {}
    for c in failed:
        found.setdefault((c.verdict, c.output), c)
    return list(found.values())


def sentence(c: Case) -> str:
    """What a failing comparison found, and where."""
    named = "=" in c.inputs or c.inputs.startswith("ids ")
    inputs = "" if c.inputs in (MANY, NONE) else f", {c.inputs}" if named else f", {c.inputs} inputs"
    where = f"N = {c.candidates}{inputs}, seed {c.seed}, {c.provider}, {c.level}"
    spot = ""
    if c.place is not None:
        element = f"[{', '.join(map(str, c.place.element))}]" if c.place.element else ""
        who = f", candidate {c.place.candidate}" if c.place.candidate is not None else ""
        spot = f" At {c.output}{element}{who}: {c.place.found} instead of {c.place.expected}."
    if c.verdict == "ranking":
        return f"Candidates of {c.output!r} changed places: one moved past {c.error:.0f} others ({where}).{spot}"
    if c.verdict == "metamorphic" and c.inputs == "user changed":
        return f"{c.output!r} does not change with the user, as the original's does ({where})."
    if c.verdict == "metamorphic":
        return (
            f"Candidates of {c.output!r} influence each other ({c.inputs}): off by {c.error:.3g} where {c.allowed:.3g} "
            f"is allowed.{spot}"
        )
    return f"{c.output!r} is off by {c.error:.3g} where {c.allowed:.3g} is allowed ({where}).{spot}"


def failure(report: Report) -> str:
    """Why a run failed, in a sentence."""
    first = next(iter(report.errors), None)
    failed = [v for v, outcome in report.verdicts.items() if outcome == "failed"]
    if first is None:
        return "Nothing could be compared." if not failed else f"Failed: {', '.join(failed)}."
    return f"{', '.join(failed)}: {first.message}"
