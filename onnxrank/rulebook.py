"""What `onnxrank rules RULE` says of each rule: its own attributes, and for onnxrank's rules cost and example.

A rule that sets `cost` and `example` itself needs nothing here.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from onnxrank.pages import asset
from onnxrank.rule import Rule

_EXACTNESS = {"exact": "results are bit-identical", "reassociates": "the order of additions changes"}
_LABEL = 11


@dataclass(frozen=True)
class Page:
    """What a rule's page says beyond the rule's attributes.

    Attributes:
        cost: What it saves, and what it adds.
        title: What the example is.
        before: The example as it was, in onnx's text form.
        after: The same, rewritten.
    """

    cost: str
    title: str
    before: str
    after: str


COSTS: Mapping[str, str] = {
    "pack": "Nothing at run time: layers become as small as what is left. Weights that weight decay has left at "
    "denormal numbers cost many times what others do.",
    "lookup": "Per id some steps on whole numbers, which tell ids outside their tables; a launch per table is saved.",
    "movement": "Nothing at run time: positions are followed while rewriting. Where a reader needs the moved entries "
    "as they are, one Gather or Concat of them is written.",
    "norm": "BatchNorm adds nothing. LayerNorm sums the request-level part up once and adds a few operators on one "
    "column per row.",
    "cross": "The affine map of the request-level side is made once per request, which costs as much as some tens of "
    "candidates of the original. Per candidate only the candidate side is left. For fewer candidates it is not taken.",
    "fc": "The request-level inputs times the outputs are multiplied once instead of N times. One more product is "
    "launched, with a single row.",
    "dot": "Products among request-level features are made once, and those of request-level with candidate-level "
    "features become one product with a row per candidate. Up to three products are launched in place of one.",
    "fold": "The weights of the reading layer are made anew for every request. Per candidate the layer's inner size "
    "falls from the number of products to that of the candidate's entries. It pays from some tens of "
    "candidates on.",
    "pool": "The request-level part is reduced once; one addition, maximum or minimum per row is added.",
    "gru": "All of the layer but one row. Nothing is added.",
    "select": "What is not read is not computed. Nothing is added.",
    "broadcast": "Everything that depends on the request only goes from N rows to one. Where a reader needs all "
    "rows, one Expand is written.",
}
"""What rules cost that do not say so themselves."""


def page_of(rule: Rule) -> Page:
    """The page of a rule; what is not known is empty.

    The examples of onnxrank's own rules lie in `assets/examples`, where a test regenerates them.
    """
    title, (before, after) = "", rule.example
    if rule.example == ("", ""):
        with contextlib.suppress(FileNotFoundError):  # a rule that somebody else wrote
            title, _, rest = asset(f"examples/{rule.name}.txt").removeprefix("# ").partition("\n")
            before, _, after = (part.strip() for part in rest.partition("-->"))
    return Page(rule.cost or COSTS.get(rule.name, ""), title, before, after)


def explain(rule: Rule) -> str:
    """A rule explained on 80 columns."""
    page = page_of(rule)
    lines = [*textwrap.wrap(f"{rule.name}: {rule.title}", 80), ""]
    for label, text in (
        ("identity", rule.identity),
        ("source", rule.source),
        ("applies", rule.legal),
        ("refuses", rule.refuses),
        ("cost", page.cost),
        ("exactness", f"{rule.exactness} ({_EXACTNESS.get(rule.exactness, 'see source')})"),
        ("operators", ", ".join(sorted(rule.operators)) or "none of its own"),
        ("example", page.title),
    ):
        if text:
            lines += textwrap.wrap(text, 80, initial_indent=f"{label:<{_LABEL}}", subsequent_indent=" " * _LABEL)
    for label, example in (("before", page.before), ("after", page.after)):
        if example:
            lines += ["", label, *(f"  {line}" for line in example.splitlines())]
    return "\n".join(lines)
