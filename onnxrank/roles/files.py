"""Roles files: what one says, and what is wrong with it.

A roles file (YAML or JSON) looks like this, every part optional::

    candidate_axis: 0                 # of every input that does not say otherwise
    request: ["user_*", "X[0:13,20]"] # as --request
    inputs:
      item_*: candidate
      table: {level: request, candidate_axis: 1, ranges: {"0:3": [0, 100], "3": [0, 7]}}
      hist: {record: 65, request: "0:64", range: [0, 50000]}
      context: {candidate_axis: null} # one row per request already

An input named by its own name in `inputs` is not touched by the patterns there. Ranges are half-open.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnxrank.errors import UsageError
from onnxrank.roles.declared import listed
from onnxrank.roles.positions import parse_ranges
from onnxrank.roles.role import LEVELS, ValueRange

_TOP_KEYS = ("inputs", "request", "candidate_axis")

_ENTRY_KEYS = ("level", "request", "axis", "candidate_axis", "record", "range", "ranges")

# What one source says of one input: "request", "candidate", or the request-level positions.
Claim = str | tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One value of `inputs` in a roles file."""

    claim: Claim | None = None
    axis: int | None = None
    axis_given: bool = False  # candidate_axis is there, perhaps as null
    candidate_axis: int | None = None
    record: int | None = None
    ranges: tuple[ValueRange, ...] = ()


@dataclass(frozen=True)
class Spec:
    """What a roles file says."""

    inputs: Mapping[str, Entry] = field(default_factory=dict)
    request: tuple[str, ...] = ()
    candidate_axis: int | None = 0


def load_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a roles file, JSON if its name ends in .json and YAML otherwise.

    Raises:
        UsageError: If it cannot be read or does not hold roles; the message names the file.
    """
    where = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise UsageError(f"The roles file {where} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"The roles file {where} is not UTF-8 text; YAML or JSON is expected.") from error
    spec = _parse_json(text, where) if where.lower().endswith(".json") else _parse_yaml(text, where)
    read_spec(spec, where)
    return dict(spec)


def _parse_json(text: str, where: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeats([key for key, _ in pairs], where)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=mapping)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"The roles file {where} is not valid JSON: {error}.") from error


def _parse_yaml(text: str, where: str) -> Any:
    import yaml  # type: ignore[import-untyped,unused-ignore]

    def tidy(node: Any, seen: set[int]) -> None:
        """Refuse repeated keys; keep 1:13 a string (YAML 1.1 reads it as 73, in base 60)."""
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            if ":" in node.value and node.tag.endswith((":int", ":float")):
                node.tag = "tag:yaml.org,2002:str"
        elif isinstance(node, yaml.MappingNode):
            _refuse_repeats([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)], where)
            for pair in node.value:
                for child in pair:
                    tidy(child, seen)
        elif isinstance(node, yaml.SequenceNode):
            for child in node.value:
                tidy(child, seen)

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            tidy(node, set())
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"The roles file {where} is not valid YAML: {' '.join(str(error).split())}.") from error


def _refuse_repeats(keys: Sequence[str], where: str) -> None:
    repeated = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    if repeated:
        raise UsageError(
            f"The roles file {where} is contradictory: {listed(repeated)} stands there twice in one mapping."
        )


def read_spec(spec: Any, where: str) -> Spec:
    """Holds what a roles file was read as against what one may say."""
    _check_keys(spec, _TOP_KEYS, where)
    request = spec.get("request", ())
    request = (request,) if isinstance(request, str) else request
    if not isinstance(request, Sequence) or not all(isinstance(item, str) for item in request):
        raise UsageError(f"{where}: request must be a list of patterns, such as ['user_*', 'X[0:13]'].")
    entries = spec.get("inputs", {})
    if not isinstance(entries, Mapping):
        raise UsageError(f"{where}: inputs must be a mapping of input names to roles, not {_kind(entries)}.")
    inputs: dict[str, Entry] = {}
    for key, value in entries.items():
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise UsageError(f"{where}: the key {key!r} under inputs is not an input name. Put it in quotes.")
        inputs[str(key)] = _read_entry(value, f"{where}: input {str(key)!r}")
    axis = spec.get("candidate_axis", 0)
    return Spec(inputs, tuple(request), None if axis is None else _integer(axis, f"{where}: candidate_axis"))


def _read_entry(value: Any, where: str) -> Entry:
    if value in ("request", "candidate"):
        return Entry(claim=value)
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} must be request, candidate or a mapping of {', '.join(_ENTRY_KEYS)}, not {value!r}.")
    _check_keys(value, _ENTRY_KEYS, where)
    level = value.get("level")
    if "level" in value and level not in LEVELS:
        raise UsageError(f"{where}: level must be one of {', '.join(LEVELS)}, not {level!r}.")
    claim: Claim | None = level
    if "request" in value:
        if level in ("request", "candidate"):
            raise UsageError(f"{where} is contradictory: level {level}, and request positions as well. Drop one.")
        claim = positions_of(value["request"], f"{where}: request")
    elif level == "mixed":
        raise UsageError(f"{where} is mixed but has no request positions. Add them, such as request: '0:13,20'.")
    record = _integer(value["record"], f"{where}: record") if "record" in value else None
    if record is not None and record < 1:
        raise UsageError(f"{where}: record must be at least 1, not {record}.")
    if record is not None and "axis" in value:
        raise UsageError(f"{where}: positions count within the record, so axis and record exclude each other.")
    given = "candidate_axis" in value
    axis = value.get("candidate_axis")
    return Entry(
        claim=claim,
        axis=_integer(value["axis"], f"{where}: axis") if "axis" in value else None,
        axis_given=given,
        candidate_axis=None if axis is None else _integer(axis, f"{where}: candidate_axis"),
        record=record,
        ranges=_read_ranges(value, where),
    )


def _read_ranges(value: Mapping[str, Any], where: str) -> tuple[ValueRange, ...]:
    pairs: list[tuple[tuple[int, ...] | None, Any]] = []
    if "range" in value:
        pairs.append((None, value["range"]))
    if "ranges" in value:
        if not isinstance(value["ranges"], Mapping):
            raise UsageError(f"{where}: ranges must be a mapping such as {{'0:3': [0, 100]}}; for all use range.")
        pairs += [(positions_of(key, f"{where}: ranges"), pair) for key, pair in value["ranges"].items()]
    ranges = []
    for positions, pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(_is_number(end) for end in pair):
            raise UsageError(f"{where}: a value range is two numbers [low, high), not {pair!r}.")
        low, high = (float(end) for end in pair)
        if not low < high:
            raise UsageError(f"{where}: the value range {pair!r} is empty: it is half-open, [low, high).")
        ranges.append(ValueRange(low, high, positions))
    return tuple(ranges)


def _check_keys(value: Any, allowed: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where}: a mapping with the keys {', '.join(allowed)} is expected, not {_kind(value)}.")
    unknown = [str(key) for key in value if key not in allowed]
    if unknown:
        raise UsageError(f"{where}: unknown key {listed(unknown)}. Allowed are {', '.join(allowed)}.")


def positions_of(value: Any, where: str) -> tuple[int, ...]:
    """Positions as a roles file writes them: one, several, or ranges."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, (str, int)) for item in items):
        raise UsageError(f"{where} must be positions such as '0:13,20', not {value!r}.")
    try:
        return parse_ranges(",".join(str(item) for item in items))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def _integer(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{where} must be an integer, not {value!r}.")
    return value


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__
