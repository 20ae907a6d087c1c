"""Protobuf's text format: all ways to write the same, and the line of what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxrank.splitting.pbtxt import Malformed, Message, parse
from onnxrank.splitting.triton import quoted


def _plain(m: Message) -> list[tuple[str, object]]:
    return [(f.name, _plain(f.value) if isinstance(f.value, Message) else f.value.text) for f in m.fields]


@pytest.mark.parametrize(
    "text",
    [
        'a: 1 a: 2 b { c: "x" }',
        "a: [ 1, 2 ] b: { c: 'x' }",
        'a: [1,\n2]\nb <\n c: "x"; >',
        '# all\na: 1, a: 2; # of it\nb: [ { c: "" "x" } ]',
    ],
)
def test_ways_to_write_the_same(text: str) -> None:
    assert _plain(parse(text)) == [("a", "1"), ("a", "2"), ("b", [("c", "x")])]


def test_lines_and_empty_lists() -> None:
    found = parse('a: [ ]\nb {\n  c: -1.5e3\n  d: KIND_CPU }\ne: [\n  "x",\n  "y"\n]')
    assert found.has("a") and not found.all("a") and found.where("a") == 1
    (b,) = found.messages("b")
    assert (found.where("b"), b.where("c"), b.where("d"), b.text("c"), b.text("d")) == (2, 3, 4, "-1.5e3", "KIND_CPU")
    assert [s.line for s in found.scalars("e")] == [6, 7]
    assert found.one("none") is None and found.text("none", "?") == "?" and found.where("none") == found.line


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a: 1\nb {", 2, "is not closed"),
        ("a: [ 1 2 ]", 1, "comma"),
        ("a: [ 1,\n", 2, "has no value"),
        ("a 1", 1, "needs a colon"),
        ("a:\n}", 2, "has no value"),
        ("\n: 1", 2, "where a field's name"),
        ('a: "x\n"', 1, "not understood"),
        ("a: 1\n\n$", 3, "not understood"),
        ("}", 1, "where a field's name"),
    ],
)
def test_what_is_malformed(text: str, line: int, says: str) -> None:
    with pytest.raises(Malformed, match=says) as caught:
        parse(text)
    assert caught.value.line == line


@given(st.text())
def test_strings_come_back(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    assert parse(f"a: {quoted(text)}").text("a") == text


@given(st.text(alphabet=' \n\t#"\\{}[]<>:;,ab1-_.', max_size=40))
def test_nothing_else_is_raised(text: str) -> None:
    try:
        parse(text)
    except Malformed as e:
        assert 1 <= e.line <= text.count("\n") + 1
