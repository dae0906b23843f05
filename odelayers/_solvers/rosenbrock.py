"""A Rosenbrock method for stiff fields: one Jacobian and one LU decomposition a step, no nonlinear equation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from odelayers._driver import Driver, against
from odelayers._evaluator import Evaluator, dual, transformed
from odelayers._field import as_rows
from odelayers._jacobian import differentials, refuse_batch_statistics
from odelayers._solvers.adaptive import Adaptive
from odelayers._solvers.base import Norm, State, Taken
from odelayers._solvers.control import PredictiveRowControl, Rows
from odelayers._solvers.factored import Factored
from odelayers._solvers.rosenbrock_tableau import RODAS5P, RosenbrockTableau
from odelayers._solvers.rows import RowMarch, RowStep, failed_rows, failure, first_steps, grid, host, on, passed
from odelayers._solvers.stages import combined

__all__ = ["Rodas5P"]


class RosenbrockTry(NamedTuple):
    """One attempted step: the result, the embedded error, and the field's rows at its start."""

    z: Tensor
    error: Tensor
    k: Tensor


@dataclass(frozen=True)
class Rosenbrock(RowMarch, Adaptive):
    """An embedded, stiffly accurate Rosenbrock method; every row steps by itself."""

    tableau: ClassVar[RosenbrockTableau]

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return (z0,)

    def march(self, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver, norm: Norm) -> Iterator[Taken]:
        self._refuse(f)
        tolerances, z = self.tolerances(f, z0), z0
        with torch.no_grad():
            k = driver.terms(f, z0.new_full((len(z0),), ts[0]), z0)[0]
        first = first_steps(self, f, (z0, k), ts, driver, norm, tolerances)
        control = PredictiveRowControl(ts, first, self.tableau.order, self.max_steps)
        while (control.t != control.t1).any():
            h = control.lengths()
            attempt = self._attempt(f, control.t, h, z, driver)
            with torch.no_grad():  # the step's one host read
                error = host(norm(self._scaled_error(attempt, z, *tolerances)))
            verdict, before = control.judge(error), z
            if verdict.taken.any():
                h = np.where(verdict.taken, h, 0.0)
                outputs = passed(control, verdict, f.batch)
                step = RowStep(control.tried, verdict.taken.nonzero()[0], None, verdict.begun, h, None, outputs)
                z = attempt.z
                if not verdict.taken.all():
                    z = torch.where(against(on(z, verdict.taken), z.ndim), z, before)
                yield Taken(step, (before,), (z,), self._outputs(z, step), 0)
            if verdict.failed.any():
                failures = failed_rows((before, attempt.k), error, control, verdict.failed.nonzero()[0])
                raise failure(self, f, z0, failures, driver)

    def again(self, f: Evaluator, step: RowStep, before: State, driver: Driver) -> tuple[State, list[Tensor]]:
        z = self._attempt(f, step.t, step.h, before[0], driver).z
        return (z,), self._outputs(z, step)

    def _outputs(self, z: Tensor, step: RowStep) -> list[Tensor]:
        """The states at the output times that the step ends at."""
        return [] if step.outputs is None else [z.index_select(0, on(z, step.outputs.ends))]

    def _refuse(self, f: Evaluator) -> None:
        if transformed() or dual():
            raise RuntimeError(
                f"{self!r} under a torch.func transform or with dual numbers: its steps differentiate the field "
                f"themselves and read errors on the host, which these forbid; use a fixed grid such as RK4(steps), or "
                f"hand the rows over as one batch (odelayers.jacobian does)"
            )
        refuse_batch_statistics(f.field, repr(self))

    def _attempt(self, f: Evaluator, t: Rows, h: Rows, z: Tensor, driver: Driver) -> RosenbrockTry:
        """One step of length h from t of each row; one of length 0 stays where it is, and so does its derivative."""
        tableau = self.tableau
        *times, length = grid(tableau.c, t, h, z).unbind(0)
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
        return RosenbrockTry(combined(rows, stages, tableau.b, 1.0).view(z.shape), stages[-1].view(z.shape), k)

    def _linear(self, f: Evaluator, s: Tensor, z: Tensor, driver: Driver) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value (B, D), Jacobian (B, D, D) and derivative in time (B, D) of dz/ds, where s is the solver's time."""
        value, J, drift = differentials(f, cast(Tensor, driver.time(s)), z)
        value, rate = as_rows(value), driver.clock.rate
        if rate is None:
            return value, J, drift
        rate = rate.reshape(-1, 1)
        return rate * value, rate.unsqueeze(-1) * J, None if drift is None else rate.square() * drift

    def _scaled_error(self, attempt: RosenbrockTry, z: Tensor, rtol: float, atol: float) -> Tensor:
        """The embedded error over atol + rtol max(|z|, |z'|)."""
        scale = torch.maximum(z.abs(), attempt.z.abs()).mul_(rtol).add_(atol)
        return attempt.error / scale


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
