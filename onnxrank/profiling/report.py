"""What one run of `profile` measured: the data behind the table, the page, the JSON and the CSV."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
"""Version of the JSON form; it changes when a field goes or changes its meaning, not when one is added."""


@dataclass(frozen=True)
class Times:
    """Times of one model at one number of candidates, in seconds per request.

    Attributes:
        runs: Number of runs timed.
        median: The middle one.
        low: Lower end of the median's 95 % interval.
        high: Upper end of it.
        p90: Nine in ten runs took no longer.
        p99: 99 in a hundred runs took no longer.
        candidates_per_second: Candidates scored per second, at the median.
        copies: Of the median, seconds for copies between host and device; None where there are none or they are not
            told apart.
    """

    runs: int
    median: float
    low: float
    high: float
    p90: float
    p99: float
    candidates_per_second: float
    copies: float | None = None


@dataclass(frozen=True)
class Speedup:
    """Time of the first model over that of the second, with its 95 % interval.

    Attributes:
        ratio: Above 1 the second model is faster.
        low: Lower end.
        high: Upper end.
        significant: Whether the difference is real: the interval leaves out 1, and it is more than two sessions of one
            and the same model differ by.
    """

    ratio: float
    low: float
    high: float
    significant: bool


@dataclass(frozen=True)
class Point:
    """Everything timed at one number of candidates.

    Attributes:
        candidates: Number of candidates.
        times: Per model, in the order given.
        speedup: First over second; None for a single model.
        settled: Whether the interval was narrow enough before the time was used up.
        peak: Multiply-adds per second of one large product, right before and after.
    """

    candidates: int
    times: tuple[Times, ...]
    speedup: Speedup | None
    settled: bool
    peak: float


@dataclass(frozen=True)
class Call:
    """Several requests scored by one model, in one call or one after the other.

    Attributes:
        together: Whether one call scores them all; else there is one per request.
        runs: How often they were timed.
        median: The middle time, in seconds for all of them.
        low: Lower end of its 95 % interval.
        high: Upper end of it.
        per_request: Of the middle time what comes to a request, in seconds.
        per_candidate: What comes to a candidate.
    """

    together: bool
    runs: int
    median: float
    low: float
    high: float
    per_request: float
    per_candidate: float


@dataclass(frozen=True)
class Several:
    """Everything timed at one number of requests and of candidates of each.

    Attributes:
        requests: Number of requests.
        candidates: Number of candidates of each.
        calls: Per model, in the order given.
        speedup: First over second; None for a single model.
        settled: Whether the interval was narrow enough before the time was used up.
    """

    requests: int
    candidates: int
    calls: tuple[Call, ...]
    speedup: Speedup | None
    settled: bool


@dataclass(frozen=True)
class Line:
    """Cost of a request as `once + each * N`, fitted to the medians.

    Attributes:
        once: Seconds per request, whatever N.
        each: Seconds per candidate, up to the knee.
        knee: Number of candidates from which on one costs more or less, by the caches; None where the line is straight.
        beyond: Seconds per candidate beyond the knee.
        error: Largest difference from a median, relative to the median.
    """

    once: float
    each: float
    knee: int | None
    beyond: float
    error: float

    def at(self, candidates: float) -> float:
        """Seconds at a number of candidates."""
        below = candidates if self.knee is None else min(candidates, self.knee)
        return self.once + self.each * below + self.beyond * (candidates - below)


@dataclass(frozen=True)
class Share:
    """Part of the kernel time of a request.

    Attributes:
        name: What the kernels have in common.
        kernels: How many run per request.
        seconds: Their time per request.
    """

    name: str
    kernels: int
    seconds: float


@dataclass(frozen=True)
class Kernel:
    """One kernel of one model.

    Attributes:
        name: The node, as the user's model names it; fused nodes carry the name of one of theirs.
        op: Operator that onnxruntime runs.
        provider: Execution provider it runs on.
        level: `request`: runs once. `repeated`: runs on all rows though its result is the same in all of them.
            `candidate`: runs on all rows.
        rule: Rule of onnxrank that made it; `none` for nodes of the user's own, `other` for those onnxruntime made.
        seconds: Time per request.
    """

    name: str
    op: str
    provider: str
    level: str
    rule: str
    seconds: float


@dataclass(frozen=True)
class Kernels:
    """Where the time of a request goes, from onnxruntime's own profiler, which slows small kernels down.

    Attributes:
        candidates: Number of candidates.
        runs: Number of profiled runs that the means are of: the faster half.
        seconds: Kernel time per request.
        session: The session's own time per request, kernels and what is between them.
        levels: By level; they add up to `seconds`.
        operators: By operator, longest first; they add up to `seconds`.
        rules: By rule of onnxrank; they add up to `seconds`.
        providers: By execution provider; they add up to `seconds`.
        copies: Copies between host and device.
        device: Time on the device per request; None where the profiler does not tell.
        longest: The kernels that take longest.
    """

    candidates: int
    runs: int
    seconds: float
    session: float
    levels: tuple[Share, ...]
    operators: tuple[Share, ...]
    rules: tuple[Share, ...]
    providers: tuple[Share, ...]
    copies: Share
    device: float | None
    longest: tuple[Kernel, ...]


@dataclass(frozen=True)
class Work:
    """Multiply-adds of matrix products, and how near the machine they come.

    Attributes:
        name: The level, or `all`.
        macs: Multiply-adds per request.
        of_peak: Those per second over those of one large product in the same run; None where nothing took time.
    """

    name: str
    macs: int
    of_peak: float | None


@dataclass(frozen=True)
class Works:
    """The share of the machine's peak that a model reaches at one number of candidates.

    Attributes:
        candidates: Number of candidates.
        all: By the time of a request.
        levels: By the time of each level's kernels.
    """

    candidates: int
    all: Work
    levels: tuple[Work, ...]


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process of its own that loads the model and runs it, in bytes.

    Attributes:
        candidates: Number of candidates it ran.
        start: With onnxruntime imported and nothing loaded.
        loaded: With the session made.
        peak: Highest value over the whole run.
    """

    candidates: int
    start: int
    loaded: int
    peak: int


@dataclass(frozen=True)
class ModelProfile:
    """What was measured of one model.

    Attributes:
        source: Its file, or a name for a model in memory.
        sha256: Hash of the file's bytes, external data not included.
        size: Number of these bytes.
        optimised: Whether it carries a contract of onnxrank.
        providers: Execution providers of the session, in order of preference.
        line: Fitted cost; None with fewer than two numbers of candidates.
        kernels: Per number of candidates where the time goes.
        memory: Peak memory; None where it was not asked for or could not be measured.
        works: Per number of candidates how near the machine the model is; nothing where its products are not known.
    """

    source: str
    sha256: str
    size: int
    optimised: bool
    providers: tuple[str, ...]
    line: Line | None
    kernels: tuple[Kernels, ...]
    memory: Memory | None
    works: tuple[Works, ...] = ()


@dataclass(frozen=True)
class BreakEven:
    """From how many candidates on the second model is faster.

    Attributes:
        kind: `always`: at every number measured. `measured`: from `candidates` on, between two numbers measured.
            `extrapolated`: beyond them, by the fitted costs. `never`: at none, and the fitted costs do not meet.
        candidates: The number; None for `never`.
    """

    kind: str
    candidates: int | None


@dataclass(frozen=True)
class Profile:
    """Everything there is to say about one run.

    Attributes:
        version: Version of onnxrank.
        onnxruntime: Version of onnxruntime.
        provider: `cpu` or `cuda`.
        device: The processor, in words.
        threads: Threads inside an operator.
        io_binding: Whether inputs and outputs were bound to memory.
        cuda_graph: Whether runs were replays of a captured CUDA graph.
        seconds: Most seconds of timing per number of candidates.
        roles: Roles of the first model's inputs.
        models: The models.
        points: Per number of candidates, in ascending order.
        break_even: With two models.
        difference: With two models, largest difference of their scores over the largest score.
        notes: Anything else worth knowing, a sentence each.
        several: Per number of candidates and of requests; nothing unless asked for.
    """

    version: str
    onnxruntime: str
    provider: str
    device: str
    threads: int
    io_binding: bool
    cuda_graph: bool
    seconds: float
    roles: dict[str, Any]
    models: tuple[ModelProfile, ...]
    points: tuple[Point, ...]
    break_even: BreakEven | None = None
    difference: float | None = None
    notes: tuple[str, ...] = field(default=())
    several: tuple[Several, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `profile.schema.json` describes it."""
        return {"schema": "onnxrank.profile", "schema_version": SCHEMA_VERSION, **asdict(self)}
