"""Fields that change between evaluations, noise that is off, and solvers of other libraries at their limits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from odelayers import (
    RK4,
    Dopri5,
    DropoutSDEBlock,
    Euler,
    EulerMaruyama,
    Heun,
    JacobianRegularizer,
    KineticRegularizer,
    ODEBlock,
    Rodas5P,
    SDEBlock,
    SolveError,
    Status,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from odelayers._solvers import Solver
from problems import name

pytestmark = pytest.mark.timeout(60)


class FunctionalDropout(nn.Module):
    """Dropout that no module tells of."""

    def forward(self, z: Tensor) -> Tensor:
        return F.dropout(-z, 0.5, self.training)


def test_a_field_that_draws_is_refused_and_its_evaluation_mode_is_not() -> None:
    """Random numbers drawn inside the field are found at the first evaluation, whoever draws them."""
    block = ODEBlock(FunctionalDropout(), solver=Euler(4))
    with pytest.raises(ValueError, match=r"FunctionalDropout: the field draws random numbers.*DropoutSDEBlock"):
        block(torch.ones(2, 3))
    block.eval()
    assert (block(torch.ones(2, 3)) - 0.75**4).abs().max() < 1e-6


@pytest.mark.parametrize(
    "f",
    [
        lambda t, z: t * torch.randn_like(z) - z,  # nothing of it shows at t = 0
        lambda t, z: F.dropout(F.relu(z - 5), 0.5) - z,  # nor of this at z = 1
        lambda t, z: -F.dropout(z, 0.01),  # and seldom of this
        lambda t, z: F.rrelu(-z, training=True),
    ],
)
def test_random_numbers_are_found_where_no_value_tells_of_them(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What is asked is whether operators draw, not whether two values differ."""
    with pytest.raises(ValueError, match="the field draws random numbers"):
        ODEBlock(f, solver=Euler(4))(torch.ones(1, 1))


def test_a_failure_that_is_not_seen_again_is_still_a_failure() -> None:
    """A field that is NaN once leaves no NaN with the status OK behind."""
    calls = 0

    def once(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -z * (torch.nan if calls == 3 else 1.0)

    with pytest.raises(SolveError, match=r"not seen when solved once more") as caught:
        ODEBlock(once, solver=RK4(4))(torch.ones(2, 1))
    assert caught.value.rows == (0, 1)


@pytest.mark.parametrize("solver", [Dopri5, Tsit5], ids=name)
def test_ambient_autocast_raises_the_tolerance_floor(solver: type[Dopri5] | type[Tsit5]) -> None:
    """A field in bfloat16 is not asked for 1e-7, which its rounding cannot show, but for four of these roundings."""
    f, z = nn.Sequential(nn.Linear(16, 16), nn.Tanh()), torch.randn(8, 16)
    floor = 4 * torch.finfo(torch.bfloat16).eps
    tight, loose = (ODEBlock(f, solver=solver(tol, tol)) for tol in (1e-7, floor))
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = tight.solve(z), loose.solve(z)
    assert torch.equal(found.final, wanted.final) and found.stats.nfe == wanted.stats.nfe
    assert found.stats.nfe < 0.6 * tight.solve(z).stats.nfe  # control: without autocast 1e-7 is asked for


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("solver", [RK4(4), Heun(4)], ids=repr)
def test_autocast_reaches_the_field_alone(solver: RK4 | Heun, device: str) -> None:
    """A field without operations in low precision gives the same bits under autocast: sums are not cast."""
    block, z = ODEBlock(torch.sin, time=False, solver=solver), torch.randn(8, 16, device=device)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast(device, torch.bfloat16):
            cast = block(z.requires_grad_(grad))
        assert torch.equal(cast, block(z))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("solver", [RK4(4), Dopri5()], ids=name)
def test_a_solve_under_autocast_is_that_of_float32_to_the_field_s_rounding(solver: Any, device: str) -> None:
    """A field of matrix products is cast, the state and the gradients stay in float32."""
    f = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).to(device)
    block, z, found = ODEBlock(f, solver=solver), torch.randn(4, 8).to(device), []
    for low in (True, False):
        with torch.autocast(device, torch.bfloat16, enabled=low):
            out = block(z)
        assert out.dtype == torch.float32
        found.append([out, *torch.autograd.grad(out.square().sum(), f.parameters())])
    for cast, full in zip(*found, strict=True):
        assert cast.dtype == torch.float32
        assert 0 < (cast - full).norm() < 8 * torch.finfo(torch.bfloat16).eps * full.norm()


@pytest.mark.parametrize("method", ["heun", "midpoint", "reversible_heun"])
def test_a_stratonovich_block_on_torchsde_runs_without_noise(method: str) -> None:
    """In evaluation the block is the ODE, whichever reading its method has."""
    block = DropoutSDEBlock(lambda z: -z, calculus="stratonovich", solver=TorchSDE(method, steps=50)).eval()
    z = torch.ones(2, 1, dtype=torch.float64)
    assert (block(z) - torch.exp(-z)).abs().max() < 1e-3


def test_isolation_finds_the_rows_that_torchdiffeq_does_not_name() -> None:
    """z' = z^2 blows up in one row; the others come out, and the status says which."""
    z = torch.tensor([[0.1], [1.0], [0.2]])
    solution = ODEBlock(lambda z: z**2, t1=2.0, solver=TorchDiffEq("dopri5"), on_failure="isolate").solve(z)
    assert solution.stats.status.tolist() == [Status.OK, Status.BLOW_UP, Status.OK]
    assert (solution.final[[0, 2]] - z[[0, 2]] / (1 - 2 * z[[0, 2]])).abs().max() < 1e-3


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.1, False)])
def test_increments_for_noise_that_is_off_are_refused(p: float, training: bool) -> None:
    """What is given is used or refused, never ignored."""
    block = DropoutSDEBlock(lambda z: -z, p).train(training)
    with pytest.raises(ValueError, match=r"noise: increments were given, but the noise is off.*noise_in_eval=True"):
        block.solve(torch.ones(2, 1), noise=torch.zeros(20, 2, 1))


def test_increments_that_are_not_finite_are_refused_as_such() -> None:
    """NaN in the noise is not taken for a blow-up of the field."""
    noise = torch.zeros(20, 2, 1)
    noise[3] = torch.nan
    with pytest.raises(ValueError, match=r"noise: expected finite increments"):
        DropoutSDEBlock(lambda z: -z).solve(torch.ones(2, 1), noise=noise)


def test_only_a_jacobian_s_integral_moves_the_random_numbers_that_follow() -> None:
    """Measuring kinetic energy draws nothing; the Jacobian's probe does (control)."""
    block, states = ODEBlock(lambda z: -z), []
    for running in ([], [KineticRegularizer()], [JacobianRegularizer()]):
        torch.manual_seed(5)
        block.solve(torch.ones(2, 1), running=running)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


class Reusing(nn.Module):
    """A field that writes its rates into one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = torch.empty(0)

    def forward(self, z: Tensor) -> Tensor:
        return torch.sin(z, out=self.buffer)


@pytest.mark.parametrize("solver", [Heun(4), RK4(4), Dopri5(), Tsit5(), Rodas5P(), EulerMaruyama(4)], ids=repr)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_field_that_returns_the_same_buffer_again_is_refused(solver: Solver, mode: Callable[[], Any]) -> None:
    """A rate that is overwritten by the next would be combined as if it were the next: silently wrong."""
    with mode():
        block = (
            SDEBlock(Reusing(), lambda z: z, solver=solver) if solver.calculus else ODEBlock(Reusing(), solver=solver)
        )
        with pytest.raises(ValueError, match=r"Reusing: the field has overwritten.*return a new tensor each time"):
            block(torch.ones(2, 3))


@pytest.mark.parametrize("solver", [RK4(4), Dopri5()], ids=repr)
def test_buffers_in_turn_are_refused_and_more_than_a_step_needs_are_not(solver: Solver) -> None:
    """Two buffers are too few for a step of four stages; sixteen are never overwritten while they are needed."""

    def block(buffers: int) -> ODEBlock:
        ring = [torch.empty(2, 3) for _ in range(buffers)]
        place = itertools.cycle(range(buffers))
        return ODEBlock(lambda z: torch.sin(z, out=ring[next(place)]), solver=solver)

    with torch.no_grad():
        with pytest.raises(ValueError, match="has overwritten the tensor"):
            block(2)(torch.ones(2, 3))
        found, expected = block(16)(torch.ones(2, 3)), ODEBlock(torch.sin, time=False, solver=solver)(torch.ones(2, 3))
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("solver", [RK4(4), Dopri5(), Heun(4)], ids=repr)
def test_rows_that_are_nan_are_not_taken_for_overwritten(solver: Solver) -> None:
    """In inference mode values are compared; the row fails by itself, and the others come out."""
    z = torch.ones(3, 2)
    z[1] = torch.nan
    with torch.inference_mode():
        stats = ODEBlock(torch.sin, solver=solver, on_failure="isolate", time=False).solve(z).stats
    assert stats.status.tolist() == [Status.OK, Status.NONFINITE, Status.OK]


def test_a_field_that_returns_its_parameter_or_its_input_is_none_of_these() -> None:
    """The same tensor, unchanged, is a constant rate."""
    rate = torch.ones(2, 3)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(ODEBlock(lambda z: rate, solver=RK4(4))(rate), 2 * rate)
            assert (ODEBlock(lambda z: z)(rate) - rate.exp()).abs().max() < 1e-4


def test_autocast_leaves_the_tolerance_of_float64_alone() -> None:
    """Autocast does not cast float64: steps and states under it are those without it."""
    block, z = ODEBlock(nn.Linear(3, 3).double(), solver=Dopri5(1e-10, 1e-10)), torch.randn(2, 3).double()
    expected = block.solve(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = block.solve(z)
    assert torch.equal(found.final, expected.final) and found.stats.accepted == expected.stats.accepted
