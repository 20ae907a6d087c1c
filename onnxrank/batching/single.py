"""The model for one request, which the one for several is written from."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto

from onnxrank import feeds
from onnxrank.contract import roles_again, stored_contract
from onnxrank.errors import ModelError
from onnxrank.forms import Form
from onnxrank.pipeline import Result
from onnxrank.roles import Roles


def for_one(result: Result) -> tuple[ModelProto, Roles, dict[str, Any]]:
    """The model for one request under the interface `request`.

    Where rewriting it does not pay it is the original, with rows of what is request-level repeated inside.

    Returns:
        The model, roles of its inputs, and its contract.
    """
    report, made = result.report, result.model
    stored = stored_contract(made)
    if stored is not None:
        return made, roles_again(feeds.describe(made), stored), stored
    study = result.study
    assert study is not None
    form = Form(study, (), "request", False, report.candidates)
    if form.model is None:
        raise ModelError("The model cannot be written with one row of what is request-level.")
    told = {
        "version": report.version,
        "source_sha256": report.source_sha256,
        "interface": "request",
        "candidates": list(report.candidates),
        "roles": report.roles,
        "rules": {name: len(at) for name, at in form.rewrite.sites().items()},
    }
    return form.model, roles_again(feeds.describe(form.model), told), told
