"""Gradients where the tensors of a solve are made from one another, or enter it beside the field."""

from __future__ import annotations

from collections.abc import Callable

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
    GradientError,
    ODEBlock,
    Reversible,
    TorchDiffEq,
)
from odelayers._gradients import Gradient
from odelayers._solvers import Solver

F64 = torch.float64
AGAIN = [
    (Checkpoint(), RK4(20), 1e-12),
    (Reversible(), Dopri5(1e-9, 1e-9), 1e-6),
    (Adjoint(), Dopri5(1e-9, 1e-9), 1e-6),
    (Adjoint(), TorchDiffEq("dopri5", 1e-9, 1e-9), 1e-6),
]


class Scaled(nn.Module):
    """f(z, c) = -w c z, with a parameter from which a context can be made."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7, dtype=F64))

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        return -self.w * c * z


def grads(gradient: Gradient, solver: Solver, loss: Callable[[ODEBlock, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    f, c = Scaled(), torch.linspace(0.2, 0.9, 3, dtype=F64).unsqueeze(1).requires_grad_()
    out = loss(ODEBlock(f, time=False, solver=solver, gradient=gradient), c)
    found = torch.autograd.grad(out, [f.w, c], allow_unused=True)
    return tuple(torch.zeros(1) if g is None else g for g in found)  # type: ignore[return-value]


CASES: dict[str, Callable[[ODEBlock, Tensor], Tensor]] = {
    "end time from context": lambda b, c: b(torch.ones(3, 1, dtype=F64), 1 + c.sum(1), context=c).sum(),
    "end time from context, saved": lambda b, c: b(torch.ones(3, 1, dtype=F64), 1 + c.square().sum(1), context=c).sum(),
    "context from parameter": lambda b, c: b(torch.ones(3, 1, dtype=F64), context=b.f.w.square() + c.detach()).sum(),
    "state, context and end time from one": lambda b, c: b(c.exp(), 1 + c.sum(1), context=c.sin()).square().sum(),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("gradient", "solver", "tolerance"), AGAIN, ids=["checkpoint", "reversible", "adjoint", "torchdiffeq"]
)
def test_a_path_between_the_tensors_of_a_solve_is_walked_once(
    case: str, gradient: Gradient, solver: Solver, tolerance: float
) -> None:
    """A context made from a parameter, an end time made from a context: the gradient is backpropagation's."""
    expected = grads(Backprop(), Dopri5(1e-10, 1e-10) if tolerance > 1e-9 else solver, CASES[case])
    for ours, theirs in zip(grads(gradient, solver, CASES[case]), expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * (1 + theirs.abs().max())


@pytest.mark.parametrize("failed", [False, True])
def test_an_end_time_s_gradient_runs_through_the_noise_too(failed: bool) -> None:
    """Checkpoint equals Backprop for per-sample end times of an SDE, also after rows were left out."""
    z = torch.tensor([[torch.nan if failed else 1.0], [1.0], [2.0]], dtype=F64)
    found = []
    for gradient in (Backprop(), Checkpoint()):
        t1 = torch.tensor([0.5, 1.0, 1.5], dtype=F64, requires_grad=True)
        block = DropoutSDEBlock(torch.sin, 0.5, time=False, gradient=gradient, on_failure="isolate")
        final = block.solve(z, t1=t1, generator=torch.Generator().manual_seed(3)).final
        found.append(torch.autograd.grad(final[1:].sum(), t1)[0])
    assert (found[0] - found[1]).abs().max() < 1e-12 and found[0][1:].abs().min() > 1e-3


def test_no_time_passing_leaves_a_finite_gradient_in_an_sde() -> None:
    """At t1 = t0 the root of the rate has no derivative; its row's gradient is that of the drift alone."""
    t1 = torch.tensor([0.0, 1.0], dtype=F64, requires_grad=True)
    out = DropoutSDEBlock(lambda z: -z, 0.5)(torch.ones(2, 2, dtype=F64), t1)
    (found,) = torch.autograd.grad(out.sum(), t1)
    assert found.isfinite().all() and abs(found[0].item() + 2.0) < 1e-12


def test_given_increments_get_a_gradient_in_every_mode() -> None:
    """d z_T / d dW through Checkpoint is that of Backprop."""
    found = []
    for gradient in (Backprop(), Checkpoint()):
        dw = (torch.arange(10, dtype=F64) / 50).reshape(5, 2, 1).requires_grad_()
        block = DropoutSDEBlock(lambda z: -z, 0.5, solver=EulerMaruyama(5), gradient=gradient)
        found.append(torch.autograd.grad(block.solve(torch.ones(2, 1, dtype=F64), noise=dw).final.sum(), dw)[0])
    assert (found[0] - found[1]).abs().max() < 1e-14 and found[0].abs().min() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_row_s_drift_is_judged_by_its_own_size(scale: float) -> None:
    """A contracting row among large mates is refused as it is alone."""
    rate = torch.tensor([[5.0], [0.0]], dtype=F64)
    block = ODEBlock(lambda z, k: -k * torch.tanh(z), time=False, t1=2.5, gradient=Adjoint())
    z = torch.tensor([[1.0], [scale]], dtype=F64, requires_grad=True)
    with pytest.raises(GradientError, match=r"worst row 0"):
        block(z, context=rate).sum().backward()


def test_checkpoint_keeps_nothing_where_nothing_wants_a_gradient() -> None:
    """With gradients on and nothing to differentiate, the result carries no graph."""
    assert not ODEBlock(lambda z: -z, gradient=Checkpoint())(torch.ones(2, 1)).requires_grad
