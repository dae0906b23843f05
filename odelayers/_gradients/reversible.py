"""Reversible solves: keep the end alone, undo the steps algebraically in the backward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from odelayers._checks import positive_number
from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._gradients.again import Gradients, Replay
from odelayers._gradients.base import Gradient
from odelayers._solution import GradientError, SolveError, Status
from odelayers._solvers.adaptive import AdaptiveRungeKutta
from odelayers._solvers.base import Invertible, Path, Solver, State, fail, row_rms
from odelayers._solvers.coupled import CoupledAdaptive, CoupledGrid
from odelayers._solvers.fixed import FixedRungeKutta
from odelayers._solvers.sde import ReversibleHeun

__all__ = ["Reversible"]


@dataclass(frozen=True)
class Reversible(Gradient):
    """Backpropagate through the steps of a reversible method, undoing each of them: memory independent of their number.

    ...
    """

    coupling: float = 0.999
    max_gap: float | None = None
    max_drift: float = 1e-3

    def __post_init__(self) -> None:
        if positive_number(self.coupling, "Reversible: coupling") > 1:
            raise ValueError(f"Reversible: coupling: expected a number in (0, 1], got {self.coupling}")
        if self.max_gap is not None:
            positive_number(self.max_gap, "Reversible: max_gap")
        positive_number(self.max_drift, "Reversible: max_drift")

    def accepts(self, solver: Solver) -> bool:
        return isinstance(solver, FixedRungeKutta | AdaptiveRungeKutta | ReversibleHeun)

    def solve(self, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> Path:
        return _Undone(self, solver, f, z0, ts, driver).path(z0)

    def invertible(self, solver: Solver) -> Invertible:
        """The method whose steps are taken: two coupled solutions by the solver, or reversible Heun as it is."""
        if isinstance(solver, FixedRungeKutta):
            return CoupledGrid(solver.steps, solver, self.coupling)
        if isinstance(solver, AdaptiveRungeKutta):
            return CoupledAdaptive(solver, self.coupling)
        if isinstance(solver, ReversibleHeun):
            return solver
        raise TypeError(f"Reversible: expected an explicit Runge-Kutta method of odelayers, got {solver!r}")

    def allowed(self, solver: Solver, f: Evaluator, z: Tensor) -> tuple[float, float]:
        """How far the two solutions may part: relative to a row's size, and beyond that."""
        if self.max_gap is not None:
            return self.max_gap, 0.0
        if isinstance(solver, AdaptiveRungeKutta):
            rtol, atol = solver.tolerances(f, z)
            return min(1e3 * rtol, 0.1), 1e3 * atol
        return (1e-2, 0.0) if isinstance(solver, FixedRungeKutta) else (math.inf, 0.0)


class _Undone(Replay):
    """A solve of which the last state is kept, and what its reconstruction is compared with."""

    def __init__(
        self, gradient: Reversible, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver
    ) -> None:
        super().__init__(f, ts, driver)
        self.gradient, self.solver = gradient, gradient.invertible(solver)
        self.allowed = gradient.allowed(solver, f, z0)

    def forward(self, z0: Tensor) -> Tensor:
        outputs, size = [z0], row_rms(z0)
        self.gap = gap = parted = torch.zeros_like(size)
        relative, absolute = self.allowed
        for taken in self.solver.march(self.f, z0, self.ts, self.driver, row_rms):
            self.steps.append(taken.step)
            self.rejected += taken.rejected
            outputs.extend(taken.outputs)
            self.end = taken.after
            size = torch.maximum(size, row_rms(taken.after[0]))
            gap = row_rms(taken.after[0] - taken.after[1])
            parted = torch.maximum(parted, gap / (relative * size + absolute))
            self.gap = torch.maximum(self.gap, gap / row_rms(taken.after[0]))
        self.size = size
        self.parted = parted
        self.outputs = outputs[1:]
        return torch.stack(outputs)

    def through_steps(self, z0: Tensor, gradient: Tensor, total: Gradients) -> Gradients:
        state, arriving, position = self.end, [None] * len(self.end), len(self.ts)
        drift = torch.zeros_like(self.size)
        gd = torch.zeros_like(self.size)
        for step in reversed(self.steps):
            gd = torch.maximum(gd, row_rms(state[0]-state[1])/row_rms(state[0]) - self.gap)
            if step.outputs:
                position -= 1
                drift = torch.maximum(drift, _distance(state[0], self.outputs[position - 1]))
                g = gradient[position]
                arriving = [g if arriving[0] is None else arriving[0] + g, *arriving[1:]]
            for before, after in self.solver.undo(self.f, step, state, self.driver):
                arriving = self.pull_back(after, arriving, before, total)
                state = before
            state = tuple(x.detach() for x in state)
        self.drift = torch.maximum(drift, torch.maximum(_distance(state[0], z0), _distance(state[1], z0)))
        self.gapdrift = gd
        print('drift', drift.max().item(), 'start', self.drift.max().item(), 'gap', gd.max().item(), 'parted', self.parted.max().item())
        return arriving


def _distance(recovered: Tensor, stored: Tensor) -> Tensor:
    return row_rms(recovered - stored) / row_rms(stored)
