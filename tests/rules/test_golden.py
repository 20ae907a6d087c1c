"""Small models before and after each rule, as text: the examples of `onnxrank rules`, and tests/golden.

`pytest tests/rules/test_golden.py --update-goldens` writes what is made now; read the difference before you commit it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import textform
from modelkit import compare
from onnxrank.rules import RULES

from onnxrank.rule import Rule
from onnxrank.rulebook import page_of

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "onnxrank" / "assets" / "examples"
FILES = sorted([*EXAMPLES.glob("*.txt"), *(ROOT / "tests" / "golden").glob("*.txt")])
SIZES = (1, 3, 101)
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}-{p.stem}")


def test_every_rule_has_both() -> None:
    for folder in {p.parent for p in FILES}:
        assert {p.stem for p in FILES if p.parent == folder} == {r.name for r in RULES}


@every_file
def test_golden(path: Path, request: pytest.FixtureRequest) -> None:
    """The text is what is made now, it parses again, the rule did it, and scores are equal."""
    found, used = [], set()
    for case in textform.read(path):
        made, model, result = textform.regenerated(case)
        again = textform.parse(made.after)
        assert textform.text_of(again, textform.names_of(again), once=True) == made.after
        compare(model, result, sizes=SIZES)
        used |= {rule.name for rule in result.report.rules}
        found.append(made)
    assert path.stem in used | {"movement"}
    if request.config.getoption("--update-goldens"):
        textform.write(path, found)
    assert path.read_text(encoding="utf-8") == "\n".join(map(str, found))
    assert all(len(line) <= 78 for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_pages_show_the_examples(rule: Rule) -> None:
    page = page_of(rule)
    (case,) = textform.read(EXAMPLES / f"{rule.name}.txt")
    assert (page.title, page.before, page.after) == (case.title, case.before, case.after)
