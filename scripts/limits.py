"""Shows limits: the time to optimise models of many nodes, and the memory for one with a 3 GB external table.

    python scripts/limits.py [FOLDER]      # FOLDER gets a sparse file of 3.2 GB; a temporary one if left out
    python scripts/limits.py --only wide   # one of wide, chain, doubling, table

The models of many nodes are 10,203 side by side and behind each other, a chain of 10,000 operators, and 64 steps that
each add a tensor to itself. Peak memory is that of a process of its own, against one that only loads the same model in
onnxruntime and runs it once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROWS, WIDTH = 50_000_000, 16


def wide(features: int = 1600, depth: int = 600) -> onnx.ModelProto:
    """Features of six nodes each, one layer over all of them, and a chain behind it."""
    rng = np.random.default_rng(0)
    nodes, inputs, columns = [], [], []
    constants = {"one": np.array([1], np.int64)}
    for f in range(features):
        name = f"{'user' if f % 3 else 'item'}_{f}"
        inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["N"]))
        constants[f"table{f}"] = rng.standard_normal((10, 4)).astype(np.float32)
        nodes += [
            helper.make_node("Cast", [name], [f"id{f}"], to=TensorProto.INT64),
            helper.make_node("Gather", [f"table{f}", f"id{f}"], [f"row{f}"]),
            helper.make_node("Unsqueeze", [f"row{f}", "one"], [f"field{f}"]),
            helper.make_node("Relu", [f"field{f}"], [f"relu{f}"]),
            helper.make_node("Mul", [f"relu{f}", f"relu{f}"], [f"square{f}"]),
            helper.make_node("Squeeze", [f"square{f}", "one"], [f"column{f}"]),
        ]
        columns.append(f"column{f}")
    constants["weight"] = rng.standard_normal((4 * features, 64)).astype(np.float32) / 50
    nodes += [helper.make_node("Concat", columns, ["x"], axis=1), helper.make_node("MatMul", ["x", "weight"], ["h0"])]
    nodes += [helper.make_node("Tanh", [f"h{k}"], [f"h{k + 1}"]) for k in range(depth)]
    nodes.append(helper.make_node("ReduceSum", [f"h{depth}", "one"], ["score"]))
    return model(nodes, inputs, constants)


def stepwise(steps: int, operator: str) -> onnx.ModelProto:
    """One layer over a request's and a candidate's features, and so many steps behind it, each of the last one."""
    rng = np.random.default_rng(0)
    constants = {"weight": rng.standard_normal((320, 64)).astype(np.float32) / 20, "axis": np.array([1], np.int64)}
    if operator == "Add":
        constants["half"] = np.array(0.5, np.float32)
    widths = {"user_x": 256, "item_x": 64}
    nodes = [helper.make_node("Concat", list(widths), ["x"], axis=1)]
    nodes.append(helper.make_node("MatMul", ["x", "weight"], ["h0"]))
    for k in range(steps):
        if operator == "Add":
            nodes.append(helper.make_node("Add", [f"h{k}", f"h{k}"], [f"twice{k}"]))
            nodes.append(helper.make_node("Mul", [f"twice{k}", "half"], [f"h{k + 1}"]))
        else:
            nodes.append(helper.make_node(operator, [f"h{k}"], [f"h{k + 1}"]))
    nodes.append(helper.make_node("ReduceSum", [f"h{steps}", "axis"], ["score"]))
    inputs = [helper.make_tensor_value_info(k, TensorProto.FLOAT, ["N", n]) for k, n in widths.items()]
    return model(nodes, inputs, constants)


def tabled(folder: Path) -> Path:
    """Lookups in a table of 3.2 GB, nearly all of it a hole in a sparse file, then two layers."""
    rng = np.random.default_rng(0)
    path = folder / "table.bin"
    with path.open("wb") as file:
        file.write(rng.standard_normal(WIDTH * 4096).astype(np.float32).tobytes())
        file.truncate(ROWS * WIDTH * 4)
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[ROWS, WIDTH])
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", path.name), ("offset", "0"), ("length", str(ROWS * WIDTH * 4))):
        table.external_data.add(key=key, value=value)
    constants = {
        "w": rng.standard_normal((WIDTH * 12, 256)).astype(np.float32),
        "v": rng.standard_normal((256, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "user_ids"], ["user"]),
        helper.make_node("Gather", ["table", "item_ids"], ["item"]),
        helper.make_node("Concat", ["user", "item"], ["fields"], axis=1),
        helper.make_node("Flatten", ["fields"], ["x"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["score"]),
    ]
    inputs = [
        helper.make_tensor_value_info("user_ids", TensorProto.INT64, ["N", 8]),
        helper.make_tensor_value_info("item_ids", TensorProto.INT64, ["N", 4]),
    ]
    made = model(nodes, inputs, constants)
    made.graph.initializer.append(table)
    out = folder / "tabled.onnx"
    out.write_bytes(made.SerializeToString())
    return out


def model(nodes: list, inputs: list, constants: dict[str, np.ndarray]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "limits",
        inputs,
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


LOAD = """
import numpy as np, onnxruntime as ort, sys
s = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
s.run(None, {"user_ids": np.zeros((2, 8), np.int64), "item_ids": np.zeros((2, 4), np.int64)})
"""
OPTIMISE = """
import sys
from onnxrank import optimize
optimize(sys.argv[1], spec={"inputs": {"user_ids": {"level": "request", "range": [0, 4096]},
                                      "item_ids": {"range": [0, 4096]}}}).save(sys.argv[2])
"""


def peak(code: str, *arguments: str) -> float:
    """Peak memory of a Python process, in MB, as Linux tells it; `ru_maxrss` would count its parent's."""
    tail = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    ran = subprocess.run([sys.executable, "-c", code + tail, *arguments], check=True, capture_output=True, text=True)
    return int(ran.stdout.split()[-1]) / 1024


MODELS = {
    "wide": wide,
    "chain": lambda: stepwise(10_000, "Tanh"),
    "doubling": lambda: stepwise(64, "Add"),
}
"""Models of many nodes."""


def timed(name: str) -> None:
    """Prints how long it takes to optimise a model with the standard check, and how much of that is this process's."""
    from onnxrank import optimize

    large = MODELS[name]()
    begin, own = time.perf_counter(), time.process_time()
    result = optimize(large, request=["user_*"])
    took, own = time.perf_counter() - begin, time.process_time() - own
    print(f"{name}, {len(large.graph.node)} nodes: {took:.1f} s, {own:.1f} s of them here, changed: {result.changed}")


def remembered(folder: Path) -> None:
    """Prints what memory a large table takes."""
    path, out = tabled(folder), folder / "out.onnx"
    loaded, optimised = peak(LOAD, str(path)), peak(OPTIMISE, str(path), str(out))
    print(f"3.2 GB table: loading it {loaded:.0f} MB, optimising it {optimised:.0f} MB, ", end="")
    print(f"{optimised - loaded:.0f} MB more; files: {sorted(p.name for p in folder.iterdir())}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="for a sparse file of 3.2 GB; a temporary one if left out")
    parser.add_argument("--only", choices=[*MODELS, "table"], help="one of the limits")
    options = parser.parse_args()
    for name in MODELS:
        if options.only in (None, name):
            timed(name)
    if options.only in (None, "table"):
        with tempfile.TemporaryDirectory() as temporary:
            remembered(options.folder or Path(temporary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
