"""The models of the study: the same features and fixed head around different blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from odelayers import Adjoint, Dopri5, DropoutSDEBlock, EulerMaruyama, ODEBlock, SineField, simplex_head

__all__ = ["Block", "Classifier", "Features", "attacked", "surrogate"]

DIM = 64
CLASSES = 10
IDENTITY, ADJOINT = "identity", "adjoint"
ANY_DRIFT = Adjoint(max_drift=1e30)  # an attack may follow a wrong gradient: what it finds is judged on the model


class Residual(nn.Module):
    """Two 3x3 convolutions beside a 1x1 shortcut; halves the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H/2, W/2)."""
        return relu(self.main(x) + self.shortcut(x))


class Features(nn.Sequential):
    """An 8-layer ResNet from images (B, 1, 28, 28) to states (B, 64) in (-1, 1)."""

    def __init__(self, widths: tuple[int, int, int]) -> None:
        first, second, third = widths
        super().__init__(
            nn.Conv2d(1, first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(inplace=True),
            Residual(first, first),
            Residual(first, second),
            Residual(second, third),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * third, DIM),
            nn.Tanh(),
        )
        self.to(memory_format=torch.channels_last)  # a quarter faster on a CPU

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, 28, 28) to states (B, 64)."""
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Staircase(nn.Module):
    """Round the state to multiples of `step`: a made-up defence whose gradient is zero everywhere."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step

    def forward(self, z: Tensor) -> Tensor:
        """Round (B, 64)."""
        return torch.round(z / self.step) * self.step


@dataclass(frozen=True)
class Block:
    """What stands between features and head, as data.

    `kind` is "none", "ode" (adaptive), "sde" (dropout noise with drop probability `p`, fixed steps) or "staircase".
    """

    kind: str
    t1: float = 10.0
    tolerance: float = 1e-5
    steps: int = 20
    p: float = 0.0
    staircase: float = 0.1

    def build(self) -> nn.Module:
        """The block itself, with fresh weights.

        Raises:
            ValueError: `kind` is unknown.
        """
        if self.kind not in BUILDERS:
            raise ValueError(f"Block.kind: expected one of {', '.join(map(repr, BUILDERS))}, got {self.kind!r}")
        return BUILDERS[self.kind](self)


def _sde(spec: Block) -> nn.Module:
    solver = EulerMaruyama(steps=spec.steps)
    return DropoutSDEBlock(SineField(DIM), spec.p, t1=spec.t1, solver=solver, noise_in_eval=True)


BUILDERS: dict[str, Callable[[Block], nn.Module]] = {
    "none": lambda spec: nn.Identity(),
    "ode": lambda spec: ODEBlock(SineField(DIM), t1=spec.t1, solver=Dopri5(rtol=spec.tolerance, atol=spec.tolerance)),
    "sde": _sde,
    "staircase": lambda spec: Staircase(spec.staircase),
}


class Classifier(nn.Module):
    """head(block(features(x))); the head's class vectors are a fixed regular simplex."""

    def __init__(self, widths: tuple[int, int, int], block: Block) -> None:
        super().__init__()
        self.spec = block
        self.features = Features(widths)
        self.block = block.build()
        self.head = simplex_head(CLASSES, DIM)

    @property
    def noisy(self) -> bool:
        """Whether two calls differ."""
        return self.spec.kind == "sde" and self.spec.p > 0

    @property
    def routes(self) -> tuple[str | float, ...]:
        """The ways around the block's own gradient.

        They are the identity, for a solver a tenth of the end time, and the adjoint where the solver has one.
        """
        if self.spec.kind not in ("ode", "sde"):
            return () if self.spec.kind == "none" else (IDENTITY,)
        return (IDENTITY, self.spec.t1 / 10, *([ADJOINT] if ANY_DRIFT.accepts(self.block.solver) else []))

    def end(self, z: Tensor, generator: torch.Generator | None = None, t1: float | None = None) -> Tensor:
        """The block's end state (B, 64) from `z`; noise comes from `generator`, and `t1` replaces the end time."""
        if self.spec.kind in ("ode", "sde"):
            return self.block.solve(z, t1=t1, generator=generator).final
        return self.block(z)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (B, 10) of images (B, 1, 28, 28)."""
        return self.head(self.end(self.features(x), generator))


def attacked(model: Classifier, draws: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """The model as an attack sees it: logits (B, 10), or (draws, B, 10) where it draws noise (features shared)."""

    def logits(x: Tensor) -> Tensor:
        z = model.features(x)
        return _shaped(model, model.head(model.end(_draws(model, z, draws), generator)), len(x))

    return logits


def surrogate(
    model: Classifier, route: str | float, draws: int, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """The same logits with the adjoint's gradient, or as if the block were the identity or ended at time `route`.

    Raises:
        ValueError: the route is the adjoint, and the block's solver has none.
    """
    block = copy.copy(model.block)  # the same field and weights
    if route == ADJOINT:
        if not ANY_DRIFT.accepts(block.solver):
            raise ValueError(f"surrogate: {block.solver!r} has no adjoint; take one of the routes {model.routes}")
        block.gradient = ANY_DRIFT

    def logits(x: Tensor) -> Tensor:
        z = _draws(model, model.features(x), draws)
        with torch.no_grad():
            end = model.end(z, generator)
        t1 = None if route == ADJOINT else route
        detour = z if route == IDENTITY else block.solve(z, t1=t1, generator=generator).final
        return _shaped(model, model.head(detour + (end - detour).detach()), len(x))

    return logits


def _draws(model: Classifier, z: Tensor, draws: int) -> Tensor:
    return z.repeat(draws, 1) if model.noisy else z


def _shaped(model: Classifier, logits: Tensor, batch: int) -> Tensor:
    return logits.reshape(-1, batch, CLASSES) if model.noisy else logits
