"""Reversible solves: keep the end alone, and undo the steps algebraically in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from odelayers._checks import positive_number
from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, traced
from odelayers._gradients.again import Gradients, Replay, plus
from odelayers._gradients.base import Gradient
from odelayers._solution import GradientError, SolveError, Status
from odelayers._solvers.adaptive import AdaptiveRungeKutta
from odelayers._solvers.base import Invertible, Path, Solver, State, Taken, fail, row_rms
from odelayers._solvers.coupled import CoupledAdaptive, CoupledGrid
from odelayers._solvers.fixed import FixedRungeKutta
from odelayers._solvers.sde import ReversibleHeun

__all__ = ["Reversible"]

MAX_GAP = 0.1  # of a row's size, where max_gap says nothing


@dataclass(frozen=True)
class Reversible(Gradient):
    """Backpropagate through the steps of a reversible method, undoing each: memory independent of the number of steps.

    A Runge-Kutta solver steps a pair of coupled solutions in place of one: twice the evaluations forwards, as many
    backwards, and values that differ from the solver's own by its error, in evaluation too. `ReversibleHeun` is undone
    as it is. The gradient is that of the steps taken, up to rounding; it cannot be differentiated twice.

    Not recommended where a field contracts: there the pair comes apart like e^(cT), c the rate of contraction, and
    the gradient and the way back lose their digits likewise; where it expands the way back does. All of it is watched,
    row by row, and refused beyond a limit. Prefer `Checkpoint`.

    Args:
        coupling: how firmly the pair is tied, in (0, 1]. Smaller is stabler (on a field that contracts at rate c, the
            pair stays together at steps h with c h < 2 (1 - coupling) / (1 + coupling)), and loses 1 / coupling of the
            precision at every step undone.
        max_gap: how far the pair may come apart, relative to a row's size so far, and how much of the gradient may come
            of that, as far as it is estimated. None for 0.1, and for no more than a thousand tolerances (rtol size +
            atol) between the pair under step size control.
        max_drift: largest relative error, row by row, of the states recovered at the start and the output times.

    Raises:
        TypeError, ValueError: if a number does not fit.
        SolveError: from the solve, if the pair comes apart (`Status.UNSTABLE`).
        GradientError: from the backward pass, if a state recovered drifts or the incoming gradient is NaN or inf; from
            the solve, if the field depends on a tensor captured by a closure.

    Source: McCallum and Foster, Efficient, Accurate and Stable Gradients for Neural ODEs, arXiv:2410.11648; for SDEs
    Kidger, Foster, Li and Lyons, Efficient and Accurate Gradients for Neural SDEs, NeurIPS 2021.

    Example:
        >>> Reversible()
        Reversible(coupling=0.999, max_gap=None, max_drift=0.001)
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
        if isinstance(solver, AdaptiveRungeKutta):
            return solver.batch == "shared"  # the steps of a pair are the batch's
        return isinstance(solver, FixedRungeKutta | ReversibleHeun)

    def solve(self, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> Path:
        return _Undone(self, solver, f, z0, ts, driver).path(z0)

    def method(self, solver: Solver) -> Invertible:
        """The method whose steps are taken."""
        if isinstance(solver, FixedRungeKutta):
            return CoupledGrid(solver.steps, solver, self.coupling)
        if isinstance(solver, AdaptiveRungeKutta):
            return CoupledAdaptive(solver, self.coupling)
        if isinstance(solver, ReversibleHeun):
            return solver
        raise TypeError(f"Reversible: expected an explicit Runge-Kutta method of odelayers, got {solver!r}")

    def gap(self, solver: Solver, f: Evaluator, z: Tensor) -> tuple[float, float] | None:
        """How far apart a pair may be, relative to a row's size and beyond that; None where nothing is coupled."""
        if isinstance(solver, ReversibleHeun):
            return None  # its values are the solver's own, whatever the gradient
        if self.max_gap is not None:
            return self.max_gap, 0.0
        if isinstance(solver, AdaptiveRungeKutta):
            rtol, atol = solver.tolerances(f, z)
            return min(1e3 * rtol, MAX_GAP), 1e3 * atol
        return MAX_GAP, 0.0


class _Undone(Replay):
    """A solve of which the end is kept, and the outputs, which the states recovered must meet."""

    solver: Invertible
    end: State = ()

    def __init__(
        self, gradient: Reversible, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver
    ) -> None:
        super().__init__(f, ts, driver)
        self.gradient, self.solver = gradient, gradient.method(solver)
        self.gap = gradient.gap(solver, f, z0)
        self.outputs: list[Tensor] = []
        self.size = row_rms(z0.detach())  # of each row, its largest so far
        self.parted = torch.full_like(self.size, -1, dtype=torch.long)  # the step at which its pair came apart

    def forward(self, z0: Tensor) -> Tensor:
        try:
            for taken in self.solver.march(self.f, z0, self.ts, self.driver, row_rms):
                self._note(taken)
        except SolveError as error:
            self._check_pair(error)
            raise
        self._check_pair()
        return torch.stack([z0, *self.outputs])

    @torch.no_grad()
    def _note(self, taken: Taken) -> None:
        """Record a step; the end so far takes the place of the one before."""
        self.end, (first, second, *_) = taken.after, taken.after
        self.size = torch.maximum(self.size, row_rms(first))
        if self.gap is not None:
            apart = row_rms(first - second) > self.gap[0] * self.size + self.gap[1]
            self.parted = torch.where(apart & (self.parted < 0), len(self.steps), self.parted)
        self.steps.append(taken.step)
        self.accepted, self.rejected = self.accepted + 1, self.rejected + taken.rejected
        self.outputs.extend(taken.outputs)

    def _check_pair(self, failure: SolveError | None = None) -> None:
        """Refuse rows whose pair came apart; where the solve failed, if that is what all its failed rows did."""
        if self.gap is None or traced():
            return
        rows = self.parted >= 0
        if not rows.any() or (failure is not None and not rows[list(failure.rows)].all()):
            return
        step = self.steps[int(self.parted[rows].amin())]
        note = f"by more than {self.gap[0]:g} of their size" + (f" + {self.gap[1]:g}" if self.gap[1] else "")
        end = step.t + step.h
        raise fail(self.solver, self.f, rows, end, self.driver, Status.UNSTABLE, note) from failure

    def release(self) -> list[Tensor]:
        states, self.end, self.outputs = [*self.end, *self.outputs], (), []
        return states

    def hold(self, states: list[Tensor]) -> None:
        width = len(states) - (len(self.ts) - 1)
        self.end, self.outputs = tuple(states[:width]), states[width:]

    def through_steps(self, z0: Tensor, gradient: Tensor, total: Gradients) -> Tensor | None:
        arriving: Gradients = [None, None]
        position, drift, strain = len(self.outputs), torch.zeros_like(self.size), torch.zeros_like(self.size)
        for part in self.solver.undo(self.f, self.steps, self.end, self.driver):
            made, given = list(part.after), arriving
            if part.output is not None:
                drift = torch.maximum(drift, self._distance(part.output, self.outputs[position - 1]))
                made, given, position = [*made, part.output], [*given, gradient[position]], position - 1
            arriving, start = self.pull_back(made, given, part.before, total, retain=part.shared), part.before
            if part.parted is not None:
                strain = strain + self._relative(part.parted, self.size) * _growth(arriving, start)
            del part, made, given  # and their graph, before the next is built
        for solution in start:
            drift = torch.maximum(drift, self._distance(solution, z0))
        self._check(drift, strain)
        return plus(*arriving)

    def _relative(self, x: Tensor, size: Tensor) -> Tensor:
        return row_rms(x) / size.clamp(min=torch.finfo(size.dtype).tiny)

    def _distance(self, recovered: Tensor, stored: Tensor) -> Tensor:
        """The relative difference of each row; one that is stored as 0 is measured by its largest size."""
        size = row_rms(stored)
        return self._relative(recovered - stored, torch.where(size > 0, size, self.size))

    def _check(self, drift: Tensor, strain: Tensor) -> None:
        """Refuse a gradient along other states than those of the solve, or one that the pair's distance has spoilt."""
        limit, most = self.gradient.max_drift, self.gradient.max_gap or MAX_GAP
        bad = ~((drift <= limit) & (strain <= most))
        if not bad.any():
            return
        rows, reasons = bad.nonzero().flatten().tolist(), []
        if not bool((drift <= limit).all()):
            reasons.append(
                f"the states recovered by undoing the steps differ from those of the solve by up to "
                f"{drift.max().item():.2g} (relative, max_drift={limit:g})"
            )
        if not bool((strain <= most).all()):
            reasons.append(
                f"the distance between the coupled solutions brings up to {strain.max().item():.2g} into it "
                f"(relative, max_gap: {most:g})"
            )
        raise GradientError(
            f"Reversible: in {len(rows)} of {len(bad)} rows solved [{', '.join(map(str, rows[:8]))}"
            f"{', ...' if len(rows) > 8 else ''}] the gradient would be wrong: {', and '.join(reasons)}. The field "
            f"contracts or expands too much over this time, or the steps are too many for the coupling: use "
            f"gradient=Checkpoint() or Backprop(), or a shorter time"
        )


def _growth(gradients: Gradients, state: State) -> Tensor:
    """By how much the gradients of the pair, row by row, are larger than their sum, relative to it.

    Where a field contracts at the rate c they grow like e^(ct) and cancel to e^(-ct), the gradient of the start. What a
    step adds to the pair's distance, rounding included, enters the gradient times this growth: measured over methods,
    rates and dtypes, the sum of the two is two to ten times the error that it stands for.
    """
    one, other = (torch.zeros_like(x) if g is None else g for x, g in zip(state, gradients, strict=True))
    size = row_rms(one)
    return torch.where(size > 0, size / row_rms(one + other) - 1, 0.0).clamp(min=0)
