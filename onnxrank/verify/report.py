"""What one run of `verify` found: the data behind the table, the other reports and the exit code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA_VERSION = 1
"""Version of the JSON form; it changes when a field goes or changes its meaning, not when one is added."""

Outcome = Literal["passed", "failed", "skipped"]
Severity = Literal["error", "warning", "note"]

VERDICTS = ("structure", "algebra", "rounding", "ranking", "metamorphic", "data")
"""The questions, in the order of reports."""

TITLES = {
    "structure": "valid, with the original's interface",
    "algebra": "the same function, seen in float64",
    "rounding": "as close to float64 as the original",
    "ranking": "the same order of candidates",
    "metamorphic": "candidates do not influence each other",
    "data": "recorded requests keep the contract",
}
"""What each verdict says when it passed."""


@dataclass(frozen=True)
class Place:
    """Where a difference is largest.

    Attributes:
        output: The output.
        element: Index in it.
        candidate: Position of the candidate, where the output has one row for each.
        request: Identity of the recorded request, or seed of the generated one.
        expected: What the original gives there.
        found: What the other model gives.
    """

    output: str
    element: tuple[int, ...]
    candidate: int | None
    request: str
    expected: str
    found: str


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        verdict: The question it belongs to, one of `VERDICTS`.
        provider: Execution provider, `cpu` or `cuda`.
        level: ORT's graph optimisations, `disabled` or `all`; `float64` for runs in that type.
        inputs: Kind of inputs: `random`, `zeros`, …, `recorded`; for metamorphic cases the relation.
        candidates: Number of candidates.
        seed: Seed of the inputs.
        output: The output compared.
        error: Largest absolute distance from the truth; what is counted otherwise.
        allowed: Largest that passes.
        passed: Whether it does.
        place: Where, if it does not.
    """

    verdict: str
    provider: str
    level: str
    inputs: str
    candidates: int
    seed: int
    output: str
    error: float
    allowed: float
    passed: bool
    place: Place | None = None

    @property
    def name(self) -> str:
        """A name that tells it from all others."""
        return (
            f"{self.verdict} {self.output} [{self.provider}, {self.level}, {self.inputs}, N={self.candidates}, "
            f"seed={self.seed}]"
        )


@dataclass(frozen=True)
class Finding:
    """Something that a person should know.

    Attributes:
        verdict: The question it belongs to, one of `VERDICTS`.
        kind: What sort of thing, such as `difference`, `crash`, `interface`.
        severity: An `error` fails the run.
        message: A sentence or two.
        model: `original`, `optimized` or None.
        place: Where, for a difference.
        node: The node it is about, where one is known.
        rule: The rule that did it, where one is known.
    """

    verdict: str
    kind: str
    severity: Severity
    message: str
    model: str | None = None
    place: Place | None = None
    node: str | None = None
    rule: str | None = None


@dataclass(frozen=True)
class Statistics:
    """How far one output of the two models is apart, over all ordinary inputs of one provider and level.

    Attributes:
        provider: Execution provider.
        level: ORT's graph optimisations.
        output: The output.
        scale: Largest absolute value of the original.
        own_error: The original's largest distance from the float64 truth.
        error: The other model's.
        allowed: Largest that passes.
        atol: Smallest absolute tolerance between the two models that would pass, over inputs of all kinds.
        rtol: Smallest relative one.
        p50: Median absolute difference between the models.
        p99: 99th percentile.
        ulp_p50: Median difference in units in the last place.
        ulp_p99: 99th percentile.
        ulp_max: Largest.
        own_levels: Largest difference of the original from itself across ORT's optimisation levels.
    """

    provider: str
    level: str
    output: str
    scale: float
    own_error: float
    error: float
    allowed: float
    atol: float
    rtol: float
    p50: float
    p99: float
    ulp_p50: float
    ulp_p99: float
    ulp_max: float
    own_levels: float


@dataclass(frozen=True)
class Ranking:
    """How the order of candidates changed, worst over all requests; pairs closer than rounding are ties.

    Attributes:
        output: The output, with the column where it has several.
        requests: Requests looked at.
        top_k: The k of `overlap`.
        overlap: Least share of the top k that stayed, ties given the benefit.
        tau: Least Kendall tau over pairs that are no ties.
        move: Largest number of places a candidate moved past others that it does not tie with.
        auc_before: Mean AUC per request of the original, where labels are given.
        auc_after: That of the other model.
        logloss_before: Log loss of the original.
        logloss_after: That of the other model.
    """

    output: str
    requests: int
    top_k: int
    overlap: float
    tau: float
    move: int
    auc_before: float | None = None
    auc_after: float | None = None
    logloss_before: float | None = None
    logloss_after: float | None = None


@dataclass(frozen=True)
class Culprit:
    """What `--bisect` found.

    Attributes:
        rule: The first rule, in the order of application, with which the result is wrong; None if no rule is.
        node: The first node of the original at which that rule makes it wrong.
        tensor: The first tensor of both models that differs.
        message: The same in words.
    """

    rule: str | None
    node: str | None
    tensor: str | None
    message: str


@dataclass
class Report:
    """Everything there is to say about one run.

    Attributes:
        version: Version of onnxrank.
        original: Path of the original, if it was a file.
        original_sha256: Hash of its bytes.
        optimized: Path of the other model.
        optimized_sha256: Hash of its bytes.
        level: `quick`, `standard` or `full`.
        budget: Seconds that were set for numbers of candidates, lengths and rows beyond the ordinary ones.
        looked: At which of them the models were compared, a line each.
        unseen: What was not looked at, and why, a line each.
        contract: Where the contract came from (`source`), the roles and the interface.
        environment: Versions, providers, state of TF32.
        verdicts: An outcome per question.
        cases: The comparisons; of recorded requests those that failed, and sums in `requests`.
        requests: Recorded requests compared.
        statistics: Distances per output.
        ranking: Order of candidates per output.
        findings: What is wrong, and what else is worth knowing.
        culprit: What `--bisect` found.
        saved: Folder that the failing case was written to.
        seconds: Time taken.
    """

    version: str
    original: str | None
    original_sha256: str
    optimized: str | None
    optimized_sha256: str
    level: str
    budget: float = 0.0
    looked: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    contract: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    verdicts: dict[str, Outcome] = field(default_factory=lambda: dict.fromkeys(VERDICTS, "skipped"))
    cases: list[Case] = field(default_factory=list)
    requests: int = 0
    statistics: list[Statistics] = field(default_factory=list)
    ranking: list[Ranking] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    culprit: Culprit | None = None
    saved: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and scores were compared."""
        return "failed" not in self.verdicts.values() and self.verdicts["rounding"] == "passed"

    @property
    def errors(self) -> list[Finding]:
        """What is wrong."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def failed_cases(self) -> list[Case]:
        """The comparisons that did not pass: by verdict, the largest excess first."""
        failed = [c for c in self.cases if not c.passed]
        return sorted(failed, key=lambda c: (VERDICTS.index(c.verdict), -c.error / max(c.allowed, 1e-300)))

    def find(self, verdict: str, kind: str, message: str, severity: Severity = "error", **where: Any) -> None:
        """Adds a finding; an error fails its verdict."""
        found = Finding(verdict, kind, severity, message, **where)
        if found not in self.findings:
            self.findings.append(found)
        if severity == "error":
            self.verdicts[verdict] = "failed"

    def settle(self, verdict: str, passed: bool) -> None:
        """Sets the outcome of a verdict; once failed it stays so."""
        if self.verdicts[verdict] != "failed":
            self.verdicts[verdict] = "passed" if passed else "failed"

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `verify.schema.json` describes it."""
        return {
            "schema": "onnxrank.verify",
            "schema_version": SCHEMA_VERSION,
            "passed": self.passed,
            **asdict(self),
        }
