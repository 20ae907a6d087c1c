"""What one run of `split` did: the data behind the table and the JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from onnxrank.report import Comparison

SCHEMA_VERSION = 1
"""Version of the JSON form; it changes when a field goes or changes its meaning, not when one is added."""


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the state.

    Attributes:
        name: What both models call it; within a packed state, the part's name.
        tensor: What it is in the whole model.
        type: Its element type, by numpy's name.
        shape: Its extents: numbers, or what a length is called.
        bytes: Its size, at the lengths that costs are told for.
        most_bytes: Its size at the longest lengths served; None where nothing limits it.
        saved_macs: Multiply-adds behind it, which a call with a state does not make; what several tensors need counts
            for each.
        saved_seconds: Predicted time of the steps behind it, likewise.
    """

    name: str
    tensor: str
    type: str
    shape: tuple[int | str, ...]
    bytes: int
    most_bytes: int | None
    saved_macs: int
    saved_seconds: float


@dataclass(frozen=True)
class Part:
    """One of the two models.

    Attributes:
        file: Where it lies in the folder that was written.
        sha256: Hash of its bytes.
        nodes: Number of nodes.
        parameters: Entries of its initializers.
        macs: Multiply-adds of matrix products per call.
        seconds: Predicted time per call.
        size: Bytes of its file.
    """

    file: str
    sha256: str
    nodes: int
    parameters: int
    macs: int
    seconds: float
    size: int


@dataclass(frozen=True)
class Sunk:
    """A step of the request that runs in the candidate model, because its result is larger than doing it again is slow.

    Attributes:
        node: Its name, or its first output.
        op: Its operator.
        seconds: Predicted time.
    """

    node: str
    op: str
    seconds: float


@dataclass(frozen=True)
class Advice:
    """Whether two models pay.

    Attributes:
        files: 1 or 2.
        reason: Why.
        hit_seconds: Predicted time of a request whose state is there.
        miss_seconds: Predicted time of one whose state is not.
        one_seconds: Predicted time of a request with one model.
    """

    files: int
    reason: str
    hit_seconds: float
    miss_seconds: float
    one_seconds: float


@dataclass
class Report:
    """Everything there is to say about one run.

    Attributes:
        version: Version of onnxrank.
        source: Path of the model; None for one in memory.
        source_sha256: Hash of its bytes.
        candidates: Expected number of candidates, least and most.
        usual: The number of candidates that costs are told for.
        lengths: Least and most of the inputs' lengths that are not constant.
        format: `plain`, `python` or `triton`.
        form: `named` or `packed`.
        dtype: `float32` or `float16`.
        state_version: Which request model the state is of.
        guard: Whether a state of another version gives NaN.
        state: Its tensors.
        request: The request model.
        candidate: The candidate model.
        sunk: Steps of the request that run in the candidate model.
        advice: Whether two models pay.
        rules: Sites by rule of the rewriting before.
        checks: Comparisons of both models together with the original; empty if there were none.
        looked: Numbers of candidates and lengths at which they were compared, a line each.
        unseen: What was not looked at, a line each.
        notes: Anything else worth knowing, a sentence each.
        files: What was written, relative to `output`.
        output: The folder; None where nothing was written.
    """

    version: str
    source: str | None
    source_sha256: str
    candidates: tuple[int, int]
    usual: int
    lengths: dict[str, tuple[int, int]]
    format: str
    form: str
    dtype: str
    state_version: int
    guard: bool
    state: list[StateTensor]
    request: Part
    candidate: Part
    sunk: list[Sunk]
    advice: Advice
    rules: dict[str, int] = field(default_factory=dict)
    checks: list[Comparison] = field(default_factory=list)
    looked: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    output: str | None = None

    @property
    def state_bytes(self) -> int:
        """Size of the state, at the lengths that costs are told for."""
        return sum(t.bytes for t in self.state)

    @property
    def most_state_bytes(self) -> int | None:
        """Size of the state at the longest lengths served; None where nothing limits it."""
        sizes = [t.most_bytes for t in self.state]
        return None if None in sizes else sum(n for n in sizes if n is not None)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `split.schema.json` describes it."""
        return {
            "schema": "onnxrank.split",
            "schema_version": SCHEMA_VERSION,
            "state_bytes": self.state_bytes,
            "most_state_bytes": self.most_state_bytes,
            **asdict(self),
        }
