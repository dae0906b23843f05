"""Attacks that follow a gradient: FGSM and PGD, and the transfer of what they find on another model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import (
    LOSSES,
    Best,
    Method,
    Model,
    NotFinite,
    Threat,
    Tick,
    ascent,
    check_finite,
    margin,
    over_draws,
    project,
    random_point,
    silent,
)

__all__ = ["PGD", "Transfer", "fgsm", "input_gradient", "perturb"]


@dataclass(frozen=True)
class PGD(Method):
    """Projected gradient ascent on a loss ("ce", "margin" or "dlr"): `restarts` runs of `steps` steps.

    A step has length `rate * eps / steps`. The first run starts at the image if `random_start` is False, else every
    run starts at a random point of the ball (Madry et al. 2018).
    """

    loss: str = "ce"
    steps: int = 40
    restarts: int = 1
    rate: float = 2.5
    random_start: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("loss", tuple(LOSSES))
        self._at_least(1, "steps", "restarts")
        self._positive("rate")

    def __str__(self) -> str:
        if self.steps == 1 and not self.random_start:
            return f"FGSM {self.loss}"
        return f"PGD-{self.steps} {self.loss}" + (f" x{self.restarts}" if self.restarts > 1 else "")

    @property
    def ticks(self) -> int:
        """One a step."""
        return self.steps * self.restarts

    def search(
        self, best: Best, images: Tensor, threat: Threat, generator: torch.Generator, source: Model | None, tick: Tick
    ) -> None:
        """See `Method.search`."""
        step = self.rate * threat.eps / self.steps
        for restart in range(self.restarts):
            rows = best.left()
            x = images[rows]
            if len(rows) and (self.random_start or restart):
                x = random_point(x, threat, generator)
            for number in range(self.steps):
                if not len(rows):
                    break
                tick()
                gradient, found = input_gradient(source or best.model, x, best.labels[rows], self.loss)
                if best.draws is not None:
                    if number in (3 * self.steps // 4, 7 * self.steps // 8):  # and at the end: judging costs draws
                        best.judge(rows, x)
                elif source is None:
                    best.keep(rows, x, found)
                else:
                    found = best.judge(rows, x)
                left = best.undone(found)
                rows, x, gradient = rows[left], x[left], gradient[left]
                x = project(x + step * ascent(gradient, threat.norm), images[rows], threat)
            if len(rows):
                best.judge(rows, x)


def fgsm(eps: float) -> tuple[Threat, PGD]:
    """The fast gradient sign method (Goodfellow et al. 2015) as the one-step case."""
    return Threat("linf", eps), PGD("ce", steps=1, rate=1.0, random_start=False)


def input_gradient(model: Model, x: Tensor, labels: Tensor, loss: str = "ce") -> tuple[Tensor, Tensor]:
    """Gradient of the loss with respect to `x`, and the margin (B,); means over the draws where there are several.

    Raises:
        NotFinite: the gradient or a logit is not finite.
    """
    x = x.detach().requires_grad_()
    logits = model(x)
    check_finite(logits)
    (gradient,) = torch.autograd.grad(over_draws(LOSSES[loss](logits, labels)).sum(), x)
    if not torch.isfinite(gradient).all():
        raise NotFinite(f"the gradient of the {loss} loss is not finite: an attack that uses it would prove nothing")
    return gradient, over_draws(margin(logits.detach(), labels))


def perturb(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    attack: Method,
    generator: torch.Generator,
    *,
    gradient_from: Model | None = None,
    tick: Tick = silent,
) -> Tensor:
    """`attack.run`, with the attack among the arguments."""
    return attack.run(model, images, labels, threat, generator, gradient_from=gradient_from, tick=tick)


@dataclass(frozen=True)
class Transfer(Method):
    """Images made on another model, `gradient_from`, and shown to the model once (Papernot et al. 2016).

    On the other model the attack goes on to its end: an image that just crosses one boundary seldom crosses two.
    """

    gradients = "another's"

    attack: Method = PGD("margin", 40)

    def __str__(self) -> str:
        return f"transfer {self.attack}"

    @property
    def ticks(self) -> int:
        """Those of the attack on the other model."""
        return self.attack.ticks

    def search(
        self, best: Best, images: Tensor, threat: Threat, generator: torch.Generator, source: Model | None, tick: Tick
    ) -> None:
        """See `Method.search`; `source` is the other model."""
        made = self.craft(source, images, best.labels, threat, generator, tick)
        best.judge(torch.arange(len(images), device=images.device), made)

    def craft(
        self, source: Model, images: Tensor, labels: Tensor, threat: Threat, generator: torch.Generator, tick: Tick
    ) -> Tensor:
        """The images (B, ...) that are made on `source`: the same whatever model they are shown to."""

        def draws(x: Tensor) -> Tensor:  # a model with draws is never done
            logits = source(x)
            return logits if logits.ndim == 3 else logits.unsqueeze(0)

        return self.attack.run(draws, images, labels, threat, generator, tick=tick)
