"""What a caller of `optimize` may choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnxrank.errors import UsageError
from onnxrank.report import report_candidates
from onnxrank.rule import Rule
from onnxrank.tune import SLOWDOWN
from onnxrank.verify.options import CHECKS


@dataclass(frozen=True)
class Options:
    """What a caller of `optimize` may choose; see there.

    Attributes:
        interface: `request` or `same`.
        guard: Whether unequal rows give NaN.
        span: Expected number of candidates, least and most.
        rules: The rules, in order of preference.
        offered: Their names, as the caller allows them; those of `rules` if None.
        check: How thoroughly the result is held against the original; False for not at all.
        lengths: Least and most of symbolic lengths, for the check.
        strict: Whether a failing check is an error.
        tune: Seconds for timing.
        slowdown: By which share the result may be slower than the original at some number of candidates that is timed.
        blocks: Most candidates of a block; 0 for no blocks, None for what timing says.
        progress: Called with the name of each stage.

    Raises:
        UsageError: A value is not one that there is.
    """

    interface: str = "request"
    guard: bool = True
    span: tuple[int, int] = (512, 512)
    rules: tuple[Rule, ...] = ()
    offered: tuple[str, ...] | None = None
    check: str | bool = "standard"
    lengths: Mapping[str, tuple[int, int]] | None = None
    strict: bool = False
    tune: float = 0.0
    slowdown: float = SLOWDOWN
    blocks: int | None = None
    progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if self.interface not in ("request", "same"):
            raise UsageError(f"interface {self.interface!r} is not known; use 'request' or 'same'")
        if self.check is not False and self.check not in CHECKS:
            raise UsageError(
                f"the check {self.check!r} is not known; use {', '.join(map(repr, CHECKS))}, True or False"
            )
        if not 0 <= self.tune < float("inf"):
            raise UsageError(f"tune {self.tune!r} is not a number of seconds")
        if not 0 <= self.slowdown < float("inf"):
            raise UsageError(f"a slowdown of {self.slowdown!r} is not a share of the original's time")
        if self.blocks is not None and self.blocks < 0:
            raise UsageError(f"blocks {self.blocks!r} is not a number of candidates, or 0 for none")

    def say(self, stage: str) -> None:
        """Tells what is being done."""
        if self.progress is not None:
            self.progress(stage)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rules that are allowed, sorted."""
        return tuple(sorted({r.name for r in self.rules})) if self.offered is None else self.offered

    @property
    def usual(self) -> int:
        """The number of candidates that costs are told for."""
        return report_candidates(self.span)


def span_of(candidates: int | tuple[int, int]) -> tuple[int, int]:
    """Least and most candidates expected.

    Raises:
        UsageError: It is no number or range of such.
    """
    span = (candidates, candidates) if isinstance(candidates, int) else candidates
    if span[0] < 1 or span[1] < span[0]:
        raise UsageError(f"candidates {candidates!r} is not a number of at least 1 or a range of such")
    return span
