"""`onnxrank compress`."""

from __future__ import annotations

import re

import click

from onnxrank.cli.options import (
    ENGINE_OPTION,
    OUTPUT_OPTIONS,
    ROLE_OPTIONS,
    begin,
    given_roles,
    report_option,
    with_options,
)
from onnxrank.cli.output import show_progress, show_report
from onnxrank.errors import CheckFailed, NothingApplied
from onnxrank.formats import COMPRESS, Style, check_file, put

_DEFAULT = "fp16-tables,low-rank,units,int8-tables,int8,fp16,pca-tables,pack"


def _times(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Reads `3x`, `1.5x` or `3`."""
    if value is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)[x×]?", value.strip())
    if match is None or float(match[1]) < 1:
        raise click.BadParameter(f"{value!r} is not a ratio of at least 1, such as 3x.", ctx, param)
    return float(match[1])


def _list(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Reads comma lists."""
    return tuple(dict.fromkeys(name for part in value for item in part.split(",") if (name := item.strip())))


@click.command(short_help="Make a model smaller and faster, and show what accuracy that costs.")
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT")
@click.option(
    "--data",
    required=True,
    metavar="FILE|DIR",
    help="Recorded requests, as for verify: .npz, Parquet, or a folder of either. They are divided: one part is what "
    "layers are fitted to, the other what the gate judges by.",
)
@click.option(
    "--labels",
    multiple=True,
    callback=_list,
    metavar="NAMES",
    help="Keys or columns of labels, 0 or 1: one for the first output, or one per output. Without them scores are held "
    "against the original's only.",
)
@click.option(
    "--request-id",
    default="request_id",
    show_default=True,
    metavar="NAME",
    help="Key or column of the request's identity.",
)
@with_options(ROLE_OPTIONS)
@click.option("--size", callback=_times, metavar="RATIO", help="Stop when the model is so many times smaller: 3x.")
@click.option("--latency", callback=_times, metavar="RATIO", help="Stop when it is so many times faster: 1.5x.")
@click.option(
    "--max-loss",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.0005,
    show_default=True,
    help="What the AUC may fall by and the log loss may rise by, at the unfavourable end of their 95 % intervals.",
)
@click.option(
    "--min-overlap",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Share of each request's ten best candidates that must stay, in the mean.",
)
@click.option(
    "--methods",
    multiple=True,
    callback=_list,
    metavar="NAMES",
    help=f"Methods to use, a comma list.  [default: {_DEFAULT}]",
)
@click.option(
    "--sites", multiple=True, metavar="GLOB", help="Only layers and tables whose names match, such as '*top*'. "
    "Repeatable.",
)  # fmt: skip
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.5,
    show_default=True,
    help="Share of the requests that the gate gets.",
)
@click.option("--gate-data", metavar="FILE|DIR", help="Requests for the gate alone, instead of a share of --data.")
@click.option(
    "--candidates",
    type=click.IntRange(1, 1_000_000),
    default=512,
    show_default=True,
    help="Number of candidates that times are measured at.",
)
@click.option("--sequential", is_flag=True, help="Fit layers of low rank to what they see in the compressed model.")
@click.option("--no-refit", is_flag=True, help="Leave the last layers as they are.")
@click.option("--finetune", is_flag=True, help="Train layers of low rank against labels and the original's scores.")
@click.option("--finetune-relu", is_flag=True, help="The same with a ReLU between the two factors of a layer.")
@click.option(
    "--epochs",
    type=click.IntRange(1, 1000),
    default=3,
    show_default=True,
    help="How often --finetune goes over the calibration rows.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the order of rows in training.")
@click.option("--allow-contrib", is_flag=True, help="Allow operators of onnxruntime's own.")
@click.option("--plan", metavar="FILE", help="Do what this plan says instead of searching.")
@click.option("--plan-out", metavar="FILE", help="Write what was decided.")
@click.option("--require-change", is_flag=True, help="Exit with 5 if nothing could be compressed.")
@click.option(
    "--choice-rows",
    type=click.IntRange(1000),
    default=32768,
    show_default=True,
    metavar="N",
    help="Most calibration rows that models are tried on while searching.",
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
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, metavar="N", help="Processes.")
@ENGINE_OPTION
@report_option(COMPRESS)
@with_options(OUTPUT_OPTIONS)
@click.pass_context
def compress(
    ctx: click.Context,
    model: str,
    out: str,
    data: str,
    labels: tuple[str, ...],
    request_id: str,
    request: tuple[str, ...],
    roles: str | None,
    infer_roles: str | None,
    size: float | None,
    latency: float | None,
    max_loss: float,
    min_overlap: float,
    methods: tuple[str, ...],
    sites: tuple[str, ...],
    holdout: float,
    gate_data: str | None,
    candidates: int,
    sequential: bool,
    no_refit: bool,
    finetune: bool,
    finetune_relu: bool,
    epochs: int,
    seed: int,
    allow_contrib: bool,
    plan: str | None,
    plan_out: str | None,
    require_change: bool,
    choice_rows: int,
    timeout: float,
    memory: float | None,
    jobs: int,
    engine: str,
    report: tuple[str, ...],
    quiet: bool,
    verbose: bool,
) -> None:
    """Make a model smaller and faster, and show what accuracy that costs.

    Layers get a lower rank, tables and layers fewer bytes, what does nothing is packed away; what and where is found by
    measuring. OUT is written only if the gate, on requests that nothing was fitted to, lets it pass.
    """
    begin(ctx, quiet, verbose)
    given = given_roles(ctx, request, roles, infer_roles)

    from onnxrank.compress.engine import DEFAULT, Options, failure
    from onnxrank.compress.engine import compress as run
    from onnxrank.compress.gate import Limits
    from onnxrank.compress.plan import Plan, Tuning
    from onnxrank.model import check_output
    from onnxrank.writers import dumps

    check_output(out)
    COMPRESS.check(report, [model, out])
    if plan_out is not None:
        check_file(plan_out, [model, out], f"--plan-out {plan_out}")
    with show_progress(quiet, verbose) as progress:
        options = Options(
            size=size,
            latency=latency,
            limits=Limits(loss=max_loss, overlap=min_overlap),
            methods=methods or DEFAULT,
            sites=sites,
            holdout=holdout,
            gate_data=gate_data,
            labels=labels,
            request_id=request_id,
            candidates=candidates,
            sequential=sequential,
            refit=not no_refit,
            finetune=Tuning(epochs, finetune_relu, seed) if finetune or finetune_relu else None,
            allow_contrib=allow_contrib,
            plan=None if plan is None else Plan.read(plan),
            choice=choice_rows,
            jobs=jobs,
            engine=engine,
            timeout=timeout,
            memory=None if memory is None else int(memory * (1 << 30)),
            progress=progress,
        )
        result = run(model, data, options, **given)
        if result.passed and (result.report.changed or not require_change):
            check_output(out, result.loaded)
            result.save(out)
    found = result.report
    if plan_out is not None and found.plan is not None:
        put(plan_out, dumps(found.plan.to_dict()))
    show_report(COMPRESS, found, Style(verbose=verbose), quiet, report)
    if not result.passed:
        raise CheckFailed(failure(found))
    if require_change and not found.changed:
        raise NothingApplied("Nothing could be compressed within the limits; nothing was written.")
