"""SPSA: gradient ascent on an estimate from values of the loss alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import Best, Method, Model, Threat, Tick, ascent, check_finite, margin, over_draws, project, rewind

__all__ = ["SPSA"]

CHUNK = {"cpu": 512, "cuda": 8192}  # images asked at once: on a CPU 2048 were a third slower, as they leave the cache
FIRST, SECOND = 0.9, 0.999  # Adam's decay of the two moments


@dataclass(frozen=True)
class SPSA(Method):
    """Ascent on the margin by simultaneous perturbation stochastic approximation.

    A step asks at x + delta v and x - delta v for `samples` vectors v of random signs, also where these leave [0, 1],
    and averages (difference of the margins) / (2 delta) v. Asks `steps * (2 * samples + 1)` times in all.

    The step of length `rate * eps / steps` is Adam's under an L-inf threat, as published; under L2 it is a unit step
    along Adam's first moment: divided by the second it would be a step of signs, which points elsewhere.

    Source: Uesato et al., Adversarial Risk and the Dangers of Evaluating Against Weak Attacks, ICML 2018.
    """

    gradients = "none"

    steps: int = 100
    samples: int = 128
    delta: float = 0.01
    rate: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "steps", "samples")
        self._positive("delta", "rate")

    def __str__(self) -> str:
        return f"SPSA {self.steps}x{self.samples}"

    @property
    def ticks(self) -> int:
        """One a step."""
        return self.steps

    def search(
        self, best: Best, images: Tensor, threat: Threat, generator: torch.Generator, source: Model | None, tick: Tick
    ) -> None:
        """See `Method.search`."""
        rows = best.left()
        x, moments = (
            images[rows],
            torch.zeros(2, len(rows), *images.shape[1:], device=images.device, dtype=images.dtype),
        )
        step = self.rate * threat.eps / self.steps
        for t in range(1, self.steps + 1):
            if not len(rows):
                break
            tick()
            gradient = self._estimate(best.model, x, best.labels[rows], best.draws or 1, generator)
            moments[0].lerp_(gradient, 1 - FIRST)
            moments[1].lerp_(gradient.square(), 1 - SECOND)
            x = project(x + step * _direction(moments, t, threat.norm), images[rows], threat)
            left = best.undone(best.judge(rows, x))
            rows, x, moments = rows[left], x[left], moments[:, left]

    @torch.no_grad()
    def _estimate(self, model: Model, x: Tensor, labels: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        total, flat = torch.zeros_like(x.flatten(1)), x.flatten(1)
        most = max(1, CHUNK.get(x.device.type, 512) // draws)  # signs asked about at once, over all rows
        for part in torch.arange(len(x), device=x.device).split(most):
            once = max(1, most // len(part))
            for start in range(0, self.samples, once):
                n = min(once, self.samples - start)
                shape = (n, len(part), flat.shape[1])
                signs = torch.randint(2, shape, generator=generator, device=x.device).to(x.dtype).mul_(2).sub_(1)
                up, down = self._both(model, flat[part], self.delta * signs, labels[part].repeat(n), x.shape[1:])
                total[part] += torch.einsum("nr,nrd->rd", (up - down) / (2 * self.delta), signs)
        return (total / self.samples).view_as(x)

    def _both(
        self, model: Model, x: Tensor, change: Tensor, labels: Tensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """The margins (n, R) at x + change and at x - change, over the same draws of a noisy model."""
        again = rewind(model)

        def margins(asked: Tensor) -> Tensor:
            again()
            logits = model(asked.reshape(-1, *shape))
            check_finite(logits)
            return over_draws(margin(logits, labels)).view(len(change), -1)

        return margins(x + change), margins(x - change)


def _direction(moments: Tensor, t: int, norm: str) -> Tensor:
    first, second = moments[0] / (1 - FIRST**t), moments[1] / (1 - SECOND**t)
    return ascent(first, norm) if norm == "l2" else first / (second.sqrt() + torch.finfo(first.dtype).tiny)
