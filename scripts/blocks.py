"""Times results that score their candidates in blocks, against the same results in one piece, and against the bound.

    python scripts/export_models.py OUT --scale industrial --exporter torchscript --names din field_attention dlrm
    python scripts/blocks.py OUT
    python scripts/blocks.py OUT --memory

The bound is what no graph can be much faster than: the nodes that depend on candidates as a model of their own, run
once per block from outside, with inputs and outputs bound beforehand. All forms take turns on one thread; a ratio is
the median over rounds of the time of the result in one piece over that of the form. The time is the thread's unless
`--wall` is given. With `--memory` it is megabytes that a process of its own holds at most, for one N.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import yaml
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnxrank import Result, blocks, optimize, turns
from onnxrank.graphs import reads
from onnxrank.roles import load_spec
from scripts.benchmark import session
from scripts.coverage import Feed, Requests

COUNTS = (512, 1024, 2048, 4096, 8192)
ROWS = (32, 64, 128, 256, 512)
MEMORY_AT = (512, 8192)
_RUNS = 3

Run = Callable[[], object]


def made(path: Path) -> tuple[Result, Requests]:
    """What onnxrank makes of a model, and who draws its requests."""
    roles = path.with_name(f"{path.name.split('.')[0]}.roles.yaml")
    result = optimize(path, spec=load_spec(roles), candidates=2048, check=False)
    return result, Requests(onnx.load(path), yaml.safe_load(roles.read_text()))


def runner(s: onnxruntime.InferenceSession, feed: Feed) -> Run:
    """Runs a session on what it takes of a request."""
    given = {i.name: feed[i.name] for i in s.get_inputs()}
    return lambda: s.run(None, given)


class Bound:
    """A result in two models: what a request needs once, and what is run per block, from outside."""

    def __init__(self, result: Result) -> None:
        form = result.form
        assert form is not None and form.model is not None
        model, self.parts = form.model, blocks.split(form)
        given, ends = ({v.name: v for v in values} for values in (model.graph.input, model.graph.output))
        inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
        known = {v.name: v for v in inferred} | given
        own = {o for n in self.parts.outside for o in n.output} | given.keys() - self.parts.inputs.keys()
        handed = sorted({i for n in self.parts.inside for i in reads(n)} & own)
        first = _model(model, self.parts.outside, [v for n, v in given.items() if n in own],
                       [known[h] for h in handed if h not in given])  # fmt: skip
        second = _model(model, self.parts.inside, [known[n] for n in (*self.parts.inputs, *handed)], ends.values())
        self.first, self.second = session(first), session(second)

    def runner(self, feed: Feed, rows: int) -> Run:
        """Runs both on a request."""
        names = [o.name for o in self.first.get_outputs()]
        once = runner(self.first, feed) if names else lambda: ()
        handed = dict(zip(names, once(), strict=True))  # type: ignore[call-overload]
        whole = runner(self.second, feed | handed)()
        results = [np.empty_like(r) for r in whole]  # type: ignore[attr-defined]
        count = next(feed[i].shape[a] for i, a in self.parts.inputs.items())
        bound = [self._bound(feed | handed, results, slice(k, min(k + rows, count))) for k in range(0, count, rows)]

        def run() -> None:
            once()
            for binding, _ in bound:
                self.second.run_with_iobinding(binding)

        return run

    def _bound(self, feed: Feed, results: Sequence[Any], part: slice) -> tuple[Any, Any]:
        """A block's inputs and outputs, and what holds them."""
        binding, kept = self.second.io_binding(), []
        for i in self.second.get_inputs():
            axis = self.parts.inputs.get(i.name)
            value = feed[i.name] if axis is None else feed[i.name][(slice(None),) * axis + (part,)]
            kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)))
            binding.bind_ortvalue_input(i.name, kept[-1])
        for o, whole in zip(self.second.get_outputs(), results, strict=True):
            own = whole[part]
            kept.append(own)
            binding.bind_output(o.name, "cpu", 0, own.dtype, own.shape, own.ctypes.data)
        return binding, kept


def _model(
    like: ModelProto, nodes: Sequence[NodeProto], given: Sequence[ValueInfoProto], ends: Sequence[ValueInfoProto]
) -> bytes:
    read = {i for n in nodes for i in reads(n)}
    weights = [t for t in like.graph.initializer if t.name in read]
    out = ModelProto()
    out.CopyFrom(like)
    out.graph.CopyFrom(helper.make_graph(nodes, "part", given, list(ends), weights))
    return bytes(out.SerializeToString())


def ratios(runs: Sequence[Run], seconds: float, clock: Callable[[], float]) -> tuple[float, list[float]]:
    """Seconds of the first run, and that over those of each other one."""

    def timed(run: Run) -> turns.Run:
        def once(_: int) -> float:
            begin = clock()
            run()
            return clock() - begin

        return once

    first, *others = np.median(turns.interleave([timed(r) for r in runs], seconds).seconds, axis=2)
    return float(np.median(first)), [turns.ratio(first, other)[0] for other in others]


def measure(path: Path, options: argparse.Namespace) -> None:
    """Prints the rows of one model."""
    result, draw = made(path)
    assert result.form is not None and result.form.model is not None
    clock = time.perf_counter if options.wall else turns.of_thread
    whole, bound = session(result.form.model.SerializeToString()), Bound(result)
    divided = {b: session(blocks.blocked(result.form, b).SerializeToString()) for b in options.rows}
    for n in options.counts:
        feed = draw(n, 0)[1]
        rows = [b for b in options.rows if b < n]
        runs = {
            "bound": [bound.runner(feed, b) for b in rows],
            "blocks": [runner(divided[b], feed) for b in rows],
        }
        for what, own in runs.items():
            took, found = ratios([runner(whole, feed), *own], options.seconds, clock)
            cells = " ".join(f"{b}:{r:.2f}" for b, r in zip(rows, found, strict=True))
            print(f"{path.name.split('.')[0]:<20} N = {n:<5} {took * 1e3:8.2f} ms  {what:<7} {cells}", flush=True)


def _peak(model: bytes, feed: Feed, answer: Any) -> None:
    run = runner(session(model), feed)
    for _ in range(_RUNS):
        run()
    # Not `ru_maxrss`, which a process has from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    answer.put(int(status["VmHWM"].split()[0]) / 1024)


def memory(path: Path, options: argparse.Namespace) -> None:
    """Prints what processes hold at most."""
    result, draw = made(path)
    assert result.form is not None
    models = {"original": path.read_bytes(), "one piece": result.model.SerializeToString()}
    models |= {f"blocks of {b}": blocks.blocked(result.form, b).SerializeToString() for b in options.rows}
    spawn = multiprocessing.get_context("spawn")
    for name, model in models.items():
        found = []
        for n in MEMORY_AT:
            answer: Any = spawn.Queue()
            worker = spawn.Process(target=_peak, args=(model, draw(n, 0)[name != "original"], answer))
            worker.start()
            found.append(answer.get())
            worker.join()
        told = ", ".join(f"{mb:.0f} MB at N = {n}" for n, mb in zip(MEMORY_AT, found, strict=True))
        print(f"{path.name.split('.')[0]:<20} {name:<14} {told}: {found[1] / found[0]:.2f}", flush=True)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", metavar="GLOB", help="on names of models")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, metavar="N")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="B", help="candidates per block")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing per line")
    parser.add_argument("--wall", action="store_true", help="time of the wall, not of the thread")
    parser.add_argument("--memory", action="store_true", help="memory instead of time")
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    for path in sorted(options.folder.glob("*.onnx")):
        if fnmatch.fnmatch(path.stem, options.only):
            (memory if options.memory else measure)(path, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
