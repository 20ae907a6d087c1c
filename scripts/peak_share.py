"""How near models and what onnxrank makes of them are to the machine.

The share of peak is the multiply-adds of a model's products per second, over those of one large product that takes its
turns between both. Beside it stands what of the result's time its products take, were each timed alone, and its
softmaxes, normalisations and functions; and the share of peak that it would reach, did it do nothing else
(`scripts/kernel_floor.py`): what keeps a model below that no rewriting takes away. All times are the thread's
(`turns.of_thread`), so that other processes count for little.

    python scripts/export_models.py OUT --scale industrial
    python scripts/peak_share.py OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnxrank.profiling.sessions import Peak
from scripts.benchmark import medians, session
from scripts.kernel_floor import COLUMNS, floor, rewritten


def share(path: Path, candidates: int, seconds: float, kernel: float) -> list[str]:
    """A row: multiply-adds in millions, shares of peak, the ratio of times, and what the kernels of the result take.

    Args:
        path: The model.
        candidates: How many.
        seconds: How long both are timed.
        kernel: How long each kernel is.
    """
    result, before, after = rewritten(path, candidates)
    made = result.model.SerializeToString()
    product, x = Peak.product()
    models = [path, made, product.SerializeToString()]
    *times, peak = medians([session(m) for m in models], [before, after, {"x": x}], seconds)
    macs = [result.report.macs_before, result.report.macs_after]
    shares = [m / t * peak / x.shape[0] ** 3 for m, t in zip(macs, times, strict=True)]
    cells = [f"{m / 1e6:.1f}" for m in macs] + [f"{100 * s:.0f} %" for s in shares]
    return [path.name.split(".")[0], *cells, f"{times[0] / times[1]:.2f}", *floor(made, after, kernel).cells]


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*.torchscript.onnx", metavar="GLOB")
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=2.0, help="per model")
    parser.add_argument("--kernel", type=float, default=0.1, help="seconds per kernel")
    options = parser.parse_args()
    columns = ["model", "million MACs before", "after", "share of peak before", "after", "faster", *COLUMNS]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for path in sorted(options.folder.glob(options.only)):
        if ".twin." not in path.name:
            print(
                "| " + " | ".join(share(path, options.candidates, options.seconds, options.kernel)) + " |", flush=True
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
