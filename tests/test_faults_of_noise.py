"""Bad input to blocks with noise and to the rest of the solvers: the same typed errors as of an ODE block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from odelayers import (
    Adjoint,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    Equilibrium,
    Euler,
    EulerMaruyama,
    Implicit,
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
)
from problems import TanhNet, name

pytestmark = pytest.mark.timeout(60)
F64 = torch.float64
NAN, INF = float("nan"), float("inf")
OWN = (EulerMaruyama, Milstein, StratonovichHeun, ReversibleHeun)
SOLVERS = (*(cls(steps=8) for cls in OWN), TorchSDE("euler", 8))


def noisy(solver: Any, **options: Any) -> SDEBlock:
    """A block with a drift and a diffusion without parameters."""
    calculus = solver.calculus[0]
    return SDEBlock(torch.sin, torch.cos, solver=solver, calculus=calculus, noise="scalar", time=False, **options)


def dropped(solver: Any, **options: Any) -> DropoutSDEBlock:
    """A block with dropout noise."""
    return DropoutSDEBlock(torch.sin, 0.1, solver=solver, calculus=solver.calculus[0], time=False, **options)


BLOCKS = [
    pytest.param(make, solver, id=f"{make.__name__}-{name(solver)}")
    for make in (noisy, dropped)
    for solver in SOLVERS
    if not (make is dropped and isinstance(solver, Milstein))
]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("make, solver", BLOCKS)
def test_a_bad_initial_row_is_named_by_blocks_with_noise(make: Any, solver: Any, bad: float) -> None:
    """NaN or inf in one row of z0: the row, the start time and the cause."""
    z = torch.ones(4, 2, dtype=F64)
    z[2, 1] = bad
    with pytest.raises(SolveError, match="To mend it:") as caught:
        make(solver, t0=0.25)(z)
    assert (caught.value.rows, caught.value.t, caught.value.status) == ((2,), (0.25,), Status.NONFINITE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make, solver", BLOCKS)
def test_half_precision_with_noise_is_carried_in_float32(make: Any, solver: Any, dtype: torch.dtype) -> None:
    """The same path as from the float32 state, to two roundings of the result; the gradient has the state's dtype."""
    block, low = make(solver), torch.randn(4, 2).to(dtype).requires_grad_()
    found, wanted = (block.solve(z, generator=torch.Generator().manual_seed(1)).final for z in (low, low.float()))
    assert found.dtype == dtype and (found.float() - wanted).abs().max() < 2 * torch.finfo(dtype).eps
    found.sum().backward()
    assert low.grad is not None and low.grad.dtype == dtype and low.grad.isfinite().all()


@pytest.mark.parametrize(
    "block",
    [
        *(noisy(solver) for solver in SOLVERS),
        noisy(ReversibleHeun(4), gradient=Reversible()),
        ODEBlock(torch.sin, time=False, solver=Rodas5P()),
        ODEBlock(torch.sin, time=False, gradient=Reversible()),
        ODEBlock(torch.sin, time=False, gradient=Adjoint()),
        ODEBlock(torch.sin, time=False, solver=TorchDiffEq("dopri5"), gradient=Adjoint()),
    ],
    ids=lambda block: f"{name(block.solver)}-{name(block.gradient)}",
)
def test_an_empty_batch_gives_an_empty_result_everywhere(block: Any) -> None:
    """Shape, status and gradient of nothing."""
    z = torch.zeros(0, 3, 2, dtype=F64, requires_grad=True)
    solution = block.solve(z, [0.0, 0.5, 1.0])
    assert solution.zs.shape == (3, 0, 3, 2) and solution.stats.status.shape == (0,)
    block(z).sum().backward()
    assert z.grad is not None and z.grad.shape == z.shape


@pytest.mark.parametrize("solver", OWN, ids=name)
@pytest.mark.parametrize("steps, kind", [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)])
def test_nonsense_steps_of_an_sde_solver_are_refused(solver: Any, steps: Any, kind: type[Exception]) -> None:
    """As of a fixed grid without noise."""
    with pytest.raises(kind, match=rf"{name(solver)}: steps: expected an int >= 1, got {steps}"):
        solver(steps=steps)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rtol'"):
        solver(steps=4, rtol=1e-3)


@pytest.mark.parametrize("make", [Rodas5P, lambda **given: TorchDiffEq("dopri5", **given)], ids=["own", "torchdiffeq"])
@pytest.mark.parametrize(
    "given, kind, words",
    [
        ({"rtol": -1.0}, ValueError, "rtol: expected a number > 0, got -1.0"),
        ({"atol": NAN}, ValueError, "atol: expected a finite number, got nan"),
        ({"rtol": "1"}, TypeError, r"rtol: expected a number, got '1' \(str\)"),
        ({"max_steps": 0}, ValueError, "max_steps: expected an int >= 1, got 0"),
        ({"batch": "shared"}, TypeError, "unexpected keyword argument 'batch'"),
    ],
)
def test_nonsense_of_other_controlled_solvers_is_refused(make: Any, given: Any, kind: Any, words: str) -> None:
    """Rodas5P and TorchDiffEq check what Dopri5 checks."""
    with pytest.raises(kind, match=words):
        make(**given)


@pytest.mark.parametrize("solver", [Dopri5(), Dopri5(batch="independent"), Rodas5P(), Euler(4)], ids=name)
def test_backprop_passes_a_bad_incoming_gradient_on_as_torch_does(solver: Any) -> None:
    """NaN in one row's gradient is NaN in this row's and the parameters'; the other rows' is what it is without."""
    net, z = nn.Linear(2, 2, dtype=F64), torch.ones(3, 2, dtype=F64, requires_grad=True)
    found = []
    for value in (1.0, NAN):
        out = ODEBlock(net, solver=solver)(z)
        incoming = torch.ones_like(out)
        incoming[1] = value
        found.append(torch.autograd.grad(out, [z, net.weight], incoming))
    (wanted, _), (rows, weight) = found
    assert torch.equal(rows[[0, 2]], wanted[[0, 2]])
    assert rows[1].isnan().all() and weight.isnan().all()


@pytest.mark.parametrize("gradient", [Backprop(), Checkpoint()], ids=name)
def test_a_block_with_noise_may_go_to_eval_before_backward(gradient: Any) -> None:
    """The noise of the forward pass is the backward pass's, though evaluation has none."""
    f, z, found = TanhNet(2), torch.randn(3, 2, dtype=F64), []
    for flip in (False, True):
        block = DropoutSDEBlock(f, 0.3, solver=EulerMaruyama(6), gradient=gradient).train()
        out = block.solve(z, generator=torch.Generator().manual_seed(2)).final
        if flip:
            block.eval()
        found.append(torch.autograd.grad(out.sum(), list(f.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    quiet = torch.autograd.grad(block(z).sum(), list(f.parameters()))
    assert not torch.allclose(quiet[0], found[0][0])  # control: without noise it is another


class Level(nn.Module):
    """Rests at `level` in training and at twice that in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.ones(1, dtype=F64))

    def forward(self, z: Tensor) -> Tensor:
        return self.level * (1 if self.training else 2) - z


@pytest.mark.parametrize("flip", [False, True])
def test_an_equilibrium_s_gradient_holds_the_mode_of_the_forward_pass(flip: bool) -> None:
    """d level / d level = 1 in training, whatever the mode at the backward pass; 2 in evaluation (control)."""
    block = ODEBlock(Level(), t1=Equilibrium(1e-6, 100.0), solver=Dopri5(1e-9, 1e-9), gradient=Implicit())
    for training, wanted in ((True, 1.0), (False, 2.0)):
        out = block.train(training)(torch.zeros(1, 1, dtype=F64))
        block.train(training != flip)
        (found,) = torch.autograd.grad(out.sum(), block.f.level)
        assert found.item() == pytest.approx(wanted, abs=1e-6)
