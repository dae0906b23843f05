"""Checkpointing: keep some of the states on the way, take the steps again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._gradients.base import Gradient, Setting, check_cotangent, cut
from odelayers._solvers.base import MarchingSolver, Path, Solver, State, Step, row_rms

__all__ = ["Checkpoint"]

KEEP = 16  # states kept before any is dropped


@dataclass(frozen=True)
class Checkpoint(Gradient):
    """Backpropagate through the steps taken, keeping some of the states and evaluating the rest again.

    The memory saver that is always right: the gradient is that of `Backprop` up to rounding. Up to 16 steps one state a
    step is kept, for about one forward solve more; beyond that about sqrt(n) of n, for two. Noise is drawn again from
    its seed. The gradient cannot be differentiated twice.

    Raises:
        GradientError: from the solve, if the field depends on a tensor captured by a closure; from the backward pass,
            if the incoming gradient is NaN or inf.

    Source: Griewank and Walther, Evaluating Derivatives, chapter 12.

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
    """One solve as the backward pass needs it: what was solved, and the states kept on the way."""

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
        self.steps: list[Step] = []
        self.kept: dict[int, State] = {}
        self.rejected = 0

    def forward(self, z0: Tensor) -> Tensor:
        """The states at ts, with the steps recorded and every stride-th state before them.

        How many steps there will be is not known: where more than KEEP or 2 stride states are kept, every second is
        dropped, so n steps keep between sqrt(n / 2) and sqrt(2 n) of them.
        """
        zs, stride = [z0], 1
        for i, taken in enumerate(self.solver.march(self.f, z0, self.ts, self.driver, row_rms)):
            self.steps.append(taken.step)
            if i % stride == 0:
                self.kept[i] = taken.before
            if len(self.kept) > max(KEEP, 2 * stride):
                stride *= 2
                self.kept = {j: state for j, state in self.kept.items() if j % stride == 0}
            self.rejected += taken.rejected
            zs.extend(taken.outputs)
        self.setting.check_still()
        return torch.stack(zs)

    def backward(self, z0: Tensor, gradient: Tensor) -> list[Tensor | None]:
        """The gradients with respect to z0 and the wanted tensors."""
        total: list[Tensor | None] = [None] * len(self.wanted)
        if not self.steps:  # every row was at rest to begin with
            return [gradient[0], *total]
        after_grads: list[Tensor | None] = []
        position = len(self.ts)
        for step, before in self._backwards():
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

    def _backwards(self) -> Iterator[tuple[Step, State]]:
        """The steps with the states before them, last first; the states of a segment are found again from its first."""
        end = len(self.steps)
        for start in reversed(self.kept):
            states = [self.kept[start]]
            for step in self.steps[start : end - 1]:
                states.append(self.solver.again(self.f, step, states[-1], self.driver)[0])
            yield from zip(reversed(self.steps[start:end]), reversed(states), strict=True)
            end = start

    def _pull_back(
        self, values: list[Tensor], arriving: list[Tensor | None], leaves: list[Tensor], total: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Pull the arriving gradients back to the leaves, and add what the wanted tensors get to `total`."""
        used = [(v, g) for v, g in zip(values, arriving, strict=True) if g is not None and v.requires_grad]
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
