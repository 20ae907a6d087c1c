"""What one run of `optimize` did: the data behind the table, the JSON and the exit code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from onnxrank.rule import Refusal

SCHEMA_VERSION = 1
"""Version of the JSON form; it changes when a field goes or changes its meaning, not when one is added."""


def report_candidates(span: tuple[int, int]) -> int:
    """The number of candidates that costs are told for: the geometric middle of the range."""
    middle: float = (span[0] * span[1]) ** 0.5
    return round(middle)


@dataclass(frozen=True)
class LevelCost:
    """Cost of the nodes of one level.

    Attributes:
        nodes: Number of nodes.
        parameters: Entries of the initializers that they read.
        macs: Multiply-adds of matrix products per request, at the expected number of candidates.
        bytes: Bytes of the tensors that they write per request, at the expected number of candidates.
    """

    nodes: int
    parameters: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class RuleUse:
    """Where one rule applied.

    Attributes:
        name: The rule.
        sites: Number of original nodes.
        macs_saved: Multiply-adds saved there per request.
        nodes: The original nodes, by name or by first output.
        break_even: Per node the number of candidates from which on what was made per request for it pays; None where
            nothing was.
    """

    name: str
    sites: int
    macs_saved: int
    nodes: tuple[str, ...]
    break_even: tuple[int | None, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """One numeric comparison of the rewritten model with the original.

    Attributes:
        candidates: Number of candidates.
        seed: Seed of the inputs.
        output: Output name.
        error: Largest absolute difference.
        tolerance: What was allowed.
        passed: Whether the difference is within it.
    """

    candidates: int
    seed: int
    output: str
    error: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class Prediction:
    """Time of the original over that of the rewritten model, at a number of candidates.

    Attributes:
        candidates: The number.
        ratio: What the cost model predicts.
        measured: What timing both in turns gave; None where that was not done.
        low: Least ratio within the 95 % interval of what was measured.
        high: Largest ratio within it.
    """

    candidates: int
    ratio: float
    measured: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Retreat:
    """A decision that was taken back after the result was checked or timed.

    Attributes:
        rule: The rule; empty where nothing could be kept.
        node: The original node; None where the rule was left out as a whole.
        cause: `check` or `tune`.
        reason: What was found: inputs and numbers.
    """

    rule: str
    node: str | None
    cause: str
    reason: str


@dataclass
class Report:
    """Everything there is to say about one run.

    Attributes:
        version: Version of onnxrank.
        source: Path of the input, if it was a file.
        source_sha256: Hash of the input's bytes.
        output: Path of the output, once written.
        changed: Whether anything applied; if not, the output is the input's own bytes.
        interface: `request` or `same`.
        candidates: Expected number of candidates, least and most.
        roles: The roles, as stored in the contract.
        usual: The number of candidates that costs are told for: the geometric middle of what is expected.
        lengths: Least and most of every length of the inputs that is not constant, by name: as declared, or as is
            usual.
        before: Costs of the original by level: `constant`, `request`, `candidate`.
        after: Costs of the result by level.
        size_before: Bytes of the input's proto.
        size_after: Bytes of the result's proto.
        rules: What applied.
        refusals: What did not, and why.
        retreats: What was taken back, because the result did not pass its check or was not faster with it.
        checks: The numeric comparisons.
        looked: At which numbers of candidates and lengths the check compared, a line each.
        unseen: What the check did not look at, and why, a line each.
        predictions: The cost model's view over the number of candidates.
        notes: Anything else worth knowing, a sentence each.
        below: The number of candidates from which on what is told of the result holds; below it a second plan does,
            which does less. None where there is one plan.
    """

    version: str
    source: str | None
    source_sha256: str
    interface: str
    candidates: tuple[int, int]
    roles: dict[str, Any]
    usual: int = field(init=False)
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)
    output: str | None = None
    changed: bool = False
    before: dict[str, LevelCost] = field(default_factory=dict)
    after: dict[str, LevelCost] = field(default_factory=dict)
    size_before: int = 0
    size_after: int = 0
    rules: list[RuleUse] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    retreats: list[Retreat] = field(default_factory=list)
    checks: list[Comparison] = field(default_factory=list)
    looked: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    predictions: list[Prediction] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    below: int | None = None

    def __post_init__(self) -> None:
        self.usual = report_candidates(self.candidates)

    @property
    def macs_before(self) -> int:
        """Multiply-adds of the original per request."""
        return sum(c.macs for c in self.before.values())

    @property
    def macs_after(self) -> int:
        """Multiply-adds of the result per request."""
        return sum(c.macs for c in self.after.values())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `optimize.schema.json` describes it."""
        return {"schema": "onnxrank.optimize", "schema_version": SCHEMA_VERSION, **asdict(self)}
