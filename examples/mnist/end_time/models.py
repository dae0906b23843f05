"""The blog's network: a convolution, a pooling to 7x7, an ODE on that state, and a linear head."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import fractional_max_pool2d

from odelayers import ConvField, Dopri5, Midpoint, ODEBlock

__all__ = ["EndTimeNet", "FractionalPool", "Steps"]

CLASSES, SIDE = 10, 7


class FractionalPool(nn.Module):
    """Fractional 2x2 max pooling of (B, C, H, W) to (B, C, 7, 7); the regions are random (Graham, 2014).

    In training every call draws them, per image and channel. In evaluation they are fixed, drawn once per channel, so
    that a model gives one answer; `draws` switches the drawing on there too, as torch's own module has it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        fixed = torch.rand(1, channels, 2, generator=torch.Generator().manual_seed(0))
        self.register_buffer("fixed", fixed, persistent=False)
        self.draws = False

    def forward(self, x: Tensor) -> Tensor:
        """Pool (B, C, H, W)."""
        regions = None if self.training or self.draws else self.fixed.expand(len(x), -1, -1)
        return fractional_max_pool2d(x, 2, SIDE, _random_samples=regions)


@dataclass(frozen=True)
class Steps:
    """How an ODE is stepped: by Dopri5 at `tolerance`, or, where that is None, by the midpoint rule on a graded grid.

    The grid has `density` steps per unit of log(1 + t). The field normalises its input, so it turns with the direction
    of the state alone, and the more slowly the larger the state has grown: equal steps in t would waste most of them.
    """

    tolerance: float | None = None
    density: float = 0.0

    def __post_init__(self) -> None:
        if (self.tolerance is None) == (self.density == 0):
            raise ValueError(f"Steps: expected either a tolerance or a density, got {self!r}")

    def __str__(self) -> str:
        if self.tolerance is not None:
            return f"Dopri5 at {self.tolerance:g}"
        return f"midpoint, {self.density:g} steps per unit of log(1 + t)"

    def solver(self) -> Dopri5 | Midpoint:
        """The solver object; the midpoint rule takes the output times as its grid."""
        return Midpoint(steps=1) if self.tolerance is None else Dopri5(rtol=self.tolerance, atol=self.tolerance)

    def times(self, ends: Sequence[float]) -> tuple[list[float], list[int]]:
        """The times to ask a solve for, from 0, and where among them the given ends are."""
        times, places = [0.0], []
        for start, end in pairwise([0.0, *ends]):
            a, b = math.log1p(start), math.log1p(end)
            steps = max(1, math.ceil(self.density * (b - a)))
            times += [math.expm1(a + (b - a) * k / steps) for k in range(1, steps)] + [end]
            places.append(len(times) - 1)
        return times, places


class EndTimeNet(nn.Module):
    """head(z(t)) of dz/dt = f(z), z(0) = pool(norm(conv(x))): 17,418 parameters with 16 channels, 655,370 with 128.

    Source: Rajat Vadiraj Dwaraknath, "Neural ODEs and adversarial attacks" (2019).
    """

    def __init__(self, channels: int, steps: Steps) -> None:
        super().__init__()
        self.steps = steps
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels))
        self.pool = FractionalPool(channels)
        self.block = ODEBlock(ConvField(channels), solver=steps.solver())
        self.head = nn.Linear(channels * SIDE * SIDE, CLASSES)

    def start(self, x: Tensor) -> Tensor:
        """The state (B, C, 7, 7) at time 0, of images (B, 1, 28, 28) in [0, 1]."""
        return self.pool(self.stem(x - 0.5))

    def states(self, x: Tensor, ends: Sequence[float]) -> Tensor:
        """The states (T, B, C, 7, 7) at increasing times `ends` > 0."""
        times, places = self.steps.times(ends)
        return self.block.solve(self.start(x), ts=times).zs[places]

    def read(self, z: Tensor) -> Tensor:
        """Logits (..., 10) of states (..., C, 7, 7)."""
        return self.head(z.flatten(-3))

    def forward(self, x: Tensor, end: float) -> Tensor:
        """Logits (B, 10) at the time `end`."""
        return self.read(self.states(x, [end])[0])

    def at(self, end: float) -> Callable[[Tensor], Tensor]:
        """The classifier with its end time fixed, as an attack sees it."""
        return lambda x: self(x, end)
