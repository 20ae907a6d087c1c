"""Recorded requests: `.npz` files, folders of them, ONNX test data, Parquet. They are read one after the other.

Every array or column is named after an input of the original and has a row per candidate; `request_id` tells which rows
belong together. Rows of one request must be next to each other in Parquet; an `.npz` file may hold them in any order.
"""

from __future__ import annotations

import itertools
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxrank.errors import EnvironmentProblem, UsageError
from onnxrank.feeds import Feed, Input
from onnxrank.values import extents, symbols


@dataclass(frozen=True)
class Request:
    """One recorded request.

    Attributes:
        name: Where it stands, for messages.
        feed: Inputs of the original.
        labels: One per candidate, where they are recorded.
    """

    name: str
    feed: Feed
    labels: NDArray[Any] | None


@dataclass(frozen=True)
class Source:
    """Recorded requests, read when they are iterated over.

    Attributes:
        rows: Number of candidates of all requests, where it is known ahead.
        read: Reads them.
    """

    rows: int | None
    read: Callable[[], Iterator[Request]]


def source(
    path: str | os.PathLike[str], declared: Sequence[Input], request_id: str = "request_id", labels: str | None = None
) -> Source:
    """Finds out of what kind recorded data is.

    Args:
        path: A file or a folder.
        declared: Inputs of the original.
        request_id: Name of what tells requests apart.
        labels: Name of the labels.

    Raises:
        UsageError: There is nothing that can be read.
        EnvironmentProblem: Parquet cannot be read here.
    """
    where = Path(path)
    layout = _Layout(declared, request_id, labels)
    if where.is_dir():
        tables = sorted(where.glob("*.parquet"))
        archives = sorted(where.glob("*.npz"))
        sets = [d for d in [where, *sorted(where.glob("test_data_set_*"))] if (d / "input_0.pb").is_file()]
        if tables:
            return _parquet(tables, layout)
        if archives:
            return Source(None, lambda: (r for p in archives for r in _archive(p, layout)))
        if sets:
            return Source(None, lambda: (_test_data(d, layout) for d in sets))
        raise UsageError(f"The folder {where} holds no .npz, no .parquet and no test_data_set_*/input_0.pb files.")
    if not where.is_file():
        raise UsageError(f"The recorded requests {where} do not exist.")
    if where.suffix.lower() in (".parquet", ".pq"):
        return _parquet([where], layout)
    if where.suffix.lower() == ".npz":
        return Source(None, lambda: _archive(where, layout))
    raise UsageError(f"{where} is neither .npz nor .parquet, and no folder of recorded requests.")


class _Layout:
    """What arrays are called and how they must be shaped."""

    def __init__(self, declared: Sequence[Input], request_id: str, labels: str | None) -> None:
        self.declared = declared
        self.request_id = request_id
        self.labels = labels

    @property
    def names(self) -> list[str]:
        """Inputs, the request's identity and labels."""
        more = [self.labels] if self.labels is not None else []
        return [*(i.name for i in self.declared), self.request_id, *more]

    def missing(self, have: Sequence[str], where: str) -> None:
        """Refuses data without an input or without the labels."""
        lacking = [i.name for i in self.declared if i.name not in have]
        if self.labels is not None and self.labels not in have:
            lacking.append(self.labels)
        if lacking:
            raise UsageError(f"{where} has nothing named {', '.join(map(repr, lacking[:5]))}; it needs one per input.")

    def fit(self, i: Input, data: NDArray[Any], where: str) -> NDArray[Any]:
        """An array in the type and with the axes of an input."""
        kind = helper.tensor_dtype_to_np_dtype(i.dtype) if i.dtype != TensorProto.STRING else np.dtype(object)
        fixed = [None if symbols([d]) else extents((d,))[0] for d in i.dims]
        if data.ndim == len(fixed) - 1 and fixed and fixed[-1] == 1:
            data = data[..., None]
        if data.ndim == len(fixed) + 1 and data.shape[-1] == 1:
            data = data[..., 0]
        if data.ndim != len(fixed) or any(n is not None and n != m for n, m in zip(fixed, data.shape, strict=True)):
            shown = [n if n is not None else "?" for n in fixed]
            raise UsageError(f"{where}: {i.name!r} has the shape {list(data.shape)}, but the input takes {shown}.")
        if i.dtype == TensorProto.STRING:
            return data.astype(object)
        if np.dtype(kind).kind in "iub" and data.dtype.kind not in "iub":
            raise UsageError(f"{where}: {i.name!r} holds {data.dtype} values, but the input takes {np.dtype(kind)}.")
        if data.dtype.kind not in "iubfV":
            raise UsageError(f"{where}: {i.name!r} holds {data.dtype} values, but the input takes {np.dtype(kind)}.")
        return np.ascontiguousarray(data.astype(kind))


# --- arrays ------------------------------------------------------------------------------------------------------


def _archive(path: Path, layout: _Layout) -> Iterator[Request]:
    data = read_archive(path)
    layout.missing(list(data), str(path))
    data = {**data, **{i.name: layout.fit(i, data[i.name], str(path)) for i in layout.declared}}
    count = _rows(data, layout, str(path))
    if not count:
        return
    ids = data.get(layout.request_id)
    if ids is None:
        yield _cut(data, layout, np.arange(count), str(path))
        return
    flat = ids.reshape(-1)
    if len(flat) != count:
        raise UsageError(f"{path}: {layout.request_id!r} has {len(flat)} entries for {count} candidates.")
    order = np.argsort(flat, kind="stable")
    edges = np.flatnonzero(flat[order][1:] != flat[order][:-1]) + 1
    groups = np.split(order, edges)
    for group in sorted(groups, key=lambda g: int(g[0])):
        yield _cut(data, layout, group, f"{path}, {layout.request_id} {flat[group[0]]}")


def read_archive(path: Path) -> dict[str, NDArray[Any]]:
    """Reads an `.npz` file.

    Raises:
        UsageError: It is none.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(6)
        if not magic.startswith((b"\x93NUMPY", b"PK")):
            raise UsageError(f"{path} is no .npz file; numpy.savez(path, name=array, ...) writes one.")
        data = np.load(path, allow_pickle=False)
        if not isinstance(data, np.lib.npyio.NpzFile):
            raise UsageError(f"{path} holds a single array; an .npz file with an array per input is needed.")
        with data:
            return {key: _plain(data, key, path) for key in data.files}
    except OSError as e:
        raise UsageError(f"The recorded requests {path} cannot be read: {e.strerror or e}.") from e
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
        why = "it is damaged" if zipfile.is_zipfile(path) else "it is no zip archive, which every .npz file is"
        raise UsageError(
            f"The recorded requests {path} are not an .npz file of plain arrays: {why}. numpy.savez writes one."
        ) from e


def _plain(data: Any, key: str, path: Path) -> NDArray[Any]:
    try:
        found: NDArray[Any] = data[key]
    except ValueError as e:
        if "pickle" not in str(e):
            raise
        raise UsageError(
            f"The array {key!r} of {path} holds Python objects, which are not read; write numbers, or strings of type "
            "str."
        ) from e
    return found


def _rows(data: Mapping[str, NDArray[Any]], layout: _Layout, where: str) -> int:
    """The number of candidates in arrays that fit."""
    counts = {}
    for i in layout.declared:
        axis = i.role.candidate_axis
        if axis is not None:
            counts[i.name] = int(data[i.name].shape[axis]) // (i.role.record or 1)
    if len(set(counts.values())) != 1:
        listing = ", ".join(f"{name!r} {n}" for name, n in counts.items())
        raise UsageError(f"{where}: the arrays differ in their number of candidates: {listing}.")
    return next(iter(counts.values()))


def _cut(data: Mapping[str, NDArray[Any]], layout: _Layout, index: NDArray[np.int64], where: str) -> Request:
    from onnxrank.verify.inputs import take

    labels = None if layout.labels is None else data[layout.labels].reshape(-1)[index]
    return Request(where, take(layout.declared, data, index), labels)


# --- ONNX test data ----------------------------------------------------------------------------------------------


def _test_data(folder: Path, layout: _Layout) -> Request:
    found: dict[str, NDArray[Any]] = {}
    for k, i in enumerate(layout.declared):
        path = folder / f"input_{k}.pb"
        try:
            tensor = TensorProto.FromString(path.read_bytes())
            data = numpy_helper.to_array(tensor)
        except OSError as e:
            raise UsageError(f"{path} cannot be read: {e.strerror}; there must be one file per input.") from e
        except Exception as e:
            raise UsageError(f"{path} is no serialised tensor.") from e
        known = {j.name for j in layout.declared}
        found[tensor.name if tensor.name in known else i.name] = data
    layout.missing(list(found), str(folder))
    found = {i.name: layout.fit(i, found[i.name], str(folder)) for i in layout.declared}
    count = _rows(found, layout, str(folder))
    unlabelled = _Layout(layout.declared, layout.request_id, None)
    return _cut(found, unlabelled, np.arange(count), str(folder))


# --- Parquet -----------------------------------------------------------------------------------------------------


def _parquet(paths: Sequence[Path], layout: _Layout) -> Source:
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise EnvironmentProblem("Parquet needs pyarrow: install 'onnxrank[data]'.") from e
    rows = 0
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except OSError as e:
            raise UsageError(f"The recorded requests {path} cannot be read: {_first(e)}.") from e
        except Exception as e:  # pyarrow has its own kinds
            raise UsageError(f"{path} is no Parquet file: {_first(e)}.") from e
        layout.missing(file.schema_arrow.names, str(path))
        if layout.request_id not in file.schema_arrow.names:
            raise UsageError(
                f"{path} has no column {layout.request_id!r} that tells requests apart; name it with --request-id."
            )
        rows += file.metadata.num_rows

    def read() -> Iterator[Request]:
        for path in paths:
            yield from _table(pq.ParquetFile(path), path, layout)

    return Source(rows, read)


def _table(file: Any, path: Path, layout: _Layout) -> Iterator[Request]:
    """Requests of a Parquet file; one that goes on in the next row group is joined."""
    names = [n for n in dict.fromkeys(layout.names) if n in file.schema_arrow.names]
    held: dict[str, NDArray[Any]] | None = None
    for group in range(file.metadata.num_row_groups):
        try:
            table = file.read_row_group(group, columns=names)
            data = {n: _column(table.column(n), f"{path}: {n!r}") for n in names}
        except (OSError, ValueError) as e:
            raise UsageError(f"Row group {group} of {path} cannot be read: {_first(e)}.") from e
        if held is not None:
            data = {n: np.concatenate([held[n], data[n]]) for n in names}
        ids = data[layout.request_id]
        edges = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist(), len(ids)]
        for start, end in itertools.pairwise(edges[:-1]):
            yield _row_slice(data, slice(start, end), layout, path)
        held = {n: v[edges[-2] :] for n, v in data.items()} if len(ids) else None
    if held is not None:
        yield _row_slice(held, slice(None), layout, path)


def _row_slice(data: Mapping[str, NDArray[Any]], rows: slice, layout: _Layout, path: Path) -> Request:
    part = {n: v[rows] for n, v in data.items()}
    where = f"{path}, {layout.request_id} {part[layout.request_id][0]}"
    feed = {}
    for i in layout.declared:
        value = part[i.name]
        axis = i.role.candidate_axis
        if axis is None:
            value = value[:1]  # one row per request
        elif i.role.record is not None:
            value = value.reshape(-1)
        elif axis != 0:
            value = np.moveaxis(value, 0, axis)
        feed[i.name] = layout.fit(i, value, where)
    labels = None if layout.labels is None else part[layout.labels]
    return Request(where, feed, labels)


def _column(column: Any, where: str) -> NDArray[Any]:
    """A column as an array with a row per candidate; lists become further axes.

    Raises:
        UsageError: Values are missing, or lists differ in length.
    """
    import pyarrow as pa

    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    shape = [len(array)]
    while True:
        if array.null_count:
            raise UsageError(f"{where} has {array.null_count} missing values; record what the model is fed.")
        kind = array.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            break
        flat = array.flatten()
        width, rest = divmod(len(flat), len(array)) if len(array) else (0, 0)
        lengths = array.value_lengths() if not pa.types.is_fixed_size_list(kind) else None
        if rest or (lengths is not None and len(array) and (lengths.to_numpy(zero_copy_only=False) != width).any()):
            raise UsageError(f"{where} has lists of several lengths; pad them as the model is fed.")
        shape.append(width)
        array = flat
    values = array.to_numpy(zero_copy_only=False)
    return np.asarray(values).reshape(shape)


def _first(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200].rstrip(".")
