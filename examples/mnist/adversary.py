"""The inner maximisation of adversarial training: images inside the ball that a model answers worst."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax

__all__ = ["PGD", "TRADES", "Adversary"]

PGD, TRADES = "pgd", "trades"


@dataclass(frozen=True)
class Adversary:
    """`steps` steps of length `step` up the loss, within `eps` in L-inf and inside [0, 1], as a phase of training.

    "pgd" trains on the images found (Madry et al., ICLR 2018); "trades" on the clean ones, plus `beta` times the
    divergence of the answers there from the answers on the images found (Zhang et al., ICML 2019), which are those of
    the largest divergence. Over the first `warm_up` share of the phase radius and step grow from 0: a net that meets
    the whole radius untrained may stay at the constant answer.
    """

    loss: str = PGD
    steps: int = 10
    step: float = 0.075
    eps: float = 0.3
    beta: float = 1.0
    warm_up: float = 0.3

    def __post_init__(self) -> None:
        if self.loss not in (PGD, TRADES):
            raise ValueError(f"Adversary.loss: expected {PGD!r} or {TRADES!r}, got {self.loss!r}")
        if self.steps < 1:
            raise ValueError(f"Adversary.steps: expected an int >= 1, got {self.steps}")
        if not (self.step > 0 and self.eps > 0 and self.beta > 0):
            raise ValueError(f"Adversary: step, eps and beta: expected numbers > 0, got {self}")
        if not 0 <= self.warm_up <= 1:
            raise ValueError(f"Adversary.warm_up: expected a share of the phase in [0, 1], got {self.warm_up}")

    def share(self, done: float) -> float:
        """What part of the radius holds when the share `done` of the phase is done."""
        return min(1.0, done / self.warm_up) if self.warm_up else 1.0

    def find(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator,
        share: float = 1.0,
    ) -> Tensor:
        """The images (B, ...) after the last step, from a random start, within `share` of the radius."""
        eps, step = share * self.eps, share * self.step
        ascend = self._divergence(model, images) if self.loss == TRADES else _error(labels)
        start = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        low, high = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
        x = (images + eps * (2 * start - 1)).clamp(0, 1)
        for _ in range(self.steps):
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(ascend(model(x)), x)
            x = (x.detach() + step * gradient.sign()).clamp(low, high)
        return x.detach()

    def distance(self, clean: Tensor, found: Tensor) -> Tensor:
        """TRADES' term: `beta` times the mean divergence of the answers on the images found from the clean ones."""
        return self.beta * kl_div(log_softmax(found, 1), softmax(clean, 1), reduction="batchmean")

    def _divergence(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.no_grad():
            clean = softmax(model(images), 1)
        return lambda logits: kl_div(log_softmax(logits, 1), clean, reduction="sum")


def _error(labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: cross_entropy(logits, labels, reduction="sum")
