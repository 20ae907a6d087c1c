"""Optimises every model of a folder and runs `onnxrank verify --level full` on the pair; prints verdicts and times.

python scripts/verify_models.py models/onnx
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import yaml

import onnxrank
from onnxrank.errors import OnnxrankError
from onnxrank.verify import Options, Report, verify
from onnxrank.verify.report import VERDICTS

SECONDS = 60.0
ALWAYS = ("structure", "algebra", "rounding", "ranking", "metamorphic")


def row(report: Report) -> str:
    """Outcomes, cases and the worst rounding, against what is allowed."""
    marks = {"passed": "ok", "failed": "FAIL", "skipped": "-"}
    found = " ".join(f"{marks[report.verdicts[v]]:>5}" for v in VERDICTS if v != "data")
    shares = [s.error / s.allowed for s in report.statistics if s.allowed]
    return f"{found}  {len(report.cases):5d}  {max(shares, default=0):6.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ep", default="cpu")
    parser.add_argument("--no-tf32", action="store_true")
    args = parser.parse_args()
    providers = tuple(args.ep.split(","))
    bad = 0
    longest = 0.0
    names = " ".join(f"{v[:5]:>5}" for v in VERDICTS if v != "data")
    print(f"{'model':40} {'s':>5}  {names}  cases  error/allowed")
    paths = sorted(args.folder.glob("*.onnx"))
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            roles = path.parent / f"{path.name.split('.')[0]}.roles.yaml"
            out = Path(folder) / path.name
            try:
                onnxrank.optimize(path, spec=yaml.safe_load(roles.read_text()), check=False).save(out)
                start = time.monotonic()
                found = verify(path, out, Options(level="full", providers=providers, tf32=not args.no_tf32))
                seconds = time.monotonic() - start
            except OnnxrankError as e:
                print(f"{path.name:40} {type(e).__name__}: {e}")
                bad += 1
                continue
            longest = max(longest, seconds)
            right = found.passed and all(found.verdicts[v] == "passed" for v in ALWAYS) and seconds < SECONDS
            bad += not right
            print(f"{path.name:40} {seconds:5.1f}  {row(found)}", flush=True)
            for f in found.errors:
                print(f"    {f.verdict}: {f.message}")
    print(f"{len(paths) - bad} of {len(paths)} pass with all verdicts; longest {longest:.1f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
