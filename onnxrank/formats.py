"""Reports to files: the kinds of reports, the formats each kind has, and the one writer of all of them.

Nothing slow is imported here: what makes a format is imported when that format is asked for.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from onnxrank.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Style:
    """How much a report for people says, and in what.

    Attributes:
        explain: Whether to name every node that was left alone.
        verbose: Whether to list everything instead of what matters most.
        node: A tensor or node to explain instead, for an inspection.
        encoding: Encoding of the file; characters that it lacks are escaped or replaced.
    """

    explain: bool = False
    verbose: bool = False
    node: str | None = None
    encoding: str = "utf-8"


PLAIN = Style()


@dataclass(frozen=True)
class Format:
    """One format of a report.

    Attributes:
        name: What stands in front of the colon in `--report FORMAT:FILE`.
        make: The function that makes the text, as `module:function`.
        endings: Endings of files that mean it, in lower case.
        styled: Whether the function takes a `Style` behind the report.
        alone: Whether its name without a file means stdout.
    """

    name: str
    make: str
    endings: tuple[str, ...] = ()
    styled: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of report: that of one command.

    Attributes:
        formats: The formats it has.
        shower: The function that prints it to a console, as `module:function`; takes the report, the console, a style.
    """

    formats: tuple[Format, ...]
    shower: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the formats."""
        return tuple(f.name for f in self.formats)

    def parse(self, target: str) -> tuple[str, str]:
        """Reads `[FORMAT:]FILE`; without a format the file's ending tells it. `-` is stdout.

        Args:
            target: What to read.

        Returns:
            The format and the file.

        Raises:
            UsageError: The format or the ending is unknown, or there is no file.
        """
        if any(f.alone and f.name == target for f in self.formats):
            return target, "-"
        match = re.fullmatch(r"([A-Za-z][A-Za-z0-9_+.]+):(.*)", target, re.DOTALL)  # C:\x is a path
        kinds = either(self.names)
        if match:
            form, file = match[1].lower(), match[2]
            if form not in self.names:
                raise UsageError(f"--report {target}: the format {match[1]!r} is unknown; it must be {kinds}.")
        else:
            file = target
            ending = os.path.splitext(file)[1].lower()
            form = next((f.name for f in self.formats if ending in f.endings), "")
            if file and not form:
                raise UsageError(
                    f"--report {target}: the format cannot be told from the file's ending. Put {kinds} in front, such "
                    f"as json:{target}."
                )
        if not file:
            raise UsageError(f"--report {target or repr('')}: the file is missing.")
        return form, file

    def check(self, targets: Iterable[str], taken: Sequence[str | os.PathLike[str]] = ()) -> None:
        """Finds out before any work whether reports can be written.

        Args:
            targets: `[FORMAT:]FILE` each.
            taken: Files that they must not replace.

        Raises:
            UsageError: One cannot.
        """
        for target in targets:
            check_file(self.parse(target)[1], taken, f"--report {target}")

    def render(self, report: Any, form: str, style: Style = PLAIN) -> str:
        """A report in one of the formats."""
        found = next(f for f in self.formats if f.name == form)
        made: str = _function(found.make)(report, *([style] if found.styled else []))
        return made

    def write(self, report: Any, targets: Iterable[str], style: Style = PLAIN) -> None:
        """Writes a report to each `[FORMAT:]FILE`; a file appears whole or not at all.

        Raises:
            UsageError: A format is unknown, or a file cannot be written.
            EnvironmentProblem: There is no space.
        """
        for target in targets:
            form, file = self.parse(target)
            put(file, self.render(report, form, replace(style, encoding=encoding_of(file))))

    def show(self, report: Any, console: Console, style: Style = PLAIN) -> None:
        """Prints a report to a console."""
        _function(self.shower)(report, console, style)


def either(names: Sequence[str]) -> str:
    """Names as alternatives: `json, text or markdown`."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def check_file(file: str, taken: Sequence[str | os.PathLike[str]] = (), option: str = "--report") -> None:
    """Finds out before any work whether a file can be written.

    Args:
        file: The file; `-` is stdout.
        taken: Files that it must not replace.
        option: What asks for it, for the message.

    Raises:
        UsageError: It cannot.
    """
    from onnxrank.model import check_output

    if file == "-" or _is_stream(Path(file)):
        return
    place = check_output(file)
    if any(os.path.realpath(other) == str(place) for other in taken):
        raise UsageError(f"{option} would replace the model. Choose another file.")


def encoding_of(file: str) -> str:
    """What text to a file is written in: UTF-8, but for stdout, which is `-`, its own."""
    return (sys.stdout.encoding or "utf-8") if file == "-" else "utf-8"


def put(file: str, text: str) -> None:
    """Writes text to a file, which appears whole or not at all, to a device, or to stdout, which is `-`.

    Raises:
        UsageError: The file cannot be written.
        EnvironmentProblem: There is no space.
    """
    from onnxrank.model import check_output, replace_files

    encoding = encoding_of(file)

    def write(out: BinaryIO) -> None:
        out.write(text.encode(encoding))

    if file == "-":
        sys.stdout.write(text)
    elif _is_stream(Path(file)):
        with open(file, "wb") as out:
            write(out)
    else:
        replace_files({check_output(file): write})


def _is_stream(path: Path) -> bool:
    """Whether something is there to write to that must not be replaced: a pipe or device."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _function(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _page(module: str) -> Format:
    return Format("html", f"onnxrank.{module}:to_html", (".html", ".htm"))


def _text(module: str) -> Format:
    return Format("text", f"onnxrank.{module}:to_text", (".txt", ".text"), styled=True)


def _markdown(module: str, styled: bool = True) -> Format:
    return Format("markdown", f"onnxrank.{module}:to_markdown", (".md", ".markdown"), styled)


_JSON = Format("json", "onnxrank.writers:to_json", (".json",))

OPTIMIZE = Kind((_JSON, _text("render"), _markdown("render")), "onnxrank.render:show")
SPLIT = Kind((_JSON, _text("splitting.render"), _markdown("splitting.render")), "onnxrank.splitting.render:show")
INSPECT = Kind(
    (_page("inspection.page"), _JSON, _text("inspection.render"), _markdown("inspection.render")),
    "onnxrank.inspection.render:show",
)
PROFILE = Kind(
    (
        _page("profiling.page"),
        _JSON,
        Format("csv", "onnxrank.profiling.render:to_csv", (".csv",)),
        _text("profiling.render"),
        _markdown("profiling.render"),
    ),
    "onnxrank.profiling.render:show",
)
COMPRESS = Kind(
    (_page("compress.page"), _JSON, _text("compress.render"), _markdown("compress.render")),
    "onnxrank.compress.render:show",
)
VERIFY = Kind(
    (
        _text("verify.reports.text"),
        _JSON,
        Format("junit", "onnxrank.verify.reports.junit:to_xml", (".xml",)),
        Format("sarif", "onnxrank.verify.reports.sarif:to_json", (".sarif",)),
        _markdown("verify.reports.markdown", styled=False),
        Format("github", "onnxrank.verify.reports.github:to_commands", alone=True),
    ),
    "onnxrank.verify.reports.text:show",
)
