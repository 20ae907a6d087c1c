"""Trains models of this package: the loop that scripts share, resumable to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

Optimiser = torch.optim.Optimizer


class Stepped(Protocol):
    """What is stepped: an optimiser, or something around one."""

    def step(self) -> Any: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def settle(module: nn.Module) -> None:
    """Draws new weights from torch's generator: small embeddings and torch's own for linear layers."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Embedding):
                part.weight.copy_(0.1 * torch.randn(part.weight.shape))
            elif isinstance(part, nn.Linear):
                part.reset_parameters()


def loss_of(module: nn.Module, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Mean log loss of the probabilities `[R, tasks]`, or tuple of `[R, 1]`, that a module gives."""
    made = module(*inputs)
    p = torch.cat([made] if isinstance(made, Tensor) else list(made), dim=1).clamp(1e-6, 1 - 1e-6)
    return nn.functional.binary_cross_entropy(p, labels)


def fit(
    module: nn.Module,
    inputs: Sequence[Tensor],
    labels: Tensor,
    *,
    epochs: int,
    seed: int,
    batch: int = 2048,
    rate: float = 4e-3,
    decay: float = 0.0,
    wrap: Callable[[Optimiser, int], Stepped] | None = None,
    checkpoint: Path | None = None,
    watch: Callable[[], float] | None = None,
    told: str | None = None,
) -> list[float]:
    """Trains by Adam under a one-cycle schedule; the module ends in eval mode.

    Args:
        module: Gives probabilities `[R, tasks]`.
        inputs: A tensor of R rows per argument of `forward`.
        labels: 0 or 1, `[R, tasks]`.
        epochs: Passes over the rows.
        seed: Of their order.
        batch: Rows per step.
        rate: Largest learning rate.
        decay: Weight decay.
        wrap: Gets the optimiser and the number of steps, and gives what is stepped in its place.
        checkpoint: A file that is written after every epoch; where it is there already, training goes on from it, to
            the same bits as without the break.
        watch: Judges the module after every epoch, on rows that are not trained on; it ends as it was when that was
            largest.
        told: What the progress bar says; none is shown without, or where there is no terminal.

    Returns:
        The mean loss of each epoch.
    """
    optimiser: Optimiser = torch.optim.Adam(module.parameters(), lr=rate / 2, weight_decay=decay)
    count = len(labels)
    each = -(-count // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=epochs * each)
    stepped: Stepped = wrap(optimiser, epochs * each) if wrap else optimiser
    generator = torch.Generator().manual_seed(seed)
    found: list[float] = []
    best: dict[str, Any] = {"value": -math.inf, "module": {}}
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for part, name in ((module, "module"), (stepped, "stepped"), (schedule, "schedule")):
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        found, best = state["losses"], state["best"]
    module.train()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    silent = told is None or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as progress:
        shown = progress.add_task(told or "", total=epochs * each, completed=len(found) * each)
        while len(found) < epochs:
            lost = 0.0
            for index in torch.randperm(count, generator=generator).split(batch):
                loss = loss_of(module, [a[index] for a in inputs], labels[index])
                optimiser.zero_grad()
                loss.backward()
                stepped.step()
                schedule.step()
                lost += loss.item() * len(index)
                progress.advance(shown)
            found.append(lost / count)
            if watch is not None:
                best = _better(module, watch, best)
            if checkpoint is not None:
                state = {"module": module.state_dict(), "stepped": stepped.state_dict(), "losses": found, "best": best}
                state |= {"schedule": schedule.state_dict(), "generator": generator.get_state()}
                beside = checkpoint.with_name(f"{checkpoint.name}.new")
                torch.save({**state, "torch": torch.get_rng_state()}, beside)
                beside.replace(checkpoint)
    if watch is not None:
        module.load_state_dict(best["module"])
    module.eval()
    return found


def _better(module: nn.Module, watch: Callable[[], float], best: dict[str, Any]) -> dict[str, Any]:
    """The module as it stands, if it is better than the best so far."""
    module.eval()
    value = watch()
    module.train()
    if value <= best["value"]:
        return best
    return {"value": value, "module": {k: v.clone() for k, v in module.state_dict().items()}}
