"""Training with a tenth of the weights: accuracy by kind of mask, and what masks are worth when the model runs.

    python scripts/sparse_training.py train out       # 7 models for each of 5 seeds, a file each: no run is made twice
    python scripts/sparse_training.py measure out     # bytes, memory and time before and after packing
    python scripts/sparse_training.py report out --figure scripts/figures/sparse_training.svg

    python scripts/sparse_training.py train mine --data rows.parquet --request 'user_*' --label click --seeds 0

The model is an MLP over embeddings, with masks on tables and hidden layers: dense; pruned by magnitude after training,
and trained for another epoch then; a random mask that stays; and dynamic masks (`models/sparse_training.py`).
`structure` keeps 3 of 32 entries of every row of a table, and whole units; `entries` any weights, in the same number.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.dcn import DCNv2Stacked
from models.layers import Ranker
from models.sparse_training import Entries, Rows, SparseTraining, Target, Units, unit_share
from models.spec import sample
from models.training import fit, settle
from onnxrank import charts, runtime
from onnxrank.compress.method import Refused
from onnxrank.compress.methods import METHODS
from onnxrank.compress.statistics import Statistics
from onnxrank.network import Network
from onnxrank.packing import pack
from onnxrank.turns import interleave, ratio
from scripts import labelled, pictures, planted

WORLD = planted.World(vocab=200, users=3, items=4, tasks=1, unseen=0.0)
DIM, HIDDEN, DENSITY = 32, (128, 128), 0.1
REQUESTS, EPOCHS, RATE, EVERY = 8_000, 2, 8e-3, 10
MASKS = ("structure", "entries")
WAYS = ("dense", *(f"{way} {kind}" for kind in MASKS for way in ("pruned", "retrained", "static", "dynamic")))
LONG = 200
"""Copies of the rows of every table in the model that is measured, which has 40,000 ids per field then."""


def build(sizes: dict[str, int]) -> Ranker:
    """An MLP over the embeddings of all fields."""
    model = DCNv2Stacked(hidden=HIDDEN, layers=0, dim=DIM, **sizes)
    settle(model)
    return model


def targets(model: Ranker, kind: str) -> list[Target]:
    """What is masked, a tenth of it kept."""
    tables = [part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    layers = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    if kind == "entries":
        return [Entries(p, DENSITY) for p in (*tables, *(layer.weight for layer in layers[:-1]))]
    share = unit_share([layers[0].in_features, *(layer.out_features for layer in layers)], DENSITY)
    return [
        *(Rows(t, DENSITY) for t in tables),
        *(Units(a, b, share) for a, b in pairwise(layers)),
    ]


def trained(way: str, model: Ranker, seed: int, data: labelled.Data, checkpoint: Path | None = None) -> list[Target]:
    """Trains a model in one of the ways; `pruned` and `retrained` take a dense one that is there."""
    how, _, kind = way.partition(" ")
    masks = targets(model, kind) if kind else []
    if how in ("pruned", "retrained"):
        for mask in masks:
            mask.prune()
    if how == "pruned":
        return masks
    rows = data.training(seed)
    inputs = [torch.from_numpy(a) for a in labelled.arrays(model.specs, rows).values()]
    labels = torch.from_numpy(rows["label_0"].astype(np.float32))[:, None]

    def wrap(optimiser: torch.optim.Optimizer, steps: int) -> Any:
        again = how == "retrained"
        every = EVERY if how == "dynamic" else 0
        return SparseTraining(optimiser, masks, steps, every=every, seed=seed, draw=not again)

    epochs, rate = (1, RATE / 4) if how == "retrained" else (EPOCHS, RATE)
    told = f"{way}, seed {seed}"
    fit(model, inputs, labels, epochs=epochs, seed=seed, rate=rate, wrap=wrap, checkpoint=checkpoint, told=told)
    for mask in masks:
        mask.finish()
    return masks


def train(folder: Path, data: labelled.Data, seeds: Sequence[int], settings: Any) -> None:
    """Trains what is not in the folder yet."""
    labelled.claim(folder, settings)
    for seed in seeds:
        for way in WAYS:
            path = folder / f"{way.replace(' ', '-')}.{seed}.json"
            if path.exists():
                continue
            torch.manual_seed(seed)
            model = build(data.sizes)
            dense = folder / f"dense.{seed}.pt"
            if way.startswith(("pruned", "retrained")):
                model.load_state_dict(torch.load(dense, weights_only=True))
            begin = time.process_time()
            checkpoint = path.with_suffix(".checkpoint")
            masks = trained(way, model, seed, data, checkpoint)
            model.eval()
            kept = sum(int((p != 0).sum()) for p in model.parameters() if p.dim() > 1)
            whole = sum(p.numel() for p in model.parameters() if p.dim() > 1)
            found = {"auc": data.auc(lambda rows, model=model: scores(model, rows)), "weights": kept / whole}
            if way == "dense":
                torch.save(model.state_dict(), dense)
            if seed == seeds[0] and (way == "dense" or masks):
                planted.export(model, model.specs, folder / f"{path.name.split('.')[0]}.onnx")
            labelled.write(path, json.dumps({**found, "seconds": round(time.process_time() - begin, 1)}))
            checkpoint.unlink(missing_ok=True)
            print(f"{way}, seed {seed}: AUC {found['auc']:.4f} with {found['weights']:.1%} of the weights", flush=True)


def scores(model: Ranker, rows: planted.Arrays) -> Any:
    with torch.no_grad():
        inputs = (torch.from_numpy(a) for a in labelled.arrays(model.specs, rows).values())
        return model(*inputs)[:, 0].double().numpy()


# --- what it is worth ---------------------------------------------------------------------------------------------


def measure(folder: Path, candidates: int, seconds: float) -> None:
    """Bytes, memory and time of the dense model and of one with masks of either kind, before and after packing."""
    torch.manual_seed(0)
    feed = sample(build(WORLD_SIZES).specs, candidates)
    files = {}
    for name in ("dense", "dynamic-structure", "pruned-entries"):
        path = folder / f"{name}.long.onnx"
        _lengthened(folder / f"{name}.onnx", path)
        files[name] = path
        if name != "dense":
            files[f"{name}, packed"] = _compressed(path)
    found: dict[str, Any] = {}
    runs = [_run(path, feed) for path in files.values()]
    rounds = np.median(interleave(runs, seconds).seconds, axis=2)
    for (name, path), times in zip(files.items(), rounds, strict=True):
        found[name] = {
            "bytes": path.stat().st_size,
            "off": float(np.abs(_scores(path, feed) - _scores(Path(str(path).replace(".packed", "")), feed)).max()),
            "memory": resident(path, feed, folder),
            "milliseconds": 1e3 * float(np.median(times)),
            "faster": ratio(rounds[0], times),
        }
    (folder / "measured.json").write_text(json.dumps(found, indent=1))


WORLD_SIZES = labelled.Planted(WORLD, REQUESTS).sizes


def _lengthened(path: Path, out: Path) -> None:
    """Repeats the rows of all tables: the same scores, with tables as long as real ones."""
    model = onnx.load(path)
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for t in model.graph.initializer:
        if t.name in tables and len(t.dims) == 2:
            t.CopyFrom(numpy_helper.from_array(np.tile(numpy_helper.to_array(t), (LONG, 1)), t.name))
    onnx.save(model, out)
    out.with_suffix("").with_suffix(".roles.yaml").write_text(path.with_suffix(".roles.yaml").read_text())


def _compressed(path: Path) -> Path:
    """What `compress --methods pack,sparse-tables` makes of a model; both keep the scores, so no gate is asked."""
    net = Network(onnx.load(path))
    pack(net)
    method = METHODS["sparse-tables"]
    for table in net.tables():
        with contextlib.suppress(Refused):
            (kept,) = method.offers(net, table, Statistics())
            method.apply(net, table, kept, Statistics())
    out = path.with_suffix(".packed.onnx")
    onnx.save(net.finished(), out)
    return out


def resident(path: Path, feed: planted.Arrays, folder: Path) -> int:
    """Bytes that a process holds more with the model loaded and run than without, by the system's count."""
    held = folder / "feed.npz"
    np.savez(held, **feed)
    child = (
        "import sys, numpy, onnxruntime as o\n"
        "def held(): return [int(x.split()[1]) for x in open('/proc/self/status') if x.startswith('VmRSS')][0] << 10\n"
        "options = o.SessionOptions(); options.intra_op_num_threads = 1; options.log_severity_level = 4\n"
        "feed = dict(numpy.load(sys.argv[2]))\n"
        "before = held()\n"
        "s = o.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        "s.run(None, {i.name: feed[i.name] for i in s.get_inputs()})\n"
        "print(held() - before)\n"
    )
    command = [sys.executable, "-c", child, str(path), str(held)]
    return int(statistics.median(int(subprocess.check_output(command, text=True)) for _ in range(3)))


def _scores(path: Path, feed: planted.Arrays) -> Any:
    return runtime.run(runtime.session(onnx.load(path)), feed)["score"]


def _run(path: Path, feed: planted.Arrays) -> Callable[[int], float]:
    session = runtime.session(onnx.load(path), optimise=True)
    given = {i.name: feed[i.name] for i in session.get_inputs()}

    def run(_: int) -> float:
        begin = time.thread_time()
        session.run(None, given)
        return time.thread_time() - begin

    return run


# --- what came of it ----------------------------------------------------------------------------------------------


def accuracy(folder: Path) -> dict[str, list[dict[str, float]]]:
    """What was found of every seed, by the way of training."""
    found = {}
    for way in WAYS:
        several = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{way.replace(' ', '-')}.*.json"))]
        if several:
            found[way] = several
    return found


def report(folder: Path) -> None:
    best = json.loads((folder / "settings.json").read_text())["best"]
    found = accuracy(folder)
    dense = statistics.mean(f["auc"] for f in found["dense"])
    print(f"AUC, mean over seeds (standard deviation){f'; Bayes {best:.4f}' if best else ''}\n")
    print("| training | weights | AUC | against dense | seeds |\n|---|---|---|---|---|")
    for way, several in found.items():
        aucs = [f["auc"] for f in several]
        sd = f" ({statistics.stdev(aucs):.4f})" if len(aucs) > 1 else ""
        mean = statistics.mean(aucs)
        print(f"| {way} | {several[0]['weights']:.1%} | {mean:.4f}{sd} | {mean - dense:+.4f} | {len(aucs)} |")
    if (folder / "measured.json").exists():
        print("\n| model | file | memory | time | dense over it |\n|---|---|---|---|---|")
        for name, row in json.loads((folder / "measured.json").read_text()).items():
            fast = "{:.2f}× ({:.2f}, {:.2f})".format(*row["faster"])
            print(f"| {name} | {row['bytes'] / 1e6:.2f} MB | {row['memory'] / 1e6:.1f} MB | "
                  f"{row['milliseconds']:.2f} ms | {fast} |")  # fmt: skip


def figure(folder: Path, path: Path) -> None:
    """What every way of training loses against the dense model."""
    found = accuracy(folder)
    mean = {way: statistics.mean(f["auc"] for f in several) for way, several in found.items()}
    rows = []
    for way, value in mean.items():
        if way != "dense":
            lost = mean["dense"] - value
            style = "second" if way.startswith("dynamic") else "first"
            rows.append(charts.Bar(way, [(style, max(lost, 0.0), f"{way}: {lost:.4f}")], f"{lost:.4f}"))
    path.write_text(pictures.alone(charts.bars([("AUC lost at a tenth of the weights", rows)])), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    several = {name: commands.add_parser(name) for name in ("train", "measure", "report")}
    for p in several.values():
        p.add_argument("folder", type=Path)
    several["train"].add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    labelled.add_options(several["train"])
    several["measure"].add_argument("--candidates", type=int, default=512)
    several["measure"].add_argument("--seconds", type=float, default=6.0)
    several["report"].add_argument("--figure", type=Path, metavar="SVG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.command == "train":
        data = labelled.of_options(options, WORLD, REQUESTS)
        settings = {"data": str(options.data or "planted"), "best": data.best, "density": DENSITY, "dim": DIM,
                    "hidden": HIDDEN, "requests": REQUESTS, "epochs": EPOCHS, "rate": RATE,
                    "every": EVERY}  # fmt: skip
        train(options.folder, data, options.seeds, settings)
    elif options.command == "measure":
        measure(options.folder, options.candidates, options.seconds)
    else:
        report(options.folder)
        if options.figure:
            figure(options.folder, options.figure)


if __name__ == "__main__":
    main()
