"""What all forms of a report say in the same words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxrank import render
from onnxrank.verify.report import TITLES, VERDICTS, Case, Report, Statistics


@dataclass(frozen=True)
class Line:
    """One verdict in a table.

    Attributes:
        verdict: Its name.
        outcome: `passed`, `failed` or `skipped`.
        cases: Comparisons made.
        failed: Comparisons that did not pass.
        worst: The comparison closest to its limit, or furthest beyond.
        says: What the verdict means.
    """

    verdict: str
    outcome: str
    cases: int
    failed: int
    worst: Case | None
    says: str


def lines(report: Report) -> list[Line]:
    """The table of verdicts."""
    out = []
    for verdict in VERDICTS:
        cases = [c for c in report.cases if c.verdict == verdict]
        worst = max(cases, key=_share, default=None)
        failed = sum(not c.passed for c in cases)
        out.append(Line(verdict, report.verdicts[verdict], len(cases), failed, worst, TITLES[verdict]))
    return out


def _share(c: Case) -> float:
    share = c.error / max(c.allowed, 1e-300)
    return math.inf if math.isnan(share) else share


def headline(report: Report) -> str:
    """The verdict in a line."""
    if report.passed:
        return "PASSED: the models give the same scores."
    failed = [v for v, outcome in report.verdicts.items() if outcome == "failed"]
    return f"FAILED: {', '.join(failed) or 'nothing could be compared'}."


def distances(s: Statistics) -> str:
    """How far an output is apart, in a sentence."""
    return (
        f"{s.output} ({s.provider}, {s.level}): {s.error:.2g} from float64 where the original is {s.own_error:.2g} and "
        f"{s.allowed:.2g} is allowed; passes with atol {s.atol:.2g} or rtol {s.rtol:.2g}; difference p50 {s.p50:.2g}, "
        f"p99 {s.p99:.2g}; ULP p50 {s.ulp_p50:.3g}, p99 {s.ulp_p99:.3g}, max {s.ulp_max:.3g}"
    )


def environment(report: Report) -> str:
    """What it ran on, in a line."""
    e = report.environment
    return (
        f"onnxrank {report.version}, onnxruntime {e.get('onnxruntime', '?')}, "
        f"providers {', '.join(e.get('providers', []))}, TF32 {e.get('tf32', 'not used')}"
    )


def trust(report: Report) -> str:
    """What is to be said of the roles; empty where no input is request-level."""
    kept = report.requests if report.verdicts["data"] == "passed" else 0
    return render.trust(report.contract, kept)
