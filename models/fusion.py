"""A fusion layer over many more request-level than candidate-level features, in neat and fragmented layouts.

This is the setting in which MaRI (arXiv 2602.23105) reports its savings. Not one of the families in `NAMES`: it exists
to compare layouts of the same computation.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from models.layers import Ranker, dense, mlp
from models.spec import InputSpec, column_text

FusionLayout = Literal["neat", "fragmented", "packed", "pieces", "fragmented_pieces"]


class Fusion(Ranker):
    """One hidden layer over user and item features side by side.

    Layouts:
        neat: one block of the user's features, one of the item's.
        fragmented: the same two inputs, cut into segments that alternate.
        packed: one matrix whose columns alternate so.
        pieces: an input of its own for every segment, the user's first.
        fragmented_pieces: the same inputs, alternating.
    """

    scales: ClassVar = {
        "small": dict(user=40, item=4, hidden=8, segments=4),
        "industrial": dict(user=1280, item=128, hidden=256, segments=32),
    }

    def __init__(self, user: int, item: int, hidden: int, segments: int, layout: FusionLayout = "neat") -> None:
        super().__init__()
        if user % segments or item % segments:
            raise ValueError(f"{user} and {item} features do not divide into {segments} segments")
        self.layout, self.segments = layout, segments
        self.sizes = (user // segments, item // segments)
        self.top = mlp((user + item, hidden), head=True)
        a, b = self.sizes
        if layout == "packed":
            request = column_text([s * (a + b) + k for s in range(segments) for k in range(a)])
            self.specs = [InputSpec("dense", "float32", ("N", user + item), "mixed", -1.0, 1.0, request)]
        elif layout in ("neat", "fragmented"):
            self.specs = [dense("user_dense", user), dense("item_dense", item)]
        else:
            self.specs = [dense(f"user_{s}", a) for s in range(segments)]
            self.specs += [dense(f"item_{s}", b) for s in range(segments)]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        parts = list(inputs)
        if self.layout == "fragmented":
            parts = [p for x, size in zip(inputs, self.sizes, strict=True) for p in x.split(size, dim=1)]
        if self.layout in ("fragmented", "fragmented_pieces"):
            half = self.segments
            parts = [p for pair in zip(parts[:half], parts[half:], strict=True) for p in pair]
        return torch.sigmoid(self.top(torch.cat(parts, dim=1)))
