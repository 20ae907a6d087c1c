"""Requests to compare two models on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnxrank.feeds import Feed, Input, Known, Maker
from onnxrank.verify import inputs
from onnxrank.verify.inputs import ORDINARY, POISONED
from onnxrank.verify.options import Options
from onnxrank.verify.pairing import Binding
from onnxrank.verify.sizes import Size

MOST_ODD = 17
"""Candidates for inputs that are not of the ordinary kind."""
_PATTERNS = 5
"""Of padding."""


@dataclass(frozen=True)
class Point:
    """Inputs of both models for one request.

    Attributes:
        inputs: Their kind.
        candidates: Number of candidates.
        seed: Their seed.
        feed: Inputs of the original.
        bound: Inputs of the other model.
        request: Identity, for recorded requests.
        labels: Recorded labels, one per candidate.
        size: Its extents, where they are not the ordinary ones.
    """

    inputs: str
    candidates: int
    seed: int
    feed: Feed
    bound: Feed
    request: str | None = None
    labels: NDArray[Any] | None = None
    size: Size | None = None


def generate(binding: Binding, known: Known, options: Options, lengths: Mapping[str, int]) -> Iterator[Point]:
    """The generated requests: ordinary ones at every number of candidates, the other kinds at one.

    Args:
        binding: How the second model's inputs come from the original's.
        known: What is known of the original's inputs.
        options: Numbers of candidates, seeds and kinds.
        lengths: Extents of the other symbols.
    """
    several = [n for n in options.counts if n > 1]
    odd = max([n for n in several if n <= MOST_ODD] or several[:1] or [0])
    for kind, maker in inputs.kinds(binding.declared, known.ranges, options.kinds).items():
        counts = options.counts if kind == ORDINARY else (odd,) if odd else ()
        users = max(options.users, _PATTERNS if kind == "padding" else 1)
        if kind in ("zeros", "denormal", *POISONED):
            users = 1
        for n in counts:
            for seed in range(users if n else 1):
                setting = inputs.point(known.symbols, max(n, 1), seed, lengths)
                feed = maker(replace(setting, seed=seed) if kind == "padding" else setting)
                if n == 0:
                    yield Point(kind, 0, seed, *binding.without_candidates(feed))
                else:
                    yield Point(kind, n, seed, feed, binding(feed))


def sized(binding: Binding, known: Known, lengths: Mapping[str, int], size: Size, seed: int = 0) -> Point:
    """A request of given extents.

    Args:
        binding: How the second model's inputs come from the original's.
        known: What is known of the original's inputs.
        lengths: Extents of the symbols that `size` does not name.
        size: The extents.
        seed: For the values.
    """
    maker = (inputs.Full if size.full else Maker)(binding.declared, known.ranges)
    feed = maker(inputs.point(known.symbols, max(size.candidates, 1), seed, {**lengths, **size.lengths}))
    if not size.candidates:
        return Point(size.kind, 0, seed, *binding.without_candidates(feed), size=size)
    return Point(size.kind, size.candidates, seed, feed, binding(feed), size=size)


def weight(declared: Sequence[Input], extents: Mapping[str, int]) -> int:
    """Bytes of the inputs of a request."""
    total = 0
    for i in declared:
        item = 8 if i.dtype == TensorProto.STRING else np.dtype(helper.tensor_dtype_to_np_dtype(i.dtype)).itemsize
        total += item * prod(f if isinstance(f, int) else extents[f] for d in i.dims for f in d)
    return total
