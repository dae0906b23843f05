"""A Rosenbrock method for stiff fields: one Jacobian and one LU decomposition a step, no nonlinear equation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from odelayers._driver import Driver, against
from odelayers._evaluator import Evaluator, transformed
from odelayers._field import as_rows
from odelayers._jacobian import differentials, refuse_batch_statistics
from odelayers._solution import SolveError, Status
from odelayers._solvers.adaptive import Adaptive
from odelayers._solvers.base import Norm, State, Taken, fail, nonfinite_rows
from odelayers._solvers.factored import Factored
from odelayers._solvers.rosenbrock_tableau import RODAS5P, RosenbrockTableau
from odelayers._solvers.rowwise import RowControl, RowStep
from odelayers._solvers.stages import combined

__all__ = ["Rodas5P"]


class Try(NamedTuple):
    """One attempted step: the result, the embedded error, and the field's rows at its start."""

    z: Tensor
    error: Tensor
    k: Tensor


@dataclass(frozen=True)
class Rosenbrock(Adaptive):
    """An embedded, stiffly accurate Rosenbrock method; every row steps by itself."""

    tableau: ClassVar[RosenbrockTableau]

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return z0, z0.new_empty(0, *z0.shape[1:])  # the state, and the outputs found

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        self._refuse(f)
        tolerances = self.tolerances(f, z0)
        first = self._first_steps(f, z0, ts[0], ts[-1], driver, norm, *tolerances)
        control = RowControl(ts, first.to("cpu", torch.float64), self.tableau.order)
        before, rejected = self.start(f, ts[0], z0, driver), 0
        while (going := control.going).any():
            h = control.propose()
            attempt = self._attempt(f, control.t, h, before[0], driver)
            with torch.no_grad():  # the step's one host read
                errors = norm(self._scaled_error(attempt, before[0], *tolerances)).to("cpu", torch.float64)
            ok = control.judge(errors)
            if (ok & going).any():
                z = attempt.z
                if not ok.all():
                    z = torch.where(against(ok.to(z.device), z.ndim), z, before[0])
                step = control.advance(ok)
                after, outputs = self._after(z, step, before)
                yield Taken(step, before, after, outputs, rejected)
                before, rejected = after, 0
            else:
                rejected += 1
            if control.stuck.any() or (control.tried >= self.max_steps and control.going.any()):
                raise self._failure(f, driver, control, before[0], attempt.k)

    def again(self, f: Evaluator, step: RowStep, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        return self._after(self._attempt(f, step.t, step.h, before[0], driver).z, step, before)

    def spread(self, gradient: Tensor, steps: Sequence[RowStep]) -> list[list[Tensor]]:
        return [[] if step.order is None else [*gradient[1:]] for step in steps]  # the last step hands over all

    def _refuse(self, f: Evaluator) -> None:
        if transformed():
            raise RuntimeError(
                f"{self!r} under a torch.func transform: its steps differentiate the field themselves and read errors "
                f"on the host, which transforms forbid; use a fixed grid such as RK4(steps), or hand the rows over as "
                f"one batch (odelayers.jacobian does)"
            )
        refuse_batch_statistics(f.field, repr(self))

    def _attempt(self, f: Evaluator, t: Tensor, h: Tensor, z: Tensor, driver: Driver) -> Try:
        """One step of length h (B,) from t (B,); a row of length 0 stays where it is, and so does its derivative."""
        tableau = self.tableau
        c = torch.tensor(tableau.c, dtype=torch.float64).unsqueeze(1)
        # All that the device must know of the times goes there at once.
        length, *times = torch.cat([h.unsqueeze(0), t + c * h]).to(z).unbind(0)
        times = [against(s, driver.clock.ndim) for s in times]
        length = length.unsqueeze(1)
        k, J, drift = self._linear(f, times[0], z, driver)
        W = Factored(torch.eye(J.shape[-1], dtype=z.dtype, device=z.device) - tableau.gamma * length.unsqueeze(-1) * J)
        rows, value = as_rows(z), k
        stages: list[Tensor] = []
        for i in range(len(tableau.c)):
            if i:
                at = combined(rows, stages, tableau.a[i - 1], 1.0).view(z.shape)
                value = as_rows(driver.terms(f, times[i], at)[0])
            right = tableau.gamma * length * value
            if drift is not None and tableau.d[i]:
                right = right + (tableau.gamma * tableau.d[i]) * length.square() * drift
            if i:
                right = combined(right, stages, tableau.e[i - 1], tableau.gamma)
            stages.append(W.solve(right))
        # The method is stiffly accurate: its last stage is the embedded error.
        return Try(combined(rows, stages, tableau.b, 1.0).view(z.shape), stages[-1].view(z.shape), k)

    def _linear(self, f: Evaluator, s: Tensor, z: Tensor, driver: Driver) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value (B, D), Jacobian (B, D, D) and derivative in time (B, D) of dz/ds, where s is the solver's time."""
        value, J, drift = differentials(f, cast(Tensor, driver.time(s)), z)
        value, rate = as_rows(value), driver.clock.rate
        if rate is None:
            return value, J, drift
        rate = rate.reshape(-1, 1)
        return rate * value, rate.unsqueeze(-1) * J, None if drift is None else rate.square() * drift

    def _after(self, z: Tensor, step: RowStep, before: State) -> tuple[State, list[Tensor]]:
        """The state after a step with the outputs that it reaches; after the last, all outputs in their order."""
        found = before[1]
        if len(step.rows):
            found = torch.cat([found, z[step.rows.to(z.device)]])
        outputs: list[Tensor] = []
        if step.order is not None:
            found = found[step.order.to(z.device)]
            outputs = [*found.view(len(found) // len(z), *z.shape).unbind(0), z]
        return (z, found), outputs

    def _scaled_error(self, attempt: Try, z: Tensor, rtol: float, atol: float) -> Tensor:
        """The embedded error over atol + rtol max(|z|, |z'|)."""
        scale = torch.maximum(z.abs(), attempt.z.abs()).mul_(rtol).add_(atol)
        return attempt.error / scale

    @torch.no_grad()
    def _first_steps(
        self, f: Evaluator, z: Tensor, t0: float, t1: float, driver: Driver, norm: Norm, rtol: float, atol: float
    ) -> Tensor:
        """The given first step, or Hairer's choice for each row (Solving ODEs I, II.4), `(B,)`."""
        span, way, ndim = abs(t1 - t0), math.copysign(1.0, t1 - t0), driver.clock.ndim
        s = against(z.new_full((len(z),), t0), ndim)
        k = driver.terms(f, s, z)[0]
        scale = z.abs().mul_(rtol).add_(atol)
        size, speed = norm(z / scale), norm(k / scale)
        bad = nonfinite_rows(z) | nonfinite_rows(k)
        beyond = bad | ~size.isfinite() | ~speed.isfinite()
        if beyond.any():
            raise fail(self, f, beyond, t0, driver, Status.NONFINITE if bad.any() else Status.BLOW_UP)
        if self.first_step is not None:
            return torch.full_like(size, min(self.first_step, span))
        h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=span)
        there = driver.terms(f, s + way * against(h, ndim), z + way * against(h, z.ndim) * k)[0]
        fastest = torch.maximum(speed, norm((there - k) / scale) / h)
        guess = (0.01 / fastest) ** (1 / self.tableau.order)
        guess = torch.where(fastest <= 1e-15, (h * 1e-3).clamp(min=1e-6), guess)
        return torch.where(fastest.isfinite(), torch.minimum(100 * h, guess), h).clamp(max=span)

    @torch.no_grad()
    def _failure(self, f: Evaluator, driver: Driver, control: RowControl, z: Tensor, k: Tensor) -> SolveError:
        """Say which rows stopped the solve and why."""
        rows, status = control.stuck, Status.STEP_UNDERFLOW
        if not rows.any():
            rows, status = control.going, Status.MAX_STEPS
        size, speed = as_rows(z).to("cpu", torch.float64), k.to("cpu", torch.float64)
        outwards = (size * speed).sum(dim=1) * control.way > 0
        brief = size.norm(dim=1) < 1e-6 * control.t.abs().clamp(min=1e-6) * speed.norm(dim=1)
        blown = rows & (~control.finite | outwards & brief)
        if blown.any():
            rows, status = blown, Status.BLOW_UP
        note = f"after {control.tried} steps tried, the last of length {control.h[rows].min().item():.3g}"
        return fail(self, f, rows, against(control.t.to(z), driver.clock.ndim), driver, status, note)


@dataclass(frozen=True)
class Rodas5P(Rosenbrock):
    """Steinebach's Rosenbrock method of order 5(4), for stiff fields: L-stable, with a gradient for training.

    A step takes the field's Jacobian, one LU decomposition of a (D, D) matrix for each row and eight evaluations; no
    nonlinear equation is solved. So it suits states of up to a few hundred coordinates. A closed form of the Jacobian
    is used where the field has one (`linearize`, see `jacobian`).

    Every row steps as if alone: a fast phase of one does not slow the others down. A field that takes the time gets
    one for each row, which broadcasts against z. A step ends at each output time, where a continuous extension would
    miss the tolerance on stiff modes. Step sizes are constants to the gradient. A state in half precision is solved for
    in float32, and rtol is not taken below four roundings of the dtype that the field is evaluated in.

    Args:
        rtol: relative tolerance of a step's local error.
        atol: absolute tolerance; of components that stay small, such as the 1e-5 of Robertson's problem, it decides.
        max_steps: steps tried by a row, rejected ones included, before the solve fails.
        first_step: length of the first step; chosen for each row when None.

    Raises:
        TypeError, ValueError: if a number is not positive and finite.
        ValueError: from the solve, if the field holds a BatchNorm that uses batch statistics.
        SolveError: from the solve, when rows blow up or spend max_steps.

    Source: Steinebach, BIT Numerical Mathematics 63:27 (2023).

    Example:
        >>> import odelayers
        >>> block = odelayers.ODEBlock(lambda z: -1e6 * (z - 1), solver=Rodas5P())
        >>> solution = block.solve(torch.zeros(2, 3, dtype=torch.float64))
        >>> bool((solution.final - 1).abs().max() < 1e-5), solution.stats.accepted < 50
        (True, True)
    """

    tableau, order = RODAS5P, 5
