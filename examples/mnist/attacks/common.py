"""What all attacks share: the threat, the losses, and the best image found so far for each sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = [
    "LOSSES",
    "Best",
    "Counted",
    "Method",
    "Model",
    "NotFinite",
    "Threat",
    "ascent",
    "margin",
    "over_draws",
    "project",
    "rewind",
]

Model = Callable[[Tensor], Tensor]
Tick = Callable[[], object]


def silent() -> None:
    """The tick of a run that nobody watches."""


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
class Method(ABC):
    """One attack as data; `kind` keeps its class's name in records, where two attacks may have the same numbers."""

    kind: str = field(init=False, repr=False)

    gradients: ClassVar[str] = "own"  # or of a stand-in; "none", or "another's" model

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", type(self).__name__)

    @property
    @abstractmethod
    def ticks(self) -> int:
        """The most calls of `tick` in one run; samples that are broken early make it fewer."""

    def run(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        threat: Threat,
        generator: torch.Generator,
        *,
        gradient_from: Model | None = None,
        tick: Tick = silent,
    ) -> Tensor:
        """Attack `model` at `images` (B, C, H, W) in [0, 1]; returns the adversarial images, the best found per sample.

        "Best" is the largest margin on `model` met on the way, the image itself included. A sample that is
        misclassified is done, unless the model draws noise: then one bad draw proves little, and every sample is
        attacked to the end. `gradient_from` stands in for the model in gradients.

        Raises:
            NotFinite: a gradient or a logit is not finite.
            ValueError: the attack has no use for `gradient_from`, or cannot do without.
        """
        if self.gradients == "none" and gradient_from is not None:
            raise ValueError(f"{self.kind} takes no gradient: gradient_from has no meaning here; leave it out")
        if self.gradients == "another's" and gradient_from is None:
            raise ValueError(f"{self.kind}: expected the model that the images are made on as gradient_from, got None")
        best = Best(model, images, labels)
        self.search(best, images, threat, generator, gradient_from, tick)
        return best.images

    @abstractmethod
    def search(
        self, best: Best, images: Tensor, threat: Threat, generator: torch.Generator, source: Model | None, tick: Tick
    ) -> None:
        """Find better images for `best`; `source` is what gradients come from, None for the model itself."""

    def _at_least(self, least: float, *names: str) -> None:
        for name in names:
            if not getattr(self, name) >= least:
                raise ValueError(f"{self.kind}.{name}: expected a number >= {least:g}, got {getattr(self, name)}")

    def _positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{self.kind}.{name}: expected a number > 0, got {getattr(self, name)}")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            expected = ", ".join(map(repr, choices))
            raise ValueError(f"{self.kind}.{name}: expected one of {expected}, got {getattr(self, name)!r}")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Best wrong logit minus the right one, (..., B): positive where the sample is misclassified."""
    right = one_hot(labels, logits.shape[-1]).bool()
    return logits.masked_fill(right, float("-inf")).amax(-1) - _right(logits, right)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(-1) - _right(logits, one_hot(labels, logits.shape[-1]).bool())


def _dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin over the gap from the first to the third logit: rescaling changes nothing (Croce and Hein 2020)."""
    if logits.shape[-1] < 3:
        raise ValueError(f"the dlr loss compares with the third largest logit: expected >= 3, got {logits.shape[-1]}")
    top = logits.topk(3, dim=-1).values
    return margin(logits, labels) / (top[..., 0] - top[..., 2] + 1e-12)


def _right(logits: Tensor, right: Tensor) -> Tensor:
    return logits.masked_fill(~right, 0).sum(-1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": _cross_entropy, "margin": margin, "dlr": _dlr}


def over_draws(values: Tensor) -> Tensor:
    """The mean over the draws of a noisy model's losses, (B,)."""
    return values if values.ndim == 1 else values.mean(0)


class NotFinite(RuntimeError):
    """A model cannot be attacked: a logit or a gradient is NaN or infinite."""


def check_finite(logits: Tensor) -> None:
    """Stop where the model answers NaN or inf: it would look robust."""
    if not torch.isfinite(logits).all():
        raise NotFinite("the model's logits are not finite: no attack on them would prove anything")


def project(x: Tensor, centre: Tensor, threat: Threat) -> Tensor:
    """The point of the ball around `centre`, cut to [0, 1], that `x` is moved to; (B, ...) as given.

    Cutting to [0, 1] comes last and never leaves the ball, as `centre` lies in [0, 1].
    """
    change = x - centre
    if threat.norm == "linf":
        change = change.clamp(-threat.eps, threat.eps)
    else:
        change = change * (threat.eps / length(change).clamp(min=threat.eps))
    return (centre + change).clamp(0, 1)


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Per-sample values (B,), shaped to broadcast against (B, ...)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def length(v: Tensor) -> Tensor:
    """Per-sample L2 norm of (B, ...), shaped to broadcast against it."""
    return beside(v.flatten(1).norm(dim=1), v)


def ascent(gradient: Tensor, norm: str) -> Tensor:
    """The direction of unit norm that raises the loss most; zero where the gradient is zero."""
    if norm == "linf":
        return gradient.sign()
    size = length(gradient)
    return torch.where(size > 0, gradient / size.clamp(min=torch.finfo(gradient.dtype).tiny), 0)


def random_point(x: Tensor, threat: Threat, generator: torch.Generator) -> Tensor:
    """A uniformly random point of the ball around `x`, cut to [0, 1]."""
    like = {"generator": generator, "device": x.device, "dtype": x.dtype}
    if threat.norm == "linf":
        change = torch.rand(x.shape, **like) * 2 - 1
    else:  # uniform in the ball: uniform direction, radius by the volume
        change = torch.randn(x.shape, **like)
        change = change / length(change) * beside(torch.rand(len(x), **like) ** (1 / x[0].numel()), x)
    return project(x + threat.eps * change, x, threat)


def rewind(model: Model) -> Callable[[], object]:
    """A call that takes the model's generator, if it says that it has one as `noise`, back to where it is now.

    Two images are told apart by far fewer draws if these are the same for both.
    """
    noise: torch.Generator | None = getattr(model, "noise", None)
    if noise is None:
        return silent
    state = noise.get_state()
    return lambda: noise.set_state(state)


class Best:
    """The best images found so far, `images` (B, ...): per sample the largest margin met on the model.

    `margins` (B,) are means over the model's draws, of which there are `draws`; None says that it draws no noise. Under
    noise the luckiest of many looks best: there an image is asked about again, and so is the one that it would replace,
    with the same draws (`compared`).
    """

    ASKS = 2  # times under noise, of `draws` draws each

    def __init__(self, model: Model, images: Tensor, labels: Tensor) -> None:
        self.model, self.labels = model, labels
        self.images = images.clone()
        logits = self._ask(images)
        self.draws = len(logits) if logits.ndim == 3 else None
        self.margins = over_draws(margin(logits, labels))

    def left(self) -> Tensor:
        """The rows that are still to be attacked."""
        return self.undone(self.margins).nonzero().squeeze(1)

    def undone(self, margins: Tensor) -> Tensor:
        """Which of these margins leave something to do: all under noise, where one bad draw proves little."""
        return margins <= 0 if self.draws is None else torch.ones_like(margins, dtype=torch.bool)

    def asked(self, rows: Tensor, x: Tensor) -> Tensor:
        """The margins (R,) on the model of images `x` (R, ...) of these rows, asked once."""
        return over_draws(margin(self._ask(x), self.labels[rows]))

    def compared(self, rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The margins of two images of each of these rows, under noise over the same draws."""
        again = rewind(self.model)
        first = self.asked(rows, x)
        again()
        return first, self.asked(rows, y)

    def judge(self, rows: Tensor, x: Tensor) -> Tensor:
        """The margins (R,) of images `x` (R, ...) of these rows; what is better is kept."""
        if self.draws is None:
            margins = self.asked(rows, x)
        else:
            pairs = [self.compared(rows, x, self.images[rows]) for _ in range(self.ASKS)]
            margins, self.margins[rows] = (torch.stack(each).mean(0) for each in zip(*pairs, strict=True))
        self.keep(rows, x, margins)
        return margins

    def keep(self, rows: Tensor, x: Tensor, margins: Tensor) -> None:
        """Keep what is better than the best so far."""
        better = margins > self.margins[rows]
        self.images[rows[better]], self.margins[rows[better]] = x[better], margins[better]

    @torch.no_grad()
    def _ask(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        check_finite(logits)
        return logits


class Counted:
    """A model that counts what it is asked: `queries` grows by one per image and draw."""

    def __init__(self, model: Model) -> None:
        self.model, self.queries = model, 0
        self.noise = getattr(model, "noise", None)

    def __call__(self, x: Tensor) -> Tensor:
        """The model's own answer."""
        logits = self.model(x)
        self.queries += logits.shape[:-1].numel()
        return logits
