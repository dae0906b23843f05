"""Training in phases: epochs over images (the whole net) or over cached features (the block alone)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from odelayers import LyapunovRegularizer

from .data import Dataset, Split
from .models import Classifier
from .progress import bar

__all__ = ["Phase", "accuracy", "states", "train"]

EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Phase:
    """`epochs` of Adam over what is trained: "all", or the "block" alone on features computed once.

    With `one_cycle` the learning rate rises to `lr` and falls to nearly 0 over the phase; else it is constant.
    """

    trains: str
    epochs: int
    lr: float = 1e-3
    batch: int = 128
    one_cycle: bool = False

    def __post_init__(self) -> None:
        if self.trains not in ("all", "block"):
            raise ValueError(f"Phase.trains: expected 'all' or 'block', got {self.trains!r}")


def train(
    model: Classifier, data: Dataset, phases: tuple[Phase, ...], regularised: bool, seed: int, what: str
) -> list[dict[str, Any]]:
    """Train in place; returns one line per epoch: phase, steps, mean loss, the regulariser in it, validation accuracy.

    Order, noise and the regulariser's rows are drawn apart, so that models which differ in the noise alone see the same
    samples. The regulariser is added to the cross-entropy, at the states that enter the block, with SODEF's constants.
    """
    device = next(model.parameters()).device
    order = torch.Generator().manual_seed(seed)
    noise, rows = torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(seed)
    regularizer = partial(LyapunovRegularizer.sodef_mnist(), generator=rows) if regularised else None
    log = []
    for number, phase in enumerate(phases, 1):
        learner = _Learner(model, phase, data.train, regularizer, noise)
        for epoch in range(1, phase.epochs + 1):
            losses = learner.epoch(order, f"{what}: phase {number}/{len(phases)}, epoch {epoch}/{phase.epochs}")
            reached = accuracy(model, data.validation, noise)
            log.append({"phase": number, "trains": phase.trains, "epoch": epoch, **losses, "validation": reached})
    return log


class _Learner:
    """One phase: its inputs, its optimiser and its step."""

    def __init__(
        self,
        model: Classifier,
        phase: Phase,
        data: Split,
        regularizer: Callable[..., Tensor] | None,
        noise: torch.Generator,
    ) -> None:
        self.model, self.phase, self.regularizer, self.noise = model, phase, regularizer, noise
        self.whole = phase.trains == "all"
        self.inputs = data.images if self.whole else states(model, data.images)
        self.labels = data.labels
        trained = model if self.whole else model.block
        weights = [p for p in trained.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(weights, lr=phase.lr)
        total = phase.epochs * -(-len(data) // phase.batch)
        cycle = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, phase.lr, total_steps=total + 1)
        self.schedule = cycle if phase.one_cycle else torch.optim.lr_scheduler.ConstantLR(self.optimiser, factor=1.0)

    def epoch(self, order: torch.Generator, what: str) -> dict[str, Any]:
        self.model.train(self.whole)
        self.model.block.train()
        batches = torch.randperm(len(self.labels), generator=order).to(self.labels.device).split(self.phase.batch)
        sums = torch.zeros(2, device=self.labels.device)
        with bar(len(batches), what) as progress:
            for rows in batches:
                loss, penalty = self.step(self.inputs[rows], self.labels[rows])
                sums += torch.stack([loss, penalty])
                progress.update()
        loss, penalty = (sums / len(batches)).tolist()
        if not loss < float("inf"):
            raise RuntimeError(f"{what}: the mean loss is {loss}: training diverged; lower the phase's lr")
        return {"steps": len(batches), "loss": loss, "regulariser": penalty}

    def step(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        z = self.model.features(inputs) if self.whole else inputs
        loss = cross_entropy(self.model.head(self.model.end(z, self.noise)), labels)
        penalty = self.regularizer(self.model.block.f, z) if self.regularizer else torch.zeros_like(loss)
        self.optimiser.zero_grad()
        (loss + penalty).backward()
        self.optimiser.step()
        self.schedule.step()
        return (loss + penalty).detach(), penalty.detach()


@torch.no_grad()
def states(model: Classifier, images: Tensor) -> Tensor:
    """What enters the block, (N, 64), with the features in evaluation mode."""
    model.eval()
    return torch.cat([model.features(batch) for batch in images.split(EVALUATION_BATCH)])


@torch.no_grad()
def accuracy(model: Classifier, data: Split, noise: torch.Generator) -> float:
    """Share of samples classified rightly, one draw of the noise per sample."""
    z = states(model, data.images)
    ends = torch.cat([model.end(part, noise) for part in z.split(EVALUATION_BATCH)])
    return (model.head(ends).argmax(1) == data.labels).float().mean().item()
