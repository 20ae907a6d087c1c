"""How near the machine rewritten models could be with the kernels that the runtime has, did these stand alone.

Every product of a model that `optimize` made is timed in a session of its own, with operands of the shapes that it has
there, in turns with one large product; so are softmaxes, normalisations and functions such as Sigmoid, which no
rewriting makes faster. What all of these reach together is the most that the model can reach (`most`); what is missing
from there to its share of the peak is everything else: entries that are moved, sums, comparisons, launches. All times
are the thread's.

    python scripts/export_models.py OUT --scale industrial
    python scripts/kernel_floor.py OUT --only "autoint.torchscript*"
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import yaml
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxrank
from onnxrank import turns
from onnxrank.operators import Trait, traits
from onnxrank.profiling.sessions import Peak
from onnxrank.roles import load_spec
from scripts.benchmark import session
from scripts.coverage import Feed, Requests

PRODUCTS = ("MatMul", "Gemm")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Floor:
    """What the kernels of a model take alone.

    Attributes:
        share: Share of the peak that the model reaches.
        products: Share of its time that its products take alone.
        functions: The same of softmaxes, normalisations and functions.
        most: Share of the peak, did it do nothing else.
    """

    share: float
    products: float
    functions: float
    most: float

    @property
    def cells(self) -> list[str]:
        """What a table holds of it, behind the share."""
        return [f"{100 * x:.0f} %" for x in (self.products, self.functions, self.most)]


COLUMNS = ("products alone take", "softmax and functions alone take", "most with these")


def bound(model: bytes, feed: Feed) -> turns.Run:
    """Runs a model that writes to the same memory every time, as a node within a model does."""
    own = session(model)
    binding = own.io_binding()
    for name, data in feed.items():
        binding.bind_cpu_input(name, data)
    for output, made in zip(own.get_outputs(), own.run(None, feed), strict=True):
        binding.bind_ortvalue_output(output.name, onnxruntime.OrtValue.ortvalue_from_numpy(made))

    def run(_: int) -> float:
        begin = turns.of_thread()
        own.run_with_iobinding(binding)
        return turns.of_thread() - begin

    return run


def seconds_of(runs: Sequence[turns.Run], seconds: float) -> list[float]:
    """Median times of several models that take turns, each a few runs long, so that their data are in the caches."""
    return [float(np.median(m)) for m in turns.interleave(runs, seconds, turns.of_thread).seconds]


def kind_of(node: onnx.NodeProto) -> str | None:
    """Which of both a node is, `products` or `functions`; None for what is neither."""
    if node.op_type in PRODUCTS:
        return "products"
    return "functions" if traits(node) & (Trait.FUNCTION | Trait.ROWS) else None


def kernels(model: bytes, feed: Feed) -> Iterator[tuple[onnx.NodeProto, list[Shape]]]:
    """The products and functions of a model, and the shapes that their inputs have in a run."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling, options.log_severity_level = True, 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # no shapes are told of packed weights
    nodes = {n.name: n for n in onnx.load_from_string(model).graph.node}
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "run")
        made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        made.run(None, feed)
        events = json.loads(Path(made.end_profiling()).read_text())
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        node = nodes.get(name)
        if event.get("cat") == "Node" and node is not None and kind_of(node):
            found = event["args"]["input_type_shape"]
            yield node, [tuple(next(iter(i.values()))) for i in found]


def alone(node: onnx.NodeProto, shapes: list[Shape]) -> tuple[bytes, Feed]:
    """A model of one node, with constants on the right, and its input."""
    rng = np.random.default_rng(0)
    names = [f"x{k}" for k in range(len(shapes))]
    data = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(names, shapes, strict=True)}
    if node.op_type == "Pow":
        data[names[1]] = np.full(shapes[1], 2, np.float32)  # squares have a kernel of their own
    own = helper.make_node(node.op_type, names, ["y"])
    own.attribute.extend(node.attribute)
    stored = [name for name in names[1:] if data[name].ndim <= 2]
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, data[n].shape) for n in names if n not in stored]
    kept = [onnx.numpy_helper.from_array(data[n], n) for n in stored]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([own], "alone", given, [y], kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString(), {n: data[n] for n in names if n not in stored}


def macs(node: onnx.NodeProto, shapes: list[Shape]) -> int:
    """Multiply-adds of a product."""
    turned = {a.name: a.i for a in node.attribute}
    a, b = shapes[0], shapes[1]
    inner, width = (b[-1], b[-2]) if turned.get("transB") else (b[-2], b[-1])
    rows = a[-1] if turned.get("transA") else a[-2]
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    return int(np.prod(batch, dtype=np.int64)) * rows * inner * width


def floor(made: bytes, feed: Feed, seconds: float) -> Floor:
    """What the kernels of a model take alone.

    Args:
        made: The model.
        feed: Its inputs.
        seconds: How long each kernel is timed, and a tenth of how long the model is.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    first: dict[tuple[Any, ...], tuple[onnx.NodeProto, list[Shape]]] = {}
    for node, shapes in kernels(made, feed):
        if node.op_type not in PRODUCTS or all(len(s) >= 2 for s in shapes[:2]):
            key = (node.op_type, str(node.attribute), *shapes)
            counts[key] += 1
            first.setdefault(key, (node, shapes))
    product, x = Peak.product()
    peak = bound(product.SerializeToString(), {"x": x})
    times, work = Counter[str](), 0.0
    for key, (node, shapes) in first.items():
        kind = kind_of(node)
        assert kind is not None
        if kind == "products":
            work += counts[key] * macs(node, shapes)
        took, best = seconds_of([bound(*alone(node, shapes)), peak], seconds)
        times[kind] += counts[key] * took / best
    whole, best = seconds_of([bound(made, feed), peak], 10 * seconds)
    taken, least = whole / best, work / x.shape[0] ** 3
    return Floor(least / taken, times["products"] / taken, times["functions"] / taken, least / sum(times.values()))


def rewritten(path: Path, candidates: int) -> tuple[onnxrank.Result, Feed, Feed]:
    """What is made of a model, with inputs of the original and of that."""
    roles = path.with_name(f"{path.name.split('.')[0]}.roles.yaml")
    result = onnxrank.optimize(path, spec=load_spec(roles), candidates=candidates, check=False)
    before, after = Requests(onnx.load(path), yaml.safe_load(roles.read_text()))(candidates, 0)
    return result, before, after if result.changed else before


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*.torchscript.onnx", metavar="GLOB")
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=0.2, help="per kernel")
    options = parser.parse_args()
    print(f"| model | share of peak | {' | '.join(COLUMNS)} |")
    print("|" + "---|" * (2 + len(COLUMNS)))
    for path in sorted(options.folder.glob(options.only)):
        result, _, feed = rewritten(path, options.candidates)
        found = floor(result.model.SerializeToString(), feed, options.seconds)
        cells = [f"{100 * found.share:.0f} %", *found.cells]
        print(f"| {path.name.split('.')[0]} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
