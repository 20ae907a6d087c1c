"""`onnxrank rules`."""

from __future__ import annotations

import sys

import click

from onnxrank.errors import UsageError


@click.command("rules", short_help="List the rules, or explain one.")
@click.argument("name", metavar="[RULE]", required=False)
def list_rules(name: str | None) -> None:
    """List the rules, or explain RULE."""
    from onnxrank.ruleset import choose_rules

    known = {rule.name: rule for rule in choose_rules(None, (), ())}
    if name is None:
        width = max(map(len, known))
        for rule in known.values():
            click.echo(f"{rule.name:<{width}}  {rule.title}")
    elif name in known:
        from onnxrank.rulebook import explain
        from onnxrank.writers import printable

        click.echo(printable(explain(known[name]), sys.stdout.encoding or "utf-8", keep="\n"))
    else:
        import difflib

        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"There is no rule {name!r}.{hint} The rules are {', '.join(known)}.")
