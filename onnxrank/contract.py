"""The contract: what an optimised model says of itself in its metadata, and what follows for the next run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank.errors import ModelError, UsageError
from onnxrank.roles import InputInfo, InputRole, Roles, ValueRange, infer, resolve

CONTRACT = "onnxrank.contract"
"""Key of the contract in a model's metadata."""
PACKED = "packed"
"""Where a contract says which columns of the matrices are whose, for a model that takes its inputs side by side."""
RULE = "onnxrank.rule"
"""Key, in a node's metadata, of the rule that made or changed the node; nodes of the user's own have none."""


def stored_contract(model: ModelProto) -> dict[str, Any] | None:
    """The contract in a model's metadata."""
    for p in model.metadata_props:
        if p.key == CONTRACT:
            try:
                found = json.loads(p.value)
            except (ValueError, RecursionError):
                return None
            return found if isinstance(found, dict) else None
    return None


def store(model: ModelProto, contract: Mapping[str, Any]) -> None:
    """Puts a contract into a model's metadata, in place of any that is there."""
    forget(model)
    model.metadata_props.add(key=CONTRACT, value=json.dumps(contract, sort_keys=True))


def forget(model: ModelProto) -> None:
    """Takes the contract out of a model's metadata."""
    for k in [k for k, p in enumerate(model.metadata_props) if p.key == CONTRACT][::-1]:
        del model.metadata_props[k]


def is_done(
    contract: Mapping[str, Any],
    described: Sequence[InputInfo],
    roles: Roles,
    interface: str,
    span: tuple[int, int],
    rules: Sequence[str],
    lengths: Mapping[str, tuple[int, int]],
) -> bool:
    """Whether this version has optimised the model already, for the same use.

    Args:
        contract: The model's contract.
        described: The model's inputs.
        roles: Their roles now: those given, or those of the contract.
        interface: `request` or `same`.
        span: Expected number of candidates, least and most.
        rules: Names of the rules that are allowed, sorted.
        lengths: Least and most of the lengths that are declared.
    """
    served = contract.get("lengths")
    if any(not isinstance(served, dict) or served.get(name) != list(span) for name, span in lengths.items()):
        return False
    mine = {
        "version": metadata.version("onnxrank"),
        "interface": interface,
        "candidates": list(span),
        "offered": list(rules),
    }
    if any(contract.get(key) != value for key, value in mine.items()):
        return False
    then = Roles.from_dict(contract.get("roles", {}))
    return same_roles(roles, then) or same_roles(roles, roles_again(described, contract))


def same_roles(some: Roles, others: Roles) -> bool:
    """Whether the same entries are request-level; ranges do not matter."""
    plain = ({name: replace(role, ranges=()) for name, role in r.inputs.items()} for r in (some, others))
    return next(plain) == next(plain)


def find_roles(
    described: Sequence[InputInfo],
    contract: Mapping[str, Any] | None = None,
    *,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
    lenient: bool = False,
) -> tuple[Roles, list[str]]:
    """The roles of a model's inputs, from what is given or from its contract.

    Args:
        described: The inputs.
        contract: The contract in the model's metadata, if any; it takes the place of `request` and `spec`.
        request: Patterns on input names.
        spec: A roles file's content.
        infer_from: Recorded requests.
        lenient: Whether a model of which nothing is said counts as candidate-level throughout.

    Returns:
        The roles, and what the user should know of them.

    Raises:
        UsageError: The roles are wrong, or nothing is said and `lenient` is false.
        ModelError: The model cannot have candidate rows.
    """
    if infer_from is not None:
        return infer(described, infer_from)
    if contract is not None:
        return roles_again(described, contract), ["the model was optimised before; its roles are those of its contract"]
    try:
        return resolve(described, request=request, spec=spec), []
    except UsageError:
        if not lenient or request or spec is not None:
            raise
    roles = {i.name: InputRole(i.name, "candidate", 0 if i.dims else None) for i in described}
    return Roles(roles), ["no input is declared request-level, so all count as candidate-level: see --request"]


def roles_again(described: Sequence[InputInfo], contract: Mapping[str, Any]) -> Roles:
    """Roles of a model that was optimised before: request-level inputs have their one row by now.

    Under the interface `same` rows are taken inside, and every input counts as candidate-level from outside.

    Raises:
        ModelError: The contract's roles cannot be read, or do not fit the inputs.
    """
    before = Roles.from_dict(contract.get("roles", {})).inputs
    interface = contract.get("interface")
    if interface in ("batch", "padded"):
        raise ModelError(
            f"The model takes several requests per call (interface {interface}). Give the original instead."
        )
    if contract.get(PACKED):
        raise ModelError("The model takes its inputs side by side (--pack-inputs). Give the original instead.")
    if interface not in ("request", "same"):
        raise ModelError(f"The stored interface {interface!r} is not known. Optimise the original model again.")
    odd = next((r for r in before.values() if bool(r.request) != (r.level == "mixed")), None)
    if odd is not None:
        raise ModelError(
            f"The stored roles contradict themselves: {odd.name!r} is {odd.level!r}, with the request-level positions "
            f"{list(odd.request)}. Optimise the original model again."
        )
    divided = interface == "request"
    out: dict[str, InputRole] = {}
    for info in described:
        stem, _, part = info.name.rpartition(".")
        role = before.get(info.name) or before.get(stem)
        if role is not None and info.dims is not None:
            _check_fit(role, len(info.dims))
        axis = 0 if role is None else role.candidate_axis
        record = None if role is None else role.record
        once = role is not None and divided and (part == "request" or role.level == "request")
        if role is not None and divided and info.name not in before and record is not None:
            record = record - len(role.request) if part == "candidate" else None
        level = "request" if once or axis is None else "candidate"
        ranges = () if role is None else _moved_ranges(role, part if info.name not in before else "")
        along = 0 if record is not None or role is None or role.axis is None else role.axis
        out[info.name] = InputRole(
            info.name,
            level,
            None if once else axis,
            axis=along if any(r.positions is not None for r in ranges) else None,
            record=None if once else record,
            ranges=ranges,
        )
    return Roles(out)


def _check_fit(role: InputRole, rank: int) -> None:
    """Refuses roles that speak of axes which an input does not have.

    Raises:
        ModelError: They do.
    """
    for name, axis in (("candidate_axis", role.candidate_axis), ("axis", role.axis)):
        if axis is not None and axis >= max(rank, 1):
            raise ModelError(
                f"The stored roles do not fit the model: {name} of {role.name!r} is {axis}, and it has {rank} axes. "
                "Optimise the original model again."
            )


def _moved_ranges(role: InputRole, part: str) -> tuple[ValueRange, ...]:
    """Ranges of an input, or of one part of one that was divided: positions count within the part."""
    if not part:
        return role.ranges
    out = []
    taken = set(role.request)
    for r in role.ranges:
        if r.positions is None:
            out.append(r)
            continue
        before = sorted(taken) if part == "request" else [k for k in range(max(r.positions) + 1) if k not in taken]
        kept = tuple(before.index(p) for p in r.positions if (p in taken) == (part == "request"))
        if kept:
            out.append(replace(r, positions=kept))
    return tuple(out)
