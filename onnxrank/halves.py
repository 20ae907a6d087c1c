"""The two models of `split`, read back: one model that stands for both, and a session that runs both.

The model that stands for both is compared like any other: its algebra, its tables, its structure. The session is what
is served: two models, and between them the state as bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from onnxrank import batches, ranker, runtime
from onnxrank import model as files
from onnxrank.contract import forget, store
from onnxrank.errors import ModelError
from onnxrank.graphs import names_in, rename
from onnxrank.model import LoadedModel

PARTS = ("request", "candidate")


def is_split(place: object) -> bool:
    """Whether a folder holds what `split` wrote."""
    return isinstance(place, (str, os.PathLike)) and (Path(place) / ranker.CONTRACT_FILE).is_file()


def read_contract(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The contract in a folder.

    Raises:
        ModelError: There is none that can be read.
    """
    place = Path(folder) / ranker.CONTRACT_FILE
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        version = found["schema_version"]
        known = {
            "state": {
                t["name"]: (np.dtype(t["type"]), list(t["shape"]), t["offset"]) for t in found["state"]["tensors"]
            },
            "models": {part: (found["models"][part]["file"], found["models"][part]["sha256"]) for part in PARTS},
            "rest": (found["state_version"], found["guard"], dict(found["optimize"]), found["state"]["type"]),
        }
    except OSError as e:
        raise ModelError(f"{place} cannot be read: {e.strerror}.") from e
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ModelError(f"{place} is no contract of onnxrank split: {runtime.first_line(e)}.") from e
    if version != ranker.SCHEMA_VERSION or not known:
        raise ModelError(f"{place} is a contract of version {version}; this onnxrank reads {ranker.SCHEMA_VERSION}.")
    return dict(found)


def load(folder: str | os.PathLike[str]) -> LoadedModel:
    """One model that stands for the two in a folder.

    Raises:
        ModelError: A file is missing, is not the one that the contract was written for, or is no model.
    """
    home, contract = Path(folder), read_contract(folder)
    parts = []
    for part in PARTS:
        told = contract["models"][part]
        place = home / told["file"]
        if not place.resolve().is_relative_to(home.resolve()):
            raise ModelError(f"The contract in {home} names {told['file']!r}, which lies outside.")
        found = files.load(place)
        if found.sha256 != told["sha256"]:
            raise ModelError(
                f"{place} is not the model that {ranker.CONTRACT_FILE} was written with: its SHA-256 is another. Split "
                "the model again."
            )
        # A candidate model for several requests takes the state of one as well.
        alone = batches.single(found)
        forget(alone.proto)
        parts.append(alone)
    made = merged(
        *(_moved(p.proto, os.path.dirname(contract["models"][n]["file"])) for n, p in zip(PARTS, parts, strict=True))
    )
    store(made, contract["optimize"])
    external = {
        os.path.join(os.path.dirname(contract["models"][n]["file"]), e)
        for n, p in zip(PARTS, parts, strict=True)
        for e in p.external
    }
    sha256 = hashlib.sha256((home / ranker.CONTRACT_FILE).read_bytes()).hexdigest()
    size = sum(p.size for p in parts)
    return LoadedModel(made, home, home.resolve(), sha256, size, tuple(sorted(external)), split=home.resolve())


def _moved(model: ModelProto, folder: str) -> ModelProto:
    """The model with its external data told from a folder above."""
    if folder:
        for t in files.tensors(model):
            for e in t.external_data:
                if e.key == "location":
                    e.value = f"{folder}/{e.value}"
    return model


# --- one model of two -------------------------------------------------------------------------------------------------


def merged(request: ModelProto, candidate: ModelProto) -> ModelProto:
    """The candidate model behind the request model.

    What both hold of constants is held once. Names that both use for different things change on the request's side.
    """
    state = {o.name for o in request.graph.output}
    inputs = {i.name for i in request.graph.input}
    held = {t.name: t for t in candidate.graph.initializer}
    shared = {t.name for t in request.graph.initializer if t.name in held and t == held[t.name]}
    taken = names_in(candidate.graph) - state
    clashing = (_tops(request.graph) - state - inputs - shared) & taken
    every = _tops(request.graph) | names_in(candidate.graph)
    names = {}
    for name in sorted(clashing):
        fresh = f"request/{name}"
        while fresh in every:
            fresh = f"request/{fresh}"
        every.add(fresh)
        names[name] = fresh
    out = ModelProto()
    out.CopyFrom(candidate)
    graph = out.graph
    del graph.input[:], graph.node[:], graph.value_info[:]
    known = {i.name for i in request.graph.input}
    graph.input.extend(request.graph.input)
    graph.input.extend(i for i in candidate.graph.input if i.name not in state and i.name not in known)
    for t in request.graph.initializer:
        if t.name not in shared:
            copy = graph.initializer.add()
            copy.CopyFrom(t)
            copy.name = names.get(t.name, t.name)
    sparse = {t.values.name for t in candidate.graph.sparse_initializer}
    for s in request.graph.sparse_initializer:
        if s.values.name not in sparse:
            graph.sparse_initializer.add().CopyFrom(s)
    for node in request.graph.node:
        graph.node.append(renamed(node, names))
    graph.node.extend(candidate.graph.node)
    return out


def _tops(graph: GraphProto) -> set[str]:
    """Names of the tensors of a graph itself."""
    given = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    return given | {o for n in graph.node for o in n.output if o}


def renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy of a node whose operands and results have other names."""
    out = NodeProto()
    out.CopyFrom(node)
    rename(out, names)
    return out


# --- one session of two ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """An input that a session takes side by side with others: its name, and its type in onnxruntime's words."""

    name: str
    type: str


class Pair:
    """A session of both models, with what a session of onnxruntime has; the state goes through bytes.

    Args:
        folder: Where the contract lies.
        **how: As for `runtime.session`.

    Raises:
        ModelError: onnxruntime does not take one of the models.
    """

    def __init__(self, folder: str | os.PathLike[str], **how: Any) -> None:
        self._contract = read_contract(folder)
        models = self._contract["models"]
        places = [Path(folder) / models[part]["file"] for part in PARTS]
        self._request = runtime.session(places[0], **how)
        several = "rows" in models["candidate"]
        alone = batches.single(files.load(places[1])).proto if several else places[1]
        self._candidate = runtime.session(alone, places[1].parent if several else None, **how)
        self._version = [1] * (1 + several)
        self._state = [t["name"] for t in self._contract["state"]["tensors"]]
        self._packed: ranker.Matrices = self._contract["optimize"].get("packed", {})

    def get_inputs(self) -> list[Any]:
        """The inputs of both that callers give, one by one."""
        given = {*self._state, ranker.VERSION}
        own = [i for i in self._candidate.get_inputs() if i.name not in given]
        out: list[Any] = []
        for i in (*self._request.get_inputs(), *own):
            columns = self._packed.get(i.name, {}).get("columns")
            out += [i] if columns is None else [_Given(c["name"], i.type) for c in columns]
        return out

    def get_outputs(self) -> list[Any]:
        """The candidate model's outputs."""
        return list(self._candidate.get_outputs())

    def disable_fallback(self) -> None:
        """As for a session of onnxruntime."""
        self._request.disable_fallback()
        self._candidate.disable_fallback()

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Runs the request model, brings its state to bytes and back, and runs the candidate model."""
        names = self._state + [ranker.VERSION] * self._contract["guard"]
        feeds = ranker.matrices(self._packed, feeds)
        wanted = {i.name for i in self._request.get_inputs()}
        made = dict(zip(names, self._request.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))
        version = int(made.pop(ranker.VERSION).item()) if self._contract["guard"] else self._contract[ranker.VERSION]
        data = ranker.pack(self._contract, ranker.State(version, made))
        state = ranker.unpack(self._contract, data)
        given = {**feeds, **state.tensors, ranker.VERSION: np.full(self._version, state.version)}
        mine = {i.name for i in self._candidate.get_inputs()}
        return list(self._candidate.run(outputs, {k: v for k, v in given.items() if k in mine}))


@functools.cache
def _types() -> dict[int, str]:
    from onnx import helper

    plain = ("FLOAT", "DOUBLE", "FLOAT16", "BOOL", *(f"{s}INT{b}" for s in ("", "U") for b in (8, 16, 32, 64)))
    return {k: helper.tensor_dtype_to_np_dtype(k).name for k in (getattr(TensorProto, n) for n in plain)}


def type_name(kind: int) -> str | None:
    """Numpy's name of an element type; None for those that numpy itself does not have, and for strings."""
    return _types().get(kind)


def rounds_state(loaded: LoadedModel) -> bool:
    """Whether a model stands for two between which 16-bit floats are handed over."""
    return loaded.split is not None and read_contract(loaded.split)["state"]["type"] == "float16"
