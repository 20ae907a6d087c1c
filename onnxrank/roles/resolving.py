"""The role of every input, from patterns and a roles file."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from onnxrank.errors import ModelError, UsageError
from onnxrank.roles.declared import (
    describe,
    dim_of,
    dims_of,
    has_one_row,
    is_static,
    listed,
    refuse_unusable,
    signature,
    static_batch,
)
from onnxrank.roles.files import Claim, Entry, Spec, positions_of, read_spec
from onnxrank.roles.positions import format_ranges
from onnxrank.roles.role import InputInfo, InputRole, Roles


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
    refuse_unusable(inputs)
    names = [info.name for info in inputs]
    parsed = Spec() if spec is None else read_spec(spec, "the roles file")
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
        axes[info.name] = _candidate_axis(info, entries.get(info.name, Entry()), parsed.candidate_axis)
    moving = any(not isinstance(dim_of(info, axes[info.name]), int) for info in inputs if axes[info.name] is not None)
    one_row = {
        info.name: has_one_row(info, axes[info.name], entries.get(info.name, Entry()).axis_given, moving)
        for info in inputs
    }
    if all(claim == "candidate" for claim in claims.values()) and not any(one_row[i.name] and i.dims for i in inputs):
        raise UsageError(_nothing_named(inputs))

    roles: dict[str, InputRole] = {}
    for info in inputs:
        claim, entry = claims.get(info.name), entries.get(info.name, Entry())
        roles[info.name] = (
            _one_row_role(info, claim, entry)
            if one_row[info.name]
            else _row_role(info, claim or "candidate", entry, axes[info.name] or 0)
        )
    if all(role.level == "request" for role in roles.values()):
        raise UsageError(
            f"Every input is request-level ({listed(names)}), so there is nothing to tell candidates apart "
            "by. Name only what is the same for all candidates of a request."
        )
    return Roles(roles)


def check_positions(info: InputInfo, role: InputRole) -> None:
    """Refuse positions along an axis that has no fixed extent: which of them there are differs from call to call.

    Raises:
        UsageError: The role has such positions.
    """
    if role.axis is None or isinstance(dim_of(info, role.axis), int):
        return
    where = f"Axis {role.axis} of input {describe(info)} has no fixed extent, so it cannot have"
    if role.request:
        raise UsageError(
            f"{where} request-level positions ({format_ranges(role.request)}). Export the model with a fixed extent "
            "there, or name the whole input."
        )
    if any(r.positions is not None for r in role.ranges):
        raise UsageError(f"{where} value ranges of positions. Give one for all of them, range: [low, high).")


def _match_patterns(patterns: Sequence[str], names: Sequence[str], where: str) -> dict[str, Claim]:
    """Return what a list of patterns says of each input; columns of one input add up."""
    claims: dict[str, Claim] = {}
    for pattern in patterns:
        matched, positions = _match(pattern, names, where)
        for name in matched:
            claim: Claim = "request" if positions is None else positions
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
        return [base], positions_of(text, f"{where} {pattern!r}")
    matched = [name for name in names if fnmatchcase(name, pattern)]
    if matched:
        return matched, None
    if columns:
        return [base], positions_of(text, f"{where} {pattern!r}")
    raise UsageError(_unknown(pattern, base if bracket else pattern, names, where))


def _unknown(pattern: str, name: str, names: Sequence[str], where: str) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(other) for other in near)}?" if near else ""
    return f"{where}: {pattern!r} matches no input.{hint} The inputs are {listed(names) or 'none'}."


def _match_entries(entries: Mapping[str, Entry], names: Sequence[str]) -> dict[str, Entry]:
    """Return the entry of each input: the one under its own name, else that of the pattern that matches."""
    found: dict[str, tuple[str, Entry]] = {}
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


def _merge_claims(sources: Mapping[str, Mapping[str, Claim]]) -> dict[str, Claim]:
    merged: dict[str, tuple[str, Claim]] = {}
    for where, claims in sources.items():
        for name, claim in claims.items():
            other, before = merged.setdefault(name, (where, claim))
            if before != claim:
                raise UsageError(
                    f"The roles are contradictory: input {name!r} is {_say(before)} by {other} and "
                    f"{_say(claim)} by {where}. Keep one of the two."
                )
    return {name: claim for name, (_, claim) in merged.items()}


def _say(claim: Claim) -> str:
    return f"{claim}-level" if isinstance(claim, str) else f"request-level at {format_ranges(claim)}"


def _candidate_axis(info: InputInfo, entry: Entry, default: int | None) -> int | None:
    """Return the axis that is to run over candidates, None if there is none."""
    wanted, rank = entry.candidate_axis if entry.axis_given else default, len(dims_of(info))
    if wanted is None or (rank == 0 and not entry.axis_given):
        return None
    if -rank <= wanted < rank:
        return wanted % rank
    if is_static(info) and not entry.axis_given:
        return None
    raise UsageError(
        f"Candidate axis not found: input {describe(info)} has {rank} axes, so no axis {wanted}. Give it "
        "its own candidate_axis in the roles file (null if it carries one row per request)."
    )


def _one_row_role(info: InputInfo, claim: Claim | None, entry: Entry) -> InputRole:
    if claim not in (None, "request"):
        said = "candidate-level" if claim == "candidate" else "partly candidate-level"
        raise UsageError(
            f"The roles are contradictory: input {describe(info)} carries one row per request, so it "
            f"cannot be {said}. Leave it out of the roles, or give it a candidate_axis of symbolic size."
        )
    axis = _position_axis(info, entry, None, None) if any(r.positions is not None for r in entry.ranges) else None
    return InputRole(info.name, "request", None, axis=axis, ranges=entry.ranges)


def _row_role(info: InputInfo, claim: Claim, entry: Entry, candidate_axis: int) -> InputRole:
    if claim == "request" and dim_of(info, candidate_axis) == 1:
        return _one_row_role(info, claim, entry)
    if isinstance(dim_of(info, candidate_axis), int):
        raise ModelError(static_batch(info, candidate_axis))
    if entry.record is not None and len(dims_of(info)) != 1:
        raise UsageError(
            f"Input {describe(info)} cannot hold flat records of {entry.record}: only an input with one axis can."
        )
    level, request = (claim, ()) if isinstance(claim, str) else ("mixed", claim)
    axis = None
    if request or any(r.positions is not None for r in entry.ranges):
        axis = _position_axis(info, entry, candidate_axis, request)
    extent = entry.record if axis is None else dim_of(info, axis)
    if request and len(request) == extent:
        level, request = "request", ()
        if all(r.positions is None for r in entry.ranges):
            axis = None
    return InputRole(info.name, level, candidate_axis, axis, request, entry.record, entry.ranges)


def _position_axis(
    info: InputInfo, entry: Entry, candidate_axis: int | None, request: Sequence[int] | None
) -> int | None:
    """Return the axis that positions count along (None: within the record), and check that they lie on it."""
    rank = len(dims_of(info))
    axis: int | None = None
    extent: int | str | None
    if entry.record is not None and candidate_axis is not None:
        extent, what = entry.record, f"the record of {entry.record} entries"
    else:
        if entry.axis is not None:
            if not -rank <= entry.axis < rank or entry.axis % rank == candidate_axis:
                raise UsageError(
                    f"Positions of input {describe(info)} cannot lie along axis {entry.axis}: it must be "
                    "one of the input's axes other than the candidate axis."
                )
            axis = entry.axis % rank
        elif rank == 2:
            axis = 1 if candidate_axis is None else 1 - candidate_axis
        elif rank == 1 and candidate_axis is None:
            axis = 0
        else:
            raise UsageError(
                f"Input {describe(info)} is no matrix, so it is open along which axis its positions lie. "
                "Say so in the roles file: axis, or record for flat rows."
            )
        extent = dim_of(info, axis)
        what = f"axis {axis}, which has {extent} positions"
    for positions in [request or (), *(r.positions or () for r in entry.ranges)]:
        if isinstance(extent, int) and positions and positions[-1] >= extent:
            raise UsageError(
                f"The range {format_ranges(positions)} of input {describe(info)} lies outside {what}. "
                "Ranges are half-open and start at 0."
            )
    return axis


def _nothing_named(inputs: Sequence[InputInfo]) -> str:
    first = next(info for info in inputs if info.dims)
    example = first.name
    if len(inputs) == 1 and len(dims_of(first)) == 2:
        width = dims_of(first)[1]
        example += f"[0:{width // 2}]" if isinstance(width, int) and width > 1 else "[0:8]"
    listing = "\n".join(f"  {info.name}  {signature(info)}" for info in inputs)
    return (
        "Nothing says which inputs are the same for all candidates of a request. Name them with "
        "--request (a name, a "
        "glob, or columns such as X[0:13,20]), --roles FILE or --infer-roles DATA.npz. The inputs are:\n"
        f"{listing}\nFor example: --request '{example}'"
    )
