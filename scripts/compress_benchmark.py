"""The figures of docs/compress.md: trained models compressed, ways to lower a rank side by side, tables in 16 bits.

    python scripts/planted.py train trained/0 && python scripts/planted.py train trained/1 --seed 1 ...
    python scripts/compress_benchmark.py whole trained/0 trained/1 trained/2     # size and accuracy, by model and seed
    python scripts/compress_benchmark.py mlps trained/0                          # low rank alone
    python scripts/compress_benchmark.py finetune trained/0 --fewer 3.79 20      # low rank, and trained behind it
    python scripts/compress_benchmark.py latency trained/0                       # over the optimised models
    python scripts/compress_benchmark.py latency trained/0 --after --target 2    # the same, compressed before
    python scripts/compress_benchmark.py ranks trained/0/dcnv2_parallel.onnx     # ways to lower a rank, and int8
    python scripts/compress_benchmark.py tables models/onnx                      # fp16-tables on every model
    python scripts/compress_benchmark.py pack                                    # what does nothing, by optimize
    python scripts/compress_benchmark.py scale models/trained/dcnv2_parallel.onnx rows.parquet   # 10 million rows

All ratios of one row are measured in one run, models in turns on one thread, whose own time is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools
import json

import onnxrank
from models.spec import InputSpec, sample
from onnxrank import runtime
from onnxrank.compress import gate
from onnxrank.compress.casts import join_casts
from onnxrank.compress.engine import Options, Result, compress
from onnxrank.compress.low_rank import factor, subspace
from onnxrank.compress.methods import METHODS
from onnxrank.compress.plan import Plan, Step, Tuning
from onnxrank.compress.sites import named, parts
from onnxrank.compress.statistics import Fitted, Moments, Statistics, reduced_rank
from onnxrank.model import load
from onnxrank.network import Layer, Network
from onnxrank.packing import pack
from onnxrank.roles import load_spec
from onnxrank.turns import interleave, ratio
from onnxrank.verify.ranking import order
from scripts import planted

TASKS = {"mmoe": 2}
MLPS = ("deep", "top", "mlp", "experts")
"""Parts of the names of layers that are an MLP's."""
Floats = NDArray[np.float64]


def specs_of(path: Path) -> list[InputSpec]:
    """Inputs of an exported model, ranges from the roles file beside it."""
    roles = yaml.safe_load(roles_file(path).read_text())["inputs"]
    model = onnx.load(path, load_external_data=False)
    out = []
    for i in model.graph.input:
        kind, role = i.type.tensor_type, roles.get(i.name, {})
        shape = ("N", *(d.dim_value for d in kind.shape.dim[1:]))
        low, high = role.get("range", [0, 1])
        level = "mixed" if "request" in role else role.get("level", "candidate")
        ranges = tuple((k, a, b) for k, (a, b) in role.get("ranges", {}).items())
        out.append(
            InputSpec(i.name, "int64" if kind.elem_type == 7 else "float32", shape, level, low, high,
                      role.get("request"), ranges)
        )  # fmt: skip
    return out


def roles_file(path: Path) -> Path:
    return path.with_name(path.name.split(".")[0] + ".roles.yaml")


def models(folder: Path, names: str) -> list[Path]:
    """The models of a folder whose files match a pattern."""
    return [p for p in sorted(folder.glob(names)) if p.suffix == ".onnx"]


def requests(path: Path, folder: Path, count: int, seed: int) -> tuple[Path, tuple[str, ...]]:
    """Recorded requests of a trained model, and the names of its labels."""
    tasks = TASKS.get(path.stem, 1)
    specs = specs_of(path)
    world = planted.world_of(specs, tasks=2)
    out = folder / f"{path.stem}.{seed}.parquet"
    if not out.exists():
        planted.write_requests(out, specs, count, 32, seed, world.seed)
    return out, tuple(f"label_{t}" for t in range(tasks)) if tasks > 1 else ("label",)


# --- whole models -------------------------------------------------------------------------------------------------


def row(result: Result) -> str:
    report = result.report
    last = report.points[-1]
    aucs = [c for o in report.outcomes if (c := o.criterion("auc")) is not None]
    kept = [c for o in report.outcomes if (c := o.criterion("overlap")) is not None]
    low = min((c.low for c in aucs), default=math.nan)
    value = min((c.value for c in aucs), default=math.nan)
    speed = last.speed
    assert speed is not None
    weights = report.points[0].parameters / last.parameters
    fast = f"{speed.ratio:.2f}x ({speed.low:.2f}, {speed.high:.2f})"
    cells = [f"{report.ratios['size']:.2f}x", f"{weights:.2f}x", f"{value:+.5f} ({low:+.5f})"]
    return " | ".join([*cells, f"{min(c.value for c in kept):.4f}", fast, report.verdict])


def whole(folders: list[Path], count: int, sequential: bool, names: str) -> None:
    """Size by 3 or more with the loss of the default."""
    print("| model, seed | size | weights | AUC (lower end) | top 10 | faster | gate |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as where:
        for seed, folder in enumerate(folders):
            for path in models(folder, names):
                data, labels = requests(path, Path(where), count, 500 + seed)
                options = Options(size=3.0, labels=labels, choice=16384, sequential=sequential)
                result = compress(path, data, options, spec=load_spec(str(roles_file(path))))
                print(f"| {path.stem}, {seed} | {row(result)} |", flush=True)


def mlps(folders: list[Path], count: int, names: str) -> None:
    """Low rank alone, in the layers of MLPs behind the first one, until what may be lost is used up."""
    print("| model, seed | weights of these layers | AUC (lower end) | top 10 | faster | gate |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as where:
        for seed, folder in enumerate(folders):
            for path in models(folder, names):
                several = [p for p in Network(onnx.load(path)).products() if min(p.shape) >= 100]
                sites = [p for p in several if p.shape[0] == max(q.shape[0] for q in several)]
                data, labels = requests(path, Path(where), count, 500 + seed)
                own = tuple(p.name for p in sites)
                options = Options(size=99.0, labels=labels, choice=16384, methods=("low-rank",), sites=own)
                result = compress(path, data, options, spec=load_spec(str(roles_file(path))))
                plan = result.report.plan
                assert plan is not None
                places = named(Network(onnx.load(path)))
                done = {part for name in plan.by_site for part in parts(places[name])}
                left = sum(math.prod(p.shape) for p in sites if p.name not in done)
                left += sum(s.chain[0][1] * sum(places[name].shape) for name, s in plan.by_site.items())
                less = sum(math.prod(p.shape) for p in sites) / left
                shapes = ", ".join(f"{a} x {b}" for a, b in (p.shape for p in sites))
                cells = row(result).split(" | ")[2:]
                print(f"| {path.stem}, {seed} ({shapes}) | {less:.2f}x fewer | {' | '.join(cells)} |", flush=True)


WAYS = ("fitted", "trained", "relu")


def finetune(
    folders: list[Path], count: int, fewer: list[float], epochs: int, sequential: bool, names: str, ways: list[str]
) -> None:
    """The same layers with so many fewer weights: as they are fitted, trained, and trained with a ReLU between."""
    print("| model, seed | fewer | how | AUC (lower, upper end) | log loss | top 10 | gate |")
    print("|---|---|---|---|---|---|---|")
    tunings = {"fitted": None, "trained": Tuning(epochs), "relu": Tuning(epochs, relu=True)}
    with tempfile.TemporaryDirectory() as where:
        for seed, folder in enumerate(folders):
            for path in models(folder, names):
                net = Network(onnx.load(path))
                pack(net)
                several = [p for p in net.products() if min(p.shape) >= 32 and any(m in p.name for m in MLPS)]
                data, labels = requests(path, Path(where), count, 500 + seed)
                sha = load(path).sha256
                for share, how in itertools.product(fewer, ways):
                    ranks = {p.name: max(1, int(math.prod(p.shape) / share / sum(p.shape))) for p in several}
                    steps = tuple(Step(name, (("low-rank", k),)) for name, k in ranks.items())
                    plan = Plan(sha, steps, pack=True, sequential=sequential, finetune=tunings[how])
                    options = Options(labels=labels, choice=16384, seconds=0.1, plan=plan)
                    report = compress(path, data, options, spec=load_spec(str(roles_file(path)))).report
                    several_found = [{c.name: c for c in o.criteria} for o in report.outcomes]
                    c = min(several_found, key=lambda f: f["auc"].low)
                    auc, lost = c["auc"], c["log_loss"]
                    interval = f"{auc.value:+.5f} ({auc.low:+.5f}, {auc.high:+.5f})"
                    print(
                        f"| {path.stem}, {seed} | {share:g}x | {how} | {interval} | {lost.value:+.5f} "
                        f"| {c['overlap'].value:.4f} | {report.verdict} |",
                        flush=True,
                    )


def latency(folders: list[Path], count: int, names: str, target: float, after: bool) -> None:
    """Time over the optimised model at N = 512: the optimised model compressed, or what is compressed optimised."""
    print("| model, seed | optimised over original | size | weights | AUC (lower end) | top 10 | faster | gate |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as where:
        for seed, folder in enumerate(folders):
            for path in models(folder, names):
                data, labels = requests(path, Path(where), count, 500 + seed)
                how: dict[str, Any] = {"spec": load_spec(str(roles_file(path)))}
                fast = onnxrank.optimize(path, candidates=512, **how)
                place = Path(where) / f"{path.stem}.{seed}.fast.onnx"
                fast.save(place)
                options = Options(latency=target, labels=labels, choice=16384, seconds=1.0)
                result = compress(path, data, options, **how) if after else compress(place, data, options)
                feed = sample(specs_of(path), 512)
                before = times(onnx.load(path), fast.model, feed)
                size, weights, auc, kept, faster, verdict = row(result).split(" | ")
                if after:
                    made = onnxrank.optimize(result.model, candidates=512, **how).model
                    speed = times(fast.model, made, feed)
                    faster = f"{speed[0]:.2f}x ({speed[1]:.2f}, {speed[2]:.2f})"
                cells = " | ".join([size, weights, auc, kept, faster, verdict])
                print(f"| {path.stem}, {seed} | {before[0]:.2f}x | {cells} |", flush=True)


def times(one: ModelProto, other: ModelProto, feed: dict[str, Any], seconds: float = 2.0) -> tuple[float, float, float]:
    """Time of one model over that of the other, and the ends of its interval; one row of what the other takes once."""
    runs = []
    for model in (one, other):
        made = runtime.session(model, optimise=True)
        first = {i.name: i.shape[0] for i in made.get_inputs()}
        given = {k: v[:1] if first[k] == 1 else v for k, v in feed.items() if k in first}

        def run(_: int, made: Any = made, given: Any = given) -> float:
            import time

            start = time.thread_time()
            made.run(None, given)
            return time.thread_time() - start

        runs.append(run)
    first_turns, second_turns = np.median(interleave(runs, seconds).seconds, axis=2)
    return ratio(first_turns, second_turns)


# --- ways to lower a rank -----------------------------------------------------------------------------------------


def seen(model: ModelProto, feed: dict[str, Any], names: list[str]) -> dict[str, NDArray[Any]]:
    shown = ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names)
    return runtime.run(runtime.session(shown), feed, names)


def factored(net: Network, site: Layer, how: str, rank: int, x: Floats, right: Floats) -> None:
    """Lowers the rank of a layer in one of the ways that there are.

    Args:
        net: The model, whose earlier layers were changed before.
        site: The layer.
        how: The way.
        rank: The rank.
        x: What it sees, `[R, inputs]`; in the original, but for `sequential`.
        right: The product that it should give, `[R, outputs]`.
    """
    weight = net.matrix(site).astype(np.float64)
    none = np.zeros(site.shape[1])
    if how == "AFM":
        y = Moments.of(right)
        basis = subspace(y)[1][:, :rank]
        factor(net, site, Fitted(rank, weight @ basis, basis.T, y.mean - basis @ (basis.T @ y.mean)), how)
    elif how == "sequential":
        factor(net, site, reduced_rank(Moments.of(x), x.T @ right, Moments.of(right), rank), how)
    else:
        gram = x.T @ x / len(x)
        if how == "SVD":
            scale = np.eye(len(weight))
        elif how == "ASVD":  # inputs scaled by their mean magnitude to the half
            scale = np.diag(np.maximum(np.abs(x).mean(0), 1e-6) ** 0.5)
        else:  # SVD-LLM: whitened by the Cholesky factor, the mean left in
            scale = np.linalg.cholesky(gram + 1e-6 * np.trace(gram) / len(gram) * np.eye(len(gram)))
        left = scale if how == "ASVD" else scale.T
        u, s, vt = np.linalg.svd(left @ weight, full_matrices=False)
        first = np.linalg.solve(left, u[:, :rank] * s[:rank])
        factor(net, site, Fitted(rank, first, vt[:rank], none), how)


def ranks(path: Path, count: int, least: int) -> None:
    """All ways at equal size, next to int8."""
    specs = specs_of(path)
    world = planted.world_of(specs)
    calibration = world.requests(256, 32, seed=700)
    held = world.requests(count, 32, seed=701)
    feed, test = planted.feed(specs, calibration), planted.feed(specs, held)
    base = Network(onnx.load(path))
    pack(base)
    model = base.finished()
    output = model.graph.output[0].name
    sites = [p for p in base.products() if min(p.shape) >= least]
    print(f"{path.name}: {len(sites)} layers: {', '.join(f'{a} x {b}' for a, b in (p.shape for p in sites))}")
    print(f"{256 * 32} rows for calibration, {len(held['label_0'])} for the test")

    def scores(made: ModelProto) -> Floats:
        return runtime.run(runtime.session(made, optimise=True), test, [output])[output][:, 0].astype(np.float64)

    before = scores(model)
    _, request = np.unique(held["request_id"], return_inverse=True)
    labels = held["label_0"].astype(np.float64)
    inputs = {p.name: p.inputs[0] for p in sites}
    original = seen(model, feed, list(dict.fromkeys(inputs.values())))
    products = {p.name: original[inputs[p.name]].astype(np.float64) @ base.matrix(p) for p in sites}
    whole = sum(a * b for a, b in (p.shape for p in sites))
    print("\n| way | bytes of these layers | rank | logits | AUC (95 %) | top 10 |\n|---|---|---|---|---|---|")

    def show(how: str, made: ModelProto, size: float, rank: str) -> None:
        found = gate.judge(gate.Scores(before, scores(made), request, labels), gate.Limits(level=0.95))
        if not found.criteria:
            print(f"| {how} | {size:.3f} | {rank} | {' '.join(found.reasons)} | | |")
            return
        c = {k.name: k for k in found.criteria}
        auc = c["auc"]
        print(
            f"| {how} | {size:.3f} | {rank} | {c['logit_rmse'].value:.4f} | {auc.value:+.5f} ({auc.low:+.5f}, "
            f"{auc.high:+.5f}) | {c['overlap'].value:.4f} |",
            flush=True,
        )

    net = base.copy()
    for p in [q for q in net.products() if q.name in inputs]:
        METHODS["int8"].apply(net, p, 0, Statistics())
    show("int8", net.finished(), 0.25, "")
    for share in (0.5, 0.25, 0.125):
        for how in ("SVD", "ASVD", "SVD-LLM", "AFM", "AFM, one basis", "sequential"):
            net = base.copy()
            used, size = [], 0
            together = [j for j in net.joints(least) if "one basis" in how and j.wide]
            shared = {p.name for j in together for p in j.members}
            for p in [*together, *(q for q in net.products() if q.name in inputs and q.name not in shared)]:
                rank = max(1, round(share * p.shape[0] * p.shape[1] / sum(p.shape)))
                used.append(rank)
                size += rank * sum(p.shape)
                x = original[p.inputs[0]]
                if how == "sequential":
                    x = seen(net.finished(), feed, [p.inputs[0]])[p.inputs[0]]
                right = np.concatenate([products[q.name] for q in p.members], axis=1)
                factored(net, p, how.split(",")[0], rank, x.astype(np.float64), right)
            show(how, net.finished(), size / whole, "/".join(map(str, dict.fromkeys(used))))


# --- tables in 16 bits --------------------------------------------------------------------------------------------


def tables(folder: Path, seconds: float, requests: int) -> None:
    """fp16-tables on every model: bytes, order and time."""
    print("| model | table bytes | top 10 overlap | time of the original over its |\n|---|---|---|---|")
    worst_overlap, found_times = 1.0, []
    for path in sorted(folder.glob("*.onnx")):
        specs = specs_of(path)
        model = onnx.load(path)
        net = Network(model)
        sites = net.tables()
        if not sites:
            print(f"| {path.stem} | no table is looked up | | |")
            continue
        size = sum(a * b for a, b in (t.shape for t in sites))
        for t in sites:
            METHODS["fp16-tables"].apply(net, t, 0, Statistics())
        join_casts(net)
        made = net.finished()
        kept = [t for t in made.graph.initializer if t.data_type == 10]
        shares = []
        one, other = (runtime.session(m, optimise=True) for m in (model, made))
        for seed in range(requests):
            feed = sample(specs, 64, seed)
            for a, b in zip(one.run(None, feed), other.run(None, feed), strict=True):
                for before, after in zip(a.reshape(64, -1).T, b.reshape(64, -1).T, strict=True):
                    shares.append(order(before, after, 1e-6 * float(np.ptp(before)), 10).overlap)
        speed = times(model, made, sample(specs, 512), seconds)
        found_times.append(speed[0])
        worst_overlap = min(worst_overlap, float(np.mean(shares)))
        bytes_ratio = sum(math.prod(t.dims) for t in kept) * 2 / (4 * size)
        print(
            f"| {path.stem} | {bytes_ratio:.2f} | {np.mean(shares):.4f} | {speed[0]:.2f} ({speed[1]:.2f}, "
            f"{speed[2]:.2f}) |",
            flush=True,
        )
    print(
        f"\nleast overlap {worst_overlap:.4f}; time ratio: least {min(found_times):.2f}, median "
        f"{np.median(found_times):.2f}"
    )


# --- packing ------------------------------------------------------------------------------------------------------


def masked() -> Iterator[tuple[str, ModelProto]]:
    """MLPs with half the units of every layer masked, as structured training leaves them."""
    rng = np.random.default_rng(0)
    for name, sizes in (("128-512-512-256", (128, 512, 512, 256)), ("256-1024-512", (256, 1024, 512))):
        nodes, held = [], []
        x = "x"
        for k, (a, b) in enumerate(itertools.pairwise(sizes)):
            weight = (rng.normal(size=(a, b)) / math.sqrt(a)).astype(np.float32)
            bias = (0.1 * rng.normal(size=b)).astype(np.float32)
            weight[:, rng.permutation(b)[: b // 2]] = 0
            bias[~weight.any(0)] = 0
            held += [numpy_helper.from_array(weight, f"W{k}"), numpy_helper.from_array(bias, f"b{k}")]
            nodes += [
                helper.make_node("Gemm", [x, f"W{k}", f"b{k}"], [f"h{k}"], f"layer {k}"),
                helper.make_node("Relu", [f"h{k}"], [f"r{k}"]),
            ]
            x = f"r{k}"
        last = (rng.normal(size=(sizes[-1], 1)) / math.sqrt(sizes[-1])).astype(np.float32)
        held.append(numpy_helper.from_array(last, "H"))
        nodes.append(helper.make_node("MatMul", [x, "H"], ["y"], "head"))
        graph = helper.make_graph(
            nodes, "masked", [helper.make_tensor_value_info("x", 1, ["N", sizes[0]])],
            [helper.make_tensor_value_info("y", 1, ["N", 1])], held,
        )  # fmt: skip
        yield name, helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def packed() -> None:
    """Half the units masked, and weights that weight decay has left; by `optimize`, with that rule and without."""
    print("| model | weights left | largest difference | faster |\n|---|---|---|---|")
    for name, model in masked():
        how: dict[str, Any] = {"request": ["x[0:64]"], "interface": "same", "guard": False}
        made = onnxrank.optimize(model, select=["pack"], **how).model
        width = model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
        x = np.random.default_rng(1).normal(size=(512, width)).astype(np.float32)
        x[:, :64] = x[0, :64]
        pack_row(f"{name}, half its units masked", model, made, {"x": x})
    for path in sorted((Path(__file__).resolve().parents[1] / "models" / "trained").glob("*.onnx")):
        how = {"spec": load_spec(str(roles_file(path))), "interface": "same", "guard": False}
        without, made = (onnxrank.optimize(path, ignore=left, **how).model for left in (["pack"], []))
        pack_row(f"{path.stem} of models/trained, optimised", without, made, sample(specs_of(path), 512))


def pack_row(name: str, model: ModelProto, made: ModelProto, feed: dict[str, Any]) -> None:
    output = model.graph.output[0].name
    a, b = (runtime.run(runtime.session(m), feed)[output] for m in (model, made))
    sizes = [sum(math.prod(t.dims) for t in m.graph.initializer) for m in (model, made)]
    speed = times(model, made, feed)
    fast = f"{speed[0]:.2f}x ({speed[1]:.2f}, {speed[2]:.2f})"
    print(f"| {name} | {sizes[1] / sizes[0]:.2f} | {np.abs(a - b).max():.1e} | {fast} |", flush=True)


# --- many rows ----------------------------------------------------------------------------------------------------


def processes_of(root: int) -> list[int]:
    """A process and those that it started, by number."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = []
    for pid in parents:
        up = pid
        while up not in (root, 0, 1) and up in parents:
            up = parents[up]
        if up == root:
            found.append(pid)
    return found


def memory(pid: int, file: str, field: str) -> int:
    """Bytes that the system says a process holds: `Pss` of `smaps_rollup`, `VmHWM` of `status`; 0 once it has ended."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        return sum(int(x.split()[1]) << 10 for x in lines if x.startswith(f"{field}:"))
    return 0


def scale(path: Path, rows: int, data: Path) -> None:
    """Compresses by so many rows, and tells time and memory of all processes."""
    import subprocess
    import time

    if not data.exists():
        planted.write_requests(data, specs_of(path), rows // 32, 32, 900, 0)
    start, most = time.monotonic(), 0
    peaks: dict[int, int] = {}
    with tempfile.TemporaryDirectory() as where:
        report = Path(where) / "report.json"
        command = [sys.executable, "-m", "onnxrank.cli", "compress", str(path), str(Path(where) / "out.onnx"), "--data",
                   str(data), "--labels", "label", "--size", "2x", "--report", str(report), "-q"]  # fmt: skip
        process = subprocess.Popen(command)
        while process.poll() is None:
            alive = processes_of(process.pid)
            most = max(most, sum(memory(pid, "smaps_rollup", "Pss") for pid in alive))
            peaks.update({pid: peak for pid in alive if (peak := memory(pid, "status", "VmHWM"))})
            time.sleep(0.5)
        found = json.loads(report.read_text())
    size = data.stat().st_size / 1e6
    print(
        f"{found['rows']} rows, {size:.0f} MB of Parquet: {found['verdict']}, {found['reached']['size']:.2f}x smaller"
    )
    print(
        f"{time.monotonic() - start:.0f} s, at most {most / 1e9:.2f} GB in all processes at a time; the peaks of all "
        f"{len(peaks)} processes come to {sum(peaks.values()) / 1e9:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("whole", "latency", "mlps", "finetune"):
        p = commands.add_parser(name)
        p.add_argument("folders", nargs="+", type=Path)
        p.add_argument("--requests", type=int, default=6000)
        p.add_argument("--names", default="*.onnx", help="pattern on the models' files")
        if name == "whole":
            p.add_argument("--sequential", action="store_true")
    p = commands.choices["latency"]
    p.add_argument("--target", type=float, default=1.5, help="how many times faster `compress` is to make a model")
    p.add_argument("--after", action="store_true", help="compress the model as exported, and optimise what comes of it")
    p = commands.choices["finetune"]
    p.add_argument("--fewer", nargs="+", type=float, default=[3.79], help="how many times fewer weights")
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--sequential", action="store_true", help="fit layers to what they see before they are trained")
    p.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    p = commands.add_parser("ranks")
    p.add_argument("model", type=Path)
    p.add_argument("--requests", type=int, default=3000)
    p.add_argument("--least", type=int, default=100, help="smaller side of the layers that are changed")
    p = commands.add_parser("tables")
    p.add_argument("folder", type=Path)
    p.add_argument("--seconds", type=float, default=1.0)
    p.add_argument("--requests", type=int, default=200)
    commands.add_parser("pack")
    p = commands.add_parser("scale")
    p.add_argument("model", type=Path)
    p.add_argument("data", type=Path, help="Parquet; made if it is not there")
    p.add_argument("--rows", type=int, default=10_000_000)
    args = parser.parse_args()
    if args.command == "whole":
        whole(args.folders, args.requests, args.sequential, args.names)
    elif args.command == "mlps":
        mlps(args.folders, args.requests, args.names)
    elif args.command == "finetune":
        finetune(args.folders, args.requests, args.fewer, args.epochs, args.sequential, args.names, args.ways)
    elif args.command == "latency":
        latency(args.folders, args.requests, args.names, args.target, args.after)
    elif args.command == "ranks":
        ranks(args.model, args.requests, args.least)
    elif args.command == "tables":
        tables(args.folder, args.seconds, args.requests)
    elif args.command == "scale":
        scale(args.model, args.rows, args.data)
    else:
        packed()


if __name__ == "__main__":
    main()
