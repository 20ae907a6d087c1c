"""Reports in every form, against their schemas."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import xmlschema
from mutants import MUTANTS, pair

import onnxrank
from onnxrank.errors import UsageError
from onnxrank.formats import OPTIMIZE, VERIFY, Style
from onnxrank.verify import Finding, Options, Report, verify
from onnxrank.verify.report import Culprit

DATA = Path(__file__).resolve().parents[2] / "data"
NASTY = "a\x00b\x1b[31m\n<&>\"'|`]]>::‮%\udcff☃"


@cache
def passing() -> Report:
    right = pair("two_tower.torchscript")
    return verify(right.original, right.optimized, Options(roles=right.roles, level="quick"))


@cache
def failing() -> Report:
    mutant = next(m for m in MUTANTS if m.what == "NaN masked away").pair()
    return verify(mutant.original, mutant.optimized, Options(roles=mutant.roles, bisect=True))


@cache
def hostile() -> Report:
    """Names that no form takes as they are."""
    found = failing()
    place = next(c.place for c in found.cases if c.place is not None)
    odd = replace(place, output=NASTY, expected=NASTY, found=NASTY, request=NASTY)
    made = Report("0.1.0", f"/tmp/{NASTY}", "0", f"{NASTY}.onnx", "1", "full")
    made.verdicts = dict(found.verdicts)
    made.cases = [replace(c, output=NASTY, place=odd) for c in found.failed_cases[:3]]
    made.statistics = [replace(s, output=NASTY) for s in found.statistics[:1]]
    made.ranking = [replace(r, output=NASTY) for r in found.ranking[:1]]
    made.find("algebra", "difference", NASTY, place=odd, model="optimized", node=NASTY, rule=NASTY)
    made.find("rounding", "crash", NASTY, model="original")
    made.find("data", "contract", NASTY, "warning")
    made.culprit = Culprit(NASTY, NASTY, NASTY, NASTY)
    made.contract = {"source": NASTY, "inputs": []}
    made.environment = {"onnxruntime": NASTY, "providers": ["cpu"], "tf32": "off"}
    return made


every = pytest.mark.parametrize("report", [passing, failing, hostile], ids=["passing", "failing", "hostile"])


def test_states() -> None:
    assert passing().passed and not failing().passed


@every
def test_json(report: Any) -> None:
    schema = json.loads((Path(onnxrank.__file__).parent / "verify.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    text = VERIFY.render(report(), "json")
    jsonschema.validate(json.loads(text, parse_constant=lambda c: pytest.fail(c)), schema)


def test_schema_is_complete() -> None:
    """Every field is described, and none that is not there."""
    schema = json.loads((Path(onnxrank.__file__).parent / "verify.schema.json").read_text())
    made = json.loads(VERIFY.render(failing(), "json"))
    assert set(made) == set(schema["properties"])
    for part, name in (
        ("cases", "case"),
        ("findings", "finding"),
        ("statistics", "statistics"),
        ("ranking", "ranking"),
    ):
        assert set(made[part][0]) == set(schema["$defs"][name]["properties"])


@every
@pytest.mark.parametrize("schema", ["junit-ant.xsd", "junit-jenkins.xsd"])
def test_junit(report: Any, schema: str) -> None:
    text = VERIFY.render(report(), "junit").encode("utf-8", "strict")
    xmlschema.XMLSchema(DATA / schema).validate(ET.ElementTree(ET.fromstring(text)))


def test_junit_has_a_case_for_each() -> None:
    """Per provider, level, N, seed and output; the counts are right."""
    report = failing()
    root = ET.fromstring(VERIFY.render(report, "junit"))
    for suite in root:
        assert int(suite.get("tests", "")) == len(suite.findall("testcase"))
        assert int(suite.get("failures", "")) == len(suite.findall("testcase/failure"))
    rounding = next(s for s in root if s.get("name") == "rounding")
    names = [(c.get("classname"), c.get("name")) for c in rounding.findall("testcase")]
    assert len(names) == len(set(names)) == len([c for c in report.cases if c.verdict == "rounding"])
    assert ("onnxrank.verify.rounding.cpu.all", "score [random, N=17, seed=1]") in names


@every
def test_sarif(report: Any) -> None:
    schema = json.loads((DATA / "sarif-2.1.0-used.schema.json").read_text())
    found = json.loads(VERIFY.render(report(), "sarif"))
    jsonschema.Draft4Validator(schema, format_checker=jsonschema.FormatChecker()).validate(found)
    (run,) = found["runs"]
    rules = [r["id"] for r in run["tool"]["driver"]["rules"]]
    assert all(rules[r["ruleIndex"]] == r["ruleId"] for r in run["results"])
    uris = [a["location"]["uri"] for a in run["artifacts"]]
    assert all(re.fullmatch(r"[A-Za-z0-9:/._~%+-]+", u) for u in uris)
    assert bool(run["invocations"][0]["exitCode"]) != report().passed


@every
def test_markdown(report: Any) -> None:
    text = VERIFY.render(report(), "markdown")
    text.encode()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 7
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {7}
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


@every
def test_github(report: Any) -> None:
    """One command per line; nothing in a name ends a property or starts a command."""
    text = VERIFY.render(report(), "github")
    for line in text.splitlines():
        match = re.fullmatch(r"::(error|warning|notice) (?:file=([^,:]*),)?title=([^,:]*)::(.*)", line)
        assert match, line
    assert len(text.splitlines()) == len(report().findings) + 1
    assert text.splitlines()[-1].startswith("::notice" if report().passed else "::error")


@every
@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_text(report: Any, verbose: bool, encoding: str) -> None:
    text = VERIFY.render(report(), "text", Style(verbose=verbose, encoding=encoding))
    text.encode(encoding)
    last = text.splitlines()[-1]
    assert last.startswith("PASSED" if report().passed else "FAILED")
    assert "\x1b" not in text and "\x00" not in text
    assert "TF32" in text


def test_targets(tmp_path: Path) -> None:
    assert VERIFY.parse("github") == ("github", "-")
    assert VERIFY.parse("a/verify.xml") == ("junit", "a/verify.xml")
    assert VERIFY.parse("x.sarif") == ("sarif", "x.sarif")
    assert VERIFY.parse("x.md") == ("markdown", "x.md")
    assert VERIFY.parse("junit:results") == ("junit", "results")
    assert OPTIMIZE.parse("x.md") == ("markdown", "x.md")
    for bad in ("x.unknown", "pdf:x", "junit:", ""):
        with pytest.raises(UsageError, match="--report"):
            VERIFY.parse(bad)
    with pytest.raises(UsageError, match="replace the model"):
        VERIFY.check([f"json:{tmp_path}/m.onnx"], [tmp_path / "m.onnx"])


def test_finding_once() -> None:
    report = Report("0", None, "", None, "", "full")
    for _ in range(2):
        report.find("algebra", "difference", "the same")
    assert report.findings == [Finding("algebra", "difference", "error", "the same")]
    assert not report.passed and report.verdicts["algebra"] == "failed"
    report.settle("algebra", True)
    assert report.verdicts["algebra"] == "failed"


def test_nothing_compared_is_no_pass() -> None:
    assert not Report("0", None, "", None, "", "full").passed
