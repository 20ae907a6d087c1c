"""Labelled requests of a world whose best possible scores are known, and models of models/ trained on them.

A request's user and candidates have ids by Zipf's law, a history, and dense features. The logit of a click is planted:
terms of the user alone and of the item alone, context x candidate, context x context x candidate,
context x candidate x candidate, and the candidate against the history. Labels are drawn from it, so that the AUC of the
planted probabilities themselves, Bayes AUC, bounds that of any model.

    python scripts/planted.py requests out.parquet --model dlrm --requests 2000      # labelled requests of a model
    python scripts/planted.py train out --names dcnv2_parallel dlrm                  # trained, exported, with roles
    python scripts/planted.py train models/trained --names dcnv2_parallel dlrm --small

What it writes is read by `onnxrank verify --data` and `onnxrank compress --data`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.spec import InputSpec, roles

if TYPE_CHECKING:
    import torch

Arrays = dict[str, NDArray[Any]]

# Sizes that train within minutes on two cores, products large enough to be worth compressing.
SIZES: dict[str, dict[str, Any]] = {
    "dcnv2_parallel": dict(user=5, item=3, vocab=200, dim=16, layers=2, hidden=(400, 400, 400)),
    "dlrm": dict(user=5, item=3, user_dense=4, vocab=200, dim=16, bottom=(64,), top=(400, 400, 400)),
    "din": dict(user=3, history=10, vocab=200, dim=32, attention=(80, 40), hidden=(200, 80)),
    "mmoe": dict(user=5, item=3, vocab=200, dim=16, experts=4, tasks=2, hidden=(256, 128), tower=64),
}
SMALL: dict[str, dict[str, Any]] = {
    "dcnv2_parallel": dict(user=5, item=3, vocab=60, dim=8, layers=2, hidden=(64, 64)),
    "dlrm": dict(user=5, item=3, user_dense=4, vocab=60, dim=8, bottom=(), top=(64, 64)),
}


@dataclass(frozen=True)
class World:
    """What is planted.

    Attributes:
        vocab: Ids per field; 0 stands for padding in histories and is no item.
        seed: Of the planted tables; requests have seeds of their own.
        users: Fields of the user.
        items: Fields of an item: the item itself, its category, and others.
        dense: Dense features of the user.
        history: Positions of the history.
        rank: Length of the planted vectors.
        zipf: Exponent of Zipf's law.
        tasks: Labels per candidate; tasks share their terms by half.
        rate: Mean logit, which sets the share of clicks.
        unseen: Weight of the terms of history and dense features, which models without such inputs cannot learn.
    """

    vocab: int = 500
    seed: int = 0
    users: int = 5
    items: int = 3
    dense: int = 4
    history: int = 10
    rank: int = 4
    zipf: float = 1.05
    tasks: int = 2
    rate: float = -1.6
    unseen: float = 1.0

    def requests(self, count: int, candidates: int = 32, seed: int = 0) -> Arrays:
        """Draws requests, every array with a row per candidate.

        Args:
            count: Number of requests.
            candidates: Candidates of each.
            seed: Other seeds give other requests of the same world.

        Returns:
            `users [R, users]`, `items [R, items]`, `dense [R, dense]`, `history` and `categories` `[R, history]`,
            `request_id [R]`, `label_0 [R]`, ..., and the planted `probability_0 [R]`, ...
        """
        rng = np.random.default_rng((self.seed, 1, seed))
        rows = count * candidates
        users = np.stack([self._ids(rng, count, k) for k in range(self.users)], 1)
        items = np.stack([self._ids(rng, rows, 100 + k, low=1) for k in range(self.items)], 1)
        items[:, 1] = self._categories[items[:, 0]]
        history = self._ids(rng, count * self.history, 100, low=1).reshape(count, self.history)
        length = rng.integers(1, self.history + 1, count)
        history[np.arange(self.history) >= length[:, None]] = 0
        dense = rng.uniform(-1, 1, (count, self.dense)).astype(np.float32)
        per_row = np.repeat(np.arange(count), candidates)
        found: Arrays = {
            "users": users[per_row],
            "items": items,
            "dense": dense[per_row],
            "history": history[per_row],
            "categories": np.where(history == 0, 0, self._categories[history])[per_row],
            "request_id": per_row + seed * 10_000_000,
        }
        for task in range(self.tasks):
            p = 1 / (1 + np.exp(-self.logits(found, task)))
            found[f"probability_{task}"] = p
            found[f"label_{task}"] = (rng.random(rows) < p).astype(np.int8)
        return found

    def logits(self, rows: Arrays, task: int = 0) -> NDArray[np.float64]:
        """The planted logits `[R]` of rows as `requests` makes them."""
        u, i, h = rows["users"], rows["items"], rows["categories"]
        total = np.full(len(u), self.rate)
        half = task if self.tasks > 1 else 0
        for name, weight in (("context", 0.4), ("candidate", 0.6)):
            ids = u if name == "context" else i
            term = sum(self._table(name, half, k)[ids[:, k]][:, 0] for k in range(ids.shape[1]))
            total += weight * term / np.sqrt(ids.shape[1])
        # Context x candidate: every field of the one with every field of the other.
        mine = sum(self._table("pair user", 0, k)[u[:, k]] for k in range(u.shape[1])) / np.sqrt(u.shape[1])
        its = sum(self._table("pair item", half, k)[i[:, k]] for k in range(i.shape[1])) / np.sqrt(i.shape[1])
        scale = self.rank**-0.5
        total += 0.9 * scale * (mine * its).sum(1)
        # Three-way terms: two fields of the one, one of the other.
        a, b = (self._table("three user", 0, k)[u[:, k]] for k in range(2))
        c, d = (self._table("three item", half, k)[i[:, k]] for k in range(2))
        total += 0.5 * scale * (a * b * c).sum(1) + 0.5 * scale * (a * c * d).sum(1)
        # The candidate's category against those of the history.
        held = (h != 0)[:, :, None]
        past = (held * self._table("history", 0, 0)[h]).sum(1) / np.maximum(held.sum(1), 1)
        total += self.unseen * (past * self._table("match", half, 0)[i[:, 1]]).sum(1) * scale
        total += self.unseen * 0.6 * np.log1p((h == i[:, 1:2]).sum(1))
        mix = np.random.default_rng((self.seed, 7, half)).standard_normal((self.dense, self.rank))
        total += self.unseen * 0.5 * scale * ((rows["dense"] @ mix) * self._table("dense", 0, 0)[i[:, 0]]).sum(1)
        return np.asarray(total)

    @property
    def _categories(self) -> NDArray[np.int64]:
        """Category of every item; 0 is that of no item."""
        found = np.random.default_rng((self.seed, 2)).integers(1, max(2, min(self.vocab, 30)), self.vocab)
        found[0] = 0
        return found

    def _table(self, name: str, task: int, field: int) -> NDArray[np.float64]:
        code = list(name.encode())
        return np.random.default_rng((self.seed, 3, task, field, *code)).standard_normal((self.vocab, self.rank))

    def _ids(self, rng: np.random.Generator, count: int, field: int, low: int = 0) -> NDArray[np.int64]:
        """Ids by Zipf's law, which of them are frequent being different for every field."""
        size = self.vocab - low
        share = np.arange(1, size + 1) ** -self.zipf
        order = np.random.default_rng((self.seed, 4, field)).permutation(size)
        return low + order[np.searchsorted(np.cumsum(share / share.sum()), rng.random(count)).clip(0, size - 1)]


def world_of(specs: Sequence[InputSpec], seed: int = 0, tasks: int = 2) -> World:
    """The world for a model with these inputs."""
    by_name = {s.name: s for s in specs}
    ids = next(s for s in specs if s.dtype == "int64")
    width = {n: int(s.shape[1]) for n, s in by_name.items() if len(s.shape) == 2}
    users = width.get("user_ids") or sum(n.startswith("user_") and s.dtype == "int64" for n, s in by_name.items())
    items = width.get("item_ids") or sum(n.startswith("item_") for n in by_name)
    return World(
        vocab=int(ids.high),
        seed=seed,
        users=max(users, 2),
        items=max(items, 2),
        dense=width.get("user_dense", 4),
        history=width.get("hist_ids", 10),
        tasks=tasks,
    )


def feed(specs: Sequence[InputSpec], rows: Arrays) -> Arrays:
    """What a model with these inputs takes of rows: ids, histories and dense features by the names of its inputs."""
    named = {
        "user_ids": rows["users"],
        "item_ids": rows["items"],
        "user_dense": rows["dense"],
        "hist_ids": rows["history"],
        "hist_categories": rows["categories"],
        "item_id": rows["items"][:, 0],
        "item_category": rows["items"][:, 1],
        **{f"user_{k}": column for k, column in enumerate(rows["users"].T)},
        **{f"item_{k}": column for k, column in enumerate(rows["items"].T)},
    }
    out = {}
    for s in specs:
        if s.name not in named:
            raise KeyError(f"nothing is planted for the input {s.name!r}")
        data = named[s.name]
        if len(s.shape) == 2:
            data = data.reshape(len(data), -1)[:, : int(s.shape[1])]
        out[s.name] = np.ascontiguousarray(data.astype(s.dtype))
    return out


def recorded(specs: Sequence[InputSpec], rows: Arrays) -> Arrays:
    """Recorded requests as commands read them: inputs, `request_id`, and `label`, or `label_0` and further ones."""
    labels = {k: v for k, v in rows.items() if k.startswith("label_")}
    return {**feed(specs, rows), "request_id": rows["request_id"], "label": rows["label_0"], **labels}


def bayes_auc(probability: NDArray[np.float64], scores: NDArray[np.float64] | None = None) -> float:
    """The AUC that scores have in the mean over labels drawn from these probabilities; by default their own: the best.

    Args:
        probability: Of a click, `[R]`.
        scores: `[R]`.
    """
    from onnxrank.compress.gate import soft_auc

    return soft_auc(probability if scores is None else scores, probability)


# --- files --------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, specs: Sequence[InputSpec], chunks: Iterator[Arrays]) -> int:
    """Writes rows as Parquet, a chunk per row group; returns their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, count = None, 0
    for rows in chunks:
        columns = {}
        for name, data in recorded(specs, rows).items():
            flat = pa.array(data.reshape(-1))
            columns[name] = flat if data.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, data.shape[1])
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
        count += len(table)
    if writer is not None:
        writer.close()
    return count


def _specs(name: str, small: bool) -> list[InputSpec]:
    from models import build

    return build(name, **(SMALL if small else SIZES)[name])[1]


def write_requests(
    path: Path, specs: Sequence[InputSpec], requests: int, candidates: int, seed: int, world: int
) -> int:
    """Writes labelled requests of a model as `.parquet` or `.npz`; returns the number of rows."""
    planted = world_of(specs, world)
    if path.suffix == ".npz":
        rows = planted.requests(requests, candidates, seed)
        np.savez(path, **recorded(specs, rows))
        return len(rows["request_id"])
    step = max(1, 100_000 // candidates)

    def chunks() -> Iterator[Arrays]:
        for k, start in enumerate(range(0, requests, step)):
            rows = planted.requests(min(step, requests - start), candidates, seed + 1000 * k)
            yield {**rows, "request_id": rows["request_id"] % 10_000_000 + start + seed * 10_000_000}

    return write_parquet(path, specs, chunks())


# --- training -----------------------------------------------------------------------------------------------------


def train(
    name: str, sizes: dict[str, Any], requests: int, epochs: int, seed: int, world: int = 0, quiet: bool = False
) -> tuple[torch.nn.Module, list[InputSpec]]:
    """Trains a model of models/ on planted requests.

    Args:
        name: Its name.
        sizes: Arguments of its constructor.
        requests: Number of requests of 32 candidates.
        epochs: Passes over them.
        seed: Of weights and order.
        world: Seed of the world.
        quiet: Whether to print nothing.
    """
    import torch

    from models import build
    from models.training import fit, settle

    torch.manual_seed(seed)
    module, specs = build(name, **sizes)
    settle(module)
    planted = world_of(specs, world)
    rows = planted.requests(requests, 32, seed=1 + seed)
    arrays = [torch.from_numpy(a) for a in feed(specs, rows).values()]
    labels = [rows[f"label_{t}"] for t in range(len(module.output_names))]
    targets = torch.from_numpy(np.stack(labels, 1).astype(np.float32))
    told = None if quiet else f"{name}, seed {seed}"
    for epoch, loss in enumerate(fit(module, arrays, targets, epochs=epochs, seed=seed, decay=1e-5, told=told)):
        if not quiet:
            print(f"{name} seed {seed}: epoch {epoch + 1}, log loss {loss:.4f}", flush=True)
    return module, specs


def scores(module: torch.nn.Module, specs: Sequence[InputSpec], rows: Arrays) -> NDArray[np.float64]:
    """Scores `[R, tasks]` of a trained module."""
    import torch

    arrays = [torch.from_numpy(a) for a in feed(specs, rows).values()]
    with torch.no_grad():
        made = module(*arrays)
    found = [made] if isinstance(made, torch.Tensor) else list(made)
    return torch.cat(found, dim=1).double().numpy()


def export(module: torch.nn.Module, specs: Sequence[InputSpec], path: Path) -> None:
    """Writes a trained module as ONNX, and its roles beside it."""
    import onnx
    import yaml

    from scripts.export_models import export_torchscript, strip_local_text

    made = export_torchscript(module, specs)
    strip_local_text(made)
    onnx.save(made, path)
    path.with_suffix("").with_suffix(".roles.yaml").write_text(yaml.safe_dump(roles(specs), sort_keys=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    some = commands.add_parser("requests", help="write labelled requests")
    some.add_argument("out", type=Path)
    some.add_argument("--model", choices=sorted(SIZES), default="dlrm")
    some.add_argument("--requests", type=int, default=2000)
    some.add_argument("--candidates", type=int, default=32)
    some.add_argument("--seed", type=int, default=500, help="500 and above are not trained on")
    trained = commands.add_parser("train", help="train and export models")
    trained.add_argument("out", type=Path)
    trained.add_argument("--names", nargs="+", choices=sorted(SIZES), default=sorted(SIZES))
    trained.add_argument("--requests", type=int, default=20_000, help="of 32 candidates")
    trained.add_argument("--epochs", type=int, default=2)
    trained.add_argument("--seed", type=int, default=0)
    for p in (some, trained):
        p.add_argument("--small", action="store_true", help="the sizes of models/trained")
        p.add_argument("--world", type=int, default=0, help="seed of what is planted")
    args = parser.parse_args()
    if args.command == "requests":
        specs = _specs(args.model, args.small)
        count = write_requests(args.out, specs, args.requests, args.candidates, args.seed, args.world)
        print(f"{count} rows written to {args.out}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        sizes = (SMALL if args.small else SIZES)[name]
        module, specs = train(name, sizes, args.requests, args.epochs, args.seed, args.world)
        rows = world_of(specs, args.world).requests(4000, 32, seed=499)
        found = scores(module, specs, rows)
        for t in range(found.shape[1]):
            p = rows[f"probability_{t}"]
            print(f"{name} task {t}: expected AUC {bayes_auc(p, found[:, t]):.4f}, Bayes {bayes_auc(p):.4f}")
        export(module, specs, args.out / f"{name}.onnx")


if __name__ == "__main__":
    main()
