"""Adversarial attacks on any model that maps images in [0, 1] to logits.

The gradient may come from a surrogate of the model (`gradient_from`, as in BPDA: Athalye et al. 2018), but success is
always judged on the model itself. A model that draws noise keeps drawing it: gradients average over `eot` draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["Attack", "Model", "Threat", "fgsm", "input_gradient", "margin", "perturb", "project"]

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Threat:
    """What an attacker may do: move an image by at most `eps` in the norm "linf" or "l2", inside [0, 1]."""

    norm: str
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"Threat.norm: expected 'linf' or 'l2', got {self.norm!r}")
        if not self.eps > 0:
            raise ValueError(f"Threat.eps: expected a number > 0, got {self.eps}")

    def __str__(self) -> str:
        return f"{'L-inf' if self.norm == 'linf' else 'L2'} {self.eps:g}"


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on a loss: "ce" or "margin", `restarts` runs of `steps` steps.

    A step has length `rate * eps / steps`. The first run starts at the image if `random_start` is False, else every
    run starts at a random point of the ball.
    """

    loss: str = "ce"
    steps: int = 40
    restarts: int = 1
    rate: float = 2.5
    random_start: bool = True
    eot: int = 1

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"Attack.loss: expected one of {', '.join(map(repr, LOSSES))}, got {self.loss!r}")
        for name in ("steps", "restarts", "eot"):
            if getattr(self, name) < 1:
                raise ValueError(f"Attack.{name}: expected an int >= 1, got {getattr(self, name)}")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Best wrong logit minus the right one, (B,): positive where the sample is misclassified."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return others.amax(1) - own.squeeze(1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


LOSSES = {"ce": _cross_entropy, "margin": margin}


def fgsm(eps: float) -> tuple[Threat, Attack]:
    """The fast gradient sign method (Goodfellow et al. 2015) as the one-step case."""
    return Threat("linf", eps), Attack("ce", steps=1, rate=1.0, random_start=False)


def project(x: Tensor, centre: Tensor, threat: Threat) -> Tensor:
    """The point of the ball around `centre`, cut to [0, 1], that `x` is moved to; (B, ...) as given.

    Cutting to [0, 1] comes last and never leaves the ball, as `centre` lies in [0, 1].
    """
    change = x - centre
    if threat.norm == "linf":
        change = change.clamp(-threat.eps, threat.eps)
    else:
        length = _length(change)
        change = change * (threat.eps / length.clamp(min=threat.eps))
    return (centre + change).clamp(0, 1)


def _length(v: Tensor) -> Tensor:
    """Per-sample L2 norm of (B, ...), shaped to broadcast against it."""
    return v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))


def _ascent(gradient: Tensor, norm: str) -> Tensor:
    """The direction of unit norm that raises the loss most; zero where the gradient is zero."""
    if norm == "linf":
        return gradient.sign()
    length = _length(gradient)
    return torch.where(length > 0, gradient / length.clamp(min=torch.finfo(gradient.dtype).tiny), 0)


def _random_point(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    if threat.norm == "linf":
        change = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) * 2 - 1
    else:  # uniform in the ball: uniform direction, radius by the volume
        change = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        radius = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype) ** (1 / x[0].numel())
        change = change / _length(change) * radius.reshape(-1, *[1] * (x.ndim - 1))
    return project(x + threat.eps * change, x, threat)


def input_gradient(model: Model, x: Tensor, labels: Tensor, loss: str = "ce", eot: int = 1) -> tuple[Tensor, Tensor]:
    """Gradient of the loss with respect to `x`, and the margin, both averaged over `eot` draws of the model's noise."""
    copies = x.detach().repeat(eot, *[1] * (x.ndim - 1)).requires_grad_()
    logits = model(copies)
    repeated = labels.repeat(eot)
    (gradient,) = torch.autograd.grad(LOSSES[loss](logits, repeated).sum(), copies)
    if not torch.isfinite(gradient).all():
        raise RuntimeError(f"the gradient of the {loss} loss is not finite: this attack would prove nothing")
    return gradient.reshape(eot, *x.shape).mean(0), margin(logits.detach(), repeated).reshape(eot, -1).mean(0)


def perturb(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: Threat,
    attack: Attack,
    generator: torch.Generator,
    *,
    gradient_from: Model | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """Attack `model` at `images` (B, ...) in [0, 1]; returns the adversarial images, the best found per sample.

    "Best" is the largest margin on `model` met on the way (mean over `eot` draws). Where the model is deterministic, a
    sample that is misclassified is done. `tick` is called before each step. `gradient_from` replaces the model in gradients.

    Raises:
        RuntimeError: a gradient is not finite.
    """
    best, best_margin = images.clone(), torch.full(labels.shape, float("-inf"), device=images.device)

    def keep(rows: Tensor, x: Tensor, found: Tensor) -> None:
        better = found > best_margin[rows]
        best[rows[better]], best_margin[rows[better]] = x[better], found[better]

    step = attack.rate * threat.eps / attack.steps
    for restart in range(attack.restarts):
        rows = _unbroken(best_margin, attack.eot)
        if not len(rows):
            break
        x = images[rows]
        if attack.random_start or restart:
            x = _random_point(x, threat, generator)
        for _ in range(attack.steps):
            if not len(rows):
                break
            tick()
            gradient, found = input_gradient(gradient_from or model, x, labels[rows], attack.loss, attack.eot)
            if gradient_from is not None:
                found = _judge(model, x, labels[rows], attack.eot)
            keep(rows, x, found)
            rows, x, gradient = _still(attack.eot, found, rows, x, gradient)
            x = project(x + step * _ascent(gradient, threat.norm), images[rows], threat)
        if len(rows):
            keep(rows, x, _judge(model, x, labels[rows], attack.eot))
    return best


def _unbroken(margins: Tensor, eot: int) -> Tensor:
    """Indices of the samples worth attacking: all under noise, else those not misclassified yet."""
    return torch.arange(len(margins), device=margins.device) if eot > 1 else (margins <= 0).nonzero().squeeze(1)


def _still(eot: int, found: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
    keep = _unbroken(found, eot)
    return tuple(item[keep] for item in batch)


@torch.no_grad()
def _judge(model: Model, x: Tensor, labels: Tensor, draws: int) -> Tensor:
    """Mean margin on the model itself over `draws` draws of its noise, (B,)."""
    return torch.stack([margin(model(x), labels) for _ in range(draws)]).mean(0)
