"""Measures the factor of `onnxrank/verify/condition.py`: how far rounding takes a right result from its original.

    python scripts/calibrate_condition.py [--only PATTERN] [--each]

Every model of `models/onnx`, and networks that amplify rounding (exp and log in turns, attention with SiLU, differences
of large numbers that are added pair by pair), is optimised and held against its original. Printed is by how much they
differ, in units of how far the original moves under changes of one unit in the last place: in its own type, and in
float64. All of these results are right, so a factor below the largest ratio would blame somebody for rounding.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from onnx import ModelProto, helper, numpy_helper

from onnxrank import model as files
from onnxrank import optimize
from onnxrank.errors import OnnxrankError
from onnxrank.passes import choosing
from onnxrank.verify import compare
from onnxrank.verify.condition import FACTOR
from onnxrank.verify.engine import Engine
from onnxrank.verify.options import Options

FOLDER = Path(__file__).resolve().parents[1] / "models" / "onnx"
WIDTH = 32
Node = helper.make_node


def main() -> int:
    """Prints the ratios; 1 if one is beyond the factor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="models whose names match")
    parser.add_argument("--each", action="store_true", help="print every model")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, str]]] = {"own type": [], "float64": []}
    for name, model, spec in models(options.only):
        try:
            ratios = ratios_of(model, spec)
        except OnnxrankError as e:
            print(f"{name}: {e}", file=sys.stderr)
            continue
        for precision, ratio in ratios.items():
            found[precision].append((ratio, name))
        if options.each:
            print(f"{name:40} " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()), flush=True)
    for precision, ratios_found in found.items():
        values = [r for r, _ in ratios_found]
        if values:
            shown = ", ".join(f"{q} % {np.percentile(values, q):.2f}" for q in (50, 90, 99))
            worst, name = max(ratios_found)
            print(f"{precision}: {len(values)} models, {shown}, largest {worst:.2f} ({name}); the factor is {FACTOR:g}")
    return int(any(r > FACTOR for values in found.values() for r, _ in values))


def ratios_of(model: Any, spec: Mapping[str, Any]) -> dict[str, float]:
    """Largest difference of original and result, in units of the original's own movement, by precision."""
    with mock.patch.object(choosing, "LEAST_GAIN", 0.0):
        result = optimize(model, spec=spec, interface="same", check=False)
    if not result.changed:
        return {}
    loaded = result.loaded
    second = files.LoadedModel(result.model, None, loaded.folder, "", result.model.ByteSize(), loaded.external)
    out: dict[str, float] = {}
    with Engine(loaded, second, Options(spec=spec, level="quick")) as engine:
        engine.run()
        by_key = {(p.inputs, p.candidates, p.seed): p for p in engine.points if p.candidates > 1}
        for s in engine.samples:
            point = by_key.get((s.inputs, s.candidates, s.seed))
            if point is None or s.inputs != "random":
                continue
            for exact, a, b in ((False, s.original, s.optimized), (True, s.truth, s.raised)):
                if a is None or b is None:
                    continue
                moved = engine.condition.moved(point.feed, "cpu", exact).get(s.output, 0.0)
                far = compare.gap(a, b).largest
                least = compare.epsilon(a.dtype) * compare.scale(a)  # one unit in the last place of the scores
                key = "float64" if exact else "own type"
                out[key] = max(out.get(key, 0.0), far / max(moved, least))
    return out


# --- models ----------------------------------------------------------------------------------------------------------


def models(only: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Names, models and roles."""
    for path in sorted(FOLDER.glob("*.onnx")):
        if fnmatch.fnmatch(path.name, only):
            yield path.name, path, yaml.safe_load((FOLDER / f"{path.name.split('.')[0]}.roles.yaml").read_text())
    for depth in (2, 4, 6):
        if fnmatch.fnmatch(f"exp and log {depth}", only):
            yield f"exp and log {depth}", exponential(depth), {"inputs": {"user": {"level": "request"}}}
    for width in (16, 64, 256):
        if fnmatch.fnmatch(f"differences {width}", only):
            yield f"differences {width}", differences(width), {"inputs": {"user": {"level": "request"}}}
    for length in (8, 64, 256):
        if fnmatch.fnmatch(f"silu attention {length}", only):
            yield f"silu attention {length}", silu(length), {"inputs": {"user": {"level": "request"}}}


def exponential(depth: int) -> ModelProto:
    """Layers over both sides, with exp and log of what they give in turns: small differences grow."""
    rng = np.random.default_rng(depth)
    nodes = [Node("Concat", ["user", "item"], ["x0"], axis=1)]
    weights = {"one": np.array(1, np.float32)}
    for k in range(depth):
        weights[f"w{k}"] = rng.normal(0, 0.3, (2 * WIDTH, 2 * WIDTH)).astype(np.float32)
        nodes.append(Node("MatMul", [f"x{k}", f"w{k}"], [f"h{k}"]))
        if k % 2:
            nodes += [Node("Abs", [f"h{k}"], [f"a{k}"]), Node("Add", [f"a{k}", "one"], [f"b{k}"])]
            nodes.append(Node("Log", [f"b{k}"], [f"x{k + 1}"]))
        else:
            nodes += [Node("Tanh", [f"h{k}"], [f"t{k}"]), Node("Exp", [f"t{k}"], [f"x{k + 1}"])]
    return _model(nodes, weights, {"user": ["N", WIDTH], "item": ["N", WIDTH]}, f"x{depth}")


def differences(width: int) -> ModelProto:
    """Large numbers of both sides, taken from each other pair by pair: divided, all of one side are added first."""
    weights = {
        "axis": np.array([2]),
        "shape": np.array([-1, 2 * width]),
        "offset": np.array(1e6, np.float32),
        "signs": np.tile(np.array([[1.0], [-1.0]], np.float32), (width, 1)),
    }
    nodes = []
    for side in ("user", "item"):
        nodes += [
            Node("Abs", [side], [f"{side}/size"]),
            Node("Add", [f"{side}/size", "offset"], [f"{side}/far"]),
            Node("Unsqueeze", [f"{side}/far", "axis"], [f"{side}/column"]),
        ]
    nodes += [
        Node("Concat", ["user/column", "item/column"], ["pairs"], axis=2),
        Node("Reshape", ["pairs", "shape"], ["x"]),
        Node("MatMul", ["x", "signs"], ["score"]),
    ]
    return _model(nodes, weights, {"user": ["N", width], "item": ["N", width]}, "score")


def silu(length: int) -> ModelProto:
    """Attention of the candidate over a history with SiLU for a softmax, over the sum of the weights."""
    rng = np.random.default_rng(length)
    weights = {n: rng.normal(0, 0.3, (WIDTH, WIDTH)).astype(np.float32) for n in ("wq", "wk", "wv")}
    weights |= {"axis": np.array([1]), "steps": np.array(length, np.float32)}
    nodes = [
        Node("MatMul", ["item", "wq"], ["q"]),
        Node("Unsqueeze", ["q", "axis"], ["query"]),
        Node("MatMul", ["user", "wk"], ["keys"]),
        Node("MatMul", ["user", "wv"], ["values"]),
        Node("Transpose", ["keys"], ["turned"], perm=[0, 2, 1]),
        Node("MatMul", ["query", "turned"], ["scores"]),
        Node("Sigmoid", ["scores"], ["gates"]),
        Node("Mul", ["scores", "gates"], ["raised"]),
        Node("Div", ["raised", "steps"], ["shares"]),
        Node("MatMul", ["shares", "values"], ["pooled"]),
        Node("Squeeze", ["pooled", "axis"], ["score"]),
    ]
    return _model(nodes, weights, {"user": ["N", length, WIDTH], "item": ["N", WIDTH]}, "score")


def _model(nodes: list[Any], weights: Mapping[str, Any], inputs: Mapping[str, list[Any]], output: str) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "calibration",
        [helper.make_tensor_value_info(k, 1, shape) for k, shape in inputs.items()],
        [helper.make_tensor_value_info(output, 1, ["N", None])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


if __name__ == "__main__":
    raise SystemExit(main())
