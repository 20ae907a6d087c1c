"""Errors a user can meet; each class has its exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxrank.report import Report


class OnnxrankError(Exception):
    """Base of every error raised on purpose: one or two sentences, what is wrong and what to do."""

    exit_code: int = 70


class CheckFailed(OnnxrankError):
    """The rewritten model did not pass its check; nothing was written.

    Attributes:
        report: The report of the run, with the comparisons, where it got that far.
    """

    exit_code = 1

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class UsageError(OnnxrankError):
    """An option, a roles file or recorded data cannot be used as given."""

    exit_code = 2


class ModelError(OnnxrankError):
    """The model is invalid, or of a kind that is not supported."""

    exit_code = 3


class DoesNotRun(ModelError):
    """The runtime does not run the model on inputs of its roles."""


class OutOfMemory(ModelError):
    """The model needs more memory than its process may use."""


class EnvironmentProblem(OnnxrankError):
    """Something outside the model is missing: a runtime, memory, disk space, a permission."""

    exit_code = 4


class NothingApplied(OnnxrankError):
    """No rule applied although a change was required."""

    exit_code = 5
