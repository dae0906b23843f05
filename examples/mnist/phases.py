"""Recipes of training as data: phases, their optimisers, and what a phase minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .adversary import Adversary
from .penalties import Penalty

__all__ = ["SGD", "Adam", "ClippedAdam", "Phase"]

TRAINS = ("all", "block", "head")


@dataclass(frozen=True)
class Adam:
    """Adam, or AMSGrad, with torch's defaults but for these."""

    amsgrad: bool = False
    eps: float = 1e-8

    def build(self, weights: list[Tensor], lr: float) -> torch.optim.Optimizer:
        """The optimiser of these weights."""
        return torch.optim.Adam(weights, lr, eps=self.eps, amsgrad=self.amsgrad)


@dataclass(frozen=True)
class ClippedAdam(Adam):
    """Adam on gradients cut down to a norm of at most `norm`."""

    norm: float = 1.0

    def build(self, weights: list[Tensor], lr: float) -> torch.optim.Optimizer:
        """The optimiser of these weights."""

        def cut(*_: Any) -> None:
            clip_grad_norm_(weights, self.norm)

        optimiser = super().build(weights, lr)
        optimiser.register_step_pre_hook(cut)
        return optimiser


@dataclass(frozen=True)
class SGD:
    """Gradient descent with momentum."""

    momentum: float = 0.9
    weight_decay: float = 0.0

    def build(self, weights: list[Tensor], lr: float) -> torch.optim.Optimizer:
        """The optimiser of these weights."""
        return torch.optim.SGD(weights, lr, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class Phase:
    """`epochs` over what is trained: "all", or the "block" or "head" alone, on what enters it computed once.

    With `one_cycle` the learning rate rises to `lr` and falls to nearly 0 over the phase; else it is constant. The loss
    is `cross_entropy` times the cross-entropy plus the `penalty`; 0 leaves the penalty alone. An `adversary` makes it
    adversarial training. With `average` the phase ends at the moving average of its weights with that decay.
    """

    trains: str
    epochs: int
    lr: float = 1e-3
    batch: int = 128
    one_cycle: bool = False
    optimiser: Adam | SGD = Adam()
    cross_entropy: float = 1.0
    penalty: Penalty | None = None
    adversary: Adversary | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        if self.trains not in TRAINS:
            raise ValueError(f"Phase.trains: expected {', '.join(map(repr, TRAINS))}, got {self.trains!r}")
        if self.adversary and self.trains != "all":
            raise ValueError(f"Phase.adversary: attacks images, so the phase trains 'all', got {self.trains!r}")
        if not (self.cross_entropy > 0 or self.penalty):
            raise ValueError("Phase.cross_entropy: expected a weight > 0 where there is no penalty")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(f"Phase.average: expected a decay in (0, 1), got {self.average}")

    def schedule(self, optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate over `steps` steps. (A OneCycleLR changes the optimiser as soon as it is made.)"""
        if self.one_cycle:
            return torch.optim.lr_scheduler.OneCycleLR(optimiser, self.lr, total_steps=steps + 1)
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
