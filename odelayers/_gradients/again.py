"""What gradients share that take the steps again in the backward pass: one node of the graph, pulled back by steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._gradients.base import cut
from odelayers._gradients.setting import Setting
from odelayers._solvers.base import Invertible, MarchingSolver, Path

__all__ = ["Gradients", "Replay", "plus"]

Gradients = list[Tensor | None]


def plus(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two gradients, where None is none."""
    return other if one is None else one if other is None else one + other


class Replay(ABC):
    """One solve as its backward pass needs it: what was solved, and how to come back through its steps."""

    solver: MarchingSolver | Invertible

    def __init__(self, f: Evaluator, ts: Sequence[float], driver: Driver) -> None:
        self.f, self.ts, self.driver = f, tuple(ts), driver
        self.wanted: list[Tensor] = []
        self.steps: list[Any] = []
        self.accepted = self.rejected = 0
        self.row_steps: Tensor | None = None

    @abstractmethod
    def forward(self, z0: Tensor) -> Tensor:
        """The states at ts, with the steps recorded and counted."""

    @abstractmethod
    def release(self) -> list[Tensor]:
        """Hand over the states that were kept: autograd frees them when the backward pass is done."""

    @abstractmethod
    def hold(self, states: list[Tensor]) -> None:
        """Take back what `release` handed over."""

    @abstractmethod
    def through_steps(self, z0: Tensor, gradient: Tensor, total: Gradients) -> Tensor | None:
        """The gradient with respect to the state that the first step began with; `total` gets the wanted tensors'."""

    def path(self, z0: Tensor) -> Path:
        """Solve from z0 as one node of the graph, where anything asks for a gradient."""
        originals: list[Tensor] = []
        if torch.is_grad_enabled():
            self.driver, originals, self.wanted = cut(self.f, self.driver)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (z0, *originals)):
            self.setting = Setting(self.f, self.driver, z0.device, originals, self.wanted)
            zs: Tensor = _Replayed.apply(self, z0, *originals)  # type: ignore[no-untyped-call]
        else:
            zs = self.forward(z0)
        return Path(zs, self.accepted, self.rejected, self.row_steps)

    def backward(self, z0: Tensor, gradient: Tensor) -> Gradients:
        """The gradients with respect to z0 and the wanted tensors."""
        total: Gradients = [None] * len(self.wanted)
        if not self.steps:  # every row was at rest to begin with
            return [gradient[0], *total]
        return [plus(gradient[0], self.through_steps(z0, gradient, total)), *total]

    def pull_back(
        self,
        values: Sequence[Tensor],
        arriving: Gradients,
        leaves: Sequence[Tensor],
        total: Gradients,
        retain: bool = False,
    ) -> Gradients:
        """Pull the arriving gradients back to the leaves, and add what the wanted tensors get to `total`.

        The graph ends here, unless what it is made of is to be retained.
        """
        used = [(v, g) for v, g in zip(values, arriving, strict=True) if g is not None and v.requires_grad]
        roots, grads = zip(*used, strict=True)
        found = torch.autograd.grad(roots, [*leaves, *self.wanted], grads, retain_graph=retain, allow_unused=True)
        for i, g in enumerate(found[len(leaves) :]):
            total[i] = plus(total[i], g)
        return list(found[: len(leaves)])


class _Replayed(torch.autograd.Function):
    """The solve as one node of the graph, whose backward pass takes the steps again."""

    @staticmethod
    def forward(ctx: Any, solve: Replay, z0: Tensor, *originals: Tensor) -> Tensor:
        ctx.solve = solve
        with solve.setting.restored():
            zs = solve.forward(z0)
        solve.setting.check_still()
        ctx.save_for_backward(z0, *solve.release())
        return zs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        solve: Replay = ctx.solve
        z0, *states = ctx.saved_tensors
        with solve.setting.again(gradient, z0) as spoilt:
            if spoilt:
                return None, *spoilt
            solve.hold(states)
            found = solve.backward(z0, gradient)
            solve.release()
        return None, *found
