"""`onnxrank optimize`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import click

from onnxrank.cli.options import (
    BATCH_OPTIONS,
    CHECK_OPTIONS,
    OUTPUT_OPTIONS,
    PACK_OPTION,
    ROLE_OPTIONS,
    RULE_OPTIONS,
    begin,
    given_roles,
    report_option,
    with_options,
)
from onnxrank.cli.output import show_progress, show_report
from onnxrank.errors import CheckFailed, NothingApplied
from onnxrank.formats import OPTIMIZE, Style, check_file, put

if TYPE_CHECKING:
    from onnxrank.pipeline import Result


@click.command(short_help="Compute once per request what does not depend on the candidate.")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", required=False)
@with_options(ROLE_OPTIONS, BATCH_OPTIONS, RULE_OPTIONS)
@click.option(
    "--no-guard",
    is_flag=True,
    help="With --interface same: do not turn scores into NaN where request-level rows differ; with batch and padded: "
    "where what tells requests apart does not add up.",
)
@PACK_OPTION
@report_option(OPTIMIZE)
@click.option("--explain", is_flag=True, help="Name every node that was left alone, with the reason.")
@click.option("--dry-run", is_flag=True, help="Write no model (reports are written); OUT may be left out.")
@with_options(CHECK_OPTIONS)
@click.option(
    "--tune",
    type=click.FloatRange(0, 3600),
    default=2.0,
    show_default=True,
    envvar="ONNXRANK_TUNE",
    metavar="SECONDS",
    help="Time original and result in turns, for about so long, and take back what is not faster; 0 for not at all. "
    "What was measured may decide the bytes: --plan-out keeps it. Also from the variable ONNXRANK_TUNE.",
)
@click.option(
    "--slowdown",
    type=click.FloatRange(0, 1000),
    default=1.75,
    show_default=True,
    metavar="PERCENT",
    help="With --tune: by how much the result may be slower than the original at a number of candidates that is timed "
    "(those of --candidates LOW..HIGH), if it is faster at another.",
)
@click.option(
    "--blocks",
    type=click.IntRange(0),
    metavar="ROWS",
    help="Score candidates in blocks of at most so many, so that their rows stay in the cache; 0 for never.  [default: "
    "with --tune, where a thousand candidates or more are expected and it is faster; for a GPU use 0]",
)
@click.option("--plan-out", metavar="FILE", help="Write every decision as JSON, for --plan.")
@click.option(
    "--plan",
    metavar="FILE",
    help="Decide nothing: do what FILE says, which has roles and options too. Gives the same bytes on any machine.",
)
@click.option("--require-change", is_flag=True, help="Exit with 5 and write no model if nothing applied.")
@with_options(OUTPUT_OPTIONS)
@click.pass_context
def optimize(
    ctx: click.Context,
    source: str,
    out: str | None,
    request: tuple[str, ...],
    roles: str | None,
    infer_roles: str | None,
    interface: str,
    rows: str,
    rows_name: str | None,
    requests: int,
    no_turns: bool,
    no_guard: bool,
    pack_inputs: bool,
    candidates: int | tuple[int, int],
    select: list[str] | None,
    ignore: list[str] | None,
    rules: tuple[str, ...],
    report: tuple[str, ...],
    explain: bool,
    dry_run: bool,
    check: str,
    lengths: dict[str, tuple[int, int]],
    no_check: bool,
    strict: bool,
    tune: float,
    slowdown: float,
    blocks: int | None,
    plan_out: str | None,
    plan: str | None,
    require_change: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Compute once per request what does not depend on the candidate.

    Reads the ranking model IN, rewrites it, compares the result with the original and writes it to OUT, which may be IN
    itself. What fails the comparison is taken back, and the rest is kept. If nothing applies, OUT gets IN's own bytes.
    If anything fails, no file is written.
    """
    begin(ctx, quiet, verbose)
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT' (only --dry-run does without).", ctx)

    from onnxrank.model import check_output

    taken = [source, *([out] if out is not None else [])]
    OPTIMIZE.check(report, taken)
    if plan_out is not None:
        check_file(plan_out, taken, "--plan-out")
    style = Style(explain=explain, verbose=verbose)
    if out is not None and not dry_run:
        check_output(out)
    given = given_roles(ctx, request, roles, infer_roles)
    run = _entry(ctx, interface, rows, rows_name, requests, not no_guard, not no_turns, pack_inputs)
    if plan is not None and ctx.get_parameter_source("tune") is not click.core.ParameterSource.COMMANDLINE:
        tune = 0.0  # a plan decides all that timing would
    with show_progress(quiet, verbose) as progress:
        try:
            result = run(
                source,
                **given,
                candidates=candidates,
                select=select,
                ignore=ignore or (),
                extra_rules=rules,
                check=False if no_check else check,
                lengths=lengths,
                strict=strict,
                tune=tune,
                slowdown=slowdown / 100,
                blocks=blocks,
                plan=plan,
                progress=progress,
            )
        except CheckFailed as e:
            if e.report is not None:
                OPTIMIZE.write(e.report, report, style)
            raise
        refused = require_change and not result.changed
        if out is not None and not dry_run and not refused:
            result.save(out)
        if plan_out is not None:
            put(plan_out, result.plan.to_json())
    show_report(OPTIMIZE, result.report, style, quiet, report)
    if refused:
        raise NothingApplied("No rule applied, and --require-change asks for one. No model was written.")


def _entry(
    ctx: click.Context,
    interface: str,
    rows: str,
    name: str | None,
    requests: int,
    guard: bool,
    turns: bool,
    pack: bool,
) -> Callable[..., Result]:
    """What makes a model with this interface."""
    if interface in ("batch", "padded"):
        from onnxrank.batching.engine import Options, batch

        return partial(batch, options=Options(interface, rows, name, requests, guard, turns, pack))
    for option in ("rows", "rows_name", "requests", "no_turns"):
        if ctx.get_parameter_source(option) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{option.replace('_', '-')} is for --interface batch and padded.", ctx)
    from onnxrank import optimize, pack_inputs

    return partial(pack_inputs if pack else optimize, interface=interface, guard=guard)
