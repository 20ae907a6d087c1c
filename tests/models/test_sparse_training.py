"""Masks keep their budgets, hold against any optimiser, find what is planted, and go on to the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from models.sparse_training import Entries, Rows, SparseTraining, Units, unit_share
from models.training import fit

OPTIMISERS: dict[str, Callable] = {
    "adam": lambda p: torch.optim.Adam(p, 0.02, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02),
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
}


class Net(torch.nn.Module):
    """A table, and an MLP of two hidden layers."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.table = torch.nn.Embedding(40, 10)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 1)
        )

    def forward(self, ids):
        return torch.sigmoid(self.mlp(self.table(ids).flatten(1)))

    def targets(self, kind: str) -> list:
        if kind == "entries":
            return [
                Entries(self.table.weight, 0.1),
                Entries(self.mlp[0].weight, 0.25),
                Entries(self.mlp[2].weight, 0.1),
            ]
        units = [Units(self.mlp[0], self.mlp[2], 0.25), Units(self.mlp[2], self.mlp[4], 0.5)]
        return [Rows(self.table.weight, 0.3), *units]


def _rows(count: int = 300, seed: int = 0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 40, (count, 2))
    return torch.from_numpy(ids), torch.from_numpy((ids.sum(1, keepdims=True) % 3 == 0).astype(np.float32))


def _budgets(net: Net, kind: str) -> list[int]:
    """Weights that are not 0; of the table in the fullest row, as what grew in a row is 0 until it is looked up."""
    if kind == "entries":
        return [int((p != 0).sum()) for p in (net.table.weight, net.mlp[0].weight, net.mlp[2].weight)]
    return [
        int((net.table.weight != 0).sum(1).max()),
        *(int(layer.weight.any(0).sum()) for layer in (net.mlp[2], net.mlp[4])),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["entries", "structure"])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_budgets_are_exact_and_masks_hold_at_every_step(kind: str, name: str) -> None:
    net = Net()
    targets = net.targets(kind)
    masks = SparseTraining(OPTIMISERS[name](net.parameters()), targets, 60, every=5, seed=1)
    began = [t.keep.clone() for t in targets]
    wanted = [40, 80, 19] if kind == "entries" else [3, 4, 6]
    assert [t.each for t in targets] == wanted
    ids, labels = _rows()
    for step in range(60):
        masks.optimiser.zero_grad()
        batch = slice(step % 5 * 60, step % 5 * 60 + 60)
        torch.nn.functional.binary_cross_entropy(net(ids[batch]), labels[batch]).backward()
        masks.step()
        for target in targets:
            assert (target.keep.sum(1) == target.each).all()
            for p, hidden in target.spread(~target.keep):
                assert not p[hidden].any()
        assert all(a <= b for a, b in zip(_budgets(net, kind), wanted, strict=True))
    assert _budgets(net, kind) == wanted
    assert all((a != t.keep).any() for a, t in zip(began, targets, strict=True))


def test_what_grows_starts_at_nothing() -> None:
    """New weights are 0, and Adam remembers nothing of them, nor of what went."""
    net = Net()
    target = Entries(net.mlp[0].weight, 0.25)
    masks = SparseTraining(torch.optim.Adam(net.parameters(), 0.02), [target], 100, every=4)
    ids, labels = _rows()
    for step in range(8):
        before = target.keep.clone()
        masks.optimiser.zero_grad()
        torch.nn.functional.binary_cross_entropy(net(ids), labels).backward()
        slope = net.mlp[0].weight.grad.clone()
        masks.step()
        changed = (before != target.keep).reshape(net.mlp[0].weight.shape)
        assert bool(changed.any()) == (step in (3, 7))
        held = masks.optimiser.state[net.mlp[0].weight]
        assert not net.mlp[0].weight[changed].any() and not held["exp_avg"][changed].any()
        assert not held["exp_avg_sq"][changed].any()
        if changed.any():
            grown = (target.keep & ~before).reshape(changed.shape)
            off = slope.abs()[~before.reshape(changed.shape) & ~grown]
            assert slope.abs()[grown].min() >= off.max()  # the largest of the batch's gradient


def test_rows_that_were_not_looked_up_stay() -> None:
    net = Net()
    target = Rows(net.table.weight, 0.3)
    masks = SparseTraining(torch.optim.Adam(net.parameters(), 0.02), [target], 10, every=1)
    ids, labels = _rows(50)
    ids = ids % 7
    before, weights = target.keep.clone(), net.table.weight.detach().clone()
    torch.nn.functional.binary_cross_entropy(net(ids), labels).backward()
    masks.step()
    assert (before[7:] == target.keep[7:]).all() and (weights[7:] == net.table.weight[7:]).all()
    assert (before[:7] != target.keep[:7]).any()


def test_static_masks_do_not_move_and_pruned_ones_are_the_largest() -> None:
    net = Net()
    target = Entries(net.mlp[0].weight, 0.1)
    masks = SparseTraining(torch.optim.Adam(net.parameters(), 0.02), [target], 20, every=0)
    before = target.keep.clone()
    ids, labels = _rows()
    for _ in range(10):
        masks.optimiser.zero_grad()
        torch.nn.functional.binary_cross_entropy(net(ids), labels).backward()
        masks.step()
    assert (before == target.keep).all()
    dense = Net(1)
    weight = dense.mlp[0].weight.detach().clone().abs().flatten()
    target = Entries(dense.mlp[0].weight, 0.1)
    target.prune()
    assert weight[target.keep[0]].min() >= weight[~target.keep[0]].max() and (dense.mlp[0].weight != 0).sum() == 32


def _planted_entries():
    """The weight that a linear teacher has, 3 of 32 in each of 8 rows; the same for both kinds."""
    rng = np.random.default_rng(3)
    weight = np.zeros((8, 32), np.float32)
    for row in weight:
        row[rng.permutation(32)[:3]] = rng.choice([-2.0, -1.5, 1.5, 2.0], 3)
    return torch.from_numpy(weight)


@pytest.mark.parametrize("kind", [Entries, Rows])
def test_planted_support_is_found(kind: type) -> None:
    truth = _planted_entries()
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 8, bias=False)
    target = kind(layer.weight, 3 / 32)
    masks = SparseTraining(torch.optim.Adam(layer.parameters(), 0.05), [target], 400, every=10)
    began = int((target.keep.reshape(8, 32) & (truth != 0)).sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        x = torch.randn(128, 32, generator=generator)
        masks.optimiser.zero_grad()
        (layer(x) - x @ truth.T).pow(2).mean().backward()
        masks.step()
    assert began < 10
    assert torch.equal(target.keep.reshape(8, 32), truth != 0)


def test_planted_units_are_found() -> None:
    """Of 20 units, 16 of which have no output that could help, the other 4 are kept."""
    torch.manual_seed(0)
    first, second = torch.nn.Linear(6, 20), torch.nn.Linear(20, 1)
    useful = torch.randperm(20)[:4]
    teacher = copy.deepcopy(first)
    with torch.no_grad():
        keep = torch.zeros(20, dtype=torch.bool)
        keep[useful] = True
        first.weight[~keep], first.bias[~keep] = 0.01 * first.weight[~keep], 0.0
    for p in first.parameters():
        p.register_hook(lambda g: g * 0)  # the units are given; which are read is to be found
    target = Units(first, second, 0.2)
    masks = SparseTraining(torch.optim.Adam([*first.parameters(), *second.parameters()], 0.05), [target], 150, every=5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        x = torch.randn(128, 6, generator=generator)
        with torch.no_grad():
            y = torch.relu(teacher(x))[:, useful].sum(1, keepdim=True)
        masks.optimiser.zero_grad()
        (second(torch.relu(first(x))) - y).pow(2).mean().backward()
        masks.step()
    assert set(target.keep[0].nonzero().flatten().tolist()) == set(useful.tolist())
    masks.finish()
    assert first.weight.any(1).sum() == 4 and second.weight.any(0).sum() == 4 and (first.bias != 0).sum() == 4


@pytest.mark.parametrize("kind", ["entries", "structure"])
def test_a_checkpoint_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    inputs, labels = _rows(400)
    broken = 17

    def trained(stop: bool, path: Path | None) -> tuple[Net, list]:
        net = Net()
        targets = net.targets(kind)

        def wrap(optimiser, steps):
            made = SparseTraining(optimiser, targets, steps, every=3, seed=2)
            step = made.step

            def counted() -> None:
                if stop and made.count == broken:
                    raise KeyboardInterrupt
                step()

            made.step = counted
            return made

        fit(net, [inputs], labels, epochs=4, seed=5, batch=64, wrap=wrap, checkpoint=path)
        return net, targets

    whole, masks = trained(False, None)
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        trained(True, path)
    again, others = trained(False, path)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(masks, others, strict=True))


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    inputs, labels = _rows(400)
    values = [0.2, 0.5, 0.3, 0.4]

    def trained(epochs: int, seen: list[float], path: Path | None = None) -> Net:
        net = Net()

        def watch() -> float:
            assert not net.training
            if path is not None and len(seen) == 2:
                raise KeyboardInterrupt  # the epoch behind the best one
            seen.append(values[len(seen)])
            return seen[-1]

        fit(net, [inputs], labels, epochs=epochs, seed=5, batch=64, checkpoint=path, watch=watch)
        return net

    found: list[float] = []
    best = trained(4, found)
    assert found == values
    last = Net()
    fit(last, [inputs], labels, epochs=4, seed=5, batch=64)
    assert not any(torch.equal(a, b) for a, b in zip(best.parameters(), last.parameters(), strict=True))
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        trained(4, [], path)
    again = Net()
    fit(again, [inputs], labels, epochs=4, seed=5, batch=64, checkpoint=path, watch=iter(values[2:]).__next__)
    assert all(torch.equal(a, b) for a, b in zip(best.parameters(), again.parameters(), strict=True))


def test_other_targets_do_not_go_on() -> None:
    net = Net()
    made = SparseTraining(torch.optim.SGD(net.parameters(), 0.1), net.targets("entries"), 10)
    other = SparseTraining(torch.optim.SGD(net.parameters(), 0.1), net.targets("structure"), 10)
    with pytest.raises(ValueError, match="other targets"):
        other.load_state_dict(made.state_dict())


def test_units_for_a_density() -> None:
    for sizes in ((224, 256, 256, 1), (64, 32, 1), (10, 20, 30, 40, 1)):
        share = unit_share(sizes, 0.1)
        widths = [sizes[0], *(share * k for k in sizes[1:-1]), 1]
        kept = sum(a * b for a, b in pairwise(widths))
        assert kept == pytest.approx(0.1 * sum(a * b for a, b in pairwise(sizes)))


def test_bad_targets() -> None:
    with pytest.raises(ValueError, match="density"):
        Entries(torch.nn.Parameter(torch.ones(3)), 0)
    with pytest.raises(ValueError, match="not read"):
        Units(torch.nn.Linear(3, 4), torch.nn.Linear(5, 1), 0.5)
    table = torch.nn.Embedding(4, 4, sparse=True)
    masks = SparseTraining(torch.optim.SGD(table.parameters(), 0.1), [Rows(table.weight, 0.5)], 10)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradient"):
        masks.step()
