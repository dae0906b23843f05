"""Implicit: the derivative of an equilibrium, against closed forms and against long-time backpropagation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    Backprop,
    Checkpoint,
    Dopri5,
    Equilibrium,
    GradientError,
    Implicit,
    ODEBlock,
    Tsit5,
    count_nfe,
)
from problems import gradients, name, slope

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
SOLVERS = (Dopri5(1e-11, 1e-11), Tsit5(1e-11, 1e-11), RK4(800))


class Affine(nn.Module):
    """z' = A z + B c: the equilibrium is -A^-1 B c, whatever z0."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.A = nn.Parameter(0.4 * torch.randn(3, 3, generator=g, dtype=F64) - torch.eye(3, dtype=F64))
        self.B = nn.Parameter(torch.randn(3, 2, generator=g, dtype=F64))
        self.idle = nn.Parameter(torch.ones(2, dtype=F64))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return z @ self.A.T + c @ self.B.T


class Pull(nn.Module):
    """z' = tanh(W z + c) - z, on flat states."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.3 * torch.randn(3, 3, generator=g, dtype=F64))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + c) - z


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()


def block(f: Any, tol: float, gradient: Any, solver: Any = SOLVERS[0], t_max: float = 200.0) -> ODEBlock:
    return ODEBlock(f, t1=Equilibrium(tol, t_max), solver=solver, gradient=gradient, time=False)


@pytest.mark.parametrize("per_row", [True, False], ids=["a context per row", "one for all"])
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_it_is_the_derivative_of_the_closed_form(solver: Any, per_row: bool) -> None:
    """z* = -A^-1 B c: gradients of A, B and c by autograd on that formula; z0's is 0, an unused parameter's None."""
    f, z, c = Affine(), drawn(5, 3), drawn(5, 2) if per_row else drawn(2)
    weights = torch.linspace(-1, 1, 15, dtype=F64).view(5, 3)
    end = block(f, 1e-9, Implicit(), solver)(z, context=c)
    wanted = (-(c @ f.B.T) @ torch.linalg.inv(f.A).T).expand(5, 3)
    assert (end - wanted).abs().max() < 1e-7
    found = gradients((end * weights).sum(), [f.A, f.B, c, z, f.idle])
    right = gradients((wanted * weights).sum(), [f.A, f.B, c])
    for a, b in zip(found[:3], right, strict=True):
        assert a is not None and b is not None and (a - b).abs().max() < 1e-6 * b.abs().max()
    assert found[3] is not None and torch.equal(found[3], torch.zeros_like(z)) and found[4] is None


def test_backpropagation_through_the_steps_comes_to_it_as_tol_falls() -> None:
    """For weights and context the difference falls like tol; that of z0 under the steps too, from far above 0."""
    f, z, c = Pull(), drawn(6, 3), drawn(6, 3)
    exact = gradients(block(f, 1e-11, Implicit())(z, context=c).square().sum(), [f.weight, c])
    tols = [1e-2, 1e-4, 1e-6, 1e-8]
    for gradient in (Backprop(), Implicit()):
        errors, of_start = [], []
        for tol in tols:
            loss = block(f, tol, gradient)(z, context=c).square().sum()
            *found, start = gradients(loss, [f.weight, c, z])
            errors.append(max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True)))
            of_start.append(start.abs().max().item())
        assert slope(tols, errors) == pytest.approx(1.0, abs=0.15) and errors[0] < 0.3, errors
        if isinstance(gradient, Backprop):
            assert slope(tols, of_start) == pytest.approx(1.0, abs=0.15) and of_start[0] > 1e-3, of_start
        else:
            assert of_start == [0.0] * 4


def test_a_wrong_sign_or_a_missing_inverse_would_be_seen() -> None:
    """Control: without the minus sign, or without J^-1, the gradient is far from that of the steps."""
    f, z, c = Pull(), drawn(6, 3), drawn(6, 3)
    end = block(f, 1e-8, Backprop())(z, context=c)
    (right,) = torch.autograd.grad(end.square().sum(), f.weight)
    (plain,) = torch.autograd.grad((f(end.detach(), c) * 2 * end.detach()).sum(), f.weight)
    (found,) = torch.autograd.grad(block(f, 1e-8, Implicit())(z, context=c).square().sum(), f.weight)
    assert (found - right).norm() < 1e-6 * right.norm()
    assert (found + right).norm() > right.norm() and (plain - right).norm() > 0.1 * right.norm()


class Convolved(nn.Module):
    """z' = tanh(conv z) / 2 + 1/4 - z, on images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, dtype=F64)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.conv(z)) / 2 + 0.25 - z


def test_a_state_may_have_any_shape() -> None:
    """A convolution's equilibrium in images: the weights' gradients are those of the steps, to tol."""
    torch.manual_seed(0)
    f, z = Convolved(), drawn(3, 2, 4, 4)
    found, right = (
        torch.autograd.grad(block(f, 1e-8, g, RK4(400))(z).square().sum(), list(f.parameters()))
        for g in (Implicit(), Backprop())
    )
    assert all((a - b).abs().max() < 1e-6 * b.abs().max() for a, b in zip(found, right, strict=True))


def twofold(z: Tensor, c: Tensor) -> Tensor:
    """Rests at c from c > 0; pushed away for ever where c < 0."""
    return torch.where(c > 0, c - z, torch.ones_like(z))


def test_a_row_that_has_not_settled_gets_no_gradient_silently() -> None:
    """In the loss, it is an error that names it; left out of the loss by `settled`, the others' gradients stand."""
    z, c = torch.zeros(3, 2, dtype=F64), torch.tensor([[1.0], [-1.0], [2.0]], dtype=F64, requires_grad=True)
    solution = block(twofold, 1e-6, Implicit(), t_max=30.0).solve(z, context=c)
    assert solution.stats.settled.tolist() == [True, False, True]
    (found,) = torch.autograd.grad(solution.final[solution.stats.settled].sum(), c, retain_graph=True)
    assert found.tolist() == [[2.0], [0.0], [2.0]]
    with pytest.raises(GradientError, match=r"of the rows solved \[1\] get a gradient but were not at rest at t_max"):
        solution.final.sum().backward()


def test_equilibria_that_are_not_isolated_are_refused() -> None:
    """z' = (c - x, 0): every y is at rest, J is singular, and no derivative is this one's."""
    f = lambda z, c: (c - z) * torch.tensor([1.0, 0.0], dtype=F64)  # noqa: E731
    c = torch.ones(1, 2, dtype=F64, requires_grad=True)
    end = block(f, 1e-6, Implicit())(torch.zeros(2, 2, dtype=F64), context=c)
    with pytest.raises(GradientError, match=r"Jacobian is singular at the equilibria of rows \[0, 1\]"):
        end.sum().backward()


def test_a_batch_at_rest_to_begin_with_has_its_derivative_too() -> None:
    """No step was taken, and the equilibrium still moves with the context, and not with z0."""
    z, c = torch.ones(2, 2, dtype=F64, requires_grad=True), torch.ones(2, 1, dtype=F64, requires_grad=True)
    solution = block(twofold, 1e-6, Implicit()).solve(z, context=c)
    assert solution.stats.accepted == 0 and torch.equal(solution.zs, torch.stack([z, z]))
    found, start = torch.autograd.grad(solution.final.sum(), (c, z))
    assert torch.equal(found, 2 * torch.ones_like(c)) and torch.equal(start, torch.zeros_like(z))


def test_failed_rows_are_left_out() -> None:
    """Isolated rows are NaN and get nothing; the healthy ones' gradient is as if alone."""
    f, c = Pull(), drawn(4, 3)
    z = drawn(4, 3).detach()
    z[1] = float("nan")
    healthy = torch.tensor([0, 2, 3])
    solution = block(f, 1e-6, Implicit()).solve(z, context=c, on_failure="isolate")
    found = torch.autograd.grad(solution.final[healthy].sum(), (f.weight, c))
    alone = torch.autograd.grad(block(f, 1e-6, Implicit())(z[healthy], context=c[healthy]).sum(), (f.weight, c))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(found, alone, strict=True))


def test_half_precision_states_have_their_gradient() -> None:
    """f runs under autocast, J and the solve in float32: to bfloat16's three digits."""
    f = nn.Linear(2, 2)
    with torch.no_grad():
        f.weight.copy_(torch.tensor([[-1.0, 0.5], [0.0, -2.0]]))
        f.bias.copy_(torch.tensor([1.0, 2.0]))
    loss = block(f, 5e-2, Implicit(), Dopri5())(torch.zeros(1, 2, dtype=torch.bfloat16)).float().sum()
    (found,) = torch.autograd.grad(loss, f.bias)
    assert found.tolist() == pytest.approx([1.0, 0.75], rel=1e-2)  # -A^-T 1


def test_it_is_held_to_what_evaluating_again_is_held_to() -> None:
    """A captured tensor, a NaN from the loss, a second derivative, and weights changed in between are refused."""
    f, z, c = Pull(), drawn(2, 3), drawn(2, 3)
    with pytest.raises(GradientError, match="neither a parameter of the field nor its context"):
        block(lambda z: f(z, c), 1e-4, Implicit())(z)
    with pytest.raises(GradientError, match="NaN or inf already"):
        (block(f, 1e-4, Implicit())(z, context=c) * float("nan")).sum().backward()
    with pytest.raises(GradientError, match=r"differentiated twice.*gradient=Backprop\(\)"):
        torch.autograd.grad(block(f, 1e-4, Implicit())(z, context=c).sum(), c, create_graph=True)
    end = block(f, 1e-4, Implicit())(z, context=c)
    with torch.no_grad():
        f.weight.add_(1.0)
    with pytest.raises(GradientError, match="modified by an inplace operation"):
        end.sum().backward()


def test_the_backward_pass_costs_two_evaluations_and_is_counted() -> None:
    """One for the value, one for the Jacobian, however many steps were taken; Checkpoint takes all of them again."""
    f, z, c = Pull(), drawn(4, 3), drawn(4, 3)
    cost = {}
    for gradient in (Implicit(), Checkpoint()):
        made = block(f, 1e-6, gradient)
        with count_nfe(made) as count:
            end = made(z, context=c)
            forward = count.nfe
            end.sum().backward()
        cost[name(gradient)] = count.nfe - forward
    assert cost["Implicit"] == 2 and cost["Checkpoint"] > 100
