"""How the second model's inputs are made of the first's, and under which roles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto

from onnxrank import feeds
from onnxrank.contract import roles_again, stored_contract
from onnxrank.errors import UsageError
from onnxrank.feeds import Feed, Input
from onnxrank.roles import InputInfo, InputRole, Roles, resolve
from onnxrank.verify.inputs import take


@dataclass(frozen=True)
class Terms:
    """The contract that two models are compared under.

    Attributes:
        source: Where it came from.
        roles: Roles of the original's inputs.
        notes: What should be said of it.
    """

    source: str
    roles: Roles
    notes: tuple[str, ...] = ()


def terms(
    original: ModelProto,
    optimized: ModelProto,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    roles: Roles | None = None,
) -> Terms:
    """Finds the contract: what is given, else what the second model stores, else what its inputs' shapes tell.

    Raises:
        UsageError: Roles are given that do not fit, or columns of an input were divided and nobody says which.
        ModelError: The model cannot have candidates.
    """
    described = feeds.describe(original)
    if roles is not None:
        return Terms("given", roles)
    if request or spec is not None:
        return Terms("given", resolve(described, request=request, spec=spec))
    stored = stored_contract(optimized)
    before = stored_contract(original)
    names = {i.name for i in described}
    notes = []
    if before is not None:
        return Terms("stored in the original", roles_again(described, before))
    if stored is not None:
        found = Roles.from_dict(stored.get("roles", {}))
        if set(found.inputs) == names:
            return Terms("stored in the optimized model", found)
        notes.append("the contract stored in the optimized model names other inputs than the original has")
    return Terms("told by the shapes of the inputs", _told(described, feeds.describe(optimized)), tuple(notes))


def _told(described: Sequence[InputInfo], other: Sequence[InputInfo]) -> Roles:
    """Roles from what the second model takes: one row where the original takes many is request-level."""
    by_name = {i.name: i for i in other}
    renamed = dict(zip((i.name for i in described), other, strict=False)) if _in_order(described, other) else {}
    out = {}
    for info in described:
        if f"{info.name}.request" in by_name:
            raise UsageError(
                f"The optimized model takes {info.name!r} in two parts, and nothing says which columns are "
                f"request-level. Say it with --request '{info.name}[0:8]' or --roles FILE."
            )
        twin = by_name.get(info.name) or renamed.get(info.name)
        dims, its = info.dims or (), (twin.dims if twin is not None else None) or ()
        once = [
            k for k, (a, b) in enumerate(zip(dims, its, strict=False)) if not isinstance(a, int) and b == 1
        ]  # fmt: skip
        open_axes = [k for k, d in enumerate(dims) if not isinstance(d, int)]
        if once and len(dims) == len(its):
            out[info.name] = InputRole(info.name, "request", once[0])
        elif not open_axes or (0 not in open_axes and dims[0] == 1):
            out[info.name] = InputRole(info.name, "request", None)
        else:
            out[info.name] = InputRole(info.name, "candidate", open_axes[0])
    if not any(r.candidate_axis is not None for r in out.values()):
        resolve(described)  # says what is wrong with such a model
    return Roles(out)


def _in_order(described: Sequence[InputInfo], other: Sequence[InputInfo]) -> bool:
    """Whether no input has its name in both models, and each fits the one at its place."""
    if {i.name for i in described} & {i.name for i in other} or len(described) != len(other):
        return False
    return all(
        len(a.dims or ()) == len(b.dims or ()) and a.elem_type == b.elem_type
        for a, b in zip(described, other, strict=True)
    )


@dataclass(frozen=True)
class Binding:
    """Where each input of the second model comes from.

    Attributes:
        declared: Inputs of the original.
        sources: Per input of the second model an input of the original, or `X.request` or `X.candidate` for a part of
            `X`, and whether only one row of it is taken.
        missing: Inputs of the original that the second model does not take.
        strange: Inputs of the second model that nothing is known of.
        renamed: Whether inputs were matched by their order.
        misfits: Inputs whose shape contradicts the roles, in words.
    """

    declared: tuple[Input, ...]
    sources: Mapping[str, tuple[str, bool]]
    missing: tuple[str, ...]
    strange: tuple[str, ...]
    renamed: bool
    misfits: tuple[str, ...]

    def __call__(self, feed: Mapping[str, Any]) -> Feed:
        """Inputs of the second model from those of the original."""
        parts = feeds.divided(self.declared, feed)
        return {
            name: parts[source] if once or source not in feed else feed[source]
            for name, (source, once) in self.sources.items()
        }

    def without_candidates(self, feed: Mapping[str, Any]) -> tuple[Feed, Feed]:
        """Inputs of both models for a request with no candidate, from the original's for one with a single one."""
        none = take(self.declared, feed, [])
        one, cut = self(feed), self(none)
        request = {
            name
            for name, (source, once) in self.sources.items()
            if once and (source in feed or source.endswith(".request"))
        }
        return none, {name: one[name] if name in request else data for name, data in cut.items()}


def bind(original: ModelProto, optimized: ModelProto, roles: Roles) -> Binding:
    """Finds how the second model's inputs come from the original's."""
    declared = tuple(feeds.inputs(original, roles))
    mine = {i.name: i for i in declared}
    before, other = feeds.describe(original), feeds.describe(optimized)
    by_order = _in_order(before, other)
    dims = {i.name: i.dims or () for i in before}
    sources: dict[str, tuple[str, bool]] = {}
    strange, misfits = [], []
    for place, info in enumerate(other):
        source = before[place].name if by_order else info.name
        stem, _, part = source.rpartition(".")
        if source not in mine:
            whole = mine.get(stem)
            if whole is None or part not in ("request", "candidate") or whole.role.level != "mixed":
                strange.append(info.name)
                continue
            sources[info.name] = (source, True)
            held = len(whole.role.request if part == "request" else whole.candidate_positions)
            shape = info.dims or ()
            axis = whole.mixed_axis
            if whole.role.record is None and axis < len(shape) and isinstance(shape[axis], int) and shape[axis] != held:
                misfits.append(
                    f"{info.name!r} has {shape[axis]} columns where the roles say {held} columns of {stem!r} are "
                    f"{part}-level"
                )
            continue
        role, shape = mine[source].role, info.dims or ()
        if len(shape) != len(dims[source]):
            misfits.append(f"{info.name!r} has {len(shape)} axes where the original has {len(dims[source])}")
            continue
        axis_of = role.candidate_axis
        one = axis_of is not None and _one_row(shape[axis_of], role) and not _one_row(dims[source][axis_of], role)
        if one and role.level != "request":
            misfits.append(f"{info.name!r} takes one row, but its role is {role.level}")
            continue
        sources[info.name] = (source, one)
    used = {s.rpartition(".")[0] if s not in mine else s for s, _ in sources.values()}
    missing = tuple(i.name for i in declared if i.name not in used)
    return Binding(declared, sources, missing, tuple(strange), by_order, tuple(misfits))


def _one_row(dim: int | str | None, role: InputRole) -> bool:
    return dim == (role.record or 1)
