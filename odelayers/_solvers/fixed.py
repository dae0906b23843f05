"""Solvers over a fixed grid of steps: explicit Runge-Kutta here, those for SDEs beside."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from odelayers._checks import positive_int
from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, readable
from odelayers._solution import Status
from odelayers._solvers.base import (
    MarchingSolver,
    Norm,
    Path,
    State,
    Step,
    Taken,
    all_finite,
    fail,
    nonfinite_rows,
    row_rms,
)
from odelayers._solvers.compiled import grid_states
from odelayers._solvers.stages import stages_like
from odelayers._solvers.tableau import EULER, HEUN, MIDPOINT, RK4 as RK4_TABLEAU, Tableau

__all__ = ["RK4", "Euler", "FixedGrid", "FixedRungeKutta", "Heun", "Midpoint"]


@dataclass(frozen=True)
class FixedGrid(MarchingSolver):
    """Equal steps over [ts[0], ts[-1]]; an output time between two grid points divides its step."""

    steps: int

    def __post_init__(self) -> None:
        positive_int(self.steps, f"{type(self).__name__}: steps")

    @abstractmethod
    def step(self, f: Evaluator, s: Step, before: State, driver: Driver) -> State:
        """The state after one step; `before[0]` is z, the rest is the solver's own carry."""

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return (z0,)

    def grid(self, ts: Sequence[float]) -> list[Step]:
        """The steps: the equal grid, with output times that fall between its points added."""
        t0, t1 = ts[0], ts[-1]
        h = (t1 - t0) / self.steps
        near = 1e-5 * abs(h)  # output times rounded to float32 still lie on the grid
        marks = [(t, True) for t in ts]
        position = 0
        for i in range(1, self.steps):
            t = t0 + i * h
            while abs(ts[position] - t0) < abs(t - t0) - near:
                position += 1
            if abs(ts[position] - t) > near:
                marks.append((t, False))
        marks.sort(key=lambda mark: abs(mark[0] - t0))
        return [
            Step(i, a, b - a, (1.0,) if is_output else ())
            for i, ((a, _), (b, is_output)) in enumerate(itertools.pairwise(marks))
        ]

    def noise_steps(self, ts: Sequence[float]) -> int:
        return len(self.grid(ts))

    def march(
        self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms
    ) -> Iterator[Taken]:
        before = self.start(f, ts[0], z0, driver)
        for step in self.grid(ts):
            after = self.step(f, step, before, driver)
            yield Taken(step, before, after, [after[0]] if step.outputs else [], 0)
            before = after
        # One host read a solve; under a transform, a compiler or in a CUDA graph there is none.
        if readable(before[0]) and not all_finite(before[0].detach()):
            self._explain(f, z0, ts, driver)
            note = "the cause is not seen when solved once more: does the field change between evaluations?"
            raise fail(self, f, nonfinite_rows(before[0]), ts[-1], driver, Status.BLOW_UP, note)

    def again(self, f: Evaluator, step: Step, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        after = self.step(f, step, before, driver)
        return after, [after[0]] if step.outputs else []

    @torch.no_grad()
    def _explain(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> None:
        """Run once more, reading every step, and raise for the rows that failed first."""
        before = self.start(f, ts[0], z0, driver)
        first = nonfinite_rows(z0) | nonfinite_rows(f(driver.time(ts[0]), z0))
        if first.any():
            raise fail(self, f, first, ts[0], driver, Status.NONFINITE)
        for step in self.grid(ts):
            before = self.step(f, step, before, driver)
            rows = nonfinite_rows(before[0])
            if rows.any():
                raise fail(self, f, rows, step.t + step.h, driver, Status.BLOW_UP)


@dataclass(frozen=True)
class FixedRungeKutta(FixedGrid):
    """An explicit Runge-Kutta method on a fixed grid."""

    tableau: ClassVar[Tableau]

    def integrate(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms) -> Path:
        first, *rest = self.grid(ts)
        if f.programs is None or not rest:
            return super().integrate(f, z0, ts, driver, norm)
        (z,) = self.step(f, first, (z0,), driver)  # eagerly: the field is checked at its first evaluation
        states = grid_states(f, self.tableau, driver.clock, z, rest)
        if states is None or not all_finite(states[-1].detach()):
            return super().integrate(f, z0, ts, driver, norm)
        after = [z, *states.unbind(0)]
        outputs = [state for step, state in zip((first, *rest), after, strict=True) if step.outputs]
        return Path(torch.stack([z0, *outputs]), len(after), 0)

    def step(self, f: Evaluator, s: Step, before: State, driver: Driver) -> State:
        z, stages = before[0], stages_like(self.tableau, before[0])
        stages.begin(z)
        for i, c in enumerate(self.tableau.c):
            stages.put(i, driver.terms(f, s.t + c * s.h, z)[0])
            z = stages.advance(i + 1, s.h)
        return (z,)


@dataclass(frozen=True)
class Euler(FixedRungeKutta):
    """Explicit Euler: order 1, one evaluation a step.

    Args:
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if steps is not an int >= 1.

    Example:
        >>> Euler(steps=10)
        Euler(steps=10)
    """

    tableau, order = EULER, 1


@dataclass(frozen=True)
class Midpoint(FixedRungeKutta):
    """The explicit midpoint rule: order 2, two evaluations a step.

    Args:
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if steps is not an int >= 1.

    Example:
        >>> Midpoint(steps=10).order
        2
    """

    tableau, order = MIDPOINT, 2


@dataclass(frozen=True)
class Heun(FixedRungeKutta):
    """Heun's method, the explicit trapezoid: order 2, two evaluations a step.

    Args:
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if steps is not an int >= 1.

    Example:
        >>> Heun(steps=10).order
        2
    """

    tableau, order = HEUN, 2


@dataclass(frozen=True)
class RK4(FixedRungeKutta):
    """The classical Runge-Kutta method: order 4, four evaluations a step.

    Args:
        steps: number of equal steps over the time of the solve.

    Raises:
        TypeError, ValueError: if steps is not an int >= 1.

    Example:
        >>> RK4(steps=10).order
        4
    """

    tableau, order = RK4_TABLEAU, 4
