"""Protobuf's text format: all ways to write the same, and the line of what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from onnxrank.splitting.pbtxt import Each, Malformed, Message, Word, parse, quoted, write


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


def test_a_message_is_written() -> None:
    fields = {
        "# What it is.": None,
        "name": 'a "b"',
        "count": 2,
        "group": ({"kind": Word("KIND_CPU"), "on": True, "dims": (1, -1), "none": {"shape": ()}},),
        "input": [{"name": "x"}, {"name": "y", "value": {"text": "1"}}],
        "steps": {"step": [{"model": "m", "map": Each([{"key": "k"}, {"key": "l"}])}]},
    }
    assert (
        write(fields)
        == """# What it is.
name: "a \\"b\\""
count: 2
group [ { kind: KIND_CPU on: true dims: [ 1, -1 ] none { shape: [ ] } } ]
input [
  { name: "x" },
  { name: "y" value: { text: "1" } }
]
steps {
  step [
    {
      model: "m"
      map { key: "k" }
      map { key: "l" }
    }
  ]
}
"""
    )


_names = st.sampled_from(["a", "b_c", "value", "d2"])
_scalars = st.one_of(st.text(st.characters(codec="utf-8")), st.integers(), st.booleans(), st.just(Word("TYPE_FP32")))
_messages = st.recursive(
    st.dictionaries(_names, _scalars, max_size=3),
    lambda m: st.dictionaries(
        _names, st.one_of(_scalars, m, st.lists(m), st.lists(m).map(Each), st.lists(_scalars).map(tuple)), max_size=3
    ),
    max_leaves=12,
)


def _meant(fields: dict[str, object]) -> list[tuple[str, object]]:
    """What is written, as `_plain` reads it: values that are repeated one by one."""
    out: list[tuple[str, object]] = []
    for name, value in fields.items():
        for v in value if isinstance(value, (list, tuple)) else [value]:
            out.append((name, _meant(v) if isinstance(v, dict) else str(v).lower() if isinstance(v, bool) else str(v)))
    return out


@example({"a": Each([{"b_c": [1, {"d2": ()}]}]), "b_c": ({"a": [{"value": "x"}]},)})
@given(_messages)
def test_what_is_written_reads_back(fields: dict[str, object]) -> None:
    assert _plain(parse(write(fields))) == _meant(fields)
