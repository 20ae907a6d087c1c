"""A model repository for Triton: the request model with a response cache, the candidate model, an ensemble of both.

Every configuration is complete. Without one that lists inputs and outputs, Triton makes one up, and may batch requests
of several users.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    head = f"# Written by onnxrank {contract['version']} for state version {contract['state_version']}.\n"
    made = {o["name"] for o in request["outputs"]}
    rows = candidate.get("rows")
    own = [i for i in candidate["inputs"] if i["name"] not in made]
    given = candidate["outputs"]
    if rows is not None:
        # Clients say that theirs is one request: a first extent of 1.
        own = [{**i, "shape": [1, *rows["inputs"][i["name"]]["dims"]]} for i in own if i["name"] in rows["inputs"]]
        given = [{**o, "shape": [1, *_cut(rows, o["name"])]} for o in given]
    once = [
        "# The state of a request that comes again is in the cache (tritonserver --cache-config local,size=...).",
        "response_cache { enable: true }",
    ]
    many = ["# Instances score at the same time, on a core each: write as many as there are cores to spare."]
    return {
        f"{name}_request/{CONFIG}": head + model(f"{name}_request", request["inputs"], request["outputs"], 1, once),
        f"{name}_candidate/{CONFIG}": head
        + (
            model(f"{name}_candidate", candidate["inputs"], candidate["outputs"], 2, [], many)
            if rows is None
            else ragged(f"{name}_candidate", candidate["inputs"], candidate["outputs"], rows, 2, many)
        ),
        f"{name}/{CONFIG}": head
        + "\n".join(
            [
                f'name: "{name}"',
                'platform: "ensemble"',
                "max_batch_size: 0",
                *_tensors("input", [*request["inputs"], *own]),
                *_tensors("output", given),
                "ensemble_scheduling {",
                "  step [",
                *_step(f"{name}_request", request["inputs"], request["outputs"], ","),
                *_step(f"{name}_candidate", _fed(candidate["inputs"], rows), candidate["outputs"], ""),
                "  ]",
                "}",
                "",
            ]
        ),
        # An ensemble has no files, and Triton wants a version all the same.
        f"{name}/1/.keep": "",
    }


def model(
    name: str,
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    instances: int,
    further: Iterable[str] = (),
    about: Iterable[str] = (),
) -> str:
    """The configuration of an ONNX model whose first extent is no batch.

    Args:
        name: The model, and its folder.
        inputs: As the contract has them.
        outputs: Likewise.
        instances: How many run at the same time.
        further: Lines at the end.
        about: Lines before the instances.
    """
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        "# The first extent is no batch: 1 for the request, and the number of candidates.",
        "max_batch_size: 0",
        *_tensors("input", inputs),
        *_tensors("output", outputs),
        *about,
        *_run_by(instances),
        *further,
        "",
    ]
    return "\n".join(lines)


def _run_by(instances: int) -> list[str]:
    return [
        f"instance_group [ {{ kind: KIND_CPU count: {instances} }} ]",
        "# 0 would be all cores, for every instance.",
        "parameters [",
        '  { key: "intra_op_thread_count" value: { string_value: "1" } },',
        '  { key: "inter_op_thread_count" value: { string_value: "1" } }',
        "]",
    ]


def ragged(
    name: str,
    inputs: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    rows: Mapping[str, Any],
    instances: int,
    about: Iterable[str] = (),
) -> str:
    """The configuration of a model of the rows `triton`, whose requests the server joins.

    Args:
        name: The model, and its folder.
        inputs: As the contract has them.
        outputs: Likewise.
        rows: How it takes several requests.
        instances: How many run at the same time.
        about: Lines before the instances.
    """
    told = rows["inputs"]
    first = next(n for n, how in told.items() if how["first"])
    items = []
    for i in _fed(inputs, rows):
        how = told[i["name"]]
        dims = how["dims"] if how["each"] else i["shape"][1:]
        items.append({**i, "shape": dims, "ragged": how["each"]})
    lines = [
        f'name: "{name}"',
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        "# The server joins so many requests: rows of states, and the entries of candidates one after another.",
        f"max_batch_size: {_MOST}",
        f"dynamic_batching {{ max_queue_delay_microseconds: {_DELAY} }}",
        *_tensors("input", items),
        f"batch_input [ {{ kind: BATCH_ITEM_SHAPE target_name: {quoted(rows['name'])} data_type: TYPE_INT32 "
        f"source_input: {quoted(first)} }} ]",
        *_tensors("output", [{**o, "shape": _cut(rows, o["name"])} for o in outputs]),
        "batch_output [",
        ",\n".join(
            f"  {{ target_name: {quoted(o['name'])} kind: BATCH_SCATTER_WITH_INPUT_SHAPE "
            f"source_input: {quoted(first)} }}"
            for o in outputs
            if rows["outputs"][o["name"]]["each"]
        ),
        "]",
        *about,
        *_run_by(instances),
        "",
    ]
    return "\n".join(lines)


def _fed(inputs: Sequence[Mapping[str, Any]], rows: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The inputs that callers give: not what the server says of the batch."""
    return [i for i in inputs if rows is None or i["name"] in rows["inputs"]]


def _cut(rows: Mapping[str, Any], name: str) -> list[int | None]:
    """Extents of what a request gets of an output: as the source has them, where it has as many axes; else flat."""
    how = rows["outputs"][name]
    if not how["each"]:
        return [d for k, d in enumerate(how["shape"]) if how["added"] or k != how["axis"]] or [1]
    source = next(h for h in rows["inputs"].values() if h["first"])
    return list(how["shape"]) if len(how["shape"]) == len(source["dims"]) else [None]


def _tensors(what: str, values: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for k, v in enumerate(values):
        dims = ", ".join(str(d) if isinstance(d, int) else "-1" for d in v["shape"])
        shape = f"dims: [ {dims} ]" if dims else "dims: [ 1 ] reshape { shape: [ ] }"
        comma = "," if k + 1 < len(values) else ""
        ragged = " allow_ragged_batch: true" if v.get("ragged") else ""
        rows.append(f"  {{ name: {quoted(v['name'])} data_type: {TYPES[v['type']]} {shape}{ragged} }}{comma}")
    return [f"{what} [", *rows, "]"]


def _step(
    name: str, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]], comma: str
) -> list[str]:
    lines = ["    {", f'      model_name: "{name}"', "      model_version: -1"]
    for what, values in (("input_map", inputs), ("output_map", outputs)):
        lines += [f"      {what} {{ key: {quoted(v['name'])} value: {quoted(v['name'])} }}" for v in values]
    return [*lines, f"    }}{comma}"]


def quoted(text: str) -> str:
    """Text as a string of protobuf's text format."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(c) for c in text) + '"'


def _escaped(c: str) -> str:
    return f"\\{c}" if c in '"\\' else "".join(f"\\{b:03o}" for b in c.encode())
