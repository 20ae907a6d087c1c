"""SIM: the few actions of a long history that are most like the candidate, found first, attended to second."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, SelfAttention, Table, ids, mlp


class SIM(Ranker):
    """Soft search by inner products and TopK, then attention of several heads on what was found."""

    scales: ClassVar = {
        "small": dict(user=4, item=2, history=16, vocab=50, actions=5, dim=8, heads=2, found=4, hidden=(16, 8)),
        "industrial": dict(
            user=12, item=6, history=400, vocab=1000, actions=8, dim=32, heads=4, found=32, hidden=(256, 128)
        ),
    }

    def __init__(
        self,
        user: int,
        item: int,
        history: int,
        vocab: int,
        actions: int,
        dim: int,
        heads: int,
        found: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.item_table, self.action_table = Table(vocab, dim, padded=True), Table(actions, dim)
        self.search_item, self.search_history = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.found = found
        self.attention = SelfAttention(dim, heads)
        self.deep = mlp((self.fields.width + 2 * dim, *hidden), head=True)
        self.specs = [
            ids("user_ids", vocab, user),
            ids("hist_ids", vocab, history),
            ids("hist_actions", actions, history),
            ids("item_ids", vocab, item),
            ids("item_id", vocab, low=1),
        ]

    def forward(
        self, user_ids: Tensor, hist_ids: Tensor, hist_actions: Tensor, item_ids: Tensor, item_id: Tensor
    ) -> Tensor:
        """Returns click probabilities [N, 1]."""
        item = self.item_table(item_id)
        history = self.item_table(hist_ids) + self.action_table(hist_actions)
        scores = torch.matmul(self.search_history(history), self.search_item(item).unsqueeze(2)).squeeze(2)
        scores = torch.where(hist_ids == 0, -1e9, scores)
        best, index = scores.topk(self.found, dim=1)
        chosen = torch.gather(history, 1, index.unsqueeze(2).expand(-1, -1, history.shape[2]))
        mask = torch.where(best < -1e8, -1e9, 0.0).unsqueeze(1).unsqueeze(1)
        pooled = self.attention(item.unsqueeze(1), chosen, mask).squeeze(1)
        return torch.sigmoid(self.deep(torch.cat([self.fields((user_ids, item_ids)).flatten(1), item, pooled], dim=1)))
