"""HSTU: pointwise SiLU attention with relative bias over the history, the candidate appended as the last token."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from models.layers import Ranker, Table, ids, mlp
from models.spec import InputSpec

BUCKETS = 12


class HSTULayer(nn.Module):
    """One projection for gate, values, queries and keys; weights are SiLU of scores over the length, not a softmax."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.norm, self.inner = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.project, self.out = nn.Linear(dim, 4 * dim), nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """[N, L, dim] to [N, heads, L, dim / heads]."""
        return x.reshape(-1, x.shape[1], self.heads, self.dim // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
        """Returns the tokens [N, L, dim]; `bias` and `seen` have the shape of scores, or are broadcast to it."""
        gate, value, query, key = silu(self.project(self.norm(x))).chunk(4, dim=-1)
        scores = torch.matmul(self.split(query), self.split(key).transpose(2, 3)) + bias
        weights = silu(scores) / x.shape[1] * seen
        pooled = torch.matmul(weights, self.split(value)).transpose(1, 2).reshape(-1, x.shape[1], self.dim)
        return x + self.out(self.inner(pooled) * gate)


class HSTU(Ranker):
    """Bias by the distance of positions; causal, padding is not seen; the score is read off the candidate's token."""

    times = False
    scales: ClassVar = {
        "small": dict(history=10, vocab=60, actions=5, dim=8, heads=2, layers=2, hidden=(16,)),
        "industrial": dict(history=128, vocab=1000, actions=8, dim=64, heads=4, layers=3, hidden=(64,)),
    }

    def __init__(
        self, history: int, vocab: int, actions: int, dim: int, heads: int, layers: int, hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        length = history + 1
        self.item_table = Table(vocab, dim, padded=True)
        self.action_table = Table(actions, dim)
        self.positions = nn.Parameter(torch.empty(length, dim))
        self.layers = nn.ModuleList(HSTULayer(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = mlp((dim, *hidden), head=True)
        self.distances = nn.Parameter(torch.empty(2 * length - 1))
        at = torch.arange(length)
        self.register_buffer("distance", at.unsqueeze(0) - at.unsqueeze(1) + length - 1, persistent=False)
        self.register_buffer("causal", torch.ones(length, length).tril(), persistent=False)
        self.specs = [
            ids("hist_ids", vocab, history),
            ids("hist_actions", actions, history),
            ids("item_id", vocab, low=1),
        ]
        if self.times:
            self.time_bias = Table(BUCKETS, 1, std=0.25)
            self.specs.insert(2, InputSpec("hist_ages", "float32", ("N", history), "request", 0.0, 1000.0))

    def forward(self, hist_ids: Tensor, hist_actions: Tensor, *rest: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        item_id = rest[-1]
        history = self.item_table(hist_ids) + self.action_table(hist_actions)
        x = torch.cat([history, self.item_table(item_id).unsqueeze(1)], dim=1) + self.positions
        bias = self.distances[self.distance]
        if self.times:
            ages = torch.cat([rest[0], torch.zeros_like(rest[0][:, :1])], dim=1)
            apart = torch.log1p((ages.unsqueeze(1) - ages.unsqueeze(2)).abs()) / math.log(2)
            bucket = apart.to(torch.int64).clamp(0, BUCKETS - 1)
            bias = (bias + self.time_bias(bucket).squeeze(-1)).unsqueeze(1)
        valid = torch.cat([hist_ids != 0, torch.ones_like(item_id, dtype=torch.bool).unsqueeze(1)], dim=1)
        seen = self.causal * valid.to(x.dtype).unsqueeze(1).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, bias, seen)
        return torch.sigmoid(self.head(self.norm(x)[:, -1]))


class HSTUTime(HSTU):
    """Bias by position and by the logarithm of the time between two events, looked up per request."""

    times = True
