"""What weights of masked scores cost that are denormal numbers, and what bounding scores from below gains.

Softmax and the product behind it are timed on scores of which none or half are masked, and on those, bounded as the
rule `underflow` bounds them: so come `cost.Target.denormal` and `cost.BOUNDED`. Then results of models are timed
against what `--ignore underflow` makes, in turns; half of every history is padding. All times are the thread's.

    python scripts/export_models.py OUT --scale industrial
    python scripts/underflow.py OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import yaml
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnxrank import optimize
from onnxrank.roles import load_spec
from onnxrank.underflow import NAME
from scripts.benchmark import medians, session
from scripts.coverage import Requests

COUNTS = (1, 32, 512)
ROWS, HEADS, WIDTH, SIZE = 512, 4, 140, 32
MASKED = -1e9


def kernels(seconds: float) -> tuple[float, float]:
    """Seconds that a denormal weight takes beyond another, and that bounding a score takes."""
    plain, bounded = attention(False), attention(True)
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((ROWS, HEADS, 1, WIDTH)).astype(np.float32)
    half = scores.copy()
    half[..., ::2] = MASKED
    runs = [session(m) for m in (plain, plain, bounded)]
    clean, slow, cut = medians(runs, [{"x": scores}, {"x": half}, {"x": half}], seconds)
    return (slow - clean) / (half == MASKED).sum(), (cut - clean) / scores.size


def attention(bounded: bool) -> bytes:
    """Weights of scores, and what they weigh."""
    lines = ["w = Softmax<axis = -1>(s)", "y = MatMul(w, v)"]
    how = ["m = ReduceMax<axes = [-1], keepdims = 1>(x)", "l = Sub(m, sixty)", "s = Max(x, l)"]
    text = "\n".join([*(how if bounded else ["s = Identity(x)"]), *lines])
    graph = f"g (float[N,{HEADS},1,{WIDTH}] x) => (float[N,{HEADS},1,{SIZE}] y) {{ {text} }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {graph}')
    values = np.random.default_rng(1).standard_normal((1, HEADS, WIDTH, SIZE)).astype(np.float32)
    model.graph.initializer.extend(
        [numpy_helper.from_array(values, "v"), helper.make_tensor("sixty", TensorProto.FLOAT, [], [60.0])]
    )
    return model.SerializeToString()


def gains(path: Path, seconds: float) -> list[float] | None:
    """Time without the rule over that with it, at every number of candidates; None where it does nothing."""
    roles = path.with_name(f"{path.name.split('.')[0]}.roles.yaml")
    spec, draw = load_spec(roles), Requests(onnx.load(path), yaml.safe_load(roles.read_text()))
    made, without = (optimize(path, spec=spec, check=False, ignore=left) for left in ((), (NAME,)))
    if not any(s.place.rule == NAME and s.taken for s in made.plan.sites):
        return None
    runs = [session(r.model.SerializeToString()) for r in (without, made)]
    out = []
    for n in COUNTS:
        feed = draw(n, 0)[1]
        before, after = medians(runs, [feed, feed], seconds)
        out.append(before / after)
    return out


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--only", default="*.torchscript.onnx", metavar="GLOB")
    parser.add_argument("--seconds", type=float, default=1.0, help="per number of candidates")
    options = parser.parse_args()
    denormal, bounding = kernels(4 * options.seconds)
    print(f"a denormal weight: {denormal * 1e9:.1f} ns, bounding a score: {bounding * 1e9:.2f} ns")
    if options.folder is None:
        return 0
    print(f"| model | {' | '.join(f'N = {n}' for n in COUNTS)} |")
    print("|" + "---|" * (1 + len(COUNTS)))
    for path in sorted(options.folder.glob(options.only)):
        found = None if ".twin." in path.name else gains(path, options.seconds)
        if found is not None:
            print(f"| {path.name.split('.')[0]} | {' | '.join(f'{x:.2f}' for x in found)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
