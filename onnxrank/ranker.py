"""Scores candidates with the two models of `onnxrank split`; needs numpy and onnxruntime, and nothing else.

The request model runs once per request and gives the state; the candidate model runs on the state and the candidates.
`Ranker` keeps states, so that a request that comes again costs the candidate model only. `pack` and `unpack` bring a
state to bytes and back, for a feature store, or for another process.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
Matrices = Mapping[str, Mapping[str, Any]]
"""Inputs that hold others side by side: per matrix its type, and which columns are whose."""

CONTRACT_FILE = "contract.json"
SCHEMA_VERSION = 1
"""Version of the contract that this module reads."""
VERSION = "state_version"
"""Name of the tensor that says which request model a state is of."""
_MAGIC = b"ONRS"
_FORMAT = 1
_HEAD = struct.Struct("<4sIq")  # magic, format, version of the state
_ALIGN = 8
_LONG_KEY = 1024  # bytes


class StateError(ValueError):
    """A state that the candidate model must not be given: of another version, cut short, or of another shape."""


# --- states ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What the request model gives.

    Attributes:
        version: Which request model gave it.
        tensors: Its tensors by name.
    """

    version: int
    tensors: dict[str, NDArray[Any]] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def pack(contract: Mapping[str, Any], state: State) -> bytes:
    """A state as bytes, little-endian.

    16 bytes of head (`ONRS`, the format's number as uint32, the version of the state as int64), then every tensor in
    the order of the contract, each at a multiple of 8 bytes. Tensors of which the contract gives an offset lie there;
    before the entries of one whose shape varies lie its extents, as int64.

    Args:
        contract: Content of `contract.json`.
        state: The state.

    Raises:
        StateError: A tensor is missing, or of another type or shape than the contract says.
    """
    out = bytearray(_HEAD.pack(_MAGIC, _FORMAT, state.version))
    for t in contract["state"]["tensors"]:
        data = state.tensors.get(t["name"])
        if data is None:
            raise StateError(f"the state has no tensor {t['name']!r}")
        _check(t, data.dtype, data.shape)
        if t["offset"] is None:
            out += np.asarray(data.shape, "<i8").tobytes()
        out += np.ascontiguousarray(data, data.dtype.newbyteorder("<")).tobytes()
        out += bytes(-len(out) % _ALIGN)
    return bytes(out)


def unpack(contract: Mapping[str, Any], data: bytes) -> State:
    """A state from bytes; its arrays are views on them.

    Args:
        contract: Content of `contract.json`.
        data: What `pack` made.

    Raises:
        StateError: They are no state, one of another version, or not all of it.
    """
    if len(data) < _HEAD.size:
        raise StateError(f"the state is cut short: {len(data)} bytes do not even hold its head of {_HEAD.size}")
    magic, form, version = _HEAD.unpack_from(data)
    if magic != _MAGIC or form != _FORMAT:
        raise StateError("these bytes are no state")
    check_version(contract, version)
    at = _HEAD.size
    tensors = {}
    for t in contract["state"]["tensors"]:
        kind = np.dtype(t["type"]).newbyteorder("<")
        if t["offset"] is None:
            shape = tuple(_read(data, at, np.dtype("<i8"), (len(t["shape"]),), t["name"]).tolist())
            at += 8 * len(shape)
            _check(t, kind, shape)
        else:
            shape = tuple(t["shape"])
        tensors[t["name"]] = _read(data, at, kind, shape, t["name"])
        at += tensors[t["name"]].nbytes
        at += -at % _ALIGN
    if at != len(data):
        raise StateError(f"the state has {len(data)} bytes where {at} are right")
    return State(version, tensors)


def check_version(contract: Mapping[str, Any], version: int) -> None:
    """Refuses states of other request models.

    Raises:
        StateError: It is of one.
    """
    if version != contract[VERSION]:
        raise StateError(
            f"the state is of version {version}, and the candidate model takes version {contract[VERSION]}: it was "
            "made by another request model. Make it again."
        )


def _check(t: Mapping[str, Any], kind: np.dtype[Any], shape: Sequence[int]) -> None:
    fits = len(shape) == len(t["shape"]) and all(
        n >= 0 and (n == d or not isinstance(d, int)) for n, d in zip(shape, t["shape"], strict=True)
    )
    if kind != np.dtype(t["type"]) or not fits:
        raise StateError(
            f"the state's tensor {t['name']!r} is {kind.name} {list(shape)} where the contract has {t['type']} "
            f"{t['shape']}"
        )


def _read(data: bytes, at: int, kind: np.dtype[Any], shape: Sequence[int], name: str) -> NDArray[Any]:
    count = 1
    for n in shape:
        count *= n
    if at + count * kind.itemsize > len(data):
        raise StateError(f"the state is cut short in {name!r}: {len(data)} bytes")
    return np.frombuffer(data, kind, count, at).reshape(tuple(shape))


# --- inputs side by side -------------------------------------------------------------------------------------------


def matrices(matrices: Matrices, given: Arrays) -> dict[str, NDArray[Any]]:
    """Inputs with those that are packed side by side in matrices; a matrix that is given as such stays.

    Args:
        matrices: Which columns are whose.
        given: Arrays by name.

    Raises:
        KeyError: An input is missing.
        ValueError: One has another type or shape than the model was made for.
    """
    return SideBySide(matrices)(given)


class SideBySide:
    """Brings inputs side by side, as `matrices` does, call after call.

    Args:
        matrices: Which columns are whose.
    """

    def __init__(self, matrices: Matrices) -> None:
        self._matrices = {
            name: (np.dtype(m["type"]), [_Column(c["name"], tuple(c["shape"]), c["width"]) for c in m["columns"]])
            for name, m in matrices.items()
        }
        self._packed = {c.name for _, columns in self._matrices.values() for c in columns}

    def __call__(self, given: Arrays) -> dict[str, NDArray[Any]]:
        """See `matrices`."""
        out = {name: data for name, data in given.items() if name not in self._packed}
        for name, (kind, columns) in self._matrices.items():
            if name not in out:
                out[name] = np.concatenate([c.of(given[c.name], kind) for c in columns], axis=1)
        return out


class _Column:
    """An input that is columns of a matrix; only its first extent may vary, and is no number then."""

    __slots__ = ("_rest", "_varies", "_width", "name", "shape")

    def __init__(self, name: str, shape: tuple[Any, ...], width: int) -> None:
        self.name, self.shape, self._width = name, shape, width
        self._varies, self._rest = bool(shape) and not isinstance(shape[0], int), shape[1:]

    def of(self, data: NDArray[Any], kind: np.dtype[Any]) -> NDArray[Any]:
        """The columns."""
        if type(data) is not np.ndarray:
            data = np.asarray(data)
        shape = data.shape
        fits = shape and shape[1:] == self._rest if self._varies else shape == self.shape
        if not fits or data.dtype != kind:
            raise ValueError(
                f"the input {self.name!r} is {data.dtype} {list(shape)}, and must be {kind} {list(self.shape)}"
            )
        return data if len(shape) == 2 else data.reshape(-1, self._width)


# --- the cache -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counters:
    """What a cache did so far.

    Attributes:
        hits: How often a state was there, or was being made already.
        misses: How often one was made.
        evictions: How many went, to make room.
        states: How many it holds.
        bytes: Bytes of these.
    """

    hits: int
    misses: int
    evictions: int
    states: int
    bytes: int


class StateCache:
    """The states used last, up to a number of bytes. Threads may share it.

    Args:
        most: Bytes that it may hold; 0 for nothing.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[Hashable, State] = OrderedDict()
        self._making: dict[Hashable, Future[State]] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = self._evictions = self._bytes = 0

    @property
    def counters(self) -> Counters:
        """Its counters."""
        with self._lock:
            return Counters(self._hits, self._misses, self._evictions, len(self._held), self._bytes)

    def get(self, key: Hashable, make: Callable[[], State]) -> State:
        """The state of a key; made by one thread where it is not there, while others that want it wait.

        Args:
            key: Two requests that are not equal must have different ones.
            make: Makes the state.

        Raises:
            Exception: What `make` raised; nothing is kept then.
        """
        with self._lock:
            found = self._held.get(key)
            if found is not None:
                self._held.move_to_end(key)
                self._hits += 1
                return found
            waiting = self._making.get(key)
            mine: Future[State] = Future()
            if waiting is None:
                self._making[key] = mine
                self._misses += 1
            else:
                self._hits += 1
        if waiting is not None:
            return waiting.result()
        try:
            made = make()
        except BaseException as e:
            with self._lock:
                del self._making[key]
            mine.set_exception(e)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, made)
        mine.set_result(made)
        return made

    def clear(self) -> None:
        """Forgets all states; the counters go on."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def _keep(self, key: Hashable, state: State) -> None:
        if state.nbytes > self._most:
            return
        self._held[key] = state
        self._bytes += state.nbytes
        while self._bytes > self._most:
            _, gone = self._held.popitem(last=False)
            self._bytes -= gone.nbytes
            self._evictions += 1


# --- the ranker ------------------------------------------------------------------------------------------------------


class Ranker:
    """Both models, and a cache of states. Threads may share it.

    Args:
        folder: Where `contract.json` lies; this file's own folder if None.
        cache_bytes: Bytes of states that are kept.
        threads: Threads inside an operator, per call.
        providers: onnxruntime's execution providers.

    Raises:
        ValueError: The contract is of a version that this module does not read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        cache_bytes: int = 256 << 20,
        threads: int = 1,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        home = Path(__file__).resolve().parent if folder is None else Path(folder)
        self.contract: dict[str, Any] = json.loads((home / CONTRACT_FILE).read_text(encoding="utf-8"))
        if self.contract.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{home / CONTRACT_FILE} is not a contract of version {SCHEMA_VERSION}")
        models = self.contract["models"]
        if "rows" in models["candidate"]:
            raise ValueError(f"the candidate model in {home} takes several requests per call: split without --rows")
        self._request, self._candidate = (
            _session(home / models[part]["file"], threads, providers) for part in ("request", "candidate")
        )
        self._request_inputs = _Inputs("request", models["request"]["inputs"])
        self._state = [t["name"] for t in self.contract["state"]["tensors"]]
        given = {*self._state, VERSION}
        features = [i for i in models["candidate"]["inputs"] if i["name"] not in given]
        self._candidate_inputs = _Inputs("candidate", features)
        self.outputs = [o["name"] for o in models["candidate"]["outputs"]]
        self.cache = StateCache(cache_bytes)
        self._ahead: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def score(self, request: Arrays, candidates: Arrays, key: Hashable | None = None) -> dict[str, NDArray[Any]]:
        """Scores the candidates of a request.

        Args:
            request: Inputs of the request model, one row; those that it takes side by side one by one, or packed.
            candidates: Inputs of the candidate model, a row per candidate, likewise.
            key: What the state is kept under, if not by the request's own inputs: requests that differ in any of these
                must have different keys.

        Returns:
            The outputs by name.

        Raises:
            ValueError: An input is missing.
        """
        return self.score_with(self.state(request, key), candidates)

    def state(self, request: Arrays, key: Hashable | None = None) -> State:
        """The state of a request: from the cache, or made by the request model.

        Args:
            request: Inputs of the request model.
            key: As for `score`.
        """
        feed = self._request_inputs.of(request)
        return self.cache.get(_key(feed) if key is None else key, lambda: self._made(feed))

    def prepare(self, request: Arrays, key: Hashable | None = None) -> Future[State]:
        """Has the state of a request made in another thread, while candidates are still being looked for.

        `score` of the same request then finds it, or waits for it.
        """
        with self._lock:
            if self._ahead is None:
                self._ahead = ThreadPoolExecutor(1, thread_name_prefix="onnxrank-state")
        return self._ahead.submit(self.state, request, key)

    def score_with(self, state: State | bytes, candidates: Arrays) -> dict[str, NDArray[Any]]:
        """Scores candidates with a state that the caller has, or has as bytes.

        Raises:
            StateError: The state is of another version, or not whole.
            ValueError: An input is missing.
        """
        if isinstance(state, (bytes, bytearray, memoryview)):
            state = unpack(self.contract, bytes(state))
        check_version(self.contract, state.version)
        feed = self._candidate_inputs.of(candidates)
        feed |= {name: state.tensors[name] for name in self._state}
        if self.contract["guard"]:
            feed[VERSION] = np.array([state.version], np.int64)
        return dict(zip(self.outputs, self._candidate.run(self.outputs, feed), strict=True))

    def pack(self, state: State) -> bytes:
        """A state as bytes; `score_with` takes them."""
        return pack(self.contract, state)

    def close(self) -> None:
        """Ends the thread of `prepare`."""
        if self._ahead is not None:
            self._ahead.shutdown()
            self._ahead = None

    def _made(self, feed: dict[str, NDArray[Any]]) -> State:
        """The version is what the model itself says, whose file may have been replaced before the others were."""
        names = self._state + [VERSION] * self.contract["guard"]
        tensors = dict(zip(names, self._request.run(names, feed), strict=True))
        version = int(tensors.pop(VERSION).item()) if self.contract["guard"] else self.contract[VERSION]
        for t in tensors.values():
            t.setflags(write=False)  # whoever gets the state out of the cache gets the same arrays
        return State(version, tensors)


def _session(file: Path, threads: int, providers: Sequence[str]) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(os.fspath(file), options, providers=list(providers))


class _Inputs:
    """What a model takes.

    Args:
        model: Which of the two it is.
        inputs: Its inputs, as the contract has them.
    """

    def __init__(self, model: str, inputs: Sequence[Mapping[str, Any]]) -> None:
        self._model, self._inputs = model, inputs
        self._names = [i["name"] for i in inputs]
        self._side_by_side = SideBySide({i["name"]: i for i in inputs if "columns" in i})

    def of(self, given: Arrays) -> dict[str, NDArray[Any]]:
        """Its inputs, of arrays by name: those that it takes side by side one by one, or packed."""
        try:
            found = self._side_by_side(given)
            return {name: found[name] for name in self._names}
        except KeyError as e:
            names = [c["name"] for i in self._inputs for c in i.get("columns", [i])]
            raise ValueError(f"the {self._model} model's input {e.args[0]!r} is missing; it takes {names}") from None


def _key(feed: Arrays) -> Hashable:
    """What tells requests apart: types, shapes and entries of their inputs; a hash of these where they are many."""
    entries = b"".join(repr(d.tolist()).encode() if d.dtype.hasobject else d.tobytes() for d in feed.values())
    if len(entries) > _LONG_KEY:
        entries = hashlib.blake2b(entries, digest_size=32).digest()
    # Shapes and, of texts, lengths: entries that are joined must not be taken for others.
    told = [(d.dtype.char, d.shape, len(repr(d.tolist())) if d.dtype.hasobject else 0) for d in feed.values()]
    return entries, tuple(told)
