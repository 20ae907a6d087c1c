"""`onnxrank verify`."""

from __future__ import annotations

import os

import click

from onnxrank.cli.options import (
    CHECKS,
    ENGINE_OPTION,
    LENGTH_OPTION,
    OUTPUT_OPTIONS,
    begin,
    parse_counts,
    parse_limits,
    parse_numbers,
    parse_providers,
    report_option,
    with_options,
)
from onnxrank.cli.output import show_progress, show_report
from onnxrank.errors import CheckFailed, UsageError
from onnxrank.formats import VERIFY, Style


@click.command(short_help="Tell whether two models give the same scores.")
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
@click.option("--ep", callback=parse_providers, default="cpu", show_default=True, help="Execution providers: cpu,cuda.")
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
    callback=parse_counts,
    metavar="N,N,…",
    help="Numbers of candidates.  [default: 0,1,2,17,512, and what the models were made for; full: 4096; quick: no "
    "512]",
)
@click.option(
    "--seeds", type=click.IntRange(1, 1000), metavar="N", help="Different users for each.  [default: 3; quick: 2]"
)
@click.option(
    "--requests",
    callback=parse_numbers,
    default="1,2,5,32",
    show_default=True,
    metavar="R,R,…",
    help="Numbers of requests per call, for a model that takes several.",
)
@click.option(
    "--rtol",
    multiple=True,
    callback=parse_limits,
    metavar="[OUTPUT:]VALUE",
    help="A limit beside the one by rounding. Repeatable.",
)
@click.option(
    "--atol", multiple=True, callback=parse_limits, metavar="[OUTPUT:]VALUE", help="Likewise, absolute. Repeatable."
)
@click.option(
    "--top-k", type=click.IntRange(1, 100_000), default=10, show_default=True, help="Best candidates compared."
)
@click.option(
    "--level",
    type=click.Choice(CHECKS),
    default="full",
    show_default=True,
    help="standard leaves out odd inputs and runs large N once; quick leaves out large N.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0),
    metavar="S",
    help="Seconds for further numbers of candidates, lengths and rows of changed tables; the report lists what was not "
    "reached.  [default: 120; standard: 20; quick: 5]",
)
@LENGTH_OPTION
@report_option(VERIFY)
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
@ENGINE_OPTION
@with_options(OUTPUT_OPTIONS)
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
    requests: list[int],
    rtol: dict[str | None, float],
    atol: dict[str | None, float],
    top_k: int,
    level: str,
    budget: float | None,
    lengths: dict[str, tuple[int, int]],
    report: tuple[str, ...],
    save_failing: str | None,
    bisect: bool,
    rules: tuple[str, ...],
    timeout: float,
    memory: float | None,
    jobs: int | None,
    engine: str,
    quiet: bool,
    verbose: bool,
) -> None:
    """Tell whether two models give the same scores.

    Compares OPTIMIZED with ORIGINAL, which is right by definition: the algebra in float64, the rounding in the models'
    own types on every provider and optimisation level, and the order of candidates. Each model runs in a process of its
    own.
    """
    begin(ctx, quiet, verbose)
    if labels is not None and data is None:
        raise click.UsageError("--labels needs recorded requests: --data FILE|DIR.", ctx)

    from onnxrank.roles import load_spec
    from onnxrank.verify import Options, failure
    from onnxrank.verify import verify as run

    VERIFY.check(report, [original, optimized])
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
        requests=requests,
        rtol=rtol,
        atol=atol,
        top_k=top_k,
        level=level,
        budget=budget,
        lengths=lengths,
        bisect=bisect,
        save_failing=save_failing,
        rules=rules,
        timeout=timeout,
        memory=None if memory is None else int(memory * (1 << 30)),
        jobs=jobs,
        engine=engine,
        tf32=not no_tf32,
    )
    with show_progress(quiet, verbose) as progress:
        found = run(original, optimized, options, progress)
    show_report(VERIFY, found, Style(verbose=verbose), quiet, report)
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
