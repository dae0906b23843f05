"""on_failure="isolate": the healthy rows are what they would be without the failed ones."""

from __future__ import annotations

import math
from dataclasses import replace
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
    Euler,
    EulerMaruyama,
    Heun,
    JacobianRegularizer,
    KineticRegularizer,
    Midpoint,
    Milstein,
    ODEBlock,
    Reversible,
    ReversibleHeun,
    Rodas5P,
    SDEBlock,
    SolveError,
    Status,
    StratonovichHeun,
    TorchDiffEq,
    TorchSDE,
    Tsit5,
)
from problems import name

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
BATCH = 1000
OWN = Dopri5(batch="independent")
CONTROLLED = (Dopri5(), Tsit5(), OWN, Rodas5P())
FIXED = (Euler(steps=2000), Midpoint(steps=50), Heun(steps=50), RK4(steps=50))
TORCHDIFFEQ = TorchDiffEq("rk4", step_size=0.06)


def cubic(z: Tensor) -> Tensor:
    """Decays from inside |z| < 1, blows up in finite time from outside."""
    return z**3 - z


def small(z: Tensor) -> Tensor:
    """A diffusion that keeps healthy rows healthy."""
    return 0.1 * z.cos()


def spoiled(dim: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A thousand states of which a tenth are NaN, inf or blow up; and which are healthy."""
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(BATCH, dim, generator=g, dtype=F64) * 1.6 - 0.8
    bad = torch.randperm(BATCH, generator=g)[: BATCH // 10]
    for i, row in enumerate(bad.tolist()):
        z[row, i % dim] = [float("nan"), float("inf"), -float("inf"), 2.0 + 0.05 * i][i % 4]
    healthy = torch.ones(BATCH, dtype=torch.bool)
    healthy[bad] = False
    return z, healthy


@pytest.mark.parametrize(
    "solver, gradient",
    [
        pytest.param(solver, gradient, id=f"{solver!r}-{name(gradient)}")
        for solver in (*CONTROLLED, *FIXED, TORCHDIFFEQ)
        for gradient in (Backprop(), Checkpoint(), Reversible(), Adjoint())
        if gradient.accepts(solver)
    ],
)
def test_healthy_rows_equal_a_run_without_the_failed_ones(solver: Any, gradient: Any) -> None:
    """States and gradients of the healthy rows are equal bit for bit; failed rows are NaN and get no gradient."""
    z, healthy = spoiled()
    block = ODEBlock(cubic, t1=3.0, solver=solver, gradient=gradient, on_failure="isolate")
    z.requires_grad_()
    ts = [0.0, 1.3, 3.0]
    whole, alone = block.solve(z, ts), block.solve(z.detach()[healthy].requires_grad_(), ts)
    assert torch.equal(whole.zs[:, healthy], alone.zs)
    assert whole.zs[:, ~healthy].isnan().all()
    assert torch.equal(whole.stats.status == Status.OK, healthy)
    kept = z.detach()[healthy].requires_grad_()
    (found,) = torch.autograd.grad(whole.zs[:, healthy].square().sum(), z)
    (wanted,) = torch.autograd.grad(block.solve(kept, ts).zs.square().sum(), kept)
    assert torch.equal(found[healthy], wanted)
    assert torch.equal(found[~healthy], torch.zeros_like(found[~healthy]))


def test_status_and_time_say_how_each_row_failed() -> None:
    """NaN and inf at the start fail there; z' = z^3 - z from z0 blows up at log(z0^2 / (z0^2 - 1)) / 2."""
    z = torch.tensor([[0.5], [float("nan")], [1.5], [float("inf")], [-3.0], [0.9]], dtype=F64)
    stats = ODEBlock(cubic, t1=3.0, on_failure="isolate").solve(z).stats
    wanted = [Status.OK, Status.NONFINITE, Status.BLOW_UP, Status.NONFINITE, Status.BLOW_UP, Status.OK]
    assert stats.status.tolist() == wanted
    assert stats.failed_at.isnan().tolist() == [s == Status.OK for s in wanted]
    assert stats.failed_at[[1, 3]].tolist() == [0.0, 0.0]
    for row in (2, 4):
        square = z[row, 0].item() ** 2
        assert stats.failed_at[row].item() == pytest.approx(math.log(square / (square - 1)) / 2, rel=1e-3)


@pytest.mark.parametrize("solver", [*CONTROLLED, TorchDiffEq("dopri5"), *FIXED, TORCHDIFFEQ], ids=name)
def test_a_hundred_rows_in_a_thousand_fail_when_and_why_they_should(solver: Any) -> None:
    """NaN and inf at the start; z' = z^3 - z blows up at the closed form's time, on a fixed grid some steps later."""
    z, healthy = spoiled()
    stats = ODEBlock(cubic, t1=3.0, solver=solver, on_failure="isolate").solve(z).stats
    at_start = ~z.isfinite().all(dim=1)
    later = ~healthy & ~at_start
    assert (at_start.sum(), later.sum()) == (75, 25)
    wanted = torch.where(healthy, Status.OK, torch.where(at_start, Status.NONFINITE, Status.BLOW_UP))
    assert torch.equal(stats.status, wanted)
    assert stats.failed_at[healthy].isnan().all() and (stats.failed_at[at_start] == 0.0).all()
    square = z[later].abs().amax(dim=1).square()
    late = stats.failed_at[later] - (square / (square - 1)).log() / 2
    if solver in FIXED or solver == TORCHDIFFEQ:
        assert (late > 0).all() and (late < (3.0 if solver == TORCHDIFFEQ else 0.6)).all()
    else:
        assert late.abs().max() < 1e-5


class Growth(nn.Module):
    """The cubic with both rates as parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(torch.tensor([1.0, -1.0], dtype=F64))

    def forward(self, z: Tensor) -> Tensor:
        return self.rates[0] * z**3 + self.rates[1] * z


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint(), Reversible(), Adjoint()], ids=name)
def test_parameters_get_the_gradient_of_the_healthy_rows_alone(gradient: Any) -> None:
    """Rows that are NaN, inf or blow up do not spoil the gradient of a shared parameter, in any gradient mode."""
    z, healthy = spoiled()
    block = ODEBlock(Growth(), t1=3.0, gradient=gradient)
    ends = block.solve(z, on_failure="isolate").final[healthy], block(z[healthy])
    found, wanted = (torch.autograd.grad(end.square().sum(), block.f.rates)[0] for end in ends)
    assert torch.equal(found, wanted) and found.abs().min() > 0.1


@pytest.mark.parametrize(
    "block",
    [
        DropoutSDEBlock(cubic, 0.1, solver=EulerMaruyama(30), on_failure="isolate"),
        DropoutSDEBlock(cubic, 0.1, solver=StratonovichHeun(30), calculus="stratonovich", on_failure="isolate"),
        SDEBlock(cubic, small, solver=Milstein(30), noise="scalar", on_failure="isolate"),
        SDEBlock(cubic, small, solver=ReversibleHeun(30), calculus="stratonovich", on_failure="isolate"),
        SDEBlock(cubic, small, solver=TorchSDE("euler", 30), on_failure="isolate"),
    ],
    ids=["noisy clock", "stratonovich", "milstein", "reversible", "torchsde"],
)
def test_a_row_keeps_its_own_noise_when_others_fail(block: Any) -> None:
    """With the same seed, healthy rows among NaN, inf and blow-ups follow their path among harmless mates."""
    z, healthy = spoiled()
    z[healthy] *= 0.3
    at_start = ~z.isfinite().all(dim=1)
    z[~healthy & ~at_start] *= 1e30  # which blows up whatever the noise
    causes = torch.where(healthy, Status.OK, torch.where(at_start, Status.NONFINITE, Status.BLOW_UP))
    harmless = torch.where(healthy[:, None], z, 0.0)
    for t1 in (None, 0.5 + torch.rand(BATCH, dtype=F64)):
        found, wanted = (block.solve(s, t1=t1, generator=torch.Generator().manual_seed(5)) for s in (z, harmless))
        assert torch.equal(wanted.stats.status, torch.zeros(BATCH, dtype=torch.long))
        assert torch.equal(found.final[healthy], wanted.final[healthy])
        assert torch.equal(found.stats.status, causes) and found.final[~healthy].isnan().all()


def test_given_increments_follow_their_rows() -> None:
    """Increments handed over are picked for the healthy rows."""
    z, healthy = spoiled()
    z[~healthy] = float("nan")
    dw = 0.1 * torch.randn(10, BATCH, 2, dtype=F64)
    block = SDEBlock(cubic, torch.cos, solver=EulerMaruyama(10), on_failure="isolate", time=False)
    found = block.solve(z, noise=dw).final[healthy]
    assert torch.equal(found, block.solve(z[healthy], noise=dw[:, healthy]).final)


def test_context_and_end_times_follow_their_rows() -> None:
    """Per-sample context and end times are picked with the rows; a context for all is left whole."""
    z, healthy = spoiled()
    z[~healthy] = float("nan")
    own, shared = torch.randn(BATCH, 2, dtype=F64), torch.randn(2, dtype=F64)
    t1 = 0.5 + torch.rand(BATCH, dtype=F64)
    block = ODEBlock(lambda t, z, a, b: cubic(z) + 0.01 * (a * t + b), t1=3.0, time=True, on_failure="isolate")
    found = block.solve(z, t1=t1, context=(own, shared))
    wanted = block.solve(z[healthy], t1=t1[healthy], context=(own[healthy], shared))
    assert torch.equal(found.stats.status == Status.OK, healthy)
    assert torch.equal(found.final[healthy], wanted.final)


def test_running_integrals_follow_their_rows() -> None:
    """Regularisers accumulate for healthy rows as alone, with the same probes, and are NaN for failed ones."""
    z, healthy = spoiled()
    z[~healthy] = float("nan")
    running = [KineticRegularizer(), JacobianRegularizer()]
    block = ODEBlock(cubic, on_failure="isolate")
    harmless = torch.where(healthy[:, None], z, 0.0)
    found, wanted = (
        block.solve(start, running=running, generator=torch.Generator().manual_seed(2)).running
        for start in (z, harmless)
    )
    for a, b in zip(found, wanted, strict=True):
        assert a[~healthy].isnan().all() and torch.allclose(a[healthy], b[healthy], rtol=1e-4, atol=1e-7)


def test_a_failed_row_costs_nothing_in_an_augmented_block() -> None:
    """The padded state is isolated and cropped like any other."""
    z, healthy = spoiled()
    block = AugmentedODEBlock(cubic, 2, keep=False, on_failure="isolate")
    out = block(z[:200])
    assert out.shape == (200, 2) and torch.equal(out[healthy[:200]], block(z[:200][healthy[:200]]))


@pytest.mark.parametrize("solver", [Dopri5(), OWN, RK4(20), TorchDiffEq("dopri5")], ids=name)
def test_when_all_rows_fail_the_result_is_nan_and_says_so(solver: Any) -> None:
    """No healthy row: NaN of the right shape, every status set, and no error."""
    z = torch.full((5, 2), float("nan"), dtype=F64)
    solution = ODEBlock(cubic, solver=solver, on_failure="isolate").solve(z, [0.0, 0.5, 1.0])
    assert solution.zs.shape == (3, 5, 2) and solution.zs.isnan().all()
    assert solution.stats.status.tolist() == [Status.NONFINITE] * 5


def test_isolation_can_be_asked_for_in_one_call() -> None:
    """solve(on_failure=) takes the place of the block's own, both ways."""
    z = torch.tensor([[0.5], [float("nan")]], dtype=F64)
    careful, strict = ODEBlock(cubic, on_failure="isolate"), ODEBlock(cubic)
    assert torch.equal(strict.solve(z, on_failure="isolate").final[0], careful(z)[0])
    with pytest.raises(SolveError):
        careful.solve(z, on_failure="raise")
    with pytest.raises(ValueError, match="expected one of 'raise', 'isolate'"):
        strict.solve(z, on_failure="drop")


def test_rows_that_only_torchdiffeq_s_field_spoils_are_told_apart() -> None:
    """A field that is NaN in one row at the start fails that row, not its mates, under TorchDiffEq too."""
    z = torch.tensor([[0.5], [-0.5]], dtype=F64)
    for solver in (Dopri5(), OWN, TorchDiffEq("dopri5")):
        stats = ODEBlock(torch.log, t1=0.1, solver=solver, on_failure="isolate", time=False).solve(z).stats
        assert stats.status.tolist() == [Status.OK, Status.NONFINITE] and stats.failed_at[1] == 0.0


@pytest.mark.parametrize(
    "solver",
    [
        *(Dopri5(max_steps=200), Tsit5(max_steps=200), replace(OWN, max_steps=200), Rodas5P(max_steps=200)),
        *(RK4(20), TorchDiffEq("dopri5"), TorchDiffEq("rk4", step_size=0.1)),
    ],
    ids=name,
)
@pytest.mark.parametrize("rate", [-1e36, 1e36])
def test_a_huge_field_neither_hangs_nor_hides_its_rows(solver: Any, rate: float) -> None:
    """Finite values whose scaled norm overflows still fail by row, and their mates are solved."""
    z = torch.tensor([[1.0], [0.0]])
    stats = ODEBlock(lambda z: rate * z, solver=solver, on_failure="isolate").solve(z).stats
    assert stats.status.tolist() == [Status.BLOW_UP, Status.OK]
