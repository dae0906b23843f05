"""Two coupled solutions by one explicit Runge-Kutta method, whose steps can be undone algebraically."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._solvers import control
from odelayers._solvers.adaptive import AdaptiveRungeKutta, Try
from odelayers._solvers.base import Norm, Part, State, Step, Taken, leaf
from odelayers._solvers.fixed import FixedGrid, FixedRungeKutta
from odelayers._solvers.stages import stages_like

__all__ = ["CoupledAdaptive", "CoupledGrid"]


class _Coupled:
    """The state (y, z) and its step: y' = c (y - z) + flow(t, z, h), then z' = z + y' - flow(t + h, y', -h).

    flow(t, z, h) is where a step of the method takes z. Both solutions start at z0; y is the one that comes out.
    """

    base: FixedRungeKutta | AdaptiveRungeKutta
    coupling: float

    def __repr__(self) -> str:
        return f"{self.base!r} under Reversible(coupling={self.coupling!r})"

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        """Both solutions at z0."""
        return z0, z0

    def undo(self, f: Evaluator, steps: Sequence[Step], end: State, driver: Driver) -> Iterator[Part]:
        """Undo what a step did to z, then what it did to y.

        Each half leaves the other solution as it is, so that one flow from there finds the state before and carries the
        gradient.
        """
        state = end
        for step in reversed(steps):
            part = self._undo_z(f, step, state, driver)
            middle = part.before
            yield part
            del part  # and its graph, before the next is built
            part = self._undo_y(f, step, middle, driver)
            before = part.before
            yield part._replace(parted=(state[0] - state[1]) - self.coupling * (before[0] - before[1]))
            del part
            state = before

    def _undo_z(self, f: Evaluator, step: Step, after: State, driver: Driver) -> Part:
        y = leaf(after[0])
        with torch.enable_grad():
            away = y - self._flow(f, step.t + step.h, y, -step.h, driver)
        z = leaf(after[1] - away.detach())
        with torch.enable_grad():
            return Part((y, z), (y, z + away), y if step.outputs else None)

    def _undo_y(self, f: Evaluator, step: Step, after: State, driver: Driver) -> Part:
        z = leaf(after[1])
        with torch.enable_grad():
            ahead = self._flow(f, step.t, z, step.h, driver)
        y = leaf(z.detach() + (after[0] - ahead.detach()) / self.coupling)
        with torch.enable_grad():
            return Part((y, z), (self.coupling * (y - z) + ahead, z))

    def _flow(self, f: Evaluator, t: float, z: Tensor, h: float, driver: Driver) -> Tensor:
        return self.base.again(f, Step(0, t, h), self.base.start(f, t, z, driver), driver)[0][0]


@dataclass(frozen=True, repr=False)
class CoupledGrid(_Coupled, FixedGrid):
    """A method on a fixed grid, coupled."""

    base: FixedRungeKutta
    coupling: float

    def step(self, f: Evaluator, s: Step, before: State, driver: Driver) -> State:
        y, z = before
        y = self.coupling * (y - z) + self._flow(f, s.t, z, s.h, driver)
        return y, z + (y - self._flow(f, s.t + s.h, y, -s.h, driver))


class _Tried(NamedTuple):
    """One try of a step: the state after it, its scaled error by row, and the half step that was tried last."""

    after: State
    errors: Tensor
    half: Try


class _Trial:
    """Tries steps for one march: both half steps are judged, the second is spared where the first fails."""

    def __init__(self, pair: CoupledAdaptive, f: Evaluator, z0: Tensor, driver: Driver, norm: Norm) -> None:
        self.pair, self.f, self.driver, self.norm = pair, f, driver, norm
        self.tolerances = pair.base.tolerances(f, z0)
        self.stages = stages_like(pair.base.tableau, z0)

    def step(self, t: float, h: float, before: State, start: State) -> _Tried:
        """Try a step; `start` is where the method starts from z."""
        y, z = before
        ahead, errors = self._half(t, h, start)
        y = self.pair.coupling * (y - z) + ahead.z
        if not bool((errors <= 1.0).all()):
            return _Tried(before, errors, ahead)
        back, others = self._half(t + h, -h, self.pair.base.start(self.f, t + h, y, self.driver))
        return _Tried((y, z + (y - back.z)), torch.maximum(errors, others), back)

    def _half(self, t: float, h: float, start: State) -> tuple[Try, Tensor]:
        """One step of the method and its scaled error by row."""
        half = self.pair.base.attempt(self.f, t, h, start, self.driver, self.stages)
        rtol, atol = self.tolerances
        return half, self.norm(half.stages.error(h) / (atol + rtol * torch.maximum(start[0].abs(), half.z.abs())))


@dataclass(frozen=True, repr=False)
class CoupledAdaptive(_Coupled):
    """A method with step size control, coupled: a step is judged by the larger of its two embedded errors.

    Steps end at the output times, since the way back knows their ends alone.
    """

    base: AdaptiveRungeKutta
    coupling: float

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        """Take the steps from ts[0] to ts[-1]."""
        self.base.refuse_vmap(z0)
        base, t, way = self.base, ts[0], math.copysign(1.0, ts[-1] - ts[0])
        trial, shortest = _Trial(self, f, z0, driver, norm), 4 * torch.finfo(torch.float64).eps * abs(ts[-1] - t)
        before: State = (z0, z0)
        start = base.start(f, t, z0, driver)
        h = base.choose_step(f, start, t, ts[-1], driver, norm, *trial.tolerances)
        tried = rejected = 0
        for target in ts[1:]:
            while (left := (target - t) * way) > 0:
                length = left if h * 1.01 >= left else h
                after, errors, half = trial.step(t, length * way, before, start)
                worst = errors.amax().item()
                change = math.inf if worst == 0 else control.SAFETY * worst ** (-1 / base.order) if worst > 0 else 0.0
                tried += 1
                if worst <= 1.0:
                    end = target if length == left else t + length * way
                    step = Step(tried, t, length * way, (1.0,) if end == target else ())
                    yield Taken(step, before, after, [after[0]] if step.outputs else [], rejected)
                    t, before, rejected = end, after, 0
                    longer = length * min(control.GROW, change)
                    h = longer if length == h else max(h, longer)  # a step cut short at an output says nothing of h
                    if t == ts[-1]:
                        return
                    start = base.start(f, t, before[1], driver)
                else:
                    h, rejected = length * max(control.SHRINK, change), rejected + 1
                if tried >= base.max_steps or h < shortest or t + h * way == t:
                    raise base.failure(f, start, half, errors, t, h * way, tried, driver)
