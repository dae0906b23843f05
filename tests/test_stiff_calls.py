"""Stiff solves by Rodas5P in a block: end times, outputs, running integrals, closed forms, refusals, budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from odelayers import Dopri5, KineticRegularizer, ODEBlock, Rodas5P, SolveError, Status

F64 = torch.float64


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_per_sample_end_times_take_the_steps_of_a_common_one(rate: float) -> None:
    """Time as a factor of the field scales value, Jacobian and derivative in time alike, so nothing changes."""
    f = lambda t, z: 3 * torch.sin(5 * t) - (1 + rate * t) * z**3  # noqa: E731
    z, solver = torch.rand(3, 2, dtype=F64), {n: Rodas5P(1e9, 1e9, first_step=n) for n in (0.5, 0.25)}
    common = ODEBlock(f, t1=2.0, solver=solver[0.5])(z)
    apart = ODEBlock(f, solver=solver[0.25])(z, torch.full((3,), 2.0, dtype=F64))
    assert (apart - common).abs().max() < 1e-13


def test_an_output_time_shortens_one_step_alone() -> None:
    """Two outputs close together cost a step each, and the step after them is as long as it would have been."""
    block = ODEBlock(lambda t, z: torch.cos(30 * t) - z, solver=Rodas5P(1e-7, 1e-7), time=True)
    few, many = (block.solve(torch.ones(2, 1, dtype=F64), ts).stats for ts in ([0, 1], [0, 0.5, 0.5 + 1e-9, 1]))
    assert many.accepted + many.rejected <= few.accepted + few.rejected + 3


def test_the_running_integrals_of_a_stiff_solve_are_its_quadratures() -> None:
    """The mean kinetic energy along z' = -1000 z from 1 is 1000 / 2 (1 - e^-2000)."""
    block = ODEBlock(lambda z: -1e3 * z, solver=Rodas5P(1e-9, 1e-9))
    (energy,) = block.solve(torch.ones(2, 3, 1, dtype=F64), running=[KineticRegularizer()]).running
    assert energy.tolist() == pytest.approx([500.0, 500.0], rel=1e-7)


def test_a_closed_form_is_passed_over_where_integrals_run_along() -> None:
    """A field's `linearize` knows nothing of the integrals: they are those that Dopri5 finds."""
    f, z = Closed(timed=True), torch.randn(4, 3, dtype=F64)
    found = [
        ODEBlock(f, solver=solver).solve(z, running=[KineticRegularizer()]).running[0]
        for solver in (Rodas5P(1e-8, 1e-8), Dopri5(1e-8, 1e-8))
    ]
    assert f.asked == 0 and (found[0] - found[1]).abs().max() < 1e-5


def test_half_precision_is_carried_in_float32() -> None:
    """A bfloat16 state relaxes to the slow solution within its own rounding."""
    end = ODEBlock(lambda z: -1e4 * (z - 0.5), solver=Rodas5P())(torch.ones(3, 2, dtype=torch.bfloat16))
    assert end.dtype == torch.bfloat16 and (end - 0.5).abs().max() < 1e-2


def test_batch_statistics_and_transforms_are_refused() -> None:
    """Rows that interact have no Jacobians of their own; torch.func cannot pass the solver's own differentiation."""
    with pytest.warns(UserWarning, match="BatchNorm"), pytest.raises(ValueError, match=r"Rodas5P.*GroupNorm"):
        ODEBlock(nn.BatchNorm1d(2), solver=Rodas5P())(torch.randn(4, 2))
    block = ODEBlock(lambda z: -z, solver=Rodas5P())
    for transform in (torch.func.vmap, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=r"Rodas5P.*torch.func.*RK4\(steps\)"):
            transform(lambda x: block(x[None])[0])(torch.randn(3, 2))


class Closed(nn.Module):
    """tanh(Wz + b) + drift t, with and without its closed form."""

    def __init__(self, timed: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)
        self.timed, self.asked = timed, 0

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -20 * torch.tanh(self.linear(z)) + (torch.sin(t) if self.timed else 0.0)

    def linearize(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        self.asked += 1
        return -20 * (1 - torch.tanh(self.linear(z)) ** 2), self.linear.weight


@pytest.mark.parametrize("timed", [False, True])
def test_a_closed_form_of_the_jacobian_is_used(timed: bool) -> None:
    """States, gradients and evaluations are those of differentiation, without a backward pass a step."""
    f, z, found = Closed(timed), torch.randn(4, 3, dtype=F64, requires_grad=True), []
    for field in (f, lambda t, z: f(t, z)):
        solution = ODEBlock(field, solver=Rodas5P()).solve(z)
        grads = torch.autograd.grad(solution.final.square().sum(), [z, *f.parameters()])
        found.append((solution.final, *grads, torch.tensor(solution.stats.nfe)))
    assert f.asked == (solution.stats.nfe - 2) / 8
    for a, b in zip(*found, strict=True):
        assert np.allclose(a.detach(), b.detach(), rtol=1e-11, atol=1e-13)


def test_only_the_rows_that_have_not_arrived_fail_when_the_budget_is_spent() -> None:
    """A fast oscillator spends the steps; the row at rest has long arrived."""
    speed = torch.tensor([[0.1], [500.0], [0.1]], dtype=F64)
    block = ODEBlock(lambda t, z, w: w * torch.cos(w * t) - z, solver=Rodas5P(max_steps=60), time=True)
    with pytest.raises(SolveError, match="60 steps tried") as caught:
        block(torch.zeros(3, 1, dtype=F64), context=speed)
    assert (caught.value.rows, caught.value.status) == ((1,), Status.MAX_STEPS) and 0 < caught.value.t[0] < 1
