"""First and second derivatives of a few steps, by finite differences: every differentiable solver on the problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from odelayers import (
    RK4,
    Dopri5,
    Euler,
    EulerMaruyama,
    Heun,
    Midpoint,
    Milstein,
    ODEBlock,
    ReversibleHeun,
    Rodas5P,
    SDEBlock,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from problems import FORCED, KEPLER, LINEAR, LOGISTIC, LOTKA_VOLTERRA, MATRIX, Problem, TanhNet, name

F64 = torch.float64
# Where step control stays on, the tolerance is far below what the finite differences of 1e-6 must see.
SOLVERS = (
    Euler(3),
    Midpoint(3),
    Heun(3),
    RK4(3),
    Dopri5(1e-9, 1e-9),
    Tsit5(1e-9, 1e-9),
    Tsit5(1e-9, 1e-9, batch="independent"),
    Rodas5P(1e-8, 1e-8),
    TorchDiffEq("dopri5", 1e-10, 1e-10),
    TorchDiffEq("rk4", step_size=0.25),
)
NOISY = (
    *((EulerMaruyama(4), "ito"), (Milstein(4), "ito"), (Milstein(4), "stratonovich")),
    *((StratonovichHeun(4), "stratonovich"), (ReversibleHeun(4), "stratonovich")),
    *((TorchSDE("srk", 4), "ito"), (TorchSDE("milstein", 4), "ito"), (TorchSDE("heun", 4), "stratonovich")),
)


def label(value: Any) -> str | None:
    """The name of a problem, or the solver's class with what tells it from its like."""
    if isinstance(value, Problem):
        return value.name
    marks = (getattr(value, m, None) for m in ("method", "batch"))
    return None if isinstance(value, str) else " ".join([name(value), *(m for m in marks if isinstance(m, str))])


def check(run: Callable[..., Any], *inputs: Tensor) -> None:
    """Compare the first derivatives in leaves made of these, entry by entry, and the second along random directions."""
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    assert gradcheck(run, leaves, atol=1e-6)
    assert gradgradcheck(run, leaves, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("problem", [LINEAR, LOGISTIC, FORCED, KEPLER, LOTKA_VOLTERRA], ids=label)
@pytest.mark.parametrize("solver", SOLVERS, ids=label)
def test_the_problems_pass_gradcheck_and_gradgradcheck(solver: Any, problem: Problem) -> None:
    """In two rows of the initial state and in the end time."""
    z0 = problem.z0[:2, :1, :1] if problem.z0.ndim == 3 else problem.z0[:2]
    block = ODEBlock(problem.f, solver=solver)
    check(lambda z, t1: block(z, t1), z0, torch.tensor([0.2, 0.4], dtype=F64))


@pytest.mark.parametrize("solver", SOLVERS, ids=label)
def test_the_parameters_pass_gradcheck_and_gradgradcheck(solver: Any) -> None:
    """In every parameter of a small network and in the matrix of z' = A z, at two output times."""
    net, z = TanhNet(2, 2), torch.randn(1, 2, dtype=F64)
    names = [n for n, _ in net.named_parameters()]

    def network(*values: Tensor) -> Tensor:
        def f(t: Tensor, z: Tensor) -> Tensor:
            return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (t, z))

        return ODEBlock(f, solver=solver).solve(z, [0.0, 0.2, 0.4]).zs

    check(network, *net.parameters())
    check(lambda a: ODEBlock(lambda z: z @ a.T, solver=solver).solve(z, [0.0, 0.2, 0.4]).zs, MATRIX[:2, :2])


@pytest.mark.parametrize("solver, calculus", NOISY, ids=label)
def test_noisy_paths_pass_gradcheck_and_gradgradcheck(solver: Any, calculus: str) -> None:
    """In the state and in the parameters of drift and diffusion, along one path of scalar noise."""

    def run(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        block = SDEBlock(
            lambda z: torch.sin(z @ a.T), lambda z: b * z.cos(), solver=solver, calculus=calculus, noise="scalar"
        )
        return block.solve(z, generator=torch.Generator().manual_seed(3)).final

    check(run, torch.randn(2, 2, dtype=F64), MATRIX[:2, :2], torch.tensor([0.3, 0.5], dtype=F64))
