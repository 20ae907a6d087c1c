"""MaskNet: blocks whose inputs are multiplied with masks that a bottleneck makes of the embeddings."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Layout, Ranker, mlp


class MaskBlock(nn.Module):
    """Instance-guided mask of the embeddings, times the input, then a layer with its normalisation."""

    def __init__(self, embeddings: int, reduction: int, width: int, out: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(nn.Linear(embeddings, reduction), nn.ReLU(), nn.Linear(reduction, width))
        self.layer, self.norm = nn.Linear(width, out, bias=False), nn.LayerNorm(out)

    def forward(self, embeddings: Tensor, x: Tensor) -> Tensor:
        """Maps [N, width] to [N, out]."""
        return torch.relu(self.norm(self.layer(x * self.mask(embeddings))))


class _MaskNet(Ranker):
    """Fields with a normalisation for each."""

    layout: Layout = "vector"

    def __init__(self, user: int, item: int, vocab: int, dim: int) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, self.layout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(self.fields.count))
        self.specs = self.fields.specs

    def embed(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Returns the embeddings and the normalised embeddings, [N, width] each."""
        x = self.fields(inputs)
        normal = [norm(part) for norm, part in zip(self.norms, x.unbind(dim=1), strict=True)]
        return x.flatten(1), torch.cat(normal, dim=1)


class MaskNetParallel(_MaskNet):
    """All blocks read the embeddings; an MLP reads all blocks."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, blocks=2, reduction=16, out=8, hidden=(16,)),
        "industrial": dict(user=24, item=8, vocab=1000, dim=32, blocks=3, reduction=256, out=64, hidden=(256, 128)),
    }

    def __init__(self, blocks: int, reduction: int, out: int, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        width = self.fields.width
        self.blocks = nn.ModuleList(MaskBlock(width, reduction, width, out) for _ in range(blocks))
        self.deep = mlp((blocks * out, *hidden), head=True)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x, normal = self.embed(inputs)
        return torch.sigmoid(self.deep(torch.cat([block(x, normal) for block in self.blocks], dim=1)))


class MaskNetSerial(_MaskNet):
    """The first block reads the embeddings, each other one what the block before gives."""

    layout = "column"
    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, reduction=16, hidden=(16, 8)),
        "industrial": dict(user=24, item=8, vocab=1000, dim=32, reduction=256, hidden=(256, 128)),
    }

    def __init__(self, reduction: int, hidden: tuple[int, ...], **sizes: int) -> None:
        super().__init__(**sizes)
        width = self.fields.width
        widths = (width, *hidden)
        self.blocks = nn.ModuleList(MaskBlock(width, reduction, a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(hidden[-1], 1)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        x, y = self.embed(inputs)
        for block in self.blocks:
            y = block(x, y)
        return torch.sigmoid(self.head(y))
