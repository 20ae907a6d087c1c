"""Times what `profile` and `inspect` ask levels of: the analysis, and the rewrite that they had to make before it.

    python scripts/analysis_time.py [--only PATTERN] [--rounds 5]

CPU seconds of this process, so that a busy machine changes little; the models' shapes are derived before, as both need
them. Every model goes through both in turns as often as there are rounds; its time is the least of them.
"""

from __future__ import annotations

import argparse
import fnmatch
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from onnxrank import feeds
from onnxrank import model as files
from onnxrank.flow import Walk
from onnxrank.inspection.engine import inspect
from onnxrank.roles import resolve
from onnxrank.ruleset import choose_rules
from onnxrank.study import Study
from onnxrank.transform import Transformation

FOLDER = Path(__file__).resolve().parents[1] / "models" / "onnx"


def least(run: Callable[[], object], rounds: int) -> float:
    """CPU seconds of a call: the least of some."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def timed(path: Path, rounds: int) -> dict[str, float]:
    """CPU seconds of the analysis, of a rewrite, and of `inspect` as a whole, on one model."""
    roles = path.with_name(f"{path.name.split('.')[0]}.roles.yaml")
    spec = yaml.safe_load(roles.read_text())
    loaded = files.load(path)
    study = Study(files.flattened(loaded.proto), resolve(feeds.describe(loaded.proto), spec=spec), loaded)
    rules = choose_rules(None, (), ())

    def analysed() -> None:
        walk = Walk(study.model, feeds.levels(study.declared), study.facts, loaded.folder, study.dtypes)
        for tensor in walk.tensors.values():
            tensor.level  # noqa: B018

    return {
        "analysis": least(analysed, rounds),
        "rewrite": least(lambda: Transformation(study, rules, "request", True, 512).run(), rounds),
        "inspect": least(lambda: inspect(path, spec=spec), 1),
    }


def main() -> None:
    """Prints milliseconds per model, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="models whose names match")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    found = {}
    for path in sorted(FOLDER.glob("*.onnx")):
        if fnmatch.fnmatch(path.name, given.only):
            found[path.stem] = timed(path, given.rounds)
            print(f"{path.stem:40}", *(f"{k} {1e3 * v:8.2f} ms" for k, v in found[path.stem].items()), flush=True)
    for key in ("analysis", "rewrite", "inspect"):
        print(f"median {key}: {1e3 * statistics.median(f[key] for f in found.values()):.2f} ms")


if __name__ == "__main__":
    main()
