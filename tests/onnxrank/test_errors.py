"""What went wrong, as exit codes."""

from __future__ import annotations

from onnxrank import errors


def test_exit_codes() -> None:
    codes = {
        errors.OnnxrankError: 70,
        errors.CheckFailed: 1,
        errors.UsageError: 2,
        errors.ModelError: 3,
        errors.EnvironmentProblem: 4,
        errors.NothingApplied: 5,
    }
    assert all(cls.exit_code == code and issubclass(cls, errors.OnnxrankError) for cls, code in codes.items())
