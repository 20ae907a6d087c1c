"""Roles: which graph inputs, or columns of one, are the same for all candidates of a request.

Roles come from `--request` patterns, from a roles file or from recorded requests, and always end up as one
`Roles` with an `InputRole` for every graph input. A roles file (YAML or JSON) looks like this, every part
optional::

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

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from onnx import TensorProto

from .errors import ModelError, UsageError

_MAX_POSITION = 1 << 24
_TOP_KEYS = ("inputs", "request", "candidate_axis")
_ENTRY_KEYS = ("level", "request", "axis", "candidate_axis", "record", "range", "ranges")
_LEVELS = ("request", "candidate", "mixed")
_INTEGERS = frozenset(getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64))

# What one source says of one input: "request", "candidate", or the request-level positions.
_Claim = str | tuple[int, ...]


@dataclass(frozen=True)
class InputInfo:
    """A graph input as declared: a symbolic dim is a str, an unknown one None; `dims` None: unknown rank."""

    name: str
    elem_type: int
    dims: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class ValueRange:
    """Values lie in [low, high), at `positions` along the role's axis or record (None: everywhere)."""

    low: float
    high: float
    positions: tuple[int, ...] | None = None


@dataclass(frozen=True)
class InputRole:
    """Role of one graph input.

    Attributes:
        name: The input.
        level: "request", "candidate" or "mixed".
        candidate_axis: Axis that runs over candidates; None where the input has one row per request already.
        axis: Axis that `request` and the positions of `ranges` count along; None without such positions, and
            for records.
        request: Request-level positions of a mixed input, sorted.
        record: Size of one row's record where the candidate axis holds N * record entries, N outermost;
            positions then count within the record.
        ranges: What values the input takes.
    """

    name: str
    level: str
    candidate_axis: int | None
    axis: int | None = None
    request: tuple[int, ...] = ()
    record: int | None = None
    ranges: tuple[ValueRange, ...] = ()


@dataclass(frozen=True)
class Roles:
    """The role of every graph input, in graph order."""

    inputs: Mapping[str, InputRole]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able form that `from_dict` reads back; the same roles always give the same form."""
        return {"inputs": [_role_to_dict(role) for role in self.inputs.values()]}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Roles:
        """Read what `to_dict` returned.

        Raises:
            ModelError: If `d` is not such a form (it usually comes from a model's metadata).
        """
        try:
            roles = [_role_from_dict(item) for item in d["inputs"]]
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise ModelError(
                f"The stored roles cannot be read ({type(error).__name__}: {error}). Optimise the original model again."
            ) from error
        return cls({role.name: role for role in roles})

    def request_names(self) -> tuple[str, ...]:
        """Return the inputs that are request-level as a whole, in graph order."""
        return tuple(role.name for role in self.inputs.values() if role.level == "request")


def _role_to_dict(role: InputRole) -> dict[str, Any]:
    d: dict[str, Any] = {"name": role.name, "level": role.level, "candidate_axis": role.candidate_axis}
    if role.axis is not None:
        d["axis"] = role.axis
    if role.request:
        d["request"] = format_ranges(role.request)
    if role.record is not None:
        d["record"] = role.record
    if role.ranges:
        d["ranges"] = [
            {"low": r.low, "high": r.high} | ({} if r.positions is None else {"positions": format_ranges(r.positions)})
            for r in role.ranges
        ]
    return d


def _role_from_dict(d: Mapping[str, Any]) -> InputRole:
    if d["level"] not in _LEVELS:
        raise ValueError(f"unknown level {d['level']!r}")
    if not isinstance(d["name"], str):
        raise TypeError(f"the name {d['name']!r} is no string")
    request = parse_ranges(d["request"]) if "request" in d else ()
    return InputRole(
        name=d["name"],
        level=d["level"],
        candidate_axis=_stored_number(d["candidate_axis"], "candidate_axis", 0),
        axis=_stored_number(d.get("axis"), "axis", 0),
        request=request,
        record=_stored_number(d.get("record"), "record", 1),
        ranges=tuple(
            ValueRange(
                float(r["low"]),
                float(r["high"]),
                parse_ranges(r["positions"]) if "positions" in r else None,
            )
            for r in d.get("ranges", ())
        ),
    )


def _stored_number(value: Any, name: str, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} {value!r} is not a whole number of at least {least}")
    return value


def format_ranges(positions: Sequence[int]) -> str:
    """Write positions as half-open ranges: (0, 1, 2, 20) is "0:3,20"."""
    runs: list[list[int]] = []
    for position in sorted(set(positions)):
        if runs and runs[-1][1] == position:
            runs[-1][1] += 1
        else:
            runs.append([position, position + 1])
    return ",".join(str(lo) if hi == lo + 1 else f"{lo}:{hi}" for lo, hi in runs)


def parse_ranges(text: str) -> tuple[int, ...]:
    """Read half-open ranges: "0:3,20" is (0, 1, 2, 20), sorted and without repeats.

    Raises:
        UsageError: If `text` is anything else, or a range is empty.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})\s*(?::\s*([0-9]{1,18})\s*)?", part)
        if match is None:
            raise UsageError(
                f"{text!r} is not a list of positions. Write half-open ranges and single positions, such as 0:13,20."
            )
        low = int(match[1])
        high = low + 1 if match[2] is None else int(match[2])
        if high <= low:
            raise UsageError(f"The range {part.strip()} in {text!r} is empty: ranges are half-open, low:high.")
        if high > _MAX_POSITION:
            raise UsageError(f"The range {part.strip()} in {text!r} goes past position {_MAX_POSITION}, the limit.")
        found.update(range(low, high))
    return tuple(sorted(found))


# --- the roles file -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One value of `inputs` in a roles file."""

    claim: _Claim | None = None
    axis: int | None = None
    axis_given: bool = False  # candidate_axis is there, perhaps as null
    candidate_axis: int | None = None
    record: int | None = None
    ranges: tuple[ValueRange, ...] = ()


@dataclass(frozen=True)
class _Spec:
    inputs: Mapping[str, _Entry] = field(default_factory=dict)
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
    _read_spec(spec, where)
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
            f"The roles file {where} is contradictory: {_names(repeated)} stands there twice in one mapping."
        )


def _read_spec(spec: Any, where: str) -> _Spec:
    _check_keys(spec, _TOP_KEYS, where)
    request = spec.get("request", ())
    request = (request,) if isinstance(request, str) else request
    if not isinstance(request, Sequence) or not all(isinstance(item, str) for item in request):
        raise UsageError(f"{where}: request must be a list of patterns, such as ['user_*', 'X[0:13]'].")
    entries = spec.get("inputs", {})
    if not isinstance(entries, Mapping):
        raise UsageError(f"{where}: inputs must be a mapping of input names to roles, not {_kind(entries)}.")
    inputs: dict[str, _Entry] = {}
    for key, value in entries.items():
        if isinstance(key, bool) or not isinstance(key, (str, int)):
            raise UsageError(f"{where}: the key {key!r} under inputs is not an input name. Put it in quotes.")
        inputs[str(key)] = _read_entry(value, f"{where}: input {str(key)!r}")
    axis = spec.get("candidate_axis", 0)
    return _Spec(inputs, tuple(request), None if axis is None else _integer(axis, f"{where}: candidate_axis"))


def _read_entry(value: Any, where: str) -> _Entry:
    if value in ("request", "candidate"):
        return _Entry(claim=value)
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} must be request, candidate or a mapping of {', '.join(_ENTRY_KEYS)}, not {value!r}.")
    _check_keys(value, _ENTRY_KEYS, where)
    level = value.get("level")
    if "level" in value and level not in _LEVELS:
        raise UsageError(f"{where}: level must be one of {', '.join(_LEVELS)}, not {level!r}.")
    claim: _Claim | None = level
    if "request" in value:
        if level in ("request", "candidate"):
            raise UsageError(f"{where} is contradictory: level {level}, and request positions as well. Drop one.")
        claim = _positions(value["request"], f"{where}: request")
    elif level == "mixed":
        raise UsageError(f"{where} is mixed but has no request positions. Add them, such as request: '0:13,20'.")
    record = _integer(value["record"], f"{where}: record") if "record" in value else None
    if record is not None and record < 1:
        raise UsageError(f"{where}: record must be at least 1, not {record}.")
    if record is not None and "axis" in value:
        raise UsageError(f"{where}: positions count within the record, so axis and record exclude each other.")
    given = "candidate_axis" in value
    axis = value.get("candidate_axis")
    return _Entry(
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
        pairs += [(_positions(key, f"{where}: ranges"), pair) for key, pair in value["ranges"].items()]
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
        raise UsageError(f"{where}: unknown key {_names(unknown)}. Allowed are {', '.join(allowed)}.")


def _positions(value: Any, where: str) -> tuple[int, ...]:
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


def _names(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


# --- from declarations ----------------------------------------------------------------------------


def resolve(
    inputs: Sequence[InputInfo], *, request: Sequence[str] = (), spec: Mapping[str, Any] | None = None
) -> Roles:
    """Work out the role of every input from `--request` patterns and a roles file.

    Args:
        inputs: The graph inputs, in order.
        request: Names, globs on names, or columns such as `X[0:13,20]`.
        spec: A roles file as `load_spec` returns it.

    Raises:
        UsageError: If the roles name what is not there, contradict themselves, or name nothing.
        ModelError: If the model cannot have candidate rows: dynamic rank, or a static batch.
    """
    _refuse_unusable(inputs)
    names = [info.name for info in inputs]
    parsed = _Spec() if spec is None else _read_spec(spec, "the roles file")
    entries = _match_entries(parsed.inputs, names)
    claims = _merge_claims(
        {
            "--request": _match_patterns((request,) if isinstance(request, str) else request, names, "--request"),
            "request in the roles file": _match_patterns(parsed.request, names, "request in the roles file"),
            "inputs in the roles file": {
                name: entry.claim for name, entry in entries.items() if entry.claim is not None
            },
        }
    )
    axes: dict[str, int | None] = {}
    for info in inputs:
        axes[info.name] = _candidate_axis(info, entries.get(info.name, _Entry()), parsed.candidate_axis)
    moving = any(not isinstance(_dim(info, axes[info.name]), int) for info in inputs if axes[info.name] is not None)
    one_row = {
        info.name: _has_one_row(info, axes[info.name], entries.get(info.name, _Entry()).axis_given, moving)
        for info in inputs
    }
    if all(claim == "candidate" for claim in claims.values()) and not any(one_row[i.name] and i.dims for i in inputs):
        raise UsageError(_nothing_named(inputs))

    roles: dict[str, InputRole] = {}
    for info in inputs:
        claim, entry = claims.get(info.name), entries.get(info.name, _Entry())
        roles[info.name] = (
            _one_row_role(info, claim, entry)
            if one_row[info.name]
            else _row_role(info, claim or "candidate", entry, axes[info.name] or 0)
        )
    if all(role.level == "request" for role in roles.values()):
        raise UsageError(
            f"Every input is request-level ({_names(names)}), so there is nothing to tell candidates apart "
            "by. Name only what is the same for all candidates of a request."
        )
    return Roles(roles)


def check_positions(info: InputInfo, role: InputRole) -> None:
    """Refuse positions along an axis that has no fixed extent: which of them there are differs from call to call.

    Raises:
        UsageError: The role has such positions.
    """
    if role.axis is None or isinstance(_dim(info, role.axis), int):
        return
    where = f"Axis {role.axis} of input {_describe(info)} has no fixed extent, so it cannot have"
    if role.request:
        raise UsageError(
            f"{where} request-level positions ({format_ranges(role.request)}). Export the model with a fixed extent "
            "there, or name the whole input."
        )
    if any(r.positions is not None for r in role.ranges):
        raise UsageError(f"{where} value ranges of positions. Give one for all of them, range: [low, high).")


def _match_patterns(patterns: Sequence[str], names: Sequence[str], where: str) -> dict[str, _Claim]:
    """Return what a list of patterns says of each input; columns of one input add up."""
    claims: dict[str, _Claim] = {}
    for pattern in patterns:
        matched, positions = _match(pattern, names, where)
        for name in matched:
            claim: _Claim = "request" if positions is None else positions
            before = claims.get(name, claim)
            if isinstance(before, str) != isinstance(claim, str):
                raise UsageError(
                    f"{where} is contradictory: input {name!r} is named as a whole and by columns. Keep one of the two."
                )
            if isinstance(before, tuple) and isinstance(claim, tuple):
                claim = tuple(sorted({*before, *claim}))
            claims[name] = claim
    return claims


def _match(pattern: str, names: Sequence[str], where: str) -> tuple[list[str], tuple[int, ...] | None]:
    """Return the inputs a pattern names, and the positions if it names columns."""
    if pattern in names:
        return [pattern], None
    base, bracket, text = pattern.removesuffix("]").rpartition("[")
    columns = bool(bracket) and pattern.endswith("]") and base in names
    if columns and re.fullmatch(r"[0-9:,\s]+", text):
        return [base], _positions(text, f"{where} {pattern!r}")
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if matched:
        return matched, None
    if columns:
        return [base], _positions(text, f"{where} {pattern!r}")
    raise UsageError(_unknown(pattern, base if bracket else pattern, names, where))


def _unknown(pattern: str, name: str, names: Sequence[str], where: str) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
    return f"{where}: {pattern!r} matches no input.{hint} The inputs are {_names(names) or 'none'}."


def _match_entries(entries: Mapping[str, _Entry], names: Sequence[str]) -> dict[str, _Entry]:
    """Return the entry of each input: the one under its own name, else that of the pattern that matches."""
    found: dict[str, tuple[str, _Entry]] = {}
    for key, entry in entries.items():
        if key in names:
            continue
        matched = [name for name in names if fnmatchcase(name, key)]
        if not matched:
            raise UsageError(_unknown(key, key, names, "inputs in the roles file"))
        for name in matched:
            if name in entries:
                continue
            other, before = found.setdefault(name, (key, entry))
            if before != entry:
                raise UsageError(
                    f"The roles file is contradictory: {other!r} and {key!r} both match input {name!r} and "
                    f"differ. Give {name!r} an entry of its own."
                )
    by_name = {name: entry for name, (_, entry) in found.items()}
    return by_name | {name: entry for name, entry in entries.items() if name in names}


def _merge_claims(sources: Mapping[str, Mapping[str, _Claim]]) -> dict[str, _Claim]:
    merged: dict[str, tuple[str, _Claim]] = {}
    for where, claims in sources.items():
        for name, claim in claims.items():
            other, before = merged.setdefault(name, (where, claim))
            if before != claim:
                raise UsageError(
                    f"The roles are contradictory: input {name!r} is {_say(before)} by {other} and "
                    f"{_say(claim)} by {where}. Keep one of the two."
                )
    return {name: claim for name, (_, claim) in merged.items()}


def _say(claim: _Claim) -> str:
    return f"{claim}-level" if isinstance(claim, str) else f"request-level at {format_ranges(claim)}"


def _dims(info: InputInfo) -> tuple[int | str | None, ...]:
    assert info.dims is not None, "resolve has refused unknown ranks"
    return info.dims


def _dim(info: InputInfo, axis: int | None) -> int | str | None:
    return None if axis is None else _dims(info)[axis]


def _static(info: InputInfo) -> bool:
    return all(isinstance(dim, int) for dim in _dims(info))


def _candidate_axis(info: InputInfo, entry: _Entry, default: int | None) -> int | None:
    """Return the axis that is to run over candidates, None if there is none."""
    wanted, rank = entry.candidate_axis if entry.axis_given else default, len(_dims(info))
    if wanted is None or (rank == 0 and not entry.axis_given):
        return None
    if -rank <= wanted < rank:
        return wanted % rank
    if _static(info) and not entry.axis_given:
        return None
    raise UsageError(
        f"Candidate axis not found: input {_describe(info)} has {rank} axes, so no axis {wanted}. Give it "
        "its own candidate_axis in the roles file (null if it carries one row per request)."
    )


def _has_one_row(info: InputInfo, axis: int | None, given: bool, moving: bool) -> bool:
    """Tell whether an input has one row per request already, beside others that have one per candidate."""
    return axis is None or (moving and (_dim(info, axis) == 1 or (_static(info) and not given)))


def _one_row_role(info: InputInfo, claim: _Claim | None, entry: _Entry) -> InputRole:
    if claim not in (None, "request"):
        said = "candidate-level" if claim == "candidate" else "partly candidate-level"
        raise UsageError(
            f"The roles are contradictory: input {_describe(info)} carries one row per request, so it "
            f"cannot be {said}. Leave it out of the roles, or give it a candidate_axis of symbolic size."
        )
    axis = _position_axis(info, entry, None, None) if any(r.positions is not None for r in entry.ranges) else None
    return InputRole(info.name, "request", None, axis=axis, ranges=entry.ranges)


def _row_role(info: InputInfo, claim: _Claim, entry: _Entry, candidate_axis: int) -> InputRole:
    if claim == "request" and _dim(info, candidate_axis) == 1:
        return _one_row_role(info, claim, entry)
    if isinstance(_dim(info, candidate_axis), int):
        raise ModelError(_static_batch(info, candidate_axis))
    if entry.record is not None and len(_dims(info)) != 1:
        raise UsageError(
            f"Input {_describe(info)} cannot hold flat records of {entry.record}: only an input with one axis can."
        )
    level, request = (claim, ()) if isinstance(claim, str) else ("mixed", claim)
    axis = None
    if request or any(r.positions is not None for r in entry.ranges):
        axis = _position_axis(info, entry, candidate_axis, request)
    extent = entry.record if axis is None else _dim(info, axis)
    if request and len(request) == extent:
        level, request = "request", ()
        if all(r.positions is None for r in entry.ranges):
            axis = None
    return InputRole(info.name, level, candidate_axis, axis, request, entry.record, entry.ranges)


def _position_axis(
    info: InputInfo, entry: _Entry, candidate_axis: int | None, request: Sequence[int] | None
) -> int | None:
    """Return the axis that positions count along (None: within the record), and check that they lie on it."""
    rank = len(_dims(info))
    axis: int | None = None
    extent: int | str | None
    if entry.record is not None and candidate_axis is not None:
        extent, what = entry.record, f"the record of {entry.record} entries"
    else:
        if entry.axis is not None:
            if not -rank <= entry.axis < rank or entry.axis % rank == candidate_axis:
                raise UsageError(
                    f"Positions of input {_describe(info)} cannot lie along axis {entry.axis}: it must be "
                    "one of the input's axes other than the candidate axis."
                )
            axis = entry.axis % rank
        elif rank == 2:
            axis = 1 if candidate_axis is None else 1 - candidate_axis
        elif rank == 1 and candidate_axis is None:
            axis = 0
        else:
            raise UsageError(
                f"Input {_describe(info)} is no matrix, so it is open along which axis its positions lie. "
                "Say so in the roles file: axis, or record for flat rows."
            )
        extent = _dim(info, axis)
        what = f"axis {axis}, which has {extent} positions"
    for positions in [request or (), *(r.positions or () for r in entry.ranges)]:
        if isinstance(extent, int) and positions and positions[-1] >= extent:
            raise UsageError(
                f"The range {format_ranges(positions)} of input {_describe(info)} lies outside {what}. "
                "Ranges are half-open and start at 0."
            )
    return axis


def _refuse_unusable(inputs: Sequence[InputInfo]) -> None:
    """Refuse what no roles can help: an unknown rank, or a size for every axis of every input."""
    for info in inputs:
        if info.dims is None:
            raise ModelError(
                f"Input {info.name!r} has a dynamic rank: its number of dimensions is unknown. Export the "
                "model again with a shape for every input."
            )
    ranked = [info for info in inputs if info.dims]
    if not ranked:
        raise ModelError("The model has no input with an axis, so there are no candidates to score.")
    if all(_static(info) for info in ranked):
        raise ModelError(_static_batch(ranked[0], 0))


def _static_batch(info: InputInfo, axis: int) -> str:
    return (
        f"Input {_describe(info)} has the fixed size {_dim(info, axis)} on its candidate axis {axis}: the "
        "model was exported with a static batch. Export it again with a symbolic one (torch.onnx.export: "
        f"dynamic_axes={{{info.name!r}: {{{axis}: 'N'}}}} or dynamic_shapes; tf2onnx: None for the batch in "
        "the input signature), or set candidate_axis in the roles file if the candidates lie along another "
        "axis."
    )


def _describe(info: InputInfo) -> str:
    return f"{info.name!r} ({_signature(info)})"


def _signature(info: InputInfo) -> str:
    try:
        dtype = TensorProto.DataType.Name(info.elem_type).lower()
    except ValueError:
        dtype = f"type {info.elem_type}"
    return f"{dtype}[{', '.join('?' if dim is None else str(dim) for dim in _dims(info))}]"


def _nothing_named(inputs: Sequence[InputInfo]) -> str:
    first = next(info for info in inputs if info.dims)
    example = first.name
    if len(inputs) == 1 and len(_dims(first)) == 2:
        width = _dims(first)[1]
        example += f"[0:{width // 2}]" if isinstance(width, int) and width > 1 else "[0:8]"
    listing = "\n".join(f"  {info.name}  {_signature(info)}" for info in inputs)
    return (
        "Nothing says which inputs are the same for all candidates of a request. Name them with "
        "--request (a name, a "
        "glob, or columns such as X[0:13,20]), --roles FILE or --infer-roles DATA.npz. The inputs are:\n"
        f"{listing}\nFor example: --request '{example}'"
    )


# --- from recorded requests -----------------------------------------------------------------------


def infer(inputs: Sequence[InputInfo], data: Mapping[str, np.ndarray[Any, Any]]) -> tuple[Roles, list[str]]:
    """Work out roles from recorded requests: request-level is what is constant within every request.

    Args:
        inputs: The graph inputs, in order.
        data: An array per input with a row per candidate along axis 0, and optionally `request_id` [rows];
            without it all rows are one request. Inputs with one row per request may be left out.

    Returns:
        The roles, with the values seen in integer inputs as ranges, and a line per input saying what it is.

    Raises:
        UsageError: If the data does not fit the inputs or cannot tell request-level from candidate-level.
        ModelError: If the model cannot have candidate rows.
    """
    _refuse_unusable(inputs)
    moving = any(info.dims and not isinstance(info.dims[0], int) for info in inputs)
    fixed = {info.name for info in inputs if _has_one_row(info, 0 if info.dims else None, False, moving)}
    rowed = [info for info in inputs if info.name not in fixed]
    _check_data(inputs, rowed, data)
    ids = np.asarray(data.get("request_id", np.zeros(len(data[rowed[0].name]))))
    _, first, inverse, counts = np.unique(ids.reshape(-1), return_index=True, return_inverse=True, return_counts=True)
    if not (counts >= 2).any():
        raise UsageError(
            "The recorded data has no request with two rows or more, so nothing can be seen to be constant "
            "within one. Record several candidates per request, with request_id saying which rows belong "
            "together."
        )

    entries: dict[str, Any] = {}
    notes: list[str] = []
    for info in inputs:
        if info.name in fixed:
            notes.append(f"{info.name}: request-level (one row per request by its shape)")
            continue
        array = np.asarray(data[info.name])
        constant = _constant(array, array[first[inverse]])
        everywhere = _constant(array, array[:1])
        entry: dict[str, Any] = {"level": "candidate"}
        note = "candidate-level"
        if constant.all():
            entry = {"level": "request"}
            how = _how_constant(bool(everywhere.all()), len(first))
            note = f"request-level ({how})"
        elif array.ndim == 2 and constant.any() and not isinstance(_dims(info)[1], int):
            note += f" (its axis 1 has no fixed extent, so that the constant columns {_columns(constant)} do not count)"
        elif array.ndim == 2 and constant.any():
            entry = {"request": _columns(constant)}
            how = _how_constant(False, len(first))
            note = f"columns {entry['request']} request-level ({how}), others candidate-level"
            if everywhere.any():
                note += f"; columns {_columns(everywhere)} {_how_constant(True, len(first))}"
        if info.elem_type in _INTEGERS and array.size:
            seen = _values_seen(array, by_column=array.ndim == 2 and isinstance(_dims(info)[1], int))
            entry |= {"range": seen[0][1]} if len(seen) == 1 else {"ranges": dict(seen)}
            note += f"; values in [{int(array.min())}, {int(array.max()) + 1})"
        entries[info.name] = entry
        notes.append(f"{info.name}: {note}")

    for info in rowed:
        rows = _dims(info)[0]
        if isinstance(rows, int) and rows != 1:
            raise ModelError(_static_batch(info, 0))
    levels = {entry.get("level", "mixed") for entry in entries.values()}
    if levels == {"request"}:
        raise UsageError(
            "Every input is constant within every request of the recorded data, so candidates cannot be "
            "told apart. Record requests with different candidates, and check request_id."
        )
    if levels == {"candidate"} and not any(info.name in fixed and info.dims for info in inputs):
        raise UsageError(
            "No input and no column is constant within every request of the recorded data, so nothing is "
            "request-level. Check that request_id says which rows belong together."
        )
    return resolve(inputs, spec={"inputs": entries}), notes


def _check_data(
    inputs: Sequence[InputInfo], rowed: Sequence[InputInfo], data: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    missing = [info.name for info in rowed if info.name not in data]
    if missing:
        raise UsageError(f"The recorded data has no key for input {_names(missing)}. It needs one per input.")
    unknown = sorted(set(data) - {info.name for info in inputs} - {"request_id"})
    if unknown:
        raise UsageError(
            f"The recorded data has the key {_names(unknown)}, which is no input. The inputs are "
            f"{_names([info.name for info in inputs])}; request_id is allowed beside them."
        )
    for info in rowed:
        array = np.asarray(data[info.name])
        dims = _dims(info)
        if array.ndim != len(dims) or any(
            isinstance(dim, int) and dim != size for dim, size in zip(dims[1:], array.shape[1:], strict=True)
        ):
            raise UsageError(
                f"The recorded array of input {_describe(info)} has the shape {list(array.shape)}, which "
                "does not fit. Record what the model is fed, with a row per candidate."
            )
        if info.elem_type in _INTEGERS and array.dtype.kind not in "iu":
            raise UsageError(
                f"The recorded array of input {info.name!r} holds {array.dtype} values; the input takes "
                "integers. Record what the model is fed."
            )
    rows = {info.name: len(np.asarray(data[info.name])) for info in rowed}
    if "request_id" in data:
        shape = np.shape(data["request_id"])
        if not shape or math.prod(shape) != shape[0]:
            raise UsageError(f"request_id in the recorded data has the shape {list(shape)}; it needs one id per row.")
        rows["request_id"] = shape[0]
    if len(set(rows.values())) > 1:
        listing = ", ".join(f"{name!r} {count}" for name, count in rows.items())
        raise UsageError(
            f"The recorded arrays differ in their number of rows: {listing}. All need a row per candidate."
        )


def _how_constant(everywhere: bool, requests: int) -> str:
    if requests == 1:
        return "constant over the only request"
    return f"constant over all {requests} requests" if everywhere else f"constant within each of {requests} requests"


def _constant(array: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return, per position of a row, whether all rows equal their reference; NaN equals NaN."""
    same = (array == reference) | ((array != array) & (reference != reference))
    return np.asarray(np.asarray(same).all(axis=0))


def _columns(flags: np.ndarray[Any, Any]) -> str:
    return format_ranges(np.flatnonzero(flags).tolist())


def _values_seen(array: np.ndarray[Any, Any], by_column: bool) -> list[tuple[str, list[int]]]:
    """Return the [low, high) of what an integer array holds, if by column one item per group of columns alike."""
    columns = array if by_column else array.reshape(-1, 1)
    found: dict[tuple[int, int], list[int]] = {}
    for position, (low, high) in enumerate(
        zip(columns.min(axis=0).tolist(), columns.max(axis=0).tolist(), strict=True)
    ):
        found.setdefault((low, high + 1), []).append(position)
    return [(format_ranges(positions), [low, high]) for (low, high), positions in found.items()]
