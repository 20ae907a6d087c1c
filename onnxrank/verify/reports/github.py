"""Workflow commands of GitHub Actions, which show findings on the run and on the files of a pull request."""

from __future__ import annotations

from onnxrank.verify.report import Report
from onnxrank.verify.reports import common
from onnxrank.writers import printable

_LEVELS = {"error": "error", "warning": "warning", "note": "notice"}


def to_commands(report: Report) -> str:
    """A command per finding, and one for the verdict."""
    out = []
    for f in report.findings:
        path = report.original if f.model == "original" else report.optimized
        out.append(_command(_LEVELS[f.severity], path, f"onnxrank verify: {f.verdict}", f.message))
    level = "notice" if report.passed else "error"
    out.append(_command(level, report.optimized, "onnxrank verify", common.headline(report)))
    return "".join(f"{line}\n" for line in out)


def _command(level: str, path: str | None, title: str, message: str) -> str:
    place = f"file={_property(path)}," if path is not None else ""
    return f"::{level} {place}title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return printable(text, "utf-8").replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
