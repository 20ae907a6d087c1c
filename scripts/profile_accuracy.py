"""Holds `onnxrank profile` against clocks of its own.

    python scripts/profile_accuracy.py models/onnx

Of every model, and of what `optimize` makes of it:

- the medians against those of a plain loop around `session.run`, one session at a time, on other requests;
- kernel time summed up by level against the kernel events of a profiler run that is read here;
- the fitted cost, from some numbers of candidates, against the plain loop at others that it has not seen.

A row is printed for every model; the exit code is 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import yaml
from coverage import Requests

import onnxrank
from onnxrank.profiling.report import ModelProfile, Profile
from onnxrank.roles import load_spec

LIMITS = {"median": 0.05, "levels": 0.05, "held out": 0.15}
FITTED = (32, 128, 512, 2048)
HELD_OUT = (64, 256, 1024)


def session(path: Path, trace: str | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if trace is not None:
        options.enable_profiling, options.profile_file_prefix = True, trace
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def given(made: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {i.name: feed[i.name] for i in made.get_inputs()}


def plain(made: onnxruntime.InferenceSession, feeds: Sequence[dict[str, np.ndarray]], seconds: float) -> list[float]:
    """Times of single runs."""
    feeds = [given(made, f) for f in feeds]
    for feed in [*feeds, *feeds]:
        made.run(None, feed)
    out: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(out) < 5:
        begin = time.perf_counter()
        made.run(None, feeds[len(out) % len(feeds)])
        out.append(time.perf_counter() - begin)
    return out


def kernel_time(path: Path, feeds: Sequence[dict[str, np.ndarray]], seconds: float = 0.5) -> float:
    """Kernel time per run: the mean of the faster half, as the profiler's events have it."""
    with tempfile.TemporaryDirectory() as folder:
        made = session(path, os.path.join(folder, "p"))
        plain(made, feeds, seconds)
        events = json.loads(Path(made.end_profiling()).read_text())
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run"][8:]
    kernels = [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]
    at = np.array([e["ts"] for e in kernels])
    took = np.array([e["dur"] for e in kernels], float)
    totals = sorted(float(took[(at >= a) & (at <= b)].sum()) for a, b in spans)
    return statistics.mean(totals[: max(1, len(totals) // 2)]) * 1e-6


def worst(values: Sequence[float]) -> float:
    return max(values, key=abs)


def measure(path: Path, seconds: float) -> dict[str, tuple[float, float]]:
    """Per limit the typical and the largest miss, over both models and all numbers of candidates."""
    name = path.name.split(".")[0]
    roles = path.with_name(f"{name}.roles.yaml")
    draw = Requests(onnx.load(path), yaml.safe_load(roles.read_text()))
    misses: dict[str, list[float]] = {limit: [] for limit in LIMITS}
    with tempfile.TemporaryDirectory() as folder:
        fast = Path(folder) / "fast.onnx"
        result = onnxrank.optimize(path, spec=load_spec(roles), check=False)
        result.save(fast)
        sides = [path, fast] if result.changed else [path]
        requests = {n: [draw(n, k) for k in range(4)] for n in (*FITTED, *HELD_OUT)}

        def feeds(n: int, side: int) -> list[dict[str, np.ndarray]]:
            return [pair[side] for pair in requests[n]]

        sessions = [session(p) for p in sides]

        def loop(numbers: Sequence[int]) -> list[dict[int, list[float]]]:
            return [{n: plain(s, feeds(n, k), seconds / 2) for n in numbers} for k, s in enumerate(sessions)]

        before = loop((*FITTED, *HELD_OUT))
        # At few candidates most kernels take less than the profiler's clock can tell.
        events = [{n: kernel_time(p, feeds(n, k)) for n in FITTED[-2:]} for k, p in enumerate(sides)]
        found: Profile = onnxrank.profile(
            *sides, spec=load_spec(roles), candidates=FITTED, seconds=seconds, memory=False
        )
        after = loop((*FITTED, *HELD_OUT))
        for k, m in enumerate(found.models):
            clock = {n: statistics.median(before[k][n] + after[k][n]) for n in before[k]}
            misses["median"] += [p.times[k].median / clock[p.candidates] - 1 for p in found.points]
            kernels = {n: (events[k][n] + kernel_time(sides[k], feeds(n, k))) / 2 for n in events[k]}
            misses["levels"] += [levels(m, n, t) for n, t in kernels.items()]
            assert m.line is not None
            misses["held out"] += [m.line.at(n) / clock[n] - 1 for n in HELD_OUT]
    return {k: (statistics.median(map(abs, v)), worst(v)) for k, v in misses.items()}


def levels(model: ModelProfile, candidates: int, kernels: float) -> float:
    own = next(k for k in model.kernels if k.candidates == candidates)
    return sum(s.seconds for s in own.levels) / kernels - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*.torchscript.onnx", metavar="GLOB")
    parser.add_argument("--seconds", type=float, default=0.4, help="per model and number of candidates")
    options = parser.parse_args()
    print("| model | " + " | ".join(f"{k}: typical, worst (limit {v:.0%})" for k, v in LIMITS.items()) + " |")
    print("|" + "---|" * (1 + len(LIMITS)))
    missed, count = dict.fromkeys(LIMITS, 0), 0
    for path in sorted(options.folder.glob(options.only)):
        if ".twin." in path.name:
            continue
        found = measure(path, options.seconds)
        count += 1
        for k, (_, most) in found.items():
            missed[k] += abs(most) > LIMITS[k]
        print(f"| {path.stem} | " + " | ".join(f"{a:.1%}, {b:+.1%}" for a, b in found.values()) + " |", flush=True)
    print(f"{count} models; beyond the limit anywhere: " + ", ".join(f"{k} {v}" for k, v in missed.items()))
    return int(any(missed.values()))


if __name__ == "__main__":
    raise SystemExit(main())
