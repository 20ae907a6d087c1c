"""Peak memory of a model in a process of its own.

    python -m onnxrank.profiling.memory < REQUEST.json

The peak is Linux's VmHWM, which starts anew with a program; the maximum that getrusage tells is handed down from the
process that started this one, and would be that of the profiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from onnxrank.profiling.report import Memory
from onnxrank.profiling.sessions import Requests, Runner, Target, open_session
from onnxrank.runtime import first_line

_STATUS = Path("/proc/self/status")
_RUNS = 3
_PATIENCE = 300  # seconds


def peak_memory(
    source: Path | ModelProto, requests: Requests, candidates: int, target: Target
) -> tuple[Memory | None, str | None]:
    """Runs a model in a child process and reads its resident memory.

    Args:
        source: The model's file, or the model.
        requests: Requests with this number of candidates.
        candidates: The number.
        target: Where it runs.

    Returns:
        The memory, or None and the reason why it is not known.
    """
    if not _STATUS.exists():
        return None, "peak memory is read from /proc, which this system does not have"
    with tempfile.TemporaryDirectory(prefix="onnxrank-") as place:
        if isinstance(source, ModelProto):
            path = Path(place, "model.onnx")
            path.write_bytes(source.SerializeToString())
        else:
            path = source
        feeds = Path(place, "request.npz")
        held = {k: v.astype(str) if v.dtype == object else v for k, v in requests[0].items()}
        # Input names may be anything, and an .npz file's may not.
        arrays: dict[str, Any] = {f"a{k}": _plain(v) for k, v in enumerate(held.values())}
        np.savez(feeds, **arrays)
        asked = {
            "model": os.fspath(path),
            "request": os.fspath(feeds),
            "inputs": list(held),
            "types": [v.dtype.name for v in held.values()],
            "target": [target.provider, target.threads],
        }
        command = [sys.executable, "-m", "onnxrank.profiling.memory"]
        try:
            done = subprocess.run(
                command, input=json.dumps(asked), capture_output=True, text=True, timeout=_PATIENCE, check=False
            )
            start, loaded, peak = json.loads(done.stdout)
        except (OSError, subprocess.SubprocessError, ValueError) as e:
            return None, f"peak memory could not be measured: {first_line(e)}"
    return Memory(candidates, start, loaded, peak), None


def _plain(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Types of ml_dtypes as bytes, which every numpy reads."""
    return data.view(np.uint8 if data.dtype.itemsize == 1 else np.uint16) if data.dtype.kind == "V" else data


def _resident(what: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _child() -> None:
    import ml_dtypes  # noqa: F401  registers its types' names with numpy

    from onnxrank import runtime

    asked = json.load(sys.stdin)
    runtime.onnxruntime()
    with np.load(asked["request"]) as data:
        feed = {
            name: data[f"a{k}"].view(np.dtype(kind)) if data[f"a{k}"].dtype.name != kind else data[f"a{k}"]
            for k, (name, kind) in enumerate(zip(asked["inputs"], asked["types"], strict=True))
        }
    target = Target(*asked["target"])
    start = _resident("VmRSS")
    session = open_session(Path(asked["model"]), target)
    loaded = _resident("VmRSS")
    run = Runner(session, [feed], target)
    for k in range(_RUNS):
        run(k)
    print(json.dumps([start, loaded, _resident("VmHWM")]))


if __name__ == "__main__":
    _child()
