"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import click

from onnxrank.formats import Kind, either

MOST_CANDIDATES = 1_000_000
"""Candidates at most that `verify` runs."""
CHECKS = ("quick", "standard", "full")
"""How thoroughly models are compared."""


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


def parse_numbers(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    """Reads `1,32,512`."""
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", value) or 0 in map(int, value.split(",")):
        raise click.BadParameter(f"{value!r} is not a comma list of numbers of at least 1.", ctx, param)
    return sorted({int(n) for n in value.split(",")})


def parse_counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Reads `0,1,2,17,512`."""
    if value is None:
        return None
    parts = [p.strip() for p in value.split(",")]
    if not all(re.fullmatch(r"[0-9]+", p) for p in parts):
        raise click.BadParameter(f"{value!r} is no list of numbers such as 0,1,2,17,512.", ctx, param)
    most = max(parts, key=lambda p: (len(p.lstrip("0")), p.lstrip("0")))
    if len(most.lstrip("0")) > len(str(MOST_CANDIDATES)) or int(most) > MOST_CANDIDATES:
        raise click.BadParameter(f"{most} candidates are more than the {MOST_CANDIDATES:,} that are run.", ctx, param)
    return tuple(int(p) for p in parts)


def parse_providers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    """Reads `cpu,cuda`."""
    names = tuple(dict.fromkeys(p.strip().lower() for p in value.split(",")))
    if not set(names) <= {"cpu", "cuda"}:
        raise click.BadParameter(f"{value!r} is not cpu, cuda or both with a comma.", ctx, param)
    return names


def parse_limits(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str | None, float]:
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


def parse_lengths(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Reads `hist=1..1000` or `hist=50`; a length's name may hold equals signs itself."""
    found: dict[str, tuple[int, int]] = {}
    for text in value:
        name, _, span = text.rpartition("=")
        match = re.fullmatch(r"([0-9]{1,9})(?:\.\.([0-9]{1,9}))?", span.strip())
        if match is None or not name.strip():
            raise click.BadParameter(f"{text!r} is not NAME=LOW..HIGH, such as hist=1..1000.", ctx, param)
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise click.BadParameter(f"{text!r} goes down.", ctx, param)
        found[name.strip()] = (low, high)
    return found


LENGTH_OPTION = click.option(
    "--length",
    "lengths",
    multiple=True,
    callback=parse_lengths,
    metavar="NAME=LOW..HIGH",
    help="Range of a symbolic length that is served: its name in the input's shape, or INPUT.AXIS.  [default: 1..1024] "
    "Repeatable.",
)
ROLE_OPTIONS = (
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
INTERFACE_OPTION = click.option(
    "--interface",
    type=click.Choice(["request", "same"]),
    default="request",
    show_default=True,
    help="request: request-level inputs take one row. same: the signature does not change.",
)
BATCH_OPTIONS = (
    click.option(
        "--interface",
        type=click.Choice(["request", "same", "batch", "padded"]),
        default="request",
        show_default=True,
        help="request: request-level inputs take one row. same: the signature does not change. batch: several requests "
        "per call, the candidates of one behind those of another. padded: likewise, [R, M, ...].",
    ),
    click.option(
        "--rows",
        type=click.Choice(["lengths", "offsets", "index", "triton"]),
        default="lengths",
        show_default=True,
        help="With --interface batch: what tells which candidates are whose. lengths [R], offsets [R + 1], index [sum "
        "of N], or the item shapes that Triton gives [R, rank], candidate-level inputs flat.",
    ),
    click.option(
        "--rows-name",
        metavar="NAME",
        help="What that input is called.  [default: request_lengths, request_offsets, request_index, request_shapes]",
    ),
    click.option(
        "--requests",
        type=click.IntRange(1, 4096),
        default=8,
        show_default=True,
        metavar="R",
        help="With --interface batch or padded: expected number of requests per call, which costs depend on.",
    ),
    click.option(
        "--no-turns",
        is_flag=True,
        help="With --interface batch or padded: no loop over requests for nodes that do not gain from several at once "
        "on a CPU. For models that run on a GPU.",
    ),
)
PACK_OPTION = click.option(
    "--pack-inputs",
    is_flag=True,
    help="Take ids and floats side by side: request.ids, request.values, candidate.ids and candidate.values in place "
    "of an input per feature. The contract says which columns are whose.",
)
RULE_OPTIONS = (
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
REWRITE_OPTIONS = (INTERFACE_OPTION, *RULE_OPTIONS)
CHECK_OPTIONS = (
    click.option(
        "--check",
        type=click.Choice(CHECKS),
        default="standard",
        show_default=True,
        help="How thoroughly the result is compared with the original; the report lists at what it was.",
    ),
    LENGTH_OPTION,
    click.option("--no-check", is_flag=True, help="Do not compare the result with the original."),
    click.option(
        "--strict", is_flag=True, help="Exit with 1 if the result fails its check, instead of taking back what fails."
    ),
)
ENGINE_OPTION = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Where recorded requests are gone over: by processes here, or by tasks on a Ray cluster, that of RAY_ADDRESS.",
)
OUTPUT_OPTIONS = (
    click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    click.option("-v", "--verbose", is_flag=True, help="Print more, every step, and tracebacks of internal errors."),
)


def with_options(*groups: Sequence[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds options that several commands have, in order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return add


def report_option(kind: Kind) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Where reports go, for a command that makes this kind."""
    alone = "".join(f" {f.name} alone prints to stdout." for f in kind.formats if f.alone)
    return click.option(
        "--report",
        multiple=True,
        metavar="[FORMAT:]FILE",
        help=f"Write the report as {either(kind.names)}; the file's ending tells which if FORMAT is left out; - is "
        f"stdout.{alone} Repeatable.",
    )


def given_roles(
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


def _read_npz(path: str) -> dict[str, Any]:
    from pathlib import Path

    from onnxrank.verify.recorded import read_archive

    return read_archive(Path(path))


def begin(ctx: click.Context, quiet: bool, verbose: bool) -> None:
    """What every command does first."""
    ctx.find_root().obj = {"verbose": verbose}
    if quiet and verbose:
        raise click.UsageError("-q and -v exclude each other.", ctx)
