"""Building blocks shared by the models, and their initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from models.spec import InputSpec, sample

Layout = Literal["vector", "column", "matrix", "joint"]


class Ranker(nn.Module):
    """Base of all models: sizes by scale, inputs and outputs by name."""

    scales: ClassVar[dict[str, dict[str, Any]]] = {}
    specs: list[InputSpec]
    output_names: tuple[str, ...] = ("score",)


class Table(nn.Embedding):
    """An embedding table that knows the standard deviation its rows should have."""

    def __init__(self, rows: int, dim: int, std: float = 0.5, padded: bool = False) -> None:
        super().__init__(rows, dim, padding_idx=0 if padded else None)
        self.std = std


def mlp(sizes: Sequence[int], head: bool = False) -> nn.Sequential:
    """Linear and ReLU layers through `sizes`; with `head`, one more linear layer to a single logit."""
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    if head:
        layers.append(nn.Linear(sizes[-1], 1))
    return nn.Sequential(*layers)


def pair_indices(count: int) -> tuple[list[int], list[int]]:
    """All pairs i < j, in row order."""
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return [i for i, _ in pairs], [j for _, j in pairs]


class Fields(nn.Module):
    """Looks up the categorical fields of user and item and stacks them to [N, fields, dim].

    Exporters meet ids in several layouts, and each leaves a different graph:
        vector: one input [N] and one table per field; unsqueezed and concatenated.
        column: the same with inputs [N, 1].
        matrix: an id matrix and a table with per-field offsets for either side, joined after the lookup.
        joint: two id matrices joined before the lookup in one table.

    With `interleaved`, user and item fields alternate along the field axis (vector and column layouts).
    """

    def __init__(
        self,
        user: int,
        item: int,
        vocab: int,
        dim: int,
        layout: Layout = "vector",
        std: float = 0.5,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.user_count, self.item_count, self.dim, self.layout = user, item, dim, layout
        self.count, self.width = user + item, (user + item) * dim
        order = [("user", i) for i in range(user)] + [("item", i) for i in range(item)]
        if interleaved:
            order.sort(key=lambda f: (f[1] + 0.5) / (user if f[0] == "user" else item))
        self.order = order
        self.user_positions = [k for k, (level, _) in enumerate(order) if level == "user"]
        self.item_positions = [k for k, (level, _) in enumerate(order) if level == "item"]
        self.specs: list[InputSpec] = []
        if layout in ("vector", "column"):
            tail = () if layout == "vector" else (1,)
            self.user_tables = nn.ModuleList(Table(vocab, dim, std) for _ in range(user))
            self.item_tables = nn.ModuleList(Table(vocab, dim, std) for _ in range(item))
            self.specs += [ids(f"user_{i}", vocab, *tail) for i in range(user)]
            self.specs += [ids(f"item_{i}", vocab, *tail) for i in range(item)]
        else:
            self.specs += [ids("user_ids", vocab, user), ids("item_ids", vocab, item)]
            if layout == "joint":
                self.table = Table((user + item) * vocab, dim, std)
                self.register_buffer("offsets", vocab * torch.arange(user + item).unsqueeze(0), persistent=False)
            else:
                self.user_table = Table(user * vocab, dim, std)
                self.item_table = Table(item * vocab, dim, std)
                self.register_buffer("user_offsets", vocab * torch.arange(user).unsqueeze(0), persistent=False)
                self.register_buffer("item_offsets", vocab * torch.arange(item).unsqueeze(0), persistent=False)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Returns [N, fields, dim] from the id inputs in the order of `specs`."""
        if self.layout == "joint":
            return self.table(torch.cat(list(inputs), dim=1) + self.offsets)
        if self.layout == "matrix":
            return torch.cat([self.user(inputs), self.item(inputs)], dim=1)
        join = torch.stack if self.layout == "vector" else torch.cat
        return join([self._field(level, i, inputs) for level, i in self.order], dim=1)

    def user(self, inputs: Sequence[Tensor]) -> Tensor:
        """Returns the user fields alone, [rows, user fields, dim]."""
        return self._group("user", inputs)

    def item(self, inputs: Sequence[Tensor]) -> Tensor:
        """Returns the item fields alone, [N, item fields, dim]."""
        return self._group("item", inputs)

    def _group(self, level: str, inputs: Sequence[Tensor]) -> Tensor:
        is_user = level == "user"
        if self.layout == "joint":
            part = self.offsets[:, : self.user_count] if is_user else self.offsets[:, self.user_count :]
            return self.table(inputs[0 if is_user else 1] + part)
        if self.layout == "matrix":
            if is_user:
                return self.user_table(inputs[0] + self.user_offsets)
            return self.item_table(inputs[1] + self.item_offsets)
        join = torch.stack if self.layout == "vector" else torch.cat
        count = self.user_count if is_user else self.item_count
        return join([self._field(level, i, inputs) for i in range(count)], dim=1)

    def _field(self, level: str, i: int, inputs: Sequence[Tensor]) -> Tensor:
        if level == "user":
            return self.user_tables[i](inputs[i])
        return self.item_tables[i](inputs[self.user_count + i])


def ids(name: str, vocab: int, *tail: int, low: int = 0) -> InputSpec:
    """An int64 id input [N, *tail]; its level follows from the name."""
    level = "candidate" if name.startswith("item_") else "request"
    return InputSpec(name, "int64", ("N", *tail), level, low, vocab)


def dense(name: str, width: int) -> InputSpec:
    """A float32 input [N, width] in [-1, 1); its level follows from the name."""
    level = "candidate" if name.startswith("item_") else "request"
    return InputSpec(name, "float32", ("N", width), level, -1.0, 1.0)


class SelfAttention(nn.Module):
    """Multi-head attention written out, so that every exporter emits plain MatMul and Softmax."""

    def __init__(self, dim: int, heads: int, head_dim: int | None = None, project: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim or dim // heads
        inner = self.heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(dim, inner) for _ in range(3))
        self.out = nn.Linear(inner, dim) if project else nn.Identity()

    def split(self, x: Tensor) -> Tensor:
        """[N, L, heads * d] to [N, heads, L, d]."""
        return x.reshape(-1, x.shape[1], self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attends from `x` to `keys`.

        `mask` is added to the scores [N, heads, L, keys]; one of booleans says which of them are hidden.
        """
        q, k, v = self.split(self.query(x)), self.split(self.key(keys)), self.split(self.value(keys))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        context = torch.matmul(scores.softmax(dim=-1), v).transpose(1, 2)
        return self.out(context.reshape(-1, x.shape[1], self.heads * self.head_dim))


class RMSNorm(nn.Module):
    """Root mean square normalisation, written out since not every exporter knows an operator for it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Divides [..., dim] by the root of its mean square."""
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6) * self.weight


def initialise(module: Ranker, seed: int) -> None:
    """Sets reproducible random weights under which activations stay of order one, and eval mode.

    Scales are powers of two and shifts multiples of 1/8, so that the last bits of a statistic, which differ
    between machines, change nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float, mean: float = 0.0) -> None:
        tensor.copy_(mean + std * torch.randn(tensor.shape, generator=generator))

    with torch.no_grad():
        for part in module.modules():
            for name, value in part.named_parameters(recurse=False):
                if isinstance(part, Table):
                    normal(value, part.std)
                    if part.padding_idx is not None:
                        value[part.padding_idx] = 0.0
                elif isinstance(part, (nn.LayerNorm, nn.BatchNorm1d, RMSNorm)):
                    normal(value, 0.2, 1.0 if name == "weight" else 0.0)
                elif isinstance(part, nn.PReLU):
                    value.fill_(0.25)
                elif value.dim() < 2:
                    normal(value, 0.1)
                else:
                    # torch layers keep [out, in, ...]; free parameters here are [..., in, out].
                    layer = isinstance(part, (nn.Linear, nn.GRU, nn.GRUCell, nn.Conv1d))
                    fan_in = math.prod(value.shape[1:]) if layer else value.shape[-2]
                    normal(value, fan_in**-0.5)
            if isinstance(part, nn.BatchNorm1d):
                normal(part.running_mean, 0.2)
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
        module.eval()
        _calibrate(module)


def _calibrate(module: Ranker) -> None:
    """Shifts and scales every linear layer so that its output has a mean near zero and a spread near one."""
    seen: set[nn.Module] = set()

    def rescale(layer: nn.Module, _: object, output: Tensor) -> Tensor | None:
        if layer in seen:
            return None
        seen.add(layer)
        axis = 1 if isinstance(layer, nn.Conv1d) else output.dim() - 1
        others = [k for k in range(output.dim()) if k != axis]
        mean = output.mean(dim=others, keepdim=True) if layer.bias is not None else torch.zeros(1)
        spread = float((output - mean).pow(2).mean().sqrt())
        if not spread > 1e-6:
            return None
        factor = 2.0 ** round(-math.log2(spread))
        shift = torch.round(8 * factor * mean) / 8
        layer.weight.mul_(factor)
        if layer.bias is not None:
            # A little is left, so that no unit is exactly centred.
            layer.bias.mul_(factor).sub_(0.75 * shift.flatten())
        return output * factor - 0.75 * shift

    hooks = [m.register_forward_hook(rescale) for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
    feeds = [
        torch.cat([torch.from_numpy(sample(module.specs, 4, seed)[s.name]) for seed in range(16)]) for s in module.specs
    ]
    module(*feeds)
    for hook in hooks:
        hook.remove()
