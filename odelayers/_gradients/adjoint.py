"""The continuous adjoint: solve a second equation backwards in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from odelayers._checks import positive_number
from odelayers._driver import Clock, Driver
from odelayers._evaluator import Evaluator
from odelayers._field import Field, as_rows
from odelayers._gradients.base import Gradient, cut, evaluators
from odelayers._gradients.setting import Setting
from odelayers._solution import GradientError, SolveError
from odelayers._solvers.adaptive import AdaptiveRungeKutta
from odelayers._solvers.base import Path, Solver, row_rms
from odelayers._solvers.fixed import FixedRungeKutta
from odelayers._solvers.reference import TorchDiffEq
from odelayers._solvers.reference_sde import TorchSDE

__all__ = ["Adjoint"]


@dataclass(frozen=True)
class Adjoint(Gradient):
    """Solve the adjoint equation backwards in time: memory independent of the number of steps, at a price.

    Not recommended on contracting fields: their backward solve expands, and z' = -10z over a time of 5 is lost
    already. The state recovered at every output time is compared with the one the forward solve stored, and a
    difference beyond `max_drift` raises. Prefer `Checkpoint`. The gradient approximates that of the exact flow; its
    error falls with the solver's tolerance, and it cannot be differentiated twice.

    With `TorchDiffEq` this is `odeint_adjoint`, with `TorchSDE("reversible_heun")` `adjoint_reversible_heun`; neither
    checks what it recovers.

    Args:
        max_drift: largest relative difference, per row, between the state recovered and the state stored.

    Raises:
        GradientError: from the backward pass, if the recovered state drifts or the incoming gradient is NaN or inf;
            from the solve, if the field depends on a tensor captured by a closure.
        SolveError: from the backward pass, if its solve fails.

    Source: Chen et al., Neural Ordinary Differential Equations, NeurIPS 2018, appendix B; parameters are left out of
    the error norm as Kidger, Chen and Lyons ("Hey, that's not an ODE", ICML 2021) advise.

    Example:
        >>> Adjoint()
        Adjoint(max_drift=0.01)
    """

    max_drift: float = 1e-2

    def __post_init__(self) -> None:
        positive_number(self.max_drift, "Adjoint: max_drift")

    def accepts(self, solver: Solver) -> bool:
        if isinstance(solver, TorchSDE):
            return solver.method == "reversible_heun"
        if isinstance(solver, AdaptiveRungeKutta):
            return solver.batch == "shared"  # the adjoint equation is one row: a sum over the batch
        return isinstance(solver, FixedRungeKutta | TorchDiffEq)

    def solve(self, solver: Solver, f: Evaluator, z0: Tensor, ts: Sequence[float], driver: Driver) -> Path:
        if not torch.is_grad_enabled():
            return solver.integrate(f, z0, ts, driver)
        driver, originals, leaves = cut(f, driver)
        setting = Setting(f, driver, z0.device, originals, leaves)
        if isinstance(solver, TorchSDE) or (isinstance(solver, TorchDiffEq) and solver.method != "scipy_solver"):
            for evaluator in evaluators(f, driver):
                evaluator.within = setting.restored  # the library evaluates again in its own backward pass
            path, zs = _Library.solved(solver, f, z0, ts, driver, originals, setting)
            setting.check_still()
            return replace(path, zs=zs)
        backward = _Backward(self, solver, f, tuple(ts), cast(Clock, driver), setting)
        zs = _Flow.apply(backward, z0, *originals)  # type: ignore[no-untyped-call]
        return Path(zs, backward.accepted, backward.rejected)


class _Backward:
    """One solve as its adjoint needs it."""

    def __init__(
        self,
        gradient: Adjoint,
        solver: Solver,
        f: Evaluator,
        ts: tuple[float, ...],
        clock: Clock,
        setting: Setting,
    ) -> None:
        self.gradient, self.solver, self.f, self.ts, self.clock = gradient, solver, f, ts, clock
        self.setting, self.wanted = setting, setting.leaves
        self.accepted = self.rejected = 0

    def forward(self, z0: Tensor) -> Tensor:
        with self.setting.restored():
            path = self.solver.integrate(self.f, z0, self.ts, self.clock)
        self.accepted, self.rejected = path.accepted, path.rejected
        self.setting.check_still()
        return path.zs

    def backward(self, zs: Tensor, gradient: Tensor) -> list[Tensor | None]:
        """Solve for (z, a, dL/dtheta) from the last output time to the first, re-anchored at each of them."""
        n, shape = zs[0].numel(), zs[0].shape
        field = _AdjointField(self.f, self.clock, self.wanted, shape)
        equation = Evaluator(cast(Field, field), 1)
        sizes = [_real(x).numel() for x in self.wanted]
        totals = zs.new_zeros(sum(sizes))  # in the state's dtype, whatever the parameters' are
        a = gradient[-1]
        size = torch.stack([as_rows(z).norm(dim=1) for z in zs]).amax(dim=0)  # of each row along its solution
        for i in range(len(self.ts) - 1, 0, -1):
            y = torch.cat([zs[i].reshape(-1), a.reshape(-1), totals]).unsqueeze(0)
            span = (self.ts[i], self.ts[i - 1])
            y = self.solver.integrate(equation, y, span, Clock(), norm=lambda e: _sample_norm(e, n, shape)).zs[-1, 0]
            self._check_drift(y[:n].view(shape), zs[i - 1], size, self.ts[i - 1])
            a, totals = y[n : 2 * n].view(shape) + gradient[i - 1], y[2 * n :]
        shaped = [_as(part, x) for part, x in zip(torch.split(totals, sizes), self.wanted, strict=True)]
        return [a, *(g if used else None for g, used in zip(shaped, field.used, strict=True))]

    def _check_drift(self, recovered: Tensor, stored: Tensor, size: Tensor, t: float) -> None:
        drift = as_rows(recovered - stored).norm(dim=1) / size.clamp(min=torch.finfo(stored.dtype).tiny)
        worst = drift.max().item()
        if not worst <= self.gradient.max_drift:
            raise GradientError(
                f"Adjoint: solved backwards, the state at s = {t:g} differs from the forward solve's by {worst:.2g} "
                f"(relative, worst row {int(drift.argmax())}), more than max_drift={self.gradient.max_drift:g}: the "
                f"field contracts too much for a backward solve and the gradient would be wrong. "
                f"Use gradient=Checkpoint() or Backprop(), a tighter tolerance, or a shorter time"
            )


def _real(x: Tensor) -> Tensor:
    """A complex tensor as real and imaginary parts, any other as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _as(flat: Tensor, like: Tensor) -> Tensor:
    """Flat real numbers as a tensor of this shape and dtype."""
    parts = flat.view(_real(like).shape).to(_real(like).dtype)
    return torch.complex(*parts.unbind(-1)) if like.is_complex() else parts


def _sample_norm(error: Tensor, n: int, shape: torch.Size) -> Tensor:
    """The worst sample's error in (z, a); the parameters' integrals are quadratures and stay out."""
    pair = error[0, : 2 * n].view(2, *shape).transpose(0, 1)
    return row_rms(pair).amax().unsqueeze(0)


class _AdjointField:
    """The right-hand side (f, -a df/dz, -a df/dtheta) over a flat state."""

    def __init__(self, f: Evaluator, clock: Clock, wanted: Sequence[Tensor], shape: torch.Size) -> None:
        self.inner, self.clock, self.wanted, self.shape = f, clock, wanted, shape
        self.used = [False] * len(wanted)

    def __call__(self, t: Tensor | float, y: Tensor) -> Tensor:
        n = self.shape.numel()
        z, a = y[0, :n].view(self.shape).detach().requires_grad_(), y[0, n : 2 * n].view(self.shape)
        with torch.enable_grad():
            dz = self.clock.terms(self.inner, cast(float, t), z)[0]
        into: list[Tensor] = [z, *self.wanted]
        found = torch.autograd.grad(dz, into, -a, allow_unused=True) if dz.requires_grad else [None] * len(into)
        self.used = [was or g is not None for was, g in zip(self.used, found[1:], strict=True)]
        rates = [torch.zeros_like(x) if g is None else g for x, g in zip(into, found, strict=True)]
        return torch.cat([_real(part.detach()).reshape(-1).to(y.dtype) for part in (dz, *rates)]).unsqueeze(0)

    @property
    def f(self) -> Any:
        """What the tensors of the field are found in, for messages."""
        return self.inner.field.f

    @property
    def name(self) -> str:
        """For messages."""
        return f"the adjoint of {self.inner.field.name}"


class _Flow(torch.autograd.Function):
    """The solve as one node of the graph, whose backward pass solves the adjoint equation."""

    @staticmethod
    def forward(ctx: Any, backward: _Backward, z0: Tensor, *wanted: Tensor) -> Tensor:
        zs = backward.forward(z0)
        ctx.solve = backward
        ctx.save_for_backward(zs)
        return zs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (zs,) = ctx.saved_tensors
        setting: Setting = ctx.solve.setting
        with setting.again(gradient, gradient[0]) as spoilt:
            try:
                return None, *(spoilt or ctx.solve.backward(zs, gradient))
            except SolveError:
                if not setting.scaled:
                    raise
                return None, *setting.spoilt(gradient[0])


class _Library(torch.autograd.Function):
    """A library's adjoint solve as one node, its own graph kept apart between leaves."""

    @staticmethod
    def solved(
        solver: TorchDiffEq | TorchSDE,
        f: Evaluator,
        z0: Tensor,
        ts: Sequence[float],
        driver: Driver,
        originals: list[Tensor],
        setting: Setting,
    ) -> tuple[Path, Tensor]:
        start = z0.detach().requires_grad_()
        path: Path = solver.integrate(f, start, ts, driver, adjoint=tuple(setting.leaves))
        zs: Tensor = _Library.apply((path.zs, start), setting, z0, *originals)  # type: ignore[no-untyped-call]
        return path, zs

    @staticmethod
    def forward(ctx: Any, solved: tuple[Tensor, Tensor], setting: Setting, z0: Tensor, *originals: Tensor) -> Tensor:
        # As a tuple the library's states are no input: autograd would solve backwards once more, for a gradient of 0.
        zs, ctx.start = solved
        ctx.zs, ctx.setting = zs, setting
        return zs.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        into = [ctx.start, *ctx.setting.leaves]
        with ctx.setting.again(gradient, ctx.start) as spoilt:
            found = spoilt or torch.autograd.grad(ctx.zs, into, gradient, retain_graph=True)
        return None, None, *found
