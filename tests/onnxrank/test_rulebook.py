"""Pages of the rules: complete, readable at 80 columns, and in step with the README."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from onnxrank.rules import RULES

from onnxrank import cli
from onnxrank.rule import Rule
from onnxrank.rulebook import COSTS, explain, page_of

README = Path(__file__).resolve().parents[2] / "README.md"
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@every_rule
def test_every_rule_has_a_page(rule: Rule) -> None:
    page = page_of(rule)
    assert page.cost and page.before and page.after, f"set cost and example on rule {rule.name}"
    told = explain(rule)
    for label in ("identity", "source", "applies", "refuses", "cost", "exactness", "operators", "before", "after"):
        assert re.search(rf"^{label}\b", told, re.MULTILINE), label
    assert all(len(line) <= 80 for line in told.splitlines())


def test_no_page_without_a_rule() -> None:
    assert set(COSTS) <= {r.name for r in RULES}


def test_a_rule_speaks_for_itself() -> None:
    rule = replace(RULES[0], cost="Half of everything.", example=("a", "b"))
    assert "Half of everything." in explain(rule) and page_of(rule).before == "a"
    bare = Rule("mine", "Does it.", "a = a", "me", "Always.", "Never.", "exact", {})
    assert "cost" not in explain(bare) and "before" not in explain(bare)


def test_readme_names_the_rules() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(listed) == {r.name for r in RULES} - {"movement"}


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["rules", "cross"]) == 0
    out = capsys.readouterr().out
    assert "x1 = Add(p, x0)" in out and "# once" in out
