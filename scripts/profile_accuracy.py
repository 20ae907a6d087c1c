"""Holds `onnxrank profile` against clocks of its own.

    python scripts/profile_accuracy.py models/onnx

Of every model, and of what `optimize` makes of it:

- the medians against those of a plain loop around `session.run`, one session at a time, on other requests;
- kernel time summed up by level against the kernel events of a profiler run that is read here;
- the fitted cost, from some numbers of candidates, against the plain loop at others that it has not seen.

The clock runs right before and right after. What misses its limit is measured twice more, and medians of the three
count: what is wrong stays wrong, a burst of other work does not come back. Where the clock still disagrees with itself
by more than the limit, the machine was not steady, and nothing is told. A row is printed for every model; the exit code
is 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import yaml
from coverage import Requests

import onnxrank
from onnxrank.profiling.report import Profile
from onnxrank.profiling.timing import fit
from onnxrank.roles import load_spec

LIMITS = {"median": 0.05, "levels": 0.05, "held out": 0.15}
FITTED = (32, 128, 512, 2048)
HELD_OUT = (64, 256, 1024)
TOLD = 512  # at fewer candidates most kernels take less than the profiler's clock tells apart


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
    names = [o.name for o in made.get_outputs()]  # looked up once: None costs a microsecond per run
    for feed in [*feeds, *feeds]:
        made.run(names, feed)
    out: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(out) < 5:
        begin = time.perf_counter()
        made.run(names, feeds[len(out) % len(feeds)])
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


@dataclass(frozen=True)
class Sample:
    """What was told, and what the clock said before and after."""

    told: float
    before: float
    after: float

    @property
    def drift(self) -> float:
        """By how much the clock disagrees with itself."""
        return abs(self.before / self.after - 1)

    @property
    def miss(self) -> float:
        """By how much what was told is off."""
        return self.told / ((self.before + self.after) / 2) - 1


Samples = dict[str, list[Sample]]
"""By kind, a sample of each model."""


def settled(take: Callable[[], Samples]) -> Samples:
    """Samples, of which those that miss a limit are taken twice more."""
    rounds = [take()]
    if any(max(abs(s.miss), s.drift) > LIMITS[kind] for kind, own in rounds[0].items() for s in own):
        rounds += [take(), take()]

    def middle(samples: Sequence[Sample]) -> Sample:
        return Sample(*(statistics.median(getattr(s, f) for s in samples) for f in ("told", "before", "after")))

    return {kind: [middle(s) for s in zip(*(r[kind] for r in rounds), strict=True)] for kind in rounds[0]}


class Misses:
    """Relative misses of one kind; where the clock disagrees with itself by more than the limit nothing is told."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.found: list[float] = []
        self.unsteady = 0

    def add(self, sample: Sample) -> None:
        if sample.drift > self.limit:
            self.unsteady += 1
        else:
            self.found.append(sample.miss)

    @property
    def beyond(self) -> int:
        return sum(abs(m) > self.limit for m in self.found)

    def __str__(self) -> str:
        if not self.found:
            return f"-, {self.unsteady} unsteady"
        typical, worst = statistics.median(map(abs, self.found)), max(self.found, key=abs)
        left = f", {self.unsteady} unsteady" if self.unsteady else ""
        return f"{len(self.found)}: {typical:.1%}, {worst:+.1%}{left}"


def measure(path: Path, seconds: float) -> dict[str, Misses]:
    """Misses over both models and all numbers of candidates."""
    name = path.name.split(".")[0]
    roles = path.with_name(f"{name}.roles.yaml")
    spec = load_spec(roles)
    draw = Requests(onnx.load(path), yaml.safe_load(roles.read_text()))
    out = {kind: Misses(limit) for kind, limit in LIMITS.items()}
    with tempfile.TemporaryDirectory() as folder:
        fast = Path(folder) / "fast.onnx"
        result = onnxrank.optimize(path, spec=spec, check=False)
        result.save(fast)
        sides = [path, fast] if result.changed else [path]

        def clock(n: int) -> list[float]:
            # A new session each time: what one has run before decides how its memory lies, and that a few per cent.
            return [
                statistics.median(plain(session(p), [draw(n, q)[k] for q in range(4)], seconds / 2))
                for k, p in enumerate(sides)
            ]

        def events(n: int) -> list[float]:
            return [kernel_time(p, [draw(n, q)[k] for q in range(4)]) for k, p in enumerate(sides)]

        def at(n: int) -> Samples:
            kernels, before = events(n) if n >= TOLD else [], clock(n)
            found: Profile = onnxrank.profile(*sides, spec=spec, candidates=[n], seconds=seconds, memory=False)
            after, again = clock(n), events(n) if n >= TOLD else []
            told = [t.median for t in found.points[0].times]
            levels = [sum(s.seconds for s in m.kernels[0].levels) for m in found.models]
            return {
                "median": [Sample(*s) for s in zip(told, before, after, strict=True)],
                "levels": [Sample(*s) for s in zip(levels, kernels, again, strict=False)],
            }

        medians: list[list[float]] = [[] for _ in sides]
        for n in FITTED:
            for kind, samples in settled(lambda n=n: at(n)).items():
                for k, sample in enumerate(samples):
                    out[kind].add(sample)
                    if kind == "median":
                        medians[k].append(sample.told)
        lines = [fit(FITTED, own) for own in medians]
        for n in HELD_OUT:

            def held_out(n: int = n) -> Samples:
                told = [line.at(n) for line in lines if line is not None]
                return {"held out": [Sample(*s) for s in zip(told, clock(n), clock(n), strict=True)]}

            for sample in settled(held_out)["held out"]:
                out["held out"].add(sample)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*.torchscript.onnx", metavar="GLOB")
    parser.add_argument("--seconds", type=float, default=0.4, help="per model and number of candidates")
    options = parser.parse_args()
    print("| model | " + " | ".join(f"{k}, limit {v:.0%}: count, typical, worst" for k, v in LIMITS.items()) + " |")
    print("|" + "---|" * (1 + len(LIMITS)))
    every: dict[str, list[Misses]] = {kind: [] for kind in LIMITS}
    for path in sorted(options.folder.glob(options.only)):
        if ".twin." in path.name:
            continue
        found = measure(path, options.seconds)
        for kind, misses in found.items():
            every[kind].append(misses)
        print(f"| {path.stem} | " + " | ".join(map(str, found.values())) + " |", flush=True)
    for kind, several in every.items():
        count = sum(len(m.found) for m in several)
        unsteady = sum(m.unsteady for m in several)
        print(f"{kind}: {sum(m.beyond for m in several)} of {count} beyond {LIMITS[kind]:.0%}, {unsteady} unsteady")
    return int(any(m.beyond for several in every.values() for m in several))


if __name__ == "__main__":
    raise SystemExit(main())
