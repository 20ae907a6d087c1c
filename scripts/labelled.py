"""Labelled rows to train on: planted ones, or a user's own Parquet, in the two matrices of ids that models/ take."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.spec import InputSpec
from scripts import planted
from scripts.planted import Arrays, World, bayes_auc

Scorer = Callable[[Arrays], NDArray[np.float64]]
"""Gives scores `[R]` of rows."""
BUCKETS = 32
"""Of a column of real numbers."""


@dataclass(frozen=True)
class Planted:
    """Rows of a planted world; every seed has training rows of its own, and all are judged on the same.

    Attributes:
        world: What is planted.
        requests: Requests of 32 candidates to train on.
        held: The same to judge on.
    """

    world: World
    requests: int
    held: int = 4000
    _kept: dict[int, Arrays] = field(default_factory=dict, repr=False)

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of the models: how many fields, and ids in each."""
        return {"user": self.world.users, "item": self.world.items, "vocab": self.world.vocab}

    def training(self, seed: int, apart: bool = False) -> Arrays:
        """Rows to train on, the last ones asked for being kept; those of `watched` are never among them."""
        if seed not in self._kept:
            self._kept.clear()
            self._kept[seed] = self.world.requests(self.requests, 32, seed=1 + seed)
        return self._kept[seed]

    def auc(self, score: Scorer) -> float:
        """The AUC that scores of held-out rows have in the mean over labels, which are drawn by known probabilities."""
        return bayes_auc(self._judged["probability_0"], score(self._judged))

    def watched(self, score: Scorer) -> float:
        """The AUC on rows by which to choose and to stop."""
        return bayes_auc(self._watched["probability_0"], score(self._watched))

    @cached_property
    def _judged(self) -> Arrays:
        return self.world.requests(self.held, 32, seed=499)

    @cached_property
    def _watched(self) -> Arrays:
        return self.world.requests(self.held // 2, 32, seed=498)

    @property
    def best(self) -> float:
        """Bayes AUC, which no scores beat."""
        return self.auc(lambda rows: rows["probability_0"])


@dataclass(frozen=True)
class Recorded:
    """A user's own labelled rows, divided by request: a fifth is judged on.

    Attributes:
        rows: `users [R, k]`, `items [R, m]`, `label_0 [R]` and `request_id [R]`.
        vocab: Ids in each field.
    """

    rows: Arrays
    vocab: int
    best: None = None

    @classmethod
    def of(cls, path: Path, request: Sequence[str], label: str, request_id: str, vocab: int) -> Recorded:
        """Reads Parquet: columns of ids, text or numbers, one row per candidate.

        Args:
            path: The file.
            request: Patterns on names of columns that are the same for all candidates of a request.
            label: The column that is 0 or 1.
            request_id: The column that tells requests apart.
            vocab: Ids kept per column; the most frequent, all others share one. Real numbers get as many buckets as
                `BUCKETS` says, by quantiles.

        Raises:
            SystemExit: If a column is missing, or there are none of one level.
        """
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        for name in (label, request_id):
            if name not in table.column_names:
                raise SystemExit(f"{path} has no column {name!r}; it has {', '.join(table.column_names)}")
        found: dict[bool, list[NDArray[np.int64]]] = {True: [], False: []}
        for name in table.column_names:
            if name in (request_id, label) or name.startswith("label_"):
                continue
            once = any(fnmatch.fnmatchcase(name, pattern) for pattern in request)
            data = np.array(table[name].to_pylist())
            found[once] += [_codes(part, vocab) for part in data.reshape(len(data), -1).T]
        for once, several in found.items():
            if not several:
                raise SystemExit(f"{path} has no column that is {'request' if once else 'candidate'}-level (--request)")
        rows: Arrays = {
            "users": np.stack(found[True], 1),
            "items": np.stack(found[False], 1),
            "label_0": table[label].to_numpy().astype(np.int8),
            "request_id": np.unique(table[request_id].to_numpy(), return_inverse=True)[1],
        }
        return cls(rows, 1 + int(max(rows["users"].max(), rows["items"].max())))

    @property
    def sizes(self) -> dict[str, int]:
        """Arguments of the models: how many fields, and ids in each."""
        return {"user": self.rows["users"].shape[1], "item": self.rows["items"].shape[1], "vocab": self.vocab}

    @cached_property
    def _fifth(self) -> NDArray[np.int64]:
        ids = self.rows["request_id"]
        share = np.array([zlib.crc32(str(k).encode()) % 5 for k in range(int(ids.max()) + 1)])
        return np.asarray(share[ids])

    def _rows(self, which: NDArray[np.bool_]) -> Arrays:
        return {k: v[which] for k, v in self.rows.items()}

    def training(self, seed: int, apart: bool = False) -> Arrays:
        """Rows to train on, the same for every seed; without those of `watched` if they are to be kept apart."""
        return self._rows(self._fifth > int(apart))

    def auc(self, score: Scorer) -> float:
        """The AUC on the rows that were not trained on."""
        return self._on(self._fifth == 0, score)

    def watched(self, score: Scorer) -> float:
        """The AUC on rows by which to choose and to stop, a fifth."""
        return self._on(self._fifth == 1, score)

    def _on(self, which: NDArray[np.bool_], score: Scorer) -> float:
        rows = self._rows(which)
        return bayes_auc(rows["label_0"].astype(float), score(rows))


Data = Planted | Recorded


def _codes(column: NDArray[Any], vocab: int) -> NDArray[np.int64]:
    """A column as ids, the most frequent first; beyond `vocab` they share the last."""
    if column.dtype.kind == "f":
        edges = np.unique(np.quantile(column[np.isfinite(column)], np.linspace(0, 1, BUCKETS + 1)[1:-1]))
        column = np.searchsorted(edges, np.nan_to_num(column, nan=-np.inf))
    _, back, count = np.unique(column.astype(str), return_inverse=True, return_counts=True)
    place = np.empty(len(count), np.int64)
    place[np.argsort(-count, kind="stable")] = np.arange(len(count))
    return np.asarray(np.minimum(place, vocab - 1)[back])


def arrays(specs: Sequence[InputSpec], rows: Arrays) -> Arrays:
    """What a model takes of rows."""
    none: Arrays = {k: np.zeros((len(rows["users"]), 1), np.int64) for k in ("dense", "history", "categories")}
    return planted.feed(specs, {**none, **rows})


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes a folder for runs of these settings, which several processes may fill at once.

    Raises:
        SystemExit: If it holds runs of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told, text = folder / "settings.json", json.dumps(settings)
    if not told.exists():
        write(told, text)
    if told.read_text() != text:
        raise SystemExit(f"{told} has other settings: choose another folder, or remove it")


def write(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that name a user's own rows."""
    group = parser.add_argument_group("rows of your own, in place of planted ones")
    group.add_argument("--data", type=Path, metavar="PARQUET", help="a row per candidate")
    group.add_argument("--request", nargs="+", default=["user_*"], metavar="GLOB", help="request-level columns")
    group.add_argument("--label", default="label")
    group.add_argument("--request-id", default="request_id")
    group.add_argument("--vocab", type=int, default=1000, help="ids kept per column")


def of_options(options: argparse.Namespace, world: World, requests: int) -> Data:
    """The rows that options name, planted ones by default."""
    if options.data is None:
        return Planted(world, requests)
    return Recorded.of(options.data, options.request, options.label, options.request_id, options.vocab)
