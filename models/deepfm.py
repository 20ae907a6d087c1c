"""DeepFM: first order, factorisation machine and MLP on the same embeddings; plain and packed inputs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.layers import Fields, Ranker, Table, mlp
from models.spec import InputSpec, column_text


def fm_std(fields: int, dim: int) -> float:
    """Standard deviation of embeddings for which the sum of all pair products is of order one."""
    return (dim * fields * (fields - 1) / 2) ** -0.25


def fm(v: Tensor) -> Tensor:
    """Sum over all pairs of dot products, [N, F, D] to [N, 1]."""
    square_of_sum = v.sum(dim=1).pow(2)
    sum_of_squares = (v * v).sum(dim=1)
    return 0.5 * (square_of_sum - sum_of_squares).sum(dim=1, keepdim=True)


class DeepFM(Ranker):
    """Ids as one [N, 1] input per field."""

    scales: ClassVar = {
        "small": dict(user=6, item=3, vocab=50, dim=8, hidden=(32, 16)),
        "industrial": dict(user=24, item=12, vocab=1000, dim=32, hidden=(512, 256)),
    }

    def __init__(self, user: int, item: int, vocab: int, dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = Fields(user, item, vocab, 1, "column", std=0.1)
        self.fields = Fields(user, item, vocab, dim, "column", std=fm_std(user + item, dim))
        self.deep = mlp((self.fields.width, *hidden), head=True)
        self.specs = self.fields.specs

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        v = self.fields(inputs)
        logit = self.linear(inputs).sum(dim=1) + fm(v) + self.deep(v.flatten(1))
        return torch.sigmoid(logit)


class DeepFMPacked(Ranker):
    """All features as columns of one float matrix `X`, ids among them, request and candidate columns mixed.

    Every column is sliced out of X where it is used: once for the first-order part, once for the embeddings.
    """

    scales: ClassVar = {
        "small": dict(user=5, item=4, user_dense=2, item_dense=2, vocab=50, dim=8, hidden=(32, 16)),
        "industrial": dict(user=24, item=12, user_dense=13, item_dense=7, vocab=1000, dim=32, hidden=(512, 256)),
    }

    def __init__(
        self,
        user: int,
        item: int,
        user_dense: int,
        item_dense: int,
        vocab: int,
        dim: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.id_columns = user + item
        self.dense_columns = user_dense + item_dense
        self.linear = nn.ModuleList(Table(vocab, 1, 0.1) for _ in range(self.id_columns))
        self.tables = nn.ModuleList(Table(vocab, dim, fm_std(user + item, dim)) for _ in range(self.id_columns))
        self.linear_dense = nn.Linear(self.dense_columns, 1)
        self.deep = mlp((self.id_columns * dim + self.dense_columns, *hidden), head=True)
        total = self.id_columns + self.dense_columns
        request = _alternate(user, item, 0) + _alternate(user_dense, item_dense, self.id_columns)
        ranges = (
            (column_text(range(self.id_columns)), 0, vocab),
            (column_text(range(self.id_columns, total)), -1.0, 1.0),
        )
        self.specs = [InputSpec("X", "float32", ("N", total), "mixed", -1.0, vocab, column_text(request), ranges)]

    def forward(self, X: Tensor) -> Tensor:
        """Returns click probabilities [N, 1]."""
        first = torch.cat([table(self._column(X, i)) for i, table in enumerate(self.linear)], dim=-1)
        v = torch.cat([table(self._column(X, i)) for i, table in enumerate(self.tables)], dim=1)
        numbers = torch.cat(
            [X[:, self.id_columns + i : self.id_columns + i + 1] for i in range(self.dense_columns)], dim=-1
        )
        logit = first.sum(dim=-1) + self.linear_dense(numbers) + fm(v)
        logit = logit + self.deep(torch.cat([v.flatten(1), numbers], dim=-1))
        return torch.sigmoid(logit)

    @staticmethod
    def _column(packed: Tensor, i: int) -> Tensor:
        return packed[:, i : i + 1].long()


def _alternate(request: int, candidate: int, start: int) -> list[int]:
    """Columns of the request-level features when both kinds are spread evenly over one range of columns."""
    order = [(i + 0.5) / request for i in range(request)] + [(i + 0.51) / candidate for i in range(candidate)]
    ranked = sorted(range(len(order)), key=order.__getitem__)
    return [start + position for position, feature in enumerate(ranked) if feature < request]
