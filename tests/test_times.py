"""End times of every kind, output times, and the gradients that end times get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    EulerMaruyama,
    ODEBlock,
    Reversible,
    SDEBlock,
    TorchDiffEq,
    TorchSDE,
    Uniform,
)
from problems import LINEAR, PROBLEMS, TanhNet, finite_difference, name, reference

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
TIGHT = Dopri5(rtol=1e-10, atol=1e-10)
OWN = Dopri5(rtol=1e-10, atol=1e-10, batch="independent")
GRADIENTS = (Backprop(), Checkpoint(), Reversible(), Adjoint())


@pytest.mark.parametrize("kind", ["float", "int", "tensor", "float32 tensor", "per sample", "parameter", "ts"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("t1", [1, -1])
def test_every_way_to_say_the_end_time_agrees(problem: Any, kind: str, t1: int) -> None:
    """A number, a tensor, one per sample, a parameter or output times give the same state at t1, either way in time."""
    z, batch = problem.z0, len(problem.z0)
    ends: dict[str, Any] = {
        "float": float(t1),
        "int": t1,
        "tensor": torch.tensor(float(t1), dtype=F64, requires_grad=True),
        "float32 tensor": torch.tensor(float(t1)),
        "per sample": torch.full((batch,), float(t1), dtype=F64),
    }
    if kind == "parameter":
        found = ODEBlock(problem.f, t1=nn.Parameter(torch.tensor(float(t1))), solver=TIGHT)(z)
    elif kind == "ts":
        found = ODEBlock(problem.f, solver=TIGHT).solve(z, [0.0, float(t1)]).final
    else:
        found = ODEBlock(problem.f, solver=TIGHT)(z, ends[kind])
    assert (found - problem.solution(float(t1))).abs().max() < 1e-8


@pytest.mark.parametrize("solver", [TIGHT, OWN, RK4(steps=200), TorchDiffEq("dopri5", 1e-9, 1e-9)], ids=name)
def test_every_sample_may_end_at_its_own_time(solver: Any) -> None:
    """Forwards, backwards and not at all in one batch, with a start away from 0 and a time-dependent field."""
    net, z = TanhNet(), torch.randn(5, 3, dtype=F64)
    t1 = torch.tensor([2.0, 0.5, -0.7, 1.1, 0.4], dtype=F64)
    solution = ODEBlock(net, t0=0.5, solver=solver).solve(z, t1=t1)
    for row, end in enumerate(t1.tolist()):
        wanted = z[row] if end == 0.5 else reference(net, z[row : row + 1], [0.5, end], timed=True)[-1, 0]
        assert (solution.final[row] - wanted).abs().max() < 1e-7
    assert torch.allclose(solution.final[1], z[1], rtol=0, atol=1e-15)
    assert torch.equal(solution.ts, torch.stack([torch.full((5,), 0.5, dtype=F64), t1]))


@pytest.mark.parametrize("shape", [(8,), (8, 2), (8, 2, 3)], ids=str)
@pytest.mark.parametrize("t1", [1.0, torch.linspace(-1, 2, 8, dtype=F64)], ids=["one end", "own ends"])
def test_with_steps_of_its_own_a_row_sees_its_own_time(t1: Any, shape: tuple[int, ...]) -> None:
    """(n, 1, ...) for the n rows under way, from the first evaluation on; z' = t ends at z0 + t1^2 / 2."""
    seen: list[bool] = []

    def f(t: Tensor, z: Tensor) -> Tensor:
        seen.append(t.shape == (len(z), *[1] * (z.ndim - 1)))
        return t.expand(z.shape)

    z = torch.randn(shape, dtype=F64)
    ends = torch.as_tensor(t1, dtype=F64).expand(8).reshape(-1, *[1] * (z.ndim - 1))
    assert (ODEBlock(f, solver=OWN)(z, t1) - z - ends**2 / 2).abs().max() < 1e-12
    assert all(seen)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
@pytest.mark.parametrize("solver", [TIGHT, RK4(steps=60)], ids=name)
def test_an_end_time_gets_the_field_at_the_end_as_gradient(solver: Any, gradient: Any) -> None:
    """dL/dt1 = dL/dz . f(t1, z(t1)) and a central difference agree with the gradient of one end time."""
    net, z = TanhNet(), torch.randn(2, 3, dtype=F64)
    block = ODEBlock(net, solver=solver, gradient=gradient)
    t1 = torch.tensor(1.3, dtype=F64, requires_grad=True)
    out = block(z, t1)
    (found,) = torch.autograd.grad(out.square().sum(), t1)
    assert found.item() == pytest.approx((2 * out * net(t1, out)).sum().item(), abs=1e-5)
    difference = finite_difference(lambda t: block(z, t).square().sum().item(), 1.3, 1e-4)
    assert found.item() == pytest.approx(difference, abs=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
def test_each_sample_s_end_time_gets_its_own_gradient(gradient: Any) -> None:
    """Per-sample end times: each is moved by the field at its own end, whichever way it runs."""
    net, z = TanhNet(), torch.randn(4, 3, dtype=F64)
    t1 = torch.tensor([0.3, 1.0, -0.6, 1.9], dtype=F64, requires_grad=True)
    out = ODEBlock(net, solver=TIGHT, gradient=gradient)(z, t1)
    (found,) = torch.autograd.grad(out.square().sum(), t1)
    assert torch.allclose(found, (2 * out * net(t1[:, None], out)).sum(dim=1), atol=1e-6)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
def test_an_end_time_can_be_learned(gradient: Any) -> None:
    """A parameter t1 finds the time log 2 at which z' = -z has halved the state; it is in the state dict."""
    t1 = nn.Parameter(torch.tensor(0.2, dtype=F64))
    block = ODEBlock(lambda z: -z, t1=t1, gradient=gradient)
    optimizer = torch.optim.LBFGS(block.parameters(), line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (block(torch.ones(2, 1, dtype=F64)) - 0.5).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    assert t1.item() == pytest.approx(0.6931472, abs=1e-3)
    assert set(block.state_dict()) == {"t1"}


def test_an_end_time_of_a_noisy_solve_scales_time_and_noise() -> None:
    """With a tensor end time the clock runs at rate T and the noise at sqrt(T), per sample."""
    t1 = torch.tensor([0.25, 4.0], dtype=F64).repeat_interleave(20_000).requires_grad_()
    block = SDEBlock(torch.ones_like, torch.ones_like, solver=EulerMaruyama(4), time=False)
    z = block(torch.zeros(40_000, 1, dtype=F64), t1)[:, 0].reshape(2, -1)
    assert z.mean(dim=1).tolist() == pytest.approx([0.25, 4.0], abs=0.05)
    assert z.var(dim=1).tolist() == pytest.approx([0.25, 4.0], rel=0.05)


class Timer(nn.Module):
    """Writes the time into the state: z(t1) = z0 + t1 - t0."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)


def test_random_end_times_are_drawn_in_training_and_their_mean_in_evaluation() -> None:
    """Uniform: one draw a call for the whole batch, inside [a, b], from torch's generator; the mean in eval."""
    block, z = ODEBlock(Timer(), t1=Uniform(1.0, 3.0)), torch.zeros(4, 1, dtype=F64)
    drawn = torch.stack([block(z)[:, 0] for _ in range(400)])
    assert (drawn - drawn[:, :1]).abs().max() < 1e-12 and drawn[:, 0].unique().numel() == 400
    assert 1.0 <= drawn.min() and drawn.max() <= 3.0
    assert drawn.mean().item() == pytest.approx(2.0, abs=5 * (4 / 12 / 400) ** 0.5)
    a, b = (block.solve(z, generator=torch.Generator().manual_seed(6)).final for _ in range(2))
    assert torch.equal(a, b)
    assert (block.eval()(z) - 2.0).abs().max() < 1e-12
    assert (block(z, 1.25) - 1.25).abs().max() < 1e-12
    assert ODEBlock(Timer(), t1=Uniform(1, 3)).train().solve(z).ts[1] != 2.0


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
def test_no_time_is_the_identity(gradient: Any) -> None:
    """t1 == t0 returns the state without an evaluation, with the identity as gradient; so does a lone output time."""
    z = torch.randn(3, 2, dtype=F64, requires_grad=True)
    for t1 in (1.5, torch.tensor(1.5)):
        block = ODEBlock(LINEAR.f, t0=1.5, gradient=gradient)
        solution = block.solve(z, t1=t1)
        assert torch.equal(solution.final, z) and solution.stats.nfe == 0
        assert torch.equal(torch.autograd.grad(solution.final.sum(), z)[0], torch.ones_like(z))
    assert torch.equal(block.solve(z, [0.3]).zs, z[None])
    still = torch.full((3,), 1.5, dtype=F64, requires_grad=True)
    assert torch.equal(ODEBlock(torch.sin, t0=1.5, gradient=gradient, time=False)(z, still), z)


@pytest.mark.parametrize(
    "block",
    [
        ODEBlock(torch.sin, time=False),
        ODEBlock(torch.sin, time=False, solver=OWN),
        ODEBlock(torch.sin, time=False, solver=TorchDiffEq("dopri5")),
        ODEBlock(torch.sin, time=False, solver=RK4(3), gradient=Checkpoint()),
        DropoutSDEBlock(torch.sin, 0.2, time=False),
        SDEBlock(torch.sin, torch.cos, time=False, solver=TorchSDE("euler", 3)),
    ],
    ids=["dopri5", "independent", "torchdiffeq", "rk4", "dropout", "torchsde"],
)
def test_an_empty_batch_gives_an_empty_result(block: Any) -> None:
    """Shape, dtype and gradient of nothing, at every output time."""
    z = torch.zeros(0, 3, 2, dtype=F64, requires_grad=True)
    solution = block.solve(z, [0.0, 0.5, 1.0])
    assert solution.zs.shape == (3, 0, 3, 2) and solution.zs.dtype == F64
    assert solution.stats.status.shape == (0,)
    assert block(z).shape == z.shape
    block(z).sum().backward()


@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"ts": [0.0, 1.0, 0.5]}, ValueError, r"ts: expected strictly increasing or strictly decreasing times, got"),
        ({"ts": [0.0, 0.0]}, ValueError, "strictly increasing"),
        ({"ts": [0.0, float("nan")]}, ValueError, "ts: expected finite times"),
        ({"ts": [0.0, float("inf")]}, ValueError, "ts: expected finite times"),
        ({"ts": []}, ValueError, r"ts: expected output times of shape \(T,\), T >= 1, got \(0,\)"),
        ({"ts": torch.zeros(2, 2)}, ValueError, r"got \(2, 2\)"),
        (
            {"ts": torch.tensor([0.0, 1.0], requires_grad=True)},
            ValueError,
            "carry no gradient; pass the end time",
        ),
        ({"ts": [0.0, torch.tensor(1.0, requires_grad=True)]}, ValueError, "carry no gradient; pass the end time"),
        ({"ts": [0.0, None]}, TypeError, r"ts: expected a list of numbers, got \[0.0, None\]"),
        ({"ts": [torch.tensor(0.0), torch.tensor(1.0j)]}, TypeError, "ts: expected a list of numbers"),
        ({"ts": [0.0, 10**400]}, TypeError, "ts: expected a list of numbers"),
        ({"ts": torch.tensor([0.0, 1.0j])}, TypeError, "ts: expected real times, got torch.complex64"),
        ({"ts": [0.0, 1.0], "t1": 1.0}, ValueError, "expected ts or t1, got both"),
        ({"t1": float("nan")}, ValueError, "t1: expected a finite number, got nan"),
        ({"t1": float("inf")}, ValueError, "t1: expected a finite number"),
        ({"t1": "1"}, TypeError, "t1: expected a number, got '1'"),
        ({"t1": torch.tensor([1, 2, 3])}, TypeError, "t1: expected a floating-point tensor, got torch.int64"),
        ({"t1": torch.ones(2)}, ValueError, r"one end time per sample \(3,\), got \(2,\)"),
        ({"t1": torch.ones(3, 1)}, ValueError, r"got \(3, 1\)"),
        ({"t1": torch.tensor([1.0, float("nan"), 1.0])}, ValueError, "t1: expected finite end times"),
    ],
)
def test_times_that_make_no_sense_are_refused(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    """Unordered, repeated, NaN, infinite, empty, ill-shaped or double times: what was expected, what came."""
    with pytest.raises(kind, match=words):
        ODEBlock(torch.sin, time=False).solve(torch.ones(3, 1), **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"t0": float("nan")}, "ODEBlock: t0: expected a finite number"),
        ({"t1": float("inf")}, "ODEBlock: t1: expected a finite number"),
        ({"t1": nn.Parameter(torch.ones(2))}, r"expected a 0-d parameter, got shape \(2,\)"),
    ],
)
def test_times_of_a_block_are_checked_at_construction(options: dict[str, Any], words: str) -> None:
    """A block's own times fail where they are written."""
    with pytest.raises(ValueError, match=words):
        ODEBlock(torch.sin, time=False, **options)
