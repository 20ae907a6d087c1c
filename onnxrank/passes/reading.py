"""Reading a model, and the roles of its inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto

from onnxrank import feeds
from onnxrank import model as files
from onnxrank.contract import roles_again, stored_contract
from onnxrank.errors import ModelError
from onnxrank.operators import domain_of, find
from onnxrank.roles import InputInfo, Roles, infer, resolve


def read(model: str | os.PathLike[str] | ModelProto | files.LoadedModel) -> files.LoadedModel:
    """Reads a model that can be worked on.

    Raises:
        UsageError: The file cannot be read.
        ModelError: It is no valid model, or holds no operator that is known.
    """
    loaded = model if isinstance(model, files.LoadedModel) else files.load(model)
    if all_foreign(loaded.proto):
        raise ModelError("the model holds no operators of the default ONNX domain, nor others that are known")
    return loaded


def described(loaded: files.LoadedModel) -> list[InputInfo]:
    """The model's inputs as declared."""
    return feeds.describe(loaded.proto)


def roles_of(
    loaded: files.LoadedModel,
    roles: Roles | None = None,
    request: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    infer_from: Mapping[str, NDArray[Any]] | None = None,
) -> tuple[Roles, list[str]]:
    """The roles of a model's inputs: those given, else those of its contract.

    Returns:
        The roles, and what the user should know of them.

    Raises:
        UsageError: They are wrong, or nothing is said of them.
        ModelError: The contract holds roles that do not fit the model.
    """
    if roles is not None:
        return roles, []
    inputs, contract = described(loaded), stored_contract(loaded.proto)
    if infer_from is not None:
        return infer(inputs, infer_from)
    if contract is not None and not request and spec is None:
        note = "the model was optimised before; its roles are those of its contract"
        return roles_again(inputs, contract), [note]
    return resolve(inputs, request=request, spec=spec), []


def all_foreign(model: ModelProto) -> bool:
    """Whether all nodes are of domains that ONNX does not define, and neither known nor functions of the model."""
    own = {(f.domain, f.name) for f in model.functions}
    known = (
        onnx.defs.has(n.op_type, domain_of(n)) or not domain_of(n) or find(n) or (n.domain, n.op_type) in own
        for n in model.graph.node
    )
    return bool(model.graph.node) and not any(known)
