"""Models that take several requests per call, read back.

Here are their calling convention, requests brought into it, and one model of the same nodes for a single request, which
everything works on that asks about one request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from onnxrank import ranker
from onnxrank.contract import CONTRACT, PACKED, stored_contract
from onnxrank.errors import ModelError
from onnxrank.graphs import rename, versions
from onnxrank.model import LoadedModel

Feed = dict[str, NDArray[Any]]
INTERFACES = ("batch", "padded")
"""Interfaces of several requests per call."""
NODE = "onnxrank/requests"
"""Name of the `If` between the nodes for one request and those for several."""


def convention(model: ModelProto) -> dict[str, Any] | None:
    """How a model takes several requests, by its contract; None for a model that takes one.

    Raises:
        ModelError: The contract cannot be read.
    """
    stored = stored_contract(model)
    if stored is None or stored.get("interface") not in INTERFACES:
        return None
    told = stored.get("rows")
    names = {i.name for i in model.graph.input}
    if not isinstance(told, dict) or not isinstance(told.get("inputs"), dict) or not told["inputs"].keys() <= names:
        raise ModelError("The stored contract does not say how the model takes requests. Optimise the original again.")
    return {**told, PACKED: stored[PACKED]} if stored.get(PACKED) else told


def joined(told: Mapping[str, Any], requests: Sequence[Mapping[str, NDArray[Any]]]) -> Feed:
    """Inputs of one call from those of single requests.

    Args:
        told: How the model takes requests.
        requests: Per request its inputs under the interface `request`, packed or not; with `padded` all have as many
            candidates.
    """
    out: Feed = {}
    requests = [ranker.matrices(told.get(PACKED, {}), r) for r in requests]
    for name, how in told["inputs"].items():
        parts = [r[name] for r in requests]
        apart = how["added"] or (told["form"] == "padded" and how["each"])
        whole = np.stack(parts) if apart else np.concatenate(parts, how["axis"])
        if told["form"] == "triton" and how["each"]:
            if how["first"]:
                out[told["name"]] = np.array([p.shape for p in parts], np.int32)
            whole = whole.reshape(-1)
        out[name] = whole
    counts = np.array([_count(told, r) for r in requests], np.int64)
    if told["form"] == "lengths":
        out[told["name"]] = counts
    elif told["form"] == "offsets":
        out[told["name"]] = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    elif told["form"] == "index":
        out[told["name"]] = np.repeat(np.arange(len(requests)), counts)
    return out


def candidates(told: Mapping[str, Any], request: Mapping[str, NDArray[Any]]) -> int:
    """The number of candidates of a request."""
    return _count(told, ranker.matrices(told.get(PACKED, {}), request))


def _count(told: Mapping[str, Any], request: Mapping[str, NDArray[Any]]) -> int:
    name, how = next((n, h) for n, h in told["inputs"].items() if h["each"])
    return int(request[name].shape[how["axis"]]) // int(how["inner"])


def parted(told: Mapping[str, Any], outputs: Mapping[str, NDArray[Any]], counts: Sequence[int]) -> list[Feed]:
    """Outputs of single requests from those of one call.

    Args:
        told: How the model takes requests.
        outputs: What it gave.
        counts: The number of candidates of each request.
    """
    ends = np.cumsum(counts)
    found: list[Feed] = [{} for _ in counts]
    for name, data in outputs.items():
        how = told["outputs"][name]
        if told["form"] == "triton" and how["each"]:
            data = data.reshape([-1 if n is None else n for n in how["shape"]])
        for k, (end, count) in enumerate(zip(ends, counts, strict=True)):
            if how["added"] or (told["form"] == "padded" and how["each"]):
                found[k][name] = data[k]
            else:
                first, last = (int(end) - count, int(end)) if how["each"] else (k, k + 1)
                own = range(first * how["inner"], last * how["inner"])
                found[k][name] = np.take(data, own, how["axis"])
    return found


def contradicting(told: Mapping[str, Any], feed: Mapping[str, NDArray[Any]]) -> list[Feed]:
    """The inputs of a call with what says which candidates are whose wrong in several ways."""
    if told["form"] == "padded":
        return []
    given = feed[told["name"]]
    if told["form"] == "index":
        # The first request may be without candidates, so one less of each may still be in order.
        wrong = [given - given[:1] - 1]
        if len(given) > 1:
            wrong.append(np.concatenate([given[-1:] + 1, given[:-1]]))
    elif told["form"] == "offsets":
        wrong = [given + 1, np.where(np.arange(len(given)) == len(given) - 1, given + 1, given)]
    else:
        lower = given.copy().reshape(len(given), -1)
        lower[0, 0] -= 1
        wrong = [given + 1, lower.reshape(given.shape)]
    return [{**feed, told["name"]: w.astype(given.dtype)} for w in wrong]


# --- the model for one request ---------------------------------------------------------------------------------------


def single(loaded: LoadedModel) -> LoadedModel:
    """The same model, taking one request under the interface `request`; a model that does anyway, as it is."""
    told = convention(loaded.proto)
    if told is None:
        return loaded
    return replace(loaded, proto=_Single(loaded.proto, told).run(), batch=loaded.proto)


class _Single:
    """A model for several requests, called with one.

    Args:
        model: The model.
        told: How it takes requests.
    """

    def __init__(self, model: ModelProto, told: Mapping[str, Any]) -> None:
        self.model, self.told = ModelProto(), told
        self.model.CopyFrom(model)
        self.opset = versions(model)[""]
        self.before: list[NodeProto] = []
        self.behind: list[NodeProto] = []
        self.names: dict[str, str] = {}

    def run(self) -> ModelProto:
        """Makes the model."""
        graph, told = self.model.graph, self.told
        inputs: list[ValueInfoProto] = []
        for info in graph.input:
            if info.name == told["name"] and told["form"] != "padded":
                continue
            how = told["inputs"].get(info.name)
            inputs.append(info if how is None else self._input(info, how))
        self._rows()
        outputs = [self._output(info) for info in graph.output]
        for node in graph.node:
            rename(node, self.names)
        nodes = [*self.before, *graph.node, *self.behind]
        del graph.node[:], graph.input[:], graph.output[:]
        graph.node.extend(nodes)
        graph.input.extend(inputs)
        graph.output.extend(outputs)
        self._contract()
        return self.model

    def _contract(self) -> None:
        """Says what the model takes now."""
        stored = stored_contract(self.model)
        assert stored is not None
        for p in self.model.metadata_props:
            if p.key == CONTRACT:
                kept = {k: v for k, v in stored.items() if k not in ("rows", "requests")}
                p.value = json.dumps({**kept, "interface": "request"}, sort_keys=True)

    def _add(self, nodes: list[NodeProto], op: str, operands: Sequence[str], result: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, list(operands), [result], name=f"onnxrank/one/{result}", **attributes))
        return result

    def _constant(self, to: list[NodeProto], name: str, value: object) -> str:
        return self._add(to, "Constant", [], name, value=numpy_helper.from_array(np.array(value, np.int64), name))

    def _axes(self, to: list[NodeProto], op: str, name: str, result: str, axis: int) -> str:
        """Unsqueeze or Squeeze."""
        if self.opset < 13:
            return self._add(to, op, [name], result, axes=[axis])
        return self._add(to, op, [name, self._constant(to, f"{result}/axes", [axis])], result)

    def _input(self, info: ValueInfoProto, how: Mapping[str, Any]) -> ValueInfoProto:
        made = helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, how["dims"])
        form = self.told["form"]
        name = f"onnxrank/many/{info.name}"
        if how["added"] or (form == "padded" and how["each"]):
            self.names[info.name] = self._axes(self.before, "Unsqueeze", info.name, name, 0)
        elif form == "triton" and how["each"]:
            flat = self._constant(self.before, f"{name}/flat", [-1])
            self.names[info.name] = self._add(self.before, "Reshape", [info.name, flat], name)
        return made

    def _rows(self) -> None:
        """What says that all candidates are of one request."""
        form, result, to = self.told["form"], self.told["name"], self.before
        if form == "padded":
            return
        name, how = next((n, h) for n, h in self.told["inputs"].items() if h["each"])
        shape = self._add(to, "Shape", [name], f"{result}/shape")
        if form == "triton":
            wide = self._axes(to, "Unsqueeze", shape, f"{result}/row", 0)
            self._add(to, "Cast", [wide], result, to=int(TensorProto.INT32))
            return
        at = self._constant(to, f"{result}/axis", [how["axis"]])
        count = self._add(
            to, "Gather", [shape, at], f"{result}/entries" if form != "lengths" or how["inner"] > 1 else result
        )
        if how["inner"] > 1:
            each = self._constant(to, f"{result}/each", [how["inner"]])
            count = self._add(to, "Div", [count, each], f"{result}/count" if form != "lengths" else result)
        zero = self._constant(to, f"{result}/zero", [0])
        if form == "offsets":
            self._add(to, "Concat", [zero, count], result, axis=0)
        elif form == "index":
            self._add(to, "Expand", [zero, count], result)

    def _output(self, info: ValueInfoProto) -> ValueInfoProto:
        how, form = self.told["outputs"][info.name], self.told["form"]
        made = helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, how["dims"])
        name = f"onnxrank/many/{info.name}"
        if how["added"] or (form == "padded" and how["each"]):
            self.names[info.name] = name
            self._axes(self.behind, "Squeeze", name, info.name, 0)
        elif form == "triton" and how["each"]:
            self.names[info.name] = name
            shape = self._constant(self.behind, f"{name}/shape", [-1 if n is None else n for n in how["shape"]])
            self._add(self.behind, "Reshape", [name, shape], info.name)
        return made
