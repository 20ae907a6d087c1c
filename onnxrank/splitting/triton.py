"""A model repository for Triton: the request model with a response cache, the candidate model, an ensemble of both.

Every configuration is complete. Without one that lists inputs and outputs, Triton makes one up, and may batch requests
of several users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxrank.splitting.pbtxt import Each, Word, write

Values = Sequence[Mapping[str, Any]]
"""Inputs or outputs, as the contract has them."""

CONFIG = "config.pbtxt"
TYPES = {
    "bool": "TYPE_BOOL", "uint8": "TYPE_UINT8", "uint16": "TYPE_UINT16", "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64", "int8": "TYPE_INT8", "int16": "TYPE_INT16", "int32": "TYPE_INT32",
    "int64": "TYPE_INT64", "float16": "TYPE_FP16", "float32": "TYPE_FP32", "float64": "TYPE_FP64",
    "string": "TYPE_STRING", "bfloat16": "TYPE_BF16",
}  # fmt: skip
"""Triton's names of element types, by the contract's."""

_MOST = 64
"""Requests that the server joins at most."""
_DELAY = 500
"""Microseconds that a request may wait for others."""


def place(name: str, version: int) -> str:
    """Where a model lies.

    Triton's version of a model is that of the state: it is part of the key of the response cache, so that a request
    model that is replaced while the server runs does not find answers of the one before.
    """
    return f"{name}/{max(version, 1)}/model.onnx"


def configs(name: str, contract: Mapping[str, Any]) -> dict[str, str]:
    """The repository's configurations, by place.

    Args:
        name: What the ensemble is called.
        contract: Content of `contract.json`.
    """
    request, candidate = (contract["models"][part] for part in ("request", "candidate"))
    rows = candidate.get("rows")
    head = f"# Written by onnxrank {contract['version']} for state version {contract['state_version']}."
    cached = {
        "# The state of a request that comes again is in the cache (tritonserver --cache-config local,size=...).": None,
        "response_cache": {"enable": True},
    }
    models: dict[str, dict[str, Any]] = {
        f"{name}_request": model(f"{name}_request", request["inputs"], request["outputs"], 1) | cached,
        f"{name}_candidate": model(f"{name}_candidate", candidate["inputs"], candidate["outputs"], 2, rows),
        name: _ensemble(name, request, candidate, rows),
    }
    texts = {f"{place}/{CONFIG}": write({head: None} | fields) for place, fields in models.items()}
    # An ensemble has no files, and Triton wants a version all the same.
    return texts | {f"{name}/1/.keep": ""}


def model(
    name: str, inputs: Values, outputs: Values, instances: int, rows: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The configuration of an ONNX model, as `pbtxt.write` takes it.

    Args:
        name: The model, and its folder.
        inputs: As the contract has them.
        outputs: Likewise.
        instances: How many run at the same time.
        rows: How it takes several requests, of the rows `triton`, which the server then joins; None for one per call.
    """
    many = "# Instances score at the same time, on a core each: write as many as there are cores to spare."
    threads = ("intra_op_thread_count", "inter_op_thread_count")
    return {
        "name": name,
        "backend": "onnxruntime",
        "default_model_filename": "model.onnx",
        **(_alone(inputs, outputs) if rows is None else _joined(inputs, outputs, rows)),
        **({many: None} if instances > 1 else {}),
        "instance_group": ({"kind": Word("KIND_CPU"), "count": instances},),
        "# 0 would be all cores, for every instance.": None,
        "parameters": [{"key": key, "value": {"string_value": "1"}} for key in threads],
    }


def _alone(inputs: Values, outputs: Values) -> dict[str, Any]:
    return {
        "# The first extent is no batch: 1 for the request, and the number of candidates.": None,
        "max_batch_size": 0,
        "input": _tensors(inputs),
        "output": _tensors(outputs),
    }


def _joined(inputs: Values, outputs: Values, rows: Mapping[str, Any]) -> dict[str, Any]:
    told = rows["inputs"]
    first = next(n for n, how in told.items() if how["first"])
    items = []
    for i in _fed(inputs, rows):
        how = told[i["name"]]
        dims = how["dims"] if how["each"] else i["shape"][1:]
        items.append({**i, "shape": dims, "ragged": how["each"]})
    shapes = {
        "kind": Word("BATCH_ITEM_SHAPE"),
        "target_name": rows["name"],
        "data_type": Word("TYPE_INT32"),
        "source_input": first,
    }
    cut = Word("BATCH_SCATTER_WITH_INPUT_SHAPE")
    each = [o["name"] for o in outputs if rows["outputs"][o["name"]]["each"]]
    return {
        "# The server joins so many requests: rows of states, and the entries of candidates one after another.": None,
        "max_batch_size": _MOST,
        "dynamic_batching": {"max_queue_delay_microseconds": _DELAY},
        "input": _tensors(items),
        "batch_input": (shapes,),
        "output": _tensors([{**o, "shape": _cut(rows, o["name"])} for o in outputs]),
        "batch_output": [{"target_name": n, "kind": cut, "source_input": first} for n in each],
    }


def _ensemble(
    name: str, request: Mapping[str, Any], candidate: Mapping[str, Any], rows: Mapping[str, Any] | None
) -> dict[str, Any]:
    made = {o["name"] for o in request["outputs"]}
    own = [i for i in candidate["inputs"] if i["name"] not in made]
    given = candidate["outputs"]
    if rows is not None:
        # Clients say that theirs is one request: a first extent of 1.
        own = [{**i, "shape": [1, *rows["inputs"][i["name"]]["dims"]]} for i in _fed(own, rows)]
        given = [{**o, "shape": [1, *_cut(rows, o["name"])]} for o in given]
    steps = [
        _step(f"{name}_request", request["inputs"], request["outputs"]),
        _step(f"{name}_candidate", _fed(candidate["inputs"], rows), candidate["outputs"]),
    ]
    return {
        "name": name,
        "platform": "ensemble",
        "max_batch_size": 0,
        "input": _tensors([*request["inputs"], *own]),
        "output": _tensors(given),
        "ensemble_scheduling": {"step": steps},
    }


def _fed(inputs: Values, rows: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The inputs that callers give: not what the server says of the batch."""
    return [i for i in inputs if rows is None or i["name"] in rows["inputs"]]


def _cut(rows: Mapping[str, Any], name: str) -> list[int | None]:
    """Extents of what a request gets of an output: as the source has them, where it has as many axes; else flat."""
    how = rows["outputs"][name]
    if not how["each"]:
        return [d for k, d in enumerate(how["shape"]) if how["added"] or k != how["axis"]] or [1]
    source = next(h for h in rows["inputs"].values() if h["first"])
    return list(how["shape"]) if len(how["shape"]) == len(source["dims"]) else [None]


def _tensors(values: Values) -> list[dict[str, Any]]:
    out = []
    for v in values:
        dims = tuple(d if isinstance(d, int) else -1 for d in v["shape"])
        shape: dict[str, Any] = {"dims": dims} if dims else {"dims": (1,), "reshape": {"shape": ()}}
        ragged = {"allow_ragged_batch": True} if v.get("ragged") else {}
        out.append({"name": v["name"], "data_type": Word(TYPES[v["type"]]), **shape, **ragged})
    return out


def _step(name: str, inputs: Values, outputs: Values) -> dict[str, Any]:
    maps = {
        what: Each({"key": v["name"], "value": v["name"]} for v in values)
        for what, values in (("input_map", inputs), ("output_map", outputs))
    }
    return {"model_name": name, "model_version": -1, **maps}
