"""The contract of the two models: what `contract.json` says, and the version of the state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto

from onnxrank import model as files
from onnxrank import ranker
from onnxrank.errors import UsageError
from onnxrank.feeds import graph_inputs
from onnxrank.halves import type_name
from onnxrank.splitting.graph import Handed, Layout

_ALIGN = 8
_HEAD = 16


def described(value: ValueInfoProto) -> dict[str, Any]:
    """An input or output, as the contract has it."""
    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
    name = "string" if kind.elem_type == TensorProto.STRING else type_name(kind.elem_type)
    return {"name": value.name, "type": name or TensorProto.DataType.Name(kind.elem_type).lower(), "shape": shape}


def tensor(name: str, kind: str, shape: Sequence[int | str], offset: int | None) -> dict[str, Any]:
    """A tensor of the state, or a part of one."""
    fixed = [d for d in shape if isinstance(d, int)]
    size = prod(fixed) * np.dtype(kind).itemsize if len(fixed) == len(shape) else None
    return {"name": name, "type": kind, "shape": list(shape), "offset": offset, "bytes": size}


def state(layout: Layout) -> dict[str, Any]:
    """The state's part of the contract."""
    if layout.packed is not None:
        kind = _name(layout.kind)
        parts, at = [], 0
        for t in layout.tensors:
            told = tensor(t.name, kind, t.shape, at)
            parts.append({**told, "tensor": t.tensor, "of": _name(t.type)})
            at += told["bytes"]
        whole = tensor(layout.packed, kind, [layout.vector], _HEAD)
        tensors = [{**whole, "parts": parts}]
    else:
        tensors, at = [], _HEAD
        for t in layout.tensors:
            told = tensor(t.name, _name(layout.type_of(t)), t.shape, at if _is_fixed(t) else None)
            tensors.append({**told, "tensor": t.tensor, "of": _name(t.type)})
            # Those that vary come last, so that the others have a place of their own.
            at += (told["bytes"] or 0) + -(told["bytes"] or 0) % _ALIGN
    return {
        "form": "named" if layout.packed is None else "packed",
        "type": "float16" if layout.half else "float32",
        "tensors": tensors,
    }


def give_rows(told: Mapping[str, Any]) -> None:
    """Gives the tensors of a state a first axis of 1, where they have none, as `graph.in_rows` does."""
    for t in told["tensors"]:
        if len(t["shape"]) < 2 or t["shape"][0] != 1:
            t["shape"] = [1, *t["shape"]]


def ordered(tensors: Iterable[Handed]) -> tuple[Handed, ...]:
    """Tensors of the state in their order: those of fixed shape first."""
    return tuple(sorted(tensors, key=lambda t: not _is_fixed(t)))


def _is_fixed(t: Handed) -> bool:
    return all(isinstance(d, int) for d in t.shape)


def _name(kind: int) -> str:
    found = type_name(kind)
    assert found is not None  # the cut leaves others out
    return found


def check_packable(tensors: Iterable[Handed]) -> None:
    """Refuses what one vector of floats does not hold.

    Raises:
        UsageError: A tensor varies in length, or has a type whose values floats of 32 bits do not all have.
    """
    for t in tensors:
        if not _is_fixed(t):
            length = next(d for d in t.shape if not isinstance(d, int))
            raise UsageError(
                f"The state cannot be packed: the length {length!r} of {t.tensor!r} varies. Use --state named."
            )
        if t.type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL):
            raise UsageError(
                f"The state cannot be packed: {t.tensor!r} is {_name(t.type)}, which a float32 does not hold exactly. "
                "Use --state named."
            )


def version(request: ModelProto, layout: Mapping[str, Any], folder: Path | None) -> int:
    """What tells states apart: a hash of the request model, with its external data, and of the state's layout.

    Returns:
        53 bits, which every reader of JSON has exactly.
    """
    found = hashlib.sha256(json.dumps(layout, sort_keys=True).encode())
    for o in sorted(request.opset_import, key=lambda o: o.domain):
        found.update(f"{o.domain}\0{o.version}\0".encode())
    found.update(request.graph.SerializeToString(deterministic=True))
    for t in files.tensors(request):
        if t.data_location == TensorProto.EXTERNAL:
            found.update(np.ascontiguousarray(files.tensor_data(t, folder)).reshape(-1).view(np.uint8).data)
    return int.from_bytes(found.digest()[:8], "big") >> 11


def contract(
    made_by: str,
    number: int,
    guard: bool,
    told: Mapping[str, Any],
    parts: Mapping[str, tuple[str, str, ModelProto]],
    roles: Mapping[str, Any],
    source_sha256: str,
    optimize: Mapping[str, Any],
    packed: ranker.Matrices,
    more: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The contract.

    Args:
        made_by: Version of onnxrank.
        number: Version of the state.
        guard: Whether the candidate model takes it.
        told: `state`'s result.
        parts: Per part its file, the hash of that, and the model.
        roles: Roles of the original's inputs.
        source_sha256: Hash of the original.
        optimize: The contract of the rewriting.
        packed: Inputs that hold others side by side.
        more: Further fields of a part.
    """
    columns = {name: {"columns": m["columns"]} for name, m in packed.items()}
    return {
        "schema": "onnxrank.contract",
        "schema_version": ranker.SCHEMA_VERSION,
        "version": made_by,
        "source_sha256": source_sha256,
        ranker.VERSION: number,
        "guard": guard,
        "state": dict(told),
        "models": {
            part: {
                "file": file,
                "sha256": sha256,
                "inputs": [described(i) | columns.get(i.name, {}) for i in graph_inputs(model)],
                "outputs": [described(o) for o in model.graph.output],
                **more.get(part, {}),
            }
            for part, (file, sha256, model) in parts.items()
        },
        "roles": dict(roles),
        "optimize": {**optimize, **({"packed": dict(packed)} if packed else {})},
    }
