"""The libraries of torch side by side: each is a function from the initial state to the final one.

What every library is asked for is the same: one final state of one batch, at one tolerance or over one fixed grid, with
its settings as they come, except that the way through the step size control is not differentiated (nobody does by
default but torchode, which is told not to).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torchdiffeq
from harness import Run, missing
from torch import Tensor, nn

from odelayers import ODEBlock, count_nfe

Solve = Callable[[Tensor], Tensor]


def gradients(f: nn.Module, z: Tensor, solve: Solve) -> Tensor:
    """Forward and backward: the gradient of |z(t1)|^2 with respect to every parameter of f and z0, as one vector."""
    z = z.detach().requires_grad_()
    return torch.cat([g.flatten() for g in torch.autograd.grad(solve(z).square().sum(), [*f.parameters(), z])])


def evaluations(f: nn.Module, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """How often `run` evaluates f, whichever library calls it, and what it returns."""
    calls: list[None] = []
    hook = f.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        result = run()
    finally:
        hook.remove()
    return len(calls), result


def counted(block: ODEBlock, run: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """The same by the library's own count, which needs no hook in f and holds for compiled blocks too."""
    with count_nfe(block) as count:
        result = run()
    return count.nfe, result


def no_graph(solve: Solve, z: Tensor) -> Tensor:
    """Forward alone."""
    with torch.no_grad():
        return solve(z)


def forward(f: nn.Module, z: Tensor, solve: Solve) -> Run:
    """A case's run forward, of a peer or of a block."""
    go = partial(no_graph, solve, z)
    return Run(go, partial(counted, solve, go) if isinstance(solve, ODEBlock) else partial(evaluations, f, go))


def training(f: nn.Module, z: Tensor, solve: Solve) -> Run:
    """A case's run forward and backward, of a peer or of a block."""
    go = partial(gradients, f, z, solve)
    return Run(go, partial(counted, solve, go) if isinstance(solve, ODEBlock) else partial(evaluations, f, go))


def bare(
    make: Callable[[nn.Module, Tensor, Solve], Run], f: nn.Module, z: Tensor, nfe: float, *, compiled: bool = False
) -> Run:
    """The floor: the field of torch alone, one chain z -> f(z) of `nfe` evaluations; it solves nothing."""
    t = z.new_zeros(())

    def chain(z: Tensor) -> Tensor:
        for _ in range(round(nfe)):
            z = f(t, z)
        return z

    return Run(make(f, z, torch.compile(chain) if compiled else chain).go, lambda: (nfe, None))


def _span(t1: float, z: Tensor, points: int = 2) -> Tensor:
    return torch.linspace(0.0, t1, points, dtype=z.dtype, device=z.device)


def odeint(f: nn.Module, t1: float, tol: float, adjoint: bool = False) -> Solve:
    """torchdiffeq's dopri5."""
    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    return lambda z: solve(f, z, _span(t1, z), rtol=tol, atol=tol, method="dopri5")[-1]


def adaptive(f: nn.Module, t1: float, tol: float) -> dict[str, Solve]:
    """Dormand-Prince 5 at rtol = atol = tol by every peer that is installed; states of shape (B, D)."""
    absent = missing()
    found = {"torchdiffeq odeint": odeint(f, t1, tol), "torchdiffeq odeint_adjoint": odeint(f, t1, tol, adjoint=True)}
    if "torchode" not in absent:
        found["torchode"] = torchode_solve(f, t1, tol=tol)
    if "torchdyn" not in absent:
        from torchdyn.numerics import odeint as torchdyn_odeint

        found["torchdyn"] = lambda z: torchdyn_odeint(f, z, _span(t1, z), "dopri5", atol=tol, rtol=tol)[1][-1]
    return found


def rk4(f: nn.Module, t1: float, steps: int) -> dict[str, Solve]:
    """A Runge-Kutta method of order four over equal steps; torchdiffeq's is the 3/8 rule, torchode gets the tableau."""
    absent = missing()
    options = {"step_size": t1 / steps}
    found: dict[str, Solve] = {
        "torchdiffeq rk4": lambda z: torchdiffeq.odeint(f, z, _span(t1, z), method="rk4", options=options)[-1]
    }
    if "torchode" not in absent:
        found["torchode, RK4 tableau"] = torchode_solve(f, t1, steps=steps)
    if "torchdyn" not in absent:
        from torchdyn.numerics import odeint as torchdyn_odeint

        found["torchdyn rk4"] = lambda z: torchdyn_odeint(f, z, _span(t1, z, steps + 1), "rk4")[1][-1]
    return found


def torchode_solve(f: nn.Module, t1: float, *, tol: float = 0.0, steps: int = 0) -> Solve:
    """torchode: dopri5 at a tolerance, or the classical tableau over equal steps; each sample has a step of its own."""
    import torchode
    from torchode.interpolation import ThirdOrderPolynomialInterpolation
    from torchode.single_step_methods.runge_kutta import ButcherTableau, ExplicitRungeKutta

    term = torchode.ODETerm(f, with_stats=False)
    if steps:
        lower = [[], [1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]]
        weights, nodes = [1 / 6, 1 / 3, 1 / 3, 1 / 6], [0.0, 1 / 2, 1 / 2, 1.0]
        method = ExplicitRungeKutta(term, ButcherTableau.from_lists(c=nodes, a=lower, b=weights, b_err=[0.0] * 4))
        method.convergence_order = lambda: 4
        method.build_interpolation = lambda d: ThirdOrderPolynomialInterpolation.from_k(d.t0, d.dt, d.y0, d.y1, d.k)
        controller = torchode.FixedStepController()
    else:
        method = torchode.Dopri5(term)
        controller = torchode.IntegralController(atol=tol, rtol=tol, term=term)
    solver = torchode.AutoDiffAdjoint(method, controller, backprop_through_step_size_control=False)

    def solve(z: Tensor) -> Tensor:
        start, end = z.new_zeros(len(z)), z.new_full((len(z),), t1)
        dt0 = z.new_full((len(z),), t1 / steps) if steps else None
        return solver.solve(torchode.InitialValueProblem(z, t_start=start, t_end=end), dt0=dt0).ys[:, -1]

    return solve
