"""Inputs as a graph declares them: which of their axes can be whose."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import TensorProto

from onnxrank.errors import ModelError
from onnxrank.roles.role import InputInfo


def dims_of(info: InputInfo) -> tuple[int | str | None, ...]:
    """The extents of an input whose rank is known."""
    assert info.dims is not None, "resolve has refused unknown ranks"
    return info.dims


def dim_of(info: InputInfo, axis: int | None) -> int | str | None:
    """The extent of one axis; None where there is no axis."""
    return None if axis is None else dims_of(info)[axis]


def is_static(info: InputInfo) -> bool:
    """Whether every extent is a number."""
    return all(isinstance(dim, int) for dim in dims_of(info))


def has_one_row(info: InputInfo, axis: int | None, given: bool, moving: bool) -> bool:
    """Tell whether an input has one row per request already, beside others that have one per candidate."""
    return axis is None or (moving and (dim_of(info, axis) == 1 or (is_static(info) and not given)))


def refuse_unusable(inputs: Sequence[InputInfo]) -> None:
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
    if all(is_static(info) for info in ranked):
        raise ModelError(static_batch(ranked[0], 0))


def static_batch(info: InputInfo, axis: int) -> str:
    """What to say of an axis of fixed size that is to be the candidates'."""
    return (
        f"Input {describe(info)} has the fixed size {dim_of(info, axis)} on its candidate axis {axis}: the "
        "model was exported with a static batch. Export it again with a symbolic one (torch.onnx.export: "
        f"dynamic_axes={{{info.name!r}: {{{axis}: 'N'}}}} or dynamic_shapes; tf2onnx: None for the batch in "
        "the input signature), or set candidate_axis in the roles file if the candidates lie along another "
        "axis."
    )


def describe(info: InputInfo) -> str:
    """An input by name, type and shape, as messages call it."""
    return f"{info.name!r} ({signature(info)})"


def signature(info: InputInfo) -> str:
    """Type and shape of an input, as messages write them."""
    try:
        dtype = TensorProto.DataType.Name(info.elem_type).lower()
    except ValueError:
        dtype = f"type {info.elem_type}"
    return f"{dtype}[{', '.join('?' if dim is None else str(dim) for dim in dims_of(info))}]"


def listed(names: Sequence[str]) -> str:
    """Names in a row, as messages write them."""
    return ", ".join(repr(name) for name in names)
