"""What one run of `compress` did and found: the data behind the table, the page and the JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from onnxrank.compress.gate import Outcome
from onnxrank.compress.plan import Plan

SCHEMA_VERSION = 1
"""Version of the JSON form; it changes when a field goes or changes its meaning, not when one is added."""


@dataclass(frozen=True)
class Speed:
    """Time of one request, and of the original over it, with the ends of its 95 % interval."""

    seconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Point:
    """A model on the way from the original to the result.

    Attributes:
        step: What was done last, in words; empty for the original.
        site: Where.
        bytes: Size of the model with its external data.
        parameters: Number of weights, whole-number ones included.
        macs: Multiply-adds of the layers and tables at the usual number of candidates.
        speed: Its time; None where it was not timed.
        logit_error: Distance of logits on the calibration rows, relative to their spread.
        auc: Change of the AUC on the calibration rows, and the ends of its interval; None without labels and
            probabilities.
        overlap: Share of the best candidates that stayed there; None where no request has more.
    """

    step: str
    site: str
    bytes: int
    parameters: int
    macs: int
    speed: Speed | None
    logit_error: float
    auc: tuple[float, float, float] | None
    overlap: float | None


@dataclass(frozen=True)
class Refusal:
    """A method that left a site alone, and why."""

    site: str
    method: str
    reason: str


@dataclass
class Report:
    """One run.

    Attributes:
        version: Of onnxrank.
        source: The model's file.
        source_sha256: Its hash.
        output: Where the result was written; None where it was not.
        verdict: The gate's: `passed`, `failed` or `cannot tell`.
        changed: Whether anything was compressed.
        targets: What was asked for: `size` and `latency`, as ratios, and `loss`.
        candidates: Number of candidates that times and multiply-adds are for.
        rows: Rows for calibration and for the gate.
        requests: Their requests.
        points: The original first, then the model after every step that was accepted.
        outcomes: What the gate found on rows that nothing was fitted to, by output.
        stopped: Why the search ended: `targets` were reached, what may be lost (`loss`) was used up, or there were no
            more `options`; `plan` where none was made.
        tries: How many models the gate was asked about.
        packed: What did nothing and was packed away, a sentence each.
        refusals: Where methods left sites alone.
        notes: Anything else worth knowing.
        plan: The decisions.
    """

    version: str
    source: str | None
    source_sha256: str
    output: str | None = None
    verdict: str = "cannot tell"
    changed: bool = False
    targets: dict[str, float | None] = field(default_factory=dict)
    candidates: int = 512
    rows: dict[str, int] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    outcomes: tuple[Outcome, ...] = ()
    stopped: str = "options"
    tries: int = 0
    packed: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: Plan | None = None

    @property
    def ratios(self) -> dict[str, float | None]:
        """How many times smaller and faster the last model is."""
        if not self.points:
            return {"size": None, "latency": None}
        first, last = self.points[0], self.points[-1]
        return {"size": first.bytes / last.bytes, "latency": None if last.speed is None else last.speed.ratio}

    @property
    def front(self) -> list[int]:
        """Points that no other beats in both size and logit error: the Pareto front, by their places."""
        out = []
        for k, p in enumerate(self.points):
            if not any(
                (q.bytes <= p.bytes and q.logit_error <= p.logit_error)
                and (q.bytes < p.bytes or q.logit_error < p.logit_error)
                for q in self.points
            ):
                out.append(k)
        return out

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, which `compress.schema.json` describes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "version": self.version,
            "source": self.source,
            "source_sha256": self.source_sha256,
            "output": self.output,
            "verdict": self.verdict,
            "changed": self.changed,
            "targets": self.targets,
            "reached": self.ratios,
            "candidates": self.candidates,
            "rows": self.rows,
            "requests": self.requests,
            "points": [asdict(p) for p in self.points],
            "front": self.front,
            "outcomes": [asdict(o) for o in self.outcomes],
            "stopped": self.stopped,
            "tries": self.tries,
            "packed": self.packed,
            "refusals": [asdict(r) for r in self.refusals],
            "notes": self.notes,
            "plan": None if self.plan is None else self.plan.to_dict(),
        }
