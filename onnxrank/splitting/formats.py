"""What is written for whom: plain files, a Python module, a model repository for Triton."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnxrank import ranker
from onnxrank.splitting import python_module, triton

FORMATS = ("plain", "python", "triton")


def name_of(path: Path | None) -> str:
    """What models made of a file are called."""
    stem = "" if path is None else path.name.removesuffix(".onnx")
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_-") or "ranker"


def places(form: str, name: str, version: int) -> dict[str, str]:
    """Where the two models lie.

    Args:
        form: The format.
        name: What they are called.
        version: Version of the state.
    """
    if form == "triton":
        return {part: triton.place(f"{name}_{part}", version) for part in ("request", "candidate")}
    return {part: f"{part}.onnx" for part in ("request", "candidate")}


def files(form: str, name: str, contract: Mapping[str, Any]) -> dict[str, bytes]:
    """What else is written, by place."""
    if form == "python":
        return {f"{Path(ranker.__file__).stem}.py": python_module.source(contract).encode()}
    if form == "triton":
        return {place: text.encode() for place, text in triton.configs(name, contract).items()}
    return {}
