"""DMR: how well a user fits an item, once by an inner product with his profile and once by attention on his history."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, Table, ids


class DMR(Ranker):
    """Attention is additive: a vector times tanh of a sum of projections; its sum before the softmax is a feature."""

    scales: ClassVar = {
        "small": dict(user=4, item=2, history=8, vocab=50, dim=8, attention=8, hidden=(16, 8)),
        "industrial": dict(user=12, item=6, history=50, vocab=1000, dim=64, attention=64, hidden=(512, 256, 64)),
    }

    def __init__(
        self, user: int, item: int, history: int, vocab: int, dim: int, attention: int, hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.item_table, self.out_table = Table(vocab, dim, padded=True), Table(vocab, dim)
        self.positions = nn.Parameter(torch.empty(history, dim))
        # The profile's attention: position and history; the candidate's: candidate, position and history.
        self.position1, self.history1 = nn.Linear(dim, attention, bias=False), nn.Linear(dim, attention)
        self.score1 = nn.Linear(attention, 1, bias=False)
        self.profile = nn.Sequential(nn.Linear(dim, dim), nn.PReLU())
        self.item2, self.position2 = nn.Linear(dim, attention, bias=False), nn.Linear(dim, attention, bias=False)
        self.history2, self.score2 = nn.Linear(dim, attention), nn.Linear(attention, 1, bias=False)
        layers: list[nn.Module] = []
        width = self.fields.width + 3 * dim + 2
        for size in hidden:
            layers += [nn.Linear(width, size), nn.PReLU()]
            width = size
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1))
        self.specs = [
            ids("user_ids", vocab, user),
            ids("hist_ids", vocab, history),
            ids("item_ids", vocab, item),
            ids("item_id", vocab, 1, low=1),
        ]

    def forward(self, user_ids: Tensor, hist_ids: Tensor, item_ids: Tensor, item_id: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        history = self.item_table(hist_ids)
        hidden = (hist_ids == 0).unsqueeze(2)
        logits = self.score1(torch.tanh(self.position1(self.positions) + self.history1(history)))
        weights = logits.masked_fill(hidden, -1e9).softmax(dim=1)
        profile = self.profile((weights * history).sum(dim=1))
        fit = (profile * self.out_table(item_id).squeeze(1)).sum(dim=1, keepdim=True)
        item = self.item_table(item_id)
        sums = self.item2(item) + self.position2(self.positions) + self.history2(history)
        logits = self.score2(torch.tanh(sums))
        similar = torch.where(hidden, 0.0, logits).sum(dim=1)
        pooled = (logits.masked_fill(hidden, -1e9).softmax(dim=1) * history).sum(dim=1)
        parts = [self.fields((user_ids, item_ids)).flatten(1), item.squeeze(1), profile, pooled, fit, similar]
        return torch.sigmoid(self.deep(torch.cat(parts, dim=1)))
