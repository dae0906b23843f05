"""The loss of a phase of training, as a module: one forward pass from inputs to a number."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from odelayers import Solution

from .adversary import TRADES, Adversary
from .models import Classifier
from .penalties import Penalty

__all__ = ["Objective"]


class Objective(nn.Module):
    """`weight` times the cross-entropy, plus the penalty, plus TRADES' term where the adversary is one.

    Inputs are images where `trains` is "all", else what enters the block or the head. It is a module so that
    DistributedDataParallel can wrap it; its parameters are the model's.
    """

    def __init__(
        self,
        model: Classifier,
        trains: str,
        weight: float,
        penalty: Penalty | None,
        adversary: Adversary | None,
        noise: torch.Generator,
        draws: torch.Generator,
    ) -> None:
        super().__init__()
        self.model, self.trains, self.weight, self.penalty, self.adversary = model, trains, weight, penalty, adversary
        self.noise, self.draws = noise, draws

    def forward(self, inputs: Tensor, labels: Tensor, adversarial: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the loss and the penalty in it, 0-d tensors; `adversarial` are the images of the adversary."""
        if self.trains == "head":
            loss = self.weight * cross_entropy(self.model.head(inputs), labels)
            return loss, torch.zeros_like(loss)
        trades = self.adversary is not None and self.adversary.loss == TRADES
        learnt = inputs if adversarial is None or trades else adversarial
        z = self.model.features(learnt) if self.trains == "all" else inputs
        # Before any solve: processes meet in batch normalisation, and one whose solve fails would leave others waiting.
        moved = self.model.features(adversarial) if trades else None
        end, solution = self._solved(z)
        loss = z.new_zeros(())
        if self.weight:
            answers = self.model.head(end)
            loss = self.weight * cross_entropy(answers, labels)
            if trades:
                loss = loss + self.adversary.distance(answers, self.model.head(self.model.end(moved, self.noise)))
        penalty = self.penalty(self.model, z, labels, solution, self.draws) if self.penalty else torch.zeros_like(loss)
        return loss + penalty, penalty

    def _solved(self, z: Tensor) -> tuple[Tensor, Solution | None]:
        """The end state and, where the penalty asks for it, the solve; `z` itself where nothing asks for either."""
        if self.penalty is None or not (self.penalty.via or self.penalty.running):
            return (self.model.end(z, self.noise) if self.weight else z), None
        t1 = self.model.spec.t1
        ts = [0.0, *(share * t1 for share in self.penalty.via), t1] if self.penalty.via else None
        with torch.set_grad_enabled(self.weight > 0):
            solution = self.model.block.solve(z, ts, generator=self.noise, running=self.penalty.running)
        return solution.final, solution
