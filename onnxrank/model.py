"""Models from and to files, by name of what is wrong with them; external data is looked at but never loaded."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import heapq
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto, helper, inliner, numpy_helper

from onnxrank.errors import EnvironmentProblem, ModelError, UsageError
from onnxrank.graphs import captured, subgraphs

MIN_OPSET = 11
_LIMIT = 1 << 31  # of a protobuf message
_CHUNK = 1 << 20

# What files that are passed by mistake begin with, after so many bytes.
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer: fetch the file itself with git lfs pull"),
    (0, b"PK\x03\x04", "a zip archive, as torch.save and Keras write: export the model to ONNX first"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes: export the model to ONNX first"),
    (4, b"TFL3", "a TensorFlow Lite model: export the original to ONNX with tf2onnx"),
    (4, b"ORTM", "a model in onnxruntime's own format: pass the ONNX file it was made of"),
    (8, b'{"', "a safetensors file: it holds weights only, export the model to ONNX first"),
    (0, b"GGUF", "a GGUF file: it holds no ONNX graph"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it first"),
    (0, b"BZh", "a bzip2 archive: unpack it first"),
    (0, b"\xfd7zXZ", "an xz archive: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive: unpack it first"),
    *((0, bytes([0x80, k]), "a Python pickle: export the model to ONNX first") for k in range(2, 6)),
)
_NARROW = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}  # bits, packed into bytes

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}
_BAD_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


@dataclass
class LoadedModel:
    """A model as it was given.

    Attributes:
        proto: The model, tensors in external data left where they are.
        path: Its file; None if it was given as a ModelProto.
        folder: Where its external data lies: the folder of the file itself, links followed.
        sha256: Hash of the file's bytes, or of the serialised proto.
        size: Number of these bytes.
        external: Files with external data in use, relative to `folder`, sorted.
        split: The folder of the two models that this one stands for; None for a model of its own.
        batch: The model for several requests that this one, for one, stands for; None for a model of its own.
    """

    proto: ModelProto
    path: Path | None
    folder: Path | None
    sha256: str
    size: int
    external: tuple[str, ...]
    split: Path | None = None
    batch: ModelProto | None = None


# --- loading -----------------------------------------------------------------------------------------------------


def load(source: str | os.PathLike[str] | ModelProto) -> LoadedModel:
    """Loads a model without its external data, of which only the presence is checked.

    Args:
        source: An ONNX file, or a model in memory; the latter is not copied.

    Raises:
        ModelError: The model is missing, not ONNX, damaged, of an unsupported version, or its external data is.
        UsageError: There is no right to read it, or a model in memory refers to external data.
        EnvironmentProblem: There is not enough memory, or the disk fails.
    """
    try:
        if isinstance(source, ModelProto):
            data, proto, path, folder = _serialise(source), source, None, None
        else:
            path = Path(source)
            data, folder = _read(path), path.resolve().parent
            proto = _parse(data, path)
    except MemoryError as e:
        raise EnvironmentProblem("There is not enough memory to load the model.") from e
    _check_versions(proto, "The model" if path is None else str(path))
    if path is None and any(_is_external(t) for t in tensors(proto)):
        raise UsageError(
            "The model refers to external data but was given without its file. Pass the file's path, or load the data "
            "into the model first (onnx.load does)."
        )
    external = () if folder is None else _check_external(proto, folder)
    return LoadedModel(proto, path, folder, hashlib.sha256(data).hexdigest(), len(data), external)


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.glob("*.onnx"))
            raise ModelError(f"{path} is a folder, not a model.{f' It holds {inside[0]}.' if inside else ''}")
        if not path.exists():
            raise ModelError(f"{path} does not exist.")
        if not path.is_file():
            raise ModelError(f"{path} is not a regular file. Save the model to a file first.")
        if path.stat().st_size >= _LIMIT:
            raise ModelError(
                f"{path} has {path.stat().st_size} bytes, but an ONNX file ends below 2 GiB. Save the model with its "
                "weights as external data."
            )
        data = path.read_bytes()
    except OSError as e:
        if e.errno in _NO_RIGHT:
            raise UsageError(f"There is no right to read {path}: {e.strerror}.") from e
        if e.errno in _BAD_PATH:
            raise ModelError(f"{path} is no file that can be read: {e.strerror}.") from e
        raise EnvironmentProblem(f"{path} cannot be read: {e.strerror}.") from e
    if not data:
        raise ModelError(f"{path} is empty.")
    return data


def _parse(data: bytes, path: Path) -> ModelProto:
    try:
        proto: ModelProto = ModelProto.FromString(data)
    except DecodeError as e:
        lacking = _lacking(data)
        if lacking:
            raise ModelError(
                f"{path} is truncated: at least {lacking} bytes are missing at its end. Copy or export it again."
            ) from e
        looks = _looks_like(data)
        raise ModelError(
            f"{path} is not an ONNX model; it looks like {looks}." if looks else f"{path} is not an ONNX model."
        ) from e
    if not proto.HasField("graph"):
        looks = _looks_like(data)
        raise ModelError(f"{path} holds no graph{f'; it looks like {looks}' if looks else ''}. Is it an ONNX model?")
    return proto


def _lacking(data: bytes) -> int:
    """How many bytes are missing at the end, if all there is up to there are fields of a model; else 0."""
    fields = ModelProto.DESCRIPTOR.fields_by_number
    known, at, size = 0, 0, len(data)

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while shift < 64:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value
        raise ValueError

    try:
        while at < size:
            tag = varint()
            field = fields.get(tag >> 3)
            if field is None or tag & 7 != (0 if field.type == field.TYPE_INT64 else 2):
                return 0
            length = varint()
            if tag & 7 == 2:
                at += length
            known += at <= size
        return at - size if known else 0
    except IndexError:
        return 1 if known else 0
    except ValueError:
        return 0


def _looks_like(data: bytes) -> str | None:
    for at, magic, name in _MAGIC:
        if data.startswith(magic, at):
            return name
    head = data[:1024].decode("utf-8", "ignore")
    if head and all(c.isprintable() or c in "\t\r\n\f" for c in head) and b"\0" not in data[:1024]:
        if head.lstrip().lower().startswith(("<!doctype", "<html")):
            return "a web page, as a failed download leaves"
        return "text: ONNX's text and JSON forms must be converted with onnx.load and onnx.save first"
    return None


def _check_versions(proto: ModelProto, what: str) -> None:
    if not proto.HasField("graph"):
        raise ModelError(f"{what} holds no graph.")
    newest = onnx.defs.onnx_opset_version()
    update = f"onnx {onnx.__version__} knows up to {{}}: update onnx, or export the model again for an older version."
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(f"{what} has IR version {proto.ir_version}; {update.format(onnx.IR_VERSION)}")
    opsets = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    if not opsets:
        raise ModelError(
            f"{what} does not say its opset: the import of the default domain is missing. The file may be cut short; "
            "export it again."
        )
    if min(opsets) < MIN_OPSET:
        raise ModelError(
            f"{what} has opset {min(opsets)}; at least {MIN_OPSET} is needed. Export it again with a newer "
            "opset_version, or convert it with onnx.version_converter.convert_version(model, 17)."
        )
    if max(opsets) > newest:
        raise ModelError(f"{what} has opset {max(opsets)}; {update.format(newest)}")


# --- normal form -------------------------------------------------------------------------------------------------


def flattened(model: ModelProto) -> ModelProto:
    """The model with its functions inlined, sparse constants dense, and nodes in order; itself where it is that.

    Raises:
        ModelError: A function cannot be inlined, a sparse constant does not fit, or nodes read each other's results.
    """
    out = model
    if model.functions:
        try:
            out = inliner.inline_local_functions(_with_defaults(_one_opset(model)))
        except Exception as e:
            raise ModelError(f"The model's functions cannot be inlined: {e}.") from e
    sparse = [k for k, n in enumerate(out.graph.node) if any(a.HasField("sparse_tensor") for a in n.attribute)]
    if sparse and out is model:
        out = ModelProto()
        out.CopyFrom(model)
    for k in sparse:
        node = out.graph.node[k]
        if node.op_type == "Constant":
            value = numpy_helper.from_array(sparse_data(node.attribute[0].sparse_tensor))
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("value", value))
    return _in_order(out)


def _in_order(model: ModelProto) -> ModelProto:
    """The model with every node behind those that it reads, which runtimes do not insist on; itself where it is so."""
    nodes = model.graph.node
    maker = {o: k for k, n in enumerate(nodes) for o in n.output if o}
    read = [{*n.input}.union(*map(captured, subgraphs(n))) for n in nodes]
    before = [{maker[i] for i in names if i in maker} for names in read]
    if all(max(first, default=-1) < k for k, first in enumerate(before)):
        return model
    after: dict[int, list[int]] = {}
    for k, first in enumerate(before):
        for j in first:
            after.setdefault(j, []).append(k)
    ready = [k for k, first in enumerate(before) if not first]
    order: list[int] = []
    while ready:
        k = heapq.heappop(ready)
        order.append(k)
        for j in after.get(k, []):
            before[j].discard(k)
            if not before[j]:
                heapq.heappush(ready, j)
    if len(order) < len(nodes):
        left = next(n for k, n in enumerate(nodes) if before[k])
        raise ModelError(f"The node {left.name or left.output[0]!r} ({left.op_type}) reads what depends on itself.")
    out = ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    out.graph.node.extend(nodes[k] for k in order)
    return out


def _one_opset(model: ModelProto) -> ModelProto:
    """The model with its functions written for its own opsets, as onnxruntime takes them; the inliner leaves others."""
    own = {o.domain: o.version for o in model.opset_import}
    if all(o.version == own.get(o.domain, o.version) for f in model.functions for o in f.opset_import):
        return model
    out = ModelProto()
    out.CopyFrom(model)
    for f in out.functions:
        for o in f.opset_import:
            o.version = own.get(o.domain, o.version)
    return out


def _with_defaults(model: ModelProto) -> ModelProto:
    """The model with all attributes at calls of its functions, which the inliner does not pass on to inner calls."""
    defaults = {(f.domain, f.name, f.overload): f.attribute_proto for f in model.functions if f.attribute_proto}
    if not defaults:
        return model
    out = ModelProto()
    out.CopyFrom(model)

    def fill(nodes: Iterable[NodeProto]) -> None:
        for node in nodes:
            given = {a.name for a in node.attribute}
            kept = defaults.get((node.domain, node.op_type, node.overload), ())
            node.attribute.extend(a for a in kept if a.name not in given)
            for inner in subgraphs(node):
                fill(inner.node)

    for nodes in (out.graph.node, *(f.node for f in out.functions)):
        fill(nodes)
    return out


# --- tensors -----------------------------------------------------------------------------------------------------


def overridable(model: ModelProto) -> set[str]:
    """Initializers that callers may replace, because they are listed as inputs: they are no constants.

    Before IR version 4 all initializers had to be listed, and were constants.
    """
    if model.ir_version < 4:
        return set()
    held = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    return held & {i.name for i in model.graph.input}


def sparse_data(t: SparseTensorProto, folder: str | os.PathLike[str] | None = None) -> NDArray[Any]:
    """A sparse tensor as a dense array.

    Raises:
        ModelError: Its values, indices and dimensions do not fit each other.
    """
    values, indices = tensor_data(t.values, folder).reshape(-1), tensor_data(t.indices, folder)
    if any(d < 0 for d in t.dims) or math.prod(t.dims) * values.dtype.itemsize >= _LIMIT:
        raise ModelError(f"The sparse tensor {t.values.name!r} of {list(t.dims)} entries cannot be made dense.")
    out = np.zeros(tuple(t.dims), values.dtype)
    try:
        if indices.ndim == 2:
            out[tuple(indices.T)] = values
        else:
            out.reshape(-1)[indices] = values
    except (IndexError, ValueError) as e:
        raise ModelError(f"The sparse tensor {t.values.name!r} does not fit its dimensions: {e}.") from e
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
    if _is_external(t):
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


# --- external data -----------------------------------------------------------------------------------------------


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


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {e.key: e.value for e in tensor.external_data}


def _locations(proto: ModelProto) -> tuple[str, ...]:
    return tuple(sorted({os.path.normpath(_entries(t)["location"]) for t in tensors(proto) if _is_external(t)}))


def _check_external(proto: ModelProto, folder: Path) -> tuple[str, ...]:
    """Holds every reference to external data against the files there are, and returns these."""
    sizes: dict[str, int] = {}
    for tensor in tensors(proto):
        if not _is_external(tensor):
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


# --- saving ------------------------------------------------------------------------------------------------------


def save(proto: ModelProto, loaded: LoadedModel, out: str | os.PathLike[str]) -> None:
    """Writes a model made from a loaded one; the file appears whole or not at all.

    External data stays where it is if the output goes to the same folder, and is copied next to the output otherwise.

    Args:
        proto: The model.
        loaded: What it was made from; `out` may be its own path.
        out: The file; a link is followed.

    Raises:
        ModelError: The model is too large for one file.
        UsageError: The folder is missing, there is no right to write, or another file is in the way.
        EnvironmentProblem: There is no space, or no memory.
    """
    target = check_output(out, loaded)
    try:
        data = _serialise(proto)
    except MemoryError as e:
        raise EnvironmentProblem("There is not enough memory to write the model.") from e

    def write(file: BinaryIO) -> None:
        file.write(data)

    replace_files({**_copies(_locations(proto), loaded, target), target: write})


def save_unchanged(loaded: LoadedModel, out: str | os.PathLike[str]) -> None:
    """Writes the loaded model's own bytes; does nothing where `out` is its own file.

    Args:
        loaded: The model.
        out: The file; a link is followed.

    Raises:
        UsageError: The folder is missing, there is no right to write, or another file is in the way.
        EnvironmentProblem: There is no space.
    """
    if loaded.path is None:
        save(loaded.proto, loaded, out)
        return
    target = check_output(out, loaded)
    if target.exists() and target.samefile(loaded.path):
        return
    replace_files({**_copies(loaded.external, loaded, target), target: functools.partial(_copy, loaded.path)})


def check_output(out: str | os.PathLike[str], loaded: LoadedModel | None = None) -> Path:
    """Finds out before any work whether a file can be written.

    Args:
        out: The file.
        loaded: The model it is made from, whose external data it must not replace.

    Returns:
        The file itself, links followed.

    Raises:
        UsageError: It is a folder or device, its folder is missing, or there is no right to write.
    """
    target = Path(os.path.realpath(out))
    try:
        _check_place(os.fspath(out), target)
    except OSError as e:
        raise _write_error(e, target) from e
    if loaded is not None and loaded.folder is not None:
        for location in loaded.external:
            source = loaded.folder / location
            if target.parent / location == target or (target.exists() and source.exists() and target.samefile(source)):
                raise UsageError(f"{out} would take the place of the external data {location!r}. Choose another name.")
    return target


def _check_place(out: str, target: Path) -> None:
    folder = target.parent
    if target.is_dir():
        raise UsageError(f"{target} is a folder; name a file to write.")
    if not folder.is_dir():
        raise UsageError(f"{out} cannot be written: the folder {folder} does not exist. Create it first.")
    if target.exists() and not target.is_file():
        raise UsageError(f"{out} is not a regular file, so it cannot be replaced.")
    if not os.access(folder, os.W_OK | os.X_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise UsageError(f"There is no right to write {out}.")


def _serialise(proto: ModelProto) -> bytes:
    try:
        data: bytes = proto.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as e:
        raise ModelError(_too_large()) from e
    if len(data) >= _LIMIT:
        raise ModelError(_too_large())
    return data


def _too_large() -> str:
    return (
        "The model does not fit into one file, which ends below 2 GiB. Keep its weights as external data: "
        "onnx.save(model, path, save_as_external_data=True), and pass that path."
    )


def _copies(locations: tuple[str, ...], loaded: LoadedModel, target: Path) -> dict[Path, Callable[[BinaryIO], None]]:
    """Writers of the external files that are not next to the target yet."""
    if loaded.folder is None or (locations and target.parent.samefile(loaded.folder)):
        return {}
    copies: dict[Path, Callable[[BinaryIO], None]] = {}
    for location in locations:
        source, goal = loaded.folder / location, target.parent / location
        if not goal.exists():
            copies[goal] = functools.partial(_copy, source)
        elif not _same_content(source, goal):
            raise UsageError(
                f"{goal} is there already and differs from the model's external data {source}. Move it away, or choose "
                "another folder."
            )
    return copies


def _copy(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as data:
        shutil.copyfileobj(data, file, _CHUNK)


def _same_content(a: Path, b: Path) -> bool:
    if a.samefile(b):
        return True
    if not b.is_file() or a.stat().st_size != b.stat().st_size:
        return False
    with open(a, "rb") as one, open(b, "rb") as other:
        return all(x == other.read(_CHUNK) for x in iter(lambda: one.read(_CHUNK), b""))


def replace_files(writers: Mapping[Path, Callable[[BinaryIO], None]]) -> None:
    """Writes files so that all of them appear whole, the last one last, or none.

    Args:
        writers: What writes the content of each file. All but the last must be files that do not exist yet.

    Raises:
        UsageError: A path cannot be written.
        EnvironmentProblem: There is no space, or the disk fails.
    """
    temporary: dict[Path, Path] = {}
    undo = contextlib.ExitStack()  # on failure: what was made, in reverse
    target = Path()
    with undo:
        try:
            for target, write in writers.items():
                for folder in reversed([f for f in target.parents if not f.exists()]):
                    undo.callback(_quietly, folder.rmdir)
                    folder.mkdir()
                temp = temporary[target] = target.parent / f".onnxrank-{secrets.token_hex(8)}.tmp"
                undo.callback(_quietly, temp.unlink)
                with open(temp, "xb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                if target.exists():
                    shutil.copymode(target, temp)
            for target, temp in temporary.items():
                if not target.exists():
                    undo.callback(_quietly, target.unlink)
                os.replace(temp, target)
        except OSError as e:
            raise _write_error(e, target, hidden=temporary.get(target)) from e
        undo.pop_all()


def _quietly(step: Callable[[], None]) -> None:
    with contextlib.suppress(OSError):
        step()


def _write_error(e: OSError, target: Path, hidden: Path | None = None) -> UsageError | EnvironmentProblem:
    """What went wrong with a target; the name of its temporary file (`hidden`) would only confuse."""
    where = "" if e.filename is None or str(e.filename) in (str(hidden), str(target)) else f" ({e.filename})"
    detail = f"{e.strerror or e}{where}"
    if e.errno in _NO_SPACE:
        return EnvironmentProblem(f"There is no space to write {target}: {detail}. Nothing was written.")
    if e.errno in _NO_RIGHT:
        return UsageError(f"There is no right to write {target}: {detail}.")
    if e.errno in _BAD_PATH:
        return UsageError(f"{target} cannot be written: {detail}.")
    return EnvironmentProblem(f"{target} cannot be written: {detail}. Nothing was written.")
