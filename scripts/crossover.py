"""Times files made for any number of candidates against the original, and against each of their two plans alone.

    python scripts/crossover.py models/onnx --json wide.json                # which are slower than their original
    python scripts/export_models.py out --scale industrial --exporter torchscript --names pnn din field_attention
    python scripts/crossover.py out --figure scripts/figures/crossover.svg  # the figure of docs/plan.md

A folder holds `<name>.roles.yaml` and `<name>.<anything>.onnx`. Every model is optimised for the range
`--candidates`. Forms of a model take turns on one thread, in a process of their own; a ratio is the median over
rounds of the original's time over the form's. Sessions are opened once and run with the usual number of candidates
first, as a server's are: onnxruntime plans memory for the shapes that a session sees first, and small models take up
to a seventh longer for others. Numbers with which the original does not run are left out. What is slower than the
original is timed again, `--again` times, each in a new process, and the median of all counts. Behind the table stands
how far predicted ratios are off (`--json` keeps them). Figures need matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxrank
from onnxrank import turns
from onnxrank.roles import load_spec
from scripts.benchmark import session
from scripts.coverage import Feed, Requests

COUNTS = (1, 8, 32, 128, 512, 2048)
SLOWER = 0.98
_WARM = 0.1  # seconds with the usual number of candidates before others
_COLOURS = {"file": "#0969da", "many": "#bc4c00", "few": "#1a7f37"}
_LABELS = {"file": "one file", "many": "plan for many alone", "few": "plan for few alone"}

Row = dict[int, float]
"""Ratios by the number of candidates."""
Times = dict[int, list[float]]
"""By the number of candidates a ratio for each form."""


def _spec(path: Path) -> Path:
    return path.with_name(f"{path.name.split('.')[0]}.roles.yaml")


def forms(path: Path, options: argparse.Namespace) -> tuple[onnxrank.Result, dict[str, bytes]]:
    """What is made of a model for a range: the file, and for a figure its plans alone where it holds two."""
    how = {"candidates": options.candidates, "tune": options.tune, "check": options.check}
    result = onnxrank.optimize(path, spec=load_spec(_spec(path)), **how)
    made = {"file": result.model} if result.changed else {}
    few = result.plan.few
    if few is not None and options.figure is not None:
        alone = dataclasses.replace(result.plan, few=None)
        plans = {"many": alone}
        if few.rules:
            kept = (*result.plan.preparation, *few.sites)
            plans["few"] = dataclasses.replace(alone, blocks=0, blocks_from=0, rules=few.rules, sites=kept)
        made |= {name: onnxrank.optimize(path, plan=plan, check=False).model for name, plan in plans.items()}
    return result, {name: model.SerializeToString() for name, model in made.items()}


def runs(original: Any, feed: Feed) -> bool:
    """Whether a model runs with a request: some do not with a single candidate."""
    try:
        original.run(None, feed)
    except Exception:
        return False
    return True


def ratios(sessions: Sequence[Any], feeds: tuple[Feed, Feed], seconds: float) -> list[float]:
    """Time of the first session, the original's, over that of each other."""
    given = [feeds[0], *[feeds[1]] * (len(sessions) - 1)]

    def timed(s: Any, feed: Feed) -> turns.Run:
        def run(_: int) -> float:
            begin = turns.of_thread()
            s.run(None, feed)
            return turns.of_thread() - begin

        return run

    found = turns.interleave([timed(s, f) for s, f in zip(sessions, given, strict=True)], seconds)
    first, *others = np.median(found.seconds, axis=2)
    return [turns.ratio(first, other)[0] for other in others]


def times(path: Path, made: Mapping[str, bytes], usual: int, counts: Sequence[int], seconds: float, seed: int) -> Times:
    """Ratios of what is made of a model, by the number of candidates, in this process."""
    draw = Requests(onnx.load(path), yaml.safe_load(_spec(path).read_text()))
    sessions = [session(path), *map(session, made.values())]
    ratios(sessions, draw(usual, 0), _WARM)
    served = [n for n in counts if runs(sessions[0], draw(n, 0)[0])]
    return {n: ratios(sessions, draw(n, seed), seconds) for n in served}


def alone(*given: Any) -> Times:
    """`times` in a new process: where other models have been, memory lies scattered, and small differences are lost."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
        return own.submit(times, *given).result()


def measure(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a model: where its file goes over, and ratios by form and number of candidates."""
    result, made = forms(path, options)
    usual = result.report.usual
    tries = [alone(path, made, usual, options.counts, options.seconds, 0)] if made else []
    slow = [n for tried in tries for n, seen in tried.items() if seen[0] < SLOWER]
    tries += [alone(path, made, usual, slow, options.seconds, k + 1) for k in range(options.again) if slow]
    found: dict[str, Row] = {
        name: {n: statistics.median(tried[n][k] for tried in tries if n in tried) for n in tries[0]}
        for k, name in enumerate(made)
    }
    below = None if result.plan.few is None else result.plan.few.below
    predicted = {p.candidates: p.ratio for p in result.report.predictions if p.candidates in options.counts}
    kept = {"changed": result.changed, "below": below, "blocks": result.plan.blocks, "notes": result.report.notes}
    return {**kept, "ratios": found, "predicted": predicted if made else {}}


def told(name: str, row: Mapping[str, Any]) -> str:
    """A row as text."""
    kind = "left alone" if not row["changed"] else "one plan" if row["below"] is None else f"two, from {row['below']}"
    cells = (f"{form} " + " ".join(f"{n}:{r:.2f}" for n, r in found.items()) for form, found in row["ratios"].items())
    return f"{name:<38} {kind:<14} {'; '.join(cells)}"


def summary(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How many are slower than their original anywhere, and geometric means."""
    files = {
        name: {int(n): r for n, r in row["ratios"]["file"].items()} for name, row in rows.items() if row["changed"]
    }
    slower = {name: min(f.values()) for name, f in files.items() if min(f.values()) < SLOWER}
    lines = [
        f"{len(rows)} models, {len(files)} changed, {sum(r['below'] is not None for r in rows.values())} of two plans"
    ]
    for n in COUNTS:
        known = [f[n] for f in files.values() if n in f]
        if known:
            means = statistics.geometric_mean([*known, *[1.0] * (len(rows) - len(known))])
            lines.append(f"N = {n}: {means:.2f} in the geometric mean, {min(known):.2f} at least")
    lines += [f"slower than {SLOWER}: {name}, {ratio:.2f}" for name, ratio in sorted(slower.items())]
    told = {name: {int(n): p for n, p in rows[name]["predicted"].items()} for name in files}
    pairs = [(name, n, told[name][n], r) for name, f in files.items() for n, r in f.items() if n in told[name]]
    if pairs:
        off = [abs(predicted / seen - 1) for _, _, predicted, seen in pairs]
        lines.append(f"predictions are off by {statistics.median(off):.1%} in the median")
    lines += [
        f"told as a gain, and slower: {name} at N = {n}, {predicted:.2f}, {seen:.2f}"
        for name, n, predicted, seen in pairs
        if predicted > 1 and seen < SLOWER
    ]
    return "\n".join(lines)


def plot(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws ratios over the number of candidates, a panel for each model of two plans."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    shown = {name: row for name, row in rows.items() if row["below"] is not None}
    style = {"svg.fonttype": "none", "svg.hashsalt": "onnxrank", "font.size": 9, "axes.grid": True,
             "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, len(shown), figsize=(3.4 * len(shown), 3.2), squeeze=False)
        for ax, (name, row) in zip(axes[0], shown.items(), strict=True):
            for form, found in row["ratios"].items():
                counts = [int(n) for n in found]
                ax.plot(counts, list(found.values()), marker="o", markersize=4, color=_COLOURS[form],
                        label=_LABELS[form], linewidth=2.2 if form == "file" else 1)  # fmt: skip
            ax.axhline(1, color="#59636e", linewidth=0.8, label="original")
            ax.axvline(row["below"], color="#59636e", linewidth=0.8, linestyle=":")
            ax.set(title=name.split(".")[0], xlabel="candidates N", xscale="log", yscale="log")
        axes[0][0].set_ylabel("times as fast as the original")
        axes[0][0].legend(frameon=False, fontsize=7.5)
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _span(text: str) -> tuple[int, int]:
    low, high = map(int, text.split(".."))
    return low, high


def _counts(text: str) -> Sequence[int]:
    return tuple(map(int, text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", metavar="GLOB", help="on names of models")
    parser.add_argument("--candidates", type=_span, default=(1, 4096), metavar="LOW..HIGH", help="what is declared")
    parser.add_argument("--check", default="standard", metavar="LEVEL", help="how results are held against originals")
    parser.add_argument("--counts", type=_counts, default=COUNTS, metavar="N,N", help="what is timed")
    parser.add_argument("--tune", type=float, default=2.0, help="seconds of timing within optimize; 0 for none")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing per model and number of candidates")
    parser.add_argument("--again", type=int, default=2, help="how often what looks slower is timed again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was measured; goes on with what is there")
    parser.add_argument("--figure", type=Path, metavar="SVG")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        rows = json.loads(options.json.read_text())
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", file=sys.stderr)
    for path in sorted(options.folder.glob("*.onnx")):
        if path.stem not in rows and fnmatch.fnmatch(path.stem, options.only):
            rows[path.stem] = measure(path, options)
            print(told(path.stem, rows[path.stem]), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(summary(rows))
    if options.figure is not None and any(row["below"] is not None for row in rows.values()):
        plot(rows, options.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
