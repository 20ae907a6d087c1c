"""What `onnxrank rules RULE` says of each rule: its own attributes, and for onnxrank's rules cost and example.

A rule that sets `cost` and `example` itself needs no entry here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from onnxrank.rewrite import Rule

_EXACTNESS = {"exact": "results are bit-identical", "reassociates": "the order of additions changes"}
_LABEL = 11


@dataclass(frozen=True)
class Page:
    """What a rule's page says beyond the rule's attributes.

    Attributes:
        cost: What it saves, and what it adds.
        before: An example, as it was; a node per line.
        after: The same, rewritten.
    """

    cost: str
    before: str
    after: str


PAGES: Mapping[str, Page] = {
    "movement": Page(
        "Nothing at run time: positions are followed while rewriting. Where a reader needs the moved entries as they "
        "are, one Gather or Concat of them is written.",
        "c = Concat(user, item)\ns = Slice(c, columns 2:6)\ny = MatMul(s, W)",
        "y = MatMul(item, W')         # W' takes the rows that the slice would read",
    ),
    "norm": Page(
        "BatchNorm adds nothing. LayerNorm sums the request-level part up once and adds a few operators on one column "
        "per row.",
        "c = Concat(user, item)\nn = LayerNormalization(c)\ny = Gemm(n, W, b)",
        "p, q = sums and squares of user          # once\nr, s = sums and squares of item\n"
        "y = (item G_x + user G_u + ...) / sigma(p + r, q + s) + beta W",
    ),
    "cross": Page(
        "The affine map of the request-level side is made once per request, which costs as much as some tens of "
        "candidates of the original. Per candidate only the candidate side is left. Fewer candidates: it is not taken.",
        "x0 = Concat(user, item)\na = Gemm(x0, W, b)\nx1 = x0 * a + x0\ny = MatMul(x1, V)",
        "V_u = diag(user) W_xu V                  # once\ny = item V_u + x1_item V_x + (user part)",
    ),
    "fc": Page(
        "The request-level inputs times the outputs are multiplied once instead of N times. One more product is "
        "launched, with a single row.",
        "c = Concat(user, item)                   # [N, 96], [N, 32]\ny = Gemm(c, W, b)",
        "u = Gemm(user, W_user, b)                # once\ny = Gemm(item, W_item, u)",
    ),
    "dot": Page(
        "Products among request-level features are made once, and those of request-level with candidate-level features "
        "become one product with a row per candidate. Up to three products are launched in place of one.",
        "f = Concat(user_fields, item_fields)     # [N, 18 + 8, 64]\nz = MatMul(f, Transpose(f))",
        "uu = MatMul(U, Transpose(U))             # once\nuc = MatMul(C, Transpose(U))             # N * 8 rows\n"
        "cc = MatMul(C, Transpose(C))",
    ),
    "fold": Page(
        "The weights of the reading layer are made anew for every request. Per candidate the layer's inner size falls "
        "from the number of products to that of the candidate's entries. It pays from some tens of candidates on.",
        "p = Mul(user_pairs, item_pairs)          # [N, 144 * 16]\ny = Gemm(Reshape(p), W, b)",
        "M = ReduceSum(user * W)                  # once\ny = Gemm(item, M, b)                     # [N, 8 * 16]",
    ),
    "pool": Page(
        "The request-level part is reduced once; one addition, maximum or minimum per row is added.",
        "c = Concat(user_fields, item_fields)     # [N, 36, 32]\ns = ReduceSum(c, axis 1)",
        "u = ReduceSum(user_fields, axis 1)       # once\ns = Add(ReduceSum(item_fields, axis 1), u)",
    ),
    "gru": Page(
        "All of the layer but one row. Nothing is added.",
        "h = Expand(history, N)\nstate = GRU(h, W, R)",
        "state = GRU(history, W, R)               # once",
    ),
    "select": Page(
        "What is not read is not computed. Nothing is added.",
        "y = Gemm(x, W, b)                        # [N * 50, 64]\nlast = Slice(y, position 49)",
        "last = Gemm(x at position 49, W, b)      # [N, 64]",
    ),
    "broadcast": Page(
        "Everything that depends on the request only goes from N rows to one. Where a reader needs all rows, one "
        "Expand is written.",
        "u = Expand(user, N)\ne = Gather(table, u)\nh = Relu(Gemm(e, W, b))",
        "e = Gather(table, user)                  # once\nh = Relu(Gemm(e, W, b))                  # once",
    ),
}


def page_of(rule: Rule) -> Page:
    """The page of a rule; what is not known is empty."""
    own = PAGES.get(rule.name, Page("", "", ""))
    before, after = rule.example if rule.example != ("", "") else (own.before, own.after)
    return Page(rule.cost or own.cost, before, after)


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
    ):
        if text:
            lines += textwrap.wrap(text, 80, initial_indent=f"{label:<{_LABEL}}", subsequent_indent=" " * _LABEL)
    for label, example in (("before", page.before), ("after", page.after)):
        if example:
            lines += ["", label, *(f"  {line}" for line in example.splitlines())]
    return "\n".join(lines)
