"""Checkpointing: keep the state before every step, take each step again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._gradients.base import Gradient, Setting, check_cotangent, cut
from odelayers._solvers.base import MarchingSolver, Path, Solver, State, Step, row_rms

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint(Gradient):
    """Backpropagate through the steps taken, keeping one state a step and evaluating the rest again.

    The memory saver that is always right: the gradient is that of `Backprop` up to rounding, for about one forward
    solve more. Noise is drawn again from its seed. The gradient cannot be differentiated twice.

    Raises:
        GradientError: from the solve, if the field depends on a tensor captured by a closure; from the backward pass,
            if the incoming gradient is NaN or inf.

    Source: Griewank and Walther, Evaluating Derivatives, chapter 12 (one level).

    Example:
        >>> Checkpoint()
        Checkpoint()
    """

    def accepts(self, solver: Solver) -> bool:
        return isinstance(solver, MarchingSolver)

    def solve(self, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> Path:
        if not isinstance(solver, MarchingSolver):
            raise TypeError(f"Checkpoint: expected a solver of odelayers, got {solver!r}")
        if not torch.is_grad_enabled():
            return solver.integrate(f, z0, ts, driver)
        driver, originals, leaves = cut(f, driver)
        if not any(x.requires_grad for x in (z0, *originals)):
            return solver.integrate(f, z0, ts, driver)
        solve = _Solve(solver, f, tuple(ts), driver, Setting(f, driver, z0.device), leaves)
        zs: Tensor = _TakenAgain.apply(solve, z0, *originals)  # type: ignore[no-untyped-call]
        return Path(zs, len(solve.steps), solve.rejected)


class _Solve:
    """One solve as the backward pass needs it: what was solved, and the state before each step."""

    def __init__(
        self,
        solver: MarchingSolver,
        f: Evaluator,
        ts: tuple[float, ...],
        driver: Driver,
        setting: Setting,
        wanted: list[Tensor],
    ) -> None:
        self.solver, self.f, self.ts, self.driver, self.setting = solver, f, ts, driver, setting
        self.wanted = wanted
        self.steps: list[tuple[Step, State]] = []
        self.rejected = 0

    def forward(self, z0: Tensor) -> Tensor:
        """The states at ts, with the step and the state before it recorded."""
        zs = [z0]
        for taken in self.solver.march(self.f, z0, self.ts, self.driver, row_rms):
            self.steps.append((taken.step, taken.before))
            self.rejected += taken.rejected
            zs.extend(taken.outputs)
        self.setting.check_still()
        return torch.stack(zs)

    def backward(self, z0: Tensor, gradient: Tensor) -> list[Tensor | None]:
        """The gradients with respect to z0 and the wanted tensors."""
        total: list[Tensor | None] = [None] * len(self.wanted)
        after_grads: list[Tensor | None] = []
        position = len(self.ts)
        for step, before in reversed(self.steps):
            leaves = [x.detach().requires_grad_() for x in before]
            with torch.enable_grad():
                after, outputs = self.solver.again(self.f, step, tuple(leaves), self.driver)
            position -= len(outputs)
            arriving = [*(after_grads or [None] * len(after)), *gradient[position : position + len(outputs)]]
            after_grads = self._pull_back([*after, *outputs], arriving, leaves, total)
        leaf = z0.detach().requires_grad_()
        with torch.enable_grad():
            start = self.solver.start(self.f, self.ts[0], leaf, self.driver)
        (first,) = self._pull_back(list(start), after_grads or [None] * len(start), [leaf], total)
        return [gradient[0] if first is None else gradient[0] + first, *total]

    def _pull_back(
        self, values: list[Tensor], arriving: list[Tensor | None], leaves: list[Tensor], total: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Pull the arriving gradients back to the leaves, and add what the wanted tensors get to `total`."""
        used = [(v, g) for v, g in zip(values, arriving, strict=True) if g is not None and v.requires_grad]
        if not used:
            return [None] * len(leaves)
        roots, grads = zip(*used, strict=True)
        found = torch.autograd.grad(roots, [*leaves, *self.wanted], grads, allow_unused=True)
        for i, g in enumerate(found[len(leaves) :]):
            if g is not None:
                so_far = total[i]
                total[i] = g if so_far is None else so_far + g
        return list(found[: len(leaves)])


class _TakenAgain(torch.autograd.Function):
    """The solve as one node of the graph, whose backward pass takes the steps again."""

    @staticmethod
    def forward(ctx: Any, solve: _Solve, z0: Tensor, *wanted: Tensor) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(z0)
        return solve.forward(z0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        check_cotangent(gradient)
        (z0,) = ctx.saved_tensors
        with torch.no_grad(), ctx.solve.setting.restored():
            return None, *ctx.solve.backward(z0, gradient)
