"""Measures what operators cost on one thread, and prints the table that `onnxrank/cost.py` holds.

    python scripts/calibrate.py            # some minutes; --rounds 5 for a quick look

Every operator runs at several sizes, many copies in one graph so that calls of the session do not count, sizes in turns
so that a slow moment hits all alike; the fastest tenth of the rounds counts. The times are fitted, by least squares of
relative errors, as seconds per launch, byte moved, run of bytes that lie together and multiply-add; `cost.billed` says
what an operator is billed for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from onnxrank import cost
from onnxrank.facts import Facts

COPIES = 8
ROWS = (32, 512)
FIRST = ["y0.0"]


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
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
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
                *(Case("function", op, [(n, width)]) for op in ("Sigmoid", "Tanh", "Exp", "Erf")),
                Case("softmax", "Softmax", [(n, width)]),
                Case("softmax", "Softmax", [(n * 16, width // 16)]),
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
                Case("copy", "Concat", [(n, width)] * 2, {"axis": 0}),
                Case("copy", "Split", [(n, width)], {"axis": 1}, outputs=8),
                Case("copy", "Slice", [(n, width), ints(8), ints(width // 2), ints(1)]),
                Case("expand", "Expand", [(1, width), ints(n, width)]),
                Case("product", "MatMul", [(n, width), weights(width, 256)]),
                Case("product", "MatMul", [(n, width), weights(width, 16)]),
                Case("stack", "MatMul", [(n, 16, width // 16), (n, width // 16, 16)]),
                Case("stack", "MatMul", [(n, 1, width), (n, width, 4)]),
            ]
    out += [Case("product", "MatMul", [(1, k), weights(k, m)]) for k, m in ((64, 64), (256, 256), (1024, 512))]
    return out


def measured(rounds: int) -> dict[str, list[tuple[cost.Bill, float]]]:
    """Seconds of one copy of each case, with what it is billed for."""
    ready = [(case, *case.session()) for case in cases()]
    times: list[list[float]] = [[] for _ in ready]
    for _ in range(rounds):
        for k, (_, session, feed, _) in enumerate(ready):
            begin = time.perf_counter()
            session.run(FIRST, feed)  # all copies run, one is fetched
            times[k].append(time.perf_counter() - begin)
    out: dict[str, list[tuple[cost.Bill, float]]] = {}
    for (case, _, _, bill), seen in zip(ready, times, strict=True):
        each = float(np.quantile(seen, 0.1)) / COPIES
        out.setdefault(case.kind, []).append((bill, each))
        told = cost.CPU.seconds(bill)
        print(f"{case.op:10s} {case.shapes[0]!s:16} {each * 1e6:8.1f} us, told {told * 1e6:8.1f} us for {bill}")
    return out


def fitted(found: list[tuple[cost.Bill, float]]) -> np.ndarray:
    """Seconds per launch, byte, run and multiply-add, none negative, that come closest to what was measured."""
    rows = np.array([[1, b.bytes, b.runs, b.macs] for b, _ in found], float)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    table = {kind: fitted(found) for kind, found in measured(args.rounds).items()}
    print(f"{'':14s}launch us     ns/byte     ns/run      ns/mac")
    for kind, (launch, byte, run, mac) in table.items():
        print(f"{kind:12s}{launch * 1e6:10.2f}  {byte * 1e9:10.4f}  {run * 1e9:10.3f}  {mac * 1e9:10.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
