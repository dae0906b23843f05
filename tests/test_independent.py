"""batch="independent": every row is solved as if alone, at its own cost."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from odelayers import (
    MLP,
    Backprop,
    Checkpoint,
    Dopri5,
    JacobianRegularizer,
    KineticRegularizer,
    ODEBlock,
    SolveError,
    Status,
)
from problems import ADAPTIVE, TanhNet, name
from strategies import seeds

F64 = torch.float64
TIGHT = Dopri5(1e-9, 1e-9, batch="independent")
STIFFNESS = torch.logspace(0, 3, 8, dtype=F64)[torch.tensor([5, 0, 7, 2, 3, 6, 1, 4])].unsqueeze(1)


class Relaxation(nn.Module):
    """z' = -k (z - a cos t), k one a row; records the rows of every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1, dtype=F64))
        self.rows: list[int] = []

    def forward(self, t: Tensor, z: Tensor, k: Tensor) -> Tensor:
        self.rows.append(len(z))
        return -k * (z - self.a.to(z) * torch.cos(t))


def start(seed: int = 0) -> Tensor:
    """One state of three entries for each stiffness."""
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("solver", ADAPTIVE, ids=name)
def test_rows_whose_stiffness_spreads_a_thousandfold_take_the_steps_they_take_alone(solver: type) -> None:
    """States to rounding and steps exactly, whatever the mates; in shared stepping all take the stiffest row's."""
    ts, z = [0.0, 0.013, 0.4, 1.0], start()
    block = ODEBlock(Relaxation(), solver=solver(1e-7, 1e-7, batch="independent"), time=True)
    whole = block.solve(z, ts, context=STIFFNESS)
    for row in range(8):
        alone = block.solve(z[row : row + 1], ts, context=STIFFNESS[row : row + 1])
        assert (whole.zs[:, row] - alone.zs[:, 0]).abs().max() < 1e-13
        assert whole.stats.steps[row] == alone.stats.steps[0] == alone.stats.accepted
    steps = whole.stats.steps.tolist()
    assert steps[2] == max(steps) > 20 * min(steps) and whole.stats.accepted == steps[2]
    shared = ODEBlock(Relaxation(), solver=solver(1e-7, 1e-7), time=True).solve(z, [0.0, 1.0], context=STIFFNESS)
    assert shared.stats.steps.tolist() == [shared.stats.accepted] * 8


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("solver", ADAPTIVE, ids=name)
def test_a_batch_of_one_is_solved_as_in_shared_stepping(solver: type, recorded: bool) -> None:
    """The same evaluations, steps and, to rounding, numbers at every output time, forwards and backwards."""
    net, z, rejected = TanhNet(scale=3.0), torch.randn(1, 3, dtype=F64), 0
    for ts, first in (([0.0, 0.3, 0.31, 2.0], None), ([0.5, -0.2, -1.5], 1.9), ([0.0, 1.0], 1.0)):
        pair = (solver(first_step=first, batch=kind) for kind in ("shared", "independent"))
        with torch.set_grad_enabled(recorded):
            one, two = (ODEBlock(net, solver=each).solve(z, ts) for each in pair)
        assert (one.zs - two.zs).abs().max() < 1e-13
        for count in ("nfe", "accepted", "rejected"):
            assert getattr(one.stats, count) == getattr(two.stats, count)
        rejected += one.stats.rejected
    assert rejected > 0


@pytest.mark.parametrize("way", [1, -1])
def test_every_row_is_scipy_s_solution(way: int) -> None:
    """States at output times, against DOP853 row by row at 1e-11: a field that depends on time, context and state."""
    ts, z, c = [0.0, 0.2 * way, 1.1 * way, 2.0 * way], torch.randn(5, 3, dtype=F64), torch.randn(5, 5, dtype=F64)
    net = TanhNet(scale=2.0)
    zs = ODEBlock(net, solver=TIGHT, time=True).solve(z, ts, context=c).zs

    def flat(t: float, y: np.ndarray, row: int) -> np.ndarray:
        with torch.no_grad():
            return net(torch.tensor(t, dtype=F64), torch.from_numpy(y)[None], c[row])[0].numpy()

    for row in range(5):
        out = solve_ivp(flat, (0, ts[-1]), z[row].numpy(), "DOP853", ts, rtol=1e-11, atol=1e-11, args=(row,))
        assert (zs[:, row] - torch.from_numpy(out.y.T.copy())).abs().max() < 1e-7


@pytest.mark.parametrize("shape", [(7,), (7, 2), (7, 2, 1, 3), (7, 0)], ids=str)
@settings(max_examples=10)
@given(seed=seeds)
def test_permuting_splitting_or_padding_the_batch_moves_no_row(shape: tuple[int, ...], seed: int) -> None:
    """An elementwise field makes no rounding of its own: each row stays within a few roundings, with its steps."""
    g = torch.Generator().manual_seed(seed)
    z, k = torch.randn(shape, generator=g, dtype=F64), 10 ** (2 * torch.rand(7, generator=g, dtype=F64))

    def solve(rows: Tensor) -> tuple[Tensor, Tensor]:
        context = k[rows].reshape(-1, *[1] * (len(shape) - 1))
        block = ODEBlock(lambda t, z, k: -k * (z - torch.cos(t)), solver=Dopri5(batch="independent"))
        solution = block.solve(z[rows], [0.0, 0.5, 0.7], context=context)
        return solution.zs, solution.stats.steps

    everyone = torch.arange(7)
    zs, steps = solve(everyone)
    mixed, padded = torch.randperm(7, generator=g), torch.cat([everyone, everyone[:3]])
    for rows in (mixed, padded, everyone[:4], everyone[6:]):
        again, taken = solve(rows)
        assert torch.allclose(again, zs[:, rows], rtol=1e-11, atol=1e-13) and torch.equal(taken, steps[rows])


def test_a_hard_row_among_easy_ones_costs_only_itself() -> None:
    """Rows times evaluations are the sum of what rows cost alone, and at most a third for those that wait to leave."""
    k, z = torch.ones(64, 1, dtype=F64), torch.linspace(-1, 1, 64, dtype=F64).unsqueeze(1)
    k[17] = 1000.0
    cost = {}
    with torch.no_grad():
        for kind in ("shared", "independent"):
            field = Relaxation()
            ODEBlock(field, solver=Dopri5(batch=kind), time=True)(z, context=k)
            cost[kind] = sum(field.rows)
        alone = 0
        for row in range(64):
            field = Relaxation()
            ODEBlock(field, solver=Dopri5(batch="independent"), time=True)(z[row, None], context=k[row, None])
            alone += sum(field.rows)
    assert alone <= cost["independent"] <= 4 / 3 * alone
    assert cost["shared"] > 15 * cost["independent"]


class Cliff(nn.Module):
    """z' = -w c sqrt(z), c one a row: NaN, in value and slope, where a step reaches below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0, dtype=F64))
        self.nan: list[list[int]] = []

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        rate = -self.w * c * torch.sqrt(z)
        self.nan.append(rate.isnan()[:, 0].nonzero().flatten().tolist())
        return rate


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint()], ids=name)
def test_a_rejected_try_that_is_nan_leaves_the_gradient_alone(gradient: Any) -> None:
    """sqrt(z(t)) = sqrt(z0) - w c t / 2; the first try of one row falls below zero, its mates' is taken at once."""
    z = torch.tensor([[1.0], [0.3], [2.0]], dtype=F64, requires_grad=True)
    f, c = Cliff(), torch.tensor([[1e-3], [1.0], [1e-3]], dtype=F64)
    solver = Dopri5(1e-9, 1e-9, batch="independent", first_step=1.0)
    solution = ODEBlock(f, solver=solver, gradient=gradient, time=False).solve(z, context=c)
    assert [1] in f.nan and solution.stats.steps.tolist()[::2] == [1, 1]  # else nothing is shown
    found = torch.autograd.grad(solution.final.sum(), [z, f.w])
    root = z.detach().sqrt() - c / 2
    assert (solution.final - root**2).abs().max() < 1e-6
    assert (found[0] - root / z.detach().sqrt()).abs().max() < 1e-5
    assert abs(found[1].item() + (root * c).sum().item()) < 1e-5


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint()], ids=name)
def test_gradients_are_those_of_each_row_alone(gradient: Any) -> None:
    """For state, context, parameters and end times, over output times; the rows' own sum to the parameters'."""
    net, z, c = TanhNet(scale=3.0), torch.randn(4, 3, dtype=F64), torch.randn(4, 5, dtype=F64)
    t1 = torch.tensor([0.5, 2.0, -1.0, 0.0], dtype=F64)
    block = ODEBlock(net, solver=Dopri5(1e-7, 1e-7, batch="independent"), gradient=gradient, time=True)

    def slopes(rows: slice, **times: Any) -> list[Tensor]:
        leaves = [x[rows].clone().requires_grad_() for x in (z, c, t1)]
        if not times:
            times = {"t1": leaves[2]}
        loss = block.solve(leaves[0], context=leaves[1], **times).zs.square().sum()
        found = torch.autograd.grad(loss, [*leaves, *net.parameters()], allow_unused=True)
        return [torch.zeros_like(t1[rows]) if g is None else g for g in found]

    for times in ({}, {"ts": [0.0, 0.4, 0.41, 2.0]}):
        whole, alone = slopes(slice(None), **times), [slopes(slice(i, i + 1), **times) for i in range(4)]
        for i in range(3):
            assert torch.allclose(whole[i], torch.cat([own[i] for own in alone]), atol=1e-10)
        for i in range(3, len(whole)):
            assert torch.allclose(whole[i], sum(own[i] for own in alone), atol=1e-10)


def test_gradcheck_holds() -> None:
    """The gradient of state and context is that of finite differences, twice differentiable, at a tight tolerance."""
    z, k = start()[:3, :1].requires_grad_(), STIFFNESS[[1, 3, 6]].clone().requires_grad_()
    block = ODEBlock(lambda t, z, k: -k * (z - torch.cos(t)), solver=Dopri5(1e-11, 1e-11, batch="independent"), t1=0.3)
    solve = lambda z, k: block(z, context=k)  # noqa: E731
    assert torch.autograd.gradcheck(solve, (z, k), eps=1e-5, atol=1e-5)
    assert torch.autograd.gradgradcheck(solve, (z, k), eps=1e-5, atol=1e-4)


def test_no_graph_is_kept_without_a_gradient_and_numbers_are_the_same() -> None:
    """Under no_grad, inference_mode, jvp and compile the states are those of the recorded solve, to rounding."""
    block = ODEBlock(MLP(3, (8,)).double(), solver=Dopri5(batch="independent"))
    z = 2 * torch.randn(6, 3, dtype=F64)
    wanted = block(z)
    with torch.no_grad():
        found = [block(z)]
    with torch.inference_mode():
        found.append(block(z))
    found.append(torch.func.jvp(block, (z,), (z,))[0])
    assert wanted.requires_grad and not found[0].requires_grad
    assert all((x - wanted).abs().max() < 1e-13 for x in found)
    with pytest.raises(RuntimeError, match=r"Dopri5.*vmap.*use a fixed grid such as RK4"):
        torch.func.vmap(lambda x: block(x[None])[0])(z)


def test_running_regularisers_follow_their_rows() -> None:
    """Integrals along the solve are those of shared steps, for states of any number of axes and own end times."""
    running, ends = [KineticRegularizer(), JacobianRegularizer()], torch.linspace(0.2, 1.0, 8, dtype=F64)
    for z, t1 in itertools.product((start(), start()[:, 0], start()[..., None]), (0.5, ends)):
        found, wanted = (
            ODEBlock(Relaxation(), solver=solver, time=True).solve(
                z,
                t1=t1,
                context=STIFFNESS.reshape(-1, *[1] * (z.ndim - 1)),
                running=running,
                generator=torch.Generator().manual_seed(3),
            )
            for solver in (TIGHT, Dopri5(1e-9, 1e-9))
        )
        assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(found.running, wanted.running, strict=True))


def test_rows_fail_each_at_its_own_time_and_the_others_are_as_without_them() -> None:
    """Two blow up at 1/z0 and are named with their times; isolated, the healthy rows are bit for bit theirs alone."""
    z = torch.tensor([[0.1], [1.0], [-1.0], [0.8], [0.3]], dtype=F64)
    block = ODEBlock(lambda z: z**2, t1=2.0, solver=Dopri5(batch="independent"))
    with pytest.raises(SolveError, match=r"2 row\(s\) failed \[1, 3\]") as caught:
        block(z)
    assert caught.value.status == Status.BLOW_UP
    assert caught.value.t == pytest.approx((1.0, 1.25), abs=1e-3)
    found = block.solve(z, on_failure="isolate")
    assert torch.equal(found.final[[0, 2, 4]], block(z[[0, 2, 4]]))
    assert (found.stats.steps == 0).tolist() == [False, True, False, True, False]
    assert found.stats.failed_at[[1, 3]].tolist() == pytest.approx([1.0, 1.25], abs=1e-3)


def test_each_failure_has_its_own_cause() -> None:
    """In one batch: NaN at the start, a blow-up, a stiff row and a spent budget are told apart; one row is healthy."""
    k = torch.tensor([1.0, 1.0, 0.0, 1e6, 0.0, 0.0], dtype=F64).unsqueeze(1)
    square = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=F64).unsqueeze(1)
    speed = torch.tensor([0.0, 0.0, 0.0, 0.0, 2000.0, 1.0], dtype=F64).unsqueeze(1)
    z = torch.tensor([1.0, torch.nan, 2.0, 1.0, 0.0, 0.0], dtype=F64).unsqueeze(1)

    def f(t: Tensor, z: Tensor, k: Tensor, square: Tensor, speed: Tensor) -> Tensor:
        return -k * z + square * z**2 + speed * torch.cos(speed * t)

    block = ODEBlock(f, solver=Dopri5(max_steps=400, batch="independent"), on_failure="isolate", time=True)
    stats = block.solve(z, context=(k, square, speed)).stats
    wanted = [Status.OK, Status.NONFINITE, Status.BLOW_UP, Status.STIFF, Status.MAX_STEPS, Status.OK]
    assert stats.status.tolist() == wanted
    assert stats.failed_at[2].item() == pytest.approx(0.5, abs=1e-3) and 0 < stats.failed_at[4] < 1


def test_the_budget_is_each_row_s_own() -> None:
    """A budget that the hardest row just needs is enough for the batch, and one step less fails that row alone."""
    block = ODEBlock(Relaxation(), solver=Dopri5(batch="independent"), time=True)
    stats = block.solve(start(), context=STIFFNESS).stats
    tried = stats.accepted + stats.rejected
    tight, short = (
        ODEBlock(Relaxation(), solver=Dopri5(max_steps=n, batch="independent"), time=True) for n in (tried, tried - 1)
    )
    assert torch.equal(tight.solve(start(), context=STIFFNESS).stats.steps, stats.steps)
    with pytest.raises(SolveError) as caught:
        short(start(), context=STIFFNESS)
    assert caught.value.rows == (2,)


@pytest.mark.parametrize("spoil", [lambda z: -STIFFNESS * z, lambda z: -(STIFFNESS * torch.ones(8, 3, dtype=F64)) * z])
def test_what_a_field_holds_for_each_row_must_be_context(spoil: Any) -> None:
    """A captured tensor with an entry for each row no longer fits when rows have left: said, with the remedy."""
    with pytest.raises((RuntimeError, ValueError)) as caught:
        ODEBlock(spoil, solver=Dopri5(batch="independent"))(start())
    said = "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert "of 8 rows are under way" in said and "context=" in said
