"""Derivatives in the parameters of a field, of every legal solver and gradient, against autograd of the closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from odelayers import Adjoint, ODEBlock
from problems import BELL, LINEAR, LOGISTIC, MATRIX, name
from test_oracles import DRIFTS, EVERY, F64, GRADIENTS, allowed, pairs


class Parametric(nn.Module):
    """A field with one parameter of any shape."""

    def __init__(self, f: Callable[..., Tensor], parameter: Tensor) -> None:
        super().__init__()
        self.f, self.parameter = f, nn.Parameter(parameter.clone())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.f(t, z, self.parameter)


class Case(NamedTuple):
    """A field f(t, z, parameter), its parameter, its initial states and z(1) by the parameter."""

    name: str
    f: Callable[..., Tensor]
    parameter: Tensor
    z0: Tensor
    solution: Callable[[Tensor], Tensor]


def logistic(rate: Tensor) -> Tensor:
    """The solution of z' = rate z (1 - z) at 1."""
    z = LOGISTIC.z0
    return z / (z + (1 - z) * torch.exp(-rate))


ONE = torch.tensor(1.0, dtype=F64)
CASES = (
    Case("linear", lambda t, z, a: z @ a.T, MATRIX, LINEAR.z0, lambda a: LINEAR.z0 @ torch.linalg.matrix_exp(a).T),
    Case("logistic, 1-d state", lambda t, z, a: a * z * (1 - z), ONE, LOGISTIC.z0, logistic),
    Case("bell, time-dependent", lambda t, z, a: -2 * a * t * z, ONE, BELL.z0, lambda a: BELL.z0 * torch.exp(-a)),
)


def label(value: Any) -> str | None:
    """The name of a case or a gradient."""
    return value.name if isinstance(value, Case) else name(value) if value in GRADIENTS else None


# Where Adjoint refuses the pair, test_oracles.py has seen it.
ROWS = [(s, g, case) for s, g in pairs(EVERY) for case in CASES if g != Adjoint() or (s, case.name) not in DRIFTS]


@pytest.mark.parametrize("solver, gradient, case", ROWS, ids=label)
def test_the_derivative_in_the_parameters_is_that_of_the_solution(solver: str, gradient: Any, case: Case) -> None:
    """Of a weighted sum of z(1) in every entry of the parameter, in float64: for z' = A z that of the exponential."""
    tol, _, derivative = allowed(solver, F64)
    weights = torch.linspace(-1, 2, case.z0.numel(), dtype=F64).reshape(case.z0.shape)
    field, parameter = Parametric(case.f, case.parameter), case.parameter.clone().requires_grad_()
    end = ODEBlock(field, solver=EVERY[solver].make(tol), gradient=gradient)(case.z0)
    (found,) = torch.autograd.grad((end * weights).sum(), list(field.parameters()))
    (wanted,) = torch.autograd.grad((case.solution(parameter) * weights).sum(), parameter)
    assert (found - wanted).abs().max() < derivative * wanted.abs().max().clamp(min=1.0)
