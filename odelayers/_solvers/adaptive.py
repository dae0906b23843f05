"""Adaptive explicit Runge-Kutta methods: the worst sample decides the step, or each sample its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from odelayers._checks import one_of, positive_int, positive_number
from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, vmapped
from odelayers._solution import SolveError, Status
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
from odelayers._solvers.compiled import Control, solved_loop, step_stages
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
from odelayers._solvers.stages import Compiled, Stages, stages_like
from odelayers._solvers.tableau import DOPRI5, TSIT5, Tableau

__all__ = ["AdaptiveRungeKutta", "Dopri5", "Tsit5"]


class Try(NamedTuple):
    """One attempted step: its result, its stages, its length, and where that is known its scaled error's `row_rms`."""

    z: Tensor
    stages: Stages
    h: float
    errors: Tensor | None = None


@dataclass(frozen=True)
class Adaptive(MarchingSolver):
    """What a solver that controls its error is told."""

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 10_000
    first_step: float | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        positive_number(self.rtol, f"{name}: rtol")
        positive_number(self.atol, f"{name}: atol")
        positive_int(self.max_steps, f"{name}: max_steps")
        if self.first_step is not None:
            positive_number(self.first_step, f"{name}: first_step")

    def tolerances(self, f: Evaluator, z: Tensor) -> tuple[float, float]:
        """Both tolerances, not below the rounding of the dtype that the field is evaluated in."""
        precision = f.precision(z)
        floor = 4 * torch.finfo(precision).eps
        return max(self.rtol, floor), max(self.atol, floor if precision != z.dtype else 0.0)


@dataclass(frozen=True)
class AdaptiveRungeKutta(Adaptive):
    """An embedded pair with first-same-as-last stages under an elementary step size control."""

    batch: str = "shared"

    tableau: ClassVar[Tableau]

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.batch, f"{type(self).__name__}: batch", ("shared", "independent"))

    @property
    def marching(self) -> MarchingSolver:
        return Independent(self) if self.batch == "independent" else self

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return z0, driver.terms(f, t0, z0)[0]

    def rate(self, f: Evaluator, t: float, state: State, driver: Driver) -> Tensor:
        return state[1]

    def resumed(self, taken: Taken) -> AdaptiveRungeKutta:
        """The solver that goes on after a step of a march, with what is left of the budget."""
        # One try at least: a budget that is spent is diagnosed by the march.
        return replace(self, first_step=taken.proposed, max_steps=max(self.max_steps - taken.step.number, 1))

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        self.refuse_vmap(z0)
        t, t1 = ts[0], ts[-1]
        way = math.copysign(1.0, t1 - t)
        rtol, atol = self.tolerances(f, z0)
        before = self.start(f, t, z0, driver)
        h = self.choose_step(f, before, t, t1, driver, norm, rtol, atol)
        position, rejected, tried = 1, 0, 0
        shortest = 4 * torch.finfo(torch.float64).eps * abs(t1 - t)
        stages = stages_like(self.tableau, z0)
        size: Tensor | None = None
        while (t1 - t) * way > 0:
            # A last step that would leave a sliver is stretched or clipped to end exactly at t1.
            h = (t1 - t) * way if h * 1.01 >= (t1 - t) * way else h
            end = t1 if h == (t1 - t) * way else t + h * way
            inside = ts[position] != t1 and (ts[position] - end) * way <= 0
            attempt = self.attempt(f, t, h * way, before, driver, stages, inside)
            with torch.no_grad():
                errors, reached_size = attempt.errors if norm is row_rms else None, None
                if errors is None:
                    size, reached_size = before[0].abs() if size is None else size, attempt.z.abs()
                    scale = torch.maximum(size, reached_size).add_(atol / rtol)
                    # Both are divided by rtol, which saves an operation.
                    errors = norm(attempt.stages.error(h / rtol).div_(scale))
                worst = errors.amax().item()  # the step's one host read
            tried += 1
            if worst <= 1.0:
                reached = position
                while reached < len(ts) and (ts[reached] - end) * way <= 0:
                    reached += 1
                step = Step(tried, t, h * way, tuple((s - t) / (end - t) for s in ts[position:reached]))
                after = self._after(attempt)
                h *= min(GROW, SAFETY * worst ** (-1 / self.tableau.order)) if worst > 0 else GROW
                yield Taken(step, before, after, self._outputs(attempt, step), rejected, h)
                t, before, size, position, rejected = end, after, reached_size, reached, 0
            else:
                h *= max(SHRINK, SAFETY * worst ** (-1 / self.tableau.order)) if math.isfinite(worst) else SHRINK
                rejected += 1
            if tried >= self.max_steps or h < shortest or t + h * way == t:
                if (t1 - t) * way > 0:
                    raise self.failure(f, before, attempt, errors, t, h * way, tried, driver)
        if not all_finite(before[0].detach()):  # an infinite row's error, relative to its size, is 0
            infinite = nonfinite_rows(before[0].detach())
            raise fail(self, f, infinite, t1, driver, Status.BLOW_UP, f"after {tried} steps tried")

    def integrate(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm = row_rms) -> Path:
        if self.batch == "independent":
            return self.marching.integrate(f, z0, ts, driver, norm)
        if f.programs is not None and norm is row_rms and not torch.is_grad_enabled() and len(ts) == 2:
            before = self.start(f, ts[0], z0, driver)
            control = Control(*self.tolerances(f, z0), self.max_steps, SAFETY, SHRINK, GROW, self.first_step)
            found = solved_loop(f, self.tableau, driver.clock, before, (ts[0], ts[1]), control)
            if found is not None:
                z, accepted, tried = found
                return Path(torch.stack([z0, z]), accepted, tried - accepted)
        return super().integrate(f, z0, ts, driver, norm)  # step by step; where a solve fails, this says how

    def again(self, f: Evaluator, step: Step, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        stages = stages_like(self.tableau, before[0])
        attempt = self.attempt(f, step.t, step.h, before, driver, stages)
        return self._after(attempt), self._outputs(attempt, step)

    def refuse_vmap(self, z0: Tensor) -> None:
        """Raise under torch.func.vmap, with the remedy."""
        if vmapped(z0):
            raise RuntimeError(
                f"{self!r} under torch.func.vmap: step size control reads errors on the host, which vmap forbids; "
                f"use a fixed grid such as RK4(steps), or hand the rows over as one batch (odelayers.jacobian does)"
            )

    def attempt(
        self, f: Evaluator, t: float, h: float, before: State, driver: Driver, stages: Stages, inside: bool = True
    ) -> Try:
        """One step of length h from t, whatever its error."""
        at, k = before
        if f.programs is not None:
            found = step_stages(f, self.tableau, driver.clock, before, (t, h), self.tolerances(f, at), inside)
            if found is not None:
                z, done, errors = found
                return Try(z, Compiled(self.tableau, at, done), h, errors)
        stages.begin(at)
        stages.put(0, k)
        for i, c in enumerate(self.tableau.c[1:], start=1):
            at = stages.advance(i, h)
            stages.put(i, driver.terms(f, t + c * h, at)[0])
        return Try(at, stages, h)

    def _after(self, attempt: Try) -> State:
        return attempt.z, attempt.stages.keep(len(self.tableau.a))

    def _outputs(self, attempt: Try, step: Step) -> list[Tensor]:
        """The states at the step's outputs, from its end or its continuous extension."""
        weights = self.tableau.dense_weights
        return [attempt.z if theta == 1.0 else attempt.stages.combine(weights(theta), step.h) for theta in step.outputs]

    @torch.no_grad()
    def choose_step(
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
        z, k = before
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
    def failure(
        self, f: Evaluator, before: State, attempt: Try, errors: Tensor, t: float, h: float, tried: int, driver: Driver
    ) -> SolveError:
        """Say which rows stopped the solve and why."""
        bad = ~errors.isfinite()
        rows = bad if bad.any() else errors >= 0.5 * errors.amax()  # steps within 15 % of the worst's, at order 5
        note = f"after {tried} steps tried, the last of length {abs(h):.3g}"
        if bad.any():
            return fail(self, f, rows, t, driver, Status.BLOW_UP, note)
        z, k = before[0][rows], before[1][rows]
        if (z * k).sum() * h > 0 and z.norm() < 1e-6 * max(abs(t), 1e-6) * k.norm():
            return fail(self, f, rows, t, driver, Status.BLOW_UP, note)
        if self._stiff(attempt, rows):
            return fail(self, f, rows, t, driver, Status.STIFF, note)
        status = Status.MAX_STEPS if tried >= self.max_steps else Status.STEP_UNDERFLOW
        return fail(self, f, rows, t, driver, status, note)

    def _stiff(self, attempt: Try, rows: Tensor) -> bool:
        """Whether |h lambda| is at the stability boundary, lambda from two stages at one time (Hairer, Wanner IV.2)."""
        stages, last = attempt.stages, len(self.tableau.c) - 1
        change = (stages.get(last) - stages.get(last - 1))[rows].norm()
        distance = (attempt.z - stages.advance(last - 1, attempt.h))[rows].norm()
        return bool(distance > 0) and (abs(attempt.h) * change / distance).item() > STABILITY_LIMIT


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
