"""torchdiffeq as a solver."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchdiffeq
from torch import Tensor

from odelayers._checks import one_of, positive_int, positive_number
from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._solution import SolveError, Status
from odelayers._solvers.adaptive import Dopri5
from odelayers._solvers.base import Norm, Path, Solver, fail, nonfinite_rows, row_rms

__all__ = ["TorchDiffEq"]

_ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
# torchdiffeq 0.2.5's explicit_adams diverges on z' = Az and is left out.
_FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams", "fixed_adams")
_SCIPY = ("Radau", "BDF", "LSODA", "RK45", "DOP853", "RK23")


@dataclass(frozen=True)
class TorchDiffEq(Solver):
    """torchdiffeq's `odeint` as a solver, unchanged: its step control judges the batch as a whole.

    Args:
        method: one of torchdiffeq's methods. "scipy_solver" runs scipy's `scipy_method` on the CPU, whose values
            carry no gradient of their own: use it without one, or with `Adjoint`.
        rtol: relative tolerance of the adaptive methods.
        atol: absolute tolerance of the adaptive methods.
        step_size: step of the fixed methods; None takes one step between two output times, as torchdiffeq does.
        max_steps: step budget of the adaptive methods.
        scipy_method: scipy's integrator; "Radau" and "BDF" are implicit, for stiff fields.

    Raises:
        TypeError, ValueError: if the method is unknown, a number is out of range, or a fixed method's option is given
            to an adaptive one.
        SolveError: from the solve, when torchdiffeq gives up or the result is NaN or inf.

    Example:
        >>> TorchDiffEq("dopri5").rtol
        1e-05
    """

    method: str
    rtol: float = 1e-5
    atol: float = 1e-5
    step_size: float | None = None
    max_steps: int = 10_000
    scipy_method: str = "Radau"

    def __post_init__(self) -> None:
        one_of(self.method, "TorchDiffEq: method", (*_ADAPTIVE, *_FIXED, "scipy_solver"))
        one_of(self.scipy_method, "TorchDiffEq: scipy_method", _SCIPY)
        positive_number(self.rtol, "TorchDiffEq: rtol")
        positive_number(self.atol, "TorchDiffEq: atol")
        positive_int(self.max_steps, "TorchDiffEq: max_steps")
        if self.step_size is not None:
            positive_number(self.step_size, "TorchDiffEq: step_size")
            if self.method not in _FIXED:
                raise ValueError(f"TorchDiffEq: step_size goes with {', '.join(_FIXED)}, got method={self.method!r}")

    def _options(self) -> dict[str, Any]:
        if self.method == "scipy_solver":
            return {"solver": self.scipy_method}
        if self.method in _FIXED:
            return {} if self.step_size is None else {"step_size": self.step_size}
        return {"max_num_steps": self.max_steps}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def integrate(
        self,
        f: Evaluator,
        z0: Tensor,
        ts: Sequence[float],
        driver: Driver,
        norm: Norm = row_rms,
        adjoint: tuple[Tensor, ...] | None = None,
    ) -> Path:
        """As `Solver.integrate`; with `adjoint`, gradients of these tensors and z0 come from `odeint_adjoint`."""
        bad = nonfinite_rows(z0)
        if bad.any():
            raise fail(self, f, bad, ts[0], driver, Status.NONFINITE)
        func = (_CountingFunc if self.method in _ADAPTIVE else _Func)(f, driver, ts[0])
        times = torch.tensor(ts, dtype=torch.float64, device=z0.device)
        solve = torchdiffeq.odeint if adjoint is None else torchdiffeq.odeint_adjoint
        more = {} if adjoint is None else {"adjoint_params": adjoint}
        with warnings.catch_warnings():
            # torchdiffeq hands scipy a min_step that only some of its integrators know.
            warnings.filterwarnings("ignore", message=".*`min_step`")
            try:
                zs = solve(
                    func, z0, times, rtol=self.rtol, atol=self.atol, method=self.method, options=self._options(), **more
                )
            except AssertionError as error:
                raise self._failure(f, z0, ts, func, driver, f"torchdiffeq says: {error}") from error
        bad = nonfinite_rows(zs.transpose(0, 1))
        if bad.any():
            raise fail(self, f, bad, ts[-1], driver, Status.BLOW_UP, "by the end of the solve")
        return Path(zs, func.accepted, func.rejected)

    @torch.no_grad()
    def _failure(
        self, f: Evaluator, z0: Tensor, ts: Sequence[float], func: _Func, driver: Driver, note: str
    ) -> SolveError:
        """Which rows failed and why: torchdiffeq judges the batch as a whole, so `Dopri5` is asked instead."""
        try:
            Dopri5(self.rtol, self.atol, self.max_steps).integrate(f, z0, ts, driver)
        except SolveError as error:
            return SolveError(f"{f.field.name} solved by {self!r}", error.rows, error.t, error.status, note)
        everyone = torch.ones(len(z0), dtype=torch.bool, device=z0.device)
        status = Status.MAX_STEPS if "max_num_steps" in note else Status.STEP_UNDERFLOW
        return fail(self, f, everyone, func.reached, driver, status, note)


class _Func:
    """The field as torchdiffeq calls it; methods that do not tell their steps leave the counts at zero."""

    def __init__(self, f: Evaluator, driver: Driver, start: float) -> None:
        self.f, self.driver = f, driver
        self.accepted = self.rejected = 0
        self.reached = start

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        s = float(t.detach())
        self.reached = s if math.isfinite(s) else self.reached
        # The field sees the very t that torchdiffeq steps to: its graph reaches back into the first step's length.
        return self.driver.terms(self.f, t.to(z.dtype), z)[0]


class _CountingFunc(_Func):
    """As above with the step callbacks, which torchdiffeq wants on its adaptive methods alone."""

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.rejected += 1
