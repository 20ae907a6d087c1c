"""Sweeps that show how the saving grows: over the share of request-level features, over N, layouts and history lengths.

    pip install '.[cpu,models]' matplotlib
    python scripts/sweep.py out                                        # about five minutes; results in out/sweep.json
    python scripts/sweep.py out --steps plot --figure scripts/figures/sweep.svg

Parts:
    share: DLRM and DCNv2 with 0.2 to 0.9 of their fields request-level, N = 512.
    candidates: the same two as in `models/`, N from 1 to 4096, optimised for 512 and for each N.
    layout: MaRI's setting, ten request-level features to a candidate-level one, in neat and fragmented layouts.
    history: a transformer over histories of 64 to 1024 with the candidate appended, N = 512.

Steps, which may run apart from each other: `prepare` exports, optimises, and counts multiply-adds by running the models
(`yardstick.py`); `time` takes medians of interleaved runs on one thread; `plot` draws. Each continues with what is in
the folder. Closed forms are computed here from the sizes of the models alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnxrank import optimize
from onnxrank.roles import load_spec
from scripts.benchmark import medians_over_sessions, session
from scripts.coverage import Feed, Requests
from scripts.yardstick import Trace, per_rows

PARTS = ("share", "candidates", "layout", "history")
STEPS = ("prepare", "time", "plot")
ROWS = 512
SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
CANDIDATES = (1, 4, 16, 64, 256, 1024, 4096)
MARI_ROWS = (100, 500, 1000, 2000)
MARI_HIDDEN = (128, 256, 512)
LAYOUTS = ("neat", "fragmented", "packed", "pieces", "fragmented_pieces")
HISTORIES = (64, 128, 256, 512, 1024)
# Rows for counting, fewer than the yardstick's own: it keeps every intermediate, and a long history's are large.
COUNTED_ROWS = (2, 3)
# The original over a long history would take tens of GB for 512 candidates: it gets them in batches of so many.
BATCH = 64
SESSIONS = 5

Cost = tuple[float, float]
"""Multiply-adds per request and per candidate."""


# --- closed forms --------------------------------------------------------------------------------------------------


def _layers(widths: Sequence[int]) -> int:
    return sum(a * b for a, b in pairwise(widths))


def dlrm_forms(
    user: int, item: int, user_dense: int, dim: int, bottom: Sequence[int], top: Sequence[int], **_: int
) -> dict[str, Cost]:
    """DLRM: as exported, block by block, and with every pair across made once.

    With c request-level vectors, the bottom MLP's output among them, and t candidate-level ones, an export makes all
    (c+t)² dot products. `split` makes the c² of request-level ones once per request, and the rows of the first top
    layer that read them; `symmetric` leaves out one of the two products of each pair across levels.
    """
    c, t = user + 1, item
    tower = _layers((user_dense, *bottom, dim))
    tail = _layers((*top, 1))

    def pairs(n: int) -> int:
        return n * (n - 1) // 2

    first = dim + pairs(c + t)
    whole = tower + (c + t) ** 2 * dim + first * top[0] + tail
    once = tower + c * c * dim + (dim + pairs(c)) * top[0]
    crossed = c * t * dim
    return {
        "original": (0, whole),
        "split": (once, whole - once),
        "symmetric": (once, whole - once - crossed),
    }


def dcnv2_forms(user: int, item: int, dim: int, layers: int, hidden: Sequence[int], **_: int) -> dict[str, Cost]:
    """DCNv2 with full matrices beside an MLP: as exported, first layers split, and affine at every depth.

    `split` is what the rank-aware decomposition allows: the first cross layer saves (N-1) d_c d, the first layer of the
    MLP (N-1) d_c h. `head` also makes the last layer's context half one request-level vector, where it meets the linear
    head. In `affine` no layer's context half is made per candidate: it stays `A + Σ_k t_k M_k`, with t_k the
    candidate half after k layers, and the last layer's goes into the head.
    """
    c, t = user * dim, item * dim
    d = c + t
    tail = _layers(hidden)
    head = d + hidden[-1]
    whole = layers * d * d + d * hidden[0] + tail + head
    once = c * d + c * hidden[0]
    # Per request: every M but the newest from the layer before, and every M into the candidate half of the next layer;
    # A likewise, with the last layer's matrix times the head; and every M of the last layer times the head.
    grown = (layers - 1) * (layers - 2) // 2 * t * c * c + layers * (layers - 1) // 2 * t * c * t
    constant = layers * c * d + c
    heads = layers * t * c
    per_candidate = layers * (layers + 1) // 2 * t * t + (layers + 1) * t
    return {
        "original": (0, whole),
        "split": (once, whole - once),
        "head": (once + d * c, whole - once - d * c + d),
        "affine": (
            grown + constant + heads + c * hidden[0],
            per_candidate + t * hidden[0] + tail + hidden[-1],
        ),
    }


def fusion_forms(user: int, item: int, hidden: int, **_: int) -> dict[str, Cost]:
    """One fusion layer and its head; the layer alone goes from B (D_u + D') to D_u + B D'."""
    return {
        "original": (0, (user + item) * hidden + hidden),
        "split": (user * hidden, item * hidden + hidden),
    }


def history_forms(history: int, dim: int, layers: int, hidden: Sequence[int], **_: int) -> dict[str, Cost]:
    """The history transformer: as exported, and with the history encoded once.

    A layer over L positions with the candidate appended makes queries and outputs for L + 1 tokens and keys and values
    for L. Once the history is request-level, a candidate costs one token. `pruned` also leaves out what nobody reads of
    the last layer's history rows: all but keys and values.
    """
    length, d = history, dim
    token = 2 * d * d + 8 * d * d + 2 * length * d
    keys = 2 * length * d * d
    head = _layers((dim, *hidden, 1))
    return {
        "original": (0, layers * ((length + 1) * token + keys) + head),
        "amortised": (layers * (length * token + keys), layers * token + head),
        "pruned": ((layers - 1) * length * token + layers * keys, layers * token + head),
    }


FORMS: dict[str, Callable[..., dict[str, Cost]]] = {
    "dlrm": dlrm_forms,
    "dcnv2_parallel": dcnv2_forms,
    "fusion": fusion_forms,
    "history_transformer": history_forms,
}


def total(cost: Sequence[float], n: int) -> float:
    """Multiply-adds for one request of n candidates."""
    return cost[0] + n * cost[1]


def ratios(forms: Mapping[str, Sequence[float]], n: int) -> dict[str, float]:
    """Multiply-adds of the original over those of each form."""
    return {name: total(forms["original"], n) / total(cost, n) for name, cost in forms.items() if name != "original"}


# --- what is swept -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Models that are timed together.

    Attributes:
        part: One of `PARTS`.
        name: Unique in its part.
        family: A model of `models/`.
        sizes: What replaces the industrial sizes.
        rows: Numbers of candidates to time at.
        optimised: Label of each optimised form, with the number of candidates it is optimised for.
        layouts: Layouts to build, each with an original and the optimised forms; one without a name in most parts.
        batch: Candidates that the original gets at a time; all if None.
    """

    part: str
    name: str
    family: str
    sizes: dict[str, Any]
    rows: tuple[int, ...] = (ROWS,)
    optimised: tuple[tuple[str, int], ...] = (("optimised", ROWS),)
    layouts: tuple[str, ...] = ("",)
    batch: int | None = None


def cases(part: str) -> Iterator[Case]:
    """What a part consists of; the total number of fields stays while the share varies."""
    if part == "share":
        for share in SHARES:
            # The bottom MLP's output is request-level, too.
            user = round(27 * share) - 1
            yield Case(part, f"dlrm_{share}", "dlrm", {"user": user, "item": 26 - user})
            user = round(32 * share)
            yield Case(part, f"dcnv2_{share}", "dcnv2_parallel", {"user": user, "item": 32 - user})
    elif part == "candidates":
        forms = (("optimised", ROWS), *((f"for_{n}", n) for n in CANDIDATES))
        for name, family in (("dlrm", "dlrm"), ("dcnv2", "dcnv2_parallel")):
            yield Case(part, name, family, {}, CANDIDATES, forms)
    elif part == "layout":
        for hidden in MARI_HIDDEN:
            yield Case(part, f"hidden_{hidden}", "fusion", {"hidden": hidden}, MARI_ROWS, layouts=LAYOUTS)
    else:
        for history in HISTORIES:
            yield Case(part, f"history_{history}", "history_transformer", {"history": history}, batch=BATCH)


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def timed_forms(case: Case, n: int) -> list[str]:
    """Labels of the forms to time at n candidates: those optimised for another number are left out."""
    forms = ["original", *(label for label, _ in case.optimised if label in ("optimised", f"for_{n}"))]
    return [_joined(layout, form) for layout in case.layouts for form in forms]


# --- prepare -------------------------------------------------------------------------------------------------------


def prepare(case: Case, folder: Path) -> dict[str, Any]:
    """Exports the originals, optimises them, and counts what all of them compute.

    Returns:
        `sizes`: the model's. `closed`: per request and per candidate, for each closed form. `macs`: the same, as
        counted, for each form. `changed`: forms that the optimiser has changed.
    """
    from models.layers import initialise
    from scripts.export_models import export_torchscript, roles_text, write

    cls = _family(case.family)
    sizes = {**cls.scales["industrial"], **case.sizes}
    found: dict[str, Any] = {"family": case.family, "sizes": sizes, "closed": FORMS[case.family](**sizes)}
    found.update(macs={}, changed=[], batch=case.batch)
    for layout in case.layouts:
        module = cls(**sizes, **({"layout": layout} if layout else {}))
        initialise(module, seed=0)
        path = _path(folder, case, _joined(layout, "original"))
        path.parent.mkdir(parents=True, exist_ok=True)
        write(export_torchscript(module, module.specs), path)
        roles = _roles(folder, case, layout)
        roles.write_text(roles_text(module.specs))
        draw = Requests(onnx.load(path), yaml.safe_load(roles.read_text()))
        found["macs"][_joined(layout, "original")] = _counted(path, draw, 0)
        for label, n in case.optimised:
            form = _joined(layout, label)
            result = optimize(path, spec=load_spec(roles), candidates=n)
            result.save(_path(folder, case, form))
            if result.changed:
                found["changed"].append(form)
            found["macs"][form] = _counted(_path(folder, case, form), draw, int(result.changed))
    return found


def _family(name: str) -> Any:
    from models.dcn import DCNv2Parallel
    from models.dlrm import DLRM
    from models.fusion import Fusion
    from models.history_transformer import HistoryTransformer

    return {
        "dlrm": DLRM,
        "dcnv2_parallel": DCNv2Parallel,
        "fusion": Fusion,
        "history_transformer": HistoryTransformer,
    }[name]


def _counted(path: Path, draw: Requests, interface: int) -> Cost:
    return per_rows(Trace(path), lambda n: draw(n, 0)[interface], COUNTED_ROWS)


def _path(folder: Path, case: Case, form: str) -> Path:
    return folder / case.part / f"{case.name}.{form}.onnx"


def _roles(folder: Path, case: Case, layout: str) -> Path:
    return folder / case.part / f"{_joined(case.name, layout)}.roles.yaml"


# --- time ----------------------------------------------------------------------------------------------------------


def take_times(
    case: Case, folder: Path, changed: Sequence[str], seconds: float, least: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Median milliseconds per request, by number of candidates and form.

    Returns:
        `times`: of all forms together. `alone`, where there are several layouts: of the optimised forms among
        themselves, over more sessions, as they are to be told apart by a few percent.
    """
    draws = {
        layout: Requests(
            onnx.load(_path(folder, case, _joined(layout, "original"))),
            yaml.safe_load(_roles(folder, case, layout).read_text()),
        )
        for layout in case.layouts
    }

    def milliseconds(forms: Sequence[str], n: int, sessions: int) -> dict[str, float]:
        rows = {form: case.batch if case.batch and form.endswith("original") else n for form in forms}

        def make(form: str, seed: int) -> tuple[onnxruntime.InferenceSession, Feed]:
            fed = draws[form.rpartition(".")[0]](rows[form], seed)[int(form in changed)]
            return session(_path(folder, case, form)), fed

        took = medians_over_sessions(forms, make, sessions, seconds, least)
        return {form: round(1e3 * t * n / rows[form], 6) for form, t in took.items()}

    out = {"times": {str(n): milliseconds(timed_forms(case, n), n, SESSIONS) for n in case.rows}}
    if len(case.layouts) > 1:
        out["alone"] = {
            str(n): milliseconds([f for f in timed_forms(case, n) if not f.endswith("original")], n, 4 * SESSIONS)
            for n in case.rows
        }
    return out


# --- what is said of it --------------------------------------------------------------------------------------------


def points(part: str, found: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per case, number of candidates and optimised form: ratios of time, of multiply-adds, of closed forms."""
    for case in cases(part):
        entry = found.get(case.name)
        if entry is None:
            continue
        for n in case.rows:
            times = entry.get("times", {}).get(str(n), {})
            for layout in case.layouts:
                original = _joined(layout, "original")
                for form in timed_forms(dataclasses.replace(case, layouts=(layout,)), n)[1:]:
                    yield {
                        "case": case.name,
                        "n": n,
                        "form": form,
                        "time": times[original] / times[form] if form in times else None,
                        "macs": total(entry["macs"][original], n) / total(entry["macs"][form], n),
                        "closed": ratios(entry["closed"], n),
                        "milliseconds": [times[original], times[form]] if form in times else None,
                    }


def layout_costs(found: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Time of an optimised layout over that of the neat one with the same inputs, and the same of the originals."""
    pairs = (("fragmented", "neat"), ("packed", "neat"), ("fragmented_pieces", "pieces"))
    for case in cases("layout"):
        entry = found.get(case.name, {})
        for n, alone in entry.get("alone", {}).items():
            times = entry["times"][n]
            for layout, neat in pairs:
                yield {
                    "case": case.name,
                    "n": int(n),
                    "layout": layout,
                    "optimised": alone[f"{layout}.optimised"] / alone[f"{neat}.optimised"],
                    "original": times[f"{layout}.original"] / times[f"{neat}.original"],
                }


def as_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows as aligned text."""
    lines = []
    for part in PARTS:
        for p in points(part, results.get(part, {})):
            closed = " ".join(f"{k} {v:.2f}" for k, v in p["closed"].items())
            time = "time -" if p["time"] is None else f"time {p['time']:.2f} ({p['milliseconds'][0]:.3f} ms)"
            label = f"{part} {p['case']} N={p['n']} {p['form']}"
            lines.append(f"{label:<58} {time:<24} MACs {p['macs']:<8.2f} closed forms: {closed}")
    costs = list(layout_costs(results.get("layout", {})))
    for c in costs:
        label = f"layout {c['case']} N={c['n']} {c['layout']}"
        lines.append(f"{label:<58} {c['optimised']:.3f} of the neat layout's time ({c['original']:.3f} before)")
    for layout in dict.fromkeys(c["layout"] for c in costs):
        worst = [c["optimised"] for c in costs if c["layout"] == layout]
        lines.append(f"{layout} over neat: at most {max(worst):.3f}, mean {sum(worst) / len(worst):.3f}")
    return "\n".join(lines)


# --- figures -------------------------------------------------------------------------------------------------------

_INK, _MUTED, _GRID = "#1f2328", "#59636e", "#d8dee4"
_COLOURS = {"dlrm": "#0969da", "dcnv2": "#bc4c00", "history": "#1a7f37", "layout": "#8250df"}
_TITLES = {"dlrm": "DLRM", "dcnv2": "DCNv2"}


def plot(results: Mapping[str, Mapping[str, Any]], folder: Path, overview: Path | None) -> list[Path]:
    """Draws a figure for every part that has times, and all growth in one.

    Args:
        results: By part and case.
        folder: For the figures of the parts.
        overview: For the figure of share, candidates and history side by side; not drawn if None.

    Returns:
        The files, SVG with text as text on a white ground.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "onnxrank",
        "font.family": "sans-serif",
        "font.sans-serif": ["Arial", "Helvetica", "DejaVu Sans"],
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.grid": True,
        "grid.color": _GRID,
        "grid.linewidth": 0.6,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
        "lines.markersize": 4,
    }
    drawn = [part for part in PARTS if any("times" in entry for entry in results.get(part, {}).values())]
    growing = [part for part in drawn if part != "layout"]
    out = []
    with pyplot.rc_context(style):
        sheets = [([part], folder / f"{part}.svg") for part in drawn]
        if overview is not None and growing:
            overview.parent.mkdir(parents=True, exist_ok=True)
            sheets.append((growing, overview))
        for parts, path in sheets:
            figure, axes = pyplot.subplots(1, len(parts), figsize=(3.4 * len(parts), 3.2), squeeze=False)
            for part, ax in zip(parts, axes[0], strict=True):
                _DRAWN[part](ax, results[part])
            figure.tight_layout()
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
            out.append(path)
    return out


def _draw_share(ax: Any, found: Mapping[str, Any]) -> None:
    rows = [p for p in points("share", found) if p["time"] is not None]
    for model, title in _TITLES.items():
        mine = [p for p in rows if p["case"].startswith(model)]
        x = [float(p["case"].rpartition("_")[2]) for p in mine]
        _curves(ax, x, mine, title, _COLOURS[model])
    ax.set(
        title=f"DLRM and DCNv2, N = {ROWS}", xlabel="share of request-level fields", ylabel="faster by", yscale="log"
    )
    _finish(ax)


def _draw_candidates(ax: Any, found: Mapping[str, Any]) -> None:
    rows = [p for p in points("candidates", found) if p["time"] is not None]
    for model, title in _TITLES.items():
        mine = [p for p in rows if p["case"] == model]
        adapted = [p for p in mine if p["form"] != "optimised"]
        _curves(ax, [p["n"] for p in adapted], adapted, title, _COLOURS[model])
        fixed = [p for p in mine if p["form"] == "optimised"]
        ax.plot(
            [p["n"] for p in fixed],
            [p["time"] for p in fixed],
            color=_COLOURS[model],
            marker="o",
            markerfacecolor="white",
            linewidth=0.8,
        )
    ax.plot([], [], color=_MUTED, marker="o", markerfacecolor="white", linewidth=0.8, label=f"always for {ROWS}")
    ax.set(title="optimised for N; share 0.70 and 0.75", xlabel="candidates N", ylabel="faster by")
    ax.set(xscale="log", yscale="log")
    ax.axhline(1, color=_MUTED, linewidth=0.8)
    _ticks(ax.xaxis, CANDIDATES)
    _finish(ax)


def _draw_history(ax: Any, found: Mapping[str, Any]) -> None:
    rows = [p for p in points("history", found) if p["time"] is not None]
    x = [int(p["case"].rpartition("_")[2]) for p in rows]
    _curves(ax, x, rows, "transformer", _COLOURS["history"])
    ax.set(title=f"history transformer, N = {ROWS}", xlabel="length of the history", ylabel="faster by")
    ax.set(xscale="log", yscale="log")
    _ticks(ax.xaxis, x)
    _finish(ax)


def _draw_layout(ax: Any, found: Mapping[str, Any]) -> None:
    costs = list(layout_costs(found))
    labels = list(dict.fromkeys((c["case"].rpartition("_")[2], c["n"]) for c in costs))
    names = {"fragmented": "cut and interleaved", "packed": "one matrix", "fragmented_pieces": "64 inputs interleaved"}
    for layout, marker in zip(names, "osd", strict=True):
        mine = [c for c in costs if c["layout"] == layout]
        y = [labels.index((c["case"].rpartition("_")[2], c["n"])) for c in mine]
        ax.plot([c["optimised"] for c in mine], y, marker, color=_COLOURS["layout"], label=names[layout])
        ax.plot([c["original"] for c in mine], y, marker, color=_MUTED, markerfacecolor="none")
    ax.axvline(1.03, color=_MUTED, linewidth=0.8, linestyle="--")
    ax.set_yticks(range(len(labels)), [f"H {h}, N {n}" for h, n in labels])
    ax.set(title="fragmented over neat (grey: before)", xlabel="ratio of times")
    ax.legend()


_DRAWN: dict[str, Callable[[Any, Mapping[str, Any]], None]] = {
    "share": _draw_share,
    "candidates": _draw_candidates,
    "layout": _draw_layout,
    "history": _draw_history,
}


def _curves(ax: Any, x: Sequence[float], rows: Sequence[Mapping[str, Any]], title: str, colour: str) -> None:
    """Times as a line, counted multiply-adds as crosses, the closed form of the papers dotted."""
    ax.plot(x, [p["time"] for p in rows], color=colour, marker="o", linewidth=1.6, label=title)
    ax.plot(x, [p["macs"] for p in rows], "x", color=colour)
    ax.plot(x, [next(iter(p["closed"].values())) for p in rows], ":", color=colour, linewidth=1.2)


def _ticks(axis: Any, values: Sequence[int]) -> None:
    axis.set_ticks(list(values), [str(v) for v in values])
    axis.set_minor_locator(_null())


def _null() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _finish(ax: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    ax.yaxis.set_minor_locator(_null())
    ax.plot([], [], "x", color=_MUTED, label="multiply-adds")
    ax.plot([], [], ":", color=_MUTED, label="closed form, block split")
    ax.legend()


# --- the command line ----------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for models, sweep.json and figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--only", default="*", metavar="GLOB", help="on names of cases, such as 'history_*'")
    parser.add_argument("--seconds", type=float, default=2.0, help="of runs per case and number of candidates")
    parser.add_argument("--least", type=int, default=3, help="runs of every form in a session, however long they take")
    parser.add_argument("--figure", type=Path, metavar="SVG", help="share, candidates and history side by side")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    written = options.folder / "sweep.json"
    results: dict[str, dict[str, Any]] = json.loads(written.read_text()) if written.exists() else {}
    chosen = [case for part in options.parts for case in cases(part) if fnmatch.fnmatch(case.name, options.only)]
    warnings.filterwarnings("ignore")
    for case in chosen:
        found = results.setdefault(case.part, {})
        if "prepare" in options.steps:
            found[case.name] = prepare(case, options.folder)
        if "time" in options.steps:
            if case.name not in found:
                parser.error(f"{case.part} {case.name} is not in {options.folder}; add 'prepare' to --steps")
            changed = found[case.name]["changed"]
            found[case.name].update(take_times(case, options.folder, changed, options.seconds, options.least))
        if {"prepare", "time"} & set(options.steps):
            written.write_text(json.dumps(results, indent=1) + "\n")
            print(as_text({case.part: {case.name: found[case.name]}}), file=sys.stderr, flush=True)
    if "plot" in options.steps:
        try:
            drawn = plot(results, options.folder, options.figure)
        except ModuleNotFoundError as error:
            parser.error(f"{error.name} is not installed. Run 'pip install {error.name}', or leave out --steps plot.")
        for path in drawn:
            print(f"{path}: {path.stat().st_size / 1024:.0f} kB", file=sys.stderr)
    print(as_text(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
