"""`optimize --pack-inputs`: rewrites a model, and brings its inputs side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from onnx import ModelProto

from onnxrank import matrices, pipeline
from onnxrank import model as files
from onnxrank.batching.single import for_one
from onnxrank.contract import CONTRACT, stored_contract
from onnxrank.errors import CheckFailed, UsageError
from onnxrank.passes.emission import Result
from onnxrank.roles import Roles
from onnxrank.verify import Engine, failure, gate
from onnxrank.verify import Options as Checks


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
    stale = [k for k, p in enumerate(made.model.metadata_props) if p.key == CONTRACT]
    for k in stale[::-1]:
        del made.model.metadata_props[k]
    stored = json.dumps({**contract, matrices.KEY: made.told}, sort_keys=True)
    made.model.metadata_props.add(key=CONTRACT, value=stored)
    result.report.changed = True
    result.report.size_after = made.model.ByteSize()
    out = replace(result, model=made.model)
    if check:
        say("checking packed inputs")
        _check(out, "standard" if check is True else check, lengths or {})
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


def _check(result: Result, level: str, lengths: Mapping[str, tuple[int, int]]) -> None:
    """Holds the packed model against the original.

    Raises:
        CheckFailed: It does not give its scores.
    """
    report, study, loaded = result.report, result.study, result.loaded
    known = None
    if study is not None and study.maker.ranges is not None:
        known = (study.maker.ranges, study.symbols)
    second = files.LoadedModel(result.model, None, loaded.folder, "", result.model.ByteSize(), loaded.external)
    options = Checks(roles=Roles.from_dict(report.roles), level=level, lengths=lengths, span=report.candidates)
    with Engine(loaded, matrices.unpacked(second), options, known=known) as engine:
        found = engine.run()
    report.checks, report.looked, report.unseen = gate.comparisons(found), found.looked, found.unseen
    if not found.passed:
        report.changed = False
        raise CheckFailed(f"The model with packed inputs did not pass its check: {failure(found)}", report)
    report.notes += [f.message for f in found.findings if f.severity != "error" and f.message not in report.notes]
