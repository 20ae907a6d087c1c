"""`onnxrank inspect`."""

from __future__ import annotations

import click

from onnxrank.cli.options import (
    OUTPUT_OPTIONS,
    REWRITE_OPTIONS,
    ROLE_OPTIONS,
    begin,
    given_roles,
    report_option,
    with_options,
)
from onnxrank.cli.output import show_progress, show_report
from onnxrank.formats import INSPECT, Style


@click.command(short_help="See what is in a model and what could be saved.")
@click.argument("model", metavar="MODEL")
@with_options(ROLE_OPTIONS, REWRITE_OPTIONS)
@click.option("--node", metavar="NAME", help="Explain one tensor or node instead: its level, and what makes it so.")
@report_option(INSPECT)
@with_options(OUTPUT_OPTIONS)
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
    begin(ctx, quiet, verbose)
    given = given_roles(ctx, request, roles, infer_roles)

    from onnxrank.inspection.engine import explain
    from onnxrank.inspection.engine import inspect as run

    INSPECT.check(report, [model])
    with show_progress(quiet, verbose) as progress:
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
    if node is not None:
        explain(found, node)  # An unknown name ends it before anything is written.
    show_report(INSPECT, found, Style(verbose=verbose, node=node), quiet, report)
