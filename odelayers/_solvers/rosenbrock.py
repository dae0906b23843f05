"""A Rosenbrock method for stiff fields: one Jacobian and one LU decomposition a step, no nonlinear equation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator, dual, transformed
from odelayers._field import as_rows
from odelayers._jacobian import differentials, refuse_batch_statistics
from odelayers._solvers.adaptive import Adaptive
from odelayers._solvers.base import State
from odelayers._solvers.control import PredictiveRowControl, RowControl, Rows
from odelayers._solvers.factored import Factored
from odelayers._solvers.rosenbrock_tableau import RODAS5P, RosenbrockTableau
from odelayers._solvers.row_march import RowMarch
from odelayers._solvers.rows import Failed, Outputs, Part, failed_rows, grid, on
from odelayers._solvers.stages import combined

__all__ = ["Rodas5P"]


class Try(NamedTuple):
    """An attempted step: where from, the field's rows there, the result, and the embedded error."""

    before: State
    k: Tensor
    z: Tensor
    embedded: Tensor

    def after(self) -> State:
        return (self.z,)

    def error(self, rtol: float, atol: float) -> Tensor:
        return self.embedded / torch.maximum(self.before[0].abs(), self.z.abs()).mul_(rtol).add_(atol)

    def read(self, outputs: Outputs) -> Tensor:
        return self.z.index_select(0, on(self.z, outputs.ends))  # steps end at every output

    def failed(self, error: Rows, control: RowControl, at: Rows) -> list[Failed]:
        return failed_rows((*self.before, self.k), error, control, at)


@dataclass(frozen=True)
class Rosenbrock(RowMarch, Adaptive):
    """An embedded, stiffly accurate Rosenbrock method; every row steps by itself."""

    tableau: ClassVar[RosenbrockTableau]

    @property
    def told(self) -> Rosenbrock:
        return self

    def control(self, ts: Sequence[float], first: Rows) -> PredictiveRowControl:
        return PredictiveRowControl(ts, first, self.tableau.order, self.max_steps)

    def start(self, f: Evaluator, t0: float, z0: Tensor, driver: Driver) -> State:
        return (z0,)

    def refuse(self, f: Evaluator, z0: Tensor) -> None:
        if transformed() or dual():
            raise RuntimeError(
                f"{self!r} under a torch.func transform or with dual numbers: its steps differentiate the field "
                f"themselves and read errors on the host, which these forbid; use a fixed grid such as RK4(steps), or "
                f"hand the rows over as one batch (odelayers.jacobian does)"
            )
        refuse_batch_statistics(f.field, repr(self))

    def attempt(self, part: Part, t: Rows, h: Rows, before: State) -> Try:
        """One step of each row, by one Jacobian and one decomposition."""
        tableau, (z,) = self.tableau, before
        *times, length = grid(tableau.c, t, h, z).unbind(0)
        length = length.unsqueeze(1)
        with part.evaluating(z) as (f, driver):
            k, J, drift = self._linear(f, times[0], z, driver)
        W = Factored(torch.eye(J.shape[-1], dtype=z.dtype, device=z.device) - tableau.gamma * length.unsqueeze(-1) * J)
        rows, value = as_rows(z), k
        stages: list[Tensor] = []
        for i in range(len(tableau.c)):
            if i:
                value = as_rows(part.rate(times[i], combined(rows, stages, tableau.a[i - 1], 1.0).view(z.shape)))
            right = tableau.gamma * length * value
            if drift is not None and tableau.d[i]:
                right = right + (tableau.gamma * tableau.d[i]) * length.square() * drift
            if i:
                right = combined(right, stages, tableau.e[i - 1], tableau.gamma)
            stages.append(W.solve(right))
        # The method is stiffly accurate: its last stage is the embedded error.
        return Try(before, k, combined(rows, stages, tableau.b, 1.0).view(z.shape), stages[-1].view(z.shape))

    def _linear(self, f: Evaluator, s: Tensor, z: Tensor, driver: Driver) -> tuple[Tensor, Tensor, Tensor | None]:
        """Value (B, D), Jacobian (B, D, D) and derivative in time (B, D) of dz/ds, where s is the solver's time."""
        value, J, drift = differentials(f, cast(Tensor, driver.time(s)), z)
        value, rate = as_rows(value), driver.clock.rate
        if rate is None:
            return value, J, drift
        rate = rate.reshape(-1, 1)
        return rate * value, rate.unsqueeze(-1) * J, None if drift is None else rate.square() * drift


@dataclass(frozen=True)
class Rodas5P(Rosenbrock):
    """Steinebach's Rosenbrock method of order 5(4), for stiff fields: L-stable, with a gradient for training.

    A step takes the field's Jacobian, one LU decomposition of a (D, D) matrix for each row and eight evaluations; no
    nonlinear equation is solved. So it suits states of up to a few hundred coordinates. A closed form of the Jacobian
    is used where the field has one (`linearize`, see `jacobian`).

    Every row steps as if alone, and leaves the batch at its end: a fast phase of one does not slow the others down. A
    field that takes the time gets one for each row under way, which broadcasts against z; what it knows of each row
    must come as context. A step ends at each output time, where a continuous extension would
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
