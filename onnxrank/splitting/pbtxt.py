"""Protobuf's text format, as `config.pbtxt` is written in: read with the line of everything, and written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(
    r"(?P<blank>[ \t\r]+|#[^\n]*)|(?P<line>\n)|(?P<string>\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_.]*|-?[0-9][A-Za-z0-9_.+-]*|-?\.[0-9]+|-[A-Za-z]+)|(?P<sign>[{}<>\[\]:;,])"
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


class Malformed(ValueError):
    """Text that is not of the format.

    Attributes:
        line: Where.
    """

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True)
class Scalar:
    """A value that is no message: a string, a number, or the name of one.

    Attributes:
        text: The value; of a string what it stands for.
        quoted: Whether it is a string.
        line: Where it stands.
    """

    text: str
    quoted: bool
    line: int


@dataclass(frozen=True)
class Field:
    """A field of a message.

    Attributes:
        name: Its name.
        value: One value; a field that is repeated occurs several times.
        line: Where its name stands; a list's, for an element of one.
    """

    name: str
    value: Scalar | Message
    line: int


@dataclass
class Message:
    """A message.

    Attributes:
        fields: Its fields, in order.
        empty: Fields that are lists of nothing, with their lines.
        line: Where it begins.
    """

    line: int
    fields: list[Field] = field(default_factory=list)
    empty: dict[str, int] = field(default_factory=dict)

    def all(self, name: str) -> list[Field]:
        """The fields of a name."""
        return [f for f in self.fields if f.name == name]

    def has(self, name: str) -> bool:
        """Whether there is a field of a name."""
        return name in self.empty or any(f.name == name for f in self.fields)

    def messages(self, name: str) -> list[Message]:
        """The messages among the fields of a name."""
        return [f.value for f in self.all(name) if isinstance(f.value, Message)]

    def scalars(self, name: str) -> list[Scalar]:
        """The other values of a name."""
        return [f.value for f in self.all(name) if isinstance(f.value, Scalar)]

    def one(self, name: str) -> Scalar | None:
        """The value of a field that occurs once."""
        found = self.scalars(name)
        return found[-1] if found else None

    def text(self, name: str, default: str = "") -> str:
        """The same as text."""
        found = self.one(name)
        return default if found is None else found.text

    def where(self, name: str) -> int:
        """The line of a field; that of the message if it has none."""
        found = self.all(name)
        return found[0].line if found else self.empty.get(name, self.line)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    line: int


def parse(text: str) -> Message:
    """Reads a message.

    Raises:
        Malformed: The text is not of the format.
    """
    reader = _Reader(list(_tokens(text)), text.count("\n") + 1)
    found = reader.message(1, "")
    return found


def _tokens(text: str) -> Iterator[_Token]:
    at, line = 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise Malformed(line, f"{text[at : at + 12].split()[0]!r} is not understood")
        kind = match.lastgroup or ""
        if kind == "line":
            line += 1
        elif kind != "blank":
            yield _Token(kind, match[0], line)
        at = match.end()


class _Reader:
    def __init__(self, tokens: list[_Token], last: int) -> None:
        self._tokens, self._at, self._last = tokens, 0, last

    def _peek(self) -> _Token:
        return self._tokens[self._at] if self._at < len(self._tokens) else _Token("end", "", self._last)

    def _next(self) -> _Token:
        found = self._peek()
        self._at += 1
        return found

    def _takes(self, sign: str) -> bool:
        if self._peek().kind == "sign" and self._peek().text in sign:
            self._at += 1
            return True
        return False

    def message(self, line: int, end: str) -> Message:
        """Fields up to a sign, or to the end of the text."""
        out = Message(line)
        while True:
            token = self._next()
            if token.kind == "end" and not end:
                return out
            if token.kind == "sign" and token.text == end:
                return out
            if token.kind == "end":
                raise Malformed(line, f"the {'{' if end == '}' else '<'} of this line is not closed")
            if token.kind != "word":
                raise Malformed(token.line, f"{token.text!r} stands where a field's name is expected")
            self._field(out, token)
            self._takes(",;")

    def _field(self, out: Message, name: _Token) -> None:
        colon = self._takes(":")
        if not self._takes("["):
            out.fields.append(Field(name.text, self._value(colon, name), name.line))
            return
        if self._takes("]"):
            out.empty[name.text] = name.line
            return
        while True:
            out.fields.append(Field(name.text, self._value(True, name), name.line))
            if self._takes("]"):
                return
            if not self._takes(","):
                raise Malformed(self._peek().line, f"the list {name.text!r} needs a comma or ] here")

    def _value(self, colon: bool, name: _Token) -> Scalar | Message:
        token = self._next()
        if token.kind == "sign" and token.text in "{<":
            return self.message(token.line, "}" if token.text == "{" else ">")
        if not colon:
            raise Malformed(name.line, f"the field {name.text!r} needs a colon or a message")
        if token.kind == "string":
            text = _unquoted(token.text)
            while self._peek().kind == "string":
                text += _unquoted(self._next().text)
            return Scalar(text, True, token.line)
        if token.kind != "word":
            raise Malformed(token.line, f"the field {name.text!r} has no value")
        return Scalar(token.text, False, token.line)


def _unquoted(text: str) -> str:
    """What a string stands for: bytes, some of them written by number, that are UTF-8."""

    def meant(match: re.Match[str]) -> bytes:
        code = match[1]
        if code is None:
            return match[0].encode("utf-8", "surrogatepass")
        if code[0] == "x" and len(code) > 1:
            return bytes([int(code[1:], 16)])
        return bytes([int(code, 8) & 255]) if code[0] in "01234567" else _ESCAPES.get(code, code).encode()

    parts = re.finditer(r"\\(x[0-9A-Fa-f]{1,2}|[0-7]{1,3}|.)|[^\\]+", text[1:-1], re.DOTALL)
    return b"".join(map(meant, parts)).decode("utf-8", "replace")


# --- writing ---------------------------------------------------------------------------------------------------------


class Word(str):
    """A value without quotes: the name of a type, or of a kind."""


class Each(tuple[Any, ...]):
    """Values of a field that is written once for each."""


def write(fields: Mapping[str, Any]) -> str:
    """Writes a message.

    Args:
        fields: Its fields, in order. Values are texts, whole numbers, truth values, `Word`s, messages (mappings),
            tuples of these, which stay on one line, lists, whose elements have lines of their own, and `Each`. A name
            that begins with # is a comment.
    """
    return "".join(f"{line}\n" for line in _lines(fields))


def _lines(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, value in fields.items():
        if name.startswith("#"):
            yield name
        elif isinstance(value, Each):
            for v in value:
                yield from _lines({name: v})
        elif isinstance(value, list):
            yield f"{name} ["
            for k, v in enumerate(value, 1):
                *above, last = _element(v)
                yield from (f"  {line}" for line in above)
                yield f"  {last}{',' if k < len(value) else ''}"
            yield "]"
        elif _spread(value):
            first, *others = _element(value)
            yield f"{name} {first}"
            yield from others
        else:
            yield _field(name, value)


def _element(value: Any) -> list[str]:
    """Lines of a value by itself."""
    return ["{", *(f"  {line}" for line in _lines(value)), "}"] if _spread(value) else [_inline(value)]


def _spread(value: Any) -> bool:
    """Whether a value is a message that takes several lines."""
    return isinstance(value, Mapping) and any(isinstance(v, (list, Each)) or _spread(v) for v in value.values())


def _field(name: str, value: Any) -> str:
    message = any(isinstance(v, Mapping) for v in (value if isinstance(value, (tuple, list)) else [value]))
    # Of an entry of a map the value has a colon in any case, as Triton's documents write it.
    return f"{name}{'' if message and name != 'value' else ':'} {_inline(value)}"


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(["{", *(_field(k, v) for k, v in value.items()), "}"])
    if isinstance(value, (tuple, list)):
        return f"[ {', '.join(map(_inline, value))} ]" if value else "[ ]"
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) and not isinstance(value, Word) else str(value)


def quoted(text: str) -> str:
    """Text as a string of the format."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(c: str) -> str:
    return f"\\{c}" if c in '"\\' else "".join(f"\\{b:03o}" for b in c.encode())
