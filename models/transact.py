"""TransAct: a transformer over recent actions, each beside the candidate's embedding, under a full cross network."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.bst import EncoderLayer
from models.layers import Fields, Ranker, Table, ids, mlp


class TransAct(Ranker):
    """The newest tokens and the maximum over all of them go on, beside the other fields."""

    scales: ClassVar = {
        "small": dict(
            user=3, item=2, history=8, vocab=50, actions=5, dim=4, heads=2, layers=2, newest=2, cross=2, hidden=(16,)
        ),
        "industrial": dict(
            user=16,
            item=6,
            history=50,
            vocab=1000,
            actions=8,
            dim=32,
            heads=2,
            layers=2,
            newest=10,
            cross=2,
            hidden=(256, 128),
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
        layers: int,
        newest: int,
        cross: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.item_table, self.action_table = Table(vocab, dim, padded=True), Table(actions, dim)
        self.newest, wide = newest, 2 * dim
        self.encoders = nn.ModuleList(EncoderLayer(wide, heads, wide) for _ in range(layers))
        self.out = nn.Linear(wide, wide)
        width = self.fields.width + dim + (newest + 1) * wide
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(cross))
        self.deep = mlp((width, *hidden), head=True)
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
        candidate = self.item_table(item_id)
        actions = self.item_table(hist_ids) + self.action_table(hist_actions)
        tokens = torch.cat([actions, candidate.unsqueeze(1).expand(-1, hist_ids.shape[1], -1)], dim=2)
        mask = torch.where(hist_ids == 0, -1e9, 0.0).unsqueeze(1).unsqueeze(1)
        for encoder in self.encoders:
            tokens = encoder(tokens, mask)
        pooled = self.out(tokens.max(dim=1).values)
        parts = [self.fields((user_ids, item_ids)).flatten(1), candidate, tokens[:, : self.newest].flatten(1), pooled]
        x0 = x = torch.cat(parts, dim=1)
        for layer in self.cross:
            x = x0 * layer(x) + x
        return torch.sigmoid(self.deep(x))
