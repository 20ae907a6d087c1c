"""How near models and what onnxrank makes of them are to the machine.

The share of peak is the multiply-adds of a model's products per second, over those of one large product that takes its
turns between both. All times are the thread's (`turns.of_thread`), so that other processes count for little.

    python scripts/export_models.py OUT --scale industrial
    python scripts/peak_share.py OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnx
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnxrank import optimize
from onnxrank.profiling.sessions import Peak
from onnxrank.roles import load_spec
from scripts.benchmark import medians, session
from scripts.coverage import Requests


def share(path: Path, candidates: int, seconds: float) -> list[str]:
    """A row: multiply-adds before and after in millions, the shares of peak, and the ratio of times."""
    name = path.name.split(".")[0]
    roles = path.with_name(f"{name}.roles.yaml")
    result = optimize(path, spec=load_spec(roles), candidates=candidates, check=False)
    before, after = Requests(onnx.load(path), yaml.safe_load(roles.read_text()))(candidates, 0)
    product, x = Peak.product()
    models = [path, result.model.SerializeToString(), product.SerializeToString()]
    feeds = [before, after if result.changed else before, {"x": x}]
    *times, peak = medians([session(m) for m in models], feeds, seconds)
    macs = [result.report.macs_before, result.report.macs_after]
    shares = [m / t * peak / x.shape[0] ** 3 for m, t in zip(macs, times, strict=True)]
    cells = [f"{m / 1e6:.1f}" for m in macs] + [f"{100 * s:.0f} %" for s in shares]
    return [name, *cells, f"{times[0] / times[1]:.2f}"]


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*.torchscript.onnx", metavar="GLOB")
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=2.0, help="per model")
    options = parser.parse_args()
    print("| model | million MACs before | after | share of peak before | after | faster |")
    print("|" + "---|" * 6)
    for path in sorted(options.folder.glob(options.only)):
        if ".twin." not in path.name:
            print("| " + " | ".join(share(path, options.candidates, options.seconds)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
