"""Models from files, by name of what is wrong with them; external data is looked at but never loaded."""

from __future__ import annotations

import errno
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto

from onnxrank.errors import EnvironmentProblem, ModelError, UsageError
from onnxrank.graphs import domain, subgraphs
from onnxrank.model.external import check_external, is_external, tensors
from onnxrank.model.protos import LIMIT, serialise

MIN_OPSET = 11

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

NO_RIGHT = {errno.EACCES, errno.EPERM, errno.EROFS}

BAD_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}


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
            data, proto, path, folder = serialise(source), source, None, None
        else:
            path = Path(source)
            data, folder = _read(path), path.resolve().parent
            proto = _parse(data, path)
    except MemoryError as e:
        raise EnvironmentProblem("There is not enough memory to load the model.") from e
    proto = _importing_onnx(proto)
    _check_versions(proto, "The model" if path is None else str(path))
    if path is None and any(is_external(t) for t in tensors(proto)):
        raise UsageError(
            "The model refers to external data but was given without its file. Pass the file's path, or load the data "
            "into the model first (onnx.load does)."
        )
    external = () if folder is None else check_external(proto, folder)
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
        if path.stat().st_size >= LIMIT:
            raise ModelError(
                f"{path} has {path.stat().st_size} bytes, but an ONNX file ends below 2 GiB. Save the model with its "
                "weights as external data."
            )
        data = path.read_bytes()
    except OSError as e:
        if e.errno in NO_RIGHT:
            raise UsageError(f"There is no right to read {path}: {e.strerror}.") from e
        if e.errno in BAD_PATH:
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


def _importing_onnx(proto: ModelProto) -> ModelProto:
    """The model with an import of ONNX's operators, of which one of trees, say, needs none; itself where it has one."""
    nodes = [*proto.graph.node, *(n for f in proto.functions for n in f.node)]
    others = {domain(o.domain) for o in proto.opset_import}
    if "" in others or not nodes or any(domain(n.domain) not in others or subgraphs(n) for n in nodes):
        return proto
    out = ModelProto()
    out.CopyFrom(proto)
    out.opset_import.add(version=MIN_OPSET)
    return out


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
