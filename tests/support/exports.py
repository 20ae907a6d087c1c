"""The exports in `models/onnx`, for tests that go over all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "models" / "onnx"
FILES = sorted(path.name for path in FOLDER.glob("*.onnx"))
# Every test over all exports takes a second or more for each of these: left to the slow run.
LONG = {
    "destine",
    "dlrm_bags",
    "dmr",
    "edcn",
    "fignn",
    "finalmlp",
    "gdcn",
    "hstu",
    "hstu_time",
    "hyformer",
    "interformer",
    "masknet_parallel",
    "masknet_serial",
    "onetrans",
    "pepnet",
    "rankmixer",
    "sim",
    "transact",
    "wukong",
}
QUICK = [name for name in FILES if name.split(".")[0] not in LONG and "dynamo" not in name]
"""Of models of both exporters one export; the slow run has all."""

every_export = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FILES]
)
