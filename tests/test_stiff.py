"""Stiff fields by Rodas5P: against closed forms, scipy's Radau, and explicit methods that cannot."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from odelayers import (
    Backprop,
    Checkpoint,
    Dopri5,
    KineticRegularizer,
    ODEBlock,
    Rodas5P,
    SolveError,
    Status,
    Tsit5,
)
from problems import slopes

F64 = torch.float64
RATE = 1e6


def cosine(t: Tensor, z: Tensor) -> Tensor:
    """Prothero and Robinson's problem: cos t is a solution, to which all others fall within a millionth of the time."""
    return -RATE * (z - torch.cos(t)) - torch.sin(t)


def robertson(z: Tensor, k: Tensor) -> Tensor:
    """A -> B, B + B -> B + C, B + C -> A + C, with the first rate as context."""
    a, b, c = z.unbind(1)
    first, second, third = k * a, 3e7 * b * b, 1e4 * b * c
    return torch.stack([third - first, first - second - third, second], dim=1)


def van_der_pol(z: Tensor) -> Tensor:
    """x'' = 1000 (1 - x^2) x' - x: slow, with sudden jumps."""
    x, v = z.unbind(1)
    return torch.stack([v, 1e3 * (1 - x * x) * v - x], dim=1)


def radau(f: Any, z0: Tensor, ts: list[float], atol: float) -> Tensor:
    """States `(T, B, D)` by scipy's Radau at a relative tolerance of 1e-10, row by row, of a field in plain numbers."""
    found = []
    for row in z0.tolist():
        out = solve_ivp(lambda t, y: f(*y.tolist()), (ts[0], ts[-1]), row, "Radau", ts, rtol=1e-10, atol=atol)
        found.append(torch.from_numpy(out.y.T.copy()))
    return torch.stack(found, dim=1)


def reactions(k: float) -> Any:
    """Robertson's reactions in plain numbers."""
    return lambda a, b, c: [1e4 * b * c - k * a, k * a - 3e7 * b * b - 1e4 * b * c, 3e7 * b * b]


@pytest.mark.parametrize("tol", [1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("start", [1.0, 2.0])
def test_a_stiff_relaxation_is_followed_at_its_tolerance(start: float, tol: float) -> None:
    """On and off the slow solution cos t: the error stays below the tolerance, in steps of the slow solution's size."""
    ts = [0.0, 0.1, 1.0, 2.0]
    solution = ODEBlock(cosine, solver=Rodas5P(tol, tol)).solve(torch.full((2, 1), start, dtype=F64), ts)
    exact = torch.tensor([math.cos(t) for t in ts[1:]], dtype=F64).view(3, 1, 1)
    assert (solution.zs[1:] - exact).abs().max() < 1e-2 * tol + 1e-9
    assert solution.stats.accepted + solution.stats.rejected < 120


@pytest.mark.parametrize("solver", [Dopri5, Tsit5])
def test_explicit_methods_fail_where_this_one_has_steps_to_spare(solver: Any) -> None:
    """Control: with ten times the budget of steps an explicit method gets nowhere, and the status is STIFF."""
    z = torch.full((2, 1), 2.0, dtype=F64)
    assert (ODEBlock(cosine, solver=Rodas5P(max_steps=100))(z) - math.cos(1.0)).abs().max() < 1e-5
    with pytest.raises(SolveError, match=r"stiff.*Rodas5P\(\)") as caught:
        ODEBlock(cosine, solver=solver(max_steps=1000))(z)
    assert caught.value.status == Status.STIFF and max(caught.value.t) < 1e-2


def fixed(f: Any, z0: Tensor, n: int, t1: float = 1.0) -> Tensor:
    """The end state after n equal steps: at a tolerance this loose, steps that do not grow are never rejected."""
    solution = ODEBlock(f, t1=t1, solver=Rodas5P(1e9, 1e9, first_step=t1 / n)).solve(z0)
    assert (solution.stats.accepted, solution.stats.rejected) == (n, 0)
    return solution.final


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e8])
def test_the_order_holds_up_in_the_stiff_limit(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Prothero and Robinson's problem the error falls at order 3, with a factor 1 / rate: no stage is at fault."""
    monkeypatch.setattr("odelayers._solvers.control.PredictiveRowControl.grow", 1.0)
    z0, sizes, errors = torch.ones(1, 1, dtype=F64), [2, 4, 8, 16], []
    for n in sizes:
        end = fixed(lambda t, z: -rate * (z - torch.cos(t)) - torch.sin(t), z0, n)
        errors.append((end - math.cos(1.0)).abs().item())
    assert min(slopes([1 / n for n in sizes], errors)) > 2.9, errors
    assert errors[0] < 1e-3 / rate, errors


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e12])
def test_one_huge_step_damps_a_stiff_mode_to_nothing(rate: float) -> None:
    """L-stability: R(h lambda) falls to 0 like 12.5 / |h lambda|."""
    end = fixed(lambda z: -rate * z, torch.ones(1, 1, dtype=F64), 1)
    assert end.abs().item() == pytest.approx(12.52 / rate, rel=0.05)


@pytest.mark.parametrize("rate", [1e2, 1e6, 1e12])
def test_the_number_of_steps_is_bounded_whatever_the_stiffness(rate: float) -> None:
    """z' = -rate z to t = 1: the decay is resolved, and the rest crossed in a few steps."""
    solution = ODEBlock(lambda z: -rate * z, solver=Rodas5P()).solve(torch.ones(1, 1, dtype=F64))
    assert solution.final.abs().item() < 1e-5
    assert solution.stats.accepted + solution.stats.rejected < 60


def test_robertson_s_reactions_agree_with_radau_and_keep_their_mass() -> None:
    """Over ten decades of time, states to 1e-7 and the sum to rounding, at every output time."""
    z0, k = torch.tensor([[1.0, 0.0, 0.0], [0.7, 0.0, 0.3]], dtype=F64), torch.tensor(0.04, dtype=F64)
    ts = [0.0, 0.4, 4.0, 400.0, 4e5, 4e9]
    zs = ODEBlock(robertson, solver=Rodas5P(1e-8, 1e-14), time=False).solve(z0, ts, context=k).zs
    exact = radau(reactions(0.04), z0, ts, 1e-16)
    assert ((zs - exact).abs() / exact.abs().amax(dim=(0, 1))).max() < 1e-7
    assert (zs.sum(dim=2) - 1).abs().max() < 1e-12


def test_van_der_pol_agrees_with_radau_through_its_jumps() -> None:
    """mu = 1000 to t = 1000, a jump in each row, from two starts that jump apart."""
    z0 = torch.tensor([[2.0, 0.0], [1.6, 0.0]], dtype=F64)
    end = ODEBlock(van_der_pol, t1=1000.0, solver=Rodas5P(1e-8, 1e-8))(z0)
    exact = radau(lambda x, v: [v, 1e3 * (1 - x * x) * v - x], z0, [0.0, 1000.0], 1e-10)[-1]
    assert (exact[:, 0] < -1).all() and ((end - exact) / exact).abs().max() < 1e-6


def test_the_jumps_of_one_row_do_not_slow_the_others() -> None:
    """A batch tries the steps of its slowest row, not those of all together; a row takes its own, as if alone."""
    z0 = torch.stack([torch.linspace(1.5, 2.0, 6, dtype=F64), torch.zeros(6, dtype=F64)], dim=1)
    block = ODEBlock(van_der_pol, t1=1000.0, solver=Rodas5P(1e-3, 1e-3))
    alone, whole = [block.solve(z[None]) for z in z0], block.solve(z0)
    steps = [s.stats.accepted + s.stats.rejected for s in alone]
    assert whole.stats.accepted + whole.stats.rejected <= max(steps) + 5
    assert sum(steps) > 4 * max(steps)
    taken = torch.tensor([s.stats.accepted for s in alone])
    assert (whole.stats.steps - taken).abs().max() <= 2 < taken.max() - taken.min()
    assert sum(s.stats.rejected for s in alone) < 0.25 * sum(steps)  # a control that looks back would have a third
    assert ((whole.final - torch.cat([s.final for s in alone])) / whole.final).abs().max() < 1e-6


def test_evaluations_are_two_and_eight_a_step() -> None:
    """The Jacobian comes with the first stage's value; the start costs two evaluations, or one for a given step."""
    calls = 0

    def f(t: Tensor, z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.sin(40 * t) * z

    for first, extra in ((None, 2), (0.9, 1)):
        calls = 0
        stats = ODEBlock(f, solver=Rodas5P(first_step=first)).solve(torch.ones(2, 1, dtype=F64)).stats
        assert stats.nfe == calls == extra + 8 * (stats.accepted + stats.rejected)
    assert stats.rejected > 0


def test_a_gradient_through_stiff_steps_is_that_of_the_solution() -> None:
    """Robertson's end state by its rate constant: autograd through the steps, both ways, and Radau's differences."""
    z0, ts = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64), [0.0, 40.0]
    sides = [radau(reactions(0.04 + way * 1e-4), z0, ts, 1e-16)[-1, 0] for way in (1, -1)]
    wanted = (sides[0] - sides[1]) / 2e-4
    for gradient in (Backprop(), Checkpoint()):
        k = torch.tensor(0.04, dtype=F64, requires_grad=True)
        end = ODEBlock(robertson, t1=40.0, time=False, solver=Rodas5P(1e-8, 1e-12), gradient=gradient)(z0, context=k)
        weights = torch.tensor([1.0, 1e4, -2.0], dtype=F64)
        (found,) = torch.autograd.grad((end[0] * weights).sum(), k)
        assert found.item() == pytest.approx((wanted * weights).sum().item(), rel=2e-5)


def test_rows_that_overshoot_into_nan_leave_no_trace_in_a_gradient() -> None:
    """-10 log(1 + z) is NaN below -1, where a first step of the whole time lands: it is tried again, shorter."""

    def f(z: Tensor) -> Tensor:
        return -10 * torch.log(1 + z)

    z, found = torch.tensor([[0.01], [3.0]], dtype=F64, requires_grad=True), []
    for first in (1e-3, 1.0):
        solution = ODEBlock(f, solver=Rodas5P(1e-9, 1e-12, first_step=first)).solve(z)
        found.append((solution.final, *torch.autograd.grad(solution.final.sum(), z)))
    assert solution.stats.rejected > 0
    for a, b in zip(*found, strict=True):
        assert ((a - b) / b).abs().max() < 1e-6


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


def test_half_precision_is_carried_in_float32() -> None:
    """A bfloat16 state relaxes to the slow solution within its own rounding."""
    end = ODEBlock(lambda z: -1e4 * (z - 0.5), solver=Rodas5P())(torch.ones(3, 2, dtype=torch.bfloat16))
    assert end.dtype == torch.bfloat16 and (end - 0.5).abs().max() < 1e-2
