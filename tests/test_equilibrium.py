"""Equilibrium as an end time: each row stops where it comes to rest, costs nothing from there on, and says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    AugmentedODEBlock,
    Backprop,
    Checkpoint,
    Dopri5,
    Equilibrium,
    Euler,
    Heun,
    KineticRegularizer,
    ODEBlock,
    SolveError,
    Status,
    SteadyStateRegularizer,
    Tsit5,
    count_nfe,
)
from problems import finite_difference, name

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
GRADIENTS = (Backprop(), Checkpoint())
TIGHT = (Dopri5(1e-9, 1e-9), Tsit5(1e-9, 1e-9))
FIXED = (RK4(200), Heun(300), Euler(300))
START = torch.tensor([[0.001, 0.0], [1.0, 2.0], [30.0, 1.0], [0.1, 0.1]], dtype=F64)  # |z| = .001, 2.2, 30, .14


class Pull(nn.Module):
    """z' = tanh(W z + c) - z: contracts to one equilibrium of its own for every context."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.3 * torch.randn(3, 3, generator=g, dtype=F64))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + c) - z


def rows(count: int = 6, size: float = 2.0) -> tuple[Tensor, Tensor]:
    """States and contexts that come to rest at different times."""
    g = torch.Generator().manual_seed(1)
    z, c = torch.randn(2, count, 3, generator=g, dtype=F64)
    return (size * z).requires_grad_(), c.requires_grad_()


def decay(z: Tensor) -> Tensor:
    return -z


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
@pytest.mark.parametrize("solver", [*TIGHT, *FIXED], ids=name)
def test_each_row_stops_at_the_first_step_where_it_is_at_rest(solver: Any, gradient: Any) -> None:
    """z' = -z: |z| <= tol at the row's end, z(t) is the solution there, and the step before it was above tol."""
    z, tol = START.clone().requires_grad_(), 1e-2
    solution = ODEBlock(decay, t1=Equilibrium(tol, 20.0), solver=solver, gradient=gradient).solve(z)
    ends, exact = solution.ts[1], START * torch.exp(-solution.ts[1])[:, None]
    assert solution.ts.shape == (2, 4) and solution.zs.shape == (2, 4, 2) and solution.ts[0].tolist() == [0.0] * 4
    assert solution.stats.settled is not None and solution.stats.settled.all()
    assert (solution.final - exact).abs().max() < {1: 0.4, 2: 1e-2, 4: 1e-3, 5: 1e-5}[solver.order] * tol
    assert (solution.final.norm(dim=1) <= tol).all()
    if solver in FIXED:
        h = 20.0 / solver.steps
        shrink = {1: 1 - h, 2: 1 - h + h**2 / 2, 4: 1 - h + h**2 / 2 - h**3 / 6 + h**4 / 24}[solver.order]
        wanted = [max(0, math.ceil(math.log(tol / r) / math.log(shrink))) * h for r in START.norm(dim=1).tolist()]
        assert ends.tolist() == pytest.approx(wanted)
    (found,) = torch.autograd.grad(solution.final.sum(), z)
    assert torch.allclose(found[1:], solution.final[1:] / START[1:], rtol=1e-9) and torch.equal(found[0], z[0] * 0 + 1)


def by_hand(f: Pull, z: Tensor, c: Tensor, h: float, steps: int, tol: float) -> tuple[Tensor, list[int]]:
    """RK4 row by row in plain autograd, each until |f| <= tol; and the steps that each took."""
    ends, counts = [], []
    for x, shift in zip(z.split(1), c.split(1), strict=True):
        n = 0
        while n < steps and f(x, shift).norm() > tol:
            k1 = f(x, shift)
            k2 = f(x + h / 2 * k1, shift)
            k3 = f(x + h / 2 * k2, shift)
            k4 = f(x + h * k3, shift)
            x, n = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), n + 1
        ends.append(x)
        counts.append(n)
    return torch.cat(ends), counts


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
def test_states_times_and_gradients_are_those_of_a_loop_over_rows(gradient: Any) -> None:
    """RK4 with rows that settle at different steps, one that never does and one at rest: equal to rounding."""
    f, (z, c) = Pull(), rows()
    with torch.no_grad():
        z[2] = ODEBlock(f, t1=60.0, time=False, solver=RK4(200))(z, context=c)[2]  # at rest to begin with
    tol, h, steps = 1e-3, 0.25, 33
    block = ODEBlock(f, t1=Equilibrium(tol, h * steps), solver=RK4(steps), gradient=gradient, time=False)
    solution = block.solve(z, context=c)
    wanted, counts = by_hand(f, z, c, h, steps, tol)
    assert counts[2] == 0 and max(counts) == steps and len(set(counts)) > 3, counts
    assert solution.ts[1].tolist() == pytest.approx([n * h for n in counts])
    assert solution.stats.settled is not None
    assert solution.stats.settled.tolist() == [(f(x, s).norm() <= tol).item() for x, s in zip(wanted, c, strict=True)]
    assert solution.stats.steps.tolist() == counts and solution.stats.accepted == max(counts)
    assert (solution.final - wanted).abs().max() < 1e-14
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    into = [z, c, *f.parameters()]
    found, right = (torch.autograd.grad((w * weights).sum(), into) for w in (solution.final, wanted))
    assert all((a - b).abs().max() < 1e-14 for a, b in zip(found, right, strict=True))


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
def test_the_gradient_is_the_difference_where_no_row_takes_another_number_of_steps(gradient: Any) -> None:
    """Central differences in a weight, a context and a state agree with the gradient of the steps."""
    f, (z, c) = Pull(), rows()
    block = ODEBlock(f, t1=Equilibrium(1e-2, 40.0), solver=RK4(160), gradient=gradient, time=False)
    stops = block.solve(z, context=c).ts
    for x in (f.weight, c, z):
        (slope,) = torch.autograd.grad(block(z, context=c).square().sum(), x)
        at = x.data[0, 1].item()

        def value(to: float, x: Tensor = x) -> float:
            x.data[0, 1] = to
            solution = block.solve(z, context=c)
            assert torch.equal(solution.ts, stops)
            return solution.final.square().sum().item()

        assert slope[0, 1].item() == pytest.approx(finite_difference(value, at), rel=1e-6)
        x.data[0, 1] = at


@pytest.mark.parametrize("solver", [*TIGHT, RK4(200)], ids=name)
def test_a_row_does_not_depend_on_its_mates(solver: Any) -> None:
    """To rounding on a fixed grid; under step control the mates choose the step, and a row stops a step off at most."""
    f, (z, c) = Pull(), rows()
    block, tol = ODEBlock(f, t1=Equilibrium(1e-5, 100.0), solver=solver, time=False), 1e-5
    whole = block.solve(z, context=c)
    for row in range(len(z)):
        alone = block.solve(z[row : row + 1], context=c[row : row + 1])
        if isinstance(solver, RK4):
            assert torch.equal(alone.ts[1, 0], whole.ts[1, row])
            assert (alone.final[0] - whole.final[row]).abs().max() < 1e-14
        assert (alone.final[0] - whole.final[row]).norm() < tol * abs(alone.ts[1, 0] - whole.ts[1, row]) + 1e-8


@pytest.mark.parametrize("solver", [Dopri5(), Tsit5()], ids=name)
def test_a_row_at_rest_has_no_say_in_the_step_size(solver: Any) -> None:
    """A stiff row that rests costs its easy mates no step; followed to a fixed time it costs hundreds (control)."""
    f = lambda z, rate: -rate * (z - 1)  # noqa: E731
    z, rate = torch.tensor([[1.0], [3.0]], dtype=F64), torch.tensor([[1e3], [1.0]], dtype=F64)
    block = ODEBlock(f, t1=Equilibrium(1e-3, 10.0), solver=solver, time=False)
    both, easy = block.solve(z, context=rate), block.solve(z[1:], context=rate[1:])
    assert (both.stats.accepted, both.stats.rejected) == (easy.stats.accepted, easy.stats.rejected)
    assert torch.equal(both.final[1:], easy.final) and both.ts[1].tolist() == [0.0, easy.ts[1, 0].item()]
    z[0] = 1.0 + 1e-9  # at rest as far as tol goes, but not a fixed point of the steps
    assert block.solve(z, t1=10.0, context=rate).stats.accepted > 20 * both.stats.accepted


@pytest.mark.parametrize("solver", [RK4(100), Euler(100), Dopri5(), Tsit5()], ids=name)
def test_a_row_that_has_stopped_is_not_evaluated_again(solver: Any) -> None:
    """Rows handed to the field in all: stages times steps of each row, and one look at each; then nothing."""
    seen: list[int] = []
    f = lambda z: (seen.append(len(z)), -z)[1]  # noqa: E731
    block = ODEBlock(f, t1=Equilibrium(1e-2, 20.0), solver=solver)
    with count_nfe(block) as count:
        solution = block.solve(START)
    assert len(seen) == solution.stats.nfe == count.nfe
    if isinstance(solver, RK4 | Euler):
        steps = (solution.ts[1] / 0.2).round().long()
        assert sum(seen) == solver.order * steps.sum() + 4
    else:
        assert solution.stats.nfe == 6 * (solution.stats.accepted + solution.stats.rejected) + 2
        assert seen[:2] == [4, 3] and seen[-6:] == [1] * 6


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
@pytest.mark.parametrize("solver", [RK4(5), Dopri5()], ids=name)
def test_a_batch_at_rest_to_begin_with_takes_no_step(solver: Any, gradient: Any) -> None:
    """z0 comes back at t0 after one evaluation, with the identity as its gradient."""
    z = torch.full((3, 2), 1e-4, dtype=F64, requires_grad=True)
    block = ODEBlock(decay, t0=0.5, t1=Equilibrium(1e-3, 9.0), solver=solver, gradient=gradient)
    solution = block.solve(z)
    assert torch.equal(solution.zs, torch.stack([z, z])) and torch.equal(solution.ts, torch.full((2, 3), 0.5))
    assert (
        (solution.stats.nfe, solution.stats.accepted) == (1, 0)
        and not solution.stats.steps.any()
        and solution.stats.settled.all()
    )
    assert torch.equal(torch.autograd.grad(solution.final.sum(), z)[0], torch.ones_like(z))


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
@pytest.mark.parametrize("solver", [RK4(400), Dopri5(1e-9, 1e-9)], ids=name)
def test_a_limit_cycle_ends_at_t_max_and_says_that_it_has_not_settled(solver: Any, gradient: Any) -> None:
    """z'' = -z never rests: the state at t_max, no failure; its mate at the centre rests from the start."""
    z = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)
    f = lambda z: torch.stack([z[:, 1], -z[:, 0]], dim=1)  # noqa: E731
    solution = ODEBlock(f, t1=Equilibrium(1e-3, 30.0), solver=solver, gradient=gradient).solve(z)
    assert solution.stats.settled.tolist() == [False, True] and solution.stats.status.tolist() == [0, 0]
    assert solution.ts[1].tolist() == [30.0, 0.0]
    assert solution.final[0].tolist() == pytest.approx([math.cos(30.0), -math.sin(30.0)], abs=1e-4)


def cubic(z: Tensor) -> Tensor:
    """Comes to rest at 0 from inside |z| < 1, blows up in finite time from outside."""
    return z**3 - z


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
@pytest.mark.parametrize("solver", [RK4(300), Dopri5()], ids=name)
def test_a_row_that_blows_up_is_named_and_isolated(solver: Any, gradient: Any) -> None:
    """Rows settle, one blows up after them: its own index and time in the error; isolated, the others as if alone."""
    z = torch.tensor([[1e-4], [0.012], [1.02], [0.9], [float("nan")]], dtype=F64)
    block = ODEBlock(cubic, t1=Equilibrium(1e-2, 15.0), solver=solver, gradient=gradient)
    when = math.log(1.02**2 / (1.02**2 - 1)) / 2
    with pytest.raises(SolveError) as caught:
        block(z[:4])
    error = caught.value
    assert (
        error.rows == (2,) and error.status == Status.BLOW_UP and error.t[0] == pytest.approx(when, abs=0.15)
    )  # three steps
    assert repr(solver) in str(error)
    solution, alone = block.solve(z, on_failure="isolate"), block.solve(z[[0, 1, 3]])
    assert solution.stats.status.tolist() == [0, 0, Status.BLOW_UP, 0, Status.NONFINITE]
    assert solution.stats.settled.tolist() == [True, True, False, True, False]
    assert torch.equal(solution.zs[:, [0, 1, 3]], alone.zs) and torch.equal(solution.ts[:, [0, 1, 3]], alone.ts)
    assert solution.final[[2, 4]].isnan().all() and solution.ts[1, [2, 4]].isnan().all()
    undefined = ODEBlock(torch.log, time=False, t1=block.t1, solver=solver, gradient=gradient)
    assert undefined.solve(z[:1] - 1, on_failure="isolate").stats.status.tolist() == [Status.NONFINITE]
    none = block.solve(z[4:], on_failure="isolate")
    assert none.stats.settled.tolist() == [False] and none.zs.isnan().all() and none.ts.shape == (2, 1)


def test_the_step_budget_is_that_of_the_whole_solve() -> None:
    """Rows that settle on the way give the others no new budget."""
    z = torch.logspace(-1, 3, 9, dtype=F64)[:, None]
    needed = ODEBlock(decay, t1=Equilibrium(1e-2, 50.0), solver=Dopri5(1e-9, 1e-9)).solve(z).stats
    assert needed.rejected == 0 and needed.settled.all()
    with pytest.raises(SolveError) as caught:
        ODEBlock(decay, t1=Equilibrium(1e-2, 50.0), solver=Dopri5(1e-9, 1e-9, needed.accepted - 3))(z)
    assert caught.value.status == Status.MAX_STEPS and caught.value.rows == (8,)
    assert "counted since rows last came to rest" in str(caught.value)


def test_integrals_along_the_solve_end_with_their_row() -> None:
    """z' = -z: kinetic (|z0|^2 - |z1|^2) / (2 D), length |z0| - |z1|; integrals have no say in who is at rest."""
    block = ODEBlock(decay, t1=Equilibrium(1e-2, 30.0), solver=RK4(600))
    plain = block.solve(START)
    solution = block.solve(START, running=[KineticRegularizer(), SteadyStateRegularizer()])
    assert torch.equal(solution.ts, plain.ts) and torch.equal(solution.final, plain.final)
    first, last = START.norm(dim=1), solution.final.norm(dim=1)
    assert torch.allclose(solution.running[0], (first**2 - last**2) / 4, rtol=1e-6)
    assert torch.allclose(solution.running[1], first - last, rtol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("solver", [Dopri5(), RK4(300)], ids=name)
def test_a_state_may_have_any_shape(shape: tuple[int, ...], solver: Any, gradient: Any) -> None:
    """Rows are told apart whatever their axes; an augmented block's state too."""
    z = (
        torch.logspace(-3, 2, 5, dtype=F64).reshape(5, *[1] * (len(shape) - 1)) * torch.ones(shape, dtype=F64)
    ).detach()
    z.requires_grad_()
    block = ODEBlock(decay, t1=Equilibrium(1e-2, 30.0), solver=solver, gradient=gradient)
    solution = block.solve(z)
    assert solution.final.shape == shape and solution.stats.settled.all() and solution.ts[1].unique().numel() == 4 + 1
    (found,) = torch.autograd.grad(solution.final.sum(), z)
    assert torch.allclose(found, solution.final / z, rtol=1e-9)
    if len(shape) == 3:
        padded = AugmentedODEBlock(decay, 2, t1=Equilibrium(1e-2, 30.0), solver=solver, keep=False)
        assert torch.allclose(padded(z), solution.final, rtol=0, atol=1e-2)


@pytest.mark.parametrize("solver", [RK4(50), Dopri5(), Tsit5()], ids=name)
def test_an_infinite_start_is_refused_where_the_field_is_finite(solver: Any) -> None:
    """tanh(inf) = 1 hides it: the row is named at its start, not at the end of the time."""
    z = torch.tensor([[1.0], [float("inf")]], dtype=F64)
    with pytest.raises(SolveError) as caught:
        ODEBlock(lambda z: -torch.tanh(z), solver=solver, t1=Equilibrium(1e-3, 20.0))(z)
    assert (caught.value.rows, caught.value.status, caught.value.t) == ((1,), Status.NONFINITE, (0.0,))
