"""The group of commands, and what becomes of their errors: a message and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence

import click

from onnxrank.cli.compress import compress
from onnxrank.cli.inspect import inspect
from onnxrank.cli.lint import lint
from onnxrank.cli.optimize import optimize
from onnxrank.cli.profile import profile
from onnxrank.cli.rules import list_rules
from onnxrank.cli.split import split
from onnxrank.cli.verify import verify
from onnxrank.errors import EnvironmentProblem, OnnxrankError, UsageError

INTERNAL = 70
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxrank", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Makes exported ONNX ranking models fast without changing what they compute.

    Exit codes: 0 done, 1 the check failed, 2 usage or roles, 3 the model is invalid or not supported, 4 the environment
    lacks something, 5 nothing applied although a change was required, 70 internal error, 130 interrupted.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _command in (optimize, split, lint, compress, verify, profile, inspect, list_rules):
    cli.add_command(_command)


def _line(e: BaseException) -> str:
    return " ".join(str(e).split())[:400].rstrip(".") or type(e).__name__


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: The arguments; those of the process if None.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _terminable():
        return _run(list(sys.argv[1:] if args is None else args))


def _run(args: list[str]) -> int:
    ctx: click.Context | None = None
    try:
        ctx = cli.make_context("onnxrank", args)
        with ctx:
            cli.invoke(ctx)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        command = e.ctx.command_path if isinstance(e, click.UsageError) and e.ctx else "onnxrank"
        return _fail(f"{e.format_message()} Try '{command} --help'.", UsageError.exit_code)
    except OnnxrankError as e:
        return _fail(str(e), e.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except MemoryError:
        return _fail("There is not enough memory.", EnvironmentProblem.exit_code)
    except BrokenPipeError:
        # Whatever is left in the buffer must not be tried again on the way out.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as e:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            return _fail(f"There is no space left to write the output: {_line(e)}.", EnvironmentProblem.exit_code)
        verbose = ctx is not None and bool(ctx.obj and ctx.obj["verbose"])
        if verbose:
            traceback.print_exc()
        again = "" if verbose else " (run again with -v for the traceback)"
        return _fail(
            f"internal error: {type(e).__name__}: {_line(e)}. This is a bug in onnxrank; please report it{again}.",
            INTERNAL,
        )


def _fail(message: str, code: int) -> int:
    from onnxrank.writers import printable

    text = printable(f"onnxrank: error: {message}", sys.stderr.encoding or "utf-8", keep="\n")
    with contextlib.suppress(OSError):
        click.echo(text, err=True)
    return code


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turns SIGTERM into an exception, so that temporary files are removed as on any other failure."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
