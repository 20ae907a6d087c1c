"""Roles from recorded requests: request-level is what is constant within every request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from onnxrank.errors import ModelError, UsageError
from onnxrank.roles.declared import describe, dims_of, has_one_row, listed, refuse_unusable, static_batch
from onnxrank.roles.positions import format_ranges
from onnxrank.roles.resolving import resolve
from onnxrank.roles.role import InputInfo, Roles

_INTEGERS = frozenset(getattr(TensorProto, f"{sign}INT{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64))


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
    refuse_unusable(inputs)
    moving = any(info.dims and not isinstance(info.dims[0], int) for info in inputs)
    fixed = {info.name for info in inputs if has_one_row(info, 0 if info.dims else None, False, moving)}
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
        elif array.ndim == 2 and constant.any() and not isinstance(dims_of(info)[1], int):
            note += f" (its axis 1 has no fixed extent, so that the constant columns {_columns(constant)} do not count)"
        elif array.ndim == 2 and constant.any():
            entry = {"request": _columns(constant)}
            how = _how_constant(False, len(first))
            note = f"columns {entry['request']} request-level ({how}), others candidate-level"
            if everywhere.any():
                note += f"; columns {_columns(everywhere)} {_how_constant(True, len(first))}"
        if info.elem_type in _INTEGERS and array.size:
            seen = _values_seen(array, by_column=array.ndim == 2 and isinstance(dims_of(info)[1], int))
            entry |= {"range": seen[0][1]} if len(seen) == 1 else {"ranges": dict(seen)}
            note += f"; values in [{int(array.min())}, {int(array.max()) + 1})"
        entries[info.name] = entry
        notes.append(f"{info.name}: {note}")

    for info in rowed:
        rows = dims_of(info)[0]
        if isinstance(rows, int) and rows != 1:
            raise ModelError(static_batch(info, 0))
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
        raise UsageError(f"The recorded data has no key for input {listed(missing)}. It needs one per input.")
    unknown = sorted(set(data) - {info.name for info in inputs} - {"request_id"})
    if unknown:
        raise UsageError(
            f"The recorded data has the key {listed(unknown)}, which is no input. The inputs are "
            f"{listed([info.name for info in inputs])}; request_id is allowed beside them."
        )
    for info in rowed:
        array = np.asarray(data[info.name])
        dims = dims_of(info)
        if array.ndim != len(dims) or any(
            isinstance(dim, int) and dim != size for dim, size in zip(dims[1:], array.shape[1:], strict=True)
        ):
            raise UsageError(
                f"The recorded array of input {describe(info)} has the shape {list(array.shape)}, which "
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
