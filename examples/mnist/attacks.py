"""Adversarial attacks on any model that maps images in [0, 1] to logits.

The gradient may come from a surrogate of the model (`gradient_from`, as in BPDA: Athalye et al. 2018), but success is
always judged on the model itself. A model that draws noise returns several draws at once, (draws, B, classes): losses,
and so gradients, are averaged over them (expectation over transformation, EOT), and the noise stays on throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

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

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"Attack.loss: expected one of {', '.join(map(repr, LOSSES))}, got {self.loss!r}")
        for name in ("steps", "restarts"):
            if getattr(self, name) < 1:
                raise ValueError(f"Attack.{name}: expected an int >= 1, got {getattr(self, name)}")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Best wrong logit minus the right one, (..., B): positive where the sample is misclassified."""
    right = one_hot(labels, logits.shape[-1]).bool()
    return logits.masked_fill(right, float("-inf")).amax(-1) - logits.masked_fill(~right, 0).sum(-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wrong = ~one_hot(labels, logits.shape[-1]).bool()
    return logits.logsumexp(-1) - logits.masked_fill(wrong, 0).sum(-1)


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


def input_gradient(model: Model, x: Tensor, labels: Tensor, loss: str = "ce") -> tuple[Tensor, Tensor]:
    """Gradient of the loss with respect to `x`, and the margin (B,); means over the draws where there are several.

    Raises:
        RuntimeError: the gradient is not finite.
    """
    x = x.detach().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(_over_draws(LOSSES[loss](logits, labels)).sum(), x)
    if not torch.isfinite(gradient).all():
        raise RuntimeError(f"the gradient of the {loss} loss is not finite: an attack that uses it would prove nothing")
    return gradient, _over_draws(margin(logits.detach(), labels))


def _over_draws(values: Tensor) -> Tensor:
    return values if values.ndim == 1 else values.mean(0)


@torch.no_grad()
def _judge(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """The margin on the model itself, (B,), mean over its draws."""
    logits = model(x)
    if not torch.isfinite(logits).all():
        raise RuntimeError("the model's logits are not finite: no attack on them would prove anything")
    return _over_draws(margin(logits, labels))


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

    "Best" is the largest margin on `model` met on the way, the image itself included. A sample that is misclassified is
    done, unless the model draws noise: then one bad draw proves little, and every sample is attacked to the end.
    `gradient_from` stands in for the model in gradients. `tick` is called before each step.

    Raises:
        RuntimeError: a gradient or a logit is not finite.
    """
    with torch.no_grad():
        noisy = model(images[:1]).ndim == 3
    best, best_margin = images.clone(), _judge(model, images, labels)

    def keep(rows: Tensor, x: Tensor, found: Tensor) -> None:
        better = found > best_margin[rows]
        best[rows[better]], best_margin[rows[better]] = x[better], found[better]

    def undone(margins: Tensor) -> Tensor:
        return torch.ones_like(margins, dtype=torch.bool) if noisy else margins <= 0

    step = attack.rate * threat.eps / attack.steps
    for restart in range(attack.restarts):
        rows = undone(best_margin).nonzero().squeeze(1)
        x = images[rows]
        if len(rows) and (attack.random_start or restart):
            x = _random_point(x, threat, generator)
        for _ in range(attack.steps):
            if not len(rows):
                break
            tick()
            gradient, found = input_gradient(gradient_from or model, x, labels[rows], attack.loss)
            if gradient_from is not None:
                found = _judge(model, x, labels[rows])
            keep(rows, x, found)
            left = undone(found)
            rows, x, gradient = rows[left], x[left], gradient[left]
            x = project(x + step * _ascent(gradient, threat.norm), images[rows], threat)
        if len(rows):
            keep(rows, x, _judge(model, x, labels[rows]))
    return best
