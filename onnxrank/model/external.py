"""The tensors of a model, and the external data that they may lie in: where that is, and whether it can be."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxrank.errors import ModelError, UsageError

_NARROW = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}  # bits, packed into bytes


def tensors(proto: ModelProto) -> Iterator[TensorProto]:
    """All tensors of a model: initializers and attributes, those of subgraphs and functions too."""
    graphs: list[GraphProto] = [proto.graph]
    for training in proto.training_info:
        graphs += training.initialization, training.algorithm
    nodes: list[NodeProto] = [n for f in proto.functions for n in f.node]
    while graphs or nodes:
        sparse = []
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            sparse += graph.sparse_initializer
            nodes += graph.node
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("sparse_tensor"):
                    sparse.append(attribute.sparse_tensor)
                sparse += attribute.sparse_tensors
                if attribute.HasField("g"):
                    graphs.append(attribute.g)
                graphs += attribute.graphs
        nodes = []
        for s in sparse:
            yield from (s.values, s.indices)


def without_external(model: ModelProto) -> ModelProto:
    """A copy whose external tensors are empty, for the checker, which looks for them in the current folder."""
    out = ModelProto()
    out.CopyFrom(model)
    for t in tensors(out):
        if t.data_location == TensorProto.EXTERNAL:
            t.ClearField("external_data")
            t.data_location = TensorProto.DEFAULT
            del t.dims[:]
            t.dims.append(0)
    return out


def tensor_data(t: TensorProto, folder: str | os.PathLike[str] | None = None) -> NDArray[Any]:
    """The data of a tensor, read from its external file if it has one.

    Args:
        t: The tensor.
        folder: Where its external data lies.

    Raises:
        ModelError: The external data is missing, too short or outside the folder, or the data do not fit the shape.
    """
    held = t
    if is_external(t):
        if folder is None:
            raise ModelError(f"Tensor {t.name!r} lies in external data of a model that was given without its file.")
        held = TensorProto(name=t.name, data_type=t.data_type, dims=t.dims)
        held.raw_data = _external_bytes(t, Path(folder))
    try:
        return numpy_helper.to_array(held)
    except (TypeError, ValueError) as e:
        raise ModelError(f"The data of tensor {t.name!r} do not fit its type and shape: {e}.") from e


def _external_bytes(t: TensorProto, folder: Path) -> bytes:
    """What a tensor's file holds of it; onnx's own reader refuses links, which runtimes follow."""
    (offset, _), count = _span(t), _bytes_of(t)
    path = _external_path(_entries(t).get("location", ""), t.name, folder)
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(count)
    except OSError as e:
        raise ModelError(f"The external data {path} of tensor {t.name!r} cannot be read: {e.strerror}.") from e
    if len(data) < count:
        raise ModelError(
            f"The external data {path} of tensor {t.name!r} has become shorter since the model was loaded."
        )
    return data


def is_external(tensor: TensorProto) -> bool:
    """Whether the data of a tensor lie in another file."""
    return tensor.data_location == TensorProto.EXTERNAL


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {e.key: e.value for e in tensor.external_data}


def locations_of(proto: ModelProto) -> tuple[str, ...]:
    """The files of a model's external data, as it names them."""
    return tuple(sorted({os.path.normpath(_entries(t)["location"]) for t in tensors(proto) if is_external(t)}))


def check_external(proto: ModelProto, folder: Path) -> tuple[str, ...]:
    """Holds every reference to external data against the files there are, and returns these."""
    sizes: dict[str, int] = {}
    for tensor in tensors(proto):
        if not is_external(tensor):
            continue
        location = _entries(tensor).get("location", "")
        if location not in sizes:
            sizes[location] = _external_size(location, tensor.name, folder)
        offset, length = _span(tensor)
        end = offset + (length or _bytes_of(tensor))
        if end > sizes[location]:
            raise ModelError(
                f"The external data of tensor {tensor.name!r} ends at byte {end} of {location!r}, which has only "
                f"{sizes[location]} bytes. The file is cut short, or belongs to another model."
            )
        _check_length(tensor, length)
    return tuple(sorted(set(map(os.path.normpath, sizes))))


def _span(tensor: TensorProto) -> tuple[int, int]:
    """Where a tensor begins in its file, and how many bytes it is said to have there; 0 where that is not said."""
    entries = _entries(tensor)
    try:
        offset, length = (int(entries.get(key) or 0) for key in ("offset", "length"))
    except ValueError:
        offset = length = -1
    if offset < 0 or length < 0:
        raise ModelError(f"The external data of tensor {tensor.name!r} has an offset or length that is no number.")
    if any(d < 0 for d in tensor.dims):
        raise ModelError(f"Tensor {tensor.name!r} in external data has a negative dimension: {list(tensor.dims)}.")
    return offset, length


def _check_length(tensor: TensorProto, length: int) -> None:
    """Holds what is said of a tensor's length against its type and shape."""
    size = _bytes_of(tensor)
    if size and length and length != size:
        raise ModelError(
            f"The external data of tensor {tensor.name!r} is said to have {length} bytes, but its type and shape "
            f"{list(tensor.dims)} need {size}."
        )


def _external_path(location: str, tensor: str, folder: Path) -> Path:
    """The file of external data, links followed.

    Raises:
        ModelError: It lies outside the model's folder, or is no name of a file.
    """
    if not location:
        raise ModelError(f"Tensor {tensor!r} lies in external data without a location.")
    windows = PureWindowsPath(location)
    home = Path(os.path.realpath(folder))
    try:
        path = Path(os.path.realpath(home / location))
    except ValueError as e:  # a NUL
        raise ModelError(f"The external data {location!r} of tensor {tensor!r} is no name of a file: {e}.") from e
    # Both kinds of separator count: the same file must not be safe on one system and leave the folder on another.
    if location.startswith("/") or windows.anchor or ".." in windows.parts or not path.is_relative_to(home):
        raise ModelError(
            f"The external data {location!r} of tensor {tensor!r} lies outside the model's folder {folder}. Put the "
            "file itself (no link) next to the model and refer to it by a relative path."
        )
    return path


def _external_size(location: str, tensor: str, folder: Path) -> int:
    path = _external_path(location, tensor, folder)
    try:
        if not path.exists():
            raise ModelError(
                f"The external data {location!r} of tensor {tensor!r} is missing in {folder}. Copy it next to the "
                "model."
            )
        if not path.is_file():
            raise ModelError(f"The external data {location!r} of tensor {tensor!r} is not a regular file.")
        size = path.stat().st_size
    except OSError as e:
        raise ModelError(f"The external data {location!r} of tensor {tensor!r} cannot be read: {e.strerror}.") from e
    if not os.access(path, os.R_OK):
        raise UsageError(f"There is no right to read the external data {path}.")
    return size


def _bytes_of(tensor: TensorProto) -> int:
    """Bytes of a tensor's data; 0 if its type is unknown, which is for the checker to say."""
    try:
        name = TensorProto.DataType.Name(tensor.data_type)
        bits = _NARROW.get(name) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, ValueError):
        return 0
    return int(math.prod(tensor.dims) * bits + 7) // 8
