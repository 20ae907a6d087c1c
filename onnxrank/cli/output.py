"""What commands show on the terminal: reports, and progress."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

import click

from onnxrank.formats import Kind, Style

if TYPE_CHECKING:
    from rich.console import Console

_BAR = 30
_PATIENCE = 1.0  # seconds before progress is shown


def show_report(kind: Kind, report: object, style: Style, quiet: bool, targets: Sequence[str]) -> None:
    """Writes a report to its targets and prints it: to stderr if stdout, which is one document, is taken by a target.

    Args:
        kind: The kind of report.
        report: The report.
        style: How much it says.
        quiet: Whether not to print it.
        targets: `[FORMAT:]FILE` each.
    """
    kind.write(report, targets, style)
    if not quiet:
        taken = any(kind.parse(target)[1] == "-" for target in targets)
        _print(lambda console: kind.show(report, console, style), sys.stderr if taken else sys.stdout)


def _print(show: Callable[[Console], None], stream: TextIO) -> None:
    """Prints a report to a stream, with colours where it is a terminal."""
    from rich.console import Console

    console = Console(file=stream)
    # Written here rather than by rich, which would end the process where the reader went away.
    with console.capture() as captured:
        show(console)
    stream.write(captured.get())


class Steps:
    """Shows what is being done, and how far it is where that is counted."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._step = ""

    def __call__(self, step: str) -> None:
        """Shows that a step begins."""
        self._step = step
        self._show(step)

    def advance(self, done: int, total: int | None) -> None:
        """Shows a bar, or just a count where the total is not known."""
        if not total:
            self._show(f"{self._step}: {done} candidates")
            return
        full = min(_BAR, _BAR * done // total)
        self._show(f"{self._step} {'━' * full}{'╌' * (_BAR - full)} {100 * done // total} %")


@contextlib.contextmanager
def show_progress(quiet: bool, verbose: bool) -> Iterator[Callable[[str], None] | None]:
    """Progress on stderr: lines with -v, else a spinner on a terminal after a second."""
    if quiet or not (verbose or sys.stderr.isatty()):
        yield None
    elif verbose:
        start = time.monotonic()
        yield lambda step: click.echo(f"{time.monotonic() - start:6.1f} s  {step}", err=True)
    else:
        from rich.console import Console

        status = Console(stderr=True).status("working")
        lock = threading.Lock()
        done = False

        def show() -> None:
            with lock:
                if not done:
                    status.start()

        timer = threading.Timer(_PATIENCE, show)
        timer.daemon = True
        timer.start()
        try:
            yield Steps(status.update)
        finally:
            timer.cancel()
            with lock:
                done = True
                status.stop()
