"""Adaptive explicit Runge-Kutta methods: the worst sample decides the step, or each sample its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from odelayers._checks import one_of, positive_int, positive_number
from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, vmapped
from odelayers._solution import SolveError, Status
from odelayers._solvers.base import MarchingSolver, Norm, Path, State, Step, Taken, fail, row_rms
from odelayers._solvers.control import (
    GROW,
    SAFETY,
    SHRINK,
    STABILITY_LIMIT,
    first_guess,
    nonfinite_start,
    second_guess,
)
from odelayers._solvers.independent import Independent
from odelayers._solvers.stages import Stages, stages_like
from odelayers._solvers.tableau import DOPRI5, TSIT5, Tableau

__all__ = ["Dopri5", "Tsit5"]


class Try(NamedTuple):
    """One attempted step: the result, the stages and the state at which the last but one was evaluated."""

    z: Tensor
    stages: Stages
    last: Tensor


@dataclass(frozen=True)
class AdaptiveRungeKutta(MarchingSolver):
    """An embedded pair with first-same-as-last stages under an elementary step size control."""

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000
    first_step: float | None = None
    batch: str = "shared"

    tableau: ClassVar[Tableau]

    def __post_init__(self) -> None:
        name = type(self).__name__
        positive_number(self.rtol, f"{name}: rtol")
        positive_number(self.atol, f"{name}: atol")
        positive_int(self.max_steps, f"{name}: max_steps")
        if self.first_step is not None:
            positive_number(self.first_step, f"{name}: first_step")
        one_of(self.batch, f"{name}: batch", ("shared", "independent"))

    @property
    def marching(self) -> MarchingSolver:
        return Independent(self) if self.batch == "independent" else self

    def integrate(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms) -> Path:
        if self.batch == "independent":
            return self.marching.integrate(f, z0, ts, driver, norm)
        return super().integrate(f, z0, ts, driver, norm)

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return z0, driver.terms(f, t0, z0)[0].reshape(-1)

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        self.refuse_vmap(z0)
        t, t1 = ts[0], ts[-1]
        way = math.copysign(1.0, t1 - t)
        rtol, atol = self.tolerances(f, z0)
        before = self.start(f, t, z0, driver)
        h = self._first_step(f, before, t, t1, driver, norm, rtol, atol)
        position, rejected, tried = 1, 0, 0
        shortest = 4 * torch.finfo(torch.float64).eps * abs(t1 - t)
        stages = stages_like(z0, len(self.tableau.c))
        while (t1 - t) * way > 0:
            # A last step that would leave a sliver is stretched or clipped to end exactly at t1.
            h = (t1 - t) * way if h * 1.01 >= (t1 - t) * way else h
            attempt = self._attempt(f, t, h * way, before, driver, stages)
            with torch.no_grad():
                errors = norm(self._scaled_error(attempt, before[0], h, rtol, atol))
                worst = errors.amax().item()  # the step's one host read
            tried += 1
            if worst <= 1.0:
                end = t1 if h == (t1 - t) * way else t + h * way
                reached = position
                while reached < len(ts) and (ts[reached] - end) * way <= 0:
                    reached += 1
                step = Step(tried, t, h * way, tuple((s - t) / (end - t) for s in ts[position:reached]))
                after = self._after(attempt)
                yield Taken(step, before, after, self._outputs(attempt, step, before[0]), rejected)
                t, before, position, rejected = end, after, reached, 0
                h *= min(GROW, SAFETY * worst ** (-1 / self.tableau.order)) if worst > 0 else GROW
            else:
                h *= max(SHRINK, SAFETY * worst ** (-1 / self.tableau.order)) if math.isfinite(worst) else SHRINK
                rejected += 1
            if tried >= self.max_steps or h < shortest or t + h * way == t:
                if (t1 - t) * way > 0:
                    raise self._failure(f, before, attempt, errors, t, h * way, tried, driver)

    def again(self, f: Evaluator, step: Step, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        stages = stages_like(before[0], len(self.tableau.c))
        attempt = self._attempt(f, step.t, step.h, before, driver, stages)
        return self._after(attempt), self._outputs(attempt, step, before[0])

    def refuse_vmap(self, z0: Tensor) -> None:
        """Raise under torch.func.vmap, with the remedy."""
        if vmapped(z0):
            raise RuntimeError(
                f"{self!r} under torch.func.vmap: step size control reads errors on the host, which vmap forbids; "
                f"use a fixed grid such as RK4(steps), or hand the rows over as one batch (odelayers.jacobian does)"
            )

    def tolerances(self, f: Evaluator, z: Tensor) -> tuple[float, float]:
        """Both tolerances, not below the rounding of the dtype that the field is evaluated in."""
        precision = f.precision(z)
        floor = 4 * torch.finfo(precision).eps
        return max(self.rtol, floor), max(self.atol, floor if precision != z.dtype else 0.0)

    def _attempt(self, f: Evaluator, t: float, h: float, before: State, driver: Driver, stages: Stages) -> Try:
        z, k = before
        flat, at, shape = z.reshape(-1), z, z.shape
        stages.put(0, k)
        last = z
        for i, row in enumerate(self.tableau.a, start=1):
            last, at = at, stages.combine(flat, row, h).view(shape)
            stages.put(i, driver.terms(f, t + self.tableau.c[i] * h, at)[0].reshape(-1))
        return Try(at, stages, last)

    def _after(self, attempt: Try) -> State:
        return attempt.z, attempt.stages.keep(len(self.tableau.a))

    def _outputs(self, attempt: Try, step: Step, z: Tensor) -> list[Tensor]:
        """The states at the step's outputs, from its end or its continuous extension."""
        flat, found = z.reshape(-1), []
        for theta in step.outputs:
            if theta == 1.0:
                found.append(attempt.z)
            else:
                weights = self.tableau.dense_weights(theta)
                found.append(attempt.stages.combine(flat, weights, step.h).view(z.shape))
        return found

    def _scaled_error(self, attempt: Try, z: Tensor, h: float, rtol: float, atol: float) -> Tensor:
        """The embedded error over atol + rtol max(|z|, |z'|), divided by rtol throughout to save an operation."""
        zero = z.new_zeros(()).expand(z.numel())
        error = attempt.stages.combine(zero, self.tableau.error, h / rtol).view(z.shape)
        return error.div_(torch.maximum(z.abs(), attempt.z.abs()).add_(atol / rtol))

    @torch.no_grad()
    def _first_step(
        self,
        f: Evaluator,
        before: State,
        t0: float,
        t1: float,
        driver: Driver,
        norm: Norm,
        rtol: float,
        atol: float,
    ) -> float:
        """The given first step, or Hairer's choice for the row that needs the shortest (Solving ODEs I, II.4)."""
        z, k = before[0], before[1].view(before[0].shape)
        guess = first_guess(z, k, norm, rtol, atol)
        h = min(guess.h.amin().item(), abs(t1 - t0))
        if not math.isfinite(h) or not math.isfinite(guess.speed.amax().item()):
            raise nonfinite_start(self, f, z, k, guess, t0, driver)
        if self.first_step is not None:
            return min(self.first_step, abs(t1 - t0))
        way = math.copysign(1.0, t1 - t0)
        there = driver.terms(f, t0 + way * h, torch.add(z, k, alpha=way * h))[0]
        fastest = torch.maximum(guess.speed, norm((there - k) / guess.scale) / h).amax().double()
        return min(second_guess(torch.full_like(fastest, h), fastest, self.tableau.order).item(), abs(t1 - t0))

    @torch.no_grad()
    def _failure(
        self, f: Evaluator, before: State, attempt: Try, errors: Tensor, t: float, h: float, tried: int, driver: Driver
    ) -> SolveError:
        """Say which rows stopped the solve and why."""
        bad = ~errors.isfinite()
        rows = bad if bad.any() else errors >= 0.5 * errors.amax()  # steps within 15 % of the worst's, at order 5
        note = f"after {tried} steps tried, the last of length {abs(h):.3g}"
        if bad.any():
            return fail(self, f, rows, t, driver, Status.BLOW_UP, note)
        z, k = before[0][rows], before[1].view(before[0].shape)[rows]
        if (z * k).sum() * h > 0 and z.norm() < 1e-6 * max(abs(t), 1e-6) * k.norm():
            return fail(self, f, rows, t, driver, Status.BLOW_UP, note)
        if self._stiff(attempt, h, rows):
            return fail(self, f, rows, t, driver, Status.STIFF, note)
        status = Status.MAX_STEPS if tried >= self.max_steps else Status.STEP_UNDERFLOW
        return fail(self, f, rows, t, driver, status, note)

    def _stiff(self, attempt: Try, h: float, rows: Tensor) -> bool:
        """Whether |h lambda| is at the stability boundary, lambda from two stages at one time (Hairer, Wanner IV.2)."""
        shape = attempt.z.shape
        change = (attempt.stages.get(-1) - attempt.stages.get(-2)).view(shape)[rows].norm()
        distance = (attempt.z - attempt.last)[rows].norm()
        return bool(distance > 0) and (abs(h) * change / distance).item() > STABILITY_LIMIT


@dataclass(frozen=True)
class Dopri5(AdaptiveRungeKutta):
    """Dormand and Prince's method of order 5(4) with adaptive steps: the default.

    The error norm is taken per sample and by default the worst sample decides, so every sample meets the tolerance it
    would meet alone. Output times are read off a continuous extension of order 4. Step sizes are constants to the
    gradient. rtol is not taken below four roundings of the dtype that the field is evaluated in.

    Args:
        rtol: relative tolerance of a step's local error.
        atol: absolute tolerance.
        max_steps: steps tried, rejected ones included, before the solve fails with a diagnosis.
        first_step: length of the first step; chosen by itself when None.
        batch: "shared": the batch takes one step, the worst sample decides on it. "independent": each sample has its
            own time, steps and end, and one that fails does not stop the others. Time then reaches the field as a
            tensor `(n, 1, ...)` for the n samples under way, and what the field knows of each must be `context`.

    Raises:
        TypeError, ValueError: if a number is not positive and finite, or batch is no such word.
        SolveError: from the solve, when rows blow up, turn out stiff or spend max_steps.

    Source: Dormand and Prince, J. Comput. Appl. Math. 6 (1980).

    Example:
        >>> Dopri5(rtol=1e-6)
        Dopri5(rtol=1e-06, atol=1e-05, max_steps=10000, first_step=None, batch='shared')
    """

    tableau, order = DOPRI5, 5


@dataclass(frozen=True)
class Tsit5(AdaptiveRungeKutta):
    """Tsitouras' method of order 5(4) with adaptive steps; often a few evaluations cheaper than `Dopri5`.

    Args and errors as for `Dopri5`.

    Source: Tsitouras, Computers and Mathematics with Applications 62 (2011).

    Example:
        >>> Tsit5().order
        5
    """

    tableau, order = TSIT5, 5
