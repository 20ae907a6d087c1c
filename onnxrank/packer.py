"""`optimize --pack-inputs`: rewrites a model, and brings its inputs side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from onnx import ModelProto

from onnxrank import matrices, pipeline
from onnxrank import model as files
from onnxrank.batching.single import for_one
from onnxrank.contract import PACKED, store, stored_contract
from onnxrank.errors import CheckFailed, UsageError
from onnxrank.passes.checking import held
from onnxrank.passes.emission import Result
from onnxrank.roles import Roles
from onnxrank.verify import failure


def pack_inputs(
    model: str | os.PathLike[str] | ModelProto,
    *,
    interface: str = "request",
    check: bool | str = True,
    lengths: Mapping[str, tuple[int, int]] | None = None,
    progress: Callable[[str], None] | None = None,
    **how: Any,
) -> Result:
    """Rewrites a ranking model, and brings its inputs side by side: a matrix of ids and one of floats per level.

    The request's are called `request.ids`, int64 [1, k], and `request.values`, float32 [1, m], those of candidates
    `candidate.ids` and `candidate.values`, with a row each. Which columns are whose is in the contract. An input whose
    length varies, or that has another type, stays as it is.

    Args:
        model: A path, or a model in memory.
        interface: `request` or `same`, as for `optimize`.
        check: Whether to hold the result against the original, or how thoroughly, as for `optimize`.
        lengths: Least and most of the inputs' symbolic lengths.
        progress: Called with the name of each stage.
        **how: Further arguments of `pipeline.optimize`: roles, candidates, rules, tune, plan.

    Returns:
        The model, also where nothing but its inputs changed, and the report.

    Raises:
        UsageError: Roles or options are wrong.
        ModelError: The model is invalid, or has tensors that are called like a matrix.
        CheckFailed: The result does not give the original's scores.
        EnvironmentProblem: onnxruntime is missing, or memory ran out.
    """
    if interface not in ("request", "same"):
        raise UsageError(f"inputs cannot be packed with the interface {interface!r}: use 'request' or 'same'")
    say = progress or (lambda stage: None)
    result = pipeline.optimize(model, interface=interface, check=check, lengths=lengths, progress=progress, **how)
    say("packing inputs")
    proto, contract = _base(result)
    made = matrices.pack(proto, Roles.from_dict(contract["roles"]))
    result.report.notes += made.notes
    if not made.told:
        return result
    store(made.model, {**contract, PACKED: made.told})
    result.report.changed = True
    result.report.size_after = made.model.ByteSize()
    out = replace(result, model=made.model)
    if check:
        say("checking packed inputs")
        second = files.LoadedModel(out.model, None, out.loaded.folder, "", out.model.ByteSize(), out.loaded.external)
        found = held(out, matrices.unpacked(second), "standard" if check is True else check, lengths or {}, out.report)
        if not found.passed:
            out.report.changed = False
            raise CheckFailed(f"The model with packed inputs did not pass its check: {failure(found)}", out.report)
    return out


def _base(result: Result) -> tuple[ModelProto, dict[str, Any]]:
    """The rewritten model and its contract; where rewriting does not pay, the original under the same interface."""
    report = result.report
    stored = stored_contract(result.model)
    if stored is not None:
        return result.model, stored
    if report.interface == "request":
        proto, _, contract = for_one(result)
        return proto, contract
    told = {
        "version": report.version,
        "source_sha256": report.source_sha256,
        "interface": report.interface,
        "candidates": list(report.candidates),
        "roles": report.roles,
        "rules": {},
    }
    return result.model, told
