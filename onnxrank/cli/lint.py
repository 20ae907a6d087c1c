"""`onnxrank lint`."""

from __future__ import annotations

import os

import click

from onnxrank.cli.options import OUTPUT_OPTIONS, begin, with_options
from onnxrank.errors import CheckFailed


@click.command(short_help="Hold a Triton repository's configurations against its models.")
@click.argument("repository", metavar="REPOSITORY")
@with_options(OUTPUT_OPTIONS)
@click.pass_context
def lint(ctx: click.Context, repository: str, quiet: bool, verbose: bool) -> None:
    """Hold a Triton repository's configurations against its models.

    Reads every config.pbtxt in the folder REPOSITORY and the ONNX files beside them, runs nothing, and prints what
    Triton would refuse, or serve otherwise than meant, as FILE:LINE: MESSAGE.
    """
    begin(ctx, quiet, verbose)

    from onnxrank.splitting.lint import lint as run
    from onnxrank.writers import printable

    found = run(repository)
    for f in found:
        click.echo(printable(f"{os.path.join(repository, f.file)}:{f.line}: {f.message}", "utf-8"))
    if found:
        raise CheckFailed(f"{len(found)} finding{'' if len(found) == 1 else 's'} in {repository}.")
    if not quiet:
        click.echo(f"{repository}: configurations and models agree.")
