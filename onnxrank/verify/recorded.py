"""Recorded requests: `.npz` files, folders of them, ONNX test data, Parquet. They are read one after the other.

Every array or column is named after an input of the original and has a row per candidate; `request_id` tells which rows
belong together. Rows of one request must be next to each other in Parquet; an `.npz` file may hold them in any order.

A source is divided into parts: a row group, a share of a large one, or several small ones. Whoever sees the files reads
a part by itself. All parts have the requests of the whole in their order, so what is made of parts and put together in
that order is the same whoever worked on which.
"""

from __future__ import annotations

import itertools
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxrank.errors import EnvironmentProblem, UsageError
from onnxrank.feeds import Feed, Input
from onnxrank.values import extents, symbols

_ROW_BYTES = 256
"""What a candidate is taken to be, where only the size of a file is known."""

Table = dict[str, NDArray[Any]]


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
class Piece:
    """Some of the requests of one file.

    Attributes:
        path: The file; of ONNX test data its folder.
        group: The row group that they begin in, of Parquet.
        share: Which of how many equal stretches of these requests.
    """

    path: Path
    group: int = 0
    share: tuple[int, int] = (0, 1)


Part = tuple[Piece, ...]
"""What is read at once, by one task."""


@dataclass(frozen=True)
class Source:
    """Recorded requests, read when they are iterated over.

    Attributes:
        rows: Number of candidates of all requests, where it is known ahead.
        parts: What there is, in order.
        reader: Reads it.
    """

    rows: int | None
    parts: tuple[Part, ...]
    reader: _Reader

    def read(self, part: Part | None = None) -> Iterator[Request]:
        """Requests of one part, or of all."""
        for piece in itertools.chain(*self.parts) if part is None else part:
            yield from self.reader.read(piece)


def source(
    path: str | os.PathLike[str],
    declared: Sequence[Input],
    request_id: str = "request_id",
    labels: str | None = None,
    rows: int = 65536,
) -> Source:
    """Finds out of what kind recorded data is.

    Args:
        path: A file or a folder.
        declared: Inputs of the original.
        request_id: Name of what tells requests apart.
        labels: Name of the labels.
        rows: About how many candidates a part has.

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
            return _parquet(tables, layout, rows)
        if archives:
            return Source(None, _parts(map(_archive_size, archives), rows), _Archives(layout))
        if sets:
            return Source(None, _parts(((Piece(d), 1) for d in sets), 64), _TestData(layout))
        raise UsageError(f"The folder {where} holds no .npz, no .parquet and no test_data_set_*/input_0.pb files.")
    if not where.is_file():
        raise UsageError(f"The recorded requests {where} do not exist.")
    if where.suffix.lower() in (".parquet", ".pq"):
        return _parquet([where], layout, rows)
    if where.suffix.lower() == ".npz":
        return Source(None, _parts([_archive_size(where)], rows), _Archives(layout))
    raise UsageError(f"{where} is neither .npz nor .parquet, and no folder of recorded requests.")


def _parts(sized: Iterable[tuple[Piece, int]], most: int) -> tuple[Part, ...]:
    """Divides pieces that are too large, and puts small ones together that follow each other."""
    out: list[Part] = []
    held: list[Piece] = []
    size = 0
    for piece, its in sized:
        shares = max(1, -(-its // most))
        if held and size + its > most:
            out.append(tuple(held))
            held, size = [], 0
        if shares > 1:
            out += [(replace(piece, share=(k, shares)),) for k in range(shares)]
        else:
            held.append(piece)
            size += its
    return (*out, tuple(held)) if held else tuple(out)


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


class _Reader:
    """Reads pieces of one kind of files; keeps the table that it read last, whose shares others are."""

    def __init__(self, layout: _Layout) -> None:
        self.layout = layout
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[Any, Table] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layout": self.layout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.layout = state["layout"]
        self._forget()

    def read(self, piece: Piece) -> Iterator[Request]:
        """Requests of a piece.

        Raises:
            UsageError: It cannot be used.
        """
        raise NotImplementedError

    def _once(self, key: Any, make: Callable[[], Table]) -> Table:
        with self._lock:
            if self._last is None or self._last[0] != key:
                self._last = None  # not both at a time
                self._last = (key, make())
            return self._last[1]


def _share(count: int, share: tuple[int, int]) -> range:
    """Positions of a share."""
    k, of = share
    return range(count * k // of, count * (k + 1) // of)


# --- arrays ------------------------------------------------------------------------------------------------------


def _archive_size(path: Path) -> tuple[Piece, int]:
    """An archive, and about how many candidates it has."""
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(i.file_size for i in file.infolist())
    except (OSError, zipfile.BadZipFile):
        size = 0  # reading it says what is wrong
    return Piece(path), size // _ROW_BYTES


class _Archives(_Reader):
    """`.npz` files."""

    def read(self, piece: Piece) -> Iterator[Request]:
        """Requests of a file, or of a share of it."""
        path, layout = piece.path, self.layout
        data = self._once(path, lambda: self._fitting(path))
        count = _rows(data, layout, str(path))
        if not count:
            return
        ids = data.get(layout.request_id)
        if ids is None:
            if piece.share[0] == 0:
                yield _cut(data, layout, np.arange(count), str(path))
            return
        flat = ids.reshape(-1)
        if len(flat) != count:
            raise UsageError(f"{path}: {layout.request_id!r} has {len(flat)} entries for {count} candidates.")
        order = np.argsort(flat, kind="stable")
        edges = np.flatnonzero(flat[order][1:] != flat[order][:-1]) + 1
        groups = sorted(np.split(order, edges), key=lambda g: int(g[0]))
        for k in _share(len(groups), piece.share):
            yield _cut(data, layout, groups[k], f"{path}, {layout.request_id} {flat[groups[k][0]]}")

    def _fitting(self, path: Path) -> Table:
        data = read_archive(path)
        self.layout.missing(list(data), str(path))
        return {**data, **{i.name: self.layout.fit(i, data[i.name], str(path)) for i in self.layout.declared}}


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


class _TestData(_Reader):
    """Folders of ONNX test data."""

    def read(self, piece: Piece) -> Iterator[Request]:
        """The request of a folder."""
        yield _test_data(piece.path, self.layout)


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


def _parquet(paths: Sequence[Path], layout: _Layout, most: int) -> Source:
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise EnvironmentProblem("Parquet needs pyarrow: install 'onnxrank[data]'.") from e
    sized: list[tuple[Piece, int]] = []
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except OSError as e:
            raise UsageError(f"The recorded requests {path} cannot be read: {_first(e)}.") from e
        except Exception as e:  # pyarrow has its own kinds
            raise UsageError(f"{path} is no Parquet file: {_first(e)}.") from e
        with file:
            layout.missing(file.schema_arrow.names, str(path))
            if layout.request_id not in file.schema_arrow.names:
                raise UsageError(
                    f"{path} has no column {layout.request_id!r} that tells requests apart; name it with --request-id."
                )
            about = file.metadata
            sized += [(Piece(path, k), about.row_group(k).num_rows) for k in range(about.num_row_groups)]
    return Source(sum(rows for _, rows in sized), _parts(sized, most), _Tables(layout))


class _Tables(_Reader):
    """Parquet, by row groups. A request belongs to the group that it begins in, and may go on in the next ones."""

    def read(self, piece: Piece) -> Iterator[Request]:
        """Requests that begin in a row group, or a share of them."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(piece.path) as file:
            ids = self._ids(file, piece.path, piece.group)
            start = _run(ids, self._last_id(file, piece))
            edges = [start, *(k for k in (np.flatnonzero(ids[1:] != ids[:-1]) + 1).tolist() if k > start), len(ids)]
            several = list(itertools.pairwise(edges)) if start < len(ids) else []
            for k in _share(len(several), piece.share):
                first, end = several[k]
                data = self._rows(file, piece.path, piece.group)
                part = {n: v[first:end] for n, v in data.items()}
                if end == len(ids):
                    part = self._continued(file, piece, part)
                yield _request(part, self.layout, piece.path)

    def _last_id(self, file: Any, piece: Piece) -> Any:
        """The identity of the row before a row group; None where there is none."""
        for group in reversed(range(piece.group)):
            ids = self._ids(file, piece.path, group)
            if len(ids):
                return ids[-1]
        return None

    def _continued(self, file: Any, piece: Piece, part: Table) -> Table:
        """A request with its rows in the groups behind its own."""
        several = [part]
        for group in range(piece.group + 1, file.metadata.num_row_groups):
            ids = self._ids(file, piece.path, group)
            its = _run(ids, part[self.layout.request_id][-1])
            if its:
                more = self._rows(file, piece.path, group)
                several.append({n: v[:its] for n, v in more.items()})
            if its < len(ids):
                break
        return part if len(several) == 1 else {n: np.concatenate([t[n] for t in several]) for n in part}

    def _ids(self, file: Any, path: Path, group: int) -> NDArray[Any]:
        return self._columns(file, path, group, [self.layout.request_id])[self.layout.request_id]

    def _rows(self, file: Any, path: Path, group: int) -> Table:
        names = [n for n in dict.fromkeys(self.layout.names) if n in file.schema_arrow.names]
        return self._once((path, group), lambda: self._columns(file, path, group, names))

    def _columns(self, file: Any, path: Path, group: int, names: list[str]) -> Table:
        try:
            table = file.read_row_group(group, columns=names)
            return {n: _column(table.column(n), f"{path}: {n!r}") for n in names}
        except (OSError, ValueError) as e:
            raise UsageError(f"Row group {group} of {path} cannot be read: {_first(e)}.") from e


def _run(ids: NDArray[Any], value: Any) -> int:
    """How many of the first ids are a value."""
    if value is None:
        return 0
    other = np.flatnonzero(ids != value)
    return int(other[0]) if len(other) else len(ids)


def _request(part: Table, layout: _Layout, path: Path) -> Request:
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
