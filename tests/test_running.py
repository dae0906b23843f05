"""Regularisers accumulated along a solve, against closed forms on linear fields."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    RK4,
    Adjoint,
    AugmentedODEBlock,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    JacobianRegularizer,
    KineticRegularizer,
    LyapunovRegularizer,
    ODEBlock,
    Reversible,
    Rodas5P,
    SteadyStateRegularizer,
    TorchDiffEq,
)
from odelayers._running import RunningField
from problems import MATRIX, TanhNet, gradients, name

F64 = torch.float64
TIGHT = Dopri5(rtol=1e-10, atol=1e-10)
GRADIENTS = (Backprop(), Checkpoint(), Reversible(), Adjoint())


class Decay(nn.Module):
    """z' = -rate z."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=F64))

    def forward(self, z: Tensor) -> Tensor:
        return -self.rate * z


def kinetic(rate: float, z: Tensor, t: float) -> Tensor:
    """The integral of mean (rate z0 e^(-rate t))^2."""
    return z.reshape(len(z), -1).square().mean(1) * rate * (1 - math.exp(-2 * rate * t)) / 2


@pytest.mark.parametrize("solver", [TIGHT, RK4(steps=100), TorchDiffEq("dopri5", 1e-10, 1e-10)], ids=name)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3)], ids=str)
def test_integrals_on_a_linear_decay(solver: Any, shape: tuple[int, ...]) -> None:
    """Kinetic energy, speed and Jacobian of z' = -1.5 z have closed forms; the states are those without them."""
    z, block = torch.randn(shape, dtype=F64), ODEBlock(Decay(1.5), t1=0.8, solver=solver)
    plain = block.solve(z)
    both = block.solve(z, running=[KineticRegularizer(), SteadyStateRegularizer(), JacobianRegularizer()])
    assert (both.zs - plain.zs).abs().max() < 1e-8 and both.zs.shape == plain.zs.shape
    energy, speed, jacobian = both.running
    assert (energy - kinetic(1.5, z, 0.8)).abs().max() < 1e-7
    assert (speed - z.reshape(len(z), -1).norm(dim=1) * (1 - math.exp(-1.2))).abs().max() < 1e-7
    # |e' J|^2 / D = 1.5^2 |e|^2 / D at every time: a multiple of |e|^2 that is the same for all of a row's entries
    assert jacobian.shape == (5,) and (jacobian > 0).all()
    assert plain.running == ()


def test_the_jacobian_s_integral_is_the_squared_frobenius_norm_in_the_mean() -> None:
    """For z' = A z the mean over probes is T |A|^2 / D, within five standard errors; a probe is fixed for a solve."""
    n, t1 = 4000, 0.7
    block = ODEBlock(lambda z: z @ MATRIX.T, t1=t1, solver=RK4(steps=4))
    (found,) = block.solve(torch.zeros(n, 3, dtype=F64), running=[JacobianRegularizer()]).running
    wanted = t1 * MATRIX.square().sum() / 3
    assert abs(found.mean() - wanted) < 5 * found.std() / n**0.5
    probe = torch.randn((n, 3), generator=torch.Generator().manual_seed(3), dtype=F64)
    given = block.solve(
        torch.zeros(n, 3, dtype=F64), running=[JacobianRegularizer()], generator=torch.Generator().manual_seed(3)
    )
    assert torch.allclose(given.running[0], t1 * (probe @ MATRIX).square().mean(1), atol=1e-10)


@pytest.mark.parametrize("gradient", GRADIENTS, ids=name)
def test_gradients_flow_from_the_integrals(gradient: Any) -> None:
    """d kinetic / d rate and d kinetic / d z0 agree with the closed form's own derivative."""
    f, z = Decay(0.9), torch.randn(4, 3, dtype=F64, requires_grad=True)
    (energy,) = ODEBlock(f, solver=TIGHT, gradient=gradient).solve(z, running=[KineticRegularizer()]).running
    found = gradients(energy.sum(), [f.rate, z])
    rate = torch.tensor(0.9, dtype=F64, requires_grad=True)
    exact = (z.square().mean(1) * rate * (1 - torch.exp(-2 * rate)) / 2).sum()
    wanted = gradients(exact, [rate, z])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("gradient", [Checkpoint(), Reversible(), Adjoint()], ids=name)
def test_gradients_of_the_jacobian_s_integral_agree_between_modes(gradient: Any) -> None:
    """The regulariser needs second derivatives of f; evaluated again they are those of Backprop."""
    net, z, found = TanhNet(3), torch.randn(4, 3, dtype=F64), []
    for g in (gradient, Backprop()):
        block = ODEBlock(net, solver=TIGHT, gradient=g)
        solution = block.solve(z, running=[JacobianRegularizer()], generator=torch.Generator().manual_seed(1))
        found.append(gradients(solution.running[0].sum() + solution.final.square().sum(), list(net.parameters())))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_integrals_are_taken_without_a_graph_too() -> None:
    """In evaluation under no_grad the Jacobian is still found, and nothing is recorded."""
    block, z = ODEBlock(TanhNet(3)), torch.randn(4, 3, dtype=F64)
    options = {"running": [JacobianRegularizer(), KineticRegularizer()]}
    recorded = block.solve(z, generator=torch.Generator().manual_seed(1), **options).running
    with torch.no_grad():
        silent = block.solve(z, generator=torch.Generator().manual_seed(1), **options).running
    assert all(torch.allclose(a, b) and not b.requires_grad for a, b in zip(recorded, silent, strict=True))


@pytest.mark.parametrize("shape", [(3, 2), (3, 4, 2)], ids=str)
def test_each_sample_s_integral_runs_to_its_own_end(shape: tuple[int, ...]) -> None:
    """With per-sample end times row i holds the closed form at its own time, and the field sees its own times."""
    z, t1 = torch.randn(shape, dtype=F64), [0.5, 1.0, 2.0]
    block = ODEBlock(lambda z: -1.5 * z, solver=TIGHT)
    (found,) = block.solve(z, t1=torch.tensor(t1, dtype=F64), running=[KineticRegularizer()]).running
    for row, end in enumerate(t1):
        assert found[row].item() == pytest.approx(kinetic(1.5, z[row : row + 1], end).item(), abs=1e-8)
    timed = ODEBlock(lambda t, z: torch.cos(t) * torch.ones_like(z), solver=TIGHT)
    solution = timed.solve(z, t1=torch.tensor(t1, dtype=F64), running=[SteadyStateRegularizer()])
    assert torch.allclose(solution.final - z, torch.tensor(t1, dtype=F64).sin().reshape(3, *[1] * (len(shape) - 1)))


def test_an_augmented_block_accumulates_over_its_padded_state() -> None:
    """The rate is that of the padded field: a growing zero channel counts."""
    block = AugmentedODEBlock(torch.ones_like, 2, keep=False, time=False)
    solution = block.solve(torch.randn(4, 3, dtype=F64), running=[SteadyStateRegularizer(), KineticRegularizer()])
    assert torch.allclose(solution.running[0], torch.full((4,), 5**0.5, dtype=F64))
    assert torch.allclose(solution.running[1], torch.ones(4, dtype=F64))
    assert solution.final.shape == (4, 3)


def test_where_nothing_runs_the_integrals_are_zero() -> None:
    """No time or no samples: zeros of shape (B,)."""
    block = ODEBlock(Decay(1.0))
    (still,) = block.solve(torch.ones(3, 1, dtype=F64), t1=0.0, running=[KineticRegularizer()]).running
    assert torch.equal(still, torch.zeros(3, dtype=F64))
    assert block.solve(torch.ones(0, 1, dtype=F64), running=[KineticRegularizer()]).running[0].shape == (0,)


def test_what_cannot_accumulate_is_refused() -> None:
    """Pointwise regularisers and noisy blocks say where they belong."""
    z = torch.ones(2, 1, dtype=F64)
    with pytest.raises(TypeError, match=r"running: expected regularisers accumulated.*got LyapunovRegularizer"):
        ODEBlock(Decay(1.0)).solve(z, running=[LyapunovRegularizer()])
    with pytest.raises(TypeError, match="got the class KineticRegularizer"):
        ODEBlock(Decay(1.0)).solve(z, running=[KineticRegularizer])
    with pytest.raises(ValueError, match="regularisers accumulate along ODE solves; use an ODEBlock"):
        DropoutSDEBlock(Decay(1.0), 0.1).solve(z, running=[KineticRegularizer()])


@pytest.mark.parametrize("solver", [RK4(steps=8), Dopri5(), Rodas5P()], ids=name)
def test_inference_mode_accumulates_what_no_grad_does(solver: Any) -> None:
    """Autograd records nothing in inference mode: the Jacobian's integral is not 0 for it; states made in it serve."""
    block, found = ODEBlock(TanhNet(), solver=solver), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            z, draws = torch.full((3, 3), 0.5, dtype=F64), torch.Generator().manual_seed(0)
            solution = block.solve(z, t1=torch.tensor(2.0), running=[JacobianRegularizer()], generator=draws)
            found.append((solution.running[0], solution.final))
    assert found[0][0].min() > 1e-3
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["half state", "autocast"])
def test_integrals_of_a_field_in_half_precision_are_in_float32(half: torch.dtype, autocast: bool) -> None:
    """|f|^2 = 9e4 is beyond float16, and the state is not: z' = -z from 300 has the integral 300^2 (1 - e^-0.2) / 2."""
    lin = nn.Linear(4, 4, bias=False)
    lin.weight.data = -torch.eye(4)
    block, z = ODEBlock(lin, t1=0.1, solver=RK4(steps=4)), torch.full((2, 4), 300.0)
    with torch.no_grad(), torch.autocast("cpu", half, enabled=autocast):
        found = block.solve(z if autocast else z.to(half), running=[KineticRegularizer(), SteadyStateRegularizer()])
    exact = (300**2 * (1 - math.exp(-0.2)) / 2, 600 * (1 - math.exp(-0.1)))
    for integral, value in zip(found.running, exact, strict=True):
        torch.testing.assert_close(integral, torch.full((2,), value), rtol=0.02, atol=0)


class Doubled(ODEBlock):
    """A block of a user's own: it starts from 2z."""

    def solve(self, z: Tensor, *, running: Any = ()) -> Any:
        return super().solve(2 * z, running=running)


@pytest.mark.parametrize("regularizer", [JacobianRegularizer(), KineticRegularizer()], ids=name)
def test_a_block_of_a_user_s_own_is_entered_once_in_inference_mode(regularizer: Any) -> None:
    """Its own `solve` doubles the state once, as under no_grad, and takes no argument that it does not know."""
    block, found = Doubled(Decay(1.0), solver=RK4(steps=4)), []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found.append(block.solve(torch.ones(2, 1, dtype=F64), running=[regularizer]).final)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64])
def test_a_field_of_another_dtype_is_refused_beside_integrals_too(dtype: torch.dtype) -> None:
    """The same words as without them: nothing is cast in silence."""
    block = ODEBlock(lambda z: -z.to(dtype), solver=RK4(steps=4))
    for running in ([], [KineticRegularizer()]):
        with pytest.raises(TypeError, match="expected dz/dt in the state's torch.float32, got"):
            block.solve(torch.ones(2, 2), running=running)


def test_rest_after_the_end_time_is_asked_for_by_output_times() -> None:
    """z' = -z until t = 1, 0 after: over [1, 2] the penalty is 0; a solve from t0 = 0 adds what was before."""
    block = ODEBlock(lambda t, z: torch.where(t < 1, -z, 0 * z), solver=RK4(steps=50))
    z = block(torch.ones(1, 2, dtype=F64))
    assert block.solve(z, ts=[1.0, 2.0], running=[SteadyStateRegularizer()]).running[0] == 0
    assert block.solve(z, t1=2.0, running=[SteadyStateRegularizer()]).running[0] > 0.3


def test_a_running_field_without_the_field_it_runs_around_is_refused() -> None:
    """It is made by `around`, which draws the probe and knows the state's shape; made otherwise it names that way."""
    bare = RunningField(torch.sin, False)
    with pytest.raises(TypeError, match=r"RunningField: build it with RunningField.around"):
        bare(0.0, torch.zeros(2, 3))
