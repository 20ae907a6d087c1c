"""Messages between a process and the one that runs a model for it: JSON, with arrays as raw bytes behind it.

Nothing that comes from a process that has run an untrusted model is ever unpickled.
"""

from __future__ import annotations

import functools
import json
import struct
from typing import Any, BinaryIO

import numpy as np
from onnx import TensorProto, helper

_LENGTH = struct.Struct("<Q")
_MOST = 1 << 40
_MOST_BUFFERS = 1 << 24
_PIECE = 1 << 28
_SMALL = 1 << 16
"""Bytes of an array up to which it is written together with others: a model may have thousands of inputs."""
_MARK = "\0"
"""Key of what stands for an array, bytes or a tuple; no message has it otherwise."""


def send(stream: BinaryIO, message: Any) -> None:
    """Writes one message.

    Args:
        stream: Where to.
        message: What JSON takes, and NumPy arrays (of numbers, bools or strings) and bytes anywhere within.
    """
    buffers: list[bytes | memoryview] = []
    head = json.dumps(_pack(message, buffers)).encode()
    parts: list[bytes | memoryview] = [_LENGTH.pack(len(head)), head, _LENGTH.pack(len(buffers))]
    for b in buffers:
        parts.append(_LENGTH.pack(len(b)))
        if len(b) < _SMALL:
            parts.append(b)
            continue
        stream.write(b"".join(parts))
        stream.write(b)
        parts = []
    stream.write(b"".join(parts))
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """Reads one message.

    Raises:
        EOFError: The other end is gone.
        Exception: What came is no message; of what kind is up to whoever sent it.
    """
    head = json.loads(_exactly(stream, _size(stream)))
    count = _size(stream)
    if count > _MOST_BUFFERS:
        raise ValueError(f"{count} buffers")
    return _unpack(head, [_exactly(stream, _size(stream)) for _ in range(count)])


def _size(stream: BinaryIO) -> int:
    (n,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    return int(n)


def _exactly(stream: BinaryIO, n: int) -> bytearray:
    if n > _MOST:
        raise ValueError(f"a length of {n}")
    if n <= _SMALL:
        found = bytearray(stream.read(n))
        if len(found) < n:
            raise EOFError
        return found
    # An array of its own, so that the arrays made on it can be written to; it grows with what really comes.
    data, at = bytearray(), 0
    while at < n:
        data += bytes(min(n - at, _PIECE))
        with memoryview(data) as view:
            while at < len(data):
                got = stream.readinto(view[at:])  # type: ignore[attr-defined]
                if not got:
                    raise EOFError
                at += got
    return data


_kind = functools.cache(lambda dtype: int(helper.np_dtype_to_tensor_dtype(dtype)))
"""ONNX's number of an element type."""
_dtype = functools.cache(lambda kind: np.dtype(helper.tensor_dtype_to_np_dtype(kind)))
"""The element type of a number."""


def _pack(value: Any, buffers: list[bytes | memoryview]) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "OUS":
            flat = [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in value.reshape(-1)]
            return {_MARK: "strings", "shape": list(value.shape), "data": flat}
        kind = _kind(value.dtype)
        buffers.append(value.tobytes())
        return {_MARK: "array", "shape": list(value.shape), "type": kind, "at": len(buffers) - 1}
    if isinstance(value, (bytes, bytearray)):
        buffers.append(bytes(value))
        return {_MARK: "bytes", "at": len(buffers) - 1}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {k: _pack(v, buffers) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(v, buffers) for v in value]
    return value


def _unpack(value: Any, buffers: list[bytearray]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, buffers) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_MARK)
    if kind is None:
        return {k: _unpack(v, buffers) for k, v in value.items()}
    if kind == "bytes":
        return bytes(buffers[value["at"]])
    if kind == "strings":
        return np.array(value["data"], object).reshape(value["shape"])
    dtype = np.dtype(np.uint8) if value["type"] == TensorProto.UNDEFINED else _dtype(value["type"])
    return np.frombuffer(buffers[value["at"]], dtype).reshape(value["shape"])
