"""Times models of many features with an input each, and with their inputs packed and lookups joined.

python scripts/packed_inputs.py [--features 128x8,32x32] [--candidates 1,512] [--rank 1] [--seconds 2] [--json FILE]

--features says how many of the request's ids and of the candidates' there are, each with a table of its own, and as
many floats of candidates as ids. One file (`optimize`) and the request model of two (`split`) are each made as they
were before (`--ignore lookup`), with joined lookups, and with packed inputs, too. They run in turns, on one thread,
whose own time is told (`turns.of_thread`): printed are medians, the ratio of the first variant's time to each in the
median of all turns, and that of least times, which other work changes least. "by name" is the packed model where
the caller has an array per feature, and packs them with numpy. Scores are held against the original's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnxrank
from onnxrank import matrices, ranker
from onnxrank.contract import PACKED, store
from onnxrank.splitting import Options, split
from onnxrank.turns import of_thread

Arrays = dict[str, NDArray[Any]]
_FAR = 1e-4
"""Largest difference of a score, of the largest, that is none."""


@dataclass
class Row:
    """What one variant takes.

    Attributes:
        features: Ids of the request and of candidates.
        part: `one file`, or the request model.
        candidates: Number of candidates.
        variant: How its inputs and lookups are.
        us: Median microseconds.
        ratio: Time of the variant as it was before over its own, the median of all turns.
        best: The same of the least times, which other work on the machine changes least.
        wrong: Whether its scores are others than the original's.
    """

    features: str
    part: str
    candidates: int
    variant: str
    us: float
    ratio: float
    best: float
    wrong: bool


def model(request: int, candidate: int, rank: int, width: int = 16, hidden: int = 64) -> ModelProto:
    """So many ids with tables of their own, as many floats as candidates have ids, and a tower of two layers."""
    rng = np.random.default_rng(0)
    nodes, held, inputs, parts = [], [], [], []

    def constant(name: str, data: NDArray[Any]) -> str:
        held.append(numpy_helper.from_array(data, name))
        return name

    shape = ["N"] if rank == 1 else ["N", 1]
    for level, count in (("user", request), ("item", candidate)):
        for k in range(count):
            name = f"{level}_{k}"
            inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
            table = constant(f"{name}/table", rng.normal(size=(1000 + 7 * k, width)).astype(np.float32))
            nodes.append(helper.make_node("Gather", [table, name], [f"{name}/rows"]))
            nodes.append(helper.make_node("Flatten", [f"{name}/rows"], [f"{name}/row"]))
            parts.append(f"{name}/row")
    for k in range(candidate):
        inputs.append(helper.make_tensor_value_info(f"item_value_{k}", TensorProto.FLOAT, ["N", 1]))
        parts.append(f"item_value_{k}")
    size = (request + candidate) * width + candidate
    weights = [
        constant(f"w{k}", (rng.normal(size=s) / s[0] ** 0.5).astype(np.float32))
        for k, s in enumerate(((size, hidden), (hidden,), (hidden, 1)))
    ]
    nodes.append(helper.make_node("Concat", parts, ["features"], axis=1))
    nodes.append(helper.make_node("Gemm", ["features", *weights[:2]], ["layer"]))
    nodes.append(helper.make_node("Relu", ["layer"], ["hidden"]))
    nodes.append(helper.make_node("MatMul", ["hidden", weights[2]], ["score"]))
    score = helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", 1])
    graph = helper.make_graph(nodes, "ranker", inputs, [score], held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def drawn(made: ModelProto, n: int, rows: int) -> tuple[Arrays, Arrays]:
    """Inputs of the original, and with one row of what is the request's."""
    rng = np.random.default_rng(n)
    once: Arrays = {}
    for i in made.graph.input:
        count = 1 if i.name.startswith("user") else n
        shape = [count] + [1] * (len(i.type.tensor_type.shape.dim) - 1)
        ids = i.type.tensor_type.elem_type == TensorProto.INT64
        once[i.name] = rng.integers(0, rows, shape) if ids else rng.normal(size=shape).astype(np.float32)
    return {k: np.repeat(v, n // len(v), 0) for k, v in once.items()}, once


def session(source: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(source.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_turns(runs: Sequence[Callable[[], object]], seconds: float) -> list[list[float]]:
    """Microseconds of each, in turns."""
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 15:
        for own, run in zip(times, runs, strict=True):
            begin = of_thread()
            run()
            own.append(1e6 * (of_thread() - begin))
    return [t[3:] for t in times]


def measured(features: str, rank: int, counts: Sequence[int], seconds: float) -> list[Row]:
    """All variants of one model."""
    request, candidate = (int(n) for n in features.split("x"))
    original = model(request, candidate, rank)
    first = session(original)
    rows: list[Row] = []
    for n in counts:
        how: dict[str, Any] = {"request": ["user*"], "candidates": n, "check": False}
        whole, once = drawn(original, n, 1000)
        (want,) = first.run(None, whole)
        made = {
            "before": onnxrank.optimize(original, ignore=["lookup"], **how).model,
            "joined": onnxrank.optimize(original, **how).model,
            "packed": onnxrank.pack_inputs(original, ignore=["lookup"], **how).model,
            "joined and packed": onnxrank.pack_inputs(original, **how).model,
        }
        rows += _race(features, "one file", n, made, (whole, once), want, seconds)
        if n == counts[0]:
            halves = {
                name: split(original, options=Options(pack=pack, guard=False), ignore=ignore, **how)
                for name, pack, ignore in (("before", False, ["lookup"]), ("joined and packed", True, []))
            }
            for half in halves.values():
                packed = half.contract["optimize"].get(PACKED, {})
                own = {i.name for i in half.request.graph.input}
                store(half.request, {PACKED: {k: v for k, v in packed.items() if k in own}})
            requests = {name: half.request for name, half in halves.items()}
            rows += _race(features, "request model", n, requests, (once, once), None, seconds)
    return rows


def _race(
    features: str,
    part: str,
    n: int,
    made: Mapping[str, ModelProto],
    feeds: tuple[Arrays, Arrays],
    want: NDArray[Any] | None,
    seconds: float,
) -> list[Row]:
    runs: dict[str, Callable[[], Any]] = {}
    for name, proto in made.items():
        own = session(proto)
        names = {i.name for i in own.get_inputs()}
        told = matrices.told(proto)
        # A model that rewriting does not pay for takes all rows.
        rows = feeds[0] if _takes_all(own) else feeds[1]
        given = {k: v for k, v in ranker.matrices(told, rows).items() if k in names}
        runs[name] = lambda own=own, given=given: own.run(None, given)
        if told:
            side_by_side = ranker.SideBySide(told)
            runs[f"{name}, by name"] = lambda own=own, packed=side_by_side, rows=rows, names=names: own.run(
                None, {k: v for k, v in packed(rows).items() if k in names}
            )
    times = in_turns(list(runs.values()), seconds)
    out = []
    for (name, run), own in zip(runs.items(), times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(times[0], own, strict=True))
        wrong = want is not None and not np.abs(run()[0] - want).max() <= _FAR * np.abs(want).max()
        out.append(Row(features, part, n, name, statistics.median(own), ratio, min(times[0]) / min(own), wrong))
        shown = f"{out[-1].us:9.1f} us {ratio:7.2f}x {out[-1].best:7.2f}x{' WRONG' if wrong else ''}"
        print(f"{features:>8}  {part:<14} N = {n:<5d} {name:<27} {shown}", flush=True)
    return out


def _takes_all(own: onnxruntime.InferenceSession) -> bool:
    return any(i.name.startswith(("user", "request")) and not isinstance(i.shape[0], int) for i in own.get_inputs())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default="128x8,128x32,32x32")
    parser.add_argument("--candidates", default="1,512")
    parser.add_argument("--rank", type=int, choices=(1, 2), default=2)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    counts = [int(n) for n in given.candidates.split(",")]
    rows = [r for f in given.features.split(",") for r in measured(f, given.rank, counts, given.seconds)]
    if given.json is not None:
        given.json.write_text(json.dumps([vars(r) for r in rows], indent=2) + "\n")
    return int(any(r.wrong for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
