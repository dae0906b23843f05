"""The gradient of an equilibrium, by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from odelayers._driver import Driver
from odelayers._evaluator import Evaluator
from odelayers._field import as_rows
from odelayers._gradients.base import Gradient, cut
from odelayers._gradients.setting import Setting
from odelayers._jacobian import value_and_jacobian
from odelayers._solution import GradientError
from odelayers._solvers.base import Path, Solver
from odelayers._solvers.settling import Settling

__all__ = ["Implicit"]


@dataclass(frozen=True)
class Implicit(Gradient):
    """Differentiate the equilibrium that `t1=Equilibrium(tol, t_max)` found, not the way to it.

    By the implicit function theorem, f(z*, theta) = 0 gives

        dL/dtheta = -(dL/dz*) J^-1 df/dtheta,  J = df/dz at z*.

    **The gradient with respect to the initial state is zero**, since z* does not move with z0 inside a basin. So
    nothing before the block is trained through it, and an attack must not use it: a zero gradient is no robustness.
    Memory does not grow with the number of steps. The accuracy is that of |f| <= tol: the point where the solve stopped
    is taken for z*. Each row that the loss depends on costs its (D, D) Jacobian, D evaluations backwards in one call,
    and one linear solve. The gradient cannot be differentiated twice.

    Raises:
        ValueError: from the block, if t1 is no `Equilibrium` or f takes the time; from the solve, with `running`.
        GradientError: from the backward pass, if a row that is not at rest gets a gradient, J is singular, or the
            incoming gradient is NaN or inf; from the solve, if the field depends on a tensor captured by a closure.

    Source: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019, theorem 1.

    Example:
        >>> import torch, odelayers
        >>> relax = lambda z, c: c.tanh() - z  # z* = tanh(c)
        >>> end = odelayers.Equilibrium(1e-4, 100.0)
        >>> block = odelayers.ODEBlock(relax, t1=end, gradient=Implicit(), time=False)
        >>> c, z = torch.zeros(1, 1, requires_grad=True), torch.ones(1, 1, requires_grad=True)
        >>> block(z, context=c).backward()
        >>> c.grad.item(), z.grad.item()
        (1.0, 0.0)
    """

    def accepts(self, solver: Solver) -> bool:
        # Which solvers can settle is the end time's affair.
        return True

    def solve(self, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> Path:
        if not isinstance(solver, Settling):
            raise TypeError(f"Implicit: expected a solve to an equilibrium, got {solver!r}")
        if not torch.is_grad_enabled():
            return solver.integrate(f, z0, ts, driver)
        driver, originals, leaves = cut(f, driver)
        if not any(x.requires_grad for x in (z0, *originals)):
            return solver.integrate(f, z0, ts, driver)
        point = _Point(solver, f, Setting(f, driver, z0.device, originals, leaves))
        zs: Tensor = _AtRest.apply(point, z0, tuple(ts), driver, *originals)  # type: ignore[no-untyped-call]
        return Path(zs, point.path.accepted, point.path.rejected)


class _Point:
    """The end of one solve as the backward pass needs it."""

    path: Path

    def __init__(self, solver: Settling, f: Evaluator, setting: Setting) -> None:
        self.solver, self.f, self.setting, self.wanted = solver, f, setting, setting.leaves

    def forward(self, z0: Tensor, ts: tuple[float, ...], driver: Driver) -> Tensor:
        with self.setting.restored():
            self.path = self.solver.integrate(self.f, z0, ts, driver)
        self.setting.check_still()
        return torch.stack([z0, self.path.zs[-1]])  # a batch at rest to begin with has taken no step

    def backward(self, z: Tensor, gradient: Tensor) -> list[Tensor | None]:
        """The gradients with respect to the wanted tensors."""
        rows = as_rows(gradient).any(dim=1)
        restless = rows & ~self.solver.settled
        if restless.any():
            raise GradientError(
                f"Implicit: of the rows solved {restless.nonzero().flatten().tolist()} get a gradient but were not at "
                f"rest at t_max, |f| > tol={self.solver.tol:g}: no equilibrium to differentiate. Leave them out of the "
                f"loss (solution.stats.settled), raise t_max or tol, or use gradient=Backprop()"
            )
        if not rows.any():
            return [None] * len(self.wanted)
        z = z[rows]
        with torch.enable_grad():  # a context per row is picked in the graph
            part = self.f.take(rows.nonzero().flatten())
            dz = part(0.0, z)
        _, J = value_and_jacobian(part, z, check_finite=False)
        pulled, info = torch.linalg.solve_ex(J.mT, as_rows(gradient[rows]))
        singular = (info != 0) | ~pulled.isfinite().all(dim=1)
        if singular.any():
            raise GradientError(
                f"Implicit: the Jacobian is singular at the equilibria of rows "
                f"{rows.nonzero().flatten()[singular].tolist()}: they are not isolated, and no gradient is theirs "
                f"alone; use gradient=Backprop()"
            )
        if not dz.requires_grad:
            return [None] * len(self.wanted)
        return list(torch.autograd.grad(dz, self.wanted, -pulled.view(z.shape), allow_unused=True))


class _AtRest(torch.autograd.Function):
    """The solve as one node of the graph, whose backward pass asks for the equilibrium's derivative alone."""

    @staticmethod
    def forward(ctx: Any, point: _Point, z0: Tensor, ts: tuple[float, ...], driver: Driver, *wanted: Tensor) -> Tensor:
        zs = point.forward(z0, ts, driver)
        ctx.point = point
        ctx.save_for_backward(zs)
        return zs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (zs,) = ctx.saved_tensors
        with ctx.point.setting.again(gradient, gradient[0]) as spoilt:
            start, *found = spoilt or [gradient[0], *ctx.point.backward(zs[-1], gradient[-1])]
        return None, start, None, None, *found
