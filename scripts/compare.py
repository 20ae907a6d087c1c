"""Times models next to what onnxsim, onnxslim and onnxrank make of them, and under onnxruntime's optimisation levels.

    pip install onnxsim onnxslim
    python scripts/export_models.py out --scale industrial
    python scripts/compare.py out models/onnx --json compare.json

All forms of a model run interleaved on one thread, on the same request; a ratio is the original's median time with all
of onnxruntime's optimisations over the form's, so above 1 is faster. onnxruntime optimises what the tools have written,
too. `default` is the original at the level a session has unless told otherwise; where that is all optimisations, its
ratio shows how exact the measurement is. onnxrank's form takes one row per request-level input; the others take them
repeated, as the original does. A tool's output that cannot be loaded or gives other scores than the original counts as
a failure, and is not timed.

In pieces, where timing has to be apart from other work; with --json, results of models that are not given again stay:

    python scripts/compare.py out --prepare made
    python scripts/compare.py out --only 'd*' --prepared made --json compare.json
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnxrank import optimize
from onnxrank.roles import load_spec
from scripts.benchmark import medians_over_sessions, session
from scripts.coverage import Feed, Requests

LEVELS = {
    "original": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "default": None,
    "unoptimised": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
OTHERS = ("onnxsim", "onnxslim")
FORMS = (*LEVELS, *OTHERS, "onnxrank")
TOOL_LIMIT = 600  # seconds for one model
# Relative to the scale of an output; what rounding may change.
LARGEST_DIFFERENCE = 1e-4
# A ratio this far below 1 is not noise.
SLOWER = 0.97
SESSIONS = 3


def missing(tools: Sequence[str]) -> list[str]:
    """Those tools that are not installed."""
    return [tool for tool in tools if importlib.util.find_spec(tool) is None]


def name_of(path: Path) -> str:
    """The folder and the file, without the ending."""
    return f"{path.resolve().parent.name}/{path.stem}"


def roles_of(path: Path) -> Path:
    return path.with_name(f"{path.name.split('.')[0]}.roles.yaml")


def models(sources: Sequence[Path], only: str) -> list[Path]:
    """Models with a roles file, in folders or given one by one; no hand-written twins."""
    files = [p for s in sources for p in (sorted(s.glob("*.onnx")) if s.is_dir() else [s])]
    return [p for p in files if fnmatch.fnmatch(p.name, only) and ".twin." not in p.name and roles_of(p).exists()]


# --- what the tools make of a model --------------------------------------------------------------------------------


def prepare(path: Path, tools: Sequence[str], folder: Path) -> None:
    """Writes what every tool makes of a model, and how that went, into a folder of the model's own.

    A tool that fails leaves no file and the reason.
    """
    made = folder / name_of(path)
    made.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {"sha256": _digest(path), "tools": {}}
    for tool in tools:
        out = made / f"{tool}.onnx"
        out.unlink(missing_ok=True)
        begin = time.perf_counter()
        try:
            entry = _onnxrank(path, out) if tool == "onnxrank" else _other(tool, path, out)
        except Exception as error:  # whatever it is, it belongs into the table
            out.unlink(missing_ok=True)
            entry = {"failed": f"{type(error).__name__}: {_first_line(str(error))}"}
        known["tools"][tool] = {**entry, "seconds": round(time.perf_counter() - begin, 2)}
    (made / "prepared.json").write_text(json.dumps(known, indent=1))


def _onnxrank(path: Path, out: Path) -> dict[str, Any]:
    result = optimize(path, spec=load_spec(roles_of(path)))
    result.save(out)
    return {"changed": result.changed, "rules": {use.name: use.sites for use in result.report.rules}}


def _other(tool: str, path: Path, out: Path) -> dict[str, Any]:
    """Runs a tool's command line with its defaults."""
    command = [sys.executable, "-m", tool, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_LIMIT, check=False)
    if done.returncode or not out.exists():
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1] if lines else 'no output'}")
    return {"changed": out.read_bytes() != path.read_bytes()}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:200]


# --- times ---------------------------------------------------------------------------------------------------------


def measure(path: Path, folder: Path, candidates: Sequence[int], seconds: float, least: int) -> dict[str, Any]:
    """Times all forms of one model.

    Args:
        path: The model.
        folder: Where `prepare` wrote.
        candidates: Numbers of candidates.
        seconds: For all forms together, per number of candidates.
        least: Runs of each form in each of its sessions, at least.

    Returns:
        `tools`: how the tools fared; `milliseconds` and `ratio`: by number of candidates and form. A file that a tool
        left as it is has the ratio 1 without being timed.

    Raises:
        ValueError: The model has changed since `prepare`, or `prepare` has not seen it.
    """
    made = folder / name_of(path)
    try:
        known = json.loads((made / "prepared.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: not in {folder}; run with --prepare {folder} first") from None
    if known["sha256"] != _digest(path):
        raise ValueError(f"{path}: has changed since it was prepared in {folder}")
    tools: dict[str, Any] = known["tools"]
    draw = Requests(onnx.load(path, load_external_data=False), yaml.safe_load(roles_of(path).read_text()))

    def make(form: str, n: int, seed: int) -> tuple[onnxruntime.InferenceSession, Feed]:
        feed = draw(n, seed)[int(form == "onnxrank")]
        if form in LEVELS:
            return session(path, LEVELS[form]), feed
        return session(made / f"{form}.onnx", LEVELS["original"]), feed

    times: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for n in candidates:
        expected = _run(*make("original", n, 0))
        for tool, entry in tools.items():
            if entry.get("changed") and "failed" not in entry:
                try:
                    problem = difference(expected, _run(*make(tool, n, 0)))
                except Exception as error:
                    problem = f"fails: {_first_line(str(error))}"
                if problem:
                    entry["failed"] = f"N = {n}: {problem}"
        forms = [*LEVELS, *(tool for tool, entry in tools.items() if entry.get("changed") and "failed" not in entry)]
        took = medians_over_sessions(forms, lambda form, seed, n=n: make(form, n, seed), SESSIONS, seconds, least)
        times[str(n)] = {form: round(t * 1e3, 6) for form, t in took.items()}
        ratios[str(n)] = {form: took["original"] / t for form, t in took.items()}
        ratios[str(n)].update({t: 1.0 for t, e in tools.items() if "failed" not in e and not e["changed"]})
    return {"tools": tools, "milliseconds": times, "ratio": ratios}


def _run(opened: onnxruntime.InferenceSession, feed: Feed) -> list[np.ndarray]:
    return list(opened.run(None, {i.name: feed[i.name] for i in opened.get_inputs()}))


def difference(expected: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> str:
    """What is wrong with results, in words; nothing if they agree up to rounding."""
    shapes = [[v.shape for v in values] for values in (expected, got)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[1]}, not {shapes[0]}"
    for a, b in zip(expected, got, strict=True):
        if a.dtype.kind != "f":
            if not np.array_equal(a, b):
                return "other values"
            continue
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)):
            return "not finite elsewhere"
        scale = float(np.abs(a[finite]).max(initial=0.0)) or 1.0
        worst = float(np.abs(a[finite] - b[finite]).max(initial=0.0)) / scale
        if worst > LARGEST_DIFFERENCE:
            return f"differs by {worst:.1e} of the output's scale"
    return ""


# --- the table -----------------------------------------------------------------------------------------------------


def summaries(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the results of each folder say, and those of all."""
    folders = list(dict.fromkeys(name.partition("/")[0] for name in results))
    parts = {f: {name: r for name, r in results.items() if name.partition("/")[0] == f} for f in folders}
    return {f: summary(part) for f, part in ({**parts, "all": results} if len(folders) > 1 else parts).items()}


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What results say together: per number of candidates and form, and the failures of every tool.

    `same_files` is the geometric mean over the models that no tool failed on.
    """
    failures = {
        tool: {name: r["tools"][tool]["failed"] for name, r in results.items() if "failed" in r["tools"].get(tool, {})}
        for tool in (*OTHERS, "onnxrank")
        if any(tool in r["tools"] for r in results.values())
    }
    failed = {name for names in failures.values() for name in names}
    out: dict[str, Any] = {"models": len(results), "failures": failures, "candidates": {}}
    for n in sorted({n for r in results.values() for n in r["ratio"]}, key=int):
        rows: dict[str, Any] = {}
        for form in FORMS:
            found = {name: r["ratio"][n][form] for name, r in results.items() if form in r["ratio"].get(n, {})}
            if found:
                slower = {name: round(r, 3) for name, r in found.items() if r < SLOWER}
                rows[form] = {
                    "models": len(found),
                    "geometric_mean": _mean(found.values()),
                    "same_files": _mean(r for name, r in found.items() if name not in failed),
                    "least": min(found.values()),
                    "most": max(found.values()),
                    "faster": sum(r > 1 / SLOWER for r in found.values()),
                    "slower": slower,
                }
        out["candidates"][n] = rows
    return out


def _mean(ratios: Any) -> float | None:
    logs = [math.log(r) for r in ratios]
    return math.exp(sum(logs) / len(logs)) if logs else None


def as_markdown(folder: str, said: Mapping[str, Any]) -> str:
    """A summary as a table, with the failures below."""
    heading = ["N", "form", "models", "geometric mean", "where no tool failed", "least", "most"]
    heading += ["over 3 % faster", "over 3 % slower"]
    lines = [
        f"{folder}: {said['models']} models; the original's time with onnxruntime's optimisations over others'",
        "",
        f"| {' | '.join(heading)} |",
        "|" + "---|" * len(heading),
    ]
    for n, rows in said["candidates"].items():
        for form, row in rows.items():
            same = "-" if row["same_files"] is None else f"{row['same_files']:.3f}"
            lines.append(
                f"| {n} | {form} | {row['models']} | {row['geometric_mean']:.3f} | {same} | {row['least']:.2f} | "
                f"{row['most']:.2f} | {row['faster']} | {len(row['slower'])} |"
            )
    lines.append("")
    for tool, names in said["failures"].items():
        lines.append(f"- {tool} failed on {len(names)}" + (":" if names else ""))
        lines += [f"  - {name}: {reason}" for name, reason in names.items()]
    return "\n".join(lines)


def _line(name: str, result: Mapping[str, Any]) -> str:
    parts = [
        f"N={n} " + " ".join(f"{f}:{r:.2f}" for f, r in ratios.items() if f != "original")
        for n, ratios in result["ratio"].items()
    ]
    parts += [f"{tool} FAILED: {entry['failed']}" for tool, entry in result["tools"].items() if "failed" in entry]
    return f"{name}: " + "; ".join(parts)


def _environment(tools: Sequence[str]) -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"

    default = onnxruntime.SessionOptions().graph_optimization_level
    found = {package: version(package) for package in ("onnx", "onnxrank", *(t for t in tools if t in OTHERS))}
    return {**found, "onnxruntime": onnxruntime.__version__, "default level": str(default).rpartition(".")[2]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a model with its roles file, or a folder")
    parser.add_argument("--only", default="*", metavar="GLOB", help="on file names")
    parser.add_argument("--without", nargs="+", choices=OTHERS, default=[], help="tools to leave out")
    parser.add_argument("--candidates", default="32,512", metavar="N,N")
    parser.add_argument("--seconds", type=float, default=4.0, help="per model and number of candidates")
    parser.add_argument(
        "--least", type=int, default=3, help="runs of every form in each of three sessions, however long they take"
    )
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--prepare", type=Path, metavar="FOLDER", help="only run the tools, and keep what they make")
    step.add_argument("--prepared", type=Path, metavar="FOLDER", help="only take the times of what is kept there")
    options = parser.parse_args()
    tools = [tool for tool in (*OTHERS, "onnxrank") if tool not in options.without]
    paths = models(options.files, options.only)
    if not paths:
        parser.error("no models with a roles file found")
    absent = [] if options.prepared else missing(tools)
    if absent:
        names = " ".join(absent)
        parser.error(f"not installed: {names}. Run 'pip install {names}', or pass --without {names}.")
    results: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        results = json.loads(options.json.read_text())["models"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.prepare or options.prepared or Path(temporary)
        for path in paths:
            name = name_of(path)
            if options.prepared is None:
                prepare(path, tools, folder)
            if options.prepare is not None:
                print(f"{name}: prepared", file=sys.stderr, flush=True)
                continue
            try:
                found = measure(
                    path, folder, [int(n) for n in options.candidates.split(",")], options.seconds, options.least
                )
            except ValueError as error:
                parser.error(str(error))
            results[name] = found
            print(_line(name, found), file=sys.stderr, flush=True)
            if options.json is not None:
                body = {"environment": _environment(tools), "models": results, "summary": summaries(results)}
                options.json.write_text(json.dumps(body, indent=1) + "\n")
    if options.prepare is None:
        text = "\n\n".join(as_markdown(*item) for item in summaries(results).items())
        print(text)
        if options.markdown is not None:
            options.markdown.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
