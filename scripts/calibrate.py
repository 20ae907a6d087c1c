"""Measures what operators cost on one thread, and holds predicted times of whole models against measured ones.

    python scripts/calibrate.py                                  # operators; some minutes, --rounds 5 for a quick look
    python scripts/calibrate.py --models models/onnx --json held.json        # whole models: predicted against measured
    python scripts/calibrate.py --models models/onnx --json held.json --fit  # and the rates that fit them

Every operator runs at several sizes, many copies in one graph so that calls of the session do not count, sizes in
turns so that a slow moment hits all alike; the fastest tenth of the rounds counts. The times are fitted, by least
squares of relative errors, as seconds per launch, byte, run of bytes that lie together and multiply-add; `cost.billed`
says what an operator is billed for.

Operators behind each other are cheaper than copies of one, since they find data in caches, and dearer by what the
runtime does between them. So the table that `onnxrank/cost.py` holds is fitted to whole models (`--fit`): each is
optimised, and original and result are timed in turns at several numbers of candidates. Rates that the models say little
about stay near what they are. Times are of the thread (`turns.of_thread`). With `--json` what was measured is kept, and
fitted or told again without timing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import yaml
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxrank
from onnxrank import cost, turns
from onnxrank.facts import Facts
from onnxrank.roles import load_spec
from scripts.benchmark import session
from scripts.coverage import Requests

COPIES = 8
ROWS = (32, 512)
FIRST = ["y0.0"]
_OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
COUNTS = (1, 8, 32, 128, 512, 2048)
_LOSS = 0.98
_HELD = 0.4  # how much a rate is held where it is, against relative errors of single times
_USUAL_ERROR = 0.04  # larger ones count for less


@dataclass
class Case:
    """One operator at one size.

    Attributes:
        kind: What it is billed as.
        op: Operator type.
        shapes: Shapes of the operands; an array is a constant.
        attributes: Attributes.
        outputs: Number of outputs.
    """

    kind: str
    op: str
    shapes: Sequence[Any]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1

    def session(self) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray], cost.Bill]:
        """A session of copies, its inputs, and what one copy is billed for."""
        rng = np.random.default_rng(0)
        inputs, constants, names = [], [], []
        feed: dict[str, np.ndarray] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for k, given in enumerate(self.shapes):
            name = f"x{k}"
            names.append(name)
            if isinstance(given, np.ndarray):
                constants.append(numpy_helper.from_array(given, name))
                shapes[name] = given.shape
            else:
                feed[name] = rng.standard_normal(given).astype(np.float32)
                inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, given))
                shapes[name] = tuple(given)
        nodes, outputs = [], []
        for copy in range(COPIES):
            made = [f"y{copy}.{k}" for k in range(self.outputs)]
            nodes.append(helper.make_node(self.op, names, made, **self.attributes))
            outputs += [helper.make_empty_tensor_value_info(m) for m in made]
        graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
        model = helper.make_model(graph, opset_imports=_OPSETS, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        made_session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        got = made_session.run(None, feed)
        shapes |= {f"y0.{k}": got[k].shape for k in range(self.outputs)}
        known = cost.Shapes(Facts(), shapes, {}, {}, cost.types_of(model.graph))
        return made_session, feed, cost.billed(nodes[0], known)


def cases() -> list[Case]:
    """All operators at all sizes."""
    rng = np.random.default_rng(0)
    out = []

    def ids(below: int, count: int) -> np.ndarray:
        return rng.integers(0, below, count)

    def ints(*values: int) -> np.ndarray:
        return np.array(values, np.int64)

    def weights(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    for n in ROWS:
        for width in (64, 512):
            regroup = "regroup far" if 4 * n * width > 1 << 19 else "regroup"
            out += [
                Case("elementwise", "Add", [(n, width), (n, width)]),
                Case("elementwise", "Mul", [(n, width), (1, width)]),
                Case("elementwise", "Relu", [(n, width)]),
                *(Case("where", "Where", [np.ones((rows, width), bool), *2 * [(rows, width)]]) for rows in (1, n)),
                *(Case("function", op, [(n, width)]) for op in ("Sigmoid", "Tanh", "Exp", "Erf")),
                *(Case("slow function", op, [(n, width)]) for op in ("Elu", "Sin")),
                Case("serial", "PRelu", [(n, width), weights(width)]),
                Case("softmax", "Softmax", [(n, width)]),
                Case("softmax", "Softmax", [(n * 16, width // 16)]),
                Case("top", "TopK", [(n, width), ints(8)], outputs=2),
                Case(regroup, "Gather", [(n, width), ids(width, width // 2)], {"axis": 1}),
                Case(regroup, "Gather", [(n, 16, width // 16), ids(16, 8)], {"axis": 1}),
                Case("elementwise", "Gather", [(1000, width), ids(1000, n)], {"axis": 0}),
                Case("transpose", "Transpose", [(n, width)], {"perm": [1, 0]}),
                Case("transpose", "Transpose", [(n, 16, width // 16)], {"perm": [0, 2, 1]}),
                Case("exchange", "Transpose", [(n, 16, width // 16)], {"perm": [1, 0, 2]}),
                Case("permute", "Transpose", [(n, 16, width // 16)], {"perm": [2, 1, 0]}),
                Case("permute", "Transpose", [(16, n, width // 16, 4)], {"perm": [2, 1, 3, 0]}),
                Case("copy", "Concat", [(n, width // 8)] * 8, {"axis": 1}),
                Case("copy", "Concat", [(n, width // 2)] * 2, {"axis": 1}),
                Case("copy", "Concat", [(n, 4)] * width, {"axis": 1}),
                Case("copy", "Concat", [(n, width)] * 2, {"axis": 0}),
                Case("copy", "Split", [(n, width)], {"axis": 1}, outputs=8),
                Case("copy", "Slice", [(n, width), ints(8), ints(width // 2), ints(1)]),
                Case("expand", "Expand", [(1, width), ints(n, width)]),
                Case("product", "MatMul", [(n, width), weights(width, 256)]),
                Case("product", "MatMul", [(n, width), weights(width, 16)]),
                Case("stack", "MatMul", [(n, 16, width // 16), (n, width // 16, 16)]),
                Case("stack", "MatMul", [(n, 1, width), (n, width, 4)]),
            ]
    forests = [(n, *forest) for n in (1, *ROWS) for forest in ((10, 4), (100, 3), (100, 6), (500, 8))]
    out += [Case("trees", "TreeEnsembleRegressor", [(n, 32)], _forest(trees, depth)) for n, trees, depth in forests]
    for n, width in ((1, 16), (32, 16), (512, 16), (1, 64), (32, 64), (512, 64)):
        gates = [weights(1, 3 * width, width) for _ in range(2)]
        out.append(Case("recurrent", "GRU", [(10, n, width), *gates], {"hidden_size": width}))
    out += [Case("product", "MatMul", [(1, k), weights(k, m)]) for k, m in ((64, 64), (256, 256), (1024, 512))]
    return out


def _forest(trees: int, depth: int) -> dict[str, Any]:
    """Attributes of so many trees with all leaves at one depth, of 32 features."""
    rng = np.random.default_rng(trees)
    inner, count = 2**depth - 1, 2 ** (depth + 1) - 1
    numbers, leaves = np.arange(count), np.arange(inner, count)
    features = np.where(numbers < inner, rng.integers(0, 32, (trees, count)), 0)
    return {
        "domain": "ai.onnx.ml",
        "nodes_treeids": np.repeat(np.arange(trees), count).tolist(),
        "nodes_nodeids": np.tile(numbers, trees).tolist(),
        "nodes_featureids": features.reshape(-1).tolist(),
        "nodes_modes": (["BRANCH_LEQ"] * inner + ["LEAF"] * len(leaves)) * trees,
        "nodes_values": rng.standard_normal(trees * count).tolist(),
        "nodes_truenodeids": np.tile(np.where(numbers < inner, 2 * numbers + 1, 0), trees).tolist(),
        "nodes_falsenodeids": np.tile(np.where(numbers < inner, 2 * numbers + 2, 0), trees).tolist(),
        "target_treeids": np.repeat(np.arange(trees), len(leaves)).tolist(),
        "target_nodeids": np.tile(leaves, trees).tolist(),
        "target_ids": [0] * trees * len(leaves),
        "target_weights": rng.standard_normal(trees * len(leaves)).tolist(),
        "n_targets": 1,
    }


def measured(rounds: int) -> dict[str, list[tuple[cost.Bill, float]]]:
    """Seconds of one copy of each case, with what it is billed for."""
    ready = [(case, *case.session()) for case in cases()]
    times: list[list[float]] = [[] for _ in ready]
    for _ in range(rounds):
        for k, (_, made, feed, _) in enumerate(ready):
            begin = turns.of_thread()
            made.run(FIRST, feed)  # all copies run, one is fetched
            times[k].append(turns.of_thread() - begin)
    out: dict[str, list[tuple[cost.Bill, float]]] = {}
    for (case, _, _, bill), seen in zip(ready, times, strict=True):
        each = float(np.quantile(seen, 0.1)) / COPIES
        out.setdefault(case.kind, []).append((bill, each))
        told = cost.CPU.seconds(bill)
        print(f"{case.op:10s} {case.shapes[0]!s:16} {each * 1e6:8.1f} us, told {told * 1e6:8.1f} us for {bill}")
    return out


def fitted(found: list[tuple[cost.Bill, float]]) -> np.ndarray:
    """Seconds per launch, byte, run and multiply-add, none negative, that come closest to what was measured."""
    rows = np.array([[b.launches, b.bytes, b.runs, b.macs] for b, _ in found], float)
    seconds = np.array([s for _, s in found])
    weighted = rows / seconds[:, None]
    scale = np.maximum(np.abs(weighted).max(0), 1e-300)
    keep = list(np.flatnonzero(rows.any(0)))
    while True:
        answer = np.linalg.lstsq((weighted / scale)[:, keep], np.ones(len(seconds)), rcond=None)[0]
        if (answer >= 0).all():
            break
        del keep[int(np.argmin(answer))]
    out = np.zeros(4)
    out[keep] = answer / scale[keep]
    return out


# --- whole models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A form of a model at a number of candidates.

    Attributes:
        bills: What its nodes are billed for.
        seconds: What it takes.
    """

    bills: Sequence[cost.Bill]
    seconds: float

    @property
    def told(self) -> float:
        """What it is predicted to take."""
        return cost.CPU.call + sum(map(cost.CPU.seconds, self.bills))


Pair = tuple[Held, Held]
"""Original and result."""


def held(path: Path, seconds: float) -> dict[int, Pair]:
    """A model and its result by the numbers of candidates that it runs with.

    Empty where the model is left alone, or loops over candidates.
    """
    roles = path.with_name(f"{path.name.split('.')[0]}.roles.yaml")
    spec, model = load_spec(roles), onnx.load(path)
    result = onnxrank.optimize(path, spec=spec, check=False)
    # The study of a model has other nodes in the place of loops, so that it does not say what the file costs.
    if result.form is None or not result.changed or any(n.op_type == "Loop" for n in model.graph.node):
        return {}
    before, after = onnxrank.analyse(onnxrank.read(path), spec=spec).study, result.form
    assert after.model is not None
    draw = Requests(model, yaml.safe_load(roles.read_text()))
    sessions = session(path), session(result.model.SerializeToString())
    out = {}
    for n in COUNTS:
        runs = [_timed(s, feed) for s, feed in zip(sessions, draw(n, 0), strict=True)]
        try:
            runs[0](0)
        except Exception:  # of onnxruntime, whose have no class in common
            continue  # exporters write a Squeeze that drops the axis of candidates where there is one
        took = np.median(turns.interleave(runs, seconds).seconds, axis=(1, 2))
        bills = [
            list(cost.bills(m.graph, s)) for m, s in ((before.model, before.shapes(n)), (after.model, after.shapes(n)))
        ]
        first, second = (Held(b, float(t)) for b, t in zip(bills, took, strict=True))
        out[n] = first, second
    return out


def _timed(made: onnxruntime.InferenceSession, feed: Mapping[str, NDArray[Any]]) -> turns.Run:
    names = [o.name for o in made.get_outputs()]
    given = {i.name: feed[i.name] for i in made.get_inputs()}

    def run(_: int) -> float:
        begin = turns.of_thread()
        made.run(names, given)
        return turns.of_thread() - begin

    return run


def wholes(options: argparse.Namespace) -> dict[str, dict[int, Pair]]:
    """All models of a folder; what a file has is not measured again."""
    known: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        known = json.loads(options.json.read_text())
    for path in sorted(options.models.glob("*.onnx")):
        if path.stem not in known:
            print(f"timing {path.stem}", file=sys.stderr)
            known[path.stem] = {
                str(n): [[[dataclasses.astuple(b) for b in h.bills], h.seconds] for h in pair]
                for n, pair in held(path, options.seconds).items()
            }
            if options.json is not None:
                options.json.write_text(json.dumps(known) + "\n")
    return {
        name: {int(n): tuple(Held([cost.Bill(*b) for b in bills], t) for bills, t in pair) for n, pair in row.items()}
        for name, row in known.items()
        if row
    }  # type: ignore[return-value]


def errors(found: Mapping[str, Mapping[int, Pair]]) -> str:
    """A table of how far predicted ratios are off, and of gains that are told where there is a loss."""
    lines = [
        f"{len(found)} models",
        "| N | median error | nine tenths within | told as a gain, and slower |",
        "|---|---|---|---|",
    ]
    every = []
    for n in COUNTS:
        ratios = {
            name: (old.told / new.told, old.seconds / new.seconds)
            for name, row in found.items()
            if n in row
            for old, new in [row[n]]
        }
        off = [abs(told / seen - 1) for told, seen in ratios.values()]
        every += off
        wrong = [f"{name} ({told:.2f}, {seen:.2f})" for name, (told, seen) in ratios.items() if told > 1 > _LOSS > seen]
        lines.append(
            f"| {n} | {statistics.median(off):.1%} | {np.quantile(off, 0.9):.0%} | {', '.join(wrong) or 'none'} |"
        )
    return "\n".join([*lines, f"all: {statistics.median(every):.1%}"])


Key = tuple[str, str]
"""A kind and what it has a rate for; what holds for all kinds has none."""


def _amounts(bills: Sequence[cost.Bill]) -> Counter[Key]:
    """How much of each rate a model takes."""
    out: Counter[Key] = Counter({("", "call"): 1})
    own = {kind for kind, rate in cost.CPU.rates.items() if rate.launch != cost.CPU.launch}
    for b in bills:
        out[b.kind if b.kind in own else "", "launch"] += b.launches
        out[b.kind, "byte"] += b.bytes
        out[b.kind, "run"] += b.runs
        out[b.kind, "mac"] += b.macs
        out["", "denormal"] += b.denormals
        out["", "spill"] += cost.spilled(b.bytes) * b.bytes
        out["", "memory"] += cost.out_of_caches(b)
        out[b.kind, "far"] += cost.spilled(b.bytes) * b.far
    return out


def _rate(key: Key) -> float:
    """What the table holds now."""
    kind, what = key
    source = (
        cost.CPU
        if not kind
        else cost.CPU.rates.get(kind) or cost.Rate(cost.CPU.launch, cost.CPU.byte, 0.0, cost.CPU.mac)
    )
    return float(getattr(source, what))


def refitted(found: Mapping[str, Mapping[int, Pair]]) -> dict[Key, float]:
    """Rates that come closest to the times of whole models, from those that the table holds."""
    rows = [(_amounts(h.bills), h.seconds) for row in found.values() for pair in row.values() for h in pair]
    keys = sorted({k for amounts, _ in rows for k, v in amounts.items() if v and _rate(k)})
    scale = np.array([_rate(k) for k in keys])
    seconds = np.array([s for _, s in rows])
    matrix = np.array([[amounts[k] for k in keys] for amounts, _ in rows]) * scale / seconds[:, None]
    weights, factors = np.ones(len(rows)), np.ones(len(keys))
    for _ in range(10):
        system = np.vstack([matrix * weights[:, None], _HELD * np.eye(len(keys))])
        factors = np.linalg.lstsq(system, np.concatenate([weights, _HELD * np.ones(len(keys))]), rcond=None)[0]
        # A rate that would be negative is not one: it stays at a tenth.
        factors = np.maximum(factors, 0.1)
        weights = 1 / np.sqrt(np.maximum(np.abs(matrix @ factors - 1), _USUAL_ERROR) / _USUAL_ERROR)
    return dict(zip(keys, factors * scale, strict=True))


def hold(options: argparse.Namespace) -> None:
    """Tells how far predictions of whole models are off, and with `--fit` the rates that fit best."""
    found = wholes(options)
    print(errors(found))
    if options.fit:
        print("| kind | rate | ns now | ns fitted |\n|---|---|---|---|")
        for key, value in refitted(found).items():
            print(f"| {key[0] or 'all'} | {key[1]} | {_rate(key) * 1e9:.4g} | {value * 1e9:.4g} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="hold whole models against their predictions")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="what was measured of them; goes on with what is there"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per model and number of candidates")
    parser.add_argument("--fit", action="store_true", help="print the rates that fit whole models best")
    args = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    if args.models is not None:
        hold(args)
        return 0
    table = {kind: fitted(found) for kind, found in measured(args.rounds).items()}
    print(f"{'':14s}launch us     ns/byte     ns/run      ns/mac")
    for kind, (launch, byte, run, mac) in table.items():
        print(f"{kind:12s}{launch * 1e6:10.2f}  {byte * 1e9:10.4f}  {run * 1e9:10.3f}  {mac * 1e9:10.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
