"""What rank discipline costs in accuracy and saves in time: DCNv2, rDCN, and a control without cross-level terms.

    python scripts/parity.py train out        # 45 runs, a file each: what is there is not trained again
    python scripts/parity.py train careful --careful --layers 3   # rates chosen per model and depth, early stopping
    python scripts/parity.py time out         # multiply-adds and times of the cross network, after `optimize`
    python scripts/parity.py report out --figure scripts/figures/parity.svg

    python scripts/parity.py train mine --data rows.parquet --request 'user_*' --label click     # your own rows

Rows are planted (`planted.py`) with terms of context x candidate, context x context x candidate and
context x candidate x candidate, so that it is known that cross-level terms matter. The models are the cross network
alone below a linear unit: an MLP would make such terms by itself, and hide what the cross network does. The control is
rDCN without the blocks between levels; where it does as well as the others, nothing is shown.

`train` may run several times at once with different `--seeds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxrank
from models import roles, sample
from models.dcn import DCNv2Stacked
from models.layers import Ranker, initialise
from models.rdcn import RDCNStacked, from_dcnv2
from models.training import fit, settle
from onnxrank import charts, runtime
from onnxrank.turns import interleave, ratio
from scripts import labelled, pictures, planted
from scripts.export_models import export_torchscript

KINDS = ("dcnv2", "rdcn", "control")
NAMES = {"dcnv2": "DCNv2", "rdcn": "rDCN", "control": "control"}
WORLD = planted.World(vocab=30, users=3, items=4, tasks=1, unseen=0.0)
"""Four of seven fields are the candidate's: d_t / d = 0.57, where 67 % are claimed."""
DIM, REQUESTS, EPOCHS = 8, 16_000, 3
RATES = {"dcnv2": 2e-2, "rdcn": 4e-2, "control": 2e-2}
"""The better of 2e-2 and 4e-2 for one layer and seed. DCNv2 learns a term across levels in two blocks at once."""
GRID = tuple((rate, decay) for rate in (1e-2, 2e-2, 4e-2) for decay in (0.0, 1e-5))
"""Rates and weight decays that `--careful` chooses from, by rows that are neither trained nor judged on."""
CAREFUL_EPOCHS, CHOSEN_BY = 5, 100
"""Most epochs, the best of which is kept; and a seed that is not among those that are reported."""
TIMED = dict(user=12, item=16, vocab=1000, dim=32)
"""What is timed has the same d_t / d, and the width of a production model."""
CANDIDATES = (32, 512, 2048)


def build(kind: str, layers: int, sizes: Mapping[str, int]) -> Ranker:
    """A cross network below a linear unit, with torch's own first weights."""
    if kind == "dcnv2":
        return DCNv2Stacked(hidden=(), layers=layers, **sizes)
    return RDCNStacked(hidden=(), layers=layers, across=kind == "rdcn", **sizes)


# --- accuracy -----------------------------------------------------------------------------------------------------


def trained(
    kind: str, layers: int, seed: int, data: labelled.Data, told: str | None, how: tuple[float, float] | None = None
) -> tuple[Ranker, dict[str, Any]]:
    """Trains one model, and judges it.

    Args:
        kind: Which.
        layers: Its depth.
        seed: Of data, weights and order.
        data: The rows.
        told: What the progress bar says.
        how: Rate and weight decay, with early stopping; None for the script's own, to the last epoch.
    """
    torch.manual_seed(seed)
    model = build(kind, layers, {**data.sizes, "dim": DIM})
    settle(model)
    begin = time.process_time()
    if how is None:
        losses = continued(model, data, seed, EPOCHS, RATES[kind], told)
    else:
        losses = continued(model, data, seed, CAREFUL_EPOCHS, how[0], told, how[1], watch=True)
    found = {"auc": data.auc(lambda rows: scores(model, rows)), "losses": losses}
    return model, {**found, "seconds": round(time.process_time() - begin, 1)}


def continued(
    model: Ranker,
    data: labelled.Data,
    seed: int,
    epochs: int,
    rate: float,
    told: str | None,
    decay: float = 0.0,
    watch: bool = False,
) -> list[float]:
    """Trains a model as it stands."""
    rows = data.training(seed, apart=watch)
    inputs = [torch.from_numpy(a) for a in labelled.arrays(model.specs, rows).values()]
    labels = torch.from_numpy(rows["label_0"].astype(np.float32))[:, None]
    watched = (lambda: data.watched(lambda rows: scores(model, rows))) if watch else None
    return fit(model, inputs, labels, epochs=epochs, seed=seed, rate=rate, decay=decay, watch=watched, told=told)


def chosen(folder: Path, kind: str, layers: int, data: labelled.Data) -> tuple[float, float]:
    """Rate and weight decay of a model at a depth, by rows that are neither trained nor judged on."""
    found = {}
    for rate, decay in GRID:
        path = folder / f"choice.{kind}.{layers}.{rate:g}.{decay:g}.json"
        if not path.exists():
            told = f"{NAMES[kind]}, {layers} layers, rate {rate:g}, decay {decay:g}"
            model, _ = trained(kind, layers, CHOSEN_BY, data, told, (rate, decay))
            labelled.write(path, json.dumps(data.watched(lambda rows, model=model: scores(model, rows))))
        found[rate, decay] = json.loads(path.read_text())
    return max(found, key=lambda how: found[how])


def scores(model: Ranker, rows: planted.Arrays) -> Any:
    with torch.no_grad():
        inputs = (torch.from_numpy(a) for a in labelled.arrays(model.specs, rows).values())
        return model(*inputs)[:, 0].double().numpy()


def train(
    folder: Path,
    data: labelled.Data,
    layers: Sequence[int],
    seeds: Sequence[int],
    settings: Any,
    careful: bool,
    kinds: Sequence[str] = KINDS,
) -> None:
    """Trains what is not in the folder yet; with every DCNv2 an rDCN that starts from it, for one epoch."""
    labelled.claim(folder, settings)
    for seed in seeds:
        for depth in layers:
            for kind in kinds:
                path = folder / f"{kind}-{depth}-{seed}.json"
                if path.exists():
                    continue
                how = chosen(folder, kind, depth, data) if careful else None
                model, found = trained(kind, depth, seed, data, f"{NAMES[kind]}, {depth} layers, seed {seed}", how)
                found |= {"how": how} if how else {}
                if not careful and isinstance(model, DCNv2Stacked):
                    made = from_dcnv2(model).eval()
                    found["converted"] = data.auc(lambda rows, made=made: scores(made, rows))
                    continued(made, data, seed, 1, RATES["rdcn"] / 4, f"rDCN from it, {depth} layers, seed {seed}")
                    found["tuned"] = data.auc(lambda rows, made=made: scores(made, rows))
                labelled.write(path, json.dumps(found))
                print(f"{path.stem}: AUC {found['auc']:.4f}, {found['seconds']} s", flush=True)


# --- time ---------------------------------------------------------------------------------------------------------


def timed(layers: int, candidates: Sequence[int], seconds: float) -> dict[str, Any]:
    """Multiply-adds and times of DCNv2 as exported, of what `optimize` makes of it, and of rDCN, by candidates."""
    out: dict[str, Any] = {}
    for n in candidates:
        forms, found = {}, {}
        for kind in ("dcnv2", "rdcn"):
            model = build(kind, layers, TIMED)
            initialise(model, seed=0)
            made = onnxrank.optimize(export_torchscript(model, model.specs), spec=roles(model.specs), candidates=n)
            forms[kind] = made.model
            costs = made.report.after if made.changed else made.report.before
            found[kind] = {
                "request": costs["request"].macs,
                "candidate": costs["candidate"].macs / n,
                "rules": {use.name: use.sites for use in made.report.rules},
            }
            if kind == "dcnv2":
                forms["exported"] = export_torchscript(model, model.specs)
                found["exported"] = {"request": 0, "candidate": made.report.before["candidate"].macs / n}
        feed = sample(model.specs, n)
        rounds = np.median(interleave([_run(m, feed) for m in forms.values()], seconds).seconds, axis=2)
        by_form = dict(zip(forms, rounds, strict=True))
        for form, times in by_form.items():
            found[form]["milliseconds"] = 1e3 * float(np.median(times))
        for one, other in (("exported", "dcnv2"), ("exported", "rdcn"), ("dcnv2", "rdcn")):
            found[f"{one} over {other}"] = ratio(by_form[one], by_form[other])
        out[str(n)] = found
    return out


def _run(model: Any, feed: planted.Arrays) -> Any:
    session = runtime.session(model, optimise=True)
    given = {i.name: feed[i.name][:1] if i.shape[0] == 1 else feed[i.name] for i in session.get_inputs()}

    def run(_: int) -> float:
        begin = time.thread_time()
        session.run(None, given)
        return time.thread_time() - begin

    return run


def share(found: Mapping[str, Any], layers: int) -> float:
    """Share of the cross network's multiply-adds per candidate that rDCN leaves, the linear unit not counted."""
    width = (TIMED["user"] + TIMED["item"]) * TIMED["dim"]
    its = TIMED["item"] * TIMED["dim"]
    return float((found["rdcn"]["candidate"] - its) / (found["exported"]["candidate"] - width))


# --- what came of it ----------------------------------------------------------------------------------------------


def accuracy(folder: Path) -> dict[int, dict[str, list[float]]]:
    """AUCs by depth and kind, `tuned` and `converted` being of rDCNs that started from a DCNv2."""
    out: dict[int, dict[str, list[float]]] = {}
    for path in sorted(folder.glob("*-*-*.json")):
        kind, depth, _ = path.stem.split("-")
        found = json.loads(path.read_text())
        for name, key in ((kind, "auc"), ("converted", "converted"), ("tuned", "tuned")):
            if key in found:
                out.setdefault(int(depth), {}).setdefault(name, []).append(found[key])
    return out


def verdict(found: Mapping[str, Sequence[float]]) -> tuple[float, float, float, bool]:
    """What rDCN has over DCNv2, its standard deviation over seeds, by how many of it the control loses, and parity.

    The standard deviation is the larger of the two models'. Parity is claimed only where the control, which lacks the
    terms, is 20 of them below.
    """
    mean = {k: statistics.mean(v) for k, v in found.items()}
    sd = max(statistics.stdev(found[k]) for k in ("dcnv2", "rdcn"))
    lost = (min(mean["dcnv2"], mean["rdcn"]) - mean["control"]) / sd
    return mean["rdcn"] - mean["dcnv2"], sd, lost, abs(mean["rdcn"] - mean["dcnv2"]) < 2 * sd and lost > 20


def report(folder: Path) -> None:
    found = accuracy(folder)
    settings = json.loads((folder / "settings.json").read_text())
    best = settings["best"]
    print(f"AUC over seeds: mean (standard deviation){f'; Bayes {best:.4f}' if best else ''}\n")
    kinds = (*KINDS, "converted", "tuned")
    heads = "DCNv2 | rDCN | control | taken from DCNv2 | an epoch on | rDCN over DCNv2 | control below | parity | seeds"
    print(f"| layers | {heads} |\n|{'---|' * 10}")
    for depth, by_kind in sorted(found.items()):
        cells = [f"{statistics.mean(by_kind[k]):.4f} ({_sd(by_kind[k])})" if k in by_kind else "" for k in kinds]
        if all(len(by_kind.get(k, ())) > 1 for k in KINDS):
            more, sd, lost, parity = verdict(by_kind)
            cells += [f"{more:+.4f} ({more / sd:+.1f} sd; {_paired(by_kind)})", f"{lost:.0f} sd"]
            cells.append("yes" if parity else "no")
        else:
            cells += [""] * 3
        seeds = "/".join(str(len(by_kind.get(k, ()))) for k in kinds)
        print(f"| {depth} | {' | '.join([*cells, seeds])} |")
    if not (folder / "times.json").exists():
        return
    print("\n| layers | N | MACs: exported | optimised DCNv2 | rDCN | exported over optimised | over rDCN | "
          "optimised DCNv2 over rDCN |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for depth, by_n in json.loads((folder / "times.json").read_text()).items():
        for n, row in by_n.items():
            macs = (f"{row[f]['request'] / 1e3:.0f}k + N·{row[f]['candidate'] / 1e3:.0f}k" for f in _FORMS)
            pairs = ("exported over dcnv2", "exported over rdcn", "dcnv2 over rdcn")
            times = (f"{row[p][0]:.2f}× ({row[p][1]:.2f}, {row[p][2]:.2f})" for p in pairs)
            print(f"| {depth} | {n} | {' | '.join([*macs, *times])} |")
        least = next(iter(by_n.values()))
        print(f"\ncross network, {depth} layers: {1 - share(least, int(depth)):.1%} fewer per candidate in rDCN\n")


def _paired(found: Mapping[str, Sequence[float]]) -> str:
    """What rDCN has over DCNv2 seed by seed, which have rows and order in common, with the interval of its mean."""
    one, other = found["rdcn"], found["dcnv2"]
    if len(one) != len(other):
        return "other seeds"
    off = [a - b for a, b in zip(one, other, strict=True)]
    half = T95[min(len(off), max(T95))] * statistics.stdev(off) / len(off) ** 0.5
    return f"by pairs {statistics.mean(off) - half:+.4f} to {statistics.mean(off) + half:+.4f}"


T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t at 95 %, by the number of seeds."""


def _sd(values: Sequence[float]) -> str:
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 else "one seed"


_FORMS = ("exported", "dcnv2", "rdcn")


def figure(folder: Path, path: Path) -> None:
    """Time over the number of candidates, of the deepest cross network."""
    if not (folder / "times.json").exists():
        raise SystemExit(f"{folder} has no times.json: run `parity.py time {folder}` before the figure is drawn")
    depth, by_n = max(json.loads((folder / "times.json").read_text()).items(), key=lambda item: int(item[0]))
    named = {"exported": "third", "dcnv2": "first", "rdcn": "second"}
    words = {"exported": "DCNv2 as exported", "dcnv2": "DCNv2, optimised", "rdcn": "rDCN, optimised"}
    series = [
        charts.Series(words[f], style, [(int(n), *[row[f]["milliseconds"]] * 3) for n, row in by_n.items()])
        for f, style in named.items()
    ]
    chart = charts.curves(series, f"candidates, {depth} cross layers", lambda v: f"{v:g} ms")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(pictures.alone(chart, {style: words[f] for f, style in named.items()}), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    several = {name: commands.add_parser(name) for name in ("train", "time", "report")}
    for p in several.values():
        p.add_argument("folder", type=Path)
    for name in ("train", "time"):
        several[name].add_argument("--layers", type=int, nargs="+", default=[1, 2, 3])
    several["train"].add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    several["train"].add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    several["train"].add_argument(
        "--careful", action="store_true", help="choose rate and weight decay per model and depth, and stop early"
    )
    labelled.add_options(several["train"])
    several["time"].add_argument("--seconds", type=float, default=6.0, help="per depth and number of candidates")
    several["report"].add_argument("--figure", type=Path, metavar="SVG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "train":
        data = labelled.of_options(options, WORLD, REQUESTS)
        settings = {"data": str(options.data or "planted"), "best": data.best, "dim": DIM, "epochs": EPOCHS,
                    "rates": RATES, "requests": REQUESTS}  # fmt: skip
        if options.careful:
            settings |= {"epochs": CAREFUL_EPOCHS, "rates": GRID}
        train(options.folder, data, options.layers, options.seeds, settings, options.careful, options.kinds)
    elif options.command == "time":
        options.folder.mkdir(parents=True, exist_ok=True)
        times = {str(depth): timed(depth, CANDIDATES, options.seconds) for depth in options.layers}
        (options.folder / "times.json").write_text(json.dumps(times, indent=1))
    else:
        report(options.folder)
        if options.figure:
            figure(options.folder, options.figure)


if __name__ == "__main__":
    main()
