"""What a caller may choose about a verification."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxrank.roles import Roles
from onnxrank.verify.inputs import FINITE, ORDINARY, POISONED
from onnxrank.verify.sizes import Size, Span

CHECKS = ("quick", "standard", "full")
"""How much is compared."""
BUDGETS = {"quick": 5.0, "standard": 20.0, "full": 120.0}
"""Seconds for further numbers of candidates, lengths and changed rows of tables, by level."""
LEVELS = ("disabled", "all")
"""ORT's graph optimisations."""


@dataclass(frozen=True)
class Options:
    """Choices.

    Attributes:
        request: Patterns of request-level inputs, as for `optimize`.
        spec: A roles file's content.
        roles: The roles themselves, instead of both.
        providers: Execution providers, `cpu` and `cuda`.
        data: File or folder with recorded requests; generated inputs are used as well.
        request_id: Key or column that tells the requests of recorded data apart.
        labels: Key or column of recorded labels.
        candidates: Numbers of candidates; None for those of the level.
        seeds: How many different users for each; None for those of the level.
        rtol: Relative tolerances by output, beside what rounding explains; the key None is for all.
        atol: Absolute tolerances likewise.
        top_k: How many of the best candidates are compared.
        level: `full`; `standard`: fewer kinds of inputs, many candidates only once; `quick`: few candidates.
        lengths: Least and most of the inputs' symbolic lengths, by the name in their shape or `input.axis`; those not
            named are in 1..1024.
        span: Least and most candidates that are served; None for what the optimized model's contract says.
        budget: Seconds for numbers of candidates, lengths and rows beyond the ordinary ones; None for those of the
            level. What is not reached is listed in the report.
        sizes: Just these numbers of candidates and lengths beside the ordinary ones, instead of those of the level.
        bisect: Whether to look for the rule and the site, or the tensor, that make a difference.
        save_failing: Folder for the smallest failing case.
        rules: Python files with further rules, for `bisect`.
        timeout: Seconds that one step of a model may take.
        memory: Bytes of address space for each model; None for four times the model beyond 8 GiB.
        jobs: Processes that recorded requests are divided among; None for one per core.
        engine: Where recorded requests are compared: `local`, by these processes, or `ray`, on a cluster.
        requests: Numbers of requests per call, for a model that takes several.
        tf32: Whether a GPU may round operands of float32 products, as the runtime does by default.
    """

    request: Sequence[str] = ()
    spec: Mapping[str, Any] | None = None
    roles: Roles | None = None
    providers: Sequence[str] = ("cpu",)
    data: str | os.PathLike[str] | None = None
    request_id: str = "request_id"
    labels: str | None = None
    candidates: Sequence[int] | None = None
    seeds: int | None = None
    rtol: Mapping[str | None, float] = field(default_factory=dict)
    atol: Mapping[str | None, float] = field(default_factory=dict)
    top_k: int = 10
    level: str = "full"
    lengths: Mapping[str, Span] = field(default_factory=dict)
    span: Span | None = None
    budget: float | None = None
    sizes: Sequence[Size] | None = None
    bisect: bool = False
    save_failing: str | os.PathLike[str] | None = None
    rules: Sequence[str | os.PathLike[str]] = ()
    timeout: float = 120.0
    memory: int | None = None
    jobs: int | None = None
    engine: str = "local"
    tf32: bool = True
    requests: Sequence[int] = (1, 2, 5, 32)

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of candidates."""
        # Without candidates some kernels crash: below `full` that is tried once, at the end.
        default = (0, 1, 2, 17, 512) if self.level == "full" else (1, 2, 17)
        return tuple(dict.fromkeys(default if self.candidates is None else self.candidates))

    @property
    def users(self) -> int:
        """How many different users."""
        return self.seeds if self.seeds is not None else (3 if self.level == "full" else 2)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of generated inputs."""
        return FINITE + POISONED if self.level == "full" else (ORDINARY, "edges", "padding")

    @property
    def seconds(self) -> float:
        """The budget for what is beyond ordinary inputs."""
        return BUDGETS[self.level] if self.budget is None else self.budget

    def tolerance(self, output: str) -> tuple[float, float] | None:
        """Relative and absolute tolerance for an output; None if there is none."""
        if not self.rtol and not self.atol:
            return None
        found = [limits.get(output, limits.get(None)) for limits in (self.rtol, self.atol)]
        if found == [None, None]:
            return None
        return found[0] or 0.0, found[1] or 0.0
