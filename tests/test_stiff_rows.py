"""Rows of a stiff solve: what one of them comes to is nothing to the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from odelayers import Backprop, Checkpoint, Dopri5, ODEBlock, Rodas5P, SolveError, Status

F64 = torch.float64


def test_only_the_rows_that_have_not_arrived_fail_when_the_budget_is_spent() -> None:
    """A fast oscillator spends the steps; the row at rest has long arrived."""
    speed = torch.tensor([[0.1], [500.0], [0.1]], dtype=F64)
    block = ODEBlock(lambda t, z, w: w * torch.cos(w * t) - z, solver=Rodas5P(max_steps=60), time=True)
    with pytest.raises(SolveError, match="60 steps tried") as caught:
        block(torch.zeros(3, 1, dtype=F64), context=speed)
    assert (caught.value.rows, caught.value.status) == ((1,), Status.MAX_STEPS) and 0 < caught.value.t[0] < 1


def ending(t: Tensor, z: Tensor, c: Tensor) -> Tensor:
    """Its derivative in time is infinite at t = 1, where rows end."""
    return torch.sqrt(1 - t) - c * torch.sin(5 * z)


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint()], ids=repr)
def test_what_is_infinite_at_the_end_of_one_row_is_nothing_to_the_others(gradient: Any) -> None:
    """States, steps and gradients of rows that end at different tries are those of each alone."""
    block = ODEBlock(ending, solver=Rodas5P(max_steps=500), time=True, gradient=gradient)
    found = []
    for rows in ([0, 1], [0], [1]):
        z = torch.tensor([[1.0], [2.0]], dtype=F64)[rows].requires_grad_()
        c = torch.tensor([[1.0], [30.0]], dtype=F64)[rows].requires_grad_()
        solution = block.solve(z, context=c)
        found.append((solution.final, *torch.autograd.grad(solution.final.sum(), [z, c]), solution.stats.steps))
    assert found[0][-1].tolist() == [13, 20]
    for both, *alone in zip(*found, strict=True):
        assert torch.allclose(both, torch.cat(alone), rtol=1e-9, atol=1e-12)


def test_a_rejected_try_leaves_no_trace_in_a_gradient() -> None:
    """-c sqrt(z), continued below zero by `where`: finite where a long try lands, but NaN is the slope left out."""

    def f(z: Tensor, c: Tensor) -> Tensor:
        return -c * torch.where(z > 0, z.sqrt(), -z)

    z, c = torch.tensor([[1.0], [0.3]], dtype=F64, requires_grad=True), torch.tensor([[1e-3], [1.0]], dtype=F64)
    solution = ODEBlock(f, solver=Rodas5P(1e-8, 1e-8, first_step=1.0), time=False).solve(z, context=c)
    assert solution.stats.rejected > 0 and solution.stats.steps[0] == 1
    (found,) = torch.autograd.grad(solution.final.sum(), z)
    root = z.detach().sqrt() - c / 2
    assert (solution.final - root**2).abs().max() < 1e-6 and (found - root / z.detach().sqrt()).abs().max() < 1e-5


def test_a_hard_row_among_easy_ones_costs_only_itself() -> None:
    """Rows times evaluations are the sum of what rows cost alone."""
    k, z = torch.tensor([[0.01]] * 15 + [[300.0]], dtype=F64), torch.ones(16, 1, dtype=F64)
    count = 0

    def f(t: Tensor, z: Tensor, k: Tensor) -> Tensor:
        nonlocal count
        count += len(z)
        return -k * torch.sin(5 * z * t)

    block, costs = ODEBlock(f, solver=Rodas5P(), time=True), []
    with torch.no_grad():
        for rows in ([*range(16)], *([row] for row in range(16))):
            count = 0
            steps = block.solve(z[rows], context=k[rows]).stats.steps
            costs.append(count)
            assert steps.max() > 2 * 8 or len(rows) == 1
    assert costs[0] == sum(costs[1:])


def test_a_row_that_overshoots_into_nan_costs_the_others_none_of_their_budget() -> None:
    """One tries steps to where its logarithm is NaN; the other has the steps that it needs alone, and not one more."""

    def f(t: Tensor, z: Tensor, c: Tensor) -> Tensor:
        return torch.where(c > 0, -10 * torch.log(1 + z), 20 * torch.sin(40 * t) * (2 - z))

    z, c = torch.tensor([[3.0], [0.1]], dtype=F64), torch.tensor([[1.0], [0.0]], dtype=F64)
    alone = ODEBlock(f, solver=Rodas5P(first_step=1.0), time=True).solve(z[1:], context=c[1:]).stats
    tight = Rodas5P(first_step=1.0, max_steps=alone.accepted + alone.rejected)
    with torch.no_grad():
        assert ODEBlock(f, solver=tight, time=True).solve(z, context=c).stats.steps[1] == alone.accepted


@pytest.mark.parametrize("solver", [Rodas5P(max_steps=300), Dopri5(batch="independent", max_steps=300)], ids=repr)
@pytest.mark.parametrize(("start", "rate", "slope"), [(1e38, 2e38, 0.0), (1e38, 2e38, 1e-30), (3.40281e38, 1e33, 0.0)])
def test_a_row_at_the_edge_of_the_numbers_is_said_to_blow_up(
    solver: Any, start: float, rate: float, slope: float
) -> None:
    """At a constant rate beyond float32: steps that overflow are refused, and name the cause of a budget spent."""
    edge = (torch.finfo(torch.float32).max - start) / rate
    with pytest.raises(SolveError) as caught:
        block = ODEBlock(lambda z: rate + slope * z, solver=replace(solver, first_step=1.5 * edge), t1=400 * edge)
        block(torch.full((1, 1), start))
    assert caught.value.status == Status.BLOW_UP and 0 < caught.value.t[0] < 10 * edge


@pytest.mark.parametrize("solver", [Rodas5P, Dopri5])
def test_a_step_to_infinity_is_refused(solver: Any) -> None:
    """Its error is finite and would be nothing beside a size that is infinite."""
    more = {"batch": "independent"} if solver is Dopri5 else {}
    block = ODEBlock(lambda z: torch.full_like(z, 1e33), solver=solver(first_step=2.0, **more), t1=2.0)
    assert block(torch.full((1, 1), 3.40281e38)).isfinite().all()


@pytest.mark.parametrize("shape", [(3, 0), (3, 2, 0), (0, 3)])
def test_a_state_without_coordinates_is_its_own_solution(shape: tuple[int, ...]) -> None:
    """As for the other solvers, also with end times of the rows' own and a gradient."""
    z, block = torch.zeros(shape, requires_grad=True), ODEBlock(lambda t, z: -z * t, solver=Rodas5P())
    for t1 in (1.0, torch.ones(shape[0])):
        end = block(z, t1=t1)
        assert end.shape == shape and torch.autograd.grad(end.sum(), z)[0].shape == shape


def test_what_a_field_holds_for_each_row_must_be_context() -> None:
    """Rows leave the batch at their end: a tensor for all of them no longer fits, which is said with the remedy."""
    k = torch.tensor([[1.0], [1.0], [50.0]], dtype=F64)
    with pytest.raises(RuntimeError) as caught:
        ODEBlock(lambda z: -k * torch.sin(z), solver=Rodas5P(), t1=3.0)(torch.ones(3, 1, dtype=F64))
    assert "of 3 rows are under way" in caught.value.__notes__[0] and "context=" in caught.value.__notes__[0]
