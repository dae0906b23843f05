"""What a solve reports of itself: counts of steps, times of failure; and that solvers and gradients are values."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    Equilibrium,
    Euler,
    EulerMaruyama,
    Heun,
    Implicit,
    JacobianRegularizer,
    KineticRegularizer,
    LyaNetRegularizer,
    LyapunovRegularizer,
    Midpoint,
    Milstein,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    Rodas5P,
    SDEBlock,
    SolveError,
    Status,
    SteadyStateRegularizer,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
    Uniform,
)
from problems import name

VALUES = (
    *(Dopri5(), Tsit5(), Euler(2), Midpoint(2), Heun(2), RK4(2), TorchDiffEq("rk4")),
    *(EulerMaruyama(2), Milstein(2), StratonovichHeun(2), ReversibleHeun(2), TorchSDE("euler", steps=2)),
    *(Rodas5P(), Dopri5(batch="independent"), Backprop(), Checkpoint(), Checkpoint(segments=3), Reversible()),
    *(Adjoint(), Implicit(), Uniform(0.5, 1.5), Equilibrium(1e-3, 10.0)),
    *(LyapunovRegularizer(), LyaNetRegularizer()),
    *(KineticRegularizer(), JacobianRegularizer(), SteadyStateRegularizer()),
)


@pytest.mark.parametrize("value", VALUES, ids=name)
def test_solvers_gradients_end_times_and_regularisers_are_values(value: Any) -> None:
    """Equal by kind and fields, hashable, printed as made, and never changed in place: blocks may share one."""
    twin = dataclasses.replace(value)
    assert twin == value and hash(twin) == hash(value) and eval(repr(value)) == value
    assert [other for other in VALUES if other == value] == [value]
    for attribute in ("steps", "rtol", "a_name_with_a_slip"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, attribute, 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        del value.steps


@pytest.mark.parametrize("t0", [0.0, 1.0])
def test_a_blow_up_on_a_grid_is_dated_by_the_end_of_its_step(t0: float) -> None:
    """z' = 1e300 z under Euler leaves the finite numbers in its second step of 0.25, at t0 + 0.5."""
    z = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(SolveError) as caught:
        ODEBlock(lambda z: 1e300 * z, t0=t0, t1=t0 + 1.0, solver=Euler(steps=4))(z)
    assert caught.value.t == (t0 + 0.5,)


@pytest.mark.parametrize("t0", [0.0, 1.0])
def test_a_blow_up_is_dated_by_the_state_not_by_what_the_solver_carries(t0: float) -> None:
    """Reversible Heun carries f and g beside z: 1e300 z overflows at the first step's end and g = 1/10 stays finite."""
    block = SDEBlock(
        lambda z: torch.tensor([[1.0], [1e300]], dtype=z.dtype) * z,
        lambda z: torch.full_like(z, 0.1),
        t0=t0,
        t1=t0 + 1.0,
        solver=ReversibleHeun(steps=4),
        calculus="stratonovich",
    )
    with pytest.raises(SolveError) as caught:
        block(torch.ones(2, 1, dtype=torch.float64))
    assert (caught.value.rows, caught.value.t, caught.value.status) == ((1,), (t0 + 0.25,), Status.BLOW_UP)


ORDERS = (Dopri5(), 5), (Tsit5(), 5), (Euler(2), 1), (Midpoint(2), 2), (Heun(2), 2), (RK4(2), 4)
STRONG = (EulerMaruyama(2), 0.5), (Milstein(2), 1.0), (ReversibleHeun(2), 0.5), (StratonovichHeun(2), 0.5)


@pytest.mark.parametrize(("solver", "order"), ORDERS + STRONG, ids=name)
def test_a_solver_states_its_order(solver: Any, order: float) -> None:
    """The order in the literature, which the convergence tests fit."""
    assert solver.order == order
    assert not hasattr(solver, "tableau") or solver.tableau.order == order


@pytest.mark.parametrize("method", ["euler", "srk"])
def test_torchsde_s_steps_are_counted_and_none_is_rejected(method: str) -> None:
    """A fixed grid of six steps: six accepted, none thrown away."""
    solver = TorchSDE(method, steps=6)
    block = SDEBlock(lambda z: -z, lambda z: 0.1 * z, solver=solver, noise="scalar")
    stats = block.solve(torch.ones(2, 1)).stats
    assert (stats.accepted, stats.rejected) == (6, 0)


@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "scipy_solver"])
def test_a_library_method_that_tells_no_steps_has_none_counted(method: str) -> None:
    """torchdiffeq's fixed grids and scipy do not tell their steps: zero of either kind; evaluations are counted."""
    stats = ODEBlock(lambda z: -z, solver=TorchDiffEq(method), gradient=Adjoint()).solve(torch.ones(2, 1)).stats
    assert (stats.accepted, stats.rejected) == (0, 0) and stats.nfe > 0


def test_a_failure_that_does_not_come_back_is_reported_with_its_row() -> None:
    """A field that gives NaN in one evaluation only: the row and the end are named, and the note asks why."""
    calls = 0

    def fickle(z: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.where(torch.tensor([[calls != 3], [True]]), -z, torch.nan)

    with pytest.raises(SolveError, match="does the field change between evaluations") as caught:
        ODEBlock(fickle, t1=2.0, solver=Euler(steps=4))(torch.ones(2, 1))
    assert (caught.value.rows, caught.value.t) == ((0,), (2.0,))


def test_torchdiffeq_s_spent_budget_is_dated_where_it_stopped() -> None:
    """bosh3 spends 20 steps on what Dopri5 solves within them: every row, at a time on the way."""
    solver = TorchDiffEq("bosh3", rtol=1e-8, atol=1e-8, max_steps=20)
    with pytest.raises(SolveError) as caught:
        ODEBlock(lambda z: -z, solver=solver)(torch.ones(2, 1, dtype=torch.float64))
    assert (caught.value.rows, caught.value.status) == ((0, 1), Status.MAX_STEPS)
    assert 0.0 < caught.value.t[0] == caught.value.t[1] < 1.0


def test_the_default_tolerances_and_budget_are_those_documented() -> None:
    """The adaptive solvers, torchdiffeq's among them, start from the same numbers."""
    for solver in (Dopri5(), Tsit5(), TorchDiffEq("dopri5")):
        assert (solver.rtol, solver.atol, solver.max_steps) == (1e-5, 1e-5, 10_000)
