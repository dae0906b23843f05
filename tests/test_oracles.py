"""Every legal solver, gradient, dtype and device on every problem of one table, against solutions made elsewhere.

What is added to `ORACLES`, `NOISY`, `SOLVERS` or `SDE_SOLVERS` joins every test; a public solver that is missing
fails one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import odelayers
from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    Euler,
    EulerMaruyama,
    GradientError,
    Heun,
    Midpoint,
    Milstein,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    Rodas5P,
    SDEBlock,
    SolveError,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from odelayers._gradients.base import Gradient
from odelayers._solvers import MarchingSolver, Solver
from odelayers._solvers.reference import _ADAPTIVE, _FIXED
from problems import KEPLER, LOTKA_VOLTERRA, NOISY, ORACLES, RELAXATION, NoisyProblem, Problem, name, slope, tangent

F64 = torch.float64
GRADIENTS = (Backprop(), Checkpoint(), Reversible(), Adjoint())
DTYPES = [pytest.param(torch.float32, id="float32"), pytest.param(F64, id="float64")]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

# Solvers by tolerance (where they have one), with the largest error allowed in float64 of state and derivative.
SOLVERS: dict[str, tuple[Callable[[float], Solver], float]] = {
    "Euler": (lambda tol: Euler(300), 4e-2),
    "Midpoint": (lambda tol: Midpoint(100), 3e-3),
    "Heun": (lambda tol: Heun(100), 3e-3),
    "RK4": (lambda tol: RK4(50), 1e-4),
    "Dopri5": (lambda tol: Dopri5(tol, tol), 1e-6),
    "Tsit5": (lambda tol: Tsit5(tol, tol), 1e-6),
    "Dopri5 independent": (lambda tol: Dopri5(tol, tol, batch="independent"), 1e-6),
    "Tsit5 independent": (lambda tol: Tsit5(tol, tol, batch="independent"), 1e-6),
    "Rodas5P": (lambda tol: Rodas5P(tol, tol), 1e-6),
    "torchdiffeq dopri5": (lambda tol: TorchDiffEq("dopri5", tol, tol), 1e-6),
    "torchdiffeq rk4": (lambda tol: TorchDiffEq("rk4", step_size=0.02), 1e-4),
    "scipy Radau": (lambda tol: TorchDiffEq("scipy_solver", tol, tol, scipy_method="Radau"), 1e-6),
    "scipy DOP853": (lambda tol: TorchDiffEq("scipy_solver", tol, tol, scipy_method="DOP853"), 1e-6),
}
# Where the adjoint's backward solve is off by a relative 1e-2 at its start, by e^20 or by Euler's own error: refused.
DRIFTS = [(s, "stiff relaxation") for s in SOLVERS if "torchdiffeq" not in s and s != "Rodas5P"] + [
    ("Euler", "linear"),
    ("Euler", "Kepler"),
]
PAIRS = [(s, g) for s in SOLVERS for g in GRADIENTS if g.accepts(SOLVERS[s][0](1e-6))]

# Solvers by steps, with their readings and their strong order for scalar noise.
SDE_SOLVERS: dict[str, tuple[Callable[[int], Solver], float]] = {
    "EulerMaruyama": (EulerMaruyama, 0.5),
    "Milstein": (Milstein, 1.0),
    "StratonovichHeun": (StratonovichHeun, 1.0),
    "ReversibleHeun": (ReversibleHeun, 1.0),
    "torchsde euler": (lambda n: TorchSDE("euler", n), 0.5),
    "torchsde srk": (lambda n: TorchSDE("srk", n), 1.5),
    "torchsde milstein": (lambda n: TorchSDE("milstein", n), 1.0),
    "torchsde midpoint": (lambda n: TorchSDE("midpoint", n), 1.0),
    "torchsde heun": (lambda n: TorchSDE("heun", n), 1.0),
    "torchsde euler_heun": (lambda n: TorchSDE("euler_heun", n), 1.0),
    "torchsde reversible_heun": (lambda n: TorchSDE("reversible_heun", n), 1.0),
}
READINGS = [(s, calculus) for s in SDE_SOLVERS for calculus in SDE_SOLVERS[s][0](1).calculus]
SDE_PAIRS = [(s, c, g) for s, c in READINGS for g in GRADIENTS if g.accepts(SDE_SOLVERS[s][0](1))]


def label(value: Any) -> str | None:
    """The name of a problem or a gradient; everything else names itself."""
    return value.name if isinstance(value, Problem | NoisyProblem) else name(value) if value in GRADIENTS else None


def concrete(kind: type) -> set[str]:
    """The public names of a kind of object."""
    found = ((n, getattr(odelayers, n)) for n in odelayers.__all__)
    return {n for n, x in found if isinstance(x, type) and issubclass(x, kind)}


def test_every_public_solver_and_gradient_stands_in_the_table() -> None:
    """A solver or gradient that is added to the library without a line here is found."""
    made = [make(1e-6) for make, _ in SOLVERS.values()] + [make(1) for make, _ in SDE_SOLVERS.values()]
    assert {name(s) for s in made} == concrete(Solver)
    assert {name(g) for g in GRADIENTS} | {"Implicit"} == concrete(Gradient)  # of an equilibrium: test_implicit.py
    assert all((s, Backprop()) in PAIRS for s in SOLVERS if "scipy" not in s)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", ORACLES, ids=label)
@pytest.mark.parametrize("solver, gradient", PAIRS, ids=label)
def test_states_and_derivatives_are_those_of_the_solution(
    solver: str, gradient: Any, problem: Problem, dtype: torch.dtype, device: str
) -> None:
    """z(1) is the solution, and its derivative along a direction that of the variational equation by DOP853."""
    make, bar = SOLVERS[solver]
    tol = 1e-8 if dtype == F64 else 1e-5
    bar = bar if dtype == F64 else max(bar, 100 * tol if bar < 1e-4 else 0.0)
    v, dz = tangent(problem, 1.0)
    z = problem.z0.clone().to(device, dtype).requires_grad_()
    weights = torch.linspace(-1, 1, z.numel(), dtype=F64).reshape(z.shape)
    block = ODEBlock(problem.f, solver=make(tol), gradient=gradient)
    if isinstance(gradient, Reversible) and problem is RELAXATION:  # e^20 parts the coupled solutions
        with pytest.raises(SolveError, match=r"came apart.*Checkpoint"):
            block(z)
        return
    end = block(z)
    assert end.dtype == dtype and end.device.type == device
    assert (end.detach().cpu() - problem.solution(1.0)).abs().max() < bar
    loss = (end * weights.to(end)).sum()
    if isinstance(gradient, Adjoint) and (solver, problem.name) in DRIFTS:
        with pytest.raises(GradientError, match=r"contracts too much.*Checkpoint"):
            loss.backward()
        return
    (found,) = torch.autograd.grad(loss, z)
    assert abs((found.cpu() * v).sum() - (weights * dz).sum()) < 10 * bar * max(1.0, (weights * dz).sum().abs().item())


ADAMS = ("implicit_adams", "fixed_adams")
ORDERS: dict[str, tuple[Callable[[int], Solver], float]] = {
    "Euler": (Euler, 1),
    "Midpoint": (Midpoint, 2),
    "Heun": (Heun, 2),
    "RK4": (RK4, 4),
    "Dopri5": (lambda n: Dopri5(1e9, 1e9, first_step=1 / n), 5),
    "Tsit5": (lambda n: Tsit5(1e9, 1e9, first_step=1 / n), 5),
    "Dopri5 independent": (lambda n: Dopri5(1e9, 1e9, first_step=1 / n, batch="independent"), 5),
    "Tsit5 independent": (lambda n: Tsit5(1e9, 1e9, first_step=1 / n, batch="independent"), 5),
    "Rodas5P": (lambda n: Rodas5P(1e9, 1e9, first_step=1 / n), 5),
    **{
        f"torchdiffeq {method}": (lambda n, m=method: TorchDiffEq(m, 1e9, 1e9, max_steps=n), order)
        for method, order in {"dopri8": 8, "dopri5": 5, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}.items()
    },
    **{
        f"torchdiffeq {method}": (lambda n, m=method: TorchDiffEq(m, 1e9, 1e9, step_size=1 / n), order)
        for method, order in {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}.items()
    },
    # Of order 12 under way, but begun with three steps of rk4, whose error of h^5 stays.
    **{f"torchdiffeq {m}": (lambda n, m=m: TorchDiffEq(m, 1e9, 1e9, step_size=1 / n), 5) for m in ADAMS},
}


def equal_steps(solver: TorchDiffEq) -> dict[str, float]:
    """Options of torchdiffeq that leave every step of an adaptive method as long as the first, 1 / max_steps."""
    fixed = solver.step_size is not None
    return {"step_size": solver.step_size} if fixed else {"first_step": 1 / solver.max_steps, "ifactor": 1.0}


def test_every_method_with_an_order_has_it_fitted() -> None:
    """Own solvers of ODEs and all methods of torchdiffeq but the divergent one and scipy's, whose control stays on."""
    own = {n for n in concrete(MarchingSolver) if not getattr(odelayers, n).calculus}
    library = {f"torchdiffeq {method}" for method in (*_ADAPTIVE, *_FIXED)}
    assert {key.removesuffix(" independent") for key in ORDERS} == own | library
    installed = sys.modules["torchdiffeq._impl.odeint"].SOLVERS
    assert set(installed) <= {*_ADAPTIVE, *_FIXED, "scipy_solver", "explicit_adams"}


def fitted_order(make: Callable[[int], Solver], order: float, problem: Problem) -> float:
    """The exponent of the worst error at three end times, over the last four step sizes that show it above rounding.

    Of order 8 three: on some problems longer steps do not show it yet.
    """
    times, ones = (1.0, 1.5, 2.0), [1] * (problem.z0.ndim - 1)
    ends = torch.tensor(times, dtype=F64).repeat_interleave(len(problem.z0)).reshape(-1, *ones)
    wanted, found = torch.cat([problem.solution(t) for t in times]), []
    f = lambda t, z: ends * problem.rate(ends * t, z)  # noqa: E731  (over [0, 1], each row at its end time's rate)
    for n in [16, 32, 64, 128] if order < 4 else [8, 16, 32, 64, 128, 256] if order < 8 else [2, 4, 8, 16, 32]:
        solution = ODEBlock(f, solver=make(n), time=True).solve(problem.z0.repeat(3, *ones))
        assert solution.stats.accepted in (0, n)  # torchdiffeq's fixed grids do not count
        error = (solution.final - wanted).abs().max().item()
        if error < 1e-12:
            break
        found.append((1 / n, error))
    return slope(*zip(*found[-4 if order < 8 else -3 :], strict=True))


@pytest.mark.parametrize("solver", ORDERS)
def test_the_order_of_convergence(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With step control off the error's fitted exponent is the solver's order, over all smooth problems in float64.

    On none is it lower; on some it is higher, where the leading terms cancel, but not on all.
    """
    # With a tolerance this loose every step is accepted, and so as the first.
    for limit in ("adaptive.GROW", "control.RowControl.grow", "control.PredictiveRowControl.grow"):
        monkeypatch.setattr(f"odelayers._solvers.{limit}", 1.0)
    monkeypatch.setattr(TorchDiffEq, "_options", equal_steps)
    make, order = ORDERS[solver]
    found = {problem.name: fitted_order(make, order, problem) for problem in ORACLES if problem.smooth}
    assert min(found.values()) == pytest.approx(order, abs=0.25), found


@pytest.mark.parametrize("problem", [KEPLER, LOTKA_VOLTERRA], ids=label)
@pytest.mark.parametrize("solver", ["RK4", "Dopri5", "Tsit5", "Rodas5P"])
def test_invariants_are_kept_over_many_turns(solver: str, problem: Problem) -> None:
    """Energy and the Lotka-Volterra invariant stay within 1e-5 over t = 20; Euler's drift is plain (control)."""
    assert problem.invariant is not None
    drift = []
    for method in (RK4(2000) if solver == "RK4" else SOLVERS[solver][0](1e-8), Euler(2000)):
        zs = ODEBlock(problem.f, t1=20.0, solver=method)(problem.z0)
        drift.append((problem.invariant(zs) - problem.invariant(problem.z0)).abs().max().item())
    assert drift[0] < 1e-5 and drift[1] > 1e-3, drift


def noisy(problem: NoisyProblem, solver: Any, calculus: str, gradient: Any = GRADIENTS[0]) -> SDEBlock:
    """A block over states (z, W), so that every solver hands over the path that it drew."""
    f, g = problem.with_path(problem.drift[calculus], 0.0), problem.with_path(problem.g, 1.0)
    return SDEBlock(f, g, solver=solver, calculus=calculus, noise="scalar", gradient=gradient)


def starts(rows: int, dtype: torch.dtype = F64, device: str = "cpu") -> Tensor:
    """States (z, W = 0)."""
    return torch.stack([torch.linspace(0.2, 1.5, rows), torch.zeros(rows)], dim=1).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", NOISY, ids=label)
@pytest.mark.parametrize("solver, calculus, gradient", SDE_PAIRS, ids=label)
def test_noisy_states_and_derivatives_are_those_of_the_solution(
    solver: str, calculus: str, gradient: Any, problem: NoisyProblem, dtype: torch.dtype, device: str
) -> None:
    """Path by path z(1) is the closed form at the W(1) drawn, and dz(1)/dz(0) its derivative; in either reading."""
    make, order = SDE_SOLVERS[solver]
    z = starts(40, dtype, device).requires_grad_()
    end = noisy(problem, make(40), calculus, gradient)(z)
    (found,) = torch.autograd.grad(end[:, 0].sum(), z)
    start = starts(40)[:, 0].requires_grad_()
    exact = problem.solution(start, end[:, 1].detach().cpu().double(), 1.0)
    (wanted,) = torch.autograd.grad(exact.sum(), start)
    bar = 0.06 if order == 0.5 else 0.015  # relative
    assert end.dtype == dtype and end.device.type == device
    assert (end[:, 0].detach().cpu() - exact).abs().mean() < bar * exact.mean()
    assert (found[:, 0].cpu() - wanted).abs().mean() < bar * wanted.mean()


@pytest.mark.parametrize("problem", NOISY, ids=label)
@pytest.mark.parametrize("solver, calculus", READINGS)
def test_the_strong_order_of_convergence(solver: str, calculus: str, problem: NoisyProblem) -> None:
    """The root mean square error over 1,000 paths, each against the closed form at its own W, falls at the order."""
    make, order = SDE_SOLVERS[solver]
    sizes, z = [4, 8, 16, 32, 64], starts(1000)
    errors = []
    with torch.no_grad():
        for n in sizes:
            end = noisy(problem, make(n), calculus)(z)
            error = end[:, 0] - problem.solution(z[:, 0], end[:, 1], 1.0)
            errors.append(error.square().mean().sqrt().item())
    assert slope([1 / n for n in sizes], errors) == pytest.approx(order, abs=0.25), errors


@pytest.mark.parametrize("solver, calculus, noise", [(*r, n) for r in READINGS for n in SDE_SOLVERS[r[0]][0](1).noises])
def test_ornstein_uhlenbeck_has_its_mean_and_variance(solver: str, calculus: str, noise: str) -> None:
    """dz = -2 z dt + 0.5 dW from 1: mean e^-2, variance (1 - e^-4) / 16, over 20,000 rows and within five errors."""
    method, rows = SDE_SOLVERS[solver][0](60), 20_000
    block = SDEBlock(lambda z: -2 * z, lambda z: torch.full_like(z, 0.5), solver=method, calculus=calculus, noise=noise)
    with torch.no_grad():
        end = block(torch.ones(rows, 1, dtype=F64))
    mean, variance = np.exp(-2.0), (1 - np.exp(-4.0)) / 16
    bias = 2 / 60  # of a first-order method, relative
    assert abs(end.mean().item() - mean) < 5 * (variance / rows) ** 0.5 + 2 * bias * mean
    assert abs(end.var().item() - variance) < (5 * (2 / rows) ** 0.5 + 2 * bias) * variance


@pytest.mark.parametrize("problem", ORACLES, ids=label)
@pytest.mark.parametrize("solver", [s for s in SOLVERS if "torchdiffeq" not in s and "scipy" not in s])
def test_permuting_splitting_or_padding_the_batch_moves_no_sample(solver: str, problem: Problem) -> None:
    """On a fixed grid a sample's state stays to rounding, under step control within its accuracy (own solvers)."""
    make, bar = SOLVERS[solver]
    block, z = ODEBlock(problem.f, solver=make(1e-8)), problem.z0
    order = torch.arange(len(z)).flip(0)
    whole = block(z)
    found = [block(z[order])[order], torch.cat([block(z[:1]), block(z[1:])]), block(torch.cat([z, z, z[:1]]))[: len(z)]]
    for states in found:
        assert (states - whole).abs().max() < (1e-13 if solver in ("Euler", "Midpoint", "Heun", "RK4") else 1e-7)
        assert (states - problem.solution(1.0)).abs().max() < bar
