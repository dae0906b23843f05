"""Every legal solver, gradient, dtype and device on every problem of one table, against solutions made elsewhere.

What is added to `ORACLES`, `GRIDS` or `CONTROLLED` joins every test; a public solver or method that is missing fails
one. SDEs have a table of their own, in test_oracles_noise.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import odelayers
from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    Euler,
    GradientError,
    Heun,
    Midpoint,
    ODEBlock,
    Reversible,
    Rodas5P,
    SolveError,
    TorchDiffEq,
    Tsit5,
)
from odelayers._gradients.base import Gradient
from odelayers._solvers import MarchingSolver, Solver
from odelayers._solvers.reference import _ADAPTIVE, _FIXED, _SCIPY
from problems import (
    FORCED,
    KEPLER,
    LINEAR,
    LOGISTIC,
    LOTKA_VOLTERRA,
    ORACLES,
    RELAXATION,
    Problem,
    name,
    slope,
    tangent,
)

F64 = torch.float64
GRADIENTS = (Backprop(), Checkpoint(), Reversible(), Adjoint())
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def scipy(method: str, tol: float) -> TorchDiffEq:
    """One of scipy's integrators."""
    return TorchDiffEq("scipy_solver", tol, tol, scipy_method=method)


class Entry(NamedTuple):
    """A solver by tolerance, with the largest error in float64 of a state and of a derivative."""

    make: Callable[[float], Solver]
    state: float
    gradient: float


# Each bound is 3 to 5 times the worst that was seen over all problems and gradients: steps and stages are the same on
# every machine, only rounding is not. The worst is mostly Kepler's ellipse of eccentricity 0.4 at its perihelion.
GRIDS: dict[str, Entry] = {  # absolute
    "Euler": Entry(lambda tol: Euler(300), 5e-2, 5e-2),
    "Midpoint": Entry(lambda tol: Midpoint(100), 5e-4, 1.5e-3),
    "Heun": Entry(lambda tol: Heun(100), 2e-3, 2.5e-3),
    "RK4": Entry(lambda tol: RK4(50), 1.5e-6, 8e-7),
    "torchdiffeq rk4": Entry(lambda tol: TorchDiffEq("rk4", step_size=0.02), 1.5e-6, 2.5e-6),
}
CONTROLLED: dict[str, Entry] = {  # in tolerances, which bound the error of one step and not of the solve
    "Dopri5": Entry(lambda tol: Dopri5(tol, tol), 40, 120),
    "Tsit5": Entry(lambda tol: Tsit5(tol, tol), 6, 25),
    "Dopri5 independent": Entry(lambda tol: Dopri5(tol, tol, batch="independent"), 40, 120),
    "Tsit5 independent": Entry(lambda tol: Tsit5(tol, tol, batch="independent"), 6, 25),
    "Rodas5P": Entry(lambda tol: Rodas5P(tol, tol), 15, 25),
    "torchdiffeq dopri5": Entry(lambda tol: TorchDiffEq("dopri5", tol, tol), 120, 250),
    "scipy Radau": Entry(lambda tol: scipy("Radau", tol), 0.04, 0.04),
    "scipy DOP853": Entry(lambda tol: scipy("DOP853", tol), 3, 1.5),
}
SOLVERS = GRIDS | CONTROLLED
# The other methods of torchdiffeq and scipy, in float64 and on four problems. dopri8 and fehlberg2 miss their
# tolerance by far between their long steps, where torchdiffeq interpolates with a quartic.
METHODS: dict[str, Entry] = {  # absolute
    "torchdiffeq dopri8": Entry(lambda tol: TorchDiffEq("dopri8", tol, tol), 4e-5, 2e-4),
    "torchdiffeq bosh3": Entry(lambda tol: TorchDiffEq("bosh3", 1e-6, 1e-6), 2e-3, 3e-3),
    "torchdiffeq fehlberg2": Entry(lambda tol: TorchDiffEq("fehlberg2", 1e-6, 1e-6), 2e-3, 2e-3),
    "torchdiffeq adaptive_heun": Entry(lambda tol: TorchDiffEq("adaptive_heun", 1e-4, 1e-4), 7e-3, 8e-3),
    "torchdiffeq euler": Entry(lambda tol: TorchDiffEq("euler", step_size=1 / 300), 5e-2, 1.5e-1),
    "torchdiffeq midpoint": Entry(lambda tol: TorchDiffEq("midpoint", step_size=0.01), 5e-4, 1.5e-3),
    "torchdiffeq heun2": Entry(lambda tol: TorchDiffEq("heun2", step_size=0.01), 2e-3, 2.5e-3),
    "torchdiffeq heun3": Entry(lambda tol: TorchDiffEq("heun3", step_size=0.01), 2e-6, 1e-5),
    "torchdiffeq implicit_adams": Entry(lambda tol: TorchDiffEq("implicit_adams", tol, tol, 0.02), 8e-7, 2e-7),
    "torchdiffeq fixed_adams": Entry(lambda tol: TorchDiffEq("fixed_adams", tol, tol, 0.02), 8e-7, 2e-7),
    "scipy BDF": Entry(lambda tol: scipy("BDF", tol), 6e-7, 1.5e-6),
    "scipy LSODA": Entry(lambda tol: scipy("LSODA", tol), 4e-7, 3e-7),
    "scipy RK45": Entry(lambda tol: scipy("RK45", tol), 3e-7, 1.5e-7),
    "scipy RK23": Entry(lambda tol: scipy("RK23", 1e-6), 3e-5, 6e-5),
}
# Where the adjoint's backward solve is off by a relative 1e-2 at its start, by e^20 or by Euler's own error: refused.
DRIFTS = [(s, "stiff relaxation") for s in SOLVERS if "torchdiffeq" not in s and s != "Rodas5P"] + [
    ("Euler", "linear"),
    ("Euler", "Kepler"),
]
EVERY = SOLVERS | METHODS


def pairs(table: dict[str, Entry]) -> list[tuple[str, Gradient]]:
    """The solvers of a table with the gradients that accept them."""
    return [(s, g) for s in table for g in GRADIENTS if g.accepts(table[s].make(1e-6))]


ROWS = [(s, g, problem, dtype) for s, g in pairs(SOLVERS) for problem in ORACLES for dtype in (torch.float32, F64)]
ROWS += [(s, g, problem, F64) for s, g in pairs(METHODS) for problem in (LINEAR, FORCED, KEPLER, LOTKA_VOLTERRA)]
# The state is kept in float32; fields without a matrix product, which autocast would round at every evaluation.
HALF = (torch.float16, torch.bfloat16)
ROWS += [(s, g, problem, dtype) for s, g in pairs(SOLVERS) for problem in (LOGISTIC, FORCED) for dtype in HALF]


def label(value: Any) -> str | None:
    """The name of a problem, a gradient or a dtype; everything else names itself."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.name if isinstance(value, Problem) else name(value) if value in GRADIENTS else None


def concrete(kind: type) -> set[str]:
    """The public names of a kind of object."""
    found = ((n, getattr(odelayers, n)) for n in odelayers.__all__)
    return {n for n, x in found if isinstance(x, type) and issubclass(x, kind)}


def test_every_public_solver_method_and_gradient_stands_in_the_table() -> None:
    """A solver, a method of the libraries or a gradient that is added without a line here is found."""
    made = [entry.make(1e-6) for entry in EVERY.values()]
    assert {name(s) for s in made} == {n for n in concrete(Solver) if not getattr(odelayers, n).calculus}
    methods = [s for s in made if isinstance(s, TorchDiffEq)]
    assert {s.method for s in methods} == {*_ADAPTIVE, *_FIXED, "scipy_solver"}
    assert {s.scipy_method for s in methods if s.method == "scipy_solver"} == set(_SCIPY)
    assert {name(g) for g in GRADIENTS} | {"Implicit"} == concrete(Gradient)  # of an equilibrium: test_implicit.py
    assert all((s, Backprop()) in pairs(EVERY) for s in EVERY if "scipy" not in s)


def allowed(solver: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """A tolerance, and the largest error of a state and of a derivative: the method's and that of rounding.

    Of float32 and float64 every step rounds; of half precision the state before and after the solve.
    """
    tol, entry = (1e-8 if dtype == F64 else 1e-5), EVERY[solver]
    scale, rounding = (tol if solver in CONTROLLED else 1.0), (3 if dtype in HALF else 25) * torch.finfo(dtype).eps
    return tol, scale * entry.state + rounding, scale * entry.gradient + rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver, gradient, problem, dtype", ROWS, ids=label)
def test_states_and_derivatives_are_those_of_the_solution(
    solver: str, gradient: Any, problem: Problem, dtype: torch.dtype, device: str
) -> None:
    """z(1) is the solution, and its derivative along a direction that of the variational equation by DOP853."""
    tol, state, derivative = allowed(solver, dtype)
    v, dz = tangent(problem, 1.0)
    z = problem.z0.clone().to(device, dtype).requires_grad_()
    weights = torch.linspace(-1, 1, z.numel(), dtype=F64).reshape(z.shape)
    block = ODEBlock(problem.f, solver=EVERY[solver].make(tol), gradient=gradient)
    if isinstance(gradient, Reversible) and problem is RELAXATION:  # e^20 parts the coupled solutions
        with pytest.raises(SolveError, match=r"came apart.*Checkpoint"):
            block(z)
        return
    end = block(z)
    assert end.dtype == dtype and end.device.type == device
    assert (end.detach().cpu() - problem.solution(1.0)).abs().max() < state
    loss = (end * weights.to(end)).sum()
    if isinstance(gradient, Adjoint) and (solver, problem.name) in DRIFTS:
        with pytest.raises(GradientError, match=r"contracts too much.*Checkpoint"):
            loss.backward()
        return
    (found,) = torch.autograd.grad(loss, z)
    wanted = (weights * dz).sum()
    assert found.dtype == dtype
    assert abs((found.cpu() * v).sum() - wanted) < derivative * max(1.0, wanted.abs().item())


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
