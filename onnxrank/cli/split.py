"""`onnxrank split`."""

from __future__ import annotations

import re

import click

from onnxrank.cli.options import (
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
from onnxrank.formats import SPLIT, Style

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Reads `4096` or `64k`."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]{1,15})([kmg]?)b?", value.strip().lower())
    if match is None or int(match[1]) < 1:
        raise click.BadParameter(f"{value!r} is no number of bytes such as 4096 or 64k.", ctx, param)
    return int(match[1]) * _UNITS[match[2]]


@click.command(short_help="Make two models: one for the request, one for the candidates.")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", required=False)
@click.option(
    "--format",
    "form",
    type=click.Choice(["plain", "python", "triton"]),
    default="plain",
    show_default=True,
    help="plain: both models and contract.json. python: and ranker.py, which serves them with a cache. triton: a model "
    "repository, in which an ensemble joins them.",
)
@click.option(
    "--state",
    type=click.Choice(["named", "packed"]),
    default="named",
    show_default=True,
    help="named: a tensor each. packed: one vector of floats, for a feature store.",
)
@click.option(
    "--state-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="float16 rounds the floats of the state; the check then allows for that.",
)
@click.option(
    "--max-state",
    callback=_bytes,
    metavar="BYTES",
    help="Most bytes of the state at the longest lengths served, such as 64k: where to cut depends on it.",
)
@click.option("--name", metavar="NAME", help="What the models of a repository are called.  [default: as IN's file]")
@click.option(
    "--rows",
    type=click.Choice(["lengths", "offsets", "index", "triton"]),
    help="Have the candidate model take several requests per call, told apart as by optimize --interface batch. With "
    "--format triton: triton, and the server joins requests. [default: one request per call]",
)
@click.option(
    "--no-guard",
    is_flag=True,
    help="Do not give the candidate model the version of the state, which turns scores into NaN where it is another.",
)
@PACK_OPTION
@with_options(ROLE_OPTIONS, RULE_OPTIONS)
@report_option(SPLIT)
@click.option("--dry-run", is_flag=True, help="Write no models (reports are written); OUT may be left out.")
@with_options(CHECK_OPTIONS)
@click.option(
    "--tune",
    type=click.FloatRange(0, 3600),
    default=0.0,
    show_default="0, not at all",
    metavar="SECONDS",
    help="Time original and rewritten model in turns before the cut, as optimize does.",
)
@click.option(
    "--plan", metavar="FILE", help="Rewrite as FILE says, which optimize --plan-out wrote, before the model is cut."
)
@with_options(OUTPUT_OPTIONS)
@click.pass_context
def split(
    ctx: click.Context,
    source: str,
    out: str | None,
    form: str,
    state: str,
    state_dtype: str,
    max_state: int | None,
    name: str | None,
    rows: str | None,
    no_guard: bool,
    pack_inputs: bool,
    request: tuple[str, ...],
    roles: str | None,
    infer_roles: str | None,
    candidates: int | tuple[int, int],
    select: list[str] | None,
    ignore: list[str] | None,
    rules: tuple[str, ...],
    report: tuple[str, ...],
    dry_run: bool,
    check: str,
    lengths: dict[str, tuple[int, int]],
    no_check: bool,
    strict: bool,
    tune: float,
    plan: str | None,
    quiet: bool,
    verbose: bool,
) -> None:
    """Make two models: one for the request, one for the candidates.

    Rewrites the ranking model IN as optimize does, and cuts it where the least has to be handed over. The request model
    runs once per request and gives the state; the candidate model takes that and the candidates. Both, with their
    contract, are written to the folder OUT, which may hold an earlier result. Both together are compared with the
    original, and if anything fails nothing is written.
    """
    begin(ctx, quiet, verbose)
    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT' (only --dry-run does without).", ctx)

    from onnxrank.splitting import Options
    from onnxrank.splitting import split as run

    SPLIT.check(report, [source])
    style = Style(verbose=verbose)
    options = Options(form, state, state_dtype, max_state, not no_guard, name, rows, pack_inputs)
    given = given_roles(ctx, request, roles, infer_roles)
    with show_progress(quiet, verbose) as progress:
        made = run(
            source,
            None if dry_run else out,
            options=options,
            **given,
            candidates=candidates,
            select=select,
            ignore=ignore or (),
            extra_rules=rules,
            check=False if no_check else check,
            lengths=lengths,
            strict=strict,
            tune=tune,
            plan=plan,
            progress=progress,
        )
    show_report(SPLIT, made.report, style, quiet, report)
