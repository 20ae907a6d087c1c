"""Times `optimize` on the models of `models/onnx`: of both interfaces, with the standard check and without one.

    python scripts/optimizer_time.py [--only PATTERN] [--rounds 5] [--each]

Every model is optimised in turns in all four ways, in one process whose helpers are warm, as often as there are rounds;
its time is the least of them, and the last line gives the medians over all models.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import sys
import time
from pathlib import Path

import yaml

from onnxrank import optimize
from onnxrank.errors import OnnxrankError

FOLDER = Path(__file__).resolve().parents[1] / "models" / "onnx"
WAYS = {
    f"{interface}{'' if check else ', no check'}": (interface, check)
    for interface in ("request", "same")
    for check in (True, False)
}


def main() -> int:
    """Times all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="files whose names match")
    parser.add_argument("--rounds", type=int, default=5, help="how often each")
    parser.add_argument("--each", action="store_true", help="print every model")
    options = parser.parse_args()
    found = sorted(p for p in FOLDER.glob("*.onnx") if fnmatch.fnmatch(p.name, options.only))
    if not found:
        print(f"no model in {FOLDER} matches {options.only}", file=sys.stderr)
        return 2
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for path in found:
        least = dict.fromkeys(WAYS, float("inf"))
        for _ in range(options.rounds):
            for way, (interface, check) in WAYS.items():
                least[way] = min(least[way], timed(path, interface, check))
        for way, seconds in least.items():
            times[way].append(seconds)
        if options.each:
            print(f"{path.name:50}" + "".join(f"{least[way]:18.3f}" for way in WAYS), flush=True)
    print(f"{len(found)} models, median seconds: ", end="")
    print("; ".join(f"{way} {statistics.median(found):.3f}" for way, found in times.items()))
    return 0


def timed(path: Path, interface: str, check: bool) -> float:
    """Seconds that a model takes."""
    roles = yaml.safe_load((path.parent / f"{path.name.split('.')[0]}.roles.yaml").read_text())
    start = time.perf_counter()
    try:
        optimize(path, spec=roles, interface=interface, check=check)
    except OnnxrankError as e:
        print(f"{path.name}: {e}", file=sys.stderr)
    return time.perf_counter() - start


if __name__ == "__main__":
    raise SystemExit(main())
