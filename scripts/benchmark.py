"""Times models against what onnxrank makes of them, and against hand-written twins where there are any.

    python scripts/export_models.py OUT --scale industrial
    python scripts/twins.py OUT --scale industrial
    python scripts/benchmark.py OUT

The sessions run interleaved on one thread at onnxruntime's default optimisation level; a ratio is one of medians. What
is told is the time that the thread ran for (`turns.of_thread`), so that other processes count for little.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import onnxruntime
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnxrank import optimize
from onnxrank.roles import load_spec
from onnxrank.turns import of_thread
from scripts.coverage import Requests

SESSIONS = 3


def session(
    model: Path | bytes, level: onnxruntime.GraphOptimizationLevel | None = None
) -> onnxruntime.InferenceSession:
    """One thread; onnxruntime's default optimisation level if none is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if level is not None:
        options.graph_optimization_level = level
    source = str(model) if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def medians(
    sessions: Sequence[onnxruntime.InferenceSession], feeds: Sequence[dict], seconds: float, least: int = 7
) -> list[float]:
    """Median seconds of each session, interleaved, with `least` runs or more of each.

    Every round has an order of its own, so that no session always follows the same one.
    """
    spent: list[list[float]] = [[] for _ in sessions]
    given = [{i.name: feed[i.name] for i in s.get_inputs()} for s, feed in zip(sessions, feeds, strict=True)]
    for s, feed in zip(sessions, given, strict=True):
        s.run(None, feed)
    order = list(range(len(sessions)))
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent[0]) < least:
        shuffle(order)
        for k in order:
            begin = of_thread()
            sessions[k].run(None, given[k])
            spent[k].append(of_thread() - begin)
    return [statistics.median(s) for s in spent]


Make = Callable[[str, int], tuple[onnxruntime.InferenceSession, dict]]
"""Opens a session for a form, and draws inputs by a seed."""


def medians_over_sessions(
    names: Sequence[str],
    make: Make,
    sessions: int,
    seconds: float,
    least: int = 7,
) -> dict[str, float]:
    """Median over several sessions of each form's median seconds, for differences of a few percent.

    Where memory happens to lie makes as much of a difference for as long as a session lives. So sessions are opened
    several times, in several orders, with inputs of their own.

    Args:
        names: The forms.
        make: Opens a session for a form, and draws inputs by a seed.
        sessions: How many of each form, one after the other.
        seconds: For all of them together.
        least: Runs in each, at least.
    """
    found: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(sessions):
        order = random.Random(seed).sample(list(names), len(names))
        opened, feeds = zip(*(make(name, seed) for name in order), strict=True)
        for name, took in zip(order, medians(opened, feeds, seconds / sessions, least), strict=True):
            found[name].append(took)
    return {name: statistics.median(took) for name, took in found.items()}


def measure(path: Path, candidates: Sequence[int], seconds: float) -> list[str]:
    """A row: the original over the optimised model, and the hand-made twin over the optimised model.

    The twin is timed against the optimised model alone: an original that takes a hundred times as long would leave
    few runs, each behind cold caches.
    """
    name = path.name.split(".")[0]
    roles = path.with_name(f"{name}.roles.yaml")
    result = optimize(path, spec=load_spec(roles))
    draw = Requests(onnx.load(path), yaml.safe_load(roles.read_text()))
    models = {"original": path, "optimised": result.model.SerializeToString()}
    twin = path.with_name(f"{name}.twin.onnx")
    if twin.exists():
        models["twin"] = twin
    used = " ".join(f"{u.sites}×{u.name}" for u in result.report.rules) or "unchanged"
    row = [path.stem, used, f"{result.report.macs_after / max(1, result.report.macs_before):.3f}"]
    for n in candidates:

        def make(form: str, seed: int, n: int = n) -> tuple[onnxruntime.InferenceSession, dict]:
            before, after = draw(n, seed)
            return session(models[form]), before if form == "original" or not result.changed else after

        def ratio(form: str, make: Make = make) -> float:
            took = medians_over_sessions((form, "optimised"), make, SESSIONS, seconds, least=3)
            return took[form] / took["optimised"]

        row.append(f"{ratio('original'):.2f}" + (f" ({ratio('twin'):.2f})" if twin.exists() else ""))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*.torchscript.onnx", metavar="GLOB")
    parser.add_argument("--candidates", default="1,32,512,2048")
    parser.add_argument("--seconds", type=float, default=1.5, help="per pair of models and number of candidates")
    options = parser.parse_args()
    candidates = [int(n) for n in options.candidates.split(",")]
    heading = ["model", "rules", "MACs left at 512", *(f"time ratio N={n} (of twin)" for n in candidates)]
    print("| " + " | ".join(heading) + " |")
    print("|" + "---|" * len(heading))
    for path in sorted(options.folder.glob(options.only)):
        if ".twin." not in path.name:
            print("| " + " | ".join(measure(path, candidates, options.seconds)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
