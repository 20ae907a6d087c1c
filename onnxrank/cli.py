"""The command line. What is slow to import is imported by the command that needs it, so that --help answers at once."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from onnxrank.errors import CheckFailed, EnvironmentProblem, NothingApplied, OnnxrankError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

INTERNAL = 70
INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141
_BAR = 30
_PATIENCE = 1.0  # seconds before progress is shown


def _span(ctx: click.Context, param: click.Parameter, value: str) -> int | tuple[int, int]:
    """Reads `512` or `64..2048`."""
    match = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?", value)
    if match is None:
        raise click.BadParameter(f"{value!r} is neither a number nor a range such as 64..2048.", ctx, param)
    low = int(match[1])
    high = low if match[2] is None else int(match[2])
    if low < 1 or high < low:
        raise click.BadParameter(f"{value!r} starts below 1, or goes down.", ctx, param)
    return low if match[2] is None else (low, high)


def _names(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> list[str] | None:
    """Reads comma lists; None if there is none."""
    return [name for part in value for item in part.split(",") if (name := item.strip())] if value else None


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """Reads `1,32,512`."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", value) or 0 in map(int, value.split(",")):
        raise click.BadParameter(f"{value!r} is not a comma list of numbers of at least 1.", ctx, param)
    return sorted({int(n) for n in value.split(",")})


_ROLE_OPTIONS = (
    click.option(
        "--request",
        multiple=True,
        metavar="PATTERN",
        help="Inputs that are the same for all candidates of a request: a name, a glob such as 'user_*', or columns "
        "such as 'X[0:13,20]' (half-open ranges). Repeatable.",
    ),
    click.option("--roles", metavar="FILE", help="The same, with value ranges and axes, as YAML or JSON."),
    click.option(
        "--infer-roles",
        metavar="DATA.npz",
        help="Recorded requests: an array per input, and request_id. Instead of roles.",
    ),
)
_REWRITE_OPTIONS = (
    click.option(
        "--interface",
        type=click.Choice(["request", "same"]),
        default="request",
        show_default=True,
        help="request: request-level inputs take one row. same: the signature does not change.",
    ),
    click.option(
        "--candidates",
        callback=_span,
        default="512",
        show_default=True,
        metavar="N|LOW..HIGH",
        help="Expected number of candidates per request, or its range.",
    ),
    click.option(
        "--select", callback=_names, multiple=True, metavar="RULES", help="Use only these: a comma list, or repeated."
    ),
    click.option(
        "--ignore", callback=_names, multiple=True, metavar="RULES", help="Leave these out: a comma list, or repeated."
    ),
    click.option("--rules", multiple=True, metavar="PATH", help="A Python file with further rules. Repeatable."),
)
_OUTPUT_OPTIONS = (
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Print more, every step, and tracebacks of internal errors."),
)


def _options(*groups: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds options that several commands have, in order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def _report_option(formats: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Where reports go, for a command that knows these formats."""
    return click.option(
        "--report",
        multiple=True,
        metavar="[FORMAT:]FILE",
        help=f"Write the report as {formats}; the file's ending tells which if FORMAT is left out; - is stdout. "
        "Repeatable.",
    )


def _given_roles(
    ctx: click.Context, request: tuple[str, ...], roles: str | None, infer_roles: str | None
) -> dict[str, Any]:
    """What the role options say, as arguments of the library's functions."""
    from onnxrank.roles import load_spec

    if infer_roles is not None and (request or roles is not None):
        raise click.UsageError("--infer-roles finds the roles itself, so --request and --roles exclude it.", ctx)
    return {
        "request": request,
        "spec": None if roles is None else load_spec(roles),
        "infer_from": None if infer_roles is None else _read_npz(infer_roles),
    }


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="onnxrank", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Makes exported ONNX ranking models fast without changing what they compute.

    Exit codes: 0 done, 1 the check failed, 2 usage or roles, 3 the model is invalid or not supported, 4 the environment
    lacks something, 5 nothing applied although a change was required, 70 internal error.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@cli.command(short_help="Compute once per request what does not depend on the candidate.")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", required=False)
@_options(_ROLE_OPTIONS, _REWRITE_OPTIONS)
@click.option(
    "--no-guard",
    is_flag=True,
    help="With --interface same: do not turn scores into NaN where request-level rows differ.",
)
@_report_option("json or text")
@click.option("--explain", is_flag=True, help="Name every node that was left alone, with the reason.")
@click.option("--dry-run", is_flag=True, help="Write no model (reports are written); OUT may be left out.")
@click.option("--no-check", is_flag=True, help="Do not compare the result with the original.")
@click.option("--require-change", is_flag=True, help="Exit with 5 and write no model if nothing applied.")
@_options(_OUTPUT_OPTIONS)
@click.pass_context
def optimize(
    ctx: click.Context,
    source: str,
    out: str | None,
    request: tuple[str, ...],
    roles: str | None,
    infer_roles: str | None,
    interface: str,
    no_guard: bool,
    candidates: int | tuple[int, int],
    select: list[str] | None,
    ignore: list[str] | None,
    rules: tuple[str, ...],
    report: tuple[str, ...],
    explain: bool,
    dry_run: bool,
    no_check: bool,
    require_change: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Compute once per request what does not depend on the candidate.

    Reads the ranking model IN, rewrites it, compares the result with the original and writes it to OUT, which may be IN
    itself. If nothing applies, OUT gets IN's own bytes. If anything fails, no file is written.
    """
    _start(ctx, quiet, verbose)
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT' (only --dry-run does without).", ctx)

    from onnxrank import optimize as run
    from onnxrank.model import check_output
    from onnxrank.render import FORMATS, check_target, print_report, write_report

    for target in report:
        check_target(target, [source, *([out] if out is not None else [])])
    if out is not None and not dry_run:
        check_output(out)
    given = _given_roles(ctx, request, roles, infer_roles)
    with _progress(quiet, verbose) as progress:
        try:
            result = run(
                source,
                **given,
                interface=interface,
                guard=not no_guard,
                candidates=candidates,
                select=select,
                ignore=ignore or (),
                extra_rules=rules,
                check=not no_check,
                progress=progress,
            )
        except CheckFailed as e:
            if e.report is not None:
                for target in report:
                    write_report(e.report, target, explain, verbose)
            raise
        refused = require_change and not result.changed
        if out is not None and not dry_run and not refused:
            result.save(out)
    for target in report:
        write_report(result.report, target, explain, verbose)
    _show(lambda console: print_report(result.report, console, explain, verbose), quiet, report, FORMATS)
    if refused:
        raise NothingApplied("No rule applied, and --require-change asks for one. No model was written.")


def _counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Reads `0,1,2,17,512`."""
    if value is None:
        return None
    parts = [p.strip() for p in value.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,6}", p) for p in parts):
        raise click.BadParameter(f"{value!r} is no list of numbers such as 0,1,2,17,512.", ctx, param)
    return tuple(int(p) for p in parts)


def _providers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Reads `cpu,cuda`."""
    names = tuple(dict.fromkeys(p.strip().lower() for p in value.split(",")))
    if not set(names) <= {"cpu", "cuda"}:
        raise click.BadParameter(f"{value!r} is not cpu, cuda or both with a comma.", ctx, param)
    return names


def _limits(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str | None, float]:
    """Reads `[OUTPUT:]VALUE`; an output's name may hold colons itself."""
    found: dict[str | None, float] = {}
    for text in value:
        output, _, number = text.rpartition(":")
        try:
            limit = float(number)
        except ValueError:
            limit = -1.0
        if not 0 <= limit < float("inf"):
            raise click.BadParameter(f"{text!r} is not [OUTPUT:]VALUE with a value of 0 or more.", ctx, param)
        found[output or None] = limit
    return found


@cli.command(short_help="Tell whether two models give the same scores.")
@click.argument("original", metavar="ORIGINAL")
@click.argument("optimized", metavar="OPTIMIZED")
@click.option(
    "--request",
    multiple=True,
    metavar="PATTERN",
    help="Inputs that are the same for all candidates of a request, as for optimize. Without this, --roles and a "
    "contract in the metadata, the inputs that OPTIMIZED takes with one row.",
)
@click.option("--roles", metavar="FILE", help="The same, with value ranges and axes, as YAML or JSON.")
@click.option("--ep", callback=_providers, default="cpu", show_default=True, help="Execution providers: cpu,cuda.")
@click.option(
    "--no-tf32", is_flag=True, help="With --ep cuda: do not let the GPU round operands of products to 10 bits."
)
@click.option(
    "--data",
    metavar="FILE|DIR",
    help="Recorded requests to compare on as well: .npz, a folder of .npz files or of ONNX test data, or Parquet.",
)
@click.option(
    "--request-id",
    default="request_id",
    show_default=True,
    metavar="NAME",
    help="Key or column of the request's identity.",
)
@click.option("--labels", metavar="NAME", help="Key or column of recorded labels, for AUC and log loss.")
@click.option(
    "--candidates",
    callback=_counts,
    metavar="N,N,…",
    help="Numbers of candidates.  [default: 0,1,2,17,512; quick: no 512]",
)
@click.option(
    "--seeds", type=click.IntRange(1, 1000), metavar="N", help="Different users for each.  [default: 3; quick: 2]"
)
@click.option(
    "--rtol",
    multiple=True,
    callback=_limits,
    metavar="[OUTPUT:]VALUE",
    help="A limit beside the one by rounding. Repeatable.",
)
@click.option(
    "--atol", multiple=True, callback=_limits, metavar="[OUTPUT:]VALUE", help="Likewise, absolute. Repeatable."
)
@click.option(
    "--top-k", type=click.IntRange(1, 100_000), default=10, show_default=True, help="Best candidates compared."
)
@click.option(
    "--level",
    type=click.Choice(["quick", "full"]),
    default="full",
    show_default=True,
    help="quick leaves out odd inputs and large N.",
)
@click.option(
    "--report",
    multiple=True,
    metavar="[FORMAT:]FILE",
    help="Write the report as text, json, junit, sarif or markdown; github alone prints annotations. Repeatable.",
)
@click.option(
    "--save-failing", metavar="DIR", help="Write the smallest failing case there: inputs, both models, repro.py."
)
@click.option("--bisect", is_flag=True, help="On failure, name the first rule and site, or tensor, at fault.")
@click.option(
    "--rules", multiple=True, metavar="PATH", help="With --bisect: a Python file with further rules. Repeatable."
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=120.0,
    show_default=True,
    metavar="S",
    help="Seconds for one step of a model.",
)
@click.option("--memory", type=click.FloatRange(0.5), metavar="GIB", help="Address space of each model's process.")
@click.option(
    "--jobs", type=click.IntRange(1, 1024), metavar="N", help="Processes for recorded requests.  [default: cores]"
)
@_options(_OUTPUT_OPTIONS)
@click.pass_context
def verify(
    ctx: click.Context,
    original: str,
    optimized: str,
    request: tuple[str, ...],
    roles: str | None,
    ep: tuple[str, ...],
    no_tf32: bool,
    data: str | None,
    request_id: str,
    labels: str | None,
    candidates: tuple[int, ...] | None,
    seeds: int | None,
    rtol: dict[str | None, float],
    atol: dict[str | None, float],
    top_k: int,
    level: str,
    report: tuple[str, ...],
    save_failing: str | None,
    bisect: bool,
    rules: tuple[str, ...],
    timeout: float,
    memory: float | None,
    jobs: int | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Tell whether two models give the same scores.

    Compares OPTIMIZED with ORIGINAL, which is right by definition: the algebra in float64, the rounding in the models'
    own types on every provider and optimisation level, and the order of candidates. Each model runs in a process of its
    own.
    """
    _start(ctx, quiet, verbose)
    if labels is not None and data is None:
        raise click.UsageError("--labels needs recorded requests: --data FILE|DIR.", ctx)

    from onnxrank.roles import load_spec
    from onnxrank.verify import Options, failure, reports
    from onnxrank.verify import verify as run

    for target in report:
        reports.check_target(target, [original, optimized])
    if save_failing is not None:
        _check_folder(save_failing)
    options = Options(
        request=request,
        spec=None if roles is None else load_spec(roles),
        providers=ep,
        data=data,
        request_id=request_id,
        labels=labels,
        candidates=candidates,
        seeds=seeds,
        rtol=rtol,
        atol=atol,
        top_k=top_k,
        level=level,
        bisect=bisect,
        save_failing=save_failing,
        rules=rules,
        timeout=timeout,
        memory=None if memory is None else int(memory * (1 << 30)),
        jobs=jobs,
        tf32=not no_tf32,
    )
    with _progress(quiet, verbose) as progress:
        found = run(original, optimized, options, progress)
    for target in report:
        reports.write(found, target, verbose)
    if not quiet:
        taken = any(reports.target_of(target)[1] == "-" for target in report)
        stream = sys.stderr if taken else sys.stdout
        _print(lambda console: reports.show(found, console, verbose), stream)
    if not found.passed:
        raise CheckFailed(failure(found))


def _check_folder(path: str) -> None:
    """Finds out before any work whether files can be written to a folder, which may not exist yet."""
    place = os.path.realpath(path)
    if os.path.isdir(place) and os.listdir(place):
        raise UsageError(f"{path} is not empty; name a new folder for the failing case.")
    parent = place if os.path.isdir(place) else os.path.dirname(place)
    if os.path.exists(place) and not os.path.isdir(place):
        raise UsageError(f"{path} is no folder.")
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} cannot be written: {parent} is missing or not writable.")


@cli.command(short_help="Time models over the number of candidates, and see where the time goes.")
@click.argument("model", metavar="MODEL")
@click.argument("other", metavar="[OTHER]", required=False)
@_options(_ROLE_OPTIONS)
@click.option(
    "--candidates",
    callback=_numbers,
    default="1,32,128,512,2048",
    show_default=True,
    metavar="N,N...",
    help="Numbers of candidates per request.",
)
@click.option(
    "--ep",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Execution provider; the command fails where it is not there.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads inside an operator.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Most seconds of timing per number of candidates; it ends when the interval is narrow.",
)
@click.option(
    "--io-binding/--no-io-binding",
    default=None,
    help="Bind inputs and outputs to memory of the provider. [default: with --ep cuda]",
)
@click.option("--cuda-graph", is_flag=True, help="With --ep cuda: capture runs in a CUDA graph and replay them.")
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory in a process of its own.")
@_report_option("html, json, csv or text")
@click.option("--trace", metavar="FILE", help="Write a trace for chrome://tracing or ui.perfetto.dev, as JSON.")
@_options(_OUTPUT_OPTIONS)
@click.pass_context
def profile(
    ctx: click.Context,
    model: str,
    other: str | None,
    request: tuple[str, ...],
    roles: str | None,
    infer_roles: str | None,
    candidates: list[int],
    ep: str,
    threads: int,
    seconds: float,
    io_binding: bool | None,
    cuda_graph: bool,
    no_memory: bool,
    report: tuple[str, ...],
    trace: str | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Time models over the number of candidates, and see where the time goes.

    MODEL and OTHER, usually what optimize made of it, score the same candidates in turns. Roles are those of OTHER's
    contract if none are given.
    """
    _start(ctx, quiet, verbose)
    given = _given_roles(ctx, request, roles, infer_roles)

    import json

    from onnxrank.profiling.engine import profile as run
    from onnxrank.profiling.render import FORMATS, print_profile, to_csv
    from onnxrank.render import as_text, check_target, to_json, write_document

    taken = [m for m in (model, other) if m is not None]
    for target in report:
        check_target(target, taken, FORMATS)
    if trace is not None:
        check_target(f"json:{trace}", taken)
    traced: dict[str, Any] | None = None if trace is None else {}
    with _progress(quiet, verbose) as progress:
        found = run(
            model,
            other,
            **given,
            candidates=candidates,
            provider=ep,
            threads=threads,
            seconds=seconds,
            io_binding=io_binding,
            cuda_graph=cuda_graph,
            memory=not no_memory,
            trace=traced,
            progress=progress,
        )

    def write(form: str, encoding: str) -> str:
        if form == "html":
            from onnxrank.profiling.page import to_html

            return to_html(found)
        if form == "text":
            return as_text(lambda console: print_profile(found, console, verbose), encoding)
        return to_json(found) if form == "json" else to_csv(found)

    for target in report:
        write_document(write, target, FORMATS)
    if trace is not None:
        write_document(lambda form, encoding: json.dumps(traced) + "\n", f"json:{trace}")
    _show(lambda console: print_profile(found, console, verbose), quiet, report, FORMATS)


@cli.command(short_help="See what is in a model and what could be saved.")
@click.argument("model", metavar="MODEL")
@_options(_ROLE_OPTIONS, _REWRITE_OPTIONS)
@click.option("--node", metavar="NAME", help="Explain one tensor or node instead: its level, and what makes it so.")
@_report_option("html, json or text")
@_options(_OUTPUT_OPTIONS)
@click.pass_context
def inspect(
    ctx: click.Context,
    model: str,
    request: tuple[str, ...],
    roles: str | None,
    infer_roles: str | None,
    interface: str,
    candidates: int | tuple[int, int],
    select: list[str] | None,
    ignore: list[str] | None,
    rules: tuple[str, ...],
    node: str | None,
    report: tuple[str, ...],
    quiet: bool,
    verbose: bool,
) -> None:
    """See what is in a model and what could be saved, without changing it.

    Runs what optimize would run with the same options, and writes no model. Without roles all inputs count as
    candidate-level, and what declaring each of them request-level would save is told.
    """
    _start(ctx, quiet, verbose)
    given = _given_roles(ctx, request, roles, infer_roles)

    from onnxrank.inspection.engine import explain
    from onnxrank.inspection.engine import inspect as run
    from onnxrank.inspection.render import FORMATS, print_explanation, print_inspection
    from onnxrank.render import as_text, check_target, to_json, write_document

    for target in report:
        check_target(target, [model], FORMATS)
    with _progress(quiet, verbose) as progress:
        found = run(
            model,
            **given,
            interface=interface,
            candidates=candidates,
            select=select,
            ignore=ignore or (),
            extra_rules=rules,
            lifts=node is None or bool(report),
            progress=progress,
        )
    explained = None if node is None else explain(found, node)

    def show(console: Console) -> None:
        if explained is not None:
            print_explanation(explained, console)
        else:
            print_inspection(found, console, verbose)

    def write(form: str, encoding: str) -> str:
        if form == "html":
            from onnxrank.inspection.page import to_html

            return to_html(found)
        return to_json(found) if form == "json" else as_text(show, encoding)

    for target in report:
        write_document(write, target, FORMATS)
    _show(show, quiet, report, FORMATS)


@cli.command("rules", short_help="List the rules, or explain one.")
@click.argument("name", metavar="[RULE]", required=False)
def list_rules(name: str | None) -> None:
    """List the rules, or explain RULE."""
    from onnxrank.pipeline import choose_rules

    known = {rule.name: rule for rule in choose_rules(None, (), ())}
    if name is None:
        width = max(map(len, known))
        for rule in known.values():
            click.echo(f"{rule.name:<{width}}  {rule.title}")
    elif name in known:
        from onnxrank.render import printable
        from onnxrank.rulebook import explain

        click.echo(printable(explain(known[name]), sys.stdout.encoding or "utf-8", keep="\n"))
    else:
        import difflib

        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"There is no rule {name!r}.{hint} The rules are {', '.join(known)}.")


def _read_npz(path: str) -> dict[str, Any]:
    from pathlib import Path

    from onnxrank.verify.recorded import read_archive

    return read_archive(Path(path))


def _start(ctx: click.Context, quiet: bool, verbose: bool) -> None:
    """What every command does first."""
    ctx.find_root().obj = {"verbose": verbose}
    if quiet and verbose:
        raise click.UsageError("-q and -v exclude each other.", ctx)


def _show(show: Callable[[Console], None], quiet: bool, targets: Sequence[str], formats: Sequence[str]) -> None:
    """Prints a report, unless it should be quiet: to stderr if another one goes to stdout, which is one document."""
    from onnxrank.render import parse_target

    if not quiet:
        taken = any(parse_target(target, formats)[1] == "-" for target in targets)
        _print(show, sys.stderr if taken else sys.stdout)


def _print(show: Callable[[Console], None], stream: TextIO) -> None:
    from rich.console import Console

    console = Console(file=stream)
    # Written here rather than by rich, which would end the process where the reader went away.
    with console.capture() as captured:
        show(console)
    stream.write(captured.get())


class _Steps:
    """Shows what is being done, and how far it is where that is counted."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._step = ""

    def __call__(self, step: str) -> None:
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
def _progress(quiet: bool, verbose: bool) -> Iterator[Callable[[str], None] | None]:
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
            yield _Steps(status.update)
        finally:
            timer.cancel()
            with lock:
                done = True
                status.stop()


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
    from onnxrank.render import printable

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


if __name__ == "__main__":
    sys.exit(main())
