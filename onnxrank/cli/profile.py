"""`onnxrank profile`."""

from __future__ import annotations

import re
from typing import Any

import click

from onnxrank.cli.options import (
    OUTPUT_OPTIONS,
    ROLE_OPTIONS,
    begin,
    given_roles,
    parse_numbers,
    report_option,
    with_options,
)
from onnxrank.cli.output import show_progress, show_report
from onnxrank.formats import PROFILE, Style, check_file, put


def _parse_extents(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, int]:
    """Reads `hist=50`; a name may hold equals signs itself."""
    found: dict[str, int] = {}
    for text in value:
        name, _, number = text.rpartition("=")
        if not name or not re.fullmatch(r"[1-9][0-9]{0,8}", number):
            raise click.BadParameter(f"{text!r} is not NAME=VALUE with a value of at least 1.", ctx, param)
        found[name] = int(number)
    return found


def _parse_requests(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int]:
    """Reads `1,2,8,32`."""
    return [] if value is None else parse_numbers(ctx, param, value)


@click.command(short_help="Time models over the number of candidates, and see where the time goes.")
@click.argument("model", metavar="MODEL")
@click.argument("other", metavar="[OTHER]", required=False)
@with_options(ROLE_OPTIONS)
@click.option(
    "--candidates",
    callback=parse_numbers,
    default="1,32,128,512,2048",
    show_default=True,
    metavar="N,N...",
    help="Numbers of candidates per request.",
)
@click.option(
    "--requests",
    callback=_parse_requests,
    metavar="R,R...",
    help="Score so many requests besides, of each number of candidates: in one call by models of --interface batch and "
    "padded, one after the other by others.",
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
@click.option(
    "--length",
    multiple=True,
    callback=_parse_extents,
    metavar="NAME=VALUE",
    help="A symbolic extent of the inputs other than the candidates, such as a history's. Repeatable.  [default: 64]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=120.0,
    show_default=True,
    metavar="S",
    help="Seconds that one step of a model may take.",
)
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory in a process of its own.")
@report_option(PROFILE)
@click.option("--trace", metavar="FILE", help="Write a trace for chrome://tracing or ui.perfetto.dev, as JSON.")
@with_options(OUTPUT_OPTIONS)
@click.pass_context
def profile(
    ctx: click.Context,
    model: str,
    other: str | None,
    request: tuple[str, ...],
    roles: str | None,
    infer_roles: str | None,
    candidates: list[int],
    requests: list[int],
    ep: str,
    threads: int,
    seconds: float,
    io_binding: bool | None,
    cuda_graph: bool,
    length: dict[str, int],
    timeout: float,
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
    begin(ctx, quiet, verbose)
    given = given_roles(ctx, request, roles, infer_roles)

    import json

    from onnxrank.profiling.engine import profile as run

    taken = [m for m in (model, other) if m is not None]
    PROFILE.check(report, taken)
    if trace is not None:
        check_file(trace, taken, f"--trace {trace}")
    traced: dict[str, Any] | None = None if trace is None else {}
    with show_progress(quiet, verbose) as progress:
        found = run(
            model,
            other,
            **given,
            candidates=candidates,
            requests=requests,
            provider=ep,
            threads=threads,
            seconds=seconds,
            io_binding=io_binding,
            cuda_graph=cuda_graph,
            memory=not no_memory,
            lengths=length,
            timeout=timeout,
            trace=traced,
            progress=progress,
        )

    if trace is not None:
        put(trace, json.dumps(traced) + "\n")
    show_report(PROFILE, found, Style(verbose=verbose), quiet, report)
