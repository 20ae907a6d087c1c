"""Times results that score their candidates in blocks, against the same results in one piece, and against the bound.

Past some number of candidates the rows of intermediates leave the cache. This script puts what depends on the number of
candidates into one Scan or Loop over blocks, with what a request needs once in front of it.

    python scripts/export_models.py OUT --scale industrial --exporter torchscript --names din field_attention dlrm
    python scripts/blocks.py OUT
    python scripts/blocks.py OUT --memory

The bound is what no graph can be faster than: the same nodes as a model of their own, which is run once per block from
outside, with inputs and outputs bound beforehand. All forms take turns on one thread; a ratio is the median over rounds
of the time of the result in one piece over that of the form. The time is the thread's unless `--wall` is given.
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import yaml
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnxrank import optimize, turns
from onnxrank.graphs import captured, claimed, names_in, reads, rename
from onnxrank.roles import load_spec
from scripts.benchmark import session
from scripts.coverage import Feed, Requests

COUNTS = (512, 1024, 2048, 4096, 8192)
BLOCKS = (32, 64, 128, 256, 512)
FORMS = ("bound", "scan", "loop", "scan, weights outside")
_AT = (3, 5)

Axes = dict[str, int]
"""Inputs with rows of candidates, and along which axis those lie."""


def axes(draw: Requests) -> Axes:
    """Reads off the inputs of a result in which the number of candidates shows."""
    some, others = (draw(n, 0)[1] for n in _AT)
    found = {k: [a for a, (m, n) in enumerate(zip(v.shape, others[k].shape, strict=True)) if m != n]
             for k, v in some.items()}  # fmt: skip
    return {k: a[0] for k, a in found.items() if a}


class Parts:
    """A model in two parts: nodes that do not depend on the candidates, and those that do.

    Attributes:
        model: The whole.
        axes: Its inputs with rows of candidates.
        outer: Nodes of the first part.
        inner: Nodes of the second one.
        handed: Tensors of the first part that the second one reads; no weights.
        weights: Weights that only the second part reads.
    """

    def __init__(self, model: ModelProto, axes: Axes) -> None:
        self.model, self.axes = model, axes
        self.outer: list[NodeProto] = []
        self.inner: list[NodeProto] = []
        moving, fixed = set(axes), {t.name for t in model.graph.initializer} - {i.name for i in model.graph.input}
        constants: list[NodeProto] = []
        for node in model.graph.node:
            inside = bool(reads(node) & moving)
            constant = reads(node) <= fixed
            (self.inner if inside else constants if constant else self.outer).append(node)
            moving |= set(node.output) if inside else set()
            fixed |= set(node.output) if constant else set()
        self.constants = _read_by(constants, self.inner)
        self.outer = [*_read_by(constants, self.outer), *self.outer]
        self.inner = [*self.constants, *self.inner]
        read = {i for n in self.inner for i in reads(n)}
        above = {i for n in self.outer for i in reads(n)}
        stored = {t.name for t in model.graph.initializer}
        made = {o for n in self.outer for o in n.output} | {i.name for i in model.graph.input}
        made -= {o for n in self.constants for o in n.output}
        self.handed = sorted(read & made - set(axes) - stored)
        self.weights = [t for t in model.graph.initializer if t.name in read - above]

    def pieces(self) -> tuple[ModelProto, ModelProto]:
        """Both parts as models of their own."""
        graph = self.model.graph
        known = {v.name: v for v in onnx.shape_inference.infer_shapes(self.model).graph.value_info}
        known |= {v.name: v for v in graph.input}

        def cut(nodes: Sequence[NodeProto], given: Sequence[ValueInfoProto], made: Sequence[ValueInfoProto]) -> Any:
            names = {i for n in nodes for i in reads(n)}
            weights = [t for t in graph.initializer if t.name in names]
            out = ModelProto()
            out.CopyFrom(self.model)
            out.graph.CopyFrom(helper.make_graph(nodes, graph.name, given, made, weights))
            return out

        first = [v for v in graph.input if v.name not in self.axes]
        computed = [known[h] for h in self.handed if h not in {v.name for v in first}]
        given = [v for v in graph.input if v.name in self.axes] + [known[h] for h in self.handed]
        return cut(self.outer, first, computed), cut(self.inner, given, graph.output)

    def blocked(self, rows: int, by: str = "scan", inside: bool = True) -> ModelProto:
        """The whole with its second part in one operator over blocks of equal size.

        There are as few blocks as hold `rows` candidates each at most, and they are as small as so many can be: less
        than one row per block is made for nothing. These are copies of the last candidate, and are cut off.

        Args:
            rows: Candidates per block, at most.
            by: `scan` or `loop`.
            inside: Whether weights lie in the body.
        """
        out = ModelProto()
        out.CopyFrom(self.model)
        graph = out.graph
        taken = names_in(graph)
        body, writer = GraphProto(name="block"), _Writer(taken)
        own = [*self.axes, *(o.name for o in graph.output), *(o for n in self.constants for o in n.output)]
        names = {n: claimed(f"block/{n}", taken) for n in own}
        inner = []
        body.initializer.extend(self.weights if inside else ())
        for node in self.inner:
            inner.append(NodeProto())
            inner[-1].CopyFrom(node)
            rename(inner[-1], names)
        index, total, count = writer.index(graph, self.axes, rows)
        made = [_of(names[o.name], o) for o in graph.output]
        results = [claimed(f"blocks/{o.name}", taken) for o in graph.output]
        if by == "scan":
            blocks = [writer.add("Gather", [i, index], axis=a) for i, a in self.axes.items()]
            body.input.extend(_of(names[v.name], v) for v in graph.input if v.name in self.axes)
            body.node.extend(inner)
            body.output.extend(made)
            over = helper.make_node("Scan", blocks, results, name="onnxrank/blocks", body=body,
                                    num_scan_inputs=len(blocks), scan_input_axes=list(self.axes.values()))  # fmt: skip
        else:
            k, go, on = (claimed(f"block/{n}", taken) for n in ("k", "go", "on"))
            mine = claimed("block/rows", taken)
            body.input.extend([helper.make_tensor_value_info(k, TensorProto.INT64, []),
                               helper.make_tensor_value_info(go, TensorProto.BOOL, [])])  # fmt: skip
            body.node.append(helper.make_node("Gather", [index, k], [mine], axis=0))
            body.node.extend(helper.make_node("Gather", [i, mine], [names[i]], axis=a) for i, a in self.axes.items())
            body.node.extend([*inner, helper.make_node("Identity", [go], [on])])
            body.output.extend([helper.make_tensor_value_info(on, TensorProto.BOOL, []), *made])
            over = helper.make_node("Loop", [count, ""], results, name="onnxrank/blocks", body=body)
        writer.nodes.append(over)
        for o, found in zip(graph.output, results, strict=True):
            writer.flat(found, o, total)
        del graph.node[:], graph.value_info[:]
        graph.node.extend([*self.outer, *writer.nodes])
        moved = {t.name for t in body.initializer}
        kept = [t for t in graph.initializer if t.name not in moved]
        del graph.initializer[:]
        graph.initializer.extend([*kept, *writer.stored])
        assert not (captured(body) & {n for node in self.inner for n in node.output})
        return out


class _Writer:
    """Nodes around the blocks."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = taken
        self.nodes: list[NodeProto] = []
        self.stored: list[TensorProto] = []

    def add(self, op: str, operands: Sequence[str], **attributes: Any) -> str:
        """Appends a node and names its output."""
        made = claimed(f"blocks/{op}", self.taken)
        self.nodes.append(helper.make_node(op, operands, [made], **attributes))
        return made

    def constant(self, value: int | list[int]) -> str:
        """Stores whole numbers."""
        name = claimed("blocks/constant", self.taken)
        self.stored.append(numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def index(self, graph: GraphProto, axes: Axes, rows: int) -> tuple[str, str, str]:
        """Names which candidates are in which block, how many there are as a vector of one entry, and of blocks."""
        (name, axis), *_ = axes.items()
        zero, one = self.constant(0), self.constant(1)
        total = self.add("Gather", [self.add("Shape", [name]), self.constant(axis)])
        above = self.add("Add", [total, self.constant(rows - 1)])
        count = self.add("Max", [self.add("Div", [above, self.constant(rows)]), one])
        each = self.add("Div", [self.add("Sub", [self.add("Add", [total, count]), one]), count])
        starts = self.add("Mul", [self.add("Range", [zero, count, one]), each])
        column = self.add("Unsqueeze", [starts, self.constant([1])])
        places = self.add("Add", [column, self.add("Range", [zero, each, one])])
        last = self.add("Sub", [total, one])
        return self.add("Min", [places, last]), self.add("Unsqueeze", [total, self.constant([0])]), count

    def flat(self, found: str, output: ValueInfoProto, total: str) -> None:
        """Puts the results of blocks behind one another and cuts off what is too much."""
        rest = [d.dim_value for d in output.type.tensor_type.shape.dim][1:]
        flat = self.add("Reshape", [found, self.constant([-1, *rest])])
        ends = [self.constant([0]), total, self.constant([0])]
        self.nodes.append(helper.make_node("Slice", [flat, *ends], [output.name]))


def _read_by(nodes: Sequence[NodeProto], others: Sequence[NodeProto]) -> list[NodeProto]:
    """Nodes that others read, at first hand or at second."""
    wanted = {i for n in others for i in reads(n)}
    out = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            out.append(node)
            wanted |= reads(node)
    return out[::-1]


def _of(name: str, like: ValueInfoProto) -> ValueInfoProto:
    """The description of a tensor of the same type with other rows."""
    out = ValueInfoProto()
    out.CopyFrom(like)
    out.name = name
    for d in out.type.tensor_type.shape.dim:
        if d.dim_param:
            d.dim_param = "block"
    return out


def bound(parts: Parts, feed: Feed, rows: int) -> Callable[[], None]:
    """Runs the parts from outside, the second one block by block."""
    first, second = (session(m.SerializeToString()) for m in parts.pieces())
    n = next(feed[i].shape[a] for i, a in parts.axes.items())
    made = dict(zip([o.name for o in first.get_outputs()], first.run(None, _given(first, feed)), strict=True))
    plain = second.run(None, _given(second, feed | made))
    results = [np.empty_like(p) for p in plain]
    kept: list[Any] = []
    bindings = []
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        binding = second.io_binding()
        for i in second.get_inputs():
            value = feed[i.name] if i.name in feed else made[i.name]
            if i.name in parts.axes:
                value = value[(slice(None),) * parts.axes[i.name] + (part,)]
            kept.append(onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)))
            binding.bind_ortvalue_input(i.name, kept[-1])
        for o, r in zip(second.get_outputs(), results, strict=True):
            own = r[part]
            binding.bind_output(o.name, "cpu", 0, own.dtype, own.shape, own.ctypes.data)
        bindings.append(binding)
    given = _given(first, feed)
    named = [o.name for o in first.get_outputs()]

    def run() -> None:
        if named:
            first.run(None, given)
        for binding in bindings:
            second.run_with_iobinding(binding)

    run()
    for p, r in zip(plain, results, strict=True):
        np.testing.assert_allclose(p, r, rtol=1e-4, atol=1e-5)
    run.kept = kept, results  # type: ignore[attr-defined]
    return run


def _given(s: onnxruntime.InferenceSession, feed: Feed) -> Feed:
    return {i.name: feed[i.name] for i in s.get_inputs()}


def _runner(s: onnxruntime.InferenceSession, feed: Feed) -> Callable[[], None]:
    given = _given(s, feed)
    return lambda: s.run(None, given)


def form(parts: Parts, name: str, feed: Feed, rows: int) -> Callable[[], None]:
    """What is timed, by its name."""
    if name == "bound":
        return bound(parts, feed, rows)
    by, _, where = name.partition(", ")
    return _runner(session(parts.blocked(rows, by, not where).SerializeToString()), feed)


def ratios(runs: Sequence[Callable[[], None]], seconds: float, clock: Callable[[], float]) -> tuple[float, list[float]]:
    """Seconds of the first run, and that over those of each other one."""

    def timed(run: Callable[[], None]) -> turns.Run:
        def once(_: int) -> float:
            begin = clock()
            run()
            return clock() - begin

        return once

    first, *others = np.median(turns.interleave([timed(r) for r in runs], seconds).seconds, axis=2)
    return float(np.median(first)), [turns.ratio(first, other)[0] for other in others]


def measure(path: Path, options: argparse.Namespace) -> None:
    """Prints the rows of one model."""
    model, draw = result(path, options)
    parts = Parts(model, axes(draw))
    check(parts, draw, options.forms)
    clock = time.perf_counter if options.wall else turns.of_thread
    name = path.name.split(".")[0]
    print(f"\n{name}: {len(parts.inner)} of {len(model.graph.node)} nodes in blocks")
    whole = session(model.SerializeToString())
    for n in options.counts:
        feed = draw(n, 0)[1]
        for what in options.forms:
            rows = [b for b in options.blocks if b < n]
            took, found = ratios([_runner(whole, feed), *(form(parts, what, feed, b) for b in rows)],
                                 options.seconds, clock)  # fmt: skip
            cells = " ".join(f"{b}:{r:.2f}" for b, r in zip(rows, found, strict=True))
            print(f"  N = {n:<5} {took * 1e3:8.2f} ms  {what:<22} {cells}", flush=True)


def check(parts: Parts, draw: Requests, forms: Sequence[str], rows: int = 64) -> None:
    """Holds forms against the result in one piece."""
    whole = session(parts.model.SerializeToString())
    for name in (f for f in forms if f != "bound"):
        by, _, where = name.partition(", ")
        blocked = session(parts.blocked(rows, by, not where).SerializeToString())
        for n in (1, rows - 1, rows, rows + 1, 2 * rows, 1000):
            feed = draw(n, 1)[1]
            for some, other in zip(whole.run(None, _given(whole, feed)), blocked.run(None, _given(blocked, feed)),
                                   strict=True):  # fmt: skip
                np.testing.assert_allclose(some, other, rtol=1e-3, atol=1e-4)


def result(path: Path, options: argparse.Namespace) -> tuple[ModelProto, Requests]:
    """What onnxrank makes of a model, or the model itself, and who draws its requests."""
    roles = path.with_name(f"{path.name.split('.')[0]}.roles.yaml")
    draw = Requests(onnx.load(path), yaml.safe_load(roles.read_text()))
    return optimize(path, spec=load_spec(roles), candidates=max(options.counts[0], 2048), check=False).model, draw


def _peak(model: bytes, feed: Feed, runs: int, answer: Any) -> None:
    opened = session(model)
    before = _resident()
    given = _given(opened, feed)
    for _ in range(runs):
        opened.run(None, given)
    answer.put((before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(path: Path, options: argparse.Namespace) -> None:
    """Prints megabytes that processes hold at most, each of one session that runs one request size."""
    model, draw = result(path, options)
    parts = Parts(model, axes(draw))
    models = {"original": path.read_bytes(), "result": model.SerializeToString()}
    models |= {f"scan, {b}": parts.blocked(b).SerializeToString() for b in options.blocks}
    process = multiprocessing.get_context("spawn")
    for name, made in models.items():
        found = {}
        for n in (512, 8192):
            answer: Any = process.Queue()
            feed = draw(n, 0)[name != "original"]
            worker = process.Process(target=_peak, args=(made, feed, 3, answer))
            worker.start()
            found[n] = answer.get()
            worker.join()
        (idle, few), (_, many) = found.values()
        print(f"{path.name.split('.')[0]:<22} {name:<10} loaded {idle:.0f} MB, at 512 {few:.0f}, at 8192 {many:.0f}: "
              f"{many / few:.2f}, without what is loaded {(many - idle) / max(few - idle, 0.1):.2f}", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", metavar="GLOB", help="on names of models")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, metavar="N")
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS, metavar="B")
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per row")
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
