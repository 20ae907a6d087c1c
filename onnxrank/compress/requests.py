"""Recorded requests for calibration and for the gate: two parts that share no request, in batches of bounded size.

Where a model takes rows of several requests at once, as plain exports do, a batch is one run; where it does not,
because request-level inputs take one row, each request is run by itself. That is found out by trying.

What is asked of all rows is asked by portions, whose batches are the same whoever reads them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from onnxrank import feeds
from onnxrank.contract import stored_contract
from onnxrank.errors import UsageError
from onnxrank.feeds import Feed, Input
from onnxrank.roles import InputRole, Roles
from onnxrank.values import CANDIDATES
from onnxrank.verify import recorded
from onnxrank.verify.inputs import rows, take
from onnxrank.verify.pairing import Binding, bind

ROWS = 4096
"""Rows of a batch."""
_BYTES = 16 << 20
_PORTION = 65536
"""About how many rows one task reads."""
_SHUFFLED = 64
"""Batches among which the next one is drawn."""
CALIBRATION, GATE = "calibration", "gate"


@dataclass(frozen=True)
class Batch:
    """Some requests.

    Attributes:
        part: `calibration` or `gate`.
        feeds: One feed of all of them, or one of each.
        request: Number of the request of every row, counted within its part.
        labels: Of every row, `[R, labels]`; None where there are none.
        names: What the requests are called.
    """

    part: str
    feeds: list[Feed]
    request: NDArray[np.int64]
    labels: NDArray[np.float64] | None
    names: list[str]


@dataclass
class Seen:
    """Which requests are in which part.

    Attributes:
        marks: The part of each, by hashes of its identity and of what is in it.
    """

    marks: dict[bytes, str] = field(default_factory=dict)

    def add(self, marks: Iterable[bytes], part: str) -> bytes | None:
        """Notes a request; a mark of it that the other part has, where there is one."""
        return next((m for m in marks if self.marks.setdefault(m, part) != part), None)


@dataclass(frozen=True)
class Portion:
    """What one task reads.

    Attributes:
        source: Which of the sources.
        part: Which part of it.
    """

    source: str
    part: recorded.Part


def identity(model: ModelProto, declared: Sequence[Input]) -> Binding:
    """The binding of a model to requests that were recorded for it."""
    return Binding(tuple(declared), {i.name: (i.name, False) for i in declared}, (), (), False, ())


def original_of(model: ModelProto, roles: Roles) -> tuple[list[Input], Binding]:
    """Inputs that requests are recorded by, and how a model's own come from them.

    Requests of a model that was optimised are those of its original, whose inputs its contract tells.

    Args:
        model: The model.
        roles: Roles of its own inputs.

    Raises:
        UsageError: The contract does not tell.
    """
    own = feeds.inputs(model, roles)
    contract = stored_contract(model)
    before = None if contract is None else Roles.from_dict(contract.get("roles", {}))
    if before is None or contract is None or contract.get("interface") != "request":
        return own, identity(model, own)
    described = {i.name: i for i in feeds.describe(model)}
    listed = []
    for name, role in before.inputs.items():
        parts = [described[n] for n in (name, f"{name}.request", f"{name}.candidate") if n in described]
        if not parts:
            continue
        if role.record is not None and role.level == "mixed":
            raise UsageError(
                f"The model takes flat records {name!r} in two parts, whose requests are not read yet: compress the "
                "original, and optimise what comes out."
            )
        shape: list[Any] = list(parts[0].dims or ())
        if role.candidate_axis is not None:
            shape[role.candidate_axis] = "N"
        if name not in described:
            axis = role.axis or 0
            shape[axis] = sum(int((p.dims or ())[axis] or 0) for p in parts)
        listed.append(helper.make_tensor_value_info(name, parts[0].elem_type, shape))
    stand_in = helper.make_model(helper.make_graph([], "inputs", listed, []))
    binding = bind(stand_in, model, before)
    return list(binding.declared), binding


class Requests:
    """Recorded requests, divided and bound to a model.

    Args:
        data: File or folder of recorded requests.
        model: The model.
        roles: Roles of its inputs.
        labels: Names of the labels.
        request_id: Name of what tells requests apart.
        holdout: Share of the requests that is for the gate.
        gate_data: Requests for the gate alone; all of `data` is for calibration then.
        seed: Of the division.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        model: ModelProto,
        roles: Roles,
        labels: Sequence[str] = (),
        request_id: str = "request_id",
        holdout: float = 0.5,
        gate_data: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        self.declared, self.binding = original_of(model, roles)
        self.labels = tuple(labels)
        self.data, self.gate_data, self.request_id = data, gate_data, request_id
        self.holdout, self.seed = holdout, seed
        extra = [
            Input(n, TensorProto.DOUBLE, ((CANDIDATES,),), InputRole(n, "candidate", 0))
            for n in self.labels
        ]  # fmt: skip
        taken = {i.name for i in self.declared} & set(self.labels)
        if taken:
            raise UsageError(f"{sorted(taken)[0]!r} is an input of the model and cannot be a label as well.")
        self._sources = {
            CALIBRATION: recorded.source(data, [*self.declared, *extra], request_id, rows=_PORTION),
        }
        if gate_data is not None:
            self._sources[GATE] = recorded.source(gate_data, [*self.declared, *extra], request_id, rows=_PORTION)
        self.joined = all(i.role.candidate_axis is not None for i in self.declared) and all(
            not once for _, once in self.binding.sources.values()
        )

    @property
    def portions(self) -> list[Portion]:
        """All there is to read, in order."""
        return [Portion(name, part) for name, found in self._sources.items() for part in found.parts]

    @property
    def rows(self) -> int | None:
        """Number of rows of both parts, where it is known ahead."""
        found = [s.rows for s in self._sources.values()]
        return None if None in found else sum(n for n in found if n is not None)

    def part(self, name: str) -> str:
        """Which part a request belongs to, by its identity alone."""
        digest = hashlib.blake2b(f"{self.seed}:{self._id(name)}".encode(), digest_size=8).digest()
        return GATE if int.from_bytes(digest, "little") < self.holdout * 2.0**64 else CALIBRATION

    def _id(self, name: str) -> str:
        _, mark, identity = name.rpartition(f", {self.request_id} ")
        return identity if mark else name

    def batches(self, only: str | None = None, most: int = ROWS) -> Iterator[Batch]:
        """All requests in batches, each of one part.

        Args:
            only: The part that is wanted; None for both.
            most: Rows from which on a batch is full.

        Raises:
            UsageError: The data cannot be used.
        """
        yield from self._batched(self.portions, only, most)

    def of(self, portion: Portion, only: str, seen: Seen | None = None) -> Iterator[Batch]:
        """Requests of one portion in batches, numbered within it.

        Args:
            portion: The portion.
            only: The part that is wanted.
            seen: Where all requests are noted, those of the other part too.

        Raises:
            UsageError: The data cannot be used, or a request is in both parts.
        """
        if seen is not None or self.gate_data is None or only == portion.source:
            yield from self._batched([portion], only, ROWS, seen)

    def _batched(
        self, portions: Iterable[Portion], only: str | None, most: int, seen: Seen | None = None
    ) -> Iterator[Batch]:
        held: dict[str, list[tuple[str, Feed, NDArray[np.float64] | None, int]]] = {CALIBRATION: [], GATE: []}
        size = dict.fromkeys(held, 0)
        count = dict.fromkeys(held, 0)
        number = dict.fromkeys(held, 0)
        for portion, r in ((p, r) for p in portions for r in self._sources[p.source].read(p.part)):
            part = portion.source if self.gate_data is not None else self.part(r.name)
            labels = self._labels(r)
            feed = {i.name: r.feed[i.name] for i in self.declared}
            if seen is not None and (mark := seen.add(self._marks(r, feed), part)) is not None:
                raise self._doubled(r, feed, mark)
            n = rows(self.declared, feed) or 0
            if not n or only not in (None, part):
                continue
            held[part].append((r.name, feed, labels, n))
            size[part] += sum(v.nbytes for v in feed.values())
            count[part] += n
            if count[part] >= most or size[part] >= _BYTES:
                yield self._batch(part, held[part], number[part])
                number[part] += len(held[part])
                held[part], size[part], count[part] = [], 0, 0
        for part, several in held.items():
            if several:
                yield self._batch(part, several, number[part])

    def together(self, seen: Seen, more: Seen, portion: Portion) -> None:
        """Adds the requests of a portion to those of others.

        Raises:
            UsageError: A request is in both parts.
        """
        odd = next((m for m, part in more.marks.items() if seen.add([m], part) is not None), None)
        if odd is None:
            return
        for r in self._sources[portion.source].read(portion.part):
            feed = {i.name: r.feed[i.name] for i in self.declared}
            if odd in self._marks(r, feed):
                raise self._doubled(r, feed, odd)

    def _labels(self, r: recorded.Request) -> NDArray[np.float64] | None:
        if not self.labels:
            return None
        found = np.stack([r.feed[n] for n in self.labels], 1)
        if not np.isin(found, (0.0, 1.0)).all():
            odd = found[~np.isin(found, (0.0, 1.0))][0]
            raise UsageError(f"{r.name}: the label {odd:g} is neither 0 nor 1.")
        return found

    def _marks(self, r: recorded.Request, feed: Feed) -> list[bytes]:
        """Hashes of a request's identity and of what is in it, where it has either."""
        marks = [("request", self._id(r.name).encode())] if f", {self.request_id} " in r.name else []
        if (rows(self.declared, feed) or 0) > 1:  # single rows are the same now and then
            inside = hashlib.blake2b(digest_size=8)
            for i in self.declared:
                data = feed[i.name]
                inside.update(repr(data.tolist()).encode() if data.dtype == object else data.tobytes())
            marks.append(("content", inside.digest()))
        return [hashlib.blake2b(kind.encode() + mark, digest_size=8).digest() for kind, mark in marks]

    def _doubled(self, r: recorded.Request, feed: Feed, mark: bytes) -> UsageError:
        """The error that a request is in both parts, by one of its marks."""
        by_identity = f", {self.request_id} " in r.name and self._marks(r, feed)[0] == mark
        what = "is among" if by_identity else "is the same as one of"
        return UsageError(
            f"{r.name} {what} the requests for calibration and is for the gate too. What a model was fitted to "
            "says nothing about it: give other requests, or leave out duplicates."
        )

    def _batch(self, part: str, several: Sequence[tuple[str, Feed, Any, int]], first: int) -> Batch:
        request = np.repeat(np.arange(first, first + len(several)), [n for _, _, _, n in several])
        labels = None if not self.labels else np.concatenate([y for _, _, y, _ in several])
        if self.joined:
            whole = {
                i.name: np.concatenate([f[i.name] for _, f, _, _ in several], i.role.candidate_axis or 0)
                for i in self.declared
            }
            made = [self.binding(whole)]
        else:
            made = [self.binding(f) for _, f, _, _ in several]
        return Batch(part, made, request, labels, [name for name, *_ in several])

    def shuffled(self, epochs: int, rows: int, seed: int) -> Iterator[Batch]:
        """Small batches of calibration rows, several times over, in an order that is drawn within bounded memory."""
        rng = np.random.default_rng(seed)
        for _ in range(epochs):
            held: list[Batch] = []
            for batch in self.batches(CALIBRATION, rows):
                held.append(batch)
                if len(held) > _SHUFFLED:
                    yield held.pop(rng.integers(len(held)))
            while held:
                yield held.pop(rng.integers(len(held)))

    def sample(self, candidates: int) -> Feed:
        """The first request with as many candidates as asked for, its own again and again.

        Raises:
            UsageError: There is no request.
        """
        for source in self._sources.values():
            for r in source.read():
                feed = {i.name: r.feed[i.name] for i in self.declared}
                n = rows(self.declared, feed)
                if n:
                    return self.binding(take(self.declared, feed, np.arange(candidates) % n))
        raise UsageError(f"{os.fspath(self.data)} holds no request.")
