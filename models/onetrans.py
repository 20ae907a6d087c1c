"""OneTrans: one transformer over the history's tokens, the user's and the candidate's, causal and narrowing."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, RMSNorm, Table, ids, mlp


class MixedLinear(nn.Module):
    """Tokens of the sequence share one matrix, each of the last `own` tokens has its own."""

    def __init__(self, own: int, width: int, out: int) -> None:
        super().__init__()
        self.own = own
        self.shared = nn.Linear(width, out)
        self.weight = nn.Parameter(torch.empty(own, width, out))
        self.bias = nn.Parameter(torch.empty(own, 1, out))

    def forward(self, x: Tensor) -> Tensor:
        """Maps [N, L, width] to [N, L, out]."""
        history, rest = x[:, : -self.own], x[:, -self.own :]
        rest = (torch.matmul(rest.transpose(0, 1), self.weight) + self.bias).transpose(0, 1)
        return torch.cat([self.shared(history), rest], dim=1)


class OneTransLayer(nn.Module):
    """Queries are the last `keep` tokens only; what comes before them is read as keys and then dropped."""

    def __init__(self, dim: int, heads: int, own: int, keep: int) -> None:
        super().__init__()
        self.heads, self.dim, self.keep = heads, dim, keep
        self.norm1, self.norm2 = RMSNorm(dim), RMSNorm(dim)
        self.query, self.key_value = MixedLinear(own, dim, dim), MixedLinear(own, dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = MixedLinear(own, dim, 2 * dim), MixedLinear(own, 2 * dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """[N, L, dim] to [N, heads, L, dim / heads]."""
        return x.reshape(-1, x.shape[1], self.heads, self.dim // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Returns the last `keep` tokens, [N, keep, dim]."""
        y = self.norm1(x)
        key, value = self.key_value(y).chunk(2, dim=-1)
        q, k, v = self.split(self.query(y[:, -self.keep :])), self.split(key), self.split(value)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.dim // self.heads)
        scores = scores.masked_fill(hidden[:, :, -self.keep :, -x.shape[1] :], -math.inf)
        pooled = torch.matmul(scores.softmax(dim=-1), v).transpose(1, 2).reshape(-1, self.keep, self.dim)
        x = x[:, -self.keep :] + self.out(pooled)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class OneTrans(Ranker):
    """Tokens of history, separator, user and candidate; the causal mask shows the candidate to the last ones only."""

    scales: ClassVar = {
        "small": dict(
            user=4, item=3, history=9, vocab=50, actions=5, dim=8, heads=2, tokens=(2, 2), keep=(7, 5), hidden=(16,)
        ),
        "industrial": dict(
            user=20,
            item=8,
            history=127,
            vocab=1000,
            actions=8,
            dim=64,
            heads=4,
            tokens=(8, 4),
            keep=(96, 48, 12),
            hidden=(128,),
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
        tokens: tuple[int, int],
        keep: tuple[int, ...],
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.tokens, self.own, self.dim = tokens, sum(tokens), dim
        self.fields = Fields(user, item, vocab, dim, "matrix")
        self.item_table, self.action_table = Table(vocab, dim, padded=True), Table(actions, dim)
        self.separator = nn.Parameter(torch.empty(1, dim))
        self.positions = nn.Parameter(torch.empty(history, dim))
        self.user_tokens = nn.Linear(user * dim, tokens[0] * dim)
        self.item_tokens = nn.Linear((item + 1) * dim, tokens[1] * dim)
        self.layers = nn.ModuleList(OneTransLayer(dim, heads, self.own, k) for k in keep)
        self.norm = RMSNorm(dim)
        self.head = mlp((self.own * dim, *hidden), head=True)
        length = history + 1 + self.own
        at = torch.arange(length)
        self.register_buffer("later", at > at.unsqueeze(1), persistent=False)
        self.register_buffer("others", at != at.unsqueeze(1), persistent=False)
        self.specs = [
            ids("user_ids", vocab, user),
            ids("hist_ids", vocab, history),
            ids("hist_actions", actions, history),
            ids("item_ids", vocab, item),
            ids("item_id", vocab, 1, low=1),
        ]

    def forward(
        self, user_ids: Tensor, hist_ids: Tensor, hist_actions: Tensor, item_ids: Tensor, item_id: Tensor
    ) -> Tensor:
        """Returns click probabilities [N, 1]."""
        history = self.item_table(hist_ids) + self.action_table(hist_actions) + self.positions
        user = self.user_tokens(self.fields.user((user_ids, item_ids)).flatten(1))
        item = torch.cat([self.fields.item((user_ids, item_ids)), self.item_table(item_id)], dim=1)
        item = self.item_tokens(item.flatten(1))
        separator = self.separator.expand(hist_ids.shape[0], 1, self.dim)
        x = torch.cat([history, separator, *(t.reshape(-1, t.shape[1] // self.dim, self.dim) for t in (user, item))], 1)
        # A token always sees itself, so that no row of padding is without keys.
        padding = nn.functional.pad(hist_ids == 0, (0, 1 + self.own)).unsqueeze(1) & self.others
        hidden = (self.later | padding).unsqueeze(1)
        for layer in self.layers:
            x = layer(x, hidden)
        return torch.sigmoid(self.head(self.norm(x)[:, -self.own :].flatten(1)))
