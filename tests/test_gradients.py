"""Gradients through the steps taken: Backprop against finite differences, Checkpoint against Backprop.

More finite differences stand in test_gradcheck.py, more derivatives in test_oracles_parameters.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from odelayers import (
    RK4,
    Adjoint,
    AugmentedODEBlock,
    Backprop,
    Checkpoint,
    Dopri5,
    DropoutSDEBlock,
    EulerMaruyama,
    GradientError,
    ODEBlock,
    Reversible,
    SDEBlock,
    count_nfe,
)
from problems import ODE_SOLVERS, SDE_SOLVERS, TanhNet, gradients, name

pytestmark = pytest.mark.timeout(60)
AGAIN = (Checkpoint(), Reversible(), Adjoint())
TIGHT = Dopri5(rtol=1e-9, atol=1e-9)


def reading(solver: Any) -> dict[str, str]:
    """Scalar noise in the first reading that a solver converges to."""
    return {"calculus": solver.calculus[0], "noise": "scalar"}


@pytest.mark.parametrize("solver", [*ODE_SOLVERS[:4], TIGHT], ids=name)
def test_backprop_passes_gradcheck_and_gradgradcheck(solver: Any) -> None:
    """Griewank and Walther 2008: First and second derivatives in the state, the context and the end time agree with
    finite differences."""
    net = TanhNet(2, 3)
    block = ODEBlock(net, solver=solver)
    z, context = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (2, 3))
    t1 = torch.tensor([0.7, 1.1], dtype=torch.float64, requires_grad=True)

    def run(z: Tensor, context: Tensor, t1: Tensor) -> Tensor:
        return block(z, t1, context=context)

    assert gradcheck(run, (z, context, t1), atol=1e-6)
    assert gradgradcheck(run, (z, context, t1), atol=1e-5)


@pytest.mark.parametrize("solver", SDE_SOLVERS, ids=name)
def test_backprop_through_a_noisy_path_passes_gradcheck(solver: Any) -> None:
    """With its increments given, an SDE's end state is an ordinary function of the start."""
    drift, diffusion = TanhNet(2, 3), TanhNet(2, 3, scale=0.3)
    block = SDEBlock(drift, diffusion, solver=solver, **reading(solver))
    z, dw = torch.randn(2, 2, dtype=torch.float64, requires_grad=True), 0.4 * torch.randn(6, 2, dtype=torch.float64)
    assert gradcheck(lambda z: block.solve(z, noise=dw).final, (z,), atol=1e-6)
    assert gradgradcheck(lambda z: block.solve(z, noise=dw).final, (z,), atol=1e-5)


def all_gradients(block: nn.Module, mode: str) -> list[Tensor | None]:
    """The gradients of a loss over one solve with respect to everything that can have one."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
    context = torch.randn(4, 5, generator=g, dtype=torch.float64).requires_grad_()
    t1 = torch.tensor([0.5, 0.9, 1.3, 1.0] if mode == "per sample" else 1.2, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    if mode == "outputs":
        zs = block.solve(z, torch.tensor([0.2, 0.33, 0.9, 1.7]), context=context).zs
    else:
        zs = block.solve(z, t1=t1, context=context).zs
    weights = torch.randn(zs.shape, generator=g, dtype=torch.float64)
    return gradients((weights * zs).sum() + zs[-1].square().sum(), [z, context, t1, *block.parameters()])


def assert_equal(found: list[Tensor | None], wanted: list[Tensor | None], tolerance: float = 1e-12) -> None:
    """The same tensors have a gradient, and the same one."""
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None and b is not None:
            assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), (i, (a - b).abs().max())


@pytest.mark.parametrize("mode", ["outputs", "one end", "per sample"])
@pytest.mark.parametrize("solver", ODE_SOLVERS, ids=name)
def test_checkpoint_equals_backprop_on_odes(solver: Any, mode: str) -> None:
    """State, context, end times and parameters get the gradient of the steps taken, to rounding."""
    net = TanhNet()
    found, wanted = (all_gradients(ODEBlock(net, solver=solver, gradient=g), mode) for g in (Checkpoint(), Backprop()))
    assert_equal(found, wanted)


@pytest.mark.parametrize("mode", ["outputs", "one end", "per sample"])
@pytest.mark.parametrize("solver", SDE_SOLVERS, ids=name)
def test_checkpoint_equals_backprop_on_sdes(solver: Any, mode: str) -> None:
    """The noise drawn again is the noise drawn, for drift and diffusion apart and for the noisy clock."""
    drift, diffusion = TanhNet(), TanhNet(scale=0.4)
    for build in (
        lambda g: SDEBlock(drift, diffusion, solver=solver, gradient=g, **reading(solver)),
        lambda g: DropoutSDEBlock(drift, 0.3, solver=solver, gradient=g, **reading(solver)),
    ):
        assert_equal(*(all_gradients(build(g), mode) for g in (Checkpoint(), Backprop())))


def test_checkpoint_holds_through_augmentation_and_layers_around() -> None:
    """A block in the middle of a network, its state padded, passes the gradient on to the layers before it."""
    torch.manual_seed(1)
    before, field = nn.Linear(4, 2, dtype=torch.float64), TanhNet(5, 4)
    x, found = torch.randn(6, 4, dtype=torch.float64), []
    for g in (Checkpoint(), Backprop()):
        block = AugmentedODEBlock(field, 3, keep=False, gradient=g)
        loss = block(before(x)).square().sum()
        found.append(gradients(loss, [*before.parameters(), *field.parameters()]))
    assert_equal(*found)


class Partly(nn.Module):
    """A field with one layer in use, one unused and one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = (nn.Linear(2, 2, dtype=torch.float64) for _ in range(3))
        self.frozen.requires_grad_(False)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.used(z)) - self.frozen(z)


@pytest.mark.parametrize("gradient", [Backprop(), *AGAIN], ids=name)
def test_unused_and_frozen_parameters_get_none(gradient: Any) -> None:
    """As in plain torch: no gradient rather than zeros; and z0 needs none of its own."""
    f = Partly()
    ODEBlock(f, gradient=gradient)(torch.randn(3, 2, dtype=torch.float64)).sum().backward()
    assert f.used.weight.grad is not None and f.used.weight.grad.abs().max() > 0
    assert f.unused.weight.grad is None
    assert f.frozen.weight.grad is None


@pytest.mark.parametrize("gradient", [Backprop(), *AGAIN], ids=name)
def test_a_plain_function_passes_the_gradient_to_the_state(gradient: Any) -> None:
    """z' = -z: the gradient is exp(-1); without anything that needs one the result has no graph."""
    block = ODEBlock(lambda z: -z, solver=RK4(steps=50), gradient=gradient)
    z = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    block(z).sum().backward()
    assert z.grad is not None and torch.allclose(z.grad, torch.full_like(z, 0.36787944), atol=1e-8)
    assert not block(z.detach()).requires_grad
    with torch.no_grad():
        assert not block(z).requires_grad


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_incoming_gradient_is_reported_as_the_loss_s(gradient: Any, bad: float) -> None:
    """NaN from the loss is not mistaken for a failed solve."""
    z = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    out = ODEBlock(TanhNet(2), gradient=gradient)(z)
    with pytest.raises(GradientError, match="backward pass: the gradient that reaches the solution is NaN or inf"):
        out.backward(torch.full_like(out, bad))


@pytest.mark.parametrize("gradient", [Backprop(), *AGAIN], ids=name)
def test_retain_graph_gives_the_same_gradient_twice(gradient: Any) -> None:
    """A second backward pass over a retained graph repeats the first; without it torch refuses."""
    net = TanhNet(2)
    loss = ODEBlock(net, gradient=gradient)(torch.ones(2, 2, dtype=torch.float64)).sum()
    first = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(net.parameters()))
    assert_equal(list(first), list(second), 0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("gradient", AGAIN, ids=name)
def test_second_derivatives_are_refused_where_they_would_be_wrong(gradient: Any) -> None:
    """A gradient that evaluates again is differentiable once: a gradient penalty is refused, not dropped silently."""
    z = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    for power in (1, 2):  # the loss's own second derivative is 0 for the first, and torch would then see no graph
        out = ODEBlock(TanhNet(2), gradient=gradient)(z)
        with pytest.raises(RuntimeError, match=r"twice.*Backprop"):
            torch.autograd.grad(out.pow(power).sum(), z, create_graph=True)


@pytest.mark.parametrize("gradient", [Backprop(), *AGAIN], ids=name)
def test_count_nfe_sees_forward_and_backward(gradient: Any) -> None:
    """The counter agrees with calls counted in the field itself, forwards and backwards, and then stops."""
    net, calls = TanhNet(3), []
    net.register_forward_hook(lambda *_: calls.append(1))
    block = nn.Sequential(ODEBlock(net, solver=RK4(steps=5), gradient=gradient))
    with count_nfe(block) as count:
        out = block(torch.randn(2, 3, dtype=torch.float64))
        assert count.nfe == len(calls)
        forward = count.nfe
        out.sum().backward()
        assert count.nfe == len(calls)
    assert count.nfe - forward == {"Backprop": 0, "Checkpoint": 20, "Reversible": 40, "Adjoint": 20}[name(gradient)]
    block(torch.randn(2, 3, dtype=torch.float64))
    assert count.nfe < len(calls)
    with pytest.raises(ValueError, match="count_nfe: expected a module that holds a block"), count_nfe(net):
        pass


@pytest.mark.parametrize("solver", [RK4(steps=5), Dopri5()], ids=name)
def test_the_gradient_leaves_the_solution_and_its_cost_alone(solver: Any) -> None:
    """The forward solve is the same, state for state and evaluation for evaluation; Reversible alone has its own."""
    net, z = TanhNet(3), torch.randn(2, 3, dtype=torch.float64)
    runs = [
        ODEBlock(net, solver=solver, gradient=g).solve(z, [0.0, 0.3, 1.0])
        for g in (Backprop(), Checkpoint(), Adjoint())
    ]
    assert all(torch.equal(run.zs, runs[0].zs) for run in runs)
    assert len({(run.stats.nfe, run.stats.accepted, run.stats.rejected) for run in runs}) == 1


def test_noise_is_counted_as_it_is_evaluated() -> None:
    """A noisy clock costs one evaluation of the field a step, like Euler."""
    block = DropoutSDEBlock(TanhNet(3), 0.2, solver=EulerMaruyama(steps=9))
    assert block.solve(torch.randn(2, 3, dtype=torch.float64)).stats.nfe == 9
