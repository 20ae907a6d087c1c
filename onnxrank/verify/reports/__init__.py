"""Reports of `verify` in the forms that people, pipelines and review tools take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from onnxrank.verify.report import Report

FORMATS = ("text", "json", "junit", "sarif", "markdown", "github")
ENDINGS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".xml": "junit",
    ".sarif": "sarif",
    ".md": "markdown",
}
_ALONE = {"github": "github:-"}
"""Formats that need no file: their place is the log of a pipeline."""


def target_of(text: str) -> tuple[str, str]:
    """Reads `[FORMAT:]FILE`; `github` alone is for stdout.

    Raises:
        UsageError: The format or the ending is unknown, or there is no file.
    """
    from onnxrank.render import parse_target

    return parse_target(_ALONE.get(text, text), FORMATS, ENDINGS)


def check_target(text: str, taken: Sequence[str | os.PathLike[str]] = ()) -> None:
    """Finds out before any work whether a report can be written.

    Raises:
        UsageError: It cannot.
    """
    from onnxrank import render

    render.check_target(_ALONE.get(text, text), taken, FORMATS, ENDINGS)


def render(report: Report, form: str, verbose: bool = False, encoding: str = "utf-8") -> str:
    """A report in one of `FORMATS`."""
    if form == "text":
        from onnxrank.verify.reports import text

        return text.to_text(report, verbose, encoding)
    if form == "json":
        from onnxrank.render import dumps

        return dumps(report.to_dict())
    if form == "junit":
        from onnxrank.verify.reports import junit

        return junit.to_xml(report)
    if form == "sarif":
        from onnxrank.verify.reports import sarif

        return sarif.to_json(report)
    if form == "markdown":
        from onnxrank.verify.reports import markdown

        return markdown.to_markdown(report)
    from onnxrank.verify.reports import github

    return github.to_commands(report)


def show(report: Report, console: Console, verbose: bool = False) -> None:
    """Prints a report to a terminal."""
    from onnxrank.verify.reports import text

    text.show(report, console, verbose)


def write(report: Report, target: str, verbose: bool = False) -> None:
    """Writes a report to `[FORMAT:]FILE`; the file appears whole or not at all.

    Raises:
        UsageError: The format is unknown, or the file cannot be written.
        EnvironmentProblem: There is no space.
    """
    from onnxrank.render import encoding_of, put

    form, file = target_of(target)
    put(file, render(report, form, verbose, encoding_of(file)))
