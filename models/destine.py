"""DESTINE: self-attention over fields whose pairwise part is whitened and whose unary part is a term of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, mlp


class DisentangledAttention(nn.Module):
    """Softmax of centred queries and keys, plus a softmax over fields that all queries share."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.query, self.key, self.value = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.unary, self.residual = nn.Linear(dim, heads, bias=False), nn.Linear(dim, inner, bias=False)

    def split(self, x: Tensor) -> Tensor:
        """[N, F, heads * d] to [N, heads, F, d]."""
        return x.reshape(-1, x.shape[1], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, F, dim] to [N, F, heads * head_dim]."""
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        q, k = q - q.mean(dim=2, keepdim=True), k - k.mean(dim=2, keepdim=True)
        pairwise = torch.matmul(q, k.transpose(2, 3)).softmax(dim=-1)
        unary = self.unary(x).transpose(1, 2).softmax(dim=-1).unsqueeze(2)
        pooled = torch.matmul(pairwise + unary, v).transpose(1, 2)
        pooled = pooled.reshape(-1, x.shape[1], self.heads * self.head_dim)
        return torch.relu(pooled + self.residual(x))


class DESTINE(Ranker):
    """Attention layers beside an MLP."""

    scales: ClassVar = {
        "small": dict(user=5, item=3, vocab=50, dim=8, heads=2, head_dim=4, layers=2, hidden=(16,)),
        "industrial": dict(user=24, item=8, vocab=1000, dim=32, heads=2, head_dim=32, layers=2, hidden=(256, 128)),
    }

    def __init__(
        self,
        user: int,
        item: int,
        vocab: int,
        dim: int,
        heads: int,
        head_dim: int,
        layers: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "joint", std=1.0)
        widths = [dim] + (layers - 1) * [heads * head_dim]
        self.layers = nn.ModuleList(DisentangledAttention(width, heads, head_dim) for width in widths)
        self.head = nn.Linear(self.fields.count * heads * head_dim, 1)
        self.deep = mlp((self.fields.width, *hidden), head=True)
        self.specs = self.fields.specs

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        e = x = self.fields((user_ids, item_ids))
        for layer in self.layers:
            x = layer(x)
        return torch.sigmoid(self.head(x.flatten(1)) + self.deep(e.flatten(1)))
