"""The check that `optimize` makes of its own results: the engine of `verify`, with what is known already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto

from onnxrank import runtime
from onnxrank.feeds import Known
from onnxrank.model import LoadedModel
from onnxrank.report import Comparison
from onnxrank.roles import Roles
from onnxrank.verify.engine import Engine
from onnxrank.verify.options import Options
from onnxrank.verify.report import Report
from onnxrank.verify.sessions import open_ahead
from onnxrank.verify.side import Side
from onnxrank.verify.sizes import Span

_MANY = 1000
"""Nodes of a model from which on its sessions take longer to make than a process takes to start."""


def gate(
    original: LoadedModel,
    made: ModelProto,
    roles: Roles,
    known: Known,
    level: str = "standard",
    lengths: Mapping[str, Span] | None = None,
    candidates: Sequence[int] | None = None,
    first: Side | None = None,
) -> Report:
    """Holds a rewritten model against the original.

    Args:
        original: The original.
        made: The rewritten model; its external data lie where the original's do.
        roles: Roles of the original's inputs.
        known: What the original's study found of them.
        level: How much is compared.
        lengths: Least and most of the inputs' symbolic lengths, where they are declared.
        candidates: Numbers of candidates to compare at; None for those of the level.
        first: The original from `begun`, which stays the caller's; None for one of its own.

    Raises:
        ModelError: The original does not run.
        UsageError: A length is none of the inputs'.
        EnvironmentProblem: There is no runtime.
    """
    second = LoadedModel(made, None, original.folder, "", made.ByteSize(), original.external)
    options = Options(roles=roles, level=level, lengths=lengths or {}, candidates=candidates)
    with Engine(original, second, options, known=known, first=first) as engine:
        return engine.run()


def begun(original: LoadedModel) -> Side | None:
    """An original whose sessions are made while it is studied; None where that takes no time, or much memory."""
    if len(original.proto.graph.node) < _MANY or runtime.has_half(original.proto):
        return None
    options = Options()
    side = Side("original", original, options.timeout, options.memory)
    if side.large:
        return None
    open_ahead(side, options)
    return side


def failing_candidates(report: Report) -> tuple[int, ...] | None:
    """Numbers of candidates that are enough to see a failure again; None for all of the check's.

    That is so where no score differs but the model does not run for some request: it may run for others.
    """
    if not report.failed_cases and any(f.verdict == "rounding" for f in report.errors):
        return None
    return tuple(sorted({2, *(c.candidates for c in report.failed_cases[:1])}))


def comparisons(report: Report) -> list[Comparison]:
    """The numeric comparisons in the form of `optimize`'s report."""
    return [
        Comparison(c.candidates, c.seed, c.output, c.error, c.allowed, c.passed)
        for c in report.cases
        if c.verdict in ("algebra", "rounding")
    ]
