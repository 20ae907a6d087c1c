"""What a role is, and the form that contracts store it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onnxrank.errors import ModelError, UsageError
from onnxrank.roles.positions import format_ranges, parse_ranges

LEVELS = ("request", "candidate", "mixed")


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
    if d["level"] not in LEVELS:
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
