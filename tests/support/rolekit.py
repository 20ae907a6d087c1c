"""Declared inputs for the tests of roles."""

from __future__ import annotations

from onnx import TensorProto

from onnxrank.roles import (
    InputInfo,
    Roles,
)

Dim = int | str | None


def info(name: str, *dims: Dim, dtype: int = TensorProto.FLOAT) -> InputInfo:
    return InputInfo(name, dtype, dims)


def levels(roles: Roles) -> dict[str, str]:
    return {name: role.level for name, role in roles.inputs.items()}


OPEN = [info("hist", "N", "L", dtype=TensorProto.INT64), info("item", "N", dtype=TensorProto.INT64)]
