"""Reports: readable at 80 columns, without colour and in any encoding; JSON under its schema; written whole or not."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import os
import re
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from onnxrank.errors import EnvironmentProblem, UsageError
from onnxrank.formats import INSPECT, OPTIMIZE, PROFILE, VERIFY, Kind, Style
from onnxrank.render import print_report, to_markdown, to_text
from onnxrank.report import Comparison, LevelCost, Prediction, Report, RuleUse
from onnxrank.rule import Refusal
from onnxrank.writers import Markdown, human, percent, printable, to_json

SCHEMA = json.loads((Path(__file__).parents[2] / "onnxrank" / "optimize.schema.json").read_text())

REFUSALS = [
    Refusal(
        "broadcast", f"/tower/layers.{k}/attention/self/query/Custom_{k}_{'long' * 12}", "Custom", "Custom mixes rows"
    )
    for k in range(3)
]


def report(**changes: Any) -> Report:
    full = Report(
        version="0.1.0",
        source="in.onnx",
        source_sha256="0" * 64,
        interface="request",
        candidates=(512, 512),
        roles={
            "inputs": [
                {"name": "user", "level": "request", "candidate_axis": None},
                {"name": "X", "level": "mixed", "candidate_axis": 0, "axis": 1, "request": "0:13,20"},
                {"name": "r", "level": "mixed", "candidate_axis": 0, "record": 65, "request": "0:64"}
                | {"ranges": [{"low": 0.0, "high": 9.0, "positions": "0:3"}, {"low": 0.0, "high": 5.0}]},
            ]
        },
        output="out.onnx",
        changed=True,
        before={
            "request": LevelCost(0, 0, 0, 0),
            "candidate": LevelCost(1234, 123_456_789, 812_345_678, 3_200_000_000),
        },
        after={
            "constant": LevelCost(2, 10, 0, 8),
            "request": LevelCost(1000, 100_000_000, 300_000, 40_000),
            "candidate": LevelCost(1300, 23_456_789, 170_000_000, 1_100_000_000),
        },
        size_before=493_000_000,
        size_after=493_100_000,
        rules=[RuleUse("fc", 3, 640_000_000, ("/deep/MatMul", "/gate/Gemm", "b")), RuleUse("norm", 1, 0, ("/ln",))],
        refusals=[*REFUSALS, Refusal("fc", "/w/MatMul", "MatMul", "weights that the caller may override " * 4)],
        checks=[
            Comparison(n, seed, "score", error, 1e-6, error <= 1e-6)
            for n, seed, error in ((1, 0, 1e-8), (2, 0, 2e-7), (17, 1, 1e-7))
        ],
        predictions=[
            Prediction(n, r) for n, r in ((1, 1.1), (8, 1.5), (32, 2.0), (128, 12.34), (512, 138.2), (2048, 140))
        ],
        notes=["the model was optimised before; its inputs speak for themselves " * 2],
    )
    return dataclasses.replace(full, **changes)


def rendered(shown: Report, encoding: str = "utf-8", width: int = 80, color: bool = False, **how: bool) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    kind: dict[str, Any] = {"force_terminal": True, "color_system": "truecolor"} if color else {}
    print_report(shown, Console(file=file, width=width, **kind, _environ={}), **how)
    file.seek(0)
    return file.read()


# --- text ----------------------------------------------------------------------------------------------------


def test_everything_is_said() -> None:
    text = rendered(report())
    for part in (
        "in.onnx",
        "interface request, costs of one request at N = 512\n",
        "1234 → 1300",
        "123M → 23.5M",
        "812M → 170M",
        "3.20GB → 1.10GB",
        "MACs saved: 79 %, file size: 493MB",
        "fc    3 sites, 640M MACs saved (79 %)",
        "norm  1 site\n",
        "3 × broadcast: Custom mixes rows",
        "--explain names every node",
        "1.10× at 1, 1.50× at 8, 2.00× at 32, 12.3× at 128, 138× at 512, 140× at 2048",
        "3 comparisons at N = 1, 2, 17: at most 2e-07 off, 1e-06 is allowed",
        "note: the model was optimised before",
        "Written to out.onnx.",
    ):
        assert part in text
    assert text.endswith("\n3 × fc, 1 × norm: 79 % of MACs are now once per request or gone.\n")
    assert "/deep/MatMul" not in text and "Custom_0" not in text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("changes", [{}, {"source": "modèle/推荐.onnx", "candidates": (64, 2048)}, {"changed": False}])
def test_fits_80_columns(encoding: str, changes: dict[str, Any]) -> None:
    text = rendered(report(**changes), encoding)
    assert max(map(len, text.splitlines())) <= 80
    if encoding != "utf-8":
        assert "138x at 512" in text and "1234 -> 1300" in text
        assert not set("×→─") & set(text)


def test_range_of_candidates() -> None:
    assert "at N = 362 (64..2048)\n" in rendered(report(candidates=(64, 2048)))


def test_no_escapes_without_a_terminal() -> None:
    assert "\x1b" not in rendered(report())
    assert "\x1b[1;32m" in rendered(report(), color=True)


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = io.StringIO()
    print_report(report(), Console(file=file, width=80, force_terminal=True))
    assert not any(f"\x1b[{code}m" in file.getvalue() for code in ("1;32", "32"))


def test_explain_and_verbose() -> None:
    text = rendered(report(), explain=True, verbose=True)
    for refusal in REFUSALS:
        # In one piece, however long: names are searched for and copied.
        assert f"      Custom {refusal.node}\n" in text
    assert "--explain" not in text
    assert "      /deep/MatMul\n" in text
    assert "      ok   N = 17, seed 1, score: 1e-07 of 1e-06\n" in text


def test_many_reasons_are_cut() -> None:
    many = [Refusal("fc", f"n{k}", "MatMul", f"reason {k}") for k in range(30)]
    text = rendered(report(refusals=many))
    assert "reason 7" in text and "reason 8" not in text
    assert "22 more places left out; --explain" in text
    assert "reason 29" in rendered(report(refusals=many), explain=True)


def test_what_is_left_alone_by_cost() -> None:
    """What costs most comes first, however few places it is, with its share of the model."""
    cheap = [Refusal("dot", f"n{k}", "MatMul", "cheap", 1_000_000) for k in range(5)]
    dear = Refusal("fold", "/att/MatMul", "MatMul", "dear", 406_172_839)
    whole = Refusal("model", "", "", "whole")
    text = rendered(report(refusals=[*cheap, whole, dear]), explain=True)
    assert text.index("1 × fold: dear") < text.index("5 × dot: cheap") < text.index("1 × model: whole")
    assert "      it costs 406M MACs per request, 50 % of the model\n      MatMul /att/MatMul\n" in text
    assert "it costs 5.00M MACs per request" in text
    assert text.count("it costs") == 2
    short = rendered(report(refusals=[*cheap, whole, dear]))
    assert "      MatMul /att/MatMul\n" in short and "      MatMul n0 and 4 more\n" in short


def test_nothing_applied() -> None:
    same = {"changed": False, "rules": [], "after": report().before, "size_after": 493_000_000, "checks": []}
    text = rendered(report(**same))
    assert text.endswith("Written to out.onnx.\nNothing applied: the output is the input's own bytes.\n")
    assert "→" not in text and "0 %" in text
    text = rendered(report(**same, output=None))
    assert text.endswith("No model was written.\nNothing applied: the output would be the input's own bytes.\n")


def test_a_rule_that_adds_products() -> None:
    text = rendered(report(rules=[RuleUse("fc", 1, -81_234_567, ("/a",))]))
    assert "81.2M MACs more, which makes room for other rules (10 %)" in " ".join(text.split())
    assert "-81" not in text


def test_no_table_of_nothing() -> None:
    text = rendered(report(changed=False, rules=[], before={}, after={}, checks=[], predictions=[], refusals=[]))
    assert "nodes" not in text and "total" not in text and text.endswith("own bytes.\n")


def test_bare() -> None:
    bare = Report("0.1.0", None, "0" * 64, "same", (1, 1), {"inputs": []})
    assert "model in memory" in rendered(bare)
    text = rendered(dataclasses.replace(bare, changed=True))
    assert text.endswith("\nRewritten. Not checked.\n")


def test_names_from_a_hostile_file() -> None:
    evil = "a\x1b[2J\x07\r\nb[bold red]c[/]\u202eé"
    shown = report(
        refusals=[Refusal("fc", evil, "MatMul", evil)], rules=[RuleUse("fc", 1, 1, (evil,))], notes=[evil], source=evil
    )
    for encoding in ("utf-8", "ascii"):
        text = rendered(shown, encoding, width=200, explain=True, verbose=True)
        assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
        assert "b[bold red]c[/]" in text


def test_failed_comparison_and_nan() -> None:
    checks = [Comparison(1, 0, "y", 1e-3, 1e-6, False), Comparison(2, 0, "y", math.nan, 1e-6, False)]
    text = rendered(report(checks=checks), verbose=True)
    assert "at most nan off" in text and "FAIL N = 1" in text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (999, "", "999"),
        (1000, "", "1.00k"),
        (9996, "", "10.0k"),
        (99_960, "", "100k"),
        (999_600, "", "1.00M"),
        (1_234_567, "B", "1.23MB"),
        (5e9, "", "5.00G"),
        (5e12, "", "5.00T"),
        (5e15, "", "5000T"),
    ],
)
def test_human(value: float, unit: str, text: str) -> None:
    assert human(value, unit) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.79, "79 %"),
        (0.9899, "98.9 %"),
        (0.99999, "99.9 %"),
        (0.0055, "0.5 %"),
        (0.00001, "<0.1 %"),
        (-0.05, "-5 %"),
        (-0.005, "-0.5 %"),
    ],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_printable() -> None:
    assert printable("a\tb\nc", "utf-8", keep="\n") == "a\\tb\nc"
    assert printable("×", "ascii") == "\\xd7"


# --- JSON ----------------------------------------------------------------------------------------------------


def described(value: Any, schema: dict[str, Any], where: str = "report") -> None:
    """Every field must be in the schema and described there."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if isinstance(value, dict):
        for key, inner in value.items():
            assert key in schema["properties"], f"{where}.{key}"
            assert schema["properties"][key].get("description"), f"{where}.{key}"
            described(inner, schema["properties"][key], f"{where}.{key}")
    elif isinstance(value, list):
        for inner in value:
            described(inner, schema["items"], where)


def test_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    form = json.loads(to_json(report()))
    jsonschema.validate(form, SCHEMA)
    described(form, SCHEMA)
    assert set(form) == set(SCHEMA["properties"]) == set(SCHEMA["required"])


@pytest.mark.parametrize(
    "wrong", [{"source_sha256": "x"}, {"interface": "none"}, {"candidates": (0, 1)}, {"rules": [1]}, {"roles": {}}]
)
def test_schema_refuses(wrong: dict[str, Any]) -> None:
    form = {**json.loads(to_json(report())), **wrong}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(form, SCHEMA)


def test_json_has_no_nan() -> None:
    shown = report(checks=[Comparison(1, 0, "y", math.nan, math.inf, False)])
    form = json.loads(to_json(shown), parse_constant=lambda name: pytest.fail(name))
    assert form["checks"][0]["error"] is None and form["checks"][0]["tolerance"] is None
    jsonschema.validate(form, SCHEMA)


# --- targets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "parsed"),
    [
        ("r.json", ("json", "r.json")),
        ("a/r.TXT", ("text", "a/r.TXT")),
        ("r.md", ("markdown", "r.md")),
        ("json:r.out", ("json", "r.out")),
        ("TEXT:r.json", ("text", "r.json")),
        ("json:-", ("json", "-")),
        ("text:a:b", ("text", "a:b")),
        ("C:\\r.json", ("json", "C:\\r.json")),
    ],
)
def test_parse_target(target: str, parsed: tuple[str, str]) -> None:
    assert OPTIMIZE.parse(target) == parsed


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("xml:r.xml", "format 'xml' is unknown; it must be json, text or markdown"),
        ("r.xml", "cannot be told from the file's ending"),
        ("r", "cannot be told"),
        ("-", "cannot be told"),
        ("json:", "file is missing"),
        ("", "file is missing"),
    ],
)
def test_parse_target_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    for step in (OPTIMIZE.parse, lambda t: OPTIMIZE.check([t]), lambda t: OPTIMIZE.write(report(), [t])):
        with pytest.raises(UsageError, match=words):
            step(target)
    assert not list(tmp_path.iterdir())


def test_write_files(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("old")
    OPTIMIZE.write(report(), [str(tmp_path / "r.json")])
    OPTIMIZE.write(report(), [f"text:{tmp_path / 'r.out'}"], Style(explain=True))
    assert (tmp_path / "r.json").read_text() == to_json(report())
    assert (tmp_path / "r.out").read_text(encoding="utf-8") == to_text(report(), Style(explain=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.out"]


def test_text_has_no_trailing_blanks() -> None:
    assert all(line == line.rstrip() for line in to_text(report(), Style(explain=True, verbose=True)).splitlines())


@pytest.mark.parametrize("kind", ["json", "text"])
def test_write_stdout(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    OPTIMIZE.write(report(), [f"{kind}:-"])
    assert capsys.readouterr().out == (to_json(report()) if kind == "json" else to_text(report()))


def test_write_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    OPTIMIZE.check([f"json:{tmp_path / 'pipe'}"])
    OPTIMIZE.write(report(), [f"json:{tmp_path / 'pipe'}"])
    reader.join(10)
    assert read == [to_json(report())]
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_write_nowhere(tmp_path: Path) -> None:
    for step in (lambda t: OPTIMIZE.check([t]), lambda t: OPTIMIZE.write(report(), [t])):
        with pytest.raises(UsageError, match="does not exist"):
            step(f"json:{tmp_path / 'none' / 'r.json'}")
        with pytest.raises(UsageError, match="is a folder"):
            step(f"json:{tmp_path}")
    assert not list(tmp_path.iterdir())


def test_write_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="no space"):
        OPTIMIZE.write(report(), [str(tmp_path / "r.json")])
    assert not list(tmp_path.iterdir())


def test_a_report_must_not_replace_the_model(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    (tmp_path / "link").symlink_to(model)
    for target in (f"json:{model}", f"text:{tmp_path / 'link'}"):
        with pytest.raises(UsageError, match="would replace the model"):
            OPTIMIZE.check([target], [model])
    OPTIMIZE.check([f"json:{tmp_path / 'other'}"], [model])


# --- every kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OPTIMIZE, INSPECT, PROFILE, VERIFY])
def test_every_format_has_its_function(kind: Kind) -> None:
    for place in (kind.shower, *(f.make for f in kind.formats)):
        module, name = place.split(":")
        assert callable(getattr(importlib.import_module(module), name))
    endings = [e for f in kind.formats for e in f.endings]
    assert len(endings) == len(set(endings)) and len(kind.names) == len(set(kind.names))


@pytest.mark.parametrize("kind", [OPTIMIZE, INSPECT, PROFILE, VERIFY])
def test_md_is_markdown(kind: Kind) -> None:
    assert kind.parse("report.md") == ("markdown", "report.md")
    assert kind.parse("report.txt") == ("text", "report.txt")


def test_markdown() -> None:
    text = to_markdown(report(), Style(explain=True))
    assert "\n| level | nodes | parameters | MACs | bytes |\n| --- | --: | --: | --: | --: |\n" in text
    assert "\n| total | 1234 → 2302 |" in text
    assert "\n### Rules\n\n- fc 3 sites, 640M MACs saved (79 %)\n" in text
    assert "\n- 3 × broadcast: Custom mixes rows\n  - `Custom /tower/layers.0/" in text
    assert text.endswith("\n**3 × fc, 1 × norm: 79 % of MACs are now once per request or gone.**\n")


def test_markdown_keeps_the_indentation_of_a_tree() -> None:
    to = Markdown()
    table = to.table(["layer", "MACs"])
    table.add_row("top", "3")
    table.add_row("    top.0|x", "2")
    to.show(table)
    assert to.document == "| layer | MACs |\n| --- | --: |\n| top | 3 |\n| &emsp;&emsp;top.0\\|x | 2 |\n"


def test_markdown_of_hostile_names() -> None:
    evil = "a|b`c\n<img src=x>*_[x](y)\x1b"
    text = to_markdown(report(notes=[evil], refusals=[Refusal("fc", evil, "Op", evil)]), Style(explain=True))
    assert "\x1b" not in text
    outside = re.sub("`[^`]*`", "", text.replace("\\`", ""))
    assert outside.count("img src=x") == 2
    assert "<img" not in outside.replace("\\<", "") and "[x]" not in outside
